"""log p(x) by importance sampling in a straightforward torch loop."""

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bench.peers.torch_losses import Net, draw_z

IMAGES, PARTICLES = 64, 100  # computed together


@torch.no_grad()
def log_likelihood(net: Net, x: Tensor, num_particles: int) -> float:
    """Mean over x (N, 784) of log (1/K) sum_k p(x, z_k) / q(z_k | x), in nats."""
    total = 0.0
    for batch in x.split(IMAGES):
        numbers, log_w = net.encoder(batch), []
        for start in range(0, num_particles, PARTICLES):
            k = min(PARTICLES, num_particles - start)
            z, kl = draw_z(numbers.expand(k, *numbers.shape))
            logits = net.decoder(z)
            target = batch.expand_as(logits)
            log_p = -binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
            log_w.append(log_p - kl)
        total += float((torch.cat(log_w).logsumexp(0) - math.log(num_particles)).sum())
    return total / len(x)
