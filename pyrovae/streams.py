"""torch's random streams, borrowed and given back as they were, and seeds made of words."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_streams(seed: int | None = None) -> Iterator[None]:
    """Put torch's random streams back at the end; inside they start from `seed`, if there is one.

    Those of the CPU and of every GPU in use, for ``torch.manual_seed`` seeds them all.

    >>> before = torch.get_rng_state()
    >>> with own_streams(0):
    ...     torch.rand(1)
    tensor([0.4963])
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    with torch.random.fork_rng(devices=range(count)):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def seed_of(key: str) -> int:
    """A seed for ``torch.manual_seed`` from words: other words, a stream that is not in step."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1
