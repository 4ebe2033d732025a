# SPDX-License-Identifier: BSD-3-Clause
"""Fills of the keyed stream in fused(): the keys they get, tensors with shards, copies.

capture.py has everything that is the same with torch's numbers.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastinit import execute
from fastinit.capture import operators
from fastinit.capture.capture import HANDLERS, Capture
from fastinit.capture.names import Names, box_of
from fastinit.capture.pending import Memory, Stage, is_all
from fastinit.capture.report import Report
from fastinit.capture.slices import ShardedCapture
from fastinit.capture.waiting import Identity, KeyedFill, Place, Waiting, view
from fastinit.capture.written import caller
from fastinit.core import geometry, kernels, keyed_numbers, shard
from fastinit.core.key import Key, derived
from fastinit.core.laws import Law
from fastinit.core.shard import Slab
from fastinit.core.work import Work


class Keys:
    """Assigns a key to every keyed fill of one fused() scope."""

    def __init__(self, report: Report, seed: int | None) -> None:
        self._seed = seed  # None: only fills with a Key of their own are keyed
        self._report = report
        self._names = Names()
        self._looked_up_at = -1  # registrations the report had seen then
        self._next_label = itertools.count()

    def look_up(self, final: bool) -> None:
        """Look up the names of parameters and buffers; before the end those of known models."""
        if final or (self._report.roots and self._looked_up_at != self._report.held):
            self._looked_up_at = self._report.held
            self._names = Names(self._report.named_tensors(final))

    def label(self, t: Tensor, law: Law, memory: Memory | None) -> None:
        """Give memory without a name a label in the order of the calls, the same on all ranks.

        `memory` is None where this rank has none of the tensor.
        """
        self.look_up(False)
        if self._names.find(geometry.storage_id(t), box_of(t), law) is None:
            label = self._new_label()
            if memory is not None:
                memory.label = memory.label or label

    def _new_label(self) -> str:
        return f"#{self._report.prefix}block.{next(self._next_label)}"

    def may_wait(self, memory: Memory, t: Tensor) -> bool:
        """Return False for one-element tensors, which torch.tensor([t]) reads without an operator.

        Parameters are the exception.
        """
        alone = geometry.storage_of(t).nbytes() == t.element_size()
        known = self._report.roots or memory.storage_id in self._report.registered
        return not alone or bool(known)

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
        self.look_up(False)
        identity = fill.identity
        own = self._names.find(fill.memory.storage_id, fill.box, fill.law, fill.first)
        if not identity.label:
            among = identity.members
            found = (self._names.find(m.storage_id, b, fill.law, fill.first) for m, b in among)
            name = next((f[0] for f in found if f is not None), None)
            first = identity.members[0][0] if identity.members else fill.memory
            if name is None and not first.label:
                first.label = self._new_label()
            identity.label = first.label if name is None else "/" + name
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


class KeyedCapture(Capture):
    """Records fills with a Key of their own beside those with torch's numbers."""

    def __init__(self, report: Report, seed: int | None = None, keeps_all: bool = False) -> None:
        super().__init__(report, keeps_all)
        self.seed = seed
        self._keys = Keys(report, seed)

    def fill_keyed(self, law: Law, tensor: Tensor, key: Key | None) -> None:
        if law.op == "constant":  # as torch does it, whatever the type
            with torch.no_grad():
                tensor.fill_(*law.numbers)
            return
        slabs, given = None, None
        if key is not None:
            if key.global_shape is not None:
                slabs = shard.slabs(tensor, key.global_shape, key.offset)
            given = key.take()
        self._keep(tensor, law, slabs, given)
        if not (tensor.is_meta or tensor.is_inference()):
            torch.autograd.graph.increment_version(tensor)

    def _keep(
        self,
        t: Tensor,
        law: Law,
        slabs: Sequence[Slab] | None = None,
        given: tuple[int, str] | None = None,
        fallback: Sequence[Slab] | None = None,
        first: int | None = None,
    ) -> None:
        """Record a law for a tensor, or write it at once.

        Args:
            slabs: where its elements stand, if that is not said by its name
            given: the key and what to call it
            fallback: where its elements stand if it has no name
            first: index in the whole parameter of the first element of a matrix that is a part of
                it, of which the tensor is a part
        """
        law = keyed_numbers.checked(law, t.dtype)
        here = shard.local(t)
        labelled = given is None and law.is_random and fallback is None and bool(self.report.roots)
        if here.is_meta or here.numel() == 0:
            if labelled and t.numel() != 0 and not here.is_meta:  # other ranks have some of it
                self._keys.label(here, law, None)
            return
        if shard.overlaps(here):
            raise RuntimeError("more than one element of the tensor is in the same memory")
        if given is not None and slabs is None:
            slabs = shard.slabs(t)
        if self.watch is not None:
            self.watch(t)
        memory = self.pending.find(here)
        fill = KeyedFill.of(here, law, caller())
        if given is not None:
            fill.place = Place(*given, slabs or ())
        else:
            fill.slabs, fill.memory = slabs, memory or Memory(here, False)
            fill.identity = Identity(fill.memory, fill.box)
            fill.fallback = shard.slabs(t) if shard.is_distributed(t) else fallback
            fill.first = first
            if labelled:
                self._keys.label(here, law, fill.memory)
        waits = memory is not None and fill.dtype in geometry.DTYPES and self._may_wait()
        if memory is not None and waits and self._keys.may_wait(memory, here):
            self.pending.push(memory, fill)
            return
        self.read(here, law.op)
        execute.run_keyed([self._keys.work(fill, geometry.storage_of(here))])
        self.report.at_once_elements += fill.items
        self.pending.wrote(here, fill.written())

    def _write(self, piece: Stage) -> None:
        super()._write(piece)
        works = []
        failed: Exception | None = None
        for fill, storage in piece:
            if isinstance(fill, KeyedFill):
                try:
                    works.append(self._keys.work(fill, storage))
                except (NotImplementedError, RuntimeError, ValueError) as error:
                    failed = error  # the others are written first
        if works:
            execute.run_keyed(works)
        if failed is not None:
            raise failed

    # ---- copies --------------------------------------------------------------------------------

    def _copied(self, fill: Waiting, memory: Memory) -> Waiting:
        if not isinstance(fill, KeyedFill) or fill.place is not None or fill.identity is None:
            return fill
        fill.identity.members.append((memory, fill.box))
        return dataclasses.replace(fill, memory=memory)

    def _copy_single(self, memory: Memory, fill: Waiting, to: Tensor, by: Tensor) -> bool:
        if (
            not isinstance(fill, KeyedFill)
            or fill.identity is None
            or fill.place is not None
            or not is_all(by)  # its elements would be counted otherwise
            or shard.overlaps(to)
        ):
            return super()._copy_single(memory, fill, to, by)
        new = KeyedFill.of(to, fill.asked[0], fill.caller)
        new.memory, new.identity = memory, fill.identity
        new.slabs, new.fallback = fill.slabs, fill.fallback
        fill.identity.members.append((memory, new.box))
        self.pending.push(memory, new)
        return True


