# SPDX-License-Identifier: BSD-3-Clause
"""fastinit in place of torch.nn.init, for the whole process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from fastinit import hooks, init

_lock = threading.RLock()
_times = 0
_patches = hooks.Patches()


def install() -> None:
    """Put fastinit's functions wherever torch.nn.init's are bound now, and into torch.nn.init.

    Looks at the module-level names of all modules loaded so far, and the values of module-level
    dictionaries: a library's `from torch.nn.init import kaiming_normal_` is found. Modules loaded
    later import fastinit's functions from torch.nn.init. Default arguments, attributes of classes
    and partial objects keep torch's functions, which give the same numbers (`trunc_normal_` is fast
    for them, too). May be called several times; `uninstall` then as often.
    """
    global _times
    with _lock:
        _times += 1
        if _times > 1:
            return
        replacements = {id(getattr(init._torch, n)): getattr(init, n) for n in init.__all__}
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType) and not module.__name__.startswith("fastinit"):
                _replace(module, replacements)
        _patches.set(torch.nn.init, "_no_grad_trunc_normal_", init._no_grad_trunc_normal_)


def _replace(module: ModuleType, replacements: dict[int, Any]) -> None:
    for name, value in list(vars(module).items()):
        if id(value) in replacements:
            _patches.set(module, name, replacements[id(value)])
        elif type(value) is dict and not name.startswith("__"):
            for key, item in list(value.items()):
                if id(item) in replacements:
                    _patches.set_item(value, key, replacements[id(item)])


def uninstall() -> None:
    """Undo `install`. Modules loaded in between keep fastinit's functions.

    Raises:
        RuntimeError: not installed.
    """
    global _times
    with _lock:
        if _times == 0:
            raise RuntimeError("fastinit is not installed")
        _times -= 1
        if _times == 0:
            _patches.undo()


@contextmanager
def installed() -> Iterator[None]:
    """`install` for the length of a with block, or of a function it decorates."""
    install()
    try:
        yield
    finally:
        uninstall()
