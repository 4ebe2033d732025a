# SPDX-License-Identifier: BSD-3-Clause
"""Whole models on a GPU: constructed in a scope, init_model_, record, materialize_, training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit import init_model_, materialize_
from tests.support.compare import BF16, F16, F32, F64, POISONS, attempt
from tests.support.cuda_gpu import START, At, Gpu, in_scope
from tests.support.marks import slow, slow_but
from tests.support.models import ZOO, Tied

ELSE = At(2**40 + 5, 4)


# ---- models and ways to initialise them ----------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)


class ResNet(nn.Module):
    """As torchvision's initialises itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, bias=False), nn.BatchNorm2d(16))
        self.body = nn.Sequential(*[Residual(16) for _ in range(6)])
        self.fc = nn.Linear(16, 100)
        for m in self.modules():
            resnet(m)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Transformer": lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True),
    "ResNet": ResNet,
    "LSTM": lambda: nn.LSTM(20, 30, 2, bidirectional=True),
    "Embedding": lambda: nn.Sequential(nn.Embedding(100, 24, padding_idx=3), nn.Linear(24, 10)),
    "Tied": Tied,
    **{k: ZOO[k] for k in ("mlp", "conv", "transposed_conv", "channels_last", "norms")},
    **{k: ZOO[k] for k in ("embeddings", "recurrent", "lstm_projection", "bilinear_prelu")},
    **{k: ZOO[k] for k in ("attention", "encoder", "decoder_layer", "shared", "views")},
    **{k: ZOO[k] for k in ("frozen", "no_elements", "weight_norm")},
}
USUAL = ("Transformer", "ResNet", "Embedding", "Tied", "views")
each_model = pytest.mark.parametrize("kind", slow_but(MODELS, *USUAL))


def resnet(m: nn.Module, g: Any = None) -> None:
    if isinstance(m, nn.Conv2d):
        torch_init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) and m.affine:
        torch_init.constant_(m.weight, 1)
        torch_init.constant_(m.bias, 0)


def gpt2(m: nn.Module, g: Any = None) -> None:
    if isinstance(m, nn.Linear):
        torch_init.normal_(m.weight, std=0.02)
        if m.bias is not None:
            torch_init.zeros_(m.bias)
    elif isinstance(m, nn.Embedding):
        torch_init.normal_(m.weight, std=0.02)
        if m.padding_idx is not None:
            m.weight.data[m.padding_idx].zero_()


def vit(m: nn.Module, g: Any = None) -> None:
    for p in m.parameters(recurse=False):
        if p.dim() > 1:
            torch_init.trunc_normal_(p, std=0.02)
        else:
            torch_init.constant_(p, 0.5)


def everything(m: nn.Module, g: Any = None) -> None:
    """Every function in turn on every parameter, with both generators."""
    for p in m.parameters(recurse=False):
        torch_init.uniform_(p, -0.1, 0.1)
        torch_init.normal_(p, generator=g)
        if p.dim() == 2:
            torch_init.sparse_(p, 0.5, generator=g)
        if p.dim() >= 2 and p.numel():
            torch_init.xavier_uniform_(p)
            torch_init.kaiming_uniform_(p, a=math.sqrt(5), generator=g)
            p.data[::2].mul_(0.5)


def reset(m: nn.Module, g: Any = None) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(m, name):
            getattr(m, name)()
            return


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def tensors_of(model: nn.Module) -> list[str]:
    """Those that fills can go to: no counts of batches."""
    named = (*model.named_parameters(), *model.named_buffers())
    return sorted(name for name, t in named if t.is_floating_point())


# ---- in a scope ----------------------------------------------------------------------------------


