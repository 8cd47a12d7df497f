"""A traced graph made fast: compiled by Inductor, or captured in a CUDA graph."""

import copy
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyrovae import rewriting
from pyrovae.tracing import NotTraceableError


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def compiled(graph: GraphModule, example: Sequence[Tensor]) -> Callable[..., Any]:
    """A traced graph compiled by Inductor for inputs like the example.

    Not through ``torch.compile``, whose guards would be asked at every call: shapes, types and
    devices are those that the graph was traced with.

    Raises:
        NotTraceableError: if compilation fails.
    """
    try:
        with torch.no_grad(), quiet_compiler():
            from torch import _inductor  # late: importing it changes the filters of warnings

            options = {}
            # The operations are copied, the tensors that they hold are not: a program may write
            # into one between two calls.
            graph = rewriting.for_compiler(GraphModule(graph, copy.deepcopy(graph.graph)))
            if not any(t.is_cuda for t in example):
                graph = rewriting.for_cpu(graph)
                # A graph with its gradient inside looks like inference to Inductor, which then
                # lays images out with channels innermost: three lanes of a vector's sixteen.
                options["layout_optimization"] = False
            run = _inductor.compile(graph, list(example), options=options)
            run(*(t.clone() for t in example))  # the first call completes the work
            return run
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise NotTraceableError(f"the compilation failed: {reason}") from error


def captured(
    function: Callable[..., Tensor], state: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """A function captured in a CUDA graph: inputs are copied in, the output is a copy.

    Args:
        function: of tensors of fixed shapes; it may change ``state`` in place.
        state: what it changes; warming up leaves it as it was.
        inputs: an example of its inputs, on the device or not.
    """
    device = state[0].device
    static = [t.to(device, copy=True) for t in inputs]
    kept = [t.clone() for t in state]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):  # compilation, and the libraries' own first-time work
                function(*static)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # On the stream given: torch's own would belong to the current device, not to this one.
        # Torch leaves the stream current where capturing fails; the outer one puts ours back.
        current = torch.cuda.stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), current, torch.cuda.graph(graph, stream=stream):
            output = function(*static)
    finally:  # also where it fails, for another engine may go on from here
        for t, old in zip(state, kept, strict=True):
            t.copy_(old)

    @torch.no_grad()
    def replay(*given: Tensor) -> Tensor:
        for to, value in zip(static, given, strict=True):
            to.copy_(value, non_blocking=True)
        with torch.cuda.device(device):
            graph.replay()
        return output.clone()

    return replay


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """While compiling, torch may warn of its own deprecated parts, and of CUDA without a device."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
