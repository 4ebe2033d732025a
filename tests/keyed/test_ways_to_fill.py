# SPDX-License-Identifier: BSD-3-Clause
"""seed=: every way to fill, copy and overwrite a parameter."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn
from torch.nn.init import eye_ as eye_bound_early
from torch.nn.init import kaiming_uniform_ as kaiming_bound_early
from torch.nn.init import trunc_normal_ as trunc_bound_early

import fastinit
from fastinit import Key, Plan, fused, init_model_
from tests.support.compare import BF16, F16, F32, F64
from tests.support.seeded import (
    ROOT5,
    SEED,
    WAYS,
    api,
    by_fused,
    differ,
    equal,
    holder,
    identity,
    keyed,
    keys,
    of_torch,
    seeded,
    state,
)

FILLS: dict[str, tuple[str, tuple[Any, ...], Callable[[Tensor], Any]]] = {
    "normal_": ("normal_", (1.0, 2.0), lambda t: torch_init.normal_(t, 1.0, 2.0)),
    "uniform_": ("uniform_", (-1.0, 2.0), lambda t: torch_init.uniform_(t, -1, 2)),
    "trunc_normal_": ("trunc_normal_", (0.0, 1.0, -2.0, 2.0),
                      lambda t: torch_init.trunc_normal_(t)),
    "far bounds": ("trunc_normal_", (0.0, 0.02, -2.0, 2.0),
                   lambda t: torch_init.trunc_normal_(t, std=0.02)),
    "tail": ("trunc_normal_", (0.0, 1.0, 1.5, 4.0),
             lambda t: torch_init.trunc_normal_(t, a=1.5, b=4.0)),
    "early": ("trunc_normal_", (0.0, 1.0, -1.0, 2.0), lambda t: trunc_bound_early(t, a=-1, b=2)),
    "private": ("trunc_normal_", (0.0, 1.0, -1.0, 2.0),
                lambda t: of_torch._no_grad_trunc_normal_(t, 0.0, 1.0, -1.0, 2.0)),
    "ours": ("trunc_normal_", (0.0, 1.0, -1.0, 2.0), lambda t: fastinit.trunc_normal_(t, a=-1)),
    "kaiming": ("kaiming_uniform_", (0.1,), lambda t: kaiming_bound_early(t, 0.1)),
    "old name": ("xavier_normal_", (), lambda t: of_torch.xavier_normal_.__call__(t)),
    "orthogonal_": ("orthogonal_", (2.0,), lambda t: torch_init.orthogonal_(t, 2.0)),
    "sparse_": ("sparse_", (0.3,), lambda t: torch_init.sparse_(t, 0.3)),
    "method normal_": ("normal_", (0.0, 0.5), lambda t: t.data.normal_(std=0.5)),
    "method uniform_": ("uniform_", (0.0, 3.0), lambda t: t.data.uniform_(to=3.0)),
    "detached": ("normal_", (), lambda t: t.detach().normal_()),
    "data": ("normal_", (), lambda t: torch_init.normal_(t.data)),
    "private normal": ("normal_", (0.0, 1.0), lambda t: of_torch._no_grad_normal_(t, 0.0, 1.0)),
    "data is": ("normal_", (), lambda t: setattr(t, "data", torch.randn(t.shape))),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 2), (10, 9), (100, 90)], ids=str)
@pytest.mark.parametrize("name", FILLS)
def test_by_whatever_name(name: str, shape: tuple[int, int]) -> None:
    """Functions, methods, names that modules have imported before: one law."""
    function, args, fill = FILLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with seeded() as report:
            model = holder(*shape)
            fill(model.w)
    assert keys(report) == {"w": "w"}
    assert equal(model.w, keyed(function, shape, *args))
    assert report.unwritten == []


def test_values_that_are_copied() -> None:
    """w.data.copy_(torch.randn(...)), which nobody has read."""
    with seeded() as report:
        model = holder(3, 4)
        model.w.data.copy_(torch.randn_like(model.w))
        model.v = nn.Parameter(torch.empty(3, 4))
        model.v.data[...] = torch.rand(3, 4)
    assert keys(report) == {"w": "w", "v": "v"}
    assert equal(model.w, keyed("normal_", (3, 4)))


def test_constants_and_diagonals() -> None:
    with seeded():
        model = nn.ParameterList([torch.empty(9, 5) for _ in range(5)])
        eye_bound_early(model[0])
        torch_init.eye_(model[1])
        torch_init.constant_(model[2], 0.3)
        torch_init.zeros_(model[3])
        model[4].data.fill_(math.pi)
        kernel = torch_init.dirac_(torch.empty(6, 4, 3, 3), groups=2)
    assert identity(model[0].detach())
    assert identity(model[1].detach())
    assert (model[2] == torch.tensor(0.3)).all()
    assert not model[3].any()
    assert (model[4] == torch.tensor(math.pi)).all()
    assert equal(kernel, torch_init.dirac_(torch.empty(6, 4, 3, 3), 2))


CONSTANTS: list[tuple[torch.dtype, Any]] = [
    *((torch.int64, x) for x in (3, 2**24 + 1, 2**60 + 1)), (torch.int8, 300), (torch.int8, -3),
    (torch.bool, 1), (F16, 1e6), (F32, 1e300), (F32, math.nan), (torch.complex64, 1 + 2j),
    (F64, 0.1), (F32, torch.tensor(2.5)), (torch.uint8, 2.5), (F32, True), (F32, "x"),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), CONSTANTS, ids=str)
def test_constants_are_torchs(dtype: torch.dtype, value: Any) -> None:
    seen = []
    for seed in (None, SEED):
        with fused(seed=seed):
            t = torch.zeros(3, dtype=dtype)
            try:
                torch_init.constant_(t, value)
                seen.append(repr(t))
            except (RuntimeError, TypeError) as error:
                seen.append(type(error).__name__)
    assert seen[0] == seen[1]


def test_integers_and_bools() -> None:
    with seeded() as report:
        model: Any = nn.Module()
        model.register_buffer("a", torch.zeros(3, dtype=torch.int64))
        model.register_buffer("b", torch.ones(3, dtype=torch.bool))
        model.register_buffer("c", torch.empty(3, dtype=torch.int32).fill_(7))
        model.register_buffer("d", torch.arange(3))
        model.register_buffer("e", torch.full((3,), 2))
        model.register_buffer("f", torch_init.ones_(torch.empty(3, dtype=torch.int64)))
        with pytest.raises(NotImplementedError, match=r"no numbers of type torch\.int64"):
            torch_init.normal_(model.a)
    assert [t.tolist() for t in model.buffers()] == [
        *([0] * 3, [True] * 3, [7] * 3, [0, 1, 2], [2] * 3, [1] * 3),
    ]
    assert report.unwritten == []
    assert not any(keys(report).values())


def test_sizes() -> None:
    """None, one, and no dimension at all."""
    with seeded() as report:
        model = nn.Module()
        model.b = nn.Parameter(torch.empty(()))
        torch_init.normal_(model.b)
        model.c = nn.Parameter(torch.empty(1))
        model.c.data.normal_()  # as nn.Linear(64, 1).bias
        model.d = nn.Parameter(torch.empty(0, 3))
        torch_init.normal_(model.d)
        model.e = nn.Linear(4, 1)
    assert keys(report) == {k: k for k in ("b", "c", "e.weight", "e.bias")}
    for name in "bc":
        t = model.get_parameter(name)
        assert equal(t, keyed("normal_", t.shape, name=name))


BORN: dict[str, Callable[[], Tensor]] = {
    "eye": lambda: torch.eye(4),
    "to": lambda: torch.empty(4, 4, dtype=F64).to(F32),
    "stack": lambda: torch.stack([torch.ones(4)] * 4),
    "clone": lambda: torch.arange(16.0).view(4, 4).clone(),
    "product": lambda: torch.ones(4, 4) * 2,
    "channels_last": lambda: torch.empty(4, 1, 2, 2).to(memory_format=torch.channels_last)[:, 0],
    "empty_permuted": lambda: torch.empty_permuted((4, 4), (1, 0)),
    "linspace": lambda: torch.linspace(0, 1, 16).view(4, 4),
    "full of int": lambda: torch.full((4, 4), 1).float(),
}


@pytest.mark.parametrize("name", BORN)
def test_whatever_made_the_memory(name: str) -> None:
    """Filled, never read, and of a parameter: it has the parameter's numbers."""
    with seeded() as report:
        model = nn.Module()
        model.w = nn.Parameter(BORN[name]())
        torch_init.normal_(model.w)
    assert keys(report) == {"w": "w"}
    assert equal(model.w, keyed("normal_", model.w.shape))


