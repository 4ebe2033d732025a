# SPDX-License-Identifier: BSD-3-Clause
"""Threads that share generators, any number of cores, forks, interrupts, and the GIL."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from tests.support.compare import DTYPES, F64, Position, bits
from tests.support.threads import in_threads

pytestmark = pytest.mark.usefixtures("native")


def digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(bits(tensor).numpy().tobytes()).digest()


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("size", [1 << 20, 1 << 12])
def test_threads_sharing_one_generator(size: int, explicit: bool) -> None:
    """No words are given out twice or lost: the chunks are those of a serial run, in some order."""
    rounds = 4 if size > 1 << 16 else 200
    given = torch.Generator() if explicit else None
    generator = given or torch.default_generator
    generator.manual_seed(3)
    chunks: list[torch.Tensor] = []

    def job() -> None:
        for _ in range(rounds):
            chunks.append(fastinit.uniform_(torch.empty(size), generator=given))

    in_threads(job, job, job)
    after = generator.get_state()
    generator.manual_seed(3)
    serial = [torch.empty(size).uniform_(generator=generator) for _ in range(3 * rounds)]
    assert sorted(map(digest, chunks)) == sorted(map(digest, serial))
    assert torch.equal(after, generator.get_state())


@pytest.mark.parametrize("size", [16, 300])
def test_threads_sharing_one_generator_by_two_ways(size: int) -> None:
    """Small fills are left to torch, large ones are not; still each word is given out once."""
    generator = torch.Generator().manual_seed(3)
    chunks: list[torch.Tensor] = []

    def job(numel: int, rounds: int) -> None:
        assert numel < 1000 or numel >= fastinit.core.geometry.MIN_NATIVE
        for _ in range(rounds):
            chunks.append(fastinit.uniform_(torch.empty(numel), generator=generator))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastinit.core.geometry, "MIN_NATIVE", 4096)
        in_threads(*[lambda: job(size, 1000)] * 2, lambda: job(6000, 200))
    after = generator.get_state()
    generator.manual_seed(3)
    serial = torch.empty(sum(map(len, chunks))).uniform_(generator=generator)
    pairs = serial.view(torch.int64).tolist()  # 48 random bits each: a pair tells its place
    starts = {pair: 2 * i for i, pair in enumerate(pairs)}
    places = sorted((starts[c[:2].view(torch.int64).item()], len(c)) for c in chunks)
    ends = [start + length for start, length in places]
    assert [start for start, _ in places] == [0, *ends[:-1]], "words given out twice"
    assert torch.equal(after, generator.get_state())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("uniform_", (-0.5, 0.25)),
        ("normal_", (0.0, 0.02)),
        ("trunc_normal_", (0.0, 1.0, -2.0, 2.0)),
        ("constant_", (0.1,)),
    ],
)
def test_thread_count_does_not_matter(name: str, args: tuple, dtype: torch.dtype) -> None:
    size = 3_000_001 if dtype != F64 else 700_001
    start = Position(words=3)
    options = {} if name == "constant_" else {"generator": torch.Generator()}
    generator = start.place(options.get("generator", torch.Generator()))
    expected = bits(getattr(torch_init, name)(torch.empty(size, dtype=dtype), *args, **options))
    state = generator.get_state()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        start.place(generator)
        tensor = torch.full((size,), -77.0, dtype=dtype)
        count = fastinit.core.kernels.native_fills
        getattr(fastinit, name)(tensor, *args, **options)
        assert fastinit.core.kernels.native_fills > count
        assert torch.equal(expected, bits(tensor)), threads
        assert torch.equal(state, generator.get_state()), threads


def test_fork_after_use() -> None:
    """A child has none of its parent's threads; it must still fill, and fill the same."""
    size = 5_000_001
    tensor = torch.empty(size)
    fastinit.normal_(tensor)  # any pool of threads exists from here on
    torch.manual_seed(6)
    expected = digest(torch_init.normal_(torch.empty(size)))
    torch.manual_seed(6)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)  # a child that hangs is killed, and the parent reads nothing
            os.write(writer, digest(fastinit.normal_(tensor)))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert found == expected
    assert digest(fastinit.normal_(tensor)) == expected  # and the parent goes on undisturbed


def test_other_python_threads_run_during_a_fill() -> None:
    ticks: list[float] = []
    stop = threading.Event()

    def ticker() -> None:
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    size, seconds, start = 1 << 23, 0.0, 0.0
    thread = threading.Thread(target=ticker)
    thread.start()
    try:
        count = fastinit.core.kernels.native_fills
        while seconds < 0.1 and size <= 1 << 27:
            tensor = torch.zeros(size, dtype=F64)
            start = time.perf_counter()
            fastinit.trunc_normal_(tensor, 0.0, 1.0, -0.5, 0.5)
            seconds = time.perf_counter() - start
            size *= 2
    finally:
        stop.set()
        thread.join()
    assert fastinit.core.kernels.native_fills > count
    assert seconds >= 0.1
    # Python itself switches threads every 5 ms, so leave the ends of the call out.
    inside = [t for t in ticks if start + 0.02 < t < start + seconds - 0.02]
    assert len(inside) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args", "millions"),
    [
        ("trunc_normal_", (0.0, 1.0, -0.4, 0.4), 60),
        pytest.param("normal_", (), 200, marks=pytest.mark.slow),
    ],
)
def test_interrupt(name: str, args: tuple, millions: int, python: Callable) -> None:
    """Ctrl-C ends a fill of several seconds within two, and the generator can still be used."""
    done = python(
        f"""
        import os, signal, threading, time
        import torch, fastinit
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        torch.set_num_threads(1)
        fastinit.{name}(torch.empty(100_000, dtype=torch.float64))  # load and probe everything
        tensor = torch.empty({millions} * 10**6, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        sent = []
        def interrupt():
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)
        timer = threading.Timer(0.15, interrupt)
        count = fastinit.core.kernels.native_fills
        timer.start()
        try:
            fastinit.{name}(tensor, *{args}, generator=generator)
        except KeyboardInterrupt:
            print("interrupted", time.perf_counter() - sent[0], "seconds later")
            assert time.perf_counter() - sent[0] < 2.0
        else:
            raise SystemExit(f"not interrupted: finished before the signal was handled ({{sent}})")
        state = generator.get_state()
        mine = fastinit.normal_(torch.empty(100_000), generator=generator)
        after = generator.get_state()
        generator.set_state(state)
        theirs = torch.empty(100_000).normal_(generator=generator)
        assert torch.equal(mine, theirs) and torch.equal(after, generator.get_state())
        assert fastinit.core.kernels.native_fills > count
        """
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interrupted" in done.stdout
