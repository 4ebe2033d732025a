# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): generators: states read and set, forks, draws between fills."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.init as torch_init
from torch import nn

from tests.support.compare import (
    BF16,
    F64,
    attempt,
)
from tests.support.scopes import Cases, N, Scope, compare, same

case = Cases()


@case
def states_after_each_fill(s: Scope) -> Any:
    w, states = s.empty(40, 30), []
    for size in (1, 15, 16, 17, 400, 623, 624, 625, 1200):
        for dtype in (torch.float32, F64, BF16):
            v = torch.empty(size, dtype=dtype)
            for law in (v.uniform_, v.normal_, v.zero_):
                law()
                states.append(torch.get_rng_state())
    w.t().normal_()
    states.append(torch.default_generator.get_state())
    w[::2].uniform_()
    states.append(torch.default_generator.clone_state().get_state())
    return w, states, torch.initial_seed(), torch.default_generator.initial_seed()


@case
def states_are_set(s: Scope) -> Any:
    w, v = s.empty(40, 30).normal_(), s.empty(40, 30)
    state = torch.get_rng_state()
    w.uniform_()
    torch.set_rng_state(state)
    v.uniform_()
    torch.manual_seed(5)
    torch_init.normal_(w[3:9])
    torch.default_generator.manual_seed(5)
    v[3:9].normal_()
    torch.default_generator.set_state(state)
    v[20:].normal_()
    torch.random.default_generator.set_state(state)
    u = s.empty(41).uniform_()
    torch.random.manual_seed(7)
    return w, v, u, torch.random.initial_seed(), torch.rand(3)


@case
def forks_of_the_generator(s: Scope) -> Any:
    made, w = [], s.empty(40, 30)
    for i in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + i % 2)
            made.append(nn.Linear(40, 30))
            w.normal_()
        made.append(torch.empty(400).uniform_())
        with torch.random.fork_rng(devices=[], enabled=i > 1):
            w[i].uniform_()
    return made, w


@case
def explicit_generators(s: Scope) -> Any:
    w, v, other = s.empty(40, 30), s.empty(41), torch.Generator().manual_seed(8)
    w.normal_(generator=s.g)
    seen = [s.g.get_state(), s.g.initial_seed()]
    w[3].uniform_(generator=other)
    v.uniform_(generator=torch.default_generator)
    copy = other.clone_state()
    w[4:].normal_(generator=copy)
    v[:20].normal_(generator=other)
    s.g.set_state(other.get_state())
    w[9:].uniform_(generator=s.g)
    other.manual_seed(3)
    torch_init.trunc_normal_(w[20:], generator=other)
    torch_init.normal_(v[7:30], generator=torch.default_generator)
    shared = torch.Generator()
    shared.graphsafe_set_state(s.g) if attempt(shared.graphsafe_set_state, s.g)[1] == "" else None
    u = torch.empty(400).normal_(generator=shared)
    return w, v, u, seen, [g.get_state() for g in (other, copy, shared)]


@case
def generators_that_die(s: Scope) -> Any:
    made = []
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        made.append(torch.empty(400).normal_(generator=g))
        made.append(torch.rand(40, 30, generator=g))
        del g
    return made, s.empty(3).zero_()


@case
def draws_between(s: Scope) -> Any:
    w, seen = s.empty(40, 30).normal_(), []
    seen += [torch.randperm(50), torch.nn.functional.dropout(torch.ones(400), 0.5)]
    w.uniform_()
    seen += [torch.randint(9, (5,)), torch.multinomial(torch.ones(9), 3), torch.rand(3)]
    w[4].normal_()
    seen += [torch.bernoulli(torch.full((400,), 0.5)), torch.poisson(torch.ones(9))]
    seen += [torch.randn(7), torch.distributions.Beta(2.0, 3.0).sample((5,)), nn.Linear(3, 4)]
    data = torch.utils.data.TensorDataset(w)
    loader = torch.utils.data.DataLoader(data, batch_size=7, shuffle=True)
    seen += [batch[0] for batch in loader]
    random.seed(torch.initial_seed())
    seen += [torch.utils.data.random_split(range(20), [5, 15])[0].indices, random.random()]
    w.normal_()
    return w, seen


@case
def kept_normals(s: Scope) -> Any:
    """Small and strided normals leave the second of a pair in the generator."""
    w, seen = s.empty(40, 30), []
    for i in range(12):
        w[i, : 2 * i + 1].normal_()
        w[12:].normal_()
        w[i].uniform_()
        w[:, i].normal_(generator=s.g)
        seen += [torch.get_rng_state(), torch.randn(1).item()]
    w[:12].zero_()
    return w, seen


@case.each
def test_cases(name: str, variant: str) -> None:
    compare(case[name], variant)


def test_generators_that_came_through_the_dispatcher() -> None:
    """There each call makes another object of the same generator."""

    def inside() -> Any:
        g, h = torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)
        made = []
        for i in range(3):
            w, t = torch.empty(200, 100), torch.empty(N + i)
            torch_init.normal_(w, generator=g)
            t.normal_(generator=g)
            torch_init.uniform_(torch.empty(7), generator=g)
            torch.empty(5).normal_(generator=g)
            t[3:9000:2].normal_(generator=g)
            torch_init.trunc_normal_(w[3:], generator=h)
            torch_init.kaiming_uniform_(w[:, :50], generator=g)
            w[:90].uniform_(generator=h)
            torch_init.sparse_(torch.empty(100, 90), 0.5, generator=g)
            torch_init.orthogonal_(torch.empty(100, 100), generator=h)
            made += [w, t, torch.randn(N, generator=g), torch.rand(N, generator=h)]
            made += [g.get_state(), h.get_state(), w.clone()]
        return made

    same(inside)
