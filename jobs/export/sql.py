"""Queries an output with SQL: DuckDB views over its Parquet files, and results as a table or CSV."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import duckdb
import pyarrow as pa
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table

from blocksight.engine.catalog.entries import METRICS
from blocksight.engine.saliency import FLAT, NEGATIVE
from blocksight.jobs.audit.result import AUDIT_KEY, CLUSTERS, CLUSTERS_KEY, GROUPS, GROUPS_KEY, ROWS, ROWS_FOLDER
from blocksight.jobs.evaluate.evaluation import FOLDER
from blocksight.jobs.ledger.output import table_of
from blocksight.jobs.ledger.stop_request import RUNS_FOLDER
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.documents import damaged
from blocksight.jobs.plan.plan import REGIONS_FOLDER, existing_plan
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.plan.text import counted, printable
from blocksight.storage.outputs.fragments import OF_SIGN, OF_TARGET
from blocksight.storage.outputs.schema import EVALUATION, OK, RANKS_FROM_0, RECORD_COLUMNS, REGIONS, REJECTED, SCHEMA
from blocksight.storage.parquet.reader import parquet_object
from blocksight.storage.stores.locations import S3, normal_place
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore
from blocksight.storage.stores.s3_endpoints import endpoint_for
from blocksight.storage.stores.store import DamagedError, ObjectInfo, ObjectStore, StoreError

MAX_ROWS = 40
"""Rows that are printed."""
MAX_CELL = 64
"""Characters of a cell that are printed."""
ROWS_AT_ONCE = 1024
READERS = 16
"""Footers that are read at once."""
FOOTER_WINDOW_BYTES = 64 << 10
PROTOCOL_LENGTH = 8
"""Characters of a protocol's hash that tell two columns of one metric apart."""

VIEW = "CREATE OR REPLACE VIEW"
METHOD = ("key", "target_index", "target", "explainer", "parameters")
"""The columns that identify a map: record key, class or other target, and explainer with parameters."""
FORMULA_SIGNS = (
    "=+-@\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
)
"""First visible characters of text that a spreadsheet may run as a formula."""

TABLES = {"data/": SCHEMA, FOLDER: EVALUATION, REGIONS_FOLDER: REGIONS}
TABLES |= {ROWS_FOLDER: ROWS, GROUPS_KEY: GROUPS, CLUSTERS_KEY: CLUSTERS}
"""Schemas of the tables that the views read, by prefix or key."""

MetricColumns = Mapping[tuple[str, str], str]
"""Column names by metric and protocol."""


def connect(output: str, endpoint_url: str | None = None) -> duckdb.DuckDBPyConnection:
    """A new in-memory connection with the views of an output. Queries read its files in place; nothing is copied.

    `maps` and `rejects` are the rows of `explain`; `values` has a row per map, metric and evaluation; `metrics` has a
    row per map and a column per metric and protocol. With an audit there are `audit_rows`, `audit_groups` and
    `audit_clusters` too. Raises ConfigError if there is no output or DuckDB cannot read it, UnreconciledError if part
    of it is damaged, and StoreError.
    """
    connection, _ = _connected(output, endpoint_url)
    return connection


def script(output: str, endpoint_url: str | None = None) -> str:
    """The statements that make the same views in the user's own DuckDB, without credentials."""
    _, views = _connected(output, endpoint_url)
    head = "-- the views of a blocksight output, for the shell of DuckDB"
    place = normal_place(output)
    if place.startswith(S3):
        endpoint_url = endpoint_for(place, endpoint_url)
        head += f"\n-- s3:// needs `INSTALL httpfs; LOAD httpfs;` and `{_secret(endpoint_url)}`"
    return "\n".join([head, *(f"{statement};" for statement in views), ""])


def _secret(endpoint_url: str | None) -> str:
    """The statement that lets DuckDB find the user's credentials; it names the endpoint and holds no secret."""
    parts = ["TYPE s3", "PROVIDER credential_chain"]
    if endpoint_url is not None:
        address = urlsplit(endpoint_url)
        host = address.netloc.rpartition("@")[2]  # a user and a password may come before it
        parts += [f"ENDPOINT {_text(host)}", "URL_STYLE 'path'", f"USE_SSL {str(address.scheme == 'https').lower()}"]
    return f"CREATE SECRET ({', '.join(parts)});"


