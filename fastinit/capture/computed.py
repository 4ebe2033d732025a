# SPDX-License-Identifier: BSD-3-Clause
"""What operators compute of tensors that wait for their names, done when these are known.

A norm of a weight (weight_norm), a forward pass that only makes shapes known (lazy modules), a
copy in another layout would else need the weight's numbers before it has its name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastinit.capture import operators
from fastinit.capture.operators import leaves
from fastinit.capture.pending import Memory, Stage, fills_of, is_all, stages_of
from fastinit.capture.waiting import Argument, Cast, Computed, Identity, KeyedFill, Waiting, view
from fastinit.core import geometry, kernels, torch_api
from fastinit.core.geometry import is_plain, storage_id

_MOST_ITEMS = 1 << 16  # of a tensor that does not wait, and has to be kept as it is now
_MOST_STEPS = 256  # operators that one result may need

# Operators that cannot fail once it is known that their shapes fit, beside pointwise ones. Of isnan
# and the like the shape is known to Python code only, whose import takes two seconds.
_SAFE = frozenset(
    f"aten::{name}"
    for name in (
        *("norm", "linalg_vector_norm", "sum", "mean", "amax", "amin", "var", "std", "cumsum"),
        *(
            "mm",
            "bmm",
            "addmm",
            "mv",
            "dot",
            "vdot",
            "convolution",
            "_weight_norm_interface",
            "tril",
            "triu",
        ),
        *("cat", "stack", "clone", "_to_copy", "native_layer_norm", "_softmax", "_log_softmax"),
        *("flip", "roll", "repeat", "constant_pad_nd", "avg_pool2d", "_adaptive_avg_pool2d"),
        *("max_pool2d_with_indices", "gelu", "relu", "masked_fill", "where", "diag_embed"),
        *("linalg_qr", "geqrf", "linalg_householder_product"),
    )
)

# Operators whose results have the values of what they are given.
COPIES = (
    torch.ops.aten.clone.default,
    torch_api.to_copy,
    torch.ops.aten.copy_.default,
)

Find = Callable[[Tensor], Memory | None]


@functools.cache
def is_safe(func: Any) -> bool:
    """Return whether an operator is a function of its arguments that cannot fail later."""
    schema = getattr(func, "_schema", None)
    if schema is None or func.namespace != "aten" or operators.is_random(func):
        return False
    pointwise = torch.Tag.pointwise in func.tags and not schema.name.startswith("aten::is")
    return pointwise or schema.name in _SAFE or schema.name.removesuffix("_") in _SAFE


def results(func: Any, args: Any, kwargs: dict[str, Any], find: Find) -> list[Computed] | None:
    """Return what an operator's results are to be computed of; None if it has to run now.

    `find` returns the storage of a tensor in which something waits.
    """
    writes = operators.written(func, args, kwargs) if operators.writes(func) else []
    if len(writes) > 1 or not all(map(is_plain, writes)):
        return None
    kept: dict[int, Argument | Tensor] = {}
    inputs = {name: x for name, x in kwargs.items() if name != "out"}
    for x in leaves((args, inputs)):
        if isinstance(x, Tensor):
            now = _kept(x, find)
            if now is None:
                return None
            kept[id(x)] = now
    if writes and "out" not in kwargs and not isinstance(kept.get(id(writes[0])), Argument):
        return None
    waiting = [s for s in kept.values() if isinstance(s, Argument)]
    parts = dict.fromkeys(f for s in waiting for w in s.fills for f in fills_of(w))
    keyed = tuple(f for f in parts if isinstance(f, KeyedFill))
    below = frozenset(x for s in waiting for c in _computed(s.fills) for x in (id(c), *c.below))
    shapes = _shapes(func, args, kwargs) if len(below) < _MOST_STEPS else None
    if shapes is None:
        return None
    asked = _replaced(args, kept), _replaced(inputs, kept)
    if "out" in kwargs:
        asked[1]["out"] = None
    made: list[Computed] = []
    for which, x in enumerate(shapes):
        if x.numel() == 0 or x.is_complex() or (x.numel() == 1 and not _stays_inside()):
            return None  # torch.tensor([x]) reads a single element without an operator
        target = writes[0] if writes else x
        extent = (0, geometry.storage_of(target).nbytes())
        at = (int(target.storage_offset()), tuple(target.shape), target.stride())
        dtype, items = target.dtype, target.numel()
        made.append(Computed(func, *asked, which, dtype, at, extent, items, keyed, below))
    return made


def _kept(x: Tensor, find: Find) -> Argument | Tensor | None:
    """Return a tensor as it is now."""
    if not (is_plain(x) and geometry.is_here(x)) or x.is_complex() or x.is_neg() or x.is_nested:
        return None
    memory = find(x)
    if memory is None:
        if x.numel() > _MOST_ITEMS or x.is_meta:
            return None
        with kernels.undisturbed():
            return x.detach().clone()
    first = memory.fills[0]
    if not first.is_dense or first.extent != (0, memory.nbytes):
        return None
    at = (int(x.storage_offset()), tuple(x.shape), x.stride())
    return Argument((*memory.fills,), memory.nbytes, x.dtype, at, x.device)


def _computed(fills: Iterable[Waiting]) -> Iterator[Computed]:
    """Yield the results among fills, and those that are converted."""
    for fill in fills:
        if isinstance(fill, Computed):
            yield fill
        elif isinstance(fill, Cast):
            yield from _computed(fill.source)


def _shapes(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor] | None:
    """Return the results on the meta device; None if torch does not know them without values."""

    def like(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        made = metas.get(storage_id(x))
        if made is None:
            items = geometry.storage_of(x).nbytes() // x.element_size()
            made = metas[storage_id(x)] = torch.empty(items, dtype=x.dtype, device="meta")
        return made.as_strided(x.shape, x.stride(), x.storage_offset())

    if func is torch.ops.aten.linalg_vector_norm.default and not kwargs:  # as of isnan; see above
        dim, keeps = (*args[2:], *(None, False)[len(args[2:]) :])[:2]
        func, args = torch.ops.aten.sum.dim_IntList, (args[0], dim, keeps)
    metas: dict[int, Tensor] = {}
    where = next(x.device for x in leaves((args, kwargs)) if isinstance(x, Tensor))
    if kwargs.get("device") not in (None, where):
        return None
    on_meta = {"device": "meta"} if "device" in kwargs else {}
    with kernels.undisturbed(), torch.no_grad():
        try:
            out = func(*_mapped(args, like), **{**_mapped(kwargs, like), **on_meta})
        except Exception:  # torch says so when it runs
            return None
    found = list(leaves(out))
    fit = all(isinstance(x, Tensor) and x.layout is torch.strided for x in found)
    target = kwargs.get("out")
    if target is not None and not (len(found) == 1 and is_all(target)):
        return None
    return found if fit else None  # type: ignore[return-value]


def _mapped(x: Any, f: Callable[[Any], Any]) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)([_mapped(y, f) for y in x])
    if isinstance(x, dict):
        return {key: _mapped(y, f) for key, y in x.items()}
    return f(x)


def _replaced(x: Any, kept: dict[int, Argument | Tensor]) -> Any:
    return _mapped(x, lambda y: kept.get(id(y), y) if isinstance(y, Tensor) else y)


def _stays_inside() -> bool:
    """Return whether a function of torch's asks that keeps its result to itself."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(12):
        if frame is not None:
            if frame.f_code in torch_api.DISCREET:
                return True
            frame = frame.f_back
    return False


