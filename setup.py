# SPDX-License-Identifier: BSD-3-Clause
"""Builds fastinit._cpu, and fastinit._cuda if there is nvcc, with ninja: parallel, incremental.

Metadata: pyproject.toml. Environment: CXX (the compiler), CXXFLAGS (appended), MAX_JOBS (parallel
compilations); CUDA_HOME (where bin/nvcc is, if not in PATH), TORCH_CUDA_ARCH_LIST ("9.0;10.0+PTX"),
FORCE_CUDA=1 (no nvcc is an error), FORCE_ONLY_CPU=1 (no _cuda). Whether this machine has a GPU, and
which CUDA torch was built with, does not matter: _cuda contains its own runtime and no torch.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()

# Where every rounding takes place is part of the result: no contraction, no fast math.
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -pthread -ffp-contract=off -fno-math-errno "
    "-fno-strict-aliasing -Wall -Wextra -Wno-maybe-uninitialized -Wno-uninitialized"
)
# As torch's own kernels are compiled: where a law needs a rounding of its own, it says so.
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"
# As the CPU's laws: keyed.cu has to give the same bits.
OWN_FLAGS = {"keyed.cu": "-fmad=false"}
CPU_SOURCES = [
    "module.cpp",
    "targets.cpp",
    "fill/run.cpp",
    "fill/jump.cpp",
    "keyed/run.cpp",
    "pointwise/run.cpp",
    "qr/run.cpp",
]
CUDA_SOURCES = ["module.cpp", "fill/fill.cu", "keyed/keyed.cu", "qr/qr.cu"]
ARCHITECTURES = ("80", "90", "100", "120")  # A100, H100 and H200, B200, RTX 50; PTX for later ones
NAMES = {"ampere": "8.0;8.6", "ada": "8.9", "hopper": "9.0", "blackwell": "10.0;12.0"}

NINJA_FILE = """\
rule compile
  command = {cxx} -MMD -MF $out.d {flags} $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule nvcc
  command = {nvcc} -MD -MF $out.d {nvcc_flags} $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = {linker} -shared {link_flags} $in -o $out
  description = link $out
{edges}
"""


def compiler() -> str:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        if candidate and shutil.which(candidate.split()[0]):
            return candidate
    raise SystemExit(
        f"fastinit: no C++ compiler found ({named or 'c++, g++, clang++'}).\n"
        "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: "
        "xcode-select --install) or name it in the environment variable CXX."
    )


def find_nvcc() -> str | None:
    """The CUDA compiler, if it is wanted."""
    if os.environ.get("FORCE_ONLY_CPU") == "1":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    standard = Path("/usr/local/cuda/bin/nvcc")
    if home:
        found = shutil.which(str(Path(home) / "bin" / "nvcc"))
    else:
        found = shutil.which("nvcc") or shutil.which(str(standard))
    if found is None and os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(
            f"fastinit: FORCE_CUDA=1, but no nvcc was found in {home or 'PATH'}. "
            "Install the CUDA toolkit (12.4 or later) or set CUDA_HOME to where it is."
        )
    return found


def architectures(nvcc: str) -> list[str]:
    """nvcc's options and what they produce, from TORCH_CUDA_ARCH_LIST or by default."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = re.findall(r"compute_(\w+)", listed)
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not asked:
        codes = [a for a in ARCHITECTURES if a in known]
        return [f"sm_{a}" for a in codes] + [f"compute_{a}" for a in codes[-1:]]
    names: list[str] = []
    for item in re.split(r"[;,\s]+", asked):
        base, ptx, rest = item.partition("+PTX")
        for version in NAMES.get(base.lower(), base).split(";"):
            code = version.replace(".", "")
            plain = re.fullmatch(r"(\d+)\.(\d)[af]?", version)
            if rest or plain is None or "".join(plain.groups()) not in known:
                raise SystemExit(
                    f"fastinit: TORCH_CUDA_ARCH_LIST names {item!r}; this nvcc compiles for "
                    + ", ".join(f"{a[:-1]}.{a[-1]}" for a in known)
                )
            names += [f"sm_{code}"] + ([f"compute_{code}"] if ptx else [])
    return names


