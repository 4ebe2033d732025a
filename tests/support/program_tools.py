# SPDX-License-Identifier: BSD-3-Clause
"""Names that random programs use beside torch's: odd ways to read, contexts, threads."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import io
import math
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn.init import constant_, kaiming_uniform_, normal_, trunc_normal_, uniform_, zeros_
from torch.utils._python_dispatch import TorchDispatchMode

import fastinit
from tests.support.modes import DispatchLog, FunctionLog

__all__ = [
    "Address", "DispatchLog", "FunctionLog", "Hundredths", "Later", "Table", "address",
    "changed_memory", "constant_", "contextlib", "copy", "default_dtype", "fastinit", "give",
    "in_pool", "in_thread", "into", "kaiming_uniform_", "listed", "logged", "math", "nn", "normal_",
    "np", "parameter", "peek", "pickle", "saved", "small", "torch", "trunc_normal_", "uniform_",
    "width", "zeros_",
]  # fmt: skip


def small(t: torch.Tensor) -> torch.Tensor:
    """Return a tensor that can be factored soon: 20,000 x 20,000 takes torch minutes."""
    if t.numel() > 1 << 20:
        raise ValueError("too large")
    return t


def parameter(module: nn.Module, k: int) -> torch.Tensor:
    """Return one of a module's parameters and buffers."""
    found = [*module.parameters(), *module.buffers()]
    return found[k % len(found)]


def width(module: nn.Module) -> int:
    """Return how long the rows of a module's first parameter are, as its input has to be."""
    return next(module.parameters()).shape[-1]


def give(p: torch.Tensor, data: torch.Tensor) -> None:
    """Set a parameter's data, if it has the same shape: torch's weight_norm writes past another."""
    if p.shape != data.shape:
        raise ValueError("another shape")
    p.data = data


class Table(nn.Module):
    """A module as people write them: a weight, a table without gradients, a buffer."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.table = nn.Parameter(torch.randn(rows, columns) * 0.02, requires_grad=False)
        self.register_buffer("mask", torch.tril(torch.ones(columns, columns)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        with torch.no_grad():
            self.weight[0].fill_(0)
            self.table.uniform_(-1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t() @ self.table


# ---- reads that no operator announces ------------------------------------------------------------


class Address:
    """Where a tensor's storage is, known for as long as somebody likes; it is kept alive."""

    def __init__(self, t: torch.Tensor) -> None:
        self._kept = t.untyped_storage()
        self._nbytes = self._kept.nbytes()
        self._address = t.data_ptr() - t.storage_offset() * t.element_size()

    def read(self) -> bytes:
        assert self._kept.nbytes() == self._nbytes
        return ctypes.string_at(self._address, self._nbytes)


def address(t: torch.Tensor) -> Address:
    if t.is_meta or t.layout != torch.strided or t.numel() == 0:
        raise TypeError("no address")
    return Address(t)


def peek(t: torch.Tensor) -> bytes:
    """Return what is at a tensor's address."""
    if t.is_meta or not t.is_contiguous() or t.numel() == 0:
        raise TypeError("no address")
    return ctypes.string_at(t.data_ptr(), t.numel() * t.element_size())


def saved(x: Any, how: int) -> Any:
    """Return what comes back from a file."""
    if how == 0:
        return pickle.loads(pickle.dumps(x))
    file = io.BytesIO()
    torch.save(x, file, _use_new_zipfile_serialization=how != 2)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def changed_memory(t: torch.Tensor) -> torch.Tensor:
    """Free a tensor's memory and give it new one, full of zeros, as FSDP does."""
    storage = t.untyped_storage()
    nbytes = storage.nbytes()
    storage.resize_(0)
    storage.resize_(nbytes)
    storage.fill_(0)
    return t


@functools.cache
def _script() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.jit.script(_listed)


def _listed(x: torch.Tensor):
    values: list[float] = x.tolist()
    return values


def listed(t: torch.Tensor) -> list[float]:
    """Return the values of a vector of float32 as TorchScript reads them."""
    return _script()(t.detach().float().view(-1))


def into(out: torch.Tensor, t: torch.Tensor, x: Any) -> None:
    """Multiply into a tensor that is there; another shape would change its memory."""
    if out.shape != t.shape:
        raise ValueError("another shape")
    torch.mul(t, x, out=out)


# ---- contexts, threads ---------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Hundredths(TorchDispatchMode):
    """Replaces random draws by a number that trunc_normal_ does not reject."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return args[0].fill_(0.01)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def logged(mode: Any, note: Callable[[Any], None]) -> Iterator[None]:
    """Enter a mode, and note afterwards what it has seen.

    Of functions only those that write: a scope asks tensors for this and that.
    """
    try:
        with mode:
            yield
    finally:
        seen = [(getattr(f, "__name__", str(f)), *rest) for f, *rest in mode.log]
        functions = isinstance(mode, FunctionLog)
        note([x for x in seen if not functions or re.search(r"[a-z]_$", x[0])])


def _begin_thread() -> None:
    """Make torch use as many threads for linear algebra as it is told to.

    In a new thread it does only after the first operator that asks, which a scope may do sooner.
    """
    torch.get_num_threads()


def in_thread(body: Callable[[], None]) -> None:
    """Run a function in a thread of its own until it ends, and raise what it raises."""
    errors: list[BaseException] = []

    def guarded() -> None:
        _begin_thread()
        try:
            body()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if errors:
        raise errors.pop()


def in_pool(pool: ThreadPoolExecutor) -> Callable[[Callable[[], None]], None]:
    def run(body: Callable[[], None]) -> None:
        pool.submit(lambda: (_begin_thread(), body())).result()

    return run


class Later:
    """A thread that starts now, and does something when it is told to."""

    waiting: ClassVar[list[Later]] = []

    def __init__(self, what: Callable[[], Any]) -> None:
        self.waiting.append(self)
        self._what, self._told = what, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _begin_thread()
        self._told.wait()
        try:
            self._what()
        except Exception as error:
            self.error = str(error)

    def go(self) -> None:
        self._told.set()
        self._thread.join()

    @classmethod
    def end_all(cls) -> None:
        """Let those end that were not told."""
        while cls.waiting:
            later = cls.waiting.pop()
            later._what = lambda: None
            later.go()