def metric_columns(pairs: Iterable[tuple[str, str]]) -> MetricColumns:
    """A column for each metric and protocol: the metric's name, plus the protocol's first characters if it has several.

    Unknown metrics and protocols that are no hash have no column. Ordered as `METRICS`, then by protocol.
    """
    ours = {(metric, hashed) for metric, hashed in pairs if metric in METRICS and re.fullmatch("[0-9a-f]+", hashed)}
    ordered = sorted(ours, key=lambda pair: (list(METRICS).index(pair[0]), pair[1]))
    protocols = Counter(metric for metric, _ in ordered)
    short = {(metric, hashed): f"{metric}_{hashed[:PROTOCOL_LENGTH]}" for metric, hashed in ordered}
    taken = Counter(short.values())
    long = {pair: name if taken[name] == 1 else "_".join(pair) for pair, name in short.items()}
    return {pair: pair[0] if protocols[pair[0]] == 1 else name for pair, name in long.items()}


def columns_in(connection: duckdb.DuckDBPyConnection) -> MetricColumns:
    """The columns of the metrics in the view `values`."""
    query = 'SELECT DISTINCT metric, protocol FROM "values" WHERE metric IS NOT NULL AND protocol IS NOT NULL'
    return metric_columns(ask(connection, query).fetchall())


def _connected(output: str, endpoint_url: str | None) -> tuple[duckdb.DuckDBPyConnection, list[str]]:
    """A connection with the output's views, and the statements that made them."""
    store = PatientStore(open_store(output, endpoint_url), SHORT_PATIENCE_SECONDS)
    existing_plan(store)
    if "\\" in store.uri:
        raise ConfigError(f"DuckDB's patterns cannot name a folder with a backslash, such as {store.uri}: rename it")
    _refuse_special_files(store)
    connection = duckdb.connect()
    if store.uri.startswith(S3):
        from blocksight.storage.stores.s3 import S3Store  # slow to import, and local outputs need none

        connection.register_filesystem(S3Store(output, endpoint_url).filesystem)
    statements = []
    try:
        for statement in _statements(connection, store):
            ask(connection, statement)
            statements.append(statement)
    except (ConfigError, UnreconciledError):
        _raise_for_damage(store)  # DuckDB does not always name the damaged table
        raise
    return connection, statements


def _refuse_special_files(store: ObjectStore) -> None:
    """Raises UnreconciledError for a table that is no regular file: DuckDB would wait for a pipe's writer."""
    for key, kind in store.unlisted():
        if key.endswith(".parquet"):
            raise damaged(store.uri, key, f"it is no file, it counts as one of the {kind}")


def _statements(connection: duckdb.DuckDBPyConnection, store: ObjectStore) -> Iterator[str]:
    """Yields the statements of the views; that of `metrics` needs the others to be run first."""
    yield from _views(store).values()
    yield _view("metrics", _metrics(columns_in(connection)))


def _raise_for_damage(store: ObjectStore) -> None:
    """Reads all tables. Raises UnreconciledError for the first damaged one."""
    for prefix, schema in TABLES.items():
        for info in store.list(prefix):
            if info.key.endswith(".parquet"):
                table_of(store, info.key, schema)


def _views(store: ObjectStore) -> dict[str, str]:
    """The statements of all views but `metrics`, by view."""
    data = _source(store, "data/", "data/**/*.parquet", SCHEMA)
    views = {
        "maps": f"SELECT {_columns_now(store)} FROM {data} WHERE status = '{OK}'",
        "rejects": f"SELECT {', '.join(map(_name, RECORD_COLUMNS))} FROM {data} WHERE status = '{REJECTED}'",
        "values": f"{_explained(data)}\nUNION ALL BY NAME\n{_evaluated(store)}",
    }
    if any(info.key.endswith(".parquet") for info in store.list(REGIONS_FOLDER)):
        views["regions"] = _regions(store)
    if store.head(AUDIT_KEY) is not None:
        views |= {
            "audit_rows": f"SELECT * FROM {_source(store, ROWS_FOLDER, f'{ROWS_FOLDER}*.parquet', ROWS)}",
            "audit_groups": f"SELECT * FROM {_source(store, GROUPS_KEY, GROUPS_KEY, GROUPS)}",
            "audit_clusters": f"SELECT * FROM {_source(store, CLUSTERS_KEY, CLUSTERS_KEY, CLUSTERS)}",
        }
    return {name: _view(name, query) for name, query in views.items()}


