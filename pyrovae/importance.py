"""Importance sampling with the guide: log p(x, z) - log q(z | x), per particle and image.

Everything here takes any pair of Pyro programs ``model(x)`` and ``guide(x)`` whose sample sites all
lie in a plate over the images at dim -1; it never asks for a VAE.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae.accumulators import rows_kept
from pyrovae.errors import InputError
from pyrovae.proposals import (
    IMAGE_BLOCK,
    PARTICLE_BLOCK,
    FromNoise,
    Noise,
    NoNormalBaseError,
    Proposal,
    from_noise,
)
from pyrovae.streams import own_streams

Program = Callable[[Tensor], Any]

GUIDE = Proposal()


class Programs(Protocol):
    """A module with a generative program ``model(x)`` and an inference program ``guide(x)``.

    A `pyrovae.VAE` is one. ``likelihood`` knows its ``kind`` and can ``check(x)``.
    """

    @property
    def likelihood(self) -> Any:
        """The likelihood of x."""

    def model(self, x: Tensor) -> Any:
        """Sample the latent and observe x (B, *x_shape), in a plate at dim -1."""

    def guide(self, x: Tensor) -> Any:
        """Sample the latent given x (B, *x_shape), in a plate at dim -1."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of torch.nn.Module."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of torch.nn.Module."""

    def state_dict(self) -> dict[str, Any]:
        """As of torch.nn.Module."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """As of torch.nn.Module."""

    def to(self, device: torch.device | str) -> Any:
        """As of torch.nn.Module."""


class LogTerms(NamedTuple):
    """The parts of the log-weights, each (K, B), in nats, and the draws they belong to."""

    log_likelihood: Tensor
    """log p(x | z): the observed sites."""
    log_prior: Tensor
    """log p(z): the latent sites of the model."""
    log_posterior: Tensor
    """log q(z | x): the sites of the guide, or of the proposal made from it."""
    latents: dict[str, Tensor]
    """Site name -> draw, (K, B, *event)."""

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), (K, B)."""
        return self.log_likelihood + self.log_prior - self.log_posterior


class Kernel(Protocol):
    """Computes the terms of whole chunks, as `compiled_terms.CompiledTerms` does.

    One that rounds its products says so by ``precision``, "tf32" or "bf16"; what it does not serve
    is in whatever precision stands around.
    """

    def serves(self, x: Tensor, noise: Noise) -> bool:
        """Whether a chunk has the shape and the proposal that this kernel is made for."""

    def of(self, x: Tensor) -> Callable[[Noise], LogTerms]:
        """The terms of a batch's chunks, for noise that it serves and the weights of now.

        Neither x nor the weights may change while those chunks are computed.
        """


def log_weights(model: Program, guide: Program, x: Tensor, num_particles: int) -> Tensor:
    """log w_kb = log p(x_b, z_kb) - log q(z_kb | x_b) with z_kb ~ q(z | x_b): (K, B), in nats.

    The mean over k is an unbiased estimate of the ELBO; ``logsumexp(w, 0) - log K`` is the
    importance-weighted bound (Burda et al., Importance Weighted Autoencoders, 2016,
    https://arxiv.org/abs/1509.00519), which rises to log p(x) with K. Differentiable wherever the
    guide is reparameterised. Scales set by handlers (a KL weight, a subsampled plate) do not enter:
    a weight is a ratio of densities of one image.

    Args:
        model: Pyro program with the observed sites, in a plate over images at dim -1.
        guide: Pyro program with the latent sites, in the same plate.
        x: (B, *x_shape).
        num_particles: K >= 1.

    Raises:
        InputError: for K < 1, or a site outside the plate of images.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):  # the exact posterior: every weight is p(x)
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> log_weights(model, guide, torch.zeros(2), 3).shape
    torch.Size([3, 2])
    """
    check_has_density(model)
    return log_terms(model, guide, x, num_particles).log_weights


def log_terms(model: Program, guide: Program, x: Tensor, num_particles: int) -> LogTerms:
    """The terms of :func:`log_weights`, drawn from torch's own random stream."""
    check_particles(num_particles)
    with isolated_params():
        trace = poutine.trace(with_particles(guide, num_particles)).get_trace(x)
        return _score(model, trace, x, num_particles)


