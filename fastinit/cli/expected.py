# SPDX-License-Identifier: BSD-3-Clause
"""What fills should have made of a tensor, what is there, and how far that is off."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastinit.capture.written import Written
from fastinit.core import geometry, keyed_numbers, laws

CHUNK = 1 << 18  # elements that are float64 at a time: 2 MiB
_SHAPELESS = ("constant_", "zeros_", "ones_", "uniform_", "normal_", "trunc_normal_")
_COMPOSED = ("trunc_normal", "sparse", "eye", "dirac", "orthogonal", "orthogonal_batched")


# ---- what is expected ----------------------------------------------------------------------------


class Part(NamedTuple):
    """A number of elements of a tensor that follow one law."""

    law: str  # constant, uniform, normal
    items: int
    a: float  # value; from; mean
    b: float = 0.0  # to; std
    low: float = -math.inf  # of a normal law
    high: float = math.inf

    def moments(self) -> tuple[float, float, float, float]:
        """The mean and the second, third and fourth moment about it."""
        if self.law == "uniform":
            width = self.b - self.a
            return (self.a + self.b) / 2, width**2 / 12, 0.0, width**4 / 80
        if self.law == "constant" or self.b == 0:
            return self.a, 0.0, 0.0, 0.0
        _, mean, m2, m3, m4 = _truncated(*self._bounds())
        return self.a + mean * self.b, m2 * self.b**2, m3 * self.b**3, m4 * self.b**4

    def density(self, x: Tensor) -> Tensor:
        """Return the density at x, for a law without point masses."""
        if self.law == "uniform":
            return ((x >= self.a) & (x < self.b)) / (self.b - self.a)
        z, (low, high) = (x - self.a) / self.b, self._bounds()
        mode = min(max(0.0, low), high)
        inside = torch.exp((mode**2 - z**2) / 2) / (_truncated(low, high)[0] * self.b)
        return inside * ((z >= low) & (z <= high))

    def is_point(self) -> bool:
        return self.law == "constant" or (self.a == self.b if self.law == "uniform" else not self.b)

    def _bounds(self) -> tuple[float, float]:
        return (self.low - self.a) / self.b, (self.high - self.a) / self.b


@functools.lru_cache(maxsize=256)
def _truncated(low: float, high: float) -> tuple[float, float, float, float, float]:
    """Of the standard normal distribution between two bounds: its integral as a multiple of the
    largest density there, the mean, the second, third and fourth central moment.

    By Simpson's rule about the mode: the closed form is made of differences, which leave no digit
    in narrow bounds or far out.
    """
    mode = min(max(0.0, low), high)
    reach = min(14.0, 60 / max(1.0, abs(mode)))
    x = torch.linspace(max(low, mode - reach), min(high, mode + reach), 4097, dtype=torch.float64)
    w = torch.exp((mode**2 - x**2) / 2)
    w[1:-1:2] *= 4
    w[2:-1:2] *= 2
    total = float(w.sum())
    x -= mode
    mean = 0.0 if x[0] == -x[-1] else float(w.dot(x)) / total
    m2, m3, m4 = (float(w.dot((x - mean) ** k)) / total for k in (2, 3, 4))
    return total * float(x[1] - x[0]) / 3, mode + mean, m2, m3, m4


def parts_of(
    fills: Sequence[Written], shape: Sequence[int], dtype: torch.dtype, begin: int = 0
) -> tuple[Part, ...] | None:
    """Return the parts that fills made of a tensor, or None if they do not determine all of it.

    Args:
        fills: of the tensor's storage, in their order
        shape: the tensor's
        dtype: likewise
        begin: its first byte in the storage
    """
    n = math.prod(shape)
    end = begin + n * dtype.itemsize
    parts: list[Part] = []
    taken: list[tuple[int, int]] = []  # from the first part, by others
    function = None  # that made all of it, perhaps in several steps
    for w in fills:
        first, last = w.extent
        if last <= begin or end <= first or (function is not None and w.caller == function):
            continue
        size = w.dtype.itemsize if w.dtype == dtype else 0
        if first <= begin and end <= last and w.items * size == last - first:
            parts, taken = _parts(w, shape if w.items == n else (), n), []
            composed = w.caller is not None and w.caller[0].rstrip("_") in _COMPOSED
            function = w.caller if composed else None
            continue
        function = None
        new = _parts(w, (), w.items) if size else []
        apart = begin <= first and last <= end and not _overlap(w.extent, taken)
        if apart and len(new) == 1 and len(parts) == len(taken) + 1:
            parts = [parts[0]._replace(items=parts[0].items - w.items), *parts[1:], *new]
            taken.append(w.extent)
        else:
            parts, taken = [], []  # nothing is known until something overwrites all of it
    return tuple(p for p in parts if p.items > 0) or None


def _overlap(extent: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    return any(extent[0] < last and first < extent[1] for first, last in others)


def _parts(w: Written, shape: Sequence[int], n: int) -> list[Part]:
    """Return the parts that one fill makes; `shape` is () if it is not known."""
    name, arguments = (w.caller[0].rstrip("_") + "_", w.caller[1]) if w.caller else ("", ())
    if w.op in ("constant", "uniform", "normal", "normal_pairs") and name[:-1] not in _COMPOSED:
        law, bounds = w.op.partition("_")[0], w.bounds or ()
        # Of a small tensor whose numbers are torch's defaults, which an operator does not tell.
        known = not math.isnan(w.a + w.b) and (law == "constant" or w.a != 0 or w.b != 0)
        return [Part(law, n, w.a, w.b, *bounds)] if known else []
    if w.op == "trunc_normal" and w.bounds is not None:
        return [Part("normal", n, w.a, w.b, *w.bounds)]
    if not shape and name not in _SHAPELESS:
        return []
    try:
        values = [value for _, value in arguments]
        found = laws.of_shape(name, w.dtype, shape or (n,), values)
        law, p, sizes = keyed_numbers.checked(found, w.dtype)
    except Exception:  # whatever torch's function or ours says to these arguments
        return []
    if law == "orthogonal":  # unit vectors times gain
        return [Part("normal", n, 0.0, abs(p[0]) / math.sqrt(max(sizes[1:])))]
    if law == "sparse":
        zeros = sizes[1] * sizes[2]
        return [Part("normal", n - zeros, *p[:2]), Part("constant", zeros, 0.0)]
    if law == "diagonal":
        groups = dict(arguments).get("groups", 1)
        ones = (n and sizes[2]) * (groups if isinstance(groups, int) else 1)
        return [Part("constant", n - ones, 0.0), Part("constant", ones, 1.0)]
    return [Part("normal" if law == "trunc_normal" else law, n, *p[: 4 if law[0] == "t" else 2])]


# ---- what is there -------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Mean, standard deviation and extremes of a tensor, computed in float64."""

    mean: float
    std: float
    low: float
    high: float


