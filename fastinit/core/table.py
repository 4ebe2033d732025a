# SPDX-License-Identifier: BSD-3-Clause
"""Text tables: aligned columns for a terminal, lines of Markdown for a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

_CUT = "..."  # stands for what has no room


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
        width: number of characters at which lines end, with dots if they are cut
        cut: index of the column whose cells lose their middle, so that the last column has
            room, up to 40 % of the width
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    if cut is not None:
        others = sum(widths[:-1]) - widths[cut] + 2 * (len(widths) - 1)
        last = min(widths[-1], width * 40 // 100)
        widths[cut] = min(widths[cut], max(12, width - others - last))
        short = shortened([row[cut] for row in rows], widths[cut])
        rows = [(*row[:cut], short[row[cut]], *row[cut + 1 :]) for row in rows]
    shown = [i for i, column in enumerate(zip(*rows)) if any(map(str.strip, column[1:]))]
    lines = []
    for row in rows:
        cells = [(row[i], widths[i]) for i in shown]
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in zip(shown, cells)]
        lines.append(clipped("  ".join(padded).rstrip(), width))
    return lines


def clipped(line: str, width: int) -> str:
    """Return a line of at most so many characters, with dots at its end if it was longer."""
    return line if len(line) <= width else line[: width - len(_CUT)].rstrip() + _CUT


def shortened(names: Sequence[str], most: int) -> dict[str, str]:
    """Return for each name one of at most so many characters; different names stay different.

    Dots replace as little of the middle as needed, at a place where no two names become one.
    """
    short = {name: name for name in names if len(name) <= most}
    long = [name for name in dict.fromkeys(names) if len(name) > most]
    room = most - len(_CUT)
    for head in sorted(range(1, room), key=lambda n: abs(n - room // 3)):
        cut = {name: name[:head] + _CUT + name[head - room :] for name in long}
        times = Counter(cut.values())
        for name in long:
            if name not in short and times[cut[name]] == 1:
                short[name] = cut[name]
    for i, name in enumerate(name for name in long if name not in short):
        number = f"{_CUT}({i + 1})"
        short[name] = name[: most - len(number)] + number
    return short


def markdown(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
