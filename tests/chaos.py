"""Chaos: random kills of actors, workers, raylets, driver and store while real jobs run, and then the verifier.

`python -m tests.chaos --seed 7 --minutes 5` prints each blow, and one closing line with the seed; its exit code
is 0 where nothing was lost, nothing stands twice, and no object changed after its commit. It needs about 3 GB of
memory and the extras `demo` and `dev`; everything runs on this machine and is stopped in the end.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from storage.stores import open_store
from tests.faults.cluster import FragileBucket, RayCluster
from tests.faults.processes import started
from tests.faults.verifier import Watcher, row_hashes, verify
from tests.jobs.jobs_of import run_here
from tests.jobs.tiny import folder_of_images

MODEL = "tests.jobs.tiny:make_slow"
NUM_IMAGES = 60
LONGEST_PAUSE_SECONDS = 4.0
JOB_SECONDS = 300.0
"""Once the blows are over, a job that is not done by then hangs."""
RESUMABLE = {0, 1, 2, 4, -signal.SIGKILL}
"""How a driver may end under blows: done, its head or its store away at the start, units open, killed."""


class Chaos:
    """One cluster, one bucket and job after job, with a blow every few seconds."""

    def __init__(self, seed: int, cluster: RayCluster, bucket: FragileBucket, folder: Path) -> None:
        self.dice = random.Random(seed)
        self.cluster, self.bucket, self.folder = cluster, bucket, folder
        self.blows: Counter[str] = Counter()
        self.faults: list[str] = []
        self.num_jobs = 0
        self.driver: subprocess.Popen[str] | None = None
        self.odds: dict[Callable[[], bool], int] = {
            self.kill_actor: 8,
            self.kill_worker: 6,
            self.kill_raylet: 2,
            self.kill_driver: 2,
            self.kill_store: 2,
            self.stop_raylet: 1,
            self.spoil_connections: 4,
        }

    def run(self, seconds: float) -> None:
        """Jobs under blows until the time is over; the last one is then left in peace."""
        source = open_store(f"{self.bucket.uri}/in", self.bucket.endpoint_url)
        for path in sorted(folder_of_images(self.folder / "in", NUM_IMAGES).rglob("*.*")):
            source.put(path.relative_to(self.folder / "in").as_posix(), path.read_bytes())
        run_here(source.uri, f"{self.bucket.uri}/undisturbed", model=MODEL, endpoint_url=self.bucket.endpoint_url)
        self.whole = row_hashes(self.output("undisturbed"))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.one_job(deadline)

    def output(self, name: str):
        return open_store(f"{self.bucket.uri}/{name}", self.bucket.endpoint_url)

    def one_job(self, deadline: float) -> None:
        name = f"job-{self.num_jobs}"
        with Watcher(self.output(name), interval=0.5) as watcher:
            self.until_done(name, deadline)
        self.num_jobs += 1
        found = [*watcher.faults, *verify(self.output(name))]
        if row_hashes(self.output(name)) != self.whole:
            found.append("its rows are not those of an undisturbed run")
        say(f"{name}: {found or 'sound'}, {watcher.seen} objects watched")
        self.faults += [f"{name}: {fault}" for fault in found]

    def until_done(self, name: str, deadline: float) -> None:
        """The same command again and again, as a user would, until it says that it is complete."""
        give_up = time.monotonic() + JOB_SECONDS + max(0.0, deadline - time.monotonic())
        while time.monotonic() < give_up:
            self.driver = self.start_driver(name)
            self.strike_until_it_ends(deadline, give_up)
            said, _ = self.driver.communicate()
            code = self.driver.returncode
            say(f"driver of {name} ended with {code}")
            if code == 0:
                return
            if code not in RESUMABLE:
                self.faults.append(f"{name}: the driver ended with {code}: {said[-2000:]}")
                return
        self.faults.append(f"{name} did not come to its end")

    def start_driver(self, name: str) -> subprocess.Popen[str]:
        job = ["explain", "--data", f"{self.bucket.uri}/in", "--output", f"{self.bucket.uri}/{name}", "--model", MODEL]
        where = ["--endpoint-url", self.bucket.endpoint_url, "--address", self.cluster.address]
        return started(*job, *where, fault="unit=1.5")

    def strike_until_it_ends(self, deadline: float, give_up: float) -> None:
        assert self.driver is not None
        while self.driver.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self.driver.wait(self.dice.uniform(0.5, LONGEST_PAUSE_SECONDS))
                return
            if time.monotonic() > give_up:
                os.killpg(self.driver.pid, signal.SIGKILL)
            elif time.monotonic() < deadline:
                self.strike()

    def strike(self) -> None:
        (blow,) = self.dice.choices(list(self.odds), weights=list(self.odds.values()))
        if blow():
            name = blow.__name__.replace("_", " ")
            self.blows[name] += 1
            say(f"blow {self.blows.total()}: {name}")

    def kill_actor(self) -> bool:
        return self._kill_one_of(self.cluster.workers("_Explain"))

    def kill_worker(self) -> bool:
        return self._kill_one_of(self.cluster.workers())

    def _kill_one_of(self, pids: list[int]) -> bool:
        if not pids:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.dice.choice(pids), signal.SIGKILL)
            return True
        return False

    def kill_raylet(self) -> bool:
        self.cluster.kill_node(self.dice.randrange(len(self.cluster.nodes)))
        self.cluster.add_node()
        return True

    def stop_raylet(self) -> bool:
        raylet = self.dice.choice(self.cluster.raylets[1:])
        os.kill(raylet, signal.SIGSTOP)
        time.sleep(self.dice.uniform(1, 6))
        os.kill(raylet, signal.SIGCONT)
        return True

    def kill_driver(self) -> bool:
        assert self.driver is not None
        with suppress(ProcessLookupError):
            os.killpg(self.driver.pid, signal.SIGKILL)
        return True

    def kill_store(self) -> bool:
        with self.bucket.killed():
            time.sleep(self.dice.uniform(0, 3))
        return True

    def spoil_connections(self) -> bool:
        """Lost replies, refusals, cut bodies and delays, until the next blow of this kind."""
        proxy = self.bucket.proxy
        proxy.lose_reply, proxy.refuse, proxy.cut = (self.dice.choice([0.0, 0.1, 0.3]) for _ in range(3))
        proxy.delay = self.dice.choice([0.0, 0.05])
        return True


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of every choice; default: the time")
    parser.add_argument("--minutes", type=float, default=5.0, help="of blows; the last job is then let finish")
    chosen = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", f"{random.SystemRandom().getrandbits(256):064x}")
    say(f"seed {chosen.seed}")
    with (
        tempfile.TemporaryDirectory(prefix="blocksight-chaos-") as folder,
        FragileBucket(Path(folder) / "bucket", chosen.seed) as bucket,
        RayCluster() as cluster,
    ):
        chaos = Chaos(chosen.seed, cluster, bucket, Path(folder))
        chaos.run(60 * chosen.minutes)
    for fault in chaos.faults:
        say(fault)
    kinds = ", ".join(f"{count} {name}" for name, count in chaos.blows.most_common())
    bites = ", ".join(f"{count} {name}" for name, count in bucket.proxy.counts.most_common())
    verdict = "SOUND" if not chaos.faults and chaos.blows else "NOT SOUND"
    print(
        f"chaos: seed {chosen.seed}, {chaos.blows.total()} blows ({kinds}), spoilt requests: {bites or 'none'}; "
        f"{chaos.num_jobs} jobs, {len(chaos.faults)} faults: {verdict}"
    )
    return 0 if verdict == "SOUND" else 1


if __name__ == "__main__":
    sys.exit(main())
