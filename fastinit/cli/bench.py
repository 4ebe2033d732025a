# SPDX-License-Identifier: BSD-3-Clause
"""Cases and contenders of the benchmark; `python -m fastinit bench` and benchmarks/ run them.

Every contender's result is compared with torch's, bits and generator, before anything is timed.
Contenders take turns, so that a slow spell of the machine hits all of them; medians are compared.
In its turn a contender runs twice and the second run counts, so that none pays for the dirty caches
that another left behind.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastinit
from fastinit import _cpu, execute, probe
from fastinit.core import build

LARGE = 1 << 24  # elements
GOALS = {  # times as fast as torch
    "uniform_ float32": 15.0,
    "normal_ float32": 9.0,
    "normal_ bfloat16": 12.0,
    "normal_ float64": 1.9,
    "kaiming_uniform_ float32": 15.0,
    "kaiming_normal_ float32": 9.0,
    "xavier_uniform_ float32": 15.0,
    "xavier_normal_ float32": 9.0,
    "trunc_normal_ float32": 40.0,
    "sparse_ 1024 x 1024, 0.9": 20.0,
    "normal_ on fresh memory, 2^26": 5.0,
    "ResNet-50, kaiming_normal_": 8.0,
}


@dataclass
class Case:
    """One task. `fill(f)` does it with the functions of `f`, torch.nn.init or fastinit."""

    name: str
    tensors: list[Tensor]
    fill: Callable[..., object]
    planned: Callable[[], object] | None = None
    calls: int = 1  # per timing
    rounds: int = 9
    rounding: float = 0.0  # how far values may be from torch's
    compared: bool = True  # with torch's values at all

    @property
    def contenders(self) -> dict[str, Callable[[], object]]:
        every: dict[str, Callable[[], object]] = {
            "torch": lambda: self.fill(torch.nn.init),
            "one by one": lambda: self.fill(fastinit),
        }
        if self.planned is not None:
            every["plan"] = self.planned
        if self.tensors:
            every["memory"] = self._ceiling()
        return every

    def _ceiling(self) -> Callable[[], object]:
        """Writing the same bytes with nothing to compute: what the memory allows."""
        # Not zeros: some processors write those several times faster than anything else.
        fills = [build.constant(t, 0.7) for t in self.tensors]
        ready = [f for f in map(probe.proved, fills) if f is not None]
        return lambda: execute.run(ready)

    def check(self) -> None:
        """Raise unless all contenders leave torch's bits and torch's generator state.

        Values may be `rounding` away from torch's where a case says so.
        """
        if not self.compared:
            return
        results = {}
        for name, run in self.contenders.items():
            if name == "memory":
                continue
            torch.manual_seed(1)
            for t in self.tensors:
                t.detach().fill_(-77.0)
            run()
            copies = [t.detach().clone() for t in self.tensors]
            results[name] = (copies, torch.get_rng_state())
        want, state = results["torch"]
        for name, (got, after) in results.items():
            near = all(torch.allclose(x, y, 0.0, self.rounding) for x, y in zip(want, got))
            same = near if self.rounding else all(map(torch.equal, want, got))
            if not torch.equal(state, after) or not same:
                raise AssertionError(f"{self.name}: {name} differs from torch")


def cases() -> list[Case]:
    """All of them; memory is allocated and touched."""
    return [
        *(_large(law, dtype) for law, dtype in _LARGE_LAWS),
        _sparse(),
        _fresh(),
        _small(),
        _resnet(),
    ]


_LARGE_LAWS = [
    ("uniform_", torch.float32),
    ("normal_", torch.float32),
    ("normal_", torch.bfloat16),
    ("normal_", torch.float64),
    ("kaiming_uniform_", torch.float32),
    ("kaiming_normal_", torch.float32),
    ("xavier_uniform_", torch.float32),
    ("xavier_normal_", torch.float32),
    ("trunc_normal_", torch.float32),
    ("zeros_", torch.float32),
    ("constant_", torch.float32),
]


def _large(law: str, dtype: torch.dtype) -> Case:
    t = torch.zeros(4096, LARGE // 4096, dtype=dtype)
    t.fill_(1)
    arguments = (0.5,) if law == "constant_" else ()

    def fill(f: object) -> None:
        getattr(f, law)(t, *arguments)

    p = fastinit.Plan()
    getattr(p, law)(t, *arguments)
    name = f"{law} {str(dtype)[6:]}"
    return Case(name, [t], fill, p.run, rounds=3 if law == "trunc_normal_" else 9)


def _sparse() -> Case:
    t = torch.ones(1024, 1024)
    p = fastinit.Plan()
    p.sparse_(t, 0.9)
    return Case("sparse_ 1024 x 1024, 0.9", [t], lambda f: f.sparse_(t, 0.9), p.run)


def _fresh() -> Case:
    def fill(f: object) -> None:
        f.normal_(torch.empty(1 << 26))  # type: ignore[attr-defined]

    return Case("normal_ on fresh memory, 2^26", [], fill, rounds=5)


def _small() -> Case:
    t = torch.ones(8, 8)

    def fill(f: object) -> None:
        for _ in range(1000):
            f.kaiming_uniform_(t)  # type: ignore[attr-defined]

    return Case("kaiming_uniform_ 64 elements", [], fill, calls=1000)


def resnet50_like() -> nn.Module:
    """The 161 parameters of ResNet-50 (He et al. 2015) in its order; no forward pass."""
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


def _resnet() -> Case:
    model = resnet50_like()

    def rule(f: object) -> Callable[[nn.Module], None]:
        def init_weights(m: nn.Module) -> None:
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                f.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[attr-defined]
            elif isinstance(m, nn.BatchNorm2d):
                f.ones_(m.weight)  # type: ignore[attr-defined]
            if getattr(m, "bias", None) is not None:
                f.zeros_(m.bias)  # type: ignore[attr-defined]

        return init_weights

    return Case(
        "ResNet-50, kaiming_normal_",
        list(model.parameters()),
        lambda f: model.apply(rule(f)),
        lambda: fastinit.init_model_(model, rule(torch.nn.init)),
    )


def measure(case: Case) -> dict[str, float]:
    """Seconds per call of each contender, medians; checks first."""
    case.check()
    contenders = case.contenders
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(case.rounds):
        for name, run in contenders.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / case.calls)
    return {name: statistics.median(t) for name, t in times.items()}


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def header() -> str:
    return (
        f"{cpu_model()}, {torch.get_num_threads()} threads, target {_cpu.target()}, torch "
        f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), fastinit "
        f"{fastinit.__version__}, {_cpu.COMPILER}"
    )


def table(selected: str = "") -> list[str]:
    """Markdown lines; the ratio is torch's time to the faster of one by one and plan."""
    lines = [
        "| case | torch | one by one | plan | memory | ratio | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    from fastinit.cli import bench_keyed, bench_orthogonal

    goals = GOALS | bench_orthogonal.GOALS | bench_keyed.GOALS
    for case in (*cases(), *bench_orthogonal.cases(), *bench_keyed.cases()):
        if selected not in case.name:
            continue
        t = measure(case)
        best = min(t[name] for name in ("one by one", "plan") if name in t)
        cells = [_time(t[name]) if name in t else "" for name in list(t)[:1]]
        cells += [_time(t[n]) if n in t else "" for n in ("one by one", "plan", "memory")]
        goal = f"{goals[case.name]:g}" if case.name in goals else ""
        lines.append(f"| {case.name} | {' | '.join(cells)} | {t['torch'] / best:.1f} | {goal} |")
    return lines


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.2f} us"


def main(selected: str = "") -> int:
    """Print the table of the cases whose name contains `selected`."""
    print(header() + "\n")
    for line in table(selected):
        print(line, flush=True)
    return 0
