# SPDX-License-Identifier: BSD-3-Clause
"""Orthonormal columns on a GPU, simulated and real: against torch.linalg.qr in float64 and, for
the direct way, a product of reflectors in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastinit.cuda import qr as cuda_qr
from fastinit.cuda.qr import Job, orthonormalize
from tests.support.compare import BF16, F16, F32, F64
from tests.support.cuda_gpu import HERE, ON_GPU
from tests.support.cuda_qr_host import HOPPER, RTX, Simulation, simulated, walker
from tests.support.marks import slow

CPU = torch.device("cpu")
LITTLE = 36000  # bytes of shared memory, so that small matrices go the large way

SMALL = [  # around groups of 2 and 4 columns, 8 and 32 lanes, classes of threads
    (1, 1), (1, 2), (2, 1), (1, 40), (40, 1), (3, 5), (8, 8), (9, 7), (16, 16), (17, 16), (16, 17),
    (64, 16), (65, 16), (31, 33), (32, 32), (33, 32), (40, 300), (300, 4), (700, 5), (64, 64),
    (65, 63), (127, 128), (128, 128), (129, 128), (128, 200), (2500, 20),
]  # fmt: skip
LARGE = [  # around tiles of 32, panels of 8 to 32, blocks of 32, 64 and 128
    (130, 130), (129, 129), (129, 150), (161, 160), (200, 129), (383, 383), (384, 384), (500, 385),
    (400, 700), (1000, 130),
]  # fmt: skip


def q_of(a: torch.Tensor) -> torch.Tensor:
    """Q of the factorisation with positive diagonal of R, as torch.nn.init.orthogonal_ has it."""
    tall = a.mT if a.shape[-2] < a.shape[-1] else a
    q, r = torch.linalg.qr(tall)
    q = q * torch.diagonal(r, dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q.mT if a.shape[-2] < a.shape[-1] else q


def pack(a: torch.Tensor) -> torch.Tensor:
    """The lower trapezoid of a matrix, transposed if it is wide, row after row."""
    tall = a.mT if a.shape[0] < a.shape[1] else a
    return torch.cat([row[: i + 1] for i, row in enumerate(tall)])


def product_of_reflectors(a: torch.Tensor) -> torch.Tensor:
    """Stewart's: reflector k maps column k of the lower trapezoid to the axis."""
    x = a.double().numpy()
    x = x.T if x.shape[0] < x.shape[1] else x
    m, n = x.shape
    q, signs = np.eye(m, n), np.empty(n)
    for k in reversed(range(n)):
        v = x[k:, k].copy()
        beta = -np.copysign(np.linalg.norm(v), v[0])
        v[0] -= beta
        signs[k] = np.sign(beta)
        q[k:] -= 2 * np.outer(v, v @ q[k:]) / (v @ v)
    q = torch.from_numpy(q * signs)
    return q.mT if a.shape[0] < a.shape[1] else q


