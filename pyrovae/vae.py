"""The VAE: one Pyro model, one Pyro guide, and the check that its parts fit together."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor, nn

from pyrovae.errors import InputError
from pyrovae.likelihoods import Likelihood
from pyrovae.posteriors import Posterior
from pyrovae.priors import Prior
from pyrovae.streams import own_streams

_SERIAL = count()


class VAE(nn.Module):
    """A variational autoencoder: p(z) p(x | z) and q(z | x) as two Pyro programs.

    The evidence lower bound that training raises is
    ``ELBO(x) = E_q(z|x)[log p(x | z) + log p(z) - log q(z | x)] <= log p(x)``.

    Args:
        prior: p(z), returns a distribution of batch shape () and event shape (D,).
        posterior: the family q(z | x), maps x (*B, *x_shape) to batch *B, event (D,).
        decoder: maps z (*B, D) to parameters (*B, *likelihood.params_shape).
        likelihood: p(x | z), maps parameters to a distribution of event shape x_shape.

    Raises:
        InputError: if the parts do not fit together, with what was expected, got, and to change.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes (2014),
    https://arxiv.org/abs/1312.6114

    >>> from pyrovae import likelihoods, networks, posteriors, priors
    >>> likelihood = likelihoods.Bernoulli((1, 8, 8))
    >>> vae = VAE(
    ...     prior=priors.StandardNormal(2),
    ...     posterior=posteriors.MeanField(networks.MLPEncoder((1, 8, 8), hidden=(16,)), 2),
    ...     decoder=networks.MLPDecoder(2, likelihood.params_shape, hidden=(16,)),
    ...     likelihood=likelihood,
    ... )
    >>> vae.generate(3, seed=0).shape
    torch.Size([3, 1, 8, 8])
    """

    has_density: ClassVar[bool] = True
    """Whether there is a p(x); if not, whatever estimates it refuses."""

    def __init__(
        self, *, prior: Prior, posterior: Posterior, decoder: nn.Module, likelihood: Likelihood
    ):
        super().__init__()
        self.prior = prior
        self.posterior = posterior
        self.decoder = decoder
        self.likelihood = likelihood
        self._name_program()
        check_wiring(self)

    def _name_program(self) -> None:
        # Pyro's parameter store knows parameters by name alone: two VAEs of one name would
        # silently share, or fail to train, their weights.
        self.program_name = f"vae{next(_SERIAL)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name_program()

    def __repr__(self) -> str:
        """A summary in a few lines; ``torch.nn.Module.__repr__(vae)`` is every layer."""
        parts = [("prior", self.prior), ("posterior", self.posterior)]
        parts += [("decoder", self.decoder), ("likelihood", self.likelihood)]
        lines = [
            f"VAE of x {self.x_shape}, {self.latent_dim} latents, "
            f"{count_parameters(self):,} parameters"
        ]
        for name, part in parts:
            text = type(part).__name__
            inner = getattr(part, "encoder", None)
            if isinstance(inner, nn.Module):
                text += f" on {type(inner).__name__}"
            count = count_parameters(part)
            lines.append(f"  {name:<11} {text}" + (f", {count:,} parameters" if count else ""))
        return "\n".join(lines)

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of one observation, (C, H, W) or (F,)."""
        return self.likelihood.x_shape

    @property
    def latent_dim(self) -> int:
        """Number of latent dimensions D."""
        return self.prior.latent_dim

    @property
    def layout(self) -> str:
        """The latent dimensions in words: "50", or those of every layer."""
        return str(self.latent_dim)

    def model(self, x: Tensor) -> None:
        """The generative program: z ~ p(z), x ~ p(x | z) for x of shape (B, *x_shape)."""
        pyro.module(self.program_name, self)
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)

    def guide(self, x: Tensor) -> None:
        """The inference program: z ~ q(z | x) for x of shape (B, *x_shape)."""
        pyro.module(self.program_name, self)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", self.posterior(x))

    def initialize(self, x: Tensor, *, steps: int = 100) -> None:
        """Start from the data: x (N, *x_shape), such as a few hundred training images.

        The output bias of a dense decoder becomes the constant under which x is most likely (for
        a Bernoulli, the log-odds of the mean image), so that training starts from the best model
        that has no latent; the pseudo-inputs of a VampPrior become images.

        Source for the bias: Burda et al., Importance Weighted Autoencoders (2016), section 5.
        """
        initialize: Any = getattr(self.prior, "initialize", None)
        if initialize is not None:
            initialize(x)
        start_at: Any = getattr(self.decoder, "start_at", None)
        if start_at is None:
            return
        best = x.new_zeros(1, *self.likelihood.params_shape, requires_grad=True)
        # Each pixel is a problem of its own, on a scale of its own: the logit of a black one is -10
        # for a Bernoulli and -500 for a continuous Bernoulli. Rprop finds a step for each.
        optimizer = torch.optim.Rprop([best], lr=0.1)
        for _ in range(steps):
            # The small penalty keeps a pixel that never varies from running off to infinity.
            loss = 5e-4 * best.abs().sum() - self.likelihood(best).log_prob(x).mean()
            (best.grad,) = torch.autograd.grad(loss, best)
            optimizer.step()
        with torch.no_grad():
            z = self.draw_latents(len(x))

            def likely() -> Tensor:
                return self.likelihood(self.params(z)).log_prob(x).mean()

            before, most = likely(), self.likelihood(best).log_prob(x).mean()
            # A narrow likelihood suffers from the decoder's first noise, which must then be small.
            for shrink in (1.0, 0.1, 0.1):
                start_at(best, shrink)
                if likely() >= before + 0.9 * (most - before):
                    return
            start_at(torch.zeros_like(best), 100.0)

    @torch.no_grad()
    def generate(self, num_samples: int, *, mean: bool = False, seed: int | None = None) -> Tensor:
        """Draw z ~ p(z), then x ~ p(x | z), or its mean E[x | z]; (num_samples, *x_shape).

        >>> from pyrovae import likelihoods, networks, posteriors, priors
        >>> encoder, p = networks.MLPEncoder((1, 8, 8)), likelihoods.Bernoulli((1, 8, 8))
        >>> q, decoder = posteriors.MeanField(encoder, 2), networks.MLPDecoder(2, p.params_shape)
        >>> vae = VAE(prior=priors.StandardNormal(2), posterior=q, decoder=decoder, likelihood=p)
        >>> vae.generate(3, seed=0).shape
        torch.Size([3, 1, 8, 8])
        """
        with seeded(seed):
            return self.decode(self.draw_latents(num_samples), mean=mean)

    @torch.no_grad()
    def draw_latents(self, num_samples: int) -> Tensor:
        """Draw z ~ p(z), from torch's own stream: (num_samples, D)."""
        return self.prior().sample(torch.Size([num_samples]))

    def params(self, z: Tensor) -> Tensor:
        """What the decoder tells the likelihood: z (*B, D) to (*B, *likelihood.params_shape)."""
        return self.decoder(z)

    def follow(self, z: Tensor, dim: int) -> Tensor:
        """Every latent that depends on dimension ``dim`` of z (*B, D) after that was moved: none.

        Where z has layers, those below the moved one follow it.
        """
        return z

    @torch.no_grad()
    def decode(self, z: Tensor, *, mean: bool = True, seed: int | None = None) -> Tensor:
        """E[x | z], or a draw x ~ p(x | z) with ``mean=False``, for z (*B, D): (*B, *x_shape)."""
        with seeded(seed):
            p = self.likelihood(self.params(z))
            return p.mean if mean else p.sample()

    @torch.no_grad()
    def encode(self, x: Tensor, *, num_samples: int = 100, seed: int | None = 0) -> Tensor:
        """E_q[z | x] for x (*B, *x_shape): (*B, D).

        A posterior without a closed-form mean (a flow) is averaged over ``num_samples`` draws.

        >>> from pyrovae import likelihoods, networks, posteriors, priors
        >>> encoder, p = networks.MLPEncoder((1, 8, 8)), likelihoods.Bernoulli((1, 8, 8))
        >>> q, decoder = posteriors.MeanField(encoder, 2), networks.MLPDecoder(2, p.params_shape)
        >>> vae = VAE(prior=priors.StandardNormal(2), posterior=q, decoder=decoder, likelihood=p)
        >>> vae.encode(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 2])
        """
        q = self.posterior(x)
        try:
            return q.mean
        except NotImplementedError:
            with seeded(seed):
                return q.sample(torch.Size([num_samples])).mean(0)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, mean: bool = True, seed: int | None = None) -> Tensor:
        """Draw z ~ q(z | x), then give E[x | z] (or a draw of x): (*B, *x_shape).

        >>> from pyrovae import likelihoods, networks, posteriors, priors
        >>> encoder, p = networks.MLPEncoder((1, 8, 8)), likelihoods.Bernoulli((1, 8, 8))
        >>> q, decoder = posteriors.MeanField(encoder, 2), networks.MLPDecoder(2, p.params_shape)
        >>> vae = VAE(prior=priors.StandardNormal(2), posterior=q, decoder=decoder, likelihood=p)
        >>> vae.reconstruct(torch.zeros(5, 1, 8, 8), seed=0).shape
        torch.Size([5, 1, 8, 8])
        """
        with seeded(seed):
            return self.decode(self.infer(x), mean=mean)

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """Draw z ~ q(z | x) for x (*B, *x_shape), from torch's own stream: (*B, D)."""
        return self.posterior(x).sample()

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int = 9) -> Tensor:
        """E[x | z] along the straight line from E_q[z | a] to E_q[z | b]: (*B, steps, *x_shape).

        Args:
            a: (*B, *x_shape), where the walks start.
            b: (*B, *x_shape), where they end.
            steps: points on each walk, both ends among them; at least 2.

        Raises:
            InputError: for shapes that differ, or fewer than 2 steps.

        >>> from pyrovae import likelihoods, networks, posteriors, priors
        >>> encoder, p = networks.MLPEncoder((1, 8, 8)), likelihoods.Bernoulli((1, 8, 8))
        >>> q, decoder = posteriors.MeanField(encoder, 2), networks.MLPDecoder(2, p.params_shape)
        >>> vae = VAE(prior=priors.StandardNormal(2), posterior=q, decoder=decoder, likelihood=p)
        >>> vae.interpolate(torch.zeros(1, 8, 8), torch.ones(1, 8, 8), steps=5).shape
        torch.Size([5, 1, 8, 8])
        """
        if a.shape != b.shape:
            raise InputError(
                f"expected as many starts as ends, of one shape; got {tuple(a.shape)} and "
                f"{tuple(b.shape)}; give two images for each walk"
            )
        if steps < 2:
            raise InputError(f"expected at least 2 steps, got {steps}; check --steps")
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        start, end = (self.encode(x.to(device)).unsqueeze(-2) for x in (a, b))
        t = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device).unsqueeze(-1)
        return self.decode(torch.lerp(start, end, t))


