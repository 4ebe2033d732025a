# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): threads, pools and coroutines."""

from __future__ import annotations

import asyncio
import io
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from fastinit.core import recording
from tests.support.scopes import Cases, N, Scope, compare

case = Cases()


own = Cases()  # enter fused() themselves


def in_thread(job: Any) -> None:
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()


@case
def threads_read_and_write(s: Scope) -> Any:
    w, v, seen = s.empty(40, 30).normal_(), s.empty(400), []
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
def a_pool_from_before(s: Scope) -> Any:
    pool = s.make(warm_pool)
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
def coroutines(s: Scope) -> Any:
    w, v = s.empty(40, 30), s.empty(400)

    async def fill(x: torch.Tensor) -> float:
        x.normal_()
        await asyncio.sleep(0)
        x[3:].uniform_()
        return await asyncio.to_thread(lambda: x.sum().item())

    async def fill_both() -> list[float]:
        return [await fill(w), *await asyncio.gather(fill(v), asyncio.sleep(0, 1.0))]

    return asyncio.run(fill_both()), w, v


@own
def a_scope_in_each_thread(s: Scope) -> Any:
    """Two scopes open at once, which must not see each other's fills."""
    made: dict[int, Any] = {}
    turns = [queue.SimpleQueue() for _ in range(2)]

    def build(i: int) -> None:
        g = torch.Generator().manual_seed(i)
        with s.fused():
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
def only_this_thread(s: Scope) -> Any:
    """A thread that was there before the scope works on tensors of its own meanwhile."""
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def worker() -> None:
        for law in iter(jobs.get, None):
            w = getattr(torch.empty(400), law)(generator=s.g)
            done.put((w, w.sum().item(), w.tolist()))

    thread = threading.Thread(target=worker)
    thread.start()
    seen = []
    with s.fused():
        for law in ("normal_", "uniform_") * 3:
            mine = torch.empty(400).normal_()
            jobs.put(law)
            seen += [done.get(timeout=30), mine]
    jobs.put(None)
    thread.join(30)
    return seen


@case.each
def test_cases(name: str, variant: str) -> None:
    compare(case[name], variant)


@own.each
def test_scopes_of_their_own(name: str, variant: str) -> None:
    compare(own[name], variant, own=True)


# ---- what a thread stops, and what it does not ----


def test_idle_pools_stop_nothing() -> None:
    with fastinit.fused() as report, ThreadPoolExecutor(2) as pool:
        assert pool.submit(torch.ones, 3).result().sum() == 3
        assert list(pool.map(int, [1, 2])) == [1, 2]
        for _ in range(2):
            before = report.recorded_elements
            t = torch.empty(N).normal_()
            assert report.recorded_elements == before + N
    assert report.at_once_elements == 0
    assert "while threads" not in str(report)
    assert t.abs().sum() > 0


def test_running_threads_stop_all_and_are_named() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait, args=(50,), name="reader of this test")
    with fastinit.fused(watch=True) as report:
        thread.start()
        try:
            t = torch.empty(N).normal_()
            assert report.recorded_elements == 0
            assert report.at_once_elements == N
        finally:
            go.set()
            thread.join()
        u = torch.empty(N).normal_()
        assert report.recorded_elements == N
    assert "reader of this test" in " ".join(str(report).split())
    assert t.abs().sum() > 0
    assert u.abs().sum() > 0


def test_running_tasks_stop_all() -> None:
    go = threading.Event()
    with fastinit.fused() as report, ThreadPoolExecutor(1) as pool:
        future = pool.submit(go.wait, 50)
        try:
            torch.empty(N).normal_()
            assert report.recorded_elements == 0
        finally:
            go.set()
        assert future.result()
    assert "a task of a pool" in str(report)


def test_progress_bars_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm starts a thread with its first bar."""
    tqdm = pytest.importorskip("tqdm", reason="tqdm is not installed").tqdm
    monkeypatch.setattr(tqdm, "monitor", None)
    threads = threading.active_count()
    try:
        with fastinit.fused() as report:
            for _ in tqdm(range(3), file=io.StringIO(), disable=False):
                torch.empty(N).normal_()
            assert threading.active_count() > threads
        assert report.recorded_elements == 3 * N
        assert report.threads == set()
    finally:
        if tqdm.monitor is not None:
            tqdm.monitor.exit()


def test_one_object_decorates_for_many_threads() -> None:
    scope = fastinit.fused()
    together = threading.Barrier(2, timeout=50)
    failures: list[BaseException] = []
    made: dict[int, torch.Tensor] = {}

    @scope
    def build(seed: int, depth: int = 1) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        t = torch.empty(N).normal_(generator=g)
        if depth:
            together.wait()
            t[:900] = build(seed + 10, 0)[:900]
            together.wait()
        return t.mul_(2)

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                made[seed] = build(seed)
        except BaseException as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for seed in (1, 2):
        expected = torch.empty(N).normal_(generator=torch.Generator().manual_seed(seed)) * 2
        other = torch.empty(N).normal_(generator=torch.Generator().manual_seed(seed + 10)) * 2
        expected[:900] = other[:900] * 2
        assert torch.equal(made[seed], expected)
    assert recording.this_thread.recorder is None
    assert sys.modules["fastinit.install"]._scopes == set()
