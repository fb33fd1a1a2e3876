"""Views over an output: the same rows as the fragments hold, one typed column per metric and protocol, harmless CSV."""

import csv
import io
import os
import subprocess
import sys

import duckdb
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console

from blocksight.jobs.evaluate.compare import Output, compare
from blocksight.jobs.evaluate.evaluation import evaluation_folders, value_tables
from blocksight.jobs.export.sql import (
    MAX_ROWS,
    _refused,
    _secret,
    as_table,
    ask,
    columns_in,
    connect,
    metric_columns,
    script,
    write_csv,
)
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.storage.outputs.fragments import OF_SIGN, OF_TARGET, SCHEMA_3, encode_fragment
from blocksight.storage.outputs.schema import EVALUATION, RANKS_FROM_0, RECORD_COLUMNS, SCHEMA
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.opening import open_store
from tests.jobs.jobs_of import called, rows_in, run_here
from tests.jobs.outputs import HOSTILE, audit, explained, hostile_table, measured, output_of_small_units
from tests.jobs.tiny import folder_of_images, picture

VIEWS = ("maps", "rejects", "values", "metrics")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Seven records with two targets each, three rejected; deletion under two protocols, entropy measured twice."""
    base = tmp_path_factory.mktemp("sql")
    with pytest.MonkeyPatch.context() as patch:
        output = output_of_small_units(base, patch)
    measured(output, metrics="deletion,entropy", controls=True)
    measured(output, metrics="deletion,entropy", baseline="black")
    return output


def dicts(connection, query):
    found = ask(connection, query)
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def by_map(rows):
    return sorted(rows, key=lambda row: (row["key"], row["target_index"]))


def test_maps_and_rejects_are_the_rows_that_stand(output):
    connection, store = connect(str(output)), LocalStore(output)
    maps = dicts(connection, "SELECT * FROM maps")
    assert list(maps[0]) == SCHEMA.names
    assert by_map(maps) == by_map(explained(store))
    rejects = dicts(connection, "SELECT * FROM rejects")
    assert list(rejects[0]) == RECORD_COLUMNS
    wanted = {row["key"]: row["reject_code"] for row in rows_in(store) if row["status"] == "rejected"}
    assert {row["key"]: row["reject_code"] for row in rejects} == wanted
    assert len(rejects) == len(wanted) == 3


def test_ranks_of_an_older_output_begin_at_1_too(tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.jobs.plan.config.SCHEMA_VERSION", RANKS_FROM_0)
    run_here(folder_of_images(tmp_path / "in"), tmp_path / "out", target="top-2", explainer="gradcam")
    for file in (tmp_path / "out/data").rglob("*.parquet"):
        rows = [{name: row[name] for name in SCHEMA_3.names} for row in pq.read_table(file).to_pylist()]
        file.write_bytes(
            encode_fragment([{**row, "target_rank": (row["target_rank"] or 1) - 1} for row in rows], {}, SCHEMA_3)
        )
    maps = dicts(connect(str(tmp_path / "out")), "SELECT * FROM maps")
    assert list(maps[0]) == [*SCHEMA_3.names, *OF_TARGET, *OF_SIGN, "label_rank"]
    assert {(row["target_rank"], row["label_rank"]) for row in maps} == {(1, None), (2, None)}
    assert all(row["target"] == row["target_formula"] == str(row["target_index"]) for row in maps)


def test_values_are_all_rows_of_all_evaluations(output):
    store = LocalStore(output)
    values = dicts(connect(str(output)), "SELECT * FROM values")
    assert list(values[0]) == ["evaluation", *EVALUATION.names[:9], "value", "reason", "curve"]
    for folder in evaluation_folders(store):
        stored = [row for table in value_tables(store, folder) for row in table.to_pylist()]
        own = [row for row in values if row["evaluation"] == folder.split("/")[1]]
        assert len(own) == len(stored) > 0
        assert {tuple(map(str, row.values())) for row in stored} == {
            tuple(str(value) for name, value in row.items() if name != "evaluation") for row in own
        }
    own = [row for row in values if row["evaluation"] is None]
    drops = {(row["key"], row["target_index"]): row["value"] for row in own if row["metric"] == "drop"}
    assert drops == {(row["key"], row["target_index"]): row["metrics"]["drop"] for row in explained(store)}
    assert len(own) == 2 * len(drops)


def test_each_metric_and_protocol_has_a_column_of_numbers(output):
    connection, store = connect(str(output)), LocalStore(output)
    columns = columns_in(connection)
    deletions = {protocol: name for (metric, protocol), name in columns.items() if metric == "deletion"}
    assert len(deletions) == 2
    assert set(deletions.values()) == {f"deletion_{protocol[:8]}" for protocol in deletions}
    assert [*columns.values()] == ["drop", "increase", *deletions.values(), "entropy"]
    kinds = dict(connection.execute("SELECT column_name, column_type FROM (DESCRIBE metrics)").fetchall())
    assert {kinds[name] for name in columns.values()} == {"DOUBLE"}
    found = {
        (row["key"], row["target_index"], row["explainer"], row["parameters"]): row
        for row in dicts(connection, "SELECT * FROM metrics")
    }
    assert len(found) == 4 * len(explained(store))  # the method and three controls, each map once
    for folder in evaluation_folders(store):
        for row in (row for table in value_tables(store, folder) for row in table.to_pylist()):
            method = (row["key"], row["target_index"], row["explainer"], row["parameters"])
            assert found[method][columns[row["metric"], row["protocol"]]] == row["value"]
    (black,) = [name for name in deletions.values() if found_nowhere(found.values(), name)]
    assert all(row[black] is not None for row in found.values() if row["explainer"] == "gradcam")


def found_nowhere(rows, name):
    """Whether no control has the value: the second evaluation measured none."""
    return all(row[name] is None for row in rows if row["explainer"] != "gradcam")


def test_means_are_those_of_compare(output):
    store, connection = LocalStore(output), connect(str(output))
    table, columns = compare([Output("out", store, load_plan(store))]), columns_in(connection)
    seen = 0
    for cell in table.cells:
        column, explainer = columns[cell.column.metric, cell.column.protocol], table.methods[cell.method].explainer
        query = f'SELECT avg("{column}") AS mean, count("{column}") AS count FROM metrics WHERE explainer = $1'
        mean, count = connection.execute(query, [explainer]).fetchone()
        wanted = cell.estimate.mean and pytest.approx(cell.estimate.mean, rel=1e-12)
        assert (mean, count) == (wanted, cell.estimate.count)
        seen += count
    assert seen > 100


def test_columns_come_from_known_metrics_and_hashes_alone():
    wild = [("drop", "ab" * 8), ("x; DROP", "cd" * 8), ("gini", "'; --"), ("gini", 'AB"')]
    assert metric_columns(wild) == {("drop", "ab" * 8): "drop"}
    near = [("gini", "0123456789"), ("gini", "01234567ff"), ("gini", "77777777ff"), ("drop", "00")]
    assert list(metric_columns(near).items()) == [
        (("drop", "00"), "drop"),
        (("gini", "0123456789"), "gini_0123456789"),
        (("gini", "01234567ff"), "gini_01234567ff"),
        (("gini", "77777777ff"), "gini_77777777"),
    ]


def test_nothing_measured_and_nothing_explained_are_empty_views(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 2, bad=False), tmp_path / "out", explainer="gradcam")
    connection = connect(str(tmp_path / "out"))
    assert len(dicts(connection, "SELECT * FROM metrics WHERE drop IS NOT NULL")) == 2
    assert not dicts(connection, "SELECT * FROM values WHERE evaluation IS NOT NULL OR curve IS NOT NULL")
    full = {view: connection.execute(f"DESCRIBE {view}").fetchall() for view in VIEWS[:3]}
    for file in (tmp_path / "out" / "data").rglob("*.parquet"):
        file.unlink()
    connection = connect(str(tmp_path / "out"))
    for view in VIEWS:
        assert connection.execute(f"SELECT count(*) FROM {view}").fetchone() == (0,)
    assert {view: connection.execute(f"DESCRIBE {view}").fetchall() for view in full} == full
    kinds = dict(connection.execute("SELECT column_name, column_type FROM (DESCRIBE maps)").fetchall())
    assert kinds["metrics"].startswith("STRUCT(")
    assert kinds["map_family"].endswith('"values" FLOAT[])[]')


def test_a_folder_with_any_name_and_the_script_for_a_shell(tmp_path):
    place = tmp_path / "score=7" / "it's [x] *?{a}=7 -- ;"
    run_here(folder_of_images(tmp_path / "in", 3), place, explainer="gradcam")
    measured(place, metrics="gini")
    connection = connect(str(place))
    assert by_map(dicts(connection, "SELECT * FROM maps")) == by_map(explained(LocalStore(place)))
    assert connection.execute("SELECT count(gini) FROM metrics").fetchone() == (3,)
    fresh = duckdb.connect()
    for statement in duckdb.extract_statements(script(str(place))):
        fresh.execute(statement)
    for view in VIEWS:
        query = f"SELECT * FROM {view} ORDER BY ALL"
        assert fresh.execute(query).fetchall() == connection.execute(query).fetchall() != []


def test_a_folder_that_no_pattern_can_name_is_refused(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 1, bad=False), tmp_path / "a\\b", explainer="gradcam")
    with pytest.raises(ConfigError, match="backslash"):
        connect(str(tmp_path / "a\\b"))


def test_a_pipe_among_the_tables_is_not_waited_for(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 1, bad=False), tmp_path / "out")
    os.mkfifo(tmp_path / "out/data/strange.parquet")
    with pytest.raises(UnreconciledError, match=r"data/strange\.parquet is damaged.* pipes"):
        connect(str(tmp_path / "out"))


def test_an_audit_that_stands_has_views(output, tmp_path):
    assert "audit_rows" not in script(str(output))
    run_here(folder_of_images(tmp_path / "in", 3), tmp_path / "out", explainer="gradcam")
    audit(LocalStore(tmp_path / "out"))
    connection = connect(str(tmp_path / "out"))
    joined = dicts(connection, "SELECT key, strangeness, score FROM audit_rows JOIN maps USING (key, score)")
    assert [row["strangeness"] for row in joined] == [1.5] * 3
    assert dicts(connection, "SELECT gini.mean AS mean FROM audit_groups") == [{"mean": 1.0}]
    assert dicts(connection, "SELECT target_name, len(mean_map) AS cells FROM audit_clusters") == [
        {"target_name": "bee", "cells": 256}
    ]
    for file in (tmp_path / "out" / "audit" / "rows").iterdir():
        file.unlink()
    assert connect(str(tmp_path / "out")).execute("SELECT count(pooled) FROM audit_rows").fetchone() == (0,)


# ---------------------------------------------------------------- tables and CSV


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    base = tmp_path_factory.mktemp("hostile")
    run_here(hostile_table(base / "in"), base / "out", explainer="gradcam")
    return base / "out"


def test_csv_runs_nothing_in_a_spreadsheet(hostile, tmp_path):
    query = "SELECT label_name, -score AS low, map, [1, 2] AS numbers, NULL AS nothing, '=1' AS \"=head\" FROM maps"
    extra = " UNION ALL SELECT chr(x) || '1', -1, 'ab'::BLOB, [], NULL, '' FROM (VALUES (9), (13), (43), (64)) t(x)"
    count = write_csv(ask(connect(str(hostile)), query + extra), tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["label_name", "low", "map", "numbers", "nothing", "'=head"]
    assert count == len(rows) == len(HOSTILE) + 4
    assert {row[0] for row in rows} == {
        *(f"'{text}" if text.startswith("=") else text for text in HOSTILE),
        *("'\t1", "'\r1", "'+1", "'@1"),
    }
    text = (tmp_path / "x.csv").read_text(encoding="utf-8")
    assert '"=' not in text
    assert "a;=1+1" not in text
    assert all(float(row[1]) < 0 for row in rows)
    assert {row[5] for row in rows} == {"'=1", ""}
    assert bytes.fromhex(rows[0][2]).startswith(b"\x89PNG")
    assert {row[4] for row in rows} == {""}


@pytest.mark.parametrize(
    ("text", "is_formula"),
    [
        *(
            (f"{before}{sign}1", True)
            for before in ("", " ", "\n \t", "\x00", "\ufeff", "\u200b\xa0")
            for sign in "=+-@"
        ),
        *((f"{sign}1", True) for sign in "\uff1d\uff0b\uff0d\uff20"),
        *((before + "x", True) for before in "\t\r\n"),
        *((text, False) for text in ("", "x", " x=1", "1-2", "a;=1", "\u2212x", "(=1)", "'=1", " ")),
    ],
)
def test_what_begins_a_formula_gets_an_apostrophe(tmp_path, text, is_formula):
    connection = duckdb.connect()
    write_csv(connection.execute("SELECT $1 AS x", [text]), tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["x"], [f"'{text}" if is_formula else text]]


def test_a_separator_in_a_text_begins_no_cell_where_quotes_count(tmp_path):
    query = "SELECT 'a;=1' || chr(9) || '=2,=3' AS \"x;=4\", -1.5 AS low, -2.5::DECIMAL(3, 1) AS exact, NULL AS nothing"
    write_csv(ask(duckdb.connect(), query), tmp_path / "x.csv")
    text = (tmp_path / "x.csv").read_text()
    assert text.splitlines()[1] == '"a;=1\t=2,=3",-1.5,-2.5,""'
    for separator in ",;\t":
        for row in csv.reader(text.splitlines(), delimiter=separator):
            assert not any(cell.startswith("=") for cell in row)


def test_a_table_says_how_many_rows_there_are_and_cannot_move_the_cursor(hostile):
    def shown(query, width=300):
        console = Console(file=io.StringIO(), width=width, force_terminal=False, soft_wrap=True)
        console.print(as_table(ask(connect(str(hostile)), query), width))
        return console.file.getvalue()

    printed = shown("SELECT label_name, map, score FROM maps")
    assert "row 1" not in printed
    assert "\x1b" not in printed
    assert "[red]<script>" in printed
    assert " bytes" in printed
    assert f"{len(HOSTILE)} rows" in printed
    many = shown("SELECT range FROM range(3000)")
    assert f"3,000 rows; the first {MAX_ROWS} are shown" in many
    assert f" {MAX_ROWS - 1} " in many
    assert f" {MAX_ROWS} " not in many.replace(f"first {MAX_ROWS} are", "")
    assert "range" in shown("SELECT range FROM range(0)")
    wide = shown("SELECT *, range(1000) AS many FROM maps ORDER BY key LIMIT 2", width=100)
    assert "\x1b" not in wide
    lines = [line.split() for line in wide.splitlines()]
    assert [line[1] for line in lines if line and line[0] == "row"] == ["1", "2"]
    for name in SCHEMA.names:
        assert sum(line[:1] == [f"{name}:"] for line in lines) == 2, name
    first = explained(LocalStore(hostile))
    sizes = {f"<{len(row['map']):,}" for row in first}
    assert all(line[1] in sizes and line[2] == "bytes>" for line in lines if line[:1] == ["map:"])
    assert all(line[-1].endswith("…") for line in lines if line[:1] == ["many:"])
    assert max(map(len, wide.splitlines())) <= 100


def test_the_command(output, tmp_path):
    code, printed = called("sql", output)
    assert (code, printed) == (0, script(str(output)))
    code, printed = called("sql", output, "SELECT count(*) AS how_many FROM maps")
    assert code == 0
    assert "how_many" in printed
    assert "14" in printed
    code, printed = called("sql", output, "SELECT key FROM maps", "--csv", tmp_path / "x.csv")
    assert code == 0, printed
    assert "(14 rows)" in printed
    for wrong, sentence in (
        (("sql", output, "SELECT nope FROM maps"), "DuckDB cannot run the query"),
        (("sql", output, "SELECT error('at row ' || key) FROM maps"), "DuckDB cannot run the query"),
        *((("sql", output, nothing), "asks nothing; try") for nothing in ("", " ", ";", " ; ;", "/* SELECT 1 */")),
        (("sql", output, "", "--csv", tmp_path / "y.csv"), "asks nothing; try"),
        (("sql", output, "--csv", tmp_path / "y.csv"), "needs a query"),
        (("sql", output, "SELECT 1", "--csv", tmp_path / "no" / "y.csv"), "cannot be written: No such file"),
        (("sql", tmp_path, "SELECT 1"), "no blocksight output"),
    ):
        code, printed = called(*wrong)
        assert (code, sentence in printed) == (2, True), printed
        assert "read_parquet" not in printed
        assert "Traceback" not in printed
    _, printed = called("sql", output, "SELECT 1,\n  nope FROM maps")
    assert printed.splitlines()[-2:] == ["LINE 2:   nope FROM maps", "          ^^^^"]


def test_a_damaged_fragment_is_a_sentence(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 1, bad=False), tmp_path / "out", explainer="gradcam")
    (file,) = (tmp_path / "out" / "data").rglob("*.parquet")
    file.write_bytes(b"no Parquet")
    with pytest.raises(UnreconciledError, match=f"{file} is damaged, `blocksight verify` says more"):
        connect(str(tmp_path / "out"))


def test_a_fragment_that_is_damaged_later_is_named_too(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 1, bad=False), tmp_path / "it's [x]", explainer="gradcam")
    (file,) = (tmp_path / "it's [x]" / "data").rglob("*.parquet")
    connection = connect(str(tmp_path / "it's [x]"))
    body = file.read_bytes()
    file.unlink()
    with pytest.raises(ConfigError, match="No files found") as gone:
        ask(connection, "SELECT * FROM maps")
    assert "LINE" not in str(gone.value)
    file.write_bytes(body[:-100])
    with pytest.raises(UnreconciledError, match="is damaged, `blocksight verify`") as named:
        ask(connection, "SELECT * FROM maps")
    assert str(named.value).startswith(f"{file} is damaged")


def test_bytes_that_its_reader_stumbles_over_are_damage():
    with pytest.raises(UnreconciledError, match="the output, `blocksight verify` says more: Out of buffer"):
        raise _refused(duckdb.Error("Out of buffer"))


def test_a_script_names_the_endpoint_and_no_credential():
    assert _secret(None) == "CREATE SECRET (TYPE s3, PROVIDER credential_chain);"
    statement = _secret("http://user:pass'word@127.0.0.1:8333/x?key=secret")
    wanted = "ENDPOINT '127.0.0.1:8333', URL_STYLE 'path', USE_SSL false);"
    assert statement == f"CREATE SECRET (TYPE s3, PROVIDER credential_chain, {wanted}"
    assert "USE_SSL true" in _secret("https://s3.example.org")
    assert "ENDPOINT 'a''b'" in _secret("https://a'b\n")


def test_a_store_that_fails_in_the_midst_of_a_query_is_a_sentence():
    class Closed(LocalFileSystem):
        protocol = "closed"

        def glob(self, *_, **__):
            return ["closed:///x.parquet"]

        def open(self, *_, **__):
            raise PermissionError("access was refused")

    connection = duckdb.connect()
    connection.register_filesystem(Closed())
    with pytest.raises(ConfigError, match="access was refused") as refused:
        ask(connection, "FROM read_parquet('closed:///*.parquet')")
    assert "Traceback" not in str(refused.value)


def test_no_output_is_no_connection(tmp_path):
    with pytest.raises(ConfigError, match="there is no blocksight output"):
        connect(str(tmp_path))


def test_the_command_line_starts_without_it():
    heavy = "{'duckdb', 'torch', 'ray', 'h5py'}"
    source = f"import sys, blocksight.jobs.cli.main; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.servers
def test_through_a_bucket(tmp_path, bucket):
    prefix = f"{bucket.uri}/{os.urandom(4).hex()} it's [x]"
    source = open_store(f"{prefix}/in", bucket.endpoint_url)
    for number in range(3):
        source.create(f"ant/{number}.png", picture(number))
    run_here(f"{prefix}/in", f"{prefix}/out", explainer="gradcam", endpoint_url=bucket.endpoint_url)
    measured(f"{prefix}/out", bucket.endpoint_url, metrics="entropy")
    connection = connect(f"{prefix}/out", bucket.endpoint_url)
    assert connection.execute("SELECT count(drop), count(entropy) FROM metrics").fetchone() == (3, 3)
    assert connection.execute("SELECT count(map), min(octet_length(map)) > 50 FROM maps").fetchone() == (3, True)
    statements = script(f"{prefix}/out", bucket.endpoint_url)
    assert f"ENDPOINT '{bucket.endpoint_url.removeprefix('http://')}'" in statements
    assert not any(secret in statements for secret in (bucket.access_key, bucket.secret_key))
    stored = [row for row in rows_in(open_store(f"{prefix}/out", bucket.endpoint_url)) if row["status"] == "ok"]
    assert sorted(connection.execute("SELECT key, score FROM maps").fetchall()) == sorted(
        (row["key"], row["score"]) for row in stored
    )


def test_values_stand_in_parquet_as_the_views_say(output):
    """The views read what any reader reads: DuckDB's sum is pyarrow's."""
    table = pq.read_table(output / "data", columns=["score", "status"])
    ok = [row["score"] for row in table.to_pylist() if row["status"] == "ok"]
    assert connect(str(output)).execute("SELECT sum(score) FROM maps").fetchone()[0] == pytest.approx(sum(ok))
