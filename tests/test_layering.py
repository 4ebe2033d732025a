# SPDX-License-Identifier: BSD-3-Clause
"""The arrows of docs/design.md, read off the sources."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC, PACKAGE = ROOT / "csrc", ROOT / "src" / "fastinit"
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu"})
PYTHON = sorted(PACKAGE.glob("*.py"))


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_sources_are_found() -> None:
    assert len(NATIVE) >= 10
    assert len(PYTHON) >= 8


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: p.name)
def test_kernels_know_no_framework(path: Path) -> None:
    for name in includes(path):
        assert not name.startswith(("torch/", "ATen/", "c10/")), name
        if path.name != "module.cpp":
            assert not name.startswith(("pybind11/", "Python")), name
        if path.name.endswith(".inl.h"):
            raise AssertionError(f"a body compiled per target includes {name}")
        assert {path.parent.name, Path(name).parent.name} != {"cpu", "cuda"}, name


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.name)
def test_one_module_per_job(path: Path) -> None:
    code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
    owners = {
        r"\.data_ptr\b": {"plan.py", "source.py"},  # source.py: of its copy of a generator's state
        r"\.(get|set)_state\(": {"source.py", "probe.py"},  # probe.py makes and lends generators
        r"_(cpu|cuda)\.(run|advance)": {"backend.py"},
        r"\.(get|set)_offset\(": {"source.py"},
    }
    for pattern, files in owners.items():
        if re.search(pattern, code):
            assert path.name in files, pattern
    imported = set(re.findall(r"from fastinit import ([\w, ]+)", code))
    names = {n.strip() for group in imported for n in group.split(",")}
    below = {
        "backend.py": {"_cpu", "_cuda"},
        "source.py": {"backend"},
        "plan.py": {"backend", "source"},
        "probe.py": {"backend", "cuda", "execute", "plan", "qr"},
        "cpu.py": {"backend", "plan", "qr", "source"},
        "qr.py": {"backend", "plan", "progress"},
        "progress.py": set(),
        "cuda.py": {"backend", "cpu", "cuda_qr", "plan", "qr", "source"},
        "cuda_qr.py": {"backend", "plan"},
        "execute.py": {
            *("backend", "cpu", "cuda", "cuda_keyed", "keyed", "laws", "plan", "shard", "source"),
        },
        "init.py": {"backend", "execute", "laws", "plan", "probe", "qr", "source"},
        "expected.py": {"laws"},
        "inspect_plot.py": set(),
        "inspect_model.py": {"inspect_plot", "plan"},
        "key.py": set(),
        "names.py": {"plan", "shard"},
        "keys.py": {"backend", "keyed", "laws", "names", "plan", "shard"},
        "memory.py": {"plan"},
        "shard.py": set(),
        "laws.py": {"plan"},
        "keyed.py": {"backend", "laws", "plan", "qr"},
        "cuda_keyed.py": {"backend", "cuda_qr", "keyed", "plan"},
        "report.py": {"plan", "progress", "shard"},
        "operators.py": {"backend", "plan", "source"},
        "capture.py": {"execute", "laws", "operators", "plan", "probe", "qr", "shard", "source"},
        "hooks.py": {"init", "plan"},
        "block.py": {"hooks", "plan"},
        "install.py": {"hooks"},
        "mode.py": set(),
        "materialize.py": {"block", "plan", "shard"},
        "bench_cuda.py": {"backend", "bench", "cuda_qr", "execute", "plan", "probe", "qr"},
        "model.py": {
            *(
                "block",
                "cpu",
                "execute",
                "hooks",
                "init",
                "keyed",
                "laws",
                "plan",
                "probe",
                "shard",
            ),
            "source",
        },
    }
    assert names <= below.get(path.name, names)
