# SPDX-License-Identifier: BSD-3-Clause
"""The Report of a block: counts, names, calls, who could not wait, and how it is printed."""

from __future__ import annotations

import builtins
import copy
import gc
import math
import re
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.init import constant_

import fastinit
from fastinit import Report, fused
from fastinit.core import geometry
from tests.support.compare import BF16, F32


@pytest.fixture(autouse=True)
def large_from_4096(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes here are meant so."""
    monkeypatch.setattr(fastinit.core.geometry, "MIN_NATIVE", 4096)


def counts(report: Report) -> tuple[int, int, int, int]:
    return (
        report.recorded_elements,
        report.written_elements,
        report.dropped_elements,
        report.at_once_elements,
    )


class Large(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    written_by: tuple[str, ...]


def rows(report: Report) -> list[Large]:
    """What could wait; test_audit.py looks at the small ones, too."""
    large = geometry.MIN_NATIVE
    return [
        Large(*r[:4])
        for r in report.rows()
        if math.prod(r.shape) >= large or any(w.items >= large for w in r.laws)
    ]


def names(report: Report) -> list[str]:
    return [row.name for row in rows(report)]


def line_of(text: str) -> int:
    """The number of the only line of this file that ends so."""
    with open(__file__) as lines:
        (found,) = [i for i, line in enumerate(lines, 1) if line.rstrip().endswith(text)]
    return found


# ---- counts ----


def test_empty_block() -> None:
    with fused() as report:
        pass
    assert isinstance(report, Report)
    assert counts(report) == (0, 0, 0, 0)
    assert (report.bytes, report.seconds, report.early, report.reason) == (0, 0.0, [], "")
    assert rows(report) == []
    assert str(report).startswith("0 elements recorded: 0 written (0 MiB in 0.0 ms), 0 left out")


def test_one_tensor() -> None:
    with fused() as report:
        t = torch.empty(5000).normal_()
        assert counts(report) == (5000, 0, 0, 0)
        assert (report.bytes, report.seconds) == (0, 0.0)
    assert counts(report) == (5000, 5000, 0, 0)
    assert report.bytes == t.nbytes
    assert 0 < report.seconds < 10
    assert rows(report) == [("", (5000,), F32, ("normal_(0, 1)",))]


@pytest.mark.parametrize("dtype", [torch.float64, BF16, torch.float16], ids=str)
def test_bytes(dtype: torch.dtype) -> None:
    with fused() as report:
        t = torch.empty(5000, dtype=dtype).uniform_()
        t.zero_()
    assert counts(report) == (10000, 5000, 5000, 0)
    assert report.bytes == t.nbytes
    assert rows(report)[0].dtype is dtype


def test_overwritten_and_freed() -> None:
    with fused() as report:
        t = torch.empty(5000).normal_()
        t.uniform_()
        t[:1000].zero_()  # on top: both are written
        torch.empty(7000).normal_()
        del t
        u = torch.zeros(6000)
        u.copy_(torch.ones(6000))
    assert report.written_elements == 6000
    assert counts(report) == (5000 + 5000 + 1000 + 7000 + 12000 + 6000, 6000, 30000, 0)


def test_partial_fills_are_written_one_after_the_other() -> None:
    with fused() as report:
        t = torch.empty(5000).normal_()
        t[:1000].zero_()
    assert counts(report) == (6000, 6000, 0, 0)
    assert rows(report)[0].written_by == ("normal_(0, 1)", "fill_(0)")


def test_small_tensors_are_not_counted() -> None:
    with fused() as report:
        nn.Linear(9, 8)
        torch.empty(4095).normal_()
    assert counts(report) == (0, 0, 0, 0)
    assert rows(report) == []


def test_at_once() -> None:
    """Older tensors, and laws that cannot wait."""
    older = torch.empty(5000)
    with fused() as report:
        older.normal_()
        assert report.at_once_elements == 5000
        cut = torch.empty(6000)
        torch_init.trunc_normal_(cut)  # draws as often as its values require
    assert counts(report) == (0, 0, 0, 11000)
    assert "11,000 more filled natively when asked for." in str(report)
    assert [row.written_by for row in rows(report)] == [
        ("trunc_normal_(mean=0, std=1, a=-2, b=2)",)
    ]


def test_nothing_at_once_is_not_mentioned() -> None:
    with fused() as report:
        t = torch.empty(5000).normal_()
    assert "natively when asked for" not in str(report)
    assert len(t) == 5000


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Transformer(64, 4, 1, 1, 96, batch_first=True),
        lambda: nn.Sequential(nn.Linear(90, 80), nn.Embedding(90, 80, padding_idx=1)),
        lambda: copy.deepcopy(nn.Linear(90, 80)),
        lambda: nn.LSTM(64, 64),
    ],
    ids=["transformer", "sequential", "copy", "lstm"],
)
def test_all_that_is_recorded_is_written_or_dropped(make: Callable[[], nn.Module]) -> None:
    with fused() as report:
        model = make()
        sum(float(p.detach().sum()) for p in list(model.parameters())[:2])
        for p in model.parameters():
            if p.dim() > 1:
                torch_init.xavier_uniform_(p)
    recorded, written, dropped, _ = counts(report)
    assert recorded == written + dropped > 0
    large = [p for p in model.parameters() if p.numel() >= fastinit.core.geometry.MIN_NATIVE]
    assert written >= sum(p.numel() for p in large)
    assert len(rows(report)) == len(large)


def test_a_block_that_raises() -> None:
    def half() -> None:
        made.append(torch.empty(5000).normal_())
        raise KeyError("no")

    made: list[torch.Tensor] = []
    block = fused()
    report = block.__enter__()
    with pytest.raises(KeyError, match="no"), block_of(block):
        half()
    assert counts(report) == (5000, 5000, 0, 0)


class block_of:
    """Leaves a block that was entered already."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)


def test_one_report_for_nested_blocks() -> None:
    with fused() as outer:
        a = torch.empty(5000).normal_()
        with fused() as inner:
            b = torch.empty(6000).normal_()
        assert inner is outer
        assert outer.written_elements == 0
    assert counts(outer) == (11000, 11000, 0, 0)
    with fused() as other:
        a.zero_()
    assert other is not outer
    assert counts(outer) == (11000, 11000, 0, 0)
    assert len(b) == 6000


# ---- rows ----


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
    with fused() as report:
        model = Model()
    assert sorted(names(report)) == sorted(EXPECTED)
    shapes = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for row in rows(report):
        assert row.shape == tuple(shapes[row.name].shape)
        assert row.dtype is F32
    order = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    assert names(report) == [name for name in order if name in EXPECTED]


def test_names_are_those_of_the_outermost_module() -> None:
    with fused() as report:
        model = nn.Sequential(nn.Linear(90, 80))
        outer = nn.ModuleDict({"inner": model})
    assert names(report) == ["inner.0.weight"]
    assert outer["inner"] is model


def test_two_models_in_one_block() -> None:
    with fused() as report:
        one, two = nn.Linear(90, 80), nn.Linear(80, 90)
    assert [(row.name, row.shape) for row in rows(report)] == [
        ("weight", (80, 90)),
        ("~1.weight", (90, 80)),
    ]
    assert one.weight.shape != two.weight.shape


def test_modules_that_are_removed() -> None:
    with fused() as report:
        model = nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 70), nn.Linear(70, 60))
        del model[1]
        model[1].weight = None
        kept = model[0].weight
        del model[0]
        gc.collect()
    assert [(row.name, row.shape) for row in rows(report)] == [("", (7200,))]
    assert kept.shape == (80, 90)


