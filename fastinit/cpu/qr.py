# SPDX-License-Identifier: BSD-3-Clause
"""Orthogonal factors of Gaussian matrices in CPU memory: batches, their progress, interruption.

csrc/cpu/qr/qr.inl.h has the arithmetic, docs/decisions.md the two ways.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastinit.core import geometry, kernels
from fastinit.core.fill import Fill, gaussian_dtype, packed_items
from fastinit.core.geometry import DTYPES
from fastinit.core.progress import bar as new_bar

SCRATCH = 1 << 28  # bytes of Gaussian matrices that are not made where the result goes
_PACK = kernels.packer(
    kernels._cpu,
    "qr",
    "Q gaussian, Q out, q rows, q cols, q count, d gain, B dtype, B direct, 6x unused",
)
_BATCH = 2e10  # operations per thread between looks at the clock: a quarter of a second
_SOON = 2.0  # seconds; what takes longer gets a bar


class Job(NamedTuple):
    """Gaussian matrices of one shape, one behind the other, and where to write gain times Q."""

    gaussian: int  # address: float64 for float64, otherwise float32
    out: int  # address; may be the same
    rows: int
    cols: int
    matrices: int
    gain: float
    dtype: torch.dtype  # of what is written
    direct: bool = False  # `gaussian` holds reflectors, packed: see qr.inl.h
    kept: Tensor | None = None  # its memory

    @property
    def operations(self) -> float:
        small, large = sorted((self.rows, self.cols))
        return (8 / 3 * small + 100) * small * large * self.matrices


def job(fill: Fill, gaussian: int, out: int, kept: Tensor) -> Job:
    rows, cols, count = fill.shape[:3]
    return Job(gaussian, out, rows, cols, count, fill.scale, fill.tensor.dtype, False, kept)


def run(jobs: Sequence[Job], progress: bool | None = None) -> None:
    """Write the matrices, and show a bar if `progress`; None: on a terminal, if it takes long."""
    total = sum(j.operations for j in jobs)
    if total <= _BATCH * torch.get_num_threads():
        _run(jobs, ())
        return
    if progress is None:
        progress = sys.stderr.isatty()
    done, start, bar = 0.0, time.perf_counter(), None
    batches = list(_batches(jobs))
    try:
        for i, batch in enumerate(batches):
            _run(batch, batches[i + 1 :])
            done += sum(j.operations for j in batch)
            expected = (time.perf_counter() - start) * total / done
            if progress and bar is None and expected > _SOON and done < total:
                before = sum(j.matrices for b in batches[:i] for j in b)
                count, what = sum(j.matrices for j in jobs), "fastinit: orthogonal_"
                bar = new_bar(count, "matrices", initial=before, desc=what)
            if bar is not None:
                bar.update(sum(j.matrices for j in batch))
    finally:
        if bar is not None:
            bar.close()


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Yield the jobs in order, cut into batches of about _BATCH operations, at least one matrix."""
    batch: list[Job] = []
    most = room = _BATCH * torch.get_num_threads()
    for j in jobs:
        each = j.operations / j.matrices
        first = 0
        while first < j.matrices:
            n = min(j.matrices - first, max(1, int(room / each)))
            batch.append(_part(j, first, n))
            first += n
            room -= n * each
            if room < each:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


def _part(j: Job, first: int, count: int) -> Job:
    if count == j.matrices:
        return j
    items = j.rows * j.cols
    given = packed_items(j.rows, j.cols) if j.direct else items
    return j._replace(
        gaussian=j.gaussian + first * given * gaussian_dtype(j.dtype).itemsize,
        out=j.out + first * items * j.dtype.itemsize,
        matrices=count,
    )


def _run(batch: Sequence[Job], later: Sequence[Sequence[Job]]) -> None:
    packed = b"".join(
        _PACK.pack(j.gaussian, j.out, j.rows, j.cols, j.matrices, j.gain, DTYPES[j.dtype], j.direct)
        for j in batch
    )
    written = bytearray(sum(j.matrices for j in batch))
    try:
        kernels.orthonormalize(packed, written)
    except BaseException as error:  # whatever a signal handler raises
        flags = iter(written)
        missing = Counter[tuple[int, int]]()
        for j in batch:
            missing[j.rows, j.cols] += sum(next(flags) == 0 for _ in range(j.matrices))
        for j in (j for b in later for j in b):
            missing[j.rows, j.cols] += j.matrices
        shapes = ", ".join(f"{n} of {shape}" for shape, n in missing.items() if n)
        if shapes:
            error.args = (*error.args, f"orthogonal matrices not written: {shapes}")
        raise


def factor_(matrices: Tensor, gain: float) -> None:
    """Replace each matrix of a contiguous CPU tensor, shape (..., rows, cols), by gain times its
    orthogonal factor."""
    rows, cols = matrices.shape[-2:]
    if matrices.numel() != 0:
        at, count = geometry.address_of(matrices), matrices.numel() // (rows * cols)
        run([Job(at, at, rows, cols, count, float(gain), matrices.dtype, False, matrices)])


def write_haar_(tensor: Tensor, gaussian: Tensor, gain: float = 1.0) -> Tensor:
    """Fill a contiguous CPU tensor with gain times a Haar-distributed matrix, without factoring.

    Stewart, "The efficient generation of random orthogonal matrices" (1980), as a product of
    Householder reflectors in compact WY form.

    Args:
        tensor: shape (..., rows, cols) of the four dtypes; each matrix gets its own
        gaussian: the columns of the reflectors, N(0, 1), for each matrix `packed_items(rows, cols)`
            values: row i of the lower trapezoid holds min(i + 1, n), n = min(rows, cols); float64
            for float64, otherwise float32
        gain: scaling factor
    """
    run([haar_job(tensor, gaussian, gain)])
    torch.autograd.graph.increment_version(tensor)
    return tensor


def haar_job(tensor: Tensor, gaussian: Tensor, gain: float) -> Job:
    """Return the job of `write_haar_`."""
    rows, cols = tensor.shape[-2:]
    count = tensor.numel() // (rows * cols)
    need = count * packed_items(rows, cols)
    right = gaussian.dtype is gaussian_dtype(tensor.dtype) and gaussian.numel() == need
    if not (right and tensor.is_contiguous() and gaussian.is_contiguous() and tensor.is_cpu):
        raise ValueError(f"write_haar_ needs {need} packed normals, and contiguous CPU tensors")
    source, out = geometry.address_of(gaussian), geometry.address_of(tensor)
    return Job(source, out, rows, cols, count, gain, tensor.dtype, True, gaussian)
