# SPDX-License-Identifier: BSD-3-Clause
"""Tensors that are no plain memory, and all who watch: subclasses, modes, autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastinit
from tests.support.compare import DTYPES, F32, F64, Position, assert_same, bits
from tests.support.layouts import box
from tests.support.marks import slow
from tests.support.modes import DispatchLog, FunctionLog
from tests.support.orthogonal import assert_close, check, each_dtype
from tests.support.qr_model import drawn, exact

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of a buffer of 20000
    "offset": lambda b: b[7 : 7 + 33 * 47].view(33, 47),
    "transposed": lambda b: b[3 : 3 + 33 * 47].view(33, 47).t(),
    "columns": lambda b: b[:3300].view(33, 100)[:, 2:49],
    "columns_transposed": lambda b: b[:3300].view(33, 100)[:, 2:49].t(),
    "every_second": lambda b: b[:6600].view(33, 200)[:, 1::2],
    "rows": lambda b: b[:6600].view(66, 100)[1::3],
    "channels_last": lambda b: b[: 8 * 54].view(8, 3, 3, 6).permute(0, 3, 1, 2)[:, :1],
    "wide_above_64": lambda b: b[5 : 5 + 100 * 150].view(100, 150),
    "strided_above_64": lambda b: b[:15000].view(100, 150)[:, ::2],
    "one_row": lambda b: b[11:300:2].view(1, -1),
    "one_column": lambda b: b[11:300:2].view(-1, 1),
    "one": lambda b: b[11:12].view(1, 1),
}


@pytest.mark.parametrize("view", VIEWS)
@each_dtype
def test_nothing_beside_a_view_is_written(dtype: torch.dtype, view: str) -> None:
    buffer = box(20000, dtype=dtype)
    at = Position(words=3, cached=True)
    check(lambda d: VIEWS[view](box(20000, dtype=d)), dtype, -0.5, at)
    t = VIEWS[view](buffer)
    torch.manual_seed(1)
    fastinit.orthogonal_(t)
    assert not bool((t == 13).any())
    t.fill_(13.0)
    assert torch.equal(buffer, box(20000, dtype=dtype))


@each_dtype
def test_layouts_that_cannot_be_viewed(dtype: torch.dtype) -> None:
    """tensor.view_as(q) fails; by then the normals are drawn."""
    cases: list[Callable[[], Tensor]] = [
        lambda: box(6, 5, 4, dtype=dtype).permute(0, 2, 1),
        lambda: box(8, 6, 3, 3, dtype=dtype).to(memory_format=torch.channels_last),
        lambda: box(8, 4, 6, dtype=dtype)[:, ::2],
    ]
    for make in cases:
        if dtype in (F32, F64):
            assert_same("orthogonal_", make, fails=True)
        else:
            with pytest.raises(RuntimeError, match="view size is not compatible"):
                fastinit.orthogonal_(make())


# More of them in tests/api/test_errors.py.
REFUSED: dict[str, Callable[[], Any]] = {
    "bool": lambda: torch.ones(5, 6, dtype=torch.bool),
    "complex_view": lambda: torch.ones(4, 5, dtype=torch.complex64).conj(),
    "no_dimension": lambda: torch.ones(()),
    "one_empty": lambda: torch.ones(0),
    "expanded_rows": lambda: torch.ones(1, 4).expand(3, 4),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "float8": lambda: torch.ones(4, 4).to(torch.float8_e5m2),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_that_torch_refuses(kind: str) -> None:
    assert_same("orthogonal_", REFUSED[kind], fails=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.complex64], ids=str)
def test_meta(dtype: torch.dtype) -> None:
    assert_same("orthogonal_", lambda: torch.empty(9, 8, dtype=dtype, device="meta"))
    t = torch.empty(3, 9, 8, dtype=dtype, device="meta")
    state = torch.get_rng_state()
    assert fastinit.orthogonal_batched_(t) is t
    assert torch.equal(state, torch.get_rng_state())


class Logged(Tensor):
    """A subclass that sees torch's operators."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_go_torchs_way() -> None:
    found = []
    for module in (torch_init, fastinit):
        Logged.seen.clear()
        torch.manual_seed(3)
        t = box(30, 20).as_subclass(Logged)
        assert module.orthogonal_(t) is t
        names = [name for name in Logged.seen if name not in ("__get__",)]
        found.append((names, bits(t.as_subclass(Tensor))))
    assert "linalg_qr" in found[0][0]
    # After what fastinit asks to know whose it is, the same operators:
    assert found[1][0][-len(found[0][0]) :] == found[0][0]
    assert torch.equal(found[0][1], found[1][1])


