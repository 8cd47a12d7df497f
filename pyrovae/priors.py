"""Priors p(z): modules that return a distribution with batch shape () and event shape (D,).

A prior must score any z, and above all one that a posterior drew; it must be cheap to sample too.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import log
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from pyrovae.distributions import NormalMixture
from pyrovae.errors import InputError
from pyrovae.networks import (
    SMALL_GAIN,
    Shape,
    checked_count,
    checked_sizes,
    dense_layers,
    initialised,
    smooth_limit,
)
from pyrovae.posteriors import FLOW_LIMIT, SCALE_LIMIT, Posterior, TriangularAffine


class Prior(nn.Module, ABC):
    """A distribution p(z) over R^D, with or without parameters to learn.

    prior() has batch shape () and event shape (D,). `closed_form_kl` tells whether KL(q || p) has a
    formula for the posteriors that say the same; `needs_posterior` whether the constructor takes
    (posterior, x_shape) in place of latent_dim.
    Raises InputError if latent_dim is not a positive integer.
    """

    summary: ClassVar[str]
    closed_form_kl: ClassVar[bool] = False
    needs_posterior: ClassVar[bool] = False

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = checked_count(latent_dim, "latent_dim (--latent-dim)")

    @abstractmethod
    def forward(self) -> TorchDistributionMixin:
        """Return p(z), batch () and event (D,)."""


class StandardNormal(Prior):
    """Independent standard normals: p(z) = N(z; 0, I).

    >>> StandardNormal(3)().log_prob(torch.zeros(3))
    tensor(-2.7568)
    """

    summary = "independent standard normals"
    closed_form_kl = True
    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(self.latent_dim), persistent=False)

    def forward(self) -> TorchDistributionMixin:
        """Return N(0, I), batch () and event (D,)."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class Mixture(Prior):
    """A learned mixture of normals: p(z) = sum_m w_m prod_d N(z_d; loc_md, scale_md^2).

    It starts with equal weights, and with locations and scales that differ from component to
    component while together they have mean 0 and variance 1, as the standard normal has.

    >>> Mixture(3, components=5)().sample((4,)).shape
    torch.Size([4, 3])
    """

    summary = "a learned mixture of normals"

    def __init__(self, latent_dim: int, components: int = 50) -> None:
        super().__init__(latent_dim)
        components = checked_count(components, "components (--components)")
        shape = (components, self.latent_dim)
        # One component alone has no others to differ from: it starts as the standard normal.
        between = 0.5 if components > 1 else 0.0
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(shape) * between**0.5)
        self.log_scale = nn.Parameter(torch.full(shape, 0.5 * log(1 - between)))

    def forward(self) -> TorchDistributionMixin:
        """Return the mixture, batch () and event (D,)."""
        scale = smooth_limit(self.log_scale, SCALE_LIMIT).exp()
        return _mixture(self.logits, dist.Normal(self.loc, scale).to_event(1))


