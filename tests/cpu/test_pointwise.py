# SPDX-License-Identifier: BSD-3-Clause
"""Arithmetic in place has the bits of torch's operators, for floats of all kinds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinit.core import kernels, torch_api
from fastinit.cpu import pointwise

OPS = torch.ops.aten
F32, F64 = torch.float32, torch.float64
INTEGERS = {F32: torch.int32, F64: torch.int64}

CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "mul": (OPS.mul_.Tensor, (0.0283,), {}),
    "div": (OPS.div_.Tensor, (3,), {}),
    "add": (OPS.add_.Tensor, (-1e-3,), {}),
    "clamp": (OPS.clamp_.default, (-2.0, 0.3), {}),
    "clamp crossed": (OPS.clamp_.default, (1.0, -1.0), {}),
    "clamp from": (OPS.clamp_.default, (-0.0,), {}),
    "clamp to": (OPS.clamp_.default, (None, 0), {}),
    "clamp named": (OPS.clamp_.default, (), {"max": 0.5}),
    "clamp_min": (OPS.clamp_min_.default, (0.25,), {}),
    "clamp_max": (OPS.clamp_max_.default, (0.25,), {}),
    "erfinv": (OPS.erfinv_.default, (), {}),
}


def floats(items: int, dtype: torch.dtype) -> Tensor:
    """Return floats of all kinds of bits, and as many between -1 and 1."""
    g = torch.Generator().manual_seed(4)
    low, high = (-(1 << 31), 1 << 31) if dtype is F32 else (-(1 << 63), (1 << 63) - 1)
    bits = torch.randint(low, high, (items,), dtype=torch.int64, generator=g)
    any_bits = bits.to(INTEGERS[dtype]).view(dtype)
    return torch.where(torch.arange(items) % 2 == 0, any_bits, any_bits.sin().nan_to_num())


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(INTEGERS[a.dtype]), b.view(INTEGERS[b.dtype]))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("items", [1, 31, 2049, 300_007])
def test_torchs_bits(name: str, dtype: torch.dtype, items: int) -> None:
    operator, args, kwargs = CALLS[name]
    expected, t = floats(items, dtype), floats(items, dtype)
    operator(expected, *args, **kwargs)
    steps = pointwise.arithmetic(operator, args, kwargs, dtype)
    if name == "erfinv" and not torch_api.mkl_erfinv(dtype):
        assert steps is None
        return
    assert steps is not None
    pointwise.run([(t, steps)])
    assert equal(t, expected)


def test_many_tensors_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps than a descriptor has room for, in tensors of different sizes and dtypes."""
    numbers = [1.5, 0.3, -2.0, 1 / 3, 7.0, 0.1, 3.0, 1.1, -0.9, 1.3, 0.7]
    sizes = {F32: (5, 100_000), F64: (4097,)}
    tensors = [floats(n, dtype) for dtype, all_sizes in sizes.items() for n in all_sizes]
    expected = [t.clone() for t in tensors]
    todo = []
    for t, e in zip(tensors, expected, strict=True):
        steps: tuple[tuple[int, float], ...] = ()
        for i, x in enumerate(numbers):
            operator = (OPS.mul_, OPS.add_, OPS.div_)[i % 3].Tensor
            operator(e, x)
            found = pointwise.arithmetic(operator, (x,), {}, t.dtype)
            assert found is not None
            steps += found
        todo.append((t, steps))
    calls: list[bytes] = []
    run = kernels.run_pointwise
    monkeypatch.setattr(
        kernels, "run_pointwise", lambda packed: (calls.append(packed), run(packed))
    )
    pointwise.run(todo)
    assert all(equal(t, e) for t, e in zip(tensors, expected, strict=True))
    for packed in calls:  # whose descriptors are done at once
        addresses = [each[0] for each in pointwise._PACK.iter_unpack(packed)]
        assert len(addresses) == len(set(addresses)) == len(tensors)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("operator", "args", "kwargs", "dtype"),
    [
        (OPS.add_.Tensor, (1.0,), {"alpha": 2}, F32),
        (OPS.div_.Tensor_mode, (3.0,), {"rounding_mode": "floor"}, F32),
        (OPS.mul_.Tensor, (1 << 60,), {}, F32),  # rounded once by torch, twice as a double
        (OPS.mul_.Tensor, (2.0,), {}, torch.bfloat16),
        (OPS.exp_.default, (), {}, F32),
    ],
)
def test_what_torch_does(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    assert pointwise.arithmetic(operator, args, kwargs, dtype) is None


def test_unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bits of torch's would be seen: here, those of another function."""
    monkeypatch.setattr(pointwise, "_proofs", {})
    other = {**pointwise._TORCHS, "divide": lambda t, x: t.mul_(1 / x if x else math.inf)}
    monkeypatch.setattr(pointwise, "_TORCHS", other)
    assert pointwise.arithmetic(OPS.div_.Tensor, (3.0,), {}, F32) is None
    assert pointwise.arithmetic(OPS.mul_.Tensor, (3.0,), {}, F32) is not None


@pytest.mark.slow
def test_erfinv_of_all_that_uniform_gives() -> None:
    """Each float32 of uniform_(-1, 1)."""
    t = (torch.arange(1 << 24) * 2.0**-24) * 2 - 1
    expected = t.clone().erfinv_()
    steps = pointwise.arithmetic(OPS.erfinv_.default, (), {}, F32)
    if steps is not None:
        pointwise.run([(t, steps)])
        assert equal(t, expected)
    assert (steps is None) == (torch_api.mkl_erfinv(F32) == 0)
