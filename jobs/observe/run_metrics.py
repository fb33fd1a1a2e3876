"""The metrics of one run: its outcomes, and what its workers measured, added up in the driver."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from blocksight.jobs.ledger.stop_request import RUNS_FOLDER
from blocksight.jobs.observe.catalogue import OTHER, STATES
from blocksight.jobs.observe.metrics_file import MetricsFile
from blocksight.jobs.observe.registry import OF_PROCESS, OF_WORKERS, Registry, Sample, record_all
from blocksight.jobs.plan.records import DeadLetter, Outcome, Receipt, UnitFailure
from blocksight.storage.outputs.schema import OK, REJECTED
from blocksight.storage.rejects import RejectCode
from blocksight.storage.stores.store import ObjectStore, StoreError

SHOW_SECONDS = 5.0
KNOWN_CODES = frozenset(RejectCode)

Export = Callable[[Sequence[Sample]], None]


class RunMetrics:
    """Counts a run's outcomes, and adds up what its stages measured."""

    def __init__(
        self,
        num_units: int,
        num_workers: int | None,
        export: Export = lambda _: None,
        send: Export = lambda _: None,
    ) -> None:
        """`num_workers`: None where more may join. `export` passes on what this process measured, `send` all."""
        self.registry = Registry()
        self._export, self._send = export, send
        self._num_workers = num_workers
        self._states = Counter(open=num_units)
        self._start = time.monotonic()
        self._explain_seconds = 0.0
        self._worked_seconds = 0.0
        for left in (OF_PROCESS, OF_WORKERS):  # by an earlier run of this process
            left.taken()
        self._record([Sample("blocksight_records_total", (status,), 0) for status in (OK, REJECTED)])
        self._record(self._gauges())

    def add(self, outcome: Outcome) -> float:
        """Counts a unit's outcome. Returns the seconds of work in the stages since the last one."""
        self._take()
        worked = self.registry.total("blocksight_stage_seconds_total")
        seconds, self._worked_seconds = worked - self._worked_seconds, worked
        if isinstance(outcome, Receipt):
            self._move("committed")
            self._explain_seconds += outcome.explain_seconds or 0.0
            self._record([*_of_receipt(outcome), Sample("blocksight_unit_seconds", (), seconds)])
        elif isinstance(outcome, UnitFailure | DeadLetter):
            self._move("failed" if isinstance(outcome, UnitFailure) else "dead")
        self._record(self._gauges())
        return seconds

    @contextmanager
    def shown(self, path: str | None) -> Iterator[None]:
        """Shows the values while the body runs: to `export`, and in the metrics file at `path`, if there is one.

        Ray shows a gauge once each time that it is set, so it is set again and again. Raises ConfigError at once if
        the file cannot be written.
        """
        writes = (lambda: None) if path is None else MetricsFile(path, self.registry).write
        is_over = threading.Event()

        def show() -> None:
            while not is_over.wait(SHOW_SECONDS):
                self._record(self._gauges())
                writes()

        shower = threading.Thread(target=show, name="run-metrics", daemon=True)
        shower.start()
        try:
            yield
        finally:
            is_over.set()
            shower.join()
            self._take()
            self._record(self._gauges())
            writes()

    def store(self, output: ObjectStore, run_id: str) -> None:
        """Stores the figures beside the run's record."""
        with suppress(StoreError):  # the output is complete without them
            output.put(f"{RUNS_FOLDER}{run_id}/metrics.json", json.dumps(self.registry.figures(), indent=1).encode())

    def _take(self) -> None:
        self._record(OF_PROCESS.taken())
        self._add_up(OF_WORKERS.taken())

    def _move(self, state: str) -> None:
        self._states["open"] -= 1
        self._states[state] += 1

    def _record(self, samples: Sequence[Sample]) -> None:
        self._add_up(samples)
        self._export(samples)

    def _add_up(self, samples: Sequence[Sample]) -> None:
        record_all(self.registry, samples)
        self._send(samples)

    def _gauges(self) -> list[Sample]:
        states = [Sample("blocksight_units", (state,), self._states[state]) for state in STATES]
        elapsed = time.monotonic() - self._start
        if self._num_workers is None or elapsed <= 0:
            return states
        busy = min(1.0, self._explain_seconds / (elapsed * self._num_workers))
        return [*states, Sample("blocksight_gpu_busy_ratio", (), busy)]


def _of_receipt(receipt: Receipt) -> list[Sample]:
    return [
        Sample("blocksight_records_total", (OK,), receipt.num_ok),
        Sample("blocksight_records_total", (REJECTED,), receipt.num_rejected),
        Sample("blocksight_forwards_total", (), receipt.num_forwards),
        *(
            Sample("blocksight_rejects_total", (code if code in KNOWN_CODES else OTHER,), count)
            for code, count in receipt.rejects.items()
        ),
    ]
