# SPDX-License-Identifier: BSD-3-Clause
"""How a Report is printed, and the bar while values are written."""

from __future__ import annotations

import builtins
import math
import sys
from typing import Any, cast

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

from fastinit import Report, fused
from fastinit.core import table
from tests.support.compare import BF16
from tests.support.reports import (
    counts,
    each_seed,
    holder,
)

pytestmark = pytest.mark.usefixtures("large_from_4096")


def assorted() -> tuple[Report, list[Any]]:
    with fused(watch=True) as report:
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


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_the_table_fits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report, kept = assorted()
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(report).split("\n")
    assert all(len(line) <= columns for line in lines)
    assert repr(report).startswith("Report(recorded_elements=")
    assert "_Memory" not in repr(report)
    if columns < 80:
        return
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["tensor", "shape"])
    assert lines[head].split() == ["tensor", "shape", "dtype", "written", "by"]
    table = lines[head:]
    assert all(line == line.rstrip() for line in table)
    assert any(line.startswith("12 x ") and "80x90" in line for line in table)
    assert sum(line.startswith("4 x ") for line in table) == 8
    assert any("1x2x1x2x1x2" in line for line in table)
    assert any("(unnamed)" in line and "50000" in line for line in table)
    begin = lines[head].index("shape")
    rows = table[1 : next(i for i, line in enumerate(table) if line.startswith("*: any number"))]
    assert all(line[begin - 1] == " " for line in rows)  # the columns stand below each other
    assert kept


def test_layers_are_grouped() -> None:
    """Those that differ in their number only; not if shape, dtype or call differ."""
    with fused(watch=True) as report:
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
    with fused(watch=True) as report:
        model = nn.Sequential(nn.Linear(90, 80), nn.ReLU(), nn.Linear(80, 90))
    text = str(report)
    assert "\n0.weight  80x90" in text
    assert "\n2.weight  90x80" in text
    assert len(model) == 3


def test_large_numbers() -> None:
    report = Report(
        recorded_elements=123_456_789, written_elements=9_999_999, dropped_elements=10_000_000
    )
    report.has_begun = True
    text = " ".join(str(report).split())
    assert "Fills of 123.5 M elements waited: 9,999,999 written" in text
    assert "10.0 M left out" in text


def deep() -> nn.Module:
    model: Any = nn.Module()
    inner = model
    for _ in range(12):
        inner.a_rather_long_name_of_a_module = nn.Module()
        inner = inner.a_rather_long_name_of_a_module
    inner.w, inner.v = nn.Parameter(torch.empty(3, 3)), nn.Parameter(torch.empty(3, 3))
    torch_init.kaiming_uniform_(inner.v, a=math.sqrt(5))
    inner.u = inner.v
    inner.scalar = nn.Parameter(torch.empty(()))
    for i in range(30):
        model.register_parameter(f"q{i}", nn.Parameter(torch.empty(2)))
    model.register_parameter("x" * 200, nn.Parameter(torch.empty(2)))
    return cast(nn.Module, model)


