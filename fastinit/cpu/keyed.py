# SPDX-License-Identifier: BSD-3-Clause
"""The keyed stream in CPU memory: packed descriptors, native calls."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastinit.core import geometry, kernels, keyed_numbers
from fastinit.core.shard import MOST_DIMS
from fastinit.core.work import Batch, Work
from fastinit.cpu import qr as cpu_qr

FIELDS = (
    f"Q address, Q key, Q index, Q items, 7d p, {3 * MOST_DIMS}q dim, 8q diagonal, "
    "B op, B dtype, B rank, 5x unused"
)
FIELDS_OF_DIM = "q size, q stride, q step"
PACK = kernels.packer(kernels._cpu, "keyed", FIELDS)
kernels.packer(kernels._cpu, "keyed_dim", FIELDS_OF_DIM)
_NOTHING = (0,) * 8


class _OnCpu(Batch):
    def __init__(self) -> None:
        super().__init__()
        self._packed: list[bytes] = []
        self._matrices: list[cpu_qr.Job] = []

    def pack(self, work: Work) -> None:
        self._packed += packed(work)

    def factor(self, drawn: Tensor, out: Tensor, gain: float) -> None:
        self._matrices.append(cpu_qr.haar_job(out, drawn, gain))

    def go(self) -> None:
        for part in (self._packed, [mask(work) for work in self.sparse]):
            if part:
                kernels.run_keyed(b"".join(part))
        if self._matrices:
            cpu_qr.run(self._matrices)
        self.finish()


def run(works: Iterable[Work]) -> None:
    """Write all works, in one native call as long as there is room for what is made elsewhere.

    No two may overlap. Tensors of other devices are filled here and copied.
    """
    batch, here = _OnCpu(), torch.device("cpu")
    for work in works:
        batch.add(work, here)
        if batch.scratch > cpu_qr.SCRATCH:
            batch.go()
            batch = _OnCpu()
    batch.go()


def packed(work: Work) -> list[bytes]:
    law, key, t, slabs = work
    base, size, dtype = geometry.address_of(t), t.element_size(), geometry.DTYPES[t.dtype]
    p = keyed_numbers.for_kernels(law, t.dtype)
    p = (*p, *_NOTHING[: 7 - len(p)])
    result = []
    op = kernels.OPS["normal" if law.op == "sparse" else law.op]
    of_whole = law.shape if law.op == "diagonal" else _NOTHING
    for slab in slabs:
        dims = [x for dim in slab.dims for x in dim]
        items = 1
        for n, _, _ in slab.dims:
            items *= n
        result.append(PACK.pack(
            base + slab.offset * size, key, slab.index, items, *p,
            *dims, *(0,) * (3 * MOST_DIMS - len(dims)), *of_whole,
            op, dtype, len(slab.dims),
        ))  # fmt: skip
    return result


def mask(work: Work) -> bytes:
    rows, columns, zeros = work.law.shape
    return PACK.pack(
        geometry.address_of(work.tensor), work.key, 0, columns, *_NOTHING[:7],
        columns, 1, 1, *(0,) * (3 * MOST_DIMS - 3), rows, zeros, columns, *_NOTHING[:5],
        kernels.OPS["sparse_mask"], geometry.DTYPES[work.tensor.dtype], 1,
    )  # fmt: skip
