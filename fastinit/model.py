# SPDX-License-Identifier: BSD-3-Clause
"""Whole models in one pass: init_model_ and materialize_."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastinit.capture import rules
from fastinit.capture.capture import Capture
from fastinit.capture.initialisation import Initialisation
from fastinit.capture.missing import Device, Memory, Watch, tensors_of, with_memory
from fastinit.capture.names import named_tensors
from fastinit.capture.report import Report
from fastinit.capture.rules import Fn, Rule
from fastinit.core import recording, torch_api
from fastinit.fused import adopting


def init_model_(
    model: nn.Module,
    fn: Fn | None = None,
    seed: int | None = None,
    *,
    only_missing: bool | Iterable[str] = False,
    prefix: str = "",
    strip: str = "",
    orthogonal: str | None = None,
) -> Report:
    """Initialise all of a model's parameters in one pass; same numbers as one by one.

    Args:
        model: any module
        fn: called with every submodule, children first and the model last, as by `model.apply`; a
            method or function without arguments (`model.init_weights`) is called once. By default a
            model that brings `initialize_weights`, `init_weights` or `_init_weights` is initialised
            by the first of these, as is a model within the model, and what it leaves alone, like
            all of other models, by `reset_parameters` (or, as some of torch's own,
            `_reset_parameters`) of each module. `fastinit.reset_parameters` asks for just that
        seed: take the numbers of the keyed stream, by the names of the parameters; see `Key`
        only_missing: leave everything as it is, but for what is on the meta device, which gets
            memory as by `materialize_`, and for these names: `model.load_state_dict(state,
            strict=False).missing_keys`
        prefix: put before these names, for a model that is a part of another
        strip: left out at the beginning of these names, for a model that has another one within
        orthogonal: "torch" or "native": who writes orthogonal_, as for `fused`

    Returns:
        What was written by which function, and what was not; `initialised_by` says what was chosen.

    The same as `with fastinit.fused(): model.apply(fn)`, except that fills of the model's tensors
    may wait although they are older than the block: memory that somebody knows from before (a numpy
    array over a parameter, another thread) must not be read while this runs.
    """
    rule = checked("init_model_", model, fn)
    if only_missing is not False:
        how = (rule, seed, prefix, strip, orthogonal)
        return _fill_missing("init_model_", model, None, None, _given(model, only_missing), *how)
    if is_recording_a_plan():
        raise RuntimeError("init_model_ cannot be part of a Plan that is being recorded")
    with adopting(tensors_of(model), model, seed, prefix, strip, orthogonal) as report:
        run = Initialisation(model, anew=seed is not None)
        run(rule)
    report.initialised_by += run.chosen
    run.warn(3)
    return report


def is_recording_a_plan() -> bool:
    return not isinstance(recording.this_thread.recorder, Capture | None)


def materialize_(
    model: nn.Module,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    fn: Fn | None = None,
    seed: int | None = None,
    *,
    only_missing: bool | Iterable[str] = True,
    prefix: str = "",
    strip: str = "",
    orthogonal: str | None = None,
) -> Report:
    """Give a model's meta tensors memory, and initialise it in one pass.

    Args:
        model: any module
        device: where the memory is taken (default: torch's default device; the CPU if that is meta)
        dtype: of the floating-point tensors (default: as they are)
        fn: as for `init_model_`; by default only modules with something on meta are asked
        seed: take the numbers of the keyed stream, by the names of the parameters; see `Key`
        only_missing: parameters and buffers that are not on the meta device stay as they are,
            whatever `fn` does; names of others to be initialised, too, may be given, as for
            `init_model_`. False: `fn` may overwrite all of the model
        prefix: put before these names, for a model that is a part of another
        strip: left out at the beginning of these names, for a model that has another one within
        orthogonal: "torch" or "native": who writes orthogonal_, as for `fused`

    Returns:
        What was written by which function, and what was not; `initialised_by` says what was chosen.
        Tied tensors stay tied; parameters are new objects, as after `to_empty`, or the same ones
        after `torch.__future__.set_swap_module_params_on_conversion(True)`.

    Functions run for whole modules, from the same numbers as on a model that is all there; for what
    is to stay they find stand-ins, which are thrown away, usually before they are written.

    Parameters may be DTensors (after `fully_shard` or tensor parallelism). With a seed each process
    fills only its own elements, without communication, and they are those of the whole model. With
    torch's generators DTensor does what it does.

    Warns:
        UserWarning: something was not written completely, for example a buffer that only a
            constructor computes. Such tensors are left on the meta device and named.
    """
    rule = checked("materialize_", model, fn, device, dtype)
    too = None if only_missing is False else _given(model, only_missing)
    how = (rule, seed, prefix, strip, orthogonal)
    return _fill_missing("materialize_", model, device, dtype, too, *how)


def _fill_missing(
    function: str,
    model: nn.Module,
    device: Device,
    dtype: torch.dtype | None,
    too: list[Tensor] | None,
    rule: Rule | None,
    seed: int | None,
    prefix: str,
    strip: str,
    orthogonal: str | None,
) -> Report:
    """Initialise what is on the meta device and these tensors, too; None: all there is."""
    if is_recording_a_plan():
        raise RuntimeError(f"{function} cannot be part of a Plan that is being recorded")
    named = list(named_tensors(model))
    there = [t for t in (tensors_of(model) if too is None else too) if not t.is_meta]
    with adopting(there, model, seed, prefix, strip, orthogonal) as report:
        report.is_about_new = True
        slots = [s for s in named if s[3].is_meta]
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        memory: Memory = {}
        made: dict[int, Tensor] = {}  # by the id of the meta tensor: tied ones are one object
        unwritten: list[str] = []
        watch = Watch(())
        try:
            for _, _, _, old in slots:
                if id(old) not in made:
                    made[id(old)] = with_memory(old, device, dtype, memory)
                    made[id(old)].__dict__.pop("_is_hf_initialized", None)
            watch.add(*made.values())
            if swaps:  # parameters stay the same objects
                meta = {id(s[3]): s[3] for s in slots if isinstance(s[3], nn.Parameter)}
                torch_api.swap([(t, made[key]) for key, t in meta.items()], model.modules())
            for _, m, name, old in slots:
                if old.is_meta:
                    setattr(m, name, made[id(old)])
            new = {id(s[3]): made[id(s[3])] if s[3].is_meta else s[3] for s in slots}
            memory.clear()
            watch.add(*there)
            missing = {id(t) for t in (*new.values(), *there)}
            given = None if too is None else missing
            run = Initialisation(model, given, watch, device, anew=True)
            run(rule)
        finally:
            now = {id(s[3]): made.get(id(s[3])) if s[3].is_meta else s[3] for s in slots}
            left = {k: t for k, t in now.items() if t is not None and not watch.is_written(t)}
            for path, m, name, old in slots:
                if id(old) in left and getattr(m, name, None) is left[id(old)]:
                    unwritten.append(prefix + path)
                    if old.is_meta:
                        setattr(m, name, old)
            back = [(t, made[key]) for key, t in left.items() if made[key].is_meta]
            torch_api.swap(back, model.modules() if back else ())
    report.initialised_by += run.chosen
    run.warn(4)
    if unwritten:
        shown = ", ".join(unwritten[:10])
        shown += f" and {len(unwritten) - 10} more" * (len(unwritten) > 10)
        warnings.warn(
            f"{len(unwritten)} tensors were not initialised completely and stay on the meta "
            f"device: {shown}. Pass a `fn` that initialises them, or set them yourself.",
            stacklevel=3,
        )
    return report


def _given(model: nn.Module, names: bool | Iterable[str]) -> list[Tensor]:
    """Return the tensors of these names. Raises TypeError and ValueError, saying what to give."""
    if names is True:
        return []
    names = getattr(names, "missing_keys", names)  # what load_state_dict returns
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise TypeError(f"only_missing is True, False or names of parameters, not {names!r}")
    found: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
        **{name: t for name, _, _, t in named_tensors(model)},  # without what wrappers add
    }
    names = list(names)
    unknown = [str(name) for name in names if name not in found]
    if unknown:
        raise ValueError(
            f"only_missing: the model has no {', '.join(sorted(unknown))}; give names of "
            "model.named_parameters() and named_buffers()"
        )
    return [found[name] for name in names]


def checked(
    function: str,
    model: object,
    fn: Fn | None,
    device: object = None,
    dtype: object = None,
) -> Rule | None:
    """Return how to call `fn`. Raises TypeError, ValueError and RuntimeError, saying what to do."""
    if not isinstance(model, nn.Module):
        hint = ""
        if isinstance(model, type) and issubclass(model, nn.Module):
            what, hint = f"the class {model.__name__}", f"; give an instance, {model.__name__}(...)"
        elif isinstance(model, Tensor):
            what, hint = "a tensor", "; for one tensor there is fastinit.normal_ and its like"
        else:
            what = f"an object of type {type(model).__name__}"
        raise TypeError(f"{function} takes a module, not {what}{hint}")
    if device is not None:
        if callable(device):
            raise TypeError(f"{function}: device is a function; write fn={_name(device)}")
        if not isinstance(device, torch.device | str | int):
            hint = f"; write dtype={device}" if isinstance(device, torch.dtype) else ""
            raise TypeError(f"{function}: device is a torch.device or its name, not {device}{hint}")
        if isinstance(device, int) and device >= torch.accelerator.device_count():
            raise RuntimeError(
                f"{function}: there is no GPU {device}; for a seed write seed={device}"
            )
        try:
            where = torch.device(device)
        except RuntimeError:
            raise RuntimeError(
                f'{function}: there is no device {device!r}; write "cpu", "cuda" or "cuda:1"'
            ) from None
        if where.type == "meta":
            raise ValueError(
                f'{function}: tensors get memory, which the meta device has not; write "cpu" or '
                '"cuda", or leave device away'
            )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"{function}: dtype is that of floating-point tensors, as torch.bfloat16, not {dtype!r}"
        )
    return None if fn is None else rules.rule_of(fn, model)


def _name(x: object) -> str:
    return getattr(x, "__name__", type(x).__name__)
