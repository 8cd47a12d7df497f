"""What some inputs of a traced graph decide by themselves, computed once for many calls.

An evaluation runs one graph for thousands of draws of the same images, with the same weights. What
no draw enters is the same in all of those calls: x encoded, the components of a VampPrior, weights
rounded to bfloat16.
"""

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

_aten: Any = torch.ops.aten

_PRODUCTS = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
)
# What they return has nothing of their argument but its kind, which a compiler knows.
_FILLED = (
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
)


class Parts(NamedTuple):
    """A graph in two, which one after the other return what it did."""

    once: GraphModule
    """Of the fixed inputs: what they decide by themselves, as a tuple."""
    each: GraphModule
    """Of the fixed inputs, of that, and of the other inputs: what the graph returned."""


def in_two(graph: GraphModule, fixed: int) -> Parts:
    """Divide a graph of `tracing.trace` by what its first inputs decide by themselves.

    Some of it is left where it is, since a compiler does better with it: views, and what is larger
    than all that it is made of, as the logarithm of a scale is that was repeated for every draw.
    So is what is written in place, and all that is read of it: the order of operations counts.

    Args:
        graph: it is not changed.
        fixed: how many of its inputs, from the first, stay the same from call to call.
    """
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    given, others = inputs[:fixed], inputs[fixed:]
    decided = _decided(nodes, given)
    kept = _worth_keeping([node for node in nodes if node in decided])

    needed: set[Node] = set()
    handed: list[Node] = []
    for node in reversed(nodes):
        if node in needed and node in kept:
            handed.insert(0, node)
        elif node in needed or node.op == "output" or _writes(node):
            needed.update((node, *node.all_input_nodes))

    once, here = Graph(), dict[Node, Node]()
    for node in (*given, *(n for n in nodes if n in decided and n.op != "placeholder")):
        here[node] = once.node_copy(node, here.__getitem__)
    once.output(tuple(here[node] for node in handed))
    once.eliminate_dead_code()

    each, there = Graph(), dict[Node, Node]()
    for node in given:
        there[node] = each.node_copy(node)
    for i, node in enumerate(handed):
        there[node] = each.placeholder(f"decided_{i}")
        there[node].meta = dict(node.meta)
    for node in others:
        there[node] = each.node_copy(node)
    for node in nodes:
        if node in needed and node not in there:
            there[node] = each.node_copy(node, there.__getitem__)
    return Parts(GraphModule(graph, once), GraphModule(graph, each))


def _decided(nodes: list[Node], given: list[Node]) -> set[Node]:
    """What the given inputs decide by themselves, whenever it is computed; constants too."""
    owner, written = _memory(nodes)
    decided: set[Node] = set()
    for node in nodes:
        is_known = node in given or node.op == "get_attr" or _computes(node)
        steady = owner[node] not in written
        if is_known and steady and decided.issuperset(node.all_input_nodes):
            decided.add(node)
    return decided


def _memory(nodes: list[Node]) -> tuple[dict[Node, Node], set[Node]]:
    """Whose memory each tensor lies in, and which of those owners is written into."""
    owner: dict[Node, Node] = {}
    written: set[Node] = set()
    for node in nodes:
        owner[node] = node
        if node.target is operator.getitem:  # one of several results
            owner[node] = owner[node.all_input_nodes[0]]
        for argument, value in _arguments(node):
            if argument.alias_info is None:
                continue
            tensors = value if isinstance(value, list | tuple) else [value]
            for tensor in [each for each in tensors if isinstance(each, Node)]:
                owner[node] = owner[tensor]
                if argument.alias_info.is_write:
                    written.add(owner[tensor])
    return owner, written


def _writes(node: Node) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a, _ in _arguments(node))


def _worth_keeping(decided: list[Node]) -> set[Node]:
    """Of what is decided, tensors that were made of others and are no larger than those."""
    kept: set[Node] = set()
    extent: dict[Node, int] = {}  # of the largest input or product that a node is made of
    for node in decided:
        sources = [extent[each] for each in node.all_input_nodes]
        is_source = node.op == "placeholder" or node.target in _PRODUCTS
        extent[node] = _size(node) if is_source else max(sources, default=0)
        is_made = node.op == "call_function" and node.target not in _FILLED and not _is_view(node)
        if is_made and isinstance(node.meta["val"], Tensor) and _size(node) <= extent[node]:
            kept.add(node)
    return kept


def _computes(node: Node) -> bool:
    """Whether it is an operation that always gives the same of the same."""
    is_operation = node.target is operator.getitem or isinstance(node.target, OpOverload)
    return is_operation and torch.Tag.nondeterministic_seeded not in getattr(
        node.target, "tags", ()
    )


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    return any(argument.alias_info is not None for argument, _ in _arguments(node))


def _arguments(node: Node) -> list[tuple[Any, Any]]:
    """What an operation says of each of its arguments, and what it is given for it."""
    if not isinstance(node.target, OpOverload):
        return []
    said = node.target._schema.arguments
    return [
        (a, node.args[i] if i < len(node.args) else node.kwargs.get(a.name))
        for i, a in enumerate(said)
    ]


def _size(node: Node) -> int:
    return math.prod(node.meta["val"].shape)
