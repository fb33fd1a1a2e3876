"""Runs the command line: an error that the user can mend becomes one sentence and an exit code."""

import sys

from rich.console import Console

from blocksight.cluster.errors import ClusterError, ClusterNotReadyError
from blocksight.cluster.switches import refuse_unsafe_switches
from blocksight.engine.errors import ModelError
from blocksight.engine.model.device_errors import device_trouble, told_by_device
from blocksight.jobs.cli import (
    analysis_commands,
    check_command,
    cluster_commands,
    job_commands,
    machine_commands,
    reading_commands,
)
from blocksight.jobs.cli.app import INCOMPLETE, INTERRUPTED, UNRECONCILED, USAGE, WEAK_STORE, app
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.records import UnfinishedError, UnreconciledError
from blocksight.jobs.plan.text import printable
from blocksight.storage.stores.opening import WeakStoreError
from blocksight.storage.stores.store import StoreError

for module in (
    job_commands,
    analysis_commands,
    reading_commands,
    machine_commands,
    check_command,
    cluster_commands,
):  # as --help lists them
    app.add_typer(module.commands)


def main() -> None:
    """Runs the command line. An error that the user can mend is one sentence on standard error, not a traceback."""
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        refuse_unsafe_switches()
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            stderr.print("interrupted: what is written is whole; the same command goes on from there")
        raise
    except WeakStoreError as error:
        stderr.print(f"error: {printable(error)}")
        sys.exit(WEAK_STORE)
    except (UnfinishedError, ClusterNotReadyError) as error:
        stderr.print(f"unfinished: {printable(error)}")
        sys.exit(INCOMPLETE)
    except UnreconciledError as error:
        stderr.print("NOT RECONCILED: " + "\n".join(printable(line) for line in str(error).splitlines()))
        sys.exit(UNRECONCILED)
    except (ConfigError, StoreError, ModelError, ClusterError) as error:
        stderr.print("error: " + "\n".join(printable(line) for line in str(error).splitlines()))
        sys.exit(USAGE)
    except Exception as error:
        if device_trouble(error) is None:
            raise
        stderr.print(f"error: {printable(told_by_device(error))}")
        sys.exit(USAGE)
