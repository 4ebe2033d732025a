# SPDX-License-Identifier: BSD-3-Clause
"""benchmarks/ and `fastinit bench`: results are compared before they are timed, tables are whole.

The GPU's cases run on a simulated GPU, where figures mean nothing.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import fastinit
from fastinit.cli import bench
from fastinit.core import kernels
from tests.support.cuda_host import Simulation, simulated
from tests.support.cuda_model import SMALL

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize("name", ["sparse_ 1024 x 1024, 0.9", "kaiming_uniform_ 64 elements"])
def test_cases_agree_with_torch(load: Callable, name: str) -> None:
    load("cpu").CASES[name]().check()


@pytest.mark.slow
def test_a_model_agrees_with_torch(load: Callable) -> None:
    load("cpu").resnet().check()


def test_matrices_agree_with_torch(load: Callable, one_thread: None) -> None:
    load("orthogonal").orthogonal([(3, 20, 20)], False, 1).check()
    load("orthogonal").orthogonal([(20, 7), (5, 20)], False, 1).check()
    load("orthogonal").orthogonal([(20, 7), (5, 20)], True, 1).measure()


def test_a_shard_agrees_with_the_whole(
    load: Callable, monkeypatch: pytest.MonkeyPatch, native: None
) -> None:
    monkeypatch.setattr(load("keyed"), "SIDE", 64)
    load("keyed").shard((8, 64), (24, 0), 1).check()
    load("keyed").shard((64, 8), (0, 24), 1).check()
    with pytest.raises((AssertionError, ValueError)):
        load("keyed").shard((8, 64), (60, 0), 1).check()


@pytest.mark.parametrize(
    "name",
    [
        *("empty block", "20 x Linear(16)", "RL agent, orthogonal_ 64 x 64", "graph attention"),
        *("init_model_, MLP 64 x 64, xavier_uniform_", "init_model_, MLP 64 x 64, orthogonal_"),
    ],
)
def test_rows_agree_with_eager(load: Callable, one_thread: None, name: str) -> None:
    made = load("scope").ROWS[name]()
    made.check()
    found = load("beside").measure(made, rounds=1, limit=0)
    assert found.keys() <= {"eager", "fused"}
    assert all(seconds > 0 for figures in found.values() for seconds in figures)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EMA copy", "ensemble of 8", "load_state_dict, assign=True"])
def test_large_rows_agree_with_eager(load: Callable, name: str) -> None:
    load("scope").ROWS[name]().check()


def two(second: Callable[[], object]) -> Callable[[], object]:
    """Return what makes one thing first, and what `second` returns the second time."""
    turns = iter([lambda: [torch.zeros(9), torch.zeros(9)], second])
    return lambda: next(turns)()


def aliases() -> list[torch.Tensor]:
    return [torch.zeros(9)] * 2


@pytest.mark.parametrize(
    "second",
    [
        lambda: [torch.zeros(9), torch.ones(9)],
        lambda: [torch.zeros(9), torch.zeros(9).fill_(0)],  # another version
        lambda: [torch.zeros(9)],
        lambda: [torch.zeros(9), torch.zeros(9), torch.zeros(9)],
        lambda: [torch.zeros(9), torch.zeros(9, dtype=torch.int32)],
        lambda: [torch.zeros(9), torch.rand(1).expand(9) * 0],  # another place in the sequence
        aliases,
    ],
)
@pytest.mark.parametrize("rounding", [0.0, 1e-4])
def test_what_differs_is_found(load: Callable, second: Callable, rounding: float) -> None:
    with pytest.raises(AssertionError):
        load("beside").check(two(second), rounding)
    load("beside").check(two(lambda: [torch.zeros(9), torch.zeros(9)]), rounding)


def test_the_least_of_the_turns_counts(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, harness = load("beside"), load("harness")
    of_way = {
        "eager": iter([(5.0, 9.0), (4.0, 10.0), (6.0, 11.0)]),
        "fused": iter([(1.0, 2.0)] * 3),
    }
    monkeypatch.setattr(beside, "timed", lambda run, calls: beside.Figures(*next(of_way[run()])))
    ways = {"eager": lambda: "eager", "fused": lambda: "fused"}
    case = harness.Case(ways, (), 1.0, harness.unchecked)
    assert beside.measure(case, 3, limit=60) == {"eager": (4.0, 9.0), "fused": (1.0, 2.0)}
    of_way = {"eager": iter([(5.0, 9.0)]), "fused": iter([(1.0, 2.0)])}
    assert beside.measure(case, 3, limit=0) == {"eager": (5.0, 9.0), "fused": (1.0, 2.0)}


def test_scope_table(
    load: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are wanted; why one is skipped; a difference is an error at the end."""
    scope, harness = load("scope"), load("harness")

    def lost() -> object:
        raise ImportError("no such library")

    ways = {"eager": lambda: None, "fused": lambda: None}
    differing = partial(load("beside").check, two(aliases), 0.0)
    wrong = harness.Case(ways, (), 1.0, differing)
    right = harness.Case(ways, (), 1.0, harness.unchecked)
    rows = {"right": lambda: right, "lost": lost, "wrong": lambda: wrong, "timm": lost}
    monkeypatch.setattr(scope, "ROWS", rows)
    monkeypatch.setattr("sys.argv", ["scope.py", "--quick"])
    with pytest.raises(SystemExit, match="1"):
        scope.main()
    shown = capsys.readouterr().out.splitlines()[2:]
    assert shown[0] == (
        "| case | elements | eager | fused | memory | times as fast | by CPU time | asked |"
    )
    assert shown[2].startswith("| right |  | ")
    assert shown[2].endswith(" | 1.0 |")
    assert shown[3] == "| lost | skipped: no such library |  |  |  |  |  |  |"
    assert shown[4].startswith("| wrong | differs: fused differs from eager in ")
    assert len(shown) == 5  # a library's models are not quick


