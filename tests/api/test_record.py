# SPDX-License-Identifier: BSD-3-Clause
"""record: what a function does to a model, as a Plan that does it again and again."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.init as torch_init
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.init import dirac_, kaiming_uniform_, normal_, trunc_normal_
from torch.nn.modules import module

import fastinit
from fastinit import record
from fastinit.core import recording
from tests.support.compare import BF16, F64, assert_equal_seen, bits
from tests.support.marks import slow
from tests.support.models import ZOO, model_state

Make = Callable[[], nn.Module]
Fn = Callable[..., Any]


def state_of(model: nn.Module, g: torch.Generator, versions: bool) -> dict[str, Any]:
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in model_state(model).items()}
    if not versions:
        state = {k: v for k, v in state.items() if not k.endswith(" version")}
    return {**state, "explicit": g.get_state(), "default": torch.get_rng_state()}


def nothing_is_left() -> None:
    assert recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0
    for name, function in fastinit.dispatch.ORIGINALS.items():
        assert getattr(torch_init, name) is function
    assert not module._global_parameter_registration_hooks
    assert not module._global_buffer_registration_hooks


def reset(m: nn.Module, g: torch.Generator) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(m, name):
            getattr(m, name)()
            return


def assert_same_runs(
    make: Make, fn: Fn | None, *, runs: int = 3, versions: bool = False
) -> fastinit.Plan:
    """Record once, run often; torch applies the function as often. fn gets a generator, too."""
    seen: list[list[dict[str, Any]]] = []
    made: list[Any] = []
    for fast in (False, True):
        torch.manual_seed(3)
        model = make()
        torch.manual_seed(11)
        g = torch.Generator().manual_seed(12)
        states: list[dict[str, Any]] = []

        def call(m: nn.Module, g: torch.Generator = g) -> Any:
            return (fn or reset)(m, g)

        if fast:
            before = state_of(model, g, versions)
            made.append(record(model, None if fn is None else call))
            nothing_is_left()
            assert_equal_seen(before, state_of(model, g, versions), "recording")
        for _ in range(runs):
            made[0].run() if fast else model.apply(call)
            states.append(state_of(model, g, versions))
        seen.append(states)
    for i, (expected, found) in enumerate(zip(*seen, strict=True)):
        assert_equal_seen(expected, found, f"run {i}")
    return made[0]


KINDS = [
    *("linear", "mlp", "conv", "transposed_conv", "channels_last", "norms", "recurrent", "tied"),
    *("lstm_projection", "bilinear_prelu", "attention", "encoder", "decoder_layer", "transformer"),
    *("shared", "views", "frozen", "no_parameters", "embeddings"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_reset(kind: str) -> None:
    made = assert_same_runs(ZOO[kind], None)
    assert (len(made) == 0) == (kind == "no_parameters")


@pytest.mark.parametrize("dtype", [BF16, *slow([F64])], ids=str)
@pytest.mark.parametrize("kind", ["mlp", "norms", "embeddings", "transformer"])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    assert_same_runs(lambda: ZOO[kind]().to(dtype), None)


def test_same_as_init_model() -> None:
    """And draws on from wherever the generators are."""
    one, two = ZOO["transformer"](), ZOO["transformer"]()
    made = record(two)
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        fastinit.init_model_(one)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        made.run()
        assert torch.equal(state, torch.get_rng_state())
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(bits(p), bits(q))


def test_it_is_native_and_fused() -> None:
    made = record(ZOO["mlp"]())
    made.run()
    count = fastinit.core.kernels.native_fills
    made.run()
    assert fastinit.core.kernels.native_fills - count == len(made) == 3


# ---- functions ----


class Two(nn.Module):
    """A matrix, a bias, a stack of kernels, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 80 * 70).view(80, 70))
        self.b = nn.Parameter(torch.linspace(1, 2, 41))
        self.k = nn.Parameter(torch.linspace(-2, 2, 8 * 6 * 9).view(8, 6, 3, 3))
        self.register_buffer("mask", torch.ones(9, 9))


