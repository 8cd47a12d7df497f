"""A compiled function recorded once, and played again without Python.

Inductor compiles kernels, and calls them line by line from a function of Python: it takes memory,
checks shapes, and asks torch for each matrix product. For tensors that stay where they are, all of
that is the same every time. So the function is run once with stand-ins for tensors, which write
down what would be called, and with which addresses; a loop in C++ makes these calls again, for as
many steps as it is given. It is to a CPU what a CUDA graph is to a GPU.

Only calls that are known here are recorded: a function that does anything else is left as it is.
"""

import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Inductor names its kernels so within their libraries; torch's products have names for C.
_KERNEL = "kernel"
_PRODUCT = "aoti_torch_cpu_{}_out"
_ALIGNMENT = 64  # bytes, of a line of the cache and of the widest vector
_MESSAGE = 256


class NotRecordableError(Exception):
    """A function that does what no recording can hold."""


class Recording:
    """What a compiled function calls, in a loop.

    Args:
        function: that Inductor wrote: of a list of tensors, returning a tuple of tensors.
        inputs: what it is called with, tensors on a CPU that stay where they are; None for those
            that it must not use.
        given: those of them that are written anew before each run.

    Raises:
        NotRecordableError: for a function that makes other calls than kernels and matrix products.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor | None],
        given: Sequence[Tensor],
    ):
        scribe = _Scribe()
        places = [
            None if t is None else _Place(_Memory(t), t.size(), t.stride(), t.dtype) for t in inputs
        ]
        result, *others = _run_on_stand_ins(function, places, scribe)
        if others or not isinstance(result, _Place) or result.tensor().numel() != 1:
            raise NotRecordableError("it returns other things than one number")
        self.result = result.tensor()
        """Where the function's result is after a run."""
        # Held as long as it may be played: what lies between inputs and result, and the kernels.
        self._memory = scribe.memory
        self._libraries = scribe.libraries
        self._given = list(given)
        self._inputs = [t for t in inputs if t is not None]
        self._addresses = _addresses(self._inputs)
        table = _Table()
        weakref.finalize(self, _release, table.handles).atexit = False
        lines = [call.line(table) for call in scribe.calls]
        copies = [
            f"memcpy({table.slot(t.data_ptr())}, given[i * {len(given)} + {j}], {t.nbytes});"
            for j, t in enumerate(given)
        ]
        size = self.result.element_size()
        kept = f"memcpy(results + i * {size}, {table.slot(result.pointer)}, {size});"
        self._play = _compiled(
            _SOURCE.format(body="\n        ".join([*copies, *lines, kept]), message=_MESSAGE)
        )
        self._table = (ctypes.c_void_p * len(table.values))(*table.values)

    def stands(self) -> bool:
        """Whether its inputs still lie where they lay; memory that is shared later is moved."""
        return _addresses(self._inputs) == self._addresses

    def play(self, runs: Sequence[Sequence[Tensor]]) -> Tensor:
        """Run once with each of these for what is given; the results, one number each.

        Args:
            runs: tensors of the sizes and types of what is given, contiguous.

        Raises:
            ValueError: for other sizes or types.
            RuntimeError: if a call fails.
        """
        for run in runs:
            for t, known in zip(run, self._given, strict=True):
                if t.shape != known.shape or t.dtype != known.dtype or not t.is_contiguous():
                    raise ValueError(
                        f"expected {known.dtype} {tuple(known.shape)}, contiguous; got {t.dtype} "
                        f"{tuple(t.shape)}"
                    )
        count = len(runs)
        pointers = [t.data_ptr() for run in runs for t in run]
        results = self.result.new_empty(count)
        why = ctypes.create_string_buffer(_MESSAGE)
        given = (ctypes.c_void_p * len(pointers))(*pointers)
        failed = self._play(self._table, count, given, results.data_ptr(), why)
        if failed:
            raise RuntimeError(f"call {failed} of a recorded function failed {why.value.decode()}")
        return results


# What is called, and with what.


