# SPDX-License-Identifier: BSD-3-Clause
"""What the functions of torch.nn.init write, as laws of the keyed stream: numbers for the kernels.

Everything that a value depends on besides its words is computed here, with operations that are the
same on every machine.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from decimal import Context, Decimal
from numbers import Integral, Rational, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import init as _torch_init

from fastinit.core.fill import Fill

_NARROW = (torch.float16, torch.bfloat16, torch.float32)
_DRAW_NOTHING = ("constant_", "ones_", "zeros_", "eye_", "dirac_")
_SMALLEST = {torch.float64: 1e-300}
_SMALLEST_RANGE, _LARGEST = 2.0**-102, (2 - 2.0**-23) * 2.0**127  # a 2^24th part is normal
_fan = _torch_init._calculate_fan_in_and_fan_out
_correct_fan = _torch_init._calculate_correct_fan
_eye, _dirac = _torch_init.eye_, _torch_init.dirac_
_calculate_gain = _torch_init.calculate_gain


class Law(NamedTuple):
    """What is written to a parameter, whatever part of it is written."""

    op: str  # of kernels.OPS, sparse or orthogonal
    p: tuple[float, ...]  # of csrc/keyed.h; orthogonal: gain
    shape: tuple[int, ...] = ()  # diagonal: as in a Fill; sparse: rows, columns, zeros
    items: int = 0  # of the whole, if `is_of_all`

    @property
    def is_random(self) -> bool:
        return self.op not in ("constant", "diagonal")

    @property
    def is_of_all(self) -> bool:
        """No element can be computed without the others."""
        return self.op in ("orthogonal", "sparse")

    @property
    def is_of_shape(self) -> bool:
        """It is for a tensor of the shape that was asked for, and no other."""
        return self.is_of_all or self.op == "diagonal"


def law_of(function: str, dtype: torch.dtype, shape: Sequence[int], args: Sequence[Any]) -> Law:
    """Of a function and its arguments but the tensor and the generator.

    `shape`: of the whole parameter. Raises what torch's function raises for the same mistake.
    """
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        # Of any number of elements: an expanded one has no storage whose size could overflow.
        whole = torch.empty((), dtype=dtype, device="meta").expand(tuple(shape))
        law: Law = _BUILD[function](whole, *args)
    if law.is_random and not dtype.is_floating_point:
        raise NotImplementedError(f"{function}: the keyed stream has no numbers of type {dtype}")
    return law


def draws(function: str) -> bool:
    """Whether it is one of torch.nn.init's that draw."""
    return function in _BUILD and function not in _DRAW_NOTHING


def of_fill(fill: Fill) -> Law:
    """Of what plan.py has made of a function."""
    if fill.op in ("constant", "diagonal"):
        return Law(fill.op, (fill.a,), fill.shape)
    dtype = fill.tensor.dtype
    if fill.op == "uniform":
        return uniform(dtype, fill.a, fill.b)
    if fill.op == "orthogonal":
        rows, cols, count = fill.shape[:3]
        return Law("orthogonal", (fill.scale,), (count, rows, cols), fill.items)
    if fill.op == "sparse":
        rows, columns = fill.tensor.shape
        return sparse(rows, columns, fill.zeros, fill.b)
    if fill.bounds is not None:
        erfinv = fill.op == "trunc_erfinv"
        mean, std = (fill.mean, fill.scale / math.sqrt(2.0)) if erfinv else (fill.a, fill.b)
        return truncated(dtype, mean, std, *fill.bounds)
    return normal(fill.a, fill.b)


def constant(whole: Tensor, value: Any) -> Law:
    return Law("constant", (float(value),))


def _eye_law(whole: Tensor) -> Law:
    _eye(torch.empty_like(whole))  # raises
    return Law("diagonal", (0.0,), diagonal_of(whole.shape, 0))


def _dirac_law(whole: Tensor, groups: int = 1) -> Law:
    _dirac(torch.empty_like(whole), groups)
    return Law("diagonal", (0.0,), diagonal_of(whole.shape, groups))


