"""log p(x) by numerical integration over the latent space: the truth, for one or two latents.

The latent space is mapped to the square (-1, 1)^D and cut into cells, finer where an image has its
mass; a Gauss-Legendre rule sums each cell, and splitting a cell tells how far off it was.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyrovae import importance
from pyrovae.data import Split
from pyrovae.errors import InputError
from pyrovae.evaluation import bits_per_dim
from pyrovae.importance import Program
from pyrovae.streams import own_streams

# Points of the rule along each side of a cell, and cells along each side of the first grid.
_POINTS = 5
_CELLS = {1: 64, 2: 12}
# A twelfth halved this often is lost in float64.
_LEVELS = 40
# Draws that tell where the prior lies, and where the posterior of each image.
_PRIOR_DRAWS = 256
_GUIDE_DRAWS = 64
_IMAGES = 256


class Quadrature(NamedTuple):
    """Integrals of one batch, (B,) float64 on the CPU, in nats."""

    log_likelihood: Tensor
    error: Tensor
    """Estimate of the absolute error, on the safe side where the decoder is smooth."""
    evaluations: Tensor
    """Values of z at which p(x, z) was computed."""


@importance.float32_products()
def quadrature(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    tolerance: float = 1e-4,
    max_evaluations: int = 200_000,
    memory: int | None = None,
) -> Quadrature:
    """log p(x) = log of the integral of p(x, z) over z, for one or two latent dimensions.

    The whole space is covered: z = c + s t / (1 - t^2) maps (-1, 1) to the real line, with c and s
    the prior's mean and standard deviation. One grid of cells, whose decoder outputs all images
    share, is then split image by image: around the guide's draws until cells are as small as
    their spread, and elsewhere until halving cells changes p(x) by no more than the tolerance.
    The error is the sum of those last changes.

    What lies between the points of the first grid, narrow and far from the guide's draws, can
    stay unseen, as in any numerical integration.

    Args:
        model: Pyro program with the observed sites, in a plate over images at dim -1.
        guide: Pyro program with the latent sites, in the same plate; it only says where to look.
        x: (B, *x_shape).
        tolerance: of log p(x), in nats. A float32 model is rounded to about 1e-5.
        max_evaluations: values of z per image, after which the error stays as it is.
        memory: bytes that one pass may take; default as for `importance.plan`.

    Raises:
        InputError: for more than two latent dimensions, or a latent that is not a real number.

    Source: Davis and Rabinowitz, Methods of Numerical Integration (1984)

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
    >>> quadrature(model, guide, torch.zeros(1)).log_likelihood.exp() * math.sqrt(4 * math.pi)
    tensor([1.0000], dtype=torch.float64)
    """
    importance.check_has_density(model)
    if not 0 < tolerance < math.inf:
        raise InputError(f"--tolerance expects a number above 0; got {tolerance}; try 1e-4")
    with torch.no_grad(), importance.isolated_params():
        space = _space(model, x)
        rows = _rows(model, guide, x, memory)
        center, spread = _posterior(model, guide, x, space, rows)
        score = _scorer(model, x, space, rows)
        cells = _first_grid(score, space, len(x))
        evaluations = torch.full((len(x),), _CELLS[space.dims] ** space.dims * _points(space.dims))
        for _ in range(_LEVELS):
            split = cells.inexact(tolerance, len(x)) | cells.coarse(center, spread, space)
            split &= (evaluations < max_evaluations)[cells.image]
            if not split.any():
                break
            halves = _halves(cells.where(split), score)
            evaluations += torch.bincount(halves.image, minlength=len(x)) * _points(space.dims)
            cells = _Cells(*map(torch.cat, zip(cells.where(~split), halves, strict=True)))
    total = _sum_by(cells.image, cells.log_mass, len(x))
    error = torch.exp(_sum_by(cells.image, cells.log_error, len(x)) - total)
    return Quadrature(total, error, evaluations)


class _Space(NamedTuple):
    """The latent space, packed into vectors z (..., D), and its map from the square."""

    sites: dict[str, torch.Size]
    """Site name -> event shape."""
    center: Tensor
    scale: Tensor

    @property
    def dims(self) -> int:
        """D."""
        return len(self.center)

    def z(self, t: Tensor) -> Tensor:
        """Map t (..., D) in the open square to z (..., D)."""
        return self.center + self.scale * t / ((1 - t) * (1 + t))

    def log_jacobian(self, t: Tensor) -> Tensor:
        """log |dz / dt|, (...)."""
        return torch.log(self.scale * (1 + t**2) / ((1 - t) * (1 + t)) ** 2).sum(-1)

    def t(self, z: Tensor) -> Tensor:
        """The inverse of z(t)."""
        u = (z - self.center) / self.scale
        return 2 * u / (1 + torch.sqrt(1 + 4 * u**2))

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """Values (..., *event) of the sites to z (..., D), float64 on the CPU."""
        parts = []
        for name, event in self.sites.items():
            value = values[name].double().cpu()
            parts.append(value.reshape(*value.shape[: value.dim() - len(event)], -1))
        return torch.cat(parts, -1)

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """z (..., D) to the values of the sites."""
        sizes = [event.numel() for event in self.sites.values()]
        parts = zip(self.sites.items(), z.split(sizes, -1), strict=True)
        return {name: part.reshape(*z.shape[:-1], *event) for (name, event), part in parts}


def _space(model: Program, x: Tensor) -> _Space:
    with own_streams(0):
        program = importance.with_particles(model, _PRIOR_DRAWS)
        trace = poutine.trace(program).get_trace(x[:1])
    latents = {n: site for n, site in trace.nodes.items() if importance.is_latent(site)}
    for name, site in latents.items():
        support = site["fn"].support
        while hasattr(support, "base_constraint"):  # of a vector, of a mixture
            support = support.base_constraint
        if support is not constraints.real:
            raise InputError(
                f"quadrature expects latents on the real line; site {name!r} lies on {support}; "
                "use --method importance"
            )
    sites = {name: site["fn"].event_shape for name, site in latents.items()}
    dims = sum(event.numel() for event in sites.values())
    if dims not in _CELLS:
        raise InputError(
            f"quadrature expects 1 or 2 latent dimensions; got {dims}; use --method importance, "
            "or train with --latent-dim 2"
        )
    unit = _Space(sites, torch.zeros(dims), torch.ones(dims))
    draws = unit.pack({name: site["value"] for name, site in latents.items()}).reshape(-1, dims)
    return unit._replace(center=draws.mean(0), scale=draws.std(0))


def _rows(model: Program, guide: Program, x: Tensor, memory: int | None) -> int:
    chosen = importance.plan(model, guide, x[:1], 10**6, memory)
    return chosen.images * chosen.particles


def _posterior(
    model: Program, guide: Program, x: Tensor, space: _Space, rows: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the guide, each (B, D)."""
    chunk = max(1, min(_GUIDE_DRAWS, rows // len(x)))
    terms = importance.chunks(model, guide, x, _GUIDE_DRAWS, chunk=chunk, seed=0)
    z = torch.cat([space.pack(t.latents) for t in terms])
    return z.mean(0), z.std(0)


class _Cells(NamedTuple):
    """Squares of the latent square, each of one image: all (R,), center (R, D)."""

    image: Tensor
    center: Tensor
    half: Tensor
    """Half a side."""
    log_mass: Tensor
    """log of the integral of p(x, z) over the cell."""
    log_error: Tensor

    def where(self, keep: Tensor) -> "_Cells":
        """The cells that a mask (R,) keeps."""
        return _Cells(*(column[keep] for column in self))

    def inexact(self, tolerance: float, num_images: int) -> Tensor:
        """Which cells err by more than their share of what the image may err."""
        share = torch.bincount(self.image, minlength=num_images).log()
        allowed = _sum_by(self.image, self.log_mass, num_images) + math.log(tolerance) - share
        return self.log_error > allowed[self.image]

    def coarse(self, mean: Tensor, spread: Tensor, space: _Space) -> Tensor:
        """Which cells hold the guide's mean and are wider than four of its standard deviations."""
        half = self.half.unsqueeze(-1)
        inside = ((space.t(mean)[self.image] - self.center).abs() <= half).all(-1)
        width = space.z(self.center + half * _INNER) - space.z(self.center - half * _INNER)
        return inside & (width > 4 * spread[self.image]).any(-1)


# Cells at the rim of the square reach to infinity; just inside the rim they have a width.
_INNER = 0.999

Score = Callable[[Tensor, Tensor], Tensor]


def _scorer(model: Program, x: Tensor, space: _Space, rows: int) -> Score:
    """A function from images (R,) and t (G, R, D) to log p(x, z) |dz / dt|, (G, R).

    t may be (G, 1, D): all images then share z, which is decoded once.
    """

    def log_joint(images: Tensor, t: Tensor) -> Tensor:
        values = space.unpack(space.z(t).to(x))
        program = poutine.condition(importance.with_particles(model, len(t)), data=values)
        with pyro.validation_enabled(False):
            sites = poutine.trace(program).get_trace(x[images.to(x.device)]).nodes.values()
            shape = (len(t), len(images))
            total = sum(
                importance.site_log_prob(site, shape)
                for site in sites
                if site["type"] == "sample" and not importance.is_bookkeeping(site)
            )
        return torch.as_tensor(total).double().cpu() + space.log_jacobian(t)

    def score(images: Tensor, t: Tensor) -> Tensor:
        if t.shape[1] == 1:
            step = max(1, rows // len(images))
            return torch.cat([log_joint(images, part) for part in t.split(step)])
        step = max(1, rows // len(t))
        parts = zip(images.split(step), t.split(step, 1), strict=True)
        return torch.cat([log_joint(*part) for part in parts], 1)

    return score


def _points(dims: int) -> int:
    return int(_POINTS**dims)


def _rule(dims: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre points (P, D) of the cell (-1, 1)^D, and their log-weights (P,)."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(_POINTS))
    points = torch.cartesian_prod(*[nodes] * dims).reshape(-1, dims)
    products = torch.cartesian_prod(*[weights.log()] * dims).reshape(-1, dims)
    return points, products.sum(-1)


def _first_grid(score: Score, space: _Space, num_images: int) -> _Cells:
    side = _CELLS[space.dims]
    centers = (2 * torch.arange(side, dtype=torch.float64) + 1) / side - 1
    center = torch.cartesian_prod(*[centers] * space.dims).reshape(-1, space.dims)
    points, log_weights = _rule(space.dims)
    t = (center.unsqueeze(1) + points / side).reshape(-1, 1, space.dims)
    values = score(torch.arange(num_images), t).unflatten(0, (len(center), -1))
    log_mass = torch.logsumexp(values + log_weights.unsqueeze(-1), 1) - space.dims * math.log(side)
    image = torch.arange(num_images).expand(len(center), -1).reshape(-1)
    return _Cells(
        image,
        center.repeat_interleave(num_images, 0),
        torch.full(image.shape, 1 / side, dtype=torch.float64),
        log_mass.reshape(-1),
        log_mass.reshape(-1),  # nothing is known of the error yet
    )


def _halves(cells: _Cells, score: Score) -> _Cells:
    """Each cell cut in half along every side; the change of its mass becomes their error."""
    dims = cells.center.shape[1]
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * dims)
    corners = corners.reshape(-1, dims)
    half = (cells.half / 2).repeat_interleave(len(corners))
    image = cells.image.repeat_interleave(len(corners))
    center = cells.center.unsqueeze(1) + cells.half[:, None, None] / 2 * corners
    center = center.reshape(-1, dims)
    points, log_weights = _rule(dims)
    values = score(image, center + half.unsqueeze(-1) * points.unsqueeze(1))
    log_mass = torch.logsumexp(values + log_weights.unsqueeze(-1), 0) + dims * half.log()
    change = torch.logsumexp(log_mass.unflatten(0, (-1, len(corners))), -1) - cells.log_mass
    # log |exp(a) - exp(b)| = max(a, b) + log(1 - exp(-|a - b|))
    error = cells.log_mass + change.clamp(min=0) + torch.log(-torch.expm1(-change.abs()))
    error = torch.where(error.isnan(), -math.inf, error) - math.log(len(corners))
    return _Cells(image, center, half, log_mass, error.repeat_interleave(len(corners)))


def _sum_by(image: Tensor, log_values: Tensor, num_images: int) -> Tensor:
    """log of the sum of exp(log_values) over the cells of each image, (num_images,)."""
    top = torch.full((num_images,), -math.inf, dtype=torch.float64)
    top = top.scatter_reduce(0, image, log_values, "amax")
    shift = torch.where(top.isfinite(), top, 0.0)
    total = torch.zeros_like(top).index_add(0, image, torch.exp(log_values - shift[image]))
    return total.log() + shift


class QuadratureEvaluation(NamedTuple):
    """log p(x) of a split by quadrature; ``print`` it for a summary. Nats per image."""

    data: str
    protocol: str
    split: str
    kind: str
    """"mass" or "density": only numbers of one kind compare without a correction."""
    num_images: int
    tolerance: float
    log_likelihood: float
    log_likelihood_se: float
    """Standard error of the mean over images; NaN for a single image."""
    error: float
    """Mean over images of the estimated error of the integration."""
    largest_error: float
    bits_per_dim: float | None
    evaluations: float
    """Values of z per image."""
    device: str
    seconds: float
    per_image: Quadrature

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values (NaN as None), without the per-image tensors."""
        summary = {name: value for name, value in self._asdict().items() if name != "per_image"}
        return {name: None if value != value else value for name, value in summary.items()}

    def __str__(self) -> str:
        bits = "-" if self.bits_per_dim is None else f"{self.bits_per_dim:.4f}"
        se = self.log_likelihood_se
        over_images = "" if se != se else f" ± {se:.3f} over images"
        rows = [
            ("log p(x)", f"{self.log_likelihood:.4f}{over_images}, by quadrature"),
            ("error", f"{self.error:.1e} on average, at most {self.largest_error:.1e}"),
            ("bits per dim", bits),
            ("evaluations", f"{self.evaluations:,.0f} values of z per image"),
            ("images", f"{self.num_images:,} of the {self.split} split"),
            ("protocol", f"{self.protocol}; a {self.kind}"),
            ("time", f"{self.seconds:.1f} s on {self.device}"),
        ]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


def evaluate(
    vae: importance.Programs,
    split: Split,
    *,
    tolerance: float = 1e-4,
    device: str | torch.device | None = None,
    memory: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> QuadratureEvaluation:
    """log p(x) of every image of a split by :func:`quadrature`, for one or two latents.

    Args:
        vae: a `pyrovae.VAE`, or any other `importance.Programs`.
        split: such as ``data.test``.
        tolerance: of each image's log p(x), in nats.
        device: where to compute; default: where the VAE is.
        memory: bytes that one pass may take; default as for `importance.plan`.
        progress: called with the number of images done.

    Raises:
        InputError: as `quadrature`, and for data outside the likelihood's support.
    """
    started = time.perf_counter()
    importance.check_has_density(vae)
    if device is not None:
        vae.to(device)
    here = next((p.device for p in vae.parameters()), torch.device("cpu"))
    x = split.tensor()
    vae.likelihood.check(x)
    batches = []
    for start in range(0, len(x), _IMAGES):
        part = x[start : start + _IMAGES].to(here)
        batches.append(quadrature(vae.model, vae.guide, part, tolerance=tolerance, memory=memory))
        if progress is not None:
            progress(min(start + _IMAGES, len(x)))
    images = Quadrature(*(torch.cat(column) for column in zip(*batches, strict=True)))
    n, kind, protocol = len(x), str(vae.likelihood.kind), split.protocol
    levels = protocol.levels if kind == "mass" or protocol.dequantize == "uniform" else None
    mean = float(images.log_likelihood.mean())
    return QuadratureEvaluation(
        data=protocol.data,
        protocol=str(protocol),
        split=split.name,
        kind=kind,
        num_images=n,
        tolerance=tolerance,
        log_likelihood=mean,
        log_likelihood_se=float(images.log_likelihood.std()) / n**0.5 if n > 1 else math.nan,
        error=float(images.error.mean()),
        largest_error=float(images.error.max()),
        bits_per_dim=bits_per_dim(mean, kind, levels, math.prod(split.x_shape)),
        evaluations=float(images.evaluations.double().mean()),
        device=str(here),
        seconds=round(time.perf_counter() - started, 3),
        per_image=images,
    )
