"""A VAE whose log p(x) is known: x = W z + b + noise with z ~ N(0, I), everything Gaussian."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.likelihoods import Likelihood
from pyrovae.priors import StandardNormal
from pyrovae.vae import VAE


class FixedNoise(Likelihood):
    """N(loc, sigma), sigma fixed."""

    kind = "density"
    num_params = 1
    sigma = 0.5

    def elementwise(self, params: Tensor) -> dist.Distribution:
        (loc,) = params
        return dist.Normal(loc, loc.new_tensor(self.sigma))


class Affine(nn.Module):
    """z -> (1, F): the decoder."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.weight.T + self.bias).unsqueeze(-2)


class LinearGaussianPosterior(nn.Module):
    """The exact posterior p(z | x), or one moved and widened away from it."""

    def __init__(self, decoder: Affine, sigma: float, shift: float = 0.0, widen: float = 1.0):
        super().__init__()
        self.latent_dim = decoder.weight.shape[1]
        self.decoder = decoder
        self.sigma = sigma
        self.shift = nn.Parameter(decoder.weight.new_tensor(shift))
        self.widen = nn.Parameter(decoder.weight.new_tensor(widen))

    def forward(self, x: Tensor) -> dist.Distribution:
        W, b = self.decoder.weight, self.decoder.bias
        precision = torch.eye(self.latent_dim, dtype=W.dtype) + W.T @ W / self.sigma**2
        covariance = torch.linalg.inv(precision)
        mean = (x - b) @ W @ covariance / self.sigma**2
        tril = torch.linalg.cholesky(covariance)
        return dist.MultivariateNormal(mean + self.shift, scale_tril=self.widen * tril)


def linear_gaussian(
    features: int = 6, latent_dim: int = 3, shift: float = 0.0, widen: float = 1.0, seed: int = 0
) -> VAE:
    """The VAE in float64; exact posterior unless moved."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(features, latent_dim, generator=generator, dtype=torch.float64)
    bias = torch.randn(features, generator=generator, dtype=torch.float64)
    decoder = Affine(weight, bias)
    likelihood = FixedNoise((features,))
    return VAE(
        prior=StandardNormal(latent_dim).double(),
        posterior=LinearGaussianPosterior(decoder, likelihood.sigma, shift, widen),
        decoder=decoder,
        likelihood=likelihood,
    )


def marginal(vae: VAE) -> torch.distributions.Distribution:
    """p(x) = N(b, W W' + sigma^2 I)."""
    W, b = vae.decoder.weight.detach(), vae.decoder.bias.detach()
    eye = torch.eye(len(b), dtype=b.dtype)
    return torch.distributions.MultivariateNormal(b, W @ W.T + FixedNoise.sigma**2 * eye)


def kl_to_posterior(vae: VAE, x: Tensor) -> Tensor:
    """KL(q(z | x) || p(z | x)) of a moved posterior, (B,), by the formula for two Gaussians."""
    W = vae.decoder.weight.detach()
    d = W.shape[1]
    precision = torch.eye(d, dtype=W.dtype) + W.T @ W / FixedNoise.sigma**2
    widen, shift = vae.posterior.widen.detach(), vae.posterior.shift.detach()
    move = torch.full((d,), float(shift), dtype=W.dtype)
    kl = 0.5 * (d * widen**2 + move @ precision @ move - d) - d * math.log(widen)
    return kl.expand(len(x))
