# SPDX-License-Identifier: BSD-3-Clause
"""The numpy model of keyed numbers, held to published words, torch.func._random and mpmath."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support import keyed_model as model
from tests.support.compare import F32, F64
from tests.support.keyed_fills import (
    each_truncated,
    each_wide,
    known,
    upto,
)


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_model_words() -> None:
    data = known("philox4x32_10.json")
    for row in data["known"]:
        counter, (low, high), expected = (hexes(row[of]) for of in ("counter", "key", "words"))
        assert model.encrypted(counter, high << 32 | low).tolist() == expected
    for row in data["blocks"]:
        k, block = int(row["key"], 16), int(row["block"], 16)
        expected = hexes(row["words"])
        assert model.blocks(k, np.uint64(block), row["domain"]).tolist() == expected
        if block < 2**61:
            numbers = np.array([4 * block + i for i in (3, 0, 2, 1)], np.uint64)
            found = model.words(k, numbers, row["domain"])
            assert found.tolist() == [expected[i] for i in (3, 0, 2, 1)]


def test_model_keys() -> None:
    message = b"fastinit 1\n\x05\0\0\0\0\0\0\0/w"
    first = int.from_bytes(hashlib.sha256(message).digest()[:8], "little")
    assert model.philox_key(5, "w") == first
    for row in known("philox4x32_10.json")["keys"]:
        found = model.philox_key(row["seed"], row["name"], row["number"])
        assert found == int(row["philox"], 16)


def func_random(law: str) -> list[tuple[int, torch.dtype, dict[str, float], NDArray[Any]]]:
    cases = [case for case in known("torch_func_random.json")["cases"] if case["law"] == law]
    assert cases
    return [
        (
            case["seed"],
            getattr(torch, case["dtype"]),
            case["arguments"],
            np.array([float.fromhex(value) for value in case["values"].split()]),
        )
        for case in cases
    ]


def test_model_uniform_is_torchs() -> None:
    """torch.func._random's for the seed. Its CPU kernel rounds the product too (its GPU kernels do
    not), which shows unless the width is a power of two: then a unit of the larger end may differ.
    """
    for seed, dtype, bounds, values in func_random("uniform"):
        u = model.unit(seed, upto(len(values)), dtype)
        low, high = (u.dtype.type(bounds[end]) for end in ("low", "high"))
        twice = u * (high - low) + low
        assert np.array_equal(twice, values.astype(u.dtype)), (seed, dtype, bounds)
        found = model.uniform(seed, upto(len(values)), dtype, **bounds).double().numpy()
        if math.frexp(high - low)[0] == 0.5:
            assert np.array_equal(found, values), (seed, dtype, bounds)
        else:
            assert np.abs(found - values).max() <= np.finfo(u.dtype).eps * max(-low, high)


def test_model_normal_is_torchs() -> None:
    within = known("torch_func_random.json")["normals_within"]
    for seed, dtype, _, values in func_random("normal"):
        distance = np.abs(model.normal(seed, upto(len(values)), dtype) - values).max()
        assert distance < within[str(dtype).split(".")[1]], (seed, dtype, distance)


@pytest.mark.slow
def test_model_fma() -> None:
    """Nearest to the exact value, and even if two are."""
    rng = np.random.default_rng(5)
    x = (rng.integers(0, 2**24, 3000) * 2.0**-24).astype(np.float32)
    x[:4] = [0, 2**-24, 1 - 2**-24, 0.5]
    products = [(1.0, 2.0**25 + 4), (0.6, -0.3), (2.3, 5.0), (1e-38, 1e-39), (3.0, 2.0**30)]
    products += [(1 + 2**-23, 1 + 2**-23), (2.0**24 - 1, 2.0**48)]
    for y, z in products:
        y32, z32 = np.float32(y), np.float32(z)
        found = model.fma32(x, y32, z32)
        for value, given in zip(found.tolist(), x.tolist()):
            exact = Fraction(given) * Fraction(float(y32)) + Fraction(float(z32))
            distance = abs(Fraction(value) - exact)
            for side in (-np.inf, np.inf):
                other = np.nextafter(np.float32(value), np.float32(side))
                rival = abs(Fraction(float(other)) - exact)
                even = not np.float32(value).view(np.int32) & 1
                assert distance < rival or (distance == rival and even), (given, y, z)
    for y, z in [(0.6, -0.3), (1 + 2.0**-52, 2.0**-53), (3e-310, 1e-310)]:
        nearest = [float(Fraction(float(v)) * Fraction(y) + Fraction(z)) for v in x]
        assert model.fma64(x.tolist(), y, z).tolist() == nearest


# Where logarithms, sines and cosines go wrong: ends, middles, quarters of the circle.
EDGES = [0, 1, 2**32 - 1, 2**32 - 2, 2**31 - 1, 2**31, 2**30 - 1, 2**30, 3 << 30, (3 << 30) - 1]


def at_edges(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let the words be all pairs of edges (float64: twice), then some others."""
    pairs = [word for r in EDGES for t in EDGES for word in (r, t)]
    twice = [word for r in EDGES for t in EDGES for word in (r, r, t, t)]
    rng = np.random.default_rng(3)
    table = np.array([*pairs, *twice, *rng.integers(0, 2**32, 200)], np.uint64)
    monkeypatch.setattr(
        model, "words", lambda k, number, domain=0: table[np.asarray(number, np.int64)]
    )
    return len(table)


