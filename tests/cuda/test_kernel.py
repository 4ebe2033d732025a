# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernel's body on the host against the model: every element, every store, every offset.

Uniforms and constants are compared bit for bit. Of normals the model gives an interval, at whose
ends its exact value is rounded to the dtype; they are mostly one value in 16 bits:

* float32 and 16 bits, from the same float32 uniform and angle: log, sine and cosine are within an
  ulp (a relative 2^-23, of which the root halves the logarithm's), root and product within half an
  ulp, so z is within 5 * 2^-24 of itself. mean + std * z is one rounding, the dtype another.
* float64: the angle is a rounded product with a rounded pi, at most 2 pi * 1.5e-16 off; sine,
  cosine and log are within an ulp, root and product within half. The radius is at most 8.66, which
  makes 1.3e-14 here and 0.7e-14 in the model: z is within 2e-14. Then half an ulp each.

The host's erfinv is within 1e-15 * (1 + |y|) of the model's; the steps after it are monotonic.
"""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from numpy.typing import NDArray
from torch import Tensor

import fastinit
from fastinit import execute
from fastinit.core import build, geometry, laws
from fastinit.core import fill as fill_
from fastinit.cuda import fills as cuda_fills
from tests.support import cuda_model as m
from tests.support.compare import BF16, DTYPES, F16, F32, F64
from tests.support.cuda_host import Generator, Simulation, simulated, walker
from tests.support.cuda_model import A100, H200, RTX4090, SMALL, T4, Gpu, State

NAMES = {F32: "float32", F64: "float64", BF16: "bfloat16", F16: "float16"}
NAN = float("nan")
T = 1024  # threads of SMALL's grid
SIZES = [
    *(1, 2, 15, 16, 17, 255, 256, 257),
    T - 1,
    T,
    T + 1,
    4 * T - 1,
    4 * T,
    4 * T + 1,
    8 * T + 3,
]
Interval = tuple[NDArray[np.float64], NDArray[np.float64]]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


# ---- what the model says


def uniforms(n: int, name: str, args: tuple, state: State, gpu: Gpu) -> Interval:
    values = m.uniform(n, name, *args, state, gpu).astype(np.float64)
    return values, values


def normals(n: int, name: str, args: tuple, state: State, gpu: Gpu) -> Interval:
    mean, std = args
    if name == "float64":
        exact = m.normal(n, name, mean, std, state, gpu)
        error = 2e-14 * std + 2.0**-52 * np.abs(exact)
        return exact - error, exact + error
    exact = m.normal(n, name, mean, std, state, gpu, rounded=False)
    mean = float(np.float32(mean))
    error = 5.01 * 2.0**-24 * np.abs(exact - mean) + 2.0**-51 * abs(mean)  # the rest: float64's own
    low, high = m.round_to(exact - error, name), m.round_to(exact + error, name)
    return low.astype(np.float64), high.astype(np.float64)


def inverses(n: int, name: str, args: tuple, state: State, gpu: Gpu) -> Interval:
    mean, std, a, b = args
    real = m.DTYPES[name].real
    below, above = ((1 + math.erf((x - mean) / std / math.sqrt(2.0))) / 2 for x in (a, b))
    y = m.erfinv(m.uniform(n, name, 2 * below - 1, 2 * above - 1, state, gpu))
    ends = []
    for sign in (-1, 1):
        x = m.round_to(y + sign * 1e-15 * (1 + np.abs(y)), name)
        x = m.round_to(x * real(std * math.sqrt(2.0)), name)
        x = m.round_to(np.clip(m.round_to(x + real(mean), name), real(a), real(b)), name)
        ends.append(x.astype(np.float64))
    return ends[0], ends[1]


Law = Callable[[int, str, tuple, State, Gpu], Interval]
LAWS: dict[str, Law] = {"uniform_": uniforms, "normal_": normals, "erfinv": inverses}


def drawn(law: Law, t: Tensor, args: tuple, state: State, gpu: Gpu) -> NDArray[np.float64]:
    """Ends of the intervals of t's elements, in the order of its indices: (2, numel)."""
    name = NAMES[t.dtype]
    parts = m.pieces(t.shape, t.stride(), t.element_size())
    if len(parts) > 1:
        state.offset += m.increment(t.numel(), name, gpu)
    memory = np.full((2, geometry.span(t)), NAN)
    for start, dims in parts:
        at = start + m.positions(dims)
        memory[:, at] = law(at.size, name, args, state, gpu)
    order = torch.arange(memory.shape[1]).as_strided(t.shape, t.stride()).reshape(-1).numpy()
    return memory[:, order]


def rejected(t: Tensor, args: tuple, state: State, gpu: Gpu) -> tuple[NDArray[np.float64], int]:
    """trunc_normal_ as torch has it, with how many tensors it draws: all but the first are new."""
    low, high = (float(m.round_to(x, NAMES[t.dtype])) for x in args[2:])
    values = np.full((2, t.numel()), NAN)
    pending = np.ones(t.numel(), bool)
    draws = 0
    while pending.any():
        new = drawn(normals, t if draws == 0 else torch.empty_like(t), args[:2], state, gpu)
        inside = (new >= low) & (new <= high)
        assert not (pending & (inside[0] != inside[1])).any(), "too close: take another seed"
        values[:, pending] = new[:, pending]
        pending &= ~inside[0]
        draws += 1
    return values, draws


# ---- what is compared


@dataclass
class Memory:
    """A storage of the simulated GPU, and what the model says is in it."""

    base: Tensor
    ends: NDArray[np.float64] = field(init=False)
    written: NDArray[np.int64] = field(init=False)  # how often each element
    version: int = 0

    def __post_init__(self) -> None:
        self.ends = np.full((2, self.base.numel()), NAN)
        self.written = np.zeros(self.base.numel(), np.int64)


Step = tuple[str, Tensor, tuple, int]


class World:
    """Generators and memory: fastinit's, and the model's of the same calls one by one."""

    def __init__(self, sim: Simulation, *positions: tuple[int, int]) -> None:
        self.sim = sim
        self.generators = [Generator(*p) for p in positions] + [sim.default]
        self.states = [State(g.seed & (2**64 - 1), g.offset) for g in self.generators]
        self.steps: list[Step] = []
        self.memories: dict[int, Memory] = {}
        self._torchs = torch.get_rng_state()  # sparse_ draws from it

    def memory(self, n: int, dtype: torch.dtype) -> Tensor:
        base = self.sim.watch(torch.full((n,), NAN, dtype=dtype))
        self.memories[base.data_ptr()] = Memory(base, version=base._version)
        return base

    def do(self, into: Any, name: str, t: Tensor, *args: Any, by: int = -1) -> None:
        """Call or record it; by -1 is the GPU's default generator."""
        self.steps.append((name, t, args, by))
        generator: Any = None if by == -1 else self.generators[by]
        if name == "erfinv":
            fill = build.trunc_erfinv(t, *args, generator)
            assert fill is not None
            law = laws.Law("trunc_normal", args)
            into.add([fill], law) if isinstance(into, fastinit.Plan) else execute.run([fill])
        elif name in ("uniform_", "normal_", "trunc_normal_", "sparse_"):
            getattr(into, name)(t, *args, generator=generator)
        else:
            getattr(into, name)(t, *args)

    def _model(self, name: str, t: Tensor, args: tuple, by: int) -> None:
        state, gpu, bumps = self.states[by], self.sim.gpu, 1
        if name == "trunc_normal_":
            ends, draws = rejected(t, args, state, gpu)
            bumps += draws > 1
        elif name == "sparse_":
            rows, columns = t.shape
            ends = drawn(normals, t, (0.0, args[1]), state, gpu)
            for column in range(columns):
                zeros = torch.randperm(rows)[: math.ceil(args[0] * rows)].numpy()
                ends[:, zeros * columns + column] = 0
            bumps += columns
        elif name in LAWS:
            ends = drawn(LAWS[name], t, args, state, gpu)
            bumps = 5 if name == "erfinv" else 1
        else:
            theirs = torch.full(t.shape, NAN, dtype=t.dtype)
            before = theirs._version
            getattr(torch_init, name)(theirs, *args)
            bumps = theirs._version - before
            ends = np.stack([theirs.to(F64).reshape(-1).numpy()] * 2)
        memory = self.memories[t.untyped_storage().data_ptr()]
        places = torch.arange(len(memory.written))
        at = places.as_strided(t.shape, t.stride(), t.storage_offset()).reshape(-1).numpy()
        memory.ends[:, at] = ends
        memory.written[at] += 1
        memory.version += bumps

    def check(self, once: bool = True, runs: int = 1) -> None:
        """Values, places, generators and versions. `once`: no memory was asked for twice."""
        after = torch.get_rng_state()
        torch.set_rng_state(self._torchs)
        for _ in range(runs):
            for step in self.steps:
                self._model(*step)
        assert [g.offset for g in self.generators] == [s.offset for s in self.states]
        assert torch.equal(after, torch.get_rng_state())
        for memory in self.memories.values():
            what = f"{memory.base.dtype} of {len(memory.written)}: element "
            (low, high), found = memory.ends, memory.base.to(F64).numpy()
            wrong = ~((low <= found) & (found <= high)) & ~(np.isnan(low) & np.isnan(found))
            signs = np.signbit(memory.ends)
            wrong |= (signs[0] == signs[1]) & (signs[0] != np.signbit(found)) & ~np.isnan(low)
            for i in np.flatnonzero(wrong)[:1]:
                pytest.fail(f"{what}{i} is {found[i]!r}, not {low[i]!r} to {high[i]!r}; "
                            f"{wrong.sum()} are wrong")  # fmt: skip
            stores = self.sim.stores(memory.base).reshape(len(found), -1)
            times = memory.written if once else np.minimum(memory.written, stores[:, 0])
            assert (stores == times[:, None]).all(), (
                f"{what}{np.argwhere(stores != times[:, None])}"
            )
            assert memory.base._version == memory.version


@pytest.fixture
def small() -> Iterator[World]:
    with simulated(SMALL) as sim:
        yield World(sim, (5, 12), (2**40 + 3, 0), (2**64 - 1, 4000))


CALLS: list[tuple[str, tuple]] = [
    ("uniform_", (-0.3, 0.7)),
    ("normal_", (0.1, 1.5)),
    ("trunc_normal_", (0.2, 1.0, -1.5, 1.25)),
    ("trunc_normal_", (0.0, 0.02, -2.0, 2.0)),
    ("erfinv", (0.2, 1.0, -1.5, 1.25)),
    ("constant_", (-0.7,)),
    ("zeros_", ()),
    ("ones_", ()),
]
each_call = pytest.mark.parametrize(("name", "args"), CALLS, ids=str)
VECTORS = {"uniform_", "normal_", "constant_", "zeros_", "ones_"}  # made of 16-byte stores


def per_vector(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


# ---- sizes and grids


@each_dtype
@each_call
def test_sizes(name: str, args: tuple, dtype: torch.dtype, small: World) -> None:
    for n in SIZES:
        small.do(fastinit, name, small.memory(n, dtype), *args, by=0)
    vectors = walker().count_vectors()
    in_vectors = name in VECTORS or args == (0.0, 0.02, -2.0, 2.0)  # no draw can be rejected
    in_vectors = in_vectors and dtype is not F64
    assert vectors == (sum(n // per_vector(dtype) for n in SIZES) if in_vectors else 0)
    assert [fills for fills, _ in small.sim.launches] == [1] * len(SIZES)
    small.check()


@each_dtype
@pytest.mark.parametrize("gpu", [H200, A100, RTX4090, T4], ids=["H200", "A100", "RTX4090", "T4"])
def test_gpus(gpu: Gpu, dtype: torch.dtype) -> None:
    threads = m.threads_of(10**9, gpu)
    assert threads == {H200: 270_336, A100: 221_184, RTX4090: 196_608, T4: 40_960}[gpu]
    with simulated(gpu) as sim:
        world = World(sim, (2**33 + 1, 4))
        for name, args, n in (
            ("uniform_", (0.0, 1.0), threads - 1),
            ("uniform_", (-1.0, 1.0), 4 * threads + 1),
            ("normal_", (0.0, 0.02), threads + 1),
            ("trunc_normal_", (0.0, 1.0, -2.0, 2.0), 1000),
        ):
            world.do(fastinit, name, world.memory(n, dtype), *args, by=0)
        world.check()


def printed(t: Tensor) -> list[float]:
    return [round(x, 4) for x in t.tolist()]


@pytest.mark.parametrize(
    ("gpu", "seed", "offset", "name", "shape", "answers"),
    [
        (H200, 0, 0, "uniform_", (6,), {0: [0.3990, 0.5167, 0.0249, 0.9401, 0.9459, 0.7967]}),
        (H200, 0, 4, "uniform_", (4,), {0: [0.9722, 0.7910, 0.4690, 0.3300]}),
        (H200, 0, 0, "normal_", (6,), {0: [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797]}),
        (H200, 42, 0, "normal_", (3,), {0: [0.1940, 2.1614, -0.1721]}),
        (
            *(Gpu(28, 1536), 42, 0, "normal_", (64, 2048)),
            {
                0: [0.1940, 2.1614, -0.1721],
                2045: [1.4540, -2.7733, -0.8932],
                61 * 2048: [-0.4861, 0.3358, 1.0578],
                62 * 2048 + 2045: [-0.6297, -1.1112, -0.4091],
                63 * 2048 + 2045: [-0.4841, 1.2850, -0.0282],
            },
        ),
    ],
)
def test_published_answers(
    gpu: Gpu, seed: int, offset: int, name: str, shape: tuple, answers: dict[int, list[float]]
) -> None:
    with simulated(gpu) as sim:
        t = sim.watch(torch.empty(shape))
        getattr(fastinit, name)(t, generator=Generator(seed, offset))
        for start, answer in answers.items():
            assert printed(t.view(-1)[start:][: len(answer)]) == answer


CARRY = 4 * (2**32 - 2)  # three trips from here pass the counter's first word


@each_dtype
@pytest.mark.parametrize("offset", [0, 4, CARRY, CARRY + 4, CARRY + 8, 4 * (2**61 + 3)])
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**63 + 5, -1])
def test_seeds_and_offsets(seed: int, offset: int, dtype: torch.dtype) -> None:
    with simulated(SMALL) as sim:
        world = World(sim, (seed, offset))
        world.do(fastinit, "uniform_", world.memory(8 * T + 3, dtype), -1.0, 1.0, by=0)
        assert world.generators[0].offset == offset + 4 * (5 if dtype is F64 else 3)
        recorded = fastinit.Plan()
        for name, args in CALLS[:5]:  # the second and later ones count from a sum or a slot
            world.do(recorded, name, world.memory(4 * T + 3, dtype), *args, by=0)
        recorded.run()
        world.check()


# ---- alignment and layout


@each_dtype
@each_call
def test_unaligned(name: str, args: tuple, dtype: torch.dtype, small: World) -> None:
    """Parts of larger memory, of which only constants and those that begin at 16 bytes are made of
    vectors."""
    cuts = [(1, 0), (3, 5), (2, 1), (4, 0), (5, 3), (7, 9), (8, 8), (9, 1), (15, 2), (16, 7)]
    expected = 0
    for n in (20, 263, 4 * T + 23):
        for first, rest in cuts:
            base = small.memory(first + n + rest, dtype)
            small.do(fastinit, name, base[first : first + n], *args, by=1)
            step = per_vector(dtype)
            if name in VECTORS - {"uniform_", "normal_"}:
                expected += (first + n) // step - -(-first // step)
            elif first % step == 0:
                expected += n // step
    in_vectors = (name in VECTORS or args == (0.0, 0.02, -2.0, 2.0)) and dtype is not F64
    assert walker().count_vectors() == (expected if in_vectors else 0)
    small.check()


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "every second column": lambda b: b.view(-1, 8)[:, 1::2],
    "some columns": lambda b: b.view(-1, 48)[:, 5:12],
    "one column": lambda b: b.view(-1, 6)[:, 4],
    "every third": lambda b: b[2::3],
    "transposed": lambda b: b.view(96, -1)[:, 3:].t(),
    "three dimensions": lambda b: b.view(4, 12, -1)[::2, 1:9, 5:25].permute(1, 2, 0),
    "four dimensions": lambda b: b.view(6, 8, 4, -1)[1:5, ::3, :3, 2:27].permute(3, 0, 2, 1),
    "ones between": lambda b: b.view(96, 1, -1, 1)[:, :, 1::2],
    "part of channels_last": lambda b: b.view(4, 6, 8, -1).permute(0, 3, 1, 2)[:, 1:-2, :, 1:7],
}
DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda b: b.view(96, -1).t(),
    "permuted": lambda b: b.view(4, 12, -1).permute(1, 2, 0),
    "channels_last": lambda b: b.view(4, 6, 8, -1).permute(0, 3, 1, 2),
    "channels_last_3d": lambda b: b.view(4, 6, 4, 2, -1).permute(0, 4, 1, 2, 3),
    "odd strides of ones": lambda b: b.as_strided((1, 9600, 1), (7, 1, 0)),
}


