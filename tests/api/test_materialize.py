# SPDX-License-Identifier: BSD-3-Clause
"""materialize_: as `to_empty` and then the same function, from the same seed, on every module."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit.core import geometry, recording
from tests.support.blocks import _full_of
from tests.support.compare import BF16, F16, F32, F64, assert_equal_seen, attempt, bits
from tests.support.marks import slow, slow_but
from tests.support.models import ZOO, Tied, model_state, on_meta, reset

Make = Callable[[], nn.Module]
Fn = Callable[[nn.Module], Any]


def materialize_(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model."""
    fastinit.materialize_(model, *args, **kwargs)
    return model


@pytest.fixture(autouse=True)
def large_from_4096(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes here are meant so."""
    monkeypatch.setattr(fastinit.core.geometry, "MIN_NATIVE", 4096)


def assert_same(
    make: Make,
    fn: Fn | None = None,
    *,
    tie: Callable[[nn.Module], Any] | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 11,
) -> nn.Module:
    """Compare with to_empty and apply, over memory full of something else; returns the model.

    `tie` puts back what to_empty takes apart.
    """
    seen = []
    for fast, byte in ((False, 0x33), (True, 0x88)):
        model = on_meta(make)
        torch.manual_seed(seed)

        def run(model: nn.Module = model, fast: bool = fast) -> nn.Module:
            if fast:
                return materialize_(model, dtype=dtype, fn=fn)
            model = (model if dtype is None else model.to(dtype)).to_empty(device="cpu")
            if tie is not None:
                tie(model)
            return model.apply(fn or reset)

        with _full_of(byte):
            returned, failure, warned = attempt(run)
        assert not failure
        assert returned is model
        for t in (*model.parameters(), *model.buffers()):
            assert t.device.type == "cpu"
        seen.append({**model_state(model), "generator": torch.get_rng_state(), "warned": warned})
    assert_equal_seen(seen[0], seen[1], "model")
    return model


class Holder(nn.Module):
    """One parameter."""

    def __init__(self, *shape: int, **kwargs: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(*shape, **kwargs))


# ---- values, generators, versions ----

WHOLE = [
    *("linear", "mlp", "conv", "transposed_conv", "norms", "embeddings", "recurrent", "shared"),
    *("lstm_projection", "bilinear_prelu", "attention", "encoder", "decoder_layer", "transformer"),
    *("frozen", "no_parameters", "no_elements", "channels_last"),
]


@pytest.mark.parametrize("kind", WHOLE)
def test_reset(kind: str, native: None) -> None:
    assert_same(ZOO[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_reset_of_small_tensors(kind: str) -> None:
    assert_same(ZOO[kind])


@pytest.mark.parametrize("dtype", [BF16, *slow([F64, F16])], ids=str)
@pytest.mark.parametrize("kind", ["mlp", "norms", "embeddings", "recurrent", "transformer"])
def test_dtype(kind: str, dtype: torch.dtype, native: None) -> None:
    model = assert_same(ZOO[kind], dtype=dtype)
    for name, t in model.state_dict().items():
        assert t.dtype is (torch.int64 if name.endswith("num_batches_tracked") else dtype)


def uniform(m: nn.Module) -> None:
    for p in m.parameters(recurse=False):
        torch_init.uniform_(p, -0.1, 0.1)
    for b in m.buffers(recurse=False):
        b.zero_()


def truncated(m: nn.Module) -> None:
    """As vision transformers; what is no matrix is filled by operators."""
    for p in m.parameters(recurse=False):
        if p.dim() > 1:
            fastinit.trunc_normal_(p, std=0.02)
        else:
            p.data.fill_(0.25)
    for b in m.buffers(recurse=False):
        b.copy_(torch.ones_like(b))


def many_times(m: nn.Module) -> None:
    """Every law there is, one after the other."""
    for p in m.parameters(recurse=False):
        torch_init.constant_(p, 0.5)
        torch_init.normal_(p).data.mul_(0.5)
        if p.dim() == 2 and p.numel():
            torch_init.sparse_(p, 0.3)
            torch_init.orthogonal_(p, 1.5)
            p.data[0].uniform_()
            p.data[-1].clamp_(-0.1, 0.1)
    for b in m.buffers(recurse=False):
        b.fill_(3)


@pytest.mark.parametrize("fn", [uniform, truncated, many_times], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "kind", ["mlp", "norms", *slow(["conv", "recurrent", "encoder", "frozen"])]
)
@pytest.mark.usefixtures("own_factors")
def test_functions(fn: Fn, kind: str, native: None) -> None:
    assert_same(ZOO[kind], fn)


def test_large_tensors() -> None:
    """Several threads and tiles, without the fixture."""
    assert_same(lambda: nn.Sequential(nn.Linear(700, 900), nn.Embedding(3000, 70, padding_idx=5)))


FORWARD: dict[str, tuple[Make, Callable[[], tuple[torch.Tensor, ...]]]] = {
    "linear": (lambda: nn.Linear(9, 7), lambda: (torch.ones(3, 9),)),
    "conv": (lambda: nn.Conv2d(3, 4, 3), lambda: (torch.ones(2, 3, 8, 8),)),
    "batch_norm": (lambda: nn.BatchNorm1d(6), lambda: (torch.eye(6),)),
    "lstm": (lambda: nn.LSTM(5, 6, 2, bidirectional=True), lambda: (torch.ones(4, 2, 5),)),
    "lstm_projected": (lambda: nn.LSTM(5, 6, proj_size=3), lambda: (torch.ones(4, 2, 5),)),
    "gru": (lambda: nn.GRU(5, 6, bias=False), lambda: (torch.ones(4, 2, 5),)),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=2), lambda: (torch.arange(9),)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), lambda: (torch.ones(3, 1, 8),) * 3),
    "transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True),
        lambda: (torch.ones(2, 3, 8), torch.ones(2, 4, 8)),
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", slow_but(FORWARD, "lstm", "batch_norm", "transformer"))
def test_forward_and_backward(kind: str, native: None) -> None:
    make, inputs = FORWARD[kind]
    seen = []
    for fast in (False, True):
        torch.manual_seed(5)
        model = on_meta(make)
        model = materialize_(model) if fast else model.to_empty(device="cpu").apply(reset)
        out = model(*inputs())
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        seen.append([out, *(p.grad for p in model.parameters())])
    for expected, found in zip(*seen, strict=True):
        assert torch.equal(bits(expected), bits(found))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_flat_weights_are_the_new_parameters(kind: Any) -> None:
    model = materialize_(kind(5, 6, 2, device="meta"))
    assert [id(w) for w in model._flat_weights] == [id(p) for p in model.parameters()]


def test_padding_row(native: None) -> None:
    model = materialize_(nn.Embedding(50, 20, padding_idx=3, device="meta"))
    assert (model.weight[3] == 0).all()
    assert (model.weight[[0, 1, 2, 4]] != 0).all()


def test_objects_are_what_they_were() -> None:
    """Names, order, kinds, requires_grad, persistence of buffers, strides."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Parameter(torch.empty(7, 5), requires_grad=False)
            self.count = nn.Parameter(torch.empty(3, dtype=torch.int64), requires_grad=False)
            self.register_buffer("kept", torch.empty(4))
            self.register_buffer("passing", torch.empty(4, dtype=torch.bool), persistent=False)
            self.register_buffer("none", None)
            self.register_parameter("nothing", None)
            self.image = nn.Parameter(torch.empty(4, 3, 5, 5).to(memory_format=torch.channels_last))
            self.turned = nn.Parameter(torch.empty(6, 5).t())

    def fn(m: nn.Module) -> None:
        for t in (*m.parameters(), *m.buffers()):
            with torch.no_grad():
                t.fill_(1) if not t.is_floating_point() else t.normal_()

    model = assert_same(Odd, fn)
    assert list(model.state_dict()) == ["frozen", "count", "image", "turned", "kept"]
    assert [n for n, _ in model.named_buffers()] == ["kept", "passing"]
    assert model.none is None
    assert model.nothing is None
    assert type(model.turned) is nn.Parameter
    assert type(model.kept) is torch.Tensor
    assert model.image.is_contiguous(memory_format=torch.channels_last)
    assert model.turned.stride() == (1, 5)


def test_no_elements() -> None:
    """Nothing has to be written; torch's own warning is not lost."""
    model = on_meta(lambda: Holder(0, 3))
    materialize_(model, fn=lambda m: None)
    assert (model.w.device.type, model.w.shape) == ("cpu", (0, 3))
    assert_same(lambda: Holder(0, 3), lambda m: torch_init.kaiming_uniform_(m.w))
    assert_same(lambda: Holder(0, 3), lambda m: torch_init.zeros_(m.w))


def test_parameter_subclass() -> None:
    """As after to_empty: a plain Parameter with the same values."""

    class Mine(nn.Parameter):
        pass

    class Special(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = Mine(torch.empty(70, 80))

    model = assert_same(Special, lambda m: torch_init.normal_(m.w))
    assert type(model.w) is nn.Parameter


# ---- where ----


def test_default_device() -> None:
    model = on_meta(lambda: nn.Linear(3, 3))
    with torch.device("cpu"):
        assert materialize_(model).weight.device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None], ids=str)
