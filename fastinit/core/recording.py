# SPDX-License-Identifier: BSD-3-Clause
"""What records the fills of this thread instead of running them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastinit.core import laws, torch_api
from fastinit.core.fill import Fill
from fastinit.core.key import Key
from fastinit.core.laws import Law


class Call(NamedTuple):
    """A function of torch.nn.init that is left to torch, and its arguments."""

    function: Callable[..., Tensor]
    name: str  # of torch.nn.init's function whose law it writes
    tensor: Tensor
    args: tuple[Any, ...]  # without the generator
    generator: object  # None for functions without one; torch says what else it refuses

    def __call__(self) -> Tensor:
        if self.name in laws.DRAW_NOTHING:
            return self.function(self.tensor, *self.args)
        return self.function(self.tensor, *self.args, self.generator)

    def law(self) -> Law:
        return laws.of_shape(self.name, self.tensor.dtype, self.tensor.shape, self.args)


class Recorder:
    """Takes the fills of one thread, which would otherwise run at once.

    The functions of fastinit call `takes` and then `add`, `call` or `fill_keyed`; capture/hooks.py
    calls the others, which do nothing by default.
    """

    modes = 0  # dispatch modes that it has put on torch's stack
    is_told = False  # by hooks what happens
    is_idle = False  # it waits for a fill that is worth its mode; until then all is torch's
    seed: int | None = None  # of the keyed stream, which then takes the place of torch's generators
    orthogonal: str | None = None  # of its scope; goes before the process's, see switch.py
    watch: Callable[[Tensor], object] | None = None  # told what is filled without operators
    reads: Callable[[Tensor], object] | None = None  # told what is read without operators
    submitting = False  # a task is given to a pool, which may start threads of its own for it

    @contextmanager
    def watched(
        self, watch: Callable[[Tensor], object], reads: Callable[[Tensor], object]
    ) -> Iterator[None]:
        """Have another mode on top of this one's, which is told what comes without operators."""
        before = self.watch, self.reads, self.modes
        self.watch, self.reads, self.modes = watch, reads, self.modes + 1
        try:
            yield
        finally:
            self.watch, self.reads, self.modes = before

    # ---- fills -------------------------------------------------------------------------------

    def takes(self, t: Tensor, function: str) -> bool:
        """Return whether a call of a function of torch.nn.init is worth a record."""
        return True

    def lets_pass(self, function: str, t: Tensor, args: tuple[Any, ...]) -> bool:
        """Return whether torch can do a small call behind the recorder's back."""
        return False

    def expect(self, t: Tensor, function: str) -> None:
        """Take note that Python code is about to fill a tensor; an idle recorder may begin."""

    def begin(self) -> bool:
        """Begin to record, if idle; return whether it does."""
        return not self.is_idle

    def add(self, fills: list[Fill], law: Law) -> None:
        """Record fills, which together write the law of one call."""
        raise NotImplementedError

    def call(self, call: Call) -> Tensor:
        """Record a call that fastinit leaves to torch; return what it returns."""
        raise NotImplementedError

    def fill_keyed(self, law: Law, tensor: Tensor, key: Key | None) -> None:
        """Record a law with the numbers of a Key; None: of the recorder's seed."""
        raise NotImplementedError

    # ---- what a hook has seen ----------------------------------------------------------------

    def read(self, t: Tensor, how: str) -> None:
        """Take note that a tensor is about to be read without an operator."""

    def expose(self, t: Tensor, how: str) -> None:
        """Take note that a tensor's address gets known: it may be read or written at any time."""

    def settle(self, reader: object = None) -> None:
        """Take note that any tensor may be read now."""

    def before(self, other: threading.Thread | Future[Any] | None) -> None:
        """Another thread is about to run what this one gives it (None: a task with no future)."""

    def meanwhile(self, what: threading.Thread | Future[Any] | Tensor) -> None:
        """Take note of what another thread has started, or whose address it got to know."""

    def compiled(self) -> None:
        """Take note that torch.compile's code is about to run, which reads and writes memory."""

    def emptied(self, module: nn.Module, new: list[Tensor]) -> None:
        """Take note that a module's `to_empty` has made these tensors."""

    def keep_names(self, tensors: Iterable[Tensor]) -> None:
        """Take note that tensors are about to lose their names, by which their copies go."""

    def hold(self, module: nn.Module, name: str, value: object) -> None:
        """Take note that a module is about to get a parameter, a buffer or a child."""


told: list[Recorder] = []  # of scopes that last, in all threads


class _Local(threading.local):
    recorder: Recorder | None = None


this_thread = _Local()


def active() -> Recorder | None:
    """Return the recorder of this thread, unless it is idle."""
    recorder = this_thread.recorder
    return None if recorder is None or recorder.is_idle else recorder


def set_recorder(value: Recorder | None) -> Recorder | None:
    """Replace the recorder of this thread, and return the one before."""
    before, this_thread.recorder = this_thread.recorder, value
    return before


def modes_allow() -> bool:
    """Return whether no mode, transform or tracer is active that has to see torch's operators."""
    own = 0 if this_thread.recorder is None else this_thread.recorder.modes
    return torch_api.nobody_watches(own)
