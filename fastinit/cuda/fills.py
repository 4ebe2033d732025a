# SPDX-License-Identifier: BSD-3-Clause
"""Fills of GPU memory: torch's grid and offsets, tiles, packed descriptors, launches.

torch's CUDA generator is a seed and an offset. Its kernels give each element a word of Philox by
the place of a thread in a grid that depends on the number of elements and on the GPU
(ATen/native/cuda/DistributionTemplates.h), so every offset is known on the host and fills of any
number of tensors can be one launch. Offsets are counted in blocks of four words here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastinit.core import build, geometry, kernels, source
from fastinit.core.fill import Drawn, Fill, Room
from fastinit.core.geometry import DTYPES
from fastinit.cpu import fills as cpu_fills
from fastinit.cuda import qr as cuda_qr
from fastinit.cuda import runtime

_LANES = 256  # of a block of torch's grid and of ours
_TILE_BYTES = 16384  # of a constant fill
MOST_INLINED = 25  # fills that travel in the arguments of a kernel
_MOST_FILLS = 1 << 16  # of a launch: what the kernel's search can tell apart in two steps
_OPS = kernels.OPS | {"sparse": kernels.OPS["normal"]}
_PACK = kernels.packer(
    kernels._cuda,
    "fill",
    "Q address, Q items, Q block, Q mask, 6d p, Q round_blocks, I first_tile, I tiles, I ranges, "
    "I threads, i after, i slot, I slot_tiles, B op, B dtype, B rank, B source, 32s strided",
)
_STRIDED = kernels.packer(kernels._cuda, "strided", "4I size, 4I stride")
_DIAGONAL = kernels.packer(
    kernels._cuda,
    "diagonal",
    "Q row_length, I group_rows, I channels, I channel, I centre, 8x unused",
)
_DENSE = bytes(_STRIDED.size)
_SOURCE = kernels.packer(kernels._cuda, "source", "Q seed, Q block")
_SLOT = kernels.packer(kernels._cuda, "slot", "Q end, I rounds, I tiles_done, I ready, 4x unused")
_PROGRESS = 8  # bytes before the slots
kernels.packer(
    kernels._cuda,
    "fill_arguments",
    f"Q table, Q progress, I fills, I tiles, {2 * runtime.MOST_SOURCES}Q sources, "
    f"{_PACK.size * MOST_INLINED}s inlined",
)


# ---- torch's grid --------------------------------------------------------------------------------


class Grid(NamedTuple):
    """How torch launches one kernel on so many elements, and how that is cut into tiles."""

    threads: int
    trips: int  # of its loop: blocks of Philox that each thread draws
    ranges: int  # tiles of a trip


@functools.lru_cache(maxsize=4096)
def grid(items: int, size: int, device: int) -> Grid:
    """Return torch's grid for elements of `size` bytes: a thread makes 4 a trip, of float64 2."""
    processors, resident = runtime.grid_of(device)
    threads = _LANES * min(-(-items // _LANES), processors * (resident // _LANES))
    trips = (items - 1) // (threads * (2 if size == 8 else 4)) + 1
    return Grid(threads, trips, -(-min(threads, items) // (_LANES * 16 // size)))


class Piece(NamedTuple):
    """What one of torch's kernels fills: a tensor, or a part of one beyond 32-bit indexing."""

    start: int  # in elements
    items: int
    sizes: tuple[int, ...]  # innermost first; none: dense
    strides: tuple[int, ...]


def pieces(fill: Fill) -> list[Piece]:
    size = fill.tensor.dtype.itemsize
    if fill.rank == 0:
        whole = Piece(0, fill.items, (), ())
        if fill.items * size - size < geometry.MOST_AT_ONCE:
            return [whole]
        return [
            Piece(p.start, p.items, (), ())
            for p in _split(Piece(0, fill.items, (fill.items,), (1,)), size)
        ]
    sizes, strides = fill.shape[: fill.rank], fill.shape[4 : 4 + fill.rank]
    return list(_split(Piece(0, fill.items, sizes, strides), size))


def _split(piece: Piece, size: int) -> Iterator[Piece]:
    """Halve the dimension that reaches farthest until 32 bits do.

    As TensorIteratorBase::with_32bit_indexing of ATen.
    """
    reach = [(n - 1) * stride * size for n, stride in zip(piece.sizes, piece.strides)]
    if piece.items <= geometry.MOST_AT_ONCE and 1 + sum(reach) <= geometry.MOST_AT_ONCE:
        yield piece
        return
    at = max(range(len(reach)), key=lambda i: (reach[i], i))
    first = piece.sizes[at] // 2
    for start, n in ((0, first), (first, piece.sizes[at] - first)):
        sizes = (*piece.sizes[:at], n, *piece.sizes[at + 1 :])
        yield from _split(
            Piece(
                piece.start + start * piece.strides[at],
                piece.items // piece.sizes[at] * n,
                sizes,
                piece.strides,
            ),
            size,
        )


def blocks_drawn(fill: Fill, parts: Sequence[Piece]) -> int:
    """Return by how many blocks one draw of the whole tensor moves the generator on.

    Where torch has to split a tensor, it has already drawn for the whole of it, for nothing.
    """
    if fill.generator is None:
        return 0
    size = fill.tensor.dtype.itemsize
    if len(parts) == 1:
        return grid(parts[0].items, size, fill.device).trips
    return sum(grid(n, size, fill.device).trips for n in (fill.items, *(p.items for p in parts)))


# ---- launches ------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    fill: Fill
    address: int  # 0: overwritten
    source: int
    block: int
    after: int  # slot; -1: none
    slot: int
    mask: Tensor | None = None  # sparse: if it was drawn ahead


class Launch:
    """Collects fills of one device that touch different memory, from any generators."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.slots: list[int] = []  # positions of rejecting fills
        self.sources: list[int] = []  # numbers of generators
        self._entries: list[_Entry | None] = []
        self._drawn: list[int] = []  # blocks since the source's offset, or the end of `_after`
        self._after: list[int] = []
        self._sparse = False
        self._matrices: list[cuda_qr.Job] = []  # what becomes of normals
        self._room = Room()
        self._packed: tuple[bytes, int, int] | None = None  # descriptors, fills, tiles
        self._table: tuple[Tensor, int] | None = None  # them in device memory; of which stream

    def _index(self, source: int) -> int | None:
        """Return the launch's index for this generator, or None if the launch has no slot left."""
        if source not in self.sources:
            if len(self.sources) == runtime.MOST_SOURCES:
                return None
            self.sources.append(source)
            self._drawn.append(0)
            self._after.append(-1)
        return self.sources.index(source)

    def put(self, fill: Fill, address: int, source: int, block: int, mask: Tensor | None) -> bool:
        """Add a fill that overlaps no other, with numbers from a block on (False: no room)."""
        at = self._index(source) if source >= 0 else -1
        if at is None or len(self._entries) == _MOST_FILLS:
            return False
        self._sparse |= fill.op == "sparse"
        self._entries.append(_Entry(fill, address, at, block, -1, -1, mask))
        return True

    def add(self, fill: Fill, source: int) -> bool:
        """Add a fill that goes on where those before have left its generator.

        `source`: number of the generator, -1 if there is none. False: it has to come after all that
        is in this launch.
        """
        if fill.op == "orthogonal":
            normals = fill.gaussian()
            if normals is not fill.tensor and not self._make_room(fill, False):
                return False
            if not self._append(fill.normals(normals), source, False):
                return False
            self.factor(fill, normals, fill.tensor)
            return True
        return self._append(fill, source, fill.op != "trunc_normal")

    def factor(self, fill: Fill, normals: Tensor, out: Tensor) -> None:
        """Make matrices orthogonal behind the launch."""
        rows, cols, count = fill.shape[:3]
        for x, y in zip(normals.view(count, rows, cols), out.view(count, rows, cols)):
            self._matrices.append(cuda_qr.Job(x, y, rows, cols, fill.scale))

    def _make_room(self, fill: Fill, droppable: bool) -> bool:
        """Make room for a fill; what it overwrites completely is not done."""
        dropped = self._room.take(fill, fill.extent, len(self._entries), droppable)
        if dropped is None:
            return False
        for position in dropped:
            old = self._entries[position]
            sparse = old is not None and old.fill.op == "sparse"  # its zeros have to be drawn
            self._entries[position] = old._replace(address=0) if old and sparse else None
        return True

    def _append(self, fill: Fill, source: int, droppable: bool) -> bool:
        at = self._index(source) if source >= 0 else -1
        if at is None or len(self._entries) == _MOST_FILLS:
            return False
        if not self._make_room(fill, droppable):
            return False
        self._sparse |= fill.op == "sparse"
        address = geometry.address_of(fill.tensor)
        slot = -1
        if fill.op == "trunc_normal":
            slot = len(self.slots)
            self.slots.append(len(self._entries))
        drawn, after = (self._drawn[at], self._after[at]) if at >= 0 else (0, -1)
        self._entries.append(_Entry(fill, address, at, drawn, after, slot))
        if slot >= 0:
            self._drawn[at], self._after[at] = 0, slot
        elif at >= 0:
            self._drawn[at] += blocks_drawn(fill, pieces(fill))
        return True

    def _pack(self, masks: list[Tensor]) -> tuple[bytes, int, int]:
        """Return the packed descriptors; `masks` gets what has to live until the launch."""
        packed: list[bytes] = []
        tiles = 0
        for entry in self._entries:
            if entry is not None:
                mask = 0
                if entry.fill.op == "sparse":
                    drawn = _draw_mask(entry.fill) if entry.mask is None else entry.mask
                    if entry.address == 0:
                        continue
                    masks.append(runtime.copy(drawn, self.device))
                    mask = geometry.address_of(masks[-1])
                for descriptor, count in _descriptors(entry, tiles, mask):
                    packed.append(descriptor)
                    tiles += count
        return b"".join(packed), len(packed), tiles

    def go(self, states: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Start it; return the block behind what each source draws, and the rounds of each slot.

        `states`: (seed, block) of each generator. Waits for the kernel if it has slots.
        """
        with kernels.undisturbed():
            result = self._go(states)
            if self._matrices:
                cuda_qr.orthonormalize(self._matrices)
            return result

    def _go(self, states: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        masks: list[Tensor] = []
        packed = self._packed or self._pack(masks)
        if not self._sparse:  # which draws other zeros each time
            self._packed = packed
        data, count, tiles = packed
        table = 0
        if count > MOST_INLINED:
            table, data = self._uploaded(data, keep=not self._sparse), b""
        start = [states[i] for i in self.sources]
        progress = None
        if self.slots:
            progress = runtime.zeros(_PROGRESS + _SLOT.size * len(self.slots), self.device)
        if count:
            sources = b"".join(_SOURCE.pack(*s) for s in start)
            slots = 0 if progress is None else geometry.address_of(progress)
            runtime.run(data, table, count, tiles, sources, slots, self.device)
        if progress is None:
            return [block + n for (_, block), n in zip(start, self._drawn)], []
        counted = list(_SLOT.iter_unpack(bytes(progress.cpu().tolist())[_PROGRESS:]))
        ends = [
            (block if after < 0 else counted[after][0]) + n
            for (_, block), n, after in zip(start, self._drawn, self._after)
        ]
        return ends, [slot[1] + 1 for slot in counted]

    def _uploaded(self, data: bytes, keep: bool) -> int:
        stream = runtime.stream_of(self.device)
        if self._table is None or self._table[1] != stream or not keep:
            self._table = runtime.upload(data, self.device), stream
        return geometry.address_of(self._table[0])


def _descriptors(entry: _Entry, tile: int, mask: int) -> Iterable[tuple[bytes, int]]:
    """Yield descriptors, packed, and how many tiles each has."""
    fill, address, src, block, after, slot, _ = entry
    dtype = fill.tensor.dtype
    size = dtype.itemsize
    items = fill.items
    if fill.op == "trunc_erfinv":
        p = (fill.a, fill.b, fill.scale, fill.mean, fill.lo, fill.hi)
    else:
        p = (fill.a, fill.b, fill.lo, fill.hi, 0.0, 0.0)
    code, dtype_code = _OPS[fill.op], DTYPES[dtype]
    if fill.generator is None and fill.rank == 0:
        tiles = -(-(items * size + 15) // _TILE_BYTES)
        shape = _DIAGONAL.pack(*fill.shape[:5]) if fill.op == "diagonal" else _DENSE
        numbers = (*p, 0, tile, tiles, 1, 0, -1, -1, 0, code, dtype_code, 0, 0)
        return ((_PACK.pack(address, items, 0, 0, *numbers, shape), tiles),)
    if fill.rank == 0 and slot < 0 and items * size < geometry.MOST_AT_ONCE:  # most are like this
        g = grid(items, size, fill.device)
        tiles = g.trips * g.ranges
        numbers = (*p, 0, tile, tiles, g.ranges, g.threads, after, -1, 0, code, dtype_code, 0, src)
        return ((_PACK.pack(address, items, block, mask, *numbers, _DENSE), tiles),)
    return list(_split_descriptors(entry, p, tile, mask))


def _split_descriptors(
    entry: _Entry, p: tuple[float, ...], tile: int, mask: int
) -> Iterator[tuple[bytes, int]]:
    fill, address, src, block, after, slot, _ = entry
    size = fill.tensor.dtype.itemsize
    parts = pieces(fill)
    round_blocks = blocks_drawn(fill, parts)
    block_of_all = block
    grids = [grid(part.items, size, fill.device) for part in parts]
    of_slot = sum(g.trips * g.ranges for g in grids) if slot >= 0 else 0
    if len(parts) > 1 and fill.generator is not None:
        block += grid(fill.items, size, fill.device).trips
    for part, g in zip(parts, grids):
        tiles = g.trips * g.ranges
        if fill.generator is None:
            tiles = -(-part.items * size // _TILE_BYTES)
        pad = (0,) * (4 - len(part.sizes))
        # What is left of a far dimension has size 1, and its stride would not fit.
        strides = (0 if n == 1 else stride for n, stride in zip(part.sizes, part.strides))
        shape = _STRIDED.pack(*part.sizes, *pad, *strides, *pad) if part.sizes else _DENSE
        either = block_of_all if fill.op == "trunc_normal" else mask and mask + 2 * part.start
        yield _PACK.pack(
            address + part.start * size, part.items, block, either, *p, round_blocks,
            tile, tiles, g.ranges, g.threads, after, slot, of_slot,
            _OPS[fill.op], DTYPES[fill.tensor.dtype], len(part.sizes), max(src, 0), shape,
        ), tiles  # fmt: skip
        tile += tiles
        block += g.trips


# ---- running -------------------------------------------------------------------------------------


class Batch:
    """Packed fills of one device, in order, that may run again while the tensors stay in place."""

    def __init__(self, fills: Sequence[Fill]) -> None:
        self.device = fills[0].device
        generators = {source.generator_id(f.generator): f.generator for f in fills if f.generator}
        self._generators = list(generators.values())
        index = {key: i for i, key in enumerate(generators)}
        # sparse_ draws from it; generators are locked together so that no two threads can wait for
        # each other.
        self._lent = [torch.default_generator] if any(f.op == "sparse" for f in fills) else []
        self._launches = [Launch(self.device)]
        self._bumps: list[int] = []
        self.rejects: list[int] = []  # positions of fills, in the order of the launches' slots
        for i, fill in enumerate(fills):
            src = -1 if fill.generator is None else index[source.generator_id(fill.generator)]
            if not self._launches[-1].add(fill, src):
                self._launches.append(Launch(self.device))
                self._launches[-1].add(fill, src)
            if fill.op == "trunc_normal":
                self.rejects.append(i)
            self._bumps.append(fill.bumps)

    def run(self, bumps: list[int]) -> None:
        """Draw on from where the generators are; note in `bumps` how versions go up."""
        kernels.refuse_in_graph()
        rounds: list[int] = []
        with source.turn(*self._generators, *self._lent):
            states = [source.philox(g) for g in self._generators]
            for launch in self._launches:
                ends, of_slots = launch.go(states)
                for i, end in zip(launch.sources, ends):
                    states[i] = states[i][0], end
                rounds += of_slots
            for g, (_, block) in zip(self._generators, states):
                source.set_philox(g, block)
        bumps[:] = self._bumps
        for i, n in zip(self.rejects, rounds):
            bumps[i] += n > 1  # torch copies the result of later rounds


def run(fills: Sequence[Fill], bumps: list[int]) -> None:
    """Do the fills as if torch had done them one by one; note in `bumps` how versions go up."""
    for part in within_memory(fills):
        of_part: list[int] = []
        Batch(fills[part]).run(of_part)
        bumps += of_part


def stream(fill: Fill) -> int:
    """Return the stream on which a fill is asked for now."""
    return runtime.stream_of(fill.device)


def draw_ahead(fill: Fill) -> tuple[tuple[int, int], Tensor | None]:
    """Move the fill's generator on as if it had been filled.

    Returns (seed, block) of its numbers, and of sparse_ where its zeros go.
    """
    assert fill.generator is not None
    mask = _draw_mask(fill) if fill.op == "sparse" else None
    numbers = fill.drawn
    drawn = blocks_drawn(numbers, pieces(numbers))
    with source.lock_of(fill.generator):
        seed, block = source.philox(fill.generator)
        source.set_philox(fill.generator, block + drawn)
    return (seed, block), mask


def run_ahead(fills: Sequence[tuple[Drawn, torch.UntypedStorage]]) -> None:
    """Write fills whose numbers were drawn ahead; none may overlap another.

    That is a launch for each device, if all were asked for on one stream and with few seeds.
    """
    kernels.refuse_in_graph()
    for part in within_memory([drawn.fill for drawn, _ in fills]):
        _run_ahead(fills[part])


def _run_ahead(fills: Sequence[tuple[Drawn, torch.UntypedStorage]]) -> None:
    launches: dict[tuple[int, int], list[tuple[Launch, dict[int, int]]]] = {}
    for drawn, storage in fills:
        fill = numbers = drawn.fill
        of_stream = launches.setdefault((fill.device, drawn.stream), [(Launch(fill.device), {})])
        address = geometry.base_of(storage) + drawn.extent[0]
        if fill.op == "orthogonal":
            out = _tensor_at(drawn, storage)
            normals = fill.gaussian(out)
            numbers, address = fill.normals(normals), geometry.address_of(normals)
        while True:
            launch, seeds = of_stream[-1]
            src, block = -1, 0
            if isinstance(drawn.state, tuple):
                seed, block = drawn.state
                src = seeds.setdefault(seed, len(seeds))
            if launch.put(numbers, address, src, block, drawn.mask):
                if fill.op == "orthogonal":
                    launch.factor(fill, normals, out)
                break
            of_stream.append((Launch(fill.device), {}))
    for (device, stream), of_stream in launches.items():
        with runtime.on_stream(device, stream):
            for launch, seeds in of_stream:
                launch.go([(seed, 0) for seed in seeds])


def _tensor_at(drawn: Drawn, storage: torch.UntypedStorage) -> Tensor:
    """Return the tensor a fill was asked for, as a flat one."""
    dtype = drawn.dtype
    with kernels.undisturbed():
        flat = torch.empty(0, dtype=dtype, device=storage.device)
        return flat.set_(storage, drawn.extent[0] // dtype.itemsize, (drawn.items,), (1,))  # type: ignore[call-overload,no-any-return,unused-ignore]


def within_memory(fills: Sequence[Fill]) -> Iterator[slice]:
    """Yield parts of the list whose normals need at most cuda_qr.MOST_MEMORY of their own."""
    start = scratch = 0
    for i, fill in enumerate(fills):
        own = 4 * fill.items if fill.op == "orthogonal" and fill.tensor.itemsize == 2 else 0
        if own and scratch and scratch + own > cuda_qr.MOST_MEMORY:
            yield slice(start, i)
            start, scratch = i, 0
        scratch += own
    yield slice(start, len(fills))


# ---- sparse_ -------------------------------------------------------------------------------------


def _draw_mask(fill: Fill) -> Tensor:
    """Return ones, and zeros where torch would put them, drawn from the CPU's default generator."""
    with kernels.undisturbed():
        mask = torch.ones(fill.tensor.shape, dtype=torch.bfloat16, device="cpu")
    zeros = build.sparse_mask(mask, fill.zeros)
    assert zeros is not None  # plan.sparse checks the same
    cpu_fills.run([zeros], [])
    return mask
