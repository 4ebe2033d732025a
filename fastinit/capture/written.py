# SPDX-License-Identifier: BSD-3-Clause
"""What is remembered of a fill that was done, and whose call it was."""

from __future__ import annotations

import os
import sys
from types import FrameType, FunctionType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastinit.core import geometry
from fastinit.core.fill import Caller, Drawn

_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
_FUNCTIONS_OF = frozenset((nn.init.__file__, os.path.join(_HERE, "init.py")))
_DISPATCH = os.path.join(_HERE, "dispatch.py")  # between a function of ours and one it calls
_CALLS_WITHIN = _FUNCTIONS_OF | {_DISPATCH}
_SHOWN = ("a", "b", "mean", "std", "val", "gain", "mode", "nonlinearity", "sparsity", "groups")


_FUNCTIONS = {name: f for name, f in vars(nn.init).items() if isinstance(f, FunctionType)}


class Written(NamedTuple):
    """A fill that was done, without what it needed for that."""

    op: str
    a: float
    b: float
    items: int
    dtype: torch.dtype
    extent: tuple[int, int]  # bytes of the storage: the first and the one behind the last
    caller: Caller | None
    bounds: tuple[float, float] | None = None  # of trunc_normal_
    scale: float = 0.0  # orthogonal_: gain
    key: str = ""  # of the keyed stream: a name, or "#" and a number

    @classmethod
    def of(cls, done: Drawn) -> Written:
        """Return what is remembered of a fill with torch's numbers."""
        fill = done.fill
        how = (fill.op, fill.a, fill.b, done.items, done.dtype, done.extent, done.caller)
        return cls(*how, fill.bounds, fill.scale)

    @classmethod
    def small(cls, t: Tensor, op: str, a: float, b: float, caller: Caller | None) -> Written:
        """Return what is remembered of an operator that is not worth a fill."""
        return cls(op, a, b, t.numel(), t.dtype, geometry.in_storage(t), caller)


def caller() -> Caller | None:
    """Return the function of torch.nn.init that asks for a fill, with its plain arguments.

    It is the outermost on the stack of those that call one another in torch's file or in ours:
    kaiming_normal_, not the normal_ that it calls. Operators say nothing of it, so its frame is
    looked for; the functions could not hand it over, since most of these calls are torch's own
    function's, called by a stand-in or by nobody of ours. Names without an underscore in front are
    public. Tensors are left out: they would live as long as the report.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename not in _FUNCTIONS_OF:
        if not frame.f_code.co_filename.startswith(_HERE):
            return None
        frame = frame.f_back
    found = None
    while frame is not None and (name := frame.f_code.co_filename) in _CALLS_WITHIN:
        if name != _DISPATCH and frame.f_code.co_name[0] != "_":
            found = frame
        frame = frame.f_back
    if found is None:
        return None
    code, values = found.f_code, found.f_locals
    names = [n for n in code.co_varnames[: code.co_argcount] if n in _SHOWN]
    plain = [(n, values[n]) for n in names if type(values[n]) in (int, float, str, bool)]
    return code.co_name, tuple(plain)


def named(function: str, args: tuple[object, ...]) -> Caller:
    """Return a call of a function of torch.nn.init, with its plain arguments by their names."""
    code = _FUNCTIONS[function].__code__
    names = zip(code.co_varnames[1 : code.co_argcount], args)
    plain = [(n, x) for n, x in names if n in _SHOWN and type(x) in (int, float, str, bool)]
    return function, tuple(plain)


def line() -> str:
    """Return file and line of the innermost frame that belongs neither to torch nor to fastinit."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_HERE, _TORCH, "<")) and os.sep + "contextlib.py" not in name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"
