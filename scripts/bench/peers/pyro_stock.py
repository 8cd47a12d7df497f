"""Pyro as its own VAE example has it: Trace_ELBO, pyro.optim.Adam, validation left as it is."""

import copy
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from bench import cases
from pyrovae.vae import VAE


class Stock:
    """`SVI.step` on a batch; each contestant has a parameter store of its own."""

    def __init__(self, model: Callable, guide: Callable, draw: Callable[[], Tensor], batch: int):
        self.draw, self.batch = draw, batch
        self.store: dict = {"params": {}, "constraints": {}}
        self.svi = SVI(model, guide, Adam({"lr": cases.LR}), loss=Trace_ELBO())

    def run(self, steps: int) -> float:
        """Take so many steps."""
        total = 0.0
        with pyro.get_param_store().scope(self.store) as store:
            for _ in range(steps):
                total += self.svi.step(self.draw())
            self.store = store
        return total / (steps * self.batch)


def mlp(batches: cases.Batches, start: nn.Module) -> Stock:
    """The dense VAE: the encoder gives location and scale, the decoder probabilities."""
    first, second, head, *rest = [copy.deepcopy(m).to(cases.device()) for m in cases.linears(start)]
    encoder = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), head)
    decoder = nn.Sequential(rest[0], nn.Tanh(), rest[1], nn.Tanh(), rest[2], nn.Sigmoid())
    latent = head.out_features // 2

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", x.shape[0]):
            loc = x.new_zeros((x.shape[0], latent))
            scale = x.new_ones((x.shape[0], latent))
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            # The example switches validation off here, for its images are grey.
            probs = dist.Bernoulli(decoder(z), validate_args=False)
            pyro.sample("obs", probs.to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    def draw() -> Tensor:
        levels = batches.next()
        return torch.bernoulli(levels.float() / 255)

    return Stock(model, guide, draw, batches.size)


def conv(batches: cases.Batches, start: VAE) -> Stock:
    """Pyro has no such likelihood and no such network: pyrovae's, in stock SVI."""
    vae = copy.deepcopy(start).to(cases.device())
    return Stock(vae.model, vae.guide, lambda: batches.next().float() / 255, batches.size)