def test_reset_after_a_change_of_dtype() -> None:
    with seeded():
        model = nn.Linear(4, 4).to(BF16)
        model.reset_parameters()
    assert equal(model.weight, keyed("kaiming_uniform_", (4, 4), ROOT5, name="weight", dtype=BF16))


def test_padding() -> None:
    expected = keyed("normal_", (40, 30), name="weight")
    expected[3] = 0
    for model in (
        by_fused(lambda: nn.Embedding(40, 30, padding_idx=3)),
        *(way(lambda: nn.Embedding(40, 30, padding_idx=3)) for way in WAYS.values()),
    ):
        assert equal(cast(Tensor, model.weight), expected)


def test_overwritten() -> None:
    """What counts is what was asked for last."""
    with seeded() as report:
        model = holder(200, 100)
        torch_init.uniform_(model.w)
        torch_init.zeros_(model.w)
        torch_init.normal_(model.w)
        torch_init.uniform_(model.w[3:9])
        torch_init.constant_(model.w[5], 0.5)
        small = torch.empty(5).normal_()
        small.uniform_()
        del small
    expected = keyed("normal_", (200, 100))
    expected[3:9] = keyed("uniform_", (200, 100))[3:9]
    expected[5] = 0.5
    assert equal(model.w, expected)
    assert report.dropped_elements == 40_000 + 10


