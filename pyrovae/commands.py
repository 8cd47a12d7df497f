"""What each command of the command line does."""

import argparse
import dataclasses
import math
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyrovae import config as cfg
from pyrovae import data, likelihoods, networks, objectives, plots, posteriors, priors, runs
from pyrovae.cli import INFO, number, say, seed, settings, show
from pyrovae.errors import InputError
from pyrovae.evaluation import Evaluation
from pyrovae.evaluation import evaluate as run_evaluation
from pyrovae.runs import Run
from pyrovae.training import check_data, fit, resolve_device
from pyrovae.vae import VAE


def train(args: argparse.Namespace) -> int:
    """``pyrovae train``: check everything, then train, evaluate and draw pictures."""
    given = settings(args, cfg.TrainConfig)
    if args.out == "":
        raise InputError("--out expects a directory, got an empty name; leave it out for runs/...")
    if args.resume and args.overwrite:
        raise InputError("--resume continues a run and --overwrite replaces it; give one of them")
    if args.resume:
        run, config = _resumed(args, given)
    else:
        config = cfg.resolve(cfg.make(cfg.TrainConfig, given))
        run = Run(args.out or cfg.default_out(config))
        _check_free(run, args.overwrite)
    device = resolve_device(config.device)
    dataset = cfg.load_data(config)
    vae = cfg.build(config, dataset)
    check_data(vae.likelihood, dataset)
    if args.resume:
        _check_same_data(run, dataset)
    if args.dry_run:
        return _dry_run(config, dataset, vae, device)
    if args.resume:
        run.write_json("config.json", dataclasses.asdict(config))
    else:
        _start(run, config, dataset, device)

    say(f"data      {dataset.protocol}", args.quiet)
    say(f"model     {_describe(config, vae)}", args.quiet)
    say(f"run       {run.path} on {device}", args.quiet)
    with _interrupts() as interrupts:
        history = fit(
            vae,
            dataset,
            objective=objectives.REGISTRY[config.objective](config.num_particles),
            run=run,
            resume=args.resume,
            device=device,
            progress=False if args.quiet else None,
            should_stop=interrupts.asked,
            **{name: getattr(config, name) for name in _FIT_SETTINGS},
        )
        # The weights may be others now, and the number of a run must be that of its weights.
        (run.path / "evaluation.json").unlink(missing_ok=True)
        if history.stopped == "interrupted":
            say(f"stopped; all is saved. Continue: pyrovae train --out {_quoted(run)} --resume")
            return 128 + interrupts.signal
        interrupts.immediate = True
        if history.stopped == "patience":
            say(f"stopped early: no better validation ELBO in {config.patience} epochs", args.quiet)
        best = f"epoch {history.best_epoch}, validation ELBO {history.best_elbo:.3f}"
        say(f"best      {best}", args.quiet)
        _draw_pictures(run, vae, dataset, history.metrics)
        if config.final_particles:
            result = run_evaluation(vae, dataset.test, config.final_particles)
            run.write_json("evaluation.json", result.to_dict())
            show(str(result))
    say(f"next      pyrovae evaluate {_quoted(run)} --num-particles 5000", args.quiet)
    return 0


_FIT_SETTINGS = (
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "schedule",
    "schedule_epochs",
    "weight_decay",
    "clip_norm",
    "ema",
    "patience",
    "beta",
    "kl_warmup",
    "free_bits",
    "seed",
)


def _resumed(args: argparse.Namespace, given: dict[str, Any]) -> tuple[Run, cfg.TrainConfig]:
    run = Run(args.out or cfg.default_out(cfg.make(cfg.TrainConfig, given)))
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
    planned = stored.schedule != "constant" and stored.schedule_epochs is None
    if planned and config.epochs != stored.epochs:
        raise InputError(
            f"the {stored.schedule} schedule of this run was planned for {stored.epochs} epochs, "
            "so --epochs cannot change; next time, plan with --schedule-epochs"
        )
    # All read now, so that damage is refused before anything is said or written.
    with cfg.naming(run.path / "metrics.jsonl"):
        run.read_metrics()
    done = runs.load_checkpoint(run.last).get("state", {}).get("epoch", 0)
    if run.best.exists():
        runs.load_checkpoint(run.best)
    if config.epochs < done:
        raise InputError(
            f"--epochs is the total, and the run has {done} already; got {config.epochs}; give "
            f"{done} or more"
        )
    return run, config


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
    _check_writable(parent)


def _check_writable(folder: Path) -> None:
    # The permission bits do not tell: root passes them on a read-only or a virtual file system.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; choose another --out"
        ) from None


