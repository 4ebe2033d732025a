# SPDX-License-Identifier: BSD-3-Clause
"""Models of the transformers library, built, loaded, resized, copied, run and saved in fused().

Sizes are such that every model has tensors above and below plan.MIN_NATIVE. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from tests.support import scopes
from tests.support.compare import BF16, F16, F32, F64, assert_equal_seen, bits
from tests.support.marks import slow, slow_but
from tests.support.scopes import Cases, Scope, Variant, compare

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
tr = pytest.importorskip("transformers", reason="transformers is not installed")
hf_init = pytest.importorskip("transformers.initialization", reason="transformers 5 has it")

case = Cases()


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant of compare() in which small tensors are not held back, as users have it."""
    variant = Variant(smallest=fastinit.core.geometry.MIN_NATIVE)
    monkeypatch.setitem(scopes.VARIANTS, "usual", variant)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers reports by logging what is missing in a checkpoint and odd in a config."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


# ---- what to build ----

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    **IDS,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
LLAMA = {**GROUPED, "tie_word_embeddings": True}

# class, config class, settings; the classes are looked up late, each is a module of its own
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 1000, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS},
    ),
    "bert": (
        "BertForPreTraining",
        "BertConfig",
        {**TEXT, "hidden_size": 128, "max_position_embeddings": 64},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 1000, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2}
        | {"num_heads": 4},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama_untied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": False}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 3}),
    "qwen3_next": (  # reads back: log of a uniform_
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**GROUPED, "head_dim": 16, "num_experts": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 32, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, **IDS},
    ),
    "modernbert": (  # trunc_normal_ within three deviations: rejections happen
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**TEXT, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**IMAGE, "image_size": 28, "patch_size": 14}),
    "swin": (
        "SwinModel",
        "SwinConfig",
        {"image_size": 32, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4]}
        | {"window_size": 4},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"image_size": 32, "hidden_sizes": [32, 64], "depths": [1, 2], "num_stages": 2},
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**TEXT, "max_position_embeddings": 32}, "vision_config": IMAGE},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"vocab_size": 1000, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128}
        | {"decoder_ffn_dim": 128, "num_mel_bins": 20, "max_source_positions": 50}
        | {"max_target_positions": 40, "decoder_start_token_id": 1, **IDS},
    ),
    "wav2vec2": (  # weight_norm
        "Wav2Vec2ForPreTraining",
        "Wav2Vec2Config",
        {**TEXT, "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
        | {"num_codevectors_per_group": 32, "codevector_dim": 32, "proj_codevector_dim": 32},
    ),
}


def found(name: str) -> Any:
    """A class of transformers, or a skipped test: image models need a torchvision that loads."""
    try:
        return getattr(tr, name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} is not usable here: {error}")


def config_of(name: str, **changes: Any) -> Any:
    _, config, settings = MODELS[name]
    return found(config)(**{**settings, **changes})


def build(name: str, dtype: torch.dtype | None = None, **changes: Any) -> Any:
    model = found(MODELS[name][0])
    return model._from_config(config_of(name, **changes), **({"dtype": dtype} if dtype else {}))