@pytest.mark.parametrize("size", [4, 100])
def test_copies(size: int) -> None:
    """A copy equals its original, as it would without."""
    with seeded():
        model = nn.Module()
        model.a = nn.Parameter(torch.empty(size, size))
        torch_init.normal_(model.a)
        model.b = nn.Parameter(torch.empty(size, size))
        model.b.data.copy_(model.a)
        model.c = nn.Parameter(torch.empty(0))
        model.c.data = model.b.data.clone()
        model.d = copy.deepcopy(model.c)
        model.e = nn.Parameter(model.a.detach().clone())
        torch_init.zeros_(model.a.data[0])
        model.f = nn.Parameter(model.a.detach().clone())
        torch_init.uniform_(model.b)
        model.g = nn.Parameter(model.e.detach().T.clone())
    normal = keyed("normal_", (size, size), name="a")
    assert equal(model.c, model.d)
    assert equal(model.c, model.e)
    assert equal(model.f[1:], model.e[1:])
    assert not model.f[0].any()
    assert equal(model.b, keyed("uniform_", (size, size), name="b"))
    assert equal(model.g.T, model.e)
    assert equal(model.a, model.f)
    assert normal.shape == model.a.shape


@pytest.mark.parametrize(
    "part",
    [lambda x: x[90:], lambda x: x[::2], lambda x: x[:, ::2].reshape(90, 90), lambda x: x[:90].t()],
    ids=["rows", "every second", "reshaped", "transposed"],
)
def test_a_copy_of_a_part(part: Callable[[Tensor], Tensor]) -> None:
    """It has the elements of the part, not those at the beginning of its original."""
    with seeded():
        x, y = torch.empty(180, 90).normal_(), torch.empty(90, 90)
        y.copy_(part(x))
        square = torch.empty(90, 90).normal_()
        rows = torch.empty(99, 90)
        rows[9:].copy_(square.t())
    assert torch.equal(y, part(x))
    assert torch.equal(rows[9:], square.t())


