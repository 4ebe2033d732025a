# SPDX-License-Identifier: BSD-3-Clause
"""Builds fastinit._cpu with ninja: parallel, incremental, per-file flags. Metadata: pyproject.toml.

Environment: CXX (the compiler), CXXFLAGS (appended), MAX_JOBS (parallel compilations).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# Where every rounding takes place is part of the result: no contraction, no fast math.
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -pthread -ffp-contract=off -fno-math-errno "
    "-fno-strict-aliasing -Wall -Wextra -Wno-maybe-uninitialized -Wno-uninitialized"
)
CPU_SOURCES = ["module.cpp", "run.cpp", "jump.cpp", "targets.cpp"]

NINJA_FILE = """\
rule compile
  command = {cxx} -MMD -MF $out.d {flags} $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = {cxx} -shared {link_flags} $in -o $out
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


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name
        for folder in (target.parent, build):
            folder.mkdir(parents=True, exist_ok=True)
        cxx = compiler()
        version = subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True)
        # Only the module sees Python: another environment recompiles one file.
        python = (
            f"-I{escape(sysconfig.get_path('include'))} -I{escape(pybind11.get_include())} "
            f"'-DFASTINIT_COMPILER=\"{version.stdout.splitlines()[0]}\"'"
        )
        edges, objects = [], []
        for source in map(Path, ext.sources):
            out = build / (source.name + ".o")
            objects.append(escape(out))
            flags = python if source.name == "module.cpp" else ""
            edges.append(f"build {escape(out)}: compile {escape(ROOT / source)}\n  flags = {flags}")
        edges.append(f"build {escape(target)}: link {' '.join(objects)}")
        mac = sys.platform == "darwin"
        (build / "build.ninja").write_text(
            NINJA_FILE.format(
                cxx=cxx,
                flags=f"{FLAGS} {os.environ.get('CXXFLAGS', '')}",
                link_flags="-undefined dynamic_lookup" if mac else "-pthread",
                edges="\n".join(edges),
            )
        )
        jobs = os.environ.get("MAX_JOBS")
        command = [sys.executable, "-m", "ninja", *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, cwd=build).returncode != 0:
            raise SystemExit(
                f"fastinit: {cxx} could not compile csrc/ (its messages are above). A compiler "
                "with C++17 is needed (g++ 9 or clang 10 and later) and Python's headers "
                "(Debian, Ubuntu: apt-get install python3-dev)."
            )


setup(
    ext_modules=[Extension("fastinit._cpu", [f"csrc/cpu/{name}" for name in CPU_SOURCES])],
    cmdclass={"build_ext": NinjaBuild},
)
