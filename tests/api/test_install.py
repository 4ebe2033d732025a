# SPDX-License-Identifier: BSD-3-Clause
"""install: every name that was bound to torch's functions, and every one of them put back."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn
from torch.nn.init import kaiming_normal_

import fastinit
from fastinit import init
from fastinit.core import geometry
from tests.support.compare import assert_equal_seen
from tests.support.marks import slow, slow_but
from tests.support.models import ZOO, model_state

pytestmark = pytest.mark.usefixtures("large_from_4096")
NAMES = init.__all__
_state = sys.modules["fastinit.install"]
# Not a dictionary: install would find it.
TRUNC_NORMAL = fastinit.dispatch.ORIGINALS["_no_grad_trunc_normal_"]
ORIGINAL = types.MappingProxyType({name: fastinit.dispatch.ORIGINALS[name] for name in NAMES})
imported = {"laws": kaiming_normal_, "other": 3}  # what users write at module level


def bindings() -> dict[tuple[str, str], int]:
    """Every module-level name of torch, transformers and this module, by identity."""
    return {
        (path, name): id(value)
        for path, module in list(sys.modules.items())
        if path.startswith(("torch.nn", "transformers.init", "tests.")) or path == __name__
        for name, value in list(vars(module).items())
        if callable(value)
    }


@pytest.fixture(autouse=True)
def everything_is_put_back() -> Iterator[None]:
    before = bindings()
    inner = dict(imported)
    yield
    after = bindings()
    wrong = {key for key in before if after.get(key, before[key]) != before[key]}
    times = _state._installed
    if wrong or times:  # or the other tests would suffer
        for _ in range(times):
            fastinit.uninstall()
        for name, function in ORIGINAL.items():
            setattr(torch_init, name, function)
        torch_init._no_grad_trunc_normal_ = TRUNC_NORMAL
    assert not wrong
    assert times == 0
    assert imported == inner
    with pytest.raises(RuntimeError, match="fastinit is not installed"):
        fastinit.uninstall()


def is_ours(function: Any, name: str) -> bool:
    """Does what fastinit's function of that name does, which need not be the same object."""
    own = getattr(fastinit, name)
    return function.__code__ is own.__code__ and function.__name__ == name


def init_is_replaced() -> bool:
    replaced = [getattr(torch_init, name) is not ORIGINAL[name] for name in NAMES]
    assert len(set(replaced)) == 1, "some are, others are not"
    return replaced[0]


