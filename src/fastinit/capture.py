# SPDX-License-Identifier: BSD-3-Clause
"""fused(): fills are recorded while arbitrary code runs, and written when somebody could tell.

A dispatch mode sees every operator below autograd, whoever called it by whatever name, and leaves
version counters and checks of leaves to torch. Only storages born in the block wait (their memory
cannot be known to anybody yet); the generator moves on when a fill is recorded, and the fill keeps
the state from before. So a read writes what it reads and nothing else, and fills that nobody reads
before they are overwritten, or their storage dies, are never done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastinit import plan, probe, source
from fastinit.report import Report, Written, caller

_aten = torch.ops.aten
PLAIN = (Tensor, nn.Parameter)
_MOST_STATES = 2048  # pending random fills, each with 5 KB of generator state
_MOST_LAYERS = 64  # pending fills of one storage


class _Memory:
    """A storage whose fills may wait."""

    __slots__ = ("fills", "key", "nbytes", "weak", "written")

    def __init__(self, tensor: Tensor) -> None:
        storage = plan.storage_of(tensor)
        self.key = plan.storage_id(tensor)
        self.weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # as long as it lives, no other storage gets this key
        self.nbytes = storage.nbytes()
        self.fills: list[plan.Fill] = []  # pending, in order
        self.written: list[Written] = []  # for the report

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor is all of it, in order."""
        return t.is_contiguous() and t.numel() * t.element_size() == self.nbytes

    def is_dead(self) -> bool:
        return bool(self.weak.expired())  # type: ignore[no-untyped-call]

    def is_defined(self) -> bool:
        """Whether the pending fills say all there is to know about its content."""
        first = self.fills[0]
        return plan.is_dense(first) and first.extent == (0, self.nbytes)


def _hide_from_dynamo(function: Any) -> bool:
    """Keep torch.compile from tracing a mode's code, without loading torch._dynamo."""
    try:
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):  # another torch
        return False
    return True


