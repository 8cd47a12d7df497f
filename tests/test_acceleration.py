"""The traced step is Pyro's step: loss, gradients, parameters; what cannot be traced is refused."""

import contextlib
import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from test_grid import GRID, is_valid, settings
from tiny import tiny_config, tiny_data, tiny_hierarchy, tiny_vae, traced_svi
from torch import nn

from pyrovae import (
    acceleration,
    compiled_terms,
    compiling,
    counters,
    engines,
    objectives,
    processes,
    tracing,
    training,
)
from pyrovae import config as cfg
from pyrovae.acceleration import CompiledSVI
from pyrovae.compiled_terms import CompiledTerms
from pyrovae.data import fixed
from pyrovae.engines import choose
from pyrovae.errors import InputError, NonFiniteLossError
from pyrovae.evaluation import evaluate
from pyrovae.importance import LogTerms, chunks
from pyrovae.loop import Loop
from pyrovae.objectives import KLWeight
from pyrovae.optimizers import WholeModelOptimizer
from pyrovae.precision import networks_in
from pyrovae.proposals import Noise, Proposal
from pyrovae.recording import Recording
from pyrovae.runs import load_checkpoint, save_checkpoint
from pyrovae.tracing import Draws, NotTraceableError, Traced
from pyrovae.training import fit

pytestmark = pytest.mark.usefixtures("soon_started")

needs_compiler = pytest.mark.skipif(not compiling.has_compiler(), reason="needs a C++ compiler")


@pytest.fixture
def inductor():
    """Of torch, the module with the function that compiles; importing it turns warnings on."""
    with compiling.quiet_compiler():
        from torch._inductor import compile_fx

    return compile_fx


@pytest.fixture(autouse=True)
def quiet_pyro():
    """As `fit` does: no parameters left behind, no validation."""
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        yield


def batch(config, n=5):
    data = tiny_data(config, n=40)
    return data, data.train.batch(torch.arange(n), torch.Generator().manual_seed(1))


def noise_for(plan, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, dtype=dtype, generator=stream)
        for key, (shape, dtype) in plan.noise.items()
    }


def first_rows(names):
    """Every prior with every posterior, and every objective or likelihood with one of each."""
    plain = names[1:3] == ("standard-normal", "mean-field")
    of_elbo = names[3] == "elbo" and names[0] == "bernoulli"
    return () if of_elbo or plain else pytest.mark.slow


@pytest.mark.parametrize(
    "names",
    [pytest.param(g, marks=first_rows(g), id="-".join(g)) for g in GRID if is_valid(*g)],
)
def test_loss_and_every_gradient_are_those_of_pyro(names):
    assert_traced_is_pyros(tiny_config(**settings(*names)))


HIERARCHIES = [
    (structure, prior, objective)
    for structure in ("bottom-up", "top-down")
    for prior in ("standard-normal", "vamp")
    for objective in objectives.REGISTRY
    if (structure, prior) != ("bottom-up", "vamp")  # refused: its inputs would be latents
    and (objective != "mean-field" or (structure, prior) == ("top-down", "standard-normal"))
]


@pytest.mark.parametrize("case", HIERARCHIES, ids="-".join)
def test_loss_and_every_gradient_of_a_hierarchy_are_those_of_pyro(case):
    structure, prior, objective = case
    k = 3 if objective in ("iwae", "dreg") else 1
    config = tiny_hierarchy(structure, prior=prior, objective=objective, num_particles=k)
    assert_traced_is_pyros(config)


def assert_traced_is_pyros(config):
    data, x = batch(config)
    vae = cfg.build(config, data)
    objective = objectives.REGISTRY[config.objective](config.num_particles)
    named = dict(vae.named_parameters())
    traced = Traced(vae.model, vae.guide, objective, named, vae, None)
    plan = traced.plan(x)
    graph = traced.graph(plan, x)
    # Weights and noise that the graph was not traced with: nothing may have been folded into it.
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    noise = noise_for(plan)
    with Draws(noise):
        expected = objective.loss_and_grads(vae.model, vae.guide, x)
    one = torch.ones((), dtype=torch.float64)
    loss, *grads = graph(
        *(p.detach() for p in named.values()), *traced.constants, x, *noise.values(), one
    )
    assert float(loss) == pytest.approx(expected, rel=2e-5, abs=1e-5)
    for (name, p), grad in zip(named.items(), grads, strict=True):
        assert (grad is None) == (p.grad is None), name
        if p.grad is not None:
            error = (grad - p.grad).norm()
            assert float(error) <= 1e-4 * float(p.grad.norm()) + 1e-5, name


def reference_steps(vae, objective, optim, drawn, rows):
    """The same steps by `pyro.infer.SVI`; ``rows`` are learning rate and KL weight of each."""
    weight = KLWeight().to(next(vae.parameters()).device)
    model, guide = objectives.with_handlers(vae.model, vae.guide, objective, weight=weight)
    svi = SVI(model, guide, optim, loss=objective)
    losses = []
    for (x, noise), (lr, kl) in zip(drawn, rows, strict=True):
        optim.begin(lr, len(x))
        weight.set(kl)
        with Draws(noise):
            losses.append(svi.step(x))
    return losses


class Recorder(CompiledSVI):
    """Keeps x and the noise of every step."""

    def __init__(self, *args, **kwargs):
        self.drawn = []
        super().__init__(*args, **kwargs)

    def step(self, batch, images=None):
        before = torch.full((), self.count, dtype=torch.int32, device=self.device)  # not a copy
        bits = self.split.noise(len(batch), self._keys[0], before)
        x = self.split.sampled(self.split.raw.index_select(0, batch), bits)
        self.drawn.append((x, self.prepare(batch).plan.drawn(self._keys[1], before)))
        return super().step(batch, images)


CASES = {
    "adam": {},
    "adamw, decay": {"name": "adamw", "weight_decay": 0.1},
    "adam, decay and clipping": {"weight_decay": 0.1, "clip_norm": 0.5},
    "adamax": {"name": "adamax"},
    "shampoo": {"name": "shampoo"},
    "shampoo, decay and clipping": {"name": "shampoo", "weight_decay": 0.1, "clip_norm": 0.5},
    "other betas": {"betas": (0.99, 0.95), "eps": 1e-4},
}


def both_ways(
    mode, objective_name, options, likelihood="bernoulli", device="cpu", make=tiny_config, lr=1e-2
):
    config = make(
        objective=objective_name,
        likelihood=likelihood,
        num_particles=3 if objective_name in ("iwae", "dreg") else 1,
    )
    data = tiny_data(config)
    ours, theirs = (cfg.build(config, data).to(device) for _ in range(2))
    data = data.to(device)
    objective = objectives.REGISTRY[objective_name](config.num_particles)
    optim = WholeModelOptimizer(ours.named_parameters(), **options)
    weighted = objective_name in ("elbo", "mean-field")
    weight = KLWeight().to(torch.device(device))
    model, guide = objectives.with_handlers(ours.model, ours.guide, objective, weight=weight)
    average = {n: t.clone() for n, t in ours.state_dict().items()}
    svi = Recorder(
        model,
        guide,
        optim,
        objective,
        module=ours,
        split=data.train,
        weight=weight,
        average=(average, 0.9),
        mode=mode,
    )
    stream = torch.Generator().manual_seed(0)
    sizes = [7] * 9 + [4] + [7] * 10  # one ragged batch
    batches = [torch.randint(0, len(data.train), (n,), generator=stream) for n in sizes]
    batches = [index.to(device) for index in batches]
    rows = [(lr * (1 - i / 40), min(1.0, i / 10) if weighted else 1.0) for i in range(20)]
    for index in (batches[0], batches[9]):
        optim.begin(1.0, 7)
        svi.prepare(index)
    losses = []
    before = torch.get_rng_state()
    for index, (lr, kl) in zip(batches, rows, strict=True):
        optim.begin(lr, len(index))
        weight.set(kl)
        losses.append(float(svi.step(index)))
    svi.check()
    assert torch.equal(before, torch.get_rng_state())  # whose noise is its own
    other = WholeModelOptimizer(theirs.named_parameters(), **options)
    expected = reference_steps(theirs, objective, other, svi.drawn, rows)
    return svi, losses, expected, ours, theirs, optim, other, average


def assert_agree(svi, losses, expected, ours, theirs, optim, other, average):
    assert losses == pytest.approx(expected, rel=1e-4)
    assert float(svi.total) == pytest.approx(sum(expected), rel=1e-5)
    svi.save()
    ema = {n: p.detach().clone() for n, p in average.items()}
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5), name
        assert not torch.equal(ema[name], a), name
        for key, value in optim.optimizer.state[a].items():
            # An inverse root enlarges what rounding did to the second moment that it is made of.
            near = 1e-2 * value.abs().max() if key == "root" else 1e-6
            expected = other.optimizer.state[b][key]
            assert torch.allclose(value, expected, rtol=1e-3, atol=float(near)), key


