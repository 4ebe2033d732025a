# SPDX-License-Identifier: BSD-3-Clause
"""Orthonormal columns of Gaussian matrices on a GPU, many matrices at a time.

What fits into the shared memory of a block is a launch, or a few, whatever the shapes. Larger
matrices are grouped by shape: reflectors by panels (I - V T V', Schreiber and Van Loan 1989), each
panel of all matrices in one launch, and products, which are cuBLAS's, between them.
csrc/cuda/qr/launch.h has the contract.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastinit.core import geometry, kernels, torch_api
from fastinit.core.geometry import DTYPES
from fastinit.cuda import runtime

MOST_MEMORY = 2 << 30  # bytes of working memory, unless one matrix needs more
MOST_INLINED = 96  # matrices that travel in the arguments of a kernel

_STEPS = ("small", "pack", "reflect", "panel", "triangle", "write")
kernels.agree(
    kernels._cuda,
    "STEPS",
    {step: i for i, step in enumerate(_STEPS)},
    getattr(kernels._cuda, "STEPS", None),
)
_JOB = kernels.packer(
    kernels._cuda, "qr", "Q from, Q to, d gain, I rows, I cols, B dtype, 7x unused"
)
_ARGUMENTS = kernels.packer(
    kernels._cuda,
    "qr_arguments",
    "Q table, Q columns, Q triangles, Q tau, Q sign, I jobs, I m, I n, I pitch, I direct, "
    f"I is_double, I first, I width, I above, I streams, {MOST_INLINED * _JOB.size}s inlined",
)
_TILE = 32
_MOST_COLUMNS = 128  # in shared memory
_PANELS = (32, 16, 8)  # columns of a panel
_MOST_BATCH = 65535  # of a grid's second dimension


class Job(NamedTuple):
    """A Gaussian matrix, and where to write gain times Q."""

    gaussian: Tensor  # contiguous; float32 or float64
    out: Tensor  # contiguous; float64 if `gaussian` is; may be the same memory
    rows: int
    cols: int
    gain: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix, transposed if it has more columns than rows."""
        return max(self.rows, self.cols), min(self.rows, self.cols)


def orthonormalize(jobs: Sequence[Job], direct: bool = False) -> None:
    """Write gain * Q into every `out`, on the current stream, where Q R, R with positive diagonal,
    is the matrix (or (Q R)' if it has more columns than rows). All are on one device.

    `direct`: no factorisation; column k of the lower trapezoid, all that `gaussian` then holds, row
    by row, is the vector that reflector k maps to the axis (Stewart 1980).
    """
    small: dict[tuple[int, int, int], list[Job]] = {}
    large: dict[tuple[int, int, int], list[Job]] = {}
    for job in jobs:
        (m, n), size = job.shape, job.gaussian.itemsize
        shared = _state_bytes(size) + n * (m | 1) * size
        if n <= _MOST_COLUMNS and shared <= runtime.shared(geometry.device_of(job.gaussian)):
            bucket = 1 << max(shared - 1, 8191).bit_length()  # what else would wait for its memory
            small.setdefault((size, _threads(m, n, size), bucket), []).append(job)
        else:
            large.setdefault((m, n, size), []).append(job)
    with kernels.undisturbed():
        for (size, threads, _), group in small.items():
            most = max(n * (m | 1) for m, n in (job.shape for job in group))
            shared = _state_bytes(size) + size * most
            _Launcher(group, direct).launch("small", (len(group), 1), threads, shared)
        if large:
            with _exact_products():
                for group in large.values():
                    for batch in _batches(group):
                        _Work(batch, direct).run()


