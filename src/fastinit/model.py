# SPDX-License-Identifier: BSD-3-Clause
"""Many tensors in one pass: plans, and the initialisation of whole modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastinit import block, hooks, init, plan, probe
from fastinit.capture import FILLS, PLAIN, Capture, Mode, is_harmless, leaves


class Plan:
    """Fills that are recorded first and run together, in the order they were recorded.

    Has a method for every function of torch.nn.init that fills a tensor, with its signature:

        >>> import torch, fastinit
        >>> plan = fastinit.Plan()
        >>> w, b = torch.empty(256, 128), torch.empty(256)
        >>> _ = plan.kaiming_normal_(w, nonlinearity="relu")
        >>> _ = plan.zeros_(b)
        >>> len(plan)
        2
        >>> plan.run()

    `run` gives what the same calls one by one would have given, generators included, and may be
    called again: it then draws on from where the generators are. Errors are raised when the call is
    recorded if they show then, otherwise by `run`, where that call has its place. The tensors must
    keep their memory and shape while the plan is used; `run` raises RuntimeError otherwise.
    """

    modes = 0
    takes_small = True

    def __init__(self) -> None:
        self._steps: list[list[plan.Fill] | Callable[[], object]] = []  # one for each call

    def add(self, fills: list[plan.Fill]) -> None:
        for fill in fills:
            fill.extent = plan.extent(fill)
        self._steps.append(fills)

    def call(self, function: Callable[[], object], tensor: Tensor) -> None:
        self._steps.append(function)

    def __len__(self) -> int:
        return len(self._steps)

    def run(self) -> None:
        """Write everything that was recorded.

        Raises:
            RuntimeError: a tensor has moved, or a mode is active that has to see torch's operators.
        """
        before = plan.set_recorder(None)
        try:
            if isinstance(before, Capture):
                before.settle("Plan.run")
            elif not plan.modes_allow():
                raise RuntimeError("a Plan cannot run under a mode, transform or tracer of torch")
            fills: list[plan.Fill] = []
            for step in self._steps:
                if callable(step):
                    plan.run(fills)
                    fills = []
                    step()
                    if isinstance(before, Capture):
                        before.settle("Plan.run")
                elif any(plan.extent(fill) != fill.extent for fill in step):
                    raise RuntimeError(
                        "a tensor of the plan has other memory or another shape than when it was "
                        "recorded; record the plan anew"
                    )
                else:
                    fills += step
            plan.run(fills)
        finally:
            plan.set_recorder(before)

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        if name not in hooks.FUNCTIONS:
            raise AttributeError(f"'Plan' object has no attribute {name!r}")
        function = getattr(init, name)

        def record(*args: Any, **kwargs: Any) -> Tensor:
            before = plan.set_recorder(self)
            try:
                return function(*args, **kwargs)  # type: ignore[no-any-return]
            finally:
                plan.set_recorder(before)

        return record


_Fn = Callable[[nn.Module], object]


def init_model_(model: nn.Module, fn: _Fn | None = None) -> nn.Module:
    """Initialise all of a model's parameters in one pass; same numbers as one by one.

    Args:
        model: any module
        fn: called with every submodule, children first and the model last, as by `model.apply`;
            by default each module that has `reset_parameters` (or, as some of torch's own,
            `_reset_parameters`) is asked to reset its own

    Returns:
        `model`.

    The same as `with fastinit.fused(): model.apply(fn)`, except that fills of the model's tensors
    may wait although they are older than the block: memory that somebody knows from before (a numpy
    array over a parameter, another thread) must not be read while this runs.
    """
    if _is_recording_a_plan():
        raise RuntimeError("init_model_ cannot be part of a Plan that is being recorded")
    with block.adopting((*model.parameters(), *model.buffers())):
        _apply(model, fn)
    return model


def record(model: nn.Module, fn: _Fn | None = None) -> Plan:
    """What `init_model_(model, fn)` would do, as a Plan that does it again and again.

    Args:
        model: any module; its tensors must keep their memory while the plan is used
        fn: as for `init_model_`

    Returns:
        A Plan. Nothing is written and nothing drawn before its `run()`, which draws on from where
        the generators are then.

    Raises:
        RuntimeError: `fn` reads what it initialises, so that what it does cannot be known before.
    """
    if _is_recording_a_plan() or not plan.modes_allow():
        raise RuntimeError("record cannot be used inside another Plan, fused block or mode")
    made = Plan()
    walk = _Walk(made, (*model.parameters(), *model.buffers()))
    before = plan.set_recorder(walk)
    try:
        with hooks.hooked(), walk:
            _apply(model, fn)
    finally:
        plan.set_recorder(before)
    return made


def materialize_(
    model: nn.Module,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    fn: _Fn | None = None,
) -> nn.Module:
    """Give a model's meta tensors memory, and initialise it in one pass.

    Args:
        model: any module; parameters and buffers that are not on the meta device stay as they are
        device: where the memory is taken (default: torch's default device; the CPU if that is meta)
        dtype: of the floating-point tensors (default: as they are)
        fn: as for `init_model_`

    Returns:
        `model`. Tied tensors stay tied; parameters are new objects, as after `to_empty`.

    Warns:
        UserWarning: `fn` did not write all of a tensor, for example a buffer that only a
            constructor computes. Such tensors are left on the meta device and named.
    """
    if _is_recording_a_plan():
        raise RuntimeError("materialize_ cannot be part of a Plan that is being recorded")
    with block.fused():
        slots = [slot for path, m in model.named_modules() for slot in _meta_slots(path, m)]
        memory: dict[tuple[object, ...], Tensor] = {}
        new: dict[int, Tensor] = {}  # tied tensors are one object
        for _, m, name, old in slots:
            if id(old) not in new:
                new[id(old)] = _materialized(old, device, dtype, memory)
            setattr(m, name, new[id(old)])
        with _Watch(new.values()) as watch:
            _apply(model, fn)
        missing = []
        for path, m, name, old in slots:
            if getattr(m, name, None) is new[id(old)] and not watch.is_written(new[id(old)]):
                setattr(m, name, old)
                missing.append(path)
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" * (len(missing) > 10))
        warnings.warn(
            f"{len(missing)} tensors were not initialised completely and stay on the meta device: "
            f"{shown}. Pass a `fn` that initialises them, or set them yourself.",
            stacklevel=2,
        )
    return model


def _is_recording_a_plan() -> bool:
    return not isinstance(plan.this_thread.recorder, Capture | None)


def _apply(model: nn.Module, fn: _Fn | None) -> None:
    model.apply(cast("Callable[[nn.Module], None]", fn or _reset))


def _reset(module: nn.Module) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            reset()
            break


# ---- record --------------------------------------------------------------------------------------


class _Walk(Mode):
    """Puts what is done to some tensors into a Plan instead of doing it."""

    modes = 1
    takes_small = True

    def __init__(self, into: Plan, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._plan = into
        self._storages = {plan.storage_id(t) for t in tensors if type(t) in PLAIN}

    def add(self, fills: list[plan.Fill]) -> None:
        self._storages.update(plan.storage_id(f.tensor) for f in fills)
        self._plan.add(fills)

    def call(self, function: Callable[[], object], tensor: Tensor) -> None:
        self._storages.add(plan.storage_id(tensor))
        self._plan.call(function, tensor)

    def read(self, t: Tensor) -> None:
        if type(t) in PLAIN and plan.storage_id(t) in self._storages:
            raise RuntimeError("record: the function reads a tensor that it initialises")

    expose = read

    def before(self, other: object) -> None:
        pass

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor) and type(x) in PLAIN]
        build = FILLS.get(func)
        if build is not None and tensors:
            fill = probe.proved(build(args[0], args, kwargs, False))
            if fill is not None:
                self.add([fill])
                return args[0]
        known = any(
            t.layout is torch.strided and plan.storage_id(t) in self._storages for t in tensors
        )
        random = torch.Tag.nondeterministic_seeded in func.tags
        if is_harmless(func) or not (known or random):
            return func(*args, **kwargs)
        if torch.Tag.inplace not in func.tags:
            raise RuntimeError(
                f"record: {func} reads what the function initialises, or draws from a generator; "
                "what it does to the model cannot be known before it is done"
            )

        def again() -> None:
            with torch.no_grad():
                func(*args, **kwargs)

        self.call(again, tensors[0])
        return args[0] if func._schema.returns else None


# ---- materialize_ --------------------------------------------------------------------------------

# In-place operators whose result does not depend on what was there.
_OVERWRITING = frozenset(
    f"aten::{name}_"
    for name in (
        *("uniform", "normal", "fill", "zero", "copy", "random", "bernoulli", "exponential"),
        *("log_normal", "cauchy", "geometric"),
    )
)


def _meta_slots(path: str, m: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Full name, and where it is to be set."""
    for name, t in (*m._parameters.items(), *m._buffers.items()):
        if t is not None and t.is_meta:
            yield f"{path}.{name}".lstrip("."), m, name, t


def _materialized(
    old: Tensor,
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
    memory: dict[tuple[object, ...], Tensor],
) -> Tensor:
    """A tensor like `old` with memory, which it shares if `old` shared its own."""
    key = (plan.storage_id(old), old.storage_offset(), old.shape, old.stride(), old.dtype)
    if key not in memory:
        kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
        default = torch.get_default_device()
        where = ("cpu" if default.type == "meta" else default) if device is None else device
        memory[key] = torch.empty_strided(old.shape, old.stride(), dtype=kind, device=where)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(memory[key], old.requires_grad)
    return memory[key].requires_grad_(old.requires_grad)


class _Watch(Mode):
    """Sees which elements of some tensors are written at all."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._missing = {plan.storage_id(t) for t in tensors if t.numel() != 0}
        self._partly: dict[int, Tensor] = {}  # storage -> for each element whether it is written

    def is_written(self, t: Tensor) -> bool:
        key = plan.storage_id(t)
        if key in self._partly and bool(self._partly[key].all()):
            return True
        return key not in self._missing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            out = [kwargs[x.name] for x in func._schema.arguments if x.is_out and x.name in kwargs]
            if func._schema.name in _OVERWRITING:
                out.append(args[0])
            for t in out:
                if type(t) in PLAIN and t.layout is torch.strided:
                    self._note(t)
        return result

    def _note(self, t: Tensor) -> None:
        key = plan.storage_id(t)
        if key not in self._missing:
            return
        items = plan.storage_of(t).nbytes() // t.element_size()
        if t.numel() == items:
            self._missing.remove(key)
        else:
            written = self._partly.setdefault(key, torch.zeros(items, dtype=torch.bool))
            written.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
