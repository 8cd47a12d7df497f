"""Markdown made of the result files, and nothing else: no number is written by hand."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from pyrovae.errors import InputError
from pyrovae.likelihoods import REGISTRY
from pyrovae.runs import atomic_path, duration
from reproduction.rows import EPOCHS, PICTURES, PROTOCOLS, Row
from reproduction.running import Place, command

_HEAD = (
    "row",
    "ours, -log p(x)",
    "published",
    "difference",
    "K",
    "seed",
    "epochs",
    "training",
    "command",
)
_TITLES = {
    "iwae": "Importance-weighted autoencoders, dynamic MNIST",
    "static": "Importance-weighted autoencoders, static MNIST",
    "exemplar": "The Exemplar VAE's table, dynamic MNIST and Fashion-MNIST",
}

Content = dict[str, Any]
Tables = dict[str, dict[str, Row]]
Groups = dict[str, list[tuple[Row, Content]]]


def results(folder: Path, rows: dict[str, Row]) -> dict[str, Content]:
    """The result files of a table by row, of rows whose settings are still those of the file."""
    found = {}
    for row in rows.values():
        path = folder / row.table / f"{row.name}.json"
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                same = content["settings"] == row.settings
                if same and content["num_particles"] == row.particles:
                    found[row.name] = content
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"cannot read {path}: {error}; restore it, or remove it and run the row again"
                ) from None
    return found


def write(place: Place, tables: Tables) -> None:
    """Rebuild the pages of the results, and the tables between the markers of the README."""
    folder, readme = place.results, place.readme
    found = {table: results(folder, rows) for table, rows in tables.items()}
    parts = [_LEAD]
    for table, title in _TITLES.items():
        parts += [f"## {title}", PROTOCOLS[table], _table(tables[table], found[table])]
    parts += ["## What the rows train", _commands(tables)]
    _save(folder / "README.md", "\n\n".join(parts) + "\n")
    groups = by_data(tables["likelihoods"], found["likelihoods"])
    planned = _planned_by_data(tables["likelihoods"])
    _save(folder / "likelihoods.md", _likelihoods(groups, planned, place.figures))
    if readme is not None:
        text = readme.read_text(encoding="utf-8")
        text = _between(text, "published tables", _short(tables, found), readme)
        _save(readme, _between(text, "likelihoods", _matrix(groups, planned), readme))


_LEAD = """# Published tables

Written by `python scripts/reproduce.py`, from the result files beside this page; do not edit it.
Numbers are minus log p(x) in nats per image, lower is better, estimated on the whole test split
with K draws of z per image. ± is the standard error over images, the mean over seeds; [±] the
standard deviation over seeds. The published ± is over the paper's runs. The weights were chosen by
the validation ELBO; test images were used once, for the number. Time is that of training, on the
machine named beside it. VAE, k: the ELBO of k draws; IWAE, k: the importance-weighted bound of k
draws. HVAE and ConvHVAE have two layers of latents, the latter with convolutions; VampPrior (500)
is a mixture of the posteriors at 500 learned inputs. To a command add `--data-root DATA`, the
folder of the data, and `--download` the first time."""


def _table(rows: dict[str, Row], found: dict[str, Content]) -> str:
    return markdown(_HEAD, [_cells(row, found.get(name)) for name, row in rows.items()])


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row, content: Content | None) -> tuple[str, ...]:
    published, theirs = row.published, ""
    if published is not None:
        theirs = f"{published.nats:.2f}" + (f" ± {published.error:.2f}" if published.error else "")
    how = f"`python scripts/reproduce.py --table {row.table} --row {row.name}`"
    if content is None:
        why = "not measured: needs a GPU" if row.gpu else "not run"
        return (row.title, why, theirs, "", "", "", _planned(row), "", how)
    seeds = list(content["seeds"].values())
    nats = -statistics.fmean(s["log_likelihood"] for s in seeds)
    ours = f"{nats:.2f} ± {statistics.fmean(s['log_likelihood_se'] for s in seeds):.2f}"
    if len(seeds) > 1:
        ours += f" [± {statistics.stdev(s['log_likelihood'] for s in seeds):.2f}]"
    gap = "" if published is None else f"{nats - published.nats:+.2f}"
    return (
        row.title,
        ours,
        theirs,
        gap.replace("-", "−"),
        str(content["num_particles"]),
        ", ".join(content["seeds"]),
        _range([s["epochs"] for s in seeds]),
        f"{_time([s['training_seconds'] for s in seeds])}, {_machine(seeds)}",
        how,
    )


def _planned(row: Row) -> str:
    return f"{row.settings.get('epochs', 3280):,}"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _time(seconds: list[float]) -> str:
    return duration(statistics.fmean(seconds))


def _machine(seeds: list[Content]) -> str:
    names = set()
    for s in seeds:
        threads = f"{s['threads']} thread" + ("s" if s["threads"] > 1 else "")
        names.add(s["device_name"] if s["device"] != "cpu" else f"{threads} of {s['device_name']}")
    return "; ".join(sorted(names))


def _commands(tables: Tables) -> str:
    lines = []
    for table in _TITLES:
        lines += [f"- {table} / {row.name}: `{command(row)}`" for row in tables[table].values()]
    lines.append(
        "\nThis is the training alone. Give each a folder of its own, `--out RUN`, and a `--seed`; "
        "then `pyrovae evaluate RUN --num-particles 5000`."
    )
    return "\n".join(lines)


def _short(tables: Tables, found: dict[str, dict[str, Content]]) -> str:
    """The rows that have been run, for the project's README."""
    parts, missing = [], 0
    for table, title in _TITLES.items():
        run = {name: row for name, row in tables[table].items() if name in found[table]}
        missing += len(tables[table]) - len(run)
        if run:
            parts += [f"**{title}**", _table(run, found[table])]
    if missing:
        said = "All rows" if not parts else f"{missing} more rows"
        parts.append(f"{said} are ready to run and not measured yet; see the page.")
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------- likelihoods

