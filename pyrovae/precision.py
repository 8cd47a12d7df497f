"""The precision of the networks' matrix products."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.errors import InputError
from pyrovae.importance import float32_products

PRECISIONS = ("fp32", "tf32", "bf16")

_ROUNDED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


@contextmanager
def networks_in(module: Any, precision: str) -> Iterator[None]:
    """Let the matrix products of a module's layers run in a precision, whatever is around it.

    "tf32" rounds the factors to 10 bits of mantissa on GPUs that can, "bf16" factors and results to
    7; sums are in float32, and so is whatever comes after a layer: activations, log-probabilities,
    the bound. The switch for tf32 is torch's own, which is for all products of float32; "bf16" is
    for layers of the module alone: dense ones, convolutions and transposed ones of images.

    Raises:
        InputError: for another precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"--precision expects one of {', '.join(PRECISIONS)}; got {precision!r}")
    with float32_products(rounded=precision == "tf32"), _rounding(module, precision == "bf16"):
        yield


def check_rounds(module: Any, precision: str, device: torch.device) -> None:
    """See that a precision is one, and would change something.

    Raises:
        InputError: for another precision; "tf32" on a device without it; or "bf16" for a module
            without a layer that it would round.
    """
    with networks_in(None, precision):
        pass
    on_gpu = device.type == "cuda"
    if precision == "tf32" and not (on_gpu and torch.cuda.get_device_capability(device)[0] >= 8):
        raise InputError(
            f"--precision tf32 needs a CUDA device of compute capability 8, and this is {device}; "
            "use bf16, or fp32"
        )
    if precision == "bf16" and not _layers(module):
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in _ROUNDED)
        raise InputError(
            f"--precision bf16 rounds {kinds}; got programs with none of them; use fp32"
        )


def stands(precision: str, device: torch.device) -> bool:
    """Whether torch's switches stand as `networks_in` would turn them for products on a CPU."""
    backends: Any = torch.backends
    if device.type != "cpu" or backends.mkldnn.conv.fp32_precision not in ("ieee", "none"):
        return False
    wanted = "high" if precision == "tf32" else "highest"
    try:
        return torch.get_float32_matmul_precision() == wanted
    except RuntimeError:  # set by a switch that this one does not know
        return False


def _layers(module: Any) -> list[nn.Module]:
    modules = module.modules() if isinstance(module, nn.Module) else ()
    return [layer for layer in modules if isinstance(layer, _ROUNDED)]


@contextmanager
def _rounding(module: Any, wanted: bool) -> Iterator[None]:
    """Let the layers of a module compute in bfloat16, or not so, as nobody had asked for it."""
    own = {layer: vars(layer).get("forward") for layer in _layers(module)}
    changed = [layer for layer, forward in own.items() if wanted or isinstance(forward, _Rounded)]
    for layer in changed:
        plain = layer.forward.plain if isinstance(layer.forward, _Rounded) else layer.forward
        layer.forward = _Rounded(plain) if wanted else plain
    try:
        yield
    finally:
        for layer in changed:
            forward = own[layer]
            if forward is None:
                del layer.forward  # the class's own is behind it
            else:
                layer.forward = forward


class _Rounded:
    """A layer's forward pass in bfloat16, from what it is given and to that precision."""

    def __init__(self, plain: Callable[..., Tensor]):
        self.plain = plain

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return self.plain(x, *args, **kwargs).to(x.dtype)
