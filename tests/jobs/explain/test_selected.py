"""Maps that a metric selected: this metric never rates their quality, and every reader of values shows that."""

import io
import re
from dataclasses import replace
from shutil import copytree

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from blocksight.jobs.audit.run import AuditRequest, run_audit
from blocksight.jobs.cli.metric_tables import comparison_table
from blocksight.jobs.evaluate.compare import Output, compare, rows_of_table
from blocksight.jobs.evaluate.evaluation import FOLDER
from blocksight.jobs.export.sql import connect
from blocksight.jobs.plan.plan import load_plan
from blocksight.storage.outputs.fragments import encode_fragment
from blocksight.storage.outputs.schema import EVALUATION, SCHEMA
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import blocksight, model_of, run_here
from tests.jobs.outputs import explained, measured
from tests.jobs.report.test_report import Page, page_at, report_at
from tests.jobs.side_products import with_products
from tests.jobs.tiny import folder_of_images

PICKED = ("average_drop_100", "average_increase_100")
REASON = "average_drop_100 picked this map among 8"
BESIDE = ("daam", "fovex", "ucag", "bee", "a-fmi", "feature-cam")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two outputs of one data set, measured; a metric selected the maps of `bee` and has no value there."""
    root = tmp_path_factory.mktemp("finished")
    folder_of_images(root / "in", 4)
    for name, explainer in (("plain", "layercam"), ("bee", "gradcam")):
        run_here(root / "in", root / name, explainer=explainer)
        measured(root / name, metrics=",".join([*PICKED, "entropy"]))
    with_products(LocalStore(root / "bee"), *BESIDE)
    withheld(LocalStore(root / "bee"), PICKED)
    return root


@pytest.fixture
def base(finished, tmp_path):
    """A copy of both, which a test may change."""
    return copytree(finished, tmp_path, dirs_exist_ok=True)


def withheld(store, metrics, reason=REASON):
    """Removes the values of metrics, as the evaluate step does."""
    gone = {"value": None, "reason": reason, "curve": None}
    for info in list(store.list(FOLDER)):
        if info.key.endswith(".parquet"):
            rows = pq.read_table(io.BytesIO(store.read(info.key))).to_pylist()
            changed = [{**row, **gone} if row["metric"] in metrics else row for row in rows]
            store.put(info.key, encode_fragment(changed, {}, EVALUATION))


def outputs(base, *names):
    stores = {name: LocalStore(base / name) for name in names}
    return [Output(name, store, load_plan(store)) for name, store in stores.items()]


def printed(table, width=140):
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(comparison_table(table, width))
    return console.file.getvalue()


def words_of(*arguments):
    """What a command prints, with single spaces."""
    done = blocksight(*arguments)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


# ---------------------------------------------------------------- compare


def test_a_method_without_a_value_gets_a_dash_and_the_reason(base):
    table = compare(outputs(base, "plain", "bee"))
    assert [method.name for method in table.methods] == ["layercam", "gradcam"]
    assert {(one.method, one.column.metric, one.reason) for one in table.absences} == {
        (1, metric, REASON) for metric in PICKED
    }
    cells = {(cell.method, cell.column.metric): cell for cell in table.cells}
    for metric in PICKED:
        assert cells[0, metric].estimate.count == 4
        assert (cells[1, metric].estimate.mean, cells[1, metric].estimate.count) == (None, 0)
        assert cells[1, metric].difference.difference is None
    assert cells[1, "entropy"].estimate.count == cells[1, "drop"].estimate.count == 4
    text = printed(table)
    assert f"(1) gradcam has no {', '.join(PICKED)}: {REASON}" in text
    marked = [line for line in text.splitlines() if "- (1)" in line]
    assert marked
    assert all(line.lstrip("│ ").startswith("gradcam") for line in marked)
    assert len(re.findall(r"- \(1\)", text)) == len(PICKED)  # a difference that nobody has gets no block


def test_a_metric_that_no_method_has_is_named_below_the_table(base):
    table = compare(outputs(base, "bee"))
    assert {column.metric for column in table.columns} == {"drop", "increase", "entropy"}
    assert f"(1) gradcam has no {', '.join(PICKED)}: {REASON}" in printed(table)
    assert "- (1)" not in printed(table)


def test_a_table_without_an_absence_has_no_footnote(base):
    table = compare(outputs(base, "plain"))
    assert table.absences == ()
    assert "has no" not in printed(table)


def test_a_value_of_some_maps_is_no_absence(base):
    store = LocalStore(base / "plain")
    (key,) = [info.key for info in store.list(FOLDER) if info.key.endswith(".parquet")]
    rows = pq.read_table(io.BytesIO(store.read(key))).to_pylist()
    first = next(row for row in rows if row["metric"] == "entropy")
    store.put(
        key, encode_fragment([{**row, **({"value": None} if row == first else {})} for row in rows], {}, EVALUATION)
    )
    table = compare(outputs(base, "plain"))
    assert table.absences == ()
    assert [cell.estimate.count for cell in table.cells if cell.column.metric == "entropy"] == [3]


def test_reasons_are_harmless_and_bounded(base):
    withheld(LocalStore(base / "bee"), PICKED, "[red]\x1b[31m" + "x" * 5000)
    text = printed(compare(outputs(base, "plain", "bee")))
    assert "[red]\\x1b[31mxxx" in text.replace("\n", "")
    assert "\x1b" not in text
    assert text.count("x") < 700


def test_a_stored_table_holds_the_reason(base):
    words_of("compare", base / "plain", base / "bee", "--store", base / "t.parquet")
    rows = pq.read_table(base / "t.parquet").to_pylist()
    assert {(row["method"], row["metric"]): row["reason"] for row in rows if row["reason"] is not None} == {
        ("gradcam", metric): REASON for metric in PICKED
    }
    assert all(row["mean"] is None for row in rows if row["reason"] is not None)
    assert rows == rows_of_table(
        compare([replace(own, name=str(base / own.name)) for own in outputs(base, "plain", "bee")])
    )


# ---------------------------------------------------------------- the other readers


def test_the_report_says_which_metric_picked_the_maps_and_shows_no_value_of_it(base):
    report = report_at(base / "bee")
    fact = next(fact for fact in report.run if fact.name == "picked by")
    assert (fact.value, fact.note.partition(":")[0]) == ("average_drop_100", "4 maps among several each")
    assert [fact.name for fact in report.missing] == [f"{metric} of gradcam" for metric in PICKED]
    assert {fact.note for fact in report.missing} == {REASON}
    assert not any(metric.name in PICKED for metric in report.metrics)
    page = Page(page_at(base / "bee"))
    assert page.text.count(REASON) == len(PICKED)
    assert "it says nothing about their quality and is not reported" in page.text
    assert not any(fact.name == "picked by" for fact in report_at(base / "plain").run)


def test_the_report_has_a_dash_beside_the_controls_values(base):
    measured(base / "bee", metrics="average_drop_100", controls=True)
    store = LocalStore(base / "bee")
    for info in [info for info in store.list(FOLDER) if info.key.endswith(".parquet")]:
        rows = pq.read_table(io.BytesIO(store.read(info.key))).to_pylist()
        gone = {"value": None, "reason": REASON}
        changed = [
            {**row, **(gone if (row["metric"] in PICKED and row["explainer"] == "gradcam") else {})} for row in rows
        ]
        store.put(info.key, encode_fragment(changed, {}, EVALUATION))
    (metric,) = [metric for metric in report_at(base / "bee").metrics if metric.name == "average_drop_100"]
    assert {estimate.method for estimate in metric.estimates} == {"random", "gaussian", "edges"}
    assert [(fact.name, fact.value, fact.note) for fact in metric.missing] == [("gradcam", "no value", REASON)]


def test_a_ranking_metric_that_picked_the_maps_ranks_none(base):
    measured(base / "bee", metrics="insertion")
    assert "best-insertion" in {gallery.name for gallery in report_at(base / "bee").galleries}
    withheld(LocalStore(base / "bee"), ("insertion",))
    report = report_at(base / "bee")
    assert {gallery.metric for gallery in report.galleries} == {None, "drop"}
    assert not any(fact.name == "insertion" for item in report.items for fact in item.facts)


def test_sql_has_a_column_of_nulls_and_lists_in_their_types(base):
    connection = connect(str(base / "bee"))
    found = connection.execute(
        "SELECT count(*), count(average_drop_100), count(entropy), count(drop) FROM metrics"
    ).fetchone()
    assert found == (4, 0, 4, 4)
    assert connection.execute("SELECT DISTINCT reason FROM values WHERE metric = 'average_drop_100'").fetchall() == [
        (REASON,)
    ]
    steps = connection.execute("SELECT len(scan_path), scan_path[1].loss, selected_by FROM maps LIMIT 1").fetchone()
    assert steps == (5, 2.31, "average_drop_100")
    mass = connection.execute("SELECT list_sum(accumulated_maps[-1].values) FROM maps LIMIT 1").fetchone()[0]
    (row, *_) = explained(LocalStore(base / "bee"))
    assert mass == pytest.approx(sum(row["accumulated_maps"][-1]["values"]), rel=1e-5)
    output = words_of("sql", base / "bee", "SELECT * FROM maps")
    assert "4 rows" in output
    words_of("sql", base / "bee", "SELECT * FROM maps", "--csv", base / "m.csv")
    table = pd.read_csv(base / "m.csv")
    assert list(table.columns) == SCHEMA.names
    assert table["selected_by"].tolist() == ["average_drop_100"] * 4
    assert table["scan_path"].str.startswith("[{'row'").all()


def test_an_output_without_a_fragment_has_the_lists_columns_too(base):
    for file in (base / "bee" / "data").rglob("*.parquet"):
        file.unlink()
    described = "SELECT column_name, column_type FROM (DESCRIBE maps)"
    empty = dict(connect(str(base / "bee")).execute(described).fetchall())
    assert empty == dict(connect(str(base / "plain")).execute(described).fetchall())


@pytest.mark.parametrize("form", ["fiftyone", "virelay", "spotlight", "quantus"])
def test_exports_hold_no_value_of_it(base, form):
    named = ("--model", model_of(base / "bee")) if form == "quantus" else ()
    output = words_of("export", base / "bee", form, base / form, *named)
    assert "4 records exported" in output
    if form == "spotlight":
        table = pq.read_table(next((base / form).glob("*.parquet")))
        assert table["average_drop_100"].null_count == 4
        assert table["entropy"].null_count == 0
    if form == "fiftyone":
        samples = (base / form / "samples.json").read_text()
        assert "entropy" in samples
        assert "average_drop_100" not in samples


def test_versus_has_no_value_of_it(base):
    words_of("versus", base / "plain", base / "bee", "--output", base / "difference")
    (file,) = (base / "difference" / "data").rglob("*.parquet")
    for row in pq.read_table(file).to_pylist():
        assert {one["metric"] for one in row["metrics"]} == {"entropy"}
        assert row["drop_change"] is not None


def test_an_audit_reads_the_columns_that_it_needs(base):
    found = run_audit(AuditRequest(str(base / "bee"), None, None, None, tries=False, seed=0), Console(quiet=True))
    assert found.num_maps == 4


def test_the_readmes_readers_read_lists(base):
    pattern = str(base / "bee" / "data" / "**" / "*.parquet")
    rows = [row for row in explained(LocalStore(base / "bee"))]
    frame = pd.read_parquet(base / "bee" / "data")
    assert len(frame[frame["scan_path"].notna()]["scan_path"].iloc[0]) == 5
    found = duckdb.sql(f"SELECT crops[9].score FROM '{pattern}' WHERE status = 'ok'").fetchall()
    assert sorted(found) == sorted((row["crops"][8]["score"],) for row in rows)
    polars = pytest.importorskip("polars")
    table = polars.read_parquet(pattern).filter(polars.col("status") == "ok")
    assert sorted(table["channel_importance"].to_list()) == sorted(row["channel_importance"] for row in rows)
