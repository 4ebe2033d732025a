# SPDX-License-Identifier: BSD-3-Clause
"""Every private name of torch that fastinit uses, what for, and since which torch it is there.

No other module may use one (tests/core/test_layers.py), so this is where to look when a new torch
breaks something. A name with no version is there in all that are supported, from 2.6 on. Attributes
that torch's users have always used are not counted: `_version` of a tensor, `_schema` of an
operator, `_parameters`, `_buffers` and `_modules` of a module.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import init as _init
from torch.utils import _python_dispatch

_C: Any = torch._C


def _absent(*_: object) -> Any:
    raise NotImplementedError("this torch is built without CUDA")


# ---- modes, transforms, tracers ------------------------------------------------------------------

TorchDispatchMode = _python_dispatch.TorchDispatchMode  # sees operators below autograd
disable_current_modes = _python_dispatch._disable_current_modes  # all of them, for probe.py
DisableTorchFunction = _C.DisableTorchFunction  # hide from function modes and subclasses
DisableTorchDispatch = _C._DisableTorchDispatch  # hide from dispatch modes
function_modes: Callable[[], int] = _C._len_torch_function_stack  # how many are active
dispatch_modes: Callable[[], int] = _C._len_torch_dispatch_stack  # likewise
transform: Callable[[], object] = _C._functorch.peek_interpreter_stack  # functorch's; None: none
tracing_state: Callable[[], object] = _C._get_tracing_state  # torch.jit.trace's; None: none


def nobody_watches(dispatch: int) -> bool:
    """Return whether no mode, transform or tracer sees operators, but for so many dispatch modes.

    The last question is for the level of forward-mode differentiation.
    """
    return (
        function_modes() == 0
        and dispatch_modes() == dispatch
        and transform() is None
        and tracing_state() is None
        and forward_ad._current_level < 0
    )


def keys() -> tuple[int, int]:
    """Return which dispatch keys this thread includes and excludes, as two sets of bits.

    A guard that puts such sets back when it ends takes along the mode that was begun meanwhile.
    """
    included, excluded = _included(), _excluded()
    return included.raw_repr(), excluded.raw_repr()


_included: Callable[[], Any] = _C._dispatch_tls_local_include_set
_excluded: Callable[[], Any] = _C._dispatch_tls_local_exclude_set


def are_hidden() -> bool:
    """Return whether dispatch modes are hidden from what runs now, as by DisableTorchDispatch."""
    return bool(_C._dispatch_tls_is_dispatch_key_excluded(_C.DispatchKey.Python))


in_backward: Callable[[], int] = _C._current_graph_task_id  # -1: not


def hide_from_dynamo(code: CodeType) -> bool:
    """Keep torch.compile from tracing a function, without loading torch._dynamo.

    Returns False with a torch that does not offer this.
    """
    try:
        frames = _C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):
        return False
    return True


# ---- tensors, storages, generators ---------------------------------------------------------------


_untyped_storage = Tensor.untyped_storage  # as it is now: capture/hooks.py replaces it


def _slow_storage_id(t: Tensor) -> int:
    return int(_untyped_storage(t)._cdata)


is_zero: Callable[[Tensor], bool] = Tensor._is_zerotensor  # zeros without memory, of autograd
is_functional: Callable[[Tensor], bool] = torch._is_functional_tensor  # of functionalization
set_versions: Callable[[tuple[Tensor, ...], tuple[int, ...]], None] = (  # of tensors
    _C._autograd._unsafe_set_version_counter
)
# An id that tensors over the same memory have in common while it lives.
storage_id: Callable[[Tensor], int] = getattr(_C, "_storage_id", _slow_storage_id)
storage_of_weak: Callable[[int], torch.UntypedStorage | None] = (  # None: it has died
    torch.UntypedStorage._new_with_weak_ptr
)

# How many tensors of C++ share this one's Python object's, and how many tensors have a storage.
owners: Callable[[Tensor], int] = getattr(Tensor, "_use_count", lambda t: 0)
storage_owners: Callable[[int], int] = getattr(_C, "_storage_Use_Count", lambda storage: 0)


def _references(t: Tensor) -> int:
    storage = _untyped_storage(t)
    return sys.getrefcount(storage)


_FRESH = _references(torch.empty(1, device="cpu"))  # to a storage that nobody else has


def is_its_own(t: Tensor) -> bool:
    """Return whether all who know a tensor's memory know it through this object, as far as torch
    can say: no other tensor, array, file, process or consumer of DLPack.

    False where torch cannot say.
    """
    storage = _untyped_storage(t)
    return (
        owners(t) == 1  # of Python's objects there is one, whoever has it
        and sys.getrefcount(storage) == _FRESH
        and storage_owners(storage._cdata) == 2  # the tensor's, and the object just made
        and storage.resizable()  # memory of NumPy and files is not
        and not storage.is_shared()
    )


def generator_id(generator: torch.Generator) -> int:
    """Return an id that all objects of one generator have in common."""
    return int(generator._cdata)  # type: ignore[attr-defined]


# ---- operators -----------------------------------------------------------------------------------

OpOverload = torch._ops.OpOverload  # what a dispatch mode sees
to_copy = torch.ops.aten._to_copy.default  # what t.to(dtype) comes as
# An operator with a kernel for this is made of others, and may reach a mode undivided.
composite: Any = _C.DispatchKey.CompositeImplicitAutograd

# ---- torch.nn.init -------------------------------------------------------------------------------

fans = _init._calculate_fan_in_and_fan_out  # of xavier_*
correct_fan = _init._calculate_correct_fan  # of kaiming_*

# ---- torch.jit -----------------------------------------------------------------------------------

ScriptModule: Any = torch.jit._script.RecursiveScriptModule  # saves tensors by itself

# What of TorchScript reads memory without an operator. Methods are those of classes in C++.
_UNSEEN = (
    *("prim::tolist", "prim::Print", "prim::CallMethod", "prim::fork", "prim::awaitable"),
    *("aten::str", "aten::format", "aten::percentFormat", "aten::save"),
)


def native_calls() -> list[tuple[Any, str]]:
    """Return classes and their methods by which Python calls TorchScript and AOTInductor."""
    kinds = (kind for kind in vars(getattr(_C, "_aoti", object)).values() if isinstance(kind, type))
    names = ("run", "boxed_run", "load_constants", "update_constant_buffer")
    found = [(kind, name) for kind in kinds for name in names if name in vars(kind)]
    return [(_C.ScriptFunction, "__call__"), (_C.ScriptMethod, "__call__"), *found]


def reads_unseen(code: Any) -> bool:
    """Return whether what one of `native_calls` calls may read or write without operators.

    TorchScript's interpreter goes by operators, but for few; its fusers make code of their own.
    """
    if torch.cuda.is_initialized() or _C._llvm_enabled():  # type: ignore[no-untyped-call]
        return True
    try:
        text = str(code.inlined_graph)
    except (AttributeError, RuntimeError):  # AOTInductor; a method of a class in C++
        return True
    return any(name in text for name in _UNSEEN)


# ---- CUDA ----------------------------------------------------------------------------------------

# Handle of a device's current stream; the current device; whether a graph is captured.
current_stream: Callable[[int], int] = getattr(_C, "_cuda_getCurrentRawStream", _absent)
current_device: Callable[[], int] = getattr(_C, "_cuda_getDevice", _absent)
is_capturing: Callable[[], bool] = getattr(_C, "_cuda_isCurrentStreamCapturing", _absent)


def float32_products() -> str | bool:
    """Return how cuBLAS multiplies float32: a precision since torch 2.9, before whether as tf32.

    The older getters may raise where the newer have been used.
    """
    get = getattr(_C, "_get_fp32_precision_getter", None)
    return _C._get_cublas_allow_tf32() if get is None else get("cuda", "matmul")  # type: ignore[no-any-return]


def set_float32_products(how: str | bool) -> None:
    """Set what `float32_products` returns."""
    if isinstance(how, str):
        _C._set_fp32_precision_setter("cuda", "matmul", how)
    else:
        _C._set_cublas_allow_tf32(how)


# ---- DTensor, whose module takes a second to import ----------------------------------------------


def local_tensor(t: Any) -> Tensor:
    """Return what a DTensor has on this rank: `to_local` without autograd."""
    return t._local_tensor  # type: ignore[no-any-return]


def shard_order(t: Any) -> Any:
    """Return in which order mesh dimensions cut a DTensor; None if torch does not say."""
    return getattr(t._spec, "shard_order", None)


def strided_shard() -> Any:
    """Return the placement by which fully_shard cuts what tensor parallelism has cut."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard


# ---- libraries -----------------------------------------------------------------------------------


@functools.cache
def mkl_erfinv(dtype: torch.dtype) -> int:
    """Return the address of the function of MKL that erfinv_ calls; 0 if torch has none.

    It is linked into torch's own library, or that one's dependencies.
    """
    name = {torch.float32: "vmsErfInv", torch.float64: "vmdErfInv"}.get(dtype, "")
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = getattr(ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD), name)
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
