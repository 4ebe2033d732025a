# SPDX-License-Identifier: BSD-3-Clause
"""Plan: fills recorded, then written together, as if they had been called one by one."""

from __future__ import annotations

import gc
import inspect
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from tests.support.compare import BF16, F16, F32, F64, Position, attempt
from tests.support.layouts import box
from tests.support.plans import ARGS, FILLS, Step, compare, shape_for


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.usefixtures("own_factors")
def test_each_function_alone(name: str) -> None:
    compare(lambda: [box(*shape_for(name))], [(name, 0, ARGS.get(name, ()), {})])
    compare(lambda: [box(*shape_for(name))], [(name, 0, ARGS.get(name, ()), {})], runs=3)


@pytest.mark.parametrize("name", FILLS)
def test_recording_writes_and_draws_nothing(name: str) -> None:
    tensor, generator = box(*shape_for(name)), torch.Generator().manual_seed(1)
    states = generator.get_state(), torch.get_rng_state()
    options = {"generator": generator} if "generator" in signature(name) else {}
    plan = fastinit.Plan()
    assert len(plan) == 0
    assert getattr(plan, name)(tensor, *ARGS.get(name, ()), **options) is tensor
    assert len(plan) == 1
    assert (tensor == 13.0).all()
    assert torch.equal(states[0], generator.get_state())
    assert torch.equal(states[1], torch.get_rng_state())


def signature(name: str) -> list[str]:
    return list(inspect.signature(getattr(torch_init, name)).parameters)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.usefixtures("own_factors")
def test_everything_in_one_plan(dtype: torch.dtype) -> None:
    names = [n for n in FILLS if n != "orthogonal_" or dtype in (F32, F64)]
    steps = [(n, i, ARGS.get(n, ()), {}) for i, n in enumerate(names)]

    def make() -> list[torch.Tensor]:
        return [box(*shape_for(n), dtype=dtype) for n in names]

    for position in (Position(), Position(words=623), Position(words=3, cached=True)):
        compare(make, steps, position)
        compare(make, steps[::-1], position)
        compare(make, steps, position, runs=2)


@pytest.mark.usefixtures("own_factors")
def test_several_generators() -> None:
    """Words belong to generators, not to the plan: each continues where it was."""
    given: list[tuple[str, tuple, Any]] = [
        ("uniform_", (), 0), ("normal_", (), None), ("normal_", (), 1), ("uniform_", (-1, 1), 0),
        ("sparse_", (0.5,), 1), ("trunc_normal_", (), 0), ("orthogonal_", (), 1),
        ("kaiming_normal_", (), None), ("xavier_uniform_", (), 0), ("uniform_", (), 1),
    ]  # fmt: skip
    steps: list[Step] = [
        (name, i, args, {} if which is None else {"generator": which})
        for i, (name, args, which) in enumerate(given)
    ]
    for size in ((20, 30), (3, 5), (200, 101)):
        compare(lambda s=size: [box(*s) for _ in given], steps, Position(words=9, cached=True))


def test_empty_plan() -> None:
    state = torch.get_rng_state()
    plan = fastinit.Plan()
    assert plan.run() is None
    assert torch.equal(state, torch.get_rng_state())


def test_tensors_without_elements() -> None:
    for name in ("uniform_", "normal_", "trunc_normal_", "zeros_", "xavier_uniform_", "eye_"):
        compare(lambda: [box(0, 3), box(4, 4)], [(name, 0, (), {}), ("normal_", 1, (), {})])
    plan = fastinit.Plan()
    _, _, warned = attempt(lambda: [plan.kaiming_normal_(box(0, 3)), plan.run()])
    assert warned == [(UserWarning, "Initializing zero-element tensors is a no-op")]


def test_what_only_torch_can_fill_keeps_its_place() -> None:
    def make() -> list[torch.Tensor]:
        return [
            box(50),
            torch.ones(50, dtype=torch.complex64),
            box(50),
            torch.ones(9, dtype=torch.int),
        ]

    steps: list[Step] = [
        ("uniform_", 0, (), {}), ("normal_", 1, (), {}), ("normal_", 2, (), {}),
        ("ones_", 3, (), {}), ("uniform_", 1, (), {}), ("uniform_", 0, (), {"generator": 0}),
        ("normal_", 2, (0.0, math.inf), {}), ("uniform_", 2, (False, True), {}),
    ]  # fmt: skip
    compare(make, steps, runs=2)


