"""Batched HMC and the densities it walks on, against closed forms, quadrature and Pyro's NUTS."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from tiny import tiny_vae

from pyrovae import hmc, importance, likelihoods, posteriors, priors
from pyrovae.errors import InputError

F64 = torch.float64


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=F64)
MEAN = torch.tensor([0.5, -1.0], dtype=F64)


def gaussian(u):
    """N(MEAN, COVARIANCE), its log-density split between the two terms."""
    d = torch.distributions.MultivariateNormal(MEAN, COVARIANCE, validate_args=False)
    whole, score = d.log_prob(u), -(u - MEAN) @ torch.linalg.inv(COVARIANCE)
    return hmc.Point(u, torch.stack([whole, whole]), torch.stack([score, score]))


def moves(evaluate, point, num, step, leapfrog=5, weights=(0.3, 0.7)):
    """Points after each transition, and the mean acceptance."""
    points, total = [], 0.0
    for _ in range(num):
        noise = torch.randn(*point.u.shape[:2], point.u.shape[2] + 2, dtype=point.u.dtype)
        point, accept = hmc.transition(evaluate, point, weights, noise, step, leapfrog)
        points.append(point)
        total += float(accept.mean())
    return points, total / num


def assert_moments(u, mean, covariance):
    """Sample moments of independent rows, within five of their standard errors."""
    u = u.reshape(-1, u.shape[-1])
    n = len(u)
    assert ((u.mean(0) - mean).abs() < 5 * u.std(0) / math.sqrt(n)).all()
    products = (u - mean).unsqueeze(-1) * (u - mean).unsqueeze(-2)
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("step", [0.2, 0.5])
def test_a_transition_leaves_its_target_invariant(step):
    exact = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).sample((4000, 5))
    points, accept = moves(gaussian, gaussian(exact), 10, torch.tensor(step, dtype=F64))
    if step == 0.5:
        assert 0.3 < accept < 0.9  # so that the accept step matters
    assert_moments(points[-1].u, MEAN, COVARIANCE)
    assert (points[-1].u != exact).any(-1).double().mean() > 0.9


def test_chains_forget_a_wrong_start():
    start = gaussian(torch.full((4000, 2, 2), 3.0, dtype=F64))
    points, _ = moves(gaussian, start, 40, torch.tensor(0.4, dtype=F64))
    assert_moments(points[-1].u, MEAN, COVARIANCE)


def test_an_invariance_test_sees_a_wrong_accept_step(monkeypatch):
    real = torch.where
    monkeypatch.setattr(
        torch, "where", lambda c, a, b: real(torch.ones_like(c, dtype=torch.bool), a, b)
    )
    with pytest.raises(AssertionError):
        test_a_transition_leaves_its_target_invariant(0.5)


def test_weights_temper_the_target():
    def evaluate(u):
        point = gaussian(u)
        zero = torch.zeros_like(point.terms[0])
        return hmc.Point(u, torch.stack([zero + torch.inf, point.terms[0]]), point.grads)

    # half the log-density is twice the covariance; a term of weight 0 may be infinite
    exact = torch.distributions.MultivariateNormal(MEAN, 2 * COVARIANCE).sample((4000, 5))
    step = torch.tensor(0.5, dtype=F64)
    points, _ = moves(evaluate, evaluate(exact), 5, step, weights=(0.0, 0.5))
    assert_moments(points[-1].u, MEAN, 2 * COVARIANCE)


def test_each_chain_has_its_own_step_and_its_own_accept_step():
    step = torch.tensor([[1e-4], [0.5], [50.0]], dtype=F64).expand(3, 400)
    start = gaussian(torch.zeros(3, 400, 2, dtype=F64))
    noise = torch.randn(3, 400, 4, dtype=F64)
    end, accept = hmc.transition(gaussian, start, (1.0, 0.0), noise, step, 5)
    moved = (end.u != start.u).any(-1).double().mean(1)
    assert moved[0] == 1
    assert 0.3 < moved[1] < 1
    assert moved[2] == 0
    # chains of the second row decide one by one, with the probability they report
    spread = 5 * math.sqrt(0.25 / 400)
    assert (moved - accept.mean(1)).abs().max() < spread


def test_a_trajectory_that_meets_no_number_is_rejected():
    def cliff(u):
        point = gaussian(u)
        bad = torch.where(u[..., 0] > 0.5, torch.nan, 0.0)
        return hmc.Point(u, point.terms + bad, point.grads + bad.unsqueeze(-1))

    start = cliff(torch.zeros(100, 3, 2, dtype=F64))
    points, _ = moves(cliff, start, 20, torch.tensor(0.3, dtype=F64))
    assert (points[-1].u[..., 0] <= 0.5).all()
    assert (points[-1].u != 0).any(-1).double().mean() > 0.9
    assert points[-1].terms.isfinite().all()


def densities(model, guide, x, latents):
    d = hmc.Densities(model, guide, x)
    return d, d.pack(latents)


@pytest.mark.parametrize("name", list(priors.REGISTRY))
def test_terms_are_those_of_importance_sampling_for_every_prior(name):
    args = {} if name in ("standard-normal", "flow") else {"components": 3}
    assert_terms_agree(*tiny_vae(prior=name, prior_args=args))


@pytest.mark.parametrize("name", list(posteriors.REGISTRY))
def test_terms_are_those_of_importance_sampling_for_every_posterior(name):
    assert_terms_agree(*tiny_vae(posterior=name))


@pytest.mark.parametrize("name", list(likelihoods.REGISTRY))
def test_terms_are_those_of_importance_sampling_for_every_likelihood(name):
    assert_terms_agree(*tiny_vae(likelihood=name))


def assert_terms_agree(vae, data):
    x = data.test.tensor()
    with torch.no_grad():
        there = importance.log_terms(vae.model, vae.guide, x, 3)
        d, u = densities(vae.model, vae.guide, x, there.latents)
        log_prior, log_likelihood, log_q = d.terms(u)
    assert u.shape == (3, len(x), 2)
    torch.testing.assert_close(log_prior, there.log_prior)
    torch.testing.assert_close(log_likelihood, there.log_likelihood)
    torch.testing.assert_close(log_q, there.log_posterior, rtol=1e-4, atol=1e-4)
    u.requires_grad_()
    for term in d.terms(u):
        assert term.shape == (3, len(x))
        assert hmc.gradient(term, u).isfinite().all()
    assert all(p.grad is None for p in vae.parameters())


def constrained(x):
    """Latents on half a line, an interval whose end is another latent, and a simplex."""
    one = x.new_tensor(1.0)
    with pyro.plate("data", len(x), dim=-1):
        top = pyro.sample("top", dist.Gamma(2 * one, one))
        inside = pyro.sample("inside", dist.Uniform(0 * one, top))
        share = pyro.sample("share", dist.Dirichlet(x.new_tensor([2.0, 3.0])))
        pyro.sample("x", dist.Normal(inside + share[..., 0], one), obs=x)


def test_constrained_latents_have_a_density_of_u_that_integrates_to_one():
    x = torch.tensor([0.3], dtype=F64)
    latents = hmc.draw_latents(constrained, x, 4, seed=0)
    assert (latents["inside"] < latents["top"]).all()
    d, u = densities(constrained, None, x, latents)
    assert u.shape == (4, 1, 3)
    # midpoint rule over all of u; the tails fall off exponentially
    line = torch.linspace(-16, 8, 121, dtype=F64)
    grid = torch.cartesian_prod(line, line, torch.linspace(-9, 9, 61, dtype=F64))
    cell = (24 / 120) ** 2 * (18 / 60)
    with torch.no_grad():
        log_prior, _, log_q = d.terms(grid.unsqueeze(1))
    assert log_q is None
    assert float(log_prior.exp().sum()) * cell == pytest.approx(1, abs=2e-3)


def hierarchy(x):
    with pyro.plate("data", len(x), dim=-1):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
        b = pyro.sample("b", dist.Normal(a.unsqueeze(-1) * x.new_ones(2), 0.5).to_event(1))
        pyro.sample("x", dist.Normal(b.sum(-1), 0.3), obs=x)


def hierarchy_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        b = pyro.sample("b", dist.Normal(x.unsqueeze(-1) * x.new_ones(2) / 2, 0.6).to_event(1))
        pyro.sample("a", dist.Normal(b.mean(-1), 0.7))


def test_several_sites_are_packed_and_unpacked():
    x = torch.tensor([0.3, -2.0], dtype=F64)
    there = importance.log_terms(hierarchy, hierarchy_guide, x, 5)
    d, u = densities(hierarchy, hierarchy_guide, x, there.latents)
    assert u.shape == (5, 2, 3)
    terms = d.terms(u)
    ours = torch.stack([t for t in terms if t is not None])
    theirs = torch.stack([there.log_prior, there.log_likelihood, there.log_posterior])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("program", [constrained, hierarchy, hierarchy_guide])
def test_starting_draws_belong_to_the_image(program):
    x = torch.linspace(-1, 1, 7, dtype=F64)
    whole = hmc.draw_latents(program, x, 3, seed=4)
    part = hmc.draw_latents(program, x[2:5], 3, seed=4, first_image=2)
    other = hmc.draw_latents(program, x, 3, seed=5)
    for name, z in whole.items():
        torch.testing.assert_close(part[name], z[:, 2:5], rtol=0, atol=0)
        assert (other[name] != z).all()
        assert len(z.flatten().unique()) == z.numel()


def test_simulation_draws_from_the_joint_distribution():
    like = torch.zeros(1, dtype=F64)
    x, latents = hmc.simulate(hierarchy, like, 600, seed=1)
    assert x.shape == (600,)
    assert {name: tuple(z.shape) for name, z in latents.items()} == {
        "a": (1, 600),
        "b": (1, 600, 2),
    }
    # b1 + b2 = 2a + noise of variance 1/2; x adds 0.09
    a, total = latents["a"][0], latents["b"][0].sum(-1)
    covariance = torch.tensor([[1, 2, 2], [2, 4.5, 4.5], [2, 4.5, 4.59]], dtype=F64)
    assert_moments(torch.stack([a, total, x], -1), torch.zeros(3, dtype=F64), covariance)
    few, _ = hmc.simulate(hierarchy, like, 4, seed=1)
    assert torch.equal(few, x[:4])
    assert not torch.equal(hmc.simulate(hierarchy, like, 4, seed=2).x, few)


@pytest.mark.parametrize("name", list(likelihoods.REGISTRY))
def test_simulated_images_are_in_the_support(name):
    vae, data = tiny_vae(likelihood=name)
    before = torch.get_rng_state()
    x, latents = hmc.simulate(vae.model, data.test.tensor(), 20)
    assert torch.equal(torch.get_rng_state(), before)
    vae.likelihood.check(x)
    assert x.shape == (20, 1, 4, 4)
    assert latents["z"].shape == (1, 20, 2)


def test_refusals():
    x = torch.zeros(3)

    def discrete(x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def outside(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def no_latent(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def positive(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def factor(x):
        positive(x)
        with pyro.plate("more", len(x), dim=-1):
            pyro.factor("f", x)

    with pytest.raises(InputError, match=r"'k' has support .* continuous latents"):
        densities(discrete, None, x, hmc.draw_latents(discrete, x, 2, 0))
    with pytest.raises(InputError, match="'z' must lie in a plate of the 3 images"):
        densities(outside, None, x, {"z": torch.zeros(2, 3)})
    with pytest.raises(InputError, match="no latent site"):
        hmc.draw_latents(no_latent, x, 2, 0)
    with pytest.raises(InputError, match="'z' is in the model and not in the guide"):
        densities(positive, None, x, {"y": torch.ones(2, 3)})
    with pytest.raises(InputError, match="'y' is in the guide and not in the model"):
        densities(positive, None, x, {"z": torch.ones(2, 3), "y": torch.ones(2, 3)})
    with (
        pytest.raises(InputError, match=r"outside the support.*--start prior"),
        pyro.validation_enabled(False),
    ):
        densities(positive, None, x, {"z": -torch.ones(2, 3)})
    with pytest.raises(InputError, match=r"needs one observed site.*\['x', 'f'\]"):
        hmc.simulate(factor, x, 2)
    with pytest.raises(InputError, match="at least 1 simulated image"):
        hmc.simulate(positive, x, 0)


def banana(x):
    """A curved posterior in two dimensions."""
    one = x.new_tensor(1.0)
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0 * one, one).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0] ** 2 + z[..., 1], 0.5 * one), obs=x)


def test_posterior_agrees_with_pyros_nuts():
    x = torch.tensor([1.5], dtype=F64)
    d, u = densities(banana, None, x, hmc.draw_latents(banana, x, 400, seed=0))

    def evaluate(u):
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            log_prior, log_likelihood, _ = d.terms(u)
            grads = torch.stack([hmc.gradient(t, u) for t in (log_prior, log_likelihood)])
        return hmc.Point(u.detach(), torch.stack([log_prior, log_likelihood]).detach(), grads)

    points, _ = moves(evaluate, evaluate(u), 100, torch.tensor(0.25, dtype=F64), 8, (1.0, 1.0))
    ours = torch.stack([p.u[:, 0] for p in points[30:]], 1)  # (chains, draws, 2)

    with pyro.get_param_store().scope():
        kernel = NUTS(banana, step_size=0.25, max_tree_depth=4, adapt_mass_matrix=False)
        mcmc = MCMC(kernel, num_samples=200, warmup_steps=50, disable_progbar=True)
        mcmc.run(x)
    theirs = mcmc.get_samples()["z"].reshape(1, -1, 2)

    for statistic in (lambda z: z, torch.square):
        a, b = statistic(ours), statistic(theirs)
        errors = [s.flatten(0, 1).var(0) / effective_sample_size(s) for s in (a, b)]
        difference = a.flatten(0, 1).mean(0) - b.flatten(0, 1).mean(0)
        assert (difference.abs() < 5 * torch.sqrt(errors[0] + errors[1])).all()
    # the posterior is far from the prior, so that agreement means something
    assert ours[..., 1].mean() > 0.3


def test_nothing_is_left_in_the_parameter_store():
    vae, data = tiny_vae()
    x = data.test.tensor()
    d, u = densities(vae.model, vae.guide, x, hmc.draw_latents(vae.guide, x, 2, seed=0))
    d.terms(u)
    hmc.simulate(vae.model, x, 2)
    assert len(list(pyro.get_param_store().keys())) == 0
