# SPDX-License-Identifier: BSD-3-Clause
"""What can wait in a storage: fills with torch's words, fills of the keyed stream, and what torch's
own operators do to them afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastinit.capture.names import Box, box_of
from fastinit.capture.written import Written
from fastinit.core import geometry, kernels
from fastinit.core.fill import Caller, Drawn
from fastinit.core.laws import Law
from fastinit.core.shard import Slab


class Owner(Protocol):
    """A storage, as far as it gives its keyed fills a name."""

    storage_id: int
    label: str


class Identity:
    """What a keyed fill shares with its copies, which must get the same values."""

    __slots__ = ("first", "former", "heirs", "label", "law", "line", "members")

    def __init__(self, owner: Owner, box: Box) -> None:
        self.label = ""  # that of the first member with a name, once some of it is written
        self.law: Law | None = None  # likewise
        self.first: int | None = None  # index of the matrix of which this is a part
        self.line = ""  # of code, which had it written before names were final
        self.members = [(owner, box)]
        self.former: list[tuple[Owner, Box]] = []  # where something else is now
        self.heirs: list[tuple[Owner, str]] = []  # what is computed of it; behind that one's name

    def leave(self, owner: Owner) -> None:
        at = [m[0] for m in self.members]
        if owner in at:  # once: it may hold a copy of what it held itself
            self.former.append(self.members.pop(at.index(owner)))

    def follow(self, by: Owner, to: Owner) -> None:
        """Let a copy of what was computed of it stand for it as what was copied does."""
        self.former += [(to, box) for owner, box in self.former if owner is by]
        self.heirs += [(to, suffix) for owner, suffix in self.heirs if owner is by]


class Place(NamedTuple):
    """Where the elements of a keyed fill stand in the stream."""

    key: int  # of Philox
    label: str  # what the key is made of; "" if nothing is drawn
    slabs: Sequence[Slab]  # of the whole parameter


@dataclass(slots=True, eq=False)
class KeyedFill:
    """A law for a part of a storage, whose key may not be known before it is written."""

    law: Law  # of real numbers: the parts of complex ones
    dtype: torch.dtype  # likewise
    box: Box  # in the storage, in elements
    extent: tuple[int, int]  # bytes of the storage: the first and the one behind the last
    is_dense: bool  # every byte of these is written
    items: int
    caller: Caller | None
    asked: tuple[Law, torch.dtype]  # before complex numbers were taken apart
    memory: Owner | None = None  # whose name, or label, gives the key; None: it was given
    identity: Identity | None = None  # likewise
    slabs: Sequence[Slab] | None = None  # that were given, without a key
    fallback: Sequence[Slab] | None = None  # used when no named parameter covers this memory
    first: int | None = None  # index of the matrix of which this is a part, in the parameter
    place: Place | None = None  # None: not before some of it is written

    @classmethod
    def of(cls, t: Tensor, law: Law, caller: Caller | None) -> KeyedFill:
        layout = geometry.layout_of(t)
        is_dense = layout is not None and layout[1] == 0
        box, extent, asked = box_of(t), geometry.in_storage(t), (law, t.dtype)
        items, dtype = t.numel(), t.dtype
        if dtype.is_complex:
            law, dtype, items = law.of_parts(), dtype.to_real(), 2 * items
        return cls(law, dtype, box, extent, is_dense, items, caller, asked)

    @property
    def op(self) -> str:
        return self.law.op

    @property
    def a(self) -> float:
        return float(self.law.numbers[0])

    def written(self) -> Written:
        """Return what is remembered of it."""
        (op, numbers, _), dtype = self.asked
        items = self.items * self.dtype.itemsize // dtype.itemsize
        a, b = (0.0, 0.0) if op == "diagonal" else (*numbers, 0.0)[:2]
        bounds = numbers[2:4] if op == "trunc_normal" else None
        key = self.place.label if self.place is not None and self.law.is_random else ""
        how = (op, a, b, items, dtype, self.extent, self.caller)
        return Written(*how, bounds, numbers[0], key)


class Step(NamedTuple):
    """A pointwise operator of torch's that writes its first argument, and the other arguments."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True, eq=False)
class Chain:
    """Pointwise operators for the same elements of a storage, one after the other."""

    steps: tuple[Step, ...]
    dtype: torch.dtype
    box: Box  # in the storage, in elements
    extent: tuple[int, int]  # bytes of the storage: the first and the one behind the last
    is_contiguous: bool
    items: int
    is_dense = False  # what was there matters

    op = "chain"

    @classmethod
    def of(cls, t: Tensor, step: Step) -> Chain:
        extent = geometry.in_storage(t)
        return cls((step,), t.dtype, box_of(t), extent, t.is_contiguous(), t.numel())


@dataclass(slots=True, eq=False)
class Cast:
    """All that waits in one storage, for the whole of another one, in another dtype."""

    source: tuple[Waiting, ...]
    source_dtype: torch.dtype
    dtype: torch.dtype
    extent: tuple[int, int]  # bytes of the storage: all of it
    items: int
    is_dense = True

    op = "cast"


@dataclass(slots=True, eq=False)
class Argument:
    """A tensor as it was when an operator got it, by what waited there."""

    fills: tuple[Waiting, ...]
    nbytes: int  # of the storage
    dtype: torch.dtype
    at: Box  # in the storage, in elements
    device: torch.device


@dataclass(slots=True, eq=False)
class Computed:
    """A result of an operator on what waits, for all of a storage."""

    operator: Any
    args: Any  # with what waits, and copies, in the place of tensors
    kwargs: Any
    which: int  # of its results
    dtype: torch.dtype
    at: Box  # in the storage, in elements
    extent: tuple[int, int]  # bytes of the storage: all of it
    items: int
    parts: tuple[KeyedFill, ...]  # all that go into it
    below: frozenset[int]  # the ids of results that it needs
    is_dense = True

    op = "computed"

    def arguments(self) -> Iterator[Argument]:
        todo = [self.args, self.kwargs]
        while todo:
            x = todo.pop()
            if isinstance(x, Argument):
                yield x
            elif isinstance(x, (list, tuple)):
                todo += x
            elif isinstance(x, dict):
                todo += x.values()


Waiting = Drawn | KeyedFill | Chain | Cast | Computed


def view(storage: torch.UntypedStorage, dtype: torch.dtype, box: Box) -> Tensor:
    """Return a tensor over a part of a storage, which no mode gets to see."""
    with kernels.undisturbed():
        t = torch.empty(0, dtype=dtype, device=storage.device)
        return t.set_(storage, *box)  # type: ignore[call-overload,no-any-return,unused-ignore]
