"""What K log-weights tell of each image, from a stream of them of which few are kept.

Sums, for the mean, its error and the curve of bounds; the largest, 214 of 5,000 or 950 of 100,000,
whose tail is fitted; and up to 4,096 that came last and wait to be looked at.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.diagnostics import fit_tail, largest_needed

# To take some in costs some seventy operations and a search for the largest, and what waits costs
# its memory.
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
        self.num_images = num_images
        self._count = 0  # of those that the sums contain
        # A row an image: the largest so far, and what came since, in order. One block for all:
        # small tensors kept from every chunk would keep the allocator from giving the large ones
        # between them back.
        self._block: Tensor | None = None
        self._kept = self._filled = 0
        nothing = torch.zeros(num_images, dtype=torch.float64, device=device)
        self._peak, self._lowest = nothing - math.inf, nothing + math.inf
        # Of w / exp(reference), the reference being the peak, or 0 where that is not finite.
        self._reference = self._mean = self._scatter = nothing
        # Logarithms of the sums of all weights but the largest, and of their squares: where the
        # largest are smoothed away, these may lie hundreds of nats below the peak.
        self._rest = self._rest_squared = nothing - math.inf
        self._curve = _Curve(len(curve_sizes(num_particles)) - 1)

    def add(self, log_weights: Tensor) -> None:
        """Add the next draws, (k, B), in nats; all are kept in the type of the first.

        Raises:
            ValueError: for another number of images, or more than ``num_particles`` in all.
        """
        if log_weights.shape[1] != self.num_images:
            raise ValueError(
                f"expected log-weights of {self.num_images} images; got {log_weights.shape[1]}"
            )
        if self._count + self._filled - self._kept + len(log_weights) > self.num_particles:
            raise ValueError(f"expected {self.num_particles} log-weights an image; got more")
        if self._block is None:
            shape = self.num_images, rows_kept(self.num_particles)
            self._block = log_weights.new_empty(shape)
        left = log_weights.detach()
        while len(left) > 0:
            if self._filled == self._block.shape[1]:
                self._absorb(self._block)
            part = left[: self._block.shape[1] - self._filled]
            self._block[:, self._filled : self._filled + len(part)] = part.T
            self._filled += len(part)
            left = left[len(part) :]

    def summary(self) -> WeightSummary:
        """What they tell, once all are in.

        Raises:
            ValueError: for fewer than ``num_particles``.
        """
        k = self.num_particles
        if self._block is not None and self._filled > self._kept:
            self._absorb(self._block)
        if self._block is None or self._count != k:
            raise ValueError(f"expected {k} log-weights an image; got {self._count}")
        log_mean = self._reference + self._mean.log()
        # A mean that is infinite is joined with others to no number.
        log_mean = torch.where(self._peak == math.inf, math.inf, log_mean)
        error = (self._scatter / (k - 1) / k).sqrt() / self._mean if k > 1 else log_mean * math.nan
        pareto_k, tail = fit_tail(self._block[:, : self._kept].double(), self._lowest, k)
        total = torch.logaddexp(self._rest, torch.logsumexp(tail, 1))
        squared = torch.logaddexp(self._rest_squared, torch.logsumexp(2 * tail, 1))
        return WeightSummary(
            log_mean=log_mean,
            error=error,
            pareto_k=pareto_k,
            ess=torch.exp(2 * total - squared),
            smoothed_log_mean=total - math.log(k),
            bounds=torch.stack([*self._curve.means(), log_mean], 1),
        )

    def _absorb(self, block: Tensor) -> None:
        """Take what waits into the sums, and keep the largest of all."""
        values = block[:, : self._filled].double()
        new = values[:, self._kept :]
        self._curve.add(new)
        self._lowest = torch.minimum(self._lowest, new.amin(1))
        shrink = self._raise_peak(new.amax(1))
        self._add_moments((new - self._reference.unsqueeze(1)).exp(), shrink)
        kept, places = values.topk(min(largest_needed(self.num_particles), self._filled), 1)
        self._add_rest(values.scatter(1, places, -math.inf))
        # Last, for ``values`` may be a view of the block.
        self._kept = self._filled = kept.shape[1]
        block[:, : self._kept] = kept

    def _add_rest(self, values: Tensor) -> None:
        peak = values.amax(1).nan_to_num(nan=0.0, neginf=0.0, posinf=0.0)
        weights = (values - peak.unsqueeze(1)).exp()
        total = peak + weights.sum(1).log()
        squared = 2 * peak + (weights * weights).sum(1).log()
        self._rest = torch.logaddexp(self._rest, total)
        self._rest_squared = torch.logaddexp(self._rest_squared, squared)

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
        scatter = (weights - mean.unsqueeze(1)).square().sum(1)
        own_mean, own_scatter = self._mean * shrink, self._scatter * shrink**2
        apart = mean - own_mean
        total = self._count + more
        self._mean = own_mean + apart * (more / total)
        self._scatter = own_scatter + scatter + apart**2 * (self._count * more / total)
        self._count = total


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
    """How many log-weights of an image are held at once."""
    return min(num_particles, largest_needed(num_particles) + _WAITING)


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
