"""A cluster and a store in simulated time that run the real protocol functions: nodes, spot losses, 503s, two drivers.

`python -m tests.faults.simulator --nodes 1000 --units 166667` prints what such a job asks of the store. Events are
discrete: a worker begins a unit, and later commits it. Its calls are the product's own (`begin`, `create_or_adopt`,
`ReceiptBatches`, `read_job_state`, `finalize`); explaining is a pause. Each prefix of the store has a token bucket by
S3's rule, and each worker's clock moves on with each request, and with each pause after a 503.
"""

import argparse
import hashlib
import heapq
import json
import math
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count

from blocksight.jobs.ledger.attempt_markers import FOLDER as ATTEMPTS
from blocksight.jobs.ledger.attempt_markers import Attempt
from blocksight.jobs.ledger.receipt_batches import ReceiptBatches
from blocksight.jobs.ledger.reconcile import finalize, read_job_state
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.records import Receipt, Unit
from blocksight.jobs.worker.attempts import WorkerStores, begin, go_on
from blocksight.jobs.worker.unit import create_or_adopt
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.stores.retrying import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS
from blocksight.storage.stores.store import ObjectInfo
from tests.storage.memory import MemoryStore

PUTS_PER_SECOND, GETS_PER_SECOND = 3_500.0, 5_500.0
"""Of one prefix of S3, until it is split."""
REQUEST_SECONDS = 0.03
PUT_LIKE = ("create", "put", "delete")


@dataclass(frozen=True)
class Setting:
    """What is simulated."""

    nodes: int = 1_000
    units: int = 166_667
    unit_seconds: float = 38.0
    losses_per_node_hour: float = 0.05
    """Spot machines that are taken away; another one takes the place after `start_seconds`."""
    cut_off: float = 0.0
    """Share of the lost machines that only the network lost: they go on, and commit beside another attempt."""
    start_seconds: float = 120.0
    driver_stops: int = 1
    """Kills of the driver, with all that its workers have in hand; the same command goes on."""
    puts_per_second: float = PUTS_PER_SECOND
    is_hashed: bool = True
    """False: the store counts all of `data/` as one prefix, and all of `_job/`."""
    has_gpus: bool = False
    """True: reading, explaining and committing are in processes of their own, each with a marker."""
    killer: int = -1
    """Place of a unit that ends each process that works on it; -1: none does."""
    seed: int = 0


