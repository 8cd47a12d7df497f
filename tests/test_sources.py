"""Readers: files of every accepted form give the images they hold; all others are refused."""

import gzip
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusal import one_line

from pyrovae.data import Data, from_array, load
from pyrovae.errors import InputError

RANDOM = np.random.RandomState(0)
GREY = RANDOM.randint(0, 256, (20, 6, 5)).astype(np.uint8)
COLOUR = RANDOM.randint(0, 256, (20, 6, 5, 3)).astype(np.uint8)
LABELS = np.arange(20)


def _all(data: Data) -> torch.Tensor:
    splits = (data.train, data.valid, data.test)
    rows = torch.cat([s.rows for s in splits])
    return torch.cat([s.tensor() for s in splits])[rows.argsort()]


# ------------------------------------------------------------------------------------------ arrays

FORMS = {
    "(N, H, W)": (GREY, GREY[:, None] / 255, 255),
    "(N, H, W, 1)": (GREY[..., None], GREY[:, None] / 255, 255),
    "(N, 1, H, W)": (GREY[:, None], GREY[:, None] / 255, 255),
    "(N, H, W, 3)": (COLOUR, COLOUR.transpose(0, 3, 1, 2) / 255, 255),
    "(N, 3, H, W)": (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2) / 255, 255),
    "(N, F)": (GREY.reshape(20, 30), GREY.reshape(20, 30) / 255, 255),
    "floats on 255 levels": (GREY / 255, GREY[:, None] / 255, 255),
    "float32 on 255 levels": ((GREY / 255).astype(np.float32), GREY[:, None] / 255, 255),
    "floats off the grid": (GREY / 256, GREY[:, None] / 256, None),
    "binary floats": ((GREY % 2).astype(float), (GREY % 2)[:, None], 1),
    "binary uint8": (GREY % 2, (GREY % 2)[:, None], 1),
    "bool": (GREY > 99, (GREY > 99)[:, None], 1),
    "big-endian floats": ((GREY / 256).astype(">f8"), GREY[:, None] / 256, None),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".npy", ".npz", "array"])
def test_forms(form: str, suffix: str, tmp_path: Path) -> None:
    given, expected, levels = FORMS[form]
    path = tmp_path / f"mine{suffix}"
    if suffix == ".npy":
        np.save(path, given)
        data = load(path)
    elif suffix == ".npz":
        np.savez(path, anything=given, labels=LABELS)
        data = load(str(path))
        assert data.test.labels is not None
        assert data.test.labels.equal(data.test.rows)
    else:
        data = from_array(given, LABELS.tolist())
    assert data.protocol.levels == levels
    assert data.protocol.data == ("my-images" if suffix == "array" else path.name)
    assert data.x_shape == expected.shape[1:]
    torch.testing.assert_close(_all(data), torch.from_numpy(expected).float(), rtol=0, atol=1e-7)


def test_tensors_and_names_as_labels() -> None:
    names = np.array(["hat", "shoe"] * 10)
    data = from_array(torch.from_numpy(GREY), names)
    assert data.train.labels is not None
    assert data.train.labels.equal(data.train.rows % 2)
    assert from_array(GREY, torch.arange(20)).test.labels is not None


def test_npz_may_give_the_levels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=GREY % 17, levels=16, ids=LABELS)
    data = load(tmp_path / "a.npz")
    assert data.protocol.levels == 16
    assert (_all(data) * 16).equal(torch.from_numpy(GREY % 17).float()[:, None])


# ----------------------------------------------------------------------------------------- folders


def _write(folder: Path, images: Any, suffix: str = ".png", mode: str | None = None) -> Path:
    for i, image in enumerate(images):
        place = folder / f"part{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        drawn = Image.fromarray(image)
        (drawn.convert(mode) if mode else drawn).save(place / f"{i:02}{suffix}")
    (folder / "notes.txt").write_text("not an image")
    return folder


def _order(images: np.ndarray) -> np.ndarray:
    return np.concatenate([images[0::2], images[1::2]])  # part0 comes before part1


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".PNG", ".tif"])
def test_a_folder_of_grey_images(suffix: str, tmp_path: Path) -> None:
    data = load(_write(tmp_path / "faces", GREY, suffix))
    assert data.protocol.data == "faces"
    assert (_all(data)[:, 0] * 255).round().equal(torch.from_numpy(_order(GREY)).float())


