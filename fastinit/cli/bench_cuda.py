# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark on a GPU: `python -m fastinit bench --device cuda`.

Bits and generator offsets are compared with torch's before anything is timed. Ways take turns and
medians are compared. Large tensors are timed by events on the stream, models by the clock from the
first call until the GPU is done, host work included. "roof" is the time that writing as many bytes
with nothing to compute takes, by torch's fill_ or by fastinit's, whichever is faster.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

import fastinit
from fastinit import execute, probe
from fastinit.cli import bench
from fastinit.core import build, kernels
from fastinit.core import fill as fill_
from fastinit.cuda import qr as cuda_qr

_LARGE = 1 << 28  # elements
_DEVICE = "cuda"


@dataclass
class Row:
    case: str
    torch: float  # seconds
    fastinit: float
    roof: float | None = None
    goal: str = ""

    @property
    def ratio(self) -> float:
        return self.torch / self.fastinit

    def cells(self) -> list[str]:
        share = "" if self.roof is None else f"{100 * self.roof / self.fastinit:.0f} %"
        times = [_time(t) if t == t else "" for t in (self.torch, self.fastinit)]
        ratio = f"{self.ratio:.1f}" if self.torch == self.torch else ""
        return [self.case, *times, ratio, share, self.goal]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


# ---- clocks --------------------------------------------------------------------------------------

Ways = dict[str, Callable[[], object]]