@dataclass
class Bucket:
    """The tokens of one prefix."""

    per_second: float
    tokens: float
    last: float = 0.0

    def takes(self, now: float) -> bool:
        """Whether a request at this time is served."""
        elapsed = max(0.0, now - self.last)
        self.tokens = min(self.per_second, self.tokens + elapsed * self.per_second)
        self.last = max(self.last, now)
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class SimulatedStore(MemoryStore):
    """A store that takes time, and answers 503 where a prefix is asked too much. One worker calls at a time."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting, self.now = setting, 0.0
        self.counts: Counter[str] = Counter()
        self.buckets: dict[tuple[str, bool], Bucket] = {}
        self.drawn = random.Random(setting.seed)

    def asked(self, verb: str, key: str) -> None:
        """Lets time pass until the request is served."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            self.counts[verb] += 1
            self.now += REQUEST_SECONDS
            if self._bucket(verb, key).takes(self.now):
                return
            self.counts["503"] += 1
            self.now += self.drawn.uniform(0.5, 1.0) * pause
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _bucket(self, verb: str, key: str) -> Bucket:
        is_put = verb in PUT_LIKE
        most = self.setting.puts_per_second if is_put else GETS_PER_SECOND
        parts = key.split("/")
        prefix = "/".join(parts[:-1] if self.setting.is_hashed and not key.startswith(ATTEMPTS) else parts[:1])
        if self.setting.is_hashed and key.startswith(ATTEMPTS):
            prefix = "/".join(parts[:3])
        return self.buckets.setdefault((prefix, is_put), Bucket(most, most))

    def read(self, key, *, etag=None, start=0, length=None):
        self.asked("get", key)
        return super().read(key, etag=etag, start=start, length=length)

    def head(self, key):
        self.asked("head", key)
        return super().head(key)

    def list(self, prefix=""):
        found = list(super().list(prefix))
        self.counts["list"] += 1 + len(found) // 1_000
        return iter(found)

    def create(self, key, data, *, metadata=None):
        self.asked("create", key)
        super().create(key, data, metadata=metadata)

    def put(self, key, data):
        self.asked("put", key)
        super().put(key, data)

    def delete_many(self, keys):
        self.counts["delete"] += -(-len(keys) // 1_000)
        super().delete_many(keys)


@dataclass
class Outcome:
    """What a simulated job asked of the store, and what it left."""

    hours: float
    requests: Mapping[str, int]
    put_like_per_unit: float
    lists_per_unit: float
    share_of_503: float
    begun: int
    """Attempts."""
    lost_attempts: int
    adopted: int
    """Attempts that found the unit committed by another one, and took that for their own."""
    committed: int
    dead: int
    seconds: float = 0.0
    """That the simulation took."""


@dataclass(frozen=True)
class _Begun:
    """A unit in a worker's hand."""

    unit: Unit
    attempt: Attempt
    goes_on: bool
    """If the machine is lost, it is only cut off."""


@dataclass
class _Job:
    setting: Setting
    store: SimulatedStore = field(init=False)
    plan: Plan = field(init=False)
    drawn: random.Random = field(init=False)
    begun: int = 0
    lost: int = 0
    adopted: int = 0
    now: float = 0.0

    def __post_init__(self) -> None:
        self.store = SimulatedStore(self.setting)
        self.drawn = random.Random(self.setting.seed)
        units = tuple(_unit(ordinal) for ordinal in range(self.setting.units))
        identity = {"target": "predicted", "limit": None, "seed": self.setting.seed}
        self.plan = Plan(identity, Layout.IMAGES, units, len(units), 0, len(units), {})

    def run(self, run_id: str, stop_at: int) -> bool:
        """Runs a driver until so many units are committed in all; True if none is left. Workers die with it."""
        state = read_job_state(self.store, self.plan)
        left = deque(state.open_units)
        already = len(state.receipts)
        stores = WorkerStores(self.store, self.store, run_id, clock=lambda: self.store.now)
        with ReceiptBatches(self.store, run_id, clock=lambda: self.now) as batches:
            for done, receipt in enumerate(self._committed(left, stores), start=already + 1):
                batches.add(receipt)
                if done >= stop_at:
                    batches._lines.clear()  # a killed driver writes no more
                    return False
        return True

    def _committed(self, left: deque[Unit], stores: WorkerStores) -> Iterator[Receipt]:
        """The receipts as they arrive, in simulated time."""
        number = count()
        begins = self.now
        events: list[tuple[float, int, str, int, _Begun | None]] = [
            (begins + self.drawn.uniform(0, 60), next(number), "idle", node, None) for node in range(self.setting.nodes)
        ]
        heapq.heapify(events)
        in_hand = 0
        while events and (left or in_hand):
            self.now, _, what, node, work_on = heapq.heappop(events)
            self.store.now = self.now
            if what == "lost":
                in_hand -= 1
                self.lost += 1
                assert work_on is not None
                left.append(work_on.unit)
                heapq.heappush(events, (self.now + self.setting.start_seconds, next(number), "idle", node, None))
                if work_on.goes_on:
                    later = self.now + self.drawn.uniform(0.5, 2) * self.setting.unit_seconds
                    heapq.heappush(events, (later, next(number), "cut off", node, work_on))
                continue
            if what == "cut off":  # nobody waits for it
                assert work_on is not None
                self._commit(work_on.unit, f"cut off {work_on.attempt.markers[0]}")
                continue
            if what == "explained":
                assert work_on is not None
                in_hand -= 1
                if self.setting.has_gpus:
                    go_on(work_on.unit, "commit", stores, work_on.attempt)
                yield self._commit(work_on.unit, f"{node} {self.begun}")
            if not left:
                continue
            unit = left.popleft()
            attempt = begin(unit, stores)
            if isinstance(attempt, Attempt) and self.setting.has_gpus:
                attempt = go_on(unit, "explain", stores, attempt)
            if not isinstance(attempt, Attempt):  # it was given up
                heapq.heappush(events, (self.store.now, next(number), "idle", node, None))
                continue
            self.begun += 1
            in_hand += 1
            work = self.drawn.uniform(0.7, 1.3) * self.setting.unit_seconds
            rate = self.setting.losses_per_node_hour / 3600
            dies_after = self.drawn.expovariate(rate) if rate else math.inf
            is_lost = dies_after < work or unit.ordinal == self.setting.killer
            ends = self.store.now + min(work, dies_after)
            hand = _Begun(unit, attempt, goes_on=self.drawn.random() < self.setting.cut_off)
            heapq.heappush(events, (ends, next(number), "lost" if is_lost else "explained", node, hand))

    def _commit(self, unit: Unit, attempt: str) -> Receipt:
        body = unit.unit_id.encode()
        facts = {name: 1 for name in ("num_rows", "num_records", "num_ok", "num_forwards")}
        receipt = Receipt(
            unit_id=unit.unit_id,
            ordinal=unit.ordinal,
            fragment=unit.fragment_key,
            num_bytes=len(body),
            sha256=hashlib.sha256(body).hexdigest(),
            num_rejected=0,
            rejects={},
            metrics={},
            odd_formats={},
            num_flat=0,
            attempt=f"{unit.unit_id} {attempt}",
            **facts,
        )
        found = create_or_adopt(self.store, unit, body, receipt)
        self.adopted += found.attempt != receipt.attempt
        return found


def _unit(ordinal: int) -> Unit:
    name = hashlib.sha256(str(ordinal).encode()).hexdigest()[:20]
    return Unit(ordinal, name, Layout.IMAGES, (ObjectInfo(f"{ordinal}.png", 1, "v"),), 0, 1, 1)


def simulated(setting: Setting) -> Outcome:
    """Runs a whole job, with its stops, and reconciles what it left. Raises UnreconciledError."""
    start = time.process_time()
    job = _Job(setting)
    stops = [setting.units * (number + 1) // (setting.driver_stops + 1) for number in range(setting.driver_stops)]
    for number, stop_at in enumerate([*stops, setting.units + 1]):
        job.run(f"run-{number}", stop_at)
    asked = Counter(job.store.counts)
    state = read_job_state(job.store, job.plan)
    finalize(job.store, state)
    puts = sum(asked[verb] for verb in PUT_LIKE)
    total = sum(own for verb, own in asked.items() if verb != "503")
    return Outcome(
        hours=job.now / 3600,
        requests=dict(asked),
        put_like_per_unit=puts / setting.units,
        lists_per_unit=asked["list"] / setting.units,
        share_of_503=asked["503"] / total,
        begun=job.begun,
        lost_attempts=job.lost,
        adopted=job.adopted,
        committed=len(state.receipts),
        dead=len(state.dead),
        seconds=time.process_time() - start,
    )


MOST_503 = 0.05
"""Share of requests that a store may refuse before it is a storm."""

HELP = {
    "nodes": "machines, each with one worker",
    "units": "units of the job",
    "unit_seconds": "what a unit takes, within 30 %%",
    "losses_per_node_hour": "machines that are taken away, per machine and hour",
    "cut_off": "share of them, 0 to 1, that only the network lost: they commit beside their successors",
    "start_seconds": "until another machine is in the place of a lost one",
    "driver_stops": "kills of the driver with all workers",
    "puts_per_second": "writes that the store takes below one prefix; reads have S3's rule",
    "is_hashed": "False: the store counts all of data/ as one prefix, and all of _job/",
    "has_gpus": "True: reading, explaining and committing have a process each, with a marker",
    "killer": "the number of a unit that ends each process that works on it; -1: none",
    "seed": "of all that is drawn",
}


def main(arguments: Sequence[str]) -> int:
    """Prints what a simulated job asked of the store.

    Returns 1 if a unit is lost, if one is given up that kills nobody, or if the store refused more than `MOST_503`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Setting()).items():
        choices = {"choices": ("True", "False")} if isinstance(value, bool) else {"type": type(value)}
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=value, help=f"{HELP[name]} (default: {value})", **choices
        )
    given = {
        name: own == "True" if own in ("True", "False") else own
        for name, own in vars(parser.parse_args(arguments)).items()
    }
    setting = replace(Setting(), **given)
    if (fault := fault_of(setting)) is not None:
        parser.error(fault)
    outcome = simulated(setting)
    print(json.dumps({"setting": asdict(setting), **asdict(outcome)}, indent=1))
    most_dead = int(0 <= setting.killer < setting.units)
    is_whole = outcome.committed + outcome.dead == setting.units and outcome.dead <= most_dead
    return 0 if is_whole and outcome.share_of_503 <= MOST_503 else 1


def fault_of(setting: Setting) -> str | None:
    """What cannot be simulated of a setting; None if all can."""
    if not setting.puts_per_second >= 1:
        return f"--puts-per-second must be at least 1, got {setting.puts_per_second}"
    for name in ("nodes", "units", "unit_seconds"):
        if not getattr(setting, name) > 0:
            return f"--{name.replace('_', '-')} must be above 0, got {getattr(setting, name)}"
    for name in ("losses_per_node_hour", "start_seconds", "driver_stops"):
        if getattr(setting, name) < 0:
            return f"--{name.replace('_', '-')} must be at least 0, got {getattr(setting, name)}"
    return None if 0 <= setting.cut_off <= 1 else f"--cut-off is a share from 0 to 1, got {setting.cut_off}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
