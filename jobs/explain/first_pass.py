"""The first pass of a method that learns: it sees some images before the first unit, and stores the learned state."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from rich.console import Console

from blocksight.jobs.explain.learned import LEARNED_KEY, num_learning_images
from blocksight.jobs.explain.step import IMAGES_PER_CHUNK, ExplainStep, has_died, try_another_picture
from blocksight.jobs.plan.context import JobContext
from blocksight.jobs.plan.records import RecordFacts, Unit, UnitInput
from blocksight.jobs.worker.attempts import CAREFUL_DEATHS, job_step, open_worker_stores
from blocksight.jobs.worker.error_classes import is_of_unit
from blocksight.jobs.worker.isolation import Isolated, isolated_if
from blocksight.jobs.worker.progress import Tally, progress
from blocksight.jobs.worker.unit import decoded, decoded_or_rejected, raw_records
from blocksight.jobs.worker.watchdog import watchdog
from blocksight.storage.inputs.records import RawRecord
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.stores.store import AlreadyExistsError, ObjectStore, StoreError

STEP = "first-pass/learn"
"""Names its attempt markers."""

Image = tuple[RecordFacts, NDArray[np.uint8]]
"""A record and its pixels [H, W, 3]."""

MAX_SOURCES = 16
"""The images are taken from at most so many shards."""


def learn(context: JobContext, units: Sequence[Unit], weights: bytes | None) -> Iterator[int | bytes]:
    """Runs the first pass with one model; yields the number of images seen so far, and last the state's file.

    Seed and names alone choose the images and their order. After several deaths each image is first tried in a child
    process, and left out if that dies. Raises ModelError and StoreError.
    """
    with job_step(open_worker_stores(context), STEP) as num_deaths, watchdog():
        step = ExplainStep(context, weights)
        learner = step.explainer.learner()
        images = _images(context, units)
        if num_deaths >= CAREFUL_DEATHS:
            images = _harmless_images(images, context, units, weights)
        images = islice(images, num_learning_images(context.config))
        num_seen = 0
        while chunk := list(islice(images, IMAGES_PER_CHUNK)):
            records, pixels = zip(*chunk, strict=True)
            num_seen += step.teach(learner, records, np.stack(pixels))
            yield num_seen
    if num_seen:  # without one readable image nothing is learned, and nothing is explained
        yield safetensors.torch.save({name: tensor.contiguous() for name, tensor in learner.state().items()})


class _Trial:
    """Runs in a child process: learns from one image and discards the result."""

    def __init__(self, context: JobContext, weights: bytes | None) -> None:
        self.step = ExplainStep(context, weights)

    def __call__(self, alone: UnitInput) -> None:
        self.step.teach(self.step.explainer.learner(), alone.records, alone.pixels)


def _harmless_images(
    images: Iterable[Image], context: JobContext, units: Sequence[Unit], weights: bytes | None
) -> Iterator[Image]:
    """The images that kill no child process. Raises UnfitWorkerError if a picture of noise kills it as well."""
    with Isolated(partial(_Trial, context, weights)) as isolated:
        for record, pixels in images:
            alone = UnitInput(units[0], (record,), pixels[None])
            try:
                isolated(alone)
            except Exception as error:
                if not has_died(error):
                    raise
                try_another_picture(alone, error, isolated)
                continue
            yield record, pixels


def ensure_learned(
    output: ObjectStore,
    context: JobContext,
    units: Sequence[Unit],
    run: Callable[[], Iterable[int | bytes]],
    console: Console,
) -> None:
    """Runs the first pass and stores its state, if the method learns and none is stored. `run` is `learn`.

    If another driver stored a state first, that one is used. Raises as `learn`.
    """
    wanted = min(num_learning_images(context.config), sum(unit.num_records for unit in units))
    if not wanted or output.head(LEARNED_KEY) is not None:
        return
    with progress(console, Tally(wanted, None, verb="learn")) as update:
        num_seen = 0
        for yielded in run():
            if isinstance(yielded, bytes):
                with suppress(AlreadyExistsError):
                    output.create(LEARNED_KEY, yielded)
            else:
                update(yielded - num_seen)
                num_seen = yielded


def _images(context: JobContext, units: Sequence[Unit]) -> Iterator[Image]:
    """Readable records, decoded. Their order depends on seed and names alone, not on the plan's units."""
    config, source = context.config, open_worker_stores(context).source
    sources = list(_sources(units, config.seed))
    share = ceil(num_learning_images(config) / min(MAX_SOURCES, len(sources)))
    decode = partial(decoded, config=config, input_size=context.facts.input_size)
    with isolated_if(decode, careful=True) as decoding:  # a record that kills its process must not end the job
        for unit in sources:
            found = (decoded_or_rejected(decoding, raw, source) for raw in _records(unit, source))
            yield from islice(((facts, picture) for facts, picture in found if picture is not None), share)


def _sources(units: Sequence[Unit], seed: int) -> Iterator[Unit]:
    """One unit of all loose images, or one unit per shard, in the order of a seeded hash."""

    def place(key: str) -> bytes:
        return hashlib.sha256(f"{seed}/{key}".encode()).digest()

    if units[0].layout is Layout.IMAGES:
        objects = sorted((info for unit in units for info in unit.objects), key=lambda info: place(info.key))
        yield replace(units[0], objects=tuple(objects), start=0, stop=len(objects))
        return
    shards: dict[str, list[Unit]] = {}
    for unit in units:
        shards.setdefault(unit.objects[0].key, []).append(unit)
    for key in sorted(shards, key=place):
        parts = shards[key]
        yield replace(parts[0], start=min(one.start for one in parts), stop=max(one.stop for one in parts))


def _records(unit: Unit, source: ObjectStore) -> Iterator[RawRecord]:
    """The unit's records up to the first that cannot be read; the read step reports the error later."""
    try:
        yield from raw_records(unit, source)
    except Exception as error:
        if not isinstance(error, StoreError) and not is_of_unit(error):
            raise
