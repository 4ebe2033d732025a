# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): every way to write to memory with fills held back, in every order."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.init as torch_init
from torch import nn

from tests.support.compare import BF16, F16, attempt
from tests.support.scopes import Cases, Scope, compare

case = Cases()
SIZES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 130)


# ---- fills, of parts and of all, over one another ----


@case
def full_over_full(s: Scope) -> Any:
    w, v = s.empty(40, 30), s.empty(41)
    returned = w.uniform_().normal_(1.0, 2.0).fill_(3.0).zero_()
    v.normal_().zero_().uniform_(-1, 1).fill_(7)
    return w, v, returned is w


@case
def padding_rows(s: Scope) -> Any:
    w = s.empty(50, 8).normal_()
    w[3].fill_(0)
    w[-1].zero_()
    table = s.make(nn.Embedding, 50, 20, padding_idx=7)
    torch_init.normal_(table.weight, std=0.02)
    with torch.no_grad():
        table.weight[table.padding_idx].fill_(0)
    return w, table


@case
def strided_after_full(s: Scope) -> Any:
    w = s.empty(40, 30).normal_()
    w[::2].uniform_()
    w[:, ::3].zero_()
    w[5:9, 2:30:7].normal_()
    w.view(-1)[::11].fill_(5)
    return w


@case
def full_after_partial(s: Scope) -> Any:
    w, v = s.empty(40, 30), s.empty(40, 30)
    w[3:].normal_()
    w[:, 2].zero_()
    w.uniform_()
    v[:39].normal_()
    v.view(-1).zero_()
    v[5].uniform_()
    return w, v


@case
def parts_that_make_a_whole(s: Scope) -> Any:
    w, v, u = s.empty(40, 30), s.empty(40, 30), s.empty(40, 30)
    w[:17].normal_()
    w[17:].uniform_()
    for row in v:
        row.uniform_()
    u[:, :15].zero_()
    u[:, 15:].fill_(1.0)
    w[10:30].zero_()
    return w, v, u


@case
def transposed(s: Scope) -> Any:
    w, v = s.empty(40, 30), s.empty(6, 7, 8)
    w.t().normal_()
    w.t()[2:5].uniform_()
    v.permute(2, 0, 1).uniform_()
    v.transpose(0, 2)[1].normal_()
    return w, v, s.empty(30, 40).t().zero_().t().uniform_()


@case
def memory_formats(s: Scope) -> Any:
    made = [
        s.empty(4, 6, 5, 7, memory_format=torch.channels_last),
        s.empty(4, 3, 2, 5, 6, memory_format=torch.channels_last_3d),
        s.make(torch.empty_strided, (40, 9), (1, 40)),
        s.make(torch.empty_permuted, (5, 6, 7), (1, 2, 0)),
    ]
    for w in made:
        w.normal_()
        w[1].uniform_()
        w.contiguous().zero_()  # of a copy
    return made, [w.uniform_().is_contiguous() for w in made]


@case
def aliases(s: Scope) -> Any:
    p = nn.Parameter(s.empty(40, 30))
    window = p.detach()[3:5]
    torch_init.normal_(p)
    p.data.uniform_()
    p.detach().normal_()
    p.data[4].zero_()
    window.t()[1].fill_(8)
    with torch.no_grad():
        p[7:].uniform_()
    other = p.view_as(p)
    return p, window, p.data, other.requires_grad


@case
def views_of_views(s: Scope) -> Any:
    w = s.empty(40, 30).zero_()
    w[2:].view(-1)[7:99].view(4, 23).t()[1:].normal_()
    w.unfold(0, 5, 5)[1, :, 2].uniform_()
    w.diagonal().fill_(3)
    w.as_strided((7, 3), (60, 2), 5).normal_()
    w.narrow(1, 3, 4).select(0, 2).uniform_()
    w.unsqueeze(0).expand(1, 40, 30).squeeze(0)[9].fill_(1)
    w.movedim(0, 1).unflatten(1, (4, 10))[:, 2].normal_()
    return w


