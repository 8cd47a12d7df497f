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
_DATA = ("training images", "more of them", "test images")
_MADE = (
    "E[x | z], z from the prior",
    "x drawn from p(x | z), same z",
    "E[x | z] of the test images",
)
# Inches: of the pictures, of the names beside them, of a line of words above them.
_WIDE, _LEFT, _HEAD = 7.0, 1.55, 0.22


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
            index = torch.arange(min(2 * _EACH, len(data.train)))
            given = data.train.batch(index, torch.Generator().manual_seed(0))
            lines.append(("the data", [given[:_EACH], given[_EACH:], x]))
        made = [vae.generate(_EACH, mean=mean, seed=0) for mean in (True, False)]
        lines.append((row.title, [*made, vae.reconstruct(x, seed=0)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(_figure(lines), path, dpi=110)


def _figure(lines: list[tuple[str, list[Tensor]]]) -> "Figure":
    from matplotlib.figure import Figure

    parts = [(lines[:1], _DATA), (lines[1:], _MADE)]
    sheets = [_sheet([blocks for _, blocks in some]) for some, _ in parts]
    tall = [_WIDE * sheet.shape[1] / sheet.shape[2] for sheet in sheets]
    wide, high = _LEFT + _WIDE, sum(tall) + len(parts) * _HEAD
    figure, top = Figure(figsize=(wide, high)), high
    for (some, heads), sheet, height in zip(parts, sheets, tall, strict=True):
        top -= _HEAD + height
        axes = figure.add_axes((_LEFT / wide, top / high, _WIDE / wide, height / high))
        axes.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
        options = {"transform": axes.transAxes, "fontsize": 7}
        for i, (name, _) in enumerate(some):
            axes.text(-0.01, 1 - (i + 0.5) / len(some), name, ha="right", va="center", **options)
        for i, words in enumerate(heads):
            x, y = (i + 0.5) / len(heads), 1 + 0.05 / height
            axes.text(x, y, words, ha="center", va="bottom", **options)
    return figure


def _sheet(lines: list[list[Tensor]]) -> Tensor:
    """Blocks of images side by side, a line of them for each row."""
    gap = max(2, lines[0][0].shape[-1] // 4)
    parts: list[Tensor] = []
    for blocks in zip(*lines, strict=True):
        part = plots.sheet(torch.cat([_full(x) for x in blocks]), _EACH)
        parts += [part.new_ones(3, part.shape[1], gap), part] if parts else [part]
    return torch.cat(parts, 2)


def _full(x: Tensor) -> Tensor:
    """A whole row, white where a small data set has no more images."""
    return torch.cat([x, x.new_ones(_EACH - len(x), *x.shape[1:])])
