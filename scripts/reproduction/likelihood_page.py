"""The page and the table that compare likelihoods, made of their result files."""

import math
import statistics
from pathlib import Path

from pyrovae.likelihoods import REGISTRY
from reproduction.cells import Content, extent, heavy, machines, markdown, training_time
from reproduction.rows import EPOCHS, PICTURES, PROTOCOLS, Row

Groups = dict[str, list[tuple[Row, Content]]]


_HEAD = (
    "likelihood",
    "kind",
    "bits/dim",
    "log p(x), as trained",
    "rate",
    "active units",
    "K",
    "Pareto k > 0.7",
    "seed",
    "best epoch",
    "training",
)


def by_data(rows: dict[str, Row], found: dict[str, Content]) -> Groups:
    """The rows of each data set that have been run, best first."""
    groups: Groups = {data: [] for data in PICTURES}
    for name, content in found.items():
        groups[name.split("-")[0]].append((rows[name], content))
    return {data: sorted(rows, key=lambda pair: bits(pair[1])) for data, rows in groups.items()}


def bits(content: Content) -> float:
    """Bits per dimension, the mean over seeds."""
    return statistics.fmean(s["bits_per_dim"] for s in content["seeds"].values())


def planned_by_data(rows: dict[str, Row]) -> dict[str, list[Row]]:
    return {data: [r for r in rows.values() if r.name.split("-")[0] == data] for data in PICTURES}


def page(groups: Groups, planned: dict[str, list[Row]], figures: Path) -> str:
    runs = [s for rows in groups.values() for _, c in rows for s in c["seeds"].values()]
    photos = [s for _, c in groups["clothing64"] for s in c["seeds"].values()]
    gain = ""
    if photos:
        gains = [(s["log_likelihood"] - s["elbo"]) / (s["dims"] * math.log(2)) for s in photos]
        gain = (
            f" Of the photographs they are {min(gains):.3f} to {max(gains):.3f} bits better than\n"
            "the ELBO: differences of that size between their rows are not decided."
        )
    lead = _LEAD.format(
        protocol=PROTOCOLS["likelihoods"],
        photos=extent([s["steps"] for s in photos]) if photos else "no",
        unfinished=sum(s["best_epoch"] == s["epochs"] for s in runs),
        all=len(runs),
        gain=gain,
    )
    parts = [lead]
    for data, rows in groups.items():
        parts.append(f"## {PICTURES[data][0][0].upper()}{PICTURES[data][0][1:]}")
        if rows:
            parts.append(markdown(_HEAD, [_cells(*pair) for pair in rows]))
        run = {row.name for row, _ in rows}
        if missing := [f"`{row.title}`" for row in planned[data] if row.name not in run]:
            parts.append(
                f"Not run: {', '.join(missing)} (`python scripts/reproduce.py --table likelihoods "
                f"--row '{data}-*'`, {EPOCHS.get(data, EPOCHS['likelihoods'])} epochs each)."
            )
        sheet = figures / f"likelihoods-{data}.png"
        if rows and sheet.is_file():
            said = "Means, draws and reconstructions, a row for each likelihood"
            parts.append(f"![{said}](../figures/{sheet.name})")
            parts.append(_CAPTION)
    return "\n\n".join(parts) + "\n"


