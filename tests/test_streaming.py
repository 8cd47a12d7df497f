"""Images left on disk are the same data: protocol, splits, x, steps and refusals."""

import json
import os
import pickle
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusal import one_line, refuse
from shell import ok
from tiny import tiny_config
from torch.utils.data import Dataset, TensorDataset

from pyrovae import compiling, streaming
from pyrovae import config as cfg
from pyrovae.data import Data, Split, StreamedSplit, from_array, from_dataset, load
from pyrovae.errors import InputError, ProcessLostError
from pyrovae.loop import copy_weights
from pyrovae.runs import load_checkpoint
from pyrovae.training import check_data, fit

RANDOM = np.random.RandomState(0)
GREY = RANDOM.randint(0, 256, (60, 5, 4)).astype(np.uint8)
COLOUR = RANDOM.randint(0, 256, (60, 5, 4, 3)).astype(np.uint8)
BINARY = RANDOM.randint(0, 2, (60, 7)).astype(np.uint8)
FORMS = {
    "grey": GREY,
    "one channel last": GREY[..., None],
    "colour": COLOUR,
    "channels first": np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2)),
    "binary rows": BINARY,
}


def _npy(folder: Path, images: np.ndarray, name: str = "x.npy") -> Path:
    np.save(folder / name, images)
    return folder / name


def _folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


def _both(name: Path, workers: int = 0, **options: Any) -> tuple[Data, Data]:
    """The same data, held in memory and left on disk."""
    held, left = load(name, **options), load(name, stream=True, workers=workers, **options)
    assert isinstance(held.train, Split) and isinstance(left.train, StreamedSplit)
    return held, left


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _same(held: Data, left: Data) -> None:
    """One protocol, and the same x wherever one asks for it."""
    assert left.protocol == held.protocol
    assert left.train.protocol == held.train.protocol
    assert left.x_shape == held.x_shape
    assert len(left.train) == len(held.train)
    assert left.train.rows.equal(held.train.rows)
    for ours, theirs in ((left.valid, held.valid), (left.test, held.test)):
        assert ours.rows.equal(theirs.rows)
        assert ours.tensor().equal(theirs.tensor())
    index = torch.tensor([7, 0, 31, 7])
    assert left.train.batch(index, _generator()).equal(held.train.batch(index, _generator()))
    assert left.train.tensor(_generator()).equal(held.train.tensor(_generator()))
    head, expected = left.train.head(5), held.train.head(5)
    assert isinstance(head, Split) and repr(head) == repr(expected)
    assert head.rows.equal(expected.rows)
    assert head.tensor(_generator()).equal(expected.tensor(_generator()))


@pytest.mark.parametrize("form", FORMS)
def test_a_file_left_on_disk_is_the_same_data(form: str, tmp_path: Path) -> None:
    _same(*_both(_npy(tmp_path, FORMS[form])))


@pytest.mark.parametrize("name", ["grey", "colour", "one in colour"])
def test_a_folder_left_on_disk_is_the_same_data(name: str, tmp_path: Path) -> None:
    place = _folder(tmp_path, COLOUR if name == "colour" else GREY)
    if name == "one in colour":
        Image.fromarray(COLOUR[59]).save(place / "059.png")
    held, left = _both(place)
    assert held.x_shape == ((1 if name == "grey" else 3), 5, 4)
    _same(held, left)
    _same(*_both(place, image_size=3))


@pytest.mark.parametrize(
    "options",
    [
        {"binarize": "dynamic"},
        {"binarize": "threshold"},
        {"dequantize": "uniform"},
        {"valid_size": 3, "test_size": 5, "seed": 4},
    ],
    ids=str,
)
def test_sampling_is_the_same_from_the_same_generator(
    options: dict[str, Any], tmp_path: Path
) -> None:
    _same(*_both(_npy(tmp_path, GREY), **options))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_epoch_is_read_in_its_order_whoever_reads(workers: int, tmp_path: Path) -> None:
    held, left = _both(_folder(tmp_path, COLOUR), workers)
    batches = list(torch.randperm(len(held.train), generator=_generator()).split(7))
    before = torch.get_rng_state()
    read = list(left.train.read(batches))
    assert torch.get_rng_state().equal(before)  # of which training draws its noise
    assert len(read) == len(batches)
    for ours, theirs in zip(read, held.train.read(batches), strict=True):
        assert ours.dtype == torch.uint8 and ours.equal(theirs)


