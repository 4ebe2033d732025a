# SPDX-License-Identifier: BSD-3-Clause
"""orthogonal_ beside torch's: matrices large, small and many.

"Haar" is the same law without factoring (Stewart 1980), which the keyed stream uses: other numbers.
"""

from __future__ import annotations

import random
from functools import partial
from types import ModuleType

import torch
from harness import Case, both, compare, main, unchecked
from torch import Tensor

import fastinit


def orthogonal(made: list[tuple[int, ...]], haar: bool, goal: float) -> Case:
    tensors = [torch.ones(shape) for shape in made]
    matrices: list[Tensor] = [m for t in tensors for m in (t if t.dim() == 3 else [t])]
    plan = fastinit.Plan()
    for t in tensors:
        plan.orthogonal_batched_(t)

    def fill(f: ModuleType) -> None:
        if f is fastinit and len(tensors) == 1:
            fastinit.orthogonal_batched_(tensors[0])
        else:
            for matrix in matrices:
                f.orthogonal_(matrix)

    ways = both(fill)
    if haar:
        ways["one by one"] = lambda: plan.run(seed=1)
    elif len(tensors) > 1:
        ways["plan"] = plan.run
    calls, rounds = (20, 9) if sum(t.numel() for t in tensors) < 1 << 17 else (1, 5)
    check = unchecked if haar else partial(compare, ways, tensors, 1e-2)
    return Case(ways, tensors, goal, check, rounds, calls)


sizes = random.Random(0)
TWENTY = [(sizes.randint(8, 128), sizes.randint(8, 128)) for _ in range(20)]
BATCHES = {
    "2048 x 2048": ([(1, 2048, 2048)], 2, 3.5),
    "1024 x 1024": ([(1, 1024, 1024)], 2, 3),
    "32 of 512 x 512": ([(32, 512, 512)], 3, 5),
    "4096 of 64 x 64": ([(4096, 64, 64)], 8, 10),
    "1000 of 20 shapes": (TWENTY * 50, 6, 8),
    "10 of an RL policy": ([(64, 8), *[(64, 64)] * 8, (4, 64)], 4, 4),
}
CASES = {
    **{f"orthogonal_ {n}": partial(orthogonal, x[0], False, x[1]) for n, x in BATCHES.items()},
    **{f"Haar {n}": partial(orthogonal, x[0], True, x[2]) for n, x in BATCHES.items()},
}

if __name__ == "__main__":
    main(CASES, __doc__)
