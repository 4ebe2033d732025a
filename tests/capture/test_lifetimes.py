# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): what is not kept alive, does not grow, and is allocated once."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

import fastinit
from fastinit import fused, init_model_, materialize_
from fastinit.core import recording
from tests.support.compare import (
    F32,
)
from tests.support.reports import (
    each_seed,
    on_meta,
)
from tests.support.scopes import N, each


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, F32])
def test_factories_allocate_once(dtype: torch.dtype) -> None:
    def allocations(factory: Callable[..., torch.Tensor], *args: Any) -> int:
        factory(*args, dtype=dtype)  # once: what is done only once
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = factory(*args, dtype=dtype)
        del kept
        events = [e for e in profiler.events() if e.name in ("aten::empty", "aten::empty_strided")]
        return sum(e.cpu_memory_usage >= N for e in events)

    calls: list[tuple[Any, ...]] = [
        (torch.zeros, N),
        (torch.ones, N),
        (torch.full, (N,), 1),
        (torch.zeros_like, torch.empty(N)),
        (torch.ones(1).new_zeros, (N,)),
    ]
    assert [allocations(*call) for call in calls] == [1] * len(calls)
    with fastinit.fused():
        assert [allocations(*call) for call in calls] == [1] * len(calls)


def test_futures_are_not_kept() -> None:
    with fastinit.fused():
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(torch.ones, N)
            result = future.result()
            gone = [weakref.ref(future), weakref.ref(result)]
        del future, result
        gc.collect()
        assert [ref() for ref in gone] == [None, None]


def test_threads_are_not_kept() -> None:
    with fastinit.fused() as report:
        thread = threading.Thread(target=int, name="of this test")
        thread.start()
        thread.join()
        gone = weakref.ref(thread)
        del thread
        gc.collect()
        assert gone() is None
    assert report.recorded_elements == 0


@pytest.mark.parametrize("small", [False, True])
def test_reports_keep_no_arguments(small: bool) -> None:
    with fastinit.fused() as report:
        v = torch.ones(N)
        value = v[3]
        v.sum()
        x = torch_init.constant_(torch.empty(10 if small else N), value)
        y = torch_init.uniform_(torch.empty(N), 0.0, value)
        z = torch_init.orthogonal_(torch.empty(100, 100), gain=value)
        gone = [weakref.ref(v), weakref.ref(value)]
        storage = StorageWeakRef(v.untyped_storage())
        del v, value
        gc.collect()
        assert [ref() for ref in gone] == [None, None]
        assert storage.expired()
    assert storage.expired()
    assert report.rows()
    assert x.sum() == x.numel()
    assert y.max() < 1
    assert z.norm() > 9


def sizes(x: Any, depth: int = 0) -> int:
    """How much a capture or a report keeps."""
    if isinstance(x, (list, tuple, set, dict)):
        inside = x.values() if isinstance(x, dict) else x
        return len(x) + (sum(sizes(y, depth + 1) for y in inside) if depth < 3 else 0)
    return 0


def in_parts(t: torch.Tensor) -> None:
    t[3:19_000].normal_()
    t[:9000].uniform_()
    t.sum()


@pytest.mark.slow
@each(
    {
        "sum": lambda t: t.normal_().sum(),
        "parts": in_parts,
        "clone": lambda t: t.uniform_().clone(),
        "copy": lambda t: t.copy_(torch.rand(N)),
        "numpy": lambda t: torch.zeros(N).numpy(),
        "item": lambda t: torch.zeros(N)[3].item(),
        "module": lambda t: nn.Linear(200, 100)(torch.ones(1, 200)),
        "small": lambda t: torch_init.normal_(torch.empty(9)),
    },
    "parts",
    "clone",
    "small",
)
def test_loops_do_not_grow(make: Callable[[torch.Tensor], Any]) -> None:
    """What is written over and over leaves a line, not thousands."""
    torch.set_num_threads(1)  # thousands of tiny products are slow in several

    def repeat(times: int) -> list[int]:
        for _ in range(times):
            make(t)
        memories = capture.pending.known.values()
        lengths = [len(x) for m in memories for x in (m.fills, m.written)]
        kept = [x for y in (capture, capture.pending, report) for x in vars(y).values()]
        return [sum(lengths), *(len(x) for x in kept if isinstance(x, (list, dict, set)))]

    with fastinit.fused(watch=True) as report:
        capture: Any = recording.this_thread.recorder
        t = torch.empty(N)
        # Until the table of storages has been purged, and the list of early reads is full.
        before = repeat(1100)
        after = repeat(2000)
    assert all(b <= a + 1024 for a, b in zip(before, after)), (before, after)
    assert all(len(row.written_by) < 5 for row in report.rows())
    assert len(report.rows()) < 10
    assert len(str(report).splitlines()) < 30


@pytest.mark.parametrize("of_one", [False, True])
def test_small_calls_do_not_pile_up(of_one: bool) -> None:
    """Neither those for one tensor, nor for thousands that died."""
    with fastinit.fused(watch=True) as report:
        capture: Any = recording.this_thread.recorder
        t = torch.empty(9)
        for i in range(3000):
            torch_init.normal_(t if of_one else torch.empty(9), std=i)
        kept = sum(len(calls) for calls in capture.pending._calls.values())
    assert kept < 1100
    assert len(report.rows()) <= of_one


@each_seed
@pytest.mark.parametrize("how", ["fused", "init_model_", "materialize_"])
def test_nothing_is_kept_alive(how: str, seed: int | None) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(100, 100), nn.Linear(3, 3))

    if how == "fused":
        with fused(seed=seed, watch=True) as report:
            model = make()
    elif how == "init_model_":
        model = make()
        report = init_model_(model, seed=seed)
    else:
        model = on_meta(make)
        report = materialize_(model, seed=seed)
    refs: list[Any] = [weakref.ref(x) for x in (model, *model.parameters())]
    refs += [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    assert len(report.rows()) == 4
    str(report)
    del model
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
    assert report.rows() == []
    assert str(report)
    report.check()
