"""What a training step costs without a probabilistic language: torch alone, in four ways.

``loss`` maps a network and a batch of levels to the mean loss per image; each class takes it as it
is. Adam is torch's fused one, except in ``WholeStep``, which has it inside the compiled function.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import cases

Loss = Callable[[nn.Module, Tensor], Tensor]


def compiled(function: Callable, backend: str) -> Callable:
    """`torch.compile` for one shape, in the form that was found to be its fastest."""
    # On a CPU, the random numbers that Inductor would generate cost more than torch's own.
    options = {"fallback_random": cases.device().type == "cpu"} if backend == "inductor" else None
    return torch.compile(function, dynamic=False, backend=backend, options=options)


class Eager:
    """Loss, backward, fused Adam."""

    def __init__(self, loss: Loss, net: nn.Module, batches: cases.Batches):
        self.loss, self.net, self.batches = loss, net.to(cases.device()), batches
        self.adam = torch.optim.Adam(self.net.parameters(), lr=cases.LR, fused=True)

    def step(self) -> Tensor:
        """One step; its loss, still on the device."""
        self.adam.zero_grad()
        loss = self.loss(self.net, self.batches.next())
        loss.backward()
        self.adam.step()
        return loss.detach()

    def run(self, steps: int) -> float:
        """Take so many steps; the host reads once."""
        total = torch.zeros((), device=cases.device())
        for _ in range(steps):
            total = total + self.step()
        return float(total) / steps


class Compiled(Eager):
    """The loss, its gradient with it, compiled; fused Adam as it is."""

    def __init__(self, loss: Loss, net: nn.Module, batches: cases.Batches, backend: str):
        super().__init__(compiled(loss, backend), net, batches)


class WholeStep(Eager):
    """Loss, gradient and Adam as one function of tensors, compiled into one graph."""

    def __init__(self, loss: Loss, net: nn.Module, batches: cases.Batches, backend: str):
        self.batches = batches
        params = {n: p.detach().clone().to(cases.device()) for n, p in net.named_parameters()}
        self.state = (
            params,
            {n: torch.zeros_like(p) for n, p in params.items()},
            {n: torch.zeros_like(p) for n, p in params.items()},
            torch.zeros((), device=cases.device()),
        )
        wrapped = _Module(net, loss)
        gradient = torch.func.grad_and_value(
            lambda params, levels: torch.func.functional_call(wrapped, params, (levels,))
        )

        def step(state: tuple, levels: Tensor) -> Tensor:
            params, mean, square, count = state
            grads, value = gradient({f"net.{n}": p for n, p in params.items()}, levels)
            count += 1
            for name, p in params.items():
                g = grads[f"net.{name}"]
                mean[name].lerp_(g, 0.1)
                square[name].mul_(0.999).addcmul_(g, g, value=0.001)
                scale = (square[name] / (1 - 0.999**count)).sqrt() + 1e-8
                p.sub_(cases.LR / (1 - 0.9**count) * mean[name] / scale)
            return value

        self._step = torch.no_grad()(compiled(step, backend))

    def step(self) -> Tensor:
        """One step; its loss."""
        return self._step(self.state, self.batches.next())


class CudaGraph(Eager):
    """Loss, backward and a capturable fused Adam in one CUDA graph, replayed on a fixed batch."""

    def __init__(self, loss: Loss, net: nn.Module, batches: cases.Batches, backend: str | None):
        super().__init__(compiled(loss, backend) if backend else loss, net, batches)
        self.adam = torch.optim.Adam(
            self.net.parameters(), lr=cases.LR, fused=True, capturable=True
        )
        self.levels = batches.next().clone()
        start = [p.detach().clone() for p in self.net.parameters()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._one()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.value = self._one()
        with torch.no_grad():  # the steps of the warm-up are taken back
            for p, first in zip(self.net.parameters(), start, strict=True):
                p.copy_(first)
            for state in self.adam.state.values():
                for t in state.values():
                    t.zero_()

    def _one(self) -> Tensor:
        self.adam.zero_grad(set_to_none=True)
        loss = self.loss(self.net, self.levels)
        loss.backward()
        self.adam.step()
        return loss.detach()

    def step(self) -> Tensor:
        """Gather a batch into place, replay."""
        torch.index_select(self.batches.levels, 0, self.batches.index(), out=self.levels)
        self.graph.replay()
        return self.value


class _Module(nn.Module):
    def __init__(self, net: nn.Module, loss: Loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, levels: Tensor) -> Tensor:
        return self.loss(self.net, levels)
