# SPDX-License-Identifier: BSD-3-Clause
"""Which device does what: order among devices, generators, thresholds, several GPUs, errors."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit import execute, init_model_, probe
from fastinit.capture import operators
from fastinit.core import geometry, kernels, source
from fastinit.core.fill import Fill
from fastinit.cpu import fills as cpu_fills
from fastinit.cuda import fills as cuda_fills
from fastinit.cuda import runtime
from tests.support.compare import BF16, F32, F64, POISONS
from tests.support.cuda_gpu import (
    ON_GPU,
    START,
    Gpu,
    in_scope,
    kinds,
    only_hardware,
    only_simulated,
)
from tests.support.cuda_host import Generator, simulated
from tests.support.cuda_model import SMALL, State
from tests.support.cuda_world import World

needs_two = pytest.mark.skipif(
    not ON_GPU or torch.cuda.device_count() < 2, reason="needs several GPUs"
)


# ---- groups --------------------------------------------------------------------------------------


def some_fills(devices: Iterable[int], sparse: Iterable[int] = ()) -> list[Fill]:
    t, at = torch.empty(1), set(sparse)
    return [Fill(t, "sparse" if i in at else "uniform", device=d) for i, d in enumerate(devices)]


def test_groups() -> None:
    for devices, sparse, expected in (
        ([-1, 0, 1, 0, -1, 1, 0], [], [[0, 4], [1, 3, 6], [2, 5]]),
        ([0, 0, -1, -1, 1, 0, 1, -1], [5], [[0, 1], [2, 3], [4], [5], [6], [7]]),
        ([], [], []),
    ):
        fills = some_fills(devices, sparse)
        places = {id(f): i for i, f in enumerate(fills)}
        assert [[places[id(f)] for f in group] for group in execute._groups(fills)] == expected
    fills = some_fills([0, 1, 0, -1])  # GPUs 0 and 1 from one generator
    for fill in fills[:3]:
        fill.generator = torch.default_generator
    assert execute._groups(fills) == [[fill] for fill in fills]


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


@only_simulated
def test_each_group_goes_to_its_device(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    fills = some_fills([0, -1, 1, 0, 1])
    seen: list[tuple[int, int]] = []

    class Batch:
        def __init__(self, fills: list[Fill]) -> None:
            self.fills = fills

        def run(self, bumps: list[int]) -> None:
            seen.append((self.fills[0].device, len(self.fills)))
            bumps[:] = [2] * len(self.fills)

    monkeypatch.setattr(cuda_fills, "Batch", Batch)
    on_cpu = lambda fills, bumps, progress: seen.append((-1, len(fills)))  # noqa: E731
    monkeypatch.setattr(cpu_fills, "run", on_cpu)
    before = fills[0].tensor._version
    execute.run(fills)
    assert seen == [(0, 2), (-1, 1), (1, 2)]
    assert fills[0].tensor._version == before + 8
    assert execute.prepare(fills, []) is None
    assert execute.prepare(fills[1:2], []) is None
    assert isinstance(execute.prepare(fills[2:3], []), execute.Prepared)


@pytest.mark.parametrize("way", ["plan", "scope"])
def test_cpu_and_gpu_in_one(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """sparse_ on a GPU takes its rows between what CPU tensors draw before and after it."""
    names = ["uniform_", "normal_", "sparse_", "normal_", "uniform_", "uniform_"]
    with simulated(SMALL) as sim:
        world = World(Gpu(torch.device("cpu"), sim))
        here = [world.memory(60 + i).view(-1) for i in range(6)]
        here[2] = world.memory(600).view(20, 30)
        on_gpu = {here[i].untyped_storage()._cdata for i in (1, 2, 4)}
        with monkeypatch.context() as patch:
            patch.setattr(
                geometry, "device_of", lambda t: 0 if t.untyped_storage()._cdata in on_gpu else -1
            )
            torch.manual_seed(6)
            made = fastinit.Plan()

            def each(m: nn.Module) -> None:
                for name, t in zip(names, here):
                    args = (0.4, 0.01) if name == "sparse_" else (0.0, 1.0)
                    getattr(made if way == "plan" else torch_init, name)(t, *args)
                    world.steps.append((name, t, args, -1))

            if way == "plan":
                each(nn.Module())
                made.run()
                assert made._prepared is None
            else:
                init_model_(nn.ParameterList(here), each)
        after, state = torch.get_rng_state(), State(START.seed, START.offset)
        torch.manual_seed(6)
        for i, (name, t, args, _) in enumerate(world.steps):
            if i in (1, 2, 4):
                memory = world.memories[t.untyped_storage().data_ptr()]
                memory.forget()
                world._model(name, t, args, state)
                found = memory.base.double().numpy()
                written = memory.written > 0
                inside = (memory.ends[0] <= found) & (found <= memory.ends[1])
                assert inside[written].all()
                assert np.isnan(found[~written]).all()
            else:
                assert torch.equal(t, getattr(torch_init, name)(torch.empty_like(t), *args))
        assert torch.equal(after, torch.get_rng_state())
        assert sim.default.offset == state.offset
        assert sum(sim.launches) == 3


# ---- generators ----------------------------------------------------------------------------------


def test_a_generator_of_another_device_is_torchs_error(gpu: Gpu) -> None:
    if not gpu.is_gpu:
        pytest.skip("a dry run on the CPU")
    for name, args in (("uniform_", ()), ("normal_", ()), ("sparse_", (0.5,))):
        t = gpu.full(20, 30)
        before = gpu.states()
        for module in (torch_init, fastinit):
            with pytest.raises(RuntimeError, match="generator"):
                getattr(module, name)(t, *args, generator=torch.Generator())
        assert (t == 13).all()
        gpu.assert_same(before, gpu.states(), name)
    assert gpu.launches == []
    with pytest.raises(TypeError):
        fastinit.uniform_(gpu.full(3), generator="cuda")


class Proxy:
    """torch, but for some names."""

    def __init__(self, **own: Any) -> None:
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


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


# ---- thresholds ----------------------------------------------------------------------------------


def stand_in(cpu: bool = False, cuda: bool = False) -> Any:
    return SimpleNamespace(is_cpu=cpu, is_cuda=cuda)


@pytest.mark.parametrize("usable", [True, False])
def test_where_there_are_kernels(usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "can_use_cuda", lambda: usable)
    assert geometry.is_here(stand_in(cpu=True))
    assert geometry.is_here(stand_in(cuda=True)) == usable
    assert not geometry.is_here(stand_in())
    native = lambda *shape, **how: (  # noqa: E731
        operators.makes_native((shape,), how, geometry.MIN_NATIVE)
    )
    for device in ("cuda", torch.device("cuda", 1)):
        assert native(2, 3, device=device) == usable
        assert not native(2, 0, device=device)
        assert not native(2, 3, device=device, dtype=torch.int32)
    assert not native(2, 3, device="cpu")
    assert not native(90, 300, device="meta")


def test_the_real_thresholds() -> None:
    assert (geometry.MIN_NATIVE, geometry.MIN_CUDA) == (1 << 13, 1 << 24)


@only_simulated
@pytest.mark.parametrize("name", ["uniform_", "normal_", "zeros_", "trunc_normal_", "eye_"])
def test_small_tensors_go_to_torch(name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single call of torch's does not wait for its kernel. Constants count for less."""
    monkeypatch.setattr(geometry, "MIN_CUDA", 900)
    rows = 30 * (fastinit.init._CONSTANT if name == "zeros_" else 1)
    function = getattr(fastinit, name)
    seen = []
    for module in (gpu.torch, fastinit):
        gpu.place_defaults()
        small = getattr(module, name)(torch.empty(rows - 1, 30))
        assert gpu.launches == []
        seen.append({"small": small, **gpu.states()})
    gpu.assert_same(seen[0], seen[1], name)
    function(torch.empty(rows, 30))
    assert gpu.launches == [1]
    made = fastinit.Plan()
    getattr(made, name)(torch.empty(2, 3))
    made.run()  # of many together none is too small
    assert gpu.launches == [1, 1]
    with fastinit.fused(watch=True):
        function(torch.empty(2, 3))
        kept = function(torch.empty(2, 3))
    assert sum(gpu.launches) == 2 + (2 if name == "trunc_normal_" else 1)  # or it died
    del kept


