"""Score images that a person brings: log p(x) of each, its error, and its rank in the training set.

An image is read as the training images were and brought to the run's own protocol: binarised where
the run binarises, on the run's levels, dequantised where the run dequantises. Whatever is sampled
is sampled once, from a stream that belongs to the seed and the image's own content, so that an
image has the same x whichever others it is scored with.
"""

import csv
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae import config as cfg
from pyrovae import importance, sources
from pyrovae.comparison import Progress, checkpoint_digest
from pyrovae.data import Protocol, Split
from pyrovae.errors import InputError
from pyrovae.evaluation import TRUSTED_K, bits_per_dim, evaluate
from pyrovae.runs import Run, atomic_path

CAVEAT = (
    "A low log p(x) does not prove an outlier, nor a high one its absence: likelihoods follow "
    "contrast and smoothness more than meaning, and models trained on Fashion-MNIST find MNIST "
    "digits likelier than clothing (Nalisnick et al., 2019, https://arxiv.org/abs/1810.09136)."
)


class Score(NamedTuple):
    """One image, in nats."""

    path: str
    position: int
    """Its place in the file; 0 for a picture."""
    log_likelihood: float
    mc_error: float
    """Standard error of log_likelihood over draws of z; NaN for K = 1."""
    pareto_k: float
    """Above 0.7, neither of the two can be trusted; NaN where it was not estimated."""
    bits_per_dim: float | None
    """None where x lies on no levels."""
    percentile: float
    """Percentage of the training images that are less likely than this one."""


class Scores(NamedTuple):
    """The rows of `score_paths`, in the order given; ``print`` it, or write ``to_csv(path)``."""

    rows: tuple[Score, ...]
    num_particles: int
    seed: int
    notes: tuple[str, ...]
    """How the images became x, what the percentile is of, what can be trusted, and `CAVEAT`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, NaN as None."""
        rows = [
            {name: None if value != value else value for name, value in row._asdict().items()}
            for row in self.rows
        ]
        return {**self._asdict(), "rows": rows, "notes": list(self.notes)}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per image, with a header; what is not known is left empty."""
        path = Path(path)
        try:
            with (
                atomic_path(path) as temporary,
                temporary.open("w", newline="", encoding="utf-8") as file,
            ):
                writer = csv.DictWriter(file, Score._fields)
                writer.writeheader()
                writer.writerows(self.to_dict()["rows"])
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; check --out") from None

    def __str__(self) -> str:
        header = ["image", "log p(x)", "±", "Pareto k", "bits/dim", "percentile"]
        lines = [header, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        )
        return table + "\n\n" + "\n".join(self.notes)


def _cells(row: Score) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None or math.isnan(value) else format(value, form)

    return [
        f"{row.path}[{row.position}]" if _is_array(Path(row.path)) else row.path,
        f"{row.log_likelihood:.2f}",
        number(row.mc_error, ".2f"),
        number(row.pareto_k, ".2f"),
        number(row.bits_per_dim, ".4f"),
        f"{row.percentile:.1f}",
    ]


def score_paths(
    run: Run | str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    *,
    num_particles: int = 1000,
    seed: int = 0,
    num_reference: int = 500,
    device: str = "cpu",
    data_root: str | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score images in folders, single pictures, .npy and .npz files against a run.

    The percentile says how many of ``num_reference`` training images, drawn with ``seed`` and
    evaluated with the same K, are less likely; their log p(x) are kept in the run, under
    ``scores``. What a likelihood can and cannot tell of outliers: see `CAVEAT`.

    Args:
        run: a run directory.
        paths: folders (read with all below them), pictures, .npy and .npz files. uint8 arrays are
            8-bit unless the .npz holds ``levels``.
        num_particles: K >= 1.
        seed: of the draws of z, of whatever is sampled once, and of the choice of training images.
        num_reference: training images to compare with; fewer if the run had fewer.
        device: where to compute.
        data_root: the folder of the training data, if it has moved since training.
        progress: called with what is being computed, the images done, and all images.

    Raises:
        InputError: for files that cannot be read, and images that are not of the run's shape and
            levels.

    Source: for the caveat, Nalisnick et al., Do Deep Generative Models Know What They Don't Know?
    (2019), https://arxiv.org/abs/1810.09136
    """
    run = run if isinstance(run, Run) else Run(run)
    if num_reference < 1:
        raise InputError(f"expected at least 1 training image to compare with; got {num_reference}")
    x_shape, protocol = cfg.run_data(run)
    images = read(paths, x_shape, protocol, seed=seed, image_size=cfg.run_config(run).image_size)
    vae = cfg.load(run, device=device)
    reference = training_reference(
        run,
        vae,
        num_particles=num_particles,
        seed=seed,
        size=num_reference,
        data_root=data_root,
        progress=progress,
    )
    rows = score(
        vae,
        images,
        protocol,
        reference,
        num_particles=num_particles,
        seed=seed,
        progress=progress,
    )
    return Scores(rows, num_particles, seed, _notes(rows, protocol, len(reference), seed))


