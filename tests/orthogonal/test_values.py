# SPDX-License-Identifier: BSD-3-Clause
"""orthogonal_ at every size: torch's normals to the bit, their exact factor up to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastinit
from tests.support.compare import BF16, F16, F32, F64, Position, assert_same
from tests.support.orthogonal import FEW, assert_matrix, check, each_dtype, of
from tests.support.qr_model import drawn, exact, flat, rounding

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: list[tuple[int, ...]] = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 15),
    (1, 16),
    (1, 17),
    (17, 1),
    (3, 5),
    (5, 3),
    (2, 2),
]
SMALL += [(4, 4), (3, 4), (2, 8), (15, 15), (16, 16), (17, 17), (16, 33), (31, 32), (33, 31)]
SMALL += [(8, 3, 3), (4, 2, 3, 3), (7, 2, 1, 3, 2), (1, 2, 3), (3, 1, 1), (32, 1), (1, 700)]
EDGES = [(63, 63), (64, 64), (65, 65), (64, 65), (65, 64), (500, 64), (65, 500), (127, 129)]
EDGES += [(128, 128), (129, 127), (96, 97), (160, 40), (4095, 8), (17, 4097), (66, 4099)]
LARGE = [(255, 257), (512, 511), (513, 700), (20000, 1), (20000, 17), (17, 20000), (9000, 70)]
LARGE += [(256, 64, 3, 3)]


@pytest.mark.parametrize("way", ["default", "explicit"])
@each_dtype
def test_small(dtype: torch.dtype, way: str) -> None:
    for shape in SMALL:
        for at in (Position(), Position(words=619, cached=True), Position(words=1, seed=5)):
            check(of(shape), dtype, at=at, way=way)


@each_dtype
def test_edges(dtype: torch.dtype) -> None:
    """Where double becomes float, and chunks, stripes and pieces end."""
    for i, shape in enumerate(EDGES):
        way = ("default", "explicit")[i // 2 % 2]
        check(of(shape), dtype, -1.5, Position(words=i, cached=i % 2 == 0), way)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(20000, 3), (16, 4096), (2, 64, 64, 1)], ids=str)
def test_a_few_columns_are_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """All bits; of 16-bit types, which torch refuses, they are ours."""
    assert_same("orthogonal_", lambda: torch.full(shape, 13.0, dtype=dtype), 0.5)
    torch.manual_seed(4)
    t = fastinit.orthogonal_(torch.empty(shape, dtype=BF16), 2.0).double().flatten(1)
    assert (t if t.shape[0] < t.shape[1] else t.mT).square().sum(1).sub(4).abs().max() < 0.02
    by_three = torch.empty(3, *shape[:1], t.shape[1], dtype=dtype)
    torch.manual_seed(4)
    q = fastinit.orthogonal_batched_(by_three)
    q = q.mT if q.shape[-2] < q.shape[-1] else q
    torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[-1], dtype=dtype).expand(3, -1, -1))


@pytest.mark.slow
@each_dtype
def test_large(dtype: torch.dtype) -> None:
    for i, shape in enumerate(LARGE):
        check(of(shape), dtype, at=Position(words=i, cached=i % 2 == 0))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), [((1024, 1024), F32), ((1025, 1030), BF16)], ids=str)
def test_threads_share_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.set_num_threads(3)
    check(of(shape), dtype, 0.5)


@each_dtype
def test_many_in_a_row(dtype: torch.dtype) -> None:
    """The second of a pair of normals goes from one small matrix to the next."""
    own, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for shape in [(3, 3), (1, 1), (5, 3), (2, 2, 1), (4, 4), (7, 1), (1, 9), (3, 5), (20, 3)] * 3:
        found = fastinit.orthogonal_(torch.empty(shape, dtype=dtype), generator=own)
        assert_matrix(found, drawn(flat(shape), dtype, theirs), what=shape)
        assert torch.equal(own.get_state(), theirs.get_state())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 5), (0, 4, 4)], ids=str)
@each_dtype
def test_no_elements(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A no-op in torch, of every dtype; in a batch as well."""
    assert_same("orthogonal_", lambda: torch.empty(shape, dtype=dtype))
    state = torch.get_rng_state()
    t = torch.empty(shape, dtype=dtype)
    assert fastinit.orthogonal_batched_(t) is t
    assert torch.equal(state, torch.get_rng_state())
    assert t._version == 0


# ---- 16 bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1, 1.7, -(2.0**0.5)])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounded_once(dtype: torch.dtype, gain: float) -> None:
    """To the nearest, ties to even, of what float32 would hold: gain * Q, neither alone."""
    for shape, differing in [((64, 500), 1e-4), ((50, 50), 1e-4), ((300, 200), 3e-3)]:
        torch.manual_seed(8)
        truth = exact(drawn(shape, dtype)).float() * gain  # in float32
        torch.manual_seed(8)
        found = fastinit.orthogonal_(torch.empty(shape, dtype=dtype), gain)
        nearest = torch.from_numpy(nearest_of(truth.numpy(), dtype))
        assert float((found.double() != nearest).double().mean()) <= differing
        error = (found.double() - nearest).abs()
        # One unit; near 0 what float32 leaves may be more.
        most = 2.01 * rounding(truth.double(), dtype)
        assert bool((error <= most + (min(shape) > FEW) * 1e-6).all())


def nearest_of(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype == F16:
        return values.astype(np.float16).astype(np.float64)
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.asarray(np.ldexp(np.rint(mantissa * 256), exponent - 8))


def test_16_bits_in_inference_mode() -> None:
    with torch.inference_mode():
        torch.manual_seed(8)
        found = fastinit.orthogonal_(torch.empty(20, 30, dtype=BF16))
        torch.manual_seed(8)
        assert_matrix(found, drawn((20, 30), BF16))
