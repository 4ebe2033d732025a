# SPDX-License-Identifier: BSD-3-Clause
"""Fills of one plan that depend on each other: by the generator, by memory, by what they draw."""

from __future__ import annotations

import pytest
import torch

from tests.support.compare import DTYPES, Position
from tests.support.layouts import box
from tests.support.plans import ARGS, Step, compare

pytestmark = pytest.mark.usefixtures("native")

# Sizes below 16 draw in pairs and may leave the second normal of one for the next small fill; a
# fill of another kind in between neither uses nor drops it.
CHAINS = [
    [3, 3], [1, 1, 1], [3, 100, 3], [5, 4, 3], [15, 16, 15], [1, 1000, 2, 17, 3], [7, 0, 7],
    [2, 2], [3, 48, 4, 48, 1, 1],
]  # fmt: skip


@pytest.mark.parametrize("sizes", CHAINS, ids=str)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["normal_", "trunc_normal_"])
def test_cached_normals(name: str, sizes: list[int], cached: bool) -> None:
    for dtype in DTYPES:
        for between in ("uniform_", "zeros_", None):
            steps: list[Step] = []
            for i in range(len(sizes)):
                steps.append((name, i, (), {}))
                if between:
                    steps.append((between, len(sizes), (), {}))
            compare(
                lambda d=dtype: [box(n, dtype=d) for n in (*sizes, 50)],
                steps,
                Position(words=2, cached=cached),
                runs=2,
            )


def test_data_dependent_fills_in_the_middle() -> None:
    """How many words trunc_normal_ draws is known only when it is done; what follows waits."""
    bounds = [(0.0, 1.0, -2.0, 2.0), (0.0, 1.0, -0.4, 0.4), (0.0, 1.0, -0.1, 0.1), (0.0, 0.02)]
    for args in bounds:
        for size in (5, 16, 1000, 9001):
            steps: list[Step] = [
                ("uniform_", 0, (), {}),
                ("trunc_normal_", 1, args, {}),
                ("normal_", 2, (), {}),
                ("trunc_normal_", 0, args, {"generator": 0}),
                ("uniform_", 1, (), {"generator": 0}),
                ("trunc_normal_", 2, args, {}),
            ]
            compare(lambda n=size: [box(n) for _ in range(3)], steps, runs=2)


def views() -> list[torch.Tensor]:
    base = box(40, 30)
    return [base, base[:10], base[5:20], base[:, 3:9], base.t(), base[::2], base.view(-1)[7:900]]


@pytest.mark.parametrize("first", range(7))
@pytest.mark.parametrize("second", range(7))
def test_overlapping_views(first: int, second: int) -> None:
    """The later fill wins where both write, whichever contains the other; words go on anyway."""
    for a, b in [("normal_", "uniform_"), ("uniform_", "zeros_"), ("zeros_", "normal_")]:
        compare(views, [(a, first, (), {}), (b, second, (), {})])
        compare(views, [(a, 0, (), {}), (b, first, (), {}), (a, second, (), {}), (b, 0, (), {})])


@pytest.mark.usefixtures("own_factors")
def test_same_tensor_again_and_again() -> None:
    names = ["kaiming_uniform_", "zeros_", "normal_", "sparse_", "eye_", "xavier_normal_"]
    names += ["trunc_normal_", "ones_", "orthogonal_", "uniform_"]
    for last in range(len(names)):
        chain = names[last:] + names[:last]
        compare(lambda: [box(30, 20)], [(n, 0, ARGS.get(n, ()), {}) for n in chain], runs=2)


def test_neighbours_do_not_touch() -> None:
    """Columns of one matrix, in any order: disjoint elements within the same range of memory."""

    def make() -> list[torch.Tensor]:
        base = box(300, 7)
        return [base[:, i] for i in range(7)]

    order = [3, 0, 6, 1, 5, 2, 4]
    compare(make, [(("normal_", "uniform_", "zeros_")[i % 3], i, (), {}) for i in order])
