# SPDX-License-Identifier: BSD-3-Clause
"""Models that bring their own initialisation: what is called without `fn`, and what counts as one.

The reference is torch: the model's method, then `reset_parameters` of modules with something that
it left, on a model that has memory.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastinit
from tests.support.compare import assert_equal_seen
from tests.support.models import model_state, on_meta, reset

pytestmark = pytest.mark.usefixtures("large_from_4096")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(90, 70)
        self.body = nn.Sequential(nn.Linear(70, 80), nn.LayerNorm(80), nn.Linear(80, 60))


def small(m: nn.Module) -> None:
    if isinstance(m, nn.Linear | nn.Embedding):
        nn.init.normal_(m.weight, std=0.02)


class Whole(Base):
    """As nanochat and torchtitan do: everything, by name."""

    @torch.no_grad()
    def init_weights(self) -> None:
        for p in self.parameters():
            p.uniform_(-0.01, 0.01)


class Weights(Base):
    """As most do: biases and norms are left to what made them."""

    def init_weights(self) -> None:
        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        small(m)


class OfModule(Base):
    def _init_weights(self, module: nn.Module) -> None:
        small(module)


class Static(Base):
    @staticmethod
    def _init_weights(m: nn.Module) -> None:
        small(m)


class Optional(Base):
    """As timm's, and others' that can load."""

    def init_weights(self, mode: str = "", pretrained: str | None = None) -> None:
        assert (mode, pretrained) == ("", None)
        self.apply(small)


class WithDevice(Base):
    def init_weights(self, buffer_device: torch.device) -> None:
        assert buffer_device == torch.device("cpu")
        self.apply(small)


class Initialize(Weights):
    """transformers' name goes before the others."""

    def initialize_weights(self) -> None:
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)


CALLS: dict[type[Any], tuple[str, Callable[[Any], Any]]] = {
    Whole: ("Whole.init_weights()", lambda m: m.init_weights()),
    Weights: ("Weights.init_weights()", lambda m: m.init_weights()),
    OfModule: ("OfModule._init_weights(module)", lambda m: m.apply(m._init_weights)),
    Static: ("Static._init_weights(module)", lambda m: m.apply(m._init_weights)),
    Optional: ("Optional.init_weights()", lambda m: m.init_weights()),
    WithDevice: ("WithDevice.init_weights()", lambda m: m.init_weights(torch.device("cpu"))),
    Initialize: ("Initialize.initialize_weights()", lambda m: m.initialize_weights()),
}
NOT_LEFT = (Whole, Initialize)


def rest(m: nn.Module) -> None:
    """What the method left alone, by resetting whole modules and putting back what it wrote."""
    for x in m.modules():
        if hasattr(x, "reset_parameters"):
            kept = {n: p.detach().clone() for n, p in x.named_parameters() if n == "weight"}
            if isinstance(x, nn.Embedding):  # nothing is left of it
                continue
            reset(x)
            with torch.no_grad():
                for n, value in kept.items() if not isinstance(x, nn.LayerNorm) else ():
                    getattr(x, n).copy_(value)


def values(model: nn.Module) -> dict[str, Any]:
    state = {k: v for k, v in model_state(model).items() if not k.endswith(" version")}
    return {**state, "generator": torch.get_rng_state()}


def eager(kind: type[Any]) -> dict[str, Any]:
    model = kind()
    torch.manual_seed(7)
    CALLS[kind][1](model)
    if kind not in NOT_LEFT:
        rest(model)
    return values(model)


def fill(model: nn.Module, how: str, seed: int | None = None) -> Any:
    if how == "record":
        return fastinit.record(model).run(seed=seed)
    return (fastinit.materialize_ if how == "meta" else fastinit.init_model_)(model, seed=seed)


