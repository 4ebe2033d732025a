# SPDX-License-Identifier: BSD-3-Clause
"""Streams and graphs: who waits for whom, and that nothing of fastinit gets into a graph.

On the simulated GPU launches are noted with what was certainly over before them; on a real one a
stream is kept busy for a while, and what it reads and writes shows the order.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit import init_model_, probe
from fastinit.capture import operators
from fastinit.core import geometry, kernels, torch_api
from fastinit.cuda import runtime
from tests.support.compare import F32, POISONS, attempt, bits
from tests.support.cuda_gpu import START, At, Gpu, in_scope, only_hardware, only_simulated

NAP = 500_000_000  # cycles: a quarter of a second


# ---- streams of the simulated GPU ----------------------------------------------------------------


class Stream:
    """Launches by the addresses they write, and those that are certainly over before its next."""

    def __init__(self) -> None:
        self.launched: list[list[int]] = []
        self.behind: set[int] = set()

    def wait_stream(self, other: Stream) -> None:
        self.behind |= other.behind


class Streams:
    """Stand for torch.cuda's; the current one is the device's default, 0, at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.launch = 0, runtime.run
        self.all = {handle: Stream() for handle in (0, 5, 9)}
        self.history: list[tuple[list[int], set[int]]] = []  # what each launch writes; is behind
        monkeypatch.setattr(runtime, "stream_of", lambda device: self.current)
        monkeypatch.setattr(runtime, "run", self.run)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=0: self.all[self.current])
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device=0: self.all[0])
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device=0: self.all[handle])
        monkeypatch.setattr(torch.cuda, "stream", self.use)

    @contextmanager
    def use(self, stream: Stream | int) -> Iterator[None]:
        handles = {id(s): handle for handle, s in self.all.items()}
        before = self.current
        self.current = stream if isinstance(stream, int) else handles[id(stream)]
        try:
            yield
        finally:
            self.current = before

    def run(self, fills: bytes, table: int, count: int, *rest: Any) -> None:
        assert table == 0
        stream = self.all[self.current]
        size = len(fills) // count
        addresses = [struct.unpack_from("<Q", fills, size * i)[0] for i in range(count)]
        self.history.append((addresses, set(stream.behind)))
        stream.launched.append(addresses)
        stream.behind.update(addresses)
        self.launch(fills, table, count, *rest)


