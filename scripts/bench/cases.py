"""What every contestant gets: the same images as bytes, the same network, the same weights."""

from typing import Any

import torch
from torch import Tensor, nn

from pyrovae import data, likelihoods, networks, posteriors, priors, sprites
from pyrovae.vae import VAE

LR = 1e-3
HIDDEN, LATENT = 200, 50
CONV_LATENT, COMPONENTS = 64, 5


def device() -> torch.device:
    """Where everything runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def digits(rows: int, test_size: int = 128) -> data.Data:
    """MNIST's shape without its download: scikit-learn's digits at 28×28, repeated up to ``rows``.

    Eight-bit grey levels (N, 784), binarised anew for each batch. What the pixels show does not
    change the time of a step; how many rows there are to gather from does.
    """
    small = data.load("digits").train
    x = small.tensor().repeat(-(-rows // len(small)), 1, 1, 1)[:rows]
    large = nn.functional.interpolate(x, size=(28, 28), mode="bilinear", align_corners=False)
    levels = (large * 255).round().to(torch.uint8).flatten(1)
    return data.from_array(
        levels, name="digits-28", binarize="dynamic", valid_size=64, test_size=test_size
    )


def coloured(rows: int) -> data.Data:
    """Images of 64×64×3 bytes, drawn by `pyrovae.sprites`."""
    return data.from_array(sprites.draw(rows).images, name="sprites", valid_size=8, test_size=8)


def mlp_vae(seed: int = 0, hidden: int = HIDDEN, latent: int = LATENT) -> VAE:
    """784-200-200-50 and back, tanh; Bernoulli pixels, independent normals as posterior."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        likelihood = likelihoods.Bernoulli((784,))
        encoder = networks.MLPEncoder((784,), hidden=(hidden, hidden))
        return VAE(
            prior=priors.StandardNormal(latent),
            posterior=posteriors.MeanField(encoder, latent),
            decoder=networks.MLPDecoder(latent, likelihood.params_shape, hidden=(hidden, hidden)),
            likelihood=likelihood,
        )


def conv_vae(seed: int = 0, hidden: tuple[int, ...] | None = None) -> VAE:
    """The conv64 network with a mixture of discretised logistics for each channel of each pixel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = (3, 64, 64)
        likelihood = likelihoods.DiscretizedLogisticMixture(shape, components=COMPONENTS)
        vae = VAE(
            prior=priors.StandardNormal(CONV_LATENT),
            posterior=posteriors.MeanField(networks.Conv64Encoder(shape, hidden), CONV_LATENT),
            decoder=networks.Conv64Decoder(CONV_LATENT, likelihood.params_shape, hidden),
            likelihood=likelihood,
        )
        # A posterior near the prior: else the first loss is a matter of one draw's luck, and no
        # test of whether two contestants start alike.
        with torch.no_grad():
            vae.posterior.head.weight.mul_(0.1)
        return vae


def linears(module: nn.Module) -> list[nn.Linear]:
    """The dense layers from x to z and from z to x, in this order."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


@torch.no_grad()
def copy_weights(source: nn.Module, target: Any) -> None:
    """Give the dense layers of ``target`` the weights of ``source``."""
    for a, b in zip(linears(source), linears(target), strict=True):
        b.weight.copy_(a.weight)
        b.bias.copy_(a.bias)


class Batches:
    """Batches without replacement, an epoch after the other, drawn and gathered on the device."""

    def __init__(self, levels: Tensor, size: int, seed: int = 0):
        self.levels = levels.to(device())
        self.size = size
        self.generator = torch.Generator(device()).manual_seed(seed)
        self.waiting: list[Tensor] = []

    def index(self) -> Tensor:
        """The rows of the next batch."""
        if not self.waiting:
            order = torch.randperm(
                len(self.levels), generator=self.generator, device=self.levels.device
            )
            whole = len(order) // self.size * self.size
            self.waiting = list(order[:whole].split(self.size))
        return self.waiting.pop()

    def next(self) -> Tensor:
        """The levels of the next batch, uint8 (B, *x_shape)."""
        return self.levels.index_select(0, self.index())
