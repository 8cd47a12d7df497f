"""Train the rows of the published tables, evaluate each once, and rebuild their pages.

    python scripts/reproduce.py --list
    python scripts/reproduce.py --table iwae --row vae-k1 --seeds 0 1 2 --data-root DATA
    python scripts/reproduce.py --table likelihoods --row 'mnist-*' --data-root DATA

A row is ``pyrovae train`` with the settings of scripts/reproduction/rows.py, in a folder of its own
below --runs: stopped and started again it goes on where it was, and a finished run is taken as it
is. The weights of the best validation ELBO are evaluated on the whole test split, once. Results go
to benchmarks/reproduction/TABLE/ROW.json, and from there to pages and to the README's tables
between their markers. --smoke runs rows in small and keeps nothing.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from pyrovae import runtime

runtime.settle()  # before torch is loaded

from reproduction import smoke
from reproduction.rows import TABLES
from reproduction.running import Place
from reproduction.work import carry_out, choose

from pyrovae.checks import did_you_mean
from pyrovae.errors import InputError, NonFiniteLossError
from pyrovae.settings import LARGEST_SEED

ROOT = Path(__file__).parents[1]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--table", metavar="NAME", help=f"{', '.join(TABLES)} (default: all)")
    parser.add_argument(
        "--row", nargs="+", metavar="NAME", help="default: all that suit the device"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="of training (default: 0)"
    )
    parser.add_argument("--list", action="store_true", help="list the rows, and do nothing")
    parser.add_argument("--pages", action="store_true", help="rebuild the pages, and train nothing")
    parser.add_argument("--smoke", action="store_true", help="in small: do the rows run at all?")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduction"), metavar="DIR")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the data")
    parser.add_argument("--download", action="store_true", help="fetch data that are missing")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args(argv)
    for seed in args.seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise InputError(f"--seeds expects numbers from 0 to {LARGEST_SEED}, got {seed}")
    if args.table is not None and args.table not in TABLES:
        near = did_you_mean(args.table, TABLES)
        raise InputError(f"there is no table {args.table!r}{near}; choose from {', '.join(TABLES)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Do what was asked; returns the exit status: 2 for a mistake, told in one line."""
    try:
        return reproduce(arguments(argv))
    except (InputError, OSError) as error:
        return fail(error, 2)
    except NonFiniteLossError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def fail(message: object, status: int) -> int:
    print(f"reproduce.py: {' '.join(str(message).split())}", file=sys.stderr)
    return status


def reproduce(args: argparse.Namespace) -> int:
    if args.list:
        for row in choose(TABLES, args.table, args.row, strong=True):
            theirs = f"{row.published.nats:.2f}" if row.published else "-"
            where = "GPU" if row.gpu else "CPU"
            print(f"{row.table:<12} {row.name:<41} {where}  {theirs:>7}  {row.title}")
        return 0
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            place = Place(here / "runs", here / "results", here / "figures", None, "cpu", True)
            smoke.bring_data(here)
            tables = smoke.tables(here)
            return carry_out(choose(tables, args.table, args.row, True), args.seeds, place, tables)
    pages = ROOT / "benchmarks"
    place = Place(
        args.runs,
        pages / "reproduction",
        pages / "figures",
        ROOT / "README.md",
        args.device,
        args.quiet,
        args.data_root,
        args.download,
    )
    rows = [] if args.pages else choose(TABLES, args.table, args.row, place.has_gpu())
    return carry_out(rows, args.seeds, place, TABLES)


if __name__ == "__main__":
    sys.exit(main())
