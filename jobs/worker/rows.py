"""Reads an output: the rows of records, and their pictures."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from blocksight.jobs.ledger.output import fragment_of, map_of, signed_maps_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import Plan, existing_plan, source_of
from blocksight.jobs.plan.records import Unit
from blocksight.jobs.worker.unit import raw_records
from blocksight.storage.images.decode import decode, fit
from blocksight.storage.images.fitting import Fitting
from blocksight.storage.inputs.ground_truth import Truth, boxes_in
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.outputs.drawings import Box, with_boxes
from blocksight.storage.outputs.pictures import Pixels, colours, overlay, resized
from blocksight.storage.rejects import Reject
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore
from blocksight.storage.stores.store import ObjectStore, StoreError

PICTURE_SIDE = 448
"""Longer side of a rendered picture, in pixels."""
NEAREST, MAX_COMPARED = 3, 20_000
"""Keys that are suggested for one that is not there, and keys that are compared with it: about a second."""


@dataclass(frozen=True)
class Output:
    """One output of `explain`, with its evaluations."""

    name: str
    """As the user wrote it."""
    store: ObjectStore
    plan: Plan


@dataclass(frozen=True)
class Shown:
    """A record's image and one of its maps, at one size."""

    pixels: Pixels
    """[H, W, 3]; grey if the image cannot be read any more."""
    saliency_hw: NDArray[np.float32]
    """[H, W] in [0, 1]."""
    against_hw: NDArray[np.float32] | None = None
    """What speaks against the target, on the scale of the map; None if the job was not asked for it."""
    boxes: tuple[tuple[str, Box], ...] = ()
    """Label and box of each object of the ground truth, in pixels of the picture."""

    @property
    def is_signed(self) -> bool:
        """True if what speaks against the target is drawn too."""
        return self.against_hw is not None

    @property
    def image(self) -> Pixels:
        """The image with its objects' boxes, [H, W, 3]."""
        return with_boxes(self.pixels, self.boxes)

    @property
    def overlay(self) -> Pixels:
        """The map over the image, with the objects' boxes on top, [H, W, 3]."""
        return with_boxes(overlay(self.pixels, self.saliency_hw, self.against_hw), self.boxes)

    @property
    def colours(self) -> Pixels:
        """The map in colour; what speaks against the target in a second one, [H, W, 3]."""
        return colours(self.saliency_hw, self.against_hw)


def existing_output(name: str, endpoint_url: str | None = None) -> Output:
    """The output in a folder or below an s3:// prefix. Raises ConfigError if there is none, and StoreError."""
    store = PatientStore(open_store(name, endpoint_url), SHORT_PATIENCE_SECONDS)
    return Output(name, store, existing_plan(store))


def refuse_other_inputs(outputs: Sequence[Output]) -> None:
    """Raises ConfigError if the outputs have different inputs: a key names an image of one data set only."""
    for name in ("data", "resize"):
        first, *others = [output.plan.identity[name] for output in outputs]
        for output, other in zip(outputs[1:], others, strict=True):
            if other != first:
                raise ConfigError(
                    f"{outputs[0].name} and {output.name} cannot be compared: {name} is {first!r} in the one and "
                    f"{other!r} in the other"
                )


def rows_of(store: ObjectStore, plan: Plan, key: str) -> list[dict[str, Any]]:
    """All rows of the record with this key, from the fragments that may hold it.

    Raises ConfigError with the nearest keys.
    """
    found = list(rows_with(store, plan, {key}))
    if not found:
        nearest = ", ".join(map(repr, nearest_keys(store, key))) or "none"
        raise ConfigError(f"no record {key!r} in {store.uri}; nearest: {nearest} (the column `key` has them all)")
    return found


def nearest_keys(store: ObjectStore, key: str) -> list[str]:
    """The stored keys that are most like this one, at most `NEAREST`, of the first `MAX_COMPARED`."""
    keys: list[str] = []
    for info in store.list("data/"):
        keys += fragment_of(store, info.key).column("key").to_pylist()
        if len(keys) > MAX_COMPARED:
            break
    return get_close_matches(key, dict.fromkeys(keys[:MAX_COMPARED]), n=NEAREST, cutoff=0.5)


