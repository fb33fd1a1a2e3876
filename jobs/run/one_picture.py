"""Explains one picture in this process, for notebooks: the numbers are those of a job on the same file."""

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console
from torch import Tensor, nn

from blocksight.engine.catalog.composition import AUTO, num_forwards
from blocksight.engine.catalog.entries import BACKWARD
from blocksight.engine.errors import ModelError
from blocksight.engine.judging.method_choice import chosen_explainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.float32 import fixed_float32
from blocksight.engine.model.sources.hugging_face import class_names_of, size_of
from blocksight.engine.model.sources.timm_models import fed, source_name
from blocksight.engine.model.threads import one_thread
from blocksight.jobs.explain.forward_pass import (
    chosen_forward,
    eager_forward,
    forward_request,
    precision_warning,
    write_forward,
)
from blocksight.jobs.explain.learned import num_learning_images
from blocksight.jobs.explain.preflight import examined_on, in_a_sentence, print_findings
from blocksight.jobs.explain.step import ExplainStep, as_configured, load, model_facts
from blocksight.jobs.ledger.output import on_one_scale
from blocksight.jobs.plan.config import ConfigError, JobConfig, load_config, nearest
from blocksight.jobs.plan.context import JobContext, weights_bytes
from blocksight.jobs.plan.model_input import fed_text, with_model_file
from blocksight.jobs.plan.records import ModelFacts, RecordFacts, Unit, UnitInput
from blocksight.jobs.plan.text import printable
from blocksight.jobs.run.job import forwards_per_record, note_random_weights
from blocksight.jobs.worker.progress import Tally, passing
from blocksight.jobs.worker.rows import PICTURE_SIDE, Shown, picture_size
from blocksight.storage.images.decode import decode, fit
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.limits import MAX_IMAGE_BYTES
from blocksight.storage.outputs.pictures import PANELS, Pixels, in_panels, one_line, resized
from blocksight.storage.outputs.schema import OK
from blocksight.storage.rejects import Reject
from blocksight.storage.stores.opening import open_file, open_store
from blocksight.storage.stores.store import MissingError

Model = str | nn.Module | ModelAdapter
Picture = str | Path | bytes | Image.Image | NDArray[np.uint8] | Tensor

OF_MANY = {"data", "output", "limit", "labels", "class_map"}
"""Keys of a job's configuration that one picture has no use for."""
OTHER_NAMES = {
    "method": "explainer",
    **dict.fromkeys(("layer", "layers", "target_layer", "target_layers"), "blocks"),
    **dict.fromkeys(("targets", "class_idx", "target_category"), "target"),
    **dict.fromkeys(("size", "image_size"), "input_size"),
}
"""Options by the names that other libraries and papers have for them."""
MAX_SIDE = 1024
"""Longer side of a saved overlay, in pixels."""
NO_FILE = "picture"
"""The key of a picture that comes from no file."""
UNIT = Unit(0, NO_FILE, Layout.IMAGES, (), 0, 1, 1)
"""The picture's unit, which is never read: the picture is decoded already."""
PANEL_INCHES, PLOT_DPI = 3.6, 110


