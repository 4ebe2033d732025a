# SPDX-License-Identifier: BSD-3-Clause
"""Where random words come from: torch's generators, read, advanced and put back.

Only this module touches a generator, except for the ones probe.py makes or lends to torch.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from fastinit.core import kernels, torch_api

STATE_SIZE = 5056  # bytes of get_state(); csrc/fill_desc.h has the layout
_NORMAL_IS_VALID = 5040  # offset of the flag of the cached normal
_ATTEMPTS = 8
_SEEDS = (1 << 64) - 1
_QUICK = 1 << 17  # words that are passed over in ten microseconds
_address = torch.Tensor.data_ptr  # as it is now: recorders replace it

_locks: dict[int, threading.RLock] = {}  # by generator_id
default_lock = threading.RLock()


def _forget_locks() -> None:  # in a forked child, where nobody is left to release them
    global default_lock
    default_lock = threading.RLock()
    _locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


class State:
    """A copy of a generator's state that kernels may advance."""

    def __init__(self, generator: torch.Generator) -> None:
        self._tensor = generator.get_state()
        if self._tensor.numel() != STATE_SIZE:
            raise NotImplementedError(f"a generator state of {self._tensor.numel()} bytes")
        self.address = _address(self._tensor)
        self._before = ctypes.string_at(self.address, STATE_SIZE)

    @property
    def has_cached_normal(self) -> bool:
        return ctypes.c_int32.from_address(self.address + _NORMAL_IS_VALID).value != 0

    def is_current(self, generator: torch.Generator) -> bool:
        return current(generator) == self._before

    def put_back(self, generator: torch.Generator) -> None:
        generator.set_state(self._tensor)


def current(generator: torch.Generator) -> bytes:
    """Return the whole state."""
    state = generator.get_state()  # has to outlive the look at its memory
    return ctypes.string_at(_address(state), STATE_SIZE)


def resolve(generator: torch.Generator | None, device: int) -> torch.Generator:
    """Return the generator that torch would draw from; `device`: index of a GPU, or -1."""
    if generator is not None:
        return generator
    if device < 0:
        return torch.default_generator
    return torch.cuda.default_generators[device]


def is_default(generator: object) -> bool:
    """Return whether torch draws from it if none is given."""
    if not isinstance(generator, torch.Generator):
        return False
    key = generator_id(generator)
    return key == generator_id(torch.default_generator) or any(
        key == generator_id(g) for g in torch.cuda.default_generators
    )


def is_supported(generator: object, device: int) -> bool:
    """Return whether it is a generator of that device (None: its default one)."""
    if generator is None:
        return True
    if type(generator) is not torch.Generator:
        return False
    of = generator.device
    if device < 0:
        return of.type == "cpu"
    return of.type == "cuda" and of.index in (None, device)  # None: torch.Generator("cuda")


def philox(generator: torch.Generator) -> tuple[int, int]:
    """Return the seed of a CUDA generator, and its offset in blocks of four words."""
    return generator.initial_seed() & _SEEDS, generator.get_offset() // 4


def set_philox(generator: torch.Generator, block: int) -> None:
    generator.set_offset(4 * block)


def generator_id(generator: torch.Generator) -> int:
    """Return what all objects of one generator share: torch makes modes another at each call."""
    return torch_api.generator_id(generator)


def lock_of(generator: object) -> threading.RLock:
    """Return the lock by which threads take turns; for what is no generator the default one's."""
    if type(generator) is not torch.Generator:
        return default_lock
    key = generator_id(generator)
    if key == generator_id(torch.default_generator):
        return default_lock
    return _locks.setdefault(key, threading.RLock())


@contextmanager
def turn(*generators: torch.Generator) -> Iterator[None]:
    """Be the only thread of fastinit that draws from these generators."""
    with ExitStack() as locks:
        for g in sorted(generators, key=generator_id):  # in the same order in every thread
            locks.enter_context(lock_of(g))
        yield


def draw_ahead(generator: torch.Generator, words: int, scratch: torch.Tensor) -> torch.Tensor:
    """Move a generator on as if so many words had been drawn; return its state from before.

    `scratch`: STATE_SIZE bytes of the calling thread's own.
    """
    with lock_of(generator):
        for _ in range(_ATTEMPTS):
            before = generator.get_state()
            if before.numel() != STATE_SIZE:
                raise NotImplementedError(f"a generator state of {before.numel()} bytes")
            kernels.advance(_address(before), _address(scratch), words)
            # As in `draw`: has one of torch's operators drawn meanwhile in another thread?
            if words < _QUICK or current(generator) == ctypes.string_at(
                _address(before), STATE_SIZE
            ):
                break
        generator.set_state(scratch)
    return before


def draw(
    generators: Sequence[torch.Generator],
    work: Callable[[list[State]], None],
) -> None:
    """Call `work` with the generators' states, then give the generators the states it left.

    Threads that use fastinit take turns by generator. If one of torch's operators is seen to have
    drawn from it meanwhile in another thread, the work is done again behind that, a few times.
    """
    # `turn` costs 4 us, a sixth of a small fill.
    with lock_of(generators[0]) if len(generators) == 1 else turn(*generators):
        for _ in range(_ATTEMPTS):
            states = [State(g) for g in generators]
            work(states)
            if all(s.is_current(g) for s, g in zip(states, generators)):
                break
        for s, g in zip(states, generators):
            s.put_back(g)
