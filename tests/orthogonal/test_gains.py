# SPDX-License-Identifier: BSD-3-Clause
"""Every gain that torch takes or refuses, in every dtype."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor

import fastinit
from tests.support.compare import BF16, F16, F64, assert_equal_seen, assert_same, observe
from tests.support.layouts import box
from tests.support.orthogonal import assert_close, each_width
from tests.support.qr_model import drawn, exact, rounding

pytestmark = pytest.mark.usefixtures("one_thread")

INF, NAN = math.inf, math.nan


GAINS: list[Any] = [1, 2, -3, 0, 0.0, -0.0, 2**0.5, -0.1, 1e-30, 1e-46, 1e30, INF, -INF, NAN]
GAINS += [1e39, -1e39, 1e308, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), True, False]
GAINS += [np.float32(1.5), np.float64(1.5), np.float16(1.5), np.int64(3), np.bool_(True)]
GAINS += [torch.tensor(2.0), torch.tensor(2), torch.tensor(1.5, dtype=F64)]
GAINS += [torch.tensor([2.0]), torch.arange(9.0).view(3, 3)]
REFUSED: list[Any] = ["2", None, [2], (2,), 1j, np.array(2.0), torch.ones(4), torch.tensor(1j)]
REFUSED += [2**64, -(2**63) - 1, 10**30, 10**400, object]


@each_width
@pytest.mark.usefixtures("own_factors")
@pytest.mark.parametrize("gain", GAINS, ids=lambda g: f"{type(g).__name__} {g}")
def test_gains(gain: Any, dtype: torch.dtype) -> None:
    """As torch multiplies by them, the sign of zeros included."""
    for shape in [(3, 3), (70, 3), (3, 70), (70, 66)]:
        if not isinstance(gain, Tensor) or gain.numel() < 9 or shape == (3, 3):
            assert_same("orthogonal_", lambda s=shape: box(*s, dtype=dtype), gain)


@pytest.mark.usefixtures("own_factors")
@pytest.mark.parametrize("gain", REFUSED, ids=lambda g: f"{type(g).__name__} {str(g)[:30]}")
def test_gains_that_torch_refuses(gain: Any) -> None:
    """With torch's error, and what torch does before it: all but the product."""
    assert_same("orthogonal_", lambda: box(5, 3), gain, fails=True)


@pytest.mark.parametrize("generator", ["x", 5, torch.Generator], ids=str)
def test_no_generators(generator: Any) -> None:
    seen = []
    for module in (torch_init, fastinit):
        torch.manual_seed(6)
        found = observe(module.orthogonal_, box(5, 3), 1, generator)
        seen.append(found | {"generator": torch.get_rng_state()})
    assert seen[0]["failure"]
    assert_equal_seen(seen[0], seen[1], str(generator))


@pytest.mark.parametrize("gain", [np.sqrt(2), np.float32(0.7), True, torch.tensor(1.5)], ids=repr)
@pytest.mark.parametrize("name", ["orthogonal_", "orthogonal_batched_"])
def test_gains_of_other_types_for_16_bits(name: str, gain: Any) -> None:
    """np.sqrt(2) is what many give as a gain. A tensor may be multiplied with at the end."""
    torch.manual_seed(8)
    found = getattr(fastinit, name)(torch.empty(20, 30, dtype=BF16), gain)
    torch.manual_seed(8)
    truth = exact(drawn((20, 30), BF16))
    if isinstance(gain, Tensor):
        error = (found.double() - truth * float(gain)).abs()
        assert bool((error <= 3.03 * rounding(truth * float(gain), BF16)).all())
    else:
        assert_close(found, truth, gain=float(gain))


@pytest.mark.parametrize(
    "gain", [0.0, -0.0, 1e39, -INF, NAN, 1e-45, 3e-6, 1e5, 70000, 2**20, -3e38]
)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_extreme_gains_of_16_bits(dtype: torch.dtype, gain: float) -> None:
    """As float32's product is converted by torch."""
    for shape in [(20, 30), (3, 3), (70, 66)]:
        torch.manual_seed(8)
        expected = (exact(drawn(shape, dtype)).float() * gain).to(dtype)
        torch.manual_seed(8)
        found = fastinit.orthogonal_(torch.empty(shape, dtype=dtype), gain)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.signbit(), expected.signbit()) or math.isnan(gain)
        assert float((found != expected)[~found.isnan()].double().mean().nan_to_num()) < 0.01
        assert torch.equal(found.isinf(), expected.isinf()) or abs(gain) == 3e38
