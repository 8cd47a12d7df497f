"""The networks of a hierarchy: what reads x, what reads a layer for the next, and all together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae import networks
from pyrovae.hierarchical import HierarchicalVAE, check_structure
from pyrovae.likelihoods import Likelihood
from pyrovae.networks import checked_sizes
from pyrovae.posteriors import MeanField, Posterior
from pyrovae.priors import Prior


@dataclass(frozen=True)
class Layers:
    """The shape of a hierarchy: what ``--model-args`` of ``--model hierarchical`` takes.

    Args:
        latents: dimensions of z1, ..., zL, from x upwards; at least two layers.
        structure: "bottom-up" or "top-down"; see `HierarchicalVAE`.
        upper_hidden: widths of the networks between one layer and the next.

    Raises:
        InputError: for anything else.

    >>> Layers(latents=(40, 40), structure="top-down", upper_hidden=(300, 300)).latents
    (40, 40)
    """

    latents: tuple[int, ...] = (100, 50)
    structure: str = "bottom-up"
    upper_hidden: tuple[int, ...] = (100, 100)

    def __post_init__(self) -> None:
        for name, least in (("latents", 2), ("upper_hidden", 0)):
            sizes = checked_sizes(getattr(self, name), f"{name} (--model-args)", least=least)
            object.__setattr__(self, name, sizes)
        check_structure(self.structure)


class JointEncoder(nn.Module):
    """Features of x and of the z above a layer: both are read apart, then together.

    x (*B, *x_shape) and z (*K, *B, D) broadcast: x is read once, however many z there are for it.

    >>> of_x = networks.MLPEncoder((1, 8, 8), hidden=(16,))
    >>> of_z = networks.MLPEncoder((3,), hidden=(16,))
    >>> joint = JointEncoder(of_x, of_z, networks.MLPEncoder((32,), hidden=(20,)))
    >>> joint(torch.zeros(5, 1, 8, 8), torch.zeros(7, 5, 3)).shape
    torch.Size([7, 5, 20])
    """

    def __init__(self, of_x: nn.Module, of_z: nn.Module, joint: networks.Encoder):
        super().__init__()
        self.of_x = of_x
        self.of_z = of_z
        self.joint = joint
        self.out_features = joint.out_features

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Map x (*B, *x_shape) and z (*K, *B, D) to features (*K, *B, out_features)."""
        parts = [self.of_x(x), self.of_z(z)]
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return self.joint(torch.cat([part.expand(*batch, -1) for part in parts], -1))


def stack(
    layers: Layers,
    likelihood: Likelihood,
    prior: Prior | Callable[[Posterior], Prior],
    network: str = "mlp",
    *,
    hidden: Sequence[int] | None = None,
    activation: str | None = None,
    posterior: Callable[[Any, int], Posterior] = MeanField,
) -> HierarchicalVAE:
    """A HierarchicalVAE whose networks are all of one kind.

    Networks between layers are dense: of the same kind as ``network`` where that takes vectors.

    Args:
        layers: the shape of the hierarchy.
        likelihood: p(x | z).
        prior: p(zL), or what makes it from q(zL | x), as a VampPrior is made.
        network: a name in `networks.REGISTRY`, for what reads and writes x.
        hidden: its widths.
        activation: its activation; None: the network's own.
        posterior: makes a family q from an encoder and a number of dimensions.

    Raises:
        InputError: if the parts do not fit together.
    """
    pair, between = networks.REGISTRY[network], networks.REGISTRY["mlp"].encoder
    if pair.encoder.x_shapes == "any":
        between = pair.encoder
    else:
        activation = activation or pair.encoder.default_activation
    x_shape, sizes, widths = likelihood.x_shape, layers.latents, layers.upper_hidden
    top_down = layers.structure == "top-down"

    def of_x() -> networks.Encoder:
        return pair.encoder(x_shape, hidden, activation)

    def of_z(size: int, widths: tuple[int, ...]) -> networks.Encoder:
        return between((size,), widths, activation)

    def of_both(size: int) -> JointEncoder:
        x, z = of_x(), of_z(size, widths[:-1])
        return JointEncoder(x, z, of_z(x.out_features + z.out_features, widths[-1:]))

    if top_down:
        encoders: list[Any] = [of_both(sum(sizes[i:])) for i in range(1, len(sizes))]
        encoders.append(of_x())
    else:
        encoders = [of_x(), *(of_z(size, widths) for size in sizes[:-1])]
    posteriors = [posterior(net, size) for net, size in zip(encoders, sizes, strict=True)]
    conditionals = [
        MeanField(of_z(above, widths), size)
        for above, size in zip(sizes[1:], sizes[:-1], strict=True)
    ]
    for part in (*conditionals, *posteriors):
        _start_near_normal(part)
    return HierarchicalVAE(
        prior=prior if isinstance(prior, Prior) else prior(posteriors[-1]),
        conditionals=conditionals,
        posteriors=posteriors,
        decoder=pair.decoder(
            sum(sizes) if top_down else sizes[0], likelihood.params_shape, hidden, activation
        ),
        likelihood=likelihood,
        structure=layers.structure,
    )


def _start_near_normal(part: Posterior) -> None:
    """Shrink the last layer, so that a fresh layer of latents is nearly standard normal.

    Each layer's KL is between two networks' outputs: where both start wide apart in scale, the
    first bound is thousands of nats low.
    """
    head = getattr(part, "head", None)
    if isinstance(head, nn.Linear):
        with torch.no_grad():
            head.weight *= networks.SMALL_GAIN
