# SPDX-License-Identifier: BSD-3-Clause
"""init_model_ on a zoo of modules: as if torch had initialised them, module by module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastinit
from fastinit import init_model_
from tests.support.compare import BF16, F16, F32, F64
from tests.support.marks import slow
from tests.support.models import (
    ZOO,
    assert_same_model,
    by_name,
    everything,
    gpt2,
    model_state,
    resnet,
    vit,
)

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("dtype", [F32, *slow([F64, BF16, F16])], ids=str)
@pytest.mark.parametrize("kind", ZOO)
def test_reset(kind: str, dtype: torch.dtype) -> None:
    assert_same_model(lambda: ZOO[kind]().to(dtype), None, init_model_)


@pytest.mark.parametrize("kind", ["mlp", "conv", "embeddings", "recurrent", "encoder", "tied"])
def test_reset_is_native_and_fused(kind: str) -> None:
    """One native call for many fills, however small they are."""
    assert_same_model(ZOO[kind], None, init_model_, native=True)


@pytest.mark.parametrize("fn", [everything, *slow([gpt2, resnet, vit, by_name])])
@pytest.mark.parametrize("kind", [k for k in ZOO if k != "no_elements"])
def test_functions_on_the_zoo(fn: Callable[..., Any], kind: str) -> None:
    assert_same_model(ZOO[kind], fn, init_model_)


@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize("fn", [gpt2, *slow([vit, everything])])
def test_functions_in_other_dtypes(fn: Callable[..., Any], dtype: torch.dtype) -> None:
    for kind in ("mlp", "encoder", "tied"):
        assert_same_model(lambda k=kind: ZOO[k]().to(dtype), fn, init_model_, native=True)


def test_large_model() -> None:
    """Many tiles and threads; the last layer is bigger than all others together."""
    make = lambda: nn.Sequential(*[nn.Linear(64, 64) for _ in range(40)], nn.Linear(64, 9000))  # noqa: E731
    for threads in (1, 5):
        torch.set_num_threads(threads)
        for fn in (None, gpt2, vit):
            assert_same_model(make, fn, init_model_, native=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_contexts(context: Callable[[], Any]) -> None:
    def inside(model: nn.Module, fn: Any) -> nn.Module:
        with context():
            return init_model_(model, fn)

    for fn in (None, vit):
        with context():  # torch's turn too
            assert_same_model(ZOO["encoder"], fn, inside)


def test_second_initialisation_draws_on() -> None:
    def twice(model: nn.Module, fn: Any) -> nn.Module:
        init_model_(model, fn)
        return init_model_(model, fn)

    def fn(m: nn.Module, g: torch.Generator) -> None:
        everything(m, g)
        vit(m, g)

    seen = []
    for fast in (False, True):
        torch.manual_seed(1)
        model, g = ZOO["encoder"](), torch.Generator().manual_seed(2)
        own = functools.partial(fn, g=g)
        _ = twice(model, own) if fast else model.apply(own).apply(own)
        seen.append({**model_state(model), "g": g.get_state(), "d": torch.get_rng_state()})
    for key, expected in seen[0].items():
        found = seen[1][key]
        assert torch.equal(expected, found) if torch.is_tensor(expected) else expected == found, key


def test_training_goes_the_same_way() -> None:
    """Gradients, hooks and optimisers find ordinary leaves."""
    losses = []
    for fast in (False, True):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        if fast:
            init_model_(model)
        else:
            model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        inputs = torch.randn(32, 8)
        for _ in range(5):
            optimiser.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[:5] == losses[5:]


@pytest.mark.parametrize("outer", [False, True])
def test_memory_that_takes_the_place_of_a_replaced_parameters(outer: bool) -> None:
    """numpy's does not wait, though it may get what identified the parameter's storage."""
    seen: list[float] = []

    def fn(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            m.weight = nn.Parameter(torch.empty(200, 200))
            array = np.zeros(40_000, np.float32)
            torch.from_numpy(array).fill_(1.0)
            seen.append(float(array[0]))

    with fastinit.fused() if outer else nullcontext():
        init_model_(nn.Sequential(*[nn.Linear(200, 200, bias=False) for _ in range(50)]), fn)
        for _ in range(50 * outer):  # of a model that is gone
            array = np.zeros(40_000, np.float32)
            torch.from_numpy(array).fill_(1.0)
            seen.append(float(array[0]))
    assert set(seen) == {1.0}
