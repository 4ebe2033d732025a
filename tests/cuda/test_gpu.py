# SPDX-License-Identifier: BSD-3-Clause
"""On a GPU: torch's bits on that GPU and torch's generators afterwards, by every way there is.

`pytest -m cuda`; left out where torch sees no GPU. FASTINIT_TEST_DEVICE=cpu makes it a dry run, of
the CPU's kernels against torch's operators. `pytest -m sanitize`: the part for compute-sanitizer.
"""

from __future__ import annotations

import functools
import gc
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit import init_model_, materialize_, probe
from fastinit.core import geometry, kernels
from fastinit.cuda import runtime
from tests.support import cuda_model
from tests.support.compare import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    POISONS,
    assert_equal_seen,
    attempt,
    bits,
    takes_generator,
)
from tests.support.cuda_model import Gpu, State
from tests.support.layouts import LAYOUTS, apart
from tests.support.models import (
    ZOO,
    Tied,
    everything,
    gpt2,
    model_state,
    on_meta,
    reset,
    resnet,
    vit,
)
from tests.support.parameters import (
    CONSTANTS,
    LARGEST,
    NORMAL_PARAMETERS,
    TRUNC_PARAMETERS,
    UNIFORM_BOUNDS,
)
from tests.support.threads import in_threads

pytestmark = pytest.mark.cuda

