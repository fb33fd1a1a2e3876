"""Models of timm: its architectures, fed as their own pretrained configuration says."""

import copy
import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from torch import Tensor, nn

from blocksight.engine.catalog.sources import require
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.preprocessing import Preprocessing, Resizing
from blocksight.engine.model.resample import Grid
from blocksight.engine.model.seeding import seeded
from blocksight.engine.model.sources.feeding import fed_by
from blocksight.engine.model.sources.telling import nearest, quiet, without_weights
from blocksight.engine.model.state_dicts import StateDict, fitted, load_state, read_state
from blocksight.engine.model.torchvision_models import MAX_CLASSES, RANDOM_WEIGHTS

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def load_timm(name: str, weights: str | None, state: bytes | None, seed: int) -> ModelAdapter:
    """The model with a file's weights, or random ones. Raises ModelError, for an unknown name with the nearest."""
    require("timm")
    if state is not None:
        return made(name, {}, read_state(state))
    if weights == RANDOM_WEIGHTS:
        return drawn(name, {}, seed)
    _refuse_unknown(name)
    raise without_weights(f"timm:{name}", weights)


def made(name: str, options: Mapping[str, Any], stored: StateDict) -> ModelAdapter:
    """The model with these tensors, of as many classes as they have."""
    network = _network(name, **options)
    stored = fitted(stored, list(network.state_dict()))
    count = _count_classes(network, stored)
    if count is not None and count != getattr(network, "num_classes", count):
        network = _network(name, **{**options, "num_classes": count})
    sized = _at_size_of(network, stored)
    notes = load_state(network, stored)
    adapter = fed(network)
    adapter.notes = (*adapter.notes, *sized, *notes)
    return adapter


def _at_size_of(network: Any, stored: StateDict) -> tuple[str, ...]:
    """Brings a vision transformer to the input size of a file's position embeddings; says so if it differs."""
    own, given = getattr(network, "pos_embed", None), stored.tensors.get("pos_embed")
    if not isinstance(own, Tensor) or given is None or not own.dim() == given.dim() == 3:
        return ()
    if own.shape[1] == given.shape[1] or not hasattr(network, "set_input_size"):
        return ()
    others = own.shape[1] - math.prod(network.patch_embed.grid_size)
    side = math.isqrt(max(0, given.shape[1] - others))
    if side**2 != given.shape[1] - others:
        return ()  # told as a shape that does not fit
    size = tuple(side * patch for patch in network.patch_embed.patch_size)
    _set_size(network, size)
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, *size)}
    return (f"the file's position embeddings are of {size[0]} x {size[1]} pixels, which is the input size",)


def at_size(adapter: ModelAdapter, size: Grid) -> ModelAdapter:
    """A model of timm for inputs of another size, its positions resampled as timm does it; others as they are.

    The module is copied. Raises ModelError if timm refuses the size.
    """
    network = adapter.module
    is_free = source_name(network) is None or not hasattr(network, "set_input_size") or size == adapter.input_size
    if is_free:
        return adapter
    resized = adapter.with_module(copy.deepcopy(network))
    _set_size(resized.module, size)
    before, after = (" x ".join(map(str, one)) for one in (adapter.input_size, size))
    resized.notes = (*adapter.notes, f"positions are resampled from {before} to {after} pixels, as timm does it")
    return resized


def _set_size(network: Any, size: Sequence[int]) -> None:
    try:
        network.set_input_size(img_size=tuple(size))
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ModelError(
            f"timm cannot bring this model to {size[0]} x {size[1]} pixels (--input-size): {first_line_of(error)}"
        ) from error


def drawn(name: str, options: Mapping[str, Any], seed: int) -> ModelAdapter:
    """The model with random weights."""
    return fed(seeded(lambda: _network(name, **options), seed))