def test_nothing_is_held_and_nothing_is_sent(tmp_path: Path) -> None:
    seen: list[int] = []

    def read(row: int) -> np.ndarray:
        seen.append(row)
        return GREY[row][None]

    images = streaming.Items(read, (60, 1, 5, 4))
    assert torch.equal(
        next(streaming.fetch(images, [np.array([4, 2])], 0))[0, 0], torch.from_numpy(GREY[4])
    )
    assert seen == [4, 2]
    file = streaming.ArrayFile(_npy(tmp_path, COLOUR), channels_last=True)
    sent = pickle.dumps(file)
    assert len(sent) < 500  # bytes, where the images are 3,600
    rows = np.array([9, 10, 11, 4, 4, 3, 59])
    assert np.array_equal(pickle.loads(sent)[rows], COLOUR[rows].transpose(0, 3, 1, 2))
    left = load(tmp_path / "x.npy", stream=True, workers=0).train
    assert not hasattr(left, "raw")
    assert left.to("cpu") is left
    assert "left on disk" in repr(left)


def test_an_epoch_that_is_left_ends_its_processes(tmp_path: Path) -> None:
    left = load(_folder(tmp_path, GREY), stream=True, workers=2).train
    others = _children()
    read = left.read(list(torch.arange(40).split(1)))
    next(read)
    workers = _children() - others
    assert len(workers) == 2
    read.close()  # type: ignore[attr-defined]
    assert not workers & _children()


