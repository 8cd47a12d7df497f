"""Priors: shapes, mass, draws against densities, gradients; the VampPrior's shared posterior."""

import copy
import math

import pyro
import pytest
import torch
from torch import nn

from pyrovae import posteriors, priors
from pyrovae.errors import InputError
from pyrovae.networks import MLPEncoder

X_SHAPE = (1, 3, 4)
ROWS: dict[str, dict[str, object]] = {
    "standard-normal": {},
    "mixture": {"components": 4},
    "vamp": {"components": 4},
    "flow": {"transforms": 3, "hidden": (16,)},
}
NAME = pytest.mark.parametrize("name", ROWS)
FAMILY = pytest.mark.parametrize("family", posteriors.REGISTRY)


class Whole(nn.Module):
    """What a VAE does with the two: it owns both."""

    def __init__(self, prior: priors.Prior, posterior: posteriors.Posterior) -> None:
        super().__init__()
        self.prior = prior
        self.posterior = posterior


def stir(module: nn.Module, size: float = 0.3) -> None:
    for p in module.parameters():
        p.data.add_(size * torch.randn_like(p))


def build(name: str, latent_dim: int = 3, dtype: torch.dtype = torch.float64) -> priors.Prior:
    """Make a prior with every parameter moved at random, so that no part of it is trivial."""
    torch.manual_seed(0)
    cls = priors.REGISTRY[name]
    if cls.needs_posterior:
        return vamp("mean-field", latent_dim, **ROWS[name])[0].to(dtype)
    prior = cls(latent_dim, **ROWS[name]).to(dtype)
    stir(prior, 0.15)
    return prior


def vamp(
    family: str, latent_dim: int = 3, components: int = 4
) -> tuple[priors.VampPrior, posteriors.Posterior]:
    torch.manual_seed(0)
    posterior = posteriors.REGISTRY[family](MLPEncoder(X_SHAPE, hidden=(6,)), latent_dim).double()
    stir(posterior)
    return priors.VampPrior(posterior, X_SHAPE, components).double(), posterior


def test_every_prior_has_a_row() -> None:
    assert set(ROWS) == set(priors.REGISTRY)
    assert {n for n, c in priors.REGISTRY.items() if c.needs_posterior} == {"vamp"}
    assert {n for n, c in priors.REGISTRY.items() if c.closed_form_kl} == {"standard-normal"}
    assert all(c.summary for c in priors.REGISTRY.values())


@NAME
@pytest.mark.parametrize("latent_dim", [1, 2, 5])
def test_shapes(name: str, latent_dim: int) -> None:
    prior = build(name, latent_dim)
    p = prior()
    assert prior.latent_dim == latent_dim
    assert isinstance(p, pyro.distributions.torch_distribution.TorchDistributionMixin)
    assert (p.batch_shape, p.event_shape) == ((), (latent_dim,))
    for sample_shape in [(), (4,), (2, 3)]:
        z = p.sample(sample_shape)
        assert z.shape == (*sample_shape, latent_dim) and z.dtype == torch.float64
        assert p.log_prob(z.clone()).shape == sample_shape


@NAME
def test_mass_is_one_on_the_line(name: str) -> None:
    z = torch.linspace(-60, 60, 240001, dtype=torch.float64)
    with torch.no_grad():
        density = build(name, latent_dim=1)().log_prob(z.unsqueeze(-1)).exp()
    assert abs(torch.trapezoid(density, z).item() - 1) < 1e-8


