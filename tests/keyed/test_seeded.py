# SPDX-License-Identifier: BSD-3-Clause
"""seed=, of fused, init_model_, materialize_ and Plan.run: numbers go by names, whoever asks."""

from __future__ import annotations

import copy
import ctypes
import io
import itertools
import logging
import math
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.init import eye_ as eye_bound_early
from torch.nn.init import kaiming_uniform_ as kaiming_bound_early
from torch.nn.init import trunc_normal_ as trunc_bound_early

import fastinit
from fastinit import Key, Plan, Report, fused, init_model_, materialize_, record
from fastinit.core import laws, work
from fastinit.core.key import derived
from fastinit.cpu import keyed as cpu_keyed
from tests.support.compare import BF16, F16, F32, F64, bits
from tests.support.models import ZOO

SEED = 20240229
ROOT5 = math.sqrt(5)
api: Any = fastinit
of_torch: Any = torch_init
torch_any: Any = torch  # for what has no types

each_size = pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100, 9000])
State = dict[str, Tensor]


@contextmanager
def seeded(seed: int = SEED, **options: Any) -> Iterator[Report]:
    """A block that must leave torch's generator alone."""
    before = torch.get_rng_state()
    with fused(seed=seed, **options) as report:
        yield report
    assert torch.equal(before, torch.get_rng_state()), "torch's generator has moved on"


@contextmanager
def undrawn() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "torch's generator has moved on"


def numbered(label: str, shape: tuple[int, ...], law: laws.Law | None = None) -> Tensor:
    """What nobody's name belongs to."""
    t = torch.empty(shape)
    whole = work.whole(t.numel())
    cpu_keyed.run([work.Work(law or laws.normal(0.0, 1.0), derived(SEED, label), t, whole)])
    return t


def keyed(
    function: str,
    shape: Any,
    *args: Any,
    name: str = "w",
    seed: int = SEED,
    dtype: torch.dtype = F32,
) -> Tensor:
    """By hand."""
    t = torch.empty(shape, dtype=dtype)
    getattr(api, function)(t, *args, generator=Key(seed, name))
    return t


def holder(*shape: int, dtype: torch.dtype = F32, name: str = "w") -> Any:
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.empty(*shape, dtype=dtype)))
    return model


def state(model: nn.Module) -> State:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone() for name, t in named if not t.is_meta}


def differ(a: State, b: State) -> list[str]:
    assert a.keys() == b.keys()
    return [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(bits(a[k]), bits(b[k]))]


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """As others have it before; what it holds does not matter."""
    rng = torch.get_rng_state()
    model = make()
    torch.set_rng_state(rng)
    return model


def by_fused(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    with seeded(**options):
        return make()


def by_init_model(make: Callable[[], nn.Module], fn: Any = None, **options: Any) -> nn.Module:
    model = made(make)
    with undrawn():
        init_model_(model, fn, SEED, **options)
    return model


def by_materialize(make: Callable[[], nn.Module], fn: Any = None, **options: Any) -> nn.Module:
    model = on_meta(make)
    with undrawn():
        materialize_(model, fn=fn, seed=SEED, **options)
    return model


def by_record(make: Callable[[], nn.Module], fn: Any = None, **options: Any) -> nn.Module:
    model = made(make)
    plan = record(model, fn)
    with undrawn():
        plan.run(seed=SEED, **options)
    return model


WAYS = {"init_model_": by_init_model, "materialize_": by_materialize, "record": by_record}


def keys(report: Report) -> dict[str, str]:
    return {row.name: row.key for row in report.rows()}


# ---- the same model, however it is made ----------------------------------------------------------


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


# ---- models of transformers ----------------------------------------------------------------------

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


# ---- names ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, *names: str, size: int = 8) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(size, size))


def test_other_layers_do_not_matter() -> None:
    few = state(by_fused(lambda: Net("a", "b")))
    more = state(by_fused(lambda: Net("x", "b", "y", "a", "z")))
    assert differ(few, {k: more[k] for k in few}) == []
    renamed = state(by_fused(lambda: Net("a", "c")))
    assert not equal(renamed["c.weight"], few["b.weight"])
    assert equal(renamed["a.weight"], few["a.weight"])


def test_names_of_the_end_of_the_block() -> None:
    def grown() -> nn.Module:
        parts = [nn.Linear(4, 4) for _ in range(3)]
        model = nn.Sequential(parts[2], nn.Linear(4, 4), parts[0])
        model[1] = nn.Linear(4, 4)
        outer = nn.Module()
        outer.body = model
        return outer

    plain = state(by_fused(lambda: nn.ModuleDict({"body": nn.Sequential(
        *[nn.Linear(4, 4) for _ in range(3)])})))  # fmt: skip
    assert differ(plain, state(by_fused(grown))) == []


def test_two_models_in_a_block() -> None:
    with seeded() as report:
        one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    assert list(keys(report)) == ["weight", "bias", "~1.weight", "~1.bias"]
    assert equal(one.weight, keyed("kaiming_uniform_", (4, 4), ROOT5, name="weight"))
    assert equal(two.weight, keyed("kaiming_uniform_", (4, 4), ROOT5, name="~1.weight"))


def test_prefix() -> None:
    whole = state(by_fused(lambda: Net("a")))
    alone = by_fused(lambda: nn.Linear(8, 8), prefix="a.")
    assert equal(state(alone)["weight"], whole["a.weight"])
    for way, function in WAYS.items():
        part: Any = function(lambda: nn.Linear(8, 8), prefix="a.")
        assert equal(part.weight, whole["a.weight"]), way
    with seeded(prefix="p.") as report:
        kept = [nn.Linear(3, 3), nn.Linear(3, 3)]
    assert [*keys(report).values()] == ["p.weight", "p.bias", "p.~1.weight", "p.~1.bias"]
    assert kept


def test_reports_have_the_prefix() -> None:
    model = Net("a")
    report = init_model_(model, seed=SEED, prefix="p.")
    assert keys(report) == {"p.a.weight": "p.a.weight", "p.a.bias": "p.a.bias"}


def test_nested_blocks() -> None:
    with seeded(-5) as outer:
        with fused(seed=-5) as inner, fused(seed=2**64 - 5), fused():
            model = Net("a")
        assert inner is outer
    assert differ(state(model), state(by_fused(lambda: Net("a"), seed=-5))) == []
    with seeded(), pytest.raises(RuntimeError, match="a block with a seed"), fused(seed=SEED + 1):
        pass
    with fused(), pytest.raises(RuntimeError, match="a block with a seed"), fused(seed=SEED):
        pass
    meta = on_meta(lambda: nn.Linear(3, 3))
    with fused():
        with pytest.raises(RuntimeError, match="a block with a seed"):
            init_model_(model, seed=SEED)
        with pytest.raises(RuntimeError, match="a block with a seed"):
            materialize_(meta, seed=SEED)
    assert meta.weight.is_meta


def test_prefix_of_a_nested_block() -> None:
    """Names of what the outer block makes have one prefix."""
    refused = pytest.raises(RuntimeError, match="a block with a prefix")
    with seeded(), refused, fused(seed=SEED, prefix="a."):
        pass


@pytest.mark.parametrize("way", ["init_model_", "materialize_"])
def test_in_a_block(way: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 1)))

    expected = state(by_init_model(make))
    model = made(make) if way == "init_model_" else on_meta(make)
    with seeded():
        init_model_(model, seed=SEED) if way == "init_model_" else materialize_(model, seed=SEED)
    assert differ(expected, state(model)) == []


