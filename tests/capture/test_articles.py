# SPDX-License-Identifier: BSD-3-Clause
"""What tutorials on weight initialisation do with torch.nn.init, inside fused(): the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.init as torch_init
from torch import nn

import fastinit
from tests.support.compare import assert_equal_seen
from tests.support.models import model_state

Make = Callable[[], nn.Module]
CASES: dict[str, Make] = {}


def case(make: Make) -> Make:
    CASES[make.__name__] = make
    return make


class DigitNet(nn.Module):
    """The four-layer network of pytorch/examples mnist."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x.view(-1, 800)))), dim=1)


@case
def initialised_in_init() -> nn.Module:
    class Net(DigitNet):
        def __init__(self) -> None:
            super().__init__()
            torch_init.kaiming_normal_(self.fc1.weight, mode="fan_in", nonlinearity="relu")
            torch_init.xavier_normal_(self.fc2.weight)
            self.conv1.bias.data.fill_(0.01)

    return Net()


@case
def applied() -> nn.Module:
    def init_weights(m: nn.Module) -> None:
        if type(m) in (nn.Linear, nn.Conv2d):
            torch_init.xavier_uniform_(m.weight)
            m.bias.data.fill_(0.01)

    return DigitNet().apply(init_weights)


@case
def by_isinstance_with_data() -> nn.Module:
    def init_weights(m: nn.Module) -> None:
        if isinstance(m, nn.Conv2d):
            torch_init.kaiming_uniform_(m.weight.data, nonlinearity="relu")
            torch_init.constant_(m.bias.data, 0)
        elif isinstance(m, nn.Linear):
            m.weight.data.normal_(0.0, 1 / m.in_features**0.5)
            m.bias.data.zero_()

    net = DigitNet()
    net.apply(init_weights)
    return net


@case
def single_layers() -> nn.Module:
    net = DigitNet()
    torch_init.orthogonal_(net.conv1.weight)
    torch_init.constant_(net.conv2.weight, 1)
    torch_init.eye_(net.fc1.weight)
    torch_init.sparse_(net.fc2.weight, sparsity=0.1)
    torch_init.dirac_(net.conv2.weight)
    torch_init.trunc_normal_(net.fc1.weight, std=0.02)
    torch_init.trunc_normal_(net.fc2.weight, std=0.02, a=-0.04, b=0.04)
    return net


@case
def all_zeros_then_ones() -> nn.Module:
    net = DigitNet()
    for law in (torch_init.zeros_, torch_init.ones_, torch_init.uniform_, torch_init.normal_):
        for p in net.parameters():
            law(p)
    return net


@case
def the_old_names() -> nn.Module:
    net = DigitNet()
    torch_init.constant(net.conv1.weight, 0)
    torch_init.xavier_uniform(net.fc1.weight)
    torch_init.kaiming_normal(net.fc2.weight)
    torch_init.orthogonal(net.conv2.weight)
    return net


@case
def a_sequence_of_gains() -> nn.Module:
    net = nn.Sequential(*[nn.Linear(120, 120, bias=i % 2 == 0) for i in range(4)])
    for layer, f in zip(net, ("relu", "tanh", "selu", "leaky_relu")):
        torch_init.xavier_uniform_(layer.weight, gain=torch_init.calculate_gain(f))
    return net


@case
def reads_its_statistics() -> nn.Module:
    net = DigitNet()
    torch_init.kaiming_normal_(net.fc1.weight)
    net.notes = [net.fc1.weight.mean().item(), net.fc1.weight.std().item()]
    net.notes.append(net(torch.ones(2, 1, 28, 28)).sum().item())
    torch_init.zeros_(net.fc1.weight)
    return net


@pytest.mark.parametrize("smallest", [0, 300, None])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("own_factors")
def test_same_network(name: str, smallest: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if smallest is not None:
        monkeypatch.setattr(fastinit.core.geometry, "MIN_NATIVE", smallest)
    seen: list[dict[str, Any]] = []
    for fast in (False, True):
        torch.manual_seed(7)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if fast:
                with fastinit.fused() as report:
                    net = CASES[name]()
            else:
                net = CASES[name]()
        state = model_state(net)
        state["generator"] = torch.get_rng_state()
        state["notes"] = getattr(net, "notes", None)
        state["warnings"] = [(w.category, str(w.message)) for w in caught]
        seen.append(state)
    assert_equal_seen(seen[0], seen[1], name)
    assert report.recorded_elements > 0
    assert report.recorded_elements == report.written_elements + report.dropped_elements
    assert (name == "the_old_names") == bool(seen[1]["warnings"])
