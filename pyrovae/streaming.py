"""Images that stay where they are: read a batch at a time, by the processes of a `DataLoader`."""

import hashlib
import io
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyrovae.errors import InputError, ProcessLostError

# Bytes that are read at once where there are no batches: some of them wait in shared memory, which
# may be little.
_BLOCK = 4_000_000
_MOST_WORKERS = 4
_LEFT = (signal.SIGINT, signal.SIGTERM)


class Images(Protocol):
    """Images of uint8, given out by rows as an array gives them out."""

    shape: tuple[int, ...]
    """(N, *x_shape)."""
    apart: bool
    """Whether this process must not read where others do: they would share what it has opened."""

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The images of those rows (n,): (n, *x_shape)."""
        ...


class ArrayFile:
    """The uint8 array of a .npy file in C order, of which only what is asked for is read.

    A map of the file would be shorter, but reads tens of images around each from a disk.
    channels_last: the file holds (N, H, W, C); without a channel axis one is put in.
    """

    apart = False

    def __init__(self, path: Path, channels_last: bool = False):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        self._path = path
        self._offset: int = array.offset
        self._stored: tuple[int, ...] = array.shape
        self._channels_last = channels_last
        self._state = _state(os.stat(path))
        self.shape: tuple[int, ...] = self._arranged(array).shape

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The images of those rows; InputError where the file holds them no more."""
        images = np.empty((len(rows), *self._stored[1:]), np.uint8)
        if not len(rows):
            return self._arranged(images)
        size = math.prod(self._stored[1:])
        done = 0
        try:
            # Opened anew each time, for processes that share an open file share their place in it.
            with self._path.open("rb", buffering=0) as file:
                if _state(os.fstat(file.fileno())) != self._state:
                    raise OSError("it has changed since")
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                    file.seek(self._offset + int(run[0]) * size)
                    _fill(file, images[done : done + len(run)])
                    done += len(run)
        except OSError as error:
            raise InputError(
                f"{self._path.name}: expected the images that were there; it cannot be read any "
                f"more ({error.strerror or error}). Put the file back as it was."
            ) from error
        return np.ascontiguousarray(self._arranged(images))

    def _arranged(self, images: np.ndarray) -> np.ndarray:
        if images.ndim == 3:
            return images[:, None]
        return images.transpose(0, 3, 1, 2) if self._channels_last else images


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _fill(file: io.RawIOBase, images: np.ndarray) -> None:
    rest = images.data.cast("B")
    while rest:  # one call reads 2 GB at most
        got = file.readinto(rest)
        if not got:
            raise OSError("it is shorter than it was")
        rest = rest[got:]


