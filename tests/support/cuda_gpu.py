# SPDX-License-Identifier: BSD-3-Clause
"""The GPU of a test: simulated anywhere, or a real one, with what torch does on it.

The `gpu` fixture has two parameters. `simulated`: the CPU's memory stands for a GPU's, the kernels'
bodies run on the host, and torch's uniform_ and normal_ are replaced by the model of its CUDA
generator, so that torch's own Python code gives what it would give on that GPU. `real`, marked
`cuda`: the first GPU; FASTINIT_TEST_DEVICE=cpu makes it a dry run, of the CPU's kernels against
torch's operators.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.init as torch_init
from torch import nn

import fastinit
from fastinit import probe
from fastinit.core import geometry, kernels
from fastinit.cuda import runtime
from tests.support import cuda_model
from tests.support.compare import BF16, DTYPES, F16, F32, F64, assert_equal_seen, bits, version
from tests.support.cuda_host import Generator, Simulation, simulated
from tests.support.cuda_model import SMALL, State

DEVICE = os.environ.get("FASTINIT_TEST_DEVICE", "cuda")
HERE = torch.device("cuda:0" if DEVICE == "cuda" else DEVICE)
ON_GPU = HERE.type == "cuda" and torch.cuda.is_available()
REJECTS = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 12)  # trunc_normal_
TRUNC = "trunc_normal" if REJECTS else "trunc_erfinv"
_MASK = (1 << 64) - 1

# Of normals: the host's log, sine and cosine against numpy's, relative and absolute.
_CLOSE = {F32: (2.0**-20, 0.0), F64: (2.0**-50, 4e-14), BF16: (2.0**-7, 0), F16: (2.0**-10, 2**-24)}
_CLOSE_FACTORS = {F64: 1e-9, F32: 2e-4, BF16: 1e-2, F16: 1e-2}  # of orthogonal_


class At(NamedTuple):
    """Where a generator stands."""

    seed: int = 20240229
    offset: int = 0  # in torch's units, four to a block; words on the CPU

    def place(self, g: torch.Generator) -> torch.Generator:
        if isinstance(g, Generator):
            g.seed, g.offset = self.seed & _MASK, self.offset  # type: ignore[method-assign, assignment]
        elif g.device.type == "cuda":
            g.manual_seed(self.seed).set_offset(self.offset)
        else:
            g.manual_seed(self.seed)
            torch.empty(self.offset % 5003, device="cpu").uniform_(generator=g)
        return g


START = At()
ELSEWHERE = At(4, 28)  # for generators that nothing should be drawn from


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


class Gpu:
    """What a test may ask of its GPU, simulated or real."""

    def __init__(self, here: torch.device, sim: Simulation | None) -> None:
        self.here, self.sim = here, sim
        self.is_gpu = sim is not None or here.type == "cuda"  # else a dry run
        self.is_real = here.type == "cuda"
        self.launches: list[int] = [] if sim is None else sim.launches  # fills of each
        self.torch: Any = torch_init if REJECTS or not self.is_gpu else Rejecting()
        self.normals: list[tuple[float, float]] = []  # mean and std of what the model drew

    @property
    def model(self) -> cuda_model.Gpu:
        """What torch's grid depends on; in a dry run something small."""
        if not self.is_real:
            return SMALL if self.sim is None else self.sim.gpu
        p = torch.cuda.get_device_properties(self.here)
        return cuda_model.Gpu(p.multi_processor_count, p.max_threads_per_multi_processor)

    @property
    def threads(self) -> int:
        """Of torch's grid, and so the subsequences of the generator that are ever used."""
        return cuda_model.threads_of(1 << 40, self.model)

    def launched(self, *fills: int) -> bool:
        """Whether there were these launches; in a dry run there are none to look at."""
        return not self.is_gpu or self.launches == list(fills)

    def copied(self, times: int) -> bool:
        """Whether the simulation saw so many copies to the GPU."""
        return self.sim is None or self.sim.copies == times

    def go_backwards(self, backwards: bool) -> None:
        """Let the simulation do the tiles of a launch from the last to the first."""
        if self.sim is not None:
            self.sim.backwards = backwards

    # ---- generators

    def generator(self, at: At = START) -> torch.Generator:
        return at.place(Generator() if self.sim is not None else torch.Generator(self.here))

    @property
    def default(self) -> torch.Generator:
        """The one that None stands for."""
        if self.sim is not None:
            return self.sim.default
        return torch.cuda.default_generators[0] if self.is_real else torch.default_generator

    def place_defaults(self, at: At = START) -> None:
        torch.default_generator.manual_seed(5)  # sparse_ draws its rows from it
        at.place(self.default)

    @staticmethod
    def state_of(g: torch.Generator) -> Any:
        g = Generator.find(g) or g
        if isinstance(g, Generator):
            return f"seed {g.seed}, offset {g.offset}"
        if g.device.type == "cpu":
            return g.get_state()
        return f"seed {g.initial_seed()}, offset {g.get_offset()}"

    def states(self, *generators: torch.Generator) -> dict[str, Any]:
        return {
            **{f"explicit generator {i}": self.state_of(g) for i, g in enumerate(generators)},
            "default generator": self.state_of(self.default),
            "CPU's default generator": torch.get_rng_state(),
        }

    # ---- memory

    def full(self, *shape: int, dtype: torch.dtype = F32, value: float = 13.0) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.here)

    def device(self) -> AbstractContextManager[Any]:
        """Let factories make tensors of this GPU; on the CPU they do anyway."""
        return torch.device(self.here) if self.is_real else nullcontext()

    def empty(self, *shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.here)

    def dirty(self) -> None:
        """Leave NaN in free memory, so that what is not written shows."""
        counts = (1 << 8,) * 64 + (1 << 14,) * 64 + (1 << 20,) * (8 if self.is_real else 1)
        junk = [self.full(n, value=math.nan) for n in counts]
        del junk

    # ---- what can be seen

    def values(self, t: torch.Tensor) -> torch.Tensor:
        """Bits, or where normals are only near, values."""
        return bits(t) if self.sim is None else t.detach().clone()

    def all_of(self, t: torch.Tensor) -> torch.Tensor:
        """The values of the whole storage behind a view."""
        flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
        return self.values(flat)

    def seen_of(
        self, model: nn.Module, *generators: torch.Generator, versions: bool = True
    ) -> dict[str, Any]:
        """Every parameter and buffer with its version, and the generators."""
        seen: dict[str, Any] = {}
        for kind in ("parameters", "buffers"):
            for name, t in getattr(model, f"named_{kind}")(remove_duplicate=False):
                assert t.device == self.here
                seen[name] = self.values(t)
                seen[f"{name} leaf"] = (t.is_leaf, t.requires_grad, t.dtype)
                if versions:
                    seen[f"{name} version"] = version(t)
        return {**seen, **self.states(*generators)}

    def assert_same(
        self, torchs: dict[str, Any], ours: dict[str, Any], what: str, drawn: torch.dtype = F64
    ) -> None:
        """Compare what was seen. `drawn`: the narrowest dtype that values have had."""
        if self.sim is None:
            assert_equal_seen(torchs, ours, what)
            return
        assert torchs.keys() == ours.keys(), what
        for key, expected in torchs.items():
            found = ours[key]
            if not torch.is_tensor(expected):
                assert expected == found, f"{what}: {key}"
                continue
            assert expected.shape == found.shape, f"{what}: {key}"
            assert expected.dtype == found.dtype, f"{what}: {key}"
            wrong = ~self._near(expected, found, drawn)
            assert not wrong.any(), (
                f"{what}: {key}: {int(wrong.sum())} of {wrong.numel()} differ, first "
                f"{found[wrong][0]} instead of {expected[wrong][0]}"
            )

    def _near(
        self, expected: torch.Tensor, found: torch.Tensor, drawn: torch.dtype
    ) -> torch.Tensor:
        same = (expected == found) | (expected.isnan() & found.isnan())
        if not self.normals or expected.dtype not in _CLOSE:
            return same
        relative, absolute = map(max, zip(_CLOSE[expected.dtype], _CLOSE[drawn]))
        shift = max(abs(mean) for mean, _ in self.normals)
        spread = max(std for _, std in self.normals)
        x, y = expected.double(), found.double()
        allowed = relative * (x.abs() + 2 * shift) + absolute * max(spread, 1.0)
        if self.sim is not None and self.sim.factors.launches and x.numel():
            allowed = allowed + _CLOSE_FACTORS[expected.dtype] * x.abs().nan_to_num().max()
        return same | ((x - y).abs() <= allowed)


