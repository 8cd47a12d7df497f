"""Pyro programs as plain functions of tensors, so that a bound and its gradient can be traced.

Two handlers make a program pure: one gives every latent site its value from noise that is handed
in, one gives every ``pyro.param`` its value from tensors that are handed in. What remains is a
function of weights, x and noise, which `torch.fx` can write down once for all.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import get_dependent_plate_dims, torch_sum
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to, kl_divergence
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import counters
from pyrovae.errors import InputError
from pyrovae.importance import LogTerms, Program, is_bookkeeping, isolated_params, log_terms
from pyrovae.objectives import KLWeight
from pyrovae.proposals import from_noise
from pyrovae.streams import own_streams


class NotTraceableError(InputError):
    """Programs whose step cannot be traced once and replayed, and why."""


class Plan(NamedTuple):
    """The noise that one batch size needs."""

    noise: dict[str, tuple[torch.Size, torch.dtype]]
    """A draw of a latent site -> shape and dtype of its standard-normal noise."""

    def drawn(self, key: Tensor, number: Tensor) -> dict[str, Tensor]:
        """That noise, as a function of a key (2,) and of a counter of steps ()."""
        if not self.noise:
            return {}
        sizes = [shape.numel() for shape, _ in self.noise.values()]
        exact = any(dtype == torch.float64 for _, dtype in self.noise.values())
        # All at once: one stream of numbers, and where it is compiled for a GPU one kernel.
        numbers = counters.normals(
            key, number, sum(sizes), torch.float64 if exact else torch.float32
        )
        wanted = zip(self.noise.items(), numbers.split(sizes), strict=True)
        return {name: part.view(shape).to(dtype) for (name, (shape, dtype)), part in wanted}


class Draws(Messenger):
    """Gives each latent site its value from given noise; without noise, notes what it would take.

    Entered outside everything else, so that it meets a site last, in its final shape.
    """

    def __init__(self, noise: dict[str, Tensor] | None = None):
        super().__init__()
        self.noise = noise
        self.needs: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._met: Counter[str] = Counter()

    def __enter__(self) -> Any:
        self._met.clear()
        return super().__enter__()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if is_bookkeeping(msg):
            if fn.subsample_size is not None and fn.subsample_size < fn.size:
                raise NotTraceableError(
                    f"plate {name!r} draws a subsample of its own; draw the batch outside the "
                    "program, and pass it as x"
                )
            return
        if msg["is_observed"] or msg["done"]:
            return
        if not fn.has_rsample:
            raise NotTraceableError(
                f"site {name!r} has no reparameterised draw ({type(fn).__name__}): its "
                "gradient needs the score function"
            )
        self._met[name] += 1
        key = f"{name}/{self._met[name]}"
        # A site that is not made of normals draws for itself, inside the graph.
        value = from_noise(fn, lambda event: self._normal(key, fn, event))
        if value is not None:
            msg["value"] = value
            msg["done"] = True

    def _normal(self, key: str, fn: Any, event: torch.Size) -> Tensor:
        if self.noise is not None:
            return self.noise[key]
        shape = torch.Size(fn.batch_shape + event)
        drawn = fn.sample()
        self.needs[key] = (shape, drawn.dtype)
        return torch.randn(shape, dtype=drawn.dtype, device=drawn.device)


class Weights(Messenger):
    """Gives each ``pyro.param`` its value: from given tensors, or the module's own parameter."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name in self.values:
            constraint = msg["kwargs"].get("constraint", torch.distributions.constraints.real)
            msg["value"] = biject_to(constraint)(self.values[name])
        elif len(msg["args"]) > 1 and isinstance(msg["args"][1], Tensor) and "$$$" in name:
            msg["value"] = msg["args"][1]  # handed over by pyro.module: the tensor in use
        else:
            raise NotTraceableError(
                f"the optimiser does not hold the parameter {name!r} of Pyro's store; run the "
                "programs once, then give the optimiser the store's named_parameters()"
            )
        msg["done"] = msg["stop"] = True


