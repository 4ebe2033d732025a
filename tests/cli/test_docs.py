# SPDX-License-Identifier: BSD-3-Clause
"""What the documents and docstrings say is run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
FOLDERS = ("fastinit", "csrc", "tests", "benchmarks", "docs", "examples")
TOP = ("setup.py", "README.md", "CHANGELOG.md")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@pytest.mark.parametrize(
    "name", ["init", "fused", "model", "plan", "probe", "core.source", "core.key", "core.switch"]
)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"fastinit.{name}")).failed == 0


def test_readme_is_short_and_has_the_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert "pip install . && python -m fastinit demo" in lines
    assert "pip install '.[test]' && pytest" in lines


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    """By their path, or by the end of one: `run.cpp`, `core/laws.py`, `tests/keyed`."""
    text = page.read_text()
    files = [str(p.relative_to(ROOT)) for d in FOLDERS for p in (ROOT / d).rglob("*")]
    names = re.findall(r"(?<![\w/.*])([a-z_0-9]+(?:/[\w.]+)*\.(?:py|cpp|h|cu|json|sh))\b", text)
    names += re.findall(rf"`((?:{'|'.join(FOLDERS)})(?:/\w+)*)`", text)
    lost = {
        n for n in names if not any(f"/{f}".endswith(f"/{n}") for f in [*files, *FOLDERS, *TOP])
    }
    assert lost == set()


def test_readme_uses_public_names() -> None:
    import fastinit

    used = set(re.findall(r"\bfastinit\.(\w+)\(", (ROOT / "README.md").read_text()))
    assert len(used) >= 8
    assert used <= {*fastinit.__all__}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text()):
        name, _, heading = target.partition("#")
        to = page.parent / name if name else page
        assert to.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", to.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in anchors, target


def test_the_blocks_docstring_is_tried() -> None:
    fused = importlib.import_module("fastinit.fused")

    assert doctest.testmod(fused).attempted >= 3
