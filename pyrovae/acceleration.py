"""The fast SVI step: Pyro's handlers run once, the rest is compiled.

A stock ``SVI.step`` spends most of a small network's time in Python: handlers, plates, traces, and
an optimiser for each parameter. None of that depends on the data. So the programs are run once
with stand-in tensors, and every operation of the bound, of its gradient and of the optimiser is
written down (`torch.fx`) and compiled (Inductor); a CUDA graph may hold the result. Whatever
changes between steps is an input of that graph and never a constant in it: weights, the optimiser's
state, the batch, the learning rate, the KL weight. The noise is made within, from the run's seed
and the number of the step.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.fx import GraphModule

from pyrovae import compiling, counters, tracing
from pyrovae.compiling import Compiled
from pyrovae.data import Split
from pyrovae.errors import InputError
from pyrovae.importance import Program
from pyrovae.objectives import KLWeight
from pyrovae.optimizers import (
    WholeModelOptimizer,
    after_step,
    average_decay,
    corrections,
    moved,
    slots,
    works_between_steps,
)
from pyrovae.precision import networks_in, stands
from pyrovae.recording import NotRecordableError, Recording
from pyrovae.streams import own_streams, seed_of
from pyrovae.tracing import Draws, NotTraceableError, Plan, Traced

# A look at whether the programs still are those that were traced may take such a part of the time
# that steps take.
_LOOKING = 0.01
# Steps that wait to be taken together: as many as take so many seconds, and at most so many.
_LONGEST_QUEUE = 32
_PATIENCE = 0.05


class CompiledSVI:
    """`pyro.infer.SVI` with a step that was traced once and compiled.

    ``step`` lowers the loss as ``SVI.step`` does, but for rounding, several times faster.
    The loss that it returns is a tensor that nobody waits for. A step whose loss or gradient is
    not finite changes nothing, nor does any step after it; `check` tells, and is called every so
    many steps.

    Each batch size is traced once. The first is compiled; another one, such as the ragged last
    batch of an epoch, replays its traced operations one by one, or from a CUDA graph of its own.
    Before the first step, loss and gradients of the graph are held against those of ``loss``
    itself, on the same noise. A number or a switch that the programs read in Python is a constant
    of the graph: where one changes later, and with it loss or gradient by a thousandth, `check` and
    `check_programs` tell, and the remedy is a tensor.

    Args:
        model: Pyro program with the observed sites.
        guide: Pyro program with the latent sites, all of them reparameterised.
        optim: holds what is trained: parameters of ``module``, or of Pyro's store.
        loss: `objectives.elbo()`, ... or another Pyro ELBO of those classes.
        module: the module whose parameters and buffers the programs use, if they use one.
        split: with it, ``step`` takes indices, and draws the batch of this split inside the graph.
        weight: the KL weight that has been put around the programs; it may change between steps.
        average: moving averages of the module's state, by name, and their decay.
        mode: "compiled", "cuda-graph", or "traced", which replays without compiling.
        precision: "fp32", "tf32" or "bf16", of the networks' matrix products and nothing else.
        seed: of the noise, which is a function of it and of the step's number (`counters`): draws
            of x where ``split`` samples it, and of the sites that are made of normals. Other sites
            draw from torch's own stream.
        reduce: sums a flat tensor over all processes, in place; None: there is only this one.

    Raises:
        NotTraceableError: for programs that cannot be traced, and why; or whose traced loss or
            gradients are not those of ``loss``.

    >>> import pyro, pyro.distributions as dist
    >>> from pyrovae import objectives
    >>> def model(x):
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     slope = pyro.param("slope", torch.tensor(0.0))
    ...     with pyro.plate("data", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(slope * x, 0.7))
    >>> x = torch.linspace(-2, 2, 64)
    >>> _ = guide(x)  # the parameter is born
    >>> optim = WholeModelOptimizer(pyro.get_param_store().named_parameters(), lr=0.05)
    >>> svi = CompiledSVI(model, guide, optim, objectives.elbo(), mode="traced")
    >>> for _ in range(50):
    ...     loss = svi.step(x)
    >>> bool(0.3 < pyro.param("slope") < 0.7)  # the posterior's is 1/2
    True
    >>> pyro.clear_param_store()
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: WholeModelOptimizer,
        loss: ELBO,
        *,
        module: nn.Module | None = None,
        split: Split | None = None,
        weight: KLWeight | None = None,
        average: tuple[dict[str, Tensor], float] | None = None,
        mode: str = "compiled",
        precision: str = "fp32",
        seed: int = 0,
        reduce: Callable[[Tensor], object] | None = None,
    ):
        self.optim = optim
        self.mode = mode
        self.precision = precision
        self.weight = weight
        self.decay = 0.0 if average is None else average[1]
        self.reduce = reduce
        self._module = module
        self._traced = Traced(model, guide, loss, optim.named, module, weight)
        self._params = list(optim.named.values())
        self.device = self._params[0].device
        self.split = None if split is None else split.to(self.device)
        # What Python decides at each step, written into one place: to make a tensor takes longer.
        # In memory that is not pinned, which a copy to a GPU has read when it returns. A step that
        # waits in the queue has a row of its own.
        wide = self._params[0].dtype == torch.float64
        kind = torch.float64 if wide else torch.float32
        self._rows = list(torch.zeros(_LONGEST_QUEUE, 6, dtype=kind, device="cpu"))
        self._numbers = [row.numpy() for row in self._rows]
        keys = [counters.key_of(seed_of(f"{seed}/{what}")) for what in "xz"]
        self._keys = torch.stack(keys).to(self.device)
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)
        """The losses of all steps, summed; set it to what it should start from."""
        self._averages = _averages(average, module, self._params)
        self._steps: dict[int, _Step] = {}
        # Seconds of steps since the last look, and how many of them are worth the next one.
        self._stepping = self._look_after = 0.0
        self._began = 0.0  # of the first step since the last check
        self.uncompiled = ""
        """Why the step was captured as it was traced, if it could not be compiled."""
        self._unused: list[bool] = []
        self._bound: list[tuple[Tensor, ...]] = []
        self._health = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.bind()

    def bind(self, count: int | None = None) -> None:
        """Take up the optimiser's state as it is; to be called after a checkpoint is loaded.

        Args:
            count: of the steps taken so far; by default the optimiser's, which is in float32, and
                so stands still from 16.8 million on.
        """
        self._queue: list[Tensor] = []  # whatever waited was for other weights
        optimizer = self.optim.optimizer
        moments = [slots(optimizer, p) for p in self._params]
        if self._bound:  # what is captured holds these very tensors
            for p, ours, loaded in zip(self._params, self._bound, moments, strict=True):
                _keep(optimizer.state[p], ours, loaded)
            moments = self._bound
        self._bound = moments
        self._moments = [len(each) for each in moments]
        counts = (int(optimizer.state[p]["step"]) for p in self._params)
        self.count = max(counts, default=0) if count is None else count
        """Steps taken so far."""
        # Steps taken, as the device counts them, and the number of the first that failed, or 0.
        self._health.copy_(torch.tensor([self.count, 0]))
        # What a step changes, in place: aliases of what module and optimiser hold.
        self._state = [
            *(p.detach() for p in self._params),
            *(moment for each in moments for moment in each),
            *(average for average in self._averages if average is not None),
            self.total,
            self._health,
        ]
        self._mark()

    def _mark(self) -> None:
        """Remember the batches from here on, so that a step that fails can be looked at."""
        self._marked = self.count
        self._since: list[Tensor] = []

    def step(self, batch: Tensor, images: int | None = None) -> Tensor:
        """Move every parameter once; the loss summed over the batch, a tensor of shape ().

        Args:
            batch: x (B, *x_shape), or, with a split, the indices (B,) of its images.
            images: of all processes together, where there are several; default B.
        """
        self._enqueue(batch, images)
        return self._take()

    def queue(self, batch: Tensor, images: int | None = None) -> None:
        """Take such a step soon: with others, if that is faster, and before `check` or `step`.

        Its learning rate and KL weight are those of now. Until then parameters, ``total`` and
        ``count`` may be those of earlier steps, and ``batch`` must stay as it is.

        Args:
            batch: as of `step`.
            images: likewise.
        """
        step = self._enqueue(batch, images)
        if len(self._queue) >= step.room:
            self._take()

    def flush(self) -> None:
        """Take the steps that are in the queue."""
        if self._queue:
            self._take()

    def _enqueue(self, batch: Tensor, images: int | None) -> "_Step":
        batch = batch.contiguous()  # each process has every n-th index; kernels want a fixed layout
        if self._queue and len(self._queue[0]) != len(batch):
            self._take()
        step = self.prepare(batch)
        step.check(batch)
        waiting = len(self._queue)
        self._decide(images or len(batch), self.count + waiting + 1, waiting)
        self._queue.append(batch)
        return step

    def _take(self) -> Tensor:
        """Take the steps of the queue, which is not empty; the loss of the last of them."""
        batches, self._queue = self._queue, []
        # Counted first: whoever interrupts a step finds it taken.
        self.count += len(batches)
        if not self._since:
            self._began = time.monotonic()
        self._since += batches
        loss = self._steps[len(batches[0])].run(batches, self._rows)
        after_step(self.optim.optimizer, self.count)
        return loss

    def prepare(self, batch: Tensor) -> "_Step":
        """Trace the step for batches like this one, if that has not been done."""
        size = len(batch)
        if size not in self._steps:
            self.flush()
            self._steps[size] = self._built(batch.contiguous())
        return self._steps[size]

    def check(self) -> None:
        """Take the steps of the queue, and wait for all of them.

        Raises:
            FloatingPointError: if one failed, with its number.
            NotTraceableError: if a tensor of the module was assigned anew, or frozen or released;
                or as `check_programs`, which a single process asks now and then: the module must be
                in the mode, train or eval, that it was traced in.
        """
        self.flush()
        self._traced.check_held()
        failed = int(self._health[1])
        if failed:
            raise FloatingPointError(f"the loss or a gradient of step {failed} is not finite")
        if self._since:
            self._stepping += time.monotonic() - self._began
        self._mark()
        if self.reduce is None and self._stepping >= self._look_after:
            self.check_programs()

    def check_programs(self) -> None:
        """See that the programs compute what they did when they were traced.

        Raises:
            NotTraceableError: if they do not, as after a number that they read has changed.
        """
        started = time.monotonic()
        try:
            with networks_in(self._module, self.precision):
                self._traced.check_same()
        except torch.OutOfMemoryError:  # a step that is traced takes less than one that is not
            self._look_after = math.inf
            warnings.warn(
                "too little memory is left to see whether the programs are what they were when "
                "they were traced",
                stacklevel=2,
            )
            return
        self._stepping, self._look_after = 0.0, (time.monotonic() - started) / _LOOKING

    def failed(self) -> tuple[int, Tensor, Draws]:
        """The step that `check` complained of: its number, its x, and a handler with its noise.

        The noise of sites made of normals, as above.
        """
        number = int(self._health[1])
        batch = self._since[number - self._marked - 1]
        plan = self._steps[len(batch)].plan
        before = (self._health[1] - 1).to(torch.int32)
        x, noise = self._drawn(plan, batch, self._data(), self._keys, before)
        return number, x, Draws(noise)

    def save(self) -> dict[str, Any]:
        """Bring the optimiser's state up to date; returns what else a checkpoint needs."""
        self.flush()
        for p in self._params:
            self.optim.optimizer.state[p]["step"].fill_(self.count)
        return {"mode": self.mode, "by_index": self.split is not None, "count": self.count}

    # Inputs of a step that are not state.

    def _decide(self, images: int, count: int, place: int = 0) -> None:
        """Rate, corrections, KL weight, 1 / images, 1 - averages' decay, of step ``count``.

        They are written into the row of that place in the queue.
        """
        optimizer = self.optim.optimizer
        weight = 1.0 if self.weight is None else self.weight.number
        lr = optimizer.param_groups[0]["lr"]
        decay = average_decay(self.decay, count)
        # Rounded here, once: kernels would round and divide anew for every few weights.
        row = lr, *corrections(optimizer, count), weight, 1 / images, 1 - decay
        self._numbers[place][:] = row

    def _data(self) -> list[Tensor]:
        return [] if self.split is None else [self.split.raw]

    def _fixed(self) -> list[Tensor]:
        return [*self._state, *self._traced.constants, *self._data(), self._keys]

    def _drawn(
        self,
        plan: Plan,
        batch: Tensor,
        data: Sequence[Tensor],
        keys: Tensor,
        before: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, *x_shape), and the noise of each draw of z, of the step after so many others."""
        x = batch
        if self.split is not None:
            raw = data[0].index_select(0, batch)
            x = self.split.sampled(raw, self.split.noise(len(batch), keys[0], before))
        return x, plan.drawn(keys[1], before)

    # What is traced.

    def _built(self, batch: Tensor) -> "_Step":
        """Trace the step for one batch size; verify and compile the first, capture every one."""
        size = len(batch)
        first = not self._steps
        with networks_in(self._module, self.precision):
            before = torch.zeros((), dtype=torch.int32, device=self.device)
            x, _ = self._drawn(Plan({}), batch, self._data(), self._keys, before)
            plan = self._traced.plan(x)
            if first:
                self._traced.verify(plan, x)
                self._traced.check_held()  # the programs have run as they are
            self._decide(size, self.count + 1)  # a step 0 divides by 0
            row = self._rows[0].to(self.device)
            example = [*self._fixed(), batch, row]
            if self.reduce is None:
                graphs = [tracing.trace(lambda *flat: self._whole(flat, plan), *example)]
            else:
                vector = torch.zeros(1 + sum(p.numel() for p in self._params), device=self.device)
                graphs = [
                    tracing.trace(lambda *flat: self._local(flat, plan), *example),
                    tracing.trace(self._apply, *self._state, vector, row),
                ]
        mode = "traced" if self.mode == "compiled" and not first else self.mode
        step = _Step(self, plan, graphs, mode, batch)
        # A graph keeps the kernels that the switches chose when it was captured.
        with networks_in(None, self.precision):
            if first and mode != "traced":
                try:
                    step.compile(batch, row)
                except NotTraceableError as error:
                    if not step.captures:
                        raise
                    self.uncompiled = str(error)  # what was traced can be captured as it is
                step.record(batch, row)
            try:
                step.capture(batch, row)
            except NotTraceableError:
                if first:
                    raise
                return _Step(self, plan, graphs, "traced", batch)  # slower, of a few batches alone
        return step

    def _whole(self, flat: Sequence[Tensor], plan: Plan) -> Tensor:
        """The whole step: the loss, its gradient, and the update, in place."""
        loss, grads = self._loss_and_grads(flat, plan)
        self._update(flat[: len(self._state)], loss, grads, flat[-1])
        return loss

    def _local(self, flat: Sequence[Tensor], plan: Plan) -> Tensor:
        """This process's share: loss and gradients as one vector."""
        loss, grads = self._loss_and_grads(flat, plan)
        self._unused = [g is None for g in grads]
        whole = zip(self._params, grads, strict=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in whole]
        return torch.cat([loss.reshape(1), *(g.reshape(-1) for g in parts)])

    def _apply(self, *flat: Tensor) -> Tensor:
        """The update, from the vector that all processes have summed."""
        *state, vector, row = flat
        loss, rest = vector[0], vector[1:]
        sizes = [p.numel() for p in self._params]
        # A parameter that the programs do not use has no gradient, which is not a gradient of 0:
        # weight decay would shrink it.
        grads = [
            None if unused else g.view_as(p)
            for g, p, unused in zip(rest.split(sizes), self._params, self._unused, strict=True)
        ]
        self._update(state, loss, grads, row)
        return loss.clone()

    def _loss_and_grads(
        self, flat: Sequence[Tensor], plan: Plan
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        state, rest = flat[: len(self._state)], flat[len(self._state) :]
        constants, rest = rest[: len(self._traced.constants)], rest[len(self._traced.constants) :]
        *data, keys, batch, row = rest
        before = state[-1][0].to(torch.int32)
        x, noise = self._drawn(plan, batch, data, keys, before)
        params, weight = state[: len(self._params)], row.to(state[0].dtype)[3]
        return self._traced.loss_and_grads(params, constants, x, noise, weight)

    def _update(
        self, state: Sequence[Tensor], loss: Tensor, grads: Sequence[Tensor | None], row: Tensor
    ) -> None:
        rest = iter(state)
        params = [next(rest) for _ in self._params]
        moments = [[next(rest) for _ in range(count)] for count in self._moments]
        averages = [None if average is None else next(rest) for average in self._averages]
        total, health = rest
        row = row.to(params[0].dtype)  # of 16 bits perhaps, which Python's numbers were not
        lr, corrections, scale, renewal = row[0], (row[1], row[2]), row[4], row[5]
        square: Any = sum(_sum((g * scale).square()) for g in grads if g is not None)
        norm = square.sqrt()
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        fine = _once(finite & (health[1] == 0))
        clip = self.optim.clip_norm
        if clip is not None:
            scale = _once(scale * torch.clamp(clip / (norm + 1e-6), max=1.0))

        def put(old: Tensor, new: Tensor) -> None:
            old.copy_(torch.where(fine, new, old))

        for p, grad, old, average in zip(params, grads, moments, averages, strict=True):
            new = p
            if grad is not None:
                new, *values = moved(self.optim.optimizer, p, grad * scale, old, lr, corrections)
                for moment, value in zip(old, values, strict=False):
                    put(moment, value)
            if average is not None:
                put(average, torch.lerp(average, new, renewal))
            if grad is not None:
                put(p, new)
        put(total, total + loss)
        number = torch.where((health[1] == 0) & ~finite, health[0] + 1, health[1])
        health.copy_(torch.stack([health[0] + 1, number]))


def _sum(values: Tensor) -> Tensor:
    """Of all numbers; by a CPU row by row, which takes half the time of one long sum."""
    by_rows = values.dim() > 1 and not values.is_cuda
    return (values.flatten(1).sum(1) if by_rows else values).sum()


def _once(value: Tensor) -> Tensor:
    """A value of shape () that a CPU's kernels read, where they would compute it at every use.

    Inductor repeats what a scalar is made of within the loops that use it; two scalars stacked
    get a place in memory. On a GPU that would be one kernel more, and save nothing.
    """
    return value if value.is_cuda else torch.stack([value, value])[0]


class _Step:
    """The traced step for one batch size, as it is run: compiled, captured, or replayed."""

    def __init__(
        self, svi: CompiledSVI, plan: Plan, graphs: list[GraphModule], mode: str, batch: Tensor
    ):
        self.svi = svi
        self.plan = plan
        self._traced = graphs
        self._graphs: list[Callable[..., Tensor]] = list(graphs)
        self.captures = mode == "cuda-graph" and svi.reduce is None
        self._fixed = svi._fixed()
        self._replay: Callable[..., Tensor] | None = None
        self._recording: Recording | None = None
        self._kind = (batch.shape, batch.dtype, batch.device)
        self.refusal = "it is not compiled for a CPU, or there are several processes"
        """Why it is not recorded, if it is not."""
        self.room = 1
        """Steps that are taken together, while others wait for them."""

    def compile(self, batch: Tensor, row: Tensor) -> None:
        """Compile, and hold what was compiled against what was traced, on copies of the state.

        Raises:
            NotTraceableError: if compilation fails, or loss or moments (linear in the gradient)
                differ, or what is counted.
        """
        expected, _ = self._tried(batch, row)
        # A kernel may keep in float32 what the traced operations round to bfloat16 in between.
        tolerance = 2e-2 if self.svi.precision == "bf16" else 1e-3

        def checked(options: compiling.Options) -> list[Callable[..., Tensor]]:
            results, graphs = self._tried(batch, row, options)
            for theirs, ours in zip(expected, results, strict=True):
                tracing.compare(
                    "a result of the compiled step", ours, theirs, "the traced one's", tolerance
                )
            return graphs

        self._graphs = compiling.first_that_works(self.svi.device, checked)

    def _tried(
        self, batch: Tensor, row: Tensor, options: compiling.Options | None = None
    ) -> tuple[list[Tensor], list[Callable[..., Tensor]]]:
        """A step on a copy of the state: some of its results, and the graphs that it was done by.

        Compiled where there are options. Whatever draws from torch's stream draws the same.
        """
        svi = self.svi
        state, rest = [t.clone() for t in svi._state], self._fixed[len(svi._state) :]
        inputs, out = [*state, *rest, batch, row], row
        graphs: list[Callable[..., Tensor]] = []
        for traced in self._traced:
            way = None if options is None else compiling.compiled(traced, inputs, options)
            graphs.append(traced if way is None else way)
            with torch.no_grad(), own_streams(0):
                try:
                    out = graphs[-1](*inputs)
                except RuntimeError as error:
                    if way is None:
                        raise
                    raise NotTraceableError(f"what was compiled fails: {error}") from error
            inputs = [*state, out, row]
        # Of each parameter the first moment, which follows the parameters; the last two are counts.
        first = [sum(svi._moments[:i], len(svi._params)) for i in range(len(svi._moments))]
        return [out, *(state[i] for i in first), *state[-2:]], graphs

    def capture(self, batch: Tensor, row: Tensor) -> None:
        """Capture the step in a CUDA graph, if it is to be replayed from one.

        Raises:
            NotTraceableError: if that cannot be done, while another engine can still be taken.
        """
        if self.captures:
            try:
                self._captured(batch, row)
            except RuntimeError as error:
                reason = str(error).strip().split("\n")[0]
                raise NotTraceableError(f"the step cannot be captured: {reason}") from error

    def record(self, batch: Tensor, row: Tensor) -> None:
        """Have the compiled step played without Python, where it can be recorded.

        It is held against the compiled step first, and given up where they differ.
        """
        graph = self._graphs[0]
        if self.svi.reduce is not None or row.is_cuda or not isinstance(graph, Compiled):
            return
        given = [batch.clone(), row.clone()]
        state = self.svi._state
        kept, theirs = ([t.clone() for t in state] for _ in range(2))
        try:
            recording = graph.recorded([*self._fixed, *given], given)
            with torch.no_grad():
                expected = graph(*theirs, *self._fixed[len(state) :], batch, row)
                losses = recording.play([(batch, row)])
            pairs = zip([losses[0], *state], [expected, *theirs], strict=True)
            if not all(_are_same(ours, other) for ours, other in pairs):
                raise NotRecordableError("played, it is another function than called")
            self._recording = recording
            self.refusal = ""
        except (NotRecordableError, RuntimeError) as error:  # slower without, and no worse
            self.refusal = str(error)
        finally:
            for t, old in zip(state, kept, strict=True):
                t.copy_(old)

    def check(self, batch: Tensor) -> None:
        """Refuse a batch that is not like the one this step was traced for."""
        if (batch.shape, batch.dtype, batch.device) != self._kind:
            shape, dtype, device = self._kind
            raise InputError(
                f"expected each batch of {shape[0]} to be {dtype} {tuple(shape)} on {device}, as "
                f"the first was; got {batch.dtype} {tuple(batch.shape)} on {batch.device}"
            )

    def run(self, batches: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        """A step for each batch, with its row; the loss of the last one, summed over the batch."""
        runs = list(zip(batches, rows, strict=False))
        # Products read the switch for tf32 when they run (a captured one has chosen its kernels);
        # bf16 is in the graph. To ask is sooner done than to turn it.
        if self.captures or stands(self.svi.precision, self.svi.device):
            with torch.no_grad():
                return self._run(runs)
        with torch.no_grad(), networks_in(None, self.svi.precision):
            return self._run(runs)

    def _run(self, runs: list[tuple[Tensor, Tensor]]) -> Tensor:
        if self._recording is not None and not self._recording.stands():
            self._recording, self.room = None, 1
            self.refusal = "a tensor was moved in memory"
        if self._recording is None:
            return [self._once(*run) for run in runs][-1]
        started = time.perf_counter()
        losses = self._recording.play(runs)
        # Autograd sees who writes by torch's operations, and nobody else.
        torch.autograd.graph.increment_version(self.svi._state)
        if not works_between_steps(self.svi.optim.optimizer):
            each = (time.perf_counter() - started) / len(runs)
            self.room = min(max(int(_PATIENCE / each), 1), _LONGEST_QUEUE)
        return losses[-1]

    def _once(self, batch: Tensor, row: Tensor) -> Tensor:
        if self.captures:
            return self._captured(batch, row)(batch, row)
        return self._call(batch, row.to(self.svi.device, non_blocking=True))

    def _captured(self, batch: Tensor, row: Tensor) -> Callable[..., Tensor]:
        if self._replay is None:
            with compiling.quiet_compiler():
                self._replay = compiling.captured(self._call, self.svi._state, [batch, row])
        return self._replay

    def _call(self, *inputs: Tensor) -> Tensor:
        first = self._graphs[0](*self._fixed, *inputs)
        if self.svi.reduce is None:
            return first
        self.svi.reduce(first)
        return self._graphs[1](*self.svi._state, first, inputs[-1])


def _are_same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two finite results differ by rounding alone, of the same kernels in other memory."""
    size, error = theirs.double().norm(), (ours.double() - theirs.double()).norm()
    return bool(error <= 1e-4 * size)


def _keep(state: dict[str, Any], ours: Sequence[Tensor], loaded: Sequence[Tensor]) -> None:
    """Write loaded values into the tensors that are held, and put these back in the state."""
    for key, value in state.items():
        for mine, other in zip(ours, loaded, strict=True):
            if value is other and mine is not other:
                mine.copy_(other)
                state[key] = mine


def _averages(
    average: tuple[dict[str, Tensor], float] | None,
    module: nn.Module | None,
    params: list[nn.Parameter],
) -> list[Tensor | None]:
    """The moving average of each parameter, where there is one."""
    if average is None or module is None:
        return [None] * len(params)
    by_id = {id(t): name for name, t in module.state_dict(keep_vars=True).items()}
    return [average[0][by_id[id(p)]] if id(p) in by_id else None for p in params]
