"""The parts of the rate, against models whose aggregate posterior is known."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import linear_gaussian, marginal
from test_importance import two_layers
from tiny import tiny_vae
from torch.distributions import kl_divergence

from pyrovae.errors import InputError
from pyrovae.evaluation import evaluate
from pyrovae.information import information, kl_per_dimension, log_aggregate


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def weak(scale=0.4):
    """A linear-Gaussian VAE whose z tells little of x: log N is far above I(x; z)."""
    vae = linear_gaussian(features=3, latent_dim=2)
    with torch.no_grad():
        vae.decoder.weight.mul_(scale)
    return vae


def test_an_exact_posterior_has_the_prior_as_its_aggregate():
    """I(x; z) = 1/2 log det(I + W'W / sigma^2), and KL(q(z) || p(z)) = 0, as N grows."""
    vae = weak()
    W = vae.decoder.weight.detach()
    truth = 0.5 * float(torch.logdet(torch.eye(2) + W.T @ W / 0.5**2))
    x = marginal(vae).sample((4000,))
    parts = information(vae.model, vae.guide, x)
    assert 0.5 < truth < math.log(4000) - 6
    assert abs(parts.mutual_information - truth) < 5 * parts.mutual_information_se
    assert abs(parts.aggregate_kl) < 0.01
    assert abs(parts.rate - truth) < 5 * parts.rate_se


def test_the_two_parts_add_up_to_the_rate():
    vae, dataset = tiny_vae()
    parts = information(vae.model, vae.guide, dataset.train.tensor())
    assert parts.mutual_information + parts.aggregate_kl == pytest.approx(parts.rate, abs=1e-9)


def test_information_is_at_most_log_n_and_rises_to_the_truth_from_below():
    vae = linear_gaussian(features=6, latent_dim=3)
    W = vae.decoder.weight.detach()
    truth = 0.5 * float(torch.logdet(torch.eye(3) + W.T @ W / 0.5**2))
    x = marginal(vae).sample((1000,))
    found = [information(vae.model, vae.guide, x[:n]) for n in (1, 10, 100, 1000)]
    values = [parts.mutual_information for parts in found]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    for parts in found:
        assert parts.mutual_information <= parts.limit + 1e-9
        assert parts.limit == pytest.approx(math.log(parts.num_images))
        assert parts.mutual_information < truth
        assert f"at most log N = {parts.limit:.2f}" in parts.bias
    assert math.isnan(found[0].rate_se)


@pytest.mark.parametrize("posterior", ["mean-field", "full-rank", "flow"])
def test_log_aggregate_by_brute_force(posterior):
    vae, dataset = tiny_vae(posterior=posterior)
    x = dataset.test.tensor()
    z = torch.randn(5, 2)
    with torch.no_grad():
        each = torch.stack([vae.posterior(row.unsqueeze(0)).log_prob(z) for row in x])
    expected = (torch.logsumexp(each.double(), 0) - math.log(len(x))).cpu()
    got = log_aggregate(vae.guide, x, {"z": z})
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_log_aggregate_of_a_hierarchy_and_in_blocks(monkeypatch):
    _, guide = two_layers()
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    z1, z2 = torch.randn(2, 7, dtype=torch.float64)
    q2 = dist.Normal(x * 2 / 3, (2 / 3) ** 0.5).log_prob(z2.unsqueeze(-1))
    q1 = dist.Normal(z2 / 2, 0.5**0.5).log_prob(z1).unsqueeze(-1)
    expected = torch.logsumexp(q1 + q2, -1) - math.log(3)
    for pairs in (2**15, 6, 1):
        monkeypatch.setattr("pyrovae.information._PAIRS", pairs)
        got = log_aggregate(guide, x, {"z1": z1, "z2": z2})
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


def test_kl_per_dimension_adds_up_to_the_rate():
    vae, dataset = tiny_vae(latent_dim=5)
    x = dataset.test.tensor()
    kl = kl_per_dimension(vae.model, vae.guide, x)
    assert kl.method == "closed form"
    with torch.no_grad():
        total = kl_divergence(vae.posterior(x), vae.prior()).double()
    assert float(kl.mean.sum()) == pytest.approx(float(total.mean()), rel=1e-6)
    assert kl.mean.shape == kl.se.shape == (5,)
    rate = evaluate(vae, dataset.test, 2000).rate
    assert float(kl.mean.sum()) == pytest.approx(rate, rel=0.02)


def test_kl_per_dimension_by_draws_where_there_is_no_formula():
    """A logistic prior: KL from draws against quadrature in one dimension."""

    def programs(prior):
        def model(x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", prior(torch.zeros(2, dtype=x.dtype)).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                loc = torch.stack([x, x / 2], -1)
                pyro.sample("z", dist.Normal(loc, torch.tensor([0.5, 0.8])).to_event(1))

        return model, guide

    x = torch.linspace(-1, 1, 200, dtype=torch.float64)
    kl = kl_per_dimension(*programs(lambda zero: dist.Logistic(zero, 1.0)), x)
    assert kl.method == "64 draws per image"
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    for d, (slope, scale) in enumerate([(1.0, 0.5), (0.5, 0.8)]):
        q = torch.distributions.Normal(slope * x.unsqueeze(-1), scale)
        p = dist.Logistic(torch.zeros((), dtype=torch.float64), 1.0)
        integrand = q.log_prob(grid).exp() * (q.log_prob(grid) - p.log_prob(grid))
        truth = float(torch.trapezoid(integrand, grid).mean())
        # the draws' own error: far below the spread over images that se speaks of
        assert float(kl.mean[d]) == pytest.approx(truth, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prior": "mixture"}, "the prior (NormalMixture) does not factorise"),
        ({"prior": "flow"}, "the prior (TransformedDistribution) does not factorise"),
        ({"posterior": "full-rank"}, "the posterior (FullRankNormal) does not factorise"),
        ({"posterior": "flow"}, "the posterior (TransformedDistribution) does not factorise"),
    ],
)
def test_no_kl_per_dimension_without_dimensions(changes, reason):
    vae, dataset = tiny_vae(**changes)
    kl = kl_per_dimension(vae.model, vae.guide, dataset.test.tensor())
    assert kl.mean is None
    assert reason in kl.method
    summary = evaluate(vae, dataset.test, 3).to_dict()["information"]
    assert summary["kl_per_dimension"] is None
    assert reason in summary["kl_per_dimension_method"]


def test_a_hierarchy_has_no_kl_per_dimension_but_its_parts():
    model, guide = two_layers()
    parts = information(model, guide, torch.randn(500, dtype=torch.float64) * 3**0.5)
    assert parts.dimensions.method == "the guide has 2 latent sites, not one"
    # the exact posterior: x = z2 + e, and z1 tells no more, so I = 1/2 log 3
    truth = 0.5 * math.log(3)
    assert abs(parts.mutual_information - truth) < 5 * parts.mutual_information_se
    assert abs(parts.aggregate_kl) < 0.05


def test_a_guide_that_cannot_score_other_draws_has_no_parts():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    planar = dist.transforms.Planar(2)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    parts = information(model, guide, torch.randn(5))
    assert parts.mutual_information is None
    assert parts.aggregate_kl is None
    assert math.isfinite(parts.rate)
    assert json.loads(json.dumps(parts.to_dict(), allow_nan=False))["aggregate_kl"] is None


def test_one_image_and_none():
    vae, dataset = tiny_vae()
    one = information(vae.model, vae.guide, dataset.test.tensor()[:1]).to_dict()
    assert one["rate_se"] is None
    assert one["kl_per_dimension_se"] == [None, None]
    assert json.dumps(one, allow_nan=False)
    with pytest.raises(InputError, match="at least 1 image"):
        information(vae.model, vae.guide, dataset.test.tensor()[:0])
    assert evaluate(vae, dataset.test, 3, information_images=0).information is None
    assert evaluate(vae, dataset.test, 3, information_images=5).information.num_images == 5
