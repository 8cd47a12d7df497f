"""Every density is compared with mpmath, SciPy or a sum over its whole support."""

import itertools
import math

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyrovae.distributions import (
    ContinuousBernoulli,
    DiscretizedLogistic,
    FullRankNormal,
    LevelCategorical,
    LogitNormal,
    NormalMixture,
    levels,
)
from pyrovae.errors import InputError
from pyrovae.mixtures import CoupledLogisticMixture, DiscretizedLogisticMixture

DOUBLE = torch.float64
LOGITS = [-500.0, -88.8, -30.0, -3.0, -0.5001, -0.4999, -1e-3, -1e-9, 0.0]
LOGITS += [-t for t in LOGITS[:-1]]
POINTS = [0.0, 2.0**-24, 0.1, 0.5, 0.83, 1 - 2.0**-24, 1.0]


def double(*values):
    return torch.tensor(values, dtype=DOUBLE)


def grid(L, dtype=DOUBLE):
    return torch.arange(L + 1, dtype=dtype) / L


def example(name, batch=(4,)):
    """A random distribution of each kind over ``batch``, in float64."""
    g = torch.Generator().manual_seed(3)

    def normal(*event):
        return torch.randn((*batch, *event), generator=g, dtype=DOUBLE)

    return {
        "discretized-logistic": lambda: DiscretizedLogistic(normal(), normal().exp() / 5, 3),
        "categorical": lambda: LevelCategorical(normal(4)),
        "continuous-bernoulli": lambda: ContinuousBernoulli(3 * normal()),
        "logit-normal": lambda: LogitNormal(normal(), normal().exp()),
        "mixture": lambda: DiscretizedLogisticMixture(
            normal(5), 0.5 + normal(5), normal(5).exp() / 5, 3
        ),
        "coupled": lambda: CoupledLogisticMixture(
            normal(2, 1, 1),
            0.5 + normal(2, 3, 1, 1) / 2,
            normal(2, 3, 1, 1).exp() / 5,
            normal(2, 3, 1, 1).tanh(),
            3,
        ),
        "full-rank": lambda: FullRankNormal(
            normal(2), scale_tril=torch.eye(2, dtype=DOUBLE) + normal(2, 2).abs().tril()
        ),
    }[name]()


NAMES = [
    "discretized-logistic",
    "categorical",
    "continuous-bernoulli",
    "logit-normal",
    "mixture",
    "coupled",
    "full-rank",
]
MASSES = ["discretized-logistic", "categorical", "mixture"]


