"""Graphs in other words: what is said anew, and that nothing but rounding changes."""

import math

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import compiling, rewriting, tracing
from pyrovae.importance import float32_products

aten = torch.ops.aten
ROWS = 600
LINEAR = torch.ops.pyrovae.linear.default

needs_onednn = pytest.mark.skipif(not rewriting._has_onednn(), reason="a torch without oneDNN")
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="a torch without MKL")
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


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def to_inputs(x, weight, bias):
    """The gradient of a layer's inputs, (B, out) times W, viewed as a batch of images."""
    return (x @ weight.t() @ weight / 300).tanh().view(len(x), 5, -1)


def to_weights(x, weight, bias):
    return (x @ weight.t()).t() @ x


def merged(x, weight, bias):
    """A view that only a product laid out row by row allows."""
    return nn.functional.linear(x, weight, bias).view(-1)


def of_few(rows, out=90, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    shapes = ((rows, 200), (out, 200), (out,))
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def halved(function, given):
    """The graph, and how many rows each product has a half of."""
    graph = rewriting.for_cpu(traced(function, given))
    calls = [node for node in graph.graph.nodes if node.target is torch.bmm]
    made = make_fx(graph, tracing_mode="fake")(*given)
    halves = [n.meta["val"].shape for n in made.graph.nodes if n.target is aten.bmm.default]
    assert len(halves) == len(calls)
    return graph, [tuple(shape) for shape in halves]


@needs_mkl
@pytest.mark.parametrize("rows", [20, 128])
@pytest.mark.parametrize(
    ("function", "halves"),
    [
        (dense, [(2, 45, "rows")]),
        (merged, [(2, 45, "rows")]),
        (to_inputs, [(2, 45, "rows"), (2, 100, "rows")]),
        (to_weights, [(2, 45, "rows"), (2, 45, 200)]),  # of the product before, and of this one
    ],
)
@float32_products()
def test_products_of_few_rows_are_halved_by_the_weights_side(two_threads, function, halves, rows):
    given = of_few(rows)
    graph, found = halved(function, given)
    assert found == [tuple(rows if n == "rows" else n for n in shape) for shape in halves]
    truth = function(*(t.double() for t in given))
    result = graph(*given)
    assert result.stride() == truth.stride()
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=2e-4)
    other = function(given[0], 1.1 * given[1], given[2]).double()
    assert (other - truth).abs().max() > 0.02


@needs_mkl
@pytest.mark.parametrize(
    "given",
    [
        of_few(15),
        of_few(129),
        of_few(20, out=91),
        of_few(20, out=20),
        of_few(20, dtype=torch.float64),
        of_few(20, dtype=torch.bfloat16),
    ],
    ids=["too few", "too many", "odd", "small", "float64", "bfloat16"],
)
def test_products_that_are_not_halved(two_threads, given):
    assert halved(dense, given)[1] == []


@needs_mkl
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_products_are_not_halved_for_other_threads(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert halved(dense, of_few(20))[1] == []


@needs_mkl
def test_products_are_not_halved_where_a_side_is_neither_by_rows_nor_by_columns(two_threads):
    g = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((200, 100), (90, 100), (90,)))
    assert halved(dense, [x.t().contiguous().t(), weight, bias])[1] == [(2, 100, 90)]
    assert halved(dense, [x.repeat_interleave(2, 1)[:, ::2], weight, bias])[1] == []


@needs_mkl
def test_a_scaled_sum_is_not_halved(two_threads):
    assert halved(scaled, of_few(20))[1] == []


@needs_mkl
@pytest.mark.parametrize("shape", [(20, 90), (20, 1), (1,), ()])
@float32_products()
def test_halves_with_a_bias_of_another_shape(two_threads, shape):
    x, weight, _ = of_few(20)
    given = [x, weight, torch.randn(shape, generator=torch.Generator().manual_seed(2))]

    def function(x, weight, bias):
        return torch.addmm(bias, x, weight.t())

    graph, found = halved(function, given)
    assert found == [(2, 45, 20)]
    truth = function(*(t.double() for t in given))
    torch.testing.assert_close(graph(*given).double(), truth, rtol=1e-5, atol=2e-4)


def test_sizes_that_depend_on_data_are_left_alone(two_threads):
    def function(x, weight, bias):
        return x[x[:, 0] > 0] @ weight.t()

    given = of_few(60)
    with torch.no_grad():
        graph = make_fx(function, tracing_mode="symbolic")(*given)
    assert rewriting.for_cpu(graph) is graph
    torch.testing.assert_close(graph(*given), function(*given))


def cross_entropy(x, y):
    return nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none")


