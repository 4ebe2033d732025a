# SPDX-License-Identifier: BSD-3-Clause
"""Fills from the keyed stream: which part of a parameter they write, and packed descriptors.

A value depends on the key of its parameter and on its place in the whole parameter, so a fill is
cut into slabs (shard.py), which any device may write in any order. csrc/laws.inl.h has the
arithmetic, docs/reproducibility.md the definitions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastinit import backend, laws, plan, qr, shard
from fastinit.key import Key
from fastinit.laws import Law
from fastinit.shard import MOST_DIMS, Slab

_PACK = struct.Struct(f"<4Q7d{3 * MOST_DIMS}q8q3B5x")  # KeyedFill of csrc/keyed.h
_OP_CODE = {op: code for code, op in enumerate(plan.OPS)}
_NOTHING = (0,) * 8
_OF_WHOLE = ("orthogonal", "sparse")  # no element can be computed without the others


class Work(NamedTuple):
    """A law for some elements of one tensor."""

    law: Law
    key: int  # of Philox
    tensor: Tensor  # plain memory
    slabs: Sequence[Slab]


def fill(
    function: str,
    tensor: Tensor,
    args: Sequence[Any],
    key: Key | None,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """What a function of torch.nn.init does, with numbers of a key.

    Args:
        function: its name
        tensor: plain, or a DTensor, of which the elements of this process are written
        args: its arguments but the tensor and the generator
        key: None is enough for functions that draw nothing
        global_shape: of the whole parameter, of which a plain tensor is a part
        offset: where in the whole the tensor begins, for each dimension

    Raises:
        ValueError: a part that does not lie in the whole, or no key for random numbers.
        RuntimeError, NotImplementedError: as torch's function, or a tensor without plain memory.
    """
    shape = shard.global_shape(tensor, global_shape)
    law = laws.law_of(function, tensor.dtype, shape, args)
    if key is None and law.is_random:
        raise ValueError(f"{function} of a part of a tensor needs generator=fastinit.Key(...)")
    slabs = shard.slabs(tensor, global_shape, offset)
    if law.op == "constant":  # any dtype
        with torch.no_grad():
            shard.local(tensor).fill_(args[0] if args else law.p[0])
        return tensor
    philox = key.take()[0] if key is not None and law.is_random else 0
    if not tensor.is_meta and slabs:
        run([Work(law, philox, shard.local(tensor), slabs)])
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    return tensor


def run(works: Iterable[Work]) -> None:
    """Write everything, in one native call or launch for each device. Nothing may overlap."""
    with backend.undisturbed():
        packed: list[bytes] = []
        masks: list[bytes] = []
        matrices: list[qr.Job] = []
        copies: list[tuple[Tensor, Work]] = []  # of memory that something else is written to first
        for work in works:
            to = work
            if not _is_direct(work):
                to = _elsewhere(work)
                copies.append((to.tensor, work))
            if to.law.op == "orthogonal":
                to = _normals_of(to, matrices)
            if to.law.op == "sparse":
                masks.append(_mask(to))
            packed += _packed(to)
        for part in (packed, masks):
            if part:
                backend.run_keyed(b"".join(part))
        if matrices:
            qr.run(matrices)
        for source, work in copies:
            _copy(source, work)


def _is_direct(work: Work) -> bool:
    """Whether kernels of the CPU can write the elements where they belong."""
    t = work.tensor
    if type(t) not in (Tensor, torch.nn.Parameter) or t.layout is not torch.strided or t.is_neg():
        raise NotImplementedError(f"the keyed stream cannot be written to a {type(t).__name__}")
    if not (t.is_cpu and t.dtype in plan.DTYPES):
        return False
    return work.law.op not in _OF_WHOLE or (
        t.is_contiguous()
        and list(work.slabs) == [Slab(0, 0, ((t.numel(), 1, 1),))]
        and t.numel() == work.law.items
    )


def _elsewhere(work: Work) -> Work:
    """The same, or the whole parameter if nothing less will do, in memory of its own."""
    dtype = work.tensor.dtype if work.tensor.dtype in plan.DTYPES else torch.float32
    if work.law.op in _OF_WHOLE:
        whole = torch.empty(work.law.items, dtype=dtype, device="cpu")
        return Work(work.law, work.key, whole, [Slab(0, 0, ((work.law.items, 1, 1),))])
    slabs: list[Slab] = []
    items = 0
    for slab in work.slabs:
        dims, stride = [], 1
        for size, _, step in slab.dims:
            dims.append((size, stride, step))
            stride *= size
        slabs.append(Slab(items, slab.index, tuple(dims)))
        items += stride
    return Work(work.law, work.key, torch.empty(items, dtype=dtype, device="cpu"), slabs)


def _copy(source: Tensor, work: Work) -> None:
    """To where it belongs; `source` as `_elsewhere` made it."""
    with torch.no_grad():
        begin = 0
        for slab in work.slabs:
            sizes = [size for size, _, _ in slab.dims]
            to = work.tensor.detach()
            to = to.as_strided(
                sizes, [stride for _, stride, _ in slab.dims], to.storage_offset() + slab.offset
            )
            if work.law.op in _OF_WHOLE:
                to.copy_(source.as_strided(sizes, [step for _, _, step in slab.dims], slab.index))
            else:
                items = to.numel()
                to.copy_(
                    source[begin : begin + items]
                    .view(sizes[::-1])
                    .permute(*range(len(sizes))[::-1])
                )
                begin += items


def _normals_of(work: Work, matrices: list[qr.Job]) -> Work:
    """The reflectors of orthogonal matrices, in the order that qr.write_haar_ wants."""
    count, rows, cols = work.law.shape
    out = work.tensor.view(count, rows, cols)
    items = count * qr.packed_items(rows, cols)
    reflectors = torch.empty(items, dtype=qr.gaussian_dtype(out.dtype), device="cpu")
    matrices.append(qr.haar_job(out, reflectors, work.law.p[0]))
    return Work(laws.normal(0.0, 1.0), work.key, reflectors, [Slab(0, 0, ((items, 1, 1),))])


def _packed(work: Work) -> list[bytes]:
    law, key, t, slabs = work
    base, size, dtype = plan.address_of(t), t.element_size(), plan.DTYPES[t.dtype]
    p = (*law.p, *_NOTHING[: 7 - len(law.p)])
    result = []
    op = _OP_CODE["normal" if law.op == "sparse" else law.op]
    of_whole = law.shape if law.op == "diagonal" else _NOTHING
    for slab in slabs:
        dims = [x for dim in slab.dims for x in dim]
        items = 1
        for n, _, _ in slab.dims:
            items *= n
        result.append(_PACK.pack(
            base + slab.offset * size, key, slab.index, items, *p,
            *dims, *(0,) * (3 * MOST_DIMS - len(dims)), *of_whole,
            op, dtype, len(slab.dims),
        ))  # fmt: skip
    return result


def _mask(work: Work) -> bytes:
    rows, columns, zeros = work.law.shape
    return _PACK.pack(
        plan.address_of(work.tensor), work.key, 0, columns, *_NOTHING[:7],
        columns, 1, 1, *(0,) * (3 * MOST_DIMS - 3), rows, zeros, columns, *_NOTHING[:5],
        _OP_CODE["sparse_mask"], plan.DTYPES[work.tensor.dtype], 1,
    )  # fmt: skip
