# SPDX-License-Identifier: BSD-3-Clause
"""What torch's operators do to memory, as far as other modules treat them by name."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastinit.core import geometry, kernels, laws, source, torch_api
from fastinit.core.laws import Law

_aten = torch.ops.aten

# The law of an operator from its arguments and keywords; None: it is no law for the kernels.
LawOf = Callable[[Any, dict[str, Any]], Law | None]


def _uniform(args: Any, kwargs: dict[str, Any]) -> Law:
    a = args[1] if len(args) > 1 else kwargs.get("from", 0.0)
    b = args[2] if len(args) > 2 else kwargs.get("to", 1.0)
    return laws.uniform(a, b)


def _normal(args: Any, kwargs: dict[str, Any]) -> Law:
    mean = args[1] if len(args) > 1 else kwargs.get("mean", 0.0)
    std = args[2] if len(args) > 2 else kwargs.get("std", 1.0)
    return laws.normal(mean, std)


def _value(args: Any, kwargs: dict[str, Any]) -> Law | None:
    """Return the law of fill_, full_like or new_full: the value comes last. A tensor is read."""
    value = args[-1]
    if isinstance(value, Tensor):
        if type(value) is not Tensor or not value.is_cpu or value.dim() != 0 or value.is_complex():
            return None
        value = value.item()
    return laws.constant(value)


def _full(args: Any, kwargs: dict[str, Any]) -> Law | None:
    """Return the law of full; without a dtype only for a float, as full takes its value's dtype."""
    given = kwargs.get("dtype") is not None or type(args[1]) is float
    return laws.constant(args[1]) if given else None


def _always(law: Law) -> LawOf:
    return lambda args, kwargs: law


_zero, _one = _always(laws.constant(0.0)), _always(laws.constant(1.0))
_rand, _randn = _always(laws.uniform(0.0, 1.0)), _always(laws.normal(0.0, 1.0))

FILLS: dict[Any, LawOf] = {
    _aten.uniform_.default: _uniform,
    _aten.normal_.default: _normal,
    _aten.fill_.Scalar: _value,
    _aten.fill_.Tensor: _value,
    _aten.zero_.default: _zero,
}


def drawn_law(func: Any, args: Any, kwargs: dict[str, Any]) -> Law | None:
    """Return the law of an operator that draws from a default generator; None for others."""
    generator = kwargs.get("generator")
    if func not in _RANDOM or not (generator is None or source.is_default(generator)):
        return None
    return _RANDOM[func](args, kwargs)


_RANDOM: dict[Any, LawOf] = {
    _aten.uniform_.default: _uniform,
    _aten.normal_.default: _normal,
    _aten.rand.default: _rand,
    _aten.rand_like.default: _rand,
    _aten.randn.default: _randn,
    _aten.randn_like.default: _randn,
}


def parameters_of(func: Any, args: Any) -> tuple[str, float, float]:
    """Return what one of FILLS or FACTORIES says it writes: name and two numbers."""
    name = func._schema.name[6:].removeprefix("new_").removesuffix("_like").rstrip("_")
    numbers = [float(x) if type(x) in (int, float) else math.nan for x in args[1:3]]
    known = {"zero": 0.0, "zeros": 0.0, "ones": 1.0}
    if name in known:
        return "constant", known[name], 0.0
    if name in ("fill", "full"):
        return "constant", numbers[-1] if numbers else math.nan, 0.0
    if name in ("rand", "randn"):
        return {"rand": "uniform", "randn": "normal"}[name], 0.0, 1.0
    return name, *(*numbers, *(0.0, 1.0)[len(numbers) :])


