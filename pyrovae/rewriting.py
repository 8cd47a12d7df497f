"""A traced graph in other words: the same numbers, but for rounding, by faster operations.

On a CPU, in float32, three things are said anew:

- Dense layers of many rows go to oneDNN, which adds the bias and takes tanh while the product is at
  hand. Inductor does that only where the weights are constants; ours change from step to step, so
  such a layer is an operator of our own, which Inductor leaves alone.
- Products of few rows are divided between two threads here, by the side that belongs to the
  weights, so that each thread reads its half of them alone. The library that torch takes for
  matrices has both read all of them.
- Softplus, the logarithm of a sigmoid and the cross-entropy of logits are spelt out: their
  logarithm becomes additions and products within the kernels around them.

Whoever compiles a graph holds the result against what was traced.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from pyrovae import counters, elementary

_aten: Any = torch.ops.aten

# Measured on AMD's Zen 4 with two threads: more rows are multiplied sooner by oneDNN, and fewer
# as halves; in between, and where a product is very small, by the library that torch takes. The
# number of threads is that of the moment of compiling; another one later costs time and no more.
_MANY = 512
_FEW = range(16, 129)
_SMALLEST = 2**17  # multiply-adds
_THREADS = 2

_library = torch.library.Library("pyrovae", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor bias, str activation) -> Tensor")


def _linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return x.new_empty(len(x), len(weight))


_library.impl("linear", _linear, "CPU")
_library.impl("linear", _shape_of_linear, "Meta")


def for_compiler(graph: GraphModule) -> GraphModule:
    """The graph, changed in place, without operators that a compiler could not look into."""
    return _rewritten(graph, {torch.ops.pyrovae_counters.threefry.default: _threefry})


def for_cpu(graph: GraphModule) -> GraphModule:
    """The graph, changed in place, as a CPU computes it sooner."""
    return _rewritten(graph, _RULES)


Rules = dict[Any, Callable[[Node], None]]


def _rewritten(graph: GraphModule, rules: Rules) -> GraphModule:
    for node in list(graph.graph.nodes):
        if node.target in rules:
            rules[node.target](node)
    graph.recompile()
    return graph


def _threefry(node: Node) -> None:
    """Each use of it takes one of its two words."""
    word = node.meta["val"][0]
    size, stride = tuple(word.shape), word.stride()
    # A view by strides has a place in memory; where all is one loop, it is left out again.
    settled = partial(torch.as_strided, size=size, stride=stride)
    words = _operations(node, partial(counters.spelt_out, settled=settled), *node.args)
    for user in list(node.users):
        _replace(user, words[user.args[1]].node)
    node.graph.erase_node(node)


# Products.


def _dense(node: Node) -> None:
    """A layer x W^T + b: by oneDNN, or in halves."""
    if node.kwargs or len(node.args) != 3:
        return
    if _is_long(node):
        _put_linear(node)
    elif _in_halves(node.args[1], node.args[2]):
        _put(node, lambda bias, a, b: _halves(a, b) + bias, *node.args)


def _product(node: Node) -> None:
    if _in_halves(*node.args):
        _put(node, _halves, *node.args)


def _is_long(node: Node) -> bool:
    """Whether it is x W^T + b in float32, of many rows, each tensor laid out row by row."""
    bias, x, transposed = node.args
    if not (isinstance(transposed, Node) and transposed.target is _aten.t.default):
        return False
    given = [_value(each) for each in (bias, x, transposed.args[0])]
    if not all(_is_float(v) and v.is_contiguous() for v in given):
        return False
    fits = given[0].shape == given[2].shape[:1] and len(given[1]) >= _MANY
    return fits and _has_onednn()


def _has_onednn() -> bool:
    onednn = torch.backends.mkldnn
    wanted = onednn.is_available() and bool(onednn.enabled)
    return wanted and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _put_linear(node: Node) -> None:
    bias, x, transposed = node.args
    assert isinstance(transposed, Node)
    users = list(node.users)
    tanh = len(users) == 1 and users[0].target is _aten.tanh.default
    last = users[0] if tanh else node
    with node.graph.inserting_before(node):
        linear = node.graph.call_function(
            torch.ops.pyrovae.linear.default,
            (x, transposed.args[0], bias, "tanh" if tanh else "none"),
        )
    _replace(last, linear)
    if tanh:
        node.graph.erase_node(node)


def _in_halves(left: Any, right: Any) -> bool:
    """Whether a product is of a size and layout that two threads compute sooner in halves."""
    a, b = _value(left), _value(right)
    if not (_is_float(a) and _is_float(b)) or not _divides_threads():
        return False
    if not all(t.is_contiguous() or t.t().is_contiguous() for t in (a, b)):
        return False
    (m, k), n = a.shape, b.shape[1]
    # Of a layer's products, only the gradient of its weights has its left side transposed.
    few, halved = (m, n) if a.is_contiguous() else (k, m)
    return few in _FEW and halved % 2 == 0 and m * k * n >= _SMALLEST


def _divides_threads() -> bool:
    return torch.get_num_threads() == _THREADS and torch.backends.mkl.is_available()


def _halves(a: Any, b: Any) -> Any:
    """a b (m, n), itself row by row: its columns halved where a lies row by row, else its rows."""
    if _value(a.node).is_contiguous():
        # What follows may view the product in another shape, so its layout must not change.
        return _by_rows(b.t(), a.t()).t().contiguous()
    return _by_rows(a, b)


def _by_rows(a: Any, b: Any) -> Any:
    """a b, the upper half of its rows and the lower one."""
    return torch.bmm(a.unflatten(0, (2, -1)), b.unsqueeze(0).expand(2, -1, -1)).flatten(0, 1)


# Elementary functions.


def _log_sigmoid(node: Node) -> None:
    """Its second output is for the backward pass, which Inductor computes from x."""
    if not _is_float(_value(node.args[0])):
        return
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            # Where the function was: a program may write into x before it takes the output up.
            new = _written(node, elementary.log_sigmoid, *node.args)
            _replace(user, new)


def _softplus(node: Node) -> None:
    """Torch returns x above 20, to which this rounds there too."""
    if len(node.args) == 1 and not node.kwargs and _is_float(_value(node)):
        _put(node, elementary.softplus, *node.args)


def _cross_entropy(node: Node) -> None:
    """-y log sigmoid(l) - (1 - y) log sigmoid(-l), as torch has it: (1 - y) l - log sigmoid(l)."""
    logits, target, *rest = node.args
    if node.kwargs or rest != [None, None, 0]:  # weights, and another reduction than none
        return
    if not (_is_float(_value(logits)) and _is_float(_value(target))):
        return
    _put(node, lambda x, y: (1 - y) * x - elementary.log_sigmoid(x), logits, target)


_RULES: Rules = {
    _aten.addmm.default: _dense,
    _aten.mm.default: _product,
    _aten.log_sigmoid_forward.default: _log_sigmoid,
    _aten.softplus.default: _softplus,
    _aten.binary_cross_entropy_with_logits.default: _cross_entropy,
}


def _put(node: Node, function: Callable[..., Any], *given: Any) -> None:
    """Put a function of what is given in the place of a node."""
    _replace(node, _written(node, function, *given))


def _replace(node: Node, new: Node) -> None:
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _written(before: Node, function: Callable[..., Any], *given: Any) -> Node:
    """The operations of a function written down before a node; the last of them."""
    node: Node = _operations(before, function, *given).node
    return node


def _operations(before: Node, function: Callable[..., Any], *given: Any) -> Any:
    """The operations of a function written down before a node; what it returns of them."""
    tracer = GraphAppendingTracer(before.graph)
    with before.graph.inserting_before(before):
        return function(*(Proxy(g, tracer) if isinstance(g, Node) else g for g in given))


def _is_float(value: Any) -> bool:
    """Whether it is a tensor of float32 on a CPU, its sizes known."""
    if not isinstance(value, Tensor) or not all(type(size) is int for size in value.shape):
        return False
    return value.device.type == "cpu" and value.dtype == torch.float32


def _value(given: Any) -> Any:
    return given.meta.get("val") if isinstance(given, Node) else None
