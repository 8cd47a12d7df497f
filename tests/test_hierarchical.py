"""A VAE with several layers: exact where everything is Gaussian, and served by every command."""

import copy
import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import FixedNoise
from shell import GREY, drawn, ok, shell
from tiny import tiny_config, tiny_data, tiny_hierarchy, tiny_vae
from torch import nn

import pyrovae as pv
from pyrovae import config as cfg
from pyrovae import hierarchical, likelihoods, objectives, pictures, priors
from pyrovae.data import fixed
from pyrovae.errors import InputError
from pyrovae.hierarchical import HierarchicalVAE
from pyrovae.importance import log_terms, log_weights
from pyrovae.layers import Layers, stack
from pyrovae.quadrature import quadrature

pytestmark = pytest.mark.usefixtures("soon_started")

STRUCTURES = hierarchical.STRUCTURES


@pytest.fixture(autouse=True)
def scoped():
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(0)
        yield


def small(structure="bottom-up", **changes):
    """A hierarchical VAE of three and two latents, and its data."""
    config = tiny_hierarchy(structure, **changes)
    data = tiny_data(config)
    return cfg.build(config, data), data


# ------------------------------------------------------------------------- a hierarchy of normals


class Linear(nn.Module):
    """N(A z + c, Sigma); or, with an ``encoder`` that reads two inputs, of both end to end."""

    def __init__(self, a, c, covariance):
        super().__init__()
        self.a, self.c = nn.Parameter(a), nn.Parameter(c)
        self.register_buffer("tril", torch.linalg.cholesky(covariance))

    def encoder(self, x, z):
        batch = torch.broadcast_shapes(x.shape[:-1], z.shape[:-1])
        return torch.cat([part.expand(*batch, -1) for part in (x, z)], -1)

    def distribution(self, h):
        return dist.MultivariateNormal(h @ self.a.T + self.c, scale_tril=self.tril)

    def forward(self, h):
        return self.distribution(h)


class AffineDecoder(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, z):
        return (z @ self.weight.T + self.bias).unsqueeze(-2)


