# SPDX-License-Identifier: BSD-3-Clause
"""The keys that the fills of one fused() scope get, and whether they are those of their names."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastinit.capture import finding
from fastinit.capture.names import Box, Names, box_of
from fastinit.capture.pending import Memory, Pending, fills_of
from fastinit.capture.report import Report
from fastinit.capture.waiting import Identity, KeyedFill, Place, view
from fastinit.capture.written import line
from fastinit.core import geometry, kernels, shard
from fastinit.core.key import derived
from fastinit.core.laws import Law
from fastinit.core.shard import Slab
from fastinit.core.work import Work, whole

_MOST_USELESS = 16  # times that names are looked up again in vain
_MOST_SEARCHES = 4  # among all modules of the process, before the end
_OF_LAYERS = ("reset_parameters", "_reset_parameters")  # methods of theirs


class Keys:
    """Assigns a key to every keyed fill of one fused() scope.

    Names are final at the end. What is read before gets the numbers of the name it has then, if it
    has one, and otherwise those of a running number; at the end it shows whether that was right.
    """

    def __init__(self, report: Report, seed: int | None, pending: Pending) -> None:
        self._seed = seed  # None: only fills with a Key of their own are keyed
        self._report, self._pending = report, pending
        self._before = [] if seed is None else finding.stack()
        self._names = Names()
        self._is_final = False
        self._looked_up_at = -1  # registrations the report had seen then
        self._useless = 0  # times since then that this found nothing
        self._next_label = itertools.count()
        self._given: set[str] = set()  # labels that are no names
        self._foreign: set[int] = set()  # storages that are older than the scope
        self._searches = _MOST_SEARCHES
        self._taken: dict[str, int] = {}  # the storage that took a name before the end
        self.early: list[Identity] = []  # what was read before the end
        self._kept: set[Identity] = set()  # what goes by the names of tensors that have gone

    # ---- models ----------------------------------------------------------------------------------

    def meet(self, t: Tensor) -> None:
        """Find the model of a tensor that is about to be filled, if the scope has not made it.

        It is the outermost of those whose methods are running; if none has it, of all. A method
        that layers have, too, says nothing of what they are in, and counts only if nothing else
        does.
        """
        mine = geometry.storage_id(t)
        if self._report.is_about_models or mine in self._foreign or self._pending.knows(t):
            return
        self._foreign.add(mine)
        with kernels.undisturbed():
            self.look_up()
            if self._names.first(mine) is not None:
                return
            found = self._at_work(mine, _OF_LAYERS)
            if not found and self._searches:
                self._searches -= 1
                self._search({mine})
                if self._names.first(mine) is not None:
                    return
            if found := found or self._at_work(mine):
                self._report.hold(found[-1], "", None)

    def _at_work(self, storage: int, without: Collection[str] = ()) -> list[nn.Module]:
        """Return the modules with a storage whose methods are running, the outermost last."""
        found = finding.at_work(self._before, without=without)
        return [m for m in found if finding.owners_of((storage,), [m])]

    def _search(self, storages: set[int]) -> None:
        """Let the report know the models that have some storages, each of which only one has."""
        owners = finding.owners_of(storages, finding.everywhere())
        counts = Counter(s for _, found in owners for s in found)
        while owners:  # nothing may hold them when the names are looked up
            m, found = owners.pop(0)
            if any(counts[s] == 1 for s in found):
                self._report.hold(m, "", None)
            del m
        self.look_up()

    # ---- names -----------------------------------------------------------------------------------

    def look_up(self) -> None:
        """Look up the names of parameters and buffers, if there may be others than before."""
        if self._looked_up_at != self._report.held:
            self._look_up()
            self._useless = 0

    def _look_up(self) -> None:
        self._names = Names(self._report.named_tensors())
        self._looked_up_at = self._report.held

    def finish(self) -> None:
        """Look up the final names, also of models that nothing has told of until now."""
        self._look_up()
        lost = set() if self._report.is_about_models else set(self._unnamed())
        if lost:
            self._search(lost)
        self._is_final = True

    def _unnamed(self) -> Iterable[int]:
        """Yield the storages of what no name is known for, but which still is to have one."""
        for memory in self._pending.known.values():
            keyed = any(isinstance(f, KeyedFill) for w in memory.fills for f in fills_of(w))
            unnamed = self._names.first(memory.storage_id) is None
            if (keyed or memory.origins) and unnamed and not memory.is_dead():
                yield memory.storage_id
        yield from (s for s in self._foreign if self._names.first(s) is None)

    def _find(
        self, storage: int, box: Box, law: Law, first: int | None
    ) -> tuple[str, list[Slab] | None] | None:
        """Return the name that a box of a storage has now; see Names.find."""
        self.look_up()
        found = self._names.find(storage, box, law, first)
        if found is None and not self._is_final and self._useless < _MOST_USELESS:
            self._look_up()  # tensors can get other memory unseen: p.data = ...
            found = self._names.find(storage, box, law, first)
            self._useless += found is None
        return found

    # ---- labels ----------------------------------------------------------------------------------

    def is_sure(self, fill: KeyedFill) -> bool:
        """Return whether a fill has its final name already."""
        if not self._report.is_about_models or fill.memory is None:
            return False
        self.look_up()
        return self._names.first(fill.memory.storage_id) is not None

    def label(self, t: Tensor, law: Law, memory: Memory | None) -> None:
        """Give memory without a name a label in the order of the calls, the same on all ranks.

        `memory` is None where this rank has none of the tensor.
        """
        self.look_up()
        if self._names.find(geometry.storage_id(t), box_of(t), law) is None:
            label = self._new_label()
            if memory is not None:
                memory.label = memory.label or label

    def _new_label(self) -> str:
        label = f"#{self._report.prefix}block.{next(self._next_label)}"
        self._given.add(label)
        return label

    def preview(self, fill: KeyedFill, memory: Memory, t: Tensor) -> Work | None:
        """Return what is to be written to a tensor of one element until it has its name.

        torch.tensor([t]) reads it without an operator, and would find what was there before.
        """
        if geometry.storage_of(t).nbytes() != t.element_size() or self._seed is None:
            return None
        memory.label = memory.label or self._new_label()
        here = view(geometry.storage_of(t), fill.dtype, fill.box)
        return Work(fill.law, derived(self._seed, memory.label), here, whole(here.numel()))

    def work(self, fill: KeyedFill, storage: torch.UntypedStorage) -> Work:
        """Return what has to be written, and where."""
        t = view(storage, fill.dtype, fill.box)
        with kernels.undisturbed():
            if fill.place is None:
                fill.place = self._placed(fill, t)
        return Work(fill.law, fill.place.key, t, fill.place.slabs)

    def _placed(self, fill: KeyedFill, t: Tensor) -> Place:
        """Find the key of what is written to t, and where in the whole parameter it belongs."""
        if not fill.law.is_random and (fill.slabs is not None or self._seed is None):
            return Place(0, "", fill.slabs or shard.slabs(t))
        assert self._seed is not None
        assert fill.identity is not None
        assert fill.memory is not None
        identity = fill.identity
        own = self._find(fill.memory.storage_id, fill.box, fill.law, fill.first)
        if not identity.label:
            self._give_label(identity, fill)
        members = identity.members
        is_copied = len(members) > 1 or (members and members[0][1] != fill.box)
        slabs: Sequence[Slab] | None = own[1] if own is not None else fill.fallback
        if slabs is None and (own is not None or is_copied or fill.law.is_of_shape):
            slabs = shard.slabs(t)
        elif slabs is None:  # nobody's: elements count from the beginning of the storage
            storage, size = geometry.storage_of(t), t.element_size()
            flat = view(storage, t.dtype, (0, (storage.nbytes() // size,), (1,)))
            slabs = shard.part(flat, *fill.box)
        label = identity.label
        return Place(derived(self._seed, label), label.lstrip("/"), fill.slabs or slabs or ())

    def _give_label(self, identity: Identity, fill: KeyedFill) -> None:
        """Let a fill and its copies go by the first name that one of them has."""
        identity.law, identity.first = fill.law, fill.first
        name = next(self._names_of(identity), None)
        known = self._is_final or self._report.is_about_models or not fill.law.is_random
        if name is None and not known and self._searches:  # a deepcopy registers nothing
            self._searches -= 1
            self._search({memory.storage_id for memory, _ in identity.members})
            name = next(self._names_of(identity), None)
        first = identity.members[0][0] if identity.members else fill.memory
        assert first is not None
        if not self._is_final and fill.law.is_random:
            identity.line = line()
            self.early.append(identity)
            if name is not None and not self._may_take(name, first.storage_id):
                name = None
        if name is None and not first.label:
            first.label = self._new_label()
        identity.label = first.label if name is None else "/" + name

    def keep(self, storages: set[int], fills: Iterable[KeyedFill]) -> None:
        """Let what was copied or computed of tensors that are about to go still go by their names.

        `fills` wait in them.
        """
        identities = [i for f in fills if (i := f.identity) is not None and f.law.is_random]
        copied = [i for i in identities if not i.label and (len(i.members) > 1 or i.heirs)]
        if copied or self.early:
            self._look_up()
        for fill in fills if copied else ():
            identity = fill.identity
            if identity in copied and identity is not None:
                identity.law, identity.first = fill.law, fill.first
                name = next(self._names_of(identity), None)
                identity.label = "" if name is None else "/" + name
        for identity in (*copied, *self.early):
            if identity.label[:1] == "/" and any(
                m.storage_id in storages and self._names.first(m.storage_id) is not None
                for m, _ in identity.members
            ):
                self._kept.add(identity)

    def _may_take(self, name: str, storage: int) -> bool:
        """Return whether a name may be taken before the end, since it is likely to be final."""
        if self._report.is_about_models:
            return True
        if self._taken.setdefault(name, storage) != storage:
            return False
        # Those that are being made may not have their parts yet, and these not their names.
        made = finding.at_work(self._before, "__init__")
        return all(finding.owners_of((storage,), [m]) for m in made)

    def _names_of(self, identity: Identity) -> Iterator[str]:
        assert identity.law is not None
        for memory, box in identity.members:
            found = self._find(memory.storage_id, box, identity.law, identity.first)
            if found is not None:
                yield found[0]
        if not identity.heirs:
            return
        for memory, box in identity.former:  # what is computed of it needs it as it was
            found = self._find(memory.storage_id, box, identity.law, identity.first)
            if found is not None:
                yield found[0]
        for memory, suffix in identity.heirs:
            name = self._names.first(memory.storage_id)
            if name is not None:
                yield name + suffix

    # ---- the end ---------------------------------------------------------------------------------

    def tell(self) -> None:
        """Let the report know what has, or was computed with, other numbers than its name's."""
        right = {i for i in self.early if i in self._kept or i.label[1:] in self._names_of(i)}
        unnamed, numbered = self._report.unnamed, self._report.numbered
        numbered.clear()  # it may be asked again, after an interruption
        for memory in self._pending.known.values():
            if memory.is_dead():
                continue
            name = self._names.first(memory.storage_id)
            own = f"/{name}"  # of which it took over something from what was sharded, say
            others = (i for i in memory.origins if i not in right)
            wrong = next((i for i in others if re.split(r"[<[]", i.label)[0] != own), None)
            number = next((w.key for w in memory.written if w.key in self._given), "")
            if name is None:
                numbered += [number] if number else []
            elif wrong is not None:
                key = f"#{wrong.label.lstrip('#/')}"
                why = f"has the numbers of {key}, as it was needed before its name was known"
                unnamed[name] = wrong.line, why
            elif number:
                unnamed[name] = "", f"has the numbers of {number}, as it has no name as a whole"
