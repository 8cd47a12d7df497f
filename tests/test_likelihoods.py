"""Every likelihood of the registry against every property a likelihood must have."""

import math
from functools import partial
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import likelihoods
from pyrovae.errors import InputError
from pyrovae.likelihoods import REGISTRY, Likelihood, positive

DOUBLE = torch.float64
X_SHAPE = (3, 2, 2)
UNIT, OPEN, REAL = (0.0, 1.0), (0.0, 1.0), (-math.inf, math.inf)


class Row(NamedTuple):
    """One likelihood with one setting of its options, and what is true of it."""

    name: str
    options: dict = {}  # noqa: RUF012
    P: int = 1
    levels: int | None = None
    interval: tuple[float, float] | None = None  # of a density
    bad: float = math.nan  # a value that must be refused
    extreme: float = 30.0
    scipy: object = None  # params (P,) as floats -> a frozen SciPy distribution


def softplus(raw, at_zero):
    return math.log1p(math.expm1(at_zero - 1e-5) * math.exp(raw)) + 1e-5


def located(family, scale=None, centre=0.5, spread=0.3):
    def frozen(loc, raw_scale=0.0):
        return family(centre + loc, softplus(raw_scale, spread) if scale is None else scale)

    return frozen


def logit_normal(loc, scale):
    class Frozen:
        def logpdf(self, x):
            return scipy.stats.norm(loc, scale).logpdf(scipy.special.logit(x)) - (
                math.log(x) + math.log1p(-x)
            )

    return Frozen()


def beta(a, b):
    return scipy.stats.beta(softplus(a, 1.0), softplus(b, 1.0))


normal, laplace, t = scipy.stats.norm, scipy.stats.laplace, scipy.stats.t
ROWS = [
    Row(
        "bernoulli",
        {},
        1,
        1,
        None,
        0.25,
        500.0,
        lambda t: scipy.stats.bernoulli(1 / (1 + math.exp(-t))),
    ),
    Row("continuous-bernoulli", {}, 1, None, UNIT, 1.5, 500.0),
    Row("gaussian", {}, 1, None, REAL, scipy=located(normal)),
    Row("gaussian", {"scale": "per-pixel"}, 2, None, REAL, scipy=located(normal)),
    Row("gaussian", {"scale": 0.25}, 1, None, REAL, scipy=located(normal, 0.25)),
    Row("laplace", {}, 1, None, REAL, scipy=located(laplace)),
    Row("laplace", {"scale": "per-pixel"}, 2, None, REAL, math.inf, scipy=located(laplace)),
    Row("student-t", {}, 1, None, REAL, scipy=located(partial(t, 5.0))),
    Row(
        "student-t", {"df": 3, "scale": "per-pixel"}, 2, None, REAL, scipy=located(partial(t, 3.0))
    ),
    Row("beta", {}, 2, None, OPEN, 1.0, scipy=beta),
    Row("logit-normal", {}, 2, None, OPEN, 0.0, scipy=located(logit_normal, None, 0.0, 1.5)),
    Row(
        "logit-normal",
        {"scale": "learned"},
        1,
        None,
        OPEN,
        1.0,
        scipy=located(logit_normal, None, 0.0, 1.5),
    ),
    Row("discretized-logistic", {"levels": 7}, 2, 7, None, 0.5),
    Row("discretized-logistic", {"levels": 255, "scale": "learned"}, 1, 255, None, 0.5),
    Row("discretized-logistic", {"levels": 1, "scale": 0.125}, 1, 1, None, 0.5),
    Row("discretized-logistic-mixture", {"levels": 7, "components": 3}, 9, 7, None, 0.5),
    Row(
        "discretized-logistic-mixture",
        {"levels": 3, "components": 2, "coupling": True},
        20,
        3,
        None,
        0.5,
    ),
    Row("categorical", {"levels": 7}, 8, 7, None, 0.5, 500.0),
]


