# SPDX-License-Identifier: BSD-3-Clause
"""Complex tensors with a key or a seed: element i is the real numbers 2 i and 2 i + 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

import fastinit
from tests.support import keyed_model as model
from tests.support.keyed_fills import PHILOX, key, upto

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")
TYPES = [torch.complex64, torch.complex128, torch.complex32]
each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
ROOT = math.sqrt(2.0)


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.detach().resolve_conj())


def normals(n: int, dtype: torch.dtype, mean: float, std: float) -> Tensor:
    exact = model.normal(PHILOX, upto(2 * n), dtype.to_real())
    return torch.from_numpy((mean + std / ROOT * exact).astype(np.float64))


@each_type
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.3, 0.7)])
def test_uniform(dtype: torch.dtype, bounds: tuple[float, float]) -> None:
    found = fastinit.uniform_(torch.empty(7, 11, dtype=dtype), *bounds, generator=key())
    expected = model.uniform(PHILOX, upto(154), dtype.to_real(), *bounds)
    assert torch.equal(real(found).flatten(), expected)


@each_type
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.02)])
def test_normal(dtype: torch.dtype, mean: float, std: float) -> None:
    """The variance is that of both parts together, and both have the mean, as in torch."""
    found = real(fastinit.normal_(torch.empty(7, 11, dtype=dtype), mean, std, generator=key()))
    error = (found.flatten().double() - normals(77, dtype, mean, std)).abs().max().item()
    assert error < {torch.complex128: 1e-14, torch.complex64: 2e-6, torch.complex32: 3e-3}[dtype]
    many = fastinit.normal_(torch.empty(20000, dtype=dtype), mean, std, generator=key())
    drawn = torch.empty(20000, dtype=dtype).normal_(mean, std)
    assert real(many).double().std().item() == pytest.approx(
        real(drawn).double().std().item(), rel=0.02
    )


SHAPE = (6, 4, 3)


@each_type
@pytest.mark.parametrize("name", ["xavier_uniform_", "xavier_normal_", "kaiming_uniform_",
                                  "kaiming_normal_"])  # fmt: skip
def test_fans_are_those_of_the_complex_tensor(name: str, dtype: torch.dtype) -> None:
    fan_in, fan_out = 12, 18
    variance = 2 / (fan_in + fan_out) if "xavier" in name else 2 / fan_in
    bound = math.sqrt(3 * variance)
    found = getattr(fastinit, name)(torch.empty(SHAPE, dtype=dtype), generator=key())
    if "uniform" in name:
        expected = model.uniform(PHILOX, upto(144), dtype.to_real(), -bound, bound)
        assert torch.allclose(real(found).flatten(), expected, atol=1e-3)
        torch.manual_seed(0)
        drawn = getattr(torch_init, name)(torch.empty(4000, 4, 3, dtype=dtype))
        largest = 2 * bound if "xavier" in name else bound
        assert real(drawn).abs().max() <= largest
    else:
        expected = normals(72, dtype, 0.0, math.sqrt(variance))
        assert torch.allclose(real(found).flatten().double(), expected, atol=1e-3)


def test_what_draws_nothing() -> None:
    for name, args, shape in (
        ("eye_", (), (5, 7)),
        ("dirac_", (), SHAPE),
        ("dirac_", (2,), (6, 2, 3, 3)),
        ("constant_", (1.5 - 2j,), (3, 4)),
        ("ones_", (), (3,)),
    ):
        expected = getattr(torch_init, name)(torch.full(shape, 9j), *args)
        with fastinit.fused(seed=1):
            found = nn.Parameter(torch.full(shape, 9j))
            getattr(nn.init, name)(found, *args)
        assert torch.equal(found.detach(), expected), name


@each_type
@pytest.mark.parametrize("name", ["orthogonal_", "trunc_normal_"])
def test_what_torch_refuses(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(NotImplementedError) as torchs:
        getattr(torch_init, name)(torch.empty(2, 2, dtype=dtype))
    state = torch.get_rng_state()

    def in_scope() -> None:
        with fastinit.fused(seed=1):
            getattr(nn.init, name)(torch.empty(6, 5, dtype=dtype))

    def with_key() -> None:
        getattr(fastinit, name)(torch.empty(6, 5, dtype=dtype), generator=key())

    for way in (in_scope, with_key):
        with pytest.raises(NotImplementedError) as ours:
            way()
        assert str(ours.value) == str(torchs.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_sparse_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no numbers of type"):
        fastinit.sparse_(torch.empty(4, 4, dtype=torch.complex64), 0.5, generator=key())


@each_type
def test_views(dtype: torch.dtype) -> None:
    whole = fastinit.normal_(torch.empty(6, 8, dtype=dtype), generator=key())
    turned = fastinit.normal_(torch.empty(8, 6, dtype=dtype).t(), generator=key())
    assert torch.equal(real(turned), real(whole))
    strided = torch.zeros(6, 16, dtype=dtype)
    fastinit.normal_(strided[:, ::2], generator=key())
    assert torch.equal(real(strided)[:, ::2], real(whole))
    assert not real(strided)[:, 1::2].any()
    parts = torch.zeros(6, 8, 2, dtype=dtype.to_real())
    fastinit.normal_(parts, 0.0, 1 / ROOT, generator=key())
    assert torch.equal(parts, real(whole))
    for a, b in ((0, 0), (1, 3), (4, 5)):
        part = torch.empty(2, 3, dtype=dtype)
        fastinit.normal_(part, generator=key().part((6, 8), (a, b)))
        assert torch.equal(real(part), real(whole)[a : a + 2, b : b + 3])


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        self.first = nn.Linear(9, 130, dtype=dtype)
        self.conv = nn.Conv1d(3, 4, 5, dtype=dtype)
        self.own = nn.Parameter(torch.empty(7, 3, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.own, std=0.1)


class Real(nn.Module):
    """The same names and numbers, as somebody would write them who knows the definition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Module(), nn.Module()
        for m, fan, *shapes in (
            (self.first, 9, (130, 9), (130,)),
            (self.conv, 15, (4, 3, 5), (4,)),
        ):
            for name, shape in zip(("weight", "bias"), shapes):
                t = torch.empty(*shape, 2).uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan))
                m.register_parameter(name, nn.Parameter(t))
        self.own = nn.Parameter(torch.empty(7, 3, 2).normal_(0, 0.1 / ROOT))


