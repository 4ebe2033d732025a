# SPDX-License-Identifier: BSD-3-Clause
"""The keyed stream on a GPU, simulated and real: it has the bits of the CPU's kernels, which
tests/keyed holds to the specification, and stores each element once and nothing beside them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import fastinit
from fastinit import _cpu
from fastinit.core import geometry, keyed_numbers, laws, shard
from fastinit.core.shard import Slab
from fastinit.core.work import Work
from fastinit.cpu import keyed as cpu_keyed
from fastinit.cuda import keyed as cuda_keyed
from fastinit.cuda import qr as cuda_qr
from fastinit.cuda import runtime
from tests.support.compare import BF16, DTYPES, F16, F32, F64, storage_bits
from tests.support.cuda_gpu import HERE, ON_GPU, each_dtype
from tests.support.cuda_keyed_host import Simulation, simulated, walker
from tests.support.layouts import LAYOUTS
from tests.support.marks import slow_but

Call = tuple[str, tuple[float, ...]]
KEY = 0x0123456789ABCDEF
RANDOM: list[Call] = [
    ("uniform_", (-0.3, 0.7)),
    ("normal_", (0.1, 0.5)),
    ("trunc_normal_", (0.0, 1.0, -2.0, 2.0)),
    ("trunc_normal_", (0.1, 0.02, 0.13, 0.3)),
]
CALLS: list[Call] = [*RANDOM, ("constant_", (3.3,))]
TILE = 16384  # bytes
MANY = 1 << 26 if ON_GPU else 1 << 12  # numbers: a GPU takes no time for them

each_call = pytest.mark.parametrize("call", CALLS, ids=str)
real = pytest.param("real", marks=pytest.mark.cuda)
only_simulated = pytest.mark.parametrize("there", ["simulated"], indirect=True)
only_hardware = pytest.mark.parametrize(
    "there", [pytest.param("hardware", marks=pytest.mark.cuda)], indirect=True
)


def work_of(
    call: Call,
    t: torch.Tensor,
    whole: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
    key: int = KEY,
) -> Work:
    shape = t.shape if whole is None else whole
    law = keyed_numbers.checked(laws.of_shape(call[0], t.dtype, shape, call[1]), t.dtype)
    return Work.of(law, key, t.detach(), shard.slabs(t.detach(), whole, offset))


def fresh(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.full(shape, 13.0, dtype=dtype)


def everything() -> list[Work]:
    works = [work_of(call, fresh(1000, dtype=F16)) for call in CALLS]
    works += [work_of(("sparse_", (0.5,)), fresh(20, 30)), work_of(("eye_", ()), fresh(20, 30))]
    works += [work_of(("orthogonal_", (1.0,)), fresh(30, 30, dtype=d)) for d in DTYPES]
    return [*works, work_of(RANDOM[1], torch.zeros(500, dtype=torch.float8_e5m2))]


class There:
    """Where works are run, and the launches it took: (device, fills)."""

    def __init__(self, device: torch.device, sim: Simulation | None) -> None:
        self.device, self.sim = device, sim
        self.launches: list[tuple[int, int]] = []

    def twin(self, t: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """The same in a storage of its own there."""
        base = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())  # type: ignore[call-overload]
        storage = base.to(device or self.device, copy=True)
        other = torch.empty(0, dtype=t.dtype, device=storage.device)
        return other.set_(storage.untyped_storage(), t.storage_offset(), t.shape, t.stride())  # type: ignore[call-overload,no-any-return]

    def assert_same(self, *works: Work, exact: bool = True) -> None:
        """Run works there and on the CPU; orthogonal ones have sums in another order."""
        there = [work._replace(tensor=self.twin(work.tensor)) for work in works]
        walker().forget()
        counts = [self.sim.watch(work.tensor) for work in there] if self.sim and exact else []
        on_cpu(works)
        cuda_keyed.run(there)
        for work, other in zip(works, there):
            if work.law.op == "orthogonal" and not exact:
                self._near(work, other)
                continue
            before, after = (storage_bits(w.tensor.cpu()) for w in (work, other))
            assert before is not None
            assert after is not None
            wrong = (before != after).nonzero()
            assert not len(wrong), (work.law, work.slabs, len(wrong), wrong[0].item())
        assert walker().count_strays() == 0, "a store out of place"
        walker().forget()
        for work, count in zip(works, counts):
            once = torch.zeros(len(count) // work.tensor.itemsize, dtype=torch.uint8)
            for slab in work.slabs:
                sizes, strides = zip(*(dim[:2] for dim in slab.dims))
                at = work.tensor.storage_offset() + slab.offset
                once.as_strided(sizes, strides, at).add_(1)
            assert np.array_equal(once.numpy().repeat(work.tensor.itemsize), count), work.slabs

    @staticmethod
    def _near(work: Work, other: Work) -> None:
        t = work.tensor
        eps = (
            torch.finfo(t.dtype).eps if t.itemsize == 2 else {F32: 2.0**-24, F64: 2.0**-53}[t.dtype]
        )
        n = min(t.shape[0], math.prod(t.shape[1:]))
        error = (t.double() - other.tensor.cpu().double()).reshape(t.shape[0], -1).norm()
        assert error <= 10 * eps * n * (1 + n**0.5 / 4), (t.shape, error)


def on_cpu(works: Sequence[Work]) -> None:
    with pytest.MonkeyPatch.context() as patch:  # though the simulation takes the CPU for a GPU
        patch.setattr(geometry, "device_of", lambda t: -1)
        cpu_keyed.run(works)


@pytest.fixture(params=["simulated", real])
def there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[There]:
    if request.param == "simulated" or (request.param == "real" and not ON_GPU):
        with simulated() as sim:
            where = There(torch.device("cpu"), sim)
            sim.launches = where.launches  # type: ignore[assignment]
            yield where
            monkeypatch.undo()  # what a test has replaced may be the simulation's
        return
    if not ON_GPU:
        pytest.skip("a dry run on the CPU")
    where, launch = There(HERE, None), runtime.run_keyed

    def noted(fills: bytes, table: int, count: int, tiles: int, device: int) -> None:
        where.launches.append((device, count))
        launch(fills, table, count, tiles, device)

    monkeypatch.setattr(runtime, "run_keyed", noted)
    with torch.cuda.device(HERE):
        yield where
        torch.cuda.synchronize()


# ---- every law, size and place -------------------------------------------------------------------


@pytest.mark.sanitize
@each_dtype
@each_call
def test_sizes(call: Call, dtype: torch.dtype, there: There) -> None:
    """The larger ones show that square roots and quotients need no ways out for extreme
    arguments."""
    tile, unit = TILE // dtype.itemsize, 16 // dtype.itemsize
    sizes = [0, 1, 2, 3, 7, 15, 16, 17, 100, tile - 1, tile, tile + 1, tile + unit, 3 * tile + 5]
    for n in sizes:
        there.assert_same(work_of(call, fresh(n, dtype=dtype)))
    assert there.launches == [(0, 1)] * (len(sizes) - 1)
    for key in (1, 0xFFFFFFFFFFFFFFFF):
        t = fresh(MANY, dtype=dtype)
        there.assert_same(work_of(call, t, (1 << 40,), (key % 1000 * 16,), key))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", slow_but(DTYPES, F32, BF16), ids=str)
@pytest.mark.parametrize("call", slow_but(CALLS, *RANDOM[:2]), ids=str)
def test_index_and_address_of_the_first_element(
    call: Call, dtype: torch.dtype, there: There
) -> None:
    """Not at the beginning of a block, nor of 16 bytes; nor within 32 bits."""
    tile = TILE // dtype.itemsize + 77
    for offset, lead in itertools.product(range(9), range(9)):
        for n in (1, 2, 3, 5, 9, 100, *([tile] if lead in (0, 5) else [])):
            t = fresh(n + lead + 3, dtype=dtype)[lead : lead + n]
            first = offset + (1 << 33) * (n in (9, tile))
            there.assert_same(work_of(call, t, (1 << 40,), (first,)))


@only_simulated
def test_aligned_elements_are_stored_16_bytes_at_a_time(there: There) -> None:
    for dtype in DTYPES:
        for index, expected in ((16, 1001), (1, 0)):  # in the other case no unit is aligned
            before = walker().count_vectors()
            t = fresh(1001 * (16 // dtype.itemsize), dtype=dtype)
            cuda_keyed.run([work_of(RANDOM[0], t, (100_000,), (index,))])
            assert walker().count_vectors() - before == expected, dtype


@pytest.mark.sanitize
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, there: There) -> None:
    for n in (120, 30_000):
        for call in (RANDOM[1], CALLS[-1]):
            there.assert_same(work_of(call, LAYOUTS[layout](n, dtype)))


PARTS: list[tuple[Sequence[int], Sequence[int], Sequence[int]]] = [
    *(((37, 100), (3, 5), (20, 61)), ((37, 100), (3, 8), (20, 64)), ((99, 7), (10, 2), (80, 1))),
    *(((64, 4096), (0, 1024), (64, 1024)), ((1, 100), (0, 50), (1, 50)), ((7, 9), (6, 8), (1, 1))),
    *(((50, 70), (11, 9), (20, 13)), ((30, 20, 10), (3, 4, 5), (20, 11, 5))),
    ((1 << 20, 1 << 20), ((1 << 19) - 3, (1 << 19) - 5), (30, 41)),  # more than 32 bits
    *(((1 << 40,), ((1 << 34) - 8,), (5000,)), ((1 << 62,), ((1 << 61) + 3,), (100,))),
]


@pytest.mark.sanitize
@each_dtype
def test_parts(dtype: torch.dtype, there: There) -> None:
    for whole, offset, shape in PARTS:
        diagonal: list[Call] = {1: [], 2: [("eye_", ())], 3: [("dirac_", (2,))]}[len(whole)]
        for call in (*RANDOM[:3], *diagonal):
            there.assert_same(work_of(call, fresh(*shape, dtype=dtype), whole, offset))
            swapped = fresh(*shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1])
            there.assert_same(work_of(call, swapped, whole, offset))


@each_dtype
def test_boxes_of_five_dimensions(dtype: torch.dtype, there: There) -> None:
    rng = random.Random(5)
    for _ in range(60):
        rank = rng.randint(1, 5)
        shape = [rng.choice([1, 2, 3, 5, 8, 11]) for _ in range(rank)]
        whole = [n + rng.choice([0, 0, 1, 4, 7]) for n in shape]
        offset = [rng.randint(0, w - n) for w, n in zip(whole, shape)]
        order = rng.sample(range(rank), rank)
        step = rng.choice([1, 1, 2])
        t = fresh(*(shape[k] for k in order), step, dtype=dtype).select(-1, 0)
        t = t.permute([order.index(k) for k in range(rank)])
        there.assert_same(work_of(RANDOM[1], t, whole, offset))


@each_dtype
def test_several_slabs(dtype: torch.dtype, there: There) -> None:
    """Of one tensor: rows that are not equally far apart."""
    slabs = [
        Slab(0, 5, ((10, 1, 1),)),
        Slab(64, 400, ((3, 1, 1), (4, 3, 10))),
        Slab(200, 800, ((5, 7, 3), (3, 40, 100))),
        Slab(12, 77, ((1, 1, 1),)),
        Slab(402, 2000, ((30, 1, 31), (31, 30, 1))[::-1]),
    ]
    for call in RANDOM[:2]:
        law = keyed_numbers.checked(laws.of_shape(call[0], dtype, (5000,), call[1]), dtype)
        there.assert_same(Work(law, KEY, fresh(2000, dtype=dtype), slabs))


@pytest.mark.sanitize
@pytest.mark.parametrize("backwards", [False, True])
def test_many_fills_are_one_launch(backwards: bool, there: There) -> None:
    if there.sim is not None:
        there.sim.backwards, there.sim.blocks = backwards, 5
    for i, count in enumerate((cuda_keyed.MOST_INLINED, cuda_keyed.MOST_INLINED + 1, 60)):
        works = [
            work_of(CALLS[k % 5], fresh(1 + 997 * k % 9000, dtype=DTYPES[k % 4]), key=k << 40)
            for k in range(count - 1)
        ]
        there.assert_same(*works, work_of(("eye_", ()), fresh(50, 70)))
        assert there.launches[i:] == [(0, count)]
        assert there.sim is None or there.sim.uploads == i


@each_dtype
def test_ones_of_eye_and_dirac(dtype: torch.dtype, there: There) -> None:
    for shape in [(50, 70), (70, 50), (7, 3), (1, 9), (9, 1), (1, 1), (300, 301)]:
        there.assert_same(work_of(("eye_", ()), fresh(*shape, dtype=dtype)))
        there.assert_same(work_of(("eye_", ()), fresh(*shape[::-1], dtype=dtype).t()))
    for dims, groups in (
        *(((6, 4, 3), 1), ((8, 2, 3, 3), 2), ((5, 7, 2, 2), 1), ((6, 9, 1, 1, 2), 3)),
    ):
        call = ("dirac_", (groups,))
        there.assert_same(work_of(call, fresh(*dims, dtype=dtype)))
        part, offset = [n - n // 3 for n in dims], [n // 3 for n in dims]
        there.assert_same(work_of(call, fresh(*part, dtype=dtype), dims, offset))


@pytest.mark.parametrize(
    "bounds",
    [
        *((0.0, 1.0, -6.0, 6.0), (0.0, 1.0, 5.0, 6.0), (0.0, 1.0, -0.1, 0.1)),
        *((0.0, 1.0, -100.0, 100.0), (-5.0, 2.0, -2.0, 2.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_bounds_of_truncated_normals(
    bounds: tuple[float, ...], dtype: torch.dtype, there: There
) -> None:
    there.assert_same(work_of(("trunc_normal_", bounds), fresh(MANY // 4, dtype=dtype)))


@only_simulated
def test_more_units_than_a_descriptor_counts(there: There, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_keyed, "_MOST_UNITS", 7)
    cases: list[tuple[Sequence[int], Sequence[int], Sequence[int]]] = [
        *(((999,), (3,), (500,)), ((40, 50), (1, 3), (30, 44)), ((40, 50), (0, 0), (40, 50))),
        ((9, 8, 7), (0, 1, 2), (9, 6, 3)),
    ]
    for dtype, (whole, offset, shape) in itertools.product(DTYPES, cases):
        there.launches.clear()
        there.assert_same(work_of(RANDOM[1], fresh(*shape, dtype=dtype), whole, offset))
        assert there.sim is not None
        assert max(there.sim.units) <= 7
        assert len(there.launches) == 1


def test_divisions() -> None:
    """number / size by a product, for all numbers that there can be."""
    rng = random.Random(1)
    most = (1 << 31) - 1
    sizes = [1, 2, 3, 5, 7, 641, most, most - 1, 1 << 30, (1 << 30) + 1]
    sizes += [rng.randint(1, 1 << rng.randint(1, 31)) for _ in range(300)]
    for size in sizes:
        _, magic, shift, _ = cuda_keyed._AXIS.unpack(cuda_keyed._axis(size, 0))
        numbers = {0, 1, size - 1, size, size + 1, most}
        numbers |= {most // size * size, most // size * size - 1}
        numbers |= {rng.randint(0, most) for _ in range(200)}
        for n in numbers:
            if 0 <= n <= most:
                total = (n * magic >> 32) + n
                assert total < 1 << 32
                assert total >> shift == n // size, (n, size)


def test_both_sides_mean_the_same() -> None:
    assert walker().size_of_fill() == _cpu.KEYED_SIZE
    assert walker().size_of_tiles() == cuda_keyed._TILES.size
    assert walker().most_inlined() == cuda_keyed.MOST_INLINED


# ---- around the kernel ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64], ids=str)
def test_other_dtypes(dtype: torch.dtype, there: There) -> None:
    calls: list[Call] = [*RANDOM[:2], ("eye_", ())]
    for call in calls:
        for t in (torch.zeros(30, 41, dtype=dtype), torch.zeros(41, 30, dtype=dtype).t()):
            there.assert_same(work_of(call, t, (50, 60), (2, 3)), exact=False)


@each_dtype
def test_sparse(dtype: torch.dtype, there: There) -> None:
    for whole, offset, shape in (
        *(((40, 30), (0, 0), (40, 30)), ((40, 30), (3, 7), (30, 11))),
        ((5, 400), (0, 0), (5, 400)),
    ):
        for t in (fresh(*shape, dtype=dtype), fresh(*shape[::-1], dtype=dtype).t()):
            there.launches.clear()
            there.assert_same(work_of(("sparse_", (0.3, 0.5)), t, whole, offset), exact=False)
            assert (t == 0).any()
            assert len(there.launches) == 1


@each_dtype
def test_orthogonal(dtype: torch.dtype, there: There) -> None:
    """The same reflectors; sums in another order."""
    shapes = [(8, 8), (3, 20), (100, 64), (64, 150), (200, 160), (1, 5), (6, 4, 3)]
    works = [work_of(("orthogonal_", (1.5,)), fresh(*shape, dtype=dtype)) for shape in shapes]
    there.assert_same(*works, exact=False)
    assert len(there.launches) == 1


def test_orthogonal_batched_and_parts(there: There) -> None:
    for name, whole, offset, shape in (
        ("orthogonal_batched_", (5, 20, 30), (0, 0, 0), (5, 20, 30)),
        ("orthogonal_batched_", (5, 30, 20), (1, 3, 2), (3, 8, 9)),
        ("orthogonal_", (40, 50), (10, 0), (11, 50)),
    ):
        expected = work_of((name, (1.0,)), fresh(*shape), whole, offset)
        found = expected._replace(tensor=there.twin(expected.tensor))
        on_cpu([expected])
        cuda_keyed.run([found])
        assert (expected.tensor - found.tensor.cpu()).abs().max() < 2e-6


def test_everything_is_one_launch_within_memory(
    there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a tensor of inference mode and a parameter are written; versions are the callers'."""
    results = []
    for most, launches in ((1 << 30, 1), (1, 5), (5000, 2)):
        monkeypatch.setattr(cuda_qr, "MOST_MEMORY", most)
        there.launches.clear()
        works = [work._replace(tensor=there.twin(work.tensor)) for work in everything()]
        before = [work.tensor._version for work in works]
        cuda_keyed.run(works)
        results.append([storage_bits(work.tensor.cpu()) for work in works])
        assert len(there.launches) == launches
        if most > 1:
            after = [work.tensor._version for work in works]
            assert after[:-1] == before[:-1]  # 8-bit floats are copied to where they belong
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))  # type: ignore[arg-type]
    with torch.inference_mode():
        t = fresh(20, 30).to(there.device)
    p = torch.nn.Parameter(fresh(20, 30).to(there.device))
    for call in (RANDOM[1], ("sparse_", (0.5,)), ("orthogonal_", (1.0,))):
        cuda_keyed.run([work_of(call, t), work_of(call, p)])
        assert torch.equal(t, p)
    assert p.requires_grad


