# SPDX-License-Identifier: BSD-3-Clause
"""`python -m fastinit`: what it prints is what a bug report needs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

import fastinit


def test_verify(python: Callable) -> None:
    """A row for each operator, dtype and layout, saying who fills it, and why if it is torch."""
    done = python(["-m", "fastinit", "verify"])
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout
    for operator in ("uniform", "normal", "trunc_normal", "constant", "eye", "dirac", "sparse"):
        assert re.search(rf"\b{operator}", text), operator
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert dtype in text
    for layout in ("contiguous", "dense", "strided"):
        assert layout in text
    rows = [line for line in text.splitlines() if re.search(r"\b(native|torch)\b", line)]
    assert sum("native" in row for row in rows) >= 12


def test_verify_does_not_hide_a_fallback(python: Callable) -> None:
    """With a capability whose float32 normals differ, the table still tells the truth."""
    done = python(["-m", "fastinit", "verify"], ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "native" in done.stdout


def test_info(python: Callable) -> None:
    done = python(["-m", "fastinit", "info"])
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert fastinit.__version__ in done.stdout
    for name, _ in fastinit._cpu.targets():
        assert name in done.stdout


@pytest.mark.parametrize(
    ("module", "error", "line"),
    [
        ("torch", "ModuleNotFoundError", "torch     does not load: "),
        ("fastinit._cpu", "ModuleNotFoundError", "CPU       does not load: "),
        ("fastinit._cpu", "ImportError", "CPU       does not load: no such symbol"),
        ("fastinit._cuda", "ModuleNotFoundError", "CUDA      no kernels (not built: "),
        ("fastinit._cuda", "ImportError", "CUDA      no kernels (does not load: no such symbol"),
    ],
)
def test_info_of_what_is_broken(python: Callable, module: str, error: str, line: str) -> None:
    """Every other line is there; another command or program gets the error."""
    hide = f"""
        import sys, runpy

        class Hiding:
            def find_spec(self, name, *_):
                if name == {module!r}:
                    raise {error}("no such symbol", name=name)

        sys.meta_path.insert(0, Hiding())
        sys.argv = ["fastinit", COMMAND]
        runpy.run_module("fastinit", run_name="__main__")
    """
    done = python(hide.replace("COMMAND", "'info'"))
    assert line in done.stdout, done.stdout + done.stderr
    assert done.stderr == ""
    assert f"fastinit  {fastinit.__version__}" in done.stdout
    assert all(f"\n{title} " in done.stdout for title in ("processor", "torch", "CPU", "CUDA"))
    assert done.returncode == (module != "fastinit._cuda")
    if module == "torch":
        assert error in python(hide.replace("COMMAND", "'demo'")).stderr


def test_demo(python: Callable) -> None:
    done = python(["-m", "fastinit", "demo"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert done.stderr == ""


def test_unknown_command(python: Callable) -> None:
    done = python(["-m", "fastinit", "frobnicate"])
    assert done.returncode == 2
    assert "frobnicate" in done.stderr
    assert "usage" in done.stderr.lower()


def test_help(python: Callable) -> None:
    done = python(["-m", "fastinit", "--help"])
    assert done.returncode == 0
    for command in ("demo", "info", "verify", "bench"):
        assert command in done.stdout
