# SPDX-License-Identifier: BSD-3-Clause
"""Ctrl-C and errors while matrices are factored; the bar of their progress."""

from __future__ import annotations

import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import fastinit
from fastinit.core import kernels
from fastinit.cpu import qr as cpu_qr
from tests.support.compare import BF16, F32, bits
from tests.support.marks import slow
from tests.support.qr_model import drawn

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def interrupted_after(seconds: float) -> Iterator[list[bool]]:
    """A timer's handler raises KeyboardInterrupt while fastinit writes matrices."""
    hit: list[bool] = []

    def handler(_: int, frame: types.FrameType | None) -> None:
        if not hit and frame is not None and frame.f_code is kernels.orthonormalize.__code__:
            hit.append(True)
            raise KeyboardInterrupt("the first argument")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.01)
        yield hit
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def missing_of(error: BaseException) -> dict[tuple[int, int], int]:
    assert error.args[0] == "the first argument"
    prefix = "orthogonal matrices not written: "
    text = str(error.args[-1])
    if not text.startswith(prefix):  # it came when all was written, or before anything was
        return {}
    parts = text[len(prefix) :].replace("), ", ")\n").splitlines()
    pairs = [part.split(" of ") for part in parts]
    return {eval(shape): int(count) for count, shape in pairs}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers")
@pytest.mark.parametrize("threads", [2, *slow([1])])
@pytest.mark.parametrize("kind", ["a few shared", "batches", *slow(["many small"])])
def test_interrupted(kind: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threading.current_thread() is threading.main_thread()
    torch.set_num_threads(threads)
    small, large = (140, 140), (1100, 1000)
    shapes = {
        "many small": [small] * 1500,  # longer than the time between two looks
        "a few shared": [large] * 8,
        "batches": [small, (50, 70)] * 120 + [large] * 3,
    }[kind]
    if kind == "batches":
        monkeypatch.setattr(cpu_qr, "_BATCH", 1e9)
    tensors = [torch.empty(s) for s in shapes]
    plan = fastinit.Plan()
    for t in tensors:
        plan.orthogonal_(t)
    torch.manual_seed(1)
    begin = time.perf_counter()
    plan.run()
    duration = time.perf_counter() - begin
    expected = [t.clone() for t in tensors]
    torch.manual_seed(1)
    gaussian = [drawn(s, F32) for s in shapes]
    for part in (0.5, 0.4, 0.3, 0.6, 0.2, 0.1):
        for t in tensors:
            t.zero_()
        torch.manual_seed(1)
        with interrupted_after(part * duration) as hit:
            try:
                plan.run()
                error = None
            except KeyboardInterrupt as caught:
                error = caught
        if hit and error is not None and missing_of(error):
            break
    assert hit, "too fast to be interrupted"
    assert error is not None
    written = [torch.equal(t, e) for t, e in zip(tensors, expected)]
    missing = missing_of(error)
    for shape in set(shapes):
        found = sum(not w for w, s in zip(written, shapes) if s == shape)
        # It may have heard when all was written, before that was noted of a shared one.
        assert found <= missing.get(shape, 0) <= found + (shape == large), shape
    assert missing
    # What was not written is left as normals or untouched, never half of it:
    for t, w, g in zip(tensors, written, gaussian):
        assert w or torch.equal(t, g)
    torch.manual_seed(1)
    plan.run()
    assert all(torch.equal(t, e) for t, e in zip(tensors, expected))


def test_versions_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that runs again counts as one that runs first; its generator has moved on."""

    def interrupt(packed: bytes, written: bytearray) -> None:
        raise KeyboardInterrupt

    t = torch.empty(100, 80)
    plan = fastinit.Plan()
    plan.orthogonal_(t)
    plan.run()
    torch.manual_seed(1)
    plan.run()
    state = torch.get_rng_state()
    monkeypatch.setattr(fastinit.core.kernels, "orthonormalize", interrupt)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt, match=r"not written: 1 of \(100, 80\)"):
        plan.run()
    assert t._version == 6
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers")
def test_interrupted_in_a_block() -> None:
    """What waits is written when it is read the next time, from the normals on."""

    def made() -> list[Tensor]:
        tensors = [torch.empty(300, 200 + i, dtype=(F32, BF16)[i % 2]) for i in range(40)]
        for t in tensors:
            fastinit.orthogonal_(t)
        return tensors

    torch.manual_seed(5)
    begin = time.perf_counter()
    expected = made()
    duration = time.perf_counter() - begin
    for part in (0.4, 0.2, 0.6, 0.1, 0.05):
        torch.manual_seed(5)
        with fastinit.fused():
            found = made()
            with interrupted_after(part * duration) as hit, suppress(KeyboardInterrupt):
                fastinit.Plan().run()  # writes all that waits
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(bits(a), bits(b))
        if hit:
            break
    assert hit


class Bar:
    """What the tests need of tqdm."""

    made: list[Bar] = []  # noqa: RUF012

    def __init__(self, total: int = 0, initial: int = 0, **options: Any) -> None:
        self.total, self.n, self.options, self.closed = total, initial, options, False
        self.steps = 0
        Bar.made.append(self)

    def update(self, n: int = 1) -> None:
        assert not self.closed
        self.n += n
        self.steps += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    module, auto = types.ModuleType("tqdm"), types.ModuleType("tqdm.auto")
    module.tqdm = auto.tqdm = Bar  # type: ignore[attr-defined]
    module.auto = auto  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", module)
    monkeypatch.setitem(sys.modules, "tqdm.auto", auto)
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(cpu_qr, "_SOON", 0.0)
    monkeypatch.setattr(cpu_qr, "_BATCH", 1e6)
    return Bar.made


def a_plan() -> tuple[fastinit.Plan, list[Tensor]]:
    plan = fastinit.Plan()
    made = [torch.empty(s, dtype=d) for s in [(90, 80), (3, 70, 66), (20, 20)] for d in (F32, BF16)]
    for t in made:
        (plan.orthogonal_ if t.dim() == 2 else plan.orthogonal_batched_)(t)
    return plan, made


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("progress", [True, False, None])
def test_progress(
    progress: bool | None, terminal: bool, bars: list[Bar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    plan, made = a_plan()
    torch.manual_seed(2)
    plan.run(progress=progress)
    assert len(bars) == (terminal if progress is None else progress)
    for bar in bars:
        assert bar.total == bar.n == 2 * (1 + 3 + 1)
        assert bar.steps > 2
        assert bar.closed
    torch.manual_seed(2)
    for t in made:
        other = torch.empty_like(t)
        (fastinit.orthogonal_ if t.dim() == 2 else fastinit.orthogonal_batched_)(other)
        assert torch.equal(bits(t), bits(other))


def test_no_bar_for_what_is_soon_done(bars: list[Bar], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_qr, "_SOON", 1000.0)
    a_plan()[0].run(progress=True)
    monkeypatch.setattr(cpu_qr, "_SOON", 0.0)
    monkeypatch.setattr(cpu_qr, "_BATCH", 1e15)
    a_plan()[0].run(progress=True)
    assert not bars


def test_no_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_qr, "_SOON", 0.0)
    monkeypatch.setattr(cpu_qr, "_BATCH", 1e6)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    a_plan()[0].run(progress=True)


def test_bar_is_closed_by_an_error(bars: list[Bar], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = kernels.orthonormalize

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("some error")
        original(*args)

    monkeypatch.setattr(kernels, "orthonormalize", failing)
    with pytest.raises(RuntimeError, match="some error") as caught:
        a_plan()[0].run(progress=True)
    assert "not written" in caught.value.args[-1]
    assert bars
    assert bars[0].closed
