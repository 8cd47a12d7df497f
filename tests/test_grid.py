"""Every flag value trains a step; every pair that means nothing is refused with a remedy."""

import itertools
import math

import pytest
import torch
from tiny import tiny_config, tiny_data

from pyrovae import config as cfg
from pyrovae import likelihoods, networks, objectives, posteriors, priors
from pyrovae.errors import InputError
from pyrovae.training import fit

pytestmark = pytest.mark.usefixtures("soon_started")

SMALL = {
    "prior_args": {"mixture": {"components": 3}, "vamp": {"components": 3}},
    "posterior_args": {"flow": {"hidden": (8,)}},
    "likelihood_args": {"discretized-logistic-mixture": {"components": 2}},
}
GRID = list(
    itertools.product(
        cfg.NAMES["likelihood"],
        cfg.NAMES["prior"],
        cfg.NAMES["posterior"],
        cfg.NAMES["objective"],
    )
)


def settings(likelihood, prior, posterior, objective):
    return {
        "likelihood": likelihood,
        "likelihood_args": SMALL["likelihood_args"].get(likelihood, {}),
        "prior": prior,
        "prior_args": SMALL["prior_args"].get(prior, {}),
        "posterior": posterior,
        "posterior_args": SMALL["posterior_args"].get(posterior, {}),
        "objective": objective,
        "num_particles": 2 if objective in ("iwae", "dreg") else 1,
    }


def is_valid(likelihood, prior, posterior, objective):
    closed = priors.REGISTRY[prior].closed_form_kl and posteriors.REGISTRY[posterior].closed_form_kl
    return objective != "mean-field" or closed


def train_one_step(config, shape=(1, 4, 4)):
    data = tiny_data(config, n=20, shape=shape)
    vae = cfg.build(config, data)
    before = {n: p.detach().clone() for n, p in vae.named_parameters()}
    objective = objectives.REGISTRY[config.objective](config.num_particles)
    history = fit(vae, data, objective=objective, epochs=1, batch_size=16, progress=False)
    assert math.isfinite(history.metrics[0]["train_loss"])
    assert math.isfinite(history.best_elbo)
    still = [n for n, p in vae.named_parameters() if torch.equal(p, before[n])]
    assert still == []
    return vae


@pytest.mark.parametrize("pair", [g for g in GRID if is_valid(*g)], ids="-".join)
def test_every_valid_combination_trains_every_parameter(pair):
    train_one_step(tiny_config(**settings(*pair)))


@pytest.mark.parametrize(
    "pair", [g for g in GRID if not is_valid(*g) and g[0] == "bernoulli"], ids="-".join
)
def test_every_other_combination_is_refused_with_a_remedy(pair):
    with pytest.raises(InputError, match=r"closed form.*use --objective elbo"):
        tiny_config(**settings(*pair))


SHAPES = {
    "mlp": (1, 4, 4),
    "gated-mlp": (3, 4, 4),
    "conv28": (1, 28, 28),
    "conv64": (3, 64, 64),
    "residual": (3, 8, 8),
    "gated-conv": (1, 8, 8),
}


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized-logistic-mixture"])
@pytest.mark.parametrize("network", cfg.NAMES["network"])
def test_every_network_trains(network, likelihood):
    config = tiny_config(
        **settings(likelihood, "standard-normal", "mean-field", "elbo"), network=network
    )
    train_one_step(config, SHAPES[network])


def test_channel_coupling_trains_on_colour_and_is_refused_on_grey():
    config = tiny_config(
        likelihood="discretized-logistic-mixture",
        likelihood_args={"components": 2, "coupling": True},
    )
    train_one_step(config, (3, 4, 4))
    with pytest.raises(InputError, match="coupling"):
        cfg.build(config, tiny_data(config))


@pytest.mark.parametrize("scale", [0.3, "learned", "per-pixel"])
@pytest.mark.parametrize("likelihood", ["gaussian", "laplace", "student-t", "logit-normal"])
def test_every_scale_trains(likelihood, scale):
    train_one_step(tiny_config(likelihood=likelihood, likelihood_args={"scale": scale}))


@pytest.mark.parametrize("name", cfg.NAMES["activation"])
def test_every_activation_trains(name):
    train_one_step(tiny_config(activation=name))


@pytest.mark.parametrize("binarize", ["dynamic", "static", "threshold"])
def test_every_binarisation_trains(binarize):
    train_one_step(tiny_config(binarize=binarize))


DENSITIES = [n for n, c in likelihoods.REGISTRY.items() if c.kind == "density"]
MASSES = [n for n, c in likelihoods.REGISTRY.items() if c.kind == "mass"]


@pytest.mark.parametrize("likelihood", MASSES)
def test_a_mass_of_dequantised_data_is_refused(likelihood):
    changes = {"binarize": "none"} if likelihood == "bernoulli" else {}
    with pytest.raises(InputError, match="leave --dequantize at auto"):
        tiny_config(likelihood=likelihood, dequantize="uniform", **changes)


@pytest.mark.parametrize("likelihood", DENSITIES)
def test_a_density_of_binary_data_is_refused(likelihood):
    with pytest.raises(InputError, match="--likelihood bernoulli"):
        tiny_config(likelihood=likelihood, binarize="dynamic")


@pytest.mark.parametrize("objective", ["elbo", "mean-field"])
def test_auto_is_resolved_by_the_likelihood(objective):
    for name in cfg.NAMES["likelihood"]:
        config = tiny_config(likelihood=name, objective=objective)
        assert config.binarize == ("dynamic" if name == "bernoulli" else "none")
        assert config.dequantize == ("uniform" if name in DENSITIES else "none")


def test_the_grid_is_the_registries():
    assert tuple(likelihoods.REGISTRY) == cfg.NAMES["likelihood"]
    assert tuple(priors.REGISTRY) == cfg.NAMES["prior"]
    assert tuple(posteriors.REGISTRY) == cfg.NAMES["posterior"]
    assert tuple(networks.REGISTRY) == cfg.NAMES["network"]
    assert set(networks.ACTIVATIONS) == set(cfg.NAMES["activation"])
    assert set(SHAPES) == set(networks.REGISTRY)
