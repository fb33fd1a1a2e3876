"""Measures the fidelity curve of a data set: a line of readings per image, so that runs can resume, then a table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from blocksight.engine.explainers.explainer import chunks
from blocksight.engine.judging.fidelity import FAITHFULNESS, FULL, METHODS, SIMILARITIES, FidelityBench, Reading
from blocksight.engine.metrics.metric import Region
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.scoring.setting_choice import ForwardRequest, choose
from blocksight.jobs.evaluate.bootstrap import MetricSums, key_hashes
from blocksight.jobs.evaluate.evaluation import ClassMap, labels_of, region_of
from blocksight.jobs.evaluate.shares import differences_of, estimates_of
from blocksight.jobs.explain.preflight import load_examined
from blocksight.jobs.explain.step import images_at_once, number_of
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.context import sha256_of, weights_bytes
from blocksight.jobs.plan.plan import Plan, make_plan
from blocksight.jobs.plan.records import RecordFacts
from blocksight.jobs.plan.units import Workforce
from blocksight.jobs.worker.progress import Tally, progress
from blocksight.jobs.worker.unit import read_unit
from blocksight.storage.images.decode import DECODE_POLICY
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.stores.opening import open_named

READINGS, CURVE = "readings.jsonl", "curve.json"
CURVE_VERSION = 2
"""Raised whenever the same images would give different readings."""

AREA_MARGIN, DROP_MARGIN = 0.01, 1.0
"""A method loses nothing if the paired 95 % intervals of its differences to full SISE, in insertion minus deletion and
in points of Drop, lie within plus and minus these margins."""
MIN_IMAGES = 200
"""Least images for that claim: with fewer, an interval may be narrow by chance."""

Line = dict[str, Any]
"""One image's readings: `image`, `key`, `sha256`, and `methods`, the forwards and values by method."""


@dataclass(frozen=True)
class CurveRequest:
    """The options of a fidelity curve."""

    config: JobConfig
    device: str
    batch_size: int | None
    truth: Truth | None
    class_map: ClassMap


@dataclass(frozen=True)
class Picture:
    """One image of the data set at the model's input size."""

    number: int
    """Its place in the data set, from 0."""
    facts: RecordFacts
    pixels: NDArray[np.uint8]


def measure_curve(asked: CurveRequest, folder: Path, console: Console) -> list[Line]:
    """The readings of every image of the data set. Readings that the folder has already are not measured again.

    Raises ConfigError if the folder holds another curve or there is no image, ModelError and StoreError.
    """
    state = weights_bytes(asked.config)
    adapter = load_examined(asked.config, state, asked.device, console)
    plan = make_plan(asked.config, weights_sha256=sha256_of(state), workforce=Workforce(1, on_gpu=False))
    known = {_name(line): line for line in _earlier_lines(folder, _identity(asked, adapter))}
    lines: list[Line] = []

    def unmeasured() -> Iterator[Picture]:
        for one in pictures(plan, asked.config, adapter.input_size):
            line = known.get((one.number, one.facts.key, one.facts.sha256))
            if line is None:
                yield one
            else:
                lines.append(line)

    with (folder / READINGS).open("a") as file:
        for made in _measured(unmeasured(), max(0, plan.num_records - len(known)), adapter, asked, console):
            file.write("".join(json.dumps(line) + "\n" for line in made))
            file.flush()
            lines += made
    if not any(FULL in line["methods"] for line in lines):
        raise ConfigError(f"no image of {asked.config.data} can be decoded and explained")
    return sorted(lines, key=itemgetter("image"))


def _name(line: Line) -> tuple[int, str, str | None]:
    return line["image"], line["key"], line["sha256"]


def _identity(asked: CurveRequest, adapter: ModelAdapter) -> dict[str, Any]:
    """All settings that an image's readings depend on."""
    return {
        "curve": CURVE_VERSION,
        "model": adapter.name,
        "weights": adapter.fingerprint,
        "data": asked.config.data,
        "resize": asked.config.resize,
        "seed": asked.config.seed,
        "decoding": DECODE_POLICY,
        "truth": None if asked.truth is None else asked.truth.digest,
        "class_map": [[label, list(classes)] for label, classes in asked.class_map],
    }


