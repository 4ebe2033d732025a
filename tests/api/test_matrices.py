# SPDX-License-Identifier: BSD-3-Clause
"""The functions that look at the shape: fans, diagonals, sparse and orthogonal matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.support.compare import BF16, DTYPES, F16, F32, F64, Position, assert_same
from tests.support.layouts import box
from tests.support.marks import slow

pytestmark = pytest.mark.usefixtures("native")


FAN_SHAPES = [(3, 5), (1, 1), (64, 33), (8, 3, 3, 3), (4, 2, 5), (2, 3, 2, 2, 3), (300, 200)]
FAN_CALLS = [
    ("xavier_uniform_", {}),
    ("xavier_uniform_", {"gain": 5 / 3}),
    ("xavier_uniform_", {"gain": 0.0}),
    ("xavier_normal_", {}),
    ("xavier_normal_", {"gain": math.sqrt(2.0)}),
    ("kaiming_uniform_", {}),
    ("kaiming_uniform_", {"a": math.sqrt(5)}),
    ("kaiming_uniform_", {"a": 1}),
    ("kaiming_uniform_", {"mode": "fan_out", "nonlinearity": "relu"}),
    ("kaiming_uniform_", {"mode": "FAN_OUT", "nonlinearity": "linear"}),
    ("kaiming_normal_", {}),
    ("kaiming_normal_", {"nonlinearity": "selu"}),
    ("kaiming_normal_", {"mode": "fan_out", "nonlinearity": "tanh"}),
    ("kaiming_normal_", {"nonlinearity": "conv_transpose2d"}),
    ("kaiming_normal_", {"a": -0.2, "nonlinearity": "leaky_relu"}),
    ("kaiming_normal_", {"a": "ignored", "nonlinearity": "sigmoid"}),
]


@pytest.mark.parametrize("dtype", [F32, F64, *slow([BF16, F16])], ids=str)
@pytest.mark.parametrize(("name", "options"), FAN_CALLS, ids=str)
def test_fans(name: str, options: dict[str, object], dtype: torch.dtype) -> None:
    for shape in FAN_SHAPES:
        assert_same(name, lambda s=shape: box(*s, dtype=dtype), native=True, **options)
    # The fans follow the logical shape, the words follow the memory:
    assert_same(name, lambda: box(40, 30, dtype=dtype).t(), native=True, **options)
    assert_same(name, lambda: torch.nn.Parameter(box(9, 30, dtype=dtype)), native=True, **options)
    last = torch.channels_last
    make = lambda: box(8, 6, 3, 3, dtype=dtype).to(memory_format=last)  # noqa: E731
    assert_same(name, make, native=True, **options)


MATRICES: dict[str, Callable[[int, int, torch.dtype], torch.Tensor]] = {
    "contiguous": lambda r, c, d: box(r, c, dtype=d),
    "transposed": lambda r, c, d: box(c, r, dtype=d).t(),
    "columns": lambda r, c, d: box(r, c + 3, dtype=d)[:, 2 : 2 + c],
    "columns_transposed": lambda r, c, d: box(c, r + 3, dtype=d)[:, 2 : 2 + r].t(),
    "every_second_row": lambda r, c, d: box(2 * r, c, dtype=d)[::2],
    "every_second_column": lambda r, c, d: box(r, 2 * c, dtype=d)[:, ::2],
    "offset": lambda r, c, d: box(r * c + 3, dtype=d)[3:].view(r, c),
    "parameter": lambda r, c, d: torch.nn.Parameter(box(r, c, dtype=d)),
}
MATRIX_SHAPES = [(1, 1), (1, 9), (9, 1), (5, 5), (3, 8), (8, 3), (33, 47), (130, 64)]


@pytest.mark.parametrize("dtype", [F32, BF16, *slow([F64, F16])], ids=str)
@pytest.mark.parametrize("layout", MATRICES)
def test_eye(layout: str, dtype: torch.dtype) -> None:
    for rows, columns in MATRIX_SHAPES:
        assert_same("eye_", lambda r=rows, c=columns: MATRICES[layout](r, c, dtype))
    assert_same("eye_", lambda: MATRICES["contiguous"](300, 200, dtype), native=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64], ids=str)
def test_eye_and_constants_of_other_dtypes(dtype: torch.dtype) -> None:
    for shape in [(3, 5), (40, 40), (0, 4)]:
        make = lambda s=shape: torch.ones(s, dtype=dtype)  # noqa: E731
        for name, args in [("eye_", ()), ("ones_", ()), ("zeros_", ()), ("constant_", (1,))]:
            assert_same(name, make, *args, poisons=None)


DIRAC_SHAPES = [
    ((4, 4, 3), 1),
    ((6, 2, 3), 3),
    ((6, 4, 2), 2),
    ((3, 8, 1), 1),
    ((8, 3, 5, 5), 1),
    ((8, 3, 4, 5), 2),
    ((12, 2, 3, 3), 6),
    ((9, 9, 1, 1), 9),
    ((4, 3, 3, 4, 5), 1),
    ((6, 3, 3, 3, 3), 2),
    ((64, 32, 3, 3), 1),
    ((5, 7, 3), 5),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), DIRAC_SHAPES, ids=str)
def test_dirac(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    def make() -> torch.Tensor:
        return box(*shape, dtype=dtype)

    def wide() -> torch.Tensor:
        return box(*shape[:-1], shape[-1] + 2, dtype=dtype)[..., 1:-1]

    assert_same("dirac_", make, groups, native=True)
    assert_same("dirac_", lambda: torch.nn.Parameter(make()), groups=groups, native=True)
    assert_same("dirac_", lambda: make().transpose(0, 1).contiguous().transpose(0, 1), groups)
    assert_same("dirac_", wide, groups)
    if len(shape) == 4:
        assert_same("dirac_", lambda: make().to(memory_format=torch.channels_last), groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.1, 1, *slow([0, 0.5, 0.999, 2.5, -0.5])])
def test_sparse(sparsity: float, dtype: torch.dtype) -> None:
    """The zeros come from the default generator even if the values have their own."""
    for rows, columns in MATRIX_SHAPES:
        for position in (Position(), Position(words=600), Position(words=3, cached=True)):
            make = lambda r=rows, c=columns: box(r, c, dtype=dtype)  # noqa: E731
            assert_same("sparse_", make, sparsity, at=position)


@pytest.mark.parametrize("layout", MATRICES)
def test_sparse_layouts(layout: str) -> None:
    for dtype in (F32, F16):
        for rows, columns in [(33, 47), (8, 3)]:
            make = lambda r=rows, c=columns, d=dtype: MATRICES[layout](r, c, d)  # noqa: E731
            assert_same("sparse_", make, 0.3, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_is_native(dtype: torch.dtype) -> None:
    assert_same("sparse_", lambda: box(200, 100, dtype=dtype), 0.9, native=True)
    assert_same("sparse_", lambda: box(200, 100, dtype=dtype), 0.9, std=0.0, native=True)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 40])
def test_sparse_edges(rows: int) -> None:
    for columns in (0, 1, 2):
        assert_same("sparse_", lambda c=columns: box(rows, c), 0.5)


def test_sparse_many_rows() -> None:
    """torch.randperm has another algorithm beyond some length; both must be followed."""
    assert_same("sparse_", lambda: box(100_003, 2), 0.5)


@pytest.mark.parametrize("dtype", [F32, *slow([F64])], ids=str)
@pytest.mark.parametrize("layout", MATRICES)
@pytest.mark.usefixtures("own_factors")
def test_orthogonal(layout: str, dtype: torch.dtype) -> None:
    for rows, columns in MATRIX_SHAPES:
        for position in (Position(), Position(words=619, cached=True)):
            make = lambda r=rows, c=columns: MATRICES[layout](r, c, dtype)  # noqa: E731
            # view_as refuses nothing here: all these layouts are two-dimensional already
            assert_same("orthogonal_", make, at=position)


@pytest.mark.usefixtures("own_factors")
def test_orthogonal_shapes_and_gains() -> None:
    for shape in [(8, 3, 3, 3), (2, 3, 4), (100, 2, 5, 5, 1), (3, 1, 1)]:
        for gain in (1, 0.5, 2**0.5, 0, -1, True):
            assert_same("orthogonal_", lambda s=shape: box(*s), gain, native=True)
    assert_same("orthogonal_", lambda: box(60, 5, 4).permute(0, 2, 1), fails=True)


@pytest.mark.parametrize("name", ["orthogonal_", "eye_", "kaiming_uniform_", "dirac_"])
def test_no_elements(name: str) -> None:
    for shape in [(0, 3, 3), (3, 0, 3)] if name == "dirac_" else [(0, 3), (3, 0)]:
        assert_same(name, lambda s=shape: torch.empty(s), fails=False)
