"""What a step cannot do without: its matrix products alone, and its optimiser alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import cases

Shape = tuple[int, int, int]


def products(shapes: Sequence[Shape]) -> Callable[[int], float]:
    """Multiply (m, k) by (k, n) for each shape, so many times; reading one number ends the wait."""
    pairs = [
        (torch.rand(m, k, device=cases.device()), torch.rand(k, n, device=cases.device()))
        for m, k, n in shapes
    ]
    outs = [a @ b for a, b in pairs]

    def run(times: int) -> float:
        for _ in range(times):
            for (a, b), out in zip(pairs, outs, strict=True):
                torch.mm(a, b, out=out)
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
    adam = torch.optim.Adam(params, lr=1e-3, fused=True)

    def run(times: int) -> float:
        for _ in range(times):
            adam.step()
        return float(params[-1].detach().flatten()[0])

    return run