def test_in_a_block_with_prefix() -> None:
    model = made(lambda: nn.Linear(8, 8))
    with seeded():
        init_model_(model, seed=SEED, prefix="a.")
    assert equal(cast(Tensor, model.weight), by_fused(lambda: Net("a")).a.weight)  # type: ignore[union-attr,arg-type]


def test_the_first_model_is_the_first() -> None:
    """Not the one that got the address of a temporary."""
    with seeded() as report:
        gone = [nn.Linear(2, 2) for _ in range(64)]
        ids = {id(m) for m in gone}
        first = nn.Linear(3, 3)
        del gone
        later = [nn.Linear(4, 4) for _ in range(64)]
    assert any(id(m) in ids for m in later)
    assert equal(first.weight, keyed("kaiming_uniform_", (3, 3), ROOT5, name="weight"))
    assert "weight" in keys(report)


def test_garbage_is_no_model() -> None:
    with seeded() as report:
        gone: Any = nn.Linear(2, 2)
        gone.me = [gone]
        del gone
        model = nn.Linear(4, 4)
    assert set(keys(report)) - {""} == {"weight", "bias"}
    assert model


def test_wrappers() -> None:
    checkpoint = pytest.importorskip(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
    ).checkpoint_wrapper
    wrappers: dict[str, Callable[[Any], nn.Module]] = {
        "compile": lambda m: cast(nn.Module, torch.compile(m)),
        "data parallel": nn.DataParallel,
        "checkpoint": checkpoint,
        "all": lambda m: cast(nn.Module, torch.compile(nn.DataParallel(checkpoint(m)))),
        "inside": lambda m: nn.Sequential(checkpoint(m[0]), nn.DataParallel(m[1])),
    }

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    expected = state(by_init_model(make))
    for name, wrap in wrappers.items():
        model = made(make)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of loading the compiler
            wrapped = wrap(model)
        report = init_model_(wrapped, seed=SEED)
        assert differ(expected, state(model)) == [], name
        assert keys(report) == {k: k for k in expected}, name
        fresh = on_meta(make)
        materialize_(wrap(fresh), seed=SEED)
        assert differ(expected, state(fresh)) == [], name


def test_attributes_called_like_wrappers() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self._orig_mod = nn.Linear(3, 3), nn.Linear(3, 3)
            self._fsdp_wrapped_module = nn.Linear(3, 3)
            self._checkpoint_wrapped_module = nn.Linear(3, 3)

    model = Mine()
    assert keys(init_model_(model, seed=SEED)) == {n: n for n, _ in model.named_parameters()}
    values = [p for p in model.parameters() if p.dim() == 2]
    assert not any(equal(a, b) for a, b in itertools.combinations(values, 2))


def test_lists_and_dicts() -> None:
    with seeded() as report:
        model = nn.Module()
        model.l = nn.ParameterList([torch.randn(3), nn.Parameter(torch.randn(2, 2))])
        model.d = nn.ParameterDict({"x": torch.rand(3), "y": torch.randn(2)})
        model.n = nn.ParameterList([nn.ParameterList([torch.randn(2)])])
        model.b = nn.Buffer(torch.randn(3))
        model.register_buffer("hidden", torch.randn(4), persistent=False)
    assert keys(report) == {n: n for n in state(model)}
    for name, value in state(model).items():
        function = "uniform_" if name == "d.x" else "normal_"
        assert equal(value, keyed(function, value.shape, name=name)), name


def test_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 9, bias=False)
            self.b.weight = self.a.weight

    expected = keyed("normal_", (9, 4), name="a.weight")
    expected[2] = 0
    assert equal(by_fused(Tied).a.weight, expected)  # type: ignore[union-attr,arg-type]
    fn = lambda m: torch_init.normal_(m.weight) if hasattr(m, "weight") else None  # noqa: E731
    for way, function in WAYS.items():
        model: Any = function(Tied, fn)
        assert model.a.weight is model.b.weight, way
        assert equal(model.a.weight, keyed("normal_", (9, 4), name="a.weight")), way


def test_lazy() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    init_model_(model, seed=SEED)
    assert nn.parameter.is_lazy(model[0].weight)
    model(torch.ones(2, 3))
    init_model_(model, seed=SEED)
    assert equal(model[0].weight, keyed("kaiming_uniform_", (4, 3), ROOT5, name="0.weight"))
    with seeded():
        lazy: Any = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    assert nn.parameter.is_lazy(lazy[0].weight)


# ---- generators of torch -------------------------------------------------------------------------


@each_size
def test_torchs_generators_are_left_alone(n: int) -> None:
    """Whatever draws: functions, methods, factories; all sizes."""
    g = torch.Generator().manual_seed(3)
    before = g.get_state()
    with seeded() as report:
        w = torch.empty(n)
        for name in ("normal_", "uniform_", "trunc_normal_"):
            getattr(torch_init, name)(w)
            getattr(api, name)(w)
        for name in ("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"):
            getattr(torch_init, name)(torch.empty(n, 3))
        torch_init.orthogonal_(torch.empty(n % 50 + 1, 3))
        torch_init.sparse_(torch.empty(n, 3), 0.3)
        fastinit.orthogonal_batched_(torch.empty(2, 3, 3))
        w.normal_(1, 2).uniform_(-1, 1)
        w[::2].normal_(std=2, mean=1)
        w.new_empty(n).view(1, -1).uniform_(to=2.0)
        for dtype in (F32, F64, BF16, F16):
            torch.rand(n, dtype=dtype), torch.randn((n, 2), dtype=dtype)
            torch.randn_like(w, dtype=dtype), torch.rand_like(w, dtype=dtype)
            torch.empty(n, dtype=dtype).normal_()
        torch.rand(n, 1, requires_grad=True)
        torch.randn(())
        torch.Tensor(n).normal_()
        trunc_bound_early(w)
        kaiming_bound_early(torch.empty(n, 3))
    assert torch.equal(g.get_state(), before)
    assert report.foreign == set()


@each_size
def test_explicit_generators_draw_torchs_numbers(n: int) -> None:
    def draw(g: torch.Generator) -> list[Tensor]:
        w, v = torch.empty(n, 3), torch.empty(n)
        torch_init.normal_(w, generator=g)
        v.uniform_(generator=g)
        x = torch.randn(n, generator=g)
        y = torch_init.trunc_normal_(torch.empty(n, 2), generator=g)
        z = torch_init.kaiming_normal_(torch.empty(2, n), generator=g)
        return [w, v, x, y, z, torch.empty(n).exponential_(generator=g)]

    g, h = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    expected = draw(g)
    with seeded():
        found = draw(h)
    assert all(map(equal, expected, found))
    assert torch.equal(g.get_state(), h.get_state())


def test_both_kinds_in_one_tensor() -> None:
    g, h = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    with seeded():
        model = holder(300, 100)
        torch_init.normal_(model.w)
        model.w.data[100:200].normal_(generator=g)
        model.w.data[:50].uniform_()
    expected = keyed("normal_", (300, 100))
    expected[100:200].normal_(generator=h)
    expected[:50] = keyed("uniform_", (300, 100))[:50]
    assert equal(model.w, expected)


