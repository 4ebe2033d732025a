# SPDX-License-Identifier: BSD-3-Clause
"""Every instruction set of ours against every one of torch's, each pair in a process of its own."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pytest

import fastinit

SUPPORTED = dict(fastinit._cpu.targets())

# Prints the target, torch's capability and how many fills were native, after comparing all bits.
COMPARE = """
    import torch, fastinit
    import torch.nn.init as torch_init
    fastinit.core.geometry.MIN_NATIVE = 0
    F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    CALLS = [("uniform_", (-0.3, 0.7)), ("uniform_", (0.0, 1.0)), ("normal_", (0.1, 0.5)),
             ("trunc_normal_", (0.0, 1.0, -2.0, 2.0)), ("trunc_normal_", (0.0, 0.02)),
             ("constant_", (0.1,)), ("zeros_", ()), ("sparse_", (0.5,)), ("eye_", ()),
             ("kaiming_uniform_", ()), ("xavier_normal_", ())]
    SHAPES = [(1, 3), (5, 4), (47, 31), (130, 70)] if ALL else [(47, 31)]
    # 16 bits hide most last-bit differences of the float32 behind them: it takes many elements.
    MANY = [(317, 631)] if ALL else []
    LAYOUTS = [lambda t: t, lambda t: t.t(), lambda t: t[:, ::2]]
    native = {}
    for dtype in (F32, F64, BF16, F16):
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        for name, args in CALLS:
            large = MANY if name in ("uniform_", "normal_", "trunc_normal_") else []
            before = fastinit.core.kernels.native_fills
            for shape in SHAPES + large:
                for layout in LAYOUTS[: 1 if shape in large else 3]:
                    for words in (0, 617):
                        seen = []
                        for module in (torch_init, fastinit):
                            torch.manual_seed(5)
                            torch.rand(words)
                            base = torch.full(shape, 13.0, dtype=dtype)
                            getattr(module, name)(layout(base), *args)
                            seen.append((base.view(integer), torch.get_rng_state()))
                        what = (name, args, dtype, shape, words)
                        assert torch.equal(seen[0][0], seen[1][0]), what
                        assert torch.equal(seen[0][1], seen[1][1]), what
            native[name] = native.get(name, 0) + fastinit.core.kernels.native_fills - before
    print(fastinit._cpu.target(), torch.backends.cpu.get_cpu_capability(), sep="\\n")
    print(*[name for name, count in native.items() if count == 0])
"""


def test_there_is_a_choice() -> None:
    assert "scalar" in SUPPORTED
    assert SUPPORTED["scalar"]
    assert SUPPORTED[fastinit._cpu.target()]


WORKING = [name for name, works in SUPPORTED.items() if works]
BY_DEFAULT = [name for name in WORKING if name != fastinit._cpu.target()]  # all others test that


@pytest.mark.parametrize("target", BY_DEFAULT)
def test_some(target: str, python: Callable) -> None:
    done = python("ALL = False\n" + textwrap.dedent(COMPARE), FASTINIT_TARGET=target)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[0] == target


@pytest.mark.slow
@pytest.mark.parametrize("capability", [None, "default", "avx2"])
@pytest.mark.parametrize("target", WORKING)
def test_same_bits(target: str, capability: str | None, python: Callable) -> None:
    environment = {"FASTINIT_TARGET": target}
    if capability:
        environment["ATEN_CPU_CAPABILITY"] = capability
    done = python("ALL = True\n" + textwrap.dedent(COMPARE), **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    active, torchs, left_to_torch = done.stdout.split("\n")[:3]
    assert active == target
    if capability:
        assert torchs == capability.upper()
    if torchs in ("AVX2", "AVX512"):  # elsewhere float32 normals may be what torch's libm gives
        assert left_to_torch == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sse9", "avx2,scalar"])
def test_unknown_target(name: str, python: Callable) -> None:
    """Said by name at first use, whatever that is, and again at the next; import still works."""
    done = python(
        """
        import torch, fastinit
        fastinit.core.geometry.MIN_NATIVE = 0
        for use in (fastinit._cpu.target, lambda: fastinit.uniform_(torch.zeros(100))):
            try:
                use()
            except ValueError as error:
                print(error)
        """,
        FASTINIT_TARGET=name,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    messages = done.stdout.splitlines()
    assert len(messages) == 2
    assert all(name in message for message in messages)


@pytest.mark.slow
def test_unsupported_targets(python: Callable) -> None:
    """Where the processor lacks an instruction set, asking for it is an error, not a crash."""
    for name in (name for name, works in SUPPORTED.items() if not works):
        done = python("import fastinit; fastinit._cpu.target()", FASTINIT_TARGET=name)
        assert done.returncode == 1
        assert "ValueError" in done.stderr
        assert name in done.stderr
    names = [name for name, _ in fastinit._cpu.targets()]
    assert len(set(names)) == len(names)  # best first; the last one works everywhere
    assert names[-1] == "scalar"
