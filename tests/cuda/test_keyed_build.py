# SPDX-License-Identifier: BSD-3-Clause
"""What nvcc makes of the keyed stream's kernel. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda.test_build import (
    ARCHITECTURES,
    NVCC,
    ROOT,
    Python,
    built,
    disassembled,
    setup_py,
    texts,
)

KEYED = ROOT / "csrc" / "cuda" / "keyed.cu"


def loops_of(architecture: str) -> list[list[str]]:
    """The instructions of each loop of the keyed kernel, from its label to the branch back."""
    text = next(t for t in texts(architecture) if "keyed_kernel" in t)
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


@built
def test_it_has_its_own_flag(python: Python) -> None:
    assert "{'keyed.cu': '-fmad=false'}" in setup_py(python, "print(module.OWN_FLAGS)")[1]


@built
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_register_is_spilled(architecture: str, tmp_path: Path) -> None:
    assert NVCC is not None
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin"]
    command = [NVCC, *flags, "-fmad=false", "-o", str(tmp_path / "keyed.cubin"), str(KEYED)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in run.stderr
    registers = int(re.findall(r"Used (\d+) registers", run.stderr)[0])
    assert registers <= (80 if architecture in ("100", "120") else 64)


@built
def test_it_rounds_as_the_laws_say(tmp_path: Path) -> None:
    """Every operation names its rounding, so that none is merged with another; denormals stay."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-ptx"]
    command += ["-o", str(tmp_path / "keyed.ptx"), str(KEYED)]
    subprocess.run(command, check=True, timeout=300)
    code = (tmp_path / "keyed.ptx").read_text()
    found = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\S*\.f(?:32|64))\s", code, re.MULTILINE))
    arithmetic = {name for name in found if not re.match(r"(ld|st|mov|setp|selp|neg|cvt)\b", name)}
    assert arithmetic == {
        *(
            "fma.rn.f32",
            "add.rn.f32",
            "sub.rn.f32",
            "mul.rn.f32",
            "rsqrt.approx.ftz.f32",
            "rcp.approx.ftz.f32",
        ),
        *("fma.rn.f64", "add.rn.f64", "sub.rn.f64", "mul.rn.f64", "div.rn.f64", "sqrt.rn.f64"),
    }


def evaluated(code: str, count: int) -> str:
    """What the arithmetic from the first MUFU on computes, as a formula of the registers before."""
    values: dict[str, str] = {}
    result = ""

    def value(name: str) -> str:
        sign, plain = re.match(r"(-?)(.*)", name.strip()).groups()  # type: ignore[union-attr]
        return sign + values.get(plain, plain)

    code = re.sub(r"\s+[&?][^;]*;|\s+;", ";", code)  # when it is issued
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


@built
@pytest.mark.skipif(shutil.which("nvdisasm") is None, reason="needs nvdisasm")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_roots_and_quotients_are_those_of_nvcc(architecture: str, tmp_path: Path) -> None:
    """lanes.h repeats what nvcc makes of IEEE's for arguments that are not extreme."""
    source = (KEYED.parent / "lanes.h").read_text()
    source = source[
        source.index("FI_FN F root(F v) {\n  float y;") : source.index("FI_FN uint64_t b")
    ]
    source = source.replace("FI_FN F ", "__device__ float my_").replace("F ", "float ")
    source += "".join(
        f"__global__ void {name}(float* x) {{ *x = {call}; }}\n"
        for name, call in [("k_a", "sqrtf(x[0])"), ("k_b", "x[0] / x[1]"),
                           ("k_c", "my_root(x[0])"), ("k_d", "my_quotient(x[0], x[1])")]
    )  # fmt: skip
    (tmp_path / "both.cu").write_text(source)
    assert NVCC is not None
    command = [NVCC, f"-arch=sm_{architecture}", "-cubin", "-o", "both.cubin", "both.cu"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    command = ["nvdisasm", "-c", "both.cubin"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    formulas = {}
    for section in re.split(r"\n\s*\.section\s+", text):
        if kernel := re.match(r"\.text\._Z3(k_.)", section):
            code = section[section.index("MUFU") :]
            names = re.match(r"MUFU\.\w+ \w+, (\w+)", code)
            assert names is not None
            count = 5 if "RSQ" in names[0] else 6
            formula = evaluated(code, count)
            # Registers have other names: the argument of MUFU, and the numerator.
            formula = re.sub(rf"\b{names[1]}\b", "v", formula)
            formulas[kernel[1]] = re.sub(r"\bR\d+\b", "a", formula)
    assert sorted(formulas) == ["k_a", "k_b", "k_c", "k_d"]
    assert formulas["k_a"] == formulas["k_c"]
    assert formulas["k_b"] == formulas["k_d"]
    assert "MUFU.RSQ" in formulas["k_a"]
    assert "MUFU.RCP" in formulas["k_b"]


@disassembled
@pytest.mark.parametrize(
    ("law", "kind", "most"),
    [
        ("normal", "float", 44.5),
        ("normal", "bfloat16", 44.5),
        ("uniform", "float", 16.5),
        ("uniform", "bfloat16", 17.0),
        ("trunc_normal", "float", 78.0),
        ("trunc_normal", "bfloat16", 78.5),
    ],
)
def test_issue_slots(law: str, kind: str, most: float) -> None:
    """Instructions for an element of the loop that writes 16 bytes at a time, on Hopper."""
    roots = {"uniform": 0, "normal": 4, "trunc_normal": 16}[law]  # and reciprocals
    found = []
    for body in loops_of("90"):
        code = "\n".join(body)
        if (
            len(re.findall(r"STG\.E", code)) == (2 if kind == "float" else 1)
            and len(re.findall(r"IMAD\.(WIDE|HI)\.U32", code)) == 2 * 19  # Philox
            and len(re.findall(r"MUFU", code)) == roots
            and (kind == "float") == ("F2FP" not in code)
            and "DFMA" not in code
        ):
            found.append(len(body) / 8)
    assert len(found) == (1 if kind == "float" else 2)  # float16 has one, too
    assert max(found) <= most, found
