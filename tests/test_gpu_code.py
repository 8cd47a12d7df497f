"""The code that a GPU would get, held against the traced step without one."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def _triton() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version("triton").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return (0,)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_triton() < (3, 9), reason="no Triton, or one whose interpreter is too old"),
]


def compared(*words: str) -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, TESTS / "gpu_code.py", *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"likelihood": "discretized-logistic", "optimizer": "adamax"},
        {"likelihood": "gaussian", "prior": "vamp", "prior_args": {"components": 3}},
    ],
    ids=lambda changes: ", ".join(map(str, changes.values())) or "the default",
)
def test_steps_of_the_code_for_a_gpu_are_those_that_were_traced(changes):
    """The batch, noise, loss, gradient, clipping, update and averages, all in its kernels."""
    combined, apart = compared(json.dumps(changes))
    for way in (combined, apart):
        for ours, theirs in way["losses"]:
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert way["error"] < 1e-4
        assert way["steps"] == [2, 2]
        assert way["moved"] > 1e-4  # every tensor of the state has gone somewhere
    assert combined["launches"] < apart["launches"]


def test_another_rotation_in_its_noise_would_be_seen():
    (way,) = compared("{}", "tl.full([1], 13, tl.int32)=>tl.full([1], 12, tl.int32)")
    assert max(abs(ours - theirs) for ours, theirs in way["losses"]) > 1
    assert way["error"] > 0.1
