# SPDX-License-Identifier: BSD-3-Clause
"""Slices of sharded parameters with a seed: each rank writes its part of what the unsharded program
writes. On fake ranks, one after the other, where nothing could be communicated; and on gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastinit
from tests.support import gloo

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support import sliced_models as sliced
from tests.support.sliced_models import SEED, WAYS, Sliced

R, S0, S1 = Replicate(), Shard(0), Shard(-1)
LAYOUTS: list[tuple[tuple[int, ...], list[Any]]] = [
    ((2,), [S0]),
    ((2,), [S1]),
    ((2,), [R]),
    ((3,), [S0]),
    ((2, 2), [S0, S1]),
    ((2, 2), [R, S0]),
    ((2, 2), [_StridedShard(0, split_factor=2), S0]),
]
each_layout = pytest.mark.parametrize(("shape", "places"), LAYOUTS, ids=str)


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@each_layout
@pytest.mark.parametrize("way", WAYS)
def test_each_rank_writes_its_part(way: str, shape: tuple[int, ...], places: list[Any]) -> None:
    ranks = 1
    for n in shape:
        ranks *= n
    expected = sliced.whole(way)
    seen = {name: torch.zeros(t.numel(), dtype=torch.bool) for name, t in expected.items()}
    for rank in range(ranks):
        with as_rank(rank, ranks):
            names = tuple(f"{rank}{i}" for i in range(len(shape)))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            where = sliced.rulers(mesh, places)
            model = sliced.cut(Sliced(), mesh, places)
            for p in model.parameters():
                sliced.local(p).fill_(13)
            if rank % 2 == 0:
                fastinit.init_model_(model, sliced.on_model(way), SEED)
            else:
                model = sliced.cut(Sliced().to("meta"), mesh, places)
                with pytest.warns(UserWarning, match="not initialised completely"):
                    fastinit.materialize_(model, fn=sliced.on_model(way), seed=SEED)
            for name, t in expected.items():
                here = sliced.local(model.get_parameter(name))
                assert torch.equal(here, t.flatten()[where[name]]), (name, rank)
                seen[name][where[name]] = True
    assert all(bool(covered.all()) for covered in seen.values())
    assert seen


# ---- reads, for which all ranks communicate


def reading(m: Any) -> list[Tensor]:
    """Slices that are read are those of the whole, whenever."""
    found = []

    def note(t: Tensor) -> None:
        found.append((t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone())

    m.table.normal_()
    m.gates.uniform_()
    first, later = m.table[:3], m.table[1:5]
    note(first.sum())
    first[0].fill_(2)
    note(first.std())
    note(later)
    m.table[4].copy_(m.table[7])
    m.table[6].add_(m.gates[3].sum())
    m.table[2:4].mul_(m.table[5])
    note(torch.stack([row.mean() for row in m.table.unbind()]))
    return found


def read_on_ranks(rank: int, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,))
    results: dict[str, Any] = {}
    for kind in ("plain", "fsdp", "first", "last"):
        model: Any = Sliced()
        if kind == "fsdp":
            fully_shard(model, mesh=mesh)
        elif kind != "plain":
            sliced.cut(model, mesh, [S0 if kind == "first" else S1])
        found: list[Tensor] = []

        def fn(m: Any, found: list[Tensor] = found) -> None:
            with torch.no_grad():
                found += reading(m) if isinstance(m, Sliced) else []

        fastinit.init_model_(model, fn, SEED)
        whole = model.table.detach()
        found.append(whole.full_tensor() if hasattr(whole, "full_tensor") else whole)
        results[kind] = [t.numpy() for t in found]
    return results


def check_reads(results: dict[str, Any]) -> None:
    plain = results.pop("plain")
    for kind, found in results.items():
        assert len(found) == len(plain)
        for i, (a, b) in enumerate(zip(found, plain)):
            assert a == pytest.approx(b, rel=1e-6), (kind, i)


@pytest.fixture
def alone() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_reads(alone: Any) -> None:
    check_reads(read_on_ranks(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_reads_on_ranks(ranks: int) -> None:
    for results in gloo.run(read_on_ranks, ranks, ranks):
        check_reads(results)


def outliving(rank: int, ranks: int) -> list[bool]:
    mesh = init_device_mesh("cpu", (ranks,))
    table = distribute_tensor(torch.zeros(8, 9), mesh, [S0])
    with pytest.warns(UserWarning, match="1 slices .* neither read nor written"):  # noqa: PT031, SIM117
        with fastinit.fused(seed=SEED):
            part = table[2:5]
            view, row = part.to_local(), part[1]
            fastinit.normal_(table)
            row.sum()
            written = table[6:]
            written.fill_(1)
    expected = table.full_tensor()
    return [
        bool(part.full_tensor().isnan().all()),
        bool(view.isnan().all()),
        torch.equal(row.full_tensor(), expected[3]),
        bool(expected.all()),
    ]


@pytest.mark.slow
def test_slices_that_outlive_the_scope() -> None:
    """They stand for nothing any more, and have values only if something has read them."""
    assert gloo.run(outliving, 2, 2) == [[True] * 4] * 2


def test_what_is_refused() -> None:
    with as_rank(1, 2):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("refused",))
        table = distribute_tensor(torch.ones(8, 9), mesh, [S0], src_data_rank=None)
        with fastinit.fused(seed=SEED):
            with pytest.raises(RuntimeError, match="copy_ that to the slice"):
                table[1].cumsum_(0)
            with pytest.raises(RuntimeError, match="copy_ that to the slice"):
                table[1:3].t_()
            with pytest.raises(RuntimeError, match="write to slices, or to the whole tensor"):
                table.view(-1)[5:17].fill_(2)
            with pytest.raises(IndexError):
                table[8]
            with pytest.raises(RuntimeError):
                table.view(5, -1)
        assert (sliced.local(table) == 1).all()
