"""Chaos: kills actors, workers, raylets, driver and store at random while real jobs run, then verifies the outputs.

`python -m tests.chaos --seed 7 --minutes 6 --kills 100` prints each fault that had an effect, and always one closing
line with the seed. Exit code 0, SOUND: nothing was lost, nothing is there twice, no object changed after its commit,
nothing was left behind. 1, FAULTY: one of these is wrong. 2, BROKEN OFF: chaos itself failed. It needs about 3 GB of
memory and the extras `demo` and `dev`. Everything runs on this machine and is stopped in the end.
"""

import argparse
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import botocore.session

from blocksight.jobs.ledger.garbage import collect_garbage
from blocksight.jobs.ledger.reconcile import read_job_state
from blocksight.jobs.plan.plan import load_plan
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import PatientStore
from tests.faults.cluster import FragileBucket, RayCluster, command_line
from tests.faults.processes import ended, started
from tests.faults.verifier import MANIFEST, Watcher, row_hashes, verify
from tests.jobs.jobs_of import rows_in
from tests.jobs.tiny import folder_of_images

MODEL = "tests.jobs.tiny:make_slow"
NUM_IMAGES = 60
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 1.5
EFFECT_SECONDS = 5.0
"""A fault without an effect after this time does not count."""
JOB_SECONDS = 300.0
"""The time that a job has to finish after the last fault."""
JUDGE_SECONDS = 60.0
"""The patience with a store that has just come back."""
GONE_SECONDS = 20.0
"""The time that processes have to end after everything was stopped."""
LONGEST_STRETCH = 4.0
"""If there are too few kills, chaos takes up to this many times the minutes."""

DONE, USAGE, INCOMPLETE = 0, 2, 4
START_SECONDS = 20.0
"""The start of a driver: imports, and its patience with a new store."""

PROCESS_MARK = "BLOCKSIGHT_CHAOS"
"""This variable is in the environment of every process that chaos starts, Ray's and the store's included."""