def options_of(arguments: Any, pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder asks of an architecture, fed as its pretrained configuration says.

    Raises ModelError for what would read other files or reach a hub.
    """
    import timm

    if not isinstance(arguments, dict):
        raise ModelError(f"model_args of the folder is a {type(arguments).__name__}; wanted an object")
    others = sorted(set(arguments) & (set(signature(timm.create_model).parameters) - {"kwargs"}))
    if others:
        raise ModelError(
            f"model_args of the folder name {', '.join(others)}, which say where a model comes from: take them out"
        )
    return {**arguments, "pretrained_cfg_overlay": {**pretrained, "hf_hub_id": None, "url": ""}}


def _refuse_unknown(name: str) -> None:
    """Raises ModelError for a name of no architecture, also for one of a hub or a folder."""
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise ModelError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")


def _network(name: str, **options: Any) -> nn.Module:
    import timm

    _refuse_unknown(name)
    try:
        with quiet("timm"):  # it tells of its own old names
            return timm.create_model(name, pretrained=False, **options)
    except (RuntimeError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise ModelError(f"timm cannot make {name!r}: {error}") from error


def _count_classes(network: Any, stored: StateDict) -> int | None:
    """The classes of the file's last layer; None: it has none under the model's name."""
    names = network.pretrained_cfg.get("classifier") or ()
    for name in [names] if isinstance(names, str) else names:
        tensor = stored.tensors.get(f"{name}.weight")
        if tensor is not None and tensor.dim() > 0:
            if not 1 <= tensor.shape[0] <= MAX_CLASSES:
                raise ModelError(f"the weights file has {tensor.shape[0]} classes in {name}; wanted 1 to {MAX_CLASSES}")
            return int(tensor.shape[0])
    return None


def timm_preprocessing(name: str, size: Grid | None = None) -> Preprocessing:
    """What timm does to a picture for the model of this name, fed at its own size or at this. Raises ModelError."""
    require("timm")
    _refuse_unknown(name)
    import timm

    try:
        known: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:  # an unknown tag, or no configuration at all
        raise ModelError(f"timm cannot make {name!r}: {first_line_of(error)}") from error
    return preprocessing_of(known.to_dict(), size)


def preprocessing_of(pretrained: Mapping[str, Any], size: Grid | None = None) -> Preprocessing:
    """What timm does to a picture by a pretrained configuration, for a model that is fed at a size of its own or this.

    Raises ModelError.
    """
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform
    from torchvision.transforms.functional import to_pil_image

    asked = {} if size is None else {"input_size": (3, *size)}
    config = resolve_data_config(asked, pretrained_cfg=dict(pretrained))
    channels = config["input_size"][0]
    if channels != 3:
        raise ModelError(
            f"this model of timm takes {channels} channels, and pictures have three: make it in a factory of yours, "
            "--model package.module:factory, that gives it those that it needs"
        )
    transform: Any = create_transform(**config, is_training=False)
    return Preprocessing(lambda pixels: transform(to_pil_image(pixels)), _resizings(config))


def source_name(network: Any) -> str | None:
    """What a module that timm made is called as a source, such as `timm:resnet18.a1_in1k`; None for other modules."""
    known = getattr(network, "pretrained_cfg", None)
    if not type(network).__module__.startswith("timm.") or not known or not known.get("architecture"):
        return None
    tag = known.get("tag")
    return f"timm:{known['architecture']}{f'.{tag}' if tag else ''}"


def fed(network: Any) -> ModelAdapter:
    """The adapter of a module that timm made, fed as its pretrained configuration says. Raises ModelError."""
    if not hasattr(network, "num_classes"):
        raise ModelError(
            f"{source_name(network)} gives feature maps and no logits (features_only): make it without features_only, "
            "or wrap it in a module that returns logits"
        )
    known = network.pretrained_cfg
    preprocessing = preprocessing_of(known, _built_size(network))
    adapter = fed_by(network, preprocessing, known["mean"], known["std"], _class_names(network))
    adapter.gives_features = network.num_classes == 0
    return adapter


def _built_size(network: Any) -> Grid | None:
    """The size for which a network was made where it is another than its configuration's; None: the same, or any."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    if not isinstance(size, tuple) or len(size) != 2 or size == tuple(network.pretrained_cfg["input_size"][1:]):
        return None
    return size[0], size[1]


def _resizings(config: Mapping[str, Any]) -> tuple[Resizing, ...]:
    height, width = (math.floor(side / config["crop_pct"]) for side in config["input_size"][1:])
    kind = "whole" if config.get("crop_mode") == "squash" else "short"
    named = config["interpolation"]
    interpolation = named if named in INTERPOLATIONS else "bilinear"
    return (Resizing(kind, height, width, interpolation, rounds_down=False),)


def _class_names(network: Any) -> Sequence[str] | None:
    """The names of the pretrained configuration, or those of the ImageNet that has as many classes."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    named = network.pretrained_cfg.get("label_names")
    if named and len(named) == network.num_classes:
        return list(named)
    subset = infer_imagenet_subset(network)
    if subset is None:
        return None
    known = ImageNetInfo(subset)
    if known.num_classes() != network.num_classes:  # features, or classes of the user's own
        return None
    return [known.index_to_description(index) for index in range(known.num_classes())]