def test_manual_seed_does_not_matter() -> None:
    expected = state(by_fused(lambda: Net("a")))
    with fused(seed=SEED):
        torch.manual_seed(9)
        model = Net("a")
        inside = torch.get_rng_state()
    torch.manual_seed(9)
    assert torch.equal(inside, torch.get_rng_state())  # nothing drawn since
    assert differ(expected, state(model)) == []
    with seeded(), torch.random.fork_rng():
        torch.manual_seed(3)
        model = Net("a")
    assert differ(expected, state(model)) == []


FOREIGN: dict[str, Callable[[], Any]] = {
    "bernoulli_": lambda: torch.empty(3).bernoulli_(),
    "exponential_": lambda: torch.empty(3).exponential_(),
    "randperm": lambda: torch.randperm(5),
    "randint": lambda: torch.randint(5, (3,)),
    "normal": lambda: torch.normal(0.0, 1.0, (3, 3)),
    "random_": lambda: torch.empty(3, dtype=torch.int64).random_(),
    "multinomial": lambda: torch.multinomial(torch.ones(3), 2),
    "randn": lambda: torch.randn(3, dtype=torch.complex64),
}


def test_the_default_generator_by_name() -> None:
    """Of the seed, as in a Plan; or at least listed."""
    with fused(seed=SEED) as report:
        model = holder(5)
        torch_init.normal_(model.w, generator=torch.default_generator)
    assert report.foreign or equal(model.w, keyed("normal_", (5,)))


def test_blocks_of_threads() -> None:
    """Each has its own."""
    out: dict[int, nn.Module] = {}

    def make(seed: int) -> None:
        with fused(seed=seed):
            out[seed] = Net("a", "b")

    threads = [threading.Thread(target=make, args=(i,)) for i in range(6)]
    with undrawn():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in range(6):
        alone = state(by_fused(lambda: Net("a", "b"), seed=seed))
        assert differ(alone, state(out[seed])) == []


# ---- ways to fill a parameter --------------------------------------------------------------------

W = (48, 16)
PARTS: dict[str, Callable[[Tensor], Any]] = {
    "whole": lambda w: [w],
    "two": lambda w: [w[:5], w[5:]],
    "transposed": lambda w: [w.T],
    "chunks": lambda w: w.chunk(3),
    "columns": lambda w: w.chunk(2, 1),
    "strided": lambda w: [w[::2], w[1::2]],
    "flat": lambda w: [w.view(-1)],
    "four dimensions": lambda w: [w.view(4, 12, 4, 4).permute(2, 0, 3, 1)],
    "rows": lambda w: w.unbind(0),
    "narrow": lambda w: [w.narrow(1, 0, 3), w[:, 3:]],
    "odd": lambda w: [w.view(-1)[:37], w.view(-1)[37:]],
    "on top": lambda w: [w, w.diagonal(), w[3:7], w[:, 2]],
    "backwards": lambda w: [w[40:], w[:40]],
    "data": lambda w: [w.data],
    "detached": lambda w: [w.detach()],
    "as_strided": lambda w: [w.as_strided((768,), (1,))],
}


def test_many_parts() -> None:
    """Experts of a mixture, one after the other."""
    with seeded() as report:
        model = holder(100, 4, 4)
        for i in range(100):
            torch_init.normal_(model.w[i])
    assert keys(report) == {"w": "w"}
    assert equal(model.w, keyed("normal_", (100, 4, 4)))


def test_fans_are_those_of_the_part() -> None:
    with seeded():
        model = holder(*W)
        for part in model.w.chunk(3):
            torch_init.xavier_uniform_(part)
    bound = math.sqrt(6 / 32)
    assert equal(model.w, keyed("uniform_", W, -bound, bound))


def identity(t: Tensor) -> bool:
    return equal(t, torch.eye(*t.shape))


def orthonormal(t: Tensor) -> bool:
    t = t if t.shape[0] <= t.shape[1] else t.T
    return torch.allclose(t @ t.T, torch.eye(len(t)), atol=1e-4)


def half_zeros(t: Tensor) -> bool:
    return bool(((t == 0).sum(0) == math.ceil(0.5 * t.shape[0])).all())


OF_WHOLE: dict[str, tuple[Any, Callable[[Tensor], bool]]] = {
    "eye_": (lambda t: torch_init.eye_(t), identity),
    "orthogonal_": (lambda t: torch_init.orthogonal_(t), orthonormal),
    "sparse_": (lambda t: torch_init.sparse_(t, 0.5), half_zeros),
}
MATRICES: dict[str, Callable[[Tensor], Any]] = {
    "chunks": lambda w: w.chunk(3),
    "gates": lambda w: [w[8:24], w[24:40]],
    "transposed": lambda w: [w.T],
    "columns": lambda w: [w[:, 4:12]],
    "inner": lambda w: [w[3:7, 5:]],
    "strided": lambda w: [w[::2]],
    "rows": lambda w: [w[3:]],
}


@pytest.mark.parametrize("way", ["fused", "init_model_", "record"])
@pytest.mark.parametrize("parts", MATRICES)
@pytest.mark.parametrize("function", OF_WHOLE)
def test_matrices_that_are_parts(function: str, parts: str, way: str) -> None:
    """Gates of an LSTM, for example: each is orthogonal, and no two are equal."""
    fill, holds = OF_WHOLE[function]

    def fn(m: Any) -> None:
        torch_init.ones_(m.w)
        for t in MATRICES[parts](m.w):
            fill(t)

    if way == "fused":
        with seeded():
            model = holder(*W)
            fn(model)
    else:
        model = WAYS[way](lambda: cast(nn.Module, holder(*W)), fn)
    found = [t.detach() for t in MATRICES[parts](model.w)]
    assert all(holds(t) for t in found)
    if function != "eye_":
        assert not any(equal(a, b) for a, b in itertools.combinations(found, 2))
    rest = torch.zeros(W, dtype=torch.bool)
    for t in MATRICES[parts](rest):
        t.fill_(True)
    assert (model.w[~rest] == 1).all()


@pytest.mark.parametrize("part", [
    lambda w: w[3:7], lambda w: w[:, :2], lambda w: w[::2], lambda w: w[..., :1],
    lambda w: w.transpose(0, 1),
])  # fmt: skip
def test_dirac_of_a_part(part: Callable[[Tensor], Tensor]) -> None:
    with seeded():
        model = holder(8, 4, 3)
        torch_init.ones_(model.w)
        torch_init.dirac_(part(model.w))
    expected = torch.ones(8, 4, 3)
    torch_init.dirac_(part(expected))
    assert equal(model.w, expected)


PERMUTED = {"eye_": (), "orthogonal_": (), "sparse_": (0.5,), "normal_": (), "uniform_": ()}


@pytest.mark.parametrize("way", ["fused", "init_model_", "record"])
@pytest.mark.parametrize("function", PERMUTED)
def test_permuted_parameters(function: str, way: str) -> None:
    def make() -> Any:
        model = nn.Module()
        model.w = nn.Parameter(torch.empty(6, 20).t())
        return model

    def fn(m: Any) -> None:
        getattr(torch_init, function)(m.w, *PERMUTED[function])

    if way == "fused":
        with seeded():
            model = make()
            fn(model)
    else:
        model = WAYS[way](make, fn)
    args = PERMUTED[function]
    if function == "eye_":
        assert identity(model.w.detach())
    else:
        assert equal(model.w, keyed(function, (20, 6), *args))
    assert model.w.stride() == (1, 20)


