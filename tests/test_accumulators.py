"""What a stream of log-weights tells: what they tell all at once, by the formulas as they stand."""

import math

import pytest
import torch
from tiny import tiny_vae

from pyrovae import accumulators, estimates, importance
from pyrovae.accumulators import LogWeights, curve_sizes, rows_kept
from pyrovae.diagnostics import psis
from pyrovae.importance import log_mean_exp


def gaussian_weights(k, replicates, scale=1.3, dims=2, seed=0):
    """log N(z; 0, 1) - log N(z; 0, scale) for z from the latter: (K, R); the mean weight is one."""
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(k, replicates, dims, generator=g, dtype=torch.float64)
    normal = torch.distributions.Normal
    return (normal(0.0, 1.0).log_prob(z) - normal(0.0, scale).log_prob(z)).sum(-1)


def relative_variance(scale, dims):
    return (scale**2 / math.sqrt(2 * scale**2 - 1)) ** dims - 1


def test_monte_carlo_error_and_bias_are_those_of_many_repetitions():
    k, replicates = 100, 20_000
    log_w = gaussian_weights(k, replicates, scale=2.0)
    estimates = log_mean_exp(log_w)
    error = streamed(log_w, k).error
    spread = float(estimates.std())
    assert float(error.mean()) == pytest.approx(spread, rel=0.02)
    expected = math.sqrt(relative_variance(2.0, 2) / k)
    assert float(error.mean()) == pytest.approx(expected, rel=0.02)
    # log p(x) is zero, so the mean of the estimates is their bias
    se = spread / math.sqrt(replicates)
    bias = float((-0.5 * error**2).mean())
    assert abs(float(estimates.mean()) - bias) < 5 * se + 0.1 * abs(bias)
    assert float(estimates.mean()) < -5 * se


def by_the_formulas(log_w):
    """Of all log-weights (K, B) together."""
    k = len(log_w)
    w = (log_w - log_w.amax(0)).exp()
    error = w.std(0) / w.mean(0) / math.sqrt(k) if k > 1 else torch.full_like(w[0], math.nan)
    smoothed = psis(log_w)
    scale = (log_w - smoothed.log_weights).gather(0, log_w.argmin(0, keepdim=True))[0]
    curve = [
        log_mean_exp(log_w[: k // size * size].unflatten(0, (k // size, size)), 1).mean(0)
        for size in curve_sizes(k)
    ]
    return {
        "log_mean": log_mean_exp(log_w),
        "error": error,
        "pareto_k": smoothed.pareto_k,
        "ess": smoothed.ess,
        # The smallest weight was not smoothed: it has the scale of all.
        "smoothed_log_mean": scale + log_mean_exp(smoothed.log_weights),
        "bounds": torch.stack(curve, 1),
    }


def streamed(log_w, cut):
    stream = LogWeights(*log_w.shape, log_w.device)
    for part in log_w.split(cut):
        stream.add(part)
    return stream.summary()


def assert_equal_to_the_formulas(log_w, cut, tolerance=1e-9):
    ours = streamed(log_w, cut)._asdict()
    for name, expected in by_the_formulas(log_w).items():
        torch.testing.assert_close(
            ours[name], expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )


def dominated(w):
    """One weight above all others by hundreds of nats, and of another image three and five."""
    w = w.clone()
    for image, count in enumerate((1, 3, 5)):
        w[-count:, image] += 800.0
    return w


CASES = {
    "as drawn": lambda w: w,
    "rising": lambda w: w.sort(0).values,
    "falling": lambda w: w.sort(0, descending=True).values,
    "rising by much": lambda w: w + torch.linspace(0, 3000, len(w)).double().unsqueeze(1),
    "300 nats apart": lambda w: 300 * w,
    "700 nats apart": lambda w: 700 * w,
    "3000 nats apart": lambda w: 3000 * w,
    "dominated": dominated,
    "tied": lambda w: w.round(),
}


@pytest.fixture(params=[8, 700, 4096])
def waiting(request, monkeypatch):
    """How many log-weights are taken in together."""
    monkeypatch.setattr(accumulators, "_WAITING", request.param)
    return request.param


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 2, 10, 24, 25, 1000])
def test_in_pieces_as_all_at_once(waiting, k, case):
    w = CASES[case](gaussian_weights(k, 12, scale=0.7) - 1000)
    for cut in (1, 192, 5000):
        assert_equal_to_the_formulas(w, cut)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [4294, 4295, 30_000])
