"""Protocols, splits and sampling: the x a number is about are the x that it says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import pyrovae as pv
from pyrovae.data import Data, Protocol, Split, fixed, from_array, load
from pyrovae.errors import InputError

PARTS = ("train", "valid", "test")
# Grey levels of which every image is its own: row i starts with the two digits of i.
GREY = np.random.RandomState(0).randint(0, 256, (300, 5, 6)).astype(np.uint8)
GREY[:, 0, 0], GREY[:, 0, 1] = np.arange(300) // 256, np.arange(300) % 256
REAL = np.random.RandomState(1).random_sample((300, 7))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _source(split: Split, images: np.ndarray = GREY) -> Tensor:
    return torch.from_numpy(images)[split.rows].reshape(len(split), *split.x_shape)


# --------------------------------------------------------------------------------------- splitting


def test_splits_are_disjoint_and_complete() -> None:
    data = from_array(GREY)
    rows = torch.cat([data.train.rows, data.valid.rows, data.test.rows])
    assert [len(s) for s in (data.train, data.valid, data.test)] == [240, 30, 30]
    assert rows.sort().values.equal(torch.arange(300))
    contents = [{x.numpy().tobytes() for x in getattr(data, p).tensor()} for p in PARTS]
    assert sum(map(len, contents)) == len(set.union(*contents)) == 300


def test_rows_labels_and_images_stay_together() -> None:
    data = from_array(GREY, labels=np.arange(300))
    for part in PARTS:
        split = getattr(data, part)
        assert split.labels.equal(split.rows)
        assert split.tensor().equal(_source(split).float() / 255)
        index = torch.tensor([3, 0, 5])
        assert split.batch(index, None).equal(split.tensor()[index])


def test_the_seed_decides_the_split() -> None:
    first, again, other = (from_array(GREY, seed=s).test.rows for s in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)
    # NumPy freezes this stream for ever, so the split of a seed is part of the contract.
    assert first[:5].tolist() == [143, 85, 77, 186, 101]


def test_the_test_rows_do_not_depend_on_valid_size() -> None:
    sets = [from_array(GREY, binarize="dynamic", valid_size=v).test for v in (10, 50)]
    assert sets[0].rows.equal(sets[1].rows)
    assert sets[0].tensor().equal(sets[1].tensor())


def test_digits() -> None:
    data = load("digits")
    assert data.x_shape == (1, 8, 8)
    assert [len(s) for s in data[:3]] == [1297, 200, 300]
    assert data.protocol.levels == 16
    x = torch.cat([data.train.tensor(), data.valid.tensor(), data.test.tensor()])
    assert (x * 16).unique().tolist() == list(range(17))
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert (data.test.tensor()[:, 0] * 16).equal(
        torch.from_numpy(bunch.images[data.test.rows]).float()
    )
    assert data.test.labels is not None
    assert data.test.labels.tolist() == bunch.target[data.test.rows].tolist()


def test_sprites_carry_their_factors() -> None:
    data = load("sprites", image_size=8)
    assert data.x_shape == (3, 8, 8)
    assert [len(s) for s in data[:3]] == [5000, 500, 500]
    drawn = pv.data.sprites.draw(6000, 8)
    for name, values in data.test.factors.items():
        assert (values.numpy() == drawn.factors[name][5500:]).all()
    assert (data.test.raw.numpy() == drawn.images[5500:]).all()
    assert data.test.labels is not None
    assert (data.test.labels.numpy() == drawn.labels[5500:]).all()
    assert len(data.test.head(7).factors["hue"]) == 7
    assert load("sprites", image_size=8, seed=5).protocol.fingerprint == data.protocol.fingerprint


# ---------------------------------------------------------------------------------------- sampling

#                 binarize     dequantize  levels  train is resampled, per kind of image
SAMPLED = [
    ("none", "none", 255, False),
    ("dynamic", "none", 1, True),
    ("static", "none", 1, False),
    ("threshold", "none", 1, False),
    ("none", "uniform", 255, True),
]


def test_the_table_has_every_protocol() -> None:
    assert {row[0] for row in SAMPLED} == set(pv.data.BINARIZE)
    assert {row[1] for row in SAMPLED} == set(pv.data.DEQUANTIZE)


@pytest.mark.parametrize(("binarize", "dequantize", "levels", "resampled"), SAMPLED)
def test_sampling(binarize: str, dequantize: str, levels: int, resampled: bool) -> None:
    make = {"binarize": binarize, "dequantize": dequantize}
    data, again = from_array(GREY, **make), from_array(GREY, **make)
    assert data.protocol.levels == levels
    index = torch.arange(50)
    for part in PARTS:
        split = getattr(data, part)
        redrawn = resampled and part == "train"
        x = split.batch(index[: len(split)], _generator(1))
        assert x.dtype == torch.float32
        assert x.min() >= 0 and x.max() <= 1
        assert x.equal(split.batch(index[: len(split)], _generator(1)))
        assert x.equal(split.batch(index[: len(split)], _generator(2))) is not redrawn
        assert split.tensor(_generator()).equal(split.tensor(_generator(3))) is not redrawn
        if not redrawn:
            assert split.tensor().equal(getattr(again, part).tensor())
            assert split.head(9).tensor().equal(split.tensor()[:9])
        if levels == 1:
            assert x.unique().tolist() == [0, 1]


@pytest.mark.parametrize("binarize", ["dynamic", "static"])
def test_fixed_draws_change_with_the_seed(binarize: str) -> None:
    # MNIST-like: a published test split, so that only the draws can differ. sprites have one.
    first, other = (load("sprites", binarize, image_size=8, seed=s).test for s in (0, 1))
    assert first.rows.equal(other.rows)
    assert not first.tensor().equal(other.tensor())


def test_parts_are_drawn_independently() -> None:
    same = np.full((300, 4, 5), 128, np.uint8)
    data = from_array(same, binarize="static", valid_size=100, test_size=100)
    agree = [(a.tensor() == b.tensor()).float().mean() for a, b in (data[:2], data[1:3])]
    p = 128 / 255
    chance, se = p**2 + (1 - p) ** 2, 0.5 / 2000**0.5
    assert all(abs(a - chance) < 5 * se for a in agree)


@pytest.mark.parametrize("real", [False, True])
def test_binarised_draws_have_the_grey_value_as_mean(real: bool) -> None:
    images = REAL if real else GREY
    data = from_array(images, binarize="dynamic")
    grey = _source(data.train, images).double() / (1 if real else 255)
    generator, times = _generator(), 400
    mean = sum(data.train.tensor(generator).double() for _ in range(times)) / times
    se = (grey * (1 - grey) / times).sqrt()
    # Over all pixels together the standardised errors have mean 0 and mean square 1.
    z = ((mean - grey) / se)[se > 0]
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert abs((z**2).mean() - 1) < 5 * (2 / z.numel()) ** 0.5
    assert mean[se == 0].equal(grey[se == 0])
    for split in (data.valid, data.test):
        p = _source(split, images).double() / (1 if real else 255)
        error = (split.tensor() - p).sum() / (p * (1 - p)).sum().sqrt()
        assert abs(error) < 5


def test_threshold_is_above_one_half() -> None:
    images = np.tile(np.array([0, 127, 128, 255], np.uint8), (20, 1))
    assert from_array(images, binarize="threshold").test.tensor()[0].tolist() == [0, 0, 1, 1]
    tie = from_array(
        np.tile(np.array([1, 2, 0], np.uint8), (20, 1)), levels=2, binarize="threshold"
    )
    assert tie.test.tensor()[0].tolist() == [0, 1, 0]
    real = from_array(np.tile([0.2, 0.5, 0.51], (20, 1)), binarize="threshold")
    assert real.train.tensor()[0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("levels", [1, 2, 15, 16, 127, 254, 255])
def test_dequantised_x_gives_its_level_back(levels: int) -> None:
    images = np.random.RandomState(2).randint(0, levels + 1, (400, 1000)).astype(np.uint8)
    data = from_array(images, dequantize="uniform", levels=levels)
    for part in PARTS:
        split = getattr(data, part)
        y, k = split.tensor(_generator()), _source(split, images)
        assert y.min() > 0 and y.max() < 1
        assert (y * (levels + 1)).floor().equal(k.float())
        u = (y.double() * (levels + 1) - k).flatten()
        assert abs(u.mean() - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
        assert abs((u - 0.5).square().mean() - 1 / 12) < 5 * (1 / 180 / u.numel()) ** 0.5


def test_dequantised_x_stays_within_at_the_extremes() -> None:
    for k, cell, expected in ((0, 0, 2**-24), (255, 2**15 - 1, 1 - 2**-24)):
        y = pv.data._dequantized(torch.tensor([k]), torch.tensor([cell]), 255)
        assert y.item() == expected


# --------------------------------------------------------------------------------------- protocols


def test_protocol_in_words() -> None:
    expected = {
        ("none", "none"): "256 levels, 240/30/30 train/valid/test, split by seed 0",
        ("dynamic", "none"): "dynamic binarisation, 240/30/30 train/valid/test, split by seed 0, "
        "valid and test sampled once with seed 0",
        ("static", "none"): "static binarisation, 240/30/30 train/valid/test, split by seed 0, "
        "every image sampled once with seed 0",
        ("threshold", "none"): "binarised at one half, 240/30/30 train/valid/test, split by seed 0",
        ("none", "uniform"): "256 levels dequantised uniformly, 240/30/30 train/valid/test, "
        "split by seed 0, valid and test sampled once with seed 0",
    }
    assert set(expected) == {row[:2] for row in SAMPLED}
    for (binarize, dequantize), words in expected.items():
        data = from_array(GREY, name="grey", binarize=binarize, dequantize=dequantize)
        assert str(data.protocol) == f"grey, {words}"
        assert str(data.protocol) in repr(data.test)
    published = replace(data.protocol, data="mnist", published="test", train_size=50_000)
    assert "50,000/30/30 train/valid/test, valid" in str(published)
    assert "real values without a grid" in str(from_array(REAL).protocol)
    assert "binary as given" in str(from_array(GREY % 2).protocol)


@pytest.mark.parametrize("row", SAMPLED)
def test_protocols_round_trip_through_json(row: tuple[str, str, int, bool]) -> None:
    protocol = from_array(GREY, binarize=row[0], dequantize=row[1]).protocol
    again = Protocol.from_dict(json.loads(json.dumps(protocol.to_dict())))
    assert again == protocol
    assert protocol.why_not_comparable(again) is None


DYNAMIC = Protocol("mnist", "dynamic", "none", 1, 50_000, 10_000, 10_000, 0, "ab" * 32, "test")
GREYS = replace(DYNAMIC, binarize="none", levels=255)
COMPARED = [
    (DYNAMIC, {}, None),
    (DYNAMIC, {"data": "renamed"}, None),
    (DYNAMIC, {"train_size": 55_000, "valid_size": 5_000}, None),
    (DYNAMIC, {"data": "kmnist", "fingerprint": "cd" * 32}, "different images: mnist .*kmnist"),
    (DYNAMIC, {"binarize": "static"}, "binarize differs: dynamic and static"),
    (DYNAMIC, {"test_size": 100}, "test size differs: 10000 and 100"),
    (DYNAMIC, {"seed": 1}, "seed differs: 0 and 1"),
    (DYNAMIC, {"published": "none"}, "published differs"),
    (GREYS, {"levels": 16}, "levels differs: 255 and 16"),
    (GREYS, {"dequantize": "uniform"}, "dequantize differs: none and uniform"),
    (GREYS, {"seed": 1}, None),
    (replace(GREYS, published="none"), {"seed": 1}, "seed differs"),
    (replace(GREYS, dequantize="uniform"), {"seed": 1}, "seed differs"),
    (replace(DYNAMIC, binarize="threshold"), {"seed": 1}, None),
]


@pytest.mark.parametrize(("protocol", "changes", "reason"), COMPARED)
def test_comparability(protocol: Protocol, changes: dict[str, object], reason: str | None) -> None:
    other = replace(protocol, **changes)
    for why in (protocol.why_not_comparable(other), other.why_not_comparable(protocol)):
        assert (why is None) is (reason is None)
    if reason:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(protocol.why_not_comparable(other))


def test_corrected_numbers_compare_across_dequantisation() -> None:
    other = replace(GREYS, dequantize="uniform")
    assert GREYS.why_not_comparable(other, corrected=True) is None
    assert DYNAMIC.why_not_comparable(replace(DYNAMIC, test_size=9), corrected=True)


def test_the_fingerprint_is_of_the_images_alone() -> None:
    first = from_array(GREY, labels=np.arange(300), seed=3, binarize="static").protocol.fingerprint
    assert first == from_array(GREY[:, None].copy(), name="other").protocol.fingerprint
    changed = GREY.copy()
    changed[7, 3, 3] ^= 1
    assert first != from_array(changed).protocol.fingerprint
    assert first != from_array(GREY.reshape(300, 30)).protocol.fingerprint
    # Pinned: the bytes are hashed in one order whatever the machine's own.
    real = from_array(np.tile([0.2, 0.5, 0.51], (20, 1))).protocol.fingerprint
    assert real.startswith("3965107b23d4d5b8")


# ------------------------------------------------------------------------------------------ splits


def test_head_says_so_in_its_protocol() -> None:
    data = from_array(GREY, labels=np.arange(300))
    head = data.test.head(5)
    assert len(head) == 5 and head.labels is not None
    assert head.labels.equal(head.rows)
    assert head.protocol == replace(data.protocol, test_size=5)
    assert data.valid.head(5).protocol.valid_size == 5
    assert data.test.head(30) is data.test.head(31) is data.test
    assert "test size" in str(head.protocol.why_not_comparable(data.protocol))


def test_fixed_x_are_taken_as_they_are() -> None:
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    data = fixed(x, test=y)
    assert data.train.tensor() is x and data.valid.tensor() is x and data.test.tensor() is y
    assert data.test.batch(torch.tensor([2])).equal(y[2:])
    assert data.protocol.levels is None
    assert data.protocol.test_size == 3
    assert fixed((x > 0).double()).protocol.levels == 1


def test_moving_keeps_everything_else() -> None:
    data = from_array(GREY, binarize="dynamic")
    moved = data.to("cpu")
    assert isinstance(moved, Data)
    assert moved.protocol == data.protocol
    assert moved.train.sampling == "bernoulli"
    assert moved.test.tensor().equal(data.test.tensor())


def test_loading_disturbs_no_global_stream() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    data = from_array(GREY, binarize="dynamic")
    data.train.batch(torch.arange(3), _generator())
    assert torch.get_rng_state().equal(before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_the_registry_tells_about_itself() -> None:
    assert set(pv.data.REGISTRY) == {
        *("digits", "sprites", "mnist", "fashion-mnist", "kmnist", "omniglot", "cifar10", "svhn"),
        *("celeba", "binarized-mnist"),
    }
    for entry in pv.data.REGISTRY.values():
        assert 20 < len(entry.summary) < 80 and "\n" not in entry.summary


# ---------------------------------------------------------------------------------------- refusals

BINARY = GREY % 2
REFUSED = {
    "unknown name": (lambda: load("mnits"), "Did you mean 'mnist'"),
    "a name in capitals": (lambda: load("Fashion_MNIST"), "Did you mean 'fashion-mnist'"),
    "an empty name": (lambda: load(""), "folder of images, .npy or .npz"),
    "no such file": (lambda: load("nowhere/at-all.npz"), "there is none"),
    "binarize": (lambda: load("digits", binarize="dinamic"), "Did you mean 'dynamic'"),
    "dequantize": (lambda: load("digits", dequantize="gaussian"), "--dequantize"),
    "both": (lambda: load("digits", "dynamic", "uniform"), "got both"),
    "root unused": (lambda: load("digits", root="x"), "--data-root"),
    "download unused": (lambda: load("sprites", download=True), "--download"),
    "image size unused": (lambda: load("digits", image_size=16), "--image-size"),
    "image size 0": (lambda: load("sprites", image_size=0), "1 or more"),
    "image size 4": (lambda: load("sprites", image_size=4), "8 or more"),
    "test size fixed": (lambda: load("sprites", test_size=5, image_size=8), "--test-size"),
    "valid size fixed": (lambda: load("sprites", valid_size=5, image_size=8), "--valid-size"),
    "valid size 0": (lambda: load("digits", valid_size=0), "--valid-size of 1 or more"),
    "sizes too large": (lambda: load("digits", valid_size=1000, test_size=797), "smaller"),
    "too few images": (lambda: from_array(GREY[:2]), "Give more images"),
    "negative seed": (lambda: from_array(GREY, seed=-1), "--seed"),
    "seed too large": (lambda: from_array(GREY, seed=2**32), "--seed"),
    "seed no integer": (lambda: from_array(GREY, seed=0.5), "--seed"),
    "binary, dynamic": (lambda: from_array(BINARY, binarize="dynamic"), "binary already"),
    "binary, threshold": (lambda: from_array(BINARY, binarize="threshold"), "--binarize none"),
    "no grid": (lambda: from_array(REAL, dequantize="uniform"), "without a grid"),
    "list": (lambda: from_array([[0.0, 1.0]]), "NumPy array"),
    "integers": (lambda: from_array(GREY.astype(int)), 'astype\\("uint8"\\)'),
    "complex": (lambda: from_array(REAL * 1j), "complex128"),
    "NaN": (lambda: from_array(np.where(REAL > 0.9, np.nan, REAL)), "NaN"),
    "above one": (lambda: from_array(REAL * 255), "Rescale"),
    "below zero": (lambda: from_array(REAL - 0.5), "values from -0"),
    "no images": (lambda: from_array(GREY[:0]), "at least one image"),
    "one axis": (lambda: from_array(GREY[0, 0]), "expected shape"),
    "five axes": (lambda: from_array(GREY[None, None]), "expected shape"),
    "four channels": (lambda: from_array(np.zeros((20, 8, 8, 4), np.uint8)), "1 or 3"),
    "two readings": (lambda: from_array(np.zeros((20, 3, 8, 3), np.uint8)), "can be read as"),
    "levels too low": (lambda: from_array(GREY, levels=16), "between 255"),
    "levels of floats": (lambda: from_array(REAL, levels=255), "needs uint8"),
    "labels short": (lambda: from_array(GREY, labels=np.arange(3)), "300 integers"),
    "labels real": (lambda: from_array(GREY, labels=np.ones(300)), "integers or names"),
    "head": (lambda: from_array(GREY).test.head(0), "--limit"),
    "fixed shapes": (lambda: fixed(torch.zeros(3, 2), torch.zeros(3, 4)), "one shape"),
    "protocol": (lambda: Protocol.from_dict({"data": "mnist"}), "fields"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_are_one_line_with_a_remedy(what: str) -> None:
    act, remedy = REFUSED[what]
    with pytest.raises(InputError, match=remedy) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert "got" in message or "there is none" in message or "can be read as" in message