@pytest.mark.parametrize("function", OF_WHOLE)
def test_permuted_tensors_of_nobody(function: str) -> None:
    fill, holds = OF_WHOLE[function]
    with seeded():
        t = fill(torch.empty_strided((9, 6), (1, 9)))
    assert holds(t)


@pytest.mark.parametrize("way", [w for w in WAYS if w != "record"])  # a plan has it as a step
def test_channels_last_by_reset(way: str) -> None:
    """Convolutions have the same numbers in any layout, and by any torch."""
    model: Any = WAYS[way](ZOO["channels_last"])
    assert not model.weight.is_contiguous()
    assert equal(model.weight, keyed("kaiming_uniform_", (16, 8, 3, 3), ROOT5, name="weight"))


def test_channels_last() -> None:
    with seeded():
        fresh = ZOO["channels_last"]()
        stays = torch.empty_strided((16, 8, 3, 3), (72, 1, 24, 8))
        model = nn.Module()
        model.a, model.b = fresh, nn.Buffer(stays.normal_())
    assert equal(model.b, keyed("normal_", (16, 8, 3, 3), name="b"))


FILLS: dict[str, tuple[str, tuple[Any, ...], Callable[[Tensor], Any]]] = {
    "normal_": ("normal_", (1.0, 2.0), lambda t: torch_init.normal_(t, 1.0, 2.0)),
    "uniform_": ("uniform_", (-1.0, 2.0), lambda t: torch_init.uniform_(t, -1, 2)),
    "trunc_normal_": ("trunc_normal_", (0.0, 1.0, -2.0, 2.0),
                      lambda t: torch_init.trunc_normal_(t)),
    "far bounds": ("trunc_normal_", (0.0, 0.02, -2.0, 2.0),
                   lambda t: torch_init.trunc_normal_(t, std=0.02)),
    "tail": ("trunc_normal_", (0.0, 1.0, 1.5, 4.0),
             lambda t: torch_init.trunc_normal_(t, a=1.5, b=4.0)),
    "early": ("trunc_normal_", (0.0, 1.0, -1.0, 2.0), lambda t: trunc_bound_early(t, a=-1, b=2)),
    "private": ("trunc_normal_", (0.0, 1.0, -1.0, 2.0),
                lambda t: of_torch._no_grad_trunc_normal_(t, 0.0, 1.0, -1.0, 2.0)),
    "ours": ("trunc_normal_", (0.0, 1.0, -1.0, 2.0), lambda t: fastinit.trunc_normal_(t, a=-1)),
    "kaiming": ("kaiming_uniform_", (0.1,), lambda t: kaiming_bound_early(t, 0.1)),
    "old name": ("xavier_normal_", (), lambda t: of_torch.xavier_normal_.__call__(t)),
    "orthogonal_": ("orthogonal_", (2.0,), lambda t: torch_init.orthogonal_(t, 2.0)),
    "sparse_": ("sparse_", (0.3,), lambda t: torch_init.sparse_(t, 0.3)),
    "method normal_": ("normal_", (0.0, 0.5), lambda t: t.data.normal_(std=0.5)),
    "method uniform_": ("uniform_", (0.0, 3.0), lambda t: t.data.uniform_(to=3.0)),
    "detached": ("normal_", (), lambda t: t.detach().normal_()),
    "data": ("normal_", (), lambda t: torch_init.normal_(t.data)),
    "private normal": ("normal_", (0.0, 1.0), lambda t: of_torch._no_grad_normal_(t, 0.0, 1.0)),
    "data is": ("normal_", (), lambda t: setattr(t, "data", torch.randn(t.shape))),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 2), (10, 9), (100, 90)], ids=str)
@pytest.mark.parametrize("name", FILLS)
def test_by_whatever_name(name: str, shape: tuple[int, int]) -> None:
    """Functions, methods, names that modules have imported before: one law."""
    function, args, fill = FILLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with seeded() as report:
            model = holder(*shape)
            fill(model.w)
    assert keys(report) == {"w": "w"}
    assert equal(model.w, keyed(function, shape, *args))
    assert report.unwritten == []


def test_values_that_are_copied() -> None:
    """w.data.copy_(torch.randn(...)), which nobody has read."""
    with seeded() as report:
        model = holder(3, 4)
        model.w.data.copy_(torch.randn_like(model.w))
        model.v = nn.Parameter(torch.empty(3, 4))
        model.v.data[...] = torch.rand(3, 4)
    assert keys(report) == {"w": "w", "v": "v"}
    assert equal(model.w, keyed("normal_", (3, 4)))


def test_constants_and_diagonals() -> None:
    with seeded():
        model = nn.ParameterList([torch.empty(9, 5) for _ in range(5)])
        eye_bound_early(model[0])
        torch_init.eye_(model[1])
        torch_init.constant_(model[2], 0.3)
        torch_init.zeros_(model[3])
        model[4].data.fill_(math.pi)
        kernel = torch_init.dirac_(torch.empty(6, 4, 3, 3), groups=2)
    assert identity(model[0].detach())
    assert identity(model[1].detach())
    assert (model[2] == torch.tensor(0.3)).all()
    assert not model[3].any()
    assert (model[4] == torch.tensor(math.pi)).all()
    assert equal(kernel, torch_init.dirac_(torch.empty(6, 4, 3, 3), 2))


CONSTANTS: list[tuple[torch.dtype, Any]] = [
    *((torch.int64, x) for x in (3, 2**24 + 1, 2**60 + 1)), (torch.int8, 300), (torch.int8, -3),
    (torch.bool, 1), (F16, 1e6), (F32, 1e300), (F32, math.nan), (torch.complex64, 1 + 2j),
    (F64, 0.1), (F32, torch.tensor(2.5)), (torch.uint8, 2.5), (F32, True), (F32, "x"),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), CONSTANTS, ids=str)
def test_constants_are_torchs(dtype: torch.dtype, value: Any) -> None:
    seen = []
    for seed in (None, SEED):
        with fused(seed=seed):
            t = torch.zeros(3, dtype=dtype)
            try:
                torch_init.constant_(t, value)
                seen.append(repr(t))
            except (RuntimeError, TypeError) as error:
                seen.append(type(error).__name__)
    assert seen[0] == seen[1]


def test_complex_parameters() -> None:
    """There are no such numbers; that is said at once, and nothing else suffers."""
    with seeded():
        model, other = holder(3, 3), holder(3, 3, dtype=torch.complex64)
        torch_init.normal_(model.w)
        with pytest.raises(NotImplementedError, match=r"no numbers of type torch\.complex64"):
            torch_init.normal_(other.w)
        with pytest.raises(NotImplementedError, match=r"no numbers of type torch\.complex64"):
            other.w.data.normal_()
        torch_init.ones_(other.w)
    assert equal(model.w, keyed("normal_", (3, 3)))
    assert (other.w == 1).all()