Case = Callable[[Two, torch.Generator], Any]
CASES: dict[str, Case] = {
    "uniform_": lambda m, g: torch_init.uniform_(m.w, -1, 2),
    "normal_": lambda m, g: torch_init.normal_(m.w, 1, 2),
    "trunc_normal_": lambda m, g: torch_init.trunc_normal_(m.w, std=0.02),
    "trunc_normal_ cut": lambda m, g: torch_init.trunc_normal_(m.w, 0, 1, -0.5, 1),
    "trunc_normal_ of a tail": lambda m, g: torch_init.trunc_normal_(m.w, 0, 1, 1.5, 3),
    "trunc_normal_ imported before": lambda m, g: trunc_normal_(m.w, std=0.02),
    "kaiming_uniform_ imported before": lambda m, g: kaiming_uniform_(m.k, a=1),
    "normal_ imported before": lambda m, g: normal_(m.w, std=2, generator=g),
    "dirac_ imported before": lambda m, g: dirac_(m.k),
    "orthogonal_": lambda m, g: (torch_init.orthogonal_(m.w, 1.5), torch_init.orthogonal_(m.k)),
    "sparse_": lambda m, g: torch_init.sparse_(m.w, 0.3),
    "sparse_ of two generators": lambda m, g: torch_init.sparse_(m.w, 0.3, generator=g),
    "dirac_": lambda m, g: torch_init.dirac_(m.k, 2),
    "eye_": lambda m, g: torch_init.eye_(m.w),
    "constant_": lambda m, g: (torch_init.constant_(m.w, 0.3), torch_init.ones_(m.mask)),
    "fastinit's": lambda m, g: (fastinit.xavier_normal_(m.w), fastinit.kaiming_uniform_(m.k)),
    "explicit generator": lambda m, g: (
        torch_init.normal_(m.w, generator=g),
        torch_init.uniform_(m.k),
        m.b.data.normal_(generator=g),
    ),
    "odd sizes, cached normals": lambda m, g: (
        m.b.data[:5].normal_(),
        m.b.data[:7].normal_(generator=g),
        m.b.data[:5].normal_(),
        m.w.data.normal_(),
    ),
    "in place after": lambda m, g: torch_init.normal_(m.w).data.mul_(0.02).clamp_(-0.01, 0.03),
    "div_, add_, sub_": lambda m, g: (
        torch_init.uniform_(m.w).data.div_(3).add_(1).sub_(m.b.data[0])
    ),
    "in place alone": lambda m, g: m.w.data.mul_(0.5).clamp_(-0.4, 0.3),
    "operators": lambda m, g: (m.w.data.__imul__(2), m.b.data.__itruediv__(3)),
    "of each other": lambda m, g: (
        m.w.data.normal_(),
        m.b.data.copy_(m.w.data[0, :41]),
        m.w.data.mul_(m.b.data[0]),
        m.b.data.zero_(),
    ),
    "copy_": lambda m, g: m.w.data.copy_(torch.arange(70.0)),
    "copy_ of an array": lambda m, g: m.b.data.copy_(torch.from_numpy(np.arange(41.0))),
    "setitem": lambda m, g: (
        m.w.data.__setitem__(3, 1.5),
        m.w.data.__setitem__((0, 1), torch.ones(())),
    ),
    "slices": lambda m, g: (
        m.w.data[::2].normal_(),
        m.w.data[1::2, 3:].zero_(),
        m.k.data[1].mul_(2),
    ),
    "views": lambda m, g: (m.w.data.t().normal_(), m.w.data.view(-1)[5:90].uniform_()),
    "padding": lambda m, g: (torch_init.normal_(m.w), m.w.data[3].zero_()),
    "twice": lambda m, g: (
        torch_init.normal_(m.w),
        torch_init.zeros_(m.w),
        torch_init.uniform_(m.w),
    ),
    "other laws": lambda m, g: (
        m.w.data.exponential_(),
        m.k.data.bernoulli_(0.3),
        m.b.data.cauchy_(generator=g),
        m.mask.random_(0, 9),
    ),
    "random mask": lambda m, g: m.w.data.mul_(torch.empty(80, 70).bernoulli_(0.5)),
    "temporary": lambda m, g: m.w.data.copy_(torch.empty(80, 70).uniform_()),
    "temporary, changed": lambda m, g: m.w.data.copy_(torch.empty(80, 70).normal_().mul_(3).abs_()),
    "temporaries added": lambda m, g: m.w.data.add_(torch.empty(80, 70).normal_(generator=g)),
    "temporary is a window": lambda m, g: m.b.data.copy_(torch.empty(90).normal_()[3:85:2]),
    "constants computed": lambda m, g: m.b.data.copy_(1 / torch.arange(1, 42)),
    "masks": lambda m, g: (
        m.mask.fill_(1),
        m.mask.tril_(),
        m.w.data.masked_fill_(torch.eye(80, 70) > 0, 4),
    ),
    "indices": lambda m, g: m.w.data.index_fill_(0, torch.tensor([1, 5]), 7.0),
    "lists": lambda m, g: (
        torch._foreach_zero_([m.w.data, m.k.data]),
        torch._foreach_add_([m.w.data, m.b.data], 2),
    ),
    "renorm_": lambda m, g: torch_init.normal_(m.w).data.renorm_(2, 0, 1.0),
    "shapes are read": lambda m, g: m.w.data.mul_(m.w.numel() ** -0.5 * len(m.b) * m.w.stride(0)),
    "no_grad": lambda m, g: torch.no_grad()(lambda: (m.w.normal_(), m.b.fill_(1)))(),
    "modes": lambda m, g: (m.train(False), m.requires_grad_(True)),
    "views with gaps": lambda m, g: m.w.data[::3, ::2].uniform_(generator=g),
    "detached": lambda m, g: (m.w.detach().normal_(), m.b.detach()[1:].zero_()),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("own_factors")
def test_function(name: str) -> None:
    assert_same_runs(Two, CASES[name])


def test_one_generator_for_functions_and_operators() -> None:
    """However it reaches the recorder, it is one generator."""

    def fn(m: Two, g: torch.Generator) -> None:
        torch_init.normal_(m.w, generator=g)
        m.b.data.normal_(generator=g)
        torch_init.uniform_(m.k, generator=g)
        m.mask.uniform_(generator=torch.default_generator)
        torch_init.uniform_(m.b.data[3:9])

    assert_same_runs(Two, fn)


@pytest.mark.slow
def test_everything_in_order() -> None:
    def fn(m: Two, g: torch.Generator) -> None:
        for name, case in CASES.items():
            if name != "copy_ of an array":
                case(m, g)

    assert_same_runs(Two, fn, runs=2)


@pytest.mark.parametrize(
    "name", ["uniform_", "kaiming_uniform_ imported before", "in place after", "no_grad", "padding"]
)
def test_versions(name: str) -> None:
    """Recording leaves them; each run moves them as torch does."""
    assert_same_runs(Two, CASES[name], versions=True)


@pytest.mark.parametrize("kind", ["mlp", "embeddings", "transformer"])
def test_versions_of_reset(kind: str) -> None:
    assert_same_runs(ZOO[kind], None, versions=True)


def test_versions_of_operators() -> None:
    def fn(m: Two, g: torch.Generator) -> None:
        with torch.no_grad():
            m.w.normal_().mul_(2)
            m.b[3:].zero_()
            m.mask.copy_(torch.eye(9))

    assert_same_runs(Two, fn, versions=True)


# ---- what is not the model's ----


def test_temporary_changed_after_it_was_copied() -> None:
    def fn(m: Two, g: torch.Generator) -> None:
        t = torch.ones(41)
        m.b.data.copy_(t)
        t.mul_(2)
        m.k.data[0, 0, 0].copy_(t[:3])

    with pytest.raises(RuntimeError, match=r"record: aten.mul_.Tensor"):
        record(Two(), lambda m: fn(m, torch.Generator()))


def test_temporary_is_made_anew_in_each_run() -> None:
    def fn(m: Two, g: torch.Generator) -> None:
        t = torch.linspace(-1, 1, 41)
        t[0].zero_()
        t.mul_(2)
        m.b.data.copy_(t)

    assert_same_runs(Two, fn)


def test_array_changed_after_it_was_copied() -> None:
    def fn(m: Two, g: torch.Generator) -> None:
        t = torch.ones(41)
        m.b.data.copy_(t)
        t.numpy().fill(5)

    with pytest.raises(RuntimeError, match=r"record: Tensor.numpy"):
        record(Two(), lambda m: fn(m, torch.Generator()))


@pytest.mark.parametrize("own", [False, True])
def test_filled_with_what_is_drawn(own: bool) -> None:
    """fill_ with a tensor that has its value only later."""

    def fn(m: Two, g: torch.Generator) -> None:
        t = m.k.data[0, 0, 0, 0] if own else torch.empty(())
        t.uniform_(5, 6)
        m.b.data.fill_(t)

    assert_same_runs(Two, fn)


@pytest.mark.parametrize(
    "make",
    [torch.zeros_like, torch.empty_like, lambda t: t.new_zeros(80, 70), torch.ones_like],
    ids=["zeros_like", "empty_like", "new_zeros", "ones_like"],
)
def test_what_only_has_the_shape_is_no_read(make: Callable[..., torch.Tensor]) -> None:
    assert_same_runs(Two, lambda m, g: m.w.data.copy_(make(m.w.data).fill_(3)))


def test_seeds_set_by_the_function() -> None:
    """Either the plan sets them as well, or it cannot be recorded."""

    def fn(m: Two, g: torch.Generator) -> None:
        torch.manual_seed(5)
        torch_init.normal_(m.w)

    model = Two()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    try:
        made = record(model, fn=lambda m: fn(m, torch.default_generator))
    except RuntimeError:
        nothing_is_left()
        return
    assert torch.equal(state, torch.get_rng_state()), "recording moved the generator"
    made.run()
    expected = Two()
    fn(expected, torch.default_generator)
    assert torch.equal(expected.w, model.w)


class Mine(nn.Parameter):
    """A parameter that no kernel of fastinit takes."""


class Special(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = Mine(torch.zeros(80, 70))


@pytest.mark.parametrize(
    "fn",
    [
        lambda m, g: torch_init.normal_(m.w),
        lambda m, g: torch_init.ones_(m.w),
        lambda m, g: torch.no_grad()(m.w.normal_)(),
        lambda m, g: torch.no_grad()(m.w.fill_)(2),
        lambda m, g: m.w.data.normal_(),
    ],
    ids=["init.normal_", "init.ones_", "normal_", "fill_", "data.normal_"],
)
def test_parameter_subclass(fn: Fn) -> None:
    assert_same_runs(Special, fn)


# ---- what cannot be recorded ----

READS: dict[str, tuple[Callable[[Two], Any], str]] = {
    "sum": (lambda m: m.w.sum(), "aten.sum"),
    "item": (lambda m: m.b[0].item(), "_local_scalar_dense"),
    "float": (lambda m: float(m.b[0]), "_local_scalar_dense"),
    "format": (lambda m: f"{m.b[0]:.2f}", "_local_scalar_dense"),
    "norm": (lambda m: m.w.norm(), "linalg_vector_norm"),
    "qr": (lambda m: torch.linalg.qr(m.w), "linalg_qr"),
    "svd": (lambda m: torch.linalg.svd(m.w), "linalg_svd"),
    "comparison": (lambda m: bool((m.w > 0).any()), "aten.gt"),
    "equal": (lambda m: torch.equal(m.w, m.w), "aten.equal"),
    "out of place": (lambda m: m.w * 2, "aten.mul"),
    "clone": (lambda m: m.w.clone(), "aten.clone"),
    "deepcopy": (lambda m: copy.deepcopy(m.w), "aten.clone"),
    "matmul": (lambda m: m.w.data.t() @ m.w.data, "aten.mm"),
    "advanced indexing": (lambda m: m.w[[1, 2]], "aten.index"),
    "buffer": (lambda m: m.mask.sum(), "aten.sum"),
    "window": (lambda m: m.w.data.t()[3].max(), "aten.max"),
    "dtype": (lambda m: m.w.double(), "aten._to_copy"),
    "nonzero": (lambda m: m.w.nonzero(), "aten.nonzero"),
    "isnan": (lambda m: m.w.isnan().any(), "aten.isnan"),
    "out": (lambda m: torch.add(m.mask, 1, out=m.mask), "aten.add"),
    "state_dict": (lambda m: {k: v.clone() for k, v in m.state_dict().items()}, "aten.clone"),
    "a temporary that is filled": (lambda m: torch.empty(9).normal_().sum(), "aten.sum"),
    "numpy": (lambda m: m.w.detach().numpy(), "reads"),
    "asarray": (lambda m: np.asarray(m.w.detach()), "reads"),
    "tolist": (lambda m: m.b.tolist(), "reads"),
    "repr": (lambda m: repr(m.b), "reads"),
    "str": (lambda m: str(m.b), "reads"),
    "data_ptr": (lambda m: m.w.data_ptr(), "reads"),
    "storage": (lambda m: m.w.untyped_storage(), "reads"),
    "dlpack": (lambda m: torch.utils.dlpack.to_dlpack(m.w.data), "reads"),
    "pickle": (lambda m: pickle.dumps(m.w), "reads"),
    "save": (lambda m: torch.save(m.state_dict(), io.BytesIO()), "reads"),
    "map_": (lambda m: m.mask.map_(m.mask, lambda a, b: a), "reads"),
}
RANDOM: dict[str, tuple[Callable[[Two], Any], str]] = {
    "rand": (lambda m: torch.rand(3), "aten.rand"),
    "randn": (lambda m: m.w.data.copy_(torch.randn(80, 70)), "aten.randn"),
    "randperm": (lambda m: torch.randperm(5), "aten.randperm"),
    "randint": (lambda m: torch.randint(0, 5, (3,)), "aten.randint"),
    "rand_like": (lambda m: torch.rand_like(torch.ones(3)), "aten.rand_like"),
    "bernoulli": (lambda m: torch.bernoulli(torch.full((3,), 0.5)), "aten.bernoulli"),
    "multinomial": (lambda m: torch.multinomial(torch.ones(4), 2), "aten.multinomial"),
    "normal": (lambda m: torch.normal(0.0, 1.0, (3,)), "aten.normal|aten.randn"),
    "dropout": (lambda m: F.dropout(torch.ones(4)), "record: aten"),
    "poisson": (lambda m: torch.poisson(torch.ones(4)), "aten.poisson"),
}


def assert_refused(fn: Callable[[Two], Any], match: str) -> None:
    """RuntimeError that says what it was; the model, its generators, and torch are as before."""
    model, g = Two(), torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    before = state_of(model, g, False)

    def after_a_fill(m: Two) -> None:
        torch_init.normal_(m.w, generator=g)
        m.b.data.mul_(2)
        fn(m)

    with pytest.raises(RuntimeError, match=match) as caught:
        record(model, after_a_fill)
    assert str(caught.value).startswith("record: ")
    nothing_is_left()
    assert_equal_seen(before, state_of(model, g, False), "the model")
    with torch.no_grad():  # nothing is watched any more
        assert model.w.sum().item() == pytest.approx(0, abs=1e-2)
        assert not torch.equal(model.w.clone().normal_(), model.w)
    assert_same_runs(Two, CASES["padding"])


@pytest.mark.parametrize("name", READS)
def test_reads_are_refused(name: str) -> None:
    assert_refused(*READS[name])


@pytest.mark.parametrize("name", RANDOM)
def test_draws_that_are_no_fills_are_refused(name: str) -> None:
    assert_refused(*RANDOM[name])


def test_other_exceptions_pass() -> None:
    model = Two()
    before = state_of(model, torch.Generator(), True)

    def fn(m: Two) -> None:
        torch_init.normal_(m.w)
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        record(model, fn)
    nothing_is_left()
    assert_equal_seen(before, state_of(model, torch.Generator(), True), "the model")


@pytest.mark.parametrize(
    ("fn", "error"),
    [
        (lambda m: m.w.normal_(), RuntimeError),  # a leaf that requires grad
        (lambda m: torch_init.xavier_normal_(m.b), ValueError),
        (lambda m: m.w.data[90].zero_(), IndexError),
        (lambda m: m.nowhere, AttributeError),
    ],
    ids=["leaf", "fans", "index", "attribute"],
)
def test_mistakes_are_reported_as_torch_does(
    fn: Callable[[Two], Any], error: type[Exception]
) -> None:
    """When recording or when running."""
    with pytest.raises(error) as eager:
        fn(Two())
    with pytest.raises(error) as recorded:
        record(Two(), fn).run()
    assert str(recorded.value) == str(eager.value)
    nothing_is_left()


# ---- where ----


def test_not_in_a_fused_block() -> None:
    model = nn.Linear(80, 70)
    with fastinit.fused(), pytest.raises(RuntimeError, match="record cannot be used inside"):
        record(model)
    nothing_is_left()


@pytest.mark.parametrize("use", [record, fastinit.init_model_, fastinit.materialize_])
def test_not_in_another_record(use: Callable[..., Any]) -> None:
    inner = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"inside another Plan|cannot be part of a Plan"):
        record(nn.Linear(4, 4), lambda m: use(inner))
    nothing_is_left()


def test_not_under_a_mode() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="mode"):
        record(nn.Linear(3, 3))
    nothing_is_left()


