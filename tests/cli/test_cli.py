# SPDX-License-Identifier: BSD-3-Clause
"""`python -m fastinit`: what it prints is what a bug report needs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastinit
from fastinit import __main__
from fastinit.cli import bench, demo, info, inspect


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each operator, dtype and layout, saying who fills it, and why if it is torch."""
    assert __main__.main(["verify"]) == 0
    text = capsys.readouterr().out
    for operator in ("uniform", "normal", "trunc_normal", "constant", "eye", "dirac", "sparse"):
        assert re.search(rf"\b{operator}", text), operator
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert dtype in text
    for layout in ("contiguous", "dense", "strided"):
        assert layout in text
    rows = [line for line in text.splitlines() if re.search(r"\b(native|torch)\b", line)]
    assert sum("native" in row for row in rows) >= 12


@pytest.mark.slow
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
        ("fastinit._cuda", "ModuleNotFoundError", "CUDA      no kernels (not built: "),
        *(
            pytest.param(*broken, marks=pytest.mark.slow)
            for broken in [
                ("fastinit._cpu", "ModuleNotFoundError", "CPU       does not load: "),
                ("fastinit._cpu", "ImportError", "CPU       does not load: no such symbol"),
                ("fastinit._cuda", "ImportError", "CUDA      no kernels (does not load: no such"),
            ]
        ),
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


@pytest.mark.slow
def test_demo(python: Callable) -> None:
    done = python(["-m", "fastinit", "demo"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert done.stderr == ""


def said_by(words: list[str], capsys: pytest.CaptureFixture[str], status: int) -> str:
    """Return what an argument parser writes before it exits."""
    with pytest.raises(SystemExit) as exit_:
        __main__.main(words)
    assert exit_.value.code == status
    return "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "words", [["frobnicate"], [], ["inspect"], ["inspect", "a:b", "--seed", "x"]]
)
def test_wrong_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by(words, capsys, 2)
    assert said.startswith("usage: fastinit ")
    assert all(f"'{word}'" in said for word in words[-1:] if word != "inspect")


@pytest.mark.parametrize("program", ["fastinit", "python -m fastinit"])
def test_help(
    program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two doors names itself."""
    script = {"fastinit": "/bin/fastinit", "python -m fastinit": "/lib/fastinit/__main__.py"}
    monkeypatch.setattr(sys, "argv", [script[program]])
    said = said_by(["--help"], capsys, 0)
    assert said.startswith(f"usage: {program} ")
    assert all(f"    {name} " in said for name in ("demo", "info", "verify", "bench", "inspect"))
    said = said_by(["inspect", "--help"], capsys, 0)
    assert all(x in said for x in ("module:factory", "--seed", "--plot", "--meta"))


def test_the_console_script_is_the_same() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '\n[project.scripts]\nfastinit = "fastinit.__main__:main"\n' in project


@pytest.mark.parametrize("words", [["nosuchcase"], ["zeros_ float16"]])
def test_bench_of_no_case(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is timed, and what could be is listed."""
    assert __main__.main(["bench", *words]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert f"no case contains {words[0]!r}" in error
    assert "\n  normal_ float32, 16,777,216\n" in error


@pytest.mark.parametrize("words", [["bench"], ["verify"], ["demo"], ["inspect", "a:b"]])
def test_ctrl_c(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, no traceback, and the status that shells give to what Ctrl-C has ended."""

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    for module, name in [(bench, "main"), (info, "verify"), (demo, "demo"), (inspect, "main")]:
        monkeypatch.setattr(module, name, interrupted)
    assert __main__.main(words) == 130
    assert capsys.readouterr() == ("", f"fastinit {words[0]}: interrupted\n")
