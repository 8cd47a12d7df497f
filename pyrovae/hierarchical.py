"""A VAE with several stochastic layers: one more pair of Pyro programs, everything else unchanged.

The site "z1" is next to x and "zL" is the top; each is a vector of its own length.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyrovae.errors import InputError
from pyrovae.likelihoods import Likelihood
from pyrovae.priors import Prior
from pyrovae.vae import VAE, check_decoder, count_parameters, first_line, seeded

STRUCTURES = ("bottom-up", "top-down")

Draw = Callable[[str, Any], Tensor]


class HierarchicalVAE(VAE):
    """A VAE with L >= 2 layers: p(zL) prod_l p(z_l | z_l+1) p(x | z), and one of two guides.

    With the structure "bottom-up", x depends on z1 alone, and inference climbs from x:
    q(z1 | x) prod_l q(z_l+1 | z_l). With "top-down", x depends on every layer, and inference goes
    the way of the model: q(zL | x) prod_l q(z_l | x, z_l+1, ..., zL), as the posterior does. There
    the top prior may be a VampPrior, whose pseudo-inputs go through q(zL | x).

    As one vector, z (*B, D) is all layers end to end, in the order in which the guide draws them
    (`sites`), and D is the sum of their dimensions.

    Args:
        prior: p(zL).
        conditionals: p(z1 | z2), ..., p(zL-1 | zL): each maps z (*B, D) to a distribution.
        posteriors: L families. Bottom-up: q(z1 | x), q(z2 | z1), ... Top-down: the last is
            q(zL | x), and each other has a `layers.JointEncoder`, to read x, and all the z above
            end to end.
        decoder: maps z1 (bottom-up), or z1, ..., zL end to end (top-down), to parameters.
        likelihood: p(x | z).
        structure: "bottom-up" or "top-down".

    Raises:
        InputError: if the parts do not fit together, with what was expected, got, and to change.

    Source: bottom-up: Burda et al., Importance Weighted Autoencoders (2016),
    https://arxiv.org/abs/1509.00519; top-down: Tomczak and Welling, VAE with a VampPrior (2018),
    https://arxiv.org/abs/1705.07120

    >>> from pyrovae import likelihoods, priors
    >>> from pyrovae.layers import Layers, stack
    >>> likelihood = likelihoods.Bernoulli((1, 8, 8))
    >>> layers = Layers(latents=(4, 2), upper_hidden=(8,))
    >>> vae = stack(layers, likelihood, priors.StandardNormal(2), "mlp", hidden=(16,))
    >>> vae.generate(3, seed=0).shape, vae.sites
    (torch.Size([3, 1, 8, 8]), ('z1', 'z2'))
    """

    def __init__(
        self,
        *,
        prior: Prior,
        conditionals: Sequence[nn.Module],
        posteriors: Sequence[nn.Module],
        decoder: nn.Module,
        likelihood: Likelihood,
        structure: str = "bottom-up",
    ):
        nn.Module.__init__(self)
        check_structure(structure)
        self.structure = structure
        self.prior = prior
        self.conditionals = nn.ModuleList(conditionals)
        self.posteriors = nn.ModuleList(posteriors)
        self.decoder = decoder
        self.likelihood = likelihood
        self._name_program()
        self.latents = _check_hierarchy(self)
        """Dimensions of z1, ..., zL."""

    def __repr__(self) -> str:
        """A summary in a few lines; ``torch.nn.Module.__repr__(vae)`` is every layer."""
        parts: list[tuple[str, nn.Module]] = [("prior", self.prior)]
        parts += [("p(z | z)", self.conditionals), ("posteriors", self.posteriors)]
        parts += [("decoder", self.decoder), ("likelihood", self.likelihood)]
        lines = [
            f"HierarchicalVAE of x {self.x_shape}, {self.structure}, latents {self.latents} from x "
            f"upwards, {count_parameters(self):,} parameters"
        ]
        for name, part in parts:
            inner = list(part) if isinstance(part, nn.ModuleList) else [part]
            text = ", ".join(type(module).__name__ for module in inner)
            count = count_parameters(part)
            lines.append(f"  {name:<11} {text}" + (f", {count:,} parameters" if count else ""))
        return "\n".join(lines)

    @property
    def latent_dim(self) -> int:
        """Number of latent dimensions D, over all layers."""
        return sum(self.latents)

    @property
    def layout(self) -> str:
        """The latent dimensions from x upwards, and the structure: "100 + 50 (bottom-up)"."""
        return f"{' + '.join(map(str, self.latents))} ({self.structure})"

    @property
    def sites(self) -> tuple[str, ...]:
        """The latent sites, in the order in which the guide draws them and z holds them."""
        names = [f"z{i + 1}" for i in range(len(self.latents))]
        return tuple(names if self.structure == "bottom-up" else names[::-1])

    def model(self, x: Tensor) -> None:
        """The generative program: zL, ..., z1, then x of shape (B, *x_shape)."""
        pyro.module(self.program_name, self)
        with pyro.plate("data", x.shape[0], dim=-1):
            layers = self._generation(pyro.sample)
            pyro.sample("x", self.likelihood(self._decode(layers)), obs=x)

    def guide(self, x: Tensor) -> None:
        """The inference program: every layer given x (B, *x_shape)."""
        pyro.module(self.program_name, self)
        with pyro.plate("data", x.shape[0], dim=-1):
            self._inference(x, pyro.sample)

    def _generation(self, draw: Draw) -> list[Tensor]:
        """Draw all layers from the top down; they are returned from x upwards."""
        layers = [draw(f"z{len(self.posteriors)}", self.prior())]
        for i in reversed(range(len(self.conditionals))):
            layers.insert(0, draw(f"z{i + 1}", self.conditionals[i](layers[0])))
        return layers

    def _inference(self, x: Tensor, draw: Draw) -> list[Tensor]:
        """Draw all layers given x; they are returned in the order in which they are drawn."""
        if self.structure == "bottom-up":
            layers = [x]
            for i, posterior in enumerate(self.posteriors):
                layers.append(draw(f"z{i + 1}", posterior(layers[-1])))
            return layers[1:]
        last = len(self.posteriors) - 1
        layers = [draw(f"z{last + 1}", self.posteriors[last](x))]
        for i in reversed(range(last)):
            posterior, above = self.posteriors[i], torch.cat(layers[::-1], -1)
            features = posterior.encoder(x, above)  # type: ignore[operator]
            layers.append(draw(f"z{i + 1}", posterior.distribution(features)))  # type: ignore[operator]
        return layers

    def _decode(self, layers: list[Tensor]) -> Tensor:
        """The decoder's parameters for z1, ..., zL."""
        return self.decoder(layers[0] if self.structure == "bottom-up" else torch.cat(layers, -1))

    def split(self, z: Tensor) -> list[Tensor]:
        """z (*B, D) as z1, ..., zL, whatever the order that z holds them in."""
        if self.structure == "bottom-up":
            return list(z.split(list(self.latents), -1))
        return list(z.split(list(self.latents[::-1]), -1))[::-1]

    def join(self, layers: Sequence[Tensor]) -> Tensor:
        """z (*B, D) from z1, ..., zL."""
        return torch.cat(list(layers if self.structure == "bottom-up" else layers[::-1]), -1)

    def params(self, z: Tensor) -> Tensor:
        """What the decoder tells the likelihood: z (*B, D) to (*B, *likelihood.params_shape)."""
        return self._decode(self.split(z))

    @torch.no_grad()
    def draw_latents(self, num_samples: int) -> Tensor:
        """Draw zL ~ p(zL), and each layer below given the one above: (num_samples, D)."""
        rows = torch.Size([num_samples])
        return self.join(
            self._generation(lambda _, p: p.sample(torch.Size() if p.batch_shape else rows))
        )

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """Draw all layers given x (*B, *x_shape), from torch's own stream: (*B, D)."""
        return torch.cat(self._inference(x, lambda _, q: q.sample()), -1)

    @torch.no_grad()
    def encode(self, x: Tensor, *, num_samples: int = 100, seed: int | None = 0) -> Tensor:
        """E_q[z | x] for x (*B, *x_shape): (*B, D), averaged over draws of all layers but the last.

        The layer that the guide draws first is exact where its posterior has a mean.
        """
        means: list[Tensor] = []

        def draw(_: str, q: Any) -> Tensor:
            z = q.sample(torch.Size([num_samples]) if not means else torch.Size())
            try:
                means.append(q.mean.expand(z.shape))
            except NotImplementedError:
                means.append(z)
            return z

        with seeded(seed):
            self._inference(x, draw)
        return torch.cat(means, -1).mean(0)

    @torch.no_grad()
    def follow(self, z: Tensor, dim: int) -> Tensor:
        """z (*B, D) after dimension ``dim`` was moved: every layer below is its mean given z."""
        layers, order = self.split(z), [int(site[1:]) - 1 for site in self.sites]
        while dim >= self.latents[order[0]]:
            dim -= self.latents[order.pop(0)]
        for i in reversed(range(order[0])):
            layers[i] = self.conditionals[i](layers[i + 1]).mean
        return self.join(layers)


