"""Paths through a graph from its first node to its last: which nodes none of them avoids."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

Node = TypeVar("Node")


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


def unavoidable_places(output: Tensor, places: dict[str, Any]) -> set[str]:
    """Names of the places through which every path of autograd's graph from the input to the output passes.

    `places` holds the node of each place.
    """
    before = {node: [one for one, _ in node.next_functions if one is not None] for node in _in_order(output.grad_fn)}
    unavoidable = unavoidable_nodes(before)
    return {name for name, node in places.items() if node in unavoidable}


def _in_order(last: Any) -> Iterator[Any]:
    """The nodes of autograd's graph from the input to `last`; those that a node needs come before it."""
    seen, waiting = set(), [(last, False)]
    while waiting:
        node, is_ready = waiting.pop()
        if is_ready:
            yield node
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(one, False) for one, _ in node.next_functions if one is not None and one not in seen]
