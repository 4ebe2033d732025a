# SPDX-License-Identifier: BSD-3-Clause
"""What single calls cost: eagerly, in a dispatch mode that does nothing, in `fastinit.fused()`.

    python benchmarks/overhead.py [NAME ...] [--json FILE]

NAME selects the calls whose name contains it.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from harness import header, is_wanted, parser, write
from torch import Tensor, nn
from torch.nn import init
from torch.utils._python_dispatch import TorchDispatchMode

import fastinit
from fastinit.cli.bench import measure
from fastinit.core.table import markdown


class NoOp(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does nothing: what any dispatch mode costs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as fastinit's: True imports torch._dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


Way = Callable[[], AbstractContextManager[Any]]
Call = Callable[[], object]
CONTEXTS: dict[str, Way] = {"eager": nullcontext, "no-op mode": NoOp, "fused": fastinit.fused}
OLD = torch.ones(16)  # has nothing pending


def on_new(call: Callable[[Tensor], object], *shape: int) -> Callable[[], Call]:
    """Return what prepares the call on a tensor born in the block."""

    def prepare() -> Call:
        x = torch.empty(shape)
        return lambda: call(x)

    return prepare


# Each is called in the block and returns what is timed.
CALLS: dict[str, Callable[[], Call]] = {
    "x.fill_(1.), 16 elements": on_new(lambda x: x.fill_(1.0), 16),
    "x.uniform_(), 256 elements": on_new(lambda x: x.uniform_(), 256),
    "x.normal_(), 16384 elements, recorded": on_new(lambda x: x.normal_(), 16384),
    "nn.init.zeros_, 256 elements": on_new(init.zeros_, 256),
    "nn.init.kaiming_uniform_, 32 x 32": on_new(init.kaiming_uniform_, 32, 32),
    "x.t(), 32 x 32": on_new(lambda x: x.t(), 32, 32),
    "x + 1, nothing pending": lambda: lambda: OLD + 1,
    "torch.empty(16)": lambda: lambda: torch.empty(16),
    "nn.Linear(32, 32)": lambda: lambda: nn.Linear(32, 32),
    "nn.LayerNorm(256)": lambda: lambda: nn.LayerNorm(256),
}


def microseconds(context: Way, prepare: Callable[[], Call]) -> float:
    """Return how long a call takes; entering and leaving the block are not counted."""
    with context(), torch.no_grad():
        timer = timeit.Timer(prepare())
        number = max(20, int(0.01 / timer.timeit(20) * 20))
        return timer.timeit(number) / number * 1e6


def main() -> None:
    options = parser("Time single calls.").parse_args()
    described, found = header(), {}
    print(f"{described}\n")
    print(markdown(["call, us", *CONTEXTS]), markdown(["---"] * 4), sep="\n")
    for name, prepare in CALLS.items():
        if is_wanted(name, options.names):
            ways = {way: partial(microseconds, c, prepare) for way, c in CONTEXTS.items()}
            found[name] = measure(ways, lambda run: run())
            print(markdown([name, *(f"{us:.2f}" for us in found[name].values())]), flush=True)
    write(options.json, {"header": described, "calls": found})


if __name__ == "__main__":
    main()
