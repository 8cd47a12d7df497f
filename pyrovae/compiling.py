"""A traced graph made fast: compiled by Inductor, or captured in a CUDA graph."""

import copy
import gc
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyrovae import rewriting
from pyrovae.recording import NotRecordableError, Recording
from pyrovae.streams import own_streams
from pyrovae.tracing import NotTraceableError

T = TypeVar("T")


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


class Compiled:
    """A function that Inductor compiled.

    Args:
        run: what Inductor's front returned.
        inner: what that calls with a list of tensors.
        held: tensors of the graph's own, which are in that list too.
    """

    def __init__(self, run: Callable[..., Any], inner: Any, held: Sequence[Tensor]):
        self._run = run
        self._inner = inner
        self._held = held

    def __call__(self, *inputs: Tensor) -> Any:
        """What the graph returns for them."""
        return self._run(*inputs)

    def recorded(self, inputs: Sequence[Tensor], given: Sequence[Tensor]) -> Recording:
        """The calls that it makes on these very tensors, none of which is changed now.

        Args:
            inputs: tensors that stay where they are, on a CPU.
            given: those of them that are written anew before each run.

        Raises:
            NotRecordableError: where that cannot be done.
        """
        made: list[Recording] = []
        ours = {t.data_ptr() for t in (*inputs, *self._held)}
        function: Any = getattr(self._inner, "current_callable", None)
        if function is None:
            raise NotRecordableError("of another version of torch")

        def record(flat: list[Tensor]) -> tuple[Tensor, ...]:
            # It is given others for inputs that it does not use; if it used one, that would show.
            made.append(
                Recording(function, [t if t.data_ptr() in ours else None for t in flat], given)
            )
            return (made[0].result,)

        try:
            self._inner.current_callable = record
            with torch.no_grad(), quiet_compiler():
                self._run(*inputs)
        except Exception as error:  # of parts of torch that another version may not have
            raise NotRecordableError(str(error)) from error
        finally:
            self._inner.current_callable = function
        if len(made) != 1:
            raise NotRecordableError("it is not called once")
        return made[0]


Options = dict[str, Any]

# What Inductor is told, tried in turn.
#
# Sites that draw for themselves draw from torch's own stream, as they do uncompiled: so the two can
# be compared, and a resumed run goes on exactly.
_ALWAYS: Options = {"fallback_random": True}
# A graph with its gradient inside looks like inference to it, and it would lay images out with
# channels innermost: on a CPU three lanes of a vector's sixteen.
_FOR_CPU: Sequence[Options] = ({**_ALWAYS, "layout_optimization": False},)
# Kernels that do not wait for each other are launched as one, for a GPU takes longer to begin a
# small one than to do it: a fifth to a third of the launches are gone (tests/gpu_code.py counts
# them). Torch calls it experimental, so where it fails, or computes something else, the second way
# is without.
_FOR_GPU: Sequence[Options] = ({**_ALWAYS, "combo_kernels": True}, _ALWAYS)


def _ways(on_gpu: bool) -> Sequence[Options]:
    return _FOR_GPU if on_gpu else _FOR_CPU


def first_that_works(device: torch.device, compile_and_check: Callable[[Options], T]) -> T:
    """What a function returns for the first way to compile by which it does not fail.

    Args:
        device: that the graph is for.
        compile_and_check: calls `compiled` with what it is given.

    Raises:
        NotTraceableError: of the last way, if all fail.
    """
    *first, last = _ways(device.type == "cuda")
    for options in first:
        with suppress(NotTraceableError):
            return compile_and_check(options)
    return compile_and_check(last)


def compiled(
    graph: GraphModule, example: Sequence[Tensor], options: Options | None = None
) -> Compiled:
    """A traced graph compiled by Inductor for inputs like the example.

    Not through ``torch.compile``, whose guards would be asked at every call: shapes, types and
    devices are those that the graph was traced with.

    Args:
        graph: of `tracing.trace`; it stays as it is.
        example: a tensor for each of its inputs.
        options: of Inductor; default: of the last way that there is for their device.

    Raises:
        NotTraceableError: if compilation fails.
    """
    if options is None:
        options = _ways(any(t.is_cuda for t in example))[-1]
    try:
        return _compiled(graph, example, options)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise NotTraceableError(f"the compilation failed: {reason}") from error


