# SPDX-License-Identifier: BSD-3-Clause
"""Orthogonal matrices in plans, fused() and models: as one call after the other."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastinit
from fastinit.cpu import qr as cpu_qr
from tests.support.compare import BF16, F16, F32, F64, bits
from tests.support.marks import slow
from tests.support.orthogonal import assert_close, each_dtype
from tests.support.qr_model import drawn, exact

pytestmark = pytest.mark.usefixtures("one_thread")

Step = tuple[str, Tensor, tuple[Any, ...], torch.Generator | None]
POOL = 30000  # bytes


def steps_of(seed: int) -> tuple[list[Step], list[Tensor], list[torch.Generator]]:
    """Random fills, many of matrices, on views of two buffers that overlap at random."""
    r = random.Random(seed)
    buffers = [torch.full((POOL,), 77, dtype=torch.uint8) for _ in range(2)]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    steps: list[Step] = []
    for _ in range(r.randrange(4, 14)):
        name = r.choice(
            ["orthogonal_"] * 4
            + ["orthogonal_batched_", "normal_", "uniform_", "zeros_", "kaiming_normal_", "sparse_"]
        )
        dtype = r.choice([F32, F32, F64, BF16, F16])
        shape: tuple[int, ...] = r.choice([(3, 3), (4, 5), (20, 17), (70, 66), (40, 90), (2, 3, 5)])
        if name == "orthogonal_batched_":
            shape = r.choice([(2, 3, 4), (3, 3, 3), (2, 33, 20)])
        elif len(shape) > 2 and name == "sparse_":
            shape = (5, 5)
        if math.prod(shape) * dtype.itemsize > POOL:
            shape = (20, 17)
        size = math.prod(shape) * dtype.itemsize
        begin = r.choice([0, r.randrange(0, POOL - size + 1) // 8 * 8])
        t = r.choice(buffers)[begin : begin + size].view(dtype).view(shape)
        if steps and r.random() < 0.2 and (steps[-1][1].dim() == 2):
            t = steps[-1][1]
            name = "orthogonal_" if name == "orthogonal_batched_" else name
        args = {"orthogonal_": (r.choice([1, 0.5]),), "sparse_": (0.3,)}.get(name, ())
        g = r.choice([None, None, *generators]) if name not in ("zeros_", "sparse_") else None
        steps.append((name, t, args, g))
    return steps, buffers, generators


def play(owner: Any, steps: list[Step]) -> None:
    for name, t, args, g in steps:
        options = {} if g is None else {"generator": g}
        getattr(owner, name)(t, *args, **options)


def result(buffers: list[Tensor], generators: list[torch.Generator]) -> list[Tensor]:
    return [*(b.clone() for b in buffers), *(g.get_state() for g in generators)]


@pytest.mark.parametrize("seeds", [range(10), *slow([range(10, 60)])], ids=str)
@pytest.mark.parametrize("scratch", [None, 2000], ids=["", "little scratch"])
@pytest.mark.parametrize("smallest", [None, 0], ids=["", "native"])
def test_together_as_one_by_one(
    smallest: int | None, scratch: int | None, seeds: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, so that the second run draws on."""
    if smallest is not None:
        monkeypatch.setattr(fastinit.core.geometry, "MIN_NATIVE", smallest)
    if scratch is not None:
        monkeypatch.setattr(cpu_qr, "SCRATCH", scratch)
    for seed in seeds:
        found = []
        for way in ("one by one", "plan", "fused", "plan in a block"):
            steps, buffers, generators = steps_of(seed)
            generators.append(torch.default_generator.manual_seed(seed))
            plan = fastinit.Plan()
            if way.startswith("plan"):
                play(plan, steps)
            seen = []
            for _ in range(2):
                if way == "one by one":
                    play(fastinit, steps)
                elif way == "plan":
                    plan.run()
                elif way == "fused":
                    with fastinit.fused():
                        play(fastinit, steps)
                else:
                    with fastinit.fused():
                        plan.run()
                seen += result(buffers, generators)
            versions = [t._version for _, t, _, _ in steps]
            found.append((way, seen, versions))
        for way, seen, versions in found[1:]:
            for a, b in zip(found[0][1], seen, strict=True):
                assert torch.equal(a, b), (seed, way)
            assert versions == found[0][2], (seed, way)


