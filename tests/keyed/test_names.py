# SPDX-License-Identifier: BSD-3-Clause
"""seed=: a parameter's numbers go by its name, at the end of the scope."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

import fastinit
from fastinit import init_model_, materialize_
from tests.support.seeded import (
    ROOT5,
    SEED,
    WAYS,
    Net,
    by_fused,
    by_init_model,
    differ,
    equal,
    keyed,
    keys,
    made,
    on_meta,
    seeded,
    state,
)


def test_other_layers_do_not_matter() -> None:
    few = state(by_fused(lambda: Net("a", "b")))
    more = state(by_fused(lambda: Net("x", "b", "y", "a", "z")))
    assert differ(few, {k: more[k] for k in few}) == []
    renamed = state(by_fused(lambda: Net("a", "c")))
    assert not equal(renamed["c.weight"], few["b.weight"])
    assert equal(renamed["a.weight"], few["a.weight"])


def test_names_of_the_end_of_the_scope() -> None:
    def grown() -> nn.Module:
        parts = [nn.Linear(4, 4) for _ in range(3)]
        model = nn.Sequential(parts[2], nn.Linear(4, 4), parts[0])
        model[1] = nn.Linear(4, 4)
        outer = nn.Module()
        outer.body = model
        return outer

    plain = state(by_fused(lambda: nn.ModuleDict({"body": nn.Sequential(
        *[nn.Linear(4, 4) for _ in range(3)])})))  # fmt: skip
    assert differ(plain, state(by_fused(grown))) == []


def test_two_models_in_a_scope() -> None:
    with seeded() as report:
        one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    assert list(keys(report)) == ["weight", "bias", "~1.weight", "~1.bias"]
    assert equal(one.weight, keyed("kaiming_uniform_", (4, 4), ROOT5, name="weight"))
    assert equal(two.weight, keyed("kaiming_uniform_", (4, 4), ROOT5, name="~1.weight"))


def test_prefix() -> None:
    whole = state(by_fused(lambda: Net("a")))
    alone = by_fused(lambda: nn.Linear(8, 8), prefix="a.")
    assert equal(state(alone)["weight"], whole["a.weight"])
    for way, function in WAYS.items():
        part: Any = function(lambda: nn.Linear(8, 8), prefix="a.")
        assert equal(part.weight, whole["a.weight"]), way
    model = Net("a")
    report = init_model_(model, seed=SEED, prefix="p.")
    assert keys(report) == {"p.a.weight": "p.a.weight", "p.a.bias": "p.a.bias"}
    with seeded(prefix="p.") as report:
        kept = [nn.Linear(3, 3), nn.Linear(3, 3)]
    assert [*keys(report).values()] == ["p.weight", "p.bias", "p.~1.weight", "p.~1.bias"]
    assert kept


def test_the_first_model_is_the_first() -> None:
    """Not the one that got the address of a temporary."""
    other = [object.__new__(nn.Linear) for _ in range(100_000)]  # what earlier tests left free
    with seeded() as report:
        gone = [nn.Linear(2, 2) for _ in range(64)]
        ids = {id(m) for m in gone}
        first = nn.Linear(3, 3)
        del gone
        later = [nn.Linear(4, 4)]
        while id(later[-1]) not in ids:
            later.append(nn.Linear(4, 4))
            assert len(later) < 1000
    assert other
    assert equal(first.weight, keyed("kaiming_uniform_", (3, 3), ROOT5, name="weight"))
    assert "weight" in keys(report)


def test_garbage_is_no_model() -> None:
    with seeded() as report:
        gone: Any = nn.Linear(2, 2)
        gone.me = [gone]
        del gone
        model = nn.Linear(4, 4)
    assert set(keys(report)) - {""} == {"weight", "bias"}
    assert model


def test_wrappers() -> None:
    checkpoint = pytest.importorskip(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
    ).checkpoint_wrapper
    wrappers: dict[str, Callable[[Any], nn.Module]] = {
        "compile": lambda m: cast(nn.Module, torch.compile(m)),
        "data parallel": nn.DataParallel,
        "checkpoint": checkpoint,
        "all": lambda m: cast(nn.Module, torch.compile(nn.DataParallel(checkpoint(m)))),
        "inside": lambda m: nn.Sequential(checkpoint(m[0]), nn.DataParallel(m[1])),
    }

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    expected = state(by_init_model(make))
    for name, wrap in wrappers.items():
        model = made(make)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of loading the compiler
            wrapped = wrap(model)
        report = init_model_(wrapped, seed=SEED)
        assert differ(expected, state(model)) == [], name
        assert keys(report) == {k: k for k in expected}, name
        fresh = on_meta(make)
        materialize_(wrap(fresh), seed=SEED)
        assert differ(expected, state(fresh)) == [], name


def test_attributes_called_like_wrappers() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self._orig_mod = nn.Linear(3, 3), nn.Linear(3, 3)
            self._fsdp_wrapped_module = nn.Linear(3, 3)
            self._checkpoint_wrapped_module = nn.Linear(3, 3)

    model = Mine()
    assert keys(init_model_(model, seed=SEED)) == {n: n for n, _ in model.named_parameters()}
    values = [p for p in model.parameters() if p.dim() == 2]
    assert not any(equal(a, b) for a, b in itertools.combinations(values, 2))


def test_lists_and_dicts() -> None:
    with seeded() as report:
        model = nn.Module()
        model.l = nn.ParameterList([torch.randn(3), nn.Parameter(torch.randn(2, 2))])
        model.d = nn.ParameterDict({"x": torch.rand(3), "y": torch.randn(2)})
        model.n = nn.ParameterList([nn.ParameterList([torch.randn(2)])])
        model.b = nn.Buffer(torch.randn(3))
        model.register_buffer("hidden", torch.randn(4), persistent=False)
    assert keys(report) == {n: n for n in state(model)}
    for name, value in state(model).items():
        function = "uniform_" if name == "d.x" else "normal_"
        assert equal(value, keyed(function, value.shape, name=name)), name


def test_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 9, bias=False)
            self.b.weight = self.a.weight

    expected = keyed("normal_", (9, 4), name="a.weight")
    expected[2] = 0
    assert equal(by_fused(Tied).a.weight, expected)  # type: ignore[union-attr,arg-type]
    fn = lambda m: torch_init.normal_(m.weight) if hasattr(m, "weight") else None  # noqa: E731
    for way, function in WAYS.items():
        model: Any = function(Tied, fn)
        assert model.a.weight is model.b.weight, way
        assert equal(model.a.weight, keyed("normal_", (9, 4), name="a.weight")), way


def test_lazy() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    init_model_(model, seed=SEED)
    assert nn.parameter.is_lazy(model[0].weight)
    model(torch.ones(2, 3))
    init_model_(model, seed=SEED)
    assert equal(model[0].weight, keyed("kaiming_uniform_", (4, 3), ROOT5, name="0.weight"))
    with seeded():
        lazy: Any = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    assert nn.parameter.is_lazy(lazy[0].weight)


def test_many_parameters_in_one_buffer() -> None:
    """As flattened optimisers have them. Counted, not timed."""
    calls = 0
    part = fastinit.core.shard.part

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return part(*args)

    flat, model = torch.empty(1600), nn.Module()
    for i in range(100):
        model.register_parameter(f"p{i}", nn.Parameter(flat[i * 16 : (i + 1) * 16]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastinit.core.shard, "part", counted)
        init_model_(model, lambda m: [torch_init.normal_(p) for p in m.parameters()], SEED)
    assert equal(cast(Tensor, model.p7), keyed("normal_", (16,), name="p7"))
    assert calls < 2000