def uniform(dtype: torch.dtype, a: Any, b: Any) -> Law:
    a, b = _finite("uniform_", a, b)
    if a > b:
        raise RuntimeError(
            f"uniform_ expects to return a [from, to) range, but found from={a:g} > to={b:g}"
        )
    if dtype is torch.float64:
        return Law("uniform", (a, b, math.nextafter(b, -math.inf) if a < b else b))
    a, b = _float32(a), _float32(b)
    if not (b - a == 0 or _SMALLEST_RANGE <= b - a <= _LARGEST):
        raise ValueError(f"uniform_: the keyed stream has no numbers in a range of {b - a:g}")
    return Law("uniform", (a, b, _below(b) if a < b else b))


def normal(mean: Any, std: Any) -> Law:
    mean, std = _finite("normal_", mean, std)
    if std < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std:g}")
    return Law("normal", (mean, std))


def truncated(dtype: torch.dtype, *numbers: Any) -> Law:
    mean, std, a, b = _finite("trunc_normal_", *numbers)
    if std < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std:g}")
    if std == 0 or not a < b:
        raise ValueError("trunc_normal_ needs std > 0 and a < b")
    under, inside, over = masses((a - mean) / std, (b - mean) / std)
    if inside < _SMALLEST.get(dtype, 1e-37):
        raise ValueError(
            f"trunc_normal_: less than 1e-37 of the normal distribution lies in [{a:g}, {b:g}]"
        )
    if dtype is not torch.float64:
        a, b = _float32(a), _float32(b)
    return Law("trunc_normal", (mean, std, a, b, under, inside, over))


def sparse(rows: int, columns: int, zeros: int, std: Any) -> Law:
    """`zeros`: of each column."""
    shape = (rows, columns, zeros)
    return normal(0.0, std)._replace(op="sparse", shape=shape, items=rows * columns)


def xavier_std(whole: Tensor, gain: Any) -> float:
    fan_in, fan_out = _fan(whole)
    return gain * math.sqrt(2.0 / float(fan_in + fan_out))  # type: ignore[no-any-return]


def kaiming_std(whole: Tensor, a: Any, mode: Any, nonlinearity: Any) -> float:
    fan = _correct_fan(whole, mode)  # first: its errors come first in torch
    return float(_calculate_gain(nonlinearity, a) / math.sqrt(fan))


def _symmetric(dtype: torch.dtype, std: float) -> Law:
    bound = math.sqrt(3.0) * std
    return uniform(dtype, -bound, bound)


def _orthogonal(whole: Tensor, gain: Any, batched: bool = False) -> Law:
    if whole.dim() < 2:
        raise ValueError("Only tensors with 2 or more dimensions are supported")
    scale = gain_of(gain)
    rows, cols = whole.shape[-2:] if batched else (whole.shape[0], 0)
    items = whole.numel()
    if items != 0 and not batched:
        cols = items // rows
    count = items // (rows * cols) if items else 0
    return Law("orthogonal", (float(gain) if scale is None else scale,), (count, rows, cols), items)


def _sparse(whole: Tensor, sparsity: Any, std: Any = 0.01) -> Law:
    if whole.dim() != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    rows, columns = whole.shape
    zeros = min(max(math.ceil(sparsity * rows), 0), rows)
    return sparse(rows, columns, zeros, std)


