"""Fresh processes: for what is measured from a standing start."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1]


def run(*args: str, env: dict[str, str] | None = None) -> str:
    """Run this Python with arguments; what it printed. Raises RuntimeError with its last line."""
    done = subprocess.run(
        [sys.executable, *args],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{' '.join(args)}: {last[-1]}")
    return done.stdout


def run_module(module: str, *args: str, env: dict[str, str] | None = None) -> str:
    """Run a module of this folder."""
    return run("-m", module, *args, env={**reach(), **(env or {})})


def reach() -> dict[str, str]:
    """What a process must have in its environment to find the modules of this folder."""
    path = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path}