@case
def chunks_and_splits(s: Scope) -> Any:
    w, v = s.empty(40, 30), s.empty(12)
    for chunk in w.chunk(4):
        torch_init.xavier_uniform_(chunk)
    for part in w.split([11, 29]):
        part[0].zero_()
    for i, row in enumerate(w.unbind()[::9]):
        row.fill_(i)
    for start, law in enumerate((torch_init.ones_, torch_init.zeros_, torch_init.normal_)):
        law(v[4 * start : 4 * start + 4])
    return w, v, torch.tensor_split(w, 3)


@case
def overlapping_windows(s: Scope) -> Any:
    w = s.empty(40, 30).zero_()
    flat = w.view(-1)
    for i in range(30):
        flat[13 * i : 13 * i + 40].normal_()
        flat[-9 * i - 30 : -9 * i - 1].uniform_(generator=s.g)
        if i % 7 == 0:
            w.zero_()
    return w


@case
def setitem(s: Scope) -> Any:
    w, v = s.empty(40, 30).normal_(), s.empty(30).uniform_()
    w[3] = 7.0
    w[:, 2] = torch.arange(40.0)
    w[5] = v
    v[...] = 2.0
    w[w > 1] = 0.5
    w[[1, 2]] = 5
    w[torch.tensor([7, 9]), 3:5] = v[:2]
    w[11:13, None] = v
    v[-1] = w[0, 0]
    return w, v


@case
def changes_in_metadata(s: Scope) -> Any:
    w, v = s.empty(40, 30), s.empty(3, 1, 5)
    w.normal_()
    w.t_()
    w[0].zero_()
    w.uniform_()
    w.transpose_(0, 1)
    w[1].zero_()
    v.normal_().squeeze_().unsqueeze_(0).swapaxes_(0, 2)
    v[2].zero_()
    u = s.empty(60).normal_().as_strided_((3, 4), (20, 1), 2)
    u[1].zero_()
    return w, v, u


@case
def keywords(s: Scope) -> Any:
    w, v = s.empty(40, 30).normal_(mean=1, std=2), s.empty(400).uniform_(to=3)
    w[3:].uniform_(**{"from": -2}, generator=s.g)
    v[:300].fill_(value=2)
    made = [torch.full(size=(400,), fill_value=3.0), torch.zeros(size=(40, 30), dtype=F16)]
    made += [torch.empty(size=(400,), out=v).normal_(std=3), torch.rand(size=(400,), generator=s.g)]
    made.append(torch.nn.init.constant_(tensor=s.empty(400), val=4))
    return w, v, made


@case
def many_pending(s: Scope) -> Any:
    """More than a table of them may want to hold: of tensors, and of one tensor."""
    w = s.empty(40, 30).zero_()
    made = [torch.empty(5).uniform_() for _ in range(2500)]
    for i in range(150):
        w[i % 40, i % 7 :: 2].normal_()
    return w, torch.stack(made), made[7]


@case
def functions_of_python(s: Scope) -> Any:
    w, v, u = s.empty(40).normal_(), s.empty(40).uniform_(), s.empty(40).normal_()
    w.apply_(lambda x: x + 1)
    v[3:].normal_()
    w.map_(v, lambda x, y: x * y)
    u.zero_()
    w.map2_(v, u, lambda x, y, z: x + y + z)
    v.uniform_()
    return w, v, u


# ---- copies ----


@case
def copies_into(s: Scope) -> Any:
    w, v, u = s.empty(40, 30).normal_(), s.empty(40, 30).uniform_(), s.empty(40, 30).normal_()
    w.copy_(v)
    v.zero_()
    u.copy_(torch.zeros(()))
    u[3].copy_(w[4])
    u[5:9].copy_(torch.arange(30.0))
    w[:10].copy_(w[10:20])
    half = s.empty(40, 30, dtype=F16).copy_(w)
    back = s.empty(40, 30).normal_().copy_(half.t().contiguous().t())
    numbers = s.empty(400, dtype=torch.int32).zero_().copy_(s.empty(400).uniform_(0, 100))
    other = s.empty(400, dtype=BF16).zero_().copy_(s.empty(400, dtype=F16).fill_(0.1))
    square = s.empty(30, 30).normal_()
    square.copy_(square.t().clone())
    last = s.empty(17).copy_(w[0, :17], non_blocking=True)
    return w, v, u, half, back, square, numbers, other, last


