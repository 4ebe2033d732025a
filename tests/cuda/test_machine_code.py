# SPDX-License-Identifier: BSD-3-Clause
"""What nvcc made of the kernels, read off the machine code of the built module. Needs no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastinit.core.kernels import _cuda
from tests.support.cuda_code import (
    NVCC,
    SOURCES,
    disassembled,
    each_architecture,
    formula,
    listings,
    loops_of,
    needs_nvcc,
    output,
    registers,
)

BUILT = re.findall(r"sm_(\d+)", getattr(_cuda, "ARCHITECTURES", ""))


@disassembled
@pytest.mark.parametrize("architecture", BUILT)
def test_no_register_is_spilled(architecture: str) -> None:
    """Of 65,536 registers, so many let two (128), three (80) or four (64) blocks of 256 threads be
    on a multiprocessor."""
    kernels = registers(architecture)
    assert {name: rest for name, (_, *rest) in kernels.items() if any(rest)} == {}
    wide = architecture in ("100", "120")
    limits = {"11fill_kernel": 128 if wide else 80, "12keyed_kernel": 80 if wide else 64}
    for kernel, limit in limits.items():
        (used,) = (n for name, (n, *_) in kernels.items() if kernel in name)
        assert used <= limit, kernel
    others = [n for name, (n, *_) in kernels.items() if not any(k in name for k in limits)]
    assert len(others) == 16, "the kernels of qr.cu"
    assert max(others) <= 80


@pytest.mark.slow
@disassembled
@each_architecture
def test_stores_are_16_bytes_wide(architecture: str) -> None:
    """The fill kernel has 11 such stores for each of the three dtypes that have vectors: uniform 4,
    normal 4, one output per block 1 each, constants 1. Nothing is stored through generic addresses,
    which cost a look-up, and nothing is spilled."""
    code = "".join(listings(architecture))
    assert len(re.findall(r"STG\.E\.128", code)) >= 3 * (4 + 4 + 1 + 1 + 1)
    assert not re.search(r"\bST(\.E|\s)", code)
    assert not re.search(r"\b(STL|LDL)\b", code)


@disassembled
@each_architecture
def test_normals_are_computed_as_torch_does(architecture: str) -> None:
    """These instructions are in torch's own kernels, as seen in libtorch_cuda.so of torch 2.11 and
    2.15: the sine's range reduced with rounding to zero, then the hardware's sine and cosine; the
    constants of libdevice's logf, merged multiply-adds and a Newton step for the square root."""
    code = "".join(listings(architecture))
    for needed in (
        *(r"FMUL\.RZ [^;]*0\.15915493667125701904", r"MUFU\.SIN", r"MUFU\.COS", r"MUFU\.RSQ"),
        *(r"FFMA[^;]*-0\.12148627638816833496", r"FFMA[^;]*0\.33333182334899902344"),
        *(r"FFMA[^;]*1\.1641532182693481445e-10", r"FFMA[^;]*7\.314590599882819788e-10"),
    ):
        assert re.search(needed, code), needed


@needs_nvcc
def test_the_logarithm_is_that_of_the_installed_cuda(tmp_path: Path) -> None:
    """laws.h repeats logf of libdevice: both have the same constants in the same order."""
    assert NVCC is not None
    (tmp_path / "log.cu").write_text("__global__ void k(float* x) { *x = logf(*x); }")
    output(NVCC, "-arch=sm_90", "-ptx", "-o", "log.ptx", "log.cu", folder=tmp_path)
    theirs = re.findall(r"0f([0-9A-F]{8})", (tmp_path / "log.ptx").read_text())
    law = "".join(p.read_text() for p in sorted(SOURCES.rglob("laws.h")))
    body = law[law.index("FI_FN float log_of") : law.index("// Two standard normals")]
    ours = re.findall(r"view\(0x([0-9A-F]{8})\)", body)
    assert len(ours) == 9
    polynomial = ours[:-1]
    found = [c for c in theirs if c in polynomial]
    assert sorted(found) == sorted(polynomial)
    assert [c for c in found if c not in polynomial[:2]] == polynomial[2:]
    assert ours[-1] in theirs  # ln 2


