# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): generators, threads, and blocks in blocks."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from tests.support.blocks import Block, Cases, compare
from tests.support.compare import BF16, F64, attempt

case = Cases()
own = Cases()  # enter fused() themselves


# ---- generators ----


@case
def states_after_each_fill(b: Block) -> Any:
    w, states = b.empty(40, 30), []
    for size in (1, 15, 16, 17, 400, 623, 624, 625, 1200):
        for dtype in (torch.float32, F64, BF16):
            v = torch.empty(size, dtype=dtype)
            for law in (v.uniform_, v.normal_, v.zero_):
                law()
                states.append(torch.get_rng_state())
    w.t().normal_()
    states.append(torch.default_generator.get_state())
    w[::2].uniform_()
    states.append(torch.default_generator.clone_state().get_state())
    return w, states, torch.initial_seed(), torch.default_generator.initial_seed()


@case
def states_are_set(b: Block) -> Any:
    w, v = b.empty(40, 30).normal_(), b.empty(40, 30)
    state = torch.get_rng_state()
    w.uniform_()
    torch.set_rng_state(state)
    v.uniform_()
    torch.manual_seed(5)
    torch_init.normal_(w[3:9])
    torch.default_generator.manual_seed(5)
    v[3:9].normal_()
    torch.default_generator.set_state(state)
    v[20:].normal_()
    torch.random.default_generator.set_state(state)
    u = b.empty(41).uniform_()
    torch.random.manual_seed(7)
    return w, v, u, torch.random.initial_seed(), torch.rand(3)


@case
def forks_of_the_generator(b: Block) -> Any:
    made, w = [], b.empty(40, 30)
    for i in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + i % 2)
            made.append(nn.Linear(40, 30))
            w.normal_()
        made.append(torch.empty(400).uniform_())
        with torch.random.fork_rng(devices=[], enabled=i > 1):
            w[i].uniform_()
    return made, w


@case
def explicit_generators(b: Block) -> Any:
    w, v, other = b.empty(40, 30), b.empty(41), torch.Generator().manual_seed(8)
    w.normal_(generator=b.g)
    seen = [b.g.get_state(), b.g.initial_seed()]
    w[3].uniform_(generator=other)
    v.uniform_(generator=torch.default_generator)
    copy = other.clone_state()
    w[4:].normal_(generator=copy)
    v[:20].normal_(generator=other)
    b.g.set_state(other.get_state())
    w[9:].uniform_(generator=b.g)
    other.manual_seed(3)
    torch_init.trunc_normal_(w[20:], generator=other)
    torch_init.normal_(v[7:30], generator=torch.default_generator)
    shared = torch.Generator()
    shared.graphsafe_set_state(b.g) if attempt(shared.graphsafe_set_state, b.g)[1] == "" else None
    u = torch.empty(400).normal_(generator=shared)
    return w, v, u, seen, [g.get_state() for g in (other, copy, shared)]


@case
def generators_that_die(b: Block) -> Any:
    made = []
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        made.append(torch.empty(400).normal_(generator=g))
        made.append(torch.rand(40, 30, generator=g))
        del g
    return made, b.empty(3).zero_()


@case
def draws_between(b: Block) -> Any:
    w, seen = b.empty(40, 30).normal_(), []
    seen += [torch.randperm(50), torch.nn.functional.dropout(torch.ones(400), 0.5)]
    w.uniform_()
    seen += [torch.randint(9, (5,)), torch.multinomial(torch.ones(9), 3), torch.rand(3)]
    w[4].normal_()
    seen += [torch.bernoulli(torch.full((400,), 0.5)), torch.poisson(torch.ones(9))]
    seen += [torch.randn(7), torch.distributions.Beta(2.0, 3.0).sample((5,)), nn.Linear(3, 4)]
    data = torch.utils.data.TensorDataset(w)
    loader = torch.utils.data.DataLoader(data, batch_size=7, shuffle=True)
    seen += [batch[0] for batch in loader]
    random.seed(torch.initial_seed())
    seen += [torch.utils.data.random_split(range(20), [5, 15])[0].indices, random.random()]
    w.normal_()
    return w, seen


