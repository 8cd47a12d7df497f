"""Proposals: their densities by change of variables, their estimates against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import linear_gaussian, marginal
from test_importance import gamma_programs, two_layers

from pyrovae import data, networks, posteriors
from pyrovae.errors import InputError
from pyrovae.estimates import estimate
from pyrovae.evaluation import evaluate
from pyrovae.importance import IMAGE_BLOCK, PARTICLE_BLOCK, chunks, plan
from pyrovae.proposals import KINDS, Noise, Proposal, from_noise, inflated
from pyrovae.streams import seed_of

PROPOSALS = [Proposal(), Proposal("wide", 1.3), Proposal("defensive", 1.3)]
IDS = [p.kind for p in PROPOSALS]


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_the_table_is_the_registry():
    assert tuple(IDS) == KINDS


def a_posterior(name):
    posterior = posteriors.REGISTRY[name](networks.MLPEncoder((6,), hidden=(8,)), 3).double()
    with torch.no_grad():  # far from the identity that a flow starts as
        for p in posterior.parameters():
            p.mul_(2.0)
    return posterior


def distributions():
    loc, scale = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5
    x = torch.rand(6, dtype=torch.float64)
    with torch.no_grad():
        families = {name: a_posterior(name)(x) for name in posteriors.REGISTRY}
    return {
        **families,
        "normal": dist.Normal(loc, scale).to_event(1),
        "log-normal": dist.LogNormal(loc, scale).to_event(1),
    }


@pytest.mark.parametrize("event", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_that_of_seeded_blocks(event, dtype):
    """Any other stream would move every log p(x) that was ever published with a seed."""
    images, particles = range(10, 37), range(60, 70)  # across two blocks each, and parts of them
    noise = Noise(7, images, particles).draw("z", torch.Size(event), torch.zeros((), dtype=dtype))
    assert noise.is_contiguous()
    blocks = {}
    for k, particle in enumerate(particles):
        for i, image in enumerate(images):
            p, b = particle // PARTICLE_BLOCK, image // IMAGE_BLOCK
            if (p, b) not in blocks:
                stream = torch.Generator().manual_seed(seed_of(f"7/z/{p}/{b}"))
                shape = (PARTICLE_BLOCK, IMAGE_BLOCK, *event)
                blocks[p, b] = torch.randn(shape, generator=stream, dtype=dtype)
            truth = blocks[p, b][particle % PARTICLE_BLOCK, image % IMAGE_BLOCK]
            assert torch.equal(noise[k, i], truth)
    assert len(blocks) == 6


@pytest.mark.parametrize("name", [*posteriors.REGISTRY, "normal", "log-normal"])
def test_inflated_density_is_that_of_the_inflated_noise(name):
    """log q_s(z) = log N(eps; 0, 1) - log |det dz / d eps|, z = g(s eps)."""
    q, scale = distributions()[name], 1.7
    eps = torch.randn(q.event_shape, dtype=torch.float64)

    def g(e):
        return from_noise(q, lambda _: scale * e)

    with torch.no_grad():
        jacobian = torch.autograd.functional.jacobian(g, eps)
        expected = dist.Normal(0.0, 1.0).log_prob(eps).sum() - torch.linalg.slogdet(jacobian)[1]
        got = inflated(q, scale).log_prob(g(eps))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert abs(float(got - q.log_prob(g(eps)))) > 0.05


@pytest.mark.parametrize("proposal", PROPOSALS, ids=IDS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_mean_weight_is_unbiased(proposal, k):
    """20,000 estimates of one p(x), each from so few draws that any wrong share would show."""
    vae = linear_gaussian(shift=0.1, widen=1.1)
    x = marginal(vae).sample((1,)).expand(20_000, -1)
    parts = estimate(vae.model, vae.guide, x, k, chunk=k, proposal=proposal)
    ratio = torch.exp(parts.log_likelihood - marginal(vae).log_prob(x))
    se = float(ratio.std()) / math.sqrt(len(x))
    assert se < 0.015
    assert abs(float(ratio.mean()) - 1) < 5 * se


@pytest.mark.parametrize("proposal", PROPOSALS, ids=IDS)
def test_a_program_of_several_sites_is_inflated_as_a_whole(proposal):
    model, guide = two_layers(shift=0.3)
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    truth = dist.Normal(torch.zeros((), dtype=torch.float64), 3**0.5).log_prob(x)
    parts = estimate(model, guide, x, 20_001, chunk=4000, proposal=proposal)
    assert ((parts.log_likelihood - truth).abs() < 5 * parts.mc_error).all()
    assert (parts.mc_error < 0.02).all()


@pytest.mark.parametrize("proposal", PROPOSALS, ids=IDS)
@pytest.mark.parametrize("name", posteriors.REGISTRY)
def test_every_posterior_family_meets_the_closed_form(proposal, name):
    vae = linear_gaussian()
    with torch.no_grad():
        vae.decoder.weight.mul_(0.2)  # a posterior near the prior, which any family can cover
    vae.posterior = posteriors.REGISTRY[name](networks.MLPEncoder((6,), hidden=(8,)), 3).double()
    with torch.no_grad():
        vae.posterior.head.weight.mul_(0.3)
    x = marginal(vae).sample((10,))
    parts = estimate(vae.model, vae.guide, x, 10_000, chunk=2000, proposal=proposal)
    error = (parts.log_likelihood - marginal(vae).log_prob(x)).abs()
    trusted = parts.pareto_k < 0.7
    assert trusted.sum() > 5
    assert (error < 5 * parts.mc_error)[trusted].all()


def test_a_guide_that_is_too_narrow_is_rescued():
    vae = linear_gaussian(latent_dim=2, widen=0.5)
    x = marginal(vae).sample((40,))
    split, truth = data.fixed(x).test, marginal(vae).log_prob(x)
    narrow = evaluate(vae, split, 4000)
    assert narrow.pareto_k_above_0_7 > 0.5
    assert "for the others log p(x) is likely higher" in narrow.trust
    # the error bar of the narrow guide misses the truth: it cannot know of the tail
    off = (narrow.per_image.log_likelihood - truth).abs() / narrow.per_image.mc_error
    assert float(off.max()) > 5
    rescued = evaluate(vae, split, 4000, proposal=Proposal("defensive", 3.0))
    images = rescued.per_image
    assert rescued.pareto_k_above_0_7 == 0
    assert "can be trusted" in rescued.trust
    assert ((images.log_likelihood - truth).abs() < 5 * images.mc_error).all()
    assert rescued.proposal in str(rescued)


def test_what_speaks_of_the_guide_does_not_move_with_the_proposal():
    vae = linear_gaussian(shift=0.1)
    split = data.fixed(marginal(vae).sample((7,))).test
    guide = evaluate(vae, split, PARTICLE_BLOCK)
    for proposal in PROPOSALS[1:]:
        other = evaluate(vae, split, 200, proposal=proposal)
        assert other.elbo == pytest.approx(guide.elbo, rel=1e-12)
        assert other.rate == pytest.approx(guide.rate, rel=1e-12)
        assert other.curve[0].bound < guide.elbo - 0.01  # the bound of the proposal itself


@pytest.mark.parametrize("proposal", PROPOSALS[1:], ids=IDS[1:])
def test_weights_do_not_depend_on_chunk_or_batch(proposal):
    vae = linear_gaussian(shift=0.1)
    x = marginal(vae).sample((IMAGE_BLOCK + 5,))

    def weights(part, chunk, k, first=0):
        terms = chunks(
            vae.model,
            vae.guide,
            part,
            k,
            chunk=chunk,
            seed=0,
            first_image=first,
            proposal=proposal,
        )
        return torch.cat([t.log_weights for t in terms])

    for k in (1, PARTICLE_BLOCK - 1, PARTICLE_BLOCK, PARTICLE_BLOCK + 1, 3 * PARTICLE_BLOCK + 7):
        whole = weights(x, k, k)
        assert whole.shape == (k, len(x))
        for chunk in (7, PARTICLE_BLOCK):
            torch.testing.assert_close(weights(x, chunk, k), whole, rtol=1e-12, atol=1e-12)
        cut = torch.cat([weights(x[i : i + 9], 50, k, i) for i in range(0, len(x), 9)], 1)
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)


def test_particles_take_turns_whatever_their_chunk():
    whole = torch.ones(6, 2, 3)
    defensive = Proposal("defensive", 2.0)
    assert defensive.inflate(whole, range(6))[:, 0, 0].tolist() == [1, 2, 1, 2, 1, 2]
    assert defensive.inflate(whole[:3], range(3, 6))[:, 0, 0].tolist() == [2, 1, 2]
    noise = Noise(0, range(2), range(5), Proposal("wide", 2.0))
    plain = noise._replace(proposal=Proposal())
    like = torch.zeros((), dtype=torch.float64)
    doubled = noise.draw("z", torch.Size([3]), like)
    torch.testing.assert_close(doubled, 2 * plain.draw("z", torch.Size([3]), like))


def test_the_defensive_weight_is_bounded_by_the_guides():
    vae = linear_gaussian(shift=0.2)
    x = marginal(vae).sample((4,))
    ours, guides = (
        next(chunks(vae.model, vae.guide, x, 10, chunk=10, seed=0, proposal=p)).log_weights[::2]
        for p in (PROPOSALS[2], PROPOSALS[0])
    )
    assert (ours <= guides + math.log(2) + 1e-12).all()


def test_the_cost_of_inflating_is_as_the_docstring_says():
    vae = linear_gaussian(latent_dim=2, seed=3)
    x = marginal(vae).sample((4,))
    proposal = Proposal("wide", 1.5)
    parts = estimate(vae.model, vae.guide, x, 40_000, chunk=8000, proposal=proposal)
    share = 1 / (1 + parts.mc_error**2 * 40_000)
    expected = (math.sqrt(2 * 1.5**2 - 1) / 1.5**2) ** 2
    assert expected == pytest.approx(0.69, abs=0.005)
    assert (math.sqrt(2 * 1.1**2 - 1) / 1.1**2) ** 50 == pytest.approx(0.47, abs=0.005)
    assert (math.sqrt(2 * 1.5**2 - 1) / 1.5**2) ** 50 == pytest.approx(1e-4, rel=0.1)
    torch.testing.assert_close(share, torch.full_like(share, expected), rtol=0.02, atol=0)


@pytest.mark.parametrize("proposal", PROPOSALS[1:], ids=IDS[1:])
def test_a_guide_that_is_not_made_of_normals_is_refused(proposal):
    model, guide = gamma_programs()
    x = torch.arange(5, dtype=torch.float64)
    assert plan(model, guide, x, 10, proposal=proposal).images == IMAGE_BLOCK
    with pytest.raises(InputError, match=r"site 'z' is a Gamma; use --proposal guide"):
        estimate(model, guide, x, 10, chunk=5, proposal=proposal)


def test_a_later_site_that_is_no_normal_is_refused_too():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Normal(x, 1.0))
            pyro.sample("b", dist.Laplace(x, 1.0))

    with pytest.raises(InputError, match="site 'b' is a Laplace"):
        estimate(guide, guide, torch.zeros(2), 3, chunk=3, proposal=PROPOSALS[1])


@pytest.mark.parametrize(
    ("kind", "scale", "message"),
    [
        ("widen", None, "expects one of guide, wide, defensive; got 'widen'.*did you mean 'wide'"),
        ("wide", 1.0, "expects a number above 1; got 1.0"),
        ("defensive", math.nan, "expects a number above 1; got nan"),
        ("wide", math.inf, "above 1"),
        ("guide", 1.5, "'guide' is not inflated.*leave --proposal-scale out"),
    ],
)
def test_refusals(kind, scale, message):
    with pytest.raises(InputError, match=message):
        Proposal(kind, scale)


def test_default_scale():
    assert Proposal("wide").scale == 1.5
    assert Proposal().scale is None
