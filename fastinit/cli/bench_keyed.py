# SPDX-License-Identifier: BSD-3-Clause
"""The keyed stream beside torch's functions, and shards of a matrix beside the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastinit
from fastinit.cli.bench import LARGE, Case

GOALS = {  # times as fast as torch; shards: as the whole
    "keyed uniform_ float32": 10.0,
    "keyed normal_ float32": 6.0,
    "keyed normal_ bfloat16": 9.0,
    "keyed trunc_normal_ float32": 40.0,
    "keyed normal_, rows: 1/8 of 2^26 beside all": 6.0,
    "keyed normal_, columns: 1/8 of 2^26 beside all": 3.0,
}
_SIDE = 8192
_LAWS = [
    ("uniform_", torch.float32),
    ("normal_", torch.float32),
    ("normal_", torch.bfloat16),
    ("normal_", torch.float64),
    ("trunc_normal_", torch.float32),
]


def cases() -> list[Case]:
    """Not compared with torch's values, which are others; the tests compare them with a model."""
    shards = {
        "rows": ((_SIDE // 8, _SIDE), (_SIDE // 8 * 3, 0)),
        "columns": ((_SIDE, _SIDE // 8), (0, _SIDE // 8 * 3)),
    }
    return [_large(*law) for law in _LAWS] + [_shard(name, *at) for name, at in shards.items()]


def _large(law: str, dtype: torch.dtype) -> Case:
    t = torch.ones(LARGE, dtype=dtype)
    key = fastinit.Key(1, "bench")

    def fill(f: Any) -> None:
        getattr(f, law)(t, **({"generator": key} if f is fastinit else {}))

    name = f"keyed {law} {str(dtype)[6:]}"
    return Case(name, [t], fill, rounds=3 if law == "trunc_normal_" else 9, compared=False)


def _shard(name: str, shape: tuple[int, int], offset: tuple[int, int]) -> Case:
    """What stands under torch is the whole matrix, also from the keyed stream."""
    whole, part = torch.ones(_SIDE, _SIDE), torch.ones(shape)
    key = fastinit.Key(1, "bench")

    def fill(f: Any) -> Tensor:
        if f is not fastinit:
            return fastinit.normal_(whole, generator=key)
        return fastinit.normal_(part, generator=key.part(whole.shape, offset))

    both: list[Callable[[], Tensor]] = [lambda: fill(torch.nn.init), lambda: fill(fastinit)]
    everything, here = (f() for f in both)
    (top, left), (rows, columns) = offset, shape
    if not torch.equal(here, everything[top : top + rows, left : left + columns]):
        raise AssertionError(f"{name}: a shard differs from the whole")
    return Case(f"keyed normal_, {name}: 1/8 of 2^26 beside all", [part], fill, compared=False)
