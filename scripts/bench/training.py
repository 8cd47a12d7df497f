"""Parts a and b: one training step, drawing and binarising its batch included."""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from bench import cases, floors
from bench.measure import Contestant, Effort, MissingError, Table, race
from bench.peers import numpyro_epoch, ours, pyro_stock, torch_losses, torch_step
from pyrovae import compiling
from pyrovae.data import Split
from pyrovae.vae import VAE

STOCK, HAND, WHOLE = "stock Pyro SVI", "torch, loss compiled", "torch, whole step compiled"
EAGER, GRAPH, NUMPYRO = "torch, eager", "torch, CUDA graph", "NumPyro, epoch in fori_loop"
ENGINES = ("svi", "compiled", "cuda-graph")
ROUNDED = ("compiled", "cuda-graph")  # engines that are shown with products in bfloat16 too
REFERENCES = (STOCK, HAND, NUMPYRO)

Makers = dict[str, Callable[[], Contestant]]


def needs_a_gpu(make: Callable[[], Contestant]) -> Callable[[], Contestant]:
    """The maker, where there is a GPU."""

    def made() -> Contestant:
        if not torch.cuda.is_available():
            raise MissingError("not measured: it needs a GPU")
        return make()

    return made


def engines(effort: Effort, start: VAE, split: Split, batch: int) -> Makers:
    """pyrovae's; the smoke form replays the traced step without compiling it."""
    return _made(effort, {name: f"pyrovae, {name}" for name in ENGINES}, start, split, batch)


def rounded(effort: Effort, start: VAE, split: Split, batch: int) -> Makers:
    """pyrovae's with products in bfloat16, which is other work than that of all others."""
    titles = {name: f"pyrovae, {name}, bf16" for name in ROUNDED}
    return _made(effort, titles, start, split, batch, "bf16")


def uncombined(start: VAE, split: Split, batch: int) -> Makers:
    """The captured step with each kernel launched for itself, to see what their combining gains."""

    def make() -> Contestant:
        with mock.patch.object(compiling, "_FOR_GPU", compiling._FOR_GPU[-1:]):
            return ours.Engine("cuda-graph", start, split, batch)

    return {"pyrovae, cuda-graph, kernels not combined": needs_a_gpu(make)}


def _made(effort: Effort, titles: dict[str, str], *given: Any) -> Makers:
    modes = effort.of({}, {"compiled": "traced"})
    return {
        title: functools.partial(ours.Engine, modes.get(name, name), *given)
        for name, title in titles.items()
    }


def by_hand(
    loss: torch_step.Loss,
    net: Callable[[], torch.nn.Module],
    draw: Callable[[], cases.Batches],
    backend: str,
) -> Makers:
    """The four ways to write the step in torch."""
    return {
        EAGER: lambda: torch_step.Eager(loss, net(), draw()),
        HAND: lambda: torch_step.Compiled(loss, net(), draw(), backend),
        WHOLE: lambda: torch_step.WholeStep(loss, net(), draw(), backend),
        GRAPH: needs_a_gpu(lambda: torch_step.CudaGraph(loss, net(), draw(), backend)),
    }


def arithmetic(flops: int, start: VAE) -> str:
    """The work of a step in words: its products, and the memory that Adam must pass over."""
    count = sum(p.numel() for p in start.parameters())
    return (
        f"The products of a step are {flops / 1e9:.3f} GFLOP. Of {count:,} parameters, Adam reads "
        f"and writes at least {7 * 4 * count / 1e6:.1f} MB."
    )


def dense(effort: Effort) -> list[Table]:
    """Part a: 784-200-200-50, tanh, one table for each batch size."""
    data = cases.digits(effort.of(50_192, 800))
    start = cases.mlp_vae(hidden=effort.of(cases.HIDDEN, 16))
    levels = data.train.raw
    gpu = torch.cuda.is_available()
    tables = []
    # Short turns on a CPU: a rented machine is fast and slow by turns, of some seconds each, and
    # both sides of a ratio shall meet the same.
    turns = {20: 500, 128: 200, 1024: 30} if gpu else {20: 100, 128: 40, 1024: 8}
    for batch, steps in effort.of(turns, {20: 2}).items():

        def draw(batch: int = batch) -> cases.Batches:
            return cases.Batches(levels, batch)

        shapes = floors.step_shapes(cases.linears(start), batch)
        makers: Makers = {STOCK: lambda draw=draw: pyro_stock.mlp(draw(), start)}
        makers |= by_hand(
            torch_losses.bernoulli_loss,
            lambda: torch_losses.mlp(start),
            draw,
            effort.of("inductor", "aot_eager"),
        )
        makers[NUMPYRO] = lambda batch=batch: numpyro_epoch.Epoch(levels, batch, start)
        makers |= engines(effort, start, data.train, batch)
        makers |= rounded(effort, start, data.train, batch)
        makers |= uncombined(start, data.train, batch)
        tables.append(
            race(
                f"training step, 784-200-200-50, batch {batch}",
                makers,
                steps=steps,
                rounds=effort.of(9 if gpu else 31, 2),
                check_steps=effort.of(400, 120),
                references=REFERENCES,
                steps_of=effort.of({NUMPYRO: len(levels) // batch}, {}),
                floors={
                    "only its matrix products": floors.products(shapes),
                    "only fused Adam": floors.optimizer(start),
                },
                note=arithmetic(floors.work(shapes), start),
            )
        )
    return tables


def convolutional(effort: Effort) -> list[Table]:
    """Part b: conv64 with a mixture of five discretised logistics, batch 64."""
    batch = effort.of(64, 4)
    data = cases.coloured(effort.of(1040, 40))
    start = cases.conv_vae(hidden=effort.of(None, (4, 4, 4, 4)))

    def draw() -> cases.Batches:
        return cases.Batches(data.train.raw, batch)

    makers: Makers = {STOCK: lambda: pyro_stock.conv(draw(), start)}
    makers |= by_hand(
        torch_losses.mixture_loss,
        lambda: torch_losses.conv(start),
        draw,
        effort.of("inductor", "aot_eager"),
    )
    makers |= engines(effort, start, data.train, batch)
    gpu = torch.cuda.is_available()
    flops = floors.counted(
        torch_losses.mixture_loss, torch_losses.conv(start), data.train.raw[:batch]
    )
    return [
        race(
            f"training step, conv64, mixture of discretised logistics, batch {batch}",
            makers,
            steps=effort.of(100 if gpu else 3, 1),
            rounds=effort.of(7, 2),
            check_steps=effort.of(100 if gpu else 24, 12),
            references=(STOCK, HAND),
            floors={"only fused Adam": floors.optimizer(start)},
            note=arithmetic(flops, start),
        )
    ]
