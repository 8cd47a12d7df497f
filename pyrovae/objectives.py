"""Training objectives: Pyro's own ELBO objects, two more, and handlers that reshape the KL term.

A handler goes around the two programs while they are trained. The VAE never hears of it, so that
no evaluation can be touched by a KL weight or by free bits.
"""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyrovae.errors import InputError
from pyrovae.pathwise import DoublyReparameterized, StickingTheLanding

Program = Callable[[Tensor], Any]


def elbo(num_particles: int = 1) -> Trace_ELBO:
    """The evidence lower bound, E_q[log p(x, z) - log q(z | x)], by Monte Carlo in every term.

    Args:
        num_particles: draws of z per image; they lower the variance, not the bound's slack.

    >>> type(elbo()).__name__
    'Trace_ELBO'
    """
    return Trace_ELBO(**_particles(num_particles))


def mean_field(num_particles: int = 1) -> TraceMeanField_ELBO:
    """The same bound with KL(q(z | x) || p(z)) in closed form.

    Exact for posteriors and priors with ``closed_form_kl`` (mean-field or full-rank posterior,
    standard-normal prior); Pyro falls back on Monte Carlo for any other pair, without a word.

    >>> type(mean_field()).__name__
    'TraceMeanField_ELBO'
    """
    return TraceMeanField_ELBO(**_particles(num_particles))


def iwae(num_particles: int = 5) -> RenyiELBO:
    """The importance-weighted bound, E[log (1/K) sum_k w_k], w_k = p(x, z_k) / q(z_k | x).

    Source: Burda et al., Importance Weighted Autoencoders (2016),
    https://arxiv.org/abs/1509.00519

    Args:
        num_particles: K; the bound rises to log p(x) with K, and K = 1 is the ELBO.

    >>> type(iwae()).__name__
    'RenyiELBO'
    """
    return RenyiELBO(alpha=0, **_particles(num_particles))


def stl(num_particles: int = 1) -> StickingTheLanding:
    """The ELBO, with a gradient that reaches the guide through the draws alone.

    What it leaves out, the score d log q(z | x) / d phi at a fixed z, has mean zero: the gradient
    is unbiased, and exactly zero for the guide once q is the posterior.

    Source: Roeder, Wu and Duvenaud, Sticking the Landing (2017), https://arxiv.org/abs/1703.09194

    Args:
        num_particles: draws of z per image; they lower the variance, not the bound's slack.

    >>> type(stl()).__name__
    'StickingTheLanding'
    """
    return StickingTheLanding(num_particles)


def dreg(num_particles: int = 5) -> DoublyReparameterized:
    """The importance-weighted bound of ``iwae``, with doubly reparameterised gradients.

    For the guide, sum_k v_k^2 (d log w_k / d z_k) (d z_k / d phi) with v_k = w_k / sum_j w_j; for
    the model, the gradient of ``iwae``. Unbiased; where the guide's signal drowns in the noise of
    ``iwae`` as K grows, here it does not.

    Source: Tucker et al., Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives
    (2019), https://arxiv.org/abs/1810.04152

    Args:
        num_particles: K; the bound rises to log p(x) with K, and K = 1 is the ELBO.

    >>> type(dreg()).__name__
    'DoublyReparameterized'
    """
    return DoublyReparameterized(num_particles)


def _particles(num_particles: int) -> dict[str, Any]:
    if num_particles < 1:
        raise InputError(f"num_particles must be at least 1, got {num_particles}")
    return {
        "num_particles": num_particles,
        "vectorize_particles": True,
        "max_plate_nesting": 1,
    }


class KLWeight(Messenger):
    """Multiplies the log-probability of every latent site by a weight: E_q[log p(x|z)] - w KL.

    Put around both programs. A weight of 1 changes nothing, 0 leaves reconstruction alone (Pyro's
    own ``poutine.scale`` refuses 0). The weight is a tensor, so that it may change between steps
    without the program being traced again.

    Source: Higgins et al., beta-VAE (2017), https://openreview.net/forum?id=Sy2fzU9gl

    >>> weight = KLWeight(0.5)
    >>> weight.set(1.0)
    >>> float(weight.value)
    1.0
    """

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.number = float(value)
        """The weight as Python knows it: nobody waits for a device to read it."""
        self.value = torch.tensor(self.number)

    def set(self, value: float) -> None:
        """Change the weight in place."""
        if float(value) != self.number:  # filling it is a kernel of its own on a GPU
            self.number = float(value)
            self.value.fill_(value)

    def to(self, device: torch.device) -> "KLWeight":
        """Move the weight to the device of the programs."""
        self.value = self.value.to(device)
        return self

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and not poutine.util.site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.value