# Every distribution


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_shapes_and_expand(name, batch):
    d = example(name, batch)
    assert d.batch_shape == batch
    assert d.mean.shape == batch + d.event_shape
    for sample_shape in [(), (5,), (3, 5)]:
        x = d.sample(sample_shape)
        assert x.shape == (*sample_shape, *batch, *d.event_shape)
        assert x.dtype == DOUBLE
        assert d.support.check(x).all()
        assert d.log_prob(x).shape == (*sample_shape, *batch)
    wide = d.expand((6, *batch))
    x = wide.sample()
    assert type(wide) is type(d)
    assert wide.batch_shape == (6, *batch)
    assert x.shape == (6, *batch, *d.event_shape)
    torch.testing.assert_close(wide.log_prob(x), d.log_prob(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(wide.mean, d.mean.expand_as(x), rtol=1e-12, atol=0)
    again = d.to_event(len(batch)).expand((7,))
    assert again.sample().shape == (7, *batch, *d.event_shape)


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_density(name):
    """The samples average to ``mean``, and their score to 0, as that of a density does."""
    pyro.set_rng_seed(0)
    d = example(name)
    n, blocks = 20_000, 40
    x = d.sample((n,))
    if name != "coupled":  # whose mean is exact to first order only
        assert ((x.mean(0) - d.mean).abs() <= 5 * x.std(0) / n**0.5).all()
    names = ["loc", "scale_tril"] if name == "full-rank" else list(d.arg_constraints)
    params = {k: getattr(d, k).clone().requires_grad_() for k in names}
    settings = {"levels": d.levels} if {"loc", "levels"} <= vars(d).keys() else {}
    again = type(d)(**params, **settings)
    per_block = [
        torch.autograd.grad(again.log_prob(block).mean(), list(params.values()))
        for block in x.split(n // blocks)
    ]
    for scores in map(torch.stack, zip(*per_block, strict=True)):
        assert (scores.mean(0).abs() <= 5 * scores.std(0) / blocks**0.5 + 1e-8).all()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("in_front", [False, True])
def test_categorical_levels_whatever_the_layout(in_front, lead):
    """As torch's Categorical, in value and gradient, where classes lie first in memory and last."""
    torch.manual_seed(0)
    raw = torch.randn(*((4, 6, 5) if in_front else (4, 5, 6)), dtype=DOUBLE, requires_grad=True)
    logits = raw.movedim(1, -1) if in_front else raw
    k = torch.randint(0, 6, (*lead, 4, 5))
    wanted = dist.Categorical(logits=logits).log_prob(k)
    found = LevelCategorical(logits).log_prob(k.to(DOUBLE) / 5)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(wanted)
    pair = [torch.autograd.grad((y * weights).sum(), raw)[0] for y in (found, wanted)]
    torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MASSES)
def test_mass_sums_to_one_and_gives_the_mean(name):
    d = example(name)
    x = grid(3)[:, None]
    mass = d.log_prob(x).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(4, dtype=DOUBLE), rtol=1e-10, atol=0)
    torch.testing.assert_close((mass * x).sum(0), d.mean, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", [*MASSES, "coupled"])
def test_a_float32_grid_and_an_exact_one_have_the_same_mass(name):
    d = example(name)
    x = d.sample((50,))
    torch.testing.assert_close(d.log_prob(x.float().double()), d.log_prob(x), rtol=1e-12, atol=0)


def test_levels_constraint():
    for L in (1, 16, 255, 65535):
        assert levels(L).check(torch.arange(L + 1).float() / L).all()
        assert levels(L).check(torch.arange(L + 1).double() / L).all()
        bad = double(-1 / L, 1 + 1 / L, 0.5 / L, math.nan, math.inf)
        assert not levels(L).check(bad).any()


# Discretised logistic


@pytest.mark.parametrize("loc", [-30.0, 0.0, 0.37, 1.0, 30.0])
@pytest.mark.parametrize("scale", [5e-3, 0.05, 1.0, 1e6])
def test_discretized_logistic_against_mpmath(loc, scale):
    L = 15

    def cdf(t):
        return 1 / (1 + mpmath.exp(-(t - mpmath.mpf(loc)) / mpmath.mpf(scale)))

    got = DiscretizedLogistic(double(loc), double(scale), L).log_prob(grid(L))
    # 1 - F starts with as many nines as |loc| / scale has tenfolds: keep them all
    with mpmath.workdps(2_800 if scale < 0.01 else 600):
        for k in range(L + 1):
            below = cdf(mpmath.mpf(2 * k - 1) / (2 * L)) if k else 0
            above = 1 if k == L else cdf(mpmath.mpf(2 * k + 1) / (2 * L))
            want = float(mpmath.log(above - below))
            assert got[k].item() == pytest.approx(want, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_discretized_logistic_has_finite_value_and_true_gradient(dtype):
    x = grid(255, dtype)[:, None, None]
    loc = torch.tensor([-30.0, -1.0, 0.0, 0.5, 1.0, 30.0], dtype=dtype)[:, None]
    scale = torch.tensor([1e-13, 1e-5, 1e-2, 1.0, 1e13], dtype=dtype)
    loc, scale = (p.clone().requires_grad_() for p in torch.broadcast_tensors(loc, scale))
    value = DiscretizedLogistic(loc, scale, 255).log_prob(x)
    assert value.isfinite().all()
    grads = torch.autograd.grad(value.sum(), [loc, scale])
    assert all(g.isfinite().all() for g in grads)
    far = DiscretizedLogistic(loc[-1, 1], scale[-1, 1], 255).log_prob(x[0, 0, 0])
    (slope,) = torch.autograd.grad(far, loc)  # d/dloc of log F = -1/scale, not 0, in the far tail
    assert slope[-1, 1].item() == pytest.approx(-1e5, rel=1e-4)


# Continuous Bernoulli


def mp_moments(t):
    """The log-normaliser log((e^t - 1)/t), mean and variance, to many digits."""
    mpmath.mp.dps = 60
    t = mpmath.mpf(t)
    if t == 0:
        return mpmath.mpf(0), mpmath.mpf(1) / 2, mpmath.mpf(1) / 12
    log_norm = mpmath.log(mpmath.expm1(t) / t)
    mean = -1 / mpmath.expm1(-t) - 1 / t
    return log_norm, mean, 1 / t**2 - 1 / (2 * mpmath.sinh(t / 2)) ** 2


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-6), (DOUBLE, 1e-11)])
@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_against_mpmath(logit, dtype, tol):
    t = torch.tensor(logit, dtype=dtype, requires_grad=True)
    d = ContinuousBernoulli(t)
    log_norm, mean, variance = mp_moments(t.item())
    assert d.mean.item() == pytest.approx(float(mean), rel=tol, abs=1e-30)
    assert d.variance.item() == pytest.approx(float(variance), rel=max(tol * 20, 1e-10))
    entropy = log_norm - mpmath.mpf(t.item()) * mean
    assert d.entropy().item() == pytest.approx(float(entropy), rel=tol, abs=10 * tol)
    for x in torch.tensor(POINTS, dtype=dtype):
        value = d.log_prob(x)
        want = mpmath.mpf(t.item()) * mpmath.mpf(x.item()) - log_norm
        assert value.item() == pytest.approx(float(want), rel=tol, abs=tol)
        (slope,) = torch.autograd.grad(value, t)
        want = mpmath.mpf(x.item()) - mean
        assert slope.item() == pytest.approx(float(want), rel=tol, abs=tol)
        cdf = mpmath.mpf(x.item())
        if logit:
            cdf = mpmath.expm1(t.item() * cdf) / mpmath.expm1(t.item())
        assert d.cdf(x).item() == pytest.approx(float(cdf), rel=5e-4 if tol > 1e-9 else 1e-10)