@pytest.mark.parametrize("objective", objectives.REGISTRY)
def test_parameters_agree_after_20_steps_of_every_objective(objective):
    assert_agree(*both_ways("traced", objective, {}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_agree_after_20_steps_of_every_optimiser(case):
    assert_agree(*both_ways("traced", "elbo", CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "posterior"), sorted({(prior, posterior) for _, prior, posterior, _ in GRID})
)
def test_parameters_agree_after_20_steps_of_every_prior_and_posterior(prior, posterior):
    """By small steps: at ten times the rate a flow's loss explodes, and rounding with it."""

    def make(**changes):
        return tiny_config(**settings("bernoulli", prior, posterior, "elbo") | changes)

    assert_agree(*both_ways("traced", "elbo", {}, make=make, lr=1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", cfg.NAMES["likelihood"])
def test_parameters_agree_after_20_steps_of_every_likelihood(likelihood):
    def make(**changes):
        pair = settings(likelihood, "standard-normal", "mean-field", "elbo")
        return tiny_config(**pair | changes)

    assert_agree(*both_ways("traced", "elbo", {}, likelihood, make=make, lr=1e-3))


def test_dequantised_batches_agree_too():
    assert_agree(*both_ways("traced", "elbo", {}, likelihood="logit-normal"))


@pytest.mark.parametrize(
    "mode",
    [
        "traced",
        pytest.param(
            "compiled",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not compiling.has_compiler(), reason="needs a compiler"),
            ],
        ),
    ],
)
def test_parameters_of_a_hierarchy_agree_after_20_steps(mode):
    assert_agree(*both_ways(mode, "elbo", {"clip_norm": 5.0}, make=tiny_hierarchy))


@needs_compiler
def test_the_compiled_step_agrees_and_is_compiled_once(monkeypatch, inductor):
    made = []
    once = inductor.compile_fx

    def counted(*args, **options):
        made.extend([0] if options.get("config_patches") else [])  # which it calls itself without
        return once(*args, **options)

    monkeypatch.setattr(inductor, "compile_fx", counted)
    svi, *rest = both_ways("compiled", "elbo", {"clip_norm": 5.0})
    assert_agree(svi, *rest)
    assert len(made) == 1  # learning rate and KL weight changed at each of the 20 steps
    first, ragged = svi._steps.values()
    assert first.refusal == "" and first._recording is not None and ragged._recording is None


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cuda-graph", "compiled", "traced"])
@pytest.mark.parametrize("objective", objectives.REGISTRY)
def test_parameters_agree_after_20_steps_on_a_gpu(objective, mode):
    assert_agree(*both_ways(mode, objective, {"clip_norm": 5.0}, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_optimiser_is_captured(case):
    assert_agree(*both_ways("cuda-graph", "elbo", CASES[case], device="cuda"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_captured_step_reads_nothing_back():
    """A step that waited for the device would raise under CUDA's own watch."""
    svi, *_ = both_ways("cuda-graph", "elbo", {}, device="cuda")
    index = torch.arange(7, device="cuda")
    svi.step(index)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            svi.step(index)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(
    ("mode", "device"),
    [
        ("traced", "cpu"),
        pytest.param("compiled", "cuda", marks=pytest.mark.gpu),
        pytest.param("cuda-graph", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_steps_that_nobody_waits_for_have_their_own_rates(mode, device):
    """Python writes the next step's numbers where it wrote the last one's, and may be far ahead."""
    ends = []
    for waits in (True, False):
        vae, data = tiny_vae()
        optim = WholeModelOptimizer(vae.to(device).named_parameters())
        svi = traced_svi(vae, optim, mode, split=data.train)
        for size in (8, 5):
            svi.prepare(torch.arange(size, device=device))
        for i in range(60 if device == "cpu" else 300):
            size = 8 if i % 3 else 5
            optim.begin(0.01 if i % 2 else 0.0, size)
            before = [p.detach().clone() for p in vae.parameters()] if waits else []
            svi.step(torch.arange(size, device=device))
            for p, old in zip(vae.parameters(), before, strict=waits):
                assert torch.equal(p, old) == (i % 2 == 0)  # a rate of 0 moves nothing
        svi.check()
        ends.append([p.detach().clone() for p in vae.parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_steps_of_an_epoch_read_nothing_back(monkeypatch):
    """`fit` as a whole: batches are indices that lie on the device already."""
    step = Loop.step

    def watched(self, index):
        if self.state.step < 2:  # the first builds, the second is the ragged batch's
            return step(self, index)
        before = torch.cuda.get_sync_debug_mode()
        try:
            torch.cuda.set_sync_debug_mode("error")
            return step(self, index)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    monkeypatch.setattr(Loop, "step", watched)
    vae, data = tiny_vae()
    options = {"batch_size": 16, "device": "cuda", "engine": "cuda-graph", "progress": False}
    assert len(fit(vae, data, epochs=3, **options).metrics) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_fit_on_a_gpu_resumes_exactly(tmp_path, precision):
    options = {"batch_size": 8, "device": "cuda", "precision": precision, "progress": False}
    whole, data = tiny_vae()
    lines = []
    fit(whole, data, epochs=4, run=tmp_path / "whole", say=lines.append, **options)
    assert lines == ["cuda-graph: a CUDA device"]
    parts, _ = tiny_vae()
    fit(parts, data, epochs=2, run=tmp_path / "parts", **options)
    again, _ = tiny_vae()
    fit(again, data, epochs=4, run=tmp_path / "parts", resume=True, **options)
    for name, t in whole.state_dict().items():
        assert torch.allclose(t, again.state_dict()[name], atol=1e-6), name


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-4), ("tf32", 5e-3), ("bf16", 2e-2)])
def test_an_evaluation_on_a_gpu_gives_the_numbers_of_its_eager_programs(precision, within):
    vae, data = tiny_vae()
    options = {"device": "cuda", "precision": precision}
    a = evaluate(vae, data.test, 100, engine="eager", **options)
    b = evaluate(vae, data.test, 100, engine="compiled", **options)
    for name in ("log_likelihood", "elbo", "rate", "distortion"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=within), name
    assert (a.precision_shift is None) == (precision == "fp32")
    if precision != "fp32":
        assert abs(a.precision_shift.mean) < 0.05
        # Of so small products, cuBLAS may have none that rounds to tf32.
        assert precision == "tf32" or a.precision_shift.mean != 0


def test_the_moving_average_is_that_of_the_steps():
    svi, *_ = both_ways("traced", "elbo", {})
    assert svi.decay == 0.9
    config = tiny_config()
    data = tiny_data(config)
    vae = cfg.build(config, data)
    average = {n: t.clone() for n, t in vae.state_dict().items()}
    truth = {n: t.clone() for n, t in average.items()}
    optim = WholeModelOptimizer(vae.named_parameters())
    svi = traced_svi(vae, optim, split=data.train, average=(average, 0.9))
    for step in range(1, 6):
        svi.step(torch.arange(8))
        decay = (1 + step) / (10 + step)  # far from 0.9 yet
        for name, t in vae.state_dict().items():
            truth[name] = decay * truth[name] + (1 - decay) * t
    for name, t in truth.items():
        assert torch.allclose(average[name], t, atol=1e-6), name


# What must not be traced


def normal_model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(draw):
    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x), dim=-1):
            draw(slope, x)

    return guide


def svi_for(model, guide, x, objective=None, **options):
    guide(x)
    optim = WholeModelOptimizer(pyro.get_param_store().named_parameters())
    objective = objective or objectives.elbo()
    return CompiledSVI(model, guide, optim, objective, mode="traced", **options)


def discrete(slope, x):
    pyro.sample("z", dist.Poisson(slope.exp().expand(x.shape)))


def branching(slope, x):
    scale = 0.5 if slope * x.sum() > 0 else 0.7
    pyro.sample("z", dist.Normal(slope * x, scale))


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, slope, x):
        self.calls += 1
        pyro.sample("z", dist.Normal(slope * x, 1.0 + self.calls))


def with_dropout(slope, x):
    pyro.sample("z", dist.Normal(nn.functional.dropout(slope * x, 0.5, True), 1.0))


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (discrete, "no reparameterised draw"),
        (branching, "tensor's value"),
        (Counting(), "differs from Pyro's"),
    ],
    ids=["discrete", "data-dependent branch", "state of its own"],
)
def test_what_cannot_be_traced_is_refused(draw, reason):
    x = torch.linspace(-1, 1, 6)
    svi = svi_for(normal_model, guide_of(draw), x)
    before = pyro.param("slope").clone()
    with pytest.raises(NotTraceableError, match=reason):
        svi.step(x)
    assert torch.equal(pyro.param("slope"), before)


def test_a_compiler_that_fails_is_refused_and_changes_nothing(monkeypatch, inductor):
    def broken(graph, example, **options):
        raise RuntimeError("no such header")

    monkeypatch.setattr(inductor, "compile_fx", broken)
    vae, data = tiny_vae()
    with pytest.raises(NotTraceableError, match="compilation failed: no such header"):
        fit(vae, data, epochs=1, engine="compiled", progress=False)
    monkeypatch.setattr(engines, "choose", lambda *args: ("compiled", "for this test"))
    lines = []
    fit(vae, data, epochs=1, say=lines.append, progress=False)
    assert lines == ["svi: the compilation failed: no such header"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("what", ["step", "terms"])
@pytest.mark.parametrize("fails", ["to compile", "to be right"])
def test_another_way_to_compile_is_tried_where_the_first_fails(monkeypatch, inductor, what, fails):
    asked = []
    compile_fx = inductor.compile_fx

    def spy(graph, example, config_patches=None, **options):
        if config_patches is not None:
            asked.append(config_patches)
        run = compile_fx(graph, example, config_patches=config_patches, **options)
        if config_patches and "combo_kernels" in config_patches:
            if fails == "to compile":
                raise RuntimeError("not with these kernels")
            return lambda *inputs: spoilt(run(*inputs))
        return run

    def spoilt(results):
        return [results[0] * 1.01, *results[1:]] if isinstance(results, tuple) else results * 1.01

    monkeypatch.setattr(inductor, "compile_fx", spy)
    monkeypatch.setattr(compiling, "_FOR_CPU", compiling._FOR_GPU)
    vae, data = tiny_vae()
    if what == "step":
        optim = WholeModelOptimizer(vae.named_parameters())
        svi = traced_svi(vae, optim, "compiled", split=data.train)
        svi.prepare(torch.arange(6))
        assert svi.uncompiled == ""
    else:
        x = data.test.tensor()[:4]
        CompiledTerms(vae.model, vae.guide, vae, x, 5)
    assert asked == [compiling._ALWAYS | {"combo_kernels": True}, compiling._ALWAYS]


def test_a_compiler_that_errs_is_refused(monkeypatch, inductor):
    monkeypatch.setattr(
        inductor, "compile_fx", lambda graph, *_, **__: lambda *args: graph(*args) * 1.01
    )
    vae, data = tiny_vae()
    with pytest.raises(NotTraceableError, match="compiled step differs from the traced one's"):
        fit(vae, data, epochs=1, engine="compiled", progress=False)


def test_a_subsample_inside_the_program_is_refused():
    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x), subsample_size=2, dim=-1) as index:
            pyro.sample("z", dist.Normal(slope * x[index], 1.0))

    x = torch.linspace(-1, 1, 6)
    with pytest.raises(NotTraceableError, match="subsample"):
        svi_for(normal_model, guide, x).step(x)


def test_an_unknown_objective_is_refused():
    x = torch.linspace(-1, 1, 6)
    with pytest.raises(NotTraceableError, match="TraceGraph_ELBO"):
        svi_for(normal_model, guide_of(discrete), x, TraceGraph_ELBO())


def test_draws_inside_the_graph_are_drawn_anew():
    """Dropout agrees with Pyro for the same random stream, and is not frozen."""
    x = torch.linspace(-1, 1, 200)
    svi = svi_for(normal_model, guide_of(with_dropout), x)
    svi.optim.begin(0.0, 200)
    losses = {float(svi.step(x)) for _ in range(4)}
    assert len(losses) == 4


OBJECTIVES = [
    lambda: Trace_ELBO(num_particles=3),  # particles in a loop, not in a plate
    lambda: TraceMeanField_ELBO(num_particles=2),
    lambda: RenyiELBO(alpha=0.5, num_particles=3),
    lambda: RenyiELBO(alpha=0.0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
]


@pytest.mark.parametrize("make", OBJECTIVES)
def test_programs_without_a_module_train_parameters_of_the_store(make):
    """Constraints included: scale is positive, and the store keeps its logarithm."""

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.1))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(slope * x, scale))

    x = 2 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    svi = svi_for(normal_model, guide, x, make())
    svi.optim.begin(0.05, 128)
    for _ in range(150):
        svi.step(x)
    svi.check()
    assert float(pyro.param("slope").detach()) == pytest.approx(0.5, abs=0.05)
    assert float(pyro.param("scale").detach()) == pytest.approx(math.sqrt(0.5), abs=0.06)


