"""The code that Inductor writes for a GPU, without one: run by Triton's interpreter, with NumPy.

    python tests/gpu_code.py '{"likelihood": "bernoulli"}'

A graph is traced on the CPU, its tensors are said to be a GPU's, and `compiling.compiled` is asked
to compile it, as on a machine that has one. What Inductor has written by then is kept, and run on
the CPU: its kernels by the interpreter, its matrix products by torch. Prints, for each way in which
kernels are compiled, what came out and what the traced graph gives, as JSON.

It is a script of its own, for the interpreter is chosen before Triton is loaded. It reaches into
parts of torch and Triton that are theirs alone, and so is for the newest version of them.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import copy
import importlib.util
import inspect
import json
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
import triton.language as tl
from tiny import tiny_vae
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints, triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from pyrovae import acceleration, compiling, objectives
from pyrovae.acceleration import CompiledSVI
from pyrovae.optimizers import WholeModelOptimizer
from pyrovae.tracing import NotTraceableError

H100 = {
    "multi_processor_count": 132,
    "major": 9,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
}


# What Inductor writes


def codes(graph: GraphModule, example: Sequence[Tensor]) -> list[str]:
    """The code for a GPU of each way that `compiling.first_that_works` tries."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph = GraphModule(graph, copy.deepcopy(graph.graph))
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    graph.recompile()
    with mode:
        fakes = [_on_gpu(t) for t in example]
        for name, held in graph.named_buffers():
            setattr(graph, name, _on_gpu(held))
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fakes)
    written: list[str] = []
    with _pretended_gpu(written, mode), suppress(NotTraceableError):
        compiling.first_that_works(
            torch.device("cuda"), lambda options: compiling.compiled(graph, fakes, options)
        )
    return written


def _on_gpu(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


@contextmanager
def _pretended_gpu(written: list[str], mode: FakeTensorMode) -> Iterator[None]:
    codegen = GraphLowering.codegen

    def kept(self: GraphLowering) -> NoReturn:
        code: Any = codegen(self)[0]
        written.append(getattr(code, "value", code))
        raise InterruptedError("that is all there can be without a GPU")

    @contextmanager
    def not_kept(example: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        with tracing(TracingContext(mode)):
            yield example

    properties = types.SimpleNamespace(
        **H100, name="H100", minor=0, total_memory=80 << 30, shared_memory_per_block_optin=227 << 10
    )
    nothing = lambda *args, **options: None  # noqa: E731
    zero = lambda *args: 0  # noqa: E731
    functions: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": zero,
        "torch.cuda.get_device_properties": lambda *args: properties,
        "torch.cuda.get_device_capability": lambda *args: (9, 0),
        "torch.cuda.get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": nothing,
        "torch.cuda.synchronize": nothing,
        "torch.cuda._exchange_device": zero,
        "torch.cuda._maybe_exchange_device": zero,
        # Patterns of attention, for which tensors would be made there.
        "torch._inductor.fx_passes.joint_graph.lazy_init": nothing,
        "torch._inductor.fx_passes.post_grad.lazy_init": nothing,
    }
    device = hints.DeviceProperties(type="cuda", index=0, cc=90, **H100)
    target = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        utils=types.SimpleNamespace(
            get_device_properties=lambda index: {"max_shared_mem": 227 << 10}
        ),
    )
    with ExitStack() as scope:
        for name, function in functions.items():
            scope.enter_context(mock.patch(name, function))
        for owner, name, value in (
            (GraphLowering, "codegen", kept),
            (compiling, "_kept_on_disk", not_kept),
            (hints.DeviceProperties, "create", staticmethod(lambda of: device)),
            (driver, "_active", target),
            (_triton, "triton_hash_with_backend", lambda: ""),
        ):
            scope.enter_context(mock.patch.object(owner, name, value))
        scope.enter_context(
            inductor.patch(
                compile_threads=1, joint_graph_constant_folding=False, fx_graph_cache=False
            )
        )
        yield


