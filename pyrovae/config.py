"""The one place where names become objects: a configuration, its data, its VAE, and a run's.

Nothing here imports torch until something is built.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.checks import did_you_mean, field_type, make, read_toml, unknown_name
from pyrovae.errors import InputError
from pyrovae.presets import PRESETS
from pyrovae.settings import (
    LARGEST_SEED,
    NAMES,
    RESUMABLE,
    UNUSED,
    EvaluateConfig,
    Options,
    TrainConfig,
)

if TYPE_CHECKING:
    import inspect

    from pyrovae.data import Data, Protocol
    from pyrovae.runs import Run
    from pyrovae.vae import VAE

__all__ = [
    "LARGEST_SEED",
    "NAMES",
    "RESUMABLE",
    "SHARED_WEIGHTS",
    "EvaluateConfig",
    "Options",
    "TrainConfig",
    "build",
    "check_same_data",
    "data_of",
    "default_out",
    "did_you_mean",
    "field_type",
    "load",
    "load_data",
    "make",
    "naming",
    "read_toml",
    "resolve",
    "resolve_evaluation",
    "run_config",
    "run_data",
    "unknown_name",
    "with_preset",
]

# The weights of a directory that was written to be shared.
SHARED_WEIGHTS = "model.safetensors"

# Training images that the output bias and the pseudo-inputs start from: at most so many, and so
# many pixels, since a mixture over large colour images is slow.
_INITIAL_IMAGES = 1000
_INITIAL_NUMBERS = 800_000


def with_preset(given: Options) -> Options:
    """The settings that were given, on top of those of the preset that they name, if any."""
    name = given.get("preset")
    return given if name is None else {**PRESETS[name].settings, **given}


def resolve(config: TrainConfig) -> TrainConfig:
    """Replace every "auto" that depends on another setting, and refuse settings that clash.

    Raises:
        InputError: for options a choice does not know, and pairs that have no meaning together.
    """
    from pyrovae import likelihoods, posteriors, priors

    if config.model == "autoencoder":
        config = _autoencoder(config)
    likelihood = likelihoods.REGISTRY[config.likelihood]
    changes: dict[str, Any] = {}
    if config.binarize == "auto":
        changes["binarize"] = "dynamic" if config.likelihood == "bernoulli" else "none"
        if config.data == "binarized-mnist":
            changes["binarize"] = "none"
    if config.dequantize == "auto":
        density = likelihood.kind == "density"
        binarized = changes.get("binarize", config.binarize) != "none"
        changes["dequantize"] = "uniform" if density and not binarized else "none"
    config = dataclasses.replace(config, **changes)

    if config.dequantize == "uniform" and likelihood.kind == "mass":
        raise InputError(
            f"--dequantize uniform makes x continuous, and {config.likelihood} is a mass on "
            "levels; leave --dequantize at auto, or use a density such as gaussian"
        )
    squares = config.model == "autoencoder"  # which have a meaning on any numbers
    if config.binarize != "none" and likelihood.kind == "density" and not squares:
        raise InputError(
            f"--binarize {config.binarize} makes x 0 or 1, where the density {config.likelihood} "
            "has no meaning; leave --binarize at auto, or use --likelihood bernoulli"
        )
    _check_model(config)
    if config.objective == "mean-field":
        prior, posterior = priors.REGISTRY[config.prior], posteriors.REGISTRY[config.posterior]
        for flag, choice, name in (
            ("--prior", prior, config.prior),
            ("--posterior", posterior, config.posterior),
        ):
            if not choice.closed_form_kl:
                raise InputError(
                    f"--objective mean-field needs KL(q || p) in closed form, which {flag} {name} "
                    "has not; use --objective elbo"
                )
    if config.objective == "stl" and config.free_bits > 0:
        raise InputError(
            "--free-bits needs the whole gradient of the KL term, part of which stl leaves out; "
            "leave --free-bits at 0 or use --objective elbo"
        )
    if config.objective in ("iwae", "dreg"):
        for name, default in (("beta", 1.0), ("kl_warmup", 0.0), ("free_bits", 0.0)):
            if getattr(config, name) != default:
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"{flag} changes the KL term, and the importance-weighted bound "
                    f"({config.objective}) has none; leave {flag} at {default:g} or use "
                    "--objective elbo"
                )
    _check_optimizer(config)
    return config


def _autoencoder(config: TrainConfig) -> TrainConfig:
    """Give an autoencoder its squared error; refuse settings of a probability model.

    A default that was said aloud looks like one that was not, and is taken as such.
    """
    from pyrovae.autoencoder import SCALE

    # A resumed run has these two already.
    stored = config.likelihood == "gaussian" and config.likelihood_args == {"scale": SCALE}
    names = ["prior", "prior_args", "posterior", "posterior_args", "objective", "num_particles"]
    names += ["beta", "kl_warmup", "free_bits", "final_particles"]
    if config.objective == "stl":  # a point has no score to leave out: it is the same gradient
        config = dataclasses.replace(config, objective="elbo")
    if config.final_particles == 0:
        config = dataclasses.replace(config, final_particles=TrainConfig.final_particles)
    if not stored:
        names += ["likelihood", "likelihood_args"]
    default = TrainConfig()
    for name in names:
        value = getattr(config, name)
        if value != getattr(default, name):
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{flag} is a part of a probability model, and an autoencoder is none; leave "
                f"{flag} at its default ({_said(getattr(default, name))}), or use --model vae"
            )
    dequantize = "none" if config.dequantize == "auto" else config.dequantize
    return dataclasses.replace(
        config, likelihood="gaussian", likelihood_args={"scale": SCALE}, dequantize=dequantize
    )


def _said(value: Any) -> str:
    return "none" if value == {} else str(value)


def _check_optimizer(config: TrainConfig) -> None:
    """Refuse settings of the optimiser that clash, or that it has no use for."""
    if config.schedule_epochs is not None and config.schedule != "cosine":
        raise InputError(
            f"--schedule-epochs has no use with --schedule {config.schedule}; leave it out"
        )
    planned = config.schedule_epochs or config.epochs
    if config.schedule == "cosine" and config.warmup_epochs >= planned:
        raise InputError(
            f"--warmup-epochs {config.warmup_epochs:g} leaves nothing of the cosine schedule of "
            f"{planned} epochs; give fewer, or more --epochs"
        )
    if len(config.adam_betas) != 2:
        raise InputError(
            f"--adam-betas expects two numbers such as 0.9 0.999; got {len(config.adam_betas)}"
        )
    if config.optimizer == "adamax" and config.adam_eps != TrainConfig.adam_eps:
        raise InputError(
            "--adam-eps is added to a root that --optimizer adamax does not take; leave it out, "
            "or use adam"
        )


def _check_model(config: TrainConfig) -> None:
    """Refuse settings that the model has no use for, or no meaning of."""
    if config.model != "hierarchical":
        if config.model_args:
            raise InputError(
                f"--model-args describes a hierarchy, and --model {config.model} has none; leave "
                "it out, or use --model hierarchical"
            )
        return
    from pyrovae.layers import Layers

    layers = _construct("--model", Layers, config.model_args, ())
    if config.latent_dim != TrainConfig.latent_dim:
        raise InputError(
            "--latent-dim is that of a single layer; leave it out, and give a hierarchy's with "
            "--model-args latents=100,50"
        )
    if layers.structure == "bottom-up":
        for flag, clash, why in (
            ("--prior vamp", config.prior == "vamp", "a density of its top layer given x"),
            (
                "--objective mean-field",
                config.objective == "mean-field",
                "each layer of q given the one that p has it from",
            ),
        ):
            if clash:
                raise InputError(
                    f"{flag} needs {why}, which a bottom-up hierarchy has not; use --model-args "
                    f"structure=top-down, or another {flag.split()[0]}"
                )


def resolve_evaluation(given: Options) -> EvaluateConfig:
    """The configuration of an evaluation; InputError for settings that its method ignores."""
    config = make(EvaluateConfig, given)
    for name in UNUSED[config.method]:
        if name in given:
            raise InputError(
                f"--{name.replace('_', '-')} has no use with --method {config.method}; leave it out"
            )
    return config


def load_data(config: TrainConfig) -> "Data":
    """The data that a resolved configuration names."""
    from pyrovae import data

    return data.load(
        config.data,
        binarize=config.binarize,
        dequantize=config.dequantize,
        root=config.data_root,
        download=config.download,
        seed=config.data_seed,
        valid_size=config.valid_size,
        test_size=config.test_size,
        image_size=config.image_size,
        stream=config.stream,
        workers=config.workers,
    )


def build(config: TrainConfig, data: "Data") -> "VAE":
    """The VAE that a resolved configuration names, with weights drawn from its seed."""
    return _build(config, data.x_shape, data.protocol.levels, data)


def _build(
    config: TrainConfig, x_shape: tuple[int, ...], levels: int | None, data: "Data | None"
) -> "VAE":
    import torch

    from pyrovae import likelihoods, networks, posteriors, priors
    from pyrovae.streams import own_streams
    from pyrovae.vae import VAE

    likelihood_class = likelihoods.REGISTRY[config.likelihood]
    fixed: Options = {}
    if "levels" in _options(likelihood_class):
        if levels is None:
            raise InputError(
                f"--likelihood {config.likelihood} is a mass on levels, and these data lie on "
                "none; use 8-bit images, or a density such as gaussian"
            )
        fixed["levels"] = levels
    pair = networks.REGISTRY[config.network]
    shape: Options = {"hidden": config.hidden, "activation": config.activation}
    with own_streams(config.seed):
        likelihood = _construct(
            "--likelihood", likelihood_class, config.likelihood_args, (x_shape,), fixed
        )
        prior_class = priors.REGISTRY[config.prior]

        def make_posterior(encoder: Any, latent_dim: int) -> Any:
            cls = posteriors.REGISTRY[config.posterior]
            return _construct("--posterior", cls, config.posterior_args, (encoder, latent_dim))

        def make_prior(posterior: Any) -> Any:
            of = (posterior, x_shape) if prior_class.needs_posterior else (posterior.latent_dim,)
            return _construct("--prior", prior_class, config.prior_args, of)

        if config.model == "hierarchical":
            from pyrovae.layers import Layers, stack

            layers = _construct("--model", Layers, config.model_args, ())
            vae: VAE = stack(
                layers, likelihood, make_prior, config.network, posterior=make_posterior, **shape
            )
        elif config.model == "autoencoder":
            from pyrovae.autoencoder import Autoencoder, Point

            vae = Autoencoder(
                Point(pair.encoder(x_shape, **shape), config.latent_dim),
                pair.decoder(config.latent_dim, likelihood.params_shape, **shape),
                x_shape,
            )
        else:
            posterior = make_posterior(pair.encoder(x_shape, **shape), config.latent_dim)
            vae = VAE(
                prior=make_prior(posterior),
                posterior=posterior,
                decoder=pair.decoder(config.latent_dim, likelihood.params_shape, **shape),
                likelihood=likelihood,
            )
        if config.init_gain != 1.0:
            networks.scale_hidden(vae, config.init_gain)
        if data is not None:
            count = min(_INITIAL_IMAGES, max(64, _INITIAL_NUMBERS // math.prod(x_shape)))
            generator = torch.Generator().manual_seed(config.seed)
            index = torch.randperm(len(data.train), generator=generator)[:count]
            x = data.train.batch(index, generator)
            likelihood.check(x)
            try:
                vae.initialize(x)
            except ValueError as error:  # of a distribution whose parameters are not finite
                if config.init_gain == 1.0 or isinstance(error, InputError):
                    raise
                raise InputError(
                    f"the untrained networks give no finite numbers with --init-gain "
                    f"{config.init_gain:g}; give a smaller one"
                ) from error
    return vae


def _options(cls: type) -> "dict[str, inspect.Parameter]":
    import inspect

    return {
        name: p for name, p in inspect.signature(cls).parameters.items() if p.default is not p.empty
    }


def _construct(
    flag: str, cls: type, given: Options, first: tuple[Any, ...], fixed: Options | None = None
) -> Any:
    """``cls(*first, **given, **fixed)``, refusing options that the class does not know."""
    fixed = fixed or {}
    known = {name: option for name, option in _options(cls).items() if name not in fixed}
    for name in given:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise InputError(
                f"{flag}-args: {cls.__name__} has no option {name!r}{did_you_mean(name, known)}; "
                f"{takes}"
            )
    # One width is written hidden=64, and is a tuple of one.
    several = {name for name in given if isinstance(known[name].default, tuple)}
    given = {
        name: (value,) if name in several and not isinstance(value, (list, tuple)) else value
        for name, value in given.items()
    }
    try:
        return cls(*first, **given, **fixed)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{flag}-args: {cls.__name__} refused {given}: {error}") from None


def run_config(run: "Run") -> TrainConfig:
    """The configuration a run was trained with."""
    settings = run.read_json("config.json")
    with naming(run.path / "config.json"):
        return make(TrainConfig, settings)


def run_data(run: "Run") -> "tuple[tuple[int, ...], Protocol]":
    """The shape of x and the protocol of the data a run was trained on."""
    from pyrovae.data import Protocol

    facts = run.read_json("data.json")
    with naming(run.path / "data.json"):
        return tuple(facts["x_shape"]), Protocol.from_dict(facts["protocol"])


def data_of(run: "Run", data_root: str | None = None) -> "Data":
    """The data that a run was trained on, found again and checked."""
    config = run_config(run)
    if data_root is not None:
        config = dataclasses.replace(config, data_root=data_root)
    dataset = load_data(config)
    check_same_data(run, dataset)
    return dataset


def check_same_data(run: "Run", dataset: "Data") -> None:
    """Raise InputError unless the data are those that a run was trained on."""
    _, stored = run_data(run)
    if stored != dataset.protocol:
        reason = stored.why_not_comparable(dataset.protocol) or "the split sizes differ"
        raise InputError(
            f"the data are not those {run.path} was trained on: {reason}; restore them, or give "
            "the right --data-root"
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an error met in the content of a file into one line that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is damaged or edited: {reason}; restore it from a copy") from None


def load(run: "Run | str | os.PathLike[str]", *, device: str = "cpu") -> "VAE":
    """The VAE of a run with its best weights, or of a directory written by ``pyrovae export``.

    >>> import pyrovae as pv
    >>> vae = pv.load("runs/first", device="cuda")  # doctest: +SKIP

    Raises:
        InputError: if the directory is neither, or its weights cannot be read.
    """
    from pyrovae import training
    from pyrovae.runs import Run, load_checkpoint

    run = run if isinstance(run, Run) else Run(run)
    config = run_config(run)
    x_shape, protocol = run_data(run)
    vae = _build(config, x_shape, protocol.levels, None)
    where = training.resolve_device(device)
    shared = run.path / SHARED_WEIGHTS
    if shared.is_file():
        from pyrovae.sharing import read_weights

        source, weights = shared, read_weights(shared, where)
    else:
        source = run.best if run.best.exists() else run.last
        weights = load_checkpoint(source, where).get("model", {})
    try:
        vae.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{source} does not fit config.json ({reason})") from None
    return vae.to(where).eval()


def default_out(config: TrainConfig) -> Path:
    """Where a run goes that was given no --out."""
    what = "autoencoder" if config.model == "autoencoder" else config.likelihood
    return Path("runs") / f"{Path(config.data).stem}-{what}"