_CAPTION = (
    "*Left, means E[x | z] for z from the prior; in the middle, draws from p(x | z) for the same "
    "z; right, E[x | z] for z from q(z | x) of the test images. The bits are those of the draws' "
    "distribution: how far a draw is from the data shows what z leaves open.*"
)
_LEAD = """# Which likelihood should I use for my images?

Written by `python scripts/reproduce.py --table likelihoods`, from the result files beside this
page; do not edit it.

- Pixels of 0 and 1: `bernoulli`.
- Grey levels: a mass. `discretized-logistic-mixture` first; `categorical` asks for 256 outputs a
  pixel and more data; `discretized-logistic` is the quick one.
- Colours on levels: `discretized-logistic-mixture` with coupled channels
  (`--likelihood-args coupling=true`).
- Values that are real numbers and no levels: a density, `logit-normal` or `beta` within (0, 1),
  `laplace` or `student-t` beyond; `gaussian` with `scale=per-pixel` where its squared error fits.

Why, and for other kinds of data: [notebook 2](../../notebooks/02_choosing_a_likelihood.ipynb).
What it rests on is below: small networks and a short training (of the photographs, {photos} steps),
{unfinished} of {all} runs of it best at the last epoch, so not at their end.

{protocol}

Bits per dimension are -log2 P(x) of the levels per number of x, lower is better: one scale for all.
For a *mass*, log P(x) is estimated as it is. A *density* of dequantised x only bounds it,
log P(x) ≥ E log p(y) - dims log 256, and its number is marked ≤ for that. Both are averages of K
draws, which fall short of log p(x) where K is small and tails are heavy.{gain} ± is the standard
error over test images, the same ones for every row. Weights were chosen by the validation ELBO and
then evaluated on test once; what earlier settings gave is in [earlier.md](earlier.md)."""


def _cells(row: Row, content: Content) -> tuple[str, ...]:
    seeds = list(content["seeds"].values())
    first = seeds[0]
    nats = statistics.fmean(s["log_likelihood"] for s in seeds)
    se = statistics.fmean(s["log_likelihood_se"] for s in seeds)
    error = se / (first["dims"] * math.log(2))
    least = "≤ " if first["kind"] == "density" else ""
    units = "-" if first["active_units"] is None else f"{first['active_units']}"
    return (
        f"`{row.title}`",
        first["kind"],
        f"{least}{bits(content):.3f} ± {error:.3f}",
        f"{nats:,.1f} ± {se:.1f}",
        f"{statistics.fmean(s['rate'] for s in seeds):.1f}",
        units,
        str(content["num_particles"]),
        heavy(seeds),
        ", ".join(content["seeds"]),
        f"{extent([s['best_epoch'] for s in seeds])} of {extent([s['epochs'] for s in seeds])}",
        f"{training_time([s['training_seconds'] for s in seeds])}, {machines(seeds)}",
    )


def matrix(groups: Groups, planned: dict[str, list[Row]]) -> str:
    """Bits per dimension of every likelihood on every data set, for the project's README."""
    run = {data: pairs for data, pairs in groups.items() if pairs}
    if not run:
        return "The comparison is ready to run and not measured yet."
    head = ["likelihood", "kind"]
    cells: dict[str, dict[str, str]] = {}
    kinds: dict[str, str] = {}
    for data, pairs in run.items():
        done = {row.name for row, _ in pairs}
        rivals = [_kind(row) for row, _ in pairs]
        # The best of its kind is bold, where there are others and none is missing.
        open_kinds = {_kind(row) for row in planned[data] if row.name not in done}
        best: dict[str, str] = {}
        for row in planned[data]:
            cells.setdefault(row.title, {})[data] = "not run"
        for row, content in pairs:  # the best come first
            kind = kinds[row.title] = _kind(row)
            bold = best.setdefault(kind, row.title) == row.title
            said = _cells(row, content)[2]
            sure = bold and rivals.count(kind) > 1 and kind not in open_kinds
            cells[row.title][data] = f"**{said}**" if sure else said
        epochs = extent([s["epochs"] for _, c in pairs for s in c["seeds"].values()])
        head.append(f"{PICTURES[data][0]}; {epochs} epochs, K = {pairs[0][1]['num_particles']}")
    names = sorted(kinds, key=lambda name: kinds[name], reverse=True)  # masses, then densities
    rows = [
        (f"`{name}`", kinds[name], *(cells[name].get(data, "-") for data in run)) for name in names
    ]
    return markdown(tuple(head), rows)


def _kind(row: Row) -> str:
    return str(REGISTRY[row.settings["likelihood"]].kind)