def test_a_parameter_that_nobody_knows_is_refused():
    stray = nn.Parameter(torch.zeros(2))
    optim = WholeModelOptimizer([("stray", stray)])
    with pytest.raises(InputError, match="'stray' is in neither"):
        CompiledSVI(normal_model, normal_model, optim, objectives.elbo(), mode="traced")


# Steps that wait for each other


def compiled_svi(**options):
    """Programs of one parameter, compiled for batches of 8."""
    pyro.clear_param_store()
    x = torch.linspace(-2, 2, 8)
    guide = guide_of(lambda slope, x: pyro.sample("z", dist.Normal(slope * x, 0.7)))
    guide(x)
    optim = WholeModelOptimizer(pyro.get_param_store().named_parameters(), **options)
    optim.begin(0.01, 8)
    svi = CompiledSVI(normal_model, guide, optim, objectives.elbo(), mode="compiled")
    svi.prepare(x)
    return svi, optim, pyro.param("slope")


@needs_compiler
@pytest.mark.slow
def test_steps_of_the_queue_are_steps(monkeypatch):
    """Each with its own x and rate, some of another size, and whoever looks finds them done."""
    monkeypatch.setattr(acceleration, "_PATIENCE", 1e6)
    sizes = [8] * 20 + [5] + [8] * 10 + [5] + [8] * 39
    xs = [torch.randn(n, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(sizes)]
    ends = []
    for queued in (False, True):
        svi, optim, slope = compiled_svi()
        assert svi.prepare(xs[0])._recording is not None
        waited = []
        for i, x in enumerate(xs):
            optim.begin(0.01 * (1 + i % 3), len(x))
            if i == 40:
                svi.prepare(torch.zeros(3))
            before, count = slope.detach().clone(), svi.count
            if not queued:
                svi.step(x)
                continue
            svi.queue(x)
            waited.append(len(svi._queue))
            assert torch.equal(slope, before) == (svi.count == count)
        svi.save() if queued else svi.check()
        assert svi.count == int(svi._health[0]) == len(xs)
        ends.append((slope.detach().clone(), svi.total.clone()))
        svi.check()
    assert max(waited) == 31 and waited[18:23] == [18, 19, 0, 1, 2]
    (slope, total), (other, sum_of_others) = ends
    assert torch.equal(slope, other) and torch.equal(total, sum_of_others)


@needs_compiler
def test_a_step_comes_after_those_that_wait(monkeypatch):
    monkeypatch.setattr(acceleration, "_PATIENCE", 1e6)
    xs = [torch.full((8,), float(i)) for i in range(6)]
    ends = []
    for method in ("step", "queue"):
        svi, _, slope = compiled_svi()
        for x in xs[:5]:
            getattr(svi, method)(x)
        ends.append((float(svi.step(xs[5])), slope.item(), svi.count))
    assert ends[0] == ends[1]


@needs_compiler
def test_a_step_that_fails_in_the_queue_is_found(monkeypatch):
    monkeypatch.setattr(acceleration, "_PATIENCE", 1e6)
    svi, _, slope = compiled_svi()
    xs = [torch.randn(8) for _ in range(9)]
    xs[6][2] = math.nan
    for x in xs[:6]:
        svi.queue(x)
    svi.flush()
    good = slope.detach().clone()
    for x in xs[6:]:
        svi.queue(x)
    with pytest.raises(FloatingPointError, match="step 7"):
        svi.check()
    number, x, _ = svi.failed()
    assert number == 7 and x is xs[6]
    assert torch.equal(slope, good)


@needs_compiler
@pytest.mark.parametrize(("patience", "options"), [(0.0, {}), (1e6, {"name": "shampoo"})])
def test_nobody_waits_where_steps_are_long_or_something_is_between_them(
    monkeypatch, patience, options
):
    monkeypatch.setattr(acceleration, "_PATIENCE", patience)
    svi, _, slope = compiled_svi(**options)
    assert svi.prepare(torch.zeros(8))._recording is not None
    for _ in range(3):
        before = slope.detach().clone()
        svi.queue(torch.randn(8))
        assert not torch.equal(slope, before)


@needs_compiler
def test_a_recording_that_errs_is_given_up(monkeypatch):
    play = Recording.play
    monkeypatch.setattr(Recording, "play", lambda self, runs: play(self, runs) * 1.01)
    svi, _, slope = compiled_svi()
    assert svi.prepare(torch.zeros(8))._recording is None
    assert slope.item() == pytest.approx(0.3) and int(svi._health[0]) == 0
    svi.queue(torch.ones(8))
    assert svi.count == int(svi._health[0]) == 1


@needs_compiler
def test_a_recording_that_cannot_be_played_is_given_up(monkeypatch):
    def broken(self, runs):
        raise RuntimeError("call 1 of a recorded function failed")

    monkeypatch.setattr(Recording, "play", broken)
    svi, _, _ = compiled_svi()
    assert svi.prepare(torch.zeros(8)).refusal == "call 1 of a recorded function failed"
    svi.step(torch.ones(8))
    svi.check()


@needs_compiler
def test_a_recording_is_given_up_where_memory_moved():
    svi, _, slope = compiled_svi()
    slope.data.share_memory_()
    for _ in range(3):
        before = slope.detach().clone()
        svi.queue(torch.randn(8))
        assert not torch.equal(slope, before)
    step = svi.prepare(torch.zeros(8))
    assert step._recording is None and step.refusal == "a tensor was moved in memory"
    assert svi.count == int(svi._health[0]) == 3


@needs_compiler
def test_a_gradient_through_weights_that_have_moved_on_is_refused():
    """As after any step of torch's own."""
    svi, _, slope = compiled_svi()
    square = slope * slope
    svi.queue(torch.ones(8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_a_loaded_state_has_no_steps_waiting():
    vae, data = tiny_vae()
    svi = traced_svi(vae, WholeModelOptimizer(vae.named_parameters()), split=data.train)
    svi.prepare(torch.arange(4)).room = 9
    svi.queue(torch.arange(4))
    svi.bind()
    svi.check()
    assert svi.count == int(svi._health[0]) == 0


@pytest.mark.parametrize("other", [torch.zeros(4, 2), torch.zeros(4, dtype=torch.int32)])
def test_batches_of_a_size_are_alike(other):
    vae, data = tiny_vae()
    svi = traced_svi(vae, WholeModelOptimizer(vae.named_parameters()), split=data.train)
    svi.step(torch.arange(4))
    with pytest.raises(InputError, match=r"expected each batch of 4 to be torch.int64 \(4,\) on"):
        svi.step(other)
    svi.check()
    assert svi.count == 1


@pytest.mark.slow
@needs_compiler
def test_steps_of_two_threads_are_played_as_they_are_called():
    """With products in halves; both on the same noise, from the same weights."""
    torch.set_num_threads(2)
    try:
        ends = []
        for recorded in (True, False):
            config = tiny_config(hidden=(128, 128))
            data = tiny_data(config, n=100)
            vae = cfg.build(config, data)
            optim = WholeModelOptimizer(vae.named_parameters())
            svi = traced_svi(vae, optim, "compiled", split=data.train)
            step = svi.prepare(torch.arange(32))
            assert step._recording is not None, step.refusal
            if not recorded:
                step._recording = None
            for i in range(40):
                optim.begin(1e-3, 32)
                svi.queue(torch.arange(32) + i)
            svi.check()
            ends.append([*vae.state_dict().values(), svi.total])
        for a, b in zip(*ends, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(1)


@needs_compiler
def test_a_recording_is_played_in_fp32_whatever_the_switch_says(monkeypatch):
    svi, _, _ = compiled_svi()
    play, seen = Recording.play, []
    monkeypatch.setattr(
        Recording,
        "play",
        lambda *args: seen.append(torch.get_float32_matmul_precision()) or play(*args),
    )
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        svi.queue(torch.ones(8))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]


# Failures and resuming


def test_a_step_that_fails_changes_nothing_and_is_found_again():
    config = tiny_config(binarize="none", likelihood="gaussian")
    data = tiny_data(config)
    vae = cfg.build(config, data)
    optim = WholeModelOptimizer(vae.named_parameters())
    optim.begin(1e-3, 8)
    svi = traced_svi(vae, optim)
    xs = [data.train.batch(torch.arange(8), torch.Generator().manual_seed(i)) for i in range(6)]
    xs[3][2] = math.nan
    for x in xs[:3]:
        svi.step(x)
    good = copy.deepcopy(vae.state_dict())
    for x in xs[3:]:
        svi.step(x)
    with pytest.raises(FloatingPointError, match="step 4"):
        svi.check()
    number, x, draws = svi.failed()
    assert number == 4 and torch.equal(x.isnan(), xs[3].isnan())
    for name, t in vae.state_dict().items():
        assert torch.equal(t, good[name]), name
    with draws:
        trace = poutine.trace(vae.guide).get_trace(x)
    assert trace.nodes["z"]["value"].isnan().any(-1).tolist() == [i == 2 for i in range(8)]


@pytest.mark.parametrize("size", [7, 4])
def test_a_failed_step_is_met_again_with_its_x_and_its_noise(size):
    """After steps that were found fine, in batches of two sizes, sampled within the graph."""
    vae, data = tiny_vae()
    optim = WholeModelOptimizer(vae.named_parameters())
    elbo = objectives.elbo()
    svi = Recorder(
        vae.model, vae.guide, optim, elbo, module=vae, split=data.train, mode="traced", seed=5
    )
    for n in (7, 4, 7):
        svi.step(torch.arange(n))
    svi.check()
    svi.step(torch.arange(11 - size))
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] = math.nan
    for n in (size, 11 - size):
        svi.step(torch.arange(2, 2 + n))
    with pytest.raises(FloatingPointError, match="step 5"):
        svi.check()
    number, x, draws = svi.failed()
    expected_x, expected_noise = svi.drawn[4]
    assert number == 5 and torch.equal(x, expected_x)
    assert list(draws.noise) == list(expected_noise) == ["z/1"]
    assert torch.equal(draws.noise["z/1"], expected_noise["z/1"])
    assert not torch.equal(expected_noise["z/1"], svi.drawn[3][1]["z/1"][:1].expand(size, -1))


def test_every_seed_has_streams_of_its_own_for_x_and_for_z():
    """Two seeds that differ above 32 bits too; the noise of the first step is compared itself."""
    keys, losses = [], []
    for seed in (0, 1, 2**40, 0):
        vae, data = tiny_vae()
        optim = WholeModelOptimizer(vae.named_parameters())
        svi = traced_svi(vae, optim, split=data.train, seed=seed)
        losses.append(float(svi.step(torch.arange(8))))
        keys.append([tuple(key) for key in svi._keys.tolist()])
    assert len({key for pair in keys for key in pair}) == 6
    assert keys[0] == keys[3] and losses[0] == losses[3]
    assert len(set(losses)) == 3


def test_every_process_has_noise_of_its_own(monkeypatch):
    seeds = []

    class Seen(CompiledSVI):
        def __init__(self, *args, seed, **options):
            seeds.append(seed)
            super().__init__(*args, seed=seed, **options)

    monkeypatch.setattr(training, "CompiledSVI", Seen)
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        vae, data = tiny_vae()
        fit(vae, data, epochs=1, batch_size=8, engine="traced", seed=3, progress=False)
    assert len(set(seeds)) == 2


def test_the_count_of_steps_is_exact_where_the_optimisers_is_not(tmp_path):
    """Its count is in float32, which has no 2^24 + 1; a step's noise follows from its number."""
    vae, data = tiny_vae()
    options = {"batch_size": 8, "engine": "traced", "run": tmp_path, "progress": False}
    fit(vae, data, epochs=1, **options)
    last = tmp_path / "checkpoints/last.pt"
    saved = load_checkpoint(last)
    assert saved["engine"]["count"] == 3
    saved["engine"]["count"] = 2**24 + 1
    for state in saved["optimizer"]["state"].values():
        state["step"].fill_(2**24)
    save_checkpoint(last, saved)
    fit(vae, data, epochs=2, resume=True, **options)
    assert load_checkpoint(last)["engine"]["count"] == 2**24 + 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_another_precision_are_trained(dtype):
    vae, data = tiny_vae(binarize="none", likelihood="gaussian")
    vae.to(dtype)
    optim = WholeModelOptimizer(vae.named_parameters(), "adamax", lr=1e-2)
    svi = traced_svi(vae, optim)
    x = data.train.batch(torch.arange(8)).to(dtype)
    losses = [float(svi.step(x)) for _ in range(10)]
    svi.check()
    assert losses[-1] < losses[0] and all(p.dtype == dtype for p in vae.parameters())


def test_fit_names_the_step_and_the_site():
    vae, data = tiny_vae()
    with torch.no_grad():
        list(vae.decoder.parameters())[-1].fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match=r"step 1 \(epoch 1\).*site 'x' of the model"):
        fit(vae, data, epochs=1, engine="traced", progress=False)


@pytest.mark.parametrize(
    "engine", ["traced", pytest.param("compiled", marks=[pytest.mark.slow, needs_compiler])]
)
@pytest.mark.parametrize("split_at", ["an epoch", "a step"])
def test_resuming_is_exact(tmp_path, split_at, engine):
    options = {"engine": engine, "batch_size": 7, "ema": 0.9, "kl_warmup": 2.0, "seed": 3}
    options |= {"schedule": "cosine", "schedule_epochs": 4, "clip_norm": 0.5, "progress": False}
    whole, data = tiny_vae()
    history = fit(whole, data, epochs=4, run=tmp_path / "whole", **options)
    parts, _ = tiny_vae()
    if split_at == "an epoch":
        fit(parts, data, epochs=2, run=tmp_path / "parts", **options)
    else:
        steps = iter(range(100))
        fit(
            parts,
            data,
            epochs=4,
            run=tmp_path / "parts",
            should_stop=lambda: next(steps) == 4,
            **options,
        )
    again, _ = tiny_vae()
    resumed = fit(again, data, epochs=4, run=tmp_path / "parts", resume=True, **options)
    for name, t in whole.state_dict().items():
        assert torch.equal(t, again.state_dict()[name]), name
    drop = "seconds"
    assert [{k: v for k, v in m.items() if k != drop} for m in history.metrics] == [
        {k: v for k, v in m.items() if k != drop} for m in resumed.metrics
    ]


def test_resuming_takes_up_the_engine_of_the_run(tmp_path):
    vae, data = tiny_vae()
    options = {"run": tmp_path / "run", "progress": False}
    fit(vae, data, epochs=1, engine="traced", **options)
    lines = []
    fit(vae, data, epochs=2, resume=True, say=lines.append, **options)
    assert lines == ["traced: as asked"]
    with pytest.raises(InputError, match="another --engine"):
        fit(vae, data, epochs=3, resume=True, engine="svi", **options)


# The choice of an engine


def test_auto_repays_the_compilation():
    cpu = torch.device("cpu")
    wanted = "compiled" if compiling.has_compiler() else "svi"
    # 784-200-200-50 at batch 128, and conv64 with a mixture, whose steps take fifty times as long.
    small, large = 626_000, 18_300_000
    assert choose("auto", cpu, 1_000, small)[0] == "svi"
    assert choose("auto", cpu, 10_000, small)[0] == wanted
    assert choose("auto", cpu, 1_000, large)[0] == wanted
    assert choose("auto", torch.device("cuda"), 1, small)[0] == "cuda-graph"
    assert choose("svi", torch.device("cuda"), 1, large)[0] == "svi"


def test_auto_counts_what_a_step_passes_over(monkeypatch):
    seen = []

    def choose(engine, device, steps, numbers):
        seen.append((engine, steps, numbers))
        return "svi", "for this test"

    monkeypatch.setattr(engines, "choose", choose)
    vae, data = tiny_vae(likelihood="discretized-logistic", binarize="none")
    weights = sum(p.numel() for p in vae.parameters())
    three = {"objective": objectives.elbo(3), "progress": False}
    fit(vae, data, epochs=2, batch_size=8, engine="auto", **three)
    # 24 images of 16 pixels, three draws each, and of each pixel a location and a scale.
    assert seen == [("auto", 6, weights + 8 * 3 * (16 + 2 * 16))]


def test_auto_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    cpu = torch.device("cpu")
    engine, why = choose("auto", cpu, 100_000, 10**6)
    assert engine == "svi" and "compiler" in why
    with pytest.raises(InputError, match=r"--engine compiled needs a C\+\+ compiler"):
        choose("compiled", cpu, 1, 1)


def test_unknown_engines_are_refused():
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="--engine expects one of"):
        choose("jit", cpu, 1, 1)
    with pytest.raises(InputError, match="cuda-graph needs a CUDA device"):
        choose("cuda-graph", cpu, 1, 1)


