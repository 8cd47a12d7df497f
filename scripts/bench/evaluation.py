"""Part c: log p(x) with K = 5000 particles, beside the rate at which this machine multiplies."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from bench import cases, floors
from bench.measure import Effort, Table, build, failure, faster, interleave, say, spread
from bench.peers import pythae_nll, torch_loop, torch_losses, torch_step
from pyrovae import compiled_terms, evaluation, importance
from pyrovae.evaluation import evaluate
from pyrovae.precision import networks_in

PYTHAE, PYTHAE_NO_GRAD = "pythae, get_nll", "pythae, get_nll, under no_grad"
LOOP, OURS = "torch loop, 64 x 100", "pyrovae, evaluate"
ROUNDED = "pyrovae, evaluate, bf16"  # other work than the others'
LAYERS, SQUARE = "products of the decoder's shapes", "products of large squares"
SCALED = 10_000
SEED = 0
ROWS = torch_loop.IMAGES * torch_loop.PARTICLES


def ours(
    vae: Any, split: Any, x: torch.Tensor, num_particles: int, precision: str = "fp32"
) -> Callable[[], float]:
    """`evaluate` with its chunks compiled beforehand, as 10,000 images would have them."""
    # What `evaluate` will choose: in its precision, and from as much memory, which moves on a GPU.
    memory = importance._default_memory(x)
    with networks_in(vae, precision):
        plan = importance.plan(vae.model, vae.guide, x[:1], num_particles, memory)
    kernel = compiled_terms.CompiledTerms(
        vae.model, vae.guide, vae, x[: plan.images], plan.particles, precision=precision
    )
    options: dict[str, Any] = {
        "information_images": 0,
        "engine": kernel,
        "precision": precision,
        "memory": memory,
    }
    asked = kernel.serves
    served = [False]

    def serves(*chunk: Any) -> bool:
        found = asked(*chunk)
        served[0] |= found
        return found

    kernel.serves = serves  # type: ignore[method-assign]

    def run() -> float:
        # What rounding moves is measured on a hundred images, whatever their number: no part of
        # what is scaled here.
        served[0] = False
        with mock.patch.object(evaluation, "_shift", lambda *args: None):
            found = evaluation.evaluate(vae, split, num_particles, **options).log_likelihood
        if not served[0]:
            raise RuntimeError("no chunk had the shape that was compiled")
        return found

    return run


def importance_weighted(effort: Effort) -> list[Table]:
    """Part c."""
    torch.manual_seed(SEED)  # the peers draw from torch's own stream: the same again another time
    gpu = torch.cuda.is_available()
    hidden, latent = effort.of(cases.HIDDEN, 16), effort.of(cases.LATENT, 4)
    # Not fewer for --smoke: with K = 200 and a guide hardly trained, the weights of one image have
    # tails that its error bar does not see; that of the mean of 64 can be believed.
    few, K = effort.of(32, 64), effort.of(5000, 200)
    # A GPU takes seconds for all: measured on few, the start of an evaluation would be scaled too.
    most = SCALED if gpu and not effort.smoke else few
    images = {PYTHAE: few, PYTHAE_NO_GRAD: few, LOOP: most, OURS: most, ROUNDED: most}
    rounds = effort.of(5 if gpu else 15, 2)
    data = cases.digits(effort.of(20_064, 800) + most, test_size=most)
    vae = cases.mlp_vae(hidden=hidden, latent=latent).to(cases.device())
    net = torch_losses.mlp(vae)
    # Trained for a while: an untrained guide is so bad that no two estimates agree.
    batches = cases.Batches(data.train.raw, 128)
    torch_step.Eager(torch_losses.bernoulli_loss, net, batches).run(effort.of(1500, 60))
    cases.copy_weights(net, vae)
    splits = {n: data.test.head(n) for n in (few, most)}
    xs = {n: split.tensor().to(cases.device()) for n, split in splits.items()}

    references = {
        n: evaluate(vae, split, K, information_images=0, seed=1) for n, split in splits.items()
    }
    values: dict[str, float] = {}

    def scored(name: str, score: Callable[[], float]) -> Callable[[], None]:
        return lambda: values.__setitem__(name, score())

    say(f"log p(x), K = {K}, {most} images")

    def pythae(no_grad: bool) -> Callable[[], float]:
        scored = pythae_nll.Scored(copy.deepcopy(net), latent)
        return functools.partial(scored.log_likelihood, xs[few], K, no_grad)

    makers: dict[str, Callable[[], Callable[[], float]]] = {
        PYTHAE: lambda: pythae(no_grad=False),
        PYTHAE_NO_GRAD: lambda: pythae(no_grad=True),
        LOOP: lambda: functools.partial(torch_loop.log_likelihood, net, xs[most], K),
        OURS: lambda: ours(vae, splits[most], xs[most], K),
        ROUNDED: lambda: ours(vae, splits[most], xs[most], K, "bf16"),
    }
    built, missing = build(makers)
    shapes = [(ROWS, a, b) for a, b in ((latent, hidden), (hidden, hidden), (hidden, 784))]
    side = effort.of(8192 if gpu else 2048, 256)
    repeats = effort.of(100 if gpu else 10, 1)
    calls = {name: scored(name, score) for name, score in built.items()}
    square = [(side, side, side)]
    calls[LAYERS] = functools.partial(floors.products(shapes), repeats)
    calls[SQUARE] = functools.partial(floors.products(square), repeats)
    for name, call in list(calls.items()):  # a first time, which is not counted
        try:
            call()
        except Exception as error:
            if name not in makers:  # without the rates nothing can be said
                raise
            missing[name] = failure(error)
            del calls[name]
    seconds = interleave(calls, rounds)

    work = {name: images[name] * K * floors.work(shapes) / ROWS for name in images}
    work |= {LAYERS: repeats * floors.work(shapes), SQUARE: repeats * floors.work(square)}
    rate = {name: spread([work[name] / s / 1e9 for s in seconds[name]]) for name in calls}
    tolerances = {
        n: 5 * math.sqrt(2) * reference.log_likelihood_mc_error + 0.1
        for n, reference in references.items()
    }
    rows: list[dict[str, Any]] = []
    for name in makers:
        if name in missing:
            rows.append({"name": name, "missing": missing[name]})
            continue
        reference, tolerance = references[images[name]], tolerances[images[name]]
        scaled = {n: [s * SCALED / images[n] for s in seconds[n]] for n in makers if n in seconds}
        each = spread(scaled[name])
        ratios = [faster(scaled, name, peer) for peer in (PYTHAE, PYTHAE_NO_GRAD)]
        rows.append(
            {
                "name": name,
                "seconds": each._asdict(),
                "faster": ratios[0] and ratios[0]._asdict(),
                "faster_no_grad": ratios[1] and ratios[1]._asdict(),
                "gflops": rate[name].median,
                "of_layers": rate[name].median / rate[LAYERS].median,
                "of_square": rate[name].median / rate[SQUARE].median,
                "log_likelihood": values[name],
                "agrees": abs(values[name] - reference.log_likelihood) <= tolerance,
            }
        )
        say(f"  {name}: {each.median:.1f} s for {SCALED:,} images")
    rows += [{"name": name, "gflops": rate[name].median} for name in (LAYERS, SQUARE)]
    return [
        {
            "title": f"log p(x), K = {K:,}, 784-200-200-50",
            "columns": {
                "name": "",
                "seconds": f"seconds for {SCALED:,} images",
                "faster": "times as fast as pythae",
                "faster_no_grad": "times as fast as pythae under no_grad",
                "gflops": "GFLOP/s in the decoder's products",
                "of_layers": "of the rate of its shapes",
                "of_square": "of the rate of squares",
                "log_likelihood": "log p(x), nats",
                "agrees": "agrees",
            },
            "note": f"pythae: measured on {few} images, the others on {most:,}, and scaled to "
            f"{SCALED:,}; {rounds} rounds. Products: {ROWS:,} rows through the decoder's shapes; "
            f"squares of {side}. Agreement: within {max(tolerances.values()):.2f} nats of "
            "pyrovae's estimate with another seed.",
            "rows": rows,
        }
    ]
