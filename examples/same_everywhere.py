# SPDX-License-Identifier: BSD-3-Clause
"""Initialise one transformer on 1, 2 and 4 processes, and show that it is the same model.

With a seed of its own (`seed=`), what fastinit writes depends on that seed, on the full name of a
parameter and on the place of an element in the whole parameter. So each process fills the part that
it holds without asking the others, however the model is sharded, and bfloat16 is float32 rounded.
(An orthogonal matrix is computed from all of its elements, by each process that has some of it.)

    python examples/same_everywhere.py

prints a hash of each parameter, gathered from all processes, one column for each of these ways.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn

import fastinit

SEED = 42
COLUMNS, ROWS = ColwiseParallel(), RowwiseParallel()
TP_PLAN = {"qkv": COLUMNS, "out": ROWS, "up": COLUMNS, "down": ROWS}
Hashes = dict[str, str]  # by the name of the parameter


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nn.functional.gelu(self.up(x)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    def __init__(self, vocab: int = 1001, width: int = 60) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def init_weights(m: nn.Module) -> None:
    """Any such function: it is called with every module, children first."""
    if isinstance(m, nn.Embedding):
        nn.init.normal_(m.weight, std=0.02)
    elif isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    elif isinstance(m, nn.LayerNorm):
        m.reset_parameters()
    elif isinstance(m, Block):
        nn.init.xavier_uniform_(m.up.weight)
        nn.init.orthogonal_(m.out.weight)


def on_one_process(dtype: torch.dtype) -> Transformer:
    model = Transformer().to(dtype)
    fastinit.init_model_(model, init_weights, seed=SEED)
    return model


def on_this_rank(ranks: int, dtype: torch.dtype) -> Transformer:
    """No memory is taken before each process knows its part."""
    with torch.device("meta"):
        model = Transformer()
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
    for block in model.blocks:
        if ranks > 2:
            parallelize_module(block, mesh["tp"], TP_PLAN)
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    fastinit.materialize_(model, dtype=dtype, fn=init_weights, seed=SEED)
    return model


def hashes_of(model: nn.Module, dtype: torch.dtype) -> Hashes:
    found = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p  # here, and only here, gathered
        numbers = whole.detach().to(dtype).contiguous().view(torch.uint8).numpy()
        found[name] = hashlib.sha256(numbers.tobytes()).hexdigest()[:8]
    return found


def rank_of_many(rank: int, ranks: int, folder: str) -> None:
    if sys.platform == "linux":  # all processes are on this machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # on how to gather faster
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{ranks}", rank=rank, world_size=ranks)
    found = {str(t): hashes_of(on_this_rank(ranks, t), t) for t in (torch.float32, torch.bfloat16)}
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> int:
    columns: dict[tuple[str, str], Hashes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (2, 4):
            spawn(rank_of_many, (ranks, folder), nprocs=ranks)  # type: ignore[no-untyped-call]
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            columns[kind, "rounded"] = hashes_of(on_one_process(torch.float32), dtype)
            columns[kind, "1"] = hashes_of(on_one_process(dtype), dtype)
            for ranks, how in ((2, "2, FSDP"), (4, "2 x 2 TP")):
                found = json.loads(Path(folder, f"{ranks}.json").read_text())
                columns[kind, how] = found[str(dtype)]
    del columns["float32", "rounded"]
    for i, title in enumerate(("", "processes")):
        print(f"{title:22}" + "".join(f"{column[i]:10}" for column in columns).rstrip())
    for name in columns["float32", "1"]:
        print(f"{name:22}" + "  ".join(hashes[name] for hashes in columns.values()))
    expected = {"float32": columns["float32", "1"], "bfloat16": columns["bfloat16", "rounded"]}
    same = all(hashes == expected[kind] for (kind, _), hashes in columns.items())
    print("all hashes equal" if same else "HASHES DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
