# SPDX-License-Identifier: BSD-3-Clause
"""Which parameters lie where in memory, for the keys of what is written there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastinit import plan, shard
from fastinit.laws import Law
from fastinit.shard import Slab

Box = tuple[int, tuple[int, ...], tuple[int, ...]]  # offset in a storage, sizes and strides


def box_of(t: Tensor) -> Box:
    return int(t.storage_offset()), tuple(t.shape), t.stride()


class Names:
    """Names of tensors by their memory. The first name of a tied one counts."""

    def __init__(self, named: Iterable[tuple[str, Tensor]] = ()) -> None:
        self._exact: dict[tuple[int, Box], tuple[str, Tensor]] = {}
        self._of: dict[int, list[tuple[str, Tensor]]] = {}
        for name, t in named:
            here = shard.local(t)
            if here.layout is torch.strided and type(here) in (Tensor, torch.nn.Parameter):
                key = plan.storage_id(here)
                self._exact.setdefault((key, box_of(here)), (name, t))
                self._of.setdefault(key, []).append((name, t))

    def find(self, storage: int, box: Box, law: Law) -> tuple[str, list[Slab] | None] | None:
        """The name that a key is made of, and what of the parameter a box of a storage is.

        Matrices that are parts of a parameter are wholes of their own: None as slabs, and the name
        has the index of the first element behind it, in brackets. None: nobody's.
        """
        exact = self._exact.get((storage, box))
        if exact is not None:
            return exact[0], shard.slabs(exact[1])
        for name, t in self._of.get(storage, ()):
            begin = box[0] - int(shard.local(t).storage_offset())
            found = shard.part(t, begin, *box[1:])
            if found is not None and law.is_of_shape:
                return f"{name}[{min((s.index for s in found), default=0)}]", None
            if found is not None:
                return name, found
        return None
