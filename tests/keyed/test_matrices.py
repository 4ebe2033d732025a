# SPDX-License-Identifier: BSD-3-Clause
"""seed=: parts of parameters, permuted matrices, memory formats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

from tests.support.models import ZOO
from tests.support.seeded import (
    OF_WHOLE,
    ROOT5,
    WAYS,
    equal,
    holder,
    identity,
    keyed,
    keys,
    seeded,
)

W = (48, 16)


def test_many_parts() -> None:
    """Experts of a mixture, one after the other."""
    with seeded() as report:
        model = holder(100, 4, 4)
        for i in range(100):
            torch_init.normal_(model.w[i])
    assert keys(report) == {"w": "w"}
    assert equal(model.w, keyed("normal_", (100, 4, 4)))


def test_fans_are_those_of_the_part() -> None:
    with seeded():
        model = holder(*W)
        for part in model.w.chunk(3):
            torch_init.xavier_uniform_(part)
    bound = math.sqrt(6 / 32)
    assert equal(model.w, keyed("uniform_", W, -bound, bound))


MATRICES: dict[str, Callable[[Tensor], Any]] = {
    "chunks": lambda w: w.chunk(3),
    "gates": lambda w: [w[8:24], w[24:40]],
    "transposed": lambda w: [w.T],
    "columns": lambda w: [w[:, 4:12]],
    "inner": lambda w: [w[3:7, 5:]],
    "strided": lambda w: [w[::2]],
    "rows": lambda w: [w[3:]],
}


@pytest.mark.parametrize("way", ["fused", "init_model_", "record"])
@pytest.mark.parametrize("parts", MATRICES)
@pytest.mark.parametrize("function", OF_WHOLE)
def test_matrices_that_are_parts(function: str, parts: str, way: str) -> None:
    """Gates of an LSTM, for example: each is orthogonal, and no two are equal."""
    fill, holds = OF_WHOLE[function]

    def fn(m: Any) -> None:
        torch_init.ones_(m.w)
        for t in MATRICES[parts](m.w):
            fill(t)

    if way == "fused":
        with seeded():
            model = holder(*W)
            fn(model)
    else:
        model = WAYS[way](lambda: cast(nn.Module, holder(*W)), fn)
    found = [t.detach() for t in MATRICES[parts](model.w)]
    assert all(holds(t) for t in found)
    if function != "eye_":
        assert not any(equal(a, b) for a, b in itertools.combinations(found, 2))
    rest = torch.zeros(W, dtype=torch.bool)
    for t in MATRICES[parts](rest):
        t.fill_(True)
    assert (model.w[~rest] == 1).all()


@pytest.mark.parametrize("part", [
    lambda w: w[3:7], lambda w: w[:, :2], lambda w: w[::2], lambda w: w[..., :1],
    lambda w: w.transpose(0, 1),
])  # fmt: skip
def test_dirac_of_a_part(part: Callable[[Tensor], Tensor]) -> None:
    with seeded():
        model = holder(8, 4, 3)
        torch_init.ones_(model.w)
        torch_init.dirac_(part(model.w))
    expected = torch.ones(8, 4, 3)
    torch_init.dirac_(part(expected))
    assert equal(model.w, expected)


PERMUTED = {"eye_": (), "orthogonal_": (), "sparse_": (0.5,), "normal_": (), "uniform_": ()}


@pytest.mark.parametrize("way", ["fused", "init_model_", "record"])
@pytest.mark.parametrize("function", PERMUTED)
def test_permuted_parameters(function: str, way: str) -> None:
    def make() -> Any:
        model = nn.Module()
        model.w = nn.Parameter(torch.empty(6, 20).t())
        return model

    def fn(m: Any) -> None:
        getattr(torch_init, function)(m.w, *PERMUTED[function])

    if way == "fused":
        with seeded():
            model = make()
            fn(model)
    else:
        model = WAYS[way](make, fn)
    args = PERMUTED[function]
    if function == "eye_":
        assert identity(model.w.detach())
    else:
        assert equal(model.w, keyed(function, (20, 6), *args))
    assert model.w.stride() == (1, 20)


@pytest.mark.parametrize("function", OF_WHOLE)
def test_permuted_tensors_of_nobody(function: str) -> None:
    fill, holds = OF_WHOLE[function]
    with seeded():
        t = fill(torch.empty_strided((9, 6), (1, 9)))
    assert holds(t)


@pytest.mark.parametrize("way", [w for w in WAYS if w != "record"])  # a plan has it as a step
def test_channels_last_by_reset(way: str) -> None:
    """Convolutions have the same numbers in any layout, and by any torch."""
    model: Any = WAYS[way](ZOO["channels_last"])
    assert not model.weight.is_contiguous()
    assert equal(model.weight, keyed("kaiming_uniform_", (16, 8, 3, 3), ROOT5, name="weight"))


def test_channels_last() -> None:
    with seeded():
        fresh = ZOO["channels_last"]()
        stays = torch.empty_strided((16, 8, 3, 3), (72, 1, 24, 8))
        model = nn.Module()
        model.a, model.b = fresh, nn.Buffer(stays.normal_())
    assert equal(model.b, keyed("normal_", (16, 8, 3, 3), name="b"))


def test_views_of_one_buffer() -> None:
    with seeded():
        flat, model = torch.empty(100), nn.Module()
        model.a, model.b = nn.Parameter(flat[:50].view(5, 10)), nn.Parameter(flat[50:])
        torch_init.normal_(model.b)
        torch_init.normal_(model.a)
    assert equal(model.a, keyed("normal_", (5, 10), name="a"))
    assert equal(model.b, keyed("normal_", (50,), name="b"))
    told = pytest.warns(UserWarning, match=r"a has the numbers of #block\.0")
    with told, seeded() as report:
        flat, model = torch.empty(100), nn.Module()
        model.a, model.b = nn.Parameter(flat[:50]), nn.Parameter(flat[50:])
        flat.normal_()  # of both: neither name will do
    assert {*keys(report).values()} == {"#block.0"}
    assert not equal(model.a, model.b)
