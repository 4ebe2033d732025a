# SPDX-License-Identifier: BSD-3-Clause
"""What the documents and docstrings say is run."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name", ["init", "fused", "model", "plan", "probe", "core.source", "core.key"]
)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"fastinit.{name}")).failed == 0


def test_readme_is_short_and_has_the_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert "pip install . && python -m fastinit demo" in lines
    assert "pip install '.[test]' && pytest" in lines


def test_the_blocks_docstring_is_tried() -> None:
    fused = importlib.import_module("fastinit.fused")

    assert doctest.testmod(fused).attempted >= 3


def test_benchmark_cases_agree_with_torch() -> None:
    from fastinit.cli import bench

    for case in (bench._sparse(), bench._resnet(), bench._small()):
        case.check()


def test_benchmark_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastinit
    from fastinit.cli import bench

    monkeypatch.setattr(fastinit, "sparse_", lambda t, *_: t.zero_())
    with pytest.raises(AssertionError, match="differs from torch"):
        bench._sparse().check()