@each_dtype
@pytest.mark.parametrize("layout", STRIDED)
def test_strided(layout: str, dtype: torch.dtype, small: World) -> None:
    for name, args in CALLS:
        t = STRIDED[layout](small.memory(9600, dtype))
        assert geometry.layout_of(t)[0] == "strided"
        small.do(fastinit, name, t, *args, by=2)
    assert len(small.sim.launches) == len(CALLS)
    assert walker().count_vectors() == 0
    small.check()


@each_dtype
@pytest.mark.parametrize("layout", DENSE)
def test_dense(layout: str, dtype: torch.dtype, small: World) -> None:
    for name, args in CALLS:
        small.do(fastinit, name, DENSE[layout](small.memory(9600, dtype)), *args, by=2)
    assert len(small.sim.launches) == len(CALLS)
    if dtype is not F64:
        assert walker().count_vectors() == 6 * 9600 // per_vector(dtype)
    small.check()


# ---- eye_, dirac_, sparse_


@each_dtype
@pytest.mark.parametrize("first", [0, 1, 3])
def test_diagonals(first: int, dtype: torch.dtype, small: World) -> None:
    for rows, columns in ((1, 1), (1, 9), (9, 1), (33, 18), (18, 33), (300, 300), (2, 9000)):
        base = small.memory(first + rows * columns + 5, dtype)
        small.do(fastinit, "eye_", base[first:-5].view(rows, columns))
    for shape, groups in (
        *(((8, 4, 5), 1), ((8, 4, 5), 2), ((8, 4, 5), 8), ((3, 7, 1), 1), ((24, 5, 6), 3)),
        *(((12, 4, 3, 3), 3), ((12, 20, 2, 5), 2), ((6, 7, 1, 1), 1), ((64, 33, 4, 7), 1)),
        *(((6, 3, 3, 3, 3), 2), ((5, 9, 2, 4, 1), 5), ((10, 9, 2, 1, 3), 2)),
    ):
        base = small.memory(first + math.prod(shape) + 5, dtype)
        small.do(fastinit, "dirac_", base[first:-5].view(shape), groups)
    assert {fills for fills, _ in small.sim.launches} == {1}
    assert len(small.sim.launches) == len(small.steps)
    small.check()


