"""Likelihoods p(x | z): modules that turn the decoder's output into a normalised distribution.

To add one, write a class with one method, ``elementwise``; its docstring gives formula, support and
source. Then add its name to the registry at the foot and one row to the table of tests.

>>> import torch
>>> class Cauchy(Likelihood):
...     num_params = 2
...
...     def elementwise(self, params):
...         loc, raw_scale = params
...         return dist.Cauchy(loc, positive(raw_scale))
>>> likelihood = Cauchy((1, 28, 28))
>>> likelihood.params_shape
(2, 1, 28, 28)
>>> d = likelihood(torch.zeros(16, *likelihood.params_shape))
>>> d.batch_shape, d.event_shape
(torch.Size([16]), torch.Size([1, 28, 28]))

What the decoder gives is unconstrained and starts near 0. Two maps make that a sane start for x in
[0, 1]: a location is 1/2 + raw, the middle of the range with no saturation at its ends, and a scale
is ``positive(raw)``, about the spread of pixels around that middle.
"""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae import distributions
from pyrovae.errors import InputError
from pyrovae.mixtures import CoupledLogisticMixture
from pyrovae.mixtures import DiscretizedLogisticMixture as LogisticMixture

Distribution = Any  # Pyro ships no types


def positive(raw: Tensor, at_zero: float = 0.3) -> Tensor:
    """Return softplus(raw + c) + 1e-5, with c such that raw = 0 gives ``at_zero``.

    The floor lies below the step of a 16-bit level, so it never binds on images, yet it keeps the
    squares and cubes of 1/scale in a log-density's gradient within float32.
    """
    return softplus(raw + math.log(math.expm1(at_zero - 1e-5))) + 1e-5


