# SPDX-License-Identifier: BSD-3-Clause
"""Where the elements in this rank's memory stand in the whole parameter. Integers only.

Nothing communicates, reads an element or calls an operator: tensors of any device will do, meta
included, and dispatch modes see nothing. The elements of a complex tensor are its real and
imaginary parts, as of what view_as_real makes of it.
"""

from __future__ import annotations

import itertools
import operator
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastinit.core import torch_api
from fastinit.core.geometry import PLAIN, in_reals

MOST_DIMS = 5
_GIVEN = "a DTensor knows its global shape and offset: neither can be given"
_Runs = list[range]  # consecutive indices in one dimension, as they lie in memory
_Cut = tuple[int, int, int]  # into how many pieces, which is here, split factor
_Dims = tuple[tuple[int, int, int], ...]  # (size, memory stride, index step)
_stride, _step = operator.itemgetter(1), operator.itemgetter(2)


class Slab(NamedTuple):
    """A box of elements whose places in memory and in the whole parameter are both affine."""

    offset: int  # elements from the local tensor's first one to the slab's first one
    index: int  # type: ignore[assignment]  # of its first element in the whole, row-major
    # Smallest step first, merged, at most MOST_DIMS; sizes > 1, but one element has ((1, 1, 1),).
    dims: _Dims


class Piece(NamedTuple):
    """Elements of a region of the whole parameter that this rank has."""

    here: Tensor  # a view of its memory
    whole: list[Slab]  # where they stand in the whole, in memory after the first one of `here`
    region: list[Slab]  # likewise in the region
    begin: int  # in the region, row-major: the first one
    steps: tuple[int, ...]  # from there on, for each dimension of `here`

    def of(self, t: Tensor) -> Tensor:
        """Return the same elements of a dense tensor of the region's shape, or a single one."""
        if t.dim() == 0:
            return t
        return t.as_strided(self.here.shape, self.steps, int(t.storage_offset()) + self.begin)


def is_distributed(t: object) -> bool:
    """Return whether it is a DTensor, without importing its module, which takes a second."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(t, kind)


def local(t: Any) -> Tensor:
    """Return what is in this rank's memory; no collective, no autograd."""
    return torch_api.local_tensor(t) if is_distributed(t) else t


def overlaps(t: Tensor) -> bool:
    """Return whether elements share memory."""
    return _layout(t.shape, t.stride()) is None


def global_shape(t: Tensor, given: Sequence[int] | None = None) -> torch.Size:
    """Return the shape of the whole parameter; `given` is that of which a plain t is a part."""
    if given is not None and is_distributed(t):
        raise ValueError(_GIVEN)
    return t.shape if given is None else torch.Size(map(operator.index, given))


def slabs(
    t: Tensor, global_shape: Sequence[int] | None = None, offset: Sequence[int] | None = None
) -> list[Slab]:
    """Return the slabs of local(t); a plain t is the part at `offset` in a `global_shape`."""
    if global_shape is None and offset is None and type(t) in PLAIN and t.is_contiguous():
        items = t.numel() * (2 if t.dtype.is_complex else 1)
        return [Slab(0, 0, ((items, 1, 1),))] if items else []  # most are like this
    (whole, held), here = _held(t, global_shape, offset), local(t)
    if held is None or 0 in here.shape:
        return []
    if _layout(here.shape, here.stride()) is None:
        raise ValueError("elements of the tensor share memory: they have no index of their own")
    found, unit = [Slab(0, 0, ())], 1
    if here.dtype.is_complex:
        whole, held = torch.Size((*whole, 2)), [*held, [range(2)]]
    for length, stride, runs in zip(whole[::-1], in_reals(here)[2][::-1], held[::-1]):
        ways = list(_together(runs, stride, unit))
        found = [Slab(m + n, i + j, a + b) for m, i, a in found for n, j, b in ways]
        unit *= length
    return [s for slab in found for s in _tidy(slab)]


