"""Quadrature against closed forms, SciPy and importance sampling."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import FixedNoise, linear_gaussian, marginal
from scipy.integrate import quad
from test_importance import gamma_programs, two_layers
from tiny import tiny_vae

from pyrovae import data, priors, quadrature
from pyrovae.errors import InputError
from pyrovae.estimates import estimate
from pyrovae.proposals import Proposal


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def integrate(vae, x, **settings):
    return quadrature.quadrature(vae.model, vae.guide, x, **settings)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
@pytest.mark.parametrize("sigma", [0.5, 0.01])
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_closed_form_and_an_honest_error(monkeypatch, latent_dim, sigma, tolerance):
    """Posteriors as narrow as 0.01: within the tolerance, and within a few estimated errors."""
    monkeypatch.setattr(FixedNoise, "sigma", sigma)
    vae = linear_gaussian(features=4, latent_dim=latent_dim)
    x = marginal(vae).sample((6,))
    result = integrate(vae, x, tolerance=tolerance)
    error = (result.log_likelihood - marginal(vae).log_prob(x)).abs()
    assert error.max() < tolerance
    assert (error < 3 * result.error + 1e-12).all()
    assert result.error.max() < tolerance


@pytest.mark.parametrize("shift", [0.5, -3.0])
def test_a_guide_that_looks_elsewhere_costs_no_truth(monkeypatch, shift):
    monkeypatch.setattr(FixedNoise, "sigma", 0.02)
    vae = linear_gaussian(features=4, latent_dim=2, shift=shift, widen=0.1)
    x = marginal(vae).sample((4,))
    result = integrate(vae, x)
    torch.testing.assert_close(result.log_likelihood, marginal(vae).log_prob(x), rtol=0, atol=1e-4)


def test_mass_far_out_in_the_prior():
    """The whole line is covered: a posterior mean eight prior standard deviations away."""
    vae = linear_gaussian(features=4, latent_dim=1)
    x = vae.decoder(torch.tensor([[8.0], [-9.0]], dtype=torch.float64)).squeeze(-2).detach()
    result = integrate(vae, x, tolerance=1e-7)
    torch.testing.assert_close(result.log_likelihood, marginal(vae).log_prob(x), rtol=0, atol=1e-6)


def test_two_modes_of_which_the_guide_knows_one():
    """x ~ N(z^2, 0.05), z ~ N(0, 1), against SciPy."""
    sigma = 0.05

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z**2, sigma), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.sqrt(), sigma / 2))

    def joint(z, value):
        return math.exp(-0.5 * z**2 - 0.5 * ((value - z**2) / sigma) ** 2) / (2 * math.pi * sigma)

    x = torch.tensor([1.0, 2.5], dtype=torch.float64)
    result = quadrature.quadrature(model, guide, x, tolerance=1e-9)
    for value, ours in zip(x.tolist(), result.log_likelihood.tolist(), strict=True):
        root = math.sqrt(value)
        truth = 2 * quad(joint, 0, 10, args=(value,), points=[root], epsabs=1e-14, limit=500)[0]
        assert ours == pytest.approx(math.log(truth), abs=1e-8)


def test_a_spike_between_the_points_that_the_guide_knows_of():
    """P(x = 1 | z) is 0.001 and a spike of width 0.0002, far narrower than the first grid."""
    height, place, width, floor = 0.9, 0.3, 2e-4, 1e-3

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            spike = height * torch.exp(-0.5 * ((z - place) / width) ** 2)
            pyro.sample("x", dist.Bernoulli(floor + spike), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.full_like(x, place), width))

    density = math.exp(-0.5 * place**2 / (1 + width**2)) / math.sqrt(1 + width**2)
    truth = math.log(floor + height * width * density)
    assert truth - math.log(floor) > 0.1
    x = torch.ones(1, dtype=torch.float64)
    result = quadrature.quadrature(model, guide, x, tolerance=1e-7)
    assert float(result.log_likelihood) == pytest.approx(truth, abs=1e-6)


def test_a_hierarchy_of_two_sites():
    model, guide = two_layers(shift=0.3)
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    truth = dist.Normal(torch.zeros((), dtype=torch.float64), 3**0.5).log_prob(x)
    result = quadrature.quadrature(model, guide, x, tolerance=1e-8)
    torch.testing.assert_close(result.log_likelihood, truth, rtol=0, atol=1e-7)


def test_error_estimate_is_honest_where_the_decoder_has_kinks():
    """relu networks are not smooth: the rule converges slowly, and must say so."""
    vae, dataset = tiny_vae(activation="relu", hidden=(30,), latent_dim=1)
    with torch.no_grad():
        for p in vae.decoder.parameters():
            p.mul_(4.0)
    vae.double()
    x = dataset.test.tensor()[:4].double()
    fine = integrate(vae, x, tolerance=1e-7)
    for tolerance in (1e-2, 1e-3, 1e-4):
        coarse = integrate(vae, x, tolerance=tolerance)
        error = (coarse.log_likelihood - fine.log_likelihood).abs()
        assert (error < 3 * coarse.error + 3 * fine.error).all()
        assert error.max() < tolerance
    assert coarse.error.max() > fine.error.max()


def test_a_budget_ends_the_search_with_a_larger_error():
    vae = linear_gaussian(features=4, latent_dim=2)
    x = marginal(vae).sample((2,))
    short = integrate(vae, x, tolerance=1e-12, max_evaluations=5000)
    assert short.evaluations.max() < 30_000
    assert short.error.min() > 1e-10


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("prior", priors.REGISTRY)
def test_agrees_with_importance_sampling_for_every_prior(prior, latent_dim):
    arguments = {"components": 3} if prior in ("mixture", "vamp") else {}
    vae, dataset = tiny_vae(prior=prior, latent_dim=latent_dim, prior_args=arguments)
    with torch.no_grad():  # untrained networks hardly depend on z
        for p in vae.decoder.parameters():
            p.mul_(3.0)
    x = dataset.test.tensor()
    truth = integrate(vae, x)
    assert truth.error.max() < 1e-4
    proposal = Proposal("defensive")
    parts = estimate(vae.model, vae.guide, x, 4000, chunk=1000, proposal=proposal)
    assert parts.mc_error.max() < 0.2
    error = (parts.log_likelihood - truth.log_likelihood).abs()
    assert (error < 5 * parts.mc_error + 1e-4).all()


def test_one_image_at_a_time_gives_the_same():
    vae = linear_gaussian(features=4, latent_dim=2)
    x = marginal(vae).sample((3,))
    whole = integrate(vae, x)
    single = [integrate(vae, row.unsqueeze(0), memory=500_000) for row in x]
    cut = torch.cat([r.log_likelihood for r in single])
    torch.testing.assert_close(cut, whole.log_likelihood, rtol=0, atol=1e-10)
    before = torch.get_rng_state()
    again = integrate(vae, x)
    assert torch.equal(again.log_likelihood, whole.log_likelihood)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_split_by_one_call():
    vae, dataset = tiny_vae()
    seen = []
    result = quadrature.evaluate(vae, dataset.test, progress=seen.append)
    assert seen == [8]
    per_image = integrate(vae, dataset.test.tensor())
    assert result.log_likelihood == pytest.approx(float(per_image.log_likelihood.mean()), abs=1e-6)
    assert result.largest_error < 1e-4
    assert result.bits_per_dim == pytest.approx(-result.log_likelihood / 16 / math.log(2))
    summary = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert summary["num_images"] == 8
    assert "per_image" not in summary
    for part in ("by quadrature", "values of z per image", "8 of the test split", "a mass"):
        assert part in str(result)


def test_refusals():
    vae = linear_gaussian(latent_dim=3)
    x = marginal(vae).sample((2,))
    with pytest.raises(InputError, match=r"1 or 2 latent dimensions; got 3; use --method"):
        integrate(vae, x)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="--tolerance expects a number above 0"):
            integrate(linear_gaussian(latent_dim=1), x, tolerance=bad)
    model, guide = gamma_programs()
    with pytest.raises(InputError, match=r"site 'z' lies on GreaterThan.*--method importance"):
        quadrature.quadrature(model, guide, torch.ones(2))
    grey, dataset = tiny_vae()
    with pytest.raises(InputError, match="Bernoulli expects x in"):
        quadrature.evaluate(grey, data.fixed(dataset.test.tensor() * 0.5).test)
