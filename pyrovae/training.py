"""Training by stochastic variational inference: `fit`, the loop around `pyro.infer.SVI`."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO, SVI

from pyrovae import compiling, engines, objectives, processes, streaming
from pyrovae.acceleration import CompiledSVI
from pyrovae.data import Data, Split, StreamedSplit
from pyrovae.errors import InputError
from pyrovae.importance import Program, Programs
from pyrovae.loop import Loop, Metrics, State, copy_weights, mix, own_part, scoped_globals
from pyrovae.optimizers import WholeModelOptimizer, learning_rate
from pyrovae.runs import Run, load_checkpoint
from pyrovae.tracing import NotTraceableError

# Steps between two questions of several processes whether to stop.
_ASKED_EVERY = 20


class History(NamedTuple):
    """What `fit` did."""

    metrics: list[Metrics]
    """One dictionary an epoch: epoch, step, seconds, train_loss and, if the epoch was validated,
    valid_elbo, valid_rate and valid_distortion."""
    best_epoch: int
    """Epoch of the best validation ELBO; the VAE holds its weights when `fit` returns."""
    best_elbo: float
    """That ELBO, in nats per image."""
    stopped: str
    """Why training ended: "epochs", "patience" or "interrupted"."""


def fit(
    vae: Programs,
    data: Data,
    *,
    objective: ELBO | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    optimizer: str = "adam",
    lr: float = 1e-3,
    adam_betas: tuple[float, ...] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    schedule: str = "constant",
    schedule_epochs: int | None = None,
    warmup_epochs: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    ema: float | None = None,
    patience: int | None = None,
    validate_every: int = 1,
    beta: float = 1.0,
    kl_warmup: float = 0.0,
    free_bits: float = 0.0,
    engine: str = "auto",
    precision: str = "fp32",
    seed: int = 0,
    device: str | torch.device = "auto",
    run: Run | str | os.PathLike[str] | None = None,
    resume: bool = False,
    callback: Callable[[Metrics], None] | None = None,
    progress: bool | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] | None = None,
) -> History:
    """Train ``vae.model`` and ``vae.guide`` with `pyro.infer.SVI`, choosing weights by validation.

    Each step draws a batch, lowers ``-objective`` per image, and moves every parameter with one
    optimiser. After each epoch (or ``validate_every`` of them) the ELBO of the validation split is
    estimated (one particle, fixed noise); the best weights are in the VAE when `fit` returns.
    Neither torch's random stream, nor Pyro's parameter store, nor any validation switch is left
    changed.

    Args:
        vae: a `pyrovae.VAE`, or any module with programs ``model(x)``, ``guide(x)``.
        data: train, valid and test splits, from `pyrovae.data.load`.
        objective: a Pyro ELBO; default `objectives.elbo()`.
        epochs: passes over the training split, in total (also when resuming).
        batch_size: images a step; the last batch of an epoch may be smaller.
        optimizer: "adam", "adamw", "adamax" or "shampoo".
        lr: learning rate.
        adam_betas: decays of the optimiser's two running moments.
        adam_eps: added to the root of the second moment; of "adam" and "adamw" alone.
        schedule: "constant", "cosine" to nought over ``schedule_epochs`` (default ``epochs``), or
            "iwae", in eight stages from ``lr`` to a tenth of it: see `optimizers.learning_rate`.
        schedule_epochs: length of the cosine schedule, in epochs, the warm-up included.
        warmup_epochs: epochs over which the rate grows linearly from 0, before the schedule.
        weight_decay: passed to the optimiser.
        clip_norm: largest norm of the gradient of the mean loss; None: no clipping.
        ema: decay of a moving average of the weights, such as 0.999, which then is what is
            validated and kept (it starts small: `optimizers.average_decay`); None: the weights
            themselves.
        patience: stop after so many epochs without a better validation ELBO; None: never.
        validate_every: epochs from one validation to the next; the last is always validated.
        beta: weight of the KL term.
        kl_warmup: epochs over which that weight grows linearly from 0.
        free_bits: nats per image that the KL of a latent site may have for nothing.
        engine: "svi" is `pyro.infer.SVI`; "compiled" and "cuda-graph" take the same step, traced
            and compiled (`acceleration.CompiledSVI`); "auto" is the fastest that this device has,
            where the steps repay the compilation, and SVI for programs that cannot be traced.
            ("traced", for those without a compiler, takes that step operation by operation.)
        precision: "fp32", "tf32" or "bf16", of the networks' matrix products in training.
        seed: of data order, binarisation and all draws.
        device: "auto" (CUDA if there is any), "cpu", "cuda", ...
        run: a run directory for metrics and checkpoints; None: nothing is written.
        resume: continue from the run's last checkpoint, exactly.
        callback: called with the metrics of each epoch.
        progress: show a progress bar; None: when stderr is a terminal.
        should_stop: asked after each step; True saves and returns with stopped="interrupted".
        say: told in one line which engine runs, and why.

    Raises:
        InputError: for settings or data that cannot be used, for a run= that holds a run which is
            not to be resumed, or was trained with another plan.
        NonFiniteLossError: when a loss or gradient is NaN or infinite, naming step and site.
        ProcessLostError: when another process of a distributed run has gone.
    """
    objective = objective if objective is not None else objectives.elbo()
    _check_settings(locals())
    device = processes.local_device(resolve_device(device))
    run = run if isinstance(run, Run) or run is None else Run(run)
    if resume and run is None:
        raise InputError("resume=True needs run=, the directory to resume from")
    if run is not None and not resume and run.last.exists():
        raise InputError(
            f"{run.path} already holds a run; give resume=True to go on with it, or another run="
        )
    data = data.to("cpu")  # its order and draws are made there; an engine has a copy of its own
    likelihood = getattr(vae, "likelihood", None)
    if likelihood is not None:
        check_data(likelihood, data)

    vae.to(device)
    _check_processes(vae, min(batch_size, len(data.train)))
    if free_bits > 0 and processes.count() > 1:
        raise InputError(
            "--free-bits puts a floor under the KL averaged over the whole batch, of which each "
            "process has a part; train it with one process, or leave it at 0"
        )
    loop = Loop(vae, data, device, run)
    loop.optimizer = WholeModelOptimizer(
        vae.named_parameters(),
        optimizer,
        weight_decay,
        clip_norm,
        betas=(adam_betas[0], adam_betas[1]),
        eps=adam_eps,
    )
    if processes.count() > 1:
        loop.optimizer.reduce = processes.add
    loop.ema = copy_weights(vae) if ema is not None else None
    loop.decay = ema or 0.0
    loop.precision = precision
    steps_per_epoch = -(-len(data.train) // batch_size)
    rate = partial(
        learning_rate,
        schedule,
        lr,
        total_steps=(schedule_epochs or epochs) * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_epochs * steps_per_epoch,
    )
    horizon = (schedule_epochs or epochs) if schedule == "cosine" else None
    loop.plan = {"optimizer": optimizer, "schedule": schedule, "schedule_epochs": horizon}
    weight = objectives.KLWeight(beta).to(device)
    model, guide = objectives.with_handlers(
        vae.model, vae.guide, objective, weight=weight, free_nats=free_bits
    )
    by_index = None
    if resume and run is not None:
        mode, by_index = engines.mode_of(load_checkpoint(run.last))
        engine = mode if engine == "auto" else engine
        if engine in ("cuda-graph", "compiled") and device.type != "cuda":
            engine = "compiled" if compiling.has_compiler() else "traced"
    metrics_log: list[Metrics] = []
    stopped = "epochs"

    with ExitStack() as scope:
        scope.enter_context(scoped_globals(seed))
        scope.enter_context(streaming.told())
        loop.engine, engine_line = _engine(
            engine,
            epochs * steps_per_epoch,
            loop,
            (model, guide, objective),
            weight=weight,
            precision=precision,
            seed=mix(seed, "engine", *own_part()),
            batch_size=batch_size,
            by_index=by_index,
        )
        if say is not None:
            say(engine_line)
        if resume and run is not None:
            loop.restore(seed, batch_size)
            check_continuable(loop.state.epoch, loop.state.best_epoch, epochs, validate_every)
            if processes.is_first():
                run.keep_metrics_through(loop.state.epoch)
            processes.wait()
            metrics_log = run.read_metrics()
        if not processes.is_first():
            progress = False
        bar = scope.enter_context(_progress_bar(epochs, steps_per_epoch, loop.state, progress))
        state = loop.state
        while state.epoch < epochs:
            if out_of_patience(state.epoch, state.best_epoch, patience, validate_every):
                stopped = "patience"
                break
            started = time.perf_counter()
            for index in loop.batches(seed, batch_size):
                loop.optimizer.begin(rate(state.step), images=len(index))
                weight.set(beta * _warmup(state.step, kl_warmup * steps_per_epoch))
                loop.step(index)
                bar.update(1)
                if _asked_to_stop(should_stop, state.step):
                    stopped = "interrupted"
                    break
            loop.wait()
            state.seconds += time.perf_counter() - started
            if stopped == "interrupted":
                loop.save_last()
                break
            last = state.epoch + 1 == epochs
            metrics = loop.end_epoch(seed, last or (state.epoch + 1) % validate_every == 0)
            ends = last or out_of_patience(state.epoch, state.best_epoch, patience, validate_every)
            if ends or processes.count() > 1:
                _check_programs(loop.engine)
            done = beta * _warmup(state.step - 1, kl_warmup * steps_per_epoch)
            metrics |= {"lr": rate(state.step - 1), "kl_weight": done}
            metrics_log.append(metrics)
            if run is not None and processes.is_first():
                run.append_metrics(metrics)  # a line too many is cut off again, one is never lost
            loop.save_last()
            if "valid_elbo" in metrics:
                bound = getattr(vae, "has_density", True)
                name, key = ("ELBO", "valid_elbo") if bound else ("error", "valid_distortion")
                bar.set_postfix_str(f"valid {name} {metrics[key]:.2f}")
            if callback is not None:
                callback(metrics)
    if stopped != "interrupted":
        if say is not None and state.epoch and loop.best is None:
            say("no validation ELBO was finite, so none was the best: these are the last weights")
        loop.load_best()
    return History(metrics_log, state.best_epoch, state.best_elbo, stopped)


def _check_processes(vae: Programs, batch_size: int) -> None:
    """Of several processes, each needs an image of every batch, and the weights of the first."""
    if batch_size < processes.count():
        raise InputError(
            f"--batch-size counts the images of all processes: {batch_size} are too few for "
            f"{processes.count()} of them; give at least one each"
        )
    processes.copy_from_first(t.detach() for t in vae.state_dict().values())


def _asked_to_stop(should_stop: Callable[[], bool] | None, step: int) -> bool:
    if should_stop is None:
        return False
    if processes.count() == 1:
        return should_stop()
    # All must stop at the same step; to ask each other costs time, so not at each.
    return step % _ASKED_EVERY == 0 and any(processes.gather(should_stop()))


def _check_programs(engine: SVI | CompiledSVI) -> None:
    """See that a compiled engine's programs are those that were traced, in all processes."""
    reason = ""
    try:
        if isinstance(engine, CompiledSVI):
            engine.check_programs()
    except NotTraceableError as error:
        reason = str(error)
    reason = next(filter(None, processes.gather(reason)), "")
    if reason:
        raise NotTraceableError(reason)


