"""`fit`: it learns, leaves nothing behind, resumes exactly, and says what went wrong."""

import json
import math
import warnings

import pyro
import pytest
import torch
from tiny import tiny_config, tiny_data, tiny_vae
from torch import nn

import pyrovae as pv
from pyrovae import compiling, importance, objectives
from pyrovae import config as cfg
from pyrovae.errors import InputError, NonFiniteLossError
from pyrovae.loop import Loop, State, copy_weights, first_bad_site, mix
from pyrovae.optimizers import OPTIMIZERS, WholeModelOptimizer, learning_rate
from pyrovae.runs import Run, load_checkpoint, save_checkpoint
from pyrovae.training import fit, resolve_device


def weights(vae):
    return copy_weights(vae)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_loss_falls_and_the_best_weights_are_kept():
    vae, data = tiny_vae()
    vae.decoder.start_at(torch.zeros(vae.likelihood.params_shape))  # far from the data
    history = fit(vae, data, epochs=60, batch_size=8, lr=1e-2)
    elbos = [m["valid_elbo"] for m in history.metrics]
    assert history.metrics[-1]["train_loss"] < history.metrics[0]["train_loss"] - 0.5
    assert history.best_elbo == max(elbos)
    assert history.best_epoch == 1 + elbos.index(max(elbos))
    assert history.stopped == "epochs"
    assert [m["epoch"] for m in history.metrics] == list(range(1, 61))
    again = fit(vae, data, epochs=1, batch_size=8, lr=1e-30)  # validates the weights as they are
    assert again.best_elbo == pytest.approx(history.best_elbo, abs=1e-4)


def test_validation_is_of_every_image_with_one_noise(monkeypatch):
    """However the split is cut, and on the same x each time, where its x are drawn."""
    vae, data = tiny_vae()
    settings = {"epochs": 2, "lr": 1e-30, "seed": 3}
    fixed = data.valid.tensor()
    (terms,) = importance.chunks(vae.model, vae.guide, fixed, 1, chunk=1, seed=mix(3, "valid"))
    history = fit(vae, data, **settings).metrics
    monkeypatch.setattr(importance, "plan", lambda *_: importance.Plan(3, 1))
    for metrics in (*history, *fit(vae, data, **settings).metrics):
        assert metrics["valid_elbo"] == pytest.approx(float(terms.log_weights.mean()), rel=1e-6)
    drawn = data._replace(valid=data.train)
    assert drawn.valid.sampling == "bernoulli"
    one, two = (m["valid_elbo"] for m in fit(vae, drawn, **settings).metrics)
    assert one == two


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_every_parameter(name):
    vae, data = tiny_vae()
    before = weights(vae)
    fit(vae, data, epochs=1, optimizer=name, weight_decay=1e-3)
    assert all(not torch.equal(p, before[n]) for n, p in vae.named_parameters())


def test_two_vaes_in_one_process_both_train():
    a, data = tiny_vae(seed=0)
    b, _ = tiny_vae(seed=1)
    losses = []
    for vae in (a, b, a):
        before = weights(vae)
        first = fit(vae, data, epochs=40, lr=1e-2, batch_size=8).metrics
        moved = [not torch.equal(p, before[n]) for n, p in vae.named_parameters()]
        assert all(moved)
        early = sum(m["train_loss"] for m in first[:5])
        if vae is b or not losses:  # the second round of `a` starts where its first ended
            assert sum(m["train_loss"] for m in first[-5:]) < early - 0.5
        losses.append(early)


def test_two_vaes_train_in_a_users_own_svi_loop_with_one_parameter_store():
    from pyro.infer import SVI, Trace_ELBO
    from pyro.optim import Adam

    with pyro.get_param_store().scope():
        for seed in (0, 1):
            vae, data = tiny_vae(seed=seed)
            before = weights(vae)
            svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO())
            svi.step(data.test.tensor())
            assert all(not torch.equal(p, before[n]) for n, p in vae.named_parameters())


def test_nothing_global_changes():
    vae, data = tiny_vae()
    pyro.param("mine", torch.tensor(1.0))
    try:
        stream = torch.get_rng_state()
        validation = torch.distributions.Distribution._validate_args
        filters = list(warnings.filters)
        fit(vae, data, epochs=1)
        assert torch.equal(torch.get_rng_state(), stream)
        assert torch.distributions.Distribution._validate_args == validation
        assert list(pyro.get_param_store().keys()) == ["mine"]
        assert warnings.filters == filters
        assert torch.get_default_dtype() == torch.float32
    finally:
        pyro.clear_param_store()


