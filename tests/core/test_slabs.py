# SPDX-License-Identifier: BSD-3-Clause
"""Slabs of plain tensors and of parts, against tensors that hold their indices in the whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastinit.core import shard
from fastinit.core.shard import Slab
from tests.support.marks import slow
from tests.support.slabs import apart, filled, memory, of_part, same

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
