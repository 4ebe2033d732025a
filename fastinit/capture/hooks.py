# SPDX-License-Identifier: BSD-3-Clause
"""What is replaced in torch: its init functions, and the ways around operators to see memory."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch.utils.dlpack
from torch import Tensor
from torch.nn.modules import module as nn_module

from fastinit import init
from fastinit.core import recording

FUNCTIONS = tuple(name for name in init.__all__ if name.endswith("_"))
# Ways to a tensor's values that no operator announces, and to its address, after which anybody may
# read or write it at any time. Others (__array__, storage, share_memory_, pickling) go by these.
_READS = ("__repr__", "tolist", "apply_", "map_", "map2_")
_EXPOSES = ("__dlpack__", "const_data_ptr", "data_ptr", "numpy", "untyped_storage")


def _active() -> Any:
    """What wants to know in this thread: a Capture, or a walk of `record`."""
    if _users == 0:
        return None
    recorder: Any = recording.this_thread.recorder
    return recorder if recorder is not None and recorder.modes else None


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        capture = _active()
        if capture is not None:
            for t in (self, *(x for x in args if isinstance(x, Tensor))):  # map2_
                capture.read(t, f"Tensor.{original.__name__}")
        return original(self, *args, **kwargs)

    return method


def _exposing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        capture = _active()
        if capture is not None:
            capture.expose(self, f"Tensor.{original.__name__}")
        return original(self, *args, **kwargs)

    return method


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    """For what writes tensors to a file by itself."""

    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        capture = _active()
        if capture is not None:
            capture.settle(original.__qualname__)
        return original(*args, **kwargs)

    return save


def _is_harmless(thread: threading.Thread) -> bool:
    """tqdm's monitor, started with the first bar, knows no tensors."""
    return type(thread).__module__.startswith("tqdm")


def _starting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def start(self: threading.Thread) -> Any:
        capture = _active()
        if capture is not None and not capture.submitting and not _is_harmless(self):
            capture.before(self)
        return original(self)

    return start


def _submitting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def submit(*args: Any, **kwargs: Any) -> Any:
        capture = _active()
        if capture is None:
            return original(*args, **kwargs)
        capture.before(None)
        capture.submitting = True  # threads of the pool do nothing but its tasks
        try:
            future = original(*args, **kwargs)
        finally:
            capture.submitting = False
        capture.before(future)
        return future

    return submit


def _registered(module: Any, name: str, value: Any) -> None:
    capture = _active()
    report = getattr(capture, "report", None)
    if report is not None:
        report.hold(module, name, value)


# ---- methods -------------------------------------------------------------------------------------

_Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
_METHODS: list[tuple[Any, str, _Wrap]] = [
    *((Tensor, name, _reading) for name in _READS),
    *((Tensor, name, _exposing) for name in _EXPOSES if hasattr(Tensor, name)),
    (torch.utils.dlpack, "to_dlpack", _exposing),
    (torch.jit, "save", _saving),
    (torch.jit._script.RecursiveScriptModule, "save", _saving),
    (torch.jit._script.RecursiveScriptModule, "save_to_buffer", _saving),
    (threading.Thread, "start", _starting),
    (ThreadPoolExecutor, "submit", _submitting),
]
_wrappers: dict[tuple[Any, str], Any] = {}


def _hook_methods() -> None:
    """Wrap what is not, or no longer, wrapped.

    This stays after the block: every change of a class makes the interpreter forget what it has
    learnt about code that uses it, which doubled the time of a block of ten small layers.
    """
    for owner, name, wrap in _METHODS:
        current = vars(owner).get(name)
        if current is None or current is not _wrappers.get((owner, name)):
            original = getattr(owner, name)
            wrapper = _wrappers[owner, name] = wrap(original)
            setattr(owner, name, wrapper)
            if isinstance(owner, ModuleType):  # others have imported it
                for module in list(sys.modules.values()):
                    if getattr(module, "__dict__", {}).get(name) is original:
                        setattr(module, name, wrapper)


# ---- functions -----------------------------------------------------------------------------------


def _stand_in(function: Any) -> Any:
    """A copy that says it is torch's own, for modes that go by a function's module."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    functools.update_wrapper(copy, function)
    copy.__kwdefaults__ = function.__kwdefaults__
    del copy.__wrapped__  # type: ignore[attr-defined]
    copy.__module__ = "torch.nn.init"
    return copy


_ORIGINALS = {name: getattr(init._torch, name) for name in init.__all__}
_ORIGINALS["_no_grad_trunc_normal_"] = init._torch_trunc_normal  # looked up by torch at each call
STAND_INS = {name: _stand_in(getattr(init, name)) for name in _ORIGINALS}
_to_ours = {id(_ORIGINALS[name]): STAND_INS[name] for name in _ORIGINALS}
_to_torch = {id(STAND_INS[name]): _ORIGINALS[name] for name in _ORIGINALS}


def _replace(modules: Iterable[object], by: dict[int, Any]) -> None:
    """Replace names of modules, and values of their dictionaries."""
    for module in modules:
        path = vars(module).get("__name__") if isinstance(module, ModuleType) else None
        if not isinstance(path, str) or path.partition(".")[0] == "fastinit":
            continue
        for name, value in list(vars(module).items()):
            if id(value) in by:
                setattr(module, name, by[id(value)])
            elif type(value) is dict and not name.startswith("__"):
                for key, item in list(value.items()):
                    if id(item) in by:
                        value[key] = by[id(item)]


# Where torch itself has the functions.
_TORCH: list[tuple[ModuleType, str, Any, Any]] = [
    (module, name, value, _to_ours[id(value)])
    for path, module in list(sys.modules.items())
    if path == "torch.nn.init" or path.startswith("torch.nn.modules.")
    for name, value in vars(module).items()
    if id(value) in _to_ours
]
_lock = threading.RLock()
_users = 0  # of `hooked`
_installed = 0  # times
_handles: list[Any] = []
_modules_before = 0


def _renew_lock() -> None:  # in a forked child, where nobody is left to release it
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def hooked() -> Iterator[None]:
    """Shared by all threads that record; a thread that does not is not affected."""
    global _users
    with _lock:
        if _users == 0:
            _hook()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _unhook()


def _hook() -> None:
    global _modules_before
    _modules_before = len(sys.modules)
    _hook_torch()
    _hook_methods()
    _handles.append(nn_module.register_module_parameter_registration_hook(_registered))
    _handles.append(nn_module.register_module_buffer_registration_hook(_registered))
    _handles.append(nn_module.register_module_module_registration_hook(_registered))


def _hook_torch() -> None:
    for module, name, original, ours in _TORCH:
        if vars(module).get(name) is original:
            setattr(module, name, ours)


def _unhook() -> None:
    while _handles:
        _handles.pop().remove()
    if _installed == 0:
        for module, name, original, ours in _TORCH:
            if vars(module).get(name) is ours:
                setattr(module, name, original)
        if len(sys.modules) > _modules_before:  # loaded in the block
            _replace(list(sys.modules.values())[_modules_before:], _to_torch)


def install() -> None:
    global _installed
    with _lock:
        _installed += 1
        if _installed == 1:
            _replace(list(sys.modules.values()), _to_ours)


def uninstall() -> None:
    global _installed
    with _lock:
        if _installed == 0:
            raise RuntimeError("fastinit is not installed")
        _installed -= 1
        if _installed == 0:
            _replace(list(sys.modules.values()), _to_torch)
            if _users > 0:  # a block goes on
                _hook_torch()
