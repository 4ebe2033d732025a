# SPDX-License-Identifier: BSD-3-Clause
"""init_model_ while the user's function also draws, seeds, fails, nests and brings modes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn
from torch.nn.init import normal_ as bound_early

import fastinit
from fastinit import init_model_
from tests.support.compare import F32, attempt
from tests.support.marks import slow
from tests.support.models import Net, assert_same_model, model_state
from tests.support.modes import EverythingIsSeven

pytestmark = pytest.mark.usefixtures("native")

G = torch.Generator
CASES: dict[str, Callable[[Net, G], Any]] = {}


def case(function: Callable[[Net, G], Any]) -> Callable[[Net, G], Any]:
    CASES[function.__name__] = function
    return function


# ---- drawing ----


@case
def draws_in_between(m: Net, g: G) -> None:
    torch_init.normal_(m.bias[:3])  # leaves a cached normal
    m.notes.append(torch.rand(3).tolist())
    torch_init.uniform_(m.weight, generator=g)
    m.notes.append(torch.rand(3, generator=g).tolist())
    m.notes.append(torch.empty(1).normal_().item())
    torch_init.sparse_(m.weight, 0.3)
    m.notes += [torch.randperm(9).tolist(), torch.randint(9, (3,), generator=g).tolist()]
    torch_init.trunc_normal_(m.table, generator=g)
    m.notes.append(torch.bernoulli(torch.full((9,), 0.5)).tolist())
    torch_init.normal_(m.weight)
    m.notes.append(nn.functional.dropout(torch.ones(9)).tolist())
    m.notes.append(torch.multinomial(torch.ones(9), 3, generator=g).tolist())


@case
def default_generator_states(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    m.notes.append(torch.get_rng_state().tolist())
    torch_init.uniform_(m.weight)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch_init.normal_(m.weight[:10])
    torch_init.normal_(m.bias)
    state = torch.get_rng_state()
    torch_init.uniform_(m.table)
    torch.set_rng_state(state)
    torch_init.uniform_(m.table[:20])
    m.notes.append(torch.initial_seed())


@case
def seeds_per_parameter(m: Net, g: G) -> None:
    for i, p in enumerate(m.parameters()):
        torch.manual_seed(i)
        torch_init.normal_(p)


@case
def seeds_per_parameter_by_a_generator(m: Net, g: G) -> None:
    for i, p in enumerate(m.parameters()):
        g.manual_seed(i)
        torch_init.normal_(p, generator=g)


@case
def seeds_the_default_generator_directly(m: Net, g: G) -> None:
    for i, p in enumerate(m.parameters()):
        torch.default_generator.manual_seed(i)
        torch_init.normal_(p)


@case
def generator_states(m: Net, g: G) -> None:
    torch_init.normal_(m.weight, generator=g)
    state = g.get_state()
    m.notes.append(state.tolist())
    torch_init.uniform_(m.table, generator=g)
    g.set_state(state)
    torch_init.uniform_(m.bias, generator=g)
    twin = g.clone_state()
    torch_init.normal_(m.table, generator=twin)
    m.notes.append(torch.rand(2, generator=twin).tolist())
    torch_init.normal_(m.mask, generator=torch.Generator().manual_seed(3))


# ---- calling ----


@case
def names_bound_before(m: Net, g: G) -> None:
    bound_early(m.weight)
    torch_init.uniform_(m.weight[:7])
    bound_early(m.weight[5:9], generator=g)
    m.bias.data.normal_()
    fastinit.normal_(m.bias[:20])


@case
def nested(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    init_model_(nn.Linear(3, 4))
    plan = fastinit.Plan()
    plan.uniform_(m.bias)
    torch_init.normal_(m.bias)
    plan.run()
    m.inner = nn.Sequential(nn.Linear(9, 9), nn.Embedding(7, 5, padding_idx=2))
    m.weight.data[:9, :9] = m.inner[0].weight
    init_model_(m.inner, lambda n: torch_init.normal_(n.weight) if hasattr(n, "weight") else None)
    torch_init.uniform_(m.weight)


@case
def another_thread_fills(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    own = torch.Generator().manual_seed(1)
    thread = threading.Thread(target=lambda: torch_init.normal_(m.table, generator=own))
    thread.start()
    thread.join()
    m.notes.append(m.table.sum().item())


@case
def returned_tensors_are_used(m: Net, g: G) -> None:
    m.bias.data.copy_(torch_init.normal_(torch.empty(41)))
    m.weight.data += torch_init.orthogonal_(torch.empty(40, 30), 0.5)
    m.table = nn.Parameter(torch_init.uniform_(torch.empty(8, 4), generator=g) * 2)
    m.notes.append(torch_init.sparse_(torch.empty(20, 3), 0.5).count_nonzero().item())


@case
def fails_in_the_middle(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    torch_init.uniform_(m.table, generator=g)
    if m.bias.numel():
        raise KeyError("enough")
    torch_init.normal_(m.bias)


@case
def fails_in_torch(m: Net, g: G) -> None:
    torch_init.normal_(m.weight)
    torch_init.normal_(m.bias, 0.0, -1.0)


@case
def recovers(m: Net, g: G) -> None:
    for bad in (lambda: torch_init.eye_(m.bias), lambda: torch_init.uniform_(m.weight, 1, 0)):
        torch_init.normal_(m.weight, generator=g)
        try:
            bad()
        except (ValueError, RuntimeError) as error:
            m.notes.append(str(error))
    torch_init.uniform_(m.bias)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [1, *slow([2])])
@pytest.mark.usefixtures("own_factors")
def test_order_is_not_visible(name: str, seed: int) -> None:
    assert_same_model(Net, CASES[name], init_model_, seed=seed)


def switches() -> list[Any]:
    """What init_model_ may replace while it records."""
    names = ("numpy", "tolist", "data_ptr", "__array__", "__dlpack__", "untyped_storage")
    return [
        *(getattr(torch_init, n) for n in torch_init.__all__),
        *(getattr(torch.Tensor, n) for n in names),
        torch.random.default_generator,
        torch.utils.dlpack.to_dlpack,
        torch.nn.modules.linear.init.kaiming_uniform_,
        threading.Thread.start,
    ]


def test_two_threads_at_once() -> None:
    """Both record; the first to begin is also the first to end, and all is as before."""
    before = switches()
    together, first_is_done = threading.Barrier(2, timeout=30), threading.Event()
    models = {i: nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5)) for i in (0, 1)}
    own = {i: torch.Generator().manual_seed(i) for i in (0, 1)}

    def job(i: int) -> None:
        def fn(m: nn.Module) -> None:
            if isinstance(m, nn.Linear):
                torch_init.normal_(m.weight, generator=own[i])
                if m.out_features == 30:
                    together.wait()
                if i == 1:
                    assert first_is_done.wait(30)
                torch_init.uniform_(m.bias, generator=own[i])

        init_model_(models[i], fn)
        first_is_done.set()

    failures: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: failures.append(attempt(job, i)[1])) for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == ["", ""]
    assert all(a is b for a, b in zip(before, switches(), strict=True))
    for i in (0, 1):
        g = torch.Generator().manual_seed(i)
        for layer in models[i]:
            assert torch.equal(layer.weight, torch.empty_like(layer.weight).normal_(generator=g))
            assert torch.equal(layer.bias, torch.empty_like(layer.bias).uniform_(generator=g))


def test_exception_is_the_users_own() -> None:
    error = ZeroDivisionError("mine")

    def fn(module: nn.Module) -> None:
        torch_init.normal_(module.weight)
        raise error

    before = switches()
    with pytest.raises(ZeroDivisionError) as caught:
        init_model_(nn.Linear(5, 5), fn)
    assert caught.value is error
    assert all(a is b for a, b in zip(before, switches(), strict=True))
    plain = torch_init.normal_(torch.zeros(50))  # and nothing is held back any more
    assert plain.any()


def test_mode_of_the_user_around_it() -> None:
    with EverythingIsSeven():
        model = nn.Linear(30, 40)
        init_model_(model)
    assert (model.weight == 7.0).all()
    assert (model.bias == 7.0).all()


def test_mode_of_the_user_within() -> None:
    def inside(m: nn.Module, g: G) -> None:
        torch_init.normal_(m.weight)
        with EverythingIsSeven():
            torch_init.normal_(m.weight[:5])
            torch_init.uniform_(m.bias)
        torch_init.uniform_(m.weight[3:8])

    assert_same_model(Net, inside, init_model_)


def test_arguments() -> None:
    model = nn.Linear(20, 20)
    state = model_state(model)
    assert init_model_(model, lambda m: None).unwritten == ["weight", "bias"]
    assert torch.equal(state["weight"], model_state(model)["weight"])
    assert model.weight.dtype == F32