class _Memory:
    """Memory that stand-ins share; if it is of a pool, it goes back when the last of them does."""

    def __init__(self, tensor: Tensor, back: list[Tensor] | None = None):
        self.tensor = tensor
        self._back = back

    def __del__(self) -> None:
        if self._back is not None:
            self._back.append(self.tensor)


class _Place:
    """Stands for a tensor: where it lies, and how. Whatever else is asked of it fails."""

    __slots__ = ("_dtype", "_memory", "_offset", "_size", "_stride")

    def __init__(
        self,
        memory: _Memory,
        size: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        offset: int = 0,
    ):
        self._memory = memory
        self._size = tuple(size)
        self._stride = tuple(stride)
        self._dtype = dtype
        self._offset = offset

    @property
    def pointer(self) -> int:
        return self._memory.tensor.data_ptr() + self._offset * self._dtype.itemsize

    def tensor(self) -> Tensor:
        base = self._memory.tensor
        if base.dtype != self._dtype:
            base = base.view(self._dtype)
        return base.as_strided(self._size, self._stride, base.storage_offset() + self._offset)

    def lies(self, size: Sequence[int], stride: Sequence[int]) -> bool:
        """Whether it has this size and stride; the stride of a single row is nobody's business."""
        pairs = zip(self._size, self._stride, stride, strict=False)
        return self._size == tuple(size) and all(n == 1 or s == t for n, s, t in pairs)

    def seen_as(self, size: Sequence[int], stride: Sequence[int], more: int) -> "_Place":
        return _Place(self._memory, size, stride, self._dtype, self._offset + more)


class _Call(NamedTuple):
    """A call of C: the address of a function, pointers or tensors, and numbers after them."""

    function: int
    arguments: Sequence[int | Tensor]
    numbers: Sequence[float] = ()

    def line(self, table: "_Table") -> str:
        pointers = [
            table.handle(a) if isinstance(a, Tensor) else table.slot(a) for a in self.arguments
        ]
        kinds = ", ".join(["void*"] * len(pointers) + ["double"] * len(self.numbers))
        values = ", ".join([*pointers, *(repr(float(number)) for number in self.numbers)])
        function = table.slot(self.function)
        if any(isinstance(a, Tensor) for a in self.arguments):
            # Torch's functions for C return whether they failed.
            return f"++call; if (((int (*)({kinds})){function})({values})) return call;"
        return f"++call; ((void (*)({kinds})){function})({values});"


class _Scribe:
    """Writes calls down, under the names that Inductor's function knows them by."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.libraries: dict[str, ctypes.CDLL] = {}
        self.memory: list[Tensor] = []
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def names(self) -> dict[str, Any]:
        """What a function of Inductor's may use, but for its kernels."""
        return {
            "empty_strided_cpu": self._empty,
            "reinterpret_tensor": lambda place, *how: place.seen_as(*how),
            "assert_size_stride": _check,
            "assert_size_stride_grouped": _check_each,
            "extern_kernels": _Products(self.product),
            "torch": _Types(),
        }

    def kernel(self, function: BuiltinFunctionType) -> Callable[..., None]:
        path = function.__self__.__file__  # type: ignore[attr-defined]
        library = self.libraries.setdefault(path, ctypes.CDLL(path))
        address = _address(library, _KERNEL)

        def write(*places: _Place) -> None:
            self.calls.append(_Call(address, [place.pointer for place in places]))

        return write

    def product(self, name: str, *places: _Place, numbers: Sequence[float] = ()) -> None:
        address = _address(_torch(), _PRODUCT.format(name))
        self.calls.append(_Call(address, [place.tensor() for place in places], numbers))

    def _empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> _Place:
        """Memory as the function would get it: what it has given up is used again."""
        last = sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        count = 0 if 0 in size else last + 1
        nbytes = max(math.ceil(count * dtype.itemsize / _ALIGNMENT), 1) * _ALIGNMENT
        free = self._free[nbytes]
        if not free:
            free.append(torch.empty(nbytes, dtype=torch.uint8, device="cpu"))
            self.memory.append(free[-1])
        return _Place(_Memory(free.pop(), free), size, stride, dtype)


