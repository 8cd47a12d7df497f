"""Part g: where the time of a training step and of an evaluation's chunk goes, call by call.

What Inductor compiles is a list of calls: kernels that it wrote, and torch's matrix products and
convolutions. Here a clock is read before and after each of them, as they are run: in the loop of a
recorded step by C++, elsewhere by Python. Beside the time stand two floors: the floating-point
operations of a product over the machine's rate of large ones, and the bytes of all tensors that a
call is given over the rate at which memory, or the caches, copy.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench import cases, floors
from bench.measure import Effort, Table, say
from bench.peers import ours
from pyrovae import compiled_terms, importance, recording
from pyrovae.compiling import has_compiler
from pyrovae.data import Split
from pyrovae.precision import networks_in
from pyrovae.proposals import Noise
from pyrovae.vae import VAE

MOST = 1000  # calls of one function
TIMES, REST, SECONDS = 20, 0.05, 15.0  # of a turn, and of all of them together
COPIED = 256 << 20  # bytes, far more than any cache holds
CACHED = 1 << 20  # and as many as one does

# What a kernel is for, by the operations that Inductor names it after; the first that fits.
_OF_A_STEP = (
    ("__lshift__", "the batch gathered and sampled; noise of z"),
    ("lerp", "Adam, and whether all is finite"),
    ("tanh_backward", "gradients of tanh and biases, squares for the norm"),
    ("sigmoid", "the likelihood and its gradient"),
    ("log_softmax", "the likelihood and its gradient"),
    ("threshold_backward", "gradients of ReLU and biases"),
    ("relu", "ReLU and bias"),
    ("convolution_backward", "gradients of ReLU and biases"),
    ("pow_select_sum", "squares of a gradient, for its norm"),
    ("split", "the posterior: scale, draw, terms"),
    ("tanh", "tanh and bias"),
)
_OF_A_CHUNK = (
    ("clamp", "the likelihood, and the terms of z"),
    ("tanh", "tanh and bias, rounded"),
    ("split", "the draw of z"),
    ("", "other kernels"),
)


class Rates(NamedTuple):
    """Of the machine, as measured: operations and bytes a second."""

    products: float
    memory: float
    caches: float


class Call(NamedTuple):
    """One call of a compiled function."""

    what: str
    flops: int
    nbytes: int


class Clock:
    """Times of every call of a function that makes the same calls each time.

    Args:
        instead: bytes that are passed over, where a tensor of so many is given.
    """

    def __init__(self, instead: dict[int, int] | None = None):
        self.calls: list[Call] = []
        self.spent = np.zeros(MOST)  # microseconds
        self.beside = 0.0
        """Microseconds of what is no call of the function, but belongs to it."""
        self._instead = instead or {}
        self._place = 0

    def begin(self) -> None:
        """The first call comes next."""
        self._place = 0

    def meet(self, what: str, tensors: Sequence[Any]) -> None:
        """Note the next call, the first time that it is made."""
        self._note(what, 0, tensors)

    def _note(self, what: str, flops: int, tensors: Sequence[Any]) -> None:
        sizes = [t.numel() * t.element_size() for t in tensors]
        nbytes = sum(self._instead.get(n, n) for n in sizes)
        self.calls.append(Call(what, flops, nbytes))

    def product(self, a: Tensor, b: Tensor, others: Sequence[Tensor], linear: bool) -> None:
        """Note a product: of (..., m, k) and (..., k, n), or as a layer's weights (n, k) lie."""
        rows, columns = a.shape, b.shape[::-1] if linear else b.shape
        sizes = "x".join(map(str, rows)), "x".join(map(str, columns[-2:]))
        what = f"product {sizes[0]} by {sizes[1]}"
        self._note(what, 2 * a.numel() * columns[-1], [a, b, *others])

    def convolution(
        self, what: str, outer: Tensor, weight: Tensor, times: int, tensors: Sequence[Any]
    ) -> None:
        """Note one, or so many of its gradients.

        Args:
            what: its name.
            outer: its result, (B, C, H, W), or of a transposed one what it is given.
            weight: (C, D, h, w).
            times: how often the work of the convolution itself is done.
            tensors: all that it reads and writes.
        """
        self._note(what, 2 * times * outer.numel() * weight[0].numel(), tensors)

    def timed(self, call: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        """The call, timed."""

        def run(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **options)
            self.spent[self._place] += 1e6 * (time.perf_counter() - started)
            if self._place == len(self.calls):
                note(result, *args, **options)
            self._place += 1
            return result

        return run


# A recorded step: its loop in C++ reads the clock.


@contextlib.contextmanager
def recorded_by(clock: Clock) -> Iterator[None]:
    """While in here, recordings are made that read the clock around each call."""
    kernels: dict[int, str] = {}
    run, line = recording._run_on_stand_ins, recording._Call.line
    kernel, product = recording._Scribe.kernel, recording._Scribe.product

    def named(function: Any, places: Any, scribe: Any) -> Any:
        plain = getattr(function, "__func__", function)
        kernels.update({id(value): name for name, value in plain.__globals__.items()})
        clock.calls.clear()
        return run(function, places, scribe)

    def noted(self: Any, function: Any) -> Any:
        write, name = kernel(self, function), kernels[id(function)]

        def known(*places: Any) -> None:
            clock.meet(name, [place.tensor() for place in places])
            write(*places)

        return known

    def multiplied(self: Any, name: str, *places: Any, **options: Any) -> None:
        *others, a, b = (place.tensor() for place in places)
        clock.product(a, b, others, linear=False)
        product(self, name, *places, **options)

    def read(self: Any, table: Any) -> str:
        now = "std::chrono::steady_clock::now()"
        since = f"std::chrono::duration<double, std::micro>({now} - started).count()"
        spent = table.slot(clock.spent.ctypes.data)
        return (
            f"{{ const auto started = {now}; {line(self, table)} "
            f"((double*){spent})[call - 1] += {since}; }}"
        )

    with contextlib.ExitStack() as scope:
        for place, name, new in (
            (recording, "_run_on_stand_ins", named),
            (recording._Scribe, "kernel", noted),
            (recording._Scribe, "product", multiplied),
            (recording._Call, "line", read),
            (recording, "_SOURCE", "#include <chrono>\n" + recording._SOURCE),
        ):
            scope.enter_context(mock.patch.object(place, name, new))
        yield


# What is not recorded: the function that Inductor wrote gets other names.


class _Watched:
    """A namespace of torch's operators, each timed when it is called."""

    def __init__(self, inner: Any, name: str, clock: Clock):
        self._inner = inner
        self._name = name
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if self._name == "torch" and name != "ops":
            return value
        return _Watched(value, f"{self._name}.{name}", self._clock)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._clock.timed(self._inner, self._note)(*args, **options)

    def _note(self, result: Any, *args: Any, **options: Any) -> None:
        results = result if isinstance(result, (tuple, list)) else [result]
        given = [*args, *options.values(), *(r for r in results if r is not options.get("out"))]
        tensors = [t for t in given if isinstance(t, Tensor)]
        linear = "linear" in self._name
        if linear or self._name.endswith("mm"):
            a, b = args[:2] if linear else args[-2:]
            others = [t for t in tensors if t is not a and t is not b]
            self._clock.product(a, b, others, linear)
        elif "convolution_backward" in self._name:
            (after, before, weight), transposed, mask = args[:3], args[7], args[10]
            outer = before if transposed else after
            self._clock.convolution(
                "gradients of convolutions", outer, weight, sum(mask[:2]), tensors
            )
        elif "convolution" in self._name:
            outer = args[0] if options["transposed"] else result
            self._clock.convolution("convolutions", outer, args[1], 1, tensors)
        else:
            self._clock.meet(self._name.removesuffix(".default"), tensors)


def watch(compiled: Any, clock: Clock) -> None:
    """Have a compiled function timed call by call, from now on."""
    function = compiled._inner.current_callable
    plain = getattr(function, "__func__", function)
    names = dict(plain.__globals__)
    for name in plain.__code__.co_names:
        value = names.get(name)
        if isinstance(value, BuiltinFunctionType) and value.__name__ == "kernel":
            names[name] = clock.timed(value, _kernel_note(name, clock))
        elif name in ("extern_kernels", "torch", "aten"):
            names[name] = _Watched(value, name, clock)
    new: Any = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)
    owner = getattr(function, "__self__", None)

    def run(flat: Any) -> Any:
        clock.begin()
        return new(flat) if owner is None else new(owner, flat)

    compiled._inner.current_callable = run


