"""Part f: how threads wait for each other, on a quiet machine and beside another process.

``python -m bench.waiting COMMANDS BATCH SECONDS HIDDEN ENGINE`` is one process: it makes ready,
says so, waits for a line of its input, and prints the milliseconds of a step. COMMANDS is 1 where
it is to set itself up as pyrovae's commands do.
"""

import itertools
import os
import subprocess
import sys
import time

from bench import children
from bench.measure import Effort, Table, say, spread

WAYS: dict[str, tuple[bool, dict[str, str]]] = {
    "sleeping at once (OMP_WAIT_POLICY=PASSIVE)": (False, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "as pyrovae's commands do": (True, {}),
    "as OpenMP does, told nothing": (False, {}),
}


def child(commands: bool, batch: int, seconds: float, hidden: int, engine: str) -> None:
    """Take steps for so many seconds, once told to."""
    from pyrovae import runtime

    runtime.settle() if commands else runtime.keep_memory()  # before torch is loaded
    import torch

    from bench import cases
    from bench.peers import ours
    from pyrovae import data

    levels = torch.randint(0, 256, (2000, 784), dtype=torch.uint8)
    split = data.from_array(levels, binarize="dynamic", valid_size=20, test_size=20).train
    steps = ours.Engine(engine, cases.mlp_vae(hidden=hidden), split, batch)
    steps.run(10)
    print("ready", flush=True)
    sys.stdin.readline()
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        steps.run(10)
        done += 10
    print((time.perf_counter() - started) / done * 1e3)


def together(count: int, way: str, arguments: list[str]) -> list[float]:
    """So many processes at once; the milliseconds of a step in each."""
    commands, told = WAYS[way]
    settings = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {k: v for k, v in os.environ.items() if k not in settings}
    env |= {**children.reach(), "CUDA_VISIBLE_DEVICES": "", **told}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.waiting", str(int(commands)), *arguments],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{way}: a process failed before it was ready")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        printed = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError(f"{way}: a process failed while it was measured")
        return [float(ms) for ms in printed]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ways(effort: Effort) -> list[Table]:
    """Part f."""
    batches, rounds = effort.of((20, 128), (4,)), effort.of(3, 1)
    rest = [str(effort.of(4.0, 0.1)), str(effort.of(200, 16)), effort.of("compiled", "traced")]
    found: dict[tuple[str, int, int], list[float]] = {}
    say("how threads wait")
    for _, way, batch, count in itertools.product(range(rounds), WAYS, batches, (1, 2)):
        ms = together(count, way, [str(batch), *rest])
        found.setdefault((way, batch, count), []).extend(ms)
    columns = {"name": "threads wait"}
    for batch in batches:
        columns[f"{batch}/1"] = f"batch {batch}: ms a step"
        columns[f"{batch}/2"] = "of each, beside another"
    rows = []
    for way in WAYS:
        row: dict = {"name": way}
        for batch, count in itertools.product(batches, (1, 2)):
            row[f"{batch}/{count}"] = spread(found[way, batch, count])._asdict()
        rows.append(row)
        say(f"  {way}: " + ", ".join(f"{row[key]['median']:.2f}" for key in list(columns)[1:]))
    return [
        {
            "title": "how threads wait, 784-200-200-50, pyrovae's compiled step on the CPU",
            "columns": columns,
            "note": f"{rounds} rounds of fresh processes, {rest[0]} seconds each; the other "
            "process does the same, on the same cores.",
            "rows": rows,
        }
    ]


if __name__ == "__main__":
    commands, batch, seconds, hidden, engine = sys.argv[1:]
    child(commands == "1", int(batch), float(seconds), int(hidden), engine)
