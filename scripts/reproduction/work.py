"""Which rows, and all of them one after another."""

from collections.abc import Sequence
from fnmatch import fnmatch

from pyrovae.checks import did_you_mean
from pyrovae.commands.output import say
from pyrovae.errors import InputError
from reproduction import likelihood_page, pages, pictures
from reproduction.rows import Row
from reproduction.running import Place, StoppedError, keep, run, trained


def choose(
    tables: pages.Tables, table: str | None, patterns: Sequence[str] | None, strong: bool
) -> list[Row]:
    """The rows that were asked for by name, or all that suit the machine, in order."""
    rows = [row for name in ([table] if table else tables) for row in tables[name].values()]
    if not patterns:
        return [row for row in rows if strong or not row.gpu]
    names = [row.name for row in rows]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            near = did_you_mean(pattern, names)
            raise InputError(f"there is no row {pattern!r}{near}; see --list")
    return [row for row in rows if any(fnmatch(row.name, pattern) for pattern in patterns)]


def carry_out(rows: Sequence[Row], seeds: Sequence[int], place: Place, tables: pages.Tables) -> int:
    """Run the rows, keeping each result and its pages at once; returns the exit status."""
    for row in rows:
        for seed in seeds:
            try:
                result = run(row, seed, place)
            except StoppedError as stopped:
                if stopped.status != 2:  # after which a line of its own has said all
                    say(f"stopped at {row.table} / {row.name}, seed {seed}", place.quiet)
                return stopped.status
            path = keep(row, seed, result, place)
            nats, se = -result["log_likelihood"], result["log_likelihood_se"]
            error = "" if se is None else f" ± {se:.2f}"
            print(f"{row.table} / {row.name}, seed {seed}: {nats:.2f}{error} nats, in {path.name}")
            pages.write(place, tables)
    _draw(rows, place, tables)
    pages.write(place, tables)
    return 0


def _draw(rows: Sequence[Row], place: Place, tables: pages.Tables) -> None:
    """Draw anew the sheet of each data set whose rows were run: of all runs that are there."""
    found = pages.results(place.results, tables["likelihoods"])
    run_now = {row.name for row in rows if row.table == "likelihoods"}
    for data, pairs in likelihood_page.by_data(tables["likelihoods"], found).items():
        # A result may have come without its run, from whoever trained it.
        done = [
            (row, min(seeds))
            for row, content in pairs
            if (seeds := [s for s in map(int, content["seeds"]) if trained(row, s, place)])
        ]
        if any(row.name in run_now for row, _ in done):
            pictures.draw(done, place, place.figures / f"likelihoods-{data}.png")
