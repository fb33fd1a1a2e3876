"""Whole processes for the failure tests: started with a fault, killed, and run again."""

import os
import subprocess
from pathlib import Path

from tests.jobs.jobs_of import ROOT, command

STARTUP = Path(__file__).parent / "startup"


def environment(fault: str = "") -> dict[str, str]:
    """This process's environment, with a fault for every interpreter that starts in it."""
    path = os.pathsep.join([str(STARTUP), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "BLOCKSIGHT_FAULT": fault}


def started(*arguments: object, fault: str = "") -> subprocess.Popen[str]:
    """The command line in a process group of its own, so that a kill can take all of it."""
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(fault),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(*arguments: object, fault: str = "") -> tuple[int, str]:
    """Exit code and output of the command line, run to its end."""
    process = started(*arguments, fault=fault)
    said, _ = process.communicate(timeout=240)
    return process.returncode, said
