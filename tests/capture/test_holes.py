# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): what a reading of its first version found to be wrong, so that it stays right.

As in the other tests of fused(), a case runs eagerly and in the block, and all that it returns is
compared. MIN_NATIVE is as users have it, so N elements wait and small tensors do not.
"""

from __future__ import annotations

import copy
import gc
import importlib
import io
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.dlpack import to_dlpack

import fastinit
from fastinit import execute
from fastinit.core import geometry, kernels, recording
from tests.support import blocks
from tests.support.blocks import Block, Cases, compare, compare_in_process
from tests.support.compare import (
    BF16,
    F16,
    F32,
    F64,
    Position,
    assert_equal_seen,
    assert_same,
    bits,
)
from tests.support.mt19937 import WORDS, untemper

N = 20_000
Make = Callable[[], Any]


def same(make: Make) -> fastinit.Report:
    """Assert that fused() changes nothing about what make() returns."""

    def case(b: Block) -> Any:
        return make()

    with pytest.MonkeyPatch.context() as patch:
        how = blocks.Variant(smallest=geometry.MIN_NATIVE, at=Position(words=620, cached=True))
        patch.setitem(blocks.VARIANTS, "as users have it", how)
        return compare(case, "as users have it")


def each(makes: dict[str, Make]) -> Any:
    return pytest.mark.parametrize("make", makes.values(), ids=makes)


# ---- operators that reach a mode in other ways than they were thought to ----


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
def test_inference_mode(make: Make) -> None:
    """In it, composite operators such as reshape reach a mode undivided."""

    def inside() -> Any:
        with torch.inference_mode():
            made = make()
        x = made[1].weight if isinstance(made, tuple) else made
        x = x[0] if isinstance(x, list) else x
        # Not a clone, whose version is 0 under any dispatch mode and 1 without.
        return made, x.is_inference(), bits(x).numpy(), x.sum().item()

    same(inside)


class Sub(torch.Tensor):
    pass


class Marked(nn.Parameter):
    pass


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
        "as_subclass": lambda: shown(torch.randn(N).as_subclass(Sub)),
        "made subclass": lambda: shown(torch.Tensor._make_subclass(Sub, torch.randn(N))),
        "parameter": lambda: shown(Marked(torch.randn(N))),
        "detached parameter": lambda: shown(Marked(torch.randn(N)).detach()),
        "deep copy": lambda: copy.deepcopy([Marked(torch.randn(N))] * 2),
        "buffer": lambda: shown(nn.Buffer(torch.randn(N))),
        "copied": lambda: torch.empty(N).copy_(torch.randn(N).as_subclass(Sub)),
        "copied into": lambda: torch.randn(N).as_subclass(Sub).copy_(torch.ones(N)),
        "two tensors": of_two,
    }
)
def test_clones_of_subclasses(make: Make) -> None:
    """Their memory is pending as a plain tensor's is."""
    same(make)


def conjugated() -> torch.Tensor:
    return torch.view_as_complex(torch.randn(N, 2)).conj()


@each(
    {
        "clone": lambda: conjugated().clone(),
        "resolve": lambda: conjugated().resolve_conj(),
        "product": lambda: conjugated() * 1,
        "negative": lambda: conjugated().imag.clone(),
        "resolved negative": lambda: conjugated().imag.resolve_neg(),
        "real": lambda: conjugated().real.clone(),
        "as real": lambda: torch.view_as_real(conjugated().resolve_conj()).clone(),
        "copied": lambda: torch.empty(N, dtype=torch.complex64).copy_(conjugated()),
        "deep copy": lambda: copy.deepcopy(conjugated()),
        "filled": lambda: conjugated().zero_(),
        "filled negative": lambda: [x := conjugated(), x.imag.fill_(3.0), x.imag.uniform_()],
    }
)
def test_conjugates(make: Make) -> None:
    same(make)


def layouts() -> list[torch.Tensor]:
    row, image = torch.randn(1, N), torch.empty(8, 4, 30, 30)
    return [row, row[:, None], image.to(memory_format=torch.channels_last).normal_(), mat()]