def _kernel_note(name: str, clock: Clock) -> Callable[..., None]:
    def note(result: Any, *args: Any) -> None:
        clock.meet(name, [t for t in args if isinstance(t, Tensor)])

    return note


# Tables


def purpose(call: Call, known: Sequence[tuple[str, str]] = _OF_A_STEP) -> str:
    """What a call is for, in words; of a kernel that is not known, its name."""
    if not call.what.startswith("cpp_fused"):
        return call.what
    return next((text for part, text in known if part in call.what), call.what[10:70])


def rates(effort: Effort) -> Rates:
    """What this machine does at best, by the threads of all else, asked over some seconds."""
    side, repeats = effort.of((2048, 5), (128, 1))
    shapes = [(side, side, side)]
    square, copied = floors.products(shapes), effort.of(COPIED, CACHED)
    work = {
        "products": (functools.partial(square, repeats), repeats * floors.work(shapes)),
        "memory": (_copies(copied, 1), 2 * copied),
        "caches": (_copies(CACHED, 200), 2 * CACHED * 200),
    }
    best = dict.fromkeys(work, 0.0)
    for _ in range(effort.of(15, 1)):  # the machine is fast and slow by turns
        for name, (run, done) in work.items():
            run()
            started = time.perf_counter()
            run()
            best[name] = max(best[name], done / (time.perf_counter() - started))
        time.sleep(effort.of(1.0, 0.0))
    return Rates(**best)


