"""The Ray Data pipeline: the local runner's three steps on CPU tasks and GPU actors, or all three on CPU actors.

Every Ray process imports this module. Only the actors import torch, so that the tasks that read and commit start
sooner and need less memory.
"""

import json
import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from blocksight.cluster.cores import compiler_threads
from blocksight.cluster.errors import ClusterError
from blocksight.cluster.exporter import export_values
from blocksight.cluster.nodes import NodeWatch
from blocksight.cluster.sizing import Sizing
from blocksight.cluster.switches import refuse_unsafe_switches
from blocksight.engine.errors import ModelError
from blocksight.engine.model.device_errors import device_trouble, told_by_device
from blocksight.jobs.evaluate.evaluation import EvaluationContext
from blocksight.jobs.ledger.attempt_markers import Attempt
from blocksight.jobs.ledger.stop_request import Stop
from blocksight.jobs.observe.catalogue import METRICS, SECONDS
from blocksight.jobs.observe.registry import OF_PROCESS, OF_WORKERS, Sample, record_all
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.context import JobContext
from blocksight.jobs.plan.estimate import MeasuredRate, estimate
from blocksight.jobs.plan.forward_setting import PlannedForward
from blocksight.jobs.plan.records import (
    DeadLetter,
    Evaluated,
    Outcome,
    Receipt,
    RecordFacts,
    Unit,
    UnitFailure,
    UnitInput,
    UnitResult,
    UnitReturned,
    UnitSkipped,
)
from blocksight.jobs.worker.attempts import WorkerStores, attempted, begin, go_on, open_worker_stores
from blocksight.jobs.worker.error_classes import UnfitWorkerError
from blocksight.jobs.worker.memory import keep_freed_memory
from blocksight.jobs.worker.unit import commit_unit, take_unit
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.stores.store import ObjectInfo, StoreError

if TYPE_CHECKING:
    from blocksight.engine.scoring.setting_choice import ForwardRequest  # which needs torch

WAVE_UNITS = 20_000
"""Units per Ray Data execution, after which the actors start anew. The driver's memory, 6 kB a unit, is bounded by it,
and does not grow with the data set."""

NO_PROGRESS_SECONDS = 3_600.0
"""If no unit finishes for so long the run ends. The watchdog ends a worker that hangs long before."""
NO_PROGRESS_FACTOR = 100
"""The run waits at least so many times the estimate of its longest unit, because estimates are rough."""

MAX_RETURNS = 4
"""A unit that was given back so often in one run stays open."""
UNFIT_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 10.0, 60.0
"""An unfit worker waits before it tries another unit, each time twice as long, so that the others take the units."""

UNITS_IN_FLIGHT = 2
"""Of an actor: the one that it explains, and one whose pixels are fetched meanwhile."""

CHECK_SECONDS = 300.0
"""How long the check of a GPU may wait for one."""

POLL_SECONDS = 0.5
READER = "blocksight-rows"
"""The name of the thread that reads the rows of Ray Data."""
END_SECONDS = 15.0
"""How long a run that is left early waits for the thread that reads its rows."""

ONE_UNIT: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
"""The batch that a step is called with."""

HEADER = pa.schema([("header", pa.string()), ("blob", pa.large_binary()), ("outcome", pa.string())])
"""What passes between steps: plain values as JSON, pixels or maps as raw bytes, or the unit's outcome. A column
`measured` beside them holds what the steps measured."""

Made = TypeVar("Made")

OUTCOMES = {kind.__name__: kind for kind in (Receipt, UnitFailure, DeadLetter, UnitSkipped, UnitReturned, Evaluated)}


