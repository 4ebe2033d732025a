# SPDX-License-Identifier: BSD-3-Clause
"""fastinit.Plan on a GPU: recorded once, packed once, run as often as one likes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastinit
from fastinit import execute
from fastinit.cuda import fills as cuda_fills
from fastinit.cuda import runtime
from tests.support.compare import BF16, F32, F64, POISONS, takes_generator
from tests.support.cuda_gpu import Gpu, each_dtype, only_hardware, only_simulated
from tests.support.cuda_host import simulated
from tests.support.cuda_model import H200
from tests.support.cuda_world import World

Call = tuple[str, tuple[int, ...], tuple[Any, ...]]


def resnet() -> list[Call]:
    """161 tensors, as ResNet-50 has; the largest takes three trips of the small GPU."""
    calls: list[Call] = []
    for i in range(53):
        n, k = (64, 6) if i == 52 else (4 + i % 7, 1 + i % 3)
        calls += [("kaiming_normal_", (n, 4, k, k), (0, "fan_out", "relu"))]
        calls += [("ones_", (n,), ()), ("zeros_", (n,), ())]
    calls += [("kaiming_uniform_", (40, 60), (math.sqrt(5),)), ("uniform_", (40,), (-0.1, 0.1))]
    return calls


def recorded(world: World, calls: list[Call], into: Any = None, dtype: torch.dtype = F32) -> Any:
    into = into or fastinit.Plan()
    for name, shape, args in calls:
        world.do(into, name, world.memory(math.prod(shape), dtype).view(shape), *args)
    return into


@each_dtype
def test_a_plan_is_one_launch(dtype: torch.dtype, world: World) -> None:
    """Every byte is stored once a run, the numbers are torch's, and the next run draws on."""
    made = recorded(world, resnet(), dtype=dtype)
    assert len(made) == 161
    assert world.gpu.launches == []
    assert all(memory.base._version == memory.start for memory in world.memories.values())
    for run in range(1, 4):
        assert made.run() is None
        assert world.gpu.launched(*[161] * run)
        assert world.gpu.copied(1)
    world.check(runs=3)


@only_simulated
def test_the_prepared_path_is_used_from_the_first_run_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the table is asynchronous: only on its own stream is it known to be there."""
    monkeypatch.setattr(execute, "run", lambda fills: pytest.fail("packed for one run only"))
    made = recorded(world, resnet())
    assert made._prepared is None
    made.run()
    prepared = made._prepared
    assert prepared is not None
    monkeypatch.setattr(cuda_fills, "_descriptors", lambda *a: pytest.fail("packed again"))
    for stream, copies in ((7, 1), (7, 1), (8, 2), (8, 2), (7, 3)):
        monkeypatch.setattr(runtime, "stream_of", lambda device, s=stream: s)
        made.run()
        assert world.gpu.copied(copies)
    assert made._prepared is prepared
    world.check(runs=6)


MOVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "other": lambda t: setattr(t, "data", torch.full_like(t, 14.0)),
    "none": lambda t: setattr(t, "data", t.new_empty(0)),
    "freed": lambda t: t.untyped_storage().resize_(0),
    "larger": lambda t: t.resize_(t.numel() + 4096),
}


@pytest.mark.parametrize("ran", [0, 1])
@pytest.mark.parametrize("move", MOVES)
def test_moved_memory_is_an_error(move: str, ran: int, gpu: Gpu) -> None:
    """Nothing is drawn or written then, not even what did not move."""
    w, b = gpu.full(1000), gpu.full(100)
    made = fastinit.Plan()
    made.normal_(w)
    made.uniform_(b)
    for _ in range(ran):
        made.run()
    MOVES[move](b)
    before = {"w": gpu.values(w).clone(), **gpu.states()}
    launches = len(gpu.launches)
    with pytest.raises(RuntimeError, match="other memory"):
        made.run()
    assert len(gpu.launches) == launches
    gpu.assert_same(before, {"w": gpu.values(w), **gpu.states()}, "after the error")


@only_simulated
@pytest.mark.parametrize("ran", [0, 1])
def test_less_memory_at_the_same_address(ran: int, gpu: Gpu) -> None:
    """A caching allocator gives out what was freed; the rest of it may be somebody else's."""
    memory = bytearray(4000)
    w = torch.frombuffer(memory, dtype=F32)
    old = StorageWeakRef(w.untyped_storage())
    made = fastinit.Plan()
    made.uniform_(w, 1.0, 2.0)
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
def test_a_model_that_moved_is_an_error(ran: int, gpu: Gpu) -> None:
    """Though only a view of its tensor was recorded."""
    model = nn.Linear(4, 3, device=gpu.here)
    made = fastinit.record(model, lambda m: [m.weight.data[1].zero_(), m.bias.data.zero_()])
    for _ in range(ran):
        made.run()
    model.weight.data = gpu.full(3, 4)
    with pytest.raises(RuntimeError, match="other memory"):
        made.run()
    assert (model.weight == 13.0).all()