class NotebookFigure(Figure):
    """A figure that a notebook shows once, where it is the last value of a cell."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=PLOT_DPI)
        return buffer.getvalue()


@dataclass(frozen=True)
class ExplainedPicture:
    """One picture, explained for one target."""

    map: NDArray[np.float32]
    """[H, W] in [0, 1] at the model's input size, in the 256 grey levels that a job stores."""
    score: float
    """Of the target, by the model's readout."""
    target: str
    """The target's name."""
    target_index: int | None
    """Its class number, if it is a class."""
    explainer: str
    pixels: Pixels
    """The upright original [h, w, 3]."""
    row: Mapping[str, Any]
    """All columns that a job stores of it; maps are grey levels. Drop's last bits may differ from a job's."""
    resize: str = "squash"
    """How the picture was brought to the model's input size."""

    @property
    def title(self) -> str:
        """Target, score and explainer in a line."""
        return f"{one_line(self.target)}, {self.score:.3f}, by {self.explainer}"

    @property
    def map_negative(self) -> NDArray[np.float32] | None:
        """With `signed=True` what speaks against the target, as `map`; else None."""
        levels = self.row.get("map_negative")
        return None if levels is None else _shares(levels)

    def at_size(self, side: int = PICTURE_SIDE) -> Shown:
        """The picture and its map, undistorted; the longer side has `side` pixels."""
        height, width = self.pixels.shape[:2]
        size = picture_size(height, width, self.resize, side)
        pixels = fit(self.pixels, size, self.resize)
        if self.map_negative is None:
            return Shown(pixels, resized(self.map, size))
        own, against = on_one_scale(self.row, self.map, self.map_negative)
        return Shown(pixels, resized(own, size), resized(against, size))

    def plot(self) -> Figure:
        """Picture, overlay and map side by side, as a figure of Matplotlib that a notebook shows."""
        shown = self.at_size()
        panels = (shown.image, shown.overlay, shown.colours)
        height = PANEL_INCHES * shown.image.shape[0] / shown.image.shape[1] + 0.7
        figure = NotebookFigure(figsize=(PANEL_INCHES * len(panels), height), layout="constrained")
        for axes, panel, name in zip(figure.subplots(1, len(panels)), panels, PANELS, strict=True):
            axes.imshow(panel)
            axes.set_title(name, fontsize="small")
            axes.set_axis_off()
        figure.suptitle(self.title, parse_math=False)
        return figure

    def save(self, path: str | Path) -> Path:
        """Writes the overlay as a PNG file, whose name may say `.png` or nothing, over an older one; returns its path.

        The longer side is the picture's own, 1,024 pixels at most. Raises ConfigError if it cannot be written.
        """
        file = png_file(path)
        try:
            Image.fromarray(self.at_size(min(MAX_SIDE, max(self.pixels.shape[:2]))).overlay).save(file, "PNG")
        except OSError as error:
            raise ConfigError(f"the picture {file} cannot be written: {error.strerror or error}") from error
        return file

    def __repr__(self) -> str:
        return f"ExplainedPicture({self.title}, map {self.map.shape[0]} x {self.map.shape[1]})"

    def _repr_png_(self) -> bytes:
        shown, buffer = self.at_size(), io.BytesIO()
        in_panels((shown.image, shown.overlay, shown.colours), is_signed=shown.is_signed).save(buffer, "PNG")
        return buffer.getvalue()


def png_file(path: str | Path) -> Path:
    """The file of a picture to be written. Raises ConfigError if its folder is missing, or it is named as no PNG."""
    file = Path(path).expanduser()
    if file.suffix.lower() not in ("", ".png"):
        raise ConfigError(f"the picture is written as PNG, and {file.name} says {file.suffix}: name it .png")
    if not file.parent.is_dir():
        raise ConfigError(f"the picture {file} cannot be written: there is no folder {file.parent}")
    return file


def explain(
    model: Model,
    image: Picture,
    target: str | int = "predicted",
    explainer: str = "sise",
    *,
    key: str | None = None,
    device: str | None = None,
    console: Console | None = None,
    **options: Any,
) -> ExplainedPicture:
    """One picture's saliency map for one target, with the same numbers as a job on the same file.

    `model` is a name as in `--model` (with `weights=`, if it needs them), a ModelAdapter, or an nn.Module, which is fed
    224 x 224 pixels with ImageNet's mean and std, or as timm's own configuration says of a module of timm, unless
    `input_size=`, `mean=` and `std=` say otherwise. It is given back as it was. `image` is a path or s3:// URI, an
    image file's bytes, a PIL image, a uint8 array [H, W, 3], [H, W] or [H, W, 4], or a uint8 tensor [3, H, W]: pixels
    before any transform.
    `options` are the other keys of a job's configuration, such as `parameters={"mu": 0.3}`, `fidelity="balanced"`,
    `blocks=("layer4",)`, `resize="crop"` or `seed=1`, and `batch_size`.

    `key` names the record in a job whose random numbers are wanted; by default the file's name. `device` is by default
    the model's own, and for a name a GPU if there is one. Warnings and progress go to `console`, by default standard
    error. Raises ConfigError, ModelError and StoreError, each in one sentence.
    """
    if isinstance(model, JobConfig):
        raise ConfigError("explain takes a model and one picture; run_job(config, execution, console) runs a job")
    notes = console or Console(stderr=True, highlight=False, soft_wrap=True)
    with TemporaryDirectory(prefix="blocksight-") as folder:
        config, batch_size = _config(model, target, explainer, options, folder)
        picture = read_picture(image, key, config.endpoint_url)
        with one_thread(), fixed_float32():  # as a worker has them
            adapter, state = _adapter(model, config, device, notes)
            config = _with_explainer(config, adapter, notes)
            return explained(adapter, state, config, picture, notes, batch_size)