@each_model
def test_construction_in_a_scope(kind: str, gpu: Gpu) -> None:
    """The fused one comes first, so that it cannot find the other's values in its memory. Layers of
    ten elements wait as well; a row on top of a table comes after it."""
    gpu.place_defaults()
    gpu.dirty()
    with fastinit.fused() as report, gpu.device():
        model = MODELS[kind]()
        assert gpu.launches == [] or kind in ("channels_last", "views", "weight_norm")
    found = gpu.seen_of(model)
    assert "elements" in str(report)
    if kind in ("Transformer", "ResNet", "mlp"):
        assert gpu.launched(len(tensors_of(model)))
        assert report.recorded_elements >= report.written_elements > 0
    if kind in ("Transformer", "ResNet", "mlp", "Embedding", "Tied"):
        assert report.early == []
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        assert sorted(row.name for row in report.rows()) == sorted(names)
    gpu.place_defaults()
    with gpu.device():
        expected = gpu.seen_of(MODELS[kind]())
    gpu.assert_same(expected, found, kind)


@pytest.mark.parametrize("dtype", [BF16, *slow((F64, F16))], ids=str)
@pytest.mark.parametrize("kind", ["ResNet", "Tied", *slow(("Transformer", "LSTM"))])
def test_conversion_in_a_scope(kind: str, dtype: torch.dtype, gpu: Gpu) -> None:
    """Built on the CPU and moved, and built on the GPU and converted."""
    seen = []
    for fused in (True, False):
        gpu.place_defaults()
        gpu.dirty()
        with in_scope(fused):
            moved = MODELS[kind]().to(gpu.here, dtype)
            with gpu.device():
                converted = MODELS[kind]().to(dtype)
        seen.append({f"moved {k}": v for k, v in gpu.seen_of(moved).items()})
        seen[-1] |= gpu.seen_of(converted)
    gpu.assert_same(seen[1], seen[0], kind, drawn=F32)


def test_reads_in_a_scope(gpu: Gpu) -> None:
    seen = []
    for fused in (True, False):
        gpu.place_defaults()
        gpu.dirty()
        gpu.launches.clear()
        with in_scope(fused) as report:
            with gpu.device():
                a, b, c = nn.Linear(60, 50), nn.Linear(50, 40), nn.Linear(40, 30)
            total = b.weight.detach().sum()
            assert not fused or gpu.launched(1)  # nothing but what is read
            torch_init.normal_(b.weight)
            with torch.no_grad():
                c.weight[3:5].mul_(2.0)
                a.bias.copy_(b.bias[0])
            value = a.weight.detach()[7:8, 7].clone()
        seen.append({})
        for i, m in enumerate((a, b, c)):
            seen[-1] |= {f"{i} {k}": v for k, v in gpu.seen_of(m).items()}
        seen[-1] |= {"value": gpu.values(value)}
        assert total.isfinite()
        assert not fused or "sum" in str(report)
    gpu.assert_same(seen[1], seen[0], "reads")


def test_what_a_function_overwrites_is_not_launched(gpu: Gpu) -> None:
    """The numbers of the layers' own initialisation count all the same."""
    seen = []
    for fused in (True, False):
        gpu.place_defaults()
        gpu.launches.clear()
        with in_scope(fused) as report:
            with gpu.device():
                net = MODELS["Embedding"]()
            net.apply(gpt2)
        if fused:
            assert gpu.launched(3, 1)
            assert report.dropped_elements == 2400 + 24 + 240 + 10
            assert report.recorded_elements == report.written_elements + report.dropped_elements
        seen.append(gpu.seen_of(net))
    gpu.assert_same(seen[1], seen[0], "gpt2")


# ---- init_model_ and record ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn", [reset, gpt2, *slow((resnet, vit)), everything], ids=lambda f: f.__name__
)
@each_model
def test_init_model(kind: str, fn: Callable[..., None], gpu: Gpu) -> None:
    seen = []
    for fast in (False, True):
        gpu.place_defaults()
        with gpu.device():
            model = MODELS[kind]()
        poison = 3.0 if kind == "weight_norm" or fn is not reset else POISONS[fast]
        with torch.no_grad():  # a function leaves something as it was
            for t in (*model.parameters(), *model.buffers()):
                t.fill_(-7 if t.dtype is torch.int64 else poison)
        gpu.place_defaults(ELSE)
        g = gpu.generator(At(-1, 4000))
        each = lambda m, g=g: fn(m, g)  # noqa: E731
        _, failure, warned = attempt(init_model_ if fast else nn.Module.apply, model, each)
        seen.append({**gpu.seen_of(model, g), "failure": failure, "warnings": warned})
    gpu.assert_same(seen[0], seen[1], kind)