def _compiled(graph: GraphModule, example: Sequence[Tensor], options: Options) -> Compiled:
    with torch.no_grad(), quiet_compiler():
        from torch._inductor import compile_fx  # late: it changes the filters of warnings

        inner: Any = None

        def kept(*args: Any, **kwargs: Any) -> Any:
            nonlocal inner
            inner = compile_fx.compile_fx_inner(*args, **kwargs)
            return inner

        # The operations are copied, the tensors that they hold are not: a program may write into
        # one between two calls.
        graph = rewriting.for_compiler(GraphModule(graph, copy.deepcopy(graph.graph)))
        if not any(t.is_cuda for t in example):
            graph = rewriting.for_cpu(graph)
        held = [*graph.parameters(), *graph.buffers()]
        with _kept_on_disk(example) as given:
            run: Any = compile_fx.compile_fx(
                graph, list(given), inner_compile=kept, config_patches=options
            )
        run(*(t.clone() for t in example))  # the first call completes the work
        return Compiled(run, inner, held)


@contextmanager
def _kept_on_disk(example: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """The example as Inductor wants it, to keep what it compiles for the next process.

    It looks into its cache only where a tracing context has a `ShapeEnv`, which is where sizes that
    are left open would be; none is here. What AOTAutograd would keep is a whole, into which nobody
    can look, so that is left out.
    """
    given: Sequence[Tensor] = example
    with ExitStack() as scope:
        try:
            from torch._functorch import config as functorch
            from torch._guards import TracingContext, tracing
            from torch._inductor.cpu_vec_isa import pick_vec_isa
            from torch._subclasses.fake_tensor import FakeTensorMode
            from torch.fx.experimental.symbolic_shapes import ShapeEnv

            scope.enter_context(functorch.patch(enable_autograd_cache=False))
            if not any(t.is_cuda for t in example):
                # Kernels are made for a processor and a number of threads, which older versions
                # of torch do not ask for when they take one from the cache.
                made_for = f"{pick_vec_isa()}, {torch.get_num_threads()} threads"
                config: Any = torch.compiler.config
                scope.enter_context(config.patch(cache_key_tag=made_for))
            mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
            given = [*(mode.from_tensor(t, static_shapes=True) for t in example)]
            scope.enter_context(tracing(TracingContext(mode)))
        except (ImportError, AttributeError):  # private parts of torch: then nothing is kept
            given = example
        yield given


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
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    gc.collect()  # what is freed while a stream is captured may break it
    try:
        # Sites that draw for themselves must meet the draws that they would have met.
        with torch.cuda.device(device), own_streams():
            with torch.cuda.stream(stream):
                for _ in range(3):  # compilation, and the libraries' own first-time work
                    function(*static)
            torch.cuda.current_stream(device).wait_stream(stream)
            # On the stream given: torch's own would belong to the current device, not to this one.
            # Torch leaves the stream current where capturing fails; the outer one puts ours back.
            # What other threads ask of CUDA meanwhile is theirs.
            mode = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
            with torch.cuda.stream(torch.cuda.current_stream(device)):
                output = _while_captured(graph, mode, function, static)
    finally:  # also where it fails, for another engine may go on from here
        torch.cuda.synchronize(device)  # no step of the other stream may write any more
        for t, old in zip(state, kept, strict=True):
            t.copy_(old)

    @torch.no_grad()
    def replay(*given: Tensor) -> Tensor:
        for to, value in zip(static, given, strict=True):
            to.copy_(value, non_blocking=True)
        with torch.cuda.device(device):
            graph.replay()
        # Autograd sees who writes by torch's operations, and nobody else.
        torch.autograd.graph.increment_version(state)
        return output.clone()

    return replay


def _while_captured(
    graph: Any, mode: dict[str, Any], function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> Tensor:
    """What a function returns, while all that it asks of CUDA is written into a graph."""
    device = torch.cuda.current_device()
    generators = [*torch.cuda.default_generators][device : device + 1]
    clean = [generator.clone_state() for generator in generators]
    broke: RuntimeError | None = None
    try:
        with torch.cuda.graph(graph, **mode):
            try:
                return function(*inputs)
            except RuntimeError as error:
                broke = error
                raise
    except RuntimeError as error:
        # The end of a broken capture leaves torch's allocator waiting for it: no cached memory
        # would be given back from then on, and no other graph captured. Older versions leave the
        # generator waiting too, and it would draw nothing any more.
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(device, mode["pool"])
        for generator, state in zip(generators, clean, strict=True):
            with suppress(Exception):
                generator.graphsafe_set_state(state)
        # What the end complains of is that the capture is broken; what broke it came before.
        raise RuntimeError(str(broke or error)) from error


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
