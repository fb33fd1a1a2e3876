"""Reading an output back: the rows of records, and their pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.config import ConfigError
from jobs.plan import Plan, open_source
from jobs.unit import raw_records
from storage.fragments import read_fragment
from storage.images import decode, fit
from storage.maps import decode_map
from storage.pictures import Pixels, resized
from storage.store import ObjectStore, StoreError
from storage.survey import Layout

PICTURE_SIDE = 448
"""Longer side of a rendered picture, in pixels."""


@dataclass(frozen=True)
class Shown:
    """A record's image and one of its maps, at one size."""

    pixels: Pixels
    """[H, W, 3]; grey where the image cannot be read any more."""
    saliency_hw: NDArray[np.float32]
    """[H, W] in [0, 1]."""


def rows_of(store: ObjectStore, plan: Plan, key: str) -> list[dict[str, Any]]:
    """All rows of the record with this key, from the fragments that may hold it. Raises ConfigError."""
    committed = {info.key for info in store.list("data/")}
    for unit in plan.units:
        if unit.fragment_key not in committed or not _may_hold(unit.layout, unit.objects, key):
            continue
        table = read_fragment(store.read(unit.fragment_key))
        found = table.filter(pc.field("key") == key).to_pylist()
        if found:
            return found
    raise ConfigError(f"no record {key!r} in {store.uri}; keys stand in the column `key` of its data/ folder")


def all_rows(store: ObjectStore, plan: Plan) -> Iterator[dict[str, Any]]:
    """Every row of the output in the plan's order."""
    committed = {info.key for info in store.list("data/")}
    for unit in plan.units:
        if unit.fragment_key in committed:
            yield from read_fragment(store.read(unit.fragment_key)).to_pylist()


def picture(plan: Plan, endpoint_url: str | None, row: dict[str, Any]) -> Shown:
    """The record's image as the model saw it, undistorted, and its map at the same size."""
    saliency = decode_map(row["map"])
    unit = next(unit for unit in plan.units if unit.unit_id == row["unit_id"])
    try:
        source, _ = open_source(plan.identity["data"], endpoint_url)
        raw = next(raw for raw in raw_records(unit, source) if raw.key == row["key"] and raw.data is not None)
        image = decode(raw.data or b"").pixels
    except (StoreError, StopIteration):
        image = np.full((row["height"], row["width"], 3), 128, np.uint8)
    how = plan.identity["resize"]
    size = _picture_size(row["height"], row["width"], how)
    return Shown(fit(image, size, how), resized(saliency, size))


def _may_hold(layout: Layout, objects: Sequence[Any], key: str) -> bool:
    if layout is Layout.IMAGES:
        return any(info.key == key for info in objects)
    return key.startswith(f"{objects[0].key}/")


def _picture_size(height: int, width: int, resize: str) -> tuple[int, int]:
    if resize == "crop":
        return PICTURE_SIDE, PICTURE_SIDE
    scale = PICTURE_SIDE / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))
