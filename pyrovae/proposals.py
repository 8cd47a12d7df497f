"""What importance sampling draws from: the guide, the guide inflated, or a mixture of the two.

A guide made of normal distributions is a function of standard-normal noise. Inflating that noise
inflates the guide, whatever flow or hierarchy lies on top, and its density stays exact.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.distributions import TransformedDistribution as Transformed

from pyrovae.errors import InputError
from pyrovae.streams import seed_of

# Noise belongs to an image and a particle, whatever chunk they are computed in. It is drawn in
# blocks of this many images by this many particles, each with a seed of its own: large enough
# that seeding costs nothing beside drawing, small enough that little is drawn in vain.
IMAGE_BLOCK = 16
PARTICLE_BLOCK = 64

KINDS = ("guide", "wide", "defensive")


@dataclass(frozen=True)
class Proposal:
    """The distribution that the draws of z come from; each gives unbiased estimates of p(x).

    "guide" is q(z | x). "wide" is q_s(z | x): q with its standard-normal noise, at every site,
    multiplied by s. "defensive" draws from q and q_s in turn and weighs every draw by the mixture
    of both: w = p(x, z) / (a q(z | x) + (1 - a) q_s(z | x)), a being the share of the draws that
    come from q, one half for an even K. Its weights are at most 1/a times those of q, and at most
    1/(1 - a) times those of q_s, so that it is never much worse than the better of the two.

    The cost of inflating grows with the number of latent dimensions D: for q equal to the
    posterior, the wide weights have an effective sample size of K (sqrt(2 s^2 - 1) / s^2)^D. That
    is 0.69 K for D = 2 and s = 1.5, but 0.0001 K for D = 50; there, s = 1.1 keeps 0.47 K.

    Args:
        kind: "guide", "wide" or "defensive".
        scale: s > 1, for the last two; default 1.5.

    Raises:
        InputError: for another kind or scale, or a scale where none is used.

    Source: Hesterberg, Weighted Average Importance Sampling and Defensive Mixture Distributions
    (1995), https://doi.org/10.1080/00401706.1995.10484303; Veach and Guibas, Optimally Combining
    Sampling Techniques for Monte Carlo Rendering (1995), https://doi.org/10.1145/218380.218498
    (the balance heuristic)

    >>> print(Proposal("defensive", scale=1.2))
    draws from the guide and from the guide inflated by 1.2, in turn
    """

    kind: str = "guide"
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            close = difflib.get_close_matches(str(self.kind), KINDS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(
                f"--proposal expects one of {', '.join(KINDS)}; got {self.kind!r}{hint}"
            )
        if self.kind == "guide":
            if self.scale is not None:
                raise InputError(
                    f"the proposal 'guide' is not inflated; got a scale of {self.scale}; leave "
                    "--proposal-scale out, or use --proposal wide or defensive"
                )
        elif self.scale is None:
            object.__setattr__(self, "scale", 1.5)
        elif not 1 < self.scale < float("inf"):
            raise InputError(
                f"--proposal-scale expects a number above 1; got {self.scale}; try 1.5 for a few "
                "latent dimensions, 1.1 for fifty"
            )

    def __str__(self) -> str:
        if self.kind == "guide":
            return "draws from the guide"
        if self.kind == "wide":
            return f"draws from the guide inflated by {self.scale:g}"
        return f"draws from the guide and from the guide inflated by {self.scale:g}, in turn"

    @property
    def _factor(self) -> float:
        return 1.0 if self.scale is None else float(self.scale)

    def inflate(self, noise: Tensor, particles: range) -> Tensor:
        """Multiply the noise (K, ...) of each particle by the scale it is drawn with."""
        if self.kind == "guide":
            return noise
        if self.kind == "wide":
            return noise * self._factor
        odd = torch.arange(particles.start, particles.stop, device=noise.device) % 2 == 1
        scales = torch.where(odd, self._factor, 1.0).to(noise.dtype)
        return noise * scales.view(-1, *[1] * (noise.dim() - 1))

    def log_density(
        self, log_prob: Callable[[Callable[[Any], Any]], Tensor], num_particles: int
    ) -> Tensor:
        """The proposal's log-density of draws z.

        Args:
            log_prob: gives log-densities of the draws when every site's distribution is first
                put through a function: through the identity, those of the guide.
            num_particles: K, all draws: they set the share of each part of the mixture.
        """
        if self.kind == "guide":
            return log_prob(lambda q: q)
        wide = log_prob(lambda q: inflated(q, self._factor))
        if self.kind == "wide":
            return wide
        narrow = log_prob(lambda q: q)
        count = torch.tensor([-(-num_particles // 2), num_particles // 2], dtype=wide.dtype)
        share = torch.log(count / num_particles).to(wide.device)
        return torch.logaddexp(share[0] + narrow, share[1] + wide)


class Noise(NamedTuple):
    """Normal noise that belongs to (seed, site, image, particle), not to a chunk."""

    seed: int
    images: range
    """Positions of the batch's images in their data set."""
    particles: range
    proposal: Proposal = Proposal()
    """Decides whose noise is inflated."""

    def draw(self, site: str, event_shape: torch.Size, like: Tensor) -> Tensor:
        """Noise of shape (len(particles), len(images), *event_shape), of ``like``'s kind."""
        blocks = _blocks(self.particles, PARTICLE_BLOCK)
        columns = _blocks(self.images, IMAGE_BLOCK)
        shape = (len(columns), len(blocks), PARTICLE_BLOCK, IMAGE_BLOCK, *event_shape)
        drawn = torch.empty(shape, dtype=like.dtype, device=like.device)
        generator = torch.Generator(like.device)
        for column, i in zip(drawn, columns, strict=True):
            for block, p in zip(column, blocks, strict=True):
                generator.manual_seed(seed_of(f"{self.seed}/{site}/{p}/{i}"))
                block.normal_(generator=generator)
        whole = drawn.flatten(1, 2).movedim(0, 1).flatten(1, 2)
        noise = whole[_within(self.particles, PARTICLE_BLOCK), _within(self.images, IMAGE_BLOCK)]
        return self.proposal.inflate(noise.contiguous(), self.particles)

    def stream_seed(self) -> int:
        """A seed for what this noise cannot make: draws that are no function of normals."""
        return seed_of(f"{self.seed}/{self.particles.start}/{self.images.start}")


