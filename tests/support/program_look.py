# SPDX-License-Identifier: BSD-3-Clause
"""Everything that can be reached from what a program leaves behind."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.program_tools import Address

Seen = dict[str, Any]
_VALUES = (bytes, str, int, float, type(None), torch.dtype, torch.device, torch.layout)


def bytes_of(t: Tensor) -> bytes:
    flat = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _history(x: Tensor) -> tuple[Any, ...]:
    try:
        return x.requires_grad, x.is_leaf, type(x.grad_fn).__name__
    except RuntimeError as error:  # a view whose base was written to where it must not be
        return x.requires_grad, str(error)


def _version(x: Tensor) -> int:
    try:
        return x._version
    except RuntimeError:  # an inference tensor, or a view of one
        return -1


class Look:
    """What is reachable from some objects, by path."""

    def __init__(self) -> None:
        self.seen: Seen = {}
        self._tensors: list[Tensor] = []
        self._storages: list[Any] = []

    def at(self, path: str, x: Any) -> None:
        if isinstance(x, Tensor):
            self._tensor(path, x)
        elif isinstance(x, nn.Module):
            self.seen[f"{path} type"] = (type(x).__name__, x.training, list(vars(x)["_modules"]))
            self.at(f"{path}.parameters", dict(x.named_parameters(remove_duplicate=False)))
            self.at(f"{path}.buffers", dict(x.named_buffers(remove_duplicate=False)))
        elif isinstance(x, np.ndarray):
            self.seen[path] = (x.dtype.str, x.shape, x.strides, x.flags.writeable, x.tobytes())
            self.seen[f"{path} memory"] = self._place(x.__array_interface__["data"][0])
        elif isinstance(x, Address):
            self.seen[path] = x.read()
        elif isinstance(x, dict):
            self.seen[f"{path} keys"] = list(map(str, x))
            for key, value in x.items():
                self.at(f"{path}.{key}", value)
        elif isinstance(x, (list, tuple)):
            self.seen[path] = (type(x).__name__, len(x))
            for i, value in enumerate(x):
                self.at(f"{path}[{i}]", value)
        else:
            self.seen[path] = copied(x)

    def _tensor(self, path: str, x: Tensor) -> None:
        same = [i for i, other in enumerate(self._tensors) if other is x]
        if same:
            self.seen[path] = f"tensor {same[0]}"
            return
        self._tensors.append(x)
        kind = (type(x).__name__, tuple(x.shape), x.dtype, x.layout, x.device)
        self.seen[f"{path} kind"] = (*kind, x._is_view(), x.is_inference(), sorted(vars(x)))
        self.seen[f"{path} history"] = history = _history(x)
        self.seen[f"{path} version"] = _version(x)
        if x.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return
        storage = x.untyped_storage()
        found = [i for i, s in enumerate(self._storages) if s._cdata == storage._cdata]
        index = found[0] if found else len(self._storages)
        geometry = (x.stride(), x.storage_offset(), x.is_conj(), x.is_neg())
        self.seen[f"{path} geometry"] = (*geometry, index, storage.nbytes())
        if not found:
            self._storages.append(storage)
            if not x.is_meta:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.seen[f"{path} storage"] = whole.numpy().tobytes()
                self.seen[f"{path} kind of storage"] = (storage.resizable(), storage.is_shared())
        if history[1] is True and x.grad is not None:
            self.at(f"{path}.grad", x.grad)
        if x._base is not None:
            self.at(f"{path}._base", x._base)

    def _place(self, address: int) -> tuple[int, int] | None:
        """Which of the storages an address lies in, and where."""
        for i, storage in enumerate(self._storages):
            if 0 <= address - storage.data_ptr() < storage.nbytes():
                return i, address - storage.data_ptr()
        return None


def copied(x: Any) -> Any:
    """Return values that do not change any more, of what a program notes."""
    if isinstance(x, Tensor):
        values = "" if x.is_meta or x.layout is not torch.strided else bytes_of(x)
        return (type(x).__name__, tuple(x.shape), str(x.dtype), values)
    if isinstance(x, np.ndarray):
        return (x.dtype.str, x.shape, x.tobytes())
    if isinstance(x, dict):
        return {key: copied(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [copied(y) for y in x]
    if isinstance(x, str):
        return re.sub(r"0x[0-9a-f]+", "0x", x)  # addresses, in a repr()
    return repr(x) if isinstance(x, _VALUES) else type(x).__name__
