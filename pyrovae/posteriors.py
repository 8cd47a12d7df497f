"""Posterior families q(z | x): modules that map x to a distribution over z.

Every family is reparameterised, and made of normal distributions and of invertible transforms of
them: z is a differentiable function of x and of standard normal noise of the shape of z.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.functional import linear

from pyrovae.distributions import FullRankNormal
from pyrovae.networks import (
    SMALL_GAIN,
    Encoder,
    checked_count,
    checked_sizes,
    initialised,
    smooth_limit,
)

# Scales stay within e^-7 and e^7, 0.001 and 1100: far beyond what a posterior under a prior of unit
# scale asks for, and near enough that no log or reciprocal of a scale can leave float32.
SCALE_LIMIT = 7.0
# One layer of a flow multiplies by e^-3 to e^3; several such layers follow one another.
FLOW_LIMIT = 3.0


class Posterior(nn.Module, ABC):
    """A family q(z | x): an encoder, and a distribution made from its features.

    posterior(x), with x (*B, *x_shape), is a distribution with batch shape *B and event shape (D,).
    To write one, make the distribution from features (*B, encoder.out_features). `closed_form_kl`
    tells whether KL(q || standard normal) has a formula that torch or pyrovae knows.
    Raises InputError if latent_dim is not a positive integer.
    """

    summary: ClassVar[str]
    closed_form_kl: ClassVar[bool] = False

    def __init__(self, encoder: Encoder, latent_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.latent_dim = checked_count(latent_dim, "latent_dim (--latent-dim)")

    @abstractmethod
    def distribution(self, features: Tensor) -> TorchDistributionMixin:
        """Map features (*B, out_features) to a distribution with batch *B and event (D,)."""

    def forward(self, x: Tensor) -> TorchDistributionMixin:
        """Map x (*B, *x_shape) to q(z | x), batch *B and event (D,)."""
        return self.distribution(self.encoder(x))


class MeanField(Posterior):
    """Independent normals: q(z | x) = prod_d N(z_d; loc_d(x), scale_d(x)^2).

    The scale is the exponential of a smoothly limited number: the exponential makes a step in it
    relative to the scale, large or small, and the limit keeps it positive and finite.
    Source: Kingma and Welling, Auto-Encoding Variational Bayes (2014),
    https://arxiv.org/abs/1312.6114

    >>> from pyrovae.networks import MLPEncoder
    >>> MeanField(MLPEncoder((1, 8, 8)), 10)(torch.rand(5, 1, 8, 8)).rsample().shape
    torch.Size([5, 10])
    """

    summary = "independent normals"
    closed_form_kl = True

    def __init__(self, encoder: Encoder, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim)
        self.head = initialised(nn.Linear(encoder.out_features, 2 * self.latent_dim), 1.0)

    def distribution(self, features: Tensor) -> TorchDistributionMixin:
        """Map features (*B, out_features) to independent normals, batch *B and event (D,)."""
        return _independent_normals(self.head(features))


class FullRank(Posterior):
    """One normal with a full covariance: q(z | x) = N(z; loc(x), L(x) L(x)^T).

    L = diag(scale) (I + A) with A strictly lower triangular: A holds correlations only, so it keeps
    its meaning while training shrinks the scales. There are D (D + 3) / 2 numbers for each x.

    >>> from pyrovae.networks import MLPEncoder
    >>> FullRank(MLPEncoder((1, 8, 8)), 10)(torch.rand(5, 1, 8, 8)).rsample().shape
    torch.Size([5, 10])
    """

    summary = "one normal with a full covariance"
    closed_form_kl = True
    rows: Tensor
    columns: Tensor

    def __init__(self, encoder: Encoder, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim)
        rows, columns = torch.tril_indices(self.latent_dim, self.latent_dim, offset=-1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.sizes = [self.latent_dim, self.latent_dim, len(rows)]
        self.head = initialised(nn.Linear(encoder.out_features, sum(self.sizes)), 1.0)
        # Up to D - 1 of the correlations add up in a row of L, so they start small.
        with torch.no_grad():
            self.head.get_parameter("weight")[2 * self.latent_dim :] *= SMALL_GAIN

    def distribution(self, features: Tensor) -> TorchDistributionMixin:
        """Map features (*B, out_features) to a full-rank normal, batch *B and event (D,)."""
        loc, log_scale, below = self.head(features).split(self.sizes, dim=-1)
        scale = smooth_limit(log_scale, SCALE_LIMIT).exp()
        unit = torch.diag_embed(torch.ones_like(scale))
        unit[..., self.rows, self.columns] = below
        return FullRankNormal(loc, scale_tril=scale.unsqueeze(-1) * unit)


class Flow(Posterior):
    """An inverse autoregressive flow: a normal, then layers z -> shift + exp(log_scale) * z.

    Shift and log_scale of z_d come from the features of x and from the z before z_d, in an order
    that each layer reverses. A draw and its density take one pass through each layer. The density
    of any other z is as exact, at the cost of D passes.
    Source: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow (2016),
    https://arxiv.org/abs/1606.04934

    `transforms` is the number of layers, `hidden` the widths of the network inside each. Raises
    InputError if either is not made of positive integers.

    >>> from pyrovae.networks import MLPEncoder
    >>> Flow(MLPEncoder((1, 8, 8)), 10)(torch.rand(5, 1, 8, 8)).expand([3, 5]).rsample().shape
    torch.Size([3, 5, 10])
    """

    summary = "inverse autoregressive flow"

    def __init__(
        self,
        encoder: Encoder,
        latent_dim: int,
        transforms: int = 2,
        hidden: Sequence[int] = (200,),
    ) -> None:
        super().__init__(encoder, latent_dim)
        checked_count(transforms, "transforms")
        self.head = initialised(nn.Linear(encoder.out_features, 2 * self.latent_dim), 1.0)
        self.conditioners = nn.ModuleList(
            Autoregressive(self.latent_dim, encoder.out_features, hidden, reverse=index % 2 == 1)
            for index in range(transforms)
        )

    def distribution(self, features: Tensor) -> TorchDistributionMixin:
        """Map features (*B, out_features) to a transformed normal, batch *B and event (D,)."""
        layers = [
            TriangularAffine(_given(net, features), passes=self.latent_dim)
            for net in self.conditioners
        ]
        return dist.TransformedDistribution(_independent_normals(self.head(features)), layers)


class Autoregressive(nn.Module):
    """A network whose outputs for z_d depend on the context and on the z before z_d alone.

    Every unit has a degree and weights only towards units of a degree no lower; z_d itself counts
    as half a degree above d, so nothing flows from z_d to its own shift and log_scale.
    Source: Germain et al., MADE: Masked Autoencoder for Distribution Estimation (2015),
    https://arxiv.org/abs/1502.03509
    """

    def __init__(
        self, latent_dim: int, context: int, hidden: Sequence[int], reverse: bool = False
    ) -> None:
        super().__init__()
        widths = checked_sizes(hidden, "hidden", least=1)
        order = torch.arange(latent_dim).flip(0) if reverse else torch.arange(latent_dim)
        # Units of degree 0 read the context alone: they are all that z_0 depends on.
        inner = [torch.arange(width) * latent_dim // width for width in widths]
        degrees = [order + 0.5, *inner, order.repeat(2)]
        gains = [1.0] * len(widths) + [SMALL_GAIN]
        self.layers = nn.ModuleList(
            initialised(MaskedLinear(before, after), gain)
            for (before, after), gain in zip(pairwise(degrees), gains, strict=True)
        )
        self.context = initialised(nn.Linear(context, widths[0]), 1.0)

    def forward(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map z (*K, D) and features (*B, context), which broadcast, to shift and log_scale."""
        first, *rest = self.layers
        h = first(z) + self.context(features)
        for layer in rest:
            # Bounded units: while a flow is inverted, a z not yet solved for cannot overflow.
            h = layer(torch.tanh(h))
        shift, log_scale = h.chunk(2, dim=-1)
        return shift, smooth_limit(log_scale, FLOW_LIMIT)


