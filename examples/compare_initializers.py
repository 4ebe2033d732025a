# SPDX-License-Identifier: BSD-3-Clause
"""Train one small network from twelve initialisations and print how well each of them learns.

This is the comparison of the article "Weight Initialization", which takes the four-layer network of
pytorch/examples/mnist/main.py, fills it with zeros, ones, uniform, normal, Xavier, Kaiming and
orthogonal weights, trains for five epochs (SGD, learning rate 0.01, momentum 0.5), and prints the
average loss and the accuracy on the test images after each.

The article trains on MNIST, as `--mnist FOLDER` does if you have its files. Otherwise the images
are the 1797 handwritten digits that come with scikit-learn, enlarged from 8 x 8 to 28 x 28, in
smaller batches because there are fewer of them.

    python examples/compare_initializers.py --initializers default,zeros,orthogonal --plot plot.png
"""

from __future__ import annotations

import gzip
import json
import math
import struct
import sys
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastinit

Fill = Callable[[Tensor], Tensor]
Row = dict[str, float | None]  # "epoch", "loss" (None: not finite), "accuracy"

# How the article fills weights and biases, in its order. It sets the biases to zero from
# "ones_zeros" on, to compare the weights alone.
INITIALIZERS: dict[str, tuple[Fill, Fill]] = {
    "default": (lambda w: w, lambda b: b),  # as nn.Conv2d and nn.Linear are made
    "zeros": (lambda w: fastinit.constant_(w, 0), lambda b: fastinit.constant_(b, 0)),
    "ones": (lambda w: fastinit.constant_(w, 1), lambda b: fastinit.constant_(b, 1)),
    "normal": (fastinit.normal_, fastinit.normal_),
    "ones_zeros": (fastinit.ones_, fastinit.zeros_),
    "uniform_zeros": (fastinit.uniform_, fastinit.zeros_),
    "normal_zeros": (fastinit.normal_, fastinit.zeros_),
    "xavier_uniform": (fastinit.xavier_uniform_, fastinit.zeros_),
    "xavier_normal": (fastinit.xavier_normal_, fastinit.zeros_),
    "kaiming_uniform": (fastinit.kaiming_uniform_, fastinit.zeros_),
    "kaiming_normal": (fastinit.kaiming_normal_, fastinit.zeros_),
    "orthogonal": (fastinit.orthogonal_, fastinit.zeros_),
}


class Data(NamedTuple):
    batch_size: int
    images: Tensor  # N x 1 x 28 x 28, normalised
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 2)
        x = F.relu(self.fc1(x.view(-1, 4 * 4 * 50)))
        return F.log_softmax(self.fc2(x), dim=1)


def build(name: str, seed: int) -> Net:
    """A new network; all that its layers and then the initialiser fill is written in one pass."""
    torch.manual_seed(seed)
    weight, bias = INITIALIZERS[name]
    with fastinit.fused():
        net = Net()
        for layer in net.children():
            weight(layer.get_parameter("weight"))
            bias(layer.get_parameter("bias"))
    return net


