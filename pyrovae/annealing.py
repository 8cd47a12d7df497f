"""Annealed importance sampling: log p(x) from below, and on simulated images from above.

A chain walks from a start density f_0, p(z) or q(z | x), to f_1 = p(x, z) by way of
f_b = f_0^(1-b) f_1^b, and its log-weight sums the changes of log f on the way. The mean of exp(w)
over chains is an unbiased estimate of p(x), so its logarithm is a lower bound on average. A chain
that starts from an exact posterior draw and walks back gives an unbiased estimate of 1 / p(x), so
an upper bound; on images simulated from the model there is such a draw.

Everything takes Pyro programs ``model(x)`` and ``guide(x)`` with continuous latents in a plate
over images at dim -1.

Sources: Neal, Annealed Importance Sampling (2001), https://arxiv.org/abs/physics/9803008; Grosse,
Ghahramani and Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (2015),
https://arxiv.org/abs/1511.02543; Wu et al., On the Quantitative Analysis of Decoder-Based
Generative Models (2017), https://arxiv.org/abs/1611.04273
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae import hmc, importance
from pyrovae.data import Split
from pyrovae.errors import InputError
from pyrovae.hmc import Point, Simulated, simulate
from pyrovae.importance import Program, Programs
from pyrovae.proposals import Noise
from pyrovae.runs import duration, load_checkpoint, save_checkpoint

STARTS = ("prior", "guide")
STEP_SIZES = ("frozen", "adaptive")

# The preliminary run that finds the step sizes: a sixteenth of the cost of a run of 16 chains.
_PILOT_CHAINS = 4
_PILOT_WARMUP = 20
_PILOT_LEAST = 60
_WARMUP_GAIN, _PILOT_GAIN, _CHAIN_GAIN = 0.5, 0.3, 0.05
# On a CPU, as many chains as fit this are as fast as more, and progress is saved more often.
_CPU_MEMORY = 16 * 2**20


@dataclass(frozen=True)
class Settings:
    """How a run of chains is made; every field is an argument of :func:`anneal`."""

    num_chains: int = 16
    num_temperatures: int = 1000
    num_leapfrog: int = 10
    start: str = "prior"
    step_sizes: str = "frozen"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_temperatures", "num_leapfrog"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{name} ({flag}) must be at least 1, got {getattr(self, name)}")
        for name, known in (("start", STARTS), ("step_sizes", STEP_SIZES)):
            if getattr(self, name) not in known:
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"{name} ({flag}) must be {' or '.join(known)}, got {getattr(self, name)!r}"
                )

    @property
    def pilot_temperatures(self) -> int:
        """Temperatures of the preliminary run."""
        return max(_PILOT_LEAST, self.num_temperatures // 4)

    def gradients(self, num_images: int, passes: int = 1) -> int:
        """Gradient evaluations, of one image and chain each, in a run with so many passes."""
        if self.num_temperatures == 1:  # nothing moves
            return 0
        chains = passes * self.num_chains * (self.num_temperatures - 1)
        pilot = _PILOT_CHAINS * (_PILOT_WARMUP + self.pilot_temperatures)
        return num_images * self.num_leapfrog * (chains + pilot)


class Annealed(NamedTuple):
    """What the chains of each image say of its log p(x): float64 tensors on the CPU, in nats."""

    log_likelihood: Tensor
    """(B,) bound of log p(x): a lower bound on average, or an upper one for reverse chains."""
    error: Tensor
    """(B,) its Monte-Carlo standard error by the delta method, sd(v) / (mean(v) sqrt(C)) for
    v = exp(w), or exp(-w) for reverse chains; NaN for one chain. Reverse chains of an image start
    from one posterior draw: their error leaves out what another draw would have changed."""
    ess: Tensor
    """(B,) (sum v)^2 / sum v^2, between 1 and C."""
    accept_rate: Tensor
    """(B,) mean acceptance probability; 1 where there was no transition."""
    log_weights: Tensor
    """(C, B) w."""


class Sandwich(NamedTuple):
    """Bounds of log p(x) from both sides, for images simulated from the model."""

    lower: Annealed
    upper: Annealed

    @property
    def gap(self) -> Tensor:
        """(B,) upper - lower: on average more than either bound is off, never less."""
        return self.upper.log_likelihood - self.lower.log_likelihood


def schedule(num_temperatures: int, steepness: float = 4.0) -> Tensor:
    """b_0 = 0 < b_1 < ... < b_T = 1, (T + 1,) float64, dense at both ends.

    ``b_t = (s(d (2t/T - 1)) - s(-d)) / (s(d) - s(-d))`` with s the logistic function and d the
    steepness.

    Source: Wu et al. (2017), https://arxiv.org/abs/1611.04273

    >>> schedule(4)
    tensor([0.0000, 0.1050, 0.5000, 0.8950, 1.0000], dtype=torch.float64)
    """
    t = torch.linspace(-1, 1, num_temperatures + 1, dtype=torch.float64)
    s = torch.sigmoid(steepness * t)
    return (s - s[0]) / (s[-1] - s[0])


@importance.float32_products()
def anneal(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrog: int = 10,
    start: str = "prior",
    step_sizes: str = "frozen",
    seed: int = 0,
    first_image: int = 0,
    memory: int | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Annealed:
    """Annealed importance sampling of each image's log p(x): a lower bound on average.

    ``w = sum_t (b_t - b_(t-1)) d/db log f_b(z_(t-1))``, with one HMC transition that leaves
    f_(b_t) invariant after each term but the last, and ``log (1/C) sum_c exp(w_c)`` over chains.
    One temperature is importance sampling with the start density.

    The mean of exp(w) is unbiased if transitions do not look at where their chain has been. So
    step sizes are "frozen" by default: a preliminary run of other chains, with noise of its own,
    finds for each image and temperature the step accepted 65 % of the time. "adaptive" also lets
    each chain follow its own acceptance, as is customary (Wu et al., 2017); chains suit their
    steps better, and the bound holds only up to a bias that vanishes as temperatures grow.

    Noise belongs to (seed, image, chain): the answer does not depend on how images are batched.

    Args:
        model: Pyro program with the observed sites, in a plate over images at dim -1.
        guide: Pyro program with the latent sites, in the same plate.
        x: (B, *x_shape).
        num_chains: C >= 1, of each image.
        num_temperatures: T >= 1; slack falls about as 1 / T.
        num_leapfrog: gradient evaluations of each transition.
        start: "prior", or "guide" for q(z | x), which must cover the posterior. An inverse
            autoregressive flow is inverted exactly, which takes D passes.
        step_sizes: "frozen" or "adaptive".
        seed: of all noise.
        first_image: position of x[0] in its data set.
        memory: bytes that one evaluation may take.
        checkpoint: a file to which finished batches of images are saved, and from which a run of
            the same settings, data and model continues.
        progress: called with the gradient evaluations done, of :meth:`Settings.gradients`.

    Raises:
        InputError: for settings out of range, latents that are not continuous, a checkpoint of
            another run, or weights that are not numbers.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
    >>> anneal(model, guide, torch.zeros(2), num_temperatures=20).log_likelihood.shape
    torch.Size([2])
    """
    importance.check_has_density(model)
    settings = Settings(num_chains, num_temperatures, num_leapfrog, start, step_sizes, seed)
    columns = _run(model, guide, x, None, settings, first_image, memory, checkpoint, progress)
    return _annealed(columns, "forward")


@importance.float32_products()
def bdmc(
    model: Program,
    guide: Program,
    simulated: Simulated,
    *,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrog: int = 10,
    start: str = "prior",
    step_sizes: str = "frozen",
    seed: int = 0,
    memory: int | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Sandwich:
    """Bidirectional Monte Carlo: both bounds of log p(x), for images drawn from the model.

    The upper bound is ``-log (1/C) sum_c exp(-w_c)`` over chains that start at the latents that x
    was drawn with, an exact posterior draw, and walk from f_1 to f_0 over the same densities with
    the same steps. The mean gap bounds how far the mean lower bound lies below log p(x): on images
    of the model, and on data as far as the two are alike.

    Source: Grosse et al. (2015), https://arxiv.org/abs/1511.02543

    Args:
        simulated: x and its latents, as :func:`pyrovae.hmc.simulate` draws them.

    The other arguments, and errors, are those of :func:`anneal`.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
    >>> five = simulate(model, like=torch.zeros(1), num_images=5)
    >>> bdmc(model, guide, five, num_temperatures=20).gap.shape
    torch.Size([5])
    """
    settings = Settings(num_chains, num_temperatures, num_leapfrog, start, step_sizes, seed)
    x, latents = simulated
    columns = _run(model, guide, x, latents, settings, 0, memory, checkpoint, progress)
    return Sandwich(_annealed(columns, "forward"), _annealed(columns, "reverse"))


class Cost(NamedTuple):
    """What a run will take, measured on a few steps of its first batch."""

    gradients: int
    """Gradient evaluations, of one image and chain each: the total that ``progress`` counts to."""
    seconds: float

    def __str__(self) -> str:
        millions = self.gradients / 1e6
        return f"{millions:,.1f} million gradient evaluations, about {duration(self.seconds)}"


def cost(
    model: Program,
    guide: Program,
    x: Tensor,
    num_images: int,
    settings: Settings,
    *,
    passes: int = 1,
    memory: int | None = None,
) -> Cost:
    """Time a few gradient evaluations and multiply.

    Args:
        model: as in :func:`anneal`.
        guide: as in :func:`anneal`.
        x: (1 or more, *x_shape), images like those to come.
        num_images: how many those are.
        settings: of the run.
        passes: 1 for :func:`anneal`, 2 for :func:`bdmc`.
        memory: as in :func:`anneal`.
    """
    size = min(num_images, _batch_size(model, guide, x, settings, memory))
    batch = x[torch.arange(size, device=x.device) % len(x)]
    bridge = Bridge(model, guide, batch, settings.start)
    point = bridge.draw(settings.num_chains, seed=0, first_image=0)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        point = bridge.evaluate(point.u)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - began)
    gradients = settings.gradients(num_images, passes)
    # The first evaluation pays for what is set up once.
    each = min(times[1:]) / (size * settings.num_chains)
    return Cost(gradients, gradients * each)


class Bridge:
    """The densities f_b = f_0^(1-b) f_1^b of one batch, and their gradients."""

    def __init__(self, model: Program, guide: Program, x: Tensor, start: str):
        self.x = x
        self.from_guide = start == "guide"
        self.program = guide if self.from_guide else model
        self.densities = hmc.Densities(model, guide if self.from_guide else None, x)

    def draw(self, num_chains: int, seed: int, first_image: int) -> Point:
        """Draws of f_0."""
        return self.at(hmc.draw_latents(self.program, self.x, num_chains, seed, first_image))

    def at(self, latents: Mapping[str, Tensor]) -> Point:
        """The point at latents, site name -> (C, B, *event)."""
        return self.evaluate(self.densities.pack(latents))

    def evaluate(self, u: Tensor) -> Point:
        """Both terms and their gradients at u (C, B, D)."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            log_prior, log_likelihood, log_q = self.densities.terms(u)
            first, second = log_prior, log_likelihood
            if log_q is not None:
                first, second = log_q, log_prior + log_likelihood
            grads = torch.stack([hmc.gradient(first, u), hmc.gradient(second, u)])
        return Point(u.detach(), torch.stack([first, second]).detach(), grads)

    def weights(self, b: float) -> tuple[float, float]:
        """The weights of the terms in log f_b: log p(z) + b log p(x | z), or a mean of log q and
        log p(x, z)."""
        return (1 - b, b) if self.from_guide else (1.0, b)

    def slope(self, point: Point) -> Tensor:
        """d/db log f_b, (C, B) in float64; it is the same for all b."""
        first, second = point.terms.double()
        return second - first if self.from_guide else second