def _notes(rows: Sequence[Score], protocol: Protocol, size: int, seed: int) -> tuple[str, ...]:
    how = "read as the values of x"
    if protocol.binarize == "threshold":
        how = "binarised at one half"
    elif protocol.binarize != "none":
        how = f"binarised by drawing x once from Bernoulli(grey value), seed {seed}"
    elif protocol.dequantize == "uniform":
        how = f"dequantised once, seed {seed}"
    elif protocol.levels is not None:
        how = f"read on {protocol.levels + 1} levels"
    notes = [
        f"Images were {how}, as the run's protocol asks ({protocol.data}).",
        f"Percentile: share of {size:,} training images with a lower log p(x). The model has seen "
        "these; new images of the same kind rank a little lower.",
    ]
    doubtful = sum(row.pareto_k > TRUSTED_K for row in rows)
    if doubtful:
        notes.append(
            f"Pareto k is above {TRUSTED_K} for {doubtful} of {len(rows)} images: their log p(x) "
            "and ± are doubtful; raise --num-particles."
        )
    return (*notes, CAVEAT)


class Images(NamedTuple):
    """Images under a run's protocol, and where each came from."""

    paths: tuple[str, ...]
    positions: tuple[int, ...]
    x: Tensor
    """(N, *x_shape), float32 in [0, 1]."""


def score(
    vae: importance.Programs,
    images: Images,
    protocol: Protocol,
    reference: Tensor,
    *,
    num_particles: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Score, ...]:
    """Evaluate every image and rank it within ``reference``.

    ``percentile = 100 / M * #{m: reference_m < log p(x)}``.

    Args:
        vae: a `pyrovae.VAE`, or any other `importance.Programs`.
        images: from `read`.
        protocol: of the run, for bits/dim.
        reference: (M,) log p of training images, estimated with the same K.
        num_particles: K >= 1.
        seed: of the draws of z.
        progress: called with what is being computed, the images done, and all images.
    """
    split = Split("given", protocol, images.x, None, torch.arange(len(images.x)))
    result = evaluate(
        vae, split, num_particles, seed=seed, progress=_named(progress, "images", len(split))
    )
    kind, dims = str(vae.likelihood.kind), math.prod(split.x_shape)
    levels = protocol.levels if kind == "mass" or protocol.dequantize == "uniform" else None
    columns = result.per_image
    below = torch.searchsorted(reference.sort().values, columns.log_likelihood)
    return tuple(
        Score(path, position, lp, error, k, bits_per_dim(lp, kind, levels, dims), percentile)
        for path, position, lp, error, k, percentile in zip(
            images.paths,
            images.positions,
            columns.log_likelihood.tolist(),
            columns.mc_error.tolist(),
            columns.pareto_k.tolist(),
            (100 * below.double() / len(reference)).tolist(),
            strict=True,
        )
    )


def training_reference(
    run: Run,
    vae: importance.Programs,
    *,
    num_particles: int = 1000,
    seed: int = 0,
    size: int = 500,
    data_root: str | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """log p(x) of ``size`` training images of a run, (M,); kept in the run once computed."""
    name = f"reference-n{size}-K{num_particles}-seed{seed}-{checkpoint_digest(run)}.json"
    name = f"scores/{name}"
    if (run.path / name).is_file():
        with suppress(InputError, KeyError, TypeError, ValueError):  # damaged: computed again
            return torch.tensor(run.read_json(name)["log_likelihood"], dtype=torch.float64)
    train = cfg.data_of(run, data_root).train
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(train), generator=generator)[:size]
    x = train.batch(index, generator)
    chosen = Split("train", train.protocol, x, None, train.rows[index])
    result = evaluate(
        vae,
        chosen,
        num_particles,
        seed=seed,
        progress=_named(progress, "training images", len(chosen)),
    )
    log_likelihood = result.per_image.log_likelihood
    with suppress(OSError):  # a run on a read-only disk can be used too, only not so fast
        run.write_json(
            name,
            {"num_particles": num_particles, "seed": seed, "size": len(chosen)}
            | {"rows": chosen.rows.tolist(), "log_likelihood": log_likelihood.tolist()},
        )
    return log_likelihood


def _named(progress: Progress | None, name: str, total: int) -> Callable[[int], None] | None:
    return None if progress is None else lambda done: progress(name, done, total)


# ------------------------------------------------------------------------------- reading images


