"""Elementary functions against float64, and where they must agree with torch's to the letter."""

import math

import pytest
import torch
from torch.nn import functional

from pyrovae import elementary

# Every size that float32 has, both signs.
SIZES = torch.logspace(-37, 38, 60_001, dtype=torch.float64).float()
LINE = torch.linspace(-100, 100, 400_001)
X = torch.cat([-SIZES, SIZES, LINE])
FULL_DIGITS = 1e-31  # float32 has fewer the closer to its smallest number


def exact_softplus(x):
    """Torch's own is x above 20."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


FUNCTIONS = {
    "log_sigmoid": (elementary.log_sigmoid, functional.logsigmoid),
    "softplus": (elementary.softplus, exact_softplus),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_a_few_units_in_the_last_place(name):
    function, truth = FUNCTIONS[name]
    expected = truth(X.double())
    size = expected.abs().clamp(min=FULL_DIGITS)
    assert ((function(X).double() - expected).abs() / size).max() < 4e-7
    shifted = function(X * (1 + 1e-6)).double()
    assert ((shifted - expected).abs() / size).max() > 4e-7


def test_log1p_of_the_unit_interval():
    u = torch.cat([SIZES[SIZES <= 1], torch.linspace(0, 1, 100_001)])
    truth = torch.log1p(u.double())
    error = (elementary.log1p_of_unit(u).double() - truth).abs()
    assert (error <= 3e-7 * truth).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_at_the_ends(name):
    function, truth = FUNCTIONS[name]
    ends = torch.tensor([-math.inf, 0.0, math.inf, math.nan])
    torch.testing.assert_close(function(ends), truth(ends), equal_nan=True)
