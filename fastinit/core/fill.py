# SPDX-License-Identifier: BSD-3-Clause
"""Fills: what is to be written into one tensor, now or after its words have been drawn."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import torch
from torch import Tensor

from fastinit.core import geometry, kernels

Caller = tuple[str, tuple[tuple[str, object], ...]]  # function of torch.nn.init, its arguments


@dataclass(slots=True, eq=False)
class Fill:
    """What is to be written into one tensor. It is built, then proved, and does not change after
    that, except that `draw_ahead` lets go of its tensor."""

    tensor: Tensor
    op: str  # one of kernels.OPS, sparse (normal with a mask), or orthogonal (normal, then a QR)
    a: float = 0.0  # constant: value; uniform: lower bound; normal: mean
    b: float = 0.0  # uniform: upper bound; normal: standard deviation
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
    device: int = -1  # index of a GPU; -1: the CPU
    scale: float = 0.0  # trunc_erfinv: of the inverse error function; orthogonal: gain
    mean: float = 0.0  # trunc_erfinv: what is added
    zeros: int = 0  # sparse: zeros of each column
    bounds: tuple[float, float] | None = None  # trunc_normal_: what was asked for

    @property
    def extent(self) -> tuple[int, int]:
        """Addresses of the first byte and of the one behind the last."""
        t = self.tensor
        begin = geometry.address_of(t)
        items = geometry.span(t) if self.layout == "strided" else t.numel()
        return begin, begin + items * t.element_size()

    @property
    def is_dense(self) -> bool:
        """Return whether a fill writes every byte of its extent."""
        return self.rank == 0 and self.op != "sparse_mask"

    @property
    def drawn(self) -> Fill:
        """The fill whose words are drawn for this one: of orthogonal matrices, their normals."""
        if self.op != "orthogonal":
            return self
        return self.normals(geometry.NO_TENSOR[gaussian_dtype(self.tensor.dtype)])

    def normals(self, t: Tensor) -> Fill:
        """Return what an orthogonal fill draws, to go to a tensor of as many elements."""
        drawn = Fill(t, "normal", 0.0, 1.0, self.generator, items=self.items, flavour=self.flavour)
        drawn.device = self.device
        if self.device < 0 and self.items < 16:
            drawn.op, drawn.rank, drawn.shape = "normal_pairs", 1, (self.items, 0, 0, 0, 1, 0, 0, 0)
        return drawn

    def gaussian(self, tensor: Tensor | None = None) -> Tensor:
        """Return memory for these normals: the fill's tensor (or this one) if its dtype is right.

        Otherwise it is new, and not for the eyes of modes.
        """
        own = self.tensor if tensor is None else tensor
        if own.dtype is gaussian_dtype(own.dtype):
            return own
        with kernels.undisturbed():
            return torch.empty(self.items, dtype=torch.float32, device=own.device)


@dataclass(slots=True, eq=False)
class Drawn:
    """A fill whose words have been drawn, to be written to a storage that may die before."""

    fill: Fill  # of an empty tensor of its dtype
    items: int
    is_dense: bool  # every byte of the extent is written
    extent: tuple[int, int]  # bytes of the storage: the first and the one behind the last
    # Of the generator, before: all of it, or on a GPU seed and block. None: no words are drawn.
    state: Tensor | tuple[int, int] | None = None
    stream: int = 0  # on a GPU: handle of the stream on which it was asked for
    mask: Tensor | None = None  # sparse: 0 where zeros go
    caller: Caller | None = None

    @property
    def op(self) -> str:
        return self.fill.op

    @property
    def a(self) -> float:
        return self.fill.a

    @property
    def dtype(self) -> torch.dtype:
        return self.fill.tensor.dtype


def gaussian_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the normals, and of the factors of all but the smallest matrices."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def packed_items(rows: int, cols: int) -> int:
    """Return the number of entries of a matrix's lower trapezoid, transposed if it is wide."""
    n, m = sorted((rows, cols))
    return n * (n + 1) // 2 + (m - n) * n


class Room:
    """Memory that the fills of a stage write, none of which may overlap."""

    def __init__(self) -> None:
        # Sorted: first byte, end, position in the stage, whether it may be left out.
        self._taken: list[tuple[int, int, int, bool]] = []

    def take(
        self, fill: Fill, extent: tuple[int, int], position: int, droppable: bool
    ) -> list[int] | None:
        """Return positions of fills that this one overwrites; None: a new stage has to begin."""
        first, last = extent
        dropped = []
        at = max(0, bisect_left(self._taken, (first, -1, -1, False)) - 1)
        while at < len(self._taken) and self._taken[at][0] < last:
            begin, end, other, may_go = self._taken[at]
            if end <= first:
                at += 1
            elif may_go and fill.is_dense and first <= begin and end <= last:
                dropped.append(other)
                del self._taken[at]
            else:
                return None
        insort(self._taken, (first, last, position, droppable))
        return dropped
