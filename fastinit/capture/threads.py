# SPDX-License-Identifier: BSD-3-Clause
"""Threads and tasks that were started in a scope, and may read what waits there."""

from __future__ import annotations

import weakref
from concurrent.futures import Future
from threading import Thread
from typing import Any


class Others:
    """Threads and tasks of the scope that still run."""

    def __init__(self) -> None:
        self._refs: list[weakref.ref[Thread | Future[Any]]] = []

    def add(self, other: Thread | Future[Any]) -> None:
        self._refs.append(weakref.ref(other))

    def names(self) -> list[str]:
        """Return the names of those that still run."""
        if not self._refs:
            return []
        known = [x for x in (ref() for ref in self._refs) if x is not None]
        running = [x for x in known if (x.is_alive() if isinstance(x, Thread) else not x.done())]
        self._refs = [weakref.ref(x) for x in running]
        return [x.name if isinstance(x, Thread) else "a task of a pool" for x in running]
