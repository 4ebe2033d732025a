# SPDX-License-Identifier: BSD-3-Clause
"""Many tensors in one pass: plans, and the initialisation of whole modules."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
import torch.utils.dlpack
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastinit import init, plan, source

_storage = Tensor.untyped_storage  # as it is now: recorders replace it
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
    called again: it then draws on from where the generators are. Errors are raised when the call is
    recorded if they show then, otherwise by `run`, where that call has its place. The tensors must
    keep their memory and shape while the plan is used; `run` raises RuntimeError otherwise.
    """

    modes = 0

    def __init__(self) -> None:
        self._steps: list[list[plan.Fill] | Callable[[], object]] = []  # one for each call

    def add(self, fills: list[plan.Fill]) -> None:
        for fill in fills:
            fill.extent = plan.extent(fill)
        self._steps.append(fills)

    def call(self, function: Callable[[], object]) -> None:
        self._steps.append(function)

    def __len__(self) -> int:
        return len(self._steps)

    def run(self) -> None:
        """Write everything that was recorded.

        Raises:
            RuntimeError: a tensor has moved, or a mode is active that has to see torch's operators.
        """
        before = plan.set_recorder(None)
        try:
            if isinstance(before, _Recorder):
                before.flush()
            elif not plan.modes_allow():
                raise RuntimeError("a Plan cannot run under a mode, transform or tracer of torch")
            fills: list[plan.Fill] = []
            for step in self._steps:
                if callable(step):
                    plan.run(fills)
                    fills = []
                    step()
                elif any(plan.extent(fill) != fill.extent for fill in step):
                    raise RuntimeError(
                        "a tensor of the plan has other memory or another shape than when it was "
                        "recorded; record the plan anew"
                    )
                else:
                    fills += step
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
        self._starts: dict[torch.Generator, bytes] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True makes the first operator import torch._dynamo, which takes a second

    def add(self, fills: list[plan.Fill]) -> None:
        for fill in fills:
            generator = fill.generator
            if generator not in (None, torch.default_generator):
                # Its owner may read its state at any time, which nobody would see.
                self.flush()
                plan.run([fill])
                continue
            if generator is not None:
                now = source.current(generator)
                if self._starts.get(generator, now) != now:  # somebody has set it meanwhile
                    self.flush()
                self._starts[generator] = now
            # What is to be written is this memory, whatever becomes of the tensor object.
            torch.autograd.graph.increment_version([fill.tensor] * fill.bumps)
            fill.counter, fill.bumps = fill.tensor, 0
            with torch._C._DisableTorchDispatch():  # `data` would come to this mode as an operator
                fill.tensor = fill.tensor.data
            self._fills.append(fill)

    def call(self, function: Callable[[], object]) -> None:
        self.flush()
        before = plan.set_recorder(None)
        try:
            function()
        finally:
            plan.set_recorder(before)

    def flush(self) -> None:
        fills, self._fills = self._fills, []
        starts, self._starts = self._starts, {}
        self._storages.clear()
        self._known = 0
        if fills:
            plan.run(fills, starts)

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
        self._storages.update(_storage(f.tensor)._cdata for f in new)
        return _storage(x)._cdata in self._storages


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


def _flush_this_thread() -> None:
    recorder = plan.this_thread.recorder
    if isinstance(recorder, _Recorder):
        recorder.flush()


class _FlushingGenerator:
    """Stands for torch.default_generator inside torch.random, whose functions read and set it."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __getattr__(self, name: str) -> Any:
        _flush_this_thread()
        return getattr(self._generator, name)


# Ways to a tensor's memory that no operator announces.
_RAW = (
    *("__array__", "__dlpack__", "__reduce_ex__", "data_ptr", "numpy", "storage", "tolist"),
    *("untyped_storage", "share_memory_", "apply_", "map_", "map2_"),
)


def _flushing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        _flush_this_thread()
        return original(*args, **kwargs)

    return method


def _find_importers() -> list[tuple[ModuleType, str]]:
    return [
        (module, name)
        for path, module in list(sys.modules.items())
        if path == "torch.nn.init" or path.startswith("torch.nn.modules.")
        for name in _FUNCTIONS
        if module.__dict__.get(name) is getattr(init._torch, name)
    ]


_patch_lock = threading.RLock()
_patch_users = 0
_patch_undo: list[tuple[Any, str, Any]] = []
_NOT_THERE = object()


def _patch(owner: Any, name: str, value: object) -> None:
    _patch_undo.append((owner, name, vars(owner).get(name, _NOT_THERE)))
    setattr(owner, name, value)


_importers = _find_importers()  # where torch itself has the functions, before others patch them


@contextmanager
def _patched() -> Iterator[None]:
    """torch.nn.init and what it is bound to elsewhere, and ways to see memory and generators.

    Shared by all threads that record; a thread that does not is not affected.
    """
    global _patch_users
    with _patch_lock:
        _patch_users += 1
        if _patch_users == 1:
            for module, name in _importers:
                if vars(module).get(name) is getattr(init._torch, name):
                    _patch(module, name, getattr(init, name))
            generator = vars(torch.random)["default_generator"]
            _patch(torch.random, "default_generator", _FlushingGenerator(generator))
            for name in _RAW:
                _patch(Tensor, name, _flushing(getattr(Tensor, name)))
            dlpack = vars(torch.utils.dlpack)["to_dlpack"]
            _patch(torch.utils.dlpack, "to_dlpack", _flushing(dlpack))
            _patch(threading.Thread, "start", _flushing(threading.Thread.start))
    try:
        yield
    finally:
        with _patch_lock:
            _patch_users -= 1
            while _patch_users == 0 and _patch_undo:
                owner, name, value = _patch_undo.pop()
                if value is _NOT_THERE:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)


@contextmanager
def _recording() -> Iterator[None]:
    recorder = _Recorder()
    before = plan.set_recorder(recorder)
    try:
        with _patched(), recorder:
            try:
                yield
            finally:
                recorder.flush()
    finally:
        plan.set_recorder(before)


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
    raises, what was asked for so far is written. Fills with a generator of the user's own run at
    once. Inside `fn`, reading `torch.default_generator` through its own methods is not seen;
    `torch.get_rng_state`, `fork_rng` and the like are.
    """
    apply = functools.partial(model.apply, cast("Callable[[nn.Module], None]", fn or _reset))
    outer = plan.this_thread.recorder
    if isinstance(outer, _Recorder):  # inside the fn of another init_model_
        apply()
    elif outer is not None:
        raise RuntimeError("init_model_ cannot be part of a Plan that is being recorded")
    elif plan.modes_allow():
        with _recording():
            apply()
    else:  # a mode that has to see torch's operators
        apply()
    return model


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
