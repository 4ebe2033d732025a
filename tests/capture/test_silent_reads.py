# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): readers of pending memory that no operator announces."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn
from torch.utils.dlpack import to_dlpack

import fastinit
from tests.support.compare import (
    F16,
    assert_equal_seen,
    bits,
)
from tests.support.scopes import N, each, same


def square(n: int) -> torch.Tensor:
    return torch.empty(n, n)


@each(
    {
        "constant_": lambda w: torch_init.constant_(torch.empty(10), w[3]),
        "large constant_": lambda w: torch_init.constant_(torch.empty(N), w[3]),
        "uniform_": lambda w: torch_init.uniform_(torch.empty(10), 0.0, w[3]),
        "large uniform_": lambda w: torch_init.uniform_(torch.empty(N), 0.0, w[3]),
        "normal_": lambda w: torch_init.normal_(torch.empty(10), w[3], 0.1),
        "large normal_": lambda w: torch_init.normal_(torch.empty(N), w[3], w[4]),
        "xavier_uniform_": lambda w: torch_init.xavier_uniform_(square(10), gain=w[2]),
        "large xavier_normal_": lambda w: torch_init.xavier_normal_(square(200), gain=w[2]),
        "kaiming_normal_": lambda w: torch_init.kaiming_normal_(square(10), float(w[2])),
        "orthogonal_": lambda w: torch_init.orthogonal_(square(10), gain=w[2]),
        "medium orthogonal_": lambda w: torch_init.orthogonal_(square(100), gain=w[2]),
        "large orthogonal_": lambda w: torch_init.orthogonal_(square(200), gain=w[2]),
        "constant_ over itself": lambda w: torch_init.constant_(w, w[2]),
        "trunc_normal_": lambda w: torch_init.trunc_normal_(torch.empty(10), 0.0, w[2]),
        "fill_": lambda w: torch.empty(N).fill_(w[2]),
        "full": lambda w: torch.full((N,), w[2]),
        "full_like": lambda w: torch.full_like(w, w[2]),
        "setitem": lambda w: torch.zeros(N).index_fill_(0, torch.arange(9), w[2]),
    }
)
@pytest.mark.usefixtures("own_factors")
def test_arguments_that_are_pending(make: Callable[[torch.Tensor], Any]) -> None:
    def both() -> Any:
        w = torch.rand(N)
        view = torch.rand(N)[7:8].view(())
        return make(w), make(torch.rand(N) + view), w, view

    same(both)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(N)), nn.Parameter(torch.zeros(10))
        self.c = nn.Parameter(torch.zeros(200, 100))
        self.first = [self.w.detach()[0]]


def fill_by_the_first(m: nn.Module) -> None:
    torch_init.uniform_(m.w, 1.0, 2.0)
    torch_init.constant_(m.b, m.first[0])
    torch_init.uniform_(m.b[:5], 0.0, m.first[0])
    torch_init.orthogonal_(m.c, gain=m.first[0])
    torch_init.constant_(m.w[9000:], m.first[0])


@pytest.mark.usefixtures("own_factors")
def test_arguments_that_were_made_before() -> None:
    """Views of what init_model_ fills."""

    def initialised(how: Callable[..., Any]) -> dict[str, Any]:
        torch.manual_seed(3)
        model = Scaled()
        how(model)
        seen = {name: bits(p) for name, p in model.named_parameters()}
        return {**seen, "state": torch.get_rng_state(), "first": bits(model.first[0])}

    assert_equal_seen(
        initialised(lambda model: model.apply(fill_by_the_first)),
        initialised(lambda model: fastinit.init_model_(model, fill_by_the_first)),
        "init_model_",
    )


class Sub(torch.Tensor):
    pass


def refilled(elements: Callable[[torch.Tensor], Any], how: Callable[[Any], Any]) -> Any:
    """What was known when the views were made must not be all that is ever known."""
    p = torch.randn(N)
    views = elements(p)
    made = [how(views)]
    p.uniform_()
    made.append(how(views))
    torch_init.trunc_normal_(p)
    made.append(how(views))
    p[:9000].zero_()
    made.append(how(elements(p)))
    p.copy_(torch.randn(N))
    return made, how(elements(p)), p


ELEMENTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "two": lambda p: [p[0], p[1]],
    "with a number": lambda p: [p[0], 1.0],
    "nested": lambda p: [[p[0], p[1]], [p[2], p[3]]],
    "tuples": lambda p: ((p[0],), (p[1],)),
    "slices": lambda p: [p[5:6], p[6:7]],
    "unbound": lambda p: list(p[:3]),
    "split": lambda p: list(p[:3].split(1)),
    "split without saying so": lambda p: list(torch.unsafe_split(p[:3], 1)),
    "chunks": lambda p: list(p.view(4, N // 4)[3, :3].chunk(3)),
    "of a matrix": lambda p: [p.view(200, N // 200)[3, 4], p.view(200, N // 200).diagonal()[7]],
    "strided": lambda p: [p.as_strided((), (), 7), p.as_strided((1,), (1,), 9)[0]],
    "detached": lambda p: [p[0].detach(), p.data[1], p.detach()[2]],
    "subclasses": lambda p: [p[0].as_subclass(Sub), p.as_subclass(Sub)[1]],
    "parameters": lambda p: [nn.Parameter(p[0], False), nn.Parameter(p, False)[1]],
    "squeezed": lambda p: [p[3:4].squeeze(), p.narrow(0, 3, 1)[0], p[3:4].expand(1)[0]],
    "iterated": lambda p: [x for x, _ in zip(p[:99], range(3))],
}


WAYS: dict[str, Callable[[Any], Any]] = {
    "tensor": torch.tensor,
    "as_tensor": torch.as_tensor,
    "asarray": torch.asarray,
    "new_tensor": lambda x: torch.ones(1).new_tensor(x),
    "Tensor": torch.Tensor,
    "DoubleTensor": torch.DoubleTensor,
    "tensor, half": lambda x: torch.tensor(x, dtype=F16),
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("elements", ELEMENTS)
def test_tensors_made_of_elements(elements: str, how: str) -> None:
    """torch.tensor reads views of one element without an operator."""
    same(lambda: refilled(ELEMENTS[elements], WAYS[how]))


TABLE: list[torch.Tensor] = []


@torch.library.custom_op("fastinit_holes::add_table", mutates_args=())
def add_table(x: torch.Tensor) -> torch.Tensor:
    return x + TABLE[0]


library = torch.library.Library("fastinit_holes_too", "DEF")
library.define("add_table(Tensor x) -> Tensor")
library.impl("add_table", lambda x: x + TABLE[0], "CPU")
library.define("write_table(Tensor x) -> ()")
library.impl("write_table", lambda x: TABLE[0].copy_(x) and None, "CPU")


@each(
    {
        "custom_op": lambda: add_table(torch.arange(float(N))),
        "custom_op of what waits": lambda: add_table(torch.rand(N)),
        "impl": lambda: torch.ops.fastinit_holes_too.add_table(torch.arange(float(N))),
    }
)
def test_operators_with_tensors_of_their_own(make: Callable[..., Any]) -> None:
    def inside() -> Any:
        TABLE[:] = [torch.randn(N)]
        made = make()
        TABLE[0].uniform_()
        return made, make(), TABLE[0]

    same(inside)


def scripted() -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.jit.script(nn.Linear(300, 100))


def saved_and_loaded(save: Callable[[Any], Any]) -> Any:
    module = scripted()
    torch_init.normal_(module.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = save(module)
        loaded = torch.jit.load(file)
    torch_init.uniform_(module.weight)
    return list(module.parameters()), list(loaded.parameters())


def into_file(module: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return file


def test_script_modules_that_are_saved(tmp_path: Path) -> None:
    path = str(tmp_path / "module.pt")
    same(lambda: saved_and_loaded(into_file))
    same(lambda: saved_and_loaded(lambda module: io.BytesIO(module.save_to_buffer())))
    same(lambda: saved_and_loaded(lambda module: (module.save(path), path)[1]))
    same(lambda: saved_and_loaded(lambda module: (torch.jit.save(module, path), path)[1]))


@each({"torch": lambda t: torch.to_dlpack(t), "before": lambda t: to_dlpack(t)})
def test_capsules(make: Callable[[torch.Tensor], Any]) -> None:
    """Also by a name that was bound before there was a scope, as libraries do."""

    def inside() -> Any:
        t, u = torch.randn(N), torch.rand(N)
        x, y = torch.from_dlpack(make(t)), torch.from_dlpack(u)
        seen = [x.clone(), y.clone()]
        t.zero_()
        u[3:].normal_()
        return seen, x.clone(), y.clone(), t, u

    same(inside)


def test_representations_in_transforms() -> None:
    """A wrapper of functorch has no storage; what it wraps is read."""
    seen: list[str] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.extend((repr(x), str(x), f"{x}"))
        return (x * 2).sum()

    def inside() -> Any:
        seen.clear()
        x, waiting = torch.randn(200, 100), torch.rand(N)
        made = [torch.vmap(look)(x), torch.func.grad(look)(x)]
        x.uniform_()
        made.append(torch.vmap(torch.func.grad(look))(x))
        made.append(torch.func.jvp(look, (x,), (torch.ones(200, 100),)))
        return made, list(seen), x, waiting

    same(inside)
