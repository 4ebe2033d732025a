# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): the ways in which real models and tutorials initialise."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.init as torch_init
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastinit
from tests.support.compare import BF16, F16, F64
from tests.support.models import ZOO
from tests.support.scopes import Cases, Scope, compare

case = Cases()


SAVED = {name: getattr(torch_init, name) for name in vars(torch_init) if name.endswith("_")}


# ---- nn.Module and torch.nn.init ----


@case
def modules_of_every_kind(s: Scope) -> Any:
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # elements that are not there
        for name, make in ZOO.items():
            made[name] = make()
    for name in ("linear", "conv", "recurrent", "attention", "tied"):
        for p in made[name].parameters():
            torch_init.normal_(p, std=0.02)
    return made, s.empty(400).zero_()


@case
def gpt_style(s: Scope) -> Any:
    """Defaults, overwritten by apply(), with padding, tied and rescaled."""
    model = s.make(
        lambda: nn.ModuleDict(
            {
                "table": nn.Embedding(50, 24, padding_idx=0),
                "blocks": nn.ModuleList([nn.Linear(24, 24) for _ in range(4)]),
                "norm": nn.LayerNorm(400),
                "head": nn.Linear(24, 50, bias=False),
            }
        )
    )
    model["head"].weight = model["table"].weight

    def reset(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            m.weight.data.normal_(mean=0.0, std=0.02)
            if m.bias is not None:
                m.bias.data.zero_()
        elif isinstance(m, nn.Embedding):
            m.weight.data.normal_(mean=0.0, std=0.02)
            m.weight.data[m.padding_idx].zero_()
        elif isinstance(m, nn.LayerNorm):
            m.bias.data.zero_()
            m.weight.data.fill_(1.0)

    model.apply(reset)
    for i, block in enumerate(model["blocks"]):
        torch_init.normal_(block.weight, mean=0.0, std=0.02 / math.sqrt(2 * (i + 1)))
    return model


@case
def lstm_gates(s: Scope) -> Any:
    lstm = s.make(nn.LSTM, 10, 12, 2, bidirectional=True)
    for name, p in lstm.named_parameters():
        if "bias" in name:
            torch_init.zeros_(p)
            p.data[12:24].fill_(1)
        elif "weight_hh" in name:
            for gate in p.chunk(4):
                torch_init.orthogonal_(gate)
        else:
            torch_init.xavier_uniform_(p[:24])
            torch_init.kaiming_normal_(p.data[24:])
    return lstm


@case
def rescaled(s: Scope) -> Any:
    """muP, fixup, and residual branches."""
    layers = [s.make(nn.Linear, 24, 24) for _ in range(4)]
    with torch.no_grad():
        for depth, layer in enumerate(layers):
            torch_init.kaiming_normal_(layer.weight, a=1, mode="fan_in")
            layer.weight *= 1 / math.sqrt(layer.in_features)
            layer.weight.data.div_(math.sqrt(2.0 * (depth + 1)))
            layer.bias.mul_(0.5)
        layers[-1].weight.zero_()
        layers[0].weight.copy_(torch.where(layers[0].weight > 0, layers[0].weight, 0.1))
        layers[1].weight[:] = layers[1].weight / layers[1].weight.norm(dim=1, keepdim=True)
    return layers


@case
def every_function_of_init(s: Scope) -> Any:
    made: dict[str, Any] = {}
    for how, functions in (("now", vars(torch_init)), ("saved", SAVED), ("ours", vars(fastinit))):
        for name, args in (
            *(("uniform_", (-1, 2)), ("normal_", (1, 2)), ("constant_", (3,)), ("ones_", ())),
            *(("zeros_", ()), ("eye_", ()), ("xavier_uniform_", ()), ("xavier_normal_", (2,))),
            *(("kaiming_uniform_", ()), ("kaiming_normal_", (0.1, "fan_out")), ("sparse_", (0.3,))),
            *(("orthogonal_", ()), ("trunc_normal_", ()), ("trunc_normal_", (0, 0.02, -2, 2))),
        ):
            w = s.empty(24, 30).normal_()
            made[f"{how} {name}{args}"] = w
            returned = functions[name](w, *args)
            assert returned is w
            functions[name](w[3:9], *args)
    made["dirac"] = torch_init.dirac_(s.empty(6, 3, 5).normal_(), 2)
    return made


@case
def matrices(s: Scope) -> Any:
    wide, tall, square = s.empty(20, 50), s.empty(50, 20), nn.Parameter(s.empty(30, 30))
    torch_init.orthogonal_(wide, gain=2)
    torch_init.orthogonal_(tall.uniform_(), generator=s.g)
    torch_init.eye_(square)
    square.data[3].uniform_()
    kernel = s.empty(8, 4, 3, 3).normal_()
    torch_init.dirac_(kernel[:4])
    sparse = torch_init.sparse_(s.empty(40, 30), 0.4, std=0.1)
    sparse[:, 3].zero_()
    return wide, tall, square, kernel, sparse, torch_init.orthogonal_(s.empty(5, 4, 3, 3))


# ---- tutorials on weight initialisation ----


class DigitNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 9, 3), nn.Conv2d(9, 16, 3)
        self.fc1, self.fc2 = nn.Linear(16, 50), nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 3, 3)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x.flatten(1)))), dim=1)