@pytest.mark.parametrize("how", ["meta", "real", "record"])
@pytest.mark.parametrize("kind", CALLS)
def test_its_own(kind: type[Any], how: str, native: None) -> None:
    model = on_meta(kind) if how == "meta" else kind()
    torch.manual_seed(7)
    report = fill(model, how)
    assert_equal_seen(eager(kind), values(model), kind.__name__)
    if report is not None:
        report.check()
        assert report.initialised_by[0] == CALLS[kind][0]
        assert f"Initialised by {CALLS[kind][0]}" in str(report)
        assert len(report.initialised_by) == (1 if kind in NOT_LEFT else 2)


@pytest.mark.parametrize("kind", CALLS)
def test_seeds_agree(kind: type[Any]) -> None:
    """Names are all that counts, so the three ways give the same, as does `fused` around them."""
    seen = []
    for how in ("meta", "real", "record"):
        model = on_meta(kind) if how == "meta" else kind()
        fill(model, how, seed=3)
        seen.append({n: p.detach() for n, p in model.named_parameters()})
    model = kind()
    with fastinit.fused(seed=3):
        model = kind()
        CALLS[kind][1](model)
        if kind not in NOT_LEFT:
            rest(model)
    seen.append({n: p.detach() for n, p in model.named_parameters() if "weight" in n})
    for other in seen[1:]:
        for name, p in other.items():
            assert torch.equal(seen[0][name], p), name


def test_what_is_left_is_named() -> None:
    report = fastinit.materialize_(on_meta(Weights))
    left = "body.0.bias, body.1.weight, body.1.bias and 1 more"
    assert report.initialised_by[1] == f"reset_parameters for what that left: {left}"


def test_the_plain_walk() -> None:
    for make, fill_ in ((on_meta, fastinit.materialize_), (lambda f: f(), fastinit.init_model_)):
        model = make(Weights)
        torch.manual_seed(7)
        report = fill_(model, fn=fastinit.reset_parameters)
        expected = Weights()
        torch.manual_seed(7)
        expected.apply(reset)
        assert_equal_seen(values(expected), values(model), "model")
        assert report.initialised_by == ["reset_parameters"]


class Part(nn.Module):
    """A model in a model, as a LightningModule has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.model, self.head = nn.Linear(70, 70), Whole(), nn.Linear(70, 70)


def test_a_model_in_a_model() -> None:
    model = on_meta(Part)
    torch.manual_seed(7)
    report = fastinit.materialize_(model)
    expected = Part()
    torch.manual_seed(7)
    expected.first.reset_parameters()
    expected.model.init_weights()
    expected.head.reset_parameters()
    assert_equal_seen(values(expected), values(model), "model")
    assert report.initialised_by == [
        "model: Whole.init_weights()",
        "reset_parameters of each module",
    ]


def test_a_model_in_two_places_is_initialised_once() -> None:
    def make() -> nn.Module:
        shared = Whole()
        return nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)])

    model = on_meta(make)
    torch.manual_seed(7)
    fastinit.materialize_(model)
    assert_equal_seen(eager(Whole), values(model[0][0]), "model")


class Forwarding(nn.Module):
    """As peft's and torch.compile's wrappers, which hand on the attributes of what they wrap."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.lora = base, nn.Linear(70, 70)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def test_wrappers_that_forward_attributes() -> None:
    model = on_meta(lambda: Forwarding(Whole()))
    assert callable(model.init_weights)
    report = fastinit.materialize_(model)
    assert report.initialised_by[0] == "base: Whole.init_weights()"
    assert model.lora.weight.abs().max() > 0.02
    compiled = torch.compile(Whole(), backend="eager")
    assert fastinit.init_model_(compiled).initialised_by == ["_orig_mod: Whole.init_weights()"]


class Few(Base):
    """Writes one weight and some small tensors, which torch's own functions fill."""

    def init_weights(self) -> None:
        nn.init.normal_(self.emb.weight, std=0.02)
        nn.init.ones_(self.body[0].bias)
        nn.init.normal_(self.body[1].weight)
        nn.init.uniform_(self.body[1].bias)