_RECORDS = ("config.json", "environment.json", "data.json")
_RESULTS = (
    "metrics.jsonl",
    "evaluation.json",
    "samples.png",
    "reconstructions.png",
    "curves.png",
)


def _start(run: Run, config: cfg.TrainConfig, dataset: data.Data, device: torch.device) -> None:
    for name in _RESULTS:
        (run.path / name).unlink(missing_ok=True)
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    run.write_json("config.json", dataclasses.asdict(config))
    run.write_json("environment.json", runs.environment(device, config.seed, runs.command_line()))
    facts = {"x_shape": list(dataset.x_shape), "protocol": dataset.protocol.to_dict()}
    run.write_json("data.json", facts)


def _check_same_data(run: Run, dataset: data.Data) -> None:
    _, stored = cfg.run_data(run)
    if stored != dataset.protocol:
        reason = stored.why_not_comparable(dataset.protocol) or "the split sizes differ"
        raise InputError(
            f"the data are not those the run was trained on: {reason}; restore them, or give the "
            "right --data-root"
        )


def _dry_run(config: cfg.TrainConfig, dataset: data.Data, vae: VAE, device: torch.device) -> int:
    history = fit(
        vae,
        data.Data(
            dataset.train.head(config.batch_size),
            dataset.valid.head(1),
            dataset.test.head(1),
            dataset.protocol,
        ),
        objective=objectives.REGISTRY[config.objective](config.num_particles),
        device=device,
        progress=False,
        **{name: getattr(config, name) for name in _FIT_SETTINGS if name != "epochs"},
        epochs=1,
    )
    shown = {k: v for k, v in dataclasses.asdict(config).items() if v not in (None, {}, False)}
    lines = [f"{name:<18} {value}" for name, value in shown.items()]
    lines += [
        f"{'protocol':<18} {dataset.protocol}",
        f"{'x':<18} {dataset.x_shape}",
        f"{'decoder output':<18} {tuple(vae.likelihood.params_shape)}",
        f"{'parameters':<18} {_count(vae):,}",
        f"{'loss of one step':<18} {history.metrics[0]['train_loss']:.3f} nats per image",
        "nothing was written",
    ]
    show("\n".join(lines))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """``pyrovae evaluate``: log p(x) of a split of a run."""
    config = cfg.make(cfg.EvaluateConfig, settings(args, cfg.EvaluateConfig))
    device = resolve_device(config.device)
    run = Run(args.run)
    vae = cfg.load(run, device=str(device))
    dataset = _data_of(run, config.data_root)
    split = getattr(dataset, config.split)
    if config.split == "train":
        # Training images are sampled anew at every use; a number needs them sampled once.
        split = _sampled_once(split, config.seed)
    if config.limit is not None:
        split = split.head(config.limit)
    result = _evaluate(vae, split, config, args.quiet)
    show(result.to_dict() if args.json else str(result))
    return 0


def _evaluate(vae: VAE, split: data.Split, config: cfg.EvaluateConfig, quiet: bool) -> Evaluation:
    from tqdm import tqdm

    with tqdm(total=len(split), unit="image", disable=True if quiet else None) as bar:
        return run_evaluation(
            vae,
            split,
            config.num_particles,
            seed=config.seed,
            progress=lambda done: bar.update(done - bar.n),
        )


def _sampled_once(split: data.Split, seed: int) -> data.Split:
    x = split.tensor(torch.Generator().manual_seed(seed))
    return dataclasses.replace(split, raw=x, levels=None, sampling="fixed")


def _data_of(run: Run, data_root: str | None) -> data.Data:
    config = cfg.run_config(run)
    if data_root is not None:
        config = dataclasses.replace(config, data_root=data_root)
    dataset = cfg.load_data(config)
    _check_same_data(run, dataset)
    return dataset


def sample(args: argparse.Namespace) -> int:
    """``pyrovae sample``: a sheet of images drawn from the model."""
    count = number("--num-samples", args.num_samples, least=1)
    out = _picture_path(args.out)
    draws = seed(args.seed)
    vae = cfg.load(args.run, device=str(resolve_device(args.device)))
    x = vae.generate(count, mean=args.mean, seed=draws)
    plots.save(plots.samples(x), out)
    show(str(out))
    return 0