# What runs it


class Kernel:
    """A kernel as Inductor's code calls it: ``run`` with a grid of small blocks."""

    def __init__(self, function: Any, meta: dict[str, Any], block: int):
        self.function = function
        self.meta = meta
        self.block = block

    def run(self, *args: Any, stream: Any = None) -> None:
        names = list(inspect.signature(self.function.fn).parameters)
        given = dict(zip([n for n in names if not n.endswith("BLOCK")], args, strict=True))
        blocks = {
            n: {"X": self.block, "Y": 16, "R": 64}[n[0]] for n in names if n.endswith("BLOCK")
        }
        self.function[self._grid(given, blocks)](**given, **blocks)

    def _grid(self, given: dict[str, Any], blocks: dict[str, int]) -> tuple[int, ...]:
        kind, parts = self.meta["grid_type"], self.meta.get("combo_grid_meta")
        if parts is None:
            axes = {"Grid1D": "x", "Grid2D": "xy"}[kind]
            return tuple(_blocks(given[f"{a}numel"], blocks.get(f"{a.upper()}BLOCK")) for a in axes)
        each = []
        for i in range(parts["num_kernels"]):
            assert f"ynumel_{i}" not in parts
            alone = parts[f"no_x_dim_{i}"]
            size = parts[f"xnumel_{i}"]
            size = given[f"xnumel_{i}"] if size is None else size
            each.append(_blocks(size, None if alone else blocks["XBLOCK"]))
        in_turn = {"SequentialComboKernelGrid": False, "RoundRobinComboKernelGrid": True}[kind]
        return (max(each) * len(each) if in_turn else sum(each),)


def _blocks(size: int, block: int | None) -> int:
    return size if block is None else -(-size // block)


class Libdevice:
    """Of NVIDIA's library of functions, what the interpreter has in Triton's own words."""

    def __getattr__(self, name: str) -> Any:
        function = _WORDS.get(name, getattr(tl, name, None))
        if function is None:
            raise NotImplementedError(f"libdevice.{name} has no words here")
        return function


def _tanh(x: Any) -> Any:
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, (e - 1) / (1 + e), (1 - e) / (1 + e))


def _sqrt(x: Any) -> Any:
    return tl.sqrt(x)


def _log1p(x: Any) -> Any:
    s = x / (2 + x)
    q = s * s
    near = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q / 11)))))
    return tl.where(tl.abs(x) < 0.5, near, tl.log(1 + x))


def _expm1(x: Any) -> Any:
    near = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120))))
    return tl.where(tl.abs(x) < 0.1, near, tl.exp(x) - 1)


def _isinf(x: Any) -> Any:
    return tl.abs(x) == float("inf")


def _isnan(x: Any) -> Any:
    return x != x


def _round(x: Any) -> Any:
    return (x + 12582912.0) - 12582912.0  # to even, of float32 below 2^22


_WORDS = {
    "tanh": _tanh,
    "sqrt_rn": _sqrt,
    "log1p": _log1p,
    "expm1": _expm1,
    "isinf": _isinf,
    "isnan": _isnan,
    "nearbyint": _round,
}