def _children() -> set[int]:
    """The processes that this one has started, and that have not ended."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (place / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(place.name))
    return found


# ----------------------------------------------------------------------------------- torch datasets


class _Listed(Dataset):
    def __init__(self, items: list[Any]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@pytest.mark.parametrize(
    "make",
    [
        lambda: _Listed([(Image.fromarray(image), 7) for image in COLOUR]),
        lambda: _Listed(list(COLOUR)),
        lambda: TensorDataset(torch.from_numpy(COLOUR.transpose(0, 3, 1, 2).copy())),
    ],
    ids=["pictures with labels", "arrays", "tensors"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_torch_dataset_is_the_same_data(make: Callable[[], Dataset], stream: bool) -> None:
    options = {"stream": True, "workers": 1} if stream else {}
    given = from_dataset(make(), binarize="dynamic", **options)
    assert isinstance(given.train, StreamedSplit) == stream
    _same(from_array(COLOUR, binarize="dynamic"), given)


def test_grey_pictures_and_rows_of_a_dataset() -> None:
    _same(from_array(GREY), from_dataset(_Listed([Image.fromarray(i) for i in GREY])))
    _same(from_array(BINARY, levels=5), from_dataset(_Listed(list(BINARY)), levels=5))


# --------------------------------------------------------------------------------------- training


def _trained(given: Data, **settings: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    vae = cfg.build(tiny_config(), given)
    metrics = fit(vae, given, **{"epochs": 3, "batch_size": 10} | settings).metrics
    for line in metrics:
        del line["seconds"]
    return metrics, copy_weights(vae)


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_a_streamed_run_is_the_same_run(tmp_path: Path) -> None:
    held, left = _both(_npy(tmp_path, GREY), workers=2, binarize="dynamic")
    metrics, weights = _trained(held, engine="svi")
    others, reading = _children(), set()
    again, other = _trained(
        left, engine="svi", callback=lambda _: reading.update(_children() - others)
    )
    assert again == metrics
    assert not reading  # while nothing is read
    _equal(other, weights)


@pytest.mark.parametrize("engine", ["svi", "traced"])
def test_a_streamed_run_resumes_exactly(engine: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"engine": engine, "lr": 1e-2}
    left = load(_npy(tmp_path, GREY), binarize="dynamic", stream=True, workers=1)
    metrics, weights = _trained(left, **settings)
    steps = iter([False] * 6 + [True])  # within the second epoch
    run = tmp_path / "run"
    others = _children()
    _trained(left, run=run, should_stop=lambda: next(steps), **settings)
    assert _children() <= others
    state = load_checkpoint(run / "checkpoints/last.pt")["state"]
    assert (state["epoch"], state["step_in_epoch"]) == (1, 2)
    none_ahead = load(tmp_path / "x.npy", binarize="dynamic", stream=True, workers=0)
    again, other = _trained(none_ahead, run=run, resume=True, **settings)
    assert again == metrics
    _equal(other, weights)


def test_an_engine_that_drew_in_memory_is_not_resumed_from_disk(tmp_path: Path) -> None:
    held, left = _both(_npy(tmp_path, GREY), binarize="dynamic")
    run = tmp_path / "run"
    _trained(held, engine="traced", run=run, epochs=1)
    with pytest.raises(InputError, match="held its training images in memory"):
        _trained(left, engine="auto", run=run, resume=True)
    left_behind = tmp_path / "other"
    _trained(left, engine="traced", run=left_behind, epochs=1)
    _trained(held, engine="auto", run=left_behind, resume=True)  # draws as that run did


def test_a_likelihood_sees_every_value_of_a_streamed_split(tmp_path: Path) -> None:
    few = np.where(GREY > 99, 200, 40).astype(np.uint8)
    left = load(_npy(tmp_path, few), stream=True, workers=0).train
    assert (left.every_level() * 255).round().unique().tolist() == [40, 200]
    for binarize in ("threshold", "dynamic"):
        cut = load(tmp_path / "x.npy", binarize=binarize, stream=True, workers=0)
        assert cut.train.every_level().unique().tolist() == [0, 1]
    noisy = load(tmp_path / "x.npy", dequantize="uniform", stream=True, workers=0).train
    assert (noisy.every_level() * 256).floor().unique().tolist() == [40, 200]
    many = RANDOM.permutation(600 * 256).reshape(600, 256).astype(np.uint8)
    every = load(_npy(tmp_path, many, "many.npy"), stream=True, workers=0).train
    assert every.every_level().shape == (1, 256)
    assert (every.every_level() * 255).round().unique().tolist() == list(range(256))
    bernoulli = cfg.build(tiny_config(), cut).likelihood
    before = torch.get_rng_state()
    check_data(bernoulli, cut)
    assert torch.get_rng_state().equal(before)
    grey = load(_npy(tmp_path, GREY), stream=True, workers=0)
    binary = grey._replace(valid=cut.valid, test=cut.test)
    with pytest.raises(InputError, match="Bernoulli"):
        check_data(bernoulli, binary)


@pytest.mark.slow
@pytest.mark.skipif(not compiling.has_compiler(), reason="needs a C++ compiler")
def test_a_compiled_engine_takes_what_is_streamed(tmp_path: Path) -> None:
    left = load(_npy(tmp_path, GREY), binarize="dynamic", stream=True, workers=1)
    traced, compiled = (_trained(left, engine=engine, lr=1e-2) for engine in ("traced", "compiled"))
    for ours, theirs in zip(compiled[0], traced[0], strict=True):
        assert ours["valid_elbo"] == pytest.approx(theirs["valid_elbo"], rel=1e-4)
    for name, t in traced[1].items():
        assert torch.allclose(compiled[1][name], t, rtol=1e-3, atol=1e-4), name


# --------------------------------------------------------------------------------------- refusals


def _images(mode: str) -> list[Any]:
    """As many PIL images of a mode that 8 bits a channel cannot hold."""
    if mode.startswith(("I", "F")):
        return [Image.new(mode, (4, 5)) for _ in range(20)]
    clear = np.dstack([GREY[0]] * (2 if mode == "LA" else 4))
    return [Image.fromarray(clear, mode)] * 20


def _little(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(streaming, "_free_memory", lambda: num_bytes)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "static": (lambda p: load(_npy(p, GREY), "static", stream=True), "another --binarize"),
    "npz": (lambda p: (np.savez(p / "x.npz", GREY), load(p / "x.npz", stream=True)), "numpy.save"),
    "a name": (lambda p: load("digits", stream=True), "numpy.save"),
    "floats": (lambda p: load(_npy(p, GREY / 255), stream=True), "uint8.*leave --stream out"),
    "workers": (lambda p: load(_npy(p, GREY), workers=2), "--stream"),
    "fewer": (lambda p: load(_npy(p, GREY), stream=True, workers=-1), "--workers"),
    "Fortran": (
        lambda p: load(_npy(p, np.asfortranarray(GREY)), stream=True),
        "ascontiguousarray",
    ),
    "shape": (lambda p: load(_npy(p, GREY[None]), stream=True), "expected shape"),
    "no images": (lambda p: load(_npy(p, GREY[:0]), stream=True), "cannot be read|at least one"),
    "two sizes": (
        lambda p: (_folder(p, GREY), _folder(p, GREY[:3, :3]), load(p, stream=True, workers=1)),
        "--image-size",
    ),
    "dataset of nothing": (lambda p: from_dataset(_Listed([])), "at least one"),
    "dataset of floats": (
        lambda p: from_dataset(_Listed([torch.rand(1, 2, 2)] * 20), stream=True),
        "ToTensor",
    ),
    "16 bits": (lambda p: from_dataset(_Listed(_images("I;16"))), "8 bits a channel"),
    "pictures of floats": (lambda p: from_dataset(_Listed(_images("F"))), "8 bits a channel"),
    "transparent": (lambda p: from_dataset(_Listed(_images("RGBA"))), "Flatten"),
    "transparent grey": (lambda p: from_dataset(_Listed(_images("LA"))), "Flatten"),
    "no map": (lambda p: from_dataset(iter([GREY])), "__getitem__"),
    "npz by another name": (
        lambda p: (
            np.savez(p / "x.npz", GREY),
            (p / "x.npz").rename(p / "x.npy"),
            load(p / "x.npy", stream=True),
        ),
        "numpy.save",
    ),
    "dataset of two sizes": (
        lambda p: from_dataset(_Listed([*GREY[:9], GREY[9, :3]]), stream=True, workers=1),
        r"item 9: expected shape \(1, 5, 4\).*got \(1, 3, 4\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_are_one_line_with_a_remedy(what: str, tmp_path: Path) -> None:
    message = one_line(*REFUSED[what], tmp_path)
    assert "expected" in message


def test_what_does_not_fit_is_told_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, place = _npy(tmp_path, GREY), _folder(tmp_path / "pictures", COLOUR)
    _little(monkeypatch, 1000)  # where the file's images are 1,200 bytes, and an x in float32 80
    for name in (file, place):
        with pytest.raises(InputError, match=r"fit into memory.*GB are free.*--stream\."):
            load(name)
    with pytest.raises(InputError, match=r"fit into memory.*--stream\."):
        from_dataset(_Listed(list(GREY)))
    left = load(file, stream=True, workers=0, valid_size=1, test_size=1)
    with pytest.raises(InputError, match=r"x\.npy, train: expected images that fit.*--limit"):
        left.train.tensor()
    assert left.train.head(10).tensor().shape == (10, 1, 5, 4)
    for part in ("valid", "test"):
        sizes = {"valid_size": 1, "test_size": 1} | {f"{part}_size": 20}
        with pytest.raises(InputError, match=f"pictures, {part}: expected .*smaller --{part}-size"):
            load(place, stream=True, workers=0, **sizes)
    monkeypatch.undo()
    assert streaming._free_memory() is None or streaming._free_memory() > 1e6


def test_an_image_that_is_lost_while_training_is_one_line(tmp_path: Path) -> None:
    left = load(_folder(tmp_path / "x", GREY), stream=True, workers=1)
    lost = tmp_path / f"x/{int(left.train.rows[5]):03}.png"
    lost.write_bytes(b"no picture")
    others = _children()
    with pytest.raises(InputError, match=f"^{lost.name}: expected an image") as caught:
        list(left.train.read([torch.arange(3), torch.arange(4, 8)]))
    assert "\n" not in str(caught.value)
    assert _children() <= others  # though the exception is kept


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_lost_while_training_is_one_line(workers: int, tmp_path: Path) -> None:
    left = load(_npy(tmp_path, GREY), stream=True, workers=workers).train
    file = tmp_path / "x.npy"
    file.write_bytes(file.read_bytes()[: -20 * 30])  # the last half of the images
    with pytest.raises(InputError, match=r"^x\.npy: .*it has changed") as caught:
        list(left.read([torch.arange(len(left))]))
    assert "\n" not in str(caught.value)
    _npy(tmp_path, GREY[:, ::-1])  # of the same size
    with pytest.raises(InputError, match=r"^x\.npy: .*it has changed"):
        left.batch(torch.arange(3))
    file.unlink()
    with pytest.raises(InputError, match=r"^x\.npy: .*No such file"):
        list(left.read([torch.arange(3)]))


def test_a_file_that_ends_too_soon_is_not_read_for_ever(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    read = np.zeros(4, np.uint8)
    file = (tmp_path / "short").open("rb", buffering=0)
    with file, pytest.raises(OSError, match="shorter than it was"):
        streaming._fill(file, read)
    assert read.tobytes() == b"abc\0"


def test_a_picture_that_is_coloured_meanwhile_is_refused(tmp_path: Path) -> None:
    left = load(_folder(tmp_path, GREY), stream=True, workers=0).train
    changed = int(left.rows[0])
    Image.fromarray(COLOUR[0]).save(tmp_path / f"{changed:03}.png")
    with pytest.raises(InputError, match="expected a grey image"):
        left.batch(torch.tensor([0]))
    assert left.batch(torch.arange(0)).shape == (0, 1, 5, 4)


class _OpensLate(Dataset):
    """The usual recipe for a data set that several processes read: each opens the file itself."""

    def __init__(self, path: Path):
        self.path = path
        self.file: Any = None

    def __len__(self) -> int:
        return len(GREY)

    def __getitem__(self, index: int) -> Any:
        if self.file is None:
            self.file = self.path.open("rb", buffering=0)
        self.file.seek(20 * index)
        os.sched_yield()
        return np.frombuffer(self.file.read(20), np.uint8).reshape(5, 4)


@pytest.mark.parametrize("workers", [0, 3])
def test_processes_do_not_share_what_a_dataset_has_opened(workers: int, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(GREY.tobytes())
    dataset = _OpensLate(tmp_path / "raw")
    given = from_dataset(dataset, stream=True, workers=workers)
    assert (dataset.file is None) == (workers > 0)
    _same(from_array(GREY), given)
    assert (dataset.file is None) == (workers > 0)
    if dataset.file is not None:
        dataset.file.close()


def _ended(row: int) -> np.ndarray:
    if row == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return GREY[row][None]


def test_a_reader_that_is_killed_is_one_line() -> None:
    images = streaming.Items(_ended, (60, 1, 5, 4))
    with pytest.raises(ProcessLostError, match="--workers 0"):
        list(streaming.fetch(images, list(np.arange(60).reshape(-1, 1)), 1))


class _Ends(_Listed):
    def __getitem__(self, index: int) -> Any:
        return _ended(index)[0]


def test_a_reader_that_is_killed_while_data_are_loaded_is_one_line() -> None:
    with pytest.raises(ProcessLostError, match="--workers 0"):
        from_dataset(_Ends(list(GREY)), stream=True, workers=1)


def test_a_reader_that_is_killed_within_a_step_is_one_line(tmp_path: Path) -> None:
    left = load(_npy(tmp_path, GREY), binarize="dynamic", stream=True, workers=1)
    steps, others = 0, _children()

    def kill() -> bool:
        nonlocal steps
        steps += 1
        if steps == 2:  # all batches have been read; the news comes between two lines of this
            time.sleep(0.5)
            (worker,) = _children() - others
            os.kill(worker, signal.SIGKILL)
            time.sleep(0.5)
        return False

    with pytest.raises(ProcessLostError, match=r"--workers 0, a training with --resume"):
        _trained(left, engine="svi", should_stop=kill, batch_size=16)


def _failing(row: int) -> np.ndarray:
    raise RuntimeError("of the data set's own")


def test_what_a_dataset_raises_itself_is_not_renamed() -> None:
    images = streaming.Items(_failing, (60, 1, 5, 4))
    with pytest.raises(RuntimeError, match="of the data set's own"):
        list(streaming.fetch(images, [np.arange(3)], 1))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_does_not_end_the_readers(signum: int, tmp_path: Path) -> None:
    """A key sends its signal to all processes of a terminal, and `timeout` to all that it began."""
    left = load(_folder(tmp_path, GREY), stream=True, workers=1).train
    batches, others = list(torch.arange(40).split(1)), _children()
    before = signal.signal(signum, signal.default_int_handler)  # pytest's own may ignore it
    try:
        read = left.read(batches)
        got = [next(read)]
        for worker in _children() - others:
            os.kill(worker, signum)
        got += read
    finally:
        signal.signal(signum, before)
    assert len(got) == 40


# ------------------------------------------------------------------------------- the command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    _npy(tmp_path, GREY)
    yield tmp_path


SMALL = "--hidden 8 --latent-dim 2 --batch-size 16 --epochs 2 --quiet --final-particles 3"


def test_commands_on_a_streamed_run(here: Path) -> None:
    ok(f"train --data x.npy --stream --workers 1 {SMALL} --test-size 5 --out left")
    ok(f"train --data x.npy {SMALL} --test-size 5 --out held")
    _equal(*(load_checkpoint(here / f"{n}/checkpoints/best.pt")["model"] for n in ("left", "held")))
    told = [json.loads((here / f"{n}/evaluation.json").read_text()) for n in ("left", "held")]
    for each in told:
        del each["seconds"]
    assert told[0] == told[1]
    assert told[0]["num_images"] == 5
    for command in (
        "evaluate {} --num-particles 4 --split train",
        "evaluate {} --num-particles 4 --split train --limit 7",
        "score {} x.npy --num-particles 4",
    ):
        shown = [re.sub(r"[\d.]+ s on cpu", "", ok(command.format(n))) for n in ("left", "held")]
        assert shown[0].replace("left", "held") == shown[1]
        assert "log p(x)" in shown[0] or "score" in command
    left, held = (ok(f"train --data x.npy {more} --dry-run") for more in ("--stream", ""))
    assert "240 B of data" in left and "1 kB of data" in held
    ok("train --out left --resume --epochs 3 --workers 0 --quiet")
    ok("train --out held --resume --epochs 3 --quiet")
    _equal(*(load_checkpoint(here / f"{n}/checkpoints/last.pt")["model"] for n in ("left", "held")))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--data x.npy --workers 2", "expected no --workers without --stream"),
        ("--data x.npy --stream --workers -1", "--workers must be at least 0"),
        ("--data digits --stream", "digits: expected no --stream"),
        ("--data x.npy --stream --binarize static", "Use another --binarize"),
        ("--data x.npy --test-size 70", "expected more images"),
    ],
)
def test_what_is_typed_wrongly(
    flags: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(f"train {flags}", says, here, capsys)


def test_workers_are_shared_between_the_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert streaming.default_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert streaming.default_workers() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "40")
    assert streaming.default_workers() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    assert streaming.default_workers() == 4
