"""The VAE's own promises: wiring, programs, drawing, names, copies."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import Affine, FixedNoise, linear_gaussian
from pyro import poutine
from tiny import tiny_config, tiny_data, tiny_vae
from torch import nn

from pyrovae import config as cfg
from pyrovae import likelihoods, networks, posteriors, priors
from pyrovae.errors import InputError
from pyrovae.vae import VAE

X = (1, 4, 4)


def parts(**changes):
    likelihood = changes.pop("likelihood", likelihoods.Bernoulli(X))
    default = {
        "prior": priors.StandardNormal(2),
        "posterior": posteriors.MeanField(networks.MLPEncoder(X, hidden=(8,)), 2),
        "decoder": networks.MLPDecoder(2, likelihood.params_shape, hidden=(8,)),
        "likelihood": likelihood,
    }
    return default | changes


class EventlessPrior(priors.StandardNormal):
    def forward(self):
        return super().forward().base_dist


class WrongEvent(likelihoods.Bernoulli):
    def forward(self, params):
        return super().elementwise(params.movedim(1, 0))


MISFITS = {
    "prior_dim": ({"prior": priors.StandardNormal(3)}, "same latent_dim"),
    "prior_event": ({"prior": EventlessPrior(2)}, r"\.to_event\(1\)"),
    "decoder_latent": (
        {"decoder": networks.MLPDecoder(5, (1, *X), hidden=(8,))},
        "same latent_dim|prior's latent_dim",
    ),
    "decoder_out": (
        {"decoder": networks.MLPDecoder(2, (2, *X), hidden=(8,))},
        "out_shape=likelihood.params_shape",
    ),
    "encoder_x": (
        {"posterior": posteriors.MeanField(networks.MLPEncoder((1, 5, 5), hidden=(8,)), 2)},
        "x_shape",
    ),
    "likelihood_event": ({"likelihood": WrongEvent(X)}, "elementwise"),
    "plain_decoder": ({"decoder": nn.Linear(3, 16)}, "prior's latent_dim"),
}


@pytest.mark.parametrize("changes,remedy", MISFITS.values(), ids=MISFITS)
def test_parts_that_do_not_fit_are_refused_with_a_remedy(changes, remedy):
    with pytest.raises(InputError, match=remedy) as caught:
        VAE(**parts(**changes))
    assert "\n" not in str(caught.value)


def test_programs_have_the_promised_sites_and_shapes():
    vae, data = tiny_vae()
    x = data.test.tensor()
    with pyro.get_param_store().scope():
        guide = poutine.trace(vae.guide).get_trace(x)
        model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
        assert model.nodes["z"]["fn"].batch_shape == (len(x),)
        assert model.nodes["z"]["fn"].event_shape == (2,)
        assert model.nodes["x"]["fn"].event_shape == data.x_shape
        assert model.nodes["x"]["is_observed"]
        model.compute_log_prob()
        assert model.nodes["x"]["log_prob"].shape == (len(x),)


def test_generate_reconstruct_encode_and_decode():
    vae, data = tiny_vae()
    x = data.test.tensor()
    drawn = vae.generate(5, seed=0)
    assert drawn.shape == (5, *data.x_shape)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(drawn, vae.generate(5, seed=0))
    assert not torch.equal(drawn, vae.generate(5, seed=1))
    means = vae.generate(5, mean=True, seed=0)
    assert ((means > 0) & (means < 1)).all()
    assert vae.encode(x).shape == (len(x), 2)
    assert vae.decode(vae.encode(x)).shape == x.shape
    assert vae.reconstruct(x, seed=0).shape == x.shape
    assert vae.decode(torch.zeros(3, 2, 2)).shape == (3, 2, *data.x_shape)
    assert not any(t.requires_grad for t in (drawn, means, vae.encode(x)))


def test_generation_follows_the_model():
    """x of a linear-Gaussian model has mean b and covariance W W' + sigma^2."""
    vae = linear_gaussian()
    n = 100_000
    x = vae.generate(n, seed=0)
    W, b = vae.decoder.weight.detach(), vae.decoder.bias.detach()
    covariance = W @ W.T + FixedNoise.sigma**2 * torch.eye(6, dtype=W.dtype)
    se = torch.sqrt(covariance.diagonal() / n)
    assert ((x.mean(0) - b).abs() < 5 * se).all()
    d = covariance.diagonal()
    spread = torch.sqrt((torch.outer(d, d) + covariance**2) / n)
    assert ((torch.cov(x.T) - covariance).abs() < 5 * spread).all()


