# SPDX-License-Identifier: BSD-3-Clause
"""The walls of docs/design.md: who imports whom, read from the sources with ast."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "fastinit"
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu"})
PYTHON = sorted(PACKAGE.rglob("*.py"))

# Rooms from the bottom up. A room may import the rooms below it that its row names, and itself.
ROOMS = {
    "core": set(),
    "cpu": {"core"},
    "cuda": {"core", "cpu"},
    "execute": {"core", "cpu", "cuda"},
    "probe": {"core", "cuda", "execute"},
    "dispatch": {"core", "execute", "probe"},
    "init": {"core", "cpu", "dispatch"},
    "install": {"dispatch", "init"},
    "capture": {"core", "execute", "probe", "install"},
    "fused": {"core", "capture"},
    "model": {"core", "capture", "fused"},
    "plan": {"core", "cpu", "execute", "init", "capture", "model"},
    "__init__": {"core", "init", "capture", "install", "fused", "model", "plan"},
    "cli": {"__init__", "core", "probe", "capture", "fused", "model"},
    "__main__": {"cli"},
}
# Who may touch what by itself: other modules go through the owner.
OWNERS = {
    r"\.data_ptr\b": {"core/geometry.py", "core/source.py"},  # source: its copy of a state
    r"\.(get|set)_state\(": {"core/source.py", "probe.py"},  # probe makes and lends generators
    r"\.(get|set)_offset\(": {"core/source.py"},
    r"_cpu\.(run|advance)": {"core/kernels.py"},
    r"_cuda\.(run|most_shared)": {"cuda/runtime.py"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file imports anywhere, functions and `if TYPE_CHECKING` included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules = [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        for module in modules:
            first, _, rest = module.partition(".")
            if first == "fastinit":
                room = rest.partition(".")[0]
                yield room if room in ROOMS or room in {"_cpu", "_cuda"} else "__init__"


def test_every_room_has_a_row() -> None:
    assert {room_of(p) for p in PYTHON} == set(ROOMS)


def test_rooms_stand_on_rooms_below_them() -> None:
    order = list(ROOMS)
    for room, below in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in below), room


@pytest.mark.parametrize("room", ROOMS)
def test_imports(room: str) -> None:
    """Exactly what the row says: nothing more, and nothing that is not needed any more."""
    found: set[str] = set()
    for path in PYTHON:
        if room_of(path) == room:
            found |= set(imported(path)) - {room}
    assert found - {"_cpu", "_cuda"} == ROOMS[room]
    if room not in {"core", "cli"}:
        assert not found & {"_cpu", "_cuda"}


def test_the_page_draws_the_same() -> None:
    """docs/design.md has the rows of ROOMS, in its table of rooms."""
    page = (ROOT / "docs" / "design.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/]+?)(?:\.py|/)` \|[^|]*\| ([^|]*) \|$", page, re.MULTILINE))
    drawn = {room: set(re.findall(r"`(\w+)`", below)) for room, below in rows.items()}
    assert drawn == ROOMS


def test_no_circle_of_modules() -> None:
    """Module by module, the imports at the top of the files have an order."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in PYTHON}
    needs: dict[str, set[str]] = {}
    for name, path in names.items():
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastinit"):
                for a in node.names:
                    inner = f"{node.module}.{a.name}"
                    found.add(inner if inner in names else str(node.module))
        needs[name] = (found & names.keys()) - {name}
    while needs:
        free = {name for name, below in needs.items() if not below & needs.keys()}
        assert free, f"a circle among {sorted(needs)}"
        needs = {name: below for name, below in needs.items() if name not in free}


@pytest.mark.parametrize("pattern", OWNERS)
def test_owners(pattern: str) -> None:
    for path in PYTHON:
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        if re.search(pattern, code):
            assert str(path.relative_to(PACKAGE)) in OWNERS[pattern]


# Attributes that torch's users have always used; namedtuples' and Python's own.
USUAL = {"_version", "_schema", "_parameters", "_buffers", "_modules", "_replace", "_getframe"}


def test_private_names_of_torch() -> None:
    """They are all in core/torch_api.py: what begins with _ and is no name of ours is torch's."""
    trees = {p: ast.parse(p.read_text()) for p in PYTHON}
    ours = set(USUAL)
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.alias):
                ours.add((node.asname or node.name).rpartition(".")[2])
    ours -= {"_C", "_no_grad_trunc_normal_"}
    for path, tree in trees.items():
        if path.name == "torch_api.py":
            continue
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch"):
                names = [
                    part for a in node.names for part in (a.name, *str(node.module).split("."))
                ]
                assert not [name for name in names if name.startswith("_")], path
        private = {x for x in found if x.startswith("_") and not x.endswith("__")}
        assert not private - ours, path


# ---- csrc ----------------------------------------------------------------------------------------


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_sources_are_found() -> None:
    assert len(NATIVE) >= 10
    assert len(PYTHON) >= 20


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: p.name)
def test_kernels_know_no_framework(path: Path) -> None:
    here = path.relative_to(CSRC).parts[0]
    for name in includes(path):
        assert not name.startswith(("torch/", "ATen/", "c10/")), name
        if path.name != "module.cpp":
            assert not name.startswith(("pybind11/", "Python")), name
        if path.name.endswith(".inl.h") and path.name != "bodies.inl.h":
            raise AssertionError(f"a body compiled per target includes {name}")
        other = (path.parent / name).resolve()
        if other.exists() and CSRC in other.parents:
            there = other.relative_to(CSRC).parts[0]
            assert {here, there} != {"cpu", "cuda"}, name


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: "/".join(p.parts[-3:]))
def test_families_do_not_see_each_other(path: Path) -> None:
    """What lies in a folder of csrc/cpu or csrc/cuda includes that folder and what is above it."""
    here = path.relative_to(CSRC).parts[:-1]
    if len(here) < 2:
        return
    for name in includes(path):
        other = (path.parent / name).resolve()
        if other.exists() and CSRC in other.parents:
            there = other.relative_to(CSRC).parts[:-1]
            assert there == here[: len(there)], name
