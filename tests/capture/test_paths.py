# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): the ways in which real models initialise; and that something is held back."""

from __future__ import annotations

import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastinit
from tests.support.blocks import Block, Cases, compare
from tests.support.compare import BF16, F16, F64
from tests.support.models import ZOO

case = Cases()
SAVED = {name: getattr(torch_init, name) for name in vars(torch_init) if name.endswith("_")}


# ---- nn.Module and torch.nn.init ----


@case
def modules_of_every_kind(b: Block) -> Any:
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # elements that are not there
        for name, make in ZOO.items():
            made[name] = make()
    for name in ("linear", "conv", "recurrent", "attention", "tied"):
        for p in made[name].parameters():
            torch_init.normal_(p, std=0.02)
    return made, b.empty(400).zero_()


@case
def gpt_style(b: Block) -> Any:
    """Defaults, overwritten by apply(), with padding, tied and rescaled."""
    model = b.make(
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
def lstm_gates(b: Block) -> Any:
    lstm = b.make(nn.LSTM, 10, 12, 2, bidirectional=True)
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
def rescaled(b: Block) -> Any:
    """muP, fixup, and residual branches."""
    layers = [b.make(nn.Linear, 24, 24) for _ in range(4)]
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
def every_function_of_init(b: Block) -> Any:
    made: dict[str, Any] = {}
    for how, functions in (("now", vars(torch_init)), ("saved", SAVED), ("ours", vars(fastinit))):
        for name, args in (
            *(("uniform_", (-1, 2)), ("normal_", (1, 2)), ("constant_", (3,)), ("ones_", ())),
            *(("zeros_", ()), ("eye_", ()), ("xavier_uniform_", ()), ("xavier_normal_", (2,))),
            *(("kaiming_uniform_", ()), ("kaiming_normal_", (0.1, "fan_out")), ("sparse_", (0.3,))),
            *(("orthogonal_", ()), ("trunc_normal_", ()), ("trunc_normal_", (0, 0.02, -2, 2))),
        ):
            w = b.empty(24, 30).normal_()
            made[f"{how} {name}{args}"] = w
            returned = functions[name](w, *args)
            assert returned is w
            functions[name](w[3:9], *args)
    made["dirac"] = torch_init.dirac_(b.empty(6, 3, 5).normal_(), 2)
    return made


@case
def matrices(b: Block) -> Any:
    wide, tall, square = b.empty(20, 50), b.empty(50, 20), nn.Parameter(b.empty(30, 30))
    torch_init.orthogonal_(wide, gain=2)
    torch_init.orthogonal_(tall.uniform_(), generator=b.g)
    torch_init.eye_(square)
    square.data[3].uniform_()
    kernel = b.empty(8, 4, 3, 3).normal_()
    torch_init.dirac_(kernel[:4])
    sparse = torch_init.sparse_(b.empty(40, 30), 0.4, std=0.1)
    sparse[:, 3].zero_()
    return wide, tall, square, kernel, sparse, torch_init.orthogonal_(b.empty(5, 4, 3, 3))


# ---- truncated normals ----


@case
def truncated_normals(b: Block) -> Any:
    made = []
    for args in ((), (0, 0.02), (0, 1, -2, 2), (0, 0.02, -0.04, 0.04), (1, 1, 0, 5), (0, 1, 3, 4)):
        for dtype in (torch.float32, BF16, F16, F64):
            w = b.empty(20, 30, dtype=dtype).uniform_()
            torch_init.trunc_normal_(w, *args)
            torch_init.trunc_normal_(w[3:5], *args, generator=b.g)
            made += [w, torch.get_rng_state()]
            if dtype is BF16:
                torch_init.trunc_normal_(b.empty(400), *args)
                w[7].zero_()
    return made, torch_init.trunc_normal_(nn.Parameter(b.empty(40, 30)), std=0.02)


def timm_trunc_normal_(w: Tensor, mean: float, std: float, a: float, b: float) -> Tensor:
    def cdf(x: float) -> float:
        return (1.0 + math.erf(x / math.sqrt(2.0))) / 2.0

    with torch.no_grad():
        low, high = cdf((a - mean) / std), cdf((b - mean) / std)
        w.uniform_(2 * low - 1, 2 * high - 1)
        w.erfinv_()
        w.mul_(std * math.sqrt(2.0))
        w.add_(mean)
        w.clamp_(min=a, max=b)
    return w


@case
def truncated_normals_of_timm(b: Block) -> Any:
    layer, w = b.make(nn.Linear, 40, 30), b.empty(1, 50, 24).zero_()
    timm_trunc_normal_(layer.weight, 0, 0.02, -2, 2)
    timm_trunc_normal_(w, 0, 1, -2, 2)
    timm_trunc_normal_(layer.weight[3:5], 0, 1, -2, 2)
    with torch.no_grad():
        timm_trunc_normal_(w[0, 3], 0, 1, -2, 2).mul_(0.02).add_(1)
    return layer, w


# ---- what is done to modules ----


@case
def weight_norms(b: Block) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older two are deprecated
        old = nn.utils.weight_norm(b.make(nn.Linear, 40, 30))
        older = nn.utils.spectral_norm(nn.Linear(30, 20))
    new = parametrizations.weight_norm(nn.Conv1d(20, 6, 5), dim=1)
    spectral = parametrizations.spectral_norm(b.make(nn.Linear, 30, 20), n_power_iterations=3)
    torch_init.normal_(new.parametrizations.weight.original1)
    torch_init.zeros_(old.bias)
    return old, older, new, spectral, spectral.weight, nn.utils.remove_weight_norm(old).weight


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


@case
def parametrized(b: Block) -> Any:
    layer = parametrizations.orthogonal(b.make(nn.Linear, 20, 30))
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
def lazy_modules(b: Block) -> Any:
    net = b.make(lambda: nn.Sequential(nn.LazyLinear(30), nn.ReLU(), nn.LazyLinear(20)))
    y = net(b.empty(7, 40).normal_())
    torch_init.zeros_(net[2].bias)
    torch_init.normal_(net[0].weight)
    norm = nn.LazyBatchNorm1d()
    return net, y, norm(y), norm, nn.LazyConv1d(6, 3)(torch.ones(1, 9, 30))


@case
def without_memory_first(b: Block) -> Any:
    skipped = torch.nn.utils.skip_init(nn.Linear, 40, 30)
    for p in skipped.parameters():
        p.data.normal_()
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    net.to_empty(device="cpu")
    for module in net:
        module.reset_parameters()
    net[0].bias.data.fill_(3)
    mask = b.empty(400, dtype=torch.bool).zero_()
    mask[3:].fill_(True)
    return skipped, net, mask


@case
def models_of_other_dtypes(b: Block) -> Any:
    made = []
    for dtype in (BF16, F16, F64):
        torch.set_default_dtype(dtype)
        try:
            made += [ZOO[name]() for name in ("mlp", "recurrent", "norms", "embeddings")]
        finally:
            torch.set_default_dtype(torch.float32)
        made.append(nn.Linear(40, 30, dtype=dtype))
        torch_init.normal_(made[-1].weight)
    return made, b.empty(3, dtype=F64).zero_()


@case
def patched_functions(b: Block) -> Any:
    """As transformers keeps loaded parameters from being initialised again."""
    layer, kept = b.make(nn.Linear, 40, 30), b.make(nn.Linear, 40, 30)
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


@case.each
@pytest.mark.usefixtures("own_factors")
def test_paths(name: str, variant: str) -> None:
    compare(case[name], variant)


# ---- that all this is not in vain ----


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


@pytest.mark.usefixtures("native")
def test_report() -> None:
    with fastinit.fused() as report:
        w = torch.empty(40, 30).uniform_()
        w.normal_()
        v = torch.empty(400).uniform_()
        del v
    assert report.recorded_elements == 2800
    assert report.dropped_elements == 1600
    assert report.written_elements == 1200
    assert not report.early
    assert str(report)


@pytest.mark.usefixtures("native")
def test_report_of_early_writes() -> None:
    with fastinit.fused() as report:
        w, v = torch.empty(400).uniform_(), torch.empty(400).normal_()
        assert not report.early
        w.sum()
        assert len(report.early) == 1
        w.sum()  # nothing is pending
        assert len(report.early) == 1
        w.zero_()
        v.zero_()
    assert len(report.early) == 1
    assert report.dropped_elements == 400  # of v; the first fill of w was read


def test_small_fills_are_not_held_back() -> None:
    with fastinit.fused() as report:
        torch.empty(fastinit.core.geometry.MIN_NATIVE - 1).normal_()
    assert report.recorded_elements == 0
    with fastinit.fused() as report:
        w = torch.empty(fastinit.core.geometry.MIN_NATIVE)
        w.normal_()
    assert report.recorded_elements == fastinit.core.geometry.MIN_NATIVE


@pytest.mark.usefixtures("native")
def test_nothing_is_held_back_outside() -> None:
    """In another thread, after the block, and in a tensor from before it."""
    before = torch.empty(400)
    with fastinit.fused() as report:
        thread = threading.Thread(target=lambda: torch.empty(400).normal_())
        thread.start()
        thread.join()
        before.normal_()
    torch.empty(400).normal_()
    assert report.recorded_elements == 0


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_what_was_asked_for_is_written_though_the_body_fails(error: type[BaseException]) -> None:
    torch.manual_seed(3)
    expected = torch.empty(400).normal_()
    torch.manual_seed(3)
    with pytest.raises(error), fastinit.fused() as report:  # noqa: PT012
        w = torch.empty(400).normal_()
        raise error
    assert torch.equal(w, expected)
    assert report.written_elements == 400


@pytest.mark.usefixtures("native")
def test_nothing_is_left_behind() -> None:
    """Neither modes nor replaced functions, however often, and however the block ends."""
    owners = (Tensor, torch, torch_init, torch.random, torch.utils.dlpack, torch.UntypedStorage)
    owners += (threading.Thread, ThreadPoolExecutor, np, nn.Module, nn.Parameter, torch.Generator)
    with fastinit.fused():  # what is imported then
        torch.empty(400).normal_()
    before = [dict(vars(owner)) for owner in owners]
    with fastinit.fused(), fastinit.fused():
        torch.empty(400).normal_()
    with pytest.raises(ValueError, match="body"), fastinit.fused():  # noqa: PT012
        torch.empty(400).normal_()
        raise ValueError("body")
    for owner, then in zip(owners, before):
        now = dict(vars(owner))
        changed = [name for name in then.keys() | now.keys() if then.get(name) is not now.get(name)]
        assert not changed, owner
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not torch.overrides._get_current_function_mode_stack()
