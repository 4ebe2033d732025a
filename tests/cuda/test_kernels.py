# SPDX-License-Identifier: BSD-3-Clause
"""Single fills: sizes, seeds, layouts and parameters in each dtype. Every element, every store and
every offset is compared; see tests/support/cuda_world.py for how exactly."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fastinit
from fastinit.core import geometry, kernels
from tests.support import cuda_model as m
from tests.support.compare import BF16, F16, F32, F64, POISONS, attempt, bits
from tests.support.cuda_gpu import (
    REJECTS,
    START,
    At,
    Gpu,
    each_dtype,
    only_hardware,
    only_simulated,
    two_dtypes,
)
from tests.support.cuda_host import simulated, walker
from tests.support.cuda_model import A100, H200, RTX4090, SMALL, T4, State
from tests.support.cuda_world import CALLS, GAPS, NAMES, VIEWS, World

MIN_CUDA = geometry.MIN_CUDA  # as it is outside of these tests
each_call = pytest.mark.parametrize(("name", "args"), CALLS, ids=str)
VECTORS = {"uniform_", "normal_", "constant_", "zeros_", "ones_"}  # made of 16-byte stores
FAR = (0.0, 0.02, -2.0, 2.0)  # no draw can be rejected


def per_vector(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def makes_vectors(name: str, args: tuple, dtype: torch.dtype) -> bool:
    return (name in VECTORS or args == FAR) and dtype is not F64


# ---- sizes, grids and seeds ----------------------------------------------------------------------


@each_dtype
@each_call
def test_sizes(name: str, args: tuple, dtype: torch.dtype, world: World) -> None:
    """Around blocks of threads, and around what the grid makes in a trip."""
    t = world.gpu.threads
    around = [k * t + d for k in (1, 2, 4) for d in (-1, 0, 1)]
    sizes = [1, 2, 15, 16, 17, 255, 256, 257, *around, 8 * t + 3]
    for n in sizes:
        world.do(fastinit, name, world.memory(n, dtype), *args, by=0)
    assert world.gpu.launched(*[1] * len(world.steps))
    if world.gpu.sim is not None:
        vectors = sum(n // per_vector(dtype) for n in sizes)
        assert walker().count_vectors() == vectors * makes_vectors(name, args, dtype)
    world.check()


@each_dtype
def test_functions(dtype: torch.dtype, world: World) -> None:
    """Those that compute what uniform_ and normal_ are given; with the default generator too."""
    n = world.gpu.threads
    for name, args, shape in (
        *(("xavier_uniform_", (1.5,), (n // 9, 17)), ("xavier_normal_", (), (n // 27, 3, 3, 3))),
        ("kaiming_uniform_", (math.sqrt(5),), (40, 3, 3, 3)),
        *(("kaiming_normal_", (0, "fan_out", "relu"), (n, 5)), ("kaiming_normal_", (), (30, 7))),
        *(("uniform_", (), (n, 3)), ("normal_", (), (5, n)), ("trunc_normal_", FAR, (70,))),
    ):
        for by in (-1, 1):
            t = world.memory(math.prod(shape), dtype).view(shape)
            world.do(fastinit, name, t, *args, by=by)
    assert world.gpu.launched(*[1] * len(world.steps))
    world.check()


@pytest.mark.parametrize(
    "model",
    [H200, *(pytest.param(g, marks=pytest.mark.slow) for g in (A100, RTX4090, T4))],
    ids=["H200", "A100", "RTX4090", "T4"],
)
def test_grids(model: m.Gpu) -> None:
    threads = m.threads_of(10**9, model)
    assert threads == {H200: 270_336, A100: 221_184, RTX4090: 196_608, T4: 40_960}[model]
    with simulated(model) as sim:
        world = World(Gpu(torch.device("cpu"), sim), (2**33 + 1, 4))
        for name, args, n, dtype in (
            ("uniform_", (0.0, 1.0), threads - 1, F64),
            ("uniform_", (-1.0, 1.0), 4 * threads + 1, F32),
            ("normal_", (0.0, 0.02), threads + 1, BF16),
            ("trunc_normal_", (0.0, 1.0, -2.0, 2.0), 1000, F32),
        ):
            world.do(fastinit, name, world.memory(n, dtype), *args, by=0)
        world.check()


PUBLISHED: list[tuple[m.Gpu | None, int, int, str, tuple, dict[int, list[float]]]] = [
    # pytorch's issues 47347, 80202 and 158398 have these of any GPU, the last of 28 processors.
    (None, 0, 0, "uniform_", (6,), {0: [0.3990, 0.5167, 0.0249, 0.9401, 0.9459, 0.7967]}),
    (None, 0, 4, "uniform_", (4,), {0: [0.9722, 0.7910, 0.4690, 0.3300]}),
    (None, 0, 0, "normal_", (6,), {0: [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797]}),
    (None, 42, 0, "normal_", (3,), {0: [0.1940, 2.1614, -0.1721]}),
    (
        *(m.Gpu(28, 1536), 42, 0, "normal_", (64, 2048)),
        {
            **{0: [0.1940, 2.1614, -0.1721], 2045: [1.4540, -2.7733, -0.8932]},
            **{61 * 2048: [-0.4861, 0.3358, 1.0578], 62 * 2048 + 2045: [-0.6297, -1.1112, -0.4091]},
            63 * 2048 + 2045: [-0.4841, 1.2850, -0.0282],
        },
    ),
]


@pytest.mark.parametrize(("model", "seed", "offset", "name", "shape", "answers"), PUBLISHED)
def test_published_answers(
    model: m.Gpu | None, seed: int, offset: int, name: str, shape: tuple, answers: dict, gpu: Gpu
) -> None:
    if not gpu.is_gpu or (model is not None and gpu.sim is None):
        pytest.skip("of another GPU")
    with pytest.MonkeyPatch.context() as patch:
        if model is not None:
            patch.setattr(fastinit.cuda.runtime, "grid_of", lambda device: (28, 1536))
            fastinit.cuda.fills.grid.cache_clear()
        t = torch.empty(shape, device=gpu.here)
        getattr(fastinit, name)(t, generator=gpu.generator(At(seed, offset)))
    for start, answer in answers.items():
        assert t.view(-1)[start:][: len(answer)].tolist() == pytest.approx(answer, abs=6e-5)


CARRY = 4 * (2**32 - 2)  # three trips from here pass the counter's first word
POSITIONS = [
    *((0, 0), (2**32 - 1, 4), (2**32, CARRY), (2**63 + 5, CARRY + 4), (-1, CARRY + 8)),
    *((-1, 4 * (2**61 + 3)), (0, 4 * (2**61 + 3)), (2**40 + 5, 4000)),
]


@each_dtype
def test_seeds_and_offsets(dtype: torch.dtype, gpu: Gpu) -> None:
    for seed, offset in POSITIONS:
        if not gpu.is_gpu:
            offset %= 5000
        world, t = World(gpu, (seed, offset)), gpu.threads
        world.do(fastinit, "uniform_", world.memory(8 * t + 3, dtype), -1.0, 1.0, by=0)
        if gpu.is_gpu:
            assert world.generators[0].get_offset() == offset + 4 * (5 if dtype is F64 else 3)
        recorded = fastinit.Plan()
        for name, args in CALLS[:5]:  # the second and later ones count from a sum or a slot
            world.do(recorded, name, world.memory(4 * t + 3, dtype), *args, by=0)
        recorded.run()
        world.check()


# ---- alignment and layout ------------------------------------------------------------------------


@each_dtype
@each_call
def test_unaligned(name: str, args: tuple, dtype: torch.dtype, world: World) -> None:
    """Parts of larger memory, of which only constants and those that begin at 16 bytes are made of
    vectors."""
    cuts = [(1, 0), (3, 5), (2, 1), (4, 0), (7, 9), (8, 8), (9, 1), (16, 7)]
    expected = 0
    for n in (20, 263, 4 * world.gpu.threads + 23):
        for first, rest in cuts:
            base = world.memory(first + n + rest, dtype)
            world.do(fastinit, name, base[first : first + n], *args, by=1)
            step = per_vector(dtype)
            if name in VECTORS - {"uniform_", "normal_"}:
                expected += (first + n) // step - -(-first // step)
            elif first % step == 0:
                expected += n // step
    if world.gpu.sim is not None:
        assert walker().count_vectors() == expected * makes_vectors(name, args, dtype)
    world.check()


@each_dtype
@pytest.mark.parametrize("layout", VIEWS)
def test_layouts(layout: str, dtype: torch.dtype, world: World) -> None:
    for name, args in CALLS:
        t = VIEWS[layout](world.memory(9600, dtype))
        assert (geometry.layout_of(t)[0] == "strided") == (layout in GAPS)  # type: ignore[index]
        world.do(fastinit, name, t, *args, by=2)
    assert world.gpu.launched(*[1] * len(world.steps))
    if world.gpu.sim is not None:
        dense = dtype is not F64 and layout not in GAPS
        assert walker().count_vectors() == dense * 6 * 9600 // per_vector(dtype)
    world.check()


def test_what_is_left_to_torch(gpu: Gpu) -> None:
    """Five dimensions that do not join, eye_ and sparse_ of what is not contiguous, no elements."""
    seen = []
    for module, poison in zip((gpu.torch, fastinit), POISONS):
        gpu.place_defaults()
        base = gpu.full(8192, value=poison)
        deep = base.view(4, 4, 4, 4, -1)[::2, 1::2, ::2, ::2, ::2]
        native = kernels.native_fills
        module.normal_(deep)
        module.eye_(base[:600].view(20, 30).t())
        module.sparse_(base[600:1200].view(20, 30).t(), 0.3)
        for shape in [(0,), (0, 3), (4, 0, 5)]:
            module.uniform_(gpu.full(*shape))
        assert kernels.native_fills - native in (0, 1)  # the normals of sparse_
        seen.append({"base": gpu.all_of(base)[:1200], "deep": gpu.values(deep), **gpu.states()})
    gpu.assert_same(seen[0], seen[1], "torch's own")


@only_hardware
def test_only_large_tensors_are_native_by_default(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "MIN_CUDA", MIN_CUDA)
    for n in (MIN_CUDA - 1, MIN_CUDA):
        done = kernels.native_fills
        fastinit.normal_(torch.empty(n, dtype=BF16, device=gpu.here))
        assert (kernels.native_fills > done) == (n == MIN_CUDA)


# ---- eye_, dirac_, sparse_ -----------------------------------------------------------------------


@two_dtypes
def test_diagonals(dtype: torch.dtype, world: World) -> None:
    for first in (0, 1, 3):
        for rows, columns in ((1, 1), (1, 9), (9, 1), (33, 18), (18, 33), (300, 300), (2, 9000)):
            base = world.memory(first + rows * columns + 5, dtype)
            world.do(fastinit, "eye_", base[first:-5].view(rows, columns))
        for shape, groups in (
            *(((8, 4, 5), 1), ((8, 4, 5), 2), ((8, 4, 5), 8), ((3, 7, 1), 1), ((24, 5, 6), 3)),
            *(((12, 4, 3, 3), 3), ((12, 20, 2, 5), 2), ((6, 7, 1, 1), 1), ((64, 33, 4, 7), 1)),
            *(((6, 3, 3, 3, 3), 2), ((5, 9, 2, 4, 1), 5), ((10, 9, 2, 1, 3), 2)),
        ):
            base = world.memory(first + math.prod(shape) + 5, dtype)
            world.do(fastinit, "dirac_", base[first:-5].view(shape), groups)
    assert world.gpu.launched(*[1] * len(world.steps))
    world.check()


@each_dtype
def test_sparse(dtype: torch.dtype, world: World) -> None:
    shapes = ((1, 1, 0.0), (1, 5, 1.0), (40, 30, 0.1), (33, 257, 0.5), (300, 17, 0.95), (7, 1, 0.3))
    for first in (0, 1):
        for rows, columns, sparsity in shapes:
            base = world.memory(first + rows * columns, dtype)
            world.do(fastinit, "sparse_", base[first:].view(rows, columns), sparsity, 0.3, by=0)
    assert world.gpu.launched(*[1] * len(world.steps))
    world.check()


# ---- parameters ----------------------------------------------------------------------------------

# from, to, and how many of 40,000 elements at least are `from` because they were to be `to`
BOUNDS: list[tuple[float, float, dict[torch.dtype, int]]] = [
    (0.0, 1.0, {BF16: 40, F16: 2}),
    (1000.0, 1000.7, {F32: 1}),
    (0.1, 0.3, {BF16: 20, F16: 2}),  # none of them, nor their difference, is in the dtype
    (-0.333, 0.777, {BF16: 20, F16: 2}),
    (256.0, 257.0, {BF16: 40_000, F16: 2000}),  # bfloat16 has no 257
    (8388600.0, 8388608.0, {F32: 1000}),
    (2.0**52, 2.0**52 + 4, {F64: 4000}),
    (-29000.0, 29000.0, {BF16: 20, F16: 2}),
    (-1e-7, 3e-7, {BF16: 20, F16: 1000}),  # float16's smallest numbers
    *((2.5, 2.5, {}), (0.3, 0.3, {}), (-0.0, -0.0, {}), (0.0, -0.0, {}), (-0.0, 0.0, {})),
    (-1.0, -0.0, {BF16: 20, F16: 2}),
]


@two_dtypes
def test_bounds(dtype: torch.dtype, world: World) -> None:
    for a, b, least in BOUNDS:
        if dtype is F16 and b > 3e4:  # more than fastinit takes
            a, b = a / 2**40, b / 2**40
        t = world.memory(40_000, dtype)
        world.do(fastinit, "uniform_", t, a, b, by=1)
        if world.gpu.is_gpu:
            assert int((t == torch.tensor(a, dtype=dtype)).sum()) >= least.get(dtype, 0), (a, b)
    assert world.gpu.launched(*[1] * len(world.steps))
    world.check()


@only_simulated
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=NAMES.get)
@pytest.mark.parametrize(
    ("name", "args", "words"),
    [("uniform_", (-1.0, 2.0), {2: -1}), ("normal_", (-7.0, 3.0), {2: -7, 3: -7})],
)
def test_greatest_word(name: str, args: tuple, words: dict, dtype: torch.dtype, gpu: Gpu) -> None:
    """The third word of block 14,964 of thread 16 is 1 as a float32: uniform_ makes it `from`, and
    the two numbers that normal_ takes from it and the next word are zeros."""
    world = World(gpu, (7, 4 * 14_964))
    t = world.memory(4 * gpu.threads, dtype)
    world.do(fastinit, name, t, *args, by=0)
    found = t[16 :: gpu.threads].tolist()
    assert {i: x for i, x in enumerate(found) if x == args[0]} == words
    world.check()


NORMALS = [
    *((0.0, 1.0), (0.0, 0.02), (1e4, 1e-3), (-3e4, 3e4), (3.0, 0.0), (0.1, 0.0), (1.0, 1e-12)),
    *((0.0, 1e-7), (1e-8, 1e-6), (1e-30, 1e-38), (0.0, 1e-40), (0.0, 1e-44), (-1e37, 1e37)),
    *((1e-300, 1e-290), (12345.678, 0.1)),
]


@each_dtype
def test_mean_and_std(dtype: torch.dtype, world: World) -> None:
    for mean, std in NORMALS:
        if dtype is F16 and max(abs(mean), std) > 3e4:
            mean, std = mean / 1e33, std / 1e33
        t = world.memory(2 * world.gpu.threads + 99, dtype)
        world.do(fastinit, "normal_", t, mean, std, by=2)
    assert world.gpu.launched(*[1] * len(world.steps))
    world.check()


@each_dtype
def test_signs_of_zeros(dtype: torch.dtype, gpu: Gpu) -> None:
    """z * 0 - 0 keeps the sign of z; a bound or a constant that is -0 stays so."""
    z, t = gpu.full(1000, dtype=dtype), gpu.full(1000, dtype=dtype)
    for tensor, std in ((z, 1.0), (t, 0.0)):
        fastinit.normal_(tensor, -0.0, std, generator=gpu.generator(At(5, 4)))
    assert (t == 0).all()
    assert torch.equal(t.signbit(), z.signbit())
    assert 400 < z.signbit().sum() < 600
    for value in (-0.0, 0.0):
        for first in (0, 1):
            c = gpu.full(5000, dtype=dtype)[first:]
            fastinit.constant_(c, value)
            assert bool(c.signbit().all()) == bool(c.signbit().any()) == (str(value) == "-0.0")


@each_dtype
def test_constants(dtype: torch.dtype, world: World) -> None:
    for value in (1 / 3, -7e-6, 2.0**-149, 6e-8, 65519.99 / 2.5, 1e37, -3, 5e-324):
        if dtype is F16 and value > 3e4:
            value /= 1e33
        for first, n in ((0, 1), (0, 16384), (3, 16384), (1, 33), (7, 8200)):
            world.do(fastinit, "constant_", world.memory(n + first + 9, dtype)[first:-9], value)
    world.check()


TRUNCATED = [
    *((0.0, 1.0, -2.0, 2.0), (0.3, 0.5, 0.1, 0.9)),
    (0.0, 1.0, -0.4, 0.4),  # 31 % are inside
    (1.0, 2.0, 0.0, 2e4),  # bounds on one side only
    (-1e-3, 1e-3, -0.0015, 1.0),
    (0.0, 1.0, -1.001, 1.003),  # not in 16 bits
]


@each_dtype
def test_truncated(dtype: torch.dtype, world: World) -> None:
    """And against the model's own two ways of it."""
    gpu, n = world.gpu, 6 * world.gpu.threads + 77
    close = {F32: 2e-6, F64: 1e-13, BF16: 2.0**-7, F16: 2.0**-10}[dtype]
    for args in TRUNCATED:
        if gpu.sim is None:
            world.do(fastinit, "trunc_normal_", world.memory(n, dtype), *args, by=1)
            continue
        for name in ("trunc_normal_", "erfinv"):
            g = world.generators[1]
            state = State(g.initial_seed(), g.get_offset())
            world.do(fastinit, name, world.memory(n, dtype), *args, by=1)
            if name == "erfinv":
                values = m.trunc_normal_erfinv(n, NAMES[dtype], *args, state, SMALL)
            else:
                values, draws = m.trunc_normal(n, NAMES[dtype], *args, state, SMALL)
                assert draws >= 3
            assert g.get_offset() == state.offset
            # Two correct ways can be a unit of the dtype apart, where a tie is near.
            found = world.steps[-1][1].to(F64).numpy()
            np.testing.assert_allclose(found, values, rtol=close, atol=close * args[1])
            assert dtype in (F32, F64) or np.mean(found == values) > 0.999
    world.check()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        *(("uniform_", (1.0, 0.0)), ("normal_", (0.0, -1.0)), ("eye_", ())),
        *[("trunc_normal_", (0.0, 1.0, -0.01, 0.02))] * REJECTS,  # which proposes uniform values
        *(("uniform_", (0.0, math.nan)), ("normal_", (0.0, math.inf)), ("constant_", (math.nan,))),
    ],
)
def test_errors_and_odd_parameters_are_torchs(name: str, args: tuple, gpu: Gpu) -> None:
    seen = []
    for module in (gpu.torch, fastinit):
        gpu.place_defaults()
        t = gpu.full(300)
        _, failure, warned = attempt(getattr(module, name), t, *args)
        seen.append({"failure": failure, "warned": warned, "t": gpu.values(t), **gpu.states()})
    gpu.assert_same(seen[0], seen[1], name)


