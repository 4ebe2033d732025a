# SPDX-License-Identifier: BSD-3-Clause
"""Fills from the keyed stream on GPUs: units and tiles, packed descriptors, launches.

The numbers are those of the CPU, bit by bit, but for orthogonal matrices, which are sums in another
order. csrc/cuda/keyed/launch.h has the contract.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastinit.core import geometry, kernels
from fastinit.core.shard import MOST_DIMS, Slab
from fastinit.core.work import Batch, Work
from fastinit.cpu import keyed as cpu_keyed
from fastinit.cuda import qr as cuda_qr
from fastinit.cuda import runtime

MOST_INLINED = 11  # fills that travel in the arguments of a kernel

_AXIS = kernels.packer(kernels._cuda, "keyed_axis", "I size, I magic, B shift, B dim, 2x unused")
_TILES = kernels.packer(
    kernels._cuda,
    "keyed_tiles",
    f"{cpu_keyed.PACK.size}s fill, I first_tile, I tiles, I units, "
    f"B is_dense, B is_row, B axes, x unused, {MOST_DIMS * _AXIS.size}s axis, 4x unused_end",
)
kernels.packer(
    kernels._cuda,
    "keyed_arguments",
    f"Q table, I fills, I tiles, {MOST_INLINED * _TILES.size}s inlined",
)
kernels.packer(kernels._cuda, "keyed", cpu_keyed.FIELDS)
kernels.packer(kernels._cuda, "keyed_dim", cpu_keyed.FIELDS_OF_DIM)
_UNITS_OF_TILE = 1024
_MOST_UNITS = (1 << 31) - 1  # of a descriptor


class Walk(NamedTuple):
    """The order in which the units of a slab are counted: along which axes, the nearest first."""

    is_row: bool  # dimension 0 is counted in units of 16 bytes, not in elements
    axes: tuple[tuple[int, int], ...]  # number of units, dimension
    units: int


def run(works: Iterable[Work]) -> None:
    """Write all works on the current streams; no two may overlap.

    It is one launch for each device as long as there is room for what is made elsewhere.
    """
    if not kernels.can_use_cuda():
        raise RuntimeError(
            "fastinit: numbers of a Key cannot be written by kernels without fastinit._cuda, nor "
            "while a CUDA graph is captured"
        )
    launches: dict[int, _Launch] = {}
    with kernels.undisturbed(), torch.no_grad():
        for work in works:
            if not work.slabs:
                continue
            device = geometry.device_of(work.tensor)
            launch = launches.setdefault(device, _Launch(device))
            launch.add(work, work.tensor.device)
            if launch.scratch > cuda_qr.MOST_MEMORY:
                launches.pop(device).go()
        for launch in launches.values():
            launch.go()


class _Launch(Batch):
    def __init__(self, device: int) -> None:
        super().__init__()
        self.device = device
        self._packed: list[bytes] = []
        self._tiles = 0
        self._matrices: list[cuda_qr.Job] = []

    def factor(self, drawn: Tensor, out: Tensor, gain: float) -> None:
        rows, cols = out.shape[1:]
        self._matrices += [cuda_qr.Job(x, y, rows, cols, gain) for x, y in zip(drawn, out)]

    def pack(self, work: Work) -> None:
        size, base = work.tensor.element_size(), geometry.address_of(work.tensor)
        of_unit = 16 // size
        parts = [part for slab in work.slabs for part in _parts(slab, of_unit)]
        descriptors = cpu_keyed.packed(work._replace(slabs=[slab for slab, _ in parts]))
        for descriptor, (slab, way) in zip(descriptors, parts):
            is_dense = (
                (len(slab.dims), *slab.dims[0][1:]) == (1, 1, 1)
                and slab.index % of_unit == 0
                and (base + slab.offset * size) % 16 == 0
            )
            tiles = -(-way.units // _UNITS_OF_TILE)
            axes = [_axis(n, dim) for n, dim in way.axes[:-1]]
            for n, dim in way.axes[-1:]:  # what is left counts along it: any quotient is 0
                axes.append(_AXIS.pack(n, 0, 31, dim))
            counted = self._tiles, tiles, way.units
            kind = is_dense, way.is_row, len(axes)
            self._packed.append(_TILES.pack(descriptor, *counted, *kind, b"".join(axes)))
            self._tiles += tiles

    def go(self) -> None:
        count, data = len(self._packed), b"".join(self._packed)
        if count > MOST_INLINED:
            table = runtime.upload(data, self.device)
            at = geometry.address_of(table)
            runtime.run_keyed(b"", at, count, self._tiles, self.device)
        elif count:
            runtime.run_keyed(data, 0, count, self._tiles, self.device)
        for work in self.sparse:
            zeros = runtime.copy(_zeros_of(work), self.device)
            work.tensor.data.masked_fill_(zeros, 0.0)
        if self._matrices:
            cuda_qr.orthonormalize(self._matrices, direct=True)
        self.finish()


def _zeros_of(work: Work) -> Tensor:
    """Return where sparse_ puts zeros; columns are shuffled one step after another, on the CPU."""
    ones = torch.ones(work.tensor.shape, dtype=torch.bfloat16, device="cpu")
    kernels.run_keyed(cpu_keyed.mask(work._replace(tensor=ones)))
    return ones == 0


# ---- how units are counted -----------------------------------------------------------------------


def _axis(size: int, dim: int) -> bytes:
    """Pack an axis with the constants of division by multiplication (Granlund, Montgomery 1994)."""
    shift = (size - 1).bit_length()
    magic = (((1 << shift) - size) << 32) // size + 1
    return _AXIS.pack(size, magic, shift, dim)


def _walk(slab: Slab, of_unit: int) -> Walk:
    (n, stride, step), *rest = slab.dims
    is_row = step == 1
    near = (stride, n, 0)
    if is_row:
        # Rows begin in the middle of a unit if the index or a step leads there.
        common = math.gcd(of_unit, *(dim[2] for dim in rest))
        lead = slab.index % common + of_unit - common
        near = (stride * of_unit, -(-(lead + n) // of_unit), 0)
    axes = sorted([near, *((dim[1], dim[0], i) for i, dim in enumerate(rest, 1))])
    return Walk(
        is_row,
        tuple((count, dim) for _, count, dim in axes if count > 1),
        math.prod(count for _, count, _ in axes),
    )


def _parts(slab: Slab, of_unit: int) -> Iterator[tuple[Slab, Walk]]:
    """Halve a slab until the kernel can count the units of each part in 31 bits."""
    way = _walk(slab, of_unit)
    if way.units <= _MOST_UNITS:
        yield slab, way
        return
    _, k = max((dim[0], i) for i, dim in enumerate(slab.dims))
    n, stride, step = slab.dims[k]
    half = n // 2 // of_unit * of_unit or n // 2
    for start, count in ((0, half), (half, n - half)):
        dims = (*slab.dims[:k], (count, stride, step), *slab.dims[k + 1 :])
        at = Slab(slab.offset + start * stride, slab.index + start * step, dims)
        yield from _parts(at, of_unit)
