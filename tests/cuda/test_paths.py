# SPDX-License-Identifier: BSD-3-Clause
"""The Python side of the CUDA support: plans, blocks, streams, proofs; cuda_host.py is the GPU.

What torch would leave comes from the model of its CUDA generator, and from torch itself on the CPU
where no random number is involved (versions, diagonals, the rows that sparse_ chooses).
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastinit
from fastinit import execute, probe
from fastinit.capture import operators
from fastinit.core import build, geometry, kernels, recording, source
from fastinit.core.fill import Fill
from fastinit.cpu import fills as cpu_fills
from fastinit.cuda import fills as cuda_fills
from fastinit.cuda import qr as cuda_qr
from fastinit.cuda import runtime
from tests.support import cuda_model
from tests.support.compare import BF16, DTYPES, F16, F32, F64
from tests.support.cuda_host import Generator, Simulation, simulated
from tests.support.cuda_model import H200, SMALL, State
from tests.support.layouts import box
from tests.support.threads import in_threads

Call = tuple[str, torch.Tensor, tuple[Any, ...]]

# Of normals: the host's functions against exact ones, relative to the standard deviation.
TOLERANCE = {F32: 4e-6, F64: 1e-12, BF16: 2.0**-5, F16: 2.0**-8}
VERDICT = probe.verdict  # the simulation replaces it


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    with simulated(SMALL) as simulation:
        here = probe.verdict  # of any dtype; a real proof finds none for integers

        def verdict(op: str, dtype: torch.dtype, *rest: Any) -> int | None:
            return here(op, dtype, *rest) if dtype in geometry.DTYPES else None

        monkeypatch.setattr(probe, "verdict", verdict)
        yield simulation
        monkeypatch.undo()  # before the simulation does: what a test has replaced may be of it


class Torch:
    """What torch would leave in memory and in the generator, call after call.

    Memory is as it is found when it is seen first, then as the calls make it.
    """

    def __init__(self, sim: Simulation, generator: Generator | None = None) -> None:
        self.generator = generator or sim.default
        self.gpu, self.state = sim.gpu, State(self.generator.seed, self.generator.offset)
        self.memory: dict[int, tuple[torch.Tensor, np.ndarray, np.ndarray]] = {}

    def know(self, *tensors: torch.Tensor) -> None:
        for t in tensors:
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.memory:
                flat = torch.empty(0, dtype=t.dtype).set_(storage)
                now = flat.double().numpy().copy()
                self.memory[storage.data_ptr()] = flat, now, np.zeros(now.size)

    def write(self, t: torch.Tensor, values: Any, tolerance: float = 0.0) -> None:
        self.know(t)
        _, expected, allowed = self.memory[t.untyped_storage().data_ptr()]
        places = torch.arange(expected.size).as_strided(t.shape, t.stride(), t.storage_offset())
        expected[places.numpy()] = np.broadcast_to(values, t.shape)
        allowed[places.numpy()] = tolerance

    def draw(self, kind: str, t: torch.Tensor, a: float, b: float) -> None:
        flat = np.full(1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())), np.nan)
        dtype = str(t.dtype)[6:]
        for place, values in cuda_model.fill(
            kind, t.shape, t.stride(), dtype, (a, b), self.state, self.gpu
        ):
            flat[place] = values
        scale = TOLERANCE[t.dtype] * (abs(a) + b) if kind == "normal" else 0.0
        self.write(t, torch.from_numpy(flat).as_strided(t.shape, t.stride()).numpy(), scale)

    def uniform_(self, t: torch.Tensor, a: float = 0.0, b: float = 1.0) -> None:
        self.draw("uniform", t, a, b)

    def orthogonal_(self, t: torch.Tensor, gain: float = 1.0, batch: int = 1) -> None:
        """The factor of each matrix, exactly; of normals that may be off in their last bits."""
        dtype = "float64" if t.dtype is F64 else "float32"
        normals = np.full(t.numel(), np.nan)
        for place, values in cuda_model.fill(
            "normal", (t.numel(),), (1,), dtype, (0.0, 1.0), self.state, self.gpu
        ):
            normals[place] = values
        rows = t.shape[0] if batch == 1 else t.shape[-2]
        made = []
        for a in normals.reshape(batch, rows, -1):
            wide = a.shape[0] < a.shape[1]
            q, r = np.linalg.qr(a.T if wide else a)
            q *= np.sign(np.diag(r))
            made.append(q.T if wide else q)
        tolerance = {F64: 1e-9, F32: 2e-4}.get(t.dtype, 1e-2) * abs(gain)
        self.write(t, gain * np.array(made).reshape(t.shape), tolerance)

    def normal_(self, t: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> None:
        self.draw("normal", t, mean, std)

    def constant_(self, t: torch.Tensor, value: float) -> None:
        self.write(t, float(torch.tensor(value, dtype=t.dtype)))

    def zeros_(self, t: torch.Tensor) -> None:
        self.write(t, 0.0)

    def ones_(self, t: torch.Tensor) -> None:
        self.write(t, 1.0)

    def kaiming_uniform_(self, t: torch.Tensor, *args: Any) -> None:
        bound = math.sqrt(3.0) * self._std(t, *args)
        self.uniform_(t, -bound, bound)

    def kaiming_normal_(self, t: torch.Tensor, *args: Any) -> None:
        self.normal_(t, 0.0, self._std(t, *args))

    def _std(
        self, t: torch.Tensor, a: float = 0, mode: Any = "fan_in", name: Any = "leaky_relu"
    ) -> float:
        gain = torch_init.calculate_gain(name, a)
        return gain / math.sqrt(torch_init._calculate_correct_fan(t, mode))

    def trunc_normal_(
        self, t: torch.Tensor, mean: float = 0, std: float = 1, a: float = -2, b: float = 2
    ) -> int:
        """How often the whole tensor is drawn. t is contiguous."""
        dtype, n = str(t.dtype)[6:], t.numel()
        values, draws = cuda_model.trunc_normal(n, dtype, mean, std, a, b, self.state, self.gpu)
        self.write(t, values.reshape(t.shape), TOLERANCE[t.dtype] * (abs(mean) + std))
        return draws

    def eye_(self, t: torch.Tensor) -> None:
        self.write(t, torch_init.eye_(torch.empty(t.shape, dtype=F64)).numpy())

    def dirac_(self, t: torch.Tensor, groups: int = 1) -> None:
        self.write(t, torch_init.dirac_(torch.empty(t.shape, dtype=F64), groups).numpy())

    def sparse_(self, t: torch.Tensor, sparsity: float, std: float = 0.01) -> None:
        """Its rows come from torch.default_generator, as it is now."""
        self.normal_(t, 0.0, std)
        mask = torch_init.sparse_(torch.empty(t.shape), sparsity, 1.0, torch.Generator())
        _, expected, _ = self.memory[t.untyped_storage().data_ptr()]
        places = torch.arange(expected.size).as_strided(t.shape, t.stride(), t.storage_offset())
        expected[places[mask == 0].numpy()] = 0.0

    def replay(self, calls: Iterable[Call]) -> None:
        for name, t, args in calls:
            getattr(self, name)(t, *args)

    def check(self) -> None:
        assert self.generator.offset == self.state.offset
        for flat, expected, allowed in self.memory.values():
            found = flat.double().numpy()
            with np.errstate(invalid="ignore"):  # what was there before may be anything
                same = np.abs(found - expected) <= allowed
            same |= (found == expected) | (np.isnan(found) & np.isnan(expected))
            wrong = np.flatnonzero(~same)
            assert not wrong.size, (
                f"{wrong.size} of {found.size} differ, first {wrong[0]}: "
                f"{found[wrong[0]]} instead of {expected[wrong[0]]}"
            )


def split_beyond(limit: int, patch: pytest.MonkeyPatch) -> None:
    """As if torch split tensors of more elements or bytes."""
    patch.setattr(geometry, "MOST_AT_ONCE", limit)
    patch.setattr(cuda_model, "LIMIT", limit)


def versions(tensors: Iterable[torch.Tensor]) -> list[int]:
    return [t._version for t in tensors]


def fills_of(launches: list[tuple[int, int]]) -> list[int]:
    return [fills for fills, _ in launches]


def record_calls(calls: Iterable[Call], into: fastinit.Plan | None = None) -> fastinit.Plan:
    made = into or fastinit.Plan()
    for name, t, args in calls:
        assert getattr(made, name)(t, *args) is t
    return made


def resnet(dtype: torch.dtype = F32) -> list[Call]:
    """161 tensors, as ResNet-50 has; the largest takes three trips of the small GPU."""
    calls: list[Call] = []
    for i in range(53):
        n, k = (64, 6) if i == 52 else (4 + i % 7, 1 + i % 3)
        calls += [
            ("kaiming_normal_", box(n, 4, k, k, dtype=dtype), (0, "fan_out", "relu")),
            ("ones_", box(n, dtype=dtype), ()),
            ("zeros_", box(n, dtype=dtype), ()),
        ]
    fc: list[Call] = [("kaiming_uniform_", box(40, 60, dtype=dtype), (math.sqrt(5),))]
    return [*calls, *fc, ("uniform_", box(40, dtype=dtype), (-0.1, 0.1))]


# ---- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_is_one_launch(dtype: torch.dtype, sim: Simulation) -> None:
    """Every byte is stored once a run, the numbers are torch's, and the next run draws on."""
    calls = resnet(dtype)
    tensors = [sim.watch(t) for _, t, _ in calls]
    assert len(tensors) == 161
    expected, before = Torch(sim), versions(tensors)
    expected.know(*tensors)
    made = record_calls(calls)
    expected.check()
    assert (sim.launches, sim.copies, versions(tensors)) == ([], 0, before)
    for run in range(1, 4):
        assert made.run() is None
        assert fills_of(sim.launches) == [161] * run
        expected.replay(calls)
        expected.check()
        assert versions(tensors) == [v + run for v in before]
        assert all((sim.stores(t) == run).all() for t in tensors)
    assert sim.copies == 1


def test_the_prepared_path_is_used_from_the_first_run_on(
    sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "run", lambda fills: pytest.fail("packed for one run only"))
    made = record_calls(resnet())
    assert made._prepared is None
    made.run()
    prepared = made._prepared
    assert prepared is not None
    monkeypatch.setattr(cuda_fills, "_descriptors", lambda *a: pytest.fail("packed again"))
    for _ in range(20):
        made.run()
    assert made._prepared is prepared
    assert (len(sim.launches), sim.copies) == (21, 1)


