"""Chaos: random kills of actors, workers, raylets, driver and store while real jobs run, and then the verifier.

`python -m tests.chaos --seed 7 --minutes 6 --kills 100` prints each blow that bit, and one closing line with the
seed, whatever happens. Exit code 0, SOUND: nothing was lost, nothing stands twice, no object changed after its
commit, nothing was left behind. 1, FAULTY: something of that is not so. 2, BROKEN OFF: chaos itself failed. It needs
about 3 GB of memory and the extras `demo` and `dev`; everything runs on this machine and is stopped in the end.
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
from tests.faults.processes import started
from tests.faults.verifier import MANIFEST, Watcher, row_hashes, verify
from tests.jobs.jobs_of import run_here
from tests.jobs.tiny import folder_of_images

MODEL = "tests.jobs.tiny:make_slow"
NUM_IMAGES = 60
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 1.5
BITE_SECONDS = 5.0
"""A blow that shows no effect by then did not bite."""
JOB_SECONDS = 300.0
"""Once the blows are over, a job that is not done by then hangs."""
JUDGE_SECONDS = 60.0
"""Of patience with a store that has just come back."""
GONE_SECONDS = 20.0
"""Between the end of everything and the last process that may still be about to end."""
LONGEST_STRETCH = 4.0
"""So many times the minutes at most, where the kills that were asked for have not come together."""

DONE, USAGE, INCOMPLETE = 0, 2, 4
START_SECONDS = 20.0
"""Of a driver: imports, and its patience with a store that it has never seen."""

OWN = "BLOCKSIGHT_CHAOS"
"""In the environment of every process that this one starts, those of Ray and the store included."""


class Chaos:
    """One cluster, one bucket and job after job, with a blow every second or so."""

    def __init__(self, seed: int, minutes: float, least_kills: int) -> None:
        self.dice = random.Random(seed)
        self.seconds, self.least_kills = 60 * minutes, least_kills
        self.blows: Counter[str] = Counter()
        """Those that bit."""
        self.in_midst = 0
        """Actors and workers that were killed in the midst of a step, not before, between or after."""
        self.spoilt: Counter[str] = Counter()
        """Requests, by what befell them."""
        self.faults: list[str] = []
        self.num_jobs = 0
        self.start = self.driver_start = self.store_killed = float("-inf")
        self.peace: float | None = None
        """When the blows were over; None: they go on."""
        self.kills: dict[Callable[[], bool], int] = {
            self.kill_actor: 20,
            self.kill_worker: 14,
            self.kill_raylet: 2,
            self.kill_driver: 1,
            self.kill_store: 1,
        }
        self.nuisances: dict[Callable[[], bool], int] = {self.stop_raylet: 1, self.spoil_connections: 3}

    @property
    def num_kills(self) -> int:
        return sum(self.blows[_name(kill)] for kill in self.kills)

    def run(self, bucket: FragileBucket, folder: Path) -> None:
        """Jobs under blows until time is over and enough was killed; the last one is then left in peace."""
        self.bucket, self.spoilt = bucket, bucket.proxy.counts
        source = open_store(f"{bucket.uri}/in", bucket.endpoint_url)
        for path in sorted(folder_of_images(folder / "in", NUM_IMAGES).rglob("*.*")):
            source.put(path.relative_to(folder / "in").as_posix(), path.read_bytes())
        self.source_keys = [info.key for info in source.list()]
        run_here(source.uri, f"{bucket.uri}/undisturbed", model=MODEL, endpoint_url=bucket.endpoint_url)
        self.whole = row_hashes(self.judged("undisturbed"))
        with RayCluster() as self.cluster:
            self.start = time.monotonic()
            while self.peace is None:
                self.one_job(f"job-{self.num_jobs}")
        self.faults += [fault for number in range(self.num_jobs) for fault in self.left_in(f"job-{number}")]
        self.faults += [f"an upload was not finished: {key}" for key in self.open_uploads()]
        if self.num_kills < max(1, self.least_kills):
            self.faults.append(f"{self.num_kills} kills bit, and {max(1, self.least_kills)} were asked for")

    def judged(self, name: str) -> PatientStore:
        """The output as the store itself has it: no fault of the proxy stands between."""
        return PatientStore(open_store(f"{self.bucket.uri}/{name}", self.bucket.bucket.endpoint_url), JUDGE_SECONDS)

    def one_job(self, name: str) -> None:
        with Watcher(open_store(f"{self.bucket.uri}/{name}", self.bucket.endpoint_url), interval=0.5) as watcher:
            ended = self.until_done(name)
            self.calm()
        self.num_jobs += 1
        found = [*ended, *watcher.faults, *self.unsound(name)]
        say(f"{name}: {found or 'sound'}, {watcher.seen} objects watched, {watcher.missed} looks refused")
        self.faults += [f"{name}: {fault}" for fault in found]

    def unsound(self, name: str) -> Iterator[str]:
        """What is wrong with the output of a job that says that it is done."""
        output = self.judged(name)
        yield from verify(output, source_keys=self.source_keys)
        if output.head(MANIFEST) is None:
            yield "it has no final manifest"
        if row_hashes(output) != self.whole:
            yield "its rows are not those of an undisturbed run"

    def left_in(self, name: str) -> Iterator[str]:
        """What stays of a job that nobody works at any more, once its garbage is collected."""
        output = self.judged(name)
        plan = load_plan(output)
        if plan is None:
            return
        removed = collect_garbage(output, read_job_state(output, plan))
        say(f"{name}: {len(removed)} objects removed")
        for prefix in ("_job/attempts/", "_job/probe-", "_job/dead/"):
            yield from (f"{name}: {info.key} is left" for info in output.list(prefix))
        yield from (f"{name}, garbage collected: {fault}" for fault in self.unsound(name))

    def open_uploads(self) -> list[str]:
        endpoint_url = self.bucket.bucket.endpoint_url
        client = botocore.session.get_session().create_client("s3", endpoint_url=endpoint_url)
        found = client.list_multipart_uploads(Bucket=self.bucket.bucket.name)
        client.close()
        return [upload["Key"] for upload in found.get("Uploads", [])]

    def until_done(self, name: str) -> list[str]:
        """The same command again and again, as a user would, until it says that it is complete; and what was odd."""
        while not self.is_late():
            num_runs = self.num_runs(name)
            self.driver, self.driver_start = self.start_driver(name), time.monotonic()
            printed, code = self.strike_until_it_ends(), self.driver.returncode
            say(f"driver of {name} ended with {code} after {time.monotonic() - self.driver_start:.0f} s")
            if code == DONE:
                return []
            if not self.is_resumable(code, has_begun=self.num_runs(name) > num_runs):
                return [f"the driver ended with {code}: {printed[-2000:]}"]
        return ["it did not come to its end"]

    def num_runs(self, name: str) -> int:
        """Drivers that came as far as their first unit."""
        return sum(info.key.endswith("/run.json") for info in self.judged(name).list("_job/runs/"))

    def is_resumable(self, code: int, *, has_begun: bool) -> bool:
        """Whether a driver may end so under blows: units open, a signal, or before its work a store that was away."""
        if code == USAGE:
            is_early = time.monotonic() < self.driver_start + START_SECONDS
            was_away = self.store_killed > self.driver_start - BITE_SECONDS
            return not has_begun and (is_early or was_away)
        return code == INCOMPLETE or code < 0

    def is_late(self) -> bool:
        return self.peace is not None and time.monotonic() > self.peace + JOB_SECONDS

    def start_driver(self, name: str) -> subprocess.Popen[str]:
        job = ["explain", "--data", f"{self.bucket.uri}/in", "--output", f"{self.bucket.uri}/{name}", "--model", MODEL]
        where = ["--endpoint-url", self.bucket.endpoint_url, "--address", self.cluster.address]
        return started(*job, *where, fault="unit=1.5")

    def strike_until_it_ends(self) -> str:
        """Blows until the driver is gone, or they are over; what it said."""
        while True:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # each new node of Ray sets its own
            with suppress(subprocess.TimeoutExpired):
                return self.driver.communicate(
                    timeout=self.dice.uniform(SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
                )[0]
            if self.is_late():
                os.killpg(self.driver.pid, signal.SIGKILL)
            elif self.peace is None and self.is_enough():
                say("the blows are over")
                self.calm()
                self.peace = time.monotonic()
            elif self.peace is None:
                self.strike()

    def is_enough(self) -> bool:
        spent = time.monotonic() - self.start
        most = LONGEST_STRETCH if self.num_kills < self.least_kills else 1.0
        return spent > most * self.seconds

    def strike(self) -> None:
        odds = {**self.kills, **self.nuisances}
        (blow,) = self.dice.choices(list(odds), weights=list(odds.values()))
        if blow():
            self.blows[_name(blow)] += 1
            say(f"blow {self.blows.total()}: {_name(blow)}")

    def kill_actor(self) -> bool:
        return self._kill_one_of(self.cluster.workers("_Explain"))

    def kill_worker(self) -> bool:
        return self._kill_one_of(self.cluster.workers())

    def _kill_one_of(self, pids: list[int]) -> bool:
        if not pids:
            return False
        busy = [pid for pid in pids if is_in_step(pid)]
        pid = self.dice.choice(busy or pids)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            bit = came_true(lambda: not is_alive(pid))
            self.in_midst += bit and pid in busy
            return bit
        return False

    def kill_raylet(self) -> bool:
        number = self.dice.randrange(len(self.cluster.nodes))
        raylet = self.cluster.raylets[1 + number]
        stood = is_alive(raylet)
        self.cluster.kill_node(number)
        self.cluster.add_node()
        return stood and came_true(lambda: not is_alive(raylet))

    def stop_raylet(self) -> bool:
        raylet = self.dice.choice(self.cluster.raylets[1:])
        os.kill(raylet, signal.SIGSTOP)
        bit = came_true(lambda: state(raylet) == "T")
        time.sleep(self.dice.uniform(1, 6))
        os.kill(raylet, signal.SIGCONT)
        return bit

    def kill_driver(self) -> bool:
        with suppress(ProcessLookupError):
            os.killpg(self.driver.pid, signal.SIGKILL)
        return came_true(lambda: self.driver.poll() == -signal.SIGKILL)

    def kill_store(self) -> bool:
        address = ("127.0.0.1", self.bucket.bucket.port)
        stood = answers(address)
        with self.bucket.killed():
            bit = stood and came_true(lambda: not answers(address))
            time.sleep(self.dice.uniform(0, 3))
        self.store_killed = time.monotonic()
        return bit

    def spoil_connections(self) -> bool:
        """Lost replies, refusals, cut bodies and delays, until the next blow of this kind; bites with the first."""
        proxy, before = self.bucket.proxy, self.bucket.proxy.counts.total()
        proxy.lose_reply, proxy.refuse, proxy.cut = (self.dice.choice([0.0, 0.1, 0.3]) for _ in range(3))
        proxy.delay = self.dice.choice([0.0, 0.05])
        return came_true(lambda: proxy.counts.total() > before)

    def calm(self) -> None:
        """No connection is spoilt from here on."""
        proxy = self.bucket.proxy
        proxy.lose_reply = proxy.refuse = proxy.cut = proxy.delay = 0.0

    def closing(self, seed: int, broken: BaseException | None) -> str:
        """Everything that happened, in one line."""
        kills = ", ".join(f"{self.blows[_name(kill)]} {_name(kill).removeprefix('kill ')}" for kill in self.kills)
        others = ", ".join(f"{self.blows[_name(nuisance)]} x {_name(nuisance)}" for nuisance in self.nuisances)
        bites = ", ".join(f"{count} {name}" for name, count in self.spoilt.most_common())
        verdict = "SOUND" if not self.faults else f"FAULTY, {len(self.faults)} faults"
        if broken is not None:
            verdict = f"BROKEN OFF by {type(broken).__name__} {str(broken).splitlines()[:1]}"
        return (
            f"chaos: seed {seed}, {self.num_kills} kills ({kills}; {self.in_midst} in a step), "
            f"{others} (requests: {bites or 'none'}); "
            f"{self.num_jobs} jobs: {verdict}"
        )


def _name(blow: Callable[[], bool]) -> str:
    return blow.__name__.replace("_", " ")


def state(pid: int) -> str:
    """As /proc has it: R, S, D, T, Z; empty when it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def is_alive(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def is_in_step(pid: int) -> bool:
    """Whether this worker of Ray is at a task or an actor's call, as its title says: no actor that starts or waits."""
    title = command_line(pid)
    return ").submit" in title or ("Map" in title and "MapWorker" not in title)


def answers(address: tuple[str, int]) -> bool:
    """Whether anybody takes a connection there."""
    with suppress(OSError):
        socket.create_connection(address, 1).close()
        return True
    return False


def came_true(holds: Callable[[], bool], seconds: float = BITE_SECONDS) -> bool:
    """Whether it holds, now or soon."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def own_processes(mark: str) -> list[int]:
    """Living processes that were started from here, whoever their parent is by now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        with suppress(OSError):
            if pid != os.getpid() and f"{OWN}={mark}".encode() in path.read_bytes().split(b"\0") and is_alive(pid):
                found.append(pid)
    return found


def left_running(mark: str) -> list[str]:
    """A sentence for each process that outlived everything; it is ended here."""
    came_true(lambda: not own_processes(mark), GONE_SECONDS)
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
    parser.add_argument("--minutes", type=float, default=5.0, help="of blows; the last job is then let finish")
    parser.add_argument(
        "--kills", type=int, default=0, help=f"go on till so many bit, {LONGEST_STRETCH:g} times the minutes at most"
    )
    chosen = parser.parse_args()
    mark = uuid.uuid4().hex
    os.environ[OWN] = mark
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", f"{random.SystemRandom().getrandbits(256):064x}")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # connections that the end cuts off are no news
    say(f"seed {chosen.seed}")
    chaos, broken = Chaos(chosen.seed, chosen.minutes, chosen.kills), None
    try:
        with (
            tempfile.TemporaryDirectory(prefix="blocksight-chaos-") as folder,
            FragileBucket(Path(folder) / "bucket", chosen.seed) as bucket,
        ):
            chaos.run(bucket, Path(folder))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the closing line says so
        traceback.print_exc()
        broken = error
    try:
        chaos.faults += left_running(mark)
    finally:
        for fault in chaos.faults:
            say(fault)
        print(chaos.closing(chosen.seed, broken), flush=True)
    return 2 if broken is not None else int(bool(chaos.faults))


if __name__ == "__main__":
    sys.exit(main())
