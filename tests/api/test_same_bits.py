# SPDX-License-Identifier: BSD-3-Clause
"""Every element-wise law: the same bits as torch for all sizes, dtypes, layouts and positions."""

from __future__ import annotations

import math

import pytest
import torch

import fastinit
from tests.support.compare import BF16, DTYPES, F16, F32, F64, Position, assert_same
from tests.support.layouts import LAYOUTS, apart
from tests.support.marks import slow, slow_but
from tests.support.parameters import (
    CONSTANTS,
    LARGEST,
    NORMAL_PARAMETERS,
    TRUNC_PARAMETERS,
    UNIFORM_BOUNDS,
)

pytestmark = pytest.mark.usefixtures("native")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# One call of each law that redraws, rounds and fills; name -> (function, arguments).
LAWS = {
    "uniform": ("uniform_", (-0.3, 0.7)),
    "normal": ("normal_", (0.1, 0.5)),
    "trunc_normal": ("trunc_normal_", (0.0, 1.0, -2.0, 2.0)),  # several rounds
    "constant": ("constant_", (0.1,)),
    "zeros": ("zeros_", ()),
}
RANDOM = ("uniform", "normal", "trunc_normal")
each_law = pytest.mark.parametrize("law", LAWS)

# Around the 16 of a normal block, the 624 words of a generator block, vector and tile widths.
SIZES = (1, 2, 7, 15, 16, 17, 33, 63, 312, 623, 624, 625, 1249, 4096, 4097, 32769)
MORE = (3, 8, 9, 31, 32, 47, 48, 65, 127, 311, 313, 640, 1000, 1247, 1248, 2047, 4095, 8191 + 16)

POSITIONS = [Position(), Position(words=623), Position(words=620, cached=True)]
RARELY = [Position(words=n) for n in (1, 3, 607, 624, 625, 1300)]  # 607: 624 minus 17
RARELY += [Position(cached=True), Position(seed=0), Position(seed=-1), Position(seed=2**40 + 5)]


@each_dtype
@each_law
@pytest.mark.parametrize("sizes", [SIZES, *slow([MORE])], ids=["", "more"])
def test_sizes(law: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    name, args = LAWS[law]
    for size in sizes:
        assert_same(name, lambda n=size: apart(n, dtype), *args)


@each_dtype
@each_law
@pytest.mark.parametrize("size", [100_003, *slow([262_144, 524_301])])
def test_many_elements(law: str, dtype: torch.dtype, size: int) -> None:
    """More than one tile, so more than one thread; the first size is no multiple of anything."""
    name, args = LAWS[law]
    assert_same(name, lambda: apart(size, dtype), *args, at=Position(words=5))


@pytest.mark.parametrize("position", [*POSITIONS, *slow(RARELY)], ids=str)
@pytest.mark.parametrize("law", RANDOM)
def test_generator_positions(law: str, position: Position) -> None:
    name, args = LAWS[law]
    for dtype in DTYPES:
        for size in (1, 2, 15, 16, 17, 40, 617, 624, 1250):
            assert_same(name, lambda n=size, d=dtype: apart(n, d), *args, at=position)


@pytest.mark.parametrize("dtype", [F32, BF16, *slow([F64, F16])], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, one_thread: None) -> None:
    for name, args in LAWS.values():
        for size, position in [(60, Position()), (5100, Position(words=100, cached=True))]:
            assert_same(name, lambda n=size: LAYOUTS[layout](n, dtype), *args, at=position)


@pytest.mark.parametrize("layout", slow_but(["transposed", "every_third", "columns"], "columns"))
@pytest.mark.parametrize("dtype", [F32, *slow([BF16])], ids=str)
@each_law
def test_many_elements_not_contiguous(law: str, dtype: torch.dtype, layout: str) -> None:
    name, args = LAWS[law]
    assert_same(name, lambda: LAYOUTS[layout](150_000, dtype), *args)


USUAL = [(-0.0441941738, 0.0441941738), (-1e-6, 0.0), (1.0, 1.0 + 2**-8), (0.1, 0.3), (3.0, 3.0)]


@each_dtype
@pytest.mark.parametrize("bounds", slow_but(UNIFORM_BOUNDS, *USUAL), ids=str)
def test_uniform_bounds(bounds: tuple[float, float], dtype: torch.dtype, one_thread: None) -> None:
    assert_same("uniform_", lambda: apart(60_001, dtype), *bounds)
    assert_same("uniform_", lambda: LAYOUTS["columns"](4000, dtype), *bounds)


@each_dtype
def test_uniform_largest_bounds(dtype: torch.dtype) -> None:
    top = LARGEST[dtype]
    for bounds in [(0.0, top), (-top, 0.0), (-top / 2, top / 2), (top, top), (-top, -top)]:
        assert_same("uniform_", lambda: apart(4099, dtype), *bounds)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(BF16, 0.0, 1.0), (F16, 0.0, 1.0), (F16, -1e-6, 0.0)], ids=str
)
def test_uniform_replaces_to_by_from(dtype: torch.dtype, low: float, high: float) -> None:
    """Guards the table above: draws do round up to `to`, and every one of them becomes `from`."""
    at = Position()
    rounded = torch.empty(65_536).uniform_(low, high, generator=at.place(torch.Generator()))
    hits = rounded.to(dtype) == high
    drawn = fastinit.uniform_(apart(65_536, dtype), low, high, at.place(torch.Generator()))
    assert hits.any()
    assert (drawn[hits] == torch.tensor(low, dtype=dtype)).all()
    assert not (drawn == high).any()


