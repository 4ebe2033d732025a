# SPDX-License-Identifier: BSD-3-Clause
"""fused() itself: scopes in scopes, decorators, exceptions, and what is left behind."""

from __future__ import annotations

import importlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

import fastinit
from fastinit.core import geometry
from tests.support.compare import (
    attempt,
)
from tests.support.scopes import Cases, N, Scope, compare

case = Cases()


own = Cases()  # enter fused() themselves


@case
def nested(s: Scope) -> Any:
    w, v, seen = s.empty(40, 30).normal_(), s.empty(400), []
    with s.fused():
        w[3].zero_()
        v.uniform_()
        x = torch.empty(400).normal_()
        with s.fused():
            x[5:].uniform_()
            seen.append(v.sum().item())
        w.uniform_()
    seen += [x.mean().item(), raw_sum(w)]
    v.normal_()

    def fails() -> None:
        with s.fused():
            v[3:].zero_()
            x.normal_()
            raise ValueError

    return w, v, x, seen, attempt(fails)[1], w[9].zero_()


def raw_sum(w: torch.Tensor) -> float:
    return float(np.asarray(w.detach()).sum())


@own
def decorated(s: Scope) -> Any:
    decorate = fastinit.fused() if s.captured else lambda function: function

    @decorate
    def build(depth: int, *, scale: float = 1.0) -> list[Any]:
        """Builds."""
        w = torch.empty(400).normal_(0, scale)
        inner = build(depth - 1, scale=0.5) if depth else []
        w[3].zero_()
        return [w, torch.zeros(400).uniform_(), *inner]

    @decorate
    def fails(w: torch.Tensor) -> None:
        w.normal_()
        raise KeyError(3)

    w = s.empty(400)
    seen = [build(2), attempt(fails, w)[1], w, build(0, scale=3), build.__name__, build.__doc__]

    class Model(nn.Module):
        @decorate
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(40, 30)
            torch_init.zeros_(self.body.weight)

    return seen, Model(), list(map(build, [0, 1]))


@case
def exceptions_inside(s: Scope) -> Any:
    w, v = s.empty(40, 30), s.empty(400)
    try:
        w.normal_()
        w[3].uniform_()
        w[50].zero_()
    except IndexError:
        v.normal_()
    try:
        v[3:].uniform_(2, 1)
    except RuntimeError as error:
        seen = [str(error), v.sum().item()]
    finally:
        w[4].zero_()
    s.notes += [w, v, seen, torch.get_rng_state()]
    v.uniform_()
    s.raises = True
    raise LookupError("of the body")


@own
def exceptions_through_two_scopes(s: Scope) -> Any:
    w, v = s.empty(40, 30), s.empty(400)
    s.notes += [w, v]
    s.raises = True
    with s.fused():
        w.normal_()
        try:
            with s.fused():
                v.uniform_()
                w[3:].zero_()
                raise ValueError(3)
        finally:
            v[:300].normal_()


@case
def fastinit_inside(s: Scope) -> Any:
    w, v, u = s.empty(40, 30), s.empty(400), s.empty(40, 30).normal_()
    fastinit.normal_(w)
    w[3].zero_()
    torch_init.uniform_(w[5:])
    fastinit.zeros_(v[7:300].normal_())
    fastinit.trunc_normal_(v, 0, 0.02, -0.02, 0.02)
    plan = fastinit.Plan()
    plan.kaiming_uniform_(w)
    plan.zeros_(u[3])
    u.uniform_()
    plan.run()
    layer = s.make(nn.Linear, 40, 30)
    fastinit.init_model_(layer)
    torch_init.ones_(layer.bias)
    fastinit.init_model_(layer, lambda m: torch_init.normal_(m.weight))
    return w, v, u, layer, v[:7].zero_()