def _engine(
    name: str,
    steps: int,
    loop: Loop,
    programs: tuple[Program, Program, ELBO],
    *,
    weight: objectives.KLWeight,
    precision: str,
    seed: int,
    batch_size: int,
    by_index: bool | None,
) -> tuple[SVI | CompiledSVI, str]:
    """The engine of that name, and a line that says which it is, and why."""
    model, guide, objective = programs
    svi = SVI(model, guide, loop.optimizer, loss=objective)
    train = loop.data.train
    size = min(batch_size, len(train))
    draws = getattr(objective, "num_particles", 1)
    numbers = engines.numbers_of_step(loop.vae, loop.data.x_shape, size, draws)
    chosen, why = engines.choose(name, loop.device, steps, numbers)
    if chosen == "svi":
        return svi, f"svi: {why}"
    if chosen == "cuda-graph" and processes.count() > 1:
        chosen, why = "compiled", "several processes, which sum gradients between two graphs"
    # A resumed run draws as it did before, whatever memory is free now: two streams differ.
    by_index = engines.fits(train, loop.device) if by_index is None else by_index
    held = train if isinstance(train, Split) and by_index else None
    if by_index and held is None:
        raise InputError(
            "the run held its training images in memory, and drew its noise for them there; resume "
            "it with those, loaded without stream=True"
        )
    compiled = CompiledSVI(
        model,
        guide,
        loop.optimizer,
        objective,
        module=loop.vae,  # type: ignore[arg-type]
        split=held,
        weight=weight,
        average=None if loop.ema is None else (loop.ema, loop.decay),
        mode=chosen,
        reduce=processes.add if processes.count() > 1 else None,
        precision=precision,
        seed=seed,
    )
    reason = ""
    try:
        compiled.prepare(loop.example(size, compiled.split is not None))
    except NotTraceableError as error:
        reason = str(error).strip().split("\n")[0]  # Pyro goes on with tables of shapes
    # Of several processes, all take one engine: what one of them cannot trace, nobody does.
    reason = next(filter(None, processes.gather(reason)), "")
    if not reason:
        if compiled.uncompiled:
            why += f"; as traced, for it was not compiled ({compiled.uncompiled})"
        return compiled, f"{chosen}: {why}"
    if name != "auto":
        raise NotTraceableError(reason)
    return svi, f"svi: {reason}"


