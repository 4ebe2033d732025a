# SPDX-License-Identifier: BSD-3-Clause
"""Plan.run(seed=), and keys in plans."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit import Key, Plan, fused, record
from fastinit.core import laws
from tests.support.seeded import (
    ROOT5,
    SEED,
    Net,
    State,
    by_init_model,
    differ,
    equal,
    keyed,
    made,
    numbered,
    state,
    undrawn,
)


def varied() -> nn.Module:
    model = nn.ParameterDict({n: torch.zeros(24, 8) for n in "abcdefghi"})
    model["k"] = torch.zeros(8, 8, 3)
    model["l"] = torch.zeros(3, 16, 8)
    model["s"] = torch.zeros(3)
    return model


def fill_varied(m: Any, g: torch.Generator | None = None) -> None:
    torch_init.trunc_normal_(m["a"], std=0.02)
    torch_init.trunc_normal_(m["b"], a=-1, b=1.5)
    torch_init.sparse_(m["c"], 0.4)
    torch_init.orthogonal_(m["d"])
    torch_init.eye_(m["e"])
    torch_init.dirac_(m["k"])
    torch_init.normal_(m["f"])
    torch_init.uniform_(m["f"][3:9])
    torch_init.zeros_(m["f"][5])
    torch_init.normal_(m["g"], generator=g)
    torch_init.kaiming_normal_(m["h"])
    torch_init.constant_(m["i"], 0.3)
    fastinit.orthogonal_batched_(m["l"])
    torch_init.uniform_(m["s"])


@pytest.mark.parametrize("smallest", [0, None])
def test_plans(smallest: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a seed and without, in turns."""
    if smallest is not None:
        monkeypatch.setattr(fastinit.core.geometry, "MIN_NATIVE", smallest)
    g = torch.Generator()
    model, other = varied(), varied()
    plan = record(model, lambda m: fill_varied(m, g))

    def run(seed: int | None) -> State:
        g.manual_seed(5)
        torch.manual_seed(6)
        before = torch.get_rng_state()
        plan.run(seed=seed)
        assert torch.equal(before, torch.get_rng_state()) == (seed is not None)
        return state(model)

    first, eager = run(SEED), run(None)
    assert differ(first, run(SEED)) == differ(eager, run(None)) == differ(eager, run(None)) == []
    assert differ(first, run(SEED)) == []
    after = g.get_state()
    other = by_init_model(varied, lambda m: fill_varied(m, g.manual_seed(5)))
    assert differ(first, state(other)) == []
    assert torch.equal(after, g.get_state())
    g.manual_seed(5)
    torch.manual_seed(6)
    fill_varied(model, g)
    assert set(differ(eager, state(model))) <= {"d", "l"}
    assert set(differ(first, eager)) == set("abcdfhls")  # g: of the generator
    assert set(differ(first, run(SEED + 1))) == set("abcdfhls")


def test_plans_without_names() -> None:
    kept = [torch.empty(9), torch.empty(9), torch.empty(100, 90), torch.empty(9)]
    plan = Plan()
    for t in kept[:3]:
        plan.normal_(t)
    plan.zeros_(kept[3])
    plan.uniform_(kept[3][2:5])
    plan.run(seed=SEED)
    expected = [numbered(f"#step.{i}", tuple(t.shape)) for i, t in enumerate(kept[:3])]
    assert all(map(equal, kept, expected))
    part = numbered("#step.4", (3,), laws.uniform(0.0, 1.0))
    assert kept[3].tolist() == [0, 0, *part.tolist(), 0, 0, 0, 0]


def test_keys_in_plans() -> None:
    w, v = torch.empty(10), torch.empty(100, 90)
    plan = Plan()
    plan.normal_(w, generator=Key(3, "x"))
    plan.normal_(v, generator=Key(3, "y"))
    plan.uniform_(v[:2], generator=Key(3, "z").part((4, 90), (1, 0)))
    expected = keyed("normal_", (100, 90), name="y", seed=3)
    expected[:2] = keyed("uniform_", (4, 90), name="z", seed=3)[1:3]
    for seed in (None, None, SEED, 1):
        w.zero_()
        v.zero_()
        with undrawn():
            plan.run(seed=seed)
        assert equal(w, keyed("normal_", (10,), name="x", seed=3))
        assert equal(v, expected)


def test_plans_have_prefixes_and_see_what_has_moved() -> None:
    model = made(lambda: Net("a", "b"))
    plan = record(model)
    plan.run(seed=SEED, prefix="p.")
    expected = keyed("kaiming_uniform_", (8, 8), ROOT5, name="p.a.weight")
    assert equal(cast(Any, model).a.weight, expected)
    cast(Any, model).a.weight.data = torch.zeros(8, 8)
    with pytest.raises(RuntimeError, match="has other memory"):
        plan.run(seed=SEED)


def test_a_plan_in_a_scope_with_a_seed() -> None:
    """Its numbers are of the seed, or it says that they are not."""
    w = torch.empty(9)
    plan = Plan()
    plan.normal_(w)
    before = torch.get_rng_state()
    with fused(seed=SEED) as report:
        plan.run()
    assert report.foreign or torch.equal(before, torch.get_rng_state())
