"""Every setting of a run as a frozen dataclass, and the one place where names become objects.

Nothing here imports torch until something is built, so that ``pyrovae --help`` answers at once.
"""

import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.errors import InputError

if TYPE_CHECKING:
    import inspect

    from pyrovae.data import Data, Protocol
    from pyrovae.runs import Run
    from pyrovae.vae import VAE

# The names that the registries hold, kept here too so that help needs no torch; a test holds the
# two together.
NAMES: dict[str, tuple[str, ...]] = {
    "likelihood": (
        "bernoulli",
        "continuous-bernoulli",
        "gaussian",
        "laplace",
        "student-t",
        "beta",
        "logit-normal",
        "discretized-logistic",
        "discretized-logistic-mixture",
        "categorical",
    ),
    "prior": ("standard-normal", "mixture", "vamp", "flow"),
    "posterior": ("mean-field", "full-rank", "flow"),
    "network": ("mlp", "gated-mlp", "conv28", "conv64", "residual"),
    "objective": ("elbo", "mean-field", "iwae"),
    "activation": ("tanh", "relu", "leaky-relu", "elu", "gelu", "silu", "softplus"),
    "data": (
        "digits",
        "sprites",
        "mnist",
        "fashion-mnist",
        "kmnist",
        "omniglot",
        "cifar10",
        "svhn",
        "celeba",
        "binarized-mnist",
    ),
    "optimizer": ("adam", "adamw", "adamax"),
    "schedule": ("constant", "cosine"),
    "binarize": ("auto", "none", "dynamic", "static", "threshold"),
    "dequantize": ("auto", "none", "uniform"),
    "split": ("train", "valid", "test"),
}

Options = dict[str, Any]

# What NumPy's generators take, which draw the split.
LARGEST_SEED = 2**32 - 1

# Training images that the output bias and the pseudo-inputs start from: at most so many, and so
# many pixels, since a mixture over large colour images is slow.
_INITIAL_IMAGES = 1000
_INITIAL_NUMBERS = 800_000