def run_units(
    units: Sequence[Unit],
    context: JobContext,
    state: bytes | None,
    sizing: Sizing,
    stop: Stop,
    rate: MeasuredRate | None,
    tell: Callable[[str], None],
) -> Generator[Outcome, None, None]:
    """Explains the units on the connected Ray session and yields each outcome as it arrives.

    `tell` shows which nodes join or leave meanwhile.
    Ends early if `stop` was requested and its grace period is over. Raises ClusterError if the job cannot go on
    (the model does not load on the workers, no progress).
    """
    _set_up_ray_data()
    weights = None if state is None else ray.put(state)
    timeout_seconds = max(NO_PROGRESS_SECONDS, NO_PROGRESS_FACTOR * _longest_seconds(units, context, rate))
    yield from _wave_outcomes(
        units,
        lambda some, unfit: _explain_dataset(some, context, weights, sizing, unfit),
        stop,
        timeout_seconds,
        sizing.num_actors,
        NodeWatch(tell),
    )


def check_gpu(sizing: Sizing) -> None:
    """Tries the GPU that Ray gives to an actor, before any unit. Raises ClusterError if torch cannot use it."""
    task: Any = ray.remote(num_cpus=sizing.cpus_per_actor, num_gpus=sizing.gpus_per_actor, max_retries=0)(_gpu_trouble)
    try:
        trouble = ray.get(task.remote(), timeout=CHECK_SECONDS)
    except GetTimeoutError:  # other jobs have the GPUs: the actors wait for them too
        return
    except RayError as error:
        raise _cluster_error(error) from error
    if trouble is not None:
        raise ClusterError(f"Ray counts GPUs, and torch cannot use the one of {trouble}; or choose --device cpu")


