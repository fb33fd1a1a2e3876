"""The network as a list of tensors: traced once, so that blocks can be found and tapped by name."""

from collections import Counter
from collections.abc import Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.blocks import Place, discover_blocks
from blocksight.engine.model.device_errors import device_trouble
from blocksight.engine.model.layouts import Layout
from blocksight.engine.model.paths import unavoidable_nodes, unavoidable_places
from blocksight.engine.model.proofs import (
    ELSEWHERE,
    LEAKS,
    NO_PLACES,
    NO_READING,
    POOLED,
    UNUSED,
    Reading,
    leaks,
    probe_pictures,
    proved_reading,
)
from blocksight.engine.model.resample import Grid
from blocksight.engine.model.taps import (
    GraphRunner,
    Hook,
    Taps,
    frozen,
    gradients,
    hook_outputs,
    path_and_call,
    plain_modules,
)

MAX_SHOWN = 3
"""Places of each kind that a refusal names."""


@dataclass(frozen=True)
class Proof:
    """What was proved of a network. It holds no weights, and may outlive them."""

    places: tuple[Place, ...]
    is_traced: bool
    leaking: dict[str, bool]
    layouts: list[Layout]


@dataclass(frozen=True)
class Network:
    """A module with the list of its tensors, and its graph if it could be traced."""

    module: nn.Module
    graph: fx.GraphModule | None
    """None: the module could not be traced, and the places are outputs of modules, numbered by call: `relu#2`."""
    places: tuple[Place, ...]
    """In order of execution."""
    example: Tensor
    """Inputs [2, C, H, W], on which proofs are made."""
    _leaking: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)
    """The places that were tried."""
    _layouts: list[Layout] = field(default_factory=list, compare=False, repr=False)
    """Of all tensors, once they were asked for."""

    def blocks(self, names: Sequence[str] = ()) -> tuple[Place, ...]:
        """The named places or, without names, the blocks that the rule finds, shallow to deep.

        A name is a place of the traced graph, or the dotted path of a sub-module and means its last
        tensor. Raises ModelError for an unknown name (with the nearest ones), for a place without a
        grid or with a way around it, and if the rule finds nothing.
        """
        if names:
            return tuple(sorted({self._named(name) for name in names}, key=self.places.index))
        if not self._found and len(plain_modules(self.module)) < len(list(self.module.modules())):
            raise ModelError(
                "the model holds TorchScript, whose layers cannot be read: make it from its Python class and a state "
                "dict, or take an explainer without blocks, such as rise or occlusion"
            )
        if not self._found:
            raise ModelError(
                f"no block was found in {type(self.module).__name__}: none of its {len(self.places)} tensors is "
                f"a feature map that every path passes{self._tried()}; name the blocks with --blocks, or take an "
                "explainer without blocks, such as rise or occlusion"
            )
        return self._found

    @cached_property
    def _found(self) -> tuple[Place, ...]:
        """The blocks that the rule finds, without those that leak."""
        places = list(self.places)
        while leaking := [place for place in discover_blocks(places) if self._leaks(place)]:
            for place in leaking:
                places[places.index(place)] = replace(place, is_unavoidable=False)
        return tuple(discover_blocks(places))

    def beyond(self, last: Place) -> str:
        """The deepest tensor behind a block that every path passes and that could not be read, and why; empty: none."""
        behind = self.places[self.places.index(last) + 1 :]
        unread = [place for place in behind if place.is_unavoidable and place.fault in (ELSEWHERE, NO_READING)]
        return f"{unread[-1].name}: {unread[-1].fault}" if unread else ""

    def _tried(self) -> str:
        """The last places that were tried and why each is none, as a clause."""
        around = [place.name for place in self.places if place.fault == LEAKS or (place.grid and min(place.grid) > 1)]
        unread = [place for place in self.places if place.is_unavoidable and not place.grid]
        unread = [(place.name, place.fault) for place in unread if place.fault not in (NO_PLACES, POOLED)]
        shown = [f"{name}: {LEAKS}" for name in around[-MAX_SHOWN:]]
        shown += [f"{name}: {fault}" for name, fault in unread[-MAX_SHOWN:]]
        return f" ({'; '.join(shown)})" if shown else ""

    def layouts(self) -> list[Layout]:
        """The layouts of the places, and then those of all tensors, also of those that a path avoids."""
        if not self._layouts:
            reader = _Reader(self.example.to(next(self.module.parameters(), self.example)), None)
            with frozen(self.module), torch.no_grad():
                _run_all(self.module, self.graph, reader)
            self._layouts.extend(own.layout for own in reader.read.values() if own.layout is not None)
        return [place.layout for place in self.places if place.layout is not None] + self._layouts

    def _leaks(self, place: Place) -> bool:
        """True if the output depends on the picture also beside the place. A traced graph shows it by itself."""
        if self.graph is not None:
            return not place.is_unavoidable
        if place.name not in self._leaking:
            with frozen(self.module):
                example = self.example.to(next(self.module.parameters(), self.example))  # device and precision
                self._leaking[place.name] = leaks(self.taps([place]).run, example)
        return self._leaking[place.name]

    def around(self, module: nn.Module) -> "Network":
        """The same network with the weights of another module of its kind, which is frozen.

        Places are of the architecture. Random weights may prove less of them: a deep network's signal dies out.
        """
        return with_proof(self.proof, module, self.example.to(next(module.parameters(), self.example).device))

    @property
    def proof(self) -> Proof:
        """What was proved so far; what is tried later is added to it."""
        return Proof(self.places, self.graph is not None, self._leaking, self._layouts)

    def last_block(self, names: Sequence[str] = ()) -> tuple[Place, Taps]:
        """The deepest of the blocks, and the taps that record it alone. Raises as `blocks`."""
        block = self.blocks(names)[-1]
        return block, self.taps([block])

    def taps(self, blocks: Sequence[Place]) -> Taps:
        """Taps at the given places."""
        return Taps(self.module, self.graph, tuple(blocks))

    def _named(self, name: str) -> Place:
        found = [place for place in self.places if place.name == name] or self._inside(name)
        if not found:
            known = [*(place.name for place in self.places), *(path for path, _ in self.module.named_modules() if path)]
            near = get_close_matches(name, known, n=3, cutoff=0.3)
            shown = (
                f"nearest: {', '.join(near)}" if near else f"there are {', '.join(place.name for place in self.places)}"
            )
            raise ModelError(f"no block {name!r} in {type(self.module).__name__}; {shown}")
        if found[-1].grid is None and found[-1].fault != LEAKS:
            raise ModelError(f"block {name!r} is no feature map: {found[-1].fault}; choose one before the pooling")
        if found[-1].fault == LEAKS or self._leaks(found[-1]):
            raise ModelError(
                f"{name!r} is no block: {LEAKS}, so that there is a way around it; choose the sum behind it, or none: "
                f"the rule finds {', '.join(place.name for place in self._found) or 'none'}"
            )
        return found[-1]

    def _inside(self, path: str) -> list[Place]:
        """The places that the sub-module at this dotted path computes."""
        if self.graph is None:
            return [place for place in self.places if path_and_call(place.name)[0] == path]
        inside = {node.name for node in self.graph.graph.nodes if path in _module_paths(node)}
        return [place for place in self.places if place.name in inside]


