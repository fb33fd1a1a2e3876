"""Taps: run a borrowed network as a fixed function and record the tensors at named places."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.blocks import Place
from blocksight.engine.model.float32 import fixed_float32


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Borrows a module as a fixed function and restores it at the end.

    Inside: eval mode, no parameter needs a gradient, no layer works in place (an in-place activation
    would overwrite the tensor that a tap has recorded), and float32 is fixed (see `fixed_float32`).
    """
    modes = {child: child.training for child in module.modules() if hasattr(child, "training")}  # not if `jit.freeze`d
    in_place = {child: child.inplace for _, child in plain_modules(module) if hasattr(child, "inplace")}
    needs = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        module.eval()
        for child in in_place:
            child.inplace = False  # pyright: ignore[reportArgumentType]
        for parameter in needs:
            parameter.requires_grad_(False)
        with fixed_float32():
            yield
    finally:
        for child, training in modes.items():
            child.training = training
        for child, flag in in_place.items():
            child.inplace = flag
        for parameter, flag in needs.items():
            parameter.requires_grad_(flag)


def plain_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The paths and modules, in order of registration, without TorchScript: that is fixed, and calls no hooks."""
    return [(path, own) for path, own in module.named_modules() if not isinstance(own, torch.jit.ScriptModule)]


Tail = Callable[[Tensor, Tensor], Tensor]
"""The network behind a place: from inputs [N, 3, H, W] and its feature maps [N, C, h, w] to logits [N, K]."""

Hook = Callable[[str, Any], Any]
"""A hook: receives a place's name and output, and returns the output's replacement."""


class Recorder:
    """Records outputs and returns copies, so that no in-place operation overwrites the record."""

    def __init__(self) -> None:
        self.recorded: dict[str, Any] = {}

    def __call__(self, name: str, value: Any) -> Any:
        self.recorded.pop(name, None)  # the last call of a module wins, also in the order
        self.recorded[name] = value
        return value.clone() if isinstance(value, Tensor) else value


class MapRecorder(Recorder):
    """Records feature maps [N, C, h, w], joined to autograd; `replacements` holds other maps by place."""

    def __init__(self, places: Sequence[Place], replacements: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        super().__init__()
        self.layouts = {place.name: place.layout for place in places}
        self.replacements = replacements

    def __call__(self, name: str, value: Any) -> Any:
        layout = self.layouts[name]
        assert layout is not None
        maps = self.replacements.get(name, layout.maps(value))
        super().__call__(name, maps)
        return layout.tensor(maps, value)


class _Grower(Recorder):
    """Replaces the feature maps of one image by several variants of them, so that the batch grows."""

    def __init__(self, place: Place, variants: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layouts = {place.name: place.layout}
        self.variants = variants

    def __call__(self, name: str, value: Any) -> Any:
        layout = self.layouts[name]
        assert layout is not None
        made = self.variants(layout.maps(value))
        return layout.tensor(made, value.expand(len(made), *value.shape[1:]))


class GraphRunner(fx.Interpreter):
    """Runs a traced graph, and calls the hook on the named nodes (on every node, if names is None)."""

    def __init__(self, graph: fx.GraphModule, hook: Hook, names: Collection[str] | None = None) -> None:
        super().__init__(graph)
        self.hook, self.names = hook, names

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return self.hook(n.name, value) if self.names is None or n.name in self.names else value


@contextmanager
def hook_outputs(module: nn.Module, names: Collection[str], hook: Hook) -> Iterator[None]:
    """Calls the hook on the outputs of the named sub-modules, in order of completion; of several values on the first.

    `relu` means every call of the sub-module, `relu#2` the second one since this context began.
    """
    wanted: dict[str, dict[int | None, str]] = {}
    for name in names:
        path, call = path_and_call(name)
        wanted.setdefault(path, {})[call] = name
    with ExitStack() as hooks:
        for path, calls in wanted.items():
            hooks.enter_context(module.get_submodule(path).register_forward_hook(_of_calls(calls, hook)))
        yield


def _of_calls(names: Mapping[int | None, str], hook: Hook) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook for some calls of one sub-module, by number; None: for all others."""
    numbers = count(1)

    def called(_module: nn.Module, _given: Any, output: Any) -> Any:
        name = names.get(next(numbers), names.get(None))
        return None if name is None else _with_first(output, lambda value: hook(name, value))

    return called


def _with_first(output: Any, change: Callable[[Any], Any]) -> Any:
    """The output with its first value changed, where it is a tuple, a list or a dict: layers return them."""
    if isinstance(output, tuple | list) and output:
        values = [change(output[0]), *output[1:]]
        make = getattr(output, "_make", type(output))  # of a named tuple
        return make(values)
    if isinstance(output, dict) and output:
        changed = copy.copy(output)  # an object of transformers' stays one
        first = next(iter(output))
        changed[first] = change(output[first])
        return changed
    return change(output)


