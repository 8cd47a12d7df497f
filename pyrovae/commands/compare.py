"""``pyrovae compare``: several runs in one table."""

import argparse
import dataclasses

from pyrovae import comparison
from pyrovae.cli import configuration
from pyrovae.commands.output import progress, show
from pyrovae.errors import InputError
from pyrovae.settings import CompareConfig
from pyrovae.training import resolve_device


def compare(args: argparse.Namespace) -> int:
    """``pyrovae compare``: evaluate what was not yet, and print the table."""
    config = configuration(args, CompareConfig)
    if args.json and args.markdown:
        raise InputError("--json and --markdown are two forms of one table; give one of them")
    options = dataclasses.asdict(config) | {"device": str(resolve_device(config.device))}
    with progress("image", args.quiet) as report:
        table = comparison.compare(args.runs, progress=report, **options)
    show(table.to_dict() if args.json else table.to_markdown() if args.markdown else str(table))
    return 0