def test_auto_falls_back_on_svi_with_the_reason(monkeypatch):
    monkeypatch.setattr(engines, "REPAID_AFTER", 1)
    vae, data = tiny_vae()
    inner = vae.decoder.forward
    vae.decoder.forward = lambda z: inner(z) if z.sum() < 1e9 else inner(-z)
    lines = []
    fit(vae, data, epochs=1, say=lines.append, progress=False)
    if compiling.has_compiler():
        assert lines[0].startswith("svi: the programs ask for a tensor's value")
        assert "\n" not in lines[0]
    with pytest.raises(NotTraceableError, match="tensor's value"):
        fit(vae, data, epochs=1, engine="traced", progress=False)


class Switched(nn.Module):
    """Programs whose latent is 0 or 1: no draw of it has a gradient."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def model(self, x):
        pyro.module("switched", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(self.slope * z, 1.0), obs=x[:, 0])

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(torch.sigmoid(x[:, 0])))


def test_the_reason_is_one_line_whatever_pyro_adds_to_it(monkeypatch):
    """An error in a program gets Pyro's table of shapes."""
    monkeypatch.setattr(engines, "choose", lambda *args: ("traced", "for this test"))
    lines, programs = [], Switched()
    splits = fixed(torch.linspace(-1, 1, 12)[:, None])
    fit(programs, splits, epochs=2, say=lines.append, progress=False)
    assert lines == [
        "svi: site 'z' has no reparameterised draw (Bernoulli): its gradient needs the score "
        "function"
    ]
    assert float(programs.slope.detach()) != 0.3  # it was trained