@each_dtype
def test_plan_recorded_in_a_block(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    expected = fastinit.orthogonal_(torch.empty(100, 90, dtype=dtype))
    torch.manual_seed(1)
    with fastinit.fused():
        plan = fastinit.Plan()
        t = plan.orthogonal_(torch.empty(100, 90, dtype=dtype))
        plan.run()
    assert torch.equal(bits(t), bits(expected))


def born(reading: bool = False) -> list[Tensor]:
    """Fills that wait in a block, as their memory is new."""
    made = []
    a = torch.empty(100, 120)
    fastinit.orthogonal_(a, 2)
    made.append(a)
    b = torch.empty(90, 100, dtype=BF16)
    b.uniform_()
    fastinit.orthogonal_(b)
    fastinit.orthogonal_(a[10:95])  # overlaps what waits
    if reading:
        made.append(a.sum())
    c = torch.empty(200, 80, dtype=F64).normal_()
    fastinit.orthogonal_(c)
    fastinit.orthogonal_(c)
    c[50:60].fill_(3.0)
    d = torch.empty(3, 60, 60, dtype=F16)
    fastinit.orthogonal_batched_(d, 0.5)
    e = torch.empty(3, 4)
    fastinit.orthogonal_(e)
    f = torch.empty(9000).normal_()
    fastinit.orthogonal_(torch.empty(120, 120))  # nobody gets it
    view = a.view(-1)[:8192]
    view.normal_()
    g = torch.empty(110, 110)
    fastinit.orthogonal_(g.t())
    h = nn.Linear(100, 100).weight
    fastinit.orthogonal_(h)
    return [*made, b, c, d, e, f, g, h.detach()]


@pytest.mark.parametrize("reading", [False, True])
def test_born_in_a_block(reading: bool) -> None:
    torch.manual_seed(9)
    expected = born(reading)
    state = torch.get_rng_state()
    torch.manual_seed(9)
    with fastinit.fused(watch=True) as report:
        found = born(reading)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(bits(a), bits(b)), a.shape
        assert a._version == b._version
    assert report.dropped_elements > 0


@pytest.mark.parametrize("gain", ["2", None, 1j], ids=repr)
def test_errors_in_a_block(gain: Any) -> None:
    """What was to be written before is overwritten, up to the product that fails."""
    found = []
    for fused in (False, True):
        torch.manual_seed(1)
        with fastinit.fused() if fused else nullcontext():
            t = torch.empty(100, 120)
            fastinit.uniform_(t)
            with pytest.raises((TypeError, RuntimeError)):
                fastinit.orthogonal_(t, gain)
        found.append((bits(t), torch.get_rng_state()))
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 40, 3)
        self.lstm = nn.LSTM(20, 30)
        self.head = nn.Linear(100, 90)
        self.half = nn.Linear(60, 160).bfloat16()
        self.experts = nn.Parameter(torch.zeros(4, 24, 40))


def initialise(m: nn.Module) -> None:
    for name, p in m.named_parameters(recurse=False):
        if name == "experts":
            fastinit.orthogonal_batched_(p, 0.5)
        elif p.dim() > 1:
            fastinit.orthogonal_(p, 2**0.5)
            with torch.no_grad():
                p[:1].zero_()
        else:
            fastinit.normal_(p)


def test_models() -> None:
    nets = []
    for way in ("apply", "init_model_", "record", "fused"):
        torch.manual_seed(1)
        net = Net()
        for _ in range(2):
            if way == "apply":
                net.apply(initialise)
            elif way == "init_model_":
                fastinit.init_model_(net, initialise)
            elif way == "record":
                fastinit.record(net, initialise).run()
            else:
                with fastinit.fused():
                    net.apply(initialise)
        nets.append((way, net, torch.get_rng_state()))
    for way, net, state in nets[1:]:
        assert torch.equal(state, nets[0][2]), way
        for (name, a), b in zip(nets[0][1].named_parameters(), net.parameters()):
            assert torch.equal(bits(a), bits(b)), (way, name)
            assert a._version == b._version, (way, name)
    torch.manual_seed(1)
    Net()
    net = nets[0][1]
    torch.manual_seed(77)
    initialise(net.head)
    expected = exact(drawn((90, 100), F32, torch.Generator().manual_seed(77)))
    assert_close(net.head.weight[1:], expected[1:], gain=2**0.5)


def test_plan_says_what_has_moved() -> None:
    t = torch.empty(30, 20, dtype=BF16)
    plan = fastinit.Plan()
    assert plan.orthogonal_(t, 2) is t
    assert len(plan) == 1
    t.data = torch.empty(30, 20, dtype=BF16)
    with pytest.raises(RuntimeError, match="other memory"):
        plan.run()


def test_a_plan_notices_another_shape() -> None:
    t = torch.empty(64, 32)
    plan = fastinit.Plan()
    plan.orthogonal_(t)
    plan.run()
    t.resize_(32, 64)
    with pytest.raises(RuntimeError, match="another shape"):
        plan.run()


def test_copies_in_a_block_are_not_factored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = fastinit.core.kernels.orthonormalize

    def count(packed: bytes, written: bytearray) -> None:
        seen.append(len(written))
        run(packed, written)

    monkeypatch.setattr(fastinit.core.kernels, "orthonormalize", count)
    with fastinit.fused():
        t = fastinit.orthogonal_(torch.empty(150, 150))
        copies = [t.clone() for _ in range(3)]
        other = torch.zeros(150, 150).copy_(t)
    assert seen == [1]
    assert all(torch.equal(t, c) for c in (*copies, other))
