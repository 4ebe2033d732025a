# SPDX-License-Identifier: BSD-3-Clause
"""Proofs: before a kind of fill is used it is compared with torch's, for each GPU by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from fastinit import execute, probe
from fastinit.core import build, geometry, kernels
from tests.support import cuda_model
from tests.support.compare import BF16, F32, F64, POISONS
from tests.support.cuda_gpu import START, TRUNC, Gpu, in_scope, kinds, only_real, only_simulated
from tests.support.cuda_host import Generator
from tests.support.cuda_model import SMALL, State

VERDICT = probe.verdict  # the simulation replaces it


class GpuGenerator(Generator):
    """A generator with what only the proof asks for."""

    def __new__(cls, device: Any = None) -> GpuGenerator:
        return super().__new__(cls)  # type: ignore[return-value]

    def __init__(self, device: Any = None) -> None:
        super().__init__()

    def manual_seed(self, seed: int) -> None:  # type: ignore[override]
        self.seed, self.offset = seed, 0  # type: ignore[method-assign, assignment]

    def get_state(self) -> torch.Tensor:
        return torch.tensor([self.seed, self.offset])


class Proxy:
    """torch, but for some names."""

    def __init__(self, **own: Any) -> None:
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Proofs:
    """The real proof, with a torch for the GPU that may differ from it.

    The model's normals are not torch's to the bit, so for all but uniforms the kernel stands for
    torch too: what is tested is that the rest of the proof compares.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = self.made = 0
        self.spoil: Callable[[torch.Tensor, GpuGenerator], Any] | None = None

        def zeros(*shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
            assert device == torch.device("cuda", 0)
            self.made += 1
            return torch.zeros(*shape, dtype=dtype)

        own = Proxy(Generator=GpuGenerator, zeros=zeros, empty=zeros)
        monkeypatch.setattr(probe, "torch", own)
        monkeypatch.setattr(probe, "verdict", VERDICT)
        monkeypatch.setattr(probe, "_torch_does", self.torch_does)
        cpu_masks = {("sparse_mask", BF16, "contiguous"): 0}
        monkeypatch.setattr(probe, "_verdicts", cpu_masks)

    def torch_does(self, op: str, t: torch.Tensor, a: float, b: float, g: GpuGenerator) -> None:
        self.asked += 1
        if op == "uniform":
            t.uniform_(a, b, generator=g)
        else:
            execute.run([f for f in probe._fills(op, t, a, b, g) if f is not None])
        if self.spoil is not None:
            self.spoil(t, g)


@pytest.fixture
def proofs(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Proofs:
    return Proofs(monkeypatch)


KINDS = [
    *((op, at) for op in ("uniform", "normal", "constant") for at in probe.LAYOUTS),
    *((op, "contiguous") for op in ("trunc_normal", "trunc_erfinv", "diagonal", "sparse")),
]


@only_simulated
@pytest.mark.parametrize(("op", "layout"), KINDS, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_a_kind_is_proved(op: str, layout: str, dtype: torch.dtype, proofs: Proofs) -> None:
    state = torch.get_rng_state()
    if op == "sparse":  # which rests on it
        assert probe.verdict("normal", dtype, layout, 0) == 0
        proofs.asked = 0
    for _ in range(2):
        assert probe.verdict(op, dtype, layout, 0) == 0
        assert proofs.asked == len(probe._cases(op, dtype))
    assert torch.equal(state, torch.get_rng_state())


def flip(t: torch.Tensor, g: GpuGenerator) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    t[-1:].view(bits)[..., -1] ^= 1


def one_trip_on(t: torch.Tensor, g: GpuGenerator) -> None:
    g.offset += 4


def no_operator(t: torch.Tensor, g: GpuGenerator) -> None:
    raise NotImplementedError('"normal_kernel_cuda" not implemented')


@only_simulated
@pytest.mark.parametrize(("op", "layout"), KINDS, ids=str)
@pytest.mark.parametrize("spoil", [flip, one_trip_on, no_operator])
def test_a_kind_that_differs_is_not_proved(
    spoil: Callable[..., Any], op: str, layout: str, proofs: Proofs
) -> None:
    proofs.spoil = spoil
    for dtype in (F32, BF16):
        assert probe.verdict(op, dtype, layout, 0) is None


@only_simulated
def test_a_verdict_of_sparse_needs_one_of_the_mask(proofs: Proofs) -> None:
    probe._verdicts["sparse_mask", BF16, "contiguous"] = None
    assert probe.verdict("sparse", F32, "contiguous", 0) is None


@only_simulated
def test_the_proof_is_no_part_of_what_asks_for_it(proofs: Proofs, gpu: Gpu) -> None:
    seen = []
    for fused in (True, False):
        gpu.place_defaults()
        with in_scope(fused) as report:
            t = torch.empty(300).uniform_()
        u, made = gpu.full(20), fastinit.Plan()
        (made if fused else torch_init).normal_(u)
        if fused:
            assert (report.recorded_elements, report.early, len(made)) == (300, [], 1)
        made.run()
        seen.append({"t": t, "u": u, **gpu.states()})
    gpu.assert_same(seen[1], seen[0], "proofs")
    assert proofs.asked == 5


@only_real
def test_all_is_proved(gpu: Gpu) -> None:
    """All other tests would pass as well if torch did it."""
    index = 0 if gpu.is_gpu else -1
    left = [kind for kind in kinds() if probe.verdict(*kind, index) is None]
    assert not left, "left to torch: " + ", ".join(map(str, left))


@pytest.mark.parametrize("way", ["function", "plan", "scope"])
@pytest.mark.parametrize("op", ["uniform", "normal", "constant", "diagonal", TRUNC, "sparse"])
def test_what_is_not_proved_is_left_to_torch(
    op: str, way: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"diagonal": "eye_", TRUNC: "trunc_normal_"}.get(op, f"{op}_")
    args = {"constant_": (0.5,), "sparse_": (0.25,)}.get(name, ())
    known = probe.verdict
    left = (op, "sparse_mask") if op == "sparse" else (op, "normal_pairs")

    def verdict(asked: str, *kind: Any) -> int | None:
        return None if asked in left else known(asked, *kind)

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(probe, "verdict", verdict)
        for module, poison in zip((gpu.torch, fastinit), POISONS):
            gpu.place_defaults()
            t, made, done = gpu.full(40, 30, value=poison), fastinit.Plan(), kernels.native_fills
            if way == "scope" and module is fastinit:
                with fastinit.fused():
                    t = gpu.empty(40, 30)
                    getattr(torch_init, name)(t, *args)
            else:
                to: Any = made if way == "plan" and module is fastinit else module
                getattr(to, name)(t, *args)
                made.run()
            assert kernels.native_fills == done or op == "sparse"  # its zeros, column by column
            seen.append({"t": gpu.values(t), **gpu.states()})
    gpu.assert_same(seen[0], seen[1], f"{name}, {way}")


@pytest.fixture
def asked(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Verdicts asked for the first time; those of GPU 1 are bad."""
    keys: list[tuple[Any, ...]] = []

    def find_out(op: str, dtype: torch.dtype, layout: str, device: int = -1) -> int | None:
        keys.append((op, dtype, layout, device))
        return None if device == 1 else 0

    monkeypatch.setattr(probe, "_probe", find_out)
    monkeypatch.setattr(probe, "_verdicts", {})
    monkeypatch.setattr(probe, "verdict", VERDICT)
    return keys


@only_simulated
def test_verdicts_are_of_a_device(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = 0
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "device_of", lambda t: device)
        for device in (0, 1, 0, 1, 2):
            fill = build.uniform(torch.empty(30), 0.0, 1.0, Generator())
            assert fill is not None
            assert fill.device == device
            assert (probe.proved(fill) is fill) == (device != 1)
    assert asked == [("uniform", F32, "contiguous", d) for d in (0, 1, 2)]


@only_simulated
def test_split_tensors_are_a_kind_of_their_own(
    asked: list[tuple[Any, ...]], gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "MOST_AT_ONCE", 4000)
    matrix = gpu.full(50, 50)
    for t in (gpu.full(1000), gpu.full(1001), matrix[:, 1:10], matrix[:5, 1:10]):
        fastinit.normal_(t)
        fastinit.ones_(t)
    found = [(op, layout) for op, _, layout, _ in asked]
    assert found == [
        *(("normal", "contiguous"), ("constant", "contiguous")),
        *(("normal", "split"), ("constant", "strided"), ("normal", "strided")),
    ]


@only_simulated
@pytest.mark.parametrize("op", ["uniform", "normal", "trunc_normal"])
def test_a_split_tensor_is_proved_in_place(
    op: str, proofs: Proofs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes too much memory for two of them."""
    monkeypatch.setattr(geometry, "MOST_AT_ONCE", 39_999)
    monkeypatch.setattr(cuda_model, "LIMIT", 39_999)
    assert probe.verdict(op, F32, "split", 0) == 0
    assert proofs.made == len(probe._cases(op, F32))
    proofs.spoil = flip
    probe._verdicts.pop((op, F32, "split", 0))
    assert probe.verdict(op, F32, "split", 0) is None


@only_simulated
@pytest.mark.parametrize("proved", ["trunc_normal", "trunc_erfinv"])
@pytest.mark.parametrize(("a", "b"), [(-0.5, 0.7), (-40.0, 40.0), (2.0, 2.3)])
@pytest.mark.parametrize("way", ["function", "plan", "scope"])
def test_trunc_normal_is_done_as_torch_does_it(
    way: str, a: float, b: float, proved: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rejection since 2.12, by the inverse distribution before. torch 2.12 and later has another
    way for narrow bounds, which is left to it."""
    n, args, seen = 3000, (0.1, 1.0, a, b), []

    def verdict(op: str, *kind: Any) -> int | None:
        return None if op.startswith("trunc") and op != proved else 0

    with monkeypatch.context() as patch:
        patch.setattr(probe, "verdict", verdict)
        for module in (fastinit, gpu.torch):
            gpu.place_defaults()
            t, made = gpu.full(n), fastinit.Plan()
            with in_scope(way == "scope" and module is fastinit):
                if way == "scope":
                    t = torch.empty(n)
                to: Any = made if way == "plan" and module is fastinit else module
                to.trunc_normal_(t, *args)
            made.run()
            native = proved == "trunc_erfinv" or b != 2.3
            assert gpu.launches == [1] * native
            seen.append({"t": t, "version": t._version, **gpu.states()})
    if proved == "trunc_erfinv":
        state = State(*START)
        values = cuda_model.trunc_normal_erfinv(n, "float32", *args, state, SMALL)
        found = seen[0]["t"].double()
        torch.testing.assert_close(found, torch.from_numpy(values).double(), rtol=0, atol=2e-4)
        assert seen[0]["version"] == 5
    else:
        gpu.assert_same(seen[1], seen[0], way)
