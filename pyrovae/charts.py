"""Charts of numbers with Matplotlib; use them as `pyrovae.plots`.

Each draws on the ``ax`` it is given, or on a figure of its own, and returns the Axes. Colours can
be told apart by the colour-blind, and whatever a colour says is also said by a label, a line style
or a position.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae.errors import InputError
from pyrovae.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]
Source = Metrics | Run | str | os.PathLike[str]

PAPER, INK, GREY, LINE = "#ffffff", "#1b1f24", "#5b626c", "#d3d8de"
BLUE, ORANGE = "#2463a8", "#b8531a"
# After Paul Tol's muted scheme, which the colour-blind can tell apart.
LABELS = (
    "#332288",
    "#cc6677",
    "#117733",
    "#ddaa33",
    "#88ccee",
    "#882255",
    "#44aa99",
    "#999933",
    "#aa4499",
    "#777777",
)
_SIZE = 9.0  # points; a chart is as wide as a phone, so that its words can be read on one
_MARKERS = "osD^"


def curves(metrics: Source) -> "Figure":
    """Training and validation ELBO, and validation rate and distortion, against the epoch.

    Args:
        metrics: a run, its directory, or its metrics.
    """
    metrics = _metrics(metrics)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    elbo_curves(metrics, left)
    rate_curves(metrics, right)
    return figure


def elbo_curves(metrics: Source, ax: "Axes | None" = None) -> "Axes":
    """Training objective and validation ELBO against the epoch, in nats per image."""
    metrics = _metrics(metrics)
    ax = _axes(ax)
    epochs, marker = _epochs(metrics)
    objective = [-m["train_loss"] for m in metrics]
    elbo = [m["valid_elbo"] for m in metrics]
    ax.plot(epochs, objective, marker + "--", color=GREY, lw=1.2, label="training objective")
    ax.plot(epochs, elbo, marker + "-", color=BLUE, label="validation ELBO")
    best = max(metrics, key=lambda m: m["valid_elbo"])
    told = f"best, {_number(best['valid_elbo'], ',.2f')}"  # in the legend, clear of the curves
    ax.plot(best["epoch"], best["valid_elbo"], "o", color=BLUE, markersize=5, label=told)
    # The first epochs are far below the rest and would flatten what matters.
    low = sorted(elbo)[len(elbo) // 10]
    high = max([*elbo, *objective[len(objective) // 10 :]])
    if high > low:
        ax.set_ylim(low - 0.15 * (high - low), high + 0.1 * (high - low))
    ax.legend(frameon=False, fontsize=_SIZE, labelcolor=INK, loc="lower right")
    return _dress(ax, "epoch", "nats per image")


def error_curves(metrics: Source, ax: "Axes | None" = None) -> "Axes":
    """An autoencoder's squared error against the epoch, summed over an image; lower is better."""
    metrics = _metrics(metrics)
    ax = _axes(ax)
    epochs, marker = _epochs(metrics)
    train, valid = ([abs(m[name]) for m in metrics] for name in ("train_loss", "valid_elbo"))
    ax.plot(epochs, train, marker + "--", color=GREY, lw=1.2, label="training")
    ax.plot(epochs, valid, marker + "-", color=BLUE, label="validation")
    at = min(range(len(valid)), key=valid.__getitem__)
    told = f"best, {_number(valid[at], ',.2f')}"
    ax.plot(epochs[at], valid[at], "o", color=BLUE, markersize=5, label=told)
    ax.legend(frameon=False, fontsize=_SIZE, labelcolor=INK, loc="upper right")
    return _dress(ax, "epoch", "squared error of an image")


def rate_curves(metrics: Source, ax: "Axes | None" = None) -> "Axes":
    """Rate and distortion of the validation split against the epoch, each with its own scale."""
    metrics = _metrics(metrics)
    ax = _axes(ax)
    epochs, marker = _epochs(metrics)
    twin = ax.twinx()
    ax.plot(epochs, [m["valid_distortion"] for m in metrics], marker + "-", color=ORANGE)
    twin.plot(epochs, [m["valid_rate"] for m in metrics], marker + "--", color=BLUE)
    _dress(ax, "epoch", "distortion (solid), nats per image")
    _dress(twin, "", "rate (dashed), nats per image")
    twin.grid(False)
    for axes, colour, side in ((ax, ORANGE, "left"), (twin, BLUE, "right")):
        axes.yaxis.label.set_color(colour)
        axes.tick_params(axis="y", labelcolor=colour)
        axes.spines[side].set(color=colour, visible=True)
    return ax