def _copies(nbytes: int, times: int) -> Callable[[], None]:
    source, target = (torch.zeros(nbytes // 4) for _ in range(2))

    def run() -> None:
        for _ in range(times):
            target.copy_(source)

    return run


def profile(
    title: str,
    clock: Clock,
    run: Callable[[int], object],
    seconds: float,
    rate: Rates,
    note: str,
    beside: str = "",
) -> Table:
    """The table of a function that was timed by the clock: of its turns, the one in the middle.

    Args:
        title: of the table.
        clock: that the function's calls are timed by.
        run: of a number of times that the function is to be called.
        seconds: for which turns of `TIMES` calls are taken, with a rest after each, for the machine
            is fast and slow by turns of its own; the first is not counted, three are.
        rate: of the machine.
        note: what the function is.
        beside: what the clock's time beside the function's calls is of.
    """
    found: list[tuple[float, Any, float]] = []
    end = time.perf_counter() + seconds
    while len(found) < 4 or time.perf_counter() < end:
        clock.spent[:], clock.beside = 0, 0.0
        started = time.perf_counter()
        run(TIMES)
        whole = 1e6 * (time.perf_counter() - started) / TIMES
        found.append((whole, clock.spent / TIMES, clock.beside / TIMES))
        time.sleep(REST)
    ranked = sorted(found[1:], key=lambda turn: turn[0])
    whole, spent, more = ranked[(len(ranked) - 1) // 2]
    others = {beside: more} if beside else {}
    known = _OF_A_CHUNK if beside else _OF_A_STEP
    return {"title": title, **as_rows(clock.calls, spent, whole, rate, others, known), "note": note}


def as_rows(
    calls: Sequence[Call],
    spent: Any,
    whole: float,
    rate: Rates,
    others: dict[str, float],
    known: Sequence[tuple[str, str]] = _OF_A_STEP,
) -> dict[str, Any]:
    """Calls for the same purpose as one row, in the order in which they are first made.

    Args:
        calls: of a function.
        spent: microseconds of each; there may be more of them than calls.
        whole: microseconds of the function and what is around it.
        rate: of the machine.
        others: microseconds of what is no call, by name.
        known: what a kernel is for, by a part of its name.
    """
    rows: dict[str, dict[str, Any]] = {}
    for call, each in zip(calls, spent, strict=False):
        name = purpose(call, known)
        row = rows.setdefault(name, {"name": name, "calls": 0, "us": 0.0, "by": [0.0, 0.0, 0.0]})
        row["calls"] += 1
        row["us"] += float(each)
        for i, floor in enumerate((call.flops / rate.products, *_moved(call, rate))):
            row["by"][i] += 1e6 * floor
    listed = list(rows.values())
    for row in listed:
        row["arithmetic"], row["memory"], row["caches"] = row.pop("by")
    products = [row for row in listed if row["name"].startswith("product ")]
    sums = {"of all products": products, "of all calls": listed}
    keys = ("calls", "us", "arithmetic", "memory", "caches")
    sizes = [{"name": n, **{k: sum(r[k] for r in of) for k in keys}} for n, of in sums.items()]
    left = whole - sizes[-1]["us"] - sum(others.values())
    more = [
        {"name": n, "us": us} for n, us in {**others, "around it: Python, memory": left}.items()
    ]
    return {
        "columns": {
            "name": "",
            "calls": "calls",
            "us": "µs",
            "arithmetic": "floor by arithmetic, µs",
            "memory": "floor by memory, µs",
            "caches": "floor by caches, µs",
        },
        "rows": [*listed, *sizes, *more, {"name": "the whole", "us": whole}],
    }


def _moved(call: Call, rate: Rates) -> tuple[float, float]:
    return call.nbytes / rate.memory, call.nbytes / rate.caches


# What is profiled


def step(start: VAE, split: Split, batch: int, effort: Effort, rate: Rates, title: str) -> Table:
    """The compiled training step for one batch size, recorded where it can be."""
    raw = split.raw
    clock = Clock({raw.nbytes: raw[:batch].nbytes})
    with recorded_by(clock):
        engine = ours.Engine("compiled", start, split, batch)
    assert engine.compiled is not None
    (built,) = engine.compiled._steps.values()
    note = "The step as `pyrovae.fit` takes it, played from a recording in C++."
    if built.refusal:
        clock.calls.clear()
        watch(built._graphs[0], clock)
        note = "The compiled step, which is not recorded: its calls are made from Python."
    return profile(title, clock, engine.run, effort.of(SECONDS, 0), rate, note)


def chunk(vae: VAE, x: Tensor, precision: str, effort: Effort, rate: Rates) -> Table:
    """One chunk of an evaluation, the numbers of its noise included."""
    with networks_in(vae, precision):
        plan = importance.plan(vae.model, vae.guide, x[:1], effort.of(5000, 200))
    x = x[: plan.images]
    kernel = compiled_terms.CompiledTerms(
        vae.model, vae.guide, vae, x, plan.particles, precision=precision
    )
    clock = Clock()
    watch(kernel._each, clock)
    terms = kernel.of(x)

    def run(times: int) -> None:
        for i in range(times):
            start = i * plan.particles
            terms(Noise(0, range(len(x)), range(start, start + plan.particles)))

    title = f"a chunk of {len(x)} x {plan.particles} particles, {precision}"
    drawn = kernel._drawn

    def timed(*given: Any) -> list[Tensor]:
        started = time.perf_counter()
        numbers = drawn(*given)
        clock.beside += 1e6 * (time.perf_counter() - started)
        return numbers

    with mock.patch.object(kernel, "_drawn", timed):
        words = "The compiled chunk; what no draw enters was computed before."
        beside = "normal numbers, by one thread"
        return profile(title, clock, run, effort.of(SECONDS, 0), rate, words, beside)


def calls(effort: Effort) -> list[Table]:
    """Part g."""
    missing = None
    if torch.cuda.is_available():
        missing = "not measured: of a GPU, a profiler of its own is to be asked"
    elif not has_compiler():
        missing = "not measured: it needs a C++ compiler"
    if missing:
        rows = [{"name": "every call", "missing": missing}]
        return [{"title": "calls", "columns": {"name": "", "us": "µs"}, "rows": rows}]
    rate = rates(effort)
    data = cases.digits(effort.of(50_192, 800))
    start = cases.mlp_vae(hidden=effort.of(cases.HIDDEN, 16))
    tables = []
    for batch in effort.of((20, 128, 1024), (20,)):
        say(f"calls of a step, batch {batch}")
        title = f"a training step, 784-200-200-50, batch {batch}"
        tables.append(step(start, data.train, batch, effort, rate, title))
    if not effort.smoke:
        say("calls of a step, conv64")
        images = cases.coloured(1040).train
        title = "a training step, conv64, mixture of discretised logistics, batch 64"
        tables.append(step(cases.conv_vae(), images, 64, effort, rate, title))
    x = data.test.tensor()
    for precision in effort.of(("fp32", "bf16"), ("fp32",)):
        say(f"calls of a chunk, {precision}")
        tables.append(chunk(start, x, precision, effort, rate))
    told = (
        f"Of all turns of {TIMES}, spread over {SECONDS:g} s or more, the one in the middle. "
        "Floors: operations over the rate of large squares, "
        f"{rate.products / 1e9:.0f} GFLOP/s; bytes of all tensors that a call reads and "
        f"writes over the rate of a copy in memory, {rate.memory / 1e9:.1f} GB/s, and in the "
        f"caches, {rate.caches / 1e9:.0f} GB/s (all by the same threads, at their best)."
    )
    for table in tables:
        table["note"] = f"{table['note']} {told}"
    return tables