def test_integers_and_bools() -> None:
    with seeded() as report:
        model: Any = nn.Module()
        model.register_buffer("a", torch.zeros(3, dtype=torch.int64))
        model.register_buffer("b", torch.ones(3, dtype=torch.bool))
        model.register_buffer("c", torch.empty(3, dtype=torch.int32).fill_(7))
        model.register_buffer("d", torch.arange(3))
        model.register_buffer("e", torch.full((3,), 2))
        model.register_buffer("f", torch_init.ones_(torch.empty(3, dtype=torch.int64)))
        with pytest.raises(NotImplementedError, match=r"no numbers of type torch\.int64"):
            torch_init.normal_(model.a)
    assert [t.tolist() for t in model.buffers()] == [
        *([0] * 3, [True] * 3, [7] * 3, [0, 1, 2], [2] * 3, [1] * 3),
    ]
    assert report.unwritten == []
    assert not any(keys(report).values())


def test_sizes() -> None:
    """None, one, and no dimension at all."""
    with seeded() as report:
        model = nn.Module()
        model.b = nn.Parameter(torch.empty(()))
        torch_init.normal_(model.b)
        model.c = nn.Parameter(torch.empty(1))
        torch_init.normal_(model.c)
        model.d = nn.Parameter(torch.empty(0, 3))
        torch_init.normal_(model.d)
        model.e = nn.Linear(4, 1)
    assert keys(report) == {k: k for k in ("b", "c", "e.weight", "e.bias")}
    for name in "bc":
        t = model.get_parameter(name)
        assert equal(t, keyed("normal_", t.shape, name=name))


def test_data_of_one_element() -> None:
    """m.bias.data.normal_() of nn.Linear(64, 1)."""
    with seeded() as report:
        model = holder(1)
        model.w.data.normal_()
    assert keys(report) == {"w": "w"}
    assert equal(model.w, keyed("normal_", (1,)))


BORN: dict[str, Callable[[], Tensor]] = {
    "eye": lambda: torch.eye(4),
    "to": lambda: torch.empty(4, 4, dtype=F64).to(F32),
    "stack": lambda: torch.stack([torch.ones(4)] * 4),
    "clone": lambda: torch.arange(16.0).view(4, 4).clone(),
    "product": lambda: torch.ones(4, 4) * 2,
    "channels_last": lambda: torch.empty(4, 1, 2, 2).to(memory_format=torch.channels_last)[:, 0],
    "empty_permuted": lambda: torch.empty_permuted((4, 4), (1, 0)),
    "linspace": lambda: torch.linspace(0, 1, 16).view(4, 4),
    "full of int": lambda: torch.full((4, 4), 1).float(),
}


@pytest.mark.parametrize("name", BORN)
def test_whatever_made_the_memory(name: str) -> None:
    """Filled, never read, and of a parameter: it has the parameter's numbers."""
    with seeded() as report:
        model = nn.Module()
        model.w = nn.Parameter(BORN[name]())
        torch_init.normal_(model.w)
    assert keys(report) == {"w": "w"}
    assert equal(model.w, keyed("normal_", model.w.shape))


def test_reset_after_a_change_of_dtype() -> None:
    with seeded():
        model = nn.Linear(4, 4).to(BF16)
        model.reset_parameters()
    assert equal(model.weight, keyed("kaiming_uniform_", (4, 4), ROOT5, name="weight", dtype=BF16))


def test_padding() -> None:
    expected = keyed("normal_", (40, 30), name="weight")
    expected[3] = 0
    for model in (
        by_fused(lambda: nn.Embedding(40, 30, padding_idx=3)),
        *(way(lambda: nn.Embedding(40, 30, padding_idx=3)) for way in WAYS.values()),
    ):
        assert equal(cast(Tensor, model.weight), expected)


def test_overwritten() -> None:
    """What counts is what was asked for last."""
    with seeded() as report:
        model = holder(200, 100)
        torch_init.uniform_(model.w)
        torch_init.zeros_(model.w)
        torch_init.normal_(model.w)
        torch_init.uniform_(model.w[3:9])
        torch_init.constant_(model.w[5], 0.5)
        small = torch.empty(5).normal_()
        small.uniform_()
        del small
    expected = keyed("normal_", (200, 100))
    expected[3:9] = keyed("uniform_", (200, 100))[3:9]
    expected[5] = 0.5
    assert equal(model.w, expected)
    assert report.dropped_elements == 40_000 + 10


@pytest.mark.parametrize("size", [4, 100])
def test_copies(size: int) -> None:
    """A copy equals its original, as it would without."""
    with seeded():
        model = nn.Module()
        model.a = nn.Parameter(torch.empty(size, size))
        torch_init.normal_(model.a)
        model.b = nn.Parameter(torch.empty(size, size))
        model.b.data.copy_(model.a)
        model.c = nn.Parameter(torch.empty(0))
        model.c.data = model.b.data.clone()
        model.d = copy.deepcopy(model.c)
        model.e = nn.Parameter(model.a.detach().clone())
        torch_init.zeros_(model.a.data[0])
        model.f = nn.Parameter(model.a.detach().clone())
        torch_init.uniform_(model.b)
        model.g = nn.Parameter(model.e.detach().T.clone())
    normal = keyed("normal_", (size, size), name="a")
    assert equal(model.c, model.d)
    assert equal(model.c, model.e)
    assert equal(model.f[1:], model.e[1:])
    assert not model.f[0].any()
    assert equal(model.b, keyed("uniform_", (size, size), name="b"))
    assert equal(model.g.T, model.e)
    assert equal(model.a, model.f)
    assert normal.shape == model.a.shape


@pytest.mark.parametrize(
    "part",
    [lambda x: x[90:], lambda x: x[::2], lambda x: x[:, ::2].reshape(90, 90), lambda x: x[:90].t()],
    ids=["rows", "every second", "reshaped", "transposed"],
)
def test_a_copy_of_a_part(part: Callable[[Tensor], Tensor]) -> None:
    """It has the elements of the part, not those at the beginning of its original."""
    with seeded():
        x, y = torch.empty(180, 90).normal_(), torch.empty(90, 90)
        y.copy_(part(x))
        square = torch.empty(90, 90).normal_()
        rows = torch.empty(99, 90)
        rows[9:].copy_(square.t())
    assert torch.equal(y, part(x))
    assert torch.equal(rows[9:], square.t())


def test_a_copy_and_its_original_filled_again() -> None:
    with seeded():
        model = nn.Module()
        model.a = nn.Parameter(torch.empty(9))
        torch_init.normal_(model.a)
        model.b = nn.Parameter(model.a.detach().clone())
        torch_init.normal_(model.a)
    assert not equal(model.a, model.b)


def test_layers_of_a_transformer() -> None:
    """Copies of one that is gone."""

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 8)
        return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    one, two = state(by_fused(make)), state(by_fused(make))
    assert differ(one, two) == []
    layers = [{k[9:]: v for k, v in one.items() if k[7] == i} for i in "012"]
    assert differ(layers[0], layers[1]) == differ(layers[0], layers[2]) == []


def test_layers_of_a_transformer_do_not_depend_on_others() -> None:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 8)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    alone = state(by_fused(lambda: nn.ModuleDict({"b": make()})))
    both = state(by_fused(lambda: nn.ModuleDict({"a": make(), "b": make()})))
    assert differ(alone, {k: v for k, v in both.items() if k[0] == "b"}) == []


