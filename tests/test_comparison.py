"""The table of `compare`, against hand computation; what it keeps, and what it refuses."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from pyrovae import comparison
from pyrovae import config as cfg
from pyrovae.comparison import compare, evaluate_run, run_split, why_not_comparable
from pyrovae.data import Protocol
from pyrovae.errors import InputError
from pyrovae.evaluation import evaluate
from pyrovae.proposals import Proposal
from pyrovae.runs import Run, load_checkpoint, save_checkpoint


def write_images(path, seed=0, levels=255, n=60, shape=(4, 4)):
    """Grey images in a .npz."""
    images = np.random.RandomState(seed).randint(0, levels + 1, (n, *shape)).astype(np.uint8)
    np.savez(path, images=images, levels=levels)
    return path


def write_run(path, data, weights=None, seconds=None, **changes):
    """A run directory with untrained weights, as `pyrovae train` writes it."""
    values = {"data": str(data), "hidden": (8,), "latent_dim": 2, "valid_size": 8} | changes
    config = cfg.resolve(cfg.make(cfg.TrainConfig, values))
    dataset = cfg.load_data(config)
    vae = cfg.build(config, dataset)
    if weights is not None:
        with torch.no_grad():
            for p in vae.parameters():
                p.fill_(weights)
    run = Run(path)
    run.write_json("config.json", dataclasses.asdict(config))
    facts = {"x_shape": list(dataset.x_shape), "protocol": dataset.protocol.to_dict()}
    run.write_json("data.json", facts)
    save_checkpoint(run.best, {"model": vae.state_dict()})
    for epoch, total in enumerate(seconds or (), 1):
        run.append_metrics({"epoch": epoch, "seconds": total})
    return run


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images.npz")


@pytest.fixture
def pair(tmp_path, images):
    return [
        write_run(tmp_path / "a", images, seed=0, seconds=(1.5, 4.0)),
        write_run(tmp_path / "b", images, seed=1, hidden=(16,)),
    ]


def test_paired_differences_by_hand(pair):
    table = compare(pair, num_particles=30)
    values = {}
    for run in pair:
        split = run_split(run, "test")
        values[run.path.name] = evaluate(cfg.load(run), split, 30)
    order = sorted(values, key=lambda name: -values[name].log_likelihood)
    assert [row.run for row in table.rows] == order
    best, other = (values[name].per_image.log_likelihood.numpy() for name in order)
    first, second = table.rows
    assert (first.difference, first.difference_se) == (0, 0)
    n = len(best)
    assert n == table.num_images == 6
    assert second.difference == pytest.approx(np.mean(other - best), rel=1e-10)
    se = np.std(other - best, ddof=1) / np.sqrt(n)
    assert second.difference_se == pytest.approx(se, rel=1e-10)
    np.testing.assert_allclose(second.per_image_difference, other - best, rtol=1e-10)
    for row in table.rows:
        e = values[row.run]
        for name in ("log_likelihood", "log_likelihood_se", "elbo", "elbo_se", "rate"):
            assert getattr(row, name) == pytest.approx(getattr(e, name), rel=1e-10)
        for name in ("distortion", "bits_per_dim", "active_units", "pareto_k_median"):
            assert getattr(row, name) == pytest.approx(getattr(e, name), rel=1e-10)
        vae = cfg.load(pair[0].path.parent / row.run)
        assert row.parameters == sum(p.numel() for p in vae.parameters())
    assert {row.run: row.training_seconds for row in table.rows} == {"a": 4.0, "b": None}


def test_pairing_is_what_makes_the_error_small(tmp_path, images):
    """Two models of nearly equal weights differ by far less than either mean is uncertain."""
    a = write_run(tmp_path / "a", images, seed=0)
    b = write_run(tmp_path / "b", images, seed=0)
    state = load_checkpoint(b.best)["model"]
    save_checkpoint(b.best, {"model": {k: v * 1.001 for k, v in state.items()}})
    row = compare([a, b], num_particles=50).rows[1]
    assert 0 < row.difference_se < 0.01 * row.log_likelihood_se


def test_masses_and_densities_on_one_scale(tmp_path, images):
    """With all weights zero both models are uniform, 256 ** -16 a picture, with one posterior."""
    runs = [
        write_run(tmp_path / name, images, weights=0.0, likelihood=name)
        for name in ("categorical", "continuous-bernoulli")
    ]
    twin = write_run(tmp_path / "twin", images, weights=0.0, likelihood="continuous-bernoulli")
    table = compare([*runs, twin], num_particles=200)
    rows = {row.run: row for row in table.rows}
    mass, density = rows["categorical"], rows["continuous-bernoulli"]
    assert table.scale == "mass"
    assert (mass.corrected, density.corrected) == (False, True)
    uniform = -16 * math.log(256)
    for row in rows.values():
        assert -row.distortion == pytest.approx(uniform, abs=1e-3)
        assert row.elbo == pytest.approx(-(row.rate + row.distortion), abs=1e-3)
        assert row.log_likelihood == pytest.approx(uniform, abs=0.5)
        assert row.bits_per_dim == pytest.approx(-row.log_likelihood / 16 / math.log(2), rel=1e-6)
        assert abs(row.difference) < 1e-3
    text = str(table)
    assert "continuous-bernoulli †" in text
    assert "† A density of dequantised x" in text

    alone = compare(runs[1:], num_particles=200)
    assert alone.scale == "density"
    assert alone.rows[0].log_likelihood == pytest.approx(density.log_likelihood - uniform, rel=1e-9)
    assert "†" not in str(alone)
    assert "log p(x) is a density" in str(alone)


OTHERS = {
    "data": ({"data": "other"}, "they saw different images"),
    "binarisation": ({"binarize": "static"}, "binarize differs: dynamic and static"),
    "seed of the data": ({"data_seed": 1}, "seed differs: 0 and 1"),
    "levels": ({"likelihood": "categorical"}, "binarize differs"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_cannot_be_compared_is_refused_before_any_work(case, tmp_path, images, monkeypatch):
    changes, reason = OTHERS[case]
    if "data" in changes:
        changes = {"data": write_images(tmp_path / "other.npz", seed=1)}
    a = write_run(tmp_path / "a", images)
    b = write_run(tmp_path / "b", **{"data": images, **changes})
    monkeypatch.setattr(comparison, "evaluate", None)
    for runs in ([a, b], [b, a]):
        with pytest.raises(InputError, match="cannot be compared with") as caught:
            compare(runs, num_particles=2)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=reason):
        compare([a, b], num_particles=2)


def test_a_density_without_dequantisation_meets_no_mass(tmp_path, images):
    mass = write_run(tmp_path / "mass", images, likelihood="discretized-logistic")
    plain = write_run(tmp_path / "plain", images, likelihood="gaussian", dequantize="none")
    even = write_run(tmp_path / "even", images, likelihood="gaussian")
    with pytest.raises(InputError, match="plain gives a density of x that was not dequantised"):
        compare([mass, plain], num_particles=2)
    with pytest.raises(InputError, match="dequantize differs: uniform and none"):
        compare([even, plain], num_particles=2)
    assert compare([plain], num_particles=2).rows[0].bits_per_dim is None
    assert len(compare([mass, even], num_particles=2).rows) == 2


def test_other_splits_depend_on_the_validation_size(tmp_path, images):
    runs = [write_run(tmp_path / str(n), images, valid_size=n) for n in (8, 9)]
    assert len(compare(runs, num_particles=2).rows) == 2
    for split in ("valid", "train"):
        with pytest.raises(InputError, match="valid size differs: 8 and 9"):
            compare(runs, num_particles=2, split=split)


def test_the_order_of_two_runs_does_not_matter():
    """The seed of dequantisation is asked of whichever of the two was dequantised."""
    plain = Protocol("x", "none", "none", 255, 9, 9, 9, 0, "f", "test")
    noisy = dataclasses.replace(plain, dequantize="uniform", seed=1)
    for ours, theirs in ((plain, noisy), (noisy, plain)):
        assert "seed differs" in why_not_comparable(ours, theirs, corrected=True)
        assert why_not_comparable(ours, ours) is None


def test_bad_arguments(tmp_path, pair):
    cases = [
        (([],), {}, "at least one run"),
        (([pair[0], str(pair[0].path)],), {}, "given twice"),
        ((pair,), {"split": "tset"}, "did you mean 'test'"),
        ((pair,), {"num_particles": 0}, "--num-particles of at least 1"),
        (([tmp_path / "nothing"],), {}, "is not a run directory"),
        ((pair,), {"num_particles": 2, "limit": 0}, "at least 1 image"),
    ]
    for args, options, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            compare(*args, **options)
        assert "\n" not in str(caught.value)


def test_different_k_is_refused_unless_evaluated_at_one(pair):
    a, b = pair
    evaluate_run(a, 10)
    evaluate_run(b, 20)
    with pytest.raises(InputError, match=r"a with K = 10; b with K = 20; .*--num-particles 20"):
        compare(pair)
    assert compare(pair, num_particles=20).num_particles == 20
    assert compare(pair).num_particles == 20
    evaluate_run(a, 30)
    evaluate_run(b, 10)
    assert compare(pair).num_particles == 20  # the largest that they share
    # other draws, other images: not the same evaluation
    evaluate_run(b, 40, seed=1)
    evaluate_run(b, 50, limit=3)
    assert compare(pair).num_particles == 20
    assert compare(pair, seed=1).num_particles == 40
    assert compare(pair, limit=3).num_particles == 50
    assert compare(pair, limit=3).num_images == 3


def test_k_of_the_evaluation_at_the_end_of_training(pair):
    for run, k in zip(pair, (7, 9), strict=True):
        content = {"num_particles": k, "split": "test", "seed": 0}
        run.write_json("evaluation.json", content)
    with pytest.raises(InputError, match="a with K = 7; b with K = 9"):
        compare(pair)
    (pair[1].path / "evaluation.json").unlink()
    assert compare(pair).num_particles == 7


def test_runs_without_any_evaluation_get_the_default(pair, monkeypatch):
    monkeypatch.setattr(comparison, "_DEFAULT_PARTICLES", 12)
    assert compare(pair).num_particles == 12


class Counter:
    def __init__(self, monkeypatch):
        self.count = 0
        monkeypatch.setattr(comparison, "evaluate", self)

    def __call__(self, *args, **options):
        self.count += 1
        return evaluate(*args, **options)


def test_kept_evaluations(pair, monkeypatch):
    counter = Counter(monkeypatch)
    first = compare(pair, num_particles=5)
    assert counter.count == 2
    again = compare(pair, num_particles=5)
    assert counter.count == 2
    assert str(first) == str(again)

    # other weights: the number must be theirs
    state = load_checkpoint(pair[0].best)["model"]
    save_checkpoint(pair[0].best, {"model": {k: v + 0.1 for k, v in state.items()}})
    moved = {row.run: row for row in compare(pair, num_particles=5).rows}
    assert counter.count == 3
    before = {row.run: row for row in first.rows}
    assert moved["a"].log_likelihood != before["a"].log_likelihood
    assert moved["b"].log_likelihood == before["b"].log_likelihood

    # damaged, or of another version: computed again
    (kept,) = (pair[1].path / "evaluations").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    compare(pair, num_particles=5)
    assert counter.count == 4
    monkeypatch.setattr("pyrovae.__version__", "9.9.9")
    compare(pair, num_particles=5)
    assert counter.count == 6


def test_a_run_that_cannot_be_written_to_is_compared_all_the_same(pair, monkeypatch):
    def refuse(path, state):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(comparison, "save_checkpoint", refuse)
    assert len(compare(pair, num_particles=3).rows) == 2
    assert not (pair[0].path / "evaluations").exists()


def test_another_proposal_is_not_mixed_in(pair):
    run = pair[0]
    split = run_split(run, "test")
    for kind, stored in (("wide", 0), ("guide", 1)):
        result = evaluate(cfg.load(run), split, 10, proposal=Proposal(kind))
        comparison.keep(run, result, limit=None, parameters=1)
        assert len(list(run.path.glob("evaluations/*"))) == stored


def test_rounded_products_are_not_mixed_in(pair):
    run = pair[0]
    split = run_split(run, "test")
    for precision, stored in (("bf16", 0), ("fp32", 1)):
        result = evaluate(cfg.load(run), split, 10, precision=precision)
        comparison.keep(run, result, limit=None, parameters=1)
        assert len(list(run.path.glob("evaluations/*"))) == stored


def test_training_images_are_sampled_once(pair):
    x = run_split(pair[0], "train").tensor()
    assert torch.equal(x, run_split(pair[0], "train").tensor())
    assert not torch.equal(x, run_split(pair[0], "train", seed=1).tensor())
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert compare(pair, num_particles=3, split="train").num_images == 46


def test_data_that_changed_since_training_are_refused(tmp_path, images, pair):
    write_images(images, seed=5)
    with pytest.raises(InputError, match=r"the data are not those .*different images"):
        compare(pair, num_particles=2)


def test_table_markdown_and_json(pair):
    seen = []
    table = compare(pair, num_particles=30, progress=lambda *call: seen.append(call))
    assert {call[0] for call in seen} == {"a", "b"}
    assert all(call[1:] == (6, 6) for call in seen if call[1] == 6)
    lines = table.to_markdown().splitlines()
    assert [line.count("|") for line in lines[:4]] == [13] * 4
    assert lines[2].split("|")[3].strip() == "best"
    assert "±" in lines[3].split("|")[3]
    text = str(table).splitlines()
    assert len({len(line) for line in text[:3]}) == 1
    assert "K = 30, seed 0" in str(table)
    assert "dynamic binarisation" in str(table)
    content = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert content["rows"][0]["run"] == table.rows[0].run
    assert "per_image_difference" not in content["rows"][0]
    one = compare(pair, num_particles=3, limit=1)
    assert json.dumps(one.to_dict(), allow_nan=False)
    assert one.to_dict()["rows"][1]["difference_se"] is None
    assert "nan" not in str(one)


def test_heavy_tails_are_said(pair):
    table = compare(pair, num_particles=30)
    protocol = cfg.run_data(pair[0])[1]

    def notes(*shares):
        rows = [
            row._replace(pareto_k_above_0_7=share)
            for row, share in zip(table.rows, shares, strict=True)
        ]
        return comparison._notes(rows, protocol, "test", 6, 30, 0, "mass")

    assert not any("Doubtful" in note for note in (*notes(0.05, 0.1), *notes(None, 0.0)))
    (note,) = [note for note in notes(0.05, 0.3) if "Doubtful" in note]
    assert note.startswith(f"Doubtful: {table.rows[1].run}. ")
    assert "--num-particles" in note


def test_names_are_paths_where_folders_agree(tmp_path, images):
    runs = [write_run(tmp_path / part / "run", images, seed=i) for i, part in enumerate("xy")]
    names = {row.run for row in compare(runs, num_particles=2).rows}
    assert names == {str(run.path) for run in runs}
