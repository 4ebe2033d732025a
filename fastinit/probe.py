# SPDX-License-Identifier: BSD-3-Clause
"""Proof, once per process and lazily, that a native fill gives the running torch's bits.

Bits are a property of a torch version, its build and the processor's capability it chose. Before a
kind of fill (operator, dtype, layout) is used, torch and the compiled module each fill a small
tensor from equal generators; if the bits and the generators agree, in one of the flavours torch is
built in, the kind counts as proved, otherwise torch's own operator goes on doing it. Each GPU is
asked for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastinit import execute
from fastinit.core import build, geometry, kernels, laws, recording, switch, torch_api
from fastinit.core.fill import Fill, gaussian_dtype
from fastinit.cuda import fills as cuda_fills

# Of csrc/fill_desc.h: 1, multiply and add contracted; 2, the cephes polynomials of ATen's AVX2
# kernel; 4, uniform_ of torch 2.11, which keeps what rounds up to its upper bound.
FLAVOURS = (3, 1, 0)
UNIFORM_FLAVOURS = (*FLAVOURS, 7, 5, 4)
SEED = 0x5EED


class Original(NamedTuple):
    """The functions of torch.nn.init that are compared, whatever they are replaced by later."""

    sparse_: Callable[..., Tensor] = torch.nn.init.sparse_
    eye_: Callable[..., Tensor] = torch.nn.init.eye_
    trunc_normal_: Callable[..., Tensor] = torch.nn.init.trunc_normal_


original = Original()
_verdicts: dict[tuple[str, torch.dtype, str] | tuple[str, torch.dtype, str, int], int | None] = {}


def proved(fill: Fill | None) -> Fill | None:
    """Return the fill with its flavour, or None if torch has to do it."""
    if fill is None or fill.tensor.dtype not in geometry.DTYPES:
        return None
    drawn = fill.drawn  # factors are not torch's to the bit, what is factored is
    dtype, device = drawn.tensor.dtype, fill.device
    if fill.rests_on and verdict(fill.rests_on, dtype, "contiguous", device) is None:
        return None
    layout = fill.layout
    if device >= 0 and fill.generator is not None and len(cuda_fills.pieces(drawn)) > 1:
        layout = "split"
    flavour = verdict(drawn.op, dtype, layout, device)
    if flavour is None:
        return None
    fill.flavour = flavour
    return fill


def verdict(op: str, dtype: torch.dtype, layout: str, device: int = -1) -> int | None:
    """Return the flavour in which a kind of fill has torch's bits, or None."""
    key = (op, dtype, layout) if device < 0 else (op, dtype, layout, device)
    if key not in _verdicts:
        if device >= 0 and not kernels.can_use_cuda():
            return None
        _verdicts[key] = None  # torch's own trunc_normal_ asks while it is compared, in a block
        try:
            _verdicts[key] = _probe(*key)
        except torch.OutOfMemoryError:  # there may be more the next time
            del _verdicts[key]
            return None
    return _verdicts[key]


def _candidates(op: str, dtype: torch.dtype, layout: str, device: int = -1) -> tuple[int, ...]:
    """Return the flavours to try.

    Where rounding to the dtype hides the differences between flavours from a thousand elements,
    though not from millions, the one that a wider dtype shows is the only one.
    """
    if device >= 0 or op in ("constant", "diagonal", "sparse_mask"):
        return (0,)
    shown_by = torch.float64 if op == "normal_pairs" else torch.float32
    if dtype is shown_by or dtype is torch.float64:
        return UNIFORM_FLAVOURS if op == "uniform" else FLAVOURS
    flavour = verdict(op, shown_by, layout)
    return () if flavour is None else (flavour,)


def _probe(op: str, dtype: torch.dtype, layout: str, device: int = -1) -> int | None:
    if op == "sparse":  # a mask over normals; how a large one is split, the normals show
        mask = verdict("sparse_mask", torch.bfloat16, "contiguous")
        if mask is None or verdict("normal", dtype, layout, device) is None:
            return None
    before = recording.set_recorder(None)
    try:
        with torch_api.disable_current_modes(), torch.inference_mode(False):
            for flavour in _candidates(op, dtype, layout, device):
                cases = _cases(op, dtype)
                if all(_agree(op, dtype, layout, flavour, case, device) for case in cases):
                    return flavour
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):  # a torch without the operator, other generators
        pass
    finally:
        recording.set_recorder(before)
    return None


