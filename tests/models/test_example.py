# SPDX-License-Identifier: BSD-3-Clause
"""examples/compare_initializers.py: its table, its figures as JSON, its reader of MNIST's files."""

from __future__ import annotations

import gzip
import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "compare_initializers.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_initializers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_table_and_json(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    results: list[Any] = []
    for turn in range(2):
        file = tmp_path / f"{turn}.json"
        text = run(
            *("--epochs", "1", "--initializers", "zeros,kaiming_normal", "--json", str(file))
        )
        assert text.count("Epoch") == 2
        assert "zeros\n" in text
        assert "kaiming_normal\n" in text
        results.append(json.loads(file.read_text()))
    assert results[0] == results[1], "the same seed gives other figures"
    flat = json.dumps(results[0])
    assert '"accuracy"' in flat
    assert '"loss"' in flat


def test_all_of_the_articles_initialisers_are_there(example: ModuleType) -> None:
    names = set(example.INITIALIZERS)
    for part in (
        "default",
        "zeros",
        "ones",
        "uniform",
        "normal",
        "xavier",
        "kaiming",
        "orthogonal",
    ):
        assert any(part in name for name in names), part
    assert len(names) >= 12


def write_mnist(folder: Path, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 7, dtype=np.uint8)
    opener = gzip.open if packed else open
    for part in ("train", "t10k"):
        for kind, code, values in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            header = struct.pack(f">i{values.ndim}i", code, *values.shape)
            with opener(folder / f"{part}-{kind}-ubyte{'.gz' * packed}", "wb") as file:
                file.write(header + values.tobytes())
    return images, labels


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_mnist_files(example: ModuleType, tmp_path: Path, packed: bool) -> None:
    images, labels = write_mnist(tmp_path, packed)
    data = example.load_mnist(tmp_path)
    assert data.images.shape == (7, 1, 28, 28)
    assert data.labels.tolist() == data.test_labels.tolist() == labels.tolist()
    flat = data.images.flatten().numpy()
    assert np.corrcoef(flat, images.flatten())[0, 1] > 0.999  # scaled and shifted, nothing else


def test_files_that_are_missing_or_broken(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither train-images-idx3-ubyte nor"):
        example.load_mnist(tmp_path)
    write_mnist(tmp_path, False)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is not an idx file"):
        example.load_mnist(tmp_path)
    file.write_bytes(b"no images at all")
    with pytest.raises(ValueError, match="is not an idx file"):
        example.load_mnist(tmp_path)
