"""Elementary functions from additions and products, which a compiler makes vector instructions of.

The libraries' own take two to three times as long: they are good to the last bit everywhere.
These are good to a few units in the last place of float32, and are for float32 alone. Coefficients
are fits of our own: of log(1 + u) / u by interpolation at Chebyshev's points, of tanh(x) / x by
least squares, reweighted until the relative error is level.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# log(1 + u) / u for u in [0, 1], powers of u; in exact arithmetic to 6e-9.
_LOG1P = (
    0.9999999947,
    -0.4999989265,
    0.333297105,
    -0.2495161627,
    0.1966327427,
    -0.152696671,
    0.1054362384,
    -0.05637361321,
    0.01954252744,
    -0.003176057053,
)

# tanh(x) / x for |x| <= 9.02, where it is 1 in float32; powers of x^2; to 2e-9.
_TANH_EDGE = 9.02
_TANH_ABOVE = (
    0.9999999987,
    0.136799321,
    0.003868348872,
    2.800787201e-05,
    3.058595778e-08,
    -1.220410018e-11,
)
_TANH_BELOW = (1.0, 0.4701326416, 0.02724591666, 0.0003938667906, 1.287394714e-06)


def tanh(x: Tensor) -> Tensor:
    """tanh(x), of any shape, within 5e-7 of its size, and never beyond 1."""
    x = x.clamp(-_TANH_EDGE, _TANH_EDGE)
    square = x * x
    ratio = x * _polynomial(_TANH_ABOVE, square) / _polynomial(_TANH_BELOW, square)
    return ratio.clamp(-1.0, 1.0)


def log1p_of_unit(u: Tensor) -> Tensor:
    """log(1 + u) for u in [0, 1], of any shape, within 3e-7 of its size."""
    return u * _polynomial(_LOG1P, u)


def decay(x: Tensor) -> Tensor:
    """exp(-|x|), in [0, 1], that the functions below have in common."""
    return torch.exp(-x.abs())


def log_sigmoid(x: Tensor, u: Tensor) -> Tensor:
    """log sigmoid(x) = min(x, 0) - log(1 + u), with u = `decay` of x."""
    return x.clamp(max=0.0) - log1p_of_unit(u)


def softplus(x: Tensor, u: Tensor) -> Tensor:
    """log(1 + e^x) = max(x, 0) + log(1 + u), with u = `decay` of x."""
    return x.clamp(min=0.0) + log1p_of_unit(u)


def sigmoid(x: Tensor, u: Tensor) -> Tensor:
    """1 / (1 + e^-x), with u = `decay` of x: 1 / (1 + u) above zero, u / (1 + u) below."""
    return torch.where(x >= 0, 1.0, u) / (1.0 + u)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """By Horner's rule: c[0] + x (c[1] + x (...))."""
    *rest, last = coefficients
    value = x * last
    for c in reversed(rest[1:]):
        value = (value + c) * x
    return value + rest[0]
