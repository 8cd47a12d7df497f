"""The benchmark compares like with like, says so when it does not, and writes what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from bench import children, measure, profile, tables  # noqa: E402
from bench.measure import Falls, MissingError, Spread  # noqa: E402


class Learner:
    """A made-up contestant whose loss falls from 100 by a fixed share a step."""

    def __init__(self, share: float = 0.02):
        self.loss, self.share = 100.0, share

    def run(self, steps: int) -> float:
        total = 0.0
        for _ in range(steps):
            total += self.loss
            self.loss *= 1 - self.share
        return total / steps


def race(**others: Learner) -> measure.Table:
    def absent() -> Learner:
        raise MissingError("not installed; pip install it")

    makers = {"stock": Learner, "ours": Learner, "absent": absent}
    makers |= {name: lambda one=one: one for name, one in others.items()}
    return measure.race(
        "a race",
        makers,
        steps=3,
        rounds=3,
        check_steps=40,
        references=("stock", "absent"),
    )


class Broken(Learner):
    """A contestant that breaks at its second turn, as one whose compilation fails may."""

    def run(self, steps: int) -> float:
        if self.loss < 100.0:
            raise RuntimeError("no kernel\nfor this")
        return super().run(steps)


def test_who_breaks_is_named_and_takes_nobody_along() -> None:
    table = race(broken=Broken())
    rows = {row["name"]: row for row in table["rows"]}
    assert rows["broken"]["missing"] == "failed: RuntimeError: no kernel for this"
    assert rows["ours"]["agrees"] and rows["ours"]["ms"]["median"] > 0
    assert tables.faults({"a": {"tables": [table]}}) == ["part a, a race: broken"]

    def cannot() -> Learner:
        raise ValueError("no such device")

    built, missing = measure.build({"stock": Learner, "cannot": cannot})
    assert list(built) == ["stock"]
    assert missing == {"cannot": "failed: ValueError: no such device"}


def test_quartiles() -> None:
    assert measure.spread([3.0]) == Spread(3.0, 3.0, 3.0)
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(2.0, 3.0, 4.0)


def test_contestants_take_turns_from_another_one_each_round() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = measure.interleave(calls, 3)
    assert "".join(order) == "abcbcacab"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine is slower in each round than in the one before; twice as fast is twice as fast.
    seconds = {"stock": [2.0, 6.0, 20.0], "ours": [1.0, 3.0, 40.0]}
    assert measure.faster(seconds, "ours", "stock") == Spread(1.25, 2.0, 2.0)
    assert measure.faster(seconds, "ours", "nobody") is None


def test_a_race_between_equals() -> None:
    rows = {row["name"]: row for row in race()["rows"]}
    assert rows["absent"] == {"name": "absent", "missing": "not installed; pip install it"}
    for name in ("stock", "ours"):
        assert rows[name]["agrees"]
        assert rows[name]["first"] == 100.0 > rows[name]["last"]
        assert rows[name]["faster"]["stock"]["median"] > 0
        assert rows[name]["faster"]["absent"] is None
    assert tables.faults({"a": {"tables": [race()]}}) == []


@pytest.mark.parametrize(
    "wrong", [Learner(0.0), Learner(0.03), Learner(-0.001)], ids=["still", "other", "rising"]
)
def test_who_learns_otherwise_is_named(wrong: Learner) -> None:
    table = race(wrong=wrong)
    assert tables.faults({"a": {"tables": [table]}}) == ["part a, a race: wrong"]


def test_who_starts_elsewhere_is_named() -> None:
    losses = {"a": Falls(100, 50), "b": Falls(101, 51), "c": Falls(70, 50)}
    found = measure.check_losses(losses)
    assert [found[name].agrees for name in "abc"] == [True, True, False]


def test_a_loss_that_all_agree_on_must_still_fall() -> None:
    found = measure.check_losses({"a": Falls(100, 100), "b": Falls(100, 100)})
    assert not any(fall.agrees for fall in found.values())


def part(**changes: object) -> dict:
    about = {"gpu": None, "cpu": "a CPU", "threads": 2, "date": "2026-01-02", "smoke": False}
    about |= {"versions": {"torch": "2.0"}, "command": "python it", "tables": [race()]}
    return about | changes


def test_parts_are_merged_and_each_keeps_its_own_date(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    tables.merge(path, "cpu", {"b": part(date="2026-01-01"), "a": part()})
    tables.merge(path, "cpu", {"a": part(date="2026-03-04")})
    found = json.loads(path.read_text(encoding="utf-8"))
    dates = {letter: one["date"] for letter, one in found["parts"].items()}
    assert dates == {"a": "2026-03-04", "b": "2026-01-01"}


def test_the_page_says_what_was_not_measured() -> None:
    page = tables.markdown({"device": "cpu", "parts": {"a": part()}})
    assert "**Not measured on a GPU.**" in page
    assert "| absent | not installed; pip install it |" in page
    assert "a CPU, 2 threads; torch 2.0." in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    page = tables.markdown({"device": "g", "parts": {"a": part(gpu="a GPU", smoke=True)}})
    assert "Not measured on a GPU" not in page
    assert "no measurement" in page


def in_a_child(code: str) -> int:
    """What a fresh process prints, whose memory nothing has touched."""
    return int(children.run("-c", code, env={"PYTHONPATH": str(SCRIPTS)}))


COUNTED = """
from bench import measure

