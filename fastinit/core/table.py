# SPDX-License-Identifier: BSD-3-Clause
"""Text tables: aligned columns for a terminal, lines of Markdown for a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def columns(
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
    width: int = 1000,
    cut: int | None = None,
) -> list[str]:
    """Return a line for each row, with aligned columns; columns empty below the head are left out.

    Args:
        rows: the head first; all have the same number of cells
        right: indices of the columns that are aligned on the right
        width: number of characters at which lines end
        cut: index of the column whose cells lose their beginning, so that a third of the width is
            left for the last column
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    if cut is not None:
        others = sum(widths[:-1]) - widths[cut] + 2 * (len(widths) - 1)
        widths[cut] = min(widths[cut], max(12, width * 2 // 3 - others))
    shown = [i for i, column in enumerate(zip(*rows)) if any(map(str.strip, column[1:]))]
    lines = []
    for row in rows:
        cells = [(row[i], widths[i]) for i in shown]
        cells = [("..." + cell[3 - w :] if len(cell) > w else cell, w) for cell, w in cells]
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in zip(shown, cells)]
        lines.append("  ".join(padded)[:width].rstrip())
    return lines


def markdown(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