@each_dtype
def test_sparse(dtype: torch.dtype, small: World) -> None:
    shapes = ((1, 1, 0.0), (1, 5, 1.0), (40, 30, 0.1), (33, 257, 0.5), (300, 17, 0.95), (7, 1, 0.3))
    for first in (0, 1):
        for rows, columns, sparsity in shapes:
            base = small.memory(first + rows * columns, dtype)
            small.do(fastinit, "sparse_", base[first:].view(rows, columns), sparsity, 0.3, by=0)
    assert len(small.sim.launches) == len(small.steps)
    small.check()


# ---- parameters


@each_dtype
@pytest.mark.parametrize(
    ("a", "b", "least"),  # how many of 40,000 elements are `from` because they were to be `to`
    [
        (0.0, 1.0, {BF16: 40, F16: 2}),
        (1000.0, 1000.7, {F32: 1}),
        (0.1, 0.3, {BF16: 20, F16: 2}),  # none of them, nor their difference, is in the dtype
        (-0.333, 0.777, {BF16: 20, F16: 2}),
        (256.0, 257.0, {BF16: 40_000, F16: 2000}),  # bfloat16 has no 257
        (8388600.0, 8388608.0, {F32: 1000}),
        (2.0**52, 2.0**52 + 4, {F64: 4000}),
        (-29000.0, 29000.0, {BF16: 20, F16: 2}),
        (-1e-7, 3e-7, {BF16: 20, F16: 1000}),  # float16's smallest numbers
        (2.5, 2.5, {}),
        (0.3, 0.3, {}),
        (-0.0, -0.0, {}),
        (0.0, -0.0, {}),
        (-0.0, 0.0, {}),
        (-1.0, -0.0, {BF16: 20, F16: 2}),
    ],
)
def test_bounds(a: float, b: float, least: dict, dtype: torch.dtype, small: World) -> None:
    if dtype is F16 and b > 3e4:  # more than fastinit takes
        a, b = a / 2**40, b / 2**40
    t = small.memory(40_000, dtype)
    small.do(fastinit, "uniform_", t, a, b, by=1)
    assert len(small.sim.launches) == 1
    assert int((t == torch.tensor(a, dtype=dtype)).sum()) >= least.get(dtype, 0)
    small.check()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=NAMES.get)
