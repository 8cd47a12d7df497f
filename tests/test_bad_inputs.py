"""What a person may type or supply wrongly: one line that helps, exit status 2, nothing written."""

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refusal import is_refusal, none, refuse, tree
from shell import GREY

from pyrovae import config as cfg
from pyrovae.parser import COMMANDS

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------------------------- words alone

WORDS: dict[str, tuple[str, str]] = {
    "no command": ("", "COMMAND"),
    "unknown command": ("trian", "did you mean 'train'?"),
    "flag before the command": ("--data digits train", "COMMAND"),
    "unknown flag": ("train --epoch 3", "did you mean '--epochs'?"),
    "unknown flag with =": ("train --batchsize=3", "did you mean '--batch-size'?"),
    "unknown flag of evaluate": ("evaluate run --particles 3", "did you mean '--num-particles'?"),
    "stray word": ("train digits", "unknown argument 'digits'"),
    "flag without its value": ("train --epochs", "--epochs"),
    "list without values": ("train --hidden", "--hidden"),
    "value for a switch": ("train --quiet=yes", "--quiet"),
    "no run": ("evaluate", "RUN"),
    "commas between widths": ("train --hidden 200,200", "--hidden expects a whole number"),
    "epochs in scientific notation": ("train --epochs 1e3", "--epochs expects a whole number"),
    "K = 0": ("evaluate run --num-particles 0", "--num-particles must be at least 1"),
    "K = -1": ("evaluate run --num-particles -1", "--num-particles must be at least 1"),
    "K = 0 in training": ("train --num-particles 0", "--num-particles must be at least 1"),
    "K = -1 at the end": ("train --final-particles -1", "--final-particles must be at least 0"),
    "more images than a machine can count": (
        f"train --batch-size {10**20}",
        "--batch-size must be at most 2147483647",
    ),
    "more draws than a machine can count": (
        f"evaluate run --num-particles {10**20}",
        "--num-particles must be at most 2147483647",
    ),
    "negative lr": ("train --lr -0.1", "--lr must be above 0"),
    "negative lr in scientific notation": ("train --lr -1e-3", "--lr must be above 0, got -0.001"),
    "lr minus infinity": ("train --lr -inf", "--lr expects a finite number"),
    "beta": ("train --beta -1", "--beta must be at least 0"),
    "one bad width of two": ("train --hidden 8 0", "--hidden must be at least 1, got 0"),
    "seed too large": (f"train --seed {2**64}", "--seed must be at most 4294967295"),
    "seed of a sample": (f"sample run --seed {2**64}", "--seed must be at most 4294967295"),
    "option without =": ("train --likelihood-args scale", "expects KEY=VALUE, got 'scale'"),
    "option without a value": ("train --likelihood-args scale=", "for example scale=learned"),
    "likelihood option": (
        "train --likelihood gaussian --likelihood-args scael=1",
        "no option 'scael' (did you mean 'scale'?)",
    ),
    "scale in words": (
        "train --likelihood gaussian --likelihood-args scale=lerned",
        "did you mean 'learned'?",
    ),
    "gain that many layers multiply": (
        f"train --init-gain 100 --activation relu --hidden{' 8' * 25}",
        "no finite numbers with --init-gain 100; give a smaller one",
    ),
    "gain out of hand": ("train --init-gain 1e30", "--init-gain must be at most 100"),
    "scale 0": (
        "train --likelihood gaussian --likelihood-args scale=0",
        "above 1e-12 and below 1e+12",
    ),
    "scale NaN": ("train --likelihood laplace --likelihood-args scale=nan", "above 1e-12"),
    "levels of the data": (
        "train --likelihood categorical --likelihood-args levels=3",
        "no option 'levels'",
    ),
    "likelihood without options": ("train --likelihood-args scale=1", "it takes none"),
    "prior option": (
        "train --prior mixture --prior-args component=3",
        "--prior-args: Mixture has no option 'component' (did you mean 'components'?)",
    ),
    "0 components": ("train --prior vamp --prior-args components=0", "positive integer; got 0"),
    "half a transform": ("train --posterior flow --posterior-args transforms=1.5", "got 1.5"),
    "widths in words": ("train --prior flow --prior-args hidden=wide", "hidden"),
    "gates and activation": ("train --network gated-mlp --activation relu", "--activation out"),
    "conv28 on 8×8": ("train --network conv28", "Use --network mlp"),
    "residual on 8×9": (
        "train --network residual --data odd.npy --binarize none",
        "Use --network mlp",
    ),
    "conv64 on 28×28": (
        "train --network conv64 --data 28.npy --binarize none",
        "(C, 64, 64); got (1, 28, 28)",
    ),
    "iwae and beta": ("train --objective iwae --beta 2", "leave --beta at 1"),
    "iwae and warm-up": ("train --objective iwae --kl-warmup 2", "leave --kl-warmup at 0"),
    "iwae and free bits": ("train --objective iwae --free-bits 1", "leave --free-bits at 0"),
    "dreg and beta": ("train --objective dreg --beta 2", "leave --beta at 1"),
    "stl and free bits": ("train --objective stl --free-bits 1", "leave --free-bits at 0"),
    "layers of a single layer": (
        "train --model-args latents=3,2",
        "leave it out, or use --model hierarchical",
    ),
    "a dimension of many layers": (
        "train --model hierarchical --latent-dim 3",
        "--model-args latents=100,50",
    ),
    "mean-field and vamp": ("train --objective mean-field --prior vamp", "--objective elbo"),
    "mean-field and flow": ("train --objective mean-field --posterior flow", "--posterior flow"),
    "binary data, density": (
        "train --likelihood gaussian --binarize dynamic",
        "--binarize at auto",
    ),
    "mass, dequantised": ("train --likelihood categorical --dequantize uniform", "at auto"),
    "grey data, Bernoulli": ("train --binarize none", "(--binarize dynamic)"),
    "grey data at the ends, beta": ("train --likelihood beta --dequantize none", "(0, 1)"),
    "length of no schedule": ("train --schedule-epochs 5", "--schedule constant"),
    "length of stages": ("train --schedule iwae --schedule-epochs 5", "--schedule iwae"),
    "warm-up of all": ("train --schedule cosine --epochs 2 --warmup-epochs 2", "more --epochs"),
    "negative warm-up": ("train --warmup-epochs -1", "--warmup-epochs must be at least 0"),
    "one beta": ("train --adam-betas 0.9", "two numbers such as 0.9 0.999; got 1"),
    "three betas": ("train --adam-betas 0.9 0.9 0.9", "got 3"),
    "beta of one": ("train --adam-betas 0.9 1", "--adam-betas must be below 1"),
    "eps of adamax": ("train --optimizer adamax --adam-eps 1e-4", "use adam"),
    "eps 0": ("train --adam-eps 0", "--adam-eps must be above 0"),
    "validation never": ("train --validate-every 0", "--validate-every must be at least 1"),
    "unknown preset": ("train --preset iwea", "did you mean 'iwae'?"),
    "preset that clashes": ("train --preset exemplar --objective iwae", "leave --kl-warmup at 0"),
    "preset without its data": ("train --preset iwae", "--data-root"),
    "unknown data": ("train --data minst", "Did you mean 'mnist'?"),
    "data absent": ("train --data mnist", "--data-root"),
    "data absent from a root": ("train --data kmnist --data-root here", "here/KMNIST/raw"),
    "download of digits": ("train --download", "expected no --download"),
    "root of digits": ("train --data-root .", "expected no --data-root"),
    "size of digits": ("train --image-size 16", "expected no --image-size"),
    "too many for validation": ("train --valid-size 1700", "--valid-size"),
    "missing .npy": ("train --data none.npy", "none.npy; there is none"),
    "missing .npz": ("train --data none.npz", "none.npz; there is none"),
    "missing folder": ("train --data pictures/", "got 'pictures/'"),
    "CUDA absent": ("train --device cuda", "use --device cpu"),
    "the hundredth CUDA device": ("train --device cuda:99", "torch sees no CUDA device"),
    "unknown device": ("train --device gpu", "expected auto, cpu, cuda"),
    "device of no use": ("train --device meta", "use auto, cpu or cuda"),
    "--out empty": ("train --out ''", "--out expects a directory"),
    "--out too long": (f"train --out {'x' * 5000}", "File name too long"),
    "--resume on nothing": ("train --resume --out run", "run is not a run directory"),
    "--resume and --overwrite": ("train --resume --overwrite", "give one of them"),
    "--config missing": ("train --config none.toml", "no configuration file none.toml"),
    "--config a folder": ("train --config .", "Is a directory"),
    "unknown topic": ("info liklihoods", "did you mean 'likelihoods'?"),
    "evaluate on nothing": ("evaluate nowhere", "train one: pyrovae train --out nowhere"),
    "sample on nothing": ("sample nowhere", "train one: pyrovae train --out nowhere"),
    "reconstruct on nothing": ("reconstruct nowhere", "pyrovae train --out nowhere"),
    "not a picture": ("sample run --out samples.jpg", "ending in .png"),
    "picture nowhere": ("sample run --out none/samples.png", "folder must exist"),
    "no samples": ("sample run --num-samples 0", "--num-samples must be at least 1"),
    "samples in words": ("sample run --num-samples x", "--num-samples expects a whole number"),
    "half a sample": ("sample run --num-samples 1.5", "--num-samples expects a whole number"),
    "no images": ("reconstruct run --num-images 0", "--num-images must be at least 1"),
    "reconstruct nonsense": ("reconstruct run --split tset", "did you mean 'test'?"),
    "tolerance of draws": ("evaluate run --tolerance 1e-3", "no use with --method importance"),
    "K of quadrature": (
        "evaluate run --method quadrature --num-particles 5",
        "--num-particles has no use with --method quadrature",
    ),
    "proposal of quadrature": (
        "evaluate run --method quadrature --proposal wide",
        "--proposal has no use",
    ),
    "precision of quadrature": (
        "evaluate run --method quadrature --precision bf16",
        "--precision has no use",
    ),
    "precision that is none": ("evaluate run --precision fp8", "--precision knows no 'fp8'"),
    "scale of the guide": ("evaluate run --proposal-scale 2", "leave --proposal-scale out"),
    "draws of no export": ("evaluate run --max-draws 5", "no use without --export"),
    "export of quadrature": (
        "evaluate run --method quadrature --export e.nc",
        "use --method importance",
    ),
    "export to CSV": ("evaluate run --export e.csv", "--export expects a file ending in .nc"),
    "export nowhere": ("evaluate run --export none/e.nc", "check --export"),
    "anneal on nothing": ("anneal nowhere", "train one: pyrovae train --out nowhere"),
    "split of simulated images": ("anneal run --bdmc --split valid", "--bdmc simulates"),
    "score nothing": ("score run", "PATH"),
    "score on nothing": ("score nowhere x.npy", "pyrovae train --out nowhere"),
    "scores to JSON": ("score run x.npy --out s.json", "ending in .csv"),
    "scores nowhere": ("score run x.npy --out none/s.csv", "check --out"),
    "compare nothing": ("compare", "RUN"),
    "compare on nothing": ("compare nowhere", "pyrovae train --out nowhere"),
    "compare twice": ("compare run run", "given twice"),
    "two forms of a table": ("compare run --json --markdown", "give one of them"),
    "interpolate on nothing": ("interpolate nowhere", "pyrovae train --out nowhere"),
    "interpolation.jpg": ("interpolate run --out a.jpg", "ending in .png or .gif"),
    "one step": ("interpolate run --steps 1", "--steps must be at least 2"),
    "traverse on nothing": ("traverse nowhere", "pyrovae train --out nowhere"),
    "latents and dims": ("traverse run --latents 2 --dims 1", "leave one out"),
    "report on nothing": ("report nowhere", "pyrovae train --out nowhere"),
    "report as PDF": ("report run --out r.pdf", "ending in .html"),
    "report nowhere": ("report run --out none/r.html", "check --out"),
    "explore on nothing": ("explore nowhere", "pyrovae train --out nowhere"),
    "a page of 201 images": ("explore run --num-images 201", "--num-images must be at most 200"),
    "explorer as text": ("explore run --out e.txt", "ending in .html"),
    "export without a place": ("export run", "DIR"),
    "share nothing": ("export nowhere shared", "pyrovae train --out nowhere"),
    "unknown command of many": ("annael run", "did you mean 'anneal'?"),
    "unknown flag of anneal": ("anneal run --chains 3", "did you mean '--num-chains'?"),
    "--limit 0": ("evaluate run --limit 0", "--limit must be at least 1"),
}


