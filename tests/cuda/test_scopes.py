# SPDX-License-Identifier: BSD-3-Clause
"""fused() on a GPU: what waits, what a read writes, copies, factories, launches of a scope.

Each body is done eagerly by torch and in a scope, and everything that can be seen is compared.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit.core import geometry, recording
from fastinit.cuda import qr as cuda_qr
from fastinit.cuda import runtime
from tests.support.compare import BF16, F16, F64
from tests.support.cuda_gpu import At, Gpu, each_dtype, in_scope, only_simulated

Body = Callable[[Gpu], list[Any]]


def compare(gpu: Gpu, body: Body, versions: bool = True) -> Any:
    """Do it in a scope, then without; return the scope's report."""
    seen = []
    for fused in (True, False):
        gpu.place_defaults()
        gpu.dirty()
        gpu.launches.clear()
        with in_scope(fused) as entered:
            made = body(gpu)
        if fused:
            report, launches = entered, list(gpu.launches)
        values = {str(i): gpu.values(x) if torch.is_tensor(x) else x for i, x in enumerate(made)}
        counts = {f"{i} version": x._version for i, x in enumerate(made) if torch.is_tensor(x)}
        seen.append({**values, **(counts if versions else {}), **gpu.states()})
    gpu.assert_same(seen[1], seen[0], "scope")
    gpu.launches[:] = launches
    return report


def either(module: Any, gpu: Gpu) -> Any:
    """In a scope the module, without one torch's functions."""
    return gpu.torch if recording.this_thread.recorder is None else module


# ---- launches and reads --------------------------------------------------------------------------


def test_a_row_on_top_is_a_second_launch(gpu: Gpu) -> None:
    def body(gpu: Gpu) -> list[Any]:
        table, other, w = (
            gpu.empty(30, 8).normal_(),
            gpu.empty(50).uniform_(),
            gpu.empty(40, 30).normal_(),
        )
        table[3].zero_()
        w.data[:, 7].fill_(0.25)
        torch_init.ones_(w[:, 9])
        assert not gpu.is_gpu or gpu.launches == []
        return [table, other, w]

    report = compare(gpu, body)
    assert gpu.launched(3, 2, 1)
    assert report.early == []
    assert report.written_elements == 240 + 50 + 1200 + 8 + 40 + 40
    assert report.bytes == 4 * report.written_elements


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sum": torch.Tensor.sum, "row": lambda w: w[2] + 1, "tolist": lambda w: w.tolist(),
    "numpy": lambda w: w.data.cpu().numpy(), "item": lambda w: w[0, 1].item(), "repr": repr,
    "equal": lambda w: torch.equal(w, w), "data_ptr": lambda w: w.data_ptr(),
    "add_": lambda w: w.add_(w),
}  # fmt: skip


@pytest.mark.parametrize("read", READS)
def test_a_read_writes_only_what_it_reads(read: str, gpu: Gpu) -> None:
    def body(gpu: Gpu) -> list[Any]:
        a, w, b = (
            gpu.empty(70).normal_(),
            gpu.empty(20, 30).uniform_(),
            torch_init.ones_(gpu.empty(5)),
        )
        for _ in range(2):
            READS[read](w)
            assert recording.this_thread.recorder is None or gpu.launched(1)
        return [a, w, b, w.clone()]

    report = compare(gpu, body)
    assert gpu.launched(1, 2)
    assert [e.elements for e in report.early] == [600]


def test_a_read_gives_what_was_asked_for(gpu: Gpu) -> None:
    def body(gpu: Gpu) -> list[Any]:
        w = gpu.empty(3000).uniform_(2.0, 3.0)
        gpu.empty(50).normal_()
        first = w.clone().sort().values
        w.normal_()
        again = w.clone().sort().values
        return [first, again, w.zero_()]

    compare(gpu, body)
    assert gpu.launched(2, 2, 1) or gpu.launched(1, 1, 1)