class Kernels:
    """In the place of Inductor's `AsyncCompile`: kernels that the interpreter runs."""

    def triton(self, name: str, source: str, **options: Any) -> Kernel:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as scope:
            for kind, block in (("pointwise", 256), ("reduction", 4), ("persistent_reduction", 4)):
                scope.enter_context(
                    mock.patch.object(triton_heuristics, kind, _as_kernel(block), create=True)
                )
            scope.enter_context(
                mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None)
            )
            path = Path(folder, f"{name}.py")
            path.write_text(source, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module: Any = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            # The interpreter reads the source of a kernel again.
            inspect.getsource(getattr(module, name).function.fn)
        module.libdevice = module.tl_math = Libdevice()
        kernel: Kernel = getattr(module, name)
        return kernel

    def wait(self, names: Any) -> None:
        """Nothing is compiled beside us."""


def _as_kernel(block: int) -> Any:
    def heuristic(*, inductor_meta: dict[str, Any], **options: Any) -> Any:
        return lambda function: Kernel(function, inductor_meta, block)

    return heuristic


def runnable(code: str) -> Any:
    """The function of a list of tensors that code for a GPU defines, on a CPU."""
    for theirs, ours in (
        (r"with torch\.cuda\._DeviceGuard\(0\):", "if True:"),
        (r"torch\.cuda\.set_device\(0\)", "pass"),
        (r"get_raw_stream\(0\)", "None"),
        (r"from torch\._C import _cuda_getCurrentRawStream as get_raw_stream", ""),
        (r"AsyncCompile\(\)", "KERNELS"),
        (r"guards\._empty_strided_cuda", "guards._empty_strided_cpu"),
        (r"(?m)^empty_strided_p2p = .*$", ""),
    ):
        code = re.sub(theirs, ours, code)
    names: dict[str, Any] = {"KERNELS": Kernels(), "__name__": "code", "__file__": "code.py"}
    exec(compile(code, "code.py", "exec"), names)
    return names["call"] if "call" in names else names["runner"].call


def launches(code: str) -> int:
    """Kernels and matrix products of one call."""
    return len(re.findall(r"(?m)^\s+(?:triton_\w+\.run|extern_kernels\.\w+)\(", code))


# A step


def compare(changes: dict[str, Any], spoil: str | None = None) -> list[dict[str, Any]]:
    """Two steps of a tiny VAE as traced, and by the code that a GPU would get.

    Args:
        changes: of the configuration of `tiny.tiny_vae`, and of its optimiser.
        spoil: "these words=>those", put into the first code, which then is the only one.
    """
    options = {"name": changes.pop("optimizer", "adam"), "clip_norm": 5.0}
    vae, data = tiny_vae(**changes)
    optim = WholeModelOptimizer(vae.named_parameters(), **options)
    averages = {name: t.clone() for name, t in vae.state_dict().items()}
    svi = CompiledSVI(
        vae.model,
        vae.guide,
        optim,
        objectives.elbo(),
        module=vae,
        split=data.train,
        average=(averages, 0.9),
        mode="traced",
    )
    indices = torch.arange(16)
    # What is computed otherwise for a CPU.
    with (
        mock.patch.object(acceleration, "_sum", torch.sum),
        mock.patch.object(acceleration, "_once", lambda value: value),
    ):
        step = svi.prepare(indices)
    graph, rest = step._traced[0], svi._fixed()[len(svi._state) :]
    held = [b for _, b in graph.named_buffers()]
    found = []
    written = codes(graph, [*svi._fixed(), indices, svi._rows[0]])
    if spoil is not None:
        old, new = spoil.split("=>")
        assert old in written[0]
        written = [written[0].replace(old, new)]
    for code in written:
        call = runnable(code)
        ours, theirs = ([t.clone() for t in svi._state] for _ in range(2))
        losses: list[tuple[float, float]] = []
        for count in (1, 2):
            batch = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(count))
            svi._decide(16, count)
            row = svi._rows[0].clone()
            with torch.no_grad():
                expected = graph(*theirs, *rest, batch[:16], row)
                (loss,) = call([*held, *ours, *rest, batch[:16], row])
            losses.append((float(loss), float(expected)))
        found.append(
            {
                "launches": launches(code),
                "losses": losses,
                "error": max(map(_distance, ours, theirs)),
                "moved": min(map(_distance, theirs, svi._state)),
                "steps": [int(ours[-1][0]), int(theirs[-1][0])],
            }
        )
    return found


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, in units of the largest number of the first."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max())


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # lanes that are masked divide by zero, in NumPy
    print(json.dumps(compare(json.loads(sys.argv[1]), *sys.argv[2:])))