@pytest.mark.parametrize("logit", [*LOGITS, 0.0499, 0.0501, -0.0499, -0.0501])
def test_continuous_bernoulli_quantiles(logit):
    t = double(logit).requires_grad_()
    d = ContinuousBernoulli(t)
    u = double(1e-12, 0.1, 0.5, 0.9, 0.999)
    x = d.icdf(u)
    torch.testing.assert_close(d.cdf(x.detach()), u, rtol=1e-9, atol=1e-13)
    assert d.icdf(double(0.0, 1.0)).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    # a difference of the closed form, in more digits than it cancels
    for u_i, x_i in zip(u.tolist(), x, strict=True):
        (slope,) = torch.autograd.grad(x_i, t, retain_graph=True)
        mpmath.mp.dps = 60

        def quantile(s, u=u_i):
            return mpmath.log1p(u * mpmath.expm1(s)) / s if s else mpmath.mpf(u)

        want = float(mpmath.diff(quantile, mpmath.mpf(logit), h=mpmath.mpf(10) ** -15))
        assert slope.item() == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_continuous_bernoulli_samples_in_float32_stay_inside():
    pyro.set_rng_seed(0)
    x = ContinuousBernoulli(torch.tensor(LOGITS)).rsample((10_000,))
    assert ((x >= 0) & (x <= 1)).all()
    assert ContinuousBernoulli(torch.zeros(())).rsample().requires_grad is False


# Logit-normal


@pytest.mark.parametrize("loc, scale", [(0.3, 0.1), (-4.0, 0.99), (2.0, 1.01), (-3.0, 30.0)])
def test_logit_normal_against_scipy(loc, scale):
    d = LogitNormal(double(loc), double(scale))
    x = double(2.0**-24, 0.01, 0.5, 0.99, 1 - 2.0**-24)
    y = scipy.special.logit(x.numpy())
    want = scipy.stats.norm(loc, scale).logpdf(y) - np.log(x.numpy()) - np.log1p(-x.numpy())
    torch.testing.assert_close(d.log_prob(x), torch.from_numpy(want), rtol=1e-10, atol=1e-12)
    mpmath.mp.dps = 30
    mean = mpmath.quad(
        lambda e: mpmath.npdf(e) / (1 + mpmath.exp(-loc - scale * e)),
        [-12, -6, -3, -1, -0.3, 0, 0.03, 0.1, 0.2, 0.3, 1, 3, 6, 12],
    )
    assert d.mean.item() == pytest.approx(float(mean), rel=1e-8)


