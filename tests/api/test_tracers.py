# SPDX-License-Identifier: BSD-3-Clause
"""Tracers and compilers after install() and in a block that has begun: what they do with torch."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fastinit
from tests.support.compare import attempt
from tests.support.marks import slow

SHAPE = (200, 210)


@contextmanager
def begun(**how: Any) -> Iterator[None]:
    """A block whose mode is on torch's stack, with the generator as before it."""
    state = torch.get_rng_state()
    with fastinit.fused(**how):
        first = torch.empty(300, 300).normal_()
        torch.set_rng_state(state)
        yield
        del first


CONTEXTS: dict[str, Callable[[], Any]] = {
    "installed": fastinit.installed,
    "idle": fastinit.fused,
    "begun": begun,
    "watched": lambda: fastinit.fused(watch=True),
}
CALLS: dict[str, tuple[Any, ...]] = {
    "kaiming_uniform_": (),
    "normal_": (0.1, 2.0),
    "zeros_": (),
    "eye_": (),
    "orthogonal_": (),
}


def seen(make: Callable[[], Any], context: Callable[[], Any] = nullcontext) -> Any:
    torch.manual_seed(5)
    with context():
        made, failure, warned = attempt(make)
    return made, failure, warned, torch.get_rng_state().tolist()


each_context = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)


def filling(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def function(x: torch.Tensor) -> torch.Tensor:
        w: torch.Tensor = getattr(nn.init, name)(torch.empty(SHAPE), *CALLS[name])
        return w + x + torch.zeros(SHAPE) * torch.randn(SHAPE).clamp_(-1, 1)

    return function


# ---- graphs ----


@each_context
@pytest.mark.parametrize("mode", ["real", *slow(["fake", "symbolic"])])
@pytest.mark.parametrize("name", ["normal_", *slow(["orthogonal_"])])
def test_make_fx(name: str, mode: str, context: Callable[[], Any]) -> None:
    def traced() -> str:
        return str(make_fx(filling(name), tracing_mode=mode)(torch.ones(SHAPE)).code)

    assert seen(traced)[1] == ""
    assert seen(traced) == seen(traced, context)


@pytest.mark.parametrize("mode", ["real", *slow(["symbolic"])])
@pytest.mark.parametrize("name", ["normal_", "zeros_", *slow(["eye_", "orthogonal_"])])
def test_make_fx_with_a_seed(name: str, mode: str) -> None:
    def traced() -> str:
        return str(make_fx(filling(name), tracing_mode=mode)(torch.ones(SHAPE)).code)

    assert seen(traced)[:3] == seen(traced, lambda: fastinit.fused(seed=3))[:3]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each_context
def test_jit_trace(context: Callable[[], Any]) -> None:
    """It is traced and called in the context; torch cannot do either under a dispatch mode."""

    def traced() -> Any:
        graph = torch.jit.trace(filling("normal_"), (torch.ones(SHAPE),), check_trace=False)
        return graph(torch.ones(SHAPE)).tolist()

    assert seen(traced)[1] == ""
    assert seen(traced) == seen(traced, context)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_sees_what_waits() -> None:
    with fastinit.fused(watch=True):
        w = torch.empty(300, 300).fill_(2.0)
        traced = torch.jit.trace(lambda x: x * w, (torch.ones(300, 300),), check_trace=False)
    assert traced(torch.ones(300, 300)).sum().item() == 2 * 300 * 300


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each_context
@pytest.mark.parametrize("name", ["normal_", "orthogonal_", *slow(["kaiming_uniform_", "eye_"])])
def test_jit_trace_checks_what_it_traced(name: str, context: Callable[[], Any]) -> None:
    def traced() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers differ, as they should
            graph = torch.jit.trace(
                lambda x: getattr(nn.init, name)(torch.empty(40, 21)) + x, (torch.ones(40, 21),)
            )
        return re.sub("# .*|%[^ ]*", "", str(graph.graph)), graph(torch.ones(40, 21)).tolist()

    assert seen(traced)[1] == ""
    assert seen(traced)[0] == seen(traced, context)[0]


# ---- torch.compile ----


def unseen(graph: Any, inputs: object) -> Callable[..., Any]:
    """A backend whose code goes by addresses, as inductor's does: no mode sees what it does."""

    def run(*args: torch.Tensor) -> Any:
        with _disable_current_modes():
            return graph(*args)

    return run


BACKENDS = ["eager", unseen, *slow(["aot_eager", "inductor"])]


@each_context
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["normal_", *slow(["orthogonal_"])])
def test_compile_in_one_graph(name: str, backend: Any, context: Callable[[], Any]) -> None:
    def compiled() -> Any:
        torch._dynamo.reset()
        function = torch.compile(filling(name), backend=backend, fullgraph=True)
        return [function(torch.empty(SHAPE).fill_(i)).tolist() for i in range(3)]

    if (name, backend) == ("orthogonal_", "inductor"):
        pytest.skip("torch itself does not compile it")
    assert seen(compiled)[1] == ""
    assert seen(compiled) == seen(compiled, context)


