# SPDX-License-Identifier: BSD-3-Clause
"""Models of other libraries, and torch's own large ones, built in fused(); nothing is downloaded.

transformers has a file of its own.
"""

from __future__ import annotations

import copy
import importlib
import os
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from tests.support import scopes
from tests.support.compare import BF16, F32
from tests.support.marks import slow, slow_but
from tests.support.scopes import Cases, Scope, Variant, compare

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

pytestmark = pytest.mark.usefixtures("large_from_4096")
case = Cases()


def library(name: str) -> Any:
    """A module, or a skipped test."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")


# ---- torch itself ----


@case
def transformer(s: Scope) -> Any:
    return nn.Transformer(64, 4, 2, 2, 96, batch_first=True)


@case
def layers_copied(s: Scope) -> Any:
    """An encoder is deep copies of one layer, which stays as it was; a head is tied afterwards."""
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(64), enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 96), 2)
    for p in encoder.parameters():
        if p.dim() > 1:
            torch_init.xavier_uniform_(p)
    embedding, head = nn.Embedding(200, 64, padding_idx=0), nn.Linear(64, 200)
    head.weight = embedding.weight
    return layer, encoder, decoder, nn.ModuleList([embedding, head])


@case
def encoder_run(s: Scope) -> Any:
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.linspace(-1, 1, 2 * 5 * 64).view(2, 5, 64)
    return encoder.train()(x).detach(), encoder.eval()(x).detach(), encoder


@case
def recurrent(s: Scope) -> Any:
    """A language model as fairseq and AWD-LSTM build it: orthogonal, forget gates at one."""
    lstm = nn.LSTM(64, 80, 2, bidirectional=True)
    for name, p in lstm.named_parameters():
        if name.startswith("weight_hh"):
            torch_init.orthogonal_(p)
        elif name.startswith("weight_ih"):
            torch_init.xavier_uniform_(p)
        else:
            p.data.zero_()
            p.data[80:160].fill_(1)
    return lstm, nn.GRU(64, 80), nn.utils.parametrizations.weight_norm(nn.Linear(80, 90))


@case
def target_network(s: Scope) -> Any:
    """Copies of what is pending: deepcopy, load_state_dict, and an average over both."""
    online = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 70))
    target = copy.deepcopy(online)
    fresh = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 70))
    fresh.load_state_dict(online.state_dict())
    average = torch.optim.swa_utils.AveragedModel(online)
    torch_init.normal_(online[0].weight)
    average.update_parameters(online)
    return online, target, fresh, average


@case
def skipped_init(s: Scope) -> Any:
    linear = nn.utils.skip_init(nn.Linear, 70, 80)
    linear.reset_parameters()
    return linear


@case
def default_dtype(s: Scope) -> Any:
    torch.set_default_dtype(BF16)
    try:
        return nn.Transformer(64, 4, 1, 1, 96), torch.randn(70, 70), nn.Conv2d(16, 32, 3)
    finally:
        torch.set_default_dtype(F32)


# ---- diffusers ----


@case
def diffusers_unet(s: Scope) -> Any:
    return library("diffusers").UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


@case
def diffusers_autoencoder_and_dit(s: Scope) -> Any:
    diffusers = library("diffusers")
    autoencoder = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8, patch_size=2
    )
    ema = diffusers.training_utils.EMAModel(transformer.parameters())
    return autoencoder, transformer, list(ema.shadow_params)


# ---- stable-baselines3 ----


def agent(algorithm: str, environment: str, **options: Any) -> Any:
    sb3 = library("stable_baselines3")
    return getattr(sb3, algorithm)("MlpPolicy", environment, seed=0, device="cpu", **options)


@case
def sb3_ppo(s: Scope) -> Any:
    """orthogonal_ with a gain of its own for every layer; then 16 steps of training."""
    torch.manual_seed(1)
    model = agent("PPO", "CartPole-v1", n_steps=16, batch_size=16, n_epochs=1)
    before = copy.deepcopy(model.policy)
    model.learn(16)
    return before, model.policy, torch.get_rng_state()


@case
def sb3_off_policy(s: Scope) -> Any:
    """Target networks are a second construction and load_state_dict."""
    q = agent("DQN", "CartPole-v1", buffer_size=10)
    sac = agent("SAC", "Pendulum-v1", buffer_size=10)
    return q.policy, sac.policy, q.predict([0.1, 0.2, 0.3, 0.4], deterministic=True)[0]


# ---- lightning ----


class Lit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(70, 80), nn.LayerNorm(80))
        self.head = nn.Linear(80, 70)
        self.register_buffer("mask", torch.tril(torch.ones(70, 70)))

    def reset_parameters(self) -> None:
        for m in (*self.body, self.head):
            m.reset_parameters()


@case
def lightning_fabric(s: Scope) -> Any:
    fabric = library("lightning").Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    with fabric.init_module(empty_init=False):
        full = Lit()
    with fabric.init_module(empty_init=True):
        empty = Lit()
    empty.reset_parameters()
    return full, empty


@case
def lightning_trainer(s: Scope) -> Any:
    lightning = library("lightning")
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **options)
    with trainer.init_module(empty_init=False):
        model = Lit()
    lightning.seed_everything(3, verbose=False)
    return model, Lit(), torch.get_rng_state()


@pytest.mark.parametrize("name", slow_but(case, "transformer", "recurrent", "target_network"))
@pytest.mark.parametrize("variant", ["inside", *slow(["usual"])])
@pytest.mark.usefixtures("own_factors")
def test_case(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Variant(smallest=fastinit.core.geometry.MIN_NATIVE)  # small tensors as users have it
    monkeypatch.setitem(scopes.VARIANTS, "usual", usual)
    count = fastinit.core.kernels.native_fills
    compare(case[name], variant)
    assert fastinit.core.kernels.native_fills > count, "fused() left all of it to torch"
