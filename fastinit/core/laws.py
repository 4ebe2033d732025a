# SPDX-License-Identifier: BSD-3-Clause
"""What each function of torch.nn.init writes: an operator and its numbers, written once.

From a law it is only a question who writes it: torch's own function, torch's words natively
(build.py), or the keyed stream (keyed_numbers.py). Builders raise what torch's function raises for
the same mistake, and leave numbers as the caller gave them: who writes decides what it accepts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Rational, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import init as _torch_init

from fastinit.core import torch_api

_fan = torch_api.fans
_correct_fan = torch_api.correct_fan
_calculate_gain = _torch_init.calculate_gain
_eye, _dirac = _torch_init.eye_, _torch_init.dirac_  # whatever torch.nn.init is patched with later


# Functions of torch.nn.init that take no generator.
DRAW_NOTHING = frozenset(("constant_", "ones_", "zeros_", "eye_", "dirac_"))


class Law(NamedTuple):
    """An operator and its numbers: what is written to a tensor, or to any part of one."""

    op: str  # of kernels.OPS, sparse or orthogonal
    # constant: value; uniform: from, to; normal: mean, std; trunc_normal: mean, std, a, b;
    # sparse: 0, std; orthogonal: gain; diagonal: groups of dirac_, 0 for eye_
    numbers: tuple[Any, ...]
    # diagonal: as DiagonalDesc; sparse: rows, columns, zeros of a column;
    # orthogonal: matrices, rows, columns
    shape: tuple[int, ...] = ()

    @property
    def is_random(self) -> bool:
        """Whether the law draws random numbers."""
        return self.op not in ("constant", "diagonal")

    @property
    def is_of_all(self) -> bool:
        """Whether no element can be computed without the others."""
        return self.op in ("orthogonal", "sparse")

    @property
    def is_of_shape(self) -> bool:
        """Whether the law depends on the tensor's shape, and so fits no view of it."""
        return self.is_of_all or self.op == "diagonal"

    @property
    def items(self) -> int:
        """Elements of the whole, if `is_of_all`."""
        return math.prod(self.shape[:2] if self.op == "sparse" else self.shape)

    def of_parts(self) -> Law:
        """Return the law of the real and imaginary parts of complex numbers that have this law."""
        if self.op == "normal":  # as torch: both together have the variance
            mean, std = self.numbers
            return normal(mean, std / math.sqrt(2.0))
        if self.op == "diagonal":
            row, rows, ones, step, at, *rest = self.shape
            return self._replace(shape=(2 * row, rows, ones, 2 * step, 2 * at, *rest))
        return self


def of(function: str, whole: Tensor, args: Sequence[Any]) -> Law:
    """Return the law of a function of torch.nn.init.

    Args:
        function: its name
        whole: a tensor of the shape and dtype it is asked for; only these are looked at
        args: its arguments but the tensor and the generator
    """
    return _LAWS[function](whole, *args)


def of_shape(function: str, dtype: torch.dtype, shape: Sequence[int], args: Sequence[Any]) -> Law:
    """Return the law for a tensor of which only dtype and shape are known."""
    with torch_api.DisableTorchFunction(), torch_api.DisableTorchDispatch():
        # Of any number of elements: an expanded one has no storage whose size could overflow.
        whole = torch.empty((), dtype=dtype, device="meta").expand(tuple(shape))
        return of(function, whole, args)


def constant(value: Any) -> Law:
    return Law("constant", (value,))


def uniform(a: Any, b: Any) -> Law:
    return Law("uniform", (a, b))


def normal(mean: Any, std: Any) -> Law:
    return Law("normal", (mean, std))


def xavier_std(whole: Tensor, gain: Any) -> Any:
    fan_in, fan_out = _fan(whole)
    return gain * math.sqrt(2.0 / float(fan_in + fan_out))


def kaiming_std(whole: Tensor, a: Any, mode: Any, nonlinearity: Any) -> Any:
    fan = _correct_fan(whole, mode)  # first: its errors come first in torch
    return _calculate_gain(nonlinearity, a) / math.sqrt(fan)


def symmetric(std: Any) -> Law:
    """Return the uniform law around 0 with this standard deviation."""
    bound = math.sqrt(3.0) * std
    return uniform(-bound, bound)


def eye(whole: Tensor) -> Law:
    if whole.dim() != 2:
        _eye(torch.empty_like(whole, device="meta"))  # raises
    return Law("diagonal", (0,), _diagonal(whole.shape, 0))


def dirac(whole: Tensor, groups: Any = 1) -> Law:
    if not (whole.dim() in (3, 4, 5) and type(groups) is int and groups > 0):
        _dirac(torch.empty_like(whole, device="meta"), groups)  # raises, in most cases
    elif whole.shape[0] % groups != 0:
        _dirac(torch.empty_like(whole, device="meta"), groups)
    return Law("diagonal", (groups,), _diagonal(whole.shape, groups))


def orthogonal(whole: Tensor, gain: Any = 1, batched: bool = False) -> Law:
    """Return the law of one matrix, trailing dimensions flattened, or of each of a batch."""
    if whole.dim() < 2:
        raise ValueError("Only tensors with 2 or more dimensions are supported")
    items, rows = whole.numel(), whole.shape[-2 if batched else 0]
    if items == 0:
        return Law("orthogonal", (gain,), (0, rows, 0))
    columns = whole.shape[-1] if batched else items // rows
    return Law("orthogonal", (gain,), (items // (rows * columns), rows, columns))


def sparse(whole: Tensor, sparsity: Any, std: Any = 0.01) -> Law:
    if whole.dim() != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    rows, columns = whole.shape
    return Law("sparse", (0.0, std), (rows, columns, math.ceil(sparsity * rows)))


_LAWS: dict[str, Callable[..., Law]] = {
    "zeros_": lambda t: constant(0.0),
    "ones_": lambda t: constant(1.0),
    "constant_": lambda t, val: constant(val),
    "eye_": eye,
    "dirac_": dirac,
    "uniform_": lambda t, a=0.0, b=1.0: uniform(a, b),
    "normal_": lambda t, mean=0.0, std=1.0: normal(mean, std),
    "trunc_normal_": lambda t, mean=0.0, std=1.0, a=-2.0, b=2.0: Law(
        "trunc_normal", (mean, std, a, b)
    ),
    "xavier_uniform_": lambda t, gain=1.0: symmetric(xavier_std(t, gain)),
    "xavier_normal_": lambda t, gain=1.0: normal(0.0, xavier_std(t, gain)),
    "kaiming_uniform_": lambda t, a=0, mode="fan_in", nonlinearity="leaky_relu": symmetric(
        kaiming_std(t, a, mode, nonlinearity)
    ),
    "kaiming_normal_": lambda t, a=0, mode="fan_in", nonlinearity="leaky_relu": normal(
        0.0, kaiming_std(t, a, mode, nonlinearity)
    ),
    "orthogonal_": orthogonal,
    "orthogonal_batched_": functools.partial(orthogonal, batched=True),
    "sparse_": sparse,
}


def _diagonal(shape: Sequence[int], groups: int) -> tuple[int, ...]:
    """Return the numbers of DiagonalDesc for eye_ (groups = 0) and dirac_."""
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
    """Return a number, also one of numpy's, that torch multiplies with; None for anything else."""
    if isinstance(gain, int):
        return float(gain) if -(1 << 63) <= gain < 1 << 64 else None  # torch refuses others
    fraction = isinstance(gain, Rational) and not isinstance(gain, Integral)
    return float(gain) if isinstance(gain, Real) and not fraction else None