@functools.cache
def writes(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is not None and schema.is_mutable


@functools.cache
def writes_lists(func: Any) -> bool:
    """Return whether an operator counts the versions of lists, but not below a mode."""
    return writes(func) and str(func._schema.name).startswith("aten::_foreach_")


def comes_from_a_mode() -> bool:
    """Return whether the operator that is done now has passed another mode."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        is_ours = frame.f_globals.get("__name__", "").startswith("fastinit.")
        if frame.f_code.co_name == "__torch_dispatch__" and not is_ours:
            of = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(of, torch_api.TorchDispatchMode):  # or else a class of tensors
                return True
        frame = frame.f_back
    return False


def written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Return the tensors that an operator writes."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


@functools.cache
def makes_new(func: Any) -> bool:
    """Return whether an operator's result is in memory of its own."""
    schema = getattr(func, "_schema", None)
    if schema is None or schema.is_mutable or func.namespace != "aten" or is_view(func):
        return False
    returns = schema.returns
    lifts = schema.name.startswith(("aten::lift", "aten::_to_cpu", "aten::contiguous"))
    return len(returns) == 1 and returns[0].alias_info is None and not lifts


@functools.cache
def is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


_empty, _like, _new = _aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default
EMPTY = (
    *(_empty, _like, _new, _aten.empty_strided.default, _aten.new_empty_strided.default),
    _aten.empty_permuted.default,
)
# Views of all of a tensor, by which nobody asks for a single element.
SAME = (_aten.detach.default, _aten.alias.default, _aten.as_strided.default, _aten.view.default)

# One of EMPTY, how many first arguments it has in common with the factory, and the law behind it.
Factory = tuple[Any, int, LawOf]
FACTORIES: dict[Any, Factory] = {
    _aten.zeros.default: (_empty, 1, _zero),
    _aten.ones.default: (_empty, 1, _one),
    _aten.full.default: (_empty, 1, _full),
    _aten.rand.default: (_empty, 1, _rand),
    _aten.randn.default: (_empty, 1, _randn),
    _aten.zeros_like.default: (_like, 1, _zero),
    _aten.ones_like.default: (_like, 1, _one),
    _aten.full_like.default: (_like, 1, _value),
    _aten.rand_like.default: (_like, 1, _rand),
    _aten.randn_like.default: (_like, 1, _randn),
    _aten.new_zeros.default: (_new, 2, _zero),
    _aten.new_ones.default: (_new, 2, _one),
    _aten.new_full.default: (_new, 2, _value),
}

# In-place operators whose result does not depend on what was there.
OVERWRITING = frozenset(
    f"aten::{name}_"
    for name in (
        *("uniform", "normal", "fill", "zero", "copy", "random", "bernoulli", "exponential"),
        *("log_normal", "cauchy", "geometric", "_foreach_copy", "_foreach_zero"),
    )
)

# Pointwise operators that take numbers besides a tensor: in place, and the same out of place.
_POINTWISE = (
    *("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "mul.Tensor", "mul.Scalar"),
    *("div.Tensor", "div.Scalar", "div.Tensor_mode", "pow.Scalar", "fmod.Scalar"),
    *("remainder.Scalar", "clamp.default", "clamp_min.default", "clamp_max.default"),
    *("leaky_relu.default", "elu.default", "threshold.default", "logit.default"),
    *(
        f"{name}.default"
        for name in (
            *("neg", "abs", "sign", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p"),
            *("sqrt", "rsqrt", "square", "reciprocal", "erf", "erfc", "erfinv", "sin", "cos"),
            *("tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh"),
            *("sigmoid", "silu", "relu", "floor", "ceil", "round", "trunc", "frac"),
        )
    ),
)


def _overload(name: str, suffix: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_aten, packet + suffix, None), overload, None)


IN_PLACE = tuple(op for op in (_overload(name, "_") for name in _POINTWISE) if op is not None)
OUT_OF_PLACE = {  # and the operator in place that does the same to a copy
    out: in_place
    for out, in_place in ((_overload(n, ""), _overload(n, "_")) for n in _POINTWISE)
    if out is not None and in_place is not None
}
CONVERT = torch_api.to_copy

REPLACE_MEMORY = tuple(
    getattr(packet, overload)
    for packet in (_aten.set_, _aten.resize_, _aten.resize_as_)
    for overload in packet.overloads()  # type: ignore[no-untyped-call]
)


def makes_native(
    args: Any,
    kwargs: dict[str, Any],
    least: int,
    dtypes: Collection[torch.dtype] = geometry.DTYPES,
) -> bool:
    """Whether a factory makes a tensor that can be filled natively and is worth it.

    `least`: elements on the CPU that are.
    """
    like = args[0] if isinstance(args[0], Tensor) else None
    if like is not None and type(like) not in geometry.PLAIN:
        return False
    size = args[0] if like is None else args[1] if len(args) > 1 else like.shape
    if isinstance(size, (list, tuple)) and any(type(n) is not int for n in size):
        return False  # symbolic
    items = (
        math.prod(size)
        if isinstance(size, (list, tuple))
        else like.numel()
        if like is not None
        else 0
    )
    device, layout = kwargs.get("device"), kwargs.get("layout")
    if device is None:
        device = "cpu" if like is None else like.device
    where = torch.device(device).type
    dtype = kwargs.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
    return (
        0 < items >= (least if where == "cpu" else 1)
        and dtype in dtypes
        and (where == "cpu" or (where == "cuda" and kernels.can_use_cuda()))
        and layout in (None, torch.strided)
        and (like is None or like.layout is torch.strided)
        and not kwargs.get("pin_memory")
    )


_views: dict[Any, bool] = {}
_UNSAID = {f"aten::unsafe_{name}" for name in ("split", "split_with_sizes", "chunk")}


def is_view(func: Any) -> bool:
    """Return whether an operator only makes or turns views, and never reads or writes memory.

    Operators like contiguous and reshape, which copy if they have to, reach a mode undivided in
    inference mode; their schemas promise an alias.
    """
    known = _views.get(func)
    if known is None:
        known = False
        if isinstance(func, torch_api.OpOverload) and func.namespace == "aten":
            pure = func.is_view and not func._schema.is_mutable
            pure = pure and not func.has_kernel_for_dispatch_key(torch_api.composite)
            pure = pure or func._schema.name in _UNSAID
            known = pure or torch.Tag.inplace_view in func.tags
        _views[func] = known
    return known


def is_inplace(func: Any) -> bool:
    """Return whether an operator writes its first argument and returns that.

    By its schema, as torch 2.11 has no torch.Tag.inplace.
    """
    schema = getattr(func, "_schema", None)
    return (
        schema is not None
        and schema.name.endswith("_")
        and (not schema.name.endswith("__") or schema.name.startswith("aten::__i"))
        and len(schema.arguments) > 0
        and schema.arguments[0].alias_info is not None
        and schema.arguments[0].alias_info.is_write
    )


def is_fake(t: Any) -> bool:
    """Return whether it is torch's FakeTensor, which has no memory; without loading its module."""
    kind = type(t)
    return kind.__name__ == "FakeTensor" and kind.__module__.startswith("torch.")


def converts(t: Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether _to_copy only changes the dtype, between those that the kernels write.

    Of complex numbers to real ones there is a warning.
    """
    dtype = kwargs.get("dtype")
    device, layout = kwargs.get("device"), kwargs.get("memory_format")
    return (
        dtype in geometry.KEYED
        and dtype is not t.dtype
        and t.dtype in (geometry.KEYED if dtype.is_complex else geometry.DTYPES)
        and (device is None or device == t.device)
        and kwargs.get("layout") in (None, torch.strided)
        and layout in (None, torch.preserve_format, torch.contiguous_format)
        and not kwargs.get("pin_memory")
    )


def copies_plainly(to: Tensor, by: Any) -> bool:
    """Return whether copy_ has no chance of an error or a warning.

    What was there before then cannot be seen again.
    """
    return (
        geometry.is_plain(by)
        and by.shape == to.shape
        and by.device == to.device
        and geometry.is_here(by)
        and to.is_complex() == by.is_complex()
        and not any(x.is_quantized or x.is_neg() or x.is_conj() for x in (to, by))
    )


def leaves(x: object) -> Iterator[object]:
    """Yield what is in nested lists, tuples and dicts."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, (list, tuple)):
        for y in x:
            if isinstance(y, (list, tuple, dict)):
                yield from leaves(y)
            else:
                yield y
    else:
        yield x
