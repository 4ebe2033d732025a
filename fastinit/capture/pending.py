# SPDX-License-Identifier: BSD-3-Clause
"""The storages that a scope knows, what waits in each, and the order in which it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastinit.capture.waiting import Chain, KeyedFill, Step, Waiting
from fastinit.capture.written import Written, named
from fastinit.core import geometry, shard, torch_api
from fastinit.core.fill import Drawn
from fastinit.core.geometry import is_plain, storage_id

if TYPE_CHECKING:
    from fastinit.capture.report import Report

_MOST_PARTS = 1024  # pending keyed fills of one storage
_MOST_STATES = 2048  # pending random fills, each with 5 KB of generator state
_MOST_LAYERS = 64  # pending fills of one storage
_MOST_STEPS = 64  # operators of one chain
_MOST_CALLS = 64  # small calls for one storage until they are looked at


class SmallCall(NamedTuple):
    """A call of a function of torch.nn.init that was left to torch."""

    function: str
    args: tuple[object, ...]
    begin: int  # first byte in the storage
    items: int
    dtype: torch.dtype


class Memory:
    """A storage, what waits in it, and what is known of its past."""

    __slots__ = (
        "fills",
        "label",
        "may_wait",
        "nbytes",
        "overwrites",
        "storage_id",
        "touched",
        "weak",
        "written",
    )

    def __init__(self, tensor: Tensor, may_wait: bool) -> None:
        self.storage_id = storage_id(tensor)
        # As long as it lives, no other storage gets this id.
        storage = geometry.storage_of(tensor)
        self.weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.nbytes = storage.nbytes()  # what resizes it exposes it first
        self.may_wait = may_wait  # nobody reads it but by operators and hooks
        self.fills: list[Waiting] = []  # in the order in which they were asked for
        self.written: list[Written] = []  # for the report
        self.label = ""  # takes the place of a name in the keyed stream: "#" and a number
        self.touched = False  # by anything that writes
        self.overwrites = 0  # fills that overwrote the whole storage

    def storage(self) -> torch.UntypedStorage | None:
        """Return the storage if it lives."""
        return torch_api.storage_of_weak(self.weak.cdata)

    def is_dead(self) -> bool:
        return bool(self.weak.expired())  # type: ignore[no-untyped-call]

    def says_all(self) -> bool:
        """Return whether what waits is all that will be there, and as cheap to do as to copy."""
        if not self.fills or any(fill.op == "orthogonal" for fill in self.fills):
            return False
        first = self.fills[0]
        return first.is_dense and first.extent == (0, self.nbytes)

    def note(self, new: Written, dense: bool) -> None:
        """Remember a fill that has been written, and forget those it covers."""
        begin, end = new.extent
        last = self.written[-1] if self.written else None
        if new.op == "sparse_mask" and last is not None and last.caller == new.caller:
            self.written[-1] = last._replace(op="sparse")  # its other half
            return
        if dense or last == new:
            kept = (w for w in self.written if w.extent[0] < begin or end < w.extent[1])
            self.written = list(kept)
        self.written.append(new)

    def note_calls(self, calls: Iterable[SmallCall]) -> None:
        """Remember what torch wrote, before what came later is remembered."""
        for function, args, begin, items, dtype in calls:
            self.touched = True
            extent = (begin, begin + items * dtype.itemsize)
            self.overwrites += extent == (0, self.nbytes)
            how = Written(function, 0.0, 0.0, items, dtype, extent, named(function, args))
            self.note(how, True)

    def settled(self) -> None:
        """Remember that all that waited has been written."""
        for fill in self.fills:
            for i, done in enumerate(_done(fill)):
                self.note(done, fill.is_dense and i == 0)
        self.fills = []


def _done(fill: Waiting) -> list[Written]:
    """Return what is remembered of what waited, now that it is written."""
    if isinstance(fill, Drawn):
        return [Written.of(fill)]
    if isinstance(fill, KeyedFill):
        return [fill.written()]
    if isinstance(fill, Chain):
        how = (0.0, 0.0, fill.items, fill.dtype, fill.extent, None)
        return [Written(step.operator._schema.name[6:], *how) for step in fill.steps]
    scale = fill.dtype.itemsize / fill.source_dtype.itemsize
    done = [w for source in fill.source for w in _done(source)]
    return [
        w._replace(dtype=fill.dtype, extent=(int(w.extent[0] * scale), int(w.extent[1] * scale)))
        for w in done
    ]


def is_all(t: Tensor) -> bool:
    """Return whether a tensor is all of its storage, in order."""
    if not t.is_contiguous() or t.is_neg() or t.is_conj():
        return False
    return t.numel() * t.element_size() == geometry.storage_of(t).nbytes()


class Stock(NamedTuple):
    """What a scope leaves to its report."""

    known: dict[int, Memory]  # by storage id
    ours: frozenset[int]  # storages of the model that the report is about
    calls: dict[int, list[SmallCall]]  # by storage id; not yet noted

    def memories(self) -> dict[int, Memory]:
        """Return the storages, with all that is remembered of them."""
        for key in tuple(self.calls):
            self.known[key].note_calls(self.calls.pop(key))
        return self.known


Stage = list[tuple[Waiting, torch.UntypedStorage]]


class Pending:
    """What waits in one scope.

    Args:
        report: counts it
        write: writes a stage, of which no two may overlap
        of_any_size: even small fills are worth a record
    """

    def __init__(self, report: Report, write: Callable[[Stage], None], of_any_size: bool) -> None:
        self._report, self._write, self._of_any_size = report, write, of_any_size
        self.known: dict[int, Memory] = {}  # by storage id, as long as they live
        self.filled: dict[int, Memory] = {}  # those in which something waits
        self._states = 0  # pending random fills, at most
        # Storages of the caller's tensors, which may wait though they are older. Those not yet
        # filled are held, so that none gets another's id.
        self._adoptable: dict[int, torch.UntypedStorage] = {}
        # Tensors of the model that the report is about, by storage id; held, so that no other
        # storage gets one.
        self._ours: dict[int, Tensor] = {}
        self._calls: dict[int, list[SmallCall]] = {}  # by storage id
        self._purge_at = 1024  # entries of `known`

    # ---- which may wait --------------------------------------------------------------------------

    def adopt(self, t: Tensor, may_wait: bool = True) -> Memory | None:
        """Know a tensor's storage; what is written there `may_wait`, as nobody else knows it."""
        if not (is_plain(t) and t.numel() != 0 and geometry.is_here(t)):
            return None
        memory = self.known.get(storage_id(t))
        if memory is None:
            memory = self.known[storage_id(t)] = Memory(t, may_wait)
            if len(self.known) > self._purge_at:
                self.purge()
        return memory

    def adopt_all(self, tensors: Iterable[Tensor]) -> None:
        """Do the same for many tensors, most of which will be filled."""
        for t in tensors:
            here = t if type(t) in geometry.PLAIN else shard.local(t)
            if is_plain(here):
                key = storage_id(here)
                self._ours[key] = here
                waits = here.numel() > 0 if self._of_any_size else geometry.may_be_worth(here)
                if waits and geometry.is_here(here):
                    self._adoptable[key] = geometry.storage_of(here)

    def adopt_no_more(self) -> None:
        self._adoptable.clear()

    def knows(self, t: Tensor) -> bool:
        key = storage_id(t)
        return key in self.known or key in self._adoptable

    def find(self, t: object) -> Memory | None:
        """Return the storage of a plain tensor, if its fills may wait."""
        memory = self.find_known(t)
        return memory if memory is not None and memory.may_wait else None

    def find_known(self, t: object) -> Memory | None:
        """Return the storage of a plain tensor, whether it may wait or not."""
        if not is_plain(t):
            return None
        key = storage_id(t)
        memory = self.known.get(key)
        if memory is None and self._adoptable and self._adoptable.pop(key, None) is not None:
            memory = self.known[key] = Memory(t, True)
        return memory

    def purge(self) -> None:
        """Forget storages that have died."""
        for memory in [m for m in self.known.values() if m.is_dead()]:
            del self.known[memory.storage_id]
            self._calls.pop(memory.storage_id, None)
            self.forget(memory)
        self._purge_at = max(1024, 2 * len(self.known))

    # ---- what is known of their past -------------------------------------------------------------

    def wrote(self, t: Tensor, how: Written | None = None, overwrites: bool = True) -> None:
        """Note that something has been written otherwise than by what waits."""
        here = shard.local(t)
        if not is_plain(here) or here.is_nested:
            return
        memory = self.find_known(here)
        if memory is None and storage_id(here) in self._ours:
            memory = self.known[storage_id(here)] = Memory(here, False)
        if memory is not None:
            memory.touched = True
            if self._calls:
                memory.note_calls(self._calls.pop(memory.storage_id, ()))
            if how is not None:
                whole = how.items * here.element_size() == how.extent[1] - how.extent[0]
                if overwrites and whole:
                    memory.overwrites += how.extent == (0, memory.nbytes)
                memory.note(how, whole and overwrites)

    def notes(self, t: Tensor) -> bool:
        """Return whether it matters what torch writes to a plain tensor."""
        key = storage_id(t)
        return key in self.known or key in self._ours

    def is_garbage(self, t: object) -> bool:
        """Return whether nobody has written to a tensor's memory yet."""
        memory = self.known.get(storage_id(t)) if is_plain(t) else None
        return memory is not None and not memory.touched

    def called(self, t: Tensor, function: str, args: tuple[object, ...]) -> None:
        """Note that torch is about to do a small call for a plain tensor, if it matters."""
        key = storage_id(t)
        if key in self.known or key in self._ours:
            begin = int(t.storage_offset()) * t.element_size()
            if key in self.known:
                self.known[key].touched = True
            how = SmallCall(function, args, begin, t.numel(), t.dtype)
            calls = self._calls.setdefault(key, [])
            calls.append(how)
            if len(calls) > _MOST_CALLS:
                self._known(key).note_calls(self._calls.pop(key))

    def _known(self, key: int) -> Memory:
        """Return a storage that is known or the model's."""
        if key not in self.known:
            self.known[key] = Memory(self._ours[key], False)
        return self.known[key]

    def close(self) -> Stock:
        """Return what is known at the end of the scope, without what could keep tensors alive."""
        for key in self._calls:
            self._known(key)
        stock = Stock(self.known, frozenset(self._ours), self._calls)
        self._ours, self._calls = {}, {}
        return stock

    # ---- order -----------------------------------------------------------------------------------

    def push(self, memory: Memory, fill: Waiting) -> None:
        """Let a fill wait behind what waits there; what it overwrites is dropped."""
        self._report.recorded_elements += fill.items
        memory.touched = True
        if fill.is_dense:
            if fill.extent == (0, memory.nbytes):
                memory.overwrites += 1
            if memory.fills:
                self.overwrite(memory, fill.extent)
        memory.fills.append(fill)
        self.filled[memory.storage_id] = memory
        most = _MOST_PARTS if isinstance(fill, KeyedFill) else _MOST_LAYERS
        if len(memory.fills) > most:
            self.settle(f"more than {most} fills of one tensor", [memory])
        if isinstance(fill, Drawn) and isinstance(fill.state, Tensor):
            self._states += 1
            if self._states > _MOST_STATES:
                self._count_states()

    def push_step(self, memory: Memory, t: Tensor, step: Step) -> bool:
        """Let a pointwise operator wait behind what waits there; return whether it can."""
        new = Chain.of(t, step)
        last = memory.fills[-1]
        if isinstance(last, Chain) and last.box == new.box and last.dtype is new.dtype:
            if len(last.steps) >= _MOST_STEPS:
                return False
            new.steps = (*last.steps, step)
            memory.fills[-1] = new  # not in place: copies share the old one
        else:
            self.push(memory, new)
        return True

    def _count_states(self) -> None:
        waiting = (f for m in self.filled.values() for f in m.fills if isinstance(f, Drawn))
        self._states = sum(isinstance(f.state, Tensor) for f in waiting)
        if self._states > _MOST_STATES // 2:
            self.settle(f"more than {_MOST_STATES // 2} random fills waiting")
            self._states = 0

    def overwrite(self, memory: Memory, by: tuple[int, int]) -> None:
        """Drop what lies between these bytes."""
        begin, end = by
        kept = []
        for fill in memory.fills:
            if begin <= fill.extent[0] and fill.extent[1] <= end:
                self._drop(memory, fill)
            else:
                kept.append(fill)
        memory.fills = kept

    def forget(self, memory: Memory) -> None:
        """Drop all that waits in a storage."""
        for fill in memory.fills:
            self._drop(memory, fill)
        memory.fills = []
        self.filled.pop(memory.storage_id, None)

    def _drop(self, memory: Memory, fill: Waiting) -> None:
        self._report.dropped_elements += fill.items
        for f in fills_of(fill):
            if isinstance(f, KeyedFill) and f.identity is not None:
                f.identity.leave(memory)

    # ---- writing ---------------------------------------------------------------------------------

    def settle(self, reader: object = None, memories: Sequence[Memory] | None = None) -> None:
        """Write all that waits, or what waits in some storages.

        States and fills are left as they are until all is written, so that it can be done again
        after an interruption.
        """
        chosen = list(self.filled.values()) if memories is None else memories
        todo: list[tuple[torch.UntypedStorage, Memory]] = []
        for memory in chosen:
            storage = memory.storage()
            if storage is None:
                self.forget(memory)
            else:
                todo.append((storage, memory))
        if not todo:
            return
        fills = [fill for _, memory in todo for fill in memory.fills]
        with self._report.writing(fills, reader) as done:
            for stage in stages_of((storage, m.fills) for storage, m in todo):
                for piece in pieces(stage, self._report.progress and reader is None):
                    self._write(piece)
                    done(sum(fill.items for fill, _ in piece))
        for _, memory in todo:
            if self._calls:
                memory.note_calls(self._calls.pop(memory.storage_id, ()))
            memory.settled()
            if reader is not None:
                memory.label = ""  # what is filled again has other numbers
            self.filled.pop(memory.storage_id, None)


