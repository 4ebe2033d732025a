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


def test_many_workers_share_polynomials() -> None:
    """They begin equally far apart: a polynomial for one such distance, and its squares."""
    torch.set_num_threads(9)
    g = torch.Generator().manual_seed(11)
    words = Words(g)
    before = _cpu.jumps()
    ours = fastinit.uniform_(torch.empty(N), generator=g)
    assert 3 <= _cpu.jumps() - before <= 5  # on their own, eight of them make seven or more
    assert np.array_equal(ours.numpy(), words.floats(N))
    words.assert_is(g)


@pytest.mark.parametrize("threads", [6, *slow([2, 3, 4, 13, 64])])
def test_workers_that_begin_unequally_far_apart(threads: int) -> None:
    """In laws of other costs, behind words that nobody needs, in fills without words, of others."""
    torch.set_num_threads(threads)
    wide, other = torch.float64, torch.Generator()
    laws = [
        *(("normal_", 9_000_001, {}), ("constant_", 3_000_000, {"val": 0.5})),
        *(("uniform_", 12_000_000, {}), ("uniform_", 1_000_000, {"dtype": wide})),
        *(("normal_", 1_000_003, {"generator": other}), ("uniform_", 4_000_000, {})),
    ]
    results = []
    for fast in (False, True):
        torch.manual_seed(8)
        other.manual_seed(9)
        p = fastinit.Plan()
        tensors = []
        for name, size, options in laws:
            arguments = dict(options)
            t = torch.empty(size, dtype=arguments.pop("dtype", torch.float32))
            tensors.append(t)
            getattr(p if fast else torch.nn.init, name)(t, **arguments)
            if size == 12_000_000:
                (p if fast else torch.nn.init).normal_(tensors[0], 1.0, 2.0)  # drops the first
        p.run()
        results.append([*tensors, torch.get_rng_state(), other.get_state()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("threads", [8, *slow([3, 64])])
def test_rounds_of_many_workers(threads: int) -> None:
    torch.set_num_threads(threads)
    found = []
    for module in (torch.nn.init, fastinit):
        g = torch.Generator().manual_seed(12)
        t = module.trunc_normal_(torch.empty(10_000_019), a=-1.0, b=1.5, generator=g)
        found.append((t, g.get_state()))
    (expected, state), (ours, after) = found
    assert torch.equal(expected, ours)
    assert torch.equal(state, after)


def test_a_distance_that_returns_gets_a_polynomial() -> None:
    """Models repeat their shapes: what is skipped the first time is jumped over in the end."""
    g = torch.Generator().manual_seed(13)
    words = Words(g)

    def jumps(size: int) -> int:
        before = _cpu.jumps()
        with fastinit.fused():
            torch.empty(size).uniform_(generator=g)  # dies unread
        words.floats(size)
        return _cpu.jumps() - before

    # Other tests may have left polynomials for some. All are some states above 64 k of them, the
    # distances that there are polynomials for.
    size = next(n for n in range((64 * 50 + 30) * 624, 1 << 22, 64 * 624) if jumps(n) == 0)
    assert [jumps(size) for _ in range(12)][-1] == 1
    words.assert_is(g)
