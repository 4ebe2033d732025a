# SPDX-License-Identifier: BSD-3-Clause
"""The keyed stream beside torch's functions, and shards of a matrix beside the whole of it."""

from __future__ import annotations

from functools import partial

import torch
from harness import Case, both, main, unchecked

import fastinit

SIDE = 8192  # of the matrix that is sharded
KEY = fastinit.Key(1, "bench")


def law(name: str, dtype: torch.dtype, goal: float | str) -> Case:
    t = torch.ones(1 << 24, dtype=dtype)
    ways = both(lambda f: getattr(f, name)(t, **({"generator": KEY} if f is fastinit else {})))
    return Case(ways, [t], goal, unchecked, rounds=3 if name == "trunc_normal_" else 9)


def shard(shape: tuple[int, int], offset: tuple[int, int], goal: float) -> Case:
    """What stands under torch is the whole matrix, also from the keyed stream."""
    whole, part = torch.ones(SIDE, SIDE), torch.ones(shape)
    ways = {
        "torch": lambda: fastinit.normal_(whole, generator=KEY),
        "one by one": lambda: fastinit.normal_(
            part, generator=KEY.part(tuple(whole.shape), offset)
        ),
    }

    def check() -> None:
        everything, here = (run() for run in ways.values())
        (top, left), (rows, columns) = offset, shape
        if not torch.equal(here, everything[top : top + rows, left : left + columns]):
            raise AssertionError("a shard differs from the whole")

    return Case(ways, [part], goal, check)


LAWS = [
    *(("uniform_", torch.float32, 10), ("normal_", torch.float32, 6)),
    *(("normal_", torch.bfloat16, 9), ("normal_", torch.float64, "")),
    ("trunc_normal_", torch.float32, 40),
]
ROWS, COLUMNS = ((SIDE // 8, SIDE), (SIDE // 8 * 3, 0)), ((SIDE, SIDE // 8), (0, SIDE // 8 * 3))
CASES = {
    **{f"keyed {x[0]} {str(x[1])[6:]}": partial(law, *x) for x in LAWS},
    "keyed normal_, rows: 1/8 of 2^26 beside all": partial(shard, *ROWS, 6),
    "keyed normal_, columns: 1/8 of 2^26 beside all": partial(shard, *COLUMNS, 3),
}

if __name__ == "__main__":
    main(CASES, __doc__)
