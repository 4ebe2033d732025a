# SPDX-License-Identifier: BSD-3-Clause
"""The storages of a scope: which may have fills that wait, and what is known of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastinit.capture import operators
from fastinit.capture.operators import leaves
from fastinit.capture.pending import Memory, is_all
from fastinit.capture.written import Written, caller
from fastinit.core import geometry, shard
from fastinit.core.geometry import is_plain, storage_id


class Storages:
    """Storages by their ids, as long as they live."""

    def __init__(self, of_any_size: bool) -> None:
        self._of_any_size = of_any_size  # even small fills are worth a record
        self._waiting: dict[int, Memory] = {}  # their fills may wait
        # Others that may wait, too. Held until they are filled, so that none gets another's id.
        self._adoptable: dict[int, torch.UntypedStorage] = {}
        self._others: dict[int, Memory] = {}  # what may not wait but is asked about
        self._ours: frozenset[int] = frozenset()  # of the model that the report is about
        self._purge_at = 1024  # entries of _waiting and _others

    def any_may_wait(self) -> bool:
        return bool(self._waiting or self._adoptable)

    def adopt(self, t: Tensor) -> Sequence[Memory]:
        """Let the fills of a tensor's storage wait; return storages that are found to have died."""
        if is_plain(t) and t.numel() != 0 and geometry.is_here(t):
            memory = Memory(t)
            waits = self._of_any_size or geometry.is_worth(t)
            (self._waiting if waits else self._others).setdefault(memory.storage_id, memory)
            if len(self._waiting) + len(self._others) > self._purge_at:
                return self.purge()
        return ()

    def adopt_all(self, tensors: Iterable[Tensor]) -> None:
        """Do the same for many tensors, most of which will be filled."""
        ours = set(self._ours)
        for t in tensors:
            here = shard.local(t)
            if is_plain(here):
                ours.add(storage_id(here))
                waits = (self._of_any_size and here.numel() > 0) or geometry.is_worth(here)
                if waits and geometry.is_here(here):
                    self._adoptable[storage_id(here)] = geometry.storage_of(here)
        self._ours = frozenset(ours)

    def adopt_no_more(self) -> None:
        self._adoptable.clear()

    def purge(self) -> Sequence[Memory]:
        """Forget storages that died, and return those that may have fills."""
        dead = [memory for memory in self._waiting.values() if memory.is_dead()]
        for memory in dead:
            del self._waiting[memory.storage_id]
        self._others = {key: m for key, m in self._others.items() if not m.is_dead()}
        self._purge_at = max(1024, 2 * (len(self._waiting) + len(self._others)))
        return dead

    def find(self, t: object) -> Memory | None:
        """Return the storage of a plain tensor, if its fills may wait."""
        if not is_plain(t):
            return None
        key = storage_id(t)
        memory = self._waiting.get(key)
        if memory is None and self._adoptable.pop(key, None) is not None:
            memory = self._waiting[key] = Memory(t)
        return memory

    def find_known(self, t: Tensor) -> Memory | None:
        """Return the storage of a plain tensor, whether it may wait or not."""
        return self.find(t) or self._others.get(storage_id(t))

    def wait_no_more(self, memory: Memory) -> None:
        del self._waiting[memory.storage_id]
        self._others[memory.storage_id] = memory

    def wrote(self, t: Tensor, how: Written | None = None, overwrites: bool = True) -> None:
        """Note that something has been written otherwise than by what waits."""
        here = shard.local(t)
        if not is_plain(here) or here.is_nested:
            return
        memory = self.find_known(here)
        if memory is None and storage_id(here) in self._ours:
            memory = self._others[storage_id(here)] = Memory(here)
        if memory is not None:
            memory.touched = True
            if how is not None:
                whole = how.items * here.element_size() == how.extent[1] - how.extent[0]
                if overwrites and whole:
                    memory.overwrites += how.extent == (0, geometry.storage_of(here).nbytes())
                memory.note(how, whole and overwrites)

    def note_operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Note what an operator of torch's is about to write."""
        copies_garbage = func is torch.ops.aten.copy_.default and self.is_garbage(args[1])
        name, overwrites = func._schema.name, func._schema.name in operators.OVERWRITING
        for t in leaves(operators.written(func, args, kwargs)):
            if not isinstance(t, Tensor):
                continue
            if copies_garbage and is_all(t) and (memory := self.find_known(t)):
                memory.touched, memory.written = False, []
            elif is_plain(t) and not t.is_nested:
                how = Written.small(t, name.partition("::")[2], 0.0, 0.0, caller())
                self.wrote(t, how, overwrites)
            else:
                self.wrote(t)

    def is_garbage(self, t: object) -> bool:
        """Return whether nobody has written to a tensor's memory yet."""
        if not is_plain(t):
            return False
        key = storage_id(t)
        memory = self._waiting.get(key) or self._others.get(key)
        return memory is not None and not memory.touched

    def all(self) -> tuple[Memory, ...]:
        return (*self._waiting.values(), *self._others.values())

    def are_ours(self) -> frozenset[int]:
        """Return the ids of those of the model that the report is about."""
        return self._ours