def test_under_the_meta_device(device: Any, native: None) -> None:
    """Where models are made, too; partial writes are counted there as well."""

    def halves(m: nn.Module) -> None:
        if isinstance(m, nn.Embedding):
            m.weight.data[::2].normal_()
            m.weight.data[1::2].zero_()

    for fn in (None, halves):
        seen = []
        for fast in (False, True):
            with torch.device("meta"):
                model = nn.Sequential(nn.Embedding(80, 70, padding_idx=2), nn.Embedding(3, 2))
                torch.manual_seed(4)
                if fast:
                    materialize_(model, device=device, fn=fn)
                else:
                    model.to_empty(device="cpu").apply(fn or reset)
            seen.append(model_state(model))
        assert_equal_seen(seen[0], seen[1], "model")


def test_default_device_set_to_meta() -> None:
    torch.set_default_device("meta")
    try:
        model = materialize_(nn.Linear(80, 70))
    finally:
        torch.set_default_device(None)
    assert model.weight.device.type == "cpu"
    assert model.weight.abs().max() <= 80**-0.5


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_under_grad_modes(context: Callable[[], Any]) -> None:
    with context():
        model = assert_same(ZOO["encoder"])
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


# ---- tied tensors ----


def tie_head(m: nn.Module) -> None:
    m.head.weight = m.embedding.weight


