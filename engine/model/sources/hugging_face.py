"""Models of a Hugging Face folder: configuration, preprocessing and safetensors; no network, none of its code."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.engine.catalog.sources import require
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.outputs import with_one_output
from blocksight.engine.model.preprocessing import Preprocessing, Resizing
from blocksight.engine.model.prompts import Texts
from blocksight.engine.model.resample import Grid
from blocksight.engine.model.seeding import seeded
from blocksight.engine.model.sources.feeding import fed_by
from blocksight.engine.model.sources.files import folder_of, split, unpack
from blocksight.engine.model.sources.hugging_face_files import (
    CONFIG,
    PROCESSORS,
    TOKENIZERS,
    WEIGHTS_FILE,
    object_of,
    refuse_code,
)
from blocksight.engine.model.sources.telling import quiet
from blocksight.engine.model.sources.timm_models import drawn as drawn_by_timm
from blocksight.engine.model.sources.timm_models import made as made_by_timm
from blocksight.engine.model.sources.timm_models import options_of, preprocessing_of
from blocksight.engine.model.state_dicts import load_state, read_state
from blocksight.engine.model.torchvision_models import RANDOM_WEIGHTS

MAX_SHOWN = 3


def load_hugging_face(name: str, weights: str | None, state: bytes | None, seed: int) -> ModelAdapter:
    """The model of a folder, whose files are packed in `state`; `weights` may be `random`. Raises ModelError."""
    if state is None:
        raise ModelError(f"hf:{name} names a folder, whose files were not read: call `load_model` with them packed")
    packed, file = split(state)
    files = unpack(packed or b"")
    config = object_of(bytes(files[CONFIG]), CONFIG) if CONFIG in files else {}
    refuse_code(files)
    is_made = weights == RANDOM_WEIGHTS or file is not None
    if _is_of_timm(config):
        return _of_timm(config, file if is_made else _only_weights(files), seed)
    require("hf")
    kind = _class_of(config)
    with folder_of(files) as folder, _quiet():
        model = _random(kind, folder, seed) if is_made else _stored(kind, folder)
        notes = tuple(_notes(config)) if file is None else load_state(model, read_state(file))
        adapter = _fed(model, folder)
    adapter.notes = (*adapter.notes, *notes)
    return adapter


def _only_weights(files: Mapping[str, memoryview]) -> bytes:
    if WEIGHTS_FILE not in files:
        raise ModelError(f"the folder holds no {WEIGHTS_FILE}: timm's models are read from one file")
    return bytes(files[WEIGHTS_FILE])


def _of_timm(config: Mapping[str, Any], stored: bytes | None, seed: int) -> ModelAdapter:
    """A folder's model of timm, with these weights, or with random ones."""
    require("timm")
    own = dict(config["pretrained_cfg"])
    own.update({key: config[key] for key in ("num_classes", "label_names") if key in config})
    if _are_made_up(own.get("label_names") or ()):
        own.pop("label_names", None)
    name, options = config["architecture"], options_of(config.get("model_args") or {}, own)
    return drawn_by_timm(name, options, seed) if stored is None else made_by_timm(name, options, read_state(stored))


def hugging_face_preprocessing(files: bytes | None) -> Preprocessing:
    """What the processor of a folder does to a picture. Raises ModelError."""
    found = unpack(split(files)[0] or b"")
    config = object_of(bytes(found[CONFIG]), CONFIG) if CONFIG in found else {}
    refuse_code(found)
    if _is_of_timm(config):
        require("timm")
        return preprocessing_of(config["pretrained_cfg"])
    require("hf")
    with folder_of(found) as folder, _quiet():
        return _preprocessing(folder)[0]


def _is_of_timm(config: Mapping[str, Any]) -> bool:
    """True for a folder that timm wrote, or the library's wrapper of timm."""
    return isinstance(config.get("pretrained_cfg"), dict) and isinstance(config.get("architecture"), str)


def _class_of(config: Mapping[str, Any]) -> Any:
    """The library's class that the configuration names. Raises ModelError for one without a use here."""
    import transformers

    named = config.get("architectures") or ()
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if name is None:
        raise ModelError(f"{CONFIG} names no architecture: save the model with `save_pretrained`")
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelError(f"transformers {transformers.__version__} has no model {name!r}")
    if not _takes_pictures_alone(kind):
        raise ModelError(
            f"{name} does not take a picture's pixels alone; wanted an image classifier, a model of features, or "
            "CLIP's kind"
        )
    return kind


def _takes_pictures_alone(kind: Any) -> bool:
    """True for CLIP's kind, and where `pixel_values` are the input, or may stand for it in an image classifier."""
    if hasattr(kind, "get_image_features") or getattr(kind, "main_input_name", "") == "pixel_values":
        return True
    is_text = "input_ids" in signature(kind.forward).parameters
    return not is_text and _is_classifier(kind) and "pixel_values" in signature(kind.forward).parameters