class _Batch:
    """The chains of one batch of images."""

    def __init__(
        self, bridge: Bridge, settings: Settings, first_image: int, tick: Callable[[int], None]
    ):
        self.bridge = bridge
        self.settings = settings
        self.images = range(first_image, first_image + len(bridge.x))
        self.tick = tick
        self.log_steps = self._pilot() if settings.num_temperatures > 1 else None

    def _move(self, point: Point, b: float, log_step: Tensor, key: str) -> tuple[Point, Tensor]:
        chains, _, numbers = point.u.shape
        noise = Noise(self.settings.seed, self.images, range(chains)).draw(
            f"hmc/{key}", torch.Size([numbers + 2]), point.u
        )
        leapfrog = self.settings.num_leapfrog
        weights, step = self.bridge.weights(b), log_step.exp().to(point.u.dtype)
        moved = hmc.transition(self.bridge.evaluate, point, weights, noise, step, leapfrog)
        self.tick(chains * len(self.images) * leapfrog)
        return moved

    def _pilot(self) -> Tensor:
        """log step sizes (T' + 1, B) of a preliminary run over T' temperatures."""
        # Another seed: the chains to come must be independent of what this run has seen.
        seed, num = ~self.settings.seed, self.settings.pilot_temperatures
        point = self.bridge.draw(_PILOT_CHAINS, seed, self.images.start)
        log_step = torch.full((len(self.images),), math.log(0.1), dtype=torch.float64)
        log_step = log_step.to(point.u.device)
        for n in range(_PILOT_WARMUP):
            point, accept = self._move(point, 0.0, log_step, f"warmup/{n}")
            log_step = log_step + _WARMUP_GAIN * (accept.mean(0) - hmc.TARGET_ACCEPT)
        table = [log_step]
        for t, b in enumerate(schedule(num).tolist()[1:]):
            point, accept = self._move(point, b, log_step, f"pilot/{t}")
            log_step = log_step + _PILOT_GAIN * (accept.mean(0) - hmc.TARGET_ACCEPT)
            table.append(log_step)
        return torch.stack(table)

    def walk(self, point: Point, direction: str) -> dict[str, Tensor]:
        """The log-weights (C, B) and acceptance rates (B,) of chains from one end to the other."""
        settings = self.settings
        last, betas = settings.num_temperatures, schedule(settings.num_temperatures).tolist()
        log_weights = torch.zeros_like(point.terms[0], dtype=torch.float64)
        accepted = torch.zeros_like(log_weights)
        own = torch.zeros_like(log_weights)
        forward = direction == "forward"
        for t in range(1, last + 1) if forward else range(last, 0, -1):
            log_weights = log_weights + (betas[t] - betas[t - 1]) * self.bridge.slope(point)
            here = t if forward else t - 1
            if not 0 < here < last:
                continue
            assert self.log_steps is not None
            log_step = self.log_steps[round(here / last * (len(self.log_steps) - 1))] + own
            point, accept = self._move(point, betas[here], log_step, f"{direction}/{here}")
            accepted = accepted + accept
            if settings.step_sizes == "adaptive":
                own = own + _CHAIN_GAIN * (accept - hmc.TARGET_ACCEPT)
        rate = accepted.mean(0) / (last - 1) if last > 1 else torch.ones_like(accepted[0])
        return {f"{direction}_log_weights": log_weights, f"{direction}_accept_rate": rate}


