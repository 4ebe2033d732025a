# SPDX-License-Identifier: BSD-3-Clause
"""Models filled by seed= in four ways, and the same numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.init as torch_init
from torch import Tensor, nn

import fastinit
from fastinit import Key, Report, fused, init_model_, materialize_, record
from fastinit.core import laws, work
from fastinit.core.key import derived
from fastinit.cpu import keyed as cpu_keyed
from tests.support.compare import F32, bits

SEED = 20240229


ROOT5 = math.sqrt(5)


api: Any = fastinit


of_torch: Any = torch_init


torch_any: Any = torch  # for what has no types


State = dict[str, Tensor]


@contextmanager
def seeded(seed: int = SEED, **options: Any) -> Iterator[Report]:
    """A block that must leave torch's generator alone."""
    before = torch.get_rng_state()
    with fused(seed=seed, **options) as report:
        yield report
    assert torch.equal(before, torch.get_rng_state()), "torch's generator has moved on"


@contextmanager
def undrawn() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "torch's generator has moved on"


def numbered(label: str, shape: tuple[int, ...], law: laws.Law | None = None) -> Tensor:
    """What nobody's name belongs to."""
    t = torch.empty(shape)
    whole = work.whole(t.numel())
    cpu_keyed.run([work.Work(law or laws.normal(0.0, 1.0), derived(SEED, label), t, whole)])
    return t


def keyed(
    function: str,
    shape: Any,
    *args: Any,
    name: str = "w",
    seed: int = SEED,
    dtype: torch.dtype = F32,
) -> Tensor:
    """By hand."""
    t = torch.empty(shape, dtype=dtype)
    getattr(api, function)(t, *args, generator=Key(seed, name))
    return t


def holder(*shape: int, dtype: torch.dtype = F32, name: str = "w") -> Any:
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.empty(*shape, dtype=dtype)))
    return model


def state(model: nn.Module) -> State:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone() for name, t in named if not t.is_meta}


def differ(a: State, b: State) -> list[str]:
    assert a.keys() == b.keys()
    return [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(bits(a[k]), bits(b[k]))]


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """As others have it before; what it holds does not matter."""
    rng = torch.get_rng_state()
    model = make()
    torch.set_rng_state(rng)
    return model


def by_fused(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    with seeded(**options):
        return make()


def by_init_model(make: Callable[[], nn.Module], fn: Any = None, **options: Any) -> nn.Module:
    model = made(make)
    with undrawn():
        init_model_(model, fn, SEED, **options)
    return model


def by_materialize(make: Callable[[], nn.Module], fn: Any = None, **options: Any) -> nn.Module:
    model = on_meta(make)
    with undrawn():
        materialize_(model, fn=fn, seed=SEED, **options)
    return model


def by_record(make: Callable[[], nn.Module], fn: Any = None, **options: Any) -> nn.Module:
    model = made(make)
    plan = record(model, fn)
    with undrawn():
        plan.run(seed=SEED, **options)
    return model


WAYS = {"init_model_": by_init_model, "materialize_": by_materialize, "record": by_record}


def keys(report: Report) -> dict[str, str]:
    return {row.name: row.key for row in report.rows()}


class Net(nn.Module):
    def __init__(self, *names: str, size: int = 8) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(size, size))


def identity(t: Tensor) -> bool:
    return equal(t, torch.eye(*t.shape))


def orthonormal(t: Tensor) -> bool:
    t = t if t.shape[0] <= t.shape[1] else t.T
    return torch.allclose(t @ t.T, torch.eye(len(t)), atol=1e-4)


def half_zeros(t: Tensor) -> bool:
    return bool(((t == 0).sum(0) == math.ceil(0.5 * t.shape[0])).all())


OF_WHOLE: dict[str, tuple[Any, Callable[[Tensor], bool]]] = {
    "eye_": (lambda t: torch_init.eye_(t), identity),
    "orthogonal_": (lambda t: torch_init.orthogonal_(t), orthonormal),
    "sparse_": (lambda t: torch_init.sparse_(t, 0.5), half_zeros),
}