@pytest.mark.parametrize(
    ("name", "args", "words"),
    [("uniform_", (-1.0, 2.0), {2: -1}), ("normal_", (-7.0, 3.0), {2: -7, 3: -7})],
)
def test_greatest_word(name: str, args: tuple, words: dict, dtype: torch.dtype) -> None:
    """The third word of block 14,964 of thread 16 is 1 as a float32: uniform_ makes it `from`, and
    the two numbers that normal_ takes from it and the next word are zeros."""
    with simulated(SMALL) as sim:
        world = World(sim, (7, 4 * 14_964))
        t = world.memory(4 * T, dtype)
        world.do(fastinit, name, t, *args, by=0)
        found = t[16::T].tolist()
        assert {i: x for i, x in enumerate(found) if x == args[0]} == words
        world.check()


@each_dtype
@pytest.mark.parametrize(
    ("mean", "std"),
    [
        *((0.0, 1.0), (0.0, 0.02), (1e4, 1e-3), (-3e4, 3e4), (3.0, 0.0), (0.1, 0.0), (1.0, 1e-12)),
        *((0.0, 1e-7), (1e-8, 1e-6), (1e-30, 1e-38), (0.0, 1e-40), (0.0, 1e-44), (-1e37, 1e37)),
        *((1e-300, 1e-290), (12345.678, 0.1)),
    ],
)
def test_mean_and_std(mean: float, std: float, dtype: torch.dtype, small: World) -> None:
    if dtype is F16 and max(abs(mean), std) > 3e4:
        mean, std = mean / 1e33, std / 1e33
    small.do(fastinit, "normal_", small.memory(2 * T + 99, dtype), mean, std, by=2)
    assert len(small.sim.launches) == 1
    small.check()


