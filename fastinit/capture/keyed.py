# SPDX-License-Identifier: BSD-3-Clause
"""Fills of the keyed stream in fused(): tensors with shards, copies, what is computed from them.

keys.py finds their keys, capture.py has everything that is the same with torch's numbers.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastinit import execute
from fastinit.capture import computed, operators
from fastinit.capture.capture import HANDLERS, Capture
from fastinit.capture.keys import Keys
from fastinit.capture.names import box_of
from fastinit.capture.operators import leaves
from fastinit.capture.pending import Memory, Stage, fills_of, is_all
from fastinit.capture.report import Report
from fastinit.capture.slices import ShardedCapture
from fastinit.capture.waiting import Cast, Computed, Identity, KeyedFill, Place, Waiting
from fastinit.capture.written import caller
from fastinit.core import geometry, kernels, keyed_numbers, shard, torch_api
from fastinit.core.geometry import is_plain, storage_id
from fastinit.core.key import Key
from fastinit.core.laws import Law
from fastinit.core.shard import Slab


class KeyedCapture(Capture):
    """Records fills with a Key of their own beside those with torch's numbers."""

    def __init__(self, report: Report, seed: int | None = None, keeps_all: bool = False) -> None:
        super().__init__(report, keeps_all)
        self.seed = seed
        self._keys = Keys(report, seed, self.pending)

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
        self.hold_emptied(t)
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
        if given is None and self.seed is not None:
            self._keys.meet(here)
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
        if memory is not None and waits:
            now = self._keys.preview(fill, memory, here) if fill.law.is_random else None
            if now is not None:
                execute.run_keyed([now])
            self.pending.push(memory, fill)
            return
        self.read(here, law.op)
        execute.run_keyed([self._keys.work(fill, geometry.storage_of(here))])
        self.report.at_once_elements += fill.items
        known = self.pending.adopt(here, False)
        self.pending.wrote(here, fill.written())
        if known is not None and fill.identity is not None and fill.identity.line:
            known.origins.append(fill.identity)

    def _write(self, piece: Stage) -> None:
        super()._write(piece)
        computed.run(piece, self._write)
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

    def keep_names(self, tensors: Iterable[Tensor]) -> None:
        found = [m for t in tensors if (m := self.pending.find(shard.local(t))) is not None]
        waiting = [f for m in found for w in m.fills for f in fills_of(w)]
        fills = [f for f in waiting if isinstance(f, KeyedFill)]
        self._keys.keep({m.storage_id for m in found}, fills)

    # ---- copies --------------------------------------------------------------------------------

    def _copy_fills(self, by: Memory, to: Memory, t: Tensor, dtype: torch.dtype) -> None:
        self._follow(by, to)
        super()._copy_fills(by, to, t, dtype)

    def _copied(self, fill: Waiting, memory: Memory) -> Waiting:
        if isinstance(fill, Cast):
            source = (*(self._copied(part, memory) for part in fill.source),)
            return dataclasses.replace(fill, source=source)
        if not isinstance(fill, KeyedFill) or fill.place is not None or fill.identity is None:
            return fill
        fill.identity.members.append((memory, fill.box))
        return dataclasses.replace(fill, memory=memory)

    def _follow(self, by: Memory, to: Memory) -> None:
        found = [i for fill in by.fills for i in computed.identities(fill)]
        for identity in dict.fromkeys(found):
            identity.follow(by, to)

    def _inherits(self, memory: Memory, fill: Waiting, as_they_are: bool = False) -> None:
        """Let the numbers that something is computed of go by its name if they have none."""
        is_copy = computed.is_copy(fill) if isinstance(fill, Computed) else as_they_are
        for i, identity in enumerate(computed.identities(fill)):
            identity.heirs.append((memory, "" if is_copy else f"<{i}"))

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
    compiles = False  # what is compiled draws torch's numbers, and its tensors have no names

    def __init__(self, report: Report, seed: int) -> None:
        super().__init__(report, seed)

    def expect(self, t: Tensor, function: str) -> None:
        if type(t) in geometry.PLAIN:
            with torch_api.DisableTorchFunction():
                self._keys.meet(t)
        super().expect(t, function)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.set_.source_Tensor and all(map(is_plain, args)):
            return func(*args)  # no other than a view
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
        self._slices.use(part)
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
        if self.pending.filled and computed.is_safe(func):
            out = self._compute_later(func, args, kwargs or {})
            if out is not None:
                return out
        if operators.is_random(func) and not any(
            isinstance(x, torch.Generator) for x in (kwargs or {}).values()
        ):
            self.report.foreign.add(str(func))
        origins = self._origins(args, kwargs) if self._keys.early else []
        out = super()._run(func, args, kwargs)
        origins = origins or (self._origins(args, kwargs) if self._keys.early else [])
        if type(out) is Tensor and operators.makes_new(func):  # nobody else knows it yet
            self.adopt(out)
            if func is not torch.ops.aten.clone.default or not self.pending.is_garbage(args[0]):
                self.pending.wrote(out)
        if origins:
            self._inherit(origins, func, args, kwargs, out)
        return out

    def _compute_later(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Let an operator wait whose arguments wait for their names; return None if it cannot."""
        waits = [m for x in leaves((args, kwargs)) if (m := self._filled(x)) is not None]
        keyed = [f for m in waits for w in m.fills for f in fills_of(w) if isinstance(f, KeyedFill)]
        if not any(f.law.is_random and not f.place and not self._keys.is_sure(f) for f in keyed):
            return None
        written = operators.written(func, args, kwargs) if operators.writes(func) else []
        if any(self.pending.find(t) is None for t in written) or not self._may_wait():
            return None
        told = bool(self._keys.early and self._origins(args, kwargs))  # to be noted when it runs
        found = None if told else computed.results(func, args, kwargs, self._filled)
        if found is None:
            return None
        made = []
        for fill in found:
            t = written[0] if written else _made(fill, args)
            memory = self.pending.find(t) if written else self.pending.adopt(t)
            if memory is None:
                return None
            if not written:
                fill.extent = (0, memory.nbytes)
            self._inherits(memory, fill)
            self.pending.push(memory, fill)
            made.append(t)
        return made[0] if len(func._schema.returns) == 1 else tuple(made)

    def _filled(self, x: object) -> Memory | None:
        """Return the storage of a plain tensor in which something waits."""
        return self.pending.filled.get(storage_id(x)) if is_plain(x) else None

    def _origins(self, args: Any, kwargs: dict[str, Any] | None) -> list[Identity]:
        """Return which numbers that were written before names were final are in some arguments."""
        found: dict[Identity, None] = {}
        for x in leaves((args, kwargs)):
            memory = self.pending.find_known(x)
            if memory is not None:
                found.update(dict.fromkeys(memory.origins))
        return [*found]

    def _inherit(
        self, origins: list[Identity], func: Any, args: Any, kwargs: dict[str, Any] | None, out: Any
    ) -> None:
        """Note that what an operator has written was computed from these numbers."""
        for x in leaves((out, operators.written(func, args, kwargs or {}))):
            if not (isinstance(x, Tensor) and is_plain(x)):
                continue
            memory = self.pending.adopt(x, False)
            if memory is None:
                continue
            memory.touched = True  # one of several results, too, which nothing else notes
            memory.origins += [i for i in origins if i not in memory.origins]
            if func in computed.COPIES and x.nbytes == geometry.storage_of(x).nbytes():
                by = self.pending.find_known(args[func is torch.ops.aten.copy_.default])
                for i in origins:
                    if by is not None:
                        i.follow(by, memory)
                    if by is None or any(m is by for m, _ in i.members):
                        i.members.append((memory, box_of(x)))

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
        waits = self._filled(by)
        if waits is not None and (is_plain(to) or shard.is_distributed(to)):
            local = shard.local(to)
            self.hold_emptied(to)
            self._keys.meet(local)
            memory = self.pending.find_known(local) or self.pending.adopt(local, False)
            if memory is not None:
                is_whole = is_plain(to) and by.shape == to.shape and is_all(by) and is_all(to)
                self._follow(waits, memory)
                for fill in waits.fills:
                    self._inherits(memory, fill, is_whole and isinstance(fill, KeyedFill))
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
            gc.collect(1)  # what only the collector would find dead must not count as the first
        self._keys.finish()  # what is not named now never will be
        super().finish()
        self._keys.tell()

    def close(self) -> None:
        super().close()
        self.report.warn()


def _made(fill: Computed, args: Any) -> Tensor:
    """Return memory for what is to be computed."""
    device = next(x.device for x in leaves(args) if isinstance(x, Tensor))
    with kernels.undisturbed():
        return torch.empty_strided(*fill.at[1:], dtype=fill.dtype, device=device)


def _is_alike(to: Any, by: Any) -> bool:
    """Return whether each process copies what it has itself."""
    same = to.shape == by.shape and to.dtype == by.dtype
    return bool(same and to.device_mesh == by.device_mesh and to.placements == by.placements)
