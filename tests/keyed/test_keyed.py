# SPDX-License-Identifier: BSD-3-Clause
"""Fills that take a Key, against a model that is written from the specification alone.

The tests called test_model_* hold the model to published words, torch.func._random and mpmath.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from numpy.typing import NDArray
from scipy import special, stats  # type: ignore[import-untyped]

import fastinit
from tests.support import keyed_model as model
from tests.support.compare import BF16, DTYPES, F16, F32, F64, bits, storage_bits
from tests.support.layouts import LAYOUTS

api: Any = fastinit
DATA = Path(__file__).parents[1] / "support" / "data"
SEED, NAME = 20240229, "layers.0.w"
PHILOX = model.philox_key(SEED, NAME)

Call = tuple[str, tuple[float, ...]]
LAWS: list[Call] = [
    ("uniform_", (-0.3, 0.7)),
    ("normal_", (0.1, 0.5)),
    ("trunc_normal_", (0.0, 1.0, -2.0, 2.0)),
    ("trunc_normal_", (0.1, 0.02, 0.13, 0.3)),
]
OF_FANS: list[Call] = [
    ("xavier_uniform_", (1.5,)),
    ("xavier_normal_", ()),
    ("kaiming_uniform_", (0.2,)),
    ("kaiming_normal_", ()),
]
CONSTANTS: list[Call] = [("constant_", (3.0,)), ("ones_", ()), ("zeros_", ())]
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 1000]
SIZES += [4095, 4096, 4097, 100_003]
LEAST = 1e-4  # a probability that some of a few dozen checks may well have

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_wide = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
each_law = pytest.mark.parametrize(("name", "args"), LAWS, ids=str)


def key() -> Any:
    return api.Key(SEED, NAME)


def fill(
    name: str,
    where: torch.Tensor | Sequence[int],
    *args: Any,
    dtype: torch.dtype = F32,
    **options: Any,
) -> torch.Tensor:
    """The filled tensor, or a filled one of that shape."""
    if isinstance(where, torch.Tensor):
        tensor = where
    else:
        poison = math.nan if dtype.is_floating_point else 77
        tensor = torch.full(tuple(where), poison, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bounds far from the mean, nothing to fill
        returned: torch.Tensor = getattr(fastinit, name)(tensor, *args, **options)
    assert returned is tensor
    return tensor


def assert_bits(found: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    wrong = (bits(found) != bits(expected)).nonzero()
    assert not len(wrong), f"{what}: {len(wrong)} of {found.numel()}, first {wrong[0].tolist()}"


def upto(n: int) -> model.Numbers:
    return np.arange(n, dtype=np.uint64)


# ---- the model itself


def known(name: str) -> Any:
    return json.loads((DATA / name).read_text())


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


TRUNCATED = [
    (0.0, 1.0, -2.0, 2.0),
    (0.0, 1.0, -0.1, 0.1),
    (0.0, 1.0, 0.0, 1.0),
    (0.0, 1.0, 2.0, 3.0),
    (0.0, 1.0, 5.0, 6.0),
    (0.0, 1.0, -6.0, -5.0),
    (0.0, 1.0, -1.0, 3.0),
    (0.0, 1.0, -100.0, 100.0),
    (0.0, 0.02, -2.0, 2.0),
    (0.3, 0.02, 0.25, 0.4),
    (-5.0, 2.0, -2.0, 2.0),
    (1000.0, 0.5, 999.1, 1002.0),
]
each_truncated = pytest.mark.parametrize("law", TRUNCATED, ids=str)


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


# ---- keys


def test_keys() -> None:
    for row in known("philox4x32_10.json")["keys"]:
        if row["name"] is not None:
            for found in (
                api.Key(row["seed"], row["name"]),
                api.Key(row["seed"], name=row["name"]),
                api.Key(row["seed"]).named(row["name"]),
            ):
                assert found.philox == int(row["philox"], 16), row
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises((ValueError, OverflowError)):
            api.Key(seed, "w")


def test_running_numbers() -> None:
    """Fills without a name count, those of nothing too (a rank may have none of a parameter)."""
    running = api.Key(7)
    for number in range(12):
        expected = model.uniform(model.philox_key(7, number=number), upto(9), F32)
        assert_bits(fill("uniform_", (9,), generator=running), expected, number)
        if number == 3:
            fill("uniform_", (9,), generator=running.named("w"))
            fill("uniform_", (9,), generator=api.Key(7))
    fill("uniform_", (0,), generator=running)
    fill("normal_", (3, 0), generator=running)
    fill("trunc_normal_", (0,), generator=running.part((5,), (5,)))
    fill("sparse_", (4, 4), 0.5, generator=running)
    fill("kaiming_normal_", (4, 4), generator=running)
    expected = model.uniform(model.philox_key(7, number=17), upto(9), F32)
    assert_bits(fill("uniform_", (9,), generator=running), expected)


# ---- numbers


BOUNDS = [(0.0, 1.0), (-0.3, 0.7), (-0.3, 0.3), (5.0, 7.3), (-1e4, 3.0), (2.0, 2.0)]
BOUNDS += [(1.0, 1.0 + 2.0**-22), (1.0, 1.0 + 2.0**-51)]


@each_dtype
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_uniform(dtype: torch.dtype, bounds: tuple[float, float]) -> None:
    expected = model.uniform(PHILOX, upto(SIZES[-1]), dtype, *bounds)
    for n in SIZES:
        found = fill("uniform_", (n,), *bounds, dtype=dtype, generator=key())
        assert_bits(found, expected[:n], n)


@pytest.mark.parametrize(("dtype", "n"), [(F32, 1 << 20), (F64, 200_001)], ids=str)
def test_normal(dtype: torch.dtype, n: int) -> None:
    found = fill("normal_", (n,), dtype=dtype, generator=key())
    distances = model.ulps(found, model.normal(PHILOX, upto(n), dtype))
    assert distances.max() <= 2, (distances.max(), distances.argmax())
    assert distances.max() > 0.2  # somewhere it is rounded: the model is not its own judge


@each_wide
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.02), (0.1, 0.3), (-300.0, 1e-3), (2.0, 0.0)])
def test_normal_is_scaled_with_one_rounding(dtype: torch.dtype, mean: float, std: float) -> None:
    n = 5001
    z = fill("normal_", (n,), dtype=dtype, generator=key())
    found = fill("normal_", (n,), mean, std, dtype=dtype, generator=key())
    if dtype == F64:
        assert_bits(found, torch.from_numpy(model.fma64(z.tolist(), std, mean)))
    else:
        assert_bits(found, torch.from_numpy(model.fma32(z.numpy(), std, mean)))


@each_wide
@each_truncated
def test_trunc_normal(dtype: torch.dtype, law: tuple[float, ...]) -> None:
    n = 200_000 if dtype == F32 else 50_000
    mean, std, low, high = law
    found = fill("trunc_normal_", (n,), *law, dtype=dtype, generator=key())
    assert found.isfinite().all()
    ends = torch.tensor([low, high], dtype=dtype)
    assert (found >= ends[0]).all()
    assert (found <= ends[1]).all()
    exact = model.trunc_normal(PHILOX, upto(n), dtype, *law)
    z = np.maximum(np.abs((exact - mean) / std), 0.5 if dtype == F32 else 0.1)
    rounding = torch.finfo(dtype).eps / 2 * (np.abs(exact) + abs(mean))
    allowed = (4e-7 if dtype == F32 else 1e-13) * z * std + rounding
    excess = np.abs(found.double().numpy() - exact) / allowed
    assert excess.max() <= 1, (excess.max(), excess.argmax())


@each_law
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bits_are_rounded_once(dtype: torch.dtype, name: str, args: tuple[float, ...]) -> None:
    wide = fill(name, (100_003,), *args, generator=key())
    found = fill(name, (100_003,), *args, dtype=dtype, generator=key())
    assert_bits(found, wide.to(dtype))


@each_dtype
@each_law
def test_sizes(dtype: torch.dtype, name: str, args: tuple[float, ...]) -> None:
    """What an element is does not depend on how many there are, nor where memory begins."""
    whole = fill(name, (SIZES[-1],), *args, dtype=dtype, generator=key())
    for n in SIZES:
        found = fill(name, torch.empty(n + 3, dtype=dtype)[n % 4 :][:n], *args, generator=key())
        assert_bits(found, whole[:n], n)


SHAPES = [(24, 40), (3, 5), (16, 8, 3, 3), (6, 4, 5), (1, 7, 2, 3, 2)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fans(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Bounds and deviations are those of torch.nn.init, to the last bit of a float."""
    field = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * field, shape[0] * field
    gain = torch_init.calculate_gain
    std = 1.5 * math.sqrt(2.0 / float(fan_in + fan_out))
    relu = gain("relu") / math.sqrt(fan_out)
    leaky = gain("leaky_relu", 0.2) / math.sqrt(fan_in)
    out: dict[str, Any] = {"mode": "fan_out", "nonlinearity": "relu"}
    cases: list[tuple[str, dict[str, Any], str, float]] = [
        ("xavier_uniform_", {"gain": 1.5}, "uniform_", math.sqrt(3.0) * std),
        ("xavier_normal_", {"gain": 1.5}, "normal_", std),
        ("kaiming_uniform_", {"a": 0.2}, "uniform_", math.sqrt(3.0) * leaky),
        ("kaiming_uniform_", out, "uniform_", math.sqrt(3.0) * relu),
        ("kaiming_normal_", {"a": 0.2}, "normal_", leaky),
        ("kaiming_normal_", out, "normal_", relu),
    ]
    for name, options, law, scale in cases:
        found = fill(name, shape, dtype=dtype, generator=key(), **options)
        first = -scale if law == "uniform_" else 0.0
        assert_bits(found, fill(law, shape, first, scale, dtype=dtype, generator=key()), name)
        if law == "uniform_":
            at = model.elements(shape)
            assert_bits(found, model.uniform(PHILOX, at, dtype, -scale, scale), name)


