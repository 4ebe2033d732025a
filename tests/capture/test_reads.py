# SPDX-License-Identifier: BSD-3-Clause
"""Inside fused(): every way to read memory whose fills are held back."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.nn.init as torch_init
from torch import nn

from tests.support.compare import BF16, F16, F64
from tests.support.scopes import Cases, Scope, compare

case = Cases()


def raw(tensor: torch.Tensor) -> bytes:
    """The memory at its address."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


# ---- operators and Python's own operations ----


@case
def python_values(s: Scope) -> Any:
    w, one, n = s.empty(40, 30), s.empty(1).uniform_(), s.empty((), dtype=torch.int64).fill_(3)
    seen = [one.item(), float(one), bool(one > 0.5), int(n), [5, 6, 7, 8][n], n.__index__(), len(w)]
    one.normal_()
    seen += [f"{one.item():.3f}", str(one), repr(w.normal_()), one.tolist(), complex(one)]
    seen += [one[0].item() in w, w.uniform_()[3, 4].item(), [x.item() for x in w[0]]]
    w.normal_()
    seen += [max(w[1]).item(), sorted(w[2].tolist()), bool((w > 0).any()), w.std().item()]
    w.uniform_(0, 1 + abs(seen[0]))
    seen.append(f"{w.zero_().sum() + 1:.4f}")
    torch_init.zeros_(w) if seen[-1] > "0.5" else torch_init.ones_(w)
    return seen, w, one


@case
def read_and_filled_again(s: Scope) -> Any:
    w, seen = s.empty(40, 30), []
    for i in range(20):
        (w.normal_, w.uniform_, w.zero_)[i % 3]()
        if i % 4 == 1:
            seen.append(w[i].sum().item())
        if i % 5 == 0:
            seen.append(torch.isfinite(w).all().item())
    return w, seen


@case
def views_are_read(s: Scope) -> Any:
    w = s.empty(40, 30)
    window, turned = w[3:5].t(), w.unfold(1, 5, 5)
    w.normal_()
    seen = [window.sum().item(), turned.sum().item(), w.expand(2, 40, 30).amax().item()]
    w[:, 7:].uniform_()
    seen += [window.max().item(), w.diagonal().tolist(), w.view(torch.int32)[3, 4].item()]
    w.zero_()
    seen += [torch.empty(0).set_(w.untyped_storage()).sum().item(), window.tolist()]
    w.uniform_()
    return seen, window, turned.mean(), w.as_strided((3, 3), (31, 1), 5).clone()


@case
def only_some_are_read(s: Scope) -> Any:
    made = [s.empty(400).normal_() for _ in range(8)]
    seen = [made[3].sum().item(), (made[4] @ made[6]).item()]
    for w in made[2:5]:
        w.uniform_()
    return seen, made


@case
def lists_are_read(s: Scope) -> Any:
    w, v = s.empty(40, 30).normal_(), s.empty(40, 30).uniform_()
    seen = [torch.cat([w, v]), torch.stack((w, v), 1), torch.block_diag(w[:3], v[:2])]
    w.zero_()
    seen += [torch.einsum("ij,kj->ik", w, v), *torch._foreach_add([w, v], 1.0)]
    v.normal_()
    seen += [torch.where(v > 0, v, w), torch.allclose(w, v), torch.equal(w, w.clone())]
    w.normal_()
    return seen, torch.broadcast_tensors(w, v[:1]), torch.meshgrid(w[0], v[0], indexing="ij")


@case
def converted(s: Scope) -> Any:
    w = s.empty(40, 30).normal_()
    seen = [w.to(BF16), w.half(), w.double(), w.to(F64, copy=True), w.type(torch.int32), w.bool()]
    same = w.to(torch.float32)
    w.uniform_()
    seen += [same, w.cpu(), w.contiguous(), w.t().contiguous(), w.to(w), w.float().to(F16)]
    w.to(BF16).zero_()
    w.half()
    layer = s.make(nn.Linear, 40, 30)
    layer.reset_parameters()
    return w, seen, layer.half(), s.make(nn.LSTM, 5, 6).to(BF16), nn.Linear(9, 40).double()