def check_structure(structure: str) -> None:
    """Raise InputError for anything but "bottom-up" and "top-down"."""
    if structure not in STRUCTURES:
        raise InputError(
            f"structure expects one of {', '.join(STRUCTURES)}; got {structure!r}; give "
            "--model-args structure=bottom-up"
        )


@torch.no_grad()
def _check_hierarchy(vae: HierarchicalVAE) -> tuple[int, ...]:
    """Send one dummy x through every part; the dimensions of z1, ..., zL, or InputError."""
    count = len(vae.posteriors)
    if count < 2 or len(vae.conditionals) != count - 1:
        raise InputError(
            f"a hierarchy of L >= 2 layers has L posteriors and L - 1 conditionals; got {count} "
            f"and {len(vae.conditionals)}; for a single layer use VAE"
        )
    if vae.structure == "bottom-up" and getattr(vae.prior, "needs_posterior", False):
        raise InputError(
            f"{type(vae.prior).__name__} is made of q(z{count} | x), of which a bottom-up guide "
            "has no density; use --model-args structure=top-down, or another --prior"
        )
    weight = next(vae.parameters(), torch.empty(0))
    x = weight.new_full((1, *vae.likelihood.x_shape), 0.5)
    found: dict[str, tuple[int, ...]] = {}

    def draw(name: str, q: Any) -> Tensor:
        expected = found.get(name, tuple(q.event_shape))
        if q.batch_shape not in ((), (1,)) or tuple(q.event_shape) != expected or not expected:
            raise InputError(
                f"layer {name}: expected batch shape (1,) and the event shape {expected} of its "
                f"posterior; got {tuple(q.batch_shape)} and {tuple(q.event_shape)}; give all that "
                "speak of one layer the same latent_dim"
            )
        found[name] = tuple(q.event_shape)
        return q.sample(torch.Size() if q.batch_shape else torch.Size([1]))

    try:
        with seeded(0):
            vae._inference(x, draw)
            layers = vae._generation(draw)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(
            f"the layers do not fit together ({first_line(error)}); build each network for the "
            "layer that it reads"
        ) from error
    vae.latents = tuple(z.shape[-1] for z in layers)
    check_decoder(vae, vae.join(layers))
    return vae.latents


REGISTRY: dict[str, type[VAE]] = {
    "vae": VAE,
    "hierarchical": HierarchicalVAE,
}
