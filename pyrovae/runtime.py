"""What a process is told before torch is loaded, so that a CPU computes and does not wait."""

import ctypes
import os
import sys

# Of glibc's malloc.h. The largest size that its heap may serve is 32 MiB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 1 << 30, 32 << 20

# Some ten microseconds; libgomp's default is 300,000, some milliseconds.
_SPINS = "1000"


def settle() -> None:
    """Choose how threads wait and how memory is kept, where the environment does not say.

    For the whole process, so a command calls it and the library does not. Numbers do not change.
    """
    # A step is some sixty short loops, with a little Python between them. A thread that sleeps at
    # the end of each is woken too late for the next: a small step takes four times as long. One
    # that spins for milliseconds, which is the default, holds the core that another process could
    # use: beside one, the step takes six times as long. libgomp, which torch's wheels for Linux
    # bring, reads this when torch is loaded; other libraries keep their defaults.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    keep_memory()


def keep_memory() -> None:
    """Keep up to 1 GiB of freed memory, and take what glibc's heap cannot serve in huge pages.

    Evaluation takes and frees the same tens of megabytes for every chunk of particles. glibc would
    hand them back to the system each time, which zeroes them, page by page, when they are wanted
    again. MALLOC_... and GLIBC_TUNABLES in the environment have the last word.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if told or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # another C library than glibc may have none
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
