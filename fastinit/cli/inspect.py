# SPDX-License-Identifier: BSD-3-Clause
"""python -m fastinit inspect: whether a model's numbers are what its rules say."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastinit.capture import table
from fastinit.capture.report import Report, Row
from fastinit.cli import plot as inspect_plot
from fastinit.cli.expected import Expected, Measured, Part, measure, parts_of
from fastinit.cli.plot import Refused
from fastinit.core import geometry
from fastinit.core.table import columns
from fastinit.fused import fused
from fastinit.model import materialize_

MOST = 6.0  # standard errors: of 1,000 right tensors one is beyond in 250,000 runs


def main(target: str, seed: int | None = None, plot: str | None = None, meta: bool = False) -> int:
    """Build a model and compare every tensor with the rules that filled it.

    Args:
        target: `module:factory`, what builds it; the current directory is searched first
        seed: take the numbers of the keyed stream; by default those of torch's generators
        plot: a file for the distributions, drawn with matplotlib
        meta: build it on the meta device, then `materialize_`

    Returns:
        The status to exit with: 0; 1 if a tensor is unwritten or not as expected; 2 if there is no
        such model, or no matplotlib.
    """
    try:
        if plot is not None:
            inspect_plot.figure()
        model, report = build(target, seed, meta)
        lines = lines_of(report)
        print("\n".join(text(report, lines, padding_of(model))))
        if plot is not None:
            inspect_plot.draw(lines, plot, f"{type(model).__name__} of {target}")
            print(f"Distributions: {plot}")
    except Refused as refused:
        if refused.__cause__ is not None:
            traceback.print_exception(refused.__cause__)
        print(f"fastinit inspect: {refused}", file=sys.stderr)
        return 2
    wrong = any(line.off or line.is_unwritten for line in lines)
    return 1 if wrong else 0


# ---- the model -----------------------------------------------------------------------------------


def build(target: str, seed: int | None, meta: bool) -> tuple[nn.Module, Report]:
    """Call a factory. Raises Refused."""
    factory = _factory(target)
    try:
        if meta:
            with torch.device("meta"):
                model = factory()
        else:
            with fused(seed=seed, watch=True) as report:
                model = factory()
    except Exception as error:
        raise Refused(f"{target} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise Refused(f"{target} returned an object of type {type(model).__name__}, not a module")
    if meta:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\d+ tensors were not initialised")  # it is printed
            report = materialize_(model, seed=seed)
    return model, report


def _factory(target: str) -> Callable[[], object]:
    name, _, path = target.partition(":")
    if not name or not path:
        raise Refused(f"{target!r} is not module:factory, as in torchvision.models:resnet50")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise Refused(f"{name} cannot be imported: {error}") from error
        hint = f" (a module, not a file: {name[:-3]})" if name.endswith(".py") else ""
        raise Refused(f"there is no module {error.name}, here or installed{hint}") from None
    except Exception as error:
        raise Refused(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        found = functools.reduce(getattr, path.split("."), found)
    except AttributeError as error:
        raise Refused(f"{target}: {error}") from None
    if isinstance(found, nn.Module):
        raise Refused(f"{target} is a module that has been built already; name what builds it")
    if not callable(found):
        raise Refused(f"{target} is an object of type {type(found).__name__}, not what builds one")
    with suppress(ValueError):  # no signature
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise Refused(f"{target}: {error}; name something that takes no arguments") from None
    return found


# ---- the table -----------------------------------------------------------------------------------


@dataclass
class Line:
    """Tensors whose names differ only in numbers, and that were filled alike."""

    row: Row  # of the first
    parts: tuple[Part, ...] | None  # what is expected
    names: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    found: list[Measured | None] = field(default_factory=list)
    z: list[float] = field(default_factory=list)  # how far they are off

    @property
    def is_unwritten(self) -> bool:
        return self.row.status == "unwritten"

    @property
    def off(self) -> list[int]:
        return [i for i, z in enumerate(self.z) if z > MOST]

    def add(self, name: str, t: Tensor) -> None:
        self.names.append(name)
        self.tensors.append(t)
        self.found.append(None if self.is_unwritten else measure(t))
        known = None if self.parts is None else Expected.of(self.parts)
        self.z.append(known.z(self.found[-1], t.dtype) if known and self.found[-1] else -1.0)

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the line; of several tensors it shows the one farthest off."""
        row, n, off = self.row, len(self.names), len(self.off)
        several = (f"{n} x", _pattern(row.name), _pattern(row.key))
        count, name, key = several if n > 1 else ("", row.name, row.key)
        z, found = max(zip(self.z, self.found), key=lambda pair: pair[0])
        want = self.parts and Expected.of(self.parts)
        shape = "x".join(map(str, row.shape)) or "scalar"
        both = [(_short(x.mean), _short(x.std)) if x else ("", "") for x in (found, want)]
        numbers = (*(x for pair in zip(*both) for x in pair), f"{z:.1f}" if z >= 0 else "")
        mark = f"{off} OFF" if off and n > 1 else "OFF" if off else ""
        rule = ", ".join(row.written_by) or ("UNWRITTEN" if self.is_unwritten else "(as made)")
        key = "" if key == name else key
        return count, name, shape, str(row.dtype)[6:], key, *numbers, mark, rule


