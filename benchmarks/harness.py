# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmarks share: cases, goals, the choice of cases, tables.

`python benchmarks/cpu.py [NAME ...]` (keyed, orthogonal, construction, gpu likewise) measures the
cases whose name contains a NAME; fastinit/cli/bench.py says how.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

import fastinit
from fastinit.cli import info
from fastinit.cli.bench import Clock, Ways, compare, measure, seconds, wall
from fastinit.core.table import markdown


@dataclass
class Case:
    """Ways to do one task, torch's first."""

    ways: Ways
    tensors: Sequence[Tensor] = ()  # what the ways fill
    goal: str | float = ""  # times as fast as torch, if nothing else is said
    check: Callable[[], object] | None = None  # raises if results are wrong; default: see compare
    rounds: int = 9
    calls: int = 1  # runs per timing
    clock: Clock = wall
    memory: bool = True  # whether to time writing as much with nothing to compute
    notes: dict[str, str] = field(default_factory=dict)  # cells that are not measured

    def __post_init__(self) -> None:
        self.check = self.check or partial(compare, self.ways, self.tensors)

    def measure(self) -> dict[str, float]:
        """Check, then return each way's seconds."""
        self.check()
        ways = dict(self.ways)
        if self.memory and self.tensors:
            ways["memory"] = constants(self.tensors)
        if self.calls > 1:
            ways = {name: partial(repeat, run, self.calls) for name, run in ways.items()}
        found = measure(ways, self.clock, self.rounds)
        return {name: t / self.calls for name, t in found.items()}


Cases = dict[str, Callable[[], Case]]


def repeat(run: Callable[[], object], calls: int) -> list[object]:
    return [run() for _ in range(calls)]


def unchecked() -> None:
    """The numbers are others than torch's; the tests compare them with a model."""


def both(fill: Callable[..., object]) -> dict[str, Callable[[], object]]:
    """Return the ways of `fill(f)`, which uses the functions of a module, nn.init or fastinit."""
    return {"torch": lambda: fill(nn.init), "one by one": lambda: fill(fastinit)}


def constants(tensors: Sequence[Tensor]) -> Callable[[], object]:
    # Not zeros: some processors write those several times faster than anything else.
    plan = fastinit.Plan()
    for t in tensors:
        plan.constant_(t, 0.7)
    return plan.run


def of_network(f: object) -> Callable[[nn.Module], None]:
    """Return torchvision's rule for ResNets, by the functions of `f`."""

    def init_weights(m: nn.Module) -> None:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            f.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d):
            f.ones_(m.weight)
        if getattr(m, "bias", None) is not None:
            f.zeros_(m.bias)

    return init_weights


def resnet50() -> nn.Module:
    """Return the 161 parameters of ResNet-50 (He et al. 2015) in its order; no forward pass."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for i, o, k in ((channels, width, 1), (width, width, 3), (width, 4 * width, 1)):
                layers += [nn.Conv2d(i, o, k, bias=False), nn.BatchNorm2d(o)]
            if block == 0:
                layers += [nn.Conv2d(channels, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)]
            channels = 4 * width
    return nn.Sequential(*layers, nn.Linear(2048, 1000))


def transformer(width: int, inputs: Sequence[int] = (), layers: int = 12) -> list[nn.Module]:
    """Return the modules of a ViT's, BERT's or GPT's layers; `inputs`: widths of their first."""
    made: list[nn.Module] = []
    for _ in range(layers):
        first = [nn.Linear(width, n) for n in inputs or [3 * width]]
        made += [nn.LayerNorm(width), *first, nn.Linear(width, width), nn.LayerNorm(width)]
        made += [nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]
    return made


def parser(about: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=about)
    made.add_argument("names", nargs="*", help="parts of the names of cases; default: all")
    made.add_argument("--json", metavar="FILE", help="write the figures there too")
    return made


def is_wanted(name: str, names: Sequence[str]) -> bool:
    return not names or any(part.lower() in name.lower() for part in names)


def write(path: str | None, figures: dict[str, object]) -> None:
    if path is not None:
        with open(path, "w") as file:
            json.dump(figures, file, indent=1)
            file.write("\n")


def header(*more: str) -> str:
    return ", ".join([info.header(), *more, f"load {os.getloadavg()[0]:.1f}"])


def table(
    cases: Cases,
    names: Sequence[str],
    columns: Sequence[str] = ("torch", "one by one", "plan", "memory"),
    what: str = "case",
) -> list[dict[str, object]]:
    """Print a line of Markdown for each case that is wanted; return their figures.

    The ratio is the first way's time to that of the fastest other way, "memory" left out.
    """
    heads = [what, *columns, "ratio", "goal"]
    print(markdown(heads), markdown(["---"] * len(heads)), sep="\n")
    rows: list[dict[str, object]] = []
    for name, make in cases.items():
        if not is_wanted(name, names):
            continue
        try:
            case = make()
            found = case.measure()
        except ImportError as error:
            print(markdown([name, f"skipped: {error}", *[""] * len(columns), ""]))
            continue
        first, *others = (t for way, t in found.items() if way != "memory")
        cells = {way: seconds(t) for way, t in found.items()} | case.notes
        shown = [cells.get(c, "") for c in columns]
        print(markdown([name, *shown, f"{first / min(others):.3g}", f"{case.goal}"]), flush=True)
        rows.append({"name": name, "goal": case.goal, "seconds": found, **case.notes})
    return rows


def main(cases: Cases, about: str) -> None:
    arguments = parser(about)
    options = arguments.parse_args()
    if not any(is_wanted(name, options.names) for name in cases):
        arguments.error(f"no case contains {' or '.join(options.names)}: {', '.join(cases)}")
    described = header()
    print(described + "\n")
    write(options.json, {"header": described, "rows": table(cases, options.names)})
