# SPDX-License-Identifier: BSD-3-Clause
"""Calls of any kind on any memory of a GPU, against torch's, one by one.

On a real GPU torch does the same calls on other memory, and all bits have to be equal. On the
simulated one the model of its generator says what is to be there: uniforms and constants bit for
bit, and how often each byte is stored. Of normals it gives an interval, at whose ends its exact
value is rounded to the dtype; they are mostly one value in 16 bits:

* float32 and 16 bits, from the same float32 uniform and angle: log, sine and cosine are within an
  ulp (a relative 2^-23, of which the root halves the logarithm's), root and product within half an
  ulp, so z is within 5 * 2^-24 of itself. mean + std * z is one rounding, the dtype another.
* float64: the angle is a rounded product with a rounded pi, at most 2 pi * 1.5e-16 off; sine,
  cosine and log are within an ulp, root and product within half. The radius is at most 8.66, which
  makes 1.3e-14 here and 0.7e-14 in the model: z is within 2e-14. Then half an ulp each.

The host's erfinv is within 1e-15 * (1 + |y|) of the model's; the steps after it are monotonic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from numpy.typing import NDArray
from torch import Tensor

import fastinit
from fastinit import execute
from fastinit.core import build, geometry
from fastinit.core.laws import Law
from tests.support import cuda_model as m
from tests.support.compare import BF16, F16, F32, F64, bits, takes_generator
from tests.support.cuda_gpu import START, At, Gpu
from tests.support.cuda_model import State

NAMES = {F32: "float32", F64: "float64", BF16: "bfloat16", F16: "float16"}
NAN = float("nan")
Interval = tuple[NDArray[np.float64], NDArray[np.float64]]

# trunc_normal_ by rejection; with bounds that no draw can reach; as torch before 2.12 has it.
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
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of 9,600 elements
    "every second column": lambda b: b.view(-1, 8)[:, 1::2],
    "one column": lambda b: b.view(-1, 6)[:, 4],
    "every third": lambda b: b[2::3],
    "rows, transposed": lambda b: b.view(96, -1)[:, 3:].t(),
    "three dimensions": lambda b: b.view(4, 12, -1)[::2, 1:9, 5:25].permute(1, 2, 0),
    "four dimensions": lambda b: b.view(6, 8, 4, -1)[1:5, ::3, :3, 2:27].permute(3, 0, 2, 1),
    "ones between": lambda b: b.view(96, 1, -1, 1)[:, :, 1::2],
    "part of channels_last": lambda b: b.view(4, 6, 8, -1).permute(0, 3, 1, 2)[:, 1:-2, :, 1:7],
    "parameter's columns": lambda b: torch.nn.Parameter(b).detach().view(-1, 48)[:, 5:12],
    # Dense ones: their memory has no gaps.
    "transposed": lambda b: b.view(96, -1).t(),
    "permuted": lambda b: b.view(4, 12, -1).permute(1, 2, 0),
    "channels_last": lambda b: b.view(4, 6, 8, -1).permute(0, 3, 1, 2),
    "channels_last_3d": lambda b: b.view(4, 6, 4, 2, -1).permute(0, 4, 1, 2, 3),
    "odd strides of ones": lambda b: b.as_strided((1, 9600, 1), (7, 1, 0)),
    "parameter": torch.nn.Parameter,
}
GAPS = list(VIEWS)[:9]

# ---- what the model says


def uniforms(n: int, name: str, args: tuple, state: State, gpu: m.Gpu) -> Interval:
    values = m.uniform(n, name, *args, state, gpu).astype(np.float64)
    return values, values


def normals(n: int, name: str, args: tuple, state: State, gpu: m.Gpu) -> Interval:
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


def inverses(n: int, name: str, args: tuple, state: State, gpu: m.Gpu) -> Interval:
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


Ends = Callable[[int, str, tuple, State, m.Gpu], Interval]
LAWS: dict[str, Ends] = {"uniform_": uniforms, "normal_": normals, "erfinv": inverses}


def drawn(law: Ends, t: Tensor, args: tuple, state: State, gpu: m.Gpu) -> NDArray[np.float64]:
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


def rejected(t: Tensor, args: tuple, state: State, gpu: m.Gpu) -> tuple[NDArray[np.float64], int]:
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


class Memory:
    """A storage of the GPU, and what the model says is in it."""

    def __init__(self, base: Tensor) -> None:
        self.base, self.start = base, base._version

    def forget(self) -> None:
        self.version = self.start
        self.ends = np.full((2, self.base.numel()), NAN)
        self.written = np.zeros(self.base.numel(), np.int64)  # how often each element


Step = tuple[str, Tensor, tuple, int]


class World:
    """Generators and memory of a GPU, and the calls that were made, to be made again by torch."""

    def __init__(self, gpu: Gpu, *positions: tuple[int, int]) -> None:
        self.gpu = gpu
        self._starts = [At(*p) for p in positions]
        self.generators = [gpu.generator(at) for at in self._starts]
        gpu.place_defaults()
        self.steps: list[Step] = []
        self.memories: dict[int, Memory] = {}
        self._torchs = torch.get_rng_state()  # sparse_ draws from it

    def memory(self, n: int, dtype: torch.dtype = F32) -> Tensor:
        base = self.gpu.full(n, dtype=dtype, value=NAN)
        if self.gpu.sim is not None:
            self.gpu.sim.watch(base)
        self.memories[base.data_ptr()] = Memory(base)
        return base

    def do(self, into: Any, name: str, t: Tensor, *args: Any, by: int = -1) -> None:
        """Call or record it; by -1 is the GPU's default generator."""
        generator: Any = None if by == -1 else self.generators[by]
        if name == "erfinv":
            if self.gpu.sim is None:  # torch has one of the two ways
                return
            fill = build.trunc_erfinv(t, *args, generator)
            assert fill is not None
            if isinstance(into, fastinit.Plan):
                into.add([fill], Law("trunc_normal", args))
            else:
                execute.run([fill])
        elif takes_generator(name):
            assert getattr(into, name)(t, *args, generator=generator) is t
        else:
            assert getattr(into, name)(t, *args) is t
        self.steps.append((name, t, args, by))

    def check(self, once: bool = True, runs: int = 1) -> None:
        """Values, places, generators and versions. `once`: no memory was asked for twice."""
        if self.gpu.sim is None:
            self._check_with_torch(runs)
        else:
            self._check_with_model(once, runs)

    def _check_with_torch(self, runs: int) -> None:
        seen = {"generators": self.gpu.states(*self.generators)}
        theirs = {at: torch.full_like(memory.base, NAN) for at, memory in self.memories.items()}
        versions = {at: t._version for at, t in theirs.items()}
        for at, g in zip(self._starts, self.generators):
            at.place(g)
        START.place(self.gpu.default)
        torch.set_rng_state(self._torchs)
        for name, t, args, by in self.steps * runs:
            base = theirs[t.untyped_storage().data_ptr()]
            there = base.as_strided(t.shape, t.stride(), t.storage_offset())
            given = by >= 0 and takes_generator(name)
            options: Any = {"generator": self.generators[by]} if given else {}
            getattr(self.gpu.torch, name)(there, *args, **options)
        self.gpu.assert_same(self.gpu.states(*self.generators), seen["generators"], "generators")
        for at, memory in self.memories.items():
            what = f"{memory.base.dtype} of {len(memory.base)}"
            assert torch.equal(bits(theirs[at]), bits(memory.base)), what
            assert memory.base._version - memory.start == theirs[at]._version - versions[at], what

    def _model(self, name: str, t: Tensor, args: tuple, state: State) -> None:
        gpu, bumps = self.gpu.model, 1
        name, args = law_of(name, t, args)
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

    def _check_with_model(self, once: bool, runs: int) -> None:
        after, sim = torch.get_rng_state(), self.gpu.sim
        assert sim is not None
        torch.set_rng_state(self._torchs)
        for memory in self.memories.values():
            memory.forget()
        states = [State(at.seed & (2**64 - 1), at.offset) for at in (*self._starts, START)]
        for name, t, args, by in self.steps * runs:
            self._model(name, t, args, states[by])
        offsets = [g.get_offset() for g in (*self.generators, self.gpu.default)]
        assert offsets == [s.offset for s in states]
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
            stores = sim.stores(memory.base).reshape(len(found), -1)
            times = memory.written if once else np.minimum(memory.written, stores[:, 0])
            assert (stores == times[:, None]).all(), (
                f"{what}{np.argwhere(stores != times[:, None])}"
            )
            assert memory.base._version == memory.version


def law_of(name: str, t: Tensor, args: tuple) -> tuple[str, tuple]:
    """The call of uniform_ or normal_ that a function of torch.nn.init comes to."""
    if name.startswith("xavier"):
        fans = torch_init._calculate_fan_in_and_fan_out(t)
        std = (args[0] if args else 1.0) * math.sqrt(2.0 / sum(fans))
    elif name.startswith("kaiming"):
        a, mode, nonlinearity = (*args, *(0, "fan_in", "leaky_relu")[len(args) :])
        fan = torch_init._calculate_correct_fan(t, mode)
        std = torch_init.calculate_gain(nonlinearity, a) / math.sqrt(fan)
    else:
        return name, args or {"uniform_": (0.0, 1.0), "normal_": (0.0, 1.0)}.get(name, args)
    if name.endswith("normal_"):
        return "normal_", (0.0, std)
    return "uniform_", (-math.sqrt(3.0) * std, math.sqrt(3.0) * std)


@pytest.fixture
def world(gpu: Gpu) -> World:
    return World(gpu, (5, 12), (2**40 + 3, 0), (2**64 - 1, 4000))
