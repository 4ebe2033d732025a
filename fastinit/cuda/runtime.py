# SPDX-License-Identifier: BSD-3-Clause
"""Streams, memory and launches of the compiled module for GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastinit.core import kernels, torch_api

MOST_SOURCES = 8  # generators of a launch


@functools.cache
def grid_of(device: int) -> tuple[int, int]:
    """Return the multiprocessors of a GPU and the threads that fit on each."""
    p = torch.cuda.get_device_properties(device)
    return p.multi_processor_count, p.max_threads_per_multi_processor


def stream_of(device: int) -> int:
    """Return the handle of the current stream."""
    return torch_api.current_stream(device)


@contextmanager
def on_stream(device: int, stream: int) -> Iterator[None]:
    """Launch on a stream behind the current one, which then waits for it."""
    if stream_of(device) == stream:
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


def upload(data: bytes, device: int) -> Tensor:
    """Copy bytes to device memory, asynchronously."""
    return copy(torch.frombuffer(bytearray(data), dtype=torch.uint8), device)


def copy(t: Tensor, device: int) -> Tensor:
    return t.pin_memory().to(torch.device("cuda", device), non_blocking=True)


def zeros(size: int, device: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", device))


def _launch(kernel: Callable[..., None], device: int, *arguments: Any) -> None:
    """Launch a kernel on the device's current stream."""
    stream = stream_of(device)
    if torch_api.current_device() == device:
        kernel(*arguments, device, stream)
    else:
        with torch.cuda.device(device):
            kernel(*arguments, device, stream)


def run(
    fills: bytes,
    table: int,
    count: int,
    tiles: int,
    sources: bytes,
    progress: int,
    device: int,
) -> None:
    """Launch `count` packed fills, given as bytes or an address, on the current stream."""
    _launch(kernels._cuda.run_fill, device, fills, table, count, tiles, sources, progress)
    kernels.native_fills += count


def run_keyed(fills: bytes, table: int, count: int, tiles: int, device: int) -> None:
    """Launch packed fills of the keyed stream, likewise."""
    _launch(kernels._cuda.run_keyed, device, fills, table, count, tiles)
    kernels.native_fills += count


@functools.cache
def shared(device: int) -> int:
    """Return how many bytes of shared memory a block can ask for."""
    return int(kernels._cuda.most_shared(device))


def run_qr(
    step: int, packed: bytes, grid: tuple[int, int], threads: int, shared: int, device: int
) -> None:
    """Launch one step towards orthonormal columns on the current stream: csrc/cuda/qr/launch.h."""
    _launch(kernels._cuda.run_qr, device, step, packed, *grid, threads, shared)