def seen_of(model: nn.Module) -> tuple[Any, ...]:
    """The model, and what compare() does not see of one: keys, modules and marks on tensors."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    marks = {name: sorted(vars(t).items(), key=repr) for name, t in tensors}
    modules = {
        name: (type(m).__name__, m.training, getattr(m, "_is_hf_initialized", None))
        for name, m in model.named_modules()
    }
    persistent = {name: t.shape for name, t in model.state_dict().items()}
    return model, list(persistent), marks, modules


def assert_same_in_block(function: scopes.Case, variant: str = "inside") -> None:
    count = fastinit.core.kernels.native_fills
    compare(function, variant)
    assert fastinit.core.kernels.native_fills > count, "fused() left all of it to torch"


# ---- built ----


@pytest.mark.parametrize("name", slow_but(MODELS, "gpt2", "qwen3_next", "modernbert"))
@pytest.mark.parametrize("variant", ["inside", *slow(["usual", "mixed"])])
def test_construction(name: str, variant: str) -> None:
    assert_same_in_block(lambda b: seen_of(build(name)), variant)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F16, F64])
@pytest.mark.parametrize("name", ["llama", "bert", "mixtral", "modernbert", "mamba"])
def test_construction_in_another_dtype(name: str, dtype: torch.dtype) -> None:
    for variant in ("usual", "inside"):
        assert_same_in_block(lambda b: seen_of(build(name, dtype)), variant)


@case
def automatic(s: Scope) -> Any:
    causal = tr.AutoModelForCausalLM.from_config(config_of("llama"))
    bare = tr.AutoModel.from_config(config_of("bert"), dtype=BF16)
    return seen_of(causal), seen_of(bare)


@case
def two_models_one_dropped(s: Scope) -> Any:
    """The memory of the first is free for the second while fills are pending."""
    build("gpt2")
    return seen_of(build("gpt2"))


@case
def default_dtype(s: Scope) -> Any:
    torch.set_default_dtype(BF16)
    try:
        return seen_of(tr.LlamaForCausalLM(config_of("llama")))
    finally:
        torch.set_default_dtype(F32)


@case
def weights_again(s: Scope) -> Any:
    """As transformers' Trainer does for a fresh head: the same modules initialised twice."""
    model = build("bert")
    model.apply(model._init_weights)
    return seen_of(model)


@case
def a_seed_per_model(s: Scope) -> Any:
    tr.set_seed(5)
    first = build("llama")
    tr.set_seed(5)
    return seen_of(first), seen_of(build("llama")), torch.get_rng_state()


# ---- changed and used before the block ends ----


@case
def resized_embeddings(s: Scope) -> Any:
    """By default new rows are drawn from a normal with the mean and covariance of the old ones."""
    results = []
    for name in ("llama", "t5", "bert"):
        model = build(name)
        model.resize_token_embeddings(1100, mean_resizing=name != "t5")
        results.append(seen_of(model))
    return results


@case
def converted(s: Scope) -> Any:
    return [
        seen_of(build("llama").bfloat16()),
        seen_of(build("bert").half()),
        seen_of(build("gpt2").to(F64)),
    ]


@case
def copied(s: Scope) -> Any:
    model = build("t5")
    twin = copy.deepcopy(model)
    nn.init.normal_(model.shared.weight)
    return seen_of(model), seen_of(twin)


@case
def logits(s: Scope) -> Any:
    ids = torch.arange(24).view(2, 12) % 50
    text = [build(name).eval()(ids).logits for name in ("gpt2", "llama", "mixtral")]
    image = build("vit").eval()(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).logits
    return [x.detach() for x in (*text, image)]


@case
def generated(s: Scope) -> Any:
    model = build("llama").eval()
    ids = torch.arange(5)[None] + 7
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6), model


@case
def a_step_of_training(s: Scope) -> Any:
    """Dropout and gradients of tensors whose fills were pending; then a step of the optimizer."""
    model = build("gpt2").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ids = torch.arange(24).view(2, 12) % 50
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return seen_of(model)


@case
def new_head(s: Scope) -> Any:
    model = build("bert")
    model.cls.predictions.decoder = nn.Linear(128, 1000)
    model.tie_weights()
    model.bert.encoder.layer[1] = copy.deepcopy(model.bert.encoder.layer[0])
    return seen_of(model)


@pytest.mark.parametrize("name", slow_but(case, "copied", "default_dtype", "a_step_of_training"))
@pytest.mark.parametrize("variant", ["inside", *slow(["usual"])])
def test_case(name: str, variant: str) -> None:
    assert_same_in_block(case[name], variant)


# ---- without memory, or without values, at first ----


def start_again(model: Any) -> Any:
    """All weights of a model whose memory holds nothing yet."""
    for part in (*model.modules(), *model.parameters(), *model.buffers()):
        part._is_hf_initialized = False
    model.tie_weights()
    model.initialize_weights()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "modernbert"])
