# SPDX-License-Identifier: BSD-3-Clause
"""What nvcc makes of the kernel, read off its reports and the machine code. Needs no GPU."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastinit.core.kernels import _cuda
from fastinit.cuda import fills as cuda_fills
from fastinit.cuda import runtime

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "csrc" / "cuda" / "fill.cu"
ARCHITECTURES = ("80", "90", "100", "120")


NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
built = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
disassembled = pytest.mark.skipif(
    None in (_cuda, shutil.which("cuobjdump"), shutil.which("nvdisasm")),
    reason="needs fastinit._cuda, cuobjdump and nvdisasm",
)


@functools.cache
def cubins() -> dict[str, list[Path]]:
    """The machine code of the installed module, a file of each source, by architecture."""
    tool = shutil.which("cuobjdump")
    assert tool is not None
    folder = tempfile.mkdtemp()
    subprocess.run([tool, "-xelf", "all", _cuda.__file__], cwd=folder, check=True)
    found: dict[str, list[Path]] = {}
    for p in Path(folder).glob("*.cubin"):
        found.setdefault(p.name.split(".")[-2], []).append(p)
    return found


@functools.cache
def texts(architecture: str) -> list[str]:
    """Disassembled, one of each source."""
    tool = shutil.which("nvdisasm")
    assert tool is not None
    return [
        subprocess.run([tool, "-c", str(p)], capture_output=True, text=True, check=True).stdout
        for p in cubins()[f"sm_{architecture}"]
    ]


def machine_code(architecture: str) -> str:
    return "".join(texts(architecture))


@built
@pytest.mark.parametrize("architecture", ["90", "100"])  # three blocks on a processor, and two
def test_no_register_is_spilled(architecture: str, tmp_path: Path) -> None:
    assert NVCC is not None
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin"]
    command = [NVCC, *flags, "-o", str(tmp_path / "fill.cubin"), str(KERNEL)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    registers = int(re.findall(r"Used (\d+) registers", report)[0])
    assert registers <= (128 if architecture == "100" else 80)  # of 65,536, for blocks of 256


@disassembled
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stores_are_16_bytes_wide(architecture: str) -> None:
    """Of each dtype with vectors: 4 for uniform, 4 for normal, 1 each for one output per block, and
    constants; float64 and what is strided or unaligned is stored element by element."""
    code = machine_code(architecture)
    assert len(re.findall(r"STG\.E\.128", code)) >= 3 * (4 + 4 + 1 + 1 + 1)
    assert not re.search(r"\bST\.E", code)  # generic addresses, which cost a look-up
    assert not re.search(r"\b(STL|LDL)\b", code)  # spilled registers


@disassembled
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_normals_are_computed_as_torch_does(architecture: str) -> None:
    """The instructions that torch's own kernels have, as seen in libtorch_cuda.so of torch 2.11 and
    2.15: range of the sine reduced with rounding to zero, then the hardware's sine and cosine; the
    constants of libdevice's logf, merged multiply-adds and a Newton step for the square root."""
    code = machine_code(architecture)
    for needed in (
        r"FMUL\.RZ [^;]*0\.15915493667125701904",
        r"MUFU\.SIN",
        r"MUFU\.COS",
        r"MUFU\.RSQ",
        r"FFMA[^;]*-0\.12148627638816833496",
        r"FFMA[^;]*0\.33333182334899902344",
        r"FFMA[^;]*1\.1641532182693481445e-10",
        r"FFMA[^;]*7\.314590599882819788e-10",
    ):
        assert re.search(needed, code), needed


@built
def test_the_logarithm_is_that_of_the_installed_cuda(tmp_path: Path) -> None:
    """laws.h repeats logf of libdevice: both have the same constants in the same order."""
    assert NVCC is not None
    (tmp_path / "log.cu").write_text("__global__ void k(float* x) { *x = logf(*x); }")
    command = [NVCC, "-arch=sm_90", "-ptx", "-o", "log.ptx", "log.cu"]
    subprocess.run(command, cwd=tmp_path, check=True)
    theirs = re.findall(r"0f([0-9A-F]{8})", (tmp_path / "log.ptx").read_text())
    law = (KERNEL.parent / "laws.h").read_text()
    body = law[law.index("FI_FN float log_of") : law.index("// Two standard normals")]
    ours = re.findall(r"float_of\(0x([0-9A-F]{8})\)", body)
    assert len(ours) == 9
    polynomial = ours[:-1]
    found = [c for c in theirs if c in polynomial]
    assert sorted(found) == sorted(polynomial)
    assert [c for c in found if c not in polynomial[:2]] == polynomial[2:]
    assert ours[-1] in theirs  # ln 2


@disassembled
def test_the_module_has_code_for_the_named_architectures() -> None:
    tool = shutil.which("cuobjdump")
    assert tool is not None
    listed = subprocess.run([tool, "--list-ptx", _cuda.__file__], capture_output=True, text=True)
    for name in _cuda.ARCHITECTURES.split():
        kind, _, number = name.partition("_")
        if kind == "sm":
            assert name in cubins()
        else:
            assert f"sm_{number}.ptx" in listed.stdout
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert {"sm_80", "sm_90", "sm_100", "sm_120"} <= set(cubins())


@pytest.mark.skipif(_cuda is None, reason="needs fastinit._cuda")
def test_both_sides_mean_the_same() -> None:
    """What cuda.py packs and assumes is what was compiled."""
    for union in (len(cuda_fills._DENSE), cuda_fills._STRIDED.size, cuda_fills._DIAGONAL.size):
        assert cuda_fills._PACK.size + union == _cuda.FILL_SIZE
    assert cuda_fills._SLOT.size == _cuda.SLOT_SIZE
    assert runtime.MOST_INLINED == _cuda.MOST_INLINED
    assert runtime.MOST_SOURCES == _cuda.MOST_SOURCES


# ---- setup.py ------------------------------------------------------------------------------------

Python = Callable[..., "subprocess.CompletedProcess[str]"]

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


@built
def test_nvcc_is_enough_for_the_cuda_module(python: Python) -> None:
    assert "['fastinit._cpu', 'fastinit._cuda']" in setup_py(python)[1]
    assert "['fastinit._cpu']" in setup_py(python, FORCE_ONLY_CPU="1")[1]


@built
@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("", "sm_80 sm_90 sm_100 sm_120 compute_120"),
        ("9.0", "sm_90"),
        ("8.0;9.0+PTX", "sm_80 sm_90 compute_90"),
        ("9.0a 10.0", "sm_90a sm_100"),
        ("Hopper,8.6", "sm_90 sm_86"),
    ],
)
def test_list_of_architectures(python: Python, asked: str, given: str) -> None:
    code = "print(*module.architectures(module.find_nvcc()))"
    assert given in setup_py(python, code, TORCH_CUDA_ARCH_LIST=asked)[1].splitlines()


@built
@pytest.mark.parametrize("asked", ["9", "sm_90", "nine", "3.5", "9.0+PTXX"])
def test_unknown_architectures_are_errors(python: Python, asked: str) -> None:
    code = "print(*module.architectures(module.find_nvcc()))"
    status, said = setup_py(python, code, TORCH_CUDA_ARCH_LIST=asked)
    assert status != 0
    assert "TORCH_CUDA_ARCH_LIST names" in said


def test_import_and_info_without_a_driver(python: Python) -> None:
    """The module loads anywhere; what is missing is said."""
    run = python(["-m", "fastinit", "info"])
    assert run.returncode == 0, run.stderr
    assert re.search(r"^CUDA +(fastinit\._cuda|no kernels)", run.stdout, re.MULTILINE), run.stdout


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
