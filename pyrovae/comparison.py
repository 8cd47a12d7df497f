"""Several runs in one table, best first; what cannot be compared is refused, not printed.

Two means of log p(x) over the same images differ far less by chance than either mean does, for an
image that is hard for one model is hard for the other. The table therefore gives the paired
differences, image by image, with their own standard error. Per-image results are kept in the run,
under ``evaluations``, so that a second table costs nothing.
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyrovae
from pyrovae import config as cfg
from pyrovae import likelihoods
from pyrovae.data import Protocol, Split, StreamedSplit
from pyrovae.errors import InputError
from pyrovae.evaluation import Evaluation, evaluate
from pyrovae.importance import GUIDE
from pyrovae.runs import Run, commit, duration, load_checkpoint, save_checkpoint

Progress = Callable[[str, int, int], None]
"""Called with what is being computed, the number of images done, and that of all images."""

_DEFAULT_PARTICLES = 1000
# Above this share of images with Pareto k > 0.7, the mean itself is in doubt.
_DOUBTFUL = 0.1


class Row(NamedTuple):
    """One run, in nats per image; a ``_se`` is the standard error of a mean over images."""

    run: str
    kind: str
    """"mass" or "density", as the likelihood gives it."""
    corrected: bool
    """Whether a density was brought to the scale of masses; its numbers are then bounds."""
    log_likelihood: float
    log_likelihood_se: float
    difference: float
    """Mean over images of log p(x) minus that of the best run."""
    difference_se: float
    elbo: float
    elbo_se: float
    rate: float
    distortion: float
    bits_per_dim: float | None
    active_units: int | None
    pareto_k_median: float | None
    pareto_k_above_0_7: float | None
    parameters: int
    training_seconds: float | None
    per_image_difference: Tensor
    """(N,) log p(x) minus that of the best run."""


class Comparison(NamedTuple):
    """The table of `compare`; ``print`` it, or take ``to_markdown()`` or ``to_dict()``."""

    protocol: str
    split: str
    num_images: int
    num_particles: int
    seed: int
    scale: str
    """"mass": log P(x) on the levels; "density": log p(x) of x as a real vector."""
    rows: tuple[Row, ...]
    """Best first."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (NaN as None), without the per-image differences."""
        rows = []
        for row in self.rows:
            values = row._asdict()
            del values["per_image_difference"]
            rows.append({k: None if v != v else v for k, v in values.items()})
        return {**self._asdict(), "rows": rows, "notes": list(self.notes)}

    def to_markdown(self) -> str:
        """A Markdown table and its notes."""
        lines = [_HEADERS, ["---"] + ["---:"] * (len(_HEADERS) - 1), *map(_cells, self.rows)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return table + "\n\n" + "\n".join(f"- {note}" for note in self.notes)

    def __str__(self) -> str:
        lines = [_HEADERS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        )
        return table + "\n\n" + "\n".join(self.notes)


_HEADERS = [
    "run",
    "log p(x)",
    "from the best",
    "bits/dim",
    "ELBO",
    "rate",
    "distortion",
    "active",
    "Pareto k",
    "k > 0.7",
    "parameters",
    "training",
]


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        row.run + (" †" if row.corrected else ""),
        _with_error(row.log_likelihood, row.log_likelihood_se),
        "best" if not row.per_image_difference.any() else _paired(row),
        number(row.bits_per_dim, ".4f"),
        _with_error(row.elbo, row.elbo_se),
        f"{row.rate:.2f}",
        f"{row.distortion:.2f}",
        number(row.active_units, "d"),
        number(row.pareto_k_median, ".2f"),
        number(row.pareto_k_above_0_7, ".1%"),
        f"{row.parameters:,}",
        "-" if row.training_seconds is None else duration(row.training_seconds),
    ]


def _paired(row: Row) -> str:
    return _with_error(row.difference, row.difference_se)