def test_no_init_weights(name: str) -> None:
    def without(s: Scope) -> Any:
        with hf_init.no_init_weights():
            model = build(name)
        return seen_of(start_again(model))

    for variant in ("usual", "inside"):
        assert_same_in_block(without, variant)


@pytest.mark.parametrize("name", slow_but(["llama", "bert", "t5", "vit"], "llama"))
def test_meta_and_to_empty(name: str) -> None:
    def from_meta(s: Scope) -> Any:
        with torch.device("meta"):
            model = build(name)
        on_meta = seen_of(copy.deepcopy(model))
        return seen_of(start_again(model.to_empty(device="cpu"))), on_meta

    for variant in ("usual", "inside"):
        assert_same_in_block(from_meta, variant)


@pytest.mark.slow
@pytest.mark.parametrize("include_buffers", [False, True])
def test_accelerate_empty_weights(include_buffers: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def empty(s: Scope) -> Any:
        with accelerate.init_empty_weights(include_buffers=include_buffers):
            models = [build("llama"), build("bert")]
        return [seen_of(start_again(m.to_empty(device="cpu"))) for m in models]

    assert_same_in_block(empty)


# ---- loaded and saved ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(2)
    build("llama").save_pretrained(folder)
    return folder


def loaded(checkpoint: Path, model: str = "LlamaForCausalLM", **options: Any) -> Any:
    options["output_loading_info"] = True
    model_loaded, info = found(model).from_pretrained(checkpoint, **options)
    return seen_of(model_loaded), {key: sorted(map(str, value)) for key, value in info.items()}


LOADS: dict[str, dict[str, Any]] = {
    "a layer is missing": {"num_hidden_layers": 3},
    "a layer too many": {"num_hidden_layers": 1},
    "its head is missing": {"model": "LlamaForSequenceClassification", "num_labels": 70},
    "another vocabulary": {"vocab_size": 1100, "ignore_mismatched_sizes": True},
    "wider": {"intermediate_size": 160, "ignore_mismatched_sizes": True, "num_hidden_layers": 3},
    "untied": {"tie_word_embeddings": False},
    "in bfloat16": {"num_hidden_layers": 3, "dtype": BF16},
}


@pytest.mark.parametrize("name", slow_but(LOADS, "a layer is missing"))
def test_from_pretrained(name: str, checkpoint: Path) -> None:
    for variant in ("usual", "inside"):
        compare(lambda b: loaded(checkpoint, **LOADS[name]), variant)


@pytest.mark.slow
def test_from_pretrained_that_fails(checkpoint: Path) -> None:
    def mismatched(s: Scope) -> Any:
        s.notes.append(build("bert"))  # what was made before has its values
        s.raises = True
        return loaded(checkpoint, vocab_size=1100)

    assert_same_in_block(mismatched)


@pytest.mark.slow
def test_saved_inside(tmp_path: Path) -> None:
    """safetensors and pickle read memory behind torch's back."""

    def saved(s: Scope) -> Any:
        model = build("t5")
        model.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        files = sorted(tmp_path.glob("*.safetensors"))
        assert files
        contents = {p.name: np.frombuffer(p.read_bytes(), np.uint8) for p in files}
        again = tr.T5ForConditionalGeneration.from_pretrained(tmp_path)
        return contents, torch.load(tmp_path / "state.pt"), seen_of(again)

    for variant in ("usual", "inside"):
        assert_same_in_block(saved, variant)


# ---- fastinit's other ways in ----


def values(model: nn.Module) -> dict[str, Any]:
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    seen: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, t in named:
        seen[f"{name} kind"] = (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
        seen[f"{name} is"] = first.setdefault(id(t), name)
        seen[name] = bits(t)
    seen["generator"] = torch.get_rng_state()
    return seen


def assert_same_models(make: dict[bool, Callable[[], Any]], what: str) -> None:
    """make[True] uses fastinit, make[False] does not; both start from one seed."""
    seen = []
    for fast in (False, True):
        torch.manual_seed(3)
        seen.append(values(make[fast]()))
    assert_equal_seen(seen[0], seen[1], what)


@pytest.mark.parametrize("name", ["t5", *slow(["llama", "bert", "vit", "modernbert"])])
def test_materialize(name: str, native: None) -> None:
    """_init_weights writes every parameter and buffer of these models: nobody is warned."""

    def on_meta() -> Any:
        with torch.device("meta"):
            return build(name)

    def eager() -> Any:
        model = on_meta().to_empty(device="cpu")
        model.tie_weights()
        return model.apply(model._init_weights)

    def fast() -> Any:
        model = on_meta()
        fastinit.materialize_(model, fn=model._init_weights)
        return model

    assert_same_models({False: eager, True: fast}, name)


@pytest.mark.parametrize("name", ["llama", *slow(["wav2vec2", "modernbert", "whisper"])])
def test_installed(name: str, native: None) -> None:
    """transformers keeps torch's functions from its import and rebinds them while it works."""

    def installed() -> Any:
        fastinit.install()
        try:
            replaced = torch_init.normal_
            model = build(name)
            assert torch_init.normal_ is replaced, "transformers did not put it back"
            return model
        finally:
            fastinit.uninstall()

    assert_same_models({False: lambda: build(name), True: installed}, name)


def test_init_model(native: None) -> None:
    """`_init_weights` through transformers.initialization, over a model made eagerly."""

    def eager() -> Any:
        model = build("bert")
        return model.apply(model._init_weights)

    def fast() -> Any:
        model = build("bert")
        fastinit.init_model_(model, model._init_weights)
        return model

    assert_same_models({False: eager, True: fast}, "bert")


# ---- without fn: initialize_weights, as the library's own constructors end ----

# CLIP's logit_scale and what weight_norm makes of a weight only constructors know.
OWN = [name for name in MODELS if name not in ("clip", "wav2vec2")]


def empty(name: str, how: str) -> Any:
    if how == "meta":
        with torch.device("meta"):
            return build(name)
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    with accelerate.init_empty_weights(include_buffers=how == "accelerate with buffers"):
        model = build(name)
    model.tie_weights()
    return model


@pytest.mark.parametrize("how", ["meta", "accelerate", "accelerate with buffers"])
@pytest.mark.parametrize("name", slow_but(OWN, "llama", "bert"))
def test_own_init_from_meta(name: str, how: str, native: None) -> None:
    """accelerate lets constructors initialise what has no memory, and mark it as initialised."""

    def eager() -> Any:
        model = build(name)
        torch.manual_seed(4)
        return start_again(model)

    def fast() -> Any:
        model = empty(name, how)
        torch.manual_seed(4)
        report = fastinit.materialize_(model)
        report.check()
        assert report.initialised_by[0] == f"{type(model).__name__}.initialize_weights()"
        return model

    assert_same_models({False: eager, True: fast}, name)


@pytest.mark.parametrize("name", slow_but(OWN, "t5"))
def test_own_init_of_a_model_that_is_there(name: str, native: None) -> None:
    def eager() -> Any:
        model = build(name)
        torch.manual_seed(4)
        return start_again(model)

    def fast() -> Any:
        model = build(name)
        torch.manual_seed(4)
        fastinit.init_model_(model)
        return model

    assert_same_models({False: eager, True: fast}, name)


def test_new_head_on_meta(native: None) -> None:
    """What was loaded stays, whatever initialize_weights would do to it."""
    model = build("bert")
    with torch.device("meta"):
        model.cls.predictions.transform.dense = nn.Linear(128, 128)
    before = {n: (p, bits(p)) for n, p in model.named_parameters() if not p.is_meta}
    whole = build("bert")
    torch.manual_seed(4)
    expected = start_again(whole).cls.predictions.transform.dense
    torch.manual_seed(4)
    fastinit.materialize_(model).check()
    for name, (p, value) in before.items():
        assert model.get_parameter(name) is p
        assert torch.equal(bits(p), value)
    found = model.cls.predictions.transform.dense
    assert torch.equal(bits(found.weight), bits(expected.weight))
    assert torch.equal(bits(found.bias), bits(expected.bias))
