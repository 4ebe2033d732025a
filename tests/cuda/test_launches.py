# SPDX-License-Identifier: BSD-3-Clause
"""Many fills in one launch: rejections, generators, what is overwritten, splits, any mixture."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastinit
from fastinit.core import build, geometry
from fastinit.core.fill import Drawn, Fill
from fastinit.cuda import fills as cuda_fills
from fastinit.cuda import runtime
from tests.support import cuda_model as m
from tests.support.compare import BF16, DTYPES, F32, F64
from tests.support.cuda_gpu import Gpu, each_dtype, only_simulated
from tests.support.cuda_host import Generator, simulated
from tests.support.cuda_model import H200, T4
from tests.support.cuda_world import CALLS, NAMES, VIEWS, World

REJECTED = (0.0, 1.0, -2.0, 2.0)


def mixture(world: World, recorded: fastinit.Plan, count: int, rejecting: bool = False) -> None:
    """Some of everything, each in memory of its own."""
    calls = [c for c in CALLS if rejecting or c[0] != "trunc_normal_" or c[1][1] == 0.02]
    calls += [("sparse_", (0.3, 0.2)), ("eye_", ()), ("dirac_", (2,))]
    t = world.gpu.threads
    sizes = (3000, 40, 9 * t + 24, 480, 2 * t)
    for i in range(count):
        name, args = calls[i % len(calls)]
        base = world.memory(sizes[i * 7 % 5], DTYPES[i * 5 % 4])
        t = base[2 : 2 + base.numel() // 8 * 8 - 8] if i % 3 == 0 else base
        if name == "dirac_":
            t = t.view(4, -1, 2)
        elif name in ("sparse_", "eye_"):
            t = t.view(8, -1)
        elif i % 4 == 1:
            t = t.view(-1, 8)[:, 1:6]
        world.do(recorded, name, t, *args, by=(0, -1, 0, 1)[i % 4])


@pytest.mark.sanitize
# Tiles that wait for others, as those of rejecting fills do, are taken in order.
@pytest.mark.parametrize(("backwards", "rejecting"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("count", [1, 2, 25, 26, 60, pytest.param(300, marks=pytest.mark.slow)])
def test_plan(count: int, backwards: bool, rejecting: bool, world: World) -> None:
    """Up to 25 fills travel in the arguments, more by a table. Run twice it draws on; the table
    stays, but for what sparse_ makes anew."""
    recorded = fastinit.Plan()
    mixture(world, recorded, count, rejecting)
    world.gpu.go_backwards(backwards)
    assert world.gpu.launches == []
    masks = sum(name == "sparse_" for name, *_ in world.steps)
    for run in range(1, 3):
        recorded.run()
        fills = len(world.steps)
        assert world.gpu.launched(*[fills] * run)
        assert world.gpu.copied(run * masks + (fills > 25) * (run if masks else 1))
    world.check(runs=2)


@pytest.mark.parametrize("most", [1, 7, 20])
def test_more_fills_than_a_launch_takes(
    most: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_fills, "_MOST_FILLS", most)
    recorded = fastinit.Plan()
    mixture(world, recorded, 20, rejecting=True)
    recorded.run()
    n = len(world.steps)
    assert world.gpu.launched(*[min(most, n - at) for at in range(0, n, most)])
    world.check()


@pytest.mark.parametrize("count", [3, 8, 9, 17])
@pytest.mark.parametrize("backwards", [False, True])
def test_generators(count: int, backwards: bool, gpu: Gpu) -> None:
    """A launch takes eight; fills between them need none."""
    world = World(gpu, *((1000 * i, 4 * i) for i in range(count)))
    gpu.go_backwards(backwards)
    recorded = fastinit.Plan()
    for turn in range(3):
        for i in range(count):
            for name, args in (CALLS[(turn + i) % 2], CALLS[5]):
                t = world.memory(500 + 700 * i, DTYPES[(turn + i) % 4])
                world.do(recorded, name, t, *args, by=i)
    recorded.run()
    turns = [i for _ in range(3) for i in range(count)]  # each launch starts at the ninth
    launches, seen = 1, set()
    for i in turns:
        if i not in seen and len(seen) == runtime.MOST_SOURCES:
            launches, seen = launches + 1, set()
        seen.add(i)
    assert not gpu.is_gpu or len(gpu.launches) == launches
    world.check()


# ---- what is overwritten -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("uniform_", "normal_"), ("normal_", "ones_"), ("eye_", "uniform_")]
)
@pytest.mark.parametrize("backwards", [False, True])
def test_overwritten(names: tuple[str, str], backwards: bool, world: World) -> None:
    """What is overwritten completely is not done, but its numbers count; in part, it is."""
    arguments = dict(CALLS[:2])
    world.gpu.go_backwards(backwards)
    first, second = names
    base = world.memory(6000)
    tensors: list[tuple[Tensor, Tensor, int]] = [
        (base, base, 1),
        (base[:600], base, 1),
        (base[40:640], base[38:648], 1),
        (base[600:1200], base[601:1200], 2),
        (base[600:1200], base[:601], 2),
        (base[:600], base[600:1200], 1),
        (base, base.view(60, 100)[:, ::2], 2),
        (base.view(60, 100), base.view(60, 100).t(), 1),
    ]
    for one, two, launches in tensors:
        recorded = fastinit.Plan()
        other = world.memory(99)
        world.gpu.launches.clear()
        one = one.view(20, -1) if first == "eye_" else one
        world.do(recorded, first, one, *arguments.get(first, ()), by=0)
        world.do(recorded, second, two, *arguments.get(second, ()), by=0)
        world.do(recorded, "uniform_", other, 0.0, 1.0, by=0)
        recorded.run()
        together = one.data_ptr() + one.nbytes <= two.data_ptr()
        assert world.gpu.launched(*([1, 2] if launches == 2 else [3] if together else [2]))
    world.check(once=False)


def test_overwritten_sparse(world: World) -> None:
    """The CPU's generator moves on too."""
    base, other = world.memory(6000), world.memory(600)
    recorded = fastinit.Plan()
    world.do(recorded, "sparse_", base[:600].view(20, 30), 0.5, 0.1, by=0)
    world.do(recorded, "uniform_", base, 0.0, 1.0, by=0)
    world.do(recorded, "sparse_", other.view(20, 30), 0.5, 0.1, by=0)
    recorded.run()
    assert world.gpu.launched(2)
    world.check(once=False)


