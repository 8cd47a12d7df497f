"""The state of a training run: its steps, validation, checkpoints and random streams."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn

from pyrovae import importance, processes
from pyrovae.acceleration import CompiledSVI
from pyrovae.data import Data
from pyrovae.errors import InputError, NonFiniteLossError
from pyrovae.importance import Program, Programs
from pyrovae.optimizers import WholeModelOptimizer, average_decay
from pyrovae.precision import networks_in
from pyrovae.runs import Run, load_checkpoint, save_checkpoint
from pyrovae.streams import own_streams, seed_of

Metrics = dict[str, Any]

# Steps of a compiled engine between two looks at its health: nobody waits for a step meanwhile.
_CHECKED_EVERY = 100


@dataclass
class State:
    """Where training stands; with weights, optimiser and random streams, all of a checkpoint."""

    epoch: int = 0  # epochs completed
    step: int = 0  # steps completed
    step_in_epoch: int = 0
    loss_sum: float = 0.0  # over the images of the epoch in progress
    best_epoch: int = 0
    best_elbo: float = -math.inf
    seconds: float = 0.0


class Loop:
    """The parts of `fit` that share the training state."""

    optimizer: WholeModelOptimizer
    ema: dict[str, Tensor] | None
    decay: float = 0.0
    precision: str = "fp32"
    plan: dict[str, Any]
    """What a run cannot change when it is taken up again."""
    engine: SVI | CompiledSVI

    def __init__(self, vae: Programs, data: Data, device: torch.device, run: Run | None):
        self.vae = vae
        self.data = data
        self.device = device
        self.run = run
        self.state = State()
        self.generator = torch.Generator()
        self.best: dict[str, Tensor] | None = None
        self._left_out = 0
        self._resumed_stream: Tensor | None = None
        self._levels: Iterator[Tensor] = iter(())
        self._valid = data.valid.drawn_once()  # each validation is of the same x

    def batches(self, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Indices of the epoch's remaining batches; its order is a function of (seed, epoch)."""
        self.generator.manual_seed(mix(seed, "data", self.state.epoch))
        order = torch.randperm(len(self.data.train), generator=self.generator)
        if processes.rank() > 0:  # one order for all, and draws of x for each
            self.generator.manual_seed(mix(seed, "data", self.state.epoch, processes.rank()))
        if self._resumed_stream is not None:
            if self.state.step_in_epoch:
                self.generator.set_state(self._resumed_stream)
            self._resumed_stream = None
        if self._by_index():
            order = order.to(self.device)  # once: each batch would wait for the device
        remaining = order.split(batch_size)[self.state.step_in_epoch :]
        if not self._by_index():
            taken = [_share(index) for index in remaining if len(index) >= processes.count()]
            self._levels = self.data.train.read(taken)
        try:
            yield from remaining
        finally:
            self._levels = iter(())  # ends the processes that read, if any do

    def _by_index(self) -> bool:
        """Whether the engine has the data, and is told which of them a batch is made of."""
        return isinstance(self.engine, CompiledSVI) and self.engine.split is not None

    def draw(self) -> Tensor:
        """The x of the next of `batches`, sampled anew, on the device: (n, *x_shape)."""
        return self.data.train.drawn(next(self._levels), self.generator).to(self.device)

    def example(self, size: int, by_index: bool) -> Tensor:
        """The first ``size`` images as a compiled engine takes them: by index, or as x."""
        index = _share(torch.arange(size))
        if by_index:
            return index.to(self.device)
        return self.data.train.batch(index, torch.Generator()).to(self.device)

    def step(self, index: Tensor) -> None:
        """Lower the loss of the images at ``index``, by one step of the engine.

        Of several processes each takes its share; a last batch with fewer images than processes
        is left out.
        """
        if len(index) < processes.count():
            self._left_out = len(index)
        elif isinstance(self.engine, CompiledSVI):
            batch = _share(index) if self._by_index() else self.draw()
            self._compiled_step(self.engine, batch, len(index))
        else:
            self.state.loss_sum += self._svi_step(self.engine, self.draw())
            if self.ema is not None:
                average_weights(self.ema, self.vae, average_decay(self.decay, self.state.step + 1))
        self.state.step += 1
        self.state.step_in_epoch += 1

    def _svi_step(self, svi: SVI, x: Tensor) -> float:
        streams = self._torch_streams()
        try:
            with networks_in(self.vae, self.precision):
                loss = float(svi.step(x))
            if processes.count() > 1:
                loss = float(processes.add(torch.tensor([loss], device=self.device)))
            self.optimizer.check_applied()
            what = "" if math.isfinite(loss) else f"the loss is {loss}"
        except FloatingPointError as error:
            what = str(error)
        if what:
            self._put_torch_streams(streams)  # meet the same draws again
            site = first_bad_site(svi.model, svi.guide, x)
            raise self._non_finite(self.state.step + 1, what, site)
        return loss

    def _compiled_step(self, engine: CompiledSVI, batch: Tensor, images: int) -> None:
        engine.queue(batch, images)
        if self.state.step % _CHECKED_EVERY == _CHECKED_EVERY - 1:
            self.wait()

    def wait(self) -> None:
        """Wait for what a compiled engine was asked to do, and see whether all went well."""
        engine = self.engine
        if not isinstance(engine, CompiledSVI):
            return
        try:
            engine.check()
        except FloatingPointError as error:
            what = str(error)
        else:
            self.state.loss_sum = float(engine.total)
            return
        number, x, draws = engine.failed()
        with draws:
            site = first_bad_site(self.vae.model, self.vae.guide, x)
        raise self._non_finite(number, what, site)

    def _non_finite(self, step: int, what: str, site: str) -> NonFiniteLossError:
        # Of several processes, the one that met the overflow knows its site.
        sites = processes.gather(site)
        site = next((s for s in sites if s.startswith("site ")), site)
        good = "no checkpoint had been written"
        if self.run is not None and self.run.last.exists():
            good = f"the last good checkpoint is {self.run.last} (epoch {self.state.epoch})"
        return NonFiniteLossError(
            f"training stopped at step {step} (epoch {self.state.epoch + 1}): "
            f"{what}; {site}; {good}; try a smaller --lr, or --clip-norm"
        )

    def end_epoch(self, seed: int, validate: bool = True) -> Metrics:
        """Validate, keep the weights if they are the best; returns the epoch's metrics."""
        self.wait()
        state = self.state
        state.epoch += 1
        state.step_in_epoch = 0
        train_loss = state.loss_sum / (len(self.data.train) - self._left_out)
        state.loss_sum = 0.0
        if isinstance(self.engine, CompiledSVI):
            self.engine.total.zero_()
        terms = self._judge(seed) if validate else {}
        return {
            "epoch": state.epoch,
            "step": state.step,
            "seconds": round(state.seconds, 3),
            "train_loss": train_loss,
            **terms,
        }

    def _judge(self, seed: int) -> Metrics:
        """Validate what is to be kept, and keep it if it is the best so far."""
        with self._kept_weights():
            terms = self._validate(seed)
            if terms["valid_elbo"] > self.state.best_elbo:
                self.state.best_elbo = terms["valid_elbo"]
                self.state.best_epoch = self.state.epoch
                self.best = copy_weights(self.vae)
                if self.run is not None:
                    self._save(self.run.best)
        return terms

    @importance.float32_products()
    def _validate(self, seed: int) -> Metrics:
        """ELBO, rate and distortion of the validation split with one particle and fixed noise."""
        vae, split = self.vae, self._valid
        one = split.batch(torch.arange(1)).to(self.device)
        batch = min(processes.gather(importance.plan(vae.model, vae.guide, one, 1).images))
        rate = distortion = 0.0
        for start in processes.share(list(range(0, len(split), batch))):
            index = torch.arange(start, min(start + batch, len(split)))
            part = split.batch(index).to(self.device)
            for terms in importance.chunks(
                vae.model, vae.guide, part, 1, chunk=1, seed=mix(seed, "valid"), first_image=start
            ):
                rate += float((terms.log_posterior - terms.log_prior).double().sum())
                distortion -= float(terms.log_likelihood.double().sum())
        n = len(split)
        if processes.count() > 1:
            both = torch.tensor([rate, distortion], dtype=torch.float64, device=self.device)
            rate, distortion = processes.add(both).tolist()
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
        raw = copy_weights(self.vae)
        put_weights(self.vae, self.ema)
        try:
            yield
        finally:
            put_weights(self.vae, raw)

    def _checkpoint(self) -> dict[str, Any]:
        compiled = isinstance(self.engine, CompiledSVI)
        return {
            "engine": self.engine.save() if compiled else None,  # first: it completes the optimiser
            "model": self.vae.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "plan": self.plan,
            "state": asdict(self.state),
            **self._streams(),
            "others": processes.gather(self._streams())[1:],
        }

    def _streams(self) -> dict[str, Any]:
        """The random streams of this process."""
        return {"data_stream": self.generator.get_state(), **self._torch_streams()}

    def _torch_streams(self) -> dict[str, Any]:
        """Those that a step of SVI draws from, and within a compiled one what is not of normals."""
        cuda = self.device.type == "cuda"
        return {
            "torch_stream": torch.get_rng_state(),
            "cuda_stream": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def save_last(self) -> None:
        """Write the checkpoint that a run resumes from."""
        self.wait()
        if self.run is not None:
            self._save(self.run.last)

    def _save(self, path: Path) -> None:
        checkpoint = self._checkpoint()  # by all processes: each has its random streams
        if processes.is_first():
            save_checkpoint(path, checkpoint)
        processes.wait()

    def restore(self, seed: int, batch_size: int) -> None:
        """Take up the run's last checkpoint: weights, optimiser, averages and random streams."""
        assert self.run is not None
        saved = load_checkpoint(self.run.last)
        for name, before in saved.get("plan", {}).items():
            if self.plan.get(name) != before:
                raise InputError(
                    f"{self.run.last} was trained with {name}={before!r}; resume with that, not "
                    f"{self.plan.get(name)!r}"
                )
        try:
            self.vae.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state = State(**saved["state"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"{self.run.last} does not fit this VAE ({reason}); resume with the settings the "
                "run was started with"
            ) from None
        if (self.ema is None) != (saved["ema"] is None):
            raise InputError(f"{self.run.last} was trained with another --ema; resume with that")
        if self.ema is not None:
            for name, t in saved["ema"].items():
                self.ema[name].copy_(t)  # in place: an engine holds these tensors
        engine = saved.get("engine")
        if isinstance(self.engine, CompiledSVI) != (engine is not None):
            raise InputError(f"{self.run.last} was trained with another --engine; resume with that")
        if isinstance(self.engine, CompiledSVI) and engine is not None:
            self.engine.bind(engine.get("count"))  # earlier versions kept none
            self.engine.total.fill_(self.state.loss_sum)
        if self.run.best.exists():
            best = load_checkpoint(self.run.best, self.device)
            self.best = best["model"]
        streams = self._own_streams(saved)
        if streams is None:
            return
        self._resumed_stream = streams["data_stream"]
        self._put_torch_streams(streams)

    def _put_torch_streams(self, streams: dict[str, Any]) -> None:
        torch.set_rng_state(streams["torch_stream"])
        if streams["cuda_stream"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(streams["cuda_stream"], self.device)

    def _own_streams(self, saved: dict[str, Any]) -> dict[str, Any] | None:
        """This process's random streams; None where the run had fewer processes."""
        if processes.is_first():
            return saved
        others = saved.get("others", [])
        return others[processes.rank() - 1] if processes.rank() <= len(others) else None

    def load_best(self) -> None:
        """Leave the best weights in the VAE."""
        if self.best is not None:
            put_weights(self.vae, self.best)


def _share(index: Tensor) -> Tensor:
    """This process's part of a batch."""
    return index[processes.rank() :: processes.count()]


def first_bad_site(model: Program, guide: Program, x: Tensor) -> str:
    """A phrase that names the first sample site with a non-finite value or log-probability."""
    with torch.no_grad(), pyro.validation_enabled(False):
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


@contextmanager
def scoped_globals(seed: int) -> Iterator[None]:
    """Seeded streams, an empty parameter store and no validation, all put back at the end."""
    with (
        own_streams(mix(seed, "draws", *own_part())),
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        warnings.catch_warnings(),
    ):
        # Pyro warns of a NaN; here it becomes an error that says where.
        warnings.filterwarnings("ignore", message="Encountered NaN")
        yield


def own_part() -> tuple[int, ...]:
    """What tells the streams of this process from those of the first, which has nothing."""
    return () if processes.is_first() else (processes.rank(),)


def mix(seed: int, *parts: object) -> int:
    """A seed of its own for each purpose, so that streams do not run in step."""
    key = "/".join(map(str, (seed, *parts)))
    return seed_of(key)


def copy_weights(module: nn.Module | Programs) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


@torch.no_grad()
def put_weights(module: nn.Module | Programs, weights: dict[str, Tensor]) -> None:
    """Write a copy back, in place, so that whoever holds the parameters still does."""
    for name, t in module.state_dict().items():
        t.copy_(weights[name])


@torch.no_grad()
def average_weights(ema: dict[str, Tensor], module: nn.Module | Programs, decay: float) -> None:
    """Move an average towards the weights: ema <- decay ema + (1 - decay) weights."""
    for name, t in module.state_dict().items():
        if t.is_floating_point():
            ema[name].lerp_(t, 1 - decay)
        else:
            ema[name].copy_(t)
