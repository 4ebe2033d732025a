# SPDX-License-Identifier: BSD-3-Clause
"""Runs fills in the order torch would have, each on the device whose memory it is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastinit.core import geometry, kernels, keyed_numbers, shard, source
from fastinit.core.fill import Caller, Drawn, Fill
from fastinit.core.key import Key
from fastinit.core.laws import Law
from fastinit.core.work import Work
from fastinit.cpu import fills as cpu_fills
from fastinit.cpu import keyed as cpu_keyed
from fastinit.cpu import pointwise as cpu_pointwise
from fastinit.cpu.pointwise import Arithmetic as Arithmetic
from fastinit.cuda import fills as cuda_fills
from fastinit.cuda import keyed as cuda_keyed


def run(fills: Sequence[Fill], progress: bool | None = None) -> None:
    """Do the fills as if torch had done them one by one. `progress`: as for cpu/qr.run."""
    for group in _groups(fills) if len(fills) > 1 else [fills] if fills else []:
        bumps: list[int] = []
        try:
            if group[0].device < 0:
                cpu_fills.run(group, bumps, progress)
            else:
                cuda_fills.run(group, bumps)
        finally:
            count_versions(group, bumps)


def refuse_in_graph() -> None:
    """Raise if a CUDA graph is being captured."""
    kernels.refuse_in_graph()


def count_versions(fills: Sequence[Fill], bumps: Sequence[int]) -> None:
    """Count up the version of each tensor as torch's operators would have."""
    written = [f.tensor for f, times in zip(fills, bumps) for _ in range(times)]
    torch.autograd.graph.increment_version(written)


def _groups(fills: Sequence[Fill]) -> Sequence[Sequence[Fill]]:
    """Return the fills by device, in order, as what is on one does not depend on the others.

    But sparse_ on a GPU draws from the CPU's default generator, so it keeps its place among all, as
    do fills on two GPUs from one generator.
    """
    groups: list[list[Fill]] = []
    in_order = any(f.op == "sparse" for f in fills)
    if len({f.device for f in fills}) > 1:
        pairs = {
            (source.generator_id(f.generator), f.device) for f in fills if f.generator is not None
        }
        in_order |= len(pairs) > len({key for key, _ in pairs})
    last: dict[int, list[Fill]] = {}
    for fill in fills:
        if in_order and groups and groups[-1][0].device != fill.device:
            last.clear()
        group = last.get(fill.device)
        if group is None:
            group = last[fill.device] = []
            groups.append(group)
        group.append(fill)
    return groups


class Prepared:
    """Fills of one GPU, packed once to run again and again; see `prepare`."""

    def __init__(self, fills: Sequence[Fill], kept: Sequence[Tensor]) -> None:
        self._fills = fills
        self._tensors = list({id(t): t for t in (*(f.tensor for f in fills), *kept)}.values())
        self._batch = cuda_fills.Batch(fills)
        # While their memory is held, no other tensor gets these addresses.
        self._held = [geometry.storage_of(t) for t in self._tensors]
        self._places = self._look()
        bumps = [f.bumps for f in fills]
        self._written = [f.tensor for f, times in zip(fills, bumps) for _ in range(times)]

    def _look(self) -> list[int]:
        """Return the addresses of all tensors: 0.1 us each; all of geometry.place would be 0.6."""
        return list(map(geometry.address_of, self._tensors))

    def run(self) -> bool:
        """Run; return False if a tensor has other memory than it had."""
        if self._look() != self._places:
            return False
        bumps: list[int] = []
        self._batch.run(bumps)
        if self._batch.rejects:
            count_versions(self._fills, bumps)
        else:
            torch.autograd.graph.increment_version(self._written)
        return True


def prepare(fills: Sequence[Fill], kept: Sequence[Tensor]) -> Prepared | None:
    """Return what does the same again at little cost, if all fills are on one GPU.

    `kept`: other tensors that must not have moved either.
    """
    if len({f.device for f in fills}) != 1 or fills[0].device < 0:
        return None
    if any(f.op == "orthogonal" for f in fills):  # the memory they work in is not to be kept
        return None
    return Prepared(fills, kept)


