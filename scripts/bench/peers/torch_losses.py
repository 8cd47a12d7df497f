"""The two losses written by hand in torch: the dense Bernoulli VAE, and conv64 with a mixture."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from bench import cases
from pyrovae.vae import VAE


class Net(nn.Module):
    """An encoder and a decoder."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


def mlp(start: nn.Module) -> Net:
    """The dense network, with the weights of ``start``."""
    a, b, c, d, e, f = (copy.deepcopy(m) for m in cases.linears(start))
    encoder = nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c)
    return Net(encoder, nn.Sequential(d, nn.Tanh(), e, nn.Tanh(), f))


def draw_z(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """z ~ q(z | x), and log q(z | x) - log p(z), where the 2 pi cancel; (B, D) and (B,)."""
    loc, log_scale = numbers.chunk(2, -1)
    noise = torch.randn_like(loc)
    z = loc + log_scale.exp() * noise
    return z, (0.5 * (z.square() - noise.square()) - log_scale).sum(-1)


def bernoulli_loss(net: Net, levels: Tensor) -> Tensor:
    """Minus the ELBO of pixels that are binarised here, mean over the batch."""
    chance = levels.float() / 255
    x = (torch.rand_like(chance) < chance).float()
    z, kl = draw_z(net.encoder(x))
    distortion = binary_cross_entropy_with_logits(net.decoder(z), x, reduction="sum")
    return (distortion + kl.sum()) / len(x)


def conv(start: VAE) -> Net:
    """The layers of conv64, with the weights of ``start``."""
    q = copy.deepcopy(start.posterior)
    encoder = nn.Sequential(q.encoder.layers, q.head)
    return Net(encoder, copy.deepcopy(start.decoder.layers))


def mixture_loss(net: Net, levels: Tensor) -> Tensor:
    """Minus the ELBO of 8-bit pixels under mixtures of discretised logistics, mean over the batch.

    The mass of a bin is a difference of sigmoids, or density times width where that underflows.
    """
    x = levels.float() / 255
    z, kl = draw_z(net.encoder(x))
    M = cases.COMPONENTS
    logits, loc, raw = net.decoder(z).unflatten(1, (3, M, 3)).unbind(1)
    loc = loc + ((torch.arange(M, device=x.device) + 0.5) / M).view(M, 1, 1, 1)
    scale = softplus(raw + math.log(math.expm1(0.1))) + 1e-5
    centred = (x.unsqueeze(1) - loc) / scale
    half = 0.5 / 255 / scale
    mass = torch.sigmoid(centred + half) - torch.sigmoid(centred - half)
    density = centred - scale.log() - 2 * softplus(centred) - math.log(255)
    inner = torch.where(mass > 1e-5, mass.clamp_min(1e-12).log(), density)
    first, last = (levels == 0).unsqueeze(1), (levels == 255).unsqueeze(1)
    log_mass = torch.where(first, logsigmoid(centred + half), inner)
    log_mass = torch.where(last, logsigmoid(half - centred), log_mass)
    log_p = torch.logsumexp(logits.log_softmax(1) + log_mass, 1).sum((1, 2, 3))
    return (kl - log_p).mean()