def gencode(name: str) -> str:
    return f"-gencode arch=compute_{name.partition('_')[2]},code={name}"


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class FreshBuild(build_py):
    """Forgets the build before: the wheel would get modules that have moved since."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "fastinit", ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    def run(self) -> None:
        super().run()
        names = {Path(self.get_ext_filename(ext.name)).name for ext in self.extensions}
        for old in {Path(self.get_ext_filename("fastinit._cuda")).name} - names:
            (ROOT / "fastinit" / old).unlink(missing_ok=True)  # of a build that had an nvcc

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        for folder in (target.parent, build):
            folder.mkdir(parents=True, exist_ok=True)
        cxx, nvcc = compiler(), find_nvcc() if ext.name.endswith("_cuda") else None
        # Only the module sees Python: another environment recompiles one file.
        python = f"-I{escape(sysconfig.get_path('include'))} -I{escape(pybind11.get_include())}"
        link_flags = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-pthread"
        code = []
        jobs = os.environ.get("MAX_JOBS")
        if nvcc is None:
            python += f" '-DFASTINIT_COMPILER=\"{version_of(cxx)[0]}\"'"
        else:
            release = next(x for x in version_of(nvcc) if "release" in x)
            code = architectures(nvcc)
            python += f" '-DFASTINIT_NVCC=\"nvcc {release.split()[-1].lstrip('V')}\"'"
            python += f" '-DFASTINIT_ARCHITECTURES=\"{' '.join(code)}\"'"
            link_flags = "-cudart static -Xcompiler -pthread"
        edges, objects = [], []
        for source in map(Path, ext.sources):
            out = build / ("-".join(source.parts[2:]) + ".o")
            objects.append(escape(out))
            flags = python if source.name == "module.cpp" else ""
            if source.suffix == ".cu":
                flags = " ".join([*map(gencode, code), OWN_FLAGS.get(source.name, "")])
                flags += f" --threads {jobs or min(4, os.cpu_count())}"
            rule = "nvcc" if source.suffix == ".cu" else "compile"
            edges.append(f"build {escape(out)}: {rule} {escape(ROOT / source)}\n  flags = {flags}")
        edges.append(f"build {escape(target)}: link {' '.join(objects)}")
        # nvcc takes no launcher, such as ccache, and no options with its host compiler.
        host = f"-ccbin {cxx} " if "CXX" in os.environ and len(cxx.split()) == 1 else ""
        (build / "build.ninja").write_text(
            NINJA_FILE.format(
                cxx=cxx,
                nvcc=nvcc,
                linker=cxx if nvcc is None else nvcc + " " + host,
                flags=f"{FLAGS} {os.environ.get('CXXFLAGS', '')}",
                nvcc_flags=host + NVCC_FLAGS,
                link_flags=link_flags,
                edges="\n".join(edges),
            )
        )
        command = [sys.executable, "-m", "ninja", *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, cwd=build).returncode != 0:
            raise SystemExit(
                f"fastinit: {cxx} could not compile csrc/cpu (its messages are above). A compiler "
                "with C++17 is needed (g++ 9 or clang 10 and later) and Python's headers "
                "(Debian, Ubuntu: apt-get install python3-dev)."
                if nvcc is None
                else f"fastinit: {nvcc} could not compile csrc/cuda (its messages are above). CUDA "
                "12.4 or later is needed, with a host compiler it supports (CXX names another); "
                "FORCE_ONLY_CPU=1 builds without."
            )
        # In this folder the package is found before the installed one, so it needs the module, too.
        beside = ROOT / "fastinit" / target.name
        if beside != target:  # replaced, not overwritten: a process may have it in memory
            shutil.copy2(target, f"{beside}.new")
            os.replace(f"{beside}.new", beside)


def version_of(command: str) -> list[str]:
    run = subprocess.run([*command.split(), "--version"], capture_output=True, text=True)
    return run.stdout.splitlines()


extensions = [Extension("fastinit._cpu", [f"csrc/cpu/{name}" for name in CPU_SOURCES])]
if find_nvcc() is not None:
    extensions.append(Extension("fastinit._cuda", [f"csrc/cuda/{name}" for name in CUDA_SOURCES]))
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild, "build_py": FreshBuild})
