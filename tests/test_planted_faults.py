"""Faults found in published VAE code, planted one by one: each check must refuse the faulty twin.

A check is a function that raises AssertionError. It must pass on pyrovae and fail on the fault.
"""

import math

import pytest
import torch
from exact import kl_to_posterior, linear_gaussian, marginal
from tiny import tiny_vae
from torch.nn.functional import binary_cross_entropy_with_logits

from pyrovae import data, importance, likelihoods
from pyrovae.distributions import DiscretizedLogistic
from pyrovae.errors import InputError
from pyrovae.estimates import estimate
from pyrovae.evaluation import evaluate
from pyrovae.importance import log_mean_exp, log_weights

CHUNK = 20


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def ours(vae, x, k):
    return estimate(vae.model, vae.guide, x, k, chunk=CHUNK).log_likelihood


def drawn(vae, x, k):
    with torch.no_grad():
        return log_weights(vae.model, vae.guide, x, k)


# Estimators of log p(x): (vae, x, K) -> (B,)


def check_exact(estimator):
    """With the exact posterior every weight is p(x), for any K."""
    vae = linear_gaussian()
    x = marginal(vae).sample((6,))
    for k in (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7):
        torch.testing.assert_close(
            estimator(vae, x, k), marginal(vae).log_prob(x), rtol=1e-10, atol=1e-10
        )


def check_one_draw_is_the_elbo(estimator):
    """With K = 1 the expectation is log p(x) - KL(q || p(z | x)), known in closed form."""
    vae = linear_gaussian(shift=0.2, widen=1.3)
    x = marginal(vae).sample((4000,))
    gap = marginal(vae).log_prob(x) - estimator(vae, x, 1)
    se = float(gap.std()) / math.sqrt(len(x))
    assert abs(float(gap.mean()) - float(kl_to_posterior(vae, x[:1]))) < 5 * se


def check_converges(estimator):
    """With many draws from a guide wider than the posterior, log p(x) within the draws' error."""
    vae = linear_gaussian(shift=0.1, widen=1.2)
    x, k = marginal(vae).sample((300,)), 2000
    gap = estimator(vae, x, k) - marginal(vae).log_prob(x)
    w = torch.exp(drawn(vae, x[:1], 50_000) - marginal(vae).log_prob(x[:1]))
    se = float(w.std()) / math.sqrt(k * len(x))
    bias = float(w.var()) / (2 * k)
    assert abs(float(gap.mean()) + bias) < 5 * se


CHECKS = [check_exact, check_one_draw_is_the_elbo, check_converges]


def wrong_sign(vae, x, k):
    """PyTorch-VAE: weights of minus what they should be."""
    return -log_mean_exp(-drawn(vae, x, k))


def small_k_ignored(vae, x, k, batch_size=100):
    """pythae: K is taken as the batch size if it is no larger."""
    return log_mean_exp(drawn(vae, x, max(k, batch_size)))


def divides_by_the_requested_k(vae, x, k):
    """scvi-tools: draws whole chunks, ceil(K / chunk) of them, and divides by K."""
    total = math.ceil(k / CHUNK) * CHUNK
    return torch.logsumexp(drawn(vae, x, total), 0) - math.log(k)


def one_weight_for_the_batch(vae, x, k):
    """Pyro's vectorized_importance_weights: the images share a weight."""
    return log_mean_exp(drawn(vae, x, k).mean(1, keepdim=True)).expand(len(x))


def sign_and_name_disagree(vae, x, k):
    """pythae: log p(x) is returned as "nll"; here its mirror, -log p(x) as a log-likelihood."""
    return -ours(vae, x, k)


FAULTY = {
    wrong_sign: check_converges,
    small_k_ignored: check_one_draw_is_the_elbo,
    divides_by_the_requested_k: check_exact,
    one_weight_for_the_batch: check_exact,
    sign_and_name_disagree: check_exact,
}


@pytest.mark.parametrize("check", CHECKS)
def test_our_estimator_passes(check):
    check(ours)