def _cases(op: str, dtype: torch.dtype) -> tuple[tuple[float, float], ...]:
    if op == "uniform":  # in the last a quarter of the values is rounded up to `to`
        return (0.0, 1.0), (-0.0371, 0.0371), (1.0, 1.0 + 2 * torch.finfo(dtype).eps)
    return {
        "normal": ((0.0, 1.0), (0.3, 0.0211)),
        "normal_pairs": ((0.0, 1.0), (0.3, 0.0211)),
        "trunc_normal": ((0.0, 1.0),),
        "trunc_erfinv": ((0.0, 1.0), (0.3, 0.9)),
    }.get(op, ((0.7, 0.01),))


def _tensor(dtype: torch.dtype, layout: str, op: str) -> Tensor:
    """Return a tensor whose size ends in the middle of everything: of 16 elements, of 624 words."""
    base = torch.zeros(
        1013 if op not in ("diagonal", "sparse_mask") else 33 * 18, dtype=dtype, device="cpu"
    )
    if op in ("diagonal", "sparse_mask"):
        return base.view(33, 18)
    if layout == "contiguous":
        return base[:11] if op == "normal_pairs" else base
    if layout == "dense":
        return base[:1012].view(4, 253).t()
    return base[:1012].view(4, 253)[:, 1::2]