@case
def kept_normals(b: Block) -> Any:
    """Small and strided normals leave the second of a pair in the generator."""
    w, seen = b.empty(40, 30), []
    for i in range(12):
        w[i, : 2 * i + 1].normal_()
        w[12:].normal_()
        w[i].uniform_()
        w[:, i].normal_(generator=b.g)
        seen += [torch.get_rng_state(), torch.randn(1).item()]
    w[:12].zero_()
    return w, seen


# ---- threads ----


def in_thread(job: Any) -> None:
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()


@case
def threads_read_and_write(b: Block) -> Any:
    w, v, seen = b.empty(40, 30).normal_(), b.empty(400), []
    in_thread(lambda: seen.append(w.sum().item()))
    w.uniform_()
    in_thread(lambda: w[3:9].zero_())
    in_thread(lambda: v.normal_())
    w[5].normal_()
    in_thread(lambda: seen.append(v.detach().clone()))
    v[3:].uniform_()
    timer = threading.Timer(0, lambda: seen.append(bytes(v.untyped_storage())))
    timer.start()
    timer.join()
    in_thread(lambda: seen.append(torch.empty(400).normal_()))
    seen[-1][7:].zero_()
    return w, v, seen


def warm_pool() -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(1)
    pool.submit(int).result()  # its thread runs from here on
    return pool


@case
def a_pool_from_before(b: Block) -> Any:
    pool = b.make(warm_pool)
    w, v = torch.empty(40, 30).normal_(), torch.empty(400).uniform_()
    seen = [pool.submit(w.sum).result().item(), pool.submit(w.zero_).result() is w]
    v.normal_()
    seen += list(pool.map(lambda x: x.sum().item(), [w, v]))
    v[3:300].uniform_()
    u = torch.empty(400).normal_()
    pool.submit(torch_init.normal_, w).result()
    w[3].zero_()
    seen += [pool.submit(lambda: [w.mean().item(), u.tolist()]).result()]
    pool.shutdown()
    return w, v, u, seen


@case
def coroutines(b: Block) -> Any:
    w, v = b.empty(40, 30), b.empty(400)

    async def fill(x: torch.Tensor) -> float:
        x.normal_()
        await asyncio.sleep(0)
        x[3:].uniform_()
        return await asyncio.to_thread(lambda: x.sum().item())

    async def fill_both() -> list[float]:
        return [await fill(w), *await asyncio.gather(fill(v), asyncio.sleep(0, 1.0))]

    return asyncio.run(fill_both()), w, v


