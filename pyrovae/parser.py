"""The parser of the command line, made from the settings; it imports nothing but them."""

import argparse
import dataclasses
import re
from typing import Any, NamedTuple, NoReturn

import pyrovae
from pyrovae import settings
from pyrovae.checks import did_you_mean, field_type
from pyrovae.errors import InputError

DESCRIPTION = "A laboratory for variational autoencoders in Pyro whose likelihoods can be trusted."
INFO = ("likelihoods", "priors", "posteriors", "networks", "objectives", "data", "presets")

_RUN = ("run", {"metavar": "RUN", "help": "run directory"})
_JSON = ("--json", {"action": "store_true", "help": "print one JSON object"})
_QUIET = ("--quiet", {"action": "store_true", "help": "no progress on stderr"})
_CONFIG = ("--config", {"metavar": "FILE", "help": "settings from TOML; flags override them"})


def _out(default: str | None, help: str) -> tuple[str, dict[str, Any]]:
    shown = f"{help} (default: {default})" if default else help
    return "--out", {"default": default, "metavar": "FILE", "help": shown}


class Command(NamedTuple):
    """A command: the module of `pyrovae.commands` that holds it, and what it takes."""

    module: str
    settings: type | None
    help: str
    description: str
    arguments: tuple[tuple[str, dict[str, Any]], ...]


COMMANDS: dict[str, Command] = {
    "train": Command(
        "train",
        settings.TrainConfig,
        "train a VAE and evaluate it",
        "Train a VAE and evaluate it.",
        (
            _CONFIG,
            ("--out", {"metavar": "DIR", "help": "run directory (default: runs/DATA-LIKELIHOOD)"}),
            ("--resume", {"action": "store_true", "help": "continue the run in --out, exactly"}),
            ("--overwrite", {"action": "store_true", "help": "replace the run in --out"}),
            _QUIET,
            (
                "--dry-run",
                {
                    "action": "store_true",
                    "help": "check all settings, and tell shapes, memory and the time of an "
                    "epoch; write nothing",
                },
            ),
        ),
    ),
    "evaluate": Command(
        "evaluate",
        settings.EvaluateConfig,
        "estimate log p(x) of a split, with its diagnostics",
        "Estimate log p(x) of a split by importance sampling, or integrate it by quadrature.",
        (
            _RUN,
            _CONFIG,
            (
                "--export",
                {"metavar": "FILE.nc", "help": "also write draws and weights for ArviZ (NetCDF)"},
            ),
            _JSON,
            _QUIET,
        ),
    ),
    "anneal": Command(
        "bounds",
        settings.AnnealConfig,
        "bound log p(x) more tightly, and from both sides",
        "Annealed importance sampling of log p(x). What is finished is saved: the same command "
        "continues a run that was stopped.",
        (
            _RUN,
            ("--state", {"metavar": "FILE", "help": "where to save (default: within the run)"}),
            ("--restart", {"action": "store_true", "help": "forget what was saved"}),
            _JSON,
            _QUIET,
        ),
    ),
    "score": Command(
        "score",
        settings.ScoreConfig,
        "log p(x) of images that you bring",
        "log p(x) of images that you bring, one by one, and their rank among training images.",
        (
            _RUN,
            (
                "paths",
                {"nargs": "+", "metavar": "PATH", "help": "pictures, folders, .npy, .npz"},
            ),
            _out(None, "CSV to write"),
            _JSON,
            _QUIET,
        ),
    ),
    "compare": Command(
        "compare",
        settings.CompareConfig,
        "several runs in one table, best first",
        "Several runs in one table, best first; what cannot be compared is refused.",
        (
            ("runs", {"nargs": "+", "metavar": "RUN", "help": "run directories"}),
            _JSON,
            ("--markdown", {"action": "store_true", "help": "print a Markdown table"}),
            _QUIET,
        ),
    ),
    "sample": Command(
        "pictures",
        settings.SampleConfig,
        "draw images from the model",
        "Draw z from the prior, then x from the likelihood.",
        (_RUN, _out("samples.png", "PNG to write")),
    ),
    "reconstruct": Command(
        "pictures",
        settings.ReconstructConfig,
        "images beside their reconstructions",
        "Images beside their reconstructions.",
        (_RUN, _out("recon.png", "PNG to write")),
    ),
    "interpolate": Command(
        "pictures",
        settings.InterpolateConfig,
        "walk from one image to another",
        "Walk through the latent space from one image to another.",
        (_RUN, _out("interpolation.png", "PNG or GIF to write")),
    ),
    "traverse": Command(
        "pictures",
        settings.TraverseConfig,
        "move one latent dimension at a time",
        "Move one latent dimension at a time through the prior.",
        (_RUN, _out("traverse.png", "PNG or GIF to write")),
    ),
    "report": Command(
        "pages",
        settings.ReportConfig,
        "all about a run, in one HTML file",
        "Evaluate a run and write all about it to one HTML file that needs no network.",
        (_RUN, _out(None, "HTML to write (default: report.html in the run)"), _QUIET),
    ),
    "explore": Command(
        "pages",
        settings.ExploreConfig,
        "the decoder in a browser, to play with",
        "Write one HTML file in which the decoder runs, without a network.",
        (_RUN, _out(None, "HTML to write (default: explore.html in the run)"), _QUIET),
    ),
    "export": Command(
        "export",
        None,
        "weights, configuration and model card, to share",
        "Write safetensors weights, JSON configuration and a model card; pyrovae.load(DIR) reads "
        "them.",
        (
            _RUN,
            ("dir", {"metavar": "DIR", "help": "directory to write, new or empty"}),
            ("--overwrite", {"action": "store_true", "help": "replace an earlier export in DIR"}),
        ),
    ),
    "info": Command(
        "info",
        None,
        "list what there is, or describe a run",
        "List what there is, or describe a run.",
        (
            (
                "topic",
                {
                    "nargs": "?",
                    "metavar": "TOPIC",
                    "help": f"{', '.join(INFO)}, or a run directory",
                },
            ),
        ),
    ),
}


class _Parser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line and a near name is offered."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        # Before Python 3.14 argparse takes -1e-3 and -inf for flags, and says so confusingly.
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = _Parser(prog="pyrovae", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"pyrovae {pyrovae.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.help, description=command.description)
        for argument, options in command.arguments:
            added.add_argument(argument, **options)
        if command.settings is not None:
            _add_settings(added, command.settings)
    return parser


def _add_settings(parser: argparse.ArgumentParser, cls: type) -> None:
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        kind, _, many = field_type(f)
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
                options["help"] += f" ({', '.join(settings.NAMES[f.metadata['names']])})"
            if f.default not in (None, dataclasses.MISSING):
                options["help"] += f" (default: {f.default})"
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line; InputError for anything that it does not know."""
    parser = build_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = did_you_mean(argv[0], COMMANDS)
        raise InputError(
            f"there is no command {argv[0]!r}{near}; choose from {', '.join(COMMANDS)}"
        )
    args, extra = parser.parse_known_args(argv)
    if extra:
        commands = parser._subparsers._group_actions[0].choices or {}  # type: ignore[union-attr]
        known = list(dict(commands)[args.command]._option_string_actions)
        stray = extra[0].split("=")[0]
        raise InputError(
            f"unknown argument {stray!r}{did_you_mean(stray, known)}; "
            f"see pyrovae {args.command} --help"
        )
    return args
