# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): every dtype, size, layout and special value, and every error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.init as torch_init
from torch import nn

from tests.support.compare import BF16, DTYPES, F64, attempt
from tests.support.scopes import Cases, N, Scope, compare, each, same

case = Cases()
SIZES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 130)


# ---- numbers, dtypes, sizes ----


@case
def special_values(s: Scope) -> Any:
    made = []
    for dtype in DTYPES:
        for value in (math.nan, math.inf, -math.inf, -0.0, 0.1, 1e-42, True, 3):
            made.append(s.empty(33, dtype=dtype).fill_(value))
        made.append(s.empty(33, dtype=dtype).normal_(math.nan, 1.0))
        made.append(s.empty(33, dtype=dtype).normal_(math.inf, 0.0))
        made.append(s.empty(33, dtype=dtype).normal_(0.5, 0.0))
        made.append(s.empty(33, dtype=dtype).uniform_(0.25, 0.25))
    big = [attempt(s.empty(33, dtype=dtype).zero_().fill_, 1e300) for dtype in DTYPES]
    return made, big, [attempt(s.empty(33).zero_().fill_, x) for x in (1j, "1", None, 10**400)]


@case
def floating_dtypes(s: Scope) -> Any:
    laws: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t.normal_(),
        lambda t: t.uniform_(-1, 2),
        lambda t: t.normal_(3, 0.02, generator=s.g),
        lambda t: t.uniform_(generator=s.g),
        lambda t: t.zero_(),
        lambda t: t.fill_(0.3),
    ]
    return [[law(s.empty(size, dtype=dtype)) for law in laws] for dtype in DTYPES for size in SIZES]


@case
def other_laws(s: Scope) -> Any:
    made = []
    for size in (1, 17, 400):
        w = s.empty(size).exponential_()
        made += [w.clone(), w.cauchy_().clone(), w.geometric_(0.3).clone(), w.log_normal_().clone()]
        made += [w.bernoulli_(0.3).clone(), w.random_().clone(), w.random_(3, 9)]
        made += [s.empty(size, dtype=torch.int64).random_(), torch.multinomial(torch.ones(size), 1)]
        made.append(w.uniform_().bernoulli_(w.clone()))
    return made


@case
def integers_and_flags(s: Scope) -> Any:
    made = []
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        made += [s.empty(400, dtype=dtype).zero_(), s.empty(400, dtype=dtype).fill_(1)]
        made.append(attempt(s.empty(400, dtype=dtype).zero_().fill_, 2.7))
        made.append(attempt(s.empty(400, dtype=dtype).fill_(1).fill_, -3))
        made.append(attempt(s.empty(400, dtype=dtype).zero_().fill_, 1000))
        for law in ("normal_", "uniform_"):
            kept = s.empty(400, dtype=dtype).fill_(1)
            made += [attempt(getattr(kept, law)), kept]
        made.append(s.empty(400, dtype=dtype).fill_(1).random_())
    count = s.empty(400, dtype=torch.int64).zero_()
    count += 1
    return made, count


@case
def complex_numbers(s: Scope) -> Any:
    made = []
    for dtype in (torch.complex64, torch.complex128):
        c, d = s.empty(40, 30, dtype=dtype).normal_(), s.empty(40, 30, dtype=dtype).zero_()
        made += [c, d, s.empty(33, dtype=dtype).fill_(1 + 2j), attempt(d.uniform_)[:2]]
        torch.view_as_real(c)[3].uniform_()
        c.real[:, 2].zero_()
        c.imag[4:].normal_()
        d.conj()[1].fill_(1j)
        d.imag.fill_(5)
        d.conj().imag[7].zero_()
    return made


@case
def memory_as_other_dtypes(s: Scope) -> Any:
    w, pairs = s.empty(40, 30).normal_(), s.empty(800).uniform_()
    w.view(torch.int32)[3].fill_(5)
    w.view(BF16)[:, 7].normal_()
    w.view(torch.uint8)[-1].zero_()
    torch.view_as_complex(pairs.view(-1, 2))[20:300].normal_()
    w.view(F64)[6].zero_()
    total = pairs.view(torch.int32).sum()
    negated = s.empty(40, 30).zero_()
    torch._neg_view(negated)[2:].normal_()
    torch._neg_view(negated)[7].fill_(3)
    return w, pairs, total, negated, w.view(torch.int32).fill_(9)


@case
def no_elements(s: Scope) -> Any:
    made = [s.empty(0), s.empty(3, 0), s.empty(0, 4, dtype=BF16), s.empty(40, 30)[5:5]]
    for w in made:
        w.normal_().uniform_().zero_().fill_(1)
        w.clone().copy_(w)
        torch_init.normal_(w)
        torch_init.zeros_(w)
    return made, [attempt(torch_init.kaiming_uniform_, w)[1:] for w in made], nn.Embedding(0, 4)


@case
def expanded(s: Scope) -> Any:
    """Some of these are errors; where they are not, the last write wins."""
    made = []
    for law in ("normal_", "uniform_", "zero_", "random_"):
        w = s.empty(400).zero_()
        made += [attempt(getattr(w[:1].expand(400), law))[1], w]
        made += [attempt(getattr(w.as_strided((9, 9), (1, 1)), law))[1], w.clone()]
    w = s.empty(1, 30).normal_()
    made += [attempt(w.expand(40, 30).fill_, 3)[1], attempt(w.expand(40, 30).mul_, 3)[1], w]
    return made


