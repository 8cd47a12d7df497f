"""Scores of images that a person brings: what x they become, and what is said of it."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from exact import linear_gaussian, marginal
from PIL import Image
from scipy.stats import percentileofscore
from test_comparison import write_images, write_run

from pyrovae import config as cfg
from pyrovae import data as datasets
from pyrovae import scoring
from pyrovae.data import Split
from pyrovae.errors import InputError
from pyrovae.evaluation import evaluate
from pyrovae.runs import load_checkpoint, save_checkpoint
from pyrovae.scoring import CAVEAT, Images, read, score, score_paths, training_reference

SHAPE = (1, 4, 4)


def grey(n=3, seed=3, top=255):
    return np.random.RandomState(seed).randint(0, top + 1, (n, 4, 4)).astype(np.uint8)


def protocol_of(tmp_path, levels=255, **options):
    path = write_images(tmp_path / f"train{levels}.npz", levels=levels)
    return datasets.load(path, **options).protocol


def save_png(path, picture):
    Image.fromarray(picture).save(path)
    return path


def test_exact_model_and_percentile():
    """With the exact posterior every score is log p(x); the rank is NumPy's and SciPy's."""
    vae = linear_gaussian()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        p = marginal(vae)
        x, reference = p.sample((9,)), p.log_prob(p.sample((40,)))
    reference[7] = p.log_prob(x)[2] - 1e-6
    protocol = datasets.fixed(x).protocol
    names = tuple(f"{i}.npy" for i in range(9))
    rows = score(vae, Images(names, (0,) * 9, x), protocol, reference, num_particles=30)
    truth = p.log_prob(x)
    assert [row.path for row in rows] == list(names)
    for row, value in zip(rows, truth.tolist(), strict=True):
        assert row.log_likelihood == pytest.approx(value, rel=1e-10)
        assert row.mc_error < 1e-9
        assert row.bits_per_dim is None  # a density of x that lie on no levels
        expected = 100 * np.mean(reference.numpy() < value)
        assert row.percentile == pytest.approx(expected, rel=1e-12)
        assert row.percentile == pytest.approx(
            percentileofscore(reference.numpy(), value, kind="strict"), rel=1e-12
        )
    assert min(row.percentile for row in rows) < 50 < max(row.percentile for row in rows)


# ---------------------------------------------------------------------------------- what x becomes


def test_every_kind_of_file_gives_the_same_x(tmp_path):
    images = grey()
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    for path, picture in zip(("a.png", "b.png", "below/c.png"), images, strict=True):
        save_png(folder / path, picture)
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "x.npz", images=images[:, None])
    np.savez(tmp_path / "floats.npz", images=images.astype(np.float32) / 255)
    expected = torch.from_numpy(images)[:, None].float() / 255
    protocol = protocol_of(tmp_path)
    for paths in (
        [folder],
        [folder / "a.png", folder / "b.png", folder / "below"],
        [tmp_path / "x.npy"],
        [tmp_path / "x.npz"],
        [tmp_path / "floats.npz"],
        tmp_path / "x.npz",
    ):
        found = read(paths, SHAPE, protocol)
        assert torch.equal(found.x, expected)
    assert found.paths == (str(tmp_path / "x.npz"),) * 3
    assert found.positions == (0, 1, 2)
    three = read([folder], SHAPE, protocol)
    assert [path.removeprefix(str(folder)) for path in three.paths] == [
        "/a.png",
        "/b.png",
        "/below/c.png",
    ]
    assert three.positions == (0, 0, 0)


def test_threshold(tmp_path):
    images = np.array([[[0, 127, 128, 255]] * 4], np.uint8)
    np.save(tmp_path / "x.npy", images)
    x = read([tmp_path / "x.npy"], SHAPE, protocol_of(tmp_path, binarize="threshold")).x
    assert torch.equal(x[0, 0, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("binarize", ["dynamic", "static"])
def test_grey_is_binarised_once_with_its_own_frequency(binarize, tmp_path):
    levels = np.array([0, 51, 204, 255], np.uint8)
    images = np.tile(levels, (500, 4, 1))
    images[:, 0, 0] = np.arange(500) // 2  # so that no two neighbours share a stream
    np.save(tmp_path / "x.npy", images)
    protocol = protocol_of(tmp_path, binarize=binarize)
    x = read([tmp_path / "x.npy"], SHAPE, protocol).x
    assert set(x.unique().tolist()) == {0.0, 1.0}
    rows = x[::2, 0, 1:]
    for column, probability in enumerate(levels / 255):
        share = float(rows[..., column].mean())
        se = math.sqrt(probability * (1 - probability) / rows[..., column].numel())
        assert abs(share - probability) <= 5 * se
    # equal images, equal x
    assert torch.equal(x[::2], x[1::2])


@pytest.mark.parametrize("options", [{"binarize": "dynamic"}, {"dequantize": "uniform"}])
def test_x_depends_on_the_seed_and_the_image_alone(options, tmp_path):
    images = grey(4)
    np.save(tmp_path / "x.npy", images)
    alone = save_png(tmp_path / "alone.png", images[2])
    protocol = protocol_of(tmp_path, **options)
    together = read([tmp_path / "x.npy"], SHAPE, protocol, seed=5).x
    assert torch.equal(read([alone], SHAPE, protocol, seed=5).x[0], together[2])
    assert not torch.equal(read([alone], SHAPE, protocol, seed=6).x[0], together[2])
    before = torch.random.get_rng_state()
    read([alone], SHAPE, protocol)
    assert torch.equal(before, torch.random.get_rng_state())


def test_dequantised_x_is_on_its_level(tmp_path):
    images = grey(50)
    np.save(tmp_path / "x.npy", images)
    y = read([tmp_path / "x.npy"], SHAPE, protocol_of(tmp_path, dequantize="uniform")).x
    assert torch.equal((y * 256).floor(), torch.from_numpy(images)[:, None].float())
    u = (y * 256) % 1
    assert abs(float(u.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / u.numel())
    assert float(y.min()) > 0
    assert float(y.max()) < 1


def test_levels_are_those_of_the_run(tmp_path):
    images = grey(top=16)
    images[0, 0, 0] = 16
    protocol = protocol_of(tmp_path, levels=16)
    np.savez(tmp_path / "k.npz", images=images, levels=16)
    np.savez(tmp_path / "x.npz", images=images.astype(np.float32) / 16)
    expected = torch.from_numpy(images)[:, None].float() / 16
    for name in ("k.npz", "x.npz"):
        assert torch.equal(read([tmp_path / name], SHAPE, protocol).x, expected)
    # eight bits cannot hold sixteenths
    picture = save_png(tmp_path / "x.png", np.full((4, 4), 100, np.uint8))
    with pytest.raises(InputError, match=r"17 levels k/16; got 16 other values such as 0.3922"):
        read([picture], SHAPE, protocol)
    # a picture of black and white holds both of the levels of binary data
    binary = protocol_of(tmp_path, levels=1)
    picture = save_png(tmp_path / "binary.png", np.array([[0, 255] * 2] * 4, np.uint8))
    assert torch.equal(read([picture], SHAPE, binary).x[0, 0, 0], torch.tensor([0.0, 1, 0, 1]))
    with pytest.raises(InputError, match="2 levels k/1"):
        read([save_png(tmp_path / "grey.png", grey()[0])], SHAPE, binary)


def test_colour(tmp_path):
    protocol = protocol_of(tmp_path)
    colour = np.random.RandomState(0).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    path = save_png(tmp_path / "colour.png", colour)
    x = read([path], (3, 4, 4), protocol).x
    assert torch.equal(x[0], torch.from_numpy(colour).permute(2, 0, 1).float() / 255)
    flat = save_png(tmp_path / "flat.png", grey()[0])
    x = read([flat], (3, 4, 4), protocol).x
    assert torch.equal(x[0, 0], x[0, 2])
    with pytest.raises(InputError, match=r"expected a grey image.*got a coloured one"):
        read([path], SHAPE, protocol)


def test_image_size_of_the_run(tmp_path):
    path = save_png(tmp_path / "large.png", np.full((6, 8), 77, np.uint8))
    x = read([path], SHAPE, protocol_of(tmp_path), image_size=4).x
    assert torch.equal(x, torch.full((1, *SHAPE), 77 / 255))


def test_refusals(tmp_path):
    protocol = protocol_of(tmp_path)
    small = save_png(tmp_path / "small.png", grey()[0][:3])
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(small.read_bytes()[:20])
    text = tmp_path / "notes.txt"
    text.write_text("x")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "rows.npy", grey().reshape(3, 16))
    good = save_png(tmp_path / "good.png", grey()[0])
    cases = [
        ([], SHAPE, "at least one image"),
        ([small], SHAPE, r"shape \(1, 4, 4\), as in training; got \(1, 3, 4\)"),
        ([tmp_path / "rows.npy"], SHAPE, r"got \(16,\)"),
        ([good], (16,), r"shape \(16,\), as in training; got \(3, 4, 4\)"),
        ([tmp_path / "nothing.png"], SHAPE, "there is no file"),
        ([text], SHAPE, "expected a folder, .npy, .npz or an image"),
        ([tmp_path / "empty"], SHAPE, "folder with images"),
        ([damaged], SHAPE, "cannot be read"),
    ]
    for paths, shape, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            read(paths, shape, protocol)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", write_images(tmp_path / "images.npz"))


@pytest.fixture
def given(tmp_path):
    np.savez(tmp_path / "given.npz", images=grey(5))
    return tmp_path / "given.npz"


def test_scores_are_evaluations(run, given):
    k = 60
    scores = score_paths(run, [given], num_particles=k, seed=2, num_reference=20)
    x_shape, protocol = cfg.run_data(run)
    x = read([given], x_shape, protocol, seed=2).x
    split = Split("given", protocol, x, None, torch.arange(5))
    result = evaluate(cfg.load(run), split, k, seed=2).per_image
    reference = json.loads(next((run.path / "scores").iterdir()).read_text())["log_likelihood"]
    assert len(reference) == 20
    for i, row in enumerate(scores.rows):
        assert (row.path, row.position) == (str(given), i)
        lp = float(result.log_likelihood[i])
        assert row.log_likelihood == lp
        assert row.mc_error == float(result.mc_error[i])
        assert row.pareto_k == float(result.pareto_k[i])
        assert row.bits_per_dim == pytest.approx(-lp / 16 / math.log(2), rel=1e-12)
        assert row.percentile == pytest.approx(100 * np.mean(np.array(reference) < lp))


def test_the_reference_is_of_training_images(run):
    vae = cfg.load(run)
    reference = training_reference(run, vae, num_particles=20, size=30)
    content = json.loads(next((run.path / "scores").iterdir()).read_text())
    train = cfg.data_of(run).train
    rows = set(content["rows"])
    assert len(rows) == 30
    assert rows <= set(train.rows.tolist())
    index = torch.tensor([train.rows.tolist().index(row) for row in content["rows"]])
    x = train.batch(index, torch.Generator().manual_seed(0))
    # the same stream draws the choice first, then x
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(torch.randperm(len(train), generator=generator)[:30], index)
    x = train.batch(index, generator)
    split = Split("train", train.protocol, x, None, torch.arange(30))
    assert torch.equal(evaluate(vae, split, 20).per_image.log_likelihood, reference)


def test_the_reference_is_kept(run, given, monkeypatch):
    calls = []

    def counted(vae, split, *args, **options):
        calls.append(split.name)
        return evaluate(vae, split, *args, **options)

    monkeypatch.setattr(scoring, "evaluate", counted)
    first = score_paths(run, [given], num_particles=10, num_reference=9)
    assert calls == ["train", "given"]
    again = score_paths(run, [given], num_particles=10, num_reference=9)
    assert again.to_dict() == first.to_dict()
    assert calls == ["train", "given", "given"]
    for options in ({"num_particles": 11}, {"seed": 1}, {"num_reference": 8}):
        score_paths(run, [given], **{"num_particles": 10, "num_reference": 9, **options})
        assert calls[-2:] == ["train", "given"]
    # other weights
    state = load_checkpoint(run.best)["model"]
    save_checkpoint(run.best, {"model": {name: v + 0.1 for name, v in state.items()}})
    score_paths(run, [given], num_particles=10, num_reference=9)
    assert calls[-2:] == ["train", "given"]
    # damage
    for path in (run.path / "scores").iterdir():
        path.write_text("{")
    score_paths(run, [given], num_particles=10, num_reference=9)
    assert calls[-2:] == ["train", "given"]
    assert score_paths(run, [given], num_particles=10, num_reference=9).rows
    assert calls[-2:] == ["given", "given"]


def test_more_reference_images_than_there_are(run, given):
    text = str(score_paths(run, [given], num_particles=5, num_reference=10_000))
    assert "46 training images" in text
    with pytest.raises(InputError, match="at least 1 training image"):
        score_paths(run, [given], num_reference=0)


def test_csv(run, given, tmp_path):
    scores = score_paths(run, [given], num_particles=1, num_reference=5)
    out = tmp_path / "out" / "scores.csv"
    scores.to_csv(out)
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(scoring.Score._fields)
    for row, expected in zip(rows, scores.rows, strict=True):
        assert row["path"] == str(given)
        assert int(row["position"]) == expected.position
        assert float(row["log_likelihood"]) == expected.log_likelihood
        assert row["mc_error"] == row["pareto_k"] == ""  # one draw tells neither
    assert [p.name for p in out.parent.iterdir()] == ["scores.csv"]
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*--out"):
        scores.to_csv(tmp_path / "folder.csv")


def test_what_is_printed(run, given):
    seen = []
    scores = score_paths(
        run, [given], num_particles=30, num_reference=5, progress=lambda *c: seen.append(c)
    )
    assert seen == [("training images", 5, 5), ("images", 5, 5)]
    text = str(scores)
    assert f"{given}[4]" in text
    assert "drawing x once from Bernoulli(grey value), seed 0" in text
    assert text.endswith(CAVEAT)
    assert "nan" not in text + str(score_paths(run, [given], num_particles=1, num_reference=5))
    assert len(json.loads(json.dumps(scores.to_dict(), allow_nan=False))["rows"]) == 5
    protocol = cfg.run_data(run)[1]
    tails = (0.8, 0.6, math.nan, 2, 0)
    heavy = [row._replace(pareto_k=k) for row, k in zip(scores.rows, tails, strict=True)]
    notes = scoring._notes(heavy, protocol, 5, 0)
    assert any("0.7 for 2 of 5 images" in note for note in notes)
    assert not any("Pareto" in note for note in scoring._notes(heavy[1:3], protocol, 5, 0))


def test_bits_of_a_density_carry_the_level_correction(tmp_path, given):
    run = write_run(
        tmp_path / "density",
        write_images(tmp_path / "images.npz"),
        weights=0.0,
        likelihood="continuous-bernoulli",
    )
    scores = score_paths(run, [given], num_particles=100, num_reference=5)
    for row in scores.rows:  # uniform on (0, 1): eight bits a pixel
        assert row.bits_per_dim == pytest.approx(8 - row.log_likelihood / 16 / math.log(2))
        assert row.bits_per_dim == pytest.approx(8, abs=0.1)
