"""One torch optimiser over all parameters, in the form that `pyro.infer.SVI` expects."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyrovae.errors import InputError
from pyrovae.shampoo import Shampoo, adam, unbiased

OPTIMIZERS: dict[str, Any] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "shampoo": Shampoo,
}


class WholeModelOptimizer(PyroOptim):
    """A PyroOptim that steps every parameter at once.

    Pyro builds one torch optimiser per parameter tensor, which forbids a gradient norm over the
    whole model and costs a Python loop a step. Here there is one, and gradients are those of the
    mean loss per image, so that a ragged last batch and the clipping threshold mean what they say.

    Args:
        named_parameters: what to train, ``module.named_parameters()``.
        name: "adam", "adamw", "adamax" or "shampoo".
        weight_decay: passed to the optimiser.
        clip_norm: largest norm of the gradient of the mean loss; None: no clipping.
        lr: learning rate, until `begin` sets another.
        betas: decay of the two running moments.
        eps: added to the root of the second moment.

    Raises:
        InputError: for an unknown name.
        FloatingPointError: from a step whose gradient is not finite; no parameter is changed.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        name: str = "adam",
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if name not in OPTIMIZERS:
            raise InputError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}")
        self.named = {n: p for n, p in named_parameters if p.requires_grad}
        # SVI's base class reads and saves this mapping; it stays empty.
        self.optim_objs: dict[Any, Any] = {}
        options: dict[str, Any] = {"weight_decay": weight_decay, "betas": betas, "eps": eps}
        if name in ("adam", "adamw"):
            options["fused"] = True
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS[name](
            list(self.named.values()), lr=lr, **options
        )
        self.clip_norm = clip_norm
        self.images = 1
        self.reduce: Callable[[Tensor], object] | None = None
        """Sums a flat gradient over all processes, in place; None: there is only this one."""
        self._applied = True

    def begin(self, lr: float, images: int) -> None:
        """Set the learning rate and the number of images of the step to come."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.images = images
        self._applied = False

    @torch.no_grad()
    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Apply the gradients that ``params`` hold."""
        with_grad = [p for p in self.named.values() if p.grad is not None]
        grads = [p.grad for p in with_grad if p.grad is not None]
        if not grads:
            raise InputError("no parameter received a gradient: does the program use the module?")
        if self.reduce is not None:
            _reduce(self.reduce, grads)
        torch._foreach_div_(grads, float(self.images))
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            for name, p in self.named.items():
                if p.grad is not None and not torch.isfinite(p.grad).all():
                    raise FloatingPointError(f"the gradient of {name} is not finite")
            raise FloatingPointError("the norm of the gradient overflows")
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(with_grad, self.clip_norm, norm)
        self.optimizer.step()
        self._applied = True

    def check_applied(self) -> None:
        """Raise if the last step moved nothing: a program whose parameters Pyro did not see."""
        if not self._applied:
            raise InputError("SVI made no step: the programs register no parameters with Pyro")

    def state_dict(self) -> dict[str, Any]:
        """The torch optimiser's state: tensors and plain values."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.optimizer.load_state_dict(state)


def _reduce(reduce: Callable[[Tensor], object], grads: list[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in grads])
    reduce(flat)
    for g, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(total.view_as(g))


def slots(optimizer: torch.optim.Optimizer, p: Tensor) -> tuple[Tensor, ...]:
    """The running moments of a parameter, made and stored as the optimiser itself does.

    The first one is linear in the gradients; a step may leave the last as they are.
    """
    if isinstance(optimizer, Shampoo):
        return optimizer.slots(p)
    names = _SLOTS[type(optimizer)]
    state = optimizer.state[p]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        if optimizer.defaults.get("fused"):
            state["step"] = state["step"].to(p.device)
        state |= {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names}
    return state[names[0]], state[names[1]]


def corrections(optimizer: torch.optim.Optimizer, step: int) -> tuple[float, float]:
    """What the first moment and the root of the second are multiplied by at ``step`` (from 1)."""
    first, second = unbiased(optimizer.defaults["betas"], step)
    return first, 1.0 if isinstance(optimizer, torch.optim.Adamax) else second


def moved(
    optimizer: torch.optim.Optimizer,
    p: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    lr: Tensor,
    corrections: tuple[Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """One update as a pure function: the parameter and those moments that the step moves.

    That of the torch optimiser, but for rounding, with the learning rate and the bias corrections
    as tensors, so that a traced step need not be traced again when they change.
    """
    if isinstance(optimizer, Shampoo):
        return optimizer.moved(p, grad, moments, lr, corrections)
    options = optimizer.defaults
    (first, second), eps, decay = options["betas"], options["eps"], options["weight_decay"]
    if decay and isinstance(optimizer, torch.optim.AdamW):
        p = p * (1 - lr * decay)
    elif decay:
        grad = grad + decay * p
    if isinstance(optimizer, torch.optim.Adamax):
        m = torch.lerp(moments[0], grad, 1 - first)
        v = torch.maximum(moments[1] * second, grad.abs() + eps)
        return p - lr * corrections[0] * m / v, m, v
    return adam(p, grad, moments, lr, corrections, (first, second), eps)


def after_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """What the optimiser does between steps, and no graph holds: Shampoo's roots."""
    if isinstance(optimizer, Shampoo):
        optimizer.renew(step)


def works_between_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `after_step` does anything."""
    return isinstance(optimizer, Shampoo)


_SLOTS: dict[type[torch.optim.Optimizer], tuple[str, str]] = {
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Adamax: ("exp_avg", "exp_inf"),
}


def learning_rate(
    schedule: str,
    lr: float,
    step: int,
    total_steps: int,
    *,
    steps_per_epoch: int = 1,
    warmup_steps: float = 0.0,
) -> float:
    """The rate at ``step`` (from 0), a pure function, so that a run can be taken up anywhere.

    In the warm-up, ``lr (step + 1) / warmup_steps``. From there on, with t steps after it and T to
    come in all: "constant" is ``lr``; "cosine" is ``lr (1 + cos(pi t / T)) / 2``; "iwae" is
    ``lr round(10^(1 - i/7), 1) / 10`` in stage i = 0 to 7, of 3^i epochs, and stays there.

    Source: the stages are those of Burda, Grosse and Salakhutdinov, Importance Weighted
    Autoencoders (2016), https://arxiv.org/abs/1509.00519, who begin at 1e-3.
    """
    if step + 1 < warmup_steps:
        return lr * (step + 1) / warmup_steps
    after = max(step - warmup_steps, 0.0)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * min(after / (total_steps - warmup_steps), 1.0)))
    if schedule == "iwae":
        return lr * _stage_factor(after / steps_per_epoch)
    return lr


def average_decay(decay: float, step: int) -> float:
    """The decay of a moving average after step ``step`` (from 1): min(decay, (1 + t) / (10 + t)).

    So the first weights, which nobody wants in it, are soon forgotten: while the second is the
    smaller, the weights in the average are a tenth of the run old, in the mean. Source: the moving
    averages of TensorFlow,
    https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage

    >>> [round(average_decay(0.999, t), 3) for t in (1, 10, 100, 100_000)]
    [0.182, 0.55, 0.918, 0.999]
    """
    return min(decay, (1 + step) / (10 + step))


IWAE_STAGES = 8


def _stage_factor(epoch: float) -> float:
    """What the first rate is multiplied by: stage i starts when (3^i - 1) / 2 epochs are done."""
    stage = sum(epoch >= (3**i - 1) / 2 for i in range(1, IWAE_STAGES))
    return round(10 ** (1 - stage / (IWAE_STAGES - 1)), 1) / 10