@each_dtype
def test_signs_of_zeros(dtype: torch.dtype, small: World) -> None:
    """z * 0 - 0 keeps the sign of z; a bound or a constant that is -0 stays so."""
    z, t = small.memory(T, dtype), small.memory(T, dtype)
    for tensor, std in ((z, 1.0), (t, 0.0)):
        small.generators[0].offset = 4
        fastinit.normal_(tensor, -0.0, std, generator=small.generators[0])
    assert (t == 0).all()
    assert torch.equal(t.signbit(), z.signbit())
    assert 400 < z.signbit().sum() < 600
    for value in (-0.0, 0.0):
        for first in (0, 1):
            c = small.memory(5000, dtype)[first:]
            fastinit.constant_(c, value)
            assert bool(c.signbit().all()) == bool(c.signbit().any()) == (str(value) == "-0.0")


@each_dtype
@pytest.mark.parametrize("value", [1 / 3, -7e-6, 2.0**-149, 6e-8, 65519.99 / 2.5, 1e37, -3, 5e-324])
def test_constants(value: float, dtype: torch.dtype, small: World) -> None:
    if dtype is F16 and value > 3e4:
        value /= 1e33
    for first, n in ((0, 1), (0, 16384), (3, 16384), (1, 33), (7, 8200)):
        small.do(fastinit, "constant_", small.memory(n + first + 9, dtype)[first:-9], value)
    small.check()