def _is_classifier(kind: type) -> bool:
    return "ForImageClassification" in kind.__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the library prints, and its bars of progress."""
    import transformers

    bars = transformers.utils.logging
    shows = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with quiet("transformers"):
            yield
    finally:
        if shows:
            bars.enable_progress_bar()


def _random(kind: Any, folder: str, seed: int) -> nn.Module:
    config = _said(lambda: kind.config_class.from_pretrained(folder, local_files_only=True), "its configuration")
    return seeded(lambda: _said(lambda: kind(config), "the model"), seed)


def _stored(kind: Any, folder: str) -> nn.Module:
    """The model with the folder's weights, all of them. Raises ModelError if some are missing."""
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    options["ignore_mismatched_sizes"] = True  # told below, with their names
    model, found = _said(lambda: kind.from_pretrained(folder, output_loading_info=True, **options), "the weights")
    for what, names in (("no", found["missing_keys"]), ("another shape of", found["mismatched_keys"])):
        if names:
            shown = ", ".join(sorted(str(name) for name in names)[:MAX_SHOWN])
            raise ModelError(f"the folder's weights hold {what} {shown}: they would be random in {kind.__name__}")
    return model


def _said(make: Callable[[], Any], what: str) -> Any:
    """What `make` returns; whatever the library raises becomes a sentence."""
    try:
        return make()
    except Exception as error:  # a library raises anything over a folder of a stranger
        raise ModelError(f"transformers cannot read {what} of this folder: {first_line_of(error)}") from error


def _notes(config: Mapping[str, Any]) -> Iterator[str]:
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored not in (None, "float32"):
        yield f"the folder's weights are {stored}; the model computes in float32"


class Answer(nn.Module):
    """A classifier of the library, called with pictures alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs_nchw: Tensor) -> Any:
        """The library's answer, an object with `logits`."""
        return self.network(pixel_values=inputs_nchw)


class Feature(nn.Module):
    """A model of the library without a head: its pooled output, or the first token of its last layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs_nchw: Tensor) -> Tensor:
        """Features [N, D]."""
        found = self.network(pixel_values=inputs_nchw)
        pooled = getattr(found, "image_embeds", None)
        pooled = getattr(found, "pooler_output", None) if pooled is None else pooled
        return found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


class PictureFeature(nn.Module):
    """The picture side of a model that compares pictures with texts."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs_nchw: Tensor) -> Tensor:
        """Features [N, D], not normalised."""
        found = self.network.get_image_features(pixel_values=inputs_nchw)
        return found if isinstance(found, Tensor) else found.pooler_output


def _fed(model: Any, folder: str) -> ModelAdapter:
    own, mean, std = _preprocessing(folder)
    if hasattr(model, "get_image_features"):
        adapter = fed_by(PictureFeature(model), own, mean, std)
        adapter.texts, adapter.gives_features = _texts(model, folder), True
        return adapter
    if _is_classifier(type(model)):
        adapter = fed_by(Answer(model), own, mean, std, _class_names(model.config))
        return with_one_output(_read_as(adapter, getattr(model.config, "problem_type", None)))
    adapter = fed_by(Feature(model), own, mean, std)
    adapter.gives_features = True
    return adapter


READOUTS: Mapping[str, ReadoutName] = {
    "regression": "identity",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}
"""How the scores of a folder's problem type are read."""


def _read_as(adapter: ModelAdapter, problem: str | None) -> ModelAdapter:
    """The adapter, read as the folder's problem type says."""
    if problem is not None and problem in READOUTS:
        adapter.readout, adapter.says_readout = READOUTS[problem], True
        adapter.notes = (f"the folder says {problem.replace('_', ' ')}: a score is read by {adapter.readout}",)
    return adapter


def _texts(model: Any, folder: str) -> Texts | None:
    """The text side; None: how a text is compared with a picture is not known."""
    scale: Any = getattr(model, "logit_scale", None)
    temperature: Any = getattr(model, "temperature", None)
    if not hasattr(model, "get_text_features") or (scale is None and temperature is None):
        return None
    bias = getattr(model, "logit_bias", None)
    return Texts(
        encode=_Encoder(model, _tokenizer(folder)),
        scale=float(scale.detach().exp()) if scale is not None else 1 / float(temperature.detach()),
        bias=0.0 if bias is None else float(bias.detach()),
        are_alone=bias is not None,
    )


def _tokenizer(folder: str) -> Any:
    """The folder's own; None: it has none that can be read."""
    from transformers import AutoTokenizer

    if not any((Path(folder) / name).exists() for name in TOKENIZERS):
        return None
    return _said(lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True), "the tokenizer")