@case
def copies_of_constants(s: Scope) -> Any:
    """What position ids, frequencies and sinusoids are made of."""
    position, frequency, table = s.empty(1, 64, dtype=torch.int64), s.empty(32), s.empty(64, 32)
    torch_init.zeros_(position)
    position.copy_(torch.arange(64).expand((1, -1)))
    torch_init.normal_(frequency)
    frequency.copy_(1.0 / (10000 ** (torch.arange(0, 64, 2).float() / 64)))
    table.normal_()
    table[:, 0::2] = torch.sin(torch.arange(64.0)[:, None] * frequency[:16])
    table[:, 1::2] = torch.cos(torch.arange(64.0)[:, None] * frequency[16:])
    decay = s.empty(24).uniform_(0, 16)
    decay.copy_(torch.log(decay))
    return position, frequency, table, decay


@case
def clones(s: Scope) -> Any:
    w = s.empty(40, 30).normal_()
    kept, lost, read = w.clone(), w.clone(), w.clone()
    lost.uniform_()
    total = read.sum().item()
    w.zero_()
    part = kept[3:7].clone()
    kept[4].fill_(9)
    again = kept.clone().clone()
    kept.normal_()
    return w, kept, lost, read, total, part, again


@case
def clones_of_views(s: Scope) -> Any:
    w = s.empty(40, 30).normal_()
    turned, column = w.t().clone(), w[:, 3].clone()
    rows = w[::2].clone(memory_format=torch.contiguous_format)
    w[1].zero_()
    spread = w[:1].expand(5, 30).clone()
    w.uniform_()
    return w, turned, column, rows, spread, w.flatten().clone(), w.reshape(-1, 8, 3)[::2].clone()


@case
def half_of_a_clone(s: Scope) -> Any:
    """The clone is partly overwritten, its source entirely."""
    w = s.empty(40, 30).normal_()
    copy = w.clone()
    copy[5:].uniform_()
    w.normal_()
    copy[:2].copy_(w[:2])
    del w
    return copy


# ---- operators that change memory ----


@case
def arithmetic(s: Scope) -> Any:
    w = s.empty(40, 30).uniform_(-0.9, 0.9).erfinv_().mul_(0.02 * math.sqrt(2)).add_(1.0)
    v = s.empty(40, 30).normal_().clamp_(-1, 1).div_(3).exp_()
    w += v
    v *= w
    v.sub_(w).abs_().sqrt_().neg_().round_()
    v.lerp_(w, 0.3).addcmul_(w, v).addcdiv_(w, w + 2)
    u = s.empty(30, 30).normal_().tril_().fill_diagonal_(5.0)
    u.triu_(-3).t_().add_(u.t().clone())
    return w, v, u, s.empty(30, 30).zero_().addmm_(u, u), s.empty(9).fill_(2).pow_(2).cumsum_(0)


@case
def indexed_writes(s: Scope) -> Any:
    w, i = s.empty(40, 30).normal_(), torch.tensor([1, 5, 7])
    w.masked_fill_(w > 1, 0.0)
    w.index_fill_(0, i, 2.0)
    w.index_copy_(0, i[:2], s.empty(2, 30).uniform_())
    w.index_add_(0, i, torch.ones(3, 30))
    w.scatter_(1, i.expand(4, 3), 9.0)
    w.index_put_((i, i), torch.tensor(4.0))
    w.put_(i, torch.tensor([1.0, 2.0, 3.0]))
    w.masked_scatter_(w < -1, s.empty(1200).uniform_())
    return w


