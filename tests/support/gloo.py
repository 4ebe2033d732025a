# SPDX-License-Identifier: BSD-3-Clause
"""A function on several ranks of a gloo group, each in a process of its own on this machine."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

ROOT = str(Path(__file__).parents[2])
SECONDS = 120


def run(
    function: Callable[..., Any], ranks: int, *args: object, seconds: int = SECONDS
) -> list[Any]:
    """What function(rank, *args) returns on each rank; raises with the traceback of one that fails.

    The function has to be found by name in a module that can be imported.
    """
    spawn = torch.multiprocessing.get_context("spawn")
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        started = []
        found = ROOT in sys.path  # pytest imports tests by path; children do by name
        sys.path += [] if found else [ROOT]
        try:
            for rank in range(ranks):
                child = spawn.Process(
                    target=_child, args=(folder, function, rank, ranks, seconds, args), daemon=True
                )
                child.start()
                started.append(child)
            running = list(started)
            while running:
                left = deadline - time.monotonic()
                if not wait([child.sentinel for child in running], timeout=max(left, 0)):
                    raise TimeoutError(f"{len(running)} of {ranks} ranks after {seconds} s")
                for child in running:
                    if child.exitcode:
                        raise RuntimeError(_why(folder, started.index(child), child.exitcode))
                running = [child for child in running if child.exitcode is None]
            return [pickle.loads(Path(folder, f"{rank}.out").read_bytes()) for rank in range(ranks)]
        finally:
            if not found:
                sys.path.remove(ROOT)
            for child in started:
                child.kill()
                child.join()


def _child(
    folder: str,
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    seconds: int,
    args: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # else it looks for the address of this machine's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{folder}/store", ranks),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=seconds),
        )
        result = function(rank, *args)
        dist.destroy_process_group()
        Path(folder, f"{rank}.out").write_bytes(pickle.dumps(result))
    except BaseException:
        Path(folder, f"{rank}.err").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for ranks that wait for this one


def _why(folder: str, rank: int, code: int) -> str:
    # Of several the first: the others may have failed because of it.
    texts = sorted(Path(folder).glob("*.err"), key=lambda path: path.stat().st_mtime_ns)
    if not texts:
        return f"rank {rank} ended with {code}"
    return f"rank {texts[0].stem} of a gloo group:\n{texts[0].read_text()}"