def chunks(
    model: Program,
    guide: Program,
    x: Tensor,
    num_particles: int,
    *,
    chunk: int,
    seed: int,
    first_image: int = 0,
    proposal: Proposal = GUIDE,
    kernel: "Kernel | None" = None,
) -> Iterator[LogTerms]:
    """Terms of ``num_particles`` draws for one batch, ``chunk`` particles at a time, no gradient.

    A guide with a single latent site is run, and x encoded, only once. Draws are a function of
    (seed, site, image, particle), so they do not depend on the chunk or the batch.

    Args:
        model: Pyro program with the observed sites, in a plate over images at dim -1.
        guide: Pyro program with the latent sites, in the same plate.
        x: (B, *x_shape).
        num_particles: K >= 1.
        chunk: particles computed at once.
        seed: of the draws.
        first_image: position of x[0] in its data set; the draws belong to positions.
        proposal: what z is drawn from: the guide, or what is made of it.
        kernel: a faster way to the same terms, for chunks of the one shape that it is made for.

    Raises:
        InputError: for K < 1, a site outside the plate of images, or a guide that is not made of
            normals where the proposal asks for one that is.
    """
    check_particles(num_particles)
    images = range(first_image, first_image + len(x))
    with torch.no_grad(), isolated_params():
        fast: Callable[[Noise], LogTerms] | None = None
        draw: Callable[[Noise], poutine.Trace] | None = None
        for start in range(0, num_particles, chunk):
            particles = range(start, min(start + chunk, num_particles))
            noise = Noise(seed, images, particles, proposal)
            if kernel is not None and kernel.serves(x, noise):
                fast = kernel.of(x) if fast is None else fast
                yield fast(noise)
                continue
            draw = _sampler(guide, x) if draw is None else draw
            with _validated_once(start):
                trace = draw(noise)
                terms = _score(model, trace, x, len(particles), proposal, num_particles)
            yield terms


def _validated_once(start: int) -> AbstractContextManager[None]:
    # Pyro checks every value of every site against its support, which costs a tenth of the time
    # and, on a GPU, a wait for each. Later chunks have the same sites as the first.
    return pyro.validation_enabled(False) if start > 0 else nullcontext()


def _sampler(guide: Program, x: Tensor) -> Callable[[Noise], poutine.Trace]:
    """A function from noise to a trace of the guide, with particles at dim -2."""
    once = trace_quietly(guide, x)
    names = [n for n, site in once.nodes.items() if is_latent(site)]

    def rerun(noise: Noise) -> poutine.Trace:
        program = FromNoise(noise, x)(with_particles(guide, len(noise.particles)))
        try:
            return poutine.trace(program).get_trace(x)
        except NoNormalBaseError as error:
            if noise.proposal.kind != "guide":
                raise InputError(
                    f"the proposal {noise.proposal.kind!r} needs a guide made of normal "
                    f"distributions, and {error}; use --proposal guide"
                ) from None
            return _seeded_trace(guide, noise, x)

    if len(names) != 1:  # a later site may depend on an earlier draw: run the whole program
        return rerun
    name = names[0]
    q = once.nodes[name]["fn"]

    def reuse(noise: Noise) -> poutine.Trace:
        z = from_noise(q, lambda event: noise.draw(name, event, x))
        if z is None:
            return rerun(noise)
        trace = poutine.Trace()
        trace.add_node(name, **{**once.nodes[name], "value": z})
        return trace

    return reuse


def trace_quietly(guide: Program, x: Tensor) -> poutine.Trace:
    """Run a guide for its distributions' sake, leaving the caller's random stream alone."""
    with own_streams():
        return poutine.trace(guide).get_trace(x)


def latent_mean(guide: Program, x: Tensor) -> Tensor | None:
    """E_q[z | x] of a guide with one latent site, (B, D); None where it has no closed form."""
    with torch.no_grad(), isolated_params():
        sites = [s for s in trace_quietly(guide, x).nodes.values() if is_latent(s)]
        if len(sites) != 1:
            return None
        try:
            return sites[0]["fn"].mean.reshape(len(x), -1)
        except NotImplementedError:
            return None


