"""One run in several processes: the same numbers, one writer, and a job that ends when one dies."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_data, tiny_vae, traced_svi

from pyrovae import compiling, processes
from pyrovae import config as cfg
from pyrovae.errors import InputError
from pyrovae.evaluation import evaluate
from pyrovae.optimizers import WholeModelOptimizer
from pyrovae.runs import Run, load_checkpoint
from pyrovae.training import fit

TRAIN = shlex.split(
    "train --data digits --hidden 16 --latent-dim 2 --batch-size 64 --lr 1e-2 --device cpu "
    "--final-particles 0"
)


def launch(arguments, count=2, program=("-m", "pyrovae"), **options):
    """``torchrun --nproc-per-node count -m pyrovae ...``, as a started process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(count), *program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    paths = [
        str(Path(processes.__file__).parents[1]),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    environment["PYTHONPATH"] = os.pathsep.join(paths)  # for a script elsewhere
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def alone(arguments):
    from pyrovae.cli import main

    assert main([*map(str, arguments), "--quiet"]) == 0


def test_one_process_needs_no_ceremony():
    assert processes.count() == 1 and processes.rank() == 0 and processes.is_first()
    assert processes.gather("a") == ["a"]
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert torch.equal(processes.add(torch.ones(2)), torch.ones(2))
    with processes.joined():
        assert processes.count() == 1


def test_more_processes_than_devices_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes were started on 1 CUDA"), processes.joined():
        pass


def steps(reduce, images, factor=1):
    """Parameters and losses of five steps, with the gradient summed by ``reduce``."""
    config = tiny_config()
    data = tiny_data(config)
    vae = cfg.build(config, data)
    optim = WholeModelOptimizer(vae.named_parameters(), clip_norm=1.0)
    svi = traced_svi(vae, optim, split=data.train, reduce=reduce)
    losses = []
    for i in range(5):
        optim.begin(1e-2, 6)
        losses.append(float(svi.step(torch.arange(i, i + 6), images)))
    return losses, vae.state_dict()


def test_a_summed_step_is_the_step_of_the_whole_batch():
    """Two processes with equal shares move as one: sum of gradients over sum of images."""
    losses, weights = steps(None, None)
    for count in (1, 2):
        doubled, moved = steps(lambda flat, n=count: flat.mul_(n), 6 * count)
        assert doubled == pytest.approx([count * loss for loss in losses], rel=1e-5)
        for name, t in weights.items():
            assert torch.allclose(moved[name], t, rtol=1e-5, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.skipif(not compiling.has_compiler(), reason="needs a C++ compiler")
def test_a_process_compiles_for_its_share_of_the_indices():
    """Every second index is no contiguous tensor, and what is compiled wants a fixed layout."""
    config = tiny_config()
    data = tiny_data(config)
    found = []
    for mode in ("traced", "compiled"):
        vae = cfg.build(config, data)
        optim = WholeModelOptimizer(vae.named_parameters())
        svi = traced_svi(vae, optim, mode, split=data.train, reduce=lambda flat: flat)
        optim.begin(1e-2, 6)
        found.append([float(svi.step(torch.arange(20)[i::3])) for i in (0, 1, 0)])
        found.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    assert torch.allclose(found[1], found[3], atol=1e-5)


def test_the_stock_engine_sums_its_gradient_too():
    config = tiny_config()
    data = tiny_data(config)
    grads = []
    for count in (1, 3):
        vae = cfg.build(config, data)
        optim = WholeModelOptimizer(vae.named_parameters())
        if count > 1:
            optim.reduce = lambda flat: flat.mul_(3)
        for i, p in enumerate(vae.parameters()):
            p.grad = torch.full_like(p, float(i + 1))
        optim.begin(1e-3, 8 * count)
        optim(vae.parameters())
        grads.append([p.grad for p in vae.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two processes, and one of a single process."""
    folder = tmp_path_factory.mktemp("processes")
    status, _, err = finish(launch([*TRAIN, "--epochs", 12, "--out", folder / "two"]))
    assert status == 0, err
    alone([*TRAIN, "--epochs", 12, "--out", folder / "one"])
    return folder, err


def test_two_processes_learn_as_one_does(trained):
    folder, err = trained
    one, two = (Run(folder / name).read_metrics() for name in ("one", "two"))
    assert [m["step"] for m in one] == [m["step"] for m in two]
    assert len((folder / "two" / "metrics.jsonl").read_text().splitlines()) == 12  # one writer
    assert err.count("engine    ") == 1 and "2 processes" in err
    for a, b in zip(one, two, strict=True):
        # Another noise moves an epoch's mean by about a tenth of a nat.
        assert a["valid_elbo"] == pytest.approx(b["valid_elbo"], abs=0.4)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=0.4)
    # Both learnt: the tolerance is far below what was gained.
    assert one[-1]["valid_elbo"] > one[0]["valid_elbo"] + 1


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_shards_of_an_evaluation_give_the_numbers_of_one_process(trained, precision):
    folder, _ = trained
    arguments = ["evaluate", folder / "two", "--num-particles", 50, "--json", "--device", "cpu"]
    arguments += ["--precision", precision]
    status, out, err = finish(launch(arguments))
    assert status == 0, err
    sharded = json.loads(out)  # printed once
    test = cfg.data_of(Run(folder / "two")).test
    single = evaluate(cfg.load(folder / "two"), test, 50, precision=precision).to_dict()
    assert sharded["precision_shift"] == pytest.approx(single["precision_shift"])
    for name in ("log_likelihood", "elbo", "rate", "distortion", "psis_log_likelihood"):
        assert sharded[name] == pytest.approx(single[name], abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["svi", "traced"])
def test_resuming_several_processes_is_exact(tmp_path, engine):
    command = [*TRAIN, "--engine", engine]
    for name, epochs, more in (("two", 6, []), ("parts", 2, []), ("parts", 6, ["--resume"])):
        out = tmp_path / name
        status, _, err = finish(launch([*command, "--epochs", epochs, "--out", out, *more]))
        assert status == 0, err
    whole, parts = (load_checkpoint(tmp_path / n / "checkpoints/last.pt") for n in ("two", "parts"))
    for name, t in whole["model"].items():
        assert torch.equal(t, parts["model"][name]), name


@pytest.mark.slow
@pytest.mark.skipif(not compiling.has_compiler(), reason="needs a C++ compiler")
def test_two_processes_compiled_learn_as_one_does(trained):
    folder, _ = trained
    command = [*TRAIN, "--epochs", 12, "--engine", "compiled", "--out", folder / "compiled"]
    status, _, err = finish(launch(command), timeout=300)  # it compiles, twice
    assert status == 0, err
    assert err.count("engine    compiled") == 1
    one, two = (Run(folder / name).read_metrics() for name in ("one", "compiled"))
    for a, b in zip(one, two, strict=True):
        assert a["valid_elbo"] == pytest.approx(b["valid_elbo"], abs=0.4)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=0.4)


# What a process that has left the others still holds: its group, and the threads of the group.
LEAVES = """
import os, sys, weakref
import torch.distributed as dist
from pyrovae import cli, processes

groups = []
start = dist.init_process_group

def noted(*args, **options):
    start(*args, **options)
    groups.append(weakref.ref(dist.group.WORLD))

dist.init_process_group = noted
status = cli.main(sys.argv[1:])
[group] = groups
print("left" if group() is None and not dist.is_initialized() else "held")
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["svi", "compiled"])
def test_a_process_that_has_left_holds_no_threads(tmp_path, engine):
    """Threads that still held a tensor while Python ended aborted a job now and then."""
    if engine == "compiled" and not compiling.has_compiler():
        pytest.skip("needs a C++ compiler")
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    command = [*TRAIN, "--epochs", 1, "--engine", engine, "--out", tmp_path / "run"]
    status, out, err = finish(launch(command, program=[str(script)]), timeout=300)
    assert status == 0, err
    assert out.split() == ["left", "left"]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_and_the_run_resumes(tmp_path):
    out = tmp_path / "run"
    process = launch([*TRAIN, "--epochs", 5000, "--out", out], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints/last.pt").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        found = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        )
        victim = int(found.stdout.split()[-1])
        os.kill(victim, signal.SIGKILL)
        status, _, err = finish(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert status != 0
    assert "pyrovae: process" in err and "--resume" in err
    done = load_checkpoint(out / "checkpoints/last.pt")["state"]["epoch"]
    status, _, err = finish(launch([*TRAIN, "--epochs", done + 1, "--out", out, "--resume"]))
    assert status == 0, err
    assert Run(out).read_metrics()[-1]["epoch"] == done + 1


# The command, with a file for each process that has joined the others.
JOINS = """
import sys
from pathlib import Path
import torch.distributed as dist
from pyrovae import cli

start = dist.init_process_group

def noted(*args, **options):
    start(*args, **options)
    Path(sys.argv[1], str(dist.get_rank())).touch()

dist.init_process_group = noted
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_process_that_dies_in_an_evaluation_ends_it_with_a_line(trained, tmp_path):
    """The other one is at work on its own images, and waits for nobody."""
    script, there = tmp_path / "joins.py", tmp_path / "there"
    script.write_text(JOINS)
    there.mkdir()
    command = [there, "evaluate", trained[0] / "two", "--num-particles", 10**7, "--device", "cpu"]
    process = launch(command, program=[str(script)], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(there.iterdir())) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        time.sleep(5)
        found = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        )
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        status, out, err = finish(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (status, out) == (1, "")
    lines = [line for line in err.splitlines() if line.startswith("pyrovae: ")]
    assert len(lines) == 1 and "was told to end" in lines[0] and "again" in lines[0]


@pytest.mark.slow
def test_two_processes_read_their_own_images_from_disk(tmp_path):
    """A last batch of one image is left out by both, held or streamed."""
    images = torch.randint(0, 256, (98, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", images.to(torch.uint8).numpy())
    command = [*TRAIN, "--data", tmp_path / "x.npy", "--batch-size", 79, "--epochs", 3]
    command += ["--valid-size", 9, "--test-size", 9, "--engine", "svi"]
    for name, more in (("held", []), ("left", ["--stream", "--workers", 1])):
        status, _, err = finish(launch([*command, "--out", tmp_path / name, *more]))
        assert status == 0, err
    held, left = (load_checkpoint(tmp_path / n / "checkpoints/last.pt") for n in ("held", "left"))
    assert held["state"]["step"] == left["state"]["step"] == 6
    for name, t in held["model"].items():
        assert torch.equal(t, left["model"][name]), name


def test_a_parameter_that_no_program_uses_does_not_decay_between_two_graphs():
    """No gradient is not a gradient of zero, which weight decay would act on."""
    config = tiny_config()
    data = tiny_data(config)
    for reduce in (None, lambda flat: flat):
        vae = cfg.build(config, data)
        vae.spare = torch.nn.Parameter(torch.ones(3))
        optim = WholeModelOptimizer(vae.named_parameters(), "adamw", weight_decay=0.5)
        svi = traced_svi(vae, optim, split=data.train, reduce=reduce)
        before = next(vae.decoder.parameters()).detach().clone()
        optim.begin(0.1, 6)
        svi.step(torch.arange(6))
        assert vae.spare.equal(torch.ones(3))
        assert not next(vae.decoder.parameters()).equal(before)


def test_free_bits_of_several_processes_are_refused(monkeypatch):
    vae, data = tiny_vae()
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "copy_from_first", list)
    with pytest.raises(InputError, match="with one process"):
        fit(vae, data, epochs=1, free_bits=1.0, progress=False)
