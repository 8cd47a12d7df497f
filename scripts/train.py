"""Train a VAE with Pyro, everything in sight: the model, the guide and the loop around SVI.

    python scripts/train.py --epochs 20 --out runs/script
    python scripts/evaluate.py runs/script

It does what ``pyrovae train`` does, without early stopping, resuming and pictures. The run that it
writes is a run like any other: ``pyrovae evaluate``, ``sample`` and ``info`` read it too.
"""

import argparse
import dataclasses
import sys
from typing import NoReturn

import pyro
import torch
from pyro.infer import SVI

from pyrovae import cli, objectives, runs
from pyrovae import config as cfg
from pyrovae.errors import InputError
from pyrovae.training import check_data, resolve_device

# Settings of `pyrovae train` that this script takes, by the same names.
DATA = ["data", "data-root", "binarize"]
MODEL = ["likelihood", "likelihood-args", "network", "hidden", "activation", "latent-dim"]
FAMILIES = ["prior", "posterior"]
TRAINING = ["objective", "num-particles", "beta", "epochs", "batch-size", "lr", "seed", "device"]
SEVERAL = ["hidden", "likelihood-args"]  # flags of one or more values


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def arguments() -> tuple[cfg.TrainConfig, str]:
    """The settings, checked as ``pyrovae train`` checks them, and --out."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for flag in DATA + MODEL + FAMILIES + TRAINING:
        parser.add_argument(f"--{flag}", nargs="+" if flag in SEVERAL else None)
    parser.add_argument("--out", default="runs/script")
    parser.set_defaults(config=None)
    args = parser.parse_args()
    return cfg.resolve(cfg.make(cfg.TrainConfig, cli.settings(args, cfg.TrainConfig))), args.out


def train(config: cfg.TrainConfig, out: str) -> None:
    run = runs.Run(out)
    if run.exists():
        raise InputError(f"{out} is there already and was left alone; choose another --out")
    device = resolve_device(config.device)
    data = cfg.load_data(config)
    vae = cfg.build(config, data).to(device)  # prior, posterior, decoder, likelihood
    check_data(vae.likelihood, data)

    def model(x: torch.Tensor) -> None:
        """z ~ p(z), then x ~ p(x | z), for every image of the batch."""
        pyro.module("vae", vae)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.likelihood(vae.decoder(z)), obs=x)

    def guide(x: torch.Tensor) -> None:
        """z ~ q(z | x): where the z that made this x may have been."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", vae.posterior(x))

    objective = objectives.REGISTRY[config.objective](config.num_particles)
    # The weight goes around the programs while they are trained; validation below is without it.
    weight = objectives.KLWeight(config.beta).to(device)
    adam = pyro.optim.Adam({"lr": config.lr})
    svi = SVI(weight(model), weight(guide), adam, loss=objective)
    elbo = objectives.elbo()

    run.write_json("config.json", dataclasses.asdict(config))
    run.write_json("environment.json", runs.environment(device, config.seed, runs.command_line()))
    facts = {"x_shape": list(data.x_shape), "protocol": data.protocol.to_dict()}
    run.write_json("data.json", facts)
    print(f"{data.protocol}\nrun {out} on {device}", file=sys.stderr)

    pyro.clear_param_store()
    pyro.set_rng_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)  # of data order and binarisation
    x_valid = data.valid.tensor().to(device)
    best = -float("inf")
    for epoch in range(1, config.epochs + 1):
        loss = 0.0
        for index in torch.randperm(len(data.train), generator=generator).split(config.batch_size):
            x = data.train.batch(index, generator).to(device)
            loss += svi.step(x)  # minus the objective, summed over the batch; one step of Adam
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(config.seed)  # the same noise each time: epochs differ by weights
            valid = -elbo.loss(model, guide, x_valid) / len(x_valid)
        train_loss = loss / len(data.train)
        run.append_metrics({"epoch": epoch, "train_loss": train_loss, "valid_elbo": valid})
        if valid > best:
            best = valid
            runs.save_checkpoint(run.best, {"model": vae.state_dict()})
        print(f"epoch {epoch}  loss {train_loss:.3f}  valid ELBO {valid:.3f}", file=sys.stderr)
    print(f"best validation ELBO {best:.3f} nats per image, in {run.best}")


if __name__ == "__main__":
    try:
        train(*arguments())
    except (InputError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
