"""What is computed once for many calls, against the whole graph."""

import pytest
import torch
from tiny import tiny_config, tiny_data, tiny_hierarchy, tiny_vae
from torch.fx import GraphModule

from pyrovae import config as cfg
from pyrovae import hoisting, tracing
from pyrovae.compiled_terms import CompiledTerms
from pyrovae.importance import chunks
from pyrovae.proposals import Noise

aten = torch.ops.aten


def targets(graph: GraphModule) -> list:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def handed(parts: hoisting.Parts) -> list[tuple[int, ...]]:
    (result,) = list(parts.once.graph.nodes)[-1].args
    return [tuple(node.meta["val"].shape) for node in result]


def divided(function, fixed, *example):
    """A traced function in two, seen to return what the whole does for other inputs too."""
    graph = tracing.trace(function, *example)
    before = graph.code
    parts = hoisting.in_two(graph, fixed)
    assert graph.code == before
    for scale in (1.0, 0.3, -2.0):
        given, others = [t * scale for t in example[:fixed]], example[fixed:]
        known = parts.once(*given)
        for shift in (0.0, 1.0):
            moved = [t + shift for t in others]
            ours, theirs = parts.each(*given, *known, *moved), function(*given, *moved)
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a, b)
    return parts


W, X, NOISE = torch.randn(5, 4), torch.randn(3, 5), torch.randn(7, 3, 2)


def test_products_of_what_is_fixed_are_taken_out():
    def function(w, x, noise):
        loc, raw = (x @ w).tanh().split(2, -1)
        scale = raw.exp().expand(7, 3, 2)
        return (loc + scale * noise, scale.log().sum(-1))

    parts = divided(function, 2, W, X, NOISE)
    assert handed(parts) == [(3, 4), (3, 2)]  # tanh(x W), and exp of its second half
    assert aten.mm.default in targets(parts.once)
    assert aten.mm.default not in targets(parts.each)
    # There once for each draw: it would take longer to read than to compute.
    assert aten.log.default in targets(parts.each)
    assert aten.split.Tensor in targets(parts.each)


def test_a_tensor_for_each_draw_does_not_count_as_what_it_is_made_of():
    def function(w, x, noise):
        wide = (x @ w).expand(7, 3, 4)
        return (wide.exp().sin().sum(-1) + noise.sum(-1),)

    assert handed(divided(function, 2, W, X, NOISE)) == [(3, 4)]  # the product alone


def test_a_product_counts_however_large_it_is():
    def function(w, x, noise):
        return ((x.sum(-1, keepdim=True) @ w.sum(0, keepdim=True)).tanh() * noise.sum(),)

    long, wide = torch.randn(9, 2), torch.randn(2, 8)
    assert handed(divided(function, 2, wide, long, NOISE)) == [(9, 8)]


def test_functions_of_an_input_are_left():
    def function(x, noise):
        return (
            noise.sum() * x.exp().log1p(),
            noise * torch.ones(2).exp(),
            x.double() + noise[0, 0],
        )

    assert handed(divided(function, 1, torch.rand(3, 2), NOISE)) == []


def test_what_is_rounded_is_taken_out():
    def function(x, noise):
        total = noise.sum()
        return (total * x.bfloat16(), total * x.int(), total * x.long())

    assert handed(divided(function, 1, X, NOISE)) == [(3, 5)]


def test_one_of_several_results_is_taken_out():
    def function(w, x, noise):
        largest, _ = (x @ w).max(-1)
        return (noise * largest[:, None],)

    assert handed(divided(function, 2, W, X, NOISE)) == [(3,)]


def test_results_that_no_draw_enters_are_returned():
    def function(w, x, noise):
        product = x @ w
        return (x, product, product.exp(), product, noise.sum())

    assert handed(divided(function, 2, W, X, NOISE)) == [(3, 4), (3, 4)]


def test_nothing_is_fixed():
    parts = divided(lambda x, noise: (x.exp() + noise.sum(),), 0, X, NOISE)
    assert handed(parts) == []


def written(w, x, noise):
    product = x @ w
    before = product.exp()
    product.mul_(2.0)
    return (before.sum() + noise, product.exp().sum() + noise)


def written_through_a_view(w, x, noise):
    product = x @ w
    filled = product.new_zeros(4, 4)
    before = filled.sum()
    filled.diagonal().copy_(product[0])
    return (filled.sum(-1) + noise[0, 0, 0], before + noise)


def written_with_others(w, x, noise):
    a, b = x @ w, (x @ w).sin()
    before = a.cos()
    torch._foreach_add_([a, b], 1.0)
    return (a.cos() + b.cos() + before + noise.sum(),)


def written_by_one_of_its_parts(w, x, noise):
    whole = x @ w
    first, _ = whole.split([2, 2], -1)
    first.mul_(2.0)
    return (whole.sin().sum() + noise,)


def written_where_memory_is_shared_unsaid(w, x, noise):
    layers = torch.stack([x, -x]) @ w  # a product, and a view that says it is none
    layers.add_(1.0)
    return (layers.exp().sum() + noise,)


@pytest.mark.parametrize(
    "function",
    [
        written,
        written_through_a_view,
        written_with_others,
        written_by_one_of_its_parts,
        written_where_memory_is_shared_unsaid,
    ],
)
def test_where_something_is_written_all_is_left(function):
    assert handed(divided(function, 2, W, X, NOISE)) == []


