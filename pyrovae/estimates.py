"""What importance sampling tells of each image: log p(x), its bounds, its errors."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae import importance
from pyrovae.diagnostics import psis
from pyrovae.importance import GUIDE, LogTerms, log_mean_exp
from pyrovae.proposals import PARTICLE_BLOCK, Proposal

# Log-weights whose diagnostics are computed together: 2 MB for each copy of them on a CPU.
_NUMBERS_AT_ONCE = {"cpu": 250_000, "cuda": 4_000_000}


class PerImage(NamedTuple):
    """What was estimated for each image, float64 tensors (N,) on the CPU, in nats.

    ``elbo``, ``rate``, ``distortion`` and ``posterior_mean`` speak of the guide, everything else
    of the proposal, which is the guide unless one was asked for.
    """

    log_likelihood: Tensor
    elbo: Tensor
    rate: Tensor
    distortion: Tensor
    pareto_k: Tensor
    ess: Tensor
    mc_error: Tensor
    """Standard error of log_likelihood over draws of z, by the delta method; NaN for K = 1."""
    bias: Tensor
    """E[log_likelihood] - log p(x) to first order in 1/K, never positive; NaN for K = 1."""
    psis_log_likelihood: Tensor
    """The estimate from Pareto-smoothed weights."""
    bounds: Tensor
    """(N, len(curve_sizes(K))) the importance-weighted bound at each size K' of the curve."""
    posterior_mean: Tensor
    """(N, D) E_q[z | x]."""
    posterior_mean_error: Tensor
    """(N, D) variance of that mean's Monte-Carlo error: 0 in closed form, NaN for a single draw."""


