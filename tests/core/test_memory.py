# SPDX-License-Identifier: BSD-3-Clause
"""What a fill needs besides its tensor: less than 8 MiB, whatever the law."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

LIMIT = 8 * 1024  # KiB

# Each measurement has a process of its own, forked from one that has imported torch.
FORKED = """
    import contextlib, os
    import torch, fastinit
    from torch import nn

    def peak():
        with open("/proc/self/status") as lines:
            return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))

    def measure(prepare, work):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(4)
            given = prepare()
            before = peak()
            kept = work(given)
            print(peak() - before, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""

LAWS = """
    def fill(t, law):
        (fastinit.sparse_(t, 0.9) if law == "sparse_" else getattr(fastinit, law)(t))

    for law in ("uniform_", "normal_", "trunc_normal_", "sparse_"):
        def prepare():
            fill(torch.ones(256, 256), law)  # probes
            return torch.ones(1 << 13, 1 << 11)

        measure(prepare, lambda t: fill(t, law))

    def waste(t):
        wasted = torch.ones(16 << 20, dtype=torch.uint8)
        return wasted, fastinit.uniform_(t)

    measure(prepare, waste)
"""

SCOPE = """
    def build(drops):
        layers = [nn.Linear(1500, 1500) for _ in range(20)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.02)
        if drops:  # heads that are replaced
            layers[10:] = [nn.Linear(1500, 2) for _ in range(10)]
        return nn.Sequential(*layers)

    for drops in (False, True):
        for scope in (contextlib.nullcontext, fastinit.fused):
            def prepare():
                with scope():
                    nn.init.normal_(nn.Linear(200, 200).weight)  # probes

            def work(_):
                with scope():
                    model = build(drops)
                return model

            measure(prepare, work)
"""


def measured(what: str, python: Callable[..., Any]) -> list[int]:
    done = python(FORKED + what)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
def test_extra_memory(python: Callable[..., Any]) -> None:
    *laws, wasted = measured(LAWS, python)
    assert len(laws) == 4
    assert max(laws) < LIMIT, laws
    assert wasted > LIMIT, "waste would not be seen"


@pytest.mark.slow
def test_fused_needs_no_more_than_eager(python: Callable[..., Any]) -> None:
    """Where storages are dropped it needs less: their memory is never touched."""
    eager, fused, eager_drops, fused_drops = measured(SCOPE, python)
    assert fused < eager + 16 * 1024
    assert fused_drops < eager_drops - 10 * 1500 * 1500 * 4 // 1024 // 2
