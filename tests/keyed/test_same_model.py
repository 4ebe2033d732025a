# SPDX-License-Identifier: BSD-3-Clause
"""seed=: the same model, whichever of fused, init_model_, materialize_ and Plan.run made it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fastinit
from fastinit import Key, Plan, fused, init_model_, materialize_
from tests.support.compare import BF16, F32, F64
from tests.support.models import ZOO
from tests.support.seeded import (
    ROOT5,
    SEED,
    WAYS,
    State,
    by_fused,
    by_init_model,
    by_materialize,
    by_record,
    differ,
    equal,
    keyed,
    made,
    on_meta,
    seeded,
    state,
    undrawn,
)


def of_module(m: nn.Module, path: str) -> State:
    """What torch's constructors write, by hand."""

    def draw(function: str, name: str, *args: Any) -> None:
        t = getattr(m, name)
        if t is not None:
            found[path + name] = keyed(function, t.shape, *args, name=path + name, dtype=t.dtype)

    found: State = {}
    if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)):
        draw("kaiming_uniform_", "weight", ROOT5)
        bound = 1 / math.sqrt(m.weight[0].numel())
        draw("uniform_", "bias", -bound, bound)
    elif isinstance(m, (nn.Embedding, nn.EmbeddingBag)):
        draw("normal_", "weight")
        if m.padding_idx is not None:
            found[path + "weight"][m.padding_idx] = 0
    elif isinstance(m, (nn.RNNBase, nn.RNNCellBase)):
        bound = 1 / math.sqrt(m.hidden_size)
        for name, _ in m.named_parameters():
            draw("uniform_", name, -bound, bound)
    elif isinstance(m, nn.Bilinear):
        bound = 1 / math.sqrt(m.in1_features)
        draw("uniform_", "weight", -bound, bound)
        draw("uniform_", "bias", -bound, bound)
    elif isinstance(m, nn.MultiheadAttention):
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            draw("xavier_uniform_", name)
        draw("xavier_normal_", "bias_k")
        draw("xavier_normal_", "bias_v")
        found[path + "in_proj_bias"] = torch.zeros_like(m.in_proj_bias)
        found[path + "out_proj.bias"] = torch.zeros_like(m.out_proj.bias)
    return found


def by_hand(model: nn.Module) -> State:
    found: State = {}
    for path, m in list(model.named_modules())[::-1]:  # the outer ones come last
        found.update(of_module(m, f"{path}." if path else ""))
    return found


# fused() makes what constructors make: copies are copies, values of new memory are not reset.
ELSE = {"encoder", "transformer", "tied", "views", "on_meta", "all_meta"}


READ = {"channels_last", "weight_norm", "spectral_norm"}  # while they are made


@pytest.mark.parametrize("smallest", [0, None])
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ELSE | READ])
def test_same_model(name: str, smallest: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if smallest is not None:
        monkeypatch.setattr(fastinit.core.geometry, "MIN_NATIVE", smallest)
    make = ZOO[name]
    model = by_fused(make)
    expected = state(model)
    for way, function in WAYS.items():
        assert differ(expected, state(function(make))) == [], way
    random = by_hand(model)
    assert differ({k: expected[k] for k in random}, random) == []


@pytest.mark.parametrize(
    "name", sorted(n for n in ELSE | READ if "norm" not in n and "meta" not in n)
)
def test_same_model_when_reset(name: str) -> None:
    expected = state(by_init_model(ZOO[name]))
    assert differ(expected, state(by_materialize(ZOO[name]))) == []
    if name != "channels_last":
        assert differ(expected, state(by_record(ZOO[name]))) == []


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("on_meta", "all_meta", "shared")])
def test_rounded_to_bfloat16(name: str) -> None:
    """Each value is that of float32, rounded; except where the model computes with it."""
    expected = state(by_fused(ZOO[name]))
    try:
        torch.set_default_dtype(BF16)
        rounded = state(by_fused(ZOO[name]))
        again = state(by_init_model(ZOO[name]))
    finally:
        torch.set_default_dtype(F32)
    full = state(by_init_model(ZOO[name]))
    computed = {"original0", "_u", "_v"}
    for one, two in ((expected, rounded), (full, again)):
        if name == "spectral_norm" and two is again:
            continue
        short = {k: v.to(two[k].dtype) for k, v in one.items()}
        wrong = differ(short, two)
        assert [k for k in wrong if k.rpartition(".")[2] not in computed] == []


