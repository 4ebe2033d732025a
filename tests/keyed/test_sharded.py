# SPDX-License-Identifier: BSD-3-Clause
"""Keyed numbers of sharded models: on 1 to 4 gloo ranks those of the model in one process.

tests/support/sharded_models.py has the models and what the ranks do, all of it in one group for
each size: of two by default, of 1, 3 and 4 in the slow run.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

import fastinit
from tests.support import gloo
from tests.support.marks import slow_but

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

from tests.support import sharded_models as sharded
from tests.support.sharded_models import MODELS, SEED, WAYS, Case, Result, bits

WORLDS = (1, 2, 3, 4)
SECONDS = 300
each_world = pytest.mark.parametrize("world", slow_but(WORLDS, 2))
NETS = [name for name in MODELS if name != "zoo"]
Wholes = dict[str, NDArray[Any]]


def results(world: int) -> list[Result]:
    found = attempt(world)
    if isinstance(found, Exception):
        raise found
    return found


@functools.cache
def attempt(world: int) -> list[Result] | Exception:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return gloo.run(sharded.everything, world, world, folder, seconds=SECONDS)
        except (RuntimeError, TimeoutError) as error:
            return error


@functools.cache
def whole(model: str, way: str, kind: str = "float32") -> Wholes:
    """In one process, in plain tensors."""
    case = Case("", model, way, "built" if kind in ("bfloat16", "built") else "float32")
    made = sharded.plain(case, "cpu")
    fastinit.init_model_(made, WAYS[way], SEED)
    return state(made)


def state(model: nn.Module) -> Wholes:
    return {name: bits(t) for name, t in sharded.tensors(model)}


def assert_same(found: Wholes, expected: Wholes) -> None:
    assert found.keys() == expected.keys()
    wrong = {
        name: f"{(found[name] != expected[name]).sum()} of {expected[name].size}"
        for name in expected
        if not np.array_equal(found[name], expected[name])
    }
    assert not wrong


def assert_pieces(pieces: Sequence[dict[str, sharded.Piece]], expected: Wholes) -> None:
    """Each is what stands at its place in the whole, and together they are all of it."""
    wrong = []
    for name, values in expected.items():
        covered = np.zeros(values.size, bool)
        for rank, (where, there) in enumerate(piece[name] for piece in pieces):
            covered[where] = True
            differ = int((values[where] != there).sum())
            if differ:
                wrong.append(f"{name}: {differ} of {where.size} on rank {rank}")
        assert covered.all(), name
    assert not wrong


# ---- the same numbers


ALL = [
    pytest.param(world, case, id=f"{world}-{case}", marks=[pytest.mark.slow] * (world != 2))
    for world in WORLDS
    for case in sharded.cases(world)
]


@pytest.mark.parametrize(("world", "case"), ALL)
def test_values(world: int, case: Case) -> None:
    found = [rank.pieces[case] for rank in results(world)]
    raised = {piece for piece in found if isinstance(piece, str)}
    assert not raised
    assert_pieces(found, whole(case.model, case.way, case.kind))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "way"), [("zoo", "own"), *((name, "typical") for name in NETS)])
def test_one_process(name: str, way: str) -> None:
    expected, fn = whole(name, way), WAYS[way] or own
    for dtype in (None, torch.float32):
        model = sharded.plain(Case("", name, way), "meta")
        fastinit.materialize_(model, dtype=dtype, fn=fn, seed=SEED)
        assert_same(state(model), expected)
    with fastinit.fused(seed=SEED):
        model = MODELS[name]()
        model.apply(fn)  # type: ignore[arg-type]
    assert_same(state(model), expected)


def own(m: Any) -> None:
    if hasattr(m, "reset_parameters"):
        m.reset_parameters()


@pytest.mark.parametrize("way", ["own", "typical", "default device"])
def test_default_device(way: str) -> None:
    """A function mode, through which torch looks at memory by other ways."""
    model = sharded.plain(Case("", "net", way), "meta")
    with torch.device("cpu"):
        fastinit.materialize_(model, fn=WAYS[way] or own, seed=SEED)
    assert_same(state(model), whole("net", way))


@pytest.mark.parametrize(("name", "way"), [("zoo", "own"), ("net", "typical")])
def test_bfloat16_is_rounded(name: str, way: str) -> None:
    single, half = whole(name, way), whole(name, way, "built")
    for key, values in single.items():
        rounded = torch.from_numpy(values).view(torch.float32).bfloat16()
        assert np.array_equal(bits(rounded), half[key]), key


# ---- what else must (not) happen


@each_world
def test_no_collectives(world: int) -> None:
    """Besides, each rank had its turn while the others were waiting."""
    for rank in results(world):
        assert rank.collectives == 0
        assert rank.seen > 0 or world == 1


@each_world
def test_torchs_generators_stay(world: int) -> None:
    assert all(rank.generators for rank in results(world))


@each_world
def test_rows_are_written_or_refused(world: int) -> None:
    """torch gathers a row that one rank has and drops what is written to it."""
    found = [rank.padded for rank in results(world)]
    if any(failure for _, failure in found):
        assert all(failure for _, failure in found)
        return
    expected = dict(whole("net", "typical"))
    expected["embed.weight"] = expected["embed.weight"].copy()
    expected["embed.weight"].reshape(13, 6)[1] = 0
    assert_pieces([pieces for pieces, _ in found], expected)


@each_world
def test_rows_are_read_when_written(world: int) -> None:
    """A view of a row that another rank has is a copy, made at once."""
    expected = whole("net", "typical")["embed.weight"].reshape(13, 6)[1]
    for rank in results(world):
        assert np.array_equal(rank.row, expected)


@each_world
def test_training(world: int) -> None:
    alone = sharded.training()
    losses = [rank.losses for rank in results(world)]
    assert all(other == losses[0] for other in losses)
    assert losses[0][0] == alone[0]
    assert losses[0] == pytest.approx(alone, rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    if world == 1:  # a mean of two equal gradients is exact
        assert losses[0] == results(2)[0].losses


@pytest.mark.slow
def test_memory() -> None:
    for rank in results(4):
        if not rank.growth:
            pytest.skip("the peak of memory cannot be reset here")
        growth = dict(rank.growth)
        assert growth.pop("waste") > 60
        assert max(growth.values()) < 16 + 8, growth


@pytest.mark.slow
def test_wrapped_models() -> None:
    found = results(1)[0].wrapped
    assert len(found) >= 6
    for name, values in found.items():
        assert values.keys() == whole("net", "typical").keys(), name
        assert_same(values, whole("net", "typical"))


# ---- stages of a pipeline


def test_stages_with_the_names_of_the_whole() -> None:
    expected = whole("net", "typical")
    found: Wholes = {}
    for kept in ((0, 1), (2,)):
        model: Any = sharded.plain(Case("", "net", ""), "meta")
        blocks = {str(i): model.layers[i] for i in kept}
        model.layers = nn.ModuleDict(blocks)
        if 0 in kept:
            model.norm = model.head = None
        else:
            model.embed = None
            del model.positions
        fastinit.materialize_(model, fn=typical_of_parts, seed=SEED)
        found |= state(model)
    assert_same({name: found[name] for name in expected}, expected)


def typical_of_parts(m: nn.Module) -> None:
    if not isinstance(m, sharded.Net) or hasattr(m, "positions"):
        sharded.typical(m)


@pytest.mark.parametrize("way", ["init", "materialize", "fused", "record"])
def test_stages_with_a_prefix(way: str) -> None:
    expected = whole("net", "typical")
    found: Wholes = {}
    for i in range(3):
        prefix = f"layers.{i}."
        with torch.device("meta" if way == "materialize" else "cpu"):
            block = sharded.Block(6, 10)
        if way == "init":
            fastinit.init_model_(block, sharded.typical, SEED, prefix=prefix)
        elif way == "materialize":
            fastinit.materialize_(block, fn=sharded.typical, seed=SEED, prefix=prefix)
        elif way == "fused":
            with fastinit.fused(seed=SEED, prefix=prefix):
                block = sharded.Block(6, 10)
                block.apply(sharded.typical)
        else:
            fastinit.record(block, sharded.typical).run(seed=SEED, prefix=prefix)
        found |= {prefix + name: values for name, values in state(block).items()}
    with torch.device("meta"):
        last = nn.ModuleDict({"2": sharded.Block(6, 10)})
    fastinit.materialize_(last, fn=sharded.typical, seed=SEED, prefix="layers.")
    found |= {f"layers.{name}": values for name, values in state(last).items()}
    assert_same(found, {name: v for name, v in expected.items() if name.startswith("layers.")})


@pytest.mark.parametrize("way", ["init", "materialize"])
def test_inside_a_block(way: str) -> None:
    """It joins the block, but names are those of the model."""
    with torch.device("meta" if way == "materialize" else "cpu"):
        model = MODELS["net"]()
    with fastinit.fused(seed=SEED):
        if way == "init":
            fastinit.init_model_(model, sharded.typical, SEED)
        else:
            fastinit.materialize_(model, fn=sharded.typical, seed=SEED)
    assert_same(state(model), whole("net", "typical"))


# ---- raw parts: a whole that is tiled, as by hand-written tensor parallelism


def chunks(n: int, count: int) -> list[tuple[int, int]]:
    """Begin and size of each, as torch.chunk: the last are smaller or empty."""
    size = -(-n // count)
    return [(min(i * size, n), max(0, min(size, n - i * size))) for i in range(count)]


def tiles(shape: Sequence[int], grid: Sequence[int]) -> list[tuple[tuple[int, ...], ...]]:
    """Offsets and shapes."""
    ways = [chunks(n, count) for n, count in zip(shape, itertools.chain(grid, itertools.repeat(1)))]
    return [tuple(zip(*tile)) for tile in itertools.product(*ways)]


TILED: list[tuple[str, tuple[Any, ...], tuple[int, ...]]] = [
    ("kaiming_uniform_", (), (10, 7)),
    ("kaiming_normal_", (0, "fan_out", "relu"), (10, 7)),
    ("kaiming_uniform_", (0.3, "fan_out"), (6, 5, 3, 3)),
    ("xavier_uniform_", (1.5,), (9, 4)),
    ("xavier_normal_", (), (5, 3, 2)),
    ("orthogonal_", (), (6, 10)),
    ("orthogonal_", (2.0,), (10, 6)),
    ("orthogonal_", (), (8, 3, 2)),
    ("orthogonal_batched_", (), (4, 5, 3)),
    ("sparse_", (0.4,), (9, 7)),
    ("trunc_normal_", (0.0, 0.02, -0.03, 0.04), (11, 6)),
    ("normal_", (), (3, 13)),
]
GRIDS = [(2, 1), (1, 2), (3, 1), (1, 4), (2, 2), (3, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "args", "shape"), TILED, ids=str)
def test_tiles(
    name: str, args: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    function: Callable[..., Any] = getattr(fastinit, name)
    whole = fastinit.Key(SEED, "layers.0.w")
    expected = function(torch.empty(shape, dtype=dtype), *args, generator=whole)
    for turn, grid in enumerate(GRIDS):
        found = torch.full(shape, 13.0, dtype=dtype)
        for offset, size in tiles(shape, grid):
            key = whole.part(shape, offset)
            if turn % 3 == 0:
                tile: torch.Tensor = nn.Parameter(torch.full(size, 13.0, dtype=dtype))
                function(tile, *args, generator=key)
            elif turn % 3 == 1:
                with fastinit.fused():
                    tile = torch.empty(size, dtype=dtype)
                    function(tile, *args, generator=key)
            else:  # where it belongs
                tile = found[tuple(slice(o, o + n) for o, n in zip(offset, size))]
                function(tile, *args, generator=key)
            found[tuple(slice(o, o + n) for o, n in zip(offset, size))] = tile.detach()
        assert np.array_equal(bits(found), bits(expected)), grid
