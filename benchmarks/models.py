# SPDX-License-Identifier: BSD-3-Clause
"""The models that scope.py builds: small ones, hand-made large ones, and those of libraries.

Each function builds one as users do, with torch.nn.init or the library's own way. A library that
cannot be imported is an ImportError, whatever stopped it.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
from types import ModuleType
from typing import Any

import torch
from harness import of_network, resnet50, transformer
from torch import Tensor, nn
from torch.nn import init

os.environ["HF_HUB_OFFLINE"] = "1"


def library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise
    except Exception as error:
        raise ImportError(f"{name}: {error}") from error


# ---- small ones ----


def linears(count: int, width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def orthogonal(m: nn.Linear, gain: float = math.sqrt(2)) -> nn.Linear:
    init.orthogonal_(m.weight, gain)
    init.constant_(m.bias, 0.0)
    return m


def agent(observed: int = 8, actions: int = 4, width: int = 64) -> nn.Module:
    """Build actor and critic as cleanrl's PPO has them."""

    def head(outputs: int, gain: float) -> nn.Module:
        hidden = [orthogonal(nn.Linear(observed, width)), nn.Tanh()]
        hidden += [orthogonal(nn.Linear(width, width)), nn.Tanh()]
        return nn.Sequential(*hidden, orthogonal(nn.Linear(width, outputs), gain))

    return nn.ModuleDict({"critic": head(1, 1.0), "actor": head(actions, 0.01)})


def policy() -> nn.Module:
    """Build the layers of stable-baselines3's MlpPolicy."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(10)))
    for m in model:
        assert isinstance(m, nn.Linear)
        init.orthogonal_(m.weight, gain=math.sqrt(2))
        m.bias.data.fill_(0.0)
    return model


def many_orthogonal(count: int = 1024, width: int = 64) -> nn.Module:
    return nn.Sequential(*(orthogonal(nn.Linear(width, width)) for _ in range(count)))


def averaged(layers: int = 6, width: int = 1024) -> list[nn.Module]:
    """Build a model and its running average, as those who train with one do."""
    swa_utils = importlib.import_module("torch.optim.swa_utils")
    model = linears(layers, width)
    return [model, swa_utils.AveragedModel(model)]


def ensemble(members: int = 8, width: int = 1000) -> list[Any]:
    """Build an ensemble for torch.func.vmap, as torch's tutorial has it."""
    made = [nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)) for _ in range(8)]
    base = copy.deepcopy(made[0]).to("meta")
    return [base, *made[:members], *torch.func.stack_module_state(made[:members])]


class Attention(nn.Module):
    """The parameters of a graph attention layer, filled as PyG fills them."""

    def __init__(self, inputs: int, width: int, heads: int) -> None:
        super().__init__()
        self.lin = nn.Module()
        self.lin.weight = nn.Parameter(torch.empty(heads * width, inputs))
        self.glorot(self.lin.weight)  # PyG's Linear fills itself when it is made
        self.att_src = nn.Parameter(torch.empty(1, heads, width))
        self.att_dst = nn.Parameter(torch.empty(1, heads, width))
        self.bias = nn.Parameter(torch.empty(heads * width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for value in (self.lin.weight, self.att_src, self.att_dst):
            self.glorot(value)
        self.bias.data.fill_(0)

    @staticmethod
    def glorot(value: Tensor) -> None:
        stdv = math.sqrt(6.0 / (value.size(-2) + value.size(-1)))
        value.data.uniform_(-stdv, stdv)


def graph_attention() -> nn.Module:
    return nn.ModuleList([Attention(1433, 64, 8), Attention(512, 64, 8), Attention(512, 7, 1)])


def small_convolutions(width: int = 16, blocks: int = 16) -> nn.Module:
    """Build MBConv blocks (Sandler et al. 2018), widening as EfficientNet-B0 does."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)]
    for block in range(blocks):
        wide, after = 6 * width, width + (16 if block % 2 else 0)
        for convolution in (
            nn.Conv2d(width, wide, 1, bias=False),
            nn.Conv2d(wide, wide, 3, groups=wide, bias=False),
            nn.Conv2d(wide, width // 4, 1),
            nn.Conv2d(width // 4, wide, 1),
            nn.Conv2d(wide, after, 1, bias=False),
        ):
            layers.append(convolution)
            if convolution.bias is None:
                layers.append(nn.BatchNorm2d(convolution.out_channels))
        width = after
    model = nn.Sequential(*layers, nn.Linear(width, 1000))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            init.kaiming_normal_(m.weight, mode="fan_out")
            if m.bias is not None:
                init.zeros_(m.bias)
    return model


# ---- large ones, by hand ----


def gpt2(width: int = 768, layers: int = 12) -> nn.Module:
    """Build GPT-2 small from torch's modules, with their own numbers."""
    tables = [nn.Embedding(50257, width), nn.Embedding(1024, width)]
    return nn.Sequential(*tables, *transformer(width, layers=layers), nn.LayerNorm(width))


def vit(width: int = 768) -> nn.Module:
    """Build ViT-B/16 with torch's trunc_normal_: default init, then every Linear again."""
    patches = nn.Conv2d(3, width, 16, stride=16)
    model = nn.Sequential(patches, *transformer(width), nn.LayerNorm(width), nn.Linear(width, 1000))
    model.token = nn.Parameter(torch.zeros(1, 1, width))
    model.positions = nn.Parameter(torch.randn(1, 197, width) * 0.02)
    init.trunc_normal_(model.positions, std=0.02)
    init.normal_(model.token, std=1e-6)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            init.trunc_normal_(m.weight, std=0.02)
            init.zeros_(m.bias)
    return model


def bert(width: int = 768) -> nn.Module:
    """Build BERT-base with every matrix cut at two deviations, as the original has it."""
    tables = [nn.Embedding(n, width) for n in (30522, 512, 2)]
    layers = transformer(width, [width] * 3)
    model = nn.Sequential(*tables, nn.LayerNorm(width), *layers, nn.Linear(width, width))
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            init.trunc_normal_(m.weight, std=0.02, a=-0.04, b=0.04)
        if isinstance(m, nn.Linear):
            init.zeros_(m.bias)
    return model


def resnet() -> nn.Module:
    """Build it as torchvision does."""
    return resnet50().apply(of_network(init))


# ---- those of libraries ----


def from_config(model: str, config: str, **settings: Any) -> nn.Module:
    """Build a model of transformers; the other settings are the config's defaults."""
    transformers = library("transformers")
    transformers.logging.set_verbosity_error()
    dtype = settings.pop("dtype", torch.float32)
    options = getattr(transformers, config)(**settings)
    built = getattr(transformers, model).from_config(options, dtype=dtype)
    assert isinstance(built, nn.Module)
    return built


def llama_1b(dtype: torch.dtype = torch.float32) -> nn.Module:
    return from_config(
        "AutoModelForCausalLM",
        "LlamaConfig",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype=dtype,
    )


def t5_base() -> nn.Module:
    settings = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    return from_config("AutoModelForSeq2SeqLM", "T5Config", **settings)


def of_timm(name: str) -> nn.Module:
    built = library("timm").create_model(name)
    assert isinstance(built, nn.Module)
    return built