def test_rejected_is_not_left_out(world: World) -> None:
    """How much it draws is only known when it is done; a kernel for what follows waits for it."""
    base, other = world.memory(3000), world.memory(3000)
    recorded = fastinit.Plan()
    world.do(recorded, "trunc_normal_", base, 0.0, 1.0, -1.0, 1.0, by=0)
    world.do(recorded, "uniform_", base, -1.0, 1.0, by=0)
    world.do(recorded, "uniform_", base, 0.0, 1.0, by=1)
    world.do(recorded, "normal_", other, 0.0, 1.0, by=0)
    recorded.run()
    assert world.gpu.launched(1, 2)
    if world.gpu.sim is not None:
        assert set(world.gpu.sim.stores(base)) == {2}
    world.check(once=False)


# ---- rejections ----------------------------------------------------------------------------------


@pytest.mark.sanitize
@each_dtype
def test_rejections_in_a_row(dtype: torch.dtype, world: World) -> None:
    """Later fills of a generator begin where the rejections end; another's go on meanwhile."""
    recorded, t = fastinit.Plan(), world.gpu.threads
    order = [0, 0, 1, 0, 1, 1, -1, 0, 2, -1, 0, 1]
    for i, by in enumerate(order):
        spread = 0.45 + 0.25 * i
        kind = i % 4
        n = (300, 5 * t + 3, t, 2 * t + 1)[i * 3 % 4]
        if kind < 2:
            one = world.memory(n, dtype)
            world.do(recorded, "trunc_normal_", one, 0.0, 1.0, -spread, spread, by=by)
        name, args = CALLS[(0, 1, 4)[i % 3]]
        for _ in range(1 + kind):
            world.do(recorded, name, world.memory(n + 5, dtype), *args, by=by)
    recorded.run()
    assert world.gpu.launched(len(world.steps))
    world.check()


