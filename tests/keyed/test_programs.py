# SPDX-License-Identifier: BSD-3-Clause
"""Random programs with a seed; `python -m tests.support.programs 1000 --keyed` runs more."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from fastinit.capture import keys
from tests.support.program_seeds import differences
from tests.support.programs import seeds_of

PROGRAMS = 12


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_equal_names_have_equal_numbers() -> None:
    counts: Counter[str] = Counter()
    assert [found for i in range(PROGRAMS) if (found := differences(seeds_of(i), counts))] == []
    assert counts["the other way round"], counts
    assert counts["in bfloat16"], counts
    assert counts["read"] + counts["read, listed"], counts  # most are read too early


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("how", ["by the order of the calls", "unsaid"])
def test_faults_are_found(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that count the calls, and reads before the name is known that nobody tells of."""
    count, right = itertools.count(), keys.derived
    if how == "unsaid":
        monkeypatch.setattr(keys.Keys, "tell", lambda self: None)
    else:
        monkeypatch.setattr(keys, "derived", lambda seed, _: right(seed, f"#{next(count)}"))
    assert any(differences(seeds_of(i), Counter()) for i in range(20))