@case
def padded_and_pruned(s: Scope) -> Any:
    """As models adjust a bias, or take over part of a matrix."""
    bias, w = nn.Parameter(s.empty(41)), s.empty(40, 30)
    torch_init.zeros_(bias)
    bias.data = F.pad(bias.data, (0, 7), "constant", 0)
    torch_init.normal_(w)
    larger = torch.zeros(50, 30)
    larger[:40] = w
    w.uniform_()
    bias.data[3:9].fill_(1)
    return bias, larger, F.pad(w, (1, 2, 3, 4), value=1.0), w.repeat(2, 1), w.roll(3).flip(0)


# ---- memory that is read without an operator ----


@case
def arrays(s: Scope) -> Any:
    w, seen = s.empty(40, 30), []
    for read in (
        torch.Tensor.numpy,
        np.asarray,
        np.array,
        torch.Tensor.__array__,
        np.from_dlpack,
        torch.Tensor.tolist,
        lambda t: np.copy(t.detach()),
        lambda t: np.stack([t[3], t[4]]),
        lambda t: nn.Parameter(t).detach().numpy().copy(),
        lambda t: nn.Parameter(t).numpy(force=True),
        lambda t: t.data.t()[2].numpy(),
    ):
        w.normal_()
        found = read(w)
        seen.append(found.copy() if isinstance(found, np.ndarray) else found)
        w.uniform_()
    return w, seen


@case
def addresses(s: Scope) -> Any:
    w, seen = s.empty(40, 30), []
    seen.append(raw(w.normal_()))
    seen.append(raw(w[3:].uniform_()))
    seen.append(raw(w.data.normal_()))
    storage = w.uniform_().untyped_storage()
    seen.append(ctypes.string_at(storage.data_ptr(), storage.nbytes()))
    v = s.empty(400).normal_()
    if hasattr(v, "const_data_ptr"):  # not in every torch
        seen.append(ctypes.string_at(v.const_data_ptr(), v.nbytes))
    address = w.data_ptr()
    w.normal_()
    w[3].zero_()
    seen.append(ctypes.string_at(address, w.nbytes))
    ctypes.memset(address, 0, 4 * 30)
    seen.append(w[:2].sum().item())
    w[5].normal_()
    return w, seen


@case
def storages(s: Scope) -> Any:
    w, seen = s.empty(11, 30), []
    seen.append(bytes(w.normal_().untyped_storage()))
    seen.append(w.uniform_().untyped_storage().tolist())
    seen.append(bytes(w.normal_().untyped_storage().clone()))
    seen.append(w.uniform_().untyped_storage()[7])
    seen += [w.normal_().storage().tolist(), w.zero_().storage()[5], w[2].uniform_().storage()[65]]
    storage = w.untyped_storage()
    w.uniform_()
    seen += [bytes(storage), storage[1319]]
    w[4].zero_()
    seen += [bytes(copy.deepcopy(storage)), pickle.dumps(storage.tolist()), storage.nbytes()]
    return w, seen


@case
def dlpack(s: Scope) -> Any:
    w, seen = s.empty(40, 30), []
    seen.append(torch.utils.dlpack.from_dlpack(w.normal_()).sum().item())
    seen.append(torch.from_dlpack(torch.utils.dlpack.to_dlpack(w.uniform_())).sum().item())
    seen.append(torch.from_dlpack(w.normal_().__dlpack__()).sum().item())
    shared = torch.from_dlpack(w)
    array = np.from_dlpack(w)
    w.uniform_()
    seen += [shared.sum().item(), float(array.sum())]
    shared[3].zero_()
    w[4].normal_()
    return w, seen, array