class _Encoder:
    """Encodes texts as the library's processor does: SigLIP fills every text to its full length."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, text: str) -> Tensor:
        tokens = {name: value.to(self.model.device) for name, value in self._tokens(text).items()}
        with torch.inference_mode():
            found = self.model.get_text_features(**tokens)
            found = found if isinstance(found, Tensor) else found.pooler_output
        return found[0].float().cpu().clone()

    def _tokens(self, text: str) -> Mapping[str, Tensor]:
        if self.tokenizer is None:
            raise ModelError(
                "the model's folder holds no tokenizer, so that no prompt can be read: save it there "
                f"(tokenizer.save_pretrained; wanted one of {', '.join(TOKENIZERS)})"
            )
        most = self.model.config.text_config.max_position_embeddings
        count = len(self.tokenizer(text)["input_ids"])
        if count > most:
            raise ModelError(f"the prompt {text[:40]!r}... has {count} tokens; the model reads {most}")
        is_filled = getattr(self.model, "logit_bias", None) is not None
        filling = {"padding": "max_length", "max_length": most} if is_filled else {}
        found = self.tokenizer(text, return_tensors="pt", **filling)
        known = ("input_ids",) if is_filled else ("input_ids", "attention_mask")
        return {name: found[name] for name in known if name in found}


def class_names_of(network: nn.Module) -> Sequence[str] | None:
    """The class names of a classifier of the library that is in memory; None: it is none, or has no names."""
    kind = type(network)
    is_of_library = kind.__module__.startswith("transformers.") and _is_classifier(kind)
    return _class_names(network.config) if is_of_library else None


def size_of(network: nn.Module) -> Grid | None:
    """Height and width for which a model of the library in memory was made; None: it is none, or does not say."""
    if not type(network).__module__.startswith("transformers."):
        return None
    side = getattr(network.config, "image_size", None)
    sides = (side, side) if isinstance(side, int) else side
    if isinstance(sides, tuple | list) and len(sides) == 2 and all(isinstance(one, int) for one in sides):
        return sides[0], sides[1]
    return None


def _class_names(config: Any) -> Sequence[str] | None:
    """The names of `id2label`; None where there are none, or where the library made them up."""
    known = config.id2label or {}
    names = [str(known[index]) for index in sorted(known)]
    return None if _are_made_up(names) else names


def _are_made_up(names: Sequence[str]) -> bool:
    return all(name == f"LABEL_{index}" for index, name in enumerate(names))


def _preprocessing(folder: str) -> tuple[Preprocessing, Sequence[float], Sequence[float]]:
    """The folder's own preprocessing, with the mean and std that it names."""
    from transformers import AutoImageProcessor

    if not any((Path(folder) / name).exists() for name in PROCESSORS):
        raise ModelError(
            f"the folder holds no {PROCESSORS[0]}, so how the model is fed is not known: save its image processor "
            "there (processor.save_pretrained)"
        )
    processor = _said(lambda: AutoImageProcessor.from_pretrained(folder, local_files_only=True), "the preprocessing")

    def apply(pixels: Any) -> Tensor:
        found = _said(lambda: processor(images=pixels, return_tensors="pt"), "a picture by the preprocessing")
        return found["pixel_values"][0]

    mean, std = (_numbers(getattr(processor, name, None)) for name in ("image_mean", "image_std"))
    return Preprocessing(apply, tuple(_resizings(processor))), mean, std


def _numbers(value: Any) -> Sequence[float]:
    return tuple(value) if isinstance(value, list | tuple) else ()


RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's numbers of the ways to resample."""


def _resizings(processor: Any) -> Iterator[Resizing]:
    """The ways in which the processor's settings can be read, the likeliest first."""
    size, crop = (_sides(getattr(processor, name, None)) for name in ("size", "crop_size"))
    resample = getattr(processor, "resample", None)
    number = int(resample) if isinstance(resample, int) else 2
    interpolation = RESAMPLING[number] if number < len(RESAMPLING) else "bilinear"
    share = getattr(processor, "crop_pct", None) or 224 / 256  # of processors that enlarge before they cut
    for height, width in filter(None, (size, crop)):
        for kind in ("short", "whole") if height == width else ("whole",):
            yield Resizing(kind, height, width, interpolation, rounds_down=True)
            yield Resizing(kind, int(height / share), int(width / share), interpolation, rounds_down=True)


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width of `{"height": 224, "width": 224}` or `{"shortest_edge": 224}`."""
    if isinstance(size, int):
        return size, size
    values = [getattr(size, key, None) or _item(size, key) for key in ("height", "width", "shortest_edge")]
    height, width, short = (int(value) if isinstance(value, int | float) else None for value in values)
    if height and width:
        return height, width
    return (short, short) if short else None


def _item(size: Any, key: str) -> Any:
    return size.get(key) if isinstance(size, Mapping) else None