def test_logit_normal_is_exact_in_float32_next_to_one():
    x = torch.tensor(1 - 2.0**-24)
    got = LogitNormal(torch.tensor(0.0), torch.tensor(2.0)).log_prob(x).item()
    want = LogitNormal(double(0.0), double(2.0)).log_prob(x.double()).item()
    assert got == pytest.approx(want, rel=1e-6)
    pyro.set_rng_seed(0)
    extreme = LogitNormal(torch.tensor([-200.0, 200.0]), torch.tensor(1.0)).sample((100,))
    assert ((extreme > 0) & (extreme < 1)).all()


# Mixtures


def test_mixture_of_one_is_its_component():
    one = example("mixture")
    loc, scale = one.loc[:, :1], one.scale[:, :1]
    got = DiscretizedLogisticMixture(loc * 0, loc, scale, 3).log_prob(grid(3)[:, None])
    want = DiscretizedLogistic(loc[:, 0], scale[:, 0], 3).log_prob(grid(3)[:, None])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def pixels(L):
    """All (L + 1)^3 values of one coloured pixel, ((L + 1)^3, 3, 1, 1)."""
    return torch.tensor(list(itertools.product(grid(L).tolist(), repeat=3)), dtype=DOUBLE)[
        ..., None, None
    ]


def test_coupled_mixture_sums_to_one_over_all_colours():
    d = example("coupled")
    mass = d.log_prob(pixels(3)[:, None]).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(4, dtype=DOUBLE), rtol=1e-10, atol=0)


def test_coupled_mixture_by_hand():
    d = example("coupled", ())
    x = torch.tensor([1 / 3, 2 / 3, 1.0], dtype=DOUBLE)
    total = 0.0
    for m in range(2):
        (r, g, b), scale = d.loc[m, :, 0, 0], d.scale[m, :, 0, 0]
        c_0, c_1, c_2 = d.coupling[m, :, 0, 0]
        g = g + c_0 * (x[0] - 0.5)
        b = b + c_1 * (x[0] - 0.5) + c_2 * (x[1] - 0.5)
        mass = DiscretizedLogistic(torch.stack([r, g, b]), scale, 3).log_prob(x).sum().exp()
        total = total + d.logits.softmax(0)[m, 0, 0] * mass
    got = d.log_prob(x[:, None, None]).exp()
    torch.testing.assert_close(got, total, rtol=1e-10, atol=0)


def test_coupled_mixture_samples_have_its_joint_mass():
    pyro.set_rng_seed(0)
    d = example("coupled", ())
    n, colours = 40_000, pixels(3)
    x = (d.sample((n,))[..., 0, 0] * 3).round().long()
    counts = torch.bincount(x @ torch.tensor([16, 4, 1]), minlength=64).double()
    expected = n * d.log_prob(colours).exp()
    kept = expected > 5
    chi2 = ((counts - expected) ** 2 / expected)[kept].sum().item()
    assert scipy.stats.chi2(int(kept.sum()) - 1).sf(chi2) > 1e-6


def test_coupled_mean_is_exact_without_coupling_and_close_inside_the_range():
    loc = torch.tensor([0.45, 0.5, 0.55], dtype=DOUBLE).view(1, 3, 1, 1)
    zero = torch.zeros_like(loc)
    colours = pixels(15)
    for coupling, scale, tolerance in [(0.0, 0.3, 1e-10), (0.7, 0.03, 2e-3)]:
        d = CoupledLogisticMixture(zero[:, 0], loc, zero + scale, zero + coupling, 15)
        want = (d.log_prob(colours).exp()[:, None, None, None] * colours).sum(0)
        torch.testing.assert_close(d.mean, want, rtol=0, atol=tolerance)


