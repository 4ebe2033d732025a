# SPDX-License-Identifier: BSD-3-Clause
"""FSDP2: a model on the meta device, sharded, then allocated and filled; rows of scope.py.

Each rank is a process of one thread, as torchrun starts them, in a group of gloo on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Case, unchecked
from torch import Tensor, nn
from torch.nn import init

import fastinit

WORLD = 2
ROUNDS = 3
WIDTH, LAYERS, TOKENS = 2048, 2, 32000


def model() -> nn.Module:
    """Build the parameters of a small Llama on the meta device."""

    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=False)

    with torch.device("meta"):
        layers = []
        for _ in range(LAYERS):
            quarter, wide = WIDTH // 4, 4 * WIDTH
            shapes = [(WIDTH, WIDTH), (WIDTH, quarter), (WIDTH, quarter), (WIDTH, WIDTH)]
            shapes += [(WIDTH, wide), (wide, WIDTH), (WIDTH, wide)]
            norms = [nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)]
            layers.append(nn.Sequential(*(linear(*s) for s in shapes), *norms))
        return nn.Sequential(nn.Embedding(TOKENS, WIDTH), *layers, linear(WIDTH, TOKENS))


def fill(m: nn.Module) -> None:
    """Fill a module's own parameters as torchtitan does."""
    if isinstance(m, nn.Embedding):
        init.normal_(m.weight)
    elif isinstance(m, nn.Linear):
        init.trunc_normal_(m.weight, mean=0.0, std=0.02)
    elif isinstance(m, nn.RMSNorm):
        init.ones_(m.weight)


def eager(m: nn.Module) -> None:
    m.to_empty(device="cpu")
    m.apply(fill)


def fused(m: nn.Module) -> None:
    with fastinit.fused():
        eager(m)


def seeded(m: nn.Module) -> None:
    fastinit.materialize_(m, fn=fill, seed=42)


WAYS: dict[str, Callable[[nn.Module], None]] = {"eager": eager, "fused": fused, "seeded": seeded}


# ---- a rank ----


def rank(number: int, store: str, way: str) -> None:
    """Compare and time eager and another way; rank 0 prints what all took."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "DTensor random operators")  # on CPUs; they are what is timed
    dist.init_process_group("gloo", f"file://{store}", rank=number, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))

    def made() -> nn.Module:
        m = model()
        for layer in m:
            fully_shard(layer, mesh=mesh)
        fully_shard(m, mesh=mesh)
        return m

    def parts(way: str) -> list[Tensor]:
        torch.manual_seed(1)
        m = made()
        WAYS[way](m)
        state = torch.get_rng_state()
        return [state, *(p.detach().to_local() for p in m.parameters())]  # type: ignore[operator]

    reference = parts("seeded" if way == "seeded" else "eager")
    if not all(map(torch.equal, reference, parts(way))):
        raise SystemExit(f"{way} differs on rank {number}")
    del reference
    least = {name: [float("inf")] * 2 for name in ("eager", way)}
    for turn in range(2 * ROUNDS):
        for name in list(least)[:: 1 if turn % 2 == 0 else -1]:
            m = made()
            dist.barrier()
            start = time.perf_counter(), time.process_time()
            WAYS[name](m)
            cpu = torch.tensor(time.process_time() - start[1])
            dist.barrier()
            wall = time.perf_counter() - start[0]
            dist.all_reduce(cpu)
            if turn > 0:
                least[name] = list(map(min, least[name], (wall, cpu.item())))
    if number == 0:
        print(json.dumps({"eager": least["eager"], "fused": least[way]}))
    dist.destroy_process_group()


# ---- the row ----


@dataclass
class Ranks(Case):
    """A case that other processes compare and time."""

    way: str = ""

    def measure(self) -> dict[str, tuple[float, float]]:  # type: ignore[override]
        """Return the least wall time of the group and CPU time of all its ranks."""
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            alone = {**os.environ, "OMP_NUM_THREADS": "1"}
            started = [
                subprocess.Popen(
                    [sys.executable, __file__, f"{number}", store, self.way],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=alone,
                )
                for number in range(WORLD)
            ]
            try:
                shown = [process.communicate(timeout=600)[0] for process in started]
            finally:
                for process in started:
                    process.kill()
        if any(process.returncode != 0 for process in started):
            raise AssertionError("a rank failed")
        return {way: tuple(found) for way, found in json.loads(shown[0]).items()}


def case(way: str, goal: float) -> Ranks:
    if not torch.distributed.is_available():
        raise ImportError("torch without distributed")
    return Ranks({}, (), goal, unchecked, way=way)


if __name__ == "__main__":
    rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])
