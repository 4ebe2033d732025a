# SPDX-License-Identifier: BSD-3-Clause
"""materialize_: functions that replace, models that are partly real, fused(), other libraries."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit.core import recording
from tests.support.compare import assert_equal_seen, bits
from tests.support.materialize import Holder, assert_materialized, materialize_
from tests.support.models import ZOO, model_state, on_meta, reset

pytestmark = pytest.mark.usefixtures("large_from_4096")

# ---- functions that replace what they are given ----


def test_parameters_that_are_replaced() -> None:
    """Also by what is on meta: that was the function's wish."""

    def fn(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            m.weight = nn.Parameter(torch.full((4, 4), 2.0))
            m.bias = nn.Parameter(torch.empty(4, device="meta"))

    model = on_meta(lambda: nn.Linear(4, 4))
    materialize_(model, fn=fn)
    assert (model.weight == 2).all()
    assert model.bias.is_meta


def test_data_that_is_set(native: None) -> None:
    """Many, so that memory is used again."""

    def fn(m: nn.Module) -> None:
        for p in m.parameters(recurse=False):
            p.data = torch.full(p.shape, 2.0)

    assert_materialized(lambda: nn.Sequential(*[nn.Linear(3, 3) for _ in range(30)]), fn)


def test_names_that_are_deleted_and_added() -> None:
    def fn(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            del m.weight
            m.extra = nn.Parameter(torch.ones(2))
            m.bias.data.zero_()

    model = materialize_(on_meta(lambda: nn.Linear(4, 4)), fn=fn)
    assert {n: p.tolist() for n, p in model.named_parameters()} == {
        "bias": [0, 0, 0, 0],
        "extra": [1, 1],
    }


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign: bool) -> None:
    state = nn.Linear(4, 3).state_dict()
    model = on_meta(lambda: nn.Linear(4, 3))
    materialize_(model, fn=lambda m: m.load_state_dict(state, assign=assign))
    assert torch.equal(model.weight, state["weight"])
    assert torch.equal(model.bias, state["bias"])


# ---- models that are partly real ----


class PartlyReal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(80, 70, device="cpu")
        self.norm = nn.BatchNorm1d(70, device="cpu")
        self.head = nn.Linear(70, 60, device="meta")


def test_real_tensors_are_the_same_objects() -> None:
    model = PartlyReal()
    named = [*model.named_parameters(), *model.named_buffers()]
    real = {name: (t, t.data_ptr(), t._version) for name, t in named if not t.is_meta}
    materialize_(model, fn=lambda m: m.reset_parameters() if m is model.head else None)
    for name, (t, address, version) in real.items():
        module, _, attribute = name.rpartition(".")
        assert getattr(model.get_submodule(module), attribute) is t
        assert (t.data_ptr(), t._version) == (address, version)
    assert not model.head.weight.is_meta


def test_real_tensors_keep_their_values() -> None:
    """A trained backbone with a new head: `materialize_(model)` is not to reset the backbone."""
    model = PartlyReal()
    before = {k: v.clone() for k, v in model.state_dict().items() if not v.is_meta}
    materialize_(model)
    assert not model.head.weight.is_meta
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_nothing_on_meta() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    objects = list(model.parameters())
    assert materialize_(model, fn=lambda m: None) is model
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_lazy_modules_are_left_alone(device: str) -> None:
    model = nn.Sequential(nn.LazyLinear(5, device=device), nn.Linear(5, 4, device="meta"))
    lazy = model[0].weight
    materialize_(model, fn=lambda m: m.reset_parameters() if m is model[1] else None)
    assert model[0].weight is lazy
    assert nn.parameter.is_lazy(model[0].weight)
    assert not model[1].weight.is_meta


# ---- blocks, plans, exceptions ----


def test_one_pass(native: None) -> None:
    """The report of the block around it: every element is written once, at the end."""
    model = on_meta(
        lambda: nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 70), nn.Embedding(90, 70))
    )

    def twice(m: nn.Module) -> None:
        reset(m)
        for p in m.parameters(recurse=False):
            torch_init.uniform_(p, -1, 1)

    torch.manual_seed(2)
    with fastinit.fused() as report:
        materialize_(model, fn=twice)
        assert report.written_elements == 0
    elements = sum(p.numel() for p in model.parameters())
    assert (report.written_elements, report.dropped_elements) == (elements, elements)
    assert (report.early, report.at_once_elements) == ([], 0)
    assert len(report.rows()) == len(list(model.parameters()))
    torch.manual_seed(2)
    expected = on_meta(lambda: nn.Sequential(*map(type_of, model)))
    expected.to_empty(device="cpu").apply(twice)
    assert_equal_seen(model_state(expected), model_state(model), "model")


