# SPDX-License-Identifier: BSD-3-Clause
"""Parameters whose slices are filled one by one, and what fills them, for keyed/test_slices.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fastinit

SEED = 3
HIDDEN = 5


class Sliced(nn.Module):
    """Sizes that few numbers of ranks divide."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.empty(4 * HIDDEN, 6))
        self.bias = nn.Parameter(torch.empty(4 * HIDDEN))
        self.experts = nn.Parameter(torch.empty(6, 3, 7))
        self.table = nn.Parameter(torch.empty(8, 9))
        self.step = nn.Parameter(torch.empty(9))
        self.decay = nn.Parameter(torch.empty(7, 4))
        self.phases = nn.Parameter(torch.empty(7, 2, dtype=torch.complex64))


def lstm(m: Any) -> None:
    for gate in m.gates.chunk(4):
        nn.init.orthogonal_(gate)
    m.bias.data.zero_()
    m.bias.data[HIDDEN : 2 * HIDDEN].fill_(1)
    m.bias.data.chunk(4)[3].fill_(2)
    m.bias[:2] = 3
    m.bias[-1] = 4


def lstm_by_views(m: Any) -> None:
    for i in range(4):
        nn.init.orthogonal_(m.gates.view(4, HIDDEN, 6)[i])
    nn.init.uniform_(m.bias)
    m.bias.unflatten(0, (4, -1))[1].fill_(1.0)
    for gate in (m.gates[:HIDDEN], m.gates[HIDDEN:].detach()[:HIDDEN]):
        gate.mul_(0.5).add_(1)


def experts(m: Any) -> None:
    for i in range(6):
        m.experts[i].normal_(std=0.1 * (i + 1))
    m.experts[1].mul_(0.5)
    m.experts[2, 1].zero_()
    m.experts[3:5].clamp_(-0.2, 0.2)
    for i, expert in enumerate(m.experts.data[4:].unbind()):
        nn.init.kaiming_uniform_(expert.t())
        expert[:, 2].fill_(i)


def table(m: Any) -> None:
    m.table.normal_()
    m.table[1:7:2, 2:].uniform_()
    m.table[2] = 7
    m.table[:, 1].fill_(5)
    m.table.t()[3].zero_()
    m.table[5:].copy_(torch.arange(27.0).view(3, 9))
    m.table[0].copy_(torch.tensor(0.25))
    m.table[1:3, :4].copy_(torch.arange(4.0))
    nn.init.eye_(m.table[3:6, 3:6])
    nn.init.xavier_normal_(m.table[6:])
    nn.init.trunc_normal_(m.table[4, 4:7], std=0.5)
    nn.init.sparse_(m.table[:3, 5:], 0.5)


def mamba(m: Any) -> None:
    dt = torch.exp(torch.rand(9) * 3 - 2)
    m.step.copy_(dt + torch.log(-torch.expm1(-dt)))
    m.decay.data.copy_(torch.log(torch.arange(1, 5).float()).repeat(7, 1))


def plain_copies(m: Any) -> None:
    """What is drawn for a parameter has its numbers, sharded or not."""
    m.table.copy_(torch.randn(8, 9))
    m.gates.copy_(torch.empty(20, 6).normal_(std=0.3).mul_(2))
    m.decay[2:].copy_(torch.empty(5, 4).uniform_())
    m.decay[:2].copy_(torch.ones(4))
    m.experts.data.copy_(nn.init.trunc_normal_(torch.empty(6, 3, 7)))
    m.step.copy_(torch.zeros(9, dtype=torch.float64))


def complex_numbers(m: Any) -> None:
    m.phases.normal_()
    m.phases[2:5].uniform_()
    m.phases[5, 1] = 1 + 2j
    m.phases[:, 0].mul_(0.5)


WAYS: dict[str, Callable[[Any], None]] = {
    "lstm": lstm,
    "lstm by views": lstm_by_views,
    "experts": experts,
    "table": table,
    "mamba": mamba,
    "plain copies": plain_copies,
    "complex": complex_numbers,
}


def on_model(way: str) -> Callable[[nn.Module], None]:
    def fn(m: nn.Module) -> None:
        if isinstance(m, Sliced):
            with torch.no_grad():
                WAYS[way](m)

    return fn


def whole(way: str) -> dict[str, Tensor]:
    """The parameters that a way writes, of a model in plain tensors."""
    model = Sliced()
    for p in model.parameters():
        p.data.fill_(13)
    fastinit.init_model_(model, on_model(way), SEED)
    return {n: p.detach() for n, p in model.named_parameters() if not (p == 13).all()}


def cut(model: nn.Module, mesh: DeviceMesh, places: list[Any]) -> nn.Module:
    for name, p in list(model.named_parameters()):
        own = [Shard(s.dim % p.dim()) if type(s) is Shard else s for s in places]
        parameter = distribute_tensor(p.detach(), mesh, own, src_data_rank=None)
        setattr(model, name, nn.Parameter(parameter))
    return model


def rulers(mesh: DeviceMesh, places: list[Any]) -> dict[str, Tensor]:
    """Which elements of the whole a rank holds, as torch cuts it."""
    model = Sliced()
    for p in model.parameters():
        p.data.copy_(torch.arange(p.numel()).view(p.shape))
    return {n: local(p).real.long() for n, p in cut(model, mesh, places).named_parameters()}


def local(t: Any) -> Tensor:
    found: Tensor = t._local_tensor if isinstance(t, DTensor) else t
    return found.detach()
