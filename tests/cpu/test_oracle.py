# SPDX-License-Identifier: BSD-3-Clause
"""An independent model in numpy of what torch's generator gives: words, uniforms, normals.

It shares no code with fastinit and calls torch only to make the generator, so it also tells whether
both are wrong in the same way. Uniforms are compared bit by bit with bounds for which the formula
has one rounding only; normals to a few units in the last place, their words exactly.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastinit
from tests.support.compare import BF16, DTYPES, F16, F32, F64, Position
from tests.support.mt19937 import Words

pytestmark = pytest.mark.usefixtures("native")

POSITIONS = [Position(), Position(words=1), Position(words=623), Position(words=624, seed=5)]
POSITIONS += [Position(words=1000), Position(seed=2**35 + 1)]


def at(position: Position) -> tuple[torch.Generator, Words]:
    generator = position.place(torch.Generator())
    return generator, Words(generator)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, still as float32."""
    u = values.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype == BF16:
        return to_bf16(values)
    return values.astype(np.float16) if dtype == F16 else values


@pytest.mark.parametrize("position", POSITIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uniform(dtype: torch.dtype, position: Position) -> None:
    for low, high in [(0.0, 1.0), (-0.5, 0.5), (-2.0, 6.0), (0.0, 2.0**-9)]:  # widths: powers of 2
        for size in (1, 5, 624, 3001):
            generator, words = at(position)
            tensor = fastinit.uniform_(torch.empty(size, dtype=dtype), low, high, generator)
            u = words.doubles(size) if dtype == F64 else words.floats(size)
            expected = rounded(u * u.dtype.type(high - low) + u.dtype.type(low), dtype)
            expected = np.where(expected == high, expected.dtype.type(low), expected)
            assert np.array_equal(tensor.double().numpy(), expected.astype(np.float64))
            words.assert_is(generator)


def blocks(u: np.ndarray) -> np.ndarray:
    """Box-Muller on blocks of 16: 8 radii and 8 angles give 8 cosines, then 8 sines."""
    u = u.astype(np.float64).reshape(-1, 2, 8)
    radius = np.sqrt(-2.0 * np.log1p(-u[:, 0]))
    angle = 2.0 * np.pi * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def normals(words: Words, size: int, dtype: torch.dtype) -> np.ndarray:
    """Contiguous, 16 or more. The last 16 are drawn anew if the size is no multiple of 16."""
    draw = words.doubles if dtype == F64 else words.floats
    whole = size // 16 * 16
    found = np.empty(size)
    found[:whole] = blocks(draw(whole))
    if size % 16:
        if dtype in (F32, F64):
            draw(size - whole)  # these fill the rest first, and are then overwritten
        found[-16:] = blocks(draw(16))
    return found


TOLERANCE = {F32: 2e-6, F64: 1e-14, BF16: 2.0**-8, F16: 2.0**-10}


@pytest.mark.parametrize("position", POSITIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_in_blocks(dtype: torch.dtype, position: Position) -> None:
    for mean, std in [(0.0, 1.0), (0.5, 0.25)]:
        for size in (16, 17, 31, 32, 623, 640, 3001):
            generator, words = at(position)
            tensor = fastinit.normal_(torch.empty(size, dtype=dtype), mean, std, generator)
            expected = normals(words, size, dtype) * std + mean
            close = TOLERANCE[dtype]
            np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=close, atol=close)
            words.assert_is(generator)


@pytest.mark.parametrize("layout", ["few", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_in_pairs(dtype: torch.dtype, layout: str) -> None:
    """Fewer than 16 or not contiguous: double precision, cosine first, sine kept for later."""
    for position in POSITIONS:
        generator, words = at(position)
        kept: float | None = None
        for size in (1, 2, 3, 4, 15) if layout == "few" else (3, 40, 101):
            base = torch.zeros(size, 1 if layout == "few" else 2, dtype=dtype)
            tensor = fastinit.normal_(base[:, 0], 1.0, 0.5, generator)
            expected = []
            for _ in range(size):
                if kept is not None:
                    expected, kept = [*expected, kept], None
                    continue
                angle, u = words.doubles(2)
                radius = np.sqrt(-2.0 * np.log1p(-u))
                expected.append(radius * np.cos(2 * np.pi * angle))
                kept = radius * np.sin(2 * np.pi * angle)
            wanted = np.array(expected) * 0.5 + 1.0
            close = {F32: 6.1e-8, F64: 1e-14, BF16: 1.01 * 2.0**-8, F16: 1.01 * 2.0**-11}[dtype]
            np.testing.assert_allclose(tensor.double().numpy(), wanted, rtol=close, atol=close / 4)
            words.assert_is(generator, kept)


@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (-1.0, 0.5), (-5.5, 5.5)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_trunc_normal(dtype: torch.dtype, bounds: tuple[float, float]) -> None:
    """Each round draws for the whole tensor; only what is still outside takes from it."""
    for size in (16, 100, 1000):
        generator, words = at(Position(words=17))
        tensor = fastinit.trunc_normal_(
            torch.empty(size, dtype=dtype), 0.0, 1.0, *bounds, generator
        )
        expected = normals(words, size, dtype)
        outside = (expected < bounds[0]) | (expected > bounds[1])
        while outside.any():
            expected = np.where(outside, normals(words, size, dtype), expected)
            outside = (expected < bounds[0]) | (expected > bounds[1])
        close = TOLERANCE[dtype]
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=close, atol=close)
        words.assert_is(generator)


def permutation(words: Words, size: int) -> list[int]:
    """torch.randperm for short lengths: each element swaps with one of those from it on."""
    found = list(range(size))
    for i, word in enumerate(words.draw(size - 1)):
        j = i + int(word) % (size - i)
        found[i], found[j] = found[j], found[i]
    return found


def test_sparse() -> None:
    for rows, columns, sparsity in [(10, 4, 0.5), (1, 3, 1.0), (33, 20, 0.1)]:
        own, words = at(Position(words=5))
        torch.manual_seed(77)
        zeros = Words(torch.default_generator)
        tensor = fastinit.sparse_(torch.empty(rows, columns), sparsity, 1.0, generator=own)
        count = int(np.ceil(sparsity * rows))
        wanted = np.zeros((rows, columns), dtype=bool)
        for column in range(columns):
            wanted[permutation(zeros, rows)[:count], column] = True
        assert np.array_equal(tensor.numpy() == 0.0, wanted)
        zeros.assert_is(torch.default_generator)
        if rows * columns >= 16:
            expected = np.where(wanted, 0.0, normals(words, rows * columns, F32).reshape(rows, -1))
            np.testing.assert_allclose(tensor.numpy(), expected, rtol=2e-6, atol=2e-6)
            words.assert_is(own)


def test_orthogonal_draws_one_matrix_of_normals() -> None:
    """And Q of its factorisation, with signs that make R's diagonal positive."""
    for rows, columns in [(20, 30), (30, 20), (16, 16)]:
        generator, words = at(Position(words=3))
        tensor = fastinit.orthogonal_(torch.empty(rows, columns, dtype=F64), 2.0, generator)
        drawn = normals(words, rows * columns, F64).reshape(rows, columns)
        q, r = np.linalg.qr(drawn.T if rows < columns else drawn)
        q = q * np.sign(np.diag(r)) * 2.0
        np.testing.assert_allclose(tensor.numpy(), q.T if rows < columns else q, atol=1e-12)
        words.assert_is(generator)


@pytest.mark.parametrize("name", ["constant_", "ones_", "zeros_", "eye_", "dirac_"])
def test_constants_draw_nothing(name: str) -> None:
    torch.manual_seed(9)
    words = Words(torch.default_generator)
    tensor = torch.empty((8, 8, 3) if name == "dirac_" else (40, 30))
    getattr(fastinit, name)(tensor, *([2.0] if name == "constant_" else []))
    words.assert_is(torch.default_generator)
    expected = {
        "constant_": lambda: np.full((40, 30), 2.0),
        "ones_": lambda: np.ones((40, 30)),
        "zeros_": lambda: np.zeros((40, 30)),
        "eye_": lambda: np.eye(40, 30),
        "dirac_": lambda: np.eye(8)[:, :, None] * np.array([0.0, 1.0, 0.0]),
    }[name]()
    assert np.array_equal(tensor.numpy(), expected)