@pytest.mark.parametrize("how", ["meta", "real", "record"])
def test_modules_left_as_a_whole_are_reset_once(how: str) -> None:
    model = on_meta(Few) if how == "meta" else Few()
    torch.manual_seed(7)
    fill(model, how)
    expected = Few()
    torch.manual_seed(7)
    expected.init_weights()
    expected.body[0].reset_parameters()  # its weight is left
    nn.init.ones_(expected.body[0].bias)
    expected.body[2].reset_parameters()
    assert_equal_seen(values(expected), values(model), "model")


class Orthogonal(Base):
    def init_weights(self) -> None:
        nn.init.orthogonal_(self.body[0].weight)


@pytest.mark.parametrize("how", ["meta", "real", "record"])
def test_what_torch_itself_does_is_written(how: str) -> None:
    fastinit.set_orthogonal("torch")
    try:
        model = on_meta(Orthogonal) if how == "meta" else Orthogonal()
        fill(model, how)
    finally:
        fastinit.set_orthogonal("native")
    weight = model.body[0].weight.detach()
    assert torch.allclose(weight.T @ weight, torch.eye(70), atol=1e-5)


# ---- methods that only look like it ----


class Flag(Base):
    init_weights = True  # an option


class Std(Base):
    def init_weights(self, init_std: float) -> None:
        raise AssertionError


class Unsaid(Base):
    def _init_weights(self, std) -> None:  # type: ignore[no-untyped-def]
        raise AssertionError


class Helper(Base):
    """As stable-baselines3's policies, which call it with a gain for each layer."""

    @staticmethod
    def init_weights(module: nn.Module, gain: float = 1) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (Flag, ""),
        (Std, r"Std\.init_weights\(init_std\)"),
        (Unsaid, r"Unsaid\._init_weights\(std\)"),
        (Helper, r"Helper\.init_weights\(module, gain\)"),
    ],
)
@pytest.mark.parametrize("how", ["meta", "real", "record"])
def test_not_called(kind: type[Any], call: str, how: str) -> None:
    """What takes more than a module is not called, and the caller is told so."""
    model = on_meta(kind) if how == "meta" else kind()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(7)
        report = fill(model, how)
    assert len(caught) == bool(call)
    if caught:
        with pytest.warns(UserWarning, match=f"^{call} is not called, since"):
            warnings.warn(caught[0].message, stacklevel=1)
        assert caught[0].filename == __file__
    if report is not None:
        assert report.initialised_by == ["reset_parameters of each module"]
    expected = kind()
    torch.manual_seed(7)
    expected.apply(reset)
    assert_equal_seen(values(expected), values(model), "model")


# ---- fn ----


def test_bound_methods_are_called_once() -> None:
    for fn in (
        lambda m: m.init_weights,
        lambda m: lambda: m.init_weights(),
        lambda m: functools.partial(m.init_weights),
        lambda m: type(m).init_weights,
    ):
        for how in (fastinit.init_model_, lambda m, f: fastinit.record(m, f).run()):
            model = Whole()
            torch.manual_seed(7)
            how(model, fn(model))
            assert_equal_seen(eager(Whole), values(model), "model")
    model = on_meta(Whole)
    torch.manual_seed(7)
    fastinit.materialize_(model, fn=model.init_weights)
    assert_equal_seen(eager(Whole), values(model), "model")


