# SPDX-License-Identifier: BSD-3-Clause
"""fastinit in place of torch.nn.init, for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastinit.capture import hooks


def install() -> None:
    """Put fastinit's functions wherever torch.nn.init's are bound now, and into torch.nn.init.

    Looks at the module-level names of all modules loaded so far, and the values of module-level
    dictionaries: a library's `from torch.nn.init import kaiming_normal_` is found. Modules loaded
    later import fastinit's functions from torch.nn.init. Default arguments, attributes of classes
    and partial objects keep torch's functions, which give the same numbers (`trunc_normal_` is fast
    for them, too). May be called several times; `uninstall` then as often.
    """
    hooks.install()


def uninstall() -> None:
    """Undo `install`.

    Raises:
        RuntimeError: not installed.
    """
    hooks.uninstall()


@contextmanager
def installed() -> Iterator[None]:
    """`install` for the length of a with block, or of a function it decorates."""
    install()
    try:
        yield
    finally:
        uninstall()
