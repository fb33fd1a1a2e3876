"""Taps: run a borrowed network as a fixed function and record what named places compute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Borrows a module as a fixed function and gives it back as it was.

    Inside: eval mode, no parameter needs a gradient, no layer works in place (an in-place activation
    would overwrite the tensor that a tap has recorded), and convolutions on a GPU keep all of float32
    (torch would allow them TF32, whose 10-bit mantissa moves scores by more than 1e-4).
    """
    modes = {child: child.training for child in module.modules()}
    in_place = {child: child.inplace for child in module.modules() if hasattr(child, "inplace")}
    needs = {parameter: parameter.requires_grad for parameter in module.parameters()}
    allows_tf32 = torch.backends.cudnn.allow_tf32
    try:
        module.eval()
        for child in in_place:
            child.inplace = False  # pyright: ignore[reportArgumentType]
        for parameter in needs:
            parameter.requires_grad_(False)
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allows_tf32
        for child, training in modes.items():
            child.training = training
        for child, flag in in_place.items():
            child.inplace = flag
        for parameter, flag in needs.items():
            parameter.requires_grad_(flag)


class GraphRecorder(fx.Interpreter):
    """Runs a traced graph and keeps what the named nodes compute (every node, if names is None).

    What follows a named node gets a copy, so that no operation in place overwrites what was kept.
    """

    def __init__(self, graph: fx.GraphModule, names: Sequence[str] | None = None) -> None:
        super().__init__(graph)
        self.names = names
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.names is None or n.name in self.names:
            self.kept[n.name] = value
        return value if self.names is None else _copied(value, n.name in self.names)


def _copied(value: Any, is_kept: bool) -> Any:
    return value.clone() if is_kept and isinstance(value, Tensor) else value


@contextmanager
def module_outputs(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Keeps what the named sub-modules return, in order of completion; the last call of each wins.

    What follows a sub-module gets a copy, as in `GraphRecorder`.
    """
    kept: dict[str, Any] = {}
    handles = []

    def keep(name: str, value: Any) -> Any:
        kept.pop(name, None)
        kept[name] = value
        return _copied(value, True)

    try:
        for name in names:
            hook = module.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
            handles.append(hook)
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Taps:
    """Records activations at several places in one forward, and gradients with respect to them."""

    module: nn.Module
    graph: fx.GraphModule | None
    """The traced network whose nodes the places are; None: places are sub-modules."""
    names: tuple[str, ...]
    """The places, shallow to deep."""

    def __call__(self, inputs_nchw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [N, K] and the activations [N, C_b, h_b, w_b] of every place, joined to autograd."""
        with torch.enable_grad():
            inputs = inputs_nchw.detach().requires_grad_(True)
            logits, kept = self._run(inputs)
        return logits, [kept[name] for name in self.names]

    def _run(self, inputs: Tensor) -> tuple[Tensor, dict[str, Any]]:
        if self.graph is None:
            with module_outputs(self.module, self.names) as kept:
                return self.module(inputs), kept
        recorder = GraphRecorder(self.graph, self.names)
        return recorder.run(inputs), recorder.kept


def gradients(logits: Tensor, direction: Tensor, activations: Sequence[Tensor]) -> list[Tensor]:
    """The vector-Jacobian product of `direction` [N, K] at every activation, each shaped like it.

    One backward pass serves all places; the graph is kept for the next target. A place that the output
    does not depend on gets zeros.
    """
    return list(
        torch.autograd.grad(logits, activations, direction.to(logits.dtype), retain_graph=True, materialize_grads=True)
    )
