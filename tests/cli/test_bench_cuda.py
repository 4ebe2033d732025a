# SPDX-License-Identifier: BSD-3-Clause
"""The GPU benchmark on a simulated GPU: it runs through, and its table and file are complete.

Its figures mean nothing there; that bits are compared before anything is timed is tried with a
difference.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastinit.cli import bench_cuda
from fastinit.core import kernels
from tests.support.cuda_host import Simulation, simulated
from tests.support.cuda_model import SMALL


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs by itself here."""

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


def seed(sim: Simulation, value: int) -> None:
    torch.manual_seed(value)
    sim.default.seed, sim.default.offset = value, 0


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    with simulated(SMALL) as sim:
        properties = SimpleNamespace(
            name="no GPU", multi_processor_count=2, max_threads_per_multi_processor=512
        )
        for name, value in {
            "Event": Event,
            "synchronize": lambda: None,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: properties,
            "manual_seed": lambda value: seed(sim, value),
            "get_rng_state": lambda: torch.tensor([sim.default.seed, sim.default.offset]),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(bench_cuda, "_DEVICE", "cpu")
        monkeypatch.setattr(bench_cuda, "_LARGE", 1 << 10)
        matrices = (("orthogonal_", 3, 150, "4 x", ""), ("orthogonal_", 5, 20, "", ""))
        monkeypatch.setattr(bench_cuda, "_MATRICES", matrices)
        monkeypatch.setattr(kernels, "_cuda", SimpleNamespace(COMPILER="nvcc 0"))
        small = ("a model", lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)))
        rule = bench_cuda._normal_rule
        monkeypatch.setattr(bench_cuda, "_MODELS", ((*small, rule, 30, 1.5),))
        yield sim
        monkeypatch.undo()


def test_table_and_file(
    sim: Simulation,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench_cuda, "_check", lambda *_: None)  # torch's CPU draws other numbers
    monkeypatch.setenv("FASTINIT_COMMIT", "abc1234")
    assert bench_cuda.main(path=str(tmp_path / "out.json")) == 0
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["gpu"], written["commit"]) == ("no GPU", "abc1234")
    assert written["failed"] == []
    cases = [row["case"] for row in written["rows"]]
    assert len(cases) == len(bench_cuda._LAWS) + len(bench_cuda._KEYED) + 2 * 2 + 3
    assert all(f"| {case} |" in shown for case in cases)
    assert all(row["fastinit_s"] > 0 for row in written["rows"])
    assert written["rows"][-1]["torch_s"] is None
    assert written["rows"][-1]["case"] == "a model, 4 tensors: until plan.run() returns"


def test_differences_are_found(sim: Simulation, capsys: pytest.CaptureFixture[str]) -> None:
    """torch.nn.init draws from the CPU's generator here, fastinit from the simulated GPU's."""
    assert bench_cuda.main("a model") == 1
    assert "a model: plan.run() differs from torch" in capsys.readouterr().out


def test_equal_results_pass(sim: Simulation) -> None:
    t = torch.empty(100)

    def fill(value: float) -> Any:
        return lambda: t.fill_(value)

    bench_cuda._check("", [t], {"torch": fill(1.0), "fastinit": fill(1.0)})
    with pytest.raises(AssertionError, match="fastinit differs from torch"):
        bench_cuda._check("", [t], {"torch": fill(1.0), "fastinit": fill(2.0)})
