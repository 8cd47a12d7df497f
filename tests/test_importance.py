"""Importance weights against models whose log p(x) is known."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import kl_to_posterior, linear_gaussian, marginal
from pyro import poutine
from pyro.infer import RenyiELBO
from pyro.infer.importance import vectorized_importance_weights

from pyrovae import importance
from pyrovae.errors import InputError
from pyrovae.evaluation import estimate
from pyrovae.importance import IMAGE_BLOCK, PARTICLE_BLOCK, chunks, log_mean_exp, log_weights


@pytest.fixture
def x():
    return marginal(linear_gaussian()).sample((8,))


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def weights_in_chunks(vae, x, num_particles, chunk, seed=0, first_image=0):
    parts = chunks(
        vae.model,
        vae.guide,
        x,
        num_particles,
        chunk=chunk,
        seed=seed,
        first_image=first_image,
    )
    return torch.cat([terms.log_weights for terms in parts])


def test_every_weight_is_the_evidence_when_the_guide_is_the_posterior(x):
    vae = linear_gaussian()
    w = log_weights(vae.model, vae.guide, x, 7)
    assert w.shape == (7, 8)
    expected = marginal(vae).log_prob(x).expand(7, 8)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-10, atol=1e-10)


def test_elbo_is_evidence_minus_kl(x):
    vae = linear_gaussian(shift=0.1, widen=1.2)
    w = weights_in_chunks(vae, x, 20_000, 5000)
    elbo, se = w.mean(0), w.std(0) / math.sqrt(len(w))
    expected = marginal(vae).log_prob(x) - kl_to_posterior(vae, x)
    assert ((elbo - expected).abs() < 5 * se).all()
    # the slack is real: the bound is not the evidence
    assert (marginal(vae).log_prob(x) - elbo > 20 * se).all()


def test_importance_weighting_closes_the_gap_within_its_own_error(x):
    vae = linear_gaussian(shift=0.1, widen=1.2)
    truth = marginal(vae).log_prob(x)
    w = weights_in_chunks(vae, x, 40_000, 8000)
    relative = torch.exp(w - w.amax(0))
    se = relative.std(0) / relative.mean(0) / math.sqrt(len(w))  # delta method
    assert (se < 0.02).all()
    assert ((log_mean_exp(w) - truth).abs() < 5 * se).all()


def test_bound_rises_with_the_number_of_particles(x):
    vae = linear_gaussian(shift=0.3, widen=1.5)
    w = weights_in_chunks(vae, x, 9000, 3000)
    bounds = []
    for k in (1, 3, 30, 300):
        per_group = log_mean_exp(w.view(-1, k, len(x)), 1).mean(1)
        bounds.append((per_group.mean(), per_group.std() / math.sqrt(len(per_group))))
    for (low, low_se), (high, high_se) in itertools.pairwise(bounds):
        assert high - low > 3 * (low_se + high_se)
    assert bounds[-1][0] < marginal(vae).log_prob(x).mean() + 5 * bounds[-1][1]


BLOCK = PARTICLE_BLOCK


@pytest.mark.parametrize("k", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_weights_do_not_depend_on_the_chunk(x, k):
    vae = linear_gaussian(shift=0.1)
    whole = weights_in_chunks(vae, x, k, chunk=k)
    assert whole.shape == (k, 8)
    for chunk in (1, 7, BLOCK, BLOCK + 1):
        if chunk == 1 and k > BLOCK:
            continue
        torch.testing.assert_close(
            weights_in_chunks(vae, x, k, chunk=chunk), whole, rtol=1e-12, atol=1e-12
        )


def test_weights_do_not_depend_on_the_batch():
    vae = linear_gaussian(shift=0.1)
    x = marginal(vae).sample((2 * IMAGE_BLOCK + 5,))
    whole = weights_in_chunks(vae, x, 5, chunk=5)
    for size in (1, 3, IMAGE_BLOCK, IMAGE_BLOCK + 2):
        parts = [
            weights_in_chunks(vae, x[i : i + size], 5, chunk=2, first_image=i)
            for i in range(0, len(x), size)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


def test_noise_is_its_own_for_each_seed_image_and_particle(x):
    vae = linear_gaussian(shift=0.1)
    same = x[:1].expand(8, -1)
    w = weights_in_chunks(vae, same, 6, chunk=4)
    assert len(w.unique()) == w.numel()
    assert not torch.equal(w, weights_in_chunks(vae, same, 6, chunk=4, seed=1))
    assert torch.equal(w, weights_in_chunks(vae, same, 6, chunk=4))


def test_noise_is_standard_normal_and_whole_blocks_are_used():
    draws = importance.Noise(3, range(5, 45), range(10, 200)).draw(
        "z", torch.Size([4]), torch.zeros((), dtype=torch.float64)
    )
    assert draws.shape == (190, 40, 4)
    n = draws.numel()
    assert abs(float(draws.mean())) < 5 / math.sqrt(n)
    assert abs(float(draws.var()) - 1) < 5 * math.sqrt(2 / n)
    part = importance.Noise(3, range(17, 19), range(70, 71)).draw(
        "z", torch.Size([4]), torch.zeros((), dtype=torch.float64)
    )
    assert torch.equal(part, draws[60:61, 12:14])


def test_evaluation_leaves_the_random_stream_and_the_parameter_store_alone(x):
    vae = linear_gaussian()
    before = torch.get_rng_state()
    weights_in_chunks(vae, x, 5, chunk=2)
    assert torch.equal(torch.get_rng_state(), before)
    log_weights(vae.model, vae.guide, x, 2)
    assert len(list(pyro.get_param_store().keys())) == 0


def test_any_number_of_particles_from_one_and_none_below():
    vae = linear_gaussian()
    x = marginal(vae).sample((2,))
    for bad in (0, -1):
        with pytest.raises(InputError, match="at least 1"):
            log_weights(vae.model, vae.guide, x, bad)
        with pytest.raises(InputError, match="at least 1"):
            estimate(vae.model, vae.guide, x, bad, chunk=1)


def two_layers(shift=0.0):
    """z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1); the guide draws z2, then z1 given z2."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x * 2 / 3 + shift, (2 / 3) ** 0.5))
            pyro.sample("z1", dist.Normal(z2 / 2, 0.5**0.5))

    return model, guide