def explained(
    adapter: ModelAdapter,
    state: bytes | None,
    config: JobConfig,
    picture: tuple[Pixels, RecordFacts],
    console: Console,
    batch_size: int | None = None,
) -> ExplainedPicture:
    """A picture's map by a model that is configured already; `state` holds its weights file's bytes, if any.

    `config.output` is a folder that may be written. Raises ModelError.
    """
    pixels, facts = picture
    row = _row(adapter, state, config, pixels, facts, batch_size, console)
    if row["status"] != OK:
        raise ModelError(f"the picture {facts.key!r} cannot be explained: {row['error']} ({row['reject_code']})")
    return ExplainedPicture(
        _shares(row["map"]),
        row["score"],
        row["target_name"],
        row["target_index"],
        config.explainer,
        pixels,
        row,
        config.resize,
    )


def _shares(levels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Grey levels as a job's readers see them, in [0, 1]."""
    return np.divide(levels, np.float32(255), dtype=np.float32)


def _config(
    model: Model, target: str | int, explainer: str, options: Mapping[str, Any], folder: str
) -> tuple[JobConfig, int | None]:
    """The configuration of a job on one picture, and the batch size that was asked for. Raises ConfigError."""
    known = [*(name for name in JobConfig.model_fields if name not in OF_MANY), "batch_size"]
    for name in options:
        if name not in known:
            meant = OTHER_NAMES.get(name)
            hint = f"it is called {meant!r} here" if meant else nearest(name, known)
            raise ConfigError(f"explain takes no option {name!r}; {hint}")
    if not isinstance(model, str) and options.get("weights") is not None:
        raise ConfigError("weights belong to a model that is named; this one is in memory and holds its own")
    config, execution = load_config(
        None,
        {
            **options,
            "data": f"{folder}/data",
            "output": f"{folder}/output",
            "model": _name_of(model),
            "target": _target(target),
            "explainer": explainer,
        },
    )
    refuse_many(config)
    return with_model_file(config), execution.batch_size


def _target(target: Any) -> str | int:
    """A target as text or a class number, which may be NumPy's or torch's. Raises ConfigError."""
    if isinstance(target, str):
        return target
    try:
        number = -1 if isinstance(target, bool) else index(target)
        if number >= 0:
            return number
        raise ConfigError(f"the target is {target!r}; wanted a class number from 0, or the class's name")
    except TypeError as error:
        raise ConfigError(
            f"the target is a {type(target).__name__}; wanted one class number, one class name, or another target of "
            "`--target` as text, such as 'predicted' or '281-282'"
        ) from error


def refuse_many(config: JobConfig) -> None:
    """Raises ConfigError for a target that needs a label or means several maps, and for a method that learns."""
    choice = config.target_choice
    if choice.has_label:
        raise ConfigError("one picture has no label: name the class, by its number or its name")
    if not choice.allows(1):
        raise ConfigError(
            f"target {config.target!r} means {choice.most_targets} maps, and explain makes one: call it for each "
            "target, or run a job"
        )
    if config.explainer != AUTO and num_learning_images(config):
        raise ConfigError(f"{config.explainer} learns from many images first: explain a data set with it, by a job")


def _with_explainer(config: JobConfig, adapter: ModelAdapter, console: Console) -> JobConfig:
    """The configuration with the explainer that `auto` chooses for this model."""
    if config.explainer != AUTO:
        return config
    with in_a_sentence(config.model):
        choice = chosen_explainer(adapter)
    console.print(f"explainer: {printable(choice)} (auto)")
    return config.explained_by(choice.explainer)


def _name_of(model: Model) -> str:
    if isinstance(model, str):
        return model
    if isinstance(model, ModelAdapter):
        return model.name
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model is a {type(model).__name__}; wanted a name as in --model, an nn.Module or a ModelAdapter"
        )
    return source_name(_unwrapped(model)) or type(model).__name__