def test_views_of_one_buffer() -> None:
    with seeded():
        flat, model = torch.empty(100), nn.Module()
        model.a, model.b = nn.Parameter(flat[:50].view(5, 10)), nn.Parameter(flat[50:])
        torch_init.normal_(model.b)
        torch_init.normal_(model.a)
    assert equal(model.a, keyed("normal_", (5, 10), name="a"))
    assert equal(model.b, keyed("normal_", (50,), name="b"))
    with seeded() as report:
        flat, model = torch.empty(100), nn.Module()
        model.a, model.b = nn.Parameter(flat[:50]), nn.Parameter(flat[50:])
        flat.normal_()  # of both: neither name will do
    assert {*keys(report).values()} == {"#block.0"}
    assert not equal(model.a, model.b)


def test_inference_mode() -> None:
    with torch.inference_mode(), seeded():
        model: Any = nn.Module()
        model.w, model.big = holder(3, 3).w, holder(30, 300).w
        torch_init.normal_(model.w)
        model.big.normal_()
    assert equal(model.w.clone(), keyed("normal_", (3, 3)))
    assert equal(model.big.clone(), keyed("normal_", (30, 300), name="big"))
    init_model_(model, lambda m: torch_init.uniform_(cast(Any, m).w), SEED)
    assert equal(model.w.clone(), keyed("uniform_", (3, 3)))


def test_versions_and_leaves() -> None:
    for name in ("normal_", "uniform_", "zeros_", "eye_", "trunc_normal_", "xavier_normal_"):
        with seeded():
            model = holder(3, 3)
            before = model.w._version
            getattr(torch_init, name)(model.w)
            assert model.w._version > before, name
            getattr(api, name)(model.w)
            assert model.w._version > before + 1, name
        assert model.w.is_leaf
        assert model.w.requires_grad
        assert model.w.grad_fn is None
    plan = Plan()
    plan.normal_(model.w)
    for change in (
        lambda: plan.run(seed=3),
        lambda: init_model_(model, lambda m: torch_init.ones_(cast(Any, m).w), 3),
        lambda: fastinit.normal_(model.w, generator=Key(3)),
    ):
        before = model.w._version
        change()
        assert model.w._version > before
    with seeded(), pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        holder(3, 3).w.normal_()


def test_saved_for_backward() -> None:
    """A change after the graph is made is noticed."""
    w = nn.Parameter(torch.ones(3))
    model = nn.Module()
    model.w = w
    loss: Any = (w * w).sum()
    init_model_(model, lambda m: torch_init.normal_(cast(Any, m).w), SEED)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_shared_elements() -> None:
    """torch refuses to fill what overlaps itself; so do we, at once."""
    with seeded():
        model = holder(3, 3)
        torch_init.normal_(model.w)
        with pytest.raises((RuntimeError, ValueError)):
            torch_init.normal_(torch.empty(3, 1).expand(3, 4))
    assert equal(model.w, keyed("normal_", (3, 3)))


def test_subclasses_of_parameter() -> None:
    class Mine(nn.Parameter):
        pass

    with seeded():
        model = nn.Module()
        model.w = Mine(torch.empty(4, 4))
        torch_init.normal_(model.w)
    assert type(model.w) in (Mine, nn.Parameter)
    assert model.w.isfinite().all()


# ---- reads ---------------------------------------------------------------------------------------


def saved(w: Tensor) -> Tensor:
    torch.save(w, file := io.BytesIO())
    file.seek(0)
    return cast(Tensor, torch.load(file))


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda w: w.flatten()[0].item(),
    "tolist": lambda w: w.tolist(),
    "numpy": lambda w: w.numpy().tolist(),
    "asarray": lambda w: np.asarray(w).tolist(),
    "repr": lambda w: repr(w),
    "format": lambda w: f"{w.flatten()[0]:.9f}",
    "pickle": lambda w: pickle.loads(pickle.dumps(w)).tolist(),
    "save": lambda w: saved(w).tolist(),
    "iterate": lambda w: [float(x) for x in w.flatten()],
    "sum": lambda w: (w * 1).tolist(),
    "clone": lambda w: w.clone().tolist(),
    "deepcopy": lambda w: copy.deepcopy(w).tolist(),
    "dlpack": lambda w: torch_any.from_dlpack(w).tolist(),
    "storage": lambda w: cast(Any, w.untyped_storage()).tolist(),
    "address": lambda w: ctypes.string_at(w.data_ptr(), 4),
    "fill": lambda w: torch.empty(3).fill_(w.flatten()[0]).tolist(),
    "index": lambda w: w.flatten()[torch.tensor([0])].tolist(),
    "bits": lambda w: w.view(torch.int32).tolist(),
    "list of parts": lambda w: torch.tensor([w.flatten()[0]]).tolist(),
    "foreach": lambda w: torch._foreach_mul([w], 1.0)[0].tolist(),
    "copy_": lambda w: torch.empty_like(w).copy_(w).tolist(),
    "setitem": lambda w: torch.zeros(2).index_put_((torch.tensor(0),), w.flatten()[0]).tolist(),
}
SHAPES: list[tuple[int, ...]] = [(), (1,), (1, 1), (3,), (4, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", READS)
def test_what_is_read_stays(name: str, shape: tuple[int, ...]) -> None:
    makes: list[Callable[[], Tensor]] = [
        lambda: torch.randn(shape),
        lambda: torch_init.normal_(torch.empty(shape)),
    ]
    for make in makes:
        with seeded():
            model = nn.Module()
            model.w = nn.Buffer(make())
            inside = READS[name](model.w)
        assert READS[name](model.w) == inside


LISTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda w: torch.tensor([w, w]),
    "as_tensor": lambda w: torch.as_tensor([w, w]),
    "FloatTensor": lambda w: torch.FloatTensor([w, w]),
    "new_tensor": lambda w: torch.ones(1).new_tensor([w, w]),
    "array": lambda w: torch.from_numpy(np.array([w, w], dtype=np.float32)),
}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("name", LISTS)
def test_lists_of_single_elements(name: str, shape: tuple[int, ...]) -> None:
    """torch.tensor([self.alpha, self.beta]): memory that nobody has written."""
    with warnings.catch_warnings(), seeded():
        warnings.simplefilter("ignore")
        kept = torch.full((8,), 77.0)
        del kept
        w = torch.randn(shape)
        inside = LISTS[name](w)
    assert inside.flatten().tolist() == [w.item()] * 2


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(0.5),
    "div_": lambda w: w.div_(w.norm()),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "out": lambda w: torch.mul(w, 2, out=w),
    "clamp_": lambda w: w.clamp_(0),
    "tril_": lambda w: w.tril_(),
    "copy of rows": lambda w: w[2:].copy_(w[:2]),
    "flip": lambda w: w.copy_(w.flip(0)),
    "numpy": lambda w: np.multiply(w.numpy(), 2, out=w.numpy()),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([1]), 9.0),
}


KEYLESS = {"flip"}  # of which it is not known that they depend on what was there


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str) -> None:
    """Numbers by running number then; the report says so."""
    with seeded() as report:
        model = nn.Module()
        model.w = nn.Buffer(torch.empty(4, 5).normal_())
        CHANGES[name](model.w)
    assert keys(report) == {"w": "" if name in KEYLESS else "#block.0"}
    expected = numbered("#block.0", (4, 5))
    CHANGES[name](expected)
    assert equal(model.w, expected)
    named = nn.Module()
    named.w = nn.Buffer(torch.empty(4, 5))
    init_model_(named, lambda m: CHANGES[name](cast(Any, m).w.normal_()), SEED)
    expected = keyed("normal_", (4, 5))
    CHANGES[name](expected)
    assert equal(named.w, expected)