def _run(
    model: Program,
    guide: Program,
    x: Tensor,
    latents: Mapping[str, Tensor] | None,
    settings: Settings,
    first_image: int,
    memory: int | None,
    checkpoint: Path | None,
    progress: Callable[[int], None] | None,
) -> dict[str, Tensor]:
    """Columns of results, (..., B): those of a checkpoint, and batch by batch the rest."""
    done = 0

    def tick(gradients: int) -> None:
        nonlocal done
        done += gradients
        if progress is not None:
            progress(done)

    if not len(x):
        raise InputError("there are no images to anneal; give x at least one")
    saved = _Saved(checkpoint)
    if checkpoint is not None:
        saved.open(_identity(model, guide, x, latents, settings, first_image))
    columns = saved.columns
    start = next(iter(columns.values())).shape[-1] if columns else 0
    if start:
        tick(settings.gradients(start, 1 if latents is None else 2))
    size = _batch_size(model, guide, x, settings, memory)
    for begin in range(start, len(x), size):
        here = slice(begin, begin + size)
        bridge = Bridge(model, guide, x[here], settings.start)
        begin_image = first_image + begin
        point = bridge.draw(settings.num_chains, settings.seed, begin_image)
        batch = _Batch(bridge, settings, begin_image, tick)
        found = batch.walk(point, "forward")
        if latents is not None:
            exact = {
                name: z[:, here].expand(settings.num_chains, *z[:, here].shape[1:])
                for name, z in latents.items()
            }
            found |= batch.walk(bridge.at(exact), "reverse")
        _check(found, begin_image)
        columns = {
            name: torch.cat([columns[name], part.cpu()], -1) if columns else part.cpu()
            for name, part in found.items()
        }
        saved.write(columns)
    return columns