def _adapter(
    model: Model, config: JobConfig, device: str | None, console: Console
) -> tuple[ModelAdapter, bytes | None]:
    """The configured model and the bytes of its weights file; says how a bare module is fed."""
    if isinstance(model, str):
        adapter, state = loaded(config, device)
        for note in adapter.assumptions:
            console.print(f"weights: {printable(note)}")
        return adapter, state
    with in_a_sentence(config.model):
        own = model.fed() if isinstance(model, ModelAdapter) else _around(model, config.model)
        adapter = as_configured(own, config, device or _device_of(own.module))
    if isinstance(model, nn.Module) and not (config.input_size and config.mean and config.std):
        said = fed_text(adapter.input_size, adapter.mean, adapter.std)
        why = "timm's configuration of it" if source_name(model) else "assumed"
        console.print(f"fed: {said} ({why}, where input_size=, mean= and std= do not say it)")
    return adapter, None


def loaded(config: JobConfig, device: str | None = None) -> tuple[ModelAdapter, bytes | None]:
    """The model that is named, on a GPU if there is one and no device is named, and the bytes of its weights file."""
    state = weights_bytes(config)
    with in_a_sentence(config.model):
        adapter = load(config, state, device or ("cuda" if torch.cuda.is_available() else "cpu"), str(Path.cwd()))
        note_random_weights(adapter, config)
    return adapter, state


def _around(module: nn.Module, name: str) -> ModelAdapter:
    """The adapter of a bare module: of timm's as its configuration says, else with ImageNet's normalisation.

    A model of Hugging Face's library knows its size and class names, and not how its pictures are prepared.
    """
    inner = _unwrapped(module)
    if source_name(inner) is None:
        sized = {} if (size := size_of(inner)) is None else {"input_size": size}
        return ModelAdapter(module, name=name, class_names=class_names_of(inner), **sized)
    adapter = fed(inner)  # of the same weights
    adapter.name = name
    return adapter


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch's own wrappers, which knows how it is fed: of `torch.compile` and of DataParallel."""
    while (inner := getattr(module, "_orig_mod", None) or _replicated(module)) is not None:
        module = inner
    return module


def _replicated(module: nn.Module) -> nn.Module | None:
    return module.module if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) else None


def _device_of(module: nn.Module) -> str:
    """Where the first weight is."""
    first = next((own for own in (*module.parameters(), *module.buffers())), None)
    return "cpu" if first is None else str(first.device)


def read_picture(image: Picture, key: str | None, endpoint_url: str | None = None) -> tuple[Pixels, RecordFacts]:
    """The upright pixels [H, W, 3] of a picture in any of its forms, and its facts.

    Raises ConfigError if it cannot be read, and StoreError.
    """
    if isinstance(image, str | Path):
        return _decoded(_file(str(image), endpoint_url), key or Path(str(image)).name)
    name = key or NO_FILE
    if isinstance(image, bytes):
        return _decoded(image, name)
    if isinstance(image, Image.Image):
        return _of_pillow(image, name)
    shown = image
    if isinstance(image, Tensor):
        shown = image.detach().cpu().permute(1, 2, 0).numpy() if image.dim() == 3 else image
    array = shown if isinstance(shown, np.ndarray) and shown.dtype == np.uint8 and shown.size else None
    if array is not None and (array.ndim == 2 or array.shape[2:] == (4,)):  # grey, or with transparency, as in a file
        return _of_pillow(Image.fromarray(array), name)
    if array is None or array.shape[2:] != (3,):
        raise ConfigError(
            f"the picture is a {_described(image)}; wanted one picture: a path, bytes, a PIL image, a uint8 array "
            "[H, W, 3] or a uint8 tensor [3, H, W] of RGB, before any transform: floats do not say how they were "
            "normalised"
        )
    pixels = np.ascontiguousarray(array)
    return pixels, RecordFacts(name, name, 0, None, height=pixels.shape[0], width=pixels.shape[1])