@each_dtype
def test_sparse(dtype: torch.dtype) -> None:
    cases = [(1, 1, 0.5), (10, 7, 0.3), (64, 33, 0.9), (5, 4, 1.0), (5, 4, 0.0), (100, 3, 0.01)]
    for rows, cols, sparsity in [*cases, (257, 65, 0.5), (3, 0, 0.5), (0, 3, 0.5)]:
        std = 0.01 if rows > 50 else 0.7
        found = fill("sparse_", (rows, cols), sparsity, std, dtype=dtype, generator=key())
        expected = fill("normal_", (rows, cols), 0.0, std, dtype=dtype, generator=key())
        zeros = torch.from_numpy(model.zeros(PHILOX, rows, cols, sparsity))
        assert_bits(found, expected.masked_fill(zeros, 0), (rows, cols, sparsity))


# ---- blocks of a whole


WHOLES = [(3001,), (53, 61), (13, 17, 15), (8, 9, 5, 11), (4, 5, 6, 7, 3)]


def some_blocks(whole: Sequence[int], count: int) -> list[tuple[list[int], list[int]]]:
    """Offsets and shapes: all, nothing, the last element, and random ones."""
    rng = np.random.default_rng(len(whole))
    found = [([0] * len(whole), list(whole)), (list(whole), [0] * len(whole))]
    found.append(([n - 1 for n in whole], [1] * len(whole)))
    while len(found) < count:
        offset = [int(rng.integers(0, n)) for n in whole]
        shape = [int(rng.integers(1, n - o + 1)) for n, o in zip(whole, offset)]
        found.append((offset, shape))
    return found


