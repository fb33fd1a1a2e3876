"""Outputs that an older version began and this one went on with: some files lack the columns of targets and signs."""

from functools import partial

import pytest

from blocksight.jobs.evaluate import step
from blocksight.jobs.export.sql import connect
from blocksight.jobs.ledger.stop_request import RUNS_FOLDER
from blocksight.jobs.worker import unit
from blocksight.storage.outputs.fragments import EVALUATION_4, SCHEMA_4, encode_fragment
from blocksight.storage.outputs.schema import EVALUATION, SCHEMA
from blocksight.storage.parquet.reader import parquet_bytes
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, run_here
from tests.jobs.outputs import measured
from tests.jobs.tiny import MODEL, folder_of_images

OLD = {SCHEMA: SCHEMA_4, EVALUATION: EVALUATION_4}


def encoded_now_and_then(rows, provenance, columns=SCHEMA, *, which, counts):
    """As an older version for every second table; `which` says which of two begins."""
    counts.append(1)
    is_old = len(counts) % 2 == which
    named = OLD[columns] if is_old else columns
    kept = set(named.names)
    own = [{name: value for name, value in row.items() if name in kept} for row in rows] if is_old else rows
    return encode_fragment(own, provenance, named)


def output_at(base, which):
    """A job in small units, and an evaluation of it; both partly of an older version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.3)
        if which is not None:
            for module in (unit, step):
                patch.setattr(module, "encode_fragment", partial(encoded_now_and_then, which=which, counts=[]))
        run_here(base.parent / "in", base, target="top-2", explainer="gradcam")
        measured(base, metrics="entropy,deletion")
    if which is not None:  # two runs, as the versions were two
        runs = LocalStore(base)
        runs.create(f"{RUNS_FOLDER}older/run.json", b"{}")
    return base


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    folder_of_images(root / "in", 7, bad=True)
    return {name: output_at(root / name, which) for name, which in (("now", None), ("0", 0), ("1", 1))}


def table(output, query):
    return connect(str(output)).execute(query).fetchall()


def test_the_outputs_are_mixed(outputs):
    for name in ("0", "1"):
        for folder in ("data", next(iter((outputs[name] / "evaluations").iterdir())) / "data"):
            files = sorted((outputs[name] / folder).rglob("*.parquet"))
            has_target = ["target" in parquet_bytes(file.read_bytes(), "it").names for file in files]
            assert set(has_target) == {True, False}


QUERIES = {
    "maps": "SELECT key, target, target_formula, score, map_negative, label_rank FROM maps ORDER BY ALL",
    "rejects": "SELECT * FROM rejects ORDER BY ALL",
    "values": 'SELECT key, target, metric, protocol, "value" FROM "values" ORDER BY ALL',
    "metrics": "SELECT * EXCLUDE (parameters) FROM metrics ORDER BY ALL",
}


@pytest.mark.parametrize("name", ["0", "1"])
@pytest.mark.parametrize("view", QUERIES)
def test_views_are_those_of_an_output_of_today(view, name, outputs):
    wanted = table(outputs["now"], QUERIES[view])
    assert wanted
    assert table(outputs[name], QUERIES[view]) == wanted


READERS = {
    "verify": ["verify", "OUT"],
    "status": ["status", "OUT"],
    "show": ["show", "OUT", "ant/000.png", "--picture", "TMP/one.png"],
    "compare": ["compare", "OUT"],
    "versus": ["versus", "OUT", "NOW", "--output", "TMP/versus"],
    "audit": ["audit", "OUT", "--model", MODEL],
    "report": ["report", "OUT"],
    "regions": ["regions", "OUT"],
    "numpy": ["export", "OUT", "numpy", "TMP/x", "--where", "entropy > 0"],
    "spotlight": ["export", "OUT", "spotlight", "TMP/x"],
    "evaluate": ["evaluate", "OUT", "--metrics", "insertion", "--runner", "local", "--model", MODEL],
}


@pytest.mark.parametrize("name", ["0", "1"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_reads_both(reader, name, outputs, tmp_path):
    places = {"OUT": str(outputs[name]), "NOW": str(outputs["now"]), "TMP": str(tmp_path)}
    arguments = list(READERS[reader])
    for short, place in places.items():
        arguments = [one.replace(short, place) if one.startswith(short) else one for one in arguments]
    code, text = called(*arguments)
    assert code == 0, text