def _check(found: dict[str, Tensor], first_image: int) -> None:
    for name, values in found.items():
        bad = values.isnan()
        if bad.any():
            image = first_image + int(bad.nonzero()[0, -1])
            raise InputError(
                f"the {name} of image {image} are not numbers: log p(x, z) or its gradient is not "
                "finite there; check the model, or start from the other end (--start)"
            )


def _batch_size(
    model: Program, guide: Program, x: Tensor, settings: Settings, memory: int | None
) -> int:
    if memory is None and not x.is_cuda:
        memory = _CPU_MEMORY
    plan = importance.plan(model, guide, x[:1], settings.num_chains, memory)
    # The plan counts a pass without a gradient: that takes about as much again.
    rows = plan.images * plan.particles // 2
    return max(1, rows // settings.num_chains)


class _Saved:
    """The finished part of a run, in a file if there is one."""

    def __init__(self, path: Path | None):
        self.path = path
        self.identity: dict[str, Any] = {}
        self.columns: dict[str, Tensor] = {}

    def open(self, identity: dict[str, Any]) -> None:
        """Read what is there; refuse what another run has saved."""
        self.identity = identity
        path = self.path
        if path is None or not path.exists():
            return
        state = load_checkpoint(path)
        stored = state.get("annealing")
        if not isinstance(stored, dict):
            raise InputError(f"{path} is no checkpoint of annealing; give another file")
        for name, value in identity.items():
            theirs = stored.get(name)
            if theirs != value and not _close(theirs, value):
                raise InputError(
                    f"{path} was saved by a run with {name} {theirs}, not {value}; remove the file "
                    "to start anew, or give the settings, data and model it was started with"
                )
        self.columns = state["columns"]

    def write(self, columns: dict[str, Tensor]) -> None:
        """Save the columns so far."""
        if self.path is not None:
            save_checkpoint(self.path, {"annealing": self.identity, "columns": columns})


def _close(a: Any, b: Any) -> bool:
    both = isinstance(a, float) and isinstance(b, float)
    return both and math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-3)


