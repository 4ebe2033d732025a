# SPDX-License-Identifier: BSD-3-Clause
"""Progress bars, where tqdm is installed."""

from __future__ import annotations

from typing import Any


def bar(total: int, unit: str, **more: Any) -> Any:
    """A bar of tqdm's, or None."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return None
    return tqdm(total=total, unit=f" {unit}", **more)