@case
def tutorials(s: Scope) -> Any:
    """By isinstance, by data, by functions; with a look at the statistics in between."""

    def by_function(m: nn.Module) -> None:
        if type(m) in (nn.Linear, nn.Conv2d):
            torch_init.xavier_uniform_(m.weight, gain=torch_init.calculate_gain("tanh"))
            m.bias.data.fill_(0.01)

    def by_data(m: nn.Module) -> None:
        if isinstance(m, nn.Conv2d):
            torch_init.kaiming_uniform_(m.weight.data, nonlinearity="relu")
            torch_init.constant_(m.bias.data, 0)
        elif isinstance(m, nn.Linear):
            m.weight.data.normal_(0.0, 1 / m.in_features**0.5)
            m.bias.data.zero_()

    nets = [s.make(DigitNet) for _ in range(3)]
    for net, function in zip(nets, (by_function, by_data)):
        net.apply(function)
    for law in (torch_init.zeros_, torch_init.ones_, torch_init.uniform_, torch_init.normal_):
        for p in nets[2].parameters():
            law(p)
    seen = [nets[2].fc1.weight.mean().item(), nets[2].fc1.weight.std().item()]
    seen.append(nets[2](torch.ones(2, 1, 12, 12)).sum().item())
    torch_init.zeros_(nets[2].fc1.weight)
    return nets, seen


@case
def deprecated_names(s: Scope) -> Any:
    """Their warnings are torch's, and so many."""
    net = s.make(DigitNet)
    torch_init.constant(net.conv1.weight, 0)
    torch_init.xavier_uniform(net.fc1.weight)
    torch_init.kaiming_normal(net.fc2.weight)
    torch_init.orthogonal(net.conv2.weight)
    return net


# ---- what is done to modules ----


@case
def weight_norms(s: Scope) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older two are deprecated
        old = nn.utils.weight_norm(s.make(nn.Linear, 40, 30))
        older = nn.utils.spectral_norm(nn.Linear(30, 20))
    new = parametrizations.weight_norm(nn.Conv1d(20, 6, 5), dim=1)
    spectral = parametrizations.spectral_norm(s.make(nn.Linear, 30, 20), n_power_iterations=3)
    torch_init.normal_(new.parametrizations.weight.original1)
    torch_init.zeros_(old.bias)
    return old, older, new, spectral, spectral.weight, nn.utils.remove_weight_norm(old).weight


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


@case
def parametrized(s: Scope) -> Any:
    layer = parametrizations.orthogonal(s.make(nn.Linear, 20, 30))
    other = nn.Linear(30, 30)
    nn.utils.parametrize.register_parametrization(other, "weight", Symmetric())
    torch_init.normal_(other.parametrizations.weight.original)
    other.weight = torch.empty(30, 30).uniform_()
    with nn.utils.parametrize.cached():
        seen = [layer.weight.sum().item(), other.weight[3].clone()]
    pruned = nn.Linear(40, 30)
    prune.l1_unstructured(pruned, "weight", amount=0.3)
    torch_init.zeros_(pruned.bias)
    return layer, other, seen, pruned


@case
def lazy_modules(s: Scope) -> Any:
    net = s.make(lambda: nn.Sequential(nn.LazyLinear(30), nn.ReLU(), nn.LazyLinear(20)))
    y = net(s.empty(7, 40).normal_())
    torch_init.zeros_(net[2].bias)
    torch_init.normal_(net[0].weight)
    norm = nn.LazyBatchNorm1d()
    return net, y, norm(y), norm, nn.LazyConv1d(6, 3)(torch.ones(1, 9, 30))


@case
def without_memory_first(s: Scope) -> Any:
    skipped = torch.nn.utils.skip_init(nn.Linear, 40, 30)
    for p in skipped.parameters():
        p.data.normal_()
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    net.to_empty(device="cpu")
    for module in net:
        module.reset_parameters()
    net[0].bias.data.fill_(3)
    mask = s.empty(400, dtype=torch.bool).zero_()
    mask[3:].fill_(True)
    return skipped, net, mask


@case
def models_of_other_dtypes(s: Scope) -> Any:
    made = []
    for dtype in (BF16, F16, F64):
        torch.set_default_dtype(dtype)
        try:
            made += [ZOO[name]() for name in ("mlp", "recurrent", "norms", "embeddings")]
        finally:
            torch.set_default_dtype(torch.float32)
        made.append(nn.Linear(40, 30, dtype=dtype))
        torch_init.normal_(made[-1].weight)
    return made, s.empty(3, dtype=F64).zero_()


@case
def patched_functions(s: Scope) -> Any:
    """As transformers keeps loaded parameters from being initialised again."""
    layer, kept = s.make(nn.Linear, 40, 30), s.make(nn.Linear, 40, 30)
    kept.weight.loaded = True

    def guarded(name: str) -> Any:
        def function(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if getattr(tensor, "loaded", False):
                return tensor
            return SAVED[name](tensor, *args, **kwargs)

        return function

    names = ("normal_", "kaiming_uniform_", "trunc_normal_")
    before = {name: vars(torch_init)[name] for name in names}
    try:
        for name in names:
            setattr(torch_init, name, guarded(name))
        for module in (layer, kept):
            module.reset_parameters()
            torch_init.normal_(module.weight, std=0.02)
            torch_init.trunc_normal_(module.weight[3:])
    finally:
        for name, function in before.items():
            setattr(torch_init, name, function)
    return layer, kept


@pytest.mark.usefixtures("own_factors")
@case.each
def test_cases(name: str, variant: str) -> None:
    compare(case[name], variant)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("gpt_style", 4 * 24 * 24 + 2 * 50 * 24),  # defaults of the matrices
        ("lstm_gates", 1),
        ("patched_functions", 1),
        ("weight_norms", 0),
    ],
)
@pytest.mark.usefixtures("own_factors")
def test_fills_are_held_back_and_dropped(name: str, dropped: int) -> None:
    count = fastinit.core.kernels.native_fills
    report = compare(case[name], "inside")
    assert report.recorded_elements > 0
    assert report.written_elements > 0
    assert report.dropped_elements >= dropped
    assert fastinit.core.kernels.native_fills > count