@each_seed
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_it_fits(columns: int, seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with fused(seed=seed, watch=True) as report:
        model = deep()
        torch.randperm(3)
        torch.empty(3).exponential_()
        loose = torch.randn(3)
        loose.sum()
    text = str(report)
    assert max(map(len, text.split("\n"))) <= columns
    assert len(text.split("\n")) < 60
    assert "30 x" in text
    assert "and 23 more" in " ".join(text.split())  # of 33 names that were forgotten
    assert ("Drawn from torch's generators" in text) == (seed is not None)
    assert len(report.unwritten) == 33
    with pytest.raises(RuntimeError, match=r"33 tensors were never initialised: .* and 23 more"):
        report.check()
    assert model


def test_scalars_have_a_shape() -> None:
    with fused(watch=True) as report:
        model = holder(torch.empty(()))
    line = next(x for x in str(report).split("\n") if x.startswith("w "))
    assert line.split()[1] != "float32"
    assert model


def rows_of(text: str) -> list[str]:
    return [line for line in text.split("\n") if "float32" in line]


class Long(nn.Module):
    """Names that differ at their beginning, in the middle, and at the end."""

    def __init__(self) -> None:
        super().__init__()
        for first in ("encoder", "decoder"):
            for middle in ("query_projection", "key_projection"):
                for last in ("a_rather_long_weight", "a_rather_long_height"):
                    inner = self
                    for name in (first, "some_attention_block", middle, "with_a_long_name"):
                        if name not in inner._modules:
                            inner.add_module(name, nn.Module())
                        inner = inner._modules[name]  # type: ignore[assignment]
                    inner.register_parameter(last, nn.Parameter(torch.zeros(90, 80)))


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_rows_that_differ_look_different(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with fused(watch=True) as report:
        model = Long()
    found = rows_of(str(report))
    assert len(found) == len(set(found)) == 8
    assert all(len(line) <= columns for line in found)
    if columns == 200:
        names = [line.split()[0] for line in found]
        assert names == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_what_is_cut_is_marked(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with fused(watch=True) as report:
        model = nn.ModuleList(nn.TransformerEncoderLayer(64, 2) for _ in range(2))
        for layer in model:
            nn.init.kaiming_normal_(layer.linear1.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[union-attr,arg-type]
    found = rows_of(str(report))
    assert len(found) > 8
    for line in found:
        assert line.count("(") == line.count(")") or line.endswith("...")


def test_names_that_no_cut_tells_apart() -> None:
    names = ["x" * 40 + middle + "y" * 40 for middle in ("p", "q", "r", "p")]
    short = table.shortened(names, 20)
    assert len(set(short.values())) == len(short) == 3
    assert all(len(x) <= 20 and "..." in x for x in short.values())


def test_words_are_explained() -> None:
    """Below the table, in a line, and only those that are in it."""
    with fused(watch=True) as report:
        model = nn.Sequential(nn.Linear(90, 80), nn.Linear(90, 80))
        model.register_buffer("made", torch.arange(3.0))
        model.register_buffer("forgotten", torch.empty(3))
    lines = str(report).split("\n")
    (found,) = [line for line in lines if line.startswith("*: any number")]
    assert "(as made): " in found
    assert "UNWRITTEN: " in found
    assert "KEPT" not in found
    assert "(unnamed)" not in found


def test_copies_that_share_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with fused(seed=3) as report:
        model = nn.Module()
        model.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(64, 2, 96), 3, enable_nested_tensor=False
        )
        model.others = nn.ModuleList(nn.Linear(70, 60) for _ in range(3))
    monkeypatch.setenv("COLUMNS", "120")
    text = str(report)
    (line,) = [x for x in rows_of(text) if "in_proj_weight" in x]
    assert line.split()[:3] == ["3", "x", "encoder.layers.*.self_attn.in_proj_weight"]
    assert "  shared keys, xavier_uniform_(" in line
    (line,) = [x for x in rows_of(text) if ".linear*.weight" in x and "96x64" in x]
    assert "  shared keys, " in line
    (line,) = [x for x in rows_of(text) if "60x70" in x]
    assert "key" not in line
    assert "shared keys: some are copies of others, with the same numbers" in " ".join(text.split())
    assert model


# ---- progress ----


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    with fused(progress=True, watch=True) as report:
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


def test_progress_without_anything_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    with fused(progress=True, watch=True):
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
    with fused(progress=True, watch=True) as report:
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
        with fused(progress=progress, watch=True):
            model = [torch.empty(1 << 22).normal_() for _ in range(6)]
            for t in model:
                t[:5000].uniform_()
                t[100:9000].zero_()
        seen.append([*model, torch.get_rng_state()])
        assert ("100%" in capsys.readouterr().err) == progress
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_progress_of_a_decorated_function(capsys: pytest.CaptureFixture[str]) -> None:
    @fused(progress=True, watch=True)
    def make() -> nn.Module:
        return nn.Linear(90, 80)

    for _ in range(2):
        make()
        assert "100%" in capsys.readouterr().err