def in_scope(fused: bool) -> AbstractContextManager[Any]:
    return fastinit.fused(watch=True) if fused else nullcontext()


def kinds() -> Iterator[tuple[str, torch.dtype, str]]:
    """All that has to be proved, except of tensors that are split."""
    for dtype in DTYPES:
        for layout in ("contiguous", "dense", "strided"):
            yield from ((op, dtype, layout) for op in ("constant", "uniform"))
            yield "normal" if ON_GPU or layout == "contiguous" else "normal_pairs", dtype, layout
            if ON_GPU or layout == "contiguous":
                yield TRUNC, dtype, layout
        yield from ((op, dtype, "contiguous") for op in ("diagonal", "sparse")[: 1 + ON_GPU])


# ---- torch on the simulated GPU ------------------------------------------------------------------


@contextmanager
def torch_on(gpu: Gpu) -> Iterator[None]:
    """Let torch's operators that draw do on CPU tensors what they would on the simulated GPU."""
    sim = gpu.sim
    assert sim is not None

    def draw(kind: str) -> Callable[..., torch.Tensor]:
        def kernel(
            t: torch.Tensor, a: float = 0.0, b: float = 1.0, *, generator: Any = None
        ) -> torch.Tensor:
            g = sim.default if generator is None else Generator.find(generator)
            if t.dtype not in DTYPES:
                raise NotImplementedError(f'"{kind}_kernel" not implemented for {t.dtype}')
            if g is None:
                raise RuntimeError("Expected a 'cuda' device type for generator")
            state, dtype = State(g.seed & _MASK, g.offset), str(t.dtype)[6:]  # type: ignore[operator]
            with kernels.undisturbed():
                flat = torch.empty(0, dtype=t.dtype).set_(geometry.storage_of(t))
                for place, values in cuda_model.fill(
                    kind, t.shape, t.stride(), dtype, (a, b), state, sim.gpu
                ):
                    at = torch.from_numpy(place) + t.storage_offset()
                    flat.index_copy_(0, at, torch.from_numpy(values).to(t.dtype))
            g.offset = state.offset
            if kind == "normal":
                gpu.normals.append((a, b))
            return t

        return kernel

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it replaces torch's
        for name in ("uniform", "normal"):
            library.impl(f"{name}_", draw(name), "CPU")
    try:
        yield
    finally:
        library._destroy()


