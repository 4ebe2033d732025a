# SPDX-License-Identifier: BSD-3-Clause
"""fused(): fills are recorded while arbitrary code runs, and written when somebody could tell.

Until a fill comes along that is worth it, a scope is a look at the size of each call. Then a
dispatch mode sees every operator below autograd, whoever called it by whatever name, and leaves
version counters and checks of leaves to torch. Only storages wait whose memory nobody else knows;
the generator moves on when a fill is recorded, and the fill keeps the state from before. So a read
writes what it reads and nothing else, and fills that nobody reads before they are overwritten, or
their storage dies, are never done. Numbers are torch's here; keyed.py has those of the keyed
stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastinit import execute, probe
from fastinit.capture import chains, operators, sharded
from fastinit.capture.operators import leaves
from fastinit.capture.pending import Memory, is_all
from fastinit.capture.scope import Scope
from fastinit.capture.waiting import Cast, Waiting
from fastinit.capture.written import Written, caller
from fastinit.core import build, geometry, shard, torch_api
from fastinit.core.fill import Drawn
from fastinit.core.geometry import is_plain, storage_id

Kwargs = dict[str, Any]


class Capture(Scope):
    """Records the fills of one thread; what it does not record is torch's, after what it reads is
    written."""

    by_parts = True  # operators on a DTensor are seen where they are done to this rank's part
    _of_shards: Any = None  # the operator that is about to come back

    # ---- operators -------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Kwargs | None = None
    ) -> Any:
        if torch_api.dispatch_modes() != 0:  # there were none when it began: something is traced
            return self._run(func, args, kwargs)
        if types and self.by_parts and sharded.comes_back(func, types, args):
            self._of_shards = func
            return NotImplemented
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs or {})
        if operators.is_view(func):
            out = func(*args, **kwargs) if kwargs else func(*args)
            if type(out) not in geometry.PLAIN or (out.numel() == 1 and func not in operators.SAME):
                self._expose_single(func, out)
            return out
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Kwargs | None) -> Any:
        """Let torch do it, after what it may see is written."""
        if self.pending.filled:
            self._settle_arguments(func, args, kwargs)
        writes = operators.writes(func)
        if writes:
            self._note_operator(func, args, kwargs or {})
        elif getattr(func, "namespace", "") == "c10d":  # whose schemas do not say what they write
            for t in leaves((args, kwargs)):
                if isinstance(t, Tensor):
                    self.pending.wrote(t)
        out = func(*args, **kwargs) if kwargs else func(*args)
        of_shards, self._of_shards = self._of_shards, None
        is_alone = operators.writes_lists(func) and torch_api.dispatch_modes() == 0
        if is_alone and func is not of_shards and not operators.comes_from_a_mode():
            execute.count_lists(operators.written(func, args, kwargs or {}))
        return out

    def _fill(self, func: Any, args: Any, kwargs: Kwargs, law_of: operators.LawOf) -> Any:
        t = args[0]
        if not is_plain(t):
            return self._run(func, args, kwargs)
        if len(args) > 1 and isinstance(args[1], Tensor) and self.pending.filled:
            self._settle_arguments(func, args[1:], None)  # the value of fill_
        memory = self.pending.find(t)
        if (memory is None or not memory.fills) and not geometry.is_worth(t):
            if self.pending.notes(t):
                how = operators.parameters_of(func, args)
                self.pending.wrote(t, Written.small(t, *how, caller()))
            return func(*args, **kwargs)
        if not geometry.is_here(t):
            return self._run(func, args, kwargs)
        law = None if t.is_neg() else law_of(args, kwargs)
        fill = law and build.one(law, t, kwargs.get("generator"), memory is not None)
        if fill is not None:
            fill.bumps = 0  # torch counts the operator's version up
            fill = probe.proved(fill)
        if fill is not None:
            if memory is not None and self._record(memory, fill, caller()):
                return t
            if fill.items >= geometry.least(fill.device):
                if memory is not None:
                    self._settle_arguments(func, args, None)
                self._at_once(t, fill, caller())
                execute.run([fill])
                return t
        return self._run(func, args, kwargs)

    # ---- births ----------------------------------------------------------------------------------

    def _empty(self, func: Any, args: Any, kwargs: Kwargs) -> Any:
        out = func(*args, **kwargs)
        if type(out) is not Tensor:
            here = shard.local(out)
            if type(here) is Tensor:
                self.adopt(here)
        elif not kwargs.get("pin_memory") and (self.keeps_all or geometry.may_be_worth(out)):
            memory = self.adopt(out)
            if memory is not None and not self.keeps_all:
                memory.is_noted = geometry.is_worth(out)
        return out

    def _factory(self, func: Any, args: Any, kwargs: Kwargs, spec: operators.Factory) -> Any:
        """Do what an empty tensor and a fill do: zeros, full_like, new_ones, rand, ..."""
        empty, count, law_of = spec
        least = 1 if self.of_any_size else geometry.MIN_NATIVE
        if operators.makes_native(args, kwargs, least) and self._may_wait():
            out = empty(*args[:count], **kwargs)
            law = law_of(args, kwargs)
            fill = law and probe.proved(build.one(law, out, kwargs.get("generator")))
            memory = self.pending.adopt(out)
            if fill is not None and memory is not None and self._record(memory, fill, None):
                return out
            del out, fill  # before torch allocates again
        out = self._run(func, args, kwargs)
        if type(out) is Tensor and not geometry.is_worth(out) and not kwargs.get("pin_memory"):
            self.adopt(out)
            how = operators.parameters_of(func, args)
            self.pending.wrote(out, Written.small(out, *how, None))
        return out

    # ---- what follows a fill ---------------------------------------------------------------------

    def _in_place(self, func: Any, args: Any, kwargs: Kwargs) -> Any:
        """Let a pointwise operator wait behind the fill of its tensor."""
        t = args[0]
        memory = self.pending.find(t)
        if memory is not None and memory.fills and self._may_wait() and not t.is_neg():
            step = t.dtype in geometry.DTYPES and chains.step(func, t.dtype, args[1:], kwargs)
            if (
                step
                and geometry.layout_of(t) is not None
                and self.pending.push_step(memory, t, step)
            ):
                return t
        return self._run(func, args, kwargs)

    def _out_of_place(self, func: Any, args: Any, kwargs: Kwargs) -> Any:
        """Make a copy of what waits, with a pointwise operator behind it."""
        t = args[0]
        if self._waits_whole(t) and t.dtype in geometry.DTYPES:
            step = chains.step(operators.OUT_OF_PLACE[func], t.dtype, args[1:], kwargs)
            out = step and self._copied_whole(t, t.dtype)
            if out is not None and step:
                memory = self.pending.find(out)
                if memory is not None and self.pending.push_step(memory, out, step):
                    return out
        return self._made(func, args, kwargs)

    def _convert(self, func: Any, args: Any, kwargs: Kwargs) -> Any:
        """Let the conversion of what waits wait."""
        t = args[0]
        if self._waits_whole(t) and operators.converts(t, kwargs):
            out = self._copied_whole(t, kwargs["dtype"])
            if out is not None:
                return out
        return self._made(func, args, kwargs)

    def _clone(self, func: Any, args: Any, kwargs: Kwargs) -> Any:
        """Clone: the copy of what waits waits, too."""
        t = args[0]
        layout = kwargs.get("memory_format", torch.preserve_format)
        if layout in (torch.preserve_format, torch.contiguous_format) and self._waits_whole(t):
            out = self._copied_whole(t, t.dtype)
            if out is not None:
                return out
        out = self._made(func, args, kwargs)
        if self.pending.is_garbage(t) and type(out) is Tensor:
            self.adopt(out)  # so is its copy
        return out

    def _made(self, func: Any, args: Any, kwargs: Kwargs) -> Any:
        """Run an operator that makes a tensor."""
        return self._run(func, args, kwargs)

    def _waits_whole(self, t: Any) -> bool:
        """Return whether all of a tensor waits, and a copy of it may."""
        memory = self.pending.find(t)
        return (
            memory is not None
            and memory.says_all()
            and t.dtype in geometry.KEYED
            and is_all(t)
            and geometry.is_here(t)
            and not (t.requires_grad and torch.is_grad_enabled())
            and self._may_wait()
        )

    def _copied_whole(self, t: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return a tensor in which all that waits in t's storage waits, too."""
        out = torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)
        memory = self.pending.adopt(out)
        if memory is None or out.stride() != t.stride():  # of dimensions of size 1
            return None
        self._copy_fills(self.pending.filled[storage_id(t)], memory, t, dtype)
        return out

    def _copy_fills(self, by: Memory, to: Memory, t: Tensor, dtype: torch.dtype) -> None:
        fills = [self._copied(fill, to) for fill in by.fills]
        if dtype is t.dtype:
            for fill in fills:
                self.pending.push(to, fill)
        else:
            self.pending.push(to, Cast((*fills,), t.dtype, dtype, (0, to.nbytes), t.numel()))

    def _copied(self, fill: Waiting, memory: Memory) -> Waiting:
        """Return what waits elsewhere, for another memory of the same layout."""
        return fill

    def _copy(self, func: Any, args: Any, kwargs: Kwargs) -> Any:
        """Copy what waits as a whole by recording it once more; otherwise write it.

        What is overwritten is not written.
        """
        to, by = args[0], args[1]
        memory = self.pending.find(to)
        if memory is not None and self.pending.filled and operators.copies_plainly(to, by):
            if self._copy_waiting(memory, to, by):
                return to
            if memory.fills and is_all(to):
                self._settle_arguments(func, args[1:], None)
                self.pending.forget(memory)
        return self._run(func, args, kwargs)

    def _copy_waiting(self, memory: Memory, to: Tensor, by: Tensor) -> bool:
        """Record what is to be copied once more, if all of it waits; return whether it does."""
        other = self.pending.filled.get(storage_id(by))
        if other is None or other is memory or not self._may_wait() or not other.says_all():
            return False
        if is_all(to) and is_all(by) and to.dtype in geometry.KEYED:
            self._copy_fills(other, memory, by, to.dtype)
            return True
        same = len(other.fills) == 1 and by.dtype is to.dtype
        return same and self._copy_single(memory, other.fills[0], to, by)

    def _copy_single(self, memory: Memory, fill: Waiting, to: Tensor, by: Tensor) -> bool:
        """Record the only fill of the storage of `by` for a tensor of any layout."""
        if not isinstance(fill, Drawn) or fill.op != "constant" or fill.dtype != to.dtype:
            return False
        new = probe.proved(build.constant(to, fill.a, True))
        return new is not None and self._record(memory, new, caller())

    # ---- what shows memory -----------------------------------------------------------------------

    def _replace_memory(self, func: Any, args: Any, kwargs: Kwargs) -> Any:
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

    def _note_operator(self, func: Any, args: Any, kwargs: Kwargs) -> None:
        """Note what an operator of torch's is about to write."""
        by = args[1] if func is torch.ops.aten.copy_.default else None
        copies_garbage = by is not None and self.pending.is_garbage(by)
        name, overwrites = func._schema.name, func._schema.name in operators.OVERWRITING
        for t in leaves(operators.written(func, args, kwargs)):
            if not isinstance(t, Tensor):
                continue
            memory = self.pending.find_known(t) if copies_garbage and is_all(t) else None
            if memory is not None:
                memory.touched, memory.written = False, []
            elif is_plain(t):
                if self.pending.notes(t):
                    how = Written.small(t, name[6:], 0.0, 0.0, caller())
                    self.pending.wrote(t, how, overwrites)
            else:
                self.pending.wrote(t)


def _handlers() -> dict[Any, Callable[[Capture, Any, Any, Kwargs], Any]]:
    table: dict[Any, Any] = {
        torch.ops.aten.clone.default: lambda c, f, x, k: c._clone(f, x, k),
        torch.ops.aten.copy_.default: lambda c, f, x, k: c._copy(f, x, k),
        operators.CONVERT: Capture._convert,
        **dict.fromkeys(operators.IN_PLACE, lambda c, f, x, k: c._in_place(f, x, k)),
        **dict.fromkeys(operators.OUT_OF_PLACE, Capture._out_of_place),
        **dict.fromkeys(operators.EMPTY, Capture._empty),
        **dict.fromkeys(operators.REPLACE_MEMORY, Capture._replace_memory),
    }
    for func, builder in operators.FILLS.items():
        table[func] = lambda c, f, x, k, b=builder: c._fill(f, x, k, b)
    for func, spec in operators.FACTORIES.items():
        table[func] = lambda c, f, x, k, s=spec: c._factory(f, x, k, s)
    return table


HANDLERS = _handlers()
