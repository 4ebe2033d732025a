# SPDX-License-Identifier: BSD-3-Clause
"""Threads that begin far into the sequence: jump-ahead, against torch and numpy's MT19937."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastinit
from fastinit import _cpu
from tests.support.marks import slow
from tests.support.mt19937 import Words

N = 40_000_003  # beyond what skipping costs less than a polynomial, and no multiple of anything


@pytest.mark.parametrize("threads", [3, *slow([2])])
def test_uniform_far_ahead(threads: int) -> None:
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(threads)
    words = Words(g)
    before = _cpu.jumps()
    ours = fastinit.uniform_(torch.empty(N), generator=g)
    assert _cpu.jumps() - before >= threads - 1
    assert np.array_equal(ours.numpy(), words.floats(N))
    words.assert_is(g)


@pytest.mark.parametrize("dtype", [torch.float32, *slow([torch.bfloat16])])
def test_normal_far_ahead(dtype: torch.dtype) -> None:
    """A plan of unequal tensors, with words skipped because a later fill overwrites an earlier."""
    torch.set_num_threads(3)
    sizes = [17, 20_000_001, 5, 12_000_000, 1000]
    results = []
    for fast in (False, True):
        torch.manual_seed(7)
        tensors = [torch.empty(n, dtype=dtype) for n in sizes]
        p = fastinit.Plan()
        f = p if fast else torch.nn.init
        for t in tensors:
            f.normal_(t, 0.5, 0.1)
        f.uniform_(tensors[1], -1.0, 1.0)
        f.uniform_(tensors[0])
        p.run()
        results.append([*tensors, torch.get_rng_state(), torch.randn(3)])
    assert all(map(torch.equal, *results))