@each_dtype
@pytest.mark.parametrize("whole", WHOLES, ids=str)
def test_blocks(dtype: torch.dtype, whole: tuple[int, ...]) -> None:
    calls = [*LAWS, *(OF_FANS if len(whole) > 1 else [])]
    if len(whole) == 2:
        calls.append(("sparse_", (0.4, 0.3)))
    for name, args in calls:
        expected = fill(name, whole, *args, dtype=dtype, generator=key())
        for i, (offset, shape) in enumerate(some_blocks(whole, 12)):
            block = torch.full(shape, 13.0, dtype=dtype)
            if i % 2:  # transposed in memory
                block = torch.full(shape[::-1], 13.0, dtype=dtype).permute(*range(len(shape))[::-1])
            place = key().part(whole, tuple(offset))
            fill(name, block, *args, generator=place)
            where = tuple(slice(o, o + n) for o, n in zip(offset, shape))
            assert_bits(block, expected[where], (name, args, offset, shape))


@each_dtype
@each_law
def test_pieces(dtype: torch.dtype, name: str, args: tuple[float, ...]) -> None:
    """t[k:], beginning anywhere in a block of words, long enough for threads and vectors."""
    n = 70_001
    expected = fill(name, (n,), *args, dtype=dtype, generator=key())
    for k in (*range(1, 19), 63, 64, 65, 4099, n - 1):
        place = key().part((n,), (k,))
        found = fill(name, (n - k,), *args, dtype=dtype, generator=place)
        assert_bits(found, expected[k:], k)


FAR = [
    ((2**35,), (2**34 + 5,), (4099,)),
    ((2**62,), (2**62 - 4099,), (4099,)),
    ((2**20, 2**15), (2**19 + 1, 77), (3, 1001)),
    ((3, 2**31, 5), (2, 2**31 - 300, 1), (1, 300, 3)),
]