@case
def foreach(s: Scope) -> Any:
    # Of .data, whose versions are not compared: torch's foreach operators do not count versions up
    # under any dispatch mode.
    w, v = nn.Parameter(s.empty(40, 30).normal_()), nn.Parameter(s.empty(41).uniform_())
    torch._foreach_mul_([w.data, v.data], 3.0)
    w.data.normal_()
    torch._foreach_add_([w.data, v.data], [w.data.clone(), v.data.clone()])
    v.data.normal_()
    torch._foreach_zero_([v.data])
    with torch.no_grad():
        total = nn.utils.parameters_to_vector([w, v]).sum()
        v.uniform_()
        nn.utils.vector_to_parameters(torch.arange(1241.0), [w, v])
    return w, v, total


@case
def outputs(s: Scope) -> Any:
    w, v, e = s.empty(40, 30).normal_(), s.empty(41).uniform_(), s.empty(30, 30).normal_()
    torch.eye(30, out=e)
    torch.zeros(40, 30, out=w)
    torch.ones(40, 15, out=w.t()[:15].t())
    torch.rand(41, out=v)
    torch.randn(41, out=v, generator=s.g)
    torch.full((20,), 3.0, out=v[:20])
    torch.arange(5.0, out=v[20:25])
    torch.normal(1.0, 2.0, (16,), out=v[25:])
    torch.mul(w, 2.0, out=w)
    torch.tril(e.normal_(), out=e)
    torch.cat([v, v], out=w.view(-1)[100:182])
    return w, v, e, torch.randperm(41, out=s.empty(41, dtype=torch.int64).zero_())


@case
def factories(s: Scope) -> Any:
    base = s.empty(40, 30).normal_()
    made = {
        "zeros": torch.zeros(40, 30),
        "ones": torch.ones(40, 30, dtype=BF16),
        "full": torch.full((40, 30), 0.1),
        "full of bool": torch.full((400,), True),
        "full of int": torch.full((400,), 7),
        "rand": torch.rand(40, 30),
        "randn": torch.randn(1000, generator=s.g, dtype=F16),
        "randint": torch.randint(5, (400,)),
        "normal": torch.normal(2.0, 0.5, (40, 30)),
        "normal of tensors": torch.normal(base, base.abs()),
        "bernoulli": torch.bernoulli(base.sigmoid()),
        "arange": torch.arange(400.0),
        "linspace": torch.linspace(0, 1, 400),
        "eye": torch.eye(30),
        "tril": torch.tril(torch.ones(64, 64, dtype=torch.bool)).view(1, 1, 64, 64),
        "masked": torch.full((64, 64), float("-inf")).triu_(1),
        "like": [torch.zeros_like(base), torch.ones_like(base), torch.full_like(base, 3)],
        "random like": [torch.rand_like(base), torch.randn_like(base), torch.empty_like(base[0])],
        "new": [base.new_zeros(400), base.new_ones(3, 200), base.new_full((400,), 2)],
        "old": torch.FloatTensor([[1, 2, 3], [4, 5, 6]]).uniform_(),
        "tensor": torch.tensor([[1.0, 2.0]] * 200).normal_(),
    }
    made["random like"][2].zero_()
    parameters = {k: nn.Parameter(v) for k, v in made.items() if k in ("zeros", "rand", "randn")}
    for p in parameters.values():
        torch_init.uniform_(p)
    made["ones"][3].zero_()
    made["tril"].logical_not_()
    return made, parameters


@case
def fills_with_a_tensor(s: Scope) -> Any:
    w, value = s.empty(40, 30), s.empty(()).normal_()
    w.fill_(value)
    value.zero_()
    w[3].fill_(torch.tensor(5))
    w[4] = value
    w[5].fill_(w[0, 0])
    _, failure, _ = attempt(w.fill_, torch.ones(3))
    return w, value, failure


@case.each
def test_writes(name: str, variant: str) -> None:
    compare(case[name], variant)
