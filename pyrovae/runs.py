"""A run on disk: configuration, environment, metrics and checkpoints.

Everything is written to a temporary name and renamed, so that a file is whole or absent, and read
without executing code: JSON, and tensors with ``weights_only=True``.
"""

import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import pyrovae
from pyrovae.errors import InputError

FORMAT = 1
_KIND = "pyrovae checkpoint"


class Run:
    """The directory of one training run.

    ==============================  ==========================================================
    ``config.json``                 every setting, resolved; enough to rebuild the VAE
    ``environment.json``            versions, commit, device, seed and command
    ``metrics.jsonl``               one line of metrics an epoch
    ``checkpoints/last.pt``         the whole training state, to resume from
    ``checkpoints/best.pt``         the same at the best validation ELBO so far
    ``evaluation.json``             the final evaluation on the test split
    ``*.png``                       training curves, samples, reconstructions
    ==============================  ==========================================================
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def last(self) -> Path:
        """The checkpoint that training resumes from."""
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation ELBO."""
        return self.path / "checkpoints" / "best.pt"

    def exists(self) -> bool:
        """Whether the directory holds a run, or anything else that must not be overwritten."""
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write one of the run's JSON files."""
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        with atomic_path(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one of the run's JSON files; InputError if it is missing or damaged."""
        path = self.path / name
        if not self.path.is_dir():
            raise InputError(
                f"{self.path} is not a run directory; train one: pyrovae train --out {self.path}"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{self.path} holds no {name}, so it is not a run of pyrovae train; give the "
                "directory that was --out"
            ) from None
        except (ValueError, OSError) as error:
            raise InputError(f"cannot read {path}: {error}; restore it from a copy") from None
        if not isinstance(content, dict):
            raise InputError(f"{path} must hold one JSON object; got {type(content).__name__}")
        return content

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every line of ``metrics.jsonl``; empty if there is none."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def keep_metrics_through(self, epoch: int) -> None:
        """Drop the metrics of epochs after the one a run is resumed from."""
        kept = [m for m in self.read_metrics() if m["epoch"] <= epoch]
        with atomic_path(self.path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(m) + "\n" for m in kept), encoding="utf-8")


def environment(device: torch.device, seed: int, command: list[str]) -> dict[str, Any]:
    """Versions, commit, device, seed and command: what is needed to explain a number later."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "torchvision", "pyro-ppl", "numpy", "arviz"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "pyrovae": pyrovae.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "command": [os.path.basename(command[0]), *command[1:]] if command else [],
    }


def processor() -> str:
    """The name of this machine's CPU, as well as the system knows it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.machine()
    found = re.search(r"model name[ \t]*:[ \t]*(\S.*)", text)
    return found.group(1).strip() if found else platform.machine()


@functools.cache
def commit(root: Path | None = None) -> str | None:
    """The commit of the checkout that runs, "+" after it where sources differ from it; else None.

    Asked for once: what happens to the checkout afterwards does not happen to this process.

    Args:
        root: the checkout's own folder; default: where this package lies.
    """
    root = Path(pyrovae.__file__).parents[1] if root is None else root
    if not (root / ".git").exists():  # installed: a repository around it is somebody else's
        return None
    found = []
    # Not the repository of a hook that this runs in, and no lock in the way of who works here.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    git = ["git", "--no-optional-locks", "-C", str(root)]
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "pyrovae", "scripts"]):
        try:
            done = subprocess.run(
                [*git, *words],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):  # no git, or none that answers
            return None
        if done.returncode:
            return None
        found.append(done.stdout.strip())
    return found[0] + ("+" if found[1] else "")


def continued(before: dict[str, Any], now: dict[str, Any], epoch: int) -> dict[str, Any]:
    """The environment of a run that goes on after ``epoch``: what is other now stands beside it.

    >>> old = {"device": "cpu", "threads": 2, "seed": 0, "command": ["pyrovae", "train"]}
    >>> continued(old, {**old, "threads": 1, "command": ["pyrovae", "train", "--resume"]}, 3)
    {'device': 'cpu', 'threads': 2, 'seed': 0, 'command': ['pyrovae', 'train'], \
'continued': [{'after_epoch': 3, 'threads': 1}]}
    """
    earlier = before.get("continued", [])
    last = dict(before)
    for change in earlier:
        last |= change
    # What an earlier version did not note, or noted less well, is not known to be other.
    skipped = {"seed", "command"} | (now.keys() - last.keys())
    if last.get("device_name") == platform.machine():
        skipped.add("device_name")
    other = {k: v for k, v in now.items() if k not in skipped and v != last[k]}
    if not other:
        return before
    return {**before, "continued": [*earlier, {"after_epoch": epoch, **other}]}


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to ``path``, by way of a temporary name."""
    header = {"kind": _KIND, "format": FORMAT, "pyrovae": pyrovae.__version__}
    with atomic_path(path) as temporary:
        torch.save({**header, **state}, temporary)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint without executing code; InputError if it is not one of ours, whole."""
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; train the run first")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler met: all mean "not ours"
        reason = str(error).split("\n")[0][:120]
        raise InputError(
            f"cannot read checkpoint {path}: it is truncated, or not a checkpoint ({reason}); "
            "the file was left as it is; restore a copy or train again with --overwrite"
        ) from None
    if not isinstance(state, dict) or state.get("kind") != _KIND:
        raise InputError(
            f"{path} was not written by pyrovae (expected a {_KIND!r}); the file was left as it is"
        )
    if not isinstance(state.get("format"), int) or state["format"] > FORMAT:
        raise InputError(
            f"{path} has checkpoint format {state.get('format')}, newer than the {FORMAT} this "
            f"pyrovae {pyrovae.__version__} knows; upgrade pyrovae; the file was left as it is"
        )
    return state


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: picture writers choose their format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def command_line() -> list[str]:
    """The command that started this process."""
    return list(sys.argv)


def duration(seconds: float) -> str:
    """A time in words.

    >>> [duration(t) for t in (0.34, 31.2, 119, 150, 9000)]
    ['0.3 s', '31 s', '119 s', '2.5 min', '2.5 h']
    """
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