def rate_distortion(runs: Mapping[str, Source] | Sequence[Run], ax: "Axes | None" = None) -> "Axes":
    """The path of runs through the plane of distortion and rate, epoch by epoch.

    Along a grey line the ELBO, -(rate + distortion), is constant. The marker is the best epoch.

    Source: Alemi et al., Fixing a Broken ELBO (2018), https://arxiv.org/abs/1711.00464

    Args:
        runs: run directories, or metrics by name.
        ax: where to draw.
    """
    named = runs if isinstance(runs, Mapping) else {str(run.path): run for run in runs}
    if not named:
        raise InputError("there is no run to draw; give at least one")
    ax = _axes(ax)
    heads = []
    for i, metrics in enumerate(map(_metrics, named.values())):
        colour, marker = LABELS[i % len(LABELS)], _MARKERS[i % len(_MARKERS)]
        path = [(m["valid_distortion"], m["valid_rate"]) for m in metrics]
        best = max(metrics, key=lambda m: m["valid_elbo"])
        ax.plot(*zip(*path, strict=True), "-", color=colour, lw=1, marker=".", markersize=3)
        head = (best["valid_distortion"], best["valid_rate"])
        heads += ax.plot(*head, marker, color=colour, markersize=6, linestyle="none")
    _iso_elbo(ax)
    legend = ax.legend(heads, [str(i) for i in range(len(heads))], frameon=False, fontsize=_SIZE)
    for text, name in zip(legend.get_texts(), named, strict=True):
        text.set(text=name, color=INK, parse_math=False)  # a name may hold $ or start with _
    return _dress(ax, "distortion, nats per image", "rate, nats per image")