@pytest.mark.gpu
def test_data_that_lie_on_a_gpu_are_trained_on_there():
    ends = []
    for device in ("cpu", "cuda"):
        vae, splits = tiny_vae()
        options = {"device": "cuda", "engine": "cuda-graph", "progress": False}
        fit(vae, splits.to(device), epochs=2, **options)
        ends.append([p.detach().clone() for p in vae.parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# Precision


def test_bf16_moves_the_elbo_by_less_than_a_twentieth_of_a_nat():
    vae, data = tiny_vae(hidden=(32,), latent_dim=2)
    fit(vae, data, epochs=100, lr=1e-2, batch_size=8, progress=False)
    x = data.test.tensor().repeat(200, 1, 1, 1)

    def elbo():
        torch.manual_seed(0)
        with torch.no_grad():
            return -objectives.elbo().loss(vae.model, vae.guide, x) / len(x)

    exact = elbo()
    with networks_in(vae, "bf16"):
        rounded = elbo()
    assert 0 < abs(rounded - exact) < 0.05
    assert elbo() == exact  # nothing is left behind


def test_tf32_is_put_back():
    before = torch.get_float32_matmul_precision()
    with networks_in(None, "tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_a_compiled_step_runs_its_products_in_tf32(monkeypatch):
    """The switch must be on while the graph runs, not only while it is traced."""
    vae, data = tiny_vae()
    optim = WholeModelOptimizer(vae.named_parameters())
    svi = traced_svi(vae, optim, split=data.train, precision="tf32")
    step, seen = svi.prepare(torch.arange(4)), []
    call = step._call
    step._call = lambda *args: seen.append(torch.get_float32_matmul_precision()) or call(*args)
    svi.step(torch.arange(4))
    assert seen == ["high"]


def test_a_step_in_fp32_is_that_whatever_the_switch_says():
    """The switch is asked, not taken for granted, and put back as it was."""
    vae, data = tiny_vae()
    optim = WholeModelOptimizer(vae.named_parameters())
    svi = traced_svi(vae, optim, split=data.train)
    step, seen = svi.prepare(torch.arange(4)), []
    call = step._call
    step._call = lambda *args: seen.append(torch.get_float32_matmul_precision()) or call(*args)
    before = torch.get_float32_matmul_precision()
    try:
        for outside in ("highest", "medium"):
            torch.set_float32_matmul_precision(outside)
            svi.step(torch.arange(4))
            assert torch.get_float32_matmul_precision() == outside
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest", "highest"]


def test_bf16_leaves_no_trace_on_the_layers():
    vae, _ = tiny_vae()
    with networks_in(vae, "bf16"), networks_in(vae, "bf16"):
        pass
    assert all("forward" not in vars(m) for m in vae.modules())


def test_bf16_serves_layers_with_further_arguments():
    up = nn.ConvTranspose2d(2, 3, 3, stride=2)
    x = torch.randn(1, 2, 4, 4)
    exact = up(x, output_size=[10, 10])
    with networks_in(up, "bf16"):
        rounded = up(x, output_size=[10, 10])
    assert rounded.shape == exact.shape == (1, 3, 10, 10)
    assert 0 < (rounded - exact).abs().max() < 0.05


@pytest.mark.parametrize("inner", ["fp32", "tf32", "bf16"])
def test_the_inner_precision_counts(inner):
    layer, x = nn.Linear(30, 20), torch.randn(5, 30)
    with networks_in(layer, inner):
        expected = layer(x)
    with networks_in(layer, "bf16"):
        rounded = layer(x)
        with networks_in(layer, inner):
            assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), rounded)
    assert torch.equal(rounded, expected) == (inner == "bf16")
    assert "forward" not in vars(layer)


def test_unknown_precisions_are_refused():
    with pytest.raises(InputError, match="--precision expects one of"), networks_in(None, "fp8"):
        pass


def test_bf16_trains():
    vae, data = tiny_vae()
    before = {n: t.clone() for n, t in vae.state_dict().items()}
    fit(vae, data, epochs=1, engine="traced", precision="bf16", progress=False)
    assert all(not torch.equal(p, before[n]) for n, p in vae.named_parameters())
    assert all(p.dtype == torch.float32 for p in vae.parameters())


# Batches drawn from integers


def test_bits_binarise_with_the_levels_probabilities():
    from pyrovae import data

    raw = torch.arange(256, dtype=torch.uint8).repeat(8, 1)
    split = data.from_array(raw, binarize="dynamic", valid_size=1, test_size=1).train
    key = counters.key_of(0)
    count = 3000
    total = torch.zeros(256)
    for step in torch.arange(count, dtype=torch.int32):
        total += split.sampled(split.raw, split.noise(len(split), key, step)).sum(0)
    n = count * len(split)
    p = split.raw[0].double() / 255
    assert total[0] == 0 and total[255] == n
    z = (total / n - p) / (p * (1 - p) / n).sqrt()
    assert float(z[1:-1].abs().max()) < 5
    assert float(z[1:-1].square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / 254))


