# SPDX-License-Identifier: BSD-3-Clause
"""What is replaced in torch: its init functions, and the ways around operators to see memory."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.nn.modules import module as nn_module

from fastinit import init, plan

FUNCTIONS = tuple(name for name in init.__all__ if name.endswith("_"))
# Ways to a tensor's values that no operator announces, and to its address, after which anybody may
# read or write it at any time.
_READS = ("__reduce_ex__", "__repr__", "tolist", "apply_", "map_", "map2_")
_EXPOSES = (
    *("__array__", "__dlpack__", "data_ptr", "numpy", "const_data_ptr", "share_memory_"),
    *("storage", "_typed_storage", "untyped_storage"),
)


def _active() -> Any:
    """What wants to know in this thread: a Capture, or a walk of `record`."""
    recorder: Any = plan.this_thread.recorder
    return recorder if recorder is not None and recorder.modes else None


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        capture = _active()
        if capture is not None:
            for t in (self, *(x for x in args if isinstance(x, Tensor))):  # map2_
                capture.read(t)
        return original(self, *args, **kwargs)

    return method


def _exposing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        capture = _active()
        if capture is not None:
            capture.expose(self)
        return original(self, *args, **kwargs)

    return method


def _starting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def start(self: threading.Thread) -> Any:
        capture = _active()
        if capture is not None:
            capture.before(self)
        return original(self)

    return start


def _submitting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def submit(*args: Any, **kwargs: Any) -> Any:
        capture = _active()
        if capture is not None:
            capture.before(None)
        future = original(*args, **kwargs)
        if capture is not None:
            capture.before(future)
        return future

    return submit


def _registered(module: Any, name: str, value: Any) -> None:
    capture = _active()
    report = getattr(capture, "report", None)
    if report is not None:
        report.hold(module, name, value)


class Patches:
    """Attributes that are replaced, and can be put back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set(self, owner: Any, name: str, value: object) -> None:
        if name in vars(owner):
            self._undo.append(functools.partial(setattr, owner, name, vars(owner)[name]))
        else:  # it is inherited
            self._undo.append(functools.partial(delattr, owner, name))
        setattr(owner, name, value)

    def set_item(self, owner: dict[Any, Any], key: object, value: object) -> None:
        self._undo.append(functools.partial(owner.__setitem__, key, owner[key]))
        owner[key] = value

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


def _find_importers() -> list[tuple[ModuleType, str]]:
    return [
        (module, name)
        for path, module in list(sys.modules.items())
        if path == "torch.nn.init" or path.startswith("torch.nn.modules.")
        for name in FUNCTIONS
        if module.__dict__.get(name) is getattr(init._torch, name)
    ]


_importers = _find_importers()  # where torch itself has the functions, before others patch them
_lock = threading.RLock()
_users = 0
_patches = Patches()
_handles: list[Any] = []


@contextmanager
def hooked() -> Iterator[None]:
    """Shared by all threads that record; a thread that does not is not affected."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _hook()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _patches.undo()
                while _handles:
                    _handles.pop().remove()


def _hook() -> None:
    for module, name in _importers:
        if vars(module).get(name) is getattr(init._torch, name):
            _patches.set(module, name, getattr(init, name))
    _patches.set(torch.nn.init, "_no_grad_trunc_normal_", init._no_grad_trunc_normal_)
    for name in _READS:
        _patches.set(Tensor, name, _reading(getattr(Tensor, name)))
    for name in _EXPOSES:
        if hasattr(Tensor, name):  # not every torch has all
            _patches.set(Tensor, name, _exposing(getattr(Tensor, name)))
    dlpack = vars(torch.utils.dlpack)["to_dlpack"]
    _patches.set(torch.utils.dlpack, "to_dlpack", _exposing(dlpack))
    _patches.set(threading.Thread, "start", _starting(threading.Thread.start))
    _patches.set(ThreadPoolExecutor, "submit", _submitting(ThreadPoolExecutor.submit))
    _handles.append(nn_module.register_module_parameter_registration_hook(_registered))
    _handles.append(nn_module.register_module_buffer_registration_hook(_registered))
    _handles.append(nn_module.register_module_module_registration_hook(_registered))
