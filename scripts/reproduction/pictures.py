"""One sheet of a data set: what each likelihood's VAE draws, and how it reconstructs."""

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

_EACH = 6  # samples, and reconstructions, of a likelihood
_WIDE, _LEFT = 5.6, 1.9  # inches of the pictures, and of the names beside them


def draw(rows: list[tuple[Row, int]], place: Place, path: Path) -> None:
    """Write the sheet of the rows (and seeds) of a data set: E[x | z], z from p(z) and q(z | x)."""
    lines: list[tuple[str, Tensor]] = []
    for row, seed in rows:
        run = folder(row, seed, place)
        named = Path(cfg.run_config(run).data).suffix == ""
        data = cfg.data_of(run, place.data_root if named else None)
        vae = cfg.load(run)
        x = data.test.head(_EACH).tensor()
        if not lines:
            index = torch.arange(_EACH)
            drawn = data.train.batch(index, torch.Generator().manual_seed(0))
            lines.append(("the data", torch.cat([drawn, x])))
        made = vae.generate(_EACH, mean=True, seed=0)
        lines.append((row.title, torch.cat([made, vae.reconstruct(x, seed=0)])))
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(_figure(lines), path, dpi=110)


def _figure(lines: list[tuple[str, Tensor]]) -> "Figure":
    from matplotlib.figure import Figure

    gap = max(2, lines[0][1].shape[-1] // 4)
    left = plots.sheet(torch.cat([x[:_EACH] for _, x in lines]), _EACH)
    right = plots.sheet(torch.cat([x[_EACH:] for _, x in lines]), len(lines[0][1]) - _EACH)
    sheet = torch.cat([left, left.new_ones(3, left.shape[1], gap), right], 2)
    top, tall = 0.25, _WIDE * sheet.shape[1] / sheet.shape[2]
    figure = Figure(figsize=(_LEFT + _WIDE, tall + top))
    box = (_LEFT / (_LEFT + _WIDE), 0.0, _WIDE / (_LEFT + _WIDE), tall / (tall + top))
    axes = figure.add_axes(box)
    axes.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()
    for i, (name, _) in enumerate(lines):
        y = 1 - (i + 0.5) / len(lines)
        axes.text(-0.01, y, name, transform=axes.transAxes, ha="right", va="center", fontsize=7)
    for x, words in ((0.25, "from the prior"), (0.75, "test images, reconstructed")):
        axes.text(x, 1.01, words, transform=axes.transAxes, ha="center", fontsize=7)
    return figure
