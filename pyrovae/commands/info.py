"""``pyrovae info``: the names of a family, or the facts of a run."""

import argparse
from pathlib import Path
from typing import Any

from pyrovae import config as cfg
from pyrovae import data, likelihoods, networks, objectives, posteriors, priors
from pyrovae.commands.output import show
from pyrovae.errors import InputError
from pyrovae.parser import INFO
from pyrovae.presets import PRESETS, flags
from pyrovae.runs import Run
from pyrovae.vae import VAE


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
    elif topic == "presets":
        rows = [
            (name, summary, " ".join(flags(given))) for name, (summary, given) in PRESETS.items()
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
        validated = [m for m in metrics if "valid_elbo" in m]
        best = max(validated, key=lambda m: m["valid_elbo"], default=None)
    rows = [
        ("protocol", str(protocol)),
        ("model", describe(config, vae)),
        ("epochs", f"{len(metrics)} of {config.epochs}"),
    ]
    bound = None if best is None else f"ELBO {best['valid_elbo']:.3f}"
    if vae.has_density:
        particles = f"{config.objective}, {config.num_particles} particle(s)"
        rows.insert(2, ("objective", particles))
    elif best is not None:
        bound = f"squared error {-best['valid_elbo']:.3f}"
    if best is not None:
        rows.append(("best", f"epoch {best['epoch']}, validation {bound}"))
    if (run.path / "evaluation.json").is_file():
        e = run.read_json("evaluation.json")
        with cfg.naming(run.path / "evaluation.json"):
            error = "" if e["log_likelihood_se"] is None else f" ± {e['log_likelihood_se']:.3f}"
            text = f"log p(x) {e['log_likelihood']:.3f}{error} nats per image, K = "
            text += f"{e['num_particles']}, {e['num_images']:,} images of {e['split']}"
        rows.append(("evaluation", text))
    return "\n".join(f"{name:<11} {value}" for name, value in rows)


def describe(config: cfg.TrainConfig, vae: VAE) -> str:
    """The choices of a model in one line."""
    if config.model == "autoencoder":
        return (
            f"autoencoder, squared error, {config.network} network, {vae.layout} latents, "
            f"{count(vae):,} parameters"
        )
    return (
        f"{config.likelihood} likelihood, {config.network} network, "
        f"{config.posterior} posterior, {config.prior} prior, {vae.layout} latents, "
        f"{count(vae):,} parameters"
    )


def count(vae: VAE) -> int:
    """Numbers that are learnt."""
    return sum(p.numel() for p in vae.parameters())
