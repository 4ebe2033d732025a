# SPDX-License-Identifier: BSD-3-Clause
"""Run a function eagerly and inside `fastinit.fused()`, and compare all that it can see.

A case takes a Scope and returns what it saw: tensors, modules, arrays and plain values, in lists,
tuples and dicts as it likes. It runs with the heap full of one byte and again with it full of
another, so that it must not return what it did not write, and a fill that was lost shows.
"""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fastinit
from fastinit.core import geometry
from fastinit.fused import adopting
from tests.support.compare import Position, assert_equal_seen, attempt, bits, version
from tests.support.marks import slow_but

T = TypeVar("T")
_BYTES = (0x33, 0x88)  # what fresh memory is full of: the complement of the first, of the second


@dataclass(frozen=True)
class Variant:
    before: bool = False  # what the case makes is made before the scope
    adopted: bool = False  # and may wait all the same, as in init_model_
    late: bool = False  # the scope sees operators from its first fill only
    watched: bool = False  # what the case returns is also looked at inside the scope
    smallest: int = 0  # MIN_NATIVE: fills of fewer elements are not held back
    at: Position = field(default_factory=Position)


VARIANTS = {
    "inside": Variant(at=Position(words=3)),
    "before": Variant(before=True, at=Position(words=620, cached=True)),
    "adopted": Variant(before=True, adopted=True, at=Position(words=5)),
    "late": Variant(late=True, at=Position(words=11)),
    "mixed": Variant(watched=True, smallest=300, at=Position(words=9, cached=True)),
}

AS_USERS_HAVE_IT = Variant(
    late=True, smallest=geometry.MIN_NATIVE, at=Position(words=620, cached=True)
)
N = 40_000  # elements that wait whoever asks; in AS_USERS_HAVE_IT small tensors do not


