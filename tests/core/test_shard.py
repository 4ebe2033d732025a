# SPDX-License-Identifier: BSD-3-Clause
"""Slabs, element by element, against tensors that hold their own indices in the whole parameter.

What a rank holds is what torch put there: distribute_tensor on fake ranks, one after the other in
this process; parallelize_module and fully_shard on these and on gloo.
"""

from __future__ import annotations

import itertools
import math
import operator
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastinit.core import shard
from fastinit.core.shard import Slab
from tests.support import gloo
from tests.support.marks import slow

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

# ---- the model -----------------------------------------------------------------------------------


def arange(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


def memory(t: Tensor) -> np.ndarray:
    """From t's first element to its last, gaps included."""
    if t.numel() == 0:
        return np.empty(0, np.int64)
    reach = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
    return t.as_strided((reach,), (1,)).numpy()


def written(slabs: list[Slab], reach: int) -> np.ndarray:
    """The index of each element in memory; -1: none."""
    out = np.full(reach, -1, np.int64)
    for offset, index, dims in slabs:
        steps = [step for _, _, step in dims]
        assert steps == sorted(steps)
        assert all(n > 1 for n, _, _ in dims) or dims == ((1, 1, 1),)
        assert 1 <= len(dims) <= shard.MOST_DIMS
        for a, b in itertools.permutations(dims, 2):
            assert (b[1], b[2]) != (a[0] * a[1], a[0] * a[2]), "not merged"
        for at in itertools.product(*(range(n) for n, _, _ in dims)):
            where = offset + sum(i * stride for i, (_, stride, _) in zip(at, dims))
            assert 0 <= where < reach
            assert out[where] == -1, "written twice"
            out[where] = index + sum(i * step for i, (_, _, step) in zip(at, dims))
    return out


def same(t: Tensor, slabs: list[Slab]) -> None:
    """t holds the indices of its elements, and what lies between them is -1."""
    there = memory(t)
    np.testing.assert_array_equal(written(slabs, len(there)), there)


def apart(*shape: int) -> Tensor:
    return torch.full(shape, -1)


# ---- plain tensors -------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-D": lambda: apart(1)[0],
    "one": lambda: apart(1),
    "ones": lambda: apart(1, 1, 1),
    "none": lambda: apart(0),
    "no rows": lambda: apart(0, 5),
    "no columns": lambda: apart(5, 0, 3),
    "1-D": lambda: apart(7),
    "2-D": lambda: apart(5, 7),
    "3-D": lambda: apart(3, 4, 5),
    "4-D": lambda: apart(2, 3, 4, 5),
    "5-D": lambda: apart(2, 3, 2, 3, 2),
    "6-D": lambda: apart(2, 3, 2, 1, 3, 2),
    "transposed": lambda: apart(5, 7).t(),
    "permuted": lambda: apart(3, 4, 5).permute(1, 2, 0),
    "permuted 6-D": lambda: apart(2, 3, 2, 3, 2, 3).permute(3, 0, 5, 2, 4, 1),
    "reversed 6-D": lambda: apart(2, 3, 2, 3, 2, 3).permute(5, 4, 3, 2, 1, 0),
    "channels_last": lambda: apart(2, 4, 5, 3).permute(0, 3, 1, 2),
    "channels_last 1x1": lambda: apart(2, 3, 1, 1).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: apart(2, 2, 2, 3, 4).permute(0, 4, 1, 2, 3),
    "offset": lambda: apart(9)[2:],
    "columns": lambda: apart(5, 7)[:, 2:5],
    "one column": lambda: apart(5, 7)[:, 3],
    "rows": lambda: apart(5, 7)[1:3],
    "every second row": lambda: apart(5, 7)[::2],
    "every third": lambda: apart(20)[1::3],
    "every second of both": lambda: apart(6, 8)[1::2, ::2],
    "steps of three": lambda: apart(4, 5, 6)[::3, 1::2, ::4].permute(2, 0, 1),
    "narrow": lambda: apart(4, 5, 6).narrow(1, 1, 3),
    "odd strides of ones": lambda: apart(9).as_strided((1, 4, 1), (5, 2, 77)),
    "zero strides of ones": lambda: apart(9).as_strided((1, 4, 1), (0, 1, 0)),
    "row of ones": lambda: apart(5, 1, 7)[:, :, :1],
    "6-D apart": lambda: apart(4, 4, 4, 4, 4, 4)[::2, 1::2, ::3, ::2, 1::2, ::2],
    "7-D apart": lambda: apart(3, 3, 3, 3, 3, 3, 3)[::2, ::2, ::2, ::2, ::2, ::2, ::2],
}


