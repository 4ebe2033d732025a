# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): function and dispatch modes, fake tensors, default devices, inference mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.init as torch_init
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.support.compare import (
    BF16,
    F32,
    F64,
    attempt,
    bits,
)
from tests.support.modes import DispatchLog, EverythingIsSeven, FunctionLog
from tests.support.scopes import Cases, Scope, compare, each, same

case = Cases()


own = Cases()  # enter fused() themselves


@case
def modes_inside(s: Scope) -> Any:
    w, v = s.empty(40, 30).normal_(), s.empty(400)
    with DispatchLog() as dispatched:
        w[3].zero_()
        torch_init.kaiming_uniform_(w[5:])
        torch_init.trunc_normal_(v)
        layer = nn.Linear(20, 30)
    with FunctionLog() as called:
        torch_init.normal_(layer.weight)
        torch_init.trunc_normal_(v[:300])
        w[:3].uniform_()
    with EverythingIsSeven():
        x = torch.empty(400).normal_()
        torch_init.uniform_(layer.bias)
    names = [(getattr(f, "__qualname__", str(f)), *rest) for f, *rest in called.log]
    return w, v, layer, x, dispatched.log, names


@own
def modes_around(s: Scope) -> Any:
    """They have to see what they see without fused()."""
    w = s.empty(40, 30)
    with EverythingIsSeven(), s.fused():
        x = torch.empty(400).normal_()
        w.uniform_()
        w[3].zero_()
    with FunctionLog() as called, s.fused():
        y = torch.empty(400).normal_()
        torch_init.normal_(y)
        torch_init.zeros_(y[3])
    # The scope's own calls are there too.
    asked = ("normal_", "TensorBase.normal_", "TensorBase.__getitem__", "TensorBase.zero_")
    names = [f.__qualname__ for f, *_ in called.log if getattr(f, "__qualname__", "") in asked]
    with DispatchLog() as dispatched:
        with s.fused():
            z = torch.empty(400).normal_()
            z.uniform_()
        z.sum()
    return w, x, y, z, names, dispatched.log


@case
def fake_mode_inside(s: Scope) -> Any:
    w = s.empty(40, 30).normal_()
    mode = FakeTensorMode()
    fake = mode.from_tensor(w)
    with mode:
        layer = nn.Linear(40, 30)
        x = torch.empty(400).normal_()
        fake.zero_()
        y = layer(fake.t()[:3].contiguous())
    w[3].zero_()
    return w, fake, layer, x, y.shape, torch.empty(400).uniform_()


@own
def inside_fake_mode(s: Scope) -> Any:
    real = s.empty(40, 30).normal_()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with s.fused():
            layer = nn.Linear(40, 30)
            x = torch_init.normal_(torch.empty(400))
            x[3].zero_()
            seen = attempt(real[3:].uniform_)[1].split("\n")[0]
        y = torch.zeros(3)
    return layer, x, y, seen, real


@case
def default_devices_and_dtypes(s: Scope) -> Any:
    made = [s.empty(400).normal_()]
    torch.set_default_dtype(F64)
    try:
        made += [torch.empty(400).normal_(), nn.Linear(20, 30), torch.zeros(400), torch.rand(3)]
        torch.set_default_dtype(BF16)
        made += [torch.empty(400).normal_(), nn.LayerNorm(40), torch.full((400,), 0.1)]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")
    try:
        made += [torch.empty(400).uniform_(), nn.Linear(20, 30)]
        with torch.device("cpu"), torch.device("meta"):
            made += [nn.Linear(20, 30), torch.empty(400).normal_()]
    finally:
        torch.set_default_device(None)
    made[0][3:].zero_()
    return made


@own
def default_devices_and_dtypes_around(s: Scope) -> Any:
    w = s.empty(40, 30)
    with torch.device("meta"), s.fused():
        made = [torch.empty(400).normal_(), torch.empty(400, device="cpu").normal_()]
        w.uniform_()
        w[3:].normal_(generator=s.g)
        made.append(made[1].sum().item())
        torch_init.trunc_normal_(w[7:])
    torch.set_default_dtype(F64)
    try:
        with s.fused():
            made += [torch.empty(400).normal_(), nn.Linear(20, 30), w[:3].zero_()]
            torch_init.trunc_normal_(made[-2].weight)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        with s.fused():
            made += [nn.Linear(20, 30), nn.Linear(20, 30, device="cpu")]
            made[-1].reset_parameters()
    finally:
        torch.set_default_device(None)
    return w, made


