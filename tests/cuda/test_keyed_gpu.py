# SPDX-License-Identifier: BSD-3-Clause
"""On a GPU: the keyed stream has the bits of the CPU.

`pytest -m cuda`; FASTINIT_TEST_DEVICE=cpu makes it a dry run with the kernel's body on the CPU.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import fastinit
from fastinit.core.work import Work
from fastinit.cpu import keyed as cpu_keyed
from fastinit.cuda import keyed as cuda_keyed
from fastinit.cuda import runtime
from tests.cuda.test_keyed import CALLS, RANDOM, Call, everything, fresh, work_of
from tests.support.compare import BF16, DTYPES, F16, F32, F64
from tests.support.cuda_keyed_host import simulated
from tests.support.layouts import LAYOUTS

pytestmark = pytest.mark.cuda

DEVICE = os.environ.get("FASTINIT_TEST_DEVICE", "cuda")
HERE = torch.device("cuda:0" if DEVICE == "cuda" else DEVICE)
ON_GPU = HERE.type == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a dry run on the CPU")
MANY = 1 << 26 if ON_GPU else 1 << 16
BOUNDS = [
    *((0.0, 1.0, -6.0, 6.0), (0.0, 1.0, 5.0, 6.0), (0.0, 1.0, -0.1, 0.1)),
    *((0.0, 1.0, -100.0, 100.0), (-5.0, 2.0, -2.0, 2.0)),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_call = pytest.mark.parametrize("call", CALLS, ids=str)
api: Any = fastinit


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The devices of the launches there were."""
    seen: list[int] = []
    with simulated() if not ON_GPU else torch.cuda.device(HERE):
        launch = runtime.run_keyed

        def noted(fills: bytes, table: int, count: int, tiles: int, device: int) -> None:
            seen.append(device)
            launch(fills, table, count, tiles, device)

        monkeypatch.setattr(runtime, "run_keyed", noted)
        yield seen
        if ON_GPU:
            torch.cuda.synchronize()


def twin(t: torch.Tensor, device: torch.device = HERE) -> torch.Tensor:
    """The same in a storage of its own on the device."""
    base = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())  # type: ignore[call-overload]
    storage = base.clone() if not ON_GPU else base.to(device)
    other = torch.empty(0, dtype=t.dtype, device=storage.device)
    return other.set_(storage.untyped_storage(), t.storage_offset(), t.shape, t.stride())  # type: ignore[call-overload,no-any-return]


def all_bytes(t: torch.Tensor) -> torch.Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=t.device)
    return flat.set_(t.untyped_storage()).cpu()  # type: ignore[call-overload,no-any-return]


def assert_same(*works: Work) -> None:
    there = [work._replace(tensor=twin(work.tensor)) for work in works]
    cpu_keyed.run(works)
    cuda_keyed.run(there)
    for work, other in zip(works, there):
        wrong = (all_bytes(work.tensor) != all_bytes(other.tensor)).nonzero()
        assert not len(wrong), (work.law, work.slabs, len(wrong), wrong[0].item())


@pytest.mark.sanitize
@each_dtype
@each_call
def test_sizes(call: Call, dtype: torch.dtype, launches: list[int]) -> None:
    tile, unit = 16384 // dtype.itemsize, 16 // dtype.itemsize
    sizes = [1, 2, 3, 7, 15, 16, 17, 100, tile - 1, tile, tile + 1, tile + unit, 3 * tile + 5]
    for n in sizes:
        assert_same(work_of(call, fresh(n, dtype=dtype)))
    assert len(launches) == len(sizes)


