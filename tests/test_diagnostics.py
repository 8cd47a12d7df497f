"""Pareto k and effective sample sizes: ArviZ's, for many images at once."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from announced import arviz

from pyrovae import diagnostics
from pyrovae.diagnostics import psis


def pareto_log_weights(k, n, seed):
    """Log-weights with tail index k: w = u^-k."""
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -k * torch.log(u)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9, 1.5])
def test_k_is_the_tail_index(k):
    w = torch.stack([pareto_log_weights(k, 20_000, seed) for seed in range(20)], 1)
    estimates = psis(w).pareto_k
    se = float(estimates.std()) / math.sqrt(20)
    assert abs(float(estimates.mean()) - k) < 5 * se + 0.02


def test_a_bounded_ratio_has_no_heavy_tail_and_a_narrow_proposal_has():
    g = torch.Generator().manual_seed(0)
    normal = torch.distributions.Normal
    for widen, heavy in ((1.3, False), (0.5, True)):
        z = widen * torch.randn(5000, 10, generator=g, dtype=torch.float64)
        w = normal(0.0, 1.0).log_prob(z) - normal(0.0, widen).log_prob(z)
        k = psis(w).pareto_k
        assert bool((k > 0.5).all()) == heavy
        assert bool((k < 0.5).all()) != heavy


def by_arviz(w):
    """Normalised smoothed log-weights (K, B) and k (B,), by whichever line is installed."""
    columns = w.T.numpy().copy()
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        psislw = arviz().psislw
    else:  # takes log-likelihoods: the sign is the trap

        def psislw(log_weights):
            return array_stats.psislw(-log_weights)

    with np.errstate(all="ignore"):  # of weights that are 0, its logarithms complain
        lw, k = psislw(columns)
    lw = torch.from_numpy(np.asarray(lw)).T
    return torch.log_softmax(lw, 0), torch.from_numpy(np.asarray(k))


# Sizes at which the tails of ArviZ's two lines are of one length.
@pytest.mark.parametrize("size", [30, 100, 900, 10_000])
@pytest.mark.parametrize("spread", [0.01, 2.0, 30.0])
@pytest.mark.parametrize("impossible", [0, 7])
def test_equal_to_arviz(size, spread, impossible):
    generator = torch.Generator().manual_seed(size)
    w = spread * torch.randn(size, 4, generator=generator, dtype=torch.float64) - 500
    w[:impossible] = -math.inf
    ours, (lw, k) = psis(w), by_arviz(w)
    torch.testing.assert_close(ours.pareto_k, k, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.log_weights, lw, rtol=1e-9, atol=1e-9)
    if not impossible:
        wrong = by_arviz(-w)[1]
        assert (ours.pareto_k - wrong).abs().max() > 0.05


@pytest.mark.skipif(find_spec("arviz_stats") is not None, reason="ArviZ 1 fits what vanishes")
@pytest.mark.parametrize("spread", [300.0, 3000.0])
def test_equal_to_arviz_where_most_weights_vanish(spread):
    generator = torch.Generator().manual_seed(0)
    w = spread * torch.randn(900, 40, generator=generator, dtype=torch.float64)
    ours, (lw, k) = psis(w), by_arviz(w)
    assert k.isfinite().any() if spread < 1000 else k.isinf().any()
    torch.testing.assert_close(ours.pareto_k, k, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.log_weights, lw, rtol=1e-9, atol=1e-9)


def test_a_fit_that_overflows_is_not_trusted():
    generator = torch.Generator().manual_seed(0)
    w = -707 + 0.01 * torch.randn(500, 3, generator=generator, dtype=torch.float64)
    w[0] = 0.0
    ours = psis(w)
    assert (ours.pareto_k > 0.7).all()
    torch.testing.assert_close(ours.ess, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("layout", ["one image", "images first", "particles first"])
def test_the_weights_handed_in_stay_as_they_are(layout):
    shape = (500, 1) if layout == "one image" else (500, 6)
    w = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if layout == "images first":
        w = w.T.contiguous().T
    before = w.clone()
    assert torch.isfinite(psis(w).pareto_k).all()
    assert torch.equal(w, before)


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    w = 3 * torch.randn(5000, 40, generator=torch.Generator().manual_seed(0)).double()
    here, there = psis(w), psis(w.cuda())
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-9, atol=1e-9)


def test_many_images_are_fitted_as_one_by_one(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    w = 3 * torch.randn(200, 30, generator=generator, dtype=torch.float64)
    w[:, 3] = -1.0  # no tail at all
    w[:, 7] *= 1000  # fewer in the tail
    w[:5, 11] = w[:, 11].max() + 800.0  # a tail of five, and of three
    w[:3, 13] = w[:, 13].max() + 800.0
    one_by_one = [psis(w[:, [i]]) for i in range(30)]
    monkeypatch.setitem(diagnostics._AT_ONCE, "cpu", 2000)  # of one, two or more images
    together = psis(w)
    for i, alone in enumerate(one_by_one):
        torch.testing.assert_close(together.pareto_k[[i]], alone.pareto_k, equal_nan=True)
        torch.testing.assert_close(together.log_weights[:, [i]], alone.log_weights)
    special = together.pareto_k[[3, 11, 13]]
    assert special.isnan().tolist() == [True, False, False]
    assert special.isinf().tolist() == [False, False, True]
    assert math.isfinite(together.ess[13])


@pytest.mark.skipif(find_spec("arviz_stats") is not None, reason="ArviZ 1 counts them in")
def test_weights_that_equal_the_cutoff_are_none_of_the_tail():
    generator = torch.Generator().manual_seed(3)
    w = (8 * torch.randn(900, 6, generator=generator, dtype=torch.float64)).round() / 4
    ordered = w.sort(0, descending=True).values
    assert ((ordered[89] == ordered[90]) | (ordered[88] == ordered[90])).any()
    torch.testing.assert_close(psis(w).pareto_k, by_arviz(w)[1], rtol=1e-9, atol=1e-9)


def test_the_sign_is_right():
    """One huge weight is a heavy tail; one tiny weight is none."""
    base = 0.1 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(2)).double()
    up, down = base.clone(), base.clone()
    up[:50] += torch.linspace(0, 10, 50).unsqueeze(1).double()
    down[:50] -= torch.linspace(0, 10, 50).unsqueeze(1).double()
    assert float(psis(up).pareto_k) > 0.7
    assert float(psis(down).pareto_k) < 0.5


def test_ess_lies_between_one_and_k_and_ignores_a_constant():
    w = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = psis(w)
    assert (result.ess > 1).all()
    assert (result.ess < 200).all()
    shifted = psis(w - 5000)
    torch.testing.assert_close(shifted.ess, result.ess, rtol=1e-8, atol=0)
    torch.testing.assert_close(shifted.pareto_k, result.pareto_k, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.log_weights.exp().sum(0), torch.ones(5).double())


def test_no_k_where_none_can_be_estimated():
    assert torch.isnan(psis(torch.randn(24, 3)).pareto_k).all()
    equal = psis(torch.full((100, 3), -80.0))
    assert torch.isnan(equal.pareto_k).all()
    torch.testing.assert_close(equal.ess, torch.full((3,), 100.0, dtype=torch.float64))
    mixed = torch.full((100, 2), -80.0)
    mixed[:, 1] += torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.isnan(psis(mixed).pareto_k).tolist() == [True, False]
    assert psis(torch.zeros(1, 2)).ess.tolist() == [1.0, 1.0]
