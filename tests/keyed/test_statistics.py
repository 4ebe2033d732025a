# SPDX-License-Identifier: BSD-3-Clause
"""Laws and independence of keyed numbers. Each check gives a probability; what is wrong fails."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats  # type: ignore[import-untyped]

from tests.support.keyed_fills import (
    NAME,
    SEED,
    api,
    each_law,
    fill,
    key,
)

LEAST = 1e-4  # a probability that some of a few dozen checks may well have


Sample = NDArray[np.float64]


MANY = 1_000_000


@functools.cache
def sample(name: str, *args: float, parameter: str = NAME) -> Sample:
    drawn = fill(name, (MANY,), *args, generator=api.Key(SEED, parameter))
    return np.asarray(drawn.double().numpy())


def both_sides(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def law_p(x: Sample, cdf: Callable[[Sample], Sample], moments: Sequence[float]) -> float:
    """The least of Kolmogorov and Smirnov's and the first four moments'; `moments` are eight."""
    least = float(stats.kstest(x, cdf, method="asymp").pvalue)
    for k in (1, 2, 3, 4):
        mean, square = moments[k - 1], moments[2 * k - 1]
        z = (float((x**k).mean()) - mean) / math.sqrt((square - mean**2) / len(x))
        least = min(least, both_sides(z))
    return least


def normal_p(x: Sample) -> float:
    return law_p(x, special.ndtr, [0, 1, 0, 3, 0, 15, 0, 105])


def uniform_p(x: Sample) -> float:
    return law_p(x, lambda v: v, [1 / (k + 1) for k in range(1, 9)])


def trunc_p(x: Sample) -> float:
    mass = special.ndtr(2.0) - special.ndtr(-2.0)
    moments = [stats.truncnorm.moment(k, -2.0, 2.0) for k in range(1, 9)]
    return law_p(x, lambda v: (special.ndtr(v) - special.ndtr(-2.0)) / mass, moments)


@pytest.mark.slow
def test_the_normal_law() -> None:
    x = sample("normal_")
    assert normal_p(x) > LEAST
    assert normal_p(1.01 * x) < LEAST
    assert normal_p(x + 0.01) < LEAST
    assert normal_p(np.clip(x, -3.2, 3.2)) < LEAST  # 1374 of the million


def test_the_uniform_law() -> None:
    x = sample("uniform_")
    assert uniform_p(x) > LEAST
    assert uniform_p(x**1.01) < LEAST
    assert x.min() >= 0
    assert x.max() < 1


@pytest.mark.slow
def test_the_truncated_law() -> None:
    x = sample("trunc_normal_")
    assert trunc_p(x) > LEAST
    assert trunc_p(1.01 * x) < LEAST
    assert trunc_p(np.clip(sample("normal_"), -2, 2)) < LEAST


def correlation_p(x: Sample, y: Sample) -> float:
    """The least of the values' and the squares' (of the distance from the mean)."""
    x, y = x - x.mean(), y - y.mean()
    found = [np.corrcoef(x, y)[0, 1], np.corrcoef(x * x, y * y)[0, 1]]
    return min(both_sides(float(r) * math.sqrt(len(x))) for r in found)


@pytest.mark.slow
@each_law
def test_elements_are_independent(name: str, args: tuple[float, ...]) -> None:
    x = sample(name, *args)
    for lag in (1, 2, 3, 4, 5, 8, 16, 64):
        assert correlation_p(x[:-lag], x[lag:]) > LEAST, lag
    even, odd = x[::2], x[1::2]
    assert correlation_p(even, odd) > LEAST
    assert correlation_p(even, odd + 0.02 * even) < LEAST
    assert correlation_p(even, np.where(np.arange(len(odd)) % 20, odd, -even)) < LEAST
    for axis in (x.reshape(1000, 1000), x.reshape(4, -1)):
        assert correlation_p(axis[0], axis[1]) > LEAST


@each_law
def test_keys_are_independent(name: str, args: tuple[float, ...]) -> None:
    x, y = sample(name, *args), sample(name, *args, parameter="layers.1.w")
    assert correlation_p(x, y) > LEAST
    assert correlation_p(x, y + 0.02 * x) < LEAST
    assert not np.array_equal(x, y)


def rows_p(zeros: NDArray[np.bool_]) -> float:
    """Whether each row is in as many columns' choice as any other, given how many a column has."""
    rows, cols = zeros.shape
    p = zeros.mean()
    expected, variance = cols * p, cols * p * (1 - p) * rows / (rows - 1)
    statistic = ((zeros.sum(1) - expected) ** 2).sum() / variance
    return float(stats.chi2.sf(statistic, rows - 1))


def neighbours_p(zeros: NDArray[np.bool_]) -> float:
    """Whether rows next to each other are as often together as by chance."""
    rows, cols = zeros.shape
    each = zeros.mean() * rows
    chance = each * (each - 1) / (rows - 1) * cols
    together = (zeros & np.roll(zeros, 1, 0)).sum()  # of nearly Poisson's law
    return both_sides((together - chance) / math.sqrt(chance))


def test_zeros_are_spread_evenly() -> None:
    found = fill("sparse_", (20, 5000), 0.3, generator=key()).numpy() == 0
    assert (found.sum(0) == 6).all()
    assert rows_p(found) > LEAST
    assert neighbours_p(found) > LEAST
    assert neighbours_p(np.sort(found, 0)) < LEAST
    biased, two = found.copy(), found[:2, :1000]
    biased[:2, :1000] = two.any(0), two.all(0)  # the first row is served before the second
    assert rows_p(biased) < LEAST
