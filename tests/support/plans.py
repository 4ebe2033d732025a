# SPDX-License-Identifier: BSD-3-Clause
"""How to compare a plan with the same calls made one by one in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.init as torch_init

import fastinit
from tests.support.compare import Position, storage_bits

Step = tuple[str, int, tuple[Any, ...], dict[str, Any]]  # function, which tensor, arguments

FILLS = [n for n in torch_init.__all__ if n.endswith("_")]


def compare(
    make: Callable[[], list[torch.Tensor]],
    steps: list[Step],
    at: Position | None = None,
    runs: int = 1,
) -> None:
    """Do the steps one by one in torch and as a plan here; a generator is given by its number."""
    at = at or Position()
    results = []
    for planned in (False, True):
        generators = [at.place(torch.Generator()), Position(seed=8).place(torch.Generator())]
        at.place(torch.default_generator)
        tensors = make()
        before = [t._version for t in tensors]
        plan = fastinit.Plan()
        for _ in range(1 if planned else runs):
            for name, which, args, options in steps:
                chosen = dict(options)
                if "generator" in chosen:
                    chosen["generator"] = generators[chosen["generator"]]
                function = getattr(plan if planned else torch_init, name)
                assert function(tensors[which], *args, **chosen) is tensors[which]
        if planned:
            assert [t._version for t in tensors] == before, "recorded, but already written"
            for _ in range(runs):
                assert plan.run() is None
        results.append(
            {f"storage {i}": storage_bits(t) for i, t in enumerate(tensors)}
            | {f"version {i}": t._version - b for i, (t, b) in enumerate(zip(tensors, before))}
            | {f"generator {i}": g.get_state() for i, g in enumerate(generators)}
            | {"default generator": torch.get_rng_state()}
        )
    for key, expected in results[0].items():
        found = results[1][key]
        same = (
            torch.equal(expected, found) if isinstance(found, torch.Tensor) else expected == found
        )
        assert same, f"{key}: torch {expected}, the plan {found}"


ARGS: dict[str, tuple[Any, ...]] = {"constant_": (0.5,), "sparse_": (0.25,)}


def shape_for(name: str) -> tuple[int, ...]:
    return (8, 4, 5) if name == "dirac_" else (40, 30)