def test_the_largest_integer_leaves_a_white_pixel_white():
    split = tiny_vae()[1].train
    raw = torch.full((1, *split.x_shape), split.levels, dtype=torch.uint8)
    for extreme in (2**15 - 1, -(2**15)):
        noise = torch.full((1, *split.x_shape), extreme, dtype=torch.int32)
        assert bool((split.sampled(raw, noise) == 1).all())
        assert bool((split.sampled(0 * raw, noise) == 0).all())


def test_bits_dequantise_within_the_level():
    from pyrovae import data

    raw = torch.arange(256, dtype=torch.uint8).repeat(6, 1)
    split = data.from_array(raw, dequantize="uniform", valid_size=1, test_size=1).train
    key, steps = counters.key_of(0), torch.arange(500, dtype=torch.int32)
    ys = torch.stack(
        [split.sampled(split.raw, split.noise(len(split), key, step)) for step in steps]
    )
    assert torch.equal((ys * 256).floor(), split.raw.float().expand_as(ys))
    u = (ys * 256 - split.raw).flatten().double()
    n = len(u)
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(float((u**2).mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


# The evaluator


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["mean-field", "full-rank", "flow", "bottom-up", "top-down"])
def test_compiled_terms_are_those_of_the_programs(kind, compiled):
    vamp = {"prior": "vamp", "prior_args": {"components": 3}}
    if kind == "bottom-up":
        config = tiny_hierarchy(kind)
    elif kind == "top-down":
        config = tiny_hierarchy(kind, **vamp)
    else:
        config = tiny_config(posterior=kind, **vamp)
    data = tiny_data(config)
    vae = cfg.build(config, data)
    x = data.test.tensor()
    kernel = CompiledTerms(vae.model, vae.guide, vae, x, 7, compile_it=compiled)
    with torch.no_grad():  # weights are read anew, not remembered
        for p in vae.parameters():
            p.add_(0.1)
    options = {"chunk": 7, "seed": 3, "first_image": 5}
    ours = list(chunks(vae.model, vae.guide, x, 17, kernel=kernel, **options))
    theirs = list(chunks(vae.model, vae.guide, x, 17, **options))
    assert [len(t.log_prior) for t in ours] == [7, 7, 3]  # the last is not the kernel's
    for a, b in zip(ours, theirs, strict=True):
        for mine, truth in zip(a[:3], b[:3], strict=True):
            assert torch.allclose(mine, truth, rtol=1e-5, atol=1e-4)
        assert a.latents.keys() == b.latents.keys()
        for site, z in b.latents.items():
            assert torch.allclose(a.latents[site], z, rtol=1e-4, atol=1e-4), site


@needs_compiler
def test_a_compiled_evaluation_gives_the_same_numbers():
    vae, data = tiny_vae()
    a = evaluate(vae, data.test, 100, engine="eager")
    b = evaluate(vae, data.test, 100, engine="compiled")
    for name in ("log_likelihood", "elbo", "rate", "distortion", "ess_median"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-5), name


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[pytest.mark.slow, needs_compiler])]
)
def test_compiled_terms_round_as_the_programs_do(compiled):
    vae, data = tiny_vae(seed=1, hidden=(64,))
    x = data.test.tensor()
    of = CompiledTerms(vae.model, vae.guide, vae, x, 64, compile_it=compiled, precision="bf16")
    exact, ours, theirs = (
        evaluate(vae, data.test, 64, precision=precision, engine=engine).per_image.log_likelihood
        for precision, engine in (("fp32", "eager"), ("bf16", of), ("bf16", "eager"))
    )
    moved = (theirs - exact).abs().max()
    assert moved > 1e-3
    assert (ours - theirs).abs().max() < 0.01 * moved


def test_one_draw_that_is_rounded_otherwise_is_not_another_program():
    """In bf16 the mean counts, not the worst: a program that differs throughout is still seen."""
    zeros = LogTerms(*(torch.zeros(64, 16) for _ in range(3)), {})
    once = zeros.log_likelihood.clone()
    once[3, 5] = 0.2
    rare = zeros._replace(log_likelihood=once)
    compiled_terms._compare_terms(rare, zeros, rounded=True)
    with pytest.raises(NotTraceableError, match="differs from Pyro's"):
        compiled_terms._compare_terms(rare, zeros)
    everywhere = zeros._replace(log_prior=zeros.log_prior + 0.01)
    with pytest.raises(NotTraceableError, match="log_prior of the traced programs differs"):
        compiled_terms._compare_terms(everywhere, zeros, rounded=True)


def test_compiled_terms_of_another_precision_are_refused():
    vae, data = tiny_vae()
    x = data.test.tensor()
    for made, asked in (("fp32", "bf16"), ("bf16", "fp32")):
        kernel = CompiledTerms(vae.model, vae.guide, vae, x, 7, compile_it=False, precision=made)
        with pytest.raises(InputError, match=f"made for precision '{asked}'; got one for '{made}'"):
            evaluate(vae, data.test, 7, precision=asked, engine=kernel)


def test_terms_in_tf32_are_computed_with_the_switch_on():
    vae, data = tiny_vae()
    x, seen = data.test.tensor(), []
    kernel = CompiledTerms(vae.model, vae.guide, vae, x, 7, compile_it=False, precision="tf32")

    def watched(run):
        return lambda *args: seen.append(torch.get_float32_matmul_precision()) or run(*args)

    kernel._once, kernel._each = watched(kernel._once), watched(kernel._each)
    kernel.of(x)(Noise(0, range(len(x)), range(7)))
    assert seen == ["high", "high"]


@needs_compiler
def test_the_engine_of_an_evaluation_is_made_in_its_precision(monkeypatch):
    vae, data = tiny_vae()
    made = []
    init = CompiledTerms.__init__

    def spy(self, *args, **options):
        made.append(options["precision"])
        init(self, *args, **options)

    monkeypatch.setattr(CompiledTerms, "__init__", spy)
    monkeypatch.setattr(compiled_terms, "compiled", lambda graph, *_: graph)  # as traced
    evaluate(vae, data.test, 20, engine="compiled", precision="bf16")
    assert made == ["bf16"]


@needs_compiler
def test_images_of_any_layout_are_served_by_the_compiled_terms():
    vae, data = tiny_vae()
    every_second = data.test.tensor()[:8].repeat_interleave(2, 0)[::2]
    assert not every_second.is_contiguous()
    kernel = CompiledTerms(vae.model, vae.guide, vae, every_second, 7)
    (ours,) = chunks(vae.model, vae.guide, every_second, 7, kernel=kernel, chunk=7, seed=3)
    (theirs,) = chunks(vae.model, vae.guide, data.test.tensor()[:8], 7, chunk=7, seed=3)
    assert torch.allclose(ours.log_likelihood, theirs.log_likelihood, rtol=1e-5, atol=1e-4)


@needs_compiler
def test_images_stay_planar_on_a_cpu(monkeypatch, inductor):
    """Inductor would put three channels innermost, of a vector's sixteen lanes."""
    asked = []
    compile_fx = inductor.compile_fx

    def spy(graph, example, config_patches=None, **options):
        asked.extend([config_patches] if config_patches else [])
        return compile_fx(graph, example, config_patches=config_patches, **options)

    monkeypatch.setattr(inductor, "compile_fx", spy)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.rand(2, 3, 8, 8)

    def slope(weight, x):
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        return torch.ops.aten.threshold_backward(y, y, 0.5)

    weight = layer.weight.detach()
    run = compiling.compiled(tracing.trace(slope, weight, x), [weight, x])
    assert [options["layout_optimization"] for options in asked] == [False]
    ours = run(weight, x)
    assert ours.is_contiguous()
    assert torch.allclose(ours, slope(weight, x), atol=1e-5)


def test_an_evaluation_compiles_where_that_is_repaid(monkeypatch):
    vae, data = tiny_vae()
    x = data.test.tensor()
    made = []
    monkeypatch.setattr(
        compiled_terms, "CompiledTerms", lambda *args, **_: made.append(args) or None
    )
    few, many = compiled_terms.REPAID_AFTER_CHUNKS - 1, compiled_terms.REPAID_AFTER_CHUNKS
    for engine, chunks_, expected in (("auto", few, 0), ("auto", many, 1), ("eager", many, 1)):
        compiled_terms.terms_kernel(engine, vae, x, 64, chunks_)
        assert len(made) == expected * compiling.has_compiler()
    compiled_terms.terms_kernel("auto", vae, x, 64, many, Proposal("wide"))
    assert len(made) == compiling.has_compiler()