class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode whose first operator does not load a compiler.

    torch wraps __torch_dispatch__ so that torch.compile leaves it alone, which takes an import of
    more than a second at the first operator; this gets the same done beforehand.
    """

    _hidden = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        cls._hidden = _hide_from_dynamo(cls.__torch_dispatch__)
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return not cls._hidden


class Capture(Mode):
    """Records the fills of one thread; see the module."""

    modes = 1
    takes_small = False

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report
        self._known: dict[int, _Memory] = {}
        self._pending: dict[int, _Memory] = {}  # those of _known with fills
        self._exposed: list[_Memory] = []  # were known
        self._purge_at = 1024  # entries of _known
        self._states = 0  # pending random fills, at most
        self._scratch = torch.empty(source.STATE_SIZE, dtype=torch.uint8, device="cpu")
        self._others: list[Thread | Future[Any]] = []  # who might read what is pending

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs or {})
        if self._pending and not is_harmless(func):
            self._settle_arguments(func, args, kwargs)
        return func(*args, **kwargs) if kwargs else func(*args)

    # ---- storages ------------------------------------------------------------------------------

    def adopt(self, t: Tensor) -> _Memory | None:
        """Let the fills of a tensor's storage wait."""
        if type(t) not in PLAIN or not t.is_cpu or t.layout is not torch.strided:
            return None
        if t.numel() < plan.MIN_NATIVE or t.numel() == 0:
            return None
        memory = _Memory(t)
        known = self._known.setdefault(memory.key, memory)
        if len(self._known) > self._purge_at:
            self._purge()
        return known

    def _purge(self) -> None:
        """Forget storages that died; what was to be written there is dropped."""
        for key, memory in list(self._known.items()):
            if memory.is_dead():
                del self._known[key]
                if self._pending.pop(key, None) is not None:
                    self.report.drop(memory.fills)
        self._purge_at = max(1024, 2 * len(self._known))

    def _memory_of(self, t: Any) -> _Memory | None:
        """Of a plain tensor that may wait."""
        if type(t) not in PLAIN or t.layout is not torch.strided:
            return None
        return self._known.get(plan.storage_id(t))

    def _may_wait(self) -> bool:
        """No thread that was started in the block could read what is pending."""
        if self._others:
            self._others = [
                x for x in self._others if (x.is_alive() if isinstance(x, Thread) else not x.done())
            ]
        return not self._others

    # ---- recording -----------------------------------------------------------------------------

    def _fill(self, func: Any, args: Any, kwargs: dict[str, Any], build: _Build) -> Any:
        t = args[0]
        if len(args) > 1 and isinstance(args[1], Tensor) and self._pending:
            self._settle_arguments(func, args[1:], None)  # the value of fill_
        memory = self._memory_of(t)
        if memory is None:
            if type(t) not in PLAIN:
                self.settle(func)
            elif t.numel() >= plan.MIN_NATIVE:
                fill = probe.proved(build(t, args, kwargs, False))
                if fill is not None:
                    self._at_once(fill)
                    return t
            return func(*args, **kwargs)
        if memory.fills or t.numel() >= plan.MIN_NATIVE:
            fill = None if t.is_neg() else probe.proved(build(t, args, kwargs, True))
            if fill is not None and self._record(memory, fill):
                return t
            self._settle_arguments(func, args, kwargs)
            if fill is not None and fill.items >= plan.MIN_NATIVE:
                self._at_once(fill)
                return t
        return func(*args, **kwargs)

    def _record(self, memory: _Memory, fill: plan.Fill) -> bool:
        """False: it cannot wait."""
        if fill.op in ("normal_pairs", "trunc_normal") or not self._may_wait():
            return False
        t = fill.tensor
        size, begin = t.element_size(), int(t.storage_offset())
        items = fill.items if plan.is_dense(fill) else plan.span(t)
        fill.extent = (size * begin, size * (begin + items))
        fill.caller = caller()
        if fill.generator is not None:
            words = plan.words_drawn(fill, False)
            fill.state = source.draw_ahead(fill.generator, words, self._scratch)
            self._states += 1
        fill.tensor = plan.NO_TENSOR[t.dtype]  # the storage may die
        self._push(memory, fill)
        return True

    def _push(self, memory: _Memory, fill: plan.Fill) -> None:
        self.report.record(fill)
        if memory.fills:
            self._overwrite(memory, fill)
        memory.fills.append(fill)
        self._pending[memory.key] = memory
        if len(memory.fills) > _MOST_LAYERS:
            self.settle(f"more than {_MOST_LAYERS} fills of one tensor", [memory])
        if self._states > _MOST_STATES:
            pending = [f.state for m in self._pending.values() for f in m.fills]
            self._states = sum(state is not None for state in pending)
            if self._states > _MOST_STATES // 2:
                self.settle(f"more than {_MOST_STATES // 2} random fills waiting")
                self._states = 0

    def _overwrite(self, memory: _Memory, by: plan.Fill) -> None:
        """What a fill will overwrite completely need not be written."""
        if not plan.is_dense(by):
            return
        begin, end = by.extent
        alive = []
        for f in memory.fills:
            if begin <= f.extent[0] and f.extent[1] <= end:
                self.report.dropped_elements += f.items
            else:
                alive.append(f)
        memory.fills = alive

    def _at_once(self, fill: plan.Fill) -> None:
        """Natively, but now. The operator it stands for counts up the version itself."""
        fill.bumps = 0
        self.report.at_once(fill)
        plan.run([fill])

    # ---- operators that are more than reads ----------------------------------------------------

    def _factory(
        self, func: Any, args: Any, kwargs: dict[str, Any], empty: Any, build: _Build | None
    ) -> Any:
        """empty, and what is empty and a fill: zeros, full_like, new_ones, rand, ..."""
        if build is None:
            out = func(*args, **kwargs)
        else:
            count = 2 if empty is _aten.new_empty.default else 1  # arguments of `empty`
            if _is_small(args[count - 1]) or not self._may_wait():
                return func(*args, **kwargs)
            out = empty(*args[:count], **kwargs)
        memory = None if kwargs.get("pin_memory") else self.adopt(out)
        if build is None:
            return out
        if memory is not None:
            fill = probe.proved(build(out, args, kwargs, True))
            if fill is not None and self._record(memory, fill):
                return out
        return func(*args, **kwargs)

    def _clone(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The copy of what is pending is pending, too."""
        t = args[0]
        memory = self._memory_of(t)
        if memory is None or not memory.fills:
            return func(*args, **kwargs)
        layout = kwargs.get("memory_format", torch.preserve_format)
        same = layout in (torch.preserve_format, torch.contiguous_format) and memory.holds(t)
        if same and memory.is_defined() and not t.is_neg() and self._may_wait():
            out = torch.empty_like(t)
            copy = self.adopt(out)
            if copy is not None and copy.nbytes == memory.nbytes:
                for fill in memory.fills:
                    self._push(copy, fill)
                return out
        self._settle_arguments(func, args, kwargs)
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """copy_: its source is read, or pending as a whole; what it overwrites is not written."""
        to, by = args[0], args[1]
        memory, other = self._memory_of(to), self._memory_of(by)
        if memory is None or (not memory.fills and (other is None or not other.fills)):
            if self._pending:
                self._settle_arguments(func, args, kwargs)
            return func(*args, **kwargs)
        if self._is_simple_copy(to, by) and other is not memory:
            if other is not None and other.fills and other.is_defined() and self._may_wait():
                first = other.fills[0]
                if memory.holds(to) and other.holds(by) and by.dtype == to.dtype:
                    for fill in list(other.fills):
                        self._push(memory, fill)
                    return to
                if first.op == "constant" and first.tensor.dtype == by.dtype == to.dtype:
                    constant = probe.proved(plan.constant(to, first.a, True))
                    if len(other.fills) == 1 and constant and self._record(memory, constant):
                        return to
            if memory.holds(to):
                self._settle_arguments(func, args[1:], kwargs)
                self.report.drop(memory.fills)
                memory.fills = []
                self._pending.pop(memory.key, None)
                return func(*args, **kwargs)
        self._settle_arguments(func, args, kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _is_simple_copy(to: Tensor, by: Any) -> bool:
        """One that cannot fail, nor warn."""
        return (
            type(by) in PLAIN
            and by.shape == to.shape
            and by.is_cpu
            and by.layout is torch.strided
            and not (by.is_complex() or by.is_quantized or by.is_neg() or to.is_neg())
        )

    def _replace_memory(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """set_, resize_: what is known of the storage may no longer be true."""
        for x in leaves(args):
            if isinstance(x, Tensor):
                self.expose(x)
        return func(*args, **kwargs)

    # ---- writing -------------------------------------------------------------------------------

    def _settle_arguments(self, func: Any, args: Any, kwargs: dict[str, Any] | None) -> None:
        """Write what is pending in the tensors an operator gets."""
        read: list[_Memory] = []
        for x in leaves(args) if not kwargs else leaves((args, kwargs)):
            if isinstance(x, Tensor):
                if type(x) not in PLAIN or x.layout is not torch.strided:
                    return self.settle(func)  # might wrap any other
                memory = self._pending.get(plan.storage_id(x))
                if memory is not None:
                    read.append(memory)
        if read:
            self.settle(func, read)

    def settle(self, reader: Any = None, memories: Iterable[_Memory] | None = None) -> None:
        """Write everything that is pending, or what is pending in some storages."""
        chosen = {m.key: m for m in (self._pending.values() if memories is None else memories)}
        if not chosen:
            return
        todo = []
        for key, memory in chosen.items():
            self._pending.pop(key, None)
            storage = torch.UntypedStorage._new_with_weak_ptr(memory.weak.cdata)
            if storage is None:
                self.report.drop(memory.fills)
            else:
                todo.append((storage, memory.fills))
                memory.written += map(Written.of, memory.fills)
            memory.fills = []
        with self.report.writing([fill for _, fills in todo for fill in fills], reader) as done:
            for stage in _stages(todo):
                for piece in _pieces(stage, self.report.progress and reader is None):
                    plan.run_ahead(piece)
                    done(sum(fill.items for fill, _ in piece))

    def close(self) -> None:
        """The block is over."""
        self.settle()
        self._purge()
        self.report.close((*self._known.values(), *self._exposed))

    # ---- what hooks.py and the functions of fastinit report ------------------------------------

    def read(self, t: Tensor) -> None:
        """Somebody is about to read a tensor without an operator."""
        if self._pending:
            self._settle_arguments("memory", (t,), None)

    def expose(self, t: Tensor) -> None:
        """Somebody gets to know where its memory is: from now on nothing may wait there."""
        self.read(t)
        if type(t) in PLAIN and t.layout is torch.strided:
            memory = self._known.pop(plan.storage_id(t), None)
            if memory is not None:
                self._exposed.append(memory)

    def before(self, other: Thread | Future[Any] | None) -> None:
        """Another thread may run what the block gives it, until it ends."""
        self.settle("thread")
        if other is not None:
            self._others.append(other)

    def add(self, fills: list[plan.Fill]) -> None:
        """Fills from fastinit's own functions, which come without an operator."""
        for fill in fills:
            t = fill.tensor
            memory = self._memory_of(t)
            if memory is not None and (memory.fills or fill.items >= plan.MIN_NATIVE):
                if fill.op == "trunc_normal" and plan.is_dense(fill):
                    start = int(t.storage_offset()) * t.element_size()
                    fill.extent = (start, start + t.nbytes)
                    self._overwrite(memory, fill)
                bumps = fill.bumps
                if self._record(memory, fill):
                    torch.autograd.graph.increment_version([t] * bumps)
                    continue
                self.read(t)
            self.report.at_once(fill)
            plan.run([fill])

    def call(self, function: Callable[[], object], tensor: Tensor) -> None:
        """A function that fastinit leaves to torch; if it is small, its operators are not seen."""
        small = type(tensor) in PLAIN and plan.modes_allow() and tensor.numel() < plan.MIN_NATIVE
        plain = small and tensor.is_cpu and tensor.layout is torch.strided
        if plain and plan.storage_id(tensor) not in self._pending:
            with torch._C._DisableTorchDispatch():
                function()
        else:
            function()


# ---- order -------------------------------------------------------------------------------------

_Todo = list[tuple[torch.UntypedStorage, list[plan.Fill]]]
_Stage = list[tuple[plan.Fill, torch.UntypedStorage]]


def _stages(todo: _Todo) -> list[_Stage]:
    """Fills that overlap come one after the other, all others together."""
    stages: list[_Stage] = []
    for storage, fills in todo:
        levels: list[int] = []
        for i, fill in enumerate(fills):
            begin, end = fill.extent
            below = [
                levels[j]
                for j in range(i)
                if fills[j].extent[0] < end and begin < fills[j].extent[1]
            ]
            level = 1 + max(below, default=-1)
            levels.append(level)
            if level == len(stages):
                stages.append([])
            stages[level].append((fill, storage))
    return stages


def _pieces(stage: _Stage, small: bool) -> list[_Stage]:
    """All at once, or so small that their progress can be shown."""
    if not small:
        return [stage]
    pieces: list[_Stage] = [[]]
    items = 0
    for fill, storage in stage:
        if items > 1 << 24:
            pieces.append([])
            items = 0
        pieces[-1].append((fill, storage))
        items += fill.items
    return pieces


# ---- operators ---------------------------------------------------------------------------------

_Build = Callable[[Tensor, Any, dict[str, Any], bool], "plan.Fill | None"]


def _uniform(t: Tensor, args: Any, kwargs: dict[str, Any], accepted: bool) -> plan.Fill | None:
    a = args[1] if len(args) > 1 else kwargs.get("from", 0.0)
    b = args[2] if len(args) > 2 else kwargs.get("to", 1.0)
    return plan.uniform(t, a, b, kwargs.get("generator"), accepted)


def _normal(t: Tensor, args: Any, kwargs: dict[str, Any], accepted: bool) -> plan.Fill | None:
    mean = args[1] if len(args) > 1 else kwargs.get("mean", 0.0)
    std = args[2] if len(args) > 2 else kwargs.get("std", 1.0)
    return plan.normal(t, mean, std, kwargs.get("generator"), accepted)


def _value(t: Tensor, args: Any, kwargs: dict[str, Any], accepted: bool) -> plan.Fill | None:
    """fill_, full, full_like, new_full: the value comes last."""
    value = args[-1]
    if type(value) is Tensor:
        if value.dim() != 0 or not value.is_cpu or value.is_complex():
            return None
        value = value.item()
    if accepted and t.numel() == 0:
        return None
    return plan.constant(t, value, accepted)


def _zero(t: Tensor, args: Any, kwargs: dict[str, Any], accepted: bool) -> plan.Fill | None:
    return plan.constant(t, 0.0, accepted)


def _one(t: Tensor, args: Any, kwargs: dict[str, Any], accepted: bool) -> plan.Fill | None:
    return plan.constant(t, 1.0, accepted)


def _standard_uniform(t: Tensor, args: Any, kwargs: Any, accepted: bool) -> plan.Fill | None:
    return plan.uniform(t, 0.0, 1.0, None, accepted)


def _standard_normal(t: Tensor, args: Any, kwargs: Any, accepted: bool) -> plan.Fill | None:
    return plan.normal(t, 0.0, 1.0, None, accepted)


def _full(t: Tensor, args: Any, kwargs: dict[str, Any], accepted: bool) -> plan.Fill | None:
    """full without a dtype takes that of its value."""
    given = kwargs.get("dtype") is not None or type(args[1]) is float
    return plan.constant(t, args[1], accepted) if given else None


def _is_small(like: Any) -> bool:
    return bool((like.numel() if isinstance(like, Tensor) else math.prod(like)) < plan.MIN_NATIVE)


FILLS: dict[Any, _Build] = {
    _aten.uniform_.default: _uniform,
    _aten.normal_.default: _normal,
    _aten.fill_.Scalar: _value,
    _aten.fill_.Tensor: _value,
    _aten.zero_.default: _zero,
}


def _handlers() -> dict[Any, Callable[[Capture, Any, Any, dict[str, Any]], Any]]:
    a = _aten
    table: dict[Any, Any] = {
        a.clone.default: Capture._clone,
        a.copy_.default: Capture._copy,
    }
    for func, build in FILLS.items():
        table[func] = lambda c, f, x, k, b=build: c._fill(f, x, k, b)
    plain, like, new = a.empty.memory_format, a.empty_like.default, a.new_empty.default
    factories: dict[Any, tuple[Any, _Build | None]] = {
        plain: (None, None),
        like: (None, None),
        new: (None, None),
        a.empty_strided.default: (None, None),
        a.new_empty_strided.default: (None, None),
        a.zeros.default: (plain, _zero),
        a.ones.default: (plain, _one),
        a.full.default: (plain, _full),
        a.rand.default: (plain, _standard_uniform),
        a.randn.default: (plain, _standard_normal),
        a.zeros_like.default: (like, _zero),
        a.ones_like.default: (like, _one),
        a.full_like.default: (like, _value),
        a.rand_like.default: (like, _standard_uniform),
        a.randn_like.default: (like, _standard_normal),
        a.new_zeros.default: (new, _zero),
        a.new_ones.default: (new, _one),
        a.new_full.default: (new, _value),
    }
    for func, (empty, maybe) in factories.items():
        table[func] = lambda c, f, x, k, e=empty, b=maybe: c._factory(f, x, k, e, b)
    for packet in (a.set_, a.resize_, a.resize_as_):
        for overload in packet.overloads():  # type: ignore[no-untyped-call]
            table[getattr(packet, overload)] = Capture._replace_memory
    return table


_HANDLERS = _handlers()
_harmless: dict[Any, bool] = {}


def is_harmless(func: Any) -> bool:
    """Aliases its inputs without reading or writing their memory (views, t_, detach)."""
    known = _harmless.get(func)
    if known is None:
        view = func.is_view and not func._schema.is_mutable
        known = _harmless[func] = view or torch.Tag.inplace_view in func.tags
    return known


def leaves(x: object) -> Iterable[object]:
    if isinstance(x, (list, tuple)):
        for y in x:
            if isinstance(y, (list, tuple, dict)):
                yield from leaves(y)
            else:
                yield y
    elif isinstance(x, dict):
        yield from leaves(list(x.values()))
    else:
        yield x
