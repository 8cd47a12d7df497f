"""The engines of a training step by name, and which of them is worth its start."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from pyrovae.compiling import has_compiler
from pyrovae.data import Split, StreamedSplit
from pyrovae.errors import InputError

# "traced" replays the traced operations without compiling them: to look into, or for a few steps.
ENGINES = ("auto", "svi", "compiled", "cuda-graph", "traced")

# On a CPU, a first compilation takes 6 to 30 seconds, and then each step takes a sixth to four
# fifths of its time. What repays it is steps times numbers of a step: from 1.1 to 7.9 billion of
# seven networks that were measured, whose steps differ a hundredfold (benchmarks/README.md).
REPAID_AFTER = 3e9


def numbers_of_step(
    module: Any, x_shape: Sequence[int], batch_size: int, num_particles: int = 1
) -> int:
    """How much a step passes over, roughly: parameters, and what each image is read and told as.

    Args:
        module: holds the parameters; the likelihood's are counted where it has one, as a `VAE` has.
        x_shape: of an image.
        batch_size: of all processes together.
        num_particles: draws of z per image.

    >>> numbers_of_step(torch.nn.Linear(3, 2), (4,), 10)
    48
    """
    likelihood = getattr(module, "likelihood", None)
    told = getattr(likelihood, "params_shape", None)
    image = math.prod(x_shape) + (0 if told is None else math.prod(told))
    weights = sum(p.numel() for p in module.parameters())
    return weights + batch_size * num_particles * image


def choose(engine: str, device: torch.device, steps: int, numbers: int) -> tuple[str, str]:
    """The engine that "auto" means, and why, in a few words.

    Args:
        engine: one of ``ENGINES``.
        device: where it runs.
        steps: that are planned.
        numbers: that a step passes over, as `numbers_of_step` counts them.

    Raises:
        InputError: for an unknown engine, or one that this device has not.
    """
    if engine not in ENGINES:
        raise InputError(f"--engine expects one of {', '.join(ENGINES)}; got {engine!r}")
    cuda = device.type == "cuda"
    if engine == "cuda-graph" and not cuda:
        raise InputError(
            f"--engine cuda-graph needs a CUDA device, and this run is on {device}; use --engine "
            "compiled"
        )
    if engine == "compiled" and not cuda and not has_compiler():
        raise InputError(
            "--engine compiled needs a C++ compiler, and none was found; install g++, or use "
            "--engine svi"
        )
    if engine != "auto":
        return engine, "as asked"
    if cuda:
        return "cuda-graph", "a CUDA device"
    if not has_compiler():
        return "svi", "no C++ compiler was found, which the compiled engine needs"
    if steps * numbers < REPAID_AFTER:
        return "svi", f"{steps:,} such steps would not repay the compilation"
    return "compiled", f"{steps:,} such steps repay the compilation"


def mode_of(checkpoint: dict[str, Any]) -> tuple[str, bool | None]:
    """The engine that a checkpoint was written by, and whether it drew its batches itself."""
    engine = checkpoint.get("engine")
    return ("svi", None) if engine is None else (engine["mode"], engine.get("by_index"))


def fits(split: Split | StreamedSplit, device: torch.device) -> bool:
    """Whether the raw levels of a split should be held on the device: half of it may be theirs."""
    if isinstance(split, StreamedSplit):
        return False
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return split.raw.nbytes < free // 2