@case
def inference_tensors_outlive_their_mode(s: Scope) -> Any:
    """Out of it, nobody may write to them."""
    w = s.empty(40, 30)
    with torch.inference_mode():
        made = [torch.empty(400).normal_(), torch.zeros(40, 30), w.uniform_(), nn.Linear(20, 30)]
        made[1][3:9].normal_()
    return made, attempt(made[1].zero_)[1], torch.empty(400).normal_()


@own
def around_and_inside_inference_mode(s: Scope) -> Any:
    with torch.inference_mode(), s.fused():
        x = torch.empty(400).normal_()
        with torch.inference_mode(False):
            y = nn.Linear(20, 30)
            torch_init.uniform_(y.weight)
        x[3].zero_()
    with torch.no_grad(), s.fused():
        z = nn.Linear(20, 30)
        z.weight.normal_()
        z.bias[3] = 0
    return x, y, z


@case
def deterministic_memory(s: Scope) -> Any:
    """Then torch.empty is a fill, with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        made = [torch.empty(400), torch.empty(400, dtype=torch.int64), torch.empty_like(s.empty(9))]
        made += [made[0].new_empty(40, 30), torch.empty(400).uniform_(), torch.zeros(400)]
        made.append(torch.empty(10).normal_().resize_(400))
        made[3][3:9].normal_()
        made[0][:300].zero_()
    finally:
        torch.use_deterministic_algorithms(False)
    return made


@case.each
def test_cases(name: str, variant: str) -> None:
    compare(case[name], variant)


@own.each
def test_scopes_of_their_own(name: str, variant: str) -> None:
    compare(own[name], variant, own=True)


def mat() -> torch.Tensor:
    return torch.randn(200, 100)


def made_of_linear(change: Callable[[nn.Module], nn.Module]) -> Any:
    layer = nn.Linear(200, 100)
    return layer, change(layer)


@each(
    {
        "contiguous": lambda: mat().t().contiguous(),
        "contiguous already": lambda: mat().contiguous(),
        "to": lambda: mat().to(F64),
        "to itself": lambda: mat().to(F32),
        "half": lambda: mat().half(),
        "reshape": lambda: mat().t().reshape(-1),
        "reshape without a copy": lambda: mat().reshape(-1).zero_(),
        "flatten": lambda: mat().t().flatten(),
        "flatten without a copy": lambda: mat().flatten().uniform_(),
        "module": lambda: made_of_linear(lambda layer: layer.to(BF16)),
        "double": lambda: made_of_linear(nn.Module.double),
        "type_as": lambda: mat().type_as(torch.ones(1, dtype=F64)),
        "expand_as": lambda: mat()[:1].expand_as(torch.empty(7, 100)).contiguous(),
        "unflatten": lambda: mat().t().flatten().unflatten(0, (50, 400)),
        "chunks": lambda: [x.reshape(-1) for x in mat().t().chunk(3)],
        "matrix": lambda: mat().t() @ mat(),
    }
)
def test_inference_mode(make: Callable[..., Any]) -> None:
    """In it, composite operators such as reshape reach a mode undivided."""

    def inside() -> Any:
        with torch.inference_mode():
            made = make()
        x = made[1].weight if isinstance(made, tuple) else made
        x = x[0] if isinstance(x, list) else x
        # Not a clone, whose version is 0 under any dispatch mode and 1 without.
        return made, x.is_inference(), bits(x).numpy(), x.sum().item()

    same(inside)


def test_symbolic_sizes() -> None:
    def inside() -> Any:
        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env)
        x = mode.from_tensor(torch.randn(50, 100))
        assert isinstance(x.shape[0], torch.SymInt)
        made = []
        with mode:
            for factory in (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand):
                made.append(factory(x.shape[0], 100))
            made += [torch.full((x.shape[0], 100), 2.0), x.new_zeros(x.shape[0], 100)]
            made += [torch.zeros_like(x), torch.empty_like(x).normal_(), x.new_full(x.shape, 3.0)]
        return [tuple(map(str, t.shape)) for t in made], [str(guard.expr) for guard in env.guards]

    same(inside)
