"""Sets of settings by name, for ``--preset``, and settings as flags; imports nothing.

Flags and lines of a file override a preset, and a run stores the values that came of it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """What it is, and the settings of ``pyrovae train`` that it gives."""

    summary: str
    settings: dict[str, Any]


# As github.com/yburda/iwae has it: 59,600 images in 20s for 3,280 epochs, 9,774,400 steps. Other
# there: images keep their order, weights begin uniform (Glorot), Adam's second moments begin at 1
# and get epsilon before their bias is corrected, and the last weights are the result.
_RELEASED: dict[str, Any] = {
    "data": "mnist",
    "binarize": "dynamic",
    "valid_size": 400,
    "likelihood": "bernoulli",
    "network": "mlp",
    "activation": "tanh",
    "hidden": (200, 200),
    "batch_size": 20,
    "optimizer": "adam",
    "lr": 1e-3,
    "adam_betas": (0.99, 0.999),
    "adam_eps": 5e-6,  # theirs is 1e-4, for gradients that are summed over the 20 images
    "schedule": "iwae",
    "epochs": 3280,
}

PRESETS: dict[str, Preset] = {
    "iwae": Preset(
        "the released protocol of Burda et al. (2016): 50 latents, batch 20, 3,280 epochs",
        {**_RELEASED, "latent_dim": 50},
    ),
    "iwae-2layer": Preset(
        "the same with two layers of latents, 100 and 50",
        {
            **_RELEASED,
            "model": "hierarchical",
            "model_args": {
                "latents": [100, 50],
                "structure": "bottom-up",
                "upper_hidden": [100, 100],
            },
        },
    ),
    "modern": Preset(
        "shampoo, quieter gradients, larger batches, warm-up and cosine decay, averaged weights",
        {
            "batch_size": 128,
            "objective": "stl",
            "optimizer": "shampoo",
            "lr": 3e-3,
            "schedule": "cosine",
            "warmup_epochs": 1.0,
            "ema": 0.999,
        },
    ),
    "exemplar": Preset(
        "the VAE of Norouzi et al. (2020): gated layers, 40 latents, KL warm-up, patience",
        {
            "data": "mnist",
            "binarize": "dynamic",
            "valid_size": 10_000,
            "likelihood": "bernoulli",
            "network": "gated-mlp",
            "hidden": (300, 300),
            "latent_dim": 40,
            "batch_size": 100,
            "optimizer": "adam",
            "lr": 5e-4,
            "kl_warmup": 100.0,
            "epochs": 2000,
            "patience": 50,
        },
    ),
}


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the words of a command line.

    >>> flags({"hidden": (8, 8), "prior_args": {"components": 5}, "download": True, "ema": None})
    ['--hidden', '8', '8', '--prior-args', 'components=5', '--download']
    """
    words = []
    for name, value in settings.items():
        if value is None or value is False:  # which no flag can say, and which is the default
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, Mapping):
            words += [f"{key}={_plain(part)}" for key, part in value.items()]
        elif isinstance(value, (list, tuple)):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_plain, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
