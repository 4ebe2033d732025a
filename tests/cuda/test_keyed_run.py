# SPDX-License-Identifier: BSD-3-Clause
"""Around the keyed stream's kernel: sparse and orthogonal matrices, other dtypes, memory, devices.
The kernel's body runs on the host."""

from __future__ import annotations

import math

import pytest
import torch

from fastinit.core import geometry
from fastinit.cpu import keyed as cpu_keyed
from fastinit.cuda import keyed as cuda_keyed
from fastinit.cuda import qr as cuda_qr
from tests.cuda.test_keyed import RANDOM, each_dtype, everything, fresh, twin, work_of
from tests.support.compare import BF16, F16, F32, F64, storage_bits
from tests.support.cuda_keyed_host import simulated


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    calls = RANDOM[:2] if dtype.is_floating_point else [("eye_", ())]
    for call in calls:
        for found in (torch.zeros(30, 41, dtype=dtype), torch.zeros(41, 30, dtype=dtype).t()):
            expected = twin(found)
            cpu_keyed.run([work_of(call, expected, (50, 60), (2, 3))])
            with simulated() as sim:
                cuda_keyed.run([work_of(call, found, (50, 60), (2, 3))])
            assert torch.equal(storage_bits(expected), storage_bits(found))  # type: ignore[arg-type]
            assert len(sim.launches) == 1


@each_dtype
def test_sparse(dtype: torch.dtype) -> None:
    cases = [
        ((40, 30), (0, 0), (40, 30)),
        ((40, 30), (3, 7), (30, 11)),
        ((5, 400), (0, 0), (5, 400)),
    ]
    for whole, offset, shape in cases:
        for transposed in (False, True):
            results = []
            for way in (cpu_keyed, cuda_keyed):
                t = fresh(*(shape[::-1] if transposed else shape), dtype=dtype)
                t = t.t() if transposed else t
                with simulated() as sim:
                    way.run([work_of(("sparse_", (0.3, 0.5)), t, whole, offset)])
                results.append(t)
            assert torch.equal(*results)
            assert (results[0] == 0).any()
            assert len(sim.launches) == 1


@each_dtype
def test_orthogonal(dtype: torch.dtype) -> None:
    """The same reflectors; sums in another order."""
    eps = torch.finfo(dtype).eps if dtype in (BF16, F16) else {F32: 2.0**-24, F64: 2.0**-53}[dtype]
    for shape in [(8, 8), (3, 20), (100, 64), (64, 150), (200, 160), (1, 5), (6, 4, 3)]:
        expected, found = fresh(*shape, dtype=dtype), fresh(*shape, dtype=dtype)
        cpu_keyed.run([work_of(("orthogonal_", (1.5,)), expected)])
        with simulated() as sim:
            cuda_keyed.run([work_of(("orthogonal_", (1.5,)), found)])
        n = min(shape[0], math.prod(shape[1:]))
        error = (expected.double() - found.double()).reshape(shape[0], -1).norm()
        assert error <= 10 * eps * n * (1 + n**0.5 / 4), (shape, error)
        assert len(sim.launches) == 1


def test_orthogonal_batched_and_parts() -> None:
    for name, whole, offset, shape in (
        ("orthogonal_batched_", (5, 20, 30), (0, 0, 0), (5, 20, 30)),
        ("orthogonal_batched_", (5, 30, 20), (1, 3, 2), (3, 8, 9)),
        ("orthogonal_", (40, 50), (10, 0), (11, 50)),
    ):
        expected, found = fresh(*shape), fresh(*shape)
        cpu_keyed.run([work_of((name, (1.0,)), expected, whole, offset)])
        with simulated():
            cuda_keyed.run([work_of((name, (1.0,)), found, whole, offset)])
        assert (expected - found).abs().max() < 2e-6


def test_everything_is_one_launch_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for most, launches in ((1 << 30, 1), (1, 5), (5000, 2)):
        monkeypatch.setattr(cuda_qr, "MOST_MEMORY", most)
        with simulated() as sim:
            works = everything()
            cuda_keyed.run(works)
            results.append([storage_bits(work.tensor) for work in works])
            assert len(sim.launches) == launches
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))  # type: ignore[arg-type]


def test_one_launch_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, found = everything(), everything()
    with simulated():
        cuda_keyed.run(expected)
    with simulated() as sim:
        device = {work.tensor.data_ptr(): i % 3 for i, work in enumerate(found)}
        with monkeypatch.context() as patch:  # undone before the simulation is
            patch.setattr(geometry, "device_of", lambda t: device.get(t.data_ptr(), 0))
            patch.setattr(cuda_qr, "orthonormalize", lambda jobs, direct: None)
            cuda_keyed.run(found)
        assert sorted(launch[0] for launch in sim.launches) == [0, 1, 2]
    for a, b in zip(expected, found):
        if a.law.op != "orthogonal":
            assert torch.equal(storage_bits(a.tensor), storage_bits(b.tensor))  # type: ignore[arg-type]


def test_versions_are_the_callers() -> None:
    for work in everything()[:-1]:
        before = work.tensor._version
        with simulated():
            cuda_keyed.run([work])
        assert work.tensor._version == before, work.law


def test_inference_tensors_and_parameters() -> None:
    with torch.inference_mode():
        t = fresh(20, 30)
    p = torch.nn.Parameter(fresh(20, 30))
    with simulated():
        for call in (RANDOM[1], ("sparse_", (0.5,)), ("orthogonal_", (1.0,))):
            cuda_keyed.run([work_of(call, t), work_of(call, p)])
            assert torch.equal(t, p)
    assert p.requires_grad


def test_no_kernels_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated() as sim:
        with monkeypatch.context() as patch:
            patch.setattr("fastinit.core.kernels.can_use_cuda", lambda: False)
            with pytest.raises(RuntimeError, match="graph"):
                cuda_keyed.run([work_of(RANDOM[0], fresh(10))])
        assert not sim.launches
