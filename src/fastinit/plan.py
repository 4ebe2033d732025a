# SPDX-License-Identifier: BSD-3-Clause
"""What is to be written: checks, parameters and geometry. No kernel decides anything.

A `Fill` is one tensor with what is to be written into it. execute.py takes fills in the order torch
would have executed them; cpu.py and cuda.py pack them for the compiled modules.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Rational, Real
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastinit import backend, source

MIN_NATIVE = 8192  # single calls on fewer elements go to torch, whose call costs less
MIN_CUDA = 1 << 24  # the same on a GPU, where torch's call does not wait for its kernel

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_LARGEST = {torch.float16: 3e4}  # |parameters| up to here cannot leave the dtype's range,
_LARGEST_OTHER = 1e37  # nor can the difference of two
# On a GPU: of elements, and of bytes from the first to the last. torch splits larger tensors.
MOST_AT_ONCE = (1 << 31) - 1
_SMALLEST_RANGE = 1e-30  # of uniform_: the 2^24th part of it is a normal float32
# As enum Op of csrc/plan.h. `sparse` is normal with a mask, in one launch on a GPU; `orthogonal` is
# normal and what becomes of it.
OPS = (
    *("constant", "diagonal", "uniform", "normal", "normal_pairs", "trunc_normal", "sparse_mask"),
    *("trunc_erfinv", "sparse", "orthogonal"),
)
_DENSE = (0,) * 8
NO_TENSOR = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in DTYPES}
address_of = Tensor.data_ptr  # as it is now: hooks.py replaces it
device_of: Callable[[Tensor], int] = Tensor.get_device  # index of a GPU; -1: the CPU
base_of = torch.UntypedStorage.data_ptr
storage_of: Callable[[Tensor], torch.UntypedStorage] = Tensor.untyped_storage  # likewise


def _slow_storage_id(t: Tensor) -> int:
    return int(storage_of(t)._cdata)


# What tensors over the same memory have in common while it lives.
storage_id: Callable[[Tensor], int] = getattr(torch._C, "_storage_id", _slow_storage_id)


@dataclass(slots=True, eq=False)
class Fill:
    """What is to be written into one tensor. Mutable only until it is proved."""

    tensor: Tensor
    op: str
    a: float = 0.0  # value; from; mean
    b: float = 0.0  # to; std
    generator: torch.Generator | None = None  # None: no words are drawn
    layout: str = "contiguous"  # contiguous, dense (permuted) or strided
    rank: int = 0
    shape: tuple[int, ...] = _DENSE  # FillDesc's union; orthogonal: rows, columns, matrices
    items: int = 0
    lo: float = 0.0
    hi: float = 0.0
    flavour: int = 0
    rests_on: str = ""  # an operator that has to be proved as well
    bumps: int = 1  # of the tensor's version counter
    extent: tuple[int, int] = (0, 0)  # of its bytes when it was recorded: in memory or in a storage
    state: Any = None  # of the generator, if its words were drawn ahead: see draw_ahead
    device: int = -1  # index of a GPU; -1: the CPU
    scale: float = 0.0  # trunc_erfinv: of the inverse error function; orthogonal: gain
    mean: float = 0.0  # and what is added
    zeros: int = 0  # sparse: of each column
    mask: Tensor | None = None  # sparse, if it was drawn ahead: 0 where zeros go
    stream: int = 0  # on which it was asked for
    caller: tuple[str, tuple[tuple[str, object], ...]] | None = None  # for reports: name, arguments
    # Of the keyed stream: see capture.py.
    bounds: tuple[float, float] | None = None  # of trunc_normal_, whatever becomes of it
    law: Any = None  # laws.Law
    box: tuple[int, tuple[int, ...], tuple[int, ...]] = (0, (), ())  # in the storage, in elements
    slabs: Any = None  # of the whole, if known beforehand
    otherwise: Any = None  # slabs, if it is no part of what has a name
    owner: Any = None  # whose memory it is; or the key of Philox and what it comes from
    numbers: Any = None  # what it has in common with its copies


# ---- what the kernels can take -------------------------------------------------------------------


class Recorder(Protocol):
    """Takes what would otherwise be run at once."""

    modes: int  # how many dispatch modes it has put on torch's stack
    seed: int | None  # of the keyed stream, if that takes the place of torch's default generators

    def takes(self, t: Tensor) -> bool: ...  # whether fills of such a tensor are worth a record
    def add(self, fills: list[Fill]) -> None: ...
    # `overwrites`: all of the tensor
    def call(self, function: partial[Any], tensor: Tensor, overwrites: bool) -> None: ...
    # A function of torch.nn.init with the numbers of a Key; None: of the recorder's seed.
    def fill_keyed(
        self, function: str, tensor: Tensor, args: Any, key: Any, block: Any
    ) -> None: ...


class _Local(threading.local):
    recorder: Recorder | None = None


this_thread = _Local()


def set_recorder(value: Recorder | None) -> Recorder | None:
    """Replace the recorder of this thread; returns the one before."""
    before, this_thread.recorder = this_thread.recorder, value
    return before


def modes_allow() -> bool:
    """No mode, transform or tracer is active that would have to see torch's operators."""
    c = torch._C
    own = 0 if this_thread.recorder is None else this_thread.recorder.modes
    return (
        c._len_torch_function_stack() == 0
        and c._len_torch_dispatch_stack() == own
        and c._functorch.peek_interpreter_stack() is None
        and c._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def accepts(t: Tensor, inference: bool = False) -> bool:
    """Plain memory that torch.nn.init would write without a word about it.

    `inference`: tensors of inference mode, whose versions nobody counts, are as good as others.
    """
    return (
        t.dtype in DTYPES
        and is_here(t)
        and t.layout is torch.strided
        and not (t.is_nested or t.is_neg() or t._is_zerotensor())
        and (inference or not t.is_inference())
        and not torch._is_functional_tensor(t)
        and address_of(t) != 0  # of a storage that was given back
    )


def is_here(t: Tensor) -> bool:
    """In memory of the CPU, or of a GPU that there are kernels for."""
    return t.is_cpu or (t.is_cuda and backend.can_use_cuda())


def least(device: int) -> int:
    """Elements from which a fill that does not wait is worth a native call."""
    return MIN_NATIVE if device < 0 else MIN_CUDA


def is_worth(t: Tensor) -> bool:
    """Large enough for a record. On a GPU what is saved is a launch, whatever its size."""
    n = t.numel()
    return n >= MIN_NATIVE or (n > 0 and device_of(t) >= 0)


def layout_of(t: Tensor) -> tuple[str, int, tuple[int, ...]] | None:
    """(layout, rank, sizes and strides), dimensions in the order of TensorIterator: by stride.

    None: elements may share memory, or more than four dimensions are left after merging.
    """
    if t.is_contiguous():
        return "contiguous", 0, _DENSE
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
        return "dense", 0, _DENSE
    if len(sizes) > 4:
        return None
    pad = (0,) * (4 - len(sizes))
    return "strided", len(sizes), (*sizes, *pad, *strides, *pad)


def _number(value: object, dtype: torch.dtype) -> float | None:
    """A finite int or float that all dtypes' checks would let pass."""
    if type(value) is not float and type(value) is not int:
        return None
    if type(value) is int and abs(value) > 1 << 53:  # torch rounds these more than once
        return None
    return float(value) if abs(value) <= _LARGEST.get(dtype, _LARGEST_OTHER) else None  # not NaN


def _describe(
    t: Tensor, op: str, a: object, b: object, generator: object, accepted: bool
) -> Fill | None:
    device = device_of(t)
    if not (accepted or accepts(t)) or not source.is_supported(generator, device):
        return None
    x, y = _number(a, t.dtype), _number(b, t.dtype)
    layout = layout_of(t)
    if x is None or y is None or layout is None or t.numel() == 0:
        return None
    words = source.resolve(generator, device)  # type: ignore[arg-type]
    return Fill(t, op, x, y, words, *layout, t.numel(), device=device)


# `accepted`: the caller knows that `accepts(t)`.


def uniform(
    t: Tensor, a: object, b: object, generator: object, accepted: bool = False
) -> Fill | None:
    fill = _describe(t, "uniform", a, b, generator, accepted)
    if fill is None or fill.a > fill.b or 0 < fill.b - fill.a < _SMALLEST_RANGE:
        return None
    return fill


def normal(
    t: Tensor, mean: object, std: object, generator: object, accepted: bool = False
) -> Fill | None:
    fill = _describe(t, "normal", mean, std, generator, accepted)
    if fill is None or fill.b < 0:
        return None
    if fill.device >= 0 or (fill.items >= 16 and fill.layout == "contiguous"):
        return fill
    fill.op = "normal_pairs"
    if fill.rank == 0:  # the kernel for pairs addresses every element
        fill.rank, fill.shape = 1, (fill.items, 0, 0, 0, 1, 0, 0, 0)
    return fill


def trunc_normal(
    t: Tensor, mean: object, std: object, a: object, b: object, generator: object
) -> Fill | None:
    """Where torch would reject proposals of normal_, which it does if most are inside [a, b]."""
    known = _truncated(t, mean, std, a, b, generator)
    if known is None:
        return None
    fill, low, high, p_below, p_above = known
    if not p_above - p_below > 0.3:
        return None
    fill.rests_on = "trunc_normal"
    # A smaller std would be rounded, or be no normal number, in float32.
    far = low < fill.a - _reach(fill) and high > fill.a + _reach(fill)
    if far and fill.b > _SMALLEST_RANGE:
        return fill  # no draw is rejected; that draws would be is what the other kind shows
    splits = (span(t) - 1) * t.element_size() + 1 > MOST_AT_ONCE
    if fill.device >= 0 and fill.layout == "strided" and splits:
        return None  # later draws go to a dense tensor, which torch splits elsewhere
    if fill.op == "normal":
        fill.op = "trunc_normal"
        fill.lo, fill.hi = (t.new_tensor(x, device="cpu").item() for x in (low, high))
        return fill
    return None


def trunc_erfinv(
    t: Tensor, mean: object, std: object, a: object, b: object, generator: object
) -> Fill | None:
    """The same of torch before 2.12: by the inverse of the distribution. On GPUs only."""
    known = _truncated(t, mean, std, a, b, generator)
    if known is None or known[0].device < 0:
        return None
    fill, low, high, p_below, p_above = known
    if not p_below < p_above:
        return None
    fill.op, fill.bumps, fill.lo, fill.hi = "trunc_erfinv", 5, low, high
    fill.mean, fill.scale = fill.a, fill.b * math.sqrt(2.0)
    fill.a, fill.b = 2 * p_below - 1, 2 * p_above - 1
    return fill


def _truncated(
    t: Tensor, mean: object, std: object, a: object, b: object, generator: object
) -> tuple[Fill, float, float, float, float] | None:
    """As normal; the bounds; what of the distribution lies below each. None: torch warns."""
    fill = normal(t, mean, std, generator)
    low, high = _number(a, t.dtype), _number(b, t.dtype)
    if fill is None or low is None or high is None or fill.b == 0:
        return None
    below, above = (low - fill.a) / fill.b, (high - fill.a) / fill.b
    # torch's own expressions for what it decides by.
    p_below, p_above = ((1.0 + math.erf(x / math.sqrt(2.0))) / 2.0 for x in (below, above))
    if fill.a < low - 2 * fill.b or fill.a > high + 2 * fill.b:
        return None
    fill.bounds = low, high
    return fill, low, high, p_below, p_above


def _reach(fill: Fill) -> float:
    """How far from the mean a draw can be: sqrt(-2 log u) with the smallest u > 0, and rounding."""
    float_words = fill.op == "normal" and fill.tensor.dtype is not torch.float64
    bits = 24 if float_words else 53
    if fill.device >= 0:  # (word + 1/2) / 2^32, or of 53 bits
        bits = 33 if float_words else 54
    reach = fill.b * math.sqrt(2 * bits * math.log(2)) * 1.001
    return reach + 2 * torch.finfo(fill.tensor.dtype).eps * (abs(fill.a) + reach)


def constant(t: Tensor, value: object, accepted: bool = False) -> Fill | None:
    fill = _describe(t, "constant", value, 0, None, accepted)
    if fill is not None:
        fill.generator = None
    return fill


def diagonal(t: Tensor, groups: int) -> Fill | None:
    """eye_ of a matrix (groups = 0), dirac_ of 3 to 5 dimensions."""
    fill = constant(t, 0)
    if fill is None or fill.layout != "contiguous" or type(groups) is not int or groups < 0:
        return None
    fill.op, fill.shape = "diagonal", diagonal_of(t.shape, groups)
    if groups != 0:
        fill.bumps = 1 + groups * fill.shape[2]
    return fill


def diagonal_of(shape: Sequence[int], groups: int) -> tuple[int, ...]:
    """Diagonal of csrc/plan.h, for eye_ (groups = 0) and dirac_."""
    rows, columns = shape[:2]
    if groups == 0:
        return (columns, rows, min(rows, columns), 1, 0, 0, 0, 0)
    space = math.prod(shape[2:])
    centre = 0
    for size in shape[2:]:
        centre = centre * size + size // 2
    channels = min(rows // groups, columns)
    return (columns * space, rows // groups, channels, space, centre, 0, 0, 0)


def sparse_mask(t: Tensor, zeros: int) -> Fill | None:
    """The zeros of sparse_; torch draws them from the default generator whatever is asked for."""
    rows, columns = t.shape
    fill = constant(t, 0)
    if fill is None or fill.device >= 0 or fill.layout != "contiguous":
        return None
    if not 0 <= zeros <= rows <= 1 << 16:
        return None
    fill.op, fill.generator = "sparse_mask", source.resolve(None, -1)
    fill.items = fill.bumps = columns
    fill.shape = (rows, zeros, columns, 0, 0, 0, 0, 0)
    return fill


def sparse(t: Tensor, std: object, zeros: int, generator: object) -> Fill | None:
    """Normals and zeros of sparse_ together, on a GPU."""
    rows, columns = t.shape
    fill = normal(t, 0.0, std, generator)
    if fill is None or fill.device < 0 or fill.layout != "contiguous":
        return None
    if not 0 <= zeros <= rows <= 1 << 16:
        return None
    fill.op, fill.zeros, fill.bumps = "sparse", zeros, 1 + columns
    return fill


def orthogonal(
    t: Tensor, gain: object, generator: object, rows: int, count: int = 1
) -> Fill | None:
    """`count` matrices of normals, drawn at once, and their orthogonal factors times gain."""
    fill = normal(t, 0.0, 1.0, generator)
    if fill is None or not t.is_contiguous():
        return None
    scale = gain_of(gain)
    if scale is None or (count == 1 and is_narrow(rows, fill.items // rows, t.dtype)):
        return None
    fill.op, fill.scale, fill.bumps, fill.rank = "orthogonal", scale, 2, 0
    fill.shape = (rows, fill.items // count // rows, count, 0, 0, 0, 0, 0)
    return fill


def is_narrow(rows: int, cols: int, dtype: torch.dtype) -> bool:
    """A few columns, of which ours would work on sixteen; torch does not for 16-bit types."""
    small, large = sorted((rows, cols))
    return 1 < small <= 16 and large >= 4096 and dtype.itemsize > 2


def gain_of(gain: object) -> float | None:
    """A number, also one of numpy's, that torch multiplies with."""
    if isinstance(gain, int):
        return float(gain) if -(1 << 63) <= gain < 1 << 64 else None  # torch refuses others
    fraction = isinstance(gain, Rational) and not isinstance(gain, Integral)
    return float(gain) if isinstance(gain, Real) and not fraction else None


def normals_of(fill: Fill, t: Tensor) -> Fill:
    """What an orthogonal fill draws, to go to a tensor of as many elements."""
    drawn = Fill(t, "normal", 0.0, 1.0, fill.generator, items=fill.items, flavour=fill.flavour)
    drawn.device, drawn.state = fill.device, fill.state
    if fill.device < 0 and fill.items < 16:
        drawn.op, drawn.rank, drawn.shape = "normal_pairs", 1, (fill.items, 0, 0, 0, 1, 0, 0, 0)
    return drawn


# ---- geometry ------------------------------------------------------------------------------------


def extent(fill: Fill) -> tuple[int, int]:
    """First byte and the one behind the last."""
    t = fill.tensor
    begin = address_of(t)
    items = span(t) if fill.layout == "strided" else t.numel()
    return begin, begin + items * t.element_size()


def in_storage(t: Tensor) -> tuple[int, int]:
    """The same, counted from the beginning of a tensor's storage."""
    size, begin, items = t.element_size(), int(t.storage_offset()), t.numel()
    return size * begin, size * (begin + (items if t.is_contiguous() else span(t)))


def place(t: Tensor) -> tuple[object, ...]:
    """What changes when a tensor gets other memory or another shape."""
    return address_of(t), t.shape, t.stride(), t.dtype


def span(t: Tensor) -> int:
    """From its first element in memory to its last, in elements. It has some."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))


def is_dense(fill: Fill) -> bool:
    """Whether it writes every byte of its extent."""
    return fill.rank == 0 and fill.op != "sparse_mask"


class Room:
    """Memory that the fills of a stage write, none of which may overlap."""

    def __init__(self) -> None:
        # Sorted: first byte, end, position in the stage, whether it may be left out.
        self._taken: list[tuple[int, int, int, bool]] = []

    def take(
        self, fill: Fill, extent: tuple[int, int], position: int, droppable: bool
    ) -> list[int] | None:
        """Positions of fills that it overwrites completely; None: a new stage has to begin."""
        first, last = extent
        dropped = []
        at = max(0, bisect_left(self._taken, (first, -1, -1, False)) - 1)
        while at < len(self._taken) and self._taken[at][0] < last:
            begin, end, other, may_go = self._taken[at]
            if end <= first:
                at += 1
            elif may_go and is_dense(fill) and first <= begin and end <= last:
                dropped.append(other)
                del self._taken[at]
            else:
                return None
        insort(self._taken, (first, last, position, droppable))
        return dropped
