# SPDX-License-Identifier: BSD-3-Clause
"""Memory for meta tensors, stand-ins for what is to stay as it is, and who wrote what."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastinit.capture.operators import EMPTY, OVERWRITING, is_view, leaves
from fastinit.core import geometry, recording, shard
from fastinit.core.mode import Mode

Memory = dict[tuple[object, ...], Tensor]  # what has been made for a storage, by it and the dtype
Device = torch.device | str | int | None

_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MARK = {1: 255, 2: -1, 4: -1, 8: -1, 16: -1}


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers, tied ones repeatedly, in half the time that torch takes."""
    for m in model.modules():
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is not None:
                yield t


def with_memory(old: Tensor, device: Device, dtype: torch.dtype | None, memory: Memory) -> Tensor:
    """Return a tensor like `old` with memory, which tensors that shared `old`'s storage share."""
    kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
    if shard.is_distributed(old):
        return _distributed(old, device, kind)
    key = (geometry.storage_id(old), old.dtype)
    if key not in memory:
        default = torch.get_default_device()
        where = ("cpu" if default.type == "meta" else default) if device is None else device
        items = geometry.storage_of(old).nbytes() // old.element_size()
        memory[key] = torch.empty(items, dtype=kind, device=where)
    new = memory[key].as_strided(old.shape, old.stride(), old.storage_offset())
    return _as(old, new)


def _as(old: Tensor, new: Tensor) -> Tensor:
    """Make new memory the kind of object that `old` is, with what was noted on it."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    else:
        new = new.detach().requires_grad_(old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def _distributed(old: Any, device: Device, dtype: torch.dtype) -> Tensor:
    """Return a DTensor like `old` with memory for this process's elements."""
    where = old.device_mesh.device_type if device is None else device
    with torch.no_grad():
        new = torch.empty_like(old, dtype=dtype, device=where)
    adopt = getattr(recording.this_thread.recorder, "adopt", None)
    if adopt is not None:
        adopt(shard.local(new))
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


@contextmanager
def stand_ins(model: nn.Module, missing: Container[int], watch: Watch) -> Iterator[None]:
    """Put others in the place of a model's tensors, but for those with these ids, for a while.

    Whoever reads one before it is written finds the values of what it stands for.
    """
    memory: Memory = {}
    made: dict[int, Tensor] = {}  # by the id of what it stands for
    copies: list[tuple[Tensor, Callable[[], object]]] = []
    slots: list[tuple[nn.Module, str, Tensor]] = []
    for m in model.modules():
        for name, t in (*m._parameters.items(), *m._buffers.items()):
            if t is not None and id(t) not in missing and not nn.parameter.is_lazy(t):
                slots.append((m, name, t))
    try:
        for m, name, t in slots:
            if id(t) not in made:
                made[id(t)] = new = _stand_in(t, memory)
                if geometry.is_plain(shard.local(t)) and not t.is_meta:
                    whole = _whole(new), _whole(t)
                    copies.append((new, functools.partial(Tensor.copy_, *whole)))
            put(m, name, made[id(t)])
        with watch.expecting(copies, True):
            del copies, memory
            yield
    finally:
        recorder = recording.this_thread.recorder
        if recorder is not None:
            recorder.keep_names(made.values())
        for m, name, t in slots:
            if name in m._parameters or name in m._buffers:
                put(m, name, t)
        real = {id(made[id(t)]): t for _, _, t in slots if id(t) in made}
        for m in model.modules() if real else ():
            for name, t in (*m._parameters.items(), *m._buffers.items()):
                if id(t) in real:  # tied by the function
                    put(m, name, real[id(t)])


def _stand_in(t: Tensor, memory: Memory) -> Tensor:
    if t.is_meta or not geometry.is_plain(shard.local(t)):
        copy = t.detach().clone()
        return _as(t, copy) if type(copy) in geometry.PLAIN else copy
    return with_memory(t, t.device, None, memory)


def _whole(t: Tensor) -> Tensor:
    """Return all of a tensor's storage."""
    here = shard.local(t).detach()
    items = geometry.storage_of(here).nbytes() // here.element_size()
    return here.as_strided((items,), (1,), 0)


def put(m: nn.Module, name: str, t: Tensor) -> None:
    """Set a parameter or a buffer of a module; those of nn.LSTM keep a list of their own."""
    own: Any = m._parameters if name in m._parameters else m._buffers
    if name in own and not isinstance(m, nn.RNNBase):
        own[name] = t  # no hook needs to know, and a setter may do more
    else:
        setattr(m, name, t)