_BUILD: dict[str, Any] = {
    "zeros_": lambda t: constant(t, 0.0),
    "ones_": lambda t: constant(t, 1.0),
    "constant_": constant,
    "eye_": _eye_law,
    "dirac_": _dirac_law,
    "uniform_": lambda t, a=0.0, b=1.0: uniform(t.dtype, a, b),
    "normal_": lambda t, mean=0.0, std=1.0: normal(mean, std),
    "trunc_normal_": lambda t, mean=0.0, std=1.0, a=-2.0, b=2.0: truncated(
        t.dtype, mean, std, a, b
    ),
    "xavier_uniform_": lambda t, gain=1.0: _symmetric(t.dtype, xavier_std(t, gain)),
    "xavier_normal_": lambda t, gain=1.0: normal(0.0, xavier_std(t, gain)),
    "kaiming_uniform_": lambda t, a=0, mode="fan_in", nonlinearity="leaky_relu": _symmetric(
        t.dtype, kaiming_std(t, a, mode, nonlinearity)
    ),
    "kaiming_normal_": lambda t, a=0, mode="fan_in", nonlinearity="leaky_relu": normal(
        0.0, kaiming_std(t, a, mode, nonlinearity)
    ),
    "orthogonal_": _orthogonal,
    "orthogonal_batched_": functools.partial(_orthogonal, batched=True),
    "sparse_": _sparse,
}


# ---- numbers -------------------------------------------------------------------------------------


def _finite(function: str, *numbers: Any) -> tuple[float, ...]:
    result = tuple(float(x) for x in numbers)
    if not all(map(math.isfinite, result)):
        raise RuntimeError(f"{function}: a parameter is not finite: {result}")
    return result


def _float32(x: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        raise RuntimeError(f"{x:g} is out of bounds for float32") from None


def _below(x: float) -> float:
    """The largest float32 below a float32."""
    bits = struct.unpack("<i", struct.pack("<f", x))[0]
    if x == 0:
        return -(2.0**-149)
    return float(struct.unpack("<f", struct.pack("<i", bits + (-1 if x > 0 else 1)))[0])


@functools.lru_cache(maxsize=256)
def masses(low: float, high: float) -> tuple[float, float, float]:
    """How much of the standard normal distribution lies below `low`, between and above `high`.

    In 40 decimal digits, as the C libraries' erfc differ in their last bits.
    """
    under, over = _tail(-low), _tail(high)
    if low > 0:
        inside = _tail(low) - over
    elif high < 0:
        inside = _tail(-high) - under
    else:
        inside = 1 - under - over
    return float(under), float(inside), float(over)


_DIGITS = Context(prec=50)


def _tail(x: float) -> Decimal:
    """How much lies above x."""
    c = _DIGITS
    if x < 0:
        return c.subtract(Decimal(1), _tail(-x))
    if x > 60:
        return Decimal(0)
    z = Decimal(x)
    square = c.multiply(z, z)
    # The density, from 1 / sqrt(2 pi).
    peak = Decimal("0.39894228040143267793994605993438186847585863116493")
    density = c.multiply(peak, c.exp(c.divide(-square, Decimal(2))))
    if x < 4:  # 1/2 - density (x + x^3 / 3 + x^5 / 15 + ...)
        term = total = z
        n = 1
        while abs(term) > Decimal("1e-48"):
            n += 2
            term = c.divide(c.multiply(term, square), Decimal(n))
            total = c.add(total, term)
        return c.subtract(Decimal("0.5"), c.multiply(density, total))
    fraction = z  # density / (x + 1 / (x + 2 / (x + ...)))
    for n in range(600, 0, -1):
        fraction = c.add(z, c.divide(Decimal(n), fraction))
    return c.divide(density, fraction)


def diagonal_of(shape: Sequence[int], groups: int) -> tuple[int, ...]:
    """Diagonal of csrc/plan.h, for eye_ (groups = 0) and dirac_."""
    rows, columns = shape[:2]
    if groups == 0:
        return (columns, rows, min(rows, columns), 1, 0, 0, 0, 0)
    space = math.prod(shape[2:])
    centre = 0
    for size in shape[2:]:
        centre = centre * size + size // 2
    channels = min(rows // groups, columns)
    return (columns * space, rows // groups, channels, space, centre, 0, 0, 0)


def gain_of(gain: object) -> float | None:
    """A number, also one of numpy's, that torch multiplies with."""
    if isinstance(gain, int):
        return float(gain) if -(1 << 63) <= gain < 1 << 64 else None  # torch refuses others
    fraction = isinstance(gain, Rational) and not isinstance(gain, Integral)
    return float(gain) if isinstance(gain, Real) and not fraction else None