def _with_error(value: float, error: float) -> str:
    return f"{value:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def compare(
    paths: Sequence[Run | str | os.PathLike[str]],
    *,
    num_particles: int | None = None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    data_root: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Put runs of one data set and protocol into one table, best log p(x) first.

    ``difference = mean_i (log p_run(x_i) - log p_best(x_i))`` with the standard error
    ``std_i / sqrt(N)``. Where masses meet densities, the densities of y = (L x + u) / (L + 1),
    u ~ U(0, 1), are brought to the masses' scale by ``log P(x) >= E log p(y) - dims log(L + 1)``
    (Theis et al., A note on the evaluation of generative models, 2016,
    https://arxiv.org/abs/1511.01844), and marked.

    Args:
        paths: run directories.
        num_particles: K; runs that were not evaluated with it are. Default: the largest K that all
            evaluated runs share, or 1000 where none was evaluated.
        split: "train", "valid" or "test".
        limit: only the first images of the split.
        seed: of the draws.
        device: where to compute.
        data_root: the folder of the data, if it has moved since training.
        progress: called with the run, the images done, and all images.

    Raises:
        InputError: for runs that cannot be compared, with the reason: other data, split, protocol
            or binarisation; a density that no level correction brings to the scale of a mass; or
            evaluations with different K.
    """
    runs = [run if isinstance(run, Run) else Run(run) for run in paths]
    names = _names(runs)
    if split not in cfg.NAMES["split"]:
        raise InputError(cfg.unknown_name("--split", split, cfg.NAMES["split"]))
    protocols = [cfg.run_data(run)[1] for run in runs]
    kinds = [likelihoods.REGISTRY[cfg.run_config(run).likelihood].kind for run in runs]
    mixed = len(set(kinds)) > 1
    for run, name in zip(runs, names, strict=True):
        if cfg.run_config(run).model == "autoencoder":
            raise InputError(
                f"{name} is an autoencoder, which has no p(x) to compare; leave it out, or train "
                "it with --model vae --likelihood gaussian"
            )
    _check_comparable(names, protocols, kinds, split)
    if num_particles is None:
        num_particles = _shared_particles(runs, names, split, limit, seed)

    facts = []
    for run, name, kind, protocol in zip(runs, names, kinds, protocols, strict=True):
        result = evaluate_run(
            run,
            num_particles,
            split=split,
            limit=limit,
            seed=seed,
            device=device,
            data_root=data_root,
            progress=progress and _named(progress, name),
        )
        shift = 0.0
        if mixed and kind == "density":
            shift = -math.prod(cfg.run_data(run)[0]) * math.log((protocol.levels or 0) + 1)
        facts.append((name, kind, run, protocol, result, shift))
    facts.sort(key=lambda fact: -(fact[4].summary["log_likelihood"] + fact[5]))
    reference = facts[0][4].per_image["log_likelihood"] + facts[0][5]
    rows = tuple(
        _row(name, kind, run, result, shift, reference)
        for name, kind, run, _, result, shift in facts
    )
    protocol = facts[0][3]
    scale = "mass" if mixed else kinds[0]
    return Comparison(
        protocol=str(protocol),
        split=split,
        num_images=len(reference),
        num_particles=num_particles,
        seed=seed,
        scale=scale,
        rows=rows,
        notes=_notes(rows, protocol, split, len(reference), num_particles, seed, scale),
    )


def _row(
    name: str, kind: str, run: Run, result: "Measured", shift: float, reference: Tensor
) -> Row:
    summary = result.summary
    difference = result.per_image["log_likelihood"] + shift - reference
    with cfg.naming(run.path / "metrics.jsonl"):
        seconds = [float(line["seconds"]) for line in run.read_metrics()]
    return Row(
        run=name,
        kind=kind,
        corrected=shift != 0,
        log_likelihood=summary["log_likelihood"] + shift,
        log_likelihood_se=_or_nan(summary["log_likelihood_se"]),
        difference=float(difference.mean()),
        difference_se=_standard_error(difference),
        elbo=summary["elbo"] + shift,
        elbo_se=_or_nan(summary["elbo_se"]),
        rate=summary["rate"],
        distortion=summary["distortion"] - shift,
        bits_per_dim=summary["bits_per_dim"],
        active_units=summary["active_units"],
        pareto_k_median=summary["pareto_k_median"],
        pareto_k_above_0_7=summary["pareto_k_above_0_7"],
        parameters=result.parameters,
        training_seconds=seconds[-1] if seconds else None,
        per_image_difference=difference,
    )


def _notes(
    rows: Sequence[Row],
    protocol: Protocol,
    split: str,
    num_images: int,
    num_particles: int,
    seed: int,
    scale: str,
) -> tuple[str, ...]:
    notes = [
        f"{num_images:,} images of the {split} split; {protocol}; K = {num_particles}, seed "
        f"{seed}; nats per image, ± one standard error over images.",
        "From the best: mean of the paired differences of log p(x), image by image.",
    ]
    if any(row.corrected for row in rows):
        notes.append(
            "† A density of dequantised x. Its log p(x), ELBO and distortion carry the level "
            "correction log P(x) >= E log p(y) - dims log(L + 1): lower bounds on the scale of the "
            "masses."
        )
    elif scale == "density":
        notes.append(
            "log p(x) is a density: compare it with no mass. Bits/dim, where given, carry the "
            "level correction and are upper bounds."
        )
    doubtful = [row.run for row in rows if (row.pareto_k_above_0_7 or 0) > _DOUBTFUL]
    if doubtful:
        notes.append(
            f"Doubtful: {', '.join(doubtful)}. Pareto k is above 0.7 for more than "
            f"{_DOUBTFUL:.0%} of the images, so log p(x) may be far below the truth and ± too "
            "small. Raise --num-particles, train with --posterior flow, or check some images with "
            "pyrovae anneal."
        )
    return tuple(notes)


def _names(runs: Sequence[Run]) -> list[str]:
    """What each run is called in the table: its folder, or its path where two folders agree."""
    if not runs:
        raise InputError("expected at least one run to compare; got none; give run directories")
    places = [run.path.resolve() for run in runs]
    for place, run in zip(places, runs, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{run.path} was given twice; give every run once")
    folders = [place.name for place in places]
    unique = len(set(folders)) == len(folders)
    return folders if unique else [str(run.path) for run in runs]


def _check_comparable(
    names: Sequence[str], protocols: Sequence[Protocol], kinds: Sequence[str], split: str
) -> None:
    mixed = len(set(kinds)) > 1
    for name, protocol, kind in zip(names, protocols, kinds, strict=True):
        if mixed and kind == "density" and protocol.dequantize != "uniform":
            raise InputError(
                f"{name} gives a density of x that was not dequantised, which no correction brings "
                "to the scale of the other runs' masses; train it with --dequantize uniform"
            )
        reason = why_not_comparable(protocols[0], protocol, split, corrected=mixed)
        if reason is not None:
            raise InputError(
                f"{name} cannot be compared with {names[0]}: {reason}; compare runs that were "
                "trained on the same data with the same protocol"
            )


def why_not_comparable(
    ours: Protocol, theirs: Protocol, split: str = "test", corrected: bool = False
) -> str | None:
    """`Protocol.why_not_comparable` in both directions, for any split; None if they compare."""
    reason = ours.why_not_comparable(theirs, corrected) or theirs.why_not_comparable(
        ours, corrected
    )
    # Training and validation images are what the test images leave, cut by size and seed.
    for name in ("valid_size", "seed") if split != "test" and reason is None else ():
        if getattr(ours, name) != getattr(theirs, name):
            pair = f"{getattr(ours, name)} and {getattr(theirs, name)}"
            return f"{name.replace('_', ' ')} differs: {pair}"
    return reason


def _shared_particles(
    runs: Sequence[Run], names: Sequence[str], split: str, limit: int | None, seed: int
) -> int:
    known = {
        name: found
        for name, run in zip(names, runs, strict=True)
        if (found := _evaluated_particles(run, split, limit, seed))
    }
    if not known:
        return _DEFAULT_PARTICLES
    shared = set.intersection(*known.values())
    if not shared:
        listed = "; ".join(
            f"{name} with K = {', '.join(map(str, sorted(ks)))}" for name, ks in known.items()
        )
        most = max(max(ks) for ks in known.values())
        raise InputError(
            f"the bound rises with K, and the runs were evaluated with different K: {listed}; "
            f"evaluate all with one: --num-particles {most}"
        )
    return max(shared)


def _evaluated_particles(run: Run, split: str, limit: int | None, seed: int) -> set[int]:
    path = _path(run, split, limit, 0, seed)
    before, after = path.name.split("-K0-")
    names = (p.name for p in path.parent.glob(f"{before}-K*-{after}"))
    found = {int(name.removeprefix(f"{before}-K").split("-")[0]) for name in names}
    if limit is None and (run.path / "evaluation.json").is_file():
        last = run.read_json("evaluation.json")
        if (last.get("split"), last.get("seed")) == (split, seed):
            found.add(int(last["num_particles"]))
    return found


# ------------------------------------------------------------------- evaluations kept in the run


class Measured(NamedTuple):
    """What is kept of an evaluation of a run."""

    summary: dict[str, Any]
    """`Evaluation.to_dict`, and the commit that made it."""
    per_image: dict[str, Tensor]
    """The (N,) tensors of `PerImage` by name, float64."""
    parameters: int
    """Numbers that were learnt."""


def evaluate_run(
    run: Run | str | os.PathLike[str],
    num_particles: int = _DEFAULT_PARTICLES,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    data_root: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """`evaluate` for a run on disk, read back if these weights were evaluated like this before.

    Args: as `compare`; ``progress`` is called with the images done and all images.

    Raises:
        InputError: if the directory is not a run, or its data have changed or moved.
    """
    run = run if isinstance(run, Run) else Run(run)
    if num_particles < 1:
        raise InputError(f"expected --num-particles of at least 1; got {num_particles}; raise it")
    commit()  # of what runs now, and not of what a checkout holds when the evaluation is done
    path = _path(run, split, limit, num_particles, seed)
    kept = _read(path)
    if kept is not None:
        return kept
    vae = cfg.load(run, device=device)
    part = run_split(run, split, limit=limit, seed=seed, data_root=data_root)
    result = evaluate(
        vae,
        part,
        num_particles,
        seed=seed,
        progress=None if progress is None else lambda done: progress(done, len(part)),
    )
    return keep(run, result, limit=limit, parameters=sum(p.numel() for p in vae.parameters()))


def keep(run: Run, result: Evaluation, *, limit: int | None, parameters: int) -> Measured:
    """Store an evaluation of a run's weights for later comparisons; by its own guide, in float32.

    With another proposal the numbers are as good, and with rounded products they are of another
    model; a table must not mix them.
    """
    tensors = {name: t for name, t in result.per_image._asdict().items() if t.dim() == 1}
    measured = Measured({**result.to_dict(), "commit": commit()}, tensors, parameters)
    path = _path(run, result.split, limit, result.num_particles, result.seed)
    if result.proposal == str(GUIDE) and result.precision == "fp32":
        with suppress(OSError):  # a run on a read-only disk can be compared too, only not so fast
            save_checkpoint(path, measured._asdict())
    return measured


def _path(run: Run, split: str, limit: int | None, num_particles: int, seed: int) -> Path:
    first = "" if limit is None else f"-first{limit}"
    name = f"{split}{first}-K{num_particles}-seed{seed}-{checkpoint_digest(run)}.pt"
    return run.path / "evaluations" / name


def _read(path: Path) -> Measured | None:
    try:
        state = load_checkpoint(path)
        if state["pyrovae"] != pyrovae.__version__:
            return None  # another version may have estimated otherwise
        return Measured(*(state[name] for name in Measured._fields))
    except (InputError, KeyError):
        return None  # missing or damaged: it can be computed again


def checkpoint_digest(run: Run) -> str:
    """Twelve digits that name the weights `config.load` gives for a run."""
    path = run.path / cfg.SHARED_WEIGHTS
    if not path.is_file():
        path = run.best if run.best.exists() else run.last
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; train the run first")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def run_split(
    run: Run, split: str, *, limit: int | None = None, seed: int = 0, data_root: str | None = None
) -> Split:
    """A split of a run's data, every x fixed: training images are sampled once, with ``seed``."""
    part: Split | StreamedSplit = getattr(cfg.data_of(run, data_root), split)
    if isinstance(part, StreamedSplit):
        part = part.head(len(part) if limit is None else limit)
    part = part.drawn_once(torch.Generator().manual_seed(seed))
    return part if limit is None else part.head(limit)


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