def read(
    paths: Sequence[str | os.PathLike[str]],
    x_shape: tuple[int, ...],
    protocol: Protocol,
    *,
    seed: int = 0,
    image_size: int | None = None,
) -> Images:
    """Read images and bring them to the protocol of a run.

    Args:
        paths: folders, pictures, .npy and .npz files.
        x_shape: of the run.
        protocol: of the run.
        seed: of whatever is sampled once.
        image_size: cut pictures to their central square and resize them, as in training.

    Raises:
        InputError: for files that cannot be read, another shape, or values off the run's levels.
    """
    names: list[str] = []
    positions: list[int] = []
    parts: list[Tensor] = []
    for path in _files(paths):
        images, levels = _open(path, x_shape, image_size)
        if images.shape[1:] != x_shape:
            raise InputError(
                f"{path.name}: expected x of shape {x_shape}, as in training; got "
                f"{images.shape[1:]}. Resize, crop or reshape it, or use another run."
            )
        parts.append(_to_protocol(torch.from_numpy(images), levels, protocol, seed, path.name))
        names += [str(path)] * len(images)
        positions += range(len(images))
    return Images(tuple(names), tuple(positions), torch.cat(parts))


def _files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise InputError("expected at least one image to score; got none; give files or folders")
    for path in map(Path, paths):
        suffix = path.suffix.lower()
        if path.is_dir():
            inside = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in sources.IMAGE_SUFFIXES
            )
            if not inside:
                raise InputError(
                    f"{path}: expected a folder with images ({' '.join(sources.IMAGE_SUFFIXES)}); "
                    "got none; check the path"
                )
            yield from inside
        elif not path.exists():
            raise InputError(f"there is no file {path}; check the path")
        elif _is_array(path) or suffix in sources.IMAGE_SUFFIXES:
            yield path
        else:
            raise InputError(
                f"{path.name}: expected a folder, .npy, .npz or an image "
                f"({' '.join(sources.IMAGE_SUFFIXES)}); got {suffix or 'no suffix'!r}; convert it"
            )


def _is_array(path: Path) -> bool:
    return path.suffix.lower() in (".npy", ".npz")


def _open(
    path: Path, x_shape: tuple[int, ...], image_size: int | None
) -> tuple[np.ndarray, int | None]:
    """Images (N, *x_shape) of a file, and their largest level."""
    if _is_array(path):
        source = sources.file(path)
        assert isinstance(source.images, np.ndarray)  # streamed ones are not
        return source.images, source.levels
    picture = sources.open_image(path, image_size)
    if len(x_shape) == 3 and x_shape[0] == 1:
        if (picture != picture[..., :1]).any():
            raise InputError(
                f"{path.name}: expected a grey image, as in training; got a coloured one. Convert "
                "it to grey, or use a run that was trained on colour."
            )
        picture = picture[..., :1]
    return np.array(picture.transpose(2, 0, 1)[None]), 255


def _to_protocol(
    raw: Tensor, levels: int | None, protocol: Protocol, seed: int, name: str
) -> Tensor:
    """x (N, *x_shape) of raw levels, or of values in [0, 1] where ``levels`` is None."""
    if protocol.binarize == "threshold":
        return (raw > (levels or 1) / 2).float()
    sampling: Literal["fixed", "bernoulli", "uniform"] = "fixed"
    if protocol.binarize != "none":
        sampling = "bernoulli"
    elif protocol.levels is not None:
        raw, levels = _on_levels(raw, levels, protocol.levels, name), protocol.levels
        sampling = "uniform" if protocol.dequantize == "uniform" else "fixed"
    split = Split("given", protocol, raw, levels, torch.arange(len(raw)), sampling)
    if sampling == "fixed":
        return split.tensor()
    index = torch.arange(len(raw)).unsqueeze(1)
    return torch.cat([split.batch(i, _generator(seed, raw[i])) for i in index])


def _on_levels(raw: Tensor, given: int | None, levels: int, name: str) -> Tensor:
    """The same values as levels 0..L of another L; InputError where one falls between."""
    value = raw.double() / (given or 1)
    grid = torch.round(value * levels)
    # Float32 holds k/L to its last bit or two.
    off = (grid / levels - value).abs() > (2e-7 if given is None else 1e-12)
    if off.any():
        raise InputError(
            f"{name}: expected x on the run's {levels + 1} levels k/{levels}; got "
            f"{int(off.sum()):,} other values such as {float(value[off][0]):.4g}. Save the levels "
            f"0..{levels} as uint8: numpy.savez(path, images=..., levels={levels})."
        )
    return grid.to(torch.uint8)


def _generator(seed: int, image: Tensor) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/".encode() + image.numpy().tobytes(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
