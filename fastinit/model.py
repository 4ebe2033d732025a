# SPDX-License-Identifier: BSD-3-Clause
"""Whole models in one pass: init_model_ and materialize_."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastinit.capture.capture import Capture
from fastinit.capture.names import named_tensors
from fastinit.capture.operators import OVERWRITING, leaves
from fastinit.capture.report import Report
from fastinit.core import geometry, recording, shard
from fastinit.core.mode import Mode
from fastinit.fused import adopting

Fn = Callable[[nn.Module], object]


def init_model_(
    model: nn.Module,
    fn: Fn | None = None,
    seed: int | None = None,
    *,
    prefix: str = "",
    orthogonal: str | None = None,
) -> Report:
    """Initialise all of a model's parameters in one pass; same numbers as one by one.

    Args:
        model: any module
        fn: called with every submodule, children first and the model last, as by `model.apply`;
            by default each module that has `reset_parameters` (or, as some of torch's own,
            `_reset_parameters`) is asked to reset its own
        seed: take the numbers of the keyed stream, by the names of the parameters; see `Key`
        prefix: put before these names, for a model that is a part of another
        orthogonal: "torch" or "native": who writes orthogonal_, as for `fused`

    Returns:
        What was written by which function, and what was not.

    The same as `with fastinit.fused(): model.apply(fn)`, except that fills of the model's tensors
    may wait although they are older than the block: memory that somebody knows from before (a numpy
    array over a parameter, another thread) must not be read while this runs.
    """
    if is_recording_a_plan():
        raise RuntimeError("init_model_ cannot be part of a Plan that is being recorded")
    with adopting(tensors_of(model), model, seed, prefix, orthogonal) as report:
        apply(model, fn)
    return report


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers, tied ones repeatedly, in half the time that torch takes."""
    for m in model.modules():
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is not None:
                yield t


def is_recording_a_plan() -> bool:
    return not isinstance(recording.this_thread.recorder, Capture | None)


def apply(model: nn.Module, fn: Fn | None) -> None:
    model.apply(cast("Callable[[nn.Module], None]", fn or reset))


def reset(module: nn.Module) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            reset()
            break


def materialize_(
    model: nn.Module,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    fn: Fn | None = None,
    seed: int | None = None,
    *,
    prefix: str = "",
    orthogonal: str | None = None,
) -> Report:
    """Give a model's meta tensors memory, and initialise it in one pass.

    Args:
        model: any module; parameters and buffers that are not on the meta device stay as they are
        device: where the memory is taken (default: torch's default device; the CPU if that is meta)
        dtype: of the floating-point tensors (default: as they are)
        fn: as for `init_model_`; by default only modules all of whose tensors were on the meta
            device are reset
        seed: take the numbers of the keyed stream, by the names of the parameters; see `Key`
        prefix: put before these names, for a model that is a part of another
        orthogonal: "torch" or "native": who writes orthogonal_, as for `fused`

    Returns:
        What was written by which function, and what was not. Tied tensors stay tied; parameters are
        new objects, as after `to_empty`.

    Parameters may be DTensors (after `fully_shard` or tensor parallelism). With a seed each process
    fills only its own elements, without communication, and they are those of the whole model. With
    torch's generators DTensor does what it does.

    Warns:
        UserWarning: `fn` did not write all of a tensor, for example a buffer that only a
            constructor computes. Such tensors are left on the meta device and named.
    """
    if is_recording_a_plan():
        raise RuntimeError("materialize_ cannot be part of a Plan that is being recorded")
    with adopting((), model, seed, prefix, orthogonal) as report:
        report.is_about_new = True
        slots = [s for s in named_tensors(model, prefix) if s[3].is_meta]
        memory: dict[tuple[object, ...], Tensor] = {}
        new: dict[int, Tensor] = {}  # tied tensors are one object
        for _, m, name, old in slots:
            if id(old) not in new:
                new[id(old)] = _materialized(old, device, dtype, memory)
            setattr(m, name, new[id(old)])
        memory.clear()
        missing = []
        watch = _Watch(new.values())
        try:
            with _watching(watch):
                apply(model, fn or functools.partial(_reset_new, {id(t) for t in new.values()}))
        finally:
            for path, m, name, old in slots:
                if getattr(m, name, None) is new[id(old)] and not watch.is_written(new[id(old)]):
                    setattr(m, name, old)
                    missing.append(path)
    report.unwritten.extend(dict.fromkeys(missing))
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" * (len(missing) > 10))
        warnings.warn(
            f"{len(missing)} tensors were not initialised completely and stay on the meta device: "
            f"{shown}. Pass a `fn` that initialises them, or set them yourself.",
            stacklevel=2,
        )
    return report


