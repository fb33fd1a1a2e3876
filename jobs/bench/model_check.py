"""Checks a model on one picture: how it is fed and read, its proved blocks, and what each explainer would cost."""

import time
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from blocksight.engine.catalog.composition import blocks_of, num_forwards, parse_method
from blocksight.engine.catalog.entries import BACKWARD, EXPLAINERS
from blocksight.engine.errors import ModelError
from blocksight.engine.judging.method_choice import chosen_explainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.blocks import Place
from blocksight.engine.model.float32 import fixed_float32
from blocksight.engine.model.threads import one_thread
from blocksight.jobs.bench.photographs import photographs
from blocksight.jobs.explain.preflight import examined_on, in_a_sentence, refuse_untaken
from blocksight.jobs.explain.step import model_facts
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.preflight import Preflight
from blocksight.jobs.plan.records import RecordFacts
from blocksight.jobs.run.one_picture import explained, loaded, png_file, read_picture, refuse_many
from blocksight.jobs.worker.progress import Tally, passing
from blocksight.storage.images.decode import fit
from blocksight.storage.inputs.survey import IMAGE_SUFFIXES
from blocksight.storage.outputs.pictures import Pixels

NUM_TIMED = 3
"""Forward passes whose median is the time of one."""
NUM_NAMED = 5
"""Class names that are shown."""
ANY = "rise"
"""Takes any classifier, also one without gradients and blocks."""
DRAWN_BY = ("gradcam", "gradient", "occlusion", ANY)
"""The picture is explained by the first of them that takes the model: the quickest first."""


@dataclass(frozen=True)
class BlockCheck:
    """A block that the rule finds, or that was named."""

    name: str
    channels: int
    height: int
    width: int
    layout: str
    proof: str
    """A clause."""


@dataclass(frozen=True)
class ExplainerCost:
    """What one picture and one target would cost."""

    explainer: str
    forwards: float | None
    """None: it does not take the model."""
    is_most: bool
    """The method scores feature maps or places of its blocks, and leaves out what says nothing."""
    seconds: float | None
    """By the time of one forward pass of one picture."""
    fault: str = ""
    """Why it does not take the model."""


