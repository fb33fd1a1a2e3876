"""Runs whole jobs and commands in tests, and reads their outputs."""

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from rich.console import Console

from blocksight.jobs.cli.main import main
from blocksight.jobs.plan.config import Execution, JobConfig, load_config
from blocksight.jobs.plan.plan import existing_plan
from blocksight.jobs.plan.units import Piece, Workforce, pieces, read_shards
from blocksight.jobs.run.job import RunOutcome, run_job
from blocksight.storage.inputs.survey import Survey
from blocksight.storage.outputs.fragments import read_fragment
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.store import ObjectStore
from tests.jobs.tiny import MODEL

ROOT = Path(__file__).resolve().parents[2]


def config_of(data: object, output: object, **options) -> JobConfig:
    """The configuration of a job on the tiny model."""
    config, _ = load_config(None, {"data": str(data), "output": str(output), "model": MODEL, **options})
    return config


def pieces_of(source: ObjectStore, found: Survey, config: JobConfig, workforce: Workforce) -> Iterator[Piece]:
    """The pieces of a listed input, whose shards are read first."""
    return pieces(found, read_shards(source, found, config), config, workforce)


def run_here(data: object, output: object, **options) -> RunOutcome:
    """Runs a job in this process."""
    return run_job(config_of(data, output, **options), Execution(runner="local"), Console(quiet=True))


def model_of(output: object, endpoint_url: str | None = None) -> str:
    """The name of the model that an output was made with."""
    return existing_plan(open_store(str(output), endpoint_url)).identity["model"]


def rows_in(store: ObjectStore) -> list[dict]:
    """All rows under data/, in the order of fragments."""
    keys = sorted((info.key for info in store.list("data/")), key=lambda key: key.rpartition("/")[2])
    return [row for key in keys for row in read_fragment(store.read(key)).to_pylist()]


def fragments_in(store: ObjectStore) -> dict[str, str]:
    """The hash of every fragment, by key."""
    return {info.key: hashlib.sha256(store.read(info.key)).hexdigest() for info in store.list("data/")}


def command(*arguments: object) -> list[str]:
    """The arguments that start the command line in a new process; it scores masks as this process does."""
    return [sys.executable, "-m", "tests.plain", *map(str, arguments)]


def blocksight(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line to its end in this process, which saves the seconds of a start."""
    out, error = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["blocksight", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(error):
            main()
    except SystemExit as ended:
        return subprocess.CompletedProcess(sys.argv, int(ended.code or 0), out.getvalue(), error.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("the command line ends with an exit code")


def called(*arguments: object) -> tuple[int, str]:
    """The exit code of a command line in this process, and all that it prints."""
    done = blocksight(*arguments)
    return done.returncode, done.stdout + done.stderr


def started(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line to its end in a new process, for tests of Ray or of the process."""
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)


def receipts_in(store):
    """The receipts in all batches of an output, as plain values."""
    return [json.loads(line) for info in store.list("_job/receipts/") for line in store.read(info.key).splitlines()]


def change_receipt(store, unit_id, change):
    """Changes a unit's receipt in its batch; one that becomes None is removed."""
    for info in list(store.list("_job/receipts/")):
        found = [json.loads(line) for line in store.read(info.key).splitlines()]
        changed = [change(one) if one["unit_id"] == unit_id else one for one in found]
        store.put(info.key, b"".join(json.dumps(one).encode() + b"\n" for one in changed if one is not None))
