"""Part e: how long until something happens, each time in a fresh process.

``python -m bench.startup ENGINE HIDDEN`` takes one training step and leaves.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.children import run, run_module
from bench.measure import Effort, Table, interleave, say, spread

FIRST = "first training step, "


def first_step(engine: str, hidden: int) -> None:
    """Import, build, and take one step, in this process."""
    import torch

    from bench import cases
    from bench.peers import ours
    from pyrovae import data

    levels = torch.randint(0, 256, (200, 784), dtype=torch.uint8)
    split = data.from_array(levels, binarize="dynamic", valid_size=20, test_size=20).train
    ours.Engine(engine, cases.mlp_vae(hidden=hidden), split, 128).run(1)


def starts(effort: Effort) -> list[Table]:
    """Part e."""
    rounds, hidden = effort.of(5, 1), str(effort.of(200, 16))
    import torch

    # What --engine auto would take. The smoke form compiles nothing: a compilation is most of a
    # minute on a slow core.
    fast = "cuda-graph" if torch.cuda.is_available() else "compiled"
    engine = effort.of(fast, "traced")
    failed: dict[str, str] = {}
    say("start-up")
    with tempfile.TemporaryDirectory() as folder:
        counter = itertools.count()

        def step(engine: str, cache: str = "kept") -> str:
            env = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder, cache))}
            return run_module("bench.startup", engine, hidden, env=env)

        calls: dict[str, Callable[[], object]] = {
            "python, nothing else": lambda: run("-c", "pass"),
            "import torch": lambda: run("-c", "import torch"),
            "import pyro": lambda: run("-c", "import pyro"),
            "import pyrovae": lambda: run("-c", "import pyrovae"),
            "pyrovae --help": lambda: run("-m", "pyrovae", "--help"),
            FIRST + "svi": lambda: step("svi"),
            FIRST + f"{fast}, cache empty": lambda: step(engine, f"new-{next(counter)}"),
            FIRST + f"{fast}, compiled before": lambda: step(engine),
        }
        for name, call in list(calls.items()):  # a first time, which fills the caches
            try:
                if not effort.smoke and "cache empty" not in name:
                    call()
            except RuntimeError as error:
                failed[name] = f"failed: {error}"
                del calls[name]
                say(f"  {name}: {error}")
        seconds = interleave(calls, rounds)
    rows: list[dict] = [{"name": name, "missing": why} for name, why in failed.items()]
    for name, each in seconds.items():
        rows.append({"name": name, "seconds": spread(each)._asdict()})
        say(f"  {name}: {spread(each).median:.2f} s")
    return [
        {
            "title": "start-up",
            "columns": {"name": "", "seconds": "seconds"},
            "note": f"{rounds} fresh processes each, after one that is not counted. The first step "
            "includes imports, building the VAE, and tracing and compiling where there is any.",
            "rows": rows,
        }
    ]


if __name__ == "__main__":
    first_step(sys.argv[1], int(sys.argv[2]))