def filled(
    t: Tensor, whole: Sequence[int] | None = None, at: Sequence[int] | None = None
) -> Tensor:
    whole = t.shape if whole is None else whole
    at = (0,) * t.dim() if at is None else at
    block = tuple(slice(a, a + n) for a, n in zip(at, t.shape))
    indices = np.arange(math.prod(whole)).reshape(tuple(whole))[block]
    t.copy_(torch.from_numpy(np.asarray(indices)))
    return t


@pytest.mark.parametrize("name", LAYOUTS)
def test_plain(name: str) -> None:
    t = filled(LAYOUTS[name]())
    same(t, shard.slabs(t))
    same(t, shard.slabs(t, t.shape))
    same(t, shard.slabs(nn.Parameter(t, requires_grad=False)))
    assert shard.local(t) is t
    assert shard.global_shape(t) == t.shape
    assert not shard.is_distributed(t)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1])
def test_block(name: str, before: int, after: int) -> None:
    t = LAYOUTS[name]()
    at = [before] * t.dim()
    whole = [before + n + after for n in t.shape]
    filled(t, whole, at)
    same(t, shard.slabs(t, whole, at))
    same(t, shard.slabs(t, torch.Size(whole), tuple(np.int64(a) for a in at)))
    assert shard.global_shape(t, whole) == torch.Size(whole)


def anything(r: np.random.Generator, most: int = 4) -> Tensor:
    """Permuted, sliced with steps, of 1 to 6 dimensions."""
    rank = int(r.integers(1, 7))
    t = apart(*(int(n) for n in r.integers(1, most + 1, rank)))
    t = t.permute(*map(int, r.permutation(rank)))
    for d, n in enumerate(t.shape):
        if r.random() < 0.4:
            begin, step = int(r.integers(0, n)), int(r.integers(1, 3))
            t = t[(slice(None),) * d + (slice(begin, None, step),)]
    return t


@pytest.mark.parametrize("seed", [*range(40), *slow(range(40, 150))])
def test_any_block(seed: int) -> None:
    r = np.random.default_rng(seed)
    t = anything(r)
    at = [int(a) for a in r.integers(0, 3, t.dim()) * (r.random(t.dim()) < 0.5)]
    whole = [a + n + int(r.integers(0, 2)) for a, n in zip(at, t.shape)]
    filled(t, whole, at)
    same(t, shard.slabs(t, whole, at))


def test_few_slabs() -> None:
    whole = (6, 8)
    assert shard.slabs(apart(6, 8)) == [Slab(0, 0, ((48, 1, 1),))]
    assert shard.slabs(apart(2, 8), whole, (3, 0)) == [Slab(0, 24, ((16, 1, 1),))]
    assert shard.slabs(apart(6, 3), whole, (0, 5)) == [Slab(0, 5, ((3, 1, 1), (6, 3, 8)))]
    assert shard.slabs(apart(8, 6).t()) == [Slab(0, 0, ((8, 6, 1), (6, 1, 8)))]
    assert shard.slabs(apart(1), (9,), (4,)) == [Slab(0, 4, ((1, 1, 1),))]
    assert shard.slabs(apart(2, 3, 4, 5).permute(0, 2, 3, 1)) == [
        Slab(0, 0, ((3, 20, 1), (20, 1, 3), (2, 60, 60)))
    ]
    assert len(shard.slabs(apart(5, 5, 3, 5, 5, 5)[::2, ::2, ::2, ::2, ::2, ::2])) == 2


