# SPDX-License-Identifier: BSD-3-Clause
"""torch's numbers and keyed ones on a GPU: large tensors, matrices, models.

Large tensors are timed by events on the stream, models by the clock from the first call until the
GPU is done, host work included. The roof is the time that writing as many bytes with nothing to
compute takes, by torch's fill_ or by fastinit's, whichever is faster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from types import ModuleType

import torch
from harness import (
    Case,
    Ways,
    constants,
    is_wanted,
    of_network,
    parser,
    resnet50,
    transformer,
    write,
)
from torch import Tensor, nn

import fastinit
from fastinit.cli import info
from fastinit.cli.bench import compare, measure, on_gpu, seconds, until_done, wall
from fastinit.core.table import markdown

LARGE = 1 << 28  # elements
DEVICE = "cuda"
KEY = fastinit.Key(1, "bench")


def case(
    ways: Ways,
    tensors: Sequence[Tensor],
    goals: dict[str, str],
    check: object = None,
    **how: object,
) -> Case:
    """Return a case with a row of the table, and a goal, for each way but torch's."""
    how = {"rounds": 15, "clock": on_gpu, "memory": False, **how}
    return Case(
        ways, tensors, goals, check or partial(compare, ways, tensors, 0.0, torch.cuda), **how
    )


def law(name: str, dtype: torch.dtype, goal: str) -> Case:
    """Fill one tensor; a name that begins with "keyed" is compared with the CPU's numbers."""
    function, t = name.split()[-1], torch.empty(LARGE, dtype=dtype, device=DEVICE)
    theirs, ours = getattr(nn.init, function), getattr(fastinit, function)
    arguments = (0.5,) if name == "constant_" else ()
    if not name.startswith("keyed"):
        plan = fastinit.Plan()
        getattr(plan, function)(t, *arguments)
        ways = {"torch": lambda: theirs(t, *arguments), "fastinit": plan.run}
        return case(ways, [t], {"fastinit": goal})

    def check() -> None:
        some = torch.empty(min(LARGE, 1 << 20), dtype=dtype, device="cpu")
        if not torch.equal(ours(t, generator=KEY)[: len(some)].cpu(), ours(some, generator=KEY)):
            raise AssertionError("other numbers than on the CPU")

    ways = {"torch": lambda: theirs(t), "fastinit": lambda: ours(t, generator=KEY)}
    return case(ways, [t], {"fastinit": goal}, check)


def orthogonal(count: int, n: int, factored: str, direct: str) -> Case:
    """One of torch's after the other; a batch; and the same law without factoring."""
    t = torch.empty(count, n, n, device=DEVICE)
    ways = {
        "torch": lambda: [nn.init.orthogonal_(matrix) for matrix in t],
        "factored": lambda: fastinit.orthogonal_batched_(t),
        "without factoring": lambda: fastinit.orthogonal_batched_(t, generator=KEY),
    }

    def check() -> None:
        for name, run in ways.items():
            run()
            q = t[-1].double()
            off = torch.linalg.matrix_norm(q.mT @ q - torch.eye(n, dtype=q.dtype, device=DEVICE))
            if not off <= 1e-5 * n**0.5:
                raise AssertionError(f"{name}: {off:.1e} from orthogonal")

    goals = {"factored": factored, "without factoring": direct}
    return case(ways, (), goals, check, rounds=3)


def of_transformer(f: ModuleType) -> Callable[[nn.Module], None]:
    """Return GPT-2's rule: N(0, 0.02), zero biases, norms of one."""

    def init_weights(m: nn.Module) -> None:
        if isinstance(m, (nn.Linear, nn.Embedding)):
            f.normal_(m.weight, 0.0, 0.02)
        if isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
            f.ones_(m.weight)
        if getattr(m, "bias", None) is not None:
            f.zeros_(m.bias)

    return init_weights


def gpt2_small() -> nn.Module:
    """Return 148 parameters, as those of transformers' GPT2Model."""
    tables = [nn.Embedding(50257, 768), nn.Embedding(1024, 768)]
    return nn.Sequential(*tables, *transformer(768), nn.LayerNorm(768))


def llama_7b() -> nn.Module:
    """Return 291 parameters, those of Llama-2-7B (Touvron et al. 2023), bfloat16."""
    h, f = 4096, 11008
    layers: list[nn.Module] = [nn.Embedding(32000, h)]
    for _ in range(32):
        layers += [nn.Linear(h, h, bias=False) for _ in range(4)]
        layers += [nn.Linear(h, f, bias=False), nn.Linear(h, f, bias=False)]
        layers += [nn.Linear(f, h, bias=False), nn.RMSNorm(h), nn.RMSNorm(h)]
    return nn.Sequential(*layers, nn.RMSNorm(h), nn.Linear(h, 32000, bias=False)).bfloat16()


