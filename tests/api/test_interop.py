# SPDX-License-Identifier: BSD-3-Clause
"""Tensors that are not plain: subclasses, inference tensors, views in a graph, foreign memory."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from tests.support.calls import CALLS, each_call
from tests.support.compare import BF16, F32, Position, assert_same, attempt, bits, version
from tests.support.layouts import LAYOUTS, apart, box

pytestmark = pytest.mark.usefixtures("native")


class Logged(torch.Tensor):
    """A subclass that notes what torch tells it, as DTensor and quantised tensors rely on."""

    log: list[Any] = []  # noqa: RUF012  (shared on purpose)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.log.append((func, types, len(args), sorted(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs or {})


@each_call
@pytest.mark.parametrize("parameter", [False, True])
def test_subclass_sees_the_same_calls(name: str, args: tuple, parameter: bool) -> None:
    logs, results = [], []
    for module in (torch_init, fastinit):
        Logged.log = []
        tensor = box(12, 10).as_subclass(Logged)
        if parameter:
            tensor = torch.nn.Parameter(tensor)
        Logged.log.clear()
        torch.manual_seed(3)
        returned = getattr(module, name)(tensor, *args)
        logs.append(list(Logged.log))
        results.append((type(returned), returned is tensor))
        with torch._C.DisableTorchFunctionSubclass():
            results[-1] += (bits(tensor).tolist(), tensor._version)
    assert logs[0] == logs[1] != []
    assert results[0] == results[1]


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented if "_" in func.__name__ else super().__torch_function__(
            func, types, args, kwargs or {}
        )  # fmt: skip


def test_subclass_that_refuses() -> None:
    failures = [
        attempt(m.uniform_, box(12).as_subclass(Refusing))[1] for m in (torch_init, fastinit)
    ]
    assert failures[0] == failures[1] != ""


@pytest.mark.usefixtures("own_factors")
def test_plain_subclasses_are_filled() -> None:
    class Quiet(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    for make in (lambda: box(20, 30).as_subclass(Quiet), lambda: torch.nn.Buffer(box(20, 30))):
        for name, args in CALLS:
            assert_same(name, make, *args)


@pytest.mark.usefixtures("own_factors")
def test_inference_tensors() -> None:
    def born_inside() -> torch.Tensor:
        with torch.inference_mode():
            return box(12, 10)

    for name, args in CALLS:
        assert_same(name, born_inside, *args, fails=True)  # not allowed outside
        with torch.inference_mode():
            assert_same(name, lambda: box(12, 10), *args)  # born inside
            assert_same(name, lambda: torch.nn.Parameter(box(12, 10)), *args)


def test_ordinary_tensor_in_inference_mode_keeps_counting_versions() -> None:
    for name, args in CALLS:
        deltas = []
        for module in (torch_init, fastinit):
            tensor = box(12, 10)
            before = version(tensor)
            with torch.inference_mode():
                getattr(module, name)(tensor, *args)
            deltas.append(version(tensor) - before)
        assert deltas[0] == deltas[1], name


@each_call
def test_autograd_notices_the_write(name: str, args: tuple) -> None:
    """A value saved for backward and then overwritten must be reported, not used."""
    weight = box(12, 10).requires_grad_()
    loss = (weight * weight).sum()
    getattr(fastinit, name)(weight, *args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert (weight.is_leaf, weight.requires_grad, weight.grad) == (True, True, None)


@pytest.mark.usefixtures("own_factors")
def test_views_inside_a_graph() -> None:
    """Writing under no_grad through views of non-leaf tensors: same history, same versions."""
    for name, args in CALLS:
        seen = []
        for module in (torch_init, fastinit):
            leaf = box(12, 10).requires_grad_()
            inner = leaf * 2
            view = inner.t()
            torch.manual_seed(3)
            _, failure, _ = attempt(getattr(module, name), view, *args)
            history = (type(inner.grad_fn).__name__, type(view.grad_fn).__name__)
            seen.append((failure, history, inner._version, view._version, bits(inner).tolist()))
        assert seen[0] == seen[1], name


def test_storage_shared_with_numpy_and_python() -> None:
    array = np.full((40, 30), 13.0, dtype=np.float32)
    assert_same("normal_", lambda: torch.from_numpy(array), native=True)
    buffer = bytearray(4 * 1000 + 8)
    assert_same("uniform_", lambda: torch.frombuffer(buffer, dtype=F32, offset=8), native=True)
    assert_same("normal_", lambda: torch.frombuffer(buffer, dtype=BF16, offset=2), native=True)


def test_views_share_one_version_counter() -> None:
    """A view and its base share one counter; each fill moves it for both."""
    base = apart(100, F32)
    view = base[3:50]
    before = base._version
    fastinit.normal_(view)
    assert base._version == view._version == before + 1


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "columns"])
def test_deterministic_algorithms(layout: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for name in ("uniform_", "normal_", "trunc_normal_", "zeros_"):
            assert_same(name, lambda: LAYOUTS[layout](990, F32), at=Position(words=2))
    finally:
        torch.use_deterministic_algorithms(False)


def test_signature_is_seen_through_torch_function() -> None:
    """handle_torch_function passes torch's own function, so user tables keyed by it still hit."""
    Logged.log = []
    fastinit.kaiming_uniform_(box(4, 4).as_subclass(Logged))
    assert torch_init.kaiming_uniform_ in [entry[0] for entry in Logged.log]
    assert "nonlinearity" in inspect.signature(fastinit.kaiming_uniform_).parameters
