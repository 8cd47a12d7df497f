"""What `evaluate` reports, against closed forms and quadrature."""

import json
import math

import pyro.distributions as dist
import pytest
import torch
from exact import kl_to_posterior, linear_gaussian, marginal
from tiny import tiny_vae

import pyrovae as pv
from pyrovae import config as cfg
from pyrovae import data as datasets
from pyrovae import evaluation
from pyrovae.errors import InputError
from pyrovae.evaluation import active_units, bits_per_dim, evaluate


def split_of(x):
    return datasets.fixed(x).test


@pytest.fixture
def gaussian():
    vae = linear_gaussian(shift=0.1, widen=1.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = marginal(vae).sample((50,))
    return vae, x


def test_against_the_closed_form(gaussian):
    vae, x = gaussian
    k = 4000
    result = evaluate(vae, split_of(x), k)
    truth = marginal(vae).log_prob(x)
    images = result.per_image
    # relative variance of a weight, from the effective sample size: var(w)/K = 1/ESS - 1/K
    se = torch.sqrt(1 / images.ess - 1 / k)
    assert ((images.log_likelihood - truth).abs() < 5 * se).all()
    assert (se < 0.05).all()
    assert result.log_likelihood == pytest.approx(float(images.log_likelihood.mean()))
    assert result.log_likelihood_se == pytest.approx(
        float(images.log_likelihood.std()) / math.sqrt(50)
    )
    elbo = truth - kl_to_posterior(vae, x)
    spread = math.sqrt(float(kl_to_posterior(vae, x)[0]) * 4 / k)
    assert (images.elbo - elbo).abs().max() < 6 * spread
    assert result.elbo == pytest.approx(-(result.rate + result.distortion), abs=1e-9)
    assert result.elbo < result.log_likelihood
    assert result.num_images == 50
    assert result.active_units == 3
    # 20 % wider than the posterior in three dimensions: the weights are bounded
    assert result.pareto_k_median < 0.5


def test_exact_posterior_has_no_slack_and_no_tail(gaussian):
    _, x = gaussian
    vae = linear_gaussian()
    result = evaluate(vae, split_of(x), 100)
    truth = marginal(vae).log_prob(x)
    torch.testing.assert_close(result.per_image.log_likelihood, truth, rtol=1e-10, atol=1e-10)
    assert result.elbo == pytest.approx(result.log_likelihood, abs=1e-9)
    assert result.pareto_k_median is None
    assert result.ess_median == pytest.approx(100)


@pytest.mark.parametrize("memory", [30_000, 200_000, 64 * 2**20])
@pytest.mark.parametrize("k", [1, 63, 200])
def test_memory_budget_does_not_move_the_answer(memory, k):
    vae, data = tiny_vae()
    whole = evaluate(vae, data.test, k).per_image
    cut = evaluate(vae, data.test, k, memory=memory).per_image
    for ours, theirs in zip(cut, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_ragged_last_batch_counts_each_image_once(monkeypatch):
    vae, data = tiny_vae()
    x = datasets.from_array(
        torch.randint(0, 2, (60, 1, 4, 4), dtype=torch.uint8), test_size=37, valid_size=3
    )
    whole = evaluate(vae, x.test, 5)
    plan = evaluation.importance.Plan(images=16, particles=2)
    monkeypatch.setattr(evaluation.importance, "plan", lambda *a, **k: plan)
    cut = evaluate(vae, x.test, 5)
    assert cut.num_images == 37
    assert cut.log_likelihood == pytest.approx(whole.log_likelihood, abs=1e-5)
    assert cut.elbo == pytest.approx(whole.elbo, abs=1e-5)


def test_reproducible_from_the_seed():
    vae, data = tiny_vae()
    a, b, c = (evaluate(vae, data.test, 20, seed=s) for s in (0, 0, 1))
    assert a.log_likelihood == b.log_likelihood
    assert a.log_likelihood != c.log_likelihood


def log_evidence_by_quadrature(vae, x, limit=6.0, points=241):
    """log p(x) of a VAE with two latents, by the trapezoidal rule over the latent plane."""
    grid = torch.linspace(-limit, limit, points)
    step = float(grid[1] - grid[0])
    z = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        log_prior = vae.prior().log_prob(z).double()
        params = vae.decoder(z)
        rows = [vae.likelihood(params).log_prob(one).double() + log_prior for one in x]
    return torch.stack([torch.logsumexp(row, 0) for row in rows]) + 2 * math.log(step)


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized-logistic"])
def test_two_latents_trained_on_digits_agree_with_quadrature(likelihood):
    config = cfg.resolve(
        cfg.make(
            cfg.TrainConfig, {"latent_dim": 2, "hidden": (64,), "likelihood": likelihood}
        )
    )
    data = cfg.load_data(config)
    vae = cfg.build(config, data)
    pv.fit(vae, data, epochs=15, batch_size=64, lr=3e-3)
    test = data.test.head(20)
    k = 4000
    result = evaluate(vae, test, k)
    truth = log_evidence_by_quadrature(vae, test.tensor())
    # the rule itself is exact to far less than the sampling error
    finer = log_evidence_by_quadrature(vae, test.tensor()[:3], points=361)
    assert (finer - truth[:3]).abs().max() < 0.01
    images = result.per_image
    trusted = images.pareto_k < 0.7
    assert trusted.double().mean() > 0.5
    se = torch.sqrt(1 / images.ess - 1 / k) + 0.005
    assert ((images.log_likelihood - truth).abs() < 5 * se)[trusted].all()
    # a lower bound of log p(x), for the others too
    assert (images.log_likelihood < truth + 5 * se).all()
    assert result.elbo < float(truth.mean())


def test_bits_per_dim():
    assert bits_per_dim(-784 * math.log(2), "mass", 1, 784) == pytest.approx(1.0)
    # a uniform density of y on (0, 1) is a uniform mass of 256 levels: eight bits
    assert bits_per_dim(0.0, "density", 255, 784) == pytest.approx(8.0)
    assert bits_per_dim(-10.0, "density", None, 784) is None
    assert 784 * math.log(256) == pytest.approx(4347.4, abs=0.1)


def test_uniform_density_and_uniform_mass_have_the_same_bits_per_dim():
    """The level correction brings a density of dequantised x and a mass to one scale."""
    results = {}
    for name in ("categorical", "continuous-bernoulli"):
        vae, data = tiny_vae(likelihood=name)
        with torch.no_grad():
            for p in vae.decoder.parameters():
                p.zero_()  # all-zero parameters: both are uniform
        results[name] = evaluate(vae, data.test, 3)
    assert results["categorical"].kind == "mass"
    assert results["continuous-bernoulli"].kind == "density"
    vae_rate = [r.rate for r in results.values()]
    assert vae_rate[0] == pytest.approx(vae_rate[1], abs=0.5)
    for r in results.values():
        distortion_bits = bits_per_dim(-r.distortion, r.kind, 255, 16)
        assert distortion_bits == pytest.approx(8.0, abs=1e-4)


def test_active_units():
    g = torch.Generator().manual_seed(0)
    means = torch.randn(5000, 3, generator=g, dtype=torch.float64)
    means = means * torch.tensor([1.0, 0.12, 0.08])
    assert active_units(means).tolist() == [True, True, False]
    assert active_units(means[:1]).tolist() == [False, False, False]
    # a Monte-Carlo error of variance 0.02 alone would pass for an active unit
    noisy = means + math.sqrt(0.02) * torch.randn(5000, 3, generator=g, dtype=torch.float64)
    assert active_units(noisy).tolist() == [True, True, True]
    assert active_units(noisy, error=0.02).tolist() == [True, True, False]


def test_active_units_of_a_posterior_without_a_closed_form_mean():
    vae, data = tiny_vae(posterior="flow")
    assert evaluate(vae, data.test, 1).active_units is None
    with torch.no_grad():  # a blind encoder: q(z | x) is the same for all x, yet its draws differ
        vae.posterior.encoder.layers[-2].weight.zero_()
    blind = evaluate(vae, data.test, 200)
    assert blind.active_units == 0
    assert (blind.per_image.posterior_mean_error > 0).all()
    assert (blind.per_image.posterior_mean.var(0) > 0).all()


def test_summary_prints_the_protocol_and_is_plain_json():
    vae, data = tiny_vae()
    result = evaluate(vae, data.test.head(1), 30)
    text = str(result)
    for part in ("log p(x)", "K = 30", "dynamic binarisation", "a mass", "seed 0"):
        assert part in text
    summary = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert summary["log_likelihood_se"] is None  # one image has no standard error
    assert "per_image" not in summary


def test_refusals():
    vae, data = tiny_vae()
    with pytest.raises(InputError, match="at least 1"):
        evaluate(vae, data.test, 0)
    _, grey = tiny_vae(likelihood="gaussian")
    with pytest.raises(InputError, match="Bernoulli expects x in"):
        evaluate(vae, grey.test, 2)


def test_broken_normalisation_would_be_seen():
    """A likelihood that is off by a constant moves log p(x) by it: the closed form catches that."""
    vae = linear_gaussian()
    x = marginal(vae).sample((5,))

    class TooLarge(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) + 0.01

    vae.likelihood.elementwise = lambda params: TooLarge(params[0], vae.likelihood.sigma)
    off = evaluate(vae, split_of(x), 10).per_image.log_likelihood - marginal(vae).log_prob(x)
    torch.testing.assert_close(off, torch.full((5,), 0.06, dtype=torch.float64))
