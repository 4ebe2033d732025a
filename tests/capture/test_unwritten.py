# SPDX-License-Identifier: BSD-3-Clause
"""What nobody has written: no false alarm, no miss, in fused(), init_model_ and materialize_."""

from __future__ import annotations

import ctypes
import io
import re
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastinit
from fastinit import Plan, Report, fused, init_model_, materialize_
from tests.support.compare import BF16, F32
from tests.support.models import ZOO
from tests.support.reports import (
    SEED,
    each_seed,
    each_size,
    holder,
    linear,
    on_meta,
    quietly,
    statuses,
)

EMPTY: dict[str, Callable[[int], Tensor]] = {
    "empty": lambda n: torch.empty(n, n),
    "Tensor": lambda n: torch.Tensor(n, n),
    "FloatTensor": lambda n: torch.FloatTensor(n, n),
    "new": lambda n: torch.zeros(1).new(n, n),
    "new_empty": lambda n: torch.zeros(1).new_empty(n, n),
    "empty_like": lambda n: torch.empty_like(torch.zeros(n, n)),
    "empty_strided": lambda n: torch.empty_strided((n, n), (1, n)),
    "view": lambda n: torch.empty(n * n).view(n, n),
    "part": lambda n: torch.empty(2 * n, n)[:n],
    "of integers": lambda n: torch.empty(n, n, dtype=torch.int64),
    "half": lambda n: torch.empty(n, n, dtype=BF16),
    "empty_permuted": lambda n: torch.empty_permuted((n, n), (1, 0)),
    "clone": lambda n: torch.empty(n, n).clone(),
    "copy_": lambda n: torch.empty(n, n).copy_(torch.empty(n, n)),
}


@each_seed
@each_size
@pytest.mark.parametrize("name", EMPTY)
def test_unwritten(name: str, n: int, seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        model = nn.Sequential(nn.Linear(3, 3), holder(EMPTY[name](n)))
    assert report.unwritten == ["1.w"]
    with pytest.raises(RuntimeError, match=r"1 tensors were never initialised: 1\.w$"):
        report.check()
    row = next(row for row in report.rows() if row.name == "1.w")
    assert (row.status, row.kind, row.key, row.written_by) == ("unwritten", "parameter", "", ())
    assert row.laws == ()
    assert re.search(r"^1\.w .*UNWRITTEN$", str(report), re.MULTILINE)
    assert "Never initialised: 1.w" in str(report)
    assert model


def write_part(t: Tensor) -> None:
    t[:1].fill_(1)


def one_operator(a: Tensor, b: Tensor) -> None:
    b.fill_(3)


library: Any = torch.library.Library("fastinit_audit", "DEF")
library.define("fill(Tensor a, Tensor(b!) b) -> ()")
library.impl("fill", one_operator, "CPU")


def by_plan(t: Tensor) -> None:
    plan = Plan()
    plan.normal_(t)
    plan.run()


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "fill_": lambda t: t.fill_(1),
    "mul_": lambda t: t.mul_(0),
    "copy_": lambda t: t.copy_(torch.ones(t.shape)),
    "setitem": lambda t: t.__setitem__(0, 1.0),
    "index_put_": lambda t: t.index_put_((torch.tensor([0]),), torch.ones(t.shape[1])),
    "masked_fill_": lambda t: t.masked_fill_(torch.ones(t.shape) > 0, 1),
    "scatter_": lambda t: t.scatter_(0, torch.zeros(t.shape, dtype=torch.int64), 1.0),
    "addmm_": lambda t: t.addmm_(torch.ones(t.shape), torch.ones(t.shape), beta=0),
    "part": write_part,
    "transposed": lambda t: t.t().fill_(1),
    "view": lambda t: t.view(-1)[3:].copy_(torch.ones(t.numel() - 3)),
    "detached": lambda t: t.detach().zero_(),
    "data": lambda t: t.data.normal_(),
    "bits": lambda t: t.data.view(torch.int32).zero_(),
    "numpy": lambda t: t.detach().numpy().fill(1),
    "address": lambda t: ctypes.memset(t.data_ptr(), 0, 4),
    "dlpack": lambda t: cast(Any, torch).from_dlpack(t.detach()).fill_(1),
    "out": lambda t: torch.add(torch.ones(t.shape), 1, out=t),
    "foreach mul": lambda t: torch._foreach_mul_([t], 0.0),
    "foreach copy": lambda t: torch._foreach_copy_([t], [torch.ones(t.shape)]),
    "foreach zero": lambda t: torch._foreach_zero_([t]),
    "set_": lambda t: cast(Any, t).set_(torch.ones(t.shape)),
    "data is": lambda t: setattr(t, "data", torch.ones(t.shape)),
    "storage": lambda t: cast(Any, t.untyped_storage()).fill_(0),
    "storages": lambda t: t.untyped_storage().copy_(torch.ones(t.shape).untyped_storage()),
    "swap": lambda t: cast(Any, torch).utils.swap_tensors(t, nn.Parameter(torch.ones(t.shape))),
    "bernoulli_": lambda t: t.bernoulli_(),
    "exponential_": lambda t: t.exponential_(),
    "erfinv_": lambda t: t.uniform_().erfinv_(),
    "normal_": lambda t: torch_init.normal_(t),
    "orthogonal_": lambda t: torch_init.orthogonal_(t),
    "eye_": lambda t: torch_init.eye_(t),
    "sparse_": lambda t: torch_init.sparse_(t, 0.5),
    "ours": lambda t: fastinit.kaiming_normal_(t),
    "vector": lambda t: nn.utils.vector_to_parameters(torch.ones(t.numel()), [t]),
    "index_copy_": lambda t: t.index_copy_(0, torch.tensor([0]), torch.ones(1, t.shape[1])),
    "max": lambda t: torch.max(
        torch.ones(2, *t.shape), 0, out=(t, torch.empty(0, dtype=torch.int64))
    ),
    "topk": lambda t: torch.topk(
        torch.ones(t.shape), t.shape[1], out=(t, torch.empty(0, dtype=torch.int64))
    ),
    "second argument": lambda t: torch.ops.fastinit_audit.fill(torch.ones(2), t),
    "plan": by_plan,
}


