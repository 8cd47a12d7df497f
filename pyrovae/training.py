"""Training by stochastic variational inference: `fit`, the loop around `pyro.infer.SVI`."""

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI
from torch import Tensor, nn

from pyrovae import importance, objectives
from pyrovae.data import Data
from pyrovae.errors import InputError, NonFiniteLossError
from pyrovae.optimizers import WholeModelOptimizer, learning_rate
from pyrovae.runs import Run, load_checkpoint, save_checkpoint

Metrics = dict[str, Any]


class History(NamedTuple):
    """What `fit` did."""

    metrics: list[Metrics]
    """One dictionary an epoch: epoch, step, seconds, train_loss, valid_elbo, ..."""
    best_epoch: int
    """Epoch of the best validation ELBO; the VAE holds its weights when `fit` returns."""
    best_elbo: float
    """That ELBO, in nats per image."""
    stopped: str
    """Why training ended: "epochs", "patience" or "interrupted"."""


@dataclass
class _State:
    """Where training stands; with weights, optimiser and random streams, all of a checkpoint."""

    epoch: int = 0  # epochs completed
    step: int = 0  # steps completed
    step_in_epoch: int = 0
    loss_sum: float = 0.0  # over the images of the epoch in progress
    best_epoch: int = 0
    best_elbo: float = -math.inf
    seconds: float = 0.0


