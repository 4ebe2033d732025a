# SPDX-License-Identifier: BSD-3-Clause
"""Slices of sharded tensors, with a seed: what is written to one is written to the tensor.

torch makes a copy of a slice of which other ranks have some, for which all ranks communicate, and
what is written to the copy is lost. Here such a slice stands for a part of the whole: a write goes
to what of it this rank has, and only a read communicates.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastinit.capture import operators
from fastinit.capture.capture import Capture
from fastinit.capture.operators import leaves
from fastinit.capture.pending import Memory, is_all
from fastinit.capture.report import Report
from fastinit.capture.waiting import Cast, KeyedFill, view
from fastinit.core import geometry, kernels, shard, torch_api


class Slice(NamedTuple):
    """A part of a sharded tensor."""

    base: Any  # the DTensor
    region: Tensor  # the same view of a whole on the meta device: offset, sizes and strides count
    memory: Memory | None = None  # of the tensor that stands for it; None: a view of the base's

    @property
    def is_all(self) -> bool:
        return self.region.shape == self.base.shape and self.region.is_contiguous()

    def pieces(self) -> list[shard.Piece]:
        """Return what this rank has of it; RuntimeError if that cannot be said."""
        v = self.region
        found = shard.pieces(self.base, int(v.storage_offset()), v.shape, v.stride())
        if found is None:
            raise RuntimeError(
                f"a view of a sharded tensor that is not made of slices along its dimensions, "
                f"{list(v.shape)} of {list(self.base.shape)}, cannot be written to: write to "
                "slices, or to the whole tensor"
            )
        return found

    def values(self) -> Tensor:
        """Return what is in it, dense and plain; all ranks communicate."""
        v = self.region
        with torch_api.disable_current_modes(), torch.no_grad():
            whole: Tensor = self.base.detach().full_tensor().contiguous()
            return whole.as_strided(v.shape, v.stride(), v.storage_offset()).clone(
                memory_format=torch.contiguous_format
            )

    def spoil(self) -> None:
        """Let what stands for it be seen to have no values, which nobody has asked for in time."""
        storage = None if self.memory is None or self.memory.touched else self.memory.storage()
        if storage is not None and self.region.dtype.is_floating_point:
            with kernels.undisturbed(), torch.no_grad():  # the scope would gather it to write to it
                view(storage, self.region.dtype, (0, (self.region.numel(),), (1,))).fill_(torch.nan)

    def gather(self) -> None:
        """Let the tensor that stands for it have its values."""
        storage = None if self.memory is None else self.memory.storage()
        if storage is not None:
            values = self.values()
            self.memory.touched = True  # type: ignore[union-attr]
            with kernels.undisturbed(), torch.no_grad():
                view(storage, values.dtype, (0, tuple(values.shape), values.stride())).copy_(values)


class Slices:
    """The slices of one scope, by the storage of what stands for each."""

    def __init__(self) -> None:
        self._known: dict[int, Slice] = {}
        self._used: set[Memory | None] = set()  # of slices that have been read or written
        # Views of this rank's memory, by id.
        self._views: dict[int, tuple[weakref.ref[Any], Slice]] = {}

    def find(self, t: Any) -> Slice | None:
        """Return the slice that a DTensor stands for, if it does."""
        return self._of(t) if self._known and shard.is_distributed(t) else None

    def __bool__(self) -> bool:
        return bool(self._known)

    def _of(self, t: Any) -> Slice | None:
        here = shard.local(t)
        return self._known.get(geometry.storage_id(here)) if geometry.is_plain(here) else None

    def among(self, tensors: Iterable[object]) -> list[Slice]:
        """Return the slices that tensors stand for, or are this rank's memory of."""
        if not self._known:
            return []
        found = [self._of(x) for x in leaves(tensors) if isinstance(x, Tensor)]
        return [part for part in found if part is not None]

    def spoil(self) -> None:
        """Let those that nobody has read be seen to have no values, and say so if need be."""
        unused = 0
        for part in self.alive():
            part.spoil()
            unused += part.memory not in self._used
        if unused:
            warnings.warn(
                f"{unused} slices of sharded tensors were taken in a scope with a seed and neither "
                "read nor written there: they have no values now, NaN. Read them in the scope, or "
                "take them after it",
                stacklevel=2,
            )

    def alive(self) -> list[Slice]:
        known = self._known.items()
        self._known = {k: s for k, s in known if s.memory is not None and not s.memory.is_dead()}
        return list(self._known.values())

    def use(self, part: Slice) -> None:
        self._used.add(part.memory)

    def region_of(self, t: Any) -> Slice:
        """Return the part of a parameter that a DTensor is or stands for."""
        known = self._views.get(id(t))
        if known is not None and known[0]() is t:
            return known[1]
        return self.find(t) or Slice(t, torch.empty(t.shape, dtype=t.dtype, device="meta"))

    def make(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Return a view of a sharded tensor or of a slice, or several.

        They are torch's own if these have this rank's memory, and stand for slices otherwise.
        """
        t, of = args[0], self.region_of(args[0])
        here = shard.local(t)
        if here.is_meta:
            return func(*args, **kwargs)
        regions = func(of.region, *args[1:], **kwargs)
        if of.memory is None and _keeps_memory(func, t, args, kwargs):
            out = func(*args, **kwargs)
            for x, region in zip(leaves([out]), leaves([regions])):
                part = Slice(of.base, region)  # type: ignore[arg-type]
                if part.is_all:
                    continue  # what has a weak reference cannot be swapped, as to_empty does
                self._views[id(x)] = weakref.ref(x, functools.partial(self._forget, id(x))), part
            return out
        made = [self._stand_in(of.base, r, here.device) for r in leaves([regions])]  # type: ignore[arg-type]
        return made[0] if isinstance(regions, Tensor) else type(regions)(made)

    def _forget(self, key: int, gone: object) -> None:
        if key in self._views and self._views[key][0] is gone:
            del self._views[key]

    def _stand_in(self, base: Any, region: Tensor, device: torch.device) -> Any:
        from torch.distributed.tensor import DTensor, Replicate

        self.alive()
        here = torch.empty(region.shape, dtype=region.dtype, device=device)
        self._known[geometry.storage_id(here)] = Slice(base, region, Memory(here, False))
        mesh = base.device_mesh
        with torch.no_grad():
            return DTensor.from_local(here, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _keeps_memory(func: Callable[..., Any], t: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether torch's view of a DTensor is in the same memory: on the meta device, where
    nothing communicates, it says so.
    """
    from torch.distributed.tensor import DTensor

    here, mesh = shard.local(t), t.device_mesh
    with torch.no_grad(), contextlib.suppress(RuntimeError, NotImplementedError):
        meta = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device="meta")
        how: Any = {"run_check": False, "shape": t.shape, "stride": t.stride()}
        out = func(DTensor.from_local(meta, mesh, t.placements, **how), *args[1:], **kwargs)
        first = geometry.storage_id(meta)
        return all(geometry.storage_id(shard.local(x)) == first for x in leaves([out]))
    return False


