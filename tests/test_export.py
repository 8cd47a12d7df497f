"""What ArviZ is given: the draws of an evaluation, their weights, and true predictions."""

import math
import warnings
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from announced import arviz
from exact import linear_gaussian, marginal
from tiny import tiny_config, tiny_data, tiny_hierarchy, tiny_vae
from torch import nn

from pyrovae import config as cfg
from pyrovae import data as datasets
from pyrovae import diagnostics, export
from pyrovae.errors import InputError
from pyrovae.evaluation import evaluate
from pyrovae.export import to_datatree, to_inference_data
from pyrovae.importance import log_mean_exp
from pyrovae.precision import networks_in
from pyrovae.proposals import Proposal

OLD_LINE = int(version("arviz").split(".")[0]) < 1

EACH = ("chain", "draw", "image")
PIXELS = ("channel", "row", "column")


@pytest.fixture
def small():
    vae, data = tiny_vae()
    return vae, data.test, evaluate(vae, data.test, 70)


def gaussian(n=20, **moved):
    vae = linear_gaussian(**moved)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = marginal(vae).sample((n,))
    return vae, datasets.fixed(x).test


def test_groups_dimensions_and_coordinates(small):
    vae, split, evaluation = small
    tree = to_datatree(vae, split, evaluation)
    expected = {
        "posterior": {"z": (*EACH, "latent")},
        "sample_stats": {"log_weight": EACH, "weight": EACH},
        "log_likelihood": {"x": EACH},
        "posterior_predictive": {"x": (*EACH, *PIXELS)},
        "prior": {"z": ("chain", "draw", "latent")},
        "prior_predictive": {"x": ("chain", "draw", *PIXELS)},
        "observed_data": {"x": ("image", *PIXELS)},
        "constant_data": {"source_row": ("image",)},
    }
    assert set(tree.children) == {*expected, "per_image"}
    sizes = {"chain": 1, "draw": 70, "image": 8, "latent": 2, "channel": 1, "row": 4, "column": 4}
    for group, variables in expected.items():
        assert {name: v.dims for name, v in tree[group].data_vars.items()} == variables
    for group in tree.children.values():
        for name, n in group.sizes.items():
            assert n == sizes[name]
            assert group[name].values.tolist() == list(range(n))
    per_image = tree["per_image"]
    for name in ("log_likelihood", "pareto_k", "ess", "mc_error", "elbo", "rate", "distortion"):
        expected_values = getattr(evaluation.per_image, name).numpy()
        np.testing.assert_array_equal(per_image[name].values, expected_values)
    assert per_image["posterior_mean"].dims == ("image", "latent")
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, split.tensor().numpy())
    np.testing.assert_array_equal(tree["constant_data"]["source_row"].values, split.rows.numpy())
    assert tree.attrs["protocol"] == str(split.protocol)
    assert tree.attrs["draws"] == "all 70 draws of z per image"
    assert "no Markov chain" in " ".join(tree.attrs["reading"].split()).replace("make no", "no")


def test_labels_and_features_without_a_grid():
    vae, split = gaussian(3)
    tree = to_datatree(vae, split, evaluate(vae, split, 5))
    assert tree["observed_data"]["x"].dims == ("image", "feature")
    digits = datasets.load("digits", binarize="threshold").test.head(3)
    config = tiny_config(binarize="threshold")
    model = cfg.build(config, cfg.load_data(config))
    tree = to_datatree(model, digits, evaluate(model, digits, 5))
    assert tree["constant_data"]["label"].values.tolist() == digits.labels.tolist()


def test_every_number_again_from_the_draws():
    """Weights and terms recomputed from the exported z with the distributions themselves."""
    vae, split = gaussian(shift=0.1, widen=1.2)
    evaluation = evaluate(vae, split, 70)
    tree = to_datatree(vae, split, evaluation)
    z = torch.from_numpy(tree["posterior"]["z"].values[0])
    x = split.tensor()
    with torch.no_grad():
        likelihood = vae.likelihood(vae.decoder(z)).log_prob(x)
        weights = likelihood + vae.prior().log_prob(z) - vae.posterior(x).log_prob(z)
    exported = torch.from_numpy(tree["sample_stats"]["log_weight"].values[0])
    torch.testing.assert_close(exported, weights, rtol=1e-10, atol=1e-10)
    terms = torch.from_numpy(tree["log_likelihood"]["x"].values[0])
    torch.testing.assert_close(terms, likelihood, rtol=1e-10, atol=1e-10)
    smoothed = torch.from_numpy(tree["sample_stats"]["weight"].values[0])
    torch.testing.assert_close(smoothed, diagnostics.psis(weights).log_weights.exp())
    torch.testing.assert_close(smoothed.sum(0), torch.ones(20).double())


