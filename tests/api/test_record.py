# SPDX-License-Identifier: BSD-3-Clause
"""record: what a function does to a model, as a Plan that does it again and again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit import record
from tests.support.compare import BF16, F64, bits
from tests.support.marks import slow
from tests.support.models import ZOO
from tests.support.record import CASES, Fn, Two, assert_same_runs, nothing_is_left

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
