# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures of the suite."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from tests.support.compare import use_own_factors


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("markers", "cuda: needs a GPU; left out where there is none")
    config.addinivalue_line("markers", "sanitize: what compute-sanitizer is to look at")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or "FASTINIT_TEST_DEVICE" in os.environ:
        return
    left_out = [item for item in items if item.get_closest_marker("cuda")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def own_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give torch's orthogonal_ our factorisation, for tests of everything else about it.

    Its factors are not torch's to the bit; how good they are is for tests/orthogonal.
    """
    use_own_factors(monkeypatch)


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """Each test finds and leaves torch's process-wide switches as they were."""
    threads, dtype, function = (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch_init.normal_,
    )
    torch.manual_seed(1)
    yield
    assert torch_init.normal_ is function, "torch.nn.init was left patched"
    assert torch.get_default_dtype() == dtype
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> None:
    """Threads wait for each other for long on a busy machine; one will do for small tensors."""
    torch.set_num_threads(1)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors too are filled by fastinit's own kernels."""
    monkeypatch.setattr(fastinit.core.geometry, "MIN_NATIVE", 0)


@pytest.fixture
def large_from_4096(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of 4096 elements are large, as the sizes of the test mean."""
    monkeypatch.setattr(fastinit.core.geometry, "MIN_NATIVE", 4096)


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """python(code or ["-m", ...], NAME=value, ...): run it in a fresh process, away from here."""

    def run(
        what: str | list[str], timeout: float = 100, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        arguments = what
        if isinstance(what, str):
            (tmp_path / "script.py").write_text(textwrap.dedent(what))
            arguments = ["script.py"]
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
