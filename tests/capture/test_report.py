# SPDX-License-Identifier: BSD-3-Clause
"""The Report of a scope: what is counted, who could not wait, and why nothing was captured."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastinit
from fastinit import Report, fused
from tests.support.compare import BF16, F32
from tests.support.reports import (
    counts,
    rows,
)

pytestmark = pytest.mark.usefixtures("large_from_4096")


def test_empty_scope() -> None:
    with fused(watch=True) as report:
        pass
    assert isinstance(report, Report)
    assert counts(report) == (0, 0, 0, 0)
    assert (report.bytes, report.seconds, report.early, report.reason) == (0, 0.0, [], "")
    assert rows(report) == []
    assert str(report) == "0 tensors with 0 elements."
    with fused() as report:
        pass
    assert str(report).startswith("Nothing was recorded: no fill was of 32,768 elements.")


def test_one_tensor() -> None:
    with fused(watch=True) as report:
        t = torch.empty(5000).normal_()
        assert counts(report) == (5000, 0, 0, 0)
        assert (report.bytes, report.seconds) == (0, 0.0)
    assert counts(report) == (5000, 5000, 0, 0)
    assert report.bytes == t.nbytes
    assert 0 < report.seconds < 10
    head = str(report).split("\n")[:2]
    assert head[0] == "1 tensor with 5,000 elements."
    assert head[1].startswith("Fills of 5,000 elements waited: 5,000 written (0 MiB in ")
    assert "left out" not in head[1]
    assert "natively when asked for" not in str(report)
    assert rows(report) == [("", (5000,), F32, ("normal_(0, 1)",))]


@pytest.mark.parametrize("dtype", [torch.float64, BF16, torch.float16], ids=str)
def test_bytes(dtype: torch.dtype) -> None:
    with fused(watch=True) as report:
        t = torch.empty(5000, dtype=dtype).uniform_()
        t.zero_()
    assert counts(report) == (10000, 5000, 5000, 0)
    assert report.bytes == t.nbytes
    assert rows(report)[0].dtype is dtype


def test_overwritten_and_freed() -> None:
    with fused(watch=True) as report:
        t = torch.empty(5000).normal_()
        t.uniform_()
        t[:1000].zero_()  # on top: both are written
        torch.empty(7000).normal_()
        del t
        u = torch.zeros(6000)
        u.copy_(torch.ones(6000))
    assert report.written_elements == 6000
    assert counts(report) == (5000 + 5000 + 1000 + 7000 + 12000 + 6000, 6000, 30000, 0)


def test_at_once() -> None:
    """Older tensors that somebody else knows, too, and laws that cannot wait."""
    older = torch.empty(5000)
    array = older.numpy()
    with fused(watch=True) as report:
        older.normal_()
        assert array.any()
        assert report.at_once_elements == 5000
        cut = torch.empty(6000)
        torch_init.trunc_normal_(cut)  # draws as often as its values require
    assert counts(report) == (0, 0, 0, 11000)
    assert "Fills of 11,000 elements could not wait, and were written natively" in str(report)
    assert [row.written_by for row in rows(report)] == [
        ("trunc_normal_(mean=0, std=1, a=-2, b=2)",)
    ]


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
    with fused(watch=True) as report:
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


def test_one_report_for_nested_scopes() -> None:
    with fused(watch=True) as outer:
        a = torch.empty(5000).normal_()
        with fused(watch=True) as inner:
            b = torch.empty(6000).normal_()
        assert inner is outer
        assert outer.written_elements == 0
    assert counts(outer) == (11000, 11000, 0, 0)
    with fused(watch=True) as other:
        a.zero_()
    assert other is not outer
    assert counts(outer) == (11000, 11000, 0, 0)
    assert len(b) == 6000


def test_fills_after_a_read() -> None:
    with fused(watch=True) as report:
        t = torch.empty(5000).normal_()
        t.sum()
        t.zero_()
    assert rows(report) == [("", (5000,), F32, ("fill_(0)",))]
    assert counts(report) == (10000, 10000, 0, 0)


# ---- who could not wait ----


def line_of(text: str) -> int:
    """The number of the only line of this file that ends so."""
    with open(__file__) as lines:
        (found,) = [i for i, line in enumerate(lines, 1) if line.rstrip().endswith(text)]
    return found


def test_early() -> None:
    with fused(watch=True) as report:
        t, u = torch.empty(5000).normal_(), torch.empty(6000).uniform_()
        t.sum()  # the first read
        t.sum()  # nothing is left to be written
        u.mul_(torch.ones(1))  # the second
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
    with fused(watch=True) as report:
        t = torch.empty(80, 90).normal_()
        deeper(lambda: call(t))
    (early,) = report.early
    assert (early.operator, early.elements) == (operator, 7200)
    path, _, number = early.line.rpartition(":")
    assert path == __file__
    with open(__file__) as file:
        assert f'"{name}": (' in file.read().split("\n")[int(number) - 1]


def test_lines_in_torch_are_those_of_its_caller() -> None:
    with fused(watch=True) as report:
        layer = nn.Linear(90, 80)
        layer(torch.ones(2, 90))  # called here
    assert {e.line for e in report.early} == {f"{__file__}:{line_of('# called here')}"}


def test_threads_are_named() -> None:
    with fused(watch=True) as report:
        t = torch.empty(5000).normal_()
        thread = threading.Thread(target=t.numel)
        thread.start()  # of a thread
        thread.join()
    (early,) = report.early
    assert (early.operator, early.elements) == ("a thread", 5000)
    assert early.line == f"{__file__}:{line_of('# of a thread')}"


def test_early_lines_are_added_up_and_limited() -> None:
    names = ["sum", "max", "min", "std", "var", "prod", "mean", "norm", "any", "all", "sort"]
    for times in (0, 1100):
        with fused(watch=True) as report:
            for _ in range(times):
                torch.empty(4096).zero_().sum()
            kept = [torch.empty(5000).normal_() for _ in names]
            for t, name in zip(kept, names):
                getattr(t, name)()
        shown = [line for line in str(report).split("\n") if " at " in line and "aten." in line]
        assert report.written_elements == times * 4096 + 11 * 5000
        if times:
            assert len(report.early) == 1000
            assert len(shown) == 1
            assert "4,096,000  aten.sum.default" in shown[0]
        else:
            assert len(report.early) == len(names)
            assert len(shown) == 10


# ---- nothing captured ----


def in_vmap(report: list[Report]) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with fused(watch=True) as entered:
            report.append(entered)
            return x * 2

    torch.vmap(function)(torch.ones(3))


def in_fake_mode(report: list[Report]) -> None:
    with FakeTensorMode(), fused(watch=True) as entered:
        report.append(entered)
        torch.empty(5000).normal_()


def in_plan(report: list[Report]) -> None:
    def function(m: nn.Module) -> None:
        with fused(watch=True) as entered:
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


def test_unnamed() -> None:
    """What a seed gave to tensors without names is said, and check() raises."""
    with fused(watch=True) as report:
        pass
    report.unnamed["0.weight"] = ("model.py:3", "read before the block knew its name")
    report.unnamed["(50, 60)"] = ("model.py:9", "no module has it")
    with pytest.raises(RuntimeError, match=r"2 tensors .* names: 0\.weight \(read .*model\.py:3\)"):
        report.check()
    assert "  (50, 60): no module has it, at model.py:9" in str(report).splitlines()
