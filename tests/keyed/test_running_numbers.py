# SPDX-License-Identifier: BSD-3-Clause
"""seed=: what is read before the end keeps its values; what has no name has a running number."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

import fastinit
from fastinit import Key, init_model_
from tests.support.seeded import (
    SEED,
    Net,
    equal,
    keyed,
    keys,
    seeded,
    state,
    torch_any,
)


def saved(w: Tensor) -> Tensor:
    torch.save(w, file := io.BytesIO())
    file.seek(0)
    return cast(Tensor, torch.load(file))


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda w: w.flatten()[0].item(),
    "tolist": lambda w: w.tolist(),
    "numpy": lambda w: w.numpy().tolist(),
    "asarray": lambda w: np.asarray(w).tolist(),
    "repr": lambda w: repr(w),
    "format": lambda w: f"{w.flatten()[0]:.9f}",
    "pickle": lambda w: pickle.loads(pickle.dumps(w)).tolist(),
    "save": lambda w: saved(w).tolist(),
    "iterate": lambda w: [float(x) for x in w.flatten()],
    "sum": lambda w: (w * 1).tolist(),
    "clone": lambda w: w.clone().tolist(),
    "deepcopy": lambda w: copy.deepcopy(w).tolist(),
    "dlpack": lambda w: torch_any.from_dlpack(w).tolist(),
    "storage": lambda w: cast(Any, w.untyped_storage()).tolist(),
    "address": lambda w: ctypes.string_at(w.data_ptr(), 4),
    "fill": lambda w: torch.empty(3).fill_(w.flatten()[0]).tolist(),
    "index": lambda w: w.flatten()[torch.tensor([0])].tolist(),
    "bits": lambda w: w.view(torch.int32).tolist(),
    "list of parts": lambda w: torch.tensor([w.flatten()[0]]).tolist(),
    "foreach": lambda w: torch._foreach_mul([w], 1.0)[0].tolist(),
    "copy_": lambda w: torch.empty_like(w).copy_(w).tolist(),
    "setitem": lambda w: torch.zeros(2).index_put_((torch.tensor(0),), w.flatten()[0]).tolist(),
}


SHAPES: list[tuple[int, ...]] = [(), (1,), (1, 1), (3,), (4, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", READS)
def test_what_is_read_stays(name: str, shape: tuple[int, ...]) -> None:
    makes: list[Callable[[], Tensor]] = [
        lambda: torch.randn(shape),
        lambda: torch_init.normal_(torch.empty(shape)),
    ]
    for make in makes:
        with seeded():
            model = nn.Module()
            model.w = nn.Buffer(make())
            inside = READS[name](model.w)
        assert READS[name](model.w) == inside


LISTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda w: torch.tensor([w, w]),
    "as_tensor": lambda w: torch.as_tensor([w, w]),
    "FloatTensor": lambda w: torch.FloatTensor([w, w]),
    "new_tensor": lambda w: torch.ones(1).new_tensor([w, w]),
    "array": lambda w: torch.from_numpy(np.array([w, w], dtype=np.float32)),
}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("name", LISTS)
def test_lists_of_single_elements(name: str, shape: tuple[int, ...]) -> None:
    """torch.tensor([self.alpha, self.beta]): memory that nobody has written."""
    with warnings.catch_warnings(), seeded():
        warnings.simplefilter("ignore")
        kept = torch.full((8,), 77.0)
        del kept
        w = torch.randn(shape)
        inside = LISTS[name](w)
    assert inside.flatten().tolist() == [w.item()] * 2


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(torch.tensor(0.5)),
    "div_": lambda w: w.div_(w.norm()),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "out": lambda w: torch.mul(w, 2, out=w),
    "clamp_": lambda w: w.clamp_(torch.tensor(0.0)),
    "tril_": lambda w: w.tril_(),
    "copy of rows": lambda w: w[2:].copy_(w[:2]),
    "flip": lambda w: w.copy_(w.flip(0)),
    "numpy": lambda w: np.multiply(w.numpy(), 2, out=w.numpy()),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([1]), 9.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str) -> None:
    """What is changed by other operators has the numbers of its name before."""
    with seeded() as report:
        model = nn.Module()
        model.w = nn.Buffer(torch.empty(4, 5).normal_())
        CHANGES[name](model.w)
    assert (keys(report), report.unnamed) == ({"w": "w"}, {})
    expected = keyed("normal_", (4, 5))
    CHANGES[name](expected)
    assert equal(model.w, expected)
    named = nn.Module()
    named.w = nn.Buffer(torch.empty(4, 5))
    init_model_(named, lambda m: CHANGES[name](cast(Any, m).w.normal_()), SEED)
    expected = keyed("normal_", (4, 5))
    CHANGES[name](expected)
    assert equal(named.w, expected)


OVERWRITES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": lambda w: w.__setitem__(0, 3.0),
    "zero_": lambda w: w[1:].zero_(),
    "copy_": lambda w: w[:2].copy_(torch.ones(2, 5)),
    "transposed": lambda w: w.T[1:3].fill_(4),
}


@pytest.mark.parametrize("name", OVERWRITES)
def test_parts_that_are_overwritten_are_no_reads(name: str) -> None:
    with seeded() as report:
        model = nn.Module()
        model.w = nn.Buffer(torch.empty(4, 5).normal_())
        OVERWRITES[name](model.w)
    expected = keyed("normal_", (4, 5))
    OVERWRITES[name](expected)
    assert equal(model.w, expected)
    assert keys(report) == {"w": "w"}


# ---- tensors of nobody ----


def test_loose_tensors() -> None:
    def make() -> list[Tensor]:
        kept = []
        for i in range(40):
            torch.empty(6).normal_()  # dies
            x = torch.randn(6)
            if i % 3 == 0:
                x.sum()
            kept.append(x)
        return kept

    with seeded() as report:
        one = make()
    with seeded():
        two = make()
    assert all(map(equal, one, two))
    assert len({tuple(t.tolist()) for t in one}) == 40
    assert sorted(int(row.key.split(".")[-1]) for row in report.rows()) == list(range(40))


def test_temporaries_change_nothing() -> None:
    seen = []
    for n in (0, 7, 2500):
        with seeded():
            model = nn.Module()
            for _ in range(n):
                torch.empty(5).normal_()
            model.w = nn.Parameter(torch.randn(5))
            for _ in range(n):
                torch.empty(5).uniform_()
            early = torch.randn(5) * 1
        seen.append((state(model)["w"], early))
    assert all(equal(x, y) for pair in seen for x, y in zip(seen[0], pair))


def test_a_buffer_that_is_filled_again() -> None:
    """As scratch memory is: each time other numbers, as without a seed."""
    with seeded():
        scratch = torch.empty(100)
        one = scratch.normal_() * 1
        two = scratch.normal_() * 1
    assert not equal(one, two)


def test_prefix_of_running_numbers() -> None:
    seen = []
    for prefix in ("a.", "b."):
        with seeded(prefix=prefix):
            seen.append(torch.randn(9) * 1)
    assert not equal(*seen)


def test_a_key_without_a_name_in_a_scope_of_its_seed() -> None:
    with seeded():
        one = torch.randn(9) * 1
        two = fastinit.normal_(torch.empty(9), generator=Key(SEED)) * 1
    assert not equal(one, two)


def test_a_thread_in_the_scope() -> None:
    """What was asked for before it starts is written then."""
    with seeded() as report:
        model = Net("a")
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        model.b = nn.Linear(8, 8)
    found = keys(report)
    assert found["a.weight"] == "a.weight"
    assert found["b.weight"] == "b.weight"
    assert report.unnamed == {}
