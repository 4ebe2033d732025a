# SPDX-License-Identifier: BSD-3-Clause
"""seed=: what is done to a model in the block leaves the numbers of its names, or is said."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastinit
from fastinit import fused, init_model_, materialize_
from tests.support.compare import BF16, F16, F64
from tests.support.seeded import ROOT5, SEED, differ, equal, keyed, keys, on_meta, seeded, state

Build = Callable[[Callable[[], nn.Module], list[str]], nn.Module]


class Parts(nn.Module):
    """Layers under these names, in this order."""

    def __init__(self, make: Callable[[], nn.Module], names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, make())


class Within(Parts):
    """Layers whose shapes a forward pass of the constructor tells."""

    def __init__(self, make: Callable[[], nn.Module], names: list[str]) -> None:
        super().__init__(make, names)
        for name in names:
            self.add_module(
                name + "2", nn.Linear(self.get_submodule(name)(torch.rand(1, 8)).numel(), 3)
            )


class Teacher(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], names: list[str]) -> None:
        super().__init__()
        self.student = Parts(make, names)
        self.teacher = copy.deepcopy(self.student)


def read(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        assert not p.isnan().any()
        repr(p), float(p.detach().norm())
    return model


def scaled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p /= 30
    return model


def known(model: nn.Module) -> nn.Module:
    for part in model.children():
        part(torch.ones(1, 8))
    return model


def saved(model: nn.Module) -> Any:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(make: Callable[[], nn.Module], names: list[str]) -> nn.Module:
    other = Parts(make, names)
    other.load_state_dict(Parts(make, names).state_dict())
    return other


def emptied(make: Callable[[], nn.Module], names: list[str]) -> nn.Module:
    model = on_meta(lambda: Parts(make, names)).to_empty(device="cpu")
    for p in model.parameters():
        torch_init.normal_(p)
    return model


def orthonormal(m: Any) -> Any:
    m.weight = nn.Parameter(torch.linalg.qr(torch.randn(*m.weight.shape))[0])
    return m


def computed(m: Any) -> Any:
    m.weight = nn.Parameter(torch.randn(8, 5) @ torch.rand(5, 8) + m.bias.detach())
    return m


def sized(m: Any) -> Any:
    with torch.no_grad():
        m.weight.div_(m.weight.norm(dim=1, keepdim=True)).tril_()
    return m


def linear() -> Any:
    return nn.Linear(8, 8)


def in_parts(layer: Callable[[], nn.Module], after: Callable[[Any], Any] = lambda m: m) -> Build:
    return lambda make, names: after(Parts(layer, names))


def norm(m: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(m)


WAYS: dict[str, Build] = {
    "as it is": Parts,
    "read": in_parts(linear, read),
    "scaled": in_parts(linear, scaled),
    "copied": in_parts(linear, copy.deepcopy),
    "read, copied": in_parts(linear, lambda m: copy.deepcopy(read(m))),
    "cast, copied": in_parts(linear, lambda m: copy.deepcopy(m.to(BF16))),
    "copied, cast, read": in_parts(linear, lambda m: read(copy.deepcopy(m).half())),
    "cast there and back": in_parts(linear, lambda m: copy.deepcopy(m.double()).float()),
    "saved": in_parts(linear, saved),
    "loaded": loaded,
    "emptied": emptied,
    "teacher": Teacher,
    "teacher, cast": lambda make, names: Teacher(make, names).bfloat16(),
    "within": Within,
    "lazy": in_parts(lambda: nn.LazyLinear(8), known),
    "channels last": in_parts(lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)),
    "weight_norm": in_parts(lambda: parametrizations.weight_norm(linear())),
    "old weight_norm": in_parts(lambda: norm(linear())),
    "spectral_norm": in_parts(lambda: parametrizations.spectral_norm(linear())),
    "old spectral_norm": in_parts(lambda: nn.utils.spectral_norm(linear())),
    "orthonormal": in_parts(lambda: orthonormal(linear())),
    "computed": in_parts(lambda: computed(linear())),
    "sized": in_parts(lambda: sized(linear())),
    "sized, copied": in_parts(lambda: sized(linear()), copy.deepcopy),
    "sized, read, copied": in_parts(lambda: sized(linear()), lambda m: copy.deepcopy(read(m))),
    "weight_norm, copied": in_parts(
        lambda: parametrizations.weight_norm(linear()), copy.deepcopy
    ),
    "pruned": in_parts(linear, lambda m: prune.l1_unstructured(m.a, "weight", 0.5) and m),
    "one element": in_parts(lambda: nn.ParameterList([torch.randn(1), torch.rand(())])),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_order_of_layers(name: str) -> None:
    states = []
    for order in (["a", "b"], ["extra", "b", "a"]):
        with seeded() as report:
            model = WAYS[name](linear, order)
        report.check()
        assert report.unnamed == {}
        states.append(state(model))
    few, more = states
    assert [k for k in few if not torch.equal(few[k], more[k])] == []


STEPS: dict[str, Callable[[Any], Any]] = {
    "read": read, "scaled": scaled, "copied": copy.deepcopy, "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(), "float": lambda m: m.float(),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_random_programs(seed: int) -> None:
    """Layers of random sorts and then random steps, with others before them and without."""
    draw = random.Random(seed)
    sorts = ["as it is", "weight_norm", "old weight_norm", "channels last", "sized"]
    for _ in range(2):
        parts = [draw.choice(sorts) for _ in range(2)]
        steps = [draw.choice([*STEPS]) for _ in range(draw.randrange(1, 5))]
        if "old weight_norm" in parts:  # which torch does not copy
            steps = [step for step in steps if step != "copied"]
        states = []
        for order in ([0, 1], [1, 0]):
            with seeded() as report:
                model: Any = nn.Module()
                for i in order:
                    model.add_module(f"extra{order[0]}", nn.Linear(3, 3))
                    model.add_module(f"part{i}", WAYS[parts[i]](linear, ["a"]))
                for step in steps:
                    model = STEPS[step](model)
            assert report.unnamed == {}, steps
            states.append(state(model))
        first, second = states
        mine = [k for k in first if k.startswith("part")]
        assert [k for k in mine if not torch.equal(first[k], second[k])] == [], (parts, steps)


@pytest.mark.parametrize("name", ["sized, copied", "sized, read, copied"])
def test_copies_of_what_is_computed(name: str) -> None:
    with seeded():
        model = WAYS["sized"](linear, ["a"])
    with seeded():
        copied = WAYS[name](linear, ["a"])
    assert differ(state(model), state(copied)) == []


@pytest.mark.parametrize("dtype", [BF16, F16, F64])
@pytest.mark.parametrize(
    "name", ["cast", "read, cast", "cast, read", "copied, cast", "cast, scaled"]
)
def test_casts(name: str, dtype: torch.dtype) -> None:
    """The number that was asked for, in its dtype, then what torch makes of it."""
    steps: dict[str, Callable[[Any], Any]] = {
        "cast": lambda m: m.to(dtype), "read": read, "copied": copy.deepcopy, "scaled": scaled,
    }  # fmt: skip
    with seeded():
        model: Any = Parts(linear, ["a"])
        for step in name.split(", "):
            model = steps[step](model)
    expected = keyed("kaiming_uniform_", (8, 8), ROOT5, name="a.weight").to(dtype)
    assert equal(model.a.weight, expected / 30 if "scaled" in name else expected)


def test_what_is_computed_fits() -> None:
    """weight_norm's two parts are those of one matrix, and so is what they give."""
    with seeded():
        model = Parts(lambda: parametrizations.weight_norm(linear()), ["a"])
        old: Any = Parts(lambda: norm(linear()), ["a"])
    name = "parametrizations.weight.original1"
    p: Any = model.a.parametrizations.weight  # type: ignore[union-attr]
    assert equal(p.original1, keyed("kaiming_uniform_", (8, 8), ROOT5, name=f"a.{name}"))
    assert equal(p.original0, torch.norm_except_dim(p.original1, 2, 0))
    assert equal(old.a.weight_g, torch.norm_except_dim(old.a.weight_v, 2, 0))
    assert equal(old.a.weight, torch._weight_norm(old.a.weight_v, old.a.weight_g, 0))


