# SPDX-License-Identifier: BSD-3-Clause
"""Something made as it is, and in `fastinit.fused()`: compared, timed, instructions counted."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import Case
from torch import Tensor, nn

import fastinit

Way = Callable[[], AbstractContextManager[Any]]
WAYS: dict[str, Way] = {"eager": nullcontext, "fused": fastinit.fused}
Make = Callable[[], object]  # returns modules, tensors, or lists and dictionaries of them


# ---- comparing ----


def parts(made: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of what was made, by name."""
    if isinstance(made, Tensor):
        yield name, made
    elif isinstance(made, nn.Module):
        for kind in ("parameters", "buffers"):
            found = getattr(made, f"named_{kind}")(remove_duplicate=False)
            yield from ((f"{name}{key}", t) for key, t in found)
    elif isinstance(made, (dict, list)):
        items = made.items() if isinstance(made, dict) else enumerate(made)
        for key, value in items:
            yield from parts(value, f"{name}{key}.")


def digest(made: object, values: bool) -> dict[str, Any]:
    """Return what two runs must share: checksums, so that one model is there at a time."""
    sums: dict[tuple[Any, ...], int] = {}
    names: dict[int, str] = {}
    seen: dict[str, Any] = {"generator": torch.get_rng_state().numpy().tobytes()}
    for name, t in parts(made):
        memory = ("meta", id(t)) if t.is_meta else (t.data_ptr(), t.nbytes)
        if memory not in sums:
            raw = t.detach().contiguous().reshape(-1).view(torch.uint8)
            sums[memory] = zlib.crc32(raw.numpy()) if values and not t.is_meta else 0
        first = names.setdefault(id(t), name)
        seen[name] = (sums[memory], first, t.shape, t.stride(), t.dtype, t.requires_grad)
        seen[f"{name} version"] = t._version
    return seen


def check(make: Make, rounding: float) -> None:
    """Raise unless both ways give the same; `rounding`: how far values may be from eager's."""
    seen: dict[str, dict[str, Any]] = {}
    kept: list[list[Tensor]] = []  # values of small models that are compared with a tolerance
    for way in WAYS:
        torch.manual_seed(1)
        made = build(make, way)
        seen[way] = digest(made, rounding == 0)
        if rounding != 0:
            kept.append([t.detach().clone() for _, t in parts(made)])
        del made
        gc.collect()
    wrong = [k for k, found in seen["fused"].items() if seen["eager"].get(k) != found]
    if wrong or seen["eager"].keys() != seen["fused"].keys():
        raise AssertionError(f"fused differs from eager in {wrong[:5] or 'its keys'}")
    for eager, fused in zip(*kept):
        torch.testing.assert_close(fused, eager, atol=rounding, rtol=0)


# ---- measuring ----


class Figures(NamedTuple):
    wall: float  # seconds
    cpu: float  # seconds of all threads


def timed(run: Callable[[], object], calls: int) -> Figures:
    """Return what a run takes, without the time to free what it makes."""
    gc.collect()
    torch.manual_seed(1)
    start = Figures(time.perf_counter(), time.process_time())
    made = [run() for _ in range(calls)]
    end = Figures(time.perf_counter(), time.process_time())
    made.clear()
    gc.collect()
    return Figures(*((b - a) / calls for a, b in zip(start, end)))


def measure(case: Case, rounds: int, limit: float) -> dict[str, Figures]:
    """Return the least of each way's figures; the order of the turns changes every round.

    No round begins after `limit` seconds.
    """
    found: dict[str, list[Figures]] = {way: [] for way in case.ways}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn > 0 and time.perf_counter() - start > limit:
            break
        for way in list(case.ways)[:: 1 if turn % 2 == 0 else -1]:
            case.ways[way]()
            found[way].append(timed(case.ways[way], case.calls))
    return {way: Figures(*map(min, zip(*rows))) for way, rows in found.items()}


# ---- cases ----


def build(make: Make, way: str) -> object:
    with WAYS[way]():
        return make()


def touch(like: list[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """Make as many tensors of the same sizes with nothing to compute: nobody can be faster."""
    tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in like]
    plan = fastinit.Plan()
    for t in tensors:
        plan.constant_(t, 0.7)
    plan.run()
    return tensors


def case(
    make: Make,
    goal: float,
    rounds: int = 7,
    calls: int = 1,
    rounding: float = 0.0,  # how far values may be from eager's
) -> Case:
    """Something made in the block, beside the same without."""
    tensors = {id(t): t for _, t in parts(make()) if not t.is_meta}
    like = [(t.shape, t.dtype) for t in tensors.values()]
    tensors.clear()
    n = sum(shape.numel() for shape, _ in like)
    size = f"{n / 1e6:.1f} M" if n >= 1e5 else f"{n / 1e3:.0f} k"
    ways: dict[str, Callable[[], object]] = {way: partial(build, make, way) for way in WAYS}
    if n >= 1e6 and n >= 1e5 * len(like):
        ways["memory"] = partial(touch, like)
    checked = partial(check, make, rounding)
    return Case(ways, (), goal, checked, rounds, calls, notes={"elements": size})


# ---- in processes of their own ----


def in_process(row: list[str], way: str, times: int = 1, before: tuple[str, ...] = ()) -> str:
    """Return what is printed by a program, given with its row, that runs one way so many times."""
    command = [*before, sys.executable, *row, "--alone", way, "--times", f"{times}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stderr if before else done.stdout


def highest_memory() -> int:
    """Return KiB; not ru_maxrss, which begins with that of the process that started this one."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def counter() -> tuple[tuple[str, ...], str]:
    """Return a command that counts instructions and the pattern of the line that says how many."""
    perf = ("perf", "stat", "-x,", "-e", "instructions:u")
    if shutil.which("perf"):
        tried = subprocess.run([*perf, "true"], capture_output=True, text=True)
        if re.search(r"^\d+,", tried.stderr, re.MULTILINE):
            return perf, r"^(\d+),"
    if shutil.which("valgrind"):
        quiet = ("--tool=callgrind", "--callgrind-out-file=/dev/null")
        return ("valgrind", *quiet), r"Collected : (\d+)"
    raise SystemExit("neither perf nor valgrind counts instructions here")


def instructions(row: list[str], way: str, few: int = 2, more: int = 4) -> float:
    """Return those of one more run, in millions: by what `more` runs retire beyond `few`."""
    command, pattern = counter()
    counts = []
    for times in (few, more):
        found = re.search(pattern, in_process(row, way, times, command), re.MULTILINE)
        assert found is not None
        counts.append(int(found.group(1)))
    return (counts[1] - counts[0]) / (more - few) / 1e6
