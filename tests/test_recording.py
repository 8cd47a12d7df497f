"""A recorded function is the function: the same results, the same changes, and nothing else."""

import random
from functools import partial

import pytest
import torch
from torch._C import _storage_Use_Count as uses_of

from pyrovae import compiling, tracing
from pyrovae.recording import NotRecordableError, Recording

needs_compiler = pytest.mark.skipif(not compiling.has_compiler(), reason="needs a C++ compiler")


def written_by_hand(body, **names):
    """A function of a list of tensors, as Inductor writes them, and in the names of its module."""
    source = "def call(args):\n    " + "\n    ".join(body)
    scope = {"torch": torch, "aten": torch.ops.aten, **names}
    exec(source, scope)
    return scope["call"]


PRODUCT = [
    "out = empty_strided_cpu((2, 3), (3, 1), torch.float32)",
    "extern_kernels.mm(args[0], args[1], out=out)",
    "last = reinterpret_tensor(out, (3,), (1,), 3)",
    "return (reinterpret_tensor(last, (), (), 1), )",
]


@needs_compiler
def test_a_product_is_played_on_what_is_given():
    a, b = torch.zeros(2, 2), torch.randn(2, 3)
    recording = Recording(written_by_hand(PRODUCT), [a, b], [a])
    runs = [[torch.randn(2, 2)] for _ in range(5)]
    played = recording.play(runs)
    assert played.tolist() == [float((given @ b)[1, 1]) for (given,) in runs]
    b.mul_(2.0)  # a weight is read where it lies
    assert torch.equal(recording.play(runs), 2 * played)


@needs_compiler
def test_what_is_added_is_weighted_as_it_was():
    body = [
        "out = empty_strided_cpu((2, 3), (3, 1), torch.float64)",
        "extern_kernels.addmm(args[2], args[0], args[1], alpha=0.5, beta=3, out=out)",
        "batched = reinterpret_tensor(out, (1, 2, 3), (6, 3, 1), 0)",
        "again = empty_strided_cpu((1, 2, 2), (4, 2, 1), torch.float64)",
        "turned = reinterpret_tensor(out, (1, 3, 2), (6, 1, 3), 0)",
        "extern_kernels.bmm(batched, turned, out=again)",
        "return (reinterpret_tensor(again, (), (), 1), )",
    ]
    a, b, bias = (torch.randn(size, dtype=torch.float64) for size in [(2, 2), (2, 3), (3,)])
    recording = Recording(written_by_hand(body), [a, b, bias], [])
    out = 3 * bias + 0.5 * a @ b
    assert float(recording.play([[]])[0]) == pytest.approx(float((out @ out.T)[0, 1]), rel=1e-12)


@pytest.mark.parametrize(
    "body",
    [
        ["aten.add_(args[0], 1.0)", "return (args[0], )"],
        ["torch.add(args[0], 1.0)", "return (args[0], )"],
        ["args[0].add_(1.0)", "return (args[0], )"],
        ["print(args[0])", "return (args[0], )"],
        ["import os", "return (args[0], )"],
        ["other_library(args[0])", "return (args[0], )"],
        ["without_arguments()", "return (reinterpret_tensor(args[0], (), (), 0), )"],
        ["if args[0] > 0:", "    pass", "return (args[0], )"],
        ["extern_kernels.convolution(args[0], args[1])", "return (args[0], )"],
        ["extern_kernels.mm(args[0], args[1], 3, out=args[0])", "return (args[0], )"],
        ["extern_kernels.mm(args[0], args[2], out=args[0])", "return (args[0], )"],
        ["return (args[0], args[1])"],
        ["return (3, )"],
        ["assert_size_stride(args[0], (2, 3), (3, 1))", "return (args[0], )"],
        ["assert_size_stride_grouped(args[:2], [(2, 2)] * 2, [(2, 1), (1, 2)])", "return ()"],
        ["return (reinterpret_tensor(args[0], (2, ), (1, ), 0), )"],
    ],
    ids=lambda body: body[0],
)
def test_what_is_not_known_is_not_recorded(body):
    x = torch.zeros(2, 2)
    others = {"other_library": lambda x: x.add_(1.0), "without_arguments": lambda: x.add_(1.0)}
    call = written_by_hand(body, **others)
    with pytest.raises(NotRecordableError):
        Recording(call, [x, torch.zeros(2, 2), None], [])
    assert not x.any()


