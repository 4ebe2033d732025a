# SPDX-License-Identifier: BSD-3-Clause
"""What a scope does without operators: it begins and ends, is asked for fills by the functions of
fastinit, and told by hooks who reads memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from fastinit import execute
from fastinit.capture import chains, emptied, hooks, operators
from fastinit.capture.operators import leaves
from fastinit.capture.pending import Memory, Pending, Stage, is_all
from fastinit.capture.report import Report
from fastinit.capture.threads import Others
from fastinit.capture.waiting import Cast, Chain
from fastinit.capture.written import Written, caller
from fastinit.core import geometry, recording, shard, source, torch_api
from fastinit.core.fill import Caller, Drawn, Fill
from fastinit.core.geometry import is_plain, storage_id
from fastinit.core.laws import Law
from fastinit.core.mode import Mode
from fastinit.core.recording import Call, Recorder

# Elements that are still written after Ctrl-C at the end of a scope, in 0.1 s on one core.
_MOST_AFTER_INTERRUPT = 1 << 24


class Scope(Mode, Recorder):
    """Records the fills of one thread, from the first that is worth it. capture.py has the rest."""

    is_told = True
    is_idle = True
    is_closed = False
    of_any_size = False  # even small fills are worth a record
    compiles = True  # torch.compile does; otherwise it calls functions as they are

    def __init__(self, report: Report, keeps_all: bool = False) -> None:
        super().__init__()
        self.report = report
        self.keeps_all = keeps_all or self.of_any_size  # what is small is noted, too
        report.sees_all = self.keeps_all
        self.pending = Pending(report, self._write, self.of_any_size)
        self._scratch: Tensor | None = None  # for a generator's state
        self._others = Others()  # may read what waits
        self._at_entry = torch_api.keys(), torch_api.compiled_depth()
        self._compiled: hooks.Native | None = None  # code of torch.compile, also for gradients
        self._emptied: dict[int, nn.Module] = {}  # before the scope, by storages not yet written

    # ---- from the first fill that is worth it to the end of the scope ----------------------------

    def begin(self) -> bool:
        """Put the mode on torch's stack if that is as it was when the scope began."""
        if self.is_idle and self._may_begin():
            hooks.begin_recording(self)
            self.__enter__()  # type: ignore[no-untyped-call]
            self.modes, self.is_idle = 1, False
            self.report.has_begun = True
            if not self.report.is_about_models:
                self.report.begin()
            self._watch_emptied()
        return not self.is_idle

    def _may_begin(self) -> bool:
        """Return whether the mode would be seen until the scope ends.

        A guard that was entered in the scope may take it off the stack, or away from torch's eyes,
        when it leaves; hooks.py begins before inference mode, which cannot be told from its keys.
        """
        return (
            # Modes, transforms and tracers show in the keys.
            (torch_api.keys(), torch_api.compiled_depth()) == self._at_entry
            and torch_api.in_backward() < 0
            and not torch.compiler.is_compiling()
        )

    def close(self) -> None:
        """Write what still waits: the scope is over. May be called again if it was interrupted."""
        try:
            self._hold_emptied()
            self.finish()
        except KeyboardInterrupt as interrupt:
            if self.pending.cost() > _MOST_AFTER_INTERRUPT:
                self._give_up(interrupt)
            self.finish()
            raise
        finally:
            self.report.close(self.pending.close())
            self.is_closed = True

    def _hold_emptied(self) -> None:
        """Let the report be about modules that were emptied before the scope and filled in it."""
        for module in set(self._emptied.values()):
            if any(self.pending.has_written(t) for t in (*module.parameters(), *module.buffers())):
                self.hold(module, "", None)

    def _watch_emptied(self) -> None:
        self.pending.watch(left := emptied.left())
        if left and not self.report.is_about_models:
            for m in emptied.modules():
                for t in (*m.parameters(), *m.buffers()):
                    if emptied.is_garbage(t):
                        self._emptied.setdefault(storage_id(shard.local(t)), m)

    def hold_emptied(self, t: Tensor) -> None:
        """Let the report be about the module of a tensor that is about to get numbers by its name.

        Otherwise names would be those in the part of it that is being initialised.
        """
        module = self._emptied.get(storage_id(shard.local(t))) if self._emptied else None
        if module is not None:
            self.hold(module, "", None)
            self._emptied = {key: m for key, m in self._emptied.items() if m is not module}

    def finish(self) -> None:
        """Write what still waits, at the end of the scope."""
        self.settle()

    def _give_up(self, interrupt: KeyboardInterrupt) -> None:
        """Say with the exception, and for the report, what is not written and will not be."""
        left = self.pending.give_up()
        names = self.report.names_of(left)
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" * (len(names) > 10))
        interrupt.args = (*interrupt.args, f"fastinit: {len(left)} tensors not written: {shown}")

    def leave(self) -> None:
        """Take the mode off torch's stack."""
        modes = torch_api.active_modes
        if hooks.is_recording(self):
            while any(mode is self for mode in modes()):
                modes()[-1].__exit__(None, None, None)  # or what an interruption left above it
            self.modes, self.is_idle = 0, True
            hooks.end_recording(self)

    # ---- fills -----------------------------------------------------------------------------------

    def expect(self, t: Tensor, function: str) -> None:
        """Begin with the first fill that is worth it, and let a tensor wait that may."""
        if torch_api.tracing_state() is not None:
            return
        if type(t) not in geometry.PLAIN:
            t = shard.local(t)  # of a DTensor, whose operators come back for this rank's part
            if type(t) not in geometry.PLAIN:
                return
        with contextlib.nullcontext() if torch_api.function_modes() == 0 else _unseen():
            if self.keeps_all:
                self._note_temporary(t, function)
            if self.is_idle:
                if not (geometry.is_worth_watching(t) and self.begin()):
                    return
            elif not geometry.is_worth(t, function):
                return
            seen = is_plain(t) and torch_api.transform() is None  # whose tensors have no storage
            if (
                seen
                and not self.pending.knows(t)
                and torch_api.is_its_own(t)
                and not torch_api.are_hidden()
            ):
                self.adopt(t)

    def lets_pass(self, function: str, t: Tensor, args: tuple[Any, ...]) -> bool:
        """Return whether nobody wants to know of a small call, or could be shown by it.

        A way through the mode costs each of torch's operators 3 us.
        """
        if self.seed is not None or self.watch is not None or geometry.is_worth(t, function):
            return False
        passes = (
            torch_api.nobody_watches(self.modes)
            and is_plain(t)
            and t.is_contiguous()
            and storage_id(t) not in self.pending.filled
            and not any(isinstance(x, Tensor) for x in args)
        )
        if passes and (self.keeps_all or self.pending.watches):
            self.pending.called(t, function, args)
            self._note_temporary(t, function)
        return passes

    def _note_temporary(self, t: Tensor, function: str) -> None:
        """Note a fill of what may be the result of other tensors, as with weight_norm."""
        if is_plain(t) and torch_api.transform() is None and not self.pending.is_from_empty(t):
            # Of a view whose base was written torch does not tell the grad_fn, but raises.
            is_result = not torch_api.is_view(t) and t.grad_fn is not None
            self.report.note_temporary(t, function, is_result)

    def adopt(self, t: Tensor) -> Memory | None:
        """Let the fills of a tensor's storage wait, since nobody else knows it."""
        return self.pending.adopt(t)

    def takes(self, t: Tensor, function: str) -> bool:
        """Return whether a fill is worth a record: on a GPU small ones, too, if they may wait."""
        device = geometry.device_of(t)
        if device < 0:
            return geometry.is_worth(t, function)
        return t.numel() >= geometry.least(device) or self.pending.find(t) is not None

    def add(self, fills: list[Fill], law: Law) -> None:
        """Record fills of fastinit's own functions, which come without an operator."""
        for fill in fills:
            t, by = fill.tensor, caller()
            if self.watch is not None:
                self.watch(t)
            memory = self.pending.find(t)
            if memory is not None:
                if fill.op == "trunc_normal" and fill.is_dense:
                    start = int(t.storage_offset()) * t.element_size()
                    self.pending.overwrite(memory, (start, start + t.nbytes))
                bumps = fill.bumps
                if self._record(memory, fill, by):
                    torch.autograd.graph.increment_version([t] * bumps)
                    continue
                self.read(t, fill.op)
            self._at_once(t, fill, by)
            execute.run([fill], False)

    def _record(self, memory: Memory, fill: Fill, by: Caller | None) -> bool:
        """Let a fill wait; return False if it cannot."""
        if fill.device >= 0 and not geometry.is_here(fill.tensor):  # a graph is captured
            return False
        if fill.drawn.op in ("normal_pairs", "trunc_normal") or not self._may_wait():
            return False
        if self._scratch is None:
            with torch_api.DisableTorchFunction():
                self._scratch = torch.empty(source.STATE_SIZE, dtype=torch.uint8, device="cpu")
        self.pending.push(memory, execute.draw_ahead(fill, self._scratch, by))
        return True

    def _at_once(self, t: Tensor, fill: Fill, by: Caller | None) -> None:
        """Note what is about to be written, since it cannot wait."""
        self.report.at_once_elements += fill.items
        extent = geometry.in_storage(t)
        how = (fill.op, fill.a, fill.b, fill.items, t.dtype, extent, by, fill.bounds, fill.scale)
        self.pending.wrote(t, Written(*how))

    def call(self, call: Call) -> Tensor:
        """Make a call that fastinit leaves to torch, in most cases because it is small.

        A way through the mode costs each of its operators 3 us, so it is made without if possible.
        """
        tensor = call.tensor
        if (
            not recording.modes_allow()  # first: a function mode would see the others
            or self.watch is not None
            or not is_plain(tensor)
            or not geometry.is_here(tensor)
            or tensor.is_inference()  # has no version to see by whether something was written
            or any(isinstance(x, Tensor) for x in call.args)
        ):
            return call()
        memory = self.pending.filled.get(storage_id(tensor))
        overwrites = call.name.startswith("orthogonal")
        if memory is None or (overwrites and is_all(tensor)):
            if self.pending.notes(tensor):
                self.pending.wrote(tensor, Written.small(tensor, call.name, 0.0, 0.0, caller()))
            version = 0 if memory is None else tensor._version
            try:
                with torch_api.DisableTorchDispatch():
                    return call()
            finally:  # it may fail before or after it has written
                if memory is not None and tensor._version != version:
                    self.pending.forget(memory)
        return call()

    # ---- what hooks.py reports -------------------------------------------------------------------

    def hold(self, module: nn.Module, name: str, value: object) -> None:
        self.report.hold(module, name, value)

    def emptied(self, module: nn.Module, new: list[Tensor]) -> None:
        self.hold(module, "", None)
        self.pending.watch(new)

    def read(self, t: Tensor, how: str) -> None:
        """Write what waits in a tensor that is about to be read without an operator."""
        if self.reads is not None:
            self.reads(t)
        if self.pending.filled:
            try:
                self._settle_arguments(how, (t,), None)
            except (NotImplementedError, RuntimeError):  # of a transform, without a storage
                self.settle(how)

    def expose(self, t: Tensor, how: str) -> None:
        """Write what waits in a tensor whose address gets known; let no fill wait there."""
        self.read(t, how)
        if self.watch is not None and how.startswith("Tensor."):
            self.watch(t)  # who has the address may write, too
        if not isinstance(t, Tensor):
            return
        with contextlib.suppress(NotImplementedError, RuntimeError):
            memory = self.pending.find_known(t) or self.pending.adopt(t)
            if memory is not None:
                memory.may_wait, memory.touched = False, True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Answer torch.compile before it compiles under this mode, and the mode when it is put on
        torch's stack, whether it may.
        """
        recorder = recording.active()
        if recorder is not None:
            recorder.compiled()
        return cls.compiles

    def compiled(self) -> None:
        """Let nothing wait from now on: compiled code, and its backward, go by addresses."""
        if self.compiles and self._compiled is None:
            hooks.begin_scope(self)  # the compiler is loaded now
            self._compiled = hooks.Native("torch.compile")
            self.before(self._compiled)

    def wrote_by(self, what: str, tensors: Iterable[Tensor], draws: bool) -> None:
        """Note that something writes tensors without operators; `draws`: torch's numbers."""
        for t in tensors:
            self.pending.wrote(t)

    def before(self, other: Thread | Future[Any] | None) -> None:
        """Note that another thread may run what the scope gives it, until it ends."""
        self.settle("a thread")
        if other is not None:
            self._others.add(other)

    def meanwhile(self, what: Thread | Future[Any] | Tensor) -> None:
        """Let nothing wait while what a thread of the scope started runs, nor where it reads.

        Only while one runs: other threads of the process may start what they like.
        """
        if not isinstance(what, Tensor):
            if self._others.names():
                self._others.add(what)
            return
        with contextlib.suppress(NotImplementedError, RuntimeError):
            memory = self.pending.find_known(what) or self.pending.adopt(what)
            if memory is not None:
                memory.may_wait, memory.touched = False, True

    def _may_wait(self) -> bool:
        """Return whether no other thread of the scope could read what waits."""
        names = self._others.names()
        if names:
            self.report.threads.update(names)
        return not names

    # ---- writing ---------------------------------------------------------------------------------

    def settle(self, reader: object = None) -> None:
        self.pending.settle(reader)

    def _settle_arguments(self, func: Any, args: Any, kwargs: dict[str, Any] | None) -> None:
        """Write what waits in the tensors an operator gets, or may know from elsewhere."""
        if getattr(func, "namespace", "aten") not in ("aten", "prims"):
            return self.settle(func)
        read: dict[int, Memory] = {}
        for x in leaves(args) if not kwargs else leaves((args, kwargs)):
            if isinstance(x, Tensor):
                if operators.is_fake(x):
                    continue  # DTensor tries what an operator does to shapes
                if not is_plain(x):
                    return self.settle(func)  # might wrap any other
                memory = self.pending.filled.get(storage_id(x))
                if memory is not None:
                    read[memory.storage_id] = memory
        if read:
            self.pending.settle(func, list(read.values()))

    def _write(self, piece: Stage) -> None:
        execute.run_ahead([(f, storage) for f, storage in piece if isinstance(f, Drawn)])
        chains.run_chains([(f, storage) for f, storage in piece if isinstance(f, Chain)])
        casts = [(f, storage) for f, storage in piece if isinstance(f, Cast)]
        chains.run_casts(casts, self._write)


def _unseen() -> Any:
    return torch_api.DisableTorchFunction()