@each_seed
@each_size
@pytest.mark.parametrize("name", WRITES)
def test_written(name: str, n: int, seed: int | None) -> None:
    """By whatever means: no false alarm. What it is called is another matter."""
    with fused(seed=seed, watch=True) as report, torch.no_grad():
        model = holder(torch.empty(n, n))
        WRITES[name](model.w)
    assert report.unwritten == []
    report.check()


@each_seed
@each_size
@pytest.mark.parametrize("name", WRITES)
def test_written_by_init_model(name: str, n: int, seed: int | None) -> None:
    model = linear(n)

    def fn(m: nn.Module) -> None:
        if m is model[0]:
            with torch.no_grad():
                WRITES[name](cast(Any, m).weight)

    report = init_model_(model, fn, seed)
    assert (report.unwritten, report.kept) == ([], [])


@each_seed
@each_size
@pytest.mark.parametrize("name", ["nothing", "read", "requires_grad_", "version", "grad"])
def test_not_written_by_init_model(name: str, n: int, seed: int | None) -> None:
    ways: dict[str, Callable[[Any], Any]] = {
        "nothing": lambda m: None,
        "read": lambda m: m.weight.sum().item(),
        "requires_grad_": lambda m: m.requires_grad_(False),
        "version": lambda m: torch.autograd.graph.increment_version(m.weight),
        "grad": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0),
    }
    model = linear(n)
    report = init_model_(model, lambda m: ways[name](m) if m is model[0] else None, seed)
    assert report.unwritten == ["0.weight"]
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        report.check()


@each_seed
@each_size
@pytest.mark.parametrize("made", ["zeros", "product", "tensor", "numpy"])
@pytest.mark.parametrize("how", ["parameter", "data", "load"])
def test_replaced_by_init_model(how: str, made: str, n: int, seed: int | None) -> None:
    """m.weight = nn.Parameter(torch.ones(...) * 2) is as good as a fill."""
    tensors: dict[str, Callable[[], Tensor]] = {
        "zeros": lambda: torch.zeros(n, n),
        "product": lambda: torch.ones(n, n) * 2,
        "tensor": lambda: torch.tensor([[1.0] * n] * n),
        "numpy": lambda: torch.from_numpy(np.ones((n, n), np.float32)),
    }
    model = linear(n)

    def fn(m: Any) -> None:
        if m is not model[0]:
            return
        if how == "parameter":
            m.weight = nn.Parameter(tensors[made]())
        elif how == "data":
            m.weight.data = tensors[made]()
        else:
            m.load_state_dict({"weight": tensors[made]()}, assign=True)

    assert init_model_(model, fn, seed).unwritten == []


def saved(t: Tensor) -> Tensor:
    torch.save(t, file := io.BytesIO())
    file.seek(0)
    return cast(Tensor, torch.load(file))


MADE: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(4, 4),
    "ones": lambda: torch.ones(4, 4),
    "full": lambda: torch.full((4, 4), 2.0),
    "tensor": lambda: torch.tensor([[1.0]]),
    "clone": lambda: torch.ones(4, 4).clone(),
    "numpy": lambda: torch.from_numpy(np.ones(4)),
    "arange": lambda: torch.arange(4.0),
    "eye": lambda: torch.eye(4),
    "linspace": lambda: torch.linspace(0, 1, 4),
    "stack": lambda: torch.stack([torch.ones(2)]),
    "as_tensor": lambda: torch.as_tensor([1.0, 2.0]),
    "frombuffer": lambda: torch.frombuffer(bytearray(16), dtype=F32),
    "randn": lambda: torch.randn(4, 4),
    "rand": lambda: torch.rand(100, 100),
    "zeros_like": lambda: torch.zeros_like(torch.empty(4, 4)),
    "new_ones": lambda: torch.empty(4).new_ones(4),
    "product": lambda: torch.ones(4) * 3,
    "none": lambda: torch.empty(0, 3),
    "load": lambda: saved(torch.ones(4)),
}


