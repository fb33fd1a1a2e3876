"""Makes side products by hand, and puts them into the rows of outputs."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from blocksight.storage.outputs.fragments import encode_fragment, read_fragment
from blocksight.storage.stores.store import ObjectStore

Row = dict[str, Any]


def grids(names: list[str], values: list[float | None], side: int = 4, seed: int = 0) -> list[Row]:
    """Random maps; each adds to the sum of the maps before it."""
    drawn = np.random.default_rng(seed).random((len(names), side * side)).cumsum(0).astype(np.float32)
    return [
        {"name": name, "value": value, "height": side, "width": side, "values": own.tolist()}
        for name, value, own in zip(names, values, drawn, strict=True)
    ]


def blocks(count: int, side: int = 4) -> list[Row]:
    """Accumulated maps of a transformer."""
    return grids([f"blocks.{number}" for number in range(count)], [None] * count, side)


def crops(count: int, side: int, stride: int) -> list[Row]:
    """Crops on a grid, the best one last."""
    return [
        {
            "top": stride * row,
            "left": stride * column,
            "height": side,
            "width": side,
            "score": (count * row + column + 1) / (count * count + 1),
            "weight": 1.0,
        }
        for row in range(count)
        for column in range(count)
    ]


def path(count: int) -> list[Row]:
    """Fixations on a spiral with falling loss."""
    turns = np.linspace(0, 2 * np.pi, count)
    return [
        {
            "row": float(0.1 * number * np.sin(turn)),
            "column": float(0.1 * number * np.cos(turn)),
            "loss": 2.31 / (number + 1),
        }
        for number, turn in enumerate(turns)
    ]


def family(count: int) -> list[Row]:
    """Candidates of two families; the fourth is the best where less is better, the first where more is."""
    values = [0.1 + ((number + 5) % 8) for number in range(count)]
    return grids([("normal", "blur")[number % 2] for number in range(count)], list(values))


OF_METHODS: Mapping[str, Mapping[str, Any]] = {
    "daam": {"accumulated_maps": blocks(5)},
    "fovex": {"scan_path": path(5)},
    "ucag": {"crops": crops(3, 16, 8)},
    "bee": {"map_family": family(8), "selected_by": "average_drop_100"},
    "a-fmi": {"channel_importance": [0.5, -0.25, 0.0, 0.125, 2.0]},
    "feature-cam": {"edge_detector": "hed"},
}
"""Side products by the method that makes them, for inputs of 32 x 32 pixels."""


def rewrite(store: ObjectStore, change: Callable[[Row], Mapping[str, Any]]) -> None:
    """Replaces every fragment; `change` gives new values for each explained row."""
    for info in list(store.list("data/")):
        rows = read_fragment(store.read(info.key)).to_pylist()
        store.put(info.key, encode_fragment([{**row, **_changed(row, change)} for row in rows], {}))


def _changed(row: Row, change: Callable[[Row], Mapping[str, Any]]) -> Mapping[str, Any]:
    return change(row) if row["status"] == "ok" else {}


def with_products(store: ObjectStore, *methods: str, **columns: Any) -> None:
    """Gives every explained row the side products of these methods, and other columns."""
    given = {name: value for method in methods for name, value in OF_METHODS[method].items()} | columns
    rewrite(store, lambda _: given)
