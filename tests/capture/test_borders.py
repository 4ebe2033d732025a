# SPDX-License-Identifier: BSD-3-Clause
"""Ctrl-C at any line by which a scope begins, is left, writes or takes stock.

Afterwards torch is as it was before, and what the scope's code had asked for is written, or the
exception says that it is not.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import fastinit
from fastinit.capture import hooks
from fastinit.core import recording

FILES = ("fused.py", "install.py", "plan.py", "model.py", "scope.py", "hooks.py", "pending.py")
FILES += ("report.py", "keyed.py", "capture.py", "recording.py", "torch_api.py")
N = 40_000


def plain(made: list[Tensor]) -> None:
    with fastinit.fused():
        made.append(torch.empty(N).normal_())
        made.append(torch.empty(9000).uniform_())


def watched(made: list[Tensor]) -> None:
    with fastinit.fused(watch=True):
        made.append(torch.empty(N).normal_())


def seeded(made: list[Tensor]) -> None:
    with fastinit.fused(seed=3):
        made.append(nn.Linear(200, 100).weight)


def nested(made: list[Tensor]) -> None:
    with fastinit.fused(watch=True):
        made.append(torch.empty(N).normal_())
        with fastinit.fused(orthogonal="torch"):
            made.append(torch.empty(N).uniform_())


def of_a_model(made: list[Tensor]) -> None:
    fastinit.init_model_(nn.Linear(300, 200))


def from_meta(made: list[Tensor]) -> None:
    fastinit.materialize_(nn.Linear(300, 200, device="meta"))


def recorded(made: list[Tensor]) -> None:
    fastinit.record(nn.Linear(300, 200))


def state() -> list[Any]:
    """What a scope changes in torch, and in this thread."""
    registered = [
        len(getattr(nn_module, f"_global_{kind}_registration_hooks"))
        for kind in ("parameter", "buffer", "module")
    ]
    functions = [vars(m).get(name) for m in (nn.init, nn.modules.linear.init) for name in vars(m)]
    stack = torch._C._len_torch_dispatch_stack()
    return [*registered, *map(id, functions), stack, recording.this_thread.recorder]


def interrupted(
    way: Callable[[list[Tensor]], None], passed: set[str], made: list[Tensor]
) -> tuple[str, str] | None:
    """Run with a KeyboardInterrupt at a line not passed yet; return where and what it says."""
    where = ""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal where
        path = frame.f_code.co_filename
        if "/fastinit/" not in path or "/tests/" in path or not path.endswith(FILES):
            return None
        if event == "line":
            here = f"{path.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
            if here not in passed and not here.endswith("__del__"):  # which Python lets go on
                passed.add(here)
                sys.settrace(None)
                where = here
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        way(made)
    except KeyboardInterrupt as error:
        return where, str(error)
    finally:
        sys.settrace(None)
    return None


WAYS = [
    *(plain, watched, nested, of_a_model, from_meta, recorded),
    pytest.param(seeded, marks=pytest.mark.slow),  # looks for models 300 times
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_interrupted_at_every_line(way: Callable[[list[Tensor]], None]) -> None:
    expected: list[Tensor] = []
    way(expected)  # all is loaded and proved
    expected = []
    torch.manual_seed(5)
    way(expected)
    before, wrong = state(), []
    passed: set[str] = set()
    while True:
        torch.manual_seed(5)
        made: list[Tensor] = []
        found = interrupted(way, passed, made)
        if found is None:
            break
        where, said = found
        if state() != before:
            changed = [i for i, (a, b) in enumerate(zip(state(), before)) if a != b]
            wrong.append(f"{where} leaves something behind: {changed}")
            break
        if "not written" not in said and not all(map(torch.equal, made, expected)):
            wrong.append(f"{where} leaves a tensor unwritten")
        w = torch.empty(9000).normal_()
        if not torch.equal(torch.from_numpy(w.numpy()), w + 0):
            wrong.append(f"{where} lets numpy see what is not written")
    assert wrong == []
    assert len(passed) > 50
    gc.collect()
    assert not recording.told
    assert hooks._registering == set()
