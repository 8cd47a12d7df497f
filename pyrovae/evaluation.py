"""How good is a model: importance-weighted log p(x) of a split, and what lies behind it."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae import importance
from pyrovae.data import Split
from pyrovae.diagnostics import psis
from pyrovae.errors import InputError

_NATS_PER_BIT = math.log(2)
# Above it, the mean of the weights converges too slowly for any error bar to hold.
TRUSTED_K = 0.7
# Fewer draws have too few in their tail for k to be estimated.
SMALLEST_K = 25


class PerImage(NamedTuple):
    """What was estimated for each image, float64 tensors (N,) on the CPU, in nats."""

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
    posterior_mean: Tensor
    """(N, D) E_q[z | x]."""
    posterior_mean_error: Tensor
    """(N, D) variance of that mean's Monte-Carlo error: 0 in closed form, NaN for a single draw."""


class Evaluation(NamedTuple):
    """The marginal log-likelihood of a split and its diagnostics; ``print`` it for a summary.

    Means are over images, in nats per image; a ``_se`` is the standard error of that mean over
    images. ``log_likelihood`` is the importance-weighted estimate with K = ``num_particles``
    draws, a lower bound of log p(x) on average.
    """

    data: str
    protocol: str
    split: str
    kind: str
    """"mass" or "density": only numbers of one kind compare without a correction."""
    num_images: int
    num_particles: int
    seed: int
    log_likelihood: float
    log_likelihood_se: float
    log_likelihood_mc_error: float
    """Standard error of the mean from the draws of z alone: what another seed would move."""
    bias: float
    """How far log_likelihood lies below log p(x), to first order in 1/K: zero or negative."""
    psis_log_likelihood: float
    """The estimate from Pareto-smoothed weights: steadier where few draws carry the raw one."""
    elbo: float
    elbo_se: float
    rate: float
    """KL(q(z | x) || p(z)), estimated by the mean of log q(z | x) - log p(z)."""
    distortion: float
    """-E_q[log p(x | z)]; elbo = -(rate + distortion)."""
    bits_per_dim: float | None
    """-log2 P(x) per dimension, on the levels; None where x lies on no levels."""
    active_units: int | None
    """Latent dimensions with Var_x(E_q[z | x]) >= 0.01 (Burda et al., 2016); None if K = 1 and
    the posterior's mean has no closed form."""
    pareto_k_median: float | None
    pareto_k_above_0_7: float | None
    """Share of the images whose weights have a heavier tail than can be trusted."""
    ess_median: float
    trust: str
    """What share of the images can be trusted, and what would help the others."""
    device: str
    seconds: float
    per_image: PerImage

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values (NaN as None), without the per-image tensors."""
        summary = {name: value for name, value in self._asdict().items() if name != "per_image"}
        return {name: None if value != value else value for name, value in summary.items()}

    def __str__(self) -> str:
        k = "not estimated"
        if self.pareto_k_median is not None and self.pareto_k_above_0_7 is not None:
            k = f"median {self.pareto_k_median:.2f}, above 0.7 for {self.pareto_k_above_0_7:.1%}"
        bits = "-" if self.bits_per_dim is None else f"{self.bits_per_dim:.4f}"
        units = "-" if self.active_units is None else self.active_units
        rows = [
            (
                "log p(x)",
                f"{self.log_likelihood:.3f} ± {self.log_likelihood_se:.3f} nats per image",
            ),
            (
                "from the draws",
                f"± {self.log_likelihood_mc_error:.4f}, bias about {self.bias:.4f}; smoothed "
                f"weights give {self.psis_log_likelihood:.3f}",
            ),
            ("ELBO", f"{self.elbo:.3f} ± {self.elbo_se:.3f}"),
            ("rate + distortion", f"{self.rate:.3f} + {self.distortion:.3f}"),
            ("bits per dim", bits),
            ("active units", f"{units} of {self.per_image.posterior_mean.shape[1]}"),
            ("Pareto k", k),
            ("trust", self.trust),
            ("ESS", f"median {self.ess_median:.1f} of {self.num_particles}"),
            ("images", f"{self.num_images:,} of the {self.split} split"),
            ("particles", f"K = {self.num_particles}, seed {self.seed}"),
            ("protocol", f"{self.protocol}; a {self.kind}"),
            ("time", f"{self.seconds:.1f} s on {self.device}"),
        ]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


def evaluate(
    vae: importance.Programs,
    split: Split,
    num_particles: int = 1000,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    memory: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Estimate log p(x) for every image of a split by importance sampling with the guide.

    ``log p(x) ~ log (1/K) sum_k p(x, z_k) / q(z_k | x)``, z_k ~ q(z | x). The answer is a function
    of (weights, data, K, seed): how images and particles are cut into chunks moves it by rounding
    alone. No handler around the programs, such as a KL weight, can enter.

    Args:
        vae: a `pyrovae.VAE`, or any other `importance.Programs`.
        split: such as ``data.test``; sampled once, so that two models see the same x.
        num_particles: K >= 1.
        seed: of the draws of z.
        device: where to compute; default: where the VAE is.
        memory: bytes that one chunk may take; default: 64 MiB on a CPU, a quarter of the free
            memory on a GPU.
        progress: called with the number of images done.

    Raises:
        InputError: for K < 1, or data outside the likelihood's support.

    Source: Burda et al., Importance Weighted Autoencoders (2016),
    https://arxiv.org/abs/1509.00519
    """
    started = time.perf_counter()
    if num_particles < 1:
        raise InputError(f"num_particles must be at least 1, got {num_particles}")
    if device is not None:
        vae.to(device)
    model, guide, likelihood = vae.model, vae.guide, vae.likelihood
    here = next((p.device for p in vae.parameters()), torch.device("cpu"))
    x = split.tensor()
    likelihood.check(x)

    chosen = importance.plan(model, guide, x[:1].to(here), num_particles, memory)
    batches = []
    for start in range(0, len(x), chosen.images):
        part = x[start : start + chosen.images].to(here)
        batches.append(
            estimate(
                model,
                guide,
                part,
                num_particles,
                chunk=chosen.particles,
                seed=seed,
                first_image=start,
            )
        )
        if progress is not None:
            progress(min(start + chosen.images, len(x)))
    images = PerImage(*(torch.cat(column) for column in zip(*batches, strict=True)))
    return _summarise(
        images,
        split,
        kind=str(likelihood.kind),
        num_particles=num_particles,
        seed=seed,
        device=str(here),
        seconds=time.perf_counter() - started,
    )


