# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the tests of `fastinit inspect`."""

from __future__ import annotations

import importlib
import itertools
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastinit.cli import inspect as inspect_model

_names = itertools.count()


@pytest.fixture
def inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """inspected(source, ...): inspect what its `make` makes; the status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(source: str, factory: str = "make", **options: Any) -> tuple[int, str, str]:
        name = f"inspected_{next(_names)}"
        (tmp_path / f"{name}.py").write_text(
            "import torch\nfrom torch import nn\n" + textwrap.dedent(source)
        )
        importlib.invalidate_caches()
        status = inspect_model.main(f"{name}:{factory}", **options)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return status, *capsys.readouterr()

    return run