def _iso_elbo(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.margins(0.12)
    ax.autoscale_view()
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for total in MaxNLocator(5).tick_values(left + bottom, right + top):
        ax.plot([left, right], [total - left, total - right], "-", color=LINE, lw=0.8, zorder=0)
        x = min(right, total - bottom)
        if left < x and bottom <= total - x < top:
            ax.annotate(
                f"ELBO {_number(-total, 'g')} ",
                (x, total - x),
                fontsize=7,
                color=GREY,
                ha="right",
                va="bottom",
            )
    ax.set(xlim=(left, right), ylim=(bottom, top))


def bound_against_k(curve: Sequence[tuple[int, float, float]], ax: "Axes | None" = None) -> "Axes":
    """The importance-weighted bound against the number of particles, with its error bars.

    Args:
        curve: (K, bound, standard error) in nats per image, as of `Evaluation.curve`.
        ax: where to draw.
    """
    if not curve:
        raise InputError("there is no bound to draw; evaluate with --num-particles 1 or more")
    ax = _axes(ax)
    k, bound, error = (list(column) for column in zip(*curve, strict=True))
    known = [0.0 if math.isnan(e) else e for e in error]
    ax.errorbar(k, bound, known, fmt="o-", color=BLUE, ecolor=GREY, capsize=3, markersize=4)
    ax.set_xscale("log")
    ax.set_xticks(k, [f"{value:,}" for value in k])
    ax.set_xticks([], minor=True)
    ax.annotate(
        _number(bound[-1], ",.2f"),
        (k[-1], bound[-1]),
        textcoords="offset points",
        xytext=(7, 0),
        va="center",
        fontsize=_SIZE,
        color=BLUE,
    )
    ax.set_xlim(k[0] / 1.5, k[-1] * 1.5 * (k[-1] / k[0]) ** 0.18)  # room for the number
    ax.margins(y=0.15)
    return _dress(ax, "particles K", "bound, nats per image")


def pareto_k(k: Tensor, ax: "Axes | None" = None) -> "Axes":
    """Histogram of the images' Pareto k, (N,); those above 0.7 are hatched. NaN is left out.

    The first and the last bar also count what lies beyond -0.5 and 2.
    """
    known = k[~torch.isnan(k)].double()
    if not len(known):
        raise InputError("no Pareto k was estimated; evaluate with --num-particles 25 or more")
    ax = _axes(ax)
    # A bar is (a, b] in tenths, so that a k of 0.7 stands with the good ones.
    tenths = (known * 10).ceil().long().clamp(-4, 20)
    first, last = min(-1, int(tenths.min())), max(10, int(tenths.max()))
    counts = torch.bincount(tenths - first, minlength=last - first + 1).tolist()
    left = [(first + i - 1) / 10 for i in range(len(counts))]
    bars = ax.bar(left, counts, width=0.1, align="edge", color=BLUE, lw=0.5, edgecolor=LINE)
    for bar in bars[7 - first + 1 :]:
        bar.set(facecolor=ORANGE, hatch="///")
    ax.axvline(0.7, color=INK, lw=1, ls="--")
    ax.annotate(
        "0.7",
        (0.7, 1),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        xytext=(4, -10),
        fontsize=_SIZE,
        color=INK,
    )
    ax.set(xlim=((first - 1) / 10, last / 10), ylim=(0, 1.18 * max(counts)))
    ticks = [t / 10 for t in range(-5, 21, 5) if first - 1 <= t <= last]
    beyond = {-0.5: float(known.min()) <= -0.5, 2.0: float(known.max()) > 2}
    signs = {-0.5: "≤ ", 2.0: "≥ "}
    names = [signs[t] * beyond[t] + _number(t, "g") if t in signs else f"{t:g}" for t in ticks]
    ax.set_xticks(ticks, names)
    return _dress(ax, "Pareto k", "images")


def kl_per_dim(kl: Tensor, ax: "Axes | None" = None) -> "Axes":
    """KL(q(z_d | x) || p(z_d)) of each latent dimension, (D,), in nats per image; largest first."""
    ax = _axes(ax)
    _bars(ax, kl, torch.ones_like(kl, dtype=torch.bool))
    ax.set_ylim(bottom=0)
    return _dress(ax, "latent dimension, most used first", "KL, nats per image")


def activity(variance: Tensor, threshold: float = 0.01, ax: "Axes | None" = None) -> "Axes":
    """Var_x(E_q[z_d | x]) of each latent dimension, (D,), with the threshold of an active unit."""
    from matplotlib.ticker import NullLocator

    ax = _axes(ax)
    floor = threshold / 100
    _bars(ax, variance.clamp(min=floor), variance >= threshold, floor)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.axhline(threshold, color=INK, lw=1, ls="--")
    return _dress(ax, "latent dimension, most active first", "variance of E[z | x]")


def _bars(ax: "Axes", values: Tensor, full: Tensor, bottom: float = 0.0) -> None:
    order = values.argsort(descending=True, stable=True)
    heights = (values[order].double() - bottom).tolist()
    colours = [BLUE if used else GREY for used in full[order].tolist()]
    ax.bar(range(1, len(order) + 1), heights, bottom=bottom, color=colours, width=0.8)
    if len(order) <= 12:
        ax.set_xticks(range(1, len(order) + 1), [f"z{d}" for d in order.tolist()])


def latents(
    means: Tensor, labels: Tensor | None = None, ax: "Axes | None" = None, most: int = 1500
) -> "Axes":
    """Images in the plane of the first two principal components of E_q[z | x].

    Two dimensions are shown as they are; one is spread upwards so that points do not overlap.

    Args:
        means: (N, D).
        labels: (N,) integers, for the colours; each label stands at the median of its images.
        ax: where to draw.
        most: points to draw; the first ones.
    """
    ax = _axes(ax, (4.4, 4.2))
    points, xlabel, ylabel = plane(means)
    points, labels = points[:most], None if labels is None else labels[:most]
    style: dict[str, Any] = {"markersize": 3.2, "alpha": 0.75, "markeredgewidth": 0}
    if labels is None:
        ax.plot(*points.T.tolist(), "o", color=BLUE, **style)
    else:
        kinds = labels.unique().tolist()
        for i, label in enumerate(kinds):
            mine = points[labels == label]
            marker = _MARKERS[i // len(LABELS) % len(_MARKERS)]
            ax.plot(*mine.T.tolist(), marker, color=LABELS[i % len(LABELS)], **style)
        middles = [points[labels == label].median(0).values for label in kinds]
        named = _apart(torch.stack(middles), points) if len(kinds) <= 20 else torch.empty(0, 2)
        for i, (x, y) in enumerate(named.tolist()):
            box = {
                "boxstyle": "round,pad=0.2",
                "facecolor": PAPER,
                "edgecolor": LABELS[i % len(LABELS)],
            }
            words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": _SIZE}
            ax.annotate(f"{kinds[i]}", (x, y), color=INK, bbox=box, **words)
    if means.shape[1] > 2:
        ax.set_aspect("equal", "datalim")
    _dress(ax, xlabel, ylabel)
    if means.shape[1] == 1:
        ax.set_yticks([])
    return ax


def _apart(places: Tensor, points: Tensor) -> Tensor:
    """Places (L, 2) of labels, from the lowest up each moved above those that it would hide."""
    wide, tall = (0.06 * (points.amax(0) - points.amin(0))).tolist()
    places = places.clone()
    done: list[tuple[float, float]] = []
    for i in places[:, 1].argsort().tolist():
        x, y = places[i].tolist()
        for x_done, y_done in sorted(done, key=lambda place: place[1]):
            if abs(x - x_done) < wide and abs(y - y_done) < tall:
                y = y_done + tall
        done.append((x, y))
        places[i, 1] = y
    return places


def plane(means: Tensor) -> tuple[Tensor, str, str]:
    """Points (N, 2) of q means (N, D), and the names of the two axes."""
    means = means.double()
    if means.shape[1] == 1:
        spread = torch.arange(len(means)) * ((5**0.5 - 1) / 2) % 1.0
        return torch.stack([means[:, 0], spread], 1), "z0", "spread, without meaning"
    if means.shape[1] == 2:
        return means, "z0", "z1"
    centred = means - means.mean(0)
    _, s, directions = torch.linalg.svd(centred, full_matrices=False)
    if len(s) < 2:
        return torch.cat([centred[:, :1], 0 * centred[:, :1]], 1), "z0", ""
    # A singular vector's sign is arbitrary: make its largest element positive.
    axes = directions[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    share = (s**2 / (s**2).sum().clamp(min=1e-300))[:2].tolist()
    first, second = (f"component {i + 1} ({v:.0%} of the variance)" for i, v in enumerate(share))
    return centred @ axes.T, first, second


def _metrics(source: Source) -> Metrics:
    if isinstance(source, (str, os.PathLike)):
        source = Run(source)
    metrics = source.read_metrics() if isinstance(source, Run) else source
    metrics = [m for m in metrics if "valid_elbo" in m]
    if not metrics:
        raise InputError("there are no metrics to draw; train for at least one epoch")
    return metrics


def _number(value: float, form: str) -> str:
    return format(value, form).replace("-", "\N{MINUS SIGN}")


def _epochs(metrics: Metrics) -> tuple[list[int], str]:
    return [m["epoch"] for m in metrics], "o" if len(metrics) < 2 else ""


def _axes(ax: "Axes | None", size: tuple[float, float] = (4.4, 3.0)) -> "Axes":
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def _dress(ax: "Axes", xlabel: str, ylabel: str) -> "Axes":
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel(xlabel, fontsize=_SIZE, color=INK)
    ax.set_ylabel(ylabel, fontsize=_SIZE, color=INK)
    ax.tick_params(labelsize=_SIZE - 1, colors=GREY, labelcolor=GREY)
    ax.grid(axis="y", color=LINE, lw=0.6)
    ax.set_axisbelow(True)
    for spine in ax.spines.values():
        spine.set_color(GREY)
    ax.spines[["top", "right"]].set_visible(False)
    if xlabel == "epoch":
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return ax
