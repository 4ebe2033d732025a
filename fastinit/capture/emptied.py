# SPDX-License-Identifier: BSD-3-Clause
"""What nn.Module.to_empty has made in this process, and nobody has written yet.

Its buffers look like those that a constructor has computed: only who saw them made can tell.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from fastinit.core import geometry, shard

# By the tensor's id: it, what calls it dead, its storage and its versions when it was made.
_made: dict[int, tuple[weakref.ref[Tensor], int, tuple[int, ...]]] = {}
_modules: list[weakref.ref[nn.Module]] = []  # that were asked


def _forgetting(key: int) -> Callable[[object], object]:
    return lambda _: _made.pop(key, None)


def _versions(t: Tensor) -> tuple[int, ...]:
    return t._version, shard.local(t)._version


def note(module: nn.Module) -> list[Tensor]:
    """Note the tensors that a module has just got, and return them."""
    new = []
    for m in module.modules():
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is None or nn.parameter.is_lazy(t) or t.is_inference():
                continue
            here = shard.local(t)
            if geometry.is_plain(here) and not here.is_meta and here.numel() != 0:
                ref = weakref.ref(t, _forgetting(id(t)))
                _made[id(t)] = ref, geometry.storage_id(here), _versions(t)
                new.append(t)
    _modules[:] = [ref for ref in _modules if ref() is not None and ref() is not module]
    _modules.append(weakref.ref(module))
    return new


def is_garbage(t: Tensor) -> bool:
    """Return whether a tensor is one of these, and no operator has written it since."""
    found = _made.get(id(t))
    if found is None or found[0]() is not t or t.is_inference():
        return False
    return found[1:] == (geometry.storage_id(shard.local(t)), _versions(t))


def left() -> list[Tensor]:
    """Return those that are still to be written, and forget the others."""
    now = _made.copy()  # in one step: while a tuple is made of them, tensors may die
    tensors = [t for t in (ref() for ref, *_ in now.values()) if t is not None]
    for t in tensors:
        if not is_garbage(t):
            _made.pop(id(t), None)
    return [t for t in tensors if id(t) in _made]


def modules() -> Iterator[nn.Module]:
    """Yield the modules that have some of these."""
    for module in (ref() for ref in tuple(_modules)):
        if module is not None and _made:
            yield module
