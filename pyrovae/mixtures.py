"""Mixtures of discretised logistics: one a pixel value, or one a pixel shared by its channels."""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyrovae.distributions import DiscretizedLogistic, Parametric, Shape, levels
from pyrovae.errors import InputError

__all__ = ["CoupledLogisticMixture", "DiscretizedLogisticMixture"]


class DiscretizedLogisticMixture(Parametric):
    """A mixture of M discretised logistics for each element of x.

    P(x) = sum over m of softmax(logits)_m DiscretizedLogistic(x; loc_m, scale_m).

    Support: {k/L : k = 0..L}, a mass. ``logits``, ``loc``, ``scale``: (*B, M), units of x.

    Source: Salimans et al., PixelCNN++ (2017) https://arxiv.org/abs/1701.05517

    >>> loc, scale = torch.tensor([0.2, 0.8]), torch.tensor([0.1, 0.1])
    >>> d = DiscretizedLogisticMixture(torch.zeros(2), loc, scale, levels=3)
    >>> round(d.log_prob(torch.arange(4) / 3).exp().sum().item(), 6)
    1.0
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    settings = ("levels",)
    logits: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        levels: int = 255,
        validate_args: bool | None = None,
    ) -> None:
        self.levels = levels
        super().__init__((), validate_args, logits=logits, loc=loc, scale=scale)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The grid {k/L}."""
        return levels(self.levels)

    @property
    def _components(self) -> DiscretizedLogistic:
        return DiscretizedLogistic(self.loc, self.scale, self.levels, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log P(value), shape ``value`` broadcast with the batch."""
        if self._validate_args:
            self._validate_sample(value)
        # A decoder has the components in front. To loop over pixels inside, as memory lies, and
        # not over a handful of components, is worth a factor in compiled kernels.
        more = (None,) * max(0, value.dim() + 1 - self.loc.dim())  # dimensions of samples
        front = (slice(None), *more)
        logits, loc, scale = (p.movedim(-1, 0)[front] for p in (self.logits, self.loc, self.scale))
        components = DiscretizedLogistic(loc, scale, self.levels, validate_args=False)
        return torch.logsumexp(logits.log_softmax(0) + components.log_prob(value), 0)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw a component, then a level from it."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            m = dist.Categorical(logits=self.logits).sample(torch.Size(sample_shape)).unsqueeze(-1)
            loc, scale = (p.expand(*shape, -1).gather(-1, m) for p in (self.loc, self.scale))
            chosen = DiscretizedLogistic(loc, scale, self.levels, validate_args=False)
            return chosen.sample().squeeze(-1)

    @property
    def mean(self) -> Tensor:
        """The components' means, weighted."""
        return (self.logits.softmax(-1) * self._components.mean).sum(-1)


class CoupledLogisticMixture(Parametric):
    """A mixture of M discretised logistics for each colour pixel, its three channels coupled.

    One component m is drawn for a pixel; given it, red, green and blue follow discretised logistics
    with the locations loc_r, loc_g + c_0 (r - 1/2) and loc_b + c_1 (r - 1/2) + c_2 (g - 1/2), where
    r and g are the values observed. (Subtracting 1/2 is the original's [-1, 1] scale, kept on
    [0, 1].)

    Support: {k/L : k = 0..L}^(3, H, W), a mass. ``logits``: (*B, M, H, W); ``loc``, ``scale`` and
    ``coupling`` (the c above): (*B, M, 3, H, W). Raises InputError if x has not three channels.

    Source: Salimans et al., PixelCNN++ (2017) https://arxiv.org/abs/1701.05517

    >>> loc = torch.full((5, 3, 8, 8), 0.5)
    >>> d = CoupledLogisticMixture(torch.zeros(5, 8, 8), loc, loc / 10, torch.zeros_like(loc))
    >>> d.event_shape, d.sample().shape
    (torch.Size([3, 8, 8]), torch.Size([3, 8, 8]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "logits": constraints.independent(constraints.real, 3),
        "loc": constraints.independent(constraints.real, 4),
        "scale": constraints.independent(constraints.positive, 4),
        "coupling": constraints.independent(constraints.real, 4),
    }
    settings = ("levels",)
    logits: Tensor
    loc: Tensor
    scale: Tensor
    coupling: Tensor

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        coupling: Tensor,
        levels: int = 255,
        validate_args: bool | None = None,
    ) -> None:
        if loc.shape[-3] != 3:
            raise InputError(
                f"CoupledLogisticMixture expects 3 channels; got {loc.shape[-3]}. "
                "Use DiscretizedLogisticMixture, which couples none (coupling=False)."
            )
        self.levels = levels
        super().__init__(
            loc.shape[-3:], validate_args, logits=logits, loc=loc, scale=scale, coupling=coupling
        )

    @constraints.dependent_property(is_discrete=True, event_dim=3)
    def support(self) -> constraints.Constraint:
        """The grid {k/L}, for every element."""
        return constraints.independent(levels(self.levels), 3)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log P(value), the batch dimensions of ``value`` broadcast with the batch."""
        if self._validate_args:
            self._validate_sample(value)
        x = (value.unsqueeze(-4) * self.levels).round() / self.levels
        loc = self.loc + _shift(self.coupling, x[..., 0, :, :], x[..., 1, :, :])
        channels = DiscretizedLogistic(loc, self.scale, self.levels, validate_args=False)
        log_mass = channels.log_prob(x).sum(-3)
        return torch.logsumexp(self.logits.log_softmax(-3) + log_mass, -3).sum((-2, -1))

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw a component for each pixel, then red, green and blue in this order."""
        sample_shape = torch.Size(sample_shape)
        with torch.no_grad():
            m = dist.Categorical(logits=self.logits.movedim(-3, -1)).sample(sample_shape)
            index = m[..., None, None, :, :].expand(*m.shape[:-2], 1, *self.event_shape)

            def choose(p: Tensor) -> Tensor:
                return p.expand(sample_shape + p.shape).gather(-4, index).squeeze(-4)

            loc, scale, coupling = map(choose, (self.loc, self.scale, self.coupling))

            def draw(loc: Tensor, scale: Tensor) -> Tensor:
                return DiscretizedLogistic(loc, scale, self.levels, validate_args=False).sample()

            return _in_order(draw, loc, scale, coupling)

    @property
    def mean(self) -> Tensor:
        """The mean to first order, for pictures.

        Green and blue are shifted by the component's mean red and green. That is exact where the
        distribution stays clear of the ends of [0, 1], and wherever the coupling is 0.
        """

        def expect(loc: Tensor, scale: Tensor) -> Tensor:
            return DiscretizedLogistic(loc, scale, self.levels, validate_args=False).mean

        means = _in_order(expect, self.loc, self.scale, self.coupling)
        return (self.logits.softmax(-3).unsqueeze(-3) * means).sum(-4)


def _shift(coupling: Tensor, red: Tensor, green: Tensor) -> Tensor:
    """Return what red and green add to the three locations, (..., 3, H, W)."""
    c_0, c_1, c_2 = coupling.unbind(-3)
    r, g = red - 0.5, green - 0.5
    to_green = c_0 * r
    return torch.stack([torch.zeros_like(to_green), to_green, c_1 * r + c_2 * g], -3)


def _in_order(value_of: Any, loc: Tensor, scale: Tensor, coupling: Tensor) -> Tensor:
    """Apply ``value_of(loc, scale)`` to red, green and blue, each shifted by those before it."""
    red = value_of(loc[..., 0, :, :], scale[..., 0, :, :])
    half = torch.full_like(red, 0.5)
    green_loc = loc[..., 1, :, :] + _shift(coupling, red, half)[..., 1, :, :]
    green = value_of(green_loc, scale[..., 1, :, :])
    blue_loc = loc[..., 2, :, :] + _shift(coupling, red, green)[..., 2, :, :]
    return torch.stack([red, green, value_of(blue_loc, scale[..., 2, :, :])], -3)