@each_dtype
@pytest.mark.parametrize(("whole", "offset", "shape"), FAR, ids=str)
def test_far_blocks(
    dtype: torch.dtype, whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Numbers of elements and of blocks of words above 2^32."""
    at = model.elements(whole, offset, shape)
    place = key().part(whole, offset)
    found = fill("uniform_", shape, -0.3, 0.7, dtype=dtype, generator=place)
    assert_bits(found, model.uniform(PHILOX, at, dtype, -0.3, 0.7))
    if dtype in (F32, F64):
        found = fill("normal_", shape, dtype=dtype, generator=place)
        assert model.ulps(found, model.normal(PHILOX, at, dtype)).max() <= 2
        found = fill("trunc_normal_", shape, dtype=dtype, generator=place)
        exact = model.trunc_normal(PHILOX, at, dtype, 0.0, 1.0, -2.0, 2.0)
        allowed = (4e-7 if dtype == F32 else 1e-13) + torch.finfo(dtype).eps
        assert np.abs(found.double().numpy() - exact).max() <= 2 * allowed


# ---- memory, threads, instruction sets


def six_dims(n: int, dtype: torch.dtype) -> torch.Tensor:
    base = torch.full((3, 2, 4, 5, 2, n // 240), 13.0, dtype=dtype)
    return base.permute(5, 0, 3, 1, 4, 2)[::2, :, 1:4]


@each_dtype
@pytest.mark.parametrize("layout", [*LAYOUTS, "six_dims"])
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    """The same value at the same place of the tensor, whatever memory is; nothing beside it."""
    make: Callable[[int, torch.dtype], torch.Tensor] = LAYOUTS.get(layout, six_dims)
    for name, args in LAWS:
        for n in (60, 9000):
            found, expected = make(n, dtype), make(n, dtype)
            values = fill(name, tuple(found.shape), *args, dtype=dtype, generator=key())
            with torch.no_grad():
                expected.copy_(values)
            fill(name, found, *args, generator=key())
            before, after = storage_bits(expected), storage_bits(found)
            assert before is not None
            assert after is not None
            assert torch.equal(before, after), (name, n)


def digest(*tensors: torch.Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(bits(tensor).numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@each_law
def test_threads(dtype: torch.dtype, name: str, args: tuple[float, ...]) -> None:
    found = set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        flat = fill(name, (1_000_003,), *args, dtype=dtype, generator=key())
        turned = torch.empty(1009, 991, dtype=dtype).t()
        place = key().part((1000, 1050), (9, 41))
        fill(name, turned, *args, generator=place)
        found.add(digest(flat, turned))
    assert len(found) == 1


def test_threads_sparse() -> None:
    found = set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.add(digest(fill("sparse_", (257, 1301), 0.3, generator=key())))
    assert len(found) == 1


DIGEST = """
    import hashlib, warnings, torch, fastinit
    warnings.simplefilter("ignore")
    sha = hashlib.sha256()
    calls = [("uniform_", (-0.3, 0.7)), ("uniform_", (0.0, 1.0)), ("normal_", (0.0, 1.0)),
             ("uniform_", (1.0, 1.0 + 2.0**-22)), ("normal_", (0.1, 0.5)),
             ("sparse_", (0.3,)), ("xavier_uniform_", ()), ("kaiming_normal_", ())]
    calls += [("trunc_normal_", law) for law in %s]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        for name, args in calls:
            for shape in ((1, 3), (5, 4), (47, 31), (311, 641)):
                for way in range(3):
                    base = torch.full(shape, 13.0, dtype=dtype)
                    t = (base, base.t(), base[:, ::2])[way]
                    key = fastinit.Key(5, "w")
                    if way:
                        key = key.part((700, 2**33), (2, 2**32 + 3))
                    if name != "sparse_" or not way:
                        getattr(fastinit, name)(t, *args, generator=key)
                    sha.update(base.view(integer).numpy().tobytes())
    print(fastinit._cpu.target(), sha.hexdigest())
"""


def test_targets(python: Callable[..., Any]) -> None:
    names = [name for name, works in fastinit._cpu.targets() if works]
    assert "scalar" in names
    found = set()
    for name in names:
        done = python(DIGEST % TRUNCATED, FASTINIT_TARGET=name)
        assert done.returncode == 0, done.stderr[-2000:]
        target, sha = done.stdout.split()
        assert target == name
        found.add(sha)
    assert len(found) == 1


# ---- what else a call does


@pytest.mark.parametrize(("name", "args"), [*LAWS, *OF_FANS, ("sparse_", (0.3,))], ids=str)
def test_parameters(name: str, args: tuple[float, ...]) -> None:
    """Written under no_grad, counted by autograd, and no generator of torch's takes part."""
    parameter = torch.nn.Parameter(torch.empty(12, 7))
    torch.empty(5).normal_()
    before, version = torch.get_rng_state(), parameter._version
    fill(name, parameter, *args, generator=key())
    assert parameter._version > version
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter.grad_fn is None
    assert torch.equal(torch.get_rng_state(), before)
    assert_bits(parameter.detach(), fill(name, (12, 7), *args, generator=key()))
    assert_bits(parameter.detach(), fill(name, (12, 7), *args, generator=api.Key(SEED).named(NAME)))


ANY = (RuntimeError, ValueError, TypeError, NotImplementedError)
BAD = (RuntimeError, ValueError)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("normal_", (0.0, -1.0)),
        ("trunc_normal_", (0.0, -1.0)),
        ("sparse_", (0.5, -1.0)),
        ("uniform_", (1.0, 0.0)),
        ("uniform_", (-3e38, 3e38)),
        ("trunc_normal_", (0.0, 1.0, 2.0, -2.0)),
    ],
    ids=str,
)
def test_bad_arguments(name: str, args: tuple[float, ...]) -> None:
    with pytest.raises(BAD):
        fill(name, (8, 8), *args, generator=key())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize(("name", "args"), [*LAWS, *OF_FANS, ("sparse_", (0.3,))], ids=str)
