# SPDX-License-Identifier: BSD-3-Clause
"""The same bits whatever the threads, the instruction set, and where a job is cut."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor

import fastinit
from fastinit.core import fill as fill_
from fastinit.cpu import qr as cpu_qr
from tests.support.compare import BF16, DTYPES, F32, F64, bits
from tests.support.marks import slow
from tests.support.qr_model import drawn

DIVIDED = [(33, 20), (130, 70), (70, 130), (300, 260)]
LARGE = [(600, 530), (1030, 1025), (9000, 120)]


def digest(shapes: list[tuple[int, int]], dtype: torch.dtype, direct: bool) -> list[str]:
    made = []
    for rows, columns in shapes:
        torch.manual_seed(11)
        count = 1 if rows * columns > 1 << 18 else 3
        t = torch.empty(count, rows, columns, dtype=dtype)
        if direct:
            m, n = max(rows, columns), min(rows, columns)
            cpu_qr.write_haar_(t, drawn((count * fill_.packed_items(m, n),), dtype), 1.5)
        else:
            fastinit.orthogonal_batched_(t, 1.5)
        made.append(hashlib.sha256(bits(t).numpy().tobytes()).hexdigest())
    return made


@pytest.mark.parametrize("direct", [False, True], ids=["factored", "direct"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("shapes", [DIVIDED, *slow([LARGE])], ids=["small", "large"])
def test_threads(dtype: torch.dtype, direct: bool, shapes: list[tuple[int, int]]) -> None:
    found = {}
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found[threads] = digest(shapes, dtype, direct)
    assert found[1] == found[2] == found[3] == found[7]


TARGETS = [name for name, works in fastinit._cpu.targets() if works]
MAKE = f"""
    import torch, fastinit
    from fastinit.cpu import qr
    torch.set_num_threads(2)
    short = False
    made = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for rows, columns in {[(5, 3), (33, 20), (130, 70), (70, 130), (300, 260), (1030, 1025)]}:
            for direct in (False, True):
                if rows > 1000 and (short or direct or dtype is not torch.float32):
                    continue
                torch.manual_seed(11)
                t = torch.empty(1, rows, columns, dtype=dtype)
                if direct:
                    items = qr.packed_items(max(rows, columns), min(rows, columns))
                    qr.write_haar_(t, torch.empty(items, dtype=qr.gaussian_dtype(dtype)).normal_())
                else:
                    fastinit.orthogonal_batched_(t)
                made.append(t[0])
    torch.save((fastinit._cpu.target(), made), "made.pt")
"""


@pytest.mark.slow
def test_targets(python: Callable[..., Any], tmp_path: Path) -> None:
    """avx2 and avx512 to the bit; scalar, which rounds products on their own, up to that."""
    found = {}
    for target in TARGETS:
        what = MAKE if target != "scalar" else MAKE.replace("short = False", "short = True")
        done = python(what, FASTINIT_TARGET=target)
        assert done.returncode == 0, done.stderr[-2000:]
        name, found[target] = torch.load(tmp_path / "made.pt")
        assert name == target
    if "avx2" in found and "avx512" in found:
        for a, b in zip(found["avx2"], found["avx512"], strict=True):
            assert torch.equal(bits(a), bits(b)), (a.shape, a.dtype)
    other = [q for q in found[TARGETS[0]] if q.shape[0] < 1000]
    for a, b in zip(found["scalar"], other, strict=True):
        close = {F32: 1e-4, F64: 1e-12, BF16: 2.0**-8}[a.dtype]
        assert float((a.double() - b.double()).abs().max()) <= close


def test_several_python_threads() -> None:
    shapes = [(70, 66), (20, 30), (1100, 960), (3, 3), (200, 150)]

    def work(found: dict[int, list[Tensor]], seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        tensors = [torch.empty(s, dtype=d) for s in shapes for d in (F32, BF16)]
        found[seed] = [fastinit.orthogonal_(t, generator=g) for t in tensors]

    one: dict[int, list[Tensor]] = {}
    many: dict[int, list[Tensor]] = {}
    for seed in range(4):
        work(one, seed)
    threads = [threading.Thread(target=work, args=(many, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        for a, b in zip(one[seed], many[seed], strict=True):
            assert torch.equal(bits(a), bits(b))


def test_generators_are_free_while_matrices_are_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread draws meanwhile is neither lost nor a reason to begin again."""
    calls: list[torch.Tensor] = []
    run = fastinit.core.kernels.orthonormalize

    def draw(packed: bytes, written: bytearray) -> None:
        calls.append(torch.rand(3))
        run(packed, written)

    torch.manual_seed(3)
    expected = torch_init.orthogonal_(torch.empty(100, 90)), torch.rand(3)
    monkeypatch.setattr(fastinit.core.kernels, "orthonormalize", draw)
    torch.manual_seed(3)
    found = fastinit.orthogonal_(torch.empty(100, 90))
    torch.testing.assert_close(found, expected[0])
    assert len(calls) == 1
    assert torch.equal(calls[0], expected[1])


def test_batches_cut_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on where; of packed reflectors neither."""
    packed = drawn((7, fill_.packed_items(80, 70)), F32)
    for dtype in DTYPES:
        found = []
        for most in (1e15, 3e6, 1.0):
            monkeypatch.setattr(cpu_qr, "_BATCH", most)
            torch.manual_seed(3)
            a = fastinit.orthogonal_batched_(torch.empty(5, 90, 70, dtype=dtype))
            x = packed.double() if dtype == F64 else packed
            b = cpu_qr.write_haar_(torch.empty(7, 70, 80, dtype=dtype), x)
            found.append((bits(a), bits(b)))
        for a, b in found[1:]:
            assert torch.equal(a, found[0][0])
            assert torch.equal(b, found[0][1])