def test_a_plan_within_the_function_is_the_users() -> None:
    """Its fills become part of what is recorded."""

    def fn(m: Two, g: torch.Generator) -> None:
        own = fastinit.Plan()
        own.normal_(m.w, generator=g)
        own.uniform_(m.b)
        assert len(own) == 2

    model = Two()
    before = state_of(model, torch.Generator(), True)
    assert len(record(model, lambda m: fn(m, torch.Generator()))) == 0
    assert_equal_seen(before, state_of(model, torch.Generator(), True), "the model")


def test_run_in_a_fused_block() -> None:
    """In its place among the fills that wait."""
    one, two = Two(), Two()
    for model, fast in ((one, False), (two, True)):
        made = record(model, lambda m: CASES["in place after"](m, torch.default_generator))
        torch.manual_seed(4)
        with fastinit.fused() if fast else torch.no_grad():
            first = torch.empty(5000).normal_()
            made.run()
            torch_init.uniform_(model.k)
            last = torch.empty(5000).normal_()
        model.first, model.last, model.after = first, last, torch.get_rng_state()
    for name in ("w", "b", "k", "mask", "first", "last", "after"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


# ---- tensors that move, memory ----


@pytest.mark.parametrize(
    "move",
    [
        lambda m: setattr(m.w, "data", torch.zeros(80, 70)),
        lambda m: m.double(),
        lambda m: setattr(m.w, "data", m.w.data[:40]),
        lambda m: m.w.data.untyped_storage().resize_(0),
    ],
    ids=["data", "double", "smaller", "freed"],
)
@pytest.mark.parametrize("how", ["uniform_", "normal_ imported before", "no_grad"])
def test_moved_tensors(how: str, move: Callable[[Two], Any]) -> None:
    model = Two()
    made = record(model, lambda m: CASES[how](m, torch.default_generator))
    made.run()
    move(model)
    before = model.b.detach().clone()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="record the plan anew"):
        made.run()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before, model.b)