def test_modules_that_are_renamed() -> None:
    with fused() as report:
        model = nn.Module()
        model.old = nn.Linear(90, 80)
        model.new = model.old
        del model.old
    assert names(report) == ["new.weight"]


def test_parameters_that_are_replaced() -> None:
    with fused() as report:
        model = nn.Linear(90, 80)
        first = model.weight
        model.weight = nn.Parameter(torch.empty(90, 80).uniform_(-1, 1))
    assert [(row.name, row.shape) for row in rows(report)] == [("weight", (90, 80)), ("", (7200,))]
    assert first.shape == (80, 90)


def test_buffers_and_copies() -> None:
    with fused() as report:
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
    """A model that is put together after the block has the names of then, if its parts are known;
    what died since is no longer shown."""
    with fused() as report:
        parts = [nn.Linear(90, 80), nn.Linear(80, 70)]
        loose = torch.empty(5000).normal_()
    assert names(report) == ["weight", "~1.weight", ""]
    del parts[1], loose
    gc.collect()
    assert names(report) == ["weight"]


def test_the_report_keeps_nothing_alive() -> None:
    with fused() as report:
        model = nn.Sequential(nn.Linear(90, 80), nn.Embedding(90, 80, padding_idx=3))
        total = float(model[0].weight.detach().sum())
    alive = [weakref.ref(x) for x in (model, model[0], model[0].weight, model[1].weight)]
    storage = weakref.ref(model[0].weight.untyped_storage())
    assert len(rows(report)) == 2
    str(report)
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4
    assert storage() is None
    assert rows(report) == []
    assert report.written_elements == 7200 + 7200 + 80
    assert math.isfinite(total)


