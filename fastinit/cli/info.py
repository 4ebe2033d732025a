# SPDX-License-Identifier: BSD-3-Clause
"""`fastinit info` and `fastinit verify`: what was built, and what runs natively here."""

from __future__ import annotations

import platform

# Nothing that may be missing is imported before it is needed: `info` says what is missing.


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def header() -> str:
    """Return what a benchmark's figures depend on."""
    import torch

    import fastinit
    from fastinit import _cpu

    return (
        f"{cpu_model()}, {torch.get_num_threads()} threads, target {_cpu.target()}, torch "
        f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), fastinit "
        f"{fastinit.__version__}, {_cpu.COMPILER}"
    )


def info() -> int:
    """Print versions and what was built, as far as they are known; return the exit status."""
    import fastinit

    print(f"python    {platform.python_version()} on {platform.platform()}")
    print(f"processor {cpu_model()}")
    print(f"fastinit  {fastinit.__version__}")
    status = 0
    for title, about in {"torch": about_torch, "CPU": about_cpu, "CUDA": about_cuda}.items():
        try:
            lines = about()
        except ImportError as error:
            lines, status = [f"does not load: {error}"], 1
        for line in lines:
            print(f"{title:<9} {line}")
    return status


def about_torch() -> list[str]:
    """Return lines about torch."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"{torch.__version__}, CPU capability {capability}, CUDA {torch.version.cuda}"
    return [versions, f"{torch.get_num_threads()} threads"]


def about_cpu() -> list[str]:
    """Return lines about the kernels for the CPU."""
    from fastinit import _cpu

    names = [f"{n}{'' if runs else ' (not on this processor)'}" for n, runs in _cpu.targets()]
    targets = f"targets {', '.join(names)}; in use: {_cpu.target()}"
    return [f"fastinit._cpu built with {_cpu.COMPILER}", targets]


def about_cuda() -> list[str]:
    """Return lines that say what fills tensors on GPUs here."""
    import torch

    from fastinit.core import kernels

    module = kernels._cuda
    if module is None:
        return [f"no kernels ({kernels.why_no_cuda}); torch fills tensors on GPUs"]
    lines = [f"fastinit._cuda built with {module.COMPILER} for {module.ARCHITECTURES}"]
    missing = module.why_no_driver()
    if missing:
        lines.append(f"no GPU to run on: {missing}")
    elif torch.version.cuda is None:
        lines.append("torch is a CPU build, so there are no tensors on GPUs")
    for i in range(0 if missing or torch.version.cuda is None else torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(
            f"GPU {i}: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} processors of "
            f"{p.max_threads_per_multi_processor} threads"
        )
    return lines


def verify(device: str = "cpu") -> int:
    """Print which operator, dtype and layout runs natively here, and why the others do not."""
    import torch

    from fastinit import probe
    from fastinit.core.table import columns

    rows = probe.table(-1 if device == "cpu" else torch.cuda.current_device())
    print(*columns([("operator", "dtype", "layout", "runs", "why"), *rows]), sep="\n")
    native = sum(way == "native" for *_, way, _ in rows)
    print(
        f"\n{native} of {len(rows)} kinds of fill run natively with torch's bits; "
        "torch does the rest."
    )
    return 0