@each(
    {
        "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
        "preserved": lambda x: x.clone(),
        "like": torch.zeros_like,
        "like, random": lambda x: torch.randn_like(x, memory_format=torch.contiguous_format),
        "copied": copy.deepcopy,
    }
)
def test_strides_of_copies(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Also those of dimensions with one element."""
    same(lambda: [(make(x), make(x.t() if x.dim() == 2 else x.mT)) for x in layouts()])


DANGEROUS = Cases()


@DANGEROUS
def grown(b: Block) -> Any:
    """A storage whose size is not what it was."""
    x = b.empty(5000).uniform_()

    def more() -> torch.Tensor:
        t = b.empty(5000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.arange(50_000.0, out=t)
        return t

    t, u, v = more(), more(), more()
    t[:5000].fill_(1)
    t[5000:].fill_(2)
    made = [t[:5000].clone(), copy.deepcopy(t[:5000]), t[5000:].clone()]
    u.fill_(3)
    u[:5000].copy_(x)
    v[:5000].uniform_()
    torch_init.orthogonal_(v[:4900].view(70, 70))
    made.append(v.clone())
    torch.arange(60_000.0, 70_000.0, out=b.empty(1).resize_(50_000).zero_()[:10_000])
    return x, t, u, v, made


def test_storages_grown_by_out(python: Callable[..., Any]) -> None:
    compare_in_process(python, __name__, "grown")


# ---- readers that no operator announces ----


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
    "chunks": lambda p: list(p.view(4, 5000)[3, :3].chunk(3)),
    "of a matrix": lambda p: [p.view(200, 100)[3, 4], p.view(200, 100).diagonal()[7]],
    "strided": lambda p: [p.as_strided((), (), 7), p.as_strided((1,), (1,), 9)[0]],
    "detached": lambda p: [p[0].detach(), p.data[1], p.detach()[2]],
    "subclasses": lambda p: [p[0].as_subclass(Sub), p.as_subclass(Sub)[1]],
    "parameters": lambda p: [nn.Parameter(p[0], False), nn.Parameter(p, False)[1]],
    "squeezed": lambda p: [p[3:4].squeeze(), p.narrow(0, 3, 1)[0], p[3:4].expand(1)[0]],
    "iterated": lambda p: [x for x, _ in zip(p, range(3))],
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


def test_views_that_do_not_say_so() -> None:
    same(lambda: refilled(lambda p: list(torch.unsafe_split(p[:3], 1)), torch.tensor))


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
def test_operators_with_tensors_of_their_own(make: Make) -> None:
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
    """Also by a name that was bound before there was a block, as libraries do."""

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


# ---- interruptions ----


def pending() -> list[torch.Tensor]:
    """Fills over each other, copies of each other, of several dtypes."""
    w, u = torch.empty(200, 100).normal_(), torch.rand(N, dtype=F64)
    w[:, 3:9].uniform_()
    w[7:90].zero_()
    v = w.clone()
    v[3].fill_(2)
    w[150:].normal_()
    return [w, u, v, torch.empty(N, dtype=BF16).normal_()]


def eagerly(make: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(3)
    return make(), torch.get_rng_state()


def once(
    patch: pytest.MonkeyPatch, owner: Any, name: str, after: bool, error: type[BaseException]
) -> list[str]:
    """The next call of a function raises, before or after it has done its work."""
    original, raised = getattr(owner, name), []

    def function(*args: Any) -> Any:
        if raised:
            return original(*args)
        raised.append(name)
        if after:
            original(*args)
        raise error

    patch.setattr(owner, name, function)
    return raised


def all_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(found, expected, strict=True))


READERS: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "item": lambda made: made[0][5, 5].item(),
    "sum": lambda made: made[2][3:].sum(),
    "numpy": lambda made: made[0].numpy(),
    "thread": lambda made: threading.Thread(target=int).start(),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("function", ["run_ahead", "run"])
@pytest.mark.parametrize("where", [*READERS, "end"])
def test_interrupted_writing(
    where: str, function: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program may go on after KeyboardInterrupt, and must find the right values."""
    expected, state = eagerly(pending)
    with fastinit.fused():
        pending()  # all kinds have been proved
    owner = execute if function == "run_ahead" else kernels
    found: list[torch.Tensor] = []
    torch.manual_seed(3)
    if where == "end":
        block = fastinit.fused()
        report = block.__enter__()
        found += pending()
        raised = once(monkeypatch, owner, function, after, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            block.__exit__(None, None, None)
    else:
        with fastinit.fused() as report:
            found += pending()
            with pytest.MonkeyPatch.context() as patch:
                raised = once(patch, owner, function, after, KeyboardInterrupt)
                with pytest.raises(KeyboardInterrupt):
                    READERS[where](found)
            middle = found[2].sum().item()
        assert middle == expected[2].sum().item()
    assert raised
    assert all_equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.recorded_elements == report.written_elements + report.dropped_elements
    assert recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0


@contextmanager
def interrupted_after(seconds: float) -> Iterator[list[str]]:
    """A timer's handler raises KeyboardInterrupt if it finds fastinit writing."""
    hit: list[str] = []

    def handler(_: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code is kernels.run.__code__ and not hit:
            hit.append("hit")
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with suppress(KeyboardInterrupt):
            yield hit
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers")
def test_interrupted_by_a_signal() -> None:
    """The same, by a signal that comes while the values are written, in two steps."""

    def filled() -> torch.Tensor:
        t = torch.empty(5_000_000).uniform_()
        t[7:-7].normal_()
        return t

    torch.manual_seed(3)
    expected = filled()
    hits = 0
    for attempt in range(100):
        torch.manual_seed(3)
        with fastinit.fused():
            t = filled()
            with interrupted_after(2e-4 * (1 + attempt % 25)) as hit:
                t[5].item()
            values = t.clone()
        assert torch.equal(values, expected)
        assert torch.equal(t, expected)
        hits += len(hit)
        if hits == 3:
            break


# ---- compilers ----


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, F32])
def test_factories_allocate_once(dtype: torch.dtype) -> None:
    def allocations(factory: Callable[..., torch.Tensor], *args: Any) -> int:
        factory(*args, dtype=dtype)  # once: what is done only once
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = factory(*args, dtype=dtype)
        del kept
        events = [e for e in profiler.events() if e.name in ("aten::empty", "aten::empty_strided")]
        return sum(e.cpu_memory_usage >= N for e in events)

    calls: list[tuple[Any, ...]] = [
        (torch.zeros, N),
        (torch.ones, N),
        (torch.full, (N,), 1),
        (torch.zeros_like, torch.empty(N)),
        (torch.ones(1).new_zeros, (N,)),
    ]
    assert [allocations(*call) for call in calls] == [1] * len(calls)
    with fastinit.fused():
        assert [allocations(*call) for call in calls] == [1] * len(calls)


# ---- what is left behind ----


@pytest.mark.parametrize("name", ["__repr__", "numpy", "data_ptr", "tolist"])
def test_patches_made_in_the_block_stay(name: str) -> None:
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


def test_modules_imported_in_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            w = module.kaiming_uniform_(torch.empty(200, 100))
            assert report.recorded_elements == N
        assert (module.kaiming_uniform_, module.trunc, module.TABLE["orthogonal"]) == theirs
        assert module.kaiming_uniform_.__globals__ is vars(torch_init)
    finally:
        sys.modules.pop(name, None)
    assert w.abs().sum() > 0


# ---- what is kept ----


def test_futures_are_not_kept() -> None:
    with fastinit.fused():
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(torch.ones, N)
            result = future.result()
            gone = [weakref.ref(future), weakref.ref(result)]
        del future, result
        gc.collect()
        assert [ref() for ref in gone] == [None, None]


def test_threads_are_not_kept() -> None:
    with fastinit.fused() as report:
        thread = threading.Thread(target=int, name="of this test")
        thread.start()
        thread.join()
        gone = weakref.ref(thread)
        del thread
        gc.collect()
        assert gone() is None
    assert report.recorded_elements == 0


@pytest.mark.parametrize("small", [False, True])
def test_reports_keep_no_arguments(small: bool) -> None:
    with fastinit.fused() as report:
        v = torch.ones(N)
        value = v[3]
        v.sum()
        x = torch_init.constant_(torch.empty(10 if small else N), value)
        y = torch_init.uniform_(torch.empty(N), 0.0, value)
        z = torch_init.orthogonal_(torch.empty(100, 100), gain=value)
        gone = [weakref.ref(v), weakref.ref(value)]
        storage = StorageWeakRef(v.untyped_storage())
        del v, value
        gc.collect()
        assert [ref() for ref in gone] == [None, None]
        assert storage.expired()
    assert storage.expired()
    assert report.rows()
    assert x.sum() == x.numel()
    assert y.max() < 1
    assert z.norm() > 9


def sizes(x: Any, depth: int = 0) -> int:
    """How much a capture or a report keeps."""
    if isinstance(x, (list, tuple, set, dict)):
        inside = x.values() if isinstance(x, dict) else x
        return len(x) + (sum(sizes(y, depth + 1) for y in inside) if depth < 3 else 0)
    return 0


def in_parts(t: torch.Tensor) -> None:
    t[3:19_000].normal_()
    t[:9000].uniform_()
    t.sum()


@each(
    {
        "sum": lambda t: t.normal_().sum(),
        "parts": in_parts,
        "clone": lambda t: t.uniform_().clone(),
        "copy": lambda t: t.copy_(torch.rand(N)),
        "numpy": lambda t: torch.zeros(N).numpy(),
        "item": lambda t: torch.zeros(N)[3].item(),
        "module": lambda t: nn.Linear(200, 100)(torch.ones(1, 200)),
        "small": lambda t: torch_init.normal_(torch.empty(9)),
    }
)
def test_loops_do_not_grow(make: Callable[[torch.Tensor], Any]) -> None:
    """What is written over and over leaves a line, not thousands."""

    def repeat(times: int) -> list[int]:
        for _ in range(times):
            make(t)
        memories = [*capture._known.values(), *getattr(capture, "_exposed", ())]
        lengths = [len(x) for m in memories for x in (m.fills, m.written)]
        kept = [x for y in (capture, report) for x in vars(y).values()]
        return [sum(lengths), *(len(x) for x in kept if isinstance(x, (list, dict, set)))]

    with fastinit.fused() as report:
        capture: Any = recording.this_thread.recorder
        t = torch.empty(N)
        # Until the table of storages has been purged, and the list of early reads is full.
        before = repeat(1100)
        after = repeat(2000)
    assert all(b <= a + 1024 for a, b in zip(before, after)), (before, after)
    assert all(len(row.written_by) < 5 for row in report.rows())
    assert len(report.rows()) < 10
    assert len(str(report).splitlines()) < 30


# ---- threads ----


def test_idle_pools_stop_nothing() -> None:
    with fastinit.fused() as report, ThreadPoolExecutor(2) as pool:
        assert pool.submit(torch.ones, 3).result().sum() == 3
        assert list(pool.map(int, [1, 2])) == [1, 2]
        for _ in range(2):
            before = report.recorded_elements
            t = torch.empty(N).normal_()
            assert report.recorded_elements == before + N
    assert report.at_once_elements == 0
    assert "waited" not in str(report)
    assert t.abs().sum() > 0


def test_running_threads_stop_all_and_are_named() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait, args=(50,), name="reader of this test")
    with fastinit.fused() as report:
        thread.start()
        try:
            t = torch.empty(N).normal_()
            assert report.recorded_elements == 0
            assert report.at_once_elements == N
        finally:
            go.set()
            thread.join()
        u = torch.empty(N).normal_()
        assert report.recorded_elements == N
    assert "reader of this test" in str(report)
    assert t.abs().sum() > 0
    assert u.abs().sum() > 0