def calls_of(work: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Submits a call of `work` to the connected session, on one core, and waits for the result of one submitted.

    The second raises as `work`, and ClusterError if the call's process dies again and again.
    """
    shared = [ray.put(work)]  # in a list Ray does not fetch it for each call
    task: Any = ray.remote(num_cpus=1)(_call)

    def result(submitted: Any) -> Any:
        try:
            return ray.get(submitted)
        except RayTaskError:  # of the class that `work` raised, too
            raise
        except RayError as error:
            raise _cluster_error(error) from error

    return lambda thing: task.remote(shared, thing), result


_HELD: dict[str, Callable[[Any], Any]] = {}
"""What this process is called for, by its reference: unpacked once, it opens its stores and reads its plan once."""


def _call(shared: Sequence[Any], thing: Any) -> Any:
    refuse_unsafe_switches()
    (reference,) = shared
    if reference.hex() not in _HELD:
        keep_freed_memory()
        _HELD.clear()
        _HELD[reference.hex()] = ray.get(reference)
    return _HELD[reference.hex()](thing)


def _gpu_trouble() -> str | None:
    """Node and reason if torch cannot compute on its GPU."""
    import torch

    try:
        torch.ones(1, device="cuda").add(1).item()
    except Exception as error:
        if device_trouble(error) is None:
            raise
        return f"{os.uname().nodename}: {told_by_device(error)}"
    return None


def learn_on_worker(
    context: JobContext, units: Sequence[Unit], state: bytes | None, sizing: Sizing
) -> Iterator[int | bytes]:
    """As `first_pass.learn`, on one worker of the connected Ray session. Raises ClusterError."""
    weights = None if state is None else ray.put(state)
    resources: dict[str, Any] = {"num_cpus": sizing.cpus_per_actor, "num_gpus": sizing.gpus_per_actor}
    task: Any = ray.remote(**resources, max_retries=0, num_returns="streaming")(_learn)
    try:
        for made in task.remote(context, units, weights):
            yield ray.get(made)
    except RayError as error:
        raise _cause(error) from error


def choose_on_worker(
    context: JobContext, state: bytes | None, request: "ForwardRequest", sizing: Sizing
) -> PlannedForward:
    """As `forward_choice.choose_here`, on one worker of the connected Ray session, while the others wait.

    Raises ClusterError also if the worker dies, or if none is free for an hour.
    """
    weights = None if state is None else ray.put(state)
    resources: dict[str, Any] = {"num_cpus": sizing.cpus_per_actor, "num_gpus": sizing.gpus_per_actor}
    task: Any = ray.remote(**resources, max_retries=0)(_choose)
    try:
        return ray.get(task.remote(context, weights, request), timeout=NO_PROGRESS_SECONDS)
    except GetTimeoutError as error:
        raise ClusterError(f"no worker has chosen a forward setting for {NO_PROGRESS_SECONDS:,.0f} s") from error
    except RayError as error:
        raise _cause(error) from error


def _choose(context: JobContext, weights: Any, request: "ForwardRequest") -> PlannedForward:
    refuse_unsafe_switches()
    _limit_compiler(context.device)
    from blocksight.jobs.explain.forward_choice import choose_here

    return choose_here(context, None if weights is None else ray.get(weights), request)


def _cause(error: RayError) -> Exception:
    """What a task raised, if it is a sentence for people; else a ClusterError."""
    if not isinstance(error, RayTaskError):
        return _cluster_error(error)
    cause = error.cause
    if cause is not None and device_trouble(cause) is not None and not isinstance(cause, ClusterError):
        return ClusterError(f"a worker on {error.ip} cannot go on: {told_by_device(cause)}")
    return cause if isinstance(cause, ConfigError | ModelError | StoreError | ClusterError) else _cluster_error(error)


def _learn(context: JobContext, units: Sequence[Unit], weights: Any) -> Iterator[int | bytes]:
    from blocksight.jobs.explain.first_pass import learn

    refuse_unsafe_switches()
    yield from learn(context, units, None if weights is None else ray.get(weights))


def _wave_outcomes(
    units: Sequence[Unit],
    wave_of: Callable[[Sequence[Unit], frozenset[str]], Dataset],
    stop: Stop,
    timeout_seconds: float,
    num_actors: int,
    watch: NodeWatch,
) -> Generator[Any, None, None]:
    """The units' outcomes, wave by wave, until `stop` is requested; units that are given back join a later wave.

    A wave is told which workers were unfit before it. Raises ClusterError, also if all workers are unfit.
    """
    waiting = deque(units)
    returns: Counter[str] = Counter()
    unfit: set[str] = set()
    were_unfit: set[str] = set()
    while waiting:
        wave = [waiting.popleft() for _ in range(min(WAVE_UNITS, len(waiting)))]
        outcomes = _outcomes_of_wave(wave_of(wave, frozenset(were_unfit)), stop, timeout_seconds, watch)
        with closing(_while_one_is_fit(outcomes, num_actors, unfit)) as arriving:
            for outcome in arriving:
                yield outcome
                were_unfit |= unfit
                if isinstance(outcome, UnitReturned):
                    [unit] = [one for one in wave if one.unit_id == outcome.unit_id]
                    returns[unit.unit_id] += 1
                    if returns[unit.unit_id] < MAX_RETURNS:
                        waiting.append(unit)
                    else:
                        yield UnitFailure(unit.unit_id, unit.ordinal, unit.objects[0].key, "device", outcome.reason)
        if stop.reason is not None:
            return


def _outcomes_of_wave(
    wave: Dataset, stop: Stop, timeout_seconds: float, watch: NodeWatch
) -> Generator[Any, None, None]:
    executor = wave._create_executor()  # `iter_rows` keeps its own out of reach, so that nobody could end it
    rows = _arriving_rows(
        _rows_of(wave, executor), stop, timeout_seconds, watch, partial(executor.shutdown, force=True)
    )
    try:
        with closing(rows):
            yield from map(_outcome, rows)
    except RayError as error:
        raise _cluster_error(error) from error


def _while_one_is_fit(
    outcomes: Generator[Any, None, None], num_actors: int, unfit: set[str]
) -> Generator[Any, None, None]:
    """The outcomes. Raises UnfitWorkerError once each actor has given back a unit and none has done one meanwhile.

    `unfit` holds the workers of which this is so, over all waves.
    """
    with closing(outcomes):
        for outcome in outcomes:
            if not isinstance(outcome, UnitReturned):
                unfit.clear()
            elif outcome.is_unfit:
                unfit.add(outcome.worker)
            yield outcome
            if len(unfit) >= num_actors:
                raise UnfitWorkerError(f"no worker can go on; the last one said: {outcome}")


def _cluster_error(error: RayError) -> ClusterError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return ClusterError(f"Ray failed: {reason}")


def _longest_seconds(units: Sequence[Unit], context: JobContext, rate: MeasuredRate | None) -> float:
    """The time of the largest unit on one worker: by the estimate, or by a measured rate that is slower."""
    most = max((unit.num_records for unit in units), default=0)
    guess = estimate(context.config, most, on_gpu=context.device != "cpu").seconds(1)
    return guess if rate is None else max(guess, most * rate.seconds_per_record)


def _rows_of(wave: Dataset, executor: Any) -> Iterator[dict[str, Any]]:
    """The rows as Ray Data makes them, in any order; blocks until the next one is there."""
    for bundle in wave._build_bundle_iterator(executor):
        tables: Any = bundle.block_refs  # Ray's types of a list of references do not fit its own `get`
        for table in ray.get(tables):
            yield from table.to_pylist()


def _arriving_rows(
    rows: Iterable[dict[str, Any]], stop: Stop, timeout_seconds: float, watch: NodeWatch, end: Callable[[], None]
) -> Generator[dict[str, Any], None, None]:
    """The rows as they arrive, read in another thread, so that this one handles signals and the timeout.

    `end` makes `rows` stop. The thread has ended when this generator is closed: it must not call Ray after the end of
    the session.
    """
    arrived: SimpleQueue[Any] = SimpleQueue()

    def collect() -> None:
        try:
            for row in rows:
                arrived.put(row)
            arrived.put(None)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            arrived.put(error)

    thread = threading.Thread(target=collect, name=READER, daemon=True)
    thread.start()
    try:
        yield from _until_deadline(arrived, stop, timeout_seconds, watch)
    finally:
        _end_thread(thread, end)


def _end_thread(thread: threading.Thread, end: Callable[[], None]) -> None:
    """Ends the thread and waits for it; asks again, for it may have been about to begin."""
    deadline = time.monotonic() + END_SECONDS
    while thread.is_alive() and time.monotonic() < deadline:
        with suppress(RayError):
            end()
        thread.join(POLL_SECONDS)


def _until_deadline(
    arrived: SimpleQueue[Any], stop: Stop, timeout_seconds: float, watch: NodeWatch
) -> Iterator[dict[str, Any]]:
    """The rows of the queue, to its end or the end of the grace time. Raises ClusterError, and what is in the queue."""
    last_arrival = time.monotonic()
    while time.monotonic() < stop.deadline:
        if time.monotonic() - last_arrival > timeout_seconds:
            raise ClusterError(f"no unit has finished for {timeout_seconds:,.0f} s")
        watch.look()
        try:
            row = arrived.get(timeout=POLL_SECONDS)
        except Empty:
            continue
        if row is None:
            return
        if isinstance(row, BaseException):
            raise row
        last_arrival = time.monotonic()
        yield row


def _set_up_ray_data() -> None:
    """Sets the options of Ray Data that the job needs, for data sets made afterwards."""
    settings = DataContext.get_current()
    settings.enable_progress_bars = False
    settings.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the job shows its own progress
    settings.max_errored_blocks = 0
    settings.max_consecutive_actor_init_deaths = 3
    settings.execution_no_progress_timeout_s = -1  # ours counts units; Ray's would end a job of slow units


def _explain_dataset(
    units: Sequence[Unit], context: JobContext, weights: Any, sizing: Sizing, unfit: frozenset[str]
) -> Dataset:
    """Tasks read and commit beside a GPU, which would wait for its actor's core.

    Without GPUs one actor does all of it: its own core would read and commit anyway, and pixels and maps would pass
    through the object store for nothing.
    """
    rows = [{"unit": _json(unit)} for unit in units]
    items = ray.data.from_items(rows, override_num_blocks=len(rows))
    actors = _actors(context, weights, sizing, len(rows), unfit)
    if not sizing.gpus_per_actor:
        return items.map_batches(_Work, **actors)
    tasks: dict[str, Any] = {**ONE_UNIT, "compute": TaskPoolStrategy(), "num_cpus": sizing.cpus_per_task}
    return (
        items.map_batches(partial(_read, context=context), **tasks)
        .map_batches(_Explain, **actors)
        .map_batches(partial(_commit, context=context), **tasks)
    )


def _actors(
    context: JobContext | EvaluationContext, weights: Any, sizing: Sizing, num_units: int, unfit: frozenset[str]
) -> dict[str, Any]:
    """The arguments of a stage of actors, each with one model: enough for the units beside those that were `unfit`.

    Ray gives out the same GPUs first, each time: a single actor would get the same unfit one again. Where nodes may
    join, Ray Data adds actors, and asks the autoscaler for their nodes.
    """
    most = num_units + len(unfit)
    pool = ActorPoolStrategy(
        min_size=min(sizing.num_actors, most),
        max_size=min(sizing.most_actors or sizing.num_actors, most),
        max_tasks_in_flight_per_actor=UNITS_IN_FLIGHT,
    )
    return {
        **ONE_UNIT,
        "fn_constructor_kwargs": {"context": context, "weights": weights, "unfit": unfit},
        "compute": pool,
        "num_cpus": sizing.cpus_per_actor,
        "num_gpus": sizing.gpus_per_actor,
    }


def _read(batch: pa.Table, context: JobContext) -> pa.Table:
    refuse_unsafe_switches()
    keep_freed_memory()
    unit = _unit(json.loads(batch["unit"][0].as_py()))

    def read(careful: bool) -> pa.Table | Receipt:
        taken = take_unit(unit, stores, context, careful=careful)
        if isinstance(taken, Receipt):
            return taken
        return _row(_json({"unit": unit, "records": taken.records, "attempt": attempt}), taken.pixels)

    stores = _stores_of(context)
    attempt = begin(unit, stores)
    return _measured(_row_of(attempted(unit, "read", stores, attempt, read)))


_STORES: dict[str, WorkerStores] = {}
"""The stores of the run that this process reads for: with them a shard's reader rests between two units."""


def _stores_of(context: JobContext) -> WorkerStores:
    if context.run_id not in _STORES:
        _STORES.clear()
        _STORES[context.run_id] = open_worker_stores(context)
    return _STORES[context.run_id]


def evaluate_units(
    units: Sequence[Unit],
    context: EvaluationContext,
    state: bytes | None,
    sizing: Sizing,
    stop: Stop,
    tell: Callable[[str], None],
) -> Generator[Evaluated | UnitFailure | UnitReturned, None, None]:
    """Evaluates the units on the connected Ray session and yields each outcome. Raises ClusterError."""
    _set_up_ray_data()
    weights = None if state is None else ray.put(state)
    yield from _wave_outcomes(
        units,
        lambda some, unfit: _evaluate_dataset(some, context, weights, sizing, unfit),
        stop,
        NO_PROGRESS_SECONDS,
        sizing.num_actors,
        NodeWatch(tell),
    )


def _evaluate_dataset(
    units: Sequence[Unit], context: EvaluationContext, weights: Any, sizing: Sizing, unfit: frozenset[str]
) -> Dataset:
    """One stage: the actor that measures a unit commits it."""
    rows = [{"unit": _json(unit)} for unit in units]
    items = ray.data.from_items(rows, override_num_blocks=len(rows))
    return items.map_batches(_Evaluate, **_actors(context, weights, sizing, len(rows), unfit))


Step = TypeVar("Step")


class _Held(Generic[Step]):
    """The step that an actor holds. One without a device is unfit; one that loses it ends its process."""

    def __init__(self, make: Callable[[], Step], unfit: frozenset[str] = frozenset()) -> None:
        """Waits first if it was `unfit`, so that others take the units; raises as `make`, but for device errors."""
        if unfit and _actor_name() in unfit:
            time.sleep(MAX_PAUSE_SECONDS)
        self._make = make
        self._step: Step | None = None
        self._last_return: UnitReturned | None = None
        self._pause_seconds = UNFIT_PAUSE_SECONDS
        with suppress(UnfitWorkerError):  # a unit will tell; an actor that does not start would end the job
            self.step()

    def step(self) -> Step:
        """The step. Raises UnfitWorkerError if the device does not let it be made."""
        if self._step is None:
            try:
                self._step = self._make()
            except Exception as error:
                if device_trouble(error) is None:
                    raise
                raise UnfitWorkerError(told_by_device(error)) from error
        return self._step

    def outcome(self, work: Callable[[], Made]) -> Made | UnitReturned:
        """The outcome of `work`, after a pause if this worker gave back its last unit."""
        if self._last_return is not None:
            self._recover(self._last_return)
        made = work()
        self._last_return = None
        if isinstance(made, UnitReturned):
            self._last_return = made = replace(made, worker=_actor_name())
        return made

    def _recover(self, last: UnitReturned) -> None:
        if not last.is_unfit:
            _end_process()  # Ray starts another one, which takes this unit
        time.sleep(self._pause_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, MAX_PAUSE_SECONDS)


def _limit_compiler(device: str) -> None:
    """Keeps torch's compiler to the actor's share of the cores; before torch is imported."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(compiler_threads(on_gpu=device != "cpu")))


def _actor_name() -> str:
    """Host, Ray's node and GPU, the same in each wave; without a GPU the actor, which may have several processes."""
    own, gpus = ray.get_runtime_context(), ray.get_gpu_ids()
    what = f"GPU {', '.join(map(str, gpus))}" if gpus else f"actor {own.get_actor_id()}"
    return f"{os.uname().nodename}:{own.get_node_id()[:8]}:{what}"


def _end_process() -> NoReturn:
    """Kills this process, which cannot use its device any more."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")


class _Evaluate:
    """The evaluate actor: holds one model."""

    def __init__(self, context: EvaluationContext, weights: Any, unfit: frozenset[str]) -> None:
        refuse_unsafe_switches()
        _limit_compiler(context.job.device)
        from blocksight.jobs.evaluate.step import EvaluateStep

        self.held = _Held(lambda: EvaluateStep(context, None if weights is None else ray.get(weights)), unfit)

    def __call__(self, batch: pa.Table) -> pa.Table:
        from blocksight.jobs.evaluate.step import evaluated

        unit = _unit(json.loads(batch["unit"][0].as_py()))
        return _row_of(self.held.outcome(lambda: evaluated(self.held.step, unit)))


class _Work:
    """The actor of a CPU session: holds one model; reads, explains and commits."""

    def __init__(self, context: JobContext, weights: Any, unfit: frozenset[str]) -> None:
        refuse_unsafe_switches()
        _limit_compiler(context.device)
        from blocksight.jobs.explain.step import ExplainStep

        self.context, self.stores = context, open_worker_stores(context)
        self.held = _Held(lambda: ExplainStep(context, None if weights is None else ray.get(weights)), unfit)

    def __call__(self, batch: pa.Table) -> pa.Table:
        from blocksight.jobs.run.local import run_unit

        unit = _unit(json.loads(batch["unit"][0].as_py()))
        return _measured(_row_of(self.held.outcome(lambda: run_unit(unit, self.context, self.stores, self.held.step))))


class _Explain:
    """The explain actor of a GPU: holds one model."""

    def __init__(self, context: JobContext, weights: Any, unfit: frozenset[str]) -> None:
        refuse_unsafe_switches()
        _limit_compiler(context.device)
        from blocksight.jobs.explain.step import ExplainStep

        self.input_size = context.facts.input_size
        self.stores = open_worker_stores(context)
        self.held = _Held(lambda: ExplainStep(context, None if weights is None else ray.get(weights)), unfit)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if batch["outcome"][0].is_valid:
            return batch
        header = json.loads(batch["header"][0].as_py())
        unit = _unit(header["unit"])

        def explain(careful: bool) -> pa.Table:
            pixels = np.frombuffer(batch["blob"][0].as_buffer(), np.uint8).reshape(-1, *self.input_size, 3)
            records = tuple(RecordFacts(**record) for record in header["records"])
            made = self.held.step()(UnitInput(unit, records, pixels), careful=careful)
            return _result_table(made, header["attempt"])

        def work() -> pa.Table | Outcome:
            attempt = go_on(unit, "explain", self.stores, _attempt(header["attempt"]))
            return attempted(unit, "explain", self.stores, attempt, explain)

        return _measured(_row_of(self.held.outcome(work)), batch)


def _commit(batch: pa.Table, context: JobContext) -> pa.Table:
    refuse_unsafe_switches()
    keep_freed_memory()
    if batch["outcome"][0].is_valid:
        return batch
    header = json.loads(batch["header"][0].as_py())
    unit, begun = _unit(header["unit"]), _attempt(header.pop("attempt"))
    stores = open_worker_stores(context)

    def commit(careful: bool) -> Receipt:
        maps = np.frombuffer(batch["blob"][0].as_buffer(), np.uint8).reshape(-1, *context.facts.input_size)
        remaining = iter(maps)
        rows = tuple(_with_maps(row, remaining) for row in header["rows"])
        result = UnitResult(**{**header, "unit": unit, "rows": rows})
        return commit_unit(result, stores.output, context.fingerprint, careful=careful)

    return _measured(_row_of(attempted(unit, "commit", stores, go_on(unit, "commit", stores, begun), commit)), batch)


MAPS = ("map", "map_negative")
"""Columns whose arrays travel beside the other values of the rows."""


def _with_maps(row: Mapping[str, Any], maps: Iterator[NDArray[np.uint8]]) -> dict[str, Any]:
    """The row with its maps, which come next."""
    return {"map": None, **row, **{name: next(maps) for name in MAPS if row.get(name) is not None}}


def _result_table(result: UnitResult, attempt: Mapping[str, Any]) -> pa.Table:
    maps = [row[name] for row in result.rows for name in MAPS if row.get(name) is not None]
    rows = [{**row, **{name: True for name in MAPS if row.get(name) is not None}} for row in result.rows]
    header = {
        "unit": result.unit,
        "attempt": attempt,
        "rows": rows,
        "num_records": result.num_records,
        "explain_seconds": result.explain_seconds,
        "forward": result.forward,
    }
    return _row(_json(header), np.stack(maps) if maps else None)


def _row_of(made: pa.Table | Outcome | Evaluated) -> pa.Table:
    """The input of the next step: a table unchanged, or the unit's outcome, which later steps pass on."""
    if isinstance(made, pa.Table):
        return made
    return _row("", None, _json({"kind": type(made).__name__, "values": made}))


def _row(header: str, blob: NDArray[np.uint8] | None, outcome: str | None = None) -> pa.Table:
    """One row of `HEADER`; the array's memory becomes the table's, without a copy."""
    data = pa.py_buffer(b"" if blob is None else np.ascontiguousarray(blob))
    ends = pa.py_buffer(np.array([0, data.size], np.int64))
    blobs = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])
    return pa.Table.from_arrays([pa.array([header]), blobs, pa.array([outcome], pa.string())], schema=HEADER)


