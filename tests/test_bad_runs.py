"""Runs that are damaged, edited, foreign or used wrongly: one line, status 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusal import none, refuse
from shell import GREY

from pyrovae import sharing

TINY = "--data x.npy --hidden 8 --latent-dim 2 --epochs 1 --final-particles 0"


class _Trap:
    """Unpickling it writes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("trapped", "w")


def _checkpoint(content: Any, *names: str) -> Callable[[Path], None]:
    def write(here: Path) -> None:
        for name in names or ("last", "best"):
            torch.save(content, here / "run" / "checkpoints" / f"{name}.pt")

    return write


def _changed_checkpoint(**changes: Any) -> Callable[[Path], None]:
    def write(here: Path) -> None:
        for path in (here / "run" / "checkpoints").iterdir():
            torch.save(torch.load(path, weights_only=True) | changes, path)

    return write


def _truncated_checkpoint(here: Path) -> None:
    for path in (here / "run" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])


def _json(name: str, **changes: Any) -> Callable[[Path], None]:
    def write(here: Path) -> None:
        path = here / "run" / name
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return write


def _other_images(here: Path) -> None:
    np.save(here / "x.npy", GREY[::-1])


def _remove(name: str) -> Callable[[Path], None]:
    def remove(here: Path) -> None:
        path = here / "run" / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return remove


def _as_it_is(here: Path) -> None:
    return None


def _another_protocol(here: Path) -> None:
    shutil.copytree(here / "run", here / "other")
    path = here / "other" / "data.json"
    content = json.loads(path.read_text())
    content["protocol"]["binarize"] = "static"
    path.write_text(json.dumps(content))


def _exported(here: Path) -> None:
    sharing.export(here / "run", here / "shared")


def _damaged_export(here: Path) -> None:
    _exported(here)
    path = here / "shared" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def _changed_export(here: Path) -> None:
    _exported(here)
    path = here / "shared" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden": [9]}))


RESUME = "train --out run --resume --epochs 3"
OURS = {"kind": "pyrovae checkpoint", "format": 1}

