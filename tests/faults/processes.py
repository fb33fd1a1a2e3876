"""Processes for the failure tests: starts the command line with an injected fault."""

import os
import subprocess
from pathlib import Path

from tests.jobs.jobs_of import ROOT, command

STARTUP = Path(__file__).parent / "startup"


def environment(fault: str = "") -> dict[str, str]:
    """This process's environment, with a fault for every interpreter that starts with it."""
    path = os.pathsep.join([str(STARTUP), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "BLOCKSIGHT_FAULT": fault}


def started(*arguments: object, fault: str = "") -> subprocess.Popen[str]:
    """Starts the command line in its own process group, so that a test can kill all of it."""
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
    """Runs the command line; returns its exit code and output."""
    process = started(*arguments, fault=fault)
    printed, _ = process.communicate(timeout=240)
    return process.returncode, printed
