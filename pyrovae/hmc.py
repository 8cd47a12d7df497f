"""Batched Hamiltonian Monte Carlo on the latent sites of Pyro programs.

Every image has its chains, every chain its own step size and its own accept step; one gradient
evaluation moves them all. The latent sites of an image, brought to the whole real line, are packed
into one vector u of D numbers, so a state is (C, B, D): chains, images, numbers.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from pyrovae.errors import InputError
from pyrovae.importance import (
    Program,
    is_bookkeeping,
    is_latent,
    isolated_params,
    site_log_prob,
    with_particles,
)
from pyrovae.streams import own_streams, seed_of

TARGET_ACCEPT = 0.65
# Steps vary by a fifth from transition to transition: a trajectory that closes on itself at one
# length does not at the next. The variation ignores the state, so it leaves the target invariant.
_JITTER = 0.2


class Point(NamedTuple):
    """A state of all chains, and the two terms of the log-density there."""

    u: Tensor
    """(C, B, D) unconstrained latents."""
    terms: Tensor
    """(2, C, B), in nats; the density is exp(w_0 terms_0 + w_1 terms_1) for some weights w."""
    grads: Tensor
    """(2, C, B, D) their gradients in u, kept apart so that they serve every w."""

    def log_density(self, weights: tuple[float, float]) -> Tensor:
        """w_0 terms_0 + w_1 terms_1, (C, B), in float64."""
        return _weighted(self.terms.double(), weights)


def transition(
    evaluate: Callable[[Tensor], Point],
    point: Point,
    weights: tuple[float, float],
    noise: Tensor,
    step: Tensor,
    num_leapfrog: int,
) -> tuple[Point, Tensor]:
    """One HMC transition of every chain: the new point, and each acceptance probability (C, B).

    H(u, v) = |v|^2 / 2 - log f(u): v ~ N(0, I), ``num_leapfrog`` leapfrog steps, and the end is
    accepted with probability min(1, exp(H_before - H_after)). It leaves f invariant and is
    reversible. A trajectory that meets a number that is not finite is rejected.

    Source: Neal, MCMC Using Hamiltonian Dynamics (2011), https://arxiv.org/abs/1206.1901

    Args:
        evaluate: u (C, B, D) -> the point at u.
        point: where the chains stand.
        weights: w of the density's two terms.
        noise: (C, B, D + 2) standard normals: v, then what decides acceptance and jitter.
        step: (C, B) step sizes, or a shape that broadcasts to it.
        num_leapfrog: gradient evaluations.

    >>> def normal(u):
    ...     terms = torch.stack([-u.square().sum(-1) / 2, torch.zeros(u.shape[:2])])
    ...     return Point(u, terms, torch.stack([-u, torch.zeros_like(u)]))
    >>> start, noise = normal(torch.zeros(4, 3, 2)), torch.randn(4, 3, 2 + 2)
    >>> end, accept = transition(normal, start, (1.0, 0.0), noise, torch.tensor(0.1), 5)
    >>> end.u.shape, accept.shape
    (torch.Size([4, 3, 2]), torch.Size([4, 3]))
    """
    velocity, decide, vary = noise[..., :-2], noise[..., -2], noise[..., -1]
    log_threshold = torch.special.log_ndtr(decide.double())
    length = (step * (1 - _JITTER + 2 * _JITTER * torch.special.ndtr(vary))).unsqueeze(-1)
    v = velocity + length / 2 * _weighted(point.grads, weights)
    end = point
    for remaining in range(num_leapfrog - 1, -1, -1):
        end = evaluate(end.u + length * v)
        v = v + (length if remaining else length / 2) * _weighted(end.grads, weights)
    before = point.log_density(weights) - velocity.double().square().sum(-1) / 2
    after = end.log_density(weights) - v.double().square().sum(-1) / 2
    gain = (after - before).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    accepted = log_threshold < gain
    chosen = Point(
        torch.where(accepted.unsqueeze(-1), end.u, point.u),
        torch.where(accepted, end.terms, point.terms),
        torch.where(accepted.unsqueeze(-1), end.grads, point.grads),
    )
    return chosen, gain.clamp(max=0).exp()


def _weighted(values: Tensor, weights: tuple[float, float]) -> Tensor:
    # A term of weight 0 is left out: 0 times an infinite term is no number.
    first, second = weights
    if second == 0:
        return first * values[0]
    if first == 0:
        return second * values[1]
    return first * values[0] + second * values[1]


class Densities:
    """log p(z), log p(x | z) and log q(z | x) of one batch of images, as functions of u.

    Each latent site is mapped to the real line by ``biject_to`` of its support in the model, and
    the log-Jacobian is added, so that ratios of densities stay what they are.

    Args:
        model: Pyro program with the observed sites, in a plate over images at dim -1.
        guide: Pyro program with the same latent sites, or None if log q is not needed.
        x: (B, *x_shape).

    Raises:
        InputError: for a latent site that is discrete, lies outside the plate of images, or is in
            one of the programs alone.
    """

    def __init__(self, model: Program, guide: Program | None, x: Tensor):
        self.model = model
        self.guide = guide
        self.x = x
        self._places: dict[str, tuple[slice, torch.Size]] = {}
        # Kept between evaluations: parameters are registered once, and never in the caller's store.
        self._params = pyro.get_param_store().get_state()
        with pyro.get_param_store().scope(self._params):
            self._guide_site = None if guide is None else _only_site(guide, x)

    def pack(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Site name -> (C, B, *event) to u (C, B, D)."""
        pieces: dict[str, Tensor] = {}

        def take(site: dict[str, Any]) -> Tensor:
            if site["name"] not in latents:
                raise InputError(_different_sites(site["name"], "model", "guide"))
            value = latents[site["name"]]
            pieces[site["name"]] = _bijection(site).inv(value)
            return value

        shape = next(iter(latents.values())).shape[:2]
        with torch.no_grad():
            self._score(self.model, take, shape)
        for name in latents:
            if name not in pieces:
                raise InputError(_different_sites(name, "guide", "model"))
        start = 0
        for name, piece in pieces.items():
            event = piece.shape[2:]
            self._places[name] = slice(start, start + event.numel()), event
            start += event.numel()
        u = torch.cat([piece.reshape(*shape, -1) for piece in pieces.values()], -1)
        if u.isnan().any():
            raise InputError(
                "the guide draws latents outside the support of the model's sites; give both the "
                "same support, or start from the prior (--start prior)"
            )
        return u

    def terms(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """log p(z), log p(x | z), log q(z | x) at u (C, B, D), each (C, B); all densities of u."""
        shape = u.shape[:2]
        latents: dict[str, Tensor] = {}
        log_jacobian = u.new_zeros(shape)

        def take(site: dict[str, Any]) -> Tensor:
            nonlocal log_jacobian
            if site["name"] not in self._places:
                raise InputError(_different_sites(site["name"], "model", "model's first run"))
            where, event = self._places[site["name"]]
            piece = u[..., where].reshape(*shape, *event)
            bijection = _bijection(site)
            value = bijection(piece)
            log_jacobian = log_jacobian + bijection.log_abs_det_jacobian(piece, value)
            latents[site["name"]] = value
            return value

        with pyro.validation_enabled(False):  # checking every x at every step costs a tenth
            p = self._score(self.model, take, shape)
            log_q = None
            if self._guide_site is not None:
                (name,) = latents
                site = {**self._guide_site, "value": latents[name]}
                log_q = site_log_prob(site, (shape[0], shape[1])) + log_jacobian
            elif self.guide is not None:
                q = self._score(self.guide, lambda site: latents[site["name"]], shape)
                log_q = q.log_latent + log_jacobian
        return p.log_latent + log_jacobian, p.log_observed.expand(shape), log_q

    def _score(
        self, program: Program, latent: Callable[[dict[str, Any]], Tensor], shape: torch.Size
    ) -> "_Score":
        with pyro.get_param_store().scope(self._params), _Score(latent, shape) as score:
            with_particles(program, shape[0])(self.x)
        return score


class _Score(Messenger):
    """Gives every latent site its value, and adds up the log-densities of all sites."""

    def __init__(self, latent: Callable[[dict[str, Any]], Tensor], shape: torch.Size):
        super().__init__()
        self.latent = latent
        self.shape = shape
        self.log_latent: Tensor = torch.zeros(())
        self.log_observed: Tensor = torch.zeros(())

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_latent(msg):
            if msg["fn"].batch_shape[-1:] != self.shape[1:]:
                raise InputError(
                    f"latent site {msg['name']!r} must lie in a plate of the {self.shape[1]} "
                    f"images at dim -1; its batch shape is {tuple(msg['fn'].batch_shape)}; open "
                    'pyro.plate("data", len(x), dim=-1) around it'
                )
            msg["value"] = self.latent(msg)
            msg["done"] = True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if is_bookkeeping(msg):
            return
        log_prob = site_log_prob(msg, (self.shape[0], self.shape[1]))
        if msg["is_observed"]:
            self.log_observed = self.log_observed + log_prob
        else:
            self.log_latent = self.log_latent + log_prob


def gradient(value: Tensor, u: Tensor) -> Tensor:
    """d sum(value) / du, zero where value does not depend on u; the graph is kept."""
    if not value.requires_grad:
        return torch.zeros_like(u)
    # With respect to u alone: the weights of the networks get no gradient, and none is computed.
    (grad,) = torch.autograd.grad(value.sum(), u, retain_graph=True, materialize_grads=True)
    return grad


def _only_site(guide: Program, x: Tensor) -> dict[str, Any] | None:
    """The site of a guide that has one: its distribution depends on x alone, so x is encoded once.

    A later site of a longer guide may depend on an earlier one: such a guide is run every time.
    """
    # Made without validation: a trajectory that leaves for infinity is rejected, not an error.
    with torch.no_grad(), own_streams(), pyro.validation_enabled(False):
        trace = poutine.trace(guide).get_trace(x)
    sites = [site for site in trace.nodes.values() if is_latent(site)]
    return sites[0] if len(sites) == 1 else None


def _bijection(site: dict[str, Any]) -> Transform:
    support = site["fn"].support
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    if not support.is_discrete:
        try:
            return biject_to(support)
        except NotImplementedError:
            pass
    raise InputError(
        f"latent site {site['name']!r} has support {support}, in which HMC cannot move; annealing "
        "needs continuous latents: sum a discrete one out of the model"
    )


def _different_sites(name: str, has: str, lacks: str) -> str:
    return (
        f"model and guide must have the same latent sites; {name!r} is in the {has} and not in "
        f"the {lacks}; give every site one name in both"
    )


def draw_latents(
    program: Program, x: Tensor, num_chains: int, seed: int, first_image: int = 0
) -> dict[str, Tensor]:
    """Latents of a program's own sampling, site name -> (C, B, *event), without a gradient.

    One image at a time and each with a seed of its own, so that an image's draws do not depend
    on the batch it is in: this costs one run an image, beside thousands that follow.
    """
    rows = []
    program = with_particles(program, num_chains)
    with isolated_params():
        for position in range(len(x)):
            key = f"{seed}/start/{first_image + position}"
            trace = _seeded_trace(program, x[position : position + 1], key)
            rows.append({n: s["value"].detach() for n, s in trace.nodes.items() if is_latent(s)})
    if not rows[0]:
        raise InputError(
            "the program has no latent site to anneal; sample one in the plate of images"
        )
    return {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]}