def fit(
    vae: nn.Module,
    data: Data,
    *,
    objective: ELBO | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    optimizer: str = "adam",
    lr: float = 1e-3,
    schedule: str = "constant",
    schedule_epochs: int | None = None,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    ema: float | None = None,
    patience: int | None = None,
    beta: float = 1.0,
    kl_warmup: float = 0.0,
    free_bits: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "auto",
    run: Run | str | os.PathLike[str] | None = None,
    resume: bool = False,
    callback: Callable[[Metrics], None] | None = None,
    progress: bool | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> History:
    """Train ``vae.model`` and ``vae.guide`` with `pyro.infer.SVI`, choosing weights by validation.

    Each step draws a batch, lowers ``-objective`` per image, and moves every parameter with one
    optimiser. After each epoch the ELBO of the validation split is estimated (one particle, fixed
    noise); the best weights are in the VAE when `fit` returns. Neither torch's random stream, nor
    Pyro's parameter store, nor any validation switch is left changed.

    Args:
        vae: a `pyrovae.VAE`, or any module with programs ``model(x)``, ``guide(x)``.
        data: train, valid and test splits, from `pyrovae.data.load`.
        objective: a Pyro ELBO; default `objectives.elbo()`.
        epochs: passes over the training split, in total (also when resuming).
        batch_size: images a step; the last batch of an epoch may be smaller.
        optimizer: "adam", "adamw" or "adamax".
        lr: learning rate.
        schedule: "constant", or "cosine" to nought over ``schedule_epochs`` (default ``epochs``).
        schedule_epochs: length of the schedule, in epochs.
        weight_decay: passed to the optimiser.
        clip_norm: largest norm of the gradient of the mean loss; None: no clipping.
        ema: decay of a moving average of the weights, such as 0.999, which then is what is
            validated and kept; None: the weights themselves.
        patience: stop after so many epochs without a better validation ELBO; None: never.
        beta: weight of the KL term.
        kl_warmup: epochs over which that weight grows linearly from 0.
        free_bits: nats per image that the KL of a latent site may have for nothing.
        seed: of data order, binarisation and all draws.
        device: "auto" (CUDA if there is any), "cpu", "cuda", ...
        run: a run directory for metrics and checkpoints; None: nothing is written.
        resume: continue from the run's last checkpoint, exactly.
        callback: called with the metrics of each epoch.
        progress: show a progress bar; None: when stderr is a terminal.
        should_stop: asked after each step; True saves and returns with stopped="interrupted".

    Raises:
        InputError: for settings or data that cannot be used.
        NonFiniteLossError: when a loss or gradient is NaN or infinite, naming step and site.
    """
    objective = objective if objective is not None else objectives.elbo()
    _check_settings(locals())
    device = resolve_device(device)
    run = run if isinstance(run, Run) or run is None else Run(run)
    if resume and run is None:
        raise InputError("resume=True needs run=, the directory to resume from")
    likelihood = getattr(vae, "likelihood", None)
    if likelihood is not None:
        check_data(likelihood, data)

    vae.to(device)
    loop = _Loop(vae, data, device, run)
    loop.optimizer = WholeModelOptimizer(vae.named_parameters(), optimizer, weight_decay, clip_norm)
    loop.ema = _copy(vae) if ema is not None else None
    steps_per_epoch = -(-len(data.train) // batch_size)
    total_steps = (schedule_epochs or epochs) * steps_per_epoch
    weight = objectives.KLWeight(beta).to(device)
    model, guide = objectives.with_handlers(
        vae.model, vae.guide, objective, weight=weight, free_nats=free_bits
    )
    svi = SVI(model, guide, loop.optimizer, loss=objective)
    metrics_log: list[Metrics] = []
    stopped = "epochs"

    with ExitStack() as scope:
        scope.enter_context(_scoped_globals(device, seed))
        if resume and run is not None:
            loop.restore(seed, batch_size)
            run.keep_metrics_through(loop.state.epoch)
            metrics_log = run.read_metrics()
        bar = scope.enter_context(_progress_bar(epochs, steps_per_epoch, loop.state, progress))
        state = loop.state
        while state.epoch < epochs:
            if patience is not None and state.epoch - state.best_epoch >= patience:
                stopped = "patience"
                break
            started = time.perf_counter()
            for index in loop.batches(seed, batch_size):
                x = loop.draw(index)
                loop.optimizer.begin(
                    learning_rate(schedule, lr, state.step, total_steps), images=len(x)
                )
                weight.set(beta * _warmup(state.step, kl_warmup * steps_per_epoch))
                state.loss_sum += loop.step(svi, x)
                state.step += 1
                state.step_in_epoch += 1
                if loop.ema is not None and ema is not None:
                    _average(loop.ema, vae, ema)
                bar.update(1)
                if should_stop is not None and should_stop():
                    stopped = "interrupted"
                    break
            state.seconds += time.perf_counter() - started
            if stopped == "interrupted":
                loop.save_last()
                break
            metrics = loop.end_epoch(seed)
            metrics |= {
                "lr": learning_rate(schedule, lr, state.step - 1, total_steps),
                "kl_weight": float(weight.value),
            }
            metrics_log.append(metrics)
            if run is not None:
                run.append_metrics(metrics)
            bar.set_postfix_str(f"valid ELBO {metrics['valid_elbo']:.2f}")
            if callback is not None:
                callback(metrics)
    if stopped != "interrupted":
        loop.load_best()
    return History(metrics_log, state.best_epoch, state.best_elbo, stopped)


class _Loop:
    """The parts of `fit` that share the training state."""

    optimizer: WholeModelOptimizer
    ema: dict[str, Tensor] | None

    def __init__(self, vae: nn.Module, data: Data, device: torch.device, run: Run | None):
        self.vae = vae
        self.data = data
        self.device = device
        self.run = run
        self.state = _State()
        self.generator = torch.Generator()
        self.best: dict[str, Tensor] | None = None
        self._resumed_stream: Tensor | None = None
        self._valid = data.valid.tensor()

    def batches(self, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Indices of the epoch's remaining batches; its order is a function of (seed, epoch)."""
        self.generator.manual_seed(_mix(seed, "data", self.state.epoch))
        order = torch.randperm(len(self.data.train), generator=self.generator)
        if self._resumed_stream is not None:
            if self.state.step_in_epoch:
                self.generator.set_state(self._resumed_stream)
            self._resumed_stream = None
        yield from order.split(batch_size)[self.state.step_in_epoch :]

    def draw(self, index: Tensor) -> Tensor:
        return self.data.train.batch(index, self.generator).to(self.device)

    def step(self, svi: SVI, x: Tensor) -> float:
        """One SVI step; returns the loss summed over the batch."""
        stream = torch.get_rng_state()
        try:
            loss = float(svi.step(x))
            self.optimizer.check_applied()
        except FloatingPointError as error:
            raise self._non_finite(svi, x, stream, str(error)) from None
        if not math.isfinite(loss):
            raise self._non_finite(svi, x, stream, f"the loss is {loss}")
        return loss

    def _non_finite(self, svi: SVI, x: Tensor, stream: Tensor, what: str) -> NonFiniteLossError:
        torch.set_rng_state(stream)  # meet the same draws again
        site = first_bad_site(svi.model, svi.guide, x)
        saved = self.run is not None and self.run.last.exists()
        good = (
            f"the last good checkpoint is {self.run.last}"
            if saved and self.run
            else ("no checkpoint had been written")
        )
        return NonFiniteLossError(
            f"training stopped at step {self.state.step + 1} (epoch {self.state.epoch + 1}): "
            f"{what}; {site}; {good}; try a smaller --lr, or --clip-norm"
        )

    def end_epoch(self, seed: int) -> Metrics:
        state = self.state
        state.epoch += 1
        state.step_in_epoch = 0
        train_loss = state.loss_sum / len(self.data.train)
        state.loss_sum = 0.0
        with self._kept_weights():
            terms = self._validate(seed)
            if terms["valid_elbo"] > state.best_elbo:
                state.best_elbo = terms["valid_elbo"]
                state.best_epoch = state.epoch
                self.best = _copy(self.vae)
                if self.run is not None:
                    save_checkpoint(self.run.best, self._checkpoint())
        self.save_last()
        return {
            "epoch": state.epoch,
            "step": state.step,
            "seconds": round(state.seconds, 3),
            "train_loss": train_loss,
            **terms,
        }

    def _validate(self, seed: int) -> Metrics:
        """ELBO, rate and distortion of the validation split with one particle and fixed noise."""
        vae, x = self.vae, self._valid
        batch = importance.plan(vae.model, vae.guide, x[:1].to(self.device), 1).images
        rate = distortion = 0.0
        for start in range(0, len(x), batch):
            part = x[start : start + batch].to(self.device)
            for terms in importance.chunks(
                vae.model, vae.guide, part, 1, chunk=1, seed=_mix(seed, "valid"), first_image=start
            ):
                rate += float((terms.log_posterior - terms.log_prior).double().sum())
                distortion -= float(terms.log_likelihood.double().sum())
        n = len(x)
        return {
            "valid_elbo": -(rate + distortion) / n,
            "valid_rate": rate / n,
            "valid_distortion": distortion / n,
        }

    @contextmanager
    def _kept_weights(self) -> Iterator[None]:
        """Put the averaged weights, if there are any, in the VAE for a while."""
        if self.ema is None:
            yield
            return
        raw = _copy(self.vae)
        _put(self.vae, self.ema)
        try:
            yield
        finally:
            _put(self.vae, raw)
            self._raw = raw

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "model": self.vae.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "state": asdict(self.state),
            "data_stream": self.generator.get_state(),
            "torch_stream": torch.get_rng_state(),
            "cuda_stream": torch.cuda.get_rng_state(self.device)
            if self.device.type == "cuda"
            else None,
        }

    def save_last(self) -> None:
        if self.run is not None:
            save_checkpoint(self.run.last, self._checkpoint())

    def restore(self, seed: int, batch_size: int) -> None:
        """Take up the run's last checkpoint: weights, optimiser, averages and random streams."""
        assert self.run is not None
        saved = load_checkpoint(self.run.last)
        try:
            self.vae.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state = _State(**saved["state"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"{self.run.last} does not fit this VAE ({reason}); resume with the settings the "
                "run was started with"
            ) from None
        if (self.ema is None) != (saved["ema"] is None):
            raise InputError(f"{self.run.last} was trained with another --ema; resume with that")
        if self.ema is not None:
            self.ema = {name: t.to(self.device) for name, t in saved["ema"].items()}
        if self.run.best.exists():
            best = load_checkpoint(self.run.best, self.device)
            self.best = best["model"]
        self._resumed_stream = saved["data_stream"]
        torch.set_rng_state(saved["torch_stream"])
        if saved["cuda_stream"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_stream"], self.device)

    def load_best(self) -> None:
        if self.best is not None:
            _put(self.vae, self.best)


def first_bad_site(model: importance.Program, guide: importance.Program, x: Tensor) -> str:
    """A phrase that names the first sample site with a non-finite value or log-probability."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide_trace = poutine.trace(guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
        for where, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or poutine.util.site_is_subsample(site):
                    continue
                if not torch.isfinite(site["value"]).all():
                    return f"site {name!r} of the {where} has a non-finite value"
                log_prob = site["fn"].log_prob(site["value"])
                bad = int((~torch.isfinite(log_prob)).sum())
                if bad:
                    return (
                        f"site {name!r} of the {where} has a non-finite log-probability for "
                        f"{bad} of {log_prob.numel()} entries"
                    )
    return "every site is finite, so the overflow is in the gradient"


def check_data(likelihood: Any, data: Data) -> None:
    """Refuse data outside the likelihood's support, before the first step."""
    for split in (data.valid, data.test):
        likelihood.check(split.tensor())
    index = torch.arange(len(data.train))
    generator = torch.Generator().manual_seed(0)
    for part in index.split(4096):
        likelihood.check(data.train.batch(part, generator))


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


_AT_LEAST_ONE = ("epochs", "batch_size", "schedule_epochs", "patience")
_POSITIVE = ("lr", "clip_norm")
_NOT_NEGATIVE = ("weight_decay", "beta", "kl_warmup", "free_bits")


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
    if given["schedule"] not in ("constant", "cosine"):
        raise InputError(f"schedule must be constant or cosine, got {given['schedule']!r}")
    if given["beta"] != 1:
        objectives.check_kl_term(given["objective"], "--beta")


def _warmup(step: int, warmup_steps: float) -> float:
    return 1.0 if step >= warmup_steps else step / warmup_steps


@contextmanager
def _scoped_globals(device: torch.device, seed: int) -> Iterator[None]:
    """Seeded streams, an empty parameter store and no validation, all put back at the end."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        warnings.catch_warnings(),
    ):
        # Pyro warns of a NaN; here it becomes an error that says where.
        warnings.filterwarnings("ignore", message="Encountered NaN")
        torch.manual_seed(_mix(seed, "draws"))
        yield


@contextmanager
def _progress_bar(
    epochs: int, steps_per_epoch: int, state: _State, progress: bool | None
) -> Iterator[Any]:
    from tqdm import tqdm

    # disable=None is tqdm's own "not on a terminal".
    disable = None if progress is None else not progress
    total, done = epochs * steps_per_epoch, state.step
    with tqdm(total=total, initial=done, disable=disable, unit="step", desc="train") as bar:
        yield bar


def _mix(seed: int, *parts: object) -> int:
    """A seed of its own for each purpose, so that streams do not run in step."""
    key = "/".join(map(str, (seed, *parts))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


@torch.no_grad()
def _put(module: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, t in module.state_dict().items():
        t.copy_(weights[name])


@torch.no_grad()
def _average(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for name, t in module.state_dict().items():
        if t.is_floating_point():
            ema[name].lerp_(t, 1 - decay)
        else:
            ema[name].copy_(t)
