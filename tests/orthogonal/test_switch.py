# SPDX-License-Identifier: BSD-3-Clause
"""Left to torch by the switch, orthogonal_ has torch's own bits, wherever it is called."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

import fastinit
from fastinit import __main__
from fastinit.core import recording
from tests.support.compare import BF16, F32, F64, attempt, bits
from tests.support.marks import slow

orthogonal_ = functools.partial(torch_init.orthogonal_)  # torch's own, also when installed
SHAPES = [(5, 3), (64, 64), (150, 90), (90, 150), (40, 6, 5), (4096, 20)]
Seen = list[Tensor]


@contextlib.contextmanager
def switched(way: str = "torch") -> Iterator[None]:
    before = fastinit.set_orthogonal(way)
    try:
        yield
    finally:
        fastinit.set_orthogonal(before)


@pytest.fixture
def by_torch() -> Iterator[None]:
    with switched():
        yield


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 300), nn.LSTM(40, 70))


def init_net(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        torch_init.orthogonal_(module.weight, 2.0**0.5)
        torch_init.normal_(module.bias)
    elif isinstance(module, nn.LSTM):
        torch_init.orthogonal_(module.weight_hh_l0)
        torch_init.uniform_(module.weight_ih_l0)


def seen(tensors: Any) -> Seen:
    return [*(bits(t).clone() for t in tensors), torch.get_rng_state()]


def agree(expected: Seen, found: Seen) -> bool:
    return len(expected) == len(found) and all(map(torch.equal, expected, found))


def built(scope: AbstractContextManager[Any], fn: Callable[[nn.Module], object] = init_net) -> Seen:
    torch.manual_seed(7)
    with scope:
        model = net()
        model.apply(fn)
    return seen(model.parameters())


# Each does `init_net` to a model; torch's own functions first.
def eager(model: nn.Module) -> None:
    model.apply(init_net)


def after_install(model: nn.Module) -> None:
    with fastinit.installed():
        assert torch_init.orthogonal_ is not orthogonal_.func
        model.apply(init_net)


def init_model(model: nn.Module) -> None:
    fastinit.init_model_(model, init_net)


def record(model: nn.Module) -> None:
    plan = fastinit.record(model, init_net)
    for _ in range(2):  # the second time from what the first one prepared
        torch.manual_seed(3)
        plan.run()


def plan(model: nn.Module) -> None:
    made = fastinit.Plan()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            made.orthogonal_(module.weight, 2.0**0.5)
            made.normal_(module.bias)
        elif isinstance(module, nn.LSTM):
            made.orthogonal_(module.weight_hh_l0)
            made.uniform_(module.weight_ih_l0)
    made.run()


@pytest.mark.parametrize("way", [after_install, init_model, record, plan])
def test_models(way: Callable[[nn.Module], None]) -> None:
    def done(how: Callable[[nn.Module], None]) -> Seen:
        torch.manual_seed(2)
        model = net()
        torch.manual_seed(3)
        how(model)
        return seen(model.parameters())

    expected = done(eager)
    with switched():
        assert agree(expected, done(way))
    native = done(way)
    assert not agree(expected, native)  # so the above says something
    assert torch.equal(expected[-1], native[-1])


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_direct_calls(by_torch: None, dtype: torch.dtype, generator: bool) -> None:
    for shape in SHAPES:
        for strided in (False, True):
            found = []
            for function in (orthogonal_, fastinit.orthogonal_):
                base = torch.zeros(*shape[:-1], shape[-1] + strided, dtype=dtype)
                t = base[..., 1:] if strided else base
                torch.manual_seed(5)
                g = torch.Generator().manual_seed(6) if generator else None
                returned, failed, _ = attempt(function, t, 0.7, g)
                assert returned is t or (failed and strided)  # torch views it
                found.append([bits(base), torch.get_rng_state(), *([g.get_state()] if g else [])])
                assert base._version == (2 if not failed else 0)
            assert agree(*found), (shape, strided)


def test_what_torch_refuses_is_refused(by_torch: None) -> None:
    """It has no factorisation in 16 bits; its message and what it has drawn until then."""
    found = []
    for function in (orthogonal_, fastinit.orthogonal_):
        torch.manual_seed(5)
        t = torch.zeros(40, 30, dtype=BF16)
        found.append((attempt(function, t)[1], torch.get_rng_state().tolist(), t.tolist()))
    assert found[0] == found[1]
    assert "geqrf" in found[0][0]


def test_in_a_block(by_torch: None) -> None:
    expected = built(contextlib.nullcontext())
    assert agree(expected, built(fastinit.fused()))
    assert agree(expected, built(fastinit.installed()))


@pytest.mark.parametrize(("scope", "process"), [("torch", "native"), ("native", "torch")])
def test_a_scope_goes_before_the_process(scope: str, process: str) -> None:
    """Of this thread only; what it is left to is what was chosen for it."""

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        with fastinit.fused():
            recorder = recording.this_thread.recorder
            assert recorder is not None
            assert recorder.orthogonal is None
            recorder.orthogonal = scope
            yield

    expected = built(contextlib.nullcontext())
    with switched(process):
        assert agree(expected, built(block())) == (scope == "torch")
        assert agree(expected, built(fastinit.fused())) == (process == "torch")


@pytest.mark.parametrize("scope", ["torch", "native"])
def test_a_plan_recorded_in_a_scope(scope: str) -> None:
    """The choice is the scope's, and the plan keeps it."""
    a, b = torch.empty(64, 64), torch.empty(64, 64)
    made = fastinit.Plan()
    with fastinit.fused():
        recorder = recording.this_thread.recorder
        assert recorder is not None
        recorder.orthogonal = scope
        made.orthogonal_(a)
    torch.manual_seed(1)
    made.run()
    torch.manual_seed(1)
    assert torch.equal(a, orthogonal_(b)) == (scope == "torch")
    made.orthogonal_(b)
    assert made.orthogonal is None  # recorded outside: the process's choice again