def test_meta_tensors_are_passed_by() -> None:
    plan = fastinit.Plan()
    meta, real = torch.empty(5, 5, device="meta"), box(5, 5)
    for name in ("normal_", "uniform_", "orthogonal_", "zeros_"):
        getattr(plan, name)(meta)
    plan.normal_(real)
    torch.manual_seed(3)
    plan.run()
    torch.manual_seed(3)
    assert torch.equal(real, torch_init.normal_(box(5, 5)))


BAD: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = [
    ("normal_", (30,), (0.0, -1.0)), ("uniform_", (30,), (1.0, 0.0)), ("eye_", (3,), ()),
    ("dirac_", (4, 4), ()), ("xavier_normal_", (4,), ()), ("constant_", (4,), ("x",)),
    ("kaiming_uniform_", (4, 4), (0, "fan_x")), ("sparse_", (4,), (0.5,)),
    ("trunc_normal_", (4,), (0.0, 0.0)), ("zeros_", (4,), (1,)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "args"), BAD, ids=str)
def test_mistakes_are_reported_as_torch_does(name: str, shape: tuple, args: tuple) -> None:
    """When recording or when running: never later, never differently."""
    _, failure, _ = attempt(getattr(torch_init, name), box(*shape), *args)
    assert failure

    def record_and_run() -> None:
        plan = fastinit.Plan()
        getattr(plan, name)(box(*shape), *args)
        plan.run()

    assert attempt(record_and_run)[1] == failure


def test_failure_comes_after_what_was_asked_before() -> None:
    """Torch fails at the second call, with the first one done and the third one not."""
    good, bad, later = box(50), torch.ones(50, dtype=torch.int64), box(50)
    plan = fastinit.Plan()
    plan.uniform_(good)
    plan.normal_(bad)
    plan.uniform_(later)
    torch.manual_seed(2)
    with pytest.raises(NotImplementedError, match="normal_kernel_cpu"):
        plan.run()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(good, torch_init.uniform_(box(50)))
    assert torch.equal(state, torch.get_rng_state())
    assert (later == 13.0).all()


def test_a_plan_keeps_its_tensors_alive() -> None:
    base = box(100, 100)
    plan = fastinit.Plan()
    for row in base:
        plan.ones_(row)
    for _ in range(20):
        plan.normal_(torch.empty(10_000))  # nobody else holds it
    gc.collect()
    plan.run()
    assert (base == 1.0).all()


def test_memory_that_changed_is_not_written() -> None:
    """The addresses are those of the recording; anything else is an error, not a stray write."""
    tensor, other = box(4000), box(4000)
    plan = fastinit.Plan()
    plan.normal_(tensor)
    plan.normal_(other)
    state = torch.get_rng_state()
    tensor.data = box(3)
    with pytest.raises(RuntimeError, match="record"):
        plan.run()
    assert (tensor == 13.0).all()
    assert (other == 13.0).all()
    assert torch.equal(state, torch.get_rng_state())


def test_the_plan_really_is_native() -> None:
    tensors = [box(n) for n in (1, 5, 17, 1000, 5000)]  # small ones too: together they pay
    plan = fastinit.Plan()
    for tensor in tensors:
        plan.uniform_(tensor)
    plan.run()  # may also fill a few small tensors to prove itself
    before = fastinit.core.kernels.native_fills
    plan.run()
    assert fastinit.core.kernels.native_fills == before + len(plan) == before + 5


def test_plans_are_independent_and_nest() -> None:
    one, two = fastinit.Plan(), fastinit.Plan()
    a, b, c = box(50), box(50), box(50)
    one.zeros_(a)
    two.ones_(b)
    assert (len(one), len(two)) == (1, 1)
    fastinit.uniform_(c)  # not recorded anywhere: a plan is not a mode
    assert not (c == 13.0).any()
    two.run()
    assert (a == 13.0).all()
    assert (b == 1.0).all()
    one.run()
    assert (a == 0.0).all()


def test_requires_grad_and_warnings() -> None:
    weight = torch.nn.Parameter(box(30, 20))
    plan = fastinit.Plan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan.kaiming_normal_(weight)
        plan.run()
    assert weight.requires_grad
    assert weight.grad_fn is None
    (weight**2).sum().backward()
    assert weight.grad is not None


def test_many_tensors_and_threads() -> None:
    """More fills than threads and tiles, of uneven sizes, at each number of threads."""
    sizes = [(i * 7919) % 5000 + 1 for i in range(300)] + [1_000_003, 3, 300_001]
    names = ["uniform_", "normal_", "zeros_", "normal_", "ones_"]
    steps: list[Step] = [(names[i % 5], i, (), {}) for i in range(len(sizes))]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        compare(lambda: [box(n) for n in sizes], steps)
