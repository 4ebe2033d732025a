# SPDX-License-Identifier: BSD-3-Clause
"""fastinit's functions in place of torch.nn.init's: for the whole process, or while a scope lasts.

What stands there are copies of fastinit's functions that say they are torch's own.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from fastinit import init
from fastinit.dispatch import ORIGINALS


def install() -> None:
    """Put fastinit's functions wherever torch.nn.init's are bound now, and into torch.nn.init.

    Looks at the module-level names of all modules loaded so far, and the values of module-level
    dictionaries: a library's `from torch.nn.init import kaiming_normal_` is found. Modules loaded
    later import fastinit's functions from torch.nn.init. Default arguments, attributes of classes
    and partial objects keep torch's functions, which give the same numbers (`trunc_normal_` is fast
    for them, too). May be called several times; `uninstall` then as often.
    """
    global _installed
    with _lock:
        _installed += 1
        if _installed == 1:
            _replace(list(sys.modules.values()), _OURS)


def uninstall() -> None:
    """Undo `install`.

    Raises:
        RuntimeError: not installed.
    """
    global _installed
    with _lock:
        if _installed == 0:
            raise RuntimeError("fastinit is not installed")
        _installed -= 1
        if _installed == 0:
            _replace(list(sys.modules.values()), _THEIRS)
            if _scopes:
                _put_into_torch(_PLACES if _recordings else _RARE)


@contextmanager
def installed() -> Iterator[None]:
    """Install for the length of a with statement, or of a function that this decorates."""
    install()
    try:
        yield
    finally:
        uninstall()


def begin_scope(owner: object) -> None:
    """Let torch's own modules call the functions that do more than one operator, in all threads.

    Until `begin_recording` the others, by far more often called, stay torch's: what they draw is
    seen by hooks of the tensors' methods. This and the next three may be called again, as after an
    interruption.
    """
    global _modules_before
    with _lock:
        if not _scopes:
            _modules_before = len(sys.modules)
        _scopes.add(owner)  # first: what ends it undoes half of the rest, too
        _put_into_torch(_RARE)


def end_scope(owner: object) -> None:
    """End what `begin_scope` began."""
    with _lock:
        if _scopes == {owner} and _installed == 0:
            _take_out_of_torch(_RARE)
        _scopes.discard(owner)  # last, for the same reason


def begin_recording(owner: object) -> None:
    """Let torch's own modules call all of fastinit's functions."""
    with _lock:
        _recordings.add(owner)
        _put_into_torch(_PLACES)


def end_recording(owner: object) -> None:
    """End what `begin_recording` began."""
    with _lock:
        if _recordings == {owner} and _installed == 0:
            _take_out_of_torch(_OTHERS)
        _recordings.discard(owner)


# ---- the functions -------------------------------------------------------------------------------


def _stand_in(function: Any) -> Any:
    """Return a copy of a function that says it is of torch.nn.init: function modes go by that."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    functools.update_wrapper(copy, function)
    copy.__kwdefaults__ = function.__kwdefaults__
    del copy.__wrapped__  # type: ignore[attr-defined]
    copy.__module__ = "torch.nn.init"
    return copy


# torch looks up _no_grad_trunc_normal_ at each call of trunc_normal_.
_ORIGINALS = {name: ORIGINALS[name] for name in (*init.__all__, "_no_grad_trunc_normal_")}
_STAND_INS = {name: _stand_in(getattr(init, name)) for name in _ORIGINALS}
# What takes the place of a function, by the id of that function.
_OURS = {id(_ORIGINALS[name]): _STAND_INS[name] for name in _ORIGINALS}
_THEIRS = {id(_STAND_INS[name]): _ORIGINALS[name] for name in _ORIGINALS}
# Where torch itself has them: a module's names, one of these, torch's function, ours.
_Place = tuple[dict[str, Any], str, Any, Any]
_PLACES: list[_Place] = [
    (vars(module), name, value, _OURS[id(value)])
    for path, module in list(sys.modules.items())
    if path == "torch.nn.init" or path.startswith("torch.nn.modules.")
    for name, value in vars(module).items()
    if id(value) in _OURS
]


_MANY = ("trunc_normal_", "_no_grad_trunc_normal_", "orthogonal_", "sparse_", "dirac_", "eye_")
_RARE = [place for place in _PLACES if place[1] in _MANY]
_OTHERS = [place for place in _PLACES if place[1] not in _MANY]


def _replace(modules: Iterable[object], by: dict[int, Any]) -> None:
    """Replace functions that are names of modules, or values of their dictionaries."""
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


# ---- what the process has, all of it read and written under the lock -----------------------------

_lock = threading.RLock()
_installed = 0  # calls of `install` that `uninstall` has not undone
_scopes: set[object] = set()  # that last
_recordings: set[object] = set()  # likewise
_modules_before = 0  # modules that were loaded when the first of these began


def _renew_lock() -> None:  # in a forked child, where nobody is left to release it
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def _put_into_torch(places: list[_Place]) -> None:
    for names, name, theirs, ours in places:
        if names.get(name) is theirs:
            names[name] = ours


def _take_out_of_torch(places: list[_Place]) -> None:
    for names, name, theirs, ours in places:
        if names.get(name) is ours:
            names[name] = theirs
    if len(sys.modules) > _modules_before:  # these have imported ours
        _replace(list(sys.modules.values())[_modules_before:], _THEIRS)