@pytest.fixture
def streams(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


@only_simulated
@pytest.mark.parametrize("name", ["normal_", "zeros_"])
@pytest.mark.parametrize("module", [torch_init, fastinit], ids=["torch", "fastinit"])
def test_launches_go_to_the_stream_they_were_asked_for_on(
    module: Any, name: str, streams: Streams, gpu: Gpu
) -> None:
    """Its memory may still be used by what that stream did before. The current one waits."""
    gpu.place_defaults()
    with fastinit.fused(watch=True):
        tensors = []
        for i, handle in enumerate((5, 0, 9, 5, 5)):
            with streams.use(handle):
                tensors.append(getattr(module, name)(torch.empty(100 + i)))
        assert streams.history == []
    after = gpu.states()
    gpu.place_defaults()
    expected = {str(i): getattr(torch_init, name)(torch.empty(100 + i)) for i in range(5)}
    found = {str(i): t for i, t in enumerate(tensors)}
    gpu.assert_same({**expected, **gpu.states()}, {**found, **after}, "streams")
    at = [t.data_ptr() for t in tensors]
    assert streams.all[5].launched == [[at[0], at[3], at[4]]]
    assert streams.all[0].launched == [[at[1]]]
    assert streams.all[9].launched == [[at[2]]]
    assert streams.all[0].behind >= set(at)


@only_simulated
def test_constants_and_numbers_of_a_stream_are_one_launch(streams: Streams) -> None:
    with fastinit.fused(), streams.use(5):
        layer = nn.Linear(20, 30)
        nn.init.zeros_(layer.bias)
        nn.BatchNorm1d(4)
        kept = torch.ones(30)
    addresses = [t.data_ptr() for t in (layer.weight, layer.bias, kept)]
    assert [sorted(a) for a, _ in streams.history] == [sorted(addresses)]
    assert [sorted(a) for a in streams.all[5].launched] == [sorted(addresses)]


@only_simulated
def test_a_read_on_another_stream_waits(streams: Streams) -> None:
    with fastinit.fused():
        w = torch.empty(100).normal_()
        with streams.use(5):
            w.sum()
            assert streams.all[0].launched
            assert streams.all[5].behind == {geometry.address_of(w)}


@only_simulated
@pytest.mark.parametrize(("first", "second"), [(0, 5), (5, 0), (5, 9)])
def test_overlapping_fills_of_two_streams_keep_their_order(
    first: int, second: int, streams: Streams
) -> None:
    """The user has made the second stream wait for the first, when nothing was launched yet."""
    with fastinit.fused():
        with streams.use(first):
            w = torch.empty(40, 30).normal_()
        streams.all[second].wait_stream(streams.all[first])
        with streams.use(second):
            w[0].uniform_()
    (whole, _), (row, behind) = streams.history
    assert whole == row == [w.data_ptr()]
    assert behind >= set(whole), "the second launch may run before the first"


@only_simulated
def test_at_once_is_on_the_current_stream(streams: Streams) -> None:
    w, made = torch.empty(100), fastinit.Plan()
    with streams.use(9):
        fastinit.normal_(w)
        made.uniform_(w)
    with streams.use(5):
        made.run()
    assert [len(streams.all[s].launched) for s in (0, 5, 9)] == [0, 1, 1]


# ---- streams of a real GPU -----------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, t: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(t)


def planned(t: torch.Tensor, others: int = 0) -> Callable[[], object]:
    made = fastinit.Plan()
    made.normal_(t)
    for _ in range(others):
        made.zeros_(torch.empty(300, device=t.device))
    return made.run


def in_model(t: torch.Tensor) -> Callable[[], object]:
    holder = Holder(t)
    return lambda: init_model_(holder, lambda m: torch_init.normal_(m.w))


WAYS: dict[str, Callable[[torch.Tensor], Callable[[], object]]] = {
    "call": lambda t: lambda: fastinit.normal_(t),
    "plan": planned,
    "plan with a table": lambda t: planned(t, 60),
    "scope": in_model,
}


def drawn_by(gpu: Gpu, *names: str, n: int = 50_000) -> list[torch.Tensor]:
    """What torch draws one after the other."""
    START.place(gpu.default)
    made = [getattr(gpu.empty(n), name)() for name in names]
    torch.cuda.synchronize()
    START.place(gpu.default)
    return made


@only_hardware
@pytest.mark.parametrize("way", WAYS)
def test_side_stream_does_not_wait_for_the_default_one(way: str, gpu: Gpu) -> None:
    t, s = gpu.empty(50_000), torch.cuda.Stream()
    run = WAYS[way](t)
    with torch.cuda.stream(s):
        run()  # loads, allocates
    (expected,) = drawn_by(gpu, "normal_")
    t.fill_(-77.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(NAP)
    busy = torch.cuda.Event()
    busy.record()
    with torch.cuda.stream(s):
        run()
        s.synchronize()
        is_busy = not busy.query()
        found = t.cpu()
    assert is_busy
    assert torch.equal(bits(found), bits(expected.cpu()))


@only_hardware
@pytest.mark.parametrize("before", ["side stream", "default stream"])
@pytest.mark.parametrize("way", WAYS)
def test_order_on_a_side_stream(way: str, before: str, gpu: Gpu) -> None:
    """After what was asked for on that stream before, and before what comes next."""
    t, s = gpu.empty(50_000), torch.cuda.Stream()
    old, new, other = (torch.full_like(t, 3.0) for _ in range(3))
    run = WAYS[way](t)
    with torch.cuda.stream(s if before == "side stream" else torch.cuda.default_stream()):
        run()
    (expected,) = drawn_by(gpu, "normal_")
    t.fill_(-77.0)
    torch.cuda.synchronize()
    with torch.cuda.stream(s):
        torch.cuda._sleep(NAP)
        old.copy_(t)
        t.copy_(other)
        run()
        new.copy_(t)
    s.synchronize()
    assert (old == -77).all()
    assert torch.equal(bits(new), bits(expected))
    assert torch.equal(bits(t), bits(expected))


@only_hardware
def test_rejections_on_a_side_stream(gpu: Gpu) -> None:
    t, s = gpu.empty(50_000), torch.cuda.Stream()
    made = fastinit.Plan()
    made.trunc_normal_(t)
    made.run()
    START.place(gpu.default)
    expected = gpu.torch.trunc_normal_(torch.empty_like(t))
    after = gpu.state_of(gpu.default)
    START.place(gpu.default)
    torch.cuda.synchronize()
    with torch.cuda.stream(s):
        torch.cuda._sleep(NAP)
        t.fill_(3.0)
        made.run()
        found = t.clone()
    s.synchronize()
    assert torch.equal(bits(found), bits(expected))
    assert gpu.state_of(gpu.default) == after


@only_hardware
@pytest.mark.parametrize("reader", ["inside", "outside", "another"])
def test_scope_on_a_side_stream(reader: str, gpu: Gpu) -> None:
    """Fills that waited come after the reads of what was there before, on the stream they were
    asked for on; a reader on another one goes on behind them."""
    n, s = 50_000, torch.cuda.Stream()
    normal, uniform = drawn_by(gpu, "normal_", "uniform_")
    gpu.dirty()
    with torch.cuda.stream(s):
        gpu.dirty()
    torch.cuda.synchronize()
    scope, side = fastinit.fused(), torch.cuda.stream(s)
    contexts = {"inside": [side, scope], "outside": [scope, side], "another": [scope]}[reader]
    late = None
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)
        a, b = gpu.empty(n).fill_(1.0), gpu.empty(n).normal_()
        torch.cuda._sleep(NAP)
        seen = a + 0, b + 0
        a.fill_(2.0)
        b.uniform_()
        if reader == "another":
            s.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(s):
                late = a + 0, b + 0
    torch.cuda.synchronize()
    assert (seen[0] == 1).all()
    assert torch.equal(bits(seen[1]), bits(normal))
    for x, y in ((a, b), late or (a, b)):
        assert (x == 2).all()
        assert torch.equal(bits(y), bits(uniform))


@only_hardware
def test_many_streams_in_a_scope(gpu: Gpu) -> None:
    streams = [*(torch.cuda.Stream() for _ in range(4)), torch.cuda.default_stream()]
    seen = []
    for fused in (True, False):
        START.place(gpu.default)
        gpu.dirty()
        made = []
        with in_scope(fused):
            for i in [i * 3 % 5 for i in range(40)]:
                with torch.cuda.stream(streams[i]):
                    made.append(gpu.empty(2000 + i).normal_())
                    made.append(gpu.full(300, value=0.0))
                    if i == 2:
                        made.append(made[-2] * 2)
        torch.cuda.synchronize()
        seen.append({str(i): bits(t) for i, t in enumerate(made)} | gpu.states())
    gpu.assert_same(seen[1], seen[0], "streams")


# ---- graphs --------------------------------------------------------------------------------------


def test_no_kernels_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, capturing in itertools.product((None, object()), (False, True)):
        monkeypatch.setattr(kernels, "_cuda", module)
        ask = lambda c=capturing: c  # noqa: E731
        monkeypatch.setattr(torch_api, "is_capturing", ask)
        assert kernels.can_use_cuda() == (module is not None and not capturing)


@only_simulated
@pytest.mark.parametrize("way", ["function", "plan", "older", "adopted", "factory"])
def test_nothing_is_native_while_a_graph_is_captured(
    way: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay has to draw other numbers each time, so torch's kernels must be in the graph."""
    w = gpu.full(300)

    def capture() -> None:  # from here on
        monkeypatch.setattr(kernels, "can_use_cuda", lambda: False)
        monkeypatch.setattr(geometry, "is_here", lambda t: False)
        monkeypatch.setattr(operators, "makes_native", lambda args, kwargs, least: False)

    gpu.place_defaults()
    if way in ("function", "plan"):
        capture()
        made = fastinit.Plan()
        (fastinit if way == "function" else made).uniform_(w)
        made.run()
    else:
        with fastinit.fused() as report:
            if way == "adopted":
                w = torch.empty(300)
            capture()
            w = torch.rand(300) if way == "factory" else w.uniform_()
        assert report.recorded_elements == 0
    assert gpu.launches == []
    gpu.place_defaults()
    assert torch.equal(w, torch.rand(300))


@only_simulated
def test_what_waits_does_not_get_into_a_graph(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.place_defaults()
    with fastinit.fused():
        w = torch.empty(300).normal_()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "can_use_cuda", lambda: False)
            with pytest.raises(RuntimeError, match="graph"):
                w.sum()
        assert gpu.launches == []
    gpu.place_defaults()
    gpu.assert_same({"w": torch.empty(300).normal_()}, {"w": w}, "after a graph")


@pytest.mark.parametrize("ran", [0, 2])
def test_a_plan_does_not_run_while_a_graph_is_captured(
    ran: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not gpu.is_gpu:
        pytest.skip("a dry run on the CPU")
    t, other, made = gpu.full(5000), gpu.full(100, value=0.0), fastinit.Plan()
    made.normal_(t)
    made.zeros_(t[:100])
    for _ in range(ran):
        made.run()
    other.add_(1)
    t.fill_(13.0)
    gpu.place_defaults()
    before, version = gpu.states(), t._version
    gpu.launches.clear()
    with ExitStack() as capture:
        if gpu.is_real:
            graph = torch.cuda.CUDAGraph()
            capture.enter_context(torch.cuda.graph(graph))
        else:
            capture.enter_context(monkeypatch.context()).setattr(
                kernels, "can_use_cuda", lambda: False
            )
        with pytest.raises(RuntimeError, match="graph"):
            made.run()
        other.add_(1)
    if gpu.is_real:
        graph.replay()
        torch.cuda.synchronize()
    assert (gpu.launches, t._version) == ([], version)
    assert (t == 13).all()
    assert (other == 2).all()
    gpu.assert_same(before, gpu.states(), "after the capture")
    made.run()
    found = {"t": gpu.values(t), **gpu.states()}
    gpu.place_defaults()
    expected = torch_init.normal_(torch.empty_like(t))
    expected[:100] = 0
    gpu.assert_same({"t": gpu.values(expected), **gpu.states()}, found, "afterwards")


def in_a_scope(module: Any, t: torch.Tensor) -> None:
    with in_scope(module is fastinit):
        module.normal_(t)
        module.zeros_(t[:10])


CAPTURED: dict[str, Callable[[Any, torch.Tensor], object]] = {
    "uniform": lambda module, t: module.uniform_(t, -0.5, 0.5),
    "xavier": lambda module, t: module.xavier_normal_(t),
    "constant": lambda module, t: module.constant_(t, 0.5),
    "several": lambda m, t: [m.normal_(t), m.uniform_(t[1:3]), m.normal_(t[:1])],
    "scope": in_a_scope,
}


@only_hardware
@pytest.mark.parametrize("what", CAPTURED)
def test_captured_calls_are_torchs(what: str, gpu: Gpu) -> None:
    """Replays draw on from where the generator is."""
    seen = []
    for module, poison in zip((torch_init, fastinit), POISONS):
        t = gpu.empty(60, 50)
        CAPTURED[what](torch_init, t)  # loads torch's kernels
        t.fill_(poison)
        gpu.place_defaults(At(11, 8))
        graph = torch.cuda.CUDAGraph()
        done = kernels.native_fills
        with torch.cuda.graph(graph):
            CAPTURED[what](module, t)
        assert kernels.native_fills == done
        now: dict[str, Any] = {f"captured: {k}": v for k, v in gpu.states().items()}
        for i in range(3):
            graph.replay()
            now[f"replay {i}"] = bits(t).clone()
        seen.append(now | gpu.states())
        torch.cuda.synchronize()
    gpu.assert_same(seen[0], seen[1], what)
    if what != "constant":
        assert not torch.equal(seen[1]["replay 0"], seen[1]["replay 1"])


@only_hardware
@pytest.mark.parametrize("name", ["zero_", "normal_"])
def test_capture_in_a_scope_works_or_is_refused(name: str, gpu: Gpu) -> None:
    """The operator is part of the graph though the tensor's fills wait."""
    other = gpu.full(10, value=0.0).add_(1)
    getattr(gpu.empty(5000), name)()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    START.place(gpu.default)
    try:
        with fastinit.fused():
            t = gpu.empty(5000)
            with torch.cuda.graph(graph):
                other.add_(1)
                getattr(t, name)()
    except RuntimeError as error:
        assert "captur" in str(error)  # noqa: PT017
    else:
        for values in drawn_by(gpu, name, name, n=5000):
            t.fill_(13.0)
            graph.replay()
            assert torch.equal(bits(t), bits(values))
    done = kernels.native_fills
    fastinit.normal_(gpu.empty(1000))
    assert kernels.native_fills == done + 1


@only_hardware
def test_proofs_are_not_spoilt_by_a_capture(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that is met for the first time while a graph is captured is proved later."""
    monkeypatch.setattr(probe, "_verdicts", {})
    t, other = gpu.empty(5000), gpu.full(10, value=0.0).add_(1)
    t.uniform_()
    torch.cuda.synchronize()
    with fastinit.fused():
        inside = gpu.empty(5000)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            other.add_(1)
            fastinit.uniform_(t)
            attempt(inside.uniform_)
    done = kernels.native_fills
    fastinit.uniform_(torch.empty(1000, dtype=F32, device=gpu.here))
    assert kernels.native_fills > done
