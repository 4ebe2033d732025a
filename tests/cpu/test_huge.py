# SPDX-License-Identifier: BSD-3-Clause
"""More elements than 32 bits can count: windows at both ends and around every power of two."""

from __future__ import annotations

import os

import pytest
import torch

import fastinit
from tests.support.compare import BF16, bits
from tests.support.mt19937 import Words, at_state

SIZE = 2**31 + 17
FREE = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
WIDTH = 64
# First elements, multiples of 16 so that a window is made of whole blocks of normals. 2^29 to 2^31
# elements, of two bytes each, are where a 32-bit product or sum would wrap.
STARTS = [0, 2**29 - 32, 2**30 - 32, SIZE // 16 * 16 - WIDTH]


@pytest.mark.slow
@pytest.mark.skipif(FREE < 7 << 30, reason="needs 4 GiB for one tensor")
def test_beyond_32_bits() -> None:
    seed = 31
    words = Words(torch.Generator().manual_seed(seed)).bits
    states, position = [], 0
    for start in [*STARTS, SIZE // 16 * 16]:
        words.random_raw(start - position, output=False)
        states.append(words.state)
        position = start
    *states, tail = states

    tensor = torch.empty(SIZE, dtype=BF16)
    generator = torch.Generator().manual_seed(seed)
    before = fastinit.core.kernels.native_fills
    fastinit.uniform_(tensor, -1.0, 1.0, generator)
    for start, state in zip(STARTS, states, strict=True):
        expected = torch.empty(WIDTH, dtype=BF16).uniform_(-1, 1, generator=at_state(state))
        found = tensor[start : start + WIDTH]
        assert torch.equal(bits(found), bits(expected[: len(found)])), start
    last = at_state(tail)
    rest = torch.empty(SIZE % 16, dtype=BF16).uniform_(-1, 1, generator=last)
    assert torch.equal(bits(tensor[-(SIZE % 16) :]), bits(rest))
    assert torch.equal(words_of(generator), words_of(last))

    # The words of a block of normals are those of its elements; the last 16 are drawn anew.
    generator.manual_seed(seed)
    fastinit.normal_(tensor, 0.0, 0.02, generator)
    for start, state in zip(STARTS, states, strict=True):
        expected = torch.empty(WIDTH, dtype=BF16).normal_(0, 0.02, generator=at_state(state))
        until = max(0, min(WIDTH, SIZE - 16 - start))
        assert torch.equal(bits(tensor[start : start + until]), bits(expected[:until])), start
    last = at_state(tail)
    expected = torch.empty(16, dtype=BF16).normal_(0, 0.02, generator=last)
    assert torch.equal(bits(tensor[-16:]), bits(expected))
    assert torch.equal(words_of(generator), words_of(last))

    fastinit.constant_(tensor, 3.0)
    for start in STARTS:
        assert (tensor[start : start + WIDTH] == 3.0).all()
    assert (tensor[-WIDTH:] == 3.0).all()
    assert fastinit.core.kernels.native_fills >= before + 3


def words_of(generator: torch.Generator) -> torch.Tensor:
    """The state without the first 8 bytes, which only remember the seed."""
    return generator.get_state()[8:]
