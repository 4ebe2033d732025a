# SPDX-License-Identifier: BSD-3-Clause
"""examples/same_everywhere.py: it ends well, and would not if a rank had other numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).parents[2] / "examples" / "same_everywhere.py"


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_hashes() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all hashes equal"
    rows = {name: found for name, *found in (line.split() for line in lines[2:-1])}
    assert len(rows) == 2 + 2 * 7
    for name, found in rows.items():
        assert len(found) == 7, name
        assert len(set(found[:3])) == len(set(found[3:])) == 1, name
    assert rows["blocks.0.up.weight"] != rows["blocks.1.up.weight"]
