"""``pyrovae train``: check everything, then train, evaluate and draw pictures."""

import argparse
import dataclasses
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from pyrovae import (
    comparison,
    data,
    engines,
    objectives,
    plots,
    processes,
    runs,
    tracking,
)
from pyrovae import config as cfg
from pyrovae.cli import settings
from pyrovae.commands.dry_run import dry_run
from pyrovae.commands.info import count, describe
from pyrovae.commands.output import check_writable, quoted, say, show
from pyrovae.errors import InputError
from pyrovae.evaluation import evaluate as run_evaluation
from pyrovae.runs import Run
from pyrovae.training import check_continuable, check_data, fit, resolve_device
from pyrovae.vae import VAE


def train(args: argparse.Namespace) -> int:
    """``pyrovae train``: check everything, then train, evaluate and draw pictures."""
    given = settings(args, cfg.TrainConfig)
    with processes.joined(_device(args, given)):
        args.quiet = args.quiet or not processes.is_first()
        return _train(args, given)


def _device(args: argparse.Namespace, given: dict[str, Any]) -> str:
    """The device asked for, or that of the run to be resumed, if it can be read by now."""
    if "device" not in given and args.resume and args.out:
        with suppress(InputError):
            return cfg.run_config(Run(args.out)).device
    return given.get("device", "auto")


def _train(args: argparse.Namespace, given: dict[str, Any]) -> int:
    if args.out == "":
        raise InputError("--out expects a directory, got an empty name; leave it out for runs/...")
    if args.resume and args.overwrite:
        raise InputError("--resume continues a run and --overwrite replaces it; give one of them")
    begun = None
    if args.resume:
        run, config, begun = _resumed(args, given)
    else:
        config = cfg.resolve(cfg.make(cfg.TrainConfig, cfg.with_preset(given)))
        run = Run(args.out or cfg.default_out(config))
        _check_free(run, args.overwrite)
    device = processes.local_device(resolve_device(config.device))
    dataset = cfg.load_data(config)
    vae = cfg.build(config, dataset)
    check_data(vae.likelihood, dataset)
    if config.log is not None:
        tracking.check_installed()
    if args.resume:
        cfg.check_same_data(run, dataset)
    if args.dry_run:
        begun_by = None if begun is None else begun.engine
        return dry_run(config, dataset, vae, device, _fit_settings(config), begun_by)
    processes.wait()  # all have looked at what is there; now it may change
    if begun is not None and processes.is_first():
        run.write_json("config.json", dataclasses.asdict(config))
        _note_environment(run, config, device, begun.epoch)
    elif processes.is_first():
        _start(run, config, dataset, device)
    processes.wait()

    say(f"data      {dataset.protocol}", args.quiet)
    say(f"model     {describe(config, vae)}", args.quiet)
    several = f", {processes.count()} processes" if processes.count() > 1 else ""
    say(f"run       {run.path} on {device}{several}", args.quiet)
    done = 0 if begun is None else begun.epoch
    with _interrupts() as interrupts, _tracker(config, run, vae, dataset, done) as tracker:
        history = fit(
            vae,
            dataset,
            objective=objectives.REGISTRY[config.objective](config.num_particles),
            run=run,
            resume=args.resume,
            device=device,
            progress=False if args.quiet else None,
            should_stop=interrupts.asked,
            callback=tracker,
            say=lambda line: say(f"engine    {line}", args.quiet),
            epochs=config.epochs,
            **_fit_settings(config),
        )
        # The weights may be others now, and the number of a run must be that of its weights.
        if processes.is_first():
            (run.path / "evaluation.json").unlink(missing_ok=True)
        if history.stopped == "interrupted":
            again = f"pyrovae train --out {quoted(run.path)} --resume"
            say(f"stopped; all is saved. Continue: {again}", not processes.is_first())
            return 128 + interrupts.signal
        interrupts.immediate = True
        if interrupts.signal:  # it came in the last validation
            line = f"stopped; training is done. Next: pyrovae evaluate {quoted(run.path)}"
            say(line, not processes.is_first())
            return 128 + interrupts.signal
        if history.stopped == "patience":
            bound = "ELBO" if vae.has_density else "error"
            line = f"stopped early: no better validation {bound} in {config.patience} epochs"
            say(line, args.quiet)
        bound = f"ELBO {history.best_elbo:.3f}"
        if not vae.has_density:
            bound = f"squared error {-history.best_elbo:.3f}"
        best = f"epoch {history.best_epoch}, validation {bound}"
        say(f"best      {best}", args.quiet)
        if processes.is_first():
            _draw_pictures(run, vae, dataset, history.metrics)
        result = None
        if not vae.has_density:
            if processes.is_first():
                _say_error(vae, dataset)
            say(f"next      pyrovae interpolate {quoted(run.path)}", args.quiet)
            return 0
        if config.final_particles:
            result = run_evaluation(vae, dataset.test, config.final_particles)
        if result is not None and processes.is_first():
            run.write_json("evaluation.json", result.to_dict())
            comparison.keep(run, result, limit=None, parameters=count(vae))
            show(str(result))
    say(f"next      pyrovae evaluate {quoted(run.path)} --num-particles 5000", args.quiet)
    return 0


