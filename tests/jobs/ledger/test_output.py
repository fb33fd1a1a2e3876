"""Damaged tables and maps: every command names the damaged object and its repair, and ends with exit code 5."""

import io
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.jobs.ledger.output import fragment_of, map_of, model_facts, table_of, values_in
from blocksight.jobs.ledger.reconcile import check
from blocksight.jobs.plan.plan import MODEL_KEY, existing_plan
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.storage.outputs.fragments import encode_fragment, read_fragment
from blocksight.storage.outputs.map_codec import decode_map, encode_map
from blocksight.storage.outputs.schema import SCHEMA
from blocksight.storage.stores.local import LocalStore
from tests.jobs.evaluate.test_evaluate import evaluated
from tests.jobs.jobs_of import called, model_of, run_here
from tests.jobs.outputs import audit, explained, measured
from tests.jobs.tiny import folder_of_images


def table_bytes(**columns):
    body = io.BytesIO()
    pq.write_table(pa.table(columns), body)
    return body.getvalue()


def with_bad_text(body):
    """The same rows with a key that is not UTF-8."""
    table = read_fragment(body)
    keys = pa.array([b"\xff\xfe"] * len(table)).cast(pa.string(), safe=False) if len(table) else table["key"]
    sink = io.BytesIO()
    bad = table.set_column(0, SCHEMA.field("key"), pa.Array.from_buffers(pa.string(), len(table), keys.buffers()))
    pq.write_table(bad.cast(SCHEMA, safe=False), sink)
    return sink.getvalue()


def with_bad_maps(body):
    """The same rows, whose maps end early."""
    rows = [{**row, "map": row["map"] and row["map"][:40]} for row in read_fragment(body).to_pylist()]
    return encode_fragment(rows, {})


def with_a_large_map(body):
    """The same rows; the first map is of 4096 x 32 pixels, and sound."""
    rows = read_fragment(body).to_pylist()
    large = encode_map(np.zeros((4096, 32)))
    rows[0] |= {"map": large.data, "map_height": large.height, "map_width": large.width}
    return encode_fragment(rows, {})


