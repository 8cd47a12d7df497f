"""One sheet of a data set: what each likelihood's VAE means, draws and reconstructs."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrovae import config as cfg
from pyrovae import plots
from reproduction.rows import Row
from reproduction.running import Place, folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EACH = 5  # images of each block
_BLOCKS = ("E[x | z], z from the prior", "x drawn from p(x | z), same z", "test images: E[x | z]")
_WIDE, _LEFT = 7.0, 1.55  # inches of the pictures, and of the names beside them


def draw(rows: list[tuple[Row, int]], place: Place, path: Path) -> None:
    """Write the sheet of the rows (and seeds) of a data set: means, draws, reconstructions."""
    lines: list[tuple[str, list[Tensor]]] = []
    for row, seed in rows:
        run = folder(row, seed, place)
        named = Path(cfg.run_config(run).data).suffix == ""
        data = cfg.data_of(run, place.data_root if named else None)
        vae = cfg.load(run)
        x = data.test.head(_EACH).tensor()
        if not lines:
            index = torch.arange(2 * _EACH)
            given = data.train.batch(index, torch.Generator().manual_seed(0))
            lines.append(("the data", [*given.split(_EACH), x]))
        made = [vae.generate(_EACH, mean=mean, seed=0) for mean in (True, False)]
        lines.append((row.title, [*made, vae.reconstruct(x, seed=0)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(_figure(lines), path, dpi=110)


def _figure(lines: list[tuple[str, list[Tensor]]]) -> "Figure":
    from matplotlib.figure import Figure

    gap = max(2, lines[0][1][0].shape[-1] // 4)
    parts: list[Tensor] = []
    for blocks in zip(*(blocks for _, blocks in lines), strict=True):
        part = plots.sheet(torch.cat([_full(x) for x in blocks]), _EACH)
        parts += [part.new_ones(3, part.shape[1], gap), part] if parts else [part]
    sheet = torch.cat(parts, 2)
    top, tall = 0.25, _WIDE * sheet.shape[1] / sheet.shape[2]
    figure = Figure(figsize=(_LEFT + _WIDE, tall + top))
    box = (_LEFT / (_LEFT + _WIDE), 0.0, _WIDE / (_LEFT + _WIDE), tall / (tall + top))
    axes = figure.add_axes(box)
    axes.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()
    for i, (name, _) in enumerate(lines):
        y = 1 - (i + 0.5) / len(lines)
        axes.text(-0.01, y, name, transform=axes.transAxes, ha="right", va="center", fontsize=7)
    for i, words in enumerate(_BLOCKS):
        x = (i + 0.5) / len(_BLOCKS)
        axes.text(x, 1.01, words, transform=axes.transAxes, ha="center", fontsize=7)
    return figure


def _full(x: Tensor) -> Tensor:
    """A whole row, white where a small data set has no more images."""
    return torch.cat([x, x.new_ones(_EACH - len(x), *x.shape[1:])])
