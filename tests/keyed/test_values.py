# SPDX-License-Identifier: BSD-3-Clause
"""Fills that take a Key, against a model that is written from the specification alone."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from tests.support import keyed_model as model
from tests.support.compare import BF16, F16, F32, F64, bits, storage_bits
from tests.support.keyed_fills import (
    LAWS,
    OF_FANS,
    PHILOX,
    TRUNCATED,
    assert_bits,
    each_dtype,
    each_law,
    each_truncated,
    each_wide,
    fill,
    key,
    upto,
)
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow_but

SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 1000]
SIZES += [4095, 4096, 4097, 100_003]


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


# ---- parts of a whole ----


WHOLES = [(3001,), (53, 61), (13, 17, 15), (8, 9, 5, 11), (4, 5, 6, 7, 3)]


def some_parts(whole: Sequence[int], count: int) -> list[tuple[list[int], list[int]]]:
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
def test_parts(dtype: torch.dtype, whole: tuple[int, ...]) -> None:
    calls = [*LAWS, *(OF_FANS if len(whole) > 1 else [])]
    if len(whole) == 2:
        calls.append(("sparse_", (0.4, 0.3)))
    for name, args in calls:
        expected = fill(name, whole, *args, dtype=dtype, generator=key())
        for i, (offset, shape) in enumerate(some_parts(whole, 12)):
            part = torch.full(shape, 13.0, dtype=dtype)
            if i % 2:  # transposed in memory
                part = torch.full(shape[::-1], 13.0, dtype=dtype).permute(*range(len(shape))[::-1])
            place = key().part(whole, tuple(offset))
            fill(name, part, *args, generator=place)
            where = tuple(slice(o, o + n) for o, n in zip(offset, shape))
            assert_bits(part, expected[where], (name, args, offset, shape))


@each_dtype
@each_law
def test_pieces(dtype: torch.dtype, name: str, args: tuple[float, ...]) -> None:
    """t[k:], beginning anywhere in a block of words, long enough for threads and vectors."""
    n = 70_001
    expected = fill(name, (n,), *args, dtype=dtype, generator=key())
    for k in (*range(1, 10), 16, 17, 63, 65, 4099, n - 1):
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
def test_far_parts(
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


# ---- memory, threads, instruction sets ----


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
@pytest.mark.parametrize(("name", "args"), [*LAWS, ("sparse_", (0.3,))], ids=str)
def test_threads(dtype: torch.dtype, name: str, args: tuple[float, ...]) -> None:
    found = set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        shape = (257, 1301) if name == "sparse_" else (400_003,)
        flat = fill(name, shape, *args, dtype=dtype, generator=key())
        turned = torch.empty(509, 591, dtype=dtype).t()
        fill(name, turned, *args, generator=key().part((600, 550), (9, 41)))
        found.add(digest(flat, turned))
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
            for shape in ((1, 3), (5, 4), (47, 31), (103, 341)):
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


@functools.cache
def digest_here() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
        exec(textwrap.dedent(DIGEST % TRUNCATED), {})
    return printed.getvalue().split()[1]


@pytest.mark.parametrize(
    "name", slow_but([name for name, works in fastinit._cpu.targets() if works], "scalar")
)
def test_targets(name: str, python: Callable[..., Any]) -> None:
    """Every instruction set gives the same bits as that of this process."""
    done = python(DIGEST % TRUNCATED, FASTINIT_TARGET=name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [name, digest_here()]