def test_table_of_threads(
    load: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the first number of threads; only the first run of a process."""
    threads = load("threads")
    asked = []

    def instructions(row: list[str], way: str, few: int, more: int) -> float:
        asked.append((row[1:], way, few, more))
        return 100.0 + int(way)

    monkeypatch.setattr(threads, "instructions", instructions)
    monkeypatch.setattr("sys.argv", ["threads.py", "uniform", "--threads", "2", "4"])
    threads.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| millions of instructions | 2 threads | 4 threads |",
        "| --- | --- | --- |",
        "| uniform_ 2^28 | 102 (+0.0%) | 104 (+2.0%) |",
    ]
    assert asked == [(["uniform_ 2^28"], n, 0, 1) for n in ("2", "4")]
    monkeypatch.setattr(threads, "SIZE", 1 << 20)
    before, fills = torch.get_num_threads(), kernels.native_fills
    arguments = ["uniform_ 2^28", "--alone", "3", "--times", "2"]
    monkeypatch.setattr("sys.argv", ["threads.py", *arguments])
    threads.main()
    assert torch.get_num_threads() == 3
    assert kernels.native_fills >= fills + 2
    torch.set_num_threads(before)


@pytest.mark.slow
def test_instructions_are_counted(
    load: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the runs alone, not of what comes before."""
    beside = load("beside")
    try:
        beside.counter()
    except SystemExit:
        pytest.skip("neither perf nor valgrind")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "way, times = sys.argv[-3], int(sys.argv[-1])\n"
        "for _ in range(times * (30_000 if way == 'eager' else 10_000)): pass\n"
    )
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    counted = {way: beside.instructions([str(program)], way) for way in ("eager", "fused")}
    assert counted["eager"] / counted["fused"] == pytest.approx(3, rel=0.05)