def _say_error(vae: VAE, dataset: data.Data) -> None:
    """What stands for an evaluation where there is no p(x) to evaluate."""
    x = dataset.test.tensor()
    device = next(vae.parameters()).device
    errors = torch.cat(
        [
            (part - vae.reconstruct(part.to(device)).cpu()).square().flatten(1).sum(1)
            for part in x.split(500)
        ]
    ).double()
    se = float(errors.std()) / len(errors) ** 0.5
    text = f"{float(errors.mean()):.4f} ± {se:.4f} an image, on the {len(x):,} of the test split"
    show(f"squared error      {text}")
    show("log p(x)           none: an autoencoder is no probability model")


_FIT_SETTINGS = (
    "batch_size",
    "optimizer",
    "lr",
    "adam_betas",
    "adam_eps",
    "schedule",
    "schedule_epochs",
    "warmup_epochs",
    "weight_decay",
    "clip_norm",
    "ema",
    "patience",
    "validate_every",
    "beta",
    "kl_warmup",
    "free_bits",
    "engine",
    "precision",
    "seed",
)


def _fit_settings(config: cfg.TrainConfig) -> dict[str, Any]:
    """What `fit` is told, but for the epochs."""
    return {name: getattr(config, name) for name in _FIT_SETTINGS}


@contextmanager
def _tracker(
    config: cfg.TrainConfig, run: Run, vae: VAE, dataset: data.Data, done: int
) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    if config.log is None or not processes.is_first():
        yield None
        return
    x = dataset.valid.head(16).tensor()
    with tracking.TensorBoard(run.path / "tensorboard", vae, x, first_epoch=done + 1) as board:
        yield board


class _Begun(NamedTuple):
    """What the checkpoint says of a run that is to be resumed."""

    epoch: int
    engine: str


def _resumed(
    args: argparse.Namespace, given: dict[str, Any]
) -> tuple[Run, cfg.TrainConfig, _Begun]:
    run = Run(args.out or cfg.default_out(cfg.make(cfg.TrainConfig, cfg.with_preset(given))))
    stored = cfg.run_config(run)
    asked = cfg.make(cfg.TrainConfig, {**dataclasses.asdict(stored), **given})
    for name in given:
        same = getattr(asked, name) == getattr(stored, name) or getattr(asked, name) == "auto"
        if name not in cfg.RESUMABLE and not same:
            raise InputError(
                f"the run was trained with {name}={getattr(stored, name)!r}; --resume cannot "
                f"change it to {getattr(asked, name)!r}; leave the flag out, or use another --out"
            )
    keep = {name: getattr(asked, name) for name in given if name in cfg.RESUMABLE}
    config = dataclasses.replace(stored, **keep)
    planned = stored.schedule == "cosine" and stored.schedule_epochs is None
    if planned and config.epochs != stored.epochs:
        raise InputError(
            f"the {stored.schedule} schedule of this run was planned for {stored.epochs} epochs, "
            "so --epochs cannot change; next time, plan with --schedule-epochs"
        )
    # All read now, so that damage is refused before anything is said or written.
    with cfg.naming(run.path / "metrics.jsonl"):
        run.read_metrics()
    checkpoint = runs.load_checkpoint(run.last)
    state = checkpoint.get("state", {})
    done = state.get("epoch", 0)
    check_continuable(done, state.get("best_epoch", 0), config.epochs, config.validate_every)
    if run.best.exists():
        runs.load_checkpoint(run.best)
    if config.epochs < done:
        raise InputError(
            f"--epochs is the total, and the run has {done} already; got {config.epochs}; give "
            f"{done} or more"
        )
    engine, _ = engines.mode_of(checkpoint)
    return run, config, _Begun(done, engine)