def run(
    matrices: Sequence[torch.Tensor],
    direct: bool = False,
    dtype: torch.dtype | None = None,
    gain: float = 1.0,
    in_place: bool = False,
    device: torch.device = CPU,
) -> list[torch.Tensor]:
    """The results, between guards; simulated kernels write every byte of them once."""
    jobs, held = [], []
    for a in matrices:
        rows, cols = a.shape
        given = (pack(a) if direct else a.clone().contiguous()).to(device)
        memory = torch.full((rows * cols + 128,), 5.0, dtype=dtype or a.dtype, device=device)
        out = memory[64:-64].view(rows, cols)
        if in_place:
            assert not direct
            given = out.view(a.dtype) if memory.dtype == a.dtype else given
            given.copy_(a)
        held.append(memory)
        jobs.append(Job(given, out, rows, cols, gain))
    walker().count_bytes_stored()
    orthonormalize(jobs, direct)
    written = sum(j.out.nbytes for j in jobs)
    assert device.type == "cuda" or walker().count_bytes_stored() == written
    for memory in held:
        assert (memory[:64] == 5).all()
        assert (memory[-64:] == 5).all()
    return [job.out.cpu() for job in jobs]


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.cuda)])
def here(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where matrices are; in a dry run the simulation stands for the real GPU too."""
    if request.param == "hardware" and not ON_GPU:
        pytest.skip("a dry run on the CPU")
    if request.param == "simulated" or not ON_GPU:
        with simulated():
            yield CPU
        return
    torch.cuda.init()
    with torch.cuda.device(HERE):
        yield HERE
        torch.cuda.synchronize()


only_hardware = pytest.mark.parametrize(
    "here", [pytest.param("hardware", marks=pytest.mark.cuda)], indirect=True
)


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * shape[0] + shape[-1])
    return torch.randn(shape, dtype=dtype, generator=g)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Wherever it comes from: the last columns of square matrices depend on the numbers most."""
    n = min(out.shape)
    eps = torch.finfo(out.dtype).eps if out.dtype == F64 else 2.0**-24
    tall = (out.double() - expected).reshape(out.shape)
    tall = tall.mT if out.shape[0] < out.shape[1] else tall
    errors = tall.norm(dim=0)
    assert errors.median() <= 20 * eps * (1 + n**0.5 / 4)
    assert errors.max() <= 2000 * eps * n**0.5


# ---- the same Q ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shared", [HOPPER, *slow([RTX]), LITTLE])
def test_small_matrices_in_one_call(shared: int, dtype: torch.dtype) -> None:
    matrices = [random(*shape, dtype=dtype) for shape in SMALL]
    with simulated(shared) as sim:
        for out, a in zip(run(matrices), matrices):
            assert_close(out, q_of(a.double()))
    if shared == HOPPER and dtype == F32:
        assert {step for step, *_ in sim.launches} == {"small"}
        assert len(sim.launches) <= 12


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shared", [LITTLE, *slow([HOPPER])])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_matrices(shape: tuple[int, int], shared: int, dtype: torch.dtype) -> None:
    a = random(*shape, dtype=dtype)
    with simulated(shared) as sim:
        (out,) = run([a])
        assert_close(out, q_of(a.double()))
        assert "small" not in {step for step, *_ in sim.launches}


@pytest.mark.slow
def test_the_widest_blocks() -> None:
    a = random(1550, 1540)
    with simulated() as sim:
        (out,) = run([a])
        assert_close(out, q_of(a.double()))
    assert max(shared for step, _, _, shared in sim.launches if step == "triangle") == 66048


def test_very_tall_and_very_wide() -> None:
    with simulated():
        for a in (random(60000, 3), random(2, 100001), random(70001, 1)):
            (out,) = run([a])
            assert_close(out, q_of(a.double()))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n", [1, 4, 37])
def test_at_the_limit_of_shared_memory(n: int, dtype: torch.dtype) -> None:
    """The largest matrix that fits is one launch; the next goes the large way."""
    size = dtype.itemsize
    most = (LITTLE - 256 - 640 * size) // (n * size)
    most -= most % 2 == 0
    for m, small in ((most, True), (most - 1, True), (most + 1, False), (most + 2, False)):
        a = random(m, n, dtype=dtype)
        with simulated(LITTLE) as sim:
            (out,) = run([a])
            assert_close(out, q_of(a.double()))
        assert ({step for step, *_ in sim.launches} == {"small"}) == small


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_at_the_limits_of_panels(width: int, dtype: torch.dtype) -> None:
    """Where narrower panels begin, and where even the narrowest streams."""
    shared = 40000 if dtype == F32 else 60000
    rows = max(
        m for m in range(1, 2000) if cuda_qr._panel_bytes(m, width, dtype.itemsize) <= shared
    )
    for m in (rows - 1, rows, rows + 1, rows + 9):
        a = random(m, min(m, 40), dtype=dtype, seed=width)
        with simulated(shared):
            (out,) = run([a])
            assert_close(out, q_of(a.double()))


@pytest.mark.parametrize(
    ("shape", "count"), [((8, 8), 60), ((32, 32), 40), ((64, 64), 20), ((128, 128), 6),
                         ((160, 160), 6), ((400, 400), 2), ((900, 900), 1), ((1000, 64), 3)],
    ids=str,
)  # fmt: skip
def test_float32_is_as_exact_as_lapack(shape: tuple[int, int], count: int) -> None:
    """Orthogonality, and distance from the Q of float64."""
    a = random(count, *shape)
    with simulated():
        ours = torch.stack(run(list(a)))
    exact, lapack, n = q_of(a.double()), q_of(a), shape[1]

    def defect(q: torch.Tensor) -> torch.Tensor:
        return (q.double().mT @ q.double() - torch.eye(n)).flatten(1).norm(dim=1)

    def errors(q: torch.Tensor) -> torch.Tensor:
        return (q.double() - exact).norm(dim=1)

    assert defect(ours).max() < 1e-5 * n**0.5
    assert defect(ours).mean() <= defect(lapack).mean()
    assert errors(ours).median() <= 1.25 * errors(lapack).median()
    # The last columns of a square matrix are a matter of luck: each way has its own.
    assert errors(ours).max() <= 5 * errors(lapack).max()


def test_order_of_threads_does_not_matter() -> None:
    """What a thread reads in a phase, no other writes in it."""
    matrices = [random(*s) for s in ((8, 8), (9, 14), (40, 33), (100, 70), (150, 140), (300, 40))]
    for shared in (HOPPER, LITTLE):
        for direct in (False, True):
            results = []
            for order in range(3):
                with simulated(shared) as sim:
                    sim.order = order
                    results.append(run(matrices, direct))
            for others in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], others))


