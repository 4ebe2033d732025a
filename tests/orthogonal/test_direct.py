# SPDX-License-Identifier: BSD-3-Clause
"""Matrices from packed reflectors, and matrices that no generator gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastinit.core import fill as fill_
from fastinit.cpu import qr as cpu_qr
from tests.support.compare import F32, F64
from tests.support.layouts import box
from tests.support.marks import slow
from tests.support.orthogonal import assert_close, each_dtype, each_width
from tests.support.qr_model import defect, drawn, exact, factor, stewart

pytestmark = pytest.mark.usefixtures("one_thread")

DIRECT = [(1, 1), (2, 2), (3, 3), (5, 3), (3, 5), (1, 9), (9, 1), (16, 16), (33, 32), (64, 64)]
DIRECT += [(65, 65), (64, 200), (200, 65), (66, 300), (130, 131), (2, 5000)]
LARGE = [(300, 300), (600, 520), (5000, 2), (4200, 70)]


CASES = [(DIRECT, -2.5), pytest.param(LARGE, 1.0, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("shapes", "gain"), CASES, ids=["", "large"])
@each_dtype
def test_direct(dtype: torch.dtype, shapes: list[tuple[int, int]], gain: float) -> None:
    torch.manual_seed(12)
    for rows, columns in shapes:
        m, n = max(rows, columns), min(rows, columns)
        for count in (1,) if m > 500 else (1, 3):
            packed = drawn((count, m * n - n * (n - 1) // 2), dtype)
            t = box(count, rows, columns, dtype=dtype)
            version = t._version
            assert cpu_qr.write_haar_(t, packed.clone(), gain) is t
            assert t._version == version + 1
            for q, x in zip(t, packed):
                truth = torch.from_numpy(stewart(x.numpy(), m, n))
                truth = truth.T if rows < columns else truth
                assert_close(q, truth, (rows, columns), gain)


def test_direct_without_signs_is_something_else() -> None:
    """That the comparison above can fail."""
    packed = drawn((9 * 10 // 2,), F32)
    t = cpu_qr.write_haar_(torch.empty(9, 9), packed)
    assert_close(t, torch.from_numpy(stewart(packed.numpy(), 9, 9)))
    with pytest.raises(AssertionError):
        assert_close(t, torch.from_numpy(stewart(packed.numpy(), 9, 9, signed=False)))


@pytest.mark.parametrize("n", [64, 200, *slow([530, 1030])])
def test_direct_is_orthogonal(n: int) -> None:
    for dtype, most in [(F32, 1e-6), (F64, 5e-15)]:
        torch.manual_seed(n)
        packed = drawn((n * (n + 1) // 2,), dtype)
        found = cpu_qr.write_haar_(torch.empty(n, n, dtype=dtype), packed)
        assert defect(found) <= most * math.sqrt(n)


def test_direct_refuses() -> None:
    good = torch.randn(fill_.packed_items(5, 3))
    for t, x in [
        (torch.empty(5, 3), good[:-1]),
        (torch.empty(5, 3), good.double()),
        (torch.empty(5, 3, dtype=F64), good),
        (torch.empty(3, 5).t(), good),
        (torch.empty(2, 5, 3), good),
        (torch.empty(5, 3), torch.randn(2 * len(good))[::2]),
        (torch.empty(5, 3, device="meta"), good),
    ]:
        with pytest.raises(ValueError, match="packed normals"):
            cpu_qr.write_haar_(t, x)


def special(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    rows, columns = shape
    g = drawn(shape, dtype, torch.Generator().manual_seed(4))
    if kind.startswith("scaled"):
        _, what, by = kind.split()
        {"all": g, "rows": g[::3], "columns": g[:, 1::3]}[what].mul_(float(by))
    elif kind == "rank 3":
        g = g[:, :3] @ g[:3]
    elif kind == "identity":
        g = torch.eye(rows, columns, dtype=dtype)
    elif kind == "negative identity":
        g = -torch.eye(rows, columns, dtype=dtype)
    elif kind == "triangle":
        g = g.triu()
    elif kind == "ones":
        g.fill_(1)
    elif kind == "duplicates":
        (g if rows >= columns else g.T)[:, 1::2] = (g if rows >= columns else g.T)[:, ::2]
    return g


SCALED = [f"scaled {what} {by}" for what in ("all", "rows", "columns") for by in (1e-30, 1e30)]
SPECIAL = ["rank 3", "identity", "negative identity", "triangle", *SCALED]


@pytest.mark.parametrize("kind", [*SPECIAL, "scaled columns 1e-10", "scaled columns 1e10"])
@each_width
def test_orthogonal_where_torch_is(kind: str, dtype: torch.dtype) -> None:
    for shape in [(40, 30), (30, 40), (100, 80), (80, 100), (160, 160)]:
        given = special(kind, shape, dtype)
        theirs, ours = factor(given), given.clone()
        cpu_qr.factor_(ours, 1.0)
        assert not bool(ours.isnan().any()), shape
        unit = (1e-15 if dtype == F64 else 1e-6) * max(shape)
        assert defect(ours) <= max(2 * defect(theirs), unit), shape


@pytest.mark.parametrize("kind", ["duplicates", "ones"])
@each_width
def test_equal_columns(kind: str, dtype: torch.dtype) -> None:
    """Rounding decides, in LAPACK too, which of them become 0; the others are orthonormal."""
    for shape in [(40, 30), (30, 40), (100, 80), (300, 200)]:
        ours = special(kind, shape, dtype)
        cpu_qr.factor_(ours, 1.0)
        vectors = ours.T if shape[0] < shape[1] else ours
        length = vectors.double().norm(dim=0)
        assert bool(((length == 0) | (length > 0.5)).all())
        assert int((length > 0.5).sum()) >= (1 if kind == "ones" else min(shape) // 2)
        assert defect(vectors[:, length > 0.5]) <= (1e-15 if dtype == F64 else 1e-6) * max(shape)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@each_width
def test_scales_do_not_matter(scale: float, dtype: torch.dtype) -> None:
    """The factor of R with its columns scaled is the same."""
    for shape in [(40, 30), (100, 80)]:
        given = special("", shape, dtype)
        given[:, ::2] *= scale
        truth = exact(given)
        cpu_qr.factor_(given, 1.0)
        assert float((given.double() - truth).abs().max()) < (1e-4 if dtype == F32 else 1e-11)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (40, 40), (100, 80), (80, 100)], ids=str)
@each_width
def test_zeros_stay_zeros(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """sign(0) = 0, as in torch's formula."""
    zeros = torch.zeros(2, *shape, dtype=dtype)
    cpu_qr.factor_(zeros, 1.0)
    assert not bool(zeros.any())
    if min(shape) < 3:
        return
    given = special("", shape, dtype)
    vectors = given if shape[0] >= shape[1] else given.T
    vectors[:, 0] = 0
    theirs = factor(given)
    cpu_qr.factor_(given, 1.0)
    found = given if shape[0] >= shape[1] else given.T
    expected = theirs if shape[0] >= shape[1] else theirs.T
    assert not bool(expected[:, 0].any())
    assert not bool(found[:, 0].any())
    assert not bool(found.isnan().any())
    assert defect(found[:, 1:]) <= max(2 * defect(expected[:, 1:]), 1e-14)
