"""A ratchet: waits, launches and copies per image must not grow, and the table follows where they fall."""

from collections.abc import Mapping

import pytest

from tests.gpu import counts

ROUNDING = 0.01
"""The steps of a solver depend on rounding, and so a little on the machine."""
SLACK = 0.1
"""A figure may fall so far without a new table."""
GREW = (
    "keep tensors on the GPU, and compute for all images of a pass at once; "
    f"`{counts.COMMAND}` prints the lines that cost most"
)
FELL = f"`{counts.COMMAND}` writes the new table"


def complaints(found: Mapping[str, float], table: Mapping[str, float]) -> list[str]:
    """A sentence for each figure that grew, or that fell so far that the table no longer holds it."""
    return [
        f"{kind} {'grew' if found[kind] > own else 'fell'} from {own} to {found[kind]} per image: "
        + (GREW if found[kind] > own else FELL)
        for kind, own in table.items()
        if not (1 - SLACK) * own <= found[kind] <= (1 + ROUNDING) * own
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
    table = {"waits": 3.0, "launches": 40.0, "copies_to_gpu": 0.0}
    assert complaints(table, table) == []
    [grown] = complaints({**table, "waits": 3.1}, table)
    [fallen] = complaints({**table, "launches": 35.0}, table)
    [new] = complaints({**table, "copies_to_gpu": 0.03}, table)
    assert "waits grew from 3.0 to 3.1" in grown
    assert "launches fell from 40.0 to 35.0" in fallen
    assert "copies_to_gpu grew from 0.0" in new
    assert counts.COMMAND in fallen