@case
def exported_before_the_fill(s: Scope) -> Any:
    """Nobody will tell when these are read or written."""
    w, v, seen = s.empty(40, 30).zero_(), s.empty(41).zero_(), []
    array, view = w.numpy(), memoryview(v.numpy())
    w.normal_()
    seen.append(array.copy())
    w[3].zero_()
    array[4] = 1.0
    w[5].uniform_()
    seen.append(float(array.sum()))
    v.uniform_()
    seen.append(bytes(view))
    w.zero_()
    array += 1
    del w
    return v, seen, array


def as_array_and_tensor(size: int) -> tuple[torch.Tensor, np.ndarray]:
    w = torch.zeros(size)
    return w, w.numpy()


def over_an_array(size: int) -> tuple[torch.Tensor, np.ndarray]:
    array = np.zeros(size, dtype=np.float32)
    return torch.from_numpy(array), array


def over_a_buffer(size: int) -> tuple[torch.Tensor, np.ndarray]:
    buffer = bytearray(4 * size)
    return torch.frombuffer(buffer, dtype=torch.float32), np.frombuffer(buffer, dtype=np.float32)


def over_dlpack(size: int) -> tuple[torch.Tensor, np.ndarray]:
    array = np.zeros(size, dtype=np.float32)
    return torch.from_dlpack(array), array


def asarray(size: int) -> tuple[torch.Tensor, np.ndarray]:
    array = np.zeros(size, dtype=np.float32)
    return torch.asarray(array).view(-1, 4).view(-1), array


@case
def memory_of_others(s: Scope) -> Any:
    seen = []
    for make in (as_array_and_tensor, over_an_array, over_a_buffer, over_dlpack, asarray):
        w, array = s.make(make, 400)
        w.normal_()
        seen.append(array.copy())
        w[3:300].uniform_()
        array[7] = 5
        w[:4].zero_()
        seen.append(float(array.sum()))
        nn.Parameter(w).data.uniform_()
        del w
        seen.append(array)
    return seen


@case
def files_in_memory(s: Scope) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mapped")
        path.write_bytes(bytes(1600))
        w = torch.from_file(str(path), shared=True, size=400)
        w.normal_()
        first = path.read_bytes()
        w[3:].uniform_()
        second = path.read_bytes()
        saved = Path(folder, "saved")
        torch.save({"w": s.empty(400).normal_()}, saved)
        mapped = torch.load(saved, mmap=True)["w"]
        third = mapped.clone()
        mapped.uniform_()
        w.zero_()
        return first, second, third, mapped.clone(), torch.load(saved)


@case
def shared_memory(s: Scope) -> Any:
    w = s.empty(40, 30).normal_()
    w[3].zero_()
    w.share_memory_()
    total = w.sum().item()
    w.uniform_()
    layer = nn.Linear(20, 30).share_memory()
    torch_init.normal_(layer.weight)
    return w, total, w.is_shared(), layer


def in_a_child(job: Callable[[], bytes]) -> bytes:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)  # a child that hangs is killed, and the parent reads nothing
            os.write(writer, job())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return found


@case
def forks(s: Scope) -> Any:
    w, v = s.empty(400).normal_(), s.empty(400)
    seen = [
        in_a_child(lambda: raw(w.uniform_())),
        in_a_child(lambda: raw(v.normal_(generator=s.g))),
    ]
    w[3:9].zero_()
    seen.append(in_a_child(lambda: w.numpy().tobytes()))
    return seen, w, v.uniform_()


@case
def forks_with_shared_memory(s: Scope) -> Any:
    """What the child asks for is there when it has gone, though it never leaves the scope."""
    w = s.empty(400).normal_().share_memory_()
    in_a_child(lambda: w[:300].fill_(5).shape.__repr__().encode())
    first = w.clone()
    in_a_child(lambda: str(w.uniform_().dtype).encode())
    return first, w


@case.each
def test_reads(name: str, variant: str) -> None:
    compare(case[name], variant)
