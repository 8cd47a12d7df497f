"""Timing on a machine that is never quite still: contestants take turns, medians are compared.

A contestant's ``run(steps)`` takes that many steps and returns their mean loss in nats per image.
In each round every contestant runs once, the first of a round being the second of the one before.
A ratio is the median over the rounds of the ratio within one round, so that a slow minute of the
machine slows both sides of it.
"""

import datetime
import functools
import importlib.metadata
import math
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

FIRST_WITHIN, LAST_WITHIN = 0.015, 0.04

Table = dict[str, Any]
VERSIONS = ("torch", "pyro-ppl", "numpyro", "jax", "pythae", "numpy")


class Contestant(Protocol):
    """Something that trains a VAE."""

    def run(self, steps: int) -> float:
        """Take so many steps; return the mean of their losses, in nats per image."""
        ...


class MissingError(Exception):
    """A contestant that cannot run here; the message is the remedy, in one line."""


class Effort(NamedTuple):
    """How much is measured: little for ``--smoke``, which only shows that everything runs."""

    smoke: bool

    def of(self, full: Any, smoke: Any) -> Any:
        """The one or the other."""
        return smoke if self.smoke else full


class Spread(NamedTuple):
    """The quartiles of repeated measurements."""

    q1: float
    median: float
    q3: float


def spread(values: Sequence[float]) -> Spread:
    """Quartiles of one or more values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def interleave(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, by name; each round makes all of them, from another one on."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            started = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def faster(seconds: dict[str, list[float]], name: str, reference: str) -> Spread | None:
    """How many times faster than a reference, round by round; None without that reference."""
    if reference not in seconds:
        return None
    pairs = zip(seconds[reference], seconds[name], strict=True)
    return spread([theirs / ours for theirs, ours in pairs])


def say(text: str) -> None:
    """Tell how far it has got, at once."""
    print(text, flush=True)


def build(makers: dict[str, Callable[[], Any]]) -> tuple[dict, dict]:
    """Contestants by name, and for those that cannot run here the remedy."""
    built, missing = {}, {}
    for name, make in makers.items():
        try:
            built[name] = make()
        except MissingError as reason:
            missing[name] = str(reason)
            say(f"  {name}: {reason}")
        except Exception as error:  # one that breaks must not lose what the others measure
            missing[name] = failure(error)
            say(f"  {name}: {missing[name]}")
    return built, missing


def failure(error: Exception) -> str:
    """What broke, in one line; the script ends with status 1 for it."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


class Falls(NamedTuple):
    """The loss of the first step and of the last ones, and whether they are as the others'."""

    first: float
    last: float
    agrees: bool = True


def check_losses(losses: dict[str, Falls]) -> dict[str, Falls]:
    """Mark whoever does not start where the others do, fall, and arrive where they arrive.

    The others are their median: the reference must not be the one that is wrong. The first losses
    differ by one batch and one draw of z alone, the last ones by all of the training.
    """
    first = statistics.median(fall.first for fall in losses.values())
    last = statistics.median(fall.last for fall in losses.values())
    return {
        name: fall._replace(
            agrees=math.isclose(fall.first, first, rel_tol=FIRST_WITHIN)
            and math.isclose(fall.last, last, rel_tol=LAST_WITHIN)
            and fall.last < fall.first
        )
        for name, fall in losses.items()
    }


def race(
    title: str,
    makers: dict[str, Callable[[], Contestant]],
    *,
    steps: int,
    rounds: int,
    check_steps: int,
    references: Sequence[str],
    steps_of: dict[str, int] | None = None,
    floors: dict[str, Callable[[int], object]] | None = None,
    note: str = "",
) -> Table:
    """Build, check and time the contestants of one training step; milliseconds a step.

    The check, ``check_steps`` of training from the same weights, is the warm-up too. ``steps_of``
    is for those whose turn is longer than ``steps``. ``floors`` are parts of a step, timed alone;
    they learn nothing, so nothing is checked.
    """
    say(title)
    built, missing = build(makers)
    tail = max(1, check_steps // 4)
    losses = {}
    for name, one in list(built.items()):
        try:
            first = one.run(1)
            one.run(check_steps - 1 - tail)
            losses[name] = Falls(first, one.run(tail))
        except Exception as error:
            missing[name] = failure(error)
            del built[name]
            say(f"  {name}: {missing[name]}")
            continue
        say(f"  {name}: loss {first:.1f}, then {losses[name].last:.1f}")
    losses = check_losses(losses) if losses else {}
    floors = floors or {}
    for run in floors.values():
        run(1)
    turn = {name: (steps_of or {}).get(name, steps) for name in [*built, *floors]}
    take = {name: one.run for name, one in built.items()} | floors
    calls = {name: functools.partial(run, turn[name]) for name, run in take.items()}
    seconds = interleave(calls, rounds)
    each = {name: [1e3 * s / turn[name] for s in seconds[name]] for name in take}
    rows: list[dict[str, Any]] = []
    for name in [*makers, *floors]:
        if name in missing:
            rows.append({"name": name, "missing": missing[name]})
            continue
        row = {"name": name, "ms": spread(each[name])._asdict()}
        row |= losses[name]._asdict() if name in losses else {}
        row["faster"] = {
            other: ratio._asdict() if (ratio := faster(each, name, other)) else None
            for other in references
        }
        rows.append(row)
        say(f"  {name}: {row['ms']['median']:.3f} ms")
    return {
        "title": title,
        "kind": "race",
        "references": list(references),
        "steps": turn,
        "rounds": rounds,
        "check_steps": check_steps,
        "note": note,
        "rows": rows,
    }


def limit_cores(threads: int) -> int:
    """Hold this process and its children to so many cores, whatever library computes; how many."""
    if not hasattr(os, "sched_setaffinity"):
        cores = os.cpu_count() or 1
    else:
        allowed = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, allowed)
        cores = len(allowed)
    threads = min(threads, cores)
    # Must be set before torch or jax is imported.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    # Otherwise jax takes three quarters of a GPU's memory, which all share here.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return threads


def device_name(threads: int) -> str:
    """A name for file names: the GPU's, or the number of cores."""
    import torch

    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"cpu-{threads}-cores" if threads > 1 else "cpu-1-core"


def circumstances(threads: int) -> dict[str, Any]:
    """When, on what and with which versions: what must stand beside every number."""
    import torch

    from pyrovae import runs

    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": runs.commit(),
        "threads": threads,
        "cpu": runs.processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def resident() -> int:
    """Resident memory of this process, in bytes; from here on, `peak` counts anew."""
    if not Path("/proc/self/status").exists():
        return peak()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _kilobytes("VmRSS") * 1024


def peak() -> int:
    """The most resident memory since `resident`, in bytes (without /proc: since the start).

    Not ``ru_maxrss`` where it can be helped: Linux lets a process begin with its parent's.
    """
    if Path("/proc/self/status").exists():
        return _kilobytes("VmHWM") * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _kilobytes(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1])