DEVICE = os.environ.get("FASTINIT_TEST_DEVICE", "cuda")
HERE = torch.device("cuda:0" if DEVICE == "cuda" else DEVICE)
ON_GPU = HERE.type == "cuda"
REJECTS = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 12)  # trunc_normal_
TRUNC = "trunc_normal" if REJECTS else "trunc_erfinv"
MIN_CUDA = geometry.MIN_CUDA  # as it is outside of these tests
NAP = 500_000_000  # cycles: a quarter of a second

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a dry run on the CPU")
needs_two = pytest.mark.skipif(
    not ON_GPU or torch.cuda.device_count() < 2, reason="needs several GPUs"
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def all_are_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However small they are; and the GPU of these tests is the current one."""
    monkeypatch.setattr(geometry, "MIN_NATIVE", 0)
    monkeypatch.setattr(geometry, "MIN_CUDA", 0)
    if not ON_GPU:
        yield
        return
    torch.cuda.init()
    with torch.cuda.device(HERE):
        yield
        torch.cuda.synchronize()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many fills each native call had, with all proofs done before. Empty it at will."""
    for op, dtype, layout in kinds():
        probe.verdict(op, dtype, layout, HERE.index if ON_GPU else -1)
    made: list[int] = []
    name = "cuda_run" if ON_GPU else "run"
    native = getattr(kernels, name)

    def counted(packed: bytes, *rest: Any) -> None:
        made.append(rest[1] if ON_GPU else len(packed) // kernels._cpu.FILL_SIZE)
        native(packed, *rest)

    monkeypatch.setattr(kernels, name, counted)
    return made


# ---- generators, sizes, and what can be seen of a call -------------------------------------------


class At(NamedTuple):
    """Where a generator stands."""

    seed: int = 20240229
    offset: int = 0  # in torch's units, four to a block; words on the CPU

    def place(self, g: torch.Generator) -> torch.Generator:
        g.manual_seed(self.seed)
        if g.device.type == "cuda":
            g.set_offset(self.offset)
        else:
            torch.empty(self.offset % 5003, device="cpu").uniform_(generator=g)
        return g


START = At()
ELSEWHERE = At(4, 28)  # for generators that nothing should be drawn from
POSITIONS = (
    At(0),
    At(2**40 + 5, 4),
    At(-1, 4000),
    At(2**63 + 11, 2**20),
    At(7, 4 * (2**32 - 2)),  # the lower half of the block's number overflows
)


def own(device: torch.device = HERE) -> torch.Generator:
    return torch.Generator(device)


def default(device: torch.device = HERE) -> torch.Generator:
    """The one that None stands for."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index]


def state_of(g: torch.Generator) -> Any:
    if g.device.type == "cpu":
        return g.get_state()
    seed, offset = g.initial_seed(), g.get_offset()
    assert g.get_state().view(torch.int64).tolist() == [seed - (seed >> 63 << 64), offset]
    return f"seed {seed}, offset {offset}"


def states(*generators: torch.Generator, device: torch.device = HERE) -> dict[str, Any]:
    return {
        **{f"explicit generator {i}": state_of(g) for i, g in enumerate(generators)},
        "default generator": state_of(default(device)),
        "CPU's default generator": state_of(torch.default_generator),
    }


def place_defaults(at: At = START, device: torch.device = HERE) -> None:
    torch.default_generator.manual_seed(5)  # sparse_ draws its rows from it
    at.place(default(device))


def gpu() -> Gpu:
    """What torch's grid depends on; in a dry run something small."""
    if not ON_GPU:
        return Gpu(2, 1024)
    p = torch.cuda.get_device_properties(HERE)
    return Gpu(p.multi_processor_count, p.max_threads_per_multi_processor)


def most_threads() -> int:
    """Of torch's grid, and so the subsequences of the generator that are ever used."""
    return cuda_model.threads_of(1 << 40, gpu())


def sizes() -> list[int]:
    t = most_threads()
    around = [k * t + d for k in (1, 2, 4) for d in (-1, 0, 1)]
    return [1, 15, 16, 17, 255, 256, 257, *around, 8 * t + 3]


def storage(t: torch.Tensor, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """All that lies behind a view; shares its memory."""
    return torch.empty(0, dtype=dtype, device=t.device).set_(t.untyped_storage())


def poison(t: torch.Tensor, value: float) -> torch.Tensor:
    with torch.no_grad():
        t.fill_(value)
    return t


def block_if(fused: bool) -> AbstractContextManager[Any]:
    return fastinit.fused() if fused else nullcontext()


def dirty(device: torch.device = HERE) -> None:
    """Leave NaN in free memory, so that what is not written shows."""
    counts = (1 << 8,) * 64 + (1 << 14,) * 64 + (1 << 20,) * 8
    junk = [torch.full((n,), math.nan, device=device) for n in counts]
    del junk


def check(
    name: str,
    make: Callable[[], torch.Tensor],
    *args: Any,
    at: At = START,
    native: bool = True,
    device: torch.device = HERE,
) -> None:
    """Call torch.nn.init's and fastinit's; all that can be seen has to be the same.

    `native`: fastinit's kernel has to have done it (not asked for in a dry run, as not all that is
    native on a GPU is native on the CPU).
    """
    for way in ("default", "explicit") if takes_generator(name) else ("default",):
        seen: list[dict[str, Any]] = []
        for module, value in zip((torch_init, fastinit), POISONS):
            t = poison(make(), value)
            assert t.device == device
            given = (ELSEWHERE if way == "default" else at).place(own(device))
            place_defaults(at if way == "default" else ELSEWHERE, device)
            options = {"generator": given} if way == "explicit" else {}
            done, version = kernels.native_fills, t._version
            returned, failure, warned = attempt(getattr(module, name), t, *args, **options)
            done = kernels.native_fills - done
            seen.append(
                {
                    "failure": failure,
                    "warnings": warned,
                    "returned": returned is t,
                    "versions": t._version - version,
                    "values": bits(t),
                    "storage": storage(t),
                    **states(given, device=device),
                }
            )
        what = f"{name}{args} of {tuple(t.shape)}, {t.dtype}, {way} generator, {at}"
        assert not seen[0]["failure"], f"torch, {what}: {seen[0]['failure']}"
        assert_equal_seen(seen[0], seen[1], what)
        assert done > 0 or not (native and ON_GPU), f"{what}: fastinit left it to torch"


# ---- single calls --------------------------------------------------------------------------------


def flat(n: int) -> tuple[int, ...]:
    return (n,)


def matrix(n: int) -> tuple[int, ...]:
    columns = next(c for c in (17, 5, 3, 2, 1) if n % c == 0)
    return n // columns, columns


def square(n: int) -> tuple[int, ...]:
    rows = math.isqrt(n)
    return rows, n // rows


def images(n: int) -> tuple[int, ...]:
    return max(n // 27, 1), 3, 3, 3


def kernel_shapes(n: int) -> tuple[int, ...]:
    rows = 2 * max(math.isqrt(n // 3) // 2, 1)
    return rows, max(n // (3 * rows), 1), 3


def few_columns(n: int) -> tuple[int, ...]:
    rows = min(n, 40_000)  # the most that are native: 65,536
    return rows, min(n // rows, 30)


class Case(NamedTuple):
    name: str
    shape: Callable[[int], tuple[int, ...]]  # of about so many elements
    args: tuple[Any, ...] = ()
    native: bool = True


CASES = {
    "uniform": Case("uniform_", flat, (-0.3, 0.7)),
    "normal": Case("normal_", flat, (0.1, 0.5)),
    "trunc far": Case("trunc_normal_", flat, (0.0, 0.02, -2.0, 2.0)),
    "trunc 2 sigma": Case("trunc_normal_", flat, (0.1, 0.5, -0.9, 1.1)),
    "trunc one-sided": Case("trunc_normal_", flat, (0.0, 1.0, -0.25, 2e4)),
    "trunc tight": Case("trunc_normal_", flat, (0.0, 1.0, -0.01, 0.02), not REJECTS),
    "constant": Case("constant_", flat, (0.1,)),
    "ones": Case("ones_", flat),
    "zeros": Case("zeros_", flat),
    "eye": Case("eye_", square),
    "dirac": Case("dirac_", kernel_shapes),
    "dirac in groups": Case("dirac_", kernel_shapes, (2,)),
    "xavier_uniform": Case("xavier_uniform_", matrix, (1.5,)),
    "xavier_normal": Case("xavier_normal_", images),
    "kaiming_uniform": Case("kaiming_uniform_", images, (math.sqrt(5),)),
    "kaiming_normal": Case("kaiming_normal_", matrix, (0, "fan_out", "relu")),
    "sparse": Case("sparse_", few_columns, (0.3,)),
    "sparse all": Case("sparse_", few_columns, (1.0, 0.5)),
}
DRAWING = [name for name, case in CASES.items() if takes_generator(case.name)]


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """With something on both sides of it; aligned as torch's own are."""
    return apart_here(math.prod(shape) + 64, dtype)[32:-32].view(shape)


def apart_here(n: int, dtype: torch.dtype) -> torch.Tensor:
    with torch.device(HERE):
        return apart(n, dtype)


@each_dtype
@pytest.mark.parametrize("case", CASES)
def test_sizes(case: str, dtype: torch.dtype) -> None:
    name, shape, args, native = CASES[case]
    for n in sizes():
        check(name, lambda n=n: empty(shape(n), dtype), *args, native=native)


@each_dtype
@pytest.mark.parametrize("case", DRAWING)
def test_seeds_and_offsets(case: str, dtype: torch.dtype) -> None:
    name, shape, args, native = CASES[case]
    t = most_threads()
    for at in POSITIONS:
        for n in (1, 17, t + 1, 8 * t + 3):
            check(name, lambda n=n: empty(shape(n), dtype), *args, at=at, native=native)


# More than in layouts.py: four dimensions that do not merge.
MORE_LAYOUTS: dict[str, Callable[[int, torch.dtype], torch.Tensor]] = {
    **LAYOUTS,
    "permuted_slices": lambda n, d: (
        apart(120 * (n // 30 + 2), d).view(6, 5, 4, -1).permute(2, 0, 3, 1)[1:, ::2, 1:, 1:4]
    ),
    "rows_transposed": lambda n, d: apart(n // 6 * 12, d).view(-1, 12)[:, 3:9].t(),
    "offset_7": lambda n, d: apart(n + 9, d)[7:-2],
}


def arranged(layout: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    with torch.device(HERE):
        return MORE_LAYOUTS[layout](n, dtype)


@each_dtype
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    native = layout != "five_dims_apart"
    for case in ("uniform", "normal", "trunc far", "trunc 2 sigma", "trunc tight", "constant"):
        name, _, args, known = CASES[case]
        for n in (60, 5100, *(() if layout == "five_dims_apart" else (2 * most_threads() + 90,))):
            check(name, lambda n=n: arranged(layout, n, dtype), *args, native=native and known)


@each_dtype
@pytest.mark.parametrize(
    "layout", ["matrix", "transposed", "columns", "every_second_row", "channels_last"]
)
def test_matrices_that_are_not_contiguous(layout: str, dtype: torch.dtype) -> None:
    """eye_, dirac_ and sparse_ are left to torch there, the others are native."""
    contiguous_only = (
        [("dirac_", ())] if layout == "channels_last" else [("eye_", ()), ("sparse_", (0.3,))]
    )
    for name, args in contiguous_only:
        make = lambda: arranged(layout, 3990, dtype)  # noqa: E731
        check(name, make, *args, native=layout == "matrix")
    for name, args in (
        *(("xavier_uniform_", ()), ("xavier_normal_", (2.0,))),
        *(("kaiming_uniform_", (1.0,)), ("kaiming_normal_", (0, "fan_out"))),
    ):
        check(name, lambda: arranged(layout, 3990, dtype), *args)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(17, 9), (9, 17), (33, 33), (20, 4, 3)], ids=str)
@pytest.mark.usefixtures("own_factors")
def test_orthogonal(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check("orthogonal_", lambda: empty(shape, dtype), 1.5)


@each_dtype
@pytest.mark.parametrize("case", [c for c in CASES if CASES[c].shape is flat])
def test_no_elements_and_no_dimensions(case: str, dtype: torch.dtype) -> None:
    name, _, args, _ = CASES[case]
    for shape in [(0,), (0, 3), (4, 0, 5), (), (1, 1, 1)]:
        check(
            name, lambda s=shape: torch.full(s, 13.0, dtype=dtype, device=HERE), *args, native=False
        )


@each_dtype
def test_uniform_bounds(dtype: torch.dtype) -> None:
    """The float16 and bfloat16 that round up to `to` become `from`; double has 53 bits."""
    top = LARGEST[dtype]
    for bounds in [*UNIFORM_BOUNDS, (0.0, top), (-top, 0.0), (-top / 2, top / 2), (top, top)]:
        for n in (5, 2 * most_threads() + 7):
            check("uniform_", lambda n=n: empty((n,), dtype), *bounds, native=False)
        check("uniform_", lambda: arranged("columns", 4000, dtype), *bounds, native=False)


@each_dtype
def test_normal_parameters(dtype: torch.dtype) -> None:
    for parameters in NORMAL_PARAMETERS:
        for n in (5, 2 * most_threads() + 7):
            check("normal_", lambda n=n: empty((n,), dtype), *parameters, native=False)


@each_dtype
def test_trunc_normal_parameters(dtype: torch.dtype) -> None:
    for parameters in TRUNC_PARAMETERS:
        for n in (7, 2 * most_threads() + 7):
            check("trunc_normal_", lambda n=n: empty((n,), dtype), *parameters, native=False)


@each_dtype
def test_constants(dtype: torch.dtype) -> None:
    for value in (*CONSTANTS, math.nan, LARGEST[dtype]):
        for layout in ("contiguous", "columns", "transposed", "offset_3"):
            check("constant_", lambda at=layout: arranged(at, 999, dtype), value, native=False)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(BF16, 0.0, 1.0), (F16, 0.0, 1.0), (F16, -1e-6, 0.0)], ids=str
)
def test_to_becomes_from(dtype: torch.dtype, low: float, high: float) -> None:
    """Guards the bounds above: there are values that round up to `to`."""
    n = 1 << 18
    rounded = torch.empty(n, device=HERE).uniform_(low, high, generator=START.place(own()))
    hits = rounded.to(dtype) == high
    drawn = fastinit.uniform_(empty((n,), dtype), low, high, START.place(own()))
    assert hits.any()
    assert (drawn[hits] == torch.tensor(low, dtype=dtype)).all()
    assert not (drawn == high).any()


@needs_gpu
def test_only_large_tensors_are_native_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "MIN_CUDA", MIN_CUDA)
    for n in (MIN_CUDA - 1, MIN_CUDA):
        done = kernels.native_fills
        check("normal_", lambda n=n: empty((n,), BF16), native=n == MIN_CUDA)
        assert (kernels.native_fills > done) == (n == MIN_CUDA)


# ---- proofs --------------------------------------------------------------------------------------


def kinds() -> Iterator[tuple[str, torch.dtype, str]]:
    """All that has to be proved, except of tensors that are split."""
    for dtype in DTYPES:
        for layout in ("contiguous", "dense", "strided"):
            yield from ((op, dtype, layout) for op in ("constant", "uniform"))
            yield "normal" if ON_GPU or layout == "contiguous" else "normal_pairs", dtype, layout
            if ON_GPU or layout == "contiguous":
                yield TRUNC, dtype, layout
        yield from ((op, dtype, "contiguous") for op in ("diagonal", "sparse")[: 1 + ON_GPU])


def test_all_is_proved() -> None:
    """Everything below would be equal as well if torch did it."""
    index = HERE.index if ON_GPU else -1
    left = [kind for kind in kinds() if probe.verdict(*kind, index) is None]
    assert not left, "left to torch: " + ", ".join(map(str, left))


@pytest.mark.parametrize("op", ["uniform", "normal", "constant", "diagonal", TRUNC, "sparse"])
def test_what_is_not_proved_is_left_to_torch(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU and op == "sparse":
        op = "sparse_mask"
    key = (op, F32, "contiguous", *([HERE.index] if ON_GPU else []))
    monkeypatch.setattr(probe, "_verdicts", {key: None})
    name = {"diagonal": "eye_", TRUNC: "trunc_normal_", "sparse_mask": "sparse_"}.get(op, f"{op}_")
    args = {"constant_": (0.5,), "sparse_": (0.25,)}.get(name, ())
    make = lambda: empty((40, 30), F32)  # noqa: E731
    check(name, make, *args, native=False)  # proves what the function needs besides
    done = kernels.native_fills
    check(name, make, *args, native=False)
    made = fastinit.Plan()
    getattr(made, name)(make(), *args)
    made.run()
    with fastinit.fused():
        getattr(torch_init, name)(torch.empty(40, 30, device=HERE), *args)
    assert kernels.native_fills == done


# ---- the words and the normals themselves --------------------------------------------------------


def sample(n: int) -> np.ndarray:
    """Indices: the first and last of every part that one of torch's threads' outputs fills, and
    many others."""
    t = most_threads()
    edges = np.add.outer(np.arange(0, n + t, t), np.arange(-3, 4)).ravel()
    chosen = np.concatenate([edges, [n - 1], np.random.default_rng(1).integers(0, n, 60_000)])
    return np.unique(chosen[(chosen >= 0) & (chosen < n)])


@needs_gpu
@each_dtype
def test_words(dtype: torch.dtype) -> None:
    """torch.rand on this GPU is what the model of its generator says, exactly."""
    t = most_threads()
    for at in (START, *POSITIONS):
        for n in (1, 257, t - 1, t + 1, 8 * t + 3):
            g, state = at.place(own()), State(at.seed % 2**64, at.offset)
            index = sample(n)
            drawn = torch.rand(n, dtype=dtype, device=HERE, generator=g).cpu()
            values = cuda_model.uniform(n, str(dtype)[6:], 0.0, 1.0, state, gpu(), at=index)
            model = torch.from_numpy(values).to(dtype)
            assert torch.equal(bits(drawn[torch.from_numpy(index)]), bits(model)), (at, n)
            assert g.get_offset() == state.offset, (at, n)


def largest_difference(drawn: torch.Tensor, at: At) -> float:
    """Of standard normals from the model's; of float32 as a part of their distance from 0 before
    the sine or cosine."""
    n, dtype, index = drawn.numel(), str(drawn.dtype)[6:], sample(drawn.numel())
    start = State(at.seed % 2**64, at.offset), State(at.seed % 2**64, at.offset)
    model = cuda_model.normal(n, dtype, 0.0, 1.0, start[0], gpu(), rounded=False, at=index)
    difference = np.abs(drawn.double().cpu().numpy()[index] - model)
    if drawn.dtype is F64:
        return float(difference.max())
    blocks, output = cuda_model.words(n, dtype, start[1], gpu(), at=index)
    word = blocks[np.arange(len(index)), output & 2].astype(np.float32)
    unit = (word * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(unit))
    return float((difference / np.maximum(radius, 0.01)).max())


@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "bound"), [(F32, 2.0**-19), (F64, 2.0**-47)], ids=["float32", "float64"]
)
def test_normals_are_near_the_model(dtype: torch.dtype, bound: float) -> None:
    """float32: the hardware's sine and cosine, off by 2^-21 for their table and by as much for the
    reduction of the angle, and roundings; float64: some units in the last place of the largest."""
    for at in (START, POSITIONS[-1]):
        n = 8 * most_threads() + 3
        drawn = fastinit.normal_(empty((n,), dtype), 0.0, 1.0, at.place(own()))
        largest = largest_difference(drawn, at)
        print(f"{dtype}, {at}: largest difference 2^{math.log2(max(largest, 2.0**-60)):.2f}")
        assert largest < bound


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bit_normals_are_rounded_float32(dtype: torch.dtype) -> None:
    n = (most_threads() + 7) // 16 * 16  # the CPU draws the last few again
    wide, narrow = (
        fastinit.normal_(empty((n,), d), 0.0, 1.0, START.place(own())) for d in (F32, dtype)
    )
    assert torch.equal(bits(wide.to(dtype)), bits(narrow))


@needs_gpu
def test_known_answers() -> None:
    """As printed in public: pytorch #97097, #62467, #80202; nvFuser #557."""
    g = own().manual_seed(0)
    for expected in (
        (0.3990, 0.5167, 0.0249, 0.9401, 0.9459, 0.7967),
        (0.9722, 0.7910, 0.4690, 0.3300),
    ):
        drawn = fastinit.uniform_(empty((len(expected),), F32), generator=g)
        assert drawn.tolist() == pytest.approx(expected, abs=6e-5)
    for seed, expected in (
        (0, (-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797)),
        (42, (0.1940, 2.1614, -0.1721)),
    ):
        drawn = fastinit.normal_(empty((len(expected),), F32), generator=own().manual_seed(seed))
        assert drawn.tolist() == pytest.approx(expected, abs=6e-5)


# ---- more than 2^31 bytes ------------------------------------------------------------------------

G = 2**30 // (1 if ON_GPU else 1024)  # a dry run takes a thousandth
FAR = (G // 2**17 + 1) * 2**14
# dtype; elements of the storage; sizes, strides and offset of the view
HUGE: dict[str, tuple[torch.dtype, int, tuple[Any, ...] | None]] = {
    "float32": (F32, G // 2 + 5, None),
    "float64": (F64, G // 4 + 1, None),
    "bfloat16": (BF16, G + 3, None),
    "float16": (F16, G + 1, None),
    "float32 just not": (F32, G // 2, None),
    "unaligned": (BF16, G + 9, ((G + 2,), (1,), 7)),
    "transposed": (BF16, G + 2**10, ((2**10, G // 2**10 + 1), (1, 2**10))),
    "every second": (F32, G, ((G // 2,), (2,), 1)),
    "columns": (F32, G // 2 + 3 * 2**13, ((G // 2**14 + 3, 2**12 - 1), (2**13, 2))),
    "far": (F32, G // 2 + 1013, ((2, 1013), (G // 2, 1))),
    "three far": (F64, G // 2 + 777, ((259, 3, 3), (3, G // 4, 1))),
    "four dimensions": (F32, 7 * FAR, ((2**6, G // 2**17, 5, 60), (2**6, 2**14, FAR, 1), 3)),
}
WITH_GAPS = ("every second", "columns", "far", "three far", "four dimensions")


def huge(case: str) -> torch.Tensor:
    dtype, items, view = HUGE[case]
    base = torch.full((items,), 13.0, dtype=dtype, device=HERE)
    return base if view is None else base.as_strided(*view)


def skip_without(gigabytes: float) -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(HERE)
        if free < gigabytes * 2**30:
            pytest.skip(f"{free / 2**30:.1f} of {gigabytes} GiB are free")


def same_storage(one: torch.Tensor, other: torch.Tensor, step: int = 1 << 26) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    x, y = storage(one, kind), storage(other, kind)
    return len(x) == len(y) and all(
        torch.equal(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step)
    )


LAWS = {
    "uniform": ("uniform_", (-0.3, 0.7)),
    "normal": ("normal_", (0.1, 0.5)),
    "trunc far": ("trunc_normal_", (0.0, 0.02, -2.0, 2.0)),
    "trunc": ("trunc_normal_", (0.1, 0.5, -0.9, 1.1)),  # with gaps it is torch's from 2.12 on
    "constant": ("constant_", (0.1,)),
}


@pytest.mark.parametrize("case", HUGE)
@pytest.mark.parametrize("law", LAWS)
def test_huge(law: str, case: str) -> None:
    name, args = LAWS[law]
    skip_without(24 if law == "trunc" and REJECTS else 16)
    at = At(3, 4 * (2**32 - 3))
    seen, tensors = [], []
    for module, value in zip((torch_init, fastinit), POISONS):
        t = poison(huge(case), value)
        place_defaults(at)
        done, version = kernels.native_fills, t._version
        getattr(module, name)(t, *args)
        done = kernels.native_fills - done
        seen.append({"versions": t._version - version, **states()})
        tensors.append(t)
    assert_equal_seen(seen[0], seen[1], f"{law}, {case}")
    assert same_storage(*tensors), f"{law}, {case}"
    native = law != "trunc" or not REJECTS or case not in WITH_GAPS
    assert done > 0 or not (native and ON_GPU), "left to torch"


def test_huge_among_small(launches: list[int]) -> None:
    skip_without(12)
    results = []
    for planned in (False, True):
        place_defaults(At(3, 44))
        small = [torch.full((n,), 13.0, device=HERE) for n in (1000, 7, 300_001)]
        tensors = [small[0], huge("float32"), small[1], huge("columns"), small[2]]
        made = fastinit.Plan()
        to: Any = made if planned else torch_init
        for name, t in zip(("normal_", "normal_", "uniform_", "uniform_", "normal_"), tensors):
            getattr(to, name)(t, 0.0, 0.5)
        launches.clear()
        if planned:
            made.run()
        results.append((tensors, states()))
    assert_equal_seen(results[0][1], results[1][1], "plan")
    assert all(same_storage(a, b) for a, b in zip(results[0][0], results[1][0]))
    assert len(launches) == 1


# ---- plans ---------------------------------------------------------------------------------------


class Step(NamedTuple):
    name: str
    tensor: torch.Tensor
    args: tuple[Any, ...] = ()
    generator: torch.Generator | None = None  # None: the default one

    def call(self, to: Any) -> None:
        options = {} if self.generator is None else {"generator": self.generator}
        assert getattr(to, self.name)(self.tensor, *self.args, **options) is self.tensor


Make = Callable[[list[torch.Generator]], list[Step]]


def compare_plan(
    make: Make, launches: list[int], runs: int = 2, count: int = 3, eager: Any = torch_init
) -> list[list[int]]:
    """Do the steps one by one and as a plan, some times. The fills of each run's launches."""
    seen: list[dict[str, Any]] = []
    made_by: list[list[int]] = []
    for planned in (False, True):
        generators = [At(8 + i, 12 * i).place(own()) for i in range(count)]
        place_defaults()
        steps = make(generators)
        tensors = list({id(s.tensor): s.tensor for s in steps}.values())
        for t in tensors:
            poison(t, POISONS[planned])
        before = [t._version for t in tensors]
        if planned:
            recorded = fastinit.Plan()
            for step in steps:
                step.call(recorded)
            assert [t._version for t in tensors] == before
            assert len(recorded) == len(steps)
        for _ in range(runs):
            launches.clear()
            if planned:
                recorded.run()
                made_by.append(list(launches))
            else:
                for step in steps:
                    step.call(eager)
        seen.append(
            {f"storage {i}": storage(t) for i, t in enumerate(tensors)}
            | {f"versions {i}": t._version - b for i, (t, b) in enumerate(zip(tensors, before))}
            | states(*generators)
        )
    assert_equal_seen(seen[0], seen[1], "plan")
    return made_by


def mixed(dtypes: tuple[torch.dtype, ...], counts: tuple[int, ...], native: bool = True) -> Make:
    """Every function in every dtype, of several sizes and layouts, from several generators."""

    def make(generators: list[torch.Generator]) -> list[Step]:
        steps = []
        for i, n in enumerate(counts):
            for j, dtype in enumerate(dtypes):
                for k, (name, shape, args, is_native) in enumerate(CASES.values()):
                    if native and not is_native:
                        continue
                    t = empty(shape(n), dtype)
                    if shape is flat:
                        layout = list(MORE_LAYOUTS)[(i + 5 * j + 7 * k) % len(MORE_LAYOUTS)]
                        if native and layout == "five_dims_apart":
                            layout = "columns"
                        t = arranged(layout, max(n, 120), dtype)
                    g = [None, *generators][(i + j + k) % (1 + len(generators))]
                    steps.append(Step(name, t, args, g if takes_generator(name) else None))
        return steps

    return make


@each_dtype
def test_plan_of_everything(dtype: torch.dtype, launches: list[int]) -> None:
    t = most_threads()
    runs = compare_plan(mixed((dtype,), (1, 17, 257, t + 1, 4 * t + 1)), launches)
    assert not ON_GPU or [len(run) for run in runs] == [1, 1]


def test_plan_of_everything_in_all_dtypes(launches: list[int]) -> None:
    runs = compare_plan(mixed(DTYPES, (3, 300, most_threads() + 9)), launches, runs=3)
    assert not ON_GPU or [len(run) for run in runs] == [1, 1, 1]
    assert not ON_GPU or runs[0][0] == 3 * 4 * sum(c.native for c in CASES.values())


@pytest.mark.usefixtures("own_factors")
def test_plan_with_what_torch_does(launches: list[int]) -> None:
    """Tight bounds are calls between launches, orthogonal_ is not; all keep their order."""

    def make(generators: list[torch.Generator]) -> list[Step]:
        steps = mixed((F32, F64), (40, 900), native=False)(generators)
        for i in (40, 11, 3):
            g = generators[i % 3]
            steps.insert(i, Step("orthogonal_", empty((12, 7), F32), (1.5,), g))
        return steps

    compare_plan(make, launches)


def test_plan_of_overlapping_tensors(launches: list[int]) -> None:
    def make(generators: list[torch.Generator]) -> list[Step]:
        base = empty((5000,), F32)
        steps = [Step("normal_", base), Step("zeros_", base[100:200]), Step("uniform_", base[150:])]
        steps += [Step("trunc_normal_", base[:600]), Step("normal_", base[:60], (), generators[0])]
        return [*steps, Step("ones_", base[::7]), Step("uniform_", base[1:2])]

    compare_plan(make, launches, runs=3)


def test_plan_leaves_out_what_is_overwritten(launches: list[int]) -> None:
    """Its numbers are drawn all the same, those of sparse_'s rows on the CPU as well."""

    def make(generators: list[torch.Generator]) -> list[Step]:
        a, b, c = empty((50, 40), F32), empty((50, 40), BF16), empty((3000,), F64)
        steps = [Step("normal_", a), Step("sparse_", b, (0.3,)), Step("uniform_", c)]
        steps += [
            Step("sparse_", a, (0.5,)),
            Step("zeros_", b),
            Step("normal_", c, (), generators[1]),
        ]
        return [*steps, Step("kaiming_uniform_", a), Step("sparse_", b, (0.5,))]

    runs = compare_plan(make, launches)
    assert not ON_GPU or runs == [[3], [3]]


def test_twenty_runs(launches: list[int]) -> None:
    make = mixed((F32, BF16), (60, 1000, most_threads() + 1))
    runs = compare_plan(make, launches, runs=20)
    assert not ON_GPU or [len(run) for run in runs] == [1] * 20


@pytest.mark.parametrize("runs_before", [0, 1, 3])
def test_replaced_memory_is_refused(runs_before: int) -> None:
    p = nn.Parameter(torch.full((700,), 13.0, device=HERE))
    made = fastinit.Plan()
    made.normal_(p)
    made.zeros_(torch.empty(5, device=HERE))
    for _ in range(runs_before):
        made.run()
    p.data = torch.full((700,), 14.0, device=HERE)
    START.place(default())
    before = states()
    with pytest.raises(RuntimeError, match="other memory"):
        made.run()
    assert_equal_seen(before, states(), "after the error")
    assert (p == 14).all()


def test_several_generators(launches: list[int]) -> None:
    """None, the default generator by name, and more than one launch can take."""
    count = runtime.MOST_SOURCES + 2

    def make(generators: list[torch.Generator]) -> list[Step]:
        given = [None, default(), *generators]
        return [
            Step(
                "normal_" if i % 3 else "uniform_",
                empty((100 + i,), F32),
                (),
                given[i * 5 % len(given)],
            )
            for i in range(4 * len(given))
        ]

    runs = compare_plan(make, launches, count=count)
    assert not ON_GPU or sum(runs[0]) == 4 * (count + 2)
    runs = compare_plan(make, launches, count=runtime.MOST_SOURCES - 1)
    assert not ON_GPU or [len(run) for run in runs] == [1, 1]


@pytest.mark.parametrize("kind", ["by name", "by index"])
def test_generators_of_the_current_device(kind: str, launches: list[int]) -> None:
    """torch.Generator("cuda") has no index, and serves a tensor on any GPU."""
    seen = []
    for module in (torch_init, fastinit):
        g = START.place(torch.Generator(HERE.type if kind == "by name" else HERE))
        t = poison(empty((5000,), F32), POISONS[module is fastinit])
        launches.clear()
        module.normal_(t, generator=g)
        module.uniform_(t[:77], generator=g)
        seen.append({"values": bits(t), "state": state_of(g)})
    assert_equal_seen(seen[0], seen[1], kind)
    assert len(launches) == 2, "left to torch"


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("size", [1 << 20, 1 << 10])
def test_threads_share_a_generator(size: int, explicit: bool) -> None:
    """No numbers are given out twice or lost: the tensors are those of one thread, in any order."""
    rounds = 6 if size > 1 << 16 else 100
    given = own() if explicit else None
    g = given or default()
    START.place(g)
    made: list[torch.Tensor] = []

    def job() -> None:
        for _ in range(rounds):
            made.append(fastinit.uniform_(torch.empty(size, device=HERE), generator=given))

    in_threads(job, job)
    after = state_of(g)
    START.place(g)
    alone = [torch.empty(size, device=HERE).uniform_(generator=g) for _ in range(2 * rounds)]
    assert_equal_seen({"state": state_of(g)}, {"state": after}, "threads")
    found, expected = (sorted(bytes(bits(t).cpu().numpy()) for t in ts) for ts in (made, alone))
    assert found == expected


# ---- trunc_normal_ by rejection, whichever torch is here -----------------------------------------


class Rejecting:
    """torch.nn.init with the trunc_normal_ of torch 2.12 and later, for most bounds."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch_init, name)

    @staticmethod
    def trunc_normal_(
        t: torch.Tensor,
        mean: float = 0.0,
        std: float = 1.0,
        a: float = -2.0,
        b: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        low, high = (torch.tensor(x, dtype=t.dtype).item() for x in (a, b))
        with torch.no_grad():
            values = t.normal_(mean, std, generator=generator)
            while (outside := (values < low) | (values > high)).any():
                again = torch.empty_like(values).normal_(mean, std, generator=generator)
                values = torch.where(outside, again, values)
            if values is not t:
                t.copy_(values)
        return t


@pytest.fixture
def rejecting(monkeypatch: pytest.MonkeyPatch) -> Rejecting:
    """fastinit's kernel for that is used, though before 2.12 it does not do as torch does."""
    if ON_GPU and not REJECTS:
        for dtype in DTYPES:
            for layout in ("contiguous", "dense", "strided"):
                key = ("trunc_normal", dtype, layout, HERE.index)
                monkeypatch.setitem(probe._verdicts, key, 0)
    return Rejecting()


def rejections(dtypes: tuple[torch.dtype, ...], counts: tuple[int, ...]) -> Make:
    """Fills whose numbers begin where the rejections before them end, of several generators."""

    def make(generators: list[torch.Generator]) -> list[Step]:
        steps = []
        for n in counts:
            for i, dtype in enumerate(dtypes):
                g, other = generators[i % 2], generators[2]
                steps += [
                    Step("normal_", empty((n,), dtype), (), g),
                    Step("trunc_normal_", empty((n,), dtype), (0.0, 1.0, -2.0, 2.0), g),
                    Step("uniform_", empty((n,), dtype), (), g),
                    Step("trunc_normal_", empty((n,), dtype), (0.1, 1.0, -0.4, 0.6), other),
                    Step("trunc_normal_", arranged("columns", n + 60, dtype), (), g),
                    Step("zeros_", empty((n,), dtype)),
                    Step("trunc_normal_", empty((n,), dtype), (0.0, 0.02, -2.0, 2.0), g),
                    Step("kaiming_normal_", empty((n, 3), dtype)),
                    Step("trunc_normal_", empty((n,), dtype), (1.0, 1.0, -2e4, 1.3)),
                    Step("normal_", empty((n,), dtype), (), other),
                ]
        return steps

    return make


def test_rejections(rejecting: Rejecting, launches: list[int]) -> None:
    """In one launch: what comes later waits on the GPU until it is known where it begins."""
    t = most_threads()
    make = rejections(DTYPES, (5, 3000, t + 1, 8 * t + 3))
    runs = compare_plan(make, launches, runs=4, eager=rejecting)
    assert not ON_GPU or [len(run) for run in runs] == [1] * 4


def test_long_chain_of_rejections(rejecting: Rejecting, launches: list[int]) -> None:
    """More waiting fills than blocks can be resident."""

    def make(generators: list[torch.Generator]) -> list[Step]:
        calls = (("trunc_normal_", (0.0, 1.0, -1.0, 1.0)), ("uniform_", ()))
        return [Step(*(calls[i % 2][0], empty((700,), F32)), calls[i % 2][1]) for i in range(600)]

    runs = compare_plan(make, launches, eager=rejecting)
    assert not ON_GPU or runs == [[600], [600]]


# ---- for compute-sanitizer -----------------------------------------------------------------------


@pytest.mark.sanitize
@each_dtype
def test_small_fills(dtype: torch.dtype) -> None:
    for name, shape, args, native in CASES.values():
        for n in (1, 300):
            check(name, functools.partial(empty, shape(n), dtype), *args, native=native)
    for case in ("uniform", "normal", "trunc 2 sigma", "constant"):
        for layout in ("offset_1", "offset_3", "transposed", "columns", "permuted_slices"):
            name, _, args, native = CASES[case]
            check(name, lambda at=layout: arranged(at, 130, dtype), *args, native=native)


@pytest.mark.sanitize
def test_small_plan(launches: list[int]) -> None:
    compare_plan(mixed(DTYPES, (1, 200, 5000)), launches)


@pytest.mark.sanitize
def test_small_plan_with_rejections(rejecting: Rejecting, launches: list[int]) -> None:
    compare_plan(rejections(DTYPES, (5, 3000)), launches, eager=rejecting)
    compare_plan(rejections((F32,), (2000,)), launches, eager=rejecting)  # without a table


# ---- streams -------------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, t: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(t)


def planned(t: torch.Tensor, others: int = 0) -> Callable[[], object]:
    made = fastinit.Plan()
    made.normal_(t)
    for _ in range(others):
        made.zeros_(torch.empty(300, device=HERE))
    return made.run


def in_block(t: torch.Tensor) -> Callable[[], object]:
    holder = Holder(t)
    return lambda: init_model_(holder, lambda m: torch_init.normal_(m.w))


WAYS: dict[str, Callable[[torch.Tensor], Callable[[], object]]] = {
    "call": lambda t: lambda: fastinit.normal_(t),
    "plan": planned,
    "plan with a table": lambda t: planned(t, 60),
    "block": in_block,
}


def expected_normals(n: int) -> torch.Tensor:
    START.place(default())
    values = torch_init.normal_(torch.empty(n, device=HERE))
    torch.cuda.synchronize()
    START.place(default())
    return values


@needs_gpu
@pytest.mark.parametrize("way", WAYS)
def test_side_stream_does_not_wait_for_the_default_one(way: str) -> None:
    t, s = torch.empty(100_000, device=HERE), torch.cuda.Stream()
    run = WAYS[way](t)
    with torch.cuda.stream(s):
        run()  # proves, loads, allocates
    expected = expected_normals(len(t))
    poison(t, -77.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(NAP)
    busy = torch.cuda.Event()
    busy.record()
    with torch.cuda.stream(s):
        run()
        s.synchronize()
        is_busy = not busy.query()
        found = t.cpu()
    assert is_busy
    assert torch.equal(bits(found), bits(expected.cpu()))


@needs_gpu
@pytest.mark.parametrize("before", ["side stream", "default stream"])
@pytest.mark.parametrize("way", WAYS)
def test_order_on_a_side_stream(way: str, before: str) -> None:
    """After what was asked for on that stream before, and before what comes next."""
    t, s = torch.empty(100_000, device=HERE), torch.cuda.Stream()
    old, new, other = (torch.full_like(t, 3.0) for _ in range(3))
    run = WAYS[way](t)
    with torch.cuda.stream(s if before == "side stream" else torch.cuda.default_stream()):
        run()
    expected = expected_normals(len(t))
    poison(t, -77.0)
    torch.cuda.synchronize()
    with torch.cuda.stream(s):
        torch.cuda._sleep(NAP)
        old.copy_(t)
        t.copy_(other)
        run()
        new.copy_(t)
    s.synchronize()
    assert (old == -77).all()
    assert torch.equal(bits(new), bits(expected))
    assert torch.equal(bits(t), bits(expected))


@needs_gpu
def test_rejections_on_a_side_stream(rejecting: Rejecting) -> None:
    t, s = torch.empty(50_000, device=HERE), torch.cuda.Stream()
    made = fastinit.Plan()
    made.trunc_normal_(t)
    made.run()
    START.place(default())
    expected = rejecting.trunc_normal_(torch.empty_like(t))
    after = state_of(default())
    START.place(default())
    torch.cuda.synchronize()
    with torch.cuda.stream(s):
        torch.cuda._sleep(NAP)
        t.fill_(3.0)
        made.run()
        found = t.clone()
    s.synchronize()
    assert torch.equal(bits(found), bits(expected))
    assert state_of(default()) == after


def drawn_by(*names: str, n: int = 50_000) -> list[torch.Tensor]:
    """What torch draws one after the other."""
    START.place(default())
    made = [getattr(torch.empty(n, device=HERE), name)() for name in names]
    torch.cuda.synchronize()
    START.place(default())
    return made


@needs_gpu
@pytest.mark.parametrize("ends", ["inside", "outside"])
def test_block_on_a_side_stream(ends: str, launches: list[int]) -> None:
    """Fills that waited come after the reads of what was there before, on the same stream.

    `launches` is here for its proofs, which would wait for the stream.
    """
    n, s = 50_000, torch.cuda.Stream()
    normal, uniform = drawn_by("normal_", "uniform_")
    with torch.cuda.stream(s):
        dirty()
    torch.cuda.synchronize()
    contexts = [torch.cuda.stream(s), fastinit.fused()]
    with ExitStack() as entered:
        for context in contexts if ends == "inside" else contexts[::-1]:
            entered.enter_context(context)
        a, b = torch.empty(n, device=HERE).fill_(1.0), torch.empty(n, device=HERE).normal_()
        torch.cuda._sleep(NAP)
        seen = a + 0, b + 0
        a.fill_(2.0)
        b.uniform_()
    torch.cuda.synchronize()
    assert (seen[0] == 1).all()
    assert torch.equal(bits(seen[1]), bits(normal))
    assert (a == 2).all()
    assert torch.equal(bits(b), bits(uniform))


@needs_gpu
def test_read_on_another_stream_in_a_block(launches: list[int]) -> None:
    """What was asked for on the default stream is done there, then the reader goes on."""
    n, s = 50_000, torch.cuda.Stream()
    normal, uniform = drawn_by("normal_", "uniform_")
    dirty()
    with fastinit.fused():
        a, b = torch.empty(n, device=HERE).fill_(1.0), torch.empty(n, device=HERE).normal_()
        torch.cuda._sleep(NAP)
        seen = a + 0, b + 0
        a.fill_(2.0)
        b.uniform_()
        s.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(s):
            late = a + 0, b + 0
    later = a + 0, b + 0  # on the default stream, without waiting for the other
    torch.cuda.synchronize()
    assert (seen[0] == 1).all()
    assert torch.equal(bits(seen[1]), bits(normal))
    for x, y in (late, later):
        assert (x == 2).all()
        assert torch.equal(bits(y), bits(uniform))


@needs_gpu
def test_many_streams_in_a_block() -> None:
    streams = [*(torch.cuda.Stream() for _ in range(4)), torch.cuda.default_stream()]
    order = [i * 3 % 5 for i in range(40)]
    seen = []
    for fused in (True, False):
        START.place(default())
        dirty()
        made = []
        with block_if(fused):
            for i in order:
                with torch.cuda.stream(streams[i]):
                    made.append(torch.empty(2000 + i, device=HERE).normal_())
                    made.append(torch.zeros(300, device=HERE))
                    if i == 2:
                        made.append(made[-2] * 2)
        torch.cuda.synchronize()
        seen.append({str(i): bits(t) for i, t in enumerate(made)} | states())
    assert_equal_seen(seen[1], seen[0], "streams")


# ---- graphs --------------------------------------------------------------------------------------

Fill = Callable[[Any, torch.Tensor], object]


def in_a_block(module: Any, t: torch.Tensor) -> None:
    with block_if(module is fastinit):
        module.normal_(t)
        module.zeros_(t[:10])


CAPTURED: dict[str, Fill] = {
    "uniform": lambda module, t: module.uniform_(t, -0.5, 0.5),
    "normal": lambda module, t: module.normal_(t),
    "xavier": lambda module, t: module.xavier_normal_(t),
    "constant": lambda module, t: module.constant_(t, 0.5),
    "several": lambda module, t: [
        module.normal_(t),
        module.uniform_(t[1:3]),
        module.normal_(t[:1]),
    ],
    "block": in_a_block,
}


@needs_gpu
@pytest.mark.parametrize("what", CAPTURED)
def test_captured_calls_are_torchs(what: str) -> None:
    """Replays draw on from where the generator is."""
    seen = []
    done = kernels.native_fills
    for module in (torch_init, fastinit):
        t = torch.empty(60, 50, device=HERE)
        CAPTURED[what](torch_init, t)  # loads torch's kernels
        poison(t, POISONS[module is fastinit])
        place_defaults(At(11, 8))
        graph = torch.cuda.CUDAGraph()
        done = kernels.native_fills
        with torch.cuda.graph(graph):
            CAPTURED[what](module, t)
        done = kernels.native_fills - done
        now: dict[str, Any] = {f"captured: {k}": v for k, v in states().items()}
        for i in range(3):
            graph.replay()
            now[f"replay {i}"] = bits(t).clone()
        seen.append(now | states())
        torch.cuda.synchronize()
    assert_equal_seen(seen[0], seen[1], what)
    assert done == 0
    if what != "constant":
        assert not torch.equal(seen[1]["replay 0"], seen[1]["replay 1"])


@needs_gpu
@pytest.mark.parametrize("runs_before", [0, 2])
def test_plan_in_a_capture_is_refused(runs_before: int, launches: list[int]) -> None:
    t, other = torch.full((5000,), 13.0, device=HERE), torch.zeros(100, device=HERE)
    made = fastinit.Plan()
    made.normal_(t)
    made.zeros_(t[:100])
    for _ in range(runs_before):
        made.run()
    other.add_(1)
    poison(t, 13.0)
    place_defaults()
    before = states()
    launches.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="captur"):
            made.run()
        other.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert launches == []
    assert (t == 13).all()
    assert (other == 2).all()
    assert_equal_seen(before, states(), "after the capture")
    made.run()
    found, after = bits(t).clone(), states()
    place_defaults()
    expected = torch_init.normal_(torch.empty_like(t))
    expected[:100] = 0
    assert_equal_seen({"t": bits(expected), **states()}, {"t": found, **after}, "afterwards")


@needs_gpu
@pytest.mark.parametrize("name", ["zero_", "normal_"])
def test_capture_in_a_block_works_or_is_refused(name: str) -> None:
    """The operator is part of the graph though the tensor's fills wait."""
    other = torch.zeros(10, device=HERE).add_(1)
    getattr(torch.empty(5000, device=HERE), name)()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    START.place(default())
    try:
        with fastinit.fused():
            t = torch.empty(5000, device=HERE)
            with torch.cuda.graph(graph):
                other.add_(1)
                getattr(t, name)()
    except RuntimeError as error:
        assert "captur" in str(error)  # noqa: PT017
    else:
        expected = drawn_by(name, name, n=5000)
        for values in expected:
            poison(t, 13.0)
            graph.replay()
            assert torch.equal(bits(t), bits(values))
    check("normal_", lambda: empty((1000,), F32))
    check("zeros_", lambda: empty((1000,), F32))


@needs_gpu
def test_proofs_are_not_spoilt_by_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that is met for the first time while a graph is captured is proved later."""
    monkeypatch.setattr(probe, "_verdicts", {})
    t, other = torch.empty(5000, device=HERE), torch.zeros(10, device=HERE).add_(1)
    t.uniform_()
    torch.cuda.synchronize()
    with fastinit.fused():
        inside = torch.empty(5000, device=HERE)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            other.add_(1)
            fastinit.uniform_(t)
            attempt(inside.uniform_)
    check("uniform_", lambda: empty((1000,), F32))


# ---- models --------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)


class ResNet(nn.Module):
    """As torchvision's initialises itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, bias=False), nn.BatchNorm2d(16))
        self.body = nn.Sequential(*[Residual(16) for _ in range(6)])
        self.fc = nn.Linear(16, 100)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                torch_init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d):
                torch_init.constant_(m.weight, 1)
                torch_init.constant_(m.bias, 0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Transformer": lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True),
    "ResNet": ResNet,
    "LSTM": lambda: nn.LSTM(20, 30, 2, bidirectional=True),
    "Embedding": lambda: nn.Sequential(nn.Embedding(100, 24, padding_idx=3), nn.Linear(24, 10)),
    "Tied": Tied,
    **{k: ZOO[k] for k in ("mlp", "conv", "transposed_conv", "channels_last", "norms")},
    **{k: ZOO[k] for k in ("embeddings", "recurrent", "lstm_projection", "bilinear_prelu")},
    **{k: ZOO[k] for k in ("attention", "encoder", "decoder_layer", "shared", "views")},
    **{k: ZOO[k] for k in ("frozen", "no_elements", "weight_norm")},
}
each_model = pytest.mark.parametrize("kind", MODELS)


def seen_of(
    model: nn.Module, *generators: torch.Generator, versions: bool = True
) -> dict[str, Any]:
    for t in (*model.parameters(), *model.buffers()):
        assert t.device == HERE
    state = model_state(model)
    if not versions:
        state = {k: v for k, v in state.items() if not k.endswith(" version")}
    return {**state, **states(*generators)}


def tensors_of(model: nn.Module) -> int:
    """How many there are to be written."""
    return sum(t.is_floating_point() for t in (*model.parameters(), *model.buffers()))


@each_model
def test_construction_in_a_block(kind: str, launches: list[int]) -> None:
    """The fused one comes first, so that it cannot find the other's values in its memory."""
    place_defaults()
    dirty()
    launches.clear()
    with fastinit.fused() as report, torch.device(HERE):
        model = MODELS[kind]()
    found = seen_of(model)
    assert "elements" in str(report)
    if kind in ("Transformer", "ResNet", "mlp"):
        assert not ON_GPU or launches == [tensors_of(model)]
        assert report.recorded_elements >= report.written_elements > 0
    if kind in ("Transformer", "ResNet", "mlp", "Embedding", "Tied"):
        assert report.early == []
        names = [row.name for row in report.rows()]
        assert sorted(names) == sorted(
            n for n, t in (*model.named_parameters(), *model.named_buffers())
            if t.is_floating_point()
        )  # fmt: skip
    place_defaults()
    with torch.device(HERE):
        expected = seen_of(MODELS[kind]())
    assert_equal_seen(expected, found, kind)


@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["Transformer", "ResNet", "LSTM", "Tied"])
def test_construction_and_conversion(kind: str, dtype: torch.dtype) -> None:
    """Built on the CPU and moved, and built on the GPU and converted, in a block."""
    seen = []
    for fused in (True, False):
        place_defaults()
        dirty()
        with block_if(fused):
            moved = MODELS[kind]().to(HERE, dtype)
            with torch.device(HERE):
                converted = MODELS[kind]().to(dtype)
        seen.append({f"moved {k}": v for k, v in seen_of(moved).items()} | seen_of(converted))
    assert_equal_seen(seen[1], seen[0], kind)


def test_reads_in_a_block(launches: list[int]) -> None:
    seen = []
    for fused in (True, False):
        place_defaults()
        dirty()
        launches.clear()
        with block_if(fused) as report:
            with torch.device(HERE):
                a, b, c = nn.Linear(60, 50), nn.Linear(50, 40), nn.Linear(40, 30)
            total = b.weight.detach().sum()
            before = list(launches)
            torch_init.normal_(b.weight)
            with torch.no_grad():
                c.weight[3:5].mul_(2.0)
                a.bias.copy_(b.bias[0])
            value = float(a.weight.detach()[7, 7])
        seen.append({f"{i} {k}": v for i, m in enumerate((a, b, c)) for k, v in seen_of(m).items()})
        seen[-1] |= {"total": total, "value": value}
        if fused:
            assert before == [1]  # nothing but what is read
            assert "sum" in str(report)
    assert_equal_seen(seen[1], seen[0], "reads")


def test_nested_blocks(launches: list[int]) -> None:
    place_defaults()
    dirty()
    launches.clear()
    with fastinit.fused() as outer, torch.device(HERE):
        with fastinit.fused() as inner:
            a = nn.Linear(30, 20)
        assert launches == []
        b = nn.Linear(20, 10)
        init_model_(a)
    assert inner is outer
    assert not ON_GPU or launches == [4]
    found = {f"a {k}": v for k, v in seen_of(a).items()} | seen_of(b)
    place_defaults()
    with torch.device(HERE):
        a, b = nn.Linear(30, 20), nn.Linear(20, 10)
        a.reset_parameters()
    expected = {f"a {k}": v for k, v in seen_of(a).items()} | seen_of(b)
    assert_equal_seen(expected, found, "nested")


@pytest.mark.usefixtures("own_factors")
def test_every_operator_in_a_block(launches: list[int]) -> None:
    """Factories, in-place operators, views, copies and sparse_'s rows."""

    def body() -> list[torch.Tensor]:
        made = [torch.zeros(300, device=HERE), torch.ones(3, 5, device=HERE, dtype=BF16)]
        made += [torch.rand(400, device=HERE, dtype=F64), torch.randn(17, 3, device=HERE)]
        made += [torch.full((99,), 0.5, device=HERE), torch.randn_like(made[-1])]
        made += [torch.full_like(made[1], 2.0), made[0].new_ones(12), torch.rand_like(made[0])]
        made.append(torch.empty(90, 50, device=HERE, dtype=F16).t())
        made[-1].normal_(0.0, 0.02)
        made[-1][:, 7].zero_()
        made.append(torch.empty(60, 80, device=HERE)[:, 3:40])
        made[-1].uniform_(-1, 1)
        made += [made[-1].clone(), torch.empty_like(made[3]).copy_(made[3])]
        w = torch.empty(70, 30, device=HERE)
        for name, *args in (
            *(("sparse_", 0.4), ("eye_",), ("xavier_uniform_",), ("trunc_normal_", 0.0, 0.02)),
            *(("orthogonal_",), ("sparse_", 0.2, 0.5), ("trunc_normal_",), ("kaiming_normal_",)),
        ):
            made.append(getattr(torch_init, name)(torch.empty_like(w), *args))
            getattr(torch_init, name)(w, *args)
        return [*made, w]

    place_defaults()
    dirty()
    with fastinit.fused():
        made = body()
    found = {str(i): bits(t) for i, t in enumerate(made)} | states()
    found |= {f"{i} version": t._version for i, t in enumerate(made)}
    place_defaults()
    made = body()
    expected = {str(i): bits(t) for i, t in enumerate(made)} | states()
    expected |= {f"{i} version": t._version for i, t in enumerate(made)}
    assert_equal_seen(expected, found, "operators")


Fn = Callable[[nn.Module, torch.Generator], object]


def reset_with(m: nn.Module, g: torch.Generator) -> None:
    reset(m)


@pytest.mark.parametrize(
    "fn", [reset_with, gpt2, resnet, vit, everything], ids=lambda f: f.__name__
)
@each_model
def test_init_model(kind: str, fn: Fn) -> None:
    seen = []
    for fast in (False, True):
        place_defaults()
        with torch.device(HERE):
            model = MODELS[kind]()
        for t in (*model.parameters(), *model.buffers()):
            poison(t, -7 if t.dtype is torch.int64 else POISONS[fast])
        place_defaults(POSITIONS[1])
        g = POSITIONS[2].place(own())
        if kind == "weight_norm" or fn is not reset_with:  # those leave something as it was
            for t in (*model.parameters(), *model.buffers()):
                poison(t, 3)
        each = lambda m, g=g: fn(m, g)  # noqa: E731
        _, failure, warned = attempt(init_model_ if fast else nn.Module.apply, model, each)
        seen.append({**seen_of(model, g), "failure": failure, "warnings": warned})
    assert_equal_seen(seen[0], seen[1], kind)


@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["Transformer", "ResNet", "Embedding", "Tied"])
def test_init_model_is_one_pass(kind: str, dtype: torch.dtype, launches: list[int]) -> None:
    seen = []
    for fast in (False, True):
        with torch.device(HERE):
            model = MODELS[kind]().to(dtype)
        place_defaults()
        launches.clear()
        _ = init_model_(model) if fast else model.apply(reset)
        seen.append(seen_of(model))
    assert_equal_seen(seen[0], seen[1], kind)
    # The row of padding is written after all others; what is tied is overwritten with it.
    assert not ON_GPU or len(launches) == (2 if kind == "Embedding" else 1)


@pytest.mark.parametrize("fn", [None, gpt2, resnet, vit], ids=lambda f: getattr(f, "__name__", ""))
@pytest.mark.parametrize("kind", [k for k in MODELS if k not in ("weight_norm", "views")])
def test_record(kind: str, fn: Any, launches: list[int]) -> None:
    seen = []
    each = reset if fn is None else lambda m: fn(m, None)
    for fast in (False, True):
        place_defaults()
        with torch.device(HERE):
            model = MODELS[kind]()
        place_defaults(POSITIONS[1])
        made = fastinit.record(model, each) if fast else None
        for _ in range(3):
            launches.clear()
            _ = made.run() if made is not None else model.apply(each)
        seen.append(seen_of(model))
    assert_equal_seen(seen[0], seen[1], kind)
    if fn is None and kind in ("Transformer", "LSTM", "mlp", "conv"):
        assert not ON_GPU or len(launches) == 1


def retie(model: nn.Module) -> None:
    """to_empty takes apart what is tied."""
    if isinstance(model, Tied):
        model.head.weight = model.embedding.weight


@pytest.mark.parametrize("dtype", [None, BF16, F64], ids=str)
@pytest.mark.parametrize(
    "kind", [k for k in MODELS if k not in ("weight_norm", "views", "no_elements")]
)
def test_materialize(kind: str, dtype: torch.dtype | None, launches: list[int]) -> None:
    model = on_meta(MODELS[kind])
    place_defaults(POSITIONS[1])
    dirty()
    launches.clear()
    materialize_(model, HERE, dtype).check()
    if kind in ("Transformer", "ResNet", "mlp"):
        assert not ON_GPU or launches == [tensors_of(model)]
    found = seen_of(model, versions=False)
    assert kind != "Tied" or model.head.weight is model.embedding.weight
    model = on_meta(MODELS[kind])
    place_defaults(POSITIONS[1])
    model = (model if dtype is None else model.to(dtype)).to_empty(device=HERE)
    retie(model)
    expected = seen_of(model.apply(reset), versions=False)
    assert_equal_seen(expected, found, kind)


def test_materialize_with_a_function(launches: list[int]) -> None:
    """As vision transformers initialise themselves."""
    make = lambda: nn.TransformerEncoder(  # noqa: E731
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3, enable_nested_tensor=False
    )

    def fn(m: nn.Module) -> None:
        for p in m.parameters(recurse=False):
            if p.dim() > 1:
                torch_init.trunc_normal_(p, std=0.02)
            else:
                torch_init.constant_(p, 0.5)

    model = on_meta(make)
    place_defaults()
    dirty()
    launches.clear()
    materialize_(model, HERE, fn=fn)
    assert not ON_GPU or launches == [tensors_of(model)]
    found = seen_of(model, versions=False)
    place_defaults()
    expected = seen_of(on_meta(make).to_empty(device=HERE).apply(fn), versions=False)
    assert_equal_seen(expected, found, "vit")


def test_training_goes_the_same_way() -> None:
    losses = []
    for fused in (False, True):
        place_defaults()
        with block_if(fused), torch.device(HERE):
            model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        inputs = torch.randn(32, 8, device=HERE)
        for _ in range(5):
            optimiser.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[:5] == losses[5:]


# ---- several GPUs --------------------------------------------------------------------------------


def other_gpu() -> torch.device:
    return torch.device("cuda", (HERE.index + 1) % torch.cuda.device_count())


@needs_two
@each_dtype
@pytest.mark.parametrize("case", CASES)
def test_tensors_of_another_gpu(case: str, dtype: torch.dtype) -> None:
    there = other_gpu()
    name, shape, args, native = CASES[case]
    for n in (1, 300, most_threads() + 1):
        make = lambda n=n: torch.full(shape(n), 13.0, dtype=dtype, device=there)  # noqa: E731
        check(name, make, *args, native=native, device=there)
        assert torch.cuda.current_device() == HERE.index


@needs_two
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("way", ["plan", "block", "calls"])
def test_fills_on_two_gpus(way: str, shared: bool, launches: list[int]) -> None:
    """In one plan or block; also if one generator without an index serves both."""
    seen = []
    both = (HERE, other_gpu())
    for device in both:  # proofs of the other as well
        for op, dtype, layout in kinds():
            probe.verdict(op, dtype, layout, device.index)
    for fast in (True, False):
        for device in both:
            place_defaults(START, device)
            dirty(device)
        g = START.place(torch.Generator("cuda")) if shared else None
        made = fastinit.Plan()
        to: Any = (made if way == "plan" else fastinit) if fast else torch_init
        launches.clear()
        with block_if(fast and way == "block"):
            tensors = [torch.empty(500 + i, device=both[i * 3 // 2 % 2]) for i in range(40)]
            for i, t in enumerate(tensors):
                _ = to.normal_(t, generator=g) if i % 3 else to.zeros_(t)
        made.run()
        if fast and not shared and way != "calls":
            assert len(launches) == 2
        seen.append({str(i): bits(t).cpu() for i, t in enumerate(tensors)})
        seen[-1] |= {f"generator of {d}": state_of(default(d)) for d in both}
        seen[-1]["shared"] = None if g is None else state_of(g)
    assert_equal_seen(seen[1], seen[0], way)


@needs_two
def test_model_on_two_gpus(launches: list[int]) -> None:
    there = other_gpu()

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(60, 50, device=HERE), nn.Linear(50, 40, device=there))

    seen = []
    for fused in (True, False):
        for device in (HERE, there):
            place_defaults(START, device)
            dirty(device)
        with block_if(fused):
            model = make()
        made = fastinit.record(model, reset) if fused else None
        for _ in range(3):
            _ = made.run() if made is not None else model.apply(reset)
        _ = init_model_(model) if fused else model.apply(reset)
        seen.append({**model_state(model), **states(), "there": state_of(default(there))})
        seen[-1] = {k: v.cpu() if torch.is_tensor(v) else v for k, v in seen[-1].items()}
    assert_equal_seen(seen[1], seen[0], "model")


# ---- errors --------------------------------------------------------------------------------------


@needs_gpu
def test_errors_of_a_launch_are_raised() -> None:
    run, size = kernels._cuda.run, kernels._cuda.FILL_SIZE
    for fills, count in ((bytes(3), 1), (bytes(size), 2), (bytes(size * 26), 26)):
        with pytest.raises(ValueError, match="not a packed launch"):
            run(fills, 0, count, 1, bytes(16), 0, HERE.index, 0)
    with pytest.raises(ValueError, match="not a packed launch"):
        run(bytes(size), 0, 1, 1, bytes(16 * 9), 0, HERE.index, 0)
    with pytest.raises(RuntimeError, match="CUDA"):
        run(bytes(size), 0, 1, 1, bytes(16), 0, torch.cuda.device_count() + 3, 0)
    assert torch.cuda.current_device() == HERE.index
    check("normal_", lambda: empty((1000,), F32))  # nothing is left of it


@needs_gpu
def test_errors_of_a_launch_surface() -> None:
    """Versions and generators stay as they were."""

    def elsewhere(*args: Any) -> None:
        kernels._cuda.run(*args[:-1], torch.cuda.device_count(), 0)

    t = torch.full((5000,), 13.0, device=HERE)
    fastinit.normal_(t)
    made = fastinit.Plan()
    made.uniform_(t)
    place_defaults()
    before = {**states(), "version": t._version, "t": bits(t).clone()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "run", elsewhere)
        for function in (lambda: fastinit.normal_(t), made.run, made.run):
            with pytest.raises(RuntimeError, match="CUDA"):
                function()
            now = {**states(), "version": t._version, "t": bits(t)}
            assert_equal_seen(before, now, "after an error")
    check("normal_", lambda: empty((1000,), F32))


@pytest.mark.parametrize(
    ("name", "args"), [("uniform_", (1.0, 0.0)), ("normal_", (0.0, -1.0)), ("eye_", ())]
)
def test_errors_are_torchs(name: str, args: tuple[Any, ...]) -> None:
    seen = []
    for module in (torch_init, fastinit):
        place_defaults()
        t = torch.full((300,), 13.0, device=HERE)
        _, failure, warned = attempt(getattr(module, name), t, *args)
        seen.append({"failure": failure, "warned": warned, "t": bits(t), **states()})
    assert seen[0]["failure"]
    assert_equal_seen(seen[0], seen[1], name)


@needs_gpu
def test_generator_of_the_cpu_is_torchs_error() -> None:
    seen = []
    for module in (torch_init, fastinit):
        t = torch.full((300,), 13.0, device=HERE)
        _, failure, _ = attempt(module.normal_, t, generator=torch.Generator())
        seen.append({"failure": failure, "t": bits(t)})
    assert "generator" in seen[0]["failure"]
    assert_equal_seen(seen[0], seen[1], "generator")
