"""What a command tells its process: freed memory is kept, and the user has the last word."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from pyrovae import runtime
if "settle" in sys.argv:
    runtime.settle()
import torch
torch.set_num_threads(1)
chunk = lambda: [torch.empty(5_000_000).zero_() for _ in range(4)] and None
chunk()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    chunk()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **environment: str) -> int:
    """Pages taken anew from the system by ten rounds of four tensors of 20 MB, in a process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "THP_"))}
    out = subprocess.run(
        [sys.executable, "-c", FAULTS, *words],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(out.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept():
    pages = 4 * 20_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert faults("settle") < pages / 10  # ten rounds together need less than a tenth of one
    assert faults() > pages  # else the test would see nothing
    own = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "4096"}
    assert faults("settle", **own) > pages


def test_the_environment_has_the_last_word():
    code = (
        "import os; from pyrovae import runtime; runtime.settle(); "
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['THP_MEM_ALLOC_ENABLE'])"
    )
    for given, wanted in (("", "PASSIVE 1"), ("ACTIVE", "ACTIVE 1")):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "THP_"))}
        env |= {"OMP_WAIT_POLICY": given} if given else {}
        out = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert out.stdout.split() == wanted.split()