class Simulated(NamedTuple):
    """Images drawn from a model, each with a draw of its exact posterior."""

    x: Tensor
    """(N, *x_shape)."""
    latents: dict[str, Tensor]
    """Site name -> (1, N, *event): z ~ p(z) and x ~ p(x | z), so z ~ p(z | x)."""


def simulate(model: Program, like: Tensor, num_images: int, seed: int = 0) -> Simulated:
    """Run a model forward, its observed site drawn instead of observed.

    Args:
        model: Pyro program with one observed site, the x it is called with.
        like: (1 or more, *x_shape), of the shape, type and device that x should have.
        num_images: N >= 1.
        seed: of the draws; image i is the same for every N.

    Raises:
        InputError: for a model with several observed sites, or factors, and N < 1.
    """
    if num_images < 1:
        raise InputError(
            f"expected at least 1 simulated image, got {num_images}; give --num-images"
        )
    images, latents = [], []
    with torch.no_grad(), isolated_params():
        for position in range(num_images):
            program = with_particles(poutine.uncondition(model), 1)
            trace = _seeded_trace(program, like[:1], f"{seed}/simulate/{position}")
            drawn = {name: site for name, site in trace.nodes.items() if is_latent(site)}
            names = [name for name, site in drawn.items() if site["infer"].get("was_observed")]
            x = drawn[names[0]]["value"] if len(names) == 1 else like.new_zeros(())
            if x.shape[1:] != like[:1].shape:
                raise InputError(
                    f"to simulate x, the model needs one observed site, of x_shape "
                    f"{tuple(like.shape[1:])}; its observed sites are {names}; simulate x and z "
                    "yourself and give bdmc a Simulated(x, latents)"
                )
            images.append(x[0])
            latents.append({name: s["value"] for name, s in drawn.items() if name != names[0]})
    joined = {name: torch.cat([row[name] for row in latents], 1) for name in latents[0]}
    return Simulated(torch.cat(images), joined)


def _seeded_trace(program: Program, x: Tensor, key: str) -> poutine.Trace:
    with torch.no_grad(), own_streams(seed_of(key)):
        return poutine.trace(program).get_trace(x)
