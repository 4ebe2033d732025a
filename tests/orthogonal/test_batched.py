# SPDX-License-Identifier: BSD-3-Clause
"""orthogonal_batched_: one draw for all matrices of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

import fastinit
from tests.support.compare import ELSEWHERE, F64, Position, bits
from tests.support.layouts import box
from tests.support.orthogonal import assert_batch, each_dtype
from tests.support.qr_model import drawn, exact

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = [(3, 5, 7), (2, 3, 8, 6), (1, 4, 4), (5, 1, 1), (4, 16, 16), (2, 100, 70), (3, 2, 5, 2)]
BATCHES += [(7, 3), (64, 64), (1, 1), (2, 65, 80), (40, 2, 2), (3, 1, 50), (3, 50, 1), (2, 1, 3)]


@each_dtype
def test_batched(dtype: torch.dtype) -> None:
    for i, shape in enumerate(BATCHES):
        at = Position(words=i, cached=i % 2 == 1)
        own, theirs = at.place(torch.Generator()), at.place(torch.Generator())
        default = ELSEWHERE.place(torch.default_generator).get_state()
        t = torch.empty(shape, dtype=dtype)
        if i % 3 == 0:
            t = nn.Parameter(t)
        assert fastinit.orthogonal_batched_(t, 0.5, own) is t
        assert_batch(t, exact(drawn(shape, dtype, theirs)), 0.5)
        assert torch.equal(own.get_state(), theirs.get_state()), shape
        assert torch.equal(torch.default_generator.get_state(), default)
        assert t._version == 2
        # And from the default one:
        at.place(torch.default_generator)
        u = torch.empty(shape, dtype=dtype)
        fastinit.orthogonal_batched_(u, gain=0.5)
        assert torch.equal(bits(u), bits(t))
        assert torch.equal(torch.get_rng_state(), theirs.get_state())


@each_dtype
def test_batched_is_one_after_the_other(dtype: torch.dtype) -> None:
    """For a multiple of 16 elements each."""
    for shape in [(5, 4, 4), (3, 64, 48), (2, 2, 80, 70), (3, 1, 16), (2, 16, 100), (2, 130, 136)]:
        torch.manual_seed(7)
        t = fastinit.orthogonal_batched_(torch.empty(shape, dtype=dtype), 1.5)
        state = torch.get_rng_state()
        torch.manual_seed(7)
        for matrix in t.view(-1, *shape[-2:]):
            one = fastinit.orthogonal_(torch.empty(shape[-2:], dtype=dtype), 1.5)
            assert torch.equal(bits(one), bits(matrix))
        assert torch.equal(torch.get_rng_state(), state)


BATCH_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of a buffer of 20000
    "offset": lambda b: b[5 : 5 + 3 * 33 * 47].view(3, 33, 47),
    "transposed": lambda b: b[: 3 * 33 * 47].view(3, 33, 47).mT,
    "permuted": lambda b: b[: 3 * 33 * 47].view(33, 47, 3).permute(2, 0, 1),
    "strided": lambda b: b[: 4 * 1600].view(4, 40, 40)[::2, 3:, ::2],
    "above_64": lambda b: b.view(2, 100, 100)[:, :, 20:],
    "few": lambda b: b[:24].view(2, 3, 4)[:, :, ::2],
}


@pytest.mark.parametrize("view", BATCH_VIEWS)
@each_dtype
def test_batched_views(dtype: torch.dtype, view: str) -> None:
    """The logical shape says what is drawn for which element."""
    buffer = box(20000, dtype=dtype)
    t = BATCH_VIEWS[view](buffer)
    torch.manual_seed(5)
    assert fastinit.orthogonal_batched_(t, 1.7) is t
    state = torch.get_rng_state()
    g = torch.Generator().manual_seed(5)
    assert t._version == 2
    assert_batch(t, exact(drawn(tuple(t.shape), dtype, g)), 1.7)
    assert torch.equal(state, g.get_state())
    t.fill_(13.0)
    assert torch.equal(buffer, box(20000, dtype=dtype))


def test_batched_refuses() -> None:
    for shape in [(), (5,), (0,)]:
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match="2 or more dimensions"):
            fastinit.orthogonal_batched_(torch.empty(shape))
        with pytest.raises(ValueError, match="2 or more dimensions"):
            fastinit.Plan().orthogonal_batched_(torch.empty(shape))
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_batched_refuses_dtypes(dtype: torch.dtype) -> None:
    """As orthogonal_ does, whose torch draws and factors in the dtype itself."""
    with pytest.raises(RuntimeError):
        torch_init.orthogonal_(torch.ones(5, 6, dtype=dtype))
    with pytest.raises(RuntimeError):
        fastinit.orthogonal_batched_(torch.ones(3, 5, 6, dtype=dtype))


@pytest.mark.parametrize("gain", [0, -1.5, True, np.sqrt(2), torch.tensor(2.0), math.inf], ids=repr)
@each_dtype
def test_batched_gains(gain: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    t = fastinit.orthogonal_batched_(torch.empty(3, 5, 4, dtype=dtype), gain)
    truth = exact(drawn((3, 5, 4), dtype, torch.Generator().manual_seed(5))) * float(gain)
    if gain == math.inf:
        assert torch.equal(t.double(), truth)
    else:
        torch.testing.assert_close(
            t.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 if dtype != F64 else 1e-13
        )