def touched(size):
    block = bytearray(size)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])  # so that it is resident
    return block

touched(64 << 20)
before = measure.resident()
more = touched(32 << 20)
print(measure.peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_counted_from_where_it_is_asked() -> None:
    assert 28 << 20 < in_a_child(COUNTED) < 48 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_child_does_not_begin_with_the_peak_of_its_parent() -> None:
    held = bytearray(b"x") * (256 << 20)
    peak = in_a_child("from bench import measure; print(measure.peak())")
    assert peak < len(held) / 2


def run(*flags: str, here: Path) -> subprocess.CompletedProcess[str]:
    root = str(SCRIPTS.parent)
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmark.py"), *flags],
        cwd=here,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )


# Part g


@pytest.fixture
def extern_kernels() -> Any:
    """As Inductor's functions know torch's; late, for importing it turns warnings on."""
    from torch._inductor.select_algorithm import extern_kernels

    return extern_kernels


RATE = profile.Rates(products=2e9, memory=1e9, caches=4e9)


def test_rows_are_sums_of_calls_beside_their_floors() -> None:
    calls = [
        profile.Call("product 2x3 by 3x4", 2000, 400),
        profile.Call("cpp_fused_tanh_0", 0, 800),
        profile.Call("product 2x3 by 3x4", 4000, 400),
        profile.Call("cpp_fused_what_1", 0, 1200),
    ]
    table = profile.as_rows(calls, [1.0, 2.0, 3.0, 4.0, 9.0], 12.0, RATE, {"numbers": 1.5})
    rows = {row.pop("name"): row for row in table["rows"]}
    product = {"calls": 2, "us": 4.0, "arithmetic": 3.0, "memory": 0.8, "caches": 0.2}
    assert rows["product 2x3 by 3x4"] == pytest.approx(product)
    assert rows["tanh and bias"]["us"] == 2.0
    assert rows["what_1"]["us"] == 4.0  # not known, and so by its name
    assert rows["of all products"] == pytest.approx(product)
    assert rows["of all calls"] == pytest.approx(
        {"calls": 4, "us": 10.0, "arithmetic": 3.0, "memory": 2.8, "caches": 0.7}
    )
    assert rows["numbers"]["us"] == 1.5
    assert rows["around it: Python, memory"]["us"] == pytest.approx(0.5)
    assert rows["the whole"]["us"] == 12.0


