# SPDX-License-Identifier: BSD-3-Clause
"""Fills of CPU memory: words, overlap, packed descriptors, native calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastinit.core import geometry, kernels, source
from fastinit.core.fill import Drawn, Fill, Room
from fastinit.core.geometry import DTYPES
from fastinit.cpu import qr as cpu_qr

_PACK = kernels.packer(
    kernels._cpu,
    "fill",
    "Q address, Q items, d a, d b, d lo, d hi, Q first_word, i source, "
    "B op, B dtype, B flavour, B rank, 8q strided",
)
# What the last field can be, as fill.shape has it.
kernels.packer(kernels._cpu, "strided", "4q size, 4q stride")
kernels.packer(
    kernels._cpu,
    "diagonal",
    "q row_length, q group_rows, q channels, q channel, q centre, 24x unused",
)
kernels.packer(kernels._cpu, "sparse", "q rows, q zeros, q row_stride, 40x unused")


def words_drawn(fill: Fill, cached: bool) -> int:
    """Return how many 32-bit words torch draws for a fill.

    `cached`: the generator holds the second normal of a pair.
    """
    n = fill.items
    per_item = 2 if fill.tensor.dtype is torch.float64 else 1
    if fill.op == "uniform":
        return n * per_item
    if fill.op == "normal":  # the last 16 elements are drawn again if the size is no multiple
        if fill.tensor.element_size() == 2:
            return (n + 15) // 16 * 16
        return (n + (16 if n % 16 else 0)) * per_item
    if fill.op == "normal_pairs":
        return (n - cached + 1) // 2 * 4
    if fill.op == "sparse_mask":
        return n * (fill.shape[0] - 1)
    return 0


def _pack(fill: Fill, address: int, word: int, src: int, cached: bool) -> bytes:
    return _PACK.pack(
        address, fill.items, fill.a, fill.b, fill.lo,
        float(cached) if fill.op == "normal_pairs" else fill.hi,
        word, src, kernels.OPS[fill.op], DTYPES[fill.tensor.dtype], fill.flavour, fill.rank,
        *fill.shape,
    )  # fmt: skip


_Do = Callable[[bytes, list[int], list[cpu_qr.Job]], None]  # packed fills, words drawn, matrices


class _Stage:
    """Collects fills that touch different memory and whose words are known: one native call."""

    def __init__(
        self, states: list[source.State], index: dict[int, int], alone: bool, do: _Do
    ) -> None:
        """Take the generators' states (none if all fills are known), and what runs each stage."""
        self._states, self._index, self._alone, self._do = states, index, alone, do
        self._begin()

    def _begin(self) -> None:
        self._packed: list[bytes | None] = []
        self._jobs: list[cpu_qr.Job] = []  # with what is packed as their normals
        self._scratch = 0  # bytes of normals elsewhere than in their tensors
        self._room = Room()
        self._words = [0] * len(self._index)
        self._cached = [s.has_cached_normal for s in self._states]
        self._made_cached = [False] * len(self._index)  # in this stage: its value is not known yet

    def add(self, fill: Fill) -> int:
        """Add a fill, and return how many times the tensor's version goes up."""
        if fill.op != "orthogonal":
            return self._put(fill, True)
        normals = fill.gaussian()
        self._put(fill.normals(normals), False)
        out = geometry.address_of(fill.tensor)
        if normals is not fill.tensor:
            self._make_room(fill.extent, fill, False)
            self._scratch += normals.nbytes
        self._jobs.append(cpu_qr.job(fill, geometry.address_of(normals), out, normals))
        if self._scratch > cpu_qr.SCRATCH:
            self.flush()
        return fill.bumps

    def _put(self, fill: Fill, droppable: bool) -> int:
        src = -1 if fill.generator is None else self._index[source.generator_id(fill.generator)]
        if fill.op == "trunc_normal":  # how many words it draws depends on their values
            self.flush()
            packed = _pack(fill, geometry.address_of(fill.tensor), 0, src, False)
            rounds = kernels.run_trunc(packed, self._states[src].address)
            return fill.bumps + (rounds > 1)  # torch copies the result of later rounds
        pairs = fill.op == "normal_pairs"
        if pairs and self._cached[src] and self._made_cached[src]:
            self.flush()
        extent = fill.extent
        if not self._alone:
            self._make_room(extent, fill, droppable and not pairs)
        if src < 0:
            self._packed.append(_pack(fill, extent[0], 0, src, False))
            return fill.bumps
        cached = pairs and self._cached[src]
        self._packed.append(_pack(fill, extent[0], self._words[src], src, cached))
        self._words[src] += words_drawn(fill, cached)
        if pairs:
            self._cached[src] = (fill.items - cached) % 2 != 0
            self._made_cached[src] = True
        return fill.bumps

    def _make_room(self, extent: tuple[int, int], fill: Fill, droppable: bool) -> None:
        """Make room for a fill; what it overwrites completely is not done, but its words count."""
        dropped = self._room.take(fill, extent, len(self._packed), droppable)
        if dropped is None:
            self.flush()
            dropped = self._room.take(fill, extent, 0, droppable)
        for position in dropped or ():
            self._packed[position] = None

    def flush(self) -> None:
        packed = b"".join(p for p in self._packed if p is not None)
        if packed or any(self._words) or self._jobs:
            self._do(packed, self._words, self._jobs)
        self._begin()


def run(fills: Sequence[Fill], bumps: list[int], progress: bool | None = None) -> None:
    """Do the fills as if torch had done them one by one; note in `bumps` how versions go up."""
    generators, index = _generators(fills)
    runner = _Runner(progress)

    def work(states: list[source.State]) -> None:
        runner.begin(states)
        bumps.clear()
        stage = _Stage(states, index, len(fills) == 1, runner.do)
        for fill in fills:
            bumps.append(stage.add(fill))
        stage.flush()

    source.draw(generators, work)
    runner.end()


def _generators(fills: Sequence[Fill]) -> tuple[list[torch.Generator], dict[int, int]]:
    """Return the generators they draw from, and the place of each by its id."""
    found = {
        source.generator_id(f.generator): f.generator for f in fills if f.generator is not None
    }
    return list(found.values()), {key: i for i, key in enumerate(found)}


class _Runner:
    """Runs stages, and factors the matrices of each before the next one.

    Those of the last are factored when the generators have been put back: that may take long, and
    needs nothing of them.
    """

    def __init__(self, progress: bool | None) -> None:
        self._progress = progress
        self._jobs: list[cpu_qr.Job] = []

    def begin(self, states: list[source.State]) -> None:
        self._addresses = [s.address for s in states]
        self._jobs = []

    def do(self, packed: bytes, words: list[int], jobs: list[cpu_qr.Job]) -> None:
        self.end()
        kernels.run(packed, self._addresses, words)
        self._jobs = jobs

    def end(self) -> None:
        jobs, self._jobs = self._jobs, []
        if jobs:
            cpu_qr.run(jobs, self._progress)


def is_known(fill: Fill) -> bool:
    """Return whether a fill's words do not depend on values, and it needs no other memory."""
    drawn = fill.drawn
    in_place = drawn is fill or drawn.tensor.dtype is fill.tensor.dtype
    return in_place and drawn.op not in ("normal_pairs", "trunc_normal")


class Batch:
    """Fills that are all `is_known`, packed once to run again and again."""

    def __init__(self, fills: Sequence[Fill]) -> None:
        self._stages: list[tuple[bytes, list[int], list[cpu_qr.Job]]] = []
        self._generators, index = _generators(fills)
        stage = _Stage([], index, len(fills) == 1, lambda *what: self._stages.append(what))
        bumps = [stage.add(fill) for fill in fills]
        stage.flush()
        self.written = [f.tensor for f, times in zip(fills, bumps) for _ in range(times)]

    def run(self, progress: bool | None) -> None:
        runner = _Runner(progress)

        def work(states: list[source.State]) -> None:
            runner.begin(states)
            for stage in self._stages:
                runner.do(*stage)

        try:
            source.draw(self._generators, work)
            runner.end()
        finally:
            torch.autograd.graph.increment_version(self.written)


def draw_ahead(fill: Fill, scratch: torch.Tensor) -> torch.Tensor:
    """Move the fill's generator on as if it had been filled; return its state before."""
    assert fill.generator is not None
    return source.draw_ahead(fill.generator, words_drawn(fill.drawn, False), scratch)


def run_ahead(fills: Sequence[tuple[Drawn, torch.UntypedStorage]]) -> None:
    """Write fills whose words were drawn ahead, none of which may overlap another.

    It is one native call as long as there is room for the normals of matrices.
    """
    packed: list[bytes] = []
    states: list[int] = []
    jobs: list[cpu_qr.Job] = []
    scratch = 0
    for i, (drawn, storage) in enumerate(fills, 1):
        fill, state = drawn.fill, drawn.state
        out = address = geometry.base_of(storage) + drawn.extent[0]
        if fill.op == "orthogonal":
            normals = fill.gaussian()
            if normals is not fill.tensor:
                address = geometry.address_of(normals)
                scratch += normals.nbytes
            jobs.append(cpu_qr.job(fill, address, out, normals))
            fill = fill.normals(normals)
        src = -1
        if isinstance(state, torch.Tensor):
            src = len(states)
            states.append(geometry.address_of(state))
        packed.append(_pack(fill, address, 0, src, False))
        if i == len(fills) or scratch > cpu_qr.SCRATCH:
            kernels.run(b"".join(packed), states, [0] * len(states))
            if jobs:
                cpu_qr.run(jobs, False)  # the scope has a bar of its own
            packed, states, jobs, scratch = [], [], [], 0


def is_cuttable(drawn: Drawn) -> bool:
    """Return whether a fill can be written in parts that begin at multiples of 16 elements."""
    fill = drawn.fill
    known = fill.op in ("uniform", "normal", "constant") and fill.rank == 0 and fill.device < 0
    return known and drawn.extent[1] == drawn.items * drawn.dtype.itemsize


def run_parts(parts: Sequence[tuple[Drawn, int, int, int]]) -> None:
    """Write parts of fills that are cuttable in one native call.

    Args:
        parts: fill, address of what is written, its first element in the fill, elements
    """
    packed: list[bytes] = []
    index: dict[int, int] = {}  # of a state, by its address
    for drawn, address, begin, items in parts:
        fill, src = drawn.fill, -1
        if isinstance(drawn.state, torch.Tensor):
            src = index.setdefault(geometry.address_of(drawn.state), len(index))
        word = begin * (2 if drawn.dtype is torch.float64 else 1)
        whole, fill.items = fill.items, items
        packed.append(_pack(fill, address, word, src, False))
        fill.items = whole
    kernels.run(b"".join(packed), list(index), [0] * len(index))
