"""Objectives are Pyro's own; handlers change the KL term and nothing else."""

import itertools
import math

import pyro
import pytest
import torch
from exact import linear_gaussian, marginal
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from tiny import tiny_data, tiny_hierarchy, tiny_vae
from torch.distributions import kl_divergence

from pyrovae import config, importance, objectives
from pyrovae.errors import InputError
from pyrovae.importance import log_mean_exp, log_terms, log_weights
from pyrovae.pathwise import DoublyReparameterized, StickingTheLanding


@pytest.fixture(autouse=True)
def scoped():
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(0)
        yield


@pytest.fixture
def vae_x():
    vae, data = tiny_vae()
    return vae, data.test.tensor()


def loss_and_grads(vae, loss, seed=0):
    """The value of ``loss()`` with a fixed random stream, and the gradient it leaves."""
    vae.zero_grad()
    torch.manual_seed(seed)
    value = loss()
    if isinstance(value, torch.Tensor):
        value.backward()
        value = float(value.detach())
    return value, {n: p.grad.clone() for n, p in vae.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, rtol=1e-4):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    assert len(ours[1]) > 0
    for name, grad in ours[1].items():
        torch.testing.assert_close(grad, theirs[1][name], rtol=rtol, atol=1e-4)


def test_registry_names_and_types():
    assert tuple(objectives.REGISTRY) == config.NAMES["objective"]
    kinds = {name: type(make(2)) for name, make in objectives.REGISTRY.items()}
    assert kinds == {
        "elbo": Trace_ELBO,
        "mean-field": TraceMeanField_ELBO,
        "iwae": RenyiELBO,
        "stl": StickingTheLanding,
        "dreg": DoublyReparameterized,
    }
    assert objectives.iwae(3).alpha == 0
    with pytest.raises(InputError, match="at least 1"):
        objectives.elbo(0)


@pytest.mark.parametrize("k", [1, 4])
def test_elbo_equals_the_mean_of_log_weights(vae_x, k):
    vae, x = vae_x
    pyros = objectives.elbo(k)
    theirs = loss_and_grads(vae, lambda: pyros.loss_and_grads(vae.model, vae.guide, x))
    ours = loss_and_grads(vae, lambda: -log_weights(vae.model, vae.guide, x, k).mean(0).sum())
    assert_same(ours, theirs)


@pytest.mark.parametrize("k", [1, 4])
def test_iwae_equals_the_log_mean_weight(vae_x, k):
    vae, x = vae_x
    pyros = objectives.iwae(k)
    theirs = loss_and_grads(vae, lambda: pyros.loss_and_grads(vae.model, vae.guide, x))
    ours = loss_and_grads(vae, lambda: -log_mean_exp(log_weights(vae.model, vae.guide, x, k)).sum())
    assert_same(ours, theirs)


@pytest.mark.parametrize("posterior", ["mean-field", "full-rank"])
def test_mean_field_equals_distortion_plus_closed_form_kl(posterior):
    vae, data = tiny_vae(posterior=posterior)
    x = data.test.tensor()
    pyros = objectives.mean_field(4)
    theirs = loss_and_grads(vae, lambda: pyros.loss_and_grads(vae.model, vae.guide, x))

    def loss():
        terms = log_terms(vae.model, vae.guide, x, 4)
        kl = kl_divergence(vae.posterior(x), vae.prior().expand([len(x)]))
        return (kl - terms.log_likelihood.mean(0)).sum()

    assert_same(loss_and_grads(vae, loss), theirs)


def test_mean_field_objective_has_no_noise_from_the_kl(vae_x):
    """With x cut off, the closed form is the same for every draw; Monte Carlo is not."""
    vae, x = vae_x

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", vae.prior())

    def spread(loss):
        values = [loss.loss(model, vae.guide, x) for _ in range(5)]
        return max(values) - min(values)

    assert spread(objectives.elbo()) > 1e-3
    assert spread(objectives.mean_field()) == 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("objective", ["elbo", "mean-field"])
def test_kl_weight_weighs_the_kl_term_alone(vae_x, beta, objective):
    vae, x = vae_x
    pyros = objectives.REGISTRY[objective](3)
    weight = objectives.KLWeight(beta)
    model, guide = objectives.with_handlers(vae.model, vae.guide, pyros, weight=weight)
    theirs = loss_and_grads(vae, lambda: pyros.loss_and_grads(model, guide, x))

    def loss():
        terms = log_terms(vae.model, vae.guide, x, 3)
        kl = (terms.log_posterior - terms.log_prior).mean(0)
        if objective == "mean-field":
            kl = kl_divergence(vae.posterior(x), vae.prior().expand([len(x)]))
        return (beta * kl - terms.log_likelihood.mean(0)).sum()

    ours = loss_and_grads(vae, loss)
    theirs[1].update({n: theirs[1].get(n, torch.zeros_like(g)) for n, g in ours[1].items()})
    assert_same(ours, theirs)


