"""Every setting of every command, as frozen dataclasses: flags, TOML keys and stored JSON in one.

Nothing here imports anything, so that ``pyrovae --help`` answers at once.
"""

from dataclasses import dataclass, field
from typing import Any

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
    "model": ("vae", "hierarchical", "autoencoder"),
    "prior": ("standard-normal", "mixture", "vamp", "flow"),
    "posterior": ("mean-field", "full-rank", "flow"),
    "network": ("mlp", "gated-mlp", "conv28", "conv64", "residual", "gated-conv"),
    "objective": ("elbo", "mean-field", "iwae", "stl", "dreg"),
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
    "optimizer": ("adam", "adamw", "adamax", "shampoo"),
    "schedule": ("constant", "cosine", "iwae"),
    "preset": ("iwae", "iwae-2layer", "modern", "exemplar"),
    "binarize": ("auto", "none", "dynamic", "static", "threshold"),
    "dequantize": ("auto", "none", "uniform"),
    "split": ("train", "valid", "test"),
    "method": ("importance", "quadrature"),
    "proposal": ("guide", "wide", "defensive"),
    "start": ("prior", "guide"),
    "step_sizes": ("frozen", "adaptive"),
    "log": ("tensorboard",),
    "engine": ("auto", "svi", "compiled", "cuda-graph", "traced"),
    "evaluator": ("auto", "eager", "compiled"),
    "precision": ("fp32", "tf32", "bf16"),
}

Options = dict[str, Any]

# What NumPy's generators take, which draw the split.
LARGEST_SEED = 2**32 - 1


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


def _seed(help: str = "of the draws") -> Any:
    return _setting(0, help, least=0, most=LARGEST_SEED)


def _device() -> Any:
    return _setting("auto", "auto, cpu, cuda, cuda:1")


def _moved_data() -> Any:
    return _setting(None, "folder of the data, if it has moved since training", metavar="DIR")


def _split() -> Any:
    return _setting("test", "train, valid or test", names="split")


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of ``pyrovae train``; the defaults make the classic VAE."""

    preset: str | None = _setting(
        None,
        "settings to start from, which other flags override; see: pyrovae info presets",
        names="preset",
    )
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
    test_size: int | None = _setting(
        None, "images kept for the test, where none is published", least=1, group="data"
    )
    stream: bool = _setting(
        False,
        "leave the training images of a folder or a .npy on disk, and read them batch by batch: "
        "for what does not fit into memory",
        group="data",
    )
    workers: int | None = _setting(
        None,
        "processes that read streamed images ahead (default: one for each core, at most 4)",
        least=0,
        group="data",
    )

    model: str = _setting(
        "vae",
        "one layer of latents, a hierarchy of them, or squared error without any probability",
        names="model",
        group="model",
    )
    model_args: Options = _setting(  # noqa: RUF009
        {},
        "of the hierarchy, such as latents=100,50 structure=top-down upper_hidden=100,100",
        metavar="KEY=VALUE",
        group="model",
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
    init_gain: float = _setting(
        1.0,
        "size of the hidden layers' first weights, in units of the usual",
        above=0,
        most=100,
        group="model",
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
    optimizer: str = _setting(
        "adam",
        "shampoo: a matrix of second moments for each weight; fewer, dearer steps",
        names="optimizer",
    )
    lr: float = _setting(1e-3, "learning rate", above=0)
    adam_betas: tuple[float, ...] = _setting(
        (0.9, 0.999), "decays of the optimiser's two running moments", least=0, below=1
    )
    adam_eps: float = _setting(
        1e-8, "added to the root of the second moment; not of adamax", above=0
    )
    schedule: str = _setting(
        "constant",
        "of the learning rate; iwae: eight steps, from --lr to a tenth of it",
        names="schedule",
    )
    schedule_epochs: int | None = _setting(
        None, "length of the cosine schedule (default: --epochs)", least=1
    )
    warmup_epochs: float = _setting(
        0.0, "epochs over which the learning rate grows from 0, before the schedule", least=0
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
    validate_every: int = _setting(
        1, "epochs from one validation to the next; the last is always validated", least=1
    )
    engine: str = _setting(
        "auto",
        "svi: pyro.infer.SVI; compiled, cuda-graph: its step, traced once; auto: the fastest that "
        "pays",
        names="engine",
    )
    precision: str = _setting(
        "fp32", "of the networks' matrix products in training", names="precision"
    )
    seed: int = _seed("of initial weights, data order and draws")
    device: str = _device()
    final_particles: int = _setting(
        100, "K of the evaluation on the test split at the end; 0: none", least=0
    )
    log: str | None = _setting(None, "also write the metrics and pictures of epochs", names="log")


# What may be changed when a run is resumed; all else would make it another run.
RESUMABLE = (
    "epochs",
    "device",
    "final_particles",
    "data_root",
    "download",
    "patience",
    "log",
    "workers",
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Every setting of ``pyrovae evaluate``."""

    method: str = _setting(
        "importance", "quadrature: the truth, for one or two latents", names="method"
    )
    num_particles: int = _setting(1000, "K, draws of z per image", least=1)
    proposal: str = _setting(
        "guide", "what z is drawn from: the guide, inflated, or both in turn", names="proposal"
    )
    proposal_scale: float | None = _setting(
        None, "by how much the guide is inflated (default: 1.5)", above=1
    )
    engine: str = _setting(
        "auto",
        "eager: run the Pyro programs for every chunk; compiled: what was traced of them once; "
        "auto: compiled where that is repaid",
        names="evaluator",
    )
    precision: str = _setting(
        "fp32",
        "of the networks' matrix products; the lower ones score a model that rounds, say by how "
        "much it differs, and are not kept for compare",
        names="precision",
    )
    information: int = _setting(
        500, "images, the first ones, whose rate is split into its parts; 0: none", least=0
    )
    tolerance: float = _setting(1e-4, "of quadrature, in nats per image", above=0)
    max_draws: int = _setting(200, "draws of z per image that --export keeps", least=1)
    split: str = _split()
    limit: int | None = _setting(None, "only the first N images", least=1, metavar="N")
    seed: int = _seed()
    device: str = _device()
    data_root: str | None = _moved_data()


