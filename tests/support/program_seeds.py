# SPDX-License-Identifier: BSD-3-Clause
"""Random programs in a seeded block: equal names have equal numbers, or are listed as not named.

Each runs as it is, with its two modules in the other order, with reads between its statements, and
with bfloat16 as the default. `python -m tests.support.programs 200 --keyed` runs many.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastinit
from tests.support import program_tools
from tests.support.program_look import bytes_of
from tests.support.program_text import Statement, program_of, text_of
from tests.support.scopes import full_of

_BYTE = 0x33  # memory that nobody wrote is full of its complement, in all runs

# Numbers that leave the block's sight, or are not keyed, and other blocks.
_LEFT_OUT = (
    "numpy",
    "np.",
    "address(",
    "Later(",
    "thread",
    "pool",
    "dlpack",
    "block()",
    "a0",
    "a1",
)


@dataclass
class Result:
    tensors: dict[str, Tensor]
    unnamed: set[str]
    laws: dict[str, tuple[Any, ...]]  # of what is a single fill
    shares: bool  # the two modules have tensors in common


def _ignore(*_: object) -> None:
    """Note nothing."""


class _Caught:
    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, Exception)


def joined(**modules: Any) -> nn.Module:
    """Return a model of those that are modules."""
    return nn.ModuleDict({k: m for k, m in modules.items() if isinstance(m, nn.Module)})


def look_at(m: Any) -> None:
    for t in (*m.parameters(), *m.buffers()):
        repr(t), bool(t.isnan().any())


def programs(seeds: Sequence[int]) -> Iterator[str]:
    """Yield the texts of a program, one with its modules the other way round, one with reads."""
    scope = [s for s in program_of(seeds) if s.lines == ["with caught, block():"]][-1]
    body = [s for s in scope.body or () if not any(s.has(word) for word in _LEFT_OUT)]
    bound = sorted({n for s in body for n in s.names()} & {"m0", "m1"})
    for order, reads in ((bound, False), (bound[::-1], False), (bound, True)):
        mine: list[Statement] = []
        for statement in body:
            mine.append(statement)
            if reads:
                mine += [Statement([f"look_at({n})"]) for n in bound]
        last = Statement([f"root = joined({', '.join(f'{n}={n}' for n in order)})"])
        yield text_of([Statement(["torch.manual_seed(1)"]), replace(scope, body=[*mine, last])])


def run(text: str, dtype: torch.dtype = torch.float32) -> Result:
    names = {name: getattr(program_tools, name) for name in program_tools.__all__}
    names |= {"joined": joined, "look_at": look_at}
    exec(compile(text, "<program>", "exec"), names)
    program: Any = names["program"]
    reports: list[fastinit.Report] = []

    class Block(fastinit.fused):
        def __enter__(self) -> fastinit.Report:
            reports.append(super().__enter__())
            return reports[-1]

    pool = ThreadPoolExecutor(1)
    with full_of(_BYTE), warnings.catch_warnings(), pool, program_tools.default_dtype(dtype):
        warnings.simplefilter("ignore")
        generator = torch.Generator().manual_seed(1)
        left = program(lambda: Block(seed=7), _ignore, _Caught(), pool, generator)
    root = left["root"]
    if root is None:
        return Result({}, set(), {}, False)
    tensors = dict((*root.named_parameters(), *root.named_buffers()))
    owners = [{id(t) for t in (*m.parameters(), *m.buffers())} for m in root.children()]
    single = {row.name: row.laws[0] for row in reports[0].rows() if len(row.laws) == 1}
    laws = {name: (w.op, w.a, w.b, w.bounds, w.key) for name, w in single.items() if w.key == name}
    shares = len(owners) == 2 and bool(owners[0] & owners[1])
    kept = {n: t.detach() for n, t in tensors.items() if not (t.is_meta or nn.parameter.is_lazy(t))}
    return Result(kept, set(reports[0].unnamed), laws, shares)


def differences(seeds: Sequence[int], counts: Counter[str]) -> list[str]:
    """Return the names whose numbers differ, though nobody says so; count what is compared."""
    texts = [*programs(seeds)]
    plain, turned, read = map(run, texts)
    narrow = run(texts[0], torch.bfloat16)
    found = []
    for how, other in (("the other way round", turned), ("read", read)):
        if other is turned and plain.shares:
            continue  # what is tied goes by its first name
        for name in plain.tensors.keys() & other.tensors.keys():
            a, b = plain.tensors[name], other.tensors[name]
            listed = name in plain.unnamed | other.unnamed
            counts[f"{how}, listed" if listed else how] += 1
            if not listed and not _same(a, b):
                found.append(f"{how}: {name}")
    for name, law in plain.laws.items():
        a, b = plain.tensors.get(name), narrow.tensors.get(name)
        if a is None or b is None or (a.dtype, b.dtype) != (torch.float32, torch.bfloat16):
            continue
        listed = name in plain.unnamed | narrow.unnamed
        if listed or narrow.laws.get(name) != law:
            continue
        counts["in bfloat16"] += 1
        if not _same(a.bfloat16(), b):
            found.append(f"in bfloat16: {name}")
    return sorted(found)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)
