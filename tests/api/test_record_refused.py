# SPDX-License-Identifier: BSD-3-Clause
"""record: what it refuses, where it may stand, and tensors that move afterwards."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.init as torch_init
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastinit
from fastinit import record
from tests.support.compare import assert_equal_seen
from tests.support.record import CASES, Two, assert_same_runs, nothing_is_left, state_of

# ---- what cannot be recorded ----

READS: dict[str, tuple[Callable[[Two], Any], str]] = {
    "sum": (lambda m: m.w.sum(), "aten.sum"),
    "item": (lambda m: m.b[0].item(), "_local_scalar_dense"),
    "float": (lambda m: float(m.b[0]), "_local_scalar_dense"),
    "format": (lambda m: f"{m.b[0]:.2f}", "_local_scalar_dense"),
    "norm": (lambda m: m.w.norm(), "linalg_vector_norm"),
    "qr": (lambda m: torch.linalg.qr(m.w), "linalg_qr"),
    "svd": (lambda m: torch.linalg.svd(m.w), "linalg_svd"),
    "comparison": (lambda m: bool((m.w > 0).any()), "aten.gt"),
    "equal": (lambda m: torch.equal(m.w, m.w), "aten.equal"),
    "out of place": (lambda m: m.w * 2, "aten.mul"),
    "clone": (lambda m: m.w.clone(), "aten.clone"),
    "deepcopy": (lambda m: copy.deepcopy(m.w), "aten.clone"),
    "matmul": (lambda m: m.w.data.t() @ m.w.data, "aten.mm"),
    "advanced indexing": (lambda m: m.w[[1, 2]], "aten.index"),
    "buffer": (lambda m: m.mask.sum(), "aten.sum"),
    "window": (lambda m: m.w.data.t()[3].max(), "aten.max"),
    "dtype": (lambda m: m.w.double(), "aten._to_copy"),
    "nonzero": (lambda m: m.w.nonzero(), "aten.nonzero"),
    "isnan": (lambda m: m.w.isnan().any(), "aten.isnan"),
    "out": (lambda m: torch.add(m.mask, 1, out=m.mask), "aten.add"),
    "state_dict": (lambda m: {k: v.clone() for k, v in m.state_dict().items()}, "aten.clone"),
    "a temporary that is filled": (lambda m: torch.empty(9).normal_().sum(), "aten.sum"),
    "numpy": (lambda m: m.w.detach().numpy(), "reads"),
    "asarray": (lambda m: np.asarray(m.w.detach()), "reads"),
    "tolist": (lambda m: m.b.tolist(), "reads"),
    "repr": (lambda m: repr(m.b), "reads"),
    "str": (lambda m: str(m.b), "reads"),
    "data_ptr": (lambda m: m.w.data_ptr(), "reads"),
    "storage": (lambda m: m.w.untyped_storage(), "reads"),
    "dlpack": (lambda m: torch.utils.dlpack.to_dlpack(m.w.data), "reads"),
    "pickle": (lambda m: pickle.dumps(m.w), "reads"),
    "save": (lambda m: torch.save(m.state_dict(), io.BytesIO()), "reads"),
    "map_": (lambda m: m.mask.map_(m.mask, lambda a, b: a), "reads"),
}
RANDOM: dict[str, tuple[Callable[[Two], Any], str]] = {
    "rand": (lambda m: torch.rand(3), "aten.rand"),
    "randn": (lambda m: m.w.data.copy_(torch.randn(80, 70)), "aten.randn"),
    "randperm": (lambda m: torch.randperm(5), "aten.randperm"),
    "randint": (lambda m: torch.randint(0, 5, (3,)), "aten.randint"),
    "rand_like": (lambda m: torch.rand_like(torch.ones(3)), "aten.rand_like"),
    "bernoulli": (lambda m: torch.bernoulli(torch.full((3,), 0.5)), "aten.bernoulli"),
    "multinomial": (lambda m: torch.multinomial(torch.ones(4), 2), "aten.multinomial"),
    "normal": (lambda m: torch.normal(0.0, 1.0, (3,)), "aten.normal|aten.randn"),
    "dropout": (lambda m: F.dropout(torch.ones(4)), "record: aten"),
    "poisson": (lambda m: torch.poisson(torch.ones(4)), "aten.poisson"),
}


def assert_refused(fn: Callable[[Two], Any], match: str) -> None:
    """RuntimeError that says what it was; the model, its generators, and torch are as before."""
    model, g = Two(), torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    before = state_of(model, g, False)

    def after_a_fill(m: Two) -> None:
        torch_init.normal_(m.w, generator=g)
        m.b.data.mul_(2)
        fn(m)

    with pytest.raises(RuntimeError, match=match) as caught:
        record(model, after_a_fill)
    assert str(caught.value).startswith("record: ")
    nothing_is_left()
    assert_equal_seen(before, state_of(model, g, False), "the model")
    with torch.no_grad():  # nothing is watched any more
        assert model.w.sum().item() == pytest.approx(0, abs=1e-2)
        assert not torch.equal(model.w.clone().normal_(), model.w)
    assert_same_runs(Two, CASES["padding"])


@pytest.mark.parametrize("name", READS)
def test_reads_are_refused(name: str) -> None:
    assert_refused(*READS[name])


@pytest.mark.parametrize("name", RANDOM)
def test_draws_that_are_no_fills_are_refused(name: str) -> None:
    assert_refused(*RANDOM[name])


def test_other_exceptions_pass() -> None:
    model = Two()
    before = state_of(model, torch.Generator(), True)

    def fn(m: Two) -> None:
        torch_init.normal_(m.w)
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        record(model, fn)
    nothing_is_left()
    assert_equal_seen(before, state_of(model, torch.Generator(), True), "the model")


@pytest.mark.parametrize(
    ("fn", "error"),
    [
        (lambda m: m.w.normal_(), RuntimeError),  # a leaf that requires grad
        (lambda m: torch_init.xavier_normal_(m.b), ValueError),
        (lambda m: m.w.data[90].zero_(), IndexError),
        (lambda m: m.nowhere, AttributeError),
    ],
    ids=["leaf", "fans", "index", "attribute"],
)
def test_mistakes_are_reported_as_torch_does(
    fn: Callable[[Two], Any], error: type[Exception]
) -> None:
    """When recording or when running."""
    with pytest.raises(error) as eager:
        fn(Two())
    with pytest.raises(error) as recorded:
        record(Two(), fn).run()
    assert str(recorded.value) == str(eager.value)
    nothing_is_left()


# ---- where ----


def test_not_in_a_fused_block() -> None:
    model = nn.Linear(80, 70)
    with fastinit.fused(), pytest.raises(RuntimeError, match="record cannot be used inside"):
        record(model)
    nothing_is_left()


@pytest.mark.parametrize("use", [record, fastinit.init_model_, fastinit.materialize_])
def test_not_in_another_record(use: Callable[..., Any]) -> None:
    inner = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"inside another Plan|cannot be part of a Plan"):
        record(nn.Linear(4, 4), lambda m: use(inner))
    nothing_is_left()


def test_not_under_a_mode() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="mode"):
        record(nn.Linear(3, 3))
    nothing_is_left()


def test_a_plan_within_the_function_is_the_users() -> None:
    """Its fills become part of what is recorded."""

    def fn(m: Two, g: torch.Generator) -> None:
        own = fastinit.Plan()
        own.normal_(m.w, generator=g)
        own.uniform_(m.b)
        assert len(own) == 2

    model = Two()
    before = state_of(model, torch.Generator(), True)
    assert len(record(model, lambda m: fn(m, torch.Generator()))) == 0
    assert_equal_seen(before, state_of(model, torch.Generator(), True), "the model")


def test_run_in_a_fused_block() -> None:
    """In its place among the fills that wait."""
    one, two = Two(), Two()
    for model, fast in ((one, False), (two, True)):
        made = record(model, lambda m: CASES["in place after"](m, torch.default_generator))
        torch.manual_seed(4)
        with fastinit.fused() if fast else torch.no_grad():
            first = torch.empty(5000).normal_()
            made.run()
            torch_init.uniform_(model.k)
            last = torch.empty(5000).normal_()
        model.first, model.last, model.after = first, last, torch.get_rng_state()
    for name in ("w", "b", "k", "mask", "first", "last", "after"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


# ---- tensors that move, memory ----


@pytest.mark.parametrize(
    "move",
    [
        lambda m: setattr(m.w, "data", torch.zeros(80, 70)),
        lambda m: m.double(),
        lambda m: setattr(m.w, "data", m.w.data[:40]),
        lambda m: m.w.data.untyped_storage().resize_(0),
    ],
    ids=["data", "double", "smaller", "freed"],
)
@pytest.mark.parametrize("how", ["uniform_", "normal_ imported before", "no_grad"])
def test_moved_tensors(how: str, move: Callable[[Two], Any]) -> None:
    model = Two()
    made = record(model, lambda m: CASES[how](m, torch.default_generator))
    made.run()
    move(model)
    before = model.b.detach().clone()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="record the plan anew"):
        made.run()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before, model.b)


@pytest.mark.parametrize("how", ["detached", "slices", "in place alone"])
def test_moved_tensors_that_were_recorded_by_views(how: str) -> None:
    """`p.data.normal_()` was asked of the parameter's memory, which the model no longer has."""
    model = Two()
    made = record(model, lambda m: CASES[how](m, torch.default_generator))
    model.w.data = torch.zeros(80, 70)
    with pytest.raises(RuntimeError, match="record the plan anew"):
        made.run()