def _tensor_on_gpu(dtype: torch.dtype, layout: str, op: str, device: int) -> Tensor:
    """Return a tensor of more elements than one trip of torch's grid, so that all outputs count."""
    gpu = torch.device("cuda", device)
    if op in ("diagonal", "sparse"):
        return torch.zeros(33, 18, dtype=dtype, device=gpu)
    if layout == "split":  # two parts, far from each other
        far = (geometry.MOST_AT_ONCE + 1) // dtype.itemsize
        base = torch.empty(far + 1013, dtype=dtype, device=gpu)
        return base if op == "trunc_normal" else base.as_strided((2, 1013), (far, 1))
    n = 1013
    if op != "constant":
        threads = cuda_fills.grid(1 << 30, dtype.itemsize, device).threads
        n += threads * (2 if dtype is torch.float64 else 4)
    if layout == "strided":
        return torch.zeros(n // 2, 3, dtype=dtype, device=gpu)[:, 1:]
    base = torch.zeros(n // 2 * 2, dtype=dtype, device=gpu)
    return base.view(2, -1).t() if layout == "dense" else base


def _fills(op: str, t: Tensor, a: float, b: float, g: torch.Generator) -> list[Fill | None]:
    if op == "uniform":
        return [build.uniform(t, a, b, g)]
    if op in ("normal", "normal_pairs"):
        return [build.normal(t, a, b, g)]
    if op == "trunc_normal":
        return [build.trunc_normal(t, a, b, -1.5, 1.25, g)]
    if op == "trunc_erfinv":
        return [build.trunc_erfinv(t, a, b, -1.5, 1.25, g)]
    if op == "sparse":
        return [build.sparse(t, b, 20, g)]
    if op == "constant":
        return [build.constant(t, a)]
    if op == "diagonal":
        return [build.diagonal(t, laws.eye(t))]
    return [build.normal(t, 0.0, b, g), build.sparse_mask(t, 20)]


def _torch_does(op: str, t: Tensor, a: float, b: float, g: torch.Generator) -> None:
    if op == "uniform":
        t.uniform_(a, b, generator=g)
    elif op in ("normal", "normal_pairs"):
        t.normal_(a, b, generator=g)
    elif op in ("trunc_normal", "trunc_erfinv"):
        original.trunc_normal_(t, a, b, -1.5, 1.25, generator=g)
    elif op == "constant":
        t.fill_(a)
    elif op == "diagonal":
        original.eye_(t)
    else:
        original.sparse_(t, 0.6, b, generator=g)  # 20 of 33 rows


def _agree(
    op: str, dtype: torch.dtype, layout: str, flavour: int, case: tuple[float, float], device: int
) -> bool:
    if device < 0:
        theirs, ours = _tensor(dtype, layout, op), _tensor(dtype, layout, op)
        g = torch.Generator()
    else:
        theirs = _tensor_on_gpu(dtype, layout, op, device)
        # A split tensor takes 2 GB: one after the other, in the same memory.
        ours = theirs if layout == "split" else _tensor_on_gpu(dtype, layout, op, device)
        g = torch.Generator(torch.device("cuda", device))
    # sparse_ draws its rows from the default generator: put that back for each of the two.
    also = [torch.default_generator] if op in ("sparse_mask", "sparse") else []
    saved = [d.get_state() for d in also]
    try:
        g.manual_seed(SEED)
        _torch_does(op, theirs, *case, g)
        if theirs is ours:
            theirs = theirs.clone()
            ours.zero_()
        after = [d.get_state() for d in (g, *also)]
        g.manual_seed(SEED)
        for d, state in zip(also, saved):
            d.set_state(state)
        fills = [f for f in _fills(op, ours, *case, g) if f is not None]
        if not fills or fills[-1].op != op:
            return False
        if len(fills) == 2:
            normals = proved(fills[0])
            if normals is None:
                return False
            fills[0] = normals
        fills[-1].flavour = flavour
        execute.run(fills)
        same = all(torch.equal(d.get_state(), s) for d, s in zip((g, *also), after))
    finally:
        for d, state in zip(also, saved):
            d.set_state(state)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[theirs.element_size()]
    return same and torch.equal(theirs.contiguous().view(kind), ours.contiguous().view(kind))


# ---- the table of `python -m fastinit verify` ----------------------------------------------------

# What each public function is made of: on the CPU, and on a GPU.
FUNCTIONS = {
    "uniform_": ("uniform", "uniform"),
    "normal_": ("normal", "normal"),
    "trunc_normal_": ("trunc_normal", "trunc_normal"),
    "constant_": ("constant", "constant"),
    "eye_, dirac_": ("diagonal", "diagonal"),
    "sparse_": ("sparse_mask", "sparse"),
    "orthogonal_": ("normal", "normal"),
}
LAYOUTS = ("contiguous", "dense", "strided")


def table(device: int = -1) -> list[tuple[str, str, str, str, str]]:
    """Return rows (function, dtype, layout, native or torch, why) of the verdicts in force."""
    rows = []
    for function, ops in FUNCTIONS.items():
        for dtype in geometry.DTYPES:
            for layout in (*LAYOUTS, "split") if device >= 0 else LAYOUTS:
                way, why = _explain(function, ops[device >= 0], dtype, layout, device)
                rows.append((function, str(dtype)[6:], layout, way, why))
    return rows


def _explain(
    function: str, op: str, dtype: torch.dtype, layout: str, device: int
) -> tuple[str, str]:
    if layout != "contiguous":
        if op in ("diagonal", "sparse_mask", "sparse") or (op == "trunc_normal" and device < 0):
            return "torch", "native for contiguous tensors only"
        if op == "normal" and function != "orthogonal_" and device < 0:
            op = "normal_pairs"
    if function == "orthogonal_":
        if switch.leaves_orthogonal_to_torch():
            return "torch (switched)", "by set_orthogonal or FASTINIT_ORTHOGONAL"
        dtype, layout = gaussian_dtype(dtype), "contiguous"
    flavour = verdict(op, dtype, layout, device)
    if flavour is None and op == "trunc_normal" and device >= 0:
        op = "trunc_erfinv"
        flavour = verdict(op, dtype, layout, device)
    if flavour is None:
        return "torch", "bits differ from torch's here, or torch lacks the operator"
    what = "equal up to rounding" if function == "orthogonal_" else "equal bits"
    if device >= 0:
        return "native", what + ", by erfinv as torch before 2.12" * (op == "trunc_erfinv")
    wide = dtype is torch.float64 or op == "normal_pairs"
    maths = ", libm" if wide or flavour != 3 else ", AVX2 polynomials"
    return "native", what + (maths if op.startswith(("normal", "trunc")) else "")