def model(make: Callable, rule: Callable, planned: str, first: str, host: str) -> Case:
    with torch.device("meta"):
        made = make()
    made.to_empty(device=DEVICE)
    ours, theirs = rule(fastinit), rule(nn.init)
    plan = fastinit.record(made, ours)
    ways = {
        "torch": lambda: made.apply(theirs),
        "plan.run()": plan.run,
        "init_model_": lambda: fastinit.init_model_(made, ours),
    }
    goals = {"plan.run()": planned, "init_model_": first, "until plan.run() returns": host}
    return case(ways, list(made.parameters()), goals, clock=until_done)


LAWS = [
    ("uniform_", torch.float32, "95 % of the roof"),
    ("normal_", torch.float32, "78 % of the roof"),
    ("uniform_", torch.bfloat16, "60 % of the roof"),
    ("normal_", torch.bfloat16, "40 % of the roof"),
    *(("normal_", torch.float16, ""), ("normal_", torch.float64, "")),
    *(("trunc_normal_", torch.float32, "5 x torch"), ("trunc_normal_", torch.bfloat16, "")),
    *(("constant_", torch.float32, ""), ("keyed uniform_", torch.float32, "")),
    ("keyed normal_", torch.float32, "90 % of the roof"),
    ("keyed normal_", torch.bfloat16, "70 % of the roof"),
    ("keyed trunc_normal_", torch.float32, ""),
]
CASES: dict[str, Callable[[], Case]] = {
    **{f"{x[0]} {str(x[1])[6:]}, 2^28": partial(law, *x) for x in LAWS},
    "orthogonal_ 32 of 4096 x 4096": partial(orthogonal, 32, 4096, "4 x", "10 x"),
    "orthogonal_ 8192 of 64 x 64": partial(orthogonal, 8192, 64, "100 x", ""),
    "ResNet-50, 161 tensors": partial(model, resnet50, of_network, "30 x", "1.5 x", "30 us"),
    "GPT-2 small, 148 tensors": partial(model, gpt2_small, of_transformer, "15 x", "1.5 x", ""),
    "Llama-2-7B bfloat16, 291 tensors": partial(
        model, llama_7b, of_transformer, "2.5 x", "2 x", ""
    ),
}


def returns(run: Callable[[], object]) -> float:
    """Return the seconds until the call returns to a host whose GPU was idle."""
    torch.cuda.synchronize()
    return wall(run)


def roof(tensors: Sequence[Tensor]) -> float:
    ways = {
        "torch": lambda: [t.detach().fill_(0.7) for t in tensors],
        "fastinit": constants(tensors),
    }
    return min(measure(ways, on_gpu, 15).values())


def rows(name: str, case: Case) -> Iterator[dict[str, object]]:
    """Measure a case; yield a row for each way but torch's."""
    found = case.measure()
    torch_s, most = found.pop("torch"), roof(case.tensors) if case.tensors else None
    for way, t in found.items():
        title = name if way == "fastinit" else f"{name}: {way}"
        figures = {"torch_s": torch_s, "fastinit_s": t, "roof_s": most, "goal": case.goal[way]}
        yield {"case": title, **figures}
    if case.clock is until_done:
        way, plan = "until plan.run() returns", {"": case.ways["plan.run()"]}
        t = measure(plan, returns, 50)[""]
        figures = {"torch_s": None, "fastinit_s": t, "roof_s": None, "goal": case.goal[way]}
        yield {"case": f"{name}: {way}", **figures}


def cells(row: dict) -> list[str]:
    torch_s, ours, most = row["torch_s"], row["fastinit_s"], row["roof_s"]
    both = ["", seconds(ours), ""]
    if torch_s is not None:
        both = [seconds(torch_s), seconds(ours), f"{torch_s / ours:.1f}"]
    return [row["case"], *both, f"{100 * most / ours:.0f} %" if most else "", row["goal"]]


def said_by(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.partition("\n")[0] or "unknown"
    except OSError:
        return "unknown"


def about() -> dict[str, str]:
    """Return what the figures depend on."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    here = os.path.dirname(os.path.abspath(__file__))
    commit = os.environ.get("FASTINIT_COMMIT")
    return {
        "gpu": p.name,
        "processors": f"{p.multi_processor_count} of {p.max_threads_per_multi_processor} threads",
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "fastinit": f"{fastinit.__version__}, {info.about_cuda()[0]}",
        "commit": commit or said_by("git", "-C", here, "rev-parse", "--short", "HEAD"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "host": info.cpu_model(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__).parse_args(arguments)
    facts = about()
    print(", ".join(f"{key} {value}" for key, value in facts.items()) + "\n")
    heads = ["case", "torch", "fastinit", "times as fast", "of the roof", "goal"]
    print(markdown(heads), markdown(["---"] * len(heads)), sep="\n")
    made: list[dict[str, object]] = []
    failed: list[str] = []
    for name, make in CASES.items():
        if not is_wanted(name, options.names):
            continue
        try:
            for row in rows(name, make()):
                made.append(row)
                print(markdown(cells(row)), flush=True)
        except (AssertionError, torch.cuda.OutOfMemoryError) as error:
            failed.append(f"{name}: {error}")
    print("\n".join(failed))
    write(options.json, {**facts, "rows": made, "failed": failed})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