def test_blocks_of_the_usual_size(k, case):
    w = CASES[case](gaussian_weights(k, 5, scale=0.7) - 1000)
    for cut in (192, 30_000):
        assert_equal_to_the_formulas(w, cut)


def test_float32_is_kept_as_it_is(waiting):
    w = gaussian_weights(3000, 4, scale=0.7).float() - 600
    ours, exact = streamed(w, 192), streamed(w.double(), 192)
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a, b)


def test_an_estimate_takes_them_in_as_they_come(monkeypatch):
    """Several blocks, chunks that do not divide them, and images in three groups."""
    monkeypatch.setattr(accumulators, "_WAITING", 100)
    monkeypatch.setitem(estimates._NUMBERS_AT_ONCE, "cpu", 2 * rows_kept(1000))
    vae, data = tiny_vae()
    x = data.test.tensor()[:5]
    given = {"chunk": 96, "seed": 3}
    found = estimates.estimate(vae.model, vae.guide, x, 1000, **given)
    chunks = importance.chunks(vae.model, vae.guide, x, 1000, **given)
    expected = by_the_formulas(torch.cat([terms.log_weights for terms in chunks]).double())
    names = {
        "log_likelihood": "log_mean",
        "mc_error": "error",
        "pareto_k": "pareto_k",
        "ess": "ess",
        "psis_log_likelihood": "smoothed_log_mean",
        "bounds": "bounds",
    }
    for ours, theirs in names.items():
        torch.testing.assert_close(
            getattr(found, ours), expected[theirs], rtol=1e-9, atol=1e-9, msg=ours
        )


SIZES = {
    1: [1],
    2: [1, 2],
    9: [1, 9],
    10: [1, 10],
    11: [1, 10, 11],
    100: [1, 10, 100],
    777: [1, 10, 100, 777],
    1000: [1, 10, 100, 1000],
    5000: [1, 10, 100, 1000, 5000],
}