def _setting(
    default: Any,
    help: str,
    *,
    names: str | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    group: str = "run",
) -> Any:
    metadata = {
        "help": help,
        "names": names,
        "least": least,
        "most": most,
        "above": above,
        "below": below,
        "metavar": metavar,
        "group": group,
    }
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of ``pyrovae train``; the defaults make the classic VAE."""

    data: str = _setting(
        "digits", "data set by name, a folder of images, a .npy or a .npz", group="data"
    )
    data_root: str | None = _setting(
        None, "folder that holds the named data sets", metavar="DIR", group="data"
    )
    download: bool = _setting(False, "fetch the data set if it is missing", group="data")
    binarize: str = _setting(
        "auto",
        "dynamic: drawn anew at each use; static: drawn once; threshold; none; auto: dynamic for "
        "bernoulli, none otherwise",
        names="binarize",
        group="data",
    )
    dequantize: str = _setting(
        "auto",
        "add uniform noise within a level: uniform, none; auto: uniform for densities, none for "
        "masses",
        names="dequantize",
        group="data",
    )
    data_seed: int = _setting(
        0,
        "seed of the split and of whatever is sampled once",
        least=0,
        most=LARGEST_SEED,
        group="data",
    )
    valid_size: int | None = _setting(
        None, "images kept for validation (default: the data set's own)", least=1, group="data"
    )
    image_size: int | None = _setting(
        None, "resize the images of a folder to this square", least=1, group="data"
    )

    likelihood: str = _setting(
        "bernoulli", "p(x | z); see: pyrovae info likelihoods", names="likelihood", group="model"
    )
    likelihood_args: Options = _setting(  # noqa: RUF009
        {}, "its options, such as scale=learned components=10", metavar="KEY=VALUE", group="model"
    )
    network: str = _setting("mlp", "encoder and decoder", names="network", group="model")
    hidden: tuple[int, ...] | None = _setting(
        None, "widths of the layers (default: the network's own)", least=1, group="model"
    )
    activation: str | None = _setting(
        None, "between layers (default: the network's own)", names="activation", group="model"
    )
    latent_dim: int = _setting(50, "dimensions of z", least=1, group="model")
    prior: str = _setting("standard-normal", "p(z)", names="prior", group="model")
    prior_args: Options = _setting(  # noqa: RUF009
        {}, "its options, such as components=500", metavar="KEY=VALUE", group="model"
    )
    posterior: str = _setting("mean-field", "q(z | x)", names="posterior", group="model")
    posterior_args: Options = _setting(  # noqa: RUF009
        {}, "its options, such as transforms=4", metavar="KEY=VALUE", group="model"
    )

    objective: str = _setting("elbo", "the bound to raise", names="objective", group="objective")
    num_particles: int = _setting(1, "draws of z per image in training", least=1, group="objective")
    beta: float = _setting(1.0, "weight of the KL term", least=0, group="objective")
    kl_warmup: float = _setting(
        0.0, "epochs over which that weight grows from 0", least=0, group="objective"
    )
    free_bits: float = _setting(
        0.0, "nats per image of KL that cost nothing", least=0, group="objective"
    )

    epochs: int = _setting(100, "passes over the training images, in total", least=1)
    batch_size: int = _setting(128, "images a step", least=1)
    optimizer: str = _setting("adam", "adam, adamw or adamax", names="optimizer")
    lr: float = _setting(1e-3, "learning rate", above=0)
    schedule: str = _setting("constant", "of the learning rate", names="schedule")
    schedule_epochs: int | None = _setting(
        None, "length of the schedule (default: --epochs)", least=1
    )
    weight_decay: float = _setting(0.0, "of the optimiser", least=0)
    clip_norm: float | None = _setting(
        None, "largest gradient norm of the mean loss (default: no clipping)", above=0
    )
    ema: float | None = _setting(
        None,
        "decay of a moving average of the weights, such as 0.999 (default: none)",
        above=0,
        below=1,
    )
    patience: int | None = _setting(
        None, "stop after so many epochs without a better validation ELBO", least=1
    )
    seed: int = _setting(0, "of initial weights, data order and draws", least=0, most=LARGEST_SEED)
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1")
    final_particles: int = _setting(
        100, "K of the evaluation on the test split at the end; 0: none", least=0
    )


# What may be changed when a run is resumed; all else would make it another run.
RESUMABLE = ("epochs", "device", "final_particles", "data_root", "download", "patience")


@dataclass(frozen=True)
class EvaluateConfig:
    """Every setting of ``pyrovae evaluate``."""

    num_particles: int = _setting(1000, "K, draws of z per image", least=1)
    split: str = _setting("test", "train, valid or test", names="split")
    limit: int | None = _setting(None, "only the first N images", least=1, metavar="N")
    seed: int = _setting(0, "of the draws", least=0, most=LARGEST_SEED)
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1")
    data_root: str | None = _setting(
        None, "folder of the data, if it has moved since training", metavar="DIR"
    )


C = typing.TypeVar("C", TrainConfig, EvaluateConfig)


def field_type(f: "dataclasses.Field[Any]") -> tuple[type, bool, bool]:
    """A field's element type, whether it may be None, and whether it is a tuple of them."""
    annotation: Any = f.type
    optional = False
    if isinstance(annotation, types.UnionType):
        (annotation,) = [a for a in typing.get_args(annotation) if a is not type(None)]
        optional = True
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], optional, True
    return (dict if annotation == Options else annotation), optional, False


def make(cls: type[C], values: Mapping[str, Any]) -> C:
    """Build a configuration from plain values (flags, TOML or JSON), checking each.

    Raises:
        InputError: for an unknown name, a value of the wrong type, or one out of range.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise InputError(
                f"unknown setting {name!r}{did_you_mean(name, known)}; settings are flags such as "
                "batch_size; --out, --resume and the like are given on the command line alone"
            )
    return cls(**{name: _checked(known[name], value) for name, value in values.items()})


def _checked(f: "dataclasses.Field[Any]", value: Any) -> Any:
    flag = "--" + f.name.replace("_", "-")
    kind, optional, many = field_type(f)
    if value is None and optional:
        return None
    if kind is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{flag} expects KEY=VALUE pairs, got {value!r}")
        return dict(value)
    if many:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_element(f, flag, kind, v) for v in values)
    return _element(f, flag, kind, value)


def _element(f: "dataclasses.Field[Any]", flag: str, kind: type, value: Any) -> Any:
    limits = f.metadata
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
        raise InputError(f"{flag} expects {expected[kind]}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{flag} expects a finite number, got {value}")
    if limits["least"] is not None and value < limits["least"]:
        raise InputError(f"{flag} must be at least {limits['least']:g}, got {value}")
    if limits["most"] is not None and value > limits["most"]:
        raise InputError(f"{flag} must be at most {limits['most']}, got {value}")
    if limits["above"] is not None and value <= limits["above"]:
        raise InputError(f"{flag} must be above {limits['above']:g}, got {value}")
    if limits["below"] is not None and value >= limits["below"]:
        raise InputError(f"{flag} must be below {limits['below']:g}, got {value}")
    if limits["names"] is not None and value not in NAMES[limits["names"]]:
        raise InputError(unknown_name(flag, str(value), NAMES[limits["names"]]))
    return value


def unknown_name(what: str, got: str, known: Iterable[str]) -> str:
    """One line: what was expected, what came, and the nearest name."""
    known = list(known)
    return f"{what} knows no {got!r}{did_you_mean(got, known)}; choose from {', '.join(known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)", or nothing if no name is near."""
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings from a TOML file; names may be written with - or _."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise InputError(f"there is no configuration file {path}; check --config") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}; write lines such as epochs = 10") from None
    return {name.replace("-", "_"): value for name, value in values.items()}


