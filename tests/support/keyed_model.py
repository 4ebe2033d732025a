# SPDX-License-Identifier: BSD-3-Clause
"""The keyed stream by numpy, hashlib and Python's integers: what fills with a Key have to give.

Written from the specification alone. Words, uniforms and masks are exact. Normals and truncated
normals are the formulas' values in float64, for float64 itself in numpy's longdouble (64 bits of
mantissa on x86): every argument is an integer, reduced before anything is rounded.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri  # type: ignore[import-untyped]

F32, F64 = torch.float32, torch.float64
Numbers = NDArray[np.uint64]
Reals = NDArray[Any]  # float64 or longdouble
LOW = np.uint64(0xFFFFFFFF)
PI = np.longdouble("3.14159265358979323846264338327950288")


# ---- keys and words


def philox_key(seed: int, name: str | None = None, number: int | None = None) -> int:
    """The Philox key of the parameter of that name, or of the so-manieth fill without one."""
    message = b"fastinit 1\n" + (seed % 2**64).to_bytes(8, "little")
    if name is not None:
        message += b"/" + name.encode()
    else:
        message += b"#" + str(number).encode()
    return int(struct.unpack("<Q", hashlib.sha256(message).digest()[:8])[0])


def encrypted(counters: ArrayLike, key: int) -> Numbers:
    """Philox4x32-10 of counters (..., 4) as in Salmon et al. 2011."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counters, np.uint64), -1, 0)
    k0, k1, half = key % 2**32, key >> 32, np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & LOW
        c2, c3 = (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], -1)


def blocks(key: int, block: ArrayLike, domain: int = 0) -> Numbers:
    """The four words of each block."""
    b = np.asarray(block, np.uint64)
    zero = np.zeros_like(b)
    counters = [b & LOW, b >> np.uint64(32), zero + np.uint64(domain), zero]
    return encrypted(np.stack(counters, -1), key)


def words(key: int, number: ArrayLike, domain: int = 0) -> Numbers:
    """Each block is computed once."""
    n = np.asarray(number, np.uint64)
    once, where = np.unique(n >> np.uint64(2), return_inverse=True)
    column = (n & np.uint64(3)).astype(np.intp)
    return np.asarray(blocks(key, once, domain)[where.reshape(n.shape), column])


def long_words(key: int, number: ArrayLike) -> Numbers:
    """64 bits each, the earlier word above."""
    n = np.asarray(number, np.uint64)
    first = words(key, np.uint64(2) * n)
    return (first << np.uint64(32)) | words(key, np.uint64(2) * n + np.uint64(1))


# ---- elements


def elements(
    whole: Sequence[int], offset: Sequence[int] | None = None, shape: Sequence[int] | None = None
) -> Numbers:
    """The row-major numbers in the whole of the elements of a block."""
    shape, offset = tuple(whole if shape is None else shape), offset or (0,) * len(whole)
    at = np.zeros(shape, np.uint64)
    for axis, size in enumerate(shape):
        stride = math.prod(whole[axis + 1 :])
        steps = (np.arange(size, dtype=np.uint64) + np.uint64(offset[axis])) * np.uint64(stride)
        at += steps.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return at


