"""Elementary functions from additions and products, which a compiler makes vector instructions of.

The libraries' own logarithm takes longer: it is good to the last bit, and for arguments that do
not occur here. These are good to a few units in the last place of float32, and
for float32 alone. The coefficients are our own, by interpolation at Chebyshev's points.
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


def log1p_of_unit(u: Tensor) -> Tensor:
    """log(1 + u) for u in [0, 1], of any shape, within 3e-7 of its size."""
    return u * _polynomial(_LOG1P, u)


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigmoid(x) = min(x, 0) - log(1 + e^-|x|), of any shape."""
    return x.clamp(max=0.0) - log1p_of_unit(_decay(x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), of any shape."""
    return x.clamp(min=0.0) + log1p_of_unit(_decay(x))


def _decay(x: Tensor) -> Tensor:
    """e^-|x|, in [0, 1]."""
    return torch.exp(-x.abs())


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """By Horner's rule: c[0] + x (c[1] + x (...))."""
    *rest, last = coefficients
    value = x * last
    for c in reversed(rest[1:]):
        value = (value + c) * x
    return value + rest[0]
