# SPDX-License-Identifier: BSD-3-Clause
"""trunc_normal_ draws again in several ways, by how many elements wait: all have torch's bits."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastinit
from tests.support.compare import F32
from tests.support.marks import slow

TARGETS = [name for name, runs in fastinit._cpu.targets() if runs]

# One draw of 4, of 22, of 370, of 15,000 is outside, or most below; sizes end in groups of 16, in
# half a step of 32, and in elements whose words torch draws anew.
COMPARE = """
    import torch, fastinit
    from fastinit.core import kernels
    BOUNDS = [(-1.15, 1.15), (-2.0, 2.0), (-3.0, 3.0), (-4.0, 4.0), (-1.0, 5.0), (0.3, 9.0)]
    SIZES = [8192, 8192 + 16, 40960 + 5, 3 * 32768 + 48 + 15]
    def compare(dtype):
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        wrong = []
        for n, (bounds, size) in enumerate((b, s) for b in BOUNDS for s in SIZES):
            found = []
            for module in (torch.nn.init, fastinit):
                g = torch.Generator().manual_seed(n)
                torch.empty(n).uniform_(generator=g)
                count = kernels.native_fills
                t = torch.full((size + 3,), -77.0, dtype=dtype)
                module.trunc_normal_(t[1 : size + 1], 0.0, 1.0, *bounds, generator=g)
                found.append((t.view(kind), g.get_state()))
            same = all(map(torch.equal, *found))
            if not same or kernels.native_fills == count:
                wrong.append((str(dtype), bounds, size, same))
        return wrong
"""
space: dict[str, Any] = {}
exec(textwrap.dedent(COMPARE), space)


@pytest.mark.parametrize(
    "dtype", [F32, *slow([torch.float64, torch.bfloat16, torch.float16])], ids=str
)
def test_every_way(dtype: torch.dtype) -> None:
    assert space["compare"](dtype) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_targets(python: Callable[..., Any], target: str) -> None:
    code = COMPARE + (
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "        assert compare(dtype) == [], compare(dtype)\n"
        "    print(fastinit._cpu.target())\n"
    )
    done = python(code, FASTINIT_TARGET=target, timeout=300)
    assert done.stdout.split() == [target], done.stderr[-2000:]
