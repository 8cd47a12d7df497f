"""Every row: its name, the published number and its protocol, and our settings."""

from typing import Any, NamedTuple

# What is decided in one place: how long each table is trained, and K of its evaluation on test
# (but for the rows of _OWN_PLAN).
EPOCHS = {
    "iwae": 600,
    "static": 200,
    "exemplar-mnist": 250,
    "exemplar-mnist-vamp": 200,
    "exemplar-fashion": 250,
    "exemplar-fashion-vamp": 150,
    "likelihoods": 10,
    "clothing64": 6,
}
PARTICLES = {"iwae": 5000, "static": 5000, "exemplar": 5000, "likelihoods": 100, "clothing64": 16}

Settings = dict[str, Any]


class Published(NamedTuple):
    """A number of a paper, in nats per image: minus log p(x), lower is better."""

    nats: float
    error: float | None
    """Its ±, over the paper's runs; None where the paper gives none."""
    source: str


class Row(NamedTuple):
    """One row of a table: one model, trained with our settings."""

    table: str
    name: str
    title: str
    settings: Settings
    """Of ``pyrovae train``, but for seed, device and places."""
    particles: int
    published: Published | None = None
    gpu: bool = False
    """Too long for a CPU: left out unless it is named or there is a GPU."""


_BURDA = "Burda, Grosse and Salakhutdinov (2016), https://arxiv.org/abs/1509.00519"
_NOROUZI = "Norouzi, Fleet and Norouzi (2020), https://arxiv.org/abs/2004.04795"

_PLANS = (
    "Products of the networks are in bfloat16 in training where the list of what the rows train "
    "says so, in float32 after it. Epochs, precision and weight decay differ from row to row: rows "
    "of ours are not to be compared with each other before one looks there."
)

# The protocol behind the numbers of each table, beside which ours is to be read.
PROTOCOLS = {
    "iwae": f"Published: {_BURDA}; dynamic MNIST, 59,600 training images (of the released code, "
    "https://github.com/yburda/iwae), 784-200-200-50 tanh networks (two layers: 100 and 50 "
    "latents), batch 20, Adam with β1 0.99 and ε 1e-4 on summed gradients, eight stages of the "
    "learning rate over 3,280 epochs, the last weights; K = 5000. Ours: 59,000 training images "
    "(the released rows: 59,600), the weights of the best validation ELBO on the others. "
    f"{_PLANS}",
    "static": f"Published: {_BURDA}; the same networks and training on the 50,000 images of "
    "Larochelle's binarisation; K = 5000. Ours: the same images, the weights of the best "
    f"validation ELBO on the 10,000 that were published for validation. {_PLANS}",
    "exemplar": f"Published: {_NOROUZI}; 50,000 training images, re-binarised at each use, valid "
    "and test binarised once; gated networks of 300 and 300, 40 latents, batch 100, Adam with "
    "normalised gradients at 5e-4, β warm-up over 100 epochs, patience 50, ± over runs; K = 5000. "
    "Ours: the same images, the same networks for the VAE, the weights of the best validation "
    "ELBO on the other 10,000. The networks of our HVAE and ConvHVAE have their sizes and not "
    f"their every detail: both posteriors read x through one kind of encoder. {_PLANS}",
    "likelihoods": "No number was published. One set of networks for each data set, trained for "
    "the same few epochs with each likelihood that its levels allow; masses on the levels as they "
    "are, densities on dequantised levels. Gradients are clipped to a norm of 100, without which "
    "a scale for each pixel can undo in one step what epochs have done.",
}

# Validation on 10,000 images is a good part of the cost of an epoch.
_SELDOM: Settings = {"validate_every": 10}

# Products of the networks in bfloat16 while they are trained, never while they are evaluated.
_ROUNDED: Settings = {"precision": "bf16"}
_MNIST: Settings = {"data": "mnist", "binarize": "dynamic", "valid_size": 1000}
_TANH: Settings = {"hidden": [200, 200], "activation": "tanh", "init_gain": 0.4}
_ONE_LAYER: Settings = _TANH | {"latent_dim": 50}
_TWO_LAYERS: Settings = {
    "model": "hierarchical",
    "model_args": {"latents": [100, 50], "structure": "bottom-up", "upper_hidden": [100, 100]},
    **_TANH,
}

