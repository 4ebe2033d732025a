# SPDX-License-Identifier: BSD-3-Clause
"""Ways to a tensor's memory that no operator announces, and what they tell the recorder."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch.utils.dlpack
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastinit.core import torch_api
from fastinit.core.recording import Recorder, this_thread
from fastinit.install import standing_in

# Ways to a tensor's values that no operator announces, and to its address, after which anybody may
# read or write it at any time. Others (__array__, storage, share_memory_, pickling) go by these.
_READS = ("__repr__", "tolist", "apply_", "map_", "map2_")
_EXPOSES = ("__dlpack__", "const_data_ptr", "data_ptr", "numpy", "untyped_storage")


def _active() -> Recorder | None:
    """Return the recorder that wants to know what happens in this thread, if there is one."""
    recorder = this_thread.recorder
    return recorder if recorder is not None and recorder.modes else None


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder = _active()
        if recorder is not None:
            for t in (self, *(x for x in args if isinstance(x, Tensor))):  # map2_
                recorder.read(t, f"Tensor.{original.__name__}")
        return original(self, *args, **kwargs)

    return method


def _exposing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder = _active()
        if recorder is not None:
            recorder.expose(self, f"Tensor.{original.__name__}")
        return original(self, *args, **kwargs)

    return method


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that writes all that is pending before `original` saves tensors."""

    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        recorder = _active()
        if recorder is not None:
            recorder.settle(original.__qualname__)
        return original(*args, **kwargs)

    return save


class _Native(threading.Thread):
    """Native code in this thread that reads and writes tensors without operators, as others do."""

    def __init__(self, what: str) -> None:
        super().__init__(name=what)
        self.runs = True

    def is_alive(self) -> bool:
        return self.runs


def _running(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call of native code before which all that is pending is written, and in which
    nothing waits.
    """

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = _active()
        if recorder is None or not torch_api.reads_unseen(self):
            return original(self, *args, **kwargs)
        code = _Native(type(self).__name__)
        recorder.settle(code.name)
        recorder.before(code)
        try:
            return original(self, *args, **kwargs)
        finally:
            code.runs = False

    return call


def _is_harmless(thread: threading.Thread) -> bool:
    """Return whether a thread is tqdm's monitor, which starts with the first bar: no tensors."""
    return type(thread).__module__.startswith("tqdm")


def _starting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def start(self: threading.Thread) -> Any:
        recorder = _active()
        if recorder is not None and not recorder.submitting and not _is_harmless(self):
            recorder.before(self)
        return original(self)

    return start


def _submitting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def submit(*args: Any, **kwargs: Any) -> Any:
        recorder = _active()
        if recorder is None:
            return original(*args, **kwargs)
        recorder.before(None)
        recorder.submitting = True  # threads of the pool do nothing but its tasks
        try:
            future = original(*args, **kwargs)
        finally:
            recorder.submitting = False
        recorder.before(future)
        return future

    return submit


def _registered(module: nn.Module, name: str, value: object) -> None:
    recorder = _active()
    if recorder is not None:
        recorder.hold(module, name, value)


# ---- methods -------------------------------------------------------------------------------------

_Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
_METHODS: list[tuple[Any, str, _Wrap]] = [
    *((Tensor, name, _reading) for name in _READS),
    *((Tensor, name, _exposing) for name in _EXPOSES if hasattr(Tensor, name)),
    (torch.utils.dlpack, "to_dlpack", _exposing),
    (torch.jit, "save", _saving),
    (torch_api.ScriptModule, "save", _saving),
    (torch_api.ScriptModule, "save_to_buffer", _saving),
    *((kind, name, _running) for kind, name in torch_api.native_calls()),
    (threading.Thread, "start", _starting),
    (ThreadPoolExecutor, "submit", _submitting),
]
_wrappers: dict[tuple[Any, str], Any] = {}


def _hook_methods() -> None:
    """Wrap the methods that are not, or no longer, wrapped.

    They stay wrapped after the scope: every change of a class makes the interpreter forget what it
    has learnt about code that uses it, which doubled the time of a scope of ten small layers.
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


# ---- scopes --------------------------------------------------------------------------------------

_handles: list[Any] = []  # of the hooks in torch's modules, while a scope lasts


def hooked() -> AbstractContextManager[None]:
    """Tell recorders what happens, in all threads; a thread without a recorder is not affected."""
    return standing_in(_hook, _unhook)


def _hook() -> None:
    _hook_methods()
    _handles.append(nn_module.register_module_parameter_registration_hook(_registered))
    _handles.append(nn_module.register_module_buffer_registration_hook(_registered))
    _handles.append(nn_module.register_module_module_registration_hook(_registered))


def _unhook() -> None:
    while _handles:
        _handles.pop().remove()
