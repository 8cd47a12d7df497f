"""How good is a model: importance-weighted log p(x) of a split, and what lies behind it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae import compiled_terms, importance, processes
from pyrovae.accumulators import curve_sizes
from pyrovae.data import Split
from pyrovae.errors import InputError
from pyrovae.estimates import PerImage, estimate
from pyrovae.importance import GUIDE
from pyrovae.information import Information, information
from pyrovae.precision import check_rounds, networks_in
from pyrovae.proposals import IMAGE_BLOCK, Proposal

__all__ = [
    "Bound",
    "Evaluation",
    "PerImage",
    "Shift",
    "active_units",
    "bits_per_dim",
    "estimate",
    "evaluate",
]

_NATS_PER_BIT = math.log(2)
# Above it, the mean of the weights converges too slowly for any error bar to hold.
TRUSTED_K = 0.7
# Fewer draws have too few in their tail for k to be estimated.
SMALLEST_K = 25
# Images and draws on which a lower precision is held against float32.
_COMPARED_IMAGES, _COMPARED_PARTICLES = 100, 1000


class Bound(NamedTuple):
    """One point of the curve of bounds: a mean over images and its standard error, in nats."""

    num_particles: int
    bound: float
    se: float


class Shift(NamedTuple):
    """What rounding moves log p(x) by, in nats: a mean over images, and its standard error."""

    num_images: int
    num_particles: int
    mean: float
    """Of log p(x) with rounded factors minus log p(x) in float32, on the same noise."""
    se: float


class Origin(NamedTuple):
    """What an evaluation was made of; the draws can be made again from it."""

    vae: importance.Programs
    split: Split
    proposal: Proposal


class Evaluation(NamedTuple):
    """The marginal log-likelihood of a split and its diagnostics; ``print`` it for a summary.

    Means are over images, in nats per image; a ``_se`` is the standard error of that mean over
    images. ``log_likelihood`` is the importance-weighted estimate with K = ``num_particles``
    draws of the proposal, a lower bound of log p(x) on average. ELBO, rate, distortion and what
    follows from them speak of the guide, whatever the proposal.
    """

    data: str
    protocol: str
    split: str
    kind: str
    """"mass" or "density": only numbers of one kind compare without a correction."""
    num_images: int
    num_particles: int
    seed: int
    proposal: str
    """What z was drawn from, in words."""
    log_likelihood: float
    log_likelihood_se: float
    log_likelihood_mc_error: float
    """Standard error of the mean from the draws of z alone: what another seed would move."""
    bias: float
    """How far log_likelihood lies below log p(x), to first order in 1/K: zero or negative."""
    psis_log_likelihood: float
    """The estimate from Pareto-smoothed weights: steadier where few draws carry the raw one."""
    curve: list[Bound]
    """The importance-weighted bound at K' = 1, 10, 100, ... and K, from the same draws."""
    elbo: float
    elbo_se: float
    rate: float
    """KL(q(z | x) || p(z)), estimated by the mean of log q(z | x) - log p(z)."""
    rate_se: float
    distortion: float
    """-E_q[log p(x | z)]; elbo = -(rate + distortion)."""
    distortion_se: float
    information: Information | None
    """The parts of the rate, of the first images; None if they were not asked for."""
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
    precision: str
    """Of the networks' matrix products: "fp32", "tf32" or "bf16"."""
    precision_shift: Shift | None
    """What that moves log p(x) by, of the first images; None in float32."""
    device: str
    seconds: float
    per_image: PerImage
    origin: Origin

    def to_datatree(self, *, max_draws: int = 200) -> Any:
        """The draws, weights, images and predictions as an ``xarray.DataTree`` (ArviZ 1.x).

        See `pyrovae.export` for the groups. The draws are made again, so the VAE must still be
        the one that was evaluated. Of more than ``max_draws`` per image, the first are kept.
        """
        from pyrovae import export

        vae, split, proposal = self.origin
        return export.to_datatree(vae, split, self, max_draws=max_draws, proposal=proposal)

    def to_inference_data(self, *, max_draws: int = 200) -> Any:
        """As `to_datatree`, for ArviZ 0.23: an ``arviz.InferenceData``."""
        from pyrovae import export

        vae, split, proposal = self.origin
        return export.to_inference_data(vae, split, self, max_draws=max_draws, proposal=proposal)

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values (NaN as None), without tensors and programs."""
        left_out = ("per_image", "origin")
        summary = {name: value for name, value in self._asdict().items() if name not in left_out}
        summary["curve"] = [[_plain(value) for value in point] for point in self.curve]
        summary["information"] = None if self.information is None else self.information.to_dict()
        if self.precision_shift is not None:
            shift = self.precision_shift._asdict()
            summary["precision_shift"] = {name: _plain(value) for name, value in shift.items()}
        return {name: _plain(value) for name, value in summary.items()}

    def __str__(self) -> str:
        k = "not estimated"
        if self.pareto_k_median is not None and self.pareto_k_above_0_7 is not None:
            k = f"median {self.pareto_k_median:.2f}, above 0.7 for {self.pareto_k_above_0_7:.1%}"
        bits = "-" if self.bits_per_dim is None else f"{self.bits_per_dim:.4f}"
        units = "-" if self.active_units is None else self.active_units
        rows = [
            ("log p(x)", f"{_with_se(self.log_likelihood, self.log_likelihood_se)} nats per image"),
            ("", f"± {self.log_likelihood_mc_error:.4f} and {self.bias:.4f} (bias) from the draws"),
            ("smoothed", f"{self.psis_log_likelihood:.3f} with Pareto-smoothed weights"),
            ("bound at K", ", ".join(f"{k}: {value:.3f}" for k, value, _ in self.curve)),
            ("ELBO", _with_se(self.elbo, self.elbo_se)),
            ("rate", _with_se(self.rate, self.rate_se)),
            *self._parts_of_the_rate(),
            ("distortion", _with_se(self.distortion, self.distortion_se)),
            ("bits per dim", bits),
            ("active units", f"{units} of {self.per_image.posterior_mean.shape[1]}"),
            ("Pareto k", k),
            ("", self.trust),
            ("ESS", f"median {self.ess_median:.1f} of {self.num_particles}"),
            ("images", f"{self.num_images:,} of the {self.split} split"),
            ("particles", f"K = {self.num_particles}, seed {self.seed}; {self.proposal}"),
            *self._rounding(),
            ("protocol", f"{self.protocol}; a {self.kind}"),
            ("time", f"{self.seconds:.1f} s on {self.device}"),
        ]
        if self.num_particles == 1:  # one draw knows neither its error nor a curve
            rows = [row for i, row in enumerate(rows) if i not in (1, 2, 3)]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)

    def _rounding(self) -> list[tuple[str, str]]:
        shift = self.precision_shift
        if shift is None:
            return []
        moved = _with_se(shift.mean, shift.se, "+.4f", ".4f")
        of = f"first {shift.num_images} images, K = {shift.num_particles}"
        return [
            ("precision", f"{self.precision} in the networks' products: a model that rounds,"),
            ("", f"{moved} nats from float32 ({of})"),
        ]

    def _parts_of_the_rate(self) -> list[tuple[str, str]]:
        parts = self.information
        if parts is None:
            return []
        rows = []
        if parts.mutual_information is not None and parts.aggregate_kl is not None:
            rows.append(
                (
                    "",
                    f"= I(x; z) {parts.mutual_information:.2f} + KL(q(z) || p(z)) "
                    f"{parts.aggregate_kl:.2f} on {parts.num_images:,} images, where I is at most "
                    f"{parts.limit:.2f}",
                )
            )
        if parts.dimensions.mean is not None:
            largest = parts.dimensions.mean.sort(descending=True).values[:8].tolist()
            more = ", ..." if len(parts.dimensions.mean) > 8 else ""
            rows.append(("", f"= {' + '.join(f'{v:.2f}' for v in largest)}{more} by dimension"))
        return rows


def _with_se(value: float, se: float, form: str = ".3f", form_se: str = ".3f") -> str:
    return format(value, form) + ("" if se != se else f" ± {se:{form_se}}")


def _plain(value: Any) -> Any:
    return None if value != value else value


def evaluate(
    vae: importance.Programs,
    split: Split,
    num_particles: int = 1000,
    *,
    seed: int = 0,
    proposal: Proposal = GUIDE,
    information_images: int = 500,
    device: str | torch.device | None = None,
    memory: int | None = None,
    engine: str | importance.Kernel = "auto",
    precision: str = "fp32",
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Estimate log p(x) for every image of a split by importance sampling with the guide.

    ``log p(x) ~ log (1/K) sum_k p(x, z_k) / q(z_k | x)``, z_k ~ q(z | x), q being the guide or
    the proposal made of it. On one kind of device the answer is a function of (weights, data, K,
    seed, proposal, precision): how images and particles are cut into chunks moves it by rounding
    alone. No handler around the programs, such as a KL weight, can enter, nor an autocast.

    Args:
        vae: a `pyrovae.VAE`, or any other `importance.Programs`.
        split: such as ``data.test``; sampled once, so that two models see the same x.
        num_particles: K >= 1.
        seed: of the draws of z.
        proposal: what z is drawn from: `proposals.Proposal("guide" | "wide" | "defensive")`.
        information_images: split the rate of that many images, the first, into its parts; 0: none.
        device: where to compute; default: where the VAE is.
        memory: bytes that one chunk may take; default: 64 MiB on a CPU, a quarter of the free
            memory on a GPU.
        engine: "eager" runs the Pyro programs for every chunk, "compiled" what was traced of them
            once (`compiled_terms.CompiledTerms`, which may be given itself); "auto" compiles where
            that is repaid.
        precision: "fp32", "tf32" or "bf16", of the networks' matrix products. With the lower ones
            the answer is of another model, whose layers round: as normalised, and near the first;
            ``precision_shift`` says how near, by the first 100 images and at most 1000 draws.
        progress: called with the number of images done.

    Raises:
        InputError: for K < 1, data outside the likelihood's support, a proposal that cannot be
            made of the guide, an unknown precision or engine, an engine made for another precision,
            or a precision that would change nothing here.

    Source: Burda et al., Importance Weighted Autoencoders (2016),
    https://arxiv.org/abs/1509.00519
    """
    started = time.perf_counter()
    importance.check_has_density(vae)
    if num_particles < 1:
        raise InputError(f"num_particles must be at least 1, got {num_particles}")
    if device is not None:
        vae.to(device)
    model, guide, likelihood = vae.model, vae.guide, vae.likelihood
    here = next((p.device for p in vae.parameters()), torch.device("cpu"))
    check_rounds(vae, precision, here)
    made_for = precision if isinstance(engine, str) else getattr(engine, "precision", "fp32")
    if made_for != precision:
        raise InputError(
            f"expected an engine made for precision {precision!r}; got one for {made_for!r}; make "
            "it anew"
        )
    x = split.tensor()
    likelihood.check(x)

    with _computing(vae, precision, here):
        chosen = importance.plan(model, guide, x[:1].to(here), num_particles, memory, proposal)
        chosen = min(processes.gather(chosen))  # one cut for all: free memory may differ
        whole = (len(x) // chosen.images) * (num_particles // chosen.particles)
        first = x[: chosen.images].to(here)
        kernel = (
            compiled_terms.terms_kernel(
                engine, vae, first, chosen.particles, whole, proposal, precision
            )
            if isinstance(engine, str)
            else engine
        )
        batches: dict[int, PerImage] = {}
        for start in processes.share(list(range(0, len(x), chosen.images))):
            part = x[start : start + chosen.images].to(here)
            batches[start] = estimate(
                model,
                guide,
                part,
                num_particles,
                chunk=chosen.particles,
                seed=seed,
                first_image=start,
                proposal=proposal,
                kernel=kernel,
            )
            if progress is not None:
                progress(min(start + chosen.images, len(x)))
        # Noise belongs to an image and a particle, so it is all one who computes which batch.
        for others in processes.gather(batches):
            batches |= others
        first = x[:information_images].to(here)
        parts = information(model, guide, first, seed=seed) if len(first) else None
    shift = None
    if precision != "fp32":
        shift = _shift(vae, x, num_particles, chosen, seed, proposal, precision)
    in_order = [batches[start] for start in sorted(batches)]
    return _summarise(
        PerImage(*(torch.cat(column) for column in zip(*in_order, strict=True))),
        split,
        parts=parts,
        origin=Origin(vae, split, proposal),
        kind=str(likelihood.kind),
        num_particles=num_particles,
        seed=seed,
        precision=precision,
        shift=shift,
        device=str(here),
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _computing(vae: importance.Programs, precision: str, device: torch.device) -> Iterator[None]:
    """In this precision, whatever a caller has asked torch for."""
    with torch.autocast(device.type, enabled=False), networks_in(vae, precision):
        yield


def _shift(
    vae: importance.Programs,
    x: Tensor,
    num_particles: int,
    chosen: importance.Plan,
    seed: int,
    proposal: Proposal,
    precision: str,
) -> Shift:
    """How far log p(x) of the first images lies from that in float32, on the same noise."""
    here = next((p.device for p in vae.parameters()), x.device)
    x = x[:_COMPARED_IMAGES]
    few = min(num_particles, _COMPARED_PARTICLES)
    step = min(IMAGE_BLOCK, chosen.images)

    def scored(start: int, of: str) -> Tensor:
        with _computing(vae, of, here):
            return estimate(
                vae.model,
                vae.guide,
                x[start : start + step].to(here),
                few,
                chunk=chosen.particles,
                seed=seed,
                first_image=start,
                proposal=proposal,
            ).log_likelihood

    parts = {
        start: scored(start, precision) - scored(start, "fp32")
        for start in processes.share(list(range(0, len(x), step)))
    }
    for others in processes.gather(parts):
        parts |= others
    moved = torch.cat([parts[start] for start in sorted(parts)])
    return Shift(len(moved), few, float(moved.mean()), _standard_error(moved))


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
    parts: Information | None,
    origin: Origin,
    kind: str,
    num_particles: int,
    seed: int,
    precision: str,
    shift: Shift | None,
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
        proposal=str(origin.proposal),
        log_likelihood=log_likelihood,
        log_likelihood_se=_standard_error(images.log_likelihood),
        log_likelihood_mc_error=float(images.mc_error.norm() / n),
        bias=float(images.bias.mean()),
        psis_log_likelihood=float(images.psis_log_likelihood.mean()),
        curve=[
            Bound(size, float(column.mean()), _standard_error(column))
            for size, column in zip(curve_sizes(num_particles), images.bounds.T, strict=True)
        ],
        elbo=float(images.elbo.mean()),
        elbo_se=_standard_error(images.elbo),
        rate=float(images.rate.mean()),
        rate_se=_standard_error(images.rate),
        distortion=float(images.distortion.mean()),
        distortion_se=_standard_error(images.distortion),
        information=parts,
        bits_per_dim=bits_per_dim(log_likelihood, kind, levels, math.prod(split.x_shape)),
        active_units=_count_active(images),
        pareto_k_median=float(known.median()) if len(known) else None,
        pareto_k_above_0_7=float((known > TRUSTED_K).double().mean()) if len(known) else None,
        ess_median=float(images.ess.median()),
        trust=_trust(images, num_particles),
        precision=precision,
        precision_shift=shift,
        device=device,
        seconds=round(seconds, 3),
        per_image=images,
        origin=origin,
    )


def _trust(images: PerImage, num_particles: int) -> str:
    """A sentence on the share of images whose weights have a light enough tail."""
    pareto_k = images.pareto_k
    known = pareto_k[~torch.isnan(pareto_k)]
    lost = int((~images.log_likelihood.isfinite()).sum())
    if lost > 0:
        return (
            f"log p(x) is no finite number for {lost:,} of {len(pareto_k):,} images: the model "
            "gives them no density, or a number overflowed; per_image.log_likelihood says which"
        )
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
        "--posterior (full-rank, flow), a larger --num-particles or --proposal defensive may help, "
        "and pyrovae anneal tells how much is missed"
    )


def _count_active(images: PerImage) -> int | None:
    if torch.isnan(images.posterior_mean_error).any():
        return None
    return int(active_units(images.posterior_mean, images.posterior_mean_error).sum())


def _standard_error(values: Tensor) -> float:
    n = len(values)
    return float(values.std() / math.sqrt(n)) if n > 1 else math.nan