@pytest.mark.parametrize(
    ("kind", "fn"),
    [
        (Optional, lambda m: m.init_weights),
        (WithDevice, lambda m: m.init_weights),
        (
            WithDevice,
            lambda m: functools.partial(m.init_weights, buffer_device=torch.device("cpu")),
        ),
        (OfModule, lambda m: m._init_weights),
        (OfModule, lambda m: OfModule._init_weights),
        (Static, lambda m: Static._init_weights),
        (Weights, lambda m: small),
        (Weights, lambda m: lambda *args: small(*args)),
        (Weights, lambda m: lambda module=None: small(module)),
        (Weights, lambda m: functools.partial(lambda m, f: f(m), f=small)),
    ],
)
def test_other_functions(kind: type[Any], fn: Callable[[Any], Any]) -> None:
    """With fn nothing is done for what it leaves."""
    model, expected = kind(), kind()
    expected.load_state_dict(model.state_dict())
    torch.manual_seed(7)
    expected.apply(small)
    want = values(expected)
    torch.manual_seed(7)
    fastinit.init_model_(model, fn(model))
    assert_equal_seen(want, values(model), "model")


def test_reset_parameters_of_the_model() -> None:
    model, expected = nn.LSTM(70, 80), nn.LSTM(70, 80)
    torch.manual_seed(7)
    expected.reset_parameters()
    want = values(expected)
    torch.manual_seed(7)
    fastinit.init_model_(model, model.reset_parameters)
    assert_equal_seen(want, values(model), "model")


# ---- methods that only change what a constructor has made ----


class Scaled(Base):
    """Rescales one weight, zeroes a row of another, overwrites one bias half by half."""

    def init_weights(self) -> None:
        with torch.no_grad():
            self.body[0].weight.mul_(0.1)
            self.emb.weight[3].zero_()
            self.body[2].bias[:30].fill_(1)
            self.body[2].bias[30:].fill_(2)


class Copied(Base):
    """A student and its teacher, in numpy's way and torch's."""

    def init_weights(self) -> None:
        self.body[2].bias.data.copy_(self.body[0].bias.data[:60])
        self.body[0].bias.data.add_(float(self.body[0].bias.detach().numpy().max()))


def constructed(kind: type[Any], seed: int) -> nn.Module:
    """Each tensor has its own law's numbers: the plain walk, then the method."""
    model = kind()
    fastinit.init_model_(model, fastinit.reset_parameters, seed=seed)
    model.init_weights()
    return model


@pytest.mark.parametrize("how", ["meta", "real"])
@pytest.mark.parametrize("kind", [Scaled, Copied])
def test_what_is_changed_is_reset_before(kind: type[Any], how: str) -> None:
    """Seeded, so that the order of draws means nothing: as in a constructor."""
    model = on_meta(kind) if how == "meta" else kind()
    fill(model, how, seed=3).check()
    for (name, a), b in zip(model.named_parameters(), constructed(kind, 3).parameters()):
        assert torch.equal(a, b), name


def test_what_is_changed_is_reset_before_without_a_seed() -> None:
    model = on_meta(Scaled)
    torch.manual_seed(7)
    fastinit.materialize_(model).check()
    generator = torch.get_rng_state()
    expected = Scaled()
    torch.manual_seed(7)
    with torch.no_grad():
        expected.body[0].reset_parameters()  # its weight is changed first
        weight = expected.body[0].weight.mul(0.1)
        expected.emb.reset_parameters()  # of it a row is overwritten
        expected.body[0].reset_parameters()  # its bias is left
        expected.body[0].weight.copy_(weight)
        expected.body[1].reset_parameters()
        expected.emb.weight[3].zero_()
        expected.body[2].bias[:30].fill_(1)
        expected.body[2].bias[30:].fill_(2)
        kept = expected.body[2].bias.clone()
        expected.body[2].reset_parameters()  # its weight is left
        expected.body[2].bias.copy_(kept)
    for (name, a), b in zip(model.named_parameters(), expected.parameters()):
        assert torch.equal(a, b), name
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_model_that_is_there_is_changed_as_it_is() -> None:
    """Without a seed it is the method of the model: nothing is drawn for what that changes."""
    model, expected = Scaled(), Scaled()
    expected.load_state_dict(model.state_dict())
    expected.init_weights()
    fastinit.init_model_(model)
    assert torch.equal(model.body[0].weight, expected.body[0].weight)
    assert torch.equal(model.emb.weight, expected.emb.weight)
