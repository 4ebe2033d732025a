# SPDX-License-Identifier: BSD-3-Clause
"""Models and short forms for tests of what a Report says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastinit import Report, materialize_
from fastinit.core import geometry


def counts(report: Report) -> tuple[int, int, int, int]:
    return (
        report.recorded_elements,
        report.written_elements,
        report.dropped_elements,
        report.at_once_elements,
    )


SEED = 20240229


each_seed = pytest.mark.parametrize("seed", [None, SEED], ids=["torch", "seed"])


each_size = pytest.mark.parametrize("n", [4, 100], ids=["small", "large"])


def holder(w: Tensor) -> Any:
    model = nn.Module()
    model.w = nn.Parameter(w, w.is_floating_point())
    return model


def linear(n: int) -> Any:
    """As others have it before."""
    return nn.Sequential(nn.Linear(n, n, bias=False))


def statuses(report: Report) -> dict[str, str]:
    return {row.name: row.status for row in report.rows()}


def quietly(model: nn.Module, **options: Any) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return materialize_(model, **options)


def on_meta(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make()


class Large(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    written_by: tuple[str, ...]


def rows(report: Report) -> list[Large]:
    """What could wait; test_audit.py looks at the small ones, too."""
    large = geometry.MIN_NATIVE
    return [
        Large(*r[:4])
        for r in report.rows()
        if math.prod(r.shape) >= large or any(w.items >= large for w in r.laws)
    ]


def names(report: Report) -> list[str]:
    return [row.name for row in rows(report)]