def _described(image: Any) -> str:
    """`float32 Tensor of shape 1 x 3 x 224 x 224`."""
    shape = getattr(image, "shape", None)
    kind = type(image).__name__
    if shape is None:
        return kind
    return f"{str(image.dtype).removeprefix('torch.')} {kind} of shape {' x '.join(map(str, shape))}"


def _file(place: str, endpoint_url: str | None) -> bytes:
    if "://" not in place and Path(place).expanduser().is_dir():
        raise ConfigError(f"{place} is a folder, and explain takes one picture: `blocksight explain` takes folders")
    store, name = open_file(str(Path(place).expanduser()) if "://" not in place else place, endpoint_url)
    try:
        return store.read(name, length=MAX_IMAGE_BYTES + 1)
    except MissingError as error:
        raise ConfigError(f"there is no picture {place}") from error


def _decoded(data: bytes, key: str) -> tuple[Pixels, RecordFacts]:
    """A file's pixels by the decoder of jobs."""
    try:
        found = decode(data)
    except Reject as reject:
        raise ConfigError(f"the picture {key!r} cannot be read: {reject.message} ({reject.code})") from reject
    facts = RecordFacts(key, key, 0, None, hashlib.sha256(data).hexdigest(), len(data), found.kind)
    return found.pixels, replace(facts, width=found.width, height=found.height)


def _of_pillow(image: Image.Image, key: str) -> tuple[Pixels, RecordFacts]:
    """The pixels of a PIL image, turned and put on white as the file would be."""
    upright, buffer = ImageOps.exif_transpose(image), io.BytesIO()
    try:
        upright.save(buffer, "PNG" if upright.mode != "CMYK" else "TIFF", compress_level=1)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"a PIL image of mode {image.mode} has no colours that can be told: call .convert('RGB') on it first"
        ) from error
    return _decoded(buffer.getvalue(), key)


def _row(
    adapter: ModelAdapter,
    state: bytes | None,
    config: JobConfig,
    pixels: Pixels,
    facts: RecordFacts,
    batch_size: int | None,
    console: Console,
) -> Mapping[str, Any]:
    """The picture's row as a job makes it: the model is examined, the forward setting chosen, the picture explained."""
    picture = fit(pixels, adapter.input_size, config.resize)
    with in_a_sentence(config.model):
        known = model_facts(adapter, config)
        preflight = examined_on(adapter, config, known, [picture])
    print_findings(preflight.findings, console)
    choose = chosen_forward if _scores_masks(config) else eager_forward
    forward, planned = choose(adapter, forward_request(config, batch_size, is_timed=False))
    warning = precision_warning(planned)
    if warning is not None:
        console.print(warning)
    write_forward(open_store(config.output), planned)  # read again with smaller batches where memory is short
    context = replace(_context(config, known, str(adapter.device), batch_size), readout=preflight.readout)
    with _step(context, state, adapter, planned.setting.batch_size, console) as step:
        step.use_forward(forward, planned.setting)
        (row,) = step(UnitInput(UNIT, (facts,), picture[None])).rows
    return row


def _scores_masks(config: JobConfig) -> bool:
    """False for a method of one forward and one backward pass; its Drop is then measured by PyTorch."""
    cost = num_forwards(config.method, config.explainer_parameters(), 1)
    return cost is None or cost > 1 + BACKWARD


def _context(config: JobConfig, facts: ModelFacts, device: str, batch_size: int | None) -> JobContext:
    return JobContext(
        config, NO_FILE, NO_FILE, facts, (), batch_size, num_threads=1, device=device, import_path=str(Path.cwd())
    )


@contextmanager
def _step(
    context: JobContext, state: bytes | None, adapter: ModelAdapter, at_once: int, console: Console
) -> Iterator[ExplainStep]:
    """The explain step of this model, with progress; the model has no hook afterwards."""
    passes = max(1, round(forwards_per_record(context) / at_once))
    with passing(console, Tally(passes, None, verb="score", noun="forward pass")) as update:
        step = ExplainStep(context, state, adapter, lambda: update(1))
        try:
            yield step
        finally:
            step.beating.remove()
