# SPDX-License-Identifier: BSD-3-Clause
"""The proof before use: cheap, decisive, and torch does what is not proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastinit
from fastinit import execute, probe
from fastinit.core import build, geometry, kernels

TIMING = """
    import time, torch, fastinit
    t = torch.empty(1 << 16)

    def seconds(fill):
        start = time.perf_counter()
        fill(t)
        return time.perf_counter() - start

    for fill in (fastinit.trunc_normal_, fastinit.normal_, fastinit.uniform_):
        print(seconds(fill) - seconds(fill))
"""


@pytest.mark.slow
def test_a_proof_takes_less_than_20_ms(python: Callable[..., Any]) -> None:
    """The first includes that of the normals it rests on."""
    for _ in range(3):  # the machine may be busy
        done = python(TIMING)
        assert done.returncode == 0, done.stderr[-2000:]
        slowest = max(map(float, done.stdout.split()))
        if slowest < 0.02:
            return
    pytest.fail(f"{slowest} s")


@pytest.mark.parametrize("op", ["uniform", "normal"])
def test_what_is_not_proved_is_left_to_torch(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probe._verdicts, (op, torch.float32, "contiguous"), None)
    before = kernels.native_fills
    t = getattr(fastinit, f"{op}_")(torch.empty(10_000), generator=torch.Generator().manual_seed(1))
    assert kernels.native_fills == before
    g = torch.Generator().manual_seed(1)
    assert torch.equal(t, getattr(torch.nn.init, f"{op}_")(torch.empty(10_000), generator=g))


def test_a_kernel_with_other_bits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value in a thousand, by one in the last place; and a generator that ends elsewhere."""
    kind = ("uniform", torch.float32, "contiguous")
    assert probe._probe(*kind) is not None
    run = kernels.run

    def one_bit_off(packed: bytes, states: list[int], words: list[int]) -> None:
        run(packed, states, words)
        written[0].view(torch.int32)[500] ^= 1

    written: list[torch.Tensor] = []
    make = probe._tensor
    monkeypatch.setattr(probe, "_tensor", lambda *a: written.insert(0, make(*a)) or written[0])
    monkeypatch.setattr(kernels, "run", one_bit_off)
    assert probe._probe(*kind) is None

    def one_word_more(packed: bytes, states: list[int], words: list[int]) -> None:
        run(packed, states, [n + 1 for n in words])

    monkeypatch.setattr(kernels, "run", one_word_more)
    assert probe._probe(*kind) is None


def test_16_bit_types_follow_the_wider_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own thousand elements would not tell a flavour from another."""
    monkeypatch.setitem(probe._verdicts, ("normal", torch.float32, "contiguous"), 1)
    assert probe._candidates("normal", torch.bfloat16, "contiguous") == (1,)
    monkeypatch.setitem(probe._verdicts, ("normal", torch.float32, "contiguous"), None)
    assert probe._candidates("normal", torch.float16, "contiguous") == ()


def test_far_bounds_rest_on_the_rejection_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.12 truncates by another formula, also where no draw could be rejected."""
    monkeypatch.setattr(geometry, "MIN_NATIVE", 0)
    monkeypatch.setitem(probe._verdicts, ("trunc_normal", torch.float32, "contiguous"), None)
    before = kernels.native_fills
    fastinit.trunc_normal_(torch.empty(64, 128).t(), std=0.02)
    assert kernels.native_fills == before


@pytest.mark.parametrize("layout", ["contiguous", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_of_torch_2_11(dtype: torch.dtype, layout: str) -> None:
    """What rounds up to `to` stayed; the proof tells the two kinds of torch apart."""
    to = 1.0 + 2 * torch.finfo(dtype).eps
    made = []
    for flavour in (3, 7):
        t = torch.empty(40_000, dtype=dtype)
        fill = build.uniform(
            t if layout == "contiguous" else t.view(200, 200)[:, ::2],
            *(1.0, to, torch.Generator().manual_seed(5)),
        )
        assert fill is not None
        fill.flavour = flavour
        execute.run([fill])
        made.append(fill.tensor)
    now, before = made
    assert 0.1 < (before == to).double().mean() < 0.4
    assert torch.equal(torch.where(before == to, 1.0, before.double()), now.double())
    assert probe.verdict("uniform", dtype, "contiguous") in (3, 7)
    theirs = torch.empty(40_000, dtype=dtype).uniform_(1.0, to)
    replaces = not bool((theirs == to).any())
    assert (probe.verdict("uniform", dtype, "contiguous") == 3) == replaces
