# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): modes, devices, compilers, transforms and subclasses."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.init as torch_init
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from tests.support.blocks import Block, Cases, compare
from tests.support.compare import BF16, F64, attempt
from tests.support.modes import DispatchLog, EverythingIsSeven, FunctionLog

case = Cases()
own = Cases()  # enter fused() themselves


# ---- modes ----


@case
def modes_inside(b: Block) -> Any:
    w, v = b.empty(40, 30).normal_(), b.empty(400)
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
def modes_around(b: Block) -> Any:
    """They have to see what they see without fused()."""
    w = b.empty(40, 30)
    with EverythingIsSeven(), b.fused():
        x = torch.empty(400).normal_()
        w.uniform_()
        w[3].zero_()
    with FunctionLog() as called, b.fused():
        y = torch.empty(400).normal_()
        torch_init.normal_(y)
        torch_init.zeros_(y[3])
    # The block's own calls are there too.
    asked = ("normal_", "TensorBase.normal_", "TensorBase.__getitem__", "TensorBase.zero_")
    names = [f.__qualname__ for f, *_ in called.log if getattr(f, "__qualname__", "") in asked]
    with DispatchLog() as dispatched:
        with b.fused():
            z = torch.empty(400).normal_()
            z.uniform_()
        z.sum()
    return w, x, y, z, names, dispatched.log


@case
def fake_mode_inside(b: Block) -> Any:
    w = b.empty(40, 30).normal_()
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
def inside_fake_mode(b: Block) -> Any:
    real = b.empty(40, 30).normal_()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with b.fused():
            layer = nn.Linear(40, 30)
            x = torch_init.normal_(torch.empty(400))
            x[3].zero_()
            seen = attempt(real[3:].uniform_)[1].split("\n")[0]
        y = torch.zeros(3)
    return layer, x, y, seen, real


@case
def default_devices_and_dtypes(b: Block) -> Any:
    made = [b.empty(400).normal_()]
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
def default_devices_and_dtypes_around(b: Block) -> Any:
    w = b.empty(40, 30)
    with torch.device("meta"), b.fused():
        made = [torch.empty(400).normal_(), torch.empty(400, device="cpu").normal_()]
        w.uniform_()
        w[3:].normal_(generator=b.g)
        made.append(made[1].sum().item())
        torch_init.trunc_normal_(w[7:])
    torch.set_default_dtype(F64)
    try:
        with b.fused():
            made += [torch.empty(400).normal_(), nn.Linear(20, 30), w[:3].zero_()]
            torch_init.trunc_normal_(made[-2].weight)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        with b.fused():
            made += [nn.Linear(20, 30), nn.Linear(20, 30, device="cpu")]
            made[-1].reset_parameters()
    finally:
        torch.set_default_device(None)
    return w, made


@case
def inference_tensors_outlive_their_mode(b: Block) -> Any:
    """Out of it, nobody may write to them."""
    w = b.empty(40, 30)
    with torch.inference_mode():
        made = [torch.empty(400).normal_(), torch.zeros(40, 30), w.uniform_(), nn.Linear(20, 30)]
        made[1][3:9].normal_()
    return made, attempt(made[1].zero_)[1], torch.empty(400).normal_()


@own
def around_and_inside_inference_mode(b: Block) -> Any:
    with torch.inference_mode(), b.fused():
        x = torch.empty(400).normal_()
        with torch.inference_mode(False):
            y = nn.Linear(20, 30)
            torch_init.uniform_(y.weight)
        x[3].zero_()
    with torch.no_grad(), b.fused():
        z = nn.Linear(20, 30)
        z.weight.normal_()
        z.bias[3] = 0
    return x, y, z


@case
def deterministic_memory(b: Block) -> Any:
    """Then torch.empty is a fill, with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        made = [torch.empty(400), torch.empty(400, dtype=torch.int64), torch.empty_like(b.empty(9))]
        made += [made[0].new_empty(40, 30), torch.empty(400).uniform_(), torch.zeros(400)]
        made.append(torch.empty(10).normal_().resize_(400))
        made[3][3:9].normal_()
        made[0][:300].zero_()
    finally:
        torch.use_deterministic_algorithms(False)
    return made


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
def torch_script(b: Block) -> Any:
    w, v = b.empty(40, 30).normal_(), b.empty(400).uniform_()
    made = [scripted()(w, v)]
    v.zero_()
    w[3:].uniform_()
    return w, v, made, scripted()(w[2:], v)


@functools.lru_cache(None)
def compiled() -> Any:
    return torch.compile(fill_and_scale, backend="eager")


@case
def torch_compile(b: Block) -> Any:
    w, v = b.empty(40, 30).normal_(), b.empty(400).uniform_()
    made = [compiled()(w, v)]
    v.zero_()
    w[3:].uniform_()
    return w, v, made, compiled()(w, v)


@case
def function_transforms(b: Block) -> Any:
    w, v, batch = b.empty(40, 30).normal_(), b.empty(30).uniform_(), b.empty(3, 400)
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
def inside_function_transforms(b: Block) -> Any:
    v, made = b.empty(30).normal_(), []

    def build(x: torch.Tensor) -> torch.Tensor:
        with b.fused():
            w = torch.empty(30).uniform_()
            w[3:9].zero_()
            return (x * w).sum()

    made += [torch.func.grad(build)(v), torch.func.jacrev(build)(v)]
    made.append(torch.func.vmap(build, randomness="same")(v.expand(3, 30)))
    return v, made, torch.utils.checkpoint.checkpoint(build, v, use_reentrant=False)


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
def wrapping_subclasses(b: Block) -> Any:
    w, v = b.empty(40, 30).normal_(), b.empty(400)
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
def plain_subclasses(b: Block) -> Any:
    Logging.log = []
    w, v = b.empty(40, 30).as_subclass(Plain), b.empty(400).as_subclass(Logging)
    w.normal_()
    w[3].zero_()
    v.uniform_()
    torch_init.normal_(v[:300])
    torch_init.trunc_normal_(v[7:])
    seen = [w.sum().item(), type(w.clone()).__name__, v.mean().item()]
    p = Marked(b.empty(40, 30).normal_())
    torch_init.uniform_(p)
    w.uniform_()
    buffer = nn.Buffer(b.empty(400).zero_())
    return w, v, p, buffer, seen, list(Logging.log)


@case.each
def test_world(name: str, variant: str) -> None:
    compare(case[name], variant)


@own.each
def test_blocks_of_their_own(name: str, variant: str) -> None:
    compare(own[name], variant, own=True)
