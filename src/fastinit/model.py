# SPDX-License-Identifier: BSD-3-Clause
"""Many tensors in one pass: plans, and the initialisation of whole modules."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastinit import init, plan

_FUNCTIONS = tuple(name for name in init.__all__ if name.endswith("_"))


class Plan:
    """Fills that are recorded first and run together, in the order they were recorded.

    Has a method for every function of torch.nn.init that fills a tensor, with its signature:

        >>> import torch, fastinit
        >>> plan = fastinit.Plan()
        >>> w, b = torch.empty(256, 128), torch.empty(256)
        >>> _ = plan.kaiming_normal_(w, nonlinearity="relu")
        >>> _ = plan.zeros_(b)
        >>> len(plan)
        2
        >>> plan.run()

    `run` gives what the same calls one by one would have given, generators included, and may be
    called again: it then draws on from where the generators are. Errors that torch reports when a
    call is made are raised by `run`, where that call has its place. The tensors must keep their
    storage and shape while the plan is used.
    """

    modes = 0

    def __init__(self) -> None:
        self._steps: list[plan.Fill | Callable[[], object]] = []

    def add(self, fills: list[plan.Fill]) -> None:
        self._steps += fills

    def call(self, function: Callable[[], object]) -> None:
        self._steps.append(function)

    def __len__(self) -> int:
        return len(self._steps)

    def run(self) -> None:
        """Write everything that was recorded."""
        before = plan.set_recorder(None)
        try:
            fills: list[plan.Fill] = []
            for step in self._steps:
                if isinstance(step, plan.Fill):
                    fills.append(step)
                    continue
                plan.run(fills)
                fills = []
                step()
            plan.run(fills)
        finally:
            plan.set_recorder(before)

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        if name not in _FUNCTIONS:
            raise AttributeError(f"'Plan' object has no attribute {name!r}")
        function = getattr(init, name)

        def record(*args: Any, **kwargs: Any) -> Tensor:
            before = plan.set_recorder(self)
            try:
                return function(*args, **kwargs)  # type: ignore[no-any-return]
            finally:
                plan.set_recorder(before)

        return record


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records fills while arbitrary code runs, and writes them before that code could tell.

    Operators that touch a tensor with a pending fill, draw random numbers or are of an unknown kind
    have everything written first; so do the known ways to read memory or generators without an
    operator.
    """

    modes = 1

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fills: list[plan.Fill] = []
        self._storages: set[int] = set()  # of the first _known fills
        self._known = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True makes the first operator import torch._dynamo, which takes a second

    def add(self, fills: list[plan.Fill]) -> None:
        self._fills += fills

    def call(self, function: Callable[[], object]) -> None:
        self.flush()
        before = plan.set_recorder(None)
        try:
            with _disable_current_modes():
                function()
        finally:
            plan.set_recorder(before)

    def flush(self) -> None:
        fills, self._fills = self._fills, []
        self._storages.clear()
        self._known = 0
        if fills:
            with _disable_current_modes():
                plan.run(fills)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._fills and not _is_view(func):
            random = torch.Tag.nondeterministic_seeded in func.tags
            if random or any(self._is_pending(x) for x in _leaves((args, kwargs))):
                self.flush()
        return func(*args, **kwargs)

    def _is_pending(self, x: object) -> bool:
        if not isinstance(x, Tensor):
            return False
        if type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided:
            return True
        new, self._known = self._fills[self._known :], len(self._fills)
        self._storages.update(f.tensor.untyped_storage()._cdata for f in new)
        return x.untyped_storage()._cdata in self._storages


def _is_view(func: Any) -> bool:
    """Aliases its inputs without reading or writing their memory."""
    return func.is_view and not func._schema.is_mutable


def _leaves(x: object) -> Iterator[object]:
    if isinstance(x, (list, tuple)):
        for y in x:
            yield from _leaves(y)
    elif isinstance(x, dict):
        for y in x.values():
            yield from _leaves(y)
    else:
        yield x


class _FlushingGenerator:
    """Stands for torch.default_generator inside torch.random, whose functions read and set it."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __getattr__(self, name: str) -> Any:
        recorder = plan.recorder()
        if isinstance(recorder, _Recorder):
            recorder.flush()
        return getattr(self._generator, name)


# Ways to a tensor's memory that no operator announces.
_RAW = ("__array__", "__dlpack__", "__reduce_ex__", "data_ptr", "numpy", "tolist")


def _flushing(name: str) -> Callable[..., Any]:
    original = getattr(Tensor, name)

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder = plan.recorder()
        if isinstance(recorder, _Recorder):
            recorder.flush()
        return original(self, *args, **kwargs)

    return method


@functools.cache
def _importers() -> list[tuple[ModuleType, str]]:
    """Where torch itself has the functions."""
    return [
        (module, name)
        for path, module in list(sys.modules.items())
        if path == "torch.nn.init" or path.startswith("torch.nn.modules.")
        for name in _FUNCTIONS
        if module.__dict__.get(name) is getattr(init._torch, name)
    ]


@contextmanager
def _patched() -> Iterator[None]:
    """torch.nn.init, and what torch.nn.modules imported from it, gets fastinit's functions."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for module, name in _importers():
            if module.__dict__.get(name) is getattr(init._torch, name):
                undo.append((module, name, module.__dict__[name]))
                setattr(module, name, getattr(init, name))
        generator = torch.random.__dict__["default_generator"]
        undo.append((torch.random, "default_generator", generator))
        setattr(torch.random, "default_generator", _FlushingGenerator(generator))  # noqa: B010
        yield
    finally:
        for owner, name, value in undo:
            setattr(owner, name, value)


@contextmanager
def _recording() -> Iterator[None]:
    recorder = _Recorder()
    before = plan.set_recorder(recorder)
    own = {name: Tensor.__dict__.get(name) for name in _RAW}
    try:
        for name in _RAW:
            setattr(Tensor, name, _flushing(name))
        with _patched(), recorder:
            try:
                yield
            finally:
                recorder.flush()
    finally:
        plan.set_recorder(before)
        for name, value in own.items():
            if value is None:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, value)


def init_model_(model: nn.Module, fn: Callable[[nn.Module], object] | None = None) -> nn.Module:
    """Initialise all of a model's parameters in one pass; same numbers as one by one.

    Args:
        model: any module
        fn: called with every submodule, children first and the model last, as by `model.apply`;
            by default each module that has `reset_parameters` is asked to reset its own

    Returns:
        `model`.

    What `fn` asks of torch.nn.init or fastinit is recorded and run as one plan; everything else it
    does to tensors is done when asked, with the fills before it written if it could see them. If it
    raises, what was asked for so far is written. Reading a `torch.Generator` through its own
    methods inside `fn` is not noticed; `torch.get_rng_state`, `fork_rng` and the like are.
    """
    with _recording():
        model.apply(cast("Callable[[nn.Module], None]", fn or _reset))
    return model


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
