"""``pyrovae score``: log p(x) of images that a person brings."""

import argparse

from pyrovae.cli import configuration
from pyrovae.commands.output import new_file, progress, say, show
from pyrovae.errors import InputError
from pyrovae.scoring import score_paths
from pyrovae.settings import ScoreConfig
from pyrovae.training import resolve_device


def score(args: argparse.Namespace) -> int:
    """``pyrovae score``: a table of the images, and a CSV file if one is named."""
    config = configuration(args, ScoreConfig)
    if args.out == "":
        raise InputError("--out expects a file ending in .csv, got an empty name; leave it out")
    out = None if args.out is None else new_file(args.out, "--out", ".csv")
    device = resolve_device(config.device)
    with progress("image", args.quiet) as report:
        scores = score_paths(
            args.run,
            args.paths,
            num_particles=config.num_particles,
            seed=config.seed,
            num_reference=config.num_reference,
            device=str(device),
            data_root=config.data_root,
            progress=report,
        )
    if out is not None:
        scores.to_csv(out)
        say(f"written   {out}", args.quiet)
    show(scores.to_dict() if args.json else str(scores))
    return 0
