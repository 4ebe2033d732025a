# SPDX-License-Identifier: BSD-3-Clause
"""Pointwise operators and conversions behind fills that wait, done again by torch's own operators.

A wide tensor that is only converted exists in pieces, where these are seen to give torch's bits.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastinit import execute
from fastinit.capture.pending import Stage, stages_of
from fastinit.capture.waiting import Cast, Chain, Step, view
from fastinit.core import geometry, kernels
from fastinit.core.fill import Drawn

_SCRATCH = 1 << 22  # bytes of wide memory that conversions share, if they can be cut

Write = Callable[[Stage], None]


# ---- operators -----------------------------------------------------------------------------------


def step(operator: Any, dtype: torch.dtype, args: tuple[Any, ...], kwargs: Any) -> Step | None:
    """Return a pointwise operator as a step, if it cannot fail later; None if it could."""
    numbers = [x for x in (*args, *kwargs.values()) if x is not None and type(x) is not str]
    largest = geometry.largest(dtype)
    if any(type(x) not in (int, float) or not abs(x) <= largest for x in numbers):
        return None  # not NaN either
    new = Step(operator, args, kwargs)
    return new if _cut(new, dtype) is not None else None


_cuts: dict[Any, bool | None] = {}  # by operator, dtype, and the exponent of a power


def _cut(step: Step, dtype: torch.dtype) -> bool | None:
    """Return whether pieces give the bits of the whole; None if torch has no such operator."""
    operator, args, kwargs = step
    has_kinds = operator._schema.name == "aten::pow_"  # squares, roots and others
    key = (operator, dtype, len(args), *kwargs, *(args if has_kinds else ()))
    if key not in _cuts:
        _cuts[key] = _try(step, dtype)
    return _cuts[key]


def _try(step: Step, dtype: torch.dtype) -> bool | None:
    with kernels.undisturbed(), torch.inference_mode(False), torch.no_grad():
        whole = torch.linspace(-0.999, 0.999, 4099, dtype=torch.float64).to(dtype)
        ends = [0, 1024, 1088, 3072, 4099]
        cut = [whole[a:b].clone() for a, b in itertools.pairwise(ends)]
        try:
            for t in (whole, *cut):
                step.operator(t, *step.args, **step.kwargs)
        except (RuntimeError, TypeError, NotImplementedError):
            return None
        return bool(torch.equal(_bits(whole), torch.cat([_bits(t) for t in cut])))


def _bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _apply(todo: Sequence[tuple[Sequence[Step], Tensor]]) -> None:
    """Do steps to tensors, of which no two overlap: arithmetic natively, for all in one call.

    What torch does comes first, for all: its threads spin for milliseconds after each operator.
    """
    left = [(t, deque(steps)) for steps, t in todo]
    while left:
        together: list[tuple[Tensor, execute.Arithmetic]] = []
        for t, steps in left:
            while steps and execute.arithmetic(t, *steps[0]) is None:
                operator, args, kwargs = steps.popleft()
                operator(t, *args, **kwargs)
            found: list[tuple[int, float]] = []
            while steps and (known := execute.arithmetic(t, *steps[0])) is not None:
                found += known
                steps.popleft()
            if found:
                together.append((t, (*found,)))
        if together:
            execute.run_arithmetic(together)
        left = [(t, steps) for t, steps in left if steps]


def _is_cuttable(chain: Chain) -> bool:
    return chain.is_contiguous and all(_cut(step, chain.dtype) for step in chain.steps)


def run_chains(chains: Sequence[tuple[Chain, torch.UntypedStorage]]) -> None:
    """Do the operators of each chain, of which no two may overlap.

    On all of a tensor, one after the other: in pieces that stay in the cache 4 M elements took as
    long, since torch's threads meet at each piece.
    """
    with kernels.undisturbed(), torch.no_grad():
        _apply([(chain.steps, view(storage, chain.dtype, chain.box)) for chain, storage in chains])


# ---- conversions ---------------------------------------------------------------------------------


def run_casts(casts: Sequence[tuple[Cast, torch.UntypedStorage]], write: Write) -> None:
    """Write what waited elsewhere in another dtype, of which no two may overlap."""
    cut = []
    for cast, storage in casts:
        parts = _parts(cast)
        if parts is None:
            _run_whole(cast, storage, write)
        else:
            cut.append((cast, storage, *parts))
    if cut:
        _run_cut(cut)


def _run_whole(cast: Cast, storage: torch.UntypedStorage, write: Write) -> None:
    with kernels.undisturbed(), torch.no_grad():
        wide = torch.empty(cast.items, dtype=cast.source_dtype, device=storage.device)
        for stage in stages_of([(geometry.storage_of(wide), cast.source)]):
            write(stage)
        view(storage, cast.dtype, (0, (cast.items,), (1,))).copy_(wide)


def _parts(cast: Cast) -> tuple[Drawn, tuple[Step, ...]] | None:
    """Return fill and operators of what can be made in pieces; None: it cannot."""
    fill, *chains = cast.source
    if not isinstance(fill, Drawn) or not execute.is_cuttable(fill):
        return None
    steps: list[Step] = []
    for chain in chains:
        whole = isinstance(chain, Chain) and chain.items == cast.items
        if not whole or not _is_cuttable(chain):  # type: ignore[arg-type]
            return None
        steps += chain.steps  # type: ignore[union-attr]
    return fill, tuple(steps)


def _run_cut(
    casts: Sequence[tuple[Cast, torch.UntypedStorage, Drawn, tuple[Step, ...]]],
) -> None:
    """Fill wide memory of a fixed size in one native call, convert it, and begin again."""
    with kernels.undisturbed(), torch.no_grad():
        scratch = torch.empty(_SCRATCH, dtype=torch.uint8)
        for batch in _batches(casts):
            at, parts, todo = 0, [], []
            for (cast, storage, fill, steps), begin, items in batch:
                end = at + items * cast.source_dtype.itemsize
                wide = scratch[at:end].view(cast.source_dtype)
                parts.append((fill, geometry.address_of(wide), begin, items))
                todo.append((wide, view(storage, cast.dtype, (begin, (items,), (1,))), steps))
                at = end + -end % 64
            execute.run_parts(parts)
            _apply([(steps, wide) for wide, _, steps in todo])
            for wide, narrow, _ in todo:
                narrow.copy_(wide)


def _batches(casts: Sequence[Any]) -> Iterator[list[tuple[Any, int, int]]]:
    """Yield what fits into the scratch together: each time some of (cast, first item, items)."""
    batch: list[tuple[Any, int, int]] = []
    room = _SCRATCH
    for what in casts:
        size, left, begin = what[0].source_dtype.itemsize, what[0].items, 0
        while left > 0:
            items = min(left, room // size)
            if items < left:
                items = items // 1024 * 1024  # where words, lines and vectors begin
                if left - items < 1024:
                    items -= 1024  # torch draws the last 16 of a tensor differently
            if items > 0:
                batch.append((what, begin, items))
                begin, left = begin + items, left - items
                room -= math.ceil(items * size / 64) * 64
            if left > 0:
                yield batch
                batch, room = [], _SCRATCH
    if batch:
        yield batch
