"""The READMEs' generated tables agree with the code: columns, configuration keys, public names."""

from collections.abc import Iterator

import pyarrow as pa
import pytest
from pydantic import BaseModel

import blocksight
from blocksight.jobs.plan.config import Execution, JobConfig
from blocksight.storage.outputs.schema import EVALUATION, REGIONS, SCHEMA
from tests.readmes import ROOT, names_in, tables


def column_lines(schema: pa.Schema) -> Iterator[str]:
    """The table of a schema's columns."""
    yield from ("| column | type | meaning |", "| --- | --- | --- |")
    for column in schema:
        yield f"| `{column.name}` | {_type_of(column.type)} | {column.metadata[b'meaning'].decode()} |"


def _type_of(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_type_of(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "struct of " + " ".join(f"`{field.name}`" for field in kind)
    return str(kind)


def key_lines(*models: type[BaseModel]) -> Iterator[str]:
    """The table of a configuration's keys."""
    yield from ("| key, `--option` | default | meaning |", "| --- | --- | --- |")
    for model in models:
        for name, field in model.model_fields.items():
            is_given = field.is_required() or field.default_factory is not None
            yield f"| `{name}` | {'' if is_given else _as_text(field.default)} | {field.description} |"


def _as_text(default: object) -> str:
    if default is None or default == ():
        return "none"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


@pytest.mark.parametrize(
    ("readme", "mark", "lines"),
    [
        ("storage", "columns", column_lines(SCHEMA)),
        ("storage", "evaluation columns", column_lines(EVALUATION)),
        ("storage", "region columns", column_lines(REGIONS)),
        ("jobs", "configuration", key_lines(JobConfig, Execution)),
    ],
    ids=["columns", "evaluation columns", "region columns", "configuration"],
)
def test_the_table_is_the_codes(readme, mark, lines):
    table = "\n".join((f"<!-- {mark} -->", *lines))
    assert f"{table}\n\n" in (ROOT / readme / "README.md").read_text(), f"put this table in place:\n{table}"


def test_every_public_name_is_listed_once():
    (rows,) = tables("names")
    assert sorted(name for row in rows for name in names_in(row[0])) == sorted(blocksight.NAMES)
