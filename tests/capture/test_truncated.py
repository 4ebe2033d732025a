# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): truncated normals, torch's and timm's, at any bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

import fastinit
from fastinit.core import kernels
from tests.support.compare import (
    BF16,
    F16,
    F32,
    F64,
    Position,
    assert_same,
    bits,
)
from tests.support.mt19937 import WORDS, untemper
from tests.support.scopes import Cases, N, Scope, compare, same

case = Cases()


@case
def truncated_normals(s: Scope) -> Any:
    made = []
    for args in ((), (0, 0.02), (0, 1, -2, 2), (0, 0.02, -0.04, 0.04), (1, 1, 0, 5), (0, 1, 3, 4)):
        for dtype in (torch.float32, BF16, F16, F64):
            w = s.empty(20, 30, dtype=dtype).uniform_()
            torch_init.trunc_normal_(w, *args)
            torch_init.trunc_normal_(w[3:5], *args, generator=s.g)
            made += [w, torch.get_rng_state()]
            if dtype is BF16:
                torch_init.trunc_normal_(s.empty(400), *args)
                w[7].zero_()
    return made, torch_init.trunc_normal_(nn.Parameter(s.empty(40, 30)), std=0.02)


def timm_trunc_normal_(w: Tensor, mean: float, std: float, a: float, b: float) -> Tensor:
    def cdf(x: float) -> float:
        return (1.0 + math.erf(x / math.sqrt(2.0))) / 2.0

    with torch.no_grad():
        low, high = cdf((a - mean) / std), cdf((b - mean) / std)
        w.uniform_(2 * low - 1, 2 * high - 1)
        w.erfinv_()
        w.mul_(std * math.sqrt(2.0))
        w.add_(mean)
        w.clamp_(min=a, max=b)
    return w


@case
def truncated_normals_of_timm(s: Scope) -> Any:
    layer, w = s.make(nn.Linear, 40, 30), s.empty(1, 50, 24).zero_()
    timm_trunc_normal_(layer.weight, 0, 0.02, -2, 2)
    timm_trunc_normal_(w, 0, 1, -2, 2)
    timm_trunc_normal_(layer.weight[3:5], 0, 1, -2, 2)
    with torch.no_grad():
        timm_trunc_normal_(w[0, 3], 0, 1, -2, 2).mul_(0.02).add_(1)
    return layer, w


@case.each
def test_cases(name: str, variant: str) -> None:
    compare(case[name], variant)


class Truncated(nn.Module):
    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.w, self.bounds = nn.Parameter(torch.empty(200, 100)), (a, b)

    def reset_parameters(self) -> None:
        torch_init.trunc_normal_(self.w, 0.0, 0.02, *self.bounds)


@pytest.mark.parametrize("bounds", [(-0.03, 0.03), (-2.0, 2.0)])
def test_materialize_truncates_natively(bounds: tuple[float, float]) -> None:
    with torch.device("meta"):
        model = Truncated(*bounds)
    fastinit.trunc_normal_(torch.empty(N), 0.0, 0.02, *bounds)  # it has been proved
    torch.manual_seed(3)
    before = kernels.native_fills
    fastinit.materialize_(model)
    assert kernels.native_fills == before + 1
    state = torch.get_rng_state()
    torch.manual_seed(3)
    expected = torch_init.trunc_normal_(torch.empty(200, 100), 0.0, 0.02, *bounds)
    assert torch.equal(bits(model.w), bits(expected))
    assert torch.equal(torch.get_rng_state(), state)


class Extremes(Position):
    """A generator whose next words make the largest normals there are, of both signs."""

    def place(self, generator: torch.Generator) -> torch.Generator:
        super().place(generator)
        state = generator.get_state()
        raw = state.numpy()
        words = np.random.default_rng(0).integers(0, 1 << 32, (WORDS // 16, 2, 8), dtype=np.uint32)
        words[::3, 0] = 0xFFFFFFFF  # radii
        words[:, 1, ::2] = 0
        words[:, 1, 1::2] = 1 << 23  # angles: half a turn, in 24 bits
        raw[8:12].view(np.int32)[0] = 624  # left
        raw[16:24].view(np.uint64)[0] = 1  # next
        raw[24:5016].view(np.uint64)[1 : 1 + WORDS] = untemper(words.reshape(-1))
        generator.set_state(state)
        return generator


FAR = [  # dtype, mean, std, bounds in std
    *((F32, 0.0, std, k) for std in (2.2e-45, 1e-38, 1e-30, 1.1e-30, 0.02) for k in (5.7, 5.9, 8)),
    *((F64, 0.0, std, k) for std in (1e-310, 1e-30, 0.02) for k in (5.9, 8.5, 8.7)),
    *((BF16, 0.0, std, k) for std in (1e-40, 1e-38, 1e-30, 0.0207, 1.0) for k in (5.7, 5.9)),
    *((F16, 0.0, std, k) for std in (0.9e-7, 1.5e-7, 3.1e-6, 0.02, 1.0) for k in (5.7, 5.85, 5.9)),
    *((dtype, 1.0, 0.1, k) for dtype in (F32, F64, BF16, F16) for k in (5.75, 5.8, 5.9)),
    *((dtype, -3.0, 0.5, k) for dtype in (F32, F64, BF16, F16) for k in (5.75, 5.8, 5.9)),
]


@pytest.mark.parametrize(("dtype", "mean", "std", "k"), FAR)
@pytest.mark.parametrize("extreme", [False, True], ids=["any", "extreme"])
def test_bounds_that_hardly_matter(
    dtype: torch.dtype, mean: float, std: float, k: float, extreme: bool
) -> None:
    """A draw may be outside of them after rounding, and then it is drawn again."""
    n = N if extreme else 10 * N
    bounds = mean - k * std, mean + k * std
    at = Extremes() if extreme else Position(words=3)
    assert_same("trunc_normal_", lambda: torch.empty(n, dtype=dtype), mean, std, *bounds, at=at)
    if extreme:
        same(lambda: torch_init.trunc_normal_(torch.empty(n, dtype=dtype), mean, std, *bounds))
