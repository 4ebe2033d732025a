# SPDX-License-Identifier: BSD-3-Clause
"""Small models with every peculiarity of parameters, and how to compare two of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from tests.support.compare import F32, F64, assert_equal_seen, attempt, bits, version


def model_state(model: torch.nn.Module) -> dict[str, Any]:
    """Every parameter and buffer, bit by bit, with its version; meta tensors by shape."""
    state: dict[str, Any] = {}
    for kind in ("parameters", "buffers"):
        named = getattr(model, f"named_{kind}")(remove_duplicate=False)
        for name, tensor in named:
            state[f"{name} version"] = version(tensor)
            state[f"{name} leaf"] = (tensor.is_leaf, tensor.requires_grad, tensor.dtype)
            state[name] = tensor.shape if tensor.is_meta else bits(tensor)
    return state


def assert_same_model(
    make: Callable[[], torch.nn.Module],
    fn: Callable[..., Any] | None,
    apply: Callable[[torch.nn.Module, Any], Any],
    *,
    seed: int = 11,
    native: bool = False,
) -> None:
    """Compare `make().apply(fn)` with fastinit's `apply(make(), fn)`, generators included.

    fn gets the module and a torch.Generator of its own; None resets as modules reset themselves.
    """
    seen = []
    for fast in (False, True):
        torch.manual_seed(3)
        model = make()
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed + 1)

        def call(module: torch.nn.Module, g: torch.Generator = generator) -> None:
            if fn is not None:
                fn(module, g)
            elif callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
            elif callable(getattr(module, "_reset_parameters", None)):
                module._reset_parameters()

        count = fastinit.core.kernels.native_fills
        if fast:
            returned, failure, warned = attempt(apply, model, None if fn is None else call)
        else:
            returned, failure, warned = attempt(model.apply, call)
        count = fastinit.core.kernels.native_fills - count
        state = model_state(model)
        state["failure"], state["warnings"] = failure, warned
        state["returned"] = returned is model or isinstance(returned, fastinit.Report)
        state["explicit generator"] = generator.get_state()
        state["default generator"] = torch.get_rng_state()
        state["python"] = getattr(model, "notes", None)
        seen.append(state)
    assert_equal_seen(seen[0], seen[1], "model")
    assert not native or count > 0, "fastinit left all of it to torch"


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def reset(m: nn.Module) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(m, name):
            getattr(m, name)()
            return


def gpt2(m: nn.Module, g: Any) -> None:
    if isinstance(m, nn.Linear):
        torch_init.normal_(m.weight, mean=0.0, std=0.02)
        if m.bias is not None:
            torch_init.zeros_(m.bias)
    elif isinstance(m, nn.Embedding):
        torch_init.normal_(m.weight, mean=0.0, std=0.02)
        if m.padding_idx is not None:
            m.weight.data[m.padding_idx].zero_()


def resnet(m: nn.Module, g: Any) -> None:
    if isinstance(m, nn.Conv2d):
        torch_init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
        torch_init.constant_(m.weight, 1) if m.affine else None
        torch_init.constant_(m.bias, 0) if m.affine else None


def vit(m: nn.Module, g: Any) -> None:
    if isinstance(m, nn.Linear):
        fastinit.trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            fastinit.zeros_(m.bias)
    elif isinstance(m, nn.LayerNorm):
        fastinit.ones_(m.weight)
        fastinit.zeros_(m.bias)


def everything(m: nn.Module, g: torch.Generator) -> None:
    """Every function in turn on every parameter, with both generators."""
    for i, p in enumerate(m.parameters(recurse=False)):
        fastinit.uniform_(p, -0.1, 0.1)
        torch_init.normal_(p, generator=g)
        fastinit.trunc_normal_(p, std=0.5, a=-1.0, b=1.0)
        if p.dim() == 2:
            torch_init.sparse_(p, 0.5, generator=g)
            if p.dtype in (F32, F64) and p.numel() and i % 2:
                fastinit.orthogonal_(p, 1.5)
        if p.dim() >= 2 and p.numel():
            torch_init.xavier_uniform_(p)
            fastinit.kaiming_uniform_(p, a=math.sqrt(5), generator=g)
            p.data[::2].mul_(0.5)


def by_name(m: nn.Module, g: torch.Generator) -> None:
    for name, p in m.named_parameters():  # recursive: children are done again by their parents
        (torch_init.zeros_ if name.endswith("bias") else torch_init.normal_)(p)


class Net(nn.Module):
    """A weight, a bias, an embedding with a padding row, a buffer, and a place for notes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(40, 30))
        self.bias = nn.Parameter(torch.zeros(41))
        self.table = nn.Parameter(torch.zeros(50, 8))
        self.register_buffer("mask", torch.zeros(30, 40))
        self.notes: list[Any] = []


class Tied(nn.Module):
    """A language model's head shares the matrix of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 20, padding_idx=3)
        self.body = nn.Linear(20, 20)
        self.head = nn.Linear(20, 50, bias=False)
        self.head.weight = self.embedding.weight


class Shared(nn.Module):
    """One module at two places is initialised twice."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(13, 13)
        self.one, self.two = nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer)


class Views(nn.Module):
    """Parameters that are windows of one buffer, as flattened optimisers make them."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.zeros(300)
        self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)
        self.a.weight = nn.Parameter(flat[:100].view(10, 10))
        self.b.weight = nn.Parameter(flat[50:150].view(10, 10))  # overlaps the first
        self.b.bias = nn.Parameter(flat[295:298].repeat(4)[:10])


class OnMeta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.there = nn.Linear(8, 8, device="meta")
        self.here = nn.Linear(8, 8)


ZOO: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(17, 5),
    "mlp": lambda: nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10, bias=False)),
    "conv": lambda: nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Conv3d(8, 2, (1, 2, 3))
    ),
    "transposed_conv": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3), nn.ConvTranspose1d(4, 2, 5)
    ),
    "channels_last": lambda: nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last),
    "norms": lambda: nn.Sequential(
        nn.BatchNorm1d(7), nn.BatchNorm2d(8, affine=False), nn.LayerNorm(9), nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.RMSNorm(5),
    ),
    "embeddings": lambda: nn.Sequential(
        nn.Embedding(40, 30, padding_idx=0), nn.Embedding(40, 31),
        nn.EmbeddingBag(9, 4, padding_idx=2),
    ),
    "recurrent": lambda: nn.ModuleList(
        [nn.LSTM(7, 9, 2, bidirectional=True), nn.GRU(3, 5), nn.RNN(4, 4), nn.LSTMCell(5, 6)]
    ),
    "lstm_projection": lambda: nn.LSTM(7, 9, proj_size=4),
    "bilinear_prelu": lambda: nn.Sequential(nn.Bilinear(4, 5, 6), nn.PReLU(3)),
    "attention": lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=8, add_bias_kv=True),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32), 3, enable_nested_tensor=False
    ),
    "decoder_layer": lambda: nn.TransformerDecoderLayer(16, 2, 32),
    "transformer": lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
    "tied": Tied,
    "shared": Shared,
    "views": Views,
    "frozen": lambda: nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)).requires_grad_(False),
    "on_meta": OnMeta,
    "all_meta": lambda: nn.Linear(8, 8, device="meta"),
    "no_parameters": lambda: nn.Sequential(nn.ReLU(), nn.Flatten()),
    "no_elements": lambda: nn.Sequential(nn.Embedding(0, 4), nn.Linear(4, 4)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 7)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 7)),
}  # fmt: skip