# ---- conversions ---------------------------------------------------------------------------------


def codes(x: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    found = np.empty(x.size, np.uint16), np.empty(x.size, np.uint16)
    x = np.ascontiguousarray(x)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, *found)]
    walker().round_all(pointers[0], ctypes.c_uint64(x.size), *pointers[1:])
    return found


def test_conversions() -> None:
    """torch's own, of all that is near a 16-bit number or half-way between two, and of any bits."""
    every = np.arange(1 << 16, dtype=np.uint32)
    halves = every.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    brains = every << 16
    steps = (0, 1, -1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0x2000)
    near = [(x.astype(np.int64) + step) & 0xFFFFFFFF for x in (halves, brains) for step in steps]
    tiny = np.arange(0, 2**-13, 2.0**-27, dtype=np.float32)  # ties of float16's subnormals
    tiny = np.concatenate([tiny, np.nextafter(tiny, np.float32(1)), np.nextafter(tiny, -tiny - 1)])
    rng = np.random.default_rng(0)
    patterns = np.concatenate(
        [*near, tiny.view(np.uint32), (-tiny).view(np.uint32), rng.integers(0, 2**32, 3_000_000)]
    ).astype(np.uint32)
    x = patterns.view(np.float32)
    x = x[~np.isnan(x)]
    assert x.size > 4_000_000
    for found, dtype in zip(codes(x), (BF16, F16)):
        expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
        wrong = np.flatnonzero(found != expected)
        assert not wrong.size, (x[wrong[0]].item().hex(), found[wrong[0]], expected[wrong[0]])