def free_bits(
    model: Program, guide: Program, nats: float, *, closed_form: bool = False
) -> tuple[Program, Program]:
    """Programs whose ELBO pays no less than ``nats`` of KL per image for each latent site.

    The KL term of a site becomes max(nats, KL), the KL being averaged over the batch: below the
    floor its gradient vanishes, so the posterior has no reason to collapse further. A site is
    one of Kingma's groups; a VAE has one, "z". The KL must be the one that the objective pays:
    in closed form for ``mean_field``, from the draws for ``elbo``.

    Source: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow (2016),
    https://arxiv.org/abs/1606.04934

    Args:
        model: the generative program.
        guide: the inference program.
        nats: the floor, in nats per image, >= 0.
        closed_form: take KL(q || p) in closed form where torch knows it.
    """
    drawn: dict[str, tuple[Distribution, Tensor]] = {}

    def floored_guide(x: Tensor) -> Any:
        drawn.clear()
        with _Remember(drawn):
            return guide(x)

    def floored_model(x: Tensor) -> Any:
        with _Floor(drawn, nats, closed_form):
            return model(x)

    return floored_model, floored_guide


class _Remember(Messenger):
    def __init__(self, drawn: dict[str, tuple[Distribution, Tensor]]):
        super().__init__()
        self.drawn = drawn

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and not poutine.util.site_is_subsample(msg):
            self.drawn[msg["name"]] = (msg["fn"], msg["value"])


class _Floor(Messenger):
    def __init__(
        self, drawn: dict[str, tuple[Distribution, Tensor]], nats: float, closed_form: bool
    ):
        super().__init__()
        self.drawn = drawn
        self.nats = nats
        self.closed_form = closed_form

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.drawn or msg["is_observed"]:
            return
        q, z = self.drawn[msg["name"]]
        kl = self._kl(q, msg["fn"], z).mean()
        # ELBO - relu(floor - KL) is the ELBO with max(floor, KL) in place of KL: below the floor
        # the two KLs cancel, in value and in gradient. Scaled as the site is (a KL weight).
        short = torch.relu(self.nats - kl)
        pyro.factor(
            f"{msg['name']}_free_bits", -(short * msg["scale"]).expand(msg["fn"].batch_shape)
        )

    def _kl(self, q: Distribution, p: Distribution, z: Tensor) -> Tensor:
        if self.closed_form:
            try:
                return kl_divergence(q, p)
            except NotImplementedError:
                pass
        return q.log_prob(z) - p.log_prob(z)


def with_handlers(
    model: Program,
    guide: Program,
    objective: ELBO,
    *,
    weight: KLWeight | None = None,
    free_nats: float = 0.0,
) -> tuple[Program, Program]:
    """Put a KL weight and free bits around the programs; refuse what the objective cannot use.

    Raises:
        InputError: for free bits with an objective that cannot pay them: an importance-weighted
            one, which has no KL term of its own, or ``stl``.
    """
    if free_nats < 0:
        raise InputError(f"free bits must be at least 0 nats, got {free_nats}")
    if free_nats > 0:
        check_kl_term(objective, "--free-bits")
        closed_form = isinstance(objective, TraceMeanField_ELBO)
        model, guide = free_bits(model, guide, free_nats, closed_form=closed_form)
    if weight is not None:
        model, guide = weight(model), weight(guide)
    return model, guide


def check_kl_term(objective: ELBO, flag: str) -> None:
    """Refuse a setting of the KL term for an objective that has no use for it."""
    if isinstance(objective, RenyiELBO | DoublyReparameterized):
        name = "iwae" if isinstance(objective, RenyiELBO) else "dreg"
        raise InputError(
            f"{flag} changes the KL term, and the importance-weighted bound ({name}) has none; "
            f"leave {flag} at its default or use --objective elbo"
        )
    if flag == "--free-bits" and isinstance(objective, StickingTheLanding):
        # Below the floor the KL's gradient must vanish, which takes all of it, the score included.
        raise InputError(
            "--free-bits needs the whole gradient of the KL term, part of which stl leaves out; "
            "leave --free-bits at its default or use --objective elbo"
        )


REGISTRY: dict[str, Callable[[int], ELBO]] = {
    "elbo": elbo,
    "mean-field": mean_field,
    "iwae": iwae,
    "stl": stl,
    "dreg": dreg,
}
