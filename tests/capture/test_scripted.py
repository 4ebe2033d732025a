# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): native code that reads memory without operators: TorchScript and AOTInductor."""

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

import fastinit
from fastinit.core import torch_api
from tests.support.scopes import N, each, same

jit: Any = torch.jit


def values(x: torch.Tensor) -> list[float]:
    y: list[float] = x.tolist()
    return y


def its_own(n: int) -> list[float]:
    x = torch.empty(n).normal_()
    y: list[float] = x.tolist()
    return y


def written_as_text(x: torch.Tensor) -> str:
    return f"{x[:3]} and {x}"


def elements(x: torch.Tensor) -> list[float]:
    found = [float(x[3]), float(x[4].item()), float(int(x[5] * 100))]
    if bool(x[6] > 0):
        found.append(1.0)
    for y in x[:4]:
        found.append(float(y))
    return found


def filled(n: int) -> torch.Tensor:
    x = torch.empty(n)
    first = x[0]
    x.normal_()
    return x * float(first)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    script_values = jit.script(values)
    script_filled = jit.script(filled)


def in_another_thread(x: torch.Tensor) -> list[float]:
    task = jit.fork(script_values, x)
    return jit.wait(task)


def filled_in_another_thread(n: int) -> list[float]:
    task = jit.fork(script_filled, n)
    y: list[float] = jit.wait(task).tolist()
    return y


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N))

    def forward(self, x: torch.Tensor) -> list[float]:
        y: list[float] = (x + self.weight).tolist()
        return y

    @jit.export
    def listed(self) -> list[float]:
        y: list[float] = self.weight.tolist()
        return y


def scripted(x: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return jit.script(x)


def called(x: Any, method: str = "forward") -> Any:
    module = scripted(x)
    first = getattr(module, method)(*(() if method == "listed" else (torch.rand(N),)))
    torch_init.uniform_(module.weight)
    return first, module.listed(), module.weight


def frozen() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jit.freeze(scripted(Listed()).eval())(torch.rand(N))


def loaded() -> Any:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jit.save(scripted(Listed()), file)
        file.seek(0)
        module = jit.load(file)
    torch_init.normal_(module.weight)
    return module.listed()


def forked() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jit.wait(jit.fork(script_values, torch.randn(N)))


@each(
    {
        "a list": lambda: script_values(torch.randn(N)),
        "a list of what it filled": lambda: scripted(its_own)(N),
        "text": lambda: scripted(written_as_text)(torch.rand(N, dtype=torch.float64)),
        "numbers": lambda: scripted(elements)(torch.rand(N)),
        "what it filled": lambda: script_filled(N),
        "fork in a script": lambda: scripted(in_another_thread)(torch.randn(N)),
        "fill in a fork": lambda: scripted(filled_in_another_thread)(N),
        "fork": forked,
        "module": lambda: called(Listed()),
        "method": lambda: called(Listed(), "listed"),
        "method of the class in C++": lambda: scripted(Listed())._c._get_method("listed")(),
        "frozen": frozen,
        "loaded": loaded,
    }
)
def test_what_reads_without_operators(make: Callable[[], Any]) -> None:
    same(make)


def test_small_tensors_of_a_block_with_a_seed() -> None:
    """They wait there whatever their size, and a tensor without dimensions is printed unseen."""
    with fastinit.fused(seed=3):
        x = torch.empty((), dtype=torch.float64)
        torch_init.normal_(x)
        found = script_text(x)
    assert found == script_text(x)


def text(x: torch.Tensor) -> str:
    return f"{x}"


script_text = scripted(text)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_what_reads_by_operators_lets_others_wait() -> None:
    twice = scripted(doubled)
    with fastinit.fused() as report:
        x, y = torch.empty(N).normal_(), torch.empty(N).normal_()
        assert torch.equal(twice(x), x * 2)
        torch_init.uniform_(y)
    assert report.dropped_elements == N


def test_what_waits_after_it() -> None:
    with fastinit.fused() as report:
        script_values(torch.randn(N))
        x = torch.empty(N).normal_()
        x.uniform_()
    assert report.dropped_elements == N


def test_an_exception_in_it() -> None:
    with fastinit.fused() as report:
        with pytest.raises(RuntimeError):
            script_values(torch.zeros(3, 3))  # a list of lists
        torch.empty(N).normal_()
    assert report.dropped_elements == N


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # of torch's own modules
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.ReLU())
    program = torch.export.export(model, (torch.ones(100, 100),))
    path = str(tmp_path / "model.pt2")
    inductor: Any = torch._inductor
    run = inductor.aoti_load_package(inductor.aoti_compile_and_package(program, package_path=path))
    same(lambda: run(torch.randn(100, 100)))


def test_all_ways_are_hooked() -> None:
    with fastinit.fused():
        for kind, name in torch_api.native_calls():
            assert hasattr(vars(kind)[name], "__wrapped__"), (kind, name)
    assert len(torch_api.native_calls()) > 4