@pytest.mark.parametrize("transposed", [False, True])
def test_the_work_of_a_convolution_is_what_torch_counts(
    transposed: bool, extern_kernels: Any
) -> None:
    """Forward, and its gradients, as Inductor calls them."""
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    layer, x = kind(3, 5, 4, stride=2, padding=1), torch.rand(2, 3, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        y.sum().backward()
    clock = profile.Clock()
    how = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "transposed": transposed}
    how |= {"output_padding": (0, 0), "groups": 1, "bias": layer.bias}
    kernels = profile._Watched(extern_kernels, "extern_kernels", clock)
    ops = profile._Watched(torch, "torch", clock).ops
    with torch.no_grad():
        torch.testing.assert_close(kernels.convolution(x, layer.weight, **how), y.detach())
        ops.aten.convolution_backward.default(
            torch.ones_like(y),
            x,
            layer.weight,
            [5],
            [2, 2],
            [1, 1],
            [1, 1],
            transposed,
            [0, 0],
            1,
            [True, True, True],
        )
    assert sum(call.flops for call in clock.calls) == counter.get_total_flops()
    assert (clock.spent[:2] > 0).all() and not clock.spent[2:].any()


@pytest.mark.parametrize("name", ["mm", "addmm"])
def test_the_work_of_a_product_is_counted(name: str, extern_kernels: Any) -> None:
    clock = profile.Clock()
    kernels = profile._Watched(extern_kernels, "extern_kernels", clock)
    a, b, out = torch.rand(2, 3), torch.rand(3, 4), torch.empty(2, 4)
    if name == "mm":
        kernels.mm(a, b, out=out)
    else:
        kernels.addmm(torch.zeros(2, 4), a, b, alpha=1, beta=1, out=out)
    torch.testing.assert_close(out, a @ b)
    moved = 4 * (6 + 12 + 8 + (8 if name == "addmm" else 0))
    assert clock.calls == [profile.Call("product 2x3 by 3x4", 48, moved)]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--parts", "h"], "invalid choice: 'h'"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--out", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_mistakes_leave_nothing(flags: list[str], says: str, tmp_path: Path) -> None:
    done = run(*flags, here=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    """Every part runs; everyone who is here trains alike, and finds the same log p(x)."""
    done = run("--smoke", "--threads", "1", "--out", ".", here=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-smoke.json")
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert list(parts) == list("abcdefg")
    for letter in "ab":
        for row in parts[letter]["tables"][0]["rows"]:
            if "missing" in row:
                continue
            assert 0 < row["ms"]["q1"] <= row["ms"]["median"] <= row["ms"]["q3"]
            if not row["name"].startswith("only "):
                assert row["agrees"], row
                assert row["last"] < row["first"]
    ran = {
        letter: {row["name"] for row in one["tables"][0]["rows"] if "missing" not in row}
        for letter, one in parts.items()
    }
    torch_ways = {"torch, eager", "torch, loss compiled", "torch, whole step compiled"}
    for letter in "ab":
        assert torch_ways | {"stock Pyro SVI", "pyrovae, svi"} <= ran[letter]
        assert "pyrovae, compiled" in ran[letter]
    assert "pyrovae, compiled, bf16" in ran["a"]
    assert {"torch loop, 64 x 100", "pyrovae, evaluate"} <= ran["c"]
    assert all(row.get("agrees", True) for row in parts["c"]["tables"][0]["rows"])
    assert ran["d"] == {"100", "1,000"}
    assert {"pyrovae --help", "first training step, compiled, cache empty"} <= ran["e"]
    for row in parts["f"]["tables"][0]["rows"]:
        assert all(row[key]["median"] > 0 for key in ("4/1", "4/2"))
    for table in parts["g"]["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        assert any(name.startswith("product ") for name in rows)
        assert 0 < rows["of all products"]["us"] < rows["of all calls"]["us"]
        assert rows["of all calls"]["us"] < rows["the whole"]["us"]
        assert not any("cpp_fused" in name for name in rows)
    for one in parts.values():
        assert one["smoke"] is True
        assert one["versions"]["torch"]
        assert one["date"]
    assert path.with_suffix(".md").read_text(encoding="utf-8").count("\n## (") == 7
