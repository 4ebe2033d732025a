# SPDX-License-Identifier: BSD-3-Clause
"""Models, ways to shard them, and what each rank of a gloo group does for keyed/test_sharded.py.

Where an element of a rank's memory stands in the whole parameter is what torch says, not fastinit:
a ruler, the same model with the indices of its elements for values, is sharded the same way.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fastinit

SEED = 7
PATIENCE = 200  # seconds that a rank waits for another
Fn = Callable[[nn.Module], object]


# ---- models --------------------------------------------------------------------------------------


class Filled(nn.Module):
    """One parameter, and the function of torch.nn.init that fills it."""

    def __init__(self, function: str, shape: tuple[int, ...], *args: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self._call = function, args

    def reset_parameters(self) -> None:
        getattr(nn.init, self._call[0])(self.weight, *self._call[1])


class Zoo(nn.Module):
    """Every function, on shapes that 2, 3 and 4 ranks divide, do not divide or have too few of."""

    def __init__(self) -> None:
        super().__init__()
        self.uniform = Filled("uniform_", (7, 5), -0.3, 0.7)
        self.normal = Filled("normal_", (5, 3, 2), 0.1, 0.5)
        self.trunc = Filled("trunc_normal_", (11, 3), 0.0, 0.02, -0.03, 0.04)
        self.kaiming = Filled("kaiming_uniform_", (7, 3, 3, 3))
        self.fan_out = Filled("kaiming_normal_", (10, 7), 0, "fan_out", "relu")
        self.xavier = Filled("xavier_uniform_", (3, 8), 1.5)
        self.row = Filled("xavier_normal_", (1, 9))
        self.wide = Filled("orthogonal_", (6, 10))
        self.tall = Filled("orthogonal_", (10, 2, 3), 2.0)
        self.sparse = Filled("sparse_", (9, 7), 0.3)
        self.eye = Filled("eye_", (5, 6))
        self.dirac = Filled("dirac_", (6, 4, 3))
        self.groups = Filled("dirac_", (6, 2, 3, 3), 2)
        self.zeros = Filled("zeros_", (5,))
        self.ones = Filled("ones_", (2, 3))
        self.constant = Filled("constant_", (7,), 3.5)
        self.vector = Filled("normal_", (13,))
        self.one = Filled("uniform_", (1,))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y: Tensor = x + self.scale * self.down(torch.tanh(self.up(q * k + v)))
        return y


class Net(nn.Module):
    def __init__(self, vocab: int, width: int, hidden: int, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.positions: Tensor
        self.register_buffer("positions", torch.empty(4, width))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.positions)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[: tokens.shape[-1]]
        for block in self.layers:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "zoo": Zoo,
    "net": functools.partial(Net, 13, 6, 10),
    "uneven": functools.partial(Net, 11, 5, 7),
    "tiny": functools.partial(Net, 2, 1, 3),
    "tied": functools.partial(Net, 13, 6, 10, tied=True),
}


# ---- what initialises them -----------------------------------------------------------------------


def typical(m: nn.Module) -> None:
    """As libraries do it: by functions, by methods of `data`, children first."""
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            m.bias.data.zero_()
    elif isinstance(m, nn.Embedding):
        m.weight.data.normal_(mean=0.0, std=0.02)
    elif isinstance(m, nn.LayerNorm):
        m.weight.data.fill_(1.0)
        m.bias.data.zero_()
    elif isinstance(m, Block):
        nn.init.constant_(m.scale, 0.5)
        nn.init.xavier_uniform_(m.up.weight)
        nn.init.kaiming_normal_(m.down.weight, nonlinearity="relu")
        nn.init.orthogonal_(m.qkv.weight)
    elif isinstance(m, Net):
        m.positions.normal_(std=0.5)


def on_blocks(fn: Callable[[Block], object]) -> Fn:
    def both(m: nn.Module) -> None:
        typical(m)
        if isinstance(m, Block):
            with torch.no_grad():
                fn(m)

    return both


def _temporaries(m: Block) -> None:
    bias, weight = torch.empty_like(m.up.bias).normal_(), torch.empty_like(m.up.weight).uniform_()
    other = torch.randn_like(m.down.weight)
    m.down.weight.copy_(other)  # used in another order than drawn
    m.up.weight.copy_(weight)
    m.up.bias.copy_(bias)


def _renewed(m: Block) -> None:
    m.up.weight.mul_(1)
    m.down.weight = nn.Parameter(torch.empty_like(m.down.weight))
    nn.init.normal_(m.down.weight)


def _keys(m: Block) -> None:
    key = fastinit.Key(3)
    fastinit.normal_(m.up.weight, generator=key.named("up"))
    fastinit.trunc_normal_(m.down.weight, generator=key)
    fastinit.orthogonal_(m.qkv.weight, generator=key)
    fastinit.uniform_(m.up.bias, generator=key)


def _default_device(m: Block) -> None:
    with torch.device("cpu"):
        nn.init.normal_(m.up.weight)
        nn.init.sparse_(m.down.weight, 0.5)


def _local(m: Block) -> None:
    part(m.up.weight).normal_()
    part(m.down.weight).uniform_()


def _columns(m: Block) -> None:
    m.up.weight[:, 1:].normal_()
    m.qkv.weight[:, 0].zero_()


def _transposed(m: Block) -> None:
    nn.init.xavier_uniform_(m.up.weight.t())
    nn.init.normal_(m.down.weight.unsqueeze(0))


# Of dimension 0, which all layouts of WAYS cut, nothing is sliced: torch would communicate.
WAYS: dict[str, Fn | None] = {
    "own": None,  # each module's own reset_parameters
    "typical": typical,
    "scaled": on_blocks(lambda m: m.down.weight.normal_().mul_(0.3)),
    "clamped": on_blocks(lambda m: nn.init.normal_(m.up.weight).clamp_(-1, 1).add_(m.up.weight)),
    "copied": on_blocks(lambda m: m.up.weight.copy_(nn.init.normal_(m.up.weight).clone())),
    "temporaries": on_blocks(_temporaries),
    "renewed": on_blocks(_renewed),
    "deep copy": on_blocks(lambda m: setattr(m, "down", copy.deepcopy(m.down))),
    "keys": on_blocks(_keys),
    "default device": on_blocks(_default_device),
    "local": on_blocks(_local),
    "columns": on_blocks(_columns),
    "transposed": on_blocks(_transposed),
}


def pad(m: nn.Module) -> None:
    """torch makes a row of a sharded weight a copy, for which it communicates."""
    typical(m)
    if isinstance(m, nn.Embedding):
        m.weight.data[1].zero_()


# ---- sharding ------------------------------------------------------------------------------------


def _fsdp(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in getattr(model, "layers", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _tp(model: nn.Module, mesh: DeviceMesh) -> None:
    assert isinstance(model, Net)
    tied = model.head.weight is model.embed.weight
    outside = {"embed": RowwiseParallel(), "head": ColwiseParallel(), "norm": SequenceParallel()}
    inside = {"qkv": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh, outside, src_data_rank=None)
    for block in model.layers:
        parallelize_module(block, mesh, inside, src_data_rank=None)
    if tied:  # by torch no more
        model.head.weight = model.embed.weight


def _placed(model: nn.Module, mesh: DeviceMesh, places: list[Any]) -> None:
    for m in model.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            last = [Shard(p.dim() - 1) if place is None else place for place in places]
            sharded = distribute_tensor(p.detach(), mesh, last, src_data_rank=None)
            setattr(m, name, nn.Parameter(sharded))


def _checkpointed(model: nn.Module, mesh: DeviceMesh) -> None:
    assert isinstance(model, Net)
    wrap: Any = checkpoint_wrapper
    for i, block in enumerate(model.layers):
        model.layers[i] = wrap(block)
    _fsdp(model, mesh)


def _fsdp_and_tp(model: nn.Module, mesh: DeviceMesh) -> None:
    _tp(model, mesh["tp"])
    _fsdp(model, mesh["dp"])


# On all ranks in a line, and on two times two.
LINE: dict[str, Callable[[nn.Module, DeviceMesh], None]] = {
    "fsdp": _fsdp,
    "tp": _tp,
    "last": functools.partial(_placed, places=[None]),
    "replicated": functools.partial(_placed, places=[Replicate()]),
    "checkpointed": _checkpointed,
}
GRID: dict[str, Callable[[nn.Module, DeviceMesh], None]] = {
    "fsdp x tp": _fsdp_and_tp,
    "hsdp": _fsdp,  # replicated x sharded
    "first x last": functools.partial(_placed, places=[Shard(0), None]),
    "first x first": functools.partial(_placed, places=[Shard(0), Shard(0)]),
}


class Case(NamedTuple):
    layout: str
    model: str
    way: str
    # "bfloat16": materialize_'s argument; "built": in bfloat16; "again": by init_model_, in float32
    kind: str = "float32"

    def __str__(self) -> str:
        return "-".join(self)


def cases(world: int) -> list[Case]:
    """Return few cases for two ranks, the group of the default run, and many for others."""
    kinds = ("float32", "bfloat16", "built", "again")
    if world == 2:
        found = [Case("fsdp", "zoo", "own", kind) for kind in ("float32", "again")]
        found += [Case("replicated", "zoo", "own"), Case("tp", "tied", "typical", "bfloat16")]
        found += [Case(layout, "net", "typical") for layout in ("fsdp", "tp", "checkpointed")]
        return found + [Case("fsdp", "net", way) for way in ("keys", "temporaries", "local")]
    zoos, nets = ["last"], ["fsdp", "tp", "checkpointed"]
    if world == 3:
        zoos += ["replicated"]
    if world == 4:
        zoos += ["hsdp", "first x last", "first x first"]
        nets = ["fsdp", "fsdp x tp", "hsdp"]
    found = [Case("fsdp", "zoo", "own", kind) for kind in kinds]
    found += [Case(zoos[-1], "zoo", "own", kind) for kind in kinds[1:]]
    found += [Case(layout, "zoo", "own") for layout in zoos]
    found += [Case("fsdp", "net", "typical", kind) for kind in kinds[1:]]
    for name in ("net", "uneven", "tiny", "tied"):
        found += [Case(layout, name, "typical") for layout in nets]
    of_ways = {1: (), 3: ("fsdp",), 4: ("fsdp x tp",)}[world]
    return found + [
        Case(layout, "net", way) for layout in of_ways for way in WAYS if way != "typical"
    ]


def built(case: Case, meshes: dict[str, DeviceMesh]) -> nn.Module:
    return cut(plain(case, "meta"), case, meshes)


def cut(model: nn.Module, case: Case, meshes: dict[str, DeviceMesh]) -> nn.Module:
    if case.layout in GRID:
        GRID[case.layout](model, meshes["grid"])
    else:
        LINE[case.layout](model, meshes["line"])
    return model


def plain(case: Case, device: str) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if case.kind == "built" else torch.float32)
    try:
        with torch.device(device):
            return MODELS[case.model]()
    finally:
        torch.set_default_dtype(before)


def ruler(case: Case, meshes: dict[str, DeviceMesh]) -> dict[str, Tensor]:
    """By name, the index that each element of this rank's memory has in the whole."""
    model = plain(case._replace(kind="float32"), "cpu")
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.copy_(torch.arange(t.numel()).view(t.shape))
    return {name: part(t).detach().long() for name, t in tensors(cut(model, case, meshes))}


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, t in model.named_parameters(remove_duplicate=False):
        yield name.replace("_checkpoint_wrapped_module.", ""), t
    yield from model.named_buffers()