# What each method has no use for, which is refused and not ignored.
UNUSED = {
    "importance": ("tolerance",),
    "quadrature": (
        "num_particles",
        "proposal",
        "proposal_scale",
        "engine",
        "precision",
        "information",
        "seed",
    ),
}


@dataclass(frozen=True)
class AnnealConfig:
    """Every setting of ``pyrovae anneal``."""

    num_images: int = _setting(100, "the first ones of the split, or simulated", least=1)
    num_chains: int = _setting(16, "chains of each image", least=1)
    num_temperatures: int = _setting(1000, "steps from the start density to p(x, z)", least=1)
    num_leapfrog: int = _setting(10, "gradient evaluations of each transition", least=1)
    start: str = _setting("prior", "where chains begin: p(z), or q(z | x)", names="start")
    step_sizes: str = _setting(
        "frozen", "adaptive: each chain follows its own acceptance", names="step_sizes"
    )
    bdmc: bool = _setting(
        False, "bound log p(x) from both sides, on images simulated from the model"
    )
    split: str = _split()
    seed: int = _seed("of all noise")
    device: str = _device()
    data_root: str | None = _moved_data()


@dataclass(frozen=True)
class ScoreConfig:
    """Every setting of ``pyrovae score``."""

    num_particles: int = _setting(1000, "K, draws of z per image", least=1)
    num_reference: int = _setting(500, "training images that the percentile is of", least=1)
    seed: int = _seed()
    device: str = _device()
    data_root: str | None = _moved_data()


@dataclass(frozen=True)
class CompareConfig:
    """Every setting of ``pyrovae compare``."""

    num_particles: int | None = _setting(
        None, "K (default: the largest that all runs were evaluated with, or 1000)", least=1
    )
    split: str = _split()
    limit: int | None = _setting(None, "only the first N images", least=1, metavar="N")
    seed: int = _seed()
    device: str = _device()
    data_root: str | None = _moved_data()


@dataclass(frozen=True)
class SampleConfig:
    """Every setting of ``pyrovae sample``."""

    num_samples: int = _setting(64, "images to draw", least=1)
    mean: bool = _setting(False, "show E[x | z] in place of a draw of x")
    seed: int = _seed()
    device: str = _device()


@dataclass(frozen=True)
class ReconstructConfig:
    """Every setting of ``pyrovae reconstruct``."""

    num_images: int = _setting(16, "images to show", least=1)
    mean: bool = _setting(False, "show E[x | z] in place of a draw of x")
    split: str = _split()
    seed: int = _seed()
    device: str = _device()
    data_root: str | None = _moved_data()


@dataclass(frozen=True)
class InterpolateConfig:
    """Every setting of ``pyrovae interpolate``."""

    pairs: int = _setting(6, "pairs of images to walk between", least=1)
    steps: int = _setting(9, "points on each walk", least=2)
    split: str = _split()
    seed: int = _seed("of the choice of images")
    device: str = _device()
    data_root: str | None = _moved_data()


@dataclass(frozen=True)
class TraverseConfig:
    """Every setting of ``pyrovae traverse``."""

    latents: int = _setting(8, "latent dimensions to move, the most active ones", least=1)
    dims: tuple[int, ...] | None = _setting(None, "these dimensions instead, from 0", least=0)
    steps: int = _setting(9, "points on each walk", least=2)
    span: float = _setting(3.0, "half a walk, in standard deviations of the prior", above=0)
    image: int = _setting(0, "the image of the split that all walks pass by", least=0)
    split: str = _split()
    device: str = _device()
    data_root: str | None = _moved_data()


@dataclass(frozen=True)
class ReportConfig:
    """Every setting of ``pyrovae report``."""

    num_particles: int = _setting(1000, "K, draws of z per image", least=1)
    num_images: int | None = _setting(None, "only the first N test images", least=1, metavar="N")
    seed: int = _seed("of all draws")
    device: str = _device()
    data_root: str | None = _moved_data()


@dataclass(frozen=True)
class ExploreConfig:
    """Every setting of ``pyrovae explore``."""

    num_images: int = _setting(24, "test images to start from", least=2, most=200)
    seed: int = _seed("of what is drawn while the page is made")
    data_root: str | None = _moved_data()
