# SPDX-License-Identifier: BSD-3-Clause
"""Every element-wise law: the same bits as torch for all sizes, dtypes, layouts and positions."""

from __future__ import annotations

import math

import pytest
import torch

import fastinit
from tests.support.compare import BF16, DTYPES, F16, F32, F64, Position, assert_same
from tests.support.layouts import LAYOUTS, apart

pytestmark = pytest.mark.usefixtures("native")

# One call of each law that redraws, rounds and fills; name -> (function, arguments).
LAWS = {
    "uniform": ("uniform_", (-0.3, 0.7)),
    "normal": ("normal_", (0.1, 0.5)),
    "trunc_normal": ("trunc_normal_", (0.0, 1.0, -2.0, 2.0)),  # several rounds
    "constant": ("constant_", (0.1,)),
    "zeros": ("zeros_", ()),
}

# Around the 16 of a normal block, the 624 words of a generator block, vector and tile widths.
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 63, 65, 127, 311, 312, 313)
SIZES += (623, 624, 625, 640, 1000, 1247, 1248, 1249, 2047, 4095, 4096, 4097, 8191 + 16, 32769)

POSITIONS = [
    Position(),
    Position(words=1),
    Position(words=3),
    Position(words=607),  # 624 minus 17: a block of 16 ends one word before the refill
    Position(words=623),
    Position(words=624),
    Position(words=625),
    Position(words=1300),
    Position(cached=True),
    Position(words=620, cached=True),  # exactly at the refill, with a normal waiting
    Position(seed=0),
    Position(seed=-1),
    Position(seed=2**40 + 5),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_sizes(law: str, dtype: torch.dtype) -> None:
    name, args = LAWS[law]
    for size in SIZES:
        assert_same(name, lambda n=size: apart(n, dtype), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_many_elements(law: str, dtype: torch.dtype) -> None:
    """More than one tile, so more than one thread; neither size is a multiple of anything."""
    name, args = LAWS[law]
    for size in (100_003, 262_144, 524_301):
        assert_same(name, lambda n=size: apart(n, dtype), *args, at=Position(words=5))


@pytest.mark.parametrize("position", POSITIONS, ids=str)
@pytest.mark.parametrize("law", ["uniform", "normal", "trunc_normal"])
def test_generator_positions(law: str, position: Position) -> None:
    name, args = LAWS[law]
    for dtype in DTYPES:
        for size in (1, 2, 15, 16, 17, 40, 617, 624, 1250):
            assert_same(name, lambda n=size, d=dtype: apart(n, d), *args, at=position)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    for name, args in LAWS.values():
        for size in (60, 1260, 5100):
            for position in (Position(), Position(words=100, cached=True)):
                assert_same(name, lambda n=size: LAYOUTS[layout](n, dtype), *args, at=position)


@pytest.mark.parametrize("layout", ["transposed", "columns", "every_third", "channels_last"])
@pytest.mark.parametrize("law", LAWS)
def test_many_elements_not_contiguous(law: str, layout: str) -> None:
    name, args = LAWS[law]
    for dtype in (F32, BF16):
        assert_same(name, lambda d=dtype: LAYOUTS[layout](150_000, d), *args)


LARGEST = {d: torch.finfo(d).max for d in DTYPES}
UNIFORM_BOUNDS = [
    (0.0, 1.0),
    (-1.0, 1.0),
    (-0.0441941738, 0.0441941738),
    (-1 / math.sqrt(300), 1 / math.sqrt(300)),
    (-1e-3, 1e-3),
    (-1e-30, 1e-30),  # underflows in float16
    (1e-45, 3e-45),  # denormal in float32
    (-1.0, 0.0),
    (-1e-6, 0.0),  # float16 rounds 3 % of it up to `to`, which must become `from`
    (-0.0, 0.0),
    (0.0, -0.0),
    (1.0, 1.0 + 2**-8),  # two bfloat16 neighbours: half of all draws round up to `to`
    (1.0, 1.001),  # both ends equal in bfloat16
    (3.0, 3.0),
    (0.1, 0.1),
    (0.1, 0.3),
    (1000.0, 1001.0),
    (-5.0, 30000.0),
    (0.0, 65504.0),  # the largest float16
    (0.0, 60000.7),
    (-math.pi, math.e),
    (0, 1),
    (False, True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounds", UNIFORM_BOUNDS, ids=str)
def test_uniform_bounds(bounds: tuple[float, float], dtype: torch.dtype) -> None:
    assert_same("uniform_", lambda: apart(60_001, dtype), *bounds)
    assert_same("uniform_", lambda: LAYOUTS["columns"](4000, dtype), *bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


NORMAL_PARAMETERS = [
    (0.0, 1.0),
    (0.0, 0.02),
    (0.0, 0.0),
    (-0.0, 0.0),
    (3.5, 0.0),
    (0.1, 0.3),
    (-2.0, 1e-3),
    (1000.0, 1.0),
    (0.0, 1e-8),
    (0.0, 1e-42),
    (0.0, 1e4),  # overflows float16
    (0.0, 1e38),  # overflows float32
    (0.0, 1e300),  # infinite already as a float32 parameter
    (1e39, 1.0),
    (math.inf, 1.0),
    (0.0, math.inf),
    (math.nan, 1.0),
    (0, 1),
    (True, False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", NORMAL_PARAMETERS, ids=str)
def test_normal_parameters(parameters: tuple[float, float], dtype: torch.dtype) -> None:
    for size in (5, 4096, 4099):
        assert_same("normal_", lambda n=size: apart(n, dtype), *parameters)
    assert_same("normal_", lambda: LAYOUTS["columns"](999, dtype), *parameters)


TRUNC_PARAMETERS = [
    (0.0, 1.0, -2.0, 2.0),
    (0.0, 0.02, -2.0, 2.0),  # a hundred standard deviations away: nothing is ever redrawn
    (0.0, 0.02, -0.04, 0.04),
    (0.0, 1.0, -1.0, 1.0),
    (0.0, 1.0, -0.4, 0.4),  # probability 0.311: rejection, many rounds
    (0.0, 1.0, -0.38, 0.38),  # probability 0.296: the other algorithm
    (0.0, 1.0, -0.01, 0.01),
    (0.0, 1.0, 1.5, 2.0),
    (0.0, 1.0, 0.0, math.inf),
    (0.0, 1.0, -math.inf, 0.25),
    (0.0, 1.0, -math.inf, math.inf),
    (0.0, 1.0, -6.0, 6.0),  # just beyond what 24-bit uniforms can reach
    (0.0, 1.0, -5.0, 5.0),
    (0.5, 0.25, 0.0, 1.0),
    (1.0, 0.5, 0.1, 1.9),  # bounds that bfloat16 cannot hold
    (1.0, 1.0, -0.3, 0.9999),
    (-3.0, 2.0, -4.0, 0.0),
    (0, 1, -2, 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", TRUNC_PARAMETERS, ids=str)
def test_trunc_normal_parameters(parameters: tuple[float, ...], dtype: torch.dtype) -> None:
    for size in (1, 7, 15, 16, 33, 4099):
        for position in (Position(), Position(words=611, cached=True)):
            assert_same("trunc_normal_", lambda n=size: apart(n, dtype), *parameters, at=position)
    assert_same("trunc_normal_", lambda: LAYOUTS["transposed"](999, dtype), *parameters)
    assert_same("trunc_normal_", lambda: LAYOUTS["every_third"](999, dtype), *parameters)


CONSTANTS = [0.0, -0.0, 1.0, 0.1, -3.75, 1e-45, 1e-7, 65504.0, 3, True, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants(dtype: torch.dtype) -> None:
    for value in [*CONSTANTS, math.nan, LARGEST[dtype], torch.tensor(0.7), torch.tensor(3)]:
        for layout in ("contiguous", "columns", "transposed", "offset_3"):
            assert_same("constant_", lambda at=layout: LAYOUTS[at](999, dtype), value)
    for name in ("zeros_", "ones_"):
        for size in (1, 2, 3, 4, 5, 31, 1000, 70_001):
            assert_same(name, lambda n=size: apart(n, dtype))


@pytest.mark.parametrize("law", LAWS)
def test_no_elements_and_no_dimensions(law: str) -> None:
    name, args = LAWS[law]
    for shape in [(0,), (0, 3), (4, 0, 5), (), (1,), (1, 1, 1)]:
        for position in (Position(), Position(cached=True)):
            for dtype in DTYPES:
                make = lambda s=shape, d=dtype: torch.full(s, 13.0, dtype=d)  # noqa: E731
                assert_same(name, make, *args, at=position)


@pytest.mark.parametrize("law", LAWS)
def test_around_the_smallest_native_size(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    name, args = LAWS[law]
    limit = fastinit.core.geometry.MIN_NATIVE
    assert limit > 0
    for size in {1, limit - 1, limit, limit + 1} - {0}:
        assert_same(name, lambda n=size: apart(n, F32), *args)
    # Filling with a constant is so cheap in torch that it pays only from far more elements on.
    assert_same(
        name, lambda: apart((limit + 1) * (600 if len(args) < 2 else 1), F32), *args, native=True
    )


# Where the suite insists on fastinit's own kernels, so that equality is not torch against torch.
NATIVE_LAYOUTS = ("contiguous", "matrix", "transposed", "channels_last", "columns")
NATIVE_LAYOUTS += ("every_second_row", "offset_1", "parameter", "data", "ones_with_odd_strides")


@pytest.mark.parametrize("layout", NATIVE_LAYOUTS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_path_is_used(law: str, layout: str, dtype: torch.dtype) -> None:
    name, args = LAWS[law]
    if law == "trunc_normal" and not LAYOUTS[layout](5040, dtype).is_contiguous():
        args = (0.0, 0.02, -2.0, 2.0)  # rounds of redraws are native in contiguous memory only
    assert_same(name, lambda: LAYOUTS[layout](5040, dtype), *args, native=True)


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