class ShardedCapture(Capture):
    """Writes to this rank's part of DTensors and of their slices, without asking others."""

    def __init__(self, report: Report, keeps_all: bool = False) -> None:
        super().__init__(report, keeps_all)
        self._slices = Slices()

    def _view_of_sharded(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a view of a DTensor; a slice of which other processes have some stands for it."""
        if torch.Tag.inplace_view in func.tags:
            self._refuse_slices(args[:1])
            return func(*args, **kwargs)
        return self._slices.make(func, args, kwargs)

    def _in_place(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if shard.is_distributed(args[0]):
            return self._write_sharded(func, args, kwargs)
        return super()._in_place(func, args, kwargs)

    def _write_sharded(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do a pointwise operator in place to what this process has of a DTensor."""
        t = args[0]
        part = self._slices.find(t)
        if part is not None:
            return self._write_pieces(part, func, args, kwargs)
        is_sum = any(p.is_partial() for p in t.placements)
        others = (x for x in args[1:] if isinstance(x, Tensor))
        if is_sum or any(x.dim() > 0 or shard.is_distributed(x) for x in others):
            return self._run(func, args, kwargs)
        self._write_here(shard.local(t), func, args[1:], kwargs)
        return t

    def _write_pieces(self, part: Slice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do to what this process has of a slice what is asked for the slice."""
        self._slices.use(part)
        if func is torch.ops.aten.copy_.default:
            self._name_source(part, args[1])
        others = [self._plain(x, part) if isinstance(x, Tensor) else x for x in args[1:]]
        for piece in part.pieces():
            these = (piece.of(x) if isinstance(x, Tensor) else x for x in others)
            self._write_here(piece.here, func, these, kwargs)
        return args[0]

    def _name_source(self, part: Slice, by: Tensor) -> None:
        """Let what waits in a plain tensor, and is copied to a slice, have the slice's numbers."""
        here, region = shard.local(part.base), part.region
        waits = self.pending.filled.get(geometry.storage_id(by)) if geometry.is_plain(by) else None
        memory = self.pending.find_known(here) or self.pending.adopt(here, False)
        if waits is None or memory is None or by.shape != region.shape or not is_all(by):
            return
        slabs = shard.of_region(by, int(region.storage_offset()), region.stride())
        items = by.numel() * (2 if by.dtype.is_complex else 1)
        sources = ((w.source if isinstance(w, Cast) else (w,)) for w in waits.fills)
        for fill in itertools.chain.from_iterable(sources):
            if isinstance(fill, KeyedFill) and fill.identity is not None and fill.items == items:
                free = fill.place is None and fill.slabs is None and fill.fallback is None
                if free and fill.is_dense and not fill.law.is_of_shape:
                    fill.fallback = slabs
                    fill.identity.heirs.insert(0, (memory, ""))

    def _write_here(
        self, here: Tensor, func: Any, others: Iterable[Any], kwargs: dict[str, Any]
    ) -> None:
        if self.watch is not None and func not in operators.IN_PLACE:
            self.watch(here)
        self.__torch_dispatch__(func, (), (here.detach(), *others), kwargs)

    def _plain(self, t: Tensor, part: Slice) -> Tensor:
        """Return a tensor that all processes have, in the shape of a slice, dense."""
        for of in self._slices.among((t,)):  # its own memory would be gathered again when read
            self._settle_arguments("a slice of a sharded tensor", (of.base,), None)
            t = of.values()
        if shard.is_distributed(t):
            self._settle_arguments("full_tensor", (t,), None)
            t = t.detach().full_tensor()  # type: ignore[attr-defined]
        if t.dim() == 0:
            return t
        t = t.detach().expand(part.region.shape)
        if not t.is_contiguous():
            self._settle_arguments("contiguous", (t,), None)
        return t.contiguous()

    def _gather(self, tensors: Any) -> None:
        for part in self._slices.among(tensors):
            self._slices.use(part)
            self._settle_arguments("a slice of a sharded tensor", (part.base,), None)
            part.gather()

    def _refuse_slices(self, tensors: Iterable[Any]) -> None:
        if any(self._slices.find(t) is not None for t in leaves(tensors)):
            raise RuntimeError(
                "this slice of a sharded tensor is a copy of what other processes have, so what "
                "this operator writes to it would be lost: do it to a plain tensor, and copy_ that "
                "to the slice"
            )

    def read(self, t: Tensor, how: str) -> None:
        self._gather((t,))
        super().read(t, how)

    def settle(self, reader: object = None) -> None:
        super().settle(reader)
        if reader is None:  # the end; who still has one may differ between ranks: no communication
            self._slices.spoil()
