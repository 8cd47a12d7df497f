"""Objectives whose gradient reaches the guide through the draws alone, as Pyro ELBO objects.

The gradient of log w = log p(x, z) - log q(z | x) by the guide's parameters has two parts: through
the draw z, and straight into log q. The second is pure noise: under q it has mean zero in the ELBO,
and in the importance-weighted bound it can be rewritten as more of the first. Both objectives here
leave it out, and still have the gradient of their bound as expectation; near the exact posterior,
where log w no longer depends on z, their noise vanishes.
"""

from abc import abstractmethod
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.errors import InputError
from pyrovae.importance import (
    Program,
    is_bookkeeping,
    is_latent,
    log_mean_exp,
    site_log_prob,
    with_particles,
)


class Pathwise(ELBO):
    """A bound of log p(x) whose gradient by the guide goes through the draws, and only there.

    With draws z_k, their log-weights log w_k, and weights a_k, b_k that the bound gives them, a
    step raises, for each image,

        sum_k a_k log p(x, z_k)  by the model's parameters,
        sum_k b_k (d log w_k / d z_k) z_k(phi)  by the guide's, all but z_k(phi) being constant.

    A parameter that both programs use takes the sum of the two: the encoder under a VampPrior is
    part of the model by way of p(z). Where a guide has several sites, log q(z1 | x, z2) depends on
    z2 also, and that dependence is part of d log w / d z2.

    Use it wherever Pyro takes an ELBO. `losses` alone is made of nothing but tensor operations, so
    that it can be traced.
    """

    def __init__(self, num_particles: int):
        if num_particles < 1:
            raise InputError(f"num_particles must be at least 1, got {num_particles}")
        super().__init__(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)

    @abstractmethod
    def bound(self, log_weights: Tensor) -> Tensor:
        """The bound of each image, (B,), from log-weights (K, B)."""

    @abstractmethod
    def weights(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """The a_k and b_k of the class, (K, B) each, from log-weights (K, B)."""

    def losses(self, model: Program, guide: Program, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, summed over images, and a scalar whose gradient is the one to descend.

        The value of the second has no meaning. Latents are drawn once, from torch's own stream.

        Args:
            model: Pyro program with the observed sites, in a plate over images at dim -1.
            guide: Pyro program with the latent sites, in the same plate.
            x: (B, *x_shape).

        Raises:
            InputError: for a latent that is not reparameterised, or that only one program has.
        """
        log_p, log_q, draws = self._run(model, guide, x)
        log_weights = log_p - log_q
        of_model, of_guide = self.weights(log_weights.detach())
        leaves = [leaf for _, leaf in draws]
        slopes = torch.autograd.grad(
            (of_guide * log_weights).sum(), leaves, retain_graph=True, materialize_grads=True
        )
        value = (of_model * log_p).sum() + _along_draws(draws, list(slopes))
        return -self.bound(log_weights).sum(), -value

    def loss(self, model: Program, guide: Program, x: Tensor) -> float:  # type: ignore[override]
        """Minus the bound, summed over the images of x (B, *x_shape); no gradient."""
        with torch.no_grad():
            log_p, log_q, _ = self._run(model, guide, x)
            return -float(self.bound(log_p - log_q).sum())

    def differentiable_loss(self, model: Program, guide: Program, x: Tensor) -> Tensor:
        """Minus the bound, summed over images, with the gradient to descend."""
        loss, surrogate = self.losses(model, guide, x)
        return loss.detach() + surrogate - surrogate.detach()

    def loss_and_grads(self, model: Program, guide: Program, x: Tensor) -> float:
        """Add the gradient to every parameter's ``grad``; return the loss, summed over images."""
        loss, surrogate = self.losses(model, guide, x)
        surrogate.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _run(
        self, model: Program, guide: Program, x: Tensor
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """log p(x, z) and log q(z | x), (K, B), at leaves; each draw with its leaf, in order."""
        with _Leaves() as cut:
            inference = poutine.trace(with_particles(guide, self.num_particles)).get_trace(x)
        replayed = poutine.replay(with_particles(model, self.num_particles), trace=inference)
        generation = poutine.trace(replayed).get_trace(x)
        ours, theirs = (
            {name for name, site in trace.nodes.items() if is_latent(site)}
            for trace in (inference, generation)
        )
        if ours != theirs:
            raise InputError(
                f"model and guide must have the same latent sites; the model has {sorted(theirs)}, "
                f"the guide {sorted(ours)}; name them alike in both"
            )
        shape = (self.num_particles, len(x))
        log_p, log_q = (_log_prob(trace, shape) for trace in (generation, inference))
        return log_p, log_q, cut.draws

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("both programs are run by `losses`")


class StickingTheLanding(Pathwise):
    """The ELBO, averaged over K draws, without the score of q: a_k = b_k = 1 / K."""

    def bound(self, log_weights: Tensor) -> Tensor:
        """The mean log-weight, (B,)."""
        return log_weights.mean(0)

    def weights(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """1 / K, twice."""
        share = torch.full_like(log_weights, 1 / self.num_particles)
        return share, share


class DoublyReparameterized(Pathwise):
    """The importance-weighted bound: with v_k = w_k / sum_j w_j, a_k = v_k and b_k = v_k^2."""

    def bound(self, log_weights: Tensor) -> Tensor:
        """The log-mean weight, (B,)."""
        return log_mean_exp(log_weights)

    def weights(self, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised weights, and their squares."""
        normalised = torch.softmax(log_weights, 0)
        return normalised, normalised.square()


class _Leaves(Messenger):
    """Cuts each draw off from the guide that made it, and keeps both ends of the cut.

    What the guide does next depends on the draw, no longer on how it was made: every density is
    then a function of the draws and, apart from them, of parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[tuple[Tensor, Tensor]] = []

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or is_bookkeeping(msg):
            return
        if not msg["fn"].has_rsample:
            raise InputError(
                f"site {msg['name']!r} is a {type(msg['fn']).__name__}, whose draws have no "
                "gradient; use --objective elbo, or a guide made of reparameterised distributions"
            )
        z = msg["value"]
        msg["value"] = z.detach().requires_grad_()
        self.draws.append((z, msg["value"]))


def _along_draws(draws: list[tuple[Tensor, Tensor]], slopes: list[Tensor]) -> Tensor:
    """A scalar whose gradient by the guide is the slopes' along all paths through the draws.

    Each draw was made from the leaves of those before it: going backwards, a leaf's slope grows by
    what the leaf does to the draws that follow.
    """
    value = slopes[0].new_zeros(()) if slopes else torch.zeros(())
    for (z, leaf), slope in zip(reversed(draws), reversed(slopes), strict=True):
        if value.requires_grad:
            (through_later,) = torch.autograd.grad(
                value, leaf, retain_graph=True, materialize_grads=True
            )
            slope = slope + through_later
        value = value + (slope * z).sum()
    return value


def _log_prob(trace: poutine.Trace, shape: tuple[int, int]) -> Tensor:
    """The sum over a program's sites, each scaled as its handlers ask, (K, B)."""
    sites = (s for s in trace.nodes.values() if s["type"] == "sample" and not is_bookkeeping(s))
    terms = [site_log_prob(site, shape) * site["scale"] for site in sites]
    return sum(terms[1:], terms[0]).expand(shape)