def test_what_is_refused() -> None:
    t = torch.empty(3, 4)
    with pytest.raises(ValueError, match="2 dimensions at an offset of 2 in a whole of 3"):
        shard.slabs(t, (3, 4, 5), (0, 0))
    with pytest.raises(ValueError, match="dimensions"):
        shard.slabs(t, (3, 4), (0,))
    with pytest.raises(ValueError, match="dimensions"):
        shard.slabs(t, (12,))
    with pytest.raises(ValueError, match=r"\[3, 4\] at \[0, -1\] reaches beyond"):
        shard.slabs(t, (3, 4), (0, -1))
    with pytest.raises(ValueError, match=r"at \[1, 0\] reaches beyond a whole of \[3, 9\]"):
        shard.slabs(t, (3, 9), (1, 0))
    with pytest.raises(ValueError, match="beyond"):
        shard.slabs(t, (2, 4))
    with pytest.raises(ValueError, match="beyond"):
        shard.slabs(torch.empty(0, 4), (-1, 4))
    with pytest.raises(ValueError, match="beyond"):  # of nothing, too
        shard.slabs(torch.empty(0, 4), (3, 4), (4, 0))
    with pytest.raises(ValueError, match="needs a global_shape"):
        shard.slabs(t, None, (0, 0))
    for shape, offset in [((3.0, 4), (0, 0)), ((3, 4), (0.0, 0)), ((3, "4"), None)]:
        with pytest.raises(TypeError):
            shard.slabs(t, shape, offset)
    with pytest.raises(TypeError):
        shard.global_shape(t, (3, 4.5))
    for shared in (
        torch.empty(3, 1).expand(3, 4),
        torch.empty(4).expand(3, 4),
        torch.empty(1)[0].expand(2),
        torch.empty(9).as_strided((4, 3), (2, 1)),
    ):
        with pytest.raises(ValueError, match="share memory"):
            shard.slabs(shared)
    assert shard.slabs(torch.empty(1, 4).expand(0, 4)) == []
    assert shard.slabs(torch.empty(1).expand(1, 1)) == [Slab(0, 0, ((1, 1, 1),))]


# ---- parts ---------------------------------------------------------------------------------------


