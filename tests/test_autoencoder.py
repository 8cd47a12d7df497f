"""The autoencoder: a squared error, trained by Pyro's SVI, and no number that it does not have."""

import json
import math

import numpy
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from shell import ok, shell
from torch.distributions import kl_divergence

import pyrovae as pv
from pyrovae import annealing, comparison, quadrature, scoring
from pyrovae.autoencoder import SCALE, Autoencoder, Point
from pyrovae.explore import write_explorer
from pyrovae.networks import MLPDecoder, MLPEncoder
from pyrovae.report import write_report

SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True)
def own_parameters():
    """No parameters left in Pyro's store."""
    with pyro.get_param_store().scope():
        yield


def autoencoder(seed=0, latent_dim=2):
    torch.manual_seed(seed)
    posterior = Point(MLPEncoder(SHAPE, hidden=(16,)), latent_dim)
    return Autoencoder(posterior, MLPDecoder(latent_dim, (1, *SHAPE), hidden=(16,)), SHAPE)


def gradients(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_pyros_elbo_is_minus_the_squared_error_with_its_gradient():
    auto = autoencoder().double()
    auto.likelihood.fixed_scale.fill_(SCALE)  # the buffer was float32
    x = torch.rand(7, *SHAPE, dtype=torch.float64)
    features = auto.posterior.encoder(x)
    z = features @ auto.posterior.head.weight.T + auto.posterior.head.bias
    by_hand = (x - (auto.decoder(z)[:, 0] + 0.5)).square().sum()
    loss = Trace_ELBO().differentiable_loss(auto.model, auto.guide, x)
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-9)
    assert torch.allclose(gradients(loss, auto), gradients(by_hand, auto), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1 / 64, 1.0), (0.5, 0.01)])
def test_mse_plus_kl_is_a_vae_with_a_gaussian_of_fixed_scale(a, b):
    """a MSE + b KL = b (-ELBO) + constant, for s = sqrt(b / 2a); so are the gradients."""
    s = math.sqrt(b / (2 * a))
    torch.manual_seed(0)
    likelihood = pv.likelihoods.Gaussian(SHAPE, scale=s)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        posterior=pv.posteriors.MeanField(MLPEncoder(SHAPE, hidden=(16,)), 3),
        decoder=MLPDecoder(3, likelihood.params_shape, hidden=(16,)),
        likelihood=likelihood,
    ).double()
    vae.likelihood.fixed_scale.fill_(s)
    x = torch.rand(9, *SHAPE, dtype=torch.float64)
    torch.manual_seed(1)
    q = vae.posterior(x)
    error = (x - (vae.decoder(q.rsample())[:, 0] + 0.5)).square().sum()
    recipe = a * error + b * kl_divergence(q, vae.prior()).sum()
    torch.manual_seed(1)
    loss = TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, x)
    constant = len(x) * 64 / 2 * math.log(2 * math.pi * s**2)
    expected = b * (loss.detach() - constant)
    assert float(recipe.detach()) == pytest.approx(float(expected), rel=1e-9)
    assert torch.allclose(gradients(recipe, vae), b * gradients(loss, vae), rtol=1e-8, atol=1e-10)


def test_without_noise_and_prior_that_vae_is_the_autoencoder():
    """The distortion of a VAE of that scale at z = E_q[z | x] is the autoencoder's loss there."""
    auto = autoencoder()
    x = torch.rand(5, *SHAPE)
    with torch.no_grad():
        p = pv.likelihoods.Gaussian(SHAPE, scale=math.sqrt(0.5))(auto.decoder(auto.encode(x)))
        distortion = -p.log_prob(x).sum() - 5 * 64 / 2 * math.log(math.pi)
        loss = Trace_ELBO().loss(auto.model, auto.guide, x)
    assert float(loss) == pytest.approx(float(distortion), rel=1e-5)


@pytest.fixture
def digits():
    return pv.data.load("digits", binarize="none", dequantize="none")


@pytest.mark.parametrize("engine", ["svi", "traced"])
def test_it_learns_and_its_validation_is_its_error(digits, engine):
    auto = autoencoder(latent_dim=8)
    x = digits.valid.tensor()
    mean = (x - digits.train.tensor().mean(0)).square().flatten(1).sum(1).mean()
    history = pv.fit(auto, digits, epochs=8, lr=5e-3, seed=0, progress=False, engine=engine)
    with torch.no_grad():
        error = (x - auto.reconstruct(x)).square().flatten(1).sum(1).mean()
    assert history.best_elbo == pytest.approx(-float(error), rel=1e-4)
    assert float(error) < 0.7 * float(mean)  # what the best constant image leaves
    assert all(m["valid_rate"] == 0 for m in history.metrics)


