"""The command line: from words to a command of `pyrovae.commands`, and its exit status.

Results go to stdout, all else to stderr. Exit status: 0 done, 1 failed at run time, 2 usage (one
line: expected, got, remedy), 130 and 143 after Ctrl-C and SIGTERM, with the training state saved.
"""

import argparse
import dataclasses
import errno
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pyrovae import config as cfg
from pyrovae import runtime
from pyrovae.checks import C
from pyrovae.errors import InputError, NonFiniteLossError, ProcessLostError
from pyrovae.parser import COMMANDS
from pyrovae.parser import parse as parse

__all__ = ["main", "parse", "settings"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        args = parse(list(sys.argv[1:] if argv is None else argv))
        runtime.settle()
        module = import_module(f"pyrovae.commands.{COMMANDS[args.command].module}")
        return getattr(module, args.command)(args)
    except InputError as error:
        return _fail(error, 2)
    except (NonFiniteLossError, ProcessLostError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read the results, such as head, has gone: no fault of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        # A path that cannot be used is a mistake of the command; a full disk is not.
        typed = error.errno in (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS)
        return _fail(f"cannot use{name}: {error.strerror or error}", 2 if typed else 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search(r"out of memory|alloc.*memory", str(error)):
            return _fail(
                "the memory of this machine does not suffice; try a smaller --batch-size, "
                "--num-particles or network",
                1,
            )
        raise


def _fail(message: object, status: int) -> int:
    print(f"pyrovae: {' '.join(str(message).split())}", file=sys.stderr)
    return status


def configuration(args: argparse.Namespace, cls: type[C]) -> C:
    """A configuration from the flags that were given, and --config."""
    return cfg.make(cls, settings(args, cls))


def settings(args: argparse.Namespace, cls: type[C]) -> dict[str, Any]:
    """The settings that were given, by --config and by flags, as plain checked values."""
    file = getattr(args, "config", None)
    values = cfg.read_toml(file) if file else {}
    for f in dataclasses.fields(cls):
        if hasattr(args, f.name):
            values[f.name] = _from_text(f, getattr(args, f.name))
    made = cfg.make(cls, values)
    return {name: getattr(made, name) for name in values}


def _from_text(f: "dataclasses.Field[Any]", text: Any) -> Any:
    flag = "--" + f.name.replace("_", "-")
    kind, _, many = cfg.field_type(f)
    if kind is bool:
        return text
    if kind is dict:
        return dict(_pair(flag, t) for t in text)
    if many:
        return [_number(flag, t, kind) for t in text]
    return _number(flag, text, kind)


def _number(flag: str, text: str, kind: type) -> Any:
    """Text as a number of a kind (or as it is, for str); InputError naming the flag."""
    try:
        return kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise InputError(f"{flag} expects {expected}, got {text!r}") from None


def _pair(flag: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise InputError(f"{flag} expects KEY=VALUE, got {text!r}; for example scale=learned")
    values = [_plain(part) for part in value.split(",") if part]
    return name.replace("-", "_"), values if "," in value else values[0]


def _plain(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)