def _columns_now(store: ObjectStore) -> str:
    """The columns of the rows as they are named and counted today, also of an older output: ranks from 1."""
    has_old_ranks = existing_plan(store).identity["schema"] == RANKS_FROM_0
    return "* REPLACE (target_rank + 1 AS target_rank), NULL::INTEGER AS label_rank" if has_old_ranks else "*"


def _view(name: str, query: str) -> str:
    return f"{VIEW} {_name(name)} AS\n{query}"


def _explained(data: str) -> str:
    """The query of Drop and Increase that `explain` measured, both in percent."""
    columns = ", ".join(map(_name, EVALUATION.names[: EVALUATION.names.index("metric")]))
    reason = f"CASE WHEN metrics.increase IS NULL THEN '{FLAT}' ELSE '{NEGATIVE}' END"
    parts = (
        f"SELECT NULL::VARCHAR AS evaluation, {columns}, '{metric}' AS metric, metrics.protocol AS protocol, "
        f'{value} AS "value", CASE WHEN {value} IS NULL THEN {reason} END AS reason FROM {data} '
        f"WHERE status = '{OK}'"
        for metric, value in (("drop", "metrics.drop"), ("increase", "100.0 * metrics.increase::DOUBLE"))
    )
    return "\nUNION ALL BY NAME\n".join(parts)


def _evaluated(store: ObjectStore) -> str:
    """The query of all evaluations' rows, with the evaluation's name."""
    source = _source(store, FOLDER, f"{FOLDER}*/data/**/*.parquet", EVALUATION, with_filename=True)
    name = "regexp_extract(filename, '/([^/]+)/data/(?:[0-9a-f]{2}/)?[^/]+$', 1)"
    return f"SELECT {name} AS evaluation, {', '.join(map(_name, EVALUATION.names))} FROM {source}"


def _regions(store: ObjectStore) -> str:
    """The query of the maps' regions, with the name of their settings: a map has a row for each."""
    source = _source(store, REGIONS_FOLDER, f"{REGIONS_FOLDER}*/data/**/*.parquet", REGIONS, with_filename=True)
    name = "regexp_extract(filename, '/([^/]+)/data/(?:[0-9a-f]{2}/)?[^/]+$', 1)"
    return f"SELECT {name} AS settings, {', '.join(map(_name, REGIONS.names))} FROM {source}"


def _metrics(columns: MetricColumns) -> str:
    """The query of one row per map; if two evaluations have a value, the one with the later name counts."""
    named = ", ".join(map(_name, METHOD))
    values = "".join(
        f""",\n  arg_max("value", coalesce(evaluation, '')) """
        f"FILTER (metric = '{metric}' AND protocol = '{protocol}') AS {_name(column)}"
        for (metric, protocol), column in columns.items()
    )
    return f'SELECT {named}{values}\nFROM "values" GROUP BY {named}'


def _source(store: ObjectStore, prefix: str, pattern: str, schema: pa.Schema, *, with_filename: bool = False) -> str:
    """The source of a view: the matching files, or an empty table with the same columns if there are none."""
    files = [info for info in store.list(prefix) if info.key.endswith(".parquet")]
    if files:
        root = re.sub(r"([*?\[])", r"[\1]", store.uri)
        # a folder such as `run=7` above the files is no column of theirs
        options = f"hive_partitioning = false{', filename = true' if with_filename else ''}"
        place = _text(f"{root}/{pattern}")
        return _with_targets(store, files, schema, lambda more: f"read_parquet({place}, {options}{more})")
    columns = {field.name: _type(field.type) for field in schema}
    columns |= {"filename": "VARCHAR"} if with_filename else {}
    return f"(SELECT {', '.join(f'NULL::{kind} AS {_name(name)}' for name, kind in columns.items())} LIMIT 0)"