@pytest.mark.parametrize("structure", ["bottom-up", "top-down"])
def test_every_layer_of_a_hierarchy(structure):
    config = tiny_hierarchy(structure)
    data = tiny_data(config)
    vae = cfg.build(config, data)
    evaluation = evaluate(vae, data.test, 70)
    tree = to_datatree(vae, data.test, evaluation)
    sizes = {name: v.shape[-1] for name, v in tree["posterior"].data_vars.items()}
    assert sorted(sizes.values()) == [2, 3]
    assert {n: v.shape[-1] for n, v in tree["prior"].data_vars.items()} == sizes
    weights = torch.from_numpy(tree["sample_stats"]["log_weight"].values[0])
    estimate = weights.double().logsumexp(0) - math.log(70)
    torch.testing.assert_close(estimate, evaluation.per_image.log_likelihood, rtol=0, atol=1e-4)


class Programs(nn.Module):
    """A guide that no normal noise can make, and two latent sites."""

    class Likelihood:
        kind = "density"

        def check(self, x):
            pass

    likelihood = Likelihood()

    def __init__(self, normal):
        super().__init__()
        self.normal = normal

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            loc = (z.sum(-1) * scale).unsqueeze(-1)
            y = dist.Normal(loc.expand(*loc.shape[:-1], 3), 1.0).to_event(1)
            pyro.sample("y", y, obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            scale = dist.LogNormal(0.0, 0.5) if self.normal else dist.Gamma(2.0, 2.0)
            pyro.sample("scale", scale)
            pyro.sample("z", dist.Normal(0.1 * x[..., :2], 1.0).to_event(1))


@pytest.mark.parametrize("k", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("which", ["vae", "flow", "normal sites", "gamma sites"])
def test_draws_are_those_of_the_evaluation(which, k):
    if which in ("vae", "flow"):
        vae, data = tiny_vae(posterior="mean-field" if which == "vae" else "flow")
        split = datasets.fixed(data.train.tensor(torch.Generator().manual_seed(0))).test
    else:
        vae = Programs(which == "normal sites")
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        split = datasets.fixed(x).test
    assert len(split) > export.IMAGE_BLOCK
    evaluation = evaluate(vae, split, k)
    whole = to_datatree(vae, split, evaluation)
    weights = torch.from_numpy(whole["sample_stats"]["log_weight"].values[0])
    bound = torch.logsumexp(weights, 0) - math.log(k)
    expected = evaluation.per_image.log_likelihood
    torch.testing.assert_close(bound, expected, rtol=1e-5, atol=1e-4)
    if "sites" in which:
        assert whole["posterior"]["z"].dims == (*EACH, "z_dim_0")
        assert whole["posterior"]["scale"].dims == EACH
        assert list(whole["posterior_predictive"].data_vars) == ["y"]


@pytest.mark.parametrize("which", ["vae", "gamma sites"])
def test_thinning_keeps_the_first_draws_and_says_so(which):
    if which == "vae":
        vae, data = tiny_vae()
        split = data.test
    else:
        vae = Programs(False)
        split = datasets.fixed(torch.ones(5, 3)).test
    evaluation = evaluate(vae, split, 150)
    whole = to_datatree(vae, split, evaluation)
    some = to_datatree(vae, split, evaluation, max_draws=70)
    assert some.attrs["draws"] == "the first 70 of 150 draws of z per image"
    for group, name in (
        ("posterior", "z"),
        ("sample_stats", "log_weight"),
        ("log_likelihood", "x" if which == "vae" else "y"),
        ("posterior_predictive", "x" if which == "vae" else "y"),
    ):
        ours, theirs = some[group][name].values, whole[group][name].values[:, :70]
        np.testing.assert_array_equal(ours, theirs)
    assert len(some["prior"]["draw"]) == 70
    np.testing.assert_allclose(some["sample_stats"]["weight"].values.sum(1), 1.0, rtol=1e-9)
    # what is said of an image comes from all draws
    k = evaluation.per_image.pareto_k.numpy()
    np.testing.assert_array_equal(some["per_image"]["pareto_k"].values, k)


def test_predictions_against_the_closed_form():
    """x' ~ N(b, W W' + s^2) before and N(W m + b, W V W' + s^2) after seeing x."""
    vae, split = gaussian(18)  # two blocks of images
    n = 4000
    tree = to_datatree(vae, split, evaluate(vae, split, n), max_draws=n)
    W, b = vae.decoder.weight.detach(), vae.decoder.bias.detach()
    q = vae.posterior(split.tensor())
    noise = 0.25 * torch.eye(6, dtype=torch.float64)
    prior_z = tree["prior"]["z"].values[0]
    after = tree["posterior_predictive"]["x"].values[0]
    cases = [
        (prior_z, torch.zeros(3), torch.eye(3)),
        (tree["prior_predictive"]["x"].values[0], b, W @ W.T + noise),
    ]
    for i in range(2):
        covariance = W @ q.covariance_matrix[i].detach() @ W.T + noise
        cases.append((after[:, i], W @ q.mean[i].detach() + b, covariance))
    for draws, mean, covariance in cases:
        mean, covariance = mean.double().numpy(), covariance.double().numpy()
        assert draws.shape == (n, len(mean))
        variance = np.diag(covariance)
        assert (np.abs(draws.mean(0) - mean) < 5 * np.sqrt(variance / n)).all()
        se = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
        assert (np.abs(np.cov(draws.T) - covariance) < 5 * se).all()
    # noise of its own: predictions of two draws, two images and both groups are not the same
    residual = after - (tree["posterior"]["z"].values[0] @ W.numpy().T + b.numpy())
    correlation = np.corrcoef(residual.reshape(n, -1).T) - np.eye(18 * 6)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(n)
    assert len(np.unique(residual)) == residual.size


def test_reproducible_and_leaves_the_callers_streams_alone(small):
    vae, split, evaluation = small
    before = torch.random.get_rng_state()
    names = set(pyro.get_param_store().keys())
    a, b = (to_datatree(vae, split, evaluation) for _ in range(2))
    assert a.identical(b)
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(pyro.get_param_store().keys()) == names


@pytest.mark.parametrize("kind", ["wide", "defensive"])
def test_other_proposals(kind, small):
    vae, split, guide = small
    proposal = Proposal(kind)
    evaluation = evaluate(vae, split, 70, proposal=proposal)
    tree = to_datatree(vae, split, evaluation, proposal=proposal)
    weights = torch.from_numpy(tree["sample_stats"]["log_weight"].values[0])
    bound = torch.logsumexp(weights, 0) - math.log(70)
    expected = evaluation.per_image.log_likelihood
    torch.testing.assert_close(bound, expected, rtol=1e-5, atol=1e-4)
    assert tree.attrs["proposal"] == str(proposal)
    for wrong in ((evaluation, Proposal()), (guide, proposal)):
        with pytest.raises(InputError, match="give the evaluation's"):
            to_datatree(vae, split, wrong[0], proposal=wrong[1])


def test_refusals(small, monkeypatch):
    vae, split, evaluation = small
    cases = [
        ((vae, split.head(3), evaluation), {}, "expected the split that was evaluated, 8 images"),
        ((tiny_vae(seed=1)[0], split, evaluation), {}, "no longer those that were evaluated"),
        ((vae, split, evaluation), {"max_draws": 0}, "at least 1"),
    ]
    for args, options, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            to_datatree(*args, **options)
        assert "\n" not in str(caught.value)
    train = tiny_vae()[1].train
    with pytest.raises(InputError, match="sampled anew at each use"):
        to_datatree(vae, train, evaluation)
    monkeypatch.setattr(export, "_MAX_BYTES", 8 * 70 * 16 * 4)
    to_datatree(vae, split, evaluation)
    monkeypatch.setattr(export, "_MAX_BYTES", 8 * 70 * 16 * 4 - 1)
    with pytest.raises(InputError, match="--limit 7"):
        to_datatree(vae, split, evaluation)


def test_targets(monkeypatch):
    with pytest.raises(InputError, match=r"ending in \.nc"):
        export.check_target("x.csv")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        export.check_target("x.nc")
    monkeypatch.setattr(export, "find_spec", lambda name: True if name == "netCDF4" else None)
    assert export.check_target("x.nc") == "netcdf4"


@pytest.mark.skipif(find_spec("h5netcdf") is None, reason="nothing here writes NetCDF")
def test_a_file_holds_the_same(small, tmp_path):
    vae, split, evaluation = small
    path = tmp_path / "evaluation.nc"
    message = export.export(path, vae, split, evaluation, max_draws=20)
    assert message == f"{path}: 8 images, the first 20 of 70 draws of z per image"
    tree = to_datatree(vae, split, evaluation, max_draws=20)
    again = arviz().from_netcdf(path)
    for group in tree.children:
        for name, values in tree[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name].values, values.values)
            assert again[group][name].dims == values.dims
    assert again.attrs["draws"] == tree.attrs["draws"]
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.nc"]
    draw(again)
    again.close()


def draw(container):
    """ArviZ's own plots; whatever they warn of is theirs."""
    az = arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = {"var_names": ["z"], "coords": {"image": [0]}}
        if OLD_LINE:
            az.plot_trace(container, **one)
            az.plot_posterior(container, **one)
            az.plot_forest(container, **one)
            az.plot_khat(container.per_image.pareto_k)
            az.plot_ppc(container, coords={"image": [0]}, num_pp_samples=5)
        else:
            az.plot_dist(container, **one)
            az.plot_forest(container, **one)
            az.plot_trace(container, **one)
            az.plot_prior_posterior(container, **one)
            az.plot_ppc_dist(container, num_samples=5)
        import matplotlib.pyplot as plt

        assert plt.get_fignums() or not OLD_LINE
        plt.close("all")


def test_arviz_draws_what_is_in_memory(small):
    vae, split, evaluation = small
    if OLD_LINE:
        container = to_inference_data(vae, split, evaluation, max_draws=20)
        tree = to_datatree(vae, split, evaluation, max_draws=20)
        assert set(container.groups()) == set(tree.children)
        for group in tree.children:
            assert container[group].identical(tree[group].to_dataset())
        assert container.attrs["draws"] == tree.attrs["draws"]
    else:
        with pytest.raises(InputError, match="use to_datatree"):
            to_inference_data(vae, split, evaluation)
        container = to_datatree(vae, split, evaluation, max_draws=20)
    draw(container)


def test_draws_have_the_precision_of_their_evaluation():
    vae, data = tiny_vae()
    result = evaluate(vae, data.test, 30, precision="bf16")
    tree = result.to_datatree()
    assert tree.attrs["precision"] == "bf16"
    log_weights = torch.from_numpy(tree["sample_stats"]["log_weight"].values[0])
    ours = log_mean_exp(log_weights)
    torch.testing.assert_close(ours, result.per_image.log_likelihood, rtol=0, atol=1e-6)
    exact = evaluate(vae, data.test, 30).per_image.log_likelihood
    assert (ours - exact).abs().max() > 1e-5


def test_what_the_prior_predicts_has_the_precision_of_the_evaluation():
    vae, data = tiny_vae(likelihood="gaussian", likelihood_args={"scale": 0.1})
    x, loc = {}, {}
    for precision in ("fp32", "bf16"):
        tree = evaluate(vae, data.test, 30, precision=precision).to_datatree()
        z = torch.from_numpy(tree["prior"]["z"].values[0])
        x[precision] = torch.from_numpy(tree["prior_predictive"]["x"].values[0])
        with torch.no_grad(), networks_in(vae, precision):
            loc[precision] = vae.likelihood(vae.decoder(z)).mean
    moved = loc["bf16"] - loc["fp32"]  # of the same z, and with the same errors around them
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(x["bf16"] - x["fp32"], moved, rtol=0, atol=1e-5)


def test_an_evaluation_exports_itself():
    vae, data = tiny_vae()
    result = evaluate(vae, data.test, 30)
    theirs = export.to_datatree(vae, data.test, result)
    ours = result.to_datatree()
    assert set(ours.groups) == set(theirs.groups)
    np.testing.assert_array_equal(
        ours["log_likelihood"]["x"].values, theirs["log_likelihood"]["x"].values
    )
    assert result.to_datatree(max_draws=7)["posterior"].sizes["draw"] == 7
    if OLD_LINE:
        assert isinstance(result.to_inference_data(), arviz().InferenceData)
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(1.0)
    with pytest.raises(InputError, match="no longer those"):
        result.to_datatree()
