"""Diagnostics of importance weights, computed by ArviZ; the only file that imports it.

ArviZ exists in two lines whose functions differ: 0.23 (Python 3.11) has ``arviz.psislw``, which
takes log-weights; 1.x (Python 3.12 and later) has ``arviz_stats``, whose ``psislw`` takes
log-likelihoods and negates them. `psis` gives the same answer on both.
"""

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae.errors import InputError

# A generalised Pareto distribution is fitted to the largest fifth of the weights; ArviZ asks for
# more than four of them.
_SMALLEST_K = 25
# Weights this close to each other, in nats, have no tail: the proposal is the posterior.
_EQUAL = 1e-6


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

    k < 0.7: the importance-weighted estimate can be trusted and its error bar means something;
    k > 0.7: so few draws carry the estimate that both are doubtful. k is not estimated (NaN) for
    K < 25, nor where all weights are equal. ess = 1 / sum_k v_k^2 for smoothed, normalised
    weights v.

    Source: Vehtari et al., Pareto Smoothed Importance Sampling (2024),
    https://arxiv.org/abs/1507.02646

    Args:
        log_weights: (K, B), in nats; any constant may be added to a column.

    >>> psis(torch.zeros(100, 2)).ess.round()
    tensor([100., 100.], dtype=torch.float64)
    """
    weights = log_weights.detach().to("cpu", torch.float64)
    smoothed = torch.log_softmax(weights, 0)
    k = torch.full(weights.shape[1:], torch.nan, dtype=torch.float64)
    fits = (weights.amax(0) - weights.amin(0)) > _EQUAL
    if len(weights) >= _SMALLEST_K and fits.any():
        lw, kss = _psislw(weights[:, fits].T.contiguous().numpy())
        smoothed[:, fits] = torch.from_numpy(np.asarray(lw)).T
        k[fits] = torch.from_numpy(np.asarray(kss, dtype=np.float64)).reshape(-1)
    ess = torch.exp(-torch.logsumexp(2 * smoothed, 0))
    return Psis(k, ess, smoothed)


def _psislw(log_weights: np.ndarray) -> tuple[Any, Any]:
    """(B, K) log-weights -> normalised smoothed log-weights (B, K) and k (B,)."""
    with warnings.catch_warnings():
        # ArviZ 0.23 announces its successor when it is imported; a user can do nothing about it.
        warnings.simplefilter("ignore")
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            import arviz

            return arviz.psislw(log_weights)
        smoothed, k = array_stats.psislw(-log_weights)
    smoothed = np.asarray(smoothed)
    top = smoothed.max(-1, keepdims=True)
    total = top + np.log(np.exp(smoothed - top).sum(-1, keepdims=True))
    return smoothed - total, k


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
        warnings.simplefilter("ignore")  # as in _psislw
        import arviz

        return arviz.InferenceData(attrs=dict(attrs), **groups)
