"""Presets: what they hold, that flags override them, and what a run stores."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from refusal import is_refusal
from shell import shell

from pyrovae import cli
from pyrovae import config as cfg
from pyrovae.presets import PRESETS
from pyrovae.report import train_flags

QUICK = "--data digits --valid-size 100 --hidden 8 --epochs 2 --final-particles 0 --quiet"


def resolved(words: str) -> cfg.TrainConfig:
    """The configuration that a command line comes to."""
    args = cli.parse(["train", *words.split()])
    given = cfg.with_preset(cli.settings(args, cfg.TrainConfig))
    return cfg.resolve(cfg.make(cfg.TrainConfig, given))


def test_the_names_are_those_of_the_flag() -> None:
    assert tuple(PRESETS) == cfg.NAMES["preset"]


@pytest.mark.parametrize("name", PRESETS)
def test_each_resolves_to_what_it_says(name: str) -> None:
    config = resolved(f"--preset {name}")
    assert config.preset == name
    for setting, value in PRESETS[name].settings.items():
        assert getattr(config, setting) == value, setting
    assert resolved("").preset is None


def test_the_released_protocol() -> None:
    """As yburda/iwae has it."""
    c = resolved("--preset iwae --objective iwae --num-particles 50")
    assert (c.hidden, c.latent_dim, c.activation, c.batch_size) == ((200, 200), 50, "tanh", 20)
    assert (c.optimizer, c.lr, c.adam_betas) == ("adam", 1e-3, (0.99, 0.999))
    assert c.adam_eps == pytest.approx(1e-4 / 20)  # of gradients summed over a batch, there
    images = 60_000 - (c.valid_size or 0)
    assert images % c.batch_size == 0 and images // c.batch_size * c.epochs == 9_774_400
    assert (c.schedule, c.epochs, c.binarize) == ("iwae", sum(3**i for i in range(8)), "dynamic")
    two = resolved("--preset iwae-2layer")
    assert (two.model, two.model_args["latents"]) == ("hierarchical", [100, 50])


def test_flags_override_a_preset_and_defaults_given_do_too() -> None:
    config = resolved("--preset iwae --batch-size 100 --schedule constant --adam-betas 0.9 0.999")
    assert (config.batch_size, config.schedule, config.adam_betas) == (
        100,
        "constant",
        (0.9, 0.999),
    )
    assert config.adam_eps == 5e-6


def test_a_file_may_name_one(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('preset = "exemplar"\nlatent-dim = 8\n', encoding="utf-8")
    config = resolved(f"--config {file} --patience 7")
    assert (config.network, config.latent_dim, config.patience) == ("gated-mlp", 8, 7)


def test_a_run_stores_the_values_and_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = shell(f"train --preset iwae {QUICK} --out a")
    assert done.status == 0, done.err
    stored: dict[str, Any] = json.loads((tmp_path / "a/config.json").read_text(encoding="utf-8"))
    assert (stored["preset"], stored["batch_size"], stored["epochs"]) == ("iwae", 20, 2)
    assert stored["adam_betas"] == [0.99, 0.999]
    # The stages are those of the epochs themselves, so more of them may follow.
    for words in ("--epochs 4", "--preset iwae --epochs 6"):
        done = shell(f"train {words} --quiet --out a --resume")
        assert done.status == 0, done.err
    stored = json.loads((tmp_path / "a/config.json").read_text(encoding="utf-8"))
    assert (stored["epochs"], stored["batch_size"]) == (6, 20)
    assert shell("info a").status == 0
    for words, says in (
        ("--preset modern", "trained with preset='iwae'"),
        ("--preset iwae --batch-size 30", "trained with batch_size=20"),
    ):
        done = shell(f"train {words} --quiet --out a --resume")
        is_refusal(done.status, done.out, done.err, says)


def test_info_lists_them() -> None:
    done = shell("info presets")
    assert done.status == 0
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert "--adam-betas 0.99 0.999" in lines[0]


def test_the_flags_of_a_report_need_no_preset() -> None:
    config = resolved("--preset iwae --adam-eps 1e-8 --schedule constant")  # which are the defaults
    args = cli.parse(["train", *shlex.split(train_flags(config))])
    again = cfg.resolve(cfg.make(cfg.TrainConfig, cli.settings(args, cfg.TrainConfig)))
    assert dataclasses.replace(config, preset=None) == again
