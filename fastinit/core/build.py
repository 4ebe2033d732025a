# SPDX-License-Identifier: BSD-3-Clause
"""Fills that write a law in torch's words, where the kernels can do what torch would.

Numbers, dtypes and layouts outside of what has been thought through give no fill; torch then does
it, with whatever error or warning it has.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastinit.core import geometry, kernels, laws, source, switch
from fastinit.core.fill import Fill
from fastinit.core.laws import Law

_SMALLEST_RANGE = 1e-30  # of uniform_: the 2^24th part of it is a normal float32


def _number(value: object, dtype: torch.dtype) -> float | None:
    """Return a finite int or float that all dtypes' checks would let pass; None for others."""
    if type(value) is not float and type(value) is not int:
        return None
    if type(value) is int and abs(value) > 1 << 53:  # torch rounds these more than once
        return None
    return float(value) if abs(value) <= geometry.largest(dtype) else None  # not NaN


def _describe(
    t: Tensor, op: str, a: object, b: object, generator: object, accepted: bool
) -> Fill | None:
    device = geometry.device_of(t)
    if not (accepted or geometry.accepts(t)) or not source.is_supported(generator, device):
        return None
    x, y = _number(a, t.dtype), _number(b, t.dtype)
    layout = geometry.layout_of(t)
    if x is None or y is None or layout is None or t.numel() == 0:
        return None
    words = source.resolve(generator, device)  # type: ignore[arg-type]
    return Fill(t, op, x, y, words, *layout, t.numel(), device=device)


def ways(law: Law, t: Tensor, generator: object) -> list[list[Fill]]:
    """Return the ways to write a law, the best first: fills to be done one after the other.

    `generator`: None for torch's default one.
    """
    found: list[list[Fill | None]]
    if law.op in ("uniform", "normal", "constant"):
        found = [[one(law, t, generator)]]
    elif law.op == "diagonal":
        found = [[diagonal(t, law)]]
    elif law.op == "orthogonal":
        found = [[orthogonal(t, law, generator)]]
    elif law.op == "trunc_normal":
        mean, std, a, b = law.numbers
        found = [[trunc_normal(t, mean, std, a, b, generator)]]
        if geometry.device_of(t) >= 0:
            found.append([trunc_erfinv(t, mean, std, a, b, generator)])
    elif geometry.device_of(t) >= 0:
        found = [[sparse(t, law.numbers[1], law.shape[2], generator)]]
    else:
        mean, std = law.numbers
        found = [[normal(t, mean, std, generator), sparse_mask(t, law.shape[2])]]
    return [way for way in found if None not in way]  # type: ignore[misc]


def one(law: Law, t: Tensor, generator: object, accepted: bool = False) -> Fill | None:
    """Return the fill of a uniform, normal or constant law.

    `accepted`: the caller knows that `geometry.accepts(t)`.
    """
    if law.op == "constant":
        return constant(t, law.numbers[0], accepted)
    a, b = law.numbers
    return (uniform if law.op == "uniform" else normal)(t, a, b, generator, accepted)


def uniform(
    t: Tensor, a: object, b: object, generator: object, accepted: bool = False
) -> Fill | None:
    fill = _describe(t, "uniform", a, b, generator, accepted)
    if fill is None or fill.a > fill.b or 0 < fill.b - fill.a < _SMALLEST_RANGE:
        return None
    return fill


def normal(
    t: Tensor, mean: object, std: object, generator: object, accepted: bool = False
) -> Fill | None:
    fill = _describe(t, "normal", mean, std, generator, accepted)
    if fill is None or fill.b < 0:
        return None
    if fill.device >= 0 or (fill.items >= 16 and fill.layout == "contiguous"):
        return fill
    fill.op = "normal_pairs"
    if fill.rank == 0:  # the kernel for pairs addresses every element
        fill.rank, fill.shape = 1, (fill.items, 0, 0, 0, 1, 0, 0, 0)
    return fill


def trunc_normal(
    t: Tensor, mean: object, std: object, a: object, b: object, generator: object
) -> Fill | None:
    """Return a fill by rejection, as torch does it if more than 30 % of its draws lie in [a, b]."""
    known = _truncated(t, mean, std, a, b, generator)
    if known is None:
        return None
    fill, low, high, p_below, p_above = known
    if not p_above - p_below > 0.3:
        return None
    fill.rests_on = "trunc_normal"
    # A smaller std would be rounded, or be no normal number, in float32.
    far = low < fill.a - _reach(fill) and high > fill.a + _reach(fill)
    if far and fill.b > _SMALLEST_RANGE:
        return fill  # no draw is rejected; that draws would be is what the other kind shows
    splits = (geometry.span(t) - 1) * t.element_size() + 1 > geometry.MOST_AT_ONCE
    if fill.device >= 0 and fill.layout == "strided" and splits:
        return None  # later draws go to a dense tensor, which torch splits elsewhere
    if fill.op == "normal":
        fill.op = "trunc_normal"
        fill.lo, fill.hi = _rounded(low, t.dtype), _rounded(high, t.dtype)
        return fill
    return None


