# SPDX-License-Identifier: BSD-3-Clause
"""python -m fastinit demo | info | verify | bench | inspect"""

from __future__ import annotations

import argparse
import functools
import platform
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def demo() -> int:
    """Build two models, initialise each with torch and with fastinit, compare every bit."""
    import torch

    import fastinit
    from fastinit import bench

    print(bench.header())
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
    """A model of transformers, if it is installed, from its configuration; else one of torch."""
    import torch
    from torch import nn

    import fastinit

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
    from torch import nn

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
    from torch import nn

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
        from fastinit import _cpu, bench
    except ImportError as error:
        print(f"fastinit  does not load: {error}")
        return 1
    print(f"fastinit  {fastinit.__version__}, built with {_cpu.COMPILER}")
    print(f"processor {bench.cpu_model()}")
    targets = [
        f"{name}{'' if runs else ' (not on this processor)'}" for name, runs in _cpu.targets()
    ]
    print(f"targets   {', '.join(targets)}; in use: {_cpu.target()}")
    for line in _about_cuda():
        print(f"CUDA      {line}")
    return 0


def _about_cuda() -> list[str]:
    """What serves GPUs here, or why torch does."""
    import torch

    from fastinit import backend

    module = backend._cuda
    if module is None:
        return [f"no kernels ({backend.why_no_cuda}); torch fills tensors on GPUs"]
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


def run_bench(selected: str, device: str = "cpu", json: str | None = None) -> int:
    """The table of the README."""
    from fastinit import bench

    if device != "cpu":
        from fastinit import bench_cuda

        return bench_cuda.main(selected, json)
    print(bench.header() + "\n")
    for line in bench.table(selected):
        print(line, flush=True)
    return 0


def inspect(target: str, seed: int | None, plot: str | None, meta: bool) -> int:
    """Build a model and compare every tensor's mean and deviation with the rule that filled it."""
    from fastinit import inspect_model

    return inspect_model.main(target, seed, plot, meta)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastinit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help=demo.__doc__)
    commands.add_parser("info", help=info.__doc__)
    checking = commands.add_parser("verify", help=verify.__doc__)
    timing = commands.add_parser("bench", help=run_bench.__doc__)
    for command in (checking, timing):
        command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    timing.add_argument("--json", help="also write the figures to this file (with --device cuda)")
    timing.add_argument("cases", nargs="?", default="", help="only cases whose name contains this")
    looking = commands.add_parser("inspect", help=inspect.__doc__)
    looking.add_argument("target", help="module:factory, what builds the model without arguments")
    looking.add_argument("--seed", type=int, help="of the keyed stream (default: torch's numbers)")
    looking.add_argument("--plot", metavar="PNG", help="draw the distributions to this file")
    looking.add_argument("--meta", action="store_true", help="build it by way of the meta device")
    arguments = parser.parse_args()
    if getattr(arguments, "device", "cpu") == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("\n".join(["There is no GPU that torch can use.", *_about_cuda()]))
            return 1
    if arguments.command == "bench":
        return run_bench(arguments.cases, arguments.device, arguments.json)
    if arguments.command == "verify":
        return verify(arguments.device)
    if arguments.command == "inspect":
        return inspect(arguments.target, arguments.seed, arguments.plot, arguments.meta)
    return {"demo": demo, "info": info}[arguments.command]()


if __name__ == "__main__":
    sys.exit(main())
