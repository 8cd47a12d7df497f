"""Every row in small: a few made-up images, one epoch, two draws. Measures nothing."""

from pathlib import Path

import numpy as np

from reproduction.rows import TABLES, Row

_IMAGES = 30
_SHAPES = {"mnist": (28, 28), "fashion-mnist": (28, 28), "clothing64.npz": (64, 64, 3)}


def bring_data(folder: Path) -> None:
    """Noise in the shape of each data set, as .npy files."""
    rng = np.random.default_rng(0)
    for name, shape in _SHAPES.items():
        images = rng.integers(0, 256, (_IMAGES, *shape), np.uint8)
        np.save(folder / f"{Path(name).stem}.npy", images)
    binary = rng.integers(0, 2, (_IMAGES, 28, 28), np.uint8)
    np.save(folder / "binarized-mnist.npy", binary)


def small(row: Row, data: Path) -> Row:
    """A row on made-up images, for a second; its model as it was, where that is what counts."""
    name = row.settings.get("data", "mnist")
    settings = {
        **row.settings,
        "data": str(data / f"{Path(name).stem}.npy"),
        "valid_size": 4,
        "epochs": 1,
        "batch_size": 8,
        "warmup_epochs": 0.5,
        "engine": "svi",
    }
    if "prior_args" in row.settings:  # 500 pseudo-inputs through convolutions are minutes
        settings["prior_args"] = {**row.settings["prior_args"], "components": 8}
    if row.table == "likelihoods":  # whose networks are no part of what is compared
        settings["hidden"] = [4, 4, 8, 8] if "network" in settings else [16]
    if name == "binarized-mnist":
        settings["binarize"] = "none"
    return row._replace(settings=settings, particles=2)


def tables(data: Path) -> dict[str, dict[str, Row]]:
    """All tables, in small."""
    return {
        table: {name: small(row, data) for name, row in rows.items()}
        for table, rows in TABLES.items()
    }
