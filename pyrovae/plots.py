"""Pictures of data and runs with Matplotlib; no display is needed and none is opened.

Each function returns a `matplotlib.figure.Figure`; `save` writes it.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.errors import InputError
from pyrovae.runs import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#1b1f24"
_BLUE, _ORANGE, _GREY = "#2463a8", "#c8622a", "#8a9099"


def is_picture(x_shape: Sequence[int]) -> bool:
    """Whether x of this shape can be shown: (C, H, W) with one or three channels."""
    return len(x_shape) == 3 and x_shape[0] in (1, 3)


def sheet(x: Tensor, columns: int | None = None, gap: int | None = None) -> Tensor:
    """Lay images (N, C, H, W) out on one white sheet (3, height, width), row by row."""
    if not is_picture(x.shape[1:]):
        raise InputError(
            f"expected images of shape (N, 1 or 3, H, W), got {tuple(x.shape)}; only such can be "
            "drawn"
        )
    n, _, height, width = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    gap = max(1, height // 16) if gap is None else gap
    page = x.new_ones(3, rows * (height + gap) + gap, columns * (width + gap) + gap)
    for i, image in enumerate(x.clamp(0, 1)):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        page[:, top : top + height, left : left + width] = image
    return page


def samples(x: Tensor, columns: int | None = None) -> "Figure":
    """A sheet of images (N, C, H, W)."""
    return _page(sheet(x.detach().cpu(), columns))


def reconstructions(x: Tensor, reconstructed: Tensor, columns: int = 8) -> "Figure":
    """Originals above their reconstructions, in pairs of rows; both (N, C, H, W)."""
    columns = min(columns, len(x))
    pairs = []
    for start in range(0, len(x), columns):
        for images in (x, reconstructed):
            row = images[start : start + columns].detach().cpu()
            blank = row.new_ones(columns - len(row), *row.shape[1:])
            pairs.append(torch.cat([row, blank]))
    figure = _page(sheet(torch.cat(pairs), columns))
    figure.suptitle("original above, reconstruction below", fontsize=8, color=_GREY, y=0.995)
    return figure


def curves(metrics: Sequence[dict[str, Any]]) -> "Figure":
    """Training and validation ELBO, and validation rate and distortion, against the epoch."""
    if not metrics:
        raise InputError("there are no metrics to draw; train for at least one epoch")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    epochs = [m["epoch"] for m in metrics]
    marker = "o" if len(epochs) < 2 else ""
    left, right = figure.subplots(1, 2)
    objective = [-m["train_loss"] for m in metrics]
    left.plot(epochs, objective, marker=marker, color=_GREY, label="training objective")
    elbo = [m["valid_elbo"] for m in metrics]
    left.plot(epochs, elbo, marker=marker, color=_BLUE, label="validation ELBO")
    best = max(metrics, key=lambda m: m["valid_elbo"])
    left.plot(best["epoch"], best["valid_elbo"], "o", color=_BLUE, markersize=5)
    left.annotate(
        f"best {best['valid_elbo']:.2f}",
        (best["epoch"], best["valid_elbo"]),
        textcoords="offset points",
        xytext=(-4, -14),
        ha="right",
        fontsize=8,
        color=_BLUE,
    )
    # The first epochs are far below the rest and would flatten what matters.
    low = sorted(elbo)[len(elbo) // 10]
    high = max([*elbo, *objective[len(objective) // 10 :]])
    if high > low:
        left.set_ylim(low - 0.15 * (high - low), high + 0.1 * (high - low))
    left.set(xlabel="epoch", ylabel="nats per image")
    left.legend(frameon=False, fontsize=8, loc="lower right")

    rate = [m["valid_rate"] for m in metrics]
    distortion = [m["valid_distortion"] for m in metrics]
    right.plot(epochs, distortion, marker=marker, color=_ORANGE)
    right.set_ylabel("distortion, -E log p(x | z)", color=_ORANGE)
    right.set_xlabel("epoch")
    twin = right.twinx()
    twin.plot(epochs, rate, marker=marker, color=_BLUE)
    twin.set_ylabel("rate, KL(q || p)", color=_BLUE)
    for axes in (left, right, twin):
        axes.spines["top"].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def save(figure: "Figure", path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=dpi)


def _page(page: Tensor) -> "Figure":
    from matplotlib.figure import Figure

    height, width = page.shape[1:]
    inches = 6.0
    figure = Figure(figsize=(inches, inches * height / width))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.imshow(page.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()
    return figure
