# SPDX-License-Identifier: BSD-3-Clause
"""Where a tensor's elements lie in memory, and what the kernels can write."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from fastinit.core import kernels, torch_api

MIN_NATIVE = 8192  # single calls on fewer elements go to torch, whose call costs less
MIN_CUDA = 1 << 24  # the same on a GPU, where torch's call does not wait for its kernel

# Elements on the CPU from which on a call is worth a record, in units of MIN_NATIVE, where torch
# takes longer than for a fill: 80 us to make a matrix of 256 elements orthogonal.
COST = {"orthogonal_": 1 / 32, "orthogonal_batched_": 1 / 32, "sparse_": 1 / 16, "dirac_": 1 / 16}
# From which on a scope begins to watch, which takes about 50 us for each small layer that follows;
# torch draws so many elements in 120 us.
BEGIN = 4

DTYPES = {  # what the kernels can write, and their code for it
    torch.float32: kernels.DTYPES["f32"],
    torch.float64: kernels.DTYPES["f64"],
    torch.bfloat16: kernels.DTYPES["bf16"],
    torch.float16: kernels.DTYPES["f16"],
}

# What the keyed stream can write: a complex number is its real and its imaginary part.
KEYED = frozenset((*DTYPES, torch.complex32, torch.complex64, torch.complex128))

_LARGEST = {torch.float16: 3e4}  # |numbers| up to here cannot leave the dtype's range,
_LARGEST_OTHER = 1e37  # nor can the difference of two


# On a GPU: of elements, and of bytes from the first to the last. torch splits larger tensors.
MOST_AT_ONCE = (1 << 31) - 1


PLAIN = frozenset((Tensor, torch.nn.Parameter))  # types whose values are in their storage
_STRIDED = torch.strided
DENSE = (0,) * 8
NO_TENSOR = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in DTYPES}
address_of = Tensor.data_ptr  # as it is now: hooks.py replaces it
device_of: Callable[[Tensor], int] = Tensor.get_device  # index of a GPU; -1: the CPU
base_of = torch.UntypedStorage.data_ptr
storage_of: Callable[[Tensor], torch.UntypedStorage] = Tensor.untyped_storage  # likewise


storage_id = torch_api.storage_id  # what tensors over the same memory have in common


def is_plain(t: object) -> TypeGuard[Tensor]:
    """Return whether a tensor's values are what is in its storage: no subclass, and strided.

    Of nested tensors torch says that they are strided, but they have neither sizes nor strides.
    """
    return type(t) in PLAIN and t.layout is _STRIDED and not t.is_nested  # type: ignore[attr-defined]


def in_reals(t: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return storage offset, sizes and strides, of a complex tensor in its parts: as of what
    view_as_real makes of it.
    """
    offset, sizes, strides = int(t.storage_offset()), tuple(t.shape), t.stride()
    if not t.dtype.is_complex:
        return offset, sizes, strides
    return 2 * offset, (*sizes, 2), (*(2 * stride for stride in strides), 1)


def is_simple(t: Tensor) -> bool:
    """Return whether the same is true of a subclass, as it does nothing of its own to operators."""
    return t.layout is _STRIDED and type(t).__torch_dispatch__ is Tensor.__torch_dispatch__


def largest(dtype: torch.dtype) -> float:
    """Return up to which size numbers are no reason for torch to raise."""
    return _LARGEST.get(dtype, _LARGEST_OTHER)


def accepts(t: Tensor, inference: bool = False) -> bool:
    """Return whether a tensor is plain memory that torch.nn.init would write without a warning.

    `inference`: tensors of inference mode, whose versions nobody counts, are as good as others.
    """
    return (
        t.dtype in DTYPES
        and is_here(t)
        and t.layout is torch.strided
        and not (t.is_nested or t.is_neg() or torch_api.is_zero(t))
        and (inference or not t.is_inference())
        and not torch_api.is_functional(t)
        and address_of(t) != 0  # of a storage that was given back
    )


def is_here(t: Tensor) -> bool:
    """Return whether a tensor is in memory of the CPU, or of a GPU that there are kernels for."""
    return t.is_cpu or (t.is_cuda and kernels.can_use_cuda())


def least(device: int) -> int:
    """Return from how many elements on a fill that does not wait is worth a native call."""
    return MIN_NATIVE if device < 0 else MIN_CUDA


def is_worth(t: Tensor, function: str = "") -> bool:
    """Return whether a fill is worth a record; on a GPU it saves a launch, whatever its size."""
    n = t.numel()
    return n >= MIN_NATIVE * COST.get(function, 1) or (n > 0 and device_of(t) >= 0)


def may_be_worth(t: Tensor) -> bool:
    """Return whether some function's fill of a tensor would be worth a record."""
    return t.numel() >= MIN_NATIVE * min(COST.values()) or not t.is_cpu


def is_worth_watching(t: Tensor) -> bool:
    """Return whether a scope that has recorded nothing yet should begin to, with this fill."""
    n = t.numel()
    if n < BEGIN * MIN_NATIVE and t.is_cpu:
        return False
    return n > 0 and is_here(t)


def layout_of(t: Tensor) -> tuple[str, int, tuple[int, ...]] | None:
    """Return (layout, rank, sizes and strides), dimensions by stride as in torch's TensorIterator.

    None: elements may share memory, or more than four dimensions are left after merging.
    """
    if t.is_contiguous():
        return "contiguous", 0, DENSE
    sizes: list[int] = []
    strides: list[int] = []
    reach = 1  # elements covered by the dimensions so far, gaps included
    for stride, size in sorted((st, sz) for st, sz in zip(t.stride(), t.shape) if sz != 1):
        if stride < reach:
            return None
        if sizes and stride == sizes[-1] * strides[-1]:
            sizes[-1] *= size
        else:
            sizes.append(size)
            strides.append(stride)
        reach = stride * (size - 1) + reach
    if strides == [1]:
        return "dense", 0, DENSE
    if len(sizes) > 4:
        return None
    pad = (0,) * (4 - len(sizes))
    return "strided", len(sizes), (*sizes, *pad, *strides, *pad)


def in_storage(t: Tensor) -> tuple[int, int]:
    """Return first byte and end of a tensor, counted from the beginning of its storage."""
    size, begin, items = t.element_size(), int(t.storage_offset()), t.numel()
    return size * begin, size * (begin + (items if t.is_contiguous() else span(t)))


def place(t: Tensor) -> tuple[object, ...]:
    """Return what changes when a tensor gets other memory or another shape."""
    return address_of(t), t.shape, t.stride(), t.dtype


def span(t: Tensor) -> int:
    """Return the elements from the first in memory to the last of a tensor that is not empty."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