def rows_where(condition):
    chosen = [row for row in ROWS if condition(row)]
    names = ["-".join([row.name, *map(str, row.options.values())]) for row in chosen]
    return pytest.mark.parametrize("row", chosen, ids=names)


rows = rows_where(lambda row: True)


def build(row, dtype=DOUBLE, x_shape=X_SHAPE):
    return REGISTRY[row.name](x_shape, **row.options).to(dtype)


def random_params(likelihood, *batch, dtype=DOUBLE):
    g = torch.Generator().manual_seed(5)
    return torch.randn((*batch, *likelihood.params_shape), generator=g, dtype=dtype)


def support_points(row, dtype):
    """Every level of a mass; the most extreme values dequantised data can take for a density."""
    if row.levels:
        return torch.arange(row.levels + 1, dtype=dtype) / row.levels
    return torch.tensor([2.0**-24, 1e-3, 0.5, 1 - 2.0**-24], dtype=dtype)


def test_the_table_is_the_registry():
    assert {row.name for row in ROWS} == set(REGISTRY)
    for name, family in REGISTRY.items():
        assert family.__name__.lower() == name.replace("-", "")
        assert family.summary
        assert family.support
        assert "Source:" in family.__doc__


@rows
def test_attributes(row):
    likelihood = build(row)
    coupled = row.options.get("coupling", False)
    assert likelihood.num_params == row.P
    assert likelihood.params_shape == ((row.P, 2, 2) if coupled else (row.P, *X_SHAPE))
    assert likelihood.kind == ("density" if row.levels is None else "mass")
    assert likelihood.levels == row.levels
    assert likelihood.x_shape == X_SHAPE


@rows
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_shapes(row, batch):
    likelihood = build(row)
    d = likelihood(random_params(likelihood, *batch))
    assert isinstance(d, dist.TorchDistribution | dist.Independent)
    assert d.batch_shape == batch
    assert d.event_shape == X_SHAPE
    assert d.mean.shape == (*batch, *X_SHAPE)
    pyro.set_rng_seed(0)
    x = d.sample()
    assert x.shape == (*batch, *X_SHAPE)
    likelihood.check(x)
    assert d.log_prob(x).shape == batch
    wide = d.expand((5, *batch))
    torch.testing.assert_close(
        wide.log_prob(x), d.log_prob(x).expand(5, *batch), rtol=1e-12, atol=0
    )


@rows
def test_batch_elements_are_kept_apart(row):
    """The parameters of one x, alone or in a batch, give the same density."""
    likelihood = build(row)
    params = random_params(likelihood, 2, 3)
    pyro.set_rng_seed(0)
    x = likelihood(params).sample()
    together = likelihood(params).log_prob(x)
    for i in range(2):
        for j in range(3):
            alone = likelihood(params[i, j]).log_prob(x[i, j])
            torch.testing.assert_close(together[i, j], alone, rtol=1e-12, atol=1e-12)


@rows
def test_total_mass_is_one_and_mean_is_its_mean(row):
    coupled = row.options.get("coupling", False)
    likelihood = build(row, x_shape=(3, 1, 1) if coupled else (1,))
    d = likelihood(random_params(likelihood))
    if row.levels:
        one = support_points(row, DOUBLE)
        x = torch.cartesian_prod(one, one, one)[..., None, None] if coupled else one[:, None]
        mass = d.log_prob(x).exp()
        assert mass.sum().item() == pytest.approx(1, rel=1e-10)
        mean = (mass.view(-1, *[1] * (x.dim() - 1)) * x).sum(0)
        # the coupled mixture's mean is exact to first order only
        torch.testing.assert_close(d.mean, mean, rtol=0, atol=0.1 if coupled else 1e-10)
        return

    def density(x, power=0):
        x = torch.tensor([x], dtype=DOUBLE)
        return (d.log_prob(x).exp() * x**power).item()

    lower, upper = row.interval
    middle = d.mean.item()
    for power, want in [(0, 1.0), (1, middle)]:
        halves = [(lower, middle), (middle, upper)]
        total = sum(
            scipy.integrate.quad(density, a, b, (power,), epsabs=1e-12, epsrel=1e-11, limit=200)[0]
            for a, b in halves
        )
        assert total == pytest.approx(want, rel=1e-8)