def test_one_parameter_in_two_modules(native: None) -> None:
    model = assert_same(Tied, tie=tie_head)
    assert model.head.weight is model.embedding.weight


def test_one_module_in_two_places(native: None) -> None:
    model = assert_same(ZOO["shared"])
    assert model.one[0] is model.two[0]


class TwoOverOne(nn.Module):
    """Two Parameters, or a parameter and a buffer, over one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(80, 70))
        self.b = nn.Parameter(self.a.data, requires_grad=False)
        self.register_buffer("c", self.a.data)


def test_two_parameters_over_one_storage(native: None) -> None:
    model = on_meta(TwoOverOne)
    old = [model.a, model.b, model.c]
    materialize_(model, fn=lambda m: torch_init.normal_(m.a))  # writes all three
    assert model.a.data_ptr() == model.b.data_ptr() == model.c.data_ptr()
    assert len({id(t) for t in (model.a, model.b, model.c, *old)}) == 6
    assert [t.requires_grad for t in (model.a, model.b, model.c)] == [True, False, False]
    assert 0.9 < model.b.std() < 1.1


def turned(m: nn.Module) -> nn.Parameter:
    return nn.Parameter(m.a.data.t())


def window(m: nn.Module) -> nn.Parameter:
    return nn.Parameter(m.a.data[10:30])


@pytest.mark.parametrize("view", [turned, window], ids=lambda f: f.__name__)
def test_views_of_one_storage_stay_views(view: Callable[[nn.Module], nn.Parameter]) -> None:
    def make() -> nn.Module:
        model = Holder(1)
        model.w, model.a = None, nn.Parameter(torch.empty(80, 70))
        model.b = view(model)
        return model

    model = on_meta(make)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        materialize_(model, fn=lambda m: torch_init.normal_(m.a))
    assert not model.b.is_meta
    assert torch.equal(model.b, view(model))
    assert model.b.untyped_storage().data_ptr() == model.a.untyped_storage().data_ptr()


def test_tied_tensors_that_are_not_written() -> None:
    model = on_meta(Tied)
    weight = model.embedding.weight
    with pytest.warns(UserWarning, match=r"2 tensors .*: embedding\.weight, head\.weight\. "):
        materialize_(model, fn=lambda m: m.body.reset_parameters() if m is model else None)
    assert model.head.weight is model.embedding.weight is weight


# ---- what counts as written ----

ONES = torch.ones(10, 10)
WRITTEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "normal_": lambda p: p.normal_(),
    "zero_": lambda p: p.zero_(),
    "fill_ with a tensor": lambda p: p.fill_(torch.tensor(2.0)),
    "copy_": lambda p: p.copy_(ONES),
    "copy_ of another dtype": lambda p: p.copy_(ONES.double()),
    "copy_ of an array": lambda p: p.copy_(torch.from_numpy(np.ones((10, 10)))),
    "copy_ of what was filled": lambda p: p.copy_(torch.empty(10, 10).uniform_()),
    "setitem": lambda p: p.__setitem__(slice(None), 1.5),
    "ellipsis": lambda p: p.__setitem__(..., ONES),
    "exponential_": lambda p: p.exponential_(),
    "log_normal_": lambda p: p.log_normal_(),
    "random_": lambda p: p.random_(0, 9),
    "bernoulli_": lambda p: p.bernoulli_(0.5),
    "cauchy_": lambda p: p.cauchy_(),
    "geometric_": lambda p: p.geometric_(0.5),
    "halves": lambda p: (p[:4].normal_(), p[4:].zero_()),
    "columns": lambda p: (p[:, :3].zero_(), p[:, 3:].fill_(2)),
    "every second": lambda p: (p[::2].normal_(), p[1::2].fill_(1)),
    "a chessboard": lambda p: [p[i::2, j::2].fill_(i - j) for i in (0, 1) for j in (0, 1)],
    "row by row": lambda p: [row.uniform_() for row in p],
    "one by one": lambda p: [p[i, j].fill_(i * j) for i in range(10) for j in range(10)],
    "overlapping": lambda p: (p[:7].zero_(), p[3:].normal_()),
    "transposed": lambda p: p.t().normal_(),
    "flat": lambda p: p.view(-1).copy_(torch.arange(100.0)),
    "transposed halves": lambda p: (p.t()[:5].normal_(), p.t()[5:].zero_()),
    "chunks": lambda p: [c.fill_(i) for i, c in enumerate(p.chunk(3))],
    "a diagonal and the rest": lambda p: (p.view(-1)[::11].fill_(1), p.view(-1)[1:].zero_()),
    "out of an operator": lambda p: torch.add(ONES, 1, out=p),
    "out of two halves": lambda p: (torch.add(ONES[:5], 1, out=p[:5]), p[5:].zero_()),
    "filled, then changed": lambda p: p.normal_().mul_(0.02).clamp_(-0.01, 0.01),
    "changed between": lambda p: (p[:5].zero_(), p[:5].add_(1), p[5:].normal_()),
    "expanded": lambda p: p.copy_(torch.arange(10.0).expand(10, 10)),
    "eye_": lambda p: torch_init.eye_(p),
    "orthogonal_": lambda p: torch_init.orthogonal_(p),
    "sparse_": lambda p: torch_init.sparse_(p, 0.5),
    "trunc_normal_": lambda p: torch_init.trunc_normal_(p),
    "trunc_normal_ of a tail": lambda p: torch_init.trunc_normal_(p, 0, 1, 1.2, 3),
    "xavier_normal_": lambda p: torch_init.xavier_normal_(p),
    "its bytes as integers": lambda p: p.view(torch.int32).fill_(5),
}


@pytest.mark.parametrize("small", [False, *slow([True])], ids=["native", "small"])
@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.usefixtures("own_factors")
def test_written(how: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.setattr(geometry, "MIN_NATIVE", 0)
    assert_same(lambda: Holder(10, 10), lambda m: WRITTEN[how](m.w.data))


UNWRITTEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "nothing": lambda p: None,
    "read only": lambda p: torch.zeros(10, 10).copy_(p),
    "mul_": lambda p: p.mul_(0.5),
    "add_": lambda p: p.add_(ONES),
    "clamp_": lambda p: p.clamp_(-1, 1),
    "div_ and sub_": lambda p: p.div_(2).sub_(1),
    "masked_fill_": lambda p: p.masked_fill_(torch.eye(10).bool(), 0.0),
    "index_fill_ of a row": lambda p: p.index_fill_(0, torch.tensor([3]), 0.0),
    "all rows but one": lambda p: p[:9].normal_(),
    "all columns but one": lambda p: p[:, 1:].zero_(),
    "every second": lambda p: p[::2].normal_(),
    "the same half twice": lambda p: (p[:5].zero_(), p[:5].normal_()),
    "three of a chessboard": lambda p: [p[i::2, j::2].zero_() for i, j in ((0, 0), (0, 1), (1, 0))],
    "all but one": lambda p: p.view(-1)[1:].zero_(),
    "a padding row": lambda p: p[3].zero_(),
    "a diagonal": lambda p: p.fill_diagonal_(1.0),
    "a slice without elements": lambda p: p[:0].zero_(),
    "a copy": lambda p: p.clone().zero_(),
    "half filled, all changed": lambda p: (p[:5].zero_(), p.mul_(2)),
    "out of an operator, in part": lambda p: torch.add(ONES[:9], 1, out=p[:9]),
}


@pytest.mark.parametrize("how", UNWRITTEN)
@pytest.mark.parametrize("small", [False, *slow([True])], ids=["native", "small"])
def test_not_written(how: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays the meta tensor it was."""
    if not small:
        monkeypatch.setattr(geometry, "MIN_NATIVE", 0)
    model = on_meta(lambda: Holder(10, 10))
    old = model.w
    with pytest.warns(UserWarning, match=r"^1 tensors were not initialised completely .*: w\. "):
        materialize_(model, fn=lambda m: UNWRITTEN[how](m.w.data))
    assert model.w is old
    assert model.w.is_meta


