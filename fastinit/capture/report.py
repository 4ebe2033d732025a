# SPDX-License-Identifier: BSD-3-Clause
"""What a fused() block recorded, wrote and left out; who asked for it and who could not wait."""

from __future__ import annotations

import gc
import math
import os
import re
import shutil
import sys
import textwrap
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastinit.capture.names import named_tensors
from fastinit.core import geometry, progress, shard
from fastinit.core.fill import Fill

_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
_FUNCTIONS_OF = frozenset((nn.init.__file__, os.path.join(_HERE, "init.py")))
_SHOWN = ("a", "b", "mean", "std", "val", "gain", "mode", "nonlinearity", "sparsity", "groups")
_MOST_LINES = 1000  # kept in `early`


class Early(NamedTuple):
    """Fills that had to be written before the end of the block."""

    operator: str  # what read or partly overwrote them
    line: str  # of the code that made it do so, file:number
    elements: int


class Row(NamedTuple):
    """One tensor and the calls, in their order, that wrote what is in it."""

    name: str  # of the parameter or buffer; "" if no module holds it any more
    shape: tuple[int, ...]  # without a module: the number of elements
    dtype: torch.dtype
    written_by: tuple[str, ...]
    kind: str  # "parameter", "buffer" or, without a name, ""
    key: str  # of the keyed stream: a name, or "#" and a number; "": torch's numbers
    status: str  # "written"; "unwritten": nobody has; "kept": a buffer as it was before
    laws: tuple[Written, ...]


class Written(NamedTuple):
    """A fill that was done, without what it needed for that."""

    op: str
    a: float
    b: float
    items: int
    dtype: torch.dtype
    extent: tuple[int, int]
    caller: tuple[str, tuple[tuple[str, object], ...]] | None
    bounds: tuple[float, float] | None = None  # of trunc_normal_
    scale: float = 0.0  # orthogonal_: gain
    key: str = ""

    @classmethod
    def of(cls, fill: Fill) -> Written:
        bounds, scale, key = fill.bounds, fill.scale, ""
        if fill.law is not None:
            key = fill.owner[1] if isinstance(fill.owner, tuple) and fill.law.is_random else ""
            bounds = fill.law.numbers[2:4] if fill.op == "trunc_normal" else None
            scale = fill.law.numbers[0]
        dtype = fill.tensor.dtype
        extent, caller = fill.extent, fill.caller
        return cls(fill.op, fill.a, fill.b, fill.items, dtype, extent, caller, bounds, scale, key)

    @classmethod
    def small(cls, t: Tensor, op: str, a: float, b: float, caller: Any) -> Written:
        """What is not worth a fill."""
        return cls(op, a, b, t.numel(), t.dtype, geometry.in_storage(t), caller)


class _Memory(Protocol):
    @property
    def key(self) -> int: ...
    def is_dead(self) -> bool: ...
    @property
    def written(self) -> list[Written]: ...
    @property
    def touched(self) -> bool: ...
    @property
    def asked(self) -> int: ...


