# SPDX-License-Identifier: BSD-3-Clause
"""Ways to a tensor's memory that no operator announces, and what they tell the recorder."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

import torch.utils.dlpack
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastinit import install
from fastinit.capture import emptied
from fastinit.core import geometry, torch_api
from fastinit.core.recording import Recorder, set_recorder, this_thread, told

# Ways to a tensor's values that no operator announces, and to its address, after which anybody may
# read or write it at any time. Others (__array__, storage, share_memory_, pickling) go by these.
_READS = ("__repr__", "tolist", "apply_", "map_", "map2_")
_EXPOSES = ("__dlpack__", "const_data_ptr", "data_ptr", "numpy", "untyped_storage")


def _active() -> Recorder | None:
    """Return the recorder that wants to know what happens in this thread, if there is one."""
    recorder = this_thread.recorder
    return recorder if recorder is not None and recorder.is_told else None


def _tell_others(what: threading.Thread | Future[Any] | Tensor) -> None:
    """Tell the scopes of other threads what one without a scope does: they may have started it."""
    for recorder in tuple(told):
        recorder.meanwhile(what)


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder = _active()
        if recorder is not None:
            for t in (self, *(x for x in args if isinstance(x, Tensor))):  # map2_
                recorder.read(t, f"Tensor.{original.__name__}")
        return original(self, *args, **kwargs)

    return method


# Functions that ask for addresses and sizes to find tensors in the same memory, and never read it;
# safetensors' load_model, for one, asks for each parameter's before it overwrites all of them.
_COMPARING = {
    "safetensors": {"storage_ptr", "storage_size", "_find_disjoint", "_is_complete"},
    "huggingface_hub": {"storage_ptr", "get_torch_storage_id", "get_torch_storage_size",
                        "_get_unique_id", "_find_disjoint", "_is_complete"},
    "transformers": {"id_tensor_storage", "_find_disjoint", "_find_identical"},
    "accelerate": {"id_tensor_storage"},
}  # fmt: skip


def _compares_only(frame: FrameType | None) -> bool:
    """Return whether an address is asked for by one of these, itself or by way of torch."""
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package != "torch":
            return frame.f_code.co_name in _COMPARING.get(package, ())
        frame = frame.f_back
    return False


def _exposing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder = _active()
        if recorder is None:
            _tell_others(self)
        elif not _compares_only(sys._getframe(1)):
            recorder.expose(self, f"Tensor.{original.__name__}")
        return original(self, *args, **kwargs)

    return method


def _filling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder = this_thread.recorder
        # Most are small: 0.5 us of the 4 that torch takes for a fill.
        if recorder is not None and not (
            type(self) in geometry.PLAIN
            and torch_api.function_modes() == 0
            and (type(n := self.numel()) is not int or n < geometry.MIN_NATIVE)  # not: traced
            and self.is_cpu
        ):
            recorder.expect(self, "")
        return original(self, *args, **kwargs)

    return method


def _beginning(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function before which the recorder begins: what follows is to be seen."""

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        recorder = this_thread.recorder
        if recorder is not None:
            recorder.begin()
        return original(*args, **kwargs)

    return method


