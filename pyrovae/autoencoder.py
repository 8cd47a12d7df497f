"""The autoencoder: a VAE with everything that makes it a probability model taken away."""

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyrovae.likelihoods import Gaussian
from pyrovae.networks import Encoder, initialised
from pyrovae.posteriors import Posterior
from pyrovae.priors import StandardNormal
from pyrovae.vae import VAE, count_parameters

# Of the normal density whose minus log is the sum of squared errors, up to a constant:
# 1 / (2 s^2) = 1.
SCALE = math.sqrt(0.5)


class Point(Posterior):
    """All probability on one z = e(x): what an encoder without noise is.

    >>> import torch
    >>> from pyrovae.networks import MLPEncoder
    >>> Point(MLPEncoder((1, 8, 8)), 10)(torch.rand(5, 1, 8, 8)).sample().shape
    torch.Size([5, 10])
    """

    summary = "one point"

    def __init__(self, encoder: Encoder, latent_dim: int) -> None:
        super().__init__(encoder, latent_dim)
        self.head = initialised(nn.Linear(encoder.out_features, self.latent_dim), 1.0)

    def distribution(self, features: Tensor) -> TorchDistributionMixin:
        """Map features (*B, out_features) to a point mass, batch *B and event (D,)."""
        return dist.Delta(self.head(features), event_dim=1)


class Autoencoder(VAE):
    """The deterministic autoencoder: z = e(x), and min sum_i (x_i - f_i(z))^2.

    The same networks and the same pair of Pyro programs as a VAE's, with three changes: q(z | x) is
    a point mass, p(z) is left out, and p(x | z) is a normal of the fixed scale sqrt(1/2), whose
    constant is left out too. Pyro's ELBO of this pair is minus the sum of squared errors, so every
    engine trains it. It is no bound of anything: without p(z) there is no p(x), and what takes this
    object, or its model, to estimate one refuses. Put p(z) back, and noise into q, and "MSE + KL"
    is the ELBO of a VAE with that fixed scale: ``VAE`` with ``Gaussian(x_shape, scale=sqrt(1/2))``.

    ``generate`` decodes draws from N(0, I), as one does with a VAE, to show what that gives here.

    Args:
        posterior: the encoder, `Point`.
        decoder: maps z (*B, D) to (*B, *likelihood.params_shape).
        x_shape: shape of one observation.

    Raises:
        InputError: if the parts do not fit together.

    Source: Hinton and Salakhutdinov, Reducing the Dimensionality of Data with Neural Networks
    (2006), https://doi.org/10.1126/science.1127647

    >>> import torch
    >>> from pyrovae import networks
    >>> posterior = Point(networks.MLPEncoder((1, 8, 8), hidden=(16,)), 2)
    >>> auto = Autoencoder(posterior, networks.MLPDecoder(2, (1, 1, 8, 8), hidden=(16,)), (1, 8, 8))
    >>> auto.reconstruct(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 1, 8, 8])
    """

    has_density: ClassVar[bool] = False

    def __init__(self, posterior: Point, decoder: nn.Module, x_shape: tuple[int, ...]):
        super().__init__(
            prior=StandardNormal(posterior.latent_dim),
            posterior=posterior,
            decoder=decoder,
            likelihood=Gaussian(x_shape, scale=SCALE),
        )
        self.constant = math.prod(x_shape) * math.log(SCALE * math.sqrt(2 * math.pi))

    def model(self, x: Tensor) -> None:
        """The squared error as a Pyro program, for x (B, *x_shape): log p of z is 0 everywhere."""
        pyro.module(self.program_name, self)
        with pyro.plate("data", x.shape[0], dim=-1):
            with poutine.mask(mask=False):
                z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)
            pyro.factor("constant", z.new_full((x.shape[0],), self.constant))

    @torch.no_grad()
    def decode(self, z: Tensor, *, mean: bool = True, seed: int | None = None) -> Tensor:
        """f(z) for z (*B, D): (*B, *x_shape), whatever ``mean``: there is nothing to draw from."""
        return super().decode(z, mean=True)

    def __repr__(self) -> str:
        """A summary in a few lines."""
        lines = [
            f"Autoencoder of x {self.x_shape}, {self.latent_dim} latents, squared error, "
            f"{count_parameters(self):,} parameters"
        ]
        for name, part in (("encoder", self.posterior.encoder), ("decoder", self.decoder)):
            lines.append(
                f"  {name:<11} {type(part).__name__}, {count_parameters(part):,} parameters"
            )
        return "\n".join(lines)