def test_arguments_that_are_tensors_are_not_kept() -> None:
    value = torch.tensor(3.0)
    gone = weakref.ref(value)
    with fused() as report:
        t = constant_(torch.empty(5000), value)  # torch's own, imported before
    del value
    gc.collect()
    assert [row.written_by for row in rows(report)] == [("constant_(val=3)",)]
    assert len(t) == 5000
    assert gone() is None


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
    "zeros_": (lambda t: torch_init.zeros_(t), "zeros_()"),
    "ones_": (lambda t: torch_init.ones_(t), "ones_()"),
    "xavier_uniform_": (
        lambda t: torch_init.xavier_uniform_(t, 2.0),
        "xavier_uniform_(gain=2, fan_in=90, fan_out=80)",
    ),
    "xavier_normal_": (
        lambda t: torch_init.xavier_normal_(t),
        "xavier_normal_(gain=1, fan_in=90, fan_out=80)",
    ),
    "kaiming_uniform_": (
        lambda t: torch_init.kaiming_uniform_(t, a=math.sqrt(5)),
        "kaiming_uniform_(a=2.236, mode=fan_in, nonlinearity=leaky_relu, fan_in=90)",
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
    with fused() as report:
        model = nn.Module()
        model.w = nn.Parameter(torch.empty(80, 90))
        with torch.no_grad():
            call(model.w)
    assert rows(report) == [("w", (80, 90), F32, (expected,))]
    assert counts(report)[1] == 7200


def test_fans_of_convolutions() -> None:
    with fused() as report:
        conv = nn.Conv2d(16, 32, 5)
        torch_init.xavier_normal_(conv.weight)
    assert rows(report)[0].written_by == ("xavier_normal_(gain=1, fan_in=400, fan_out=800)",)


def test_only_what_is_left_counts() -> None:
    """Calls that were overwritten are not shown; those on top of each other are, in order."""
    with fused() as report:
        table = nn.Embedding(90, 80)
        torch_init.xavier_normal_(table.weight)
        torch_init.uniform_(table.weight, -1, 1)
        table.weight.data[3].zero_()
        table.weight.data[4:6].fill_(1)
    calls = ("uniform_(a=-1, b=1)", "fill_(0)", "fill_(1)")
    assert rows(report) == [("weight", (90, 80), F32, calls)]


def test_fills_after_a_read() -> None:
    with fused() as report:
        t = torch.empty(5000).normal_()
        t.sum()
        t.zero_()
    assert rows(report) == [("", (5000,), F32, ("fill_(0)",))]
    assert counts(report) == (10000, 10000, 0, 0)


# ---- who could not wait ----


def test_early() -> None:
    with fused() as report:
        t, u = torch.empty(5000).normal_(), torch.empty(6000).uniform_()
        t.sum()  # the first read
        t.sum()  # nothing is left to be written
        u.mul_(2)  # the second
    assert [(e.operator, e.elements) for e in report.early] == [
        ("aten.sum.default", 5000),
        ("aten.mul_.Tensor", 6000),
    ]
    lines = [f"{__file__}:{line_of(text)}" for text in ("# the first read", "# the second")]
    assert [e.line for e in report.early] == lines
    text = str(report)
    assert "Written before the end, since something read or changed it:" in text
    assert re.search(r"^ +6,000  aten\.mul_\.Tensor at ", text, re.MULTILINE)


WAYS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "item": (lambda t: t[3, 4].item(), "aten.select.int"),
    "linear": (lambda t: nn.functional.linear(t, t), "aten.mm.default"),
    "setitem": (lambda t: t.__setitem__([1, 2], 3.0), "aten.index_put_.default"),
    "numpy": (lambda t: t.numpy(), "Tensor.numpy"),
    "asarray": (lambda t: np.asarray(t), "Tensor.numpy"),
    "tolist": (lambda t: t.tolist(), "Tensor.tolist"),
    "repr": (lambda t: repr(t), "Tensor.__repr__"),
    "copied from": (lambda t: torch.zeros(3, 90).copy_(t[:3]), "aten.copy_.default"),
    "orthogonal_": (lambda t: torch.ops.aten.linalg_qr(t), "aten.linalg_qr.default"),
}


def deeper(call: Callable[[], Any]) -> None:
    """The line is that of the user's innermost frame."""
    call()


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_be_early(name: str) -> None:
    call, operator = WAYS[name]
    with fused() as report:
        t = torch.empty(80, 90).normal_()
        deeper(lambda: call(t))
    (early,) = report.early
    assert (early.operator, early.elements) == (operator, 7200)
    path, _, number = early.line.rpartition(":")
    assert path == __file__
    with open(__file__) as file:
        assert f'"{name}": (' in file.read().split("\n")[int(number) - 1]


