"""``pyrovae export``: a run as a directory to share."""

import argparse

from pyrovae import sharing
from pyrovae.commands.output import say, show
from pyrovae.errors import InputError


def export(args: argparse.Namespace) -> int:
    """``pyrovae export``: weights, configuration and model card."""
    if args.dir == "":
        raise InputError("DIR expects a directory, got an empty name")
    show(str(sharing.export(args.run, args.dir, overwrite=args.overwrite)))
    say(f'next      python -c "import pyrovae; print(pyrovae.load({args.dir!r}))"')
    return 0
