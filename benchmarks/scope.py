# SPDX-License-Identifier: BSD-3-Clause
"""Code that builds and fills models, as it is and in `fastinit.fused()` or `init_model_`.

    python benchmarks/scope.py [ROW ...] [--quick] [--memory] [--instructions] [--json FILE]

ROW selects the rows whose name contains it. Both ways are compared first: bits of everything that
they make, aliasing, version counters, generator. Then they take turns, and the least time of each
counts, in seconds and in seconds of CPU time of all threads. That of two runs in a turn the second
counts matters here: a virtual machine may take back memory that was free for two seconds, and
giving it again costs up to a second per GB, whoever touches it. A row ends after the round in which
it has taken --seconds. "memory": allocating tensors of the same sizes and writing them with nothing
to compute.

--instructions counts those that a run retires instead, with perf or, where perf cannot count, with
valgrind (which has no AVX-512: both ways then run with AVX2). --memory builds each once more in a
process of its own and prints that process's highest resident memory, imports included.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cpu
import keyed
import models
import sharded
import torch
from beside import WAYS, build, case, highest_memory, in_process, instructions, measure
from harness import Case, header, is_wanted, of_network, parser, resnet50, write
from models import from_config, linears
from torch import nn
from torch.nn import init

import fastinit
from fastinit.cli.bench import compare, seconds
from fastinit.core.table import markdown


def empty() -> Case:
    """What is asked of an empty block is a time, not a ratio."""
    return Case({"fused": lambda: build(lambda: None, "fused")}, (), "30 us", bool, 15, 100)


def existing(
    make: Callable[[], nn.Module],
    fn: Callable[[nn.Module], object],
    goal: float,
    calls: int = 1,
    rounding: float = 0.0,
) -> Case:
    """A model that is there, filled by model.apply(fn) and by init_model_."""
    model = make()
    ways = {"eager": lambda: model.apply(fn), "fused": lambda: fastinit.init_model_(model, fn)}
    parameters = list(model.parameters())
    return Case(ways, (), goal, partial(compare, ways, parameters, rounding), 9, calls)


def single(cases: dict[str, Callable[[], Case]], name: str, goal: float) -> Case:
    """One call of fastinit's function beside torch's; cpu.py and keyed.py have the case."""
    made = cases[name]()
    ways = {"eager": made.ways["torch"], "fused": made.ways.get("plan", made.ways["one by one"])}
    return Case(ways, (), goal, made.check, made.rounds)


def xavier(m: nn.Module) -> None:
    if isinstance(m, nn.Linear):
        init.xavier_uniform_(m.weight)
        init.zeros_(m.bias)


def loading(goal: float, **settings: Any) -> Case:
    """A new model that gets the values of another."""
    state = linears(50, 1024).state_dict()

    def load() -> nn.Module:
        model = linears(50, 1024)
        model.load_state_dict(state, **settings)
        return model

    return case(load, goal)


def load_model(goal: float) -> Case:
    library = models.library("safetensors.torch")
    folder = tempfile.TemporaryDirectory()
    path = str(Path(folder.name) / "model.safetensors")
    library.save_model(linears(50, 1024), path)

    def load(folder: object = folder) -> nn.Module:  # which lives as long as the case
        model = linears(50, 1024)
        library.load_model(model, path)
        return model

    return case(load, goal)


ROWS: dict[str, Callable[[], Case]] = {
    "empty block": empty,
    **{
        f"{count} x Linear({width})": partial(
            case, partial(linears, count, width), 0.95, 15, 400 // count or 1
        )
        for width in (16, 64)
        for count in (20, 100, 1000)
    },
    "GRU(64)": partial(case, lambda: nn.GRU(64, 64), 0.95, 15, 50),
    "100 x Linear(128)": partial(case, partial(linears, 100, 128), 1.0, 15, 4),
    "100 x Linear(256)": partial(case, partial(linears, 100, 256), 1.8, 15),
    "50 x Linear(512)": partial(case, partial(linears, 50, 512), 5, 15),
    "RL agent, orthogonal_ 64 x 64": partial(case, models.agent, 1.3, 15, 10, 1e-4),
    "two RL agents": partial(
        case, lambda: [models.agent(), models.agent()], 1.3, 15, 5, rounding=1e-4
    ),
    "RL policy, ten orthogonal_ 64 x 64": partial(case, models.policy, 1.3, 15, 10, 1e-4),
    "1,024 x orthogonal_ 64 x 64": partial(case, models.many_orthogonal, 5, rounding=1e-4),
    "EMA copy": partial(case, models.averaged, 1.0, 15),
    "ensemble of 8": partial(case, models.ensemble, 1.0, 15),
    "graph attention": partial(case, models.graph_attention, 1.0, 15, 5),
    "small convolutions": partial(case, models.small_convolutions, 1.0, 15),
    "init_model_, MLP 64 x 64, xavier_uniform_": partial(
        existing, partial(linears, 3, 64), xavier, 1.0, 100
    ),
    "init_model_, MLP 64 x 64, orthogonal_": partial(
        existing,
        *(partial(linears, 3, 64), lambda m: isinstance(m, nn.Linear) and models.orthogonal(m)),
        *(1.0, 20, 1e-4),
    ),
    "init_model_, ResNet-50, kaiming_normal_": partial(existing, resnet50, of_network(init), 8),
    "timm vit_base_patch16_224": partial(case, partial(models.of_timm, "vit_base_patch16_224"), 5),
    "timm convnext_small": partial(case, partial(models.of_timm, "convnext_small"), 4),
    "timm eva02_small": partial(case, partial(models.of_timm, "eva02_small_patch14_224"), 2),
    "GPT-2 size to(bfloat16)": partial(case, lambda: models.gpt2().to(torch.bfloat16), 8),
    "load_model of safetensors": partial(load_model, 6),
    "load_state_dict": partial(loading, 4),
    "load_state_dict, assign=True": partial(loading, 17, assign=True),
    "BERT-base, trunc_normal_ at two deviations": partial(case, models.bert, 20),
    "sparse_ 1024 x 1024, 0.9": partial(single, cpu.CASES, "sparse_ 1024 x 1024, 0.9", 20),
    "trunc_normal_ 2^24": partial(single, cpu.CASES, "trunc_normal_ float32", 45),
    "normal_ bfloat16 2^24 with a seed": partial(single, keyed.CASES, "keyed normal_ bfloat16", 9),
    "Llama-3.2-1B": partial(case, models.llama_1b, 14, 3),
    "Llama-3.2-1B bfloat16": partial(case, partial(models.llama_1b, torch.bfloat16), 14, 3),
    "GPT-2 small": partial(case, partial(from_config, "AutoModelForCausalLM", "GPT2Config"), 14),
    "T5-base": partial(case, models.t5_base, 13),
    "ViT-B": partial(case, partial(from_config, "AutoModelForImageClassification", "ViTConfig"), 9),
    "ViT-B, trunc_normal_ std=.02": partial(case, models.vit, 6),
    "nn.Transformer": partial(case, nn.Transformer, 3),
    "ResNet-50, kaiming_normal_": partial(case, models.resnet, 2.5),
    "FSDP2, 2 ranks": partial(sharded.case, "fused", 1.5),
    "FSDP2, 2 ranks, with a seed": partial(sharded.case, "seeded", 3),
}
LARGE = ("Llama", "T5", "GPT-2", "BERT", "FSDP2", "timm", "trunc_normal_", "load")  # not --quick


# ---- the table ----


def ratio(found: dict[str, float]) -> str:
    return f"{found['eager'] / found['fused']:.3g}" if "eager" in found else ""


def row(name: str, options: argparse.Namespace) -> tuple[list[str], dict[str, object]]:
    """Return the cells of a row and its figures."""
    made = ROWS[name]()
    if made.check is not None:
        made.check()
    asked = f"{made.goal}"
    if options.instructions:
        counts = {w: instructions([__file__, name], w) for w in WAYS if w in made.ways}
        cells = [f"{counts[way]:.3f} M" if way in counts else "" for way in WAYS]
        return [name, *cells, ratio(counts), asked], {"instructions": counts}
    if isinstance(made, sharded.Ranks):
        found = made.measure()
    else:
        found = measure(made, 2 if options.quick else made.rounds, options.seconds)
    cells = [made.notes.get("elements", "")]
    cells += [seconds(found[way][0]) if way in found else "" for way in (*WAYS, "memory")]
    cells += [ratio({way: x[i] for way, x in found.items()}) for i in (0, 1)]
    if options.memory:
        peaks = {w: in_process([__file__, name], w) for w in WAYS if w in made.ways}
        cells += [f"{int(peaks[w]) / 1024:.0f} MiB" if w in peaks else "" for w in WAYS]
    figures = {way: {"wall": x[0], "cpu": x[1]} for way, x in found.items()}
    return [name, *cells, asked], {"seconds": figures}


def main() -> None:
    described = parser("Build and fill models as they are and in fused() or by init_model_.")
    described.add_argument("--quick", action="store_true", help="few rounds, no large models")
    described.add_argument("--seconds", type=float, default=60, help="that a row may take; 60")
    described.add_argument("--memory", action="store_true", help="also the highest resident memory")
    described.add_argument("--instructions", action="store_true", help="count them; no times")
    described.add_argument("--alone", metavar="WAY", help=argparse.SUPPRESS)
    described.add_argument("--times", type=int, default=1, help=argparse.SUPPRESS)
    options = described.parse_args()
    warnings.filterwarnings("ignore", "enable_nested_tensor")  # of nn.Transformer()
    if options.alone:
        made = ROWS[options.names[0]]()
        for _ in range(options.times):
            made.ways[options.alone]()
        print(highest_memory())
        return
    title = header()
    print(f"{title}\n")
    columns = ["case", "elements", *WAYS, "memory", "times as fast", "by CPU time", "asked"]
    if options.instructions:
        columns = ["case, millions of instructions", *WAYS, "ratio", "asked"]
    elif options.memory:
        columns[-1:-1] = [f"peak, {way}" for way in WAYS]
    print(markdown(columns), markdown(["---"] * len(columns)), sep="\n")
    rows: list[dict[str, object]] = []
    for name in ROWS:
        if not is_wanted(name, options.names):
            continue
        if options.quick and any(part in name for part in LARGE):
            continue
        try:
            cells, figures = row(name, options)
        except ImportError as error:
            cells, figures = [name, f"skipped: {error}"], {"skipped": str(error)}
        except AssertionError as error:
            cells, figures = [name, f"differs: {error}"], {"differs": str(error)}
        cells += [""] * (len(columns) - len(cells))
        print(markdown(cells), flush=True)
        rows.append({"name": name, **figures})
    write(options.json, {"header": title, "rows": rows})
    if any("differs" in found for found in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
