# SPDX-License-Identifier: BSD-3-Clause
"""The keyed stream's kernel body on the host against the CPU's kernels: every bit, every store.

The CPU's kernels are held to the specification by test_keyed.py.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from fastinit import _cpu
from fastinit.core import keyed_numbers, laws, shard
from fastinit.core.shard import Slab
from fastinit.core.work import Work
from fastinit.cpu import keyed as cpu_keyed
from fastinit.cuda import keyed as cuda_keyed
from tests.support.compare import DTYPES, F16, F32, storage_bits
from tests.support.cuda_keyed_host import Simulation, simulated, walker
from tests.support.layouts import LAYOUTS

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

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_call = pytest.mark.parametrize("call", CALLS, ids=str)


def work_of(
    call: Call,
    t: torch.Tensor,
    whole: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
    key: int = KEY,
) -> Work:
    shape = t.shape if whole is None else whole
    law = keyed_numbers.checked(laws.of_shape(call[0], t.dtype, shape, call[1]), t.dtype)
    return Work(law, key, t.detach(), shard.slabs(t.detach(), whole, offset))


def twin(t: torch.Tensor) -> torch.Tensor:
    """The same in a storage of its own."""
    storage = t.untyped_storage().clone()
    return t.new_empty(0).set_(storage, t.storage_offset(), t.shape, t.stride())  # type: ignore[call-overload,no-any-return]


def assert_same(
    works: Sequence[Work], arrange: Callable[[Simulation], None] = lambda sim: None
) -> Simulation:
    """What works write: both ways the same bits, each element once, and nothing beside them."""
    expected = [work._replace(tensor=twin(work.tensor)) for work in works]
    cpu_keyed.run(expected)
    with simulated() as sim:
        arrange(sim)
        counts = [sim.watch(work.tensor) for work in works]
        cuda_keyed.run(works)
        for theirs, ours, count in zip(expected, works, counts):
            before, after = storage_bits(theirs.tensor), storage_bits(ours.tensor)
            assert before is not None
            assert after is not None
            wrong = (before != after).nonzero()
            assert not len(wrong), (ours.law, ours.slabs, len(wrong), wrong[0].item())
            once = torch.zeros(len(count) // ours.tensor.itemsize, dtype=torch.uint8)
            for slab in ours.slabs:
                sizes, strides = zip(*(dim[:2] for dim in slab.dims))
                at = ours.tensor.storage_offset() + slab.offset
                once.as_strided(sizes, strides, at).add_(1)
            assert np.array_equal(once.numpy().repeat(ours.tensor.itemsize), count), ours.slabs
    return sim


def fresh(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.full(shape, 13.0, dtype=dtype)


def everything() -> list[Work]:
    works = [work_of(call, fresh(1000, dtype=F16)) for call in CALLS]
    works += [work_of(("sparse_", (0.5,)), fresh(20, 30)), work_of(("eye_", ()), fresh(20, 30))]
    works += [work_of(("orthogonal_", (1.0,)), fresh(30, 30, dtype=d)) for d in DTYPES]
    return [*works, work_of(RANDOM[1], torch.zeros(500, dtype=torch.float8_e5m2))]


# ---- every law, size and place


@each_dtype
@each_call
def test_sizes(call: Call, dtype: torch.dtype) -> None:
    tile, unit = TILE // dtype.itemsize, 16 // dtype.itemsize
    sizes = [0, 1, 2, 3, 7, 15, 16, 17, 100, tile - 1, tile, tile + 1, tile + unit, 3 * tile + 5]
    for n in sizes:
        sim = assert_same([work_of(call, fresh(n, dtype=dtype))])
        assert sim.launches == ([(0, 1, -(-n // tile))] if n else [])


@each_dtype
@each_call
def test_index_and_address_of_the_first_element(call: Call, dtype: torch.dtype) -> None:
    """Not at the beginning of a block, nor of 16 bytes."""
    whole = (50_000,)
    for offset, lead in itertools.product(range(9), range(9)):
        for n in (1, 2, 3, 5, 9, 100):
            assert_same(
                [work_of(call, fresh(n + lead + 3, dtype=dtype)[lead : lead + n], whole, (offset,))]
            )
    for offset, lead in ((3, 0), (0, 1), (5, 5), (8, 8), (4, 12)):
        n = TILE // dtype.itemsize + 77
        assert_same(
            [work_of(call, fresh(n + lead + 3, dtype=dtype)[lead : lead + n], whole, (offset,))]
        )


def test_aligned_elements_are_stored_16_bytes_at_a_time() -> None:
    for dtype in DTYPES:
        for index, expected in ((16, 1001), (1, 0)):  # in the other case no unit is aligned
            with simulated() as sim:
                unit = 16 // dtype.itemsize
                t = fresh(1001 * unit, dtype=dtype)
                work = work_of(RANDOM[0], t, (100_000,), (index,))
                cuda_keyed.run([work])
                assert walker().count_vectors() == expected, dtype
                assert len(sim.launches) == 1


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    for n in (120, 30_000):
        for call in (RANDOM[1], CALLS[-1]):
            assert_same([work_of(call, LAYOUTS[layout](n, dtype))])


@each_dtype
def test_parts_of_matrices(dtype: torch.dtype) -> None:
    parts = [
        ((37, 100), (3, 5), (20, 61)),
        ((37, 100), (3, 8), (20, 64)),
        ((99, 7), (10, 2), (80, 1)),
    ]
    parts += [
        ((64, 4096), (0, 1024), (64, 1024)),
        ((1, 100), (0, 50), (1, 50)),
        ((7, 9), (6, 8), (1, 1)),
    ]
    for whole, offset, shape in parts:
        for call in (RANDOM[0], RANDOM[1]):
            assert_same([work_of(call, fresh(*shape, dtype=dtype), whole, offset)])
            assert_same([work_of(call, fresh(*shape[::-1], dtype=dtype).t(), whole, offset)])


@each_dtype
def test_boxes_of_five_dimensions(dtype: torch.dtype) -> None:
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
        assert_same([work_of(RANDOM[1], t, whole, offset)])


@each_dtype
def test_several_slabs(dtype: torch.dtype) -> None:
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
        assert_same([Work(law, KEY, fresh(2000, dtype=dtype), slabs)])


@pytest.mark.parametrize("backwards", [False, True])
def test_many_fills_are_one_launch(backwards: bool) -> None:
    rng = random.Random(7)
    plans = [
        (rng.choice(CALLS), rng.randint(1, 9000), rng.choice(DTYPES), rng.getrandbits(64))
        for _ in range(60)
    ]

    def make(count: int) -> list[Work]:
        works = [work_of(call, fresh(n, dtype=d), key=key) for call, n, d, key in plans[:count]]
        return [*works, work_of(("eye_", ()), fresh(50, 70))]

    def arrange(sim: Simulation) -> None:
        sim.backwards, sim.blocks = backwards, 5

    for count in (cuda_keyed.MOST_INLINED - 1, cuda_keyed.MOST_INLINED, 60):
        sim = assert_same(make(count), arrange)
        assert [launch[:2] for launch in sim.launches] == [(0, count + 1)]
        assert sim.uploads == (count + 1 > cuda_keyed.MOST_INLINED)


@each_dtype
def test_indices_beyond_32_bits(dtype: torch.dtype) -> None:
    cases: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
        ((1 << 40,), ((1 << 32) - 9,), (30,)),
        ((1 << 40,), ((1 << 34) - 8,), (5000,)),
        ((1 << 62,), ((1 << 61) + 3,), (100,)),
        ((1 << 20, 1 << 20), (1 << 19, (1 << 18) + 1), (5, 9)),
        ((1 << 20, 1 << 20), ((1 << 19) - 3, (1 << 19) - 5), (10, 16)),
    ]
    for whole, offset, shape in cases:
        calls: list[Call] = [*RANDOM[:3], *([("eye_", ())] if len(whole) == 2 else [])]
        for call in calls:
            assert_same([work_of(call, fresh(*shape, dtype=dtype), whole, offset)])


@each_dtype
def test_ones_of_eye_and_dirac(dtype: torch.dtype) -> None:
    shapes = [(50, 70), (70, 50), (7, 3), (1, 9), (9, 1), (1, 1), (300, 301)]
    for shape in shapes:
        assert_same([work_of(("eye_", ()), fresh(*shape, dtype=dtype))])
        assert_same([work_of(("eye_", ()), fresh(*shape[::-1], dtype=dtype).t())])
    assert_same([work_of(("eye_", ()), fresh(20, 13, dtype=dtype), (50, 70), (11, 9))])
    for shape, groups in (
        ((6, 4, 3), 1),
        ((8, 2, 3, 3), 2),
        ((5, 7, 2, 2), 1),
        ((6, 9, 1, 1, 2), 3),
    ):
        call = ("dirac_", (groups,))
        assert_same([work_of(call, fresh(*shape, dtype=dtype))])
        part, offset = [n - n // 3 for n in shape], [n // 3 for n in shape]
        assert_same([work_of(call, fresh(*part, dtype=dtype), shape, offset)])


def test_more_units_than_a_descriptor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_keyed, "_MOST_UNITS", 7)
    cases: list[tuple[Sequence[int], Sequence[int], Sequence[int]]] = [
        ((999,), (3,), (500,)),
        ((40, 50), (1, 3), (30, 44)),
        ((40, 50), (0, 0), (40, 50)),
        ((9, 8, 7), (0, 1, 2), (9, 6, 3)),
    ]
    for dtype in DTYPES:
        for whole, offset, shape in cases:
            sim = assert_same([work_of(RANDOM[1], fresh(*shape, dtype=dtype), whole, offset)])
            assert max(sim.units) <= 7
            assert len(sim.launches) == 1


def test_divisions() -> None:
    """number / size by a product, for all numbers that there can be."""
    rng = random.Random(1)
    most = (1 << 31) - 1
    sizes = [1, 2, 3, 5, 7, 641, most, most - 1, 1 << 30, (1 << 30) + 1]
    sizes += [rng.randint(1, 1 << rng.randint(1, 31)) for _ in range(300)]
    for size in sizes:
        _, magic, shift, _ = cuda_keyed._AXIS.unpack(cuda_keyed._axis(size, 0))
        numbers = {
            0,
            1,
            size - 1,
            size,
            size + 1,
            most,
            most // size * size,
            most // size * size - 1,
        }
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
