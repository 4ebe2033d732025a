# SPDX-License-Identifier: BSD-3-Clause
"""seed=: scopes in scopes, threads, exceptions, and torch's generators beside."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
import torch
import torch.nn.init as torch_init
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.init import kaiming_uniform_ as kaiming_bound_early
from torch.nn.init import trunc_normal_ as trunc_bound_early

import fastinit
from fastinit import Key, fused, init_model_, materialize_, record
from tests.support.compare import BF16, F16, F32, F64
from tests.support.seeded import (
    ROOT5,
    SEED,
    Net,
    api,
    by_fused,
    by_init_model,
    differ,
    equal,
    holder,
    keyed,
    keys,
    made,
    on_meta,
    seeded,
    state,
    undrawn,
)


def test_nested_scopes() -> None:
    with seeded(-5) as outer:
        with fused(seed=-5) as inner, fused(seed=2**64 - 5), fused():
            model = Net("a")
        assert inner is outer
    assert differ(state(model), state(by_fused(lambda: Net("a"), seed=-5))) == []
    with seeded(), pytest.raises(RuntimeError, match="a block with a seed"), fused(seed=SEED + 1):
        pass
    with fused(), pytest.raises(RuntimeError, match="a block with a seed"), fused(seed=SEED):
        pass
    refused = pytest.raises(RuntimeError, match="a block with a prefix")
    with seeded(), refused, fused(seed=SEED, prefix="a."):
        pass
    meta = on_meta(lambda: nn.Linear(3, 3))
    with fused():
        with pytest.raises(RuntimeError, match="a block with a seed"):
            init_model_(model, seed=SEED)
        with pytest.raises(RuntimeError, match="a block with a seed"):
            materialize_(meta, seed=SEED)
    assert meta.weight.is_meta


@pytest.mark.parametrize("way", ["init_model_", "materialize_"])
def test_in_a_scope(way: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 1)))

    expected = state(by_init_model(make))
    model = made(make) if way == "init_model_" else on_meta(make)
    with seeded():
        init_model_(model, seed=SEED) if way == "init_model_" else materialize_(model, seed=SEED)
    assert differ(expected, state(model)) == []
    part = made(lambda: nn.Linear(8, 8))
    with seeded():
        init_model_(part, seed=SEED, prefix="a.")
    assert equal(cast(Any, part).weight, cast(Any, by_fused(lambda: Net("a"))).a.weight)


def test_a_scope_that_runs_twice() -> None:
    scope = fused(seed=SEED)
    with scope as first:
        one = Net("a")
    with scope as second:
        two = Net("a")
    assert first is not second
    assert differ(state(one), state(two)) == []

    @fused(seed=SEED, prefix="p.")
    def make(depth: int = 1) -> nn.Module:
        return make(depth - 1) if depth else Net("a")

    assert differ(state(make()), state(make())) == []
    assert differ(state(make()), state(by_init_model(lambda: Net("a"), prefix="p."))) == []


def test_exceptions() -> None:
    """What was made until then has its numbers."""
    kept: list[Any] = []

    def half() -> None:
        kept.append(Net("a"))
        kept[0].b = holder(4)
        torch_init.normal_(kept[0].b.w)
        raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError), fused(seed=SEED):
        half()
    assert equal(kept[0].a.weight, keyed("kaiming_uniform_", (8, 8), ROOT5, name="a.weight"))
    assert equal(kept[0].b.w, keyed("normal_", (4,), name="b.w"))
    assert torch.equal(before, torch.get_rng_state())
    assert fastinit.core.recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0


BAD: list[tuple[str, dict[str, Any]]] = [
    ("normal_", {"std": -1}), ("uniform_", {"a": 2, "b": 1}), ("xavier_normal_", {}),
    ("kaiming_uniform_", {"mode": "x"}), ("orthogonal_", {}), ("eye_", {}), ("dirac_", {}),
    ("sparse_", {"sparsity": 0.1}), ("kaiming_normal_", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), BAD, ids=str)
def test_errors_are_torchs(name: str, options: dict[str, Any]) -> None:
    with pytest.raises((RuntimeError, ValueError)) as expected:
        getattr(torch_init, name)(torch.empty(5), **options)
    with seeded():
        model = Net("a")
        with pytest.raises(expected.type) as found:
            getattr(torch_init, name)(torch.empty(5), **options)
    assert str(found.value) == str(expected.value)
    assert differ(state(model), state(by_fused(lambda: Net("a")))) == []


def test_no_scope_without_operators() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="a block with a seed has to see"):
        init_in_scope()
    with pytest.raises(RuntimeError, match="a block with a seed has to see"):
        record(Net("a"), lambda m: init_in_scope())


def init_in_scope() -> None:
    with fused(seed=SEED):
        pass


def test_keys_in_a_scope() -> None:
    """A Key says what it is, whatever the scope's seed."""
    for seed in (None, SEED, 5):
        for n in (5, 9000):
            with fused(seed=seed, watch=True) as report:
                model = nn.ParameterList([torch.empty(n), torch.empty(n), torch.empty(3)])
                fastinit.normal_(model[0], generator=Key(3, "x"))
                fastinit.uniform_(model[0][:2], generator=Key(4, "y"))
                fastinit.normal_(model[2], generator=Key(3, "z").part((9,), (4,)))
                fastinit.ones_(model[1])
                doubled = model[0].detach() * torch.tensor(2)
            expected = keyed("normal_", (n,), name="x", seed=3)
            expected[:2] = keyed("uniform_", (2,), name="y", seed=4)
            assert equal(model[0], expected)
            assert equal(doubled, expected * 2)
            assert equal(model[2], keyed("normal_", (9,), name="z", seed=3)[4:7])
            assert keys(report) == {"0": "x, y", "1": "", "2": "z"}