@dataclass
class Report:
    """What happened in a block, counted in elements. `print` it for a table."""

    recorded_elements: int = 0  # of fills that could wait, copies of them included
    written_elements: int = 0  # of those, what was written
    dropped_elements: int = 0  # and what was overwritten or freed before anybody read it
    at_once_elements: int = 0  # of large fills that could not wait, done natively when asked for
    bytes: int = 0  # written by fills that waited
    seconds: float = 0.0  # spent on writing them
    early: list[Early] = field(default_factory=list)
    reason: str = ""  # why nothing was captured, if so
    threads: set[str] = field(default_factory=set)  # whose running kept fills from waiting
    unwritten: list[str] = field(default_factory=list)  # names of what nobody initialised
    repeated: list[str] = field(default_factory=list)  # of what was asked to be filled twice
    tied: list[tuple[str, ...]] = field(default_factory=list)  # names of one tensor each
    kept: list[str] = field(default_factory=list)  # of buffers that are as they were
    foreign: set[str] = field(default_factory=set)  # operators that drew from torch's generators
    progress: bool = False  # show a bar while writing what waited until the end
    prefix: str = ""  # of all names
    is_about_models: bool = False  # and not about what else the block makes
    is_about_new: bool = False  # tensors of these; others are left as they are
    # Models it is about and what is put before their names; none: whatever the block made.
    roots: list[tuple[weakref.ref[nn.Module], str]] = field(default_factory=list, repr=False)
    held: int = 0  # things that modules have got
    registered: set[int] = field(default_factory=set, repr=False)  # of them, single elements
    _memories: list[_Memory] = field(default_factory=list, repr=False)
    _modules: dict[int, weakref.ref[nn.Module]] = field(default_factory=dict, repr=False)

    # ---- what capture.py tells -----------------------------------------------------------------

    def record(self, fill: Fill) -> None:
        self.recorded_elements += fill.items

    def drop(self, fills: Iterable[Fill]) -> None:
        self.dropped_elements += sum(f.items for f in fills)

    def at_once(self, fill: Fill) -> None:
        self.at_once_elements += fill.items

    def close(self, memories: Iterable[_Memory], ours: Collection[int]) -> None:
        """The block is over: what its tensors are now is what is reported of them."""
        memories = list(memories)
        self._memories += [m for m in memories if m.written]
        seen = {m.key: m for m in memories}
        about = self.is_about_models
        if not about and len(self._outermost()) > 1:
            gc.collect()  # or a model that nobody holds would count as the first
        groups: dict[int, list[str]] = {}
        for name, t in self.named_tensors():
            if id(t) in groups:
                groups[id(t)].append(name)
                continue
            groups[id(t)] = [name]
            here = t if type(t) is nn.Parameter else shard.local(t)
            if not _has_storage(here):
                continue
            memory = seen.get(geometry.storage_id(here))
            if memory is not None and memory.touched:  # most are
                if memory.asked > 1:
                    self.repeated.append(name)
                continue
            if here.is_meta or here.numel() == 0:
                continue
            seen_before = self.is_about_new or geometry.storage_id(here) in ours
            if memory is None and not (about and seen_before):
                continue  # made by something else than `empty`
            is_kept = about and memory is None and not isinstance(t, nn.Parameter)
            is_kept |= self.is_about_new and memory is None
            (self.kept if is_kept else self.unwritten).append(name)
        self.tied += [tuple(names) for names in groups.values() if len(names) > 1]

    def check(self) -> None:
        """Raise RuntimeError if something holds whatever was in its memory before.

        After `init_model_` these are parameters that its function did not write; after
        `materialize_` whatever is still on the meta device.
        """
        if self.reason:
            raise RuntimeError(f"nothing was captured: {self.reason}")
        if self.unwritten:
            names = ", ".join(self.unwritten[:10])
            more = f" and {len(self.unwritten) - 10} more" if len(self.unwritten) > 10 else ""
            raise RuntimeError(
                f"{len(self.unwritten)} tensors were never initialised: {names}{more}"
            )

    @contextmanager
    def writing(self, fills: list[Fill], reader: object) -> Iterator[Callable[[int], object]]:
        """Around the writing of fills; what it gives is told how many elements are done."""
        elements = sum(f.items for f in fills)
        if reader is not None and elements and len(self.early) < _MOST_LINES:
            self.early.append(Early(str(reader), _line(), elements))
        bar = None
        if self.progress and reader is None:
            bar = progress.bar(elements, "elements", unit_scale=True, desc="fastinit")
        start = time.perf_counter()
        try:
            yield (lambda n: None) if bar is None else bar.update
            self.written_elements += elements
            self.bytes += sum(f.items * f.tensor.element_size() for f in fills)
        finally:
            self.seconds += time.perf_counter() - start
            if bar is not None:
                bar.close()

    # ---- names ---------------------------------------------------------------------------------

    def hold(self, module: nn.Module, name: str, value: object) -> None:
        """A module got a parameter, a buffer or a child."""
        known = self._modules.get(id(module))
        if known is None or known() is not module:
            self._modules.pop(id(module), None)  # of one that died, whose place was earlier
            self._modules[id(module)] = weakref.ref(module)
        self.held += 1
        if isinstance(value, Tensor) and _has_storage(value) and value.numel() == 1:
            self.registered.add(geometry.storage_id(value))

    def named_tensors(self, final: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Of the models it is about, and then of the outermost modules of the block in the order
        they were made; where there are several, all but the first have a number before their names.

        `final`: not before the end, when these are known.
        """
        for ref, prefix in self.roots:
            model = ref()
            if model is not None:
                yield from ((name, t) for name, _, _, t in named_tensors(model, prefix))
        for i, m in enumerate(self._outermost() if final and not self.is_about_models else ()):
            for name, _, _, t in named_tensors(m, self.prefix + (f"~{i}." if i else "")):
                yield name, t

    def _outermost(self) -> list[nn.Module]:
        modules = [m for m in (ref() for ref in self._modules.values()) if m is not None]
        inner = {id(child) for m in modules for child in m.children()}
        return [m for m in modules if id(m) not in inner]

    def _names(self) -> dict[int, tuple[str, Tensor]]:
        """Storage -> name and tensor, from the outermost modules that are still there."""
        names: dict[int, tuple[str, Tensor]] = {}
        for name, t in self.named_tensors():
            here = shard.local(t)
            if _has_storage(here):
                names.setdefault(geometry.storage_id(here), (name, t))
        return names

    def rows(self) -> list[Row]:
        """Every tensor that was filled while it could wait, and still exists."""
        names = self._names()
        rows = []
        for m in self._memories:
            if m.is_dead():
                continue
            name, t = names.get(m.key, ("", None))
            fill = m.written[-1]
            shape = tuple(t.shape) if t is not None else (fill.items,)
            calls = tuple(_call(f, shape) for f in m.written)
            kind = "" if t is None else "parameter" if isinstance(t, nn.Parameter) else "buffer"
            keys = ", ".join({f.key: None for f in m.written if f.key})
            rows.append(Row(name, shape, fill.dtype, calls, kind, keys, "written", (*m.written,)))
        shown = {row.name for row in rows}
        missing = dict.fromkeys(self.unwritten, "unwritten") | dict.fromkeys(self.kept, "kept")
        for name, t in names.values():
            if name not in shown and t.numel() != 0:
                kind = "parameter" if isinstance(t, nn.Parameter) else "buffer"
                status = missing.get(name, "written")
                rows.append(Row(name, tuple(t.shape), t.dtype, (), kind, "", status, ()))
        order = {name: i for i, (name, _) in enumerate(names.values())}
        return sorted(rows, key=lambda row: order.get(row.name, len(order)))

    def _table(self) -> Iterator[tuple[str, ...]]:
        """Layers that differ by numbers in their names only share a line."""
        groups: dict[Row, list[str]] = {}
        for row in self.rows():
            pattern = row._replace(name=re.sub(r"\d+", "*", row.name), key="", laws=())
            groups.setdefault(pattern, []).append(row.name)
        for row, names in groups.items():
            n = len(names)
            yield (
                *(f"{n} x " if n > 1 else "", (row.name if n > 1 else names[0]) or "(unnamed)"),
                *("x".join(map(str, row.shape)) or "scalar", str(row.dtype)[6:]),
                ", ".join(row.written_by) or _WITHOUT_CALLS[row.status],
            )

    def __str__(self) -> str:
        if self.reason:
            return f"Nothing was captured: {self.reason}."
        width = max(60, shutil.get_terminal_size((100, 24)).columns)
        lines = [
            f"{_count(self.recorded_elements)} elements recorded: "
            f"{_count(self.written_elements)} written ({self.bytes / 2**20:,.0f} MiB in "
            f"{self.seconds * 1e3:,.1f} ms), {_count(self.dropped_elements)} left out because "
            "they were overwritten or freed unread.",
        ]
        if self.at_once_elements:
            lines.append(f"{_count(self.at_once_elements)} more filled natively when asked for.")
        if self.threads:
            names = ", ".join(sorted(self.threads))
            lines.append(f"Nothing waited while threads started in the block were running: {names}")
        lines = [part for line in lines for part in textwrap.wrap(line, width)]
        lines += _columns([("", "tensor", "shape", "dtype", "written by"), *self._table()], width)
        for title, found in (
            ("Never initialised", self.unwritten),
            ("Buffers that are as they were", self.kept),
            ("Filled more than once, written once", self.repeated),
            ("Tied", [" = ".join(names) for names in self.tied]),
            ("Drawn from torch's generators, whatever the seed", sorted(self.foreign)),
        ):
            if found:
                more = [f"and {len(found) - 10} more"] if len(found) > 10 else []
                lines += textwrap.wrap(f"{title}: {', '.join([*found[:10], *more])}", width)
        early: Counter[tuple[str, str]] = Counter()
        for e in self.early:
            early[e.operator, e.line] += e.elements
        if early:
            lines.append("Written before the end, since something read or changed it:")
            for (operator, line), elements in early.most_common(10):
                lines.append(f"  {_count(elements):>8}  {operator} at {line}"[:width])
        return "\n".join(lines)


_WITHOUT_CALLS = {"written": "(as it was made)", "unwritten": "UNWRITTEN", "kept": "KEPT"}


def _has_storage(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided


def _count(n: int) -> str:
    return f"{n:,}" if n < 10_000_000 else f"{n / 1e6:,.1f} M"


def _columns(rows: list[tuple[str, ...]], width: int) -> list[str]:
    """Aligned; the second is cut at its front so that a third of the width is left for the last."""
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


# ---- who asked ---------------------------------------------------------------------------------


def caller() -> tuple[str, tuple[tuple[str, Any], ...]] | None:
    """The outermost function of torch.nn.init on the stack and its plain arguments."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_HERE):
        if frame.f_code.co_filename in _FUNCTIONS_OF:
            break
        frame = frame.f_back
    found = None
    while frame is not None and frame.f_code.co_filename in _FUNCTIONS_OF:
        if frame.f_code.co_name[0] != "_":
            found = frame
        frame = frame.f_back
    if found is None:
        return None
    code, values = found.f_code, found.f_locals
    names = [n for n in code.co_varnames[: code.co_argcount] if n in _SHOWN]
    plain = [(n, values[n]) for n in names if type(values[n]) in (int, float, str, bool)]
    return code.co_name, tuple(plain)  # no tensors, which would live as long as the report


def _line() -> str:
    """Of the innermost frame that belongs neither to torch nor to fastinit."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_HERE, _TORCH, "<")) and os.sep + "contextlib.py" not in name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def _call(fill: Written, shape: tuple[int, ...]) -> str:
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
