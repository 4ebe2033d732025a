# SPDX-License-Identifier: BSD-3-Clause
"""Random programs: long chains of random calls on random views, single, planned and in a model.

What no table thinks of. Every program is a function of its number, so a failure can be repeated.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from tests.support.compare import DTYPES, F32, F64, bits
from tests.support.marks import slow

pytestmark = pytest.mark.usefixtures("native")

Call = tuple[str, int, list[Any], tuple[Any, ...], int]  # function, tensor, view, arguments, source

SIZES = [1, 2, 3, 8, 15, 16, 17, 31, 33, 40, 100, 623, 640]


def view(tensor: torch.Tensor, steps: list[Any]) -> torch.Tensor:
    """Indexing with tuples, transposing with "t", flattening (of contiguous memory) with "f"."""
    for step in steps:
        if step == "t":
            tensor = tensor.t()
        elif step == "f":
            tensor = tensor.reshape(-1) if tensor.is_contiguous() else tensor
        else:
            tensor = tensor[step[: tensor.dim()]]
    return tensor


def random_call(r: random.Random, tensors: int) -> Call:
    def index() -> slice:
        first = r.choice([0, 0, 0, 1, 2, 5])
        return slice(first, r.choice([None, None, None, -1, 30]), r.choice([1, 1, 1, 2, 3]))

    steps: list[Any] = []
    for _ in range(r.choice([0, 0, 0, 1, 1, 2])):
        steps.append(r.choice(["t", "f", (index(), index()), (index(), index())]))
    if "f" in steps:
        steps = [s for s in steps if s != "t"]
    small = r.choice([1e-3, 0.02, 0.3, 1.0])
    name, args = r.choice(
        [
            ("uniform_", ()),
            ("uniform_", (-small, small)),
            ("normal_", ()),
            ("normal_", (small, small)),
            ("normal_", (0.0, small)),
            ("trunc_normal_", (0.0, 1.0, -r.uniform(0.3, 3), r.uniform(0.3, 3))),
            ("trunc_normal_", (0.0, 0.02)),
            ("constant_", (small,)),
            ("zeros_", ()),
            ("ones_", ()),
            ("eye_", ()),
            ("xavier_uniform_", (small,)),
            ("xavier_normal_", ()),
            ("kaiming_uniform_", (5**0.5,)),
            ("kaiming_normal_", (0, "fan_out", "relu")),
            ("orthogonal_", (small,)),
            ("sparse_", (r.random(), small)),
        ]
    )
    return name, r.randrange(tensors), steps, args, r.choice([0, 0, 0, 1, 2])


def make_tensors(r: random.Random) -> list[torch.Tensor]:
    tensors = []
    for _ in range(6):
        shape = (r.choice(SIZES), r.choice(SIZES[:10]))
        tensors.append(torch.full(shape, 13.0, dtype=r.choice([F32, *DTYPES])))
    return tensors


def execute(
    number: int, functions: Any, wrap: Callable[[Callable[[], None]], None] = lambda body: body()
) -> list[torch.Tensor]:
    """Run program `number`; all bits and generator states it leaves, in order."""
    r = random.Random(number)
    tensors = make_tensors(r)
    calls = [random_call(r, len(tensors)) for _ in range(40)]
    torch.manual_seed(number)
    generators = [None, torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)]

    def body() -> None:
        for name, which, steps, args, source in calls:
            target = view(tensors[which], steps)
            matrix = name.startswith(("eye", "xavier", "kaiming", "orthogonal", "sparse"))
            if target.numel() == 0 or (matrix and target.dim() != 2):
                continue
            if name == "orthogonal_" and target.dtype not in (F32, F64):
                continue
            random_one = name not in ("constant_", "zeros_", "ones_", "eye_")
            options = {"generator": generators[source]} if random_one else {}
            getattr(functions, name)(target, *args, **options)

    wrap(body)
    states = [(g or torch.default_generator).get_state() for g in generators]
    versions = [torch.tensor(t._version) for t in tensors]
    return [bits(t) for t in tensors] + states + versions


def assert_equal(number: int, expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    for place, (e, f) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(e, f), f"program {number}, result {place}"


BLOCKS = [0, *slow(range(20, 120, 20))]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("own_factors")
def test_single_calls(block: int) -> None:
    before = fastinit.core.kernels.native_fills
    for number in range(block, block + 20):
        assert_equal(number, execute(number, torch_init), execute(number, fastinit))
    assert fastinit.core.kernels.native_fills > before + 100


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("own_factors")
def test_plans(block: int) -> None:
    for number in range(block, block + 20):
        plan = fastinit.Plan()

        def wrap(body: Callable[[], None], plan: fastinit.Plan = plan) -> None:
            body()
            plan.run()

        assert_equal(number, execute(number, torch_init), execute(number, plan, wrap=wrap))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("own_factors")
def test_models(block: int) -> None:
    """The same program as the function of init_model_, with names of torch and of fastinit."""
    for number in range(block, block + 20):
        for functions in (torch_init, fastinit):

            def wrap(body: Callable[[], None]) -> None:
                fastinit.init_model_(nn.Identity(), lambda _: body())

            assert_equal(number, execute(number, torch_init), execute(number, functions, wrap=wrap))