@each_seed
@pytest.mark.parametrize("name", MADE)
def test_made_with_values(name: str, seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        model = holder(MADE[name]())
    assert report.unwritten == []
    report.check()
    assert model


@each_seed
def test_constructors_forget_nothing(seed: int | None) -> None:
    for name, make in ZOO.items():
        with fused(seed=seed, watch=True) as report:
            model = make()
        left = [n for n, t in model.named_parameters() if t.is_meta]
        assert report.unwritten == left, name
        assert model is not None


@each_seed
def test_skipped_initialisation(seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        model = cast(Any, torch).nn.utils.skip_init(nn.Linear, 4, 4)
    assert report.unwritten == ["weight", "bias"]
    with fused(seed=seed, watch=True) as report:
        model = cast(Any, torch).nn.utils.skip_init(nn.Linear, 4, 4)
        torch_init.ones_(model.bias)
    assert report.unwritten == ["weight"]


@each_seed
def test_only_what_a_model_holds_counts(seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        kept = [torch.empty(4, 4), torch.empty(100, 100), nn.Parameter(torch.empty(3))]
        model = nn.Linear(3, 3)
        model.register_buffer("b", torch.empty(3))
        model.register_buffer("n", None)
    assert report.unwritten == ["b"]
    assert statuses(report)["b"] == "unwritten"
    assert kept


@each_seed
def test_an_exception_leaves_its_report(seed: int | None) -> None:
    kept: list[Any] = []
    reports: list[Report] = []

    def half() -> None:
        kept.append(nn.Sequential(nn.Linear(3, 3), holder(torch.empty(3))))
        raise KeyError

    def scope() -> None:
        with fused(seed=seed, watch=True) as report:
            reports.append(report)
            half()

    with pytest.raises(KeyError):
        scope()
    report = reports[0]
    assert report.unwritten == ["1.w"]
    assert statuses(report) == {"0.weight": "written", "0.bias": "written", "1.w": "unwritten"}


@each_seed
def test_temporaries_leave_no_traces(seed: int | None) -> None:
    """Ids of storages come again when tensors die."""
    with fused(seed=seed, watch=True) as report:
        model = nn.Module()
        for i in range(300):
            for _ in range(10):
                torch.empty(5).normal_(), torch.zeros(7), torch.empty(3, 3)
            p = nn.Parameter(torch.empty(5))
            model.register_parameter(f"p{i}", p)
            if i % 3:
                torch_init.normal_(p)
    assert report.unwritten == [f"p{i}" for i in range(0, 300, 3)]
    found = {row.name: len(row.laws) for row in report.rows()}
    assert found == {f"p{i}": min(i % 3, 1) for i in range(300)}


@each_seed
def test_temporaries_of_a_function(seed: int | None) -> None:
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(60)])
    some = set(list(model)[::2])

    def fn(m: Any) -> None:
        for _ in range(30):
            torch.empty(5, 5).normal_(), torch.zeros(25), torch.empty(25)
        if m in some:
            torch_init.normal_(m.weight)

    report = init_model_(model, fn, seed)
    expected = [n for n, _ in model.named_parameters() if "weight" not in n or int(n[:-7]) % 2]
    assert report.unwritten == expected
    assert report.kept == []


# ---- init_model_ and materialize_ ----


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.free = nn.Parameter(torch.ones(3))
        self.large = nn.Parameter(torch.ones(100, 100))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.ones(3))
        self.register_buffer("count", torch.tensor(0), persistent=False)
        self.nothing = nn.Parameter(torch.empty(0))
        self.counts = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
        self.again = self.free


@each_seed
def test_init_model(seed: int | None) -> None:
    model = Mixed()
    report = init_model_(model, seed=seed)
    assert report.unwritten == ["free", "large", "counts"]
    assert report.kept == ["mask", "count"]
    assert report.tied == [("free", "again")]
    assert report.repeated == []
    with pytest.raises(RuntimeError, match="3 tensors were never initialised: free, large, counts"):
        report.check()
    rows = {row.name: row for row in report.rows()}
    expected = {n for n, p in model.named_parameters() if p.numel()}
    assert rows.keys() == expected | {n for n, _ in model.named_buffers()}
    assert {n for n, r in rows.items() if r.status == "kept"} == set(report.kept)
    assert {n for n, r in rows.items() if r.status == "unwritten"} == set(report.unwritten)
    assert all(bool(r.laws) == bool(r.written_by) == (r.status == "written") for r in rows.values())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, row in rows.items():
        assert row.kind == ("parameter" if name in dict(model.named_parameters()) else "buffer")
        assert (row.shape, row.dtype) == (tuple(tensors[name].shape), tensors[name].dtype)
        random = name.startswith("linear") and seed is not None
        assert row.key == (name if random else ""), name
    assert len(re.findall(r" KEPT$", str(report), re.MULTILINE)) == 2
    assert "KEPT: a buffer as it was before" in str(report)
    assert "Tied: free = again" in str(report)