OVERWRITES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": lambda w: w.__setitem__(0, 3.0),
    "zero_": lambda w: w[1:].zero_(),
    "copy_": lambda w: w[:2].copy_(torch.ones(2, 5)),
    "transposed": lambda w: w.T[1:3].fill_(4),
}


@pytest.mark.parametrize("name", OVERWRITES)
def test_parts_that_are_overwritten_are_no_reads(name: str) -> None:
    with seeded() as report:
        model = nn.Module()
        model.w = nn.Buffer(torch.empty(4, 5).normal_())
        OVERWRITES[name](model.w)
    expected = keyed("normal_", (4, 5))
    OVERWRITES[name](expected)
    assert equal(model.w, expected)
    assert keys(report) == {"w": "w"}


# ---- running numbers -----------------------------------------------------------------------------


def test_loose_tensors() -> None:
    def make() -> list[Tensor]:
        kept = []
        for i in range(40):
            torch.empty(6).normal_()  # dies
            x = torch.randn(6)
            if i % 3 == 0:
                x.sum()
            kept.append(x)
        return kept

    with seeded() as report:
        one = make()
    with seeded():
        two = make()
    assert all(map(equal, one, two))
    assert len({tuple(t.tolist()) for t in one}) == 40
    assert sorted(int(row.key.split(".")[-1]) for row in report.rows()) == list(range(40))


def test_temporaries_change_nothing() -> None:
    seen = []
    for n in (0, 7, 2500):
        with seeded():
            model = nn.Module()
            for _ in range(n):
                torch.empty(5).normal_()
            model.w = nn.Parameter(torch.randn(5))
            for _ in range(n):
                torch.empty(5).uniform_()
            early = torch.randn(5) * 1
        seen.append((state(model)["w"], early))
    assert all(equal(x, y) for pair in seen for x, y in zip(seen[0], pair))


def test_a_buffer_that_is_filled_again() -> None:
    """As scratch memory is: each time other numbers, as without a seed."""
    with seeded():
        scratch = torch.empty(100)
        one = scratch.normal_() * 1
        two = scratch.normal_() * 1
    assert not equal(one, two)


def test_drawing_until_it_fits() -> None:
    tries = 0
    with seeded():
        t = torch.empty(1000).normal_()
        while t.abs().max() > 3.2 and tries < 100:
            t.normal_()
            tries += 1
    assert tries < 100


def test_prefix_of_running_numbers() -> None:
    seen = []
    for prefix in ("a.", "b."):
        with seeded(prefix=prefix):
            seen.append(torch.randn(9) * 1)
    assert not equal(*seen)


def test_a_key_without_a_name_in_a_block_of_its_seed() -> None:
    with seeded():
        one = torch.randn(9) * 1
        two = fastinit.normal_(torch.empty(9), generator=Key(SEED)) * 1
    assert not equal(one, two)


def test_a_thread_in_the_block() -> None:
    """What was asked for before it starts is written then."""
    with seeded() as report:
        model = Net("a")
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        model.b = nn.Linear(8, 8)
    found = keys(report)
    assert found["a.weight"] == "#block.0"
    assert found["b.weight"] == "b.weight"


# ---- blocks --------------------------------------------------------------------------------------


def test_a_block_that_runs_twice() -> None:
    block = fused(seed=SEED)
    with block as first:
        one = Net("a")
    with block as second:
        two = Net("a")
    assert first is not second
    assert differ(state(one), state(two)) == []

    @fused(seed=SEED, prefix="p.")
    def make(depth: int = 1) -> nn.Module:
        return make(depth - 1) if depth else Net("a")

    assert differ(state(make()), state(make())) == []
    assert differ(state(make()), state(by_init_model(lambda: Net("a"), prefix="p."))) == []


def test_exceptions() -> None:
    """What was made until then has its numbers."""
    kept: list[Any] = []

    def half() -> None:
        kept.append(Net("a"))
        kept[0].b = holder(4)
        torch_init.normal_(kept[0].b.w)
        raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError), fused(seed=SEED):
        half()
    assert equal(kept[0].a.weight, keyed("kaiming_uniform_", (8, 8), ROOT5, name="a.weight"))
    assert equal(kept[0].b.w, keyed("normal_", (4,), name="b.w"))
    assert torch.equal(before, torch.get_rng_state())
    assert fastinit.core.recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0


BAD: list[tuple[str, dict[str, Any]]] = [
    ("normal_", {"std": -1}), ("uniform_", {"a": 2, "b": 1}), ("xavier_normal_", {}),
    ("kaiming_uniform_", {"mode": "x"}), ("orthogonal_", {}), ("eye_", {}), ("dirac_", {}),
    ("sparse_", {"sparsity": 0.1}), ("kaiming_normal_", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), BAD, ids=str)
def test_errors_are_torchs(name: str, options: dict[str, Any]) -> None:
    with pytest.raises((RuntimeError, ValueError)) as expected:
        getattr(torch_init, name)(torch.empty(5), **options)
    with seeded():
        model = Net("a")
        with pytest.raises(expected.type) as found:
            getattr(torch_init, name)(torch.empty(5), **options)
    assert str(found.value) == str(expected.value)
    assert differ(state(model), state(by_fused(lambda: Net("a")))) == []


def test_no_block_without_operators() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="a block with a seed has to see"):
        init_in_block()
    with pytest.raises(RuntimeError, match="a block with a seed has to see"):
        record(Net("a"), lambda m: init_in_block())


def init_in_block() -> None:
    with fused(seed=SEED):
        pass


def test_keys_in_a_block() -> None:
    """A Key says what it is, whatever the block's seed."""
    for seed in (None, SEED, 5):
        for n in (5, 9000):
            with fused(seed=seed) as report:
                model = nn.ParameterList([torch.empty(n), torch.empty(n), torch.empty(3)])
                fastinit.normal_(model[0], generator=Key(3, "x"))
                fastinit.uniform_(model[0][:2], generator=Key(4, "y"))
                fastinit.normal_(model[2], generator=Key(3, "z").part((9,), (4,)))
                fastinit.ones_(model[1])
                doubled = model[0].detach() * 2
            expected = keyed("normal_", (n,), name="x", seed=3)
            expected[:2] = keyed("uniform_", (2,), name="y", seed=4)
            assert equal(model[0], expected)
            assert equal(doubled, expected * 2)
            assert equal(model[2], keyed("normal_", (9,), name="z", seed=3)[4:7])
            assert keys(report) == {"0": "x, y", "1": "", "2": "z"}


# ---- plans ---------------------------------------------------------------------------------------


def varied() -> nn.Module:
    model = nn.ParameterDict({n: torch.zeros(24, 8) for n in "abcdefghi"})
    model["k"] = torch.zeros(8, 8, 3)
    model["l"] = torch.zeros(3, 16, 8)
    model["s"] = torch.zeros(3)
    return model


