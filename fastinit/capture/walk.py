# SPDX-License-Identifier: BSD-3-Clause
"""`record`: the dispatch mode that sees what a function does to a model, and does none of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastinit import probe
from fastinit.capture.operators import (
    EMPTY,
    FACTORIES,
    FILLS,
    OVERWRITING,
    is_inplace,
    is_view,
    leaves,
)
from fastinit.core import build, geometry
from fastinit.core.fill import Fill
from fastinit.core.key import Key
from fastinit.core.laws import Law
from fastinit.core.mode import Mode
from fastinit.core.recording import Call, Recorder


class Walk(Mode, Recorder):
    """Records what is done to some tensors instead of doing it.

    A tensor is either written by the plan (the model's, and temporaries filled from a generator) or
    one of its constants, which must not change any more once a step of the plan reads them.

    Args:
        plan: takes the fills and the calls of torch.nn.init's functions
        append: takes any other operator, to be done again at its place
        tensors: that the plan writes
    """

    modes = 1
    is_told = True

    def __init__(
        self,
        plan: Recorder,
        append: Callable[[Callable[[], None]], None],
        tensors: Iterable[Tensor],
    ) -> None:
        super().__init__()
        self._plan, self._append = plan, append
        self._written = {geometry.storage_id(t) for t in tensors if _is_simple(t)}  # storages
        self._constants: set[int] = set()  # storages

    def add(self, fills: list[Fill], law: Law) -> None:
        self._tell(f.tensor for f in fills)
        self._written.update(geometry.storage_id(f.tensor) for f in fills)
        self._plan.add(fills, law)

    def call(self, call: Call) -> Tensor:
        if any(isinstance(x, Tensor) for x in call.args):
            self._refuse(call.name)
        self._tell([call.tensor])
        self._written.add(geometry.storage_id(call.tensor))
        return self._plan.call(call)

    def fill_keyed(self, law: Law, tensor: Tensor, key: Key | None) -> None:
        self._tell([tensor])
        self._written.add(geometry.storage_id(tensor))
        self._plan.fill_keyed(law, tensor, key)

    def _tell(self, tensors: Iterable[Tensor]) -> None:
        if self.watch is not None:
            for t in tensors:
                self.watch(t)

    def read(self, t: Tensor, how: str) -> None:
        if self.reads is not None:
            self.reads(t)
        if _is_simple(t) and geometry.storage_id(t) in self._written | self._constants:
            self._refuse(how)

    expose = read

    def settle(self, reader: object = None) -> None:
        self._refuse(reader)

    @staticmethod
    def _refuse(what: object) -> NoReturn:
        raise RuntimeError(
            f"record: {what} reads what the function initialises, or draws or writes what cannot "
            "be repeated; what it does to the model cannot be known before it is done"
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        random = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        shape_only = func in EMPTY or (func in FACTORIES and not random)
        if is_view(func) or shape_only:
            return func(*args, **kwargs)
        for t in tensors:
            if not _is_simple(t):
                self._refuse(f"{func} of a {type(t).__name__}")
        keys = [geometry.storage_id(t) for t in tensors if t.layout is torch.strided]
        written = [key in self._written for key in keys]
        inplace = is_inplace(func) and len(keys) > 0
        if inplace and func._schema.name in OVERWRITING and keys[0] not in self._constants:
            t = tensors[0]
            whole = t.numel() * t.element_size() == geometry.storage_of(t).nbytes()
            if whole and (random or any(written)):  # a temporary that the plan makes each time
                written[0] = True
                self._written.add(keys[0])
        if func in FILLS and written[0] and not any(written[1:]):
            law = FILLS[func](args, kwargs)
            fill = law and probe.proved(build.one(law, args[0], kwargs.get("generator")))
            if law is not None and fill is not None:
                self.add([fill], law)
                return args[0]
        if not any(written):
            if random or (func._schema.is_mutable and keys[0] in self._constants):
                self._refuse(func)
            return func(*args, **kwargs)
        if not inplace or not written[0]:
            self._refuse(func)

        def again() -> None:
            with torch.no_grad():
                func(*args, **kwargs)

        self._constants.update(key for key, known in zip(keys, written) if not known)
        self._append(again)
        return args[0] if func._schema.returns else None


def _is_simple(t: Tensor) -> bool:
    """Return whether a tensor's values are what is in its storage."""
    if t.layout is not torch.strided:
        return False
    return type(t) in geometry.PLAIN or type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
