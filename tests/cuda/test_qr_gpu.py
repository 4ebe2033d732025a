# SPDX-License-Identifier: BSD-3-Clause
"""On a GPU: orthonormal columns against torch.linalg.qr and a product of reflectors in float64.

`pytest -m cuda`; FASTINIT_TEST_DEVICE=cpu makes it a dry run with the kernels' bodies on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest
import torch

from fastinit.cuda import qr as cuda_qr
from fastinit.cuda.qr import Job, orthonormalize
from tests.cuda.test_qr import LARGE, SMALL, assert_close, pack, product_of_reflectors, q_of, random
from tests.support.compare import BF16, F16, F32, F64
from tests.support.cuda_qr_host import simulated

pytestmark = pytest.mark.cuda

DEVICE = os.environ.get("FASTINIT_TEST_DEVICE", "cuda")
HERE = torch.device("cuda:0" if DEVICE == "cuda" else DEVICE)
ON_GPU = HERE.type == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a dry run on the CPU")


@pytest.fixture(autouse=True)
def here() -> Iterator[None]:
    if not ON_GPU:
        with simulated():
            yield
        return
    torch.cuda.init()
    with torch.cuda.device(HERE):
        yield
        torch.cuda.synchronize()


def jobs_of(
    matrices: Sequence[torch.Tensor], direct: bool = False, dtype: torch.dtype | None = None
) -> list[Job]:
    return [
        Job(
            (pack(a) if direct else a).to(HERE),
            torch.full(a.shape, torch.nan, dtype=dtype or a.dtype, device=HERE),
            *a.shape,
            1.0,
        )
        for a in matrices
    ]


def run(matrices: Sequence[torch.Tensor], direct: bool = False) -> list[torch.Tensor]:
    jobs = jobs_of(matrices, direct)
    orthonormalize(jobs, direct)
    return [job.out for job in jobs]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_small_matrices(dtype: torch.dtype) -> None:
    matrices = [random(*shape, dtype=dtype) for shape in SMALL]
    for out, a in zip(run(matrices), matrices):
        assert_close(out.cpu(), q_of(a.double()))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_matrices(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrices = [random(*shape, dtype=dtype, seed=i) for i in range(3)]
    for out, a in zip(run(matrices), matrices):
        assert_close(out.cpu(), q_of(a.double()))


@needs_gpu
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "shape", [(2048, 2048), (3000, 5000), (9000, 300), (100000, 3), (1, 1000000)], ids=str
)
def test_huge_matrices(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Beyond shared memory, however narrow a panel is: 9000 rows stream."""
    a = torch.randn(shape, dtype=dtype, device=HERE)
    out = torch.empty_like(a)
    orthonormalize([Job(a, out, *shape, 1.0)])
    assert_close(out, q_of(a.double()))


@needs_gpu
@pytest.mark.parametrize(("n", "count"), [(64, 50), (128, 20), (160, 20), (512, 8), (2048, 2)])
def test_float32_is_as_exact_as_torch_is(n: int, count: int) -> None:
    a = torch.randn(count, n, n, device=HERE)
    out = torch.empty_like(a)
    orthonormalize([Job(x, y, n, n, 1.0) for x, y in zip(a, out)])
    exact, theirs = q_of(a.double()), q_of(a)

    def defect(q: torch.Tensor) -> float:
        square = q.double().mT @ q.double()
        return (square - torch.eye(n, device=HERE)).flatten(1).norm(dim=1).mean().item()

    assert defect(out) < 1e-5 * n**0.5
    assert defect(out) <= 1.05 * defect(theirs)
    errors = [(q.double() - exact).norm(dim=1).median().item() for q in (out, theirs)]
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_direct(dtype: torch.dtype) -> None:
    matrices = [random(*shape, dtype=dtype) for shape in SMALL + LARGE]
    eps = 2.0**-24 if dtype == F32 else 2.0**-53
    for out, a in zip(run(matrices, direct=True), matrices):
        error = (out.cpu().double() - product_of_reflectors(a)).norm()
        assert error <= 4 * eps * min(a.shape) * (1 + min(a.shape) ** 0.5 / 4), a.shape


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_gain_and_rounding(dtype: torch.dtype) -> None:
    shapes = [(8, 8), (20, 45), (100, 40), (300, 150), (150, 300)]
    matrices = [random(*shape) for shape in shapes]
    exact = run(matrices)
    jobs = [job._replace(gain=2**0.5) for job in jobs_of(matrices, dtype=dtype)]
    orthonormalize(jobs)
    for job, q in zip(jobs, exact):
        assert torch.equal(job.out, q.mul(2**0.5).to(dtype))


def test_in_place_and_through_a_table() -> None:
    for shape in ((6, 9), (140, 131)):
        matrices = [random(*shape, seed=i) for i in range(cuda_qr.MOST_INLINED + 5)]
        expected = run(matrices)
        jobs = [job._replace(out=job.gaussian.view(shape)) for job in jobs_of(matrices)]
        orthonormalize(jobs)
        assert all(torch.equal(job.out, q) for job, q in zip(jobs, expected))


@needs_gpu
def test_it_does_not_wait_and_keeps_its_stream() -> None:
    """On another stream, behind what that is busy with, with more matrices than are inlined."""
    matrices = [random(200, 150, seed=i) for i in range(100)] + [random(30, 20)] * 120
    expected = run(matrices)
    jobs = jobs_of(matrices)
    numbers = [job.gaussian.clone() for job in jobs]
    for job in jobs:
        job.gaussian.fill_(torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        for job, x in zip(jobs, numbers):
            job.gaussian.copy_(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            orthonormalize(jobs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not stream.query()
    stream.synchronize()
    assert all(torch.equal(job.out, q) for job, q in zip(jobs, expected))


@needs_gpu
def test_memory_is_what_is_counted() -> None:
    jobs = jobs_of([random(600, 500, seed=i) for i in range(8)])
    orthonormalize(jobs)  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    orthonormalize(jobs)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 8 * cuda_qr.working_bytes(600, 500, 4) + 8192


@needs_gpu
def test_reduced_precision_of_products_is_not_used() -> None:
    a = random(500, 400)
    (exact,) = run([a])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        (again,) = run([a])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(exact, again)
