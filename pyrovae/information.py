"""Where the rate goes: KL per latent dimension, and what z tells of x against what it wastes."""

import math
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyrovae import importance
from pyrovae.errors import InputError
from pyrovae.importance import Program

# Pairs of a draw and a posterior that are scored at once.
_PAIRS = 2**15
# Draws per image where a KL has no closed form.
_DRAWS = 64


class DimensionKL(NamedTuple):
    """KL(q(z_d | x) || p(z_d)) of every latent dimension, (D,) float64, in nats per image."""

    mean: Tensor | None
    """Over images; None where q or p does not factorise over the dimensions."""
    se: Tensor | None
    method: str
    """"closed form", "64 draws per image", or the reason why there is no answer."""


class Information(NamedTuple):
    """The rate of N images and its parts, in nats per image; a ``_se`` is over the images.

    rate = I(x; z) + KL(q(z) || p(z)), q(z) = (1/N) sum_n q(z | x_n) being the aggregate posterior.
    The first part is what a draw of z tells of which image it came from, the second is paid for
    q(z) not being the prior.

    Both parts belong to these N images. For the distribution the images come from, I is a lower
    bound and the KL an upper one, because q(z) contains each draw's own posterior: I cannot pass
    log N. An I near log N says that z tells these images apart, and no more; the true value then
    lies anywhere between it and the rate.
    """

    num_images: int
    rate: float
    rate_se: float
    mutual_information: float | None
    """I(x; z); None where the guide cannot score a z that it did not draw."""
    mutual_information_se: float | None
    aggregate_kl: float | None
    """KL(q(z) || p(z))."""
    aggregate_kl_se: float | None
    limit: float
    """log N, the largest value that mutual_information can take."""
    dimensions: DimensionKL

    @property
    def bias(self) -> str:
        """The known bias, in a sentence."""
        return (
            f"I(x; z) is a lower bound, at most log N = {self.limit:.2f}, and KL(q(z) || p(z)) an "
            f"upper bound: q(z) is the mean over these {self.num_images:,} images alone"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (NaN as None)."""
        values = {k: v for k, v in self._asdict().items() if k != "dimensions"}
        values = {k: None if v != v else v for k, v in values.items()}
        mean, se, method = self.dimensions
        dimensions = {
            "kl_per_dimension": None if mean is None else mean.tolist(),
            "kl_per_dimension_se": None if se is None else _plain(se),
            "kl_per_dimension_method": method,
        }
        return values | dimensions | {"bias": self.bias}


def information(model: Program, guide: Program, x: Tensor, *, seed: int = 0) -> Information:
    """Split the rate of N images into I(x; z) + KL(q(z) || p(z)), and over latent dimensions.

    One z is drawn for each image; log q(z) = log (1/N) sum_m q(z | x_m) is exact, at the cost of
    N^2 densities. The two parts of each draw add up to its log q(z | x) - log p(z).

    Args:
        model: Pyro program with the observed sites, in a plate over images at dim -1.
        guide: Pyro program with the latent sites, in the same plate.
        x: (N, *x_shape), N >= 1.
        seed: of the draws.

    Source: Hoffman and Johnson, ELBO Surgery (2016),
    http://approximateinference.org/accepted/HoffmanJohnson2016.pdf

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> float(information(model, guide, torch.randn(100)).limit)
    4.605170185988092
    """
    if len(x) < 1:
        raise InputError("expected at least 1 image to split the rate of; got none; give more x")
    batch = importance.plan(model, guide, x[:1], 1).images
    parts = [
        next(
            importance.chunks(model, guide, x[i : i + batch], 1, chunk=1, seed=seed, first_image=i)
        )
        for i in range(0, len(x), batch)
    ]
    log_q = torch.cat([p.log_posterior[0] for p in parts]).double().cpu()
    log_p = torch.cat([p.log_prior[0] for p in parts]).double().cpu()
    latents = {n: torch.cat([p.latents[n][0] for p in parts]) for n in parts[0].latents}
    aggregate = log_aggregate(guide, x, latents)
    own, shared = (None, None) if aggregate is None else (log_q - aggregate, aggregate - log_p)
    rate, rate_se = _mean_se(log_q - log_p)
    mutual, mutual_se = _mean_se(own)
    kl, kl_se = _mean_se(shared)
    return Information(
        num_images=len(x),
        rate=float(rate or 0.0),
        rate_se=math.nan if rate_se is None else rate_se,
        mutual_information=mutual,
        mutual_information_se=mutual_se,
        aggregate_kl=kl,
        aggregate_kl_se=kl_se,
        limit=math.log(len(x)),
        dimensions=kl_per_dimension(model, guide, x, seed=seed),
    )


def log_aggregate(guide: Program, x: Tensor, latents: dict[str, Tensor]) -> Tensor | None:
    """log (1/N) sum_n q(z_m | x_n) of M draws, (M,); None if the guide cannot score them.

    Args:
        guide: Pyro program with the latent sites, in a plate over images at dim -1.
        x: (N, *x_shape).
        latents: site name -> draws (M, *event).
    """
    step = max(1, _PAIRS // len(x))
    total = len(next(iter(latents.values())))
    rows = []
    with torch.no_grad(), importance.isolated_params():
        for start in range(0, total, step):
            z = {name: v[start : start + step].unsqueeze(1) for name, v in latents.items()}
            program = poutine.condition(_at_rows(guide, min(step, total - start)), data=z)
            try:
                trace = poutine.trace(program).get_trace(x)
                scores = [trace.nodes[name]["fn"].log_prob(v) for name, v in z.items()]
            except (NotImplementedError, KeyError):
                return None  # a flow without an inverse
            pairs = torch.stack(torch.broadcast_tensors(*scores)).sum(0).double()
            rows.append(torch.logsumexp(pairs, -1) - math.log(len(x)))
    return torch.cat(rows).cpu()


def _at_rows(program: Program, rows: int) -> Program:
    def run(x: Tensor) -> Any:
        with pyro.plate("rows", rows, dim=-2):
            return program(x)

    return run


def kl_per_dimension(model: Program, guide: Program, x: Tensor, *, seed: int = 0) -> DimensionKL:
    """KL(q(z_d | x) || p(z_d)) for every latent dimension d, where q and p factorise.

    In closed form where torch knows one, as for normals; otherwise the mean of
    log q(z_d | x) - log p(z_d) over 64 draws per image. Summed over d it is the rate.

    Args:
        model: Pyro program with the observed sites, in a plate over images at dim -1.
        guide: Pyro program with one latent site, in the same plate.
        x: (N, *x_shape).
        seed: of the draws.
    """
    with torch.no_grad(), importance.isolated_params():
        trace = importance.trace_quietly(guide, x)
        sites = {n: s for n, s in trace.nodes.items() if importance.is_latent(s)}
        if len(sites) != 1:
            return DimensionKL(None, None, f"the guide has {len(sites)} latent sites, not one")
        ((name, site),) = sites.items()
        replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)
        factors = [_factors(d["fn"]) for d in (site, replayed.nodes[name])]
        for what, factor, d in zip(
            ("posterior", "prior"), factors, (site, replayed.nodes[name]), strict=True
        ):
            if factor is None:
                reason = f"the {what} ({_family(d['fn'])}) does not factorise over dimensions"
                return DimensionKL(None, None, reason)
        q, p = factors
        try:
            kl, method = kl_divergence(q, p), "closed form"
        except NotImplementedError:
            method = f"{_DRAWS} draws per image"
            drawn = importance.chunks(model, guide, x, _DRAWS, chunk=1, seed=seed)
            total = sum(
                q.log_prob(t.latents[name][0]) - p.log_prob(t.latents[name][0]) for t in drawn
            )
            kl = torch.as_tensor(total) / _DRAWS
    kl = kl.expand(len(x), *kl.shape[1:]).reshape(len(x), -1).double().cpu()
    if len(x) == 1:
        return DimensionKL(kl[0], torch.full_like(kl[0], math.nan), method)
    return DimensionKL(kl.mean(0), kl.std(0) / len(x) ** 0.5, method)


def _factors(d: Any) -> Any:
    """The distribution of single dimensions whose product d is, or None."""
    inner = d
    while isinstance(inner, Independent):
        inner = inner.base_dist
    return inner if len(inner.event_shape) == 0 and len(d.event_shape) <= 1 else None


def _family(d: Any) -> str:
    while isinstance(d, Independent):
        d = d.base_dist
    return type(d).__name__


def _mean_se(values: Tensor | None) -> tuple[float | None, float | None]:
    if values is None:
        return None, None
    n = len(values)
    return float(values.mean()), float(values.std()) / n**0.5 if n > 1 else math.nan


def _plain(values: Tensor) -> list[float | None]:
    return [None if v != v else v for v in values.tolist()]