def chunks(t: Tensor) -> Iterator[Tensor]:
    """Yield all elements in some order, in float64, at most CHUNK at a time."""
    if t.numel() <= CHUNK:
        yield t.to("cpu", torch.float64).reshape(-1)
    elif t.shape[0] == 1:
        yield from chunks(t[0])
    else:
        for piece in torch.split(t, max(1, t.shape[0] * CHUNK // t.numel())):
            yield from chunks(piece)


def measure(t: Tensor) -> Measured | None:
    """Return what a tensor measures, or None if it has no elements that are plain numbers."""
    plain = geometry.is_plain(t) and not t.is_meta
    if not plain or t.is_complex() or t.is_quantized or t.numel() == 0:
        return None
    pivot, total, squares = None, 0.0, 0.0
    low, high = math.inf, -math.inf
    for x in chunks(t.detach()):
        least, most = map(float, torch.aminmax(x))
        low, high = min(least, low), max(most, high)
        if pivot is None:
            pivot = float(x.mean())
        x = x - pivot
        total += float(x.sum())
        squares += float(x.dot(x))
    assert pivot is not None
    shift = total / t.numel()
    variance = squares / t.numel() - shift * shift
    return Measured(pivot + shift, math.sqrt(variance) if variance > 0 else 0 * variance, low, high)


class Expected(NamedTuple):
    """Mean and standard deviation that a tensor of known parts should have, with their errors."""

    mean: float
    std: float
    error: float  # standard error of the mean of as many elements
    freedom: float  # degrees of freedom of their variance, that of the normal law with its error

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Expected:
        n = sum(p.items for p in parts)
        each = [(p.items, *p.moments()) for p in parts]
        mean = sum(k * m for k, m, *_ in each) / n
        variance = sum(k * (m2 + (m - mean) ** 2) for k, m, m2, *_ in each) / n
        noise = 0.0  # variance of the sum of squares about the mean
        for k, m, m2, m3, m4 in each:
            d = m - mean
            noise += k * (m4 - m2 * m2 + 4 * d * (m3 + d * m2))
        error = math.sqrt(sum(k * m2 for k, _, m2, *_ in each)) / n
        return cls(
            mean, math.sqrt(variance), error, 2 * (n * variance) ** 2 / noise if noise else 0
        )

    def z(self, found: Measured, dtype: torch.dtype) -> float:
        """How many standard errors the mean or the standard deviation is off, whichever is more;
        what the dtype rounds is none of it."""
        if not math.isfinite(found.mean + found.std):
            return math.inf
        eps, least = 1e-14, 0.0
        if dtype.is_floating_point:
            info = torch.finfo(dtype)
            eps, least = max(eps, info.eps), info.smallest_normal * info.eps
        slack = eps * (abs(self.mean) + self.std) + least
        off = max(0.0, abs(found.mean - self.mean) - slack)
        mean_z = off / self.error if self.error else math.inf if off else 0.0
        spread = math.hypot(found.std, found.mean - self.mean)
        off = max(0.0, abs(spread - self.std) - slack)
        if not self.freedom or not self.std:
            return max(mean_z, math.inf if off else 0.0)
        ratio = 1 + math.copysign(off, spread - self.std) / self.std
        error = 2 / (9 * self.freedom)  # Wilson and Hilferty 1931: the cube root is nearly normal
        return max(mean_z, abs(ratio ** (2 / 3) - 1 + error) / math.sqrt(error) if off else 0.0)
