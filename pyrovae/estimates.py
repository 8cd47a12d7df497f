"""What importance sampling tells of each image: log p(x), its bounds, its errors."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae import importance
from pyrovae.accumulators import LogWeights, rows_kept
from pyrovae.importance import GUIDE, LogTerms
from pyrovae.proposals import PARTICLE_BLOCK, Proposal

# Log-weights that are looked at together: 2 MB for each copy of them on a CPU.
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
    # Taking them in makes a few copies: of a few images at a time.
    at_once = _NUMBERS_AT_ONCE.get(x.device.type, _NUMBERS_AT_ONCE["cpu"])
    few = max(1, at_once // rows_kept(num_particles))
    weights = [LogWeights(num_particles, len(part), x.device) for part in x.split(few)]
    for terms in draws(num_particles, proposal=proposal):
        for images, part in zip(weights, terms.log_weights.split(few, 1), strict=True):
            images.add(part)
        if proposal == GUIDE:
            of_guide.add(terms)
    if proposal != GUIDE:
        for terms in draws(min(num_particles, PARTICLE_BLOCK)):
            of_guide.add(terms)
    columns = zip(*(part.summary() for part in weights), strict=True)
    log_likelihood, error, k, ess, smoothed, curve = (torch.cat(column) for column in columns)
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
