"""``pyrovae train --dry-run``: everything but the training, and what that would cost."""

import dataclasses
import itertools
import statistics
import time
from typing import Any

import torch

from pyrovae import config as cfg
from pyrovae import data, engines, objectives, processes
from pyrovae.commands.info import count
from pyrovae.commands.output import show
from pyrovae.importance import log_terms
from pyrovae.runs import duration
from pyrovae.streams import own_streams
from pyrovae.training import fit
from pyrovae.vae import VAE

# Steps that are timed; the first, which pays for what is set up once, is left out.
_STEPS = 5
_VALIDATED = 500


def dry_run(
    config: cfg.TrainConfig,
    dataset: data.Data,
    vae: VAE,
    device: torch.device,
    fit_settings: dict[str, Any],
    begun_by: str | None = None,
) -> int:
    """Take a few steps in memory; print the settings, the shapes, and the cost of an epoch.

    ``begun_by``: the engine of the run that would be resumed, which "auto" takes up.
    """
    train = dataset.train.head(_STEPS * config.batch_size)
    few = data.Data(
        train,
        dataset.valid.head(_VALIDATED),
        dataset.test.head(1),
        dataset.protocol,
    )
    objective = objectives.REGISTRY[config.objective](config.num_particles)
    if config.schedule == "cosine":  # which is planned for all epochs, where one is taken here
        fit_settings = fit_settings | {"schedule_epochs": config.schedule_epochs or config.epochs}
    steps = -(-len(dataset.train) // config.batch_size)
    numbers = engines.numbers_of_step(
        vae, dataset.x_shape, min(config.batch_size, len(dataset.train)), config.num_particles
    )
    engine, why = engines.choose(config.engine, device, config.epochs * steps, numbers)
    if begun_by is not None and config.engine == "auto":
        engine, why = begun_by, "as the run began"
    timed = engine if config.engine != "auto" else "svi"  # whose time does not hang on compilation
    fit_settings = fit_settings | {"engine": timed}
    times: list[float] = []
    ends: list[float] = []
    history = fit(
        vae,
        few,
        objective=objective,
        device=device,
        progress=False,
        epochs=1,
        should_stop=lambda: _note(times, device),
        callback=lambda _: ends.append(time.perf_counter()),
        **fit_settings,
    )
    lengths = [b - a for a, b in itertools.pairwise(times)]
    kept = activations(vae, train, config, device)
    weights = sum(t.nbytes for t in vae.state_dict().values())
    # The gradient, two moments of Adam, and the best weights so far; then the moving average.
    training = weights * (5 + (config.ema is not None)) + kept
    splits = (dataset.train, dataset.valid, dataset.test)
    held = sum(split.raw.nbytes for split in splits if isinstance(split, data.Split))

    shown = {k: v for k, v in dataclasses.asdict(config).items() if v not in (None, {}, False)}
    if config.model == "hierarchical":
        shown["latent_dim"] = vae.latent_dim
    loss = "nats per image"
    if not vae.has_density:
        loss = "squared error per image"
        for name in ("likelihood", "likelihood_args", "prior", "posterior", "objective", "beta"):
            shown.pop(name, None)
    rows = list(shown.items())
    rows += [
        ("protocol", dataset.protocol),
        ("x", dataset.x_shape),
        ("decoder output", tuple(vae.likelihood.params_shape)),
        ("parameters", f"{count(vae):,}"),
        ("engine taken", f"{engine}: {why}"),
        ("memory", f"about {_size(training)} on {device}, {_size(held)} of data"),
        ("loss of one step", f"{history.metrics[0]['train_loss']:.3f} {loss}"),
    ]
    if lengths:
        step = statistics.median(lengths)
        validation = (ends[0] - times[-1]) * len(dataset.valid) / len(few.valid)
        epoch = steps * step + validation
        validations = -(-config.epochs // config.validate_every)
        whole = config.epochs * steps * step + validations * validation
        less = "" if timed == engine else f", of which {engine} needs less"
        less += ", and what is read from disk" if config.stream else ""
        rows += [
            ("time of one step", f"{1000 * step:.1f} ms by {timed}, with gradient and update"),
            ("time of an epoch", f"about {epoch:.1f} s: {steps:,} steps and the validation"),
            ("time of all", f"about {duration(whole)} by {timed}{less}"),
        ]
    if processes.is_first():
        show("\n".join([*(f"{name:<18} {value}" for name, value in rows), "nothing was written"]))
    return 0


def _note(times: list[float], device: torch.device) -> bool:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times.append(time.perf_counter())
    return False


def activations(vae: VAE, split: data.Split, config: cfg.TrainConfig, device: torch.device) -> int:
    """Bytes that a forward pass keeps for the backward pass, of one batch."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own operation keeps would live for ever

    x = split.head(config.batch_size).tensor(torch.Generator().manual_seed(0)).to(device)
    x = x.clone()  # real data are a view of all of them
    own = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    with own_streams(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = -log_terms(vae.model, vae.guide, x, config.num_particles).log_weights.sum()
    # The graph is alive until here, so no two storages had one address.
    del loss
    return sum(size for address, size in kept.items() if address not in own)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
