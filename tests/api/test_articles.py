# SPDX-License-Identifier: BSD-3-Clause
"""What tutorials on weight initialisation do, only with `import fastinit as init`."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.init as torch_init
from torch import nn

import fastinit as init
from tests.support.models import model_state


class FirstNet(nn.Module):
    """Initialises some of its layers itself, in __init__."""

    def __init__(self, init: ModuleType) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

        init.kaiming_normal_(self.fc1.weight, mode="fan_in", nonlinearity="relu")
        init.kaiming_normal_(self.fc2.weight, mode="fan_in", nonlinearity="relu")
        init.xavier_normal_(self.fc3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        return torch.sigmoid(self.fc3(F.relu(self.fc2(F.relu(self.fc1(x))))))


class DigitNet(nn.Module):
    """The four-layer network for 28 x 28 digits, with the choice of the initial law left open."""

    def __init__(self, weight: Any = None, bias: Any = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)
        for layer in [self.conv1, self.conv2, self.fc1, self.fc2]:
            if weight is not None:
                weight(layer.weight)
            if bias is not None:
                bias(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x.view(-1, 4 * 4 * 50)))), dim=1)


def assert_equal_models(expected: nn.Module, found: nn.Module) -> None:
    first, second = model_state(expected), model_state(found)
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = torch.equal(value, second[key]) if torch.is_tensor(value) else value == second[key]
        assert same, key


def both(build: Any) -> None:
    """build(module of functions) -> model: the same model and the same randomness afterwards."""
    results = []
    for functions in (torch_init, init):
        torch.manual_seed(2021)
        results.append((build(functions), torch.rand(7)))
    assert_equal_models(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_single_layer() -> None:
    def build(init: ModuleType) -> nn.Module:
        layer_1 = nn.Linear(5, 2)
        init.uniform_(layer_1.weight, -1 / math.sqrt(5), 1 / math.sqrt(5))
        init.normal_(layer_1.weight, 0, 1 / math.sqrt(5))
        return layer_1

    both(build)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xavier_uniform_", {}),
        ("xavier_normal_", {}),
        ("kaiming_uniform_", {"mode": "fan_in", "nonlinearity": "relu"}),
        ("kaiming_normal_", {"mode": "fan_in", "nonlinearity": "relu"}),
    ],
)
def test_a_convolution(name: str, options: dict[str, str]) -> None:
    def build(init: ModuleType) -> nn.Module:
        conv_layer = nn.Conv2d(1, 4, (2, 2))
        returned = getattr(init, name)(conv_layer.weight, **options)
        assert returned is conv_layer.weight
        return conv_layer

    both(build)


def test_inside_the_constructor() -> None:
    both(FirstNet)
    output = FirstNet(init)(torch.zeros(2, 3, 32, 32))
    assert output.shape == (2, 10)


def test_applied_to_the_whole_network() -> None:
    def build(init: ModuleType) -> nn.Module:
        def init_weights(m: nn.Module) -> None:
            if type(m) is nn.Linear:
                init.xavier_uniform_(m.weight)
                m.bias.data.fill_(0.01)

        net = FirstNet(init)
        net.apply(init_weights)
        return net

    both(build)


def test_applied_at_once() -> None:
    """The one line that makes it one pass."""

    def init_weights(m: nn.Module) -> None:
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            torch_init.xavier_uniform_(m.weight)
            m.bias.data.fill_(0.01)

    results = []
    for fast in (False, True):
        torch.manual_seed(7)
        net = FirstNet(init)
        before = init.core.kernels.native_fills
        _ = init.init_model_(net, init_weights) if fast else net.apply(init_weights)
        results.append((net, torch.rand(7)))
    assert init.core.kernels.native_fills >= before + 2  # fc1 and fc2: the others are small
    assert_equal_models(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_with_the_old_name() -> None:
    def build(init: ModuleType) -> nn.Module:
        def init_weights(m: nn.Module) -> None:
            if type(m) is nn.Linear:
                init.xavier_uniform(m.weight)

        return FirstNet(init).apply(init_weights)

    with pytest.warns(FutureWarning, match="deprecated in favor of `nn.init.xavier_uniform_`"):
        both(build)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (("constant_", (0,)), ("constant_", (0,))),
        (("constant_", (1,)), ("constant_", (1,))),
        (("ones_", ()), ("zeros_", ())),
        (("uniform_", ()), ("zeros_", ())),
        (("normal_", ()), ("zeros_", ())),
        (("xavier_uniform_", ()), ("zeros_", ())),
        (("xavier_normal_", ()), None),
        (("kaiming_uniform_", ()), None),
        (("kaiming_normal_", ()), None),
        (("orthogonal_", ()), ("zeros_", ())),
        (("xavier_uniform_", (init.calculate_gain("relu"),)), ("normal_", (0, 0.01))),
    ],
    ids=str,
)
@pytest.mark.usefixtures("own_factors")
def test_a_list_of_layers(weight: Any, bias: Any) -> None:
    def build(init: ModuleType) -> nn.Module:
        def law(choice: Any) -> Any:
            return choice and (lambda t: getattr(init, choice[0])(t, *choice[1]))

        return DigitNet(law(weight), law(bias))

    both(build)


def test_the_default_of_the_layers() -> None:
    """Fans and bounds as nn.Linear and nn.Conv2d compute them in reset_parameters."""

    def build(init: ModuleType) -> nn.Module:
        net = DigitNet()
        for layer in [net.conv1, net.conv2, net.fc1, net.fc2]:
            init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            fan_in = layer.weight[0].numel()
            init.uniform_(layer.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        return net

    both(build)
    torch.manual_seed(2021)
    DigitNet()  # draws what is then drawn a second time
    state = torch.get_rng_state()
    again = DigitNet()
    init.init_model_(again)
    torch.set_rng_state(state)
    DigitNet()
    expected = DigitNet()
    for first, second in zip(expected.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


def test_formulas_of_the_articles() -> None:
    """The laws are what the texts say: bounds and deviations from fan_in and fan_out."""
    weight = torch.empty(500, 800)
    bound = math.sqrt(6 / (800 + 500))
    assert init.xavier_uniform_(weight).abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert init.xavier_normal_(weight).std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    bound = math.sqrt(2) * math.sqrt(3 / 800)
    init.kaiming_uniform_(weight, nonlinearity="relu")
    assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 500), rel=0.01)
    init.orthogonal_(weight)
    assert torch.allclose(weight @ weight.t(), torch.eye(500), atol=1e-5)