def _emptying(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return nn.Module.to_empty, whose tensors are known to be garbage then.

    It is put there when fastinit is imported, as models are emptied before init_model_ is called.
    """

    @functools.wraps(original)
    def to_empty(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorder = this_thread.recorder
        if recorder is not None:
            recorder.begin()
        out = original(self, *args, **kwargs)
        new = emptied.note(self)
        if recorder is not None:
            recorder.emptied(self, new)
        return out

    return to_empty


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that writes all that is pending before `original` saves tensors."""

    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        recorder = _active()
        if recorder is not None:
            recorder.settle(original.__qualname__)
        return original(*args, **kwargs)

    return save


class Native(threading.Thread):
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
        if recorder is None:
            return original(self, *args, **kwargs)
        if torch_api.makes_tensors_of_numbers(self):
            with _aside(recorder, type(self).__name__):
                return original(self, *args, **kwargs)
        if not torch_api.reads_unseen(self):
            return original(self, *args, **kwargs)
        code = Native(type(self).__name__)
        recorder.settle(code.name)
        recorder.before(code)
        try:
            return original(self, *args, **kwargs)
        finally:
            code.runs = False

    return call


def _tracing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch.jit's tracer, which no dispatch mode may watch."""

    @functools.wraps(original)
    def trace(*args: Any, **kwargs: Any) -> Any:
        with _aside(_active(), "torch.jit.trace"):
            return original(*args, **kwargs)

    return trace


@contextmanager
def _aside(recorder: Recorder | None, what: str) -> Iterator[None]:
    """Do something without the scope of this thread, after all that is pending is written.

    To dispatch modes torch hands tensors that were made of numbers as numbers, which few operators
    take: so does traced code, and the tracer.
    """
    if recorder is None or torch_api.dispatch_modes() != recorder.modes:
        yield
        return
    recorder.settle(what)
    try:
        set_recorder(None)
        with torch_api.disable_current_modes():
            yield
    finally:
        set_recorder(recorder)


def _printing(original: Callable[..., str]) -> Callable[..., str]:
    """Return a method that prints a graph: the numbers in it are nothing that a scope has."""

    @functools.wraps(original)
    def text(self: object) -> str:
        if _active() is None:
            return original(self)
        with torch_api.disable_current_modes():
            return original(self)

    return text


def _compiling(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a function of torch.compile calls first, with what compiles frames, if any."""

    @functools.wraps(original)
    def callback(how: Any) -> Any:
        recorder = _active()
        if recorder is not None and how is not None:
            recorder.compiled()
        return original(how)

    return callback


def _is_harmless(thread: threading.Thread) -> bool:
    """Return whether a thread is tqdm's monitor, which starts with the first bar: no tensors."""
    return type(thread).__module__.startswith("tqdm")


def _starting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def start(self: threading.Thread) -> Any:
        recorder = _active()
        if recorder is None:
            _tell_others(self)
        elif not recorder.submitting and not _is_harmless(self):
            recorder.before(self)
        return original(self)

    return start


def _submitting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def submit(*args: Any, **kwargs: Any) -> Any:
        recorder = _active()
        if recorder is None:
            future = original(*args, **kwargs)
            _tell_others(future)
            return future
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
    recorder = this_thread.recorder
    if recorder is not None:
        recorder.hold(module, name, value)


# ---- methods -------------------------------------------------------------------------------------

_Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
_METHODS: list[tuple[Any, str, _Wrap]] = [
    *((Tensor, name, _reading) for name in _READS),
    *((Tensor, name, _exposing) for name in _EXPOSES if hasattr(Tensor, name)),
    *((Tensor, name, _filling) for name in ("uniform_", "normal_")),
    (nn.Module, "to_empty", _emptying),
    (torch.inference_mode, "__enter__", _beginning),  # which hides later modes when it ends
    (torch.utils.dlpack, "to_dlpack", _exposing),
    (torch.jit, "save", _saving),
    (torch_api.ScriptModule, "save", _saving),
    (torch_api.ScriptModule, "save_to_buffer", _saving),
    *((kind, name, _running) for kind, name in torch_api.native_calls()),
    *((owner, name, _tracing) for owner, name in torch_api.tracer_calls()),
    *((kind, name, _printing) for kind, name in torch_api.graph_prints()),
    (threading.Thread, "start", _starting),
    (ThreadPoolExecutor, "submit", _submitting),
]
# Where each wrapper has been put, so that a look at all of them takes 3 us.
_wrappers: dict[tuple[Any, str], tuple[Mapping[str, Any], Any]] = {}


def _hook_methods() -> None:
    """Wrap the methods that are not, or no longer, wrapped.

    They stay wrapped after the scope: every change of a class makes the interpreter forget what it
    has learnt about code that uses it, which doubled the time of a scope of ten small layers.
    """
    for owner, name in torch_api.compiler_calls():  # which torch loads when it is first used
        if _METHODS[-1][0] is not owner:
            _METHODS.append((owner, name, _compiling))
    if len(_wrappers) == len(_METHODS):
        for (_, name), (there, wrapper) in _wrappers.items():
            if there.get(name) is not wrapper:
                break
        else:
            return
    for owner, name, wrap in _METHODS:
        there, wrapper = _wrappers.get((owner, name), ({}, None))
        if wrapper is None or there.get(name) is not wrapper:
            _hook(owner, name, wrap)


def _hook(owner: Any, name: str, wrap: _Wrap) -> None:
    original = getattr(owner, name)
    wrapper = wrap(original)
    setattr(owner, name, wrapper)
    _wrappers[owner, name] = vars(owner), wrapper
    if isinstance(owner, ModuleType):  # others have imported it
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is original:
                setattr(module, name, wrapper)


_hook(nn.Module, "to_empty", _emptying)


# ---- scopes --------------------------------------------------------------------------------------


def begin_scope(owner: object) -> None:
    """Let recorders be told what happens, in all threads."""
    install.begin_scope(owner)
    _hook_methods()


end_scope = install.end_scope

_lock = threading.RLock()
_registering: set[object] = set()  # recorders that want to know about modules
_REGISTER = (
    nn_module.register_module_parameter_registration_hook,
    nn_module.register_module_buffer_registration_hook,
    nn_module.register_module_module_registration_hook,
)
_handles: list[Any] = []  # of these hooks in torch's modules, while there are any


def begin_recording(owner: object) -> None:
    """Put all of fastinit into torch.nn.init, and tell recorders what modules get."""
    _hook_methods()
    with _lock:
        _registering.add(owner)
        for register in _REGISTER[len(_handles) :]:
            _handles.append(register(_registered))
    install.begin_recording(owner)


def is_recording(owner: object) -> bool:
    return owner in _registering


def end_recording(owner: object) -> None:
    """End what `begin_recording` began, or an interruption left of it."""
    install.end_recording(owner)
    with _lock:
        while _registering == {owner} and _handles:
            _handles[-1].remove()
            del _handles[-1]
        _registering.discard(owner)


@contextmanager
def hooked() -> Iterator[None]:
    """Do all of this for the length of a with statement."""
    owner = object()
    try:
        try:
            begin_scope(owner)
            begin_recording(owner)
            yield
        finally:
            _end(owner)
    finally:
        _end(owner)  # again: Ctrl-C may have come just before


def _end(owner: object) -> None:
    end_recording(owner)
    end_scope(owner)
