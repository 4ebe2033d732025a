# SPDX-License-Identifier: BSD-3-Clause
"""How long models take to construct, eagerly and in `fastinit.fused()`, and what a call costs.

    python benchmarks/construction.py [NAME ...] [--memory] [--json FILE]

NAME selects the models whose name contains it; `overhead` is the table of single calls. That of two
runs the second counts matters here: a virtual machine may take back memory that was free for two
seconds, and giving it again costs up to a second per GB, whoever touches it. "memory": allocating
tensors of the same sizes and writing them with nothing to compute. --memory builds each once more
in a process of its own and prints that process's highest resident memory, imports included.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
import subprocess
import sys
import timeit
import warnings
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from harness import Case, header, is_wanted, of_network, parser, resnet50, table, transformer, write
from torch import Tensor, nn
from torch.nn import init
from torch.utils._python_dispatch import TorchDispatchMode

import fastinit
from fastinit.cli.bench import measure, wall
from fastinit.core.table import markdown

os.environ["HF_HUB_OFFLINE"] = "1"

Way = Callable[[], AbstractContextManager[Any]]
WAYS: dict[str, Way] = {"eager": nullcontext, "fused": fastinit.fused}


# ---- the models ----


def from_config(model: str, config: str, **settings: Any) -> nn.Module:
    """Build a model of transformers; the other settings are the config's defaults."""
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


def vit(width: int = 768) -> nn.Module:
    """Build ViT-B/16 as timm does: default init, then trunc_normal_ in every Linear."""
    patches = nn.Conv2d(3, width, 16, stride=16)
    model = nn.Sequential(patches, *transformer(width), nn.LayerNorm(width), nn.Linear(width, 1000))
    model.token = nn.Parameter(torch.zeros(1, 1, width))
    model.positions = nn.Parameter(torch.randn(1, 197, width) * 0.02)
    init.trunc_normal_(model.positions, std=0.02)
    init.normal_(model.token, std=1e-6)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            init.trunc_normal_(m.weight, std=0.02)
            init.zeros_(m.bias)
    return model


def bert(width: int = 768) -> nn.Module:
    """Build BERT-base with every matrix cut at two deviations, as the original has it."""
    tables = [nn.Embedding(n, width) for n in (30522, 512, 2)]
    layers = transformer(width, [width] * 3)
    model = nn.Sequential(*tables, nn.LayerNorm(width), *layers, nn.Linear(width, width))
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            init.trunc_normal_(m.weight, std=0.02, a=-0.04, b=0.04)
        if isinstance(m, nn.Linear):
            init.zeros_(m.bias)
    return model


def resnet() -> nn.Module:
    """Build it as torchvision does."""
    return resnet50().apply(of_network(init))