def _identity(
    model: Program,
    guide: Program,
    x: Tensor,
    latents: Mapping[str, Tensor] | None,
    settings: Settings,
    first_image: int,
) -> dict[str, Any]:
    """What a checkpoint must agree on. The model is known by a density that it gives."""
    bridge = Bridge(model, guide, x[:1], settings.start)
    probe = bridge.slope(bridge.draw(1, settings.seed, first_image))
    return {
        **asdict(settings),
        "data": hashlib.blake2b(x.cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest(),
        "number of images": len(x),
        "first image": first_image,
        "directions": 1 if latents is None else 2,
        "device": x.device.type,
        "log p(x | z) of its model at one z": float(probe),
    }


def _annealed(columns: dict[str, Tensor], direction: str) -> Annealed:
    log_weights = columns[f"{direction}_log_weights"]
    sign = 1 if direction == "forward" else -1
    v = torch.softmax(sign * log_weights, 0)  # normalised to sum to one
    chains = len(v)
    error = v.std(0) * math.sqrt(chains) if chains > 1 else torch.full_like(v[0], math.nan)
    return Annealed(
        log_likelihood=sign * importance.log_mean_exp(sign * log_weights),
        error=error,
        ess=1 / v.square().sum(0),
        accept_rate=columns[f"{direction}_accept_rate"],
        log_weights=log_weights,
    )


class Annealing(NamedTuple):
    """Annealed log p(x) of some images of a split, or of simulated ones; ``print`` it.

    Means are over images, in nats per image. A ``_se`` is the standard error of that mean over
    images; ``monte_carlo_se`` is the part of it that comes from the chains.
    """

    data: str
    protocol: str
    split: str
    """"simulated" where the images were drawn from the model."""
    kind: str
    num_images: int
    num_chains: int
    num_temperatures: int
    num_leapfrog: int
    start: str
    step_sizes: str
    seed: int
    log_likelihood: float
    """The lower bound."""
    log_likelihood_se: float
    monte_carlo_se: float
    upper: float | None
    """The upper bound; None unless images were simulated."""
    upper_se: float | None
    gap: float | None
    gap_se: float | None
    ess_median: float
    accept_rate: float
    gradients: int
    device: str
    seconds: float
    lower_per_image: Annealed
    upper_per_image: Annealed | None

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values (NaN as None), without the per-image tensors."""
        summary = {n: v for n, v in self._asdict().items() if not n.endswith("_per_image")}
        return {name: None if value != value else value for name, value in summary.items()}

    def __str__(self) -> str:
        lower = f"{self.log_likelihood:.3f} ± {self.log_likelihood_se:.3f} nats per image"
        rows = [("log p(x)", f"{lower}, a lower bound on average")]
        if self.upper is not None:
            rows += [
                ("upper bound", f"{self.upper:.3f} ± {self.upper_se:.3f}"),
                ("gap", f"{self.gap:.3f} ± {self.gap_se:.3f}"),
            ]
        chosen = f"{self.num_temperatures} temperatures from the {self.start}"
        images = "drawn from the model" if self.split == "simulated" else f"of {self.split}"
        rows += [
            ("Monte-Carlo error", f"{self.monte_carlo_se:.3f}"),
            ("ESS", f"median {self.ess_median:.1f} of {self.num_chains} chains"),
            ("acceptance", f"{self.accept_rate:.1%}, {self.step_sizes} step sizes"),
            ("images", f"{self.num_images:,} {images}"),
            ("annealing", f"{chosen}, {self.num_leapfrog} leapfrog steps, seed {self.seed}"),
            ("protocol", f"{self.protocol}; a {self.kind}"),
            ("time", f"{self.seconds:.1f} s on {self.device}"),
        ]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


@importance.float32_products()
def anneal_split(
    vae: Programs,
    split: Split,
    num_images: int = 100,
    settings: Settings | None = None,
    *,
    simulated: bool = False,
    device: str | torch.device | None = None,
    memory: int | None = None,
    checkpoint: Path | None = None,
    announce: Callable[[Cost], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Annealing:
    """:func:`anneal` the first images of a split, or :func:`bdmc` images simulated like them.

    Args:
        vae: anything with a Pyro ``model`` and ``guide`` and a ``likelihood``, such as a VAE.
        split: images, whose protocol the result reports.
        num_images: of the split, or to simulate.
        settings: of the chains; default: ``Settings()``.
        simulated: draw the images from the model, and bound log p(x) from both sides.
        device: where to compute; default: where the VAE is.
        memory: as in :func:`anneal`.
        checkpoint: as in :func:`anneal`.
        announce: called with the cost before a run begins.
        progress: as in :func:`anneal`.

    Raises:
        InputError: as :func:`anneal`, and for data outside the likelihood's support.
    """
    began = time.perf_counter()
    importance.check_has_density(vae)
    settings = settings or Settings()
    if num_images < 1:
        raise InputError(f"num_images (--num-images) must be at least 1, got {num_images}")
    if device is not None:
        vae.to(device)
    here = next((p.device for p in vae.parameters()), torch.device("cpu"))
    x = split.head(1 if simulated else num_images).tensor().to(here)
    vae.likelihood.check(x)
    count, passes = (num_images, 2) if simulated else (len(x), 1)
    if announce is not None:
        announce(cost(vae.model, vae.guide, x, count, settings, passes=passes, memory=memory))
    options: dict[str, Any] = {
        **asdict(settings),
        "memory": memory,
        "checkpoint": checkpoint,
        "progress": progress,
    }
    lower: Annealed
    upper: Annealed | None = None
    if simulated:
        drawn = simulate(vae.model, x, count, settings.seed)
        lower, upper = bdmc(vae.model, vae.guide, drawn, **options)
    else:
        lower = anneal(vae.model, vae.guide, x, **options)
    log_likelihood, log_likelihood_se = _mean(lower.log_likelihood)
    upper_mean, upper_se = (None, None) if upper is None else _mean(upper.log_likelihood)
    gap, gap_se = (None, None) if upper is None else _mean(Sandwich(lower, upper).gap)
    return Annealing(
        data=split.protocol.data,
        protocol=str(split.protocol),
        split="simulated" if simulated else split.name,
        kind=str(vae.likelihood.kind),
        num_images=count,
        **asdict(settings),
        log_likelihood=log_likelihood,
        log_likelihood_se=log_likelihood_se,
        monte_carlo_se=float(lower.error.square().sum().sqrt()) / count,
        upper=upper_mean,
        upper_se=upper_se,
        gap=gap,
        gap_se=gap_se,
        ess_median=float(lower.ess.median()),
        accept_rate=float(lower.accept_rate.mean()),
        gradients=settings.gradients(count, passes),
        device=str(here),
        seconds=round(time.perf_counter() - began, 3),
        lower_per_image=lower,
        upper_per_image=upper,
    )


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    n = len(values)
    return float(values.mean()), float(values.std() / math.sqrt(n)) if n > 1 else math.nan