@each_dtype
def test_views(dtype: torch.dtype, gpu: Gpu) -> None:
    """Rows, columns, transposes, blocks: in order where they overlap."""

    def body(gpu: Gpu) -> list[Any]:
        w, v = gpu.empty(60, 50, dtype=dtype), gpu.empty(7, 3, 11, dtype=dtype)
        torch_init.normal_(w)
        w.data[3].uniform_()
        w[5:40, 10:20].data.normal_(1.0, 0.5)
        nn.init.uniform_(w.t()[7], -3.0, -2.0)
        v.permute(2, 0, 1).uniform_()
        v.view(-1)[100:].normal_()
        v[:, 1].uniform_(5.0, 6.0)
        assert gpu.launches == []
        return [w, v]

    compare(gpu, body)
    assert gpu.launched(2, 3, 2)


def test_many_fills_of_one_tensor(gpu: Gpu) -> None:
    def body(gpu: Gpu) -> list[Any]:
        w = gpu.empty(90, 7)
        for row in w:
            row.normal_()
        return [w]

    report = compare(gpu, body)
    assert gpu.launched(65, 25)
    assert not gpu.is_gpu or len(report.early) == 1


def test_what_dies_in_the_scope_is_not_written(gpu: Gpu) -> None:
    """Its numbers count all the same, and memory that is used again is somebody else's."""

    def body(gpu: Gpu) -> list[Any]:
        a = gpu.empty(5000).normal_()
        dead = [nn.Linear(30, 40, device=gpu.here) for _ in range(3)]
        b = gpu.empty(100).normal_()
        del dead
        gc.collect()
        return [a, b, *(gpu.full(1200, value=0.0) for _ in range(3))]

    report = compare(gpu, body)
    assert gpu.launched(5)
    assert report.dropped_elements == 3 * (1200 + 40)


def test_copies_of_what_waits(gpu: Gpu) -> None:
    """clone, copy_ and conversions copy the record; each copy is its own afterwards."""

    def body(gpu: Gpu) -> list[Any]:
        w, other, half = gpu.empty(30, 20), gpu.empty(30, 20), gpu.empty(600, dtype=BF16)
        torch_init.normal_(w)
        copy = w.clone()
        other.uniform_()
        other.copy_(w)
        w.zero_()
        copy[0].uniform_()
        tied = nn.Parameter(other)
        half.uniform_()
        wide = half.float()
        assert tied.data_ptr() == other.data_ptr()
        return [w, copy, other, half, wide, tied.detach()]

    report = compare(gpu, body)
    assert report.recorded_elements == 600 * 7 + 20


def test_an_exception_leaves_what_was_asked_for(gpu: Gpu) -> None:
    kept: list[torch.Tensor] = []

    def body(gpu: Gpu) -> list[Any]:
        made = [gpu.empty(300).normal_(), gpu.empty(20).uniform_()]
        kept.extend(made)
        return made

    def fails() -> None:
        with fastinit.fused(watch=True):
            body(gpu)
            raise KeyError("mine")

    gpu.place_defaults()
    with pytest.raises(KeyError, match="mine"):
        fails()
    assert gpu.launched(2)
    assert recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0
    gpu.place_defaults()
    expected = body(gpu)
    torchs, ours = ({str(i): gpu.values(t) for i, t in enumerate(x)} for x in (expected, kept[:2]))
    gpu.assert_same(torchs, ours, "after an exception")


