# SPDX-License-Identifier: BSD-3-Clause
"""What setup.py builds of the CUDA half, and how the built module is found and described."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from fastinit.core.kernels import _cuda
from tests.support.cuda_code import ROOT, cubins, disassembled, needs_nvcc, output

Python = Callable[..., "CompletedProcess[str]"]
needs_module = pytest.mark.skipif(_cuda is None, reason="needs fastinit._cuda")


@disassembled
def test_the_module_has_code_for_the_named_architectures() -> None:
    listed = output("cuobjdump", "--list-ptx", _cuda.__file__)
    for name in _cuda.ARCHITECTURES.split():
        kind, _, number = name.partition("_")
        if kind == "sm":
            assert name in cubins()
        else:
            assert f"sm_{number}.ptx" in listed
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert {"sm_80", "sm_90", "sm_100", "sm_120"} <= set(cubins())


# ---- setup.py ------------------------------------------------------------------------------------

SETUP = """
import importlib.util, setuptools, sys
setuptools.setup = lambda **kwargs: print([e.name for e in kwargs["ext_modules"]])
spec = importlib.util.spec_from_file_location("fastinit_setup", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
{code}
"""


def setup_py(python: Python, code: str = "", **environment: str) -> tuple[int, str]:
    clean = {"CUDA_HOME": "", "CUDA_PATH": "", "FORCE_CUDA": "", "FORCE_ONLY_CPU": ""}
    script = SETUP.format(path=str(ROOT / "setup.py"), code=code)
    run = python(script, **{**clean, "TORCH_CUDA_ARCH_LIST": "", **environment})
    return run.returncode, run.stdout + run.stderr


def test_without_nvcc_only_the_cpu_module_is_built(python: Python, tmp_path: Path) -> None:
    code, said = setup_py(python, CUDA_HOME=str(tmp_path))
    assert code == 0
    assert "['fastinit._cpu']" in said
    code, said = setup_py(python, CUDA_HOME=str(tmp_path), FORCE_CUDA="1")
    assert code != 0
    assert "FORCE_CUDA=1, but no nvcc was found" in said


@needs_nvcc
def test_nvcc_is_enough_for_the_cuda_module(python: Python) -> None:
    assert "['fastinit._cpu', 'fastinit._cuda']" in setup_py(python)[1]
    assert "['fastinit._cpu']" in setup_py(python, FORCE_ONLY_CPU="1")[1]


LISTS = {
    "": "sm_80 sm_90 sm_100 sm_120 compute_120",
    "9.0": "sm_90",
    "8.0;9.0+PTX": "sm_80 sm_90 compute_90",
    "9.0a 10.0": "sm_90a sm_100",
    "Hopper,8.6": "sm_90 sm_86",
    **dict.fromkeys(("9", "sm_90", "nine", "3.5", "9.0+PTXX"), "TORCH_CUDA_ARCH_LIST names"),
}


@needs_nvcc
def test_list_of_architectures(python: Python) -> None:
    """Names are those of torch's extensions; unknown ones are errors."""
    code = f"""
import os
for asked in {list(LISTS)}:
    os.environ["TORCH_CUDA_ARCH_LIST"] = asked
    try:
        print(asked, "->", *module.architectures(module.find_nvcc()))
    except SystemExit as error:
        print(asked, "->", error)
"""
    said = setup_py(python, code)[1].splitlines()
    for asked, given in LISTS.items():
        (line,) = (line for line in said if line.startswith(f"{asked} -> "))
        assert (line == f"{asked} -> {given}") or (given.startswith("TORCH") and given in line)


@needs_nvcc
def test_the_keyed_kernel_is_compiled_without_contraction(python: Python) -> None:
    assert "{'keyed.cu': '-fmad=false'}" in setup_py(python, "print(module.OWN_FLAGS)")[1]


def test_import_and_info_without_a_driver(python: Python) -> None:
    """The module loads anywhere; what is missing is said."""
    run = python(["-m", "fastinit", "info"])
    assert run.returncode == 0, run.stderr
    assert re.search(r"^CUDA +(fastinit\._cuda|no kernels)", run.stdout, re.MULTILINE), run.stdout


@pytest.mark.slow
def test_a_cuda_module_that_does_not_load_is_no_obstacle(python: Python) -> None:
    """As after moving to another machine: fastinit goes on with the CPU, and info says why."""
    run = python(
        """
        import sys

        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "fastinit._cuda":
                    raise ImportError("libfoo.so: cannot open", name=name + ".so")

        sys.meta_path.insert(0, Broken())
        import fastinit.core.kernels
        print(fastinit.core.kernels.why_no_cuda)
        """
    )
    assert "does not load: libfoo.so" in run.stdout, run.stderr
