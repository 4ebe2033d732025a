# SPDX-License-Identifier: BSD-3-Clause
"""Where random words come from: torch's CPU generators, read, advanced and put back.

This is the only module that touches a `torch.Generator`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence

import torch

STATE_SIZE = 5056  # bytes of get_state(); csrc/plan.h has the layout
_NORMAL_IS_VALID = 5040  # offset of the flag of the cached normal
_ATTEMPTS = 8

_locks: dict[int, threading.RLock] = {}  # by id; a generator has one Python object
os.register_at_fork(after_in_child=_locks.clear)


class GeneratorBusy(RuntimeError):
    """Another thread keeps drawing from the generator with torch's own operators."""


class State:
    """A copy of a generator's state that kernels may advance."""

    def __init__(self, generator: torch.Generator) -> None:
        self._tensor = generator.get_state()
        if self._tensor.numel() != STATE_SIZE:
            raise NotImplementedError(f"a generator state of {self._tensor.numel()} bytes")
        self.address = self._tensor.data_ptr()
        self._before = ctypes.string_at(self.address, STATE_SIZE)

    @property
    def has_cached_normal(self) -> bool:
        return ctypes.c_int32.from_address(self.address + _NORMAL_IS_VALID).value != 0

    def is_current(self, generator: torch.Generator) -> bool:
        now = generator.get_state()
        return ctypes.string_at(now.data_ptr(), STATE_SIZE) == self._before

    def put_back(self, generator: torch.Generator) -> None:
        generator.set_state(self._tensor)


def resolve(generator: torch.Generator | None) -> torch.Generator:
    return torch.default_generator if generator is None else generator


def is_supported(generator: object) -> bool:
    """Whether it is a CPU generator (None: the default one) whose words the kernels know."""
    return generator is None or (
        type(generator) is torch.Generator and generator.device.type == "cpu"
    )


def draw(generators: Sequence[torch.Generator], work: Callable[[list[State]], None]) -> None:
    """Call `work` with the generators' states, then give the generators the states it left.

    Threads that use fastinit take turns by generator. If torch's operators drew from one of them
    meanwhile in another thread, the work is done again behind them, so that no word is used twice.
    """
    locks = [_locks.setdefault(key, threading.RLock()) for key in sorted(id(g) for g in generators)]
    for lock in locks:
        lock.acquire()
    try:
        for _ in range(_ATTEMPTS):
            states = [State(g) for g in generators]
            work(states)
            if all(s.is_current(g) for s, g in zip(states, generators)):
                break
        else:
            raise GeneratorBusy("another thread keeps drawing from the generator")
        for s, g in zip(states, generators):
            s.put_back(g)
    finally:
        for lock in locks:
            lock.release()
