# SPDX-License-Identifier: BSD-3-Clause
"""The picture of `fastinit inspect --plot`."""

from __future__ import annotations

import importlib
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastinit.cli import plot as inspect_plot

pytest.importorskip("matplotlib")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


MIXED = """
def make():
    torch.manual_seed(1)
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(6)], nn.LayerNorm(5))
    nn.init.sparse_(model[0].weight, 0.9)
    nn.init.trunc_normal_(model[1].weight, std=1.0, a=-1.0, b=0.5)
    nn.init.eye_(model[2].weight)
    with torch.no_grad():
        model[3].weight.fill_(0.5)[0, 0] = float("nan")
        model[4].weight *= 3
    model.forgotten = nn.Parameter(torch.empty(9000))
    model.register_buffer("steps", torch.arange(7))
    return model
"""


def test_plot(inspected: Callable, tmp_path: Path) -> None:
    image = importlib.import_module("matplotlib.image")
    status, out, err = inspected(MIXED, plot="picture.png")
    assert (status, err) == (1, "")
    assert "Distributions: picture.png" in out
    width, height = png_size(tmp_path / "picture.png")
    assert 600 < width < 2400
    assert 200 < height < 2400
    pixels = image.imread(tmp_path / "picture.png")[..., :3]
    assert 0.03 < (pixels.min(axis=2) < 0.95).mean() < 0.6  # neither empty nor full
    red = (pixels[..., 0] > 0.7) & (pixels[..., 1] < 0.72) & (pixels[..., 2] < 0.72)
    assert red.sum() > 500  # what is off


@pytest.mark.slow
def test_no_more_than_64_panels(
    inspected: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(inspect_plot, "_panel", lambda axes, x: drawn.append(x.names[0]))
    status, _, _ = inspected(
        """
        def make():
            model = nn.Module()
            for i in range(70):
                name = "".join(chr(97 + int(c)) for c in str(i))
                setattr(model, name, nn.Linear(10 + i, 5, bias=False))
            model.a.weight.detach().numpy()[:] += 9
            return model
        """,
        plot="many.png",
    )
    assert status == 1
    assert len(drawn) == inspect_plot.PANELS
    assert drawn[0] == "a.weight"  # the smallest, but off
    assert png_size(tmp_path / "many.png")[0] < 3000


def test_unwritten_is_drawn(
    inspected: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In red, among the first; the others have a density to be read at the left."""
    panels: dict[str, Any] = {}
    panel = inspect_plot._panel

    def noting(axes: Any, x: Any) -> None:
        panel(axes, x)
        panels[x.names[0]] = axes

    monkeypatch.setattr(inspect_plot, "_panel", noting)
    status, _, _ = inspected(MIXED, plot="some.png")
    assert status == 1
    axes = panels["forgotten"]
    assert [text.get_text() for text in axes.texts][-1] == "never written"
    assert {text.get_color() for text in axes.texts[1:]} == {inspect_plot._RED}
    assert axes.title.get_color() == "black" or axes.get_title(loc="left") == "forgotten"
    axes = panels["5.weight"]
    assert axes.spines["left"].get_visible()
    assert all(re.fullmatch(r"1e-?\d+", label.get_text()) for label in axes.get_yticklabels())
    assert 1 <= len(axes.get_yticklabels()) <= 3


def test_nothing_to_draw(inspected: Callable, tmp_path: Path) -> None:
    status, _, _ = inspected("def make():\n    return nn.LayerNorm(5)", plot="none.png")
    assert status == 0
    assert png_size(tmp_path / "none.png")[0] > 300


def test_plot_without_matplotlib(inspected: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is built."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = inspected("def make():\n    raise AssertionError", plot="picture.png")
    assert (status, out) == (2, "")
    assert "pip install 'torch-fastinit[plot]'" in err


@pytest.mark.parametrize("path", ["nowhere/picture.png", "picture.unknown"])
def test_plot_that_cannot_be_written(inspected: Callable, path: str) -> None:
    status, out, err = inspected("def make():\n    return nn.Linear(20, 20)", plot=path)
    assert status == 2
    assert "weight" in out
    assert f"{path} cannot be written" in err
