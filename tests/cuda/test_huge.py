# SPDX-License-Identifier: BSD-3-Clause
"""Tensors beyond torch's 32-bit indexing on a real GPU; a dry run takes a thousandth of them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import fastinit
from fastinit.core import kernels
from tests.support.compare import BF16, F16, F32, F64, POISONS
from tests.support.cuda_gpu import ON_GPU, REJECTS, At, Gpu, only_real

G = 2**30 // (1 if ON_GPU else 1024)
FAR = (G // 2**17 + 1) * 2**14
# dtype; elements of the storage; sizes, strides and offset of the view
HUGE: dict[str, tuple[torch.dtype, int, tuple[Any, ...] | None]] = {
    "float32": (F32, G // 2 + 5, None),
    "float64": (F64, G // 4 + 1, None),
    "bfloat16": (BF16, G + 3, None),
    "float16": (F16, G + 1, None),
    "float32 just not": (F32, G // 2, None),
    "unaligned": (BF16, G + 9, ((G + 2,), (1,), 7)),
    "transposed": (BF16, G + 2**10, ((2**10, G // 2**10 + 1), (1, 2**10))),
    "every second": (F32, G, ((G // 2,), (2,), 1)),
    "columns": (F32, G // 2 + 3 * 2**13, ((G // 2**14 + 3, 2**12 - 1), (2**13, 2))),
    "far": (F32, G // 2 + 1013, ((2, 1013), (G // 2, 1))),
    "three far": (F64, G // 2 + 777, ((259, 3, 3), (3, G // 4, 1))),
    "four dimensions": (F32, 7 * FAR, ((2**6, G // 2**17, 5, 60), (2**6, 2**14, FAR, 1), 3)),
}
WITH_GAPS = ("every second", "columns", "far", "three far", "four dimensions")
LAWS = {
    "uniform": ("uniform_", (-0.3, 0.7)),
    "normal": ("normal_", (0.1, 0.5)),
    "trunc far": ("trunc_normal_", (0.0, 0.02, -2.0, 2.0)),
    "trunc": ("trunc_normal_", (0.1, 0.5, -0.9, 1.1)),  # with gaps it is torch's from 2.12 on
    "constant": ("constant_", (0.1,)),
}


def huge(case: str, gpu: Gpu, value: float) -> torch.Tensor:
    dtype, items, view = HUGE[case]
    base = gpu.full(items, dtype=dtype, value=value)
    return base if view is None else base.as_strided(*view)


def skip_without(gigabytes: float) -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(0)
        if free < gigabytes * 2**30:
            pytest.skip(f"{free / 2**30:.1f} of {gigabytes} GiB are free")


def assert_same_storage(one: torch.Tensor, other: torch.Tensor, step: int = 1 << 26) -> None:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    x, y = (
        torch.empty(0, dtype=kind, device=t.device).set_(t.untyped_storage()) for t in (one, other)
    )
    assert len(x) == len(y)
    assert all(torch.equal(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step))


@only_real
@pytest.mark.parametrize("case", HUGE)
@pytest.mark.parametrize("law", LAWS)
def test_huge(law: str, case: str, gpu: Gpu) -> None:
    name, args = LAWS[law]
    skip_without(24 if law == "trunc" and REJECTS else 16)
    seen, tensors = [], []
    poisons = POISONS if case not in WITH_GAPS else (13.0, 13.0)  # gaps have to be equal
    for module, poison in zip((gpu.torch, fastinit), poisons):
        t = huge(case, gpu, poison)
        gpu.place_defaults(At(3, 4 * (2**32 - 3)))
        done, version = kernels.native_fills, t._version
        getattr(module, name)(t, *args)
        done = kernels.native_fills - done
        seen.append({"versions": t._version - version, **gpu.states()})
        tensors.append(t)
    gpu.assert_same(seen[0], seen[1], f"{law}, {case}")
    if case == "unaligned":
        tensors = [t.clone() for t in tensors]
    assert_same_storage(*tensors)
    native = law != "trunc" or case not in WITH_GAPS
    assert done > 0 or not (native and gpu.is_gpu), "left to torch"


@only_real
def test_huge_among_small(gpu: Gpu) -> None:
    skip_without(12)
    results = []
    for planned in (False, True):
        gpu.place_defaults(At(3, 44))
        small = [gpu.full(n) for n in (1000, 7, 300_001)]
        tensors = [small[0], huge("float32", gpu, 13.0), small[1]]
        tensors += [huge("columns", gpu, 13.0), small[2]]
        made = fastinit.Plan()
        to: Any = made if planned else gpu.torch
        for name, t in zip(("normal_", "normal_", "uniform_", "uniform_", "normal_"), tensors):
            getattr(to, name)(t, 0.0, 0.5)
        gpu.launches.clear()
        made.run()
        results.append((tensors, gpu.states()))
    gpu.assert_same(results[0][1], results[1][1], "plan")
    for a, b in zip(results[0][0], results[1][0]):
        assert_same_storage(a, b)
    assert not gpu.is_gpu or len(gpu.launches) == 1
