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


class Parts(NamedTuple):
    """A graph in two, which one after the other return what it did."""

    once: GraphModule
    """Of the fixed inputs: what they decide by themselves, as a tuple."""
    each: GraphModule
    """Of the fixed inputs, of that, and of the other inputs: what the graph returned."""


def in_two(graph: GraphModule, fixed: int) -> Parts:
    """Divide a graph of `tracing.trace` by what its first inputs decide by themselves.

    Taken out are matrix products and convolutions, what comes of them, and numbers rounded to fewer
    bits. The rest is left where it is, since a compiler does better with it: views, functions of
    an input's elements, and what is larger than the largest input or product that it is made of, as
    the logarithm of a scale is that was repeated for every draw.

    Where a graph writes into any tensor, or calls what is no plain operator, all of it is left:
    then the order of the operations counts, and tensors may share memory without saying so.

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
        elif node in needed or _has_an_effect(node):
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
    """What the given inputs decide by themselves; constants are in it."""
    decided = set(given)
    if not all(_only_computes(node) for node in nodes):
        return decided
    for node in nodes:
        is_known = node.op in ("call_function", "get_attr") and not _draws(node)
        if is_known and decided.issuperset(node.all_input_nodes):
            decided.add(node)
    return decided


def _worth_keeping(decided: list[Node]) -> set[Node]:
    """Of what is decided, what is to be computed before."""
    kept: set[Node] = set()
    below: set[Node] = set()  # products, and what comes of them
    extent: dict[Node, int] = {}  # of the largest input or product that a node is made of
    for node in decided:
        sources = node.all_input_nodes
        is_product = node.target in _PRODUCTS
        if is_product or not below.isdisjoint(sources):
            below.add(node)
        if is_product or node.op == "placeholder":
            extent[node] = _size(node)
        else:
            extent[node] = max((extent[each] for each in sources), default=0)
        is_made = isinstance(node.meta.get("val"), Tensor) and not _is_view(node)
        if is_made and (node in below or _is_rounded(node)) and _size(node) <= extent[node]:
            kept.add(node)
    return kept


def _only_computes(node: Node) -> bool:
    """Whether it writes into no tensor, for all that it says."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    return isinstance(node.target, OpOverload) and not node.target._schema.is_mutable


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _has_an_effect(node: Node) -> bool:
    """Whether it does more than to make a tensor: writes, returns, or raises an error."""
    if node.op == "output" or not _only_computes(node):
        return True
    return isinstance(node.target, OpOverload) and not node.target._schema.returns


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:  # one of several results
        return _is_view(node.all_input_nodes[0])
    said = node.target._schema.arguments if isinstance(node.target, OpOverload) else ()
    return any(argument.alias_info is not None for argument in said)


def _is_rounded(node: Node) -> bool:
    if node.target is not _aten._to_copy.default:
        return False
    (source,) = node.all_input_nodes
    return bool(node.meta["val"].dtype.itemsize < source.meta["val"].dtype.itemsize)


def _size(node: Node) -> int:
    return math.prod(node.meta["val"].shape)
