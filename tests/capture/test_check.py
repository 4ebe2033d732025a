# SPDX-License-Identifier: BSD-3-Clause
"""`report.check()`: raises for what nobody has initialised, and says so where it cannot know."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

from fastinit import Report, fused, init_model_, materialize_
from tests.support.reports import SEED, each_seed, on_meta, quietly


class Net(nn.Module):
    """Buffers that only the constructor computes, and some that are reset."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.large = nn.Linear(64, 64), nn.Linear(300, 200)
        self.register_buffer("angles", 1 / torch.arange(1, 33.0))
        self.register_buffer("mask", torch.ones(100, 100).tril(), persistent=False)
        self.inner = nn.Module()
        self.inner.register_buffer("steps", torch.tensor(0))
        self.norm = nn.BatchNorm1d(64)

    def init_weights(self) -> None:
        for m in self.modules():
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()


FORGOTTEN = ["angles", "mask", "inner.steps"]


def raises(report: Report, *names: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{len(names)} tensors were never ini") as error:
        report.check()
    assert str(error.value).partition(": ")[2].split(", ") == list(names)
    assert report.unwritten == list(names)


def emptied() -> Any:
    return on_meta(Net).to_empty(device="cpu")


# ---- after to_empty ----


@each_seed
def test_to_empty_then_init_model(seed: int | None) -> None:
    model = emptied()
    report = init_model_(model, seed=seed)
    raises(report, *FORGOTTEN)
    assert report.kept == []
    report = init_model_(emptied(), seed=seed)
    with pytest.raises(RuntimeError, match="does not exist any more"):
        report.check()


VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "watch": {"watch": True}, "seed": {"seed": 3}}
each_variant = pytest.mark.parametrize("how", VARIANTS.values(), ids=VARIANTS)


@each_variant
def test_to_empty_in_a_block(how: dict[str, Any]) -> None:
    model = on_meta(Net)
    with fused(**how) as report:
        model.to_empty(device="cpu")
        model.init_weights()
    raises(report, *FORGOTTEN)


@each_variant
def test_to_empty_before_a_block(how: dict[str, Any]) -> None:
    model = emptied()
    with fused(**how) as report:
        model.init_weights()
    raises(report, *FORGOTTEN)


@each_variant
def test_a_forgotten_parameter(how: dict[str, Any]) -> None:
    model = emptied()
    with fused(**how) as report:
        model.large.reset_parameters()
    raises(
        report,
        *("lin.weight", "lin.bias", "norm.weight", "norm.bias", *FORGOTTEN),
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
    )


def all_of(model: Any, write: Callable[[Tensor], object]) -> None:
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            write(t)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "fill_": lambda t: t.fill_(1),
    "data": lambda t: t.data.zero_(),
    "copy_": lambda t: t.copy_(torch.ones(t.shape)),
    "data copy_": lambda t: t.data.copy_(torch.ones(t.shape)),
    "set": lambda t: setattr(t, "data", torch.ones(t.shape, dtype=t.dtype)),
    "index": lambda t: t.view(-1).__setitem__(0, 1.0),
    "numpy": lambda t: t.numpy().fill(1) if not t.requires_grad else t.zero_(),
    "init": lambda t: nn.init.ones_(t),
    "init of data": lambda t: nn.init.ones_(t.data),
}


@each_variant
@pytest.mark.parametrize("write", WRITES)
def test_no_false_alarm_in_a_block(write: str, how: dict[str, Any]) -> None:
    model = on_meta(Net)
    with fused(**how) as report:
        model.to_empty(device="cpu")
        all_of(model, WRITES[write])
    report.check()
    model = emptied()
    with fused(**how) as report:
        all_of(model, WRITES[write])
    report.check()


@each_seed
def test_no_false_alarm_of_init_model(seed: int | None) -> None:
    """What was written between, what a function writes, and what a constructor computed."""
    model = emptied()
    model.load_state_dict(Net().state_dict())
    with torch.no_grad():
        model.mask.fill_(1)
    init_model_(model, seed=seed).check()
    model = emptied()

    def fn(m: nn.Module) -> None:
        for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)):
            t.data.zero_()

    init_model_(model, fn, seed).check()
    model = Net()
    report = init_model_(model, seed=seed)
    report.check()
    assert report.kept == FORGOTTEN


@each_seed
def test_a_buffer_that_is_read_is_kept(seed: int | None) -> None:
    model = Net()

    def fn(m: nn.Module) -> None:
        model.mask.clone(), model.mask.to(torch.float64), model.mask.sum()
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()

    report = init_model_(model, fn, seed)
    report.check()
    assert report.kept == FORGOTTEN


@each_seed
def test_to_empty_then_materialize(seed: int | None) -> None:
    """A part that has been emptied before is not on the meta device any more."""
    model = on_meta(Net)
    model.inner.to_empty(device="cpu")
    raises(quietly(model, seed=seed), "angles", "mask", "inner.steps")