def _reset_new(new: set[int], module: nn.Module) -> None:
    """Reset a module, unless that would overwrite what was there before."""
    if all(id(t) in new for t in (*module.parameters(), *module.buffers())):
        reset(module)


@contextmanager
def _watching(watch: _Watch) -> Iterator[None]:
    """Put a mode on top of the scope's, which still takes fills that come without operators."""
    capture = recording.this_thread.recorder
    if not isinstance(capture, Capture):
        with watch:
            yield
        return
    with capture.watched(watch.note), watch:
        yield


_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _materialized(
    old: Tensor,
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
    memory: dict[tuple[object, ...], Tensor],
) -> Tensor:
    """Return a tensor like `old` with memory, which tensors that shared `old`'s storage share."""
    kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
    if shard.is_distributed(old):
        return _distributed(old, device, kind)
    key = (geometry.storage_id(old), old.dtype)
    if key not in memory:
        default = torch.get_default_device()
        where = ("cpu" if default.type == "meta" else default) if device is None else device
        items = geometry.storage_of(old).nbytes() // old.element_size()
        memory[key] = torch.empty(items, dtype=kind, device=where)
    new = memory[key].as_strided(old.shape, old.stride(), old.storage_offset())
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, old.requires_grad)
    return new.detach().requires_grad_(old.requires_grad)


def _distributed(old: Any, device: torch.device | str | int | None, dtype: torch.dtype) -> Tensor:
    """Return a DTensor like `old` with memory for this process's elements."""
    where = old.device_mesh.device_type if device is None else device
    with torch.no_grad():
        new = torch.empty_like(old, dtype=dtype, device=where)
    capture = recording.this_thread.recorder
    if isinstance(capture, Capture):
        capture.adopt(shard.local(new))
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


class _Watch(Mode):
    """Sees which elements of some tensors are written at all."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        here = map(shard.local, tensors)
        self._missing = {geometry.storage_id(t) for t in here if t.numel() != 0}
        self._partly: dict[int, Tensor] = {}  # storage -> -1 in each byte that is written

    def is_written(self, t: Tensor) -> bool:
        t = shard.local(t)
        key = geometry.storage_id(t)
        if key not in self._missing:
            return True
        return key in self._partly and bool((self._marks(t) == _MARK[t.element_size()]).all())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            out = [kwargs.get(x.name) for x in schema.arguments if x.is_out]
            if schema.name in OVERWRITING:
                out.append(args[0])
            for t in leaves(out):
                if isinstance(t, Tensor):
                    self.note(t)
        return result

    def note(self, t: Tensor) -> None:
        """Note that all elements of a tensor have been written."""
        t = shard.local(t)
        if not geometry.is_plain(t):
            return
        key = geometry.storage_id(t)
        if key in self._missing:
            if t.numel() * t.element_size() == geometry.storage_of(t).nbytes():
                self._missing.discard(key)  # storage_of may have told us under a function mode
            else:
                self._marks(t).fill_(_MARK[t.element_size()])

    def _marks(self, t: Tensor) -> Tensor:
        """Return the view of a storage's marks that stands for a tensor's elements."""
        marks = self._partly.get(geometry.storage_id(t))
        if marks is None:
            marks = torch.zeros(geometry.storage_of(t).nbytes(), dtype=torch.uint8, device="cpu")
            self._partly[geometry.storage_id(t)] = marks
        offset, sizes, strides = geometry.in_reals(t)
        marks = marks.view(_BYTES[t.element_size() // (2 if t.dtype.is_complex else 1)])
        return marks.as_strided(sizes, strides, offset)


_MARK = {1: 255, 2: -1, 4: -1, 8: -1, 16: -1}