@pytest.mark.parametrize("early", [False, True], ids=["compiled in the block", "before"])
@pytest.mark.parametrize("context", [begun, lambda: fastinit.fused(watch=True)])
def test_compiled_code_reads_and_writes_what_waits(context: Any, early: bool) -> None:
    torch._dynamo.reset()
    double = torch.compile(lambda x: x.mul_(2.0).sum(), backend=unseen, fullgraph=True)
    if early:
        double(torch.ones(SHAPE))
    for _ in range(2):  # a second block has another scope
        with context():
            for i in (1.0, 2.0, 3.0):
                x = torch.empty(SHAPE).fill_(i)
                assert double(x).item() == 2 * i * x.numel()
                assert x.max().item() == 2 * i


def test_gradients_of_compiled_code_read_what_waits() -> None:
    torch._dynamo.reset()
    x = torch.ones(SHAPE, requires_grad=True)
    with fastinit.fused(watch=True):
        out = torch.compile(lambda x: x * 2, backend=unseen, fullgraph=True)(x)
        out.backward(torch.empty(SHAPE).fill_(3.0))
    assert x.grad is not None
    assert x.grad.unique().tolist() == [6.0]


@pytest.mark.parametrize("backend", ["eager", unseen])
def test_block_that_begins_in_compiled_code_ends_well(backend: Any) -> None:
    """Compiled functions put torch's dispatch keys back, without the mode that began meanwhile."""

    def numbers() -> Any:
        torch._dynamo.reset()
        a = torch.compile(filling("normal_"), backend=backend, fullgraph=True)(torch.ones(SHAPE))
        w = nn.init.normal_(torch.empty(300, 300))
        return a.tolist(), (w * 2).tolist(), w.fill_(3.0).add(1).tolist()

    assert seen(numbers)[1] == ""
    assert seen(numbers) == seen(numbers, fastinit.fused)


def test_compiled_functions_in_a_block_with_a_seed_are_called_as_they_are() -> None:
    """Names of tensors would get lost, and with them the numbers that the seed gives."""
    values = []
    for compiled in (False, True):
        torch._dynamo.reset()
        init = nn.init.normal_
        if compiled:
            init = torch.compile(lambda x: nn.init.normal_(x), backend="eager")
        with fastinit.fused(seed=3):
            model = nn.Linear(200, 210)
            init(model.weight)
        values.append(model.weight.tolist())
    assert values[0] == values[1]