def precise(x: Any) -> Any:
    return mpmath.mpf(float(x)) + mpmath.mpf(float(x - type(x)(float(x))))


def plus_half(n: int, dtype: torch.dtype) -> Any:
    if dtype == F64:
        return mpmath.mpf(n) + 0.5
    return mpmath.mpf(float(np.float32(np.float32(n) + np.float32(0.5))))


@each_wide
def test_model_normal_is_the_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    many = at_edges(monkeypatch) // (2 if dtype == F64 else 1)
    z = model.normal(0, upto(many), dtype)
    number, long = model.words(0, upto(2 * many if dtype == F64 else many)), dtype == F64
    m, bits_of = [int(w) for w in number], 53 if long else 32
    if long:
        m = [(m[2 * i] << 32 | m[2 * i + 1]) >> 11 for i in range(many)]
    one, quarter = 1 << bits_of, 1 << (bits_of - 2)
    with mpmath.workdps(40):
        for i in range(many // 2 * 2):
            r, t = m[i - i % 2], m[i - i % 2 + 1]
            near = plus_half(r - one if 2 * r >= one else r, dtype) / one
            radius = mpmath.sqrt(-2 * mpmath.log(near if 2 * r < one else 1 + near))
            turned = (t + quarter // 2) // quarter
            left = plus_half(t - turned * quarter, dtype) / one
            angle = 2 * mpmath.pi * (mpmath.mpf(turned) / 4 + left)
            exact = radius * (mpmath.sin(angle) if i % 2 else mpmath.cos(angle))
            assert abs(precise(z[i]) / exact - 1) < (1e-18 if long else 1e-15), (i, r, t)
            if not long:  # without the roundings to float32, by how much would it differ?
                plain = mpmath.sqrt(-2 * mpmath.log((mpmath.mpf(r) + 0.5) / one))
                full = 2 * mpmath.pi * (mpmath.mpf(t) + 0.5) / one
                other = plain * (mpmath.sin(full) if i % 2 else mpmath.cos(full))
                assert abs(exact / other - 1) < 2.0**-23, (i, r, t)


@pytest.mark.slow
@each_wide
@each_truncated
def test_model_trunc_normal_is_the_formula(
    dtype: torch.dtype, law: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = at_edges(monkeypatch) // (2 if dtype == F64 else 1)
    at = np.arange(0, many, 7 if dtype == F32 else 3, dtype=np.uint64)
    x = model.trunc_normal(0, at, dtype, *law)
    mean, std, low, high = law
    with mpmath.workdps(60):
        alpha, beta = ((mpmath.mpf(end) - mean) / std for end in (low, high))
        p, mass = mpmath.ncdf(alpha), mpmath.ncdf(beta) - mpmath.ncdf(alpha)
        for i, found in zip(at.tolist(), x):
            if dtype == F64:
                w0, w1 = (int(w) for w in model.words(0, np.array([2 * i, 2 * i + 1])))
                u = (mpmath.mpf((w0 << 32 | w1) >> 11) + 0.5) / 2**53
            else:
                u = (mpmath.mpf(int(model.words(0, np.array([i]))[0])) + 0.5) / 2**32
            z = mpmath.sqrt(2) * mpmath.erfinv(2 * (p + u * mass) - 1)
            exact = mean + std * z
            slack = max(abs(z), 0.1) * std * 2e-15 + abs(mean) * 3e-16
            slack += abs(exact) * (2e-16 if dtype == F64 else 2**-24)  # bounds are rounded
            assert abs(precise(found) - exact) < slack, (i, law)
