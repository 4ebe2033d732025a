# SPDX-License-Identifier: BSD-3-Clause
"""Storages whose fills wait, these fills, and the order in which they are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastinit.capture.names import Box, box_of
from fastinit.capture.written import Written
from fastinit.core import geometry, torch_api
from fastinit.core.fill import Caller, Drawn
from fastinit.core.laws import Law
from fastinit.core.shard import Slab


class Memory:
    """A storage whose fills may wait."""

    __slots__ = (
        "fills",
        "label",
        "nbytes",
        "overwrites",
        "storage_id",
        "touched",
        "weak",
        "written",
    )

    def __init__(self, tensor: Tensor) -> None:
        self.storage_id = geometry.storage_id(tensor)
        # As long as it lives, no other storage gets this id.
        storage = geometry.storage_of(tensor)
        self.weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.nbytes = storage.nbytes()  # what resizes it exposes it first
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

    def says_all(self, t: Tensor) -> bool:
        """Return whether what is pending is all of t's storage, and as cheap to do as to copy."""
        first = self.fills[0]
        if any(fill.op == "orthogonal" for fill in self.fills):
            return False
        return first.is_dense and first.extent == (0, geometry.storage_of(t).nbytes())

    def note(self, new: Written, dense: bool) -> None:
        """Remember a fill that has been written, and forget those it covers."""
        begin, end = new.extent
        if new.op == "sparse_mask" and self.written and self.written[-1].caller == new.caller:
            self.written[-1] = self.written[-1]._replace(op="sparse")  # its other half
            return
        if dense or self.written[-1:] == [new]:
            kept = (w for w in self.written if w.extent[0] < begin or end < w.extent[1])
            self.written = list(kept)
        self.written.append(new)

    def settled(self) -> None:
        """Remember that all pending fills have been written."""
        for fill in self.fills:
            how = (
                Written.of(fill.fill, fill.extent, fill.caller)
                if isinstance(fill, Drawn)
                else fill.written()
            )
            self.note(how, fill.is_dense)
        self.fills = []


# ---- fills of the keyed stream -------------------------------------------------------------------


class Identity:
    """What a keyed fill shares with its copies, which must get the same values."""

    __slots__ = ("label", "members")

    def __init__(self, memory: Memory, box: Box) -> None:
        self.label = ""  # that of the first member with a name, once some of it is written
        self.members = [(memory, box)]

    def leave(self, memory: Memory) -> None:
        at = [m[0] for m in self.members]
        if memory in at:  # once: it may hold a copy of what it held itself
            del self.members[at.index(memory)]


class Place(NamedTuple):
    """Where the elements of a keyed fill stand in the stream."""

    key: int  # of Philox
    label: str  # what the key is made of; "" if nothing is drawn
    slabs: Sequence[Slab]  # of the whole parameter


@dataclass(slots=True, eq=False)
class KeyedFill:
    """A law for a part of a storage, whose key may not be known before it is written."""

    law: Law
    dtype: torch.dtype
    box: Box  # in the storage, in elements
    extent: tuple[int, int]  # bytes of the storage: the first and the one behind the last
    is_dense: bool  # every byte of these is written
    items: int
    caller: Caller | None
    memory: Memory | None = None  # whose name, or label, gives the key; None: it was given
    identity: Identity | None = None  # likewise
    slabs: Sequence[Slab] | None = None  # that were given, without a key
    fallback: Sequence[Slab] | None = None  # used when no named parameter covers this memory
    place: Place | None = None  # None: not before some of it is written

    @classmethod
    def of(cls, t: Tensor, law: Law, caller: Caller | None) -> KeyedFill:
        layout = geometry.layout_of(t)
        is_dense = layout is not None and layout[1] == 0
        box, extent = box_of(t), geometry.in_storage(t)
        return cls(law, t.dtype, box, extent, is_dense, t.numel(), caller)

    @property
    def op(self) -> str:
        return self.law.op

    @property
    def a(self) -> float:
        return float(self.law.numbers[0])

    def written(self) -> Written:
        """Return what is remembered of it."""
        op, numbers, _ = self.law
        a, b = (0.0, 0.0) if op == "diagonal" else (*numbers, 0.0)[:2]
        bounds = numbers[2:4] if op == "trunc_normal" else None
        key = self.place.label if self.place is not None and self.law.is_random else ""
        how = (op, a, b, self.items, self.dtype, self.extent, self.caller)
        return Written(*how, bounds, numbers[0], key)


Waiting = Drawn | KeyedFill


# ---- order ---------------------------------------------------------------------------------------

Stage = list[tuple[Waiting, torch.UntypedStorage]]


def is_all(t: Tensor) -> bool:
    """Return whether a tensor is all of its storage, in order."""
    if not t.is_contiguous() or t.is_neg() or t.is_conj():
        return False
    return t.numel() * t.element_size() == geometry.storage_of(t).nbytes()


def stages(todo: list[tuple[torch.UntypedStorage, Memory]]) -> list[Stage]:
    """Return fills that overlap one after the other, all others together."""
    stages: list[Stage] = []
    for storage, memory in todo:
        levels: list[int] = []
        if len(memory.fills) == 1 and stages:
            stages[0].append((memory.fills[0], storage))
            continue
        for i, fill in enumerate(memory.fills):
            begin, end = fill.extent
            before = zip(memory.fills[:i], levels)
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
