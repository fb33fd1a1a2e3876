"""The adapter: a borrowed classifier, from uint8 pixels to logits."""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.engine.catalog.target_expressions import Atom, Formula, Summand
from blocksight.engine.errors import ModelError
from blocksight.engine.model.device_errors import device_trouble
from blocksight.engine.model.expressions import AmongClasses, target_of
from blocksight.engine.model.failures import failure_of, name_of, shape_of
from blocksight.engine.model.known_networks import known_network
from blocksight.engine.model.network import Network, trace_network
from blocksight.engine.model.prompts import Compared, Prompted, Texts, embedded, readout_of, refuse_unfit
from blocksight.engine.model.prompts import name_of as name_of_prompts
from blocksight.engine.model.resample import Grid
from blocksight.engine.model.taps import frozen
from blocksight.engine.model.targets import TARGETS, Target

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ModelAdapter:
    """A classifier from uint8 pixels to logits; it alone knows the normalisation.

    The module is borrowed: use it inside `with adapter.borrowed():`, which freezes it and then restores it.
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
        """`mean` and `std` are of RGB in [0, 1]; `input_size` is height and width in pixels.

        Of a module under `torch.compile` the one inside is taken: a compiled graph has no gradient for every target.
        Raises ModelError for a module whose weights have no shape yet.
        """
        if lazy := [path for path, own in module.named_parameters() if isinstance(own, UninitializedParameter)]:
            raise ModelError(
                f"the weight {lazy[0]} of model {name!r} has no shape yet, because its layer is lazy: call the "
                "model on a picture before it is returned"
            )
        self.module = _channels_last(_with_hooks(uncompiled(module)))
        self.name = name
        self.input_size = input_size
        self.class_names = list(class_names) if class_names is not None else None
        self.notes: tuple[str, ...] = ()
        """What was assumed when the weights were loaded, one sentence each."""
        self.assumed: Mapping[str, str] = {}
        """What was assumed of the input, one sentence for each of `input_size`, `mean` and `std` until it is said."""
        self.readout: ReadoutName = "softmax"
        """How a score is read from the output."""
        self.says_readout = False
        """The readout is what the model's own configuration says, and no guess."""
        self.texts: Texts | None = None
        """What the model says of a text; None: it reads none."""
        self.gives_features = False
        """The outputs are features of the picture and no classes."""
        self.features: tuple[Atom, ...] = ()
        """Targets of the feature vector that the module returns behind the classes, in order."""
        self.device = torch.device("cpu")
        self._normalise_by(mean, std)

    def _normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1).to(self.device) for values in (mean, std))

    def fed(
        self,
        *,
        input_size: Grid | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> "ModelAdapter":
        """The same model with another input; None keeps its own. Raises ModelError for too few or too many names."""
        adapter = copy.copy(self)
        adapter.input_size = input_size or self.input_size
        adapter._normalise_by(mean or self.mean, std or self.std)
        said = {name for name, value in (("input_size", input_size), ("mean", mean), ("std", std)) if value is not None}
        adapter.assumed = {name: sentence for name, sentence in self.assumed.items() if name not in said}
        for known in ("network", "num_classes"):
            adapter.__dict__.pop(known, None)
        if class_names is not None:
            adapter.class_names = list(class_names)
            if len(class_names) != adapter.num_classes:
                raise ModelError(
                    f"{len(class_names)} class names are given, and model {self.name!r} has {adapter.num_classes} "
                    "outputs: wanted one name for each, in their order"
                )
        return adapter

    @property
    def assumptions(self) -> tuple[str, ...]:
        """All that was assumed about the model, one sentence each."""
        return (*self.notes, *self.assumed.values())

    def to(self, device: torch.device | str) -> "ModelAdapter":
        """Moves the model to a device and returns the adapter."""
        self.device = torch.device(device)
        self.module.to(self.device)
        self._mean, self._std = self._mean.to(self.device), self._std.to(self.device)
        if "network" in self.__dict__ and self.network.graph is not None:
            self.network.graph.to(self.device)  # a traced graph holds its own references to buffers
        return self

    def with_module(self, module: nn.Module) -> "ModelAdapter":
        """A copy of the adapter around another module."""
        adapter = copy.copy(self)
        adapter.module = module
        for known in ("network", "num_classes", "fingerprint"):
            adapter.__dict__.pop(known, None)
        return adapter

    def with_prompts(
        self, prompts: Sequence[Sequence[str]], embeddings: Sequence[Sequence[float]] | None = None
    ) -> "ModelAdapter":
        """A classifier of these texts: a class for each element, of one prompt or of the mean of several.

        Its logits are `scale * cosine + bias` of the picture's and the texts' features, as the model was trained. Each
        text is encoded once, now, or not at all if the embeddings [K, D] are known. Scores are read by a softmax (CLIP;
        of one class alone the logit itself) or by a sigmoid (SigLIP). Raises ModelError for a model that reads no text,
        and for prompts that are empty, too long or the same.
        """
        if self.texts is None:
            raise ModelError(
                f"model {self.name!r} reads no text, so that a prompt means nothing to it: take a model with a text "
                "encoder, such as hf:FOLDER of a CLIP or SigLIP, or open_clip:ARCH"
            )
        refuse_unfit(prompts)
        vectors = embedded(self.texts, prompts) if embeddings is None else torch.tensor(embeddings)
        adapter = self.with_module(Prompted(self.module, vectors.to(self.device), self.texts).to(self.device))
        adapter.class_names = [name_of_prompts(one) for one in prompts]
        adapter.readout = readout_of(self.texts, len(prompts))
        adapter.texts, adapter.gives_features = None, False
        return adapter

    @property
    def prompt_embeddings(self) -> tuple[tuple[float, ...], ...] | None:
        """The texts' unit vectors [K, D], from which the same classifier can be made; None for other models."""
        own = next((one for one in self.module.modules() if isinstance(one, Compared)), None)
        return None if own is None else tuple(map(tuple, own.embeddings.tolist()))

    def with_weights_of(self, module: nn.Module) -> "ModelAdapter":
        """A copy of the adapter around the same network with other weights; what was proved of its places holds."""
        adapter = self.with_module(module)
        with adapter.borrowed():
            adapter.__dict__["network"] = self.network.around(module)
        return adapter

    def resized(self, input_size: Grid) -> "ModelAdapter":
        """The same model for inputs of another size. Raises ModelError if the network does not take them."""
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
        """A context in which the module is a fixed function (see `blocksight.engine.model.taps.frozen`)."""
        return frozen(self.module)

    def normalise(self, pixels_nchw: Tensor) -> Tensor:
        """Model inputs [N, 3, H, W] (float32, on the device) of uint8 RGB pixels of the same shape."""
        inputs = pixels_nchw.to(self.device).to(torch.float32, copy=True)
        inputs.div_(255).sub_(self._mean).div_(self._std)  # as in `normalise_shares`, in one buffer
        return inputs.contiguous(memory_format=torch.channels_last)

    def normalise_shares(self, pixels_nchw: Tensor) -> Tensor:
        """Model inputs of RGB pixels in [0, 1], in their precision; both [N, 3, H, W]."""
        return ((pixels_nchw - self._mean) / self._std).contiguous(memory_format=torch.channels_last)

    def pixels_of(self, inputs_nchw: Tensor) -> Tensor:
        """The RGB pixels of model inputs, both [N, 3, H, W], clamped to [0, 1]."""
        return (inputs_nchw * self._std + self._mean).clamp(0, 1)

    def logits(self, inputs_nchw: Tensor) -> Tensor:
        """The module's output [N, K] for normalised inputs; targets of features stand behind the classes."""
        return self.module(inputs_nchw.contiguous(memory_format=torch.channels_last))

    def of_classes(self, outputs: Tensor) -> Tensor:
        """The logits [N, K] of the classes alone, of outputs as `logits` returns them."""
        return outputs[:, : -len(self.features)] if self.features else outputs

    def target(self, classes: Tensor) -> Target:
        """The scores of these classes, [N, T] int64, by the adapter's readout."""
        own = TARGETS[self.readout](classes)
        return AmongClasses(own, self.num_classes) if self.features else own

    def target_of(self, formulas: Sequence[Sequence[Formula]]) -> Target:
        """The target of T formulas for each of N images, by the adapter's readout. Raises ModelError."""
        return target_of(formulas, self.readout, self.device, self.num_classes if self.features else 0, self.features)

    def scores(self, outputs: Tensor) -> Tensor:
        """The scores [N, K] (float64) of all classes, by the adapter's readout."""
        return TARGETS[self.readout].values(self.of_classes(outputs))

    @cached_property
    def network(self) -> Network:
        """The traced network at the model's input size."""
        own = torch.Generator().manual_seed(0)  # tracing must not consume the user's random numbers
        pixels = torch.randint(0, 256, (2, 3, *self.input_size), dtype=torch.uint8, generator=own)
        example = self.normalise(pixels)
        with self.borrowed():
            weights = self._hash_of_weights()
            if weights is None:
                return trace_network(self.module, example)
            return known_network(self.module, example, weights)

    @cached_property
    def num_classes(self) -> int:
        """K. Raises ModelError if the module does not return logits [N, K]."""
        example = self.normalise(torch.zeros(2, 3, *self.input_size, dtype=torch.uint8))
        try:
            with self.borrowed(), torch.inference_mode():
                logits = self.module(example)
        except Exception as error:
            if device_trouble(error) is not None:
                raise
            raise ModelError(f"model {self.name!r} {failure_of(self.module, error, self.input_size)}") from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2:
            raise ModelError(
                f"model {self.name!r} must return logits [N, classes]; for 2 images it returned {shape_of(logits)}"
            )
        if not logits.is_floating_point() or logits.layout is not torch.strided:
            kind = name_of(logits.dtype) if logits.layout is torch.strided else "sparse"
            raise ModelError(
                f"model {self.name!r} returns {kind} numbers, and logits are dense floats: return what comes before "
                "the argmax, the threshold or the rounding"
            )
        num_classes = logits.shape[1] - len(self.features)
        if num_classes < 2 and self.readout == "softmax":
            raise ModelError(
                f"model {self.name!r} has one output, whose softmax is always 1: nothing can be explained; say what it "
                "is with --readout sigmoid, probabilities or identity (a regression), or wrap it to return two logits, "
                "such as [0, z] for a sigmoid's z"
            )
        return num_classes

    def _hash_of_weights(self) -> str | None:
        """The fingerprint; None for weights that cannot be hashed."""
        try:
            return self.fingerprint
        except ModelError:
            return None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the names, types, shapes and bytes of all weights and buffers, as hex. Raises ModelError."""
        if isinstance(self.module, Script) and not self.module.state_dict():
            raise ModelError(
                f"{self.name} is TorchScript without weights that can be read, so that a resumed job could not tell "
                "that it is the same model: return it as it was before torch.jit.freeze or optimize_for_inference"
            )
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            try:
                for part in _parts(name, value):
                    digest.update(part)
            except (TypeError, RuntimeError, NotImplementedError) as error:
                if device_trouble(error) is not None:
                    raise
                raise ModelError(
                    f"the weight {name!r} of {self.name} cannot be hashed, and without its hash a resumed job could "
                    f"not tell that it is the same model: {error}"
                ) from error
        return digest.hexdigest()

    def class_name(self, index: int) -> str:
        """The class's name, or `class 7` if the model has no names."""
        return self.class_names[index] if self.class_names is not None else f"class {index}"

    def name_of(self, own: Summand) -> str:
        """The name of a class or a feature, for people."""
        if isinstance(own, int):
            return self.class_name(own)
        if own.kind == "prototype":
            return f"prototype of {self.class_name(int(own.value))}"
        return f"{'similar to' if own.kind == 'similar' else own.kind} {own.value}"


class Script(nn.Module):
    """TorchScript within a plain module, because it calls no hooks itself."""

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.script = script

    def forward(self, inputs_nchw: Tensor) -> Any:
        """What the script returns."""
        return self.script(inputs_nchw)


def _with_hooks(module: nn.Module) -> nn.Module:
    return Script(module) if isinstance(module, torch.jit.ScriptModule) else module


def _channels_last(module: nn.Module) -> nn.Module:
    """The module, its weights [a, b, h, w] in the format in which convolutions run fastest; others stay."""
    for own in (*module.parameters(), *module.buffers()):
        if own.dim() == 4:
            own.data = own.data.contiguous(memory_format=torch.channels_last)
    return module


def uncompiled(module: nn.Module) -> nn.Module:
    """The module without `torch.compile`, around it or around its sub-modules."""
    inner = getattr(module, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return uncompiled(inner)
    if module._compiled_call_impl is not None:  # of `module.compile()`
        module._compiled_call_impl = None
    for name, child in module.named_children():
        plain = uncompiled(child)
        if plain is not child:
            setattr(module, name, plain)
    return module


def _parts(name: str, value: Any) -> Iterator[bytes]:
    """A weight as bytes: name, type and shape, then the numbers. Packed weights are tuples of other values.

    Raises TypeError for a value that has no fixed bytes.
    """
    if isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from _parts(f"{name}.{index}", part)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _parts(f"{name}.{key}", value[key])
    elif isinstance(value, Tensor):
        yield from _tensor_parts(name, value.detach().cpu())
    elif value is None or isinstance(value, str | bytes | int | float | torch.dtype):
        yield f"{name} {value!r}\n".encode()
    else:
        raise TypeError(f"it is a {type(value).__name__}")


def _tensor_parts(name: str, tensor: Tensor) -> Iterator[bytes]:
    yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
    if tensor.is_quantized:
        yield f"{tensor.qscheme()} {_scales(tensor)}\n".encode()
        tensor = tensor.int_repr()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    yield plain.flatten().view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16 and no float8


def _scales(tensor: Tensor) -> str:
    """Scales and zero points of a quantised tensor."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return f"{tensor.q_scale()!r} {tensor.q_zero_point()}"
    return f"{tensor.q_per_channel_scales().tolist()} {tensor.q_per_channel_zero_points().tolist()}"
