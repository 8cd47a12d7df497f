"""What a person at the terminal sees: lines on stderr, results on stdout, progress, files."""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyrovae.errors import InputError


def say(text: str, quiet: bool = False) -> None:
    """A line for the person at the terminal, on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def show(result: dict[str, Any] | str) -> None:
    """A result, on stdout: JSON for a dictionary."""
    print(json.dumps(result, indent=2) if isinstance(result, dict) else result, flush=True)


@contextmanager
def progress(unit: str, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal: gives ``report(what, done, total)``."""
    from tqdm import tqdm

    now = ""
    with tqdm(unit=unit, disable=True if quiet else None) as bar:

        def report(what: str, done: int, total: int) -> None:
            nonlocal now
            if what != now:
                now = what
                bar.reset(total)
                bar.set_description(what, refresh=False)
            bar.update(done - bar.n)

        yield report


def quoted(path: object) -> str:
    """A path as one word of a shell."""
    return shlex.quote(str(path))


def new_file(name: str, flag: str, *suffixes: str) -> Path:
    """The path of a file to write, checked before any work; InputError naming the flag."""
    path = Path(name)
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{flag} expects a file ending in {' or '.join(suffixes)}, got {name!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"cannot write {name}: its folder must exist; check {flag}")
    check_writable(path.parent, flag)
    return path


def check_writable(folder: Path, flag: str = "--out") -> None:
    """Raise InputError for a folder in which no file can be made."""
    # The permission bits do not tell: root passes them on a read-only or a virtual file system.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; choose another {flag}"
        ) from None
