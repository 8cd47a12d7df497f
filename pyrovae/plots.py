"""Plots of data and runs with Matplotlib; no display is needed, none is opened, no style is set.

Charts draw on the ``ax`` they are given, or on a figure of their own, and return the Axes. Pictures
return a Figure. `save` writes either.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae import pictures
from pyrovae.charts import (
    GREY,
    activity,
    bound_against_k,
    curves,
    elbo_curves,
    error_curves,
    kl_per_dim,
    latents,
    pareto_k,
    rate_curves,
    rate_distortion,
)
from pyrovae.pictures import is_picture, sheet
from pyrovae.runs import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyrovae.vae import VAE

__all__ = [
    "activity",
    "bound_against_k",
    "curves",
    "elbo_curves",
    "error_curves",
    "interpolation",
    "is_picture",
    "kl_per_dim",
    "latents",
    "manifold",
    "pareto_k",
    "rate_curves",
    "rate_distortion",
    "reconstructions",
    "samples",
    "save",
    "sheet",
    "traversal",
]


def samples(x: Tensor, columns: int | None = None) -> "Figure":
    """A sheet of images (N, C, H, W)."""
    return _page(x.detach().cpu(), columns)


def reconstructions(x: Tensor, reconstructed: Tensor, columns: int = 8) -> "Figure":
    """Originals above their reconstructions, in pairs of rows; both (N, C, H, W)."""
    columns = min(columns, len(x))
    pairs = []
    for start in range(0, len(x), columns):
        for images in (x, reconstructed):
            row = images[start : start + columns].detach().cpu()
            blank = row.new_ones(columns - len(row), *row.shape[1:])
            pairs.append(torch.cat([row, blank]))
    return _page(torch.cat(pairs), columns, title="original above, reconstruction below")


def interpolation(vae: "VAE", a: Tensor, b: Tensor, steps: int = 9) -> "Figure":
    """Each image of ``a``, the walk from its latent to that of ``b``, the image of ``b``; in rows.

    Args:
        vae: the model.
        a: (N, *x_shape), left.
        b: (N, *x_shape), right.
        steps: points on each walk.
    """
    walks = vae.interpolate(a, b, steps).cpu()
    rows = torch.cat([a.cpu().unsqueeze(1), walks, b.cpu().unsqueeze(1)], 1)
    return _page(rows.flatten(0, 1), steps + 2, title="original, decoded on the way, original")


def traversal(
    vae: "VAE", x: Tensor, dims: Sequence[int] | None = None, steps: int = 9, span: float = 3.0
) -> "Figure":
    """One row a latent dimension: the first x decoded while that dimension alone is moved.

    Arguments as of `pyrovae.pictures.traverse`.
    """
    walk = pictures.traverse(vae, x, dims, steps, span)
    figure = _page(walk.x.flatten(0, 1).cpu(), steps, left=0.5, title=f"prior mean ± {span:g} s.d.")
    axes = figure.axes[0]
    for row, d in enumerate(walk.dims):
        y = 1 - (row + 0.5) / len(walk.dims)
        axes.text(-0.01, y, f"z{d}", transform=axes.transAxes, ha="right", va="center", color=GREY)
    return figure


def manifold(vae: "VAE", size: int = 15) -> "Figure":
    """A latent space of two dimensions, decoded on a grid even in prior probability."""
    return _page(pictures.manifold(vae, size).cpu(), size, gap=0)


def save(figure: "Figure | Axes", path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure in the format its name ends in (.png, .svg, .pdf), whole or not at all."""
    # Axes know their figure, a figure knows itself.
    owner: Any = figure.figure
    with atomic_path(Path(path)) as temporary:
        owner.savefig(temporary, dpi=dpi)


def _page(
    x: Tensor,
    columns: int | None,
    gap: int | None = None,
    left: float = 0.0,
    title: str | None = None,
) -> "Figure":
    """A figure of nothing but a sheet, with room in inches for words at its left and top."""
    from matplotlib.figure import Figure

    page = sheet(x, columns, gap)
    height, width = page.shape[1:]
    inches, top = 6.0, 0.25 if title else 0.0
    tall = inches * height / width
    figure = Figure(figsize=(inches + left, tall + top))
    box = (left / (inches + left), 0.0, inches / (inches + left), tall / (tall + top))
    axes = figure.add_axes(box)
    axes.imshow(page.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=8, color=GREY, pad=4)
    return figure
