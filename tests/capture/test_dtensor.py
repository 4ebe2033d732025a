# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(), without a seed: DTensors get what torch's own random path gives each rank.

Every case runs eagerly and in a scope on each rank of a gloo group: two by default, four in the
slow run. What it returns is compared as everywhere: bits, versions, aliasing, warnings, exceptions
and generators, of which each rank has its own.
"""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastinit
from tests.support import gloo
from tests.support.marks import slow_but
from tests.support.scopes import compare

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.support import sharded_models as sharded

ROWS, COLUMNS = 301, 160  # rows that 2 and 4 ranks do not divide; each has enough of them to wait
Case = Callable[[DeviceMesh], Any]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def whole(t: Any) -> Any:
    """What there is to see of a DTensor, and what it is on this rank."""
    told = t._version, t.requires_grad, str(t.placements), list(t.shape), list(t.stride())
    return (*told, t._local_tensor)


def sharded_empty(mesh: DeviceMesh, *shape: int, dim: int = 0, **kwargs: Any) -> Any:
    places = [Shard(dim), *([Replicate()] * (mesh.ndim - 1))]
    return torch.distributed.tensor.empty(*shape, device_mesh=mesh, placements=places, **kwargs)


def weight(mesh: DeviceMesh, *shape: int, dim: int = 0) -> Any:
    return nn.Parameter(sharded_empty(mesh, *(shape or (ROWS, COLUMNS)), dim=dim))


# ---- fills ---------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "uniform_": (-0.3, 0.7),
    "normal_": (0.1, 0.5),
    "trunc_normal_": (0.0, 0.02),
    "constant_": (3.5,),
    "zeros_": (),
    "ones_": (),
    "xavier_uniform_": (1.5,),
    "xavier_normal_": (),
    "kaiming_uniform_": (5**0.5,),
    "kaiming_normal_": (0, "fan_out", "relu"),
    "orthogonal_": (),
    "eye_": (),
    "sparse_": (0.3,),
}


@case
def functions(mesh: DeviceMesh) -> Any:
    found = []
    for name, args in FUNCTIONS.items():
        p = weight(mesh)
        try:
            getattr(nn.init, name)(p, *args)
        except (RuntimeError, NotImplementedError) as error:  # torch's own, of eye_ and sparse_
            found.append(f"{name}: {error}"[:60])
        else:
            found.append(whole(p))
    return found


@case
def truncated_normals_that_reject(mesh: DeviceMesh) -> Any:
    """As often as this rank's own part makes it: torch does not ask the others."""
    p, q = weight(mesh), weight(mesh)
    nn.init.trunc_normal_(p, 0.0, 1.0, -1.0, 1.5)
    nn.init.trunc_normal_(q, 0.0, 1.0, 1.0, 2.0)
    return whole(p), whole(q)


@case
def places_and_shapes(mesh: DeviceMesh) -> Any:
    """Also of ranks that have nothing of it."""
    found = []
    for shape in ((1, 20_000), (20_000,), (3,), (), (0, 5), (ROWS, 9, 7), (2, 2, 9000)):
        for place in (*map(Shard, range(len(shape))), Replicate()):
            places = [place, *([Replicate()] * (mesh.ndim - 1))]
            t: Any = torch.distributed.tensor.empty(shape, device_mesh=mesh, placements=places)
            found += [whole(t.normal_(0.0, 2.0)), whole(torch.empty_like(t).uniform_())]
            found += [whole(torch.empty_like(t).fill_(2.0)), whole(torch.empty_like(t).zero_())]
    return found


@case
def dtypes(mesh: DeviceMesh) -> Any:
    found = []
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        t = sharded_empty(mesh, ROWS, COLUMNS, dtype=dtype)
        found += [whole(t.normal_()), whole(torch.empty_like(t).uniform_(-1, 1))]
    return found


@case
def ways_to_a_part(mesh: DeviceMesh) -> Any:
    p, q, r, s = (weight(mesh) for _ in range(4))
    p.data.normal_()
    q.detach().uniform_()
    r.to_local().detach().normal_()
    s._local_tensor.zero_()
    nn.init.normal_(p[:, 20:])
    nn.init.uniform_(q.t())
    with torch.no_grad():
        r[:, 3].fill_(2.0)
        s.view(ROWS, 4, 40).normal_()
    return [whole(t) for t in (p, q, r, s)]


