"""Diagnostics of importance weights, and the only file that imports ArviZ.

`psis` gives what ArviZ's ``psislw`` gives, to rounding, and is held to it by a test. It is written
out because ArviZ takes one image after the other in NumPy, a millisecond each: on a GPU that would
be most of an evaluation. ArviZ exists in two lines: 0.23 (Python 3.11) and 1.x (Python 3.12 and
later), whose tails may differ by one draw. Here the tail is the paper's on both.
"""

import math
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.errors import InputError

# A generalised Pareto distribution is fitted to the largest fifth of the weights, more than four.
_SMALLEST_K = 25
_SMALLEST_TAIL = 5
# Weights this close to each other, in nats, have no tail: the proposal is the posterior.
_EQUAL = 1e-6
# The exponential of less than this has fewer digits: -708.4 nats, in float64.
_SMALLEST = math.log(torch.finfo(torch.float64).tiny)
# The prior of the fit: its scale, in quartiles; and ten draws' worth of k = 1/2.
_PRIOR_SCALE, _PRIOR_DRAWS, _PRIOR_K = 3, 10, 0.5
# Numbers of a fit that are looked at together: 2 MB on a CPU, to stay in its caches.
_AT_ONCE = {"cpu": 2**18, "cuda": 2**23}


class Psis(NamedTuple):
    """Pareto-smoothed importance sampling, per image."""

    pareto_k: Tensor
    """(B,) shape of the weights' tail; NaN where it was not estimated."""
    ess: Tensor
    """(B,) effective sample size of the smoothed weights, between 1 and K."""
    log_weights: Tensor
    """(K, B) smoothed log-weights, normalised to sum to one."""


def psis(log_weights: Tensor) -> Psis:
    """Fit a generalised Pareto distribution to the tail of each image's importance weights.

    The tail are the ceil(min(K / 5, 3 sqrt(K))) largest weights, which are replaced by that
    distribution's quantiles, none above the largest raw weight. k < 0.7: the importance-weighted
    estimate can be trusted and its error bar means something; k > 0.7: so few draws carry the
    estimate that both are doubtful. k is not estimated (NaN) for K < 25, nor where all weights are
    equal; it is infinite where fewer than five lie above all others, which tie or vanish beside the
    largest. ess = 1 / sum_k v_k^2 for smoothed, normalised weights v.

    Source: Vehtari et al., Pareto Smoothed Importance Sampling (2024),
    https://arxiv.org/abs/1507.02646; the fit: Zhang and Stephens, A New and Efficient Estimation
    Method for the Generalized Pareto Distribution (2009), https://doi.org/10.1198/tech.2009.08017

    Args:
        log_weights: (K, B), in nats; any constant may be added to a column.

    Returns:
        float64, on the device of the log-weights.

    >>> psis(torch.zeros(100, 2)).ess.round()
    tensor([100., 100.], dtype=torch.float64)
    """
    # A copy always, for it is written into; (B, K), for rows are sorted.
    w = log_weights.detach().T.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    top, places = w.topk(largest_needed(len(w.T)), 1)
    k, tail = fit_tail(top, w.amin(1), len(w.T))
    smoothed = torch.log_softmax(w.scatter_(1, places, tail), 1).T
    ess = torch.exp(-torch.logsumexp(2 * smoothed, 0))
    return Psis(k, ess, smoothed)


def largest_needed(num_particles: int) -> int:
    """How many of K weights a fit looks at: ceil(min(K / 5, 3 sqrt(K))) and the one below them."""
    return min(num_particles, math.ceil(min(num_particles / 5, 3 * num_particles**0.5)) + 1)


def fit_tail(top: Tensor, lowest: Tensor, num_particles: int) -> tuple[Tensor, Tensor]:
    """k (B,) and the smoothed values of the largest log-weights, in their order.

    Args:
        top: (B, largest_needed(K)), descending, float64.
        lowest: (B,) the smallest of all.
        num_particles: K.
    """
    k = torch.full_like(lowest, torch.nan)
    smoothed = top.clone()
    fits = top[:, 0] - lowest > _EQUAL
    if num_particles >= _SMALLEST_K and fits.any():
        peak = top[fits, :1].nan_to_num(posinf=0.0)
        k[fits], relative = _smoothed(top[fits] - peak)
        smoothed[fits] = relative + peak
    return k, smoothed


