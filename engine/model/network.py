"""The network as a list of tensors: traced once, so that blocks can be found and tapped by name."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.blocks import Place, discover_blocks
from blocksight.engine.model.device_errors import device_trouble
from blocksight.engine.model.layouts import Layout, layout_of
from blocksight.engine.model.resample import Grid
from blocksight.engine.model.taps import (
    GraphRunner,
    Recorder,
    Taps,
    gradients,
    hook_outputs,
    path_and_call,
    plain_modules,
)

Node = TypeVar("Node")


@dataclass(frozen=True)
class Network:
    """A module with the list of its tensors, and its graph if it could be traced."""

    module: nn.Module
    graph: fx.GraphModule | None
    """None: the module could not be traced, and the places are outputs of modules, numbered by call: `relu#2`."""
    places: tuple[Place, ...]
    """In order of execution."""

    def blocks(self, names: Sequence[str] = ()) -> tuple[Place, ...]:
        """The named places or, without names, the blocks that the rule finds, shallow to deep.

        A name is a place of the traced graph, or the dotted path of a sub-module and means its last
        tensor. Raises ModelError for an unknown name (with the nearest ones), for a place without a
        grid, and if the rule finds nothing.
        """
        if names:
            return tuple(sorted({self._named(name) for name in names}, key=self.places.index))
        found = tuple(discover_blocks(self.places))
        if not found and len(plain_modules(self.module)) < len(list(self.module.modules())):
            raise ModelError(
                "the model holds TorchScript, whose layers cannot be read: make it from its Python class and a state "
                "dict, or take an explainer without blocks, such as rise or occlusion"
            )
        if not found:
            raise ModelError(
                f"no block was found in {type(self.module).__name__}: none of its {len(self.places)} tensors is "
                "a feature map [N, C, h, w] that every path passes; name the blocks with --blocks"
            )
        return found

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
        if found[-1].grid is None:
            raise ModelError(f"block {name!r} is no feature map [N, C, h, w]; choose one before the pooling")
        return found[-1]

    def _inside(self, path: str) -> list[Place]:
        """The places that the sub-module at this dotted path computes."""
        if self.graph is None:
            return [place for place in self.places if path_and_call(place.name)[0] == path]
        inside = {node.name for node in self.graph.graph.nodes if path in _module_paths(node)}
        return [place for place in self.places if place.name in inside]


def trace_network(module: nn.Module, example: Tensor) -> Network:
    """Traces a frozen module on an example input [2, 3, H, W] and lists its tensors.

    If the trace fails or computes something else, the list holds the outputs of the modules in order of
    execution.
    """
    with torch.no_grad():
        graph = _trace(module, example)
        places = _module_places(module, example) if graph is None else _traced_places(graph, example)
    used_places = _used_places(Network(module, graph, tuple(places)), example)
    return Network(
        module, graph, tuple(place if place.name in used_places else replace(place, layout=None) for place in places)
    )


def _used_places(network: Network, example: Tensor) -> set[str]:
    """Names of the places that are no tokens, or whose tokens the output depends on.

    Behind its last attention a transformer still computes the picture's tokens, but reads the class token alone.
    The gradient is of NaN, which no weight cancels: torchvision's transformers begin with a head of zeros.
    """
    tokens = [place for place in network.places if place.layout is not None and place.layout.kind == "tokens"]
    others = {place.name for place in network.places} - {place.name for place in tokens}
    if not tokens:
        return others
    logits, maps = network.taps(tokens)(example)
    if not logits.requires_grad:  # a forward without gradients does not show what it depends on
        return others | {place.name for place in tokens}
    live = {place.name: own for place, own in zip(tokens, maps, strict=True) if own.requires_grad}  # no embeddings
    slopes = gradients(logits, torch.full_like(logits, float("nan")), list(live.values())) if live else []
    return others | {name for name, slope in zip(live, slopes, strict=True) if slope.any()}


def _trace(module: nn.Module, example: Tensor) -> fx.GraphModule | None:
    try:
        graph = fx.symbolic_trace(module)
        same = torch.allclose(graph(example), module(example), rtol=1e-4, atol=1e-5)
    except Exception as error:  # a user's forward may raise anything when traced; the modules are the fallback
        if device_trouble(error) is not None:
            raise
        return None
    return graph if same else None


def _traced_places(graph: fx.GraphModule, example: Tensor) -> list[Place]:
    recorder = Recorder()
    GraphRunner(graph, recorder).run(example)
    signal = [node for node in graph.graph.nodes if _carries_signal(recorder.recorded.get(node.name))]
    signal = [node for node in signal if node.op != "get_attr"]
    unavoidable = unavoidable_nodes({node: node.all_input_nodes for node in signal})
    inner = [node for node in signal if node.op not in ("placeholder", "output")]
    layouts = _layouts([recorder.recorded[node.name] for node in inner], example)
    return [
        Place(node.name, layout, node in unavoidable, _has_weights(node, graph))
        for node, layout in zip(inner, layouts, strict=True)
    ]


def _module_places(module: nn.Module, example: Tensor) -> list[Place]:
    recorder = Recorder()
    num_calls = Counter[str]()

    def record(path: str, value: Any) -> Any:
        num_calls[path] += 1
        return recorder(f"{path}#{num_calls[path]}", value)

    with hook_outputs(module, [path for path, _ in plain_modules(module) if path], record):
        module(example)
    tensors = {name: value for name, value in recorder.recorded.items() if isinstance(value, Tensor)}
    layouts = _layouts(list(tensors.values()), example)
    paths = [path_and_call(name)[0] for name in tensors]
    return [
        Place(
            name if num_calls[path] > 1 else path,
            layout,
            True,
            any(True for _ in module.get_submodule(path).parameters()),
        )
        for name, path, layout in zip(tensors, paths, layouts, strict=True)
    ]


def _layouts(values: Sequence[Any], example: Tensor) -> list[Layout | None]:
    """The layout of each value, in order of execution; None for a value that is not one of each image."""
    full = (example.shape[2], example.shape[3])
    layouts: list[Layout | None] = []
    last: Grid | None = None
    for value in values:
        is_of_images = isinstance(value, Tensor) and value.shape[:1] == example.shape[:1]
        layouts.append(layout_of(value.shape, full, last) if is_of_images else None)
        if layouts[-1] is not None:
            last = layouts[-1].grid
    return layouts


def _carries_signal(value: Any) -> bool:
    """True for float tensors, also in tuples (a split); False for the sizes that a `view` reads."""
    if isinstance(value, tuple | list):
        return any(_carries_signal(item) for item in value)
    return isinstance(value, Tensor) and value.is_floating_point()


def unavoidable_nodes(predecessors: Mapping[Node, Sequence[Node]]) -> set[Node]:
    """The nodes through which every path from the first to the last one passes.

    `predecessors` lists them for each node, in topological order; predecessors that are not keys do not
    count. The number of paths through a node is the paths to it times the paths from it; through an
    unavoidable node go all of them.
    """
    nodes = list(predecessors)
    paths_to = {nodes[0]: 1}
    for node in nodes[1:]:
        paths_to[node] = sum(paths_to.get(before, 0) for before in predecessors[node])
    paths_from = dict.fromkeys(nodes, 0) | {nodes[-1]: 1}
    for node in reversed(nodes):
        for before in predecessors[node]:
            if before in paths_from:
                paths_from[before] += paths_from[node]
    return {node for node in nodes if paths_to[node] * paths_from[node] == paths_to[nodes[-1]]}


def _has_weights(node: fx.Node, graph: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return any(True for _ in graph.get_submodule(str(node.target)).parameters())
    attributes = [before for before in node.all_input_nodes if before.op == "get_attr"]
    parameters = dict(graph.named_parameters())
    return any(str(attribute.target) in parameters for attribute in attributes)


def _module_paths(node: fx.Node) -> set[str]:
    """The dotted paths of the sub-modules whose forward computes this node."""
    return {str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()}
