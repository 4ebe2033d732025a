# SPDX-License-Identifier: BSD-3-Clause
"""The rows of a Report: names of tensors, laws, keys, and calls with their arguments."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn
from torch.nn.init import constant_

import fastinit
from fastinit import fused, init_model_, materialize_
from tests.support.compare import BF16, F32
from tests.support.reports import (
    counts,
    each_seed,
    each_size,
    holder,
    names,
    on_meta,
    rows,
    statuses,
)

pytestmark = pytest.mark.usefixtures("large_from_4096")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2)
        self.feed = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
        self.register_buffer("mask", torch.ones(70, 70))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(90, 64)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.extra = nn.ParameterDict({"scale": nn.Parameter(torch.zeros(5000))})
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(6000))])
        self.head = nn.Linear(64, 90, bias=False)
        self.head.weight = self.table.weight  # tied: the first name is shown


EXPECTED = [
    "table.weight",
    *(
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in (
            *("attention.in_proj_weight", "attention.out_proj.weight"),
            *("feed.0.weight", "feed.2.weight"),
        )
    ),
    *("extra.scale", "weights.0", "blocks.0.mask", "blocks.1.mask"),
]


def test_names_of_nested_modules() -> None:
    with fused(watch=True) as report:
        model = Model()
    assert sorted(names(report)) == sorted(EXPECTED)
    shapes = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for row in rows(report):
        assert row.shape == tuple(shapes[row.name].shape)
        assert row.dtype is F32
    order = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    assert names(report) == [name for name in order if name in EXPECTED]


def test_names_are_those_of_the_outermost_module() -> None:
    with fused(watch=True) as report:
        model = nn.Sequential(nn.Linear(90, 80))
        outer = nn.ModuleDict({"inner": model})
    assert names(report) == ["inner.0.weight"]
    assert outer["inner"] is model


def test_two_models_in_one_scope() -> None:
    with fused(watch=True) as report:
        one, two = nn.Linear(90, 80), nn.Linear(80, 90)
    assert [(row.name, row.shape) for row in rows(report)] == [
        ("weight", (80, 90)),
        ("~1.weight", (90, 80)),
    ]
    assert one.weight.shape != two.weight.shape


def test_modules_that_are_removed() -> None:
    with fused(watch=True) as report:
        model = nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 70), nn.Linear(70, 60))
        del model[1]
        model[1].weight = None
        kept = model[0].weight
        del model[0]
        gc.collect()
    assert [(row.name, row.shape) for row in rows(report)] == [("", (7200,))]
    assert kept.shape == (80, 90)


def test_modules_that_are_renamed() -> None:
    with fused(watch=True) as report:
        model = nn.Module()
        model.old = nn.Linear(90, 80)
        model.new = model.old
        del model.old
    assert names(report) == ["new.weight"]


def test_parameters_that_are_replaced() -> None:
    with fused(watch=True) as report:
        model = nn.Linear(90, 80)
        first = model.weight
        model.weight = nn.Parameter(torch.empty(90, 80).uniform_(-1, 1))
    assert [(row.name, row.shape) for row in rows(report)] == [("weight", (90, 80)), ("", (7200,))]
    assert first.shape == (80, 90)


def test_buffers_and_copies() -> None:
    with fused(watch=True) as report:
        model = nn.Linear(90, 80)
        model.register_buffer("hidden", torch.full((5000,), 2.0), persistent=False)
        twin = copy.deepcopy(nn.Linear(90, 80))
        both = nn.ModuleList([model, twin])
    assert names(report) == ["0.weight", "1.weight", "0.hidden"]
    first, second, buffer = (row.written_by for row in rows(report))
    assert first == second
    assert buffer == ("fill_(2)",)
    assert len(both) == 2


def test_names_are_looked_up_when_asked_for() -> None:
    """A model that is put together after the scope has the names of then, if its parts are known;
    what died since is no longer shown."""
    with fused(watch=True) as report:
        parts = [nn.Linear(90, 80), nn.Linear(80, 70)]
        loose = torch.empty(5000).normal_()
    assert names(report) == ["weight", "~1.weight", ""]
    del parts[1], loose
    gc.collect()
    assert names(report) == ["weight"]


# ---- calls ----


CALLS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "uniform_": (lambda t: torch_init.uniform_(t), "uniform_(a=0, b=1)"),
    "uniform_ of numbers": (lambda t: torch_init.uniform_(t, -0.25, 4), "uniform_(a=-0.25, b=4)"),
    "normal_": (lambda t: torch_init.normal_(t, std=0.02), "normal_(mean=0, std=0.02)"),
    "with a generator": (
        lambda t: torch_init.normal_(t, generator=torch.Generator()),
        "normal_(mean=0, std=1)",
    ),
    "constant_": (lambda t: torch_init.constant_(t, 0.5), "constant_(val=0.5)"),
    "constant_ of a tensor": (lambda t: constant_(t, torch.tensor(3.0)), "constant_(val=3)"),
    "zeros_": (lambda t: torch_init.zeros_(t), "zeros_()"),
    "ones_": (lambda t: torch_init.ones_(t), "ones_()"),
    "xavier_uniform_": (
        lambda t: torch_init.xavier_uniform_(t, 2.0),
        "xavier_uniform_(gain=2, fan_in=90, fan_out=80)",
    ),
    "xavier_normal_": (
        lambda t: torch_init.xavier_normal_(t),
        "xavier_normal_(fan_in=90, fan_out=80)",
    ),
    "kaiming_uniform_": (
        lambda t: torch_init.kaiming_uniform_(t, a=math.sqrt(5)),
        "kaiming_uniform_(a=2.236, fan_in=90)",
    ),
    "kaiming_normal_": (
        lambda t: torch_init.kaiming_normal_(t, mode="fan_out", nonlinearity="relu"),
        "kaiming_normal_(a=0, mode=fan_out, nonlinearity=relu, fan_in=90, fan_out=80)",
    ),
    "fastinit's": (lambda t: fastinit.normal_(t, 1.0), "normal_(mean=1, std=1)"),
    "trunc_normal_": (
        lambda t: torch_init.trunc_normal_(t, std=0.02),
        "trunc_normal_(mean=0, std=0.02, a=-2, b=2)",
    ),
    "method normal_": (lambda t: t.normal_(1, 2), "normal_(1, 2)"),
    "method uniform_": (lambda t: t.uniform_(-1, 2), "uniform_(-1, 2)"),
    "method zero_": (lambda t: t.zero_(), "fill_(0)"),
    "method fill_": (lambda t: t.fill_(0.1), "fill_(0.1)"),
    "setitem": (lambda t: t.__setitem__(..., 7), "fill_(7)"),
    "copied": (lambda t: t.copy_(torch.empty(80, 90).uniform_()), "uniform_(0, 1)"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    call, expected = CALLS[name]
    with fused(watch=True) as report:
        model = nn.Module()
        model.w = nn.Parameter(torch.empty(80, 90))
        with torch.no_grad():
            call(model.w)
    assert rows(report) == [("w", (80, 90), F32, (expected,))]
    assert counts(report)[1] == 7200


def test_only_what_is_left_counts() -> None:
    """Calls that were overwritten are not shown; those on top of each other are, in order."""
    with fused(watch=True) as report:
        table = nn.Embedding(90, 80)
        torch_init.xavier_normal_(table.weight)
        torch_init.uniform_(table.weight, -1, 1)
        table.weight.data[3].zero_()
        table.weight.data[4:6].fill_(1)
    calls = ("uniform_(a=-1, b=1)", "fill_(0)", "fill_(1)")
    assert rows(report) == [("weight", (90, 80), F32, calls)]


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=1)
        self.conv = nn.Conv2d(3, 8, 3)
        self.lstm = nn.LSTM(8, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm, self.batch = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.act = nn.PReLU()
        self.fc = nn.Linear(8, 100, dtype=BF16)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.scale = nn.Parameter(torch.ones(8) * 0.1)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.register_buffer("ids", torch.arange(8))
        torch_init.trunc_normal_(self.token, std=0.02)
        torch_init.xavier_uniform_(self.fc.weight, gain=2.0)
        torch_init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


UNSEEN = {"scale", "temperature", "ids", "batch.num_batches_tracked"}  # no fill made them


@each_seed
def test_rows(seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        model = Everything()
    rows = {row.name: row for row in report.rows()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert rows.keys() == tensors.keys()
    assert [row.name for row in report.rows()] == [n for n in tensors if n in rows]
    assert set(statuses(report).values()) == {"written"}
    for name, row in rows.items():
        assert row.kind == ("parameter" if isinstance(tensors[name], nn.Parameter) else "buffer")
        assert (row.shape, row.dtype) == (tuple(tensors[name].shape), tensors[name].dtype)
    calls = {name: row.written_by for name, row in rows.items()}
    assert calls["conv.weight"] == (
        "kaiming_normal_(a=0, mode=fan_out, nonlinearity=relu, fan_in=27, fan_out=72)",
    )
    assert calls["fc.weight"] == ("xavier_uniform_(gain=2, fan_in=8, fan_out=100)",)
    assert calls["fc.bias"] == ("uniform_(a=-0.3536, b=0.3536)",)
    assert calls["embed.weight"] == ("normal_(mean=0, std=1)", "fill_(0)")
    assert calls["token"] == ("trunc_normal_(mean=0, std=0.02, a=-2, b=2)",)
    assert calls["lstm.weight_ih_l0"] == ("uniform_(a=-0.5, b=0.5)",)
    assert calls["attention.in_proj_bias"] == ("constant_(val=0)",)
    assert calls["norm.weight"] == calls["batch.weight"] == ("ones_()",)
    assert calls["norm.bias"] == ("zeros_()",)
    constant = {n for n in rows if "ones_" in str(calls[n][-1:]) or "zeros_" in str(calls[n][-1:])}
    constant |= {"act.weight", "attention.in_proj_bias", "attention.out_proj.bias"}
    constant |= {"batch.running_mean", "batch.running_var", *UNSEEN}
    for name, row in rows.items():
        assert row.key == ("" if seed is None or name in constant else name), name


@each_seed
@each_size
def test_rows_of_what_was_exposed(n: int, seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        model = holder(torch.empty(n, n))
        model.w.data_ptr()
        torch_init.zeros_(model.w)
    assert report.rows()[0].written_by in (("zeros_()",), ("fill_(0)",))


@each_seed
def test_changes_show(seed: int | None) -> None:
    """A law that no longer holds is not all there is."""
    with fused(seed=seed, watch=True) as report:
        model = holder(torch.empty(4, 4))
        torch_init.normal_(model.w)
        model.w.data.mul_(0.5)
    (row,) = report.rows()
    assert row.written_by[0] == "normal_(mean=0, std=1)"
    assert len(row.written_by) == len(row.laws) == 2
    assert "mul_" in row.written_by[1]
    assert row.key == ("" if seed is None else "w")


# ---- tied, repeated ----


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.c = self.a.weight


@each_seed
def test_tied(seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        model = Pair()
    assert [set(names) for names in report.tied] == [{"a.weight", "b.weight", "c"}]
    report = init_model_(model, seed=seed)
    assert report.tied == [tuple(n for n, _ in named(model) if n != "a.bias")]
    assert report.repeated == [report.tied[0][0]]  # by both modules
    meta = on_meta(Pair)
    assert [set(names) for names in materialize_(meta, seed=seed).tied] == [
        {"a.weight", "b.weight", "c"}
    ]
    with fused(seed=seed, watch=True) as report:
        other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert report.tied == []
    assert other


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters(remove_duplicate=False))


@each_seed
def test_tied_and_unwritten(seed: int | None) -> None:
    """Counted once."""
    with fused(seed=seed, watch=True) as report:
        model = nn.Module()
        model.a = nn.Parameter(torch.empty(3))
        model.b = model.a
    assert report.unwritten == ["a"]
    assert report.tied == [("a", "b")]
    assert statuses(report) == {"a": "unwritten"}


@each_seed
@each_size
def test_repeated(n: int, seed: int | None) -> None:
    """Asked for twice as a whole; the same with a seed, and in any size."""
    with fused(seed=seed, watch=True) as report:
        model = nn.Module()
        model.once = nn.Linear(n, n)
        model.twice = nn.Linear(n, n)
        torch_init.zeros_(model.twice.bias)
        torch_init.normal_(model.twice.weight)
        model.padded = nn.Embedding(n, n, padding_idx=0)  # a row is no repetition
        model.parts = nn.Parameter(torch.empty(n, n))
        torch_init.normal_(model.parts[:2])
        torch_init.normal_(model.parts[2:])
        model.zeros = nn.Parameter(torch.zeros(n, n))
        model.changed = nn.Parameter(torch.ones(n, n))
        model.changed.data.mul_(2)
        model.replaced = nn.Linear(n, n, bias=False)
        model.replaced.weight = nn.Parameter(torch.empty(n, n).normal_())
    assert report.repeated == ["twice.weight", "twice.bias"]
    assert "Filled more than once: 2 tensors (report.repeated)" in str(report)


@each_seed
def test_repeated_by_init_model(seed: int | None) -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared, nn.Linear(3, 3))])
    assert init_model_(model, seed=seed).repeated == ["0.0.weight", "0.0.bias"]
