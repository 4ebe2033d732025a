# SPDX-License-Identifier: BSD-3-Clause
"""When a scope begins to watch, what may wait that was made before, and what ends that."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

import fastinit
from fastinit.capture import emptied
from fastinit.core import geometry, recording
from tests.support.compare import bits
from tests.support.modes import FunctionLog

LARGE = geometry.BEGIN * geometry.MIN_NATIVE


@pytest.fixture(autouse=True)
def _nothing_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scope begins at once while what to_empty made is unwritten; other tests may leave some."""
    monkeypatch.setattr(emptied, "_made", {})


def watches() -> bool:
    """Whether the scope of this thread sees operators."""
    return recording.active() is not None


def test_small_models_have_no_mode() -> None:
    with fastinit.fused() as report:
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(20)), nn.GRU(16, 16))
        torch.randn(LARGE)  # nothing of torch.nn.init or Tensor
        assert torch._C._len_torch_dispatch_stack() == 0
        assert not watches()
    assert report.recorded_elements == 0
    assert len(list(model.parameters())) == 44


BEGINNING: dict[str, Callable[[], Any]] = {
    "kaiming_uniform_": lambda: torch_init.kaiming_uniform_(torch.empty(LARGE // 8, 8)),
    "method": lambda: torch.empty(LARGE).normal_(),
    "data": lambda: nn.Parameter(torch.empty(LARGE)).data.uniform_(),
    "trunc_normal_": lambda: torch_init.trunc_normal_(torch.empty(LARGE), std=0.1),
    "fastinit's": lambda: fastinit.uniform_(torch.empty(LARGE)),
    "module": lambda: nn.Linear(LARGE // 64, 64),
    "to_empty": lambda: nn.Linear(2, 2, device="meta").to_empty(device="cpu"),
    "under a function mode": lambda: under(FunctionLog(), lambda: torch.empty(LARGE).uniform_()),
    "on a device": lambda: under(torch.device("cpu"), lambda: nn.Linear(LARGE // 64, 64)),
    "without grad": lambda: under(torch.no_grad(), lambda: torch.empty(LARGE).uniform_()),
}


def under(mode: Any, function: Callable[[], Any]) -> Any:
    with mode:
        return function()


@pytest.mark.parametrize("name", BEGINNING)
def test_begins(name: str) -> None:
    with fastinit.fused():
        assert not watches()
        kept = BEGINNING[name]()
        assert watches()
    assert not watches()
    assert torch._C._len_torch_dispatch_stack() == 0
    del kept


@pytest.mark.parametrize("function", [torch_init.uniform_, torch_init.trunc_normal_])
def test_below_the_limit_it_does_not(function: Callable[[Tensor], Tensor]) -> None:
    with fastinit.fused():
        function(torch.empty(LARGE - 1))
        function(torch.empty(LARGE, device="meta"))
        assert not watches()


class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_not_on_a_stack_that_has_changed() -> None:
    """It would be taken off too early, or see what another mode does."""
    with fastinit.fused() as report:
        with Seeing():
            w = torch.empty(LARGE).normal_()
            assert not watches()
        assert report.recorded_elements == 0
        v = torch.empty(LARGE).normal_()
        assert watches()
    torch.manual_seed(1)
    assert torch.equal(w, torch.empty(LARGE).normal_())
    assert torch.equal(v, torch.empty(LARGE).normal_())


@pytest.mark.parametrize("enabled", [True, False])
def test_inference_mode_in_the_scope(enabled: bool) -> None:
    """It puts dispatch keys back when it ends, and with them would hide the mode."""
    with fastinit.fused():
        with torch.inference_mode(enabled):
            w = torch.empty(LARGE).normal_()
        inside = w.sum().item(), (w.clone() + w).mean().item()
        v = torch.empty(LARGE).normal_()
        assert watches()
        inside += (v.sum().item(),)
    assert inside == (w.sum().item(), (w.clone() + w).mean().item(), v.sum().item())


def test_not_in_a_backward_pass() -> None:
    """Its guard puts the stack of modes back."""
    found = []

    def hook(grad: Tensor) -> None:
        torch.empty(LARGE).normal_()
        found.append(watches())

    with fastinit.fused():
        x = torch.ones(3, requires_grad=True)
        x.register_hook(hook)
        (x * 2).sum().backward()
        torch.empty(LARGE).normal_()
        assert watches()
    assert found == [False]


# ---- who else knows a tensor's memory ------------------------------------------------------------


def array_of(t: Tensor) -> Callable[[], Any]:
    array = t.numpy()
    return array.copy


def dlpack_of(t: Tensor) -> Callable[[], Any]:
    array = np.from_dlpack(t)
    return array.copy


def address_of(t: Tensor) -> Callable[[], Any]:
    import ctypes

    address, n = t.data_ptr(), t.nbytes
    return lambda: ctypes.string_at(address, n)


def storage_of(t: Tensor) -> Callable[[], Any]:
    storage = t.untyped_storage()
    return lambda: [storage[i] for i in range(64)]


KNOWING: dict[str, Callable[[Tensor], Callable[[], Any]]] = {
    "array": array_of,
    "dlpack": dlpack_of,
    "address": address_of,
    "storage": storage_of,
}
# The address of a tensor from before the scope is nothing that torch could tell of.
CASES = [(n, b) for n in KNOWING for b in (True, False) if not (n == "address" and b)]


@pytest.mark.parametrize(("name", "before"), CASES)
@pytest.mark.parametrize("begun", [False, True])
def test_others_who_know_it(name: str, before: bool, begun: bool) -> None:
    older = torch.empty(LARGE)
    look = KNOWING[name](older) if before else None
    with fastinit.fused():
        if begun:
            torch.empty(LARGE).normal_()
        w = older if before else torch.empty(LARGE)
        look = look or KNOWING[name](w)
        w.fill_(2.0)
        torch_init.uniform_(w, 3.0, 4.0)
        seen = look()
    assert np.array_equal(np.asarray(seen), np.asarray(look()))


def test_from_numpy_and_shared_memory() -> None:
    array = np.zeros(LARGE, np.float32)
    shared = torch.zeros(LARGE).share_memory_()
    with fastinit.fused() as report:
        torch.from_numpy(array).normal_()
        shared.normal_()
        assert array.any()
    assert report.recorded_elements == 0


def test_older_tensors_wait_if_nobody_else_knows_them() -> None:
    model = nn.Linear(LARGE // 64, 64)
    with fastinit.fused() as report:
        torch_init.normal_(model.weight)
        torch_init.uniform_(model.weight)
    assert report.dropped_elements == LARGE


def test_a_thread_started_before_it_begins() -> None:
    """It may read what is made later, so nothing waits while it runs."""
    go, seen = threading.Event(), []
    made: list[Tensor] = []

    def read() -> None:
        go.wait(20)
        seen.append(made[0].clone())

    with fastinit.fused():
        thread = threading.Thread(target=read)
        thread.start()
        made.append(torch.empty(LARGE).normal_())
        go.set()
        thread.join()
    assert torch.equal(bits(seen[0]), bits(made[0]))


def test_threads_of_threads() -> None:
    go, seen = threading.Event(), []
    made: list[Tensor] = []
    threads: list[threading.Thread] = []

    def read() -> None:
        go.wait(20)
        seen.append(made[0].clone())

    def start() -> None:
        threads.append(threading.Thread(target=read))
        threads[0].start()

    with fastinit.fused():
        first = threading.Thread(target=start)
        first.start()
        first.join()
        made.append(torch.empty(LARGE).normal_())
        go.set()
        threads[0].join()
    assert torch.equal(bits(seen[0]), bits(made[0]))


# ---- what it costs, and leaves -------------------------------------------------------------------


@contextmanager
def collections() -> Iterator[list[int]]:
    """Collections of the oldest generation that somebody asks for."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            found.append(1)

    gc.callbacks.append(note)
    gc.disable()
    try:
        yield found
    finally:
        gc.enable()
        gc.callbacks.remove(note)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("n", [8, 256])
def test_no_full_collection(n: int, seed: int | None) -> None:
    with collections() as found:
        with fastinit.fused(seed=seed) as report:
            models = nn.Linear(n, n), nn.Linear(n, n)
        str(report)
    assert found == []
    del models


def test_a_module_on_its_own_has_names() -> None:
    """Its parameters were registered before the scope began to watch."""
    with fastinit.fused() as report:
        model = nn.Linear(LARGE // 64, 64)
    assert {row.name for row in report.rows()} >= {"weight"}
    with fastinit.fused() as again:
        model.apply(lambda m: m.reset_parameters())
    assert {row.name for row in again.rows()} >= {"weight"}


def test_watch_sees_all() -> None:
    with fastinit.fused(watch=True) as report:
        model = nn.Module()
        model.w = nn.Parameter(torch.empty(3))
    with pytest.raises(RuntimeError, match="w"):
        report.check()


def test_orthogonal_of_a_scope() -> None:
    def matrix() -> Tensor:
        torch.manual_seed(5)
        return torch_init.orthogonal_(torch.empty(200, 200))

    theirs = matrix()
    expected: dict[str | None, Tensor] = {}
    for way in ("torch", "native", None):
        with fastinit.fused(orthogonal=way):
            expected[way] = matrix()
    assert torch.equal(expected["torch"], theirs)
    assert torch.equal(expected["native"], expected[None])
    assert not torch.equal(expected["native"], theirs)
    with pytest.raises(ValueError, match="torch"):
        fastinit.fused(orthogonal="mine")
    with fastinit.fused(orthogonal="native"):
        with fastinit.fused(orthogonal="torch"):
            inner = matrix()
        outer = matrix()
    assert torch.equal(inner, theirs)
    assert torch.equal(outer, expected["native"])
    model = nn.Module()
    model.w = nn.Parameter(torch.empty(200, 200))
    torch.manual_seed(5)
    fastinit.init_model_(model, lambda m: torch_init.orthogonal_(m.w), orthogonal="torch")
    assert torch.equal(model.w, theirs)