def _by_events(ways: Ways, rounds: int = 15) -> dict[str, float]:
    """Seconds on the GPU."""
    event: Any = torch.cuda.Event
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            run()
            begin, end = (event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def _by_clock(ways: Ways, rounds: int = 15, wait: bool = True) -> dict[str, float]:
    """Seconds from the call until the GPU is done, or until the call returns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            run()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            if wait:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
            torch.cuda.synchronize()
    return {name: statistics.median(t) for name, t in times.items()}


def _check(name: str, tensors: Sequence[Tensor], ways: Ways) -> None:
    """Raise unless all ways leave torch's bits and torch's offset."""
    expected: list[Tensor] = []
    state: Tensor | None = None
    for way, run in ways.items():
        torch.cuda.manual_seed(1)
        with torch.no_grad():
            for t in tensors:
                t.fill_(-77.0)
        run()
        after = torch.cuda.get_rng_state()
        if state is None:
            expected, state = [t.detach().clone() for t in tensors], after
        elif not torch.equal(state, after) or not all(map(torch.equal, expected, tensors)):
            raise AssertionError(f"{name}: {way} differs from torch")


def _roof(tensors: Sequence[Tensor]) -> float:
    fills = [probe.proved(build.constant(t, 0.7)) for t in tensors]
    ours = [f for f in fills if f is not None]

    def theirs() -> None:
        for t in tensors:
            t.detach().fill_(0.7)

    return min(_by_events({"torch": theirs, "fastinit": lambda: execute.run(ours)}).values())


# ---- one tensor ----------------------------------------------------------------------------------

_LAWS = (
    ("uniform_", torch.float32, "95 % of the roof"),
    ("normal_", torch.float32, "78 % of the roof"),
    ("uniform_", torch.bfloat16, "60 % of the roof"),
    ("normal_", torch.bfloat16, "40 % of the roof"),
    ("normal_", torch.float16, ""),
    ("normal_", torch.float64, ""),
    ("trunc_normal_", torch.float32, "5 x torch"),
    ("trunc_normal_", torch.bfloat16, ""),
    ("constant_", torch.float32, ""),
)


def _large(law: str, dtype: torch.dtype, goal: str) -> Row:
    t = torch.empty(_LARGE, dtype=dtype, device=_DEVICE)
    arguments = (0.5,) if law == "constant_" else ()
    recorded = fastinit.Plan()
    getattr(recorded, law)(t, *arguments)
    ways: Ways = {
        "torch": lambda: getattr(torch.nn.init, law)(t, *arguments),
        "fastinit": recorded.run,
    }
    name = f"{law} {str(dtype)[6:]}, 2^28"
    _check(name, [t], ways)
    timed = _by_events(ways)
    return Row(name, timed["torch"], timed["fastinit"], _roof([t]), goal)


_KEYED = (
    ("keyed uniform_", torch.float32, ""),
    ("keyed normal_", torch.float32, "90 % of the roof"),
    ("keyed normal_", torch.bfloat16, "70 % of the roof"),
    ("keyed trunc_normal_", torch.float32, ""),
)


def _keyed(name: str, dtype: torch.dtype, goal: str) -> Row:
    """Beside torch's generator; the numbers are compared with the CPU's."""
    t = torch.empty(_LARGE, dtype=dtype, device=_DEVICE)
    law, key = name.removeprefix("keyed "), fastinit.Key(1, "bench")
    ways: Ways = {
        "torch": lambda: getattr(torch.nn.init, law)(t),
        "fastinit": lambda: getattr(fastinit, law)(t, generator=key),
    }
    timed = _by_events(ways)
    some = min(_LARGE, 1 << 20)
    expected = getattr(fastinit, law)(torch.empty(some, dtype=dtype, device="cpu"), generator=key)
    if not torch.equal(t[:some].cpu(), expected):
        raise AssertionError(f"{name} {dtype}: other numbers than on the CPU")
    case = f"{name} {str(dtype)[6:]}, 2^28"
    return Row(case, timed["torch"], timed["fastinit"], _roof([t]), goal)


# ---- matrices ------------------------------------------------------------------------------------

_MATRICES = (("orthogonal_", 32, 4096, "4 x", "10 x"), ("orthogonal_", 8192, 64, "100 x", ""))


def _orthogonal(law: str, count: int, n: int, goal: str, direct_goal: str) -> list[Row]:
    """One of torch's after the other; a batch; and the same law without factoring."""
    t = torch.empty(count, n, n, device=_DEVICE)
    normals = torch.empty(count, fill_.packed_items(n, n), device=_DEVICE)
    jobs = [cuda_qr.Job(normals[i], t[i], n, n, 1.0) for i in range(count)]

    def theirs() -> None:
        for matrix in t:
            torch.nn.init.orthogonal_(matrix)

    def direct() -> None:
        fastinit.normal_(normals)
        cuda_qr.orthonormalize(jobs, direct=True)

    ways: Ways = {
        "torch": theirs,
        "factored": lambda: fastinit.orthogonal_batched_(t),
        "direct": direct,
    }
    for name, run in ways.items():
        run()
        q = t[-1].double()
        off = torch.linalg.matrix_norm(q.mT @ q - torch.eye(n, dtype=q.dtype, device=_DEVICE))
        if not off <= 1e-5 * n**0.5:
            raise AssertionError(f"{law} by {name}: {off:.1e} from orthogonal")
    timed = _by_events(ways, rounds=3)
    case = f"{law} {count} of {n} x {n}"
    return [
        Row(case, timed["torch"], timed["factored"], None, goal),
        Row(f"{case}, Haar without factoring", timed["torch"], timed["direct"], None, direct_goal),
    ]


# ---- models --------------------------------------------------------------------------------------

Rule = Callable[[Any], Callable[[nn.Module], None]]


def _normal_rule(f: Any) -> Callable[[nn.Module], None]:
    """GPT-2's: N(0, 0.02), zero biases, norms of one."""

    def init_weights(m: nn.Module) -> None:
        if isinstance(m, (nn.Linear, nn.Embedding)):
            f.normal_(m.weight, 0.0, 0.02)
        if isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
            f.ones_(m.weight)
        if getattr(m, "bias", None) is not None:
            f.zeros_(m.bias)

    return init_weights


def _kaiming_rule(f: Any) -> Callable[[nn.Module], None]:
    def init_weights(m: nn.Module) -> None:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            f.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d):
            f.ones_(m.weight)
        if getattr(m, "bias", None) is not None:
            f.zeros_(m.bias)

    return init_weights


def _gpt2_small() -> nn.Module:
    """148 parameters, as those of transformers' GPT2Model."""
    layers: list[nn.Module] = [nn.Embedding(50257, 768), nn.Embedding(1024, 768)]
    for _ in range(12):
        layers += [nn.LayerNorm(768), nn.Linear(768, 2304), nn.Linear(768, 768)]
        layers += [nn.LayerNorm(768), nn.Linear(768, 3072), nn.Linear(3072, 768)]
    return nn.Sequential(*layers, nn.LayerNorm(768))