def out_of_patience(epoch: int, best_epoch: int, patience: int | None, validate_every: int) -> bool:
    """Whether so many epochs brought no better validation, asked after one that was validated.

    >>> [out_of_patience(epoch, 4, 5, 2) for epoch in (8, 9, 10)]
    [False, False, True]
    """
    due = epoch % validate_every == 0
    return patience is not None and due and epoch - best_epoch >= patience


def check_continuable(done: int, best_epoch: int, epochs: int, validate_every: int) -> None:
    """Refuse more epochs where the best weights are of a last epoch, validated out of its turn."""
    if best_epoch % validate_every and epochs > done:
        raise InputError(
            f"the best weights of this run are of epoch {best_epoch}, which was validated only "
            f"because it was the last (validate_every is {validate_every}), so --epochs cannot "
            f"grow; next time, let --epochs be a multiple of --validate-every"
        )


def check_data(likelihood: Any, data: Data) -> None:
    """Refuse data outside the likelihood's support, before the first step."""
    held = [data.valid, data.test]
    if isinstance(data.train, StreamedSplit):  # to read them all once more would take its time
        likelihood.check(data.train.every_level())
    else:
        held.append(data.train)
    generator = torch.Generator().manual_seed(0)
    for split in held:
        for part in torch.arange(len(split)).split(4096):
            likelihood.check(split.batch(part, generator))


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto", or the name of a device that this machine has."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(
            f"unknown device {str(device)!r}; expected auto, cpu, cuda or cuda:0"
        ) from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device cuda was asked for, and torch sees no CUDA device here; use --device cpu"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"there is no {resolved}: torch sees {torch.cuda.device_count()} CUDA device(s)"
        )
    if resolved.type not in ("cpu", "cuda"):
        raise InputError(f"device {resolved.type} is not supported; use auto, cpu or cuda")
    return resolved


