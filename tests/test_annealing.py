"""Annealed importance sampling against models whose log p(x) is known, from both sides."""

import itertools
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import linear_gaussian, marginal
from tiny import tiny_vae

from pyrovae import annealing, hmc, importance, posteriors, priors
from pyrovae.annealing import Settings, anneal, anneal_split, bdmc, schedule
from pyrovae.errors import InputError
from pyrovae.hmc import simulate

F64 = torch.float64
LIKE = torch.zeros(1, 6, dtype=F64)


def test_schedule():
    for num in (1, 2, 7, 1000):
        b = schedule(num)
        assert b.shape == (num + 1,)
        assert b[0] == 0
        assert b[-1] == 1
        assert (b.diff() > 0).all()
        torch.testing.assert_close(b + b.flip(0), torch.ones_like(b))
    # dense at both ends, by the logistic function's slope there
    b = schedule(1000).diff()
    slope = math.exp(-4) / (1 + math.exp(-4)) ** 2
    assert float(b[0] / b[500]) == pytest.approx(4 * slope, rel=0.01)


@pytest.mark.parametrize("num", [1, 2, 9])
@pytest.mark.parametrize("step_sizes", annealing.STEP_SIZES)
def test_every_weight_is_the_evidence_when_chains_start_from_the_posterior(num, step_sizes):
    """The slope of log f_b is log p(x) everywhere, whatever the transitions do."""
    vae = linear_gaussian()
    drawn = simulate(vae.model, LIKE, 5)
    both = bdmc(
        vae.model,
        vae.guide,
        drawn,
        start="guide",
        num_temperatures=num,
        num_chains=3,
        num_leapfrog=2,
        step_sizes=step_sizes,
    )
    truth = marginal(vae).log_prob(drawn.x)
    for side in both:
        torch.testing.assert_close(
            side.log_weights, truth.expand(3, 5), rtol=1e-10, atol=1e-10, check_stride=False
        )
        torch.testing.assert_close(side.log_likelihood, truth, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(side.ess, torch.full((5,), 3.0, dtype=F64))
        assert (side.error < 1e-9).all()
    assert (both.lower.accept_rate == 1).all() == (num == 1)


def test_one_temperature_is_importance_sampling():
    vae = linear_gaussian(shift=0.2, widen=1.4)
    x = simulate(vae.model, LIKE, 40).x
    truth = marginal(vae).log_prob(x)
    result = anneal(vae.model, vae.guide, x, start="guide", num_temperatures=1, num_chains=500)
    assert (result.error > 0.01).all()
    assert ((result.log_likelihood - truth).abs() < 5 * result.error).all()
    w = result.log_weights
    v = torch.exp(w - w.amax(0))
    torch.testing.assert_close(result.ess, v.sum(0) ** 2 / (v**2).sum(0))
    torch.testing.assert_close(result.error, v.std(0) / v.mean(0) / math.sqrt(500))
    torch.testing.assert_close(result.log_likelihood, v.mean(0).log() + w.amax(0))


def assert_unbiased(model, truth, drawn, guide=None, **settings):
    """exp(w) / p(x) of forward chains and p(x) / exp(w) of reverse ones have mean one.

    Each image gives one independent mean; a bound on the error comes from their spread.
    """
    both = bdmc(model, guide or model, drawn, num_chains=8, num_leapfrog=2, **settings)
    for sign, side in ((1, both.lower), (-1, both.upper)):
        ratio = torch.exp(sign * (side.log_weights - truth)).mean(0)
        error = ratio.std() / math.sqrt(len(ratio))
        assert error < 0.1, "weights of too heavy a tail to be seen to be unbiased"
        assert (ratio.mean() - 1).abs() < 5 * error, "not unbiased"
    return both


def check_linear_gaussian(start, num):
    vae = linear_gaussian(features=2, latent_dim=2, shift=0.2, widen=1.3)
    drawn = simulate(vae.model, LIKE[:, :2], 250, seed=3)
    truth = marginal(vae).log_prob(drawn.x)
    both = assert_unbiased(vae.model, truth, drawn, vae.guide, start=start, num_temperatures=num)
    # the weights vary, so that a mean of one is no accident
    assert both.lower.log_weights.std(0).mean() > 0.1


@pytest.mark.parametrize(("start", "num"), [("prior", 60), ("guide", 10)])
def test_weights_are_unbiased_with_few_temperatures(start, num):
    check_linear_gaussian(start, num)


def gamma_model(x):
    """z ~ Gamma(2, 1), x ~ Poisson(z): p(x) is negative binomial."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.0)))
        pyro.sample("x", dist.Poisson(z), obs=x)


def gamma_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.LogNormal(torch.log1p(x) - 0.2, x.new_tensor(0.8)))


def check_gamma(start):
    drawn = simulate(gamma_model, torch.zeros(1, dtype=F64), 250, seed=2)
    truth = dist.GammaPoisson(F64_ONE * 2, F64_ONE).log_prob(drawn.x)
    assert_unbiased(gamma_model, truth, drawn, gamma_guide, start=start, num_temperatures=30)


F64_ONE = torch.ones((), dtype=F64)


@pytest.mark.parametrize("start", annealing.STARTS)
def test_a_positive_latent_is_annealed_through_its_jacobian(start):
    check_gamma(start)


def no_jacobian(patch):
    real = hmc._bijection

    class Flat:
        def __init__(self, site):
            self.real = real(site)
            self.inv = self.real.inv

        def __call__(self, u):
            return self.real(u)

        def log_abs_det_jacobian(self, u, z):
            return torch.zeros_like(u)

    patch.setattr(hmc, "_bijection", Flat)


def always_accept(patch):
    patch.setattr(torch.special, "log_ndtr", lambda n: torch.full_like(n, -math.inf))


def wrong_sign(patch):
    real = annealing.Bridge.slope
    patch.setattr(annealing.Bridge, "slope", lambda self, point: -real(self, point))


def short_schedule(patch):
    patch.setattr(annealing, "schedule", lambda num: 0.97 * schedule(num))


def moves_at_the_wrong_temperature(patch):
    real = annealing.Bridge.weights
    patch.setattr(annealing.Bridge, "weights", lambda self, b: real(self, b**2))


def start_near_zero(patch):
    """Instead of at draws of f_0."""
    real = annealing.Bridge.draw
    patch.setattr(
        annealing.Bridge,
        "draw",
        lambda self, *a, **k: self.evaluate(0.3 * real(self, *a, **k).u),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "check", "arguments"),
    [
        (no_jacobian, check_gamma, ("guide",)),
        (always_accept, check_gamma, ("prior",)),
        (wrong_sign, check_linear_gaussian, ("guide", 10)),
        (short_schedule, check_linear_gaussian, ("guide", 10)),
        (moves_at_the_wrong_temperature, check_linear_gaussian, ("prior", 60)),
        (start_near_zero, check_linear_gaussian, ("guide", 10)),
    ],
)
def test_a_planted_fault_is_caught(fault, check, arguments, monkeypatch):
    """Each check, with these very arguments, passes above."""
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="unbiased"):
        check(*arguments)


@pytest.fixture(scope="module")
def ladder():
    """A sandwich for each number of temperatures, and the truth."""
    vae = linear_gaussian(features=4, latent_dim=2, shift=0.3, widen=1.5)
    drawn = simulate(vae.model, LIKE[:, :4], 60, seed=1)
    results = {
        num: bdmc(vae.model, vae.guide, drawn, num_temperatures=num, num_leapfrog=3)
        for num in (4, 16, 100)
    }
    return results, marginal(vae).log_prob(drawn.x)


def mean_and_error(values):
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def test_bounds_lie_on_their_sides_of_the_evidence(ladder):
    results, truth = ladder
    for num in (4, 16):
        low, low_error = mean_and_error(results[num].lower.log_likelihood - truth)
        high, high_error = mean_and_error(results[num].upper.log_likelihood - truth)
        assert low < 5 * low_error
        assert high > -5 * high_error
    # with few temperatures, far from it
    assert mean_and_error(results[4].lower.log_likelihood - truth)[0] < -0.3
    assert mean_and_error(results[4].upper.log_likelihood - truth)[0] > 0.3


def test_both_bounds_meet_the_closed_form_as_temperatures_grow(ladder):
    results, truth = ladder
    both = results[100]
    assert ((both.lower.log_likelihood - truth).abs() < 5 * both.lower.error).all()
    assert (both.lower.error < 0.5).all()
    for side in both:
        mean, error = mean_and_error(side.log_likelihood - truth)
        assert abs(mean) < 5 * error + 0.02
        assert error < 0.08


def test_the_gap_shrinks_with_the_number_of_temperatures(ladder):
    results, _ = ladder
    gaps = [both.gap for both in results.values()]
    for wide, narrow in itertools.pairwise(gaps):
        less, error = mean_and_error(wide - narrow)  # of the same images
        assert less > 4 * error
    last, error = mean_and_error(gaps[-1])
    assert abs(last) < 0.05 + 5 * error


@pytest.mark.parametrize("step_sizes", annealing.STEP_SIZES)
def test_acceptance_is_near_its_target(step_sizes):
    vae = linear_gaussian(features=4, latent_dim=3)
    drawn = simulate(vae.model, LIKE[:, :4], 10)
    both = bdmc(
        vae.model, vae.guide, drawn, num_temperatures=100, num_leapfrog=3, step_sizes=step_sizes
    )
    for side in both:
        off = side.accept_rate - hmc.TARGET_ACCEPT
        assert off.mean().abs() < 0.06
        assert off.abs().max() < 0.15


def nonlinear(x):
    """Two latents, four binary pixels, and a sharply curved posterior."""
    weight = torch.tensor([[3.0, -2.0], [1.0, 4.0], [-3.0, 1.0], [2.0, 2.0]], dtype=F64)
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        logits = torch.sin(2 * z) @ weight.T + z.square().sum(-1, keepdim=True) - 1
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def nonlinear_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.3 * x[..., :2], x.new_tensor(1.2)).to_event(1))


@pytest.mark.parametrize("start", annealing.STARTS)
def test_a_nonlinear_model_against_quadrature(start):
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=F64)] * 4)
    line = torch.linspace(-7, 7, 561, dtype=F64)
    z = torch.cartesian_prod(line, line)
    with torch.no_grad():
        grid = hmc.Densities(nonlinear, None, x)
        grid.pack({"z": z[:1].unsqueeze(1).expand(1, 16, 2)})
        log_joint = sum(grid.terms(z.unsqueeze(1).expand(-1, 16, 2))[:2])
    truth = torch.logsumexp(log_joint, 0) + 2 * math.log(14 / 560)
    assert float(truth.exp().sum()) == pytest.approx(1, abs=1e-8)  # over all sixteen x
    result = anneal(
        nonlinear,
        nonlinear_guide,
        x,
        start=start,
        num_chains=64,
        num_temperatures=60,
        num_leapfrog=4,
    )
    assert ((result.log_likelihood - truth).abs() < 5 * result.error).all()
    assert (result.error < 0.12).all()


def hierarchy(x):
    with pyro.plate("data", len(x), dim=-1):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 0.5), obs=x)


def hierarchy_guide(x):
    with pyro.plate("data", len(x), dim=-1):
        b = pyro.sample("b", dist.Normal(0.8 * x, 1.0))
        pyro.sample("a", dist.Normal(b / 2, 1.0))


@pytest.mark.parametrize("start", annealing.STARTS)
def test_a_hierarchy_of_sites(start):
    drawn = simulate(hierarchy, torch.zeros(1, dtype=F64), 12)
    truth = dist.Normal(F64_ONE * 0, 2.25**0.5).log_prob(drawn.x)
    both = bdmc(
        hierarchy, hierarchy_guide, drawn, start=start, num_temperatures=100, num_leapfrog=3
    )
    assert ((both.lower.log_likelihood - truth).abs() < 5 * both.lower.error).all()
    assert (both.lower.error < 0.3).all()
    mean, error = mean_and_error(both.upper.log_likelihood - truth)
    assert abs(mean) < 5 * error + 0.02


@pytest.mark.parametrize("prior", list(priors.REGISTRY))
@pytest.mark.parametrize("posterior", list(posteriors.REGISTRY))
def test_every_prior_and_posterior(prior, posterior):
    """A single temperature is importance sampling: the same number from another program."""
    args = {} if prior in ("standard-normal", "flow") else {"components": 3}
    vae, data = tiny_vae(prior=prior, prior_args=args, posterior=posterior)
    x = data.test.tensor()
    results = [
        anneal(vae.model, vae.guide, x, start=start, num_temperatures=1, num_chains=256)
        for start in annealing.STARTS
    ]
    parts = importance.chunks(vae.model, vae.guide, x, 1000, chunk=1000, seed=0)
    w = torch.cat([terms.log_weights for terms in parts]).double()
    v = torch.exp(w - w.amax(0))
    error = v.std(0) / v.mean(0) / math.sqrt(1000)
    for result in results:
        difference = result.log_likelihood - importance.log_mean_exp(w)
        assert (difference.abs() < 5 * torch.hypot(error, result.error) + 1e-3).all()
    few = {"num_temperatures": 3, "num_chains": 16, "num_leapfrog": 1}
    walked = anneal(vae.model, vae.guide, x, start="guide", **few)
    assert (walked.accept_rate > 0.1).all()
    difference = walked.log_likelihood - importance.log_mean_exp(w)
    assert (difference.abs() < 5 * torch.hypot(error, walked.error) + 1e-3).all()


def run(vae, x, **options):
    return anneal(
        vae.model,
        vae.guide,
        x,
        **{"num_temperatures": 8, "num_leapfrog": 1, "num_chains": 3, **options},
    )


@pytest.mark.parametrize(("start", "step_sizes"), [("prior", "frozen"), ("guide", "adaptive")])
def test_results_do_not_depend_on_the_batch(start, step_sizes):
    vae = linear_gaussian(shift=0.1)
    x = simulate(vae.model, LIKE, 9).x
    options = {"start": start, "step_sizes": step_sizes}
    whole = run(vae, x, **options)
    parts = [run(vae, x[i : i + 4], first_image=i, **options) for i in range(0, 9, 4)]
    torch.testing.assert_close(
        torch.cat([part.log_weights for part in parts], 1), whole.log_weights, rtol=1e-9, atol=1e-9
    )
    small = run(vae, x, memory=40_000, **options)
    for ours, theirs in zip(small, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_reproducible_from_the_seed():
    vae = linear_gaussian(shift=0.1)
    x = simulate(vae.model, LIKE, 1).x.expand(4, -1)
    before = torch.get_rng_state()
    a, b, c = (run(vae, x, seed=s).log_weights for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(list(pyro.get_param_store().keys())) == 0
    assert torch.equal(a, b)
    assert len(torch.cat([a, c]).unique()) == 2 * a.numel()  # each image and chain its own
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("two_sided", [False, True])
def test_resuming_gives_what_a_straight_run_gives(two_sided, tmp_path):
    vae = linear_gaussian(shift=0.1)
    drawn = simulate(vae.model, LIKE, 5)
    path = tmp_path / "anneal.pt"
    settings = {"num_temperatures": 4, "num_leapfrog": 1, "num_chains": 256}
    memory = 2_000_000  # two images a batch
    total = Settings(**settings).gradients(5, 1 + two_sided)

    def go(**options):
        if two_sided:
            return bdmc(vae.model, vae.guide, drawn, memory=memory, **settings, **options)
        return (anneal(vae.model, vae.guide, drawn.x, memory=memory, **settings, **options),)

    def stop(done):
        if done > total / 2:
            raise StopHereError

    straight = go()
    with pytest.raises(StopHereError):
        go(checkpoint=path, progress=stop)
    seen = []
    resumed = go(checkpoint=path, progress=seen.append)
    assert seen[0] == total * 2 // 5  # the first batch was not done again
    assert seen[-1] == total
    again = go(checkpoint=path, progress=seen.append)
    assert seen[-1] == total
    for one, two, three in zip(straight, resumed, again, strict=True):
        for a, b, c in zip(one, two, three, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    vae = linear_gaussian(shift=0.1)
    x = simulate(vae.model, LIKE, 3).x
    path = tmp_path / "anneal.pt"
    run(vae, x, checkpoint=path)
    for options, name in [
        ({"seed": 1}, "seed 0, not 1"),
        ({"num_chains": 4}, "num_chains 3, not 4"),
        ({"start": "guide"}, "start prior, not guide"),
        ({"first_image": 1}, "first image 0, not 1"),
    ]:
        with pytest.raises(InputError, match=name):
            run(vae, x, checkpoint=path, **options)
    with pytest.raises(InputError, match="with data"):
        run(vae, x + 1, checkpoint=path)
    with torch.no_grad():
        vae.decoder.bias += 0.1
    with pytest.raises(InputError, match=r"log p\(x \| z\) of its model"):
        run(vae, x, checkpoint=path)
    from pyrovae.runs import save_checkpoint

    save_checkpoint(path, {"something": "else"})
    with pytest.raises(InputError, match="no checkpoint of annealing"):
        run(vae, x, checkpoint=path)


@pytest.mark.parametrize("simulated", [False, True])
def test_a_split_in_one_call(simulated):
    vae, data = tiny_vae()
    settings = Settings(num_temperatures=20, num_leapfrog=2, num_chains=4)
    announced, done = [], []
    result = anneal_split(
        vae,
        data.test,
        5,
        settings,
        simulated=simulated,
        announce=announced.append,
        progress=done.append,
    )
    assert done == sorted(done)
    assert done[-1] == announced[0].gradients == result.gradients
    assert announced[0].seconds > 0
    assert "million gradient evaluations, about" in str(announced[0])
    per_image = result.lower_per_image
    assert result.num_images == 5 == len(per_image.log_likelihood)
    assert result.log_likelihood == pytest.approx(float(per_image.log_likelihood.mean()))
    expected = float(per_image.error.square().sum()) ** 0.5 / 5
    assert result.monte_carlo_se == pytest.approx(expected)
    summary = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert summary["num_chains"] == 4
    assert not any(name.endswith("per_image") for name in summary)
    text = str(result)
    for part in ("log p(x)", "20 temperatures from the prior", "dynamic binarisation", "seed 0"):
        assert part in text
    if simulated:
        assert result.gap == pytest.approx(result.upper - result.log_likelihood)
        assert "upper bound" in text
        assert result.split == "simulated"
    else:
        assert result.upper is None
        assert summary["gap"] is None
        assert "upper bound" not in text
        own = anneal(
            vae.model,
            vae.guide,
            data.test.tensor()[:5],
            num_temperatures=20,
            num_leapfrog=2,
            num_chains=4,
        )
        assert torch.equal(own.log_likelihood, per_image.log_likelihood)


def test_one_chain_and_one_image_have_no_error():
    vae, data = tiny_vae()
    one = anneal_split(vae, data.test, 1, Settings(1, 2, 1))
    assert one.lower_per_image.error.isnan().all()
    assert one.to_dict()["log_likelihood_se"] is None
    assert one.to_dict()["monte_carlo_se"] is None


def test_cost_in_words():
    words = [str(annealing.Cost(10**6, s)).rsplit("about ")[1] for s in (0.2, 80, 600, 20_000)]
    assert words == ["0.2 s", "80 s", "10.0 min", "5.6 h"]


def test_refusals():
    vae, data = tiny_vae()
    for name in ("num_chains", "num_temperatures", "num_leapfrog"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')}.*at least 1, got 0"):
            Settings(**{name: 0})
    with pytest.raises(InputError, match=r"--start.* prior or guide, got 'q'"):
        anneal(vae.model, vae.guide, data.test.tensor(), start="q")
    with pytest.raises(InputError, match=r"--step-sizes.* frozen or adaptive"):
        Settings(step_sizes="fixed")
    with pytest.raises(InputError, match=r"--num-images.* at least 1"):
        anneal_split(vae, data.test, 0)
    with pytest.raises(InputError, match="no images"):
        anneal(vae.model, vae.guide, data.test.tensor()[:0])
    _, grey = tiny_vae(likelihood="gaussian")
    with pytest.raises(InputError, match="Bernoulli expects x in"):
        anneal_split(vae, grey.test)


def test_weights_that_are_no_numbers_are_refused():
    def broken(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            bad = torch.where(x > 0, torch.nan, 1.0)
            pyro.sample("x", dist.Normal(z, bad, validate_args=False), obs=x)

    with pytest.raises(InputError, match="of image 11 are not numbers"):
        anneal(
            broken,
            broken,
            torch.tensor([0.0, 1.0]),
            num_temperatures=2,
            num_chains=2,
            first_image=10,
        )