# ---- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.cuda)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The GPU of a test; on it all fills are native, however small."""
    if request.param == "simulated":
        with simulated(SMALL) as sim:
            here, known = Gpu(torch.device("cpu"), sim), probe.verdict

            def verdict(op: str, *kind: Any) -> int | None:  # torch from 2.12 on
                return None if op == "trunc_erfinv" else known(op, *kind)

            monkeypatch.setattr(probe, "verdict", verdict)
            with torch_on(here):
                yield here
            monkeypatch.undo()  # before the simulation does: what a test has replaced may be of it
        return
    if request.param == "hardware" and not ON_GPU:
        pytest.skip("a dry run on the CPU")
    monkeypatch.setattr(geometry, "MIN_NATIVE", 0)
    monkeypatch.setattr(geometry, "MIN_CUDA", 0)
    here = Gpu(HERE, None)
    if not ON_GPU:
        yield here
        return
    torch.cuda.init()
    for op, dtype, layout in kinds():  # now: later proofs would count as launches
        probe.verdict(op, dtype, layout, 0)
        if not REJECTS:  # the kernel for what torch does from 2.12 on is compared all the same
            monkeypatch.setitem(probe._verdicts, ("trunc_normal", dtype, layout, 0), 0)
    run = runtime.run

    def counted(fills: bytes, table: int, count: int, *rest: Any) -> None:
        here.launches.append(count)
        run(fills, table, count, *rest)

    monkeypatch.setattr(runtime, "run", counted)
    with torch.cuda.device(HERE):
        yield here
        torch.cuda.synchronize()


_HARDWARE = pytest.param("hardware", marks=pytest.mark.cuda)
only_simulated = pytest.mark.parametrize("gpu", ["simulated"], indirect=True)
only_real = pytest.mark.parametrize(
    "gpu", [pytest.param("real", marks=pytest.mark.cuda)], indirect=True
)
only_hardware = pytest.mark.parametrize("gpu", [_HARDWARE], indirect=True)
two_dtypes = pytest.mark.parametrize(  # the others where time does not count
    "dtype",
    [F32, BF16, *(pytest.param(d, marks=pytest.mark.slow) for d in (F64, F16))],
    ids=lambda d: str(d)[6:],
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
