"""Random numbers as a function of a key and of counters: nothing is drawn, and no state is kept.

A step's noise is the same on every device, in whatever order its parts are made (normal numbers
but for rounding). So it may be made within a compiled graph, by all threads, and a run that is
taken up again needs no stream for it.

Threefry is an operator of its own, one line of a traced graph: NumPy computes it where the graph is
replayed as it is, and `rewriting` puts `spelt_out` in its place where the graph is compiled.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The rotations of Threefry-2x32, and what the third word of its key is made with.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_ROUNDS = 20


def key_of(seed: int) -> Tensor:
    """The key of a seed: two words of 32 bits, (2,), of its lowest 64."""
    words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    signed = [word - (word >> 31 << 32) for word in words]
    return torch.tensor(signed, dtype=torch.int32, device="cpu")


def threefry(key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits for each counter (first, second): Threefry-2x32, 20 rounds.

    Args:
        key: (2,), of `torch.int32`, as are the counters.
        first: a counter, of any shape.
        second: another one, which broadcasts with it.

    Source: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3 (2011),
    https://doi.org/10.1145/2063384.2063405

    >>> zero = torch.zeros((), dtype=torch.int32)
    >>> [hex(int(word) % 2**32) for word in threefry(key_of(0), zero, zero)]
    ['0x6b200159', '0x99ba4efe']
    """
    a, b = torch.ops.pyrovae_counters.threefry(key, first, second)
    return a, b


def spelt_out(
    key: Any, first: Any, second: Any, settled: Callable[[Any], Any] | None = None
) -> tuple[Any, Any]:
    """Threefry as the operations that it is made of; ``settled`` passes a value of each on.

    A compiler that writes out what a value is made of wherever it is used would write the first
    rounds thousands of times.
    """
    keys = key[0], key[1], key[0] ^ key[1] ^ _PARITY
    return _rounds(keys, first, second, _masked, settled or (lambda x: x))


def _rounds(
    keys: Any, first: Any, second: Any, rotated: Any, settled: Callable[[Any], Any] = lambda x: x
) -> tuple[Any, Any]:
    a, b = first + keys[0], second + keys[1]
    for group in range(_ROUNDS // 4):
        for rotation in _ROTATIONS[group % 2]:
            a = a + b
            b = settled(rotated(b, rotation) ^ a)
        a = a + keys[(group + 1) % 3]
        b = b + keys[(group + 2) % 3] + (group + 1)
    return a, b


def integers(key: Tensor, number: Tensor, count: int, shape: Sequence[int]) -> Tensor:
    """Uniform on [-2^15, 2^15): (count, *shape), of `torch.int32`; others for each ``number``."""
    # Each counter gives four: a quarter of the rows has the low half of the first word, and so on.
    quarter = -(-count // 4)
    a, b = threefry(key, _index(quarter * math.prod(shape), key).view(quarter, *shape), number)
    # Shifted up and down again, for a shift to the right repeats the sign.
    return torch.cat([a << 16 >> 16, a >> 16, b << 16 >> 16, b >> 16])[:count]


def normals(key: Tensor, number: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Standard-normal numbers (count,), others for each ``number``; none is larger than 6.7.

    By the polar form of Box and Muller (1958), https://doi.org/10.1214/aoms/1177706645: the square
    of the radius is exponential, the angle uniform.
    """
    a, b = threefry(key, _index(-(-count // 2), key), number)
    # 31 bits: as a float, a word that is near 0 keeps all of them, and the tail is as it should be.
    u = ((a & 0x7FFFFFFF).to(dtype) + 0.5) * 2.0**-31
    radius = (-2.0 * u.log()).sqrt()
    angle = b.to(dtype) * (math.pi * 2.0**-31)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def _index(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=like.device)


def _masked(x: Any, by: int) -> Any:
    """Signed bits turned to the left: a shift to the right repeats the sign, which is masked."""
    return (x << by) | ((x >> (32 - by)) & (2**by - 1))


def _turned(x: Any, by: int) -> Any:
    """Unsigned bits turned to the left."""
    return (x << np.uint32(by)) | (x >> np.uint32(32 - by))


def _by_numpy(key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(first.shape, second.shape)
    # Arrays all, also of one number: numbers of NumPy warn where they overflow.
    k, m, n = (np.atleast_1d(t.numpy().view(np.uint32)) for t in (key, first, second))
    words = _rounds((k[:1], k[1:], k[:1] ^ k[1:] ^ np.uint32(_PARITY)), m, n, _turned)
    a, b = (torch.from_numpy(word.view(np.int32)).view(shape) for word in words)
    return a, b


def _shapes(key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(first.shape, second.shape)
    return first.new_empty(shape), first.new_empty(shape)


_library = torch.library.Library("pyrovae_counters", "DEF")
_library.define("threefry(Tensor key, Tensor first, Tensor second) -> (Tensor, Tensor)")
_library.impl("threefry", _by_numpy, "CPU")
_library.impl("threefry", spelt_out, "CUDA")
_library.impl("threefry", _shapes, "Meta")