@pytest.mark.parametrize("name", ["trunc_normal_", "kaiming_normal_", "xavier_uniform_", "ones_"])
def test_each_law_waits(name: str) -> None:
    """As it does in init_model_: nothing reads what is filled, so nothing is written early."""

    def fn(m: nn.Module) -> None:
        getattr(torch_init, name)(m.w, *([0.0, 0.02] if name == "trunc_normal_" else []))

    with fastinit.fused() as report:
        model = materialize_(on_meta(lambda: Holder(90, 80)), fn=fn)
        assert (report.early, report.written_elements) == ([], 0)
    assert report.written_elements == model.w.numel()


def type_of(m: nn.Module) -> nn.Module:
    if isinstance(m, nn.Linear):
        return nn.Linear(m.in_features, m.out_features)
    return nn.Embedding(m.num_embeddings, m.embedding_dim)


def test_made_and_read_in_one_block(native: None) -> None:
    seen = []
    for fast in (False, True):
        torch.manual_seed(6)
        if fast:
            with fastinit.fused():
                model = materialize_(on_meta(ZOO["encoder"]))
                total = sum(p.sum() for p in model.parameters())
        else:
            model = on_meta(ZOO["encoder"]).to_empty(device="cpu").apply(reset)
            total = sum(p.sum() for p in model.parameters())
        seen.append({**model_state(model), "total": bits(total), "rng": torch.get_rng_state()})
    assert_equal_seen(seen[0], seen[1], "model")


def test_not_part_of_a_plan() -> None:
    outer = on_meta(lambda: nn.Linear(3, 3))
    old = outer.weight
    with pytest.raises(RuntimeError, match="materialize_ cannot be part of a Plan"):
        fastinit.record(nn.Linear(3, 3), lambda m: materialize_(outer))
    assert outer.weight is old


def raising(m: nn.Module) -> None:
    if isinstance(m, nn.ReLU):
        raise ValueError("enough")
    reset(m)


def three_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(80, 70), nn.BatchNorm1d(70), nn.ReLU(), nn.Linear(70, 90))


def test_exceptions(native: None) -> None:
    """What came before the exception is done, nothing stays active, and it can be done again."""
    seen = []
    for fast in (False, True):
        model = on_meta(three_layers)
        torch.manual_seed(9)
        model = model if fast else model.to_empty(device="cpu")
        run = materialize_ if fast else nn.Module.apply
        with pytest.raises(ValueError, match="enough"):
            run(model, fn=raising)
        seen.append({**model_state(model[:2]), "generator": torch.get_rng_state()})
    assert_equal_seen(seen[0], seen[1], "what came before")
    assert recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch_init.kaiming_uniform_ is fastinit.dispatch.ORIGINALS["kaiming_uniform_"]
    assert any(p.is_meta for p in model.parameters())  # what was not written is not garbage
    before = [bits(p) for p in model[0].parameters()]
    materialize_(model)
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    assert all(map(torch.equal, before, [bits(p) for p in model[0].parameters()]))


def test_bad_arguments_change_nothing() -> None:
    model = on_meta(lambda: nn.Linear(3, 3))
    old = model.weight
    with pytest.raises(RuntimeError):
        materialize_(model, device="nowhere")
    assert model.weight is old
    assert recording.this_thread.recorder is None


def test_old_tensors_and_memory_are_let_go() -> None:
    """Neither the model nor what it held before is kept."""
    model = on_meta(lambda: nn.Linear(80, 70))
    old = weakref.ref(model.weight)
    materialize_(model)
    gc.collect()
    assert old() is None
    new, storage = weakref.ref(model), weakref.ref(model.weight)
    del model
    gc.collect()
    assert new() is None
    assert storage() is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory(python: Callable[..., Any]) -> None:
    """128 MiB of parameters, filled twice over, need little more."""
    done = python(
        """
        import torch, fastinit
        from torch import nn

        def peak():
            with open("/proc/self/status") as lines:
                return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024

        def reset(m):
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
                nn.init.normal_(m.weight, std=0.02)

        def make(n):
            with torch.device("meta"):
                return nn.Sequential(nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False))

        fastinit.materialize_(make(256), fn=reset)
        before = peak()
        model = make(4096)
        fastinit.materialize_(model, fn=reset)
        print(peak() - before)
        """
    )
    assert done.returncode == 0, done.stderr
    assert 120 < float(done.stdout) < 128 + 16


# ---- other libraries that make models on meta ----


@pytest.mark.slow
def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    for include in (False, True):
        seen = []
        for fast in (False, True):
            with accelerate.init_empty_weights(include_buffers=include):
                model = nn.Sequential(
                    nn.Conv2d(3, 80, 5), nn.BatchNorm2d(80), nn.LSTM(70, 64), ZOO["transformer"]()
                )
            assert all(p.is_meta for p in model.parameters())
            torch.manual_seed(8)
            if fast:
                materialize_(model, fn=reset)
            else:
                model.to_empty(device="cpu").apply(reset)
            assert model[2](torch.ones(2, 1, 70))[0].shape == (2, 1, 64)
            values = {k: bits(v) for k, v in model.state_dict().items()}
            seen.append({**values, "generator": torch.get_rng_state()})
        assert_equal_seen(seen[0], seen[1], f"include_buffers={include}")
