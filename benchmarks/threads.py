# SPDX-License-Identifier: BSD-3-Clause
"""What a thread costs: instructions retired by all threads of a fill, by number of threads.

    python benchmarks/threads.py [NAME ...] [--threads N [N ...]] [--json FILE]

Counted with perf, or with valgrind where perf cannot (beside.py), in processes of their own, which
need not have as many cores. It is the first fill of a process: nothing is in a cache. What a
process retires that does all but the fill is subtracted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import models
import torch
from beside import build, instructions
from harness import header, is_wanted, parser, write

import fastinit
from fastinit.core.table import markdown

SIZE = 1 << 28


def fill(name: str) -> Callable[[], Callable[[], object]]:
    """Return what makes a tensor and returns what fills it."""

    def prepare() -> Callable[[], object]:
        t = torch.ones(SIZE)
        getattr(fastinit, name)(t[: 1 << 14])  # so that it has been proved
        return lambda: getattr(fastinit, name)(t)

    return prepare


def llama() -> Callable[[], object]:
    build(lambda: models.linears(1, 128), "fused")
    return lambda: build(models.llama_1b, "fused")


CASES = {"uniform_ 2^28": fill("uniform_"), "normal_ 2^28": fill("normal_"), "Llama-3.2-1B": llama}


def main() -> None:
    described = parser("Count instructions by number of threads.")
    described.add_argument("--threads", type=int, nargs="+", default=[1, 2, 8, 32, 64])
    described.add_argument("--alone", metavar="WAY", help=argparse.SUPPRESS)
    described.add_argument("--times", type=int, default=1, help=argparse.SUPPRESS)
    options = described.parse_args()
    if options.alone:
        torch.set_num_threads(int(options.alone))
        run = CASES[options.names[0]]()
        for _ in range(options.times):
            run()
        return
    title = header()
    print(f"{title}\n")
    heads = ["millions of instructions", *(f"{n} threads" for n in options.threads)]
    print(markdown(heads), markdown(["---"] * len(heads)), sep="\n")
    found: dict[str, dict[int, float]] = {}
    for name in CASES:
        if is_wanted(name, options.names):
            of_case = {n: instructions([__file__, name], f"{n}", 0, 1) for n in options.threads}
            first = of_case[options.threads[0]]
            cells = [f"{count:.0f} ({count / first - 1:+.1%})" for count in of_case.values()]
            print(markdown([name, *cells]), flush=True)
            found[name] = of_case
    write(options.json, {"header": title, "instructions": found})


if __name__ == "__main__":
    main()
