"""One torch optimiser over all parameters, in the form that `pyro.infer.SVI` expects."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyrovae.errors import InputError

OPTIMIZERS: dict[str, Any] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
}


class WholeModelOptimizer(PyroOptim):
    """A PyroOptim that steps every parameter at once.

    Pyro builds one torch optimiser per parameter tensor, which forbids a gradient norm over the
    whole model and costs a Python loop a step. Here there is one, and gradients are those of the
    mean loss per image, so that a ragged last batch and the clipping threshold mean what they say.

    Args:
        named_parameters: what to train, ``module.named_parameters()``.
        name: "adam", "adamw" or "adamax".
        weight_decay: passed to the optimiser.
        clip_norm: largest norm of the gradient of the mean loss; None: no clipping.

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
    ):
        if name not in OPTIMIZERS:
            raise InputError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}")
        self.named = {n: p for n, p in named_parameters if p.requires_grad}
        # SVI's base class reads and saves this mapping; it stays empty.
        self.optim_objs: dict[Any, Any] = {}
        options: dict[str, Any] = {"weight_decay": weight_decay}
        if name != "adamax":
            options["fused"] = True
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS[name](
            list(self.named.values()), lr=1e-3, **options
        )
        self.clip_norm = clip_norm
        self.images = 1
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


def learning_rate(schedule: str, lr: float, step: int, total_steps: int) -> float:
    """The rate at ``step`` (from 0): constant, or lr (1 + cos(pi step / total)) / 2."""
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / total_steps))