@pytest.mark.parametrize("count", [30, 600])
def test_rejections_alone(count: int, world: World) -> None:
    """600: more waiting fills than blocks can be resident. Versions depend on the values: torch
    copies the result where anything was out of bounds."""
    recorded = fastinit.Plan()
    for i in range(count):
        t = world.memory(1 + 97 * i if count == 30 else 70, DTYPES[i % 4])
        args = (0.0, 1.0, -5.0, 5.0) if i % 7 == 3 else REJECTED
        world.do(recorded, "trunc_normal_", t[i % 2 :] if i else t, *args, by=i % 3)
    recorded.run()
    assert world.gpu.launched(count)
    world.check()


# ---- drawn ahead ---------------------------------------------------------------------------------


@only_simulated
def test_drawn_ahead(gpu: Gpu) -> None:
    """Written in another order than drawn; a launch takes eight seeds."""
    makers: list[tuple[str, tuple, Callable[..., Fill | None]]] = [
        (*CALLS[0], build.uniform),
        (*CALLS[1], build.normal),
        (*CALLS[4], build.trunc_erfinv),
        (*CALLS[5], lambda t, value, by: build.constant(t, value)),
        ("sparse_", (0.375, 0.2), lambda t, _, std, by: build.sparse(t, std, 3, by)),
    ]
    world = World(gpu, *((77 * i, 4 * i) for i in range(20)))
    fills = []
    for i in range(40):
        name, args, make = makers[i % 5]
        by = i % 2 if i < 20 else i - 20
        base = world.memory(8 * (50 + i * i), DTYPES[i % 4])
        columns = name != "sparse_" and i % 3 == 0
        t = base.view(-1, 8)[:, 1:7] if columns else base[8:].view(8, -1)
        fill = make(t, *args, world.generators[by])
        assert fill is not None
        start = t.storage_offset() * t.element_size()
        extent = start, start + geometry.span(t) * t.element_size()
        waiting = Drawn(
            fill, fill.items, fill.is_dense, extent, stream=7
        )  # drawing says it as well
        if fill.generator is not None:
            waiting.state, waiting.mask = cuda_fills.draw_ahead(fill)
        fill.tensor = geometry.NO_TENSOR[t.dtype]
        fills.append((waiting, t.untyped_storage()))
        world.steps.append((name, t, args, by))
        torch.autograd.graph.increment_version([base] * fill.bumps)  # as a scope does
    random.Random(3).shuffle(fills)
    assert gpu.launches == []
    cuda_fills.run_ahead(fills)
    assert sum(gpu.launches) == 40
    assert 3 <= len(gpu.launches) < 20
    world.check()


# ---- tensors that torch splits -------------------------------------------------------------------


SPLIT: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda b: b,
    "part": lambda b: b[3:-4],
    "matrix": lambda b: b.view(12, -1),
    "channels_last": lambda b: b.view(5, 6, 8, -1).permute(0, 3, 1, 2),
    "rows": lambda b: b.view(-1, 120)[:, 3:93],
    "columns": lambda b: b.view(-1, 120)[:, 1::2].t(),
    "every second": lambda b: b[1::2],
    "few rows": lambda b: b.view(3, -1)[:, 100:-900],
    "four dimensions": lambda b: b.view(6, 8, 10, -1)[1:6, ::3, :7, 1:].permute(3, 0, 2, 1),
}
APART = list(SPLIT)[4:]