def estimate(
    model: importance.Program,
    guide: importance.Program,
    x: Tensor,
    num_particles: int,
    *,
    chunk: int,
    seed: int = 0,
    first_image: int = 0,
    proposal: Proposal = GUIDE,
    kernel: importance.Kernel | None = None,
) -> PerImage:
    """Everything `evaluate` reports, for the images of one batch x (B, *x_shape).

    With another proposal than the guide, what speaks of the guide comes from 64 further draws, K
    if that is fewer, which are those an evaluation with the guide begins with.

    Args:
        model: Pyro program with the observed sites, in a plate over images at dim -1.
        guide: Pyro program with the latent sites, in the same plate.
        x: (B, *x_shape).
        num_particles: K >= 1.
        chunk: particles computed at once.
        seed: of the draws.
        first_image: position of x[0] in its data set; the draws belong to positions.
        proposal: what the draws of log p(x) come from.
        kernel: as in `importance.chunks`.

    Raises:
        InputError: as `importance.chunks`.
    """
    draws = partial(
        importance.chunks,
        model,
        guide,
        x,
        chunk=chunk,
        seed=seed,
        first_image=first_image,
        kernel=kernel,
    )
    importance.check_particles(num_particles)
    of_guide = _GuideSums(importance.latent_mean(guide, x), x.device)
    # One block for all: small tensors kept from every chunk would keep the allocator from giving
    # the large ones between them back.
    log_w = torch.empty(num_particles, len(x), dtype=x.dtype, device=x.device)
    done = 0
    for terms in draws(num_particles, proposal=proposal):
        chunk_w = terms.log_weights
        log_w[done : done + len(chunk_w)] = chunk_w
        done += len(chunk_w)
        if proposal == GUIDE:
            of_guide.add(terms)
    if proposal != GUIDE:
        for terms in draws(min(num_particles, PARTICLE_BLOCK)):
            of_guide.add(terms)
    # Diagnostics make a dozen copies of the weights; of a few images at a time, whatever K is.
    at_once = _NUMBERS_AT_ONCE.get(x.device.type, _NUMBERS_AT_ONCE["cpu"])
    few = log_w.split(max(1, at_once // num_particles), 1)
    columns = zip(*(_of_weights(part.double()) for part in few), strict=True)
    log_likelihood, k, ess, error, smoothed, curve = (torch.cat(column) for column in columns)
    mean, mean_error = of_guide.posterior_mean()
    found = PerImage(
        log_likelihood=log_likelihood,
        elbo=of_guide.elbo / of_guide.count,
        rate=of_guide.rate / of_guide.count,
        distortion=of_guide.distortion / of_guide.count,
        pareto_k=k,
        ess=ess,
        mc_error=error,
        bias=-0.5 * error**2,
        psis_log_likelihood=smoothed,
        bounds=curve,
        posterior_mean=mean,
        posterior_mean_error=mean_error,
    )
    # Copied to the CPU once a batch: chunks wait for nobody.
    return PerImage(*(values.cpu() for values in found))


def _of_weights(log_w: Tensor) -> tuple[Tensor, ...]:
    """What the log-weights (K, B) tell: log p(x), k, effective size, error, smoothed, curve."""
    k, ess, smoothed = psis(log_w)
    return (
        log_mean_exp(log_w),
        k,
        ess,
        delta_error(log_w),
        smoothed_log_mean_exp(log_w, smoothed),
        bounds(log_w),
    )


class _GuideSums:
    """Sums over the draws of a guide, (B,), float64."""

    def __init__(self, exact_mean: Tensor | None, device: torch.device):
        self.exact_mean = exact_mean
        self.count = 0
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        self.elbo = self.rate = self.distortion = self.z = self.z_squared = nothing

    def add(self, terms: LogTerms) -> None:
        """Add the draws of one chunk."""
        self.count += len(terms.log_likelihood)
        self.elbo = self.elbo + _sum(terms.log_weights)
        self.rate = self.rate + _sum(terms.log_posterior - terms.log_prior)
        self.distortion = self.distortion - _sum(terms.log_likelihood)
        if self.exact_mean is None:
            sites = terms.latents.values()
            z = torch.cat([v.flatten(2) if v.dim() > 2 else v.unsqueeze(-1) for v in sites], -1)
            self.z = self.z + _sum(z)
            self.z_squared = self.z_squared + _sum(z.double() ** 2)

    def posterior_mean(self) -> tuple[Tensor, Tensor]:
        """E_q[z | x] and the variance of its error, each (B, D)."""
        if self.exact_mean is not None:
            exact = self.exact_mean.double()
            return exact, torch.zeros_like(exact)
        mean = self.z / self.count
        if self.count == 1:
            return mean, torch.full_like(mean, math.nan)
        variance = (self.z_squared / self.count - mean**2).clamp(min=0) / (self.count - 1)
        return mean, variance


def _sum(values: Tensor) -> Tensor:
    return values.sum(0, dtype=torch.float64)


def delta_error(log_weights: Tensor) -> Tensor:
    """Standard error of log((1/K) sum_k w_k) by the delta method, (B,); NaN for K = 1.

    ``sqrt(var(w) / K) / mean(w)``. To the same order, the expectation of the estimate lies half
    the square of it below log p(x). Draws that take turns in a mixture vary less than this says.

    Args:
        log_weights: (K, B), in nats.

    >>> delta_error(torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64))
    tensor([0.5000], dtype=torch.float64)
    """
    w = torch.exp(log_weights - log_weights.amax(0))
    if len(w) == 1:
        return torch.full_like(w[0], math.nan)
    return w.std(0) / w.mean(0) / math.sqrt(len(w))


def curve_sizes(num_particles: int) -> list[int]:
    """K' = 1, 10, 100, ... below K, and K itself.

    >>> curve_sizes(5000)
    [1, 10, 100, 1000, 5000]
    """
    sizes = [1]
    while 10 * sizes[-1] < num_particles:
        sizes.append(10 * sizes[-1])
    return sizes if num_particles == 1 else [*sizes, num_particles]


def bounds(log_weights: Tensor) -> Tensor:
    """The importance-weighted bound at every size of the curve, (B, len(curve_sizes(K))).

    At K' it is the mean, over disjoint groups of K' of the K draws, of ``log (1/K') sum_k w_k``:
    an unbiased estimate of the bound with K' draws. Each size rises above the one before, in every
    column, if it is a multiple of it and divides K: both means are then over the same draws.

    Args:
        log_weights: (K, B), in nats.
    """
    values, rows = log_weights, []
    for size in curve_sizes(len(log_weights))[:-1]:
        if size > 1:
            groups = len(values) // 10
            values = log_mean_exp(values[: 10 * groups].unflatten(0, (groups, 10)), 1)
        rows.append(values.mean(0))
    return torch.stack([*rows, log_mean_exp(log_weights)], -1)


def smoothed_log_mean_exp(log_weights: Tensor, smoothed: Tensor) -> Tensor:
    """log of the mean of Pareto-smoothed weights, on the scale of the raw ones: (B,).

    Args:
        log_weights: (K, B), in nats.
        smoothed: (K, B) the same weights after smoothing, which sum to one.
    """
    # At most the largest fifth of the weights was changed before all were divided by their sum:
    # the median ratio is that of an unchanged weight, and it is the sum.
    return torch.nanmedian(log_weights - smoothed, 0).values - math.log(len(log_weights))