@pytest.fixture
def library() -> Iterator[Callable[..., types.ModuleType]]:
    """library(name, key=value, ...): a module that is loaded."""
    made = []

    def make(name: str = "a_library", **contents: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module
        made.append(name)
        return module

    yield make
    for name in made:
        sys.modules.pop(name, None)


# ---- what is replaced ----


def test_every_function(library: Callable[..., Any]) -> None:
    user = library(**ORIGINAL, laws={**ORIGINAL, 1: ORIGINAL["normal_"], "b": len})
    with fastinit.installed():
        ours = {name: getattr(torch_init, name) for name in NAMES}
        assert all(is_ours(function, name) for name, function in ours.items())
        assert {name: getattr(user, name) for name in NAMES} == ours
        assert user.laws == {**ours, 1: ours["normal_"], "b": len}
    assert {name: getattr(user, name) for name in NAMES} == ORIGINAL
    assert user.laws == {**ORIGINAL, 1: ORIGINAL["normal_"], "b": len}
    assert {name: getattr(torch_init, name) for name in NAMES} == ORIGINAL


def test_this_module() -> None:
    laws = imported
    with fastinit.installed():
        assert is_ours(kaiming_normal_, "kaiming_normal_")
        assert imported is laws
        assert imported == {"laws": kaiming_normal_, "other": 3}
    assert kaiming_normal_ is ORIGINAL["kaiming_normal_"]


def test_modules_of_torch() -> None:
    """torch.nn.modules.activation and transformer import functions by name."""
    found = 0
    with fastinit.installed():
        for path, module in list(sys.modules.items()):
            if path.startswith("torch.nn.modules."):
                for name in NAMES:
                    if name in vars(module) and name.endswith("_"):
                        assert is_ours(vars(module)[name], name), (path, name)
                        found += 1
    assert found >= 3


def test_trunc_normal_that_is_bound_elsewhere(native: None) -> None:
    """It looks up a private function of torch.nn.init at each call."""
    bound = functools.partial(ORIGINAL["trunc_normal_"], std=0.02)
    seen = []
    for fast in (False, True):
        torch.manual_seed(3)
        t = torch.empty(5000)
        count = fastinit.core.kernels.native_fills
        with fastinit.installed() if fast else torch.no_grad():
            bound(t)
        seen.append((t, torch.get_rng_state()))
        assert (fastinit.core.kernels.native_fills > count) == fast
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_what_is_left_alone(library: Callable[..., Any]) -> None:
    """As documented; and what only looks like torch's functions."""

    class Owner:
        law = staticmethod(ORIGINAL["normal_"])

    def default(t: torch.Tensor, law: Any = ORIGINAL["normal_"]) -> Any:
        return law

    def normal_(t: torch.Tensor) -> torch.Tensor:
        return t

    user = library(
        Owner=Owner, default=default, normal_=normal_, partial=functools.partial(normal_)
    )
    with fastinit.installed():
        assert user.Owner.law is ORIGINAL["normal_"]
        assert user.default(torch.ones(1)) is ORIGINAL["normal_"]
        assert user.normal_ is normal_
        assert fastinit.dispatch.ORIGINALS["normal_"] is ORIGINAL["normal_"]
        assert fastinit.normal_ is not ORIGINAL["normal_"]


def test_odd_entries_of_sys_modules(library: Callable[..., Any]) -> None:
    """None, objects that are no modules, modules that compute their attributes."""

    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

    sys.modules["nothing_here"] = None  # type: ignore[assignment]
    sys.modules["an_object"] = types.SimpleNamespace(law=ORIGINAL["normal_"])  # type: ignore[assignment]
    lazy = Lazy("a_lazy_module")
    lazy.law = ORIGINAL["normal_"]
    sys.modules["a_lazy_module"] = lazy
    try:
        with fastinit.installed():
            assert is_ours(lazy.law, "normal_")
            assert sys.modules["an_object"].law is ORIGINAL["normal_"]
    finally:
        for name in ("nothing_here", "an_object", "a_lazy_module"):
            del sys.modules[name]
    assert lazy.law is ORIGINAL["normal_"]


@pytest.mark.parametrize("name", ["fastinit_of_somebody_else", "fastinits"])
def test_modules_with_a_similar_name(name: str, library: Callable[..., Any]) -> None:
    user = library(name, law=ORIGINAL["normal_"])
    with fastinit.installed():
        assert is_ours(user.law, "normal_")


def test_module_without_a_name(library: Callable[..., Any]) -> None:
    """Whatever is in sys.modules, install does not stop half way."""
    del library("a_nameless_module").__name__
    with fastinit.installed():
        assert init_is_replaced()


@pytest.mark.slow
def test_transformers() -> None:
    """Its table of torch's functions, which it puts into torch.nn.init while it loads models."""
    reason = "transformers with an initialization module is not installed"
    pytest.importorskip("transformers", reason=reason)
    initialization = pytest.importorskip("transformers.initialization", reason=reason)
    table = initialization.TORCH_INIT_FUNCTIONS
    before = dict(table)
    assert before["normal_"] is ORIGINAL["normal_"]
    with fastinit.installed():
        assert initialization.TORCH_INIT_FUNCTIONS is table
        assert table.keys() == before.keys()
        for name in table:
            assert is_ours(table[name], name)
        fastinit.normal_(torch.empty(5000))  # its proof takes fills, too
        count = fastinit.core.kernels.native_fills
        initialization.normal_(torch.empty(5000))
        assert fastinit.core.kernels.native_fills == count + 1
    assert table == before


# ---- how often, and for how long ----


def test_counts() -> None:
    for _ in range(3):
        fastinit.install()
    for left in (2, 1):
        fastinit.uninstall()
        assert init_is_replaced(), left
    fastinit.uninstall()
    assert not init_is_replaced()


def test_uninstall_alone() -> None:
    with pytest.raises(RuntimeError, match="fastinit is not installed"):
        fastinit.uninstall()
    fastinit.install()
    fastinit.uninstall()
    with pytest.raises(RuntimeError, match="fastinit is not installed"):
        fastinit.uninstall()
    assert not init_is_replaced()


def test_nested() -> None:
    with fastinit.installed():
        with fastinit.installed():
            fastinit.install()
        assert init_is_replaced()
        fastinit.uninstall()
        assert init_is_replaced()
    assert not init_is_replaced()


def fail_when_installed() -> None:
    assert init_is_replaced()
    raise KeyError("no")


def test_exceptions() -> None:
    with pytest.raises(KeyError, match="no"), fastinit.installed():
        fail_when_installed()
    assert not init_is_replaced()


def test_decorator() -> None:
    """Also of a function that calls itself, and of one that raises."""

    @fastinit.installed()
    def depth(n: int) -> list[bool]:
        """A docstring."""
        if n == 0:
            raise ValueError("the end")
        try:
            return [init_is_replaced(), *depth(n - 1)]
        except ValueError:
            return [init_is_replaced()]

    assert not init_is_replaced()
    assert depth(3) == [True, True, True]
    assert not init_is_replaced()
    with pytest.raises(ValueError, match="the end"):
        depth(0)
    assert not init_is_replaced()
    assert (depth.__name__, depth.__doc__) == ("depth", "A docstring.")


def test_install_gives_nothing() -> None:
    assert fastinit.install() is None
    assert fastinit.uninstall() is None
    with fastinit.installed() as entered:
        assert entered is None


def test_names_that_changed_meanwhile(library: Callable[..., Any]) -> None:
    """What is loaded later imports fastinit's functions until they are taken back."""
    user = library(law=ORIGINAL["normal_"], laws={"a": ORIGINAL["normal_"]})
    with fastinit.installed():
        later = library("a_later_library", law=torch_init.normal_)
        sys.modules.pop(user.__name__)
    assert later.law is ORIGINAL["normal_"]
    assert is_ours(user.law, "normal_")  # it was not to be found any more


def test_names_that_the_user_rebound_or_deleted(library: Callable[..., Any]) -> None:
    """They are the user's, not to be overwritten."""
    contents = {"law": ORIGINAL["normal_"], "gone": ORIGINAL["zeros_"]}
    user = library(**contents, laws=dict(contents))
    with fastinit.installed():
        user.law = user.laws["law"] = len
        del user.gone
        del user.laws["gone"]
    assert user.law is len
    assert not hasattr(user, "gone")
    assert user.laws == {"law": len}


def test_import_while_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_meanwhile.py").write_text(
        "from torch.nn.init import normal_, zeros_ as law\nimport torch.nn.init as init\n"
        "LAWS = {'zeros': law}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with fastinit.installed():
            module = importlib.import_module("imported_meanwhile")
            assert is_ours(module.normal_, "normal_")
            assert is_ours(module.LAWS["zeros"], "zeros_")
        assert module.normal_ is ORIGINAL["normal_"]
        assert torch_init is module.init
        assert module.init.normal_ is ORIGINAL["normal_"]
        t, u = torch.empty(5000), torch.empty(5000)
        torch.manual_seed(1)
        module.normal_(t)
        torch.manual_seed(1)
        torch_init.normal_(u)
        assert torch.equal(t, u)
        with fastinit.installed():
            assert is_ours(module.normal_, "normal_")
    finally:
        sys.modules.pop("imported_meanwhile", None)


def test_signatures_and_names() -> None:
    """Who looks at a function sees what it would have seen."""
    before = {name: inspect.signature(getattr(torch_init, name)) for name in NAMES}
    with fastinit.installed():
        for name in NAMES:
            function = getattr(torch_init, name)
            assert (function.__name__, function.__module__) == (name, "torch.nn.init")
            if name[-1] == "_":
                found = inspect.signature(function).parameters
                assert list(found) == list(before[name].parameters)


# ---- the same bits ----


def built(make: Callable[[], nn.Module], fast: bool) -> tuple[dict[str, Any], int]:
    torch.manual_seed(7)
    count = fastinit.core.kernels.native_fills
    with fastinit.installed() if fast else torch.enable_grad():
        model = make()
    state = {**model_state(model), "generator": torch.get_rng_state()}
    return state, fastinit.core.kernels.native_fills - count


KINDS = [k for k in ZOO if k not in ("on_meta", "all_meta")]


@pytest.mark.parametrize("kind", slow_but(KINDS, "mlp", "norms", "encoder", "tied"))
def test_construction(kind: str, native: None) -> None:
    (expected, none), (found, some) = built(ZOO[kind], False), built(ZOO[kind], True)
    assert_equal_seen(expected, found, kind)
    assert none == 0
    assert some > 0 or kind in ("no_parameters", "norms", "embeddings", "views")


LARGE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(90, 80),
    "transformer": lambda: nn.Transformer(64, 4, 1, 1, 96, batch_first=True),
    "conv": lambda: nn.Conv2d(64, 64, 3),
    "embedding": lambda: nn.Embedding(900, 80),
    "lstm": lambda: nn.LSTM(64, 64),
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_construction(kind: str) -> None:
    (expected, none), (found, some) = built(LARGE[kind], False), built(LARGE[kind], True)
    assert_equal_seen(expected, found, kind)
    large = sum(v.numel() >= geometry.MIN_NATIVE for v in found.values() if torch.is_tensor(v)) - 1
    assert large > 0
    assert (none, some > 0) == (0, True)


def test_small_tensors_are_left_to_torch() -> None:
    expected, found = (built(lambda: nn.Linear(9, 8), fast) for fast in (False, True))
    assert_equal_seen(expected[0], found[0], "linear")
    assert found[1] == 0


# ---- threads ----


@pytest.mark.parametrize("rounds", [2, *slow([30])])
def test_other_threads(rounds: int) -> None:
    """It is for the whole process; a count is not lost between threads."""
    with fastinit.installed(), ThreadPoolExecutor(2) as pool:
        assert pool.submit(init_is_replaced).result()
    barrier = threading.Barrier(4)

    def work() -> int:
        barrier.wait()
        seen = 0
        for _ in range(rounds):
            with fastinit.installed():
                seen += is_ours(torch_init.normal_, "normal_")
        return seen

    with ThreadPoolExecutor(4) as pool:
        assert [f.result() for f in [pool.submit(work) for _ in range(4)]] == [rounds] * 4
    assert not init_is_replaced()


def test_uninstalled_by_another_thread() -> None:
    fastinit.install()
    thread = threading.Thread(target=fastinit.uninstall)
    thread.start()
    thread.join()
    assert not init_is_replaced()


# ---- together with fused ----


def model_in(contexts: list[Callable[[], Any]]) -> dict[str, Any]:
    torch.manual_seed(5)
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        model = nn.Sequential(nn.Linear(90, 80), nn.Embedding(90, 80, padding_idx=3))
        kaiming_normal_(model[0].weight)
    return {**model_state(model), "generator": torch.get_rng_state()}


ORDERS = [
    [fastinit.installed],
    [fastinit.installed, fastinit.fused],
    [fastinit.fused, fastinit.installed],
    [fastinit.installed, fastinit.fused, fastinit.installed, fastinit.fused],
]


@pytest.mark.parametrize("contexts", ORDERS, ids=lambda c: " ".join(f.__name__ for f in c))
def test_with_fused(contexts: list[Callable[[], Any]]) -> None:
    assert_equal_seen(model_in([]), model_in(contexts), "model")
    assert not init_is_replaced()
    assert torch_init._no_grad_trunc_normal_ is TRUNC_NORMAL


def test_fused_in_installed_records() -> None:
    with fastinit.installed(), fastinit.fused(watch=True) as report:
        layer = nn.Linear(90, 80)
        assert init_is_replaced()
        ORIGINAL["ones_"](layer.weight)
    assert report.written_elements == report.dropped_elements == 7200
    assert report.rows()[0].written_by == ("ones_()",)


def test_installed_in_fused_is_over_at_its_end() -> None:
    with fastinit.fused(watch=True) as report:
        with fastinit.installed():
            kaiming_normal_(nn.Linear(90, 80).weight)
        assert kaiming_normal_ is ORIGINAL["kaiming_normal_"]
        layer = nn.Linear(90, 80)
    assert not init_is_replaced()
    assert report.written_elements == layer.weight.numel()


def test_installed_in_a_block_and_still_after_it() -> None:
    """As when a library that installs fastinit is imported in a block."""
    with fastinit.fused():
        fastinit.install()
    assert init_is_replaced()
    assert torch_init._no_grad_trunc_normal_.__code__ is init._no_grad_trunc_normal_.__code__
    assert is_ours(nn.modules.activation.xavier_normal_, "xavier_normal_")
    fastinit.uninstall()
    assert not init_is_replaced()
    assert torch_init._no_grad_trunc_normal_ is TRUNC_NORMAL


def test_uninstalled_in_a_block() -> None:
    fastinit.install()
    with fastinit.fused(watch=True) as report:
        fastinit.uninstall()
        torch_init.normal_(torch.empty(5000))
    assert report.recorded_elements == 5000
    assert not init_is_replaced()
    assert torch_init._no_grad_trunc_normal_ is TRUNC_NORMAL


def test_with_plans_and_models() -> None:
    with fastinit.installed():
        made = fastinit.Plan()
        a, b = torch.empty(5000), torch.empty(5000)
        made.normal_(a)
        torch.manual_seed(1)
        made.run()
        torch.manual_seed(1)
        kaiming_normal_(nn.Parameter(torch.empty(2, 2)))
        model = nn.Linear(80, 70)
        fastinit.init_model_(model)
        recorded = fastinit.record(model, lambda m: kaiming_normal_(m.weight))
        assert len(recorded) == 1
        torch.manual_seed(1)
        torch_init.normal_(b)
    assert torch.equal(a, b)


def test_other_containers_are_left_alone(library: Callable[..., Any]) -> None:
    """Only plain dictionaries are looked into, one level deep."""
    law = ORIGINAL["normal_"]
    contents = {
        "ordered": collections.OrderedDict(a=law),
        "listed": [law],
        "deep": {"a": {"b": law}},
    }
    user = library(**contents)
    with fastinit.installed():
        assert user.ordered["a"] is user.listed[0] is user.deep["a"]["b"] is law