def test_where_something_is_no_plain_operator_all_is_left():
    def function(w, x, noise):
        product = x @ w
        chosen = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (product,))
        return (chosen + noise.sum(),)

    assert handed(divided(function, 2, W, X, NOISE)) == []


def test_checks_that_return_nothing_stay():
    def function(w, x, noise):
        product = x @ w
        factor = torch.linalg.cholesky(product.T @ product + torch.eye(4))
        return (factor.sum() + noise,)

    parts = divided(function, 2, W, X, NOISE)
    assert aten._linalg_check_errors.default in targets(parts.each)
    assert aten.mm.default not in targets(parts.each)


def test_what_is_drawn_anew_is_not_taken_out():
    def function(w, x, noise):
        product = x @ w
        return (product.exp() * torch.rand_like(product) + noise.sum(),)

    parts = hoisting.in_two(tracing.trace(function, W, X, NOISE), 2)
    known = parts.once(W, X)
    first, second = (parts.each(W, X, *known, NOISE)[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "once", "each"),
    [
        ("mean-field", 2, 2),
        ("full-rank", 0, 4),
        ("flow", 4, 6),
        ("vamp", 4, 2),
        ("bottom-up", 2, 6),
    ],
)
def test_an_evaluation_encodes_its_images_once(kind, once, each, precision):
    """By the number of layers: the encoder's, those again for a VampPrior, and all others.

    A full-rank posterior fills a triangle in place, and so is encoded for each chunk.
    """
    if kind == "bottom-up":
        config = tiny_hierarchy(kind)
    elif kind == "vamp":
        config = tiny_config(prior="vamp", prior_args={"components": 3})
    else:
        config = tiny_config(posterior=kind)
    data = tiny_data(config)
    vae = cfg.build(config, data)
    x = data.test.tensor()
    kernel = CompiledTerms(vae.model, vae.guide, vae, x, 7, compile_it=False, precision=precision)
    for part, layers in ((kernel._once, once), (kernel._each, each)):
        assert targets(part).count(aten.addmm.default) == layers
    # Weights are rounded to bfloat16 once too: what is rounded for each chunk has its particles.
    for node in kernel._each.graph.nodes:
        if node.target is aten._to_copy.default and once > 0:
            assert node.meta["val"].shape[0] in (7, 7 * len(x))


def test_each_batch_of_an_evaluation_is_told_once_and_by_the_weights_of_then(monkeypatch):
    vae, data = tiny_vae()
    x = data.test.tensor()
    kernel = CompiledTerms(vae.model, vae.guide, vae, x, 4, compile_it=False)
    asked = []
    of = kernel.of
    monkeypatch.setattr(kernel, "of", lambda x: asked.append(x) or of(x))
    options = {"chunk": 4, "seed": 0}
    for i in range(2):
        ours = list(chunks(vae.model, vae.guide, x, 12, kernel=kernel, **options))
        theirs = list(chunks(vae.model, vae.guide, x, 12, **options))
        assert len(asked) == i + 1
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.log_weights, b.log_weights, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for p in vae.parameters():
                p.mul_(1.5)


def scratched(vae):
    """Its decoder writes into a tensor of its own, which is no buffer, and reads that."""
    inner, scratch = vae.decoder.forward, torch.zeros(())

    def forward(z):
        params = inner(z)
        scratch.copy_(params.mean())
        return params + scratch * 1.0

    vae.decoder.forward = forward


def added_in_place(vae):
    encoder = vae.posterior.encoder
    inner = encoder.forward
    encoder.forward = lambda x: inner(x).unsqueeze(0).matmul(torch.eye(8)).mul_(0.5).squeeze(0)


def recurrent(vae):
    encoder = vae.posterior.encoder
    inner, cell = encoder.forward, torch.nn.GRUCell(8, 8)
    encoder.cell = cell
    encoder.forward = lambda x: cell(inner(x), inner(x))


@pytest.mark.parametrize("change", [scratched, added_in_place, recurrent])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_chunk_knows_of_the_one_before(change, compiled):
    vae, data = tiny_vae()
    change(vae)
    x = data.test.tensor()
    kernel = CompiledTerms(vae.model, vae.guide, vae, x, 4, compile_it=compiled)
    options = {"chunk": 4, "seed": 0}
    ours = list(chunks(vae.model, vae.guide, x, 20, kernel=kernel, **options))
    theirs = list(chunks(vae.model, vae.guide, x, 20, **options))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.log_weights, b.log_weights, rtol=1e-5, atol=1e-4)


def test_terms_that_are_right_for_the_first_chunk_alone_are_seen(monkeypatch):
    vae, data = tiny_vae()
    drawn = CompiledTerms._drawn
    monkeypatch.setattr(
        CompiledTerms,
        "_drawn",
        lambda self, x, noise: drawn(self, x, noise._replace(particles=range(4))),
    )
    with pytest.raises(tracing.NotTraceableError, match="differs from Pyro's"):
        CompiledTerms(vae.model, vae.guide, vae, data.test.tensor(), 4, compile_it=False)


def test_nothing_around_an_evaluation_rounds_what_is_taken_out():
    vae, data = tiny_vae()
    x = data.test.tensor()
    kernel = CompiledTerms(vae.model, vae.guide, vae, x, 4, compile_it=False)
    noise = Noise(0, range(len(x)), range(4))
    plain = kernel.of(x)(noise)
    with torch.autocast("cpu", torch.bfloat16):
        around = kernel.of(x)(noise)
    assert torch.equal(plain.log_weights, around.log_weights)