def test_inputs_are_those_of_the_time() -> None:
    """What an operator got is changed, freed or filled again before it is computed."""
    with seeded():
        model: Any = nn.Module()
        model.w, factor = nn.Buffer(torch.empty(4, 4).normal_()), torch.full((4,), 2.0)
        model.product, model.other = nn.Buffer(model.w * factor), nn.Buffer(model.w.sum(1))
        factor.zero_()
        model.w.mul_(3).uniform_()
        gone = torch.randn(4, 4)
        model.of_gone = nn.Buffer(gone @ gone)
        del gone
    old = keyed("normal_", (4, 4))
    assert equal(model.w, keyed("uniform_", (4, 4)))
    assert equal(model.product, old * 2)
    assert equal(model.other, old.sum(1))
    of_gone = keyed("normal_", (4, 4), name="of_gone<0")
    assert equal(model.of_gone, of_gone @ of_gone)


def test_what_nobody_reads_is_not_computed() -> None:
    with seeded() as report:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        model(torch.randn(3, 8))
    assert report.written_elements == sum(p.numel() for p in model.parameters())


# ---- what is read before its name is known ----


def test_what_is_read_too_early_is_said() -> None:
    def make(read: bool) -> nn.Module:
        layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
        if read:
            [float(layers[1].weight.detach().norm()) for _ in range(2)]
        return nn.Sequential(*layers)

    with (
        pytest.warns(UserWarning, match=r"1\.weight has the numbers of #") as told,
        seeded() as report,
    ):
        model = make(True)
    line = make.__code__.co_firstlineno + 3
    assert [(w.filename, w.lineno) for w in told] == [(__file__, line)]
    assert list(report.unnamed) == ["1.weight"]
    assert report.unnamed["1.weight"][0] == f"{__file__}:{line}"
    assert keys(report)["1.weight"].startswith("#")
    assert keys(report)["1.weight"] in str(report)
    with pytest.raises(RuntimeError, match=r"1\.weight"):
        report.check()
    with seeded() as report:
        plain = make(False)
    report.check()
    assert equal(model[0].weight, plain[0].weight)  # type: ignore[index,arg-type]


