# SPDX-License-Identifier: BSD-3-Clause
"""The numbers with which the keyed stream writes a law: finite, and the same on every machine.

Everything that a value depends on besides its words is computed here.
"""

from __future__ import annotations

import functools
import math
import struct
from decimal import Context, Decimal
from typing import Any

import torch
from torch.nn import init as torch_init

from fastinit.core import kernels, laws
from fastinit.core.laws import Law

_SMALLEST_MASS = {torch.float64: 1e-300}  # inside [a, b], for trunc_normal; others: 1e-37
_SMALLEST_RANGE = 2.0**-102  # whose 2^24th part is a normal float32
_LARGEST = (2 - 2.0**-23) * 2.0**127  # the largest float32


def checked(law: Law, dtype: torch.dtype) -> Law:
    """Return the law with numbers that the keyed stream can write to this dtype.

    Raises:
        RuntimeError: what torch's function refuses, too, and numbers that are not finite.
        ValueError, NotImplementedError: what the keyed stream has no numbers for.
    """
    if law.op == "constant":
        return law
    if dtype.is_complex:
        _refuse_complex(law, dtype)
        dtype = dtype.to_real()
    if law.is_random and not dtype.is_floating_point:
        raise NotImplementedError(f"{law.op}: the keyed stream has no numbers of type {dtype}")
    if law.op == "orthogonal":
        gain = laws.gain_of(law.numbers[0])
        return law._replace(numbers=(float(law.numbers[0]) if gain is None else gain,))
    if law.op == "uniform":
        return law._replace(numbers=_uniform(dtype, *_finite("uniform_", *law.numbers)))
    if law.op in ("normal", "sparse"):
        numbers = _finite("normal_", *law.numbers)
        _refuse_negative(numbers[1])
        rows, columns, zeros = law.shape or (0, 0, 0)
        shape = law.shape and (rows, columns, min(max(zeros, 0), rows))
        return law._replace(numbers=numbers, shape=shape)
    if law.op == "trunc_normal":
        _, std, a, b = numbers = _finite("trunc_normal_", *law.numbers)
        _refuse_negative(std)
        if std == 0 or not a < b:
            raise ValueError("trunc_normal_ needs std > 0 and a < b")
        if _masses_of(numbers)[1] < _SMALLEST_MASS.get(dtype, 1e-37):
            raise ValueError(
                f"trunc_normal_: less than 1e-37 of the normal distribution lies in [{a:g}, {b:g}]"
            )
        return law._replace(numbers=numbers)
    return law


def for_kernels(law: Law, dtype: torch.dtype) -> tuple[float, ...]:
    """Return the numbers of KeyedDesc for a law that is `checked`."""
    if law.op == "uniform":
        a, b = law.numbers
        return a, b, b if a == b else _below(b, dtype)
    if law.op == "trunc_normal":
        return *law.numbers, *_masses_of(law.numbers)
    if law.op == "diagonal":
        return (0.0,)
    return tuple(map(float, law.numbers))


_ONLY_REAL: dict[str, Any] = {
    "orthogonal": torch_init.orthogonal_,
    "trunc_normal": torch_init.trunc_normal_,
}


def _refuse_complex(law: Law, dtype: torch.dtype) -> None:
    """Raise for complex numbers what torch raises, if it does not know the law either."""
    if law.op not in ("uniform", "normal", "diagonal"):
        if law.op in _ONLY_REAL:
            with kernels.undisturbed():
                small = torch.empty((2, 2), dtype=dtype, device="cpu")
                _ONLY_REAL[law.op](small, generator=torch.Generator())
        raise NotImplementedError(f"{law.op}: the keyed stream has no numbers of type {dtype}")


def _uniform(dtype: torch.dtype, a: float, b: float) -> tuple[float, float]:
    if a > b:
        raise RuntimeError(
            f"uniform_ expects to return a [from, to) range, but found from={a:g} > to={b:g}"
        )
    if dtype is torch.float64:
        return a, b
    a, b = _float32(a), _float32(b)
    if not (b - a == 0 or _SMALLEST_RANGE <= b - a <= _LARGEST):
        raise ValueError(f"uniform_: the keyed stream has no numbers in a range of {b - a:g}")
    return a, b


def _refuse_negative(std: float) -> None:
    if std < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std:g}")


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


def _below(x: float, dtype: torch.dtype) -> float:
    """Return the largest number below x, of float64 or, for all other dtypes, float32."""
    if dtype is torch.float64:
        return math.nextafter(x, -math.inf)
    bits = struct.unpack("<i", struct.pack("<f", x))[0]
    if x == 0:
        return -(2.0**-149)
    return float(struct.unpack("<f", struct.pack("<i", bits + (-1 if x > 0 else 1)))[0])


# ---- masses of the normal distribution -----------------------------------------------------------


def _masses_of(numbers: tuple[Any, ...]) -> tuple[float, float, float]:
    mean, std, a, b = numbers
    return masses((a - mean) / std, (b - mean) / std)


@functools.lru_cache(maxsize=256)
def masses(low: float, high: float) -> tuple[float, float, float]:
    """Return how much of the standard normal lies below `low`, between, and above `high`.

    In 50 decimal digits, as the C libraries' erfc differ in their last bits.
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
    """Return how much lies above x."""
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
