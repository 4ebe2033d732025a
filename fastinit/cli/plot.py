# SPDX-License-Identifier: BSD-3-Clause
"""python -m fastinit inspect --plot: distributions as small multiples."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastinit.cli.expected import Expected, Part, chunks

if TYPE_CHECKING:
    from fastinit.cli.inspect import Line

PANELS = 64
_BAR, _BAD, _RED, _LINE, _PALE = "#a9c4e4", "#eda9a2", "#c0392b", "#20436b", "#777777"


class Refused(Exception):
    """What was asked for cannot be inspected or drawn, and why."""


def figure(**options: Any) -> Any:
    """Return an empty figure that Agg draws, whatever backend is set.

    Raises:
        Refused: matplotlib is not installed.
    """
    try:
        made = importlib.import_module("matplotlib.figure").Figure(**options)
        importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(made)
    except ImportError as error:
        needed = "--plot needs matplotlib: pip install 'torch-fastinit[plot]'"
        raise Refused(f"{needed} ({error})") from None
    return made


def draw(lines: Sequence[Line], path: str, title: str) -> None:
    """Write a picture with a panel for each line of the table that varies or is unwritten.

    Args:
        lines: measured; where there are more than 64, those that are off and the largest are drawn
        path: its ending says of what kind
        title: of the picture

    Raises:
        Refused: the file cannot be written, or there is no such kind.
    """
    vary = [i for i, line in enumerate(lines) if _varies(line)]
    size = {i: (_is_wrong(lines[i]), sum(t.numel() for t in lines[i].tensors)) for i in vary}
    shown = sorted(sorted(vary, key=size.__getitem__, reverse=True)[:PANELS])
    columns = max(3, min(8, math.ceil(math.sqrt(1.3 * len(shown)))))
    rows = max(1, math.ceil(len(shown) / columns))
    width, height = 2.4 * columns, 1.45 * rows + 0.75
    canvas = figure(figsize=(width, height), dpi=120)
    top = 1 - 0.92 / height
    canvas.subplots_adjust(0.04, 0.3 / height, 0.98, top, 0.3, 0.8)
    canvas.text(0.02, 1 - 0.24 / height, title, fontsize=11, weight="bold", va="center")
    notes = ["Density. Bars: measured; line, dot: expected; red: off, or never written."]
    if len(vary) < len(lines):
        notes.append(f"Not drawn: {len(lines) - len(vary)} rows that are constant.")
    if len(shown) < len(vary):
        notes.append(f"Left out: {len(vary) - len(shown)} smaller ones.")
    canvas.text(0.02, 1 - 0.48 / height, "  ".join(notes), fontsize=8, color=_PALE, va="center")
    for k, i in enumerate(shown):
        _panel(canvas.add_subplot(rows, columns, k + 1), lines[i])
    try:
        canvas.savefig(path)
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be written: {error}") from None


def _is_wrong(line: Line) -> bool:
    return bool(line.off) or line.is_unwritten


def _varies(line: Line) -> bool:
    return line.is_unwritten or any(
        m is not None and (m.low != m.high or line.off) for m in line.found
    )


def _panel(axes: Any, line: Line) -> None:
    count, name, shape = line.cells()[:3]
    colour = _RED if _is_wrong(line) else "black"
    title = f"{count} {_short(name, 40 - len(count))}".lstrip()
    axes.set_title(title, fontsize=7, loc="left", pad=11, color=colour)
    rule = f"{shape}  {', '.join(dict.fromkeys(line.row.written_by)) or 'no rule'}"
    rule = rule if len(rule) <= 50 else f"{rule[:47]}..."
    axes.text(0, 1.03, rule, fontsize=5.5, color=_PALE, transform=axes.transAxes)
    axes.tick_params(labelsize=5.5, length=2, pad=1.5, color=_PALE, labelcolor=_PALE)
    axes.locator_params(axis="x", nbins=4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_PALE)
    if line.is_unwritten:
        _say(axes, "never written")
        return
    found = [m for m in line.found if m is not None]
    low, high = min(m.low for m in found), max(m.high for m in found)
    if not math.isfinite(high - low) or any(math.isnan(m.mean) for m in found):
        _say(axes, "not finite")
        return
    if line.parts is not None:
        want = Expected.of(line.parts)
        reach = (math.sqrt(3) if line.parts[0].law == "uniform" else 2) * want.std
        low, high = min(low, want.mean - reach), max(high, want.mean + reach)
    if low == high:
        low, high = low - 0.5, high + 0.5
    items = sum(t.numel() for t in line.tensors)
    bins = min(60, max(5, math.ceil(2 * items ** (1 / 3))))
    width = (high - low) / bins
    edges = [low + width * i for i in range(bins + 1)]
    floor = 0.4 / items / width  # less than one element
    bars = _density(line.tensors, low, high, bins)
    every = len(line.off) == len(line.tensors)
    style: dict[str, Any] = {"baseline": floor, "fill": True}
    axes.stairs(bars.clamp_min(floor).tolist(), edges, color=_BAD if every else _BAR, **style)
    top = float(bars.max())
    for i in line.off if not every else ():
        bars = _density([line.tensors[i]], low, high, bins)
        axes.stairs(bars.clamp_min(floor).tolist(), edges, color=_RED, linewidth=0.9)
        top = max(top, float(bars.max()))
    if line.parts is not None:
        top = max(top, _expect(axes, line.parts, low, high, width))
    axes.set_yscale("log")
    top *= (top / floor) ** 0.08
    axes.set_ylim(floor, top)
    powers = range(math.ceil(math.log10(floor)), math.floor(math.log10(top)) + 1)
    step = max(1, math.ceil(len(powers) / 3))
    axes.set_yticks([10.0**k for k in powers[::-step]], [f"1e{k}" for k in powers[::-step]])
    axes.minorticks_off()


def _say(axes: Any, words: str) -> None:
    """Put words into a panel that has no distribution."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, words, ha="center", color=_RED, transform=axes.transAxes)


def _density(tensors: Sequence[Tensor], low: float, high: float, bins: int) -> Tensor:
    counts = torch.zeros(bins, dtype=torch.float64)
    for t in tensors:
        for x in chunks(t.detach()):
            counts += torch.histc(x, bins, low, high)
    return counts / counts.sum() * bins / (high - low)


def _expect(axes: Any, parts: Sequence[Part], low: float, high: float, width: float) -> float:
    """Densities as a line; what is in one point as a dot, where its bar should end."""
    n = sum(p.items for p in parts)
    margin = (high - low) / 50
    x = torch.linspace(low - margin, high + margin, 521, dtype=torch.float64)
    density = torch.zeros_like(x)
    top = 0.0
    for p in parts:
        if not p.is_point():
            density += p.density(x) * (p.items / n)
    for p in parts:
        if p.is_point():
            mass = p.items / n / width + float(density[(x - p.a).abs().argmin()])
            axes.plot([p.a], [mass], ".", color=_LINE, markersize=4)
            top = max(top, mass)
    most = float(density.max())
    if most > 0:
        density[density == 0] = 1e-300  # an edge, not a gap
        axes.plot(x.tolist(), density.tolist(), color=_LINE, linewidth=0.9)
    return max(top, most)


def _short(name: str, most: int) -> str:
    """Shorten a name to its first part and as many of the last as fit."""
    first, _, rest = name.partition(".")
    short = name
    while len(short) > most and "." in rest:
        rest = rest.partition(".")[2]
        short = f"{first} ... {rest}"
    return short