@pytest.mark.parametrize(
    "write",
    [
        lambda p: torch._foreach_copy_([p], [ONES]),
        lambda p: torch._foreach_zero_([p]),
        lambda p: p.numpy().fill(3),
    ],
    ids=["_foreach_copy_", "_foreach_zero_", "numpy"],
)
def test_written_by_other_ways(write: Callable[[torch.Tensor], Any]) -> None:
    """What a function did write is not thrown away."""
    assert_same(lambda: Holder(10, 10), lambda m: write(m.w.data))


def test_memory_seen_as_another_dtype() -> None:
    """Half of it as floats, half of it as integers of another size."""

    def fn(m: nn.Module) -> None:
        m.w.data[:50].normal_()
        m.w.data.view(torch.int16)[100:].zero_()

    assert_same(lambda: Holder(100), fn)


def test_gaps_need_not_be_written() -> None:
    """Every second column of a matrix that is not there otherwise."""

    def make() -> nn.Module:
        model = Holder(1)
        model.w = nn.Parameter(torch.empty(6, 10)[:, ::2])
        return model

    model = on_meta(make)
    assert model.w.stride() == (10, 2)
    materialize_(model, fn=lambda m: torch_init.ones_(m.w))
    assert not model.w.is_meta
    assert (model.w == 1).all()


