"""Estimate log p(x) of a run's images by importance sampling with the guide, step by step.

    python scripts/evaluate.py runs/first --num-particles 1000

``log p(x) ~ log (1/K) sum_k w_k`` with ``w_k = p(z_k) p(x | z_k) / q(z_k | x)`` and K draws z_k
from q(z | x). It reads the run of a VAE with one layer of latents, trained by ``scripts/train.py``
or by ``pyrovae train``. ``pyrovae
evaluate`` is the same estimate with a memory plan, and noise that does not depend on the batch.
"""

import argparse
import dataclasses
import math
import sys
from typing import NoReturn

import torch
from torch import Tensor

from pyrovae import cli, runs
from pyrovae import config as cfg
from pyrovae.data import Split
from pyrovae.diagnostics import psis
from pyrovae.errors import InputError
from pyrovae.training import resolve_device
from pyrovae.vae import VAE

FLAGS = ["num-particles", "split", "limit", "seed", "device", "data-root"]
IMAGES, PARTICLES = 64, 100  # computed together


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def arguments() -> tuple[runs.Run, cfg.EvaluateConfig]:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("run", help="run directory")
    for flag in FLAGS:
        parser.add_argument(f"--{flag}")
    parser.set_defaults(config=None)
    args = parser.parse_args()
    config = cfg.make(cfg.EvaluateConfig, cli.settings(args, cfg.EvaluateConfig))
    return runs.Run(args.run), config


def images(run: runs.Run, config: cfg.EvaluateConfig) -> Split:
    """The split to score: the images that the run was trained beside, no others."""
    trained = cfg.run_config(run)
    if config.data_root is not None:
        trained = dataclasses.replace(trained, data_root=config.data_root)
    data = cfg.load_data(trained)
    if data.protocol.to_dict() != run.read_json("data.json")["protocol"]:
        raise InputError(f"the data are not those of {run.path}; give the right --data-root")
    split = getattr(data, config.split)
    return split if config.limit is None else split.head(config.limit)


@torch.no_grad()
def log_weights(vae: VAE, x: Tensor, num_particles: int) -> Tensor:
    """log w = log p(z) + log p(x | z) - log q(z | x), (K, B) for x (B, *x_shape), in nats."""
    q = vae.posterior(x)
    parts = []
    for start in range(0, num_particles, PARTICLES):
        z = q.sample((min(PARTICLES, num_particles - start),))
        p = vae.likelihood(vae.decoder(z))
        parts.append(vae.prior().log_prob(z) + p.log_prob(x) - q.log_prob(z))
    return torch.cat(parts)


def evaluate(run: runs.Run, config: cfg.EvaluateConfig) -> None:
    device = resolve_device(config.device)
    if cfg.run_config(run).model != "vae":
        raise InputError("this script is for runs of --model vae; use pyrovae evaluate")
    vae = cfg.load(run, device=str(device))
    split = images(run, config)
    x = split.tensor(torch.Generator().manual_seed(config.seed))
    vae.likelihood.check(x)

    torch.manual_seed(config.seed)
    log_p, elbo, pareto_k = [], [], []
    for batch in x.split(IMAGES):
        log_w = log_weights(vae, batch.to(device), config.num_particles).double().cpu()
        log_p.append(log_w.logsumexp(0) - math.log(len(log_w)))
        elbo.append(log_w.mean(0))
        pareto_k.append(psis(log_w).pareto_k)  # the tail of the weights: NaN if K is too small

    k = torch.cat(pareto_k)
    print(f"log p(x)  {show(torch.cat(log_p))} nats per image, K = {config.num_particles}")
    print(f"ELBO      {show(torch.cat(elbo))}")
    k = k[~k.isnan()]
    if len(k):
        print(f"Pareto k  median {k.median():.2f}, above 0.7 for {(k > 0.7).double().mean():.1%}")
    print(f"images    {len(x):,} of the {split.name} split; {split.protocol}")


def show(values: Tensor) -> str:
    """Mean and its standard error over images."""
    return f"{values.mean():.3f} ± {values.std() / math.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    try:
        evaluate(*arguments())
    except (InputError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