@rows_where(lambda row: "coupling" not in row.options)  # whose sampler has its test elsewhere
def test_samples_follow_the_mass_or_density(row):
    """Chi-square of counts over the levels, or over ten bins of a density's quantiles by mass."""
    likelihood = build(row, x_shape=(1,))
    d = likelihood(random_params(likelihood))
    pyro.set_rng_seed(1)
    n = 20_000
    x = d.sample((n,)).squeeze(-1)
    if row.levels:
        expected = n * d.log_prob(support_points(row, DOUBLE)[:, None]).exp()
        counts = torch.bincount((x * row.levels).round().long(), minlength=row.levels + 1)
    else:
        edges = x[: n // 10].quantile(torch.linspace(0, 1, 11, dtype=DOUBLE)[1:-1])
        x = x[n // 10 :]
        inner = [
            scipy.integrate.quad(
                lambda v: d.log_prob(torch.tensor([v], dtype=DOUBLE)).exp().item(), a, b
            )[0]
            for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        ]
        counts = torch.histogram(x, edges)[0]
        counts = torch.cat([counts, (len(x) - counts.sum())[None]])
        expected = len(x) * torch.tensor([*inner, 1 - sum(inner)], dtype=DOUBLE)
    kept = expected > 5
    chi2 = ((counts - expected) ** 2 / expected)[kept].sum().item()
    assert scipy.stats.chi2(int(kept.sum())).sf(chi2) > 1e-6


@rows_where(lambda row: row.scipy)
def test_equals_scipy(row):
    likelihood = build(row, x_shape=(1,))
    params = random_params(likelihood)
    frozen = row.scipy(*params[:, 0].tolist())
    points = [0.0, 1.0] if row.levels else [1e-3, 0.2, 0.77]
    for x in points:
        want = frozen.logpmf(x) if row.levels else frozen.logpdf(x)
        got = likelihood(params).log_prob(torch.tensor([x], dtype=DOUBLE)).item()
        assert got == pytest.approx(want, rel=1e-10, abs=1e-12)


@rows
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_finite_value_and_gradient_at_extreme_parameters(row, dtype):
    likelihood = build(row, dtype, x_shape=(3, 1, 1) if row.options.get("coupling") else (1,))
    P, points = row.P, support_points(row, dtype)
    values = [-row.extreme, 0.0, row.extreme]
    g = torch.Generator().manual_seed(0)
    if P <= 3:
        cases = torch.cartesian_prod(*[torch.tensor(values, dtype=dtype)] * P).view(-1, P)
    else:
        cases = torch.tensor(values, dtype=dtype)[torch.randint(3, (300, P), generator=g)]
    params = cases.view(-1, *likelihood.params_shape).requires_grad_()
    assert likelihood(params).mean.isfinite().all()
    for x in points:
        value = likelihood(params).log_prob(x.expand(likelihood.x_shape))
        assert value.isfinite().all()
        weights = [params, *likelihood.parameters()]
        assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), weights))


@pytest.mark.parametrize("name", ["bernoulli", "continuous-bernoulli", "categorical"])
def test_gradient_survives_where_the_datum_is_least_likely(name):
    likelihood = REGISTRY[name]((1,), **({"levels": 1} if name == "categorical" else {}))
    params = torch.zeros(likelihood.params_shape)
    params[0] = 500.0
    params.requires_grad_()
    x = torch.ones(1) if name == "categorical" else torch.zeros(1)
    value = likelihood(params).log_prob(x)
    assert value < -490
    assert torch.autograd.grad(value, params)[0][0].item() == pytest.approx(-1, abs=0.01)