@each_dtype
@pytest.mark.parametrize(
    "args",
    [
        (0.0, 1.0, -2.0, 2.0),
        (0.3, 0.5, 0.1, 0.9),
        (0.0, 1.0, -0.4, 0.4),  # 31 % are inside
        (1.0, 2.0, 0.0, 2e4),  # bounds on one side only
        (-1e-3, 1e-3, -0.0015, 1.0),
        (0.0, 1.0, -1.001, 1.003),  # not in 16 bits
    ],
)
def test_truncated(args: tuple, dtype: torch.dtype, small: World) -> None:
    """And against the model's own two ways of it."""
    name, n = NAMES[dtype], 6 * T + 77
    t, u = small.memory(n, dtype), small.memory(n, dtype)
    small.do(fastinit, "trunc_normal_", t, *args, by=1)
    state = State(small.generators[1].seed)
    values, draws = m.trunc_normal(n, name, *args, state, SMALL)
    assert draws >= 3
    assert small.generators[1].offset == state.offset
    u_state = State(state.seed, state.offset)
    small.do(fastinit, "erfinv", u, *args, by=1)
    inverse = m.trunc_normal_erfinv(n, name, *args, u_state, SMALL)
    assert small.generators[1].offset == u_state.offset
    # How far apart two correct ways can be: a unit of the dtype, where a tie is near.
    close = {F32: 2e-6, F64: 1e-13, BF16: 2.0**-7, F16: 2.0**-10}[dtype]
    for found, expected in ((t, values), (u, inverse)):
        found = found.to(F64).numpy()
        np.testing.assert_allclose(found, expected, rtol=close, atol=close * args[1])
        if dtype in (BF16, F16):
            assert np.mean(found == expected) > 0.999
    small.check()


# ---- plans


def mixture(world: World, recorded: fastinit.Plan, count: int, rejecting: bool = False) -> None:
    """Some of everything, each in memory of its own."""
    calls = [c for c in CALLS if rejecting or c[0] != "trunc_normal_" or c[1][1] == 0.02]
    calls += [("sparse_", (0.3, 0.2)), ("eye_", ()), ("dirac_", (2,))]
    sizes = (3000, 40, 9 * T + 24, 480, 2 * T)
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


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("count", [1, 2, 24, 25, 26, 60, 300])
def test_plan(count: int, backwards: bool, small: World) -> None:
    recorded = fastinit.Plan()
    mixture(small, recorded, count)
    small.sim.backwards = backwards
    assert small.sim.launches == []
    recorded.run()
    masks = sum(name == "sparse_" for name, *_ in small.steps)
    assert [fills for fills, _ in small.sim.launches] == [count]
    assert small.sim.copies == masks + (count > 25)
    small.check()


def test_plan_with_rejections(small: World) -> None:
    recorded = fastinit.Plan()
    mixture(small, recorded, 90, rejecting=True)
    recorded.run()
    assert [fills for fills, _ in small.sim.launches] == [90]
    small.check()


@pytest.mark.parametrize("most", [1, 2, 7, 20])
def test_more_fills_than_a_launch_takes(
    most: int, small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_fills, "_MOST_FILLS", most)
    recorded = fastinit.Plan()
    mixture(small, recorded, 20, rejecting=True)
    recorded.run()
    assert [fills for fills, _ in small.sim.launches] == [
        min(most, 20 - at) for at in range(0, 20, most)
    ]
    small.check()


@pytest.mark.parametrize("count", [3, 8, 9, 17])
@pytest.mark.parametrize("backwards", [False, True])
def test_generators(count: int, backwards: bool) -> None:
    """A launch takes eight; fills between them need none."""
    with simulated(SMALL) as sim:
        world = World(sim, *((1000 * i, 4 * i) for i in range(count)))
        sim.backwards = backwards
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
            if i not in seen and len(seen) == 8:
                launches, seen = launches + 1, set()
            seen.add(i)
        assert len(sim.launches) == launches
        world.check()


@pytest.mark.parametrize(
    "names", [("uniform_", "normal_"), ("normal_", "ones_"), ("eye_", "erfinv")]
)
@pytest.mark.parametrize("backwards", [False, True])
def test_overwritten(names: tuple[str, str], backwards: bool, small: World) -> None:
    """What is overwritten completely is not done, but its numbers count; in part, it is."""
    arguments = dict(CALLS[:2] + CALLS[4:])
    small.sim.backwards = backwards
    first, second = names
    base = small.memory(6000, F32)
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
        other = small.memory(99, F32)
        before = len(small.sim.launches)
        one = one.view(20, -1) if first == "eye_" else one
        small.do(recorded, first, one, *arguments.get(first, ()), by=0)
        small.do(recorded, second, two, *arguments.get(second, ()), by=0)
        small.do(recorded, "uniform_", other, 0.0, 1.0, by=0)
        recorded.run()
        done = [fills for fills, _ in small.sim.launches[before:]]
        together = one.data_ptr() + one.nbytes <= two.data_ptr()
        assert done == ([1, 2] if launches == 2 else [3] if together else [2])
    small.check(once=False)


