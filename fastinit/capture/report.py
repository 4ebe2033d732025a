# SPDX-License-Identifier: BSD-3-Clause
"""What a fused() scope recorded, wrote and left out; who asked for it and who could not wait."""

from __future__ import annotations

import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastinit.capture import emptied, finding, table
from fastinit.capture.names import memory_of, named_tensors
from fastinit.capture.pending import Memory, Stock
from fastinit.capture.waiting import Waiting
from fastinit.capture.written import Written, line
from fastinit.core import geometry, progress, shard, torch_api
from fastinit.core.geometry import is_plain

_MOST_LINES = 1000  # kept in `early`
_METHODS = frozenset(("__init__", "reset_parameters", "_reset_parameters", "apply"))


class Early(NamedTuple):
    """Fills that had to be written before the end of the scope."""

    operator: str  # what read or partly overwrote them
    line: str  # of the code that made it do so, file:number
    elements: int


class Temporary(NamedTuple):
    """A fill of a tensor that no module has, as of what weight_norm computes from its parts."""

    function: str
    shape: tuple[int, ...]
    line: str  # of the code that asked for it, file:number


class Row(NamedTuple):
    """One tensor and the calls, in their order, that wrote what is in it."""

    name: str  # of the parameter or buffer; "" if no module holds it any more
    shape: tuple[int, ...]  # without a module: the number of elements
    dtype: torch.dtype
    written_by: tuple[str, ...]
    kind: str  # "parameter", "buffer" or, without a name, ""
    key: str  # of the keyed stream: a name, or "#" and a number; "": torch's numbers
    # "written"; "unwritten": nobody has; "kept": a buffer as it was before; "unseen": not watched
    status: str
    laws: tuple[Written, ...]


_STATUSES = ("unwritten", "unseen", "kept")


@dataclass
class _Stock:
    """What a report knows of tensors, by their names."""

    unwritten: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    tied: list[tuple[str, ...]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    temporaries: list[Temporary] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)


