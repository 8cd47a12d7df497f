"""Small VAEs and data for tests."""

import torch

from pyrovae import config as cfg
from pyrovae import data, objectives
from pyrovae.acceleration import CompiledSVI
from pyrovae.optimizers import WholeModelOptimizer
from pyrovae.vae import VAE


def tiny_config(**changes) -> cfg.TrainConfig:
    """A configuration whose networks have eight units and two latents."""
    values = {"hidden": (8,), "latent_dim": 2, "epochs": 1, "batch_size": 16} | changes
    return cfg.resolve(cfg.make(cfg.TrainConfig, values))


def tiny_data(config: cfg.TrainConfig, n: int = 40, shape=(1, 4, 4), seed: int = 0) -> data.Data:
    """Eight-bit images under the configuration's protocol: three noisy patterns, to be learnt."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(20, 236, (3, *shape), generator=generator)
    noise = torch.randint(-20, 21, (n, *shape), generator=generator)
    images = (patterns[torch.arange(n) % 3] + noise).to(torch.uint8)
    return data.from_array(
        images, binarize=config.binarize, dequantize=config.dequantize, valid_size=8, test_size=8
    )


def tiny_vae(**changes) -> tuple[VAE, data.Data]:
    """A VAE and the data it is for."""
    config = tiny_config(**changes)
    dataset = tiny_data(config)
    return cfg.build(config, dataset), dataset


def tiny_hierarchy(structure: str = "top-down", **changes) -> cfg.TrainConfig:
    """A configuration of a hierarchy of three and two latents."""
    args = {"latents": (3, 2), "structure": structure, "upper_hidden": (6,)}
    args |= changes.pop("model_args", {})
    values = {"model": "hierarchical", "model_args": args, "hidden": (8,), "batch_size": 16}
    return cfg.resolve(cfg.make(cfg.TrainConfig, values | {"epochs": 1} | changes))


def traced_svi(
    vae: VAE, optim: WholeModelOptimizer, mode: str = "traced", **options
) -> CompiledSVI:
    """The ELBO's step of a VAE, traced and not compiled unless the mode says so."""
    elbo = objectives.elbo()
    return CompiledSVI(vae.model, vae.guide, optim, elbo, module=vae, mode=mode, **options)