def _seeded_trace(guide: Program, noise: Noise, x: Tensor) -> poutine.Trace:
    # A guide that is not made of normals draws from torch's stream. Only whole blocks are
    # reproducible then; `plan` keeps to those.
    with own_streams(noise.stream_seed()):
        return poutine.trace(with_particles(guide, len(noise.particles))).get_trace(x)


def is_made_of_normals(guide: Program, x: Tensor) -> bool:
    """Whether every latent of the guide can be computed from standard-normal noise."""
    probe = Noise(0, range(len(x)), range(1))
    try:
        with torch.no_grad(), isolated_params():
            poutine.trace(FromNoise(probe, x)(with_particles(guide, 1))).get_trace(x)
    except NoNormalBaseError:
        return False
    return True


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    """log((1/K) sum_k exp(v_k)) along ``dim``."""
    return torch.logsumexp(values, dim) - math.log(values.shape[dim])


class Plan(NamedTuple):
    """How many images and particles are computed together."""

    images: int
    particles: int


# What torch asks before it rounds the factors of a product or convolution in float32.
_BACKENDS: Any = torch.backends
_SWITCHES: Sequence[Any] = (
    _BACKENDS.cuda.matmul,
    _BACKENDS.mkldnn.matmul,
    _BACKENDS.mkldnn.conv,
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
)


@contextmanager
def float32_products(rounded: bool = False) -> Iterator[None]:
    """Let matrix products and convolutions in float32 be that, whatever torch has been told.

    Args:
        rounded: let a GPU round their factors to tf32 instead, 10 bits of mantissa.
    """
    # Torch has two sets of switches. Each reads what the other wrote, or refuses to.
    before = [switch.fp32_precision for switch in _SWITCHES]
    matmul = convolutions = None
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if rounded else "highest")
        torch.backends.cudnn.allow_tf32 = rounded
        # The older ones leave convolutions to whatever has been said of all of torch.
        for switch in _SWITCHES[2:]:
            on_gpu = switch is not _BACKENDS.mkldnn.conv
            switch.fp32_precision = "tf32" if rounded and on_gpu else "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for switch, was in zip(_SWITCHES, before, strict=True):
            switch.fp32_precision = "none"  # as is said of all of torch, also when that changes
            if switch.fp32_precision != was:
                switch.fp32_precision = was


def check_has_density(programs: Any) -> None:
    """Raise InputError for programs, or one of a pair, that say they have no p(x)."""
    if not getattr(getattr(programs, "__self__", programs), "has_density", True):
        raise InputError(
            "an autoencoder has no p(z), and so no p(x) to estimate; train a VAE "
            "on the same data: --model vae --likelihood gaussian"
        )