def test_a_difference_is_noticed(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load("cpu").sparse()
    monkeypatch.setattr(fastinit, "sparse_", lambda t, *_: t.zero_())
    with pytest.raises(AssertionError, match="one by one differs from torch"):
        case.measure()


@pytest.mark.parametrize(("value", "draws"), [(1.0, 1), (2.0, 0)])
def test_compare(value: float, draws: int) -> None:
    """Values and generators; values up to rounding."""
    t = torch.empty(100)

    def fill(value: float, draws: int) -> Callable[[], object]:
        return lambda: (t.fill_(value), torch.rand(draws))

    ways = {"torch": fill(1.0, 0), "mine": fill(value, draws)}
    with pytest.raises(AssertionError, match="mine differs from torch"):
        bench.compare(ways, [t])
    bench.compare({"torch": fill(1.0, 1), "mine": fill(1.0, 1)}, [t])
    bench.compare({"torch": fill(1.0, 0), "mine": fill(1.001, 0)}, [t], 0.01)


def test_table(
    load: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each case that is wanted; the ratio is that of the fastest way but "memory"."""
    harness = load("harness")
    ways = {"torch": lambda: 8.0, "one by one": lambda: 4.0, "plan": lambda: 2e-6}
    case = harness.Case(ways, (), 3, harness.unchecked, clock=lambda run: run())

    def lost() -> object:
        raise ImportError("no such library")

    rows = harness.table({"wanted": lambda: case, "other": lost, "Wanted too": lost}, ["wanted"])
    assert capsys.readouterr().out.splitlines() == [
        "| case | torch | one by one | plan | memory | ratio | goal |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| wanted | 8000.00 ms | 4000.00 ms | 2.00 us |  | 4e+06 | 3 |",
        "| Wanted too | skipped: no such library |  |  |  |  |  |",
    ]
    assert [row["name"] for row in rows] == ["wanted"]


def test_the_door(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main("sparse_") == 0
    *_, head, _, row = capsys.readouterr().out.splitlines()
    assert head == "| case | torch | fastinit | times as fast |"
    assert row.startswith("| sparse_ 1024 x 1024, 0.9 | ")
    assert len({name for name, _, _ in bench._cases("cpu", "meta")}) == 10


# ---- a simulated GPU -----------------------------------------------------------------------------


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs by itself here."""

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def gpu(load: Callable, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[ModuleType]:
    """benchmarks/gpu.py with small cases."""
    gpu = load("gpu")
    properties = SimpleNamespace(
        name="no GPU", multi_processor_count=2, max_threads_per_multi_processor=512
    )

    def seed(value: int, sim: Simulation) -> None:
        torch.manual_seed(value)
        sim.default.seed, sim.default.offset = value, 0

    with simulated(SMALL) as sim:
        for name, value in {
            "Event": Event,
            "synchronize": lambda: None,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: properties,
            "manual_seed": lambda value: seed(value, sim),
            "get_rng_state": lambda: torch.tensor([sim.default.seed, sim.default.offset]),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(gpu, "DEVICE", "cpu")
        monkeypatch.setattr(gpu, "LARGE", 1 << 10)
        built = SimpleNamespace(COMPILER="nvcc 0", ARCHITECTURES="", why_no_driver=lambda: "none")
        monkeypatch.setattr(kernels, "_cuda", built)
        cases = {name: make for name, make in gpu.CASES.items() if name.endswith("2^28")}
        cases["3 of 40"] = lambda: gpu.orthogonal(3, 40, "4 x", "")
        cases["a model"] = lambda: gpu.model(
            lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)),
            *(gpu.of_transformer, "30 x", "", ""),
        )
        for module in (gpu, load("harness")):
            once = lambda ways, clock, rounds: bench.measure(ways, clock, 1)  # noqa: E731
            monkeypatch.setattr(module, "measure", once)
        monkeypatch.setattr(gpu, "CASES", cases)
        yield gpu
        monkeypatch.undo()


@pytest.mark.slow
def test_gpu_table_and_file(
    gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "compare", lambda *_: None)  # torch's CPU draws other numbers
    monkeypatch.setenv("FASTINIT_COMMIT", "abc1234")
    assert gpu.main(["--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["gpu"], written["commit"]) == ("no GPU", "abc1234")
    assert written["failed"] == []
    cases = [row["case"] for row in written["rows"]]
    assert cases[:1] == ["uniform_ float32, 2^28"]
    assert cases[-5:] == [
        *("3 of 40: factored", "3 of 40: without factoring", "a model: plan.run()"),
        *("a model: init_model_", "a model: until plan.run() returns"),
    ]
    assert len(cases) == len(gpu.LAWS) + 5
    assert all(f"| {case} |" in shown for case in cases)
    assert all(row["fastinit_s"] > 0 for row in written["rows"])
    assert written["rows"][-1]["torch_s"] is None


def test_gpu_differences_are_found(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """torch.nn.init draws from the CPU's generator here, fastinit from the simulated GPU's."""
    assert gpu.main(["a model"]) == 1
    assert "a model: plan.run() differs from torch" in capsys.readouterr().out
