"""What K log-weights tell of each image, from a stream of them of which few are kept.

Sums for the mean, its error and the curve of bounds; the largest few, whose tail is fitted. Their
number grows with the square root of K: 215 of 5,000, 950 of 100,000.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.diagnostics import fit_tail, tail_length

# New log-weights that wait together: sorting out the largest costs as much for fewer.
_WAITING = 4096


class WeightSummary(NamedTuple):
    """What is told of each image's K weights w_k; float64, (B,) but for the curve."""

    log_mean: Tensor
    """log (1/K) sum_k w_k, in nats."""
    error: Tensor
    """Standard error of log_mean, ``sqrt(var(w) / K) / mean(w)``; NaN for K = 1.

    By the delta method. To the same order, the expectation of log_mean lies half the square of it
    below the logarithm of the expected weight. Draws that take turns in a mixture vary less.
    """
    pareto_k: Tensor
    """As `diagnostics.psis`."""
    ess: Tensor
    """As `diagnostics.psis`."""
    smoothed_log_mean: Tensor
    """The logarithm of the mean of Pareto-smoothed weights, in nats."""
    bounds: Tensor
    """(B, len(curve_sizes(K))) the importance-weighted bound at every size of the curve.

    At K' it is the mean, over disjoint groups of K' of the K draws, of ``log (1/K') sum_k w_k``:
    an unbiased estimate of the bound with K' draws. Each size rises above the one before, for every
    image, if it is a multiple of it and divides K: both means are then over the same draws.
    """


class LogWeights:
    """The log-weights of a batch of images, handed in some at a time, in the order of the draws.

    >>> weights = LogWeights(4, 1)
    >>> weights.add(torch.tensor([[0.0], [0.0]]))
    >>> weights.add(torch.tensor([[math.log(3.0)], [-math.inf]]))
    >>> weights.summary().log_mean  # of 1, 1, 3, 0
    tensor([0.2231], dtype=torch.float64)
    """

    def __init__(
        self, num_particles: int, num_images: int, device: torch.device | str = "cpu"
    ) -> None:
        self.num_particles = num_particles
        self.count = 0
        """Log-weights that the sums contain."""
        self._largest = _largest(num_particles)
        # A row an image: the largest so far, and what came since, in order. One block for all:
        # small tensors kept from every chunk would keep the allocator from giving the large ones
        # between them back.
        rows = rows_kept(num_particles)
        self._block = torch.empty(num_images, rows, dtype=torch.float64, device=device)
        self._kept = self._filled = 0
        nothing = torch.zeros(num_images, dtype=torch.float64, device=device)
        self._peak, self._lowest = nothing - math.inf, nothing + math.inf
        # Of w / exp(reference), the reference being the peak, or 0 where that is not finite.
        self._reference = self._mean = self._scatter = nothing
        # Sums of such weights, and of their squares, without the largest.
        self._rest = self._rest_squared = nothing
        self._curve = _Curve(len(curve_sizes(num_particles)) - 1)

    def add(self, log_weights: Tensor) -> None:
        """Add the next draws, (k, B), in nats.

        Raises:
            ValueError: for more than ``num_particles`` in all.
        """
        if self.count + self._filled - self._kept + len(log_weights) > self.num_particles:
            raise ValueError(f"expected {self.num_particles} log-weights an image; got more")
        for part in log_weights.detach().split(max(1, self._block.shape[1] - self._largest)):
            if self._filled + len(part) > self._block.shape[1]:
                self._absorb()
            self._block[:, self._filled : self._filled + len(part)] = part.T
            self._filled += len(part)

    def summary(self) -> WeightSummary:
        """What they tell, once all are in.

        Raises:
            ValueError: for fewer than ``num_particles``.
        """
        self._absorb()
        k = self.num_particles
        if self.count != k:
            raise ValueError(f"expected {k} log-weights an image; got {self.count}")
        log_mean = self._reference + self._mean.log()
        error = (self._scatter / (k - 1) / k).sqrt() / self._mean if k > 1 else log_mean * math.nan
        reference = self._reference.unsqueeze(1)
        shape, tail = fit_tail(
            self._block[:, : self._kept] - reference, self._lowest - self._peak, k
        )
        tail = tail.exp()
        total = self._rest + tail.sum(1)
        return WeightSummary(
            log_mean=log_mean,
            error=error,
            pareto_k=shape,
            ess=total**2 / (self._rest_squared + (tail**2).sum(1)),
            smoothed_log_mean=self._reference + (total / k).log(),
            bounds=torch.stack([*self._curve.means(), log_mean], 1),
        )

    def _absorb(self) -> None:
        """Take what waits into the sums, and keep the largest of all."""
        new = self._block[:, self._kept : self._filled]
        if new.shape[1] == 0:
            return
        self._curve.add(new)
        self._lowest = torch.minimum(self._lowest, new.amin(1))
        shrink = self._raise_peak(new.amax(1))
        values = self._block[:, : self._filled]
        weights = (values - self._reference.unsqueeze(1)).exp()
        self._add_moments(weights[:, self._kept :], shrink)
        kept, places = values.topk(min(self._largest, self._filled), 1)
        weights.scatter_(1, places, 0.0)
        self._rest = self._rest * shrink + weights.sum(1)
        self._rest_squared = self._rest_squared * shrink**2 + (weights**2).sum(1)
        self._kept = self._filled = kept.shape[1]
        self._block[:, : self._kept] = kept

    def _raise_peak(self, peak: Tensor) -> Tensor:
        """Let no weight be above the reference; the factor by which all sums become smaller."""
        before, reference = self._peak, self._reference
        self._peak = torch.maximum(before, peak)
        self._reference = torch.where(self._peak.isfinite(), self._peak, 0.0)
        # Before the first weight that is not 0, all sums are.
        return torch.where(before == -math.inf, 0.0, (reference - self._reference).exp())

    def _add_moments(self, weights: Tensor, shrink: Tensor) -> None:
        # Chan, Golub and LeVeque's way to join means and squared deviations: nothing cancels where
        # all weights are nearly equal.
        more = weights.shape[1]
        mean = weights.mean(1)
        scatter = ((weights - mean.unsqueeze(1)) ** 2).sum(1)
        own_mean, own_scatter = self._mean * shrink, self._scatter * shrink**2
        apart = mean - own_mean
        total = self.count + more
        self._mean = own_mean + apart * (more / total)
        self._scatter = own_scatter + scatter + apart**2 * (self.count * more / total)
        self.count = total


