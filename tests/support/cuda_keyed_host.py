# SPDX-License-Identifier: BSD-3-Clause
"""The keyed stream on a GPU without a GPU: CPU memory stands for its memory, and for the kernel its
body, compiled for the host.
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

import numpy as np
import pytest
import torch

from fastinit.core import geometry, kernels
from fastinit.cuda import keyed as cuda_keyed
from fastinit.cuda import qr as cuda_qr
from fastinit.cuda import runtime
from tests.support import cuda_qr_host

HERE = Path(__file__).parent


@functools.cache
def walker() -> ctypes.CDLL:
    """tests/cuda_keyed_walk.cpp, compiled."""
    library = f"{tempfile.mkdtemp()}/walk.so"
    flags = "-std=c++17 -O2 -fPIC -shared -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    fma = ["-mfma"] if "fma" in cuda_qr_host._processor() else []  # or std::fma is a call
    command = [*compiler, *flags.split(), *fma, "-o", library, str(HERE / "cuda_keyed_walk.cpp")]
    subprocess.run(command, check=True)
    dll = ctypes.CDLL(library)
    dll.count_strays.restype = dll.count_vectors.restype = ctypes.c_uint64
    return dll


class Simulation:
    """What stands in the GPUs' place, and what it has seen."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, int]] = []  # device, fills
        self.units: list[int] = []  # of each fill
        self.uploads = self.copies = 0
        self.backwards = False
        self.blocks = 3  # of the grid
        self.factors = cuda_qr_host.Simulation(cuda_qr_host.HOPPER)

    def watch(self, t: torch.Tensor) -> np.ndarray:
        """How often each byte of a tensor's storage is written from here on."""
        storage = t.untyped_storage()
        counts = np.zeros(storage.nbytes(), dtype=np.uint8)
        walker().watch(
            ctypes.c_uint64(storage.data_ptr()),
            ctypes.c_uint64(storage.nbytes()),
            counts.ctypes.data_as(ctypes.c_void_p),
        )
        return counts

    def run(self, fills: bytes, table: int, count: int, tiles: int, device: int) -> None:
        dll = walker()
        size = dll.size_of_tiles()
        assert len(fills) == (0 if table else count * size)
        assert len(fills) <= dll.most_inlined() * size
        data = ctypes.string_at(table, count * size) if table else fills
        held = ctypes.create_string_buffer(data, max(len(data), 1))
        status = dll.walk_keyed(
            held,
            ctypes.c_uint32(count),
            ctypes.c_uint32(tiles),
            ctypes.c_uint32(self.blocks),
            int(self.backwards),
        )
        assert status == 0
        self.launches.append((device, count))
        for i in range(count):
            self.units.append(cuda_keyed._TILES.unpack_from(data, i * size)[3])
        kernels.native_fills += count

    def upload(self, data: bytes, device: int) -> torch.Tensor:
        self.uploads += 1
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def copy(self, t: torch.Tensor, device: int) -> torch.Tensor:
        self.copies += 1
        return t.clone()


@contextmanager
def simulated() -> Iterator[Simulation]:
    """All CPU tensors count as memory of GPU 0."""
    sim = Simulation()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "device_of", lambda t: 0)
        patch.setattr(kernels, "can_use_cuda", lambda: True)
        patch.setattr(runtime, "run_keyed", sim.run)
        patch.setattr(runtime, "upload", sim.upload)
        patch.setattr(runtime, "copy", sim.copy)
        patch.setattr(runtime, "shared", lambda device: cuda_qr_host.HOPPER)
        patch.setattr(runtime, "run_qr", sim.factors.run)
        patch.setattr(cuda_qr, "_empty", sim.factors.empty)
        walker().forget()
        try:
            yield sim
            sim.factors.check()
            assert walker().count_strays() == 0, "a store out of place"
        finally:
            walker().forget()