# ---- directly from the reflectors ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shared", [LITTLE, *slow([HOPPER])])
def test_direct(shared: int, dtype: torch.dtype) -> None:
    matrices = [random(*shape, dtype=dtype) for shape in SMALL + LARGE]
    with simulated(shared) as sim:
        for out, a in zip(run(matrices, direct=True), matrices):
            expected = product_of_reflectors(a)
            eps = 2.0**-24 if dtype == F32 else 2.0**-53
            error = (out.double() - expected).norm()
            assert error <= 4 * eps * min(a.shape) * (1 + min(a.shape) ** 0.5 / 4), a.shape
        assert "panel" not in {step for step, *_ in sim.launches}


def test_direct_is_orthogonal_as_lapack_is() -> None:
    for n in (64, 400):
        a = random(n, n)
        with simulated():
            (q,) = run([a], direct=True)
        theirs = q_of(a)
        eye = torch.eye(n)
        defect = [(x.double().mT @ x.double() - eye).norm() for x in (q, theirs)]
        assert defect[0] <= defect[1]


def test_one_column_is_the_same_either_way() -> None:
    with simulated():
        for shape in ((50, 1), (1, 50)):
            a = random(*shape)
            assert torch.equal(run([a])[0], run([a], direct=True)[0])


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 7), (20, 45), (45, 20), (140, 131), (131, 140)], ids=str)
@pytest.mark.parametrize("gain", [1.0, 2**0.5, -0.3, 0.0])
@pytest.mark.parametrize("direct", [False, True])
def test_gain_and_rounding(shape: tuple[int, int], gain: float, direct: bool) -> None:
    """Q times gain as torch's mul_, then rounded once."""
    a = random(*shape)
    with simulated():
        (q,) = run([a], direct)
        for dtype in (F32, BF16, F16):
            (out,) = run([a], direct, dtype, gain)
            assert torch.equal(out, q.mul(gain).to(dtype))
        double = a.double()
        (q,) = run([double], direct)
        assert torch.equal(run([double], direct, F64, gain)[0], q.mul(gain))


