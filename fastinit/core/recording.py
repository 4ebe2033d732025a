# SPDX-License-Identifier: BSD-3-Clause
"""Who records the fills of this thread instead of running them."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastinit.core.fill import Fill

# ---- what the kernels can take -------------------------------------------------------------------


class Recorder(Protocol):
    """Takes what would otherwise be run at once."""

    modes: int  # how many dispatch modes it has put on torch's stack
    seed: int | None  # of the keyed stream, if that takes the place of torch's default generators

    def takes(self, t: Tensor) -> bool: ...  # whether fills of such a tensor are worth a record
    def add(self, fills: list[Fill]) -> None: ...
    # `overwrites`: all of the tensor
    def call(self, function: partial[Any], tensor: Tensor, overwrites: bool) -> None: ...
    # A function of torch.nn.init with the numbers of a Key; None: of the recorder's seed.
    def fill_keyed(
        self, function: str, tensor: Tensor, args: Any, key: Any, block: Any
    ) -> None: ...


class _Local(threading.local):
    recorder: Recorder | None = None


this_thread = _Local()


def set_recorder(value: Recorder | None) -> Recorder | None:
    """Replace the recorder of this thread; returns the one before."""
    before, this_thread.recorder = this_thread.recorder, value
    return before


def modes_allow() -> bool:
    """No mode, transform or tracer is active that would have to see torch's operators."""
    c = torch._C
    own = 0 if this_thread.recorder is None else this_thread.recorder.modes
    return (
        c._len_torch_function_stack() == 0
        and c._len_torch_dispatch_stack() == own
        and c._functorch.peek_interpreter_stack() is None
        and c._get_tracing_state() is None
        and forward_ad._current_level < 0
    )