@each_dtype
@each_call
def test_many_numbers(call: Call, dtype: torch.dtype) -> None:
    """Square roots and quotients come without their ways out for extreme arguments."""
    for key in (1, 0xFFFFFFFFFFFFFFFF):
        assert_same(work_of(call, fresh(MANY, dtype=dtype), (1 << 40,), (key % 1000 * 16,), key))


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_bounds_of_truncated_normals(bounds: tuple[float, ...], dtype: torch.dtype) -> None:
    assert_same(work_of(("trunc_normal_", bounds), fresh(MANY // 4, dtype=dtype)))


@pytest.mark.sanitize
@each_dtype
def test_index_and_address_of_the_first_element(dtype: torch.dtype) -> None:
    for call, offset, lead, n in itertools.product(RANDOM[:2], range(9), (0, 1, 5), (3, 9, 9000)):
        t = fresh(n + lead + 3, dtype=dtype)[lead : lead + n]
        assert_same(work_of(call, t, (1 << 40,), ((1 << 33) + offset,)))


@pytest.mark.sanitize
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    for call in (RANDOM[1], ("constant_", (3.3,))):
        assert_same(work_of(call, LAYOUTS[layout](30_000, dtype)))


@pytest.mark.sanitize
@each_dtype
def test_parts_of_matrices(dtype: torch.dtype) -> None:
    parts: list[tuple[Sequence[int], Sequence[int], Sequence[int]]] = [
        ((37, 100), (3, 5), (20, 61)),
        ((99, 7), (10, 2), (80, 1)),
        ((64, 4096), (0, 1024), (64, 1024)),
        ((1 << 20, 1 << 20), ((1 << 19) - 3, (1 << 19) - 5), (30, 41)),
        ((30, 20, 10), (3, 4, 5), (20, 11, 5)),
    ]
    for whole, offset, shape in parts:
        for call in (*RANDOM[:2], *([("eye_", ())] if len(whole) == 2 else [("dirac_", (2,))])):
            assert_same(work_of(call, fresh(*shape, dtype=dtype), whole, offset))
            swapped = fresh(*shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1])
            assert_same(work_of(call, swapped, whole, offset))


@pytest.mark.sanitize
def test_many_fills_are_one_launch(launches: list[int]) -> None:
    for count in (2, 11, 12, 300):
        works = [
            work_of(CALLS[i % 5], fresh(1 + 997 * i % 9000, dtype=DTYPES[i % 4]), key=i)
            for i in range(count)
        ]
        assert_same(*works)
    assert len(launches) == 4


def test_other_dtypes_and_sparse(launches: list[int]) -> None:
    works = [work for work in everything() if work.law.op != "orthogonal"]
    works.append(work_of(("sparse_", (0.3, 0.5)), fresh(30, 11), (40, 30), (3, 7)))
    assert_same(*works)
    assert len(launches) == 1


@each_dtype
def test_orthogonal(dtype: torch.dtype, launches: list[int]) -> None:
    """The same reflectors; sums in another order."""
    eps = torch.finfo(dtype).eps if dtype in (BF16, F16) else {F32: 2.0**-24, F64: 2.0**-53}[dtype]
    shapes = [(8, 8), (3, 20), (100, 64), (64, 150), (200, 160), (1, 5), (6, 4, 3)]
    works = [work_of(("orthogonal_", (1.5,)), fresh(*shape, dtype=dtype)) for shape in shapes]
    there = [work._replace(tensor=twin(work.tensor)) for work in works]
    cpu_keyed.run(works)
    cuda_keyed.run(there)
    for shape, work, other in zip(shapes, works, there):
        n = min(shape[0], math.prod(shape[1:]))
        error = (work.tensor.double() - other.tensor.cpu().double()).norm()
        assert error <= 10 * eps * n * (1 + n**0.5 / 4), (shape, error)
    assert len(launches) == 1


@needs_gpu
def test_functions_and_models(launches: list[int]) -> None:
    for name, args in CALLS[:4]:
        expected, found = torch.empty(300, 70), torch.empty(300, 70, device=HERE)
        for t in (expected, found):
            before = t._version
            getattr(fastinit, name)(t, *args, generator=api.Key(5, "w"))
            assert t._version == before + 1
        assert torch.equal(expected, found.cpu())
    assert len(launches) == 4


@needs_gpu
def test_more_than_32_bits_of_elements() -> None:
    n = (1 << 32) + 77
    t = torch.empty(n, dtype=BF16, device=HERE)
    cuda_keyed.run([work_of(RANDOM[1], t)])
    for start in (0, (1 << 31) - 50, (1 << 32) - 50, n - 100):
        part = torch.empty(100, dtype=BF16)
        cpu_keyed.run([work_of(RANDOM[1], part, (n,), (start,))])
        assert torch.equal(part, t[start : start + 100].cpu())


@needs_gpu
def test_it_does_not_wait_and_keeps_its_stream() -> None:
    works = [work_of(CALLS[i % 5], fresh(5000), key=i) for i in range(40)]
    there = [work._replace(tensor=twin(work.tensor)) for work in works]
    cpu_keyed.run(works)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        for work in there:
            work.tensor.fill_(7.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            cuda_keyed.run(there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not stream.query()
    stream.synchronize()
    assert all(torch.equal(a.tensor, b.tensor.cpu()) for a, b in zip(works, there))


@needs_gpu
def test_one_launch_for_each_device(launches: list[int]) -> None:
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    works = [work_of(RANDOM[1], fresh(5000), key=i) for i in range(3 * len(devices))]
    there = [
        work._replace(tensor=twin(work.tensor, devices[i % len(devices)]))
        for i, work in enumerate(works)
    ]
    cpu_keyed.run(works)
    cuda_keyed.run(there)
    assert sorted(launches) == list(range(len(devices)))
    assert all(torch.equal(a.tensor, b.tensor.cpu()) for a, b in zip(works, there))
