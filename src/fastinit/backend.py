# SPDX-License-Identifier: BSD-3-Clause
"""The way to the compiled modules: which one serves a device, with how many threads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    from fastinit import _cpu
except ImportError as error:
    raise ImportError(
        "fastinit's compiled module is missing or does not load. Install the package with "
        "`pip install .` in its source folder (a C++17 compiler is needed); from other folders "
        "make sure that no uncompiled copy of fastinit comes first in sys.path."
    ) from error

_cuda: Any = None
why_no_cuda = "not built: there was no nvcc, or FORCE_ONLY_CPU=1"
try:
    from fastinit import _cuda
except ImportError as error:
    if error.name != "fastinit._cuda":
        why_no_cuda = f"does not load: {error}"
else:
    why_no_cuda = ""
if torch.version.hip is not None:
    _cuda, why_no_cuda = None, "torch is a ROCm build"
elif _cuda is not None and torch.version.cuda is None:
    why_no_cuda = "torch is a CPU build"

MOST_INLINED = 25  # fills that travel in the arguments of a kernel
MOST_SOURCES = 8  # generators of a launch

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


def run_keyed(packed: bytes) -> None:
    """Run packed fills of the keyed stream in CPU memory."""
    global native_fills
    _cpu.run_keyed(packed, torch.get_num_threads())
    native_fills += len(packed) // _cpu.KEYED_SIZE


def orthonormalize(packed: bytes, written: bytearray) -> None:
    """Write packed matrices of CPU memory; `written` gets a byte for each that is."""
    _cpu.orthonormalize(packed, written, torch.get_num_threads())


def advance(state: int, to: int, words: int) -> None:
    """Copy a generator state between addresses and move the copy on by so many words."""
    _cpu.advance(state, to, words)


# ---- CUDA ----------------------------------------------------------------------------------------


def can_use_cuda() -> bool:
    """Whether there are kernels, and no graph is being captured, which would repeat its numbers."""
    return _cuda is not None and not torch._C._cuda_isCurrentStreamCapturing()


def refuse_capture() -> None:
    if not can_use_cuda():
        raise RuntimeError(
            "fastinit: this cannot run while a CUDA graph is captured, whose replays would have to "
            "draw other numbers each time; call the functions one by one, which torch then does"
        )


@functools.cache
def cuda_grid(device: int) -> tuple[int, int]:
    """Multiprocessors of a GPU and the threads that fit on each."""
    p = torch.cuda.get_device_properties(device)
    return p.multi_processor_count, p.max_threads_per_multi_processor


def cuda_stream(device: int) -> int:
    """The current stream's handle."""
    return int(torch._C._cuda_getCurrentRawStream(device))


@contextmanager
def on_stream(device: int, stream: int) -> Iterator[None]:
    """Launch on a stream behind what the current one was asked for; that waits for it in turn."""
    if cuda_stream(device) == stream:
        yield
        return
    current = torch.cuda.current_stream(device)
    # An ExternalStream of 0 would be some stream, not the default one.
    other = torch.cuda.default_stream(device)
    if stream != 0:
        other = torch.cuda.ExternalStream(stream, device=device)  # type: ignore[no-untyped-call]
    other.wait_stream(current)
    with torch.cuda.stream(other):
        yield
    current.wait_stream(other)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No mode sees what is done in between."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield


def cuda_upload(data: bytes, device: int) -> Tensor:
    """Bytes in device memory, by one asynchronous copy."""
    return cuda_copy(torch.frombuffer(bytearray(data), dtype=torch.uint8), device)


def cuda_copy(t: Tensor, device: int) -> Tensor:
    return t.pin_memory().to(torch.device("cuda", device), non_blocking=True)


def cuda_zeros(size: int, device: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", device))


def _launch(kernel: Callable[..., None], device: int, *arguments: Any) -> None:
    """On the device's current stream."""
    stream = cuda_stream(device)
    if torch._C._cuda_getDevice() == device:
        kernel(*arguments, device, stream)
    else:
        with torch.cuda.device(device):
            kernel(*arguments, device, stream)


def cuda_run(
    fills: bytes,
    table: int,
    count: int,
    tiles: int,
    sources: bytes,
    progress: int,
    device: int,
) -> None:
    """Launch `count` packed fills, given as bytes or an address, on the current stream."""
    global native_fills
    _launch(_cuda.run, device, fills, table, count, tiles, sources, progress)
    native_fills += count


def cuda_run_keyed(fills: bytes, table: int, count: int, tiles: int, device: int) -> None:
    """Launch packed fills of the keyed stream, likewise."""
    global native_fills
    _launch(_cuda.run_keyed, device, fills, table, count, tiles)
    native_fills += count


@functools.cache
def cuda_shared(device: int) -> int:
    """Bytes of shared memory that a block can ask for."""
    return int(_cuda.most_shared(device))


def cuda_run_qr(
    step: int, packed: bytes, grid: tuple[int, int], threads: int, shared: int, device: int
) -> None:
    """Launch one step towards orthonormal columns on the current stream; see csrc/cuda/qr.h."""
    _launch(_cuda.run_qr, device, step, packed, *grid, threads, shared)