class VampPrior(Prior):
    """A mixture of posteriors at learned inputs: p(z) = (1/M) sum_m q(z | u_m).

    The pseudo-inputs u_m, (M, *x_shape), are the sigmoid of free numbers: the paper cuts them off
    at 0 and 1, which leaves a pixel that crosses the edge without a gradient, and most pixels of a
    digit sit at the edge. They start as noise; `initialize` puts them at training images.
    Source: Tomczak and Welling, VAE with a VampPrior (2018), https://arxiv.org/abs/1705.07120

    The posterior belongs to the VAE: it is not among the parameters of this prior, so a checkpoint
    of a VAE holds it once, and copies of a VAE have priors that follow the copied posterior.

    >>> from pyrovae.networks import MLPEncoder
    >>> from pyrovae.posteriors import MeanField
    >>> posterior = MeanField(MLPEncoder((1, 8, 8)), 3)
    >>> VampPrior(posterior, (1, 8, 8), components=20)().sample((4,)).shape
    torch.Size([4, 3])
    """

    summary = "a mixture of posteriors at learned inputs"
    needs_posterior = True
    logits: Tensor

    def __init__(self, posterior: Posterior, x_shape: Shape, components: int = 500) -> None:
        super().__init__(posterior.latent_dim)
        components = checked_count(components, "components (--components)")
        shape = checked_sizes(x_shape, "x_shape", least=1)
        # Inside a tuple, a module is not registered as a child.
        self._posterior = (posterior,)
        self.pseudo_logits = nn.Parameter(torch.randn(components, *shape))
        self.register_buffer("logits", torch.zeros(components), persistent=False)

    @property
    def posterior(self) -> Posterior:
        """The q(z | x) of the VAE."""
        return self._posterior[0]

    @property
    def pseudo_inputs(self) -> Tensor:
        """The u_m, (M, *x_shape), between 0 and 1."""
        return self.pseudo_logits.sigmoid()

    @torch.no_grad()
    def initialize(self, x: Tensor, noise: float = 0.01) -> None:
        """Put the pseudo-inputs at images drawn from `x` (N, *x_shape), plus normal noise.

        No image is drawn twice if there are enough of them. Values are kept 0.02 from 0 and 1,
        where the sigmoid would be too flat to learn. Raises InputError for another shape.
        """
        components, *shape = self.pseudo_logits.shape
        if x.dim() == 0 or list(x.shape[1:]) != shape or len(x) == 0:
            raise InputError(
                f"initialize expects x of shape (N, {', '.join(map(str, shape))}) with N >= 1; got "
                f"{tuple(x.shape)}. Give it the training images"
            )
        rounds = -(-components // len(x))
        index = torch.cat([torch.randperm(len(x), device=x.device) for _ in range(rounds)])
        chosen = x[index[:components]].to(self.pseudo_logits)
        chosen = chosen + noise * torch.randn_like(chosen)
        self.pseudo_logits.copy_(chosen.clamp(0.02, 0.98).logit())

    def forward(self) -> TorchDistributionMixin:
        """Return the mixture, batch () and event (D,)."""
        return _mixture(self.logits, self.posterior(self.pseudo_inputs))


class Flow(Prior):
    """Affine couplings of a standard normal, which map and invert in one pass each.

    A layer leaves every second element of z alone and gives each other element a shift and a scale
    computed from those; the next layer swaps the two halves. The start is near N(0, I).
    Source: Dinh, Sohl-Dickstein and Bengio, Density Estimation Using Real NVP (2017),
    https://arxiv.org/abs/1605.08803

    `transforms` is the number of layers, at least 2 so that every element moves; `hidden` the
    widths of the network inside each. Raises InputError otherwise.

    >>> Flow(3)().rsample((4,)).shape
    torch.Size([4, 3])
    """

    summary = "affine couplings of a standard normal (RealNVP)"
    loc: Tensor
    scale: Tensor

    def __init__(
        self, latent_dim: int, transforms: int = 4, hidden: Sequence[int] = (200,)
    ) -> None:
        super().__init__(latent_dim)
        if checked_count(transforms, "transforms") < 2:
            raise InputError(
                "The flow prior expects at least 2 transforms; got 1, which leaves every second "
                "element of z untouched. Ask for 2 or more"
            )
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(self.latent_dim), persistent=False)
        self.conditioners = nn.ModuleList(
            Coupling(self.latent_dim, hidden, parity=index % 2) for index in range(transforms)
        )

    def forward(self) -> TorchDistributionMixin:
        """Return the transformed normal, batch () and event (D,)."""
        layers = [TriangularAffine(net, passes=1) for net in self.conditioners]
        return dist.TransformedDistribution(dist.Normal(self.loc, self.scale).to_event(1), layers)


class Coupling(nn.Module):
    """Shift and log_scale for the elements of one parity from those of the other."""

    moved: Tensor

    def __init__(self, latent_dim: int, hidden: Sequence[int], parity: int) -> None:
        super().__init__()
        widths = (latent_dim, *checked_sizes(hidden, "hidden", least=1))
        self.register_buffer("moved", torch.arange(latent_dim) % 2 == parity, persistent=False)
        self.layers = nn.Sequential(
            *dense_layers(widths, "tanh"),
            initialised(nn.Linear(widths[-1], 2 * latent_dim), SMALL_GAIN),
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map z (*B, D) to shift and log_scale (*B, D), both 0 where z is left alone."""
        shift, log_scale = self.layers(z * ~self.moved).chunk(2, dim=-1)
        return shift * self.moved, smooth_limit(log_scale, FLOW_LIMIT) * self.moved


def _mixture(logits: Tensor, components: TorchDistributionMixin) -> TorchDistributionMixin:
    normals = isinstance(components, Independent) and isinstance(components.base_dist, Normal)
    kind = NormalMixture if normals else dist.MixtureSameFamily
    return kind(dist.Categorical(logits=logits), components)


REGISTRY: dict[str, type[Prior]] = {
    "standard-normal": StandardNormal,
    "mixture": Mixture,
    "vamp": VampPrior,
    "flow": Flow,
}
