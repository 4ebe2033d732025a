# SPDX-License-Identifier: BSD-3-Clause
"""The keys of what waits in a block: names of parameters, or numbers for what is nobody's."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from fastinit.capture import names
from fastinit.capture.pending import Memory
from fastinit.capture.report import Report
from fastinit.core import geometry, kernels, laws, shard
from fastinit.core.fill import Fill
from fastinit.core.key import derived
from fastinit.core.work import Work


class Numbers:
    """Of a keyed fill and its copies, which have one key: that of the first with a name."""

    __slots__ = ("label", "members")

    def __init__(self, memory: Memory, box: names.Box) -> None:
        self.label = ""  # once some of it is written
        self.members = [(memory, box)]

    def leave(self, memory: Memory) -> None:
        at = [m[0] for m in self.members]
        if memory in at:  # once: it may hold a copy of what it held itself
            del self.members[at.index(memory)]


class Keys:
    """Of one block."""

    def __init__(self, report: Report, seed: int | None) -> None:
        self.seed = seed  # None: only fills with a Key of their own are keyed
        self._report = report
        self._names = names.Names()
        self._names_of = -1  # how many things modules had got when they were looked up
        self._numbers = itertools.count()

    def know(self, final: bool) -> None:
        """Look up the names of parameters and buffers; before the end those of known models."""
        if final or (self._report.roots and self._names_of != self._report.held):
            self._names_of = self._report.held
            self._names = names.Names(self._report.named_tensors(final))

    def number(self, t: Tensor, law: laws.Law, memory: Memory | None = None) -> None:
        """If it has no name, a number in the order of the calls: the same on all ranks."""
        self.know(False)
        if self._names.find(geometry.storage_id(t), names.box_of(t), law) is None:
            label = f"#{self._report.prefix}block.{next(self._numbers)}"
            if memory is not None:
                memory.number = memory.number or label

    def may_wait(self, memory: Memory, t: Tensor) -> bool:
        """Not a single element that torch.tensor([t, ...]) might read behind our back: such wait
        only if they are somebody's parameter."""
        alone = geometry.storage_of(t).nbytes() == t.element_size()
        return not alone or bool(self._report.roots) or memory.key in self._report.registered

    @staticmethod
    def place(fill: Fill, t: Tensor) -> None:
        layout = geometry.layout_of(t)
        fill.rank = 1 if layout is None else layout[1]
        fill.device = geometry.device_of(t)
        fill.box = names.box_of(t)
        fill.extent = geometry.in_storage(t)

    def _resolve(self, fill: Fill, t: Tensor) -> None:
        """Find the key of what is written to t, and where in the whole parameter it belongs."""
        if isinstance(fill.owner, tuple):
            return
        if not fill.law.is_random and (fill.slabs is not None or self.seed is None):
            fill.owner, fill.slabs = (0, ""), fill.slabs or shard.slabs(t)
            return
        assert self.seed is not None
        self.know(False)
        numbers: Numbers = fill.numbers
        own = self._names.find(fill.owner.key, fill.box, fill.law)
        if not numbers.label:
            found = (self._names.find(m.key, box, fill.law) for m, box in numbers.members)
            name = next((f[0] for f in found if f is not None), None)
            first = numbers.members[0][0] if numbers.members else fill.owner
            if name is None and not first.number:
                first.number = f"#{self._report.prefix}block.{next(self._numbers)}"
            numbers.label = first.number if name is None else "/" + name
        slabs = own[1] if own is not None else fill.otherwise
        copied = len(numbers.members) > 1 or (numbers.members and numbers.members[0][1] != fill.box)
        if slabs is None and (own is not None or copied or fill.law.is_of_shape):
            slabs = shard.slabs(t)
        elif slabs is None:  # nobody's: elements count from the beginning of the storage
            storage, size = geometry.storage_of(t), t.element_size()
            flat = torch.empty(0, dtype=t.dtype, device=t.device)
            flat.set_(storage, 0, (storage.nbytes() // size,), (1,))  # type: ignore[call-overload,unused-ignore]
            slabs = shard.part(flat, *fill.box)
        fill.slabs = fill.slabs or slabs
        fill.owner = derived(self.seed, numbers.label), numbers.label.lstrip("/")

    def work(self, fill: Fill, storage: torch.UntypedStorage) -> Work:
        with kernels.undisturbed():
            t = torch.empty(0, dtype=fill.tensor.dtype, device=storage.device)
            t.set_(storage, *fill.box)  # type: ignore[call-overload,unused-ignore]
            self._resolve(fill, t)
        return Work(fill.law, fill.owner[0], t, fill.slabs)

    @staticmethod
    def copied(fill: Fill, memory: Memory) -> Fill:
        """What is pending elsewhere, for another memory of the same layout."""
        if fill.law is None or isinstance(fill.owner, tuple):
            return fill
        fill.numbers.members.append((memory, fill.box))
        return dataclasses.replace(fill, owner=memory)
