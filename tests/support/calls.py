# SPDX-License-Identifier: BSD-3-Clause
"""One call of every kind, for tests of who gets to see what."""

from __future__ import annotations

from typing import Any

import pytest

CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("uniform_", (-1.0, 0.5)),
    ("normal_", (0.0, 0.5)),
    ("trunc_normal_", (0.0, 1.0, -2.0, 2.0)),
    ("trunc_normal_", (0.0, 0.02)),
    ("constant_", (0.5,)),
    ("ones_", ()),
    ("zeros_", ()),
    ("eye_", ()),
    ("xavier_uniform_", ()),
    ("xavier_normal_", ()),
    ("kaiming_uniform_", ()),
    ("kaiming_normal_", ()),
    ("orthogonal_", ()),
    ("sparse_", (0.25,)),
]
each_call = pytest.mark.parametrize(("name", "args"), CALLS, ids=lambda v: str(v))
