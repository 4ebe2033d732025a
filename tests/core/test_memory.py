# SPDX-License-Identifier: BSD-3-Clause
"""What a fill needs besides its tensor: less than 8 MiB, whatever the law."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMIT = 8 * 1024  # KiB

SCRIPT = """
import sys
import torch, fastinit

def peak():  # of this process; ru_maxrss would begin with that of the one that started it
    with open("/proc/self/status") as lines:
        return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))

def fill(t):
    law = sys.argv[1]
    (fastinit.sparse_(t, 0.9) if law == "sparse_" else getattr(fastinit, law)(t))

torch.set_num_threads(4)
t = torch.ones(1 << 13, 1 << 12)
fill(torch.ones(256, 256))  # probes
before = peak()
if len(sys.argv) > 2:
    wasted = torch.ones(int(sys.argv[2]), dtype=torch.uint8)
fill(t)
print(peak() - before)
"""


def growth(*arguments: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("law", ["uniform_", "normal_", "trunc_normal_", "sparse_"])
def test_extra_memory(law: str) -> None:
    assert growth(law) < LIMIT


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_that_waste_would_be_seen() -> None:
    assert growth("uniform_", str(16 << 20)) > LIMIT


BLOCK = """
import contextlib, sys
import torch, fastinit
from torch import nn

def peak():
    with open("/proc/self/status") as lines:
        return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))

def build():
    layers = [nn.Linear(1500, 1500) for _ in range(20)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
    if sys.argv[2] == "drops":  # heads that are replaced
        layers[10:] = [nn.Linear(1500, 2) for _ in range(10)]
    return nn.Sequential(*layers)

torch.set_num_threads(4)
fused = sys.argv[1] == "fused"
with fastinit.fused() if fused else contextlib.nullcontext():
    nn.init.normal_(nn.Linear(200, 200).weight)  # probes
before = peak()
with fastinit.fused() if fused else contextlib.nullcontext():
    model = build()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("what", ["keeps", "drops"])
def test_a_block_needs_no_more_than_eager(what: str) -> None:
    """Less where storages are dropped: their memory is never touched."""
    peaks = {}
    for way in ("eager", "fused"):
        run = [sys.executable, "-c", BLOCK, way, what]
        peaks[way] = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    extra = 16 * 1024 if what == "keeps" else -10 * 1500 * 1500 * 4 // 1024 // 2
    assert peaks["fused"] < peaks["eager"] + extra