def of_part(p: Tensor, begin: int, sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Compares with the memory of p's local tensor, which holds indices; False: no answer."""
    slabs = shard.part(p, begin, sizes, strides)
    if slabs is None:
        return False
    here = shard.local(p).detach()
    there = here.as_strided(sizes, strides, here.storage_offset() + begin)
    expected = memory(there).copy()
    belongs = np.zeros(expected.shape, bool)
    for at in itertools.product(*map(range, sizes)):
        belongs[sum(i * stride for i, stride in zip(at, strides))] = True
    expected[~belongs] = -1
    assert -1 not in expected[belongs], "not p's"
    np.testing.assert_array_equal(written(slabs, len(expected)), expected)
    return True


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_of_it_is_a_part(name: str) -> None:
    p = filled(LAYOUTS[name]())
    assert shard.part(p, 0, p.shape, p.stride()) == shard.slabs(p)
    order = np.random.default_rng(0).permutation(p.dim())
    turned = p.permute([int(d) for d in order])
    assert shard.part(p, 0, turned.shape, turned.stride()) == shard.slabs(p)
    there = memory(p)
    if p.numel() == there.size and p.numel():
        assert shard.part(p, 0, (p.numel(),), (1,)) == shard.slabs(p)


@pytest.mark.parametrize("seed", [*range(40), *slow(range(40, 150))])
def test_views_are_parts(seed: int) -> None:
    r = np.random.default_rng(seed)
    p = filled(anything(r))
    v = p
    for d, n in enumerate(p.shape):
        if r.random() < 0.5:
            begin, step = int(r.integers(0, n)), int(r.integers(1, 3))
            end = int(r.integers(begin, n + 1))
            v = v[(slice(None),) * d + (slice(begin, end, step),)]
        elif r.random() < 0.2:
            v = v.narrow(d, int(r.integers(0, n)), 1)
    v = v.permute(*map(int, r.permutation(v.dim()))).squeeze()
    begin = v.storage_offset() - p.storage_offset()
    answered = of_part(p, begin, v.shape, v.stride())
    assert answered or len(shard.slabs(p)) > 1


@pytest.mark.parametrize("seed", [*range(30), *slow(range(30, 100))])
def test_any_region_of_contiguous_memory(seed: int) -> None:
    r = np.random.default_rng(seed)
    sizes, strides, reach = [], [], 1
    for _ in range(int(r.integers(0, 4))):
        sizes.append(int(r.integers(1, 5)))
        strides.append(reach + int(r.integers(0, 4)))
        reach += (sizes[-1] - 1) * strides[-1]
    order = r.permutation(len(sizes))
    begin = int(r.integers(0, 9))
    rows = -(-(begin + reach) // 7)
    p = filled(apart(rows, 1, 7))
    assert of_part(p, begin, [sizes[i] for i in order], [strides[i] for i in order])


def test_what_is_no_part() -> None:
    p = filled(apart(4, 5)[:, :3])
    assert of_part(p, 5, (3,), (1,))
    assert of_part(p, 1, (4,), (5,))
    assert of_part(p, 0, (2, 2), (10, 2))
    for begin, sizes, strides in [
        (0, (4,), (1,)),  # beyond a row
        (0, (20,), (1,)),
        (3, (), ()),  # between rows
        (2, (2,), (1,)),
        (18, (), ()),  # beyond the last
        (-5, (), ()),
        (0, (5,), (5,)),
        (0, (2,), (6,)),  # a diagonal
        (0, (2,), (0,)),
        (0, (3, 3), (1, 1)),
    ]:
        assert shard.part(p, begin, sizes, strides) is None, (begin, sizes, strides)
    assert shard.part(filled(apart(9)[::2]), 1, (2,), (2,)) is None
    turned = filled(apart(6, 4).t())
    assert of_part(turned, 8, (8,), (1,))  # two columns of memory
    assert of_part(turned, 0, (3, 2, 2), (8, 2, 1))
    assert shard.part(turned, 1, (7,), (1,)) is None
    assert shard.part(turned, 0, (6,), (1,)) is None
    assert shard.part(p, 99, (3, 0), (1, 1)) == []
    empty = torch.empty(0, 4)
    assert shard.part(empty, 0, (4,), (1,)) is None
    assert shard.part(empty, 0, (), ()) is None
    assert shard.part(empty, 0, (0, 4), (4, 1)) == []


# ---- DTensors of fake ranks ----------------------------------------------------------------------


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def placed(mesh: DeviceMesh, placements: Sequence[Any], shape: Sequence[int]) -> DTensor:
    """Each rank cuts its piece out of the same tensor: no communication, which is fake here."""
    return distribute_tensor(arange(*shape), mesh, placements, src_data_rank=None)


def names(placements: Sequence[Any]) -> str:
    return " ".join(map(str, placements))


R, S0, S1 = Replicate(), Shard(0), Shard(1)
LINES = [
    (4, [S0], [(8, 3), (7, 3), (9, 5), (3, 2), (1, 2), (0, 3), (4,), (5,), (13, 2, 2)]),
    (3, [S1], [(2, 6), (2, 7), (3, 2), (2, 1), (2, 0), (2, 5, 3), (1, 5)]),
    (3, [Shard(2)], [(2, 3, 7), (2, 1, 2, 3)]),
    (5, [R], [(3, 4), (1,), ()]),
]
MESHES: list[tuple[tuple[int, ...], list[Any], list[tuple[int, ...]]]] = [
    ((2, 3), [S0, S0], [(12, 2), (13, 3), (7, 2), (4, 1), (1, 5)]),
    ((2, 3), [S1, S1], [(2, 12), (3, 7), (2, 4)]),
    ((2, 3), [S0, S1], [(4, 6), (5, 7), (1, 2), (3, 4, 2)]),
    ((3, 2), [S1, S0], [(4, 6), (5, 7), (1, 2)]),
    ((2, 2), [R, S1], [(3, 4), (3, 5), (3, 1)]),
    ((2, 2), [S0, R], [(3, 4), (5, 2)]),
    ((2, 2), [R, R], [(3, 4)]),
    ((2, 2), [_StridedShard(0, split_factor=2), S0], [(8, 3), (5, 2), (7, 2), (4,), (3,), (1, 9)]),
    ((3, 2), [_StridedShard(0, split_factor=2), S0], [(12, 3), (24,), (6, 1), (13, 2)]),
    ((2, 3), [_StridedShard(1, split_factor=3), S1], [(2, 12), (3, 18)]),
    ((2, 2), [_StridedShard(0, split_factor=2), R], [(8, 3), (7, 2), (5, 5), (3, 2), (1, 2)]),
    ((3,), [_StridedShard(0, split_factor=4)], [(24, 2), (25, 2), (14,), (5, 2), (2, 2)]),
    ((2, 2), [_StridedShard(0, split_factor=2), S1], [(8, 3), (9, 4)]),
    ((2, 5), [_StridedShard(0, split_factor=3), S0], [(24, 2), (25,)]),
    ((2, 2), [S0, _StridedShard(0, split_factor=3)], [(24, 2), (25, 2)]),
    ((2, 2, 2), [S0, S1, S0], [(8, 4), (9, 5), (3, 3)]),
    ((2, 2, 2), [R, S0, S1], [(4, 4), (3, 5, 2)]),
    ((2, 2, 2), [Shard(2), S1, S0], [(3, 5, 7)]),
    ((2, 2, 2), [R, _StridedShard(0, split_factor=2), S0], [(8, 3), (7, 3)]),
    (
        (2, 2, 2),
        [_StridedShard(0, split_factor=4), _StridedShard(0, split_factor=2), S0],
        [(16, 3), (8,)],
    ),
    ((2, 2, 2), [_StridedShard(0, split_factor=4), S0, S0], [(16, 3), (32,)]),
]
CASES = [((n,), placements, shapes) for n, placements, shapes in LINES] + MESHES


@pytest.mark.parametrize(("mesh", "placements", "shapes"), CASES, ids=lambda x: str(x)[:60])
def test_placements(
    mesh: tuple[int, ...], placements: list[Any], shapes: list[tuple[int, ...]]
) -> None:
    ranks = math.prod(mesh)
    for rank in range(ranks):
        with as_rank(rank, ranks):
            grid = init_device_mesh("cpu", mesh)
            for shape in shapes:
                t = placed(grid, placements, shape)
                assert shard.is_distributed(t)
                assert shard.local(t) is t._local_tensor
                assert shard.global_shape(t) == torch.Size(shape)
                found = shard.slabs(t)
                same(t._local_tensor, found)
                here = t._local_tensor
                if here.numel():
                    assert shard.part(t, 0, (here.numel(),), (1,)) == found
                    for row in range(here.shape[0] if here.dim() else 0):
                        v = here[row]
                        at = v.storage_offset() - here.storage_offset()
                        assert of_part(t, at, v.shape, v.stride()) or len(found) > 1


def test_few_slabs_of_a_shard() -> None:
    with as_rank(1, 4):
        line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
        assert shard.slabs(placed(line, [S0], (8, 6))) == [Slab(0, 12, ((12, 1, 1),))]
        assert shard.slabs(placed(line, [S1], (3, 8))) == [Slab(0, 2, ((2, 1, 1), (3, 2, 8)))]
        assert shard.slabs(placed(line, [R], (3, 8))) == [Slab(0, 0, ((24, 1, 1),))]
        fsdp_tp = [_StridedShard(0, split_factor=2), S0]
        assert shard.slabs(placed(grid, fsdp_tp, (8, 5))) == [Slab(0, 20, ((10, 1, 1),))]
        # Both pieces of rows 0, 1, 4, 5 are one slab; of columns, they go on in the next row.
        fsdp = [_StridedShard(0, split_factor=2), R]
        assert shard.slabs(placed(grid, fsdp, (8, 5))) == [Slab(0, 0, ((10, 1, 1), (2, 10, 20)))]
        columns = [_StridedShard(1, split_factor=2), R]
        assert shard.slabs(placed(grid, columns, (3, 8))) == [Slab(0, 0, ((2, 1, 1), (6, 2, 4)))]
        # Rows 0, 1 and 3: two slabs, and what is in one of them.
        t = placed(grid, fsdp, (5, 2))
        assert shard.slabs(t) == [Slab(0, 0, ((4, 1, 1),)), Slab(4, 6, ((2, 1, 1),))]
        assert shard.part(t, 4, (2,), (1,)) == [Slab(0, 6, ((2, 1, 1),))]
        assert shard.part(t, 2, (4,), (1,)) is None
        # Pieces that all are here.
        alone = placed(DeviceMesh("cpu", [1]), fsdp[:1], (7, 2))
        assert shard.slabs(alone) == [Slab(0, 0, ((14, 1, 1),))]


def test_outside_the_mesh() -> None:
    with as_rank(3, 4):
        mesh = DeviceMesh("cpu", [0, 2])
        t = placed(mesh, [S0], (5, 3))
        assert shard.slabs(t) == []
        assert shard.part(t, 0, (3,), (1,)) is None
    with as_rank(2, 4):
        t = placed(DeviceMesh("cpu", [0, 2]), [S0], (5, 3))
        assert shard.slabs(t) == [Slab(0, 9, ((6, 1, 1),))]


def test_local_memory_of_any_layout() -> None:
    with as_rank(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        for whole, spec in [((4, 6), S0), ((4, 6), S1), ((3, 6), S0)]:
            here = placed(mesh, [spec], whole)._local_tensor
            for there in (
                apart(*here.shape[::-1]).t(),
                apart(9, 9)[: len(here), 1 : here.shape[1] + 1],
            ):
                there.copy_(here)
                t = DTensor.from_local(
                    there, mesh, [spec], run_check=False, shape=torch.Size(whole), stride=(6, 1)
                )
                same(shard.local(t), shard.slabs(t))
                assert shard.part(t, 0, there.shape, there.stride()) == shard.slabs(t)


def test_what_a_dtensor_refuses() -> None:
    with as_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        t = placed(mesh, [S0], (5, 3))
        for given in [{"global_shape": (5, 3)}, {"offset": (0, 0)}]:
            with pytest.raises(ValueError, match="a DTensor knows"):
                shard.slabs(t, **given)
        with pytest.raises(ValueError, match="a DTensor knows"):
            shard.global_shape(t, (5, 3))
        with pytest.raises(NotImplementedError, match="Partial"):
            shard.slabs(DTensor.from_local(torch.zeros(3), mesh, [Partial()], run_check=False))
        for here, whole in [((3, 3), (9, 3)), ((3, 2), (5, 3)), ((3,), (5, 3))]:
            lies = DTensor.from_local(
                torch.zeros(here),
                mesh,
                [S0],
                run_check=False,
                shape=torch.Size(whole),
                stride=(3, 1),
            )
            with pytest.raises(NotImplementedError, match="do not say which"):
                shard.slabs(lies)
        shared = DTensor.from_local(torch.zeros(1).expand(4), mesh, [R], run_check=False)
        with pytest.raises(ValueError, match="share memory"):
            shard.slabs(shared)


def test_another_order_of_shards() -> None:
    """redistribute can cut along the last mesh dimension first."""
    spec = pytest.importorskip("torch.distributed.tensor._dtensor_spec")
    if not hasattr(spec, "ShardOrderEntry"):
        pytest.skip("this torch cuts from left to right only")
    from torch.distributed.tensor._redistribute import redistribute_local_tensor

    for rank, rows in itertools.product(range(6), (12, 13, 7)):
        with as_rank(rank, 6):
            mesh, whole = init_device_mesh("cpu", (2, 3)), arange(rows, 2)
            meta = spec.TensorMeta(whole.shape, whole.stride(), whole.dtype)
            order = (spec.ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
            before = spec.DTensorSpec(mesh, (R, R), tensor_meta=meta)
            after = spec.DTensorSpec(mesh, (S0, S0), tensor_meta=meta, shard_order=order)
            here = redistribute_local_tensor(whole, before, after)
            t = DTensor(here, after, requires_grad=False)
            same(here, shard.slabs(t))


@pytest.mark.parametrize("seed", [*range(4), *slow(range(4, 12))])
def test_any_placements(seed: int) -> None:
    r = np.random.default_rng(seed)
    mesh = [int(n) for n in r.integers(1, 4, int(r.integers(1, 4)))]
    ranks = math.prod(mesh)
    cases = []
    for _ in range(6):
        shape = [int(n) for n in r.integers(1, 14, int(r.integers(1, 4)))]
        spec: list[Any] = []
        for _ in mesh:
            dim, factor = int(r.integers(len(shape))), int(r.integers(1, 4))
            kinds = [Replicate(), Shard(dim), Shard(dim), _StridedShard(dim, split_factor=factor)]
            spec.append(kinds[int(r.integers(4))])
        cases.append((spec, shape))
    for rank in range(ranks):
        with as_rank(rank, ranks):
            grid = init_device_mesh("cpu", tuple(mesh))
            for spec, shape in cases:
                t = placed(grid, spec, shape)
                try:
                    found = shard.slabs(t)
                except NotImplementedError:  # as below: other elements if fully_shard made it
                    assert any(isinstance(p, _StridedShard) for p in spec)
                else:
                    same(t._local_tensor, found)


class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


def test_neither_operators_nor_time() -> None:
    with as_rank(5, 8):
        mesh = init_device_mesh("cpu", (2, 4))
        whole, spec = torch.Size((10**9 + 1, 10**5)), [_StridedShard(0, split_factor=4), S0]
        rows = 125_000_000
        t = DTensor.from_local(
            torch.empty(rows, 10**5, device="meta"),
            mesh,
            spec,
            run_check=False,
            shape=whole,
            stride=(10**5, 1),
        )
        begin = time.perf_counter()
        with Refuse():
            found = shard.slabs(t)
            assert shard.part(t, 10**5, (10**5,), (1,)) is not None
        assert time.perf_counter() - begin < 0.1
        assert len(found) == 1


@pytest.mark.slow
def test_import_stays_cheap() -> None:
    code = (
        "import sys, torch, fastinit.core.shard as s\n"
        "t = torch.empty(3, 4)\n"
        "assert not s.is_distributed(t) and s.local(t) is t and len(s.slabs(t)) == 1\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- fully_shard and parallelize_module ----------------------------------------------------------


class Block(nn.Module):
    """Sizes that neither 2 nor 3 divide; each parameter holds its indices."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.zeros(1))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(arange(*p.shape))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def checked(model: nn.Module, wholes: dict[str, torch.Size], exact: bool = True) -> list[str]:
    """Compares every parameter with what is in it; names those that nothing was said about."""
    silent = []
    for name, p in model.named_parameters():
        assert shard.is_distributed(p), name
        assert shard.global_shape(p) == wholes[name]
        here = shard.local(p).detach()
        try:
            found = shard.slabs(p)
        except NotImplementedError:
            silent.append(name)
            continue
        same(here.long(), found)
        if exact:
            placements = p.placements
            again = placed(p.device_mesh, placements, p.shape)
            assert torch.equal(again._local_tensor, here.long())
    return silent


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def fake_block(rank: int, dp: int, tp: int, *sizes: int) -> tuple[Block, dict[str, torch.Size]]:
    # Names of its own: torch takes a mesh of the same ranks and names for the one before, whose
    # coordinate is another fake rank's.
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=(f"dp{rank}", f"tp{rank}"))
    model = Block(*sizes)
    wholes = shapes_of(model)
    if tp > 1:
        parallelize_module(model, mesh[f"tp{rank}"], PLAN, src_data_rank=None)
    fully_shard(model, mesh=mesh[f"dp{rank}"])
    return model, wholes


FAKE = [(3, 1, 5, 7), (2, 2, 5, 7), (3, 2, 5, 7), (2, 3, 5, 11), (4, 2, 9, 2), (2, 4, 3, 5)]


@pytest.mark.parametrize(("dp", "tp", "width", "hidden"), FAKE)
def test_fully_shard_of_fake_ranks(dp: int, tp: int, width: int, hidden: int) -> None:
    for rank in range(dp * tp):
        with as_rank(rank, dp * tp):
            model, wholes = fake_block(rank, dp, tp, width, hidden)
            assert checked(model, wholes, exact=False) == []


def test_placements_that_do_not_say() -> None:
    """27 rows over 4 and then 3: the one left on rank (2, 2) is 20 in memory, 26 by placements."""
    silent = {}
    for rank in range(12):
        with as_rank(rank, 12):
            model, wholes = fake_block(rank, 3, 4, 3, 27)
            silent[rank] = checked(model, wholes, exact=False)
            if rank == 10:
                p: Any = model.up.bias
                assert p._local_tensor.tolist() == [20]
                assert placed(p.device_mesh, p.placements, (27,))._local_tensor.tolist() == [26]
    assert silent.pop(10) == ["up.weight", "up.bias"]
    assert not any(silent.values())


def test_fully_shard_along_columns() -> None:
    for rank in range(3):
        with as_rank(rank, 3):
            mesh = init_device_mesh("cpu", (3,), mesh_dim_names=(f"dp{rank}",))
            model = Block(6, 9)
            wholes = shapes_of(model)
            fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
            assert checked(model, wholes) == []
            assert model.up.weight.placements == (S1,)


# ---- gloo ----------------------------------------------------------------------------------------


def sharded(rank: int) -> dict[str, list[list[int]]]:
    """On a rank of four: the indices that it has of each parameter."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    meshes = {"2": grid["dp"], "4": init_device_mesh("cpu", (4,)), "HSDP": grid, "TP": grid["dp"]}
    has = {}
    for kind, mesh in meshes.items():
        model = Block(5, 7)
        wholes = shapes_of(model)
        if kind == "TP":
            parallelize_module(model, grid["tp"], PLAN)
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert checked(model, wholes) == []
        has[kind] = []
        for name, p in model.named_parameters():
            indices = written(shard.slabs(p), shard.local(p).numel())
            has[kind].append(indices.tolist())
            assert torch.equal(p.full_tensor().long(), arange(*wholes[name]))
    return has


@pytest.mark.slow
def test_fully_shard() -> None:
    results = gloo.run(sharded, 4)
    for kind, times in [("2", 2), ("4", 1), ("HSDP", 2)]:
        for i, p in enumerate(Block(5, 7).parameters()):
            of_all = sorted(itertools.chain(*(has[kind][i] for has in results)))
            assert of_all == sorted([*range(p.numel())] * times)
    for i, p in enumerate(Block(5, 7).parameters()):
        assert set().union(*(has["TP"][i] for has in results)) == set(range(p.numel()))


def fails(rank: int) -> None:
    if rank == 1:
        raise KeyError("of rank one")
    dist.barrier()


@pytest.mark.slow
def test_gloo_returns_in_the_order_of_ranks() -> None:
    assert gloo.run(operator.add, 2, 10) == [10, 11]


@pytest.mark.slow
def test_gloo_raises_what_a_rank_raised() -> None:
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 .*\n(.*\n)*KeyError: 'of rank one'"):
        gloo.run(fails, 2)
    assert time.monotonic() - begin < gloo.SECONDS / 2  # rank 0 waits for longer
