# SPDX-License-Identifier: BSD-3-Clause
"""Wrong arguments of init_model_, materialize_, record, fused: a sentence says what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastinit
from fastinit.core import recording
from tests.support.compare import assert_equal_seen
from tests.support.models import model_state


class Net(nn.Linear):
    def init_weights(self) -> None:
        raise AssertionError


def two(m: nn.Module, std: float) -> None:
    raise AssertionError


FUNCTIONS: tuple[Callable[..., Any], ...] = (
    fastinit.init_model_,
    fastinit.materialize_,
    fastinit.record,
)
MODELS: list[tuple[Any, str]] = [
    (nn.Linear, r"takes a module, not the class Linear; give an instance, Linear\(\.\.\.\)"),
    (torch.ones(3), "takes a module, not a tensor; for one tensor there is fastinit.normal_"),
    ([nn.Linear(2, 2)], "takes a module, not an object of type list"),
    (None, "takes a module, not an object of type NoneType"),
]
FNS: list[tuple[Any, str]] = [
    (42, r"initialises modules, not 42; for a seed write seed=42"),
    (nn.Linear(2, 2), "a function or a method that initialises modules, not Linear"),
    (nn.Linear, "a function or a method that initialises modules, not Linear"),
    ("init_weights", "not 'init_weights'; write fn=model.init_weights"),
    ("normal", "a function or a method that initialises modules, not 'normal'"),
    (two, r"two takes \(m, std\): give the rest by functools\.partial"),
    (lambda *, m: None, r"<lambda> takes \(m\): give the rest"),
    (nn.init.normal_, "normal_ takes a tensor: give a function of a module that calls normal_"),
    (nn.init.constant_, "constant_ takes a tensor: give a function of a module"),
    (fastinit.kaiming_normal_, "kaiming_normal_ takes a tensor: give a function of a module"),
]
OTHERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"device": "meta"}, ValueError, 'which the meta device has not; write "cpu" or "cuda", or'),
    ({"device": torch.device("meta")}, ValueError, "tensors get memory, which the meta device"),
    ({"device": "gpu"}, RuntimeError, 'there is no device \'gpu\'; write "cpu", "cuda" or'),
    ({"device": "cup:0"}, RuntimeError, "there is no device 'cup:0'"),
    ({"device": 4242}, RuntimeError, "there is no GPU 4242; for a seed write seed=4242"),
    ({"device": torch.float16}, TypeError, r"not torch\.float16; write dtype=torch\.float16"),
    ({"device": two}, TypeError, "device is a function; write fn=two"),
    ({"dtype": "bfloat16"}, TypeError, r"as torch\.bfloat16, not 'bfloat16'"),
    ({"dtype": torch.int8}, TypeError, r"floating-point tensors, as torch\.bfloat16, not torch"),
    ({"only_missing": "weight"}, TypeError, "True, False or names of parameters, not 'weight'"),
    ({"only_missing": 3}, TypeError, "only_missing is True, False or names of parameters, not 3"),
    ({"only_missing": ["weight", "wieght"]}, ValueError, "the model has no wieght; give names of"),
]


def assert_says(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    assert recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("model", "text"), MODELS)
def test_models(function: Callable[..., Any], model: Any, text: str) -> None:
    assert_says(TypeError, f"^{function.__name__} {text}", lambda: function(model))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("fn", "text"), FNS)
def test_functions(function: Callable[..., Any], fn: Any, text: str) -> None:
    model = Net(3, 3)
    before = model_state(model)
    assert_says(TypeError, f"^fn is .*{text}", lambda: function(model, fn=fn))
    assert_equal_seen(before, model_state(model), "model")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("given", "error", "text"), OTHERS)
def test_others(given: dict[str, Any], error: type[Exception], text: str, device: str) -> None:
    """Whether or not there is something to do."""
    model = Net(3, 3, device=device)
    weight = model.weight
    assert_says(error, text, lambda: fastinit.materialize_(model, **given))
    assert model.weight is weight


@pytest.mark.parametrize("given", [{"only_missing": "weight"}, {"only_missing": ["wieght"]}])
def test_names_of_init_model(given: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="only_missing"):
        fastinit.init_model_(Net(3, 3), **given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (42, r"not 42: write fused\(seed=42\)"),
        (two, r"not two: write @fused\(\) before two"),
        ("a", r"not 'a': write fused\(seed=\.\.\.\)"),
    ],
)
def test_fused(given: Any, text: str) -> None:
    text = f"^fused takes what it is given by name, {text}$"
    assert_says(TypeError, text, lambda: fastinit.fused(given))


def test_functions_that_fail_say_so_themselves() -> None:
    def fn(m: nn.Module) -> None:
        m.weight.normal_()  # a leaf that requires grad

    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        fastinit.init_model_(nn.Linear(3, 3), fn)