def linear_hierarchy(structure, sizes=(3, 2, 2), features=4, shift=0.0):
    """A float64 hierarchy with the exact posterior as guide, and log p(x) as a distribution."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    eye = torch.eye(sum(sizes) + features, dtype=torch.float64)
    starts = [0, *itertools.accumulate(sizes)]
    parts = [slice(a, b) for a, b in itertools.pairwise([*starts, starts[-1] + features])]
    # Every variable is an affine function of the standard normal noise of those it comes from.
    mix, mean = torch.zeros_like(eye), torch.zeros(len(eye), dtype=torch.float64)
    mix[parts[len(sizes) - 1]] = eye[parts[len(sizes) - 1]]
    conditionals = []
    for i in reversed(range(len(sizes) - 1)):
        a, c = normal(sizes[i], sizes[i + 1]), normal(sizes[i])
        conditionals.insert(0, Linear(a, c, 0.25 * torch.eye(sizes[i], dtype=torch.float64)))
        mix[parts[i]] = a @ mix[parts[i + 1]] + 0.5 * eye[parts[i]]
        mean[parts[i]] = a @ mean[parts[i + 1]] + c
    read = sizes[:1] if structure == "bottom-up" else sizes
    weight, bias = normal(features, sum(read)), normal(features)
    x = parts[-1]
    mix[x] = weight @ mix[: sum(read)] + FixedNoise.sigma * eye[x]
    mean[x] = weight @ mean[: sum(read)] + bias
    covariance = mix @ mix.T

    def given(target, *known):
        known = torch.cat([torch.arange(len(eye))[k] for k in known])
        a = torch.linalg.solve(covariance[known][:, known], covariance[known][:, target]).T
        return Linear(
            a,
            mean[target] - a @ mean[known] + shift,
            covariance[target, target] - a @ covariance[known][:, target],
        )

    if structure == "bottom-up":
        posteriors = [given(b, a) for a, b in itertools.pairwise([x, *parts[:-1]])]
    else:
        posteriors = [given(part, x, *parts[i:-1]) for i, part in enumerate(parts[:-1], 1)]
    vae = HierarchicalVAE(
        prior=priors.StandardNormal(sizes[-1]).double(),
        conditionals=conditionals,
        posteriors=posteriors,
        decoder=AffineDecoder(weight, bias),
        likelihood=FixedNoise((features,)),
        structure=structure,
    )
    return vae, torch.distributions.MultivariateNormal(mean[x], covariance[x, x])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("sizes", [(3, 2), (3, 2, 2), (1, 2, 1, 2)])
def test_every_weight_is_p_x_when_the_guide_is_exact(structure, sizes):
    vae, marginal = linear_hierarchy(structure, sizes)
    x = marginal.sample((5,))
    weights = log_weights(vae.model, vae.guide, x, 7)
    truth = marginal.log_prob(x).expand(7, 5)
    torch.testing.assert_close(weights, truth, rtol=1e-10, atol=1e-9)
    assert {n: z.shape for n, z in log_terms(vae.model, vae.guide, x, 7).latents.items()} == {
        f"z{i + 1}": (7, 5, size) for i, size in enumerate(sizes)
    }


@pytest.mark.parametrize("structure", STRUCTURES)
def test_evaluation_of_a_moved_guide_is_right_within_its_error(structure):
    vae, marginal = linear_hierarchy(structure, shift=0.1)
    x = marginal.sample((20,))
    result = pv.evaluate(vae, fixed(x).test, 4000)
    images = result.per_image
    truth = marginal.log_prob(x)
    assert ((images.log_likelihood - truth).abs() < 5 * images.mc_error + 1e-6).all()
    assert (images.elbo < truth).all()
    # Its columns are in the order of `encode`, whose own error is that of 20,000 draws.
    ours = vae.encode(x, num_samples=20_000)
    error = images.posterior_mean_error.sqrt()
    assert ((images.posterior_mean - ours).abs() < 6 * error + 1e-6).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_generation_has_the_moments_of_the_model(structure):
    vae, marginal = linear_hierarchy(structure)
    n = 40_000
    x = vae.generate(n, seed=0)
    covariance = marginal.covariance_matrix
    assert ((x.mean(0) - marginal.mean).abs() < 5 * (covariance.diagonal() / n).sqrt()).all()
    # The variance of an element of a Gaussian's sample covariance.
    spread = (covariance.diagonal().outer(covariance.diagonal()) + covariance**2) / n
    assert ((x.T.cov() - covariance).abs() < 5 * spread.sqrt()).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_encoding_is_the_mean_of_the_posterior(structure):
    """Exactly so for the layer drawn first; the others average conditional means."""
    vae, marginal = linear_hierarchy(structure)
    x = marginal.sample((3,))
    z, again = vae.encode(x), vae.encode(x)
    assert torch.equal(z, again)
    first = vae.posteriors[0 if structure == "bottom-up" else -1](x).mean
    torch.testing.assert_close(z[:, : first.shape[1]], first, rtol=1e-12, atol=1e-12)
    draws = vae.infer(x.expand(40_000, *x.shape))
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((vae.encode(x, num_samples=40_000) - draws.mean(0)).abs() < 5 * 2**0.5 * error).all()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("objective", list(objectives.REGISTRY))
def test_bounds_do_not_pass_log_p_and_meet_it(structure, objective):
    """With the exact posterior every bound is log p(x), draw by draw but for the closed KL."""
    if (structure, objective) == ("bottom-up", "mean-field"):
        return
    vae, marginal = linear_hierarchy(structure)
    x = marginal.sample((3,))
    loss = objectives.REGISTRY[objective](4).loss(vae.model, vae.guide, x)
    tolerance = {"rel": 1e-9} if objective != "mean-field" else {"rel": 1.0}
    assert -loss == pytest.approx(float(marginal.log_prob(x).sum()), **tolerance)


def test_closed_form_kl_of_a_top_down_hierarchy_has_the_same_expectation():
    vae, marginal = linear_hierarchy("top-down", shift=0.2)
    x = marginal.sample((1,)).repeat(4000, 1)

    def bounds(objective):
        losses = [-objective.loss(vae.model, vae.guide, x) / len(x) for _ in range(20)]
        return np.mean(losses), np.std(losses, ddof=1) / math.sqrt(20)

    ours, theirs = bounds(objectives.mean_field()), bounds(objectives.elbo())
    assert abs(ours[0] - theirs[0]) < 5 * math.hypot(ours[1], theirs[1])
    assert math.hypot(ours[1], theirs[1]) < 0.05


# ------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("structure", STRUCTURES)
def test_total_probability_is_one(structure):
    """Over all images of four binary pixels, by integration over two layers of one latent."""
    layers = Layers(latents=(1, 1), structure=structure, upper_hidden=(4,))
    likelihood = likelihoods.Bernoulli((1, 2, 2))
    vae = stack(layers, likelihood, priors.StandardNormal(1), "mlp", hidden=(6,)).double()
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.mul_(5)
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).double().view(16, 1, 2, 2)
    truth = quadrature(vae.model, vae.guide, x, tolerance=1e-6).log_likelihood
    assert float(truth.exp().sum()) == pytest.approx(1, abs=1e-4)
    assert float(truth.std()) > 0.03
    sampled = log_weights(vae.model, vae.guide, x, 20_000).detach()
    estimate = sampled.logsumexp(0) - math.log(20_000)
    w = (sampled - estimate).exp()
    assert ((estimate - truth).abs() < 5 * w.std(0) / math.sqrt(20_000) + 1e-5).all()


CHOICES = [
    {"structure": structure, "prior": prior, "posterior": posterior}
    for structure in STRUCTURES
    for prior, posterior in [
        ("standard-normal", "mean-field"),
        ("mixture", "full-rank"),
        ("flow", "flow"),
        ("vamp", "mean-field"),
    ]
    if (structure, prior) != ("bottom-up", "vamp")
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(c.values()))
@pytest.mark.parametrize("objective", list(objectives.REGISTRY))
def test_every_objective_moves_every_parameter(choice, objective):
    structure = choice["structure"]
    closed = choice["prior"] == "standard-normal" and choice["posterior"] == "mean-field"
    if objective == "mean-field" and not (closed and structure == "top-down"):
        return
    options = {"prior_args": {"components": 4}} if choice["prior"] in ("mixture", "vamp") else {}
    vae, data = small(**choice, **options, objective=objective)
    before = {n: p.detach().clone() for n, p in vae.named_parameters()}
    history = pv.fit(
        vae, data, objective=objectives.REGISTRY[objective](2), epochs=2, progress=False
    )
    assert all(math.isfinite(m["train_loss"]) for m in history.metrics)
    still = {n for n, p in vae.named_parameters() if torch.equal(p, before[n])}
    assert still == set()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        ("gated-mlp", (1, 4, 4)),
        ("conv28", (1, 28, 28)),
        ("conv64", (3, 64, 64)),
        ("residual", (3, 8, 8)),
        ("gated-conv", (1, 8, 8)),
    ],
)
def test_networks(structure, network, shape):
    layers = Layers(latents=(5, 4, 3), structure=structure, upper_hidden=(7, 6))
    likelihood = likelihoods.Gaussian(shape, scale="per-pixel")
    hidden = (8,) * (4 if network == "conv64" else 2)
    vae = stack(layers, likelihood, priors.StandardNormal(3), network, hidden=hidden)
    assert vae.latents == (5, 4, 3)
    assert vae.latent_dim == 12
    assert vae.x_shape == shape
    x = torch.rand(6, *shape)
    assert vae.generate(2, seed=0).shape == (2, *shape)
    z = vae.encode(x)
    assert z.shape == (6, 12)
    assert torch.equal(vae.join(vae.split(z)), z)
    assert [part.shape[-1] for part in vae.split(z)] == [5, 4, 3]
    assert vae.decode(z).shape == x.shape
    assert vae.decode(z.expand(2, 6, 12), mean=False, seed=1).shape == (2, *x.shape)
    assert vae.reconstruct(x, seed=0).shape == x.shape
    assert vae.interpolate(x[:2], x[2:4], 5).shape == (2, 5, *shape)
    assert log_weights(vae.model, vae.guide, x, 3).shape == (3, 6)
    assert vae.encode(x.expand(2, *x.shape)).shape == (2, 6, 12)
    trace = pyro.poutine.trace(vae.guide).get_trace(x)
    assert tuple(n for n in trace.nodes if n.startswith("z")) == vae.sites


def linears(module):
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


def test_the_two_layers_of_the_iwae_paper():
    """784-200-200-z1(100)-100-100-z2(50), and the mirror of it."""
    vae = stack(
        Layers(), likelihoods.Bernoulli((1, 28, 28)), priors.StandardNormal(50), hidden=(200, 200)
    )
    up = [linears(posterior) for posterior in vae.posteriors]
    assert up == [
        [(784, 200), (200, 200), (200, 200)],  # the last: 100 means and 100 scales
        [(100, 100), (100, 100), (100, 100)],
    ]
    assert linears(vae.conditionals) == [(50, 100), (100, 100), (100, 200)]
    assert linears(vae.decoder) == [(100, 200), (200, 200), (200, 784)]
    assert repr(vae).startswith("HierarchicalVAE of x (1, 28, 28), bottom-up, latents (100, 50)")


def test_the_hierarchy_of_the_vampprior_paper():
    """Gated layers of 300; q(z1 | x, z2) reads x and z2 apart, then together."""
    layers = Layers((40, 40), "top-down", (300, 300))
    vae = stack(
        layers,
        likelihoods.Bernoulli((1, 28, 28)),
        lambda q: priors.VampPrior(q, (1, 28, 28), components=3),
        "gated-mlp",
    )
    encoder = vae.posteriors[0].encoder
    assert linears(encoder.of_x)[::2] == [(784, 300), (300, 300)]
    assert linears(encoder.of_z)[::2] == [(40, 300)]
    assert linears(encoder.joint)[::2] == [(600, 300)]
    assert linears(vae.decoder)[0] == (80, 300)
    assert vae.sites == ("z2", "z1")


def test_vampprior_on_top_is_the_mixture_of_the_top_posterior():
    vae, _ = small("top-down", prior="vamp", prior_args={"components": 5})
    z = torch.randn(4, 2)
    components = vae.posteriors[-1](vae.prior.pseudo_inputs)
    truth = components.log_prob(z.unsqueeze(1)).logsumexp(1) - math.log(5)
    torch.testing.assert_close(vae.prior().log_prob(z), truth)
    # They start from training images, and a copy's prior follows the copy's posterior.
    distance = torch.minimum(vae.prior.pseudo_inputs, 1 - vae.prior.pseudo_inputs)
    assert distance.max() < 0.1  # binarised, plus a little noise
    twin = copy.deepcopy(vae)
    assert twin.prior.posterior is twin.posteriors[-1]
    assert twin.program_name != vae.program_name


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_layer_follows_the_one_above_when_a_walk_moves_that(structure):
    vae, data = small(structure)
    with torch.no_grad():
        for parameter in [*vae.conditionals.parameters(), *vae.decoder.parameters()]:
            parameter.mul_(3)
    x = data.test.tensor()
    top = [d for d in range(5) if (d < 2) == (structure == "top-down")][-2:]
    if structure == "top-down":
        top = [0, 1]
    walk = pictures.traverse(vae, x, list(range(5)), steps=5)
    assert walk.x.shape == (5, 5, 1, 4, 4)
    spread = walk.x.std(1).flatten(1).amax(1)
    assert (spread > 1e-4).all()  # in both structures, every dimension shows
    z = vae.encode(x[:1])
    moved = vae.follow(z, top[0])
    (z1, z2), (w1, w2) = vae.split(z), vae.split(moved)
    assert torch.equal(z2, w2)
    torch.testing.assert_close(w1, vae.conditionals[0](z2).mean)
    bottom = next(d for d in range(5) if d not in top)
    assert torch.equal(vae.follow(z, bottom), z)
    assert not torch.equal(z1, w1)


def test_walks_are_as_long_as_the_joint_prior_is_wide():
    vae, _ = linear_hierarchy("bottom-up")
    centre, scale = pictures.prior_moments(vae, 40_000)
    assert centre.shape == (7,)
    # z3 is a standard normal; z2 = A z3 + c + 0.5 noise.
    torch.testing.assert_close(scale[5:], torch.ones(2).double(), rtol=0.03, atol=0)
    a = vae.conditionals[1].a.detach()
    torch.testing.assert_close(scale[3:5], ((a**2).sum(1) + 0.25).sqrt(), rtol=0.03, atol=0)


REFUSED = {
    "one layer": ({"latents": (3,)}, {}, "at least 2"),
    "a layer of nothing": ({"latents": (3, 0)}, {}, "positive"),
    "another structure": ({"structure": "sideways"}, {}, "one of bottom-up, top-down"),
    "an unknown option": ({"latent": (3, 2)}, {}, "did you mean 'latents'"),
    "vamp from below": ({}, {"prior": "vamp"}, "structure=top-down, or another --prior"),
    "mean field from below": ({}, {"objective": "mean-field"}, "or another --objective"),
    "one dimension": ({}, {"latent_dim": 20}, "leave it out"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_in_one_line(name):
    args, changes, message = REFUSED[name]
    values = {"model": "hierarchical", "model_args": args} | changes
    with pytest.raises(InputError, match=message) as caught:
        cfg.resolve(cfg.make(cfg.TrainConfig, values))
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="use --model hierarchical"):
        tiny_config(model_args={"latents": (3, 2)})
    vae, _ = small()
    parts = {
        "prior": vae.prior,
        "conditionals": list(vae.conditionals),
        "posteriors": list(vae.posteriors),
        "decoder": vae.decoder,
        "likelihood": vae.likelihood,
    }
    HierarchicalVAE(**parts)
    other, _ = small(model_args={"latents": (4, 2)})
    for change, message in (
        ({"prior": priors.StandardNormal(3)}, "layer z2"),
        ({"conditionals": []}, "L - 1 conditionals; got 2 and 0"),
        ({"posteriors": list(other.posteriors)}, "layer z1"),
        ({"decoder": other.decoder}, "latent_dim"),
        ({"structure": "top-down"}, "do not fit together|got 3|expects"),
        ({"posteriors": [parts["posteriors"][0], other.posteriors[1]]}, "."),
    ):
        with pytest.raises(InputError, match=message) as caught:
            HierarchicalVAE(**parts | change)
        assert "\n" not in str(caught.value)


def test_building_one_leaves_the_callers_stream_alone():
    vae, _ = small()
    torch.manual_seed(0)
    HierarchicalVAE(
        prior=vae.prior,
        conditionals=list(vae.conditionals),
        posteriors=list(vae.posteriors),
        decoder=vae.decoder,
        likelihood=vae.likelihood,
    )
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_a_stored_configuration_without_a_model_is_a_vae():
    stored = {k: v for k, v in vars(tiny_config()).items() if not k.startswith("model")}
    assert cfg.make(cfg.TrainConfig, stored).model == "vae"
    assert type(tiny_vae()[0]) is pv.VAE


# --------------------------------------------------------------------------------------- commands

TRAIN = "train --data x.npy --hidden 8 --batch-size 16 --final-particles 10 --quiet --epochs 2"
RUNS = {
    "up": "--model hierarchical --model-args latents=3,2 upper_hidden=6",
    "down": "--model hierarchical --model-args latents=2,2 structure=top-down upper_hidden=6,6 "
    "--prior vamp --prior-args components=4 --objective dreg --num-particles 3",
}
FEW = "--num-particles 30 --quiet"


@pytest.fixture(scope="module")
def hierarchies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hierarchies")
    np.save(folder / "x.npy", GREY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, flags in RUNS.items():
            ok(f"{TRAIN} {flags} --out {name}")
    return folder


@pytest.mark.parametrize("name", list(RUNS))
def test_every_command_serves_it(name, hierarchies, monkeypatch):
    monkeypatch.chdir(hierarchies)
    layout = "3 + 2 (bottom-up)" if name == "up" else "2 + 2 (top-down)"
    assert layout in ok(f"info {name}")
    report = json.loads(ok(f"evaluate {name} {FEW} --json"))
    assert math.isfinite(report["log_likelihood"])
    assert report["information"]["mutual_information"] is not None
    ok(f"evaluate {name} {FEW} --proposal defensive --proposal-scale 1.1")
    ok(f"anneal {name} --num-images 2 --num-chains 2 --num-temperatures 3 --num-leapfrog 2 --quiet")
    ok(f"score {name} x.npy {FEW} --num-reference 5 --out {name}.csv")
    with open(f"{name}.csv") as file:
        assert len(list(csv.DictReader(file))) == len(GREY)
    for picture in ("sample", "reconstruct --num-images 4", "interpolate --pairs 2", "traverse"):
        command, _, flags = picture.partition(" ")
        ok(f"{command} {name} {flags} --out {name}-{command}.png")
        assert drawn(f"{name}-{command}.png")
    ok(f"report {name} --num-particles 20 --out {name}.html --quiet")
    page = Path(f"{name}.html").read_text(encoding="utf-8")
    assert layout in page
    assert "the layers below it, which follow" in page
    refused = shell(f"explore {name}")
    assert refused.status == 2
    assert "single layer of latents" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    refused = shell(f"evaluate {name} --method quadrature --quiet")
    assert refused.status == 2
    assert len(refused.err.strip().splitlines()) == 1
    assert "loss of one step" in ok(f"{TRAIN} {RUNS[name]} --out other --dry-run")
    ok(f"{TRAIN.replace('--epochs 2', '--epochs 3')} --out {name} --resume")


def test_they_compare_and_can_be_given_away(hierarchies, monkeypatch):
    monkeypatch.chdir(hierarchies)
    table = ok(f"compare up down {FEW}")
    assert "up" in table and "down" in table
    pytest.importorskip("safetensors")
    ok("export down shared")
    card = Path("shared/README.md").read_text(encoding="utf-8")
    assert "--model-args latents=2,2" in card
    twin, vae = cfg.load("shared"), cfg.load("down")
    assert torch.equal(twin.generate(2, seed=0), vae.generate(2, seed=0))
