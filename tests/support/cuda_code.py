# SPDX-License-Identifier: BSD-3-Clause
"""The machine code inside the built fastinit._cuda, and nvcc for what is not in it."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from fastinit.core.kernels import _cuda

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
disassembled = pytest.mark.skipif(
    None in (_cuda, shutil.which("cuobjdump"), shutil.which("nvdisasm")),
    reason="needs fastinit._cuda, cuobjdump and nvdisasm",
)
# Disassembling takes seconds for each; sm_90 stands for the others where time counts.
each_architecture = pytest.mark.parametrize(
    "architecture",
    ["90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("80", "100", "120"))],
)


def output(*command: str, folder: str | Path | None = None) -> str:
    """Run a command and return what it prints."""
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@functools.cache
def cubins() -> dict[str, list[Path]]:
    """Extract the module's machine code, one file per source, by architecture."""
    folder = tempfile.mkdtemp()
    output("cuobjdump", "-xelf", "all", _cuda.__file__, folder=folder)
    found: dict[str, list[Path]] = {}
    for path in Path(folder).glob("*.cubin"):
        found.setdefault(path.name.split(".")[-2], []).append(path)
    return found


@functools.cache
def listings(architecture: str) -> list[str]:
    """Disassemble the module's code for one architecture, source by source."""
    return [output("nvdisasm", "-c", str(p)) for p in cubins()[f"sm_{architecture}"]]


def registers(architecture: str) -> dict[str, tuple[int, int, int]]:
    """Return the registers, bytes of stack and bytes of local memory of each kernel."""
    text = output("cuobjdump", "--dump-resource-usage", _cuda.__file__)
    parts = re.split(r"arch = (sm_\w+)", text)
    mine = "".join(code for name, code in zip(parts[1::2], parts[2::2])
                   if name == f"sm_{architecture}")  # fmt: skip
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", mine)
    return {name: (int(reg), int(stack), int(local)) for name, reg, stack, local in found}


def loops_of(kernel: str, architecture: str) -> list[list[str]]:
    """Return the instructions of each loop of a kernel, from its label to the branch back."""
    text = next(t for t in listings(architecture) if kernel in t)
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", lines[-1])
            if back and back[1] in labels:
                loops.append(lines[labels[back[1]] :])
    return loops


def formula(code: str, count: int) -> str:
    """Return what the first `count` operations compute, as a formula of the registers before."""
    values: dict[str, str] = {}
    result = ""

    def value(name: str) -> str:
        sign, plain = re.match(r"(-?)(.*)", name.strip()).groups()  # type: ignore[union-attr]
        return sign + values.get(plain, plain)

    code = re.sub(r"\s+[&?][^;]*;|\s+;", ";", code)  # notes on when an instruction is issued
    found = re.findall(r"\b(MUFU\.\w+|FMUL|FFMA)(?:\.FTZ)? (\w+), ([^;]*);", code)
    for name, to, operands in found[:count]:
        x = [value(operand) for operand in operands.replace(".reuse", "").split(",")]
        if name == "FMUL" or x[2:] == ["RZ"]:
            result = "({}*{})".format(*sorted(x[:2]))
        elif name == "FFMA":
            result = "({}*{}+{})".format(*sorted(x[:2]), x[2])
        else:
            result = f"{name}({x[0]})"
        values[to] = result
    return result
