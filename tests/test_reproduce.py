"""scripts/reproduce.py: every row runs in small; runs are taken up, results kept and shown."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pyrovae import cli, runs
from pyrovae import config as cfg
from pyrovae.commands import train as training
from pyrovae.errors import InputError
from pyrovae.runs import Run

pytestmark = pytest.mark.usefixtures("soon_started")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The folder of the scripts on the path, as it is when one is run."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Any]:
    """All tables in small, and a place for their results; nothing is drawn."""
    monkeypatch.setattr(training, "_draw_pictures", lambda *_: None)
    smoke, running = module("reproduction.smoke"), module("reproduction.running")
    smoke.bring_data(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(markers(), encoding="utf-8")
    place = running.Place(
        tmp_path / "runs", tmp_path / "results", tmp_path / "figures", readme, "cpu", True
    )
    return smoke.tables(tmp_path), place


def markers() -> str:
    names = ("published tables", "likelihoods")
    return "# Mine\n\n" + "\n\n".join(
        f"<!-- {name}: written by scripts/reproduce.py -->\nold\n<!-- end of {name} -->\nkept"
        for name in names
    )


def carry_out(
    tables: dict[str, Any], place: Any, *names: str, seeds: tuple[int, ...] = (0,)
) -> Any:
    table, *rows = names
    work = module("reproduction.work")
    return work.carry_out(work.choose(tables, table, rows, True), seeds, place, tables)


def stored(place: Any, table: str, row: str) -> Any:
    return json.loads((place.results / table / f"{row}.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------ the rows


def all_rows() -> list[Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        tables = module("reproduction.rows").TABLES
    finally:
        sys.path.remove(str(ROOT / "scripts"))

    def row(table: str, name: str) -> Any:
        # By far the slowest; and those that differ from MNIST's by the name of the data alone.
        slow = "conv" in name or (table == "likelihoods" and name.startswith("fashion-"))
        marks = [pytest.mark.slow] if slow else []
        return pytest.param(table, name, id=f"{table}-{name}", marks=marks)

    return [row(table, name) for table, rows in tables.items() for name in rows]


@pytest.mark.parametrize(("table", "name"), all_rows())
def test_every_row_runs_in_small(table: str, name: str, small: Any) -> None:
    tables, place = small
    row = tables[table][name]
    result = module("reproduction.running").run(row, 0, place)
    assert result["num_images"] == 3
    assert result["num_particles"] == 2
    assert result["epochs"] == 1
    assert (result["bits_per_dim"] is None) == (table == "none")
    run = Run(place.runs / table / name / "seed0")
    assert (run.path / "checkpoints/best.pt").is_file()
    assert not (run.path / "evaluation.json").exists()  # test images are used once, below


@pytest.mark.parametrize(("table", "name"), all_rows())
def test_every_row_is_one_that_train_understands(table: str, name: str) -> None:
    rows, running = module("reproduction.rows"), module("reproduction.running")
    row = rows.TABLES[table][name]
    words = running.command(row).split()
    assert words[:2] == ["pyrovae", "train"]
    args = cli.parse([word.strip("'") for word in words[1:]])
    given = cfg.with_preset(cli.settings(args, cfg.TrainConfig))
    config = cfg.resolve(cfg.make(cfg.TrainConfig, given))
    place = running.Place(Path("r"), Path("b"), Path("f"), None, "auto", True, "DATA")
    asked = running.settings_of(row, 0, place)
    ours = cfg.resolve(cfg.make(cfg.TrainConfig, cfg.with_preset(asked)))
    assert running._plain(config) == running._plain(ours)
    assert (row.particles == 5000) == (table != "likelihoods")
    if table != "likelihoods":
        assert row.published.source.count("(20") == 1
        assert config.likelihood == "bernoulli"


def test_the_published_numbers() -> None:
    tables = module("reproduction.rows").TABLES
    numbers = {
        t: {n: row.published.nats for n, row in rows.items() if row.published}
        for t, rows in tables.items()
    }
    assert numbers["iwae"]["vae-k1"] == numbers["iwae"]["released-k1"] == 86.76
    assert numbers["iwae"]["2layer-k50"] == 82.90
    assert numbers["static"] == {"vae-k1": 88.71, "iwae-k5": 87.63}
    assert numbers["exemplar"]["vae-fashion-vamp"] == 227.35
    assert numbers["exemplar"]["convhvae-mnist-vamp"] == 79.67
    assert not numbers["likelihoods"]


def test_every_likelihood_of_levels_is_compared() -> None:
    rows = module("reproduction.rows")
    used = {options["likelihood"] for options in rows.LIKELIHOODS.values()}
    assert used == set(cfg.NAMES["likelihood"]) - {"bernoulli"}  # which is for binary data


# ------------------------------------------------------------------------------- runs and results


def test_results_and_pages(small: Any) -> None:
    tables, place = small
    assert carry_out(tables, place, "static", "vae-k1", seeds=(0, 3)) == 0
    content = stored(place, "static", "vae-k1")
    assert list(content["seeds"]) == ["0", "3"]
    one, two = content["seeds"].values()
    assert one["log_likelihood"] != two["log_likelihood"]
    for seed in (one, two):
        assert seed["kind"] == "mass"
        assert seed["threads"] >= 1
        assert seed["training_seconds"] > 0 and seed["evaluation_seconds"] > 0
        assert seed["packages"]["torch"]
        assert seed["trained_by"] == seed["evaluated_by"] == runs.commit()
    nats = -(one["log_likelihood"] + two["log_likelihood"]) / 2
    text = place.readme.read_text(encoding="utf-8")
    page = (place.results / "README.md").read_text(encoding="utf-8")
    for shown in (text, page):
        assert f"| {nats:.2f} ± " in shown
        assert f"{nats - 88.71:+.2f}" in shown
        assert "| 2 | 0, 3 | 1 |" in shown
        assert "`python scripts/reproduce.py --table static --row vae-k1`" in shown
    assert text.startswith("# Mine\n") and text.count("\nkept") == 2 and "\nold" not in text
    assert page.count("| not measured: needs a GPU |") == 14
    assert page.count("| not run |") == 8
    assert "not measured yet" in text


def test_a_finished_run_is_taken_as_it_is_and_evaluated_once(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, place = small
    carry_out(tables, place, "iwae", "vae-k1")
    before = stored(place, "iwae", "vae-k1")

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained or evaluated again")

    monkeypatch.setattr(training, "fit", never)
    monkeypatch.setattr("pyrovae.comparison.evaluate", never)
    carry_out(tables, place, "iwae", "vae-k1")
    assert stored(place, "iwae", "vae-k1") == before


def test_an_unfinished_run_is_taken_up(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, place = small
    row = tables["iwae"]["vae-k1"]
    longer = row._replace(settings={**row.settings, "epochs": 3})
    tables["iwae"]["vae-k1"] = longer
    running, fit = module("reproduction.running"), training.fit
    started = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        started.append(kwargs["resume"])
        stop = iter([False] * 3 + [True])  # in the second of two-step epochs
        return fit(*args, **{**kwargs, "should_stop": lambda: next(stop)})

    monkeypatch.setattr(training, "fit", interrupted)
    with pytest.raises(running.StoppedError):
        running.run(longer, 0, place)
    assert not (place.results).exists()
    monkeypatch.setattr(training, "fit", fit)
    resumed = running.run(longer, 0, place)
    straight = running.run(longer, 0, place._replace(runs=place.runs / "other"))
    assert started == [False]
    for name in ("log_likelihood", "valid_elbo", "epochs", "steps"):
        assert resumed[name] == straight[name], name


def test_a_run_killed_before_its_first_checkpoint_starts_again(small: Any) -> None:
    tables, place = small
    running = module("reproduction.running")
    running.run(tables["iwae"]["vae-k1"], 0, place)
    run = Run(place.runs / "iwae/vae-k1/seed0")
    for path in (run.last, run.best):
        path.unlink()
    assert running.run(tables["iwae"]["vae-k1"], 0, place)["epochs"] == 1


def test_a_run_with_other_settings_is_refused(small: Any) -> None:
    tables, place = small
    running = module("reproduction.running")
    row = tables["iwae"]["vae-k1"]
    running.run(row, 0, place)
    other = row._replace(settings={**row.settings, "lr": 0.5})
    with pytest.raises(InputError, match=r"trained with lr=0\.\d+, where the row has 0\.5"):
        running.run(other, 0, place)


def test_results_of_other_settings_are_not_shown(small: Any) -> None:
    tables, place = small
    carry_out(tables, place, "static", "vae-k1")
    pages = module("reproduction.pages")
    assert list(pages.results(place.results, tables["static"])) == ["vae-k1"]
    row = tables["static"]["vae-k1"]
    tables["static"]["vae-k1"] = row._replace(settings={**row.settings, "lr": 0.5})
    assert pages.results(place.results, tables["static"]) == {}
    moved = place._replace(runs=place.runs / "anew")
    carry_out(tables, moved, "static", "vae-k1", seeds=(1,))
    assert list(stored(place, "static", "vae-k1")["seeds"]) == ["1"]  # none of the old settings


def test_patience_finishes_a_run(small: Any) -> None:
    tables, place = small
    running = module("reproduction.running")
    row = tables["iwae"]["vae-k1"]
    row = row._replace(
        settings={**row.settings, "epochs": 60, "patience": 2, "lr": 0.5, "validate_every": 1}
    )
    first = running.run(row, 0, place)
    assert first["epochs"] == first["best_epoch"] + 2 < 60
    assert running.run(row, 0, place) == first


def test_the_share_of_heavy_tails() -> None:
    heavy = module("reproduction.cells").heavy
    assert heavy([{"pareto_k_above_0_7": 0.25}, {"pareto_k_above_0_7": 0.5}]) == "38%"
    assert heavy([{"pareto_k_above_0_7": 0.25}, {"pareto_k_above_0_7": None}]) == "not estimated"


def test_the_sheet_and_the_page_of_likelihoods(small: Any) -> None:
    tables, place = small
    names = ("mnist-gaussian", "mnist-categorical")
    assert carry_out(tables, place, "likelihoods", *names) == 0
    page = (place.results / "likelihoods.md").read_text(encoding="utf-8")
    assert "| `gaussian` | density | ≤ " in page
    assert "| `categorical` | mass | " in page
    assert "| `categorical` | mass | ≤" not in page
    assert "(../figures/likelihoods-mnist.png)" in page
    assert page.count("Not run: ") == 3  # the rest of MNIST's, and two data sets
    sheet = place.figures / "likelihoods-mnist.png"
    assert 2_000 < sheet.stat().st_size < 400_000
    assert [p.name for p in place.figures.iterdir()] == [sheet.name]
    result = stored(place, "likelihoods", "mnist-gaussian")["seeds"]["0"]
    # One scale: the density of dequantised levels, with its correction.
    nats = result["log_likelihood"] - 784 * math.log(256)
    assert result["bits_per_dim"] == pytest.approx(-nats / (784 * math.log(2)))
    front = place.readme.read_text(encoding="utf-8")
    assert "| `gaussian` | density | ≤ " in front
    assert "**" not in front.split("likelihoods: written")[1]  # some of each kind have not run
    # A result whose run is not here, as in a fresh clone, is in the tables and not on the sheet.
    tall = rows_of(sheet)
    shutil.rmtree(place.runs / "likelihoods" / "mnist-categorical")
    assert carry_out(tables, place, "likelihoods", "mnist-gaussian") == 0
    assert rows_of(sheet) < tall
    assert "| `categorical` | mass |" in (place.results / "likelihoods.md").read_text()


def rows_of(path: Path) -> int:
    """Rows of pixels of a PNG file."""
    return int.from_bytes(path.read_bytes()[20:24])


# ------------------------------------------------------------------------------- the command line


def reproduce(flags: list[str], here: Path) -> subprocess.CompletedProcess[str]:
    """Run the script as a person would, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "scripts/reproduce.py"), *flags],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYROVAE_DATA": "."},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_smoke_keeps_nothing(tmp_path: Path) -> None:
    page = ROOT / "benchmarks/reproduction/README.md"
    before = page.read_bytes(), (ROOT / "README.md").read_bytes()
    done = reproduce(["--smoke", "--table", "static", "--row", "vae*", "--seeds", "1"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("static / vae-k1, seed 1: ")
    assert not list(tmp_path.iterdir())
    assert (page.read_bytes(), (ROOT / "README.md").read_bytes()) == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--table iwea", "did you mean 'iwae'?"),
        ("--row vea-k1", "did you mean 'vae-k1'?"),
        ("--table static --row 2layer-k1", "there is no row '2layer-k1'"),
        ("--seeds -1", "--seeds expects numbers from 0"),
        ("--seeds one", "--seeds"),
        ("--smok", "--smok"),
        ("--table iwae --row vae-k1", "--data-root"),
        ("--table iwae --row vae-k1 --quiet --data-root nowhere", "--data-root"),
        ("--table likelihoods --row clothing64-beta --quiet", "clothing64.npz; there is none"),
        ("--table iwae --row vae-k1 --device cuda:99", "device"),
    ],
)
def test_mistakes_are_one_line(
    flags: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYROVAE_DATA", ".")
    status = module("reproduce").main(flags.split())
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.count("\n") == 1, printed.err
    assert says in printed.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert module("reproduce").main(["--list", "--table", "iwae"]) == 0
    listed = capsys.readouterr().out
    assert "released-k50" in listed and "GPU" in listed and "86.76" in listed
    assert listed.count("\n") == 9


def test_pages_in_the_repository_are_those_of_its_results(tmp_path: Path) -> None:
    """Nothing in them was written by hand, and none is out of date."""
    running, pages = module("reproduction.running"), module("reproduction.pages")
    rows = module("reproduction.rows")
    results = ROOT / "benchmarks/reproduction"
    readme = tmp_path / "front.md"
    readme.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    place = running.Place(Path("r"), tmp_path, ROOT / "benchmarks/figures", readme)
    for path in results.rglob("*.json"):
        copy = tmp_path / path.relative_to(results)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    pages.write(place, rows.TABLES)
    for name in ("README.md", "likelihoods.md"):
        assert (tmp_path / name).read_bytes() == (results / name).read_bytes(), name
    assert readme.read_bytes() == (ROOT / "README.md").read_bytes()
