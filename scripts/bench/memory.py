"""Part d: seconds and memory of `evaluate` as K grows, each K in processes of its own.

``python -m bench.memory ENGINE K IMAGES HIDDEN LATENT`` is one such process; it prints JSON.
"""

import json
import statistics
import sys

from bench.children import run_module
from bench.measure import Effort, Table, peak, resident, say, spread

MB = 1e6


def child(
    engine: str, num_particles: int, images: int, hidden: int, latent: int
) -> dict[str, float]:
    """Evaluate, in this process; seconds, and bytes before and at the peak."""
    from pyrovae import runtime

    runtime.settle()  # as the commands do, before torch is loaded
    import torch

    from bench import cases
    from pyrovae import data
    from pyrovae.evaluation import evaluate

    gpu = torch.cuda.is_available()
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 2, (images + 20, 784), dtype=torch.uint8, generator=generator)
    split = data.from_array(levels, valid_size=10, test_size=images).test
    vae = cases.mlp_vae(hidden=hidden, latent=latent).to(cases.device())
    # What is loaded on first use, loaded.
    evaluate(vae, split.head(1), 100, information_images=0, engine=engine)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else resident()
    done = evaluate(vae, split, num_particles, information_images=0, engine=engine)
    most = torch.cuda.max_memory_allocated() if gpu else peak()
    return {"seconds": done.seconds, "before": before, "peak": most}


def against_particles(effort: Effort) -> list[Table]:
    """Part d; compiled whatever K, so that what the compiler takes is no growth."""
    return [_of(effort, engine) for engine in effort.of(("eager", "compiled"), ("eager",))]


def _of(effort: Effort, engine: str) -> Table:
    sizes = effort.of((100, 1_000, 10_000, 100_000), (100, 1_000))
    images, rounds = effort.of(32, 2), effort.of(3, 1)
    found: dict[int, list[dict]] = {K: [] for K in sizes}
    say(f"memory of evaluate, {engine}, {images} images")
    for _ in range(rounds):
        for K in sizes:
            network = effort.of(("200", "50"), ("16", "4"))
            arguments = engine, str(K), str(images), *network
            found[K].append(json.loads(run_module("bench.memory", *arguments)))
    rows = []
    peaks = {K: statistics.median(one["peak"] for one in found[K]) for K in sizes}
    for K in sizes:
        rows.append(
            {
                "name": f"{K:,}",
                "seconds": spread([one["seconds"] for one in found[K]])._asdict(),
                "peak": peaks[K] / MB,
                "above": statistics.median(one["peak"] - one["before"] for one in found[K]) / MB,
                "ratio": peaks[K] / peaks[sizes[0]],
            }
        )
        say(f"  K = {K:,}: {peaks[K] / MB:.0f} MB")
    return {
        "title": f"memory of evaluate as K grows, {engine}, 784-200-200-50",
        "columns": {
            "name": "K",
            "seconds": "seconds",
            "peak": "peak memory, MB",
            "above": "above what was there before, MB",
            "ratio": f"peak against K = {sizes[0]}",
        },
        "note": f"{images} images; {rounds} fresh processes for each K. Resident memory of the "
        "process, libraries included (on a GPU: what torch allocated there).",
        "rows": rows,
    }


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], *map(int, sys.argv[2:]))))