def test_a_seed_leaves_the_callers_stream_alone_and_none_uses_it():
    vae, _ = tiny_vae()
    before = torch.get_rng_state()
    vae.generate(3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    vae.generate(3)
    assert not torch.equal(torch.get_rng_state(), before)


def test_posterior_mean_of_a_flow_is_averaged():
    vae, data = tiny_vae(posterior="flow")
    x = data.test.tensor()
    a, b = vae.encode(x, num_samples=4000, seed=0), vae.encode(x, num_samples=4000, seed=1)
    assert not torch.equal(a, b)
    assert (a - b).abs().max() < 10 * (2 / 4000) ** 0.5


def test_programs_have_names_of_their_own_copies_too():
    vae, _ = tiny_vae()
    names = {
        v.program_name
        for v in (vae, tiny_vae()[0], copy.deepcopy(vae), pickle.loads(pickle.dumps(vae)))
    }
    assert len(names) == 4


def test_custom_modules_fit():
    decoder = Affine(torch.randn(4, 2), torch.zeros(4))
    vae = VAE(
        prior=priors.StandardNormal(2),
        posterior=posteriors.MeanField(networks.MLPEncoder((4,), hidden=(8,)), 2),
        decoder=decoder,
        likelihood=FixedNoise((4,)),
    )
    assert vae.x_shape == (4,)
    assert vae.latent_dim == 2
    assert vae.generate(2).shape == (2, 4)


def test_initialize_starts_a_bernoulli_at_the_mean_image():
    vae, data = tiny_vae()
    x = data.train.batch(torch.arange(len(data.train)), torch.Generator().manual_seed(0))
    vae.initialize(x, steps=300)
    start = torch.sigmoid(vae.decoder.layers[-1].bias.detach()).reshape(data.x_shape)
    inside = (x.mean(0) > 0.1) & (x.mean(0) < 0.9)
    assert inside.any()
    assert ((start - x.mean(0)).abs()[inside] < 0.01).all()
    assert torch.isfinite(start).all()


@pytest.mark.parametrize("likelihood", likelihoods.REGISTRY)
def test_initialize_never_makes_the_data_less_likely(likelihood):
    vae, data = tiny_vae(likelihood=likelihood)
    x = data.train.batch(torch.arange(len(data.train)), torch.Generator().manual_seed(0))
    z = torch.randn(len(x), 2, generator=torch.Generator().manual_seed(1))

    def log_prob():
        with torch.no_grad():
            return float(vae.likelihood(vae.decoder(z)).log_prob(x).mean())

    vae.decoder.start_at(torch.zeros(vae.likelihood.params_shape))
    before = log_prob()
    torch.manual_seed(0)
    vae.initialize(x)
    assert log_prob() >= before - 0.5
    assert all(p.requires_grad and p.grad is None for p in vae.parameters())


def test_initialize_finds_parameters_on_their_own_scales():
    """A black dequantised pixel wants a logit of -256, a middling one of 0; both are found."""
    vae, data = tiny_vae(likelihood="continuous-bernoulli")
    x = torch.rand(200, *data.x_shape, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0] /= 256
    vae.initialize(x)
    start = vae.likelihood(vae.decoder.layers[-1].bias.detach().unflatten(0, (1, *data.x_shape)))
    assert torch.allclose(start.mean, x.mean(0), rtol=0.3, atol=0.01)
    assert float(start.mean[0, 0].max()) < 1 / 256


def test_initialize_quietens_a_decoder_whose_noise_would_cost_more_than_the_start_gains():
    vae, data = tiny_vae(likelihood="gaussian", likelihood_args={"scale": "per-pixel"})
    x = 0.5 + 1e-3 * torch.randn(200, *data.x_shape, generator=torch.Generator().manual_seed(0))
    weight = vae.decoder.layers[-1].weight
    size = float(weight.detach().norm())
    vae.initialize(x)
    assert 0 < float(weight.detach().norm()) <= 0.11 * size
    exact = dist.Normal(x.mean(0), x.std(0)).log_prob(x).sum((1, 2, 3)).mean()
    with torch.no_grad():
        started = vae.likelihood(vae.decoder(torch.randn(200, 2))).log_prob(x).mean()
    assert float(started) > 0.85 * float(exact)


def test_initialize_keeps_the_old_start_where_the_new_one_is_worse(monkeypatch):
    vae, data = tiny_vae(likelihood="gaussian", likelihood_args={"scale": 1e-3})
    x = data.train.batch(torch.arange(20), torch.Generator().manual_seed(0))
    original = vae.decoder.start_at
    monkeypatch.setattr(vae.decoder, "start_at", lambda p, shrink: original(p * 100, shrink))
    vae.initialize(x)
    assert not vae.decoder.layers[-1].bias.any()


def test_initialize_leaves_a_convolutional_decoder_alone():
    config = tiny_config(network="residual", hidden=(4,))
    data = tiny_data(config, shape=(1, 8, 8))
    vae = cfg.build(config, data)
    assert not vae.decoder.layers[-1].bias.any()