@pytest.mark.parametrize("mode", [None, "RGBA"])
def test_a_folder_of_colour_images(mode: str | None, tmp_path: Path) -> None:
    data = load(_write(tmp_path, COLOUR, mode=mode))
    expected = torch.from_numpy(_order(COLOUR)).permute(0, 3, 1, 2).float()
    assert (_all(data) * 255).round().equal(expected)


def test_grey_stored_as_colour_is_grey_and_one_colour_image_makes_colour(tmp_path: Path) -> None:
    assert load(_write(tmp_path / "grey", GREY, mode="RGB")).x_shape == (1, 6, 5)
    mixed = _write(tmp_path / "mixed", GREY)
    Image.fromarray(COLOUR[0]).save(mixed / "z.png")
    assert load(mixed).x_shape == (3, 6, 5)


def test_image_size_cuts_the_central_square(tmp_path: Path) -> None:
    wide = np.full((20, 16, 40, 3), 255, np.uint8)
    wide[:, :, 12:28] = (10, 200, 30)
    data = load(_write(tmp_path, wide, ".jpg"), image_size=8)
    assert data.x_shape == (3, 8, 8)
    inner = (_all(data) * 255)[:, :, 2:6, 2:6]
    assert (inner - torch.tensor([10.0, 200.0, 30.0])[:, None, None]).abs().max() < 12
    mixed = _write(tmp_path / "mixed", GREY)
    Image.fromarray(COLOUR[0, :3]).save(mixed / "z.png")
    assert load(mixed, image_size=4).x_shape == (3, 4, 4)


# ---------------------------------------------------------------------------- published data sets


def _write_idx(path: Path, values: np.ndarray, compress: bool = False) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    content = header + values.tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def _mnist(root: Path, name: str = "MNIST", compress: bool = False) -> np.ndarray:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    images = RANDOM.randint(0, 256, (20, 28, 28)).astype(np.uint8)
    for part, some in (("train", slice(15)), ("t10k", slice(15, 20))):
        _write_idx(raw / f"{part}-images-idx3-ubyte", images[some], compress)
        _write_idx(raw / f"{part}-labels-idx1-ubyte", LABELS[some].astype(np.uint8), compress)
    return images