def test_scopes_of_threads() -> None:
    """Each has its own."""
    out: dict[int, nn.Module] = {}

    def make(seed: int) -> None:
        with fused(seed=seed):
            out[seed] = Net("a", "b")

    threads = [threading.Thread(target=make, args=(i,)) for i in range(6)]
    with undrawn():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in range(6):
        alone = state(by_fused(lambda: Net("a", "b"), seed=seed))
        assert differ(alone, state(out[seed])) == []


# ---- generators of torch ----


each_size = pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100, 9000])


@each_size
def test_torchs_generators_are_left_alone(n: int) -> None:
    """Whatever draws: functions, methods, factories; all sizes."""
    g = torch.Generator().manual_seed(3)
    before = g.get_state()
    with seeded() as report:
        w = torch.empty(n)
        for name in ("normal_", "uniform_", "trunc_normal_"):
            getattr(torch_init, name)(w)
            getattr(api, name)(w)
        for name in ("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"):
            getattr(torch_init, name)(torch.empty(n, 3))
        torch_init.orthogonal_(torch.empty(n % 50 + 1, 3))
        torch_init.sparse_(torch.empty(n, 3), 0.3)
        fastinit.orthogonal_batched_(torch.empty(2, 3, 3))
        w.normal_(1, 2).uniform_(-1, 1)
        w[::2].normal_(std=2, mean=1)
        w.new_empty(n).view(1, -1).uniform_(to=2.0)
        for dtype in (F32, F64, BF16, F16):
            torch.rand(n, dtype=dtype), torch.randn((n, 2), dtype=dtype)
            torch.randn_like(w, dtype=dtype), torch.rand_like(w, dtype=dtype)
            torch.empty(n, dtype=dtype).normal_()
        torch.rand(n, 1, requires_grad=True)
        torch.randn(())
        torch.Tensor(n).normal_()
        trunc_bound_early(w)
        kaiming_bound_early(torch.empty(n, 3))
    assert torch.equal(g.get_state(), before)
    assert report.foreign == set()


@each_size
def test_explicit_generators_draw_torchs_numbers(n: int) -> None:
    def draw(g: torch.Generator) -> list[Tensor]:
        w, v = torch.empty(n, 3), torch.empty(n)
        torch_init.normal_(w, generator=g)
        v.uniform_(generator=g)
        x = torch.randn(n, generator=g)
        y = torch_init.trunc_normal_(torch.empty(n, 2), generator=g)
        z = torch_init.kaiming_normal_(torch.empty(2, n), generator=g)
        return [w, v, x, y, z, torch.empty(n).exponential_(generator=g)]

    g, h = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    expected = draw(g)
    with seeded():
        found = draw(h)
    assert all(map(equal, expected, found))
    assert torch.equal(g.get_state(), h.get_state())


def test_both_kinds_in_one_tensor() -> None:
    g, h = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    with seeded():
        model = holder(300, 100)
        torch_init.normal_(model.w)
        model.w.data[100:200].normal_(generator=g)
        model.w.data[:50].uniform_()
    expected = keyed("normal_", (300, 100))
    expected[100:200].normal_(generator=h)
    expected[:50] = keyed("uniform_", (300, 100))[:50]
    assert equal(model.w, expected)


def test_manual_seed_does_not_matter() -> None:
    expected = state(by_fused(lambda: Net("a")))
    with fused(seed=SEED):
        torch.manual_seed(9)
        model = Net("a")
        inside = torch.get_rng_state()
    torch.manual_seed(9)
    assert torch.equal(inside, torch.get_rng_state())  # nothing drawn since
    assert differ(expected, state(model)) == []
    with seeded(), torch.random.fork_rng():
        torch.manual_seed(3)
        model = Net("a")
    assert differ(expected, state(model)) == []


def test_the_default_generator_by_name() -> None:
    """Of the seed, as in a Plan; or at least listed."""
    with fused(seed=SEED) as report:
        model = holder(5)
        torch_init.normal_(model.w, generator=torch.default_generator)
    assert report.foreign or equal(model.w, keyed("normal_", (5,)))


def test_what_is_no_generator_is_torchs_to_refuse() -> None:
    with fused(seed=SEED), pytest.raises(TypeError, match="generator"):
        fastinit.normal_(torch.empty(5), generator=5)  # type: ignore[arg-type]
