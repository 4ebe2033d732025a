# SPDX-License-Identifier: BSD-3-Clause
"""Jobs in threads of their own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


def in_threads(*jobs: Callable[[], None]) -> None:
    """Run each job in a thread and raise if one raises, or is not done in a minute.

    Python switches threads 500 times as often as usual, so that a lock that is missing shows.
    """
    failures: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures
