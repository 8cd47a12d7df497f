"""The report of a run: one HTML file that opens from disk and says how good the model is."""

import dataclasses
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrovae import config as cfg
from pyrovae import page, presets
from pyrovae import report_numbers as numbers
from pyrovae import report_pictures as views
from pyrovae.errors import InputError
from pyrovae.evaluation import evaluate
from pyrovae.information import information
from pyrovae.page import Html, Section
from pyrovae.report_numbers import Material
from pyrovae.runs import Run, atomic_path

# Images that are encoded for the latent space's sake; the first ones.
_ENCODED = 1000
# Those whose rate is split, at the cost of the square of their number.
_PAIRED = 500
# What the page shows of every epoch.
_METRICS = ("epoch", "seconds", "train_loss")
_VALIDATED = ("valid_elbo", "valid_rate", "valid_distortion")  # all of them, or none


def write_report(
    run: Run | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    num_particles: int = 1000,
    num_images: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    data_root: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Evaluate a run on its test split and write all about it to one HTML file; returns its path.

    The file loads nothing from anywhere, and is the same every time for the same weights, data,
    K and seed.

    Args:
        run: the run, or its directory.
        out: a name that ends in .html; default: ``report.html`` in the run's directory.
        num_particles: K, draws of z per image, for log p(x).
        num_images: evaluate the first so many test images; default: all.
        seed: of all draws.
        device: where to compute: "auto", "cpu", "cuda", ...
        data_root: folder of the data, if it has moved since training.
        progress: called with the number of images evaluated, and of all that will be.

    Raises:
        InputError: for a directory that is no run, data that are not those of the run, K < 1, or
            an ``out`` that cannot be written.
    """
    run = run if isinstance(run, Run) else Run(run)
    config = cfg.run_config(run)
    path = _checked_path(Path(out) if out is not None else run.path / "report.html")
    dataset = cfg.data_of(run, data_root)
    protocol, test = dataset.protocol, dataset.test
    if num_images is not None:
        test = test.head(num_images)
    vae = cfg.load(run, device=device)
    metrics, environment = _records(run)
    result = evaluate(
        vae,
        test,
        num_particles,
        seed=seed,
        progress=None if progress is None else lambda done: progress(done, len(test)),
    )
    x = test.head(_ENCODED).tensor().to(next(vae.parameters()).device)
    material = Material(
        run,
        config,
        environment,
        metrics,
        protocol,
        vae,
        test,
        x,
        result,
        information(vae.model, vae.guide, x[:_PAIRED], seed=seed),
    )
    text = render(material)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(m: Material) -> Html:
    """The page of a report."""
    title = f"Report of {m.run.path.resolve().name}"
    return page.page(title, numbers.intro(m), [make(m) for make in SECTIONS])


def _records(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics and environment of a run; InputError naming the file that lacks what is shown."""
    with cfg.naming(run.path / "metrics.jsonl"):
        metrics = run.read_metrics()
        for line in metrics:
            for name in _METRICS + (_VALIDATED if set(line) & set(_VALIDATED) else ()):
                float(line[name])
    environment = run.read_json("environment.json")
    with cfg.naming(run.path / "environment.json"):
        for name in ("pyrovae", "python", "device", "device_name"):
            str(environment[name])
        dict(environment["packages"])
    return metrics, environment


def _checked_path(path: Path) -> Path:
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out expects a file ending in .html, got {str(path)!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"cannot write {path}: its folder must exist; check --out")
    return path


def reproduce(m: Material) -> Section:
    """The commands that make the run and this page again."""
    r = m.result
    run = shlex.quote(str(m.run.path))
    options = f"--num-particles {r.num_particles} --seed {r.seed}"
    few = r.num_images < m.protocol.test_size
    limit = f" --limit {r.num_images}" if few else ""
    images = f" --num-images {r.num_images}" if few else ""
    versions = m.environment["packages"]
    # A registry knows a release, not the build of it that is here ("2.11.0+cpu").
    packages = [f"{name}=={v.partition('+')[0]}" for name, v in versions.items() if v]
    lines = [
        f"pip install -e . {' '.join(packages)}",
        f"pyrovae train {train_flags(m.config)} --out {run}",
        f"pyrovae evaluate {run} {options}{limit}",
        f"pyrovae report {run} {options}{images}",
    ]
    lead = (
        f"These commands, given in a checkout of pyrovae {numbers.version(m.environment)}, install "
        "the software, train the model, evaluate it, and write this page. "
        "On the same machine and device they give the same numbers; elsewhere, numbers that "
        "differ by rounding in training."
    )
    summary = {name: value for name, value in r.to_dict().items() if name != "seconds"}
    text = json.dumps(summary, indent=1, allow_nan=False).replace("<", "\\u003c")
    data = Html(f'<script type="application/json" id="evaluation">{text}</script>')
    last = page.paragraph("For programs, the evaluation is in this page's source as JSON.")
    return page.section(
        "reproduce",
        "Reproduce",
        "How to reproduce this",
        page.paragraph(lead),
        page.commands(lines),
        last,
        data,
    )


def train_flags(config: cfg.TrainConfig) -> str:
    """The flags of ``pyrovae train`` that give this configuration; defaults are left out."""
    kept = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default is not dataclasses.MISSING else {}
        # A preset's settings are among the others, and would bring back what was set to a default.
        if f.name in ("preset", "workers"):  # and these are of one machine
            continue
        if value != default or f.name in ("data", "likelihood", "epochs", "seed"):
            kept[f.name] = value
    return shlex.join(presets.flags(kept))


_WORDS = (
    ("nat", "The unit of these logarithms: 1 nat is 1.44 bits. One nat more makes x 2.7 times as "
     "probable."),
    ("latent z", "The numbers from which the model draws x; p(z) is their prior distribution."),
    ("p(x | z), the likelihood", "The distribution of x that the decoder network gives for z."),
    ("q(z | x), the posterior", "The encoder network's guess of which z could have made x."),
    ("log p(x)", "The logarithm of the probability, or probability density, of x under the model, "
     "whatever z made it. A density may be above 1, and its logarithm above 0."),
    ("E[x | z]", "The mean of x under p(x | z): the picture that z stands for, without the noise."),
    ("mass, density", "A mass gives each level of a pixel a probability; a density belongs to "
     "values on a continuum."),
    ("KL(q ‖ p)", "Kullback-Leibler divergence, E log q − log p under q: how far q is from p, in "
     "nats; 0 only if they are equal."),
    ("ELBO", "Evidence lower bound, −(rate + distortion): at most log p(x)."),
    ("rate", "KL(q(z | x) ‖ p(z)): how far the encoder moves z away from its prior."),
    ("distortion", "−E log p(x | z) under q: how badly z describes x."),
    ("bits per dimension", "−log₂ p(x) per number of x, on the scale of its original levels."),
    ("K, particles", "Draws of z per x. With K = 1 the bound is the ELBO."),
    ("Pareto k", "Shape of the tail of the weights p(x, z) / q(z | x); above 0.7 their mean "
     "cannot be trusted."),
    ("effective sample size", "How many equally weighted draws would do as well as the K that "
     "were weighted."),
    ("active unit", "A latent dimension whose mean under q(z | x) varies with x, by a variance of "
     "0.01 or more."),
    ("I(x; z)", "Mutual information: what z tells of which x it came from, in nats."),
    ("standard error", "How far a mean would move, typically, with another sample of test data."),
)  # fmt: skip


def words(m: Material) -> Section:
    """The terms of this page."""
    return page.section("words", "Words", "Words", page.facts(_WORDS))


SECTIONS = (
    numbers.training,
    numbers.curves,
    numbers.likelihood,
    views.samples,
    views.reconstructions,
    views.extremes,
    numbers.latent_use,
    views.plane,
    views.interpolations,
    views.traversals,
    reproduce,
    words,
)