@case
def columns(mesh: DeviceMesh) -> Any:
    p, q = weight(mesh, dim=1), weight(mesh, dim=1)
    nn.init.kaiming_uniform_(p)
    nn.init.normal_(q)
    nn.init.normal_(p[40:])
    return whole(p), whole(q)


@case
def generators(mesh: DeviceMesh) -> Any:
    """torch 2.13 draws from the default one, whichever it is given."""
    g = torch.Generator()
    g.manual_seed(5)
    t = sharded_empty(mesh, ROWS, COLUMNS).normal_(generator=g)
    state = torch.get_rng_state()
    u = torch.empty_like(t).uniform_(generator=g)
    return whole(t), whole(u), g, state


# ---- what they do together with others -----------------------------------------------------------


@case
def overwritten(mesh: DeviceMesh) -> Any:
    p = weight(mesh)
    nn.init.normal_(p)
    nn.init.zeros_(p)
    nn.init.uniform_(p)
    torch.empty_like(p).normal_()
    return whole(p)


@case
def pointwise(mesh: DeviceMesh) -> Any:
    p, q = weight(mesh), weight(mesh)
    with torch.no_grad():
        p.normal_().mul_(0.3).add_(p).clamp_(-1, 1)
        q.uniform_().add_(p.normal_())
    return whole(p), whole(q), whole(p.data * 2), whole(p.data.to(torch.bfloat16))


@case
def copies(mesh: DeviceMesh) -> Any:
    p, q = weight(mesh), weight(mesh)
    nn.init.normal_(p)
    other = copy.deepcopy(p)
    with torch.no_grad():
        q.copy_(p)
        twin = p.clone()
        nn.init.uniform_(p)
        likes = [torch.zeros_like(p), torch.randn_like(p), torch.rand_like(p), p.new_zeros(3, 9000)]
        torch._foreach_mul_([q, twin], 0.5)
    return [whole(t) for t in (p, q, other, twin, *likes)]


@case
def reads(mesh: DeviceMesh) -> Any:
    p, waits = weight(mesh), weight(mesh)
    nn.init.normal_(p)
    nn.init.normal_(waits)
    gathered = p.full_tensor()
    replicated = p.detach().redistribute(mesh, [Replicate()] * mesh.ndim)
    listed = p.to_local()[0].tolist()
    array = waits._local_tensor.numpy().copy()
    return gathered, whole(replicated), listed, array, whole(p), p.sum().full_tensor().item()


@case
def distributed(mesh: DeviceMesh) -> Any:
    """What other ranks get of what waits here."""
    t = torch.empty(ROWS, COLUMNS).normal_()
    places = [Shard(0), *([Replicate()] * (mesh.ndim - 1))]
    p = distribute_tensor(t, mesh, places)
    q: Any = DTensor.from_local(torch.empty(200, 100).uniform_(), mesh, places)
    r = q.clone()
    q.normal_()
    return whole(p), whole(q), whole(r), t


@case
def refused(mesh: DeviceMesh) -> Any:
    p = weight(mesh)
    partial: Any = DTensor.from_local(torch.zeros(200, 100), mesh, [Partial()] * mesh.ndim)
    calls: list[Callable[[], Any]] = [
        lambda: p.normal_(),  # a leaf
        lambda: p.data.normal_(0.0, -1.0),
        lambda: p.data.uniform_(2.0, 1.0),
        lambda: p.data.fill_(1j),
        lambda: p.data.fill_(torch.tensor(2.0)),
        lambda: p.data.random_(),
        lambda: partial.normal_(),
        lambda: partial.fill_(2.0),
    ]
    found: list[Any] = []
    for call in calls:
        try:
            call()
            found.append("done")
        except (RuntimeError, NotImplementedError) as error:
            found.append(str(error)[:100])
    return found, p._version, whole(partial.zero_())


@case
def inference(mesh: DeviceMesh) -> Any:
    with torch.inference_mode():
        t = sharded_empty(mesh, ROWS, COLUMNS)
        nn.init.normal_(t)
        u = sharded_empty(mesh, ROWS, COLUMNS).uniform_().contiguous()
    return t._local_tensor, u._local_tensor