_LIKELIHOOD_HEAD = (
    "likelihood",
    "kind",
    "bits/dim",
    "log p(x), as trained",
    "rate",
    "active units",
    "K",
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


def _planned_by_data(rows: dict[str, Row]) -> dict[str, list[Row]]:
    return {data: [r for r in rows.values() if r.name.split("-")[0] == data] for data in PICTURES}


def _likelihoods(groups: Groups, planned: dict[str, list[Row]], figures: Path) -> str:
    parts = [_LIKELIHOOD_LEAD.format(protocol=PROTOCOLS["likelihoods"])]
    for data, rows in groups.items():
        parts.append(f"## {PICTURES[data][0][0].upper()}{PICTURES[data][0][1:]}")
        if rows:
            parts.append(markdown(_LIKELIHOOD_HEAD, [_likelihood_cells(*pair) for pair in rows]))
        run = {row.name for row, _ in rows}
        if missing := [f"`{row.title}`" for row in planned[data] if row.name not in run]:
            parts.append(
                f"Not run: {', '.join(missing)} (`python scripts/reproduce.py --table likelihoods "
                f"--row '{data}-*'`, {EPOCHS.get(data, EPOCHS['likelihoods'])} epochs each)."
            )
        sheet = figures / f"likelihoods-{data}.png"
        if rows and sheet.is_file():
            said = "Samples and reconstructions, a row for each likelihood"
            parts.append(f"![{said}](../figures/{sheet.name})")
            parts.append("*Left, E[x | z] for z from the prior; right, for z from q(z | x).*")
    return "\n\n".join(parts) + "\n"


_LIKELIHOOD_LEAD = """# Which likelihood should I use for my images?

Written by `python scripts/reproduce.py --table likelihoods`, from the result files beside this
page; do not edit it. {protocol}

Bits per dimension are -log2 P(x) of the levels per number of x, lower is better: one scale for all.
A *mass* gives P(x) itself. A *density* of dequantised x bounds it, log P(x) ≥ E log p(y) - dims
log 256, so its number, marked ≤, is an upper bound of what the model needs. ± is the standard error
over test images. Weights were chosen by the validation ELBO; test images were used once."""


def _likelihood_cells(row: Row, content: Content) -> tuple[str, ...]:
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
        ", ".join(content["seeds"]),
        f"{_range([s['best_epoch'] for s in seeds])} of {_range([s['epochs'] for s in seeds])}",
        f"{_time([s['training_seconds'] for s in seeds])}, {_machine(seeds)}",
    )


def _matrix(groups: Groups, planned: dict[str, list[Row]]) -> str:
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
            said = _likelihood_cells(row, content)[2]
            sure = bold and rivals.count(kind) > 1 and kind not in open_kinds
            cells[row.title][data] = f"**{said}**" if sure else said
        epochs = _range([s["epochs"] for _, c in pairs for s in c["seeds"].values()])
        head.append(f"{PICTURES[data][0]}; {epochs} epochs, K = {pairs[0][1]['num_particles']}")
    names = sorted(kinds, key=lambda name: kinds[name], reverse=True)  # masses, then densities
    rows = [
        (f"`{name}`", kinds[name], *(cells[name].get(data, "-") for data in run)) for name in names
    ]
    return markdown(tuple(head), rows)


def _kind(row: Row) -> str:
    return str(REGISTRY[row.settings["likelihood"]].kind)


def _between(text: str, name: str, content: str, path: Path) -> str:
    start, end = f"<!-- {name}: written by scripts/reproduce.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise InputError(f"{path} must hold {start} and {end} once each; put them back")
    return pattern.sub(lambda _: f"{start}\n\n{content}\n\n{end}", text)


def _save(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
