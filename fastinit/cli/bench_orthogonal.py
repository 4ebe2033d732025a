# SPDX-License-Identifier: BSD-3-Clause
"""orthogonal_ beside torch's: matrices large, small and many, factored and without factoring."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastinit
from fastinit.cli.bench import Case
from fastinit.core import fill as fill_
from fastinit.cpu import qr as cpu_qr

GOALS = {  # times as fast as torch
    "orthogonal_ 2048 x 2048": 2.0,
    "orthogonal_ 1024 x 1024": 2.0,
    "orthogonal_ 32 of 512 x 512": 3.0,
    "orthogonal_ 4096 of 64 x 64": 8.0,
    "orthogonal_ 1000 of 20 shapes": 6.0,
    "orthogonal_ 10 of an RL policy": 4.0,
    "Haar 2048 x 2048": 3.5,
    "Haar 1024 x 1024": 3.0,
    "Haar 32 of 512 x 512": 5.0,
    "Haar 4096 of 64 x 64": 10.0,
    "Haar 1000 of 20 shapes": 8.0,
    "Haar 10 of an RL policy": 4.0,
}


def cases() -> list[Case]:
    batches = {
        "2048 x 2048": torch.ones(1, 2048, 2048),
        "1024 x 1024": torch.ones(1, 1024, 1024),
        "32 of 512 x 512": torch.ones(32, 512, 512),
        "4096 of 64 x 64": torch.ones(4096, 64, 64),
    }
    sizes = random.Random(0)
    shapes = [(sizes.randint(8, 128), sizes.randint(8, 128)) for _ in range(20)]
    lists = {
        "1000 of 20 shapes": [torch.ones(shapes[i % 20]) for i in range(1000)],
        "10 of an RL policy": [torch.ones(64, n) for n in (8, *[64] * 8)] + [torch.ones(4, 64)],
    }
    made = [_batch(name, t) for name, t in batches.items()]
    made += [_list(name, tensors) for name, tensors in lists.items()]
    made += [_haar(name, [t]) for name, t in batches.items()]
    return made + [_haar(name, tensors) for name, tensors in lists.items()]


def _rounds(tensors: list[Tensor]) -> tuple[int, int]:
    """Runs in one timing, and timings."""
    return (20, 9) if sum(t.numel() for t in tensors) < 1 << 17 else (1, 5)


def _case(name: str, tensors: list[Tensor], fill: Callable[..., object], **more: Any) -> Case:
    calls, rounds = _rounds(tensors)

    def repeated(f: object) -> None:
        for _ in range(calls):
            fill(f)

    return Case(name, tensors, repeated, calls=calls, rounds=rounds, rounding=1e-2, **more)


def _one_by_one(f: Any, matrices: list[Tensor]) -> None:
    for t in matrices:
        f.orthogonal_(t)


def _batch(name: str, t: Tensor) -> Case:
    def fill(f: object) -> None:
        if f is fastinit:
            fastinit.orthogonal_batched_(t)
        else:
            _one_by_one(f, list(t))

    return _case(f"orthogonal_ {name}", [t], fill)


def _list(name: str, tensors: list[Tensor]) -> Case:
    p = fastinit.Plan()
    for t in tensors:
        p.orthogonal_(t)
    calls = _rounds(tensors)[0]

    def planned() -> None:
        for _ in range(calls):
            p.run()

    return _case(f"orthogonal_ {name}", tensors, lambda f: _one_by_one(f, tensors), planned=planned)


def _haar(name: str, tensors: list[Tensor]) -> Case:
    """torch's orthogonal_ beside the same law without factoring, which has other numbers."""
    matrices = [m for t in tensors for m in (t if t.dim() == 3 else [t])]
    sizes = [t.shape[:-2].numel() * fill_.packed_items(*t.shape[-2:]) for t in tensors]

    def fill(f: object) -> None:
        if f is not fastinit:
            _one_by_one(f, matrices)
            return
        normals = fastinit.normal_(torch.empty(sum(sizes)))
        cpu_qr.run(
            [cpu_qr.haar_job(t, g, 1.0) for t, g in zip(tensors, torch.split(normals, sizes))]
        )

    return _case(f"Haar {name}", tensors, fill, compared=False)
