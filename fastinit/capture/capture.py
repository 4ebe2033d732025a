# SPDX-License-Identifier: BSD-3-Clause
"""fused(): fills are recorded while arbitrary code runs, and written when somebody could tell.

A dispatch mode sees every operator below autograd, whoever called it by whatever name, and leaves
version counters and checks of leaves to torch. Only storages born in the block wait (their memory
cannot be known to anybody yet); the generator moves on when a fill is recorded, and the fill keeps
the state from before. So a read writes what it reads and nothing else, and fills that nobody reads
before they are overwritten, or their storage dies, are never done.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from fastinit import execute, probe
from fastinit.capture import operators
from fastinit.capture.keys import Keys, Numbers
from fastinit.capture.operators import PLAIN, leaves
from fastinit.capture.pending import Memory, Stage, is_all, pieces, stages
from fastinit.capture.report import Report, Written, caller
from fastinit.core import build, geometry, keyed_numbers, recording, shard, source
from fastinit.core import fill as fill_
from fastinit.core.fill import Fill
from fastinit.core.key import Key
from fastinit.core.laws import Law
from fastinit.core.mode import Mode
from fastinit.core.recording import Call, Recorder

_MOST_PARTS = 1024  # pending keyed fills of one storage
_MOST_STATES = 2048  # pending random fills, each with 5 KB of generator state
_MOST_LAYERS = 64  # pending fills of one storage


class Capture(Mode, Recorder):
    """Records the fills of one thread; see the module."""

    modes = 1

    def __init__(self, report: Report, seed: int | None = None) -> None:
        super().__init__()
        self.report = report
        self.seed = seed  # of the keyed stream; None: torch's generators
        self._copies: dict[int, tuple[weakref.ref[Any], Any, Any]] = {}  # by views of DTensors
        self._keys = Keys(report, seed)
        self.watch: Callable[[Tensor], None] | None = None  # told what is filled without operators
        self._known: dict[int, Memory] = {}
        # Others that may wait, too. Held until they are filled, so that none gets another's key.
        self._adoptable: dict[int, torch.UntypedStorage] = {}
        self._pending: dict[int, Memory] = {}  # those of _known with fills
        self._small: dict[int, Memory] = {}  # what may not wait but is asked about
        self._ours: frozenset[int] = frozenset()  # storages of the model it is about
        self._purge_at = 1024  # entries of _known
        self._states = 0  # pending random fills, at most
        self._scratch = torch.empty(source.STATE_SIZE, dtype=torch.uint8, device="cpu")
        # Who may read what is pending: threads and tasks that were started in the block.
        self._others: list[weakref.ref[Thread | Future[Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs or {})
        if self.seed is not None and args and shard.is_distributed(args[0]):
            if operators.is_view(func):
                return self._view_of_sharded(func, args, kwargs)
        elif (self._known or self._adoptable) and operators.is_view(func):
            out = func(*args, **kwargs) if kwargs else func(*args)
            if type(out) not in PLAIN or (out.numel() == 1 and func not in operators.SAME):
                self._expose_single(func, out)
            return out
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any] | None) -> Any:
        """As torch does it, when what it may see is written."""
        if self._pending:
            self._settle_arguments(func, args, kwargs)
        if operators.writes(func):
            self._refuse_copy(args[0] if args else None)
            copied = func is torch.ops.aten.copy_.default and self._is_garbage(args[1])
            name, overwrites = func._schema.name, func._schema.name in operators.OVERWRITING
            for t in leaves(operators.written(func, args, kwargs or {})):
                if not isinstance(t, Tensor):
                    continue
                if (
                    copied
                    and is_all(t)
                    and (memory := self._memory_of(t) or self._small.get(geometry.storage_id(t)))
                ):
                    memory.touched, memory.written = False, []
                    continue
                if type(t) in PLAIN and t.layout is torch.strided and not t.is_nested:
                    how = Written.small(t, name.partition("::")[2], 0.0, 0.0, caller())
                    self._wrote(t, how, overwrites)
                else:
                    self._wrote(t)
        if self.seed is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        if operators.is_random(func) and not any(
            isinstance(x, torch.Generator) for x in (kwargs or {}).values()
        ):
            self.report.foreign.add(str(func))
        out = func(*args, **kwargs) if kwargs else func(*args)
        if type(out) is Tensor and operators.makes_new(func):  # nobody else knows it yet
            self.adopt(out)
            if func is not torch.ops.aten.clone.default or not self._is_garbage(args[0]):
                self._wrote(out)
        return out

    def _view_of_sharded(self, func: Any, args: Any, kwargs: dict[str, Any] | None) -> Any:
        """Of a DTensor, which may have to gather what others have: then it is a copy."""
        if func is not torch.ops.aten.detach.default:
            self._settle_arguments(func, args, kwargs)
        out = func(*args, **kwargs) if kwargs else func(*args)
        here = shard.local(args[0])
        for x in leaves(out):
            if isinstance(x, Tensor) and shard.is_distributed(x):
                there = shard.local(x)
                if type(there) not in PLAIN or geometry.storage_id(there) != geometry.storage_id(
                    here
                ):
                    self._copies[id(x)] = weakref.ref(x), func, args
        return out

    def _refuse_copy(self, t: Any) -> None:
        if self._copy_of(t) is not None:
            raise RuntimeError(
                "this part of a sharded tensor is a copy of what other processes have, so what is "
                "written to it would be lost"
            )

    def _copy_of(self, t: Any) -> tuple[Any, Any] | None:
        """The view that should have been of a sharded tensor: operator and arguments."""
        found = self._copies.get(id(t))
        return found[1:] if found is not None and found[0]() is t else None

    # ---- storages ------------------------------------------------------------------------------

    def adopt(self, t: Tensor) -> None:
        """Let the fills of a tensor's storage wait."""
        if type(t) not in PLAIN or t.layout is not torch.strided or t.numel() == 0:
            return
        if geometry.is_here(t):
            memory = Memory(t)
            waits = self.seed is not None or geometry.is_worth(t)
            (self._known if waits else self._small).setdefault(memory.key, memory)
            if len(self._known) + len(self._small) > self._purge_at:
                self._purge()

    def adopt_all(self, tensors: Iterable[Tensor]) -> None:
        """The same for many tensors, most of which will be filled."""
        ours = set(self._ours)
        for t in tensors:
            if type(t) not in PLAIN:
                t = shard.local(t)
            if type(t) not in PLAIN or t.layout is not torch.strided:
                continue
            ours.add(geometry.storage_id(t))
            worth = geometry.is_worth(t) or (self.seed is not None and t.numel() > 0)
            if worth and geometry.is_here(t):
                self._adoptable[geometry.storage_id(t)] = geometry.storage_of(t)
        self._ours = frozenset(ours)

    def adopt_no_more(self) -> None:
        self._adoptable.clear()

    def _purge(self) -> None:
        """Forget storages that died; what was to be written there is dropped."""
        for key, memory in list(self._known.items()):
            if memory.is_dead():
                del self._known[key]
                self._forget(memory)
        self._small = {key: m for key, m in self._small.items() if not m.is_dead()}
        self._purge_at = max(1024, 2 * (len(self._known) + len(self._small)))

    def _wrote(self, t: Any, how: Written | None = None, overwrites: bool = True) -> None:
        """Something has been written otherwise than by what waits."""
        if shard.is_distributed(t):
            t = shard.local(t)
        if type(t) not in PLAIN or t.layout is not torch.strided or t.is_nested:
            return
        memory = self._memory_of(t)
        if memory is None:
            key = geometry.storage_id(t)
            memory = self._small.get(key)
            if memory is None and key in self._ours:
                memory = self._small[key] = Memory(t)
        if memory is not None:
            memory.touched = True
            if how is not None:
                whole = how.items * t.element_size() == how.extent[1] - how.extent[0]
                if overwrites:
                    memory.asked += whole and how.extent == (0, geometry.storage_of(t).nbytes())
                memory.note(how, whole and overwrites)

    def _memory_of(self, t: Any) -> Memory | None:
        """Of a plain tensor that may wait."""
        if type(t) not in PLAIN or t.layout is not torch.strided:
            return None
        key = geometry.storage_id(t)
        memory = self._known.get(key)
        if memory is None and self._adoptable.pop(key, None) is not None:
            memory = self._known[key] = Memory(t)
        return memory

    def _may_wait(self) -> bool:
        """No other thread of the block could read what is pending."""
        if self._others:
            alive = []
            for ref in self._others:
                x = ref()
                if x is not None and (x.is_alive() if isinstance(x, Thread) else not x.done()):
                    alive.append(ref)
                    self.report.threads.add(getattr(x, "name", "a task of a pool"))
            self._others = alive
        return not self._others

    # ---- recording -----------------------------------------------------------------------------

    def _fill(self, func: Any, args: Any, kwargs: dict[str, Any], law_of: operators.LawOf) -> Any:
        t = args[0]
        if len(args) > 1 and isinstance(args[1], Tensor) and self._pending:
            self._settle_arguments(func, args[1:], None)  # the value of fill_
        copied = self._copy_of(t)
        chosen = copied is not None and copied[0] is torch.ops.aten.select.int
        if chosen and operators.drawn_law(func, args, kwargs) is None:  # a padding row, say
            here = shard.selected(*copied[1])  # type: ignore[index]
            return t if here is None else self._fill(func, (here, *args[1:]), kwargs, law_of)
        ours = self.seed is not None and (type(t) in PLAIN or shard.is_distributed(t))
        if ours and (law := operators.drawn_law(func, args, kwargs)):
            self._keep(t, law)
            return t
        memory = self._memory_of(t)
        if type(t) not in PLAIN:
            return self._run(func, args, kwargs)
        if (memory is None or not memory.fills) and not geometry.is_worth(t):
            self._wrote(t, Written.small(t, *operators.numbers_of(func, args), caller()))
            return func(*args, **kwargs)
        if not geometry.is_here(t):
            return self._run(func, args, kwargs)
        law = None if t.is_neg() else law_of(args, kwargs)
        fill = None
        if law is not None:
            generator = kwargs.get("generator")
            fill = probe.proved(build.one(law, t, generator, memory is not None))
        if fill is not None:
            if memory is not None and self._record(memory, fill):
                return t
            if fill.items >= geometry.least(fill.device):
                if memory is not None:
                    self._settle_arguments(func, args, None)
                fill.bumps = 0  # the operator counts the version up
                self._at_once(fill)
                execute.run([fill])
                return t
        return self._run(func, args, kwargs)

    def _record(self, memory: Memory, fill: Fill) -> bool:
        """False: it cannot wait."""
        if fill.device >= 0 and not geometry.is_here(fill.tensor):  # a graph is captured
            return False
        if fill_.numbers_of(fill).op in ("normal_pairs", "trunc_normal") or not self._may_wait():
            return False
        t = fill.tensor
        fill.extent = geometry.in_storage(t)
        fill.caller = caller()
        execute.ask_ahead(fill, self._scratch)
        self._states += isinstance(fill.state, Tensor)
        fill.tensor = geometry.NO_TENSOR[t.dtype]  # the storage may die
        self._push(memory, fill)
        return True

    # ---- the keyed stream ----------------------------------------------------------------------

    def fill_keyed(self, law: Law, tensor: Tensor, key: Key | None) -> None:
        if law.op == "constant":  # as torch does it, whatever the type
            with torch.no_grad():
                tensor.fill_(*law.numbers)
            return
        slabs, owner = None, None
        if key is not None:
            if key.global_shape is not None:
                slabs = shard.slabs(tensor, key.global_shape, key.offset)
            owner = key.take()
        self._keep(tensor, law, slabs, owner)
        if not (tensor.is_meta or tensor.is_inference()):
            torch.autograd.graph.increment_version(tensor)

    def _keep(self, t: Tensor, law: Law, slabs: Any = None, owner: Any = None) -> None:
        """Record a law for a tensor, or write it at once. `owner`: the key and what to call it."""
        law = keyed_numbers.checked(law, t.dtype)
        self._refuse_copy(t)
        here = shard.local(t)
        numbered = owner is None and law.is_random and bool(self.report.roots)
        if here.is_meta or here.numel() == 0:
            if numbered and t.numel() != 0 and not here.is_meta:  # other ranks have some of it
                self._keys.number(here, law)
            return
        if shard.overlaps(here):
            raise RuntimeError("more than one element of the tensor is in the same memory")
        if owner is not None and slabs is None:
            slabs = shard.slabs(t)
        if self.watch is not None:
            self.watch(t)
        memory = self._memory_of(here)
        a, b = (0.0, 0.0) if law.op == "diagonal" else (*law.numbers, 0.0)[:2]
        fill = Fill(here, law.op, a, b, items=here.numel(), law=law, slabs=slabs)
        self._keys.place(fill, here)
        fill.caller = caller()
        fill.owner = owner or memory or Memory(here)
        if owner is None:
            fill.numbers = Numbers(fill.owner, fill.box)
            fill.otherwise = shard.slabs(t) if shard.is_distributed(t) else None
        if numbered:
            self._keys.number(here, law, fill.owner)
        waits = memory is not None and here.dtype in geometry.DTYPES and self._may_wait()
        if memory is not None and waits and self._keys.may_wait(memory, here):
            fill.tensor = geometry.NO_TENSOR[here.dtype]
            self._push(memory, fill)
            return
        self.read(here, law.op)
        execute.run_keyed([self._keys.work(fill, geometry.storage_of(here))])
        self._at_once(fill)

    # ---- order ---------------------------------------------------------------------------------

    def _push(self, memory: Memory, fill: Fill) -> None:
        self.report.record(fill)
        memory.touched = True
        if fill_.is_dense(fill) and fill.extent[0] == 0:
            memory.asked += fill.extent[1] == memory.nbytes()
        if memory.fills and fill_.is_dense(fill):
            self._overwrite(memory, fill.extent)
        memory.fills.append(fill)
        self._pending[memory.key] = memory
        most = _MOST_LAYERS if fill.law is None else _MOST_PARTS
        if len(memory.fills) > most:
            self.settle(f"more than {most} fills of one tensor", [memory])
        if self._states > _MOST_STATES:
            states = [f.state for m in self._pending.values() for f in m.fills]
            self._states = sum(isinstance(state, Tensor) for state in states)
            if self._states > _MOST_STATES // 2:
                self.settle(f"more than {_MOST_STATES // 2} random fills waiting")
                self._states = 0

    def _overwrite(self, memory: Memory, by: tuple[int, int]) -> None:
        """What lies between these bytes need not be written any more."""
        alive = []
        for f in memory.fills:
            if by[0] <= f.extent[0] and f.extent[1] <= by[1]:
                self.report.drop((f,))
                if f.numbers is not None:
                    f.numbers.leave(memory)
            else:
                alive.append(f)
        memory.fills = alive

    def _forget(self, memory: Memory) -> None:
        """Nothing of what is pending need be written any more."""
        self.report.drop(memory.fills)
        for fill in memory.fills:
            if fill.numbers is not None:
                fill.numbers.leave(memory)
        memory.fills = []
        self._pending.pop(memory.key, None)

    # ---- operators that are more than reads ----------------------------------------------------

    def _empty(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if type(shard.local(out)) is Tensor and not kwargs.get("pin_memory"):
            self.adopt(shard.local(out))
        return out

    def _factory(
        self, func: Any, args: Any, kwargs: dict[str, Any], spec: tuple[Any, int, operators.LawOf]
    ) -> Any:
        """What is empty and a fill: zeros, full_like, new_ones, rand, ..."""
        empty, count, law_of = spec
        if self.seed is not None and args and shard.is_distributed(args[0]):
            law = operators.drawn_law(func, args, kwargs)
            if law is None:
                return self._run(func, args, kwargs)
            out = self._empty(empty, args[:count], kwargs)
            self._keep(out, law)
            return out
        least = geometry.MIN_NATIVE if self.seed is None else 1
        native = operators.makes_native(args, kwargs, least)
        if native and self.seed is not None:
            law = operators.drawn_law(func, args, kwargs)
            if law is not None:
                out = empty(*args[:count], **kwargs)
                self.adopt(out)
                self._keep(out, law)
                return out
        if native and self._may_wait():
            out = empty(*args[:count], **kwargs)
            law = law_of(args, kwargs)
            generator = kwargs.get("generator")
            fill = None if law is None else probe.proved(build.one(law, out, generator))
            self.adopt(out)
            memory = self._memory_of(out)
            if fill is not None and memory is not None and self._record(memory, fill):
                return out
            del out, fill  # before torch allocates again
        out = self._run(func, args, kwargs)
        if type(out) is Tensor and not geometry.is_worth(out) and not kwargs.get("pin_memory"):
            self.adopt(out)
            self._wrote(out, Written.small(out, *operators.numbers_of(func, args), None))
        return out

    def _clone(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The copy of what is pending is pending, too."""
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
                    self._push(copy, self._keys.copied(fill, copy))
                return out
        out = self._run(func, args, kwargs)
        if self._is_garbage(t) and type(out) is Tensor:
            self.adopt(out)  # so is its copy
        return out

    def _is_garbage(self, t: Any) -> bool:
        """Nobody has written to its memory yet."""
        if type(t) not in PLAIN or t.layout is not torch.strided:
            return False
        key = geometry.storage_id(t)
        memory = self._known.get(key) or self._small.get(key)
        return memory is not None and not memory.touched

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """copy_: its source is read, or pending as a whole; what it overwrites is not written."""
        to, by = args[0], args[1]
        if shard.is_distributed(to) and shard.is_distributed(by) and _is_alike(to, by):
            here = self._memory_of(shard.local(to))
            if here is not None and self._copy_pending(here, shard.local(to), shard.local(by)):
                return to
        memory = self._memory_of(to)
        if memory is not None and self._pending and _is_certain(to, by):
            if self._copy_pending(memory, to, by):
                return to
            if memory.fills and is_all(to):
                self._settle_arguments(func, args[1:], None)
                self._forget(memory)
                return func(*args, **kwargs)
        return self._run(func, args, kwargs)

    def _copy_pending(self, memory: Memory, to: Tensor, by: Tensor) -> bool:
        """Whether what is to be copied could be recorded, too."""
        other = self._pending.get(geometry.storage_id(by))
        if other is None or other is memory or by.dtype != to.dtype or not self._may_wait():
            return False
        if not other.says_all(by):
            return False
        if is_all(to) and is_all(by):
            for fill in list(other.fills):
                self._push(memory, self._keys.copied(fill, memory))
            return True
        first = other.fills[0]
        if first.law is not None and len(other.fills) == 1 and not shard.overlaps(to):
            new = self._keys.copied(first, memory)
            if new is not first:
                self._keys.place(new, to)
                first.numbers.members[-1] = memory, new.box
                self._push(memory, new)
                return True
        if len(other.fills) > 1 or first.op != "constant" or first.tensor.dtype != by.dtype:
            return False
        fill = probe.proved(build.constant(to, first.a, True))  # type: ignore[assignment]
        return fill is not None and self._record(memory, fill)

    def _replace_memory(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """set_, resize_: what is known of the storage may no longer be true."""
        for x in leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.expose(x, str(func))
        return func(*args, **kwargs)

    def _expose_single(self, func: Any, out: Any) -> None:
        """torch.tensor([t[0], ...]) asks views of one element for their values behind our back."""
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
                if _is_fake(x):
                    continue  # DTensor tries what an operator does to shapes
                if type(x) not in PLAIN or x.layout is not torch.strided:
                    return self.settle(func)  # might wrap any other
                memory = self._pending.get(geometry.storage_id(x))
                if memory is not None:
                    read[memory.key] = memory
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
            storage = torch.UntypedStorage._new_with_weak_ptr(memory.weak.cdata)
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
                memory.number = ""  # what is filled again has other numbers
            self._pending.pop(memory.key, None)

    def _write(self, piece: Stage) -> None:
        drawn = [(fill, storage) for fill, storage in piece if fill.law is None]
        if drawn:
            execute.run_ahead(drawn)
        works = []
        failed: Exception | None = None
        for fill, storage in piece:
            if fill.law is not None:
                try:
                    works.append(self._keys.work(fill, storage))
                except (NotImplementedError, RuntimeError, ValueError) as error:
                    failed = error  # the others are written first
        if works:
            execute.run_keyed(works)
        if failed is not None:
            raise failed

    def close(self) -> None:
        """The block is over."""
        if self.seed is not None:  # what is not named now never will be
            self._keys.know(True)
        try:
            self.settle()
        except KeyboardInterrupt:
            self.settle()  # a second one does leave tensors unwritten
            raise
        finally:
            self._purge()
            memories = (*self._known.values(), *self._small.values())
            self.report.close(memories, self._ours)

    # ---- what hooks.py and the functions of fastinit report ------------------------------------

    def hold(self, module: nn.Module, name: str, value: object) -> None:
        self.report.hold(module, name, value)

    def read(self, t: Tensor, how: str) -> None:
        """Somebody is about to read a tensor without an operator."""
        if self._pending:
            try:
                self._settle_arguments(how, (t,), None)
            except (NotImplementedError, RuntimeError):  # of a transform, without a storage
                self.settle(how)

    def expose(self, t: Tensor, how: str) -> None:
        """Somebody gets to know where its memory is: from now on nothing may wait there."""
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
            del self._known[memory.key]
            self._small[memory.key] = memory

    def wrote_by(self, what: str, tensors: Iterable[Tensor], draws: bool) -> None:
        """Something writes tensors without operators, with torch's numbers or others."""
        for t in tensors:
            self._wrote(t)
        if draws and self.seed is not None:
            self.report.foreign.add(what)

    def before(self, other: Thread | Future[Any] | None) -> None:
        """Another thread may run what the block gives it, until it ends."""
        self.settle("a thread")
        if other is not None:
            self._others.append(weakref.ref(other))

    def takes(self, t: Tensor) -> bool:
        """On a GPU small fills, too, if they may wait."""
        device = geometry.device_of(t)
        return t.numel() >= geometry.least(device) or (
            device >= 0 and self._memory_of(t) is not None
        )

    def add(self, fills: list[Fill], law: Law) -> None:
        """Fills from fastinit's own functions, which come without an operator."""
        for fill in fills:
            t = fill.tensor
            if self.watch is not None:
                self.watch(t)
            memory = self._memory_of(t)
            if memory is not None:
                if fill.op == "trunc_normal" and fill_.is_dense(fill):
                    start = int(t.storage_offset()) * t.element_size()
                    self._overwrite(memory, (start, start + t.nbytes))
                bumps = fill.bumps
                if self._record(memory, fill):
                    torch.autograd.graph.increment_version([t] * bumps)
                    continue
                self.read(t, fill.op)
            fill.caller = caller()
            self._at_once(fill)
            execute.run([fill], False)

    def _at_once(self, fill: Fill) -> None:
        """It is about to be written."""
        self.report.at_once(fill)
        extent = geometry.in_storage(fill.tensor)
        self._wrote(fill.tensor, Written.of(fill)._replace(extent=extent))

    def call(self, call: Call) -> None:
        """Make a call that fastinit leaves to torch, in most cases because it is small.

        A way through the mode costs each of its operators 3 us, so it is made without if possible.
        """
        tensor = call.tensor
        if (
            not recording.modes_allow()  # first: a function mode would see the others
            or self.watch is not None
            or type(tensor) not in PLAIN
            or not geometry.is_here(tensor)
            or tensor.layout is not torch.strided
            or any(isinstance(x, Tensor) for x in call.args)
        ):
            call()
            return
        memory = self._pending.get(geometry.storage_id(tensor))
        overwrites = call.name.startswith("orthogonal")
        if memory is None or (overwrites and is_all(tensor)):
            version = 0 if memory is None else tensor._version
            self._wrote(tensor, Written.small(tensor, call.name, 0.0, 0.0, caller()))
            try:
                with torch._C._DisableTorchDispatch():
                    call()
            finally:  # it may fail before or after it has written
                if memory is not None and tensor._version != version:
                    self._forget(memory)
        else:
            call()


def _is_fake(t: Any) -> bool:
    """Of torch's FakeTensor, which has no memory; without loading its module."""
    kind = type(t)
    return kind.__name__ == "FakeTensor" and kind.__module__.startswith("torch.")


def _is_alike(to: Any, by: Any) -> bool:
    """Whether each process copies what it has itself."""
    same = to.shape == by.shape and to.dtype == by.dtype
    return bool(same and to.device_mesh == by.device_mesh and to.placements == by.placements)


def _is_certain(to: Tensor, by: Any) -> bool:
    """Whether torch copies without a chance of an error or a warning, so that what was there before
    cannot be seen again."""
    return (
        type(by) in PLAIN
        and by.shape == to.shape
        and by.device == to.device
        and geometry.is_here(by)
        and by.layout is torch.strided
        and not any(x.is_complex() or x.is_quantized or x.is_neg() for x in (to, by))
    )


def _handlers() -> dict[Any, Callable[[Capture, Any, Any, dict[str, Any]], Any]]:
    table: dict[Any, Any] = {
        torch.ops.aten.clone.default: Capture._clone,
        torch.ops.aten.copy_.default: Capture._copy,
        **dict.fromkeys(operators.EMPTY, Capture._empty),
        **dict.fromkeys(operators.REPLACE_MEMORY, Capture._replace_memory),
    }
    for func, builder in operators.FILLS.items():
        table[func] = lambda c, f, x, k, b=builder: c._fill(f, x, k, b)
    for func, spec in operators.FACTORIES.items():
        table[func] = lambda c, f, x, k, s=spec: c._factory(f, x, k, s)
    return table


_HANDLERS = _handlers()