# What rows have that their tables have not, chosen by validation: see benchmarks/optimisers.md.
_OWN_PLAN: dict[tuple[str, str], Settings] = {
    ("iwae", "iwae-k5"): {"epochs": 500},
    # 28 of 40 latents are in use with it, 11 without; with a VampPrior 39 and 20.
    ("exemplar", "vae-fashion"): {"kl_warmup": 50},
    ("exemplar", "vae-fashion-vamp"): {"kl_warmup": 50},
}


def _bound(objective: str, k: int) -> Settings:
    """The bound of k draws; of the ELBO and of IWAE's by their quieter gradients, stl and dreg."""
    return {} if k == 1 else {"objective": objective, "num_particles": k}


def _burda(
    name: str, title: str, nats: float, settings: Settings, table: str = "iwae", gpu: bool = False
) -> Row:
    plan: Settings = {}
    if settings["preset"] == "modern":
        ours: Settings = {"epochs": EPOCHS[table], **_ROUNDED}
        plan = ours | _OWN_PLAN.get((table, name), {}) | _SELDOM
    published = Published(nats, None, _BURDA)
    return Row(table, name, title, {**settings, **plan}, PARTICLES[table], published, gpu)


def _iwae() -> list[Row]:
    one: Settings = {"preset": "modern", **_MNIST, **_ONE_LAYER}
    two: Settings = {"preset": "modern", **_MNIST, **_TWO_LAYERS}
    return [
        _burda("vae-k1", "VAE, 1 layer, k = 1", 86.76, one),
        _burda("iwae-k5", "IWAE, 1 layer, k = 5", 85.54, one | _bound("dreg", 5)),
        _burda("vae-k5", "VAE, 1 layer, k = 5", 86.47, one | _bound("stl", 5)),
        _burda("iwae-k50", "IWAE, 1 layer, k = 50", 84.78, one | _bound("dreg", 50), gpu=True),
        _burda("2layer-k1", "VAE, 2 layers, k = 1", 85.33, two, gpu=True),
        _burda("2layer-k5", "IWAE, 2 layers, k = 5", 83.89, two | _bound("dreg", 5), gpu=True),
        _burda("2layer-k50", "IWAE, 2 layers, k = 50", 82.90, two | _bound("dreg", 50), gpu=True),
        _burda(
            "released-k1",
            "VAE, 1 layer, k = 1, the released 3,280 epochs",
            86.76,
            {"preset": "iwae"},
            gpu=True,
        ),
        _burda(
            "released-k50",
            "IWAE, 1 layer, k = 50, the released 3,280 epochs",
            84.78,
            {"preset": "iwae"} | _bound("iwae", 50),
            gpu=True,
        ),
    ]


def _static() -> list[Row]:
    one: Settings = {
        "preset": "modern",
        "data": "binarized-mnist",
        **_ONE_LAYER,
        # Images that are the same in every epoch are learnt by heart: see benchmarks/optimisers.md.
        "weight_decay": 0.03,
    }
    return [
        _burda("vae-k1", "VAE, 1 layer, k = 1", 88.71, one, "static"),
        _burda("iwae-k5", "IWAE, 1 layer, k = 5", 87.63, one | _bound("dreg", 5), "static"),
    ]


# Gated layers have adam, for the time it takes, and weight decay, with which it gets further: see
# benchmarks/optimisers.md.
_DECAYED: Settings = {"optimizer": "adamw", "weight_decay": 0.03, **_ROUNDED}
_HVAE: Settings = {
    "model": "hierarchical",
    "model_args": {"latents": [40, 40], "structure": "top-down", "upper_hidden": [300, 300]},
}
_VAMP: Settings = {"prior": "vamp", "prior_args": {"components": 500}}
_GATED: Settings = {"network": "gated-mlp", "hidden": [300, 300]}

# Of the paper's table: the model, whether it needs a GPU, and its numbers by data set and prior.
_EXEMPLAR: tuple[tuple[str, str, bool, Settings, dict[str, tuple[float, float | None]]], ...] = (
    (
        "vae",
        "VAE",
        False,
        _GATED | {"latent_dim": 40},
        {
            "mnist": (84.45, 0.12),
            "mnist-vamp": (82.43, 0.06),
            "fashion": (228.70, 0.15),
            "fashion-vamp": (227.35, 0.05),
        },
    ),
    (
        "hvae",
        "HVAE",
        True,
        _GATED | _HVAE,
        {
            "mnist": (82.39, None),
            "mnist-vamp": (81.56, None),
            "fashion": (227.37, None),
            "fashion-vamp": (226.72, None),
        },
    ),
    (
        "convhvae",
        "ConvHVAE",
        True,
        {"network": "gated-conv"} | _HVAE,
        {
            "mnist": (80.52, None),
            "mnist-vamp": (79.67, None),
            "fashion": (225.38, None),
            "fashion-vamp": (224.67, None),
        },
    ),
)