@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 7), (2, 2, 40, 30), (4, 16, 16)])
def test_batches(by_torch: None, shape: tuple[int, ...]) -> None:
    """Each matrix is torch's, one after the other; in a plan, too."""
    torch.manual_seed(4)
    expected = torch.empty(shape)
    for matrix in expected.view(-1, *shape[-2:]):
        orthogonal_(matrix, 1.5)
    after = torch.get_rng_state()
    for transposed in (False, True):
        t = torch.zeros(*shape[:-2], shape[-1], shape[-2]).mT if transposed else torch.zeros(shape)
        t.requires_grad_()
        torch.manual_seed(4)
        assert fastinit.orthogonal_batched_(t, 1.5) is t
        assert torch.equal(t, expected)
        assert torch.equal(torch.get_rng_state(), after)
    plan, t = fastinit.Plan(), torch.zeros(shape)
    plan.orthogonal_batched_(t, 1.5)
    torch.manual_seed(4)
    plan.run()
    assert torch.equal(t, expected)


def test_keyed_numbers_do_not_care() -> None:
    found = []
    for way in ("native", "torch"):
        with switched(way):
            a = fastinit.orthogonal_(torch.empty(40, 30), generator=fastinit.Key(1, "w"))
            plan = fastinit.Plan()
            plan.orthogonal_(b := torch.empty(50, 60))
            plan.run(seed=4)
            with fastinit.fused(seed=3):
                c = torch_init.orthogonal_(torch.empty(70, 70))
                d = fastinit.orthogonal_batched_(torch.empty(2, 7, 7))
            found.append((a, b, c, d))
    for one, other in zip(*found):
        assert torch.equal(one, other)


def test_values(by_torch: None) -> None:
    assert fastinit.set_orthogonal("native") == "torch"
    assert fastinit.set_orthogonal("torch") == "native"
    for bad in ("Torch", "", None, True):
        with pytest.raises(ValueError, match='"torch" or be "native", not'):
            fastinit.set_orthogonal(bad)  # type: ignore[arg-type]
    assert fastinit.set_orthogonal("torch") == "torch"  # as it was


def test_the_table_says_so(by_torch: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["verify"]) == 0
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("orthogonal_")]
    assert len(rows) == 12
    assert all("torch (switched)" in row for row in rows)


ENVIRONMENT = """
    import torch, torch.nn.init as init
    torch_s = init.orthogonal_
    import fastinit
    found = []
    for function in (torch_s, fastinit.orthogonal_):
        torch.manual_seed(1)
        found.append(function(torch.empty(64, 64)))
    print(torch.equal(*found), fastinit.set_orthogonal("torch"))
"""


@pytest.mark.parametrize("value", ["torch", *slow(["native", ""])])
def test_environment(python: Callable[..., Any], value: str) -> None:
    done = python(ENVIRONMENT, FASTINIT_ORTHOGONAL=value)
    assert done.stdout.split() == [str(value == "torch"), value or "native"], done.stderr


def test_a_wrong_environment_is_refused(python: Callable[..., Any]) -> None:
    done = python("import fastinit", FASTINIT_ORTHOGONAL="Torch")
    assert done.returncode != 0
    assert "FASTINIT_ORTHOGONAL: can be left to" in done.stderr