def test_what_is_not_of_python_is_not_recorded():
    with pytest.raises(NotRecordableError, match="not written in Python"):
        Recording(torch.relu, [torch.zeros(2)], [])


@needs_compiler
def test_a_call_that_fails_is_named():
    a, b = torch.zeros(2, 2), torch.randn(3, 3)  # of shapes that do not fit
    recording = Recording(written_by_hand(PRODUCT), [a, b], [])
    with pytest.raises(RuntimeError, match="call 1 of a recorded function failed"):
        recording.play([[]])


@needs_compiler
def test_what_is_given_must_be_alike():
    a, b = torch.zeros(2, 2), torch.randn(2, 3)
    recording = Recording(written_by_hand(PRODUCT), [a, b], [a])
    for other in (torch.zeros(2, 1), torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2).t()):
        with pytest.raises(ValueError, match=r"expected torch.float32 \(2, 2\), contiguous; got"):
            recording.play([[torch.zeros(2, 2)], [other]])
    assert not a.any()


@needs_compiler
def test_inputs_lie_anywhere_until_they_move():
    a, b = torch.zeros(2, 2), torch.randn(2, 5)[:, 1:4]
    recording = Recording(written_by_hand(PRODUCT), [a, b], [a])
    given = torch.randn(3, 2, 2)[1]
    assert float(recording.play([[given]])[0]) == pytest.approx(float((given @ b)[1, 1]), rel=1e-5)
    assert recording.stands()
    b.share_memory_()
    assert not recording.stands()