class _Products:
    """Matrix products under the names, and with the arguments, that Inductor has for them."""

    def __init__(self, write: Callable[..., None]):
        self._write = write

    def mm(self, a: _Place, b: _Place, *, out: _Place) -> None:
        self._write("mm", out, a, b)

    def bmm(self, a: _Place, b: _Place, *, out: _Place) -> None:
        self._write("bmm", out, a, b)

    def addmm(
        self, bias: _Place, a: _Place, b: _Place, *, alpha: float, beta: float, out: _Place
    ) -> None:
        self._write("addmm", out, bias, a, b, numbers=(beta, alpha))


class _Types:
    """Of the module torch, the types of numbers."""

    def __getattr__(self, name: str) -> torch.dtype:
        found = getattr(torch, name, None)
        if not isinstance(found, torch.dtype):
            raise AttributeError(name)
        return found


def _check(place: _Place, size: Sequence[int], stride: Sequence[int], *what: object) -> None:
    if not place.lies(size, stride):
        raise NotRecordableError("it expects tensors of other shapes")


def _check_each(
    places: Sequence[_Place],
    sizes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    *what: object,
) -> None:
    for place, size, stride in zip(places, sizes, strides, strict=True):
        _check(place, size, stride)


def _run_on_stand_ins(
    function: Callable[..., Any], places: list[_Place | None], scribe: _Scribe
) -> tuple[Any, ...]:
    """Run the code of a function with none but our names in it; what it returns.

    Raises:
        NotRecordableError: if it asks for another name, or for more of a tensor than where it is.
    """
    bound = isinstance(function, MethodType)
    plain = function.__func__ if isinstance(function, MethodType) else function
    if not isinstance(plain, FunctionType):
        raise NotRecordableError("it is not written in Python")
    names: dict[str, Any] = {"__builtins__": {}, **scribe.names()}
    try:
        for name in plain.__code__.co_names:
            known = plain.__globals__.get(name)
            if isinstance(known, BuiltinFunctionType) and known.__name__ == _KERNEL:
                names[name] = scribe.kernel(known)
        ours = FunctionType(plain.__code__, names)
        results: tuple[Any, ...] = ours(None, places) if bound else ours(places)
    except Exception as error:  # whatever a stand-in cannot do, or a name that is not there
        raise NotRecordableError(str(error)) from error
    return results


# The loop.

_SOURCE = """
#include <cstdio>
#include <cstring>
#include <exception>

extern "C" int play(
    void** table, long count, const void* const* given, char* results, char* why
) {{
    int call = 0;
    try {{
        for (long i = 0; i < count; ++i) {{
        call = 0;
        {body}
        }}
    }} catch (const std::exception& error) {{
        snprintf(why, {message}, "(%s)", error.what());
        return call;
    }} catch (...) {{
        return call;
    }}
    return 0;
}}
"""


class _Table:
    """Addresses that the loop is given, so that its source is the same in every process."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.handles: list[int] = []

    def slot(self, address: int) -> str:
        self.values.append(address)
        return f"table[{len(self.values) - 1}]"

    def handle(self, tensor: Tensor) -> str:
        """A tensor as torch's functions for C know it."""
        capsule = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor)
        handle = _pointer_of(capsule, None)
        self.handles.append(handle)
        return self.slot(handle)


def _release(handles: list[int]) -> None:
    for handle in handles:
        _torch().aoti_torch_delete_tensor_object(ctypes.c_void_p(handle))


# A function object of our own: the attributes of the one that ctypes keeps are everybody's.
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def _torch() -> ctypes.CDLL:
    """The library of torch, which this process has loaded."""
    return ctypes.CDLL(torch._C.__file__)


def _compiled(source: str) -> Callable[..., int]:
    from torch._inductor.codecache import CppCodeCache

    function = CppCodeCache.load(source).play
    function.restype = ctypes.c_int
    pointers = [ctypes.c_void_p] * 3
    function.argtypes = [ctypes.c_void_p, ctypes.c_long, *pointers]
    return function