class MaskedLinear(nn.Linear):
    """A linear layer without the weights that lead from a unit to one of a lower degree."""

    mask: Tensor

    def __init__(self, before: Tensor, after: Tensor) -> None:
        super().__init__(len(before), len(after))
        self.register_buffer("mask", after.unsqueeze(-1) >= before, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (*B, in_features) to (*B, out_features)."""
        return linear(x, self.weight * self.mask, self.bias)


class TriangularAffine(Transform):
    """The map x -> shift(x) + exp(log_scale(x)) * x of vectors, with a triangular Jacobian.

    `conditioner` maps x (*B, D) to shift and log_scale (*B, D), each element from earlier elements
    in some order; log |det J| = sum_d log_scale_d(x). Solving x = (y - shift(x)) exp(-log_scale(x))
    from x = y settles at least one more element in each pass, so D passes give the exact inverse;
    where the elements read are the elements left alone (a coupling), one pass does.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, conditioner: Callable[[Tensor], tuple[Tensor, Tensor]], passes: int) -> None:
        # The cache spares the density of a fresh draw the inverse, and keeps its gradient exact.
        super().__init__(cache_size=1)
        self.conditioner = conditioner
        self.passes = passes
        self._log_scale: Tensor | None = None

    @property
    def inv(self) -> Transform:
        """The inverse. Not kept: a cycle would hold a whole graph in memory until collected."""
        inverse = super().inv
        self._inv = None
        return inverse

    def _call(self, x: Tensor) -> Tensor:
        shift, self._log_scale = self.conditioner(x)
        return shift + self._log_scale.exp() * x

    def _inverse(self, y: Tensor) -> Tensor:
        x = y
        for _ in range(self.passes):
            shift, self._log_scale = self.conditioner(x)
            x = (y - shift) * (-self._log_scale).exp()
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return sum_d log_scale_d(x), shape (*B,) for x and y (*B, D)."""
        known_x, known_y = self._cached_x_y
        if self._log_scale is None or x is not known_x or y is not known_y:
            return self.conditioner(x)[1].sum(-1)
        return self._log_scale.sum(-1)


def _independent_normals(numbers: Tensor) -> TorchDistributionMixin:
    loc, log_scale = numbers.chunk(2, dim=-1)
    return dist.Normal(loc, smooth_limit(log_scale, SCALE_LIMIT).exp()).to_event(1)


def _given(net: nn.Module, features: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda z: net(z, features)


REGISTRY: dict[str, type[Posterior]] = {
    "mean-field": MeanField,
    "full-rank": FullRank,
    "flow": Flow,
}