def working_bytes(m: int, n: int, size: int) -> int:
    """Return how many bytes a large m x n matrix needs besides its own."""
    block = _block(n, size)
    columns, triangles, scalars = n * _pitch(m), -(-n // block) * block * block, 2 * n
    return size * (columns + _scratch(m, n, block) + triangles + scalars)


def _state_bytes(size: int) -> int:
    return 256 + 640 * size  # sizeof(QrState<T>)


def _panel_bytes(m: int, width: int, size: int) -> int:
    return _state_bytes(size) + size * (_PANELS[0] * (_PANELS[0] + 1) + width * (m | 1))


def _threads(m: int, n: int, size: int) -> int:
    """Return the threads of a block.

    Up to 16 columns 8 for 2 columns, else a warp for 4 columns and 256 rows (float64: half a warp).
    """
    if n <= 16 and m <= 64:
        return 64
    lanes = 16 if size == 8 else 32  # Medium of csrc/cuda/qr/small.h
    wanted = lanes * -(-n // 4) * -(-m // 256)
    return next((threads for threads in (256, 512) if threads >= wanted), 32 * lanes)


def _pitch(m: int) -> int:
    return -(-m // 8) * 8  # cuBLAS reads aligned columns faster


def _block(n: int, size: int) -> int:
    """Return how many columns' reflectors are applied together.

    More make fewer passes over the matrix, but more flops; 128 columns of float64 would not fit
    into the shared memory of some GPUs.
    """
    return min(n, 32 if n < 384 else 64 if n < 1536 or size == 8 else 128)


def _batches(group: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """Yield batches of equal size, so that the last does not take as long for less."""
    (m, n), size = group[0].shape, group[0].gaussian.itemsize
    most = min(max(1, MOST_MEMORY // working_bytes(m, n, size)), _MOST_BATCH)
    count = -(-len(group) // -(-len(group) // most))
    for start in range(0, len(group), count):
        yield group[start : start + count]


def _scratch(m: int, n: int, block: int) -> int:
    """Return the elements for products: two of a block's width and n columns, or one of m rows."""
    return 2 * -(-block * (max(2 * n, m) + 2 * block) // 2)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Let float32 products be float32's, and use cuBLAS.

    torch has only process-wide switches for this, so other threads' products are exact, too.
    """
    products = torch_api.float32_products()
    exact = products in (False, "ieee", "none")
    if not exact:
        torch_api.set_float32_products("ieee" if isinstance(products, str) else False)
    # Before 2.13 it made products raise unless an environment variable was set.
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic:
        torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        if not exact:
            torch_api.set_float32_products(products)
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=warns)


def _packed(job: Job) -> bytes:
    addresses = geometry.address_of(job.gaussian), geometry.address_of(job.out)
    return _JOB.pack(*addresses, job.gain, job.rows, job.cols, DTYPES[job.out.dtype])


class _Launcher:
    """Packs what launches for the same jobs have in common."""

    def __init__(self, jobs: Sequence[Job], direct: bool) -> None:
        self.device = geometry.device_of(jobs[0].gaussian)
        self._count, self._direct = len(jobs), direct
        self._is_double = jobs[0].gaussian.dtype == torch.float64
        self._packed = b"".join(map(_packed, jobs))
        self._table: Tensor | None = None
        if len(jobs) > MOST_INLINED:
            self._table = runtime.upload(self._packed, self.device)
            self._packed = b""

    def launch(
        self,
        step: str,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        addresses: tuple[int, int, int, int] = (0, 0, 0, 0),
        shape: tuple[int, int, int] = (0, 0, 0),
        panel: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None:
        """Launch a step.

        Args:
            addresses: of columns, triangles, tau, sign
            shape: m, n, pitch
            panel: first, width, above, streams
        """
        table = 0 if self._table is None else geometry.address_of(self._table)
        numbers = (self._count, *shape, self._direct, self._is_double, *panel)
        packed = _ARGUMENTS.pack(table, *addresses, *numbers, self._packed)
        runtime.run_qr(_STEPS.index(step), packed, grid, threads, shared, self.device)


class _Work:
    """Factors large matrices of one shape by columns in working memory: A, then V, then Q."""

    def __init__(self, jobs: Sequence[Job], direct: bool) -> None:
        self._launcher = _Launcher(jobs, direct)
        self._direct, self._count = direct, len(jobs)
        self._m, self._n = jobs[0].shape
        like = jobs[0].gaussian
        self._size, self._pitch = like.itemsize, _pitch(self._m)
        self._block = b = _block(self._n, self._size)
        self._blocks = [(o, min(b, self._n - o)) for o in range(0, self._n, b)]
        self._columns = _empty(like, self._count, self._n, self._pitch)
        self._scratch = _empty(like, self._count * _scratch(self._m, self._n, b))
        self._triangles = _empty(like, len(self._blocks), self._count * b * b)
        self._scalars = _empty(like, 2, self._count, self._n)
        self._a = self._columns[:, :, : self._m].mT
        tau, sign = geometry.address_of(self._scalars[0]), geometry.address_of(self._scalars[1])
        columns, triangles = (
            geometry.address_of(self._columns),
            geometry.address_of(self._triangles),
        )
        self._addresses = columns, triangles, tau, sign

    def run(self) -> None:
        tiles = -(-self._m // _TILE) * -(-self._n // _TILE), self._count
        self._launch("pack", tiles, 256, _TILE * (_TILE + 1) * self._size)
        if self._direct:
            self._reflect()
        else:
            self._factor()
        self._form()
        self._launch("write", tiles, 256, _TILE * (_TILE + 1) * self._size)

    def _launch(
        self,
        step: str,
        grid: tuple[int, int],
        threads: int,
        shared: int = 0,
        panel: tuple[int, int, int, int] = (0, 0, 0, 0),
        block: int = 0,
    ) -> None:
        columns, triangles, tau, sign = self._addresses
        triangles += block * self._triangles[0].numel() * self._size
        addresses = columns, triangles, tau, sign
        shape = self._m, self._n, self._pitch
        self._launcher.launch(step, grid, threads, shared, addresses, shape, panel)

    def _triangle(self, block: int, width: int) -> Tensor:
        """Return the memory of T of a block, or of a panel of it."""
        t = self._triangles[block, : self._count * width * width]
        return t.view(self._count, width, width)

    def _make_triangles(self, first: int, count: int) -> None:
        """Compute T of blocks from their V'V."""
        for block in range(first, first + count):
            o, width = self._blocks[block]
            self._square(self._a[:, o:, o : o + width], self._triangle(block, width))
        shared = self._block * (self._block + 1) * self._size
        panel = first, self._block, 0, 0
        self._launch("triangle", (count, self._count), 128, shared, panel)

    def _square(self, v: Tensor, out: Tensor) -> None:
        """Return V'V in float64.

        With float32's, Q was less orthogonal than LAPACK's (1.1 times at n = 400; now 0.85).
        """
        if v.dtype == torch.float64:
            torch.bmm(v.mT, v, out=out)
            return
        room = self._scratch.view(torch.float64)
        square, room = room[: out.numel()].view_as(out), room[out.numel() :]
        most = room.numel() // (self._count * v.shape[2])
        for start in range(0, v.shape[1], most):
            rows = v[:, start : start + most].mT
            x = room[: rows.numel()].view(rows.shape)
            x.copy_(rows)
            torch.baddbmm(square, x, x.mT, beta=int(start > 0), out=square)
        out.copy_(square)

    def _reflect(self) -> None:
        self._launch("reflect", (-(-self._n // 8), self._count), 256)
        self._make_triangles(0, len(self._blocks))

    def _factor(self) -> None:
        for block, (o, block_width) in enumerate(self._blocks):
            end, i = o + block_width, o
            while i < end:
                width = min(self._panel_width(self._m - i), end - i)
                t = self._panel(block, i, width, i - o)
                if i + width < end:
                    self._apply(i, t, i + width, end)
                i += width
            if width < block_width:
                self._make_triangles(block, 1)
            if end < self._n:
                self._apply(o, self._triangle(block, block_width), end, self._n)

    def _panel_width(self, rows: int) -> int:
        """Return the most columns that fit into shared memory.

        A panel that does not is read from global memory once per column, so it should be narrow.
        """
        most = runtime.shared(self._launcher.device)
        return next((w for w in _PANELS if _panel_bytes(rows, w, self._size) <= most), _PANELS[-1])

    def _panel(self, block: int, first: int, width: int, above: int) -> Tensor:
        shared = _panel_bytes(self._m - first, width, self._size)
        streams = shared > runtime.shared(self._launcher.device)
        if streams:
            shared = _panel_bytes(0, 0, self._size)
        panel = first, width, above, int(streams)
        self._launch("panel", (self._count, 1), 512, shared, panel, block)
        return self._triangle(block, width)

    def _two(self, width: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return memory for two products."""
        size = self._count * width * columns
        both = self._scratch[: 2 * size].view(2, self._count, width, columns)
        return both[0], both[1]

    def _apply(self, first: int, t: Tensor, begin: int, end: int) -> None:
        """Apply I - V T' V' to columns [begin, end), as the factorisation does."""
        width = t.shape[1]
        v, c = self._a[:, first:, first : first + width], self._a[:, first:, begin:end]
        x, y = self._two(width, end - begin)
        torch.bmm(v.mT, c, out=x)
        torch.bmm(t.mT, x, out=y)
        torch.baddbmm(c, v, y, alpha=-1, out=c)

    def _form(self) -> None:
        """Write Q in the place of V, last block first.

        I - V T V' meets the identity in its own columns; later ones hold Q from the block's width
        on, and zeros above.
        """
        for block in reversed(range(len(self._blocks))):
            o, width = self._blocks[block]
            t = self._triangle(block, width)
            v = self._a[:, o:, o : o + width]
            top, below = v[:, :width], v[:, width:]
            begin = o + width
            if begin < self._n:
                q, above = self._a[:, begin:, begin:], self._a[:, o:begin, begin:]
                x, y = self._two(width, self._n - begin)
                torch.bmm(below.mT, q, out=x)
                torch.bmm(t, x, out=y)
                torch.baddbmm(q, below, y, alpha=-1, out=q)
                torch.baddbmm(above, top, y, beta=0, alpha=-1, out=above)
            rows = self._m - o
            size = self._count * width * rows
            s = self._scratch[size : size + self._count * width * width]
            s = s.view(self._count, width, width)
            product = self._scratch[:size].view(self._count, width, rows).mT
            torch.bmm(t, top.mT, out=s)
            torch.bmm(v, s, out=product)
            torch.neg(product, out=v)
            v.diagonal(dim1=1, dim2=2).add_(1)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)
