"""The command line as it is meant to be used: what it prints, writes, resumes and returns."""

import argparse
import errno
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shell import GREY, PICTURES, RECORDS, TINY, Done, drawn, greys, names, ok, shell

import pyrovae
from pyrovae import (
    annealing,
    compiled_terms,
    data,
    engines,
    hierarchical,
    likelihoods,
    networks,
    objectives,
    optimizers,
    posteriors,
    precision,
    presets,
    priors,
    proposals,
    runs,
    settings,
    training,
)
from pyrovae import config as cfg
from pyrovae.cli import main
from pyrovae.commands import info as info_command
from pyrovae.commands import train as train_command
from pyrovae.loop import Loop
from pyrovae.parser import COMMANDS, INFO
from pyrovae.runs import Run, load_checkpoint

ROOT = Path(__file__).parents[1]
REPORT_KEYS = """
    data protocol split num_images num_particles log_likelihood log_likelihood_se elbo elbo_se
    rate distortion bits_per_dim active_units pareto_k_median pareto_k_above_0_7 ess_median
    device seconds
"""


def same_state(one: Path, other: Path) -> None:
    """Two checkpoints must agree bit for bit, but for the time they took."""
    a, b = load_checkpoint(one), load_checkpoint(other)
    a["state"].pop("seconds"), b["state"].pop("seconds")
    _same(a, b, "checkpoint")