@pytest.mark.parametrize(
    "write",
    [lambda w: torch.view_as_real(w).normal_(), lambda w: (w.real.normal_(), w.imag.zero_())],
    ids=["view_as_real", "real and imag"],
)
def test_complex_parameters(write: Callable[[torch.Tensor], Any]) -> None:
    assert_same(lambda: Holder(7, 5, dtype=torch.complex64), lambda m: write(m.w.data))


# ---- what nobody writes ----


class Buffers(nn.Module):
    """Only the constructor knows what is in the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mask", torch.ones(5, 5).tril())
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)


def message(count: int, names: str) -> str:
    return (
        f"{count} tensors were not initialised completely and stay on the meta device: {names}. "
        "Pass a `fn` that initialises them, or set them yourself."
    )


def test_buffers_are_named() -> None:
    model = on_meta(lambda: nn.ModuleDict({"a": nn.Sequential(Buffers()), "b": Buffers()}))
    old = dict(model.named_buffers())
    with pytest.warns(UserWarning, match="^4 tensors ") as caught:
        materialize_(model)
    names = "a.0.mask, a.0.frequencies, b.mask, b.frequencies"
    assert [str(w.message) for w in caught] == [message(4, names)]
    assert caught[0].filename == __file__
    assert all(t is old[name] for name, t in model.named_buffers())
    assert not any(p.is_meta for p in model.parameters())
    assert "b.frequencies" not in model.state_dict()


def test_only_ten_are_named() -> None:
    model = on_meta(lambda: nn.Sequential(*[Holder(3) for _ in range(13)]))
    with pytest.warns(UserWarning, match="^13 tensors ") as caught:
        materialize_(model)
    first = ", ".join(f"{i}.w" for i in range(10))
    assert str(caught[0].message) == message(13, f"{first} and 3 more")
    assert all(p.is_meta for p in model.parameters())


def test_the_rest_can_follow() -> None:
    model = on_meta(Buffers)
    with pytest.warns(UserWarning, match="mask, frequencies"):
        materialize_(model)
    weight = model.linear.weight
    before = weight.detach().clone()

    def fn(m: nn.Module) -> None:
        if isinstance(m, Buffers):
            m.mask.copy_(torch.ones(5, 5).tril())
            torch.arange(4.0, out=m.frequencies)

    materialize_(model, fn=fn)
    assert model.linear.weight is weight
    assert torch.equal(weight, before)
    assert torch.equal(model.mask, torch.ones(5, 5).tril())
    assert model.frequencies.tolist() == [0, 1, 2, 3]


def test_the_warning_as_an_error_leaves_the_model_whole() -> None:
    model = on_meta(Buffers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="mask, frequencies"):
            materialize_(model)
    assert not model.linear.weight.is_meta
    assert model.mask.is_meta


def test_weight_norm_is_not_written_by_reset_parameters() -> None:
    """It writes the product, in torch as well."""
    model = on_meta(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 7)))
    names = "parametrizations.weight.original0, parametrizations.weight.original1"
    with pytest.warns(UserWarning, match="^2 tensors ") as caught:
        materialize_(model)
    assert str(caught[0].message) == message(2, names)
    assert not model.bias.is_meta


# ---- functions that replace what they are given ----


def test_parameters_that_are_replaced() -> None:
    """Also by what is on meta: that was the function's wish."""

    def fn(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            m.weight = nn.Parameter(torch.full((4, 4), 2.0))
            m.bias = nn.Parameter(torch.empty(4, device="meta"))

    model = on_meta(lambda: nn.Linear(4, 4))
    materialize_(model, fn=fn)
    assert (model.weight == 2).all()
    assert model.bias.is_meta


def test_data_that_is_set(native: None) -> None:
    """Many, so that memory is used again."""

    def fn(m: nn.Module) -> None:
        for p in m.parameters(recurse=False):
            p.data = torch.full(p.shape, 2.0)

    assert_same(lambda: nn.Sequential(*[nn.Linear(3, 3) for _ in range(30)]), fn)


def test_names_that_are_deleted_and_added() -> None:
    def fn(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            del m.weight
            m.extra = nn.Parameter(torch.ones(2))
            m.bias.data.zero_()

    model = materialize_(on_meta(lambda: nn.Linear(4, 4)), fn=fn)
    assert {n: p.tolist() for n, p in model.named_parameters()} == {
        "bias": [0, 0, 0, 0],
        "extra": [1, 1],
    }


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign: bool) -> None:
    state = nn.Linear(4, 3).state_dict()
    model = on_meta(lambda: nn.Linear(4, 3))
    materialize_(model, fn=lambda m: m.load_state_dict(state, assign=assign))
    assert torch.equal(model.weight, state["weight"])
    assert torch.equal(model.bias, state["bias"])


# ---- models that are partly real ----


class PartlyReal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(80, 70, device="cpu")
        self.norm = nn.BatchNorm1d(70, device="cpu")
        self.head = nn.Linear(70, 60, device="meta")


def test_real_tensors_are_the_same_objects() -> None:
    model = PartlyReal()
    named = [*model.named_parameters(), *model.named_buffers()]
    real = {name: (t, t.data_ptr(), t._version) for name, t in named if not t.is_meta}
    materialize_(model, fn=lambda m: m.reset_parameters() if m is model.head else None)
    for name, (t, address, version) in real.items():
        module, _, attribute = name.rpartition(".")
        assert getattr(model.get_submodule(module), attribute) is t
        assert (t.data_ptr(), t._version) == (address, version)
    assert not model.head.weight.is_meta


def test_real_tensors_keep_their_values() -> None:
    """A trained backbone with a new head: `materialize_(model)` is not to reset the backbone."""
    model = PartlyReal()
    before = {k: v.clone() for k, v in model.state_dict().items() if not v.is_meta}
    materialize_(model)
    assert not model.head.weight.is_meta
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_nothing_on_meta() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    objects = list(model.parameters())
    assert materialize_(model, fn=lambda m: None) is model
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_lazy_modules_are_left_alone(device: str) -> None:
    model = nn.Sequential(nn.LazyLinear(5, device=device), nn.Linear(5, 4, device="meta"))
    lazy = model[0].weight
    materialize_(model, fn=lambda m: m.reset_parameters() if m is model[1] else None)
    assert model[0].weight is lazy
    assert nn.parameter.is_lazy(model[0].weight)
    assert not model[1].weight.is_meta


# ---- blocks, plans, exceptions ----


def test_one_pass(native: None) -> None:
    """The report of the block around it: every element is written once, at the end."""
    model = on_meta(
        lambda: nn.Sequential(nn.Linear(90, 80), nn.Linear(80, 70), nn.Embedding(90, 70))
    )

    def twice(m: nn.Module) -> None:
        reset(m)
        for p in m.parameters(recurse=False):
            torch_init.uniform_(p, -1, 1)

    torch.manual_seed(2)
    with fastinit.fused() as report:
        materialize_(model, fn=twice)
        assert report.written_elements == 0
    elements = sum(p.numel() for p in model.parameters())
    assert (report.written_elements, report.dropped_elements) == (elements, elements)
    assert (report.early, report.at_once_elements) == ([], 0)
    assert len(report.rows()) == len(list(model.parameters()))
    torch.manual_seed(2)
    expected = on_meta(lambda: nn.Sequential(*map(type_of, model)))
    expected.to_empty(device="cpu").apply(twice)
    assert_equal_seen(model_state(expected), model_state(model), "model")


@pytest.mark.parametrize("name", ["trunc_normal_", "kaiming_normal_", "xavier_uniform_", "ones_"])
def test_each_law_waits(name: str) -> None:
    """As it does in init_model_: nothing reads what is filled, so nothing is written early."""

    def fn(m: nn.Module) -> None:
        getattr(torch_init, name)(m.w, *([0.0, 0.02] if name == "trunc_normal_" else []))

    with fastinit.fused() as report:
        model = materialize_(on_meta(lambda: Holder(90, 80)), fn=fn)
        assert (report.early, report.written_elements) == ([], 0)
    assert report.written_elements == model.w.numel()


def type_of(m: nn.Module) -> nn.Module:
    if isinstance(m, nn.Linear):
        return nn.Linear(m.in_features, m.out_features)
    return nn.Embedding(m.num_embeddings, m.embedding_dim)


def test_made_and_read_in_one_block(native: None) -> None:
    seen = []
    for fast in (False, True):
        torch.manual_seed(6)
        if fast:
            with fastinit.fused():
                model = materialize_(on_meta(ZOO["encoder"]))
                total = sum(p.sum() for p in model.parameters())
        else:
            model = on_meta(ZOO["encoder"]).to_empty(device="cpu").apply(reset)
            total = sum(p.sum() for p in model.parameters())
        seen.append({**model_state(model), "total": bits(total), "rng": torch.get_rng_state()})
    assert_equal_seen(seen[0], seen[1], "model")


def test_not_part_of_a_plan() -> None:
    outer = on_meta(lambda: nn.Linear(3, 3))
    old = outer.weight
    with pytest.raises(RuntimeError, match="materialize_ cannot be part of a Plan"):
        fastinit.record(nn.Linear(3, 3), lambda m: materialize_(outer))
    assert outer.weight is old


def raising(m: nn.Module) -> None:
    if isinstance(m, nn.ReLU):
        raise ValueError("enough")
    reset(m)


def three_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(80, 70), nn.BatchNorm1d(70), nn.ReLU(), nn.Linear(70, 90))


