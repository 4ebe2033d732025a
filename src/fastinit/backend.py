# SPDX-License-Identifier: BSD-3-Clause
"""The way to the compiled modules: which one serves a device, with how many threads."""

from __future__ import annotations

import torch

try:
    from fastinit import _cpu
except ImportError as error:
    raise ImportError(
        "fastinit's compiled module is missing or does not load. Install the package with "
        "`pip install .` in its source folder (a C++17 compiler is needed); from other folders "
        "make sure that no uncompiled copy of fastinit comes first in sys.path."
    ) from error

native_fills = 0  # how many fills the compiled modules have done in this process


def run(packed: bytes, states: list[int], words_drawn: list[int]) -> None:
    """Run packed fills of CPU memory; `states` are addresses of generator states, advanced."""
    global native_fills
    _cpu.run(packed, states, words_drawn, torch.get_num_threads())
    native_fills += len(packed) // _cpu.FILL_SIZE


def run_trunc(packed: bytes, state: int) -> int:
    """Run one trunc_normal fill; how many times torch would have drawn the whole tensor."""
    global native_fills
    rounds = _cpu.run_trunc(packed, state, torch.get_num_threads())
    native_fills += 1
    return rounds


def advance(state: int, to: int, words: int) -> None:
    """Copy a generator state between addresses and move the copy on by so many words."""
    _cpu.advance(state, to, words)