def test_what_is_deleted_is_still_there() -> None:
    """A plan holds the tensors it writes, temporaries included, but not the model."""
    model = Two()
    made = record(model, lambda m: CASES["temporary"](m, torch.default_generator))
    w, gone = model.w, weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    made.run()
    assert 0.4 < w.mean() < 0.6
    last = weakref.ref(w)
    del made, w
    gc.collect()
    assert last() is None


def test_a_plan_can_be_continued() -> None:
    """What record gives is a Plan like any other."""
    model = Two()
    made = record(model, lambda m: torch_init.normal_(m.w))
    length = len(made)
    made.uniform_(model.b)
    made.zeros_(model.w.data[3])
    assert (type(made), len(made)) == (fastinit.Plan, length + 2)
    torch.manual_seed(2)
    made.run()
    torch.manual_seed(2)
    expected = Two()
    torch_init.normal_(expected.w)
    torch_init.uniform_(expected.b)
    expected.w.data[3].zero_()
    assert torch.equal(expected.w, model.w)
    assert torch.equal(expected.b, model.b)


def test_gradients_and_hooks_stay() -> None:
    model = Two()
    model.w.sum().backward()
    gradient = model.w.grad
    made = record(model, lambda m: CASES["no_grad"](m, torch.default_generator))
    made.run()
    assert model.w.grad is gradient
    assert model.w.is_leaf
    assert model.w.requires_grad
    assert (gradient == 1).all()
