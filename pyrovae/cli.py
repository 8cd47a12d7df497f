"""The command line: train, evaluate, sample, reconstruct, info.

Results go to stdout, all else to stderr. Exit status: 0 done, 1 failed at run time, 2 usage (one
line: expected, got, remedy), 130 and 143 after Ctrl-C and SIGTERM, with the training state saved.
"""

import argparse
import dataclasses
import errno
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import pyrovae
from pyrovae import config as cfg
from pyrovae.errors import InputError, NonFiniteLossError

DESCRIPTION = "A laboratory for variational autoencoders in Pyro whose likelihoods can be trusted."
INFO = ("likelihoods", "priors", "posteriors", "networks", "objectives", "data")


class _Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line and a near name is offered."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )
        # Before Python 3.14 argparse takes -1e-3 and -inf for flags, and says so confusingly.
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command, made from the fields of the configurations."""
    parser = _Parser(prog="pyrovae", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"pyrovae {pyrovae.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train", help="train a VAE and evaluate it", description="Train a VAE and evaluate it."
    )
    _add_settings(train, cfg.TrainConfig)
    _add_config_file(train)
    train.add_argument("--out", metavar="DIR", help="run directory (default: runs/DATA-LIKELIHOOD)")
    train.add_argument("--resume", action="store_true", help="continue the run in --out, exactly")
    train.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    train.add_argument("--quiet", action="store_true", help="no progress on stderr")
    train.add_argument(
        "--dry-run", action="store_true", help="check all settings and one step; write nothing"
    )

    evaluate = commands.add_parser(
        "evaluate",
        help="estimate log p(x) of a split",
        description="Estimate log p(x) of a split by importance sampling with the guide.",
    )
    evaluate.add_argument("run", metavar="RUN", help="run directory")
    _add_settings(evaluate, cfg.EvaluateConfig)
    _add_config_file(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--quiet", action="store_true", help="no progress on stderr")

    sample = commands.add_parser(
        "sample",
        help="draw images from the model",
        description="Draw z from the prior, then x from the likelihood.",
    )
    _add_picture(sample, "samples.png")
    sample.add_argument("--num-samples", default="64", metavar="N", help="images to draw")

    reconstruct = commands.add_parser(
        "reconstruct",
        help="images beside their reconstructions",
        description="Test images beside their reconstructions.",
    )
    _add_picture(reconstruct, "recon.png")
    reconstruct.add_argument("--num-images", default="16", metavar="N", help="images to show")
    reconstruct.add_argument(
        "--split", default="test", metavar="SPLIT", help="train, valid or test"
    )
    reconstruct.add_argument(
        "--data-root", metavar="DIR", help="folder of the data, if it has moved"
    )

    info = commands.add_parser(
        "info", help="list what there is, or describe a run", description="List what there is."
    )
    info.add_argument(
        "topic", nargs="?", metavar="TOPIC", help=f"{', '.join(INFO)}, or a run directory"
    )
    return parser


def _add_settings(parser: argparse.ArgumentParser, cls: type) -> None:
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        kind, _, many = cfg.field_type(f)
        name = f.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        options: dict[str, Any] = {"help": f.metadata["help"], "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = "store_true"
        else:
            options["metavar"] = f.metadata["metavar"] or kind.__name__.upper()
            if kind is dict or many:
                options["nargs"] = "+"
            if f.metadata["names"] is not None:
                options["metavar"] = "NAME"
                options["help"] += f" ({', '.join(cfg.NAMES[f.metadata['names']])})"
            if f.default not in (None, dataclasses.MISSING):
                options["help"] += f" (default: {f.default})"
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def _add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="settings from TOML; flags override them")


def _add_picture(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--out", default=out, metavar="FILE", help="PNG to write")
    parser.add_argument("--seed", default="0", metavar="INT", help="of the draws")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda")
    parser.add_argument("--mean", action="store_true", help="show E[x | z] in place of a draw of x")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; InputError for anything that it does not know."""
    parser = build_parser()
    commands = parser._subparsers._group_actions[0].choices or {}  # type: ignore[union-attr]
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        near = cfg.did_you_mean(argv[0], commands)
        raise InputError(
            f"there is no command {argv[0]!r}{near}; choose from {', '.join(commands)}"
        )
    args, extra = parser.parse_known_args(argv)
    if extra:
        known = list(dict(commands)[args.command]._option_string_actions)
        stray = extra[0].split("=")[0]
        raise InputError(
            f"unknown argument {stray!r}{cfg.did_you_mean(stray, known)}; "
            f"see pyrovae {args.command} --help"
        )
    return args


def settings(args: argparse.Namespace, cls: type[cfg.C]) -> dict[str, Any]:
    """The settings that were given, by --config and by flags, as plain checked values."""
    values = cfg.read_toml(args.config) if args.config else {}
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
        return [number(flag, t, kind) for t in text]
    return number(flag, text, kind)


def seed(text: str) -> int:
    """The value of --seed."""
    value: int = number("--seed", text, least=0)
    if value > cfg.LARGEST_SEED:
        raise InputError(f"--seed must be at most {cfg.LARGEST_SEED}, got {text}")
    return value


def number(flag: str, text: str, kind: type = int, least: float | None = None) -> Any:
    """Text as a number of a kind (or as it is, for str); InputError naming the flag."""
    try:
        value = kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise InputError(f"{flag} expects {expected}, got {text!r}") from None
    if least is not None and value < least:
        raise InputError(f"{flag} must be at least {least:g}, got {text}")
    return value


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(argv)
        from pyrovae import commands

        return getattr(commands, args.command)(args)
    except InputError as error:
        return _fail(error, 2)
    except NonFiniteLossError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
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


def say(text: str, quiet: bool = False) -> None:
    """A line for the person at the terminal, on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def show(result: dict[str, Any] | str) -> None:
    """A result, on stdout: JSON for a dictionary."""
    print(json.dumps(result, indent=2) if isinstance(result, dict) else result, flush=True)
