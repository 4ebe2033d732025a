# SPDX-License-Identifier: BSD-3-Clause
"""The switch of the one function that differs: orthogonal_ by torch, or natively."""

from __future__ import annotations

import os

from fastinit.core import recording

_WAYS = ("native", "torch")


def set_orthogonal(way: str) -> str:
    """Choose who computes orthogonal matrices in this process; return the choice before.

    Args:
        way: "torch" leaves `orthogonal_` to torch, whose bits it then has, at torch's speed, and
            its refusal of bfloat16 and float16; "native" (the default, unless the environment
            says FASTINIT_ORTHOGONAL=torch) computes torch's matrix up to rounding

    A scope has a choice of its own, which goes before this one. A Plan keeps what was chosen when a
    call was recorded. With a `Key` or a seed the numbers are not torch's at all, and the choice
    means nothing.

    Raises:
        ValueError: neither "torch" nor "native".

        >>> import fastinit
        >>> before = fastinit.set_orthogonal("torch")
        >>> fastinit.set_orthogonal(before)
        'torch'
    """
    global _process
    before, _process = _process, checked(way)
    return before


def checked(way: str, what: str = "orthogonal_") -> str:
    """Return a choice that is one; raise ValueError otherwise."""
    if way not in _WAYS:
        raise ValueError(f'{what} can be left to "torch" or be "native", not {way!r}')
    return way


def leaves_orthogonal_to_torch() -> bool:
    """Return whether orthogonal matrices with torch's words are to be torch's own here."""
    recorder = recording.this_thread.recorder
    scope = None if recorder is None else recorder.orthogonal
    return (_process if scope is None else scope) == "torch"


_process = checked(os.environ.get("FASTINIT_ORTHOGONAL") or "native", "FASTINIT_ORTHOGONAL:")