IDX = [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")]


@pytest.mark.parametrize(("name", "place"), IDX)
@pytest.mark.parametrize("compress", [False, True])
def test_idx(name: str, place: str, compress: bool, tmp_path: Path) -> None:
    images = _mnist(tmp_path, place, compress)
    data = load(name, root=tmp_path, valid_size=4)
    assert data.x_shape == (1, 28, 28)
    assert data.train.rows.tolist() == list(range(11))
    assert data.valid.rows.tolist() == [11, 12, 13, 14]
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [15, 16, 17, 18, 19]
    assert (_all(data)[:, 0] * 255).round().equal(torch.from_numpy(images).float())
    assert data.protocol.levels == 255 and data.protocol.published == "test"


def test_the_root_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _mnist(tmp_path)
    monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
    assert len(load("mnist", valid_size=4).test) == 5


def _amat(root: Path, text: str) -> Path:
    (root / "BinarizedMNIST").mkdir()
    for part, count in (("train", 3), ("valid", 2), ("test", 1)):
        path = root / "BinarizedMNIST" / f"binarized_mnist_{part}.amat"
        path.write_text(text * count)
    return root


def test_binarized_mnist(tmp_path: Path) -> None:
    row = RANDOM.randint(0, 2, 784)
    _amat(tmp_path, " ".join(map(str, row)) + " \n")
    for binarize in ("none", "static"):
        data = load("binarized-mnist", binarize, root=tmp_path)
        assert [len(data.train), len(data.valid), len(data.test)] == [3, 2, 1]
        assert data.test.tensor().flatten().tolist() == row.tolist()
        assert data.protocol.levels == 1 and data.protocol.binarize == "none"


class _Listed(list):  # as lazily opened sets: a length, and (image, target) by number
    pass


def _fake(monkeypatch: pytest.MonkeyPatch, name: str, make: Any) -> None:
    datasets = pytest.importorskip("torchvision").datasets
    monkeypatch.setattr(datasets, name, make)


def test_cifar10(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def make(root: Path, train: bool, download: bool) -> SimpleNamespace:
        some = slice(15) if train else slice(15, 20)
        return SimpleNamespace(data=COLOUR[some], targets=LABELS[some].tolist())

    _fake(monkeypatch, "CIFAR10", make)
    data = load("cifar10", root=tmp_path, valid_size=4)
    assert [len(data.train), len(data.valid), len(data.test)] == [11, 4, 5]
    expected = torch.from_numpy(COLOUR).permute(0, 3, 1, 2).float()
    assert (_all(data) * 255).round().equal(expected)
    assert data.test.labels is not None and data.test.labels.equal(data.test.rows)


def test_svhn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = COLOUR.transpose(0, 3, 1, 2)

    def make(root: Path, split: str, download: bool) -> SimpleNamespace:
        some = {"train": slice(15), "test": slice(15, 20)}[split]
        return SimpleNamespace(data=images[some], labels=LABELS[some])

    _fake(monkeypatch, "SVHN", make)
    data = load("svhn", root=tmp_path, valid_size=4)
    assert (_all(data) * 255).round().equal(torch.from_numpy(images).float())
    assert data.test.rows.tolist() == [15, 16, 17, 18, 19]


def test_omniglot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # White paper with a black square in the middle, as published; strokes come out as 1.
    paper = np.full((105, 105), 255, np.uint8)
    paper[40:65, 40:65] = 0
    picture = Image.fromarray(paper).convert("1")

    def make(root: Path, background: bool, download: bool) -> _Listed:
        return _Listed((picture, i % 3) for i in range(15 if background else 5))

    _fake(monkeypatch, "Omniglot", make)
    data = load("omniglot", root=tmp_path, valid_size=4)
    assert data.x_shape == (1, 28, 28)
    assert _all(data)[:, 0, 14, 14].unique().tolist() == [1]
    assert _all(data)[:, 0, 0, 0].unique().tolist() == [0]
    assert data.test.rows.tolist() == [15, 16, 17, 18, 19]
    assert data.valid.rows.tolist() != [11, 12, 13, 14], "drawn by the seed"
    assert data.test.labels is not None and data.test.labels.min() == 3
    assert load("omniglot", root=tmp_path, valid_size=4, image_size=14).x_shape == (1, 14, 14)


def test_celeba(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    face = np.zeros((218, 178, 3), np.uint8)
    face[35:183, 15:163] = (200, 100, 50)  # the central 148 × 148

    def make(root: Path, split: str, download: bool) -> _Listed:
        count = {"train": 6, "valid": 3, "test": 2}[split]
        return _Listed((Image.fromarray(face), None) for _ in range(count))

    _fake(monkeypatch, "CelebA", make)
    data = load("celeba", root=tmp_path)
    assert data.x_shape == (3, 64, 64)
    assert [len(data.train), len(data.valid), len(data.test)] == [6, 3, 2]
    assert (data.test.raw == torch.tensor([200, 100, 50])[:, None, None]).all()


# ---------------------------------------------------------------------------------------- refusals


def _transparent(p: Path) -> Path:
    pixels = np.zeros((6, 5, 4), np.uint8)
    return _write(p, [pixels])


def _broken_idx(p: Path, cut: int) -> Path:
    _mnist(p)
    path = p / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:cut])
    return p


def _saved(p: Path, **arrays: Any) -> Path:
    np.savez(p / "a.npz", **arrays)
    return p / "a.npz"


def _bytes(p: Path, name: str, content: bytes) -> Path:
    (p / name).write_bytes(content)
    return p / name


REFUSED: dict[str, tuple[Any, str]] = {
    "empty folder": (lambda p: load(p), "got none"),
    "two sizes": (lambda p: load(_write(p, [GREY[0], GREY[1, :4]])), "--image-size"),
    "unreadable image": (lambda p: load(_bytes(p, "a.png", b"no").parent), "a.png: .*cannot be"),
    "transparent": (lambda p: load(_transparent(p)), "Flatten"),
    "16 bits": (lambda p: load(_write(p, GREY.astype(np.uint16))), "8 bits a channel"),
    "two arrays": (lambda p: load(_saved(p, a=GREY, b=GREY)), "got a, b"),
    "only labels": (lambda p: load(_saved(p, labels=LABELS)), "got labels"),
    "no zip": (lambda p: load(_bytes(p, "a.npz", b"PK")), "cannot be read"),
    "empty file": (lambda p: load(_bytes(p, "a.npy", b"")), "cannot be read"),
    "a pickle": (lambda p: load(_bytes(p, "a.npy", pickle.dumps([1]))), "cannot be read"),
    "objects": (lambda p: load(_saved(p, images=np.array([None] * 9))), "without objects"),
    "bad levels": (lambda p: load(_saved(p, images=GREY, levels=3)), "levels"),
    "file with a size": (lambda p: load(_saved(p, images=GREY), image_size=8), "--image-size"),
    "text file": (lambda p: load(_bytes(p, "a.txt", b"0 1")), "expected --data"),
    "no MNIST": (lambda p: load("mnist", root=p), "--data-root.* --download"),
    "half an MNIST": (lambda p: load("mnist", root=_broken_idx(p, 5000)), "complete idx"),
    "no idx": (lambda p: load("mnist", root=_broken_idx(p, 2)), "--download"),
    "MNIST too small": (lambda p: (_mnist(p), load("mnist", root=p)), "--valid-size"),
    "MNIST test size": (lambda p: (_mnist(p), load("mnist", root=p, test_size=5)), "published"),
    "no binary MNIST": (lambda p: load("binarized-mnist", root=p), "larocheh"),
    "strange rows": (lambda p: load("binarized-mnist", root=_amat(p, "0 2\n")), "784"),
    "binary, dynamic": (
        lambda p: load("binarized-mnist", "dynamic", root=_amat(p, "0 1 " * 392 + "\n")),
        "--binarize none",
    ),
    "no CIFAR-10": (lambda p: load("cifar10", root=p), "--data-root"),
    "no SVHN": (lambda p: load("svhn", root=p), "--data-root"),
    "no Omniglot": (lambda p: load("omniglot", root=p), "--data-root"),
    "no CelebA": (lambda p: load("celeba", root=p), "--data-root"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_are_one_line_with_a_remedy(what: str, tmp_path: Path) -> None:
    message = one_line(*REFUSED[what], tmp_path)
    assert "got" in message or "not found" in message or "cannot be read" in message


def test_a_failed_download_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def make(root: Path, train: bool, download: bool) -> None:
        raise OSError("no route to host\nmore")

    _fake(monkeypatch, "CIFAR10", make)
    with pytest.raises(InputError, match=r"failed \(no route to host\). Check") as caught:
        load("cifar10", root=tmp_path, download=True)
    assert "\n" not in str(caught.value)


def test_a_torchvision_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(InputError, match="Install the torchvision built for this torch"):
        load("cifar10", root=tmp_path)
    _mnist(tmp_path)
    assert len(load("mnist", root=tmp_path, valid_size=4).test) == 5, "idx files need none of it"


# --------------------------------------------------------------------------------------- real data

# sizes, x_shape, mean of the test pixels, beginning of the fingerprint
MNIST_SIZES = (50_000, 10_000, 10_000)
REAL: dict[str, tuple[tuple[int, ...], tuple[int, ...], float, str]] = {
    "mnist": (MNIST_SIZES, (1, 28, 28), 0.132515, "1abf2921bd4337bd"),
    "fashion-mnist": (MNIST_SIZES, (1, 28, 28), 0.286849, "fe81474c865a4a9a"),
    "binarized-mnist": (MNIST_SIZES, (1, 28, 28), 0.132512, "c2d8815527f3e6c9"),
    "clothing64.npz": ((4_320, 539, 539), (3, 64, 64), 0.482407, "334917b104d38026"),
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_data(name: str) -> None:
    root = os.environ.get("PYROVAE_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("PYROVAE_DATA names no folder of real data")
    sizes, x_shape, mean, fingerprint = REAL[name]
    data = load(Path(root) / name) if name.endswith(".npz") else load(name, root=root)
    assert (len(data.train), len(data.valid), len(data.test)) == sizes
    assert data.x_shape == x_shape
    assert data.test.tensor().double().mean().item() == pytest.approx(mean, abs=1e-6)
    assert data.protocol.fingerprint.startswith(fingerprint)


@pytest.mark.data
def test_real_mnist_validates_on_the_last_training_images_and_is_sampled_as_published() -> None:
    root = os.environ.get("PYROVAE_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("PYROVAE_DATA names no folder of real data")
    data = load("mnist", "dynamic")
    assert data.valid.rows[[0, -1]].tolist() == [50_000, 59_999]
    assert data.test.labels is not None
    assert data.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    # Our draws and Larochelle's of the same test images have the same mean, up to chance.
    grey = load("mnist").test.tensor().double()
    difference = data.test.tensor().mean() - load("binarized-mnist").test.tensor().mean()
    se = (2 * (grey * (1 - grey)).sum()).sqrt() / grey.numel()
    assert abs(difference) < 5 * se
