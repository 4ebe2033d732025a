# SPDX-License-Identifier: BSD-3-Clause
"""Run random programs eagerly and inside `fastinit.fused()`, and compare all that is reachable.

`python -m tests.support.programs 20000 --seed 0` runs many, and prints each that differs in its
smallest form, as a script to run; `--write FOLDER` puts the scripts there. With `--keyed` they run
with a seed, and the names are printed whose numbers differ between the forms of one program.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import fastinit
from tests.support import program_seeds, program_tools
from tests.support.program_look import Look, Seen, copied
from tests.support.program_text import Statement, program_of, text_of
from tests.support.scopes import full_of

_BYTE = 0x33  # memory that nobody wrote is full of its complement, in all runs
_LENGTH = (44, 80)  # statements


class _Notes:
    """What a program notes, by the line that does, so that one difference is not many."""

    def __init__(self) -> None:
        self.seen: Seen = {}

    def add(self, line: int, x: Any) -> None:
        times = sum(key.startswith(f"line {line},") for key in self.seen)
        self.seen[f"line {line}, {times}"] = x

    def note(self, x: Any) -> None:
        self.add(sys._getframe(1).f_lineno, copied(x))


class _Caught:
    """Notes an exception and goes on."""

    def __init__(self, notes: _Notes) -> None:
        self._notes = notes

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        message = str(error).partition("\nException raised from ")[0]  # a trace of torch's C++
        message = re.sub(r"0x[0-9a-f]+", "0x", message)
        self._notes.add(sys._getframe(1).f_lineno, f"{kind.__name__}: {message}")
        return True


# ---- three ways to run a program -----------------------------------------------------------------


class Eagerly(ContextDecorator):
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _Idle(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class UnderIdleMode(ContextDecorator):
    """What any dispatch mode of torch changes by itself; entered once, as fused() is."""

    def __init__(self) -> None:
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        outer = _get_current_dispatch_mode() is not None
        self._entered.append(nullcontext() if outer else _Idle())
        self._entered[-1].__enter__()

    def __exit__(self, *_: object) -> None:
        self._entered.pop().__exit__(None, None, None)


@dataclass
class Totals:
    """What the scopes of all programs did, so that nobody compares eager with eager."""

    counts: Counter[str] = field(default_factory=Counter)
    reports: list[fastinit.Report] = field(default_factory=list)

    def scope(self) -> Callable[[], Any]:
        totals = self

        class Scope(fastinit.fused):
            def _recreate_cm(self) -> Scope:
                return Scope()

            def __enter__(self) -> fastinit.Report:
                totals.reports.append(super().__enter__())
                return totals.reports[-1]

        return Scope

    def add_reports(self) -> None:
        self.counts["programs"] += 1
        self.counts["with fills that waited"] += any(r.recorded_elements for r in self.reports)
        self.counts["with fills never written"] += any(r.dropped_elements for r in self.reports)
        self.counts["with early reads"] += any(r.early for r in self.reports)
        self.reports.clear()


def run(text: str, block: Callable[[], Any]) -> Seen:
    """Return all that a program noted, and that can be reached when it is over."""
    notes, look = _Notes(), Look()
    names = {name: getattr(program_tools, name) for name in program_tools.__all__}
    pool = ThreadPoolExecutor(8)  # more than bodies can be nested
    warn_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    orthogonal = fastinit.set_orthogonal("torch")  # otherwise its matrices are not torch's bits
    exec(compile(text, "<program>", "exec"), names)
    try:
        with full_of(_BYTE), warnings.catch_warnings(record=True) as warned, pool:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(1)
            left = names["program"](block, notes.note, _Caught(notes), pool, generator)
            keep = ("block", "note", "caught", "pool", "body")
            for name in sorted(left.keys() - set(keep) - {"g"}):
                look.at(name, left[name])
            look.seen["generator"] = left["g"].get_state().numpy().tobytes()
            look.seen["default generator"] = torch.get_rng_state().numpy().tobytes()
    finally:
        torch.set_warn_always(warn_always)
        fastinit.set_orthogonal(orthogonal)
        program_tools.Later.end_all()
    look.seen["modes"] = (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack(),
        nn.init.normal_.__module__,
    )  # fmt: skip
    look.seen.update(notes.seen)
    look.seen["warnings"] = [(w.category.__name__, str(w.message)) for w in warned]
    return look.seen


def differing(a: Seen, b: Seen) -> list[str]:
    return [key for key in {**a, **b} if key not in a or key not in b or a[key] != b[key]]


def differences(text: str, totals: Totals, block: Callable[[], Any] | None = None) -> list[str]:
    """Return where a program sees fused(), beyond what any dispatch mode of torch changes."""
    eager = run(text, Eagerly)
    fused = run(text, block or totals.scope())
    found = differing(eager, fused)
    totals.add_reports()
    if not found:
        return []
    again = run(text, Eagerly), run(text, block or totals.scope())
    if differing(eager, again[0]) or differing(fused, again[1]):
        totals.counts["that differ from run to run"] += 1
        totals.reports.clear()
        return []
    idle = run(text, UnderIdleMode)
    left = [key for key in found if not _is_of_any_mode(key, eager, fused, idle)]
    totals.counts["as under any dispatch mode"] += not left
    return left


def _is_of_any_mode(key: str, eager: Seen, fused: Seen, idle: Seen) -> bool:
    """Whether it is as under a mode that does nothing, which may have begun later."""
    if key.endswith(" version") and key in eager and key in fused and key in idle:
        low, high = sorted((eager[key], idle[key]))
        return bool(low <= fused[key] <= high)
    return bool(fused.get(key) == idle.get(key))


# ---- the smallest program that differs -----------------------------------------------------------


def _without(program: Sequence[Statement], start: int, count: int) -> list[Statement]:
    """Return a program without some statements, counted as they are read."""
    at = 0

    def kept(statements: Sequence[Statement]) -> list[Statement]:
        nonlocal at
        made = []
        for statement in statements:
            mine = at
            at += 1
            body = None if statement.body is None else kept(statement.body)
            if not start <= mine < start + count:
                made.append(replace(statement, body=body))
            elif body:
                made.extend(body)  # what opened a body goes alone
        return made

    return kept(program)


def _count(program: Sequence[Statement]) -> int:
    return sum(1 + _count(statement.body or ()) for statement in program)


def smallest(program: list[Statement], fails: Callable[[list[Statement]], bool]) -> list[Statement]:
    """Return a part of a program that still fails, from which no statement can be left out."""
    step = _count(program) // 2
    while step:
        start, found = 0, False
        while start < _count(program):
            fewer = _without(program, start, step)
            if _count(fewer) < _count(program) and fails(fewer):
                program, found = fewer, True
            else:
                start += step
        step = step if found and step == 1 else step // 2
    return program


def script(program: Sequence[Statement], where: Sequence[str]) -> str:
    return (
        f'"""Differs in: {", ".join(where)[:300]}. Exit 1 while wrong."""\n'
        "from tests.support.program_tools import *\n"
        "from tests.support.programs import main_of\n\n"
        f'PROGRAM = """\n{text_of(program)}"""\n\nmain_of(PROGRAM)\n'
    )


def _from_first(x: Any, other: Any) -> str:
    """Return what is different in one of two values, from a little before on."""
    a, b = repr(x), repr(other)
    first = next((i for i, (p, q) in enumerate(zip(a, b)) if p != q), min(len(a), len(b)))
    return ("..." if first > 90 else "") + a[max(0, first - 90) : first + 110]


def main_of(text: str) -> None:
    """Print what differs, and exit with 1 if something does."""
    torch.set_num_threads(1)
    left = differences(text, Totals())
    eager, fused, idle = run(text, Eagerly), run(text, fastinit.fused), run(text, UnderIdleMode)
    for key in differing(eager, fused):
        print(f"{key}{'' if key in left else ' (as under any mode)'}:")
        print("  eager     ", _from_first(eager.get(key), fused.get(key)))
        print("  fused     ", _from_first(fused.get(key), eager.get(key)))
        print("  idle mode ", _from_first(idle.get(key), fused.get(key)))
    sys.exit(bool(left))


def check(
    program: list[Statement], totals: Totals, block: Callable[[], Any] | None = None
) -> str | None:
    """Return None, or the script of the smallest form of a program that differs."""
    if not differences(text_of(program), totals, block):
        return None
    ignored = Totals()
    program = smallest(program, lambda p: bool(differences(text_of(p), ignored, block)))
    return script(program, differences(text_of(program), ignored, block))


# ---- many programs -------------------------------------------------------------------------------


def seeds_of(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.getrandbits(32) for _ in range(draw.randint(*_LENGTH))]


def _run_range(first: int, count: int, folder: Path | None, verbose: bool) -> int:
    totals = Totals()
    failures = 0
    for seed in range(first, first + count):
        if verbose:
            print(seed, flush=True)
        faulthandler.dump_traceback_later(300, exit=True)  # does not come to an end
        unstable = totals.counts["that differ from run to run"]
        found = check(program_of(seeds_of(seed)), totals)
        if totals.counts["that differ from run to run"] != unstable:
            print(f"---- seed {seed} differs from run to run", flush=True)
        if found is not None:
            failures += 1
            print(f"---- seed {seed} differs:\n{found}", flush=True)
            if folder is not None:
                (folder / f"program_{seed}.py").write_text(found)
        if (seed + 1 - first) % 500 == 0:
            print(f"to seed {seed}: {failures} differ; {dict(totals.counts)}", flush=True)
    print(f"{count} programs from seed {first}: {failures} differ; {dict(totals.counts)}")
    return failures


def _run_keyed(first: int, count: int) -> int:
    counts: Counter[str] = Counter()
    failures = 0
    for seed in range(first, first + count):
        found = program_seeds.differences(seeds_of(seed), counts)
        failures += bool(found)
        if found:
            print(f"---- seed {seed}: {', '.join(found)}", flush=True)
    print(f"{count} programs from seed {first}: {failures} differ; {dict(counts)}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    parser.add_argument("--write", type=Path, help="folder for the scripts of what differs")
    parser.add_argument("--keyed", action="store_true", help="with a seed, in several forms each")
    parser.add_argument("--verbose", action="store_true", help="print each seed before its program")
    a = parser.parse_args()
    if a.jobs > 1:
        each = -(-a.count // a.jobs)
        command = [sys.executable, "-m", "tests.support.programs", str(each)]
        options = [f"--threads={a.threads}", *([f"--write={a.write}"] if a.write else [])]
        options += ["--keyed"] * a.keyed
        starts = [a.seed + i * each for i in range(a.jobs)]
        jobs = [subprocess.Popen([*command, f"--seed={seed}", *options]) for seed in starts]
        return max(abs(job.wait()) for job in jobs)
    if "GLIBC_TUNABLES" not in os.environ:  # small memory, too, is full of the same byte
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
        command = [sys.executable, "-m", "tests.support.programs", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)
    faulthandler.enable()
    torch.set_num_threads(a.threads)
    if a.keyed:
        return bool(_run_keyed(a.seed, a.count))
    return bool(_run_range(a.seed, a.count, a.write, a.verbose))


if __name__ == "__main__":
    sys.exit(main())