def estimate(
    model: importance.Program,
    guide: importance.Program,
    x: Tensor,
    num_particles: int,
    *,
    chunk: int,
    seed: int = 0,
    first_image: int = 0,
) -> PerImage:
    """Everything `evaluate` reports, for the images of one batch x (B, *x_shape).

    Args:
        model: Pyro program with the observed sites, in a plate over images at dim -1.
        guide: Pyro program with the latent sites, in the same plate.
        x: (B, *x_shape).
        num_particles: K >= 1.
        chunk: particles computed at once.
        seed: of the draws.
        first_image: position of x[0] in its data set; the draws belong to positions.
    """
    weights, rate, distortion = [], [], []
    sums = squares = torch.zeros((), dtype=torch.float64)
    for terms in importance.chunks(
        model, guide, x, num_particles, chunk=chunk, seed=seed, first_image=first_image
    ):
        weights.append(terms.log_weights.double().cpu())
        rate.append((terms.log_posterior - terms.log_prior).double().sum(0).cpu())
        distortion.append(-terms.log_likelihood.double().sum(0).cpu())
        z = torch.cat(
            [v.flatten(2) if v.dim() > 2 else v.unsqueeze(-1) for v in terms.latents.values()], -1
        ).double()
        sums = sums + z.sum(0).cpu()
        squares = squares + (z * z).sum(0).cpu()
    log_w = torch.cat(weights)
    k, ess, smoothed = psis(log_w)
    log_likelihood = importance.log_mean_exp(log_w)
    mc_error = delta_error(log_w)
    mean, error = _posterior_mean(guide, x, sums, squares, num_particles)
    return PerImage(
        log_likelihood=log_likelihood,
        elbo=log_w.mean(0),
        rate=torch.stack(rate).sum(0) / num_particles,
        distortion=torch.stack(distortion).sum(0) / num_particles,
        pareto_k=k,
        ess=ess,
        mc_error=mc_error,
        bias=-0.5 * mc_error**2,
        psis_log_likelihood=_from_smoothed(log_w, smoothed),
        posterior_mean=mean,
        posterior_mean_error=error,
    )


def delta_error(log_weights: Tensor) -> Tensor:
    """Standard error of log((1/K) sum_k w_k) by the delta method, (B,); NaN for K = 1.

    ``sqrt(var(w) / K) / mean(w)``. To the same order, the expectation of the estimate lies half
    the square of it below log p(x).

    Args:
        log_weights: (K, B), in nats.

    >>> delta_error(torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64))
    tensor([0.5000], dtype=torch.float64)
    """
    w = torch.exp(log_weights - log_weights.amax(0))
    if len(w) == 1:
        return torch.full_like(w[0], math.nan)
    return w.std(0) / w.mean(0) / math.sqrt(len(w))


def _from_smoothed(log_w: Tensor, smoothed: Tensor) -> Tensor:
    # Smoothing changes the largest fifth of the weights at most, then divides all by their sum.
    # The median ratio is thus that of an unchanged weight, and it is the sum.
    return torch.nanmedian(log_w - smoothed, 0).values - math.log(len(log_w))