def _blocks(indices: range, size: int) -> range:
    return range(indices.start // size, -(-indices.stop // size))


def _within(indices: range, size: int) -> slice:
    """Where the indices stand among those of their blocks."""
    start = indices.start % size
    return slice(start, start + len(indices))


def from_noise(q: Distribution, noise: Callable[[torch.Size], Tensor]) -> Tensor | None:
    """z = g(noise) with z ~ q for noise ~ N(0, 1), or None if q is not made of normals.

    ``noise(event_shape)`` returns (..., *event_shape), broadcastable to q's batch shape.
    """
    return _from_noise(q, noise, torch.Size())


def _from_noise(
    q: Distribution, noise: Callable[[torch.Size], Tensor], outer: torch.Size
) -> Tensor | None:
    # ``outer``: dimensions of q's batch that are an event to those around it.
    if isinstance(q, Transformed):
        base = q.base_dist
        missing = len(q.event_shape) - len(base.event_shape)
        z = _from_noise(Independent(base, missing) if missing > 0 else base, noise, outer)
        for transform in q.transforms if z is not None else ():
            z = transform(z)
        return z
    if isinstance(q, Independent):
        size = len(q.base_dist.batch_shape) - q.reinterpreted_batch_ndims
        return _from_noise(q.base_dist, noise, outer + q.base_dist.batch_shape[size:])
    if isinstance(q, Normal):
        return q.loc + q.scale * noise(outer)
    if isinstance(q, MultivariateNormal):
        eps = noise(outer + q.event_shape).unsqueeze(-1)
        return q.loc + (q._unbroadcasted_scale_tril @ eps).squeeze(-1)
    return None


def inflated(q: Distribution, scale: float) -> Distribution:
    """The distribution of ``from_noise(q, scale * noise)``, for q made of normals."""
    # Nothing is validated anew: the parameters are those of q, which was.
    if isinstance(q, Transformed):
        # The same transform objects: each remembers how it made z, which spares its inverse.
        return Transformed(inflated(q.base_dist, scale), q.transforms, validate_args=False)
    if isinstance(q, Independent):
        inner = inflated(q.base_dist, scale)
        return Independent(inner, q.reinterpreted_batch_ndims, validate_args=False)
    if isinstance(q, Normal):
        return Normal(q.loc, scale * q.scale, validate_args=False)
    if isinstance(q, MultivariateNormal):
        tril = scale * q._unbroadcasted_scale_tril
        return MultivariateNormal(q.loc, scale_tril=tril, validate_args=False)
    raise TypeError(f"{type(q).__name__} is not made of normals")


class FromNoise(Messenger):
    """Gives every sample site of a guide its value from explicit noise."""

    def __init__(self, noise: Noise, like: Tensor):
        super().__init__()
        self.noise = noise
        self.like = like

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or msg["done"] or poutine.util.site_is_subsample(msg):
            return
        name = msg["name"]
        value = from_noise(msg["fn"], lambda event: self.noise.draw(name, event, self.like))
        if value is None:
            raise NoNormalBaseError(name, msg["fn"])
        msg["value"] = value
        msg["done"] = True


class NoNormalBaseError(Exception):
    """A site's distribution is no function of standard-normal noise."""

    def __init__(self, site: str, q: Any):
        while isinstance(q, Independent):
            q = q.base_dist
        super().__init__(f"site {site!r} is a {type(q).__name__}")