def test_random_laws_are_for_floats(dtype: torch.dtype, name: str, args: tuple[float, ...]) -> None:
    with pytest.raises(ANY):
        fill(name, (8, 8), *args, dtype=dtype, generator=key())


PLACES = [
    ((16,), (0,)),
    ((16, 16), (0,)),
    ((16, 16, 1), (0, 0, 0)),
    ((16, 16), (9, 0)),
    ((16, 16), (0, 17)),
    ((16, 7), (0, 0)),
    ((16, 16), (-1, 0)),
]


@pytest.mark.parametrize(("whole", "offset"), PLACES, ids=str)
@pytest.mark.parametrize(("name", "args"), [LAWS[0], OF_FANS[3]], ids=str)
def test_places_that_are_none(
    name: str, args: tuple[float, ...], whole: tuple[int, ...], offset: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        fill(name, (8, 8), *args, generator=key().part(whole, offset))


def test_parts_of_a_key() -> None:
    """A part keeps seed, name and the running numbers of its key, and says what it is."""
    running = api.Key(5)
    part = running.part([4, 90], torch.Size([1, 0]))
    assert (part.global_shape, part.offset) == ((4, 90), (1, 0))
    assert repr(part) == "Key(5).part((4, 90), (1, 0))"
    assert [running.take()[1], part.take()[1], running.take()[1]] == ["#0", "#1", "#2"]
    twin = pickle.loads(pickle.dumps(part.named("w")))
    assert (twin.name, twin.offset, twin.philox) == ("w", (1, 0), running.named("w").philox)
    for wrong in ((4.0, 90), "ab", None):
        with pytest.raises(TypeError):
            running.part(wrong, (0, 0))


@pytest.mark.parametrize("name", ["uniform_", "kaiming_normal_", "orthogonal_", "eye_", "zeros_"])
def test_what_to_write_instead_of_the_old_keywords(name: str) -> None:
    """Up to 0.5 the functions took global_shape= and offset=."""
    function: Any = getattr(fastinit, name)
    with pytest.raises(TypeError, match=r"since 0\.6: (write|fill|a part)"):
        function(torch.empty(4, 4), global_shape=(8, 8), offset=(0, 0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'shape'"):
        function(torch.empty(4, 4), shape=(8, 8))


# ---- statistics: each check gives a probability; seeds are fixed, and what is wrong fails


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


def halves(x: Sample) -> tuple[Sample, Sample]:
    return x[::2], x[1::2]


@each_law
def test_elements_are_independent(name: str, args: tuple[float, ...]) -> None:
    x = sample(name, *args)
    for lag in (1, 2, 3, 4, 5, 8, 16, 64):
        assert correlation_p(x[:-lag], x[lag:]) > LEAST, lag
    even, odd = halves(x)
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
