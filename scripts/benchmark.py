"""Measure pyrovae beside its peers, in one run, the contestants taking turns.

    python scripts/benchmark.py                     # everything, on a quiet machine
    python scripts/benchmark.py --parts a c         # these parts alone; the others are kept
    python scripts/benchmark.py --smoke --out DIR   # a minute of tiny sizes: does it all run?

It writes DEVICE.json and DEVICE.md into --out. Parts: (a) a training step of a dense VAE, (b) of a
convolutional one, (c) evaluation beside pythae and the machine's rate of matrix products, (d)
seconds and memory as K grows, (e) start-up, (f) how threads wait, (g) every call of a step and of a
chunk with its time. Each part states its own date, versions and machine.
The peers are those of ``pip install -e '.[bench]'``; one that is not installed is left out, and
said so. What is compared with what, and the arithmetic: benchmarks/README.md.
"""

import argparse
import shlex
import sys
from pathlib import Path

from bench.measure import Effort, circumstances, device_name, limit_cores
from bench.tables import PARTS, faults, merge

from pyrovae import runtime


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; measures nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="an existing folder")
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default: 2)")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if not args.out.is_dir():
        parser.error(f"--out: {args.out} is not a folder; make it, or run from the repository")
    return args


def main() -> int:
    args = arguments()
    threads = limit_cores(args.threads)
    # As pyrovae's commands do, for all contestants alike; their way of waiting is part f alone.
    runtime.keep_memory()
    # Only now: torch counts the cores when it is imported.
    import torch
    from bench import evaluation, memory, profile, startup, training, waiting

    # Convolutions in float32 for everybody; torch's default rounds a GPU's factors to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    measured = {
        "a": training.dense,
        "b": training.convolutional,
        "c": evaluation.importance_weighted,
        "d": memory.against_particles,
        "e": startup.starts,
        "f": waiting.ways,
        "g": profile.calls,
    }
    device = device_name(threads) + ("-smoke" if args.smoke else "")
    path = args.out / f"{device}.json"
    wrong = []
    for letter in sorted(set(args.parts)):
        part = {
            **circumstances(threads),
            "command": f"python scripts/benchmark.py {command(letter, args)}",
            "smoke": args.smoke,
            "tables": measured[letter](Effort(args.smoke)),
        }
        merge(path, device, {letter: part})
        wrong += faults({letter: part})
    print(f"written to {path} and {path.with_suffix('.md')}")
    for fault in wrong:
        print(f"benchmark.py: broke, or disagrees with the others: {fault}", file=sys.stderr)
    return 1 if wrong else 0


def command(letter: str, args: argparse.Namespace) -> str:
    """The arguments that measure one part again."""
    words = ["--parts", letter, "--threads", str(args.threads)]
    return shlex.join(words + (["--smoke"] if args.smoke else []))


if __name__ == "__main__":
    sys.exit(main())
