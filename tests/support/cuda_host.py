# SPDX-License-Identifier: BSD-3-Clause
"""A GPU without a GPU: CPU memory stands for its memory, and for the kernel its body, compiled for
the host. What is tested is everything but the launch and the hardware's sine and cosine.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fastinit import probe
from fastinit.core import fill as fill_
from fastinit.core import geometry, kernels, source
from fastinit.cuda import fills as cuda_fills
from fastinit.cuda import runtime
from tests.support import cuda_qr_host
from tests.support.cuda_model import Gpu

HERE = Path(__file__).parent


@functools.cache
def walker() -> ctypes.CDLL:
    """tests/cuda_walk.cpp, compiled."""
    folder = tempfile.mkdtemp()
    library = f"{folder}/walk.so"
    flags = "-std=c++17 -O2 -fPIC -shared -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, *flags.split(), "-o", library, str(HERE / "cuda_walk.cpp")]
    subprocess.run(command, check=True)
    dll = ctypes.CDLL(library)
    dll.count_strays.restype = dll.count_vectors.restype = ctypes.c_uint64
    return dll


class Generator(torch.Generator):
    """Stands for a CUDA generator; for torch it is one of the CPU.

    Dispatch modes and kernels are given another object of the same generator: `find` gives ours.
    """

    known: ClassVar[weakref.WeakValueDictionary[int, Generator]] = weakref.WeakValueDictionary()

    def __new__(cls, *args: Any, **kwargs: Any) -> Generator:
        return super().__new__(cls)

    def __init__(self, seed: int = 0, offset: int = 0) -> None:
        self.seed, self.offset = seed, offset  # type: ignore[method-assign, assignment]
        self.known[self._cdata] = self

    @classmethod
    def find(cls, generator: Any) -> Generator | None:
        return cls.known.get(generator._cdata) if isinstance(generator, torch.Generator) else None

    def initial_seed(self) -> int:
        return self.seed  # type: ignore[return-value]

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset


class Simulation:
    """What the fixtures below put in the GPU's place, and what it has seen."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.default = Generator(seed=1234, offset=8)
        self.launches: list[int] = []  # fills of each
        self.copies = 0  # to device memory
        self.factors = cuda_qr_host.Simulation(cuda_qr_host.HOPPER)
        self.backwards = False
        self._counts: list[tuple[torch.Tensor, np.ndarray]] = []

    def watch(self, t: torch.Tensor) -> torch.Tensor:
        """Count the stores to all of a tensor's storage from here on."""
        storage = t.untyped_storage()
        counts = np.zeros(storage.nbytes(), dtype=np.uint8)
        walker().watch(
            ctypes.c_uint64(storage.data_ptr()),
            ctypes.c_uint64(storage.nbytes()),
            counts.ctypes.data_as(ctypes.c_void_p),
        )
        self._counts.append((t, counts))
        return t

    def stores(self, t: torch.Tensor) -> np.ndarray:
        """How often each byte of a watched tensor's storage was written."""
        return next(counts for tensor, counts in self._counts if tensor is t)

    def run(
        self,
        fills: bytes,
        table: int,
        count: int,
        tiles: int,
        sources: bytes,
        progress: int,
        device: int,
    ) -> None:
        assert device == 0
        dll = walker()
        assert len(fills) in (0, count * dll.size_of_fill())
        held = ctypes.create_string_buffer(fills, max(len(fills), 1))
        status = dll.walk(
            ctypes.c_void_p(table or ctypes.addressof(held)),
            ctypes.c_uint32(count),
            ctypes.c_uint32(tiles),
            sources or bytes(16),
            ctypes.c_void_p(progress or None),
            int(self.backwards),
        )
        assert status == 0
        self.launches.append(count)
        kernels.native_fills += count

    def upload(self, data: bytes, device: int) -> torch.Tensor:
        self.copies += 1
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def copy(self, t: torch.Tensor, device: int) -> torch.Tensor:
        self.copies += 1
        return t.clone()


@contextmanager
def simulated(gpu: Gpu) -> Iterator[Simulation]:
    """All CPU tensors count as memory of GPU 0, except for bfloat16 masks of sparse_."""
    sim = Simulation(gpu)
    resolve, supported, verdict = source.resolve, source.is_supported, probe.verdict

    def resolve_here(generator: Any, device: int) -> Any:
        if generator is None and device >= 0:
            return sim.default
        return Generator.find(generator) or resolve(generator, device)

    def is_supported(generator: Any, device: int) -> bool:
        found = Generator.find(generator) is not None
        return found or supported(generator, -1 if device < 0 else 99)

    def draw_mask(fill: fill_.Fill) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(geometry, "device_of", lambda t: -1)
            return masks(fill)

    def verdict_here(op: str, dtype: torch.dtype, layout: str, device: int = -1) -> int | None:
        if device < 0:
            return verdict(op, dtype, layout)
        return 0 if dtype in geometry.DTYPES else None

    masks = cuda_fills._draw_mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "device_of", lambda t: 0)
        patch.setattr(geometry, "MIN_CUDA", 0)
        patch.setattr(geometry, "MIN_NATIVE", 0)
        patch.setattr(runtime, "grid_of", lambda device: (gpu.processors, gpu.threads))
        patch.setattr(kernels, "can_use_cuda", lambda: True)
        patch.setattr(runtime, "stream_of", lambda device: 7)
        patch.setattr(runtime, "run", sim.run)
        patch.setattr(runtime, "upload", sim.upload)
        patch.setattr(runtime, "copy", sim.copy)
        patch.setattr(runtime, "shared", lambda device: cuda_qr_host.HOPPER)
        patch.setattr(runtime, "run_qr", sim.factors.run)
        patch.setattr(runtime, "zeros", lambda n, device: torch.zeros(n, dtype=torch.uint8))
        patch.setattr(source, "resolve", resolve_here)
        patch.setattr(source, "is_supported", is_supported)
        patch.setattr(probe, "verdict", verdict_here)
        patch.setattr(cuda_fills, "_draw_mask", draw_mask)
        cuda_fills.grid.cache_clear()
        walker().forget()
        try:
            yield sim
        finally:
            cuda_fills.grid.cache_clear()
            assert walker().count_strays() == 0 or not sim._counts, "a store out of place"
            walker().forget()