def test_exceptions(native: None) -> None:
    """What came before the exception is done, nothing stays active, and it can be done again."""
    seen = []
    for fast in (False, True):
        model = on_meta(three_layers)
        torch.manual_seed(9)
        model = model if fast else model.to_empty(device="cpu")
        run = materialize_ if fast else nn.Module.apply
        with pytest.raises(ValueError, match="enough"):
            run(model, fn=raising)
        seen.append({**model_state(model[:2]), "generator": torch.get_rng_state()})
    assert_equal_seen(seen[0], seen[1], "what came before")
    assert recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch_init.kaiming_uniform_ is fastinit.dispatch.ORIGINALS["kaiming_uniform_"]
    assert any(p.is_meta for p in model.parameters())  # what was not written is not garbage
    before = [bits(p) for p in model[0].parameters()]
    materialize_(model)
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    assert all(map(torch.equal, before, [bits(p) for p in model[0].parameters()]))


def test_bad_arguments_change_nothing() -> None:
    model = on_meta(lambda: nn.Linear(3, 3))
    old = model.weight
    with pytest.raises(RuntimeError):
        materialize_(model, device="nowhere")
    assert model.weight is old
    assert recording.this_thread.recorder is None


def test_old_tensors_and_memory_are_let_go() -> None:
    """Neither the model nor what it held before is kept."""
    model = on_meta(lambda: nn.Linear(80, 70))
    old = weakref.ref(model.weight)
    materialize_(model)
    gc.collect()
    assert old() is None
    new, storage = weakref.ref(model), weakref.ref(model.weight)
    del model
    gc.collect()
    assert new() is None
    assert storage() is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory(python: Callable[..., Any]) -> None:
    """128 MiB of parameters, filled twice over, need little more."""
    done = python(
        """
        import torch, fastinit
        from torch import nn

        def peak():
            with open("/proc/self/status") as lines:
                return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024

        def reset(m):
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
                nn.init.normal_(m.weight, std=0.02)

        def make(n):
            with torch.device("meta"):
                return nn.Sequential(nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False))

        fastinit.materialize_(make(256), fn=reset)
        before = peak()
        model = make(4096)
        fastinit.materialize_(model, fn=reset)
        print(peak() - before)
        """
    )
    assert done.returncode == 0, done.stderr
    assert 120 < float(done.stdout) < 128 + 16