def summarise(log_weights: Tensor) -> WeightSummary:
    """What log-weights (K, B) tell that are all there, in nats.

    >>> summarise(torch.tensor([[0.0], [math.log(3.0)]])).error
    tensor([0.5000], dtype=torch.float64)
    """
    num_particles, num_images = log_weights.shape
    stream = LogWeights(num_particles, num_images, log_weights.device)
    stream.add(log_weights)
    return stream.summary()


def curve_sizes(num_particles: int) -> list[int]:
    """K' = 1, 10, 100, ... below K, and K itself.

    >>> curve_sizes(5000)
    [1, 10, 100, 1000, 5000]
    """
    sizes = [1]
    while 10 * sizes[-1] < num_particles:
        sizes.append(10 * sizes[-1])
    return sizes if num_particles == 1 else [*sizes, num_particles]


def rows_kept(num_particles: int) -> int:
    """How many log-weights of an image are held at once, eight bytes each."""
    return min(num_particles, _largest(num_particles) + _WAITING)


def _largest(num_particles: int) -> int:
    return min(num_particles, tail_length(num_particles) + 1)


class _Curve:
    """Means of log (1/K') sum_k w_k over groups of K' = 1, 10, 100, ... draws, level by level."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.sums: list[Tensor] = []
        self.counts = [0] * levels
        # Fewer than ten at each level, until its next group is whole.
        self.waiting: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Add log-weights (B, n) in the order of the draws."""
        if not self.sums:
            self.sums = [values.new_zeros(len(values))] * self.levels
            self.waiting = [values[:, :0]] * self.levels
        for level in range(self.levels):
            self.sums[level] = self.sums[level] + values.sum(1)
            self.counts[level] += values.shape[1]
            values = torch.cat([self.waiting[level], values], 1)
            groups = values.shape[1] // 10
            self.waiting[level] = values[:, 10 * groups :].clone()
            grouped = values[:, : 10 * groups].unflatten(1, (groups, 10))
            values = torch.logsumexp(grouped, 2) - math.log(10)

    def means(self) -> list[Tensor]:
        """(B,) of every level."""
        return [total / count for total, count in zip(self.sums, self.counts, strict=True)]
