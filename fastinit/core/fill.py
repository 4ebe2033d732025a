# SPDX-License-Identifier: BSD-3-Clause
"""A `Fill`: one tensor and what is to be written into it."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastinit.core import geometry, kernels


@dataclass(slots=True, eq=False)
class Fill:
    """What is to be written into one tensor. Mutable only until it is proved."""

    tensor: Tensor
    op: str  # one of kernels.OPS, sparse (normal with a mask), or orthogonal (normal, then a QR)
    a: float = 0.0  # value; from; mean
    b: float = 0.0  # to; std
    generator: torch.Generator | None = None  # None: no words are drawn
    layout: str = "contiguous"  # contiguous, dense (permuted) or strided
    rank: int = 0
    shape: tuple[int, ...] = geometry.DENSE  # FillDesc's union; orthogonal: rows, columns, matrices
    items: int = 0
    lo: float = 0.0
    hi: float = 0.0
    flavour: int = 0
    rests_on: str = ""  # an operator that has to be proved as well
    bumps: int = 1  # of the tensor's version counter
    extent: tuple[int, int] = (0, 0)  # of its bytes when it was recorded: in memory or in a storage
    state: Any = None  # of the generator, if its words were drawn ahead: see draw_ahead
    device: int = -1  # index of a GPU; -1: the CPU
    scale: float = 0.0  # trunc_erfinv: of the inverse error function; orthogonal: gain
    mean: float = 0.0  # and what is added
    zeros: int = 0  # sparse: of each column
    mask: Tensor | None = None  # sparse, if it was drawn ahead: 0 where zeros go
    stream: int = 0  # on which it was asked for
    caller: tuple[str, tuple[tuple[str, object], ...]] | None = None  # for reports: name, arguments
    # Of the keyed stream: see capture.py.
    bounds: tuple[float, float] | None = None  # of trunc_normal_, whatever becomes of it
    law: Any = None  # laws.Law
    box: tuple[int, tuple[int, ...], tuple[int, ...]] = (0, (), ())  # in the storage, in elements
    slabs: Any = None  # of the whole, if known beforehand
    otherwise: Any = None  # slabs, if it is no part of what has a name
    owner: Any = None  # whose memory it is; or the key of Philox and what it comes from
    numbers: Any = None  # what it has in common with its copies


def normals_of(fill: Fill, t: Tensor) -> Fill:
    """What an orthogonal fill draws, to go to a tensor of as many elements."""
    drawn = Fill(t, "normal", 0.0, 1.0, fill.generator, items=fill.items, flavour=fill.flavour)
    drawn.device, drawn.state = fill.device, fill.state
    if fill.device < 0 and fill.items < 16:
        drawn.op, drawn.rank, drawn.shape = "normal_pairs", 1, (fill.items, 0, 0, 0, 1, 0, 0, 0)
    return drawn


# ---- geometry ------------------------------------------------------------------------------------


def extent(fill: Fill) -> tuple[int, int]:
    """First byte and the one behind the last."""
    t = fill.tensor
    begin = geometry.address_of(t)
    items = geometry.span(t) if fill.layout == "strided" else t.numel()
    return begin, begin + items * t.element_size()


def is_dense(fill: Fill) -> bool:
    """Whether it writes every byte of its extent."""
    return fill.rank == 0 and fill.op != "sparse_mask"


class Room:
    """Memory that the fills of a stage write, none of which may overlap."""

    def __init__(self) -> None:
        # Sorted: first byte, end, position in the stage, whether it may be left out.
        self._taken: list[tuple[int, int, int, bool]] = []

    def take(
        self, fill: Fill, extent: tuple[int, int], position: int, droppable: bool
    ) -> list[int] | None:
        """Positions of fills that it overwrites completely; None: a new stage has to begin."""
        first, last = extent
        dropped = []
        at = max(0, bisect_left(self._taken, (first, -1, -1, False)) - 1)
        while at < len(self._taken) and self._taken[at][0] < last:
            begin, end, other, may_go = self._taken[at]
            if end <= first:
                at += 1
            elif may_go and is_dense(fill) and first <= begin and end <= last:
                dropped.append(other)
                del self._taken[at]
            else:
                return None
        insort(self._taken, (first, last, position, droppable))
        return dropped


def gaussian_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the normals are drawn, and the factors of all but the smallest computed."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def numbers_of(fill: Fill) -> Fill:
    """What a fill draws: of an orthogonal one, normals for no tensor in particular."""
    if fill.op != "orthogonal":
        return fill
    return normals_of(fill, geometry.NO_TENSOR[gaussian_dtype(fill.tensor.dtype)])


def gaussian_of(fill: Fill, tensor: Tensor | None = None) -> Tensor:
    """Memory for the normals of an orthogonal fill; its own tensor if the dtype is right."""
    own = fill.tensor if tensor is None else tensor
    if own.dtype is gaussian_dtype(own.dtype):
        return own
    with kernels.undisturbed():
        return torch.empty(fill.items, dtype=torch.float32, device=own.device)


def packed_items(rows: int, cols: int) -> int:
    """Entries of the lower trapezoid of a matrix, transposed if it has more columns than rows."""
    n, m = sorted((rows, cols))
    return n * (n + 1) // 2 + (m - n) * n
