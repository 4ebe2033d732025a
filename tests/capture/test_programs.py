# SPDX-License-Identifier: BSD-3-Clause
"""Random programs, run eagerly and inside fused(): everything reachable is the same, bit for bit.

`FASTINIT_PROGRAMS` says how many. `python -m tests.support.programs` runs others, by the thousand.
"""

from __future__ import annotations

import os

import pytest

from tests.support.program_text import program_of
from tests.support.programs import Totals, check

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