# ---- words and normals of a real GPU -------------------------------------------------------------


def sample(n: int, threads: int) -> np.ndarray:
    """Indices: the first and last of every part that one of torch's threads' outputs fills, and
    many others."""
    edges = np.add.outer(np.arange(0, n + threads, threads), np.arange(-3, 4)).ravel()
    chosen = np.concatenate([edges, [n - 1], np.random.default_rng(1).integers(0, n, 60_000)])
    return np.unique(chosen[(chosen >= 0) & (chosen < n)])


@only_hardware
@each_dtype
def test_words(dtype: torch.dtype, gpu: Gpu) -> None:
    """torch.rand on this GPU is what the model of its generator says, exactly."""
    for seed, offset in POSITIONS:
        for n in (1, 257, gpu.threads - 1, gpu.threads + 1, 8 * gpu.threads + 3):
            g, state = gpu.generator(At(seed, offset)), State(seed % 2**64, offset)
            index = sample(n, gpu.threads)
            drawn = torch.rand(n, dtype=dtype, device=gpu.here, generator=g).cpu()
            values = m.uniform(n, NAMES[dtype], 0.0, 1.0, state, gpu.model, at=index)
            model = torch.from_numpy(values).to(dtype)
            assert torch.equal(bits(drawn[torch.from_numpy(index)]), bits(model)), (seed, n)
            assert g.get_offset() == state.offset, (seed, n)


