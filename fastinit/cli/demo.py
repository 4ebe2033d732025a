# SPDX-License-Identifier: BSD-3-Clause
"""`fastinit demo`: initialises two models both ways, builds one both ways, compares every bit."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

import fastinit
from fastinit.cli import info


def demo() -> int:
    """Build two models, initialise each with torch and with fastinit, compare every bit."""

    print(info.header())
    everything_equal = True
    for title, model, fn in (_cnn(), _gpt2()):
        n = sum(p.numel() for p in model.parameters())
        print(f"\n{title}: {n:,} parameters in {len(list(model.parameters()))} tensors")
        runs: dict[str, Callable[[], object]] = {
            "torch": functools.partial(model.apply, fn),
            "fastinit": functools.partial(fastinit.init_model_, model, fn),
        }
        seconds: dict[str, float] = {}
        results = {}
        for name, run in runs.items():
            run()  # memory touched, probes done
            times = []
            for _ in range(3):
                torch.manual_seed(0)
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            seconds[name] = sorted(times)[1]
            results[name] = {k: p.detach().clone() for k, p in model.named_parameters()}
        rows = [
            (
                k,
                tuple(p.shape),
                torch.equal(p.view(torch.int32), results["fastinit"][k].view(torch.int32)),
            )
            for k, p in results["torch"].items()
        ]
        for k, shape, equal in rows if len(rows) <= 16 else rows[:8]:
            print(f"  {k:<28} {shape!s:<18} {'bits equal' if equal else 'BITS DIFFER'}")
        if len(rows) > 16:
            print(f"  ... and {sum(e for _, _, e in rows[8:])} of {len(rows) - 8} more: bits equal")
        everything_equal &= all(e for _, _, e in rows)
        theirs, ours = seconds["torch"], seconds["fastinit"]
        print(
            f"  torch {theirs * 1e3:.2f} ms, fastinit {ours * 1e3:.2f} ms: "
            f"{theirs / ours:.1f} times as fast"
        )
    everything_equal &= _built_both_ways()
    print("\nAll bits equal." if everything_equal else "\nSOME BITS DIFFER.")
    return 0 if everything_equal else 1


def _built_both_ways() -> bool:
    """Return whether GPT-2 of transformers (or nn.Transformer), built both ways, has equal bits."""

    make: Callable[[], nn.Module]
    try:
        from transformers import GPT2Config, GPT2LMHeadModel

        title = "GPT-2 small of transformers"
        make = functools.partial(GPT2LMHeadModel, GPT2Config())
    except ImportError:
        title, make = "nn.Transformer (transformers is not installed)", nn.Transformer
    print(f"\n{title}, constructed as it is and in `with fastinit.fused():`")

    def build(fast: bool) -> tuple[float, nn.Module, object]:
        torch.manual_seed(0)
        start = time.perf_counter()
        if fast:
            with fastinit.fused() as report:
                model = make()
        else:
            model, report = make(), None
        return time.perf_counter() - start, model, report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(3):
            for fast in times:
                times[fast].append(build(fast)[0])
        theirs, ours = build(False)[1].state_dict(), build(True)
    equal = theirs.keys() == ours[1].state_dict().keys() and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(theirs.values(), ours[1].state_dict().values())
    )
    print("\n".join(f"  {line}" for line in str(ours[2]).splitlines()))
    eager, fused = sorted(times[False])[1], sorted(times[True])[1]
    print(
        f"  {len(theirs)} tensors: {'bits equal' if equal else 'BITS DIFFER'}\n"
        f"  as it is {eager * 1e3:.0f} ms, fused {fused * 1e3:.0f} ms: "
        f"{eager / fused:.1f} times as fast"
    )
    return equal


def _cnn() -> tuple[str, nn.Module, Callable[[nn.Module], None]]:
    """The four layers of pytorch/examples mnist."""

    model = nn.Sequential()
    model.conv1, model.conv2 = nn.Conv2d(1, 20, 5, 1), nn.Conv2d(20, 50, 5, 1)
    model.fc1, model.fc2 = nn.Linear(4 * 4 * 50, 500), nn.Linear(500, 10)

    def init_weights(m: nn.Module) -> None:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)  # type: ignore[arg-type]

    return "Four-layer CNN, kaiming_uniform_", model, init_weights


def _gpt2() -> tuple[str, nn.Module, Callable[[nn.Module], None]]:
    """The shapes of GPT-2 small (Radford et al. 2019), N(0, 0.02) as published."""

    width = 768
    model = nn.Module()
    model.wte, model.wpe = nn.Embedding(50257, width), nn.Embedding(1024, width)
    blocks = []
    for _ in range(12):
        block = nn.Module()
        block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        block.attn, block.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        block.fc, block.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        blocks.append(block)
    model.h = nn.ModuleList(blocks)
    model.ln_f = nn.LayerNorm(width)

    def init_weights(m: nn.Module) -> None:
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, 0.0, 0.02)
        if isinstance(m, nn.LayerNorm):
            nn.init.ones_(m.weight)
        if isinstance(m, (nn.Linear, nn.LayerNorm)):
            nn.init.zeros_(m.bias)

    return "GPT-2 small, normal_(0, 0.02)", model, init_weights