def test_kl_weight_changes_between_steps_in_place(vae_x):
    vae, x = vae_x
    pyros = objectives.elbo()
    weight = objectives.KLWeight(0.0)
    tensor = weight.value
    model, guide = objectives.with_handlers(vae.model, vae.guide, pyros, weight=weight)

    def loss():
        torch.manual_seed(0)
        return pyros.loss(model, guide, x)

    values = []
    for beta in (0.0, 0.5, 1.0):
        weight.set(beta)
        values.append(loss())
    assert weight.value is tensor
    assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-4)
    assert values[2] != pytest.approx(values[0])


@pytest.mark.parametrize("objective", ["elbo", "mean-field"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_free_bits_put_a_floor_under_the_kl(vae_x, objective, beta):
    vae, x = vae_x
    with torch.no_grad():  # a posterior that says something
        vae.posterior.head.weight.mul_(5.0)
    pyros = objectives.REGISTRY[objective](2)

    def kl_and_distortion():
        terms = log_terms(vae.model, vae.guide, x, 2)
        kl = (terms.log_posterior - terms.log_prior).mean()
        if objective == "mean-field":
            kl = kl_divergence(vae.posterior(x), vae.prior().expand([len(x)])).mean()
        return kl, -terms.log_likelihood.mean()

    torch.manual_seed(0)
    rate = float(kl_and_distortion()[0].detach())
    assert rate > 0.01
    for floor in (0.5 * rate, 2 * rate):
        weight = objectives.KLWeight(beta)
        model, guide = objectives.with_handlers(
            vae.model, vae.guide, pyros, weight=weight, free_nats=floor
        )
        theirs = loss_and_grads(vae, lambda m=model, g=guide: pyros.loss_and_grads(m, g, x))

        def loss(floor=floor):
            kl, distortion = kl_and_distortion()
            return len(x) * (beta * torch.clamp(kl, min=floor) + distortion)

        ours = loss_and_grads(vae, loss)
        assert_same(ours, theirs)


@pytest.mark.parametrize("structure", ["bottom-up", "top-down"])
def test_each_layer_of_a_hierarchy_has_its_free_bits(structure):
    settings = tiny_hierarchy(structure)
    data = tiny_data(settings)
    vae, x = config.build(settings, data), data.test.tensor()
    with torch.no_grad():  # layers that say something
        for p in vae.parameters():
            p.mul_(3)

    def parts():
        """The KL of each site, averaged over the batch, and the distortion."""
        guide = poutine.trace(vae.guide).get_trace(x)
        model = poutine.trace(poutine.replay(vae.model, guide)).get_trace(x)
        guide.compute_log_prob()
        model.compute_log_prob()
        sites = [n for n, s in guide.nodes.items() if s["type"] == "sample" and n in model.nodes]
        sites = [n for n in sites if n != "data"]
        kl = {n: (guide.nodes[n]["log_prob"] - model.nodes[n]["log_prob"]).mean() for n in sites}
        return kl, -model.nodes["x"]["log_prob"].mean()

    torch.manual_seed(0)
    low, high = sorted(float(kl.detach()) for kl in parts()[0].values())
    floor = (low + high) / 2  # one layer pays the floor, the other what it costs
    assert high > low + 0.01 and floor > 0
    pyros = objectives.elbo()
    model, guide = objectives.with_handlers(vae.model, vae.guide, pyros, free_nats=floor)
    theirs = loss_and_grads(vae, lambda: pyros.loss_and_grads(model, guide, x))

    def loss():
        kl, distortion = parts()
        return len(x) * (sum(k.clamp(min=floor) for k in kl.values()) + distortion)

    assert_same(loss_and_grads(vae, loss), theirs)


def test_evaluation_cannot_see_the_handlers(vae_x):
    vae, x = vae_x
    weight = objectives.KLWeight(0.0)
    model, guide = objectives.with_handlers(
        vae.model, vae.guide, objectives.elbo(), weight=weight, free_nats=0.0
    )

    def weights(model, guide):
        terms = importance.chunks(model, guide, x, 5, chunk=5, seed=0)
        return torch.cat([t.log_weights for t in terms])

    assert torch.equal(weights(model, guide), weights(vae.model, vae.guide))


def test_settings_of_the_kl_term_are_refused_by_the_bound_that_has_none(vae_x):
    vae, _ = vae_x
    with pytest.raises(InputError, match=r"--free-bits .*iwae"):
        objectives.with_handlers(vae.model, vae.guide, objectives.iwae(), free_nats=1.0)
    with pytest.raises(InputError, match="at least 0"):
        objectives.with_handlers(vae.model, vae.guide, objectives.elbo(), free_nats=-1.0)


def test_iwae_rises_with_particles():
    vae = linear_gaussian(shift=0.3, widen=1.5)
    x = marginal(vae).sample((200,))

    def bound(k):
        values = torch.tensor([-objectives.iwae(k).loss(vae.model, vae.guide, x) for _ in range(8)])
        return values.mean(), values.std() / math.sqrt(8)

    results = [bound(k) for k in (1, 5, 50)]
    for (low, a), (high, b) in itertools.pairwise(results):
        assert high - low > 3 * (a + b)
    assert results[-1][0] < marginal(vae).log_prob(x).sum()