USUAL = [(0.0, 0.02), (3.5, 0.0), (0.1, 0.3), (0.0, 1e-42), (0.0, 1e4), (0.0, 1e300)]


@each_dtype
@pytest.mark.parametrize("parameters", slow_but(NORMAL_PARAMETERS, *USUAL), ids=str)
def test_normal_parameters(parameters: tuple[float, float], dtype: torch.dtype) -> None:
    for size in (5, 4096, 4099):
        assert_same("normal_", lambda n=size: apart(n, dtype), *parameters)
    assert_same("normal_", lambda: LAYOUTS["columns"](999, dtype), *parameters)


USUAL = [(0.0, 0.02, -2.0, 2.0), (0.0, 1.0, -0.4, 0.4), (0.0, 1.0, -0.38, 0.38)]
USUAL += [(1.0, 0.5, 0.1, 1.9), (0.0, 1.0, -math.inf, 0.25)]


@each_dtype
@pytest.mark.parametrize("parameters", slow_but(TRUNC_PARAMETERS, *USUAL), ids=str)
def test_trunc_normal_parameters(parameters: tuple[float, ...], dtype: torch.dtype) -> None:
    for size in (1, 7, 15, 16, 33, 4099):
        for position in (Position(), Position(words=611, cached=True)):
            assert_same("trunc_normal_", lambda n=size: apart(n, dtype), *parameters, at=position)
    assert_same("trunc_normal_", lambda: LAYOUTS["transposed"](999, dtype), *parameters)
    assert_same("trunc_normal_", lambda: LAYOUTS["every_third"](999, dtype), *parameters)


@each_dtype
def test_constants(dtype: torch.dtype) -> None:
    for value in [*CONSTANTS, math.nan, LARGEST[dtype], torch.tensor(0.7), torch.tensor(3)]:
        for layout in ("contiguous", "columns", "transposed", "offset_3"):
            assert_same("constant_", lambda at=layout: LAYOUTS[at](999, dtype), value)
    for name in ("zeros_", "ones_"):
        for size in (1, 2, 3, 4, 5, 31, 1000, 70_001):
            assert_same(name, lambda n=size: apart(n, dtype))


@each_law
def test_no_elements_and_no_dimensions(law: str) -> None:
    name, args = LAWS[law]
    for shape in [(0,), (0, 3), (4, 0, 5), (), (1,), (1, 1, 1)]:
        for position in (Position(), Position(cached=True)):
            for dtype in DTYPES:
                make = lambda s=shape, d=dtype: torch.full(s, 13.0, dtype=d)  # noqa: E731
                assert_same(name, make, *args, at=position)


@each_law
def test_around_the_smallest_native_size(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    name, args = LAWS[law]
    limit = fastinit.core.geometry.MIN_NATIVE
    assert limit > 0
    for size in {1, limit - 1, limit, limit + 1} - {0}:
        assert_same(name, lambda n=size: apart(n, F32), *args)
    # Filling with a constant is so cheap in torch that it pays only from far more elements on.
    many = (limit + 1) * (600 if len(args) < 2 else 1)
    assert_same(name, lambda: apart(many, F32), *args, native=True)


# Where the suite insists on fastinit's own kernels, so that equality is not torch against torch.
NATIVE_LAYOUTS = ("contiguous", "matrix", "transposed", "channels_last", "columns")
NATIVE_LAYOUTS += ("every_second_row", "offset_1", "parameter", "data", "ones_with_odd_strides")


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@each_law
def test_native_path_is_used(law: str, layout: str) -> None:
    name, args = LAWS[law]
    for dtype in DTYPES:
        make = lambda d=dtype: LAYOUTS[layout](5040, d)  # noqa: E731
        if law == "trunc_normal" and not make().is_contiguous():
            args = (0.0, 0.02, -2.0, 2.0)  # redraws are native in contiguous memory only
        assert_same(name, make, *args, native=True)


@pytest.mark.parametrize("name", ["uniform_", "normal_", "zeros_"])
def test_default_dtype_and_grad_modes_do_not_matter(name: str) -> None:
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            assert_same(name, lambda: torch.nn.Parameter(apart(1000, F32)), native=True)
    with torch.inference_mode():
        assert_same(name, lambda: torch.nn.Parameter(apart(1000, F32)))
    torch.set_default_dtype(F64)
    try:
        assert_same(name, lambda: apart(1000, F32), native=True)
        assert_same(name, lambda: apart(1000, BF16), native=True)
    finally:
        torch.set_default_dtype(F32)