def _earlier_lines(folder: Path, identity: Mapping[str, Any]) -> list[Line]:
    """The complete lines of an earlier run with the same identity; an incomplete last line is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / READINGS
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    head, *whole = [line for line in lines if line.endswith("\n")] or [json.dumps(identity) + "\n"]
    try:
        if json.loads(head) != identity:
            raise ConfigError(f"{file} holds the curve of another model, data set or version: name another --output")
        found = [json.loads(line) for line in whole]
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read ({error}): name another --output") from error
    fresh = file.with_suffix(".new")
    fresh.write_text("".join([head, *whole]))
    fresh.replace(file)
    return found


def pictures(plan: Plan, config: JobConfig, input_size: tuple[int, int]) -> Iterator[Picture]:
    """Yields the images that can be decoded; one unit of them is in memory at a time."""
    source, _ = open_named(config.data, config.endpoint_url)
    number = 0
    for unit in plan.units:
        taken = read_unit(unit, source, config, input_size)
        pixels = iter(taken.pixels)
        for record in taken.records:
            if record.reject_code is None:
                yield Picture(number, record, next(pixels))
            number += 1


def _measured(
    images: Iterator[Picture], expected: int, adapter: ModelAdapter, asked: CurveRequest, console: Console
) -> Iterator[list[Line]]:
    """Yields the lines of a few images at a time, with a progress line."""
    bench: FidelityBench | None = None
    size = images_at_once(adapter)
    with progress(console, Tally(expected, None, verb="measure")) as update:
        for some in chunks(images, size):
            inputs = adapter.normalise(torch.from_numpy(np.stack([one.pixels for one in some])).permute(0, 3, 1, 2))
            if bench is None:
                forward, found = choose(adapter, ForwardRequest("float32", asked.batch_size))
                console.print(f"masks are scored by {found[0].setting}")
                bench = FidelityBench(
                    adapter, batch_size=found[0].setting.batch_size, images_per_pass=size, forward=forward
                )
            seeds = [number_of(asked.config.seed, one.facts.key) for one in some]
            with adapter.borrowed(), torch.inference_mode():
                predicted = adapter.of_classes(adapter.logits(inputs)).argmax(1).tolist()
            regions = [_region(asked, adapter, one, index) for one, index in zip(some, predicted, strict=True)]
            readings = bench.readings(inputs, predicted, [one.number for one in some], seeds, regions)
            yield [_line(one, readings) for one in some]
            update(len(some))


def _region(asked: CurveRequest, adapter: ModelAdapter, one: Picture, index: int) -> Region | str | None:
    """The region of the predicted class, or a sentence that says why its annotation cannot be used."""
    assert one.facts.height is not None
    assert one.facts.width is not None
    labels = labels_of(asked.class_map, index, adapter.class_name(index))
    original = (one.facts.height, one.facts.width)
    return region_of(asked.truth, one.facts.key, labels, original, asked.config.resize, adapter.input_size)


def _line(one: Picture, readings: Sequence[Reading]) -> Line:
    own = [reading for reading in readings if reading.image == one.number]
    methods = {reading.method: {"forwards": reading.num_forwards, **reading.values} for reading in own}
    return {"image": one.number, "key": one.facts.key, "sha256": one.facts.sha256, "methods": methods}


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The table, one row per method: forwards, means with 95 % intervals, and paired differences to full SISE."""
    sound = [line for line in lines if FULL in line["methods"]]
    names = [method.name for method in METHODS if any(method.name in line["methods"] for line in sound)]
    hashes = key_hashes([f"{line['image']}/{line['key']}" for line in sound])
    rows = [
        {
            "method": name,
            "kind": next(method.kind for method in METHODS if method.name == name),
            "images": sum(name in line["methods"] for line in sound),
            "forwards": float(np.mean([own[name]["forwards"] for line in sound if name in (own := line["methods"])])),
        }
        for name in names
    ]
    for measure in (*SIMILARITIES, *FAITHFULNESS, AREA):
        values = np.array([[_value(line, name, measure) for name in names] for line in sound])
        sums = MetricSums.of(hashes, values)
        for row, own, paired in zip(
            rows, estimates_of(measure, sums), [None, *differences_of(measure, sums)], strict=True
        ):
            row[measure] = [own.mean, own.low, own.high]
            if paired is not None and measure not in SIMILARITIES:
                row[f"{measure}_difference"] = [paired.difference, paired.low, paired.high]
    for row in rows[1:]:
        inside = [_inside(row[f"{AREA}_difference"], AREA_MARGIN), _inside(row["drop_difference"], DROP_MARGIN)]
        row["loses_nothing"] = row["images"] >= MIN_IMAGES and all(inside)
    return rows


AREA = "insertion_minus_deletion"


def _value(line: Line, method: str, measure: str) -> float:
    own = line["methods"].get(method, {})
    if measure == AREA:
        return own.get("insertion", np.nan) - own.get("deletion", np.nan)
    return own.get(measure, np.nan)


def _inside(interval: Sequence[float | None], margin: float) -> bool:
    _, low, high = interval
    return low is not None and high is not None and -margin <= low and high <= margin