@rows
def test_can_be_traced_without_looking_at_data(row):
    likelihood = build(row)
    params = random_params(likelihood, 4)
    pyro.set_rng_seed(0)
    x = likelihood(params).sample()
    with pyro.validation_enabled(False):
        traced = make_fx(lambda params, x: likelihood(params).log_prob(x))(params, x)
    got = traced(params + 0.1, x.flip(0))
    want = likelihood(params + 0.1).log_prob(x.flip(0))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# Refusals


@rows
def test_wrong_data_are_refused(row):
    likelihood = build(row)
    inside = support_points(row, torch.float32)[torch.arange(2)]
    good = inside[torch.randint(2, (5, *X_SHAPE))]
    likelihood.check(good)
    likelihood.check(good[0])
    likelihood.check(good.expand(2, 5, *X_SHAPE))
    name = type(likelihood).__name__
    for value in (row.bad, math.nan):
        x = good.clone()
        x[2, 1, 0, 1] = value
        with pytest.raises(
            InputError, match=f"^{name} expects .* got 1 other value such as {value:g}"
        ) as e:
            likelihood.check(x)
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match=r"shape \(\*B, 3, 2, 2\); got \(5, 12\)"):
        likelihood.check(good.flatten(1))
    with pytest.raises(InputError, match="255 for 8-bit images"):
        likelihood.check(torch.zeros(X_SHAPE, dtype=torch.uint8))


def test_messages_name_the_remedy():
    grey = (torch.arange(63).float() / 64 + 0.25 / 64).clamp(0, 1)
    grey[0], grey[1], grey[2] = 0.0, 1.0, 0.25
    with pytest.raises(InputError) as e:
        likelihoods.Bernoulli((63,)).check(grey)
    assert str(e.value) == (
        "Bernoulli expects x in {0, 1}; got 61 other values such as 0.25. "
        "Binarise the data (--binarize dynamic) or use --likelihood continuous-bernoulli."
    )
    for row, words in [("beta", "--dequantize uniform"), ("categorical", "--dequantize none")]:
        with pytest.raises(InputError, match=words):
            REGISTRY[row]((1,)).check(torch.full((1,), 1.5))
    with pytest.raises(InputError, match=r"expects x in \{k/16\}; got 1 other value such as 0.3\."):
        likelihoods.Categorical((1,), levels=16).check(torch.full((1,), 0.3))


@rows
def test_wrong_params_are_refused(row):
    likelihood = build(row)
    for shape in [(), (2,), (4, row.P + 1, *likelihood.params_shape[1:])]:
        with pytest.raises(InputError, match=r"expects params of shape .*likelihood\.params_shape"):
            likelihood(torch.zeros(shape))


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("gaussian", {"scale": "per_pixel"}, "did you mean 'per-pixel'"),
        ("gaussian", {"scale": 0}, "above 1e-12"),
        ("gaussian", {"scale": 1e-30}, "above 1e-12"),
        ("laplace", {"scale": 1e30}, r"below 1e\+12"),
        ("gaussian", {"scale": True}, "got True"),
        ("laplace", {"scale": math.nan}, "got nan"),
        ("laplace", {"scale": math.inf}, "got inf"),
        ("student-t", {"df": 1}, "above 1"),
        ("student-t", {"df": "per-pixel"}, "learned"),
        ("discretized-logistic", {"levels": 0}, "positive integer"),
        ("categorical", {"levels": 2.5}, "positive integer"),
        ("discretized-logistic-mixture", {"components": "5"}, "positive integer"),
        ("discretized-logistic-mixture", {"coupling": 1}, "true or false"),
    ],
)
def test_wrong_options_are_refused(name, options, words):
    with pytest.raises(InputError, match=words):
        REGISTRY[name](X_SHAPE, **options)