def test_overwritten_sparse(small: World) -> None:
    """The CPU's generator moves on too."""
    base, other = small.memory(6000, F32), small.memory(600, F32)
    recorded = fastinit.Plan()
    small.do(recorded, "sparse_", base[:600].view(20, 30), 0.5, 0.1, by=0)
    small.do(recorded, "uniform_", base, 0.0, 1.0, by=0)
    small.do(recorded, "sparse_", other.view(20, 30), 0.5, 0.1, by=0)
    recorded.run()
    assert [fills for fills, _ in small.sim.launches] == [2]
    small.check(once=False)


def test_rejected_is_not_left_out(small: World) -> None:
    """How much it draws is only known when it is done; a kernel for what follows waits for it."""
    base, other = small.memory(3000, F32), small.memory(3000, F32)
    recorded = fastinit.Plan()
    small.do(recorded, "trunc_normal_", base, 0.0, 1.0, -1.0, 1.0, by=0)
    small.do(recorded, "uniform_", base, -1.0, 1.0, by=0)
    small.do(recorded, "uniform_", base, 0.0, 1.0, by=1)
    small.do(recorded, "normal_", other, 0.0, 1.0, by=0)
    recorded.run()
    assert [fills for fills, _ in small.sim.launches] == [1, 2]
    small.check(once=False)
    assert set(small.sim.stores(base)) == {2}


@each_dtype
def test_rejections_in_a_row(dtype: torch.dtype, small: World) -> None:
    """Later fills of a generator begin where the rejections end; another's go on meanwhile."""
    recorded = fastinit.Plan()
    order = [0, 0, 1, 0, 1, 1, -1, 0, 2, -1, 0, 1]
    for i, by in enumerate(order):
        spread = 0.45 + 0.25 * i
        kind = i % 4
        n = (300, 5 * T + 3, T, 2 * T + 1)[i * 3 % 4]
        if kind < 2:
            t = small.memory(n, dtype)
            small.do(recorded, "trunc_normal_", t, 0.0, 1.0, -spread, spread, by=by)
        name, args = CALLS[(0, 1, 4)[i % 3]]
        for _ in range(1 + kind):
            small.do(recorded, name, small.memory(n + 5, dtype), *args, by=by)
    recorded.run()
    assert len(small.sim.launches) == 1
    assert small.sim.launches[0][0] == len(small.steps)
    small.check()


def test_rejections_alone(small: World) -> None:
    recorded = fastinit.Plan()
    for i in range(30):
        t = small.memory(1 + 97 * i, DTYPES[i % 4])
        args = (0.0, 1.0, -2.0, 2.0)
        small.do(recorded, "trunc_normal_", t[i % 2 :] if i else t, *args, by=i % 3)
    recorded.run()
    assert [fills for fills, _ in small.sim.launches] == [30]
    small.check()


@pytest.mark.parametrize("rejecting", [False, True])
@pytest.mark.parametrize("count", [9, 40])
def test_plan_again(count: int, rejecting: bool, small: World) -> None:
    """It draws on; the table of fills stays, but for what sparse_ makes anew."""
    recorded = fastinit.Plan()
    for i in range(count):
        calls = [c for c in CALLS if rejecting or c[0] != "trunc_normal_"]
        name, args = calls[i % len(calls)]
        small.do(recorded, name, small.memory(100 * i + 7, DTYPES[i % 4]), *args, by=i % 3)
    for _ in range(3):
        recorded.run()
    assert [fills for fills, _ in small.sim.launches] == [count] * 3
    assert small.sim.copies == (count > 25)
    small.check(runs=3)


@pytest.mark.parametrize("count", [10, 40])
def test_sparse_plan_again(count: int, small: World) -> None:
    recorded = fastinit.Plan()
    mixture(small, recorded, count, rejecting=True)
    for _ in range(2):
        recorded.run()
    assert len(small.sim.launches) == 2
    small.check(runs=2)


def test_drawn_ahead() -> None:
    """Written in another order than drawn; a launch takes eight seeds."""
    makers: list[tuple[str, tuple, Callable[..., fill_.Fill | None]]] = [
        (*CALLS[0], build.uniform),
        (*CALLS[1], build.normal),
        (*CALLS[4], build.trunc_erfinv),
        (*CALLS[5], lambda t, value, by: build.constant(t, value)),
        ("sparse_", (0.375, 0.2), lambda t, _, std, by: build.sparse(t, std, 3, by)),
    ]
    with simulated(SMALL) as sim:
        world = World(sim, *((77 * i, 4 * i) for i in range(20)))
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
            waiting = fill_.Drawn(fill, extent, stream=7)  # drawing says it as well
            if fill.generator is not None:
                waiting.state, waiting.mask = cuda_fills.draw_ahead(fill)
            fill.tensor = geometry.NO_TENSOR[t.dtype]
            fills.append((waiting, t.untyped_storage()))
            world.steps.append((name, t, args, by))
            world.memories[base.data_ptr()].version -= fill.bumps  # capture.py counts them
        random.Random(3).shuffle(fills)
        assert sim.launches == []
        cuda_fills.run_ahead(fills)
        assert sum(count for count, _ in sim.launches) == 40
        assert 3 <= len(sim.launches) < 20
        world.check()


