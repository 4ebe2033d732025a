# SPDX-License-Identifier: BSD-3-Clause
"""Every mistake: the same exception with the same words, and the same things left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from tests.support.compare import BF16, F16, F32, F64, Position, assert_same, attempt
from tests.support.layouts import LAYOUTS, apart, box

pytestmark = pytest.mark.usefixtures("native")

NAN, INF = math.nan, math.inf


def flat() -> torch.Tensor:
    return apart(100, F32)


LAWS = ("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_")
LAWS += ("kaiming_uniform_", "kaiming_normal_")

# (function, maker of the tensor, arguments, keyword arguments)
BAD_CALLS: list[tuple[str, Callable[[], Any], tuple[Any, ...], dict[str, Any]]] = [
    # numbers out of order or out of range
    ("uniform_", flat, (1.0, 0.0), {}),
    ("uniform_", flat, (NAN, 1.0), {}),
    ("uniform_", flat, (0.0, NAN), {}),
    ("uniform_", flat, (0.0, INF), {}),
    ("uniform_", flat, (-INF, 0.0), {}),
    ("uniform_", flat, (-3e38, 3e38), {}),
    ("uniform_", flat, (0.0, 1e39), {}),
    ("uniform_", lambda: box(9, dtype=F16), (0.0, 65505.0), {}),
    ("uniform_", lambda: box(9, dtype=F16), (-40000.0, 40000.0), {}),
    ("uniform_", lambda: box(9, dtype=F64), (-1.7e308, 1.7e308), {}),
    ("uniform_", lambda: box(0), (1.0, 0.0), {}),
    ("normal_", flat, (0.0, -1.0), {}),
    ("normal_", flat, (0.0, -1e-300), {}),
    ("normal_", flat, (0.0, NAN), {}),
    ("normal_", lambda: box(0), (0.0, -1.0), {}),
    ("normal_", lambda: LAYOUTS["columns"](90, F32), (0.0, -1.0), {}),
    ("trunc_normal_", flat, (0.0, 0.0), {}),
    ("trunc_normal_", flat, (0.0, 1.0, 2.0, -2.0), {}),
    ("trunc_normal_", flat, (0.0, 1.0, NAN, 2.0), {}),
    ("trunc_normal_", flat, ("0",), {}),
    ("kaiming_normal_", lambda: box(8, 8), (NAN,), {}),
    ("kaiming_uniform_", lambda: box(8, 8), (NAN,), {}),
    ("xavier_normal_", lambda: box(8, 8), (-1.0,), {}),
    ("xavier_normal_", lambda: box(8, 8), (NAN,), {}),
    ("xavier_uniform_", lambda: box(8, 8), (-1.0,), {}),
    ("xavier_uniform_", lambda: box(8, 8), (INF,), {}),
    ("kaiming_uniform_", lambda: box(8, 8), (1e200,), {}),
    ("xavier_uniform_", lambda: box(0, 0), (), {}),
    ("xavier_normal_", lambda: box(3, 3, 0), (), {}),
    ("sparse_", lambda: box(8, 8), (0.1, -1.0), {}),
    ("sparse_", lambda: box(8, 8), (NAN,), {}),
    ("sparse_", lambda: box(8, 8), (INF,), {}),
    ("constant_", flat, (1e39,), {}),
    ("constant_", lambda: box(9, dtype=BF16), (1e39,), {}),
    ("constant_", lambda: box(9, dtype=F16), (1e5,), {}),
    ("constant_", flat, (1j,), {}),
    ("constant_", flat, (torch.ones(2),), {}),
    # shapes
    ("eye_", flat, (), {}),
    ("eye_", lambda: box(2, 2, 2), (), {}),
    ("eye_", lambda: torch.tensor(1.0), (), {}),
    ("dirac_", lambda: box(4, 4), (), {}),
    ("dirac_", lambda: box(2, 2, 2, 2, 2, 2), (), {}),
    ("dirac_", lambda: box(4, 2, 3), (3,), {}),
    ("dirac_", lambda: box(4, 2, 3), (0,), {}),
    ("dirac_", lambda: box(4, 2, 3), (2.0,), {}),
    ("dirac_", lambda: box(4, 2, 3), ("2",), {}),
    ("dirac_", lambda: box(4, 2, 0), (), {}),
    ("sparse_", flat, (0.5,), {}),
    ("sparse_", lambda: box(2, 2, 2), (0.5,), {}),
    ("orthogonal_", flat, (), {}),
    ("orthogonal_", lambda: box(6, 5, 4).permute(0, 2, 1), (), {}),
    ("orthogonal_", lambda: box(4, 4), ("big",), {}),
    ("orthogonal_", lambda: box(1).expand(4, 4), (), {}),
    *[(law, flat, (), {}) for law in LAWS[3:]],
    ("kaiming_uniform_", lambda: torch.tensor(1.0), (), {}),
    # names of modes
    ("kaiming_uniform_", lambda: box(8, 8), (), {"mode": "fan_avg"}),
    ("kaiming_normal_", lambda: box(8, 8), (), {"mode": 1}),
    ("kaiming_normal_", lambda: box(8, 8), (), {"mode": None}),
    ("kaiming_uniform_", lambda: box(8, 8), (), {"nonlinearity": "swish"}),
    ("kaiming_uniform_", lambda: box(8, 8), ("0.1",), {}),
    ("kaiming_normal_", lambda: box(8, 8), (True,), {}),
    ("kaiming_normal_", flat, (), {"mode": "x", "nonlinearity": "y"}),  # which comes first
    # kinds of arguments
    ("uniform_", flat, ("0", 1.0), {}),
    ("uniform_", flat, (None,), {}),
    ("uniform_", flat, (0.0, 1j), {}),
    ("uniform_", flat, ([0.0], 1.0), {}),
    ("uniform_", flat, (torch.zeros(2), 1.0), {}),
    ("normal_", flat, (0.0, "1"), {}),
    ("normal_", flat, (torch.zeros(100), torch.ones(100)), {}),
    ("constant_", flat, ("1",), {}),
    ("constant_", flat, (None,), {}),
    ("constant_", flat, (), {}),
    ("uniform_", flat, (0.0, 1.0, None, 5), {}),
    ("uniform_", flat, (), {"low": 0.0}),
    ("normal_", flat, (0.0,), {"mean": 0.0}),
    ("zeros_", flat, (0.0,), {}),
    ("ones_", flat, (), {"generator": None}),
    # things that cannot be filled so
    ("uniform_", lambda: torch.ones(30, dtype=torch.int64), (), {}),
    ("normal_", lambda: torch.ones(30, dtype=torch.int32), (), {}),
    ("trunc_normal_", lambda: torch.ones(30, dtype=torch.uint8), (), {}),
    ("uniform_", lambda: torch.ones(30, dtype=torch.bool), (), {}),
    ("kaiming_uniform_", lambda: torch.ones(5, 6, dtype=torch.int8), (), {}),
    ("xavier_normal_", lambda: torch.ones(5, 6, dtype=torch.bool), (), {}),
    ("sparse_", lambda: torch.ones(5, 6, dtype=torch.int64), (0.5,), {}),
    ("orthogonal_", lambda: torch.ones(5, 6, dtype=torch.int64), (), {}),
    ("orthogonal_", lambda: torch.ones(4, 5, dtype=torch.complex64), (), {}),
    ("uniform_", lambda: torch.zeros(30).to(torch.float8_e4m3fn), (), {}),
    ("normal_", lambda: torch.zeros(30).to(torch.float8_e5m2), (), {}),
    ("trunc_normal_", lambda: torch.ones(30, dtype=torch.complex64), (), {}),
    ("uniform_", lambda: torch.ones(4, 4).to_sparse(), (), {}),
    ("normal_", lambda: torch.ones(4, 4).to_sparse(), (), {}),
    ("constant_", lambda: torch.ones(4, 4).to_sparse(), (1.0,), {}),
    ("eye_", lambda: torch.ones(4, 4).to_sparse(), (), {}),
    ("uniform_", lambda: torch.zeros(1).expand(20), (), {}),
    ("normal_", lambda: torch.zeros(1).expand(20), (), {}),
    *[
        (name, thing, (1.0,) if name == "constant_" else (), {})
        for name in (*LAWS, "constant_", "zeros_", "eye_", "orthogonal_", "dirac_")
        for thing in (lambda: np.zeros((4, 4)), lambda: [1.0, 2.0], lambda: None, lambda: 3.0)
    ],
]


def labels(table: list) -> list[str]:
    return [f"{row}-{name}{args}{options}" for row, (name, _, args, options) in enumerate(table)]


@pytest.mark.parametrize(("name", "make", "args", "options"), BAD_CALLS, ids=labels(BAD_CALLS))
@pytest.mark.parametrize("position", [Position(), Position(words=623, cached=True)], ids=["0", "1"])
@pytest.mark.usefixtures("own_factors")
def test_same_exception(
    name: str, make: Callable[[], Any], args: tuple, options: dict, position: Position
) -> None:
    # fails=True: the helper insists that torch does raise, so no row can become meaningless.
    assert_same(name, make, *args, at=position, fails=True, **options)


# Odd, but torch takes them; each once was, or easily becomes, an error of a stricter library.
ODD_CALLS: list[tuple[str, Callable[[], Any], tuple[Any, ...], dict[str, Any]]] = [
    ("trunc_normal_", flat, (0.0, -1.0), {}),
    ("trunc_normal_", flat, (0.0, NAN), {}),
    ("trunc_normal_", flat, (NAN, 1.0), {}),
    ("trunc_normal_", flat, (0.0, INF), {}),
    ("trunc_normal_", flat, (0.0, 1.0, 1.0, 1.0), {}),
    ("dirac_", lambda: box(4, 2, 3), (-2,), {}),
    ("dirac_", lambda: box(4, 2, 3), (True,), {}),
    ("dirac_", lambda: box(0, 2, 3), (), {}),
    ("ones_", lambda: torch.zeros(1).expand(20), (), {}),
    ("zeros_", lambda: torch.ones(1).expand(20), (), {}),
    ("constant_", lambda: torch.zeros(9).as_strided((3, 4), (2, 1)), (2.0,), {}),
    ("zeros_", lambda: torch.ones(4, 4).to_sparse(), (), {}),
    ("uniform_", lambda: torch.ones(30, dtype=torch.complex64), (), {}),
    ("normal_", lambda: torch.ones(30, dtype=torch.complex128), (), {}),
    ("normal_", lambda: torch.ones(30, dtype=torch.complex64)[::2], (), {}),
    ("constant_", lambda: torch.ones(30, dtype=torch.int64), (2.7,), {}),
    ("constant_", lambda: torch.zeros(30).to(torch.float8_e4m3fn), (2.7,), {}),
    ("ones_", lambda: torch.ones(30, dtype=torch.bool).logical_not(), (), {}),
    ("normal_", lambda: torch.ones(30, dtype=torch.complex64).real, (), {}),
    ("uniform_", lambda: torch.ones(30, dtype=torch.complex64).conj().imag, (), {}),
    ("ones_", lambda: torch.ones(30, dtype=torch.complex64).conj().imag, (), {}),
    ("normal_", lambda: torch._neg_view(torch.ones(30)), (), {}),
    ("xavier_normal_", lambda: box(8, 8), (INF,), {}),
    ("trunc_normal_", lambda: box(99, dtype=F16), (0.0, 1.0, -1e6, 1.0), {}),
    # Overlapping in a way that torch does not look for: the later element wins.
    ("uniform_", lambda: torch.zeros(9).unfold(0, 4, 2), (), {}),
    ("normal_", lambda: torch.zeros(9).as_strided((3, 4), (2, 1)), (), {}),
    ("uniform_", lambda: torch.zeros(60_001).unfold(0, 4, 2), (), {}),
    ("normal_", lambda: torch.zeros(60_001).as_strided((30_000, 4), (1, 2)), (), {}),
    ("trunc_normal_", lambda: torch.zeros(6001).unfold(0, 4, 2), (), {}),
    ("sparse_", lambda: torch.zeros(90).as_strided((30, 4), (1, 2)), (0.5,), {}),
    ("eye_", lambda: torch.zeros(90).as_strided((20, 4), (1, 2)), (), {}),
]


@pytest.mark.parametrize(("name", "make", "args", "options"), ODD_CALLS, ids=labels(ODD_CALLS))
def test_odd_but_accepted(name: str, make: Callable[[], Any], args: tuple, options: dict) -> None:
    for position in (Position(), Position(words=623, cached=True)):
        assert_same(name, make, *args, at=position, poisons=None, **options)


@pytest.mark.parametrize("name", ["uniform_", "normal_", "kaiming_normal_", "orthogonal_"])
def test_generators_that_are_none(name: str) -> None:
    for generator in (3, "cpu", torch.Generator, object(), torch.default_generator.get_state()):
        outcomes = []
        for module in (torch_init, fastinit):
            tensor = box(8, 8)
            _, failure, _ = attempt(getattr(module, name), tensor, generator=generator)
            outcomes.append(failure)
            assert (tensor == 13.0).all()
        assert outcomes[0] == outcomes[1] != ""


def test_failure_leaves_the_library_usable() -> None:
    for name, make, args, options in BAD_CALLS[:40]:
        assert attempt(getattr(fastinit, name), make(), *args, **options)[1]
    assert_same("normal_", flat, native=True)
    assert_same("sparse_", lambda: box(20, 20), 0.5, native=True)
