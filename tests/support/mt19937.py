# SPDX-License-Identifier: BSD-3-Clause
"""torch's CPU generator as numpy knows it, and states that give the words one wants."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

WORDS = 608  # per state, behind the first; a multiple of 16 below 624


def untemper(y: np.ndarray) -> np.ndarray:
    y = y ^ (y >> 18)
    y = y ^ ((y << 15) & 0xEFC60000)
    x = y
    for _ in range(5):  # each time 7 more bits are right
        x = y ^ ((x << 7) & 0x9D2C5680)
    return x ^ ((x ^ (x >> 11)) >> 11)


def temper(y: np.ndarray) -> np.ndarray:
    y = y ^ (y >> 11)
    y = y ^ ((y << 7) & 0x9D2C5680)
    y = y ^ ((y << 15) & 0xEFC60000)
    return y ^ (y >> 18)


class Words:
    """numpy's MT19937, started from the bytes of a torch generator."""

    def __init__(self, generator: torch.Generator) -> None:
        raw = generator.get_state().numpy().tobytes()
        self.seed, left, _, position = struct.unpack_from("<QiiQ", raw)
        key = np.frombuffer(raw, dtype="<u8", count=624, offset=24).astype(np.uint32)
        self.bits = np.random.MT19937()
        # left == 1: the block is used up (as just after seeding, when `next` still says 0)
        position = 624 if left == 1 else position
        self.bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}}

    def draw(self, count: int) -> np.ndarray:
        return self.bits.random_raw(count).astype(np.uint64)

    def doubles(self, count: int) -> np.ndarray:
        words = self.draw(2 * count)
        return (((words[::2] << 32) | words[1::2]) & (2**53 - 1)).astype(np.float64) * 2.0**-53

    def floats(self, count: int) -> np.ndarray:
        return (self.draw(count) & (2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)

    def assert_is(self, generator: torch.Generator, cached: float | None = None) -> None:
        """The generator is exactly here, cached normal included."""
        raw = generator.get_state().numpy().tobytes()
        other = Words(generator)
        mine, theirs = self.bits.state["state"], other.bits.state["state"]
        assert mine["pos"] == theirs["pos"]
        assert (mine["key"] == theirs["key"]).all()
        assert other.seed == self.seed
        _, sample, _, valid = struct.unpack_from("<dddi", raw, 24 + 8 * 624)
        assert bool(valid) == (cached is not None)
        if cached is not None:
            assert sample == pytest.approx(cached, rel=1e-14)


def at_state(state: dict) -> torch.Generator:
    """Return a torch generator at a position of numpy's MT19937."""
    generator = torch.Generator().manual_seed(31)
    torch.empty(1).uniform_(generator=generator)  # so that `left` and `next` are in use
    raw = generator.get_state()
    position = int(state["state"]["pos"])
    raw[8:12] = torch.tensor([625 - position], dtype=torch.int32).view(torch.uint8)
    raw[16:24] = torch.tensor([position], dtype=torch.int64).view(torch.uint8)
    key = torch.from_numpy(state["state"]["key"].astype(np.int64))
    raw[24 : 24 + 8 * 624] = key.view(torch.uint8)
    generator.set_state(raw)
    return generator
