"""A small VAE to explore, and what its page holds."""

import base64
import json
import re
from typing import Any

import torch
from torch import Tensor

from pyrovae import likelihoods, networks, posteriors, priors
from pyrovae.data import Split, from_array
from pyrovae.vae import VAE


def vae_and_split(
    latent_dim: int = 3, prior: str = "standard-normal", labelled: bool = True
) -> tuple[VAE, Split]:
    torch.manual_seed(0)
    likelihood = likelihoods.Bernoulli((1, 4, 4))
    posterior = posteriors.MeanField(networks.MLPEncoder((1, 4, 4), hidden=(8,)), latent_dim)
    first = (posterior, (1, 4, 4)) if prior == "vamp" else (latent_dim,)
    vae = VAE(
        prior=priors.REGISTRY[prior](*first),  # type: ignore[arg-type]
        posterior=posterior,
        decoder=networks.MLPDecoder(latent_dim, likelihood.params_shape, hidden=(8,)),
        likelihood=likelihood,
    )
    x = (torch.rand(60, 1, 4, 4) > 0.5).float()
    labels = torch.arange(60) // 20 if labelled else None
    return vae, from_array(x, labels, valid_size=10, test_size=20).test


def content_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def floats(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
