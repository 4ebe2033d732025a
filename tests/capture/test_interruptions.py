# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): KeyboardInterrupt while values are written; the program may go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
import torch

import fastinit
from fastinit import execute
from fastinit.capture import chains, scope
from fastinit.core import kernels, recording
from tests.support.compare import (
    BF16,
    F64,
    bits,
)
from tests.support.scopes import N


def pending() -> list[torch.Tensor]:
    """Fills over each other, copies of each other, of several dtypes."""
    w, u = torch.empty(200, 100).normal_(), torch.rand(N, dtype=F64)
    w[:, 3:9].uniform_()
    w[7:90].zero_()
    v = w.clone()
    v[3].fill_(2)
    w[150:].normal_()
    return [w, u, v, torch.empty(N, dtype=BF16).normal_()]


def eagerly(make: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(3)
    return make(), torch.get_rng_state()


def once(
    patch: pytest.MonkeyPatch, owner: Any, name: str, after: bool, error: type[BaseException]
) -> list[str]:
    """The next call of a function raises, before or after it has done its work."""
    original, raised = getattr(owner, name), []

    def function(*args: Any) -> Any:
        if raised:
            return original(*args)
        raised.append(name)
        if after:
            original(*args)
        raise error

    patch.setattr(owner, name, function)
    return raised


def all_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(found, expected, strict=True))


READERS: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "item": lambda made: made[0][5, 5].item(),
    "sum": lambda made: made[2][3:].sum(),
    "numpy": lambda made: made[0].numpy(),
    "thread": lambda made: threading.Thread(target=int).start(),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("function", ["run_ahead", "run"])
@pytest.mark.parametrize("where", [*READERS, "end"])
def test_interrupted_writing(
    where: str, function: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program may go on after KeyboardInterrupt, and must find the right values."""
    expected, state = eagerly(pending)
    with fastinit.fused(watch=True):
        pending()  # all kinds have been proved
    owner = execute if function == "run_ahead" else kernels
    found: list[torch.Tensor] = []
    torch.manual_seed(3)
    if where == "end":
        scope = fastinit.fused(watch=True)
        report = scope.__enter__()
        found += pending()
        raised = once(monkeypatch, owner, function, after, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            scope.__exit__(None, None, None)
    else:
        with fastinit.fused(watch=True) as report:
            found += pending()
            with pytest.MonkeyPatch.context() as patch:
                raised = once(patch, owner, function, after, KeyboardInterrupt)
                with pytest.raises(KeyboardInterrupt):
                    READERS[where](found)
            middle = found[2].sum().item()
        assert middle == expected[2].sum().item()
    assert raised
    assert all_equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.recorded_elements == report.written_elements + report.dropped_elements
    assert recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0


@contextmanager
def interrupted_after(seconds: float) -> Iterator[list[str]]:
    """A timer's handler raises KeyboardInterrupt if it finds fastinit writing."""
    hit: list[str] = []

    def handler(_: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code is kernels.run.__code__ and not hit:
            hit.append("hit")
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with suppress(KeyboardInterrupt):
            yield hit
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers")
def test_interrupted_by_a_signal() -> None:
    """The same, by a signal that comes while the values are written, in two steps."""

    def filled() -> torch.Tensor:
        t = torch.empty(5_000_000).uniform_()
        t[7:-7].normal_()
        return t

    torch.manual_seed(3)
    expected = filled()
    hits = 0
    for attempt in range(100):
        torch.manual_seed(3)
        with fastinit.fused(watch=True):
            t = filled()
            with interrupted_after(2e-4 * (1 + attempt % 25)) as hit:
                t[5].item()
            values = t.clone()
        assert torch.equal(values, expected)
        assert torch.equal(t, expected)
        hits += len(hit)
        if hits == 3:
            break


def test_what_would_take_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is not answered by writing for seconds: what is missing is said, twice."""
    monkeypatch.setattr(scope, "_MOST_AFTER_INTERRUPT", 1000)
    block = fastinit.fused(watch=True)
    report = block.__enter__()
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(3, 3))
    loose = torch.empty(N).normal_()
    once(monkeypatch, kernels, "run", False, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt, match=r"2 tensors not written: .*0\.weight") as caught:
        block.__exit__(None, None, None)
    assert f"({loose.nbytes:,} bytes)" in str(caught.value)
    assert report.unwritten == ["0.weight"]
    with pytest.raises(RuntimeError, match=r"never initialised: 0\.weight"):
        report.check()
    assert recording.this_thread.recorder is None
    assert model


@pytest.mark.parametrize("rows", [100, 200], ids=["part", "whole"])
def test_operators_behind_a_fill_are_not_done_twice(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in the tensor before is doubled once, though all is written again."""
    expected, model = torch.nn.Linear(300, 200), torch.nn.Linear(300, 200)
    model.load_state_dict(expected.state_dict())

    def fn(m: Any) -> None:
        with torch.no_grad():
            m.weight[:rows].normal_()
            m.weight.mul_(2)

    torch.manual_seed(3)
    fn(expected)
    original, raised = chains.run_chains, []

    def run_chains(what: Any) -> None:
        original(what)
        if what and not raised:
            raised.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(chains, "run_chains", run_chains)
    torch.manual_seed(3)
    with suppress(KeyboardInterrupt):
        fastinit.init_model_(model, fn)
    assert len(raised) == (rows == 200)  # otherwise it does not wait
    assert torch.equal(model.weight, expected.weight)