def test_float64_is_another_stream() -> None:
    model = by_fused(lambda: nn.Linear(30, 40, dtype=F64))
    assert equal(cast(Tensor, model.weight), keyed("kaiming_uniform_", (40, 30), ROOT5,
                                                   name="weight", dtype=F64))  # fmt: skip
    assert differ(state(model), state(by_init_model(lambda: nn.Linear(30, 40, dtype=F64)))) == []


def test_seeds() -> None:
    one, two, three = (
        state(by_fused(lambda: nn.Linear(30, 40), seed=s)) for s in (-1, 2**64 - 1, 1)
    )
    assert differ(one, two) == []
    assert differ(one, three) == ["weight", "bias"]


@pytest.mark.parametrize("seed", [1.0, True, "1", 2**64, -(2**63) - 1, torch.tensor(1)], ids=str)
def test_bad_seeds(seed: Any) -> None:
    """Nothing has been done when they are found."""
    error = ValueError if type(seed) is int else TypeError
    model, meta = made(lambda: nn.Linear(3, 3)), on_meta(lambda: nn.Linear(3, 3))
    before = state(model)
    w = torch.zeros(3)
    plan = Plan()
    plan.normal_(w)
    calls: list[Callable[[], Any]] = [
        lambda: fused(seed=seed),
        lambda: init_model_(model, seed=seed),
        lambda: materialize_(meta, seed=seed),
        lambda: plan.run(seed=seed),
        lambda: Key(seed),
    ]
    for call in calls:
        with pytest.raises(error, match="a seed is"):
            call()
    assert differ(before, state(model)) == []
    assert all(p.is_meta for p in meta.parameters())
    assert not w.any()
    assert fastinit.core.recording.this_thread.recorder is None


# ---- models of transformers ----


TEXT = {"vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


HF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "llama": ("LlamaForCausalLM", "LlamaConfig",
              {**TEXT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
               "intermediate_size": 48, "num_key_value_heads": 1}),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
            "num_heads": 2}),
    "vit": ("ViTForImageClassification", "ViTConfig",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 48, "image_size": 16, "patch_size": 8}),
}  # fmt: skip


@pytest.fixture
def quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.slow
@pytest.mark.parametrize("name", HF)
def test_transformers(name: str, quiet: None) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    tr = pytest.importorskip("transformers", reason="transformers is not installed")
    cls, config, settings = HF[name]
    kind, made_of = getattr(tr, cls), getattr(tr, config)(**settings)
    with seeded() as report:
        model = kind._from_config(made_of)
    expected = state(model)
    random = {row.name: row.key for row in report.rows() if row.key}
    assert len(random) > 5
    assert all(key == name for name, key in random.items())  # no running numbers
    assert (report.foreign, report.unwritten) == (set(), [])
    report.check()
    with seeded():
        rounded = kind._from_config(made_of, dtype=BF16)
    short = state(rounded)
    assert differ({k: v.to(short[k].dtype) for k, v in expected.items()}, short) == []
    meta = on_meta(lambda: cast(nn.Module, kind(made_of)))
    with undrawn():
        materialize_(meta, fn=cast(Any, meta)._init_weights, seed=SEED)
    found = state(meta)
    computed = {k for k in expected if k not in found}  # buffers of the constructor
    assert computed <= {n for n, _ in model.named_buffers()}
    assert differ({k: expected[k] for k in found}, found) == []
