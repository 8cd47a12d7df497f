"""``pyrovae anneal``: log p(x) by annealed importance sampling, from below and from above."""

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path

from pyrovae import annealing
from pyrovae import config as cfg
from pyrovae.cli import settings
from pyrovae.commands.output import check_writable, progress, say, show
from pyrovae.comparison import checkpoint_digest, run_split
from pyrovae.errors import InputError
from pyrovae.importance import check_has_density
from pyrovae.runs import Run, load_checkpoint
from pyrovae.settings import AnnealConfig
from pyrovae.training import resolve_device


def anneal(args: argparse.Namespace) -> int:
    """``pyrovae anneal``: say what it will take, then do it, saving each batch of images."""
    given = settings(args, AnnealConfig)
    config = cfg.make(AnnealConfig, given)
    if config.bdmc and "split" in given:
        raise InputError(
            "--bdmc simulates its images from the model and takes none of a split; leave --split "
            "or --bdmc out"
        )
    chains = annealing.Settings(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(annealing.Settings)}
    )
    device = resolve_device(config.device)
    run = Run(args.run)
    vae = cfg.load(run, device=str(device))
    check_has_density(vae)
    split = run_split(run, config.split, seed=config.seed, data_root=config.data_root)
    state = _state(args.state, run, config, device.type)
    if args.restart and state.exists():
        if "annealing" not in load_checkpoint(state):
            raise InputError(f"{state} is no checkpoint of annealing, so it was left alone")
        state.unlink()
    if state.exists():
        say(f"saved     {state} is continued", args.quiet)
    try:
        with progress("gradient", args.quiet) as report:
            total = chains.gradients(
                config.num_images if config.bdmc else min(config.num_images, len(split)),
                2 if config.bdmc else 1,
            )
            result = annealing.anneal_split(
                vae,
                split,
                config.num_images,
                chains,
                simulated=config.bdmc,
                checkpoint=state,
                announce=lambda cost: say(f"cost      {cost}", args.quiet),
                progress=lambda done: report("anneal", done, total),
            )
    except KeyboardInterrupt:
        say(f"stopped; finished images are saved in {state}. Continue: the same command")
        return 130
    show(result.to_dict() if args.json else str(result))
    return 0


def _state(given: str | None, run: Run, config: AnnealConfig, device: str) -> Path:
    """The file that finished images are saved to: one for each run, weights and settings."""
    if given is not None:
        path = Path(given)
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(f"cannot write {given}: its folder must exist; check --state")
        check_writable(path.parent, "--state")
        return path
    check_writable(run.path, "--state")
    moved = {"data_root", "device"}
    key = {k: v for k, v in dataclasses.asdict(config).items() if k not in moved}
    text = json.dumps([key, device, checkpoint_digest(run)])
    name = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    return run.path / "annealing" / f"{name}.pt"