@own
def a_block_in_each_thread(b: Block) -> Any:
    """Two blocks open at once, which must not see each other's fills."""
    made: dict[int, Any] = {}
    turns = [queue.SimpleQueue() for _ in range(2)]

    def build(i: int) -> None:
        g = torch.Generator().manual_seed(i)
        with b.fused():
            made[i] = [torch.empty(40, 30).normal_(generator=g)]
            for _ in range(3):
                turns[1 - i].put(None)  # both are inside
                turns[i].get(timeout=30)
                made[i].append(torch.empty(400).uniform_(generator=g))
                made[i][0][3:].normal_(generator=g)
            made[i].append(made[i][-1].sum().item())
        made[i].append(g.get_state())

    threads = [threading.Thread(target=build, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return dict(sorted(made.items()))


@own
def only_this_thread(b: Block) -> Any:
    """A thread that was there before the block works on tensors of its own meanwhile."""
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def worker() -> None:
        for law in iter(jobs.get, None):
            w = getattr(torch.empty(400), law)(generator=b.g)
            done.put((w, w.sum().item(), w.tolist()))

    thread = threading.Thread(target=worker)
    thread.start()
    seen = []
    with b.fused():
        for law in ("normal_", "uniform_") * 3:
            mine = torch.empty(400).normal_()
            jobs.put(law)
            seen += [done.get(timeout=30), mine]
    jobs.put(None)
    thread.join(30)
    return seen


# ---- fused itself ----


@case
def nested(b: Block) -> Any:
    w, v, seen = b.empty(40, 30).normal_(), b.empty(400), []
    with b.fused():
        w[3].zero_()
        v.uniform_()
        x = torch.empty(400).normal_()
        with b.fused():
            x[5:].uniform_()
            seen.append(v.sum().item())
        w.uniform_()
    seen += [x.mean().item(), raw_sum(w)]
    v.normal_()

    def fails() -> None:
        with b.fused():
            v[3:].zero_()
            x.normal_()
            raise ValueError

    return w, v, x, seen, attempt(fails)[1], w[9].zero_()


def raw_sum(w: torch.Tensor) -> float:
    return float(np.asarray(w.detach()).sum())


@own
def decorated(b: Block) -> Any:
    decorate = fastinit.fused() if b.captured else lambda function: function

    @decorate
    def build(depth: int, *, scale: float = 1.0) -> list[Any]:
        """Builds."""
        w = torch.empty(400).normal_(0, scale)
        inner = build(depth - 1, scale=0.5) if depth else []
        w[3].zero_()
        return [w, torch.zeros(400).uniform_(), *inner]

    @decorate
    def fails(w: torch.Tensor) -> None:
        w.normal_()
        raise KeyError(3)

    w = b.empty(400)
    seen = [build(2), attempt(fails, w)[1], w, build(0, scale=3), build.__name__, build.__doc__]

    class Model(nn.Module):
        @decorate
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(40, 30)
            torch_init.zeros_(self.body.weight)

    return seen, Model(), list(map(build, [0, 1]))


@case
def exceptions_inside(b: Block) -> Any:
    w, v = b.empty(40, 30), b.empty(400)
    try:
        w.normal_()
        w[3].uniform_()
        w[50].zero_()
    except IndexError:
        v.normal_()
    try:
        v[3:].uniform_(2, 1)
    except RuntimeError as error:
        seen = [str(error), v.sum().item()]
    finally:
        w[4].zero_()
    b.notes += [w, v, seen, torch.get_rng_state()]
    v.uniform_()
    b.raises = True
    raise LookupError("of the body")


@own
def exceptions_through_two_blocks(b: Block) -> Any:
    w, v = b.empty(40, 30), b.empty(400)
    b.notes += [w, v]
    b.raises = True
    with b.fused():
        w.normal_()
        try:
            with b.fused():
                v.uniform_()
                w[3:].zero_()
                raise ValueError(3)
        finally:
            v[:300].normal_()


@case
def fastinit_inside(b: Block) -> Any:
    w, v, u = b.empty(40, 30), b.empty(400), b.empty(40, 30).normal_()
    fastinit.normal_(w)
    w[3].zero_()
    torch_init.uniform_(w[5:])
    fastinit.zeros_(v[7:300].normal_())
    fastinit.trunc_normal_(v, 0, 0.02, -0.02, 0.02)
    plan = fastinit.Plan()
    plan.kaiming_uniform_(w)
    plan.zeros_(u[3])
    u.uniform_()
    plan.run()
    layer = b.make(nn.Linear, 40, 30)
    fastinit.init_model_(layer)
    torch_init.ones_(layer.bias)
    fastinit.init_model_(layer, lambda m: torch_init.normal_(m.weight))
    return w, v, u, layer, v[:7].zero_()


@own
def inside_init_model(b: Block) -> Any:
    layer = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    made = []

    def fill(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            torch_init.normal_(m.weight)
            with b.fused():
                made.append(torch.empty(400).uniform_())
                torch_init.zeros_(m.weight[3])
                torch_init.uniform_(m.bias)
            m.bias.data[3] = made[-1].sum()

    fastinit.init_model_(layer, fill)
    return layer, made


@case.each
def test_order(name: str, variant: str) -> None:
    compare(case[name], variant)


@own.each
def test_blocks_of_their_own(name: str, variant: str) -> None:
    compare(own[name], variant, own=True)
