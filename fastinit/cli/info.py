# SPDX-License-Identifier: BSD-3-Clause
"""`fastinit info` and `fastinit verify`: what was built, and what runs natively here."""

from __future__ import annotations

import platform


def info() -> int:
    """Versions and what was built; works as far as it can when something is broken."""
    print(f"python    {platform.python_version()} on {platform.platform()}")
    try:
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        print(
            f"torch     {torch.__version__}, CPU capability {capability}, CUDA {torch.version.cuda}"
        )
        print(f"threads   {torch.get_num_threads()}")
    except ImportError as error:
        print(f"torch     does not load: {error}")
        return 1
    try:
        import fastinit
        from fastinit import _cpu
        from fastinit.cli import bench
    except ImportError as error:
        print(f"fastinit  does not load: {error}")
        return 1
    print(f"fastinit  {fastinit.__version__}, built with {_cpu.COMPILER}")
    print(f"processor {bench.cpu_model()}")
    targets = [
        f"{name}{'' if runs else ' (not on this processor)'}" for name, runs in _cpu.targets()
    ]
    print(f"targets   {', '.join(targets)}; in use: {_cpu.target()}")
    for line in about_cuda():
        print(f"CUDA      {line}")
    return 0


def about_cuda() -> list[str]:
    """What serves GPUs here, or why torch does."""
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
    """Which operator, dtype and layout runs natively here, and why the others do not."""
    import torch

    from fastinit import probe

    rows = probe.table(-1 if device == "cpu" else torch.cuda.current_device())
    print(f"{'operator':<14}{'dtype':<10}{'layout':<12}{'runs':<8}why")
    for op, dtype, layout, way, why in rows:
        print(f"{op:<14}{dtype:<10}{layout:<12}{way:<8}{why}")
    native = sum(way == "native" for *_, way, _ in rows)
    print(
        f"\n{native} of {len(rows)} kinds of fill run natively with torch's bits; "
        "torch does the rest."
    )
    return 0
