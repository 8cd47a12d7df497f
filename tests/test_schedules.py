"""The learning rate at every step, Adam's settings, and validation now and then."""

import math

import pytest
import torch
from tiny import tiny_vae

from pyrovae.errors import InputError
from pyrovae.loop import copy_weights
from pyrovae.optimizers import learning_rate
from pyrovae.training import fit


def test_the_published_stages() -> None:
    published = [1e-4 * round(10 ** (1 - (i - 1) / 7), 1) for i in range(1, 9)]
    assert published[0] == pytest.approx(1e-3)
    rates = [rate for i, rate in enumerate(published) for _ in range(3**i)]
    assert len(rates) == 3280
    for per_epoch in (1, 7):
        for epoch in range(0, 3280, 1 if per_epoch == 1 else 3):
            for step in {epoch * per_epoch, epoch * per_epoch + per_epoch - 1}:
                got = learning_rate("iwae", 1e-3, step, 10, steps_per_epoch=per_epoch)
                assert got == pytest.approx(rates[epoch], rel=1e-12), (epoch, step)
    assert learning_rate("iwae", 1e-3, 5000, 10) == pytest.approx(1e-4)  # and stays there
    assert learning_rate("iwae", 2e-2, 1, 10) == pytest.approx(2e-2 * 0.72)


def test_cosine_falls_to_nought_at_the_end_of_the_plan() -> None:
    for step in range(30):
        expected = 0.3 * (1 + math.cos(math.pi * min(step, 20) / 20)) / 2
        assert learning_rate("cosine", 0.3, step, 20) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "iwae"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0, 4.0, 6.5])
def test_warmup_goes_before_every_schedule(schedule: str, warmup: float) -> None:
    def rate(step: float, total: float, warmup: float = 0.0) -> float:
        return learning_rate(
            schedule,
            1.0,
            step,  # type: ignore[arg-type]
            total,  # type: ignore[arg-type]
            steps_per_epoch=3,
            warmup_steps=warmup,
        )

    for step in range(25):
        if step + 1 < warmup:
            expected = (step + 1) / warmup
        else:
            expected = rate(max(step - warmup, 0.0), 20 - warmup)
        assert rate(step, 20, warmup) == pytest.approx(expected, abs=1e-15)
    assert rate(0, 20, warmup) > 0  # no step is wasted


def test_settings_of_adam_reach_the_steps() -> None:
    def after(**settings: object) -> dict[str, torch.Tensor]:
        vae, data = tiny_vae()
        fit(vae, data, epochs=1, batch_size=8, **settings)  # type: ignore[arg-type]
        return copy_weights(vae)

    plain = after()
    for settings in ({"adam_betas": (0.5, 0.999)}, {"adam_betas": (0.9, 0.5)}, {"adam_eps": 0.1}):
        assert any(not torch.equal(plain[n], t) for n, t in after(**settings).items()), settings
    # With an eps that drowns the root, the first step is lr g / eps: tiny.
    moved = after(adam_eps=1e6)
    start = copy_weights(tiny_vae()[0])
    assert all(torch.allclose(start[n], t, atol=1e-6) for n, t in moved.items())


def test_validation_now_and_then_and_at_the_end() -> None:
    vae, data = tiny_vae()
    every = fit(vae, data, epochs=8, batch_size=16, lr=1e-2).metrics
    vae, data = tiny_vae()
    history = fit(vae, data, epochs=8, batch_size=16, lr=1e-2, validate_every=3)
    validated = [m["epoch"] for m in history.metrics if "valid_elbo" in m]
    assert validated == [3, 6, 8]
    assert history.best_epoch == max(validated, key=lambda e: every[e - 1]["valid_elbo"])
    for ours, theirs in zip(history.metrics, every, strict=True):
        assert ours["train_loss"] == theirs["train_loss"]
        assert ours.get("valid_elbo", theirs["valid_elbo"]) == theirs["valid_elbo"]


def test_patience_counts_epochs_and_is_asked_after_a_validation() -> None:
    vae, data = tiny_vae()
    history = fit(vae, data, epochs=200, lr=0.05, batch_size=8, patience=3, validate_every=2)
    assert history.stopped == "patience"
    assert len(history.metrics) == history.best_epoch + 4
    assert "valid_elbo" in history.metrics[-1]


def test_a_last_epoch_out_of_turn_cannot_be_built_upon(tmp_path) -> None:  # type: ignore[no-untyped-def]
    vae, data = tiny_vae()
    fit(vae, data, epochs=3, lr=1e-2, validate_every=2, run=tmp_path / "a")
    with pytest.raises(InputError, match="multiple of --validate-every"):
        fit(vae, data, epochs=4, lr=1e-2, validate_every=2, run=tmp_path / "a", resume=True)
    again = fit(vae, data, epochs=3, lr=1e-2, validate_every=2, run=tmp_path / "a", resume=True)
    assert again.best_epoch == 3


def test_what_clashes_is_refused() -> None:
    vae, data = tiny_vae()
    with pytest.raises(InputError, match="leave room"):
        fit(vae, data, epochs=2, schedule="cosine", warmup_epochs=2.0)
    with pytest.raises(InputError, match="adamax"):
        fit(vae, data, epochs=2, optimizer="adamax", adam_eps=1e-4)
    with pytest.raises(InputError, match="two numbers"):
        fit(vae, data, epochs=2, adam_betas=(0.9,))
    fit(vae, data, epochs=1, schedule="constant", warmup_epochs=5.0)  # ends within its warm-up
