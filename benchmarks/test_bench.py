# SPDX-License-Identifier: BSD-3-Clause
"""The cases of fastinit.bench under pytest-benchmark, one test per contender.

pytest benchmarks --benchmark-group-by=param:case
"""

import pytest

from fastinit.cli import bench

CASES = {case.name: case for case in bench.cases()}
PAIRS = [(name, contender) for name, case in CASES.items() for contender in case.contenders]


@pytest.mark.parametrize(("case", "contender"), PAIRS)
def test_bench(benchmark, case: str, contender: str) -> None:
    CASES[case].check()
    rounds = CASES[case].rounds
    benchmark.pedantic(CASES[case].contenders[contender], rounds=rounds, warmup_rounds=1)
