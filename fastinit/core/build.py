# SPDX-License-Identifier: BSD-3-Clause
"""Fills from the arguments of torch's functions, where the kernels can do what torch would."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastinit.core import geometry, laws, source
from fastinit.core.fill import Fill

_LARGEST = {torch.float16: 3e4}  # |parameters| up to here cannot leave the dtype's range,
_LARGEST_OTHER = 1e37  # nor can the difference of two


_SMALLEST_RANGE = 1e-30  # of uniform_: the 2^24th part of it is a normal float32


def _number(value: object, dtype: torch.dtype) -> float | None:
    """A finite int or float that all dtypes' checks would let pass."""
    if type(value) is not float and type(value) is not int:
        return None
    if type(value) is int and abs(value) > 1 << 53:  # torch rounds these more than once
        return None
    return float(value) if abs(value) <= _LARGEST.get(dtype, _LARGEST_OTHER) else None  # not NaN


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


# `accepted`: the caller knows that `accepts(t)`.


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
    """Where torch would reject proposals of normal_, which it does if most are inside [a, b]."""
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
        fill.lo, fill.hi = (t.new_tensor(x, device="cpu").item() for x in (low, high))
        return fill
    return None


def trunc_erfinv(
    t: Tensor, mean: object, std: object, a: object, b: object, generator: object
) -> Fill | None:
    """The same of torch before 2.12: by the inverse of the distribution. On GPUs only."""
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
    """As normal; the bounds; what of the distribution lies below each. None: torch warns."""
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


def _reach(fill: Fill) -> float:
    """How far from the mean a draw can be: sqrt(-2 log u) with the smallest u > 0, and rounding."""
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


def diagonal(t: Tensor, groups: int) -> Fill | None:
    """eye_ of a matrix (groups = 0), dirac_ of 3 to 5 dimensions."""
    fill = constant(t, 0)
    if fill is None or fill.layout != "contiguous" or type(groups) is not int or groups < 0:
        return None
    fill.op, fill.shape = "diagonal", laws.diagonal_of(t.shape, groups)
    if groups != 0:
        fill.bumps = 1 + groups * fill.shape[2]
    return fill


def sparse_mask(t: Tensor, zeros: int) -> Fill | None:
    """The zeros of sparse_; torch draws them from the default generator whatever is asked for."""
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
    """Normals and zeros of sparse_ together, on a GPU."""
    rows, columns = t.shape
    fill = normal(t, 0.0, std, generator)
    if fill is None or fill.device < 0 or fill.layout != "contiguous":
        return None
    if not 0 <= zeros <= rows <= 1 << 16:
        return None
    fill.op, fill.zeros, fill.bumps = "sparse", zeros, 1 + columns
    return fill


def orthogonal(
    t: Tensor, gain: object, generator: object, rows: int, count: int = 1
) -> Fill | None:
    """`count` matrices of normals, drawn at once, and their orthogonal factors times gain."""
    fill = normal(t, 0.0, 1.0, generator)
    if fill is None or not t.is_contiguous():
        return None
    scale = laws.gain_of(gain)
    if scale is None or (count == 1 and is_narrow(rows, fill.items // rows, t.dtype)):
        return None
    fill.op, fill.scale, fill.bumps, fill.rank = "orthogonal", scale, 2, 0
    fill.shape = (rows, fill.items // count // rows, count, 0, 0, 0, 0, 0)
    return fill


def is_narrow(rows: int, cols: int, dtype: torch.dtype) -> bool:
    """A few columns, of which ours would work on sixteen; torch does not for 16-bit types."""
    small, large = sorted((rows, cols))
    return 1 < small <= 16 and large >= 4096 and dtype.itemsize > 2
