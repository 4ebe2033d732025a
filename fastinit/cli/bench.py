# SPDX-License-Identifier: BSD-3-Clause
"""`fastinit bench`: how many times as fast as torch this machine fills; the clocks of benchmarks/.

Bits and generators are compared with torch's before anything is timed. Ways take turns, so that a
slow spell of the machine hits all of them, and medians are compared. In its turn a way runs twice
and the second run counts, so that none pays for the dirty caches that another left behind.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

import fastinit
from fastinit.cli import info
from fastinit.core.table import markdown

Ways = Mapping[str, Callable[[], object]]
Clock = Callable[[Callable[[], object]], float]


def wall(run: Callable[[], object]) -> float:
    """Return the seconds until the call returns."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def until_done(run: Callable[[], object]) -> float:
    """Return the seconds until the GPU is done with what the call launches."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def on_gpu(run: Callable[[], object]) -> float:
    """Return the seconds between two events on the stream, host work left out."""
    begin, end = (torch.cuda.Event(True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def measure(ways: Ways, clock: Clock = wall, rounds: int = 9) -> dict[str, float]:
    """Return the median of each way's seconds; the order of the turns changes every round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            ways[name]()
            times[name].append(clock(ways[name]))
    return {name: statistics.median(t) for name, t in times.items()}


@torch.no_grad()
def compare(
    ways: Ways, tensors: Sequence[Tensor], rounding: float = 0.0, random: ModuleType = torch
) -> None:
    """Raise AssertionError unless all ways leave the first one's values and generator state.

    Values may be `rounding` away; `random` is the generator's module, torch or torch.cuda.
    """
    expected: list[Tensor] = []
    for way, run in ways.items():
        random.manual_seed(1)
        for t in tensors:
            t.fill_(-77.0)
        run()
        found = [random.get_rng_state(), *(t.clone() for t in tensors)]
        expected = expected or found
        near = all(torch.allclose(x, y, 0.0, rounding) for x, y in zip(expected, found))
        if not (near if rounding else all(map(torch.equal, expected, found))):
            raise AssertionError(f"{way} differs from {next(iter(ways))}")


def seconds(t: float) -> str:
    """Return a time with its unit."""
    return f"{t * 1e3:.2f} ms" if t >= 1e-3 else f"{t * 1e6:.2f} us"


def _call(name: str, t: Tensor, *arguments: float) -> Callable[[ModuleType], object]:
    """Return what calls a function of a module."""
    return lambda f: getattr(f, name)(t, *arguments)


def _cases(
    device: str, where: str
) -> Iterator[tuple[str, list[Tensor], Callable[[ModuleType], object]]]:
    """Yield the name, the tensors, and what fills them with the functions of a module.

    Args:
        device: that is measured
        where: that, or "meta" if only names are wanted
    """
    n = 1 << (28 if device == "cuda" else 24)
    for law, dtype in [
        *(("uniform_", torch.float32), ("normal_", torch.float32), ("normal_", torch.bfloat16)),
        *(("kaiming_normal_", torch.float32), ("trunc_normal_", torch.float32)),
        *(("zeros_", torch.float32), ("normal_", torch.float64)),
    ]:
        t = torch.ones(4096, n // 4096, dtype=dtype, device=where)
        yield f"{law} {str(dtype)[6:]}, {n:,}", [t], _call(law, t)
    t = torch.ones(1024, 1024, device=where)
    yield "sparse_ 1024 x 1024, 0.9", [t], _call("sparse_", t, 0.9)
    yield "orthogonal_ 1024 x 1024", [t], _call("orthogonal_", t)
    model = nn.Transformer(batch_first=True, device=where)

    def reset(f: ModuleType) -> object:
        def rule(m: nn.Module) -> None:
            for p in m.parameters(recurse=False):
                (f.xavier_uniform_ if p.dim() > 1 else f.zeros_)(p)

        return model.apply(rule) if f is nn.init else fastinit.init_model_(model, rule)

    yield "nn.Transformer, init_model_", list(model.parameters()), reset


def main(selected: str = "", device: str = "cpu") -> int:
    """Print the table of the cases whose name contains `selected`; return the exit status."""
    clock, random = (until_done, torch.cuda) if device == "cuda" else (wall, torch)
    names = [name for name, *_ in _cases(device, "meta")]
    if not any(selected in name for name in names):
        shown = "\n  ".join(names)
        print(
            f"fastinit bench: no case contains {selected!r}. There are\n  {shown}", file=sys.stderr
        )
        return 2
    print(info.header() + "\n")
    print(markdown(["case", "torch", "fastinit", "times as fast"]), markdown(["---"] * 4), sep="\n")
    for name, tensors, fill in _cases(device, device):
        if selected in name:
            ways = {"torch": partial(fill, nn.init), "fastinit": partial(fill, fastinit)}
            compare(ways, tensors, 1e-2 if "orthogonal" in name else 0.0, random)
            t = measure(ways, clock, 5)
            ratio = f"{t['torch'] / t['fastinit']:.1f}"
            print(markdown([name, *map(seconds, t.values()), ratio]), flush=True)
    return 0