class Watch(Mode):
    """Sees which elements of some tensors are written at all."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._missing: set[int] = set()  # storages that nobody has written
        self._partly: dict[int, Tensor] = {}  # storage -> -1 in each byte that is written
        self._changed: set[int] = set()  # storages that something wrote to in any way
        # What gives a storage its values before somebody reads it; of those that nobody has read
        # or written. And whether it does when they are overwritten in part, too.
        self._expected: dict[int, tuple[Callable[[], object], bool]] = {}
        self._is_on = self._is_inside = False
        self.add(*tensors)

    def add(self, *tensors: Tensor) -> None:
        here = map(shard.local, tensors)
        self._missing.update(geometry.storage_id(t) for t in here if t.numel() != 0)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Put the mode on top of the recorder's, which is told what comes without operators."""
        if self._is_on:
            yield
            return
        self._is_on = True
        recorder = recording.this_thread.recorder
        watched = recorder.watched(self.note, self._supply) if recorder else nullcontext()
        try:
            with watched, self:
                yield
        finally:
            self._is_on = False

    def is_written(self, t: Tensor) -> bool:
        t = shard.local(t)
        key = geometry.storage_id(t)
        if key not in self._missing:
            return True
        return key in self._partly and bool((self._marks(t) == _MARK[t.element_size()]).all())

    def is_changed(self, t: Tensor) -> bool:
        """Return whether something wrote to a tensor, though it need not have overwritten it."""
        return geometry.storage_id(shard.local(t)) in self._changed or self.is_written(t)

    def complete(self, t: Tensor, write: Callable[[], object]) -> None:
        """Let a function write what of a tensor has not been written yet."""
        here = shard.local(t).detach()
        kept = None
        if geometry.storage_id(here) in self._partly:
            written = self._marks(here) == _MARK[here.element_size()]
            written = written.view(*here.shape, -1)[..., 0].to(here.device)  # of a complex number
            kept = here.clone()
        write()
        if kept is not None:
            here.copy_(torch.where(written, kept, here))

    @contextmanager
    def expecting(
        self, writes: Iterable[tuple[Tensor, Callable[[], object]]], in_part: bool = False
    ) -> Iterator[None]:
        """Let functions write what is read or changed before somebody has overwritten it.

        `in_part`: also what is overwritten in part.
        """
        keys = []
        for t, write in writes:
            here = shard.local(t)
            if geometry.is_plain(here) and here.numel() != 0:
                keys.append(geometry.storage_id(here))
                self._expected.setdefault(keys[-1], (write, in_part))
                if recording.this_thread.recorder is None:  # nobody sees how memory is read
                    self._supply(here)
        try:
            yield
        finally:
            for key in keys:
                self._expected.pop(key, None)

    def _supply(self, t: Any) -> None:
        """Write to what is about to be read before anybody has."""
        t = shard.local(t)
        if self._expected and geometry.is_plain(t):
            found = self._expected.pop(geometry.storage_id(t), None)
            if found is not None and self._is_inside:
                self._is_inside = False
                try:
                    with self:  # which is off the stack while it looks at an operator
                        found[0]()
                finally:
                    self._is_inside = True
            elif found is not None:
                found[0]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        overwrites = schema is not None and schema.is_mutable and schema.name in OVERWRITING
        if self._expected and not is_view(func) and func not in EMPTY:
            self._is_inside = True
            try:
                for t in leaves((args[1:] if overwrites else args, kwargs)):
                    if isinstance(t, Tensor):
                        self._supply(t)
                if overwrites:
                    self._overwritten(args[0])
            finally:
                self._is_inside = False
        result = func(*args, **kwargs)
        if schema is not None and schema.is_mutable:
            out = [kwargs.get(x.name) for x in schema.arguments if x.is_out]
            if overwrites:
                out.append(args[0])
            for t in leaves(out):
                if isinstance(t, Tensor):
                    self.note(t)
            if not overwrites and args and isinstance(args[0], Tensor):
                self._changed.add(_storage(args[0]))
        return result

    def _overwritten(self, t: Tensor) -> None:
        """Expect nothing any more where all is overwritten; supply what is not, if so wanted."""
        t = shard.local(t)
        if self._expected and geometry.is_plain(t):
            key = geometry.storage_id(t)
            if t.numel() * t.element_size() == geometry.storage_of(t).nbytes():
                self._expected.pop(key, None)
            elif self._expected.get(key, (None, False))[1]:
                self._supply(t)

    def note(self, t: Tensor) -> None:
        """Note that all elements of a tensor have been, or are now going to be, written."""
        t = shard.local(t)
        if not geometry.is_plain(t):
            return
        self._overwritten(t)
        key = geometry.storage_id(t)
        if key in self._missing:
            if t.numel() * t.element_size() == geometry.storage_of(t).nbytes():
                self._missing.discard(key)  # storage_of may have told us under a function mode
            else:
                self._changed.add(key)
                self._marks(t).fill_(_MARK[t.element_size()])

    def _marks(self, t: Tensor) -> Tensor:
        """Return the view of a storage's marks that stands for a tensor's elements."""
        marks = self._partly.get(geometry.storage_id(t))
        if marks is None:
            marks = torch.zeros(geometry.storage_of(t).nbytes(), dtype=torch.uint8, device="cpu")
            self._partly[geometry.storage_id(t)] = marks
        offset, sizes, strides = geometry.in_reals(t)
        marks = marks.view(_BYTES[t.element_size() // (2 if t.dtype.is_complex else 1)])
        return marks.as_strided(sizes, strides, offset)


def _storage(t: Tensor) -> int:
    here = shard.local(t)
    return geometry.storage_id(here) if geometry.is_plain(here) else 0