@dataclass
class Report:
    """What happened in a scope, counted in elements. `print` it for a table."""

    recorded_elements: int = 0  # elements of fills that could wait, copies included
    written_elements: int = 0  # those of them that were written
    dropped_elements: int = 0  # those overwritten or freed before anybody read them
    at_once_elements: int = 0  # of large fills that could not wait, done natively when asked for
    bytes: int = 0  # written by fills that waited
    seconds: float = 0.0  # spent on writing them
    early: list[Early] = field(default_factory=list)
    reason: str = ""  # why nothing was captured, if so
    threads: set[str] = field(default_factory=set)  # whose running kept fills from waiting
    foreign: set[str] = field(default_factory=set)  # operators that drew from torch's generators
    initialised_by: list[str] = field(default_factory=list)  # functions, for a whole model
    # What has numbers of a seed that no name gave it: by its name, or shape, the line of the code
    # that is why, and the reason.
    unnamed: dict[str, tuple[str, str]] = field(default_factory=dict)
    numbered: list[str] = field(default_factory=list)  # what no module has: a running number, shape
    progress: bool = False  # show a bar while writing what waited until the end
    prefix: str = ""  # of all names
    is_about_models: bool = False  # and not about what else the scope makes
    is_about_new: bool = False  # tensors of these; others are left as they are
    # Models it is about, what is put before their names, and left out; none: what the scope made.
    strip: str = ""  # from the beginning of names
    roots: list[tuple[weakref.ref[nn.Module], str, str]] = field(default_factory=list, repr=False)
    held: int = 0  # registrations seen; names are looked up again when it changes
    # Storages of single elements among what was registered.
    registered: set[int] = field(default_factory=set, repr=False)
    sees_all: bool = False  # from its beginning, small tensors included
    has_begun: bool = False  # to record
    # Storages that were filled and are no `empty`, their ids, whether autograd computed them.
    _filled: list[tuple[StorageWeakRef, int, bool, Temporary]] = field(
        default_factory=list, repr=False
    )
    _left: Stock | None = field(default=None, repr=False)
    _found: _Stock | None = field(default=None, repr=False)
    _modules: dict[int, weakref.ref[nn.Module]] = field(default_factory=dict, repr=False)

    # ---- what capture.py tells -----------------------------------------------------------------

    def begin(self) -> None:
        """Note the modules that are being made or initialised already, by the frames around."""
        frame: FrameType | None = sys._getframe(1)
        found: list[nn.Module] = []
        while frame is not None:
            code = frame.f_code
            if code.co_name in _METHODS and code.co_varnames[:1] == ("self",):
                module = frame.f_locals.get("self")
                if isinstance(module, nn.Module):
                    found.append(module)
            frame = frame.f_back
        for module in reversed(found):
            self.hold(module, "", None)

    def note_temporary(self, t: Tensor, function: str, is_result: bool) -> None:
        """Note that a tensor is filled which something else than `empty` has made."""
        if len(self._filled) < _MOST_LINES:
            weak = StorageWeakRef(geometry.storage_of(t))  # type: ignore[no-untyped-call]
            what = Temporary(function or "a fill", tuple(t.shape), line())
            self._filled.append((weak, geometry.storage_id(t), is_result, what))

    def close(self, left: Stock) -> None:
        """Note, at the end of the scope, what is known of its storages."""
        self._left = left

    @property
    def _stock(self) -> _Stock:
        """What is known of the scope's storages, and of the tensors that are in them now.

        It is looked up when it is asked for first: most reports are never read, and names of a
        thousand small layers take as long as the layers.
        """
        if self._left is None:  # the scope is not over yet
            return _Stock()
        if self._found is None:
            self._found = self._take_stock(self._left)
        return self._found

    def _take_stock(self, left: Stock) -> _Stock:
        stock, seen = _Stock(), left.memories()
        stock.memories = [m for m in seen.values() if m.written]
        groups: dict[int, list[str]] = {}
        for name, t in self.named_tensors(lazy=True):
            if id(t) in groups:
                groups[id(t)].append(name)
                continue
            groups[id(t)] = [name]
            found = [self._status(t, x, seen, left.ours) for x in memory_of(t)]
            status = next((s for s in _STATUSES if s in found), "written")
            if nn.parameter.is_lazy(t) or t.is_meta:
                status = "unwritten"
            if status != "written":
                getattr(stock, status).append(name)
            elif any(
                m is not None and m.overwrites > 1
                for m in (seen.get(geometry.storage_id(x)) for x in memory_of(t))
            ):
                stock.repeated.append(name)
        names = self._names() if self._filled else {}
        stock.temporaries += [
            what
            for weak, key, is_result, what in self._filled
            if key not in names and (is_result or weak.expired())  # type: ignore[no-untyped-call]
        ]
        stock.tied += [tuple(names) for names in groups.values() if len(names) > 1]
        return stock

    def _status(
        self, t: Tensor, here: Tensor, seen: dict[int, Memory], ours: frozenset[int]
    ) -> str:
        """Return what became of a tensor's memory, `here`."""
        memory = seen.get(geometry.storage_id(here))
        is_older = memory is None or memory.storage_id in ours
        if here.numel() == 0 or (memory is not None and memory.touched):
            return "written"
        if emptied.is_garbage(t) or (memory is not None and memory.is_noted and not is_older):
            return "unwritten"
        if self.is_about_new and is_older:
            return "kept"
        if self.is_about_models and geometry.storage_id(here) in ours:
            return "unwritten" if isinstance(t, nn.Parameter) else "kept"
        # What `empty` did not make has values, if all was seen; a version tells of a write.
        known = self.sees_all or t.is_inference() or t._version > 0 or here._version > 0
        return "written" if known else "unseen"

    @property
    def unwritten(self) -> list[str]:
        """Names of what nobody initialised."""
        return self._stock.unwritten

    @property
    def repeated(self) -> list[str]:
        """Names of what was filled twice."""
        return self._stock.repeated

    @property
    def tied(self) -> list[tuple[str, ...]]:
        """Names of one tensor each."""
        return self._stock.tied

    @property
    def kept(self) -> list[str]:
        """Names of buffers left as they were."""
        return self._stock.kept

    @property
    def temporaries(self) -> list[Temporary]:
        """Fills that no module has, by functions of torch.nn.init; all with watch or a seed."""
        return self._stock.temporaries

    def check(self) -> None:
        """Raise RuntimeError if something was never initialised, and name it.

        That is every parameter and buffer of the report's models that is still lazy or on the meta
        device, or in memory that nobody has written: made by an `empty` in the scope, or by
        `to_empty` since fastinit was imported. After `init_model_` it is also every parameter that
        its function left alone; buffers it left alone have values from before.

        A plain `fused()` begins to watch with its first fill of 32,768 elements (at once if there
        is something that `to_empty` made), and leaves small tensors alone: if there was no such
        fill, or something could be an `empty` that was not seen, this raises, too, and says so.
        With `fused(watch=True)`, or a seed, all is seen from the beginning. What is partly written
        counts as written, as does what somebody else may have written by its address.

        It also raises if nothing could be captured, if a seed's numbers depend on more than the
        names (`unnamed`), and before the scope is over.
        """
        if self.reason:
            raise RuntimeError(f"nothing was captured: {self.reason}")
        if self._left is None:
            raise RuntimeError("the scope is not over yet: ask its report afterwards")
        if self._found is None and any(ref() is None for ref, *_ in self.roots):
            raise RuntimeError("the model that the report is about does not exist any more")
        found = self.unwritten
        if found:
            raise RuntimeError(f"{len(found)} tensors were never initialised: {table.some(found)}")
        if self.unnamed:
            found = [f"{what} ({why}, {where})" for what, (where, why) in self.unnamed.items()]
            raise RuntimeError(
                f"{len(found)} tensors have numbers of the seed that depend on more than their "
                f"names: {table.some(found)}"
            )
        hint = "; fused(watch=True) sees everything"
        if not (self.has_begun or self.sees_all):
            raise RuntimeError(f"nothing was watched, as no fill was of 32,768 elements{hint}")
        found = self._stock.unseen
        if found:
            raise RuntimeError(
                f"{len(found)} tensors may be uninitialised, as nobody watched what made them: "
                f"{table.some(found)}{hint}"
            )

    def warn(self) -> None:
        """Warn of what has numbers of the seed that no name gave it, where the reason lies."""
        for name, (where, why) in self.unnamed.items():
            file, _, number = where.rpartition(":")
            warnings.warn_explicit(
                f"{name} {why}. Read it after the block, or call init_model_ with the seed when "
                "the model is complete.",
                UserWarning,
                file or "unknown",
                int(number) if number.isdigit() else 0,
            )

    @contextmanager
    def writing(self, fills: list[Waiting], reader: object) -> Iterator[Callable[[int], object]]:
        """Count and time the writing of fills, and show its progress.

        What the with block gets is told how many elements are done.
        """
        elements = sum(f.items for f in fills)
        if reader is not None and elements and len(self.early) < _MOST_LINES:
            self.early.append(Early(str(reader), line(), elements))
        bar = None
        if self.progress and reader is None:
            bar = progress.bar(elements, "elements", unit_scale=True, desc="fastinit")
        start = time.perf_counter()
        try:
            yield (lambda n: None) if bar is None else bar.update
            self.written_elements += elements
            self.bytes += sum(f.items * f.dtype.itemsize for f in fills)
        finally:
            self.seconds += time.perf_counter() - start
            if bar is not None:
                bar.close()

    # ---- names ---------------------------------------------------------------------------------

    def hold(self, module: nn.Module, name: str, value: object) -> None:
        """Note that a module got a parameter, a buffer or a child."""
        known = self._modules.get(id(module))
        if known is None or known() is not module:
            self._modules.pop(id(module), None)  # of one that died, whose place was earlier
            self._modules[id(module)] = weakref.ref(module)
        self.held += 1
        if isinstance(value, Tensor):
            with torch_api.DisableTorchFunction():
                if is_plain(value) and value.numel() == 1:
                    self.registered.add(geometry.storage_id(value))

    def named_tensors(self, lazy: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield names of the models it is about, then of the outermost modules the scope made.

        Of several of these all but the first have a number before their names.
        """
        for ref, prefix, strip in self.roots:
            model = ref()
            if model is not None:
                named = named_tensors(model, prefix, lazy, strip)
                yield from ((name, t) for name, _, _, t in named)
        for i, m in enumerate(() if self.is_about_models else self._outermost()):
            prefix = self.prefix + (f"~{i}." if i else "")
            for name, _, _, t in named_tensors(m, prefix, lazy, self.strip):
                yield name, t

    def has_several_models(self) -> bool:
        return not self.is_about_models and len(self._outermost()) > 1

    def _outermost(self) -> list[nn.Module]:
        found = [m for m in (ref() for ref in self._modules.values()) if m is not None]
        inner: set[int] = set()
        for m in found:
            if id(m) not in inner:
                inner.update(id(part) for part in m.modules() if part is not m)
            del m  # what counts references comes
        found = [m for m in found if id(m) not in inner]
        gone = finding.forgotten(found) if len(found) > 1 else ()
        return [m for m in found if id(m) not in gone]

    def _names(self) -> dict[int, tuple[str, Tensor]]:
        """Return name and tensor of each storage that a module still has."""
        names: dict[int, tuple[str, Tensor]] = {}
        for name, t in self.named_tensors():
            here = shard.local(t)
            if is_plain(here):
                names.setdefault(geometry.storage_id(here), (name, t))
        return names

    def names_of(self, memories: list[Memory]) -> list[str]:
        """Return names of what is in storages; of what no module holds its size in bytes."""
        names = self._names()
        unnamed = ("", None)
        return [names.get(m.storage_id, unnamed)[0] or f"({m.nbytes:,} bytes)" for m in memories]

    def rows(self) -> list[Row]:
        """Return every tensor that was filled while it could wait, and still exists."""
        names = self._names()
        rows = []
        for m in self._stock.memories:
            if m.is_dead():
                continue
            name, t = names.get(m.storage_id, ("", None))
            fill = m.written[-1]
            shape = tuple(t.shape) if t is not None else (fill.items,)
            calls = tuple(table.call(f, shape) for f in m.written)
            kind = "" if t is None else "parameter" if isinstance(t, nn.Parameter) else "buffer"
            keys = ", ".join({f.key: None for f in m.written if f.key})
            if name in self.unnamed:
                keys = "#" + keys.lstrip("#")
            rows.append(Row(name, shape, fill.dtype, calls, kind, keys, "written", (*m.written,)))
        shown = {row.name for row in rows}
        missing = {name: s for s in _STATUSES for name in getattr(self._stock, s)}
        for name, t in names.values():
            if name not in shown and t.numel() != 0:
                kind = "parameter" if isinstance(t, nn.Parameter) else "buffer"
                status = missing.get(name, "written")
                rows.append(Row(name, tuple(t.shape), t.dtype, (), kind, "", status, ()))
        order = {name: i for i, (name, _) in enumerate(names.values())}
        return sorted(rows, key=lambda row: order.get(row.name, len(order)))

    def __str__(self) -> str:
        return table.text(self)