@dataclass
class Scope:
    """What a case is given: its generator, and ways to make what may come from outside."""

    captured: bool
    g: torch.Generator = field(default_factory=torch.Generator)
    notes: list[Any] = field(default_factory=list)  # seen before an exception
    orders: list[Callable[[], Any]] = field(default_factory=list)  # what was made
    made: list[Any] = field(default_factory=list)  # before the scope, to be handed out
    raises: bool = False  # set by a case that is about to raise

    def make(self, factory: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        self.orders.append(lambda: factory(*args, **kwargs))
        return self.made.pop(0) if self.made else self.orders[-1]()

    def empty(self, *shape: int, **kwargs: Any) -> torch.Tensor:
        return self.make(torch.empty, *shape, **kwargs)

    def fused(self) -> AbstractContextManager[Any]:
        """A scope of the case's own."""
        return fastinit.fused(watch=True) if self.captured else nullcontext()


Case = Callable[[Scope], Any]


class Cases(dict[str, Case]):
    """Decorates cases, and parametrizes a test by the name of the case and the variant."""

    def __call__(self, function: Case) -> Case:
        assert function.__name__ not in self
        self[function.__name__] = function
        return function

    def each(self, test: Callable[..., None]) -> Any:
        by_variant = pytest.mark.parametrize(
            "variant", slow_but(VARIANTS, "inside", "late", "mixed")
        )
        return pytest.mark.parametrize("name", list(self))(by_variant(test))


@contextmanager
def full_of(byte: int) -> Iterator[None]:
    """Memory that malloc gives out is full of ~byte."""
    perturb = -6  # M_PERTURB of glibc
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(perturb, byte)
    try:
        yield
    finally:
        if mallopt:
            mallopt(perturb, 0)


class _Seen(dict[str, Any]):
    """A copy of everything reachable, by path; which tensors are the same, or share memory."""

    def __init__(self, x: Any) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []
        self.storages: list[int] = []
        self.look("", x)

    def look(self, path: str, x: Any) -> None:
        if isinstance(x, torch.Tensor):
            self._look_at_tensor(path, x)
        elif isinstance(x, nn.Module):
            self[f"{path} type"] = (type(x).__name__, x.training)
            self.look(f"{path}.parameters", dict(x.named_parameters(remove_duplicate=False)))
            self.look(f"{path}.buffers", dict(x.named_buffers(remove_duplicate=False)))
        elif isinstance(x, torch.Generator):
            self[path] = x.get_state()
        elif isinstance(x, types.FunctionType):  # for what is to be done where this looks
            self.look(f"{path}()", x())
        elif isinstance(x, np.ndarray):
            self[path] = (x.dtype.str, x.shape, x.tobytes())
        elif isinstance(x, dict):
            self[f"{path} keys"] = [repr(key) for key in x]
            for key, value in x.items():
                self.look(f"{path}.{key}", value)
        elif isinstance(x, (list, tuple)) and not isinstance(x, torch.Size):
            self[f"{path} length"] = len(x)
            for i, value in enumerate(x):
                self.look(f"{path}.{i}", value)
        else:
            self[path] = repr(x) if isinstance(x, (float, complex)) else x

    def _look_at_tensor(self, path: str, x: torch.Tensor) -> None:
        same = [i for i, other in enumerate(self.tensors) if other is x]
        self.tensors.append(x)
        self[f"{path} same"] = same
        self[f"{path} kind"] = (type(x).__name__, x.shape, x.dtype, x.layout, x.device)
        self[f"{path} history"] = (x.requires_grad, x.is_leaf, type(x.grad_fn).__name__)
        if not path.endswith(".grad"):  # autograd adds up out of place under any dispatch mode
            self[f"{path} version"] = version(x)
        if x.is_leaf and x.requires_grad and x.grad is not None:
            self.look(f"{path}.grad", x.grad)
        if x.layout is not torch.strided:
            self[path] = bits(x.to_dense()).clone()
            return
        self[f"{path} geometry"] = (x.stride(), x.storage_offset(), x.is_conj(), x.is_neg())
        storage = x.untyped_storage()._cdata
        if storage not in self.storages:
            self.storages.append(storage)
        self[f"{path} storage"] = self.storages.index(storage)
        if x.is_quantized:
            self[path] = x.int_repr().clone()
        elif not x.is_meta and not isinstance(x, FakeTensor):
            self[path] = bits(x.detach().as_subclass(torch.Tensor)).clone()


def _tensors_of(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, nn.Module):
        yield from (*x.parameters(), *x.buffers())


def _run(
    case: Case, captured: bool, variant: Variant, orders: list[Callable[[], Any]], own: bool
) -> tuple[dict[str, Any], Scope, Any, Any]:
    """All that was seen; the scope; what keeps its memory alive; the report."""
    scope = Scope(captured)
    if variant.before:
        torch.manual_seed(2)
        scope.made = [make() for make in orders]
    variant.at.place(torch.default_generator)
    variant.at.place(scope.g)
    seen: dict[str, Any] = {}
    report: list[Any] = []

    def body() -> Any:
        older = [t for x in scope.made for t in _tensors_of(x)] if variant.adopted else ()
        how = fastinit.fused() if variant.late else adopting(older)
        with how if captured and not own else nullcontext() as entered:
            report.append(entered)
            returned = case(scope)
            seen["inside"] = _Seen((returned, scope.notes)) if variant.watched else {}
        return returned

    returned, seen["failure"], seen["warnings"] = attempt(body)
    seen["explicit generator"] = scope.g.get_state()
    seen["default generator"] = torch.get_rng_state()
    seen.update(_Seen((returned, scope.notes)))
    seen.update({f"inside{key}": value for key, value in seen.pop("inside", {}).items()})
    return seen, scope, returned, report[0]


def compare(case: Case, variant: str = "inside", *, own: bool = False) -> Any:
    """Assert that fused() changes nothing, and return its report; own: the case enters it."""
    how = VARIANTS.get(variant, AS_USERS_HAVE_IT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastinit.core.geometry, "MIN_NATIVE", how.smallest)
        # The first run finds out what is to be made, imports, compiles, and warns once.
        _, scout, *_ = _run(case, False, Variant(at=how.at), [], own)
        with full_of(_BYTES[0]):
            eager, *kept = _run(case, False, how, scout.orders, own)
        with full_of(_BYTES[1]):
            fused, scope, _, report = _run(case, True, how, scout.orders, own)
        what = f"{case.__name__}, {variant}"
        assert bool(eager["failure"]) == scout.raises, f"{what}: torch: {eager['failure']}"
        both = [key for key in eager if key in fused]  # lengths tell more than missing keys
        assert_equal_seen(
            {key: eager[key] for key in both}, {key: fused[key] for key in both}, what
        )
        assert eager.keys() == fused.keys(), what
        assert not scope.made, f"{what}: not everything that was made before was used"
        del kept  # until here: its memory held the right values
    return report


def same(make: Callable[[], Any]) -> fastinit.Report:
    """Assert that fused() changes nothing about what make() returns, with users' thresholds."""

    def case(s: Scope) -> Any:
        return make()

    report: fastinit.Report = compare(case, "as users have it")
    return report


def each(makes: dict[str, Callable[..., Any]], *usual: str) -> Any:
    """Parametrise a test by the functions in a table; if some are `usual`, the others are slow."""
    chosen = slow_but(makes.values(), *(makes[name] for name in usual or makes))
    return pytest.mark.parametrize("make", chosen, ids=makes)


def compare_in_process(python: Callable[..., Any], module: str) -> None:
    """Compare all DANGEROUS cases of a module in a process of its own.

    A write past the end shows there as a crash, or as other bits; the last name printed is its
    case's.
    """
    done = python(
        f"""
        import importlib, sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        import pytest
        from tests.support import scopes, compare
        compare.use_own_factors(pytest.MonkeyPatch())
        for name, case in importlib.import_module({module!r}).DANGEROUS.items():
            for variant in scopes.VARIANTS:
                print(name, variant, flush=True)
                scopes.compare(case, variant)
        print("equal")
        """
    )
    assert done.stdout.endswith("\nequal\n"), done.stdout[-300:] + done.stderr[-3000:]
    assert done.returncode == 0