@disassembled
def test_the_keyed_kernel_rounds_as_the_laws_say() -> None:
    """Every operation names its rounding, so that none is merged with another; denormals stay."""
    dump = output("cuobjdump", "--dump-ptx", _cuda.__file__)
    sources = [text for text in dump.split("Fatbin ptx code") if "keyed_kernel" in text]
    if not sources:
        pytest.skip("built without PTX")
    found = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\S*\.f(?:32|64))\s", sources[0], re.MULTILINE))
    arithmetic = {name for name in found if not re.match(r"(ld|st|mov|setp|selp|neg|cvt)\b", name)}
    assert arithmetic == {
        *("fma.rn.f32", "add.rn.f32", "sub.rn.f32", "mul.rn.f32"),
        *("rsqrt.approx.ftz.f32", "rcp.approx.ftz.f32"),
        *("fma.rn.f64", "add.rn.f64", "sub.rn.f64", "mul.rn.f64", "div.rn.f64", "sqrt.rn.f64"),
    }


@pytest.mark.slow
@needs_nvcc
@disassembled
@each_architecture
def test_roots_and_quotients_are_those_of_nvcc(architecture: str, tmp_path: Path) -> None:
    """lanes.h repeats what nvcc makes of IEEE's for arguments that are not extreme."""
    source = "".join(p.read_text() for p in sorted(SOURCES.rglob("lanes.h")))
    begin = source.index("FI_FN F root(F v) {\n  float y;")
    source = source[begin : source.index("// Two elements", begin)]
    source = source.replace("FI_FN F ", "__device__ float my_").replace("F ", "float ")
    calls = {"k_a": "sqrtf(x[0])", "k_b": "x[0] / x[1]"}
    calls |= {"k_c": "my_root(x[0])", "k_d": "my_quotient(x[0], x[1])"}
    for name, call in calls.items():
        source += f"__global__ void {name}(float* x) {{ *x = {call}; }}\n"
    (tmp_path / "both.cu").write_text(source)
    assert NVCC is not None
    flags = (f"-arch=sm_{architecture}", "-cubin", "-o", "both.cubin", "both.cu")
    output(NVCC, *flags, folder=tmp_path)
    formulas = {}
    listing = output("nvdisasm", "-c", "both.cubin", folder=tmp_path)
    for section in re.split(r"\n\s*\.section\s+", listing):
        if kernel := re.match(r"\.text\._Z3(k_.)", section):
            code = section[section.index("MUFU") :]
            names = re.match(r"MUFU\.\w+ \w+, (\w+)", code)
            assert names is not None
            made = formula(code, 5 if "RSQ" in names[0] else 6)
            # Registers have other names: the argument of MUFU, and the numerator.
            made = re.sub(rf"\b{names[1]}\b", "v", made)
            formulas[kernel[1]] = re.sub(r"\bR\d+\b", "a", made)
    assert sorted(formulas) == sorted(calls)
    assert formulas["k_a"] == formulas["k_c"]
    assert formulas["k_b"] == formulas["k_d"]
    assert "MUFU.RSQ" in formulas["k_a"]
    assert "MUFU.RCP" in formulas["k_b"]


@disassembled
@pytest.mark.parametrize(
    ("law", "kind", "most"),
    [
        *(("normal", "float", 44.5), ("normal", "bfloat16", 44.5)),
        *(("uniform", "float", 16.5), ("uniform", "bfloat16", 17.0)),
        *(("trunc_normal", "float", 78.0), ("trunc_normal", "bfloat16", 78.5)),
    ],
)
def test_issue_slots(law: str, kind: str, most: float) -> None:
    """The keyed loop that writes 16 bytes at a time takes so many instructions for an element on
    Hopper."""
    roots = {"uniform": 0, "normal": 4, "trunc_normal": 16}[law]  # and reciprocals
    found = []
    for body in loops_of("keyed_kernel", "90"):
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
