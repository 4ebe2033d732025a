# SPDX-License-Identifier: BSD-3-Clause
"""From tensors to packed descriptors: checks, order, words, overlap. No kernel decides anything.

A `Fill` is one tensor with what is to be written into it. `run` takes fills in the order torch
would have executed them and hands them to the compiled module in as few calls as that order allows.
This is the only module that takes the addresses of tensors.
"""

from __future__ import annotations

import math
import struct
import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastinit import backend, source

MIN_NATIVE = 8192  # single calls on fewer elements go to torch, whose call costs less

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_LARGEST = {torch.float16: 3e4}  # |parameters| up to here cannot leave the dtype's range,
_LARGEST_OTHER = 1e37  # nor can the difference of two
_SMALLEST_RANGE = 1e-30  # of uniform_: the 2^24th part of it is a normal float32
OPS = ("constant", "diagonal", "uniform", "normal", "normal_pairs", "trunc_normal", "sparse_mask")
_OP_CODE = {op: code for code, op in enumerate(OPS)}
_PACK = struct.Struct("<QQddddQiBBBB8q")  # FillDesc of csrc/plan.h
_DENSE = (0,) * 8
NO_TENSOR = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in DTYPES}
_address = Tensor.data_ptr  # as it is now: hooks.py replaces it
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
    shape: tuple[int, ...] = _DENSE  # FillDesc's union
    items: int = 0
    lo: float = 0.0
    hi: float = 0.0
    flavour: int = 0
    rests_on: str = ""  # an operator that has to be proved as well
    bumps: int = 1  # of the tensor's version counter
    counter: Tensor | None = None  # whose version counter, if not the tensor's own
    extent: tuple[int, int] = (0, 0)  # of its bytes when it was recorded: in memory or in a storage
    state: Tensor | None = None  # of the generator, if its words were drawn ahead
    caller: tuple[str, tuple[tuple[str, object], ...]] | None = None  # for reports: name, arguments


# ---- what the kernels can take -------------------------------------------------------------------


class Recorder(Protocol):
    """Takes what would otherwise be run at once."""

    modes: int  # how many dispatch modes it has put on torch's stack
    takes_small: bool  # also fills of fewer than MIN_NATIVE elements

    def add(self, fills: list[Fill]) -> None: ...
    # `overwrites`: all of the tensor
    def call(self, function: partial[Any], tensor: Tensor, overwrites: bool) -> None: ...


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


def accepts(t: Tensor) -> bool:
    """Plain CPU memory that torch.nn.init would write without a word about it."""
    return (
        t.dtype in DTYPES
        and t.device.type == "cpu"
        and t.layout is torch.strided
        and not (t.is_nested or t.is_neg() or t.is_inference() or t._is_zerotensor())
        and not torch._is_functional_tensor(t)
        and _address(t) != 0  # of a storage that was given back
    )


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
    if not (accepted or accepts(t)) or not source.is_supported(generator):
        return None
    x, y = _number(a, t.dtype), _number(b, t.dtype)
    layout = layout_of(t)
    if x is None or y is None or layout is None or t.numel() == 0:
        return None
    return Fill(t, op, x, y, source.resolve(generator), *layout, t.numel())  # type: ignore[arg-type]


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
    if fill.items >= 16 and fill.layout == "contiguous":
        return fill
    fill.op = "normal_pairs"
    if fill.rank == 0:  # the kernel for pairs addresses every element
        fill.rank, fill.shape = 1, (fill.items, 0, 0, 0, 1, 0, 0, 0)
    return fill