def test_running_tasks_stop_all() -> None:
    go = threading.Event()
    with fastinit.fused() as report, ThreadPoolExecutor(1) as pool:
        future = pool.submit(go.wait, 50)
        try:
            torch.empty(N).normal_()
            assert report.recorded_elements == 0
        finally:
            go.set()
        assert future.result()
    assert "a task of a pool" in str(report)


def test_progress_bars_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm starts a thread with its first bar."""
    tqdm = pytest.importorskip("tqdm", reason="tqdm is not installed").tqdm
    monkeypatch.setattr(tqdm, "monitor", None)
    threads = threading.active_count()
    try:
        with fastinit.fused() as report:
            for _ in tqdm(range(3), file=io.StringIO(), disable=False):
                torch.empty(N).normal_()
            assert threading.active_count() > threads
        assert report.recorded_elements == 3 * N
        assert report.threads == set()
    finally:
        if tqdm.monitor is not None:
            tqdm.monitor.exit()


def test_one_object_decorates_for_many_threads() -> None:
    block = fastinit.fused()
    together = threading.Barrier(2, timeout=50)
    failures: list[BaseException] = []
    made: dict[int, torch.Tensor] = {}

    @block
    def build(seed: int, depth: int = 1) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        t = torch.empty(N).normal_(generator=g)
        if depth:
            together.wait()
            t[:900] = build(seed + 10, 0)[:900]
            together.wait()
        return t.mul_(2)

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                made[seed] = build(seed)
        except BaseException as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for seed in (1, 2):
        expected = torch.empty(N).normal_(generator=torch.Generator().manual_seed(seed)) * 2
        other = torch.empty(N).normal_(generator=torch.Generator().manual_seed(seed + 10)) * 2
        expected[:900] = other[:900] * 2
        assert torch.equal(made[seed], expected)
    assert recording.this_thread.recorder is None
    assert sys.modules["fastinit.install"]._scopes == 0


# ---- generators ----


def test_generators_that_came_through_the_dispatcher() -> None:
    """There each call makes another object of the same generator."""

    def inside() -> Any:
        g, h = torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)
        made = []
        for i in range(3):
            w, t = torch.empty(200, 100), torch.empty(N + i)
            torch_init.normal_(w, generator=g)
            t.normal_(generator=g)
            torch_init.uniform_(torch.empty(7), generator=g)
            torch.empty(5).normal_(generator=g)
            t[3:9000:2].normal_(generator=g)
            torch_init.trunc_normal_(w[3:], generator=h)
            torch_init.kaiming_uniform_(w[:, :50], generator=g)
            w[:90].uniform_(generator=h)
            torch_init.sparse_(torch.empty(100, 90), 0.5, generator=g)
            torch_init.orthogonal_(torch.empty(100, 100), generator=h)
            made += [w, t, torch.randn(N, generator=g), torch.rand(N, generator=h)]
            made += [g.get_state(), h.get_state(), w.clone()]
        return made

    same(inside)


# ---- trunc_normal_ ----


class Truncated(nn.Module):
    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.w, self.bounds = nn.Parameter(torch.empty(200, 100)), (a, b)

    def reset_parameters(self) -> None:
        torch_init.trunc_normal_(self.w, 0.0, 0.02, *self.bounds)


@pytest.mark.parametrize("bounds", [(-0.03, 0.03), (-2.0, 2.0)])
def test_materialize_truncates_natively(bounds: tuple[float, float]) -> None:
    with torch.device("meta"):
        model = Truncated(*bounds)
    fastinit.trunc_normal_(torch.empty(N), 0.0, 0.02, *bounds)  # it has been proved
    torch.manual_seed(3)
    before = kernels.native_fills
    fastinit.materialize_(model)
    assert kernels.native_fills == before + 1
    state = torch.get_rng_state()
    torch.manual_seed(3)
    expected = torch_init.trunc_normal_(torch.empty(200, 100), 0.0, 0.02, *bounds)
    assert torch.equal(bits(model.w), bits(expected))
    assert torch.equal(torch.get_rng_state(), state)


class Extremes(Position):
    """A generator whose next words make the largest normals there are, of both signs."""

    def place(self, generator: torch.Generator) -> torch.Generator:
        super().place(generator)
        state = generator.get_state()
        raw = state.numpy()
        words = np.random.default_rng(0).integers(0, 1 << 32, (WORDS // 16, 2, 8), dtype=np.uint32)
        words[::3, 0] = 0xFFFFFFFF  # radii
        words[:, 1, ::2] = 0
        words[:, 1, 1::2] = 1 << 23  # angles: half a turn, in 24 bits
        raw[8:12].view(np.int32)[0] = 624  # left
        raw[16:24].view(np.uint64)[0] = 1  # next
        raw[24:5016].view(np.uint64)[1 : 1 + WORDS] = untemper(words.reshape(-1))
        generator.set_state(state)
        return generator


FAR = [  # dtype, mean, std, bounds in std
    *((F32, 0.0, std, k) for std in (2.2e-45, 1e-38, 1e-30, 1.1e-30, 0.02) for k in (5.7, 5.9, 8)),
    *((F64, 0.0, std, k) for std in (1e-310, 1e-30, 0.02) for k in (5.9, 8.5, 8.7)),
    *((BF16, 0.0, std, k) for std in (1e-40, 1e-38, 1e-30, 0.0207, 1.0) for k in (5.7, 5.9)),
    *((F16, 0.0, std, k) for std in (0.9e-7, 1.5e-7, 3.1e-6, 0.02, 1.0) for k in (5.7, 5.85, 5.9)),
    *((dtype, 1.0, 0.1, k) for dtype in (F32, F64, BF16, F16) for k in (5.75, 5.8, 5.9)),
    *((dtype, -3.0, 0.5, k) for dtype in (F32, F64, BF16, F16) for k in (5.75, 5.8, 5.9)),
]


@pytest.mark.parametrize(("dtype", "mean", "std", "k"), FAR)
@pytest.mark.parametrize("extreme", [False, True], ids=["any", "extreme"])
def test_bounds_that_hardly_matter(
    dtype: torch.dtype, mean: float, std: float, k: float, extreme: bool
) -> None:
    """A draw may be outside of them after rounding, and then it is drawn again."""
    n = N if extreme else 10 * N
    bounds = mean - k * std, mean + k * std
    at = Extremes() if extreme else Position(words=3)
    assert_same("trunc_normal_", lambda: torch.empty(n, dtype=dtype), mean, std, *bounds, at=at)
    if extreme:
        same(lambda: torch_init.trunc_normal_(torch.empty(n, dtype=dtype), mean, std, *bounds))