@dataclass(frozen=True)
class ModelCheck:
    """What was found out about a model."""

    model: str
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    class_names: tuple[str, ...]
    """The first; empty: it has none."""
    preflight: Preflight
    notes: tuple[str, ...]
    """What was assumed when the weights were loaded."""
    is_traced: bool
    blocks: tuple[BlockCheck, ...]
    refusal: str
    """Why there is no block; empty: there is one."""
    beyond: str
    """What lies deeper than the last block and could not be read, and why; empty: nothing."""
    device: str
    """`cpu` or `cuda`."""
    forward_seconds: float
    """Of one picture; a CPU's on one thread, as a worker has it."""
    auto: str
    """The explainer that `auto` takes for it."""
    costs: tuple[ExplainerCost, ...]
    picture: str
    """The file of the map over the picture."""
    target: str
    score: float
    explainer: str

    def figures(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def check_model_on(config: JobConfig, image: str | None, output: Path, console: Console) -> ModelCheck:
    """Loads the configured model, examines it on one picture and draws the picture's map into a PNG file.

    `image` is a file, a URI or a folder, of which the first picture is taken; None: a photograph that comes with the
    demo, or else a drawn picture. Raises ConfigError, ModelError and StoreError.
    """
    refuse_many(config)
    png_file(output)  # before any work
    picture = read_picture(_picture(image), None, config.endpoint_url)
    with TemporaryDirectory(prefix="blocksight-") as folder, one_thread(), fixed_float32():  # as a worker has them
        return _checked(config.model_copy(update={"output": folder}), picture, output, console)


def _checked(config: JobConfig, picture: tuple[Pixels, RecordFacts], output: Path, console: Console) -> ModelCheck:
    adapter, state = loaded(config)
    with in_a_sentence(config.model):
        seen = fit(picture[0], adapter.input_size, config.resize)
        takes_any = _by(config, ANY)
        preflight = examined_on(adapter, takes_any, model_facts(adapter, takes_any), [seen])
        blocks, refusal = _blocks(adapter, config)
    inputs = adapter.normalise(torch.from_numpy(seen.copy()).permute(2, 0, 1)[None])
    seconds = _forward_seconds(adapter, inputs)
    costs = _costs(adapter, config, blocks, inputs, seconds, console)
    takes = {one.explainer for one in costs if not one.fault}
    config = _by(config, next(name for name in DRAWN_BY if name in takes))
    found = explained(adapter, state, config, picture, console)
    return ModelCheck(
        config.model,
        adapter.input_size,
        tuple(adapter.mean),
        tuple(adapter.std),
        adapter.num_classes,
        tuple((adapter.class_names or [])[:NUM_NAMED]),
        preflight,
        adapter.assumptions,
        adapter.network.graph is not None,
        tuple(_block(place) for place in blocks),
        refusal,
        adapter.network.beyond(blocks[-1]) if blocks else "",
        adapter.device.type,
        seconds,
        chosen_explainer(adapter).explainer,
        costs,
        str(found.save(output)),
        found.target,
        found.score,
        config.explainer,
    )


def _by(config: JobConfig, explainer: str) -> JobConfig:
    """The same job with this explainer and its defaults."""
    if blocks_of(parse_method(explainer)) == "none":
        config = config.model_copy(update={"blocks": ()})
    return config.explained_by(explainer)


def _blocks(adapter: ModelAdapter, config: JobConfig) -> tuple[tuple[Place, ...], str]:
    """The blocks, or why there are none. Raises ModelError for blocks that were named."""
    try:
        return tuple(adapter.network.blocks(config.blocks)), ""
    except ModelError as error:
        if config.blocks:
            raise
        return (), str(error)


def _block(place: Place) -> BlockCheck:
    assert place.layout is not None
    return BlockCheck(place.name, place.channels, *place.layout.grid, place.layout.kind, place.proof)


def _picture(image: str | None) -> Any:
    """The file, the first picture of a folder, a photograph of the demo, or rings that are drawn here."""
    if image is not None:
        folder = Path(image).expanduser()
        if "://" in image or not folder.is_dir():
            return image
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ConfigError(f"the folder {image} holds no picture: {', '.join(IMAGE_SUFFIXES)}")
        return str(files[0])
    try:
        return photographs()["chelsea.png"]
    except ConfigError:
        return _rings()


def _rings(side: int = 256) -> torch.Tensor:
    """A drawn picture [3, H, W] uint8: rings in three colours, off its centre."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    far = ((rows - 0.3) ** 2 + (columns + 0.2) ** 2).sqrt()
    waves = torch.stack([(far * speed).cos() for speed in (9.0, 13.0, 17.0)])
    return ((waves * 0.5 + 0.5) * 255).to(torch.uint8)


def _forward_seconds(adapter: ModelAdapter, inputs_nchw: torch.Tensor) -> float:
    took = []
    with adapter.borrowed(), torch.inference_mode():
        for _ in range(NUM_TIMED):
            began = time.perf_counter()
            adapter.logits(inputs_nchw).cpu()
            took.append(time.perf_counter() - began)
    return sorted(took)[NUM_TIMED // 2]


def _costs(
    adapter: ModelAdapter,
    config: JobConfig,
    blocks: tuple[Place, ...],
    image_nchw: torch.Tensor,
    forward_seconds: float,
    console: Console,
) -> tuple[ExplainerCost, ...]:
    """Of every explainer with its defaults; a wrapper wraps its default method."""
    found = []
    with passing(console, Tally(len(EXPLAINERS), None, verb="try", noun="explainer")) as update:
        for name in EXPLAINERS:
            own = _by(config, str(parse_method(name)))
            fault = _fault(adapter, own, blocks, image_nchw)
            forwards, is_most = (None, False) if fault else _forwards(own, blocks)
            seconds = None if forwards is None else forwards * forward_seconds
            found.append(ExplainerCost(own.explainer, forwards, is_most, seconds, fault))
            update(1)
    return tuple(found)


def _forwards(config: JobConfig, blocks: tuple[Place, ...]) -> tuple[float, bool]:
    """Forward passes of a picture, and whether they are the most: of a method that scores what a block holds."""
    method = config.method
    known = num_forwards(method, config.explainer_parameters(), 1)
    if known is not None:
        return known, False
    first = 1 + BACKWARD * ("gradients" in method.entry.needs)
    if method.name == "reciprocam":
        return first + prod(blocks[-1].grid or ()), True
    return first + sum(place.channels for place in (blocks if blocks_of(method) == "all" else blocks[-1:])), True


def _fault(adapter: ModelAdapter, config: JobConfig, blocks: tuple[Place, ...], image_nchw: torch.Tensor) -> str:
    """Why the explainer does not take the model; empty: it does."""
    if blocks_of(config.method) != "none" and not blocks:
        return "it needs blocks"
    try:
        with in_a_sentence(adapter.name):
            refuse_untaken(adapter, config, image_nchw)
    except ModelError as error:
        return str(error)
    return ""
