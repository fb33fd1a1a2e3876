"""A ratchet: waits, launches and copies per image must not grow, and the table follows where they fall."""

from collections.abc import Mapping

import pytest

from tests.gpu import counts

GREW = (
    "keep tensors on the GPU, and compute for all images of a pass at once; "
    f"`{counts.COMMAND}` prints the lines that cost most"
)
FELL = f"`{counts.COMMAND}` writes the new table"


def complaints(found: Mapping[str, float], table: Mapping[str, float]) -> list[str]:
    """A sentence for each figure that is not the table's."""
    return [
        f"{kind} {'grew' if found[kind] > table[kind] else 'fell'} from {table[kind]} to {found[kind]} per image: "
        + (GREW if found[kind] > table[kind] else FELL)
        for kind in table
        if found[kind] != table[kind]
    ]


@pytest.mark.parametrize("name", counts.ROWS)
def test_a_method_costs_the_host_what_the_table_says(name: str):
    stored = counts.stored()
    if stored["torch"] != counts.torch_version():
        pytest.skip(f"the table is of torch {stored['torch']}, and this is {counts.torch_version()}")
    found, by_line = counts.counted(counts.ROWS[name])
    wrong = complaints(found, stored["rows"][name])
    assert not wrong, "\n".join(
        [*wrong, *map(str, by_line.waits.most_common(5)), *map(str, by_line.launches.most_common(5))]
    )


def test_the_table_has_a_row_for_each_method():
    assert list(counts.stored()["rows"]) == list(counts.ROWS)


def test_a_figure_that_grows_or_falls_is_a_complaint_with_the_command():
    table = {"waits": 3.0, "launches": 40.0}
    assert complaints(table, table) == []
    [grown] = complaints({"waits": 3.5, "launches": 40.0}, table)
    [fallen] = complaints({"waits": 3.0, "launches": 39.0}, table)
    assert "waits grew from 3.0 to 3.5" in grown
    assert "launches fell from 40.0 to 39.0" in fallen
    assert counts.COMMAND in fallen