@case
def odd_layouts(s: Scope) -> Any:
    """Memory that a sparse or quantised tensor shares, or that is in no plain form."""
    v, i = s.empty(400), torch.arange(400).view(1, 400)
    v.uniform_()
    sparse = torch.sparse_coo_tensor(i, v, (400,), check_invariants=False)
    first = sparse.to_dense()
    v.normal_()
    second = sparse.to_dense()
    dense = s.empty(40, 30).normal_()
    dense[dense < 0] = 0
    quantised = torch.quantize_per_tensor(dense, 0.1, 3, torch.qint8)
    dense.uniform_()
    quantised.fill_(0.5)
    quantised[3].fill_(0.0)
    one = dense.to_mkldnn()
    dense.zero_()
    other = torch.zeros(40, 30, layout=torch.sparse_coo)
    nested = torch.nested.nested_tensor([v, v[:3]], layout=torch.jagged)
    v.zero_()
    return first, second, quantised, one, other, sparse.zero_(), nested.unbind(), dense


@case
def on_meta(s: Scope) -> Any:
    m = s.empty(40, 30, device="meta")
    m.normal_().uniform_().zero_()
    m[3].fill_(2)
    w = s.empty(40, 30).normal_()
    with torch.device("meta"):
        layer, other = nn.Linear(8, 8), torch.zeros(3)
        w[3].uniform_()
        torch_init.trunc_normal_(m)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    return m, w, layer, other, torch.empty_like(w, device="meta").normal_()


# ---- errors ----


@case
def errors_at_the_call(s: Scope) -> Any:
    w, p = s.empty(40, 30).normal_(), nn.Parameter(s.empty(40, 30).zero_())
    calls = [
        lambda: w.normal_(0, -1),
        lambda: w.uniform_(2, 1),
        lambda: w.uniform_(math.nan, 1),
        lambda: w.uniform_(0, math.inf),
        lambda: w.random_(5, 5),
        lambda: w.exponential_(-1),
        lambda: w.fill_(),
        lambda: w.normal_(generator=3),
        lambda: p.normal_(),
        lambda: p[3].zero_(),
        lambda: p.fill_(3),
        lambda: p.view(-1).uniform_(),
        lambda: w[50].zero_(),
        lambda: w.copy_(torch.zeros(7)),
        lambda: torch_init.kaiming_normal_(s.empty(9).zero_()),
        lambda: torch_init.trunc_normal_(w, 0, -1),
        lambda: torch_init.trunc_normal_(w, 9, 1),
        lambda: torch.normal(0, -1, (40, 30)),
        lambda: torch.rand(-3),
        lambda: torch.full((400,), 300, dtype=torch.uint8),
    ]
    return [(*attempt(call)[1:], torch.get_rng_state(), w._version) for call in calls], w, p


@case
def errors_that_are_not_caught(s: Scope) -> Any:
    w, v = s.empty(40, 30), s.empty(41)
    s.notes += [w, v]
    w.normal_()
    v.uniform_(generator=s.g)
    w[3:5].zero_()
    s.raises = True
    w.normal_(0, -1)


@case
def fills_with_history(s: Scope) -> Any:
    """Of tensors that autograd follows, but are no leaves."""
    made = []
    for law in ("normal_", "uniform_", "zero_", "random_"):
        p = nn.Parameter(s.empty(40, 30).normal_())
        y = p * 2
        getattr(y[3:20], law)()
        z = p + 1
        getattr(z, law)()
        (y.sum() + 3 * z.sum()).backward()
        made += [p, y, z]
    return made


@case
def changed_after_saving(s: Scope) -> Any:
    """The error of backward quotes version counters."""
    p, w = nn.Parameter(s.empty(40, 30).normal_()), s.empty(40, 30).normal_()
    loss = (p * w).sum()
    w.zero_()
    w.uniform_()
    s.notes += [p, w]
    s.raises = True
    loss.backward()


@case.each
def test_numbers(name: str, variant: str) -> None:
    compare(case[name], variant)


# ---- conjugates, negatives, and strides of copies ----


def conjugated() -> torch.Tensor:
    return torch.view_as_complex(torch.randn(N, 2)).conj()


@each(
    {
        "clone": lambda: conjugated().clone(),
        "resolve": lambda: conjugated().resolve_conj(),
        "product": lambda: conjugated() * 1,
        "negative": lambda: conjugated().imag.clone(),
        "resolved negative": lambda: conjugated().imag.resolve_neg(),
        "real": lambda: conjugated().real.clone(),
        "as real": lambda: torch.view_as_real(conjugated().resolve_conj()).clone(),
        "copied": lambda: torch.empty(N, dtype=torch.complex64).copy_(conjugated()),
        "deep copy": lambda: copy.deepcopy(conjugated()),
        "filled": lambda: conjugated().zero_(),
        "filled negative": lambda: [x := conjugated(), x.imag.fill_(3.0), x.imag.uniform_()],
    }
)
def test_conjugates(make: Callable[..., Any]) -> None:
    same(make)


def layouts() -> list[torch.Tensor]:
    row, image = torch.randn(1, N), torch.empty(8, 4, 30, 30)
    return [
        row,
        row[:, None],
        image.to(memory_format=torch.channels_last).normal_(),
        torch.randn(200, 100),
    ]


@each(
    {
        "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
        "preserved": lambda x: x.clone(),
        "like": torch.zeros_like,
        "like, random": lambda x: torch.randn_like(x, memory_format=torch.contiguous_format),
        "copied": copy.deepcopy,
    }
)
def test_strides_of_copies(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Also those of dimensions with one element."""
    same(lambda: [(make(x), make(x.t() if x.dim() == 2 else x.mT)) for x in layouts()])
