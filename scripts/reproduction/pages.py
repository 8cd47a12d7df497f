"""Markdown made of the result files, and nothing else: no number is written by hand."""

import json
import re
import statistics
from pathlib import Path

from pyrovae.errors import InputError
from pyrovae.runs import atomic_path
from reproduction import likelihood_page
from reproduction.cells import Content, extent, heavy, machines, markdown, training_time
from reproduction.rows import PROTOCOLS, Row
from reproduction.running import Place, command

_HEAD = (
    "row",
    "ours, -log p(x)",
    "published",
    "difference",
    "K",
    "seed",
    "epochs",
    "Pareto k > 0.7",
    "training",
    "command",
)
_TITLES = {
    "iwae": "Importance-weighted autoencoders, dynamic MNIST",
    "static": "Importance-weighted autoencoders, static MNIST",
    "exemplar": "The Exemplar VAE's table, dynamic MNIST and Fashion-MNIST",
}

Tables = dict[str, dict[str, Row]]


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
    groups = likelihood_page.by_data(tables["likelihoods"], found["likelihoods"])
    planned = likelihood_page.planned_by_data(tables["likelihoods"])
    _save(folder / "likelihoods.md", likelihood_page.page(groups, planned, place.figures))
    if readme is not None:
        text = readme.read_text(encoding="utf-8")
        text = _between(text, "published tables", _short(tables, found), readme)
        _save(
            readme, _between(text, "likelihoods", likelihood_page.matrix(groups, planned), readme)
        )


_LEAD = """# Published tables

Written by `python scripts/reproduce.py`, from the result files beside this page; do not edit it.
Numbers are minus log p(x) in nats per image, lower is better, estimated on the whole test split
with K draws of z per image. ± is the standard error over images, the mean over seeds; [±] the
standard deviation over seeds. The published ± is over the paper's runs. The weights were chosen by
the validation ELBO and then evaluated on test once; rows that had other settings before, and what
those gave, are in [earlier.md](earlier.md). Pareto k > 0.7 is the share of test images whose
weights have so heavy a tail that K draws may not suffice; their log p(x) is then too low, and
-log p(x) too high. The papers use the same estimator; how much it can be is shown for one model in
[evaluation.md](../evaluation.md). Time is that of training, on the machine named beside it, with
whatever else it did meanwhile and with pauses; that of the evaluation is in the files
(`evaluation_seconds`). VAE, k: the ELBO of k draws; IWAE, k: the importance-weighted bound of k
draws. HVAE and ConvHVAE have two layers of latents, the latter with convolutions; VampPrior (500)
is a mixture of the posteriors at 500 learned inputs. To a command add `--data-root DATA`, the
folder of the data, and `--download` the first time."""


def _table(rows: dict[str, Row], found: dict[str, Content]) -> str:
    return markdown(_HEAD, [_cells(row, found.get(name)) for name, row in rows.items()])


def _cells(row: Row, content: Content | None) -> tuple[str, ...]:
    published, theirs = row.published, ""
    if published is not None:
        theirs = f"{published.nats:.2f}" + (f" ± {published.error:.2f}" if published.error else "")
    how = f"`python scripts/reproduce.py --table {row.table} --row {row.name}`"
    if content is None:
        why = "not measured: needs a GPU" if row.gpu else "not run"
        return (row.title, why, theirs, "", "", "", _planned(row), "", "", how)
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
        extent([s["epochs"] for s in seeds]),
        heavy(seeds),
        f"{training_time([s['training_seconds'] for s in seeds])}, {machines(seeds)}",
        how,
    )


def _planned(row: Row) -> str:
    return f"{row.settings.get('epochs', 3280):,}"


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


def _between(text: str, name: str, content: str, path: Path) -> str:
    start, end = f"<!-- {name}: written by scripts/reproduce.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise InputError(f"{path} must hold {start} and {end} once each; put them back")
    return pattern.sub(lambda _: f"{start}\n\n{content}\n\n{end}", text)


def _save(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
