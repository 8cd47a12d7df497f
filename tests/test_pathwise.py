"""Gradients through the draws alone, against the same gradients written out by hand."""

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import FixedNoise, linear_gaussian, marginal
from pyro.infer import SVI
from pyro.optim import Adam
from tiny import tiny_vae
from torch import nn
from torch.distributions import Normal
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import importance, objectives
from pyrovae.errors import InputError
from pyrovae.importance import log_mean_exp, log_weights

PATHWISE = ("stl", "dreg")


@pytest.fixture(autouse=True)
def scoped():
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.manual_seed(0)
        yield


def gradient(module, objective, x, seed=0):
    """The loss of one draw, and the gradient that it leaves, by parameter."""
    module.zero_grad()
    torch.manual_seed(seed)
    loss = objective.loss_and_grads(module.model, module.guide, x)
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return loss, {n: g.clone() for n, g in grads.items()}


def weights_by_hand(name, log_weights):
    k = len(log_weights)
    if name == "stl":
        return torch.full_like(log_weights, 1 / k), torch.full_like(log_weights, 1 / k)
    shares = log_weights.detach().exp() / log_weights.detach().exp().sum(0)
    return shares, shares**2


def assert_same(ours, theirs):
    assert set(theirs) <= set(ours)
    for name, grad in ours.items():
        expected = theirs.get(name, torch.zeros_like(grad))
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", PATHWISE)
@pytest.mark.parametrize(
    ("prior", "posterior"),
    [
        ("standard-normal", "mean-field"),
        ("mixture", "full-rank"),
        ("vamp", "mean-field"),
        ("vamp", "full-rank"),
        ("flow", "flow"),
    ],
)
@pytest.mark.parametrize("k", [1, 3])
def test_gradient_is_the_one_written_out(name, prior, posterior, k):
    options = {"components": 5} if prior in ("mixture", "vamp") else {}
    vae, data = tiny_vae(prior=prior, posterior=posterior, prior_args=options, latent_dim=3)
    vae, x = vae.double(), data.test.tensor().double()
    loss, ours = gradient(vae, objectives.REGISTRY[name](k), x)

    # The same draws, once with a VAE whose weights are constants, once with z as a constant.
    constant = copy.deepcopy(vae).requires_grad_(False)
    vae.zero_grad()
    torch.manual_seed(0)
    z = vae.posterior(x).expand([k, len(x)]).rsample()
    log_p, log_p_of_z = (
        m.prior().log_prob(at) + m.likelihood(m.decoder(at)).log_prob(x)
        for m, at in ((vae, z.detach()), (constant, z))
    )
    log_w = log_p_of_z - constant.posterior(x).log_prob(z)
    a, b = weights_by_hand(name, log_w * 1.0)
    (-(a * log_p).sum() - (b.detach() * log_w).sum()).backward()
    theirs = {n: p.grad for n, p in vae.named_parameters() if p.grad is not None}
    bound = log_w.mean(0) if name == "stl" else log_mean_exp(log_w)
    assert loss == pytest.approx(-float(bound.detach().sum()), rel=1e-10)
    assert_same(ours, theirs)


class TwoLayers(nn.Module):
    """z2 ~ N(0, 1), z1 ~ N(a z2, s), x ~ N(b z1, t), and a guide from the top down, or back up."""

    def __init__(self, top_down=True):
        super().__init__()
        self.top_down = top_down
        self.theta = nn.Parameter(torch.tensor([0.8, -0.3, 1.2, -0.4], dtype=torch.float64))
        self.phi = nn.Parameter(torch.tensor([0.3, -0.2, 0.7, 0.5, -0.6, 0.2], dtype=torch.float64))

    def parts(self, x, z1, z2):
        """log p(x, z) and the guide's two distributions, given what each depends on."""
        a, s, b, t = self.theta
        log_p = Normal(0.0, 1.0).log_prob(z2) + Normal(a * z2, s.exp()).log_prob(z1)
        return log_p + Normal(b * z1, t.exp()).log_prob(x)

    def first(self, x):
        c, s, *_ = self.phi
        return dist.Normal(c * x, s.exp())

    def second(self, x, z):
        _, _, c, d, s, e = self.phi
        return dist.Normal(c * x + d * z + e * z.sin(), s.exp())

    def model(self, x):
        pyro.module("two-layers", self)
        a, s, b, t = self.theta
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            z1 = pyro.sample("z1", dist.Normal(a * z2, s.exp()))
            pyro.sample("x", dist.Normal(b * z1, t.exp()), obs=x)

    def guide(self, x):
        pyro.module("two-layers", self)
        names = ("z2", "z1") if self.top_down else ("z1", "z2")
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample(names[0], self.first(x))
            pyro.sample(names[1], self.second(x, z))


