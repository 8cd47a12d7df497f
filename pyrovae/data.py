"""Data sets with their protocol: which images, on which levels, sampled how, split how.

A log-likelihood is a statement about particular x. ``load`` therefore returns a ``Data`` that
carries its ``Protocol``, and two numbers are compared only where their protocols allow it.
"""

import difflib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae import counters, sources, sprites, streaming
from pyrovae.errors import InputError
from pyrovae.sources import Source

BINARIZE = ("none", "dynamic", "static", "threshold")
DEQUANTIZE = ("none", "uniform")
SPLITS = ("train", "valid", "test")

# u is drawn at the middle of 2**15 equal cells of (0, 1): then k + u for 8-bit k is exact in
# float32, so y stays strictly inside (0, 1) and floor(y (L + 1)) is k again, never k + 1.
_CELLS = 2**15


@dataclass(frozen=True)
class Protocol:
    """What a number was measured on; plain values, so it can be written beside the number.

    levels: L, the largest level of x before dequantisation (1 when binary), None without a grid.
    seed: of the split where the publishers made none, and of everything sampled once.
    fingerprint: SHA-256 of the raw images. published: the splits the publishers made.

    >>> print(load("digits", binarize="dynamic").protocol)
    digits, dynamic binarisation, 1,297/200/300 train/valid/test, split by seed 0, valid and test \
sampled once with seed 0
    """

    data: str
    binarize: str
    dequantize: str
    levels: int | None
    train_size: int
    valid_size: int
    test_size: int
    seed: int
    fingerprint: str
    published: str = "none"

    def __str__(self) -> str:
        sizes = f"{self.train_size:,}/{self.valid_size:,}/{self.test_size:,} train/valid/test"
        parts = [self.data, self._values(), sizes]
        if self.published == "none":
            parts.append(f"split by seed {self.seed}")
        if self.binarize == "static":
            parts.append(f"every image sampled once with seed {self.seed}")
        elif self.binarize == "dynamic" or self.dequantize == "uniform":
            parts.append(f"valid and test sampled once with seed {self.seed}")
        return ", ".join(parts)

    def _values(self) -> str:
        if self.binarize == "threshold":
            return "binarised at one half"
        if self.binarize != "none":
            return f"{self.binarize} binarisation"
        if self.levels is None:
            return "real values without a grid"
        if self.dequantize == "uniform":
            return f"{self.levels + 1} levels dequantised uniformly"
        return "binary as given" if self.levels == 1 else f"{self.levels + 1} levels"

    def why_not_comparable(self, other: "Protocol", corrected: bool = False) -> str | None:
        """The first reason why test numbers under the two must not be compared; None if they may.

        corrected: both numbers carry the level correction (``dims * log(L + 1)`` for a density of
        dequantised x), so dequantised and plain levels compare.
        """
        if self.fingerprint != other.fingerprint:
            return (
                f"they saw different images: {self.data} ({self.fingerprint[:8]}) "
                f"and {other.data} ({other.fingerprint[:8]})"
            )
        names = ["binarize", "dequantize", "levels", "published", "test_size"]
        if corrected:
            names.remove("dequantize")
        sampled = self.binarize in ("dynamic", "static")
        if sampled or self.dequantize == "uniform" or self.published == "none":
            names.append("seed")
        for name in names:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name.replace('_', ' ')} differs: {ours} and {theirs}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Protocol":
        """The inverse of ``to_dict``. Raises InputError for missing or unknown fields."""
        expected = {f.name for f in fields(cls)}
        if set(values) != expected:
            raise InputError(
                f"expected a protocol with the fields {', '.join(sorted(expected))}; got "
                f"{', '.join(sorted(map(str, values))) or 'none'}. "
                "Take it from Protocol.to_dict of this version."
            )
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Split:
    """Some images, given out as x: float32 ``(n, *x_shape)`` in [0, 1].

    Held as ``raw``: uint8 levels k of ``levels`` = L, or the values of x themselves where
    ``levels`` is None. ``sampling`` says what ``batch`` does: "fixed" gives x = k/L; "bernoulli"
    draws each x from Bernoulli(k/L); "uniform" gives y = (k + u) / (L + 1) with u ~ U(0, 1).
    rows: where the images stand in the source. labels: integers ``(N,)`` or None.

    >>> test = load("digits", binarize="threshold").test
    >>> test.batch(torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])
    """

    name: str
    protocol: Protocol
    raw: Tensor
    levels: int | None
    rows: Tensor
    sampling: Literal["fixed", "bernoulli", "uniform"] = "fixed"
    labels: Tensor | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.raw)

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self):,} x of shape {self.x_shape}; {self.protocol}>"

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of one x: (C, H, W) or (F,)."""
        return tuple(self.raw.shape[1:])

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The x at ``index`` ``(n,)``; drawn anew from ``generator`` unless the split is fixed."""
        # index_select: fifteen times faster than raw[index] on a CPU.
        return self.drawn(self.raw.index_select(0, index), generator)

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """What `drawn` takes, for each of the indices ``(n,)`` in turn: ``(n, *x_shape)``."""
        return (self.raw.index_select(0, index) for index in batches)

    def tensor(self, generator: torch.Generator | None = None) -> Tensor:
        """All x, ``(N, *x_shape)``: the same on every call, unless ``sampling`` is not fixed."""
        return self.drawn(self.raw, generator)

    def head(self, n: int) -> "Split":
        """The first ``n`` images as a split, whose protocol says so. Raises InputError if n < 1."""
        if n < 1:
            raise InputError(f"expected at least 1 image; got {n}. Give --limit 1 or more.")
        if n >= len(self):
            return self
        shorter: dict[str, Any] = {f"{self.name}_size": n}
        return replace(
            self,
            protocol=replace(self.protocol, **shorter),
            raw=self.raw[:n],
            rows=self.rows[:n],
            labels=None if self.labels is None else self.labels[:n],
            factors={name: values[:n] for name, values in self.factors.items()},
        )

    def to(self, device: torch.device | str) -> "Split":
        """The same split held on ``device``; ``batch`` then wants index and generator there."""
        return replace(self, raw=self.raw.to(device))

    def noise(self, n: int, key: Tensor, number: Tensor) -> Tensor | None:
        """The integers that ``sampled`` turns ``n`` images into x with; None for a fixed split.

        A function of the key (2,) and of the number (), a counter of steps: `counters.integers`.
        """
        if self.sampling == "fixed":
            return None
        return counters.integers(key, number, n, self.x_shape)

    def sampled(self, raw: Tensor, noise: Tensor | None) -> Tensor:
        """The x of ``raw`` levels as a function of noise, distributed as those of ``batch``.

        With 16 bits, P(x = 1) is k/L to within 2^-17, and exact at k = 0 and k = L.
        """
        if self.sampling == "uniform":
            assert noise is not None
            return _dequantized(raw, noise & (_CELLS - 1), self.levels or 0)
        x = raw if self.levels is None else raw.to(torch.float32) / self.levels
        if self.sampling == "bernoulli":
            assert noise is not None
            u = (noise.to(torch.float32) + (2**15 + 0.5)) * 2**-16  # strictly within (0, 1)
            return (u < x).to(x.dtype)
        return x

    def drawn(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The x of ``raw`` levels, drawn from ``generator`` unless the split is fixed."""
        return _drawn(raw, self.levels, self.sampling, generator)

    def drawn_once(self, generator: torch.Generator | None = None) -> "Split":
        """The split with every x fixed: as it is, or drawn from ``generator`` now."""
        if self.sampling == "fixed":
            return self
        return replace(self, raw=self.tensor(generator), levels=None, sampling="fixed")


@dataclass(frozen=True, eq=False)
class StreamedSplit:
    """Training images that stay on disk, given out as those of a `Split` are.

    The same images at the same places, and the same x from the same ``generator``; but nothing is
    held, so there is no ``raw``. ``read`` hands out whole epochs, read ahead by the processes of a
    `torch.utils.data.DataLoader`; ``batch`` reads when it is asked.

    images: all of the source, of which these are the ``rows``, on ``levels`` = L. found: the levels
    that occur in the source. workers: processes that read ahead.
    """

    name: str
    protocol: Protocol
    images: streaming.Images
    levels: int
    rows: Tensor
    found: Tensor
    sampling: Literal["fixed", "bernoulli", "uniform"] = "fixed"
    workers: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return (
            f"<{self.name}: {len(self):,} x of shape {self.x_shape}, left on disk; {self.protocol}>"
        )

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of one x: (C, H, W) or (F,)."""
        return tuple(self.images.shape[1:])

    @property
    def cut(self) -> bool:
        """Whether x is 1 where k/L > 1/2, and else 0."""
        return self.protocol.binarize == "threshold"

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """What `drawn` takes, for each of the indices ``(n,)`` in turn: ``(n, *x_shape)``.

        Raises InputError for an image that cannot be read any more.
        """
        rows = [self.rows.index_select(0, index.cpu()).numpy() for index in batches]
        return streaming.fetch(self.images, rows, self.workers)

    def drawn(self, raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The x of ``raw`` levels, drawn from ``generator`` unless the split is fixed."""
        if self.cut:
            return (raw > self.levels / 2).to(torch.float32)
        return _drawn(raw, self.levels, self.sampling, generator)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The x at ``index`` ``(n,)``; drawn anew from ``generator`` unless the split is fixed."""
        rows = self.rows.index_select(0, index.cpu()).numpy()
        if not self.images.apart:
            return self.drawn(torch.from_numpy(self.images[rows]), generator)
        (raw,) = streaming.fetch(self.images, [rows], min(self.workers, 1))
        return self.drawn(raw, generator)

    def every_level(self) -> Tensor:
        """Some x of every level that occurs, ``(n, *x_shape)``; drawn ones from a fixed seed.

        Binarised ones are 0 and 1, whatever the levels.
        """
        shape = self.x_shape
        size = math.prod(shape)
        binary = self.cut or self.sampling == "bernoulli"
        values = torch.tensor([0, self.levels], dtype=torch.uint8) if binary else self.found
        count = -(-len(values) // size)
        raw = values[torch.arange(count * size) % len(values)].reshape(count, *shape)
        return self.drawn(raw, torch.Generator().manual_seed(0))

    def head(self, n: int) -> Split:
        """The first ``n`` images, held. Raises InputError if n < 1, or if they do not fit."""
        if n < 1:
            raise InputError(f"expected at least 1 image; got {n}. Give --limit 1 or more.")
        rows, levels, what = self.rows[:n], self.levels, f"{self.protocol.data}, {self.name}"
        shorter: dict[str, Any] = {f"{self.name}_size": len(rows)}
        remedy = "Give --limit, or another --split."
        raw = torch.from_numpy(_held(self.images, rows.numpy(), self.workers, what, remedy))
        if self.cut:
            raw, levels = (raw > levels / 2).to(torch.uint8), 1
        protocol = replace(self.protocol, **shorter)
        return Split(self.name, protocol, raw, levels, rows, self.sampling)

    def tensor(self, generator: torch.Generator | None = None) -> Tensor:
        """All x, ``(N, *x_shape)``, as of a `Split`; InputError where they do not fit in memory."""
        return self.head(len(self)).tensor(generator)

    def to(self, device: torch.device | str) -> "StreamedSplit":
        """The same split: it is held nowhere."""
        return self


class Data(NamedTuple):
    """The three splits of a data set and the protocol they share.

    >>> data = load("digits")
    >>> data.x_shape, len(data.train), len(data.valid), len(data.test)
    ((1, 8, 8), 1297, 200, 300)
    """

    train: Split | StreamedSplit
    valid: Split
    test: Split
    protocol: Protocol

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of one x: (C, H, W) or (F,)."""
        return self.train.x_shape

    def to(self, device: torch.device | str) -> "Data":
        """The same data held on ``device``."""
        return self._replace(**{name: getattr(self, name).to(device) for name in SPLITS})


def load(
    name: str | Path,
    binarize: str = "none",
    dequantize: str = "none",
    root: str | Path | None = None,
    download: bool = False,
    seed: int = 0,
    valid_size: int | None = None,
    test_size: int | None = None,
    image_size: int | None = None,
    stream: bool = False,
    workers: int | None = None,
) -> Data:
    """Load a data set by name (see ``REGISTRY``), or from a folder of images, a .npy or a .npz.

    binarize: "none"; "dynamic", x ~ Bernoulli(k/L) anew for each training batch, validation and
    test sampled once; "static", every image sampled once; "threshold", x = 1 where k/L > 1/2.
    dequantize: "none" or "uniform", y = (k + u) / (L + 1): training anew each time, the rest once.
    root: the folder of downloaded sets; by default $PYROVAE_DATA, else ``data``.
    seed: of everything sampled once, and of the split where the publishers made none.
    stream: leave the training images of a folder or a .npy on disk: a `StreamedSplit`, of the same
    protocol. They are looked through once here, for fingerprint and levels. workers: processes that
    read them ahead; None: one for each core, at most 4. (Where processes are spawned, as on macOS,
    each pass takes seconds to start them: 0 is better for what is soon read.)
    Raises InputError for an unknown name, unreadable files, images that do not fit into memory, or
    options that do not fit the data.
    """
    _check_words(binarize, dequantize)
    name = os.fspath(name)
    entry = REGISTRY.get(name) or _path_entry(name)
    options: dict[str, Any] = {}
    if "root" in entry.options:
        options["root"] = Path(root or os.environ.get("PYROVAE_DATA") or "data")
        options["download"] = download
    elif root is not None or download:
        flag = "--download" if download else "--data-root"
        raise InputError(
            f"{name}: expected no {flag}, for nothing is fetched; got it. Leave it out."
        )
    if image_size is not None:
        if "image_size" not in entry.options:
            raise InputError(
                f"{name}: expected no --image-size, for its images have one size; got "
                f"{image_size}. Leave it out."
            )
        if image_size < 1:
            raise InputError(
                f"expected an image size of 1 or more; got {image_size}. Set --image-size."
            )
        options["image_size"] = image_size
    options |= _streaming(name, stream, workers, binarize, "stream" in entry.options)
    source = entry.read(**options)
    label = name if name in REGISTRY else Path(name).resolve().name
    return _data(source, label, binarize, dequantize, seed, valid_size, test_size)


def from_array(
    images: Any,
    labels: Any = None,
    name: str = "my-images",
    binarize: str = "none",
    dequantize: str = "none",
    seed: int = 0,
    valid_size: int | None = None,
    test_size: int | None = None,
    levels: int | None = None,
) -> Data:
    """Data from a NumPy array or a tensor, with the same checks and options as a .npz in ``load``.

    images: uint8 or float in [0, 1], of shape (N, H, W), (N, H, W, C), (N, C, H, W) with C 1 or 3,
    or (N, F). labels: integers or names, ``(N,)``. levels: the largest level of
    uint8 images, by default 255 (1 where nothing passes 1).

    >>> from_array(np.zeros((20, 4, 4), np.uint8)).x_shape
    (1, 4, 4)
    """
    _check_words(binarize, dequantize)
    source = sources.array(images, labels, levels, what=name)
    return _data(source, name, binarize, dequantize, seed, valid_size, test_size)


def from_dataset(
    dataset: Any,
    name: str = "my-images",
    binarize: str = "none",
    dequantize: str = "none",
    seed: int = 0,
    valid_size: int | None = None,
    test_size: int | None = None,
    levels: int | None = None,
    stream: bool = False,
    workers: int | None = None,
) -> Data:
    """Data from a map-style torch ``Dataset``, with the options of ``load``; labels are left out.

    dataset: its items are images, or tuples that begin with one: PIL images, or uint8 as arrays or
    tensors (H, W), (H, W, C), (C, H, W) with C 1 or 3, or (F,). The same item must be the same
    image each time: augmentation would have no likelihood. With workers, none is read in this
    process, so that a file which the data set opens when it is first asked is opened by each.

    >>> images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    >>> from_dataset(torch.utils.data.TensorDataset(images), stream=True, workers=0).train
    <train: 32 x of shape (1, 4, 4), left on disk; my-images, 256 levels, 32/4/4 train/valid/test, \
split by seed 0>
    """
    _check_words(binarize, dequantize)
    options = _streaming(name, stream, workers, binarize, True)
    source = sources.dataset(dataset, levels, name, **options)
    return _data(source, name, binarize, dequantize, seed, valid_size, test_size)


def _streaming(
    name: str, stream: bool, workers: int | None, binarize: str, possible: bool
) -> dict[str, Any]:
    """The options of a reader that can leave images where they are."""
    if workers is not None and not stream:
        raise InputError(
            f"expected no --workers without --stream, which they read for; got {workers}. Leave it "
            "out, or give --stream."
        )
    if workers is not None and workers < 0:
        raise InputError(f"expected --workers of 0 or more; got {workers}. Set it so.")
    if stream and not possible:
        raise InputError(
            f"{name}: expected no --stream, for only a folder of images or a .npy can be left on "
            "disk; got it. Leave it out, or save the images with numpy.save."
        )
    if stream and binarize == "static":
        raise InputError(
            f"{name}: expected images that need not be kept for --stream; got --binarize static, "
            "which draws each once. Use another --binarize, or leave --stream out."
        )
    if not stream:
        return {}
    return {"stream": True, "workers": streaming.default_workers() if workers is None else workers}


def fixed(
    x: Tensor, valid: Tensor | None = None, test: Tensor | None = None, name: str = "x"
) -> Data:
    """Data of given x ``(N, *x_shape)``, taken as they are: any values, dtype and device.

    ``valid`` and ``test`` default to ``x`` itself. levels is 1 where all x are 0 or 1, else None.

    >>> fixed(torch.randn(5, 3)).test.tensor().shape
    torch.Size([5, 3])
    """
    parts = [x, x if valid is None else valid, x if test is None else test]
    if any(p.ndim < 2 or len(p) < 1 or p.shape[1:] != x.shape[1:] for p in parts):
        shapes = ", ".join(str(tuple(p.shape)) for p in parts)
        raise InputError(
            f"{name}: expected x of one shape (N, *x_shape); got {shapes}. Reshape them."
        )
    binary = all(bool(((p == 0) | (p == 1)).all()) for p in parts)
    digest = streaming.fingerprint(*(p.detach().cpu().numpy() for p in parts))
    sizes = (len(x), len(parts[1]), len(parts[2]))
    levels = 1 if binary else None
    protocol = Protocol(name, "none", "none", levels, *sizes, 0, digest, "all")
    splits = [
        Split(part, protocol, p, None, torch.arange(len(p)))
        for part, p in zip(SPLITS, parts, strict=True)
    ]
    return Data(splits[0], splits[1], splits[2], protocol)


def _check_words(binarize: str, dequantize: str) -> None:
    for flag, value, known in (
        ("binarize", binarize, BINARIZE),
        ("dequantize", dequantize, DEQUANTIZE),
    ):
        if value not in known:
            raise InputError(
                f"expected --{flag} to be one of {', '.join(known)}; got {value!r}."
                f"{_did_you_mean(value, known)} Choose one of them."
            )
    if binarize != "none" and dequantize != "none":
        raise InputError(
            f"expected binarised or dequantised data; got both ({binarize}, {dequantize}). "
            "Leave out --binarize for a density, or --dequantize for a Bernoulli."
        )


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(str(word).lower().replace("_", "-"), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _path_entry(name: str) -> "Entry":
    path = Path(name).expanduser()
    if name and path.is_dir():
        return Entry(partial(sources.folder, path), "", ("image_size", "stream"))
    if path.suffix in (".npy", ".npz"):
        if not path.is_file():
            raise InputError(
                f"expected a file at {name}; there is none. Check the path after --data."
            )
        return Entry(partial(sources.file, path), "", ("stream",) if path.suffix == ".npy" else ())
    raise InputError(
        f"expected --data to be one of {', '.join(REGISTRY)}, or a path to a folder of images, "
        f".npy or .npz; got {name!r}.{_did_you_mean(name, REGISTRY)} Give one of these."
    )


def _data(
    source: Source,
    name: str,
    binarize: str,
    dequantize: str,
    seed: int,
    valid_size: int | None,
    test_size: int | None,
) -> Data:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"expected a seed from 0 to 4294967295; got {seed!r}. Set --seed.")
    if source.levels == 1 and binarize in ("dynamic", "threshold"):
        raise InputError(
            f"{name}: expected grey images for --binarize {binarize}; got images that are binary "
            "already. Use --binarize none."
        )
    if source.levels == 1 and binarize == "static":
        binarize = "none"  # Bernoulli(0) and Bernoulli(1) have nothing to sample
    if source.levels is None and dequantize != "none":
        raise InputError(
            f"{name}: expected images on levels for --dequantize {dequantize}; got real values "
            "without a grid. Use --dequantize none, or give the levels as uint8."
        )
    rows = _rows(source, name, seed, valid_size, test_size)
    protocol = Protocol(
        data=name,
        binarize=binarize,
        dequantize=dequantize,
        levels=source.levels if binarize == "none" else 1,
        train_size=len(rows[0]),
        valid_size=len(rows[1]),
        test_size=len(rows[2]),
        seed=seed,
        fingerprint=_fingerprint(source),
        published=source.published,
    )
    valid, test = (_split(source, protocol, i, rows[i]) for i in (1, 2))
    if source.contents is not None:
        return Data(_streamed(source, protocol, rows[0]), valid, test, protocol)
    return Data(_split(source, protocol, 0, rows[0]), valid, test, protocol)


def _fingerprint(source: Source) -> str:
    if source.contents is not None:
        return source.contents.fingerprint
    assert isinstance(source.images, np.ndarray)
    return streaming.fingerprint(source.images)


def _stream(seed: int, purpose: int) -> np.random.RandomState:
    # RandomState's streams are frozen for ever by NumPy's policy; Generator's and torch's are not.
    return np.random.RandomState([seed, purpose])


def _rows(
    source: Source, name: str, seed: int, valid_size: int | None, test_size: int | None
) -> list[np.ndarray]:
    """The rows of train, valid and test; the test rows depend on the seed and test_size only."""
    count = source.images.shape[0]
    for flag, size, refused in (
        ("valid", valid_size, source.published == "all"),
        ("test", test_size, source.published != "none"),
    ):
        if size is not None and refused:
            raise InputError(
                f"{name}: expected no --{flag}-size, for its {flag} split is published; got "
                f"{size}. Leave it out."
            )
        if size is not None and size < 1:
            raise InputError(f"expected --{flag}-size of 1 or more; got {size}. Set it so.")
    tenth = max(1, count // 10)
    num_valid = valid_size or source.num_valid or tenth
    num_test = test_size or source.num_test or tenth
    if num_valid + num_test >= count:
        raise InputError(
            f"{name}: expected more images than {num_valid:,} valid and {num_test:,} test ones; "
            f"got {count:,} in all. Give more images, or smaller --valid-size and --test-size."
        )
    order = np.arange(count)
    if source.published == "none":
        order = _stream(seed, 3).permutation(count)
    rest, test = order[:-num_test], order[-num_test:]
    if source.shuffle_valid:
        rest = rest[_stream(seed, 4).permutation(len(rest))]
    return [rest[:-num_valid], rest[-num_valid:], test]


def _split(source: Source, protocol: Protocol, which: int, rows: np.ndarray) -> Split:
    binarize, levels, name = protocol.binarize, source.levels, SPLITS[which]
    contiguous = bool((np.diff(rows) == 1).all())
    if not isinstance(source.images, np.ndarray):
        what, remedy = f"{protocol.data}, {name}", f"Set a smaller --{name}-size."
        raw = _held(source.images, rows, source.workers, what, remedy)
    elif contiguous:
        raw = source.images[rows[0] : rows[-1] + 1]
    else:
        raw = source.images[rows]
    sampling = _sampling(protocol) if name == "train" else "fixed"
    if sampling != "fixed":
        pass  # at each use
    elif binarize == "threshold":
        raw, levels = (raw > (levels or 1) / 2).astype(np.uint8), 1
    elif binarize != "none":
        raw, levels = _bernoulli_once(raw, levels or 1, _stream(protocol.seed, which)), 1
    elif protocol.dequantize == "uniform":
        cell = _stream(protocol.seed, which).randint(0, _CELLS, raw.shape, np.uint16)
        cells = torch.from_numpy(cell.astype(np.int32))
        raw, levels = _dequantized(_tensor(raw), cells, levels or 0).numpy(), None
    labels = None if source.labels is None else torch.from_numpy(source.labels[rows])
    factors = {k: torch.from_numpy(v[rows]) for k, v in (source.factors or {}).items()}
    return Split(
        name, protocol, _tensor(raw), levels, torch.from_numpy(rows), sampling, labels, factors
    )


def _held(
    images: streaming.Images, rows: np.ndarray, workers: int, what: str, remedy: str
) -> np.ndarray:
    # A byte a number, and four once they are x in float32.
    streaming.check_memory(5 * len(rows) * math.prod(images.shape[1:]), what, remedy)
    return streaming.gather(images, rows, workers)


def _sampling(protocol: Protocol) -> Literal["fixed", "bernoulli", "uniform"]:
    """How the training images are drawn at each use."""
    if protocol.binarize == "dynamic":
        return "bernoulli"
    return "uniform" if protocol.dequantize == "uniform" else "fixed"


def _streamed(source: Source, protocol: Protocol, rows: np.ndarray) -> StreamedSplit:
    assert source.contents is not None and source.levels is not None
    assert not isinstance(source.images, np.ndarray)
    return StreamedSplit(
        SPLITS[0],
        protocol,
        source.images,
        source.levels,
        torch.from_numpy(rows),
        torch.from_numpy(source.contents.levels.astype(np.uint8)),
        _sampling(protocol),
        source.workers,
    )


def _tensor(raw: np.ndarray) -> Tensor:
    # torch warns about arrays that it must not write to, such as those read straight from a file.
    return torch.from_numpy(raw if raw.flags.writeable else raw.copy())


def _bernoulli_once(raw: np.ndarray, levels: int, stream: np.random.RandomState) -> np.ndarray:
    drawn = np.empty(raw.shape, np.uint8)
    for start in range(0, len(raw), 1000):  # in pieces, for the draws take eight bytes a value
        piece = raw[start : start + 1000]
        drawn[start : start + 1000] = stream.random_sample(piece.shape) * levels < piece
    return drawn


def _drawn(
    raw: Tensor, levels: int | None, sampling: str, generator: torch.Generator | None
) -> Tensor:
    if sampling == "uniform":
        cell = torch.randint(0, _CELLS, raw.shape, generator=generator, device=raw.device)
        return _dequantized(raw, cell, levels or 0)
    x = raw if levels is None else raw.to(torch.float32).div_(levels)
    if sampling == "bernoulli":
        u = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return (u < x).to(x.dtype)
    return x


def _dequantized(k: Tensor, cell: Tensor, levels: int) -> Tensor:
    u = cell.to(torch.float32).add_(0.5).div_(_CELLS)
    return u.add_(k).div_(levels + 1)


class Entry(NamedTuple):
    """How to read a named data set, what it is, and which options it takes."""

    read: Callable[..., Source]
    summary: str
    options: tuple[str, ...] = ()


def _sprites(image_size: int = 64) -> Source:
    drawn = sprites.draw(6_000, image_size)
    return Source(
        drawn.images, 255, drawn.labels, drawn.factors, num_valid=500, num_test=500, published="all"
    )


def _idx(folder: str, flag: str) -> Callable[..., Source]:
    return lambda root, download: sources.idx(root, download, folder, flag)


REGISTRY: dict[str, Entry] = {
    "digits": Entry(sources.digits, "1,797 handwritten digits, 8×8, 17 levels; split by the seed"),
    "sprites": Entry(_sprites, "6,000 drawn shapes with known factors, 64×64×3", ("image_size",)),
    "mnist": Entry(_idx("MNIST", "mnist"), "70,000 handwritten digits, 28×28", ("root",)),
    "fashion-mnist": Entry(
        _idx("FashionMNIST", "fashion-mnist"), "70,000 articles of clothing, 28×28", ("root",)
    ),
    "kmnist": Entry(_idx("KMNIST", "kmnist"), "70,000 cursive Japanese letters, 28×28", ("root",)),
    "omniglot": Entry(
        sources.omniglot,
        "32,460 characters of 50 alphabets, resized to 28×28",
        ("root", "image_size"),
    ),
    "cifar10": Entry(sources.cifar10, "60,000 photographs of ten things, 32×32×3", ("root",)),
    "svhn": Entry(sources.svhn, "99,289 photographs of house numbers, 32×32×3", ("root",)),
    "celeba": Entry(
        sources.celeba, "202,599 faces, cropped and resized to 64×64×3", ("root", "image_size")
    ),
    "binarized-mnist": Entry(
        sources.binarized_mnist, "Larochelle's binary MNIST, 28×28, no labels", ("root",)
    ),
}
