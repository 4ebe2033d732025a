# SPDX-License-Identifier: BSD-3-Clause
"""Pieces of regions of DTensors, against torch's views of a tensor that holds its indices."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastinit.core import shard
from fastinit.core.shard import Slab

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

View = Callable[[Tensor], Tensor]


def a_view(rng: random.Random, t: Tensor) -> View:
    """Something that a program does to get a part of a parameter."""
    d = rng.randrange(t.dim())
    n = t.shape[d]
    begin, count = rng.randint(0, n), rng.randint(1, 4)
    end, step, at = rng.randint(begin, n), rng.randint(1, 3), rng.randrange(n) if n else 0
    ways: list[View] = [
        lambda x: x[(slice(None),) * d + (slice(begin, end, step),)],
        lambda x: x.select(d, at),
        lambda x: x.chunk(count, d)[min(at, len(x.chunk(count, d)) - 1)],
        lambda x: x.transpose(0, -1),
        lambda x: x.unsqueeze(0),
        lambda x: x.view(-1),
        lambda x: x.unflatten(d, (2, -1)),
    ]
    return rng.choice(ways)


def by_place(slabs: Sequence[Slab]) -> dict[int, int]:
    """The index of what is so many elements after the first in memory."""
    found = {}
    for slab in slabs:
        for at in itertools.product(*(range(n) for n, _, _ in slab.dims)):
            far = sum(i * stride for i, (_, stride, _) in zip(at, slab.dims))
            on = sum(i * step for i, (_, _, step) in zip(at, slab.dims))
            found[slab.offset + far] = slab.index + on
    return found


def check(piece: shard.Piece, region: Tensor, factor: int) -> None:
    """`factor`: 2 for complex numbers, whose first parts are looked at."""
    here = piece.here.real
    assert torch.equal(piece.of(region.contiguous()).float().expand_as(here), here)
    whole, inside = by_place(piece.whole), by_place(piece.region)
    assert len(whole) == len(inside) == factor * here.numel()
    for at in itertools.product(*map(range, here.shape)):
        place = factor * sum(i * stride for i, stride in zip(at, piece.here.stride()))
        assert whole[place] == factor * here[at]
        assert region.flatten()[inside[place] // factor] == here[at]


@pytest.mark.parametrize("rank", range(6))
def test_pieces_of_views(rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)
    try:
        shapes = [(6,), (2, 3), (3, 2)]
        made = [tuple(f"p{rank}{i}{j}" for j in range(len(s))) for i, s in enumerate(shapes)]
        meshes = [
            init_device_mesh("cpu", shape, mesh_dim_names=names)
            for shape, names in zip(shapes, made)
        ]
        rng, seen, silent = random.Random(rank), 0, 0
        for turn in range(150):
            shape = [rng.randint(1, 9) for _ in range(rng.randint(1, 3))]
            mesh = rng.choice(meshes)
            cuts = [Shard(rng.randrange(len(shape))), Replicate()]
            places: list[Any] = [rng.choice(cuts) for _ in range(mesh.ndim)]
            region = torch.arange(math.prod(shape)).view(shape)
            dtype = torch.complex64 if turn % 3 == 0 else torch.float32
            t: Any = distribute_tensor(region.to(dtype), mesh, places, src_data_rank=None)
            view = torch.empty(shape, device="meta")
            for _ in range(rng.randint(1, 3)):
                way = a_view(rng, region) if region.dim() else None
                try:
                    region, view = (region, view) if way is None else (way(region), way(view))
                except (RuntimeError, IndexError):
                    continue
            found = shard.pieces(t, int(view.storage_offset()), view.shape, view.stride())
            if found is None:
                silent += 1
                continue
            seen += 1
            here = set(t._local_tensor.real.flatten().tolist())
            expected = sorted(v for v in region.flatten().tolist() if v in here)
            assert sorted(v for p in found for v in p.here.real.flatten().tolist()) == expected
            for piece in found:
                check(piece, region, 2 if dtype.is_complex else 1)
        assert seen > 140, silent
    finally:
        dist.destroy_process_group()


def test_what_is_no_product_of_ranges() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("products",))
        t = distribute_tensor(torch.zeros(8, 9), mesh, [Shard(0)], src_data_rank=None)
        whole = torch.empty(8, 9, device="meta")
        for view in (
            whole.view(-1)[5:17],
            whole.diagonal(),
            whole[0].expand(3, 9),
            whole.unfold(1, 4, 2),
        ):
            assert shard.pieces(t, int(view.storage_offset()), view.shape, view.stride()) is None
        assert shard.pieces(t, 0, (0, 9), (9, 1)) == []
    finally:
        dist.destroy_process_group()
