# SPDX-License-Identifier: BSD-3-Clause
"""The keyed stream's work for either back end: a law, a key, and where the elements stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastinit.core import geometry, laws
from fastinit.core.fill import gaussian_dtype, packed_items
from fastinit.core.laws import Law
from fastinit.core.shard import Slab


class Work(NamedTuple):
    """A law for some elements of one tensor, and the key of their numbers."""

    law: Law
    key: int  # of Philox
    tensor: Tensor  # plain memory
    slabs: Sequence[Slab]

    @classmethod
    def of(cls, law: Law, key: int, tensor: Tensor, slabs: Sequence[Slab]) -> Work:
        """Return the work of a law for a tensor, which may be complex."""
        if tensor.dtype.is_complex:
            law, tensor = law.of_parts(), torch.view_as_real(tensor.detach())
        return cls(law, key, tensor, slabs)


class Batch:
    """Collects works of one native call or launch, and what has to be done behind it."""

    def __init__(self) -> None:
        self.scratch = 0  # bytes
        self.sparse: list[Work] = []
        self._copies: list[tuple[Tensor, Work]] = []  # from memory that is written to first

    def add(self, work: Work, device: torch.device) -> None:
        """Add a work that is to be computed on a device, where its tensor may not be."""
        to = work
        if not is_direct(work, device.type):
            to = elsewhere(work, device)
            self._copies.append((to.tensor, work))
            self.scratch += to.tensor.nbytes
        if to.law.op == "orthogonal":
            to = self._reflectors(to)
            self.scratch += to.tensor.nbytes
        elif to.law.op == "sparse":
            self.sparse.append(to)
        self.pack(to)

    def _reflectors(self, work: Work) -> Work:
        """Return the work of the normals of orthogonal matrices, in the order of qr.write_haar_."""
        count, rows, cols = work.law.shape
        out = work.tensor.detach().view(count, rows, cols)
        each, dtype = packed_items(rows, cols), gaussian_dtype(out.dtype)
        drawn = torch.empty((count, each), dtype=dtype, device=out.device)
        self.factor(drawn, out, float(work.law.numbers[0]))
        return Work(laws.normal(0.0, 1.0), work.key, drawn, whole(count * each))

    def finish(self) -> None:
        for scratch, work in self._copies:
            copy(scratch, work)

    def pack(self, work: Work) -> None:
        raise NotImplementedError

    def factor(self, drawn: Tensor, out: Tensor, gain: float) -> None:
        """Note what is to become of the normals: one row for each matrix."""
        raise NotImplementedError


def is_direct(work: Work, device: str) -> bool:
    """Return whether kernels of a kind of device can write the elements where they belong."""
    t = work.tensor
    if not geometry.is_plain(t) or t.is_neg():
        raise NotImplementedError(f"the keyed stream cannot be written to a {type(t).__name__}")
    if t.device.type != device or t.dtype not in geometry.DTYPES:
        return False
    return not work.law.is_of_all or (
        t.is_contiguous() and list(work.slabs) == whole(t.numel()) and t.numel() == work.law.items
    )


def elsewhere(work: Work, device: torch.device) -> Work:
    """Return the same work in memory of its own; of the whole parameter if nothing less will do."""
    dtype = work.tensor.dtype if work.tensor.dtype in geometry.DTYPES else torch.float32
    if work.law.is_of_all:
        made = torch.empty(work.law.items, dtype=dtype, device=device)
        return Work(work.law, work.key, made, whole(work.law.items))
    slabs: list[Slab] = []
    items = 0
    for slab in work.slabs:
        dims, stride = [], 1
        for size, _, step in slab.dims:
            dims.append((size, stride, step))
            stride *= size
        slabs.append(Slab(items, slab.index, tuple(dims)))
        items += stride
    return Work(work.law, work.key, torch.empty(items, dtype=dtype, device=device), slabs)


def copy(scratch: Tensor, work: Work) -> None:
    """Copy what was written in memory that `elsewhere` made to where it belongs."""
    with torch.no_grad():
        begin = 0
        for slab in work.slabs:
            sizes = [size for size, _, _ in slab.dims]
            to = work.tensor.detach()
            to = to.as_strided(
                sizes, [stride for _, stride, _ in slab.dims], to.storage_offset() + slab.offset
            )
            if work.law.is_of_all:
                to.copy_(scratch.as_strided(sizes, [step for _, _, step in slab.dims], slab.index))
            else:
                items = to.numel()
                to.copy_(
                    scratch[begin : begin + items]
                    .view(sizes[::-1])
                    .permute(*range(len(sizes))[::-1])
                )
                begin += items


def whole(items: int) -> list[Slab]:
    """Return the slab of all of a contiguous tensor."""
    return [Slab(0, 0, ((items, 1, 1),))]
