"""Random numbers made from counters: against published words, and against their distribution."""

import math

import pytest
import torch
from scipy import stats

from pyrovae import counters, rewriting
from pyrovae.tracing import Plan, trace


def int32(word: int) -> int:
    """The signed integer with these 32 bits."""
    return word - (word >> 31 << 32)


def words(*values: int) -> torch.Tensor:
    return torch.tensor([int32(value) for value in values], dtype=torch.int32)


# Counter, key and result, as the authors of Random123 publish them (kat_vectors, 20 rounds).
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_threefry_gives_the_published_words(counter, key, expected):
    first, second = words(*counter)
    for function in (counters.threefry, counters.spelt_out):
        found = function(words(*key), first, second)
        assert tuple(int(word) % 2**32 for word in found) == expected


def test_threefry_is_one_line_of_a_graph_until_it_is_spelt_out():
    """As it is, by NumPy; spelt out, for a compiler; by torch, for a GPU: the same integers."""

    def function(key, step):
        return counters.integers(key, step, 6, (3, 4))

    key, step = counters.key_of(9), number(2)
    graph = trace(function, key, step)
    name = "pyrovae_counters.threefry"
    assert sum(name in str(node.target) for node in graph.graph.nodes) == 1
    expected = graph(key, step)
    other = number(3)
    later = graph(key, other)
    rewriting.for_compiler(graph)
    assert not any(name in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(key, step), expected) and torch.equal(graph(key, other), later)
    assert not torch.equal(expected, later)
    rows = torch.arange(5, dtype=torch.int32)
    for first, second in ((rows, step), (step, rows), (rows[:, None], rows), (step, other)):
        for a, b in zip(
            counters.threefry(key, first, second),
            counters.spelt_out(key, first, second),
            strict=True,
        ):
            assert torch.equal(a, b) and a.dtype == torch.int32


def test_a_key_is_a_seed_of_64_bits():
    assert counters.key_of(0x0370734413198A2E).tolist() == [0x13198A2E, 0x03707344]
    assert counters.key_of(2**64 - 1).tolist() == [-1, -1]
    keys = {tuple(counters.key_of(seed).tolist()) for seed in (0, 1, 2**32, 2**63)}
    assert len(keys) == 4


def number(step: int) -> torch.Tensor:
    return torch.tensor(step, dtype=torch.int32)


def test_integers_are_uniform():
    """In each of 256 cells as many as elsewhere; over all images, and where a quarter ends."""
    key = counters.key_of(3)
    drawn = torch.stack([counters.integers(key, number(i), 7, (5, 6)) for i in range(2000)])
    assert drawn.shape == (2000, 7, 5, 6) and drawn.dtype == torch.int32
    assert int(drawn.min()) == -(2**15) and int(drawn.max()) == 2**15 - 1
    for bits in (drawn >> 8, drawn & 255):  # the high byte and the low one
        counts = torch.bincount((bits % 256).flatten(), minlength=256)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_integers_of_pixels_images_and_steps_are_independent():
    key = counters.key_of(4)
    n, shape = 6, (8,)
    drawn = torch.stack([counters.integers(key, number(i), n, shape) for i in range(3000)])
    table = drawn.view(len(drawn), -1).double()
    table = (table - table.mean(0)) / table.std(0)
    both = table.T @ table / len(table)
    next_step = table[1:].T @ table[:-1] / (len(table) - 1)
    bound = 5 / math.sqrt(len(table))
    off = both - torch.diag(both.diag())
    assert float(off.abs().max()) < bound
    assert float(next_step.abs().max()) < bound


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 20, 128])
def test_a_batch_of_any_size_gets_different_integers_for_every_pixel(count):
    """33 bits a pixel would be needed for all to differ; 16 collide as often as chance has it."""
    drawn = counters.integers(counters.key_of(5), number(0), count, (28, 28)).flatten()
    assert drawn.shape == (count * 784,)
    values = len(drawn.unique())
    cells, n = 2**16, len(drawn)
    expected = cells * (1 - (1 - 1 / cells) ** n)
    assert abs(values - expected) < 6 * math.sqrt(expected * (1 - expected / cells) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_standard_normal(dtype):
    key, n = counters.key_of(6), 2_000_001
    z = counters.normals(key, number(11), n, dtype)
    assert z.shape == (n,) and z.dtype == dtype
    assert stats.kstest(z[:200_000].double().numpy(), "norm").pvalue > 1e-4
    z = z.double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = float(z.pow(power).mean()) - moment
        assert abs(error) < 5 * math.sqrt(variance / n), power
    for far in (3.0, 4.0):  # the tails
        p = 2 * stats.norm.sf(far)
        assert abs(int((z.abs() > far).sum()) - n * p) < 5 * math.sqrt(n * p)


def test_the_two_normals_of_a_counter_are_independent():
    z = counters.normals(counters.key_of(7), number(2), 1_000_000, torch.float64)
    a, b = z.chunk(2)
    n = len(a)
    for f in (lambda t: t, torch.abs, torch.square):
        x, y = (f(t) - f(t).mean() for t in (a, b))
        assert abs(float((x * y).mean() / (x.std() * y.std()))) < 5 / math.sqrt(n)
    angle = torch.atan2(b, a)
    assert stats.kstest(angle.numpy(), "uniform", (-math.pi, 2 * math.pi)).pvalue > 1e-4


def test_the_smallest_word_gives_a_finite_normal(monkeypatch):
    """The radius is largest where the word is 0, and 0 where it is full."""
    for word, radius in ((0, math.sqrt(64 * math.log(2))), (0x7FFFFFFF, 0.0)):
        a, b = words(word), words(0)
        monkeypatch.setattr(counters, "threefry", lambda *_, a=a, b=b: (a, b))
        z = counters.normals(counters.key_of(0), number(0), 2, torch.float32)
        assert z.tolist() == pytest.approx([radius, 0.0], abs=1e-4)


def test_a_plan_cuts_one_stream_of_normals():
    """Sites in turn, each in its shape and precision; another step has other noise."""
    shapes = {"z/1": ((3, 2), torch.float64), "y/1": ((5,), torch.float32)}
    plan = Plan({name: (torch.Size(shape), dtype) for name, (shape, dtype) in shapes.items()})
    key = counters.key_of(8)
    drawn = plan.drawn(key, number(1))
    whole = counters.normals(key, number(1), 11, torch.float64)
    assert torch.equal(drawn["z/1"], whole[:6].view(3, 2))
    assert torch.equal(drawn["y/1"], whole[6:].float())
    other = plan.drawn(key, number(2))
    assert not bool((other["z/1"] == drawn["z/1"]).any())
    assert Plan({}).drawn(key, number(0)) == {}