def trunc_normal(
    t: Tensor, mean: object, std: object, a: object, b: object, generator: object
) -> Fill | None:
    """Where torch would reject proposals of normal_, which it does if most are inside [a, b]."""
    fill = normal(t, mean, std, generator)
    low, high = _number(a, t.dtype), _number(b, t.dtype)
    if fill is None or low is None or high is None or fill.b == 0:
        return None
    below, above = (low - fill.a) / fill.b, (high - fill.a) / fill.b
    # torch's own expressions for what it decides by.
    p_below, p_above = ((1.0 + math.erf(x / math.sqrt(2.0))) / 2.0 for x in (below, above))
    warns = fill.a < low - 2 * fill.b or fill.a > high + 2 * fill.b
    if warns or not p_above - p_below > 0.3:
        return None
    fill.rests_on = "trunc_normal"
    # A smaller std would be rounded, or be no normal number, in float32.
    far = low < fill.a - _reach(fill) and high > fill.a + _reach(fill)
    if far and fill.b > _SMALLEST_RANGE:
        return fill  # no draw is rejected; that draws would be is what the other kind shows
    if fill.op == "normal":
        fill.op = "trunc_normal"
        fill.lo, fill.hi = (t.new_tensor(x, device="cpu").item() for x in (low, high))
        return fill
    return None


