"""One run in several processes, started by ``torchrun``: who am I, and sums over everybody.

Without torchrun there is one process, and every function here says so and does nothing.
"""

import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyrovae.errors import InputError, ProcessLostError

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _running() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _running() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def local_device(device: torch.device) -> torch.device:
    """The device of this process: with several and CUDA, one device each."""
    if count() > 1 and device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Join the other processes, where ``torchrun`` has started this one as one of several.

    Raises:
        InputError: where CUDA devices are asked for, and there are fewer than processes.
    """
    expected = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if expected == 1 or _running():
        yield
        return
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"{expected} processes were started on {torch.cuda.device_count()} CUDA devices; "
                "use --nproc-per-node with that number, or --device cpu"
            )
        torch.cuda.set_device(local)
    # Its functions have the group of that moment as a default argument. Loaded later (and tracing
    # loads it), they would keep the group and its threads alive past destroy_process_group, and a
    # thread that still holds a tensor while Python ends aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    # Both, for a run may be resumed on the CPU although there is CUDA.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        with _told_to_end():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Say in one line that torchrun ends this process, as it does when another has ended.

    A process that waits for the others notices by itself; one that is at work on its own share is
    only told, and would end without a word. Whoever handles the signal otherwise is left to it.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the next one is not argued with
    line = (
        f"pyrovae: process {rank()} of {count()} was told to end, as all are when one has ended; "
        "what was saved is good: start the same command again, a training with --resume\n"
    )
    os.write(2, line.encode())  # print may be at work below this
    # No error: what fails to compile is evaluated as it is, and this may come while it compiles.
    raise SystemExit(1)


def add(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; returns it."""
    if count() > 1:
        _guarded(lambda: dist.all_reduce(values))
    return values


def copy_from_first(values: Iterable[Tensor]) -> None:
    """Give all processes the tensors of the first, in place."""
    if count() > 1:
        for t in values:
            _guarded(lambda t=t: dist.broadcast(t, 0))  # type: ignore[misc]


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    _guarded(lambda: dist.all_gather_object(found, value))
    return found


def share(values: list[T]) -> list[T]:
    """This process's share of a list: every n-th of it."""
    return values[rank() :: count()]


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        _guarded(dist.barrier)


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _guarded(call: Callable[[], Any]) -> None:
    try:
        call()
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):  # raised between any two lines
            raise
        reason = str(error).strip().split("\n")[0][:120]
        raise ProcessLostError(
            f"process {rank()} of {count()} lost the others ({reason}); what was saved is good: "
            "start the same command again, a training with --resume"
        ) from None