@NAME
def test_mass_is_one_in_the_plane(name: str) -> None:
    axis = torch.linspace(-15, 15, 1201, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    with torch.no_grad():
        density = build(name, latent_dim=2)().log_prob(grid).exp()
    assert abs(torch.trapezoid(torch.trapezoid(density, axis), axis).item() - 1) < 1e-6


@NAME
def test_draws_follow_the_density(name: str) -> None:
    # Moments by quadrature against moments of draws: means, variances and the covariance.
    axis = torch.linspace(-15, 15, 601, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    torch.manual_seed(1)
    with torch.no_grad():
        p = build(name, latent_dim=2)()
        z, density = p.sample((40000,)), p.log_prob(grid).exp() * (axis[1] - axis[0]) ** 2

    def features(z: torch.Tensor) -> torch.Tensor:
        a, b = z.unbind(-1)
        return torch.stack([a, b, a * a, b * b, a * b, torch.sin(2 * a + b), (a > b).to(a)], -1)

    expected = (features(grid) * density.unsqueeze(-1)).sum((0, 1))
    drawn = features(z)
    error = 5 * drawn.std(0) / len(drawn) ** 0.5
    # The step function is the one that the grid resolves only to its spacing.
    error[-1] += 0.02
    assert (drawn.mean(0) - expected).abs().le(error).all()


@NAME
def test_expands_under_plates(name: str) -> None:
    prior = build(name)
    many = prior().expand([3, 4])
    assert (many.batch_shape, many.event_shape) == ((3, 4), (3,))
    z = many.sample()
    assert z.shape == (3, 4, 3) and z.flatten(0, 1).unique(dim=0).shape[0] == 12
    expected = prior().log_prob(z.clone())
    torch.testing.assert_close(many.log_prob(z), expected, rtol=1e-10, atol=1e-10)

    def model() -> None:
        with pyro.plate("particles", 3, dim=-2), pyro.plate("data", 4, dim=-1):
            pyro.sample("z", prior(), obs=z)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], expected, rtol=1e-10, atol=1e-10)


@NAME
def test_gradients_reach_every_parameter_and_z(name: str) -> None:
    prior = build(name)
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    prior().log_prob(z).sum().backward()
    assert z.grad is not None and (z.grad != 0).all()
    for parameter, p in prior.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, parameter


@NAME
def test_state_is_restored_and_copied(name: str) -> None:
    prior, z = build(name), torch.randn(4, 3, dtype=torch.float64)
    prior().sample()
    expected = prior().log_prob(z)
    assert torch.equal(copy.deepcopy(prior)().log_prob(z), expected)
    assert set(prior.state_dict()) == {n for n, _ in prior.named_parameters()}


def test_standard_normal() -> None:
    z = torch.randn(7, 3, dtype=torch.float64)
    expected = -0.5 * z.square().sum(-1) - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(build("standard-normal")().log_prob(z), expected, rtol=1e-10, atol=0)


def test_mixture_is_the_weighted_sum() -> None:
    prior = build("mixture")
    z = torch.randn(7, 3, dtype=torch.float64)
    scale = (7 * torch.tanh(prior.log_scale / 7)).exp()
    unit = (z.unsqueeze(1) - prior.loc) / scale
    density = torch.exp(-0.5 * unit.square()) / (scale * math.sqrt(2 * math.pi))
    expected = (prior.logits.softmax(0) * density.prod(-1)).sum(-1).log()
    torch.testing.assert_close(prior().log_prob(z), expected, rtol=1e-10, atol=1e-10)


def test_mixture_starts_spread_with_unit_variance() -> None:
    torch.manual_seed(0)
    prior = priors.Mixture(20, components=100)
    assert torch.cdist(prior.loc, prior.loc).fill_diagonal_(9).min() > 1
    z = prior().sample((4000,))
    assert abs(z.var().item() - 1) < 0.1
    alone = priors.Mixture(3, components=1)
    z = torch.randn(5, 3)
    torch.testing.assert_close(alone().log_prob(z), priors.StandardNormal(3)().log_prob(z))


def test_flow_starts_near_the_standard_normal() -> None:
    torch.manual_seed(0)
    z = torch.randn(2000, 10)
    difference = priors.Flow(10)().log_prob(z) - priors.StandardNormal(10)().log_prob(z)
    assert 0 < difference.square().mean().sqrt() < 1