# ---- done ----------------------------------------------------------------------------------------


def run(piece: Stage, write: Callable[[Stage], None]) -> None:
    """Compute what is in a stage, in memory of its own, and put it where it belongs."""
    for computed, storage in piece:
        if isinstance(computed, Computed):
            with kernels.undisturbed(), torch.no_grad():
                _Run(write).put(computed, storage)


class _Run:
    """Computes one result, and once each of those that it needs."""

    def __init__(self, write: Callable[[Stage], None]) -> None:
        self._write = write
        self._arguments: dict[tuple[int, ...], torch.UntypedStorage] = {}  # by their fills' ids
        self._results: dict[int, Tensor] = {}

    def put(self, computed: Computed, storage: torch.UntypedStorage) -> None:
        """Write a result to all of a storage."""
        found = self._results.get(id(computed))
        if found is None:
            found = self._results[id(computed)] = self._result(computed)
        items = (storage.nbytes() // computed.dtype.itemsize,)
        if found.untyped_storage().nbytes() == storage.nbytes():  # whatever the layout
            by = view(geometry.storage_of(found), computed.dtype, (0, items, (1,)))
            view(storage, computed.dtype, (0, items, (1,))).copy_(by)
        else:
            view(storage, computed.dtype, computed.at).copy_(found)

    def _result(self, computed: Computed) -> Tensor:
        args, kwargs = _mapped(computed.args, self._real), _mapped(computed.kwargs, self._real)
        if operators.writes(computed.operator) and "out" not in kwargs:
            args = (args[0].untyped_storage().clone(), *args[1:])  # others may need what was there
            args = (view(args[0], computed.dtype, computed.at), *args[1:])
        elif "out" in kwargs:
            device = next(x.device for x in leaves(args) if isinstance(x, Tensor))
            strides = computed.at[1:]
            kwargs["out"] = torch.empty_strided(*strides, dtype=computed.dtype, device=device)
        out = computed.operator(*args, **kwargs)
        return out[computed.which] if isinstance(out, (list, tuple)) else out  # type: ignore[no-any-return]

    def _real(self, x: Any) -> Any:
        if not isinstance(x, Argument):
            return x
        key = (*map(id, x.fills),)
        if key not in self._arguments:
            wide = torch.empty(x.nbytes, dtype=torch.uint8, device=x.device)
            made = self._arguments[key] = geometry.storage_of(wide)
            for stage in stages_of([(made, x.fills)]):
                for fill, storage in stage:
                    if isinstance(fill, Computed):
                        self.put(fill, storage)
                    else:
                        self._write([(fill, storage)])
        return view(self._arguments[key], x.dtype, x.at)


def identities(computed: Waiting) -> list[Identity]:
    """Return whose numbers go into it, in the order in which it needs them."""
    fills = (f for f in fills_of(computed) if isinstance(f, KeyedFill))
    return [*dict.fromkeys(f.identity for f in fills if f.identity is not None)]


def is_copy(computed: Computed) -> bool:
    """Return whether it has the numbers of a fill, at the same places."""
    if computed.operator not in COPIES:
        return False
    (argument,) = computed.arguments()
    fill = argument.fills[0]
    return isinstance(fill, KeyedFill) and argument.at[1] == fill.box[1]