def load_digits() -> Data:
    """scikit-learn's digits; one in five, the same ones in every run, is for testing."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(28, 28), mode="bilinear")
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    images = (images - images[train].mean()) / images[train].std()
    return Data(16, images[train], labels[train], images[test], labels[test])


def load_mnist(folder: Path) -> Data:
    tensors = []
    for part in ("train", "t10k"):
        images = torch.from_numpy(read_idx(find(folder, f"{part}-images-idx3-ubyte")))
        labels = torch.from_numpy(read_idx(find(folder, f"{part}-labels-idx1-ubyte")))
        match = labels.ndim == 1 and images.shape == (len(labels), 28, 28) and images.numel() > 0
        if not match or labels.max() > 9:
            raise ValueError(f"{folder}: {part} is not 28 x 28 images with a label 0 to 9 for each")
        images = (images.unsqueeze(1) / 255 - 0.1307) / 0.3081  # mean and deviation of MNIST
        tensors += [images, labels.long()]
    return Data(64, *tensors)


def find(folder: Path, name: str) -> Path:
    """The file, compressed or not, in the folder or where torchvision puts it below its root."""
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise ValueError(f"{folder}: neither {name} nor {name}.gz is there")


def read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes: 0, 0, 8 (bytes), rank, each size as four bytes (big-endian), data."""
    content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        zeros, kind, rank = struct.unpack_from(">HBB", content)
        if (zeros, kind) != (0, 8):
            raise ValueError("it starts otherwise")
        shape = struct.unpack_from(f">{rank}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
    except (EOFError, OSError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is not an idx file of bytes: {error}") from error


def train(net: Net, data: Data, epochs: int, seed: int) -> list[Row]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)
    shuffle = torch.Generator().manual_seed(seed)  # the same batches for every initialiser
    rows: list[Row] = []
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(data.labels), generator=shuffle).split(data.batch_size):
            optimizer.zero_grad()
            F.nll_loss(net(data.images[batch]), data.labels[batch]).backward()
            optimizer.step()
        loss, accuracy = test(net, data)
        print(f"{epoch:>5}   {loss:>12.4f}   {accuracy:>8.4f}", flush=True)
        finite = loss if math.isfinite(loss) else None  # JSON has no NaN
        rows.append({"epoch": epoch, "loss": finite, "accuracy": accuracy})
    return rows


@torch.no_grad()
def test(net: Net, data: Data) -> tuple[float, float]:
    """Average loss, and the part of the test images that is recognised."""
    loss, right, n = 0.0, 0, len(data.test_labels)
    for images, labels in zip(data.test_images.split(1000), data.test_labels.split(1000)):
        output = net(images)
        loss += F.nll_loss(output, labels, reduction="sum").item()
        right += int((output.argmax(1) == labels).sum())
    return loss / n, right / n


def save_plot(path: Path, table: dict[str, list[Row]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, rows) in enumerate(table.items()):
        epochs, style = [row["epoch"] for row in rows], f"C{i % 10}{'.-' if i < 10 else 'x--'}"
        left.plot(epochs, [row["loss"] for row in rows], style, label=name)
        right.plot(epochs, [row["accuracy"] for row in rows], style)
    left.set(xlabel="epoch", ylabel="average loss", yscale="log")
    right.set(xlabel="epoch", ylabel="accuracy")
    figure.legend(loc="outside right upper")
    figure.savefig(path, format="png")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    everything = ",".join(INITIALIZERS)
    add = parser.add_argument
    add("--initializers", default=everything, metavar="A,B,C", help=f"some of {everything}")
    add("--epochs", type=int, default=5, metavar="N", help="for each of them (default: 5)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and batches (default: 0)")
    add("--threads", type=int, default=1, metavar="N", help="that train (default: 1)")
    add("--mnist", type=Path, metavar="FOLDER", help="train on the MNIST files that are there")
    add("--plot", type=Path, metavar="FILE", help="draw the tables into a PNG file")
    add("--json", type=Path, metavar="FILE", help="write the tables as JSON, NaN as null")
    options = parser.parse_args(arguments)
    names = options.initializers.split(",")
    if unknown := [name for name in names if name not in INITIALIZERS]:
        parser.error(f"unknown initializer {unknown[0]!r}; there are {everything}")
    torch.set_num_threads(options.threads)
    try:
        data = load_mnist(options.mnist) if options.mnist else load_digits()
    except ImportError:
        parser.error("without --mnist FOLDER, scikit-learn is needed: pip install scikit-learn")
    except (OSError, ValueError) as error:
        parser.error(str(error))

    table = {}
    for name in names:
        print(f"{name}\nEpoch   Average Loss   Accuracy")
        table[name] = train(build(name, options.seed), data, options.epochs, options.seed)
        print()
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    if options.plot:
        try:
            save_plot(options.plot, table)
        except ImportError:
            print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)


if __name__ == "__main__":
    main()