def stored(values: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of float32 or float64, for the dtypes of 16 bits rounded once more by torch."""
    return torch.from_numpy(np.array(values, np.float64 if dtype == F64 else np.float32)).to(dtype)


# ---- arithmetic


def fma32(x: ArrayLike, y: ArrayLike, z: ArrayLike) -> NDArray[np.float32]:
    """x * y + z of float32, rounded once. The product is exact in float64; the sum is rounded to
    odd there (the last bit is set if it is inexact), so that rounding it again does no harm."""
    a = np.asarray(x, np.float32).astype(np.float64) * np.asarray(y, np.float32)
    b = np.broadcast_to(np.asarray(z, np.float32).astype(np.float64), a.shape)
    s = np.asarray(a + b)
    t = s - a
    lost = (a - (s - t)) + (b - t)  # exactly, by Knuth
    towards = np.where(lost > 0, np.inf, -np.inf)
    even = (s.view(np.int64) & 1) == 0
    odd = np.where((lost != 0) & even, np.nextafter(s, towards), s)
    return odd.astype(np.float32)


def fma64(x: Iterable[float], y: float, z: float) -> NDArray[np.float64]:
    """x * y + z rounded once: in integers, whose quotient Python rounds correctly."""
    (yn, yd), (zn, zd) = float(y).as_integer_ratio(), float(z).as_integer_ratio()
    ratios = (float(v).as_integer_ratio() for v in x)
    return np.array([(n * yn * zd + zn * d * yd) / (d * yd * zd) for n, d in ratios], np.float64)


def ulps(found: torch.Tensor, exact: Reals, reach: ArrayLike = 0.0) -> Reals:
    """Distances in units of the dtype's last place at the exact value, or at `reach` if larger."""
    info = torch.finfo(found.dtype)
    _, exponent = np.frexp(np.maximum(np.maximum(np.abs(exact), np.abs(reach)), info.tiny))
    values = found.detach().double().numpy().astype(exact.dtype)
    return np.asarray(np.abs(values - exact) / np.ldexp(exact.dtype.type(info.eps), exponent - 1))


# ---- laws: `at` numbers the elements


def unit(key: int, at: Numbers, dtype: torch.dtype) -> NDArray[Any]:
    """k * 2^-24 or k * 2^-53, exact."""
    if dtype == F64:
        return (long_words(key, at) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
    return (words(key, at) & np.uint64(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)


def uniform(
    key: int, at: Numbers, dtype: torch.dtype, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    u = unit(key, at, dtype)
    a, b = u.dtype.type(low), u.dtype.type(high)
    x = fma64(u.ravel(), b - a, a).reshape(u.shape) if dtype == F64 else fma32(u, b - a, a)
    return stored(np.minimum(x, np.nextafter(b, u.dtype.type(-np.inf))) if b > a else x, dtype)


def _halves(m: Numbers, bits: int, real: type) -> tuple[Reals, Reals]:
    """(m + 1/2) / 2^bits and one minus that, both exact: they take bits + 1 bits."""
    u, scale = m.astype(real) + real(0.5), real(2.0**-bits)
    return u * scale, ((np.uint64(2**bits - 1) - m).astype(real) + real(0.5)) * scale


def _drawn(key: int, number: Numbers, dtype: torch.dtype) -> tuple[Numbers, int, type]:
    if dtype == F64:
        return long_words(key, number) >> np.uint64(11), 53, np.longdouble
    return words(key, number), 32, np.float64


def _plus_half(n: NDArray[np.int64], dtype: torch.dtype) -> Reals:
    """n + 1/2, for float32 from n rounded to 24 digits, and rounded so itself."""
    if dtype == F64:
        return n.astype(np.longdouble) + np.longdouble(0.5)
    return np.asarray((n.astype(np.float32) + np.float32(0.5)).astype(np.float64))


def normal(key: int, at: Numbers, dtype: torch.dtype) -> Reals:
    """Of mean 0 and deviation 1, not rounded to the dtype."""
    second = at & np.uint64(1)
    r, bits, real = _drawn(key, at - second, dtype)
    upper = r >= np.uint64(2 ** (bits - 1))
    signed = r.astype(np.int64) - np.where(upper, 1 << bits, 0)
    y = np.abs(_plus_half(signed, dtype)) * real(2.0**-bits)
    radius = np.sqrt(-2 * np.where(upper, np.log1p(-y), np.log(y)))
    t, bits, _ = _drawn(key, at - second + np.uint64(1), dtype)
    # The nearest quarter; of n + 1/2 of 2^-bits turns at most an eighth of a turn is left.
    quarter = ((t + np.uint64(1 << (bits - 3))) >> np.uint64(bits - 2)).astype(np.int64)
    n = t.astype(np.int64) - (quarter << (bits - 2))
    left = _plus_half(n, dtype).astype(real) * (2 * real(PI) / real(2.0**bits))
    sine, cosine = np.sin(left), np.cos(left)
    which = (quarter - second.astype(np.int64)) & 3  # a sine is the cosine of a quarter less
    return np.asarray(radius * np.choose(which, [cosine, -sine, -cosine, sine]))


def _below(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _quantile(p: Reals) -> Reals:
    """Of the normal law, for p up to 1/2; what float64 cannot hold of p is a last small step."""
    rough = p.astype(np.float64)
    x = ndtri(rough).astype(p.dtype)
    return np.asarray(x + (p - rough) * np.sqrt(2 * p.dtype.type(PI)) * np.exp(x * x / 2))


def trunc_normal(
    key: int, at: Numbers, dtype: torch.dtype, mean: float, std: float, low: float, high: float
) -> Reals:
    """Not rounded to the dtype, but within the bounds that are."""
    alpha, beta = (low - mean) / std, (high - mean) / std
    u, v = _halves(*_drawn(key, at, dtype))
    upper = alpha > 0  # there the difference of the complements is the precise one
    mass = _below(-alpha) - _below(-beta) if upper else _below(beta) - _below(alpha)
    p, q = _below(alpha) + u * mass, _below(-beta) + v * mass
    z = _quantile(np.minimum(p, q)) * np.where(p < q, 1, -1)
    edges = torch.tensor([low, high], dtype=F64 if dtype == F64 else F32).tolist()
    return np.asarray(np.clip(mean + std * z, *edges))


def zeros(key: int, rows: int, cols: int, sparsity: float) -> NDArray[np.bool_]:
    """Where sparse_ leaves nothing: Fisher and Yates on each column, with the words of domain 1."""
    count, mask = math.ceil(sparsity * rows), np.zeros((rows, cols), np.bool_)
    drawn = words(key, np.arange(rows * cols), 1).tolist()
    for c in range(cols):
        order = list(range(rows))
        for i in range(count if count < rows else 0):
            j = i + drawn[c * rows + i] % (rows - i)
            order[i], order[j] = order[j], order[i]
        mask[order[:count], c] = True
    return mask