@pytest.mark.parametrize("name", PATHWISE)
@pytest.mark.parametrize("top_down", [True, False])
def test_two_sites_by_hand_one_particle_and_image_at_a_time(name, top_down):
    net, x, k = TwoLayers(top_down), torch.tensor([0.7, -1.1], dtype=torch.float64), 3
    _, ours = gradient(net, objectives.REGISTRY[name](k), x)
    torch.manual_seed(0)
    noise = [torch.randn(k, 2, dtype=torch.float64) for _ in range(2)]
    frozen = copy.deepcopy(net).requires_grad_(False)

    expected = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for image in range(2):
        rows = []
        for particle in range(k):
            eps = [n[particle, image] for n in noise]
            q = net.first(x[image])
            first = q.loc + q.scale * eps[0]
            q = net.second(x[image], first)
            second = q.loc + q.scale * eps[1]
            z1, z2 = (second, first) if top_down else (first, second)
            log_q = frozen.first(x[image]).log_prob(first)
            log_q = log_q + frozen.second(x[image], first).log_prob(second)
            log_w = frozen.parts(x[image], z1, z2) - log_q
            (by_phi,) = torch.autograd.grad(log_w, net.phi)
            log_p = net.parts(x[image], z1.detach(), z2.detach())
            (by_theta,) = torch.autograd.grad(log_p, net.theta)
            rows.append((log_w.detach(), by_phi, by_theta))
        a, b = weights_by_hand(name, torch.stack([row[0] for row in rows]))
        for particle, (_, by_phi, by_theta) in enumerate(rows):
            expected["theta"] -= a[particle] * by_theta
            expected["phi"] -= b[particle] * by_phi
    assert_same(ours, expected)


def mean_gradient(net, objective, x, repeats, seed):
    """The mean gradient over independent draws, its standard error, and the variance, flat."""
    torch.manual_seed(seed)
    rows = []
    for _ in range(repeats):
        net.zero_grad()
        objective.loss_and_grads(net.model, net.guide, x)
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    values = torch.stack(rows)
    return values.mean(0), values.std(0) / math.sqrt(repeats), values.var(0)


@pytest.mark.parametrize("top_down", [True, False])
@pytest.mark.parametrize(("ours", "theirs", "k"), [("dreg", "iwae", 4), ("stl", "elbo", 2)])
def test_expectation_is_the_gradient_of_the_bound(ours, theirs, k, top_down):
    net, x = TwoLayers(top_down), torch.tensor([0.7, -1.1], dtype=torch.float64).repeat(500)
    mean, error, variance = mean_gradient(net, objectives.REGISTRY[ours](k), x, 60, 1)
    truth, other, noise = mean_gradient(net, objectives.REGISTRY[theirs](k), x, 60, 2)
    assert ((mean - truth).abs() < 5 * (error**2 + other**2).sqrt()).all()
    assert (error < 0.05 * truth.abs().max()).all()  # the comparison can tell
    if ours == "dreg":
        guide = slice(len(net.theta), None)
        assert variance[guide].sum() < 0.8 * noise[guide].sum()


def test_dreg_is_unbiased_where_model_and_guide_share_parameters():
    vae = linear_gaussian(features=3, latent_dim=2, shift=0.4, widen=1.3)
    x = marginal(vae).sample((4,)).repeat(100, 1)
    mean, error, _ = mean_gradient(vae, objectives.dreg(5), x, 60, 1)
    truth, other, _ = mean_gradient(vae, objectives.iwae(5), x, 60, 2)
    assert ((mean - truth).abs() < 5 * (error**2 + other**2).sqrt()).all()


def test_stl_is_the_gradient_of_the_kl_to_the_posterior():
    vae = linear_gaussian(shift=0.3, widen=1.4)
    x = marginal(vae).sample((1,)).repeat(2000, 1)
    mean, error, _ = mean_gradient(vae, objectives.stl(), x, 40, 0)
    W, d = vae.decoder.weight.detach(), vae.latent_dim
    precision = torch.eye(d, dtype=W.dtype) + W.T @ W / FixedNoise.sigma**2
    shift, widen = vae.posterior.shift.item(), vae.posterior.widen.item()
    truth = {
        "posterior.shift": shift * float(precision.sum()),
        "posterior.widen": d * (widen - 1 / widen),
    }
    sizes = [p.numel() for p in vae.parameters()]
    starts = dict(
        zip(
            [n for n, _ in vae.named_parameters()],
            itertools.accumulate([0, *sizes[:-1]]),
            strict=True,
        )
    )
    for name, value in truth.items():
        at = starts[name]
        assert abs(float(mean[at]) / 2000 - value) < 5 * float(error[at]) / 2000
        assert float(error[at]) / 2000 < 0.02 * value


@pytest.mark.parametrize("name", PATHWISE)
def test_no_noise_at_all_when_the_guide_is_the_posterior(name):
    vae = linear_gaussian()
    x = marginal(vae).sample((20,))
    _, ours = gradient(vae, objectives.REGISTRY[name](3), x)
    _, plain = gradient(vae, objectives.elbo(3), x)
    for parameter in ("posterior.shift", "posterior.widen"):
        assert abs(float(ours[parameter])) < 1e-10
        assert abs(float(plain[parameter])) > 1e-2