def lines_of(report: Report) -> list[Line]:
    """Every parameter and buffer, tied ones once, measured."""
    rows = {row.name: row for row in report.rows()}
    seen: set[int] = set()
    storages: dict[int, Row] = {}  # several tensors may be parts of one
    lines: dict[object, Line] = {}
    for name, t in report.named_tensors():
        if id(t) in seen or nn.parameter.is_lazy(t):
            continue
        seen.add(id(t))
        kind = "parameter" if isinstance(t, nn.Parameter) else "buffer"
        status = "unwritten" if name in report.unwritten or t.is_meta else "written"
        row, begin = Row(name, tuple(t.shape), t.dtype, (), kind, "", status, ()), 0
        known = rows.get(name)
        if geometry.is_plain(t) and not t.is_meta:
            begin = int(t.storage_offset()) * t.element_size()
            known = known or storages.get(geometry.storage_id(t))
            if known is not None:
                storages.setdefault(geometry.storage_id(t), known)
        if known is not None:
            row = row._replace(written_by=known.written_by, key=known.key, laws=known.laws)
        parts = parts_of(row.laws, row.shape, row.dtype, begin)
        like = row._replace(name=_pattern(name), key=_pattern(row.key), laws=()), parts
        lines.setdefault(like, Line(row, parts)).add(name, t)
    return list(lines.values())


_HEADS = (
    "",
    "tensor",
    "shape",
    "dtype",
    "key",
    "mean",
    "expected",
    "std",
    "expected",
    "z",
    "",
    "written by",
)
_RIGHT = (0, 5, 6, 7, 8, 9)


def padding_of(model: nn.Module) -> list[str]:
    """Return the rows that stand for padding and are not zero."""
    found = []
    for path, m in model.named_modules():
        row, weight = getattr(m, "padding_idx", None), getattr(m, "weight", None)
        if type(row) is not int or not geometry.is_plain(weight) or weight.is_meta:
            continue
        if -len(weight) <= row < len(weight) and bool(weight[row].any()):
            found.append(f"{path}.weight[{row}]".lstrip("."))
    return found


def text(report: Report, lines: list[Line], padding: list[str]) -> Iterator[str]:
    """Yield the lines that are printed."""
    for sentence in table.head(report, [row for row in report.rows() if row.name]):
        yield from textwrap.wrap(sentence, 100)
    width = shutil.get_terminal_size((1000, 24)).columns  # that of a file is no matter
    yield from columns([_HEADS, *(line.cells() for line in lines)], _RIGHT, width)
    off = [line.names[i] for line in lines for i in line.off]
    unwritten = [name for line in lines if line.is_unwritten for name in line.names]
    for title, names in (
        (f"Off by more than {MOST:g} standard errors", off),
        ("Never written", unwritten),
        (table.LOST, table.lost(report)),
        ("Rows for padding that are not zero", padding),
        ("Filled more than once", report.repeated),
        ("Tied", [" = ".join(names) for names in report.tied]),
        ("Kept as they were", report.kept),
        ("Drawn from torch's generators, whatever the seed", sorted(report.foreign)),
    ):
        if names:
            yield from textwrap.wrap(f"{title}: {_listed(names)}", min(width, 100))
    n = sum(len(line.names) for line in lines)
    known = sum(len(line.names) for line in lines if line.parts is not None)
    yield (
        f"{n} tensors: {known - len(off)} as expected, {len(off)} off, {len(unwritten)} unwritten, "
        f"{n - known - len(unwritten)} that no rule describes."
    )


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _listed(names: Iterable[str]) -> str:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_pattern(name), []).append(name)
    shown = [g[0] if len(g) == 1 else f"{len(g)} x {pattern}" for pattern, g in groups.items()]
    return ", ".join(shown[:20] + [f"and {len(shown) - 20} more"] * (len(shown) > 20))


def _short(x: float) -> str:
    return f"{x:.4g}" if x == 0 or abs(x) >= 1e-3 else f"{x:.1e}"
