# SPDX-License-Identifier: BSD-3-Clause
"""What torch's CUDA generator writes, computed with numpy on any machine.

Written from torch's headers and `torch/nn/init.py` alone, to be compared with the native code and
with a GPU. Uniform values are exact. Normal values are not: the GPU's log is within an ulp and its
sine and cosine come from a table, so they are here what exact functions would give, rounded as the
kernel rounds; `rounded=False` leaves those roundings out, for error bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK = 256  # threads of a block in every distribution kernel
LIMIT = 2**31 - 1  # of a launch: elements, and bytes from the first to the last; tests lower it
MASK = 2**32 - 1

Dims = list[tuple[int, int]]  # (size, stride) in elements, innermost first


@dataclass(frozen=True)
class Gpu:
    """What the launch grid, and with it the order of the numbers, depends on."""

    processors: int
    threads: int  # resident threads of a processor


H200 = Gpu(132, 2048)
A100 = Gpu(108, 2048)
RTX4090 = Gpu(128, 1536)
T4 = Gpu(40, 1024)
SMALL = Gpu(2, 512)  # invented: 1,024 threads, so that a few thousand elements make many trips


@dataclass
class State:
    """A CUDA generator; a draw advances the offset as torch does."""

    seed: int
    offset: int = 0


@dataclass(frozen=True)
class Format:
    itemsize: int
    unroll: int  # values a thread makes of one Philox block
    real: type  # in which torch computes


DTYPES = {
    "float32": Format(4, 4, np.float32),
    "float64": Format(8, 2, np.float64),
    "bfloat16": Format(2, 4, np.float32),
    "float16": Format(2, 4, np.float32),
}


# ---- arithmetic


def _two_sum(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
    """The sum, and exactly what its rounding lost (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
    """The product, and exactly what its rounding lost (Veltkamp, Dekker)."""

    def split(x: NDArray) -> tuple[NDArray, NDArray]:
        t = x * 134217729.0
        high = t - (t - x)
        return high, x - high

    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _sum_to_odd(a: NDArray, b: NDArray) -> NDArray:
    """a + b rounded to odd: inexact sums end in a 1, so a later rounding cannot see a false tie."""
    s, error = _two_sum(a, b)
    even = (np.asarray(s).view(np.int64) & 1) == 0
    wrong = (error != 0) & even & np.isfinite(s)
    return np.where(wrong, np.nextafter(s, np.copysign(np.inf, error)), s)


def fma32(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> NDArray[np.float32]:
    """a * b + c with one rounding: the product is exact in float64."""
    x, y, z = (np.asarray(np.asarray(v, np.float32), np.float64) for v in (a, b, c))
    with np.errstate(over="ignore"):
        return _sum_to_odd(x * y, z).astype(np.float32)


def fma64(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> NDArray[np.float64]:
    """a * b + c with one rounding (Boldo and Melquiond); not near overflow or underflow."""
    x, y, z = (np.asarray(v, np.float64) for v in (a, b, c))
    product, low = _two_product(x, y)
    high, rest = _two_sum(z, low)
    total, error = _two_sum(product, high)
    return np.asarray(total + _sum_to_odd(rest, error))


def _bfloat16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    bits = np.atleast_1d(x).view(np.uint32)
    even = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    rounded = ((bits + even) & np.uint32(0xFFFF0000)).view(np.float32).reshape(x.shape)
    return np.where(np.isnan(x), x, rounded)


def round_to(x: ArrayLike, dtype: str) -> NDArray:
    """The dtype's values; 16-bit ones are rounded twice because torch converts by way of float."""
    if dtype == "float64":
        return np.asarray(x, np.float64)
    with np.errstate(over="ignore"):
        single = np.asarray(x).astype(np.float32)
        if dtype == "float16":
            return single.astype(np.float16).astype(np.float32)
    return _bfloat16(single) if dtype == "bfloat16" else single


def erfinv(x: ArrayLike) -> NDArray[np.float64]:
    """Winitzki's formula, then Halley's iteration on the side where the residual is precise."""
    x = np.asarray(x, np.float64)
    magnitude = np.abs(x).ravel()
    y = np.where(magnitude == 1, np.inf, np.where(magnitude < 1, 0.0, np.nan))
    index = np.flatnonzero(magnitude < 1)
    target = magnitude[index]
    log = -np.log1p(-target * target)
    a = 2 / (math.pi * 0.147) - log / 2
    z = np.sqrt(log / 0.147 / (np.sqrt(a * a + log / 0.147) + a))
    tail = target > 0.5
    for _ in range(3):
        residual = np.empty_like(z)
        residual[~tail] = np.array([math.erf(v) for v in z[~tail]]) - target[~tail]
        residual[tail] = (1 - target[tail]) - np.array([math.erfc(v) for v in z[tail]])
        newton = residual * np.exp(z * z) * (math.sqrt(math.pi) / 2)
        z = z - newton / (1 + z * newton)
    y[index] = z
    return np.copysign(y.reshape(x.shape), x)


def _sin_cos_pi(v: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Sine and cosine of pi * v; reduced exactly, to where pi's own rounding is within an ulp."""
    quarter = np.rint(2 * v)
    angle = math.pi * (v - quarter / 2)
    sine, cosine = np.sin(angle), np.cos(angle)
    k = quarter.astype(np.int64) % 4
    return np.choose(k, [sine, cosine, -sine, -cosine]), np.choose(
        k, [cosine, -sine, -cosine, sine]
    )


# ---- the generator


def philox(seed: int, block: ArrayLike, subsequence: ArrayLike) -> NDArray[np.uint32]:
    """Philox4x32-10: the four words of each block, along a last axis."""
    low, shift = np.uint64(MASK), np.uint64(32)
    q, s = np.broadcast_arrays(
        np.atleast_1d(np.asarray(block, np.uint64)), np.asarray(subsequence, np.uint64)
    )
    shape, q, s = q.shape, q.ravel(), s.ravel()
    words = np.empty((q.size, 4), np.uint32)
    step = 1 << 15  # what one core's cache holds
    for start in range(0, q.size, step):
        part = slice(start, start + step)
        q_part, s_part = q[part], s[part]
        c0, c1, c2, c3 = q_part & low, q_part >> shift, s_part & low, s_part >> shift
        k0, k1 = seed & MASK, (seed >> 32) & MASK
        for _ in range(10):
            p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0, c2 = (p1 >> shift) ^ c1 ^ np.uint64(k0), (p0 >> shift) ^ c3 ^ np.uint64(k1)
            c1, c3 = p1 & low, p0 & low
            k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
        for word, c in enumerate((c0, c1, c2, c3)):
            words[part, word] = c
    return words.reshape(*shape, 4)


def threads_of(n: int, gpu: Gpu) -> int:
    """Threads of the launch for n elements."""
    return BLOCK * min(-(-n // BLOCK), gpu.processors * (gpu.threads // BLOCK))


def increment(n: int, dtype: str, gpu: Gpu) -> int:
    """How far one launch moves the offset: four for each trip, even where a trip makes two."""
    if n == 0:
        return 0
    return ((n - 1) // (threads_of(n, gpu) * DTYPES[dtype].unroll) + 1) * 4


def words(
    n: int, dtype: str, state: State, gpu: Gpu, at: ArrayLike | None = None
) -> tuple[NDArray[np.uint32], NDArray[np.intp]]:
    """Of each linear index (or those in `at`): its Philox block, (n, 4), and which output it is."""
    if state.offset % 4:
        raise ValueError("torch's offsets are multiples of 4")
    index = np.arange(n) if at is None else np.asarray(at, np.int64)
    if not index.size:
        blocks, output = np.empty((0, 4), np.uint32), np.empty(0, np.intp)
    else:
        threads = threads_of(n, gpu)
        trip, rest = np.divmod(index, threads * DTYPES[dtype].unroll)
        output, thread = np.divmod(rest, threads)
        blocks = philox(state.seed, trip.astype(np.uint64) + np.uint64(state.offset // 4), thread)
    state.offset += increment(n, dtype, gpu)
    return blocks, output


def _unit32(word: NDArray[np.uint32]) -> NDArray[np.float32]:
    return word.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)


def _word53(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Two words as cuRAND joins them: 11 bits of theirs overlap."""
    return (a.astype(np.uint64) ^ (b.astype(np.uint64) << np.uint64(21))).astype(np.float64)


def uniform(
    n: int, dtype: str, a: float, b: float, state: State, gpu: Gpu, at: ArrayLike | None = None
) -> NDArray:
    """uniform_(a, b), exactly; 16-bit values in a float32 array."""
    blocks, output = words(n, dtype, state, gpu, at)
    row = np.arange(len(blocks))
    low, high = round_to(a, dtype), round_to(b, dtype)
    span = round_to(high - low, dtype)
    if dtype == "float64":
        unit = _word53(blocks[row, 2 * output], blocks[row, 2 * output + 1]) * 2.0**-53 + 2.0**-54
        value = fma64(unit, span, low)
    else:
        value = round_to(fma32(_unit32(blocks[row, output]), span, low), dtype)
    return np.where(value == high, low, value)


def normal(
    n: int,
    dtype: str,
    mean: float,
    std: float,
    state: State,
    gpu: Gpu,
    rounded: bool = True,
    at: ArrayLike | None = None,
) -> NDArray:
    """normal_(mean, std); 16-bit values in a float32 array."""
    blocks, output = words(n, dtype, state, gpu, at)
    if dtype == "float64":
        unit = _word53(blocks[:, 0], blocks[:, 1]) * 2.0**-53 + 2.0**-54
        angle = _word53(blocks[:, 2], blocks[:, 3]) * 2.0**-52 + 2.0**-53
        sine, cosine = _sin_cos_pi(angle)
        z = np.where(output == 0, sine, cosine) * np.sqrt(-2 * np.log(unit))
        return fma64(z, std, mean)
    row = np.arange(len(blocks))
    first = output & 2  # words 0 and 1 make outputs 0 and 1, words 2 and 3 the others
    scale = np.float32(2**-32) * np.float32(6.2831855)
    unit = _unit32(blocks[row, first]).astype(np.float64)
    angle = fma32(blocks[row, first + 1].astype(np.float32), scale, scale / np.float32(2))
    angle = angle.astype(np.float64)
    wave = np.where(output & 1, np.cos(angle), np.sin(angle))  # sine first
    log = np.log(unit)
    if not rounded:
        return wave * np.sqrt(-2 * log) * float(np.float32(std)) + float(np.float32(mean))
    radius = np.sqrt(np.float32(-2) * log.astype(np.float32))
    return round_to(fma32(wave.astype(np.float32) * radius, std, mean), dtype)


# ---- trunc_normal_


def _cdf(x: float) -> float:
    return (1.0 + math.erf(x / math.sqrt(2.0))) / 2.0


def trunc_normal(
    n: int, dtype: str, mean: float, std: float, a: float, b: float, state: State, gpu: Gpu
) -> tuple[NDArray, int]:
    """torch 2.12 and later where the bounds are not far out; and how many tensors it draws.

    Each draw is of the whole tensor, but takes part only where all before were out of bounds.
    """
    if not _cdf((b - mean) / std) - _cdf((a - mean) / std) > 0.3:
        raise ValueError("torch proposes uniform values here")
    low, high = round_to(a, dtype), round_to(b, dtype)
    values = normal(n, dtype, mean, std, state, gpu)
    draws = 1
    while (pending := np.flatnonzero((values < low) | (values > high))).size:
        values[pending] = normal(n, dtype, mean, std, state, gpu, at=pending)
        draws += 1
        if draws == 1000:
            raise RuntimeError("the dtype has no value within the bounds")
    return values, draws


def trunc_normal_erfinv(
    n: int, dtype: str, mean: float, std: float, a: float, b: float, state: State, gpu: Gpu
) -> NDArray:
    """torch before 2.12: five kernels in place, so five roundings to the dtype."""
    real = DTYPES[dtype].real
    low, high = 2 * _cdf((a - mean) / std) - 1, 2 * _cdf((b - mean) / std) - 1
    x = round_to(erfinv(uniform(n, dtype, low, high, state, gpu)), dtype)
    x = round_to(x * real(std * math.sqrt(2.0)), dtype)
    x = round_to(x + real(mean), dtype)
    return round_to(np.minimum(np.maximum(x, real(a)), real(b)), dtype)


# ---- which element is which


def _coalesce(dims: Dims) -> Dims:
    """Drop dimensions of one element and join those that continue one another."""
    joined: Dims = []
    for size, stride in dims:
        if size == 1:
            continue
        if joined and joined[-1][0] * joined[-1][1] == stride:
            joined[-1] = (joined[-1][0] * size, joined[-1][1])
        else:
            joined.append((size, stride))
    return joined


def pieces(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> list[tuple[int, Dims]]:
    """The launches for a tensor, each as its first element's offset and its dimensions.

    Dimensions are sorted by stride, and by size where strides are equal (which only tensors that
    overlap have). A tensor past the limit is halved along its longest dimension, the outermost if
    two are as long. One element is no dimensions; no element is no piece.
    """
    if 0 in shape:
        return []
    last_first = list(zip(shape, strides))[::-1]
    dims = sorted((d for d in last_first if d[0] != 1), key=lambda d: (d[1], d[0]))
    return _split(0, _coalesce(dims), itemsize)


def _split(offset: int, dims: Dims, itemsize: int) -> list[tuple[int, Dims]]:
    last_byte = 1 + sum((size - 1) * stride * itemsize for size, stride in dims)
    if math.prod(size for size, _ in dims) <= LIMIT and last_byte <= LIMIT:
        return [(offset, dims)]
    longest = max(range(len(dims)), key=lambda d: ((dims[d][0] - 1) * dims[d][1], d))
    size, stride = dims[longest]
    found = []
    for start, count in ((0, size // 2), (size // 2, size - size // 2)):
        part = [*dims[:longest], (count, stride), *dims[longest + 1 :]]
        if count == 1:  # only then torch looks again for dimensions to join
            part = _coalesce(part)
        found += _split(offset + start * stride, part, itemsize)
    return found


def positions(dims: Dims) -> NDArray[np.int64]:
    """Where the linear indices 0, 1, 2, ... of a piece are, in elements from its first."""
    place = np.zeros(1, np.int64)
    for size, stride in dims:
        place = (np.arange(size, dtype=np.int64)[:, None] * stride + place).ravel()
    return place


def draw_increment(shape: Sequence[int], strides: Sequence[int], dtype: str, gpu: Gpu) -> int:
    """How far one call moves the offset; a tensor that is split pays for the whole as well."""
    parts = pieces(shape, strides, DTYPES[dtype].itemsize)
    total = sum(increment(math.prod(s for s, _ in dims), dtype, gpu) for _, dims in parts)
    return total + (increment(math.prod(shape), dtype, gpu) if len(parts) > 1 else 0)


def fill(
    kind: str,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: str,
    params: tuple[float, float],
    state: State,
    gpu: Gpu,
) -> list[tuple[NDArray[np.int64], NDArray]]:
    """One uniform_ or normal_ of a strided tensor: of each launch, the positions and the values."""
    draw = {"uniform": uniform, "normal": normal}[kind]
    parts = pieces(shape, strides, DTYPES[dtype].itemsize)
    if len(parts) > 1:
        state.offset += increment(math.prod(shape), dtype, gpu)
    written = []
    for offset, dims in parts:
        place = positions(dims) + offset
        written.append((place, draw(place.size, dtype, *params, state, gpu)))
    return written
