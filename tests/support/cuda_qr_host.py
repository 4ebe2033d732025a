# SPDX-License-Identifier: BSD-3-Clause
"""Orthonormal columns on a GPU without a GPU: CPU memory stands for its memory, the kernels'
bodies, compiled for the host, for the kernels, and torch's products on the CPU for cuBLAS's.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastinit.core import geometry
from fastinit.cuda import qr as cuda_qr
from fastinit.cuda import runtime

HERE = Path(__file__).parent
HOPPER, RTX = 232448, 101376  # bytes of shared memory that a block can have


@functools.cache
def walker() -> ctypes.CDLL:
    """tests/cuda_qr_walk.cpp, compiled."""
    library = f"{tempfile.mkdtemp()}/walk.so"
    flags = "-std=c++17 -O2 -fPIC -shared -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    fma = ["-mfma"] if "fma" in _processor() else []  # or std::fma is a call
    command = [*compiler, *flags.split(), *fma, "-o", library, str(HERE / "cuda_qr_walk.cpp")]
    subprocess.run(command, check=True)
    dll = ctypes.CDLL(library)
    dll.count_bytes_stored.restype = ctypes.c_uint64
    return dll


def _processor() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().split() if info.exists() else []


class Simulation:
    """What stands in the GPU's place, and what it has seen."""

    GUARD = 64  # elements on both sides of working memory

    def __init__(self, shared: int) -> None:
        self.shared = shared
        self.order = 0  # of threads and blocks
        self.launches: list[tuple[str, tuple[int, int], int, int]] = []
        self.uploads = 0
        self.held = 0  # elements of working memory
        self._guarded: list[torch.Tensor] = []

    def run(
        self,
        step: int,
        packed: bytes,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        device: int,
    ) -> None:
        assert device == 0
        assert shared <= self.shared
        assert grid[0] < 2**31
        assert grid[1] < 2**16
        dll = walker()
        assert len(packed) == dll.size_of_arguments()
        assert dll.walk_qr(step, packed, len(packed), *grid, threads, shared, self.order) == 0
        self.launches.append((cuda_qr._STEPS[step], grid, threads, shared))

    def upload(self, data: bytes, device: int) -> torch.Tensor:
        self.uploads += 1
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def empty(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Full of not-a-number, between guards."""
        size = torch.Size(shape).numel()
        memory = torch.full((size + 2 * self.GUARD,), torch.nan, dtype=like.dtype)
        memory[: self.GUARD] = memory[-self.GUARD :] = 7
        self._guarded.append(memory)
        self.held += size
        return memory[self.GUARD : -self.GUARD].view(shape)

    def check(self) -> None:
        for memory in self._guarded:
            assert (memory[: self.GUARD] == 7).all()
            assert (memory[-self.GUARD :] == 7).all()


@contextmanager
def simulated(shared: int = HOPPER) -> Iterator[Simulation]:
    """All CPU tensors count as memory of GPU 0."""
    sim = Simulation(shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "device_of", lambda t: 0)
        patch.setattr(runtime, "shared", lambda device: sim.shared)
        patch.setattr(runtime, "run_qr", sim.run)
        patch.setattr(runtime, "upload", sim.upload)
        patch.setattr(cuda_qr, "_empty", sim.empty)
        yield sim
        sim.check()
