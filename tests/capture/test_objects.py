# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): what becomes of objects: copied, saved, replaced, collected, trained."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.init as torch_init
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.support.compare import attempt
from tests.support.scopes import Cases, Scope, compare

case = Cases()


# ---- copies of objects ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.table = nn.Linear(40, 30), nn.Embedding(50, 40, padding_idx=2)
        self.head = nn.Linear(40, 50, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("mask", torch.ones(30, 30).tril())


@case
def deep_copies(s: Scope) -> Any:
    w, p, net = s.empty(40, 30).normal_(), nn.Parameter(s.empty(41).uniform_()), s.make(Net)
    first = [copy.deepcopy(w), copy.deepcopy(p), copy.deepcopy(net), copy.copy(w)]
    w.uniform_()
    p.data.zero_()
    net.body.reset_parameters()
    first[0][3].zero_()
    torch_init.normal_(first[2].head.weight)
    together = copy.deepcopy({"w": w, "row": w[3], "net": net})
    w.zero_()
    return w, p, net, first, together, copy.deepcopy(w.t())


@case
def copied_modules(s: Scope) -> Any:
    layer = s.make(nn.TransformerEncoderLayer, 16, 2, 32)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    for p in encoder.parameters():
        if p.dim() > 1:
            torch_init.xavier_uniform_(p)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32), 2)
    torch_init.normal_(layer.linear1.weight)
    target = copy.deepcopy(encoder).requires_grad_(False)
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    return layer, encoder, decoder, target, average


@case
def pickles(s: Scope) -> Any:
    w, net = s.empty(40, 30).normal_(), s.make(Net)
    seen = [pickle.loads(pickle.dumps(x)) for x in (w, w[3], w.t(), nn.Parameter(w), net)]
    w.uniform_()
    seen.append(w.__reduce_ex__(2)[0].__name__)
    net.body.reset_parameters()
    seen.append(pickle.loads(pickle.dumps({"w": w, "again": w, "part": w[2:]})))
    w.zero_()
    return w, net, seen


@case
def saved_files(s: Scope) -> Any:
    w, net, seen = s.empty(40, 30).normal_(), s.make(Net), []
    for what in (w, w[3:5], {"w": w, "part": w[0]}, net.state_dict(), [nn.Parameter(w)]):
        w.uniform_()
        torch_init.normal_(net.body.weight)
        file = io.BytesIO()
        torch.save(what, file)
        w.zero_()
        file.seek(0)
        seen.append(torch.load(file))
    file = io.BytesIO()
    torch.save(w.normal_(), file, _use_new_zipfile_serialization=False)
    return w, net, seen, torch.load(io.BytesIO(file.getvalue()))


@case
def state_dicts(s: Scope) -> Any:
    net, other, third = s.make(Net), Net(), Net()
    torch_init.normal_(net.body.weight)
    state = net.state_dict()
    other.load_state_dict(state)
    state["body.weight"].zero_()
    torch_init.uniform_(net.body.bias)
    third.load_state_dict(state, assign=True)
    torch_init.normal_(third.body.bias)
    kept = {key: value.clone() for key, value in state.items()}
    torch_init.ones_(net.table.weight)
    bad, failure, _ = attempt(net.load_state_dict, {"body.weight": torch.zeros(3)})
    return net, other, third, kept, bad, failure


# ---- what becomes of tensors ----


@case
def garbage(s: Scope) -> Any:
    w, gone = s.empty(40, 30).normal_(), []
    references = [weakref.ref(w), weakref.ref(w.untyped_storage())]
    v = w[3:]
    u = torch.empty(400).uniform_()
    weakref.finalize(u, lambda: gone.append(v.sum().item()))
    storage = StorageWeakRef(u.untyped_storage())
    del w, u
    gone += [reference() is None for reference in references]
    gone.append(storage.expired())
    net = Net()
    net.itself = [net]
    weak = weakref.ref(net)
    del net
    gc.collect()
    torch.empty(400).normal_()
    return gone, weak() is None, v


@case
def many_temporaries(s: Scope) -> Any:
    """Addresses, and the ids of storages, come up again and again."""
    kept, total = [], 0.0
    for i in range(300):
        w = torch.empty(400).normal_()
        if i % 3 == 0:
            w = torch.empty(400).uniform_()[7:]
        if i % 10 == 0:
            total += w.sum().item()
        if i % 29 == 0:
            kept += [w, w.clone()]
            w[3].zero_()
        torch.zeros(400)
    return kept, total, s.empty(400).zero_()


