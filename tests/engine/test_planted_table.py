"""The table of planted evidence: it goes on where it was stopped, and joins its seeds."""

import json

import pytest

from blocksight.engine.catalog.composition import parameters_of, parse_method
from tests.engine import planted_table
from tests.engine.planted_table import FIGURE, FIGURES, METHODS, NETWORKS, measured, summary


def test_a_table_that_was_stopped_goes_on_and_measures_nothing_twice(monkeypatch, tmp_path):
    asked = []

    def row_of(network, label, seed, _work):
        asked.append((network, label, seed))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return dict.fromkeys(FIGURES, seed / 10)

    monkeypatch.setattr(planted_table, "row_of", row_of)
    with pytest.raises(KeyboardInterrupt):
        measured(["cnn"], [7, 8], tmp_path)
    rows = measured(["cnn"], [7, 8], tmp_path)
    wanted = [("cnn", label, seed) for seed in (7, 8) for label in METHODS["cnn"]]
    assert asked == [*wanted[:5], *wanted[4:]]
    assert [(row["network"], row["method"], row["seed"]) for row in rows] == wanted
    assert measured(["cnn"], [8], tmp_path) == rows[len(METHODS["cnn"]) :]


def test_seeds_are_joined_by_their_mean_and_their_ends():
    rows = [
        {"network": "vit", "method": "daam", "seed": seed, **dict.fromkeys(FIGURES, value)}
        for seed, value in ((1, 0.2), (2, 0.5), (3, 0.2))
    ]
    assert summary(rows) == [
        {"network": "vit", "method": "daam", "seeds": [1, 2, 3], **{figure: [0.3, 0.2, 0.5] for figure in FIGURES}}
    ]


def test_the_stored_figure_is_whole():
    stored = json.loads(FIGURE.read_text())
    found = {(row["network"], row["method"]) for row in stored}
    assert found == {(name, label) for name in {one for one, _ in found} for label in METHODS[name]}
    assert len({(row["network"], *row["seeds"]) for row in stored}) == len({name for name, _ in found})
    assert {"cnn", "vit", "clip"} <= {name for name, _ in found} <= set(NETWORKS)


@pytest.mark.parametrize("label", sorted({label for labels in METHODS.values() for label in labels}))
def test_every_method_of_the_table_is_known(label):
    name, *given = label.split()
    parameters_of(parse_method(name), dict(one.split("=") for one in given))
