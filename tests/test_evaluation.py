"""What `evaluate` reports, against closed forms and quadrature."""

import json
import math
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pyro.distributions as dist
import pytest
import torch
from exact import kl_to_posterior, linear_gaussian, marginal
from tiny import tiny_config, tiny_data, tiny_hierarchy, tiny_vae

import pyrovae as pv
from pyrovae import config as cfg
from pyrovae import data as datasets
from pyrovae import estimates, evaluation, quadrature
from pyrovae.errors import InputError
from pyrovae.evaluation import active_units, bits_per_dim, evaluate
from pyrovae.precision import networks_in
from pyrovae.proposals import Proposal


def split_of(x):
    return datasets.fixed(x).test


@pytest.fixture
def gaussian():
    vae = linear_gaussian(shift=0.1, widen=1.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = marginal(vae).sample((50,))
    return vae, x


def test_against_the_closed_form(gaussian):
    vae, x = gaussian
    k = 4000
    result = evaluate(vae, split_of(x), k)
    truth = marginal(vae).log_prob(x)
    images = result.per_image
    # relative variance of a weight, from the effective sample size: var(w)/K = 1/ESS - 1/K
    se = torch.sqrt(1 / images.ess - 1 / k)
    torch.testing.assert_close(images.mc_error, se, rtol=0.05, atol=0)
    for found in (images.log_likelihood, images.psis_log_likelihood):
        assert ((found - truth).abs() < 5 * images.mc_error).all()
    assert (se < 0.05).all()
    assert result.log_likelihood == pytest.approx(float(images.log_likelihood.mean()))
    assert result.log_likelihood_se == pytest.approx(
        float(images.log_likelihood.std()) / math.sqrt(50)
    )
    elbo = truth - kl_to_posterior(vae, x)
    spread = math.sqrt(float(kl_to_posterior(vae, x)[0]) * 4 / k)
    assert (images.elbo - elbo).abs().max() < 6 * spread
    assert result.elbo == pytest.approx(-(result.rate + result.distortion), abs=1e-9)
    assert result.elbo < result.log_likelihood
    assert result.num_images == 50
    assert result.active_units == 3
    # 20 % wider than the posterior in three dimensions: the weights are bounded
    assert result.pareto_k_median < 0.5


def test_exact_posterior_has_no_slack_and_no_tail(gaussian):
    _, x = gaussian
    vae = linear_gaussian()
    result = evaluate(vae, split_of(x), 100)
    truth = marginal(vae).log_prob(x)
    torch.testing.assert_close(result.per_image.log_likelihood, truth, rtol=1e-10, atol=1e-10)
    assert result.elbo == pytest.approx(result.log_likelihood, abs=1e-9)
    assert result.pareto_k_median is None
    assert result.ess_median == pytest.approx(100)


@pytest.mark.parametrize("memory", [30_000, 200_000, 64 * 2**20])
@pytest.mark.parametrize("k", [1, 63, 200])
def test_memory_budget_does_not_move_the_answer(memory, k):
    vae, data = tiny_vae()
    whole = evaluate(vae, data.test, k).per_image
    cut = evaluate(vae, data.test, k, memory=memory).per_image
    for ours, theirs in zip(cut, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(("images", "at_once"), [(1, 250_000), (2, 250_000), (3, 1000)])
def test_an_image_has_the_same_estimates_in_any_company(monkeypatch, images, at_once):
    """One image in a batch, and one in what is looked at together."""
    monkeypatch.setitem(estimates._NUMBERS_AT_ONCE, "cpu", at_once)
    particles = 500
    vae, data = tiny_vae()
    alone = evaluate(vae, data.test.head(images), particles, information_images=0).per_image
    among = evaluate(vae, data.test.head(images + 1), particles, information_images=0).per_image
    for name, ours, theirs in zip(alone._fields, alone, among, strict=True):
        torch.testing.assert_close(ours, theirs[:images], rtol=1e-4, atol=1e-4, msg=name)


def test_ragged_last_batch_counts_each_image_once(monkeypatch):
    vae, _ = tiny_vae()
    x = datasets.from_array(
        torch.randint(0, 2, (60, 1, 4, 4), dtype=torch.uint8), test_size=37, valid_size=3
    )
    whole = evaluate(vae, x.test, 5)
    plan = evaluation.importance.Plan(images=16, particles=2)
    monkeypatch.setattr(evaluation.importance, "plan", lambda *a, **k: plan)
    cut = evaluate(vae, x.test, 5)
    assert cut.num_images == 37
    assert cut.log_likelihood == pytest.approx(whole.log_likelihood, abs=1e-5)
    assert cut.elbo == pytest.approx(whole.elbo, abs=1e-5)


def test_reproducible_from_the_seed():
    vae, data = tiny_vae()
    a, b, c = (evaluate(vae, data.test, 20, seed=s) for s in (0, 0, 1))
    assert a.log_likelihood == b.log_likelihood
    assert a.log_likelihood != c.log_likelihood


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized-logistic"])
def test_two_latents_trained_on_digits_agree_with_quadrature(likelihood):
    config = cfg.resolve(
        cfg.make(cfg.TrainConfig, {"latent_dim": 2, "hidden": (64,), "likelihood": likelihood})
    )
    dataset = cfg.load_data(config)
    vae = cfg.build(config, dataset)
    pv.fit(vae, dataset, epochs=15, batch_size=64, lr=3e-3)
    test = dataset.test.head(20)
    exact = quadrature.evaluate(vae, test)
    assert exact.largest_error < 1e-4
    truth = exact.per_image.log_likelihood
    for proposal in (Proposal(), Proposal("defensive")):
        result = evaluate(vae, test, 4000, proposal=proposal)
        images = result.per_image
        trusted = images.pareto_k < 0.7
        error = 5 * images.mc_error + 1e-4
        assert ((images.log_likelihood - truth).abs() < error)[trusted].all()
        assert result.elbo < exact.log_likelihood
    assert trusted.double().mean() > 0.5


def test_bits_per_dim():
    assert bits_per_dim(-784 * math.log(2), "mass", 1, 784) == pytest.approx(1.0)
    # a uniform density of y on (0, 1) is a uniform mass of 256 levels: eight bits
    assert bits_per_dim(0.0, "density", 255, 784) == pytest.approx(8.0)
    assert bits_per_dim(-10.0, "density", None, 784) is None
    assert 784 * math.log(256) == pytest.approx(4347.4, abs=0.1)


def test_uniform_density_and_uniform_mass_have_the_same_bits_per_dim():
    """The level correction brings a density of dequantised x and a mass to one scale."""
    results = {}
    for name in ("categorical", "continuous-bernoulli"):
        vae, data = tiny_vae(likelihood=name)
        with torch.no_grad():
            for p in vae.decoder.parameters():
                p.zero_()  # all-zero parameters: both are uniform
        results[name] = evaluate(vae, data.test, 3)
    assert results["categorical"].kind == "mass"
    assert results["continuous-bernoulli"].kind == "density"
    vae_rate = [r.rate for r in results.values()]
    assert vae_rate[0] == pytest.approx(vae_rate[1], abs=0.5)
    for r in results.values():
        distortion_bits = bits_per_dim(-r.distortion, r.kind, 255, 16)
        assert distortion_bits == pytest.approx(8.0, abs=1e-4)


def test_error_of_the_mean_over_images_is_what_another_seed_moves(gaussian):
    vae, x = gaussian
    results = [evaluate(vae, split_of(x), 100, seed=s, information_images=0) for s in range(40)]
    values = torch.tensor([r.log_likelihood for r in results])
    claimed = results[0].log_likelihood_mc_error
    # a standard deviation of 40 values is known to 1 / sqrt(80)
    assert float(values.std()) == pytest.approx(claimed, rel=5 / math.sqrt(80))
    images = results[0].per_image
    assert claimed == pytest.approx(math.sqrt(float((images.mc_error**2).sum())) / 50)
    assert results[0].bias == pytest.approx(float(images.bias.mean()))
    assert (images.bias < 0).all()


def test_curve_rises_within_its_error_to_the_truth(gaussian):
    vae, x = gaussian
    result = evaluate(vae, split_of(x), 777)
    assert [k for k, _, _ in result.curve] == [1, 10, 100, 777]
    images = result.per_image
    rises = images.bounds.diff(dim=1)
    se = rises.std(0) / math.sqrt(len(x))
    assert (rises.mean(0) > -5 * se).all()
    assert result.curve[0].bound == pytest.approx(result.elbo)
    assert result.curve[-1].bound == pytest.approx(result.log_likelihood)
    assert result.curve[-1].se == pytest.approx(result.log_likelihood_se)
    gap = marginal(vae).log_prob(x) - images.bounds[:, 1]
    assert float(gap.mean()) > 0.02  # ten draws leave slack
    assert result.to_dict()["curve"] == [list(point) for point in result.curve]
    assert "777: " in str(result)


@pytest.mark.parametrize(
    ("widen", "k", "sentence"),
    [
        (1.2, 200, "for 100.0% of the images: the estimate and its error can be trusted"),
        (0.4, 200, r"--posterior.*--num-particles.*--proposal defensive.*pyrovae anneal"),
        (1.2, 24, "Pareto k needs 25 draws; raise --num-particles"),
        (1.0, 200, "all weights are equal"),
    ],
)
def test_a_plain_sentence_says_what_can_be_trusted(gaussian, widen, k, sentence):
    _, x = gaussian
    result = evaluate(linear_gaussian(widen=widen), split_of(x), k)
    assert re.search(sentence, result.trust)
    assert result.trust in str(result)
    assert "\n" not in result.trust


def test_images_without_a_number_are_told_before_all_else(gaussian):
    vae, x = gaussian
    images = evaluate(vae, split_of(x), 30).per_image
    images.log_likelihood[:2] = torch.tensor([-math.inf, math.nan])
    images.pareto_k[:2] = math.nan
    sentence = evaluation._trust(images, 30)
    assert sentence.startswith("log p(x) is no finite number for 2 of 50 images: ")


def test_active_units():
    g = torch.Generator().manual_seed(0)
    means = torch.randn(5000, 3, generator=g, dtype=torch.float64)
    means = means * torch.tensor([1.0, 0.12, 0.08])
    assert active_units(means).tolist() == [True, True, False]
    assert active_units(means[:1]).tolist() == [False, False, False]
    # a Monte-Carlo error of variance 0.02 alone would pass for an active unit
    noisy = means + math.sqrt(0.02) * torch.randn(5000, 3, generator=g, dtype=torch.float64)
    assert active_units(noisy).tolist() == [True, True, True]
    assert active_units(noisy, error=0.02).tolist() == [True, True, False]


def test_active_units_of_a_posterior_without_a_closed_form_mean():
    vae, data = tiny_vae(posterior="flow")
    assert evaluate(vae, data.test, 1).active_units is None
    with torch.no_grad():  # a blind encoder: q(z | x) is the same for all x, yet its draws differ
        vae.posterior.encoder.layers[-2].weight.zero_()
    blind = evaluate(vae, data.test, 200)
    assert blind.active_units == 0
    assert (blind.per_image.posterior_mean_error > 0).all()
    assert (blind.per_image.posterior_mean.var(0) > 0).all()


def test_summary_prints_the_protocol_and_is_plain_json():
    vae, data = tiny_vae()
    result = evaluate(vae, data.test.head(1), 30)
    text = str(result)
    for part in ("log p(x)", "K = 30", "dynamic binarisation", "a mass", "seed 0"):
        assert part in text
    summary = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert summary["log_likelihood_se"] is None  # one image has no standard error
    assert summary["curve"][0][2] is None
    assert summary["information"]["bias"] in result.information.bias
    one_draw = evaluate(vae, data.test, 1)
    assert "nan" not in str(one_draw)
    json.dumps(one_draw.to_dict(), allow_nan=False)
    assert "per_image" not in summary


def coarse_vae():
    """A VAE whose decoder's weights all lose a fifth of a percent when they are rounded."""
    vae, data = tiny_vae(seed=1)
    with torch.no_grad():
        for p in vae.decoder.parameters():
            p.copy_((4 * p).bfloat16().float() * (1 + 0.98 * 2**-9))
    return vae, data.test


def test_with_rounded_products_it_is_log_p_of_the_model_that_rounds():
    vae, split = coarse_vae()
    split = split.head(4)
    truth = quadrature.evaluate(vae, split)
    with networks_in(vae, "bf16"):  # its integrand has steps, so it is not asked for more
        rounded = quadrature.evaluate(vae, split, tolerance=1e-2)
    moved = rounded.log_likelihood - truth.log_likelihood
    ours = []
    for seed in range(8):  # on the same noise, so that most of the error goes out
        a, b = (evaluate(vae, split, 1500, seed=seed, precision=p) for p in ("fp32", "bf16"))
        ours.append(b.log_likelihood - a.log_likelihood)
    mean, se = torch.tensor(ours).mean(), torch.tensor(ours).std() / math.sqrt(len(ours))
    bar = 5 * se + rounded.largest_error
    assert abs(moved) > 2 * bar  # else float32 would pass too
    assert abs(mean - moved) < bar


def test_what_rounding_moves_is_measured_and_printed():
    vae, split = coarse_vae()
    exact, ours = (evaluate(vae, split, 70, precision=p) for p in ("fp32", "bf16"))
    moved = ours.per_image.log_likelihood - exact.per_image.log_likelihood
    shift = ours.precision_shift
    assert (shift.num_images, shift.num_particles) == (8, 70)
    assert shift.mean == pytest.approx(float(moved.mean()), abs=1e-9)
    assert shift.se == pytest.approx(float(moved.std()) / math.sqrt(8))
    assert shift.mean != 0
    assert f"{shift.mean:+.4f} ± {shift.se:.4f} nats from float32 (first 8 images" in str(ours)
    assert ours.to_dict()["precision_shift"]["mean"] == shift.mean
    assert exact.precision_shift is None
    assert "precision" not in str(exact)
    one = evaluate(vae, split.head(1), 5, precision="bf16")
    json.dumps(one.to_dict(), allow_nan=False)


def test_rounding_is_measured_on_some_images_and_draws(monkeypatch):
    monkeypatch.setattr(evaluation, "_COMPARED_IMAGES", 5)
    monkeypatch.setattr(evaluation, "_COMPARED_PARTICLES", 33)
    vae, split = coarse_vae()
    exact, ours = (evaluate(vae, split.head(5), 33, precision=p) for p in ("fp32", "bf16"))
    moved = ours.per_image.log_likelihood - exact.per_image.log_likelihood
    shift = evaluate(vae, split, 70, precision="bf16").precision_shift
    assert (shift.num_images, shift.num_particles) == (5, 33)
    assert shift.mean == pytest.approx(float(moved.mean()), abs=1e-9)


def test_a_lower_precision_leaves_nothing_behind():
    vae, split = coarse_vae()
    before = evaluate(vae, split, 20).log_likelihood
    assert evaluate(vae, split, 20, precision="bf16").log_likelihood != before
    assert evaluate(vae, split, 20).log_likelihood == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_evaluation_has_its_precision_whatever_is_around_it(precision):
    vae, split = coarse_vae()
    expected = evaluate(vae, split, 20, precision=precision)
    with networks_in(vae, "bf16"):
        within = evaluate(vae, split, 20, precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate(vae, split, 20, precision=precision)
    for other in (within, cast):
        assert other.log_likelihood == expected.log_likelihood
        assert other.precision_shift == expected.precision_shift


def test_an_evaluation_in_float32_turns_the_switch_for_tf32_off():
    before = torch.get_float32_matmul_precision()
    seen = []
    vae, split = coarse_vae()
    vae.decoder.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    with networks_in(None, "tf32"):
        evaluate(vae, split, 5, information_images=0)
    assert set(seen) == {"highest"}
    assert torch.get_float32_matmul_precision() == before


def test_rounding_is_measured_on_the_same_noise_as_the_evaluation():
    """Of images in several blocks, and of what the evaluation draws from."""
    vae, _ = coarse_vae()
    images = split_of(tiny_data(tiny_config(), n=60).train.head(40).tensor())
    for proposal in (Proposal(), Proposal("wide", 1.5)):
        exact, ours = (
            evaluate(vae, images, 20, precision=p, proposal=proposal) for p in ("fp32", "bf16")
        )
        moved = ours.per_image.log_likelihood - exact.per_image.log_likelihood
        assert ours.precision_shift.num_images == 40
        assert ours.precision_shift.mean == pytest.approx(float(moved.mean()), abs=1e-9)


def test_the_parts_of_the_rate_have_the_precision_of_the_rest():
    vae, split = coarse_vae()
    exact, ours = (evaluate(vae, split, 5, precision=p).information for p in ("fp32", "bf16"))
    assert ours.mutual_information != exact.mutual_information


@pytest.mark.parametrize("kind", ["hierarchical", "flow"])
def test_other_models_round_too(kind):
    config = tiny_hierarchy() if kind == "hierarchical" else tiny_config(posterior=kind)
    data = tiny_data(config)
    vae = cfg.build(config, data)
    ours = evaluate(vae, data.test, 50, precision="bf16")
    assert 0 < abs(ours.precision_shift.mean) < 0.05


def test_a_precision_that_would_change_nothing_is_refused():
    vae, data = tiny_vae()
    with pytest.raises(InputError, match=r"--precision tf32 needs a CUDA .* is cpu"):
        evaluate(vae, data.test, 2, precision="tf32")
    without_layers = linear_gaussian()
    assert not any(isinstance(m, torch.nn.Linear) for m in without_layers.modules())
    x = marginal(without_layers).sample((5,))
    with pytest.raises(InputError, match=r"bf16 rounds nn.Linear, .*; got programs"):
        evaluate(without_layers, split_of(x), 2, precision="bf16")


def test_an_engine_that_does_not_say_so_does_not_round():
    class Bare:
        def serves(self, x, noise):
            return False

    vae, data = tiny_vae()
    evaluate(vae, data.test, 2, engine=Bare())
    with pytest.raises(InputError, match="made for precision 'bf16'; got one for 'fp32'"):
        evaluate(vae, data.test, 2, precision="bf16", engine=Bare())


def test_refusals():
    vae, data = tiny_vae()
    with pytest.raises(InputError, match="--precision expects one of fp32, tf32, bf16; got 'fp8'"):
        evaluate(vae, data.test, 2, precision="fp8")
    with pytest.raises(InputError, match="at least 1"):
        evaluate(vae, data.test, 0)
    _, grey = tiny_vae(likelihood="gaussian")
    with pytest.raises(InputError, match="Bernoulli expects x in"):
        evaluate(vae, grey.test, 2)


def test_broken_normalisation_would_be_seen():
    """A likelihood that is off by a constant moves log p(x) by it: the closed form catches that."""
    vae = linear_gaussian()
    x = marginal(vae).sample((5,))

    class TooLarge(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) + 0.01

    vae.likelihood.elementwise = lambda params: TooLarge(params[0], vae.likelihood.sigma)
    off = evaluate(vae, split_of(x), 10).per_image.log_likelihood - marginal(vae).log_prob(x)
    torch.testing.assert_close(off, torch.full((5,), 0.06, dtype=torch.float64))


def shard(first: int, stop: int) -> list[float]:
    """log p(x) of some images of a fixed data set, as one process of several would estimate it."""
    vae = linear_gaussian(shift=0.1, widen=1.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = marginal(vae).sample((50,))
    part = evaluation.estimate(
        vae.model, vae.guide, x[first:stop], 70, chunk=33, seed=0, first_image=first
    )
    return part.log_likelihood.tolist()


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_numbers(gaussian):
    vae, x = gaussian
    whole = evaluate(vae, split_of(x), 70).per_image.log_likelihood
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(shard, (0, 21), (21, 50)))
    ours = torch.tensor([*parts[0], *parts[1]], dtype=torch.float64)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)
