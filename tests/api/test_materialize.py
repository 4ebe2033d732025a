# SPDX-License-Identifier: BSD-3-Clause
"""materialize_: as `to_empty` and then the same function, from the same seed, on every module."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from tests.support.compare import BF16, F16, F64, assert_equal_seen, bits
from tests.support.marks import slow, slow_but
from tests.support.materialize import Fn, Holder, Make, assert_materialized, materialize_
from tests.support.models import ZOO, Tied, model_state, on_meta, reset

pytestmark = pytest.mark.usefixtures("large_from_4096")

# ---- values, generators, versions ----

WHOLE = [
    *("linear", "mlp", "conv", "transposed_conv", "norms", "embeddings", "recurrent", "shared"),
    *("lstm_projection", "bilinear_prelu", "attention", "encoder", "decoder_layer", "transformer"),
    *("frozen", "no_parameters", "no_elements", "channels_last"),
]


@pytest.mark.parametrize("kind", WHOLE)
def test_reset(kind: str, native: None) -> None:
    assert_materialized(ZOO[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_reset_of_small_tensors(kind: str) -> None:
    assert_materialized(ZOO[kind])


@pytest.mark.parametrize("dtype", [BF16, *slow([F64, F16])], ids=str)
@pytest.mark.parametrize("kind", ["mlp", "norms", "embeddings", "recurrent", "transformer"])
def test_dtype(kind: str, dtype: torch.dtype, native: None) -> None:
    model = assert_materialized(ZOO[kind], dtype=dtype)
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
    assert_materialized(ZOO[kind], fn)


def test_large_tensors() -> None:
    """Several threads and tiles, without the fixture."""
    assert_materialized(
        lambda: nn.Sequential(nn.Linear(700, 900), nn.Embedding(3000, 70, padding_idx=5))
    )


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

    model = assert_materialized(Odd, fn)
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
    assert_materialized(lambda: Holder(0, 3), lambda m: torch_init.kaiming_uniform_(m.w))
    assert_materialized(lambda: Holder(0, 3), lambda m: torch_init.zeros_(m.w))


def test_parameter_subclass() -> None:
    """As after to_empty: a plain Parameter with the same values."""

    class Mine(nn.Parameter):
        pass

    class Special(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = Mine(torch.empty(70, 80))

    model = assert_materialized(Special, lambda m: torch_init.normal_(m.w))
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
        model = assert_materialized(ZOO["encoder"])
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


# ---- tied tensors ----


def tie_head(m: nn.Module) -> None:
    m.head.weight = m.embedding.weight


def test_one_parameter_in_two_modules(native: None) -> None:
    model = assert_materialized(Tied, tie=tie_head)
    assert model.head.weight is model.embedding.weight


def test_one_module_in_two_places(native: None) -> None:
    model = assert_materialized(ZOO["shared"])
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
