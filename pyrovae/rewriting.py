"""A traced graph in other words: the same numbers, but for rounding, by faster operations.

Inductor gives dense layers to oneDNN only where the weights are constants. Ours change from step to
step, so a layer is an operator of our own, which Inductor leaves alone. Whoever compiles a graph
holds the result against what was traced.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_aten: Any = torch.ops.aten

# Fewer rows are multiplied sooner by the library that torch takes for matrices (on AMD's Zen 4).
_ROWS = 512

_library = torch.library.Library("pyrovae", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor bias, str activation) -> Tensor")


def _linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return x.new_empty(len(x), len(weight))


_library.impl("linear", _linear, "CPU")
_library.impl("linear", _shape_of_linear, "Meta")


def for_cpu(graph: GraphModule) -> GraphModule:
    """The graph, changed in place, with its dense layers as a CPU computes them sooner.

    Those of many rows go to oneDNN, which adds the bias and takes tanh while the product is at
    hand; else a library copies the bias to where the product is to go, and tanh passes it again.
    """
    for node in list(graph.graph.nodes):
        if node.target is _aten.addmm.default and _is_dense(node):
            _put_linear(graph, node)
    graph.recompile()
    return graph


def _is_dense(node: Node) -> bool:
    """Whether it is x W^T + b in float32, of many rows, each tensor laid out row by row."""
    if node.kwargs or len(node.args) != 3 or not _has_onednn():
        return False
    bias, x, transposed = node.args
    if not (isinstance(transposed, Node) and transposed.target is _aten.t.default):
        return False
    given = [_value(each) for each in (bias, x, transposed.args[0])]
    if not all(v is not None and _is_plain(v) for v in given):
        return False
    return given[0].shape == given[2].shape[:1] and len(given[1]) >= _ROWS


def _is_plain(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.dtype == torch.float32 and value.is_contiguous()


def _has_onednn() -> bool:
    onednn = torch.backends.mkldnn
    wanted = onednn.is_available() and bool(onednn.enabled)
    return wanted and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, Node) else None


def _put_linear(graph: GraphModule, node: Node) -> None:
    bias, x, transposed = node.args
    assert isinstance(transposed, Node)
    users = list(node.users)
    tanh = len(users) == 1 and users[0].target is _aten.tanh.default
    last = users[0] if tanh else node
    with graph.graph.inserting_before(node):
        linear = graph.graph.call_function(
            torch.ops.pyrovae.linear.default,
            (x, transposed.args[0], bias, "tanh" if tanh else "none"),
        )
    linear.meta = dict(last.meta)
    last.replace_all_uses_with(linear)
    graph.graph.erase_node(last)
    if tanh:
        graph.graph.erase_node(node)
