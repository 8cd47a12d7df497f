"""A laboratory for variational autoencoders in Pyro whose likelihoods can be trusted.

Submodules and the handful of top-level names load on first use, so that ``import pyrovae``
(and ``pyrovae --help``) does not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrovae.config import load
    from pyrovae.errors import InputError
    from pyrovae.evaluation import Evaluation, evaluate
    from pyrovae.importance import log_weights
    from pyrovae.training import fit
    from pyrovae.vae import VAE

__version__ = "0.1.0"
__all__ = ["VAE", "Evaluation", "InputError", "evaluate", "fit", "load", "log_weights"]

_HOME = {
    "VAE": "vae",
    "Evaluation": "evaluation",
    "InputError": "errors",
    "evaluate": "evaluation",
    "fit": "training",
    "load": "config",
    "log_weights": "importance",
}
_MODULES = (
    "acceleration",
    "annealing",
    "autoencoder",
    "cli",
    "comparison",
    "compiled_terms",
    "config",
    "data",
    "diagnostics",
    "distributions",
    "errors",
    "evaluation",
    "explore",
    "export",
    "hierarchical",
    "hmc",
    "importance",
    "information",
    "layers",
    "likelihoods",
    "networks",
    "objectives",
    "optimizers",
    "pathwise",
    "pictures",
    "plots",
    "posteriors",
    "priors",
    "proposals",
    "quadrature",
    "report",
    "runs",
    "scoring",
    "shampoo",
    "sharing",
    "tracking",
    "training",
    "vae",
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"pyrovae.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"pyrovae.{name}")
    raise AttributeError(f"module 'pyrovae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