def _posterior_mean(
    guide: importance.Program, x: Tensor, sums: Tensor, squares: Tensor, num_particles: int
) -> tuple[Tensor, Tensor]:
    exact = importance.latent_mean(guide, x)
    if exact is not None:
        exact = exact.double().cpu()
        return exact, torch.zeros_like(exact)
    mean = sums / num_particles
    if num_particles == 1:
        return mean, torch.full_like(mean, math.nan)
    variance = (squares / num_particles - mean**2).clamp(min=0) / (num_particles - 1)
    return mean, variance


def active_units(
    posterior_mean: Tensor, error: Tensor | float = 0.0, threshold: float = 0.01
) -> Tensor:
    """Which latent dimensions depend on x: A_d = Var_x(E_q[z_d | x]) >= threshold; (D,) bool.

    A mean estimated from draws varies more than the mean itself, by the variance of its error,
    which is taken off.

    Source: Burda et al., Importance Weighted Autoencoders (2016), section 5.2

    Args:
        posterior_mean: (N, D) E_q[z | x] of each image.
        error: (N, D) variance of the Monte-Carlo error of each mean.
        threshold: of the variance.
    """
    if len(posterior_mean) < 2:
        return torch.zeros(posterior_mean.shape[1], dtype=torch.bool)
    noise = torch.as_tensor(error, dtype=posterior_mean.dtype).expand_as(posterior_mean).mean(0)
    return posterior_mean.var(0) - noise >= threshold


def bits_per_dim(log_likelihood: float, kind: str, levels: int | None, dims: int) -> float | None:
    """-log2 P(x) / dims, P being the probability of x on its L + 1 levels.

    For a density of y = (L x + u) / (L + 1), u ~ U(0, 1): log P(x) >= E[log p(y)] - dims log(L+1),
    so the number is then an upper bound. None for a density of x that lie on no levels.

    Args:
        log_likelihood: in nats per image.
        kind: "mass" or "density".
        levels: L.
        dims: numbers per image.
    """
    if kind == "density":
        if levels is None:
            return None
        log_likelihood = log_likelihood - dims * math.log(levels + 1)
    return -log_likelihood / (dims * _NATS_PER_BIT)


def _summarise(
    images: PerImage,
    split: Split,
    *,
    kind: str,
    num_particles: int,
    seed: int,
    device: str,
    seconds: float,
) -> Evaluation:
    n = len(images.elbo)
    protocol = split.protocol
    # A density of x that was not dequantised is one of x on [0, 1]: it has no level correction.
    levels = protocol.levels if kind == "mass" or protocol.dequantize == "uniform" else None
    log_likelihood = float(images.log_likelihood.mean())
    known = images.pareto_k[~torch.isnan(images.pareto_k)]
    return Evaluation(
        data=protocol.data,
        protocol=str(protocol),
        split=split.name,
        kind=kind,
        num_images=n,
        num_particles=num_particles,
        seed=seed,
        log_likelihood=log_likelihood,
        log_likelihood_se=_standard_error(images.log_likelihood),
        log_likelihood_mc_error=float(images.mc_error.norm() / n),
        bias=float(images.bias.mean()),
        psis_log_likelihood=float(images.psis_log_likelihood.mean()),
        elbo=float(images.elbo.mean()),
        elbo_se=_standard_error(images.elbo),
        rate=float(images.rate.mean()),
        distortion=float(images.distortion.mean()),
        bits_per_dim=bits_per_dim(log_likelihood, kind, levels, math.prod(split.x_shape)),
        active_units=_count_active(images),
        pareto_k_median=float(known.median()) if len(known) else None,
        pareto_k_above_0_7=float((known > TRUSTED_K).double().mean()) if len(known) else None,
        ess_median=float(images.ess.median()),
        trust=_trust(images.pareto_k, num_particles),
        device=device,
        seconds=round(seconds, 3),
        per_image=images,
    )


def _trust(pareto_k: Tensor, num_particles: int) -> str:
    """A sentence on the share of images whose weights have a light enough tail."""
    known = pareto_k[~torch.isnan(pareto_k)]
    if num_particles < SMALLEST_K:
        return (
            f"nothing is known of the weights' tails: Pareto k needs {SMALLEST_K} draws; raise "
            "--num-particles"
        )
    if len(known) == 0:
        return "all weights are equal: the guide is the posterior, and the estimate is exact"
    share = 1 - float((known > TRUSTED_K).sum()) / len(pareto_k)
    sentence = f"Pareto k is at most {TRUSTED_K} for {share:.1%} of the images"
    if share >= 0.95:
        return f"{sentence}: the estimate and its error can be trusted"
    return (
        f"{sentence}; for the others log p(x) is likely higher than estimated: a more expressive "
        "--posterior (full-rank, flow) or a larger --num-particles would help, and pyrovae anneal "
        "tells how much is missed"
    )


def _count_active(images: PerImage) -> int | None:
    if torch.isnan(images.posterior_mean_error).any():
        return None
    return int(active_units(images.posterior_mean, images.posterior_mean_error).sum())


def _standard_error(values: Tensor) -> float:
    n = len(values)
    return float(values.std() / math.sqrt(n)) if n > 1 else math.nan
