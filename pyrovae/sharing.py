"""A trained VAE in a directory to share: weights without code, configuration, and a model card.

======================  ==========================================================================
``model.safetensors``   the weights
``config.json``         every setting, enough to rebuild the VAE
``data.json``           the shape of x and the protocol of the data
``environment.json``    versions, commit, device and seed of the training
``README.md``           the model card: what it is, how good it is, how to use it
======================  ==========================================================================

`pyrovae.load` brings the VAE back from it, in another process and on another device, and so do the
commands that draw pictures. Paths of the machine that it was trained on are left out.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyrovae
from pyrovae import comparison
from pyrovae import config as cfg
from pyrovae.errors import InputError
from pyrovae.report import train_flags
from pyrovae.runs import Run, atomic_path, load_checkpoint
from pyrovae.vae import VAE

WEIGHTS = cfg.SHARED_WEIGHTS
_FILES = (WEIGHTS, "config.json", "data.json", "environment.json", "README.md")


def export(
    run: Run | str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write a run's best weights, its configuration and a model card to a directory; return it.

    Args:
        run: the run, or its directory.
        out: the directory to write; new or empty.
        overwrite: replace an earlier export there; files of other kinds are left alone.

    Raises:
        InputError: if ``run`` is not a run, ``out`` is in use or cannot be written, or safetensors
            is not installed.
    """
    check_installed()
    run = run if isinstance(run, Run) else Run(run)
    vae = cfg.load(run)
    if not vae.has_density:
        raise InputError(
            "the card of an export tells what p(x) is, and an autoencoder has none; export a VAE, "
            f"or copy the weights of {run.best}"
        )
    config = cfg.run_config(run)
    environment = run.read_json("environment.json")
    evaluation = best_evaluation(run)
    out = Path(out)
    _check_free(out, overwrite)
    from safetensors.torch import save_file

    weights = {name: t.detach().cpu().clone() for name, t in vae.state_dict().items()}
    target = Run(out)
    try:
        with atomic_path(out / WEIGHTS) as temporary:
            save_file(weights, temporary, {"format": "pt", "pyrovae": pyrovae.__version__})
        shared = dataclasses.replace(config, data=Path(config.data).name, data_root=None)
        target.write_json("config.json", dataclasses.asdict(shared))
        target.write_json("data.json", run.read_json("data.json"))
        kept = {k: v for k, v in environment.items() if k != "command"}
        target.write_json("environment.json", kept)
        with atomic_path(out / "README.md") as temporary:
            card = model_card(out.resolve().name, shared, vae, cfg.run_data(run)[1], evaluation)
            temporary.write_text(card, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; choose another DIR") from None
    return out


def check_installed() -> None:
    """Raise InputError, with the remedy, where there is no safetensors."""
    from importlib.util import find_spec

    if find_spec("safetensors") is None:
        raise InputError(
            "shared weights are safetensors, which is not installed; pip install -e '.[share]'"
        )


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; expected a directory to write; choose another DIR")
    inside = {path.name for path in out.iterdir()}
    if not inside or (overwrite and WEIGHTS in inside):
        return
    remedy = "replace it with --overwrite, or choose another DIR"
    if WEIGHTS not in inside:
        remedy = "it holds no earlier export, so it was left alone; choose another DIR"
    raise InputError(f"{out} is in use (it holds {min(inside)}): {remedy}")


def read_weights(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file; InputError if it cannot be read."""
    check_installed()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"cannot read {path}: it is truncated, or not safetensors ({error}); restore a copy"
        ) from None


def best_evaluation(run: Run) -> dict[str, Any] | None:
    """The evaluation of a run's weights on its test split with the largest K, if there is one."""
    digest = comparison.checkpoint_digest(run)
    found = []
    for path in sorted((run.path / "evaluations").glob(f"test-K*-{digest}.pt")):
        found.append(load_checkpoint(path)["summary"])
    if (run.path / "evaluation.json").is_file():
        found.append(run.read_json("evaluation.json"))
    return max(found, key=lambda summary: summary["num_particles"], default=None)


def model_card(
    name: str,
    config: cfg.TrainConfig,
    vae: VAE,
    protocol: object,
    evaluation: dict[str, Any] | None,
) -> str:
    """What a stranger must know to use the weights and to trust the numbers, in Markdown."""
    parameters = sum(p.numel() for p in vae.parameters())
    rows = [
        ("x", f"shape {vae.x_shape}, floats in [0, 1]"),
        ("p(z)", f"{config.prior}, {vae.layout} dimensions"),
        ("q(z \\| x)", f"{config.posterior}"),
        ("p(x \\| z)", f"{config.likelihood}, a {vae.likelihood.kind}"),
        ("networks", f"{config.network}, {parameters:,} parameters"),
        ("objective", f"{config.objective}, {config.num_particles} particle(s)"),
        ("data", f"{protocol}"),
    ]
    return f"""---
library_name: pyrovae
tags:
- variational-autoencoder
- pyro
---

# {name}

A variational autoencoder, trained with [Pyro](https://pyro.ai) by pyrovae {pyrovae.__version__}.

{_table(("part", "choice"), rows)}

## How good it is

{_numbers(evaluation)}

## How to use it

```python
import pyrovae as pv

vae = pv.load("{name}")  # device="cuda" for a GPU
x = vae.generate(16)  # {(16, *vae.x_shape)}
z = vae.encode(x)  # (16, {vae.latent_dim})
again = vae.reconstruct(x)
```

## How it was made

```bash
pyrovae train {train_flags(config)}
```

Seed {config.seed} for weights, order and draws, {config.data_seed} for the split. `config.json`
holds every setting, `environment.json` the versions.

## What it cannot tell

The numbers hold for the data and protocol named above, and compare with no others. A low log p(x)
does not prove an outlier, nor a high one its absence. Samples show what the training images held,
their faults included.
"""


def _numbers(e: dict[str, Any] | None) -> str:
    if e is None:
        return "It was not evaluated. `pyrovae evaluate RUN` gives log p(x) with its error."
    rows = [("log p(x)", _with_error(e, "log_likelihood")), ("ELBO", _with_error(e, "elbo"))]
    rows += [("rate", f"{e['rate']:.3f}"), ("distortion", f"{e['distortion']:.3f}")]
    if e["bits_per_dim"] is not None:
        rows.append(("bits per dimension", f"{e['bits_per_dim']:.4f}"))
    if e["pareto_k_above_0_7"] is not None:
        rows.append(("Pareto k above 0.7", f"{e['pareto_k_above_0_7']:.1%} of the images"))
    return f"""{_table(("number", "nats per image, ± one standard error over images"), rows)}

Importance sampling with K = {e["num_particles"]}, seed {e["seed"]}, on {e["num_images"]:,} images
of the {e["split"]} split, which bounds log p(x) from below. The command:

```bash
pyrovae evaluate RUN --num-particles {e["num_particles"]} --seed {e["seed"]}
```"""


def _with_error(e: dict[str, Any], name: str) -> str:
    error = e[f"{name}_se"]
    return f"{e[name]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {a} | {b} |" for a, b in lines)
