"""Outputs before schema 5, with all fragments in one folder and a receipt each: commands read them, and add nothing."""

import json
from pathlib import Path

import duckdb
import pytest
from pytest import MonkeyPatch  # noqa: PT013 - its context is needed in a module's fixture

from blocksight.jobs.ledger.receipt_batches import read_receipts, receipt_key
from blocksight.jobs.ledger.reconcile import MANIFEST_KEY
from blocksight.jobs.plan.plan import load_plan
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, receipts_in, rows_in, run_here
from tests.jobs.tiny import MODEL, folder_of_images


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An output as version 4 left it, one of today, and a second one of each to compare with."""
    folder = tmp_path_factory.mktemp("layouts")
    data = folder_of_images(folder / "in", 3)
    for name, schema, explainer in (
        ("old", "4", "sise"),
        ("old-other", "4", "layercam"),
        ("new", "5", "sise"),
        ("new-other", "5", "layercam"),
    ):
        with MonkeyPatch.context() as patch:
            patch.setattr("blocksight.jobs.plan.config.SCHEMA_VERSION", schema)
            patch.setattr("blocksight.jobs.plan.plan.SCHEMA_VERSION", schema)
            patch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 1.0)
            run_here(data, folder / name, explainer=explainer)
        if schema == "4":
            as_version_4(LocalStore(folder / name))
    return folder


def as_version_4(store):
    """Puts receipts where version 4 had them: an object per unit, and none in the metadata."""
    for receipt in receipts_in(store):
        store.create(receipt_key(receipt["unit_id"]), json.dumps(receipt, indent=1).encode())
    for info in [info for info in store.list("_job/receipts/") if info.key.endswith(".jsonl")]:
        store.delete(info.key)
    for info in list(store.list("data/")):
        body, metadata = store.read(info.key), dict(store.head(info.key).metadata)
        store.delete(info.key)
        store.create(info.key, body, metadata={name: own for name, own in metadata.items() if name != "receipt"})


def names_in(folder):
    return sorted(file.relative_to(folder).as_posix() for file in (folder / "data").rglob("*.parquet"))


def test_fragments_lie_in_folders_by_the_beginning_of_their_units_id(base):
    new = load_plan(LocalStore(base / "new"))
    assert names_in(base / "new") == sorted(
        f"data/{unit.unit_id[:2]}/{unit.ordinal:06d}-{unit.unit_id}.parquet" for unit in new.units
    )
    assert len(new.units) > 2
    old = load_plan(LocalStore(base / "old"))
    assert names_in(base / "old") == [f"data/{unit.ordinal:06d}-{unit.unit_id}.parquet" for unit in old.units]
    assert len(rows_in(LocalStore(base / "old"))) == len(rows_in(LocalStore(base / "new"))) == 6


@pytest.mark.parametrize("age", ["old", "new"])
@pytest.mark.parametrize(
    "command",
    [
        "status {0}",
        "verify {0}",
        "finalize {0}",
        "gc {0} --dry-run",
        "show {0} ant/000.png --picture {tmp}/shown.png",
        "evaluate {0} --metrics gini --model tests.jobs.tiny:make --runner local",
        "compare {0} {0}-other",
        "versus {0} {0}-other --output {tmp}/versus",
        "audit {0} --no-try",
        "report {0}",
        "regions {0}",
        "export {0} numpy {tmp}/arrays",
    ],
    ids=lambda text: text.split()[0],
)
def test_a_command_reads_both(base, tmp_path, age, command):
    code, printed = called(*(part.format(base / age, tmp=tmp_path) for part in command.split()))
    assert code == 0, printed


@pytest.mark.parametrize("age", ["old", "new"])
def test_sql_and_a_plain_reader_see_all_rows_of_both(base, age):
    code, printed = called("sql", base / age, "SELECT count(*) AS n FROM maps")
    assert (code, "3" in printed) == (0, True), printed
    assert duckdb.sql(f"SELECT count(*) FROM '{base / age}/data/**/*.parquet'").fetchall() == [(6,)]


def test_receipts_of_an_old_output_are_read_and_not_made_anew(base):
    store = LocalStore(base / "old")
    receipts, unbatched = read_receipts(store, load_plan(store).units)
    assert unbatched == []
    assert all(receipt.attempt is not None for receipt in receipts.values())


@pytest.mark.parametrize("is_finished", [True, False])
def test_explain_adds_nothing_to_an_old_output(base, is_finished):
    if not is_finished:
        Path(base / "old-other" / MANIFEST_KEY).unlink()
    before = names_in(base / "old-other")
    options = ["--model", MODEL, "--explainer", "layercam", "--runner", "local"]
    code, printed = called("explain", "--data", base / "in", "--output", base / "old-other", *options)
    assert code == 2, printed
    said = " ".join(printed.split())
    assert "was begun by a version that writes schema 4, and this one writes 5" in said
    assert "choose another --output" in said
    assert names_in(base / "old-other") == before
