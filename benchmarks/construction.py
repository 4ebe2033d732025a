# SPDX-License-Identifier: BSD-3-Clause
"""How long models take to construct, eagerly and in `fastinit.fused()`, and what a call costs.

    python benchmarks/construction.py [NAME ...] [--memory] [--json FILE]

NAME selects the models whose name contains it; `overhead` is the table of single calls. Every model
is first built both ways and compared, bits and generator, which is also the warm-up. Then both ways
take turns, the order changing every round, and medians are compared. In its turn a way runs twice
and the second run counts: a virtual machine may take back memory that was free for two seconds, and
giving it again costs up to a second per GB, whoever touches it. "memory" is the time to
allocate tensors of the same sizes and write them with all threads and nothing to compute. --memory
builds each once more in a process of its own and gives the highest resident memory of that process,
imports included.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
import timeit
import warnings
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.utils._python_dispatch import TorchDispatchMode

import fastinit
from fastinit.cli import bench

os.environ["HF_HUB_OFFLINE"] = "1"

Way = Callable[[], AbstractContextManager[Any]]
WAYS: dict[str, Way] = {"eager": nullcontext, "fused": fastinit.fused}


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    goal: float  # times as fast as eager
    rounds: int = 7
    calls: int = 1  # per timing
    rounding: float = 0.0  # how far values may be from eager's; 0: all bits are compared


@dataclass
class Row:
    name: str
    goal: float
    millions: float = math.nan  # of parameters
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # KiB
    skipped: str = ""

    @property
    def ratio(self) -> float:
        return self.seconds["eager"] / self.seconds["fused"]

    def cells(self, memory: bool) -> list[str]:
        if self.skipped:
            return [self.name, f"skipped: {self.skipped}", "", "", "", "", f"{self.goal:g}"]
        size = f"{self.millions:.1f} M" if self.millions >= 0.1 else f"{self.millions * 1e3:.0f} k"
        times = [duration(self.seconds[way]) for way in (*WAYS, "memory")]
        cells = [self.name, size, *times, f"{self.ratio:.2f}", f"{self.goal:g}"]
        return cells + [f"{self.peaks[way] / 1024:.0f} MiB" for way in WAYS] if memory else cells


def duration(s: float) -> str:
    return f"{s * 1e3:.0f} ms" if s >= 0.01 else f"{s * 1e6:.0f} us"


# ---- the models ----


def from_config(model: str, config: str, **settings: Any) -> nn.Module:
    """A model of transformers; what is not said is the config's default."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    dtype = settings.pop("dtype", torch.float32)
    options = getattr(transformers, config)(**settings)
    built = getattr(transformers, model).from_config(options, dtype=dtype)
    assert isinstance(built, nn.Module)
    return built


def llama_1b(dtype: torch.dtype) -> nn.Module:
    return from_config(
        "AutoModelForCausalLM",
        "LlamaConfig",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype=dtype,
    )


def t5_base() -> nn.Module:
    settings = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    return from_config("AutoModelForSeq2SeqLM", "T5Config", **settings)


class Block(nn.Module):
    """A layer of a ViT or BERT; no forward pass."""

    def __init__(self, width: int, fused_qkv: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.inputs = nn.ModuleList(
            [nn.Linear(width, 3 * width)]
            if fused_qkv
            else [nn.Linear(width, width) for _ in range(3)]
        )
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class ViT(nn.Module):
    """ViT-B/16 as timm builds it: default init, then trunc_normal_ in every Linear."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, True) for _ in range(12)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)
        init.trunc_normal_(self.positions, std=0.02)
        init.normal_(self.token, std=1e-6)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                init.trunc_normal_(m.weight, std=0.02)
                init.zeros_(m.bias)


class Bert(nn.Module):
    """BERT-base with every matrix cut at two deviations, as the original has it."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(n, width) for n in (30522, 512, 2)])
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(Block(width, False) for _ in range(12)))
        self.pooler = nn.Linear(width, width)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                init.trunc_normal_(m.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(m, nn.Linear):
                init.zeros_(m.bias)


def resnet50() -> nn.Module:
    """As torchvision builds it."""
    model = bench.resnet50_like()
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d):
            init.constant_(m.weight, 1)
            init.constant_(m.bias, 0)
    return model