@only_simulated
@each_dtype
@pytest.mark.parametrize(
    "limit", [3000, *(pytest.param(n, marks=pytest.mark.slow) for n in (700, 9000))]
)
def test_split(limit: int, dtype: torch.dtype, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """More elements than `limit` are too many for torch's 32-bit indexing. All are in one plan, so
    that each counts on what those before have drawn."""
    for module, name in ((geometry, "MOST_AT_ONCE"), (m, "LIMIT")):
        assert getattr(module, name) == 2**31 - 1
        monkeypatch.setattr(module, name, limit * dtype.itemsize)
    for layout, view in SPLIT.items():
        world = World(gpu, (5, 12))
        gpu.launches.clear()
        recorded = fastinit.Plan()
        expected = 0
        for name, args in [*CALLS, CALLS[0]]:
            t = view(world.memory(12_000, dtype))
            parts = m.pieces(t.shape, t.stride(), t.element_size())
            assert len(parts) > 1
            if args == (0.2, 1.0, -1.5, 1.25) and name == "trunc_normal_" and layout in APART:
                # From the second draw on torch fills a dense tensor: split elsewhere, or not.
                assert build.trunc_normal(t, *args, world.generators[0]) is None
                continue
            world.do(recorded, name, t, *args, by=0)
            whole = name in ("constant_", "zeros_", "ones_") and layout not in APART
            expected += 1 if whole else len(parts)
        recorded.run()
        assert gpu.launched(expected)
        world.do(fastinit, "sparse_", world.memory(12_000, dtype).view(30, 400), 0.4, 0.2, by=0)
        world.check()


def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


SIZES_OF_HUGE = (
    *(2**28, 2**28 + 1, 2**29 - 1, 2**29, 2**29 + 1, 2**30, 2**30 + 1, 2**31 - 1, 2**31),
    *(2**31 + 5, 10**10),
)
HUGE: dict[str, Callable[[torch.dtype], Tensor]] = {
    **{f"{n}": lambda d, n=n: meta(n, dtype=d) for n in SIZES_OF_HUGE},
    "(3, 2^30)": lambda d: meta(3, 2**30, dtype=d),
    "(2^30, 3) transposed": lambda d: meta(2**30, 3, dtype=d).t(),
    "every second": lambda d: meta(2**30 + 7, dtype=d)[1::2],
    "columns": lambda d: meta(70_001, 50_003, dtype=d)[:, 1:-7],
    "columns, transposed": lambda d: meta(50_003, 70_001, dtype=d)[:, ::3].t(),
    "two rows, far": lambda d: meta(2**31, dtype=d).as_strided((2, 1013), (2**30 + 1, 1)),
    "as far as can be": lambda d: meta(1).to(d).as_strided((2, 3), ((2**31 - 4) // d.itemsize, 1)),
    "three dimensions": lambda d: meta(7, 9001, 40_009, dtype=d)[1:6, 3:, :40_000],
    "four dimensions": lambda d: meta(6, 301, 999, 1009, dtype=d)[:5, 1::3, :997, 2:],
    "channels_last": lambda d: meta(33, 1000, 300, 301, dtype=d).permute(0, 3, 1, 2),
}


def fake(t: Tensor, op: str = "uniform") -> Fill:
    layout = geometry.layout_of(t)
    assert layout is not None
    generator: Any = None if op == "constant" else Generator()
    return Fill(t, op, 0.0, 1.0, generator, *layout, t.numel(), device=0)


class Described(NamedTuple):
    """What the kernel is told of a piece."""

    address: int
    items: int
    block: int
    first_tile: int
    threads: int
    dims: list[tuple[int, int]]
    dense: bool  # so 16-byte stores are possible
    tiles: int


def described(t: Tensor, op: str = "uniform") -> list[Described]:
    """Of a tensor at 2^40, from the 101st block and the 51st tile on."""
    found = []
    for data, tiles in cuda_fills._descriptors(
        cuda_fills._Entry(fake(t, op), 1 << 40, 0, 100, -1, -1), 50, 0
    ):
        f = cuda_fills._PACK.unpack_from(data)
        shape, rank = cuda_fills._STRIDED.unpack(f[-1]), f[-3]
        dims = [d for d in zip(shape[:rank], shape[4:]) if d[0] != 1] if rank else [(f[1], 1)]
        assert f[12] == tiles
        found.append(Described(*f[:3], f[11], f[14], dims, rank == 0, tiles))
    return found


@pytest.mark.parametrize("model", [H200, T4], ids=["H200", "T4"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=NAMES.get)
@pytest.mark.parametrize("layout", HUGE)
def test_real_limit(layout: str, dtype: torch.dtype, model: m.Gpu) -> None:
    """No memory, only what the kernel would be told of it."""
    t = HUGE[layout](dtype)
    name, size = NAMES[dtype], dtype.itemsize
    parts = m.pieces(t.shape, t.stride(), size)
    layout_is_dense = geometry.layout_of(t)[1] == 0
    with simulated(model):
        fill, found = fake(t), described(t)
        ours = cuda_fills.pieces(fill)
        assert 4 * cuda_fills.blocks_drawn(fill, ours) == m.draw_increment(
            t.shape, t.stride(), name, model
        )
    assert len(ours) == len(found) == len(parts)
    block, tile = 100, 50
    if len(parts) > 1:
        block += m.increment(t.numel(), name, model) // 4
    for piece, told, (start, dims) in zip(ours, found, parts):
        items = math.prod(n for n, _ in dims)
        assert (piece.start, piece.items) == (start, items)
        threads = m.threads_of(items, model)
        trips = m.increment(items, name, model) // 4
        tiles = trips * -(-min(items, threads) * size // 4096)  # of 256 lanes that take 16 bytes
        where = (2**40 + start * size, items, block, tile, threads)
        assert told == Described(*where, dims, layout_is_dense, tiles)
        block, tile = block + trips, tile + told.tiles


@pytest.mark.parametrize("op", ["uniform", "constant"])
@pytest.mark.parametrize("apart", [2**32 - 1, 2**32, 2**33 + 5])
def test_farther_than_32_bits(apart: int, op: str) -> None:
    """Rows of one matrix that are 2^32 elements apart: each is a piece, and both are told."""
    with simulated(H200):
        told = described(meta(2, apart, dtype=BF16)[:, :1013], op)
    assert [d.address for d in told] == [2**40, 2**40 + 2 * apart]
    assert [d.dims for d in told] == [[(1013, 1)]] * 2


# ---- anything ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Without 20, in which the model cannot tell whether a draw lies within the bounds.
    "seed",
    [*range(6), *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 30) if n != 20)],
)
def test_random_plan(seed: int, world: World) -> None:
    """Any calls on any views of a few storages, overlapping or not, by any generators."""
    rng = random.Random(seed)
    recorded = fastinit.Plan()
    rejecting = seed % 3 > 0
    world.gpu.go_backwards(not rejecting)
    shared = rng.random() < 0.5
    bases: list[Tensor] = []
    for _ in range(rng.choice([5, 20, 45])):
        if not (bases and shared) or rng.random() < 0.6:
            n = rng.choice([9600, 9600, 96 * rng.randint(1, 100)])
            bases.append(world.memory(n, rng.choice(DTYPES)))
        t = rng.choice(bases) if shared else bases[-1]
        name, args = rng.choice([*CALLS, ("eye_", ()), ("dirac_", (2,)), ("sparse_", (0.4, 0.1))])
        begin = rng.choice([0, 0, 1, 3, 8, 16])
        if begin and t.numel() > 96:
            t = t[begin:][: 96 * rng.randint(1, t.numel() // 96 - 1)]
        if name == "dirac_":
            t = t.view(8, -1, rng.choice([1, 2, 3, 6]))
        elif name in ("eye_", "sparse_"):
            t = t.view(rng.choice([1, 8, 24, t.numel() // 2, t.numel()]), -1)
        elif t.numel() == 9600 and rng.random() < 0.7:
            t = rng.choice(list(VIEWS.values()))(t).detach()
        if name == "trunc_normal_" and not rejecting:
            args = (0.0, 0.02, -2.0, 2.0)
        world.do(recorded, name, t, *args, by=rng.choice([-1, 0, 1, 2]))
    runs = rng.choice([1, 1, 2])
    for _ in range(runs):
        recorded.run()
    assert shared or not world.gpu.is_gpu or len(world.gpu.launches) == runs
    world.check(once=not shared, runs=runs)