def test_one_particle_of_dreg_is_stl():
    net, x = TwoLayers(), torch.tensor([0.7, -1.1], dtype=torch.float64)
    dreg, stl = (gradient(net, objectives.REGISTRY[name](1), x) for name in ("dreg", "stl"))
    assert dreg[0] == pytest.approx(stl[0])
    assert_same(dreg[1], stl[1])


@pytest.mark.parametrize("name", PATHWISE)
def test_loss_is_the_bound_of_log_weights_and_every_method_agrees(name):
    net, x = TwoLayers(), torch.tensor([0.7, -1.1, 0.2], dtype=torch.float64)
    objective = objectives.REGISTRY[name](4)
    value, grads = gradient(net, objective, x)
    torch.manual_seed(0)
    log_w = log_weights(net.model, net.guide, x, 4)
    bound = log_w.mean(0) if name == "stl" else log_mean_exp(log_w)
    assert value == pytest.approx(-bound.sum().item())
    torch.manual_seed(0)
    assert objective.loss(net.model, net.guide, x) == pytest.approx(value)
    net.zero_grad()
    torch.manual_seed(0)
    loss = objective.differentiable_loss(net.model, net.guide, x)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(value)
    assert_same({n: p.grad for n, p in net.named_parameters()}, grads)


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_stl_takes_a_kl_weight(beta):
    net, x = TwoLayers(), torch.tensor([0.7, -1.1], dtype=torch.float64).repeat(500)

    class Weighted(nn.Module):
        def __init__(self, objective):
            super().__init__()
            self.net = net
            weight = objectives.KLWeight(beta)
            self.model, self.guide = objectives.with_handlers(
                net.model, net.guide, objective, weight=weight
            )

    stl, elbo = objectives.stl(2), objectives.elbo(2)
    mean, error, _ = mean_gradient(Weighted(stl), stl, x, 60, 1)
    truth, other, _ = mean_gradient(Weighted(elbo), elbo, x, 60, 2)
    assert ((mean - truth).abs() <= 5 * (error**2 + other**2).sqrt() + 1e-12).all()
    _, _, one = mean_gradient(net, stl, x, 2, 1)
    assert one.isfinite().all()


def test_svi_takes_them_unchanged():
    for name in PATHWISE:
        net, x = TwoLayers(), torch.tensor([6.0, -5.0], dtype=torch.float64)
        svi = SVI(net.model, net.guide, Adam({"lr": 0.02}), loss=objectives.REGISTRY[name](8))
        losses = [svi.step(x) for _ in range(150)]
        assert sum(losses[-30:]) < sum(losses[:30])
        assert math.isfinite(svi.evaluate_loss(x))
        pyro.clear_param_store()


@pytest.mark.parametrize("name", PATHWISE)
def test_losses_can_be_traced_once_and_called_again(name):
    vae, data = tiny_vae(prior="vamp", prior_args={"components": 4})
    x, objective = data.test.tensor(), objectives.REGISTRY[name](3)

    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae

        def forward(self, x):
            return objective.losses(vae.model, vae.guide, x)

    losses = Losses()

    def step(params, x):
        loss, surrogate = torch.func.functional_call(losses, params, (x,))
        return loss, *torch.autograd.grad(surrogate, [params[n] for n in names])

    names = [n for n, _ in losses.named_parameters()]
    params = {n: p.detach().clone().requires_grad_() for n, p in losses.named_parameters()}
    params |= dict(losses.named_buffers())
    with pyro.validation_enabled(False), importance.isolated_params():
        graph = make_fx(step, tracing_mode="fake")(params, x)
        moved = params | {n: (params[n] + 0.1).detach().requires_grad_() for n in names}
        for values in (params, moved):
            torch.manual_seed(5)
            traced = graph(values, x)
            torch.manual_seed(5)
            eager = step(values, x)
            for ours, theirs in zip(traced, eager, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_what_has_no_meaning_is_refused():
    vae, _ = tiny_vae()
    for name in PATHWISE:
        objective = objectives.REGISTRY[name](2)
        with pytest.raises(InputError, match=rf"--free-bits .*{name}"):
            objectives.with_handlers(vae.model, vae.guide, objective, free_nats=1.0)
        with pytest.raises(InputError, match="at least 1"):
            objectives.REGISTRY[name](0)
    with pytest.raises(InputError, match=r"--beta .*dreg"):
        objectives.check_kl_term(objectives.dreg(), "--beta")
    objectives.check_kl_term(objectives.stl(), "--beta")

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Poisson(torch.ones(())))

    with pytest.raises(InputError, match="no gradient; use --objective elbo"):
        objectives.stl().losses(guide, guide, torch.zeros(2))

    def other(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(InputError, match="same latent sites"):
        objectives.stl().losses(vae.model, other, torch.zeros(2, 1, 4, 4))
