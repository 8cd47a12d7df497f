"""The command line as tests use it: a small run to work on, and what a command did."""

import contextlib
import io
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from pyrovae.cli import main

GREY = np.random.RandomState(0).randint(0, 256, (60, 4, 4)).astype(np.uint8)
TINY = "train --data x.npy --hidden 8 --latent-dim 2 --batch-size 16 --final-particles 0 --quiet"
RECORDS = {"config.json", "environment.json", "data.json", "metrics.jsonl", "checkpoints"}
PICTURES = {"samples.png", "reconstructions.png", "curves.png"}


class Done(NamedTuple):
    status: int
    out: str
    err: str


def shell(command: str) -> Done:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(shlex.split(command))
        except SystemExit as end:
            status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def ok(command: str) -> str:
    """Run a command line that must succeed; returns its standard output."""
    done = shell(command)
    assert done.status == 0, done.err
    return done.out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with x.npy and the run of two epochs that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "x.npy", GREY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        ok(f"{TINY} --epochs 2 --out run")
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: a copy of ``trained``, on a machine without CUDA."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield tmp_path


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def pixels(path: str | Path) -> np.ndarray:
    """The brightness of each pixel of a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


def drawn(path: str | Path) -> bool:
    """Whether a PNG can be opened and holds more than one colour."""
    return bool(pixels(path).min() < pixels(path).max())


def greys(path: str | Path) -> float:
    """The share of a picture that is neither black nor white."""
    return float(((pixels(path) > 0) & (pixels(path) < 255)).mean())
