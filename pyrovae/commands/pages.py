"""``pyrovae report`` and ``pyrovae explore``: a run as one HTML file."""

import argparse
import dataclasses
from pathlib import Path

from pyrovae.cli import configuration
from pyrovae.commands.output import check_writable, new_file, progress, say, show
from pyrovae.errors import InputError
from pyrovae.explore import write_explorer
from pyrovae.report import write_report
from pyrovae.runs import Run
from pyrovae.settings import ExploreConfig, ReportConfig
from pyrovae.training import resolve_device


def report(args: argparse.Namespace) -> int:
    """``pyrovae report``: evaluate a run and write all about it."""
    config = configuration(args, ReportConfig)
    out = _page(args)
    options = dataclasses.asdict(config) | {"device": str(resolve_device(config.device))}
    with progress("image", args.quiet) as told:
        path = write_report(
            args.run, out, progress=lambda done, total: told("evaluate", done, total), **options
        )
    show(str(path))
    return 0


def explore(args: argparse.Namespace) -> int:
    """``pyrovae explore``: the decoder in a page."""
    config = configuration(args, ExploreConfig)
    path = write_explorer(
        args.run,
        _page(args),
        progress=lambda line: say(line, args.quiet),
        **dataclasses.asdict(config),
    )
    show(str(path))
    return 0


def _page(args: argparse.Namespace) -> Path | None:
    """The file to write, if one was named; checked before any work."""
    if args.out is not None:
        if args.out == "":
            raise InputError("--out expects a file ending in .html, got an empty name")
        return new_file(args.out, "--out", ".html", ".htm")
    run = Run(args.run)
    run.read_json("config.json")  # tells at once what is no run
    check_writable(run.path)
    return None
