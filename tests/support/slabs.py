# SPDX-License-Identifier: BSD-3-Clause
"""Slabs, written element by element, against memory that holds its indices in the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastinit.core import shard
from fastinit.core.shard import Slab


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


def filled(
    t: Tensor, whole: Sequence[int] | None = None, at: Sequence[int] | None = None
) -> Tensor:
    whole = t.shape if whole is None else whole
    at = (0,) * t.dim() if at is None else at
    block = tuple(slice(a, a + n) for a, n in zip(at, t.shape))
    indices = np.arange(math.prod(whole)).reshape(tuple(whole))[block]
    t.copy_(torch.from_numpy(np.asarray(indices)))
    return t


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
