"""README.md does what it says: its Python runs, its commands are understood, its table is true."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from pyrovae import cli
from pyrovae import config as cfg
from pyrovae.likelihoods import REGISTRY
from pyrovae.parser import COMMANDS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")

# Flags put behind a command, where the last one counts, so that it is quick.
QUICK = {
    "train": "--epochs 1 --hidden 8 --final-particles 2 --quiet",
    "evaluate": "--num-particles 5 --quiet",
    "anneal": "--num-images 2 --num-chains 2 --num-temperatures 5 --quiet",
    "compare": "--num-particles 5 --quiet",
    "report": "--num-particles 5 --quiet",
}
HEAD = ["`--likelihood`", "kind", "support", "source"]


class Block(NamedTuple):
    """A fenced block and the line of the page that it starts on."""

    language: str
    text: str
    line: int


def blocks(language: str) -> list[Block]:
    """Every fenced block of a language, in order."""
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    everything = [Block(m[1], m[2], README[: m.start()].count("\n") + 2) for m in found]
    return [b for b in everything if b.language == language]


def commands() -> list[list[str]]:
    """The arguments of every pyrovae command of the page, in order."""
    lines = "\n".join(b.text for b in blocks("bash")).splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    words = [shlex.split(part, comments=True) for part in parts]
    return [w[1:] for w in words if w and w[0] == "pyrovae"]


PYTHON = blocks("python")


@pytest.mark.parametrize("block", PYTHON, ids=[f"line {b.line}" for b in PYTHON])
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile("\n" * (block.line - 1) + block.text, "README.md", "exec"), names)


def test_names_in_the_text_are_there_at_once() -> None:
    """In a process of its own: modules that other tests have imported are attributes here."""
    found = sorted(set(re.findall(r"\bpv(?:\.\w+)+", README)))
    assert "pv.acceleration.CompiledSVI" in found
    lines = ["import pyrovae as pv", *found]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_command_is_understood(argv: list[str]) -> None:
    if argv == ["--version"]:
        return
    args = cli.parse(argv)
    kind = COMMANDS[args.command].settings
    if kind is None:
        return
    if "--config" in argv:  # its file is read where the commands are run
        args.config = None
    checked = cfg.make(kind, cli.settings(args, kind))
    if args.command == "train":
        cfg.resolve(checked)


def test_torchrun_is_given_commands_that_are_understood() -> None:
    """tests/test_processes.py runs such commands, in two processes."""
    lines = [line for block in blocks("bash") for line in block.text.splitlines()]
    shared = [shlex.split(line) for line in lines if line.startswith("torchrun ")]
    assert [argv[:5] for argv in shared] == 2 * [
        ["torchrun", "--nproc-per-node", "2", "-m", "pyrovae"]
    ]
    for argv in shared:
        cli.parse(argv[5:])


def test_every_command_is_shown() -> None:
    assert {argv[0] for argv in commands()} - {"--version"} == set(COMMANDS)


def bring_images() -> None:
    """Put what the page's reader has into this folder: photographs, an array, MNIST's files."""
    rng = np.random.default_rng(0)
    Path("photographs").mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (70, 70, 3), np.uint8)).save(f"photographs/{i}.png")
    np.save("my-images.npy", rng.integers(0, 17, (5, 8, 8)).astype(np.float32) / 16)
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    # Of MNIST's own size, for its published split; files that are here are not fetched.
    for name, n in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 10:18, 10:18] = rng.integers(0, 256, (n, 8, 8), np.uint8)
        head = np.array([0x803, n, 28, 28], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = np.array([0x801, n], ">i4").tobytes() + bytes(n)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)


def test_commands_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("toml"):
        name = block.text.splitlines()[0].removeprefix("# ")
        Path(name).write_text(block.text, encoding="utf-8")
    bring_images()
    for argv in commands():
        if argv == ["--version"]:
            with pytest.raises(SystemExit) as stopped:
                cli.main(argv)
            status: Any = stopped.value.code
        else:
            resumed = "--resume" in argv  # which may not change the network, and needs its epochs
            quick = "" if resumed else QUICK.get(argv[0], "")
            if "autoencoder" in argv:  # which has no log p(x) to estimate
                quick = quick.replace("--final-particles 2", "")
            status = cli.main([*argv, *quick.split()])
        out, err = capsys.readouterr()
        assert status == 0, (argv, err)
        assert out, argv
    first = shlex.split(blocks("bash")[0].text)
    assert first[-2:] == ["--out", "runs/first"]
    for name in ("config.json", "samples.png", "reconstructions.png", "evaluation.json"):
        assert (tmp_path / "runs/first" / name).is_file()
    for argv in commands():
        if "--out" in argv:
            assert (tmp_path / argv[argv.index("--out") + 1]).exists(), argv


def test_first_two_blocks_are_the_promised_commands() -> None:
    first, second, *_ = blocks("bash")
    assert first.text.startswith("pip install -e . && pyrovae train ")
    assert first.text.count("\n") == 1
    assert shlex.split(first.text)[shlex.split(first.text).index("--final-particles") + 1] == "1000"
    assert second.text == "pip install -e '.[test]' && pytest\n"


def test_table_of_likelihoods_is_the_registry() -> None:
    section = README.split("## The likelihoods")[1].split("\n## ")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines()]
    table = {row[0].strip("`"): row[1:] for row in rows[rows.index(HEAD) + 2 :] if len(row) == 4}
    assert list(table) == list(REGISTRY)
    for name, (kind, support, source) in table.items():
        likelihood = REGISTRY[name]
        assert (kind, support) == (likelihood.kind, likelihood.support)
        doc = " ".join((likelihood.__doc__ or "").split())
        year = re.search(r"\((\d{4})\)", source)
        assert year, f"{name}: no year"
        assert year[1] in doc, f"{name}: another year than the docstring's"
        for address in re.findall(r"https://[^)]+", source):
            assert address in doc, f"{name}: another address than the docstring's"


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (root / link).is_file(), link


@pytest.mark.parametrize("kind", ["likelihood", "prior", "posterior", "network", "objective"])
def test_counts_are_right(kind: str) -> None:
    numbers = {3: "three", 4: "four", 5: "five", 6: "six", 10: "ten"}
    word = numbers[len(cfg.NAMES[kind])]
    plural = f"{kind}s" if kind != "likelihood" else "likelihoods"
    assert re.search(rf"\b{word}\s+{plural}\b", README, re.IGNORECASE)


def test_every_data_set_is_named() -> None:
    for name in cfg.NAMES["data"]:
        assert f"`{name}`" in README
