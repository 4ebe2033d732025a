# SPDX-License-Identifier: BSD-3-Clause
"""materialize_: what counts as written, and what becomes of the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit.core import geometry
from tests.support.marks import slow
from tests.support.materialize import Holder, assert_materialized, materialize_
from tests.support.models import on_meta

pytestmark = pytest.mark.usefixtures("large_from_4096")

# ---- what counts as written ----

ONES = torch.ones(10, 10)
WRITTEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "normal_": lambda p: p.normal_(),
    "zero_": lambda p: p.zero_(),
    "fill_ with a tensor": lambda p: p.fill_(torch.tensor(2.0)),
    "copy_": lambda p: p.copy_(ONES),
    "copy_ of another dtype": lambda p: p.copy_(ONES.double()),
    "copy_ of an array": lambda p: p.copy_(torch.from_numpy(np.ones((10, 10)))),
    "copy_ of what was filled": lambda p: p.copy_(torch.empty(10, 10).uniform_()),
    "setitem": lambda p: p.__setitem__(slice(None), 1.5),
    "ellipsis": lambda p: p.__setitem__(..., ONES),
    "exponential_": lambda p: p.exponential_(),
    "log_normal_": lambda p: p.log_normal_(),
    "random_": lambda p: p.random_(0, 9),
    "bernoulli_": lambda p: p.bernoulli_(0.5),
    "cauchy_": lambda p: p.cauchy_(),
    "geometric_": lambda p: p.geometric_(0.5),
    "halves": lambda p: (p[:4].normal_(), p[4:].zero_()),
    "columns": lambda p: (p[:, :3].zero_(), p[:, 3:].fill_(2)),
    "every second": lambda p: (p[::2].normal_(), p[1::2].fill_(1)),
    "a chessboard": lambda p: [p[i::2, j::2].fill_(i - j) for i in (0, 1) for j in (0, 1)],
    "row by row": lambda p: [row.uniform_() for row in p],
    "one by one": lambda p: [p[i, j].fill_(i * j) for i in range(10) for j in range(10)],
    "overlapping": lambda p: (p[:7].zero_(), p[3:].normal_()),
    "transposed": lambda p: p.t().normal_(),
    "flat": lambda p: p.view(-1).copy_(torch.arange(100.0)),
    "transposed halves": lambda p: (p.t()[:5].normal_(), p.t()[5:].zero_()),
    "chunks": lambda p: [c.fill_(i) for i, c in enumerate(p.chunk(3))],
    "a diagonal and the rest": lambda p: (p.view(-1)[::11].fill_(1), p.view(-1)[1:].zero_()),
    "out of an operator": lambda p: torch.add(ONES, 1, out=p),
    "out of two halves": lambda p: (torch.add(ONES[:5], 1, out=p[:5]), p[5:].zero_()),
    "filled, then changed": lambda p: p.normal_().mul_(0.02).clamp_(-0.01, 0.01),
    "changed between": lambda p: (p[:5].zero_(), p[:5].add_(1), p[5:].normal_()),
    "expanded": lambda p: p.copy_(torch.arange(10.0).expand(10, 10)),
    "eye_": lambda p: torch_init.eye_(p),
    "orthogonal_": lambda p: torch_init.orthogonal_(p),
    "sparse_": lambda p: torch_init.sparse_(p, 0.5),
    "trunc_normal_": lambda p: torch_init.trunc_normal_(p),
    "trunc_normal_ of a tail": lambda p: torch_init.trunc_normal_(p, 0, 1, 1.2, 3),
    "xavier_normal_": lambda p: torch_init.xavier_normal_(p),
    "its bytes as integers": lambda p: p.view(torch.int32).fill_(5),
}


@pytest.mark.parametrize("small", [False, *slow([True])], ids=["native", "small"])
@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.usefixtures("own_factors")
def test_written(how: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.setattr(geometry, "MIN_NATIVE", 0)
    assert_materialized(lambda: Holder(10, 10), lambda m: WRITTEN[how](m.w.data))


UNWRITTEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "nothing": lambda p: None,
    "read only": lambda p: torch.zeros(10, 10).copy_(p),
    "mul_": lambda p: p.mul_(0.5),
    "add_": lambda p: p.add_(ONES),
    "clamp_": lambda p: p.clamp_(-1, 1),
    "div_ and sub_": lambda p: p.div_(2).sub_(1),
    "masked_fill_": lambda p: p.masked_fill_(torch.eye(10).bool(), 0.0),
    "index_fill_ of a row": lambda p: p.index_fill_(0, torch.tensor([3]), 0.0),
    "all rows but one": lambda p: p[:9].normal_(),
    "all columns but one": lambda p: p[:, 1:].zero_(),
    "every second": lambda p: p[::2].normal_(),
    "the same half twice": lambda p: (p[:5].zero_(), p[:5].normal_()),
    "three of a chessboard": lambda p: [p[i::2, j::2].zero_() for i, j in ((0, 0), (0, 1), (1, 0))],
    "all but one": lambda p: p.view(-1)[1:].zero_(),
    "a padding row": lambda p: p[3].zero_(),
    "a diagonal": lambda p: p.fill_diagonal_(1.0),
    "a slice without elements": lambda p: p[:0].zero_(),
    "a copy": lambda p: p.clone().zero_(),
    "half filled, all changed": lambda p: (p[:5].zero_(), p.mul_(2)),
    "out of an operator, in part": lambda p: torch.add(ONES[:9], 1, out=p[:9]),
}


@pytest.mark.parametrize("how", UNWRITTEN)
@pytest.mark.parametrize("small", [False, *slow([True])], ids=["native", "small"])
def test_not_written(how: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays the meta tensor it was."""
    if not small:
        monkeypatch.setattr(geometry, "MIN_NATIVE", 0)
    model = on_meta(lambda: Holder(10, 10))
    old = model.w
    with pytest.warns(UserWarning, match=r"^1 tensors were not initialised completely .*: w\. "):
        materialize_(model, fn=lambda m: UNWRITTEN[how](m.w.data))
    assert model.w is old
    assert model.w.is_meta


