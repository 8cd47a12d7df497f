"""The precision of the networks' matrix products, and of nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.errors import InputError
from pyrovae.importance import float32_products

PRECISIONS = ("fp32", "tf32", "bf16")


@contextmanager
def networks_in(module: Any, precision: str) -> Iterator[None]:
    """Let the matrix products of a module's layers run in a lower precision.

    "tf32" rounds the factors to 10 bits of mantissa on GPUs that can, "bf16" factors and results to
    7; sums are in float32, and so is whatever comes after a layer: activations, log-probabilities,
    the bound.

    Raises:
        InputError: for another precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"--precision expects one of {', '.join(PRECISIONS)}; got {precision!r}")
    rounded = module if precision == "bf16" else None
    with float32_products(rounded=precision == "tf32"), _rounding(rounded):
        yield


def stands(precision: str, device: torch.device) -> bool:
    """Whether torch's switches stand as `networks_in` would turn them for products on a CPU."""
    wanted = "high" if precision == "tf32" else "highest"
    return device.type == "cpu" and torch.get_float32_matmul_precision() == wanted


@contextmanager
def _rounding(module: Any) -> Iterator[None]:
    """Let the layers of a module compute in bfloat16; None: nobody's."""
    layers: list[nn.Module] = []
    if module is not None:
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _rounded(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward  # the class's own is behind it
            else:
                layer.forward = forward


def _rounded(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return forward(x).to(x.dtype)

    return run