def trace_network(module: nn.Module, example: Tensor) -> Network:
    """Traces a frozen module on an example input [2, C, H, W] and lists its tensors, each with its proved layout.

    If the trace fails or computes something else, the list holds the outputs of the modules in order of
    execution.
    """
    with torch.no_grad():
        trace = _trace(module, example)
        places = _module_places(module, example) if trace is None else _traced_places(module, trace, example)
    graph = None if trace is None else trace.graph
    return _without_unused(Network(module, graph, tuple(places), example), example)


def with_proof(proof: Proof, module: nn.Module, example: Tensor) -> Network:
    """The network of a frozen module whose places are known. One that cannot be traced any more is proved anew."""
    with torch.no_grad():
        trace = _trace(module, example) if proof.is_traced else None
    if proof.is_traced and trace is None:
        return trace_network(module, example)
    graph = None if trace is None else trace.graph
    return Network(module, graph, proof.places, example, proof.leaking, proof.layouts)


def _without_unused(network: Network, example: Tensor) -> Network:
    """The network without the layouts of tokens that the output does not depend on.

    Behind its last attention a transformer still computes the picture's tokens, but reads the class token alone.
    The gradient is of NaN, which no weight cancels: torchvision's transformers begin with a head of zeros.
    """
    tokens = [place for place in network.places if place.layout is not None and place.layout.kind == "tokens"]
    if not tokens:
        return network
    logits, maps = network.taps(tokens)(example)
    if not logits.requires_grad:  # a forward without gradients does not show what it depends on
        return network
    live = {place.name: own for place, own in zip(tokens, maps, strict=True) if own.requires_grad}
    slopes = gradients(logits, torch.full_like(logits, float("nan")), list(live.values())) if live else []
    used = {name for name, slope in zip(live, slopes, strict=True) if slope.any()}
    unused = {place.name for place in tokens} - used
    return replace(
        network,
        places=tuple(
            replace(place, layout=None, fault=UNUSED) if place.name in unused else place for place in network.places
        ),
    )


@dataclass(frozen=True)
class _Trace:
    """A traced network."""

    graph: fx.GraphModule
    signal: list[fx.Node]
    """The nodes that hold tensors, in order of execution."""


def _trace(module: nn.Module, example: Tensor) -> _Trace | None:
    """The network's graph; None: it cannot be traced, or the trace computes something else."""
    signal: set[str] = set()

    def note(name: str, value: Any) -> Any:
        if _carries_signal(value):
            signal.add(name)
        return value

    try:
        graph = fx.symbolic_trace(module)
        same = torch.allclose(GraphRunner(graph, note).run(example), module(example), rtol=1e-4, atol=1e-5)
    except Exception as error:  # a user's forward may raise anything when traced; the modules are the fallback
        if device_trouble(error) is not None:
            raise
        return None
    nodes = [node for node in graph.graph.nodes if node.name in signal and node.op != "get_attr"]
    return _Trace(graph, nodes) if same else None