@pytest.mark.parametrize(
    "write",
    [
        lambda p: torch._foreach_copy_([p], [ONES]),
        lambda p: torch._foreach_zero_([p]),
        lambda p: p.numpy().fill(3),
    ],
    ids=["_foreach_copy_", "_foreach_zero_", "numpy"],
)
def test_written_by_other_ways(write: Callable[[torch.Tensor], Any]) -> None:
    """What a function did write is not thrown away."""
    assert_materialized(lambda: Holder(10, 10), lambda m: write(m.w.data))


def test_memory_seen_as_another_dtype() -> None:
    """Half of it as floats, half of it as integers of another size."""

    def fn(m: nn.Module) -> None:
        m.w.data[:50].normal_()
        m.w.data.view(torch.int16)[100:].zero_()

    assert_materialized(lambda: Holder(100), fn)


def test_gaps_need_not_be_written() -> None:
    """Every second column of a matrix that is not there otherwise."""

    def make() -> nn.Module:
        model = Holder(1)
        model.w = nn.Parameter(torch.empty(6, 10)[:, ::2])
        return model

    model = on_meta(make)
    assert model.w.stride() == (10, 2)
    materialize_(model, fn=lambda m: torch_init.ones_(m.w))
    assert not model.w.is_meta
    assert (model.w == 1).all()


@pytest.mark.parametrize(
    "write",
    [lambda w: torch.view_as_real(w).normal_(), lambda w: (w.real.normal_(), w.imag.zero_())],
    ids=["view_as_real", "real and imag"],
)
def test_complex_parameters(write: Callable[[torch.Tensor], Any]) -> None:
    assert_materialized(lambda: Holder(7, 5, dtype=torch.complex64), lambda m: write(m.w.data))


# ---- what nobody writes ----


class Buffers(nn.Module):
    """Only the constructor knows what is in the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mask", torch.ones(5, 5).tril())
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)


def message(count: int, names: str) -> str:
    return (
        f"{count} tensors were not initialised completely and stay on the meta device: {names}. "
        "Pass a `fn` that initialises them, or set them yourself."
    )


def test_buffers_are_named() -> None:
    model = on_meta(lambda: nn.ModuleDict({"a": nn.Sequential(Buffers()), "b": Buffers()}))
    old = dict(model.named_buffers())
    with pytest.warns(UserWarning, match="^4 tensors ") as caught:
        fastinit.materialize_(model)
    names = "a.0.mask, a.0.frequencies, b.mask, b.frequencies"
    assert [str(w.message) for w in caught] == [message(4, names)]
    assert caught[0].filename == __file__
    assert all(t is old[name] for name, t in model.named_buffers())
    assert not any(p.is_meta for p in model.parameters())
    assert "b.frequencies" not in model.state_dict()


def test_only_ten_are_named() -> None:
    model = on_meta(lambda: nn.Sequential(*[Holder(3) for _ in range(13)]))
    with pytest.warns(UserWarning, match="^13 tensors ") as caught:
        materialize_(model)
    first = ", ".join(f"{i}.w" for i in range(10))
    assert str(caught[0].message) == message(13, f"{first} and 3 more")
    assert all(p.is_meta for p in model.parameters())


def test_the_rest_can_follow() -> None:
    model = on_meta(Buffers)
    with pytest.warns(UserWarning, match="mask, frequencies"):
        materialize_(model)
    weight = model.linear.weight
    before = weight.detach().clone()

    def fn(m: nn.Module) -> None:
        if isinstance(m, Buffers):
            m.mask.copy_(torch.ones(5, 5).tril())
            torch.arange(4.0, out=m.frequencies)

    materialize_(model, fn=fn)
    assert model.linear.weight is weight
    assert torch.equal(weight, before)
    assert torch.equal(model.mask, torch.ones(5, 5).tril())
    assert model.frequencies.tolist() == [0, 1, 2, 3]


def test_the_warning_as_an_error_leaves_the_model_whole() -> None:
    model = on_meta(Buffers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="mask, frequencies"):
            materialize_(model)
    assert not model.linear.weight.is_meta
    assert model.mask.is_meta


def test_weight_norm_is_not_written_by_reset_parameters() -> None:
    """It writes the product, in torch as well."""
    model = on_meta(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 7)))
    names = "parametrizations.weight.original0, parametrizations.weight.original1"
    with pytest.warns(UserWarning, match="^2 tensors ") as caught:
        materialize_(model)
    assert str(caught[0].message) == message(2, names)
    assert not model.bias.is_meta