def _exemplar() -> list[Row]:
    rows = []
    for model, title, gpu, settings, numbers in _EXEMPLAR:
        for case, (nats, error) in numbers.items():
            data, _, vamp = case.partition("-")
            name = "mnist" if data == "mnist" else "fashion-mnist"
            said = "MNIST" if data == "mnist" else "Fashion-MNIST"
            given: Settings = {
                "preset": "modern",
                "data": name,
                "binarize": "dynamic",
                "valid_size": 10_000,
                **_DECAYED,
                "epochs": EPOCHS[f"exemplar-{case}"],
                **_OWN_PLAN.get(("exemplar", f"{model}-{case}"), {}),
                **_SELDOM,
                **settings,
                **(_VAMP if vamp else {}),
            }
            prior = "VampPrior (500)" if vamp else "normal prior"
            published = Published(nats, error, _NOROUZI)
            words = f"{title}, {prior}, {said}"
            k = PARTICLES["exemplar"]
            rows.append(Row("exemplar", f"{model}-{case}", words, given, k, published, gpu))
    return rows


# Every likelihood that 256 levels allow; one may be there twice, with other options.
LIKELIHOODS: dict[str, Settings] = {
    "categorical": {"likelihood": "categorical"},
    "discretized-logistic": {"likelihood": "discretized-logistic"},
    "discretized-logistic-mixture": {"likelihood": "discretized-logistic-mixture"},
    "coupled-mixture": {
        "likelihood": "discretized-logistic-mixture",
        "likelihood_args": {"coupling": True},
    },
    "gaussian": {"likelihood": "gaussian", "likelihood_args": {"scale": "learned"}},
    "gaussian-per-pixel": {"likelihood": "gaussian", "likelihood_args": {"scale": "per-pixel"}},
    "laplace": {"likelihood": "laplace", "likelihood_args": {"scale": "per-pixel"}},
    "student-t": {"likelihood": "student-t", "likelihood_args": {"scale": "per-pixel"}},
    "beta": {"likelihood": "beta"},
    "logit-normal": {"likelihood": "logit-normal"},
    "continuous-bernoulli": {"likelihood": "continuous-bernoulli"},
}

# The data sets on which they are compared; a name with a suffix is a file of the data folder.
PICTURES: dict[str, tuple[str, Settings]] = {
    "mnist": ("MNIST, 28×28, 8 bits", {"data": "mnist", "valid_size": 1000}),
    "fashion": ("Fashion-MNIST, 28×28, 8 bits", {"data": "fashion-mnist", "valid_size": 1000}),
    "clothing64": (
        "photographs of clothes, 64×64×3, 8 bits",
        {"data": "clothing64.npz", "network": "conv64", "batch_size": 64},
    ),
}


def _likelihoods() -> list[Row]:
    rows = []
    for data, (_, place) in PICTURES.items():
        plan = data if data in EPOCHS else "likelihoods"
        shape = {} if "network" in place else {"hidden": [200, 200]}
        for name, likelihood in LIKELIHOODS.items():
            if name == "coupled-mixture" and data != "clothing64":
                continue  # which couples colours
            given: Settings = {
                "preset": "modern",
                **place,
                **shape,
                "latent_dim": 50,
                "optimizer": "adam",  # one for all, whatever the width of the last layer
                "clip_norm": 100.0,  # else scales for each pixel make steps that undo epochs
                "epochs": EPOCHS[plan],
                **likelihood,
            }
            k = PARTICLES[plan]
            rows.append(Row("likelihoods", f"{data}-{name}", name, given, k))
    return rows


TABLES: dict[str, dict[str, Row]] = {
    table: {row.name: row for row in rows}
    for table, rows in (
        ("iwae", _iwae()),
        ("static", _static()),
        ("exemplar", _exemplar()),
        ("likelihoods", _likelihoods()),
    )
}
