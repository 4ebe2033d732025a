# SPDX-License-Identifier: BSD-3-Clause
"""Models that are older than the scope which fills their tensors, found by who fills them."""

from __future__ import annotations

import gc
import inspect
import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any, TypeGuard

from torch import Tensor, nn

from fastinit.core import geometry, shard


def stack() -> list[CodeType]:
    """Return what this thread is running, the outermost first."""
    return [frame.f_code for frame in _frames()]


def at_work(
    before: Sequence[CodeType], name: str = "", without: Collection[str] = ()
) -> Iterator[nn.Module]:
    """Yield the modules whose methods (of a name; without some) are running, the innermost first.

    `before`: `stack()` of an earlier moment; what has been running since does not count. Variables
    of a frame are looked at only if need be: up to Python 3.12 a look keeps all that they hold.
    """
    frames = _frames()
    since = len(list(itertools.takewhile(lambda x: x[0].f_code is x[1], zip(frames, before))))
    for frame in reversed(frames[since:]):
        code = frame.f_code
        if name not in ("", code.co_name) or code.co_name in without:
            continue
        if code.co_argcount and code.co_varnames[0] == "self":
            module = frame.f_locals.get("self")
            if _is_made(module):
                yield module


def everywhere() -> list[nn.Module]:
    """Return all modules that Python's garbage collector knows, without running it.

    It knows a million objects, of which a look at the type costs 30 ns each.
    """
    kinds: set[type] = set()
    todo: list[type] = [nn.Module]
    while todo:
        kind = todo.pop()
        if kind not in kinds:
            kinds.add(kind)
            todo += type.__subclasses__(kind)
    return [x for x in gc.get_objects() if type(x) in kinds and _is_made(x)]


def owners_of(
    storages: Collection[int], modules: Iterable[nn.Module]
) -> list[tuple[nn.Module, set[int]]]:
    """Return the modules that have tensors in some storages, and in which of them.

    Each comes once, in the order in which they were given, unless it is in another one.
    """
    found: dict[int, tuple[nn.Module, set[int]]] = {}
    seen: set[int] = set()
    inner: set[int] = set()
    for m in modules:
        if id(m) in seen or id(m) in inner:
            continue
        seen.add(id(m))
        parts = list(m.modules())
        inner.update(id(p) for p in parts[1:])
        tensors = (t for p in parts for kind in (p._parameters, p._buffers) for t in kind.values())
        mine = {s for s in map(_storage_of, tensors) if s in storages}
        if mine:
            found[id(m)] = m, mine
    return [x for key, x in found.items() if key not in inner]


def forgotten(modules: list[nn.Module]) -> set[int]:
    """Return the ids of those modules that nobody but the list and their own class holds.

    torch keeps a module that it gives a parametrisation in that class, which copies have, too.
    """
    held = [_times_in_class(m) for m in modules]
    alone = [object()]
    most = sys.getrefcount(alone[0])
    found = (i for i, n in enumerate(held) if n and sys.getrefcount(modules[i]) <= most + n)
    return {id(modules[i]) for i in found}


def _times_in_class(m: nn.Module) -> int:
    """Return how many properties of a parametrised module's class hold it."""
    if "parametrizations" not in m._modules:
        return 0
    todo: list[Any] = [p.fget for p in vars(type(m)).values() if isinstance(p, property)]
    held = 0
    while todo:
        within = [c.cell_contents for c in getattr(todo.pop(), "__closure__", None) or ()]
        held += sum(x is m for x in within)
        todo += filter(inspect.isfunction, within)
    return held


def _storage_of(t: Tensor | None) -> int:
    """Return the id of a parameter's or buffer's storage; 0: it has none."""
    if t is None or nn.parameter.is_lazy(t):
        return 0
    here = shard.local(t)
    return geometry.storage_id(here) if geometry.is_plain(here) else 0


def _is_made(x: object) -> TypeGuard[nn.Module]:
    """Return whether something is a module whose constructor has begun; proxies are not asked."""
    return issubclass(type(x), nn.Module) and "_modules" in vars(x)


def _frames() -> list[FrameType]:
    """Return the frames on this thread's stack, the outermost first."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found[::-1]