def _with_targets(
    store: ObjectStore, files: Sequence[ObjectInfo], schema: pa.Schema, read: Callable[[str], str]
) -> str:
    """The source `read`; columns that name targets, or hold signs, are filled up where older files lack them."""
    if "target_index" not in schema.names:
        return read("")
    added = [name for name in (*OF_TARGET, *OF_SIGN) if name in schema.names]
    missing = {frozenset(added) - set(names) for names in _columns_in(store, files)}
    if missing == {frozenset()}:
        return read("")
    if len(missing) == 1:
        (lacking,) = missing
        filled = {name: "target_index::VARCHAR" for name in OF_TARGET} | {
            name: f"NULL::{_type(SCHEMA.field(name).type)}" for name in OF_SIGN
        }
        return (
            f"(SELECT *, {', '.join(f'{filled[name]} AS {name}' for name in added if name in lacking)} FROM {read('')})"
        )
    own = [f"coalesce({name}, target_index::VARCHAR) AS {name}" for name in added if name in OF_TARGET]
    return f"(SELECT * REPLACE ({', '.join(own)}) FROM {read(', union_by_name = true')})"


def _columns_in(store: ObjectStore, files: Sequence[ObjectInfo]) -> Iterable[Sequence[str]]:
    """The columns of the files, each kind at least once.

    One run leaves files of one kind; where several runs may have been of several versions all are looked at.
    """
    ordered = sorted(files, key=lambda info: info.key)
    runs = {info.key for info in store.list(RUNS_FOLDER) if info.key.endswith("/run.json")}
    if len(runs) == 1 and all(info.key.startswith("data/") for info in files):
        ordered = ordered[:1]
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda info: _columns_of(store, info), ordered))


def _columns_of(store: ObjectStore, info: ObjectInfo) -> Sequence[str]:
    """The columns of a table; those of today if it is damaged, which its reader says."""
    try:
        return parquet_object(store, info, FOOTER_WINDOW_BYTES).names
    except (DamagedError, StoreError):
        return (*OF_TARGET, *OF_SIGN)


def _type(kind: pa.DataType) -> str:
    """DuckDB's name for a column's type."""
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return f"STRUCT({', '.join(f'{_name(field.name)} {_type(field.type)}' for field in fields)})"
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"{_type(kind.value_type)}[]"
    return "BLOB" if pa.types.is_fixed_size_binary(kind) else PLAIN_TYPES[kind]


PLAIN_TYPES = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.bool_(): "BOOLEAN",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
}


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# ---------------------------------------------------------------- queries and their results