def test_same_seed_same_weights_and_another_seed_others():
    results = []
    for seed in (0, 0, 1):
        vae, data = tiny_vae()
        torch.manual_seed(seed * 100 + len(results))  # the caller's stream must not matter
        fit(vae, data, epochs=2, seed=seed)
        results.append(weights(vae))
    assert_equal(results[0], results[1])
    assert any(not torch.equal(results[0][n], results[2][n]) for n in results[0])


SETTINGS = {
    "plain": {},
    "ema": {"ema": 0.9},
    "clip": {"clip_norm": 0.5, "optimizer": "adamw", "weight_decay": 0.01},
    "cosine": {"schedule": "cosine", "schedule_epochs": 6},
    "warm": {"kl_warmup": 3.0, "free_bits": 0.5},
    "iwae": {"objective": objectives.iwae(3), "optimizer": "adamax"},
    "stages": {
        "schedule": "iwae",
        "warmup_epochs": 0.75,
        "adam_betas": (0.99, 0.9),
        "adam_eps": 1e-4,
        "validate_every": 2,
    },
}


def final(run):
    state = load_checkpoint(run.last)
    return {k: state[k] for k in ("model", "ema", "optimizer", "state")}


def flat(value, name=""):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), name)
    return {name: value}


def assert_same_state(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name.endswith("/seconds"):
            continue
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_resume_is_exact(tmp_path, settings):
    straight, parts = Run(tmp_path / "straight"), Run(tmp_path / "parts")
    vae, data = tiny_vae()
    whole = fit(vae, data, epochs=4, batch_size=10, run=straight, **settings)
    kept = weights(vae)
    vae, data = tiny_vae()
    fit(vae, data, epochs=2, batch_size=10, run=parts, **settings)
    vae, data = tiny_vae(seed=5)  # other weights: all must come from the checkpoint
    resumed = fit(vae, data, epochs=4, batch_size=10, run=parts, resume=True, **settings)
    assert_same_state(final(straight), final(parts))
    assert_equal(kept, weights(vae))
    assert resumed.best_elbo == whole.best_elbo
    for ours, theirs in zip(resumed.metrics, whole.metrics, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {
            k: v for k, v in theirs.items() if k != "seconds"
        }
    assert resumed.metrics == parts.read_metrics()


@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_resume_is_exact_from_the_middle_of_an_epoch(tmp_path, steps):
    straight, parts = Run(tmp_path / "straight"), Run(tmp_path / "parts")
    vae, data = tiny_vae()
    fit(vae, data, epochs=3, batch_size=10, run=straight, ema=0.9)
    vae, data = tiny_vae()
    countdown = iter([False] * (steps - 1) + [True])
    stopped = fit(
        vae, data, epochs=3, batch_size=10, run=parts, ema=0.9, should_stop=countdown.__next__
    )
    assert stopped.stopped == "interrupted"
    assert load_checkpoint(parts.last)["state"]["step"] == steps
    vae, data = tiny_vae(seed=5)
    fit(vae, data, epochs=3, batch_size=10, run=parts, ema=0.9, resume=True)
    assert_same_state(final(straight), final(parts))


def test_resume_forgets_metrics_of_epochs_after_the_checkpoint(tmp_path):
    run = Run(tmp_path)
    vae, data = tiny_vae()
    fit(vae, data, epochs=2, run=run)
    run.append_metrics({"epoch": 3, "valid_elbo": 0.0})  # written, then killed before the save
    fit(vae, data, epochs=3, run=run, resume=True)
    assert [m["epoch"] for m in run.read_metrics()] == [1, 2, 3]


def test_no_line_of_metrics_is_lost_with_a_killed_process(tmp_path, monkeypatch):
    run = Run(tmp_path)
    vae, data = tiny_vae()
    append = Run.append_metrics

    def killed(self, metrics):
        if metrics["epoch"] == 2:
            raise KeyboardInterrupt
        append(self, metrics)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "append_metrics", killed)
        fit(vae, data, epochs=3, run=run)
    fit(vae, data, epochs=3, run=run, resume=True)
    assert [m["epoch"] for m in run.read_metrics()] == [1, 2, 3]


def test_an_epoch_interrupted_after_its_last_step_has_its_metrics(tmp_path):
    settings = {"epochs": 2, "batch_size": 10, "kl_warmup": 4, "beta": 0.5}
    vae, data = tiny_vae()
    steps = -(-len(data.train) // 10)
    whole = fit(vae, data, **settings).metrics[0]
    done = iter(range(1, 1000))
    vae, data = tiny_vae()
    fit(vae, data, run=tmp_path, should_stop=lambda: next(done) == steps, **settings)
    resumed = fit(vae, data, run=tmp_path, resume=True, **settings).metrics[0]
    assert resumed["epoch"] == 1
    assert resumed["kl_weight"] == whole["kl_weight"] < 0.5
    assert resumed["train_loss"] == whole["train_loss"]


def test_a_run_is_not_written_over_and_keeps_its_plan(tmp_path):
    vae, data = tiny_vae()
    fit(vae, data, epochs=1, schedule="cosine", run=tmp_path)
    with pytest.raises(InputError, match="already holds a run; give resume=True"):
        fit(vae, data, epochs=1, run=tmp_path)
    for other, says in (
        ({"epochs": 2, "schedule": "cosine"}, "schedule_epochs=1; resume with that, not 2"),
        ({"epochs": 2}, "schedule='cosine'"),
        ({"epochs": 1, "schedule": "cosine", "optimizer": "shampoo"}, "optimizer='adam'"),
    ):
        with pytest.raises(InputError, match=says):
            fit(vae, data, run=tmp_path, resume=True, **other)


def test_a_compiled_run_goes_on_without_a_compiler(tmp_path, monkeypatch):
    vae, data = tiny_vae()
    fit(vae, data, epochs=1, engine="traced", run=tmp_path)
    last = Run(tmp_path).last
    saved = load_checkpoint(last)
    # As a checkpoint of an earlier version, which kept a stream for the engine.
    stream = torch.Generator().get_state()
    saved["engine"] = {"mode": "cuda-graph", "by_index": True, "device": "cpu", "stream": stream}
    saved["engine_stream"] = stream
    save_checkpoint(last, saved)
    monkeypatch.setattr(compiling, "has_compiler", lambda: False)
    assert len(fit(vae, data, epochs=2, run=tmp_path, resume=True).metrics) == 2


def test_validation_that_is_never_finite_is_said(monkeypatch):
    vae, data = tiny_vae()
    worst = {"valid_elbo": -math.inf, "valid_rate": math.inf, "valid_distortion": 0.0}
    monkeypatch.setattr(Loop, "_validate", lambda self, seed: worst)
    lines = []
    assert fit(vae, data, epochs=1, engine="svi", say=lines.append).best_epoch == 0
    assert "no validation ELBO was finite" in lines[-1]


def test_resume_of_another_model_is_refused(tmp_path):
    vae, data = tiny_vae()
    fit(vae, data, epochs=1, run=tmp_path)
    other, _ = tiny_vae(hidden=(9,))
    with pytest.raises(InputError, match="does not fit this VAE"):
        fit(other, data, epochs=2, run=tmp_path, resume=True)
    with pytest.raises(InputError, match="another --ema"):
        fit(vae, data, epochs=2, run=tmp_path, resume=True, ema=0.9)
    with pytest.raises(InputError, match="needs run="):
        fit(vae, data, epochs=2, resume=True)


def test_early_stopping():
    vae, data = tiny_vae()
    history = fit(vae, data, epochs=200, lr=0.05, batch_size=8, patience=3)
    assert history.stopped == "patience"
    assert len(history.metrics) == history.best_epoch + 3


def test_averaged_weights_are_the_average_and_are_what_is_kept(tmp_path):
    vae, data = tiny_vae()
    expected = weights(vae)
    seen = []
    # (1 + t) / (10 + t), up to the 0.4 that is asked for, from the fifth step on.
    decays = [2 / 11, 3 / 12, 4 / 13, 5 / 14, *[0.4] * 20]

    def watch():
        for name, t in weights(vae).items():
            expected[name].lerp_(t, 1 - decays[len(seen)])
        seen.append(1)
        return False

    fit(vae, data, epochs=1, batch_size=3, ema=0.4, run=tmp_path, should_stop=watch)
    assert len(seen) > 5
    assert_equal(weights(vae), expected)
    assert_equal(load_checkpoint(Run(tmp_path).best)["model"], expected)
    raw = load_checkpoint(Run(tmp_path).last)["model"]
    assert any(not torch.equal(raw[n], expected[n]) for n in raw)


def test_schedule_and_warmup_reach_the_steps():
    vae, data = tiny_vae()
    history = fit(vae, data, epochs=4, batch_size=8, schedule="cosine", kl_warmup=2.0, beta=3.0)
    per_epoch = -(-len(data.train) // 8)
    rates = [m["lr"] for m in history.metrics]
    expected = [
        1e-3 * 0.5 * (1 + math.cos(math.pi * (e * per_epoch - 1) / (4 * per_epoch)))
        for e in (1, 2, 3, 4)
    ]
    assert rates == pytest.approx(expected)
    kl = [m["kl_weight"] for m in history.metrics]
    assert kl == pytest.approx(
        [3 * (per_epoch - 1) / (2 * per_epoch), 3 * (2 * per_epoch - 1) / (2 * per_epoch), 3, 3]
    )
    assert learning_rate("constant", 0.1, 5, 10) == 0.1


def test_gradients_are_those_of_the_mean_loss_and_are_clipped_as_a_whole():
    module = nn.Linear(3, 1)
    optimizer = WholeModelOptimizer(module.named_parameters(), clip_norm=0.5)
    for p in module.parameters():
        p.grad = torch.full_like(p, 10.0)
    optimizer.begin(lr=0.0, images=2)
    optimizer(set())
    total = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in module.parameters()))
    assert total == pytest.approx(0.5, rel=1e-4)
    unclipped = WholeModelOptimizer(module.named_parameters())
    for p in module.parameters():
        p.grad = torch.full_like(p, 10.0)
    unclipped.begin(lr=0.0, images=4)
    unclipped(set())
    assert all(torch.all(p.grad == 2.5) for p in module.parameters())
    with pytest.raises(InputError, match="one of adam"):
        WholeModelOptimizer(module.named_parameters(), "sgd")


def test_a_nan_weight_stops_training_at_once_and_names_the_site(tmp_path):
    vae, data = tiny_vae()
    fit(vae, data, epochs=1, run=tmp_path)
    with torch.no_grad():
        next(iter(vae.decoder.parameters())).fill_(math.nan)
    before = weights(vae)
    with pytest.raises(NonFiniteLossError, match=r"step 1 \(epoch 1\).*site 'x' of the model"):
        fit(vae, data, epochs=1)
    for name, t in weights(vae).items():
        torch.testing.assert_close(t, before[name], equal_nan=True)


def test_a_nan_in_the_encoder_is_blamed_on_the_guide():
    vae, data = tiny_vae()
    with torch.no_grad():
        list(vae.posterior.parameters())[-1].fill_(math.inf)
    with pytest.raises(NonFiniteLossError, match="site 'z' of the guide"):
        fit(vae, data, epochs=1)


def test_divergence_names_the_last_good_checkpoint(tmp_path):
    vae, data = tiny_vae(likelihood="gaussian", likelihood_args={"scale": 1e-3})
    fit(vae, data, epochs=1, run=tmp_path)

    def poison(metrics):
        with torch.no_grad():
            next(iter(vae.decoder.parameters())).fill_(math.nan)

    with pytest.raises(NonFiniteLossError, match=r"last\.pt \(epoch 2\)"):
        fit(vae, data, epochs=3, run=tmp_path, resume=True, callback=poison)
    assert first_bad_site(vae.model, vae.guide, data.test.tensor()).startswith("site 'x'")


def test_callback_receives_each_epoch_and_files_are_written(tmp_path):
    vae, data = tiny_vae()
    seen = []
    fit(vae, data, epochs=3, run=tmp_path, callback=seen.append)
    assert seen == Run(tmp_path).read_metrics()
    assert set(seen[0]) >= {"epoch", "step", "train_loss", "valid_elbo", "lr", "seconds"}
    assert seen[0]["valid_elbo"] == pytest.approx(
        -(seen[0]["valid_rate"] + seen[0]["valid_distortion"])
    )
    leftovers = [p.name for p in tmp_path.rglob("*") if ".tmp" in p.name]
    assert leftovers == []
    assert {p.name for p in tmp_path.rglob("*.pt")} == {"last.pt", "best.pt"}
    json.dumps(State().__dict__ | {"best_elbo": 0.0})


BAD = {
    "epochs": 0,
    "batch_size": 0,
    "lr": -1.0,
    "clip_norm": 0.0,
    "ema": 1.0,
    "patience": 0,
    "beta": -0.5,
    "kl_warmup": -1.0,
    "free_bits": -1.0,
    "weight_decay": -1.0,
    "schedule": "linear",
    "schedule_epochs": 0,
    "warmup_epochs": -0.5,
    "adam_betas": (0.9, 1.0),
    "adam_eps": 0.0,
    "validate_every": 0,
    "optimizer": "sgd",
    "device": "tpu",
}


@pytest.mark.parametrize("name", BAD)
def test_settings_out_of_range_are_refused(name):
    vae, data = tiny_vae()
    with pytest.raises(InputError, match=f"{name}|device"):
        fit(vae, data, **{name: BAD[name]})


def test_grey_images_are_refused_by_bernoulli_before_the_first_step():
    vae, _ = tiny_vae()
    grey = tiny_data(tiny_config(likelihood="gaussian"))
    with pytest.raises(InputError, match="Binarise the data"):
        fit(vae, grey)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(InputError, match="sees no CUDA device"):
            resolve_device("cuda")


def test_config_and_fit_have_the_same_defaults():
    import inspect

    ours = {n: p.default for n, p in inspect.signature(fit).parameters.items()}
    config = cfg.TrainConfig()
    shared = [n for n in ours if hasattr(config, n) and n not in ("objective", "data")]
    assert len(shared) >= 14
    assert {n: ours[n] for n in shared} == {n: getattr(config, n) for n in shared}


def test_top_level_names():
    assert pv.fit is fit
    assert pv.VAE.__name__ == "VAE"