def test_what_is_computed_of_it_is_said() -> None:
    """A tensor that an operator, which cannot wait, made of numbers without a name."""

    def make() -> nn.Module:
        model = nn.Module()
        x = torch.randn(4, 4)
        model.w = nn.Buffer(torch.linalg.svd(x + 1)[1])
        model.b = nn.Buffer(torch.randn(4))
        return model

    with pytest.warns(UserWarning, match="w has the numbers of #"), seeded() as report:
        kept = make()
    assert (list(report.unnamed), len(kept.state_dict())) == (["w"], 2)
    assert not report.unwritten  # one of several results is written, too


def test_in_a_device_context() -> None:
    """A function mode, which sees fastinit look at memory if that is not hidden from it."""

    def make(context: Any) -> dict[str, Tensor]:
        with warnings.catch_warnings(), seeded() as report:
            warnings.simplefilter("error")
            with context:
                model = nn.ModuleList((nn.Embedding(90, 30, padding_idx=3), nn.Linear(200, 200)))
                torch_init.zeros_(model[1].bias)  # type: ignore[arg-type]
                model.w = nn.Parameter(torch.randn(1) * 2)
                model[0].weight.data[5].fill_(2)  # type: ignore[index,union-attr]
        report.check()
        return dict(model.named_parameters())

    plain, inside = make(contextlib.nullcontext()), make(torch.device("cpu"))
    assert all(equal(plain[name], t) for name, t in inside.items())
    assert not inside["0.weight"][3].any()
    assert not inside["1.bias"].any()
    assert bool((inside["0.weight"][5] == 2).all())


def test_tensors_of_nobody_are_listed() -> None:
    with seeded() as report:
        kept = torch.randn(6)
    report.check()
    assert "no module has them: #block.0" in str(report)
    assert kept.numel() == 6


# ---- models that exist already ----


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(500, 80), nn.Linear(20, 20)

    def init_weights(self, backwards: bool = False) -> None:
        parts = [self.emb.weight, self.lin.weight, self.lin.bias]
        for t in parts[::-1] if backwards else parts:
            torch_init.normal_(t)


