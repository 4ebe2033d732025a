# SPDX-License-Identifier: BSD-3-Clause
"""Torch's pointwise operators whose results are one rounding, and erfinv_, done in one native call.

torch reads and writes a tensor once for each, and its threads meet each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastinit.core import geometry, kernels, torch_api

_PACK = kernels.packer(
    kernels._cpu,
    "pointwise",
    "Q address, q items, Q erfinv, 8d number, 8B op, B dtype, B steps, 6x unused",
)
_MOST = 8  # steps of a descriptor
# The operators by their names in the schema, and what each does with a number.
_ONE = {
    "aten::mul_": "multiply",
    "aten::div_": "divide",
    "aten::add_": "add",
}
_BOUNDS = {
    "aten::clamp_": ("at_least", "at_most"),
    "aten::clamp_min_": ("at_least",),
    "aten::clamp_max_": ("at_most",),
}
_NAMES = {"aten::erfinv_", *_ONE, *_BOUNDS}

Arithmetic = tuple[tuple[int, float], ...]  # codes and numbers


def arithmetic(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> Arithmetic | None:
    """Return what an operator does to each element, or None if only torch can do it."""
    name = operator._schema.name
    if dtype not in (torch.float32, torch.float64) or name not in _NAMES:
        return None
    if name == "aten::erfinv_":
        ops, numbers = ["erfinv"], [0.0]
    elif name in _ONE:
        ops, numbers = [_ONE[name]], [*args, *kwargs.values()]
        if len(numbers) != 1:  # alpha, rounding_mode
            return None
    else:
        bounds = [*args, *(kwargs.get(key) for key in ("min", "max")[len(args) :])]
        given = [(op, x) for op, x in zip(_BOUNDS[name], bounds) if x is not None]
        ops, numbers = [op for op, _ in given], [x for _, x in given]
    if not all(type(x) is float or (type(x) is int and abs(x) < 1 << 53) for x in numbers):
        return None
    if not all(_has_torchs_bits(op, dtype) for op in ops):
        return None
    return tuple((kernels.ARITHMETIC[op], float(x)) for op, x in zip(ops, numbers))


def run(todo: Sequence[tuple[Tensor, Arithmetic]]) -> None:
    """Do arithmetic to contiguous tensors of CPU memory, of which no two may overlap."""
    for at in range(0, max(len(steps) for _, steps in todo), _MOST):  # a call does them at once
        now = [(t, steps[at : at + _MOST]) for t, steps in todo if len(steps) > at]
        kernels.run_pointwise(b"".join(_pack(*each) for each in now))


def _pack(t: Tensor, steps: Arithmetic) -> bytes:
    rest = (0,) * (_MOST - len(steps))
    codes, numbers = zip(*steps)
    return _PACK.pack(
        geometry.address_of(t), t.numel(), torch_api.mkl_erfinv(t.dtype),
        *numbers, *rest, *codes, *rest, geometry.DTYPES[t.dtype], len(steps),
    )  # fmt: skip


# ---- proof ---------------------------------------------------------------------------------------

_proofs: dict[tuple[str, torch.dtype], bool] = {}
_TORCHS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "multiply": Tensor.mul_,
    "divide": Tensor.div_,
    "add": Tensor.add_,
    "at_least": Tensor.clamp_min_,
    "at_most": Tensor.clamp_max_,
    "erfinv": lambda t, _: t.erfinv_(),
}


def _has_torchs_bits(op: str, dtype: torch.dtype) -> bool:
    """Return whether torch gives these bits for floats of all kinds; asked once per process."""
    key = (op, dtype)
    if key not in _proofs:
        numbers = (0.0, -0.0, 1.0, -0.02828, 1 / 3, 3.7e5, -1e-30, 3e38)
        with kernels.undisturbed(), torch.inference_mode(False), torch.no_grad():
            if op == "erfinv":
                _proofs[key] = torch_api.mkl_erfinv(dtype) != 0 and _agree(op, dtype, 0.0)
            else:
                _proofs[key] = all(_agree(op, dtype, x) for x in numbers)
    return _proofs[key]


def _agree(op: str, dtype: torch.dtype, number: float) -> bool:
    ours, theirs = _witnesses(dtype), _witnesses(dtype)
    run([(ours, ((kernels.ARITHMETIC[op], number),))])
    _TORCHS[op](theirs, number)
    integer = _INTEGERS[dtype]
    return bool(torch.equal(ours.view(integer), theirs.view(integer)))


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _witnesses(dtype: torch.dtype) -> Tensor:
    """Return 4,099 floats of all kinds, infinite and denormal too, and as many from -1 to 1."""
    bits = torch.arange(4099) * 0x5851F42D4C957F2D  # the multiplier of Knuth's MMIX
    some = (bits >> (32 if dtype.itemsize == 4 else 0)).to(_INTEGERS[dtype]).view(dtype)
    return torch.cat([some, torch.linspace(-1, 1, 4099, dtype=dtype)])