@only_simulated
def test_one_launch_for_each_device(there: There, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, found = everything(), everything()
    cuda_keyed.run(expected)
    there.launches.clear()
    device = {work.tensor.data_ptr(): i % 3 for i, work in enumerate(found)}
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "device_of", lambda t: device.get(t.data_ptr(), 0))
        patch.setattr(cuda_qr, "orthonormalize", lambda jobs, direct: None)
        cuda_keyed.run(found)
    assert sorted(device for device, *_ in there.launches) == [0, 1, 2]
    for a, b in zip(expected, found):
        if a.law.op != "orthogonal":
            assert torch.equal(storage_bits(a.tensor), storage_bits(b.tensor))  # type: ignore[arg-type]


@only_simulated
def test_no_kernels_while_a_graph_is_captured(
    there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fastinit.core.kernels.can_use_cuda", lambda: False)
        with pytest.raises(RuntimeError, match="graph"):
            cuda_keyed.run([work_of(RANDOM[0], fresh(10))])
    assert not there.launches


# ---- a real GPU ----------------------------------------------------------------------------------


@only_hardware
def test_functions(there: There) -> None:
    api: Any = fastinit
    for name, args in RANDOM:
        expected, found = torch.empty(300, 70), torch.empty(300, 70, device=HERE)
        for t in (expected, found):
            before = t._version
            getattr(api, name)(t, *args, generator=api.Key(5, "w"))
            assert t._version == before + 1
        assert torch.equal(expected, found.cpu())
    assert len(there.launches) == 4


@only_hardware
def test_more_than_32_bits_of_elements(there: There) -> None:
    n = (1 << 32) + 77
    t = torch.empty(n, dtype=BF16, device=HERE)
    cuda_keyed.run([work_of(RANDOM[1], t)])
    for start in (0, (1 << 31) - 50, (1 << 32) - 50, n - 100):
        part = torch.empty(100, dtype=BF16)
        cpu_keyed.run([work_of(RANDOM[1], part, (n,), (start,))])
        assert torch.equal(part, t[start : start + 100].cpu())


@only_hardware
def test_it_does_not_wait_and_keeps_its_stream(there: There) -> None:
    works = [work_of(CALLS[i % 5], fresh(5000), key=i) for i in range(40)]
    ours = [work._replace(tensor=there.twin(work.tensor)) for work in works]
    cpu_keyed.run(works)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        for work in ours:
            work.tensor.fill_(7.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            cuda_keyed.run(ours)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not stream.query()
    stream.synchronize()
    assert all(torch.equal(a.tensor, b.tensor.cpu()) for a, b in zip(works, ours))


@only_hardware
def test_several_gpus(there: There) -> None:
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    works = [work_of(RANDOM[1], fresh(5000), key=i) for i in range(3 * len(devices))]
    ours = [
        work._replace(tensor=there.twin(work.tensor, devices[i % len(devices)]))
        for i, work in enumerate(works)
    ]
    cpu_keyed.run(works)
    cuda_keyed.run(ours)
    assert sorted(device for device, _ in there.launches) == list(range(len(devices)))
    assert all(torch.equal(a.tensor, b.tensor.cpu()) for a, b in zip(works, ours))
