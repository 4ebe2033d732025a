# SPDX-License-Identifier: BSD-3-Clause
"""Threads that draw from one GPU generator, and the order in which they lock several."""

from __future__ import annotations

import itertools
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from fastinit.core import source
from fastinit.cuda import runtime
from tests.support import cuda_model
from tests.support.cuda_gpu import START, Gpu, in_scope, only_simulated
from tests.support.cuda_host import Generator
from tests.support.cuda_model import SMALL
from tests.support.threads import in_threads


class Slow(Generator):
    """Gives other threads every chance."""

    def get_offset(self) -> int:
        offset = self.offset
        time.sleep(1e-4)
        return offset


@only_simulated
@pytest.mark.parametrize("own_locks", [False, True])
@pytest.mark.parametrize("rejects", [False, True])
def test_threads_draw_no_number_twice(
    rejects: bool, own_locks: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two plans use two generators in opposite orders: each thread locks them in the same one."""
    generators = [Slow(seed=1), Slow(seed=2, offset=40)]
    if own_locks:  # as torch.Generators have; without, the default one's serves all
        lock_of = source.lock_of
        locks = {id(g): threading.RLock() for g in generators}
        monkeypatch.setattr(
            source, "lock_of", lambda g: locks[id(g)] if isinstance(g, Slow) else lock_of(g)
        )
    runs: list[list[tuple[int, int]]] = []
    launch = runtime.run

    def run(*args: Any) -> None:
        assert args[2] == 3
        runs.append(list(struct.iter_unpack("<2Q", args[4])))
        launch(*args)

    monkeypatch.setattr(runtime, "run", run)
    rounds, n = 25, 5000

    def job(order: list[int]) -> Callable[[], None]:
        made = fastinit.Plan()
        for i in order:
            made.uniform_(torch.empty(n), generator=generators[i])
        last = made.trunc_normal_ if rejects else made.uniform_
        last(torch.empty(1), generator=generators[order[0]])
        return lambda: [made.run() for _ in range(rounds)] and None

    in_threads(job([0, 1]), job([1, 0]))
    blocks: dict[int, list[int]] = {1: [], 2: []}
    for seed, block in itertools.chain(*runs):
        blocks[seed].append(block)
    trips = cuda_model.increment(n, "float32", SMALL) // 4
    for seed, g in zip((1, 2), generators):
        taken = [*sorted(blocks[seed]), g.offset // 4]
        assert len(taken) == 2 * rounds + 1
        assert taken[0] == (0 if seed == 1 else 10)
        steps = [b - a for a, b in itertools.pairwise(taken)]
        assert min(steps) >= trips
        assert rejects or sorted(steps) == [trips] * rounds + [trips + 1] * rounds


@only_simulated
@pytest.mark.parametrize("key", [1, 1 << 62], ids=["before", "behind"])
@pytest.mark.parametrize("way", ["plan", "function", "scope"])
def test_locks_are_taken_in_one_order(
    way: str, key: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sparse_ has two generators. Where torch does it, source.turn takes both locks by their keys;
    a thread that takes them otherwise and one that waits for the second would wait for ever."""
    held: list[int] = []
    wrong: list[tuple[int, list[int]]] = []
    g, key_of = Generator(3), source.generator_id

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

    mine = g._cdata
    monkeypatch.setattr(source, "generator_id", lambda x: key if x._cdata == mine else key_of(x))
    monkeypatch.setattr(source, "lock_of", lock_of)
    w, made = torch.empty(40, 30), fastinit.Plan()
    with in_scope(way == "scope"):
        w = torch.empty(40, 30)
        to: Any = {"plan": made, "function": fastinit, "scope": torch_init}[way]
        to.sparse_(w, 0.5, generator=g)
    made.run()
    assert g.offset == 4
    assert wrong == []


@pytest.mark.parametrize("way", ["function", "plan"])
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("size", [1 << 12, 64])
def test_threads_share_a_generator(size: int, explicit: bool, way: str, gpu: Gpu) -> None:
    """No numbers are given out twice or lost: the tensors are those of one thread, in any order."""
    size *= 256 if gpu.is_real else 1
    rounds = 6 if size > 1 << 11 else 40
    if gpu.sim is not None:
        gpu.sim.default = Slow()
    slow = Slow() if gpu.sim is not None else gpu.generator()
    given = slow if explicit else None
    g = given or gpu.default
    START.place(g)
    made: list[torch.Tensor] = []

    def job() -> None:
        for _ in range(rounds):
            t, plan = gpu.empty(size), fastinit.Plan()
            (plan if way == "plan" else fastinit).uniform_(t, generator=given)
            plan.run()
            made.append(t)

    in_threads(job, job)
    after = gpu.state_of(g)
    START.place(g)
    alone = [torch_init.uniform_(gpu.empty(size), generator=given) for _ in range(2 * rounds)]
    gpu.assert_same({"state": gpu.state_of(g)}, {"state": after}, "threads")
    found, expected = (sorted(bytes(t.cpu().numpy()) for t in ts) for ts in (made, alone))
    assert found == expected
