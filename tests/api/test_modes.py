# SPDX-License-Identifier: BSD-3-Clause
"""Modes of torch: function and dispatch modes, meta and fake tensors, vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastinit
from tests.support.calls import CALLS, each_call
from tests.support.compare import assert_same, attempt, bits
from tests.support.layouts import box
from tests.support.modes import DispatchLog, EverythingIsSeven, FunctionLog

pytestmark = pytest.mark.usefixtures("native")


@each_call
@pytest.mark.parametrize("mode", [FunctionLog, DispatchLog])
def test_modes_see_the_same_calls(name: str, args: tuple, mode: Callable[[], Any]) -> None:
    logs, results = [], []
    for module in (torch_init, fastinit):
        tensor = box(12, 10)
        torch.manual_seed(3)
        with mode() as active:
            getattr(module, name)(tensor, *args)
        logs.append(active.log)
        results.append((bits(tensor).tolist(), tensor._version))
    assert logs[0] == logs[1] != []
    assert results[0] == results[1]


def test_a_mode_may_replace_the_draw() -> None:
    with EverythingIsSeven():
        for name in ("uniform_", "normal_", "kaiming_uniform_", "xavier_normal_"):
            tensor = box(30, 40)
            getattr(fastinit, name)(tensor)
            assert tensor.flatten()[0].item() == tensor.flatten()[-1].item() == 7.0


@each_call
def test_meta_tensor_is_untouched(name: str, args: tuple) -> None:
    def make() -> torch.Tensor:
        return torch.empty(12, 10, device="meta")

    count = fastinit.core.kernels.native_fills
    assert_same(name, make, *args, poisons=None)
    assert_same(name, lambda: torch.nn.Parameter(make()), *args, poisons=None)
    assert fastinit.core.kernels.native_fills == count


def test_meta_dirac() -> None:
    for groups in (1, 2):
        assert_same("dirac_", lambda: torch.empty(4, 2, 3, device="meta"), groups, poisons=None)
    assert_same("dirac_", lambda: torch.empty(4, 2, 3, device="meta"), 3, fails=True)


@each_call
def test_default_device_meta(name: str, args: tuple) -> None:
    """Real tensors inside `with torch.device("meta")`: temporaries of torch's land there."""
    seen = []
    for module in (torch_init, fastinit):
        tensor = box(12, 10)
        torch.manual_seed(3)
        with torch.device("meta"):
            _, failure, _ = attempt(getattr(module, name), tensor, *args)
        seen.append(
            (failure, bits(tensor).tolist(), tensor._version, torch.get_rng_state().tolist())
        )
    assert seen[0] == seen[1]


@each_call
def test_fake_tensors(name: str, args: tuple) -> None:
    """Nothing is computed for a fake tensor, in its mode or out of it."""
    count = fastinit.core.kernels.native_fills
    outcomes: dict[Any, list[Any]] = {torch_init: [], fastinit: []}
    for module in (torch_init, fastinit):
        mode = FakeTensorMode()
        fake = mode.from_tensor(box(12, 10))
        state = torch.get_rng_state()
        for context in (mode, nullcontext()):
            with context:
                returned, failure, _ = attempt(getattr(module, name), fake, *args)
            outcomes[module].append((failure.split(":")[0], returned is fake))
        assert isinstance(fake, FakeTensor)
        if name not in ("sparse_",):  # outside its mode the permutations of sparse_ are real
            assert torch.equal(state, torch.get_rng_state())
    assert outcomes[torch_init] == outcomes[fastinit]
    assert fastinit.core.kernels.native_fills == count


def test_real_tensor_under_fake_mode() -> None:
    for name, args in CALLS[:3]:
        seen = []
        for module in (torch_init, fastinit):
            tensor = box(12, 10)
            with FakeTensorMode(allow_non_fake_inputs=True):
                _, failure, _ = attempt(getattr(module, name), tensor, *args)
            seen.append((failure.split(":")[0], bits(tensor).tolist()))
        assert seen[0] == seen[1]


def apply(function: Callable[..., Any], args: tuple, tensor: torch.Tensor) -> Any:
    return function(tensor, *args)


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@each_call
def test_vmap(name: str, args: tuple, randomness: str) -> None:
    seen = []
    for module in (torch_init, fastinit):
        batch = box(3, 12, 10)
        torch.manual_seed(3)
        one = functools.partial(apply, getattr(module, name), args)
        _, failure, _ = attempt(torch.func.vmap(one, randomness=randomness), batch)
        seen.append((failure, bits(batch).tolist(), torch.get_rng_state().tolist()))
    assert seen[0] == seen[1]
