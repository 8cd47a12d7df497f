"""What every mistake ends with: one line that helps, exit status 2, nothing written."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pyrovae.cli import main
from pyrovae.errors import InputError

Tree = dict[str, bytes | None]


def tree(folder: Path) -> Tree:
    """Every path below a folder, with the bytes of the files."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: empty, on a machine without CUDA and without downloaded data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    yield tmp_path


def refuse(command: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command; it must end as every mistake ends, and say ``says``."""
    before = tree(here)
    capsys.readouterr()
    status = main(shlex.split(command))
    printed = capsys.readouterr()
    is_refusal(status, printed.out, printed.err, says)
    assert tree(here) == before


def is_refusal(status: int, out: str, err: str, says: str) -> None:
    assert err.startswith("pyrovae: "), err
    assert err.endswith("\n"), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert says in err
    assert out == ""
    assert status == 2


def one_line(act: Callable[[Path], object], remedy: str, here: Path) -> str:
    """What ``act`` refuses with: one line that says ``remedy``."""
    with pytest.raises(InputError, match=remedy) as caught:
        act(here)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def none(_: object) -> None:
    """A preparation that gives nothing back."""