def part(t: Tensor) -> Tensor:
    """What is in this rank's memory."""
    return t._local_tensor if isinstance(t, DTensor) else t


def bits(t: Tensor) -> NDArray[Any]:
    t = t.detach().contiguous().flatten()
    found: NDArray[Any] = t.view(torch.int16 if t.dtype == torch.bfloat16 else torch.int32).numpy()
    return found


# ---- ranks ---------------------------------------------------------------------------------------

Piece = tuple[NDArray[Any], NDArray[Any]]  # indices in the whole, bits


class Result(NamedTuple):
    """What a rank of a group saw."""

    pieces: dict[Case, dict[str, Piece] | str]  # str: what was raised
    collectives: int  # that ran while everything was materialised
    seen: int  # that ran when one parameter was gathered; such would have been counted
    generators: bool  # those of torch are as they were
    padded: tuple[dict[str, Piece], str]
    row: NDArray[Any]  # of embed.weight, read before the end
    losses: list[float]
    growth: dict[str, float]  # of peak memory, in MiB
    wrapped: dict[str, dict[str, NDArray[Any]]]


def everything(rank: int, world: int, folder: str) -> Result:
    torch.manual_seed(5)
    torch.randn(3)
    meshes = {"line": init_device_mesh("cpu", (world,))}
    if world == 4:
        meshes["grid"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    models = {case: built(case, meshes) for case in cases(world)}
    rulers: dict[tuple[str, str], dict[str, Tensor]] = {}
    pieces: dict[Case, dict[str, Piece] | str] = {}
    with turn(rank, world, folder):
        before, state = collectives(), torch.get_rng_state()
        failures = {case: materialised(case, model) for case, model in models.items()}
        ran = collectives() - before
        unchanged = torch.equal(torch.get_rng_state(), state)
    for case, model in models.items():
        where = rulers.get(case[:2]) or rulers.setdefault(case[:2], ruler(case, meshes))
        pieces[case] = failures[case] or pieces_of(model, where)
    before = collectives()
    weight: Any = models[Case("fsdp", "net", "typical")].get_parameter("embed.weight")
    weight.full_tensor()
    return Result(
        pieces,
        ran,
        collectives() - before,
        unchanged,
        padded(meshes),
        read_early(meshes),
        training(meshes),
        growth(meshes["line"]) if world == 4 else {},
        wrapped() if world == 1 else {},
    )


@contextmanager
def turn(rank: int, world: int, folder: str) -> Iterator[None]:
    """One rank after the other. One that wanted to communicate would wait in vain."""
    c10d: Any = dist
    store = c10d.FileStore(str(Path(folder, f"turns of {world}")), world)
    patience = timedelta(seconds=PATIENCE)
    if rank > 0:
        store.wait([f"{rank - 1}"], patience)
    yield
    store.set(f"{rank}", "")
    store.wait([f"{world - 1}"], patience)


def collectives() -> int:
    """How many this process has taken part in, in any group."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def materialised(case: Case, model: nn.Module) -> str:
    dtype = torch.bfloat16 if case.kind == "bfloat16" else None
    fn = WAYS[case.way]
    try:
        if case.kind == "again":
            fastinit.materialize_(model, fn=fn, seed=SEED + 1)
            fastinit.init_model_(model, fn, SEED)
        else:
            fastinit.materialize_(model, dtype=dtype, fn=fn, seed=SEED)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def pieces_of(model: nn.Module, where: dict[str, Tensor]) -> dict[str, Piece]:
    found = {}
    for name, t in tensors(model):
        here = part(t)
        if here.is_meta or here.shape != where[name].shape:
            raise AssertionError(f"{name}: {here.shape} on {here.device}, {where[name].shape}")
        found[name] = where[name].flatten().numpy(), bits(here)
    return found


def padded(meshes: dict[str, DeviceMesh]) -> tuple[dict[str, Piece], str]:
    """Of a function that zeroes a row; or what was raised."""
    case = Case("fsdp", "net", "typical")
    model = built(case, meshes)
    try:
        fastinit.materialize_(model, fn=pad, seed=SEED)
    except Exception as error:
        return {}, f"{type(error).__name__}: {error}"
    return pieces_of(model, ruler(case, meshes)), ""


def read_early(meshes: dict[str, DeviceMesh]) -> NDArray[Any]:
    rows: list[Any] = []

    def fn(m: nn.Module) -> None:
        typical(m)
        if isinstance(m, nn.Embedding):
            rows.append(m.weight.detach().select(0, 1).clone())

    for _ in range(2):  # torch looks at the memory itself only when it does this for the first time
        fastinit.materialize_(built(Case("fsdp", "net", "typical"), meshes), fn=fn, seed=SEED)
    return bits(rows[-1].full_tensor())


def training(meshes: dict[str, DeviceMesh] | None = None, steps: int = 3) -> list[float]:
    """Losses, the same batch on all ranks."""
    case = Case("fsdp", "net", "typical")
    model = plain(case, "meta") if meshes is None else built(case, meshes)
    fastinit.materialize_(model, fn=typical, seed=SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(24).view(6, 4) * 5 % 13
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return losses


ROWS = 1 << 12  # 64 MiB in float32


def growth(mesh: DeviceMesh) -> dict[str, float]:
    """Of a rank's peak memory, in MiB, while it materialises a quarter of 64 MiB."""
    if not can_reset_peak():
        return {}
    found = {}
    for law, layout in (("normal_", "fsdp"), ("trunc_normal_", "fsdp"), ("uniform_", "last")):
        model = nn.Linear(ROWS, ROWS, bias=False, device="meta")
        LINE[layout](model, mesh)
        fill = functools.partial(fastinit.materialize_, model, fn=_filling(law), seed=SEED)
        found[f"{law} {layout}"] = grown(fill)
    found["waste"] = grown(lambda: torch.ones(ROWS * ROWS))
    return found


def _filling(law: str) -> Fn:
    return lambda m: getattr(nn.init, law)(m.weight)


def grown(function: Callable[[], object]) -> float:
    gc.collect()
    can_reset_peak()
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def can_reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") > 0
    except (OSError, StopIteration):
        return False


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


def wrapped() -> dict[str, dict[str, NDArray[Any]]]:
    """Parameters of models inside what others put around them, by the names they had before."""
    ddp: Any = nn.parallel.DistributedDataParallel
    checkpoint: Any = checkpoint_wrapper
    fsdp: Any = FullyShardedDataParallel
    wrappers: dict[str, Callable[[Any], Any]] = {
        "DDP": ddp,
        "compile": torch.compile,
        "checkpoint": checkpoint,
        "DDP of compile": lambda m: ddp(torch.compile(m)),
        "compile of DDP of checkpoint": lambda m: torch.compile(ddp(checkpoint(m))),
        "FSDP": lambda m: fsdp(m, use_orig_params=True, device_id=torch.device("cpu")),
    }
    found = {}
    for kind, wrap in wrappers.items():
        model: Any = plain(Case("", "net", ""), "cpu")
        names = [name for name, _ in tensors(model)]
        for i, block in enumerate(model.layers):
            model.layers[i] = checkpoint(block)
        fastinit.init_model_(wrap(model), typical, SEED)
        found[kind] = dict(zip(names, (bits(t) for _, t in tensors(model))))
    return found