def test_a_copy_and_its_original_filled_again() -> None:
    with seeded():
        model = nn.Module()
        model.a = nn.Parameter(torch.empty(9))
        torch_init.normal_(model.a)
        model.b = nn.Parameter(model.a.detach().clone())
        torch_init.normal_(model.a)
    assert not equal(model.a, model.b)


def test_layers_of_a_transformer() -> None:
    """Copies of one that is gone: equal to each other, whatever else there is."""

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 8)
        return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    alone = state(by_fused(lambda: nn.ModuleDict({"b": make()})))
    both = state(by_fused(lambda: nn.ModuleDict({"a": make(), "b": make()})))
    assert differ(alone, {k: v for k, v in both.items() if k[0] == "b"}) == []
    layers = [{k[11:]: v for k, v in alone.items() if k[9] == i} for i in "012"]
    assert differ(layers[0], layers[1]) == differ(layers[0], layers[2]) == []


def test_inference_mode() -> None:
    with torch.inference_mode(), seeded():
        model: Any = nn.Module()
        model.w, model.big = holder(3, 3).w, holder(30, 300).w
        torch_init.normal_(model.w)
        model.big.normal_()
    assert equal(model.w.clone(), keyed("normal_", (3, 3)))
    assert equal(model.big.clone(), keyed("normal_", (30, 300), name="big"))
    init_model_(model, lambda m: torch_init.uniform_(cast(Any, m).w), SEED)
    assert equal(model.w.clone(), keyed("uniform_", (3, 3)))


def test_versions_and_leaves() -> None:
    for name in ("normal_", "uniform_", "zeros_", "eye_", "trunc_normal_", "xavier_normal_"):
        with seeded():
            model = holder(3, 3)
            before = model.w._version
            getattr(torch_init, name)(model.w)
            assert model.w._version > before, name
            getattr(api, name)(model.w)
            assert model.w._version > before + 1, name
        assert model.w.is_leaf
        assert model.w.requires_grad
        assert model.w.grad_fn is None
    plan = Plan()
    plan.normal_(model.w)
    for change in (
        lambda: plan.run(seed=3),
        lambda: init_model_(model, lambda m: torch_init.ones_(cast(Any, m).w), 3),
        lambda: fastinit.normal_(model.w, generator=Key(3)),
    ):
        before = model.w._version
        change()
        assert model.w._version > before
    with seeded(), pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        holder(3, 3).w.normal_()


def test_saved_for_backward() -> None:
    """A change after the graph is made is noticed."""
    w = nn.Parameter(torch.ones(3))
    model = nn.Module()
    model.w = w
    loss: Any = (w * w).sum()
    init_model_(model, lambda m: torch_init.normal_(cast(Any, m).w), SEED)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_shared_elements() -> None:
    """torch refuses to fill what overlaps itself; so do we, at once."""
    with seeded():
        model = holder(3, 3)
        torch_init.normal_(model.w)
        with pytest.raises((RuntimeError, ValueError)):
            torch_init.normal_(torch.empty(3, 1).expand(3, 4))
    assert equal(model.w, keyed("normal_", (3, 3)))


def test_subclasses_of_parameter() -> None:
    class Mine(nn.Parameter):
        pass

    with seeded():
        model = nn.Module()
        model.w = Mine(torch.empty(4, 4))
        torch_init.normal_(model.w)
    assert type(model.w) in (Mine, nn.Parameter)
    assert model.w.isfinite().all()
