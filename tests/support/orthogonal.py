# SPDX-License-Identifier: BSD-3-Clause
"""What orthogonal_ has to give: torch's normals to the bit, their factor up to rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor

import fastinit
from tests.support.compare import DTYPES, ELSEWHERE, F32, F64, Position, assert_equal_seen, observe
from tests.support.layouts import box
from tests.support.qr_model import drawn, exact, flat, rounding

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_width = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
FEW = 64  # columns up to which float32 has the exact result, rounded


def assert_close(found: Tensor, truth: Tensor, what: object = "", gain: float = 1) -> None:
    """gain times what is exact, but for roundings (of float32's Q, of the product, and of that to
    16 bits), and beyond a few columns for what the factor of float32 lacks."""
    dtype, n = found.dtype, min(found.shape)
    if dtype != F64:
        gain = float(np.float32(gain))
    truth = truth * gain
    error = (found.detach().double() - truth).abs()
    rounded = {F64: 3.0, F32: 3.03 if abs(gain) not in (1, 0.5, 2) else 1.01}.get(dtype, 1.02)
    allowed = rounded * rounding(truth, dtype)
    if dtype == F64:
        allowed += 300e-15 * n * abs(gain)
    elif n > FEW:
        allowed += 1e-6 * n * abs(gain)
    else:
        allowed += 1e-12 * abs(gain)
    assert bool((error <= allowed).all()), f"{what}: {(error / allowed).max()} times what may be"


def assert_matrix(found: Tensor, gaussian: Tensor, gain: float = 1, what: object = "") -> None:
    assert_close(found.reshape(gaussian.shape), exact(gaussian), what, gain)


def of(shape: tuple[int, ...]) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: box(*shape, dtype=dtype)


def check(
    make: Callable[[torch.dtype], Tensor],
    dtype: torch.dtype = F32,
    gain: float = 1,
    at: Position | None = None,
    way: str = "default",
) -> None:
    """All that can be seen of a call is torch's, except values, which are the exact ones."""
    seen, found = [], None
    at = at or Position()
    for module in (torch_init, fastinit):  # torch refuses 16 bits: float32 has the same normals
        found = make(F64 if dtype == F64 else F32) if module is torch_init else make(dtype)
        explicit = at.place(torch.Generator())
        default = (ELSEWHERE if way == "explicit" else at).place(torch.default_generator)
        options = {"generator": explicit} if way == "explicit" else {}
        seen.append(observe(module.orthogonal_, found, gain, **options))
        del seen[-1]["values"], seen[-1]["storage"]
        shape, _, *rest = seen[-1]["geometry"]
        seen[-1]["geometry"] = (shape, rest)
        seen[-1]["explicit generator"] = explicit.get_state()
        seen[-1]["default generator"] = default.get_state()
    assert found is not None
    what = (tuple(found.shape), dtype, at, way)
    assert_equal_seen(seen[0], seen[1], str(what))
    if found.numel():
        gaussian = drawn(flat(found.shape), dtype, at.place(torch.Generator()))
        assert_matrix(found, gaussian, gain, what)


def assert_batch(found: Tensor, truth: Tensor, gain: float) -> None:
    rows, columns = found.shape[-2:]
    pairs = zip(found.detach().reshape(-1, rows, columns), truth.reshape(-1, rows, columns))
    for i, (q, expected) in enumerate(pairs):
        assert_close(q, expected, (tuple(found.shape), i), gain)