@pytest.mark.parametrize("fault", FAULTY, ids=lambda f: f.__name__)
def test_a_faulty_estimator_is_caught(fault):
    with pytest.raises(AssertionError):
        FAULTY[fault](fault)


# Masses: (loc, scale) -> log-probabilities of the 256 levels


def check_total_mass(log_mass):
    for loc, scale in ((0.5, 0.1), (0.02, 0.3), (0.99, 0.05), (0.3, 3.0)):
        total = float(torch.exp(log_mass(loc, scale)).sum())
        assert total == pytest.approx(1.0, abs=1e-9)


def our_logistic(loc, scale):
    levels = torch.arange(256, dtype=torch.float64) / 255
    at = torch.tensor([loc, scale], dtype=torch.float64)
    return DiscretizedLogistic(at[0], at[1], 255).log_prob(levels)


def logistic_without_tails(loc, scale):
    """vae_vampprior: the end bins get their own width alone, and the mass is not one."""
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 255
    cdf = torch.sigmoid((edges - loc) / scale)
    return torch.log(cdf[1:] - cdf[:-1])


def test_our_mass_is_one():
    check_total_mass(our_logistic)


def test_a_logistic_without_its_tails_is_caught():
    with pytest.raises(AssertionError):
        check_total_mass(logistic_without_tails)


# Means over a split: (vae, split, monkeypatch) -> mean log p(x)


def check_ragged(mean_of_split, monkeypatch):
    """37 images in batches of 16: every image counts once."""
    vae, _ = tiny_vae()
    images = torch.randint(0, 2, (60, 1, 4, 4), dtype=torch.uint8)
    split = data.from_array(images, test_size=37, valid_size=3).test
    x = split.tensor()
    single = [
        estimate(vae.model, vae.guide, x[i : i + 1], 5, chunk=5, first_image=i).log_likelihood
        for i in range(len(x))
    ]
    mean = float(torch.cat(single).mean())
    assert mean_of_split(vae, split, monkeypatch) == pytest.approx(mean, abs=1e-5)


def our_mean(vae, split, monkeypatch):
    plan = importance.Plan(images=16, particles=2)
    monkeypatch.setattr(importance, "plan", lambda *a, **k: plan)
    return evaluate(vae, split, 5, information_images=0).log_likelihood


def mean_of_batch_means(vae, split, monkeypatch):
    """vae_vampprior and many others: a short last batch counts as much as a whole one."""
    x = split.tensor()
    means = [
        estimate(
            vae.model, vae.guide, x[i : i + 16], 5, chunk=5, first_image=i
        ).log_likelihood.mean()
        for i in range(0, len(x), 16)
    ]
    return float(torch.stack(means).mean())


def test_our_mean_counts_each_image_once(monkeypatch):
    check_ragged(our_mean, monkeypatch)


def test_averaging_batch_means_is_caught(monkeypatch):
    with pytest.raises(AssertionError):
        check_ragged(mean_of_batch_means, monkeypatch)


# Scores of x under logits: (logits, x) -> (B,)


def check_grey_is_refused(score):
    grey = torch.full((2, 1, 4, 4), 0.3)
    try:
        value = score(torch.zeros(2, 1, 4, 4), grey)
    except InputError as error:
        assert "--binarize" in str(error)
    else:
        raise AssertionError(f"grey pixels were scored: {value}")


def our_bernoulli(logits, x):
    likelihood = likelihoods.Bernoulli((1, 4, 4))
    likelihood.check(x)
    return likelihood(logits.unsqueeze(1)).log_prob(x)


def cross_entropy(logits, x):
    """The examples of Pyro and pythae: a cross-entropy of grey values, which is no likelihood."""
    return -binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))


def test_grey_pixels_are_refused():
    check_grey_is_refused(our_bernoulli)
    _, grey = tiny_vae(likelihood="gaussian")
    with pytest.raises(InputError, match="--binarize"):
        evaluate(tiny_vae()[0], grey.test, 2)


def test_a_cross_entropy_of_grey_pixels_is_caught():
    with pytest.raises(AssertionError, match="grey pixels were scored"):
        check_grey_is_refused(cross_entropy)
