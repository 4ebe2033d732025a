# SPDX-License-Identifier: BSD-3-Clause
"""record beside torch: a model with tensors of every kind, and what functions do to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.init as torch_init
from torch import nn
from torch.nn.init import dirac_, kaiming_uniform_, normal_, trunc_normal_
from torch.nn.modules import module

import fastinit
from fastinit import record
from fastinit.core import recording
from tests.support.compare import assert_equal_seen
from tests.support.models import model_state

Make = Callable[[], nn.Module]
Fn = Callable[..., Any]


def state_of(model: nn.Module, g: torch.Generator, versions: bool) -> dict[str, Any]:
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in model_state(model).items()}
    if not versions:
        state = {k: v for k, v in state.items() if not k.endswith(" version")}
    return {**state, "explicit": g.get_state(), "default": torch.get_rng_state()}


def nothing_is_left() -> None:
    assert recording.this_thread.recorder is None
    assert torch._C._len_torch_dispatch_stack() == 0
    for name, function in fastinit.dispatch.ORIGINALS.items():
        assert getattr(torch_init, name) is function
    assert not module._global_parameter_registration_hooks
    assert not module._global_buffer_registration_hooks


def reset(m: nn.Module, g: torch.Generator) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(m, name):
            getattr(m, name)()
            return


def assert_same_runs(
    make: Make, fn: Fn | None, *, runs: int = 3, versions: bool = False
) -> fastinit.Plan:
    """Record once, run often; torch applies the function as often. fn gets a generator, too."""
    seen: list[list[dict[str, Any]]] = []
    made: list[Any] = []
    for fast in (False, True):
        torch.manual_seed(3)
        model = make()
        torch.manual_seed(11)
        g = torch.Generator().manual_seed(12)
        states: list[dict[str, Any]] = []

        def call(m: nn.Module, g: torch.Generator = g) -> Any:
            return (fn or reset)(m, g)

        if fast:
            before = state_of(model, g, versions)
            made.append(record(model, None if fn is None else call))
            nothing_is_left()
            assert_equal_seen(before, state_of(model, g, versions), "recording")
        for _ in range(runs):
            made[0].run() if fast else model.apply(call)
            states.append(state_of(model, g, versions))
        seen.append(states)
    for i, (expected, found) in enumerate(zip(*seen, strict=True)):
        assert_equal_seen(expected, found, f"run {i}")
    return made[0]


class Two(nn.Module):
    """A matrix, a bias, a stack of kernels, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 80 * 70).view(80, 70))
        self.b = nn.Parameter(torch.linspace(1, 2, 41))
        self.k = nn.Parameter(torch.linspace(-2, 2, 8 * 6 * 9).view(8, 6, 3, 3))
        self.register_buffer("mask", torch.ones(9, 9))