def plan(
    model: Program,
    guide: Program,
    x: Tensor,
    num_particles: int,
    memory: int | None = None,
    proposal: Proposal = GUIDE,
) -> Plan:
    """Choose a batch of images and a chunk of particles that fit a memory budget in bytes.

    The bytes one (image, particle) pair needs are measured: all tensors that one pass creates,
    an upper bound, since most are freed on the way.
    """
    check_particles(num_particles)
    if not is_made_of_normals(guide, x[:1]):
        return Plan(IMAGE_BLOCK, min(num_particles, PARTICLE_BLOCK))
    memory = memory if memory is not None else _default_memory(x)
    # The difference of two runs leaves out what is paid once a chunk, such as encoding the
    # pseudo-inputs of a VampPrior.
    one, three = (_bytes_created(model, guide, x[:1], k, proposal) for k in (1, 3))
    rows = max(1, 2 * memory // max(1, three - one))
    particles = min(num_particles, max(1, rows // IMAGE_BLOCK), 4 * PARTICLE_BLOCK)
    if particles > PARTICLE_BLOCK:
        particles -= particles % PARTICLE_BLOCK
    # Of each image some log-weights are held, and copies of them in float64: bound those too.
    images = min(rows // particles, max(1, memory // (16 * rows_kept(num_particles))), 16384)
    images = max(1, images)
    if images > IMAGE_BLOCK:
        images -= images % IMAGE_BLOCK
    return Plan(images, particles)


def _default_memory(x: Tensor) -> int:
    if x.is_cuda:
        free, _ = torch.cuda.mem_get_info(x.device)
        # What torch holds and does not use is free too: a second evaluation plans as the first.
        kept = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
        return (free + kept) // 4
    return 64 * 2**20  # stays near a CPU's caches; larger chunks measured no faster


def _bytes_created(
    model: Program, guide: Program, x: Tensor, num_particles: int, proposal: Proposal
) -> int:
    with _CountBytes() as counter:
        for _ in chunks(
            model, guide, x, num_particles, chunk=num_particles, seed=0, proposal=proposal
        ):
            pass
    return counter.bytes


class _CountBytes(TorchDispatchMode):
    """Adds up the bytes of every tensor that is created while it is active; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        for tensor, declared in zip(outputs, func._schema.returns, strict=False):
            if isinstance(tensor, Tensor) and declared.alias_info is None:
                self.bytes += tensor.nbytes
        return out


def _score(
    model: Program,
    guide_trace: poutine.Trace,
    x: Tensor,
    num_particles: int,
    proposal: Proposal = GUIDE,
    total: int = 1,
) -> LogTerms:
    replayed = poutine.replay(with_particles(model, num_particles), trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(x)
    shape = (num_particles, len(x))
    likelihood = prior = x.new_zeros(())
    for site in model_trace.nodes.values():
        if site["type"] != "sample" or is_bookkeeping(site):
            continue
        if site["is_observed"]:
            likelihood = likelihood + site_log_prob(site, shape)
        else:
            prior = prior + site_log_prob(site, shape)
    sites = {name: site for name, site in guide_trace.nodes.items() if is_latent(site)}

    def log_prob(change: Callable[[Any], Any]) -> Tensor:
        changed = ({**site, "fn": change(site["fn"])} for site in sites.values())
        return sum((site_log_prob(site, shape) for site in changed), x.new_zeros(()))

    posterior = proposal.log_density(log_prob, total)
    latents = {name: site["value"] for name, site in sites.items()}
    return LogTerms(likelihood.expand(shape), prior.expand(shape), posterior.expand(shape), latents)


def site_log_prob(site: dict[str, Any], shape: tuple[int, int]) -> Tensor:
    """The log-probability of one site for (K, B) = ``shape``, masked, and free of any scale."""
    log_prob = site["fn"].log_prob(site["value"])
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"], device=log_prob.device)
        log_prob = torch.where(mask, log_prob, 0.0)
    if log_prob.dim() == 0 or log_prob.shape[-1] != shape[1] or log_prob.dim() > 2:
        raise InputError(
            f"site {site['name']!r} must lie in a plate of the {shape[1]} images at dim -1 and in "
            f"no other; its log-probability has shape {tuple(log_prob.shape)}; open "
            'pyro.plate("data", len(x), dim=-1) around it'
        )
    return log_prob


def with_particles(program: Program, num_particles: int) -> Program:
    """The program in a plate of particles at dim -2, outside the plate of images."""

    def run(x: Tensor) -> Any:
        with pyro.plate("particles", num_particles, dim=-2):
            return program(x)

    return run


def is_bookkeeping(site: dict[str, Any]) -> bool:
    """Whether a site is a plate's own, the indices of a subsample."""
    return bool(poutine.util.site_is_subsample(site))


def is_latent(site: dict[str, Any]) -> bool:
    """Whether a site is sampled and not observed."""
    return site["type"] == "sample" and not site["is_observed"] and not is_bookkeeping(site)


@contextmanager
def isolated_params() -> Iterator[None]:
    """See the caller's Pyro parameters, leave none behind."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        yield


def check_particles(num_particles: int) -> None:
    """Raise InputError for K < 1."""
    if num_particles < 1:
        raise InputError(f"num_particles must be at least 1, got {num_particles}")