def policy() -> nn.Module:
    """As stable-baselines3 builds its MlpPolicy."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(10)))
    for m in model:
        assert isinstance(m, nn.Linear)
        init.orthogonal_(m.weight, gain=math.sqrt(2))
        m.bias.data.fill_(0.0)
    return model


CASES = [
    Case("Llama-3.2-1B", lambda: llama_1b(torch.float32), 8, rounds=3),
    Case("Llama-3.2-1B bfloat16", lambda: llama_1b(torch.bfloat16), 8, rounds=3),
    Case("GPT-2 small", lambda: from_config("AutoModelForCausalLM", "GPT2Config"), 7),
    Case("T5-base", t5_base, 8),
    Case("ViT-B", lambda: from_config("AutoModelForImageClassification", "ViTConfig"), 6),
    Case("ViT-B, trunc_normal_ std=.02", ViT, 6),
    Case("BERT-base, trunc_normal_ at two deviations", Bert, 20),
    Case("nn.Transformer", nn.Transformer, 3),
    Case("ResNet-50, kaiming_normal_", resnet50, 2.5),
    Case("RL policy, ten orthogonal_ 64 x 64", policy, 0.83, calls=20, rounding=1e-4),
]


# ---- one model ----


def build(case: Case, way: str) -> nn.Module:
    with WAYS[way]():
        return case.make()


def digest(model: nn.Module, values: bool) -> dict[str, Any]:
    """What two constructions must share: checksums, so that one model is in memory at a time."""
    sums: dict[tuple[int, int], int] = {}
    names: dict[int, str] = {}
    seen: dict[str, Any] = {"generator": torch.get_rng_state().numpy().tobytes()}
    seen["keys"] = list(model.state_dict())
    for kind in ("parameters", "buffers"):
        for name, t in getattr(model, f"named_{kind}")(remove_duplicate=False):
            memory = (t.data_ptr(), t.nbytes)
            if memory not in sums:
                raw = t.detach().contiguous().reshape(-1).view(torch.uint8)
                sums[memory] = zlib.crc32(raw.numpy()) if values else 0
            first = names.setdefault(id(t), name)
            seen[name] = (sums[memory], first, t.shape, t.stride(), t.dtype, t.requires_grad)
            seen[f"{name} version"] = t._version
    return seen


def check(case: Case) -> float:
    """Raise unless both ways give the same model and generator; millions of parameters."""
    seen, count = {}, 0
    kept: list[list[Tensor]] = []  # where they are small and compared by value
    for way in WAYS:
        torch.manual_seed(1)
        model = build(case, way)
        seen[way] = digest(model, case.rounding == 0)
        if case.rounding != 0:
            kept.append([t.detach().clone() for t in model.state_dict().values()])
        count = sum(p.numel() for p in model.parameters())
        del model
        gc.collect()
    wrong = [k for k, found in seen["fused"].items() if seen["eager"].get(k) != found]
    if wrong or seen["eager"].keys() != seen["fused"].keys():
        raise AssertionError(f"{case.name}: fused differs from eager in {wrong[:5] or 'its keys'}")
    for eager, fused in zip(*kept):
        torch.testing.assert_close(fused, eager, atol=case.rounding, rtol=0)
    return count / 1e6


def seconds(case: Case, way: str) -> float:
    gc.collect()
    torch.manual_seed(1)
    taken = 0.0
    for _ in range(case.calls):
        start = time.perf_counter()
        model = build(case, way)
        taken += time.perf_counter() - start
        del model
    gc.collect()
    return taken / case.calls


def touch(like: list[tuple[torch.Size, torch.dtype]]) -> float:
    """What nobody can go below: as many tensors of the same sizes, with nothing to compute."""
    gc.collect()
    start = time.perf_counter()
    with fastinit.fused():
        made = [torch.empty(shape, dtype=dtype).fill_(0.7) for shape, dtype in like]
    taken = time.perf_counter() - start
    del made
    gc.collect()
    return taken


def peak(case: Case, way: str) -> int:
    command = [sys.executable, __file__, "--peak", way, case.name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def own_peak() -> int:
    """KiB. Not ru_maxrss, which begins with that of the process that started this one."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(case: Case, memory: bool) -> Row:
    row = Row(case.name, case.goal)
    try:
        row.millions = check(case)
    except ImportError as error:
        row.skipped = str(error)
        return row
    model = case.make()
    like = [(p.shape, p.dtype) for p in model.parameters()]
    del model
    times: dict[str, list[float]] = {way: [] for way in (*WAYS, "memory")}
    for turn in range(case.rounds):
        for way in list(times)[:: 1 if turn % 2 == 0 else -1]:
            for _ in range(2):
                taken = seconds(case, way) if way in WAYS else touch(like)
            times[way].append(taken)
    row.seconds = {way: statistics.median(t) for way, t in times.items()}
    if memory:
        row.peaks = {way: peak(case, way) for way in WAYS}
    return row