Case = Callable[[Two, torch.Generator], Any]
CASES: dict[str, Case] = {
    "uniform_": lambda m, g: torch_init.uniform_(m.w, -1, 2),
    "normal_": lambda m, g: torch_init.normal_(m.w, 1, 2),
    "trunc_normal_": lambda m, g: torch_init.trunc_normal_(m.w, std=0.02),
    "trunc_normal_ cut": lambda m, g: torch_init.trunc_normal_(m.w, 0, 1, -0.5, 1),
    "trunc_normal_ of a tail": lambda m, g: torch_init.trunc_normal_(m.w, 0, 1, 1.5, 3),
    "trunc_normal_ imported before": lambda m, g: trunc_normal_(m.w, std=0.02),
    "kaiming_uniform_ imported before": lambda m, g: kaiming_uniform_(m.k, a=1),
    "normal_ imported before": lambda m, g: normal_(m.w, std=2, generator=g),
    "dirac_ imported before": lambda m, g: dirac_(m.k),
    "orthogonal_": lambda m, g: (torch_init.orthogonal_(m.w, 1.5), torch_init.orthogonal_(m.k)),
    "sparse_": lambda m, g: torch_init.sparse_(m.w, 0.3),
    "sparse_ of two generators": lambda m, g: torch_init.sparse_(m.w, 0.3, generator=g),
    "dirac_": lambda m, g: torch_init.dirac_(m.k, 2),
    "eye_": lambda m, g: torch_init.eye_(m.w),
    "constant_": lambda m, g: (torch_init.constant_(m.w, 0.3), torch_init.ones_(m.mask)),
    "fastinit's": lambda m, g: (fastinit.xavier_normal_(m.w), fastinit.kaiming_uniform_(m.k)),
    "explicit generator": lambda m, g: (
        torch_init.normal_(m.w, generator=g),
        torch_init.uniform_(m.k),
        m.b.data.normal_(generator=g),
    ),
    "odd sizes, cached normals": lambda m, g: (
        m.b.data[:5].normal_(),
        m.b.data[:7].normal_(generator=g),
        m.b.data[:5].normal_(),
        m.w.data.normal_(),
    ),
    "in place after": lambda m, g: torch_init.normal_(m.w).data.mul_(0.02).clamp_(-0.01, 0.03),
    "div_, add_, sub_": lambda m, g: (
        torch_init.uniform_(m.w).data.div_(3).add_(1).sub_(m.b.data[0])
    ),
    "in place alone": lambda m, g: m.w.data.mul_(0.5).clamp_(-0.4, 0.3),
    "operators": lambda m, g: (m.w.data.__imul__(2), m.b.data.__itruediv__(3)),
    "of each other": lambda m, g: (
        m.w.data.normal_(),
        m.b.data.copy_(m.w.data[0, :41]),
        m.w.data.mul_(m.b.data[0]),
        m.b.data.zero_(),
    ),
    "copy_": lambda m, g: m.w.data.copy_(torch.arange(70.0)),
    "copy_ of an array": lambda m, g: m.b.data.copy_(torch.from_numpy(np.arange(41.0))),
    "setitem": lambda m, g: (
        m.w.data.__setitem__(3, 1.5),
        m.w.data.__setitem__((0, 1), torch.ones(())),
    ),
    "slices": lambda m, g: (
        m.w.data[::2].normal_(),
        m.w.data[1::2, 3:].zero_(),
        m.k.data[1].mul_(2),
    ),
    "views": lambda m, g: (m.w.data.t().normal_(), m.w.data.view(-1)[5:90].uniform_()),
    "padding": lambda m, g: (torch_init.normal_(m.w), m.w.data[3].zero_()),
    "twice": lambda m, g: (
        torch_init.normal_(m.w),
        torch_init.zeros_(m.w),
        torch_init.uniform_(m.w),
    ),
    "other laws": lambda m, g: (
        m.w.data.exponential_(),
        m.k.data.bernoulli_(0.3),
        m.b.data.cauchy_(generator=g),
        m.mask.random_(0, 9),
    ),
    "random mask": lambda m, g: m.w.data.mul_(torch.empty(80, 70).bernoulli_(0.5)),
    "temporary": lambda m, g: m.w.data.copy_(torch.empty(80, 70).uniform_()),
    "temporary, changed": lambda m, g: m.w.data.copy_(torch.empty(80, 70).normal_().mul_(3).abs_()),
    "temporaries added": lambda m, g: m.w.data.add_(torch.empty(80, 70).normal_(generator=g)),
    "temporary is a window": lambda m, g: m.b.data.copy_(torch.empty(90).normal_()[3:85:2]),
    "constants computed": lambda m, g: m.b.data.copy_(1 / torch.arange(1, 42)),
    "masks": lambda m, g: (
        m.mask.fill_(1),
        m.mask.tril_(),
        m.w.data.masked_fill_(torch.eye(80, 70) > 0, 4),
    ),
    "indices": lambda m, g: m.w.data.index_fill_(0, torch.tensor([1, 5]), 7.0),
    "lists": lambda m, g: (
        torch._foreach_zero_([m.w.data, m.k.data]),
        torch._foreach_add_([m.w.data, m.b.data], 2),
    ),
    "renorm_": lambda m, g: torch_init.normal_(m.w).data.renorm_(2, 0, 1.0),
    "shapes are read": lambda m, g: m.w.data.mul_(m.w.numel() ** -0.5 * len(m.b) * m.w.stride(0)),
    "no_grad": lambda m, g: torch.no_grad()(lambda: (m.w.normal_(), m.b.fill_(1)))(),
    "modes": lambda m, g: (m.train(False), m.requires_grad_(True)),
    "views with gaps": lambda m, g: m.w.data[::3, ::2].uniform_(generator=g),
    "detached": lambda m, g: (m.w.detach().normal_(), m.b.detach()[1:].zero_()),
}
