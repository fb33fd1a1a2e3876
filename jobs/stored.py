"""Reads the tables and the maps of an output for whoever shows them: what is damaged is named, with the way out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.documents import damaged, read_document
from jobs.plan import MODEL_KEY
from jobs.records import ModelFacts, UnreconciledError
from storage.fragments import read_rows
from storage.limits import MAX_FRAGMENT_BYTES
from storage.maps import MapError, decode_map
from storage.schema import EVALUATION, SCHEMA
from storage.store import DamagedError, ObjectStore


def fragment_of(store: ObjectStore, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a committed fragment. Raises StoreError, and UnreconciledError where it is damaged."""
    return table_of(store, key, SCHEMA, columns)


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
    """The fields of `jobs.records.ModelFacts`, of the model that made the maps.

    Raises MissingError before it was loaded, and UnreconciledError where the object is damaged.
    """
    return vars(read_document(store, MODEL_KEY, ModelFacts))


def map_of(row: Mapping[str, Any]) -> NDArray[np.float32]:
    """The map [H, W] in [0, 1] of an explained row. Raises UnreconciledError where its bytes are damaged."""
    try:
        return decode_map(row["map"] or b"", (row["map_height"], row["map_width"]))
    except MapError as error:
        raise UnreconciledError(
            f"the map of {row['key']!r} for class {row['target_index']} is damaged, `blocksight verify` names its "
            f"fragment: {error}"
        ) from error