@case
def replaced_parameters(s: Scope) -> Any:
    net, second = s.make(Net), Net()
    old = net.body.weight
    torch_init.normal_(old)
    net.body.weight = nn.Parameter(torch.empty(5, 400))
    torch_init.uniform_(net.body.weight)
    torch_init.normal_(net.body.bias)
    del net.body.bias
    net.register_parameter("extra", nn.Parameter(torch.rand(400)))
    second.table = nn.Embedding(50, 40)
    second.head.weight = second.table.weight
    torch_init.normal_(second.head.weight)
    net.mask = torch.empty(400).normal_()
    net.head = nn.Identity()
    return old.sum().item(), net, second


GLOBAL: list[Any] = []


def leave_by_yielding(w: torch.Tensor) -> Iterator[torch.Tensor]:
    yield w.normal_()
    yield w[3].zero_()
    yield w.clone()


@case
def leaving_by_other_ways(s: Scope) -> Any:
    w, v, u, x = s.empty(400), s.empty(400), s.empty(40, 30), s.empty(400)
    GLOBAL[:] = [w.normal_()]
    leave_by_yielding.kept = v.uniform_()  # type: ignore[attr-defined]
    steps = leave_by_yielding(u)
    next(steps)

    def closure() -> torch.Tensor:
        return x

    x.normal_()
    return GLOBAL, vars(leave_by_yielding), closure, [next(steps), u], lambda: list(steps)


# ---- training inside ----


def multilayer() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))


@case
def forward_and_backward(s: Scope) -> Any:
    net, x = s.make(multilayer), s.empty(7, 40)
    net[0].reset_parameters()
    torch_init.orthogonal_(net[2].weight)
    norms: list[float] = []
    net[0].weight.register_hook(lambda grad: norms.append(grad.norm().item()))
    y = net(x.normal_())
    y.square().sum().backward()
    net[0].weight.grad.zero_()
    torch_init.zeros_(net[2].bias)
    y = F.dropout(net(x.uniform_()), 0.3)
    (grad,) = torch.autograd.grad(y.sum(), net[2].weight)
    return net, y, grad, norms, F.cross_entropy(net(x), torch.zeros(7, dtype=torch.int64))


@case
def optimizers(s: Scope) -> Any:
    made = []
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop):
        layer = s.make(nn.Linear, 40, 30)
        optimizer = kind(layer.parameters(), lr=0.1)
        layer.reset_parameters()
        for _ in range(2):
            layer(torch.ones(3, 40)).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        torch_init.zeros_(layer.bias)
        made += [layer, [list(x.values()) for x in optimizer.state_dict()["state"].values()]]
    return made


@case
def grad_modes(s: Scope) -> Any:
    w, made = s.empty(40, 30), []
    with torch.no_grad():
        p = nn.Parameter(w.normal_())
        p.uniform_()
        with torch.enable_grad():
            made.append((p * 2).detach().sum())
            made.append(attempt(p.normal_)[1])
    with torch.inference_mode():
        x = torch.empty(400).normal_()
        made += [x, x.is_inference(), torch.zeros(400), w[3].zero_()]
        x[3:9].uniform_()
    made += [attempt(x.zero_)[1], torch.empty(400).normal_().requires_grad_()]
    with torch.set_grad_enabled(False):
        torch_init.normal_(p)
    y = torch.empty(400, requires_grad=True)
    y.data.uniform_()
    return p, made, y


@case
def saved_for_backward(s: Scope) -> Any:
    w, p = s.empty(40, 30).normal_(), nn.Parameter(s.empty(40, 30).uniform_())
    packed: list[Any] = []

    def pack(x: torch.Tensor) -> np.ndarray:
        packed.append(x.detach().numpy().copy())
        return packed[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        loss = (p * w).sum()
    w.zero_()
    loss.backward()
    used = torch.utils.checkpoint.checkpoint(lambda x: (x * w).sin().sum(), p, use_reentrant=False)
    used.backward()
    return w, p, packed


@case.each
@pytest.mark.usefixtures("own_factors")
def test_objects(name: str, variant: str) -> None:
    compare(case[name], variant)
