# SPDX-License-Identifier: BSD-3-Clause
"""What orthogonal_ needs besides its tensor, and what happens when there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.marks import slow

PEAK = """
    import resource, torch, fastinit
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        fastinit.orthogonal_(torch.empty(80, 70, dtype=dtype))
    dtype = getattr(torch, DTYPE)
    t = torch.zeros(4096, 1024, dtype=dtype).fill_(1)
    before = peak()
    fastinit.orthogonal_(t)
    print(peak() - before, t.nbytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", *slow(["float32"])])
def test_memory(dtype: str, python: Callable[..., Any]) -> None:
    """Twice the matrix that is worked on and 32 MB."""
    done = python(PEAK.replace("DTYPE", repr(dtype)))
    assert done.returncode == 0, done.stderr[-2000:]
    extra, size = map(int, done.stdout.split())
    if dtype == "bfloat16":
        size *= 2
    assert extra <= 2 * size + (32 << 20), f"{extra / size} times the matrix"


MANY = """
    import resource, torch, fastinit
    from fastinit.cpu import qr
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.set_num_threads(2)
    qr.SCRATCH = 8 << 20
    fastinit.orthogonal_(torch.empty(80, 70, dtype=torch.bfloat16))
    tensors = [torch.full((4096, 64), 1, dtype=torch.bfloat16) for _ in range(80)]
    plan = fastinit.Plan()
    for t in tensors:
        plan.orthogonal_(t)
    def block():
        with fastinit.fused():
            made = [torch.empty(4096, 64, dtype=torch.bfloat16) for _ in range(80)]
            for t in made:
                fastinit.orthogonal_(t)
        return made
    before = peak()
    plan.run()
    after = peak()
    del tensors, plan, t
    made = block()
    print(after - before, peak() - after)
"""


@pytest.mark.slow
def test_normals_elsewhere_are_bounded(python: Callable[..., Any]) -> None:
    """Of 80 MB."""
    done = python(MANY)
    assert done.returncode == 0, done.stderr[-2000:]
    for extra in map(int, done.stdout.split()):
        assert extra <= (8 + 24) << 20, extra / 2**20


LITTLE = """
    import resource, torch, fastinit
    torch.set_num_threads(2)
    torch.manual_seed(1)
    fastinit.orthogonal_(torch.empty(600, 500))
    for shape in [(4, 1000, 1000), (50000, 500)]:
        t = torch.zeros(shape)
        fill = fastinit.orthogonal_batched_
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
        try:
            fill(t)
            print("no error")
        except MemoryError:
            print("MemoryError")
        except RuntimeError as error:
            print("RuntimeError", error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        fill(t)
        q = t.reshape(-1, shape[-1])[: shape[-2]].double()
        print(float((q.T @ q - torch.eye(shape[-1])).norm()) < 1e-4)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="not Linux")
def test_no_memory_is_an_error(python: Callable[..., Any]) -> None:
    done = python(LITTLE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["MemoryError", "True"] * 2