def path_and_call(name: str) -> tuple[str, int | None]:
    """The sub-module's dotted path and the number of its call in a name such as `relu#2`; None: it names no call."""
    path, _, number = name.rpartition("#")
    return (path, int(number)) if path and number.isdecimal() else (name, None)


@dataclass(frozen=True)
class Taps:
    """Records feature maps at several places in one forward, and gradients with respect to them."""

    module: nn.Module
    graph: fx.GraphModule | None
    """The traced network whose nodes the places are; None: places are sub-modules."""
    places: tuple[Place, ...]
    """Shallow to deep."""

    def __call__(self, inputs_nchw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [N, K] and the feature maps [N, C_b, h_b, w_b] of every place, joined to autograd."""
        recorder = MapRecorder(self.places)
        with torch.enable_grad():
            logits = self.run(inputs_nchw.detach().requires_grad_(True), recorder)
        return logits, [recorder.recorded[place.name] for place in self.places]

    def grown(self, input_nchw: Tensor, variants: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits [K, classes] of K variants [K, C, h, w] of one image's feature maps [1, C, h, w] at the one place.

        Before the place the network runs on the image [1, 3, H, W] alone. What fails on a batch that grows raises.
        """
        (place,) = self.places
        return self.run(input_nchw, _Grower(place, variants))

    def run(self, inputs: Tensor, hook: Hook) -> Any:
        """What the network returns for the inputs, with the hook on the outputs of the places."""
        names = [place.name for place in self.places]
        if self.graph is None:
            with hook_outputs(self.module, names, hook):
                return self.module(inputs)
        return GraphRunner(self.graph, hook, names).run(inputs)

    def tail(self) -> Tail:
        """The network behind the one place, as a function of the inputs and of other feature maps.

        If that part depends on the maps alone, only it runs. With autograd on, the logits have a gradient by the maps.
        The maps are not changed.
        """
        (place,) = self.places
        is_plain = place.layout is not None and place.layout.kind == "channels first"
        cut = _cut_behind(self.graph, place.name) if self.graph is not None and is_plain else None
        if cut is not None:
            return lambda _, maps: cut(maps.clone())  # what follows may work in place
        return lambda inputs, maps: self.run(inputs, MapRecorder(self.places, {place.name: maps}))


@torch.no_grad()
def logits_with_replaced(
    tail: Tail, image_chw: Tensor, maps_chw: Tensor, replacement_chw: Tensor, channels: Tensor, batch_size: int
) -> Tensor:
    """Logits [1 + n, K] of an image's maps [C, h, w]: unchanged, then with each of the channels [n] replaced alone.

    Runs in batches of one shape.
    """
    found = []
    for start in range(0, 1 + len(channels), batch_size):
        values = maps_chw.expand(batch_size, *maps_chw.shape).clone()
        num_unchanged = int(start == 0)
        own = channels[start - 1 + num_unchanged : start - 1 + batch_size]
        slots = torch.arange(num_unchanged, num_unchanged + len(own), device=own.device)
        values[slots, own] = replacement_chw[own]
        found.append(tail(image_chw.expand(batch_size, *image_chw.shape), values))
    return torch.cat(found)[: 1 + len(channels)]


def _cut_behind(graph: fx.GraphModule, name: str) -> fx.GraphModule | None:
    """The part of a traced network behind the node, as a function of its output; None: it needs other tensors."""
    behind = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.name == name:
            new[node] = behind.placeholder("maps")
        elif node.op == "output" or (new and all(before in new for before in node.all_input_nodes)):
            if any(before not in new for before in node.all_input_nodes):
                return None
            new[node] = behind.node_copy(node, new.__getitem__)
    return fx.GraphModule(graph, behind)


def gradients(logits: Tensor, direction: Tensor, activations: Sequence[Tensor]) -> list[Tensor]:
    """The vector-Jacobian product of `direction` [N, K] at every activation, each shaped like it.

    One backward pass gives all places; the graph is kept for the next target. A place that does not
    affect the output gets zeros. Raises ModelError if the output has no gradient at all.
    """
    if not logits.requires_grad:
        raise ModelError(
            "no gradient reaches the output: the model's forward runs under torch.no_grad or inference_mode, detaches "
            "its maps, leaves torch, or is quantised; let gradients flow, or take scorecam, rise or occlusion, which "
            "need none"
        )
    return list(
        torch.autograd.grad(logits, activations, direction.to(logits.dtype), retain_graph=True, materialize_grads=True)
    )
