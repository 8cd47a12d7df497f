"""Posterior families: shapes, exact densities, draws, gradients."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence
from torch.nn.functional import linear

from pyrovae import posteriors
from pyrovae.errors import InputError
from pyrovae.networks import MLPEncoder

X_SHAPE = (1, 3, 4)

# Name, and the options that make the family as rich as a test can afford.
ROWS: dict[str, dict[str, object]] = {
    "mean-field": {},
    "full-rank": {},
    "flow": {"transforms": 3, "hidden": (16, 12)},
}
NAME = pytest.mark.parametrize("name", ROWS)


def build(
    name: str, latent_dim: int = 3, dtype: torch.dtype = torch.float64, spread: float = 1.0
) -> posteriors.Posterior:
    """Make a posterior with every parameter moved at random, so that no part of it is trivial."""
    torch.manual_seed(0)
    encoder = MLPEncoder(X_SHAPE, hidden=(6,))
    posterior = posteriors.REGISTRY[name](encoder, latent_dim, **ROWS[name]).to(dtype)
    for p in posterior.parameters():
        p.data.add_(spread * 0.3 * torch.randn_like(p))
    return posterior


def images(*leading: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(*leading, *X_SHAPE, dtype=dtype)


def from_noise(q: dist.Distribution, noise: torch.Tensor) -> torch.Tensor:
    """Map standard normal noise (..., D) to z: what the families promise to be made of."""
    if isinstance(q, dist.TransformedDistribution):
        z = from_noise(q.base_dist, noise)
        for transform in q.transforms:
            z = transform(z)
        return z
    if isinstance(q, dist.MultivariateNormal):
        return q.loc + (q.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    assert isinstance(q.base_dist, dist.Normal)
    return q.base_dist.loc + q.base_dist.scale * noise


def change_of_variables(q: dist.Distribution, noise: torch.Tensor) -> torch.Tensor:
    """Compute log q at the z of one noise (D,): log N(noise) - log |det dz/dnoise|."""
    jacobian = torch.autograd.functional.jacobian(lambda e: from_noise(q, e), noise)
    log_noise = -0.5 * noise.square().sum() - 0.5 * len(noise) * math.log(2 * math.pi)
    return log_noise - torch.linalg.slogdet(jacobian).logabsdet


def test_every_posterior_has_a_row() -> None:
    assert set(ROWS) == set(posteriors.REGISTRY)
    for cls in posteriors.REGISTRY.values():
        assert cls.summary and isinstance(cls.closed_form_kl, bool)


@NAME
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
@pytest.mark.parametrize("latent_dim", [1, 3])
def test_shapes(name: str, leading: tuple[int, ...], latent_dim: int) -> None:
    q = build(name, latent_dim)(images(*leading))
    assert isinstance(q, pyro.distributions.torch_distribution.TorchDistributionMixin)
    assert q.has_rsample
    assert (q.batch_shape, q.event_shape) == (leading, (latent_dim,))
    z = q.rsample((5,))
    assert z.shape == (5, *leading, latent_dim) and z.dtype == torch.float64
    assert q.log_prob(z).shape == (5, *leading)
    assert q.log_prob(z.clone()).shape == (5, *leading)


@NAME
def test_each_x_has_its_own_distribution(name: str) -> None:
    posterior, x = build(name), images(2, 3)
    z = torch.randn(2, 3, 3, dtype=torch.float64)
    log_q = posterior(x).log_prob(z)
    for i in range(2):
        for j in range(3):
            alone = posterior(x[i, j]).log_prob(z[i, j])
            torch.testing.assert_close(alone, log_q[i, j], rtol=1e-10, atol=1e-10)
    assert log_q.flatten().diff().abs().min() > 1e-3


@NAME
@pytest.mark.parametrize("latent_dim", [1, 2, 5])
def test_density_is_the_change_of_variables(name: str, latent_dim: int) -> None:
    q = build(name, latent_dim)(images())
    for noise in torch.randn(4, latent_dim, dtype=torch.float64):
        expected = change_of_variables(q, noise)
        z = from_noise(q, noise)
        torch.testing.assert_close(q.log_prob(z), expected, rtol=1e-8, atol=1e-8)
        # A clone is no longer the z in the cache: the transforms must be inverted.
        torch.testing.assert_close(q.log_prob(z.clone()), expected, rtol=1e-8, atol=1e-8)


@NAME
def test_a_draw_and_a_stranger_score_alike(name: str) -> None:
    posterior = build(name)
    q, other = (posterior(images(4)) for _ in range(2))
    z = q.rsample((2,))
    fresh = q.log_prob(z)
    other.rsample((2,))
    torch.testing.assert_close(q.log_prob(z.clone()), fresh, rtol=1e-10, atol=1e-10)
    q.rsample((2,))
    torch.testing.assert_close(q.log_prob(z), fresh, rtol=1e-10, atol=1e-10)


@NAME
def test_the_gradient_of_any_z_is_the_slope(name: str) -> None:
    # For the flow, this is the gradient through the D passes of the inversion.
    posterior, x = build(name), images(3)
    noise = torch.randn(3, 3, dtype=torch.float64)
    z = from_noise(posterior(x), noise).detach()
    stranger = torch.autograd.grad(posterior(x).log_prob(z).sum(), posterior.head.weight)[0]
    step, numeric = 1e-6, torch.zeros_like(stranger)
    with torch.no_grad():
        for index in [(0, 0), (1, 2), (4, 5), (5, 1)]:
            for sign in (1, -1):
                posterior.head.weight[index] += sign * step
                numeric[index] += sign * posterior(x).log_prob(z).sum() / (2 * step)
                posterior.head.weight[index] -= sign * step
            torch.testing.assert_close(stranger[index], numeric[index], rtol=1e-5, atol=1e-6)


@NAME
def test_mass_is_one(name: str) -> None:
    q = build(name, latent_dim=2, spread=0.7)(images())
    with torch.no_grad():
        draws = q.sample((2000,))
        axes = [torch.linspace(lo, hi, 501) for lo, hi in _wide(draws)]
        axes = [axis.double() for axis in axes]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        mass = q.log_prob(grid).exp()
        for axis in reversed(axes):
            mass = torch.trapezoid(mass, axis)
    assert abs(mass.item() - 1) < 1e-5


def _wide(draws: torch.Tensor) -> list[tuple[float, float]]:
    centre, spread = draws.mean(0), draws.std(0)
    return [((c - 9 * s).item(), (c + 9 * s).item()) for c, s in zip(centre, spread, strict=True)]


@NAME
def test_particles(name: str) -> None:
    # A plate of K particles expands q: noise differs, and each x keeps its own distribution.
    posterior, x = build(name), images(4)
    q = posterior(x)
    many = q.expand([3, 4])
    assert (many.batch_shape, many.event_shape) == ((3, 4), (3,))
    z = many.rsample()
    assert z.shape == (3, 4, 3) and (z[0] - z[1]).abs().min() > 0
    log_q = many.log_prob(z)
    assert log_q.shape == (3, 4)
    for k in range(3):
        single = posterior(x).log_prob(z[k].clone())
        torch.testing.assert_close(log_q[k], single, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(many.log_prob(z.clone())[k], single, rtol=1e-10, atol=1e-10)


@NAME
def test_inside_pyro_plates(name: str) -> None:
    posterior, x = build(name), images(4)

    def guide() -> None:
        with pyro.plate("particles", 5, dim=-2), pyro.plate("data", 4, dim=-1):
            pyro.sample("z", posterior(x))

    trace = pyro.poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == (5, 4, 3)
    expected = posterior(x).log_prob(site["value"].clone())
    torch.testing.assert_close(site["log_prob"], expected, rtol=1e-10, atol=1e-10)


@NAME
def test_gradients_reach_every_parameter(name: str) -> None:
    for draw in (True, False):
        posterior = build(name)
        q = posterior(images(5))
        z = q.rsample() if draw else torch.randn(5, 3, dtype=torch.float64)
        (q.log_prob(z).sum() + (z.square().sum() if draw else 0)).backward()
        for parameter, p in posterior.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, (parameter, draw)


@pytest.mark.parametrize("name", [n for n, c in posteriors.REGISTRY.items() if c.closed_form_kl])
def test_closed_form_kl(name: str) -> None:
    q = build(name)(images(3))
    p = dist.Normal(torch.zeros(3).double(), torch.ones(3).double()).to_event(1)
    z = q.rsample((20000,))
    terms = q.log_prob(z) - p.log_prob(z)
    error = 5 * terms.std(0) / len(terms) ** 0.5
    assert (kl_divergence(q, p) - terms.mean(0)).abs().le(error).all()
    assert (error < 0.2 * kl_divergence(q, p)).all()


def test_a_flow_has_no_closed_form_kl() -> None:
    q = build("flow")(images(3))
    p = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, p)


def test_mean_field_has_independent_elements_and_full_rank_does_not() -> None:
    for name, correlated in [("mean-field", False), ("full-rank", True), ("flow", True)]:
        q = build(name)(images())
        noise = torch.randn(3, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda e, q=q: from_noise(q, e), noise)
        off_diagonal = jacobian - torch.diag(jacobian.diagonal())
        assert bool((off_diagonal.abs() > 1e-3).any()) == correlated


def test_full_rank_is_a_scale_for_each_row_times_correlations() -> None:
    posterior, x = build("full-rank"), images()
    numbers = posterior.head(posterior.encoder(x))
    log_scale, (a10, a20, a21) = numbers[3:6], numbers[6:].tolist()
    unit = torch.tensor([[1, 0, 0], [a10, 1, 0], [a20, a21, 1]], dtype=torch.float64)
    expected = torch.diag((7 * torch.tanh(log_scale / 7)).exp()) @ unit
    torch.testing.assert_close(posterior(x).scale_tril, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(posterior(x).loc, numbers[:3], rtol=1e-10, atol=1e-12)


def test_the_cache_answers_for_its_own_pair_only() -> None:
    transform = build("flow")(images()).transforms[0]
    x = torch.randn(3, dtype=torch.float64)
    expected = transform.log_abs_det_jacobian(x, transform(x))
    other = torch.randn(3, dtype=torch.float64)
    assert transform.log_abs_det_jacobian(other, transform(other)) != expected
    y = transform(x.clone())
    transform(other)
    assert transform.log_abs_det_jacobian(x, y) == expected


def test_autoregressive_order() -> None:
    for reverse in (False, True):
        torch.manual_seed(0)
        net = posteriors.Autoregressive(4, 2, (9, 7), reverse=reverse).double()
        z, features = torch.randn(4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
        for output in range(2):
            jacobian = torch.autograd.functional.jacobian(
                lambda v, o=output, n=net, f=features: n(v, f)[o], z
            )
            dependent = torch.ones(4, 4).tril(-1).bool()
            if reverse:
                dependent = dependent.T
            assert (jacobian[~dependent] == 0).all()
            assert (jacobian[dependent] != 0).all()
        by_features = torch.autograd.functional.jacobian(lambda f, n=net, v=z: n(v, f)[0], features)
        assert (by_features != 0).all()


def test_layers_of_a_flow_alternate() -> None:
    # Two layers in opposite orders: each element of z depends on every element of the noise.
    q = build("flow")(images())
    noise = torch.randn(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda e: from_noise(q, e), noise)
    assert (jacobian.abs() > 1e-6).all()


def test_masked_weights_stay_out() -> None:
    layer = posteriors.MaskedLinear(torch.tensor([0.5, 1.5]), torch.tensor([0, 1, 2]))
    assert layer.mask.tolist() == [[False, False], [True, False], [True, True]]
    x = torch.randn(4, 2)
    expected = linear(x, layer.weight.masked_fill(~layer.mask, 0.0), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@NAME
def test_extreme_features_stay_finite(name: str) -> None:
    posterior = build(name, dtype=torch.float32)
    for value in (1e4, -1e4, 1e30):
        features = torch.full((2, 6), value) * torch.tensor([[1.0], [-1.0]])
        if name == "mean-field" or value < 1e30:
            q = posterior.distribution(features)
            z = q.rsample()
            assert z.isfinite().all() and q.log_prob(z).isfinite().all()


@NAME
def test_state_is_restored_and_copied(name: str) -> None:
    posterior, x = build(name), images(2)
    z = torch.randn(2, 3, dtype=torch.float64)
    posterior(x).rsample()
    expected = posterior(x).log_prob(z)
    assert torch.equal(copy.deepcopy(posterior)(x).log_prob(z), expected)
    fresh = type(posterior)(MLPEncoder(X_SHAPE, hidden=(6,)), 3, **ROWS[name]).double()
    fresh.load_state_dict(posterior.state_dict())
    assert torch.equal(fresh(x).log_prob(z), expected)
    assert set(posterior.state_dict()) == {n for n, _ in posterior.named_parameters()}


def test_a_flow_frees_its_memory_at_once() -> None:
    import gc
    import weakref

    gc.disable()
    try:
        q = build("flow")(images(2))
        transform = weakref.ref(q.transforms[0])
        z = q.rsample()
        q.log_prob(z).sum().backward()
        del q, z
        assert transform() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("name", "latent_dim", "options", "message"),
    [
        ("mean-field", 0, {}, "--latent-dim"),
        ("full-rank", 2.5, {}, "--latent-dim"),
        ("flow", 3, {"transforms": 0}, "transforms expects a positive integer; got 0"),
        ("flow", 3, {"hidden": ()}, "hidden expects a tuple of at least 1"),
        ("flow", 3, {"hidden": (0,)}, "hidden expects"),
    ],
)
def test_wrong_options_are_refused(
    name: str, latent_dim: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        posteriors.REGISTRY[name](MLPEncoder(X_SHAPE), latent_dim, **options)