class SeededCapture(KeyedCapture, ShardedCapture):
    """Gives everything that is drawn from torch's default generators the numbers of a seed.

    All that is filled may wait, whatever its size, since its name may come later; of a DTensor this
    process fills what it has, without asking others.
    """

    of_any_size = True
    by_parts = False  # a value depends on its place in the whole

    def __init__(self, report: Report, seed: int) -> None:
        super().__init__(report, seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and func not in HANDLERS and shard.is_distributed(args[0]):
            if operators.is_view(func):
                return self._view_of_sharded(func, args, kwargs or {})
            return self._run(func, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _keep(
        self,
        t: Tensor,
        law: Law,
        slabs: Sequence[Slab] | None = None,
        given: tuple[int, str] | None = None,
        fallback: Sequence[Slab] | None = None,
        first: int | None = None,
    ) -> None:
        part = self._slices.find(t)
        if part is None and law.is_of_shape and shard.is_distributed(t):
            of = self._slices.region_of(t)
            if not of.is_all:
                first, slabs = int(of.region.storage_offset()), shard.slabs(t)
        if part is None or part.is_all:
            super()._keep(t if part is None else part.base, law, slabs, given, fallback, first)
            return
        law = keyed_numbers.checked(law, t.dtype)
        if given is None and law.is_random and self.report.roots:
            here = shard.local(part.base)
            self._keys.label(here, law, self.pending.find(here))
        begin = int(part.region.storage_offset()) if law.is_of_shape else None
        for piece in part.pieces():
            at = piece.region if law.is_of_shape or given is not None else None
            super()._keep(piece.here, law, at, given, piece.whole, begin)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any] | None) -> Any:
        if self._slices:
            if operators.writes(func):
                self._refuse_slices(operators.written(func, args, kwargs or {}))
            self._gather((args, kwargs))
        if operators.is_random(func) and not any(
            isinstance(x, torch.Generator) for x in (kwargs or {}).values()
        ):
            self.report.foreign.add(str(func))
        out = super()._run(func, args, kwargs)
        if type(out) is Tensor and operators.makes_new(func):  # nobody else knows it yet
            self.adopt(out)
            if func is not torch.ops.aten.clone.default or not self.pending.is_garbage(args[0]):
                self.pending.wrote(out)
        return out

    def _fill(self, func: Any, args: Any, kwargs: dict[str, Any], law_of: operators.LawOf) -> Any:
        t = args[0]
        law = operators.drawn_law(func, args, kwargs)
        if law is None and shard.is_distributed(t):
            return self._write_sharded(func, args, kwargs)
        if law is not None and (type(t) in geometry.PLAIN or shard.is_distributed(t)):
            self._keep(t, law)
            return t
        return super()._fill(func, args, kwargs, law_of)

    def _factory(
        self, func: Any, args: Any, kwargs: dict[str, Any], spec: operators.Factory
    ) -> Any:
        empty, count, _ = spec
        law = operators.drawn_law(func, args, kwargs)
        if args and shard.is_distributed(args[0]):
            if law is None:
                return self._run(func, args, kwargs)
            out = self._empty(empty, args[:count], kwargs)
        elif law is not None and operators.makes_native(args, kwargs, 1, geometry.KEYED):
            out = empty(*args[:count], **kwargs)
            self.adopt(out)
        else:
            return super()._factory(func, args, kwargs, spec)
        self._keep(out, law)
        return out

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        to, by = args[0], args[1]
        if shard.is_distributed(to):
            part = self._slices.find(to)
            if part is None and shard.is_distributed(by) and _is_alike(to, by):
                self._gather((by,))
                here = self.pending.find(shard.local(to))
                if here is not None and self._copy_waiting(here, shard.local(to), shard.local(by)):
                    return to
            elif part is not None or not shard.is_distributed(by):
                return self._write_pieces(self._slices.region_of(to), func, args, kwargs)
        return super()._copy(func, args, kwargs)

    def wrote_by(self, what: str, tensors: Iterable[Tensor], draws: bool) -> None:
        super().wrote_by(what, tensors, draws)
        if draws:
            self.report.foreign.add(what)

    def finish(self) -> None:
        if self.report.has_several_models():
            gc.collect(1)  # one that only the collector would find dead must not count as the first
        self._keys.look_up(True)  # what is not named now never will be
        super().finish()


def _is_alike(to: Any, by: Any) -> bool:
    """Return whether each process copies what it has itself."""
    same = to.shape == by.shape and to.dtype == by.dtype
    return bool(same and to.device_mesh == by.device_mesh and to.placements == by.placements)
