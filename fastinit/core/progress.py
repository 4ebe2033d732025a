# SPDX-License-Identifier: BSD-3-Clause
"""Progress bars, where tqdm is installed."""

from __future__ import annotations

from typing import Any


def bar(total: int, unit: str, **more: Any) -> Any:
    """Return a bar of tqdm, or None if it is not installed."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return None
    return tqdm(total=total, unit=f" {unit}", **more)
