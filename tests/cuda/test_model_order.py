# SPDX-License-Identifier: BSD-3-Clause
"""The model of torch's CUDA generator: which element gets which word, and where tensors split."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.support import cuda_model
from tests.support.cuda_model import (
    DTYPES,
    H200,
    SMALL,
    State,
    draw_increment,
    fill,
    increment,
    normal,
    pieces,
    positions,
    uniform,
)

# ---- order and splits


LAYOUTS = [
    ((), ()),
    ((1,), (1,)),
    ((1, 1), (7, 3)),
    ((5,), (3,)),
    ((3, 4), (4, 1)),
    ((3, 4), (1, 3)),
    ((3, 4), (8, 2)),
    ((3, 1, 4), (4, 99, 1)),
    ((2, 3, 4, 5), (60, 1, 15, 3)),  # channels last
    ((2, 3, 4), (1, 2, 20)),
    ((2, 3, 4), (20, 1, 4)),
    ((4, 2, 3), (2, 5, 30)),  # interleaved: 5 is between 2 and 2 * 4
    ((3, 1, 2), (1, 0, 3)),
    ((3, 2), (1, 1)),  # overlapping; equal strides go by size
    ((2, 3), (1, 1)),
    ((2, 2, 3), (6, 2, 2)),
]


@pytest.mark.parametrize(("shape", "strides"), LAYOUTS)
def test_order_is_the_iterators(shape: tuple, strides: tuple) -> None:
    """On the CPU uniform_ goes through the same iterator, one element after another."""
    n = math.prod(shape)
    base = torch.full((200,), -1.0, dtype=torch.float64)
    expected = base.numpy().copy()
    generator = torch.Generator()
    base.as_strided(shape, strides).uniform_(generator=generator.manual_seed(0))
    ((offset, dims),) = pieces(shape, strides, 8)
    assert offset == 0
    serial = torch.rand(n, dtype=torch.float64, generator=generator.manual_seed(0)).numpy()
    for place, value in zip(positions(dims), serial):
        expected[place] = value
    np.testing.assert_array_equal(base.numpy(), expected)


def test_dense_is_one_dimension() -> None:
    for shape, strides in (((3, 4), (4, 1)), ((3, 4), (1, 3)), ((2, 3, 4, 5), (60, 1, 15, 3))):
        assert pieces(shape, strides, 4) == [(0, [(math.prod(shape), 1)])]
    assert pieces((3, 4), (8, 2), 4) == [(0, [(12, 2)])]
    assert pieces((3, 4), (9, 2), 4) == [(0, [(4, 2), (3, 9)])]
    assert pieces((), (), 4) == pieces((1, 1), (5, 1), 4) == [(0, [])]
    assert pieces((0, 3), (3, 1), 4) == []
    assert positions([]).tolist() == [0]


def halves(places: np.ndarray, itemsize: int, limit: int) -> Iterator[np.ndarray]:
    """The split on the array of the elements' places itself, axes outermost first."""
    if places.size <= limit and 1 + (places.max() - places.min()) * itemsize <= limit:
        yield places.ravel()
        return
    first = places.ravel()[0]
    extents = [places.take(-1, axis).ravel()[0] - first for axis in range(places.ndim)]
    axis = int(np.argmax(extents))
    half = places.shape[axis] // 2
    for part in np.split(places, [half], axis):
        yield from halves(part, itemsize, limit)


@pytest.mark.parametrize("limit", [9, 40, 100, 333, 1000])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "strides"),  # nothing to coalesce, outermost first
    [
        ((257,), (1,)),
        ((100,), (3,)),
        ((6, 20), (30, 1)),
        ((20, 6), (10, 1)),
        ((3, 5, 7), (100, 10, 1)),
        ((5, 3, 7), (40, 13, 1)),
        ((4, 2, 4), (30, 5, 2)),
        ((2, 9), (16, 2)),  # as long as one another: the outer one
    ],
)
def test_pieces(
    monkeypatch: pytest.MonkeyPatch, shape: tuple, strides: tuple, itemsize: int, limit: int
) -> None:
    monkeypatch.setattr(cuda_model, "LIMIT", limit)
    places = sum(
        np.arange(size).reshape(-1, *[1] * (len(shape) - 1 - axis)) * stride
        for axis, (size, stride) in enumerate(zip(shape, strides))
    )
    expected = list(halves(np.asarray(places), itemsize, limit))
    for order in itertools.permutations(range(len(shape))):  # how the axes are named is nothing
        found = pieces([shape[i] for i in order], [strides[i] for i in order], itemsize)
        assert len(found) == len(expected)
        for (offset, dims), places in zip(found, expected):
            assert (offset + positions(dims)).tolist() == places.tolist()


def test_real_limits() -> None:
    for dtype, most in (("float32", 2**29), ("bfloat16", 2**30), ("float64", 2**28)):
        size = DTYPES[dtype].itemsize
        assert pieces((most,), (1,), size) == [(0, [(most, 1)])]
        assert pieces((most + 1,), (1,), size) == [
            (0, [(most // 2, 1)]),
            (most // 2, [(most // 2 + 1, 1)]),
        ]
    # Few elements far apart are split as well, and each piece and the whole costs an increment.
    assert pieces((2, 3), (2**31, 1), 4) == [(0, [(3, 1)]), (2**31, [(3, 1)])]
    assert draw_increment((2, 3), (2**31, 1), "float32", H200) == 12
    assert draw_increment((2, 3), (3, 1), "float32", H200) == 4
    assert draw_increment((0, 3), (3, 1), "float32", H200) == 0
    n, half = 2**30 + 2, 2**29 + 1  # halves are too long as well, and only they are divided again
    quarters = [half // 2, half - half // 2] * 2
    assert [dims for _, dims in pieces((n,), (1,), 4)] == [[(q, 1)] for q in quarters]
    assert draw_increment((n,), (1,), "float32", H200) == sum(
        increment(m, "float32", H200) for m in (n, *quarters)
    )


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fill(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str) -> None:
    draw = {"uniform": uniform, "normal": normal}[kind]
    shape, strides = (40, 50), (64, 1)
    state, again = State(4, 8), State(4, 8)
    ((place, values),) = fill(kind, shape, strides, dtype, (-1, 2), state, SMALL)
    np.testing.assert_array_equal(values, draw(2000, dtype, -1, 2, again, SMALL))
    assert place.tolist() == [64 * row + column for row in range(40) for column in range(50)]
    assert state == again
    monkeypatch.setattr(cuda_model, "LIMIT", 2000 * DTYPES[dtype].itemsize)
    state, again = State(4, 8), State(4, 8)
    parts = fill(kind, shape, strides, dtype, (-1, 2), state, SMALL)
    again.offset += increment(2000, dtype, SMALL)
    for place, values in parts:
        np.testing.assert_array_equal(values, draw(place.size, dtype, -1, 2, again, SMALL))
    assert len(parts) == 2
    assert np.concatenate([place for place, _ in parts]).tolist() == [
        64 * row + column for row in range(40) for column in range(50)
    ]
    assert state == again
    assert state.offset == 8 + draw_increment(shape, strides, dtype, SMALL)
