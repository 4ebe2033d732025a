# SPDX-License-Identifier: BSD-3-Clause
"""Every argument the float32 normals can have: 2^24 radii and 2^24 angles.

The kernel replaces steps of torch's polynomials by cheaper ones that are exact (docs/decisions.md).
Random values would support that but not show it. A generator's state can be written so that its
next words are the ones wanted: tempering is a bijection.
"""

import numpy as np
import pytest
import torch

import fastinit
from fastinit.core import geometry, kernels
from tests.support.marks import slow
from tests.support.mt19937 import WORDS, temper, untemper


def test_untemper() -> None:
    y = np.random.default_rng(0).integers(0, 1 << 32, 10_000, dtype=np.uint32)
    assert (temper(untemper(y)) == y).all()


@pytest.mark.slow
@pytest.mark.parametrize("step", [64, *slow([1])])
def test_all_radii_and_angles(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "MIN_NATIVE", 0)
    half = WORDS // 2
    # Radii in order, angles in reverse: the last state wraps around.
    k = np.arange((1 << 24) + half - (1 << 24) % half, dtype=np.uint32) & 0xFFFFFF
    first, second = k.reshape(-1, half // 8, 8), k[::-1].reshape(-1, half // 8, 8)
    words = untemper(np.concatenate([first, second], axis=2).reshape(-1, WORDS))
    g = torch.Generator()
    blank = g.get_state().numpy()
    blank[8:12].view(np.int32)[0] = 624  # left
    blank[16:24].view(np.uint64)[0] = 1  # next
    theirs, ours = torch.empty(WORDS), torch.empty(WORDS)
    before = kernels.native_fills
    for row in words[::step]:
        blank[24:5016].view(np.uint64)[1 : 1 + WORDS] = row
        state = torch.from_numpy(blank)
        g.set_state(state)
        theirs.normal_(0.0, 1.0, generator=g)
        g.set_state(state)
        fastinit.normal_(ours, 0.0, 1.0, generator=g)
        if not torch.equal(theirs.view(torch.int32), ours.view(torch.int32)):
            raise AssertionError(f"differs for radius or angle in {row}")
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert kernels.native_fills - before >= len(words) // step


def test_octants_are_a_shift() -> None:
    """In torch's float32 operations, for all angles: see sin_cos in torch_dist.inl.h."""
    k = np.arange(1 << 24, dtype=np.uint32)
    u = k.astype(np.float32) * np.float32(2.0**-24)
    theta = u * np.float32(6.283185307179586)
    octant = (theta * np.float32(1.27323954473516)).astype(np.int32)
    assert ((octant + 1) & ~1 == 2 * ((k + (1 << 21)) >> 22).astype(np.int32)).all()
