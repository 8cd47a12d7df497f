"""The fast evaluator: the terms of the log-weights for whole chunks, traced and compiled once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae import engines, hoisting, tracing
from pyrovae.compiling import Options, compiled, first_that_works, has_compiler
from pyrovae.errors import InputError
from pyrovae.importance import (
    GUIDE,
    Kernel,
    LogTerms,
    Program,
    Programs,
    chunks,
    is_made_of_normals,
)
from pyrovae.precision import networks_in
from pyrovae.proposals import Noise, Proposal
from pyrovae.tracing import NotTraceableError

EVALUATORS = ("auto", "eager", "compiled")

# A chunk of an evaluation saves about 10 milliseconds.
REPAID_AFTER_CHUNKS = 2000


class CompiledTerms:
    """The terms of the log-weights for chunks of one shape, traced and compiled once.

    An `importance.Kernel`. Two chunks are computed both ways first, and a difference is an error.
    What no draw enters, such as x encoded, is computed once for a batch (`hoisting.py`).

    Args:
        model: Pyro program with the observed sites.
        guide: Pyro program with the latent sites, all made of normals.
        module: the module whose weights they use. They are read anew for every batch, and must not
            change while its chunks are computed.
        x: the first batch, (B, *x_shape).
        num_particles: K of a chunk.
        compile_it: False replays the traced operations one by one.
        precision: "fp32", "tf32" or "bf16", of the networks' matrix products.

    Raises:
        NotTraceableError: for programs that cannot be traced, or not rightly, and why.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        module: nn.Module,
        x: Tensor,
        num_particles: int,
        *,
        compile_it: bool = True,
        precision: str = "fp32",
    ):
        self.shape = (num_particles, *x.shape)
        self.precision = precision
        x = x.contiguous()  # kernels want a fixed layout
        traced = tracing.TracedTerms(model, guide, module, num_particles)
        self._weights = traced.weights
        with networks_in(module, precision):
            graph, self._events = traced.graph(x)
        self._once, each = hoisting.in_two(graph, len(self._weights) + 1)
        self._each: Callable[..., Sequence[Tensor]] = each
        starts = (0, num_particles)
        noise = [Noise(0, range(len(x)), range(i, i + num_particles)) for i in starts]
        with torch.no_grad(), networks_in(module, precision):
            theirs = list(chunks(model, guide, x, 2 * num_particles, chunk=num_particles, seed=0))

        def checked(options: Options | None = None) -> None:
            if options is not None:
                example = [*self._fixed(x), *self._drawn(x, noise[0])]
                self._each = compiled(each, example, options)
            terms = self.of(x)
            # Two, for something of the first may have stayed.
            for ours, other in zip([terms(of) for of in noise], theirs, strict=True):
                _compare_terms(ours, other, rounded=precision != "fp32")

        if compile_it:
            first_that_works(x.device, checked)
        else:
            checked()

    def serves(self, x: Tensor, noise: Noise) -> bool:
        """Whether a chunk has this shape, and draws from the guide."""
        return noise.proposal == GUIDE and (len(noise.particles), *x.shape) == self.shape

    def of(self, x: Tensor) -> Callable[[Noise], LogTerms]:
        """The terms of this batch's chunks, as a function of noise that `serves` accepts."""
        x = x.contiguous()
        fixed = self._fixed(x)

        def terms(noise: Noise) -> LogTerms:
            with self._computing(x.device):
                results = self._each(*fixed, *self._drawn(x, noise))
            likelihood, prior, posterior, *z = results
            return LogTerms(likelihood, prior, posterior, dict(zip(self._events, z, strict=True)))

        return terms

    def _fixed(self, x: Tensor) -> list[Tensor]:
        given = [*self._weights, x]
        with self._computing(x.device):
            return [*given, *self._once(*given)]

    @contextmanager
    def _computing(self, device: torch.device) -> Iterator[None]:
        # The operations have their precisions written down: nothing around them may round.
        autocast = torch.autocast(device.type, enabled=False)
        with torch.no_grad(), autocast, networks_in(None, self.precision):
            yield

    def _drawn(self, x: Tensor, noise: Noise) -> list[Tensor]:
        return [noise.draw(site, event, x) for site, event in self._events.items()]


def terms_kernel(
    engine: str,
    vae: Programs,
    x: Tensor,
    num_particles: int,
    num_chunks: int,
    proposal: Proposal = GUIDE,
    precision: str = "fp32",
) -> Kernel | None:
    """What computes the chunks of an evaluation: compiled where that pays, else None.

    Args:
        engine: "auto", "eager" or "compiled".
        vae: a module with the two programs.
        x: the first batch, (B, *x_shape).
        num_particles: K of a chunk.
        num_chunks: how many chunks of that shape there will be.
        proposal: what z is drawn from; only draws of the guide are compiled.
        precision: of the networks' matrix products.

    Raises:
        InputError: for an unknown engine, or "compiled" where there is no compiler.
        NotTraceableError: for "compiled" and programs that cannot be traced.
    """
    if engine not in EVALUATORS:
        raise InputError(f"--engine expects one of {', '.join(EVALUATORS)}; got {engine!r}")
    if engine == "compiled":
        if proposal != GUIDE:
            raise InputError(
                "--engine compiled draws from the guide; leave --proposal out, or use --engine auto"
            )
        engines.choose("compiled", x.device, 0, 0)
    elif (
        engine == "eager"
        or proposal != GUIDE
        or num_chunks < REPAID_AFTER_CHUNKS
        or not (x.is_cuda or has_compiler())
    ):
        return None
    try:
        if not is_made_of_normals(vae.guide, x[:1]):
            raise NotTraceableError("the guide is not made of normal distributions")
        module: Any = vae
        return CompiledTerms(vae.model, vae.guide, module, x, num_particles, precision=precision)
    except NotTraceableError:
        if engine == "compiled":
            raise
        return None


def _compare_terms(ours: LogTerms, theirs: LogTerms, *, rounded: bool = False) -> None:
    for name, a, b in zip(LogTerms._fields[:3], ours[:3], theirs[:3], strict=True):
        # Where sums differ in their last bits, a number that is rounded may differ in its own last
        # one; then one draw of thousands is off by tenths of a nat, and the mean by none.
        off = (a - b).abs()
        error = float(off.mean() if rounded else off.max())
        if not error <= 1e-3 + 1e-5 * float(b.abs().max()):
            raise NotTraceableError(
                f"{name} of the traced programs differs from Pyro's by {error:.1e} nats, on the "
                "same noise: the programs do something that depends on more than x and their draws"
            )