@own
def inside_init_model(s: Scope) -> Any:
    layer = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    made = []

    def fill(m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            torch_init.normal_(m.weight)
            with s.fused():
                made.append(torch.empty(400).uniform_())
                torch_init.zeros_(m.weight[3])
                torch_init.uniform_(m.bias)
            m.bias.data[3] = made[-1].sum()

    fastinit.init_model_(layer, fill)
    return layer, made


@case.each
def test_cases(name: str, variant: str) -> None:
    compare(case[name], variant)


@own.each
def test_scopes_of_their_own(name: str, variant: str) -> None:
    compare(own[name], variant, own=True)


# ---- what waits ----


def test_small_fills_are_not_held_back() -> None:
    with fastinit.fused() as report:
        torch.empty(fastinit.core.geometry.MIN_NATIVE - 1).normal_()
    assert report.recorded_elements == 0
    with fastinit.fused() as report:
        w = torch.empty(geometry.BEGIN * geometry.MIN_NATIVE).normal_()  # worth a mode
        v = torch.empty(geometry.MIN_NATIVE).normal_()  # worth a record by then
    assert report.recorded_elements == w.numel() + v.numel()


@pytest.mark.usefixtures("native")
def test_nothing_is_held_back_outside() -> None:
    """In another thread, after the scope, and in an array from before it."""
    before = torch.empty(400)
    array = before.numpy()
    with fastinit.fused() as report:
        thread = threading.Thread(target=lambda: torch.empty(400).normal_())
        thread.start()
        thread.join()
        before.normal_()
        assert array.any()
    torch.empty(400).normal_()
    assert report.recorded_elements == 0


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_what_was_asked_for_is_written_though_the_body_fails(error: type[BaseException]) -> None:
    torch.manual_seed(3)
    expected = torch.empty(400).normal_()
    torch.manual_seed(3)
    with pytest.raises(error), fastinit.fused() as report:  # noqa: PT012
        w = torch.empty(400).normal_()
        raise error
    assert torch.equal(w, expected)
    assert report.written_elements == 400


# ---- what is left behind ----


@pytest.mark.usefixtures("native")
def test_nothing_is_left_behind() -> None:
    """Neither modes nor replaced functions, however often, and however the scope ends."""
    owners = (Tensor, torch, torch_init, torch.random, torch.utils.dlpack, torch.UntypedStorage)
    owners += (threading.Thread, ThreadPoolExecutor, np, nn.Module, nn.Parameter, torch.Generator)
    with fastinit.fused():  # what is imported then
        torch.empty(400).normal_()
    before = [dict(vars(owner)) for owner in owners]
    with fastinit.fused(), fastinit.fused():
        torch.empty(400).normal_()
    with pytest.raises(ValueError, match="body"), fastinit.fused():  # noqa: PT012
        torch.empty(400).normal_()
        raise ValueError("body")
    for owner, then in zip(owners, before):
        now = dict(vars(owner))
        changed = [name for name in then.keys() | now.keys() if then.get(name) is not now.get(name)]
        assert not changed, owner
    assert not nn.modules.module._global_parameter_registration_hooks
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("name", ["__repr__", "numpy", "data_ptr", "tolist"])
def test_patches_made_in_the_scope_stay(name: str) -> None:
    def mine(self: torch.Tensor, **_: Any) -> str:
        return "mine"

    inherited, before = name not in vars(torch.Tensor), getattr(torch.Tensor, name)
    try:
        for _ in range(2):
            with fastinit.fused():
                t = torch.zeros(N)
                setattr(torch.Tensor, name, mine)
            assert getattr(torch.Tensor, name) is mine
            with fastinit.fused():
                assert getattr(t, name)() == "mine"
            assert getattr(t, name)() == "mine"
    finally:
        if inherited:
            delattr(torch.Tensor, name)
        else:
            setattr(torch.Tensor, name, before)


def test_modules_imported_in_the_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "fastinit_holes_imported"
    (tmp_path / f"{name}.py").write_text(
        "from torch.nn.init import kaiming_uniform_, trunc_normal_ as trunc\n"
        "import torch\n"
        "TABLE = {'orthogonal': torch.nn.init.orthogonal_}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    theirs = torch_init.kaiming_uniform_, torch_init.trunc_normal_, torch_init.orthogonal_
    try:
        with fastinit.fused() as report:
            module = importlib.import_module(name)
            w = module.kaiming_uniform_(torch.empty(200, N // 200))
            assert report.recorded_elements == N
        assert (module.kaiming_uniform_, module.trunc, module.TABLE["orthogonal"]) == theirs
        assert module.kaiming_uniform_.__globals__ is vars(torch_init)
    finally:
        sys.modules.pop(name, None)
    assert w.abs().sum() > 0