@pytest.mark.parametrize("name", ["normal_", "orthogonal_"])
def test_compiled_calls_with_a_key(name: str) -> None:
    def fill(x: torch.Tensor, key: Any) -> Any:
        return getattr(fastinit, name)(x * 2, generator=key) + 1

    torch._dynamo.reset()
    key = fastinit.Key(1, "w")
    wanted = fill(torch.zeros(SHAPE), key)
    compiled = torch.compile(fill, backend="eager")
    assert torch.equal(compiled(torch.zeros(SHAPE), key), wanted)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"fastinit\.Key are not written by operators"):
        torch.compile(fill, backend="eager", fullgraph=True)(torch.zeros(SHAPE), key)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return filling("kaiming_uniform_")(x)


@each_context
@pytest.mark.parametrize("strict", [*slow([False]), True])
def test_export(strict: bool, context: Callable[[], Any]) -> None:
    def exported() -> str:
        program = torch.export.export(Noisy(), (torch.ones(SHAPE),), strict=strict)
        return re.sub(r"# .*", "", str(program.graph_module.code))

    assert seen(exported)[1] == ""
    assert seen(exported)[:3] == seen(exported, context)[:3]


# ---- TorchScript ----

SCRIPTS = """
import torch
import torch.nn as nn

def positional(x: torch.Tensor):
    return nn.init.normal_(x, 0.1, 2.0)

def keywords(x: torch.Tensor):
    nn.init.constant_(x[0], val=3.0)
    nn.init.zeros_(x[1])
    return torch.nn.init.uniform_(tensor=x[2:], a=-1.0, b=1.0)

def fans(x: torch.Tensor):
    return nn.init.xavier_uniform_(x, gain=0.5)

def refused(x: torch.Tensor):
    return nn.init.kaiming_uniform_(x)

class Module(nn.Module):
    def forward(self, x: torch.Tensor):
        return nn.init.xavier_normal_(torch.empty_like(x))
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = tmp_path / "scripts_of_a_user.py"
    path.write_text(SCRIPTS)
    spec = importlib.util.spec_from_file_location("scripts_of_a_user", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scripts_of_a_user", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each_context
@pytest.mark.parametrize("name", ["positional", "keywords", "fans", "refused", "Module"])
def test_jit_script(name: str, context: Callable[[], Any], scripts: Any) -> None:
    def scripted() -> Any:
        what = getattr(scripts, name)
        script = torch.jit.script(what() if name == "Module" else what)
        return script(torch.ones(SHAPE)).tolist(), str(script.graph)

    assert bool(seen(scripted)[1]) == (name == "refused")
    assert seen(scripted) == seen(scripted, context)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_of_the_functions_themselves() -> None:
    for name in ("normal_", "uniform_", "zeros_", "xavier_normal_"):
        script: Any = torch.jit.script(getattr(fastinit, name))
        graph = str(torch.jit.script(getattr(nn.init, name)).graph)  # type: ignore[attr-defined]
        assert str(script.graph) == graph


# ---- lists of tensors ----


LISTS: dict[str, Callable[[list[torch.Tensor]], object]] = {
    "mul": lambda t: torch._foreach_mul_(t, 0.5),
    "add": lambda t: torch._foreach_add_(t, [x.clone() for x in t], alpha=2),
    "copy": lambda t: torch._foreach_copy_(t, [x.clone() for x in t]),
    "zero": torch._foreach_zero_,
    "one tensor twice": lambda t: torch._foreach_mul_([t[0], t[0]], 2.0),
    "views": lambda t: torch._foreach_mul_([t[0][1:], t[0][:1]], 2.0),
    "out of place": lambda t: torch._foreach_mul(t, 2.0),
    "scaler": lambda t: torch._amp_foreach_non_finite_check_and_unscale_(
        t, torch.zeros(1), torch.ones(1)
    ),
    "Adam": lambda t: stepped(torch.optim.Adam, t, foreach=True),
    "fused Adam": lambda t: stepped(torch.optim.Adam, t, fused=True),
    "fused SGD": lambda t: stepped(torch.optim.SGD, t, fused=True),
}


def stepped(kind: Any, tensors: list[torch.Tensor], **how: Any) -> Any:
    optimizer = kind(tensors, lr=0.1, **how)
    for _ in range(2):
        for t in tensors:
            t.grad = t.detach() * 2
        optimizer.step()
    state = [x for s in optimizer.state.values() for x in s.values() if x is not None]
    return {i: x._version for i, x in enumerate(state)}


@each_context
@pytest.mark.parametrize("change", LISTS.values(), ids=LISTS)
def test_versions_of_lists(change: Any, context: Callable[[], Any]) -> None:
    def changed() -> Any:
        tensors = [torch.empty(SHAPE).normal_(), torch.zeros(3), torch.empty(SHAPE).uniform_()]
        tensors.append(torch.zeros(4, 5)[1:])
        returned = change(tensors)
        versions = returned if isinstance(returned, dict) else {}
        return [t._version for t in tensors], [t.tolist() for t in tensors], versions

    assert seen(changed)[1] == ""
    assert seen(changed) == seen(changed, context)


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@each_context
def test_versions_of_lists_below_a_mode(context: Callable[[], Any]) -> None:
    """There torch does not count them."""

    def changed() -> Any:
        tensors = [torch.empty(SHAPE).normal_(), torch.zeros(3)]
        with Passing():
            torch._foreach_mul_(tensors, 2)
        return [t._version for t in tensors]

    assert seen(changed) == seen(changed, context)


# ---- results, layouts, warnings ----


class Answering(torch.Tensor):
    """A subclass whose functions of torch.nn.init return something else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return f"the answer to {func.__name__}"
        return super().__torch_function__(func, types, args, kwargs or {})