def test_modes_see_torchs_operators() -> None:
    found = []
    for module in (torch_init, fastinit):
        torch.manual_seed(3)
        t = box(30, 20)
        with DispatchLog() as mode:
            module.orthogonal_(t)
        found.append(([name for name, *_ in mode.log], bits(t)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("way", ["mode", "subclass", "function mode", "fake"])
def test_batches_that_others_see(way: str) -> None:
    """torch's operators do it where a kernel may not write."""
    if way == "fake":
        state = torch.get_rng_state()
        with FakeTensorMode():
            t = torch.empty(3, 30, 20)
            assert fastinit.orthogonal_batched_(t, 2) is t
        assert torch.equal(torch.get_rng_state(), state)
        return
    for dtype in DTYPES:
        t = torch.empty(3, 30, 20, dtype=dtype)
        if way == "subclass":
            t = t.as_subclass(Logged)
        torch.manual_seed(4)
        with {"mode": DispatchLog, "function mode": FunctionLog}.get(way, nullcontext)() as seen:
            assert fastinit.orthogonal_batched_(t, 2) is t
        assert way != "mode" or any("linalg_qr" in name for name, *_ in seen.log)
        truth = exact(drawn((3, 30, 20), dtype, torch.Generator().manual_seed(4))) * 2
        error = (t.as_subclass(Tensor).double() - truth).abs().max()
        assert float(error) < {F64: 1e-13, F32: 1e-5}.get(dtype, 2.0**-8)


TRANSFORMS = ["functionalize", "vmap", "grad", "make_fx", *slow(["compile"])]


@pytest.mark.parametrize("seen_by", TRANSFORMS)
def test_batches_under_transforms(seen_by: str) -> None:
    """Torch's operators do it where others have to see them; orthogonal where they have values."""

    def made(x: Tensor) -> Tensor:
        return fastinit.orthogonal_batched_(x.clone())

    x = torch.zeros(2, 20, 12)
    if seen_by == "functionalize":
        q = torch.func.functionalize(made)(x)
    elif seen_by == "vmap":
        q = torch.func.vmap(made, randomness="different")(x)
    elif seen_by == "grad":
        assert torch.func.grad(lambda t: made(t).sum())(x).shape == x.shape
        return
    elif seen_by == "compile":
        q = torch.compile(made, backend="eager")(x)
    else:
        traced = make_fx(made)(x)
        q = traced(x)
        assert not torch.equal(q, traced(x))
    torch.testing.assert_close(q.mT @ q, torch.eye(12).expand(2, -1, -1))


@pytest.mark.usefixtures("own_factors")
@pytest.mark.parametrize("grad", ["no_grad", "enable_grad", "inference_mode"])
@pytest.mark.parametrize("kind", ["leaf", "parameter", "plain"])
def test_autograd(kind: str, grad: str) -> None:
    outside = box(20, 70)

    def make() -> Tensor:
        if kind == "parameter":
            return nn.Parameter(outside.clone())
        return outside.clone().requires_grad_(kind == "leaf")

    with getattr(torch, grad)():
        assert_same("orthogonal_", make, 2)


def test_older_memory_in_inference_mode() -> None:
    t, theirs = box(40, 30), box(40, 30)
    with torch.inference_mode():
        torch.manual_seed(2)
        torch_init.orthogonal_(theirs)
        torch.manual_seed(2)
        assert fastinit.orthogonal_(t) is t
    assert t._version == theirs._version
    assert_close(t, exact(drawn((40, 30), F32, torch.Generator().manual_seed(2))))


def test_of_a_graph() -> None:
    """Not a leaf: its history is cut off at torch's operators and ours alike."""
    for module in (torch_init, fastinit):
        x = box(30, 20).requires_grad_()
        t = x * 2
        module.orthogonal_(t)
        assert t.requires_grad
        assert t._version == 2
