# SPDX-License-Identifier: BSD-3-Clause
"""The keyed stream is frozen: a value that changes is a major release.

`python tests/keyed/test_golden.py` writes tests/support/data/golden.json anew, for that release.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastinit

FILE = Path(__file__).parents[1] / "support" / "data" / "golden.json"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Name -> arguments and shape. The hashes are of what is in memory, row-major.
CASES: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "uniform_": ((-0.3, 0.7), (37, 45)),
    "normal_": ((0.1, 0.02), (37, 45)),
    "trunc_normal_": ((0.0, 1.0, -2.0, 2.0), (37, 45)),
    "xavier_uniform_": ((1.5,), (6, 5, 3, 3)),
    "xavier_normal_": ((1.5,), (6, 5, 3, 3)),
    "kaiming_uniform_": ((0.1, "fan_out"), (6, 5, 3, 3)),
    "kaiming_normal_": ((0, "fan_in", "relu"), (6, 5, 3, 3)),
    "sparse_": ((0.3, 0.5), (37, 45)),
    "eye_": ((), (37, 45)),
    "dirac_": ((2,), (6, 5, 3, 3)),
    "constant_": ((0.7,), (37, 45)),
}
FAR = (
    (1 << 20, 1 << 20),
    (1 << 19, 12345),
)  # a part of which whole, and where: elements beyond 2^32


def digest(t: torch.Tensor) -> str:
    return hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def fill(name: str, dtype: torch.dtype, *part: tuple[int, ...]) -> torch.Tensor:
    args, shape = CASES[name]
    key = fastinit.Key(2026, "golden/" + name)
    options = {"generator": key.part(*part) if part else key}
    if name in ("eye_", "dirac_", "constant_"):
        options = {}
    return getattr(fastinit, name)(torch.empty(shape, dtype=dtype), *args, **options)  # type: ignore[no-any-return]


def orthogonal(dtype: torch.dtype) -> torch.Tensor:
    t = torch.empty(12, 7, dtype=dtype)
    return fastinit.orthogonal_(t, 1.5, generator=fastinit.Key(2026, "golden/orthogonal_"))


def model() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(50, 24), nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 9)
    )


def of_model() -> str:
    with fastinit.fused(seed=7):
        made = model()
    return digest(torch.cat([p.detach().flatten() for p in made.parameters()]))


def current() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for name in CASES:
            found[f"{name} {kind}"] = digest(fill(name, dtype))
        for name in ("uniform_", "normal_", "trunc_normal_"):
            found[f"{name} {kind} far"] = digest(fill(name, dtype, *FAR))
        # Equal up to rounding of matrix products, so numbers.
        found[f"orthogonal_ {kind}"] = [round(x, 6) for x in orthogonal(dtype)[3].tolist()]
    key = fastinit.Key(2026)
    running = [fastinit.normal_(torch.empty(5), generator=key) for _ in range(2)]
    found["running numbers"] = digest(torch.cat(running))
    found["model"] = of_model()
    found["key"] = fastinit.Key(-1, "layers.0.weight").philox
    return found


def test_nothing_has_changed() -> None:
    golden, found = json.loads(FILE.read_text()), current()
    assert found.keys() == golden.keys()
    for name, value in golden.items():
        if name.startswith("orthogonal_"):
            tolerance = 2e-2 if "16" in name else 2e-6
            assert found[name] == pytest.approx(value, abs=tolerance), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("eye_", "dirac_", "constant_")])
def test_hashes_tell_seeds_apart(name: str) -> None:
    args, shape = CASES[name]
    made = [
        digest(
            getattr(fastinit, name)(torch.empty(shape), *args, generator=fastinit.Key(seed, "a"))
        )
        for seed in range(3)
    ]
    assert len(set(made)) == 3


if __name__ == "__main__":
    FILE.write_text(json.dumps(current(), indent=1) + "\n")
