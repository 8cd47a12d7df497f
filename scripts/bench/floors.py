"""What a step cannot do without: its matrix products alone, and its optimiser alone.

On a GPU both are replayed from a CUDA graph, as the fast steps are: launched one by one they would
take longer than a whole step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import cases

Shape = tuple[int, int, int]


def replayed(body: Callable[[], None]) -> Callable[[], None]:
    """On a GPU, the replay of what was captured; elsewhere the thing itself."""
    if cases.device().type != "cuda":
        return body
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


def products(shapes: Sequence[Shape]) -> Callable[[int], float]:
    """Multiply (m, k) by (k, n) for each shape, so many times; reading one number ends the wait."""
    pairs = [
        (torch.rand(m, k, device=cases.device()), torch.rand(k, n, device=cases.device()))
        for m, k, n in shapes
    ]
    outs = [a @ b for a, b in pairs]

    def once() -> None:
        for (a, b), out in zip(pairs, outs, strict=True):
            torch.mm(a, b, out=out)

    each = replayed(once)

    def run(times: int) -> float:
        for _ in range(times):
            each()
        return float(outs[-1][0, 0])

    return run


def step_shapes(layers: Sequence[nn.Linear], batch: int) -> list[Shape]:
    """The products of a step: forward, gradients of the weights, and of all inputs but x."""
    shapes = []
    for i, layer in enumerate(layers):
        a, b = layer.in_features, layer.out_features
        shapes += [(batch, a, b), (b, batch, a)]
        if i:
            shapes.append((batch, b, a))
    return shapes


def work(shapes: Sequence[Shape]) -> int:
    """Floating-point operations of the products."""
    return sum(2 * m * k * n for m, k, n in shapes)


def counted(loss: Callable[[nn.Module, Tensor], Tensor], net: nn.Module, levels: Tensor) -> int:
    """Floating-point operations of all products and convolutions of a loss and its gradient."""
    with FlopCounterMode(display=False) as counter:
        loss(net, levels).backward()
    return counter.get_total_flops()


def optimizer(module: nn.Module) -> Callable[[int], float]:
    """Fused Adam on parameters of these shapes."""
    params = [nn.Parameter(torch.zeros_like(p, device=cases.device())) for p in module.parameters()]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    gpu = cases.device().type == "cuda"
    adam = torch.optim.Adam(params, lr=1e-3, fused=True, capturable=gpu)

    def once() -> None:
        adam.step()

    each = replayed(once)

    def run(times: int) -> float:
        for _ in range(times):
            each()
        return float(params[-1].detach().flatten()[0])

    return run