RUNS: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "run there already": (_as_it_is, [f"train {TINY} --out run"], "--overwrite"),
    "fixed setting": (_as_it_is, [f"{RESUME} --lr 0.1"], "cannot change it to 0.1"),
    "fixed name": (_as_it_is, [f"{RESUME} --likelihood gaussian"], "cannot change it"),
    "fixed widths": (_as_it_is, [f"{RESUME} --hidden 8 8"], "cannot change it to (8, 8)"),
    "fewer epochs": (_as_it_is, ["train --out run --resume --epochs 1"], "give 2 or more"),
    "planned schedule": (
        _json("config.json", schedule="cosine"),
        [RESUME],
        "--schedule-epochs",
    ),
    "no such split": (_as_it_is, ["evaluate run --split tset"], "did you mean 'test'?"),
    "too many pairs": (_as_it_is, ["interpolate run --pairs 4"], "give 3 at most"),
    "image beyond the last": (_as_it_is, ["traverse run --image 6"], "has 6; got 6"),
    "no such latent": (_as_it_is, ["traverse run --dims 2"], "check --dims"),
    "scored image missing": (_as_it_is, ["score run none.png"], "there is no file none.png"),
    "scored text": (
        lambda here: none((here / "a.txt").write_text("text")),
        ["score run a.txt"],
        "expected a folder, .npy, .npz or an image",
    ),
    "scored image of another size": (
        lambda here: np.save(here / "y.npy", np.zeros((1, 5, 5), np.uint8)),
        ["score run y.npy"],
        "expected x of shape (1, 4, 4)",
    ),
    "another protocol to compare": (
        _another_protocol,
        ["compare run other", "compare other run --json"],
        "cannot be compared",
    ),
    "state of no annealing": (
        _as_it_is,
        [
            "anneal run --quiet --state run/checkpoints/last.pt",
            "anneal run --restart --state run/checkpoints/last.pt",
        ],
        "is no checkpoint of annealing",
    ),
    "state nowhere": (_as_it_is, ["anneal run --state none/s.pt"], "check --state"),
    "export into a run": (
        _as_it_is,
        ["export run run", "export run run --overwrite"],
        "left alone",
    ),
    "export onto a file": (_as_it_is, ["export run x.npy"], "is a file"),
    "export once more": (_exported, ["export run shared"], "--overwrite"),
    "exported weights damaged": (
        _damaged_export,
        ["sample shared", "info shared", "evaluate shared"],
        "model.safetensors",
    ),
    "exported weights of another VAE": (
        _changed_export,
        ["sample shared"],
        "does not fit config.json",
    ),
    "root of a file": (_as_it_is, ["evaluate run --data-root ."], "--data-root"),
    "truncated checkpoint": (
        _truncated_checkpoint,
        [
            RESUME,
            *(f"{command} run" for command in ("evaluate", "sample", "reconstruct", "info")),
            *(f"{command} run" for command in ("anneal", "interpolate", "traverse")),
            *(f"{command} run" for command in ("report", "explore", "compare")),
            "score run x.npy",
            "export run shared",
        ],
        "truncated",
    ),
    "truncated best checkpoint": (
        lambda here: none((here / "run/checkpoints/best.pt").write_bytes(b"")),
        [RESUME, "evaluate run"],
        "best.pt",
    ),
    "foreign checkpoint": (
        _checkpoint({"weights": torch.ones(3)}),
        [RESUME, "evaluate run", "sample run"],
        "not written by pyrovae",
    ),
    "a tensor for a checkpoint": (
        _checkpoint(torch.ones(3)),
        [RESUME, "evaluate run"],
        "not written by pyrovae",
    ),
    "checkpoint with code": (
        _checkpoint({**OURS, "model": _Trap()}),
        [RESUME, "evaluate run", "info run"],
        "cannot read checkpoint",
    ),
    "newer checkpoint": (
        _changed_checkpoint(format=2),
        [RESUME, "evaluate run", "sample run"],
        "upgrade pyrovae",
    ),
    "checkpoint without weights": (_checkpoint(OURS), ["evaluate run"], "does not fit"),
    "checkpoint of another VAE": (
        _json("config.json", hidden=[9]),
        ["evaluate run", "sample run", "info run"],
        "does not fit config.json",
    ),
    "no checkpoints": (_remove("checkpoints"), [RESUME, "evaluate run"], "no checkpoint"),
    "config.json damaged": (
        lambda here: none((here / "run/config.json").write_text('{"data": "x.n')),
        [RESUME, "evaluate run", "sample run", "reconstruct run", "info run"],
        "run/config.json",
    ),
    "config.json a list": (
        lambda here: none((here / "run/config.json").write_text("[]")),
        [RESUME, "evaluate run"],
        "one JSON object",
    ),
    "config.json with an unknown key": (
        _json("config.json", lattent_dim=3),
        [RESUME, "evaluate run", "sample run", "info run"],
        "run/config.json is damaged or edited: unknown setting 'lattent_dim'",
    ),
    "config.json with a wrong type": (
        _json("config.json", epochs="two"),
        [RESUME, "evaluate run"],
        "run/config.json is damaged or edited: --epochs",
    ),
    "no data.json": (_remove("data.json"), [RESUME, "evaluate run"], "holds no data.json"),
    "data.json without protocol": (
        _json("data.json", protocol=None),
        [RESUME, "evaluate run", "sample run", "info run"],
        "run/data.json is damaged or edited: it lacks 'protocol'",
    ),
    "data.json with another protocol": (
        _json("data.json", protocol={"data": "x.npy"}),
        ["evaluate run", "sample run"],
        "run/data.json is damaged",
    ),
    "metrics.jsonl cut short": (
        lambda here: none((here / "run/metrics.jsonl").write_text('{"epoch": 1')),
        [RESUME, "info run"],
        "run/metrics.jsonl",
    ),
    "evaluation.json of another kind": (
        lambda here: none((here / "run/evaluation.json").write_text("{}")),
        ["info run"],
        "run/evaluation.json",
    ),
    "data gone": (
        lambda here: (here / "x.npy").unlink(),
        [RESUME, "evaluate run", "reconstruct run"],
        "expected a file at x.npy",
    ),
    "data changed": (
        _other_images,
        [
            RESUME,
            *(f"{command} run" for command in ("evaluate", "reconstruct", "anneal", "interpolate")),
            *(f"{command} run" for command in ("traverse", "report", "explore", "compare")),
            "score run x.npy",
        ],
        "the data are not those run was trained on",
    ),
}


@pytest.mark.parametrize(
    ("what", "command"), [(what, command) for what, row in RUNS.items() for command in row[1]]
)
def test_runs(what: str, command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, _, says = RUNS[what]
    damage(here)
    refuse(command, says, here, capsys)


def test_the_trap_works(empty: Path) -> None:
    torch.save(_Trap(), empty / "x.pt")
    torch.load(empty / "x.pt", weights_only=False).close()
    assert (empty / "trapped").exists()