@pytest.mark.parametrize(("count", "copies"), [(25, 0), (26, 1)])
def test_few_fills_travel_in_the_arguments(count: int, copies: int, sim: Simulation) -> None:
    made = record_calls(("uniform_", box(10 + i), ()) for i in range(count))
    for _ in range(3):
        made.run()
    assert (fills_of(sim.launches), sim.copies) == ([count] * 3, copies)


def test_the_table_is_uploaded_for_each_stream(
    sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is asynchronous: only on its own stream is it known to be there."""
    made = record_calls(resnet())
    for stream, copies in ((7, 1), (8, 2), (8, 2), (7, 3)):
        monkeypatch.setattr(runtime, "stream_of", lambda device, s=stream: s)
        made.run()
        assert sim.copies == copies


VERSIONS: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = [
    ("uniform_", (30, 20), ()), ("normal_", (30, 20), ()), ("ones_", (30, 20), ()),
    ("eye_", (9, 5), ()), ("dirac_", (6, 4, 3), (2,)), ("dirac_", (3, 7, 3, 3), ()),
    ("sparse_", (30, 20), (0.3,)), ("sparse_", (5, 0), (0.3,)), ("xavier_normal_", (3, 4), ()),
    ("trunc_normal_", (50, 40), (0.0, 1.0, -0.9, 1.1)), ("trunc_normal_", (3,), (0.0, 0.02)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "args"), VERSIONS, ids=str)
@pytest.mark.parametrize("way", ["plan", "function", "block"])
def test_versions_are_counted_as_by_torch(
    way: str, name: str, shape: tuple, args: tuple, sim: Simulation
) -> None:
    theirs = torch.empty(shape)
    start = theirs._version
    getattr(torch_init, name)(theirs, *args)
    t, runs = torch.empty(shape), 3
    before, native = t._version, kernels.native_fills
    if way == "plan":
        made = record_calls([(name, t, args)])
        for _ in range(runs):
            made.run()
    elif way == "function":
        for _ in range(runs):
            getattr(fastinit, name)(t, *args)
    else:
        with fastinit.fused():
            t = torch.empty(shape)
            for _ in range(runs):
                getattr(torch_init, name)(t, *args)
    assert (kernels.native_fills > native) == (t.numel() > 0)
    assert t._version - before == runs * (theirs._version - start)


def test_versions_of_rejection_depend_on_the_values(sim: Simulation) -> None:
    """Two tensors of one launch: in one of them nothing was out of bounds."""
    calls: list[Call] = [
        ("trunc_normal_", box(4), (0.0, 1.0, -5.0, 5.0)),
        ("trunc_normal_", box(2000), (0.0, 1.0, -0.5, 0.7)),
        ("trunc_normal_", box(3000), (0.0, 1.0, -1.0, 1.0)),
    ]
    tensors = [t for _, t, _ in calls]
    expected, before = Torch(sim), versions(tensors)
    made, sums = record_calls(calls), [0, 0, 0]
    for run in range(1, 4):
        made.run()
        draws = [expected.trunc_normal_(t, *args) for _, t, args in calls]
        sums = [s + 1 + (n > 1) for s, n in zip(sums, draws)]
        assert draws[0] == 1 < draws[1]
        assert [v - b for v, b in zip(versions(tensors), before)] == sums
        expected.check()
        assert fills_of(sim.launches) == [3] * run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_after_rejection(dtype: torch.dtype, sim: Simulation) -> None:
    """The fills behind start where the rounds, known to the kernel only, have ended."""
    calls: list[Call] = [
        ("uniform_", box(5000, dtype=dtype), ()),
        ("trunc_normal_", box(30, 101, dtype=dtype), (0.0, 1.0, -1.0, 0.5)),
        ("normal_", box(900, dtype=dtype), ()),
        ("trunc_normal_", box(1, dtype=dtype), (0.1, 1.0, -0.4, 0.6)),
        ("trunc_normal_", box(7000, dtype=dtype), (0.1, 0.5, -0.4, 0.6)),
        ("uniform_", box(9000, dtype=dtype), (1.0, 3.0)),
        ("zeros_", box(10, dtype=dtype), ()),
    ]
    expected, made = Torch(sim), record_calls(calls)
    for run in range(1, 3):
        made.run()
        expected.replay(calls)
        expected.check()
        assert fills_of(sim.launches) == [7] * run


def test_sparse_in_a_plan(sim: Simulation) -> None:
    """Each run draws other rows, from the CPU's generator, in the place of the call."""
    w, v, b = box(40, 30), box(9, 5), box(11)
    calls: list[Call] = [("sparse_", w, (0.35, 0.1)), ("normal_", b, ()), ("sparse_", v, (0.5,))]
    expected, made = Torch(sim), record_calls(calls)
    masks = []
    for run in range(1, 4):
        state = torch.get_rng_state()
        made.run()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        expected.replay(calls)
        expected.check()
        assert torch.equal(after, torch.get_rng_state())
        assert (len(sim.launches), sim.copies) == (run, 2 * run)
        masks.append(w == 0)
    assert masks[0].sum(0).tolist() == [14] * 30
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("way", ["plan", "block"])
def test_sparse_that_is_overwritten_draws_its_rows(way: str, sim: Simulation) -> None:
    w, b = box(40, 30), box(11)
    calls: list[Call] = [("sparse_", w, (0.35,)), ("uniform_", b, ()), ("normal_", w, ())]
    expected, made = Torch(sim), record_calls(calls)
    for run in range(1, 3):
        state = torch.get_rng_state()
        if way == "plan":
            made.run()
        else:
            fastinit.init_model_(nn.ParameterList([w, b]), in_block(calls))
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        expected.replay(calls)
        expected.check()
        assert torch.equal(after, torch.get_rng_state())
        assert (fills_of(sim.launches), sim.copies) == ([2] * run, 0)


def in_block(calls: list[Call]) -> Callable[[nn.Module], None]:
    def fn(m: nn.Module) -> None:
        for name, t, args in calls:
            getattr(torch_init, name)(t, *args)

    return fn


@pytest.mark.parametrize("way", ["plan", "function", "block"])
def test_sparse_that_torch_splits(
    way: str, sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part has its own part of the mask."""
    split_beyond(5000, monkeypatch)
    for dtype in DTYPES:
        w = box(70, 90, dtype=dtype)
        calls: list[Call] = [("sparse_", w, (0.35, 0.5))]
        expected, state = Torch(sim), torch.get_rng_state()
        if way == "plan":
            record_calls(calls).run()
        elif way == "function":
            fastinit.sparse_(w, 0.35, 0.5)
        else:
            fastinit.init_model_(nn.ParameterList([w]), in_block(calls))
        torch.set_rng_state(state)
        expected.replay(calls)
        expected.check()


def test_a_row_on_top_is_a_second_launch(sim: Simulation) -> None:
    table, other = box(30, 8), box(50)
    calls: list[Call] = [
        ("normal_", table, ()), ("zeros_", table[3], ()), ("uniform_", other, ()),
        ("uniform_", table[:, 1:3], ()),
    ]  # fmt: skip
    expected, made = Torch(sim), record_calls(calls)
    for _ in range(2):
        made.run()
        expected.replay(calls)
        expected.check()
    assert fills_of(sim.launches) == [1, 2, 1] * 2


def test_what_is_overwritten_is_not_launched_but_counts(sim: Simulation) -> None:
    w, b = sim.watch(box(3000)), sim.watch(box(200))
    calls: list[Call] = [
        ("normal_", w, ()), ("uniform_", b, ()), ("uniform_", w, ()), ("normal_", w, ()),
        ("normal_", b[:100], ()), ("zeros_", b, ()),
    ]  # fmt: skip
    expected, before = Torch(sim), versions([w, b])
    made = record_calls(calls)
    made.run()
    expected.replay(calls)
    expected.check()
    assert sum(fills_of(sim.launches)) < len(calls)
    assert (sim.stores(w) == 1).all()
    assert versions([w, b]) == [v + 3 for v in before]


def test_everything_overwritten_by_nothing_random(sim: Simulation) -> None:
    """A source whose fills are all left out still moves on."""
    w = box(100)
    made = record_calls([("normal_", w, ()), ("zeros_", w, ())])
    made.run()
    made.run()
    assert fills_of(sim.launches) == [1, 1]
    assert sim.default.offset == 16
    assert (w == 0).all()


def test_generators_of_a_plan(sim: Simulation) -> None:
    """More than fit into one launch; each goes on by itself, the default one too."""
    generators = [None, *(Generator(seed=s, offset=4 * s) for s in range(1, 11))]
    order = [*range(11), 3, 0, 10, 3]
    tensors = [box(5 + 700 * i) for i in range(len(order))]
    expected = [Torch(sim, g) for g in generators]
    made = fastinit.Plan()
    for i, t in zip(order, tensors):
        made.normal_(t, 0.0, 0.5, generators[i])
    for _ in range(2):
        made.run()
        for i, t in zip(order, tensors):
            expected[i].normal_(t, 0.0, 0.5)
        for e in expected:
            e.check()
    assert len(sim.launches) == 2 * 2


MOVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "other": lambda t: setattr(t, "data", box(*t.shape)),
    "none": lambda t: setattr(t, "data", torch.empty(0)),
    "freed": lambda t: t.untyped_storage().resize_(0),
    "larger": lambda t: t.resize_(t.numel() + 4096),
}


@pytest.mark.parametrize("ran", [0, 1])
@pytest.mark.parametrize("move", MOVES)
def test_moved_memory_is_an_error(move: str, ran: int, sim: Simulation) -> None:
    w, b = box(1000), box(100)
    made = record_calls([("normal_", w, ()), ("uniform_", b, ())])
    for _ in range(ran):
        made.run()
    MOVES[move](b)
    expected = Torch(sim)
    expected.know(w)
    launches = len(sim.launches)
    with pytest.raises(RuntimeError, match="other memory"):
        made.run()
    assert len(sim.launches) == launches
    expected.check()


@pytest.mark.parametrize("ran", [0, 1])
def test_less_memory_at_the_same_address(ran: int, sim: Simulation) -> None:
    """A caching allocator gives out what was freed; the rest of it may be somebody else's."""
    memory = bytearray(4000)
    w = torch.frombuffer(memory, dtype=F32)
    old = StorageWeakRef(w.untyped_storage())
    made = record_calls([("uniform_", w, (1.0, 2.0))])
    for _ in range(ran):
        made.run()
    other = torch.frombuffer(memory, dtype=F32)[100:]
    other.fill_(13.0)
    w.data = torch.frombuffer(memory, dtype=BF16, count=200).view(F32)
    if old.expired():  # or nobody else gets this memory while the plan lives
        with pytest.raises(RuntimeError, match="other memory"):
            made.run()
        assert (other == 13.0).all()


@pytest.mark.parametrize("ran", [0, 1])
def test_a_model_that_moved_is_an_error(ran: int, sim: Simulation) -> None:
    """Though only a view of its tensor was recorded."""
    model = nn.Linear(4, 3)
    made = fastinit.record(model, lambda m: [m.weight.data[1].zero_(), m.bias.data.zero_()])
    for _ in range(ran):
        made.run()
    model.weight.data = box(3, 4)
    with pytest.raises(RuntimeError, match="other memory"):
        made.run()
    assert (model.weight == 13.0).all()


def test_recording_goes_on_after_a_run(sim: Simulation) -> None:
    calls = resnet()
    expected = Torch(sim)
    made = record_calls(calls[:80])
    made.run()
    expected.replay(calls[:80])
    record_calls(calls[80:], made)
    assert len(made) == 161
    for _ in range(2):
        made.run()
        expected.replay(calls)
        expected.check()
    assert (fills_of(sim.launches), sim.copies) == ([80, 161, 161], 2)


def test_calls_in_between_keep_their_place(sim: Simulation) -> None:
    """torch's own functions; before them the first fills are written, after them the others."""
    w, b, c = box(5, 9), box(3000), box(100)
    made = fastinit.Plan()
    made.uniform_(w)
    made.uniform_(b)
    made.constant_(w, torch.tensor(2.0))
    made.zeros_(w[0])
    made.normal_(c)
    expected = Torch(sim)
    for run in range(1, 3):
        made.run()
        expected.uniform_(w)
        expected.uniform_(b)
        expected.write(w, 2)
        expected.write(w[0], 0)
        expected.normal_(c)
        expected.check()
        assert fills_of(sim.launches) == [2, 2] * run
    made.uniform_(w)  # also after such a run
    made.run()
    assert w.min() >= 0
    assert w[0].max() > 0


def test_a_failing_call_leaves_what_comes_after_it(sim: Simulation) -> None:
    good, later = box(50), box(50)
    made = fastinit.Plan()
    made.uniform_(good)
    made.normal_(torch.ones(5, dtype=torch.int64))
    made.uniform_(later)
    expected = Torch(sim)
    expected.know(later)
    with pytest.raises(NotImplementedError, match="normal_kernel_cpu"):
        made.run()
    expected.uniform_(good)
    expected.check()


def test_layouts_in_a_plan(sim: Simulation) -> None:
    """Permuted, strided in up to four dimensions, and an offset in the storage."""
    base = box(4000)
    views = [
        base[3:63].view(6, 10).t(), base[100:1000].view(30, 30)[:, 4:11],
        base[1001:2001].view(10, 10, 10)[::2, ::3, 1::4],
        base[2002:3298].view(6, 6, 6, 6)[::2, :5, ::3, ::5],
    ]  # fmt: skip
    for dtype in DTYPES:
        own = [v.to(dtype) for v in views]  # dense by now
        here = [torch.full((4000,), 13.0, dtype=dtype).as_strided(v.shape, v.stride(), 1 + i)
                for i, v in enumerate(views)]  # fmt: skip
        names = itertools.cycle(["normal_", "uniform_", "zeros_"])
        calls: list[Call] = [(next(names), t, ()) for t in (*own, *here)]
        expected, made = Torch(sim), record_calls(calls)
        expected.know(*own, *here)
        made.run()
        expected.replay(calls)
        expected.check()


@pytest.mark.parametrize("way", ["plan", "function", "block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_torch_splits(
    dtype: torch.dtype, way: str, sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_beyond(5000, monkeypatch)
    make = {
        "dense": lambda: torch.empty(9001, dtype=dtype),
        "matrix": lambda: torch.empty(70, 90, dtype=dtype),
        "strided": lambda: torch.empty(130, 60, dtype=dtype)[:, 3:40],
        "permuted": lambda: torch.empty(30, 20, 10, dtype=dtype).permute(2, 0, 1),
    }
    expected = Torch(sim)
    for kind, (name, args) in itertools.product(
        make.values(), {"uniform_": (), "normal_": (0.5, 2.0), "constant_": (3.0,)}.items()
    ):
        t = kind().fill_(13.0)
        expected.know(t)
        if way == "plan":
            record_calls([(name, t, args)]).run()
        elif way == "function":
            getattr(fastinit, name)(t, *args)
        else:
            with fastinit.fused():
                t = kind()
                getattr(torch_init, name)(t, *args)
        getattr(expected, name)(t, *args)
        expected.check()
        expected.memory.clear()
    assert max(fills_of(sim.launches)) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_alone(dtype: torch.dtype, sim: Simulation) -> None:
    calls: list[Call] = [
        ("uniform_", box(5, 1000, dtype=dtype), (-1.0, 2.0)), ("normal_", box(99, dtype=dtype), ()),
        ("kaiming_normal_", box(9, 8, dtype=dtype), ()), ("eye_", box(70, 50, dtype=dtype), ()),
        ("dirac_", box(6, 4, 3, dtype=dtype), (2,)), ("constant_", box(5, dtype=dtype), (0.3,)),
        ("trunc_normal_", box(5000, dtype=dtype), (0.0, 0.7, -1.0, 1.0)),
    ]  # fmt: skip
    expected = Torch(sim)
    for name, t, args in calls:
        assert getattr(fastinit, name)(t, *args) is t
    expected.replay(calls)
    expected.check()
    assert fills_of(sim.launches) == [1] * len(calls)


# ---- blocks --------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers, a norm with buffers, and an embedding with a row of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 10, padding_idx=3)
        self.layers = nn.Sequential(*(nn.Linear(10, 10) for _ in range(8)))
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 600)


def gpt2(m: nn.Module) -> None:
    if isinstance(m, nn.Linear):
        torch_init.normal_(m.weight, std=0.02)
        torch_init.zeros_(m.bias)
    elif isinstance(m, nn.Embedding):
        torch_init.normal_(m.weight, std=0.02)
        m.weight.data[3].zero_()


def constructed(net: Net) -> list[Call]:
    """What the constructors do, in order."""
    calls: list[Call] = [("normal_", net.table.weight, ()), ("zeros_", net.table.weight[3], ())]
    for m in (*net.layers, net.head):
        bound = 1 / math.sqrt(10)
        calls += [
            ("kaiming_uniform_", m.weight, (math.sqrt(5),)), ("uniform_", m.bias, (-bound, bound)),
        ]  # fmt: skip
    n = net.norm
    calls += [("zeros_", n.running_mean, ()), ("ones_", n.running_var, ())]
    return [*calls, ("ones_", n.weight, ()), ("zeros_", n.bias, ())]


def as_gpt2(net: Net) -> list[Call]:
    calls: list[Call] = [
        ("normal_", net.table.weight, (0.0, 0.02)), ("zeros_", net.table.weight[3], ()),
    ]  # fmt: skip
    for m in (*net.layers, net.head):
        calls += [("normal_", m.weight, (0.0, 0.02)), ("zeros_", m.bias, ())]
    return calls


TENSORS = 1 + 2 * 8 + 4 + 2  # of Net that fills can go to


def test_a_block_is_one_launch(sim: Simulation) -> None:
    """Layers of ten elements wait as well; a row on top of a table comes after it."""
    expected = Torch(sim)
    with fastinit.fused() as report:
        net = Net()
        assert sim.launches == []
        assert sim.default.offset > expected.state.offset
    expected.replay(constructed(net))
    expected.check()
    assert fills_of(sim.launches) == [TENSORS, 1]
    elements = sum(t.numel() for t in (*net.parameters(), *net.buffers())) - 1  # a count of batches
    assert report.written_elements == elements + 10
    assert report.bytes == 4 * (elements + 10)
    assert report.early == []


def test_what_a_block_overwrites_is_not_launched(sim: Simulation) -> None:
    """The numbers of nn.Linear's own initialisation count all the same."""
    expected = Torch(sim)
    with fastinit.fused() as report:
        net = Net().apply(gpt2)
        before = versions(net.parameters())
        assert sim.launches == []
    expected.replay(constructed(net))
    expected.replay(as_gpt2(net))
    expected.check()
    assert fills_of(sim.launches) == [TENSORS, 1]
    assert versions(net.parameters()) == before
    again = sum(t.numel() for _, t, _ in as_gpt2(net)) + 20  # buffers are made full, then reset
    assert report.dropped_elements == again
    assert report.recorded_elements == report.written_elements + again


def test_init_model(sim: Simulation) -> None:
    """Of a model that is older; each byte is stored once, those of the padding row twice."""
    net = Net()
    expected, before = Torch(sim), versions(net.parameters())
    watched = {name: sim.watch(p.data) for name, p in net.named_parameters()}
    expected.know(*watched.values())
    fastinit.init_model_(net, gpt2)
    expected.replay(as_gpt2(net))
    expected.check()
    assert fills_of(sim.launches) == [1 + 2 * 9, 1]
    for name, t in watched.items():
        stores = np.full((*t.shape, 4), 0 if name.startswith("norm") else 1)
        if name == "table.weight":
            stores[3] = 2
        np.testing.assert_array_equal(sim.stores(t).reshape(stores.shape), stores)
    counts = [v - b for v, b in zip(versions(net.parameters()), before)]
    assert counts == [1, *[1] * 16, 0, 0, 1, 1]  # a write to .data counts elsewhere


def test_init_model_by_default(sim: Simulation) -> None:
    net = Net()
    expected = Torch(sim)
    fastinit.init_model_(net)
    expected.replay(constructed(net))
    expected.check()
    assert fills_of(sim.launches) == [TENSORS, 1]


def test_record(sim: Simulation) -> None:
    net = Net()
    expected, offset = Torch(sim), sim.default.offset
    expected.know(*net.parameters())
    before = versions(net.parameters())
    made = fastinit.record(net, gpt2)
    expected.check()
    assert (sim.launches, sim.default.offset) == ([], offset)
    assert versions(net.parameters()) == before
    for _ in range(3):
        made.run()
        expected.replay(as_gpt2(net))
        expected.check()
    assert sorted(fills_of(sim.launches)) == [1, 1, 1, 19, 19, 19]
    assert sim.copies == 0


def test_materialize(sim: Simulation) -> None:
    with torch.device("meta"):
        net = Net()
    assert sim.launches == []
    expected = Torch(sim)
    fastinit.materialize_(net)
    assert not any(t.is_meta for t in (*net.parameters(), *net.buffers()))
    expected.replay(constructed(net))
    expected.check()
    assert fills_of(sim.launches) == [TENSORS, 1]
    for dtype in (BF16, F64):
        with torch.device("meta"):
            net = Net()
        expected = Torch(sim)
        fastinit.materialize_(net, dtype=dtype)
        expected.replay(constructed(net))
        expected.check()


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.sum(), lambda w: w[2] + 1, lambda w: w.tolist(), lambda w: w.data.numpy(),
        lambda w: w[0, 1].item(), repr, lambda w: torch.equal(w, w), lambda w: w.data_ptr(),
        lambda w: w.add_(0.0),
    ],
    ids=["sum", "row", "tolist", "numpy", "item", "repr", "equal", "data_ptr", "add_"],
)  # fmt: skip
def test_a_read_writes_only_what_it_reads(
    read: Callable[[torch.Tensor], Any], sim: Simulation
) -> None:
    expected = Torch(sim)
    with fastinit.fused() as report:
        a, w, b = torch.empty(70), torch.empty(20, 30), torch.empty(5)
        a.normal_()
        w.uniform_()
        torch_init.ones_(b)
        read(w)
        assert fills_of(sim.launches) == [1]
        assert report.written_elements == 600
        read(w)
        assert fills_of(sim.launches) == [1]
        w_then = w.clone()
    assert fills_of(sim.launches) == [1, 2]
    expected.normal_(a)
    expected.uniform_(w)
    expected.check()
    assert torch.equal(w, w_then)
    assert (b == 1).all()
    assert [e.elements for e in report.early] == [600]


def test_a_read_gives_what_was_asked_for(sim: Simulation) -> None:
    expected = Torch(sim)
    with fastinit.fused():
        w = torch.empty(3000).uniform_(2.0, 3.0)
        torch.empty(50).normal_()
        mean = float(w.mean())
        w.normal_()
        again = float(w.mean())
        w.zero_()
    offset = sim.default.offset
    expected.uniform_(w, 2.0, 3.0)
    first = expected.memory[w.untyped_storage().data_ptr()][1].mean()
    expected.state.offset += 4
    expected.normal_(w)
    second = expected.memory[w.untyped_storage().data_ptr()][1].mean()
    assert mean == pytest.approx(first, abs=1e-5)
    assert again == pytest.approx(second, abs=1e-5)
    assert offset == expected.state.offset
    assert (w == 0).all()
    assert fills_of(sim.launches) == [1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_in_a_block(dtype: torch.dtype, sim: Simulation) -> None:
    """Rows, columns, transposes, blocks: in order where they overlap."""
    expected = Torch(sim)
    with fastinit.fused():
        w, v = torch.empty(60, 50, dtype=dtype), torch.empty(7, 3, 11, dtype=dtype)
        torch_init.normal_(w)
        w.data[3].uniform_()
        w[5:40, 10:20].data.normal_(1.0, 0.5)
        nn.init.uniform_(w.t()[7], -3.0, -2.0)
        v.permute(2, 0, 1).uniform_()
        v.view(-1)[100:].normal_()
        v[:, 1].uniform_(5.0, 6.0)
        assert sim.launches == []
    calls: list[Call] = [
        ("normal_", w, ()), ("uniform_", w[3], ()), ("normal_", w[5:40, 10:20], (1.0, 0.5)),
        ("uniform_", w.t()[7], (-3.0, -2.0)), ("uniform_", v.permute(2, 0, 1), ()),
        ("normal_", v.view(-1)[100:], ()), ("uniform_", v[:, 1], (5.0, 6.0)),
    ]  # fmt: skip
    expected.replay(calls)
    expected.check()
    assert fills_of(sim.launches) == [2, 3, 2]


@pytest.mark.parametrize("way", ["zero_", "ones_", "constant_"])
def test_constants_in_columns(way: str, sim: Simulation) -> None:
    """No random number, and no dense memory."""
    expected = Torch(sim)
    with fastinit.fused():
        w = torch.empty(40, 30)
        w.normal_()
        column = w.data[:, 7]
        column.zero_() if way == "zero_" else getattr(torch_init, way)(
            column, *([0.25] if way == "constant_" else [])
        )
    expected.normal_(w)
    expected.constant_(w[:, 7], {"zero_": 0.0, "ones_": 1.0, "constant_": 0.25}[way])
    expected.check()
    assert fills_of(sim.launches) == [1, 1]


def test_copies_of_what_is_pending(sim: Simulation) -> None:
    """clone, copy_ and deepcopy copy the record; each copy is its own afterwards."""
    expected = Torch(sim)
    with fastinit.fused() as report:
        w, other, half = torch.empty(30, 20), torch.empty(30, 20), torch.empty(600, dtype=BF16)
        torch_init.normal_(w)
        copy = w.clone()
        other.uniform_()
        other.copy_(w)
        w.zero_()
        copy[0].uniform_()
        tied = nn.Parameter(other)
        half.uniform_()
        wide = half.float()  # another dtype: a read
        assert fills_of(sim.launches) == [1]
    expected.normal_(other)
    expected.state.offset -= 4
    expected.normal_(copy)
    expected.state.offset += 4  # other.uniform_
    expected.uniform_(copy[0])
    expected.uniform_(half)
    expected.zeros_(w)
    expected.check()
    assert torch.equal(wide, half.float())
    assert tied.data_ptr() == other.data_ptr()
    assert fills_of(sim.launches) == [1, 3, 1]
    assert report.recorded_elements == 600 * 6 + 20


def test_what_dies_in_the_block_is_not_written(sim: Simulation) -> None:
    expected = Torch(sim)
    with fastinit.fused() as report:
        a = torch.empty(5000).normal_()
        dead = [nn.Linear(30, 40) for _ in range(3)]
        b = torch.empty(100).normal_()
        del dead
        gc.collect()
        reused = [torch.zeros(1200) for _ in range(3)]  # perhaps at the same place
    expected.normal_(a)
    expected.state.offset += 3 * 2 * 4
    expected.normal_(b)
    expected.check()
    assert fills_of(sim.launches) == [5]
    assert report.dropped_elements == 3 * (1200 + 40)
    assert all((t == 0).all() for t in reused)


def test_an_exception_leaves_what_was_asked_for(sim: Simulation) -> None:
    kept: list[torch.Tensor] = []
    expected = Torch(sim)

    def fails() -> None:
        with fastinit.fused():
            kept.append(torch.empty(300).normal_())
            kept.append(torch.empty(20).uniform_())
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
    expected.normal_(kept[0])
    expected.uniform_(kept[1])
    expected.check()
    assert fills_of(sim.launches) == [2]
    assert recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0


def test_a_failed_launch_can_be_repeated(sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while writing: states and fills are still there."""
    expected, interrupts = Torch(sim), [KeyboardInterrupt]

    def run(*args: Any) -> None:
        if interrupts:
            raise interrupts.pop()
        sim.run(*args)

    monkeypatch.setattr(runtime, "run", run)
    kept: list[torch.Tensor] = []

    def interrupted() -> None:
        with fastinit.fused():
            kept.append(torch.empty(300).normal_())

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    expected.normal_(kept[0])
    expected.check()


FACTORIES: dict[str, tuple[Callable[[], torch.Tensor], str, tuple[float, ...]]] = {
    "zeros": (lambda: torch.zeros(30, 4), "constant_", (0.0,)),
    "ones": (lambda: torch.ones(7), "constant_", (1.0,)),
    "full": (lambda: torch.full((9, 2), 2.5), "constant_", (2.5,)),
    "bf16": (lambda: torch.full((9, 2), 0.1, dtype=BF16), "constant_", (0.1,)),
    "rand": (lambda: torch.rand(5000), "uniform_", ()),
    "rand64": (lambda: torch.rand(5000, dtype=F64), "uniform_", ()),
    "randn": (lambda: torch.randn(3, 1700), "normal_", ()),
    "randn16": (lambda: torch.randn(3, 1700, dtype=F16), "normal_", ()),
    "zeros_like": (lambda: torch.zeros_like(torch.empty(8, 5)), "constant_", (0.0,)),
    "full_like": (lambda: torch.full_like(torch.empty(8), -3.0), "constant_", (-3.0,)),
    "rand_like": (lambda: torch.rand_like(torch.empty(8, 5).t()), "uniform_", ()),
    "randn_like": (lambda: torch.randn_like(torch.empty(8, 5)), "normal_", ()),
    "new_ones": (lambda: torch.empty(3).new_ones(6), "constant_", (1.0,)),
    "new_full": (lambda: torch.empty(3).new_full((6, 6), 4.0), "constant_", (4.0,)),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories(name: str, sim: Simulation) -> None:
    make, kind, args = FACTORIES[name]
    expected, before = Torch(sim), torch.get_rng_state()
    with fastinit.fused() as report:
        t = make()
        u = torch.rand(10)
        assert sim.launches == []
        assert report.recorded_elements == t.numel() + 10
    getattr(expected, kind)(t, *args)
    expected.uniform_(u)
    expected.check()
    assert fills_of(sim.launches) == [2]
    assert torch.equal(before, torch.get_rng_state())
    assert t._version == 0


def test_factories_of_other_kinds_are_torchs(sim: Simulation) -> None:
    with fastinit.fused() as report:
        made = [
            torch.zeros(9, dtype=torch.int64), torch.ones(0), torch.full((4,), 3),
            torch.zeros(3, dtype=torch.complex64), torch.arange(5.0), torch.tensor([1.0, 2.0]),
        ]  # fmt: skip
    assert report.recorded_elements == 0
    assert sim.launches == []
    assert made[2].tolist() == [3] * 4


@pytest.mark.parametrize("function", [torch_init.trunc_normal_, fastinit.trunc_normal_])
@pytest.mark.parametrize(
    ("bound", "waits"), [(0.6, False), (6.5, False), (7.0, True), (50.0, True)]
)
def test_trunc_normal_in_a_block(
    bound: float, waits: bool, function: Callable[..., Any], sim: Simulation
) -> None:
    """On a GPU the words have 32 bits and a half, which makes the reach 6.76 deviations."""
    expected = Torch(sim)
    with fastinit.fused() as report:
        a, w = torch.empty(40).uniform_(), torch.empty(50, 40).uniform_()
        assert function(w, 0.0, 1.0, -bound, bound) is w
        assert fills_of(sim.launches) == [1] * (not waits)
        b = torch.empty(70).normal_()
    expected.uniform_(a)
    expected.uniform_(w)
    draws = expected.trunc_normal_(w, 0.0, 1.0, -bound, bound)
    assert (draws > 1) == (bound < 1)
    expected.normal_(b)
    expected.check()
    assert fills_of(sim.launches) == [3] if waits else [1, 2]
    assert report.at_once_elements == (0 if waits else 2000)
    assert report.dropped_elements == 2000
    assert w._version == 2 + (draws > 1)


@pytest.mark.parametrize("module", [torch_init, fastinit], ids=["torch", "fastinit"])
@pytest.mark.parametrize("later", ["end", "read", "clone"])
def test_sparse_in_a_block(later: str, module: Any, sim: Simulation) -> None:
    """Which rows are zeroed is drawn from the CPU's generator when it is asked for."""
    state, expected = torch.get_rng_state(), Torch(sim)
    with fastinit.fused() as report:
        w = torch.empty(40, 30)
        module.sparse_(w, 0.35, 0.1)
        after = torch.get_rng_state()
        torch.manual_seed(99)  # nothing of what waits is drawn later
        b = torch.empty(500).normal_()
        assert sim.launches == []
        if later == "read":
            w.sum()
        c = w.clone() if later == "clone" else None
    torch.set_rng_state(state)
    expected.sparse_(w, 0.35, 0.1)
    assert torch.equal(after, torch.get_rng_state())
    expected.normal_(b)
    expected.check()
    assert (w == 0).sum(0).tolist() == [14] * 30
    assert c is None or torch.equal(c, w)
    assert w._version == 31
    assert report.recorded_elements == 1700 + 1200 * (later == "clone")


def test_a_plan_with_sparse_run_in_a_block(sim: Simulation) -> None:
    w, state, expected = box(40, 30), torch.get_rng_state(), Torch(sim)
    made = record_calls([("sparse_", w, (0.35,))])
    with fastinit.fused() as report:
        made.run()
    torch.set_rng_state(state)
    expected.sparse_(w, 0.35)
    expected.check()
    assert report.recorded_elements == 0


def test_a_plan_run_in_a_block_comes_in_its_place(sim: Simulation) -> None:
    w, u = box(500), box(100)
    made = record_calls([("uniform_", w, ()), ("uniform_", u, ())])
    expected = Torch(sim)
    with fastinit.fused() as report:
        a = torch.empty(300).normal_()
        made.run()
        assert fills_of(sim.launches) == [1, 2]
        b = torch.empty(300).normal_()
    for name, t in (("normal_", a), ("uniform_", w), ("uniform_", u), ("normal_", b)):
        getattr(expected, name)(t)
    expected.check()
    assert [e.operator for e in report.early] == ["Plan.run"]


def test_orthogonal_in_a_block(sim: Simulation) -> None:
    """It waits, and what overlaps it comes behind it."""
    expected = Torch(sim)
    with fastinit.fused() as report:
        w, b = torch.empty(6, 20).normal_(), torch.empty(20).uniform_()
        torch_init.orthogonal_(w)
        h = fastinit.orthogonal_batched_(torch.empty(3, 7, 5, dtype=BF16), 2.0)
        w[0].zero_()
        assert sim.launches == []
    expected.state.offset += 4
    expected.uniform_(b)
    expected.orthogonal_(w)
    expected.orthogonal_(h, 2.0, batch=3)
    expected.write(w[0], 0)
    expected.check()
    assert fills_of(sim.launches) == [3, 1]
    assert len(sim.factors.launches) == 1
    assert report.dropped_elements == 120


def test_memory_for_normals_in_a_block(sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit matrices are written by parts, other fills with them."""
    monkeypatch.setattr(cuda_qr, "MOST_MEMORY", 4 * 2000)
    expected = Torch(sim)
    with fastinit.fused():
        made = [fastinit.orthogonal_(torch.empty(30, 30, dtype=BF16)) for _ in range(5)]
        b = torch.empty(20_000).normal_()
    for t in made:
        expected.orthogonal_(t)
    expected.normal_(b)
    expected.check()
    assert fills_of(sim.launches) == [2, 2, 2]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_orthogonal_in_a_plan(
    dtype: torch.dtype, sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its normals go in the launch of all others, its factors with each other behind it; twice
    gives others. Overlaps keep their order, and memory for normals is bounded."""
    w, v = box(40, 9, dtype=dtype), box(6, 4, 3, 3, dtype=dtype)
    large, few, b = box(150, 140, dtype=dtype), box(2, 2, dtype=dtype), box(3000, dtype=dtype)
    made = fastinit.Plan()
    made.uniform_(w)
    for t, gain in ((w, 1.0), (v, -0.5), (large, 3.0), (few, 1.0)):
        made.orthogonal_(t, gain)
    made.normal_(b)
    made.zeros_(w[3:5])
    for most in (cuda_qr.MOST_MEMORY, 4 * 600):
        monkeypatch.setattr(cuda_qr, "MOST_MEMORY", most)
        expected = Torch(sim)
        sim.launches.clear()
        versions = [t._version for t in (w, v, b)]
        made.run()
        expected.uniform_(w)
        for t, gain in ((w, 1.0), (v, -0.5), (large, 3.0), (few, 1.0)):
            expected.orthogonal_(t, gain)
        expected.normal_(b)
        expected.write(w[3:5], 0)
        expected.check()
        if dtype.itemsize == 2 and most == 2400:
            assert fills_of(sim.launches) == [2, 1, 3]
        else:
            assert fills_of(sim.launches) == [5, 1]
        assert [t._version for t in (w, v, b)] == [n + k for n, k in zip(versions, (4, 2, 1))]


def test_saved_references_of_torch_are_seen(
    sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their operators are; those of sparse_ read what is pending, column by column."""
    sparse, kaiming = torch_init.sparse_, torch_init.kaiming_normal_
    state, expected = torch.get_rng_state(), Torch(sim)
    with fastinit.fused():
        w, v = torch.empty(40, 30), torch.empty(40, 30)
        sparse(w, 0.35)
        launches = len(sim.launches)
        kaiming(v)
        assert len(sim.launches) == launches
    torch.set_rng_state(state)
    expected.sparse_(w, 0.35)
    expected.kaiming_normal_(v)
    expected.check()


def test_nested_blocks_join(sim: Simulation) -> None:
    expected = Torch(sim)
    with fastinit.fused() as outer:
        a = torch.empty(30).normal_()
        with fastinit.fused() as inner:
            b = torch.empty(40).uniform_()
            net = nn.Linear(4, 3)
            fastinit.init_model_(net)
        assert inner is outer
        assert sim.launches == []
        c = torch.empty(20).uniform_()
    bound = 0.5
    expected.normal_(a)
    expected.uniform_(b)
    for _ in range(2):
        expected.kaiming_uniform_(net.weight, math.sqrt(5))
        expected.uniform_(net.bias, -bound, bound)
    expected.uniform_(c)
    expected.check()
    assert fills_of(sim.launches) == [5]


def test_older_tensors_do_not_wait(sim: Simulation) -> None:
    w = torch.empty(300)
    before, expected = w._version, Torch(sim)
    with fastinit.fused() as report:
        new = torch.empty(20).uniform_()
        w.normal_()
        assert fills_of(sim.launches) == [1]
        torch_init.uniform_(w)
        assert fills_of(sim.launches) == [1, 1]
    expected.uniform_(new)
    expected.normal_(w)
    expected.uniform_(w)
    expected.check()
    assert (report.at_once_elements, report.recorded_elements) == (600, 20)
    assert w._version == before + 2


def test_nothing_waits_while_a_thread_of_the_block_runs(sim: Simulation) -> None:
    expected, go = Torch(sim), threading.Event()
    with fastinit.fused() as report:
        a = torch.empty(30).normal_()
        thread = threading.Thread(target=go.wait, name="reader")
        thread.start()
        assert fills_of(sim.launches) == [1]
        b = torch.empty(40).uniform_()
        assert fills_of(sim.launches) == [1, 1]
        go.set()
        thread.join()
        c = torch.empty(40).uniform_()
        assert len(sim.launches) == 2
    for name, t in (("normal_", a), ("uniform_", b), ("uniform_", c)):
        getattr(expected, name)(t)
    expected.check()
    assert report.threads == {"reader"}
    assert b._version == 1


def test_many_fills_of_one_tensor(sim: Simulation) -> None:
    expected = Torch(sim)
    with fastinit.fused() as report:
        w = torch.empty(90, 7)
        for row in w:
            row.normal_()
        assert len(sim.launches) == 1
    for row in w:
        expected.normal_(row)
    expected.check()
    assert fills_of(sim.launches) == [65, 25]
    assert len(report.early) == 1


def test_seeds_set_in_a_block(sim: Simulation) -> None:
    """Numbers are of the seed when they were asked for; a launch holds eight."""
    expected, tensors = Torch(sim), []
    with fastinit.fused():
        for seed in (*range(10), 3):
            sim.default.seed, sim.default.offset = seed, 4 * seed
            tensors.append(torch.empty(50 + seed).normal_())
    for seed, t in zip((*range(10), 3), tensors):
        expected.state.seed, expected.state.offset = seed, 4 * seed
        expected.normal_(t)
    expected.check()
    assert fills_of(sim.launches) == [8, 3]


def test_explicit_generators_in_a_block(sim: Simulation) -> None:
    one, two = Generator(7), Generator(8, offset=2**34)
    expected = [Torch(sim, one), Torch(sim, two)]
    with fastinit.fused():
        a, b, c = torch.empty(5000), torch.empty(60), torch.empty(7000)
        torch_init.normal_(a, generator=one)
        torch_init.uniform_(b, generator=two)
        torch_init.kaiming_normal_(c.view(70, 100), generator=one)
        assert (one.offset, two.offset) == (16, 2**34 + 4)
    expected[0].normal_(a)
    expected[1].uniform_(b)
    expected[0].kaiming_normal_(c.view(70, 100))
    for e in expected:
        e.check()
    assert fills_of(sim.launches) == [3]


def test_the_report(sim: Simulation, capsys: pytest.CaptureFixture[str]) -> None:
    with fastinit.fused() as report:
        net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
        torch_init.trunc_normal_(net[0].weight, std=0.02)  # far bounds
        torch_init.trunc_normal_(net[1].weight, std=1.0)  # at once
        torch_init.sparse_(net[1].weight, 0.5)
        net[0].bias.data.sum()
    print(report)
    shown = capsys.readouterr().out
    assert report.recorded_elements == 600 * 2 + 20 + 200 * 2 + 10
    assert report.written_elements == 600 + 20 + 200 + 10
    assert (report.dropped_elements, report.at_once_elements) == (800, 200)
    assert report.bytes == 4 * report.written_elements
    rows = {row.name: row.written_by for row in report.rows()}
    assert rows == {
        "0.weight": ("trunc_normal_(mean=0, std=0.02, a=-2, b=2)",),
        "0.bias": ("uniform_(a=-0.1826, b=0.1826)",),
        "1.weight": ("sparse_(sparsity=0.5, std=0.01)",),
        "1.bias": ("uniform_(a=-0.2236, b=0.2236)",),
    }
    assert "1,630 elements recorded: 830 written" in shown
    assert "200 more filled natively when asked for." in shown
    assert "aten.sum.default at" in shown


# ---- streams -------------------------------------------------------------------------------------


class Stream:
    """Launches by the addresses they write, and those that are certainly over before its next."""

    def __init__(self) -> None:
        self.launched: list[list[int]] = []
        self.behind: set[int] = set()

    def wait_stream(self, other: Stream) -> None:
        self.behind |= other.behind


class Streams:
    """Stand for torch.cuda's; the current one is the device's default, 0, at first."""

    def __init__(self, sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sim, self.current = sim, 0
        self.all = {handle: Stream() for handle in (0, 5, 9)}
        self.history: list[tuple[list[int], set[int]]] = []  # what each launch writes; is behind
        monkeypatch.setattr(runtime, "stream_of", lambda device: self.current)
        monkeypatch.setattr(runtime, "run", self.run)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=0: self.all[self.current])
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device=0: self.all[0])
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device=0: self.all[handle])
        monkeypatch.setattr(torch.cuda, "stream", self.use)

    @contextmanager
    def use(self, stream: Stream | int) -> Iterator[None]:
        handles = {id(s): handle for handle, s in self.all.items()}
        before = self.current
        self.current = stream if isinstance(stream, int) else handles[id(stream)]
        try:
            yield
        finally:
            self.current = before

    def run(self, fills: bytes, table: int, count: int, *rest: Any) -> None:
        assert table == 0
        stream = self.all[self.current]
        size = len(fills) // count
        addresses = [struct.unpack_from("<Q", fills, size * i)[0] for i in range(count)]
        self.history.append((addresses, set(stream.behind)))
        stream.launched.append(addresses)
        stream.behind.update(addresses)
        self.sim.run(fills, table, count, *rest)


@pytest.fixture
def streams(sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(sim, monkeypatch)


@pytest.mark.parametrize("name", ["normal_", "zeros_"])
@pytest.mark.parametrize("module", [torch_init, fastinit], ids=["torch", "fastinit"])
def test_launches_go_to_the_stream_they_were_asked_for_on(
    module: Any, name: str, streams: Streams
) -> None:
    """Its memory may still be used by what that stream did before. The current one waits."""
    expected = Torch(streams.sim)
    tensors = {}
    with fastinit.fused():
        for i, handle in enumerate((5, 0, 9, 5, 5)):
            with streams.use(handle):
                tensors[i] = torch.empty(100 + i)
                getattr(module, name)(tensors[i])
        assert streams.history == []
    for t in tensors.values():
        getattr(expected, name)(t)
    expected.check()
    at = {i: t.data_ptr() for i, t in tensors.items()}
    assert streams.all[5].launched == [[at[0], at[3], at[4]]]
    assert streams.all[0].launched == [[at[1]]]
    assert streams.all[9].launched == [[at[2]]]
    assert streams.all[0].behind >= set(at.values())


def test_constants_and_numbers_of_a_stream_are_one_launch(streams: Streams) -> None:
    with fastinit.fused(), streams.use(5):
        layer = nn.Linear(20, 30)
        nn.init.zeros_(layer.bias)
        nn.BatchNorm1d(4)
        kept = torch.ones(30)
    addresses = [t.data_ptr() for t in (layer.weight, layer.bias, kept)]
    assert [sorted(a) for a, _ in streams.history] == [sorted(addresses)]
    assert [sorted(a) for a in streams.all[5].launched] == [sorted(addresses)]


def test_a_read_on_another_stream_waits(streams: Streams) -> None:
    with fastinit.fused():
        w = torch.empty(100).normal_()
        with streams.use(5):
            w.sum()
            assert streams.all[0].launched
            assert streams.all[5].behind == {geometry.address_of(w)}


@pytest.mark.parametrize(("first", "second"), [(0, 5), (5, 0), (5, 9)])
def test_overlapping_fills_of_two_streams_keep_their_order(
    first: int, second: int, streams: Streams
) -> None:
    """The user has made the second stream wait for the first, when nothing was launched yet."""
    with fastinit.fused():
        with streams.use(first):
            w = torch.empty(40, 30).normal_()
        streams.all[second].wait_stream(streams.all[first])
        with streams.use(second):
            w[0].uniform_()
    (whole, _), (row, behind) = streams.history
    assert whole == row == [w.data_ptr()]
    assert behind >= set(whole), "the second launch may run before the first"


def test_at_once_is_on_the_current_stream(streams: Streams) -> None:
    w = torch.empty(100)
    with streams.use(9):
        fastinit.normal_(w)
        made = record_calls([("uniform_", w, ())])
    with streams.use(5):
        made.run()
    assert [len(streams.all[s].launched) for s in (0, 5, 9)] == [0, 1, 1]


# ---- devices -------------------------------------------------------------------------------------


def some_fills(devices: Iterable[int], sparse: Iterable[int] = ()) -> list[Fill]:
    t, at = torch.empty(1), set(sparse)
    return [
        Fill(t, "sparse" if i in at else "uniform", device=d) for i, d in enumerate(devices)
    ]  # fmt: skip


def test_groups() -> None:
    fills = some_fills([-1, 0, 1, 0, -1, 1, 0])
    places = {id(f): i for i, f in enumerate(fills)}
    found = [[places[id(f)] for f in group] for group in execute._groups(fills)]
    assert found == [[0, 4], [1, 3, 6], [2, 5]]
    fills = some_fills([0, 0, -1, -1, 1, 0, 1, -1], sparse=[5])
    places = {id(f): i for i, f in enumerate(fills)}
    found = [[places[id(f)] for f in group] for group in execute._groups(fills)]
    assert found == [[0, 1], [2, 3], [4], [5], [6], [7]]
    assert execute._groups([]) == []
    fills = some_fills([0, 1, 0, -1])  # GPUs 0 and 1 from one generator
    for fill in fills[:3]:
        fill.generator = torch.default_generator
    assert execute._groups(fills) == [[fills[0]], [fills[1]], [fills[2]], [fills[3]]]


def test_groups_of_any_mixture() -> None:
    choose = random.Random(1)
    for _ in range(300):
        n = choose.randrange(1, 12)
        devices = [choose.choice([-1, 0, 1]) for _ in range(n)]
        sparse = [i for i in range(n) if devices[i] >= 0 and choose.random() < 0.1]
        fills = some_fills(devices, sparse)
        groups = execute._groups(fills)
        assert sorted(id(f) for g in groups for f in g) == sorted(map(id, fills))
        for device in (-1, 0, 1):
            kept = [f for g in groups for f in g if f.device == device]
            assert [id(f) for f in kept] == [id(f) for f in fills if f.device == device]
        assert all(len({f.device for f in g}) == 1 for g in groups)
        if sparse:
            assert [id(f) for g in groups for f in g] == list(map(id, fills))
            assert len(groups) == len(list(itertools.groupby(devices)))
        else:
            assert len(groups) == len(set(devices))


def test_each_group_goes_to_its_device(sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    fills = some_fills([0, -1, 1, 0, 1])
    seen: list[tuple[int, int]] = []

    class Batch:
        def __init__(self, fills: list[Fill]) -> None:
            self.fills = fills

        def run(self, bumps: list[int]) -> None:
            seen.append((self.fills[0].device, len(self.fills)))
            bumps[:] = [2] * len(self.fills)

    monkeypatch.setattr(cuda_fills, "Batch", Batch)
    monkeypatch.setattr(
        cpu_fills, "run", lambda fills, bumps, progress: seen.append((-1, len(fills)))
    )
    before = fills[0].tensor._version
    execute.run(fills)
    assert seen == [(0, 2), (-1, 1), (1, 2)]
    assert fills[0].tensor._version == before + 8
    assert execute.prepare(fills, []) is None
    assert execute.prepare(fills[1:2], []) is None
    assert isinstance(execute.prepare(fills[2:3], []), execute.Prepared)


@pytest.mark.parametrize("way", ["plan", "block"])
def test_cpu_and_gpu_in_one(way: str, sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """sparse_ on a GPU takes its rows between what CPU tensors draw before and after it."""
    here = {i: box(60 + i) if i != 2 else box(20, 30) for i in range(7)}
    on_gpu = {here[i].untyped_storage()._cdata for i in (1, 2, 4)}
    monkeypatch.setattr(
        geometry, "device_of", lambda t: 0 if t.untyped_storage()._cdata in on_gpu else -1
    )
    names = {0: "uniform_", 1: "normal_", 2: "sparse_", 3: "normal_", 4: "uniform_", 5: "uniform_"}
    calls: list[Call] = [(n, here[i], (0.4,) if i == 2 else ()) for i, n in names.items()]
    expected = Torch(sim)
    torch.manual_seed(6)
    if way == "plan":
        made = record_calls(calls)
        made.run()
        assert made._prepared is None
    else:
        fastinit.init_model_(nn.ParameterList(here.values()), in_block(calls))
    after = torch.get_rng_state()
    torch.manual_seed(6)
    for i, (name, t, args) in enumerate(calls):
        if i in (1, 2, 4):
            getattr(expected, name)(t, *args)
        else:
            assert torch.equal(t, getattr(torch_init, name)(torch.empty_like(t), *args))
    assert torch.equal(after, torch.get_rng_state())
    expected.check()
    assert sum(fills_of(sim.launches)) == 3


# ---- proofs --------------------------------------------------------------------------------------


class Proxy:
    """torch, but for some names."""

    def __init__(self, **own: Any) -> None:
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class GpuGenerator(Generator):
    """With what only the proof asks for."""

    def __init__(self, device: Any = None, seed: int = 0) -> None:
        super().__init__(seed)
        self.device = torch.device(device or "cuda:0")

    def manual_seed(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def get_state(self) -> torch.Tensor:
        return torch.tensor([self.seed, self.offset])


class Proofs:
    """The real proof, with a torch for the GPU that may differ from it."""

    def __init__(self, sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sim, self.asked, self.made = sim, 0, 0
        self.spoil: Callable[[torch.Tensor, Generator], Any] | None = None

        def zeros(*shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
            assert device == torch.device("cuda", 0)
            self.made += 1
            return torch.zeros(*shape, dtype=dtype)

        own = Proxy(Generator=GpuGenerator, zeros=zeros, empty=zeros)
        monkeypatch.setattr(probe, "torch", own)
        monkeypatch.setattr(probe, "verdict", VERDICT)
        monkeypatch.setattr(probe, "_torch_does", self.torch_does)
        cpu_masks = {("sparse_mask", BF16, "contiguous"): 0}
        monkeypatch.setattr(probe, "_verdicts", cpu_masks)

    def torch_does(self, op: str, t: torch.Tensor, a: float, b: float, g: GpuGenerator) -> None:
        self.asked += 1
        if op == "uniform":
            expected = Torch(self.sim, g)
            expected.uniform_(t, a, b)
            flat, values, _ = expected.memory[t.untyped_storage().data_ptr()]
            flat.copy_(torch.from_numpy(values))
            g.offset = expected.state.offset
        else:  # as the kernel: what is tested is that the rest of the proof compares
            execute.run([f for f in probe._fills(op, t, a, b, g) if f is not None])
        if self.spoil is not None:
            self.spoil(t, g)


@pytest.fixture
def proofs(sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> Proofs:
    return Proofs(sim, monkeypatch)


KINDS = [
    *(("uniform", layout) for layout in ("contiguous", "dense", "strided")),
    *(("normal", layout) for layout in ("contiguous", "dense", "strided")),
    *(("constant", layout) for layout in ("contiguous", "dense", "strided")),
    *((op, "contiguous") for op in ("trunc_normal", "trunc_erfinv", "diagonal", "sparse")),
]


@pytest.mark.parametrize(("op", "layout"), KINDS, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_a_kind_is_proved(op: str, layout: str, dtype: torch.dtype, proofs: Proofs) -> None:
    state = torch.get_rng_state()
    if op == "sparse":  # which rests on it
        assert probe.verdict("normal", dtype, layout, 0) == 0
        proofs.asked = 0
    assert probe.verdict(op, dtype, layout, 0) == 0
    asked = proofs.asked
    assert asked == len(probe._cases(op, dtype))
    assert probe.verdict(op, dtype, layout, 0) == 0
    assert proofs.asked == asked
    assert torch.equal(state, torch.get_rng_state())


def flip(t: torch.Tensor, g: Generator) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    t[-1:].view(bits)[..., -1] ^= 1


def one_trip_on(t: torch.Tensor, g: Generator) -> None:
    g.offset += 4


def no_operator(t: torch.Tensor, g: Generator) -> None:
    raise NotImplementedError('"normal_kernel_cuda" not implemented')


@pytest.mark.parametrize(("op", "layout"), KINDS, ids=str)
@pytest.mark.parametrize("spoil", [flip, one_trip_on, no_operator])
def test_a_kind_that_differs_is_not_proved(
    spoil: Callable[..., Any], op: str, layout: str, proofs: Proofs
) -> None:
    proofs.spoil = spoil
    for dtype in (F32, BF16):
        assert probe.verdict(op, dtype, layout, 0) is None


@pytest.mark.parametrize("way", ["function", "plan", "block"])
def test_what_is_not_proved_is_left_to_torch(way: str, proofs: Proofs) -> None:
    proofs.spoil = flip
    t, u = box(300), box(200)
    torch.manual_seed(3)
    if way == "function":
        fastinit.uniform_(t, 1.0, 2.0)
        fastinit.normal_(u)
    elif way == "plan":
        record_calls([("uniform_", t, (1.0, 2.0)), ("normal_", u, ())]).run()
    else:
        with fastinit.fused() as report:
            t, u = torch.empty(300).uniform_(1.0, 2.0), torch.empty(200)
            torch_init.normal_(u)
        assert report.recorded_elements == 0
    offset = proofs.sim.default.offset
    torch.manual_seed(3)
    assert torch.equal(t, torch.empty(300).uniform_(1.0, 2.0))
    assert torch.equal(u, torch.empty(200).normal_())
    assert offset == 8


def test_the_proof_is_no_part_of_what_asks_for_it(proofs: Proofs) -> None:
    expected = Torch(proofs.sim)
    with fastinit.fused() as report:
        t = torch.empty(300).uniform_()
        assert report.recorded_elements == 300
    made = fastinit.Plan()
    u = box(20)
    made.normal_(u)
    assert len(made) == 1
    made.run()
    expected.uniform_(t)
    expected.normal_(u)
    expected.check()
    assert report.early == []
    assert proofs.asked == 5


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Verdicts asked for the first time; those of GPU 1 are bad."""
    keys: list[tuple[Any, ...]] = []

    def find_out(op: str, dtype: torch.dtype, layout: str, device: int = -1) -> int | None:
        keys.append((op, dtype, layout, device))
        return None if device == 1 else 0

    monkeypatch.setattr(probe, "_probe", find_out)
    monkeypatch.setattr(probe, "_verdicts", {})
    return keys


def test_verdicts_are_of_a_device(
    sim: Simulation, asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "verdict", VERDICT)
    device = 0
    monkeypatch.setattr(geometry, "device_of", lambda t: device)
    for device in (0, 1, 0, 1, 2):
        fill = build.uniform(box(30), 0.0, 1.0, None)
        assert fill is not None
        assert fill.device == device
        assert (probe.proved(fill) is fill) == (device != 1)
    assert asked == [("uniform", F32, "contiguous", d) for d in (0, 1, 2)]


def test_split_tensors_are_a_kind_of_their_own(
    sim: Simulation, asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "verdict", VERDICT)
    split_beyond(4000, monkeypatch)
    for t in (box(1000), box(1001), box(50, 50)[:, 1:10], box(50, 50)[:5, 1:10]):
        fastinit.normal_(t)
        fastinit.ones_(t)
    kinds = [(op, layout) for op, _, layout, _ in asked]
    assert kinds == [
        *(("normal", "contiguous"), ("constant", "contiguous")),
        *(("normal", "split"), ("constant", "strided"), ("normal", "strided")),
    ]


@pytest.mark.parametrize("op", ["uniform", "normal", "trunc_normal"])
def test_a_split_tensor_is_proved_in_place(
    op: str, proofs: Proofs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes too much memory for two of them."""
    split_beyond(39_999, monkeypatch)
    assert probe.verdict(op, F32, "split", 0) == 0
    assert proofs.made == len(probe._cases(op, F32))
    proofs.spoil = flip
    probe._verdicts.pop((op, F32, "split", 0))
    assert probe.verdict(op, F32, "split", 0) is None


@pytest.mark.parametrize("proved", [{"trunc_normal"}, {"trunc_erfinv"}, set()], ids=str)
@pytest.mark.parametrize(("a", "b"), [(-0.5, 0.7), (-40.0, 40.0), (2.0, 2.3)])
@pytest.mark.parametrize("way", ["function", "plan", "block"])
def test_trunc_normal_is_done_as_torch_does_it(
    way: str, a: float, b: float, proved: set[str], sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rejection since 2.12; by the inverse distribution before; by itself if neither agrees.

    torch 2.12 and later has another way for narrow bounds, which is left to it.
    """

    def verdict(op: str, dtype: torch.dtype, layout: str, device: int = -1) -> int | None:
        return None if op.startswith("trunc") and op not in proved else 0

    monkeypatch.setattr(probe, "verdict", verdict)
    dtype, n, args = F32, 3000, (0.1, 1.0, a, b)
    expected = Torch(sim)
    t = box(n)
    torch.manual_seed(3)
    if way == "function":
        fastinit.trunc_normal_(t, *args)
    elif way == "plan":
        record_calls([("trunc_normal_", t, args)]).run()
    else:
        with fastinit.fused():
            t = torch.empty(n)
            torch_init.trunc_normal_(t, *args)
    if proved == {"trunc_erfinv"}:
        values = cuda_model.trunc_normal_erfinv(n, "float32", *args, expected.state, SMALL)
        torch.testing.assert_close(t.double(), torch.from_numpy(values).double(), rtol=0, atol=2e-4)
        assert t._version == box(1)._version + 5
    elif proved and b != 2.3:
        expected.trunc_normal_(t, *args)
    else:
        torch.manual_seed(3)
        assert torch.equal(t, torch_init.trunc_normal_(torch.empty(n, dtype=dtype), *args))
        assert sim.launches == []
    expected.check()


def test_a_verdict_of_sparse_needs_one_of_the_mask(proofs: Proofs) -> None:
    probe._verdicts["sparse_mask", BF16, "contiguous"] = None
    assert probe.verdict("sparse", F32, "contiguous", 0) is None


# ---- thresholds, generators, graphs --------------------------------------------------------------


@pytest.mark.parametrize("name", ["uniform_", "normal_", "zeros_", "trunc_normal_", "eye_"])
def test_small_tensors_on_a_gpu_go_to_torch(
    name: str, sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single call of torch's does not wait for its kernel. Constants count for less."""
    monkeypatch.setattr(geometry, "MIN_CUDA", 900)
    at_least = 900 * (fastinit.init._CONSTANT if name == "zeros_" else 1)
    function = getattr(fastinit, name)
    columns = 30
    rows = at_least // columns
    torch.manual_seed(3)
    below = function(torch.empty(rows - 1, columns))
    assert (sim.launches, sim.default.offset) == ([], 8)
    torch.manual_seed(3)
    assert torch.equal(below, getattr(torch_init, name)(torch.empty(rows - 1, columns)))
    state = torch.get_rng_state()
    function(torch.empty(rows, columns))
    assert fills_of(sim.launches) == [1]
    assert torch.equal(state, torch.get_rng_state())
    record_calls([(name, box(2, 3), ())]).run()  # of many together none is too small
    assert fills_of(sim.launches) == [1, 1]
    with fastinit.fused():
        function(torch.empty(2, 3))
        kept = function(torch.empty(2, 3))
    assert sum(fills_of(sim.launches)) == 2 + (2 if name == "trunc_normal_" else 1)  # or it died
    del kept


@pytest.mark.parametrize("module", [torch_init, fastinit], ids=["torch", "fastinit"])
def test_small_tensors_wait_in_a_block(
    module: Any, sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is too small for single calls and on the CPU."""
    monkeypatch.setattr(geometry, "MIN_CUDA", 1 << 24)
    monkeypatch.setattr(geometry, "MIN_NATIVE", 1 << 13)
    expected, older = Torch(sim), nn.Linear(3, 2)
    with fastinit.fused() as report:
        a, b, c = torch.empty(10), torch.empty(1), torch.empty(4, 4)
        a.normal_()
        module.uniform_(b)
        module.eye_(c)
        fastinit.init_model_(nn.Linear(3, 2))
        assert report.recorded_elements == 27 + 2 * 8
    fastinit.init_model_(older)
    assert fills_of(sim.launches) == [3, 2]
    expected.normal_(a)
    expected.uniform_(b)
    expected.eye_(c)
    expected.state.offset += 4 * 4
    for t, bound in ((older.weight, 1 / math.sqrt(3)), (older.bias, 1 / math.sqrt(3))):
        expected.uniform_(t, -bound, bound)
    expected.check()


def test_small_older_tensors_in_a_block_go_to_torch(
    sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "MIN_CUDA", 900)
    small, large = torch.empty(899), torch.empty(900)
    with fastinit.fused() as report:
        small.uniform_()
        assert sim.launches == []
        large.uniform_()
        assert len(sim.launches) == 1
    assert report.at_once_elements == 900


def test_the_real_thresholds() -> None:
    assert (geometry.MIN_NATIVE, geometry.MIN_CUDA) == (1 << 13, 1 << 24)
    with simulated(SMALL) as sim, pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "MIN_CUDA", 1 << 24)
        patch.setattr(geometry, "MIN_NATIVE", 1 << 13)
        fastinit.uniform_(torch.empty(1 << 14))
        assert sim.launches == []


def test_a_generator_of_another_device_is_for_torch(sim: Simulation) -> None:
    """Here the tensor is one of the CPU after all, so torch takes it; on a GPU it raises."""
    t, w = box(300), box(20, 30)
    for name, args in (("uniform_", ()), ("normal_", ()), ("sparse_", (0.5,))):
        tensor = w if name == "sparse_" else t
        torch.manual_seed(3)
        getattr(fastinit, name)(tensor, *args, generator=torch.Generator().manual_seed(8))
        torch.manual_seed(3)
        same = torch.Generator().manual_seed(8)
        theirs = getattr(torch_init, name)(torch.empty_like(tensor), *args, generator=same)
        assert torch.equal(tensor, theirs)
    assert (sim.launches, sim.default.offset) == ([], 8)
    with pytest.raises(TypeError):
        fastinit.uniform_(t, generator="cuda")


def test_which_generators_serve_which_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

    given = torch.Generator()
    assert (source.is_supported(given, -1), source.is_supported(given, 0)) == (True, False)
    assert source.is_supported(None, 0)
    assert not source.is_supported(object(), 0)
    monkeypatch.setattr(source, "torch", Proxy(Generator=Fake))
    table = [[source.is_supported(Fake(d), i) for i in (-1, 0, 1)] for d in ("cpu", "cuda:1")]
    assert table == [[True, False, False], [False, False, True]]
    many = SimpleNamespace(default_generators=("first", "second"))
    monkeypatch.setattr(source, "torch", Proxy(cuda=many))
    assert source.resolve(None, 1) == "second"
    assert source.resolve(None, -1) is torch.default_generator
    assert source.resolve(given, 0) is given


def test_philox_states() -> None:
    """torch prints seeds as signed numbers; its offsets count words, of which four are a block."""
    g = Generator(seed=-1, offset=20)
    assert source.philox(g) == ((1 << 64) - 1, 5)
    source.set_philox(g, 7)
    assert g.offset == 28


def stand_in(cpu: bool = False, cuda: bool = False) -> Any:
    return SimpleNamespace(is_cpu=cpu, is_cuda=cuda)


@pytest.mark.parametrize("usable", [True, False])
def test_where_there_are_kernels(usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "can_use_cuda", lambda: usable)
    assert geometry.is_here(stand_in(cpu=True))
    assert geometry.is_here(stand_in(cuda=True)) == usable
    assert not geometry.is_here(stand_in())
    for device in ("cuda", torch.device("cuda", 1)):
        assert operators.makes_native(((2, 3),), {"device": device}, geometry.MIN_NATIVE) == usable
        assert not operators.makes_native(((2, 0),), {"device": device}, geometry.MIN_NATIVE)
        assert not operators.makes_native(
            ((2, 3),), {"device": device, "dtype": torch.int32}, geometry.MIN_NATIVE
        )
    assert not operators.makes_native(((2, 3),), {"device": "cpu"}, geometry.MIN_NATIVE)
    assert not operators.makes_native(((90, 300),), {"device": "meta"}, geometry.MIN_NATIVE)


def test_no_kernels_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, capturing in itertools.product((None, object()), (False, True)):
        monkeypatch.setattr(kernels, "_cuda", module)
        ask = lambda c=capturing: c  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", ask, raising=False)
        assert kernels.can_use_cuda() == (module is not None and not capturing)


@pytest.mark.parametrize("way", ["function", "plan", "older", "adopted", "factory"])
def test_nothing_is_native_while_a_graph_is_captured(
    way: str, sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay has to draw other numbers each time, so torch's kernels must be in the graph."""
    w = box(300)

    def capture() -> None:  # from here on
        monkeypatch.setattr(kernels, "can_use_cuda", lambda: False)
        monkeypatch.setattr(geometry, "is_here", lambda t: False)
        monkeypatch.setattr(operators, "makes_native", lambda args, kwargs, least: False)

    torch.manual_seed(3)
    if way == "function":
        capture()
        fastinit.uniform_(w)
    elif way == "plan":
        capture()
        record_calls([("uniform_", w, ())]).run()
    else:
        with fastinit.fused() as report:
            if way == "adopted":
                w = torch.empty(300)
            capture()
            if way == "factory":
                w = torch.rand(300)
            else:
                w.uniform_()
        assert report.recorded_elements == 0
    assert (sim.launches, sim.default.offset) == ([], 8)
    torch.manual_seed(3)
    assert torch.equal(w, torch.rand(300))


@pytest.mark.parametrize("ran", [0, 1])
def test_a_plan_does_not_run_while_a_graph_is_captured(
    ran: int, sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = box(300)
    made = record_calls([("normal_", w, ())])
    for _ in range(ran):
        made.run()
    expected, before = Torch(sim), w._version
    expected.know(w)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "can_use_cuda", lambda: False)
        with pytest.raises(RuntimeError, match="graph"):
            made.run()
    expected.check()
    assert (len(sim.launches), w._version) == (ran, before)
    made.run()
    expected.normal_(w)
    expected.check()


def test_what_waits_does_not_get_into_a_graph(
    sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Torch(sim)
    with fastinit.fused():
        w = torch.empty(300).normal_()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "can_use_cuda", lambda: False)
            with pytest.raises(RuntimeError, match="graph"):
                w.sum()
        assert sim.launches == []
    expected.normal_(w)
    expected.check()


# ---- threads -------------------------------------------------------------------------------------


class Slow(Generator):
    """Gives other threads every chance."""

    def get_offset(self) -> int:
        offset = self.offset
        time.sleep(1e-4)
        return offset


@pytest.mark.parametrize("own_locks", [False, True])
@pytest.mark.parametrize("rejects", [False, True])
def test_threads_draw_no_number_twice(
    rejects: bool, own_locks: bool, sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two plans use two generators in opposite orders: each thread locks them in the same one."""
    generators = [Slow(seed=1), Slow(seed=2, offset=40)]
    if own_locks:  # as torch.Generators have
        monkeypatch.setattr(source, "torch", Proxy(Generator=Slow))
    runs: list[list[tuple[int, int]]] = []

    def run(*args: Any) -> None:
        assert args[2] == 3
        runs.append(list(struct.iter_unpack("<2Q", args[4])))
        sim.run(*args)

    monkeypatch.setattr(runtime, "run", run)
    rounds, n = 25, 5000

    def job(order: list[int]) -> Callable[[], None]:
        made = fastinit.Plan()
        for i in order:
            made.uniform_(torch.empty(n), generator=generators[i])
        if rejects:
            made.trunc_normal_(torch.empty(1), generator=generators[order[0]])
        else:
            made.uniform_(torch.empty(1), generator=generators[order[0]])
        return lambda: [made.run() for _ in range(rounds)] and None

    in_threads(job([0, 1]), job([1, 0]))
    blocks: dict[int, list[int]] = {1: [], 2: []}
    for launch in runs:
        for seed, block in launch:
            blocks[seed].append(block)
    trips = cuda_model.increment(n, "float32", SMALL) // 4
    for seed, g in zip((1, 2), generators):
        taken = [*sorted(blocks[seed]), g.offset // 4]
        assert len(taken) == 2 * rounds + 1
        assert taken[0] == (0 if seed == 1 else 10)
        steps = [b - a for a, b in itertools.pairwise(taken)]
        assert min(steps) >= trips
        assert rejects or sorted(steps) == [trips] * rounds + [trips + 1] * rounds


@pytest.mark.parametrize("key", [1, 1 << 62], ids=["before", "behind"])
@pytest.mark.parametrize("way", ["plan", "function", "block"])
def test_locks_are_taken_in_one_order(
    way: str, key: int, sim: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sparse_ has two generators. Where torch does it, source.turn takes both locks by their keys;
    a thread that takes them otherwise and one that waits for the second would wait for ever."""
    held: list[int] = []
    wrong: list[tuple[int, list[int]]] = []

    @contextmanager
    def lock_of(generator: Any) -> Iterator[None]:
        own = source.generator_id(generator)
        if own not in held and held and own < max(held):
            wrong.append((own, list(held)))
        held.append(own)
        try:
            yield
        finally:
            held.pop()

    g = Generator(3)
    g._cdata = key
    monkeypatch.setattr(source, "lock_of", lock_of)
    w = torch.empty(40, 30)
    if way == "plan":
        made = fastinit.Plan()
        made.sparse_(w, 0.5, generator=g)
        made.run()
    elif way == "function":
        fastinit.sparse_(w, 0.5, generator=g)
    else:
        with fastinit.fused():
            w = torch.empty(40, 30)
            torch_init.sparse_(w, 0.5, generator=g)
    assert g.offset == 4
    assert wrong == []


def test_threads_record_and_run_their_own_plans(sim: Simulation) -> None:
    """The default generator; as many numbers are drawn as all of them together ask for."""
    sim.default = Slow(seed=5)
    starts: list[float] = []

    def job() -> None:
        for _ in range(20):
            t, made = torch.empty(64), fastinit.Plan()
            made.uniform_(t)
            made.run()
            starts.append(float(t[0]))

    in_threads(job, job, job)
    assert sim.default.offset == 4 * 60
    state = State(5)
    serial = [float(cuda_model.uniform(64, "float32", 0, 1, state, SMALL)[0]) for _ in range(60)]
    assert sorted(starts) == sorted(serial)


# ---- what it costs -------------------------------------------------------------------------------


def test_cost_of_a_run_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 161 tensors, without the launch; a slow machine takes a fifth of the bound."""
    with simulated(H200) as sim, pytest.MonkeyPatch.context() as patch:
        made = record_calls(resnet())
        made.run()
        patch.setattr(runtime, "run", lambda *args: None)
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(20):
                made.run()
            seconds.append((time.perf_counter() - start) / 20)
    with capsys.disabled():
        print(f" {min(seconds) * 1e6:.0f} us for a run of 161 tensors ", end="")
    assert (len(sim.launches), sim.default.offset) == (1, 8 + 401 * 55 * 4)
    assert min(seconds) < 300e-6
