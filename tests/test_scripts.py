"""The scripts run, read what each other and the command line write, and fail in one line."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pyrovae import cli

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
SMALL = "--hidden 8 --latent-dim 2 --epochs 1"


def run(script: str, flags: str, here: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a directory as a person would, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "scripts" / script), *shlex.split(flags)],
        cwd=here,
        # A fixture of the module comes before the one that hides CUDA.
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that scripts/train.py wrote."""
    here = tmp_path_factory.mktemp("scripts")
    done = run("train.py", "--latent-dim 4 --epochs 3 --out runs/short", here)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"best validation ELBO -\d+\.\d+ nats per image, in .*\n", done.stdout)
    return here / "runs" / "short"


@pytest.mark.slow
def test_evaluate_agrees_with_the_command(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run("evaluate.py", f"{trained} --num-particles 230 --limit 100", trained)
    assert done.returncode == 0, done.stderr
    found = {
        name: float(value)
        for name, value in re.findall(r"^(log p\(x\)|ELBO) +(-[\d.]+)", done.stdout, re.MULTILINE)
    }
    flags = ["--num-particles", "230", "--limit", "100", "--json"]
    assert cli.main(["evaluate", str(trained), *flags]) == 0
    other = json.loads(capsys.readouterr().out)
    # The images are the same, so what differs is the noise of the draws alone. The spread of the
    # log-weights of an image is below 4 nats, and there are 100 images of 230 draws.
    bound = 5 * 2**0.5 * 4 / (100 * 230) ** 0.5
    assert found["ELBO"] == pytest.approx(other["elbo"], abs=bound)
    assert found["log p(x)"] == pytest.approx(other["log_likelihood"], abs=bound)
    assert found["log p(x)"] > found["ELBO"] + bound


def test_the_command_line_reads_a_scripts_run(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", str(trained)]) == 0
    assert "3 of 3" in capsys.readouterr().out
    assert cli.main(["sample", str(trained), "--out", str(trained / "s.png")]) == 0


def test_training_learns(trained: Path) -> None:
    lines = (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    elbo = [json.loads(line)["valid_elbo"] for line in lines]
    assert elbo[2] > elbo[0] + 0.3


@pytest.mark.slow
def test_options_reach_the_model(tmp_path: Path) -> None:
    flags = "--likelihood gaussian --likelihood-args scale=0.2 --objective mean-field --beta 0.5"
    done = run("train.py", f"{flags} {SMALL} --out r", tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "r" / "config.json").read_text(encoding="utf-8"))
    assert config["likelihood_args"] == {"scale": 0.2}
    assert (config["dequantize"], config["beta"], config["hidden"]) == ("uniform", 0.5, [8])
    done = run("evaluate.py", "r --num-particles 1 --limit 10 --split train", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "10 of the train split" in done.stdout


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("train.py", "--bogus", "--bogus"),
        ("train.py", "--likelihood bernouli", "did you mean 'bernoulli'"),
        ("evaluate.py", "nowhere", "not a run directory"),
    ],
)
def test_mistakes_are_one_line(script: str, flags: str, says: str, tmp_path: Path) -> None:
    done = run(script, flags, tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_autoencoder_is_refused(tmp_path: Path) -> None:
    small = "train --model autoencoder --latent-dim 2 --epochs 1 --quiet --out"
    assert cli.main([*small.split(), str(tmp_path / "auto")]) == 0
    done = run("evaluate.py", "auto --num-particles 5", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "for runs of --model vae" in done.stderr


def test_a_run_is_not_overwritten(trained: Path) -> None:
    before = (trained / "config.json").read_bytes()
    done = run("train.py", f"{SMALL} --out {trained}", trained)
    assert done.returncode == 2
    assert "choose another --out" in done.stderr
    assert (trained / "config.json").read_bytes() == before


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 120
