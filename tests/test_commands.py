"""The commands on a trained run: bounds, scores, tables, pictures, pages, sharing."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shell import GREY, TINY, drawn, names, ok, shell

import pyrovae as pv
from pyrovae import annealing, comparison, scoring
from pyrovae import config as cfg
from pyrovae.comparison import run_split
from pyrovae.compiling import has_compiler
from pyrovae.parser import COMMANDS
from pyrovae.proposals import Proposal
from pyrovae.runs import Run

FEW = "--num-particles 30 --quiet"
CHAINS = "--num-images 2 --num-chains 2 --num-temperatures 3 --num-leapfrog 2 --quiet"


def without_time(report: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in report.items() if k != "seconds"}


# -------------------------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("proposal", ["wide", "defensive"])
def test_proposals(proposal: str, here: Path) -> None:
    flags = f"--proposal {proposal} --proposal-scale 1.2 --information 3"
    report = json.loads(ok(f"evaluate run {FEW} {flags} --json"))
    truth = pv.evaluate(
        cfg.load("run"),
        run_split(Run("run"), "test"),
        30,
        proposal=Proposal(proposal, 1.2),
        information_images=3,
    )
    assert without_time(report) == without_time(json.loads(json.dumps(truth.to_dict())))
    assert report["information"]["num_images"] == 3
    # What speaks of another proposal than the guide is no row of a comparison.
    assert not (here / "run" / "evaluations").exists()


def test_a_lower_precision_is_said_and_kept_out_of_comparisons(here: Path) -> None:
    report = json.loads(ok(f"evaluate run {FEW} --precision bf16 --json"))
    truth = pv.evaluate(cfg.load("run"), run_split(Run("run"), "test"), 30, precision="bf16")
    assert without_time(report) == without_time(json.loads(json.dumps(truth.to_dict())))
    assert report["precision"] == "bf16"
    assert report["precision_shift"]["num_particles"] == 30
    assert "bf16 in the networks' products" in ok(f"evaluate run {FEW} --precision bf16")
    assert not (here / "run" / "evaluations").exists()


def test_quadrature_and_importance_sampling_agree(here: Path) -> None:
    truth = json.loads(ok("evaluate run --method quadrature --json --quiet"))
    sampled = json.loads(ok("evaluate run --num-particles 2000 --json --quiet"))
    error = 5 * sampled["log_likelihood_mc_error"] + truth["error"]
    assert sampled["log_likelihood"] == pytest.approx(truth["log_likelihood"], abs=error)
    assert "by quadrature" in ok("evaluate run --method quadrature --limit 2")


def test_export_for_arviz(here: Path) -> None:
    import xarray as xr

    done = shell("evaluate run --num-particles 30 --max-draws 7 --export e.nc")
    assert done.status == 0
    assert "written   e.nc: 6 images" in done.err
    with xr.open_datatree("e.nc", engine="h5netcdf") as tree:
        assert tree["posterior"]["z"].shape == (1, 7, 6, 2)


def test_an_evaluation_is_kept_for_comparisons(here: Path) -> None:
    ok(f"evaluate run {FEW}")
    (kept,) = (here / "run" / "evaluations").iterdir()
    table = json.loads(ok("compare run --json"))
    assert table["num_particles"] == 30
    assert [kept] == [*(here / "run" / "evaluations").iterdir()]


# ---------------------------------------------------------------------------------------- anneal


def test_anneal_is_what_the_library_does(here: Path) -> None:
    report = json.loads(ok(f"anneal run {CHAINS} --start guide --json"))
    chains = annealing.Settings(2, 3, 2, "guide")
    truth = annealing.anneal_split(cfg.load("run"), run_split(Run("run"), "test"), 2, chains)
    assert without_time(report) == without_time(truth.to_dict())
    both = json.loads(ok(f"anneal run {CHAINS} --bdmc --json"))
    assert both["split"] == "simulated"
    assert both["gap"] == pytest.approx(both["upper"] - both["log_likelihood"])


def test_anneal_continues(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = shell(f"anneal run {CHAINS.replace('--quiet', '')}")
    assert "cost      " in done.err
    assert done.out.startswith("log p(x) ")
    (state,) = (here / "run" / "annealing").iterdir()
    assert f"{state.relative_to(here)} is continued" in shell(f"anneal run {CHAINS[:-8]}").err

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(annealing, "anneal_split", stop)
        done = shell(f"anneal run {CHAINS} --state s.pt")
    assert (done.status, done.out) == (130, "")
    assert "finished images are saved in s.pt" in done.err
    ok(f"anneal run {CHAINS} --state s.pt")
    done = shell(f"anneal run {CHAINS} --state s.pt --seed 1")
    assert done.status == 2
    assert "seed" in done.err
    ok(f"anneal run {CHAINS} --state s.pt --seed 1 --restart")


# ----------------------------------------------------------------------------- score and compare


def test_score(here: Path) -> None:
    Image.fromarray(GREY[0]).save(here / "one.png")
    flags = f"{FEW} --num-reference 5"
    report = json.loads(ok(f"score run one.png x.npy {flags} --out s.csv --json"))
    truth = scoring.score_paths("run", ["one.png", "x.npy"], num_particles=30, num_reference=5)
    assert report == json.loads(json.dumps(truth.to_dict()))
    with (here / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 61
    assert float(rows[0]["log_likelihood"]) == report["rows"][0]["log_likelihood"]
    # One image is one x, whichever file it comes in; only the draws of z differ.
    one, same = report["rows"][:2]
    error = 5 * (one["mc_error"] + same["mc_error"])
    assert one["log_likelihood"] == pytest.approx(same["log_likelihood"], abs=error)
    text = ok(f"score run one.png {flags}")
    assert text.startswith("image ")
    assert "Nalisnick" in text


def test_compare(here: Path) -> None:
    ok(f"{TINY} --epochs 1 --out other --seed 1")
    table = json.loads(ok(f"compare run other {FEW} --json"))
    truth = comparison.compare(["run", "other"], num_particles=30)
    assert table == json.loads(json.dumps(truth.to_dict()))
    assert ok(f"compare run other {FEW}") == f"{truth}\n"
    assert ok(f"compare run other {FEW} --markdown").startswith("| run |")


# -------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("command", ["interpolate run --pairs 3", "traverse run --latents 2"])
def test_walks(command: str, here: Path) -> None:
    default = COMMANDS[command.split()[0]].arguments[1][1]["default"]
    assert ok(f"{command} --steps 4") == f"{default}\n"
    assert drawn(default)
    assert ok(f"{command} --steps 4 --out walk.gif") == "walk.gif\n"
    with Image.open("walk.gif") as image:
        assert (image.format, image.n_frames) == ("GIF", 6)  # there and back
    ok(f"{command} --steps 4 --out same.png")
    assert Path("same.png").read_bytes() == Path(default).read_bytes()
    more = "--seed 1" if "pairs" in command else "--image 1"
    ok(f"{command} --steps 4 {more} --out other.png")
    assert Path("other.png").read_bytes() != Path(default).read_bytes()


def test_traverse_moves_the_named_latents(here: Path) -> None:
    ok("traverse run --dims 1 --out one.png")
    ok("traverse run --dims 1 0 --out two.png")
    with Image.open("one.png") as one, Image.open("two.png") as two:
        assert one.height < two.height


def test_interpolation_ends_at_its_images(here: Path) -> None:
    vae = cfg.load("run")
    x = torch.rand(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    walk = vae.interpolate(x[0], x[1], steps=3)
    assert walk.shape == (3, 3, 1, 4, 4)
    for i, z in ((0, vae.encode(x[0])), (2, vae.encode(x[1]))):
        torch.testing.assert_close(walk[:, i], vae.decode(z))
    middle = vae.decode((vae.encode(x[0]) + vae.encode(x[1])) / 2)
    torch.testing.assert_close(walk[:, 1], middle)
    torch.testing.assert_close(vae.interpolate(x[0, 0], x[1, 0], 3), walk[0])
    with pytest.raises(pv.InputError, match="at least 2 steps"):
        vae.interpolate(x[0], x[1], 1)
    with pytest.raises(pv.InputError, match="as many starts as ends"):
        vae.interpolate(x[0], x[1, :2])


# ----------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("command", [f"report run {FEW}", "explore run --num-images 3 --quiet"])
def test_pages(command: str, here: Path) -> None:
    default = f"run/{command.split()[0]}.html"
    assert ok(command) == f"{default}\n"
    page = Path(default).read_text()
    assert page.lower().startswith("<!doctype html>")
    assert ok(f"{command} --out p.html") == "p.html\n"
    assert names(here) >= {"p.html"}


# --------------------------------------------------------------------------------------- sharing


def test_share(here: Path) -> None:
    ok(f"evaluate run {FEW}")
    done = shell("export run shared/vae")
    assert (done.status, done.out) == (0, "shared/vae\n")
    files = {"model.safetensors", "config.json", "data.json", "environment.json", "README.md"}
    assert names(here / "shared" / "vae") == files
    card = (here / "shared" / "vae" / "README.md").read_text()
    summary = pv.evaluate(cfg.load("run"), run_split(Run("run"), "test"), 30)
    assert f"{summary.log_likelihood:.3f} ± {summary.log_likelihood_se:.3f}" in card
    assert "K = 30, seed 0, on 6 images" in card
    assert summary.protocol in card
    assert str(here) not in "".join(
        (here / "shared" / "vae" / name).read_text() for name in files - {"model.safetensors"}
    )

    (here / "run").rename(here / "gone")
    code = "import pyrovae as pv; print(pv.load('shared/vae').generate(3, seed=0).sum().item())"
    root = Path(pv.__file__).parents[1]
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert float(out) == cfg.load("gone").generate(3, seed=0).sum().item()
    ok("sample shared/vae --num-samples 4")
    again = json.loads(ok(f"evaluate shared/vae {FEW} --json"))
    assert again["log_likelihood"] == summary.log_likelihood

    (here / "shared" / "vae" / "notes.txt").write_text("mine")
    ok("export gone shared/vae --overwrite")
    assert (here / "shared" / "vae" / "notes.txt").read_text() == "mine"


def test_a_card_without_numbers(here: Path) -> None:
    ok("export run shared")
    assert "It was not evaluated" in (here / "shared" / "README.md").read_text()


@pytest.mark.parametrize("package", ["safetensors", "tensorboard"])
def test_an_extra_that_is_missing(
    package: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    for module in (pv.sharing, pv.tracking, importlib.util):
        if hasattr(module, "find_spec"):
            monkeypatch.setattr(
                module, "find_spec", lambda name, *a: None if name == package else find(name, *a)
            )
    share = package == "safetensors"
    done = shell("export run new" if share else f"{TINY} --out new --log tensorboard")
    assert (done.status, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert f"pip install -e '.[{'share' if share else 'tensorboard'}]'" in done.err
    assert not (here / "new").exists()


# -------------------------------------------------------------------------------------- tracking


def test_tensorboard(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ok(f"{TINY} --epochs 2 --out logged --log tensorboard")
    ok("train --resume --out logged --epochs 3 --quiet")
    seen = EventAccumulator(str(here / "logged" / "tensorboard"))
    seen.Reload()
    written = {m["epoch"]: m["valid_elbo"] for m in Run("logged").read_metrics()}
    events = {e.step: e.value for e in seen.Scalars("valid/elbo")}
    assert events == pytest.approx(written)
    assert set(seen.Tags()["images"]) == {"samples", "reconstructions"}
    # Watching a run does not change it.
    ok(f"{TINY} --epochs 3 --out alone")
    assert [m["valid_elbo"] for m in Run("alone").read_metrics()] == [*written.values()]


def test_tensorboard_shows_no_bound_of_an_autoencoder(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ok(f"{TINY} --epochs 2 --model autoencoder --out plain --log tensorboard")
    seen = EventAccumulator(str(here / "plain" / "tensorboard"))
    seen.Reload()
    assert {t for t in seen.Tags()["scalars"] if t.startswith("valid/")} == {"valid/squared_error"}
    written = [-m["valid_elbo"] for m in Run("plain").read_metrics()]
    assert [e.value for e in seen.Scalars("valid/squared_error")] == pytest.approx(written)


# --------------------------------------------------------------------------------------- dry run


def test_dry_run_tells_the_cost(here: Path) -> None:
    np.save("many.npy", np.tile(GREY, (4, 1, 1)))
    out = ok(f"{TINY} --data many.npy --epochs 7 --dry-run")
    for row in ("memory  ", "parameters  ", "time of one step", "time of an epoch", "time of all"):
        assert row in out, row
    assert "12 steps" in out
    assert "engine taken       svi: 84 such steps would not repay" in out
    often = "--epochs 1000000 --validate-every 1000000 --engine auto --dry-run"
    long = ok(f"{TINY} --data many.npy {often}".replace("--engine svi", ""))
    if has_compiler():
        assert "engine taken       compiled: 12,000,000 such steps" in long
        assert "by svi, of which compiled needs less" in long


def test_activations_are_counted(here: Path) -> None:
    from pyrovae.commands.dry_run import activations

    def kept(batch_size: int) -> int:
        config = cfg.resolve(cfg.TrainConfig(data="x.npy", hidden=(8,), batch_size=batch_size))
        dataset = cfg.load_data(config)
        vae = cfg.build(config, dataset)
        return activations(vae, dataset.train, config, torch.device("cpu"))

    # The x, four hidden layers and outputs of every image, in float32, and not much besides.
    assert kept(24) >= 4 * 24 * (16 + 2 * 8 + 50)
    assert kept(48) == pytest.approx(2 * kept(24), rel=0.02)


# ------------------------------------------------------------------------------------------ repr


def test_repr_is_short(here: Path) -> None:
    text = repr(cfg.load("run"))
    assert text.splitlines()[0] == "VAE of x (1, 4, 4), 2 latents, 340 parameters"
    assert "MeanField on MLPEncoder" in text
    assert "Linear(" not in text
    assert "Linear(" in torch.nn.Module.__repr__(cfg.load("run"))


def test_a_reader_that_leaves_is_no_error() -> None:
    """``pyrovae info | head -0``: silence on stderr, and no traceback at exit."""
    info = subprocess.Popen(
        [sys.executable, "-m", "pyrovae", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert info.stdout is not None
    info.stdout.close()
    _, err = info.communicate(timeout=60)
    assert info.returncode == 1
    assert err == b""
