"""Checks a model on one picture: how it is fed and read, its proved blocks, and what each explainer would cost."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from blocksight.engine.catalog.composition import Method, num_forwards, num_learning_images, parse_method
from blocksight.engine.catalog.entries import EXPLAINERS
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.blocks import Place
from blocksight.jobs.bench.photographs import photographs
from blocksight.jobs.explain.preflight import examined_on, in_a_sentence
from blocksight.jobs.explain.step import load, model_facts
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.context import weights_bytes
from blocksight.jobs.plan.preflight import Preflight
from blocksight.jobs.run.job import note_random_weights
from blocksight.jobs.run.one_picture import ExplainedPicture, explain, read_picture
from blocksight.storage.images.decode import fit

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Of the files of a folder of which the first is taken."""
NUM_TIMED = 3
"""Forward passes whose median is the time of one."""
NUM_NAMED = 5
"""Class names that are shown."""


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
    forward_seconds: float
    """Of one picture."""
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with in_a_sentence(config.model):
        adapter = load(config, weights_bytes(config), device, str(Path.cwd()))
        note_random_weights(adapter, config)
        blocks, refusal = _blocks(adapter, config)
    shown = _picture(image)
    config = _with_explainer(config, has_blocks=bool(blocks))
    pixels, _ = read_picture(shown, None, config.endpoint_url)
    with in_a_sentence(config.model):
        fitted = fit(pixels, adapter.input_size, config.resize)
        preflight = examined_on(adapter, config, model_facts(adapter, config), [fitted])
    found = _explained(adapter, config, shown, console)
    seconds = _forward_seconds(adapter)
    return ModelCheck(
        config.model,
        adapter.input_size,
        tuple(adapter.mean),
        tuple(adapter.std),
        adapter.num_classes,
        tuple((adapter.class_names or [])[:NUM_NAMED]),
        preflight,
        adapter.notes,
        adapter.network.graph is not None,
        tuple(_block(place) for place in blocks),
        refusal,
        seconds,
        tuple(_costs(adapter, blocks, seconds)),
        str(found.save(output)),
        found.target,
        found.score,
        config.explainer,
    )


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
    height, width = place.layout.grid
    return BlockCheck(place.name, place.channels, height, width, place.layout.kind, place.proof)


def _with_explainer(config: JobConfig, *, has_blocks: bool) -> JobConfig:
    """The configuration with an explainer of one forward and one backward pass."""
    return config.explained_by("gradcam" if has_blocks else "gradient")


def _picture(image: str | None) -> Any:
    """The file, the first picture of a folder, a photograph of the demo, or rings that are drawn here."""
    if image is not None:
        folder = Path(image).expanduser()
        if "://" in image or not folder.is_dir():
            return image
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ConfigError(f"the folder {image} holds no picture: {', '.join(sorted(SUFFIXES))}")
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


def _explained(adapter: ModelAdapter, config: JobConfig, image: Any, console: Console) -> ExplainedPicture:
    return explain(
        adapter,
        image,
        explainer=config.explainer,
        device=str(adapter.device),
        console=console,
        blocks=config.blocks,
        readout=config.readout,
        resize=config.resize,
    )


def _forward_seconds(adapter: ModelAdapter) -> float:
    inputs = adapter.normalise(torch.zeros(1, 3, *adapter.input_size, dtype=torch.uint8))
    took = []
    with adapter.borrowed(), torch.inference_mode():
        for _ in range(NUM_TIMED):
            began = time.perf_counter()
            adapter.logits(inputs).cpu()
            took.append(time.perf_counter() - began)
    return sorted(took)[NUM_TIMED // 2]


def _costs(adapter: ModelAdapter, blocks: tuple[Place, ...], forward_seconds: float) -> Iterator[ExplainerCost]:
    """Of every explainer that wraps no other, with its defaults; each is made ready, so that it may refuse."""
    for name, entry in EXPLAINERS.items():
        if entry.wraps is not None:
            continue
        method, parameters = parse_method(name), entry.parameters()
        fault = _fault(adapter, method, parameters, blocks)
        known = None if fault else num_forwards(method, parameters, 1)
        if known is None and not fault:  # a forward for each map
            known = 2.0 + sum(place.channels for place in (blocks if entry.blocks == "all" else blocks[-1:]))
        yield ExplainerCost(name, known, None if known is None else known * forward_seconds, fault)


def _fault(adapter: ModelAdapter, method: Method, parameters: Any, blocks: tuple[Place, ...]) -> str:
    """Why the explainer does not take the model; empty: it does, or it learns first and is not tried."""
    if method.entry.blocks != "none" and not blocks:
        return "it needs blocks"
    if num_learning_images(method, parameters):
        return ""
    names = [place.name for place in blocks] if method.entry.blocks != "none" else []
    try:
        with in_a_sentence(adapter.name):
            make_explainer(method.name, adapter, parameters, blocks=names)
    except ModelError as error:
        return str(error)
    return ""