def part(p: Tensor, begin: int, sizes: Sequence[int], strides: Sequence[int]) -> list[Slab] | None:
    """Return the slabs of a strided region of local(p)'s memory, `begin` elements after its first.

    Offsets count from the region's own first element. None: it is neither all of p nor a box in one
    slab of p.
    """
    if 0 in sizes:
        return []
    found, here, region = slabs(p), local(p), _layout(sizes, strides)
    if region is None:
        return None
    if found and begin == 0 and region == _layout(*in_reals(here)[1:]):
        return found
    return next(filter(None, (_inside(slab, begin, region) for slab in found)), None)


def of_region(t: Tensor, begin: int, strides: Sequence[int]) -> list[Slab]:
    """Return where the elements of a plain tensor stand that is all of a region of the whole."""
    double = 2 if t.dtype.is_complex else 1
    parts = ((2, 1, 1),) * (double - 1)
    dims = ((n, double * m, double * j) for n, m, j in zip(t.shape, t.stride(), strides))
    return _tidy(Slab(0, double * begin, (*parts, *dims)))


def pieces(t: Any, begin: int, sizes: Sequence[int], strides: Sequence[int]) -> list[Piece] | None:
    """Return what this rank has of a strided region of the whole, which is counted row-major.

    None: the region is not made of ranges of indices of each dimension.
    """
    if 0 in sizes:
        return []
    units = _row_major(t.shape)
    ways = _ways(t.shape, units, begin, list(zip(sizes, strides, _row_major(sizes))))
    if ways is None:
        return None
    held, here = _held(t, None, None)[1], local(t).detach()
    if held is None:
        return []
    double = 2 if here.dtype.is_complex else 1
    parts = ((2, 1, 1),) * (double - 1)
    found = []
    for cut in itertools.product(*map(_kept, ways, held)):
        sizes = [len(indices) for _, indices, _, _ in cut]
        far = [stride * c[1].step for stride, c in zip(here.stride(), cut)]
        at = sum(stride * place for stride, (place, *_) in zip(here.stride(), cut))
        index = sum(first for _, _, first, _ in cut)
        whole = sum(unit * indices.start for unit, (_, indices, _, _) in zip(units, cut))
        steps = [unit * indices.step for unit, (_, indices, _, _) in zip(units, cut)]
        inner = tuple(step for *_, step in cut)
        in_whole, in_region = (
            _tidy(Slab(0, double * i, (*parts, *((n, double * m, double * j) for n, m, j in dims))))
            for i, dims in ((whole, zip(sizes, far, steps)), (index, zip(sizes, far, inner)))
        )
        view = here.as_strided(sizes, far, int(here.storage_offset()) + at)
        found.append(Piece(view, in_whole, in_region, index, inner))
    return found


# Consecutive or equally distant indices of a dimension, where in the region the first of them
# stands, and how far apart they are there.
_Way = tuple[range, int, int]


