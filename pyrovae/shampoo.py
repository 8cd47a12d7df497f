"""Shampoo, one-sided: momentum preconditioned by the second moment of each weight matrix's rows."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Decays of the momentum and of the second moment of a matrix.
MOMENTUM = 0.95
SECOND = 0.99
# Root mean square of a matrix's update, in units of the learning rate: about that of Adam's.
SIZE = 0.2
# The largest smaller side that is preconditioned: a root costs the cube of it.
LARGEST = 1024
# Steps from one root to the next, once the first few are done.
EVERY = 20
AT_FIRST = (1, 2, 4, 7, 11, 15)
# Added to every eigenvalue before its root is taken, as a share of the largest.
FLOOR = 1e-4


class Shampoo(torch.optim.Optimizer):
    """Shampoo with one preconditioner a matrix, on its smaller side; Adam for what is no matrix.

    For a parameter W (m, n) with m <= n (else its transpose; one with more axes is taken as (the
    first axis, the rest)), with gradient G at step t:

        M <- 0.95 M + 0.05 G,    S <- 0.99 S + 0.01 G G^T,
        U = P (0.05 G + 0.95 M),    W <- (1 - lr decay) W - lr 0.2 sqrt(m n) U / ||U||,

    where P = (S / (1 - 0.99^t))^(-1/2) is computed anew every 20 steps, and more often at first.
    The length of an update is that of a usual update of Adam, whose learning rates serve. A step
    costs two products with the smaller side beyond Adam's.

    Sources: Gupta, Koren and Singer, Shampoo (2018), https://arxiv.org/abs/1802.09568; the single
    side and the root -1/2, An et al., ASGO (2025), https://arxiv.org/abs/2503.20762; the length,
    Liu et al., Muon is scalable (2025), https://arxiv.org/abs/2502.16982.

    Args:
        params: what to train.
        lr: learning rate.
        betas: decays of the two moments of the parameters that Adam moves.
        eps: added to the root of their second moment.
        weight_decay: of all, decoupled from the gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                "expected lr, eps and weight_decay of at least 0, and betas from 0 to below 1; got "
                f"{lr}, {eps}, {weight_decay} and {betas}"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group that there is.

        Raises:
            ValueError: for a second one: options are those of all parameters.
        """
        if self.param_groups:
            raise ValueError("Shampoo takes one group of parameters; make an optimiser for each")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                slots = self.slots(p)
                self.state[p]["step"] += 1
                step = int(self.state[p]["step"])
                corrections = unbiased(group["betas"], step)
                new, *values = self.moved(p, p.grad, slots, group["lr"], corrections)
                for slot, value in zip(slots, values, strict=False):  # a root stays as it is
                    slot.copy_(value)
                p.copy_(new)
                self._renew(p, step)
        return loss

    def slots(self, p: Tensor) -> tuple[Tensor, ...]:
        """The state of one parameter, made if it is not there: two moments, and of a matrix P."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if is_preconditioned(p):
                side = min(p.flatten(1).shape)
                eye = torch.eye(side, dtype=p.dtype, device=p.device)
                state |= {"second": torch.zeros_like(eye), "root": eye}
            else:
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return tuple(t for name, t in state.items() if name != "step")

    def moved(
        self, p: Tensor, grad: Tensor, slots: Sequence[Tensor], lr: Any, corrections: Any
    ) -> tuple[Tensor, ...]:
        """One update as a pure function: the parameter and its two moments after the step."""
        options = self.param_groups[0]
        if options["weight_decay"]:
            p = p * (1 - lr * options["weight_decay"])
        if not is_preconditioned(p):
            return adam(p, grad, slots, lr, corrections, options["betas"], options["eps"])
        m = torch.lerp(slots[0], grad, 1 - MOMENTUM)
        wide = _wide(grad)
        second = torch.lerp(slots[1], wide @ wide.T, 1 - SECOND)
        update = slots[2] @ _wide(torch.lerp(grad, m, MOMENTUM))
        length = SIZE * math.sqrt(p.numel()) / (torch.linalg.vector_norm(update) + 1e-30)
        update = update * (length * lr)
        rows, columns = p.flatten(1).shape
        return p - (update if rows <= columns else update.T).reshape(p.shape), m, second

    def renew(self, step: int) -> None:
        """Compute the roots anew if they are due after step number ``step`` (from 1)."""
        for group in self.param_groups:
            for p in group["params"]:
                self._renew(p, step)

    @torch.no_grad()
    def _renew(self, p: Tensor, step: int) -> None:
        state = self.state[p]
        if "root" in state and (step in AT_FIRST or step % EVERY == 0):
            second = state["second"] / (1 - SECOND**step)
            try:
                root = inverse_root(second)
            except torch.linalg.LinAlgError:  # no convergence in float32
                root = inverse_root(second.double())
            state["root"].copy_(root)


def is_preconditioned(p: Tensor) -> bool:
    """Whether a parameter is a matrix, or a kernel, with a side that is small enough."""
    return p.ndim >= 2 and 2 <= min(p.flatten(1).shape) <= LARGEST


def _wide(p: Tensor) -> Tensor:
    """A weight as a matrix with no more rows than columns."""
    matrix = p.flatten(1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def inverse_root(second: Tensor) -> Tensor:
    """S^(-1/2) of a positive semi-definite S (m, m).

    To its eigenvalues 1e-4 of the largest is added: directions without gradient stay finite.

    >>> inverse_root(torch.tensor([[4.0, 0.0], [0.0, 0.25]])).round(decimals=1)
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]])
    """
    values, vectors = torch.linalg.eigh(second)
    values = values.clamp(min=0.0)
    values = values.clamp(min=1e-30) + FLOOR * values[-1]
    return (vectors * values.rsqrt()) @ vectors.T


def unbiased(betas: tuple[float, float], step: int) -> tuple[float, float]:
    """1 / (1 - b1^t) and 1 / sqrt(1 - b2^t) of Adam's step t, from 1.

    Factors, for a division of every weight by a number costs many times its multiplication.

    >>> unbiased((0.5, 0.75), 1)
    (2.0, 2.0)
    """
    return 1 / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step)


def adam(
    p: Tensor,
    grad: Tensor,
    slots: Sequence[Tensor],
    lr: Any,
    corrections: Any,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's update as a pure function: the parameter and its two moments after the step.

    ``corrections``, of `unbiased`, multiply the first moment and the root of the second.
    """
    m = torch.lerp(slots[0], grad, 1 - betas[0])
    v = slots[1] * betas[1] + (1 - betas[1]) * grad * grad
    return p - lr * corrections[0] * m / (v.sqrt() * corrections[1] + eps), m, v
