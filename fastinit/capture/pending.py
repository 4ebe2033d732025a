# SPDX-License-Identifier: BSD-3-Clause
"""Storages whose fills wait, and the order in which these are written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastinit.capture.report import Written
from fastinit.core import fill as fill_
from fastinit.core import geometry
from fastinit.core.fill import Fill


class Memory:
    """A storage whose fills may wait."""

    __slots__ = ("asked", "fills", "key", "number", "touched", "weak", "written")

    def __init__(self, tensor: Tensor) -> None:
        self.key = geometry.storage_id(tensor)
        # As long as it lives, no other storage gets this key.
        self.weak = StorageWeakRef(geometry.storage_of(tensor))  # type: ignore[no-untyped-call]
        self.fills: list[Fill] = []  # pending, in order
        self.written: list[Written] = []  # for the report
        self.number = ""  # which takes the place of a name in the keyed stream
        self.touched = False  # by anything that writes
        self.asked = 0  # for how many fills of all of it

    def nbytes(self) -> int:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)
        return 0 if storage is None else storage.nbytes()

    def is_dead(self) -> bool:
        return bool(self.weak.expired())  # type: ignore[no-untyped-call]

    def says_all(self, t: Tensor) -> bool:
        """Whether what is pending is all there is to know about the storage, which is t's, and as
        cheap to do again as to copy."""
        first = self.fills[0]
        if any(fill.op == "orthogonal" for fill in self.fills):
            return False
        return fill_.is_dense(first) and first.extent == (0, geometry.storage_of(t).nbytes())

    def note(self, new: Written, dense: bool) -> None:
        """A fill has been written; nothing is left of those below it."""
        begin, end = new.extent
        if new.op == "sparse_mask" and self.written and self.written[-1].caller == new.caller:
            self.written[-1] = self.written[-1]._replace(op="sparse")  # its other half
            return
        if dense or self.written[-1:] == [new]:
            kept = (w for w in self.written if w.extent[0] < begin or end < w.extent[1])
            self.written = list(kept)
        self.written.append(new)

    def settled(self) -> None:
        """What was pending has been written."""
        for fill in self.fills:
            self.note(Written.of(fill), fill_.is_dense(fill))
        self.fills = []


def is_all(t: Tensor) -> bool:
    """Whether a tensor is all of its storage, in order."""
    if not t.is_contiguous() or t.is_neg() or t.is_conj():
        return False
    return t.numel() * t.element_size() == geometry.storage_of(t).nbytes()


# ---- order -------------------------------------------------------------------------------------

Stage = list[tuple[Fill, torch.UntypedStorage]]


def stages(todo: list[tuple[torch.UntypedStorage, Memory]]) -> list[Stage]:
    """Fills that overlap come one after the other, all others together."""
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
    """All at once, or so small that their progress can be shown."""
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
