"""Loads torchvision's classifiers: published weights, or a file for any number of classes, with the right switches."""

import hashlib
import math
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import IMAGENET_MEAN, IMAGENET_STD, ModelAdapter
from blocksight.engine.model.preprocessing import Preprocessing, Resizing
from blocksight.engine.model.seeding import seeded
from blocksight.engine.model.state_dicts import AUXILIARY, StateDict, fitted, load_state, read_state

RANDOM_WEIGHTS = "random"
"""The value of `--weights` that asks for seeded random weights: for speed measurements and tests."""

WITH_SWITCHES = ("googlenet", "inception_v3")
"""Networks with auxiliary heads and `transform_input`, a second normalisation; no file says whether it was on."""

MAX_CLASSES = 1 << 20
"""Of a file; more would be allocated before anything is compared."""
MAX_SIDE = 4096

_COUNTED = 9973
"""A prime that is no width of any layer: axes of this length count classes."""


def load_torchvision(architecture: str, weights: str | None, state: bytes | None, seed: int) -> ModelAdapter:
    """The classifier with a file's weights, published ones, or random ones; fed as torchvision's preset says.

    Raises ModelError with the known names.
    """
    known = _published_weights(architecture)
    is_name = weights is not None and weights in known.__members__
    if state is not None:
        return _from_file(architecture, state)
    if weights == RANDOM_WEIGHTS:
        switches = {"init_weights": True} if architecture in WITH_SWITCHES else {}  # the default warns
        return _fed(seeded(lambda: _network(architecture, **switches), seed), known["DEFAULT"])
    if is_name:
        return _fed(_download(architecture, known[weights]), known[weights])
    raise ModelError(
        f"torchvision:{architecture} needs --weights: a file or URI of a state dict, one of "
        f"{', '.join(known.__members__)} (downloaded by torchvision), or {RANDOM_WEIGHTS}"
        + (f"; there is no file {weights!r}" if weights is not None else "")
    )


def torchvision_preprocessing(architecture: str, weights: str | None) -> Preprocessing:
    """What torchvision does to a picture for published weights, by default the classifier's own default ones."""
    from torchvision.transforms.functional import to_pil_image

    known = _published_weights(architecture)
    preset = known[weights if weights in known.__members__ else "DEFAULT"].transforms()
    side = preset.resize_size[0]
    resizing = Resizing("short", side, side, preset.interpolation.value, rounds_down=False)
    return Preprocessing(lambda pixels: preset(to_pil_image(pixels)), (resizing,))