def _positive_int(owner: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(
            f"{owner} expects {name} to be a positive integer; got {value!r}. "
            f"Give for example {name}=5 (--likelihood-args {name}=5)."
        )
    return value


def _number_or_word(
    owner: str,
    name: str,
    value: Any,
    words: Sequence[str],
    above: float = 0.0,
    below: float = math.inf,
) -> float | str:
    """Return a number between ``above`` and ``below``, or one of ``words``; else InputError."""
    if isinstance(value, str) and value in words:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value) and above < value < below:
        return float(value)
    close = difflib.get_close_matches(str(value), words, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    limits = f"above {above:g}" + ("" if below == math.inf else f" and below {below:g}")
    raise InputError(
        f"{owner} expects {name} to be a number {limits} or one of {', '.join(words)}; "
        f"got {value!r}{hint}. Give for example {name}={words[0]} "
        f"(--likelihood-args {name}={words[0]})."
    )


class Likelihood(nn.Module, ABC):
    """The distribution of one observation given the decoder's output.

    ``likelihood(params)`` takes (*B, *params_shape) and returns a distribution with batch shape *B
    and event shape ``x_shape``. A subclass writes ``elementwise``; this class checks the shape,
    moves the parameter axis to the front and makes the elements one event.

    Arguments: ``x_shape``, the shape of one x: (C, H, W) or (F,). Raises InputError for a shape
    that is not made of positive integers.
    """

    summary: ClassVar[str] = ""
    support: ClassVar[str] = "the real numbers"
    remedy: ClassVar[str] = "Remove or repair these values before building the data set."
    num_params: int = 1
    kind: Literal["mass", "density"] = "density"
    levels: int | None = None

    def __init__(self, x_shape: Sequence[int]) -> None:
        super().__init__()
        if not x_shape or any(
            isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in x_shape
        ):
            raise InputError(
                f"{self._name} expects x_shape of positive integers, (C, H, W) or (F,); "
                f"got {x_shape!r}. Use the data's x_shape."
            )
        self.x_shape = tuple(x_shape)

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def params_shape(self) -> tuple[int, ...]:
        """The shape the decoder must give for one z: (P, *x_shape) unless a subclass says else."""
        return (self.num_params, *self.x_shape)

    @abstractmethod
    def elementwise(self, params: Tensor) -> Distribution:
        """Return the distribution of every element of x; ``params`` is (P, *B, *x_shape)."""

    def forward(self, params: Tensor) -> Distribution:
        """Return p(x | z) for ``params`` (*B, *params_shape); InputError for another shape."""
        n = len(self.params_shape)
        if params.shape[max(0, params.dim() - n) :] != self.params_shape:
            raise InputError(
                f"{self._name} expects params of shape (*B, {_list(self.params_shape)}); got "
                f"({_list(params.shape)}). Build the decoder with likelihood.params_shape."
            )
        d = self.elementwise(params.movedim(-n, 0))
        return d.to_event(len(self.x_shape) - len(d.event_shape))

    def contains(self, x: Tensor) -> Tensor:
        """Return for each element of x whether it lies in the support."""
        return x.isfinite() if self.levels is None else distributions.levels(self.levels).check(x)

    def check(self, x: Tensor) -> None:
        """Raise InputError if x (*B, *x_shape) has the wrong shape or leaves the support."""
        if x.shape[max(0, x.dim() - len(self.x_shape)) :] != self.x_shape:
            raise InputError(
                f"{self._name} expects x of shape (*B, {_list(self.x_shape)}); got "
                f"({_list(x.shape)}). Build the likelihood with the data's x_shape."
            )
        if not x.is_floating_point():
            raise InputError(
                f"{self._name} expects x as floating point numbers in [0, 1]; got {x.dtype}. "
                "Divide by the number of steps, x.float() / 255 for 8-bit images."
            )
        outside = x[~self.contains(x)]
        if outside.numel():
            count = outside.unique().numel()
            raise InputError(
                f"{self._name} expects x in {self.support.replace('L', str(self.levels))}; got "
                f"{count} other value{'s' if count > 1 else ''} such as {outside[0].item():g}. "
                f"{self.remedy}"
            )


def _list(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


# Of a scale that stays as it was given: beyond, squares in a log-density leave float32.
_SCALES = (1e-12, 1e12)


class LocationScale(Likelihood):
    """A likelihood with a location for each element and a scale that the user chooses.

    ``scale``: a number above 1e-12 and below 1e12 in units of x; "learned", one trainable number
    for all elements; or "per-pixel", given by the decoder. Raises InputError for anything else.
    """

    centre: ClassVar[float] = 0.5
    spread: ClassVar[float] = 0.3

    def __init__(self, x_shape: Sequence[int], *, scale: float | str = "learned") -> None:
        super().__init__(x_shape)
        chosen = _number_or_word(self._name, "scale", scale, ("learned", "per-pixel"), *_SCALES)
        self.num_params = 2 if chosen == "per-pixel" else 1
        if chosen == "learned":
            self.raw_scale = nn.Parameter(torch.zeros(()))
        elif chosen != "per-pixel":
            self.register_buffer("fixed_scale", torch.tensor(chosen))

    def loc_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return the location and the scale, each (*B, *x_shape) or a scalar."""
        loc = self.centre + params[0]
        if self.num_params == 2:
            return loc, positive(params[1], self.spread)
        if hasattr(self, "raw_scale"):
            return loc, positive(self.raw_scale, self.spread)
        return loc, self.get_buffer("fixed_scale")


class Bernoulli(Likelihood):
    """P(x) = p^x (1 - p)^(1 - x), with p = sigmoid(params).

    Support: {0, 1}, a mass. Grey values are refused: their cross-entropy is no likelihood.
    Source: Kingma and Welling, Auto-Encoding Variational Bayes (2014)
    https://arxiv.org/abs/1312.6114

    >>> Bernoulli((3,))(torch.zeros(1, 3)).log_prob(torch.ones(3)).exp()
    tensor(0.1250)
    """

    summary = "binary pixels"
    support = "{0, 1}"
    remedy = "Binarise the data (--binarize dynamic) or use --likelihood continuous-bernoulli."
    kind = "mass"
    levels = 1

    def elementwise(self, params: Tensor) -> Distribution:
        """Take the logits."""
        return dist.Bernoulli(logits=params[0])


class ContinuousBernoulli(Likelihood):
    """p(x) proportional to exp(t x), with the logit t = params; see the distribution.

    Support: [0, 1], a density.
    Source: Loaiza-Ganem and Cunningham, The continuous Bernoulli (2019)
    https://arxiv.org/abs/1907.06845

    >>> ContinuousBernoulli((3,))(torch.zeros(1, 3)).log_prob(torch.ones(3)).exp()
    tensor(1.)
    """

    summary = "grey pixels, one parameter each"
    support = "[0, 1]"
    remedy = "Scale the data to [0, 1]."

    def contains(self, x: Tensor) -> Tensor:
        """Return 0 <= x <= 1."""
        return (x >= 0) & (x <= 1)

    def elementwise(self, params: Tensor) -> Distribution:
        """Take the logits."""
        return distributions.ContinuousBernoulli(params[0])


class Gaussian(LocationScale):
    """p(x) = exp(-((x - loc) / scale)^2 / 2) / (scale sqrt(2 pi)).

    Support: the real numbers, a density. ``scale``: see LocationScale.
    Source: Rybkin et al., Simple and Effective VAE Training with Calibrated Decoders (2021)
    https://arxiv.org/abs/2006.13202

    >>> Gaussian((3,), scale=0.1)(torch.zeros(1, 3)).mean
    tensor([0.5000, 0.5000, 0.5000])
    """

    summary = "real values, light tails"

    def elementwise(self, params: Tensor) -> Distribution:
        """Take the location, and the scale if it is per pixel."""
        return dist.Normal(*self.loc_scale(params))


class Laplace(LocationScale):
    """p(x) = exp(-|x - loc| / scale) / (2 scale).

    Support: the real numbers, a density. ``scale``: see LocationScale.
    Source: Laplace, Memoire sur la probabilite des causes par les evenements (1774)

    >>> Laplace((3,), scale="per-pixel").params_shape
    (2, 3)
    """

    summary = "real values, absolute error"

    def elementwise(self, params: Tensor) -> Distribution:
        """Take the location, and the scale if it is per pixel."""
        return dist.Laplace(*self.loc_scale(params))


class StudentT(LocationScale):
    """p(x) proportional to (1 + ((x - loc) / scale)^2 / df)^(-(df + 1) / 2) / scale.

    Support: the real numbers, a density. ``df``: a number above 1, so that the mean exists, or
    "learned", one trainable number for all elements. ``scale``: see LocationScale.
    Source: Takahashi et al., Student-t Variational Autoencoder for Robust Density Estimation (2018)
    https://doi.org/10.24963/ijcai.2018/374

    >>> StudentT((3,), df=4)(torch.zeros(2, 1, 3)).batch_shape
    torch.Size([2])
    """

    summary = "real values, heavy tails"

    def __init__(
        self, x_shape: Sequence[int], *, df: float | str = "learned", scale: float | str = "learned"
    ) -> None:
        super().__init__(x_shape, scale=scale)
        chosen = _number_or_word(self._name, "df", df, ("learned",), above=1.0)
        if chosen == "learned":
            self.raw_df = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("fixed_df", torch.tensor(chosen))

    @property
    def df(self) -> Tensor:
        """The degrees of freedom; 5 before training if learned."""
        if hasattr(self, "raw_df"):
            return 1 + positive(self.raw_df, 4.0)
        return self.get_buffer("fixed_df")

    def elementwise(self, params: Tensor) -> Distribution:
        """Take the location, and the scale if it is per pixel."""
        return dist.StudentT(self.df, *self.loc_scale(params))


class _OpenInterval(Likelihood):
    """A density on (0, 1) that is infinite or zero at the ends."""

    support = "(0, 1)"
    remedy = "Dequantise the data (--dequantize uniform)."

    def contains(self, x: Tensor) -> Tensor:
        """Return 0 < x < 1."""
        return (x > 0) & (x < 1)


class Beta(_OpenInterval):
    """p(x) = x^(a - 1) (1 - x)^(b - 1) / B(a, b), with a and b from the decoder; uniform at 0.

    Support: the open interval (0, 1), a density.
    Source: Johnson, Kotz and Balakrishnan, Continuous Univariate Distributions 2 (1995)

    >>> Beta((3,))(torch.zeros(2, 3)).log_prob(torch.full((3,), 0.2)).exp()
    tensor(1.)
    """

    summary = "values strictly between 0 and 1, two shapes each"
    num_params = 2

    def elementwise(self, params: Tensor) -> Distribution:
        """Take the two concentrations."""
        return dist.Beta(positive(params[0], 1.0), positive(params[1], 1.0))


class LogitNormal(_OpenInterval, LocationScale):
    """The density of sigmoid(y), y normal with a location and a scale in logits.

    Support: the open interval (0, 1), a density. ``scale``: see LocationScale, in logits.
    Source: Atchison and Shen, Logistic-normal distributions (1980)
    https://doi.org/10.1093/biomet/67.2.261

    >>> LogitNormal((3,))(torch.zeros(2, 3)).mean
    tensor([0.5000, 0.5000, 0.5000])
    """

    summary = "values strictly between 0 and 1, normal in logits"
    centre = 0.0
    spread = 1.5

    def __init__(self, x_shape: Sequence[int], *, scale: float | str = "per-pixel") -> None:
        super().__init__(x_shape, scale=scale)

    def elementwise(self, params: Tensor) -> Distribution:
        """Take the location, and the scale if it is per pixel."""
        return distributions.LogitNormal(*self.loc_scale(params))


class _OnGrid(Likelihood):
    """A mass on {k/L}, with ``levels`` = L a setting."""

    support = "{k/L}"
    remedy = "Leave the data quantised (--dequantize none) or give its number of steps, levels=L."
    kind = "mass"
    levels: int


class DiscretizedLogistic(_OnGrid, LocationScale):
    """P(k/L) = F((k + 1/2)/L) - F((k - 1/2)/L), F logistic; the end bins take the tails.

    Support: {k/L : k = 0..L}, a mass. ``levels``: L, at least 1. ``scale``: see LocationScale.
    Source: Salimans et al., PixelCNN++ (2017) https://arxiv.org/abs/1701.05517

    >>> DiscretizedLogistic((3,), levels=16)(torch.zeros(4, 2, 3)).log_prob(torch.ones(3)).shape
    torch.Size([4])
    """

    summary = "quantised pixels, one logistic each"
    spread = 0.15

    def __init__(
        self, x_shape: Sequence[int], *, levels: int = 255, scale: float | str = "per-pixel"
    ) -> None:
        super().__init__(x_shape, scale=scale)
        self.levels = _positive_int(self._name, "levels", levels)

    def elementwise(self, params: Tensor) -> Distribution:
        """Take the location, and the scale if it is per pixel."""
        loc, scale = self.loc_scale(params)
        return distributions.DiscretizedLogistic(loc, scale, self.levels)


class DiscretizedLogisticMixture(_OnGrid):
    """A mixture of M = ``components`` discretised logistics for each element, or for each pixel.

    With ``coupling`` the three channels of a pixel share one component, and green and blue shift
    with the channels before them; the decoder then gives (10 M, H, W) instead of (3 M, *x_shape).

    Support: {k/L : k = 0..L}, a mass. ``levels``: L, at least 1. Raises InputError for ``coupling``
    without three channels.
    Source: Salimans et al., PixelCNN++ (2017) https://arxiv.org/abs/1701.05517

    >>> DiscretizedLogisticMixture((3, 32, 32), coupling=True).params_shape
    (50, 32, 32)
    """

    summary = "quantised pixels, several logistics each; coupling=True for colour"

    def __init__(
        self,
        x_shape: Sequence[int],
        *,
        levels: int = 255,
        components: int = 5,
        coupling: bool = False,
    ) -> None:
        super().__init__(x_shape)
        self.levels = _positive_int(self._name, "levels", levels)
        self.components = _positive_int(self._name, "components", components)
        if not isinstance(coupling, bool):
            raise InputError(
                f"{self._name} expects coupling to be true or false; got {coupling!r}. "
                "Leave it out, or give coupling=true (--likelihood-args coupling=true)."
            )
        if coupling and (len(self.x_shape) != 3 or self.x_shape[0] != 3):
            raise InputError(
                f"{self._name} with coupling expects x_shape (3, H, W); got "
                f"({_list(self.x_shape)}). Use coupling=false (--likelihood-args coupling=false)."
            )
        self.coupling = coupling
        self.num_params = (10 if coupling else 3) * components

    @property
    def params_shape(self) -> tuple[int, ...]:
        """(3 M, *x_shape), or (10 M, H, W) with coupling."""
        return (self.num_params, *(self.x_shape[1:] if self.coupling else self.x_shape))

    def _centres(self, like: Tensor) -> Tensor:
        # Spread over [0, 1]: components that start alike would get alike gradients and stay alike
        M = self.components
        return (torch.arange(M, dtype=like.dtype, device=like.device) + 0.5) / M

    def elementwise(self, params: Tensor) -> Distribution:
        """Take each component's logit, location, scale and, with coupling, three coefficients."""
        M = self.components
        if not self.coupling:
            logits, loc, raw_scale = params.unflatten(0, (3, M)).movedim(1, -1)
            loc = loc + self._centres(loc)
            return LogisticMixture(logits, loc, positive(raw_scale, 0.1), self.levels)
        logits = params[:M].movedim(0, -3)
        per_channel = params[M:].unflatten(0, (3, M, 3)).movedim((1, 2), (-4, -3))
        loc, raw_scale, raw_coupling = per_channel
        loc = loc + self._centres(loc)[:, None, None, None]
        scale = positive(raw_scale, 0.1)
        return CoupledLogisticMixture(logits, loc, scale, raw_coupling.tanh(), self.levels)


class Categorical(_OnGrid):
    """P(k/L) = softmax(params)_k: one class a level, and no notion of which levels are near.

    Support: {k/L : k = 0..L}, a mass. ``levels``: L, at least 1.
    Source: van den Oord et al., Pixel Recurrent Neural Networks (2016)
    https://arxiv.org/abs/1601.06759

    >>> Categorical((3,), levels=1)(torch.zeros(2, 3)).log_prob(torch.ones(3)).exp()
    tensor(0.1250)
    """

    summary = "quantised pixels, one class a level"

    def __init__(self, x_shape: Sequence[int], *, levels: int = 255) -> None:
        super().__init__(x_shape)
        self.levels = _positive_int(self._name, "levels", levels)
        self.num_params = levels + 1

    def elementwise(self, params: Tensor) -> Distribution:
        """Take the logits."""
        return distributions.LevelCategorical(params.movedim(0, -1))


REGISTRY: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "continuous-bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "laplace": Laplace,
    "student-t": StudentT,
    "beta": Beta,
    "logit-normal": LogitNormal,
    "discretized-logistic": DiscretizedLogistic,
    "discretized-logistic-mixture": DiscretizedLogisticMixture,
    "categorical": Categorical,
}