# ---- lazy, meta, sharded, subclasses ----


@each_seed
def test_lazy(seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        model = nn.Sequential(nn.LazyLinear(3), nn.Linear(2, 2))
    raises(report, "0.weight", "0.bias")
    with fused(seed=seed, watch=True) as report:
        model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
        model(torch.ones(1, 2))
    report.check()


class Forgets(nn.modules.lazy.LazyModuleMixin, nn.Module):
    """It materialises its buffer, and does not write it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.UninitializedBuffer()

    def initialize_parameters(self, x: Tensor) -> None:
        self.scale.materialize((3,))

    def forward(self, x: Tensor) -> Tensor:
        return x


@each_seed
def test_lazy_and_forgotten(seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        model = Forgets()
        model(torch.ones(3))
    raises(report, "scale")


@each_seed
def test_left_on_meta(seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        model = nn.Sequential(nn.Linear(2, 2), on_meta(lambda: nn.Linear(2, 2, bias=False)))
    raises(report, "1.weight")
    raises(init_model_(model, seed=seed), "1.weight")
    materialize_(model, seed=seed).check()


class Special(nn.Parameter):
    """As vLLM has them."""


@each_seed
@pytest.mark.parametrize("kind", [Special, lambda t: nn.Parameter(TwoTensor(t, t.clone()))])
def test_subclasses(kind: Callable[[Tensor], Any], seed: int | None) -> None:
    with fused(seed=seed, watch=True) as report:
        model = nn.Linear(2, 2)
        model.w = kind(torch.empty(3, 3))
    raises(report, "w")
    with fused(seed=seed, watch=True) as report, torch.no_grad():
        model.w = kind(torch.empty(3, 3))
        model.w.fill_(1)
        model.v = kind(torch.ones(3, 3))
    report.check()


# ---- what a plain block knows ----


def test_a_plain_block_that_never_watched() -> None:
    gc.collect()  # of other tests' models, none may be left that to_empty has made
    with fused() as report:
        model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"nothing was watched.*32,768.*watch=True"):
        report.check()
    assert model


def test_a_plain_block_that_watched_later() -> None:
    """What has a version was written; of the rest nobody can say whether it was made by empty."""
    with fused() as report:
        model = nn.Module()
        model.first = nn.Linear(3, 3)
        model.large = nn.Linear(300, 200)
        model.last = nn.Linear(4, 4)
    report.check()
    with fused() as report:
        model = nn.Module()
        model.large = nn.Linear(300, 200)
        model.forgotten = nn.Parameter(torch.empty(5))
        model.zeros = nn.Parameter(torch.zeros(5))
        model.middle = nn.Parameter(torch.empty(1000))
    with pytest.raises(RuntimeError, match=r"2 tensors may be .*: forgotten, middle; .*watch"):
        report.check()
    assert report.unwritten == []
    with fused() as report:
        model = nn.Module()
        model.large = nn.Linear(300, 200)
        model.forgotten = nn.Parameter(torch.empty(300, 300))
    raises(report, "forgotten")


def test_before_the_end() -> None:
    with fused(watch=True) as report:
        model = nn.Linear(3, 3)
        with pytest.raises(RuntimeError, match="not over"):
            report.check()
        assert report.unwritten == []
        model.w = nn.Parameter(torch.empty(3))
    raises(report, "w")


def test_seed_of_a_model_that_is_there() -> None:
    """Names of a model that was emptied before the block are known in it."""
    values = []
    for order in (1, -1):
        model = emptied()
        with fused(seed=SEED):
            for layer in (model.lin, model.large)[::order]:
                nn.init.normal_(layer.weight)
        values.append(model.lin.weight.detach().clone())
    assert torch.equal(*values)


@pytest.mark.filterwarnings("ignore:DTensor random operators")
@each_seed
def test_sharded(seed: int | None) -> None:
    """Rank 1 of 4, whose part of a parameter, or of a buffer, nobody writes."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))

        def make() -> Any:
            model = on_meta(Net)
            for name in ("weight", "bias"):
                whole = getattr(model.lin, name)
                part = distribute_tensor(whole.detach(), mesh, [Shard(0)])
                setattr(model.lin, name, nn.Parameter(part))
            model.angles = distribute_tensor(model.angles, mesh, [Shard(0)])
            return model

        model = make().to_empty(device="cpu")
        raises(init_model_(model, seed=seed), *FORGOTTEN)
        model = make()
        with fused(seed=seed, watch=True) as report:
            model.to_empty(device="cpu")
            nn.init.ones_(model.lin.bias)
            model.large.reset_parameters(), model.norm.reset_parameters()
        raises(report, "lin.weight", *FORGOTTEN)
    finally:
        dist.destroy_process_group()