def cross_entropy_and_gradient(x, y):
    """As a step has it: the loss and its gradient, which wants a sigmoid."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x)
    return torch.stack([loss.detach(), grad])


def logits_written_before(x, y):
    x = x.clone()
    s = torch.sigmoid(x)
    x[:100] = -9.0
    return nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none") + s


def logits_written_after(x, y):
    x = x.clone()
    loss = nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none")
    x[:100] = -9.0
    return loss + torch.sigmoid(x)


def log_sigmoid_before_a_write(x, y):
    x = x.clone()
    value = aten.log_sigmoid_forward(x)
    x[:100] = -9.0
    return value[0] + x


def log_sigmoid(x, y):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = nn.functional.logsigmoid(x)
        (grad,) = torch.autograd.grad((value * y).sum(), x)
    return torch.stack([value.detach(), grad])


def softplus(x, y):
    return nn.functional.softplus(x) + y


def _targets(graph):
    return {node.target for node in graph.graph.nodes}


LIBRARY = {aten.binary_cross_entropy_with_logits.default, aten.softplus.default}
FUNCTIONS = [cross_entropy, cross_entropy_and_gradient, log_sigmoid, softplus]
WRITES = [logits_written_before, logits_written_after, log_sigmoid_before_a_write]


def points(dtype=torch.float32):
    x = torch.linspace(-30, 30, 401, dtype=dtype)
    x = torch.cat([x, torch.tensor([-150.0, -90.0, 0.0, 90.0, 150.0], dtype=dtype)])
    return [x.repeat(2), torch.tensor([0.0, 1.0], dtype=dtype).repeat_interleave(len(x))]


@pytest.mark.parametrize("function", FUNCTIONS + WRITES)
def test_functions_in_other_words(function):
    given = points()
    before = traced(function, given)
    graph = rewriting.for_cpu(traced(function, given))
    graph.graph.lint()
    assert not LIBRARY & _targets(graph)
    assert len(graph.graph.nodes) > len(before.graph.nodes) + 10
    truth = function(*(t.double() for t in given))
    # Torch's softplus is x above 20; its cross-entropy of a logit l rounds as l does, and so here.
    atol = 3e-6 if aten.binary_cross_entropy_with_logits.default in _targets(before) else 3e-9
    torch.testing.assert_close(graph(*given).double(), truth, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_what_is_not_finite(function):
    x = torch.tensor([-math.inf, math.inf, math.nan]).repeat(2)
    given = [x, torch.tensor([0.0, 1.0]).repeat_interleave(3)]
    graph = rewriting.for_cpu(traced(function, given))
    torch.testing.assert_close(graph(*given), function(*given), equal_nan=True)


def weighted(x, y):
    loss = nn.functional.binary_cross_entropy_with_logits
    return loss(x, y, weight=y + 1, reduction="none")


def positives_weighted(x, y):
    loss = nn.functional.binary_cross_entropy_with_logits
    return loss(x, y, pos_weight=y + 1, reduction="none")


def averaged(x, y):
    return nn.functional.binary_cross_entropy_with_logits(x, y)


def summed(x, y):
    return nn.functional.binary_cross_entropy_with_logits(x, y, reduction="sum")


def steeper_softplus(x, y):
    return nn.functional.softplus(x, beta=2.0)


@pytest.mark.parametrize(
    "function", [weighted, positives_weighted, averaged, summed, steeper_softplus, torch.sigmoid]
)
def test_other_functions_are_left_alone(function):
    given = points() if function is not torch.sigmoid else points()[:1]
    before = traced(function, given)
    assert rewriting.for_cpu(traced(function, given)).code == before.code


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("function", [cross_entropy, log_sigmoid, softplus])
def test_functions_of_other_precisions_are_left_alone(function, dtype):
    given = points(dtype)
    before = traced(function, given)
    assert rewriting.for_cpu(traced(function, given)).code == before.code


def step_of_a_network(x, weight, bias, y):
    """Loss and gradients of one layer and its activation, whose targets are y."""
    leaves = [t.detach().requires_grad_() for t in (weight, bias)]
    with torch.enable_grad():
        logits = 3 * torch.tanh(nn.functional.linear(x, *leaves))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none").sum()
        grads = torch.autograd.grad(loss, leaves)
    return (loss.detach(), *grads)


@pytest.mark.slow
@needs_mkl
@needs_compiler
@float32_products()
def test_compiled_in_other_words(two_threads):
    given = [*of_few(20), (of_few(20)[0][:, :90] > 0).float()]
    graph = traced(step_of_a_network, given)
    assert torch.bmm in _targets(halved(step_of_a_network, given)[0])
    run = compiling.compiled(graph, given)
    for _ in range(2):
        truth = step_of_a_network(*(t.double() for t in given))
        for ours, theirs in zip(run(*given), truth, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-3)
        given[1].mul_(0.5)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_functions_of_what_is_not_finite(function):
    """A step is known to have failed by what is not finite, so kernels must not lose it."""
    ends = torch.tensor([-math.inf, math.inf, math.nan]).repeat(32)  # more than a vector's lanes
    given = [ends.repeat(2), torch.tensor([0.0, 1.0]).repeat_interleave(96)]
    run = compiling.compiled(traced(function, given), given)
    torch.testing.assert_close(run(*given), function(*given), equal_nan=True)


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
    assert [LINEAR in _targets(one) for one in made] == [True]
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