def export(samples: Sequence[Sample]) -> None:
    """Passes what this process measured to the metrics agent of its node; nothing outside of a session."""
    if ray.is_initialized():
        export_values(samples, METRICS, SECONDS)


def _measured(made: pa.Table, before: pa.Table | None = None) -> pa.Table:
    """The row with what its steps measured: what this process did, which it exports, and what is beside `before`."""
    own = OF_PROCESS.taken()
    export(own)
    earlier = (
        [] if before is None or "measured" not in before.column_names else json.loads(before["measured"][0].as_py())
    )
    return made.append_column("measured", pa.array([_json([*earlier, *own])]))


def _outcome(row: Mapping[str, Any]) -> Any:
    measured = json.loads(row.get("measured") or "[]")
    record_all(OF_WORKERS, (Sample(name, tuple(labels), value) for name, labels, value in measured))
    made = json.loads(row["outcome"])
    return OUTCOMES[made["kind"]](**made["values"])


def _json(value: Any) -> str:
    """JSON of plain values and of the job's own records."""
    return json.dumps(value, default=asdict)


def _attempt(values: Mapping[str, Any]) -> Attempt:
    return Attempt(tuple(values["markers"]), values["num_deaths"])


def _unit(values: Mapping[str, Any]) -> Unit:
    objects = tuple(ObjectInfo(**item) for item in values["objects"])
    return Unit(**{**values, "layout": Layout(values["layout"]), "objects": objects})
