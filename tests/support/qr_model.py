# SPDX-License-Identifier: BSD-3-Clause
"""Orthogonal matrices by torch, numpy and nothing of fastinit: what orthogonal_ has to give."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

F64 = torch.float64


def drawn(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The normals: float32 for the dtypes of 16 bits."""
    wide = F64 if dtype == F64 else torch.float32
    return torch.empty(tuple(shape), dtype=wide).normal_(generator=generator)


def flat(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def factor(matrices: torch.Tensor) -> torch.Tensor:
    """torch.nn.init.orthogonal_'s formula, in the precision of what is given."""
    wide = matrices.shape[-2] < matrices.shape[-1]
    q, r = torch.linalg.qr(matrices.mT if wide else matrices)
    signed: torch.Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return signed.mT if wide else signed


def exact(matrices: torch.Tensor) -> torch.Tensor:
    return factor(matrices.double())


def extended(matrix: np.ndarray) -> np.ndarray:
    """The factor of a tall matrix in 80 bits, for what float64 has to be compared with."""
    m, n = matrix.shape
    a = matrix.astype(np.longdouble)
    reflectors = []
    signs = np.empty(n, dtype=np.longdouble)
    for k in range(n):
        v = a[k:, k].copy()
        beta = -np.copysign(np.sqrt(v @ v), v[0])
        signs[k] = np.sign(beta)
        v[0] -= beta
        v /= np.sqrt(v @ v)
        a[k:, k:] -= np.outer(2 * v, v @ a[k:, k:])
        reflectors.append(v)
    return _product(reflectors, m, n) * signs


def _product(reflectors: list[np.ndarray], m: int, n: int) -> np.ndarray:
    """The first n columns of H_0 ... H_{n-1}, each I - 2 v v'."""
    q = np.eye(m, n, dtype=reflectors[0].dtype)
    for k in reversed(range(n)):
        v = reflectors[k]
        q[k:, k:] -= np.outer(2 * v, v @ q[k:, k:])
    return q


def stewart(packed: np.ndarray, m: int, n: int, signed: bool = True) -> np.ndarray:
    """The m x n matrix, m >= n, that Householder's reflectors of these columns make. `packed`: row
    i of the lower trapezoid holds min(i + 1, n) values."""
    x = np.zeros((m, n))
    x[np.tril_indices(m, 0, n)] = packed.astype(np.float64)
    reflectors, signs = [], np.ones(n)
    for k in range(n):
        v = x[k:, k].copy()
        beta = -math.copysign(math.sqrt(v @ v), v[0])
        v[0] -= beta
        reflectors.append(v / math.sqrt(v @ v))
        if signed:
            signs[k] = math.copysign(1.0, beta)
    return _product(reflectors, m, n) * signs


def column_errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Distances of the orthonormal vectors: the columns, or if there are fewer, the rows."""
    wide = found.shape[-2] < found.shape[-1]
    return (found.double() - truth).square().sum(-1 if wide else -2).sqrt()


def defect(q: torch.Tensor) -> float:
    """|| Q'Q - I ||, of the smaller of the two products."""
    q = q.double()
    if q.shape[0] < q.shape[1]:
        q = q.T
    return float((q.T @ q - torch.eye(q.shape[1], dtype=F64)).norm())


def rounding(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half of the distance between the dtype's numbers there."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(truth.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(truth, info.eps / 4), exponent)
