# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): transforms, compilers, and subclasses of Tensor."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.init as torch_init
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

from tests.support.compare import attempt
from tests.support.scopes import Cases, N, Scope, compare, each, same

case = Cases()


own = Cases()  # enter fused() themselves


# ---- transforms and compilers ----


def fill_and_scale(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.normal_()
    z = torch.zeros(400) + 1
    y[3:].uniform_()
    return x.sum() * z.fill_(2.0) + y.sum()


@functools.lru_cache(None)
def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.jit.script(fill_and_scale)


@case
def torch_script(s: Scope) -> Any:
    w, v = s.empty(40, 30).normal_(), s.empty(400).uniform_()
    made = [scripted()(w, v)]
    v.zero_()
    w[3:].uniform_()
    return w, v, made, scripted()(w[2:], v)


@functools.lru_cache(None)
def compiled() -> Any:
    return torch.compile(fill_and_scale, backend="eager")


@case
def torch_compile(s: Scope) -> Any:
    w, v = s.empty(40, 30).normal_(), s.empty(400).uniform_()
    made = [compiled()(w, v)]
    v.zero_()
    w[3:].uniform_()
    return w, v, made, compiled()(w, v)


@case
def function_transforms(s: Scope) -> Any:
    w, v, batch = s.empty(40, 30).normal_(), s.empty(30).uniform_(), s.empty(3, 400)
    made = [
        torch.func.vmap(lambda row: row * 2 + v)(w),
        torch.func.grad(lambda x: (x * v).sum())(v),
    ]
    v.normal_()

    def fill(x: torch.Tensor) -> torch.Tensor:
        x.normal_()
        x[3:9].zero_()
        return x.sum() + torch.empty(400).uniform_().sum()

    for how in ("same", "different", "error"):
        made.append(attempt(torch.func.vmap(fill, randomness=how), batch.zero_())[:2])
    made += [batch.clone(), torch.func.vmap(lambda x: x.fill_(3.0))(batch.normal_())]
    layers = [nn.Linear(20, 30) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)
    torch_init.zeros_(layers[0].weight)
    made += [parameters, torch.func.functional_call(layers[0], {"bias": v}, (w[:20].t(),))]
    made.append(torch.func.jvp(lambda x: x * w, (w,), (torch.ones(40, 30),)))
    made.append(torch.func.jacrev(lambda x: (x * torch.zeros(30).fill_(2)).cumsum(0))(v))
    return w, v, made, [layer.weight for layer in layers]


@own
def inside_function_transforms(s: Scope) -> Any:
    v, made = s.empty(30).normal_(), []

    def build(x: torch.Tensor) -> torch.Tensor:
        with s.fused():
            w = torch.empty(30).uniform_()
            w[3:9].zero_()
            return (x * w).sum()

    made += [torch.func.grad(build)(v), torch.func.jacrev(build)(v)]
    made.append(torch.func.vmap(build, randomness="same")(v.expand(3, 30)))
    return v, made, torch.utils.checkpoint.checkpoint(build, v, use_reentrant=False)


def test_control_flow_operators() -> None:
    def inside() -> Any:
        x, y = torch.randn(N), torch.rand(N)
        made = [
            torch.cond(torch.tensor(choice), lambda x: x + y, lambda x: x - 1, (x,))
            for choice in (True, False)
        ]
        x.zero_()
        return made, x, y

    same(inside)


class Padded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape[0], 100) + x + torch.zeros_like(x) + x.new_ones(x.shape)


def test_export_with_dynamic_shapes() -> None:
    """Nobody may ask how large a symbolic size is, which would become a condition."""

    def inside() -> Any:
        rows = torch.export.Dim("rows", min=2, max=100_000)
        x = torch.randn(50, 100)
        exported = torch.export.export(Padded(), (x,), dynamic_shapes={"x": {0: rows}})
        called = exported.module()(torch.ones(700, 100))
        return str(exported.range_constraints), exported.graph_module.code, called, x

    same(inside)


# ---- subclasses ----


class Wrapper(torch.Tensor):
    """Computes with another tensor, out of sight of modes that handle the wrapper itself."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = tree_map(lambda x: x.inner if isinstance(x, cls) else x, args)
        result = func(*inner, **(kwargs or {}))
        if func._schema.is_mutable:
            return args[0]
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, result)


@case
def wrapping_subclasses(s: Scope) -> Any:
    w, v = s.empty(40, 30).normal_(), s.empty(400)
    x, y = Wrapper(w), nn.Parameter(Wrapper(v.zero_()))
    seen = [(x + 1).inner.sum().item(), x.sum().item()]
    w.uniform_()
    seen += [x.sum().item(), x[3].inner]
    x.normal_()
    w[3].zero_()
    torch_init.uniform_(y)
    seen.append((y * 2).detach().inner)
    v[3:].normal_()
    with torch.no_grad():
        y[:2].fill_(5)
        x.copy_(w.t().contiguous().t())
    return w, v, seen, Wrapper(torch.empty(400).zero_()).uniform_().inner


class Plain(torch.Tensor):
    pass


class Logging(torch.Tensor):
    log: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.log.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


class Marked(nn.Parameter):
    pass


@case
def plain_subclasses(s: Scope) -> Any:
    Logging.log = []
    w, v = s.empty(40, 30).as_subclass(Plain), s.empty(400).as_subclass(Logging)
    w.normal_()
    w[3].zero_()
    v.uniform_()
    torch_init.normal_(v[:300])
    torch_init.trunc_normal_(v[7:])
    seen = [w.sum().item(), type(w.clone()).__name__, v.mean().item()]
    p = Marked(s.empty(40, 30).normal_())
    torch_init.uniform_(p)
    w.uniform_()
    buffer = nn.Buffer(s.empty(400).zero_())
    return w, v, p, buffer, seen, list(Logging.log)


@case.each
def test_cases(name: str, variant: str) -> None:
    compare(case[name], variant)


@own.each
def test_scopes_of_their_own(name: str, variant: str) -> None:
    compare(own[name], variant, own=True)


def shown(x: torch.Tensor) -> Any:
    return type(x).__name__, type(x.clone()).__name__, x.clone(), x


def of_two() -> Any:
    a, b = torch.randn(N), torch.randn(N)
    both = TwoTensor(a, b)
    other = both.clone()
    a.zero_()
    return other.a, other.b, both.a, both.b, (both + 1).b, type(other).__name__


@each(
    {
        "as_subclass": lambda: shown(torch.randn(N).as_subclass(Plain)),
        "made subclass": lambda: shown(torch.Tensor._make_subclass(Plain, torch.randn(N))),
        "parameter": lambda: shown(Marked(torch.randn(N))),
        "detached parameter": lambda: shown(Marked(torch.randn(N)).detach()),
        "deep copy": lambda: copy.deepcopy([Marked(torch.randn(N))] * 2),
        "buffer": lambda: shown(nn.Buffer(torch.randn(N))),
        "copied": lambda: torch.empty(N).copy_(torch.randn(N).as_subclass(Plain)),
        "copied into": lambda: torch.randn(N).as_subclass(Plain).copy_(torch.ones(N)),
        "two tensors": of_two,
    }
)
def test_clones_of_subclasses(make: Callable[..., Any]) -> None:
    """Their memory is pending as a plain tensor's is."""
    same(make)
