"""A row, run: trained as ``pyrovae train`` trains, evaluated once, and its result as JSON."""

import dataclasses
import math
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyrovae import cli, comparison, presets, runs
from pyrovae import config as cfg
from pyrovae.commands.output import progress, say
from pyrovae.errors import InputError
from pyrovae.runs import Run
from pyrovae.training import out_of_patience
from reproduction.rows import Row

# Settings of a stored run that do not make its weights: where and how it was carried out.
_ELSEWHERE = ("preset", "data_root", "download", "device", "final_particles", "log")
_SEED = 0  # of the evaluation's draws

_KEPT = (
    "log_likelihood",
    "log_likelihood_se",
    "log_likelihood_mc_error",
    "bias",
    "psis_log_likelihood",
    "elbo",
    "elbo_se",
    "rate",
    "distortion",
    "bits_per_dim",
    "active_units",
    "pareto_k_above_0_7",
    "kind",
    "num_images",
    "num_particles",
    "protocol",
)


class Place(NamedTuple):
    """Where runs, results and pages lie, what computes, and where the data are."""

    runs: Path
    results: Path
    figures: Path
    readme: Path | None
    device: str = "auto"
    quiet: bool = False
    data_root: str | None = None
    download: bool = False

    def has_gpu(self) -> bool:
        """Whether there is a GPU to use."""
        return self.device != "cpu" and torch.cuda.is_available()


class StoppedError(Exception):
    """Training ended with an exit status other than 0."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def settings_of(row: Row, seed: int, place: Place) -> dict[str, Any]:
    """What ``pyrovae train`` is told for a row."""
    own = {"seed": seed, "device": place.device, "final_particles": 0}
    given = {**row.settings, **own}
    if Path(given.get("data", "")).suffix:
        folder = place.data_root or os.environ.get("PYROVAE_DATA") or "data"
        given["data"] = str(Path(folder, given["data"]))
    elif place.data_root is not None or place.download:
        given |= {"data_root": place.data_root, "download": place.download}
    return given


def command(row: Row) -> str:
    """The row as a command, for whoever wants no more than the training."""
    given = dict(row.settings)
    if Path(str(given.get("data", ""))).suffix:
        given["data"] = f"DATA/{given['data']}"
    else:
        given["data_root"] = "DATA"
    return "pyrovae train " + shlex.join(presets.flags(given))


def folder(row: Row, seed: int, place: Place) -> Run:
    """Where a row's run of one seed lies."""
    return Run(place.runs / row.table / row.name / f"seed{seed}")


def trained(row: Row, seed: int, place: Place) -> bool:
    """Whether the weights of a row are here."""
    return folder(row, seed, place).best.is_file()


def run(row: Row, seed: int, place: Place) -> dict[str, Any]:
    """Train what is not trained yet, evaluate it once, and return the seed's part of the result.

    Raises:
        InputError: if the run that is there has other settings, or data are missing.
        StoppedError: if training was interrupted or failed; what there is can be taken up again.
    """
    here = folder(row, seed, place)
    given = settings_of(row, seed, place)
    asked = cfg.resolve(cfg.make(cfg.TrainConfig, cfg.with_preset(given)))
    status = 0
    if not here.exists():
        status = _train(given, here, place)
    else:
        _check_same(here, asked)
        if not here.last.is_file():  # stopped before its first checkpoint
            status = _train(given, here, place, "--overwrite")
        elif not finished(here, asked):
            resumable = {k: v for k, v in given.items() if k in cfg.RESUMABLE and k != "epochs"}
            status = _train(resumable, here, place, "--resume")
    if status:
        raise StoppedError(status)
    with progress("image", place.quiet) as report:
        measured = comparison.evaluate_run(
            here,
            row.particles,
            seed=_SEED,
            device=place.device,
            data_root=place.data_root if "data_root" in given else None,
            progress=lambda done, total: report("evaluate", done, total),
        )
    return _result(here, measured)


def _train(given: dict[str, Any], here: Run, place: Place, *more: str) -> int:
    quiet = ["--quiet"] if place.quiet else []
    return cli.main(["train", *presets.flags(given), "--out", str(here.path), *more, *quiet])


def _check_same(here: Run, asked: cfg.TrainConfig) -> None:
    stored, ours = _plain(cfg.run_config(here)), _plain(asked)
    for name, value in ours.items():
        if stored[name] != value:
            raise InputError(
                f"{here.path} was trained with {name}={stored[name]!r}, where the row has "
                f"{value!r}; move that run away, and the row is trained anew"
            )


def _plain(config: cfg.TrainConfig) -> dict[str, Any]:
    """The settings that make the weights; a file of images by its name alone."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in _ELSEWHERE}
    for name in ("model_args", "prior_args", "likelihood_args", "posterior_args"):
        values[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in values[name].items()}
    return values | {"data": Path(config.data).name}


def finished(here: Run, config: cfg.TrainConfig) -> bool:
    """Whether a run has all its epochs, or has lost its patience."""
    state = runs.load_checkpoint(here.last)["state"]
    epoch, best = state["epoch"], state["best_epoch"]
    return epoch >= config.epochs or out_of_patience(
        epoch, best, config.patience, config.validate_every
    )


def _result(here: Run, measured: comparison.Measured) -> dict[str, Any]:
    environment, metrics = here.read_json("environment.json"), here.read_metrics()
    best = max((m for m in metrics if "valid_elbo" in m), key=lambda m: m["valid_elbo"])
    summary = measured.summary
    return {
        **{name: summary[name] for name in _KEPT},
        "valid_elbo": best["valid_elbo"],
        "best_epoch": best["epoch"],
        "epochs": metrics[-1]["epoch"],
        "steps": metrics[-1]["step"],
        "training_seconds": metrics[-1]["seconds"],
        "evaluation_seconds": summary["seconds"],
        "parameters": measured.parameters,
        "dims": math.prod(here.read_json("data.json")["x_shape"]),
        "device": environment["device"],
        "device_name": environment["device_name"],
        "threads": environment["threads"],
        "evaluated_on": summary["device"],
        "evaluation_threads": torch.get_num_threads(),
        "pyrovae": environment["pyrovae"],
        "trained_by": environment.get("commit"),
        "evaluated_by": summary.get("commit"),
        "python": environment["python"],
        "packages": environment["packages"],
        **({"continued": environment["continued"]} if "continued" in environment else {}),
    }


def keep(row: Row, seed: int, result: dict[str, Any], place: Place) -> Path:
    """Put a seed's result into the row's file; seeds of other settings are dropped from it."""
    table = Run(place.results / row.table)
    name = f"{row.name}.json"
    about = {
        "table": row.table,
        "row": row.name,
        "title": row.title,
        "published": row.published._asdict() if row.published else None,
        "settings": row.settings,
        "num_particles": row.particles,
        "evaluation_seed": _SEED,
        "command": f"python scripts/reproduce.py --table {row.table} --row {row.name}",
        "trains": command(row),
    }
    seeds: dict[str, Any] = {}
    if (table.path / name).is_file():
        before = table.read_json(name)
        if all(before.get(k) == about[k] for k in ("settings", "num_particles")):
            seeds = before["seeds"]
        else:
            say(f"{name}: its settings have changed, so earlier seeds are dropped", place.quiet)
    seeds[str(seed)] = result
    table.write_json(name, {**about, "seeds": dict(sorted(seeds.items(), key=_number))})
    return table.path / name


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])