def resolve(config: TrainConfig) -> TrainConfig:
    """Replace every "auto" that depends on another setting, and refuse settings that clash.

    Raises:
        InputError: for options a choice does not know, and pairs that have no meaning together.
    """
    from pyrovae import likelihoods, posteriors, priors

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
    if config.binarize != "none" and likelihood.kind == "density":
        raise InputError(
            f"--binarize {config.binarize} makes x 0 or 1, where the density {config.likelihood} "
            "has no meaning; leave --binarize at auto, or use --likelihood bernoulli"
        )
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
    if config.objective == "iwae":
        for name, default in (("beta", 1.0), ("kl_warmup", 0.0), ("free_bits", 0.0)):
            if getattr(config, name) != default:
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"{flag} changes the KL term, and the importance-weighted bound (iwae) has "
                    f"none; leave {flag} at {default:g} or use --objective elbo"
                )
    if config.schedule_epochs is not None and config.schedule == "constant":
        raise InputError("--schedule-epochs has no use with --schedule constant; leave it out")
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
        image_size=config.image_size,
    )


def build(config: TrainConfig, data: "Data") -> "VAE":
    """The VAE that a resolved configuration names, with weights drawn from its seed."""
    return _build(config, data.x_shape, data.protocol.levels, data)


def _build(
    config: TrainConfig, x_shape: tuple[int, ...], levels: int | None, data: "Data | None"
) -> "VAE":
    import torch

    from pyrovae import likelihoods, networks, posteriors, priors
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        likelihood = _construct(
            "--likelihood", likelihood_class, config.likelihood_args, (x_shape,), fixed
        )
        posterior = _construct(
            "--posterior",
            posteriors.REGISTRY[config.posterior],
            config.posterior_args,
            (pair.encoder(x_shape, **shape), config.latent_dim),
        )
        prior_class = priors.REGISTRY[config.prior]
        first = (posterior, x_shape) if prior_class.needs_posterior else (config.latent_dim,)
        prior = _construct("--prior", prior_class, config.prior_args, first)
        decoder = pair.decoder(config.latent_dim, likelihood.params_shape, **shape)
        vae = VAE(prior=prior, posterior=posterior, decoder=decoder, likelihood=likelihood)
        if data is not None:
            count = min(_INITIAL_IMAGES, max(64, _INITIAL_NUMBERS // math.prod(x_shape)))
            generator = torch.Generator().manual_seed(config.seed)
            index = torch.randperm(len(data.train), generator=generator)[:count]
            vae.initialize(data.train.batch(index, generator))
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an error met in the content of a file into one line that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is damaged or edited: {reason}; restore it from a copy") from None


def load(run: "Run | str | os.PathLike[str]", *, device: str = "cpu") -> "VAE":
    """The VAE of a run, with its best weights.

    Raises:
        InputError: if the directory is not a run, or its checkpoint cannot be read.
    """
    from pyrovae import training
    from pyrovae.runs import Run, load_checkpoint

    run = run if isinstance(run, Run) else Run(run)
    config = run_config(run)
    x_shape, protocol = run_data(run)
    vae = _build(config, x_shape, protocol.levels, None)
    checkpoint = run.best if run.best.exists() else run.last
    where = training.resolve_device(device)
    try:
        vae.load_state_dict(load_checkpoint(checkpoint, where)["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{checkpoint} does not fit config.json ({reason})") from None
    return vae.to(where).eval()


def default_out(config: TrainConfig) -> Path:
    """Where a run goes that was given no --out."""
    return Path("runs") / f"{Path(config.data).stem}-{config.likelihood}"