def fill_varied(m: Any, g: torch.Generator | None = None) -> None:
    torch_init.trunc_normal_(m["a"], std=0.02)
    torch_init.trunc_normal_(m["b"], a=-1, b=1.5)
    torch_init.sparse_(m["c"], 0.4)
    torch_init.orthogonal_(m["d"])
    torch_init.eye_(m["e"])
    torch_init.dirac_(m["k"])
    torch_init.normal_(m["f"])
    torch_init.uniform_(m["f"][3:9])
    torch_init.zeros_(m["f"][5])
    torch_init.normal_(m["g"], generator=g)
    torch_init.kaiming_normal_(m["h"])
    torch_init.constant_(m["i"], 0.3)
    fastinit.orthogonal_batched_(m["l"])
    torch_init.uniform_(m["s"])


@pytest.mark.parametrize("smallest", [0, None])
def test_plans(smallest: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a seed and without, in turns."""
    if smallest is not None:
        monkeypatch.setattr(fastinit.core.geometry, "MIN_NATIVE", smallest)
    g = torch.Generator()
    model, other = varied(), varied()
    plan = record(model, lambda m: fill_varied(m, g))

    def run(seed: int | None) -> State:
        g.manual_seed(5)
        torch.manual_seed(6)
        before = torch.get_rng_state()
        plan.run(seed=seed)
        assert torch.equal(before, torch.get_rng_state()) == (seed is not None)
        return state(model)

    first, eager = run(SEED), run(None)
    assert differ(first, run(SEED)) == differ(eager, run(None)) == differ(eager, run(None)) == []
    assert differ(first, run(SEED)) == []
    after = g.get_state()
    other = by_init_model(varied, lambda m: fill_varied(m, g.manual_seed(5)))
    assert differ(first, state(other)) == []
    assert torch.equal(after, g.get_state())
    g.manual_seed(5)
    torch.manual_seed(6)
    fill_varied(model, g)
    assert set(differ(eager, state(model))) <= {"d", "l"}
    assert set(differ(first, eager)) == set("abcdfhls")  # g: of the generator
    assert set(differ(first, run(SEED + 1))) == set("abcdfhls")


def test_plans_without_names() -> None:
    kept = [torch.empty(9), torch.empty(9), torch.empty(100, 90), torch.empty(9)]
    plan = Plan()
    for t in kept[:3]:
        plan.normal_(t)
    plan.zeros_(kept[3])
    plan.uniform_(kept[3][2:5])
    plan.run(seed=SEED)
    expected = [numbered(f"#step.{i}", tuple(t.shape)) for i, t in enumerate(kept[:3])]
    assert all(map(equal, kept, expected))
    part = numbered("#step.4", (3,), laws.uniform(0.0, 1.0))
    assert kept[3].tolist() == [0, 0, *part.tolist(), 0, 0, 0, 0]


def test_keys_in_plans() -> None:
    w, v = torch.empty(10), torch.empty(100, 90)
    plan = Plan()
    plan.normal_(w, generator=Key(3, "x"))
    plan.normal_(v, generator=Key(3, "y"))
    plan.uniform_(v[:2], generator=Key(3, "z").part((4, 90), (1, 0)))
    expected = keyed("normal_", (100, 90), name="y", seed=3)
    expected[:2] = keyed("uniform_", (4, 90), name="z", seed=3)[1:3]
    for seed in (None, None, SEED, 1):
        w.zero_()
        v.zero_()
        with undrawn():
            plan.run(seed=seed)
        assert equal(w, keyed("normal_", (10,), name="x", seed=3))
        assert equal(v, expected)


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)], ids=str)
def test_plans_of_permuted_matrices(shape: tuple[int, int]) -> None:
    w = torch.empty(shape).t()
    plan = Plan()
    plan.orthogonal_(w)
    with undrawn():
        plan.run(seed=SEED)
    assert orthonormal(w)


def test_plans_see_what_has_moved() -> None:
    model = made(lambda: Net("a", "b"))
    plan = record(model)
    plan.run(seed=SEED)
    cast(Any, model).a.weight.data = torch.zeros(8, 8)
    with pytest.raises(RuntimeError, match="has other memory"):
        plan.run(seed=SEED)


def test_plans_prefix() -> None:
    model = made(lambda: Net("a"))
    plan = record(model)
    plan.run(seed=SEED, prefix="p.")
    expected = keyed("kaiming_uniform_", (8, 8), ROOT5, name="p.a.weight")
    assert equal(cast(Any, model).a.weight, expected)


def test_a_plan_in_a_block_with_a_seed() -> None:
    """Its numbers are of the seed, or it says that they are not."""
    w = torch.empty(9)
    plan = Plan()
    plan.normal_(w)
    before = torch.get_rng_state()
    with fused(seed=SEED) as report:
        plan.run()
    assert report.foreign or torch.equal(before, torch.get_rng_state())


# ---- Key -----------------------------------------------------------------------------------------


def test_key() -> None:
    assert repr(Key(3)) == "Key(3)"
    assert repr(Key(-1, "a.b")) == "Key(18446744073709551615, 'a.b')"
    assert Key(3).named("x").name == "x"
    assert Key(3).named("x").philox == Key(3, "x").philox != Key(4, "x").philox
    with pytest.raises(ValueError, match="without a name"):
        _ = Key(3).philox
    with pytest.raises(TypeError, match="a name is a str"):
        Key(3, 4)  # type: ignore[arg-type]


def test_running_numbers_of_threads() -> None:
    """Each is given once."""
    key = Key(3)
    found: list[str] = []

    def take() -> None:
        found.extend(key.take()[1] for _ in range(2000))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(x[1:]) for x in found) == list(range(16_000))


def test_copies_of_a_key() -> None:
    """They go on from where it is; deep ones on their own."""
    key = Key(3)
    key.take()
    for twin in (copy.deepcopy(key), pickle.loads(pickle.dumps(key))):
        assert (twin.seed, twin.name) == (3, None)
        assert [twin.take()[1], twin.take()[1]] == ["#1", "#2"]
    assert key.take()[1] == "#1"
    assert copy.copy(key).take()[1] != key.take()[1]
    named = pickle.loads(pickle.dumps(Key(3, "x")))
    assert named.philox == Key(3, "x").philox


def test_a_key_is_pickled_without_itertools() -> None:
    assert b"itertools" not in pickle.dumps(Key(3))


def test_a_subclass_of_key() -> None:
    class Mine(Key):
        pass

    t = torch.empty(4)
    fastinit.normal_(t, generator=Mine(SEED, "w"))
    assert equal(t, keyed("normal_", (4,)))


def test_seeds_of_numpy() -> None:
    assert Key(cast(Any, np.int64(3))).seed == 3


# ---- time ----------------------------------------------------------------------------------------


def test_many_parameters_in_one_buffer() -> None:
    """As flattened optimisers have them. Counted, not timed."""
    calls = 0
    part = fastinit.core.shard.part

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return part(*args)

    flat, model = torch.empty(1600), nn.Module()
    for i in range(100):
        model.register_parameter(f"p{i}", nn.Parameter(flat[i * 16 : (i + 1) * 16]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastinit.core.shard, "part", counted)
        init_model_(model, lambda m: [torch_init.normal_(p) for p in m.parameters()], SEED)
    assert equal(cast(Tensor, model.p7), keyed("normal_", (16,), name="p7"))
    assert calls < 2000
