# SPDX-License-Identifier: BSD-3-Clause
"""The text of a report."""

from __future__ import annotations

import math
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastinit.capture.written import Written

if TYPE_CHECKING:
    from fastinit.capture.report import Report, Row

_WITHOUT_CALLS = {"written": "(as it was made)", "unwritten": "UNWRITTEN", "kept": "KEPT"}


def text(report: Report) -> str:
    """Return what `print(report)` shows, as wide as the terminal."""
    if report.reason:
        return f"Nothing was captured: {report.reason}."
    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    lines = [
        f"{_count(report.recorded_elements)} elements recorded: "
        f"{_count(report.written_elements)} written ({report.bytes / 2**20:,.0f} MiB in "
        f"{report.seconds * 1e3:,.1f} ms), {_count(report.dropped_elements)} left out because "
        "they were overwritten or freed unread.",
    ]
    if report.at_once_elements:
        lines.append(f"{_count(report.at_once_elements)} more filled natively when asked for.")
    if report.initialised_by:
        lines.append(f"Initialised by {'; '.join(report.initialised_by)}.")
    if report.threads:
        names = ", ".join(sorted(report.threads))
        lines.append(f"Nothing waited while threads started in the block were running: {names}")
    lines = [part for line in lines for part in textwrap.wrap(line, width)]
    lines += _columns([("", "tensor", "shape", "dtype", "written by"), *_rows(report)], width)
    for title, found in (
        ("Never initialised", report.unwritten),
        ("Buffers that are as they were", report.kept),
        ("Filled more than once, written once", report.repeated),
        ("Tied", [" = ".join(names) for names in report.tied]),
        ("Drawn from torch's generators, whatever the seed", sorted(report.foreign)),
    ):
        if found:
            more = [f"and {len(found) - 10} more"] if len(found) > 10 else []
            lines += textwrap.wrap(f"{title}: {', '.join([*found[:10], *more])}", width)
    early: Counter[tuple[str, str]] = Counter()
    for e in report.early:
        early[e.operator, e.line] += e.elements
    if report.unnamed:
        lines.append("Not named, so what the seed gave them depends on the order of the code:")
        for what, (where, why) in list(report.unnamed.items())[:10]:
            lines += textwrap.wrap(f"  {what}: {why}, at {where}", width, subsequent_indent="    ")
        lines += [f"  and {len(report.unnamed) - 10} more"] * (len(report.unnamed) > 10)
    if early:
        lines.append("Written before the end, since something read or changed it:")
        for (operator, line), elements in early.most_common(10):
            lines.append(f"  {_count(elements):>8}  {operator} at {line}"[:width])
    return "\n".join(lines)


def some(names: list[str]) -> str:
    """Return the first ten names and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" * (len(names) > 10))


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each line; layers that differ by numbers in their names only share one."""
    groups: dict[Row, list[str]] = {}
    for row in report.rows():
        pattern = row._replace(name=re.sub(r"\d+", "*", row.name), key="", laws=())
        groups.setdefault(pattern, []).append(row.name)
    for row, names in groups.items():
        n = len(names)
        yield (
            *(f"{n} x " if n > 1 else "", (row.name if n > 1 else names[0]) or "(unnamed)"),
            *("x".join(map(str, row.shape)) or "scalar", str(row.dtype)[6:]),
            ", ".join(row.written_by) or _WITHOUT_CALLS[row.status],
        )


def _count(n: int) -> str:
    return f"{n:,}" if n < 10_000_000 else f"{n / 1e6:,.1f} M"


def _columns(rows: list[tuple[str, ...]], width: int) -> list[str]:
    """Return the rows as aligned lines.

    The second cell is cut at its front, so that a third of the width is left for the last.
    """
    if len(rows) == 1:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    widths[1] = min(widths[1], max(12, width * 2 // 3 - widths[0] - widths[2] - widths[3] - 8))
    lines = []
    for row in rows:
        cells = [("..." + cell[3 - w :]) if len(cell) > w else cell for cell, w in zip(row, widths)]
        padded = [cell.ljust(w) for cell, w in zip(cells, widths)]
        lines.append("  ".join((*padded, row[4]))[:width].rstrip())
    return lines


def call(fill: Written, shape: tuple[int, ...]) -> str:
    """Return the call that wrote a tensor of this shape, as a reader would write it."""
    if fill.caller is None:
        numbers = {"constant": (fill.a,), "uniform": (fill.a, fill.b), "normal": (fill.a, fill.b)}
        name = "fill_" if fill.op == "constant" else f"{fill.op.rstrip('_')}_"
        return f"{name}({', '.join(f'{x:.4g}' for x in numbers.get(fill.op, ()))})"
    name, arguments = fill.caller
    shown = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in arguments]
    if name == "constant_" and not shown:  # it was a tensor
        shown.append(f"val={fill.a:.4g}")
    if name.startswith(("kaiming", "xavier")) and len(shape) > 1:
        space = math.prod(shape[2:])
        shown.append(f"fan_in={shape[1] * space}")
        if name.startswith("xavier") or "mode=fan_out" in shown:
            shown.append(f"fan_out={shape[0] * space}")
    return f"{name}({', '.join(shown)})"
