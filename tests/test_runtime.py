"""What a command tells its process: freed memory is kept, and the user has the last word."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import resource, sys
from pyrovae import runtime
if "settle" in sys.argv:
    runtime.settle()
import torch
torch.set_num_threads(1)
chunk = lambda: [torch.empty(5_000_000).zero_() for _ in range(4)] and None
for _ in range(10):
    chunk()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    chunk()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **environment: str) -> int:
    """Pages taken anew from the system by ten rounds of four tensors of 20 MB, in a process."""
    others = ("MALLOC_", "THP_", "GLIBC_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    out = subprocess.run(
        [sys.executable, "-c", FAULTS, *words],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(out.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept():
    pages = 4 * 20_000_000 // os.sysconf("SC_PAGE_SIZE")
    small = {"THP_MEM_ALLOC_ENABLE": "0"}  # or a fault may bring 2 MB
    assert faults("settle", **small) < pages / 10  # ten rounds together: less than a tenth of one
    if "[always]" in HUGE.read_text(encoding="ascii"):
        pytest.skip("a system that brings 2 MB at each fault, whoever asks")
    # What the environment says stands, and then the test sees what it looks for. (Left alone, glibc
    # may come to keep these blocks too, from one run to the next.)
    own = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "4096"}
    assert faults("settle", **small, **own) > pages


def settled(**given):
    """What the environment says of waiting and of pages, once `settle` has been called."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")
    code = (
        "import os; from pyrovae import runtime; runtime.settle(); "
        f"print(*(os.environ.get(name, '-') for name in {names}))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "THP_"))}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env | given, capture_output=True, text=True, check=True
    )
    return out.stdout.split()


def test_threads_spin_for_a_moment_before_they_sleep():
    assert settled() == ["-", "1000", "1"]


def test_the_environment_has_the_last_word():
    assert settled(OMP_WAIT_POLICY="ACTIVE", THP_MEM_ALLOC_ENABLE="0") == ["ACTIVE", "-", "0"]
    assert settled(GOMP_SPINCOUNT="7") == ["-", "7", "1"]