@only_simulated
@pytest.mark.parametrize("module", [torch_init, fastinit], ids=["torch", "fastinit"])
def test_small_tensors_wait_in_a_scope(
    module: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is too small for single calls and on the CPU. Older ones that others know do not
    wait: those that are too small go to torch."""
    monkeypatch.setattr(geometry, "MIN_CUDA", 900)
    monkeypatch.setattr(geometry, "MIN_NATIVE", 1 << 13)
    older, small, large = nn.Linear(3, 2), torch.empty(899), torch.empty(900)
    others = small[:1], large[:1]
    seen = []
    for fused in (True, False):
        gpu.place_defaults()
        with in_scope(fused) as report:
            a, b, c = torch.empty(10), torch.empty(1), torch.empty(4, 4)
            a.normal_()
            (module if fused else torch_init).uniform_(b)
            (module if fused else torch_init).eye_(c)
            assert not fused or report.recorded_elements == 27
            small.uniform_()
            large.uniform_()
        if fused:
            assert report.at_once_elements == 900
            init_model_(older)
            assert gpu.launches == [1, 3, 2]
        else:
            older.reset_parameters()
        made = (*others, a, b, c, small.clone(), large.clone(), older.weight.detach().clone())
        seen.append({str(i): t.clone() for i, t in enumerate(made)} | gpu.states())
    gpu.assert_same(seen[1], seen[0], "small ones")


# ---- several GPUs --------------------------------------------------------------------------------


@needs_two
@only_hardware
def test_tensors_of_another_gpu(gpu: Gpu) -> None:
    there = torch.device("cuda", 1)
    for name, args in (("uniform_", (-0.3, 0.7)), ("normal_", ()), ("eye_", ()), ("ones_", ())):
        for n, dtype in itertools.product((1, 300, gpu.threads + 1), (F32, F64, BF16)):
            seen = []
            for module, poison in zip((torch_init, fastinit), POISONS):
                START.place(torch.cuda.default_generators[1])
                t = torch.full((n, 3), poison, dtype=dtype, device=there)
                done = kernels.native_fills
                getattr(module, name)(t, *args)
                assert (kernels.native_fills > done) == (module is fastinit)
                state = gpu.state_of(torch.cuda.default_generators[1])
                seen.append({"t": gpu.values(t), "state": state, **gpu.states()})
                assert torch.cuda.current_device() == 0
            gpu.assert_same(seen[0], seen[1], f"{name}, {n}, {dtype}")


@needs_two
@only_hardware
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("way", ["plan", "scope", "calls"])
def test_fills_on_two_gpus(way: str, shared: bool, gpu: Gpu) -> None:
    """In one plan or scope; also if one generator without an index serves both."""
    both = (torch.device("cuda", 0), torch.device("cuda", 1))
    for op, dtype, layout in kinds():  # proofs of the other as well
        probe.verdict(op, dtype, layout, 1)
    seen = []
    for fast in (True, False):
        for d in both:
            START.place(torch.cuda.default_generators[d.index])
        g = START.place(torch.Generator("cuda")) if shared else None
        made = fastinit.Plan()
        to: Any = (made if way == "plan" else fastinit) if fast else torch_init
        gpu.launches.clear()
        with in_scope(fast and way == "scope"):
            tensors = [torch.empty(500 + i, device=both[i * 3 // 2 % 2]) for i in range(40)]
            for i, t in enumerate(tensors):
                _ = to.normal_(t, generator=g) if i % 3 else to.zeros_(t)
            model = nn.Sequential(nn.Linear(6, 5, device=both[0]), nn.Linear(5, 4, device=both[1]))
        made.run()
        if fast and not shared and way == "plan":
            assert len(gpu.launches) == 2
        tensors += [p.detach() for p in model.parameters()]
        seen.append({str(i): gpu.values(t).cpu() for i, t in enumerate(tensors)})
        seen[-1] |= {str(d): gpu.state_of(torch.cuda.default_generators[d.index]) for d in both}
        seen[-1]["shared"] = None if g is None else gpu.state_of(g)
    gpu.assert_same(seen[1], seen[0], way)


# ---- errors of a launch --------------------------------------------------------------------------


@only_hardware
def test_errors_of_a_launch_are_raised(gpu: Gpu) -> None:
    run, size = kernels._cuda.run_fill, kernels._cuda.FILL_SIZE
    for fills, count in ((bytes(3), 1), (bytes(size), 2), (bytes(size * 26), 26)):
        with pytest.raises(ValueError, match="not a packed launch"):
            run(fills, 0, count, 1, bytes(16), 0, 0, 0)
    with pytest.raises(ValueError, match="not a packed launch"):
        run(bytes(size), 0, 1, 1, bytes(16 * 9), 0, 0, 0)
    with pytest.raises(RuntimeError, match="CUDA"):
        run(bytes(size), 0, 1, 1, bytes(16), 0, torch.cuda.device_count() + 3, 0)
    assert torch.cuda.current_device() == 0
    fastinit.normal_(gpu.empty(1000))  # nothing is left of it


def test_errors_of_a_launch_surface(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions and generators stay as they were."""
    if not gpu.is_gpu:
        pytest.skip("a dry run on the CPU")

    def elsewhere(*args: Any) -> None:
        if gpu.sim is not None:
            raise RuntimeError("CUDA: no such device")
        kernels._cuda.run_fill(*args[:-1], torch.cuda.device_count(), 0)

    t, made = gpu.full(5000), fastinit.Plan()
    fastinit.normal_(t)
    made.uniform_(t)
    before = {**gpu.states(), "version": t._version, "t": gpu.values(t).clone()}
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "run", elsewhere)
        for function in (lambda: fastinit.normal_(t), made.run, made.run):
            with pytest.raises(RuntimeError, match="CUDA"):
                function()
            now = {**gpu.states(), "version": t._version, "t": gpu.values(t)}
            gpu.assert_same(before, now, "after an error")
    made.run()
    assert math.isfinite(t.sum().item())
