# SPDX-License-Identifier: BSD-3-Clause
"""fused(): fills are recorded while arbitrary code runs, and written when somebody could tell.

A dispatch mode sees every operator below autograd, whoever called it by whatever name, and leaves
version counters and checks of leaves to torch. Only storages born in the scope wait (their memory
cannot be known to anybody yet); the generator moves on when a fill is recorded, and the fill keeps
the state from before. So a read writes what it reads and nothing else, and fills that nobody reads
before they are overwritten, or their storage dies, are never done. Numbers are torch's here;
keyed.py has those of the keyed stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from fastinit import execute, probe
from fastinit.capture import operators
from fastinit.capture.operators import leaves
from fastinit.capture.pending import KeyedFill, Memory, Stage, Waiting, is_all, pieces, stages
from fastinit.capture.report import Report
from fastinit.capture.storages import Storages
from fastinit.capture.threads import Others
from fastinit.capture.written import Written, caller
from fastinit.core import build, geometry, recording, shard, source, torch_api
from fastinit.core.fill import Drawn, Fill
from fastinit.core.geometry import is_plain, storage_id
from fastinit.core.laws import Law
from fastinit.core.mode import Mode
from fastinit.core.recording import Call, Recorder

_MOST_PARTS = 1024  # pending keyed fills of one storage
_MOST_STATES = 2048  # pending random fills, each with 5 KB of generator state
_MOST_LAYERS = 64  # pending fills of one storage


class Capture(Mode, Recorder):
    """Records the fills of one thread; what it does not record is torch's, after what it reads is
    written."""

    modes = 1
    of_any_size = False  # even small fills are worth a record

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report
        self.watch: Callable[[Tensor], None] | None = None  # told what is filled without operators
        self.storages = Storages(self.of_any_size)
        self._memory_of, self._wrote = self.storages.find, self.storages.wrote
        self._pending: dict[int, Memory] = {}  # those with fills, by storage id
        self._states = 0  # pending random fills, at most
        self._scratch = torch.empty(source.STATE_SIZE, dtype=torch.uint8, device="cpu")
        self._others = Others()  # may read pending fills

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs or {})
        if self.storages.any_may_wait() and operators.is_view(func):
            out = func(*args, **kwargs) if kwargs else func(*args)
            if type(out) not in geometry.PLAIN or (out.numel() == 1 and func not in operators.SAME):
                self._expose_single(func, out)
            return out
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any] | None) -> Any:
        """Let torch do it, after what it may see is written."""
        if self._pending:
            self._settle_arguments(func, args, kwargs)
        if operators.writes(func):
            self.storages.note_operator(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def adopt(self, t: Tensor) -> None:
        """Let the fills of a tensor's storage wait."""
        for memory in self.storages.adopt(t):
            self._forget(memory)

    # ---- recording -----------------------------------------------------------------------------

    def _may_wait(self) -> bool:
        """Return whether no other thread of the scope could read what is pending."""
        names = self._others.names()
        if names:
            self.report.threads.update(names)
        return not names

    def _fill(self, func: Any, args: Any, kwargs: dict[str, Any], law_of: operators.LawOf) -> Any:
        t = args[0]
        if len(args) > 1 and isinstance(args[1], Tensor) and self._pending:
            self._settle_arguments(func, args[1:], None)  # the value of fill_
        memory = self._memory_of(t)
        if type(t) not in geometry.PLAIN:
            return self._run(func, args, kwargs)
        if (memory is None or not memory.fills) and not geometry.is_worth(t):
            self._wrote(t, Written.small(t, *operators.parameters_of(func, args), caller()))
            return func(*args, **kwargs)
        if not geometry.is_here(t):
            return self._run(func, args, kwargs)
        law = None if t.is_neg() else law_of(args, kwargs)
        fill = law and build.one(law, t, kwargs.get("generator"), memory is not None)
        if fill is not None:
            fill.bumps = 0  # torch counts the operator's version up
            fill = probe.proved(fill)
        if fill is not None:
            if memory is not None and self._record(memory, fill):
                return t
            if fill.items >= geometry.least(fill.device):
                if memory is not None:
                    self._settle_arguments(func, args, None)
                self._at_once(t, Written.of(fill, geometry.in_storage(t), caller()))
                execute.run([fill])
                return t
        return self._run(func, args, kwargs)

    def _record(self, memory: Memory, fill: Fill) -> bool:
        """Record a fill; return False if it cannot wait."""
        if fill.device >= 0 and not geometry.is_here(fill.tensor):  # a graph is captured
            return False
        if fill.drawn.op in ("normal_pairs", "trunc_normal") or not self._may_wait():
            return False
        waiting = execute.draw_ahead(fill, self._scratch, caller())
        self._states += isinstance(waiting.state, Tensor)
        self._push(memory, waiting)
        return True

    # ---- order ---------------------------------------------------------------------------------

    def _push(self, memory: Memory, fill: Waiting) -> None:
        self.report.recorded_elements += fill.items
        memory.touched = True
        if fill.is_dense:
            if fill.extent[0] == 0:
                memory.overwrites += fill.extent[1] == memory.nbytes
            if memory.fills:
                self._overwrite(memory, fill.extent)
        memory.fills.append(fill)
        self._pending[memory.storage_id] = memory
        most = _MOST_LAYERS if isinstance(fill, Drawn) else _MOST_PARTS
        if len(memory.fills) > most:
            self.settle(f"more than {most} fills of one tensor", [memory])
        if self._states > _MOST_STATES:
            waiting = (f for m in self._pending.values() for f in m.fills if isinstance(f, Drawn))
            self._states = sum(isinstance(f.state, Tensor) for f in waiting)
            if self._states > _MOST_STATES // 2:
                self.settle(f"more than {_MOST_STATES // 2} random fills waiting")
                self._states = 0

    def _overwrite(self, memory: Memory, by: tuple[int, int]) -> None:
        """Drop what lies between these bytes."""
        begin, end = by
        kept = []
        for fill in memory.fills:
            if begin <= fill.extent[0] and fill.extent[1] <= end:
                self._drop(memory, fill)
            else:
                kept.append(fill)
        memory.fills = kept

    def _forget(self, memory: Memory) -> None:
        """Drop everything that is pending in a storage."""
        for fill in memory.fills:
            self._drop(memory, fill)
        memory.fills = []
        self._pending.pop(memory.storage_id, None)

    def _drop(self, memory: Memory, fill: Waiting) -> None:
        self.report.dropped_elements += fill.items
        if isinstance(fill, KeyedFill) and fill.identity is not None:
            fill.identity.leave(memory)

    # ---- operators that are more than reads ----------------------------------------------------

    def _empty(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if type(shard.local(out)) is Tensor and not kwargs.get("pin_memory"):
            self.adopt(shard.local(out))
        return out

    def _factory(
        self, func: Any, args: Any, kwargs: dict[str, Any], spec: operators.Factory
    ) -> Any:
        """Do what an empty tensor and a fill do: zeros, full_like, new_ones, rand, ..."""
        empty, count, law_of = spec
        least = 1 if self.of_any_size else geometry.MIN_NATIVE
        if operators.makes_native(args, kwargs, least) and self._may_wait():
            out = empty(*args[:count], **kwargs)
            law = law_of(args, kwargs)
            fill = law and probe.proved(build.one(law, out, kwargs.get("generator")))
            self.adopt(out)
            memory = self._memory_of(out)
            if fill is not None and memory is not None and self._record(memory, fill):
                return out
            del out, fill  # before torch allocates again
        out = self._run(func, args, kwargs)
        if type(out) is Tensor and not geometry.is_worth(out) and not kwargs.get("pin_memory"):
            self.adopt(out)
            self._wrote(out, Written.small(out, *operators.parameters_of(func, args), None))
        return out

    def _clone(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Clone: the copy of what is pending is pending, too."""
        t = args[0]
        memory = self._memory_of(t)
        layout = kwargs.get("memory_format", torch.preserve_format)
        if (
            memory is not None
            and memory.fills
            and layout in (torch.preserve_format, torch.contiguous_format)
            and is_all(t)
            and memory.says_all(t)
            and geometry.is_here(t)
            and self._may_wait()
        ):
            out = torch.empty_like(t, memory_format=layout)
            self.adopt(out)
            copy = self._memory_of(out)
            if copy is not None and is_all(out):
                for fill in list(memory.fills):
                    self._push(copy, self._copied(fill, copy))
                return out
        out = self._run(func, args, kwargs)
        if self.storages.is_garbage(t) and type(out) is Tensor:
            self.adopt(out)  # so is its copy
        return out

    def _copied(self, fill: Waiting, memory: Memory) -> Waiting:
        """Return what is pending elsewhere, for another memory of the same layout."""
        return fill

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copy what is pending as a whole by recording it once more; otherwise write it.

        What is overwritten is not written.
        """
        to, by = args[0], args[1]
        memory = self._memory_of(to)
        if memory is not None and self._pending and operators.copies_plainly(to, by):
            if self._copy_pending(memory, to, by):
                return to
            if memory.fills and is_all(to):
                self._settle_arguments(func, args[1:], None)
                self._forget(memory)
                return func(*args, **kwargs)
        return self._run(func, args, kwargs)

    def _copy_pending(self, memory: Memory, to: Tensor, by: Tensor) -> bool:
        """Record what is to be copied once more, if it is all pending; return whether it is."""
        other = self._pending.get(storage_id(by))
        if other is None or other is memory or by.dtype != to.dtype or not self._may_wait():
            return False
        if not other.says_all(by):
            return False
        if is_all(to) and is_all(by):
            for fill in list(other.fills):
                self._push(memory, self._copied(fill, memory))
            return True
        return len(other.fills) == 1 and self._copy_single(memory, other.fills[0], to, by)

    def _copy_single(self, memory: Memory, fill: Waiting, to: Tensor, by: Tensor) -> bool:
        """Record the only fill of the storage of `by` for a tensor of any layout."""
        if fill.op != "constant" or fill.dtype != to.dtype:
            return False
        new = probe.proved(build.constant(to, fill.a, True))
        return new is not None and self._record(memory, new)

    def _replace_memory(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run set_ or resize_, and forget what is known of the storage, which it may change."""
        for x in leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.expose(x, str(func))
        return func(*args, **kwargs)

    def _expose_single(self, func: Any, out: Any) -> None:
        """End waiting for what a one-element view shows: torch.tensor([t[0]]) reads it unseen."""
        for x in leaves(out):
            if isinstance(x, Tensor) and geometry.is_here(x) and x.numel() == 1:
                self.expose(x, str(func))

    # ---- writing -------------------------------------------------------------------------------

    def _settle_arguments(self, func: Any, args: Any, kwargs: dict[str, Any] | None) -> None:
        """Write what is pending in the tensors an operator gets, or may know from elsewhere."""
        if getattr(func, "namespace", "aten") not in ("aten", "prims"):
            return self.settle(func)
        read: dict[int, Memory] = {}
        for x in leaves(args) if not kwargs else leaves((args, kwargs)):
            if isinstance(x, Tensor):
                if operators.is_fake(x):
                    continue  # DTensor tries what an operator does to shapes
                if not is_plain(x):
                    return self.settle(func)  # might wrap any other
                memory = self._pending.get(storage_id(x))
                if memory is not None:
                    read[memory.storage_id] = memory
        if read:
            self.settle(func, list(read.values()))

    def settle(self, reader: object = None, memories: list[Memory] | None = None) -> None:
        """Write everything that is pending, or what is pending in some storages.

        States and fills are left as they are until all is written, so that it can be done again
        after an interruption.
        """
        chosen = list(self._pending.values()) if memories is None else memories
        todo: list[tuple[torch.UntypedStorage, Memory]] = []
        for memory in chosen:
            storage = memory.storage()
            if storage is None:
                self._forget(memory)
            else:
                todo.append((storage, memory))
        if not todo:
            return
        fills = [fill for _, memory in todo for fill in memory.fills]
        with self.report.writing(fills, reader) as done:
            for stage in stages(todo):
                for piece in pieces(stage, self.report.progress and reader is None):
                    self._write(piece)
                    done(sum(fill.items for fill, _ in piece))
        for _, memory in todo:
            memory.settled()
            if reader is not None:
                memory.label = ""  # what is filled again has other numbers
            self._pending.pop(memory.storage_id, None)

    def _write(self, piece: Stage) -> None:
        execute.run_ahead([(f, storage) for f, storage in piece if isinstance(f, Drawn)])

    def close(self) -> None:
        """Write what still waits: the scope is over."""
        try:
            self.settle()
        except KeyboardInterrupt:
            self.settle()  # a second one does leave tensors unwritten
            raise
        finally:
            for memory in self.storages.purge():
                self._forget(memory)
            self.report.close(self.storages.all(), self.storages.are_ours())

    # ---- what hooks.py and the functions of fastinit report ------------------------------------

    def hold(self, module: nn.Module, name: str, value: object) -> None:
        self.report.hold(module, name, value)

    def read(self, t: Tensor, how: str) -> None:
        """Write what is pending in a tensor that is about to be read without an operator."""
        if self._pending:
            try:
                self._settle_arguments(how, (t,), None)
            except (NotImplementedError, RuntimeError):  # of a transform, without a storage
                self.settle(how)

    def expose(self, t: Tensor, how: str) -> None:
        """Write what is pending in a tensor whose address gets known; let no fill wait there."""
        self.read(t, how)
        if self.watch is not None and how.startswith("Tensor."):
            self.watch(t)  # who has the address may write, too
        if isinstance(t, Tensor):
            with contextlib.suppress(NotImplementedError, RuntimeError):
                self._wrote(t)
        try:
            memory = self._memory_of(t)
        except (NotImplementedError, RuntimeError):
            return
        if memory is not None:
            self.storages.wait_no_more(memory)

    def wrote_by(self, what: str, tensors: Iterable[Tensor], draws: bool) -> None:
        """Note that something writes tensors without operators; `draws`: torch's numbers."""
        for t in tensors:
            self._wrote(t)

    def before(self, other: Thread | Future[Any] | None) -> None:
        """Note that another thread may run what the scope gives it, until it ends."""
        self.settle("a thread")
        if other is not None:
            self._others.add(other)

    def takes(self, t: Tensor) -> bool:
        """Return whether a fill is worth a record: on a GPU small ones, too, if they may wait."""
        device = geometry.device_of(t)
        return t.numel() >= geometry.least(device) or (
            device >= 0 and self._memory_of(t) is not None
        )

    def add(self, fills: list[Fill], law: Law) -> None:
        """Record fills of fastinit's own functions, which come without an operator."""
        for fill in fills:
            t = fill.tensor
            if self.watch is not None:
                self.watch(t)
            memory = self._memory_of(t)
            if memory is not None:
                if fill.op == "trunc_normal" and fill.is_dense:
                    start = int(t.storage_offset()) * t.element_size()
                    self._overwrite(memory, (start, start + t.nbytes))
                bumps = fill.bumps
                if self._record(memory, fill):
                    torch.autograd.graph.increment_version([t] * bumps)
                    continue
                self.read(t, fill.op)
            self._at_once(t, Written.of(fill, geometry.in_storage(t), caller()))
            execute.run([fill], False)

    def _at_once(self, t: Tensor, how: Written) -> None:
        """Note what is about to be written, since it cannot wait."""
        self.report.at_once_elements += how.items
        self._wrote(t, how)

    @contextlib.contextmanager
    def watched(self, by: Callable[[Tensor], None]) -> Iterator[None]:
        """Have another mode on top of this one; `by` is told what is filled without operators."""
        before = self.watch, self.modes
        self.watch, self.modes = by, self.modes + 1
        try:
            yield
        finally:
            self.watch, self.modes = before

    def call(self, call: Call) -> None:
        """Make a call that fastinit leaves to torch, in most cases because it is small.

        A way through the mode costs each of its operators 3 us, so it is made without if possible.
        """
        tensor = call.tensor
        if (
            not recording.modes_allow()  # first: a function mode would see the others
            or self.watch is not None
            or not is_plain(tensor)
            or not geometry.is_here(tensor)
            or any(isinstance(x, Tensor) for x in call.args)
        ):
            call()
            return
        memory = self._pending.get(storage_id(tensor))
        overwrites = call.name.startswith("orthogonal")
        if memory is None or (overwrites and is_all(tensor)):
            version = 0 if memory is None else tensor._version
            self._wrote(tensor, Written.small(tensor, call.name, 0.0, 0.0, caller()))
            try:
                with torch_api.DisableTorchDispatch():
                    call()
            finally:  # it may fail before or after it has written
                if memory is not None and tensor._version != version:
                    self._forget(memory)
        else:
            call()


def _handlers() -> dict[Any, Callable[[Capture, Any, Any, dict[str, Any]], Any]]:
    table: dict[Any, Any] = {
        torch.ops.aten.clone.default: Capture._clone,
        torch.ops.aten.copy_.default: lambda c, f, x, k: c._copy(f, x, k),
        **dict.fromkeys(operators.EMPTY, Capture._empty),
        **dict.fromkeys(operators.REPLACE_MEMORY, Capture._replace_memory),
    }
    for func, builder in operators.FILLS.items():
        table[func] = lambda c, f, x, k, b=builder: c._fill(f, x, k, b)
    for func, spec in operators.FACTORIES.items():
        table[func] = lambda c, f, x, k, s=spec: c._factory(f, x, k, s)
    return table


HANDLERS = _handlers()
