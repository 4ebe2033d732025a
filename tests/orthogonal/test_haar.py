# SPDX-License-Identifier: BSD-3-Clause
"""Both ways to orthogonal matrices are uniform by the Haar measure, as far as samples show.

Each check gives a probability. Seeds are fixed, and what lacks the correction of signs fails.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import stats

import fastinit
from fastinit.cpu import qr as cpu_qr
from tests.support.marks import slow, slow_but
from tests.support.qr_model import drawn

LEAST = 1e-5  # a probability that some of a hundred checks may well have
F32, F64 = torch.float32, torch.float64
Sample = np.ndarray  # (count, rows, columns)
SHAPES = [(1, 1), (2, 2), (3, 3), (5, 5), (8, 8), (7, 3), (3, 7), (1, 6), (6, 1), (20, 20)]


def factored(shape: tuple[int, int], count: int, dtype: torch.dtype) -> Sample:
    g = torch.Generator().manual_seed(17 + sum(shape))
    t = torch.empty(count, *shape, dtype=dtype)
    return fastinit.orthogonal_batched_(t, generator=g).double().numpy()


def packed(shape: tuple[int, int], count: int, dtype: torch.dtype) -> torch.Tensor:
    m, n = max(shape), min(shape)
    g = torch.Generator().manual_seed(29 + sum(shape))
    return drawn((count, m * n - n * (n - 1) // 2), dtype, g)


def direct(shape: tuple[int, int], count: int, dtype: torch.dtype) -> Sample:
    t = torch.empty(count, *shape, dtype=dtype)
    return cpu_qr.write_haar_(t, packed(shape, count, dtype)).double().numpy()


def factored_unsigned(shape: tuple[int, int], count: int, dtype: torch.dtype) -> Sample:
    g = np.random.default_rng(3).standard_normal((count, max(shape), min(shape)))
    q = np.linalg.qr(g).Q
    return q if shape[0] >= shape[1] else q.transpose(0, 2, 1)


def stewart(shape: tuple[int, int], count: int, signed: bool) -> Sample:
    """Many at once, in numpy."""
    m, n = max(shape), min(shape)
    x = np.zeros((count, m, n))
    rows, columns = np.tril_indices(m, 0, n)
    x[:, rows, columns] = packed(shape, count, F64).numpy()
    q = np.tile(np.eye(m, n), (count, 1, 1))
    for k in reversed(range(n)):
        v = x[:, k:, k].copy()
        beta = -np.copysign(np.linalg.norm(v, axis=1), v[:, 0])
        v[:, 0] -= beta
        v /= np.linalg.norm(v, axis=1)[:, None]
        q[:, k:, k:] -= 2 * v[:, :, None] * (v[:, None] @ q[:, k:, k:])
        if signed:
            q[:, :, k] *= np.sign(beta)[:, None]
    return q if shape[0] >= shape[1] else q.transpose(0, 2, 1)


def direct_unsigned(shape: tuple[int, int], count: int, dtype: torch.dtype) -> Sample:
    return stewart(shape, count, False)


Way = Callable[[tuple[int, int], int, torch.dtype], Sample]


# ---- what holds for the entries ------------------------------------------------------------------


def by_z(values: np.ndarray, mean: float, variance: float) -> float:
    """Probability of the largest deviation among means over the samples."""
    z = np.abs(values.mean(0) - mean) / math.sqrt(variance / len(values))
    return min(1.0, float(2 * stats.norm.sf(z.max()) * z.size))


def law(m: int) -> Callable[[np.ndarray], np.ndarray]:
    """Distribution of one entry of a unit vector in m dimensions."""
    square = stats.beta(0.5, (m - 1) / 2)
    return lambda q: 0.5 + 0.5 * np.sign(q) * square.cdf(q * q)


def entries(q: Sample) -> Iterator[tuple[str, float]]:
    rows, columns = q.shape[1:]
    m = max(rows, columns)
    e2, e4 = 1 / m, 3 / (m * (m + 2))
    e8 = 105 / (m * (m + 2) * (m + 4) * (m + 6))
    yield "mean", by_z(q, 0, e2)
    yield "signs", by_z(np.sign(q), 0, 1)
    yield "diagonal", by_z(np.sign(np.diagonal(q, axis1=1, axis2=2)), 0, 1)
    if m == 1:
        return
    yield "square", by_z(q**2, e2, e4 - e2**2)
    yield "fourth", by_z(q**4, e4, e8 - e4**2)
    for i, j in {(0, 0), (rows - 1, columns - 1), (0, columns - 1), (rows - 1, 0)}:
        yield f"law of {i}, {j}", stats.kstest(q[:, i, j], law(m)).pvalue
    if min(rows, columns) > 1:
        both = (q[:, 0, 0] * q[:, 1, 1])[:, None]
        squares = (m + 1) / ((m - 1) * m * (m + 2))
        yield "product", by_z(both, 0, squares)
        spread = float((both**2).var())
        yield "product of squares", by_z(both**2, squares, spread)
        # Signs of different entries are independent in pairs:
        yield "sign of a product", by_z(np.sign(both), 0, 1)
        four = (both[:, 0] * q[:, 0, 1] * q[:, 1, 0])[:, None]
        yield "four", by_z(four, -1 / ((m - 1) * m * (m + 2)), float(four.var()))


def rotated(q: Sample) -> Iterator[tuple[str, float]]:
    """Fixed rotations from both sides do not matter, nor do transposition and exchange."""
    rows, columns = q.shape[1:]
    m = max(rows, columns)
    if m == 1:
        return
    r = np.random.default_rng(5)
    left, right = (np.linalg.qr(r.standard_normal((k, k))).Q for k in (rows, columns))
    turned = left @ q @ right
    for name, p in entries(turned):
        yield f"rotated, {name}", p
    for side, other in (("left", left @ q), ("right", q @ right)):
        yield f"{side}, law", stats.kstest(other[:, 0, 0], law(m)).pvalue
    if rows != columns:  # the projection on what the columns span
        n = min(rows, columns)
        own = (q if rows > columns else q.transpose(0, 2, 1))[:, 0]
        beta = stats.beta(n / 2, (m - n) / 2)
        yield "projection", stats.kstest((own**2).sum(1), beta.cdf).pvalue


# ---- what holds for square matrices --------------------------------------------------------------


@functools.cache
def reference(n: int) -> Sample:
    return np.asarray(stats.ortho_group.rvs(n, size=4000, random_state=11)).reshape(-1, n, n)


def angles(q: Sample) -> np.ndarray:
    return np.sort(np.abs(np.angle(np.linalg.eigvals(q))), axis=1)


def spectrum(q: Sample) -> Iterator[tuple[str, float]]:
    n = q.shape[1]
    determinant = np.linalg.det(q)
    np.testing.assert_allclose(np.abs(determinant), 1, atol=1e-5)
    yield "determinant", by_z(np.sign(determinant)[:, None], 0, 1)
    if n < 2:
        return
    if n == 2:  # rotations by uniform angles, and reflections at uniform axes
        for part in (determinant > 0, determinant < 0):
            if not part.any():
                continue
            angle = np.arctan2(q[part, 1, 0], q[part, 0, 0])
            uniform = stats.uniform(-math.pi, 2 * math.pi)
            yield "angle", stats.kstest(angle, uniform.cdf).pvalue
        return  # the trace of a reflection is 0 up to rounding
    if n == 3:  # density (1 - cos t) / pi
        for sign in (1, -1):
            trace = sign * np.trace(q[np.sign(determinant) == sign], axis1=1, axis2=2)
            if not trace.size:
                continue
            angle = np.arccos(np.clip((trace - 1) / 2, -1, 1))
            yield "angle", stats.kstest(angle, lambda t: (t - np.sin(t)) / math.pi).pvalue
    theirs = reference(n)
    u = theirs[0]
    for name, a, b in [
        ("trace", q, theirs),
        ("trace of the square", q @ q, theirs @ theirs),
        ("trace of the cube", q @ q @ q, theirs @ theirs @ theirs),
        ("trace, rotated", u @ q, theirs),
        ("trace of the square, rotated", u @ q @ u @ q, theirs @ theirs),
    ]:
        traces = [np.trace(x, axis1=1, axis2=2) for x in (a, b)]
        yield name, stats.ks_2samp(*traces).pvalue
    ours, their = angles(q), angles(theirs)
    for which in {n // 2, (n - 1) // 2} - {0, n - 1}:
        yield f"angle {which}", stats.ks_2samp(ours[:, which], their[:, which]).pvalue


def unlikely(q: Sample, *checks: Callable[[Sample], Iterator[tuple[str, float]]]) -> list[str]:
    return [f"{name}: {p:.1e}" for check in checks for name, p in check(q) if not p > LEAST]


# ---- tests ---------------------------------------------------------------------------------------


USUAL = [(2, 2), (3, 3), (5, 5), (7, 3)]


@pytest.mark.parametrize("shape", slow_but(SHAPES, *USUAL), ids=str)
@pytest.mark.parametrize("dtype", [F32, *slow([F64])], ids=str)
@pytest.mark.parametrize("way", [direct, factored])
def test_uniform(way: Way, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    q = way(shape, 12000 if max(shape) < 20 else 2500, dtype)
    small = min(shape)
    product = q.transpose(0, 2, 1) @ q if shape[0] >= shape[1] else q @ q.transpose(0, 2, 1)
    assert np.abs(product - np.eye(small)).max() < (1e-6 if dtype == F32 else 1e-13)
    assert unlikely(q, entries, rotated) == []
    if shape[0] == shape[1] and (way is direct or dtype == F32):
        assert unlikely(q[:6000], spectrum) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", [direct, factored])
def test_in_float(way: Way) -> None:
    """Where float32 is no longer computed in double."""
    q = way((70, 66), 800, F32)
    assert unlikely(q, entries, rotated) == []
    assert unlikely(np.concatenate([way((66, 66), 800, F32)]), entries, rotated) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", [direct, factored])
def test_16_bits(way: Way, dtype: torch.dtype) -> None:
    assert unlikely(way((5, 5), 4000, dtype), entries) == []


@pytest.mark.slow
def test_scipy_passes() -> None:
    for n in (2, 3, 5):
        q = np.asarray(stats.ortho_group.rvs(n, size=6000, random_state=2))
        assert unlikely(q, entries, rotated, spectrum) == []
    assert unlikely(stewart((5, 5), 6000, True), entries, rotated, spectrum) == []


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 3), *slow([(1, 1), (2, 2), (5, 5), (7, 3), (1, 6)])])
@pytest.mark.parametrize("way", [direct_unsigned, *slow([factored_unsigned])])
def test_without_signs_it_fails(way: Way, shape: tuple[int, int]) -> None:
    q = way(shape, 6000, F64)
    assert unlikely(q, entries)
    if max(shape) > 1:
        assert unlikely(q, rotated)
    if shape[0] == shape[1]:
        assert unlikely(q, spectrum)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5])
def test_other_mistakes_fail(n: int) -> None:
    """Rotations only; columns in an order; a positive first row; one reflector too few."""
    q = stewart((n, n), 6000, True)
    assert unlikely(q, spectrum) == []
    rotations = q.copy()
    rotations[np.linalg.det(q) < 0, :, 0] *= -1
    assert unlikely(rotations, spectrum)
    ordered = np.take_along_axis(q, np.argsort(q[:, :1], axis=2), axis=2)
    assert unlikely(ordered, entries)
    positive = q * np.sign(q[:, :1])
    assert unlikely(positive, entries)
    few = q.copy()
    few[:, :, -1] *= np.sign(np.linalg.det(q))[:, None]
    assert unlikely(few, spectrum)