def test_an_evaluation_refuses_what_it_cannot_compile():
    vae, data = tiny_vae()
    x = data.test.tensor()
    with pytest.raises(InputError, match="--engine expects one of auto, eager, compiled"):
        compiled_terms.terms_kernel("svi", vae, x, 64, 1)
    with pytest.raises(InputError, match="leave --proposal out"):
        compiled_terms.terms_kernel("compiled", vae, x, 64, 1, Proposal("wide"))


def test_a_decoder_that_remembers_is_not_compiled(monkeypatch):
    vae, data = tiny_vae()
    inner, calls = vae.decoder.forward, []
    vae.decoder.forward = lambda z: calls.append(0) or inner(z) + len(calls)
    with pytest.raises(NotTraceableError, match="differs from Pyro's"):
        CompiledTerms(vae.model, vae.guide, vae, data.test.tensor(), 5, compile_it=False)


def test_what_a_step_changes_besides_parameters_is_left_to_svi():
    """Batch normalisation keeps averages, which the graph holds as inputs and would never move."""
    vae, data = tiny_vae()
    decoder = vae.decoder
    vae.decoder.layers = nn.Sequential(
        decoder.layers[0], nn.BatchNorm1d(decoder.layers[0].out_features), *decoder.layers[1:]
    )
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    optim = WholeModelOptimizer(vae.named_parameters())
    svi = traced_svi(vae, optim, split=data.train)
    with pytest.raises(NotTraceableError, match="running_mean, which is no parameter"):
        svi.prepare(torch.arange(6))
    for name, t in vae.state_dict().items():
        assert torch.equal(t, before[name]), name


CHANGES = {
    "a buffer": lambda d: setattr(d, "shift", torch.ones(1)),
    "no buffer": lambda d: setattr(d, "shift", None),
    "a parameter": lambda d: setattr(d.layers[0], "weight", copy.deepcopy(d.layers[0].weight)),
    "its data": lambda d: setattr(d.layers[0].weight, "data", d.layers[0].weight.data.clone()),
    "another name of it": lambda d: setattr(d, "again", copy.deepcopy(d.again)),
    "one more": lambda d: setattr(d, "more", nn.Parameter(torch.zeros(1))),
    "frozen": lambda d: d.layers[0].weight.requires_grad_(False),
    "released": lambda d: d.still.requires_grad_(True),
}


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")  # the frozen one
@pytest.mark.parametrize("what", CHANGES)
def test_a_tensor_that_is_assigned_anew_or_frozen_is_noticed(what):
    vae, data = tiny_vae(likelihood="gaussian")
    vae.decoder.register_buffer("shift", torch.zeros(1))
    inner = vae.decoder.forward
    vae.decoder.forward = lambda z: inner(z) + vae.decoder.shift
    vae.decoder.again = vae.decoder.layers[0].weight
    vae.decoder.still = nn.Parameter(torch.zeros(1), requires_grad=False)
    optim = WholeModelOptimizer(vae.named_parameters())
    svi = traced_svi(vae, optim, split=data.train)
    optim.begin(1e-3, 6)
    svi.step(torch.arange(6))
    vae.decoder.shift.add_(1)  # written into: the next step reads it
    svi.step(torch.arange(6))
    svi.check()
    CHANGES[what](vae.decoder)
    said = r"(shift|weight|again|more) was assigned anew"
    if what in ("frozen", "released"):
        said = f"requires_grad of .* was {what == 'frozen'} .* and is {what != 'frozen'} now"
    with pytest.raises(NotTraceableError, match=said):
        svi.check()


def test_a_parameter_frozen_since_the_optimiser_was_made_is_refused():
    vae, data = tiny_vae()
    optim = WholeModelOptimizer(vae.named_parameters())
    vae.decoder.layers[0].weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"decoder.layers.0.weight' was frozen after"):
        traced_svi(vae, optim, split=data.train)


def test_a_program_that_assigns_a_tensor_is_left_to_svi(monkeypatch):
    """Under "auto": what the traced step would go on with is not what the program has made."""
    vae, data = tiny_vae()
    vae.decoder.register_buffer("calls", torch.zeros(()))
    inner = vae.decoder.forward

    def counted(z):
        vae.decoder.calls = vae.decoder.calls + 1
        return inner(z)

    vae.decoder.forward = counted
    monkeypatch.setattr(engines, "choose", lambda *args: ("traced", "for this test"))
    said = []
    history = fit(vae, data, epochs=2, engine="auto", progress=False, say=said.append)
    assert len(history.metrics) == 2
    assert any("svi" in line and "assigned anew" in line for line in said)


class Tempered(nn.Module):
    """A decoder's logits times what Python, or a tensor, holds."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.number = 1.0
        self.passes_on = True
        self.register_buffer("tensor", torch.ones(()))

    def forward(self, z):
        logits = self.inner(z) * self.number * self.tensor
        return logits if self.passes_on else logits.detach()


CHANGED = {
    "a number": lambda layer: setattr(layer, "number", 1.01),
    "a switch that only the gradient knows": lambda layer: setattr(layer, "passes_on", False),
}


@pytest.mark.parametrize("patience", [None, 1])
def test_what_changes_after_the_last_step_is_nobodys_business(patience):
    """A callback's change that no step has met."""
    vae, data = tiny_vae()
    vae.decoder = layer = Tempered(vae.decoder)

    def callback(metrics):
        CHANGED["a number"](layer)

    options = {"engine": "traced", "progress": False, "callback": callback}
    assert fit(vae, data, epochs=1, patience=patience, **options).stopped == "epochs"


def test_a_look_leaves_gradients_that_are_not_its_own():
    vae, data = tiny_vae()
    vae.eval()  # in which Pyro says nothing of parameters that are constants here
    trained = dict(vae.decoder.named_parameters())
    svi = traced_svi(vae, WholeModelOptimizer(trained.items()), split=data.train)
    others = [p for n, p in vae.named_parameters() if not n.startswith("decoder.")]
    for p in others:
        p.grad = torch.ones_like(p)
    svi.step(torch.arange(6))
    svi.check_programs()
    assert others and all(torch.equal(p.grad, torch.ones_like(p)) for p in others)
    assert all(p.grad is None for p in trained.values())


def test_a_look_for_which_there_is_no_memory_is_left_out_and_says_so(monkeypatch):
    vae, data = tiny_vae()
    svi = traced_svi(vae, WholeModelOptimizer(vae.named_parameters()), split=data.train)
    svi.step(torch.arange(6))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Traced, "check_same", full)
    with pytest.warns(UserWarning, match="too little memory is left"):
        svi.check()
    svi.check()  # once


@pytest.mark.parametrize("what", CHANGED)
def test_what_python_holds_cannot_change_unseen(what):
    """A traced step has it as a constant; SVI follows it."""
    for engine in ("svi", "traced"):
        vae, data = tiny_vae()
        vae.decoder = layer = Tempered(vae.decoder)

        def callback(metrics, layer=layer):
            if metrics["epoch"] == 1:
                CHANGED[what](layer)

        options = {"epochs": 2, "engine": engine, "progress": False, "callback": callback}
        expected = contextlib.nullcontext()
        if engine == "traced":
            said = r"changed after the step was traced: .* per image, and theirs is now .* svi$"
            expected = pytest.raises(NotTraceableError, match=said)
        with expected:
            fit(vae, data, **options)


def test_what_a_tensor_holds_may_change():
    ends = []
    for engine in ("svi", "traced"):
        vae, data = tiny_vae()
        vae.decoder = layer = Tempered(vae.decoder)
        lines = []

        def callback(metrics, layer=layer):
            layer.tensor.fill_(1 + metrics["epoch"])

        history = fit(
            vae, data, epochs=3, engine=engine, progress=False, callback=callback, say=lines.append
        )
        ends.append([epoch["train_loss"] for epoch in history.metrics])
        assert lines[0].startswith(engine)
    assert ends[0] == pytest.approx(ends[1], rel=0.1)  # of other draws
    assert ends[0][2] > 1.2 * ends[0][0]  # and it tells


def test_a_look_at_the_programs_is_taken_now_and_then(monkeypatch):
    """For a hundredth of the time that steps take, whatever else passes."""
    now, looks = [0.0], []
    monkeypatch.setattr(acceleration.time, "monotonic", lambda: now[0])
    vae, data = tiny_vae()
    svi = traced_svi(vae, WholeModelOptimizer(vae.named_parameters()), split=data.train)

    def look(_):
        looks.append(now[0])
        now[0] += 0.25

    def train(seconds):
        svi.step(torch.arange(6))
        now[0] += seconds
        svi.check()

    monkeypatch.setattr(Traced, "check_same", look)
    train(1.0)
    assert looks == [1.0]
    now[0] += 1000.0  # an evaluation
    train(12.0)
    svi.check()  # of no steps
    now[0] += 1000.0
    train(12.0)
    assert looks == [1.0]
    train(1.0)
    assert looks == [1.0, 2026.25]
    svi.check()
    train(24.0)
    assert len(looks) == 2