def test_lines_in_torch_are_those_of_its_caller() -> None:
    with fused() as report:
        layer = nn.Linear(90, 80)
        layer(torch.ones(2, 90))  # called here
    assert {e.line for e in report.early} == {f"{__file__}:{line_of('# called here')}"}


def test_threads_are_named() -> None:
    with fused() as report:
        t = torch.empty(5000).normal_()
        thread = threading.Thread(target=t.numel)
        thread.start()  # of a thread
        thread.join()
    (early,) = report.early
    assert (early.operator, early.elements) == ("a thread", 5000)
    assert early.line == f"{__file__}:{line_of('# of a thread')}"


def test_early_lines_are_added_up_and_limited() -> None:
    with fused() as report:
        for _ in range(1100):
            torch.empty(4096).zero_().sum()
        kept = [torch.empty(5000).normal_() for _ in range(12)]
        for i, name in enumerate(("exp", "log", "sin", "cos", "tan", "neg", "abs", "sqrt", "ceil")):
            getattr(kept[i], name)()
    assert len(report.early) == 1000
    assert report.written_elements == 1100 * 4096 + 12 * 5000
    lines = [line for line in str(report).split("\n") if " at " in line and "aten" in line]
    assert len(lines) == 1
    assert "4,096,000  aten.sum.default" in lines[0]


def test_ten_lines_at_most() -> None:
    with fused() as report:
        names = [
            "exp",
            "log",
            "sin",
            "cos",
            "tan",
            "neg",
            "abs",
            "sqrt",
            "ceil",
            "floor",
            "round",
            "trunc",
        ]
        kept = [torch.empty(5000).normal_() for _ in names]
        for t, name in zip(kept, names):
            getattr(t, name)()
    assert len(report.early) == len(names)
    shown = [line for line in str(report).split("\n") if line.startswith("  ") and "aten." in line]
    assert len(shown) == 10


# ---- how it is printed ----


def assorted() -> tuple[Report, list[Any]]:
    with fused() as report:
        model = nn.Module()
        model.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(64, 2, 96), 4, enable_nested_tensor=False
        )
        model.layers = nn.Sequential(*[nn.Linear(90, 80) for _ in range(12)])
        model.a_name_longer_than_any_terminal_is_wide = nn.ModuleDict(
            {"and_another_one_that_goes_on_and_on_and_on_and_on_and_on": nn.Linear(90, 81)}
        )
        model.wide = nn.Parameter(torch.zeros(1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 1000))
        model.table = nn.Embedding(900, 80, padding_idx=0)
        for i in range(20):
            model.table.weight.data[i].fill_(i)
        loose = torch.empty(50_000).normal_()
        float(model.layers[3].weight.detach().sum())
        loose.sum()
    return report, [model, loose]


