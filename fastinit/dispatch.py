# SPDX-License-Identifier: BSD-3-Clause
"""Who writes a law: the keyed stream, the kernels with torch's words, or torch's own function.

With a `Key`, or in a scope with a seed, it is the keyed stream. Otherwise torch's words are written
natively, if that kind of fill is proved equal (probe.py). Whatever is unusual (other devices,
dtypes, layouts, subclasses, modes, arguments out of range) goes to torch's own function as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import Generator, Tensor
from torch.nn import init as torch_init

from fastinit import execute, probe
from fastinit.core import build, geometry, laws, recording, shard, source, torch_api
from fastinit.core.key import Key
from fastinit.core.recording import Call, Recorder

Source = Generator | Key | None  # where words come from; None: torch's default generator
# The functions of torch.nn.init, whatever they are replaced by later.
ORIGINALS: dict[str, Callable[..., Any]] = {
    name: function
    for name, function in vars(torch_init).items()
    if isinstance(function, FunctionType) and function.__module__ == "torch.nn.init"
}


def write(
    name: str,
    tensor: Tensor,
    args: tuple[Any, ...],
    generator: Source,
    moved: dict[str, Any],
    least: int = 1,
) -> Tensor:
    """Do what a function of torch.nn.init does: by a key, natively, or by torch.

    Args:
        args: its arguments but the tensor and the generator
        moved: keywords that it does not have
        least: times as many elements as a random fill has to have to be worth a native call; 0: any
    """
    recorder = recording.this_thread.recorder
    if (
        type(tensor) in geometry.PLAIN
        and not torch_api.function_modes()  # which would see the look at the size
        and not moved
        and not isinstance(generator, Key)
    ):
        n = tensor.numel()
        if type(n) is not int:  # traced
            return leave_to_torch(ORIGINALS[name], name, tensor, args, generator)
        if recorder is None or (recorder.is_idle and tensor.is_cpu):
            if n < least * geometry.MIN_NATIVE:
                return call_torch(ORIGINALS[name], name, tensor, args, generator)
        elif recorder.lets_pass(name, tensor, args):
            with torch_api.DisableTorchDispatch():
                return call_torch(ORIGINALS[name], name, tensor, args, generator)
    if written(name, tensor, args, generator, moved, least):
        return tensor
    return leave_to_torch(ORIGINALS[name], name, tensor, args, generator)


def call_torch(
    function: Callable[..., Tensor],
    name: str,
    tensor: Tensor,
    args: tuple[Any, ...],
    generator: object,
) -> Tensor:
    """Call a function of torch, taking turns with other threads that draw."""
    if name in laws.DRAW_NOTHING:
        return function(tensor, *args)
    with source.default_lock if generator is None else source.lock_of(generator):
        return function(tensor, *args, generator)


def written(
    name: str,
    tensor: Tensor,
    args: tuple[Any, ...],
    generator: Source,
    moved: dict[str, Any],
    least: int = 1,
) -> bool:
    """Write with the numbers of a key, or natively with torch's; return False if torch has to."""
    if moved:
        _refuse(name, moved)
    recorder = recording.this_thread.recorder
    if recorder is not None:
        recorder.expect(tensor, name)
        recorder = recording.active()
    if is_keyed(generator, recorder):
        if not isinstance(generator, Key) and torch_api.is_traced():
            return False
        key = generator if isinstance(generator, Key) else None
        _write_keyed(recorder, name, tensor, args, key)
        return True
    if not may_run_natively(name, tensor, least):
        return False
    law = laws.of(name, tensor, args)
    for fills in build.ways(law, tensor, generator):
        proved = [probe.proved(fill) for fill in fills]
        if None not in proved:
            if recorder is None:
                execute.run(proved)  # type: ignore[arg-type]
            else:
                recorder.add(proved, law)  # type: ignore[arg-type]
            return True
    return False


def is_keyed(generator: Source, recorder: Recorder | None) -> bool:
    """Return whether numbers come from a key: the caller's, or the seed of the scope around."""
    if recorder is None or recorder.seed is None:
        return isinstance(generator, Key)
    return generator is None or isinstance(generator, Key) or source.is_default(generator)


def _write_keyed(
    recorder: Recorder | None, name: str, tensor: Tensor, args: tuple[Any, ...], key: Key | None
) -> None:
    with torch_api.DisableTorchFunction():  # its modes (torch.device) would see looks at memory
        shape = shard.global_shape(tensor, None if key is None else key.global_shape)
        law = laws.of_shape(name, tensor.dtype, shape, args)
        if recorder is None:
            assert key is not None
            execute.fill_keyed(law, tensor, key)
        else:
            recorder.fill_keyed(law, tensor, key)


def may_run_natively(name: str, t: Any, least: int) -> bool:
    """Return whether a tensor is plain, large enough for a native call, and seen by no mode."""
    recorder = recording.active()
    if type(t) not in geometry.PLAIN or torch_api.function_modes() != 0:
        return False  # before t.numel() would be seen
    n = t.numel()
    if type(n) is not int:
        return False
    if recorder is None or least == 0:
        is_large = n >= least * geometry.least(geometry.device_of(t))
    else:
        is_large = recorder.takes(t, name)
    if not is_large or (recorder is not None and recorder.seed is not None):
        return False
    return (
        n != 0
        and geometry.is_plain(t)
        and not torch.compiler.is_compiling()
        and recording.modes_allow()
    )


def has_no_elements(t: Any, generator: Source) -> bool:
    """Return whether a tensor that torch asks about first is empty, and no part of a whole."""
    if type(t) in geometry.PLAIN and torch_api.function_modes() == 0:
        n = t.numel()
        is_empty = type(n) is int and n == 0  # a traced or symbolic number is torch's to look at
    else:
        is_empty = not torch.overrides.has_torch_function_variadic(t) and 0 in t.shape
    return is_empty and not (isinstance(generator, Key) and generator.global_shape is not None)


def leave_to_torch(
    function: Callable[..., Tensor],
    name: str,
    tensor: Tensor,
    args: tuple[Any, ...],
    generator: object,
) -> Tensor:
    """Call the function of torch that writes the law of `name`, or record the call."""
    recorder = recording.active()
    if recorder is not None:
        return recorder.call(Call(function, name, tensor, args, generator))
    return call_torch(function, name, tensor, args, generator)


def _refuse(name: str, moved: dict[str, Any]) -> NoReturn:
    """Raise TypeError for keywords that no function has, some of which had them up to 0.5."""
    if not moved.keys() <= {"global_shape", "offset"}:
        raise TypeError(f"{name}() got an unexpected keyword argument {next(iter(moved))!r}")
    instead = f"write {name}(part, generator=key.part(global_shape, offset))"
    if name in ("eye_", "dirac_"):
        instead = "fill a DTensor, or the whole tensor"
    elif name in laws.DRAW_NOTHING:
        instead = "a part of a constant is constant"
    raise TypeError(f"{name}() takes no global_shape= and offset= since 0.6: {instead}")
