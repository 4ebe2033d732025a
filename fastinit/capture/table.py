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
from fastinit.core.table import clipped, columns

if TYPE_CHECKING:
    from fastinit.capture.report import Report, Row

# Arguments of torch's functions that are not shown.
_DEFAULTS = (("mode", "fan_in"), ("nonlinearity", "leaky_relu"), ("gain", 1.0))

# What stands in place of a rule, and what it means.
_WITHOUT_CALLS = {"written": "(as made)", "unwritten": "UNWRITTEN", "kept": "KEPT"}
_WITHOUT_CALLS["unseen"] = "(not watched)"
_MEANINGS = {
    "*": "any number",
    "(unnamed)": "no module has it",
    "(as made)": "has the values it was made with",
    "(not watched)": "a plain fused() does not watch small tensors",
    "KEPT": "a buffer as it was before",
    "UNWRITTEN": "nobody has initialised it",
    "shared keys": "some are copies of others, with the same numbers",
}


LOST = "Filled, though no module has it (as what weight_norm computes from its parts)"


def text(report: Report) -> str:
    """Return what `print(report)` shows, as wide as the terminal."""
    if report.reason:
        return f"Nothing was captured: {report.reason}."
    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    rows = report.rows()
    lines = [part for line in head(report, rows) for part in textwrap.wrap(line, width)]
    if rows:
        cells = list(_cells(rows))
        lines += columns([("", "tensor", "shape", "dtype", "written by"), *cells], (), width, 1)
        shown = "\n".join(f" {cell[1]}\n{cell[4]}" for cell in cells)
        meanings = [f"{word}: {meaning}" for word, meaning in _MEANINGS.items() if word in shown]
        lines += textwrap.wrap("; ".join(meanings), width)
    for title, found in (
        ("Never initialised", report.unwritten),
        ("Filled more than once", repeated(report)),
        (LOST, lost(report)),
        ("Tied", [" = ".join(names) for names in report.tied]),
        ("Drawn from torch's generators, whatever the seed", sorted(report.foreign)),
        ("Numbered in the order of the code, as no module has them", report.numbered),
    ):
        if found:
            lines += textwrap.wrap(f"{title}: {some(found)}", width)
    if report.unnamed:
        lines.append("Not named, so what the seed gave them depends on the order of the code:")
        for what, (where, why) in list(report.unnamed.items())[:10]:
            lines += textwrap.wrap(f"  {what}: {why}, at {where}", width, subsequent_indent="    ")
        lines += [f"  and {len(report.unnamed) - 10} more"] * (len(report.unnamed) > 10)
    early: Counter[tuple[str, str]] = Counter()
    for e in report.early:
        early[e.operator, e.line] += e.elements
    if early:
        lines.append("Written before the end, since something read or changed it:")
        for (operator, line), elements in early.most_common(10):
            lines.append(clipped(f"  {_count(elements):>8}  {operator} at {line}", width))
    return "\n".join(lines)


def head(report: Report, rows: list[Row]) -> Iterator[str]:
    """Yield sentences on what there is, and on what had to be written for it."""
    if not (report.has_begun or rows):
        yield "Nothing was recorded: no fill was of 32,768 elements. fused(watch=True) records all."
        return
    elements = sum(math.prod(row.shape) for row in rows)
    yield f"{len(rows):,} tensor{'s' * (len(rows) != 1)} with {_count(elements)} elements."
    if report.recorded_elements:
        left_out = f"{_count(report.dropped_elements)} left out, overwritten or freed unread"
        yield (
            f"Fills of {_count(report.recorded_elements)} elements waited: "
            f"{_count(report.written_elements)} written ({report.bytes / 2**20:,.0f} MiB in "
            f"{report.seconds * 1e3:,.1f} ms){f', {left_out}' * (report.dropped_elements > 0)}."
        )
    if report.at_once_elements:
        n = _count(report.at_once_elements)
        yield f"Fills of {n} elements could not wait, and were written natively when asked for."
    if report.initialised_by:
        yield f"Initialised by {'; '.join(report.initialised_by)}."
    if report.threads:
        names = ", ".join(sorted(report.threads))
        yield f"Nothing waited while threads started in the block were running: {names}"


def repeated(report: Report) -> list[str]:
    """Return how many tensors were filled more than once, and where their names are."""
    n = len(report.repeated)
    return [f"{n} tensor{'s' * (n > 1)} (report.repeated)"] if n else []


def lost(report: Report) -> list[str]:
    """Return what is said of fills that went to temporaries."""
    found = Counter(report.temporaries)
    return [
        f"{n} x " * (n > 1) + f"{t.function} of {_shape(t.shape)} at {t.line}"
        for t, n in found.items()
    ]


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def some(names: list[str]) -> str:
    """Return the first ten names and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" * (len(names) > 10))


def _cells(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each line; layers that differ by numbers in their names only share one."""
    groups: dict[Row, list[Row]] = {}
    for row in rows:
        pattern = re.sub(r"\d+", "*", row.name)
        groups.setdefault(row._replace(name=pattern, kind="", key="", laws=()), []).append(row)
    for group, like in groups.items():
        n, keys = len(like), {row.key for row in like}
        rule = ", ".join(group.written_by) or _WITHOUT_CALLS[group.status]
        if n > len(keys) and "" not in keys:
            rule = f"shared keys, {rule}"
        yield (
            *(f"{n} x " if n > 1 else "", (group if n > 1 else like[0]).name or "(unnamed)"),
            *(_shape(group.shape), str(group.dtype)[6:], rule),
        )


def _count(n: int) -> str:
    return f"{n:,}" if n < 10_000_000 else f"{n / 1e6:,.1f} M"


def call(fill: Written, shape: tuple[int, ...]) -> str:
    """Return the call that wrote a tensor of this shape, as a reader would write it."""
    if fill.caller is None:
        numbers = {"constant": (fill.a,), "uniform": (fill.a, fill.b), "normal": (fill.a, fill.b)}
        name = "fill_" if fill.op == "constant" else f"{fill.op.rstrip('_')}_"
        return f"{name}({', '.join(f'{x:.4g}' for x in numbers.get(fill.op, ()))})"
    name, arguments = fill.caller
    given = [pair for pair in arguments if pair not in _DEFAULTS]
    shown = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in given]
    if name == "constant_" and not shown:  # it was a tensor
        shown.append(f"val={fill.a:.4g}")
    if name.startswith(("kaiming", "xavier")) and len(shape) > 1:
        space = math.prod(shape[2:])
        shown.append(f"fan_in={shape[1] * space}")
        if name.startswith("xavier") or "mode=fan_out" in shown:
            shown.append(f"fan_out={shape[0] * space}")
    return f"{name}({', '.join(shown)})"
