"""What the cells of the pages have in common."""

import statistics
from typing import Any

from pyrovae.runs import duration

Content = dict[str, Any]


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def heavy(seeds: list[Content]) -> str:
    """The share of test images whose Pareto k is above 0.7, where it was estimated."""
    shares = [s["pareto_k_above_0_7"] for s in seeds]
    if any(share is None for share in shares):
        return "not estimated"
    return f"{statistics.fmean(shares):.0%}"


def extent(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def training_time(seconds: list[float]) -> str:
    return duration(statistics.fmean(seconds))


def machines(seeds: list[Content]) -> str:
    names = set()
    for s in seeds:
        threads = f"{s['threads']} thread" + ("s" if s["threads"] > 1 else "")
        names.add(s["device_name"] if s["device"] != "cpu" else f"{threads} of {s['device_name']}")
    return "; ".join(sorted(names))