def test_coupled_mixture_refuses_two_channels():
    z = torch.zeros(5, 2, 4, 4)
    with pytest.raises(InputError, match="expects 3 channels; got 2"):
        CoupledLogisticMixture(z[:, 0], z, z + 1, z)


# Full-rank normal


def full_rank(D=3):
    g = torch.Generator().manual_seed(1)
    factor = torch.randn(4, D, D, generator=g, dtype=DOUBLE).tril(-1) + torch.eye(D) / 2
    q = FullRankNormal(torch.randn(4, D, generator=g, dtype=DOUBLE), scale_tril=factor)
    loc, log_scale = torch.randn(2, D, generator=g, dtype=DOUBLE)
    return q, dist.Normal(loc, log_scale.exp())


def test_full_rank_kl_equals_that_of_two_full_rank_normals():
    q, p = full_rank()
    other = dist.MultivariateNormal(p.loc, scale_tril=p.scale.diag())
    want = torch.distributions.kl_divergence(q, other)
    got = torch.distributions.kl_divergence(q, p.to_event(1))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    plain = dist.MultivariateNormal(q.loc, scale_tril=q.scale_tril)
    with pytest.raises(NotImplementedError):  # nothing changes for other people's distributions
        torch.distributions.kl_divergence(plain, p.to_event(1))
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(q, dist.Laplace(p.loc, p.scale).to_event(1))


def test_full_rank_kl_is_what_trace_mean_field_uses():
    q, p = full_rank()

    def model():
        with pyro.plate("data", 4):
            pyro.sample("z", p.to_event(1))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", q)

    want = torch.distributions.kl_divergence(q, p.to_event(1)).sum().item()
    pyro.set_rng_seed(0)
    losses = [TraceMeanField_ELBO().loss(model, guide) for _ in range(2)]
    assert losses == pytest.approx([want, want], rel=1e-10)
    noisy = torch.tensor([Trace_ELBO().loss(model, guide) for _ in range(300)])
    assert noisy.std() > 0
    assert abs(noisy.mean() - want) < 5 * noisy.std() / 300**0.5


@pytest.mark.parametrize("name", ["continuous-bernoulli", "logit-normal"])
def test_density_integrates_to_one(name):
    d = example(name, ())

    def density(x):
        return d.log_prob(double(x)).exp().item()

    total, _ = scipy.integrate.quad(density, 0, 1, epsabs=1e-12, epsrel=1e-12)
    assert total == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("smallest", [1.0, 0.1, 1e-3])
def test_a_mixture_of_normals_is_torchs(smallest):
    """Value and every gradient, against torch's own in float64, also where much cancels."""
    stream = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=stream)

    logits, loc, raw = leaf(20), 3 * leaf(20, 5), leaf(20, 5).abs()
    scale = smallest + raw * torch.rand(20, 5, generator=stream).round()
    at = loc[torch.arange(60) % 20] + smallest * leaf(60, 5)
    z = torch.cat([at, 4 * leaf(60, 5)]).reshape(3, 40, 5)
    leaves = [t.requires_grad_() for t in (logits, loc, scale, z)]

    def mixture(kind, logits, loc, scale):
        return kind(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))

    ours = mixture(NormalMixture, *leaves[:3]).log_prob(z)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = mixture(torch.distributions.MixtureSameFamily, *exact[:3]).log_prob(exact[3])
    assert ours.shape == (3, 40)
    expanded = mixture(NormalMixture, *leaves[:3]).expand((40,)).expand((3, 40))
    assert torch.equal(expanded.log_prob(z), ours)
    assert expanded.sample().shape == (3, 40, 5)
    assert expanded.log_prob(z[0, 0]).shape == (3, 40)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), truth, rtol=1e-6, atol=1e-5)
    weights = torch.rand(truth.shape, generator=stream)
    for g, h in zip(
        torch.autograd.grad((weights * ours).sum(), leaves),
        torch.autograd.grad((weights * truth).sum(), exact),
        strict=True,
    ):
        assert float((g - h).norm()) <= 1e-5 * float(h.norm())