# ---- other libraries that make models on meta ----


@pytest.mark.slow
def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    for include in (False, True):
        seen = []
        for fast in (False, True):
            with accelerate.init_empty_weights(include_buffers=include):
                model = nn.Sequential(
                    nn.Conv2d(3, 80, 5), nn.BatchNorm2d(80), nn.LSTM(70, 64), ZOO["transformer"]()
                )
            assert all(p.is_meta for p in model.parameters())
            torch.manual_seed(8)
            if fast:
                materialize_(model, fn=reset)
            else:
                model.to_empty(device="cpu").apply(reset)
            assert model[2](torch.ones(2, 1, 70))[0].shape == (2, 1, 64)
            values = {k: bits(v) for k, v in model.state_dict().items()}
            seen.append({**values, "generator": torch.get_rng_state()})
        assert_equal_seen(seen[0], seen[1], f"include_buffers={include}")


@pytest.mark.slow
def test_transformers() -> None:
    """The weights are tied again after to_empty; here they stay tied."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=300, n_positions=32, attn_implementation="eager"
    )
    seen = []
    for fast in (False, True):
        with torch.device("meta"):
            model = transformers.GPT2LMHeadModel(config)
        torch.manual_seed(8)
        if fast:
            materialize_(model, fn=model._init_weights)
        else:
            model.to_empty(device="cpu").tie_weights()
            model.apply(model._init_weights)
        assert model.lm_head.weight is model.transformer.wte.weight
        with torch.no_grad():
            logits = model.eval()(torch.arange(20)[None]).logits
        values = {k: bits(v) for k, v in model.state_dict().items()}
        seen.append({**values, "generator": torch.get_rng_state(), "logits": bits(logits)})
    assert_equal_seen(seen[0], seen[1], "GPT-2")
    assert F32 is logits.dtype
