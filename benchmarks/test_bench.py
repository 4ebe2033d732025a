# SPDX-License-Identifier: BSD-3-Clause
"""The cases of cpu.py, keyed.py and orthogonal.py under pytest-benchmark, one test per way.

pytest benchmarks --benchmark-group-by=param:case
"""

import importlib
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
CASES = {
    name: make
    for module in ("cpu", "keyed", "orthogonal")
    for name, make in importlib.import_module(module).CASES.items()
}


@pytest.mark.parametrize("way", ["torch", "one by one", "plan"])
@pytest.mark.parametrize("case", CASES)
def test_bench(benchmark, case: str, way: str) -> None:
    made = CASES[case]()
    if way not in made.ways:
        pytest.skip(f"no {way}")
    made.check()
    benchmark.pedantic(made.ways[way], rounds=made.rounds, warmup_rounds=1)
