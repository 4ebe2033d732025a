# SPDX-License-Identifier: BSD-3-Clause
"""Models that are sharded inside a scope with a seed have the plain model's numbers, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastinit
from tests.support import gloo

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

SEED = 1


class Net(nn.Module):
    """Sizes that two ranks do and do not divide, some of them large enough to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(501, 40, padding_idx=0)
        self.layers = nn.ModuleList(nn.Linear(40, 301) for _ in range(2))
        self.out = nn.Linear(301, 40)
        self.gates = nn.Parameter(torch.empty(4 * 40, 40))
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.out.weight, std=0.02)
        with torch.no_grad():
            self.layers[1].weight.mul_(0.5)
            for i in range(4):
                nn.init.orthogonal_(self.gates[40 * i : 40 * (i + 1)])


def reset(m: Any) -> None:
    if hasattr(m, "reset_parameters"):
        m.reset_parameters()
    if isinstance(m, Net):
        m.init_weights()


def fsdp(mesh: DeviceMesh) -> nn.Module:
    model = Net()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def from_meta(mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        model = Net()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.apply(reset)
    return model


def tp(mesh: DeviceMesh) -> nn.Module:
    model = Net()
    plan = {"layers.0": ColwiseParallel(), "layers.1": ColwiseParallel(), "out": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def tp_then_reset(mesh: DeviceMesh) -> nn.Module:
    model = tp(mesh)
    model.apply(reset)
    return model


def ddp(mesh: DeviceMesh) -> nn.Module:
    wrapped: nn.Module = nn.parallel.DistributedDataParallel(Net())
    return wrapped


def by_hand(mesh: DeviceMesh) -> nn.Module:
    model = Net()
    for m in model.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            cut = distribute_tensor(p.detach(), mesh, [Shard(p.dim() - 1)])
            setattr(m, name, nn.Parameter(cut))
    return model


def copied_first(mesh: DeviceMesh) -> nn.Module:
    model = copy.deepcopy(Net())
    fully_shard(model, mesh=mesh)
    return model


def existing(mesh: DeviceMesh) -> nn.Module:
    """Stands for a model from before the scope, which is filled there."""
    raise NotImplementedError


BUILDS: dict[str, Callable[[DeviceMesh], nn.Module]] = {
    f.__name__: f
    for f in (fsdp, from_meta, tp, tp_then_reset, ddp, by_hand, copied_first, existing)
}


def whole(t: Any) -> Tensor:
    found: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return found.detach()


def plain(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    with fastinit.fused(seed=SEED):
        model = Net()
    return {name: p.detach().to(dtype) for name, p in model.named_parameters()}


def differing(mesh: DeviceMesh, build: Callable[[DeviceMesh], nn.Module]) -> list[str]:
    """Return what a model does not have in common with one that is not sharded."""
    expected = plain()
    model = fsdp(mesh) if build is existing else None
    with fastinit.fused(seed=SEED) as report:
        if model is None:
            model = build(mesh)
        else:
            model.apply(reset)
    report.check()
    found = {n.removeprefix("module."): whole(p) for n, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    return [name for name, t in expected.items() if not torch.equal(t, found[name])]


def on_ranks(rank: int, ranks: int) -> dict[str, list[str]]:
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(rank)
    return {name: differing(mesh, build) for name, build in BUILDS.items()}


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", BUILDS)
def test_one_rank(name: str, alone: DeviceMesh) -> None:
    assert differing(alone, BUILDS[name]) == []


@pytest.mark.slow
def test_two_ranks() -> None:
    for found in gloo.run(on_ranks, 2, 2):
        assert found == {name: [] for name in BUILDS}