def test_recording_goes_on_after_a_run(world: World) -> None:
    calls = resnet()
    made = recorded(world, calls[:80])
    made.run()
    world.check()
    recorded(world, calls[80:], made)
    made.run()
    made.run()
    assert world.gpu.launched(80, 161, 161)
    assert world.gpu.copied(2)
    world.steps = world.steps[:80] + world.steps * 2  # as they were done
    world.check(once=False)


def test_calls_in_between_keep_their_place(world: World) -> None:
    """torch's own functions; before them the first fills are written, after them the others."""
    w, b, c = world.memory(45).view(5, 9), world.memory(3000), world.memory(100)
    made = fastinit.Plan()
    world.do(made, "uniform_", w)
    world.do(made, "uniform_", b)
    world.do(made, "constant_", w, torch.tensor(2.0))
    world.do(made, "zeros_", w[0])
    world.do(made, "normal_", c)
    for run in range(1, 3):
        made.run()
        assert world.gpu.launched(*[2, 2] * run)
    world.check(once=False, runs=2)


def test_a_failing_call_leaves_what_comes_after_it(gpu: Gpu) -> None:
    good, later = gpu.full(50), gpu.full(50)
    made = fastinit.Plan()
    made.uniform_(good)
    made.normal_(torch.ones(5, dtype=torch.int64, device=gpu.here))
    made.uniform_(later)
    gpu.place_defaults()
    with pytest.raises((NotImplementedError, RuntimeError), match="normal"):
        made.run()
    assert (good < 1).all()
    assert (later == 13).all()


@pytest.mark.usefixtures("own_factors")
def test_a_plan_with_what_torch_does(gpu: Gpu) -> None:
    """Tight bounds, which torch 2.12 and later proposes uniform values for, are calls between
    launches, orthogonal_ is not; all keep their order."""
    seen = []
    for planned, poison in zip((False, True), POISONS):
        generators = [None, gpu.generator(), gpu.generator()]
        gpu.place_defaults()
        plan = fastinit.Plan()
        to: Any = plan if planned else gpu.torch
        tensors = []
        for i, (name, shape, args) in enumerate(
            [
                *(
                    ("uniform_", (900,), ()),
                    ("orthogonal_", (12, 7), (1.5,)),
                    ("ones_", (3, 4), ()),
                ),
                *(("trunc_normal_", (400,), (0.0, 1.0, -0.01, 0.02)), ("normal_", (40,), ())),
                *(
                    ("orthogonal_", (4, 30), ()),
                    ("sparse_", (40, 30), (0.3,)),
                    ("eye_", (9, 5), ()),
                ),
            ]
            * 2
        ):
            dtype = F32 if name == "orthogonal_" or i % 3 else F64
            tensors.append(gpu.full(*shape, dtype=dtype, value=poison))
            options = {"generator": generators[i % 3]} if takes_generator(name) else {}
            getattr(to, name)(tensors[-1], *args, **options)
        plan.run()
        seen.append({str(i): gpu.values(t) for i, t in enumerate(tensors)})
        seen[-1] |= {f"version {i}": t._version for i, t in enumerate(tensors)}
        seen[-1] |= gpu.states(*generators[1:])  # type: ignore[arg-type]
    gpu.assert_same(seen[0], seen[1], "plan")


@only_hardware
@pytest.mark.parametrize("kind", ["cuda", "cuda:0"])
def test_generators_of_the_current_device(kind: str, gpu: Gpu) -> None:
    """torch.Generator("cuda") has no index, and serves a tensor on any GPU."""
    seen = []
    for module, poison in zip((gpu.torch, fastinit), POISONS):
        g = torch.Generator(kind).manual_seed(5)
        t = gpu.full(5000, value=poison)
        module.normal_(t, generator=g)
        module.uniform_(t[:77], generator=g)
        seen.append({"values": gpu.values(t), "state": gpu.state_of(g)})
    gpu.assert_same(seen[0], seen[1], kind)
    assert gpu.launches == [1, 1], "left to torch"


def test_cost_of_a_run_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 161 tensors, without the launch; a slow machine takes a fifth of the bound."""
    with simulated(H200) as sim, pytest.MonkeyPatch.context() as patch:
        made = recorded(World(Gpu(torch.device("cpu"), sim)), resnet())
        made.run()
        launches = list(sim.launches)
        patch.setattr(runtime, "run", lambda *args: None)
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(20):
                made.run()
            seconds.append((time.perf_counter() - start) / 20)
    with capsys.disabled():
        print(f" {min(seconds) * 1e6:.0f} us for a run of 161 tensors ", end="")
    assert launches == [161]
    assert sim.default.offset == 401 * 55 * 4
    assert min(seconds) < 300e-6