# ---- tensors that torch splits


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


@pytest.fixture(params=[700, 3000, 9000])
def split(
    request: pytest.FixtureRequest, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More elements than so many are too many for torch's 32-bit indexing."""
    for module, name in ((geometry, "MOST_AT_ONCE"), (m, "LIMIT")):
        assert getattr(module, name) == 2**31 - 1
        monkeypatch.setattr(module, name, request.param * dtype.itemsize)


@pytest.mark.usefixtures("split")
@each_dtype
@pytest.mark.parametrize("layout", SPLIT)
def test_split(layout: str, dtype: torch.dtype, small: World) -> None:
    """In one plan, so that each counts on what those before have drawn."""
    recorded = fastinit.Plan()
    expected = 0
    for name, args in [*CALLS, CALLS[0]]:
        t = SPLIT[layout](small.memory(12_000, dtype))
        parts = m.pieces(t.shape, t.stride(), t.element_size())
        assert len(parts) > 1
        rejects = args == (0.2, 1.0, -1.5, 1.25) and name == "trunc_normal_"
        if rejects and layout in APART:
            continue  # see below
        small.do(recorded, name, t, *args, by=0)
        whole = name in ("constant_", "zeros_", "ones_") and layout not in APART
        expected += 1 if whole else len(parts)
    recorded.run()
    assert [fills for fills, _ in small.sim.launches] == [expected]
    small.check()


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("dtype", [F32], ids=NAMES.get)
@pytest.mark.parametrize("layout", APART)
def test_split_rejections(layout: str, dtype: torch.dtype, small: World) -> None:
    """From the second on torch draws into a dense tensor: split in other places, or not at all."""
    t, args = SPLIT[layout](small.memory(12_000, dtype)), (0.2, 1.0, -1.5, 1.25)
    if build.trunc_normal(t, *args, small.generators[0]) is not None:  # or torch does it
        small.do(fastinit, "trunc_normal_", t, *args, by=0)
        small.check()


@pytest.mark.usefixtures("split")
@each_dtype
def test_split_sparse(dtype: torch.dtype, small: World) -> None:
    small.do(fastinit, "sparse_", small.memory(12_000, dtype).view(30, 400), 0.4, 0.2, by=0)
    small.check()


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


def fake(t: Tensor, op: str = "uniform") -> fill_.Fill:
    layout = geometry.layout_of(t)
    assert layout is not None
    generator: Any = None if op == "constant" else Generator()
    return fill_.Fill(t, op, 0.0, 1.0, generator, *layout, t.numel(), device=0)


@dataclass
class Described:
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


@pytest.mark.parametrize("gpu", [H200, T4], ids=["H200", "T4"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=NAMES.get)
@pytest.mark.parametrize("layout", HUGE)
def test_real_limit(layout: str, dtype: torch.dtype, gpu: Gpu) -> None:
    """No memory, only what the kernel would be told of it."""
    t = HUGE[layout](dtype)
    name, size = NAMES[dtype], dtype.itemsize
    parts = m.pieces(t.shape, t.stride(), size)
    layout_is_dense = geometry.layout_of(t)[1] == 0
    with simulated(gpu):
        fill, found = fake(t), described(t)
        ours = cuda_fills.pieces(fill)
        assert 4 * cuda_fills.blocks_drawn(fill, ours) == m.draw_increment(
            t.shape, t.stride(), name, gpu
        )
    assert len(ours) == len(found) == len(parts)
    block, tile = 100, 50
    if len(parts) > 1:
        block += m.increment(t.numel(), name, gpu) // 4
    for piece, told, (start, dims) in zip(ours, found, parts):
        items = math.prod(n for n, _ in dims)
        assert (piece.start, piece.items) == (start, items)
        threads = m.threads_of(items, gpu)
        trips = m.increment(items, name, gpu) // 4
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


# ---- conversions


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


# ---- anything


@pytest.mark.parametrize("seed", range(30))
def test_random_plan(seed: int, small: World) -> None:
    """Any calls on any views of a few storages, overlapping or not, by any generators."""
    rng = random.Random(seed)
    recorded = fastinit.Plan()
    rejecting = seed % 3 > 0
    small.sim.backwards = not rejecting
    shared = rng.random() < 0.5
    bases: list[Tensor] = []
    for _ in range(rng.choice([5, 20, 45])):
        if not (bases and shared) or rng.random() < 0.6:
            n = rng.choice([9600, 9600, 96 * rng.randint(1, 100)])
            bases.append(small.memory(n, rng.choice(DTYPES)))
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
            t = rng.choice([*STRIDED.values(), *DENSE.values()])(t)
        if name == "trunc_normal_" and not rejecting:
            args = (0.0, 0.02, -2.0, 2.0)
        small.do(recorded, name, t, *args, by=rng.choice([-1, 0, 1, 2]))
    runs = rng.choice([1, 1, 2])
    for _ in range(runs):
        recorded.run()
    assert shared or len(small.sim.launches) == runs
    small.check(once=not shared, runs=runs)
