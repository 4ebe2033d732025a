# SPDX-License-Identifier: BSD-3-Clause
"""Random programs, run eagerly and inside fused(): everything reachable is the same, bit for bit.

`FASTINIT_PROGRAMS` says how many. `python -m tests.support.programs` runs others, by the thousand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.program_text import program_of
from tests.support.programs import Totals, check, seeds_of

PROGRAMS = int(os.environ.get("FASTINIT_PROGRAMS", "300"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_programs() -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    totals = Totals()
    a_seed_for_each_statement = st.lists(st.integers(0, 2**32 - 1), min_size=44, max_size=80)

    @settings(
        max_examples=PROGRAMS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # check() finds the smallest form by itself
        suppress_health_check=list(HealthCheck),
    )
    @given(a_seed_for_each_statement)
    def each(seeds: list[int]) -> None:
        found = check(program_of(seeds), totals)
        assert found is None, f"in fused() a program sees something else:\n{found}"

    each()
    counts = totals.counts
    assert counts["programs"] >= PROGRAMS
    assert counts["with fills that waited"] > PROGRAMS // 4  # or eager was compared with eager
    assert counts["with fills never written"] > PROGRAMS // 20
    assert counts["that differ from run to run"] < PROGRAMS // 50 + 2


aten = torch.ops.aten


def forgets(func: Any, args: Any, kwargs: Any) -> Any:
    is_large = func is aten.zero_.default and args[0].numel() > 4096
    return args[0] if is_large else func(*args, **kwargs)


def draws_too_much(func: Any, args: Any, kwargs: Any) -> Any:
    if func is aten.normal_.default and args[0].numel() > 4096:
        torch.rand(1, generator=kwargs.get("generator"))
    return func(*args, **kwargs)


def counts_twice(func: Any, args: Any, kwargs: Any) -> Any:
    if func is aten.uniform_.default:
        torch.autograd.graph.increment_version(args[0])
    return func(*args, **kwargs)


def shares(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].view_as(args[0]) if func is aten.clone.default else func(*args, **kwargs)


def is_slack(func: Any, args: Any, kwargs: Any) -> Any:
    if func is aten.normal_.default and len(args) > 2 and args[2] < 0:
        return args[0]
    return func(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("how", [forgets, draws_too_much, counts_twice, shares, is_slack])
def test_faults_are_found(how: Callable[..., Any]) -> None:
    """A mode with a fault takes the place of fused(); a few programs and lines show it."""

    class Faulty(TorchDispatchMode, ContextDecorator):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return how(func, args, kwargs or {})

    for seed in range(60):
        found = check(program_of(seeds_of(seed)), Totals(), Faulty)
        if found is not None:
            assert found.count("\n") < 25, found
            return
    pytest.fail("not found")