DAMAGE = {
    "empty": lambda _: b"",
    "cut": lambda body: body[: len(body) // 2],
    "zeros": lambda body: body[:40] + bytes(len(body) - 48) + body[-8:],
    "text": lambda _: b"no Parquet at all, and longer than twelve bytes",
    "foreign": lambda _: table_bytes(z=[1]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two outputs of one data set, measured and audited."""
    base = tmp_path_factory.mktemp("stored")
    folder_of_images(base / "in", 3)
    for name in ("a", "b"):
        run_here(base / "in", base / name, explainer="gradcam", target="label")
        measured(base / name, metrics="entropy")
        audit(LocalStore(base / name))
    return base


@pytest.fixture
def base(whole, tmp_path):
    """A copy of the outputs to damage; their data are not copied."""
    for name in ("a", "b"):
        shutil.copytree(whole / name, tmp_path / name)
    return tmp_path


def spoil(base, pattern, damage):
    """Damages the first file of output a that fits the pattern; returns its key."""
    file = sorted((base / "a").glob(pattern))[0]
    body = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(body))
    return str(file.relative_to(base / "a"))


def commands(base):
    """The commands that read an output, by name."""
    key = explained(LocalStore(base / "b"))[0]["key"]
    return {
        "report": ("report", base / "a"),
        "versus": ("versus", base / "b", base / "a", "--output", base / "difference"),
        "compare": ("compare", base / "a"),
        "show": ("show", base / "a", key, "--picture", base / "x.png"),
        "sql": ("sql", base / "a", "SELECT * FROM metrics"),
        **{form: ("export", base / "a", form, base / f"for-{form}") for form in ("fiftyone", "virelay", "spotlight")},
        "quantus": ("export", base / "a", "quantus", base / "for-quantus", "--model", model_of(base / "a")),
    }


COMMANDS = ("report", "versus", "compare", "show", "sql", "fiftyone", "virelay", "spotlight", "quantus")
MEASURED = ("report", "versus", "compare", "sql", "fiftyone")
DRAWN = ("report", "versus", "show", "fiftyone", "virelay", "spotlight", "quantus")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["report", "versus", "compare", "show", "sql", "spotlight"])
def test_a_damaged_fragment_is_named(base, command, damage):
    key = spoil(base, "data/**/*.parquet", DAMAGE[damage])
    code, printed = called(*commands(base)[command])
    assert code == 5, printed
    assert f"{base / 'a' / key} is damaged, `blocksight verify` says more" in printed
    assert "CREATE OR REPLACE" not in printed


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", MEASURED)
def test_damaged_values_are_named(base, command, damage):
    if command == "report":  # reads them once more for its galleries
        evaluated(base / "a", metrics="insertion")
    key = spoil(base, "evaluations/*/data/**/*.parquet", DAMAGE[damage])
    code, printed = called(*commands(base)[command])
    assert code == 5, printed
    assert f"{base / 'a' / key} is damaged, remove it, and the same `evaluate` makes it again" in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_whole_is_read(base, command):
    code, printed = called(*commands(base)[command])
    assert code == 0, printed


@pytest.mark.parametrize("command", DRAWN)
def test_a_damaged_map_is_named(base, command):
    spoil(base, "data/**/*.parquet", with_bad_maps)
    code, printed = called(*commands(base)[command])
    assert code == 5, printed
    key = explained(LocalStore(base / "a"))[0]["key"].rpartition("/")[2]
    assert "the map of '" in printed
    assert key.rpartition(".")[2] in printed
    assert "is damaged, `blocksight verify` names its fragment" in printed


@pytest.mark.parametrize("form", ["fiftyone", "virelay", "spotlight"])
@pytest.mark.parametrize("pattern", ["audit/audit.json", "audit/clusters.parquet", "audit/rows/*.parquet"])
def test_an_export_says_that_the_audit_is_damaged(base, form, pattern):
    spoil(base, pattern, lambda _: b"{")
    code, printed = called(*commands(base)[form])
    assert code == 5, printed
    assert "audit" in printed
    assert not (base / f"for-{form}" / "maps.parquet").exists()


def test_an_export_of_an_audit_without_its_rows_says_so(base):
    shutil.rmtree(base / "a" / "audit" / "rows")
    code, printed = called(*commands(base)["spotlight"])
    assert (code, "without rows in audit/rows/" in printed) == (5, True)


def test_a_damaged_fragment_is_a_failure_of_its_unit_in_an_evaluation(base):
    key = spoil(base, "data/**/*.parquet", DAMAGE["cut"])
    (failure,) = evaluated(base / "a", metrics="gini").failures
    assert failure.error.startswith(f"{base / 'a' / key} is damaged")


def test_invalid_text_is_named_where_it_is_read(base):
    key = spoil(base, "data/**/*.parquet", with_bad_text)
    with pytest.raises(UnreconciledError, match="UTF8"):
        fragment_of(LocalStore(base / "a"), key)


def test_a_map_of_another_size_than_the_models_input_is_damage_before_it_is_decoded(base):
    key = spoil(base, "data/**/*.parquet", with_a_large_map)
    store = LocalStore(base / "a")
    expected = r"the map of '.*' has 4096 x 32 pixels, the input of the plan's model 32 x 32"
    with pytest.raises(UnreconciledError, match=f"is damaged, `blocksight verify` says more: {expected}"):
        fragment_of(store, key)
    assert fragment_of(store, key, ["key", "status"]).num_rows > 0
    faults = [fault for _, found in check(store, existing_plan(store)) for fault in found]
    assert [fault for fault in faults if re.fullmatch(f"{key}: {expected}", fault)]


def test_reading_returns_the_stored_tables_and_maps(base):
    store = LocalStore(base / "a")
    (fragment,) = [info.key for info in store.list("data/")]
    (values,) = [info.key for info in store.list("evaluations/") if info.key.endswith(".parquet")]
    assert fragment_of(store, fragment).equals(read_fragment(store.read(fragment)))
    assert fragment_of(store, fragment, ["key", "map"]).column_names == ["key", "map"]
    assert set(values_in(store, values, ["metric"])["metric"].to_pylist()) == {"entropy"}
    row = explained(store)[0]
    assert (map_of(row) == decode_map(row["map"], (row["map_height"], row["map_width"]))).all()
    with pytest.raises(UnreconciledError, match=r"map of 'k' for class 3 is damaged"):
        map_of({"key": "k", "target_index": 3, "map": None, "map_height": 4, "map_width": 4})
    assert encode_map(map_of(row)).high <= 1


def test_a_table_elsewhere_and_the_models_facts(base):
    store = LocalStore(base / "a")
    store.put("x.parquet", b"x")
    with pytest.raises(UnreconciledError, match=r"x\.parquet is damaged, put it back from a copy"):
        table_of(store, "x.parquet", SCHEMA)
    assert model_facts(store)["num_classes"] == 5
    for body in (b"{", b"{}", b"[]", b'{"num_classes": 5}'):
        store.put(MODEL_KEY, body)
        with pytest.raises(UnreconciledError, match=r"model\.json is damaged"):
            model_facts(store)
