# SPDX-License-Identifier: BSD-3-Clause
"""materialize_ beside to_empty and apply, from the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastinit
from tests.support.compare import assert_equal_seen, attempt
from tests.support.models import model_state, on_meta, reset
from tests.support.scopes import full_of

Make = Callable[[], nn.Module]
Fn = Callable[[nn.Module], Any]


def materialize_(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model."""
    fastinit.materialize_(model, *args, **kwargs)
    return model


def assert_materialized(
    make: Make,
    fn: Fn | None = None,
    *,
    tie: Callable[[nn.Module], Any] | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 11,
) -> nn.Module:
    """Compare with to_empty and apply, over memory full of something else; returns the model.

    `tie` puts back what to_empty takes apart.
    """
    seen = []
    for fast, byte in ((False, 0x33), (True, 0x88)):
        model = on_meta(make)
        torch.manual_seed(seed)

        def run(model: nn.Module = model, fast: bool = fast) -> nn.Module:
            if fast:
                return materialize_(model, dtype=dtype, fn=fn)
            model = (model if dtype is None else model.to(dtype)).to_empty(device="cpu")
            if tie is not None:
                tie(model)
            return model.apply(fn or reset)

        with full_of(byte):
            returned, failure, warned = attempt(run)
        assert not failure
        assert returned is model
        for t in (*model.parameters(), *model.buffers()):
            assert t.device.type == "cpu"
        seen.append({**model_state(model), "generator": torch.get_rng_state(), "warned": warned})
    assert_equal_seen(seen[0], seen[1], "model")
    return model


class Holder(nn.Module):
    """One parameter."""

    def __init__(self, *shape: int, **kwargs: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(*shape, **kwargs))