def count_parameters(module: nn.Module) -> int:
    """Numbers that are learnt."""
    return sum(p.numel() for p in module.parameters())


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from ``seed`` without moving anybody else's random stream; None: the caller's own."""
    if seed is None:
        yield
        return
    with own_streams(seed):
        yield


@torch.no_grad()
def check_wiring(vae: VAE) -> None:
    """Send one dummy x through every part; raise InputError where two parts do not fit."""
    x_shape = tuple(vae.likelihood.x_shape)
    weight = next(vae.parameters(), torch.empty(0))
    x = weight.new_full((1, *x_shape), 0.5)

    try:
        q = vae.posterior(x)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the posterior cannot read x of shape {x_shape}, which the likelihood is for "
            f"({first_line(error)}); build both from the same x_shape"
        ) from error
    p = vae.prior()
    if p.batch_shape != () or len(p.event_shape) != 1:
        raise InputError(
            f"the prior must have batch shape () and event shape (D,); got {tuple(p.batch_shape)} "
            f"and {tuple(p.event_shape)}; end it with .to_event(1)"
        )
    if q.batch_shape != (1,) or q.event_shape != p.event_shape:
        raise InputError(
            f"posterior and prior must agree: expected event shape {tuple(p.event_shape)} (the "
            f"prior's) with batch shape (1,), got {tuple(q.event_shape)} with "
            f"{tuple(q.batch_shape)}; give both the same latent_dim"
        )
    check_decoder(vae, weight.new_zeros(1, *p.event_shape))


@torch.no_grad()
def check_decoder(vae: VAE, z: Tensor) -> None:
    """Send one z (1, D) through decoder and likelihood; raise InputError where they do not fit."""
    x_shape = tuple(vae.likelihood.x_shape)
    try:
        params = vae.params(z)
    except RuntimeError as error:
        raise InputError(
            f"the decoder cannot read z of {z.shape[-1]} dimensions ({first_line(error)}); "
            "give it the prior's latent_dim"
        ) from error
    expected = tuple(vae.likelihood.params_shape)
    if tuple(params.shape[1:]) != expected:
        raise InputError(
            f"the decoder must give the likelihood's parameters: expected shape {expected}, got "
            f"{tuple(params.shape[1:])}; build it with out_shape=likelihood.params_shape"
        )
    x_dist = vae.likelihood(params)
    if x_dist.batch_shape != (1,) or tuple(x_dist.event_shape) != x_shape:
        raise InputError(
            f"the likelihood must return event shape {x_shape} and batch shape (1,); got "
            f"{tuple(x_dist.event_shape)} and {tuple(x_dist.batch_shape)}; return one "
            "distribution per element from elementwise()"
        )


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]
