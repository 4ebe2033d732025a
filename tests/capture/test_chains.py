# SPDX-License-Identifier: BSD-3-Clause
"""Pointwise operators, conversions and copies behind fills: what waits, what is dropped, bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

import fastinit
from fastinit.capture import chains, operators
from tests.support.compare import BF16, F16, F32, F64
from tests.support.marks import slow_but
from tests.support.scopes import N, same

DTYPES = slow_but((F32, F64, BF16, F16), F32, BF16)


def timm(w: Tensor) -> Tensor:
    """timm's trunc_normal_."""
    with torch.no_grad():
        w.uniform_(-0.95, 0.95)
        w.erfinv_()
        w.mul_(0.02 * math.sqrt(2.0))
        w.add_(0.1)
        return w.clamp_(min=-2.0, max=2.0)


STEPS: dict[str, Callable[[Tensor], Any]] = {
    "timm": timm,
    "rescaled": lambda w: w.normal_().div_(30),
    "in place operators": lambda w: w.normal_().__imul__(2).__itruediv__(3).__isub__(1),
    "powers": lambda w: w.uniform_(0.5, 1.5).pow_(2).pow_(-0.5).sqrt_().rsqrt_(),
    "with alpha": lambda w: w.normal_().add_(2, alpha=3).sub_(1, alpha=0.5),
    "functions": lambda w: w.uniform_().exp_().log_().tanh_().sigmoid_().neg_().abs_(),
    "rounded": lambda w: w.normal_().mul_(10).round_().floor_().clamp_min_(-3).fmod_(2),
    "out of place": lambda w: (w.normal_() * 0.02 + 1).exp().clamp(-1, 2) / 3,
    "reversed": lambda w: 1 - 2 * w.normal_(),
    "source kept": lambda w: (w.normal_(), w * 2, -w),
    "slices": lambda w: (w.normal_(), w.view(-1)[5:9000].mul_(3), w[7].add_(1)),
    "transposed": lambda w: w.normal_().t().mul_(3),
    "every second": lambda w: (w.normal_(), w[::2].mul_(3).add_(1)),
    "data": lambda w: nn.Parameter(w.normal_()).data.mul_(0.5),
    "filled again": lambda w: w.normal_().mul_(3).uniform_().add_(1),
    "of integers": lambda w: w.normal_().mul_(3).add_(1).int(),
    "by a tensor": lambda w: w.normal_().mul_(torch.tensor(3.0, dtype=w.dtype)).add_(1),
    "NaN and inf": lambda w: w.normal_().clamp_(max=math.inf).add_(math.nan),
    "a bool": lambda w: w.normal_().mul_(True).add_(1),
    "conjugate": lambda w: w.normal_().conj().mul_(2),
    "copied before": lambda w: (
        w.normal_(),
        w.clone().mul_(2),
        copy.deepcopy(w).add_(1),
        w.mul_(3),
    ),
    "copied after": lambda w: (
        w.normal_().mul_(2),
        w.clone().add_(1),
        torch.empty_like(w).copy_(w),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEPS)
def test_steps(name: str, dtype: torch.dtype) -> None:
    same(lambda: (w := torch.empty(N // 200, 200, dtype=dtype), STEPS[name](w)))


CASTS: dict[str, Callable[[Tensor], Any]] = {
    "bfloat16": lambda w: w.normal_().bfloat16(),
    "half": lambda w: w.uniform_().half(),
    "double": lambda w: w.normal_().double(),
    "there and back": lambda w: w.normal_().bfloat16().float().half(),
    "with steps": lambda w: w.normal_().mul_(0.02).bfloat16().add_(1),
    "of slices": lambda w: (w.normal_(), w[3:90].uniform_(), w.half()),
    "kept": lambda w: (w.normal_(), w.bfloat16(), w.half(), w.mul_(2)),
    "filled again": lambda w: (w.normal_().bfloat16().zero_(), w.half().uniform_()),
    "copy_": lambda w: torch.empty(w.shape, dtype=F16 if w.dtype is F32 else F32).copy_(
        w.normal_()
    ),
    "copy_ of a slice": lambda w: torch.zeros(w.shape, dtype=BF16)[3:].copy_(w.normal_()[3:]),
    "orthogonal": lambda w: w.normal_().double().mul_(2).float(),
    "channels last": lambda w: (
        w.normal_().view(2, 25, 40, -1).to(F64, memory_format=torch.channels_last)
    ),
    "to an integer": lambda w: w.normal_().to(torch.int32),
    "a constant": lambda w: w.fill_(0.3).bfloat16(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("scratch", [1 << 22, 1 << 14])
def test_casts(
    name: str, dtype: torch.dtype, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where wide memory is short, so that each tensor is made in many pieces."""
    monkeypatch.setattr(chains, "_SCRATCH", scratch)
    for items in (N, N + 13, 9 * 4096 + 9):
        if name != "channels last" or items == N:
            rows = 100 if items == N else 1
            same(lambda r=rows, n=items: CASTS[name](torch.empty(r, n // r, dtype=dtype)))


def net() -> nn.Module:
    return nn.Sequential(nn.Embedding(300, 200), nn.Linear(200, 300), nn.LayerNorm(300))


@pytest.mark.parametrize("how", ["bfloat16", "half", "double"])
def test_models(how: str) -> None:
    report = same(lambda: getattr(net(), how)())
    assert report.early == []
    assert report.recorded_elements == 2 * 120_000  # of the model, and again converted
    assert report.written_elements < report.recorded_elements


@pytest.mark.parametrize("name", ["timm", "rescaled", "functions", "in place operators"])
def test_nothing_is_done_early(name: str) -> None:
    report = same(lambda: STEPS[name](torch.empty(N)))
    assert report.early == []


def test_what_is_overwritten_is_not_done() -> None:
    with fastinit.fused() as report:
        w = torch.empty(N).normal_().mul_(3)
        half = w.half()
        w.uniform_()
        half.zero_()
    assert report.written_elements == 2 * N
    assert report.early == []


def test_a_step_that_torch_refuses_is_refused_at_once() -> None:
    with fastinit.fused():
        w = torch.empty(N).normal_()
        with pytest.raises(RuntimeError):
            w.clamp_()
        with pytest.raises((RuntimeError, TypeError)):
            w.mul_(1j)
        before = w._version
        w.mul_(2)
        assert w._version == before + 1


@pytest.mark.parametrize("number", [1e39, -math.inf, math.nan, 2**70])
def test_numbers_that_might_not_fit(number: float) -> None:
    def build() -> Any:
        found: list[Any] = [torch.empty(N).normal_(), torch.empty(N, dtype=F16).normal_()]
        for w in tuple(found):
            for f in (w.mul_, w.add_, w.clamp_, w.pow_):
                try:
                    f(number)
                except (RuntimeError, OverflowError) as error:
                    found.append(str(error))
        return found

    same(build)


def test_long_chains_end() -> None:
    def build() -> list[Tensor]:
        w = torch.empty(N).normal_()
        for _ in range(300):
            w.mul_(1.01)
        x = torch.empty(N).uniform_()
        made = [x]
        for _ in range(100):
            made.append(made[-1] + 0.5)
        return [w, *made]

    same(build)


def test_operators_take_numbers() -> None:
    """All of the table exist here, and each has its form in place."""
    assert len(operators.IN_PLACE) == len(operators.OUT_OF_PLACE) == len(operators._POINTWISE)


def test_pieces_that_differ_are_not_used() -> None:
    """An operator that looks at where an element stands, as a scan does, is not cut."""
    scan = chains.Step(torch.ops.aten.cumsum_.default, (0,), {})
    assert chains._try(scan, F32) is False
    assert chains._try(chains.Step(torch.ops.aten.erfinv_.default, (), {}), F32) is True
    assert chains._try(chains.Step(torch.ops.aten.clamp_.default, (), {}), F32) is None


def test_autograd_sees_what_it_needs() -> None:
    def build() -> Any:
        w = nn.Parameter(torch.empty(N))
        torch_init.normal_(w)
        y = (w * 2).exp()
        y.sum().backward()
        return w, y, w.grad

    same(build)


def test_threads_read_what_is_converted() -> None:
    import threading

    with fastinit.fused():
        w = torch.empty(N).normal_().mul_(2).half()
        seen: list[Tensor] = []
        thread = threading.Thread(target=lambda: seen.append(w.clone()))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], w)