def test_a_hierarchical_program_whose_sites_depend_on_each_other():
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    truth = dist.Normal(torch.zeros((), dtype=torch.float64), 3**0.5).log_prob(x)
    model, guide = two_layers()
    parts = chunks(model, guide, x, 70, chunk=33, seed=0)
    w = torch.cat([terms.log_weights for terms in parts])
    torch.testing.assert_close(w, truth.expand(70, 3), rtol=1e-7, atol=1e-7)
    model, guide = two_layers(shift=0.3)
    whole = torch.cat([t.log_weights for t in chunks(model, guide, x, 70, chunk=70, seed=0)])
    cut = torch.cat([t.log_weights for t in chunks(model, guide, x, 70, chunk=9, seed=0)])
    assert whole.std() > 0.1
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)


def gamma_programs():
    """z ~ Gamma(2, 1), x ~ Poisson(z): p(x) is negative binomial, the posterior a Gamma."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.0)))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Gamma(2.0 + x, x.new_tensor(2.0)))

    return model, guide


def test_a_guide_that_is_not_made_of_normals():
    model, guide = gamma_programs()
    x = torch.arange(5, dtype=torch.float64)
    truth = dist.GammaPoisson(x.new_tensor(2.0), x.new_tensor(1.0)).log_prob(x)
    assert not importance.is_made_of_normals(guide, x)
    plan = importance.plan(model, guide, x, 100)
    assert plan == (IMAGE_BLOCK, PARTICLE_BLOCK)
    w = torch.cat([t.log_weights for t in chunks(model, guide, x, 100, chunk=64, seed=0)])
    torch.testing.assert_close(w, truth.expand(100, 5), rtol=1e-10, atol=1e-10)


def test_scales_do_not_enter_where_renyi_elbo_is_misled(x):
    """RenyiELBO in a plate scaled to N is far from log p(x); log_weights are of one image."""
    vae = linear_gaussian()
    truth = marginal(vae).log_prob(x)

    def scaled(program):
        return poutine.scale(program, scale=10.0)

    w = log_weights(scaled(vae.model), scaled(vae.guide), x, 5)
    torch.testing.assert_close(w.detach(), truth.expand(5, 8), rtol=1e-10, atol=1e-10)
    with pyro.get_param_store().scope():
        renyi = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
        misled = -renyi.loss(scaled(vae.model), scaled(vae.guide), x) / len(x)
    assert abs(misled - float(truth.mean())) > 10


def test_pyros_joint_weights_are_no_marginal_likelihood(x):
    """Pyro weights a batch jointly: one weight for all images, whose estimate is far lower."""
    vae = linear_gaussian(shift=0.3, widen=1.5)
    truth = float(marginal(vae).log_prob(x).sum())
    k = 2000
    with pyro.get_param_store().scope():
        joint, _, _ = vectorized_importance_weights(
            vae.model, vae.guide, x, num_samples=k, max_plate_nesting=1, normalized=False
        )
    theirs = float(torch.logsumexp(joint.detach().flatten(), 0) - math.log(joint.numel()))
    w = weights_in_chunks(vae, x, k, chunk=500)
    ours = float(log_mean_exp(w).sum())
    relative = torch.exp(w - w.amax(0))
    se = float(((relative.std(0) / relative.mean(0)) ** 2).sum() / k) ** 0.5
    assert abs(ours - truth) < 5 * se
    assert truth - theirs > 10 * se


def test_a_site_outside_the_plate_of_images_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(InputError, match="'z' must lie in a plate"):
        log_weights(model, guide, torch.zeros(3), 2)


def test_memory_budget_sets_the_plan_and_not_the_answer(x):
    vae = linear_gaussian(shift=0.1)
    small = importance.plan(vae.model, vae.guide, x, 1000, memory=50_000)
    large = importance.plan(vae.model, vae.guide, x, 1000, memory=50_000_000)
    assert small.images * small.particles < large.images * large.particles
    assert small.particles >= 1
    assert small.images >= 1


def test_one_encoder_pass_however_many_chunks(x):
    vae = linear_gaussian()
    calls = []
    vae.posterior.register_forward_hook(lambda *_: calls.append(1))
    weights_in_chunks(vae, x, 100, chunk=10)
    assert len(calls) == 1