class Traced:
    """The loss of two programs as a function of tensors: weights, constants, x, noise, KL weight.

    Args:
        model: Pyro program with the observed sites.
        guide: Pyro program with the latent sites.
        objective: a Pyro ELBO.
        named: what is trained: parameters of the module or of Pyro's store, by name.
        module: the module whose parameters and buffers the programs use.
        weight: a KL weight that has been put around the programs.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: ELBO,
        named: dict[str, nn.Parameter],
        module: nn.Module | None,
        weight: KLWeight | None,
    ):
        check_objective(objective)
        self.model = model
        self.guide = guide
        self.objective = objective
        self.named = named
        self.weight = weight
        inner = self._module = module if module is not None else nn.Module()
        owned = {id(p): name for name, p in inner.named_parameters()}
        store = {id(p): name for name, p in pyro.get_param_store().named_parameters()}
        self._module_names: list[str | None] = [owned.get(id(p)) for p in named.values()]
        self._store_names: list[str | None] = [
            None if id(p) in owned else store.get(id(p)) for p in named.values()
        ]
        for name, here, there in zip(named, self._module_names, self._store_names, strict=True):
            if here is None and there is None:
                raise InputError(
                    f"expected parameters of module= or of Pyro's store; {name!r} is in neither"
                )
            if not named[name].requires_grad:
                raise InputError(
                    f"expected parameters that take a gradient; {name!r} was frozen after the "
                    "optimiser was made: make it anew"
                )
        trained = {id(p) for p in named.values()}
        rest: dict[str, Tensor] = {
            n: p for n, p in inner.named_parameters() if id(p) not in trained
        }
        rest.update(inner.named_buffers())
        self._constant_names = list(rest)
        self.constants: list[Tensor] = [t.detach() for t in rest.values()]
        """Buffers and frozen parameters: inputs of the graph too, so that none is folded in."""
        self._held = self._tensors()
        self._loss = _Weighted(inner, self._losses)
        self._verified: tuple[GraphModule, Plan, Tensor] | None = None

    def check_held(self) -> None:
        """See that module and parameter store still have the tensors that a step was traced with.

        Raises:
            NotTraceableError: where one was assigned anew, came or went, was frozen or released,
                which a traced step would not notice.
        """
        now, gone = self._tensors(), (None, None)
        for name in {**self._held, **now}:
            before, after = self._held.get(name, gone), now.get(name, gone)
            if before[0] != after[0]:
                raise NotTraceableError(
                    f"{name} was assigned anew, and a traced step goes on with the tensor that was "
                    f"there; write into it, as by {name}.copy_(...), or start with --engine svi"
                )
            if before[1] != after[1]:
                raise NotTraceableError(
                    f"requires_grad of {name} was {before[1]} when training began and is "
                    f"{after[1]} now, which a traced step does not follow; set it before, or start "
                    "with --engine svi"
                )

    def _tensors(self) -> dict[str, tuple[int, bool]]:
        """Where tensors lie and whether they take a gradient, by every name they have.

        All of the module's; of Pyro's store, those that the optimiser holds.
        """
        found: dict[str, Tensor] = {}
        found.update(self._module.named_parameters(remove_duplicate=False))
        found.update(self._module.named_buffers(remove_duplicate=False))
        store = pyro.get_param_store().named_parameters()
        found.update((name, p) for name, p in store if name in self._store_names)
        return {name: (t.data_ptr(), t.requires_grad) for name, t in found.items()}

    def plan(self, x: Tensor) -> Plan:
        """Run the programs once, to learn what noise they need for x (B, *x_shape).

        Raises:
            NotTraceableError: if they change a buffer.
        """
        draws = Draws()
        params = [p.detach().requires_grad_() for p in self.named.values()]
        weight = torch.ones((), dtype=torch.float64, device=x.device)
        with own_streams(), pyro.validation_enabled(False):
            before = [t.clone() for t in self.constants]
            self._call(params, self.constants, x, draws, weight)
        changed = [
            name
            for name, old, now in zip(self._constant_names, before, self.constants, strict=True)
            if not torch.equal(old, now)
        ]
        if changed:
            for old, now in zip(before, self.constants, strict=True):
                now.copy_(old)
            raise NotTraceableError(
                f"a step changes {changed[0]}, which is no parameter (as batch normalisation "
                "does), and the traced step would not"
            )
        return Plan(draws.needs)

    def loss_and_grads(
        self,
        params: Sequence[Tensor],
        constants: Sequence[Tensor],
        x: Tensor,
        noise: dict[str, Tensor],
        weight: Tensor,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss summed over the batch, and its gradient for each parameter (None: unused)."""
        leaves = [p.detach().requires_grad_() for p in params]
        loss, surrogate = self._call(leaves, constants, x, Draws(noise), weight)
        grads = torch.autograd.grad(surrogate, leaves, allow_unused=True)
        return loss.detach(), grads

    def _call(
        self,
        params: Sequence[Tensor],
        constants: Sequence[Tensor],
        x: Tensor,
        draws: Draws,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        values = dict(zip(self._constant_names, constants, strict=True))
        stored: dict[str, Tensor] = {}
        for p, here, there in zip(params, self._module_names, self._store_names, strict=True):
            if here is not None:
                values[here] = p
            elif there is not None:
                stored[there] = p
        return self._loss.with_weights(values, x, draws, stored, weight)

    def _losses(
        self, x: Tensor, draws: Draws, stored: dict[str, Tensor], weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        kept = self.weight.value if self.weight is not None else None
        if self.weight is not None:
            self.weight.value = weight
        try:
            with Weights(stored), draws:
                return losses(self.objective, self.model, self.guide, x)
        finally:
            if self.weight is not None and kept is not None:
                self.weight.value = kept

    def graph(self, plan: Plan, x: Tensor) -> GraphModule:
        """`loss_and_grads` as a graph of (*params, *constants, x, *noise, weight).

        Raises:
            NotTraceableError: where Python asks for the value of a tensor.
        """
        params = [p.detach() for p in self.named.values()]
        count, fixed = len(params), len(params) + len(self.constants)

        def function(*flat: Tensor) -> tuple[Tensor | None, ...]:
            noise = dict(zip(plan.noise, flat[fixed + 1 : -1], strict=True))
            given = (flat[:count], flat[count:fixed], flat[fixed], noise, flat[-1])
            loss, grads = self.loss_and_grads(*given)
            return (loss, *grads)

        noise = [torch.zeros(s, dtype=d, device=x.device) for s, d in plan.noise.values()]
        weight = torch.ones((), dtype=torch.float64)
        return trace(function, *params, *self.constants, x, *noise, weight)

    def verify(self, plan: Plan, x: Tensor) -> None:
        """Hold the traced loss and gradients against the Pyro objective, on the same noise.

        Raises:
            NotTraceableError: if loss or a gradient differ, or the programs cannot be traced.
        """
        verified = self.graph(plan, x), plan, x
        loss, grads, expected, truth = self._twice(*verified)
        compare("the loss of the traced step", loss, expected)
        for name, ours, theirs in zip(self.named, grads, truth, strict=True):
            if (ours is None) != (theirs is None):
                raise NotTraceableError(f"the traced step and Pyro disagree on the use of {name}")
            if ours is not None and theirs is not None:
                compare(f"the traced gradient of {name}", ours, theirs)
        self._verified = verified
        self._gradient_was = _norm(truth)

    def check_same(self) -> None:
        """See that the programs still are what `verify` held against Pyro.

        Raises:
            NotTraceableError: if not, as where they read a number or a switch that has changed.
        """
        if self._verified is None:
            return
        loss, grads, expected, truth = self._twice(*self._verified)
        images = len(self._verified[2])
        # Not as closely as at first: a loss may cross 0 and gradients end there, and what is left
        # of them is rounding.
        far = abs(float(loss - expected)) / (abs(float(expected)) + images)
        zero = torch.zeros((), device=loss.device)  # of a parameter that is not used
        turn = [
            (zero if a is None else a) - (zero if b is None else b)
            for a, b in zip(grads, truth, strict=True)
        ]
        turned = _norm(turn) / max(_norm(truth), self._gradient_was, 1e-6)
        if max(far, turned) > 1e-3:
            raise NotTraceableError(
                f"the programs changed after the step was traced: on the same noise, its loss is "
                f"{float(loss) / images:.4g} per image, and theirs is now "
                f"{float(expected) / images:.4g}. A number or a switch that they read in Python is "
                "a constant of a traced step; let it be a tensor of the module, changed by "
                "copy_(...), or start with --engine svi"
            )

    def _twice(
        self, graph: GraphModule, plan: Plan, x: Tensor
    ) -> tuple[Tensor, list[Tensor | None], Tensor, list[Tensor | None]]:
        """Loss and gradients by the graph, and by Pyro, on the same noise."""
        params = [p.detach() for p in self.named.values()]
        with own_streams(), pyro.validation_enabled(False):
            noise = {
                key: torch.randn(shape, dtype=dtype, device=x.device)
                for key, (shape, dtype) in plan.noise.items()
            }
            state = _random_states(x.device)
            number = 1.0 if self.weight is None else self.weight.number
            weight = torch.tensor(number, dtype=torch.float64, device=x.device)
            loss, *grads = graph(*params, *self.constants, x, *noise.values(), weight)
            _put_random_states(x.device, state)  # for sites that draw inside the graph
            expected, truth = self._by_pyro(x, noise)
        return loss, grads, torch.as_tensor(expected, device=x.device), truth

    def _by_pyro(self, x: Tensor, noise: dict[str, Tensor]) -> tuple[float, list[Tensor | None]]:
        # Also of parameters that somebody else trains.
        held = {id(p): p for p in (*self.named.values(), *self._module.parameters())}.values()
        kept = [p.grad for p in held]
        for p in held:
            p.grad = None
        try:
            with isolated_params(), Draws(noise):
                # SVI captures parameters in a trace of its own; a Pyro objective needs no more.
                loss = self.objective.loss_and_grads(self.model, self.guide, x)
            return float(loss), [p.grad for p in self.named.values()]
        finally:
            for p, grad in zip(held, kept, strict=True):
                p.grad = grad


def _norm(gradients: Sequence[Tensor | None]) -> float:
    """Of all together; one by one, for there may be no room for another copy of them all."""
    squares = [g.detach().norm(dtype=torch.float64).square() for g in gradients if g is not None]
    return float(torch.stack(squares).sum().sqrt())


def trace(function: Callable[..., Any], *example: Tensor) -> GraphModule:
    """Write down the operations of a function, with stand-ins for its tensors.

    Raises:
        NotTraceableError: where Python asks for the value of a tensor, so that the operations
            would depend on data.
    """
    try:
        # On one thread: autograd would run a GPU's part on another, which traces nothing.
        with pyro.validation_enabled(False), torch.autograd.set_multithreading_enabled(False):
            # Stand-ins have no values: `if x.sum() > 0` is an error, and not a branch taken.
            return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)
    except NotTraceableError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise NotTraceableError(
            f"the programs ask for a tensor's value, or use what torch.fx cannot trace: {reason}"
        ) from error


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _put_random_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


class _Weighted(nn.Module):
    """A function of a module, with the weights of that module handed in."""

    def __init__(self, inner: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.inner = inner
        self._function = function

    def forward(self, *args: Any) -> Any:
        return self._function(*args)

    def with_weights(self, weights: dict[str, Tensor], *args: Any) -> Any:
        """The function's value where the module has these weights, by their names in it."""
        swapped = {f"inner.{name}": t for name, t in weights.items()}
        return torch.func.functional_call(self, swapped, args)


class TracedTerms:
    """The terms of the log-weights, (K, B), as a function of weights, x and noise.

    Args:
        model: Pyro program with the observed sites.
        guide: Pyro program with the latent sites, all made of normals.
        module: the module whose parameters and buffers they use.
        num_particles: K.
    """

    def __init__(self, model: Program, guide: Program, module: nn.Module, num_particles: int):
        self.model = model
        self.guide = guide
        self.num_particles = num_particles
        self._names = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
        self._count = len(list(module.parameters()))
        self.weights = [t.detach() for t in (*module.parameters(), *module.buffers())]
        """The module's own tensors: what is written into them is seen."""
        self._terms = _Weighted(module, self._run)

    def _run(self, x: Tensor, draws: Draws) -> LogTerms:
        with Weights({}), draws:
            return log_terms(self.model, self.guide, x, self.num_particles)

    def _call(self, weights: Sequence[Tensor], x: Tensor, draws: Draws) -> LogTerms:
        # Pyro would warn of parameters that want no gradient.
        leaves = [t.detach().requires_grad_() for t in weights[: self._count]]
        values = dict(zip(self._names, (*leaves, *weights[self._count :]), strict=True))
        return self._terms.with_weights(values, x, draws)

    def plan(self, x: Tensor) -> Plan:
        """Run the programs once, to learn what noise they need for x (B, *x_shape)."""
        draws = Draws()
        with (
            own_streams(),
            pyro.validation_enabled(False),
            torch.no_grad(),
        ):
            self._call(self.weights, x, draws)
        return Plan(draws.needs)

    def graph(self, x: Tensor) -> tuple[GraphModule, dict[str, torch.Size]]:
        """A graph of (*weights, x, *noise) -> log p(x | z), log p(z), log q(z | x), *z.

        With it, the sites that the noise and the draws belong to, and the event shape of each.

        Raises:
            NotTraceableError: where Python asks for the value of a tensor.
        """
        plan = self.plan(x)
        count = len(self.weights)

        def function(*flat: Tensor) -> tuple[Tensor, ...]:
            noise = dict(zip(plan.noise, flat[count + 1 :], strict=True))
            terms = self._call(flat[:count], flat[count], Draws(noise))
            return (*terms[:3], *terms.latents.values())

        noise = [torch.zeros(s, dtype=d, device=x.device) for s, d in plan.noise.values()]
        with torch.no_grad():
            graph = trace(function, *self.weights, x, *noise)
        return graph, {key.rpartition("/")[0]: s[2:] for key, (s, _) in plan.noise.items()}


def check_objective(objective: ELBO) -> None:
    """Refuse an objective whose bound is not known here."""
    if not hasattr(objective, "losses") and type(objective) not in _LOSSES:
        known = ", ".join(kind.__name__ for kind in _LOSSES)
        raise NotTraceableError(
            f"expected one of Pyro's {known}, or an objective with losses(model, guide, x); got "
            f"{type(objective).__name__}"
        )


def losses(objective: ELBO, model: Program, guide: Program, x: Tensor) -> tuple[Tensor, Tensor]:
    """The loss summed over the batch, and the surrogate whose gradient is descended; both ().

    What `loss_and_grads` of the objective computes, without reading a number back to Python.
    """
    own = getattr(objective, "losses", None)
    if own is not None:
        return own(model, guide, x)
    loss = _LOSSES[type(objective)](objective, list(objective._get_traces(model, guide, (x,), {})))
    return loss, loss


Traces = list[tuple[poutine.Trace, poutine.Trace]]


def _elbo(objective: Any, traces: Traces) -> Tensor:
    total = [g.log_prob_sum() - m.log_prob_sum() for m, g in traces]
    return torch.as_tensor(sum(total)) / objective.num_particles


def _mean_field(objective: Any, traces: Traces) -> Tensor:
    loss: Any = 0.0
    for model, guide in traces:
        for name, site in model.nodes.items():
            if site["type"] != "sample":
                continue
            loss = (
                loss - site["log_prob_sum"]
                if site["is_observed"]
                else loss + _kl(guide.nodes[name], site)
            )
        for name, site in guide.nodes.items():
            if site["type"] == "sample" and name not in model.nodes:
                loss = loss + site["log_prob_sum"]
    return loss / objective.num_particles


def _kl(guide_site: dict[str, Any], model_site: dict[str, Any]) -> Tensor:
    try:
        kl = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:  # Pyro falls back on the draw, and so does this
        return guide_site["log_prob_sum"] - model_site["log_prob_sum"]
    return scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"]).sum()


def _renyi(objective: Any, traces: Traces) -> Tensor:
    particles = []
    for model, guide in traces:
        dims = get_dependent_plate_dims(model.nodes.values())
        log_weight: Any = 0.0
        for trace, sign in ((model, 1), (guide, -1)):
            for site in trace.nodes.values():
                if site["type"] == "sample":
                    log_weight = log_weight + sign * torch_sum(site["log_prob"], dims)
        particles.append(log_weight)
    vectorized = objective.vectorize_particles and objective.num_particles > 1
    log_weights = particles[0] if vectorized else torch.stack(particles)
    order = 1.0 - objective.alpha
    log_mean = torch.logsumexp(order * log_weights, 0) - math.log(objective.num_particles)
    return -log_mean.sum() / order


_LOSSES: dict[type[ELBO], Any] = {
    Trace_ELBO: _elbo,
    TraceMeanField_ELBO: _mean_field,
    RenyiELBO: _renyi,
}


def compare(
    what: str, ours: Tensor, theirs: Tensor, whose: str = "Pyro's", tolerance: float = 1e-3
) -> None:
    """Raise NotTraceableError unless two results are equal up to rounding.

    The tolerance is a part of the result's size: float32 rounds ten times below the default, and a
    wrong constant is far above it.
    """
    size = theirs.detach().double().norm()
    error = (ours.detach().double() - theirs.detach().double()).norm()
    # What is not finite on both sides is the step's to report.
    if bool(torch.isfinite(size)) and not bool(error <= tolerance * size + 1e-6):
        raise NotTraceableError(
            f"{what} differs from {whose} by {float(error / size):.1e} of its size, on the same "
            "noise: the programs do something that depends on more than x and their draws, such "
            "as dropout or a counter"
        )