def pack(fills: Sequence[Fill]) -> cpu_fills.Batch | None:
    """Return what does the same again at little cost, if all are on the CPU and their words known.

    Only as long as their extents stay what they are.
    """
    if not fills or any(f.device >= 0 or not cpu_fills.is_known(f) for f in fills):
        return None
    return cpu_fills.Batch(fills)


def draw_ahead(fill: Fill, scratch: torch.Tensor, caller: Caller | None) -> Drawn:
    """Move the fill's generator on as if it had been filled; the fill lets go of its tensor.

    `scratch`: memory for a generator's state, of the calling thread's own.
    """
    extent = geometry.in_storage(fill.tensor)
    drawn = Drawn(fill, fill.items, fill.is_dense, extent, caller=caller)
    if fill.device >= 0:
        drawn.stream = cuda_fills.stream(fill)
        if fill.generator is not None:
            drawn.state, drawn.mask = cuda_fills.draw_ahead(fill)
    elif fill.generator is not None:
        drawn.state = cpu_fills.draw_ahead(fill, scratch)
    fill.tensor = geometry.NO_TENSOR[fill.tensor.dtype]
    return drawn


def run_ahead(fills: Sequence[tuple[Drawn, torch.UntypedStorage]]) -> None:
    """Write fills whose words were drawn ahead. None may overlap another."""
    on_cpu = [(drawn, storage) for drawn, storage in fills if drawn.fill.device < 0]
    if on_cpu:
        cpu_fills.run_ahead(on_cpu)
    if len(on_cpu) < len(fills):
        cuda_fills.run_ahead([(drawn, at) for drawn, at in fills if drawn.fill.device >= 0])


def is_cuttable(drawn: Drawn) -> bool:
    """Return whether parts of a fill can be written; see `run_parts`."""
    return cpu_fills.is_cuttable(drawn)


def run_parts(parts: Sequence[tuple[Drawn, int, int, int]]) -> None:
    """Write parts of fills of CPU memory; see `cpu/fills.run_parts`."""
    cpu_fills.run_parts(parts)


def arithmetic(t: Tensor, operator: Any, args: Any, kwargs: Any) -> Arithmetic | None:
    """Return what an operator does to each element of a tensor, or None if only torch can do it."""
    if t.is_cuda or not t.is_contiguous():
        return None
    return cpu_pointwise.arithmetic(operator, args, kwargs, t.dtype)


def run_arithmetic(todo: Sequence[tuple[Tensor, Arithmetic]]) -> None:
    """Do arithmetic to tensors, of which no two may overlap, in one native call."""
    cpu_pointwise.run(todo)


# ---- the keyed stream ----------------------------------------------------------------------------


def fill_keyed(law: Law, tensor: Tensor, key: Key) -> None:
    """Write a random law with the numbers of a key.

    Args:
        tensor: plain, of which the key may say what part of a parameter it is; or a DTensor, of
            which the elements of this process are written

    Raises:
        ValueError: a part that does not lie in the whole, or numbers that the stream does not have.
        RuntimeError, NotImplementedError: as torch's function, or a tensor without plain memory.
    """
    law = keyed_numbers.checked(law, tensor.dtype)
    slabs = shard.slabs(tensor, key.global_shape, key.offset)
    philox, _ = key.take()  # also for what is empty here: every process counts alike
    if not tensor.is_meta and slabs:
        run_keyed([Work(law, philox, shard.local(tensor), slabs)])
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def run_keyed(works: Sequence[Work]) -> None:
    """Write all works, in one native call for the CPU and one launch for each GPU."""
    with kernels.undisturbed():
        on_cpu: list[Work] = []
        on_gpu: list[Work] = []
        for work in works:
            has_kernels = work.tensor.is_cuda and kernels.can_use_cuda()
            (on_gpu if has_kernels else on_cpu).append(work)
        if on_gpu:
            cuda_keyed.run(on_gpu)
        cpu_keyed.run(on_cpu)