@only_hardware
@pytest.mark.parametrize(("dtype", "bound"), [(F32, 2.0**-19), (F64, 2.0**-47)], ids=str)
def test_normals_are_near_the_model(dtype: torch.dtype, bound: float, gpu: Gpu) -> None:
    """float32, as a part of the distance from 0 before the sine or cosine: the hardware's sine and
    cosine are off by 2^-21 for their table and by as much for the reduction of the angle, and
    roundings; float64: some units in the last place of the largest."""
    for at in (START, At(*POSITIONS[-3])):
        n = 8 * gpu.threads + 3
        drawn = fastinit.normal_(
            torch.empty(n, dtype=dtype, device=gpu.here), generator=gpu.generator(at)
        )
        index, name = sample(n, gpu.threads), NAMES[dtype]
        start = State(at.seed % 2**64, at.offset), State(at.seed % 2**64, at.offset)
        model = m.normal(n, name, 0.0, 1.0, start[0], gpu.model, rounded=False, at=index)
        difference = np.abs(drawn.double().cpu().numpy()[index] - model)
        if dtype is F32:
            blocks, output = m.words(n, name, start[1], gpu.model, at=index)
            word = blocks[np.arange(len(index)), output & 2].astype(np.float32)
            unit = (word * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
            difference /= np.maximum(np.sqrt(-2 * np.log(unit)), 0.01)
        assert difference.max() < bound


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bit_normals_are_rounded_float32(dtype: torch.dtype, gpu: Gpu) -> None:
    n = (gpu.threads + 7) // 16 * 16  # the CPU draws the last few again
    wide, narrow = (
        fastinit.normal_(gpu.full(n, dtype=d), generator=gpu.generator()) for d in (F32, dtype)
    )
    assert torch.equal(bits(wide.to(dtype)), bits(narrow))