@pytest.mark.parametrize("shape", [(7, 7), (20, 45), (45, 20), (140, 131), (131, 140)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_in_place(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a = random(*shape, dtype=dtype)
    with simulated():
        assert torch.equal(run([a], in_place=True)[0], run([a])[0])


@pytest.mark.parametrize("shape", [(6, 6), (12, 8), (8, 12), (150, 135), (200, 140)], ids=str)
def test_columns_of_zeros(shape: tuple[int, int]) -> None:
    """torch multiplies with sign(0) = 0. The columns beside them are orthonormal all the same."""
    for dtype in (F32, F64):
        a = torch.zeros(shape, dtype=dtype)
        with simulated():
            assert not run([a])[0].any()
            a = random(*shape, dtype=dtype)
            tall = a.mT if shape[0] < shape[1] else a
            tall[:, :2] = 0
            tall[:, 4] = 0
            (out,) = run([a])
        q = out.mT if shape[0] < shape[1] else out
        assert not q[:, [0, 1, 4]].any()
        others = [j for j in range(q.shape[1]) if j not in (0, 1, 4)]
        square = q[:, others].double().mT @ q[:, others].double()
        assert (square - torch.eye(len(others))).norm() < (1e-5 if dtype == F32 else 1e-13)


def test_one_element_is_exact() -> None:
    with simulated():
        matrices = [torch.tensor([[x]]) for x in (0.3, -7.0, 1e-9, 0.0)]
        assert [out.item() for out in run(matrices, gain=2.0)] == [2, -2, 2, 0]


# ---- how it is done ------------------------------------------------------------------------------


def test_many_jobs_go_through_a_table() -> None:
    for shape in ((5, 4), (150, 130)):
        matrices = [random(*shape, seed=i) for i in range(cuda_qr.MOST_INLINED + 1)]
        with simulated() as sim:
            both = [run(matrices), run(matrices[:-1])]
            assert sim.uploads == 1
        for a, b in zip(*both):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        with simulated():
            assert_close(both[0][-1], q_of(matrices[-1].double()))


def test_batches_of_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the memory allows, all else equal."""
    matrices = [random(140, 130, seed=i) for i in range(10)]
    need = cuda_qr.working_bytes(140, 130, 4)
    with simulated() as sim:
        whole = run(matrices)
    assert [grid for step, grid, *_ in sim.launches if step == "pack"] == [(25, 10)]
    for memory, counts in ((4 * need, [4, 4, 2]), (6 * need, [5, 5]), (1, [1] * 10)):
        monkeypatch.setattr(cuda_qr, "MOST_MEMORY", memory)
        with simulated() as sim:
            parts = run(matrices)
        assert [grid[1] for step, grid, *_ in sim.launches if step == "pack"] == counts
        for a, b in zip(whole, parts):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("direct", [False, True])
def test_memory(direct: bool) -> None:
    """What is taken is what is counted, and less than twice the matrices from 130 columns on."""
    for m, n in ((130, 130), (300, 200), (384, 384), (700, 400), (2000, 130), (9000, 10)):
        a = random(m, n)
        with simulated(LITTLE) as sim:
            run([a, a, a], direct)
        assert sim.held * 4 == 3 * cuda_qr.working_bytes(m, n, 4)
        assert sim.held <= 3 * m * n * (2 if n >= 130 else 3) + 4096
    assert cuda_qr.working_bytes(4096, 4096, 4) < 1.2 * 4 * 4096**2
    assert cuda_qr.working_bytes(16384, 16384, 4) < 1.1 * 4 * 16384**2


def test_launches() -> None:
    """A panel of all matrices at a time; directly, everything but products at a time."""
    matrices = [random(400, 400, seed=i) for i in range(2)]
    with simulated() as sim:
        run(matrices)
        steps = [step for step, *_ in sim.launches]
        assert steps.count("panel") == 13
        assert steps.count("triangle") == 6  # the last block is one panel
        assert all(2 in grid for _, grid, *_ in sim.launches)
        sim.launches.clear()
        run(matrices, direct=True)
        assert [step for step, *_ in sim.launches] == ["pack", "reflect", "triangle", "write"]


@pytest.mark.parametrize("size", [4, 8])
def test_threads_of_a_block(size: int) -> None:
    """Enough for a thread to have no more than four columns, or two."""
    for m in (1, 9, 64, 65, 300, 3000, 50000):
        for n in range(1, min(m, 128) + 1):
            threads = cuda_qr._threads(m, n, size)
            assert threads in ((64, 256, 512, 1024) if size == 4 else (64, 256, 512))
            lanes, own = (8, 2) if threads == 64 else (128 // size, 4)
            assert threads // lanes >= -(-n // own)
    assert cuda_qr._threads(8, 8, size) == 64
    assert cuda_qr._threads(64, 64, size) == 2048 // size


def test_products_are_exact_whatever_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    products = torch.baddbmm

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((precision(), torch.are_deterministic_algorithms_enabled()))
        return products(*args, **kwargs)

    get = getattr(torch._C, "_get_fp32_precision_getter", None)

    def precision() -> Any:
        return torch._C._get_cublas_allow_tf32() if get is None else get("cuda", "matmul")

    monkeypatch.setattr(torch, "baddbmm", spy)
    before = precision()
    exact, coarse = (False, True) if get is None else ("ieee", "tf32")

    def switch(to: Any) -> None:
        if get is None:
            torch._C._set_cublas_allow_tf32(to)
        else:
            torch._C._set_fp32_precision_setter("cuda", "matmul", to)

    try:
        switch(coarse)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with simulated():
            run([random(140, 130)])
        assert set(seen) == {(exact, False)}
        assert precision() == coarse
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        switch(before)


def test_modes_and_autocast_see_nothing() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            raise AssertionError(func)

    a = random(140, 130)
    out, seen = torch.empty_like(a), torch.empty_like(a)
    with simulated():
        orthonormalize([Job(a, out, 140, 130, 1.0)])
        job = Job(a, seen, 140, 130, 1.0)
        with Mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            orthonormalize([job])
    assert torch.equal(out, seen)


# ---- what is compiled ----------------------------------------------------------------------------


def test_both_sides_mean_the_same() -> None:
    dll = walker()
    assert cuda_qr._JOB.size == dll.size_of_job()
    assert cuda_qr._ARGUMENTS.size == dll.size_of_arguments()


def test_simulation_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guards of these tests do find what is out of place."""
    sim = Simulation(HOPPER)
    memory = sim.empty(torch.empty(0), 10)
    assert memory.isnan().all()
    sim.check()
    torch.as_strided(memory, (1,), (1,), memory.storage_offset() - 1).zero_()
    with pytest.raises(AssertionError):
        sim.check()


# ---- a real GPU ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F32, *slow([F64])], ids=str)
def test_all_ways(dtype: torch.dtype, here: torch.device) -> None:
    """Small and large matrices with each other, from columns and from reflectors."""
    matrices = [random(*shape, dtype=dtype) for shape in SMALL + LARGE]
    for out, a in zip(run(matrices, device=here), matrices):
        assert_close(out, q_of(a.double()))
    eps = 2.0**-24 if dtype == F32 else 2.0**-53
    for out, a in zip(run(matrices, direct=True, device=here), matrices):
        error = (out.double() - product_of_reflectors(a)).norm()
        assert error <= 4 * eps * min(a.shape) * (1 + min(a.shape) ** 0.5 / 4), a.shape


def test_gains_tables_and_places(here: torch.device) -> None:
    matrices = [random(*shape) for shape in ((8, 8), (20, 45), (100, 40), (300, 150), (150, 300))]
    exact = run(matrices, device=here)
    for dtype in (F32, BF16, F16):
        for out, q in zip(run(matrices, False, dtype, 2**0.5, device=here), exact):
            assert torch.equal(out, q.mul(2**0.5).to(dtype))
    for shape in ((6, 9), (140, 131)):
        matrices = [random(*shape, seed=i) for i in range(cuda_qr.MOST_INLINED + 5)]
        expected = run(matrices, device=here)
        found = run(matrices, in_place=True, device=here)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def jobs_of(matrices: Sequence[torch.Tensor], device: torch.device) -> list[Job]:
    there = [a.to(device) for a in matrices]
    return [Job(a, torch.full_like(a, torch.nan), *a.shape, 1.0) for a in there]


@only_hardware
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "shape", [(2048, 2048), (3000, 5000), (9000, 300), (100000, 3), (1, 1000000)], ids=str
)
def test_huge_matrices(shape: tuple[int, int], dtype: torch.dtype, here: torch.device) -> None:
    """Beyond shared memory, however narrow a panel is: 9000 rows stream."""
    a = torch.randn(shape, dtype=dtype, device=here)
    out = torch.empty_like(a)
    orthonormalize([Job(a, out, *shape, 1.0)])
    assert_close(out, q_of(a.double()))


@only_hardware
@pytest.mark.parametrize(("n", "count"), [(64, 50), (128, 20), (160, 20), (512, 8), (2048, 2)])
def test_float32_is_as_exact_as_torch_is(n: int, count: int, here: torch.device) -> None:
    a = torch.randn(count, n, n, device=here)
    out = torch.empty_like(a)
    orthonormalize([Job(x, y, n, n, 1.0) for x, y in zip(a, out)])
    exact, theirs = q_of(a.double()), q_of(a)

    def defect(q: torch.Tensor) -> float:
        square = q.double().mT @ q.double()
        return (square - torch.eye(n, device=here)).flatten(1).norm(dim=1).mean().item()

    assert defect(out) < 1e-5 * n**0.5
    assert defect(out) <= 1.05 * defect(theirs)
    errors = [(q.double() - exact).norm(dim=1).median().item() for q in (out, theirs)]
    assert errors[0] <= 1.1 * errors[1]


@only_hardware
def test_it_does_not_wait_and_keeps_its_stream(here: torch.device) -> None:
    """On another stream, behind what that is busy with, with more matrices than are inlined."""
    matrices = [random(200, 150, seed=i) for i in range(100)] + [random(30, 20)] * 120
    expected = run(matrices, device=here)
    jobs = jobs_of(matrices, here)
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
    assert all(torch.equal(job.out.cpu(), q) for job, q in zip(jobs, expected))


@only_hardware
def test_memory_is_what_is_counted(here: torch.device) -> None:
    jobs = jobs_of([random(600, 500, seed=i) for i in range(8)], here)
    orthonormalize(jobs)  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    orthonormalize(jobs)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 8 * cuda_qr.working_bytes(600, 500, 4) + 8192


@only_hardware
def test_reduced_precision_of_products_is_not_used(here: torch.device) -> None:
    a = random(500, 400)
    (exact,) = run([a], device=here)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        (again,) = run([a], device=here)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(exact, again)