def _smoothed(top: Tensor) -> tuple[Tensor, Tensor]:
    """k (B,) and the smoothed values of ``top`` (B, n + 1), descending from 0."""
    k = torch.full_like(top[:, 0], torch.inf)
    smoothed = top.clone()
    cutoff = top[:, -1:].clamp(min=_SMALLEST)
    # Weights that equal the cutoff are none of the tail, nor those that vanish.
    lengths = (top > cutoff).sum(1)
    at_once = _AT_ONCE.get(top.device.type, _AT_ONCE["cpu"])
    for length in lengths.unique().tolist():
        if length < _SMALLEST_TAIL:
            continue
        grid = _grid_size(length)
        for rows in (lengths == length).nonzero()[:, 0].split(max(1, at_once // (grid * length))):
            floor = cutoff[rows].exp()
            ascending = top[rows, :length].flip(1).exp() - floor
            shape, scale = _pareto(ascending, grid)
            # Where the fit overflows, next to nothing lies beside a few weights: not to be trusted.
            k[rows] = shape.nan_to_num(nan=torch.inf, posinf=torch.inf)
            values = (_quantiles(length, shape, scale) + floor).log().clamp(max=0).flip(1)
            kept = torch.where(values.isfinite(), values, top[rows, :length])
            smoothed[rows, :length] = kept
    return k, smoothed


def _grid_size(length: int) -> int:
    return 30 + math.isqrt(length)


def _pareto(ascending: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """k (B,) and scale (B,) of a generalised Pareto distribution, of values above 0 (B, n).

    By Zhang and Stephens: the mean of theta = k / scale, with the sign of their paper, over a grid
    of theta that is weighted by its profile likelihood; k, given theta, is drawn towards 1/2.
    """
    n = ascending.shape[1]
    quartile = ascending[:, int(n / 4 + 0.5) - 1, None]
    place = torch.arange(1, grid + 1, dtype=torch.float64, device=ascending.device) - 0.5
    theta = (1 - torch.sqrt(grid / place)) / (_PRIOR_SCALE * quartile) + 1 / ascending[:, -1:]
    k = torch.log1p(-theta.unsqueeze(2) * ascending.unsqueeze(1)).mean(2)
    weights = torch.softmax(n * ((-theta / k).log() - k - 1), 1)
    weights = torch.where(weights < 10 * torch.finfo(torch.float64).eps, 0.0, weights)
    theta = (theta * weights).sum(1) / weights.sum(1)
    k = torch.log1p(-theta.unsqueeze(1) * ascending).mean(1)
    scale = -k / theta
    return (n * k + _PRIOR_DRAWS * _PRIOR_K) / (n + _PRIOR_DRAWS), scale


def _quantiles(n: int, k: Tensor, scale: Tensor) -> Tensor:
    """Quantiles of generalised Pareto distributions (B,) at (i + 1/2) / n: (B, n)."""
    p = (torch.arange(n, dtype=torch.float64, device=k.device) + 0.5) / n
    exponential = -torch.log1p(-p)
    k, scale = k.unsqueeze(1), scale.unsqueeze(1)
    curved = torch.expm1(k * exponential) / k
    return scale * torch.where(k.abs() < torch.finfo(torch.float64).eps, exponential, curved)


def inference_data(groups: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    """Gather xarray Datasets, by group, in an ``arviz.InferenceData``; ArviZ 0.23 alone has it.

    Args:
        groups: name of a group -> Dataset.
        attrs: of the whole.

    Raises:
        InputError: with ArviZ 1.x, whose container is xarray's DataTree.
    """
    if int(version("arviz").split(".")[0]) >= 1:
        raise InputError(
            f"ArviZ {version('arviz')} has no InferenceData any more; use to_datatree, which its "
            "functions take in its place"
        )
    with warnings.catch_warnings():
        # ArviZ 0.23 announces its successor when it is imported; a user can do nothing about it.
        warnings.simplefilter("ignore")
        import arviz

        return arviz.InferenceData(attrs=dict(attrs), **groups)