class Chaos:
    """One cluster, one bucket and one job after the other, with a fault about every second."""

    def __init__(self, seed: int, minutes: float, least_kills: int) -> None:
        self.dice = random.Random(seed)
        self.seconds, self.least_kills = 60 * minutes, least_kills
        self.injected: Counter[str] = Counter()
        """Faults that had an effect, by name."""
        self.num_killed_in_step = 0
        """Number of actors and workers that were killed within a step."""
        self.spoilt_requests: Counter[str] = Counter()
        """Requests by the fault that the proxy injected."""
        self.problems: list[str] = []
        self.num_jobs = 0
        self.start = self.driver_start = self.store_killed = float("-inf")
        self.calm_since: float | None = None
        """When the faults ended; None: they go on."""
        self.kills: dict[Callable[[], bool], int] = {
            self.kill_actor: 20,
            self.kill_worker: 14,
            self.kill_raylet: 2,
            self.kill_driver: 1,
            self.kill_store: 1,
        }
        self.disturbances: dict[Callable[[], bool], int] = {self.stop_raylet: 1, self.spoil_connections: 3}

    @property
    def num_kills(self) -> int:
        return sum(self.injected[_name(kill)] for kill in self.kills)

    def run(self, bucket: FragileBucket, folder: Path) -> None:
        """Runs jobs with faults until time and kills are enough; the last job then ends without faults."""
        self.bucket, self.spoilt_requests = bucket, bucket.proxy.counts
        source = open_store(f"{bucket.uri}/in", bucket.endpoint_url)
        for path in sorted(folder_of_images(folder / "in", NUM_IMAGES).rglob("*.*")):
            source.put(path.relative_to(folder / "in").as_posix(), path.read_bytes())
        self.source_keys = [info.key for info in source.list()]
        undisturbed = ["explain", "--data", source.uri, "--output", f"{bucket.uri}/undisturbed", "--model", MODEL]
        code, printed = ended(*undisturbed, "--runner", "local", "--endpoint-url", bucket.endpoint_url)
        assert code == 0, printed  # a process like the others: it has their backend too
        self.expected_hashes = row_hashes(self.store_of("undisturbed"))
        with RayCluster() as self.cluster:
            self.start = time.monotonic()
            while self.calm_since is None:
                self.one_job(f"job-{self.num_jobs}")
        self.problems += [fault for number in range(self.num_jobs) for fault in self.garbage_in(f"job-{number}")]
        self.problems += [f"an upload was not finished: {key}" for key in self.open_uploads()]
        if self.num_kills < max(1, self.least_kills):
            self.problems.append(f"{self.num_kills} kills had an effect, and {max(1, self.least_kills)} were asked for")

    def store_of(self, name: str) -> PatientStore:
        """The job's output, read from the store directly and not through the proxy."""
        return PatientStore(open_store(f"{self.bucket.uri}/{name}", self.bucket.bucket.endpoint_url), JUDGE_SECONDS)

    def one_job(self, name: str) -> None:
        with Watcher(open_store(f"{self.bucket.uri}/{name}", self.bucket.endpoint_url), interval=0.5) as watcher:
            ended = self.until_done(name)
            self.calm()
        self.num_jobs += 1
        found = [*ended, *watcher.faults, *self.problems_in(name)]
        say(f"{name}: {found or 'sound'}, {watcher.seen} objects watched, {watcher.missed} looks refused")
        self.problems += [f"{name}: {fault}" for fault in found]

    def problems_in(self, name: str) -> Iterator[str]:
        """A sentence for each thing that is wrong with the output of a finished job."""
        output = self.store_of(name)
        yield from verify(output, source_keys=self.source_keys)
        if output.head(MANIFEST) is None:
            yield "it has no final manifest"
        if row_hashes(output) != self.expected_hashes:
            rejects = Counter(row["reject_code"] for row in rows_in(output) if row["reject_code"])
            yield f"its rows are not those of an undisturbed run; rejected: {dict(rejects)}"

    def garbage_in(self, name: str) -> Iterator[str]:
        """A sentence for each object that garbage collection should have removed from a finished job, and did not."""
        output = self.store_of(name)
        plan = load_plan(output)
        if plan is None:
            return
        removed = collect_garbage(output, read_job_state(output, plan))
        say(f"{name}: {len(removed)} objects removed")
        for prefix in ("_job/attempts/", "_job/probe-", "_job/dead/"):
            yield from (f"{name}: {info.key} is left" for info in output.list(prefix))
        yield from (f"{name}, garbage collected: {fault}" for fault in self.problems_in(name))

    def open_uploads(self) -> list[str]:
        endpoint_url = self.bucket.bucket.endpoint_url
        client = botocore.session.get_session().create_client("s3", endpoint_url=endpoint_url)
        found = client.list_multipart_uploads(Bucket=self.bucket.bucket.name)
        client.close()
        return [upload["Key"] for upload in found.get("Uploads", [])]

    def until_done(self, name: str) -> list[str]:
        """Repeats the same command until the job is complete, as a user would. Returns what went wrong."""
        while not self.is_out_of_time():
            num_runs = self.num_runs(name)
            self.driver, self.driver_start = self.start_driver(name), time.monotonic()
            printed, code = self.inject_until_the_driver_ends(), self.driver.returncode
            say(f"driver of {name} ended with {code} after {time.monotonic() - self.driver_start:.0f} s")
            if code == DONE:
                return []
            if not self.is_resumable(code, has_begun=self.num_runs(name) > num_runs):
                return [f"the driver ended with {code}: {printed[-2000:]}"]
        return ["it did not end in time"]

    def num_runs(self, name: str) -> int:
        """Number of drivers that began their first unit."""
        return sum(info.key.endswith("/run.json") for info in self.store_of(name).list("_job/runs/"))

    def is_resumable(self, code: int, *, has_begun: bool) -> bool:
        """Whether a driver may end with this code: open units, a signal, or a store that was away at its start."""
        if code == USAGE:
            is_early = time.monotonic() < self.driver_start + START_SECONDS
            was_away = self.store_killed > self.driver_start - EFFECT_SECONDS
            return not has_begun and (is_early or was_away)
        return code == INCOMPLETE or code < 0

    def is_out_of_time(self) -> bool:
        return self.calm_since is not None and time.monotonic() > self.calm_since + JOB_SECONDS

    def start_driver(self, name: str) -> subprocess.Popen[str]:
        job = ["explain", "--data", f"{self.bucket.uri}/in", "--output", f"{self.bucket.uri}/{name}", "--model", MODEL]
        where = ["--endpoint-url", self.bucket.endpoint_url, "--address", self.cluster.address]
        return started(*job, *where, fault="unit=1.5")

    def inject_until_the_driver_ends(self) -> str:
        """Injects faults until the driver has ended. Returns the driver's output."""
        while True:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # each new node of Ray sets its own
            with suppress(subprocess.TimeoutExpired):
                return self.driver.communicate(
                    timeout=self.dice.uniform(SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
                )[0]
            if self.is_out_of_time():
                os.killpg(self.driver.pid, signal.SIGKILL)
            elif self.calm_since is None and self.is_enough():
                say("the faults are over")
                self.calm()
                self.calm_since = time.monotonic()
            elif self.calm_since is None:
                self.inject()

    def is_enough(self) -> bool:
        spent = time.monotonic() - self.start
        most = LONGEST_STRETCH if self.num_kills < self.least_kills else 1.0
        return spent > most * self.seconds

    def inject(self) -> None:
        odds = {**self.kills, **self.disturbances}
        (fault,) = self.dice.choices(list(odds), weights=list(odds.values()))
        if fault():
            self.injected[_name(fault)] += 1
            say(f"fault {self.injected.total()}: {_name(fault)}")

    def kill_actor(self) -> bool:
        return self._kill_one_of(self.cluster.workers("_Work"))

    def kill_worker(self) -> bool:
        return self._kill_one_of(self.cluster.workers())

    def _kill_one_of(self, pids: list[int]) -> bool:
        if not pids:
            return False
        busy = [pid for pid in pids if is_in_step(pid)]
        pid = self.dice.choice(busy or pids)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            has_effect = becomes_true(lambda: not is_alive(pid))
            self.num_killed_in_step += has_effect and pid in busy
            return has_effect
        return False

    def kill_raylet(self) -> bool:
        number = self.dice.randrange(len(self.cluster.nodes))
        raylet = self.cluster.raylets[1 + number]
        was_up = is_alive(raylet)
        self.cluster.kill_node(number)
        self.cluster.add_node()
        return was_up and becomes_true(lambda: not is_alive(raylet))

    def stop_raylet(self) -> bool:
        raylet = self.dice.choice(self.cluster.raylets[1:])
        os.kill(raylet, signal.SIGSTOP)
        has_effect = becomes_true(lambda: state(raylet) == "T")
        time.sleep(self.dice.uniform(1, 6))
        os.kill(raylet, signal.SIGCONT)
        return has_effect

    def kill_driver(self) -> bool:
        with suppress(ProcessLookupError):
            os.killpg(self.driver.pid, signal.SIGKILL)
        return becomes_true(lambda: self.driver.poll() == -signal.SIGKILL)

    def kill_store(self) -> bool:
        address = ("127.0.0.1", self.bucket.bucket.port)
        was_up = answers(address)
        with self.bucket.killed():
            has_effect = was_up and becomes_true(lambda: not answers(address))
            time.sleep(self.dice.uniform(0, 3))
        self.store_killed = time.monotonic()
        return has_effect

    def spoil_connections(self) -> bool:
        """Loses replies, refuses, cuts and delays until the next call. Its effect is the first such request."""
        proxy, before = self.bucket.proxy, self.bucket.proxy.counts.total()
        proxy.lose_reply, proxy.refuse, proxy.cut = (self.dice.choice([0.0, 0.1, 0.3]) for _ in range(3))
        proxy.delay = self.dice.choice([0.0, 0.05])
        return becomes_true(lambda: proxy.counts.total() > before)

    def calm(self) -> None:
        """Ends the faults of connections."""
        proxy = self.bucket.proxy
        proxy.lose_reply = proxy.refuse = proxy.cut = proxy.delay = 0.0

    def closing(self, seed: int, broken: BaseException | None) -> str:
        """One line with the counts and the verdict."""
        kills = ", ".join(f"{self.injected[_name(kill)]} {_name(kill).removeprefix('kill ')}" for kill in self.kills)
        others = ", ".join(
            f"{self.injected[_name(disturbance)]} x {_name(disturbance)}" for disturbance in self.disturbances
        )
        requests = ", ".join(f"{count} {name}" for name, count in self.spoilt_requests.most_common())
        verdict = "SOUND" if not self.problems else f"FAULTY, {len(self.problems)} problems"
        if broken is not None:
            verdict = f"BROKEN OFF by {type(broken).__name__} {str(broken).splitlines()[:1]}"
        return (
            f"chaos: seed {seed}, {self.num_kills} kills ({kills}; {self.num_killed_in_step} in a step), "
            f"{others} (requests: {requests or 'none'}); "
            f"{self.num_jobs} jobs: {verdict}"
        )


def _name(fault: Callable[[], bool]) -> str:
    return fault.__name__.replace("_", " ")


def state(pid: int) -> str:
    """The process's state as in /proc: R, S, D, T, Z; empty if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def is_alive(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def is_in_step(pid: int) -> bool:
    """Whether this Ray worker runs a task or an actor's call, by its title. An actor that starts or waits does not."""
    title = command_line(pid)
    return ").submit" in title or ("Map" in title and "MapWorker" not in title)


def answers(address: tuple[str, int]) -> bool:
    """Whether a server accepts connections at the address."""
    with suppress(OSError):
        socket.create_connection(address, 1).close()
        return True
    return False


def becomes_true(holds: Callable[[], bool], seconds: float = EFFECT_SECONDS) -> bool:
    """Whether the condition becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def own_processes(mark: str) -> list[int]:
    """Living processes that chaos started, also those with another parent by now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        with suppress(OSError):
            if (
                pid != os.getpid()
                and f"{PROCESS_MARK}={mark}".encode() in path.read_bytes().split(b"\0")
                and is_alive(pid)
            ):
                found.append(pid)
    return found


def end_left_processes(mark: str) -> list[str]:
    """Ends each process that is left; returns a sentence for each."""
    becomes_true(lambda: not own_processes(mark), GONE_SECONDS)
    left = {pid: command_line(pid) for pid in own_processes(mark)}
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"process {pid} is left: {command[:200]}" for pid, command in left.items()]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of every choice; default: the time")
    parser.add_argument("--minutes", type=float, default=5.0, help="of faults; the last job then finishes without them")
    parser.add_argument(
        "--kills",
        type=int,
        default=0,
        help=f"go on until so many took effect, {LONGEST_STRETCH:g} times the minutes at most",
    )
    chosen = parser.parse_args()
    mark = uuid.uuid4().hex
    os.environ[PROCESS_MARK] = mark
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", f"{random.SystemRandom().getrandbits(256):064x}")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # connections that are cut in the end are expected
    say(f"seed {chosen.seed}")
    chaos, broken = Chaos(chosen.seed, chosen.minutes, chosen.kills), None
    try:
        with (
            tempfile.TemporaryDirectory(prefix="blocksight-chaos-") as folder,
            FragileBucket(Path(folder) / "bucket", chosen.seed) as bucket,
        ):
            chaos.run(bucket, Path(folder))
    except BaseException as error:  # noqa: BLE001 - the closing line names it
        traceback.print_exc()
        broken = error
    try:
        chaos.problems += end_left_processes(mark)
    finally:
        for problem in chaos.problems:
            say(problem)
        print(chaos.closing(chosen.seed, broken), flush=True)
    return 2 if broken is not None else int(bool(chaos.problems))


if __name__ == "__main__":
    sys.exit(main())
