"""Reads an output's tables and maps. A damaged object raises an error that names it and says how to repair it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from blocksight.jobs.plan.documents import damaged, read_document
from blocksight.jobs.plan.plan import MODEL_KEY
from blocksight.jobs.plan.records import ModelFacts, UnreconciledError
from blocksight.storage.limits import MAX_FRAGMENT_BYTES
from blocksight.storage.outputs.fragments import read_rows
from blocksight.storage.outputs.map_codec import MapError, decode_map
from blocksight.storage.outputs.schema import EVALUATION, SCHEMA
from blocksight.storage.stores.store import DamagedError, ObjectStore

MAP_SIDES = ("map_height", "map_width")


def fragment_of(store: ObjectStore, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a committed fragment. Raises StoreError, and UnreconciledError if it is damaged.

    A map of another size than the model's input is damage, found before memory is allocated for it.
    """
    table = table_of(store, key, SCHEMA, columns)
    if set(MAP_SIDES) <= set(table.column_names):
        odd = next(map_size_faults(table, model_facts(store)["input_size"]), None)
        if odd is not None:
            raise damaged(store.uri, key, odd)
    return table


def map_size_faults(table: pa.Table, input_size: tuple[int, int]) -> Iterator[str]:
    """One sentence per map whose size is not the model's input size (height, width)."""
    rows = table.select(["key", *MAP_SIDES])
    is_odd = [pc.field(name) != side for name, side in zip(MAP_SIDES, input_size, strict=True)]
    for row in rows.filter(is_odd[0] | is_odd[1]).to_pylist():
        found, wanted = (" x ".join(map(str, sides)) for sides in ((row["map_height"], row["map_width"]), input_size))
        yield f"the map of {row['key']!r} has {found} pixels, the input of the plan's model {wanted}"


def values_in(store: ObjectStore, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one fragment of an evaluation. Raises as `fragment_of`."""
    return table_of(store, key, EVALUATION, columns)


def table_of(store: ObjectStore, key: str, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a Parquet object that has the columns of `schema`, all of them or some. Raises as `fragment_of`."""
    body = store.read(key, length=MAX_FRAGMENT_BYTES + 1)
    try:
        return read_rows(body, schema, "it", columns)
    except DamagedError as error:
        raise damaged(store.uri, key, error) from error


def model_facts(store: ObjectStore) -> Mapping[str, Any]:
    """The fields of `blocksight.jobs.plan.records.ModelFacts`, of the model that made the maps.

    Raises MissingError before it was loaded, and UnreconciledError if the object is damaged.
    """
    return vars(read_document(store, MODEL_KEY, ModelFacts))


def signed_maps_of(row: Mapping[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What speaks for and against the target of a row with `map_negative`, both [H, W] in [0, 1] of one scale.

    Raises UnreconciledError as `map_of`.
    """
    return on_one_scale(row, map_of(row), negative_map_of(row))


def negative_map_of(row: Mapping[str, Any]) -> NDArray[np.float32]:
    """What speaks against the target, [H, W] in [0, 1], of a row with `map_negative`. Raises as `map_of`."""
    return map_of({**row, "map": row["map_negative"]})


def on_one_scale(
    row: Mapping[str, Any], saliency_hw: NDArray[np.float32], against_hw: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A row's two maps, each scaled to [0, 1] by itself, on the scale of the stronger one."""
    own = _unscaled(saliency_hw, row["map_low"], row["map_high"])
    against = _unscaled(against_hw, row["map_negative_low"], row["map_negative_high"])
    greatest = max(float(own.max()), float(against.max())) or 1.0
    return (own / greatest).clip(0, 1), (against / greatest).clip(0, 1)


def _unscaled(saliency_hw: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    return (low + (high - low) * saliency_hw).astype(np.float32)


def map_of(row: Mapping[str, Any]) -> NDArray[np.float32]:
    """The map [H, W] in [0, 1] of an explained row. Raises UnreconciledError if its bytes are damaged."""
    try:
        return decode_map(row["map"] or b"", (row["map_height"], row["map_width"]))
    except MapError as error:
        raise UnreconciledError(
            f"the map of {row['key']!r} for class {row['target_index']} is damaged, `blocksight verify` names its "
            f"fragment: {error}"
        ) from error
