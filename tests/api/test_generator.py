# SPDX-License-Identifier: BSD-3-Clause
"""The generator: the state a fill leaves, what is drawn next, several generators at once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from fastinit.core import kernels
from tests.support.compare import BF16, F32, Position, bits

pytestmark = pytest.mark.usefixtures("native")

FILLS: list[tuple[str, tuple[int, ...], tuple[float, ...]]] = [
    ("uniform_", (1,), ()),
    ("uniform_", (2500,), (-1.0, 1.0)),
    ("normal_", (3,), ()),  # odd: leaves the second normal of a pair
    ("normal_", (4,), ()),
    ("normal_", (1000,), ()),
    ("normal_", (1013,), (1.0, 0.02)),
    ("trunc_normal_", (777,), (0.0, 1.0, -2.0, 2.0)),
    ("trunc_normal_", (5,), ()),
    ("constant_", (100,), (3.0,)),
    ("sparse_", (40, 7), (0.5,)),
    ("orthogonal_", (20, 30), ()),
    ("kaiming_uniform_", (64, 32), ()),
    ("xavier_normal_", (64, 33), ()),
    ("eye_", (9, 9), ()),
]


def fill(module: object, case: tuple, generator: torch.Generator | None = None) -> torch.Tensor:
    name, shape, args = case
    options = {} if generator is None or name in ("constant_", "eye_") else {"generator": generator}
    return getattr(module, name)(torch.empty(shape), *args, **options)


@pytest.mark.parametrize("case", FILLS, ids=str)
@pytest.mark.parametrize("position", [Position(), Position(words=622, cached=True)], ids=str)
def test_what_torch_draws_next(case: tuple, position: Position) -> None:
    drawn = []
    for module in (torch_init, fastinit):
        own, default = torch.Generator(), torch.default_generator
        for generator, given in ((own, own), (default, None)):
            position.place(default)
            position.place(own)
            fill(module, case, given)
            drawn.append(
                [
                    torch.empty(3).normal_(generator=generator),  # the cached one, if any, first
                    torch.rand(5, generator=generator),
                    torch.randperm(100, generator=generator).double(),
                    torch.randn(40, generator=generator),
                    torch.randint(1 << 40, (5,), generator=generator).double(),
                    torch.empty(7).exponential_(generator=generator),
                    torch.bernoulli(torch.full((20,), 0.5), generator=generator),
                ]
            )
    half = len(drawn) // 2
    for expected, found in zip(drawn[:half], drawn[half:], strict=True):
        assert all(torch.equal(bits(e), bits(f)) for e, f in zip(expected, found, strict=True))


@pytest.mark.usefixtures("own_factors")
def test_chain_of_fills_with_several_generators() -> None:
    """Each generator goes its own way, and one that never was seeded works too."""
    chains = []
    for module in (torch_init, fastinit):
        generators = [torch.Generator().manual_seed(s) for s in (0, 1)] + [torch.Generator(), None]
        torch.manual_seed(5)
        values = [fill(module, c, generators[i % 4]) for i, c in enumerate(FILLS * 3)]
        states = [(g or torch.default_generator).get_state() for g in generators]
        chains.append([bits(v) for v in values] + states)
    assert all(torch.equal(e, f) for e, f in zip(*chains, strict=True))


def test_states_taken_and_set_around_fills() -> None:
    for case in FILLS:
        generator = Position(words=100, cached=True).place(torch.Generator())
        state = generator.get_state()
        first = fill(fastinit, case, generator)
        twin = torch.Generator()
        twin.set_state(state)
        default = torch.get_rng_state()
        with torch.random.fork_rng():
            again = fill(fastinit, case, twin)
        assert torch.equal(torch.get_rng_state(), default)
        if case[0] != "sparse_":  # its zeros come from the default generator, which moved
            assert torch.equal(bits(first), bits(again))
            assert torch.equal(generator.get_state(), twin.get_state())


@pytest.mark.usefixtures("own_factors")
def test_threads_with_their_own_generators() -> None:
    expected = {s: [bits(fill(torch_init, c, torch.Generator().manual_seed(s))) for c in FILLS]
                for s in range(3)}  # fmt: skip
    found: dict[int, list[torch.Tensor]] = {s: [] for s in range(3)}

    def job(seed: int) -> None:
        for _ in range(5):
            found[seed] = [
                bits(fill(fastinit, c, torch.Generator().manual_seed(seed))) for c in FILLS
            ]

    threads = [threading.Thread(target=job, args=(s,)) for s in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        pairs = zip(FILLS, expected[seed], found[seed], strict=True)
        for case, e, f in pairs:
            if case[0] != "sparse_":  # the threads race for the default generator, as in torch
                assert torch.equal(e, f), case


def test_reduced_precision_and_float32_draw_the_same_words() -> None:
    """A model in bfloat16 starts from the same uniforms, only rounded."""
    single, half = (
        fastinit.uniform_(torch.empty(999, dtype=d), generator=torch.Generator().manual_seed(2))
        for d in (F32, BF16)
    )
    rounded = single.to(BF16)
    inside = rounded < 1.0
    assert torch.equal(half[inside], rounded[inside])


def test_what_another_thread_draws_meanwhile_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own operators take no turns with fastinit: the fill is done again behind them."""
    g, twin = (torch.Generator().manual_seed(5) for _ in range(2))
    fastinit.uniform_(torch.empty(10_000), generator=torch.Generator())  # proved
    run, drawn = kernels.run, []

    def drawing(*args: Any) -> None:
        if not drawn:
            drawn.append(torch.rand(7, generator=g))
        run(*args)

    monkeypatch.setattr(kernels, "run", drawing)
    found = fastinit.uniform_(torch.empty(10_000), generator=g)
    assert torch.equal(torch.rand(7, generator=twin), drawn[0])
    assert torch.equal(torch.empty(10_000).uniform_(generator=twin), found)
    assert torch.equal(g.get_state(), twin.get_state())