def reconstruct(args: argparse.Namespace) -> int:
    """``pyrovae reconstruct``: images of a split beside their reconstructions."""
    count = number("--num-images", args.num_images, least=1)
    out = _picture_path(args.out)
    if args.split not in cfg.NAMES["split"]:
        raise InputError(cfg.unknown_name("--split", args.split, cfg.NAMES["split"]))
    draws = seed(args.seed)
    run = Run(args.run)
    vae = cfg.load(run, device=str(resolve_device(args.device)))
    split = getattr(_data_of(run, args.data_root), args.split).head(count)
    x = split.tensor(torch.Generator().manual_seed(draws))
    again = vae.reconstruct(x.to(next(vae.parameters()).device), mean=args.mean, seed=draws)
    columns = max(8, math.isqrt(len(x)))
    plots.save(plots.reconstructions(x, again, columns), out)
    show(str(out))
    return 0


def _picture_path(name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() != ".png":
        raise InputError(f"--out expects a file ending in .png, got {name!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"cannot write {name}: its folder must exist; check --out")
    _check_writable(path.parent)
    return path


def _draw_pictures(run: Run, vae: VAE, dataset: data.Data, metrics: list[dict[str, Any]]) -> None:
    device = next(vae.parameters()).device
    x = dataset.test.head(16).tensor().to(device)
    if plots.is_picture(vae.x_shape):
        plots.save(plots.samples(vae.generate(64, mean=True, seed=0)), run.path / "samples.png")
        again = vae.reconstruct(x, seed=0)
        plots.save(plots.reconstructions(x, again), run.path / "reconstructions.png")
    plots.save(plots.curves(metrics), run.path / "curves.png")


def info(args: argparse.Namespace) -> int:
    """``pyrovae info``: the names of a family, or the facts of a run."""
    topic = args.topic
    if topic is None:
        show("\n\n".join(f"{name}\n{_listing(name)}" for name in INFO))
    elif topic in INFO:
        show(_listing(topic))
    elif Path(topic).is_dir():
        show(_run_facts(Run(topic)))
    else:
        raise InputError(cfg.unknown_name("pyrovae info", topic, INFO) + ", or a run directory")
    return 0


def _listing(topic: str) -> str:
    rows: list[tuple[str, ...]]
    registry: Any
    if topic == "likelihoods":
        rows = [
            (name, cls.kind, cls.support, cls.summary) for name, cls in likelihoods.REGISTRY.items()
        ]
    elif topic == "networks":
        rows = [
            (name, pair.encoder.x_shapes, pair.encoder.summary)
            for name, pair in networks.REGISTRY.items()
        ]
    elif topic == "objectives":
        rows = [
            (name, str(make.__doc__).split("\n")[0]) for name, make in objectives.REGISTRY.items()
        ]
    elif topic == "data":
        rows = [(name, entry.summary) for name, entry in data.REGISTRY.items()]
    else:
        registry = priors.REGISTRY if topic == "priors" else posteriors.REGISTRY
        rows = [(name, cls.summary) for name, cls in registry.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def _run_facts(run: Run) -> str:
    config = cfg.run_config(run)
    _, protocol = cfg.run_data(run)
    vae = cfg.load(run)
    with cfg.naming(run.path / "metrics.jsonl"):
        metrics = run.read_metrics()
        best = max(metrics, key=lambda m: m["valid_elbo"], default=None)
    rows = [
        ("protocol", str(protocol)),
        ("model", _describe(config, vae)),
        ("objective", f"{config.objective}, {config.num_particles} particle(s)"),
        ("epochs", f"{len(metrics)} of {config.epochs}"),
    ]
    if best is not None:
        rows.append(("best", f"epoch {best['epoch']}, validation ELBO {best['valid_elbo']:.3f}"))
    if (run.path / "evaluation.json").is_file():
        e = run.read_json("evaluation.json")
        with cfg.naming(run.path / "evaluation.json"):
            error = "" if e["log_likelihood_se"] is None else f" ± {e['log_likelihood_se']:.3f}"
            text = f"log p(x) {e['log_likelihood']:.3f}{error} nats per image, K = "
            text += f"{e['num_particles']}, {e['num_images']:,} images of {e['split']}"
        rows.append(("evaluation", text))
    return "\n".join(f"{name:<11} {value}" for name, value in rows)


def _describe(config: cfg.TrainConfig, vae: VAE) -> str:
    return (
        f"{config.likelihood} likelihood, {config.network} network, {config.posterior} posterior, "
        f"{config.prior} prior, {vae.latent_dim} latents, {_count(vae):,} parameters"
    )


def _count(vae: VAE) -> int:
    return sum(p.numel() for p in vae.parameters())


def _quoted(run: Run) -> str:
    return shlex.quote(str(run.path))


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
