# SPDX-License-Identifier: BSD-3-Clause
"""Jobs in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_threads(*jobs: Callable[[], None]) -> None:
    """Run each job in a thread and raise if one raises, or is not done in a minute."""
    failures: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures, failures
