"""What a process is told before torch is loaded, so that a CPU computes and does not wait."""

import ctypes
import os
import sys

# Of glibc's malloc.h. The largest size that its heap may serve is 32 MiB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST = 1 << 30, 32 << 20


def settle() -> None:
    """Choose how threads wait and how memory is kept, where the environment does not say.

    For the whole process, so a command calls it and the library does not. Numbers do not change.
    """
    # Threads that wait by spinning cost a busy machine several times the wall time, and save an
    # idle one next to nothing; OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