def test_coupling_needs_three_channels_and_shapes_need_integers():
    with pytest.raises(InputError, match=r"\(3, H, W\); got \(1, 28, 28\)"):
        likelihoods.DiscretizedLogisticMixture((1, 28, 28), coupling=True)
    for x_shape in [(), (0, 3), (2.0,)]:
        with pytest.raises(InputError, match="x_shape"):
            likelihoods.Bernoulli(x_shape)


# What training meets


def test_learned_scale_is_a_parameter_and_a_fixed_one_a_buffer():
    learned = likelihoods.Gaussian(X_SHAPE)
    fixed = likelihoods.StudentT(X_SHAPE, scale=0.2, df=4)
    assert [n for n, _ in learned.named_parameters()] == ["raw_scale"]
    assert not list(fixed.parameters())
    assert {n for n, _ in fixed.named_buffers()} == {"fixed_scale", "fixed_df"}
    d = learned(torch.zeros(2, 1, *X_SHAPE))
    assert d.base_dist.scale.flatten()[0].item() == pytest.approx(0.3)
    d.log_prob(torch.rand(X_SHAPE)).sum().backward()
    assert learned.raw_scale.grad.abs() > 0


@pytest.mark.parametrize("coupling", [False, True])
def test_components_that_start_alike_get_different_gradients(coupling):
    likelihood = likelihoods.DiscretizedLogisticMixture((3, 1, 1), coupling=coupling, components=4)
    params = torch.zeros(likelihood.params_shape, requires_grad=True)
    (grad,) = torch.autograd.grad(likelihood(params).log_prob(torch.full((3, 1, 1), 0.2)), params)
    assert grad[:4].reshape(4, -1)[:, 0].unique().numel() == 4


@pytest.mark.parametrize("coupling", [False, True])
def test_mixture_parameters_are_logits_then_locations_then_scales(coupling):
    likelihood = likelihoods.DiscretizedLogisticMixture((3, 1, 1), coupling=coupling, components=2)
    params = torch.zeros(likelihood.params_shape)
    params[1], params[-1] = 2.0, 3.0
    d = likelihood(params)
    d = d if coupling else d.base_dist
    logits = d.logits[:, 0, 0] if coupling else d.logits[0, 0, 0]
    last = d.coupling[1, 2, 0, 0] if coupling else d.scale[0, 0, 0, 1]
    want = torch.tensor(3.0).tanh() if coupling else positive(torch.tensor(3.0), 0.1)
    assert logits.tolist() == [0.0, 2.0]
    assert last.item() == pytest.approx(want.item())


def test_a_likelihood_is_one_class_with_one_method():
    class Cauchy(Likelihood):
        num_params = 2

        def elementwise(self, params):
            loc, raw_scale = params
            return dist.Cauchy(loc, positive(raw_scale))

    cauchy = Cauchy((5,))
    params = torch.randn(3, 4, 2, 5)
    d = cauchy(params)
    assert (d.batch_shape, d.event_shape) == ((3, 4), (5,))
    want = dist.Cauchy(params[..., 0, :], positive(params[..., 1, :])).log_prob(torch.ones(5))
    torch.testing.assert_close(d.log_prob(torch.ones(5)), want.sum(-1))
    cauchy.check(torch.ones(2, 5))
    with pytest.raises(InputError, match="Cauchy expects x in the real numbers"):
        cauchy.check(torch.full((5,), math.inf))


def test_likelihoods_live_in_a_pyro_plate():
    for row in ROWS:
        likelihood = build(row)
        params = random_params(likelihood, 4)

        def model(x=None, likelihood=likelihood, params=params):
            with pyro.plate("particles", 3, dim=-2), pyro.plate("data", 4, dim=-1):
                return pyro.sample("x", likelihood(params), obs=x)

        x = model()
        assert x.shape == (3, 4, *X_SHAPE)
        trace = pyro.poutine.trace(model).get_trace(x)
        trace.compute_log_prob()
        assert trace.nodes["x"]["log_prob"].shape == (3, 4)
