# SPDX-License-Identifier: BSD-3-Clause
"""Fills by a Key, and the laws that tests of keyed numbers go through."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastinit
from tests.support import keyed_model as model
from tests.support.compare import DTYPES, F32, F64, bits

api: Any = fastinit


SEED, NAME = 20240229, "layers.0.w"
PHILOX = model.philox_key(SEED, NAME)


DATA = Path(__file__).parent / "data"


def known(name: str) -> Any:
    return json.loads((DATA / name).read_text())


Call = tuple[str, tuple[float, ...]]


LAWS: list[Call] = [
    ("uniform_", (-0.3, 0.7)),
    ("normal_", (0.1, 0.5)),
    ("trunc_normal_", (0.0, 1.0, -2.0, 2.0)),
    ("trunc_normal_", (0.1, 0.02, 0.13, 0.3)),
]


OF_FANS: list[Call] = [
    ("xavier_uniform_", (1.5,)),
    ("xavier_normal_", ()),
    ("kaiming_uniform_", (0.2,)),
    ("kaiming_normal_", ()),
]


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


each_wide = pytest.mark.parametrize("dtype", [F32, F64], ids=str)


each_law = pytest.mark.parametrize(("name", "args"), LAWS, ids=str)


TRUNCATED = [
    (0.0, 1.0, -2.0, 2.0),
    (0.0, 1.0, -0.1, 0.1),
    (0.0, 1.0, 0.0, 1.0),
    (0.0, 1.0, 2.0, 3.0),
    (0.0, 1.0, 5.0, 6.0),
    (0.0, 1.0, -6.0, -5.0),
    (0.0, 1.0, -1.0, 3.0),
    (0.0, 1.0, -100.0, 100.0),
    (0.0, 0.02, -2.0, 2.0),
    (0.3, 0.02, 0.25, 0.4),
    (-5.0, 2.0, -2.0, 2.0),
    (1000.0, 0.5, 999.1, 1002.0),
]


each_truncated = pytest.mark.parametrize("law", TRUNCATED, ids=str)


def key() -> Any:
    return api.Key(SEED, NAME)


def fill(
    name: str,
    where: torch.Tensor | Sequence[int],
    *args: Any,
    dtype: torch.dtype = F32,
    **options: Any,
) -> torch.Tensor:
    """The filled tensor, or a filled one of that shape."""
    if isinstance(where, torch.Tensor):
        tensor = where
    else:
        poison = math.nan if dtype.is_floating_point else 77
        tensor = torch.full(tuple(where), poison, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bounds far from the mean, nothing to fill
        returned: torch.Tensor = getattr(fastinit, name)(tensor, *args, **options)
    assert returned is tensor
    return tensor


def assert_bits(found: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    wrong = (bits(found) != bits(expected)).nonzero()
    assert not len(wrong), f"{what}: {len(wrong)} of {found.numel()}, first {wrong[0].tolist()}"


def upto(n: int) -> model.Numbers:
    return np.arange(n, dtype=np.uint64)
