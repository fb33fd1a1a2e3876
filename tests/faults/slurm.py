"""A Slurm of two nodes with a pretended GPU each, on this machine: own processes, own networks, nothing left behind."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
HERE = Path(__file__).resolve().parents[2]
SECONDS = 240.0

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
NodeName=n1 NodeHostname={host} NodeAddr=10.77.0.1 CPUs=8 RealMemory=70000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=10.77.0.2 CPUs=8 RealMemory=70000 Gres=gpu:1
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
"""The nodes have more cores and memory than this machine may have; `cred_expire` shortens the wait before a requeue."""

BOOT = """\
set -e
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
ip link add lab1 type veth peer name lab2
ip addr add 10.77.0.1/24 dev lab1
ip link set lab1 up
unshare --net --pid --fork --mount-proc sleep infinity &
while other=$(< /proc/$!/task/$!/children) && [ -z "$other" ]; do sleep 0.05; done
ip link set lab2 netns $other
nsenter -t $other -n ip link set lo up
nsenter -t $other -n ip addr add 10.77.0.2/24 dev lab2
nsenter -t $other -n ip link set lab2 up
munged --force --foreground --key-file={folder}/munge.key --socket={folder}/munge.socket \\
  --pid-file={folder}/munge.pid --log-file={folder}/munge.log --seed-file={folder}/munge.seed &
while [ ! -S {folder}/munge.socket ]; do sleep 0.05; done
slurmctld -D &
unshare --pid --fork --mount-proc slurmd -D -N n1 &
nsenter -t $other -n -p -m slurmd -D -N n2 &
wait
"""
"""Each node in its own namespace of processes, beside the other: Ray's end on a node stops every Ray that it sees."""


def missing() -> str | None:
    """Why this machine cannot run it; None if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return None if os.geteuid() == 0 else "namespaces of processes and networks need root"


@dataclass(frozen=True)
class Slurm:
    """A Slurm that runs."""

    folder: Path
    init: int
    """The process id of the namespaces' first process."""

    def call(self, *command: object) -> str:
        """Runs a command of Slurm as a user of the cluster. Returns what it prints."""
        enter = ["nsenter", "-t", str(self.init), "-m", "-n", "-p", f"--wd={self.folder}", *map(str, command)]
        done = subprocess.run(enter, env=self._environment(), capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, script: Path, *arguments: object, options: tuple[str, ...] = ()) -> int:
        """The number of the job."""
        return int(self.call("sbatch", "--parsable", *options, script, *arguments).split(";")[0])

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        """Waits for something that will happen; fails with the logs if it does not."""
        deadline = time.monotonic() + SECONDS
        while not is_so():
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.logs()}"
            time.sleep(0.3)

    def ended(self) -> None:
        """Waits until no job is left."""
        self.until(lambda: not self.call("squeue", "--noheader"), "the end of all jobs")

    def logs(self) -> str:
        """What jobs and daemons said."""
        files = [*self.folder.glob("slurm-*.out"), *self.folder.glob("*.log")]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files)

    def _environment(self) -> dict[str, str]:
        own = {"SLURM_CONF": f"{self.folder}/slurm.conf", "HOME": str(self.folder), "PYTHONPATH": str(HERE)}
        return {**os.environ, **own, "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Starts it with its files in a folder, and ends all of its processes."""
    _write(folder)
    boot = ["unshare", "--pid", "--net", "--fork", "--mount-proc", "--kill-child", "bash", str(folder / "boot.sh")]
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with (
        (folder / "boot.log").open("w") as log,
        subprocess.Popen(boot, env=environment, stdout=log, stderr=log) as outer,
    ):
        try:
            yield _ready(folder, outer.pid)
        finally:
            outer.kill()


def _ready(folder: Path, outer: int) -> Slurm:
    children = Path(f"/proc/{outer}/task/{outer}/children")
    deadline = time.monotonic() + SECONDS
    while not (found := children.read_text().split()) or not _are_idle(Slurm(folder, int(found[0]))):
        assert time.monotonic() < deadline, Slurm(folder, 0).logs()
        time.sleep(0.3)
    return Slurm(folder, int(found[0]))


def _are_idle(cluster: Slurm) -> bool:
    try:
        return cluster.call("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"]
    except AssertionError:  # not up yet
        return False


def _write(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    for name in ("state", "bin"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host))
    (folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n10.77.0.1 n1 {host}\n10.77.0.2 n2\n")
    (folder / "boot.sh").write_text(BOOT.format(folder=folder))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    for name, module in (("blocksight", "tests.plain"), ("ray", "ray.scripts.scripts")):
        (folder / "bin" / name).write_text(f'#!/bin/bash\nexec {sys.executable} -m {module} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