@pytest.mark.parametrize("columns", [60, 80, 100, 132, 200])
def test_it_fits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report, kept = assorted()
    monkeypatch.setenv("COLUMNS", str(columns))
    too_long = [line for line in str(report).split("\n") if len(line) > columns]
    assert too_long == []
    assert kept


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_table_fits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the sentences."""
    report, kept = assorted()
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(report).split("\n")
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["tensor", "shape"])
    assert lines[head].split() == ["tensor", "shape", "dtype", "written", "by"]
    table = lines[head:]
    assert all(len(line) <= columns for line in table)
    assert all(line == line.rstrip() for line in table)
    assert any(line.startswith("12 x ") and "80x90" in line for line in table)
    assert sum(line.startswith("4 x ") for line in table) == 8
    assert any("1x2x1x2x1x2" in line for line in table)
    assert any("(unnamed)" in line and "50000" in line for line in table)
    begin = lines[head].index("shape")
    rows = table[1 : next(i for i, line in enumerate(table) if line.startswith("Written"))]
    assert all(line[begin - 1] == " " for line in rows)  # the columns stand below each other
    assert kept


def test_layers_are_grouped() -> None:
    """Those that differ in their number only; not if shape, dtype or call differ."""
    with fused() as report:
        layers = nn.ModuleList([nn.Linear(90, 80, bias=False) for _ in range(12)])
        layers.append(nn.Linear(90, 81, bias=False))
        layers.append(nn.Linear(90, 80, bias=False, dtype=BF16))
        torch_init.ones_(layers[5].weight)
    lines = [line.split() for line in str(report).split("\n") if "float" in line]
    assert ["11", "x", "*.weight", "80x90", "float32"] in [line[:5] for line in lines]
    single = {tuple(line[1:3]) for line in lines if line[1] != "x"}
    assert single == {("80x90", "float32"), ("81x90", "float32"), ("80x90", "bfloat16")}
    assert len(lines) == 4
    assert sum(line[-1] == "ones_()" for line in lines) == 1


def test_a_single_layer_keeps_its_number() -> None:
    """`0.weight` is a name; `*.weight` is a group."""
    with fused() as report:
        model = nn.Sequential(nn.Linear(90, 80), nn.ReLU(), nn.Linear(80, 90))
    text = str(report)
    assert "  0.weight  80x90" in text
    assert "  2.weight  90x80" in text
    assert len(model) == 3


def test_large_numbers() -> None:
    report = Report(
        recorded_elements=123_456_789, written_elements=9_999_999, dropped_elements=10_000_000
    )
    text = str(report)
    assert text.startswith("123.5 M elements recorded: 9,999,999 written")
    assert "10.0 M left out" in text


def test_repr_is_short() -> None:
    report, kept = assorted()
    assert "_Memory" not in repr(report)
    assert repr(report).startswith("Report(recorded_elements=")
    assert kept


# ---- nothing captured ----


def in_vmap(report: list[Report]) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with fused() as entered:
            report.append(entered)
            return x * 2

    torch.vmap(function)(torch.ones(3))


def in_fake_mode(report: list[Report]) -> None:
    with FakeTensorMode(), fused() as entered:
        report.append(entered)
        torch.empty(5000).normal_()


def in_plan(report: list[Report]) -> None:
    def function(m: nn.Module) -> None:
        with fused() as entered:
            report.append(entered)
            torch_init.normal_(m.weight)

    assert len(fastinit.record(nn.Linear(90, 80), function)) == 1


REASONS: dict[Callable[[list[Report]], None], str] = {
    in_vmap: "a functorch transform is active",
    in_fake_mode: "a dispatch mode is active that has to see every operator",
    in_plan: "a Plan is being recorded",
}


@pytest.mark.parametrize("where", REASONS, ids=lambda f: f.__name__)
def test_reason(where: Callable[[list[Report]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    reports: list[Report] = []
    where(reports)
    assert [r.reason for r in reports] == [REASONS[where]]
    assert str(reports[0]) == f"Nothing was captured: {REASONS[where]}."
    assert len(str(reports[0])) <= 80
    assert counts(reports[0]) == (0, 0, 0, 0)
    assert rows(reports[0]) == []


# ---- progress ----


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    with fused(progress=True) as report:
        kept = [torch.empty(5000).normal_(), torch.empty(70, 80).uniform_()]
        kept[1][3].zero_()
        kept[0].sum()  # early writes have no bar
        assert capsys.readouterr() == ("", "")
    out, error = capsys.readouterr()
    assert out == ""
    last = error.replace("\r", "\n").strip().split("\n")[-1]
    assert last.startswith("fastinit: 100%")
    assert "5.68k/5.68k" in last
    assert report.written_elements == 5000 + 5600 + 80


def test_no_bar_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with fused() as report:
        kept = torch.empty(5000).normal_()
    assert capsys.readouterr() == ("", "")
    assert report.progress is False
    assert len(kept) == 5000


def test_progress_without_anything_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    with fused(progress=True):
        torch.empty(5000).normal_()  # freed
    assert "100%" not in capsys.readouterr().err


def test_progress_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "tqdm":
            raise ImportError("no tqdm")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.partition(".")[0] == "tqdm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    torch.manual_seed(3)
    with fused(progress=True) as report:
        t = torch.empty(5000).normal_()
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")
    assert counts(report) == (5000, 5000, 0, 0)
    torch.manual_seed(3)
    assert torch.equal(t, torch.empty(5000).normal_())


def test_progress_changes_no_bits(capsys: pytest.CaptureFixture[str]) -> None:
    """It is written in pieces then: several, of more than 2^24 elements together."""
    seen = []
    for progress in (False, True):
        torch.manual_seed(8)
        with fused(progress=progress):
            model = [torch.empty(1 << 22).normal_() for _ in range(6)]
            for t in model:
                t[:5000].uniform_()
                t[100:9000].zero_()
        seen.append([*model, torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert "100%" in capsys.readouterr().err


def test_progress_of_a_decorated_function(capsys: pytest.CaptureFixture[str]) -> None:
    @fused(progress=True)
    def make() -> nn.Module:
        return nn.Linear(90, 80)

    for _ in range(2):
        make()
        assert "100%" in capsys.readouterr().err