def _check_free(run: Run, overwrite: bool) -> None:
    if run.exists():
        # Other programs write a config.json too, and --overwrite must not touch their files.
        if not all((run.path / name).is_file() for name in _RECORDS):
            raise InputError(
                f"{run.path} exists and is not a run, so it was left alone; choose another --out"
            )
        if not overwrite:
            raise InputError(
                f"{run.path} already holds a run; continue it with --resume, replace it with "
                "--overwrite, or choose another --out"
            )
    parent = run.path
    while not parent.exists():
        parent = parent.parent
    check_writable(parent)


_RECORDS = ("config.json", "environment.json", "data.json")
_RESULTS = (
    "metrics.jsonl",
    "evaluation.json",
    "samples.png",
    "reconstructions.png",
    "curves.png",
    "report.html",
    "explore.html",
)
_FOLDERS = ("checkpoints", "evaluations", "scores", "annealing", "tensorboard")


def _start(run: Run, config: cfg.TrainConfig, dataset: data.Data, device: torch.device) -> None:
    for name in _RESULTS:
        (run.path / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(run.path / name, ignore_errors=True)
    run.write_json("config.json", dataclasses.asdict(config))
    run.write_json("environment.json", runs.environment(device, config.seed, runs.command_line()))
    facts = {"x_shape": list(dataset.x_shape), "protocol": dataset.protocol.to_dict()}
    run.write_json("data.json", facts)


def _note_environment(run: Run, config: cfg.TrainConfig, device: torch.device, epoch: int) -> None:
    """Of a run that goes on: the first environment stays, and what is other now is added."""
    if epoch >= config.epochs:
        return
    now = runs.environment(device, config.seed, runs.command_line())
    if (run.path / "environment.json").exists():
        now = runs.continued(run.read_json("environment.json"), now, epoch)
    run.write_json("environment.json", now)


def _draw_pictures(run: Run, vae: VAE, dataset: data.Data, metrics: list[dict[str, Any]]) -> None:
    device = next(vae.parameters()).device
    x = dataset.test.head(16).tensor().to(device)
    if plots.is_picture(vae.x_shape):
        plots.save(plots.samples(vae.generate(64, mean=True, seed=0)), run.path / "samples.png")
        again = vae.reconstruct(x, seed=0)
        plots.save(plots.reconstructions(x, again), run.path / "reconstructions.png")
    curves = plots.curves if vae.has_density else plots.error_curves
    plots.save(curves(metrics), run.path / "curves.png")


class _Interrupts:
    """Remembers a signal until the training loop is at a point where it can save."""

    def __init__(self) -> None:
        self.signal = 0
        self.immediate = False

    def asked(self) -> bool:
        return self.signal != 0

    def __call__(self, signum: int, frame: object) -> None:
        if self.immediate or self.signal:  # outside training, or a second time: at once
            sys.exit(128 + signum)
        self.signal = signum
        say("stopping after this step ...")


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    handler = _Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield handler
    finally:
        for s, previous in old.items():
            signal.signal(s, previous)
