# SPDX-License-Identifier: BSD-3-Clause
"""The command line: fastinit (or python -m fastinit) demo | info | verify | bench | inspect"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastinit.cli import info


def _parser() -> argparse.ArgumentParser:
    is_module = sys.argv[0].endswith("fastinit/__main__.py")
    called = "python -m fastinit" if is_module else "fastinit"
    parser = argparse.ArgumentParser(prog=called, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="compare every bit of models initialised with torch and here")
    commands.add_parser("info", help="print versions and what was built")
    checking = commands.add_parser("verify", help="print which kinds of fill run natively here")
    timing = commands.add_parser("bench", help="time torch and fastinit, ten cases")
    for command in (checking, timing):
        command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    timing.add_argument("cases", nargs="?", default="", help="only cases whose name contains this")
    looking = commands.add_parser("inspect", help="compare a model's tensors with their rules")
    looking.add_argument("target", help="module:factory, what builds the model without arguments")
    looking.add_argument("--seed", type=int, help="of the keyed stream (default: torch's numbers)")
    looking.add_argument("--plot", metavar="PNG", help="draw the distributions to this file")
    looking.add_argument("--meta", action="store_true", help="build it by way of the meta device")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; after Ctrl-C that is a shell's."""
    arguments = _parser().parse_args(words)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print(f"fastinit {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    """Run a command. Only what it needs is imported."""
    if arguments.command == "info":
        return info.info()
    if getattr(arguments, "device", "cpu") == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("\n".join(["There is no GPU that torch can use.", *info.about_cuda()]))
            return 1
    if arguments.command == "verify":
        return info.verify(arguments.device)
    if arguments.command == "inspect":
        from fastinit.cli import inspect

        return inspect.main(arguments.target, arguments.seed, arguments.plot, arguments.meta)
    if arguments.command == "bench":
        from fastinit.cli import bench

        return bench.main(arguments.cases, arguments.device)
    from fastinit.cli import demo

    return demo.demo()


if __name__ == "__main__":
    sys.exit(main())
