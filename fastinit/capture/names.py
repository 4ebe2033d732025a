# SPDX-License-Identifier: BSD-3-Clause
"""Names of a model's tensors, and which of them a part of memory has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from fastinit.core import geometry, shard
from fastinit.core.laws import Law
from fastinit.core.shard import Slab

# Wrappers and the name under which each holds what it wraps, which is no part of a parameter's.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "PeftModel": "base_model",  # and what tuners and their layers have within it
    "BaseTuner": "model",
    "BaseTunerLayer": "base_layer",
}


def named_tensors(
    model: nn.Module, prefix: str = "", lazy: bool = False, strip: str = ""
) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield name, module, attribute and tensor of parameters, then buffers, tied ones repeatedly.

    Names are those of `model.named_parameters()`, without what torch.compile, DDP, FSDP, activation
    checkpointing and PEFT put in front of them, and without `strip`, unless another tensor has that
    name already.
    """
    modules = list(_named_modules(model, "", set()))
    found = [
        (path + name, m, name, t)
        for kind in ("_parameters", "_buffers")
        for path, m in modules
        for name, t in getattr(m, kind).items()
        if t is not None and (lazy or not nn.parameter.is_lazy(t))
    ]
    for full, (_, m, name, t) in zip(stripped([full for full, *_ in found], strip), found):
        yield prefix + full, m, name, t


def stripped(names: list[str], strip: str) -> list[str]:
    """Return names without what some begin with, unless another has that name already."""
    taken = {*names} if strip else ()
    short = [name.removeprefix(strip) for name in names]
    return [a if b in taken else b for a, b in zip(names, short)]


def memory_of(t: Any) -> Iterator[Tensor]:
    """Yield the plain tensors that have a tensor's values on this rank, those inside it if need be.

    None of what is lazy, sparse, quantised, or a subclass that does not say what is in it.
    """
    t = shard.local(t)
    if nn.parameter.is_lazy(t):
        return
    if geometry.is_plain(t) or geometry.is_simple(t):
        yield t
    elif hasattr(t, "__tensor_flatten__"):
        for name in t.__tensor_flatten__()[0]:
            yield from memory_of(getattr(t, name))


def _named_modules(
    m: nn.Module, path: str, seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    if m in seen:
        return
    seen.add(m)
    yield path, m
    wrapped = next((_WRAPPERS[c.__name__] for c in type(m).__mro__ if c.__name__ in _WRAPPERS), "")
    for name, child in m._modules.items():
        if child is not None:
            yield from _named_modules(child, path if name == wrapped else f"{path}{name}.", seen)


# Offset in a storage, sizes and strides; of a complex tensor those of its real and imaginary parts.
Box = tuple[int, tuple[int, ...], tuple[int, ...]]


def box_of(t: Tensor) -> Box:
    return geometry.in_reals(t)


class Names:
    """Names of tensors by their memory. The first name of a tied one counts."""

    def __init__(self, named: Iterable[tuple[str, Tensor]] = ()) -> None:
        self._exact: dict[tuple[int, Box], tuple[str, Tensor]] = {}
        self._of: dict[int, list[tuple[str, Tensor]]] = {}
        for name, t in named:
            here = shard.local(t)
            if geometry.is_plain(here):
                key = geometry.storage_id(here)
                self._exact.setdefault((key, box_of(here)), (name, t))
                self._of.setdefault(key, []).append((name, t))

    def first(self, storage: int) -> str | None:
        """Return the first name of a tensor in a storage."""
        found = self._of.get(storage)
        return found[0][0] if found else None

    def find(
        self, storage: int, box: Box, law: Law, first: int | None = None
    ) -> tuple[str, list[Slab] | None] | None:
        """Return the name that a key is made of, and what of the parameter a box of a storage is.

        Matrices that are parts of a parameter are wholes of their own: None as slabs, and the name
        has the index of the first element behind it, in brackets. None if the box is nobody's.
        `first`: that index, of a matrix of which this is a part.
        """
        exact = self._exact.get((storage, box)) if first is None else None
        if exact is not None:
            return exact[0], shard.slabs(exact[1])
        for name, t in self._of.get(storage, ()):
            begin = box[0] - box_of(shard.local(t))[0]
            found = shard.part(t, begin, *box[1:])
            if found is not None and law.is_of_shape:
                least = min((s.index for s in found), default=0)
                return f"{name}[{least if first is None else first}]", None
            if found is not None:
                return name, found
        return None