@only_simulated
def test_a_failed_launch_can_be_repeated(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while writing: states and fills are still there."""
    interrupts = [KeyboardInterrupt]
    launch = runtime.run

    def run(*args: Any) -> None:
        if interrupts:
            raise interrupts.pop()
        launch(*args)

    monkeypatch.setattr(runtime, "run", run)
    kept: list[torch.Tensor] = []
    gpu.place_defaults()

    def interrupted() -> None:
        with fastinit.fused(watch=True):
            kept.append(gpu.empty(300).normal_())

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    after = gpu.states()
    gpu.place_defaults()
    expected = {"t": gpu.empty(300).normal_(), **gpu.states()}
    gpu.assert_same(expected, {"t": kept[0], **after}, "after an interrupt")


# ---- operators -----------------------------------------------------------------------------------

FACTORIES: dict[str, Callable[[torch.device], torch.Tensor]] = {
    "zeros": lambda d: torch.zeros(30, 4, device=d), "ones": lambda d: torch.ones(7, device=d),
    "full": lambda d: torch.full((9, 2), 2.5, device=d),
    "bf16": lambda d: torch.full((9, 2), 0.1, dtype=BF16, device=d),
    "rand": lambda d: torch.rand(5000, device=d),
    "rand64": lambda d: torch.rand(5000, dtype=F64, device=d),
    "randn": lambda d: torch.randn(3, 1700, device=d),
    "randn16": lambda d: torch.randn(3, 1700, dtype=F16, device=d),
    "zeros_like": lambda d: torch.zeros_like(torch.empty(8, 5, device=d)),
    "full_like": lambda d: torch.full_like(torch.empty(8, device=d), -3.0),
    "rand_like": lambda d: torch.rand_like(torch.empty(8, 5, device=d).t()),
    "randn_like": lambda d: torch.randn_like(torch.empty(8, 5, device=d)),
    "new_ones": lambda d: torch.empty(3, device=d).new_ones(6),
    "new_full": lambda d: torch.empty(3, device=d).new_full((6, 6), 4.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTORIES)
def test_factories(name: str, gpu: Gpu) -> None:
    report = compare(gpu, lambda gpu: [FACTORIES[name](gpu.here), torch.rand(10, device=gpu.here)])
    assert gpu.launched(2)
    assert report.recorded_elements == FACTORIES[name](gpu.here).numel() + 10


def test_factories_of_other_kinds_are_torchs(gpu: Gpu) -> None:
    def body(gpu: Gpu) -> list[Any]:
        d = gpu.here
        return [
            *(torch.zeros(9, dtype=torch.int64, device=d), torch.ones(0, device=d)),
            *(torch.full((4,), 3, device=d), torch.zeros(3, dtype=torch.complex64, device=d)),
            *(torch.arange(5.0, device=d), torch.tensor([1.0, 2.0], device=d)),
        ]

    assert compare(gpu, body).recorded_elements == 0
    assert gpu.launches == []


def test_every_operator(gpu: Gpu) -> None:
    """In-place operators, views, copies and sparse_'s rows, of any dtype."""

    def body(gpu: Gpu) -> list[Any]:
        d = gpu.here
        made = [
            torch.rand(400, dtype=F64, device=d),
            torch.randn(17, 3, device=d),
            torch.ones(3, 5, dtype=BF16, device=d),
        ]
        made.append(torch.empty(90, 50, dtype=F16, device=d).t())
        made[-1].normal_(0.0, 0.02)
        made[-1][:, 7].zero_()
        made.append(torch.empty(60, 80, device=d)[:, 3:40].uniform_(-1, 1))
        made += [made[-1].clone(), torch.empty_like(made[1]).copy_(made[1])]
        w = torch.empty(70, 30, device=d)
        for name, *args in (
            *(("sparse_", 0.4), ("eye_",), ("xavier_uniform_",), ("trunc_normal_", 0.0, 0.02)),
            *(("sparse_", 0.2, 0.5), ("trunc_normal_",), ("kaiming_normal_",)),
        ):
            made.append(getattr(torch_init, name)(torch.empty_like(w), *args))
            getattr(torch_init, name)(w, *args)
        return [*made, w]

    compare(gpu, body)


@pytest.mark.parametrize(
    ("bound", "waits"), [(0.6, False), (6.5, False), (7.0, True), (50.0, True)]
)
@pytest.mark.parametrize("module", [torch_init, fastinit], ids=["torch", "fastinit"])
def test_trunc_normal(bound: float, waits: bool, module: Any, gpu: Gpu) -> None:
    """On a GPU the words have 32 bits and a half, which makes the reach 6.76 deviations."""

    def body(gpu: Gpu) -> list[Any]:
        a, w = gpu.empty(40).uniform_(), gpu.empty(50, 40).uniform_()
        assert either(module, gpu).trunc_normal_(w, 0.0, 1.0, -bound, bound) is w
        return [a, w, gpu.empty(70).normal_()]

    report = compare(gpu, body)
    if gpu.is_gpu:
        assert gpu.launches == ([3] if waits else [1, 2])
        assert report.at_once_elements == (0 if waits else 2000)
        assert report.dropped_elements == 2000


@pytest.mark.parametrize("module", [torch_init, fastinit], ids=["torch", "fastinit"])
@pytest.mark.parametrize("later", ["end", "read", "clone", "overwritten", "saved"])
def test_sparse(later: str, module: Any, gpu: Gpu) -> None:
    """Which rows are zeroed is drawn from the CPU's generator when it is asked for. A reference to
    torch's own function, saved before, shows its operators, which read column by column."""
    sparse = torch_init.sparse_ if later == "saved" else None

    def body(gpu: Gpu) -> list[Any]:
        w = gpu.empty(40, 30)
        (sparse or either(module, gpu).sparse_)(w, 0.35, 0.1)
        b = gpu.empty(500).normal_()
        if later == "read":
            w.sum()
        if later == "overwritten":
            w.uniform_()
        return [w, b, w.clone() if later == "clone" else 0]

    report = compare(gpu, body)
    if later == "clone" and gpu.is_gpu:
        assert report.recorded_elements == 2900


@pytest.mark.usefixtures("own_factors")
def test_orthogonal(gpu: Gpu) -> None:
    """It waits, and what overlaps it comes behind it."""

    def body(gpu: Gpu) -> list[Any]:
        w, b = gpu.empty(6, 20).normal_(), gpu.empty(20).uniform_()
        torch_init.orthogonal_(w)
        w[0].zero_()
        assert gpu.launches == []
        return [w, b, torch_init.orthogonal_(gpu.empty(7, 5), 2.0)]

    report = compare(gpu, body)
    assert gpu.launched(3, 1)
    assert report.dropped_elements == 120


@only_simulated
@pytest.mark.parametrize("way", ["plan", "scope"])
def test_memory_for_normals(way: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit matrices are written by parts, other fills with them; the factors of a launch follow
    it with each other."""
    monkeypatch.setattr(cuda_qr, "MOST_MEMORY", 4 * 2000)
    gpu.place_defaults()
    made = [gpu.empty(30, 30, dtype=BF16) for _ in range(5)]
    b, plan = gpu.empty(20_000), fastinit.Plan()
    with in_scope(way == "scope"):
        if way == "scope":
            made, b = [torch.empty_like(t) for t in made], torch.empty_like(b)
        to: Any = plan if way == "plan" else fastinit
        for t in made:
            to.orthogonal_(t)
        to.normal_(b)
    plan.run()
    assert gpu.launched(2, 2, 2)
    gpu.place_defaults()
    expected = [*(torch_init.orthogonal_(torch.empty(30, 30)) for _ in made), gpu.empty(20_000)]
    expected[-1].normal_()
    for t, ours in zip(expected, (*made, b)):
        gpu.assert_same({"t": t.to(ours.dtype)}, {"t": ours}, way)


@only_simulated
@each_dtype
def test_tensors_that_torch_splits(
    dtype: torch.dtype, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "MOST_AT_ONCE", 5000)
    monkeypatch.setattr("tests.support.cuda_model.LIMIT", 5000)

    def body(gpu: Gpu) -> list[Any]:
        made = [gpu.empty(9001, dtype=dtype), gpu.empty(70, 90, dtype=dtype)]
        made += [gpu.empty(130, 60, dtype=dtype)[:, 3:40], gpu.empty(30, 20, 10, dtype=dtype).mT]
        for t in made:
            torch_init.normal_(t.uniform_(), 0.5, 2.0)
        made.append(torch_init.sparse_(gpu.empty(70, 90, dtype=dtype), 0.35, 0.5))
        return [*made, torch_init.constant_(gpu.empty(9001, dtype=dtype), 3.0)]

    compare(gpu, body)
    assert max(gpu.launches) > 6


# ---- scopes, plans, threads and generators together ----------------------------------------------


def test_a_plan_run_in_a_scope_comes_in_its_place(gpu: Gpu) -> None:
    def body(gpu: Gpu) -> list[Any]:
        a, made = gpu.empty(300).normal_(), fastinit.Plan()
        made.uniform_(w)
        made.sparse_(m, 0.35)
        made.run()
        return [a, w, m, gpu.empty(300).normal_()]

    w, m = gpu.full(500), gpu.full(40, 30)
    report = compare(gpu, body, versions=False)
    assert [e.operator for e in report.early] == ["Plan.run"]
    assert gpu.launched(1, 2, 1)


def test_nested_scopes_join(gpu: Gpu) -> None:
    def body(gpu: Gpu) -> list[Any]:
        captured = recording.this_thread.recorder is not None
        a = gpu.empty(30).normal_()
        with in_scope(captured):
            b, net = gpu.empty(40).uniform_(), nn.Linear(4, 3, device=gpu.here)
            _ = fastinit.init_model_(net) if captured else net.reset_parameters()
        assert gpu.launches == []
        return [a, b, net.weight.detach(), net.bias.detach(), gpu.empty(20).uniform_()]

    compare(gpu, body)
    assert gpu.launched(5)
    with fastinit.fused() as outer, fastinit.fused() as inner:
        assert inner is outer


def test_older_tensors_that_others_know_do_not_wait(gpu: Gpu) -> None:
    w = gpu.full(300)
    other = w.view(-1)

    def body(gpu: Gpu) -> list[Any]:
        new, version = gpu.empty(20).uniform_(), w._version
        w.normal_()
        torch_init.uniform_(w)
        return [new, w, other, w._version - version]

    report = compare(gpu, body, versions=False)
    assert gpu.launched(1, 1, 1)
    assert not gpu.is_gpu or (report.at_once_elements, report.recorded_elements) == (600, 20)


def test_nothing_waits_while_a_thread_of_the_scope_runs(gpu: Gpu) -> None:
    def body(gpu: Gpu) -> list[Any]:
        go, a = threading.Event(), gpu.empty(30).normal_()
        thread = threading.Thread(target=go.wait, name="reader")
        thread.start()
        b = gpu.empty(40).uniform_()
        go.set()
        thread.join()
        return [a, b, gpu.empty(40).uniform_()]

    report = compare(gpu, body)
    assert gpu.launched(1, 1, 1)
    assert report.threads == {"reader"}


def test_generators_and_seeds(gpu: Gpu) -> None:
    """Numbers are of the seed when they were asked for; a launch holds eight."""

    def body(gpu: Gpu) -> list[Any]:
        one, two = gpu.generator(At(7)), gpu.generator(At(8, 2**34))
        made = [torch_init.normal_(gpu.empty(5000), generator=one)]
        made.append(torch_init.uniform_(gpu.empty(60), generator=two))
        made.append(torch_init.kaiming_normal_(gpu.empty(70, 100), generator=one))
        for seed in (*range(10), 3):
            At(seed, 4 * seed).place(gpu.default)
            made.append(gpu.empty(50 + seed).normal_())
        return [*made, gpu.state_of(one), gpu.state_of(two)]

    compare(gpu, body)
    assert not gpu.is_gpu or sum(gpu.launches) == 14


def test_the_report(gpu: Gpu, capsys: pytest.CaptureFixture[str]) -> None:
    with fastinit.fused(watch=True) as report:
        net = nn.Sequential(nn.Linear(30, 20, device=gpu.here), nn.Linear(20, 10, device=gpu.here))
        torch_init.trunc_normal_(net[0].weight, std=0.02)  # far bounds
        torch_init.trunc_normal_(net[1].weight, std=1.0)  # at once, on a GPU
        torch_init.sparse_(net[1].weight, 0.5)
        net[0].bias.data.sum()
    print(report)
    shown = capsys.readouterr().out
    if gpu.is_gpu:
        assert report.recorded_elements == 600 * 2 + 20 + 200 * 2 + 10
        assert report.written_elements == 600 + 20 + 200 + 10
        assert (report.dropped_elements, report.at_once_elements) == (800, 200)
        assert report.bytes == 4 * report.written_elements
        assert "Fills of 1,630 elements waited: 830 written" in shown
        assert "Fills of 200 elements could not wait" in shown
    assert {row.name: row.written_by for row in report.rows()} == {
        "0.weight": ("trunc_normal_(mean=0, std=0.02, a=-2, b=2)",),
        "0.bias": ("uniform_(a=-0.1826, b=0.1826)",),
        "1.weight": ("sparse_(sparsity=0.5, std=0.01)",),
        "1.bias": ("uniform_(a=-0.2236, b=0.2236)",),
    }
    assert "aten.sum.default at" in shown