# ---- single calls ----


class NoOp(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What any dispatch mode costs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as fastinit's: True imports torch._dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


Call = Callable[[], object]
CONTEXTS: dict[str, Way] = {"eager": nullcontext, "no-op mode": NoOp, "fused": fastinit.fused}
OLD = torch.ones(16)  # has nothing pending


def with_new(n: int, call: Callable[[Tensor], object]) -> Callable[[], Call]:
    """The call on a tensor born in the block."""

    def prepare() -> Call:
        x = torch.empty(n)
        return lambda: call(x)

    return prepare


def with_matrix(call: Callable[[Tensor], object]) -> Callable[[], Call]:
    def prepare() -> Call:
        x = torch.empty(32, 32)
        return lambda: call(x)

    return prepare


# Called in the block; gives what is timed.
CALLS: dict[str, Callable[[], Call]] = {
    "x.fill_(1.), 16 elements": with_new(16, lambda x: x.fill_(1.0)),
    "x.uniform_(), 256 elements": with_new(256, lambda x: x.uniform_()),
    "x.normal_(), 16384 elements, recorded": with_new(16384, lambda x: x.normal_()),
    "nn.init.zeros_, 256 elements": with_new(256, init.zeros_),
    "nn.init.kaiming_uniform_, 32 x 32": with_matrix(init.kaiming_uniform_),
    "x.t(), 32 x 32": with_matrix(lambda x: x.t()),
    "x + 1, nothing pending": lambda: lambda: OLD + 1,
    "torch.empty(16)": lambda: lambda: torch.empty(16),
    "nn.Linear(32, 32)": lambda: lambda: nn.Linear(32, 32),
    "nn.LayerNorm(256)": lambda: lambda: nn.LayerNorm(256),
}


@torch.no_grad()
def overheads(name: str, rounds: int = 9) -> dict[str, float]:
    """Microseconds per call, medians; entering and leaving the block are not counted."""
    prepare, number = CALLS[name], 0
    times: dict[str, list[float]] = {way: [] for way in CONTEXTS}
    for turn in range(rounds + 1):
        for way, context in CONTEXTS.items():
            with context():
                timer = timeit.Timer(prepare())
                once = timer.timeit(20) / 20
                number = number or max(20, int(0.01 / once))
                taken = timer.timeit(number) / number
            if turn:  # the first warms up
                times[way].append(taken)
    return {way: statistics.median(t) * 1e6 for way, t in times.items()}


# ---- tables ----


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def header() -> str:
    try:
        library = f"transformers {importlib.import_module('transformers').__version__}"
    except ImportError:
        library = "no transformers"
    return f"{bench.header()}, {library}, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Construct models eagerly and in fused().")
    parser.add_argument("names", nargs="*", help="parts of names, or overhead; default: all")
    parser.add_argument("--memory", action="store_true", help="also the highest resident memory")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--peak", metavar="WAY", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "enable_nested_tensor")  # of nn.Transformer()

    def selected(name: str) -> bool:
        return not options.names or any(part.lower() in name.lower() for part in options.names)

    if options.peak:
        model = build(next(c for c in CASES if c.name == options.names[0]), options.peak)
        del model
        print(own_peak())
        return
    described = header()
    print(f"{described}\n")
    rows: list[Row] = []
    chosen = [c for c in CASES if selected(c.name)]
    if chosen:
        titles = ["model", "parameters", *WAYS, "memory", "ratio", "goal"]
        titles += [f"peak, {way}" for way in WAYS] if options.memory else []
        print(line(titles), line(["---"] * len(titles)), sep="\n")
        for case in chosen:
            rows.append(measure(case, options.memory))
            print(line(rows[-1].cells(options.memory)), flush=True)
        print()
    calls: dict[str, dict[str, float]] = {}
    if selected("overhead"):
        print(line(["call, us", *CONTEXTS]), line(["---"] * (1 + len(CONTEXTS))), sep="\n")
        for name in CALLS:
            calls[name] = overheads(name)
            print(line([name, *(f"{us:.2f}" for us in calls[name].values())]), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            models = [asdict(row) for row in rows]
            json.dump({"header": described, "models": models, "calls": calls}, file, indent=1)


if __name__ == "__main__":
    main()