@each_seed
def test_a_function_that_forgets(seed: int | None) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(100, 100), nn.Linear(3, 1))

    def fn(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            torch_init.kaiming_normal_(m.weight)
            if m is not model[1]:
                m.bias.data.zero_()

    report = init_model_(model, fn, seed)
    assert report.unwritten == ["1.bias"]
    init_model_(model, seed=seed).check()


class Computes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 4)
        self.register_buffer("t", torch.arange(4.0) * 2)


@each_seed
def test_materialize(seed: int | None) -> None:
    """Buffers that only a constructor computes stay where they are."""
    model = on_meta(Computes)
    model.extra = nn.Linear(2, 2)
    model.register_buffer("here", torch.ones(2))
    report = quietly(model, seed=seed)
    kept = ["extra.weight", "extra.bias", "here"]
    assert (report.unwritten, report.kept, report.repeated) == (["t"], kept, [])
    assert model.t.is_meta
    with pytest.raises(RuntimeError, match=r"1 tensors were never initialised: t$"):
        report.check()
    found = statuses(report)
    assert {k: found[k] for k in ("l.weight", "l.bias", "t", "here")} == {
        "l.weight": "written",
        "l.bias": "written",
        "t": "unwritten",
        "here": "kept",
    }
    complete = on_meta(lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
    report = materialize_(complete, seed=seed)
    report.check()
    assert set(statuses(report).values()) == {"written"}
    assert len(report.rows()) == 4


@each_seed
def test_materialize_single_elements(seed: int | None) -> None:
    """nn.BatchNorm1d.num_batches_tracked, or the bias of nn.Linear(3, 1)."""
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(3)))
    report = materialize_(model, seed=seed)
    assert report.kept == []
    assert set(statuses(report).values()) == {"written"}
    assert len(report.rows()) == 7


def test_names_of_what_materialize_left() -> None:
    model = nn.DataParallel(on_meta(Computes))
    report = quietly(model, seed=SEED, prefix="p.")
    assert report.unwritten == ["p.t"]


def test_two_models_materialised_in_a_scope() -> None:
    one, two = on_meta(Computes), on_meta(lambda: nn.Linear(3, 3))
    with fused(watch=True) as report:
        quietly(one)
        quietly(two)
    assert len(report.unwritten) == 1
    with pytest.raises(RuntimeError, match="never initialised"):
        report.check()


def test_one_report_for_nested_scopes() -> None:
    model = nn.Linear(3, 3)
    with fused(watch=True) as report:
        inner = init_model_(model)
        assert inner is report
        other = holder(torch.empty(3))
    assert report.unwritten == ["w"]
    assert other


def test_check_without_a_capture() -> None:
    """check() must not pass where nobody has looked."""
    with FakeTensorMode():
        model = linear(3)
        report = init_model_(model, lambda m: None)
    assert report.reason
    with pytest.raises(RuntimeError, match="dispatch mode"):
        report.check()


# ---- what is not a plain tensor ----


ODD: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(3).to_sparse().mul_(2),
    "csr": lambda: torch.eye(3).to_sparse_csr().mul_(2),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]).mul_(2),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8).fill_(1),
    "meta": lambda: torch.ones(3, device="meta").mul_(2),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj().mul_(2),
    "no memory": lambda: torch.ones(3).untyped_storage().resize_(0),
    "vmap": lambda: torch.vmap(lambda x: x.clone().mul_(2))(torch.ones(3)),
    "grad": lambda: torch.func.grad(lambda x: x.clone().mul_(2).sum())(torch.ones(3)),
    "functional": lambda: torch.func.functionalize(lambda x: x.clone().mul_(2))(torch.ones(3)),
    "sparse zeros": lambda: torch.zeros(3, 3, layout=torch.sparse_coo),
    "complex": lambda: torch.full((3,), 1j),
    "symbolic": lambda: torch.zeros(torch.Size([3, 0, 4])).mul_(2),
}


@each_seed
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors(name: str, seed: int | None) -> None:
    """The audit does not stand in the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ODD[name]()
        with fused(seed=seed, watch=True) as report:
            kept = ODD[name]()
        str(report)
    assert kept is not None