def test_one_latent_and_straight_networks_find_the_principal_component():
    """A linear autoencoder's best error is what the first components leave: an SVD tells."""
    torch.manual_seed(0)
    scales = torch.tensor([1.0, 0.4] + [0.05] * 6)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    x = (torch.randn(400, 8) * scales) @ turn
    x = x - x.mean(0)
    auto = Autoencoder(
        Point(MLPEncoder((8,), hidden=()), 2), MLPDecoder(2, (1, 8), hidden=()), (8,)
    )
    optim = torch.optim.Adam(auto.parameters(), lr=0.02)
    for _ in range(800):
        loss = Trace_ELBO().differentiable_loss(auto.model, auto.guide, x) / len(x)
        optim.zero_grad()
        loss.backward()
        optim.step()
    left = torch.linalg.svdvals(x)[2:].square().sum() / len(x)
    assert float(loss.detach()) == pytest.approx(float(left), rel=0.02)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("auto") / "run"
    return out, ok(f"train --model autoencoder --epochs 2 --out {out} --quiet")


def test_training_tells_the_error_and_no_log_p(run):
    out, said = run
    auto = pv.load(out)
    assert isinstance(auto, Autoencoder)
    x = pv.data.load("digits", binarize="none", dequantize="none").test.tensor()
    with torch.no_grad():
        error = float((x - auto.reconstruct(x)).square().flatten(1).sum(1).mean())
    assert float(said.split("squared error")[1].split()[0]) == pytest.approx(error, abs=1e-3)
    assert "no probability model" in said and "nats" not in said
    assert not (out / "evaluation.json").exists()
    config = json.loads((out / "config.json").read_text())
    assert (config["likelihood"], config["dequantize"]) == ("gaussian", "none")


def test_it_is_taken_up_again(run):
    ok(f"train --out {run[0]} --resume --epochs 3 --quiet")
    assert len((run[0] / "metrics.jsonl").read_text().splitlines()) == 3


def test_no_word_of_probabilities_is_said(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dry = ok("train --model autoencoder --dry-run")
    for text in (dry, ok(f"info {run[0]}"), repr(pv.load(run[0]))):
        for word in ("nats", "ELBO", "posterior", "prior ", "likelihood"):
            assert word not in text, (word, text)
    assert "squared error" in dry


def test_there_is_nothing_to_draw_but_the_mean(run):
    auto = pv.load(run[0])
    z = torch.randn(5, auto.latent_dim)
    assert torch.equal(auto.decode(z, mean=False), auto.decode(z))
    torch.manual_seed(3)
    expected = auto.decode(auto.draw_latents(4))
    assert torch.equal(auto.generate(4, seed=3), expected)


def test_it_has_a_folder_of_its_own_and_takes_the_modern_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "train --model autoencoder --preset modern --warmup-epochs 0.5 --hidden 8 --quiet"
    ok(f"{words} --epochs 1 --binarize dynamic")
    assert (tmp_path / "runs/digits-autoencoder").is_dir()
    ok("train --model autoencoder --resume --epochs 1 --quiet")


def test_a_comparison_names_the_one_without_a_density(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ok("train --epochs 1 --hidden 8 --final-particles 0 --quiet --out vae")
    done = shell(f"compare vae {run[0]}")
    assert done.status == 2
    assert f"{run[0].name} is an autoencoder" in done.err or "run is an autoencoder" in done.err


@pytest.mark.parametrize("command", ["evaluate", "anneal", "explore", "report", "compare"])
def test_what_needs_a_density_refuses_in_one_line(run, command):
    done = shell(f"{command} {run[0]}")
    assert done.status == 2 and not done.out
    assert "no p(x)" in done.err and "--model vae" in done.err
    assert len(done.err.strip().splitlines()) <= 2  # a line of progress may come before


def test_and_so_do_the_functions(run, tmp_path):
    auto, data = pv.load(run[0]), pv.data.load("digits", binarize="none", dequantize="none")
    numpy.save(tmp_path / "x.npy", data.test.head(3).tensor().numpy())
    for refused in (
        lambda: pv.evaluate(auto, data.test, 10),
        lambda: quadrature.evaluate(auto, data.test),
        lambda: quadrature.quadrature(auto.model, auto.guide, data.test.head(1).tensor()),
        lambda: pv.log_weights(auto.model, auto.guide, data.test.head(1).tensor(), 3),
        lambda: annealing.anneal(auto.model, auto.guide, data.test.head(1).tensor()),
        lambda: annealing.anneal_split(auto, data.test, 2),
        lambda: comparison.evaluate_run(run[0], 10),
        lambda: scoring.score_paths(run[0], [tmp_path / "x.npy"], num_particles=5),
        lambda: write_explorer(run[0], tmp_path / "page.html"),
        lambda: write_report(run[0], tmp_path / "report.html"),
    ):
        with pytest.raises(pv.InputError, match="no p\\(x\\)"):
            refused()


@pytest.mark.parametrize(
    "flags",
    [
        ("--likelihood", "laplace"),
        ("--prior", "vamp"),
        ("--posterior", "flow"),
        ("--objective", "iwae"),
        ("--num-particles", "3"),
        ("--beta", "0.5"),
        ("--likelihood-args", "scale=learned"),
        ("--model-args", "latents=3"),
        ("--final-particles", "500"),
    ],
    ids=lambda flags: flags[0],
)
def test_settings_of_probabilities_are_refused(flags, tmp_path):
    done = shell(f"train --model autoencoder {flags[0]} {flags[1]} --out {tmp_path / 'run'}")
    assert done.status == 2
    assert flags[0] in done.err and len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