def rows_with(store: ObjectStore, plan: Plan, keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """All rows of the records with these keys, in the plan's order; only fragments that may hold one are read.

    Raises StoreError, and UnreconciledError if one is damaged.
    """
    committed = {info.key for info in store.list("data/")}
    for unit, wanted in _units_with(plan, keys):
        if unit.fragment_key in committed:
            table = fragment_of(store, unit.fragment_key)
            yield from table.filter(pc.field("key").isin(sorted(wanted))).to_pylist()


def images_of(plan: Plan, endpoint_url: str | None, keys: Collection[str]) -> Iterator[tuple[str, Pixels]]:
    """Key and upright original [H, W, 3] of records, in the plan's order; unreadable records are left out."""
    source = source_of(plan, endpoint_url)
    for unit, wanted in _units_with(plan, keys):
        yield from images_in(unit, source, wanted)


def images_in(unit: Unit, source: ObjectStore, keys: Collection[str]) -> Iterator[tuple[str, Pixels]]:
    """Key and upright original of a unit's records that have these keys, in its order, as `images_of`."""
    with suppress(StoreError):  # the shard is gone or has changed
        for raw in raw_records(unit, source):
            if raw.key in keys and raw.reject is None and raw.data is not None:
                with suppress(Reject):
                    yield raw.key, decode(raw.data).pixels


def _units_with(plan: Plan, keys: Collection[str]) -> Iterator[tuple[Unit, set[str]]]:
    """The units that may hold one of the records, cut to their objects where each is a record, and the keys."""
    left = set(keys)
    for unit in plan.units:
        if unit.layout is Layout.IMAGES:
            chosen = tuple(info for info in unit.objects if info.key in left)
            wanted = {info.key for info in chosen}
        else:
            chosen, shard = unit.objects, f"{unit.objects[0].key}/"
            wanted = {key for key in left if key.startswith(shard)}
        if wanted:
            yield replace(unit, objects=chosen), wanted


def all_rows(store: ObjectStore, plan: Plan) -> Iterator[dict[str, Any]]:
    """Every row of the output in the plan's order. Raises as `rows_with`."""
    committed = {info.key for info in store.list("data/")}
    for unit in plan.units:
        if unit.fragment_key in committed:
            yield from fragment_of(store, unit.fragment_key).to_pylist()


def picture(plan: Plan, endpoint_url: str | None, row: dict[str, Any]) -> Shown:
    """The record's image as the model saw it, undistorted, and its map at the same size."""
    return shown(plan, row, dict(images_of(plan, endpoint_url, {row["key"]})).get(row["key"]))


def shown(
    plan: Plan, row: dict[str, Any], image: Pixels | None, side: int = PICTURE_SIDE, truth: Truth | None = None
) -> Shown:
    """A row's map with its image, which may be missing, and its objects' boxes; `side` is the longer side in pixels.

    Raises UnreconciledError if the stored map is damaged.
    """
    if image is None:
        image = np.full((row["height"], row["width"], 3), 128, np.uint8)
    how = plan.identity["resize"]
    size = picture_size(row["height"], row["width"], how, side)
    fitted, boxes = fit(image, size, how), _boxes(truth, row, size, how)
    if row.get("map_negative") is None:
        return Shown(fitted, resized(map_of(row), size), boxes=boxes)
    own, against = signed_maps_of(row)
    return Shown(fitted, resized(own, size), resized(against, size), boxes)


def _boxes(truth: Truth | None, row: Mapping[str, Any], size: tuple[int, int], how: str) -> tuple[tuple[str, Box], ...]:
    """The boxes of a record's objects in its picture; none if its annotation is missing, ambiguous or does not fit."""
    if truth is None:
        return ()
    try:
        image = truth.find(row["key"])
        return () if image is None else boxes_in(image, (row["height"], row["width"]), size, how)
    except StoreError:  # only this record's annotation is affected
        return ()


def picture_size(height: int, width: int, resize: str, side: int) -> tuple[int, int]:
    """Height and width of a picture whose longer side has `side` pixels, undistorted; a crop is square."""
    how = Fitting.parse(resize)
    if how.kind == "crop":
        return side, side
    if not how.is_whole:
        height, width = how.centre
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))