EXISTING: dict[str, Callable[[Any], Any]] = {
    "method": lambda m: m.init_weights(),
    "backwards": lambda m: m.init_weights(True),
    "apply": lambda m: m.apply(lambda x: [torch_init.normal_(p) for p in x.parameters(False)]),
    "loop": lambda m: [torch_init.normal_(p) for p in m.parameters()],
    "by methods": lambda m: [p.data.normal_() for p in m.parameters()],
    "part by part": lambda m: (
        [m.lin.weight.data[i].normal_() for i in range(20)]
        and [torch_init.normal_(p) for p in (m.emb.weight, m.lin.bias)]
    ),
}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", EXISTING)
def test_existing_model(name: str, wrap: bool) -> None:
    model = Old()
    wrapped = nn.DataParallel(model) if wrap else model
    with seeded() as report:
        EXISTING[name](model)
    report.check()
    for full, t in state(model).items():
        assert equal(t, keyed("normal_", t.shape, name=full)), full
    assert wrapped is not None


@pytest.mark.parametrize("step", [1, -1])
def test_existing_model_layer_by_layer(step: int) -> None:
    """reset_parameters of a layer is a method of the layer: names are the model's all the same."""
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 20))
    with seeded() as report:
        for m in list(model)[::step]:
            m.reset_parameters()  # type: ignore[operator]
    report.check()
    for i, size in ((0, (30, 20)), (2, (20, 30))):
        weight = keyed("kaiming_uniform_", size, ROOT5, name=f"{i}.weight")
        assert equal(model[i].weight, weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("emptied", [False, True])
def test_what_is_copied_into_an_existing_model(emptied: bool) -> None:
    """Numbers drawn in a tensor of their own are the parameter's, as when the block makes both."""

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.zeros(9, 8)), nn.Buffer(torch.zeros(7))

        def init_weights(self) -> None:
            self.b.copy_(torch.randn(7) * 2)
            self.w.data.copy_(torch.randn(9, 8))

    model = on_meta(Copies).to_empty(device="cpu") if emptied else Copies()
    with warnings.catch_warnings(), seeded() as report:
        warnings.simplefilter("error")
        model.init_weights()
    report.check()
    assert equal(model.w, keyed("normal_", (9, 8), name="w"))
    assert equal(model.b, keyed("normal_", (7,), name="b") * 2)


def test_existing_models_by_their_methods() -> None:
    """Another one that only has the same attributes is not meant, and neither is what holds it."""
    other, model = Old(), Old()
    holder = nn.ModuleDict({"inner": model})
    before = state(other)
    with seeded() as report:
        model.init_weights()
    report.check()
    assert equal(model.lin.weight, keyed("normal_", (20, 20), name="lin.weight"))
    assert all(equal(t, before[name]) for name, t in state(other).items())
    assert holder


# ---- prefixes ----


class Lit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.weight = nn.Linear(8, 8), nn.Parameter(torch.zeros(3))


def test_strip() -> None:
    """Of all ways alike; a name that another tensor has stays whole."""
    names = {"model.weight": "model.weight", "model.bias": "bias"}

    def draw(m: Any) -> None:
        if isinstance(m, nn.Linear):
            m.reset_parameters()

    with seeded(strip="model.") as report:
        models: list[Any] = [Lit()]
    assert {k: v for k, v in keys(report).items() if v} == {v: v for v in names.values()}
    models += [Lit(), on_meta(Lit), Lit()]
    init_model_(models[1], draw, SEED, strip="model.")
    with pytest.warns(UserWarning, match="weight"):
        materialize_(models[2], fn=draw, seed=SEED, strip="model.")
    fastinit.record(models[3], draw).run(seed=SEED, strip="model.")
    for model in models:
        for full, name in names.items():
            t = model.get_parameter(full)
            args = (ROOT5,) if t.dim() > 1 else (-(8**-0.5), 8**-0.5)
            function = "kaiming_uniform_" if t.dim() > 1 else "uniform_"
            assert equal(t, keyed(function, t.shape, *args, name=name)), full
    refused = pytest.raises(RuntimeError, match="a block with a strip")
    with seeded(), refused, fused(seed=SEED, strip="a."):
        pass


def test_names_under_peft() -> None:
    """Its classes by their names: PeftModel, a tuner, and a layer around another."""

    class BaseTunerLayer(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base_layer, self.lora_A = layer, nn.Linear(4, 2)

    class BaseTuner(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    class PeftModel(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base_model = BaseTuner(model)

    with seeded() as report:
        model = nn.ModuleDict({"q": BaseTunerLayer(nn.Linear(4, 4))})
        peft = PeftModel(model)
    assert list(keys(report)) == ["q.weight", "q.bias", "q.lora_A.weight", "q.lora_A.bias"]
    assert peft