@pytest.mark.parametrize("what", WORDS)
def test_words(what: str, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(empty / "odd.npy", np.zeros((60, 8, 9), np.uint8))
    np.save(empty / "28.npy", np.zeros((60, 28, 28), np.uint8))
    refuse(*WORDS[what], empty, capsys)


def _settings() -> Iterator[tuple[str, str]]:
    """A wrong value of every kind for every setting that can refuse one without more ado."""
    for command, (_, cls, *_) in COMMANDS.items():
        words = {"train": "", "score": "run x.npy"}.get(command, "run")
        start = f"{command} {words}".strip()
        for f in dataclasses.fields(cls) if cls is not None else ():
            flag = "--" + f.name.replace("_", "-")
            kind, limits = cfg.field_type(f)[0], f.metadata
            if limits["names"] is not None:
                for name in cfg.NAMES[limits["names"]]:
                    wrong = name[:-2] + name[-1] + name[-2]
                    wrong = wrong if wrong != name else f"{name}s"
                    yield f"{start} {flag} {wrong}", f"{flag} knows no {wrong!r} (did you mean "
            if kind in (int, float):
                yield f"{start} {flag} many", f"{flag} expects a"
            if kind is float:
                yield f"{start} {flag} nan", f"{flag} expects a finite number"
                yield f"{start} {flag} inf", f"{flag} expects a finite number"
            if limits["least"] is not None:
                least = limits["least"] - 1
                yield f"{start} {flag} {least:g}", f"{flag} must be at least {limits['least']:g}"
            for side in ("above", "below"):
                if limits[side] is not None:
                    yield f"{start} {flag} {limits[side]:g}", f"{flag} must be {side}"


@pytest.mark.parametrize(("command", "says"), [*_settings()])
def test_settings(command: str, says: str, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(command, says, empty, capsys)


# --------------------------------------------------------------------------------------- files


def _npy(images: Any) -> Callable[[Path], None]:
    return lambda here: np.save(here / "x.npy", images)


def _npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda here: np.savez(here / "x.npz", **arrays)


def _text(name: str, text: str) -> Callable[[Path], None]:
    def write(here: Path) -> None:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text)

    return write


def _mixed_sizes(here: Path) -> None:
    (here / "folder").mkdir()
    for i in range(3):
        Image.new("L", (8, 8 + i)).save(here / "folder" / f"{i}.png")


def _truncated_npz(here: Path) -> None:
    np.savez(here / "x.npz", images=GREY)
    (here / "x.npz").write_bytes((here / "x.npz").read_bytes()[:300])


def _foreign_project(here: Path) -> None:
    (here / "run" / "checkpoints").mkdir(parents=True)
    (here / "run" / "config.json").write_text("{}")
    (here / "run" / "checkpoints" / "precious.pt").write_text("months of work")


def _truncated_idx(here: Path) -> None:
    (here / "MNIST" / "raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (here / "MNIST" / "raw" / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\10")


REAL = GREY / 256
HOLES = np.where(GREY > 250, np.nan, REAL)
OBJECTS = np.array([{"an": "object"}, None], dtype=object)

FILES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "NaN pixels": (_npy(HOLES), "train --data x.npy", "NaN"),
    "pixels above 1": (_npy(GREY * 1.0), "train --data x.npy", "floats in [0, 1]"),
    "pixels below 0": (_npy(REAL - 0.5), "train --data x.npy", "floats in [0, 1]"),
    "wide integers": (_npy(GREY.astype(int)), "train --data x.npy", 'astype("uint8")'),
    "objects in .npy": (_npy(OBJECTS), "train --data x.npy", "without objects"),
    "objects in .npz": (_npz(images=OBJECTS), "train --data x.npz", "without objects"),
    "several arrays": (_npz(a=GREY, b=GREY), "train --data x.npz", "got a, b"),
    "no array": (_npz(), "train --data x.npz", "got nothing"),
    "four channels": (_npy(np.zeros((60, 4, 4, 4), np.uint8)), "train --data x.npy", "1 or 3"),
    "one axis": (_npy(np.zeros(60, np.uint8)), "train --data x.npy", "expected shape"),
    "no images": (_npy(GREY[:0]), "train --data x.npy", "at least one image"),
    "two images": (_npy(GREY[:2]), "train --data x.npy", "Give more images"),
    "labels too few": (_npz(images=GREY, labels=[1]), "train --data x.npz", "60 integers"),
    "off the levels": (
        _npy(REAL),
        "train --data x.npy --likelihood categorical",
        "lie on none",
    ),
    "nothing to dequantise": (
        _npy(REAL),
        "train --data x.npy --likelihood gaussian",
        "without a grid",
    ),
    "binary already": (_npy(GREY % 2), "train --data x.npy", "Use --binarize none"),
    "truncated .npz": (_truncated_npz, "train --data x.npz", "cannot be read"),
    "text named .npy": (_text("x.npy", "1 2 3"), "train --data x.npy", "cannot be read"),
    "wrong type": (_text("x.csv", "1,2,3"), "train --data x.csv", "got 'x.csv'"),
    "empty folder": (lambda here: (here / "folder").mkdir(), "train --data folder", "got none"),
    "mixed sizes": (_mixed_sizes, "train --data folder", "--image-size"),
    "not a picture": (_text("folder/a.png", "text"), "train --data folder", "a.png: expected an"),
    "truncated idx": (_truncated_idx, "train --data mnist --data-root .", "idx file"),
    "root a file": (_text("root", ""), "train --data mnist --data-root root", "--data-root"),
    "TOML that is none": (_text("c.toml", "epochs: 3"), "train --config c.toml", "is not TOML"),
    "TOML of bytes": (
        lambda here: none((here / "c.toml").write_bytes(b"\xff\xfe")),
        "train --config c.toml",
        "is not TOML",
    ),
    "TOML, unknown setting": (
        _text("c.toml", "epoch = 3"),
        "train --config c.toml",
        "unknown setting 'epoch' (did you mean 'epochs'?)",
    ),
    "TOML, flag that is no setting": (
        _text("c.toml", 'out = "run"'),
        "train --config c.toml",
        "on the command line alone",
    ),
    "TOML, wrong type": (
        _text("c.toml", 'epochs = "three"'),
        "train --config c.toml",
        "--epochs expects a whole number, got 'three'",
    ),
    "TOML, true for a number": (
        _text("c.toml", "epochs = true"),
        "train --config c.toml",
        "--epochs expects a whole number",
    ),
    "TOML, number for true": (
        _text("c.toml", "download = 1"),
        "train --config c.toml",
        "--download expects true or false",
    ),
    "TOML, options not a table": (
        _text("c.toml", 'likelihood_args = "scale=1"'),
        "train --config c.toml",
        "--likelihood-args expects KEY=VALUE",
    ),
    "TOML, unknown name": (
        _text("c.toml", 'prior = "vampire"'),
        "train --config c.toml",
        "did you mean 'vamp'?",
    ),
    "TOML of another command": (
        _text("c.toml", "limit = 3"),
        "train --config c.toml",
        "unknown setting 'limit'",
    ),
    "--out a file": (_text("run", "mine"), "train --out run", "left alone"),
    "--out below a file": (_text("file", "mine"), "train --out file/run", "Not a directory"),
    "--out in use": (_text("run/a.txt", "mine"), "train --out run", "left alone"),
    "--out in use, --overwrite": (
        _text("run/a.txt", "mine"),
        "train --out run --overwrite",
        "choose another --out",
    ),
    "--out another's project, --overwrite": (
        _foreign_project,
        "train --out run --overwrite",
        "choose another --out",
    ),
    "default --out in use": (_text("runs", "mine"), "train", "choose another --out"),
    "picture below a file": (_text("file", ""), "sample run --out file/a.png", "--out"),
    "evaluate on a folder": (_text("run/a.txt", "mine"), "evaluate run", "holds no config.json"),
    "evaluate on a file": (_text("run", "mine"), "evaluate run", "not a run directory"),
    "info on a folder": (_text("run/a.txt", "mine"), "info run", "holds no config.json"),
    "--resume on a folder": (
        _text("run/a.txt", "mine"),
        "train --resume --out run",
        "holds no config.json",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_files(what: str, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, command, says = FILES[what]
    prepare(empty)
    refuse(command, says, empty, capsys)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a virtual file system")
def test_a_folder_that_only_seems_writable(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse("train --out /proc/run", "cannot write to /proc", empty, capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command", ["train --out locked/run", "sample run --out locked/a.png"])
def test_a_locked_folder(command: str, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "locked").mkdir(mode=0o500)
    refuse(command, "cannot write to locked", empty, capsys)


# --------------------------------------------------------------------------------- the real thing

REAL_SHELL = ("unknown command", "unknown flag", "negative lr")


@pytest.mark.parametrize("what", REAL_SHELL)
def test_at_a_real_shell(what: str, tmp_path: Path) -> None:
    command, says = WORDS[what]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pyrovae", *shlex.split(command)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    is_refusal(done.returncode, done.stdout, done.stderr, says)
    assert tree(tmp_path) == {}


def test_the_table_is_long_enough() -> None:
    assert len(WORDS) + len(FILES) >= 150