def ask(connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.DuckDBPyConnection:
    """Runs a query. Raises ConfigError with DuckDB's message, and UnreconciledError for a damaged table."""
    try:
        if not connection.extract_statements(query):
            raise ConfigError(f'the query {query!r} asks nothing; try "SELECT * FROM metrics"')
        return connection.execute(query)
    except duckdb.Error as error:
        raise _refused(error, query) from error


def as_rows(found: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """All rows, each a value by column."""
    header = _header(found)
    return [dict(zip(header, row, strict=True)) for row in _rows(found)]


def as_table(found: duckdb.DuckDBPyConnection, width: int) -> RenderableType:
    """The first rows and the number of rows: a table, or one column per line if it is wider than `width`."""
    header, rows = [printable(name) for name in _header(found)], _rows(found)
    shown = [list(map(_cell, row)) for row in islice(rows, MAX_ROWS)]
    count = len(shown) + sum(1 for _ in rows)
    cut = f"; the first {MAX_ROWS} are shown, --csv writes all" if count > MAX_ROWS else ""
    widest = [max(map(cell_len, column)) for column in zip(header, *shown, strict=True)]
    is_wide = sum(widest) + 3 * len(widest) + 1 > width
    return Group(*(_records(header, shown) if is_wide else [_table(header, shown)]), f"{counted(count, 'row')}{cut}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    return table


def _records(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[RenderableType]:
    """Yields each row as a list of its columns."""
    for number, row in enumerate(rows, 1):
        table = Table(title=f"row {number}", box=None, show_header=False, title_justify="left")
        for name, cell in zip(header, row, strict=True):
            table.add_row(f"{name}:", cell)
        yield table


def write_csv(found: duckdb.DuckDBPyConnection, file: Path) -> int:
    """Writes all rows with a header and returns their number. No spreadsheet runs a cell of text as a formula.

    A cell whose first visible character begins a formula gets an apostrophe. All text is quoted, so that a separator
    in it (`,`, `;` or a tab) begins no new cell; spreadsheets that ignore quotes are not covered. Numbers are
    unchanged. Raises ConfigError if the file cannot be written.
    """
    count = 0
    try:
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC)
            writer.writerow(map(_guarded, _header(found)))
            for count, row in enumerate(_rows(found), 1):  # noqa: B007 - the last number is returned
                writer.writerow(map(_guarded, row))
    except OSError as error:
        raise ConfigError(f"the CSV file {file} cannot be written: {error.strerror or error}") from error
    return count


def _header(found: duckdb.DuckDBPyConnection) -> list[str]:
    return [column[0] for column in found.description or ()]


def _rows(found: duckdb.DuckDBPyConnection) -> Iterator[Sequence[Any]]:
    try:
        while rows := found.fetchmany(ROWS_AT_ONCE):
            yield from rows
    except duckdb.Error as error:  # DuckDB reads rows while they are fetched
        raise _refused(error) from error


OURS = re.compile(
    r"""['"](.*?)/((?:data|(?:evaluations|regions)/[0-9a-f]+/data|audit/rows)/(?:[0-9a-f]{2}/)?\d{6}-[0-9a-f]{20}\.parquet"""
    r"""|audit/(?:groups|clusters)\.parquet)['"]"""
)
"""Matches a table of an output in DuckDB's messages: the output's place, and the table's key."""


TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?: .*\n)+")
"""Matches the traceback of a store's error during a query."""


def _refused(error: duckdb.Error, query: str = "") -> ConfigError | UnreconciledError:
    """The error to raise for DuckDB's: its message without a traceback.

    An excerpt of the SQL is kept if it is from the user's query, not from a view.
    """
    message = TRACEBACK.sub("", str(error)).strip()
    sentence, _, excerpt = message.partition("\n\nLINE ")
    if (damage := _damage(error, sentence)) is not None:
        return damage
    pointed_at = excerpt.partition("\n")[0].partition(": ")[2].strip(".")
    is_theirs = bool(pointed_at) and pointed_at in query and not query.startswith(VIEW)
    return ConfigError(f"DuckDB cannot run the query: {message if is_theirs else sentence}")


def _damage(error: duckdb.Error, sentence: str) -> UnreconciledError | None:
    """The error for a damaged table; None if the query or the store is the cause."""
    named = OURS.search(sentence)
    if named is not None and sentence.startswith(("Invalid Input Error", "IO Error: Could not read")):
        return damaged(named[1], named[2], sentence.splitlines()[0])
    if type(error) is duckdb.Error and not TRACEBACK.search(str(error)):  # from DuckDB's Parquet reader
        return UnreconciledError(f"DuckDB cannot read the output, `blocksight verify` says more: {sentence}")
    return None


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return f"<{counted(len(value), 'byte')}>"
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return printable(text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…")


def _guarded(value: Any) -> Any:
    """A cell for CSV: numbers unchanged, everything else as text that no spreadsheet runs."""
    if value is None or isinstance(value, int | float | Decimal):
        return value
    text = value.hex() if isinstance(value, bytes) else str(value)
    first = next((char for char in text if char.isprintable() and not char.isspace()), None)
    is_formula = text.startswith(("\t", "\r", "\n")) or (first is not None and first in FORMULA_SIGNS)
    return f"'{text}" if is_formula else text
