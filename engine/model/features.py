"""Features: one vector per image, the input of a network's last linear layer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from blocksight.engine.errors import ModelError

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter


def head_path(adapter: "ModelAdapter") -> str | None:
    """The dotted path of the linear layer that gives the logits, whose input [N, D] is the feature.

    None: there is none, and the output [N, D] is the feature itself. The layer is the last one that runs, takes one
    vector per image, and returns as many numbers as the network. Raises ModelError if a network with class names has
    no such layer, or if a network does not return [N, D].
    """
    calls: list[tuple[str, tuple[int, ...]]] = []
    layers = [(name, layer) for name, layer in adapter.module.named_modules() if isinstance(layer, nn.Linear)]
    with ExitStack() as hooks:
        for name, layer in layers:
            hooks.enter_context(layer.register_forward_hook(_shape_recorder(name, calls)))
        num_outputs = _outputs(adapter).shape[1] - len(adapter.features)
    if calls and calls[-1][1] == (2, num_outputs):
        return calls[-1][0]
    if adapter.class_names is not None:
        raise ModelError(
            f"model {adapter.name!r} has class names, and no linear layer over one vector per image gives its logits: "
            "there is no feature to take; name a model that returns features [N, D]"
        )
    return None


def _shape_recorder(name: str, calls: list[tuple[str, tuple[int, ...]]]) -> Callable[[nn.Module, object, Tensor], None]:
    return lambda _module, _given, out: calls.append((name, tuple(out.shape)))


def _outputs(adapter: "ModelAdapter") -> Tensor:
    """The output [2, D] of two black images. Raises ModelError for one of another form."""
    example = adapter.normalise(torch.zeros(2, 3, *adapter.input_size, dtype=torch.uint8))
    with adapter.borrowed(), torch.inference_mode():
        output = adapter.logits(example)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 2:
        raise ModelError(f"model {adapter.name!r} must return one vector per image, [N, D], to have features")
    return output


def without_head(adapter: "ModelAdapter") -> "ModelAdapter":
    """The adapter of a network that returns features [N, D]; changes the given adapter's module.

    Raises ModelError as `head_path`, and if the network does more to the last layer's numbers than to return them.
    """
    path = head_path(adapter)
    if path is None:
        return adapter
    if not path:
        raise ModelError(f"model {adapter.name!r} is one linear layer, and has no feature before it")
    features: list[Tensor] = []
    with capture_input(adapter.module, path, features.append):
        _outputs(adapter)
    adapter.module.set_submodule(path, nn.Identity())
    bare = adapter.with_module(adapter.module)
    if not _returns(bare, features[-1]):
        if _changes(bare):
            raise ModelError(
                f"the feature of model {adapter.name!r} changes from call to call, so that it cannot be taken: make it "
                "a fixed function"
            )
        raise ModelError(
            f"model {adapter.name!r} has a last layer {path}, and returns other numbers than this layer's (several "
            "heads, a softmax or a scale behind it), so that its feature cannot be taken: name a model that returns "
            "features [N, D]"
        )
    bare.class_names = None
    return bare


def _changes(bare: "ModelAdapter") -> bool:
    """True if the network returns other features of the same images each time."""
    try:
        return not _returns(bare, _outputs(bare))
    except (ModelError, RuntimeError):
        return False


def _returns(bare: "ModelAdapter", features: Tensor) -> bool:
    """True if the network returns these features of two black images."""
    try:
        found = _outputs(bare)
    except (ModelError, RuntimeError):  # other layers do not fit them
        return False
    return found.shape == features.shape and torch.allclose(found, features, rtol=1e-4, atol=1e-6)


@contextmanager
def capture_input(module: nn.Module, path: str, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls `receive` with each input of the sub-module at this path."""
    with module.get_submodule(path).register_forward_pre_hook(lambda _module, given: receive(given[0])):
        yield
