# SPDX-License-Identifier: BSD-3-Clause
"""The compiled modules: loading them, and the calls that run on the CPU."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from fastinit.core import torch_api

try:
    from fastinit import _cpu as _cpu
except ImportError as error:
    raise ImportError(
        "fastinit's compiled module is missing or does not load. Install the package with "
        "`pip install .` in its source folder (a C++17 compiler is needed); from other folders "
        "make sure that no uncompiled copy of fastinit comes first in sys.path."
    ) from error

_cuda: Any = None
why_no_cuda = "not built: there was no nvcc, or FORCE_ONLY_CPU=1"
try:
    import fastinit._cuda as _cuda
except ModuleNotFoundError:
    pass
except ImportError as error:
    why_no_cuda = f"does not load: {error}"
else:
    why_no_cuda = ""
if torch.version.hip is not None:
    _cuda, why_no_cuda = None, "torch is a ROCm build"
elif _cuda is not None and torch.version.cuda is None:
    why_no_cuda = "torch is a CPU build"


def agree(module: ModuleType | None, name: str, mine: object, theirs: object) -> None:
    """Refuse a module that was built from other sources: it would write wrong bytes."""
    if module is not None and theirs != mine:
        raise ImportError(
            f"{module.__file__} was built from other sources than this copy of fastinit: its "
            f"{name} is {theirs}, not {mine}. Build it again: run `pip install .` in the source "
            "folder."
        )


def packer(module: ModuleType | None, name: str, fields: str) -> struct.Struct:
    """Return what packs a descriptor, whose fields have to be those that the module knows.

    `fields`: codes of the module `struct` and names, as in "Q address, 6d p, 7x unused".
    """
    agree(module, name, fields, getattr(module, "LAYOUTS", {}).get(name))
    return struct.Struct("<" + "".join(field.split()[0] for field in fields.split(", ")))


FAMILIES = ("run_fill", "run_keyed", "run_qr")  # what both modules do
# What each has besides, all of which some of our files use.
_ONLY_CPU = (
    *("run_trunc", "run_pointwise", "advance", "jumps", "target", "targets"),
    *("KEYED_SIZE", "ARITHMETIC"),
)
_ONLY_CUDA = ("most_shared", "why_no_driver", "STEPS", "ARCHITECTURES")
# The code of each dtype and operator in descriptors.
DTYPES: dict[str, int] = getattr(_cpu, "DTYPES", {})
OPS: dict[str, int] = getattr(_cpu, "OPS", {})
ARITHMETIC: dict[str, int] = getattr(_cpu, "ARITHMETIC", {})
for _module in (_cpu, _cuda):  # an old one has none
    agree(_module, "DTYPES", DTYPES, getattr(_module, "DTYPES", None))
    agree(_module, "OPS", OPS, getattr(_module, "OPS", None))
    _needed = (*FAMILIES, "FILL_SIZE", "COMPILER", *(_ONLY_CPU if _module is _cpu else _ONLY_CUDA))
    _built = tuple(name for name in _needed if hasattr(_module, name))
    agree(_module, "set of names", _needed, _built)


native_fills = 0  # how many fills the compiled modules have done in this process


def run(packed: bytes, states: list[int], words_drawn: list[int]) -> None:
    """Run packed fills of CPU memory; `states` are addresses of generator states, advanced."""
    global native_fills
    _cpu.run_fill(packed, states, words_drawn, torch.get_num_threads())
    native_fills += len(packed) // _cpu.FILL_SIZE


def run_trunc(packed: bytes, state: int) -> int:
    """Run a trunc_normal fill; return how many times torch would have drawn the whole tensor."""
    global native_fills
    rounds = _cpu.run_trunc(packed, state, torch.get_num_threads())
    native_fills += 1
    return rounds


def run_keyed(packed: bytes) -> None:
    """Run packed fills of the keyed stream in CPU memory."""
    global native_fills
    _cpu.run_keyed(packed, torch.get_num_threads())
    native_fills += len(packed) // _cpu.KEYED_SIZE


def run_pointwise(packed: bytes) -> None:
    """Do packed arithmetic to CPU memory."""
    _cpu.run_pointwise(packed, torch.get_num_threads())


def orthonormalize(packed: bytes, written: bytearray) -> None:
    """Write packed matrices of CPU memory; `written` gets a byte for each that is."""
    _cpu.run_qr(packed, written, torch.get_num_threads())


def advance(state: int, to: int, words: int) -> None:
    """Copy a generator state between addresses and move the copy on by so many words."""
    _cpu.advance(state, to, words)


# ---- CUDA ----------------------------------------------------------------------------------------


def can_use_cuda() -> bool:
    """Return whether there are kernels, and no CUDA graph is recorded to repeat their numbers."""
    return _cuda is not None and not torch_api.is_capturing()


def refuse_in_graph() -> None:
    """Raise RuntimeError if a CUDA graph is being recorded."""
    if not can_use_cuda():
        raise RuntimeError(
            "fastinit: this cannot run while a CUDA graph is captured, whose replays would have to "
            "draw other numbers each time; call the functions one by one, which torch then does"
        )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hide what is done in between from all modes."""
    with torch_api.DisableTorchFunction(), torch_api.DisableTorchDispatch():
        yield