def _published_weights(architecture: str) -> Any:
    """torchvision's names of weights. Raises ModelError for an unknown classifier."""
    import torchvision.models as zoo

    known = zoo.list_models(module=zoo)
    if architecture not in known:
        near = get_close_matches(architecture, known, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
        raise ModelError(f"torchvision has no classifier {architecture!r}; {hint}")
    return zoo.get_model_weights(architecture)


def _network(architecture: str, **options: Any) -> nn.Module:
    import torchvision.models as zoo

    return zoo.get_model(architecture, **options)


def _fed(module: nn.Module, weights: Any, side: int | None = None) -> ModelAdapter:
    """The network with the input of published weights, and their class names if the number of classes is theirs.

    A `side` is the network's own, in pixels.
    """
    preset, names = weights.transforms(), weights.meta["categories"]
    pixels: int = side or preset.crop_size[0]
    adapter = ModelAdapter(module, input_size=(pixels, pixels), mean=preset.mean, std=preset.std)
    adapter.class_names = names if adapter.num_classes == len(names) else None
    return adapter


def _download(architecture: str, weights: Any) -> nn.Module:
    try:
        return _network(architecture, weights=weights)
    except OSError as error:
        raise ModelError(
            f"torchvision could not download {weights} ({error}); give --weights a file of the state dict"
        ) from error


def _from_file(architecture: str, state: bytes) -> ModelAdapter:
    """The network that a file's names and shapes ask for: its classes, auxiliary heads and image size."""
    known = _published_weights(architecture)
    published = _published_as(known, state)
    class_axes, names = _skeleton(architecture)
    stored = fitted(read_state(state), names)
    if not any(name.startswith(AUXILIARY) for name in stored.tensors):
        names = [name for name in names if not name.startswith(AUXILIARY)]
    stored = fitted(stored, names)
    options = {**_switches(architecture, names), **_image_size(architecture, stored)}
    count = _count_classes(class_axes, stored)
    options |= {"num_classes": count} if count is not None else {}
    with _WithoutDrawing():
        module = _network(architecture, **options)
    notes = load_state(module, stored)
    if architecture in WITH_SWITCHES and published is None:
        notes = (*notes, _switched_on(architecture))
    adapter = _fed(module, published or known["DEFAULT"], options.get("image_size"))
    adapter.notes = notes
    return adapter


def _switched_on(architecture: str) -> str:
    """The note on `transform_input`, with the options that give what the network takes without it."""
    mean, std = (",".join(f"{value:.6g}" for value in values) for values in without_transform())
    return (
        f"{architecture}'s second normalisation (transform_input) was switched on, as torchvision does with its own "
        f"weights; no file says whether it was on in training. If it was off: --mean {mean} --std {std}"
    )


def without_transform() -> tuple[list[float], list[float]]:
    """Mean and std that `transform_input`, which maps ImageNet's normalisation to [-1, 1], turns into ImageNet's own.

    With mean m and std s of ImageNet it computes (x s + m - 0.5) / 0.5 of its input x.
    """
    pairs = list(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
    return [mean + 2 * std * (mean - 0.5) for mean, std in pairs], [2 * std * std for _, std in pairs]


def _published_as(known: Any, state: bytes) -> Any:
    """The published weights whose file this is; None: it is another file. Their URLs hold a hash of the file."""
    mark = f"-{hashlib.sha256(state).hexdigest()[:8]}."
    return next((weights for weights in known if mark in weights.url), None)


def _skeleton(architecture: str) -> tuple[dict[str, int], list[str]]:
    """The axis that counts classes in tensors of the last layer that has one, and all names; no weight is allocated."""
    switches = {"aux_logits": True, "init_weights": False} if architecture in WITH_SWITCHES else {}
    with _WithoutMemory():
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in _network(architecture, num_classes=_COUNTED, **switches).state_dict().items()
        }
    counting = {name: shape.index(_COUNTED) for name, shape in shapes.items() if _COUNTED in shape}
    last = list(counting)[-1].rpartition(".")[0]  # the heads before it are auxiliary
    return {name: axis for name, axis in counting.items() if name.rpartition(".")[0] == last}, list(shapes)


class _WithoutMemory(TorchFunctionMode):
    """Weights are made on the meta device; what a network computes with while it is made stays on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _WithoutDrawing(TorchFunctionMode):
    """No initial weight is drawn, because a file replaces all of them; they are whatever the memory held."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_):
            return args[0]
        return func(*args, **(kwargs or {}))


def _count_classes(class_axes: dict[str, int], stored: StateDict) -> int | None:
    """The classes of the file's last layer; None if it has none, which is said when it is loaded."""
    for name, axis in class_axes.items():
        tensor = stored.tensors.get(name)
        if tensor is not None and tensor.dim() > axis:
            count = tensor.shape[axis]
            if not 1 <= count <= MAX_CLASSES:
                raise ModelError(f"the weights file has {count} classes in {name}; wanted 1 to {MAX_CLASSES}")
            return count
    return None


def _switches(architecture: str, names: list[str]) -> dict[str, Any]:
    if architecture not in WITH_SWITCHES:
        return {}
    has_auxiliary = any(name.startswith(AUXILIARY) for name in names)
    return {"aux_logits": has_auxiliary, "transform_input": True, "init_weights": False}


def _image_size(architecture: str, stored: StateDict) -> dict[str, int]:
    """The image size of a vision transformer, from its position embedding and its patches."""
    positions, patches = (stored.tensors.get(name) for name in ("encoder.pos_embedding", "conv_proj.weight"))
    if not architecture.startswith("vit_") or positions is None or patches is None:
        return {}
    if positions.dim() != 3 or patches.dim() != 4 or positions.shape[1] < 2:
        return {}
    per_side = math.isqrt(positions.shape[1] - 1)
    side = per_side * patches.shape[-1]
    is_square = per_side**2 == positions.shape[1] - 1
    return {"image_size": side} if is_square and side <= MAX_SIDE else {}