def _reach(fill: Fill) -> float:
    """How far from the mean a draw can be: sqrt(-2 log u) with the smallest u > 0, and rounding."""
    float_words = fill.op == "normal" and fill.tensor.dtype is not torch.float64
    bits = 24 if float_words else 53
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
    rows, columns = t.shape[:2]
    fill.op = "diagonal"
    if groups == 0:
        fill.shape = (columns, rows, min(rows, columns), 1, 0, 0, 0, 0)
        return fill
    space = math.prod(t.shape[2:])
    centre = 0
    for size in t.shape[2:]:
        centre = centre * size + size // 2
    channels = min(rows // groups, columns)
    fill.shape = (columns * space, rows // groups, channels, space, centre, 0, 0, 0)
    fill.bumps = 1 + groups * channels
    return fill


def sparse_mask(t: Tensor, zeros: int) -> Fill | None:
    """The zeros of sparse_; torch draws them from the default generator whatever is asked for."""
    rows, columns = t.shape
    fill = constant(t, 0)
    if fill is None or fill.layout != "contiguous" or not 0 <= zeros <= rows <= 1 << 16:
        return None
    fill.op, fill.generator = "sparse_mask", source.resolve(None)
    fill.items = fill.bumps = columns
    fill.shape = (rows, zeros, columns, 0, 0, 0, 0, 0)
    return fill


# ---- running -------------------------------------------------------------------------------------


def words_drawn(fill: Fill, cached: bool) -> int:
    """32-bit words torch draws for it; `cached`: the generator holds a second normal sample."""
    n = fill.items
    per_item = 2 if fill.tensor.dtype is torch.float64 else 1
    if fill.op == "uniform":
        return n * per_item
    if fill.op == "normal":  # the last 16 elements are drawn again if the size is no multiple
        if fill.tensor.element_size() == 2:
            return (n + 15) // 16 * 16
        return (n + (16 if n % 16 else 0)) * per_item
    if fill.op == "normal_pairs":
        return (n - cached + 1) // 2 * 4
    if fill.op == "sparse_mask":
        return n * (fill.shape[0] - 1)
    return 0


def extent(fill: Fill) -> tuple[int, int]:
    """First byte and the one behind the last."""
    t = fill.tensor
    begin = _address(t)
    items = span(t) if fill.layout == "strided" else t.numel()
    return begin, begin + items * t.element_size()


def place(t: Tensor) -> tuple[object, ...]:
    """What changes when a tensor gets other memory or another shape."""
    return _address(t), t.shape, t.stride(), t.dtype


def span(t: Tensor) -> int:
    """From its first element in memory to its last, in elements. It has some."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))


def is_dense(fill: Fill) -> bool:
    """Whether it writes every byte of its extent."""
    return fill.rank == 0 and fill.op != "sparse_mask"


def _pack(fill: Fill, address: int, word: int, src: int, cached: bool) -> bytes:
    return _PACK.pack(
        address, fill.items, fill.a, fill.b, fill.lo,
        float(cached) if fill.op == "normal_pairs" else fill.hi,
        word, src, _OP_CODE[fill.op], DTYPES[fill.tensor.dtype], fill.flavour, fill.rank,
        *fill.shape,
    )  # fmt: skip


class _Stage:
    """Fills that touch different memory and whose words are known: one native call."""

    def __init__(self, states: list[source.State], index: dict[int, int], alone: bool) -> None:
        self._states, self._index, self._alone = states, index, alone
        self._begin()

    def _begin(self) -> None:
        self._packed: list[bytes | None] = []
        # Sorted: first byte, end, position in _packed, whether it may be left out.
        self._extents: list[tuple[int, int, int, bool]] = []
        self._words = [0] * len(self._states)
        self._cached = [s.has_cached_normal for s in self._states]
        self._made_cached = [False] * len(self._states)  # in this stage: its value is not known yet

    def add(self, fill: Fill) -> int:
        """How many times the tensor's version goes up."""
        src = -1 if fill.generator is None else self._index[source.key_of(fill.generator)]
        if fill.op == "trunc_normal":  # how many words it draws depends on their values
            self.flush()
            packed = _pack(fill, _address(fill.tensor), 0, src, False)
            rounds = backend.run_trunc(packed, self._states[src].address)
            return fill.bumps + (rounds > 1)  # torch copies the result of later rounds
        pairs = fill.op == "normal_pairs"
        if pairs and self._cached[src] and self._made_cached[src]:
            self.flush()
        begin, end = extent(fill)
        if not self._alone:
            self._make_room(fill, begin, end)
            insort(self._extents, (begin, end, len(self._packed), not pairs))
        if src < 0:
            self._packed.append(_pack(fill, begin, 0, src, False))
            return fill.bumps
        cached = pairs and self._cached[src]
        self._packed.append(_pack(fill, begin, self._words[src], src, cached))
        self._words[src] += words_drawn(fill, cached)
        if pairs:
            self._cached[src] = (fill.items - cached) % 2 != 0
            self._made_cached[src] = True
        return fill.bumps

    def _make_room(self, fill: Fill, first: int, last: int) -> None:
        """No two fills of a stage may overlap. One that is overwritten completely is not done."""
        at = bisect_left(self._extents, (first, -1, -1, False))
        for i in (at - 1, at):
            if not 0 <= i < len(self._extents):
                continue
            begin, end, position, droppable = self._extents[i]
            if end <= first or last <= begin:
                continue
            if not (droppable and is_dense(fill) and first <= begin and end <= last):
                return self.flush()
            self._packed[position] = None
            del self._extents[i]
            return self._make_room(fill, first, last)

    def flush(self) -> None:
        packed = b"".join(p for p in self._packed if p is not None)
        if packed or any(self._words):
            backend.run(packed, [s.address for s in self._states], self._words)
        self._begin()


def run(fills: Sequence[Fill]) -> None:
    """Do the fills as if torch had done them one by one."""
    generators = {source.key_of(f.generator): f.generator for f in fills if f.generator is not None}
    index = {key: i for i, key in enumerate(generators)}
    bumps: list[int] = []

    def work(states: list[source.State]) -> None:
        bumps.clear()
        stage = _Stage(states, index, len(fills) == 1)
        for fill in fills:
            bumps.append(stage.add(fill))
        stage.flush()

    try:
        source.draw(list(generators.values()), work)
    finally:
        counters = [f.tensor if f.counter is None else f.counter for f in fills]
        written = [t for t, times in zip(counters, bumps) for _ in range(times)]
        torch.autograd.graph.increment_version(written)


def run_ahead(fills: Sequence[tuple[Fill, torch.UntypedStorage]]) -> None:
    """Do fills whose words were drawn ahead, in one native call. None may overlap another."""
    states = [_address(fill.state) for fill, _ in fills if fill.state is not None]
    packed, src = [], -1
    for fill, storage in fills:
        address = storage.data_ptr() + fill.extent[0]
        src += fill.state is not None
        packed.append(_pack(fill, address, 0, -1 if fill.state is None else src, False))
    backend.run(b"".join(packed), states, [0] * len(states))