@needs_compiler
def test_memory_is_kept_while_a_view_of_it_is_left():
    body = [
        "first = empty_strided_cpu((2, 2), (2, 1), torch.float32)",
        "extern_kernels.mm(args[0], args[1], out=first)",
        "view = reinterpret_tensor(first, (2, 2), (2, 1), 0)",
        "del first",
        "second = empty_strided_cpu((2, 2), (2, 1), torch.float32)",
        "extern_kernels.mm(args[1], args[1], out=second)",
        "third = empty_strided_cpu((2, 2), (2, 1), torch.float32)",
        "extern_kernels.mm(view, second, out=third)",
        "return (reinterpret_tensor(third, (), (), 2), )",
    ]
    a, b = torch.randn(2, 2), torch.randn(2, 2)
    recording = Recording(written_by_hand(body), [a, b], [])
    expected = float((a @ b @ (b @ b))[1, 0])
    assert float(recording.play([[]])[0]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@needs_compiler
def test_memory_is_used_again_and_given_back():
    lines = []
    for i in range(6):
        taken = f"out{i} = empty_strided_cpu((64, 64), (64, 1), torch.float32)"
        before = "args[0]" if i == 0 else f"out{i - 1}"
        lines += [taken, f"extern_kernels.mm({before}, args[1], out=out{i})"]
        lines += [f"del out{i - 1}"] if i else []
    last = "return (reinterpret_tensor(out5, (), (), 70), )"
    x, weight = torch.randn(64, 64), torch.randn(64, 64) / 8
    held = uses_of(weight.untyped_storage()._cdata)
    recording = Recording(written_by_hand([*lines, last]), [x, weight], [x])
    whole = torch.linalg.multi_dot([x, *[weight] * 6])
    assert float(recording.play([[x]])[0]) == pytest.approx(float(whole[1, 6]), rel=1e-3, abs=1e-4)
    assert len(recording._memory) == 2  # one is read while the other is written
    assert uses_of(weight.untyped_storage()._cdata) > held
    del recording
    assert uses_of(weight.untyped_storage()._cdata) == held


@pytest.fixture(scope="module")
def compiled_pair():
    """A function that changes a state, as it is and compiled; and inputs for it."""

    def move(state, weight, x):
        y = (x @ weight).tanh()
        state.copy_(0.9 * state + (y @ weight.t() - x).mean(0))
        return (y * y).sum() + state.sum()

    inputs = [torch.randn(6), torch.randn(6, 40), torch.randn(20, 6)]
    graph = tracing.trace(move, *inputs)
    return move, compiling.compiled(graph, inputs), inputs


@needs_compiler
def test_a_compiled_function_is_played_as_it_was_called(compiled_pair):
    move, compiled, (state, weight, x) = compiled_pair
    state, place = state.clone(), x.clone()
    before = [t.clone() for t in (state, weight, place)]
    recording = compiled.recorded([state, weight, place], [place])
    for t, old in zip((state, weight, place), before, strict=True):
        assert torch.equal(t, old)  # to record is not to run
    xs = [torch.randn(20, 6) for _ in range(7)]
    theirs = state.clone()
    expected = [compiled(theirs, weight, given).clone() for given in xs]
    played = recording.play([[given] for given in xs])
    assert torch.equal(played, torch.stack(expected))
    assert torch.equal(state, theirs)
    by_torch = before[0]
    for given, result in zip(xs, expected, strict=True):
        assert torch.allclose(move(by_torch, weight, given), result, rtol=1e-4)
    assert torch.allclose(by_torch, state, rtol=1e-4, atol=1e-5)
    # What was compiled can be called as before.
    assert torch.equal(compiled(theirs, weight, x), recording.play([[x]])[0])


@needs_compiler
def test_a_function_that_is_given_copies_is_not_recorded(compiled_pair, monkeypatch):
    _, compiled, (state, weight, x) = compiled_pair
    run = compiled._run
    monkeypatch.setattr(compiled, "_run", lambda *given: run(*(t.clone() for t in given)))
    with pytest.raises(NotRecordableError, match="'NoneType' object has no attribute"):
        compiled.recorded([state, weight, x], [x])


@needs_compiler
def test_a_compiler_without_such_parts_is_not_recorded(compiled_pair, monkeypatch):
    _, compiled, inputs = compiled_pair
    monkeypatch.setattr(compiled, "_inner", object())
    with pytest.raises(NotRecordableError):
        compiled.recorded(inputs, inputs[-1:])


def test_without_its_private_parts_torch_keeps_nothing(monkeypatch):
    from torch._inductor import cpu_vec_isa

    monkeypatch.delattr(cpu_vec_isa, "pick_vec_isa")
    inputs = [torch.zeros(2)]
    with pytest.raises(KeyError), compiling._kept_on_disk(inputs) as given:
        assert given is inputs
        raise KeyError  # of the compilation itself, which is not swallowed


@needs_compiler
def test_what_was_compiled_is_kept_for_the_next_process():
    from torch._dynamo.utils import counters

    factor = random.SystemRandom().random()  # so that no earlier run compiled this
    inputs = [torch.ones(6)]
    graph = tracing.trace(lambda x: (x * factor).sum(), *inputs)
    hits, results = [counters["inductor"]["fxgraph_cache_hit"]], []
    try:
        for threads in (1, 1, 2):  # whose kernels are others
            torch.set_num_threads(threads)
            results.append(float(compiling.compiled(graph, inputs)(*inputs)))
            hits.append(counters["inductor"]["fxgraph_cache_hit"])
    finally:
        torch.set_num_threads(1)
    assert [hit - hits[0] for hit in hits] == [0, 0, 1, 1]
    assert results == pytest.approx([6 * factor] * 3, rel=1e-5)


def _weighted_sum(weights, x):
    return (x * weights).sum()


@needs_compiler
def test_a_tensor_that_a_program_holds_is_its_own():
    """Of two programs that differ in nothing but the tensor they hold; the second is kept one."""
    for _ in range(2):
        held = torch.ones(20)
        graph = tracing.trace(partial(_weighted_sum, held), torch.ones(20))
        run = compiling.compiled(graph, [torch.ones(20)])
        held.fill_(5.0)
        assert float(run(torch.ones(20))) == 100.0