def trunc_erfinv(
    t: Tensor, mean: object, std: object, a: object, b: object, generator: object
) -> Fill | None:
    """Return a fill by the inverse of the distribution, as torch before 2.12 does it; on GPUs."""
    known = _truncated(t, mean, std, a, b, generator)
    if known is None or known[0].device < 0:
        return None
    fill, low, high, p_below, p_above = known
    if not p_below < p_above:
        return None
    fill.op, fill.bumps, fill.lo, fill.hi = "trunc_erfinv", 5, low, high
    fill.mean, fill.scale = fill.a, fill.b * math.sqrt(2.0)
    fill.a, fill.b = 2 * p_below - 1, 2 * p_above - 1
    return fill


def _truncated(
    t: Tensor, mean: object, std: object, a: object, b: object, generator: object
) -> tuple[Fill, float, float, float, float] | None:
    """Return a fill of normals, the bounds, and the mass below each; None where torch warns."""
    fill = normal(t, mean, std, generator)
    low, high = _number(a, t.dtype), _number(b, t.dtype)
    if fill is None or low is None or high is None or fill.b == 0:
        return None
    below, above = (low - fill.a) / fill.b, (high - fill.a) / fill.b
    # torch's own expressions for what it decides by.
    p_below, p_above = ((1.0 + math.erf(x / math.sqrt(2.0))) / 2.0 for x in (below, above))
    if fill.a < low - 2 * fill.b or fill.a > high + 2 * fill.b:
        return None
    fill.bounds = low, high
    return fill, low, high, p_below, p_above


@functools.lru_cache(1024)
def _rounded(value: float, dtype: torch.dtype) -> float:
    """Return what a number becomes in a dtype. In a scope torch takes 100 us to say so."""
    with kernels.undisturbed():
        return torch.tensor(value, dtype=dtype, device="cpu").item()


def _reach(fill: Fill) -> float:
    """Return how far from the mean a draw can be: sqrt(-2 log u) of the smallest u > 0, rounded."""
    float_words = fill.op == "normal" and fill.tensor.dtype is not torch.float64
    bits = 24 if float_words else 53
    if fill.device >= 0:  # (word + 1/2) / 2^32, or of 53 bits
        bits = 33 if float_words else 54
    reach = fill.b * math.sqrt(2 * bits * math.log(2)) * 1.001
    return reach + 2 * torch.finfo(fill.tensor.dtype).eps * (abs(fill.a) + reach)


def constant(t: Tensor, value: object, accepted: bool = False) -> Fill | None:
    fill = _describe(t, "constant", value, 0, None, accepted)
    if fill is not None:
        fill.generator = None
    return fill


def diagonal(t: Tensor, law: Law) -> Fill | None:
    """Return a fill of eye_ of a matrix, or of dirac_ of 3 to 5 dimensions."""
    (groups,) = law.numbers
    fill = constant(t, 0)
    if fill is None or fill.layout != "contiguous" or type(groups) is not int or groups < 0:
        return None
    fill.op, fill.shape = "diagonal", law.shape
    if groups != 0:
        fill.bumps = 1 + groups * law.shape[2]
    return fill


def sparse_mask(t: Tensor, zeros: int) -> Fill | None:
    """Return a fill of the zeros of sparse_; torch draws them from the default generator always."""
    rows, columns = t.shape
    fill = constant(t, 0)
    if fill is None or fill.device >= 0 or fill.layout != "contiguous":
        return None
    if not 0 <= zeros <= rows <= 1 << 16:
        return None
    fill.op, fill.generator = "sparse_mask", source.resolve(None, -1)
    fill.items = fill.bumps = columns
    fill.shape = (rows, zeros, columns, 0, 0, 0, 0, 0)
    return fill


def sparse(t: Tensor, std: object, zeros: int, generator: object) -> Fill | None:
    """Return a fill of the normals and zeros of sparse_ together, on a GPU."""
    rows, columns = t.shape
    fill = normal(t, 0.0, std, generator)
    if fill is None or fill.device < 0 or fill.layout != "contiguous":
        return None
    if not 0 <= zeros <= rows <= 1 << 16:
        return None
    fill.op, fill.zeros, fill.bumps = "sparse", zeros, 1 + columns
    return fill


def orthogonal(t: Tensor, law: Law, generator: object) -> Fill | None:
    """Return a fill of the normals of all matrices at once, and of their factors times the gain."""
    if switch.leaves_orthogonal_to_torch():
        return None
    count, rows, cols = law.shape
    fill, gain = normal(t, 0.0, 1.0, generator), laws.gain_of(law.numbers[0])
    if fill is None or gain is None or not t.is_contiguous():
        return None
    if count == 1 and is_narrow(rows, cols, t.dtype):
        return None
    fill.op, fill.scale, fill.bumps, fill.rank = "orthogonal", gain, 2, 0
    fill.shape = (rows, cols, count, 0, 0, 0, 0, 0)
    return fill


def is_narrow(rows: int, cols: int, dtype: torch.dtype) -> bool:
    """Return whether a matrix is left to torch, as our factorisation works on at least 16 columns.

    Matrices of 16-bit types are not, as torch has no factorisation for them.
    """
    small, large = sorted((rows, cols))
    return 1 < small <= 16 and large >= 4096 and dtype.itemsize > 2
