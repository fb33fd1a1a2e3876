"""`--json`: standard output is one JSON document, whose figures are those of the tables; notes go to standard error."""

import json
from typing import Any

import pytest
from typer.main import get_command

from blocksight.jobs.cli.figures import print_json
from blocksight.jobs.cli.main import app
from blocksight.jobs.ledger.reconcile import read_job_state
from blocksight.jobs.plan.plan import load_plan
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import blocksight, run_here
from tests.jobs.tiny import MODEL, folder_of_images

COMMANDS: dict[str, Any] = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
NO_TABLE = {"demo", "bank", "retry", "gc", "report", "export", "cluster"}
"""Commands that print lines, or a file, and no table of figures."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("json")
    run_here(folder_of_images(root / "in", 4), root / "out", explainer="gradcam")
    return root


def asked(base, tmp_path):
    """Arguments of each command that prints a table."""
    job = ("--data", base / "in", "--output", base / "out", "--model", MODEL, "--explainer", "gradcam")
    return {
        "plan": job,
        "explain": (*job, "--runner", "local"),
        "status": (base / "out",),
        "verify": (base / "out",),
        "finalize": (base / "out",),
        "evaluate": (base / "out", "--metrics", "entropy", "--model", MODEL, "--runner", "local"),
        "compare": (base / "out",),
        "versus": (base / "out", base / "out", "--output", tmp_path / "difference"),
        "audit": (base / "out", "--no-try"),
        "show": (base / "out", "ant/000.png", "--picture", tmp_path / "a.png"),
        "sql": (base / "out", "SELECT key, score FROM maps ORDER BY key"),
        "list": ("explainers",),
        "regions": (base / "out",),
        "check": ("--model", MODEL, "--data", base / "in", "--output", tmp_path / "checked.png"),
    }


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - NO_TABLE - {"bench"}))
def test_standard_output_is_one_document(base, tmp_path, name):
    done = blocksight(name, *asked(base, tmp_path)[name], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_every_command_that_prints_a_table_takes_it():
    options = {name: {option for own in command.params for option in own.opts} for name, command in COMMANDS.items()}
    assert {name for name, own in options.items() if "--json" not in own} == NO_TABLE


def test_figures_are_those_of_the_receipts(base):
    store = LocalStore(base / "out")
    state = read_job_state(store, load_plan(store))
    found = json.loads(blocksight("status", base / "out", "--json").stdout)
    assert (found["records"], found["explained"], found["rejected"]) == (7, 4, 3)
    assert found["rejects"] == dict(state.rejects)
    assert (found["open"], found["committed"]) == (0, len(state.plan.units))
    assert found["configuration"]["explainer"] == "gradcam"


def test_rows_of_a_query_are_values(base):
    found = json.loads(blocksight("sql", base / "out", "SELECT key, score FROM maps ORDER BY key", "--json").stdout)
    assert [row["key"] for row in found] == sorted(row["key"] for row in found)
    assert all(0 <= row["score"] <= 1 for row in found)


def test_what_json_does_not_know_is_null_or_text(capsys):
    print_json({"nan": float("nan"), "infinite": float("-inf"), "map": b"12345", "path": LocalStore, 1: (2, {3})})
    found = json.loads(capsys.readouterr().out)
    assert (found["nan"], found["infinite"], found["map"], found["1"]) == (None, None, {"bytes": 5}, [2, [3]])


def test_exit_codes_are_those_without_it(base, tmp_path):
    assert blocksight("status", tmp_path, "--json").returncode == 2
