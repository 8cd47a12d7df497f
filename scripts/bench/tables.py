"""The results as JSON, merged part by part, and as Markdown."""

import json
from pathlib import Path
from typing import Any

from bench.measure import Table

PARTS = {
    "a": "a training step of a dense VAE",
    "b": "a training step of a convolutional VAE",
    "c": "evaluation",
    "d": "memory of evaluation",
    "e": "start-up",
    "f": "how threads wait",
    "g": "where the time goes, call by call",
}


def merge(path: Path, device: str, parts: dict[str, Any]) -> dict[str, Any]:
    """Put newly measured parts in the file, beside those that it holds already."""
    results: dict[str, Any] = {"device": device, "parts": {}}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    results["parts"] = dict(sorted((results["parts"] | parts).items()))
    text = json.dumps(results, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    return results


def faults(parts: dict[str, Any]) -> list[str]:
    """Contestants that broke, or whose loss or log p(x) is not as the others'."""
    return [
        f"part {part}, {table['title']}: {row['name']}"
        for part, found in parts.items()
        for table in found["tables"]
        for row in table["rows"]
        if row.get("agrees") is False or str(row.get("missing", "")).startswith("failed")
    ]


def markdown(results: dict[str, Any]) -> str:
    """The page of one device."""
    lines = [f"# Benchmarks: {results['device']}", ""]
    lines += ["Written by `scripts/benchmark.py`; [what is measured](README.md).", ""]
    lines += [
        "Medians, with quartiles in brackets; ratios are medians of ratios within a round.",
        "",
    ]
    if not any(part["gpu"] for part in results["parts"].values()):
        lines += ["**Not measured on a GPU.**", ""]
    for letter, part in results["parts"].items():
        lines += [f"## ({letter}) {PARTS[letter]}", ""]
        threads = "1 thread" if part["threads"] == 1 else f"{part['threads']} threads"
        where = part["gpu"] or f"{part['cpu']}, {threads}"
        names = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
        small = " **Smoke form: tiny sizes, no measurement.**" if part["smoke"] else ""
        commit = part.get("commit")  # parts measured before it was noted have none
        names += f"; commit {commit[:10]}{'+' * commit.endswith('+')}" if commit else ""
        lines += [f"`{part['command']}`, {part['date']}, {where}; {names}.{small}", ""]
        for table in part["tables"]:
            lines += [*_table(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(table: Table) -> list[str]:
    if table.get("kind") == "race":
        table = _as_columns(table)
    columns = table["columns"]
    lines = [f"### {table['title']}", ""]
    lines += ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in table["rows"]:
        if "missing" in row:
            cells = [row["name"], row["missing"], *[""] * (len(columns) - 2)]
        else:
            cells = [_cell(row.get(key)) for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", table["note"]] if table.get("note") else lines


def _as_columns(race: Table) -> Table:
    columns = {"name": "", "ms": "ms a step"}
    columns |= {f"over {other}": f"times as fast as {other}" for other in race["references"]}
    columns |= {"first": "first loss", "last": "last loss", "agrees": "agrees"}
    rows = []
    for row in race["rows"]:
        ratios = {f"over {other}": value for other, value in row.get("faster", {}).items()}
        rows.append(row | ratios)
    turns = race["steps"].values()
    note = (
        f"{race['rounds']} rounds of {min(turns)} steps each"
        + (f" (up to {max(turns)} where a turn is an epoch)" if len(set(turns)) > 1 else "")
        + f". Losses, in nats per image, are those of the first and of the last quarter of "
        f"{race['check_steps']} steps from the same weights. {race['note']}"
    ).rstrip()
    return {"title": race["title"], "columns": columns, "rows": rows, "note": note}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, dict):
        return f"{_number(value['median'])} ({_number(value['q1'])} to {_number(value['q3'])})"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    size = abs(value)
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{decimals}f}"
