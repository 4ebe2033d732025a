# SPDX-License-Identifier: BSD-3-Clause
"""Modes of torch that note or replace what they see."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class FunctionLog(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append((func, len(args), sorted(kwargs or {})))
        return func(*args, **(kwargs or {}))


class DispatchLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        described = tree_map(lambda a: a.shape if isinstance(a, torch.Tensor) else a, args)
        self.log.append((str(func), described, sorted(kwargs or {})))
        return func(*args, **(kwargs or {}))


class EverythingIsSeven(TorchDispatchMode):
    """Replaces every random draw, as deterministic-init tools do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return args[0].fill_(7.0)
        return func(*args, **(kwargs or {}))