def policy() -> nn.Module:
    """Build the layers of stable-baselines3's MlpPolicy."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(10)))
    for m in model:
        assert isinstance(m, nn.Linear)
        init.orthogonal_(m.weight, gain=math.sqrt(2))
        m.bias.data.fill_(0.0)
    return model


# ---- one model ----


def build(make: Callable[[], nn.Module], way: str) -> nn.Module:
    with WAYS[way]():
        return make()


def digest(model: nn.Module, values: bool) -> dict[str, Any]:
    """Return what two constructions must share: checksums, so that one model is there at a time."""
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


def check(make: Callable[[], nn.Module], rounding: float) -> None:
    """Raise unless both ways give the same model and generator."""
    seen: dict[str, dict[str, Any]] = {}
    kept: list[list[Tensor]] = []  # values of small models that are compared with a tolerance
    for way in WAYS:
        torch.manual_seed(1)
        model = build(make, way)
        seen[way] = digest(model, rounding == 0)
        if rounding != 0:
            kept.append([t.detach().clone() for t in model.state_dict().values()])
        del model
        gc.collect()
    wrong = [k for k, found in seen["fused"].items() if seen["eager"].get(k) != found]
    if wrong or seen["eager"].keys() != seen["fused"].keys():
        raise AssertionError(f"fused differs from eager in {wrong[:5] or 'its keys'}")
    for eager, fused in zip(*kept):
        torch.testing.assert_close(fused, eager, atol=rounding, rtol=0)


def cleared(run: Callable[[], object]) -> float:
    """Return the seconds that something takes to make, without those that it takes to free."""
    made: list[object] = []
    gc.collect()
    torch.manual_seed(1)
    taken = wall(lambda: made.append(run()))
    made.clear()
    gc.collect()
    return taken


def touch(like: list[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """Make as many tensors of the same sizes with nothing to compute: nobody can be faster."""
    with fastinit.fused():
        return [torch.empty(shape, dtype=dtype).fill_(0.7) for shape, dtype in like]


def case(
    make: Callable[[], nn.Module],
    goal: float,
    rounds: int = 7,
    calls: int = 1,
    rounding: float = 0.0,  # how far values may be from eager's
) -> Case:
    model = make()
    like = [(p.shape, p.dtype) for p in model.parameters()]
    n = sum(shape.numel() for shape, _ in like)
    size = f"{n / 1e6:.1f} M" if n >= 1e5 else f"{n / 1e3:.0f} k"
    ways = {way: partial(build, make, way) for way in WAYS} | {"memory": partial(touch, like)}
    checked = partial(check, make, rounding)
    return Case(ways, (), goal, checked, rounds, calls, cleared, notes={"parameters": size})


CASES: dict[str, tuple[Any, ...]] = {
    "Llama-3.2-1B": (partial(llama_1b, torch.float32), 8, 3),
    "Llama-3.2-1B bfloat16": (partial(llama_1b, torch.bfloat16), 8, 3),
    "GPT-2 small": (partial(from_config, "AutoModelForCausalLM", "GPT2Config"), 7),
    "T5-base": (t5_base, 8),
    "ViT-B": (partial(from_config, "AutoModelForImageClassification", "ViTConfig"), 6),
    "ViT-B, trunc_normal_ std=.02": (vit, 6),
    "BERT-base, trunc_normal_ at two deviations": (bert, 20),
    "nn.Transformer": (nn.Transformer, 3),
    "ResNet-50, kaiming_normal_": (resnet, 2.5),
    "RL policy, ten orthogonal_ 64 x 64": (policy, 0.83, 7, 20, 1e-4),
}


def peak(name: str, way: str) -> str:
    """Return the highest resident memory of a process that builds the model, imports included."""
    command = [sys.executable, __file__, "--peak", way, name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return f"{int(done.stdout) / 1024:.0f} MiB"


def own_peak() -> int:
    """Return KiB; not ru_maxrss, which begins with that of the process that started this one."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def with_peaks(name: str) -> Case:
    made = case(*CASES[name])
    made.notes |= {f"peak, {way}": peak(name, way) for way in WAYS}
    return made


# ---- single calls ----


class NoOp(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does nothing: what any dispatch mode costs."""

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
    described = parser("Construct models eagerly and in fused().")
    described.add_argument("--memory", action="store_true", help="also the highest resident memory")
    described.add_argument("--peak", metavar="WAY", choices=WAYS, help=argparse.SUPPRESS)
    options = described.parse_args()
    warnings.filterwarnings("ignore", "enable_nested_tensor")  # of nn.Transformer()
    if options.peak:
        model = build(CASES[options.names[0]][0], options.peak)
        del model
        print(own_peak())
        return
    try:
        library = f"transformers {importlib.import_module('transformers').__version__}"
    except ImportError:
        library = "no transformers"
    title = header(library)
    print(f"{title}\n")
    columns = ["parameters", *WAYS, "memory", *(f"peak, {w}" for w in WAYS if options.memory)]
    cases = {
        name: partial(with_peaks, name) if options.memory else partial(case, *of_model)
        for name, of_model in CASES.items()
    }
    rows, calls = table(cases, options.names, columns, "model"), {}
    if is_wanted("overhead", options.names):
        print("\n" + markdown(["call, us", *CONTEXTS]), markdown(["---"] * 4), sep="\n")
        for name in CALLS:
            ways = {way: partial(microseconds, c, CALLS[name]) for way, c in CONTEXTS.items()}
            calls[name] = measure(ways, lambda run: run())
            print(markdown([name, *(f"{us:.2f}" for us in calls[name].values())]), flush=True)
    write(options.json, {"header": title, "models": rows, "calls": calls})


if __name__ == "__main__":
    main()
