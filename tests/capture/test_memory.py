# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): memory that is taken away or replaced, in a process of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.init as torch_init
from torch import nn

from tests.support.compare import BF16, F64
from tests.support.scopes import Cases, Scope, compare_in_process

DANGEROUS = Cases()  # a late fill would write to freed memory


@DANGEROUS
def data_is_replaced(s: Scope) -> Any:
    p, q = nn.Parameter(s.empty(40, 30)), nn.Parameter(s.empty(41))
    torch_init.normal_(p)
    p.data = torch.full((40, 30), 2.0)
    torch_init.normal_(p.data[3:])
    old = q.data
    torch_init.uniform_(q)
    q.data = torch.ones(3)
    torch_init.normal_(q)
    r = nn.Parameter(s.empty(4000).normal_())
    r.data = r.data.double()
    r.data = r.data[:5]
    torch_init.uniform_(r)
    r.data = torch.ones(2, dtype=BF16)
    return p, q, old, r


@DANGEROUS
def tensors_are_swapped(s: Scope) -> Any:
    one, two = nn.Parameter(s.empty(4000)), nn.Parameter(s.empty(9))
    torch_init.normal_(one)
    torch.utils.swap_tensors(one, two)
    torch_init.uniform_(two)
    torch_init.zeros_(one)
    future = torch.__future__
    future.set_swap_module_params_on_conversion(True)
    try:
        layer = nn.Linear(40, 30).to(F64)
    finally:
        future.set_swap_module_params_on_conversion(False)
    return one, two, layer


@DANGEROUS
def tensors_are_resized(s: Scope) -> Any:
    w = s.empty(40, 30).normal_()
    w.resize_(10, 3)
    w.uniform_()
    w.resize_(90, 80).normal_()
    v = s.empty(41).normal_()
    v.resize_(400)[41:].zero_()
    u = s.empty(400).uniform_().resize_as_(torch.zeros(3))
    return w, v, u, torch.add(u, 1, out=s.empty(0))


@DANGEROUS
def tensors_are_set(s: Scope) -> Any:
    w, v = s.empty(40, 30).normal_(), s.empty(41).uniform_()
    w.set_(v)
    w[3:].normal_()
    other = torch.empty(0).set_(v.untyped_storage(), 4, (3, 5), (1, 7))
    other.zero_()
    u = s.empty(4000).normal_()
    u.set_(torch.zeros(12))
    u[3:].normal_()
    third = s.empty(400).normal_()
    third.set_()
    return w, v, other, u, third.is_set_to(u)


@DANGEROUS
def storages_are_resized(s: Scope) -> Any:
    """As FSDP frees and takes back the memory of parameters."""
    w, v = s.empty(40, 30).normal_(), s.empty(4000).normal_()
    size = w.untyped_storage().nbytes()
    w.untyped_storage().resize_(0)
    w.untyped_storage().resize_(size)
    w.uniform_()
    w.untyped_storage().resize_(2 * size)
    v.untyped_storage().resize_(40)
    return w, v[:10].clone(), w.untyped_storage().nbytes()


@DANGEROUS
def storages_are_written(s: Scope) -> Any:
    w, v, u = s.empty(40, 30).normal_(), s.empty(41).uniform_(), s.empty(40, 30).uniform_()
    w.untyped_storage().fill_(0)
    w[3].normal_()
    w.untyped_storage()[4] = 7
    u.untyped_storage().copy_(w.untyped_storage())
    w.zero_()
    storage = v.untyped_storage()
    v.normal_()
    storage.fill_(1)
    return w, v, u, bytes(storage)


@DANGEROUS
def memory_is_freed_and_used_again(s: Scope) -> Any:
    """A late fill would hit whoever has the memory then."""
    kept = []
    for i in range(400):
        w = torch.empty(400).normal_()
        if i % 7 == 0:
            kept.append(w[3:300])
        w = None
        kept.append(torch.arange(400)) if i % 11 == 0 else torch.zeros(400)
    parameters = [nn.Parameter(torch.empty(400).uniform_()) for _ in range(50)]
    for p in parameters[::2]:
        p.data = torch.arange(3.0)
    return kept, parameters, s.empty(3).zero_()


@DANGEROUS
def fills_of_freed_windows(s: Scope) -> Any:
    w = s.empty(4000).zero_()
    window = w[3000:]
    window.normal_()
    w.resize_(10)
    del window
    v = s.empty(40, 30).normal_()
    row = v[39]
    v.data = v.data[:2].clone()
    row.uniform_()
    return w, v, row


@DANGEROUS
def grown(s: Scope) -> Any:
    """A storage whose size is not what it was."""
    x = s.empty(5000).uniform_()

    def more() -> torch.Tensor:
        t = s.empty(5000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.arange(50_000.0, out=t)
        return t

    t, u, v = more(), more(), more()
    t[:5000].fill_(1)
    t[5000:].fill_(2)
    made = [t[:5000].clone(), copy.deepcopy(t[:5000]), t[5000:].clone()]
    u.fill_(3)
    u[:5000].copy_(x)
    v[:5000].uniform_()
    torch_init.orthogonal_(v[:4900].view(70, 70))
    made.append(v.clone())
    torch.arange(60_000.0, 70_000.0, out=s.empty(1).resize_(50_000).zero_()[:10_000])
    return x, t, u, v, made


def test_memory_that_goes_away(python: Callable[..., Any]) -> None:
    compare_in_process(python, __name__)