def test_flow_is_the_change_of_variables() -> None:
    p = build("flow", latent_dim=4)()
    assert p.has_rsample
    for noise in torch.randn(4, 4, dtype=torch.float64):

        def to_z(e: torch.Tensor) -> torch.Tensor:
            for transform in p.transforms:
                e = transform(e)
            return e

        jacobian = torch.autograd.functional.jacobian(to_z, noise)
        log_noise = -0.5 * noise.square().sum() - 2 * math.log(2 * math.pi)
        expected = log_noise - torch.linalg.slogdet(jacobian).logabsdet
        z = to_z(noise)
        torch.testing.assert_close(p.log_prob(z), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(p.log_prob(z.clone()), expected, rtol=1e-10, atol=1e-10)
        assert (jacobian.abs() > 1e-8).sum() > 8


def test_flow_draws_are_differentiable() -> None:
    prior = build("flow")
    prior().rsample((5,)).square().sum().backward()
    for parameter, p in prior.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, parameter


@FAMILY
def test_vamp_is_the_mean_of_posteriors(family: str) -> None:
    prior, posterior = vamp(family)
    z = torch.randn(2, 5, 3, dtype=torch.float64)
    parts = [posterior(u).log_prob(z) for u in prior.pseudo_inputs]
    expected = torch.stack(parts).logsumexp(0) - math.log(len(parts))
    torch.testing.assert_close(prior().log_prob(z), expected, rtol=1e-10, atol=1e-10)
    assert prior().sample((2, 5)).shape == (2, 5, 3)
    assert prior().expand([2, 5]).sample().shape == (2, 5, 3)


@FAMILY
def test_vamp_trains_the_posterior_but_does_not_own_it(family: str) -> None:
    prior, posterior = vamp(family)
    whole = Whole(prior, posterior)
    assert [n for n, _ in prior.named_parameters()] == ["pseudo_logits"]
    keys = [k for k in whole.state_dict() if k.startswith("prior")]
    assert keys == ["prior.pseudo_logits"]
    prior().log_prob(torch.randn(5, 3, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in whole.parameters())


@FAMILY
def test_a_copy_of_the_whole_is_wired_to_itself(family: str) -> None:
    whole = Whole(*vamp(family))
    other = copy.deepcopy(whole)
    assert other.prior.posterior is other.posterior is not whole.posterior
    z = torch.randn(5, 3, dtype=torch.float64)
    before = whole.prior().log_prob(z)
    assert torch.equal(other.prior().log_prob(z), before)
    stir(other.posterior, 1.0)
    assert torch.equal(whole.prior().log_prob(z), before)
    assert not torch.equal(other.prior().log_prob(z), before)
    whole.float()
    assert whole.prior().sample().dtype == torch.float32


def test_vamp_starts_at_training_images() -> None:
    prior, _ = vamp("mean-field", components=6)
    assert ((prior.pseudo_inputs > 0) & (prior.pseudo_inputs < 1)).all()
    x = torch.rand(10, *X_SHAPE).round()
    prior.initialize(x, noise=0.0)
    distance = (prior.pseudo_inputs.unsqueeze(1) - x).abs().flatten(2).amax(-1)
    nearest = distance.min(1)
    assert nearest.values.max() < 0.021
    assert nearest.indices.unique().numel() == 6
    exact = prior.pseudo_inputs.clone()
    prior.initialize(x, noise=0.01)
    assert not torch.equal(prior.pseudo_inputs, exact)
    prior.initialize(x[:2], noise=0.0)
    distance = (prior.pseudo_inputs.unsqueeze(1) - x[:2]).abs().flatten(2).amax(-1)
    assert distance.argmin(1).bincount().tolist() == [3, 3]
    assert prior.pseudo_logits.requires_grad and prior.pseudo_logits.dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, *X_SHAPE), (5, 12), X_SHAPE, ()])
def test_vamp_refuses_images_of_another_shape(shape: tuple[int, ...]) -> None:
    prior, _ = vamp("mean-field")
    with pytest.raises(InputError, match=r"expects x of shape \(N, 1, 3, 4\).*training images"):
        prior.initialize(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "latent_dim", "options", "message"),
    [
        ("standard-normal", 0, {}, "--latent-dim"),
        ("mixture", 2, {"components": 0}, "--components"),
        ("flow", 2, {"transforms": 1}, "at least 2 transforms; got 1"),
        ("flow", 2, {"transforms": 0}, "transforms expects a positive integer"),
        ("flow", 2, {"hidden": ()}, "hidden expects"),
    ],
)
def test_wrong_options_are_refused(
    name: str, latent_dim: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        priors.REGISTRY[name](latent_dim, **options)


def test_vamp_refuses_wrong_options() -> None:
    _, posterior = vamp("mean-field")
    with pytest.raises(InputError, match="--components"):
        priors.VampPrior(posterior, X_SHAPE, components=0)
    with pytest.raises(InputError, match="x_shape expects"):
        priors.VampPrior(posterior, ())
