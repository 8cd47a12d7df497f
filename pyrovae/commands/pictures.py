"""Pictures of a run: samples, reconstructions, interpolations, traversals."""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from pyrovae import comparison, pictures, plots
from pyrovae import config as cfg
from pyrovae.cli import configuration
from pyrovae.commands.output import new_file, show
from pyrovae.errors import InputError
from pyrovae.runs import Run
from pyrovae.settings import (
    InterpolateConfig,
    ReconstructConfig,
    SampleConfig,
    TraverseConfig,
)
from pyrovae.training import resolve_device

# Images among which the most active latents are told.
_ENCODED = 500


def sample(args: argparse.Namespace) -> int:
    """``pyrovae sample``: a sheet of images drawn from the model."""
    config = configuration(args, SampleConfig)
    out = new_file(args.out, "--out", ".png")
    vae = cfg.load(args.run, device=str(resolve_device(config.device)))
    x = vae.generate(config.num_samples, mean=config.mean, seed=config.seed)
    plots.save(plots.samples(x), out)
    show(str(out))
    return 0


def reconstruct(args: argparse.Namespace) -> int:
    """``pyrovae reconstruct``: images of a split beside their reconstructions."""
    config = configuration(args, ReconstructConfig)
    out = new_file(args.out, "--out", ".png")
    device = resolve_device(config.device)
    vae = cfg.load(args.run, device=str(device))
    dataset = cfg.data_of(Run(args.run), config.data_root)
    few = getattr(dataset, config.split).head(config.num_images)
    x = few.tensor(torch.Generator().manual_seed(config.seed))
    again = vae.reconstruct(x.to(device), mean=config.mean, seed=config.seed)
    plots.save(plots.reconstructions(x, again, max(8, math.isqrt(len(x)))), out)
    show(str(out))
    return 0


def interpolate(args: argparse.Namespace) -> int:
    """``pyrovae interpolate``: walks between pairs of images, as rows or as an animation."""
    config = configuration(args, InterpolateConfig)
    out = new_file(args.out, "--out", ".png", ".gif")
    vae = cfg.load(args.run, device=str(resolve_device(config.device)))
    x = _images(args.run, config.split, config.data_root)
    if 2 * config.pairs > len(x):
        raise InputError(
            f"--pairs {config.pairs} asks for {2 * config.pairs} images, and the {config.split} "
            f"split has {len(x)}; give {len(x) // 2} at most"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed))
    a, b = x[order[: 2 * config.pairs]].chunk(2)
    if out.suffix.lower() == ".gif":
        pictures.save_animation(vae.interpolate(a, b, config.steps), out)
    else:
        plots.save(plots.interpolation(vae, a, b, config.steps), out)
    show(str(out))
    return 0


def traverse(args: argparse.Namespace) -> int:
    """``pyrovae traverse``: one latent dimension at a time, as rows or as an animation."""
    config = configuration(args, TraverseConfig)
    if config.dims is not None and hasattr(args, "latents"):
        raise InputError("--dims says which dimensions, so --latents has no use; leave one out")
    out = new_file(args.out, "--out", ".png", ".gif")
    device = resolve_device(config.device)
    vae = cfg.load(args.run, device=str(device))
    x = _images(args.run, config.split, config.data_root)
    if config.image >= len(x):
        raise InputError(
            f"--image counts from 0, and the {config.split} split has {len(x)}; got {config.image}"
        )
    # The walks pass by the first x; all of them tell which dimensions are active.
    x = torch.cat([x[config.image : config.image + 1], x[:_ENCODED]])
    dims = (
        config.dims
        if config.dims is not None
        else most_active(vae.encode(x.to(device)), config.latents)
    )
    if out.suffix.lower() == ".gif":
        pictures.save_animation(pictures.traverse(vae, x, dims, config.steps, config.span).x, out)
    else:
        plots.save(plots.traversal(vae, x, dims, config.steps, config.span), out)
    show(str(out))
    return 0


def most_active(means: Tensor, count: int) -> list[int]:
    """The dimensions in which E_q[z | x] (N, D) varies most, that first."""
    return means.var(0).argsort(descending=True, stable=True)[:count].tolist()


def _images(path: str | Path, split: str, data_root: str | None) -> Tensor:
    run = Run(path)
    x = comparison.run_split(run, split, data_root=data_root).tensor()
    if not pictures.is_picture(x.shape[1:]):
        raise InputError(
            f"the x of this run have shape {tuple(x.shape[1:])}; only (1 or 3, H, W) can be drawn"
        )
    return x