@pytest.mark.parametrize("k", SIZES)
def test_curve_of_bounds(waiting, k):
    assert curve_sizes(k) == SIZES[k]
    log_w = gaussian_weights(k, 6)
    curve = streamed(log_w, 192).bounds
    assert curve.shape == (6, len(SIZES[k]))
    for size, column in zip(SIZES[k], curve.T, strict=True):
        groups = log_w[: k // size * size].view(k // size, size, 6)
        torch.testing.assert_close(column, log_mean_exp(groups, 1).mean(0), rtol=1e-10, atol=1e-12)
    if k in (10, 100, 1000, 5000):  # the same draws in every mean: Jensen's inequality
        assert (curve.diff(dim=1) >= -1e-12).all()


def test_smoothing_changes_nothing_where_there_is_no_tail():
    for log_w in (gaussian_weights(20, 5) - 80, torch.full((100, 2), -80.0).double()):
        ours = streamed(log_w, 30).smoothed_log_mean
        torch.testing.assert_close(ours, log_mean_exp(log_w), rtol=0, atol=1e-10)


def test_smoothing_steadies_an_estimate_with_a_heavy_tail(waiting):
    result = streamed(gaussian_weights(1000, 400, scale=0.7), 192)
    assert float(result.pareto_k.median()) > 0.5
    assert float(result.smoothed_log_mean.std()) < float(result.log_mean.std())
    assert abs(float(result.smoothed_log_mean.mean())) < 3 * float(result.smoothed_log_mean.std())


def test_what_is_kept_grows_with_the_root_of_k():
    assert rows_kept(4294) == 4294
    assert rows_kept(4295) == 4294
    assert rows_kept(5000) == 4096 + 214
    assert rows_kept(100_000) == 4096 + 950
    assert rows_kept(10_000_000) == 4096 + 9488

    def held(k):
        stream = LogWeights(k, 2)
        for _ in range(k // 20_000):
            stream.add(torch.randn(20_000, 2))
        owned = [*vars(stream).values(), *stream._curve.waiting, *stream._curve.sums]
        return sum(t.untyped_storage().nbytes() for t in owned if isinstance(t, torch.Tensor))

    # Beside the block a dozen sums, and at most ten numbers for each level of the curve.
    for k in (20_000, 400_000):
        assert held(k) < 8 * 2 * (rows_kept(k) + 100)


def test_neither_more_nor_fewer_than_were_announced():
    stream = LogWeights(5000, 2)
    stream.add(torch.zeros(4500, 2))
    with pytest.raises(ValueError, match=r"^expected 5000 log-weights an image; got more$"):
        stream.add(torch.zeros(501, 2))
    with pytest.raises(ValueError, match=r"^expected log-weights of 2 images; got 1$"):
        stream.add(torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"^expected 5000 log-weights an image; got 4500$"):
        stream.summary()


@pytest.mark.parametrize("differ", [1e-3, 1e-9, 0.0])
def test_the_error_of_weights_that_are_nearly_equal(differ):
    """Sums of squares less a squared sum would know nothing of a billionth."""
    log_w = differ * gaussian_weights(9000, 3) - 80
    exact = differ * gaussian_weights(9000, 3).std(0) / math.sqrt(9000)
    # -80 + 1e-9 is known to 1.4e-14.
    torch.testing.assert_close(streamed(log_w, 700).error, exact, rtol=2 * differ + 1e-4, atol=0)


def test_some_weights_that_are_zero_first_and_last():
    log_w = gaussian_weights(9000, 4)
    log_w[:4500] = -math.inf
    ours = streamed(log_w, 300)
    flipped = streamed(log_w.flip(0), 300)
    expected = by_the_formulas(log_w.flip(0))
    for name in ("log_mean", "error", "pareto_k", "ess"):
        torch.testing.assert_close(getattr(ours, name), expected[name], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(getattr(flipped, name), expected[name], rtol=1e-9, atol=1e-9)


def test_weights_that_are_all_zero_or_infinite_or_not_a_number():
    zero = streamed(torch.full((9000, 1), -math.inf), 300)
    assert zero.log_mean.item() == zero.smoothed_log_mean.item() == -math.inf
    assert math.isnan(zero.error.item())
    assert math.isnan(zero.pareto_k.item())
    for value, name in ((math.inf, "inf"), (math.nan, "nan")):
        log_w = gaussian_weights(9000, 2)
        log_w[17, 0] = value
        ours = streamed(log_w, 300)
        assert str(ours.log_mean[0].item()) == str(ours.smoothed_log_mean[0].item()) == name
        assert math.isfinite(ours.log_mean[1].item())
        assert str(ours.pareto_k[0].item()) == str(psis(log_w).pareto_k[0].item()) == name


def test_weights_that_are_equal_at_the_end_alone():
    log_w = torch.zeros(9000, 1, dtype=torch.float64)
    log_w[:4000] = -1.0
    assert_equal_to_the_formulas(log_w, 1000)
    assert streamed(log_w, 1000).pareto_k.isinf().all()


def test_no_gradient_is_asked_for():
    log_w = gaussian_weights(5000, 2).requires_grad_()
    assert not any(value.requires_grad for value in streamed(log_w, 300))


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    log_w = gaussian_weights(9000, 40)
    for here, there in zip(streamed(log_w, 700), streamed(log_w.cuda(), 700), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_before_the_end():
    chunks = gaussian_weights(20_000, 40).cuda().split(700)
    stream = LogWeights(20_000, 40, "cuda")
    stream.add(chunks[0])  # what is loaded on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        for chunk in chunks[1:]:
            stream.add(chunk)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stream.summary().log_mean.isfinite().all()
