# SPDX-License-Identifier: BSD-3-Clause
"""What is on the meta device, or has one of some names, is initialised; the rest stays as it is.

The reference is torch: the same function on a copy that has memory everywhere, of which only what
was missing is looked at, and its generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastinit
from fastinit.core import recording
from tests.support.compare import bits
from tests.support.models import ZOO, on_meta, reset

pytestmark = pytest.mark.usefixtures("large_from_4096")

Fn = Callable[[nn.Module], Any]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def partly_real(kind: str, every: int) -> nn.Module:
    """A model of the zoo on meta, with memory and a gradient for some of its tensors."""
    model, whole = on_meta(ZOO[kind]), ZOO[kind]()
    state = {n: t.detach().clone() for n, t in tensors(whole).items()}
    for i, (path, m) in enumerate(model.named_modules()):
        for j, (name, t) in enumerate((*m._parameters.items(), *m._buffers.items())):
            if t is not None and (i + j) % every:
                value = state[f"{path}.{name}".lstrip(".")]
                kept = isinstance(t, nn.Parameter)
                setattr(m, name, nn.Parameter(value, t.requires_grad) if kept else value)
    return model


def whole_copy(model: nn.Module) -> nn.Module:
    """The same with memory for what is on meta."""
    made = copy.deepcopy(model)
    for m in made.modules():
        for name, t in (*m._parameters.items(), *m._buffers.items()):
            if t is not None and t.is_meta:
                new = torch.full_like(t, 9, device="cpu")
                is_parameter = isinstance(t, nn.Parameter)
                setattr(m, name, nn.Parameter(new, t.requires_grad) if is_parameter else new)
    return made


def seen(t: torch.Tensor) -> tuple[Any, ...]:
    return id(t), t.data_ptr(), t._version, t.grad is None, t.requires_grad, bits(t).tolist()


def missing_resets(model: nn.Module) -> Fn:
    """reset_parameters of those modules in which something is on meta."""
    paths = {p for p, m in model.named_modules() if any(t.is_meta for t in tensors(m).values())}

    def run(whole: nn.Module) -> None:
        names = {id(m): p for p, m in whole.named_modules()}
        whole.apply(lambda m: reset(m) if names[id(m)] in paths else None)

    return run


def assert_missing_only(
    model: nn.Module,
    fill: Callable[[nn.Module], Any],
    reference: Fn,
    names: tuple[str, ...] = (),
) -> Any:
    missing = {n for n, t in tensors(model).items() if t.is_meta or n in names}
    real = {n: t for n, t in tensors(model).items() if n not in missing}
    for t in real.values():
        if isinstance(t, nn.Parameter) and t.requires_grad and t.numel():
            t.grad = torch.ones_like(t)
    before = {n: seen(t) for n, t in real.items()}
    whole = whole_copy(model)
    torch.manual_seed(5)
    reference(whole)
    generator = torch.get_rng_state()
    torch.manual_seed(5)
    report = fill(model)
    assert torch.equal(torch.get_rng_state(), generator)
    after = tensors(model)
    for name in missing:
        assert torch.equal(bits(after[name]), bits(tensors(whole)[name])), name
    assert {n: seen(after[n]) for n in before} == before
    assert recording.this_thread.recorder is None
    return report


KINDS = ["mlp", "norms", "recurrent", "encoder", "embeddings", "transformer", "conv", "frozen"]


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_reset(kind: str, every: int, native: None) -> None:
    model = partly_real(kind, every)
    report = assert_missing_only(model, fastinit.materialize_, missing_resets(model))
    report.check()


def everything(m: nn.Module) -> None:
    with torch.no_grad():
        for p in m.parameters(recurse=False):
            nn.init.normal_(p, std=0.02) if p.dim() > 1 else p.uniform_(1, 2)
        for b in m.buffers(recurse=False):
            b.fill_(3)


@pytest.mark.parametrize("kind", KINDS)
def test_functions(kind: str, native: None) -> None:
    """Written for the whole model; a trained backbone is not overwritten by it."""
    model = partly_real(kind, 2)
    fill = lambda m: fastinit.materialize_(m, fn=everything)  # noqa: E731
    assert_missing_only(model, fill, lambda m: m.apply(everything)).check()


@pytest.mark.parametrize("kind", ["mlp", "norms", "recurrent"])
def test_init_model_does_the_same(kind: str) -> None:
    model = partly_real(kind, 2)
    fill = lambda m: fastinit.init_model_(m, everything, only_missing=True)  # noqa: E731
    assert_missing_only(model, fill, lambda m: m.apply(everything)).check()


@pytest.mark.parametrize("kind", ["mlp", "norms", "recurrent"])
def test_seeds(kind: str) -> None:
    """Those of the whole model."""
    whole = ZOO[kind]()
    fastinit.init_model_(whole, everything, seed=3)
    model = partly_real(kind, 2)
    missing = [n for n, t in tensors(model).items() if t.is_meta]
    before = {n: seen(t) for n, t in tensors(model).items() if n not in missing}
    fastinit.materialize_(model, fn=everything, seed=3).check()
    for name in missing:
        assert torch.equal(tensors(model)[name], tensors(whole)[name]), name
    assert {n: seen(tensors(model)[n]) for n in before} == before


def test_false_lets_all_be_written() -> None:
    model = partly_real("norms", 2)
    fastinit.materialize_(model, fn=everything, only_missing=False)
    for p in (*model.parameters(), *model.buffers()):
        assert p.dim() > 1 or (p >= 1).all()


def test_nothing_missing() -> None:
    model = ZOO["mlp"]()
    fill = lambda m: fastinit.init_model_(m, only_missing=True)  # noqa: E731
    assert_missing_only(model, fill, lambda m: None).check()


# ---- what was not loaded ----


@pytest.mark.parametrize("as_returned", [False, True])
def test_names_of_what_was_not_loaded(as_returned: bool, native: None) -> None:
    model = nn.Sequential(nn.Linear(70, 80), nn.Linear(80, 60), nn.BatchNorm1d(60))
    state = model.state_dict()
    for name in ("1.weight", "2.running_var"):
        del state[name]
    result = model.load_state_dict(state, strict=False)
    names = tuple(result.missing_keys)
    assert names == ("1.weight", "2.running_var")
    given = result if as_returned else names

    def reference(m: nn.Module) -> None:
        m[1].reset_parameters()
        m[2].reset_parameters()

    for function in (fastinit.init_model_, fastinit.materialize_):
        fill = lambda m, f=function: f(m, only_missing=given)  # noqa: E731
        report = assert_missing_only(model, fill, reference, names)
        report.check()
        assert {r.name for r in report.rows() if r.status != "kept"} == set(names)


def test_names_of_wrapped_models() -> None:
    """With what the wrapper puts in front, as its load_state_dict says them, or without."""
    model = nn.DataParallel(nn.Sequential(nn.Linear(70, 80), nn.Linear(80, 60)))
    state = model.state_dict()
    del state["module.1.weight"]
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == ["module.1.weight"]
    for names in (missing, ["1.weight"]):
        before = {n: seen(p) for n, p in model.named_parameters()}
        report = fastinit.init_model_(model, only_missing=names)
        after = {n: seen(p) for n, p in model.named_parameters()}
        assert [n for n in before if before[n] != after[n]] == ["module.1.weight"]
        assert "1.weight" not in report.kept


def test_in_a_scope(native: None) -> None:
    """Stand-ins are dropped with their fills though nothing is written before the end."""
    model = nn.ModuleList([Two(), Two()])
    with fastinit.fused() as report:
        fastinit.materialize_(model, fn=everything)
        assert report.written_elements == 0
    assert report.written_elements == 2 * 6400
    for m in model:
        assert torch.equal(m.real, torch.arange(6400.0).view(80, 80))
        assert 0.019 < m.new.std() < 0.021


def test_assigned_checkpoint(native: None) -> None:
    """load_state_dict(strict=False, assign=True) on a model on meta, and a new head."""
    model = on_meta(lambda: nn.Sequential(nn.Linear(70, 80), nn.Linear(80, 60), nn.Linear(60, 50)))
    model.load_state_dict({"0.weight": torch.ones(80, 70)}, strict=False, assign=True)
    model[1] = nn.Linear(80, 60)
    assert_missing_only(model, fastinit.materialize_, missing_resets(model)).check()
    assert (model[0].weight == 1).all()


def test_accelerate(native: None) -> None:
    """Its buffers are real."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    with accelerate.init_empty_weights():
        model = nn.Sequential(nn.Conv2d(3, 80, 5), nn.BatchNorm2d(80), nn.Linear(70, 60))
    model[1].running_mean.fill_(0.5)
    assert [n for n, t in tensors(model).items() if not t.is_meta] == [
        f"1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    ]
    assert_missing_only(model, fastinit.materialize_, missing_resets(model)).check()


# ---- what functions do to stand-ins ----


class Two(nn.Module):
    """One is there, the other is not."""

    def __init__(self) -> None:
        super().__init__()
        self.real = nn.Parameter(torch.arange(6400.0).view(80, 80), requires_grad=False)
        self.new = nn.Parameter(torch.empty(80, 80, device="meta"))
        self.register_buffer("mask", torch.ones(80, 80).tril())


READS: dict[str, Fn] = {
    "copy_": lambda m: m.new.data.copy_(m.real),
    "operator": lambda m: m.new.data.copy_(m.real * m.mask),
    "numpy": lambda m: m.new.data.copy_(torch.from_numpy(m.real.detach().numpy().copy())),
    "tolist": lambda m: m.new.data.copy_(torch.tensor(m.real.tolist())),
    "item": lambda m: m.new.data.fill_(m.real[79, 79].item()),
    "a view": lambda m: m.new.data.t().copy_(m.real.t()[:]),
    "changed before": lambda m: (m.real.data.mul_(2), m.new.data.copy_(m.real)),
    "partly overwritten": lambda m: (m.real.data[0].zero_(), m.new.data.copy_(m.real)),
    "partly filled": lambda m: (m.real.data[:60].fill_(2.0), m.new.data.copy_(m.real)),
    "overwritten": lambda m: (m.real.data.fill_(2.0), m.new.data.copy_(m.real)),
    "initialised": lambda m: (nn.init.normal_(m.real), m.new.data.copy_(m.real)),
    "in a foreach": lambda m: torch._foreach_copy_([m.new.data], [m.real]),
    "state_dict": lambda m: m.new.data.copy_(m.state_dict()["real"]),
    "out": lambda m: torch.add(m.real, 1, out=m.new.data),
}


@pytest.mark.parametrize("how", READS)
def test_reads_find_what_is_there(how: str, native: None) -> None:
    """A function that reads what stays gets its values, or what it has written there itself."""
    fn = lambda m: READS[how](m) if isinstance(m, Two) else None  # noqa: E731
    model = nn.Sequential(Two())
    assert_missing_only(model, lambda m: fastinit.materialize_(m, fn=fn), lambda m: m.apply(fn))


COPIES: dict[str, Fn] = {
    "copy_": lambda m: m.new.data.copy_(m.real),
    "scaled": lambda m: m.new.data.copy_(m.real).mul_(2),
    "a clone": lambda m: setattr(m, "new", nn.Parameter(m.real.detach().clone())),
    "read before": lambda m: (m.real.sum(), m.new.data.copy_(m.real)),
    "turned": lambda m: m.new.data.copy_(m.real.T),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_stand_ins_go_by_the_names_of_what_stays(how: str) -> None:
    """With a seed, as in the whole model: a student that was loaded, and its teacher."""

    def fn(m: nn.Module) -> None:
        if isinstance(m, Two):
            nn.init.normal_(m.real)
            COPIES[how](m)

    whole, model = nn.Sequential(Two()), nn.Sequential(Two())
    whole[0].new = nn.Parameter(torch.empty(80, 80))
    fastinit.init_model_(whole, fn, seed=3).check()
    fastinit.materialize_(model, fn=fn, seed=3).check()
    assert torch.equal(model[0].new, whole[0].new)
    assert torch.equal(model[0].real, torch.arange(6400.0).view(80, 80))


def test_stand_ins_are_not_written() -> None:
    """Their fills are dropped with them: time and memory are those of what is missing."""
    model = nn.ModuleList([Two() for _ in range(3)])

    def fn(m: nn.Module) -> None:
        if isinstance(m, Two):
            nn.init.normal_(m.real)
            nn.init.normal_(m.new)

    report = fastinit.materialize_(model, fn=fn)
    assert (report.written_elements, report.early) == (3 * 6400, [])
    assert report.dropped_elements == 3 * 6400


def test_a_function_that_ties_and_replaces() -> None:
    model = Two()
    real, mask = model.real, model.mask

    def fn(m: nn.Module) -> None:
        m.new = m.real  # tied
        m.mask = torch.zeros(3)
        m.real = nn.Parameter(torch.zeros(2))

    fastinit.materialize_(model, fn=fn)
    assert model.new is model.real is real
    assert model.mask is mask


def test_names_that_are_deleted_and_added() -> None:
    model = Two()

    def fn(m: nn.Module) -> None:
        del m.mask
        nn.init.ones_(m.new)
        m.register_buffer("more", torch.ones(2))

    fastinit.materialize_(model, fn=fn)
    assert set(tensors(model)) == {"real", "new", "more"}


def test_exceptions_put_back_what_was_there() -> None:
    model = Two()
    before = tensors(model)

    def fn(m: nn.Module) -> None:
        nn.init.zeros_(m.real)
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        fastinit.materialize_(model, fn=fn)
    assert all(t is before[n] for n, t in tensors(model).items())
    assert torch.equal(model.real, torch.arange(6400.0).view(80, 80))
    assert recording.this_thread.recorder is None


def test_real_tensors_over_one_memory() -> None:
    model = Two()
    model.part = nn.Parameter(model.real.data[:40], requires_grad=False)
    model.tied = model.real

    def fn(m: nn.Module) -> None:
        m.part.data.zero_()
        m.new.data.copy_(m.real)
        assert m.tied is m.real

    fastinit.materialize_(model, fn=fn)
    assert model.tied is model.real
    assert torch.equal(model.real, torch.arange(6400.0).view(80, 80))
    assert torch.equal(model.part, model.real[:40])
    assert (model.new[:40] == 0).all()
    assert torch.equal(model.new[40:], model.real[40:])


def test_flat_weights_of_recurrent_layers() -> None:
    model = partly_real("recurrent", 2)
    fastinit.materialize_(model)
    for m in model.modules():
        if isinstance(m, nn.RNNBase):
            assert [id(w) for w in m._flat_weights] == [
                id(getattr(m, n)) for n in m._flat_weights_names
            ]


def test_notes_on_parameters() -> None:
    """Mamba's and others' functions look at them; transformers' mark says that it was loaded."""
    model = Two()
    model.real.note, model.new.note, model.new._is_hf_initialized = 1, 2, True

    def fn(m: nn.Module) -> None:
        assert (m.real.note, m.new.note) == (1, 2)
        assert not hasattr(m.new, "_is_hf_initialized")
        nn.init.zeros_(m.new)

    fastinit.materialize_(model, fn=fn).check()


def test_weights_of_recurrent_layers_by_their_list() -> None:
    model = nn.Sequential(nn.LSTM(70, 80), Two())
    before = {n: seen(p) for n, p in model[0].named_parameters()}

    def fn(m: nn.Module) -> None:
        for w in m._flat_weights if isinstance(m, nn.LSTM) else m.parameters(recurse=False):
            nn.init.ones_(w)

    fastinit.materialize_(model, fn=fn).check()
    assert {n: seen(p) for n, p in model[0].named_parameters()} == before


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_lazy_and_scripted_modules() -> None:
    scripted = torch.jit.script(nn.Linear(3, 3))
    model = nn.Sequential(nn.LazyLinear(5), scripted, Two())
    before = [p.detach().clone() for p in scripted.parameters()]

    def fn(m: nn.Module) -> None:
        for p in m.parameters(recurse=False):
            if not nn.parameter.is_lazy(p):
                nn.init.ones_(p)

    fastinit.materialize_(model, fn=fn)
    assert all(map(torch.equal, before, scripted.parameters()))
    assert nn.parameter.is_lazy(model[0].weight)


# ---- torch.__future__.set_swap_module_params_on_conversion ----


@pytest.fixture
def swapping() -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("kind", ["mlp", "norms", "tied", "recurrent", "shared"])
def test_swapped_parameters_stay_the_same_objects(kind: str, native: None) -> None:
    """As torch's to_empty does then: an optimizer made before has the new memory."""
    model, expected = on_meta(ZOO[kind]), on_meta(ZOO[kind])
    objects = dict(model.named_parameters(remove_duplicate=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    torch.manual_seed(5)
    expected.to_empty(device="cpu").apply(reset)
    if kind == "tied":  # torch's ties stay then, too
        assert expected.head.weight is expected.embedding.weight
    torch.manual_seed(5)
    fastinit.materialize_(model).check()
    for name, p in model.named_parameters(remove_duplicate=False):
        assert p is objects[name]
        assert type(p) is nn.Parameter
        assert torch.equal(bits(p), bits(expected.get_parameter(name))), name
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }


@pytest.mark.usefixtures("swapping")
def test_swapped_back_where_nobody_wrote() -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    objects = list(model.parameters())
    model[1].bias = model[0].bias
    with pytest.warns(UserWarning, match=r"^2 tensors .*: 0\.bias, 1\.bias\. "):
        fastinit.materialize_(model, fn=lambda m: nn.init.ones_(m.weight) if m in model else None)
    assert [p.is_meta for p in objects] == [False, True, False, True]
    assert model[0].bias is model[1].bias is objects[1]
    assert model[0].weight is objects[0]


# ---- LoRA ----


class Lora(nn.Module):
    """A layer of peft: the base is there, and B is zero so that the model starts as it was."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, base.out_features, bias=False)})

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        assert init_lora_weights in (True, "gaussian")
        if init_lora_weights is True:
            nn.init.kaiming_uniform_(self.lora_A[adapter_name].weight, a=5**0.5)
        else:
            nn.init.normal_(self.lora_A[adapter_name].weight, std=1 / 8)
        nn.init.zeros_(self.lora_B[adapter_name].weight)


class Config:
    init_lora_weights = "gaussian"


class Owner(nn.Module):
    """The base model has an init of its own, which knows nothing of adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Linear(90, 80)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias) if module.bias is not None else None


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("how", [True, "gaussian"])
def test_lora_on_meta(own: bool, how: Any, native: None) -> None:
    model = Owner() if own else nn.ModuleDict({"layer": nn.Linear(90, 80)})
    base = model["layer"] if not own else model.layer
    with torch.device("meta"):
        lora = Lora(nn.Linear(90, 80))
    lora.base_layer = base
    if own:
        model.layer = lora
    else:
        model["layer"] = lora
    if how == "gaussian":
        model.peft_config = {"default": Config()}

    def reference(m: nn.Module) -> None:
        layer = m.layer if own else m["layer"]
        if own:
            m.apply(m._init_weights)
        else:
            layer.lora_A.apply(reset)
            layer.lora_B.apply(reset)
        layer.reset_lora_parameters("default", how)

    assert_missing_only(model, fastinit.materialize_, reference).check()
    assert (lora.lora_B["default"].weight == 0).all()


def test_peft(native: None) -> None:
    """The library itself."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 70))
    config = peft.LoraConfig(r=8, target_modules=["0", "1"])
    model = peft.get_peft_model(base, config, low_cpu_mem_usage=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.is_meta}
    fastinit.materialize_(model).check()
    for name, p in model.named_parameters():
        assert not p.is_meta
        assert "lora_B" not in name or (p == 0).all()
        assert name not in before or torch.equal(p, before[name])