@pytest.mark.parametrize("dtype", [BF16, *slow((F64, F16))], ids=str)
@pytest.mark.parametrize("kind", ["Transformer", "ResNet", "Embedding", "Tied"])
def test_init_model_is_one_pass(kind: str, dtype: torch.dtype, gpu: Gpu) -> None:
    seen = []
    for fast in (True, False):
        with gpu.device():
            model = MODELS[kind]().to(dtype)
        gpu.place_defaults()
        gpu.launches.clear()
        _ = init_model_(model) if fast else model.apply(reset)
        if fast:  # the row of padding is written after all others; what is tied overwrites it
            assert not gpu.is_gpu or len(gpu.launches) == (2 if kind == "Embedding" else 1)
        seen.append(gpu.seen_of(model))
    gpu.assert_same(seen[1], seen[0], kind)


@pytest.mark.parametrize("fn", [reset, gpt2, *slow((resnet, vit))], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "kind", slow_but([k for k in MODELS if k not in ("weight_norm", "views")], *USUAL)
)
def test_record(kind: str, fn: Callable[..., None], gpu: Gpu) -> None:
    seen = []
    for fast in (False, True):
        gpu.place_defaults()
        with gpu.device():
            model = MODELS[kind]()
        gpu.place_defaults(ELSE)
        before = [p._version for p in model.parameters()]
        made = fastinit.record(model, fn) if fast else None
        assert made is None or [p._version for p in model.parameters()] == before
        for _ in range(3):
            gpu.launches.clear()
            _ = made.run() if made is not None else model.apply(fn)
        seen.append(gpu.seen_of(model))
    if fn is reset and kind in ("Transformer", "LSTM", "mlp", "conv"):
        assert not gpu.is_gpu or len(gpu.launches) == 1
    gpu.assert_same(seen[0], seen[1], kind)


# ---- materialize_ --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, BF16, *slow((F64,))], ids=str)
@pytest.mark.parametrize(
    "kind",
    slow_but([k for k in MODELS if k not in ("weight_norm", "views", "no_elements")], *USUAL),
)
def test_materialize(kind: str, dtype: torch.dtype | None, gpu: Gpu) -> None:
    model = on_meta(MODELS[kind])
    gpu.place_defaults(ELSE)
    gpu.dirty()
    materialize_(model, gpu.here, dtype).check()
    if kind in ("Transformer", "ResNet", "mlp"):
        assert gpu.launched(len(tensors_of(model)))
    found = gpu.seen_of(model, versions=False)
    assert kind != "Tied" or model.head.weight is model.embedding.weight
    model = on_meta(MODELS[kind])
    gpu.place_defaults(ELSE)
    model = (model if dtype is None else model.to(dtype)).to_empty(device=gpu.here)
    if isinstance(model, Tied):  # to_empty takes apart what is tied
        model.head.weight = model.embedding.weight
    gpu.assert_same(gpu.seen_of(model.apply(reset), versions=False), found, kind)


def test_materialize_with_a_function(gpu: Gpu) -> None:
    """As vision transformers initialise themselves."""
    model = on_meta(ZOO["encoder"])
    gpu.place_defaults()
    gpu.dirty()
    materialize_(model, gpu.here, fn=vit)
    assert gpu.launched(len(tensors_of(model)))
    found = gpu.seen_of(model, versions=False)
    gpu.place_defaults()
    expected = on_meta(ZOO["encoder"]).to_empty(device=gpu.here).apply(vit)
    gpu.assert_same(gpu.seen_of(expected, versions=False), found, "vit")


def test_training_goes_the_same_way(gpu: Gpu) -> None:
    losses = []
    for fused in (False, True):
        gpu.place_defaults()
        with in_scope(fused), gpu.device():
            model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        inputs = torch.randn(32, 8, device=gpu.here, generator=gpu.generator(START))
        for _ in range(5):
            optimiser.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[:5] == losses[5:]