def _same(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            _same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            _same(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def metrics(run: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k != "seconds"} for m in Run(run).read_metrics()]


# -------------------------------------------------------------------------------------- training


def test_the_first_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = shell("train --hidden 8 --latent-dim 2 --epochs 1 --final-particles 2 --device cpu")
    assert done.status == 0, done.err
    run = tmp_path / "runs" / "digits-bernoulli"
    assert names(run) == RECORDS | PICTURES | {"evaluation.json", "evaluations"}
    assert names(run / "checkpoints") == {"last.pt", "best.pt"}
    assert all(drawn(run / picture) for picture in PICTURES)

    report = json.loads((run / "evaluation.json").read_text())
    assert (report["split"], report["num_particles"], report["num_images"]) == ("test", 2, 300)
    assert done.out.startswith("log p(x) ")
    assert f"{report['log_likelihood']:.3f} ± {report['log_likelihood_se']:.3f}" in done.out
    assert report["protocol"] in done.out
    assert "digits, dynamic binarisation" in done.err
    assert "pyrovae evaluate runs/digits-bernoulli" in done.err
    assert "\r" not in done.err  # no progress bar where nobody watches

    config = json.loads((run / "config.json").read_text())
    assert set(config) == {f.name for f in cfg.TrainConfig.__dataclass_fields__.values()}
    assert (config["binarize"], config["dequantize"]) == ("dynamic", "none")
    environment = json.loads((run / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert (environment["seed"], environment["device"]) == (0, "cpu")
    assert environment["commit"] == runs.commit()
    assert environment["device_name"] == runs.processor()
    told = Path("/proc/cpuinfo")
    if told.exists() and "model name" in told.read_text():
        assert f": {runs.processor()}\n" in told.read_text()
    assert environment["command"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_tells_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "pyrovae"
    inner.mkdir()
    code, note = inner / "a.py", tmp_path / "note.txt"
    code.write_text("1\n")

    def told(root: Path = tmp_path) -> str | None:
        return runs.commit.__wrapped__(root)  # not as it was before

    assert told() is None  # installed, and no checkout

    def git(*words: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *own, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert told() is None  # nothing is committed
    git("add", ".")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert told() == head
    note.write_text("no code of ours")
    assert told() == head
    code.write_text("2\n")
    assert told() == head + "+"
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook of another repository
    assert told() == head + "+"
    assert told(inner) is None  # a package in somebody's repository


def test_no_final_evaluation_and_quiet(here: Path) -> None:
    done = shell(f"{TINY} --epochs 1 --out other")
    assert done == Done(0, "", "")
    assert names(here / "other") == RECORDS | PICTURES


def test_vectors_have_no_pictures(here: Path) -> None:
    np.save(here / "x.npy", GREY.reshape(60, 16))
    ok(f"{TINY} --epochs 1 --out vectors")
    assert names(here / "vectors") == RECORDS | {"curves.png"}
    done = shell("sample vectors")
    assert (done.status, done.out) == (2, "")
    assert "only such can be drawn" in done.err


@pytest.mark.parametrize("likelihood", likelihoods.REGISTRY)
def test_auto_is_resolved(likelihood: str) -> None:
    config = cfg.resolve(cfg.TrainConfig(likelihood=likelihood))
    binarize = "dynamic" if likelihood == "bernoulli" else "none"
    density = likelihoods.REGISTRY[likelihood].kind == "density"
    assert (config.binarize, config.dequantize) == (binarize, "uniform" if density else "none")
    assert cfg.resolve(config) == config


def test_dry_run_writes_nothing(here: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*")}
    out = ok(f"{TINY} --likelihood gaussian --likelihood-args scale=0.1 --out dry --dry-run")
    assert "scale': 0.1" in out
    assert "nothing was written" in out
    out = ok("train --dry-run --resume --out run --epochs 5")
    assert "epochs             5" in out
    forever = ok(f"train --dry-run --resume --out run --epochs {10**8} --quiet")
    assert "svi: as the run began" in forever  # though so many steps would repay a compilation
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*")} == before


def test_settings_from_a_file_and_from_flags(here: Path) -> None:
    (here / "c.toml").write_text(
        'data = "x.npy"\nhidden = [8, 6]\nlatent-dim = 2\nlr = 1\nlikelihood = "gaussian"\n'
        'prior = "flow"\n[likelihood-args]\nscale = "per-pixel"\n[prior-args]\nhidden = [7]\n'
    )
    flags = (
        "--data x.npy --hidden 8 6 --latent-dim 2 --lr 1 --likelihood gaussian --prior flow "
        "--likelihood-args scale=per-pixel --prior-args hidden=7"
    )
    from_file = ok("train --config c.toml --dry-run")
    assert from_file.replace("[7]", "7") == ok(f"train {flags} --dry-run")
    overridden = ok("train --config c.toml --lr 0.5 --likelihood-args scale=learned --dry-run")
    assert overridden == ok(
        f"train {flags} --lr 0.5 --likelihood-args scale=learned --prior-args hidden=7, --dry-run"
    )
    assert overridden != from_file

    (here / "e.toml").write_text("num_particles = 3\nlimit = 4\n")
    report = json.loads(ok("evaluate run --config e.toml --limit 2 --json"))
    assert (report["num_particles"], report["num_images"]) == (3, 2)


def test_overwrite_replaces_the_run_and_nothing_else(here: Path) -> None:
    (here / "run" / "notes.txt").write_text("mine")
    (here / "run" / "evaluation.json").write_text("{}")
    ok(f"{TINY} --epochs 1 --latent-dim 3 --out run --overwrite")
    assert len(metrics("run")) == 1
    assert json.loads((here / "run" / "config.json").read_text())["latent_dim"] == 3
    assert names(here / "run") == RECORDS | PICTURES | {"notes.txt"}


# ---------------------------------------------------------------------------------------- resume

RICH = (
    f"{TINY} --ema 0.9 --clip-norm 1 --schedule cosine --schedule-epochs 4 --kl-warmup 2 "
    "--weight-decay 0.01 --prior vamp --prior-args components=3 --seed 5"
)


@pytest.fixture(scope="module")
def uninterrupted(trained: Path) -> Path:
    """A run of four epochs with every setting that has a state of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        ok(f"{RICH} --epochs 4 --out whole")
    return trained / "whole"


def test_two_and_two_epochs_are_four(here: Path, uninterrupted: Path) -> None:
    ok(f"{RICH} --epochs 2 --out halves")
    ok("train --out halves --resume --epochs 4 --quiet")
    same_state(here / "halves/checkpoints/last.pt", uninterrupted / "checkpoints/last.pt")
    same_state(here / "halves/checkpoints/best.pt", uninterrupted / "checkpoints/best.pt")
    assert metrics("halves") == metrics(str(uninterrupted))
    assert json.loads((here / "halves/config.json").read_text())["epochs"] == 4


def test_a_run_that_goes_on_elsewhere_says_so(here: Path) -> None:
    ok(f"{TINY} --epochs 1 --out moved")
    path = here / "moved/environment.json"
    first = json.loads(path.read_text())
    ok("train --out moved --resume --epochs 2 --quiet")
    assert json.loads(path.read_text()) == first  # nothing is other but the command
    path.write_text(json.dumps({**first, "device": "cuda:0", "device_name": "a GPU"}))
    ok("train --out moved --resume --epochs 3 --quiet")
    found = json.loads(path.read_text())
    here_now = {name: first[name] for name in ("device", "device_name")}
    assert found["continued"] == [{"after_epoch": 2, **here_now}]
    assert found["device"] == "cuda:0"
    path.write_text(json.dumps({**first, "device": "cuda:0"}))
    ok("train --out moved --resume --epochs 3 --quiet")  # nothing is left to do
    assert "continued" not in json.loads(path.read_text())
    # What an earlier version called the processor, and what it did not note, is no change.
    older = {**first, "device_name": platform.machine()}
    del older["commit"]
    path.write_text(json.dumps(older))
    ok("train --out moved --resume --epochs 4 --quiet")
    assert json.loads(path.read_text()) == older
    path.write_text(json.dumps(found))
    ok("report moved --num-particles 2 --quiet")
    assert (
        "after epoch 2, with other: device, device name" in (here / "moved/report.html").read_text()
    )
    path.write_text(json.dumps({**found, "commit": "0123456789abcdef+"}))
    ok("report moved --num-particles 2 --quiet")
    shown = (here / "moved/report.html").read_text()
    assert shown.count("(commit 0123456789 and changes)") == 2


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_stopped_within_an_epoch_goes_on_exactly(
    signum: int, status: int, here: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, count = data.Split.drawn, 0

    def stopping(split: data.Split, *args: Any) -> torch.Tensor:
        nonlocal count
        if split.name == "train" and len(args[0]) <= 16:  # a step's, not the check of all
            count += 1
            if count == 5:
                signal.raise_signal(signum)
        return drawn(split, *args)

    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(data.Split, "drawn", stopping)
        done = shell(f"{RICH} --epochs 4 --out stopped")
    assert (done.status, done.out) == (status, "")
    assert "pyrovae train --out stopped --resume" in done.err
    assert signal.getsignal(signum) is before
    state = load_checkpoint(here / "stopped/checkpoints/last.pt")["state"]
    assert (state["epoch"], state["step"], state["step_in_epoch"]) == (1, 5, 2)
    assert names(here / "stopped") == RECORDS

    ok("train --out stopped --resume --quiet")
    same_state(here / "stopped/checkpoints/last.pt", uninterrupted / "checkpoints/last.pt")
    same_state(here / "stopped/checkpoints/best.pt", uninterrupted / "checkpoints/best.pt")
    assert metrics("stopped") == metrics(str(uninterrupted))


def test_processes_join_for_the_device_of_the_run_that_they_resume(here: Path) -> None:
    def device(out: str, **given: str) -> str:
        return train_command._device(argparse.Namespace(resume=True, out=out), given)

    stored = json.loads((here / "run/config.json").read_text()) | {"device": "cpu"}
    (here / "run/config.json").write_text(json.dumps(stored))
    assert device("run") == "cpu"
    assert device("run", device="cuda") == "cuda"
    assert device("no-such-run") == "auto"  # refused a little later, by name


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_real_process_stops_and_is_resumed(signum: int, status: int, here: Path) -> None:
    # What "auto" means depends on how many steps are planned: here, far more than are taken.
    command = f"-m pyrovae {TINY} --out real --epochs 100000 --device cpu --engine svi"
    process = subprocess.Popen(
        [sys.executable, *shlex.split(command)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while len(Run("real").read_metrics()) < 2 and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signum)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (status, "")
    assert "all is saved" in err
    assert "Traceback" not in err

    epochs = load_checkpoint(here / "real/checkpoints/last.pt")["state"]["epoch"] + 1
    ok(f"train --out real --resume --epochs {epochs} --quiet")
    ok(f"{TINY} --out again --epochs {epochs}")
    same_state(here / "real/checkpoints/last.pt", here / "again/checkpoints/last.pt")
    assert metrics("real") == metrics("again")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_last_validation(
    signum: int, status: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Loop._judge

    def stopping(loop: Loop, seed: int) -> Any:
        signal.raise_signal(signum)
        return judge(loop, seed)

    monkeypatch.setattr(Loop, "_judge", stopping)
    done = shell(f"{TINY} --epochs 1 --final-particles 1 --out late")
    assert (done.status, done.out) == (status, "")
    assert "training is done. Next: pyrovae evaluate late" in done.err
    assert names(here / "late") == RECORDS


def test_stopped_after_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluation(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_command, "run_evaluation", evaluation)
    assert shell(f"{TINY} --epochs 1 --final-particles 1 --out stopped").status == 130
    assert names(here / "stopped") == RECORDS | PICTURES


# ------------------------------------------------------------------------------------ evaluation


def test_evaluate_as_json_and_as_text(here: Path) -> None:
    report = json.loads(ok("evaluate run --num-particles 20 --json"))
    assert set(REPORT_KEYS.split()) <= set(report)
    assert report["data"] == "x.npy"
    assert report["device"] == "cpu"
    assert report["log_likelihood"] > report["elbo"]
    assert report["elbo"] == pytest.approx(-report["rate"] - report["distortion"], rel=1e-6)
    assert f"{report['log_likelihood']:.3f} ±" in ok("evaluate run --num-particles 20")

    vae = cfg.load("run")
    dataset = data.load("x.npy", binarize="dynamic")
    python = pyrovae.evaluate(vae, dataset.test, 20).to_dict()
    assert {k: v for k, v in python.items() if k != "seconds"} == {
        k: v for k, v in report.items() if k != "seconds"
    }
    other_seed = json.loads(ok("evaluate run --num-particles 20 --seed 1 --json"))
    assert other_seed["log_likelihood"] != report["log_likelihood"]


@pytest.mark.parametrize(("split", "size"), [("train", 48), ("valid", 6), ("test", 6)])
def test_evaluate_every_split_with_one_particle(split: str, size: int, here: Path) -> None:
    command = f"evaluate run --num-particles 1 --split {split} --json"
    report = json.loads(ok(command))
    assert (report["split"], report["num_images"], report["num_particles"]) == (split, size, 1)
    assert report["log_likelihood"] == pytest.approx(report["elbo"], rel=1e-10)
    again = json.loads(ok(command))
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    fewer = json.loads(ok(f"{command} --limit 3"))
    assert fewer["num_images"] == 3
    one = json.loads(ok(f"{command} --limit 1"))
    assert one["log_likelihood_se"] is None  # and not NaN, which is no JSON


# -------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("command", ["sample run --num-samples 5", "reconstruct run"])
def test_pictures(command: str, here: Path) -> None:
    default = "samples.png" if "sample" in command else "recon.png"
    assert ok(command) == f"{default}\n"
    assert ok(f"{command} --out same.png") == "same.png\n"
    assert ok(f"{command} --out mean.png --mean") == "mean.png\n"
    assert ok(f"{command} --out other.png --seed 1") == "other.png\n"
    pictures = {name: Path(name).read_bytes() for name in ("same.png", "mean.png", "other.png")}
    assert all(drawn(name) for name in (default, *pictures))
    assert greys(default) < 0.1 < greys("mean.png")  # the draws are 0 or 1, their means are not
    assert pictures["same.png"] == Path(default).read_bytes()
    assert len(set(pictures.values())) == 3


# ------------------------------------------------------------------------------------------ info

REGISTRIES: dict[str, Any] = {
    "likelihood": likelihoods.REGISTRY,
    "model": (*hierarchical.REGISTRY, "autoencoder"),
    "prior": priors.REGISTRY,
    "posterior": posteriors.REGISTRY,
    "network": networks.REGISTRY,
    "objective": objectives.REGISTRY,
    "data": data.REGISTRY,
    "optimizer": optimizers.OPTIMIZERS,
    "preset": presets.PRESETS,
    "activation": networks.ACTIVATIONS,
    "binarize": ("auto", *data.BINARIZE),
    "dequantize": ("auto", *data.DEQUANTIZE),
    "split": data.SPLITS,
    "method": tuple(settings.UNUSED),
    "proposal": proposals.KINDS,
    "start": annealing.STARTS,
    "step_sizes": annealing.STEP_SIZES,
    "engine": engines.ENGINES,
    "evaluator": compiled_terms.EVALUATORS,
    "precision": precision.PRECISIONS,
}


@pytest.mark.parametrize("what", cfg.NAMES)
def test_names_are_those_of_the_registries(what: str) -> None:
    if what == "schedule":
        for name in cfg.NAMES[what]:
            training.learning_rate(name, 1.0, 0, 1)
        return
    if what == "log":
        assert cfg.NAMES[what] == ("tensorboard",)
        return
    assert sorted(cfg.NAMES[what]) == sorted(REGISTRIES[what])


@pytest.mark.parametrize("topic", INFO)
def test_info_on_a_family(topic: str) -> None:
    listing = ok(f"info {topic}").splitlines()
    known = cfg.NAMES[{"data": "data", "likelihoods": "likelihood"}.get(topic, topic[:-1])]
    assert sorted(line.split()[0] for line in listing) == sorted(known)
    assert all(len(line.split()) > 2 for line in listing)
    assert "\n".join(listing) in ok("info")


def test_info_on_a_run(here: Path) -> None:
    facts = ok("info run")
    assert "x.npy, dynamic binarisation" in facts
    assert "2 of 2" in facts
    assert "bernoulli likelihood, mlp network, mean-field posterior" in facts
    assert "log p(x)" not in facts
    ok("train --resume --out run --epochs 3 --final-particles 2 --quiet")
    facts = ok("info run")
    assert "3 of 3" in facts
    assert "K = 2, 6 images of test" in facts
    ok("train --resume --out run --epochs 4 --final-particles 0 --quiet")
    assert "log p(x)" not in ok("info run")  # the number was that of three epochs


def test_version() -> None:
    assert ok("--version") == f"pyrovae {pyrovae.__version__}\n"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom pyrovae.cli import main\n"
        f"for words in [], {', '.join(str([name]) for name in COMMANDS)}:\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy', 'pyro', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in cfg.TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in done.stdout


# --------------------------------------------------------------------------------- exit statuses


def test_a_loss_that_is_not_finite(here: Path) -> None:
    done = shell(f"{TINY} --epochs 3 --lr 1e30 --likelihood gaussian --out diverged")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("pyrovae: training stopped at step ")
    assert done.err.count("\n") == 1
    assert "site '" in done.err
    assert "--lr" in done.err


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "run"), 1, "run: No space left"),
        (OSError(errno.EACCES, "Permission denied", "run"), 2, "run: Permission denied"),
        (MemoryError(), 1, "--batch-size"),
        (RuntimeError("CUDA out of memory.\nTried to"), 1, "--batch-size"),
        (RuntimeError("can't allocate memory: you tried"), 1, "--batch-size"),
    ],
)
def test_failures_at_run_time(
    error: BaseException, status: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(info_command, "info", fail)
    done = shell("info")
    assert (done.status, done.out) == (status, "")
    assert done.err.startswith("pyrovae: ")
    assert done.err.count("\n") == 1
    assert says in done.err


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(info_command, "info", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])
