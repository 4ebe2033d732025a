# SPDX-License-Identifier: BSD-3-Clause
"""Marks that several files use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(values: Iterable[Any]) -> list[Any]:
    """Return the values as parameters that only `pytest -m ""` or `-m slow` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_but(every: Iterable[Any], *usual: Any) -> list[Any]:
    """Return all values as parameters, of which only `usual` run by default."""
    return [v if v in usual else pytest.param(v, marks=pytest.mark.slow) for v in every]