class Items:
    """Images that ``read`` gives one by one, uint8 of the shape that ``shape`` (N, *x_shape) says.

    A method of a class, or a partial of a function, can be sent to another process; a lambda not.
    apart: it may hold an open file, whose place in it processes would share.
    """

    def __init__(
        self, read: Callable[[int], np.ndarray], shape: tuple[int, ...], apart: bool = False
    ):
        self._read = read
        self.shape = shape
        self.apart = apart

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The images of those rows."""
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for i, row in enumerate(rows):
            images[i] = self._read(int(row))
        return images


def shape_of(read: Callable[[int], np.ndarray], workers: int) -> tuple[int, ...]:
    """The shape of the first image, read where the others will be."""
    with told():
        (shape,) = fetch(_First(read), [np.array([0])], min(workers, 1))
    return tuple(shape.tolist())


class _First:
    """As "images", the shape of the first image."""

    shape: tuple[int, ...] = (1, 1)
    apart = True

    def __init__(self, read: Callable[[int], np.ndarray]):
        self._read = read

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.array(self._read(int(rows[0])).shape)


class Contents(NamedTuple):
    """What one look through all images tells.

    levels: those that occur, in order. grey: whether the channels of every image are equal.
    fingerprint: that of the images, and grey_fingerprint that of their first channel.
    """

    levels: np.ndarray
    grey: bool
    fingerprint: str
    grey_fingerprint: str


def contents(images: Images, workers: int) -> Contents:
    """Look through all images once, in their order."""
    colours = len(images.shape) == 4 and images.shape[1] > 1
    whole = _digest(images.shape)
    first = _digest((images.shape[0], 1, *images.shape[2:]))
    found, grey = np.zeros(256, bool), True
    with told():
        for block in fetch(images, _blocks(images, np.arange(images.shape[0])), workers):
            levels = block.numpy()
            found |= np.bincount(levels.ravel(), minlength=256) > 0
            whole.update(levels.data)
            if colours and grey:
                grey = bool((levels == levels[:, :1]).all())
                first.update(np.ascontiguousarray(levels[:, :1]).data)
    return Contents(np.flatnonzero(found), grey, whole.hexdigest(), first.hexdigest())


def gather(images: Images, rows: np.ndarray, workers: int) -> np.ndarray:
    """The images of those rows, held: uint8 (n, *x_shape)."""
    held = np.empty((len(rows), *images.shape[1:]), np.uint8)
    blocks = _blocks(images, rows)
    if len(blocks) == 1 and not images.apart:
        workers = 0  # sooner done than another process is started
    done = 0
    with told():
        for block in fetch(images, blocks, workers):
            held[done : done + len(block)] = block.numpy()
            done += len(block)
    return held


def _blocks(images: Images, rows: np.ndarray) -> list[np.ndarray]:
    size = max(1, _BLOCK // math.prod(images.shape[1:]))
    return np.split(rows, range(size, len(rows), size))


def fingerprint(*arrays: np.ndarray) -> str:
    """SHA-256 of kind, shape and content of each array; the same on every machine."""
    digest = hashlib.sha256()
    for array in arrays:
        # A fixed byte order, whatever the machine's own is.
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(_header(array.dtype, array.shape))
        digest.update(array.data)
    return digest.hexdigest()


def _digest(shape: tuple[int, ...]) -> Any:
    return hashlib.sha256(_header(np.dtype(np.uint8), shape))


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    return f"{dtype.str}{shape}".encode()


def fetch(images: Images, batches: Sequence[np.ndarray], workers: int) -> Iterator[Tensor]:
    """The images of each batch of rows, in turn: uint8 (n, *x_shape).

    Args:
        images: to read from.
        batches: rows (n,) each.
        workers: processes that read ahead, two batches each; 0: none, and nothing is read ahead.

    Raises:
        InputError: for an image that cannot be read, or is not like the others.
        ProcessLostError: if a process that reads was ended.
    """
    with warnings.catch_warnings():
        # From Python 3.12 on a fork is warned of where there are threads: these processes read
        # files and start none. And who asks for more of them than cores has a reason.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            _Batches(images),
            batch_size=None,
            sampler=batches,
            num_workers=workers,
            worker_init_fn=_leave_signals,
            # Else each pass would draw a number from torch's own stream.
            generator=torch.Generator(),
        )
        with _signals_held():
            read = iter(loader)
    try:
        for batch in read:
            if isinstance(batch, str):
                raise InputError(batch)
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        # What the images raise is told as caught; the rest is of a process that cannot be reached.
        if workers == 0 or str(error).startswith("Caught "):
            raise
        with suppress(RuntimeError):  # which the news of its end may raise too, a moment later
            time.sleep(0.1)
        raise _lost() from None
    finally:
        del read, loader  # an exception that is kept would keep the processes


@contextmanager
def told() -> Iterator[None]:
    """Tell of a reading process that was ended in one line, wherever the news arrives.

    A `DataLoader` raises it out of a signal handler: between any two lines of this process.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _lost() from None


def _lost() -> ProcessLostError:
    return ProcessLostError(
        "a process that reads the images was ended, perhaps for want of memory; start the same "
        "command again with --workers 0, a training with --resume"
    )


class _Batches(Dataset):
    """A data set whose items are batches: a `DataLoader` hands each to one process."""

    def __init__(self, images: Images):
        self._images = images

    def __getitem__(self, rows: np.ndarray) -> np.ndarray | str:
        try:
            return self._images[rows]
        except InputError as error:  # as an exception it would come with that process's traceback
            return str(error)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Start processes that no signal ends before they leave all signals to this one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals(_: int) -> None:
    """What stops a run is sent to all of its processes, and the training ends these itself."""
    for each in _LEFT:
        signal.signal(each, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT)


def default_workers() -> int:
    """One for each core of this process, of several on one machine its share; 1 to 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    share = (cores or 1) // max(int(beside) if beside.isdecimal() else 1, 1)
    return min(max(share, 1), _MOST_WORKERS)


def check_memory(num_bytes: int, what: str, remedy: str) -> None:
    """Raise InputError if so much is more than the memory that is free, where that is known."""
    free = _free_memory()
    if free is not None and num_bytes > free:
        raise InputError(
            f"{what}: expected images that fit into memory; got {num_bytes / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free. {remedy}"
        )


def _free_memory() -> int | None:
    """Bytes, of the system and of the control group that may hold this process; None: unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return free
    return min(free, int(limit)) if limit.isdigit() else free
