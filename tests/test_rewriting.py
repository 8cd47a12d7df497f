"""Graphs in other words: which layers oneDNN gets, and that nothing but rounding changes."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import compiling, rewriting, tracing
from pyrovae.importance import float32_products

ROWS = 600
LINEAR = torch.ops.pyrovae.linear.default

needs_onednn = pytest.mark.skipif(not rewriting._has_onednn(), reason="a torch without oneDNN")
needs_compiler = pytest.mark.skipif(not compiling.has_compiler(), reason="no C++ compiler")


def dense(x, weight, bias):
    return nn.functional.linear(x, weight, bias)


def with_tanh(x, weight, bias):
    return torch.tanh(nn.functional.linear(x, weight, bias))


def tanh_and_sum(x, weight, bias):
    """The layer's own values are wanted too, so tanh must not swallow them."""
    h = nn.functional.linear(x, weight, bias)
    return torch.tanh(h) + h


def scaled(x, weight, bias):
    return torch.addmm(bias, x, weight.t(), alpha=2.0)


def columns(x, weight, bias):
    return nn.functional.linear(x.t().contiguous().t(), weight, bias)


def row_of_biases(x, weight, bias):
    return torch.addmm(bias.expand(len(x), -1), x, weight.t())


def by_columns(x, weight, bias):
    """x (B, in) times a matrix that lies as (in, out)."""
    return torch.addmm(bias, x, weight.t().contiguous())


def example(dtype=torch.float32, rows=ROWS):
    g = torch.Generator().manual_seed(0)
    shapes = ((rows, 30), (17, 30), (17,))
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def traced(function, given):
    with torch.no_grad():
        return make_fx(function, tracing_mode="fake")(*given)


def rewritten(function, given):
    graph = rewriting.for_cpu(traced(function, given))
    calls = [node for node in graph.graph.nodes if node.target is LINEAR]
    return graph, [node.args[-1] for node in calls]


@needs_onednn
@pytest.mark.parametrize(
    ("function", "calls"), [(dense, ["none"]), (with_tanh, ["tanh"]), (tanh_and_sum, ["none"])]
)
@float32_products()
def test_layers_of_many_rows_go_to_onednn(function, calls):
    given = example()
    graph, found = rewritten(function, given)
    assert found == calls
    truth = function(*(t.double() for t in given))
    torch.testing.assert_close(graph(*given).double(), truth, rtol=1e-5, atol=1e-5)
    wrong = function(given[0], given[1], -given[2]).double()
    assert (wrong - truth).abs().max() > 0.1


@pytest.mark.parametrize("function", [scaled, columns, row_of_biases, by_columns])
def test_other_products_are_left_alone(function):
    assert rewritten(function, example())[1] == []


@pytest.mark.parametrize(
    "given", [example(rows=20), example(torch.float64), example(torch.bfloat16)]
)
def test_few_rows_and_other_precisions_are_left_alone(given):
    assert rewritten(dense, given)[1] == []


def test_a_single_bias_for_all_is_left_alone():
    x, weight, _ = example()
    assert rewritten(dense, [x, weight, torch.ones(1)])[1] == []


@pytest.mark.parametrize(("name", "value"), [("is_available", lambda: False), ("enabled", False)])
def test_without_onednn_nothing_changes(monkeypatch, name, value):
    monkeypatch.setattr(torch.backends.mkldnn, name, value)
    assert rewritten(with_tanh, example())[1] == []


@needs_onednn
def test_tanh_is_as_exact_as_torchs():
    x = torch.linspace(-12, 12, 24 * 512).reshape(-1, 1)
    one, none = torch.ones(1, 1), torch.zeros(1)
    ours = torch.ops.pyrovae.linear(x, one, none, "tanh").double()
    assert (ours - x.double().tanh()).abs().max() < 3e-7
    small = x.abs().squeeze() < 0.5
    relative = (ours / x.double().tanh() - 1)[small & (x.squeeze() != 0)]
    assert relative.abs().max() < 1e-6


@pytest.mark.slow
@needs_onednn
@needs_compiler
@float32_products()
def test_compiled_with_them(monkeypatch):
    """Inductor takes the operator as it is, weights that change between calls included."""
    given, made = example(), []
    put = rewriting.for_cpu
    monkeypatch.setattr(rewriting, "for_cpu", lambda graph: made.append(put(graph)) or made[-1])
    graph = traced(with_tanh, given)
    before = graph.code
    run = compiling.compiled(graph, given)
    assert graph.code == before
    assert [LINEAR in {node.target for node in one.graph.nodes} for one in made] == [True]
    for _ in range(2):
        truth = with_tanh(*(t.double() for t in given))
        torch.testing.assert_close(run(*given).double(), truth, rtol=1e-5, atol=1e-5)
        given[1].mul_(0.5)


@pytest.mark.slow
@needs_compiler
def test_a_tensor_that_the_program_holds_is_read_anew():
    held = torch.ones(20)
    graph = tracing.trace(lambda x: x * held, torch.ones(20))
    run = compiling.compiled(graph, [torch.ones(20)])
    for value in (1.0, 5.0):
        held.fill_(value)
        assert torch.equal(run(torch.ones(20)), torch.full((20,), value))