def fills_of(waiting: Waiting) -> Sequence[Waiting]:
    """Return what waits, or what a cast has of it."""
    return waiting.source if hasattr(waiting, "source") else (waiting,)


def stages_of(
    todo: Iterable[tuple[torch.UntypedStorage, Sequence[Waiting]]],
) -> list[Stage]:
    """Return fills that overlap one after the other, all others together."""
    stages: list[Stage] = []
    for storage, fills in todo:
        levels: list[int] = []
        if len(fills) == 1 and stages:
            stages[0].append((fills[0], storage))
            continue
        for i, fill in enumerate(fills):
            begin, end = fill.extent
            before = zip(fills[:i], levels)
            below = [k for f, k in before if f.extent[0] < end and begin < f.extent[1]]
            level = 1 + max(below, default=-1)
            levels.append(level)
            if level == len(stages):
                stages.append([])
            stages[level].append((fill, storage))
    return stages


def pieces(stage: Stage, small: bool) -> Iterable[Stage]:
    """Return a stage at once, or in pieces so small that their progress can be shown."""
    if not small:
        return [stage]
    pieces: list[Stage] = [[]]
    items = 0
    for fill, storage in stage:
        if items > 1 << 24:
            pieces.append([])
            items = 0
        pieces[-1].append((fill, storage))
        items += fill.items
    return pieces