@each_context
def test_results_of_torch_function(context: Callable[[], Any]) -> None:
    def answers() -> Any:
        t = torch.zeros(SHAPE).as_subclass(Answering)
        made = [getattr(nn.init, name)(t) for name in ("normal_", "kaiming_normal_", "uniform_")]
        return [x if isinstance(x, str) else x.tolist() for x in made]

    assert seen(answers) == seen(answers, context)


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "CSR": lambda: torch.eye(20).to_sparse_csr(),
    "CSC": lambda: torch.eye(200).to_sparse_csc(),
    "BSR": lambda: torch.eye(20).to_sparse_bsr((2, 2)),
    "BSC": lambda: torch.eye(200).to_sparse_bsc((2, 2)),
    "batch of CSR": lambda: torch.ones(2, 20, 20).to_sparse_csr(),
    "COO": lambda: torch.eye(20).to_sparse(),
    "parameter": lambda: nn.Parameter(torch.eye(20).to_sparse_csr()),
    "MKL-DNN": lambda: torch.zeros(20, 20).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(200, 4)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.zeros(3, 4), torch.zeros(200, 4)], layout=torch.jagged
    ),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(20, 20), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@each_context
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(make: Callable[[], torch.Tensor], context: Callable[[], Any]) -> None:
    """torch fills some, and refuses others in its own words."""
    for name in ("zeros_", "normal_", "kaiming_uniform_"):

        def filled(name: str = name) -> Any:
            t = make()
            getattr(nn.init, name)(t)
            values = t.detach()
            if t.is_nested:
                return t._version, [x.tolist() for x in values.unbind()]
            return t._version, (values if t.is_quantized else values.to_dense()).tolist()

        seen(filled)  # what torch warns of once
        assert seen(filled) == seen(filled, context)


class Quiet(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


@each_context
def test_lines_that_warnings_name(context: Callable[[], Any]) -> None:
    def lines() -> list[Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for size in (3, 200):
                nn.init.trunc_normal_(torch.empty(size, size), 9.0, 1.0)
            nn.init.kaiming_uniform_(torch.empty(0, 3))
            nn.init.kaiming_normal_(torch.empty(0, 3).as_subclass(Quiet))
            nn.init.kaiming_uniform(torch.empty(0, 3))
        return [(w.category, str(w.message), w.filename, w.lineno) for w in caught]

    wanted = lines()
    assert len(wanted) == 6
    with context():
        assert lines() == wanted
