"""Encoders and decoders: plain torch networks that know shapes and no probability.

An encoder maps x of shape (*B, *x_shape), in [0, 1], to features (*B, out_features); a decoder maps
z of shape (*B, D) to params (*B, *out_shape), where out_shape is the likelihood's `params_shape`.
No network here normalises over the batch: a decoder meets particles and images in one axis, and
log p(x | z) must not depend on which other z happen to stand beside it.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from math import prod, sqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pyrovae.errors import InputError

Shape = tuple[int, ...]


class Activation(NamedTuple):
    """An activation and the gain that keeps the size of a signal passing through it."""

    module: type[nn.Module]
    gain: float


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(nn.ReLU, sqrt(2.0)),
    "tanh": Activation(nn.Tanh, 1.0),
    "silu": Activation(nn.SiLU, sqrt(2.0)),
    "gelu": Activation(nn.GELU, sqrt(2.0)),
    "elu": Activation(nn.ELU, 1.0),
    "softplus": Activation(nn.Softplus, 1.0),
    "leaky-relu": Activation(nn.LeakyReLU, sqrt(2.0)),
}

# A decoder that starts near zero starts from the likelihood's plainest distribution, so the first
# loss is finite for every likelihood; not exactly zero, or no gradient would reach what is below.
SMALL_GAIN = 0.1


def smooth_limit(value: Tensor, limit: float) -> Tensor:
    """Squeeze `value` (any shape) into (-limit, limit): limit * tanh(value / limit).

    Near zero it is the identity. An exponential of the result can neither overflow nor vanish,
    and unlike a clamp it has a gradient on both sides of every point short of saturation.
    """
    return limit * torch.tanh(value / limit)


def over_leading(function: Callable[[Tensor], Tensor], value: Tensor, event_dim: int) -> Tensor:
    """Apply a function of rows (N, *event) to `value` (*B, *event); the result is (*B, *out)."""
    leading, event = value.shape[: value.dim() - event_dim], value.shape[value.dim() - event_dim :]
    result = function(value.reshape(leading.numel(), *event))
    return result.reshape(*leading, *result.shape[1:])


def scaled[L: nn.Module](layer: L, gain: float) -> L:
    ...


class Encoder(nn.Module):
    ...