class _Reader:
    """Reads the layouts of unavoidable places while the network runs on the probe pictures; None: of all places."""

    def __init__(self, example: Tensor, unavoidable: Set[str] | None) -> None:
        self.pictures = probe_pictures(example)
        self.full = (example.shape[2], example.shape[3])
        self.unavoidable = unavoidable
        self.grids: list[Grid] = []
        self.read: dict[str, Reading] = {}
        self.lost = ""
        """Why the last tensor that showed where the picture lies has no reading; empty: it has one."""

    def __call__(self, name: str, value: Any) -> Any:
        if _carries_signal(value):
            self.read[name] = self._reading(name, value)
        return value

    def _reading(self, name: str, value: Any) -> Reading:
        if self.unavoidable is not None and name not in self.unavoidable:
            return Reading(None, LEAKS if isinstance(value, Tensor) and value.dim() > 2 else NO_PLACES)
        found = proved_reading(value, self.full, self.grids)
        if self.unavoidable is not None:
            found = self._unless_lost(found)
        if found.layout is not None and found.layout.grid not in self.grids:
            self.grids.append(found.layout.grid)
        return found

    def _unless_lost(self, found: Reading) -> Reading:
        """The reading. Where no patch shows clearly, the picture lies as in the tensor before, or no more."""
        if found.is_seen or found.fault in (ELSEWHERE, POOLED):
            self.lost = found.fault
        elif self.lost and found.layout is not None:
            return Reading(None, self.lost)
        return found


def _run_all(module: nn.Module, graph: fx.GraphModule | None, reader: _Reader) -> None:
    """Runs the network on the probe pictures, with the reader at all its tensors."""
    if graph is not None:
        GraphRunner(graph, reader).run(reader.pictures)
        return
    with _hook_calls(module, reader):
        module(reader.pictures)


def _traced_places(module: nn.Module, trace: _Trace, example: Tensor) -> list[Place]:
    unavoidable = {node.name for node in unavoidable_nodes({node: node.all_input_nodes for node in trace.signal})}
    reader = _Reader(example, unavoidable)
    _run_all(module, trace.graph, reader)
    weights = {name for name, _ in trace.graph.named_parameters()}
    return [
        _place(node.name, reader.read[node.name], node.name in unavoidable, _has_weights(node, trace.graph, weights))
        for node in trace.signal
        if node.op not in ("placeholder", "output")
    ]


def _module_places(module: nn.Module, example: Tensor) -> list[Place]:
    unavoidable = _unavoidable_calls(module, example)
    reader = _Reader(example, unavoidable)
    _run_all(module, None, reader)
    num_calls = Counter(path_and_call(name)[0] for name in reader.read)
    places = []
    for name, reading in reader.read.items():
        path = path_and_call(name)[0]
        has_weights = any(True for _ in module.get_submodule(path).parameters())
        is_unavoidable = unavoidable is None or name in unavoidable
        places.append(_place(name if num_calls[path] > 1 else path, reading, is_unavoidable, has_weights))
    return places


def _place(name: str, reading: Reading, is_unavoidable: bool, has_weights: bool) -> Place:
    return Place(name, reading.layout, is_unavoidable, has_weights, reading.fault, reading.is_assumed)


def _unavoidable_calls(module: nn.Module, example: Tensor) -> set[str] | None:
    """The calls of sub-modules that every path from the input passes; None: the output has no gradient."""
    nodes: dict[str, Any] = {}

    def mark(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        marked = value.clone()
        nodes[name] = marked.grad_fn
        return marked

    with torch.enable_grad(), _hook_calls(module, mark):
        output = module(example.detach().requires_grad_(True))
    if not isinstance(output, Tensor) or not output.requires_grad:
        return None
    return unavoidable_places(output, nodes)


def _hook_calls(module: nn.Module, hook: Hook) -> AbstractContextManager[None]:
    """Calls the hook on each call of the sub-modules, under the name `path#number`."""
    paths, num_calls = [path for path, _ in plain_modules(module) if path], Counter[str]()

    def numbered(path: str, value: Any) -> Any:
        num_calls[path] += 1
        return hook(f"{path}#{num_calls[path]}", value)

    return hook_outputs(module, paths, numbered)


def _carries_signal(value: Any) -> bool:
    """True for tensors, also in tuples (a split); False for the sizes that a `view` reads."""
    if isinstance(value, tuple | list):
        return any(_carries_signal(item) for item in value)
    return isinstance(value, Tensor)


def _has_weights(node: fx.Node, graph: fx.GraphModule, weights: Set[str]) -> bool:
    if node.op == "call_module":
        return any(True for _ in graph.get_submodule(str(node.target)).parameters())
    return any(before.op == "get_attr" and str(before.target) in weights for before in node.all_input_nodes)


def _module_paths(node: fx.Node) -> set[str]:
    """The dotted paths of the sub-modules whose forward computes this node."""
    return {str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()}
