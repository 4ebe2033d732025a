# SPDX-License-Identifier: BSD-3-Clause
"""Helpers of the suite: make the same call in torch.nn.init and in fastinit and compare all of it.

"The same" is meant literally: the bits of the tensor and of everything else in its storage, the
returned object, the version counter, warnings, exceptions, and every byte of both generators.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from fastinit.cuda import qr as cuda_qr

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# torch's result starts from the first, fastinit's from the second: an element that fastinit does
# not write, or that it reads, cannot end up equal.
POISONS = (float("nan"), -77.0)


def use_own_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's orthogonal_ have our factors, which are not its own to the bit.

    All else is torch's: draws, their order, shapes, transposition, copies, gain, errors.
    """
    factor = torch.linalg.qr

    def qr_of(a: torch.Tensor, *args: Any) -> Any:
        if type(a) is not torch.Tensor or a.dtype not in (F32, F64) or a.is_meta:
            return factor(a, *args)
        wide = not a.is_contiguous()  # torch has transposed it
        q = (a.t() if wide else a) * torch.ones(())  # is read, whoever watches
        if q.is_cuda:
            cuda_qr.orthonormalize([cuda_qr.Job(q, q, *q.shape, 1.0)])
        else:
            fastinit.cpu.qr.factor_(q, 1.0)
        return q.t() if wide else q, torch.eye(a.shape[1], dtype=a.dtype, device=a.device)

    monkeypatch.setattr(torch.linalg, "qr", qr_of)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The values as integers, so that NaN equals NaN and -0.0 differs from 0.0."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_INTEGER[tensor.element_size()])


def storage_bits(tensor: torch.Tensor) -> torch.Tensor | None:
    """A copy of every byte behind a view, to see writes beside it; None without real memory."""
    if tensor.is_meta or tensor.layout != torch.strided or type(tensor.data) is not torch.Tensor:
        return None
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return torch.from_numpy(whole.numpy().copy())  # torch would copy with threads, which wait


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """torch.equal for tensors of integers, in this thread: torch's own waits for others."""
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy())


def version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Position:
    """A generator seeded, then so many words on, perhaps with the second normal of a pair kept."""

    words: int = 0
    cached: bool = False
    seed: int = 20240229

    def place(self, generator: torch.Generator) -> torch.Generator:
        generator.manual_seed(self.seed)
        torch.empty(self.words).uniform_(generator=generator)
        if self.cached:
            torch.empty(1).normal_(generator=generator)  # 4 words; its sine partner stays behind
        return generator


ELSEWHERE = Position(words=7, cached=True, seed=4)  # the generator that a call should not touch


def attempt(
    function: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Any, str, list[tuple[type, str]]]:
    """What a call returned, how it failed ("" if it did not), and its warnings."""
    returned, failure = None, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            returned = function(*args, **kwargs)
        except Exception as error:
            failure = f"{type(error).__qualname__}: {error}"
    return returned, failure, [(w.category, str(w.message)) for w in caught]


def observe(function: Callable[..., Any], tensor: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Everything a user can see of one call."""
    is_tensor = isinstance(tensor, torch.Tensor)
    before = version(tensor) if is_tensor else 0
    address = tensor.data_ptr() if is_tensor and storage_bits(tensor) is not None else 0
    returned, failure, warned = attempt(function, tensor, *args, **kwargs)
    seen: dict[str, Any] = {"failure": failure, "warnings": warned}
    seen["returned"] = "its argument" if returned is tensor else type(returned).__qualname__
    if is_tensor:
        seen["version"] = version(tensor) - before
        seen["geometry"] = (tensor.shape, tensor.dtype, tensor.layout, tensor.requires_grad)
        seen["history"] = (tensor.is_leaf, type(tensor.grad_fn).__name__)
        if storage_bits(tensor) is not None:
            assert tensor.data_ptr() == address
            seen["strides"] = (tensor.stride(), tensor.storage_offset())
            seen["values"] = bits(tensor)
            seen["storage"] = storage_bits(tensor)
    return seen


def assert_equal_seen(torch_seen: dict[str, Any], fast_seen: dict[str, Any], what: str) -> None:
    assert torch_seen.keys() == fast_seen.keys(), what
    for key, expected in torch_seen.items():
        found = fast_seen[key]
        if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
            if not same_values(expected, found):
                wrong = (expected != found).nonzero()
                pytest.fail(
                    f"{what}: {key}: {len(wrong)} of {expected.numel()} differ, "
                    f"first at {wrong[0].tolist()}"
                )
        else:
            assert expected == found, f"{what}: {key}"


def takes_generator(name: str) -> bool:
    return "generator" in inspect.signature(getattr(torch_init, name)).parameters


def assert_same(
    name: str,
    make: Callable[[], Any],
    *args: Any,
    at: Position | None = None,
    native: bool = False,
    fails: bool = False,
    poisons: tuple[float, float] | None = POISONS,
    **kwargs: Any,
) -> None:
    """Call `name` in torch.nn.init and in fastinit, with the default and an explicit generator.

    make() builds the argument anew; native=True asks that fastinit really used its own kernels;
    fails=True expects torch to raise (then nothing is poisoned: what is left behind must agree).
    """
    at = at or Position()
    ways = ("default", "explicit") if takes_generator(name) else ("default",)
    for way in ways:
        seen = []
        for turn, module in enumerate((torch_init, fastinit)):
            tensor = make()
            if poisons and not fails:
                with torch.no_grad():
                    tensor.fill_(poisons[turn])
            explicit = at.place(torch.Generator())
            default = (ELSEWHERE if way == "explicit" else at).place(torch.default_generator)
            options = {**kwargs, "generator": explicit} if way == "explicit" else kwargs
            count = fastinit.core.kernels.native_fills
            seen.append(observe(getattr(module, name), tensor, *args, **options))
            seen[-1]["explicit generator"] = explicit.get_state()
            seen[-1]["default generator"] = default.get_state()
            count = fastinit.core.kernels.native_fills - count
        what = f"{name}{args}{kwargs} with the {way} generator"
        assert bool(seen[0]["failure"]) == fails, f"torch, {what}: {seen[0]['failure']}"
        assert_equal_seen(seen[0], seen[1], what)
        assert not native or count > 0, f"{what}: fastinit left it to torch"
