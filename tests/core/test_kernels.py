# SPDX-License-Identifier: BSD-3-Clause
"""Modules that were built from other sources are refused, before they write wrong bytes."""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fastinit.core import kernels
from tests.support.marks import slow_but

Python = Callable[..., "subprocess.CompletedProcess[str]"]
CSRC = Path(__file__).parents[2] / "csrc"
MODULES = [m for m in (kernels._cpu, kernels._cuda) if m is not None]

# Replaces a module by one that says something else of itself, then imports fastinit.
IMPORT = """
import importlib.util, pathlib, sys, types

def replace(name, change):
    folder = pathlib.Path(importlib.util.find_spec("fastinit").origin).parent
    path, = folder.glob(name + ".*.so")
    spec = importlib.util.spec_from_file_location("fastinit." + name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fake = types.ModuleType("fastinit." + name)
    fake.__dict__.update(module.__dict__)
    change(fake.__dict__)
    sys.modules[fake.__name__] = fake

replace({name!r}, lambda module: {change})
import fastinit
"""
CHANGES = {
    "old": "[module.pop(name) for name in ('LAYOUTS', 'DTYPES', 'OPS')]",
    "another order": "module['LAYOUTS'].update(fill=module['LAYOUTS']['fill'].replace("
    "'Q address, Q items', 'Q items, Q address'))",
    "another type": "module['LAYOUTS'].update(keyed=module['LAYOUTS']['keyed'].replace("
    "'Q index', 'q index'))",
    "one more field": "module['LAYOUTS'].update(keyed=module['LAYOUTS']['keyed'].replace("
    "'5x unused', 'B more, 4x unused'))",
    "other operators": "module['OPS'].pop('normal')",
    "other functions": "module.pop('run_fill')",
}


@pytest.mark.parametrize("change", slow_but(CHANGES, "another order"))
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_other_sources_are_refused(python: Python, module: object, change: str) -> None:
    name = getattr(module, "__name__", "").rpartition(".")[2]
    if (name, change) == ("_cpu", "other operators") and len(MODULES) == 1:
        return  # there is none to differ from
    run = python(IMPORT.replace("{name!r}", repr(name)).replace("{change}", CHANGES[change]))
    assert run.returncode != 0
    said = run.stderr.splitlines()[-1]
    assert "ImportError" in said
    assert "built from other sources" in said
    assert "pip install ." in said


LACKING = """
import ast, importlib, inspect, pathlib, sys, types
import fastinit
from fastinit.core import kernels

real = getattr(fastinit, {name!r})
stub = pathlib.Path(fastinit.__file__).with_name({name!r} + ".pyi").read_text()
nodes = ast.parse(stub).body
names = {n.name if isinstance(n, ast.FunctionDef) else n.target.id for n in nodes}
assert len(names) > 8 and all(hasattr(real, n) for n in names), names
for lacking in sorted(names):
    fake = types.ModuleType(real.__name__)
    fake.__dict__.update({k: v for k, v in vars(real).items() if k != lacking})
    sys.modules[real.__name__] = fake
    setattr(fastinit, {name!r}, fake)
    try:
        importlib.reload(kernels)
        importlib.reload(importlib.import_module("fastinit." + {name!r}[1:] + ".fills"))
    except ImportError as error:
        assert "pip install ." in str(error), error
    else:
        raise SystemExit(f"imports without {lacking}")
"""


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_a_module_lacks_nothing(python: Python, module: object) -> None:
    """Whatever its .pyi names has to be there, or it is refused when it is imported."""
    name = getattr(module, "__name__", "").rpartition(".")[2]
    run = python(LACKING.replace("{name!r}", repr(name)))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_texts_are_formats(module: object) -> None:
    """A layout has the size of its struct, and fastinit's own format is the same."""
    layouts = vars(module)["LAYOUTS"]
    sizes = {"fill": "FILL_SIZE", "keyed": "KEYED_SIZE"}
    for name, fields in layouts.items():
        packed = kernels.packer(module, name, fields)  # type: ignore[arg-type]
        if sizes.get(name) in vars(module):
            assert packed.size == vars(module)[sizes[name]], name
    assert isinstance(packed, struct.Struct)


def test_a_list_of_fields_is_complete(tmp_path: Path) -> None:
    """The compiler refuses one that leaves out a field, or has them in another order."""
    source = tmp_path / "point.cpp"
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-fsyntax-only"]
    for fields, is_good in [("x y z", True), ("x z", False), ("x y", False), ("y x z", False)]:
        listed = ", ".join(f"FI_FIELD({name})" for name in fields.split())
        source.write_text(
            f'#include "{CSRC / "layout.h"}"\n'
            "namespace fastinit { struct Point { int32_t x, y; double z[3]; };\n"
            f"FI_LAYOUT(Point, {listed}); }}\n"
        )
        run = subprocess.run([*command, source], capture_output=True, text=True)
        assert (run.returncode == 0) == is_good, run.stderr
        assert is_good or "name every field, in order" in run.stderr