# ---- models --------------------------------------------------------------------------------------


def seen(model: nn.Module) -> dict[str, Any]:
    return {name: whole(t) if isinstance(t, DTensor) else t for name, t in sharded.tensors(model)}


def larger(layout: str) -> nn.Module:
    with torch.device("meta"):
        model = sharded.Net(401, 96, 300)
    line: Any = sharded.LINE[layout]
    line(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


@case
def fully_sharded(mesh: DeviceMesh) -> Any:
    model = larger("fsdp").to_empty(device="cpu")
    model.apply(sharded.typical)
    return seen(model)


@case
def fully_sharded_and_trained(mesh: DeviceMesh) -> Any:
    model = larger("fsdp").to_empty(device="cpu")
    model.apply(sharded.typical)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for _ in range(1):
        loss = model(torch.arange(12).view(3, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: t._local_tensor for name, t in model.named_parameters()}, loss


@case
def own_reset(mesh: DeviceMesh) -> Any:
    model = larger("fsdp").to_empty(device="cpu")
    for m in model.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    return seen(model)


@case
def tensor_parallel(mesh: DeviceMesh) -> Any:
    model = larger("tp").to_empty(device="cpu")
    model.apply(sharded.typical)
    return seen(model)


@case
def grid(mesh: DeviceMesh) -> Any:
    """Strided shards, replicated shards, dimensions that two dimensions of the mesh cut."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = []
    for cut in sharded.GRID.values():
        with torch.device("meta"):
            model = sharded.Net(401, 96, 300)
        cut(model, both)
        model.to_empty(device="cpu")
        model.apply(sharded.typical)
        found.append(seen(model))
    return found


LARGE = {"grid": (4,), "fully_sharded_and_trained": (1, 4)}  # on how many ranks only


# ---- ranks ---------------------------------------------------------------------------------------


class Result(NamedTuple):
    failures: dict[str, str]
    counts: dict[str, int]  # of elements, by the report


def everything(rank: int, world: int) -> Result:
    mesh = init_device_mesh("cpu", (world,))
    names = [name for name in CASES if world in LARGE.get(name, (world,))]
    return Result({name: attempt(CASES[name], mesh, world) for name in names}, counted(mesh))


def attempt(function: Case, mesh: DeviceMesh, world: int) -> str:
    """What differs, if something does."""

    def case(scope: Any) -> Any:
        return function(mesh)

    case.__name__ = function.__name__
    try:
        compare(case, "as users have it")
        if world != 2:
            compare(case, "inside")
    except Exception:
        return traceback.format_exc()
    return ""


def counted(mesh: DeviceMesh) -> dict[str, int]:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(304, 640), nn.Linear(640, 304))  # torch pads others
    sharded.LINE["fsdp"](model, mesh)
    with fastinit.fused() as both:
        model.to_empty(device="cpu")
        for m in model:
            m.reset_parameters()
        nn.init.xavier_normal_(model[1].weight)
    with fastinit.fused() as older:
        for m in model:
            m.reset_parameters()
    large = [model[0].weight, model[1].weight]
    return {
        "large": sum(p._local_tensor.numel() for p in large),
        "written": both.written_elements,
        "dropped": both.dropped_elements,
        "read early": len(both.early),
        "older": older.written_elements + older.at_once_elements,
        "last": large[1]._local_tensor.numel(),
    }


@functools.cache
def results(world: int) -> list[Result]:
    return gloo.run(everything, world, world, seconds=300)


WORLDS = slow_but((1, 2, 4), 2)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_same_as_eager(name: str, world: int) -> None:
    if world not in LARGE.get(name, (world,)):
        pytest.skip("in the slow run, on other ranks")
    for rank, found in enumerate(results(world)):
        assert not found.failures[name], f"rank {rank}: {found.failures[name]}"


@pytest.mark.parametrize("world", WORLDS)
def test_written_natively(world: int) -> None:
    for found in results(world):
        counts = found.counts
        assert counts["written"] == counts["large"] == counts["older"]
        assert counts["dropped"] == counts["last"]
        assert counts["read early"] == 0