def values(m: nn.Module) -> dict[str, Tensor]:
    return {n: real(p) if p.is_complex() else p.detach() for n, p in m.named_parameters()}


def assert_same(m: nn.Module, expected: dict[str, Tensor]) -> None:
    found = values(m)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    with fastinit.fused(seed=5):
        made = Real()
    return values(made)


def _slices() -> nn.Module:
    m = Net()
    with torch.no_grad():
        m.own[:3].normal_(std=0.1)
        torch.view_as_real(m.own)[3:, :, 1].normal_(0, 0.1 / ROOT)
        m.own[3:].real.normal_(0, 0.1 / ROOT)
    return m


def _drawn() -> nn.Module:
    m = Net()
    m.own = nn.Parameter(torch.randn(7, 3, dtype=torch.complex64))
    with torch.no_grad():
        m.own.normal_(std=0.1)
    return m


def _cloned() -> nn.Module:
    m = Net()
    m.own = nn.Parameter(m.own.detach().clone())
    m.first.weight = nn.Parameter(torch.empty_like(m.first.weight).copy_(m.first.weight.detach()))
    return m


@pytest.mark.parametrize("build", [Net, _slices, _drawn, _cloned])
def test_scopes(build: Callable[[], nn.Module], expected: dict[str, Tensor]) -> None:
    with fastinit.fused(seed=5) as report:
        made = build()
    assert_same(made, expected)
    if build is not _slices:  # of which float32 was filled, too
        assert {row.dtype for row in report.rows()} == {torch.complex64}
    assert not report.foreign


def test_models(expected: dict[str, Tensor]) -> None:
    made: nn.Module = Net()
    fastinit.init_model_(made, seed=5)
    assert_same(made, expected)
    made = Net()
    fastinit.record(made).run(seed=5)
    assert_same(made, expected)
    with torch.device("meta"):
        made = Net()
    fastinit.materialize_(made, seed=5)
    assert_same(made, expected)


def test_randn() -> None:
    with fastinit.fused(seed=5) as report:
        m = nn.Module()
        m.w = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
        m.v = nn.Parameter(torch.rand_like(m.w.detach()))
    with fastinit.fused(seed=5):
        r = nn.Module()
        r.w = nn.Parameter(torch.empty(5, 3, 2).normal_(0, 1 / ROOT))
        r.v = nn.Parameter(torch.rand(5, 3, 2))
    assert_same(m, values(r))
    assert not report.foreign


def test_wider() -> None:
    with fastinit.fused(seed=5):
        m = nn.Module()
        m.w = nn.Parameter(torch.randn(300, dtype=torch.complex64).to(torch.complex128))
    with fastinit.fused(seed=5):
        r = nn.Module()
        r.w = nn.Parameter(torch.randn(300, dtype=torch.complex64))
    assert torch.equal(m.w, r.w.to(torch.complex128))


def test_materialize_of_parts() -> None:
    """What of complex128 is written is noted in pieces, too."""
    with torch.device("meta"):
        m: Any = nn.Linear(4, 6, dtype=torch.complex128)

    def halves(m: Any) -> None:
        for p in (m.weight, m.bias):
            for half in p.detach().chunk(2):
                half.normal_()

    fastinit.materialize_(m, fn=halves, seed=5).check()
    with fastinit.fused(seed=5):
        r: Any = nn.Linear(4, 6, dtype=torch.complex128)
        nn.init.normal_(r.weight)
        nn.init.normal_(r.bias)
    assert_same(m, values(r))