_AT_LEAST_ONE = ("epochs", "batch_size", "schedule_epochs", "patience", "validate_every")
_POSITIVE = ("lr", "clip_norm", "adam_eps")
_NOT_NEGATIVE = ("weight_decay", "beta", "kl_warmup", "free_bits", "warmup_epochs")


def _check_settings(given: dict[str, Any]) -> None:
    for name in _AT_LEAST_ONE:
        if given[name] is not None and given[name] < 1:
            raise InputError(f"{name} must be at least 1, got {given[name]}")
    for name in _POSITIVE:
        if given[name] is not None and not 0 < given[name] < math.inf:
            raise InputError(f"{name} must be a positive number, got {given[name]}")
    for name in _NOT_NEGATIVE:
        if not 0 <= given[name] < math.inf:
            raise InputError(f"{name} must be at least 0, got {given[name]}")
    if given["ema"] is not None and not 0 < given["ema"] < 1:
        raise InputError(f"ema must lie between 0 and 1, such as 0.999, got {given['ema']}")
    if given["schedule"] not in ("constant", "cosine", "iwae"):
        raise InputError(f"schedule must be constant, cosine or iwae, got {given['schedule']!r}")
    betas = given["adam_betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise InputError(
            f"adam_betas must be two numbers, at least 0 and below 1, such as 0.9 0.999; got "
            f"{' '.join(map(str, betas))}"
        )
    if given["optimizer"] == "adamax" and given["adam_eps"] != 1e-8:
        raise InputError(
            "adam_eps is added to a root that optimizer adamax does not take; leave it out, or "
            "use adam"
        )
    planned = given["schedule_epochs"] or given["epochs"]
    if given["schedule"] == "cosine" and given["warmup_epochs"] >= planned:
        raise InputError(
            f"warmup_epochs must leave room for the cosine schedule of {planned} epochs; got "
            f"{given['warmup_epochs']:g}"
        )
    for name, default in (("beta", 1), ("kl_warmup", 0)):
        if given[name] != default:
            objectives.check_kl_term(given["objective"], "--" + name.replace("_", "-"))


def _warmup(step: int, warmup_steps: float) -> float:
    return 1.0 if step >= warmup_steps else step / warmup_steps


@contextmanager
def _progress_bar(
    epochs: int, steps_per_epoch: int, state: State, progress: bool | None
) -> Iterator[Any]:
    from tqdm import tqdm

    # disable=None is tqdm's own "not on a terminal".
    disable = None if progress is None else not progress
    total, done = epochs * steps_per_epoch, state.step
    with tqdm(total=total, initial=done, disable=disable, unit="step", desc="train") as bar:
        yield bar