def test_a_look_sees_a_number_that_has_changed():
    vae, data = tiny_vae()
    vae.decoder = layer = Tempered(vae.decoder)
    svi = traced_svi(vae, WholeModelOptimizer(vae.named_parameters()), split=data.train)
    svi.step(torch.arange(6))
    svi.check()
    CHANGED["a number"](layer)
    svi._look_after = math.inf
    svi.check()
    svi._look_after = 0.0
    with pytest.raises(NotTraceableError, match="changed after the step was traced"):
        svi.check()


@pytest.mark.parametrize("objective", ["elbo", "stl"])
def test_rounding_is_no_change_of_the_programs(objective):
    """Where the posterior is exact, STL's gradient is rounding alone; a loss may be 0."""
    x = torch.linspace(-2, 2, 64)
    # -log p(x) of N(0, 2 s^2), whose mean over these is 0 for one unit of x.
    unit = float(torch.exp(-0.5 * math.log(4 * math.pi) - x.square().mean() / 4))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("unit", torch.full((len(x),), -math.log(unit)))

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(0.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(slope * x, scale.exp()))

    guide(x)
    named = dict(pyro.get_param_store().named_parameters())
    optim = WholeModelOptimizer(named.items())
    svi = CompiledSVI(model, guide, optim, objectives.REGISTRY[objective](1), mode="traced")
    svi.prepare(x)
    with torch.no_grad():
        named["slope"].fill_(0.5)
        named["scale"].fill_(-0.5 * math.log(2))
    graph, plan, x = svi._traced._verified
    loss, grads, *_ = svi._traced._twice(graph, plan, x)
    if objective == "stl":
        assert abs(float(loss)) < 1e-3 and max(float(g.abs()) for g in grads) < 1e-3

    def rounded(*inputs):
        return [value + 1e-3 for value in graph(*inputs)]

    svi._traced._verified = rounded, plan, x
    svi.check_programs()


def test_a_resumed_run_draws_its_batches_as_before_whatever_fits_now(tmp_path, monkeypatch):
    options = {"batch_size": 8, "engine": "traced", "progress": False}
    whole, data = tiny_vae()
    fit(whole, data, epochs=4, run=tmp_path / "whole", **options)
    parts, _ = tiny_vae()
    fit(parts, data, epochs=2, run=tmp_path / "parts", **options)
    monkeypatch.setattr(engines, "fits", lambda *_: False)
    again, _ = tiny_vae()
    fit(again, data, epochs=4, run=tmp_path / "parts", resume=True, **options)
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_capture_that_fails_leaves_everything_as_it_was(monkeypatch):
    """On a stand-in for CUDA, whose capture runs the step and then breaks."""

    class Broken:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            raise RuntimeError("capture is not permitted")

        def __exit__(self, *_):
            pass

        def wait_stream(self, _):
            pass

    switches = []

    def stream(_):
        seen = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        switches.append(seen)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", Broken)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Broken())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    monkeypatch.setattr(torch.cuda, "graph", Broken)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: None)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(compiling, "compiled", lambda graph, *_: graph)
    for precision, expected in (("fp32", ("highest", False)), ("tf32", ("high", True))):
        vae, data = tiny_vae()
        optim = WholeModelOptimizer(vae.named_parameters(), "shampoo")
        svi = CompiledSVI(
            vae.model,
            vae.guide,
            optim,
            objectives.elbo(),
            module=vae,
            split=data.train,
            mode="cuda-graph",
            precision=precision,
        )
        before = [t.clone() for t in svi._state]
        with pytest.raises(NotTraceableError, match="cannot be captured: capture is not"):
            svi.prepare(torch.arange(6))
        assert all(torch.equal(a, b) for a, b in zip(svi._state, before, strict=True))
        assert set(switches) == {expected}
        assert waited == [torch.device("cpu")]
        switches.clear()
        waited.clear()


@pytest.mark.parametrize("ends_badly", [True, False])
def test_a_broken_capture_says_what_broke_it_and_frees_the_allocator(monkeypatch, ends_badly):
    """Torch's own end of it says only that there was an error, and leaves its pool open."""
    asked, ended = [], []

    class Capture:
        def __init__(self, graph, **options):
            asked.append(options)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            if ends_badly:
                raise RuntimeError("operation failed due to a previous error during capture")

    class Generator:
        def clone_state(self):
            return "clean"

        def graphsafe_set_state(self, state):
            ended.append(state)

    def breaks(x):
        try:
            raise KeyError("of another matter")
        except KeyError:
            raise RuntimeError("operation not permitted when stream is capturing")  # noqa: B904

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, None, None, Generator()))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: ended.append(pool))
    options = {"pool": (7, 1), "capture_error_mode": "thread_local"}
    with pytest.raises(RuntimeError, match=r"^operation not permitted when stream is capturing$"):
        compiling._while_captured(object(), options, breaks, [torch.zeros(1)])
    assert asked == [options] and ended == [(3, (7, 1)), "clean"]


def test_a_step_that_cannot_be_compiled_is_captured_as_it_was_traced(monkeypatch, inductor):
    """On a stand-in for CUDA; and the line that names the engine says it."""

    def broken(graph, example, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(inductor, "compile_fx", broken)
    monkeypatch.setattr(compiling, "captured", lambda function, state, inputs: function)
    monkeypatch.setattr(engines, "choose", lambda *args: ("cuda-graph", "for this test"))
    vae, data = tiny_vae()
    lines = []
    fit(vae, data, epochs=2, say=lines.append, progress=False)
    other, _ = tiny_vae()
    monkeypatch.setattr(engines, "choose", lambda *args: ("traced", "for this test"))
    fit(other, data, epochs=2, progress=False)
    said = "as traced, for it was not compiled (the compilation failed: no such kernel)"
    assert lines == [f"cuda-graph: for this test; {said}"]
    for ours, theirs in zip(vae.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def laplace_guide(x):
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Laplace(slope * x, 0.7))


@needs_compiler
@pytest.mark.slow
def test_a_site_that_is_not_made_of_normals_has_the_same_draws_compiled_and_resumed():
    """It draws from torch's own stream, which Inductor would replace by one of its own."""
    x = torch.linspace(-2, 2, 64)
    ends = []
    for mode in ("traced", "compiled"):
        pyro.clear_param_store()
        torch.manual_seed(3)
        laplace_guide(x)
        optim = WholeModelOptimizer(pyro.get_param_store().named_parameters(), lr=0.05)
        svi = CompiledSVI(normal_model, laplace_guide, optim, objectives.elbo(), mode=mode)
        svi.prepare(x)
        torch.manual_seed(4)
        losses = [float(svi.step(x)) for _ in range(5)]
        svi.check()
        ends.append([*losses, float(pyro.param("slope").detach())])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    assert len(set(ends[0])) == 6


def test_a_ragged_batch_that_cannot_be_captured_goes_on_traced(monkeypatch):
    """On a stand-in for CUDA, which captures the first batch size and no other."""
    sizes = []

    def captured(function, state, inputs):
        sizes.append(len(inputs[0]))
        if len(sizes) > 1:
            raise RuntimeError("out of memory")
        return function

    monkeypatch.setattr(compiling, "captured", captured)
    monkeypatch.setattr(compiling, "compiled", lambda graph, *_: graph)
    batches = [torch.arange(8), torch.arange(8, 16), torch.arange(16, 21), torch.arange(8)]
    ends = []
    for mode in ("cuda-graph", "traced"):
        vae, data = tiny_vae()
        optim = WholeModelOptimizer(vae.named_parameters(), lr=0.01)
        programs = vae.model, vae.guide, optim, objectives.elbo()
        svi = CompiledSVI(*programs, module=vae, split=data.train, mode=mode)
        losses = torch.stack([svi.step(index) for index in batches])
        svi.check()
        ends.append([losses, *(p.detach() for p in vae.parameters())])
    assert sizes == [8, 5]
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)


def test_a_loaded_checkpoint_is_written_into_the_tensors_that_are_held():
    """What was captured reads and writes these very tensors."""
    vae, data = tiny_vae()
    optim = WholeModelOptimizer(vae.named_parameters(), "shampoo")
    svi = traced_svi(vae, optim, split=data.train)
    svi.step(torch.arange(6))
    held = [t.data_ptr() for t in svi._state]
    svi.save()
    state = copy.deepcopy(optim.state_dict())
    values = [t.clone() for t in svi._state]
    for _ in range(3):
        svi.step(torch.arange(6))
    optim.load_state_dict(state)
    svi.bind()
    assert [t.data_ptr() for t in svi._state] == held
    count = len(list(vae.parameters()))
    moments = sum(len(slots) for slots in svi._bound)
    for now, then in zip(svi._state[count : count + moments], values[count:], strict=False):
        assert torch.equal(now, then)
    for p, bound in zip(vae.parameters(), svi._bound, strict=True):
        state = optim.optimizer.state[p].values()
        assert all(any(t is other for other in state) for t in bound)