def _llama_7b() -> nn.Module:
    """291 parameters, those of Llama-2-7B (Touvron et al. 2023), bfloat16."""
    h, f = 4096, 11008
    layers: list[nn.Module] = [nn.Embedding(32000, h)]
    for _ in range(32):
        layers += [nn.Linear(h, h, bias=False) for _ in range(4)]
        layers += [nn.Linear(h, f, bias=False), nn.Linear(h, f, bias=False)]
        layers += [nn.Linear(f, h, bias=False), nn.RMSNorm(h), nn.RMSNorm(h)]
    return nn.Sequential(*layers, nn.RMSNorm(h), nn.Linear(h, 32000, bias=False)).bfloat16()


_MODELS: tuple[tuple[str, Callable[[], nn.Module], Rule, float, float], ...] = (
    ("ResNet-50", bench.resnet50_like, _kaiming_rule, 30, 1.5),
    ("GPT-2 small", _gpt2_small, _normal_rule, 15, 1.5),
    ("Llama-2-7B bfloat16", _llama_7b, _normal_rule, 2.5, 2),
)


def _model(
    name: str, make: Callable[[], nn.Module], rule: Rule, planned: float, first: float
) -> list[Row]:
    with torch.device("meta"):
        model = make()
    model.to_empty(device=_DEVICE)
    tensors = list(model.parameters())
    ours, theirs = rule(fastinit), rule(torch.nn.init)
    recorded = fastinit.record(model, ours)
    ways: Ways = {
        "torch": lambda: model.apply(theirs),
        "plan.run()": recorded.run,
        "init_model_": lambda: fastinit.init_model_(model, ours),
    }
    _check(name, tensors, ways)
    timed = _by_clock(ways)
    host = _by_clock({"plan.run()": recorded.run}, rounds=50, wait=False)["plan.run()"]
    size = f"{name}, {len(tensors)} tensors"
    roof = _roof(tensors)
    limit = "30 us" if name == "ResNet-50" else ""
    return [
        Row(f"{size}: plan.run()", timed["torch"], timed["plan.run()"], roof, f"{planned:g} x"),
        Row(f"{size}: init_model_", timed["torch"], timed["init_model_"], roof, f"{first:g} x"),
        Row(f"{size}: until plan.run() returns", float("nan"), host, None, limit),
    ]


# ---- table ---------------------------------------------------------------------------------------


def about() -> dict[str, str]:
    """What the figures depend on."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        driver = "unknown"
    commit = os.environ.get("FASTINIT_COMMIT", "")
    if not commit:
        try:
            git = ["git", "rev-parse", "--short", "HEAD"]
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        except OSError:
            pass
    return {
        "gpu": p.name,
        "processors": f"{p.multi_processor_count} of {p.max_threads_per_multi_processor} threads",
        "driver": driver,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "fastinit": f"{fastinit.__version__}, {kernels._cuda.COMPILER}",
        "commit": commit or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "host": bench.cpu_model(),
    }


def main(selected: str = "", path: str | None = None) -> int:
    facts = about()
    print(", ".join(f"{key} {value}" for key, value in facts.items()) + "\n")
    print("| case | torch | fastinit | times as fast | of the roof | goal |")
    print("|---|---|---|---|---|---|")
    rows: list[Row] = []
    failed: list[str] = []
    cases: list[tuple[str, Callable[[], list[Row]]]] = [
        *((f"{x[0]} {x[1]}", lambda x=x: [_large(*x)]) for x in _LAWS),
        *((f"{x[0]} {x[1]}", lambda x=x: [_keyed(*x)]) for x in _KEYED),
        *((f"{x[0]} {x[1]}", lambda x=x: _orthogonal(*x)) for x in _MATRICES),
        *((x[0], lambda x=x: _model(*x)) for x in _MODELS),
    ]
    for name, run in cases:
        if selected not in name:
            continue
        try:
            made = run()
        except (AssertionError, torch.cuda.OutOfMemoryError) as error:
            failed.append(f"{name}: {error}")
            continue
        rows += made
        for row in made:
            print(f"| {' | '.join(row.cells())} |", flush=True)
    for line in failed:
        print(line)
    if path is not None:
        table = [
            {"case": r.case, "torch_s": r.torch if r.torch == r.torch else None,
             "fastinit_s": r.fastinit, "roof_s": r.roof, "goal": r.goal}
            for r in rows
        ]  # fmt: skip
        with open(path, "w") as file:
            json.dump({**facts, "rows": table, "failed": failed}, file, indent=1)
            file.write("\n")
    return 1 if failed else 0