def _ways(
    shape: Sequence[int], units: Sequence[int], begin: int, region: list[tuple[int, int, int]]
) -> list[list[_Way]] | None:
    """Return for each dimension of a whole what of it a region has.

    `region`: size, stride in the whole and stride in the region of each dimension.
    """
    starts, axes = [], [[] for _ in shape]  # type: ignore[var-annotated]
    for unit in units:
        start, begin = divmod(begin, unit)
        starts.append(start)
    todo = [dim for dim in region if dim[0] > 1]
    while todo:
        n, stride, step = todo.pop()
        d = next((d for d, unit in enumerate(units) if shape[d] > 1 and unit <= stride), None)
        if d is None or stride % units[d]:
            return None
        far = stride // units[d]
        turn, left = divmod(shape[d], far)
        if n <= turn + (left > 0):
            axes[d].append((far, n, step))
        elif left == 0 and turn > 1 and n % turn == 0:  # it goes on along the dimension before
            todo += [(turn, stride, step), (n // turn, turn * stride, turn * step)]
        else:
            return None
    found = []
    for length, start, axis in zip(shape, starts, axes):
        reach, ways = 1, [(range(start, start + 1), 0, 1)]
        for far, n, step in sorted(axis):
            if far < reach:
                return None  # indices that come more than once
            reach += (n - 1) * far
            if len(ways) == len(ways[0][0]) == 1:
                ways = [(range(start, start + n * far, far), 0, step)]
            else:
                ways = [
                    (range(r.start + i * far, r.stop + i * far, r.step), first + i * step, inner)
                    for i in range(n)
                    for r, first, inner in ways
                ]
        if start + reach > length:
            return None
        found.append(ways)
    return found


def _kept(ways: list[_Way], runs: _Runs) -> Iterator[tuple[int, range, int, int]]:
    """Yield what is here of the indices of one dimension, each time after its place in memory."""
    place = 0
    for run in runs:
        for indices, first, step in ways:
            low = max(0, -(-(run.start - indices.start) // indices.step))
            high = max(0, -(-(run.stop - indices.start) // indices.step))
            if cut := indices[low:high]:
                yield place + cut.start - run.start, cut, first + low * step, step
        place += len(run)


def _row_major(sizes: Sequence[int]) -> list[int]:
    strides = [1]
    for n in sizes[:0:-1]:
        strides.append(strides[-1] * max(n, 1))
    return strides[: len(sizes)][::-1]


def _held(
    t: Tensor, shape: Sequence[int] | None, offset: Sequence[int] | None
) -> tuple[torch.Size, list[_Runs] | None]:
    """Return the shape of the whole, and what of each dimension is here; None: nothing."""
    whole, n = global_shape(t, shape), t.dim()
    if shape is None and offset is not None:
        raise ValueError(_GIVEN if is_distributed(t) else "an offset needs a global_shape")
    if is_distributed(t):
        return whole, _placed(t, local(t))
    at = [0] * len(whole) if offset is None else [operator.index(a) for a in offset]
    if not n == len(whole) == len(at):
        raise ValueError(f"{n} dimensions at an offset of {len(at)} in a whole of {len(whole)}")
    if any(a < 0 or a + size > length for a, size, length in zip(at, t.shape, whole)):
        raise ValueError(f"{list(t.shape)} at {at} reaches beyond a whole of {list(whole)}")
    return whole, [[range(a, a + size)] for a, size in zip(at, t.shape)]


def _placed(t: Any, here: Tensor) -> list[_Runs] | None:
    from torch.distributed.tensor import Replicate, Shard

    strided_shard = torch_api.strided_shard()

    what = f"{t.placements} on a mesh of {tuple(t.device_mesh.shape)}"
    kinds = {type(p) for p in t.placements}
    if not kinds <= {Replicate, Shard, strided_shard}:
        raise NotImplementedError(f"{what}: only Shard and Replicate leave elements as they are")
    at = t.device_mesh.get_coordinate()
    if at is None or here.numel() == 0:
        return None
    # Cut along one mesh dimension after the other, unless redistribute was told another order.
    order = None if strided_shard in kinds else torch_api.shard_order(t)
    cuts: list[list[_Cut]] = [[] for _ in t.shape]
    for m in range(len(at)) if order is None else [m for entry in order for m in entry.mesh_dims]:
        if type(p := t.placements[m]) is not Replicate:
            factor = int(p.split_factor) if type(p) is strided_shard else 1
            cuts[p.dim].append((t.device_mesh.size(m), at[m], factor))
    held = []
    for size, length, cut in zip(here.shape, t.shape, cuts):
        ways = [_pieces(length, way) for way in _orders(cut)]
        held.append([runs for runs in ways if sum(map(len, runs)) == size])
    if here.dim() != t.dim() or any(not fit or fit[0] != fit[-1] for fit in held):
        what += f" do not say which {list(here.shape)} of {list(t.shape)} this rank has"
        raise NotImplementedError(what)
    return [fit[0] for fit in held]


def _orders(cuts: list[_Cut]) -> list[list[_Cut]]:
    """Yield the orders of cuts: left to right; _StridedShard after those that its factor counts."""
    # If sizes are uneven these can be different elements: of 27 rows, 4 x TP and 3 x FSDP, say.
    told: list[_Cut] = []
    for count, which, factor in reversed(cuts):
        before = list(itertools.accumulate((c for c, _, _ in told), operator.mul, initial=1))
        if factor not in before:
            return [cuts]
        told.insert(before.index(factor), (count, which, 1))
    return [cuts, told]


def _pieces(length: int, cuts: list[_Cut]) -> _Runs:
    runs = [range(length)]
    for count, which, factor in cuts:  # _StridedShard: of each of `factor` pieces
        pieces = [_piece(_piece(runs, factor, i), count, which) for i in range(factor)]
        runs = []
        for run in itertools.chain(*pieces):
            joins = runs and runs[-1].stop == run.start
            runs.append(range(runs.pop().start, run.stop) if joins else run)
    return runs


def _piece(runs: _Runs, count: int, which: int) -> _Runs:
    """Return runs as torch.chunk cuts: equal pieces, then a smaller one, then empty ones."""
    size = -(-sum(map(len, runs)) // count)
    low, high, found = which * size, which * size + size, []
    for run in runs:
        found.append(run[max(low, 0) : max(high, 0)])
        low, high = low - len(run), high - len(run)
    return [run for run in found if run]


def _together(runs: _Runs, stride: int, unit: int) -> Iterator[Slab]:
    """Join the runs of one dimension that have the same length and distance."""
    low = 0
    while runs:
        run, n, many = runs[0], len(runs[0]), 1
        far = runs[1].start - run.start if runs[1:] else 0
        while runs[many : many + 1] == [range(run.start + many * far, run.stop + many * far)]:
            many += 1
        dims = ((n, stride, unit), (many, n * stride, far * unit))
        yield Slab(low * stride, run.start * unit, dims)
        low, runs = low + many * n, runs[many:]


def _layout(sizes: Iterable[int], strides: Iterable[int]) -> _Dims | None:
    """Return sizes and strides, merged, by stride; None: elements may share memory."""
    dims = _merged(sorted(((n, s, s) for n, s in zip(sizes, strides)), key=_stride))
    reach = itertools.accumulate(((n - 1) * stride for n, stride, _ in dims), initial=1)
    return None if any(dim[1] < least for dim, least in zip(dims, reach)) else dims


def _merged(dims: Iterable[tuple[int, int, int]]) -> _Dims:
    found: list[tuple[int, int, int]] = []
    for dim in (dim for dim in dims if dim[0] > 1):
        n, stride, step = found[-1] if found else dim
        if found and dim[1:] == (n * stride, n * step):
            found[-1] = (n * dim[0], stride, step)
        else:
            found.append(dim)
    return tuple(found)


def _tidy(slab: Slab) -> list[Slab]:
    """Merge the dimensions of a slab; cut it along the smallest as long as there are too many."""
    at, index, dims = slab.offset, slab.index, _merged(sorted(slab.dims, key=_step))
    if len(dims) <= MOST_DIMS:
        return [Slab(at, index, dims or ((1, 1, 1),))]
    n, stride, step = min(dims)
    rest = tuple(dim for dim in dims if dim != (n, stride, step))
    return [s for i in range(n) for s in _tidy(Slab(at + i * stride, index + i * step, rest))]


def _inside(slab: Slab, begin: int, region: _Dims) -> list[Slab] | None:
    """Return the slabs of a region of memory within a slab; None if it is no box of it."""
    axes, dims, index = sorted(slab.dims, key=_stride), [], slab.index
    ends = [0] * len(axes)  # how far it goes on each axis
    todo = [dim[:2] for dim in region]
    while todo:
        size, stride = todo.pop()
        d = bisect_right(axes, stride, key=_stride) - 1
        n, axis, step = axes[d]
        if stride % axis:  # or smaller than all, d = -1
            return None
        turn = n * axis // stride
        if 1 < turn < size and size % turn == 0:  # it goes on along the next one
            todo += [(turn, stride), (size // turn, turn * stride)]
        else:
            dims.append((size, stride, stride // axis * step))
            ends[d] += (size - 1) * stride // axis
    begin -= slab.offset
    for (n, axis, step), end in list(zip(axes, ends))[::-1]:
        at, begin = divmod(begin, axis)
        if not 0 <= at < n - end:
            return None
        index += at * step
    return None if begin else _tidy(Slab(0, index, tuple(dims)))
