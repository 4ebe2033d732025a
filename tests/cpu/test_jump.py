# SPDX-License-Identifier: BSD-3-Clause
"""Threads that begin far into the sequence: jump-ahead, against torch and numpy's MT19937."""

import numpy as np
import pytest
import torch

import fastinit
from fastinit import _cpu
from tests.support.marks import slow

N = 40_000_003  # beyond what skipping costs less than a polynomial, and no multiple of anything


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [3, *slow([2])])
def test_uniform_far_ahead(threads, count: int) -> None:
    threads(count)
    g = torch.Generator().manual_seed(count)
    state = g.get_state().numpy()
    before = _cpu.jumps()
    ours = fastinit.uniform_(torch.empty(N), generator=g)
    assert _cpu.jumps() - before >= count - 1
    oracle = np.random.MT19937()
    oracle.state = {
        "bit_generator": "MT19937",
        "state": {"key": state[24:5016].view(np.uint64).astype(np.uint32), "pos": 624},
    }
    words = oracle.random_raw(N)
    expected = ((words & 0xFFFFFF) * 2.0**-24).astype(np.float32)
    assert np.array_equal(ours.numpy(), expected)
    after = oracle.state["state"]
    left = g.get_state().numpy()
    assert np.array_equal(left[24:5016].view(np.uint64), after["key"])
    assert left[16:24].view(np.uint64)[0] == after["pos"]


@pytest.mark.parametrize("dtype", [torch.float32, *slow([torch.bfloat16])])
def test_normal_far_ahead(threads, dtype: torch.dtype) -> None:
    """A plan of unequal tensors, with words skipped because a later fill overwrites an earlier."""
    threads(3)
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
        results.append((tensors, torch.get_rng_state(), torch.randn(3)))
    (want, state, after), (got, fast_state, fast_after) = results
    assert all(map(torch.equal, want, got))
    assert torch.equal(state, fast_state)
    assert torch.equal(after, fast_after)
