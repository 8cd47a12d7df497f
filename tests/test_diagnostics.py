"""Pareto k and effective sample sizes: ArviZ's own, on whichever of its lines is installed."""

import math

import numpy as np
import pytest
import torch

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


def test_equal_to_arviz():
    w = torch.randn(500, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    ours = psis(w)
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        import arviz

        lw, k = arviz.psislw(w.T.numpy().copy())
    else:  # takes log-likelihoods: the sign is the trap
        lw, k = array_stats.psislw(-w.T.numpy())
        lw = lw - np.log(np.exp(lw).sum(-1, keepdims=True))
        wrong = array_stats.psislw(w.T.numpy())[1]
        assert np.abs(ours.pareto_k.numpy() - wrong).max() > 0.05
    np.testing.assert_allclose(ours.pareto_k.numpy(), k, rtol=1e-12)
    np.testing.assert_allclose(ours.log_weights.T.numpy(), lw, rtol=1e-9, atol=1e-9)


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