@pytest.mark.parametrize("how", ["detached", "slices", "in place alone"])
def test_moved_tensors_that_were_recorded_by_views(how: str) -> None:
    """`p.data.normal_()` was asked of the parameter's memory, which the model no longer has."""
    model = Two()
    made = record(model, lambda m: CASES[how](m, torch.default_generator))
    model.w.data = torch.zeros(80, 70)
    with pytest.raises(RuntimeError, match="record the plan anew"):
        made.run()


def test_what_is_deleted_is_still_there() -> None:
    """A plan holds the tensors it writes, temporaries included, but not the model."""
    model = Two()
    made = record(model, lambda m: CASES["temporary"](m, torch.default_generator))
    w, gone = model.w, weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    made.run()
    assert 0.4 < w.mean() < 0.6
    last = weakref.ref(w)
    del made, w
    gc.collect()
    assert last() is None


def test_a_plan_can_be_continued() -> None:
    """What record gives is a Plan like any other."""
    model = Two()
    made = record(model, lambda m: torch_init.normal_(m.w))
    length = len(made)
    made.uniform_(model.b)
    made.zeros_(model.w.data[3])
    assert (type(made), len(made)) == (fastinit.Plan, length + 2)
    torch.manual_seed(2)
    made.run()
    torch.manual_seed(2)
    expected = Two()
    torch_init.normal_(expected.w)
    torch_init.uniform_(expected.b)
    expected.w.data[3].zero_()
    assert torch.equal(expected.w, model.w)
    assert torch.equal(expected.b, model.b)


def test_gradients_and_hooks_stay() -> None:
    model = Two()
    model.w.sum().backward()
    gradient = model.w.grad
    made = record(model, lambda m: CASES["no_grad"](m, torch.default_generator))
    made.run()
    assert model.w.grad is gradient
    assert model.w.is_leaf
    assert model.w.requires_grad
    assert (gradient == 1).all()
