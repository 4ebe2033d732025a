# SPDX-License-Identifier: BSD-3-Clause
"""What `fastinit inspect` expects of a tensor, what it measures, and how far that is off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from fastinit import fused
from fastinit.capture.report import Written
from fastinit.cli import expected
from fastinit.cli import inspect as inspect_model
from fastinit.cli.expected import Expected, Part, measure, parts_of
from tests.support.compare import BF16, F16, F32, F64

INF = math.inf


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"),
    [
        *[(0.0, 1.0, -2.0, 2.0), (0.5, 1.0, -1.0, 1.2), (0.0, 0.02, -2.0, 2.0)],
        *[(0.0, 1.0, 1.5, 4.0), (0.0, 1.0, 8.0, 9.0), (0.0, 1.0, -9.0, -8.0)],
        *[(3.0, 2.0, -INF, 1.0), (1.0, 0.5, -INF, INF)],
    ],
)
def test_truncated_normal(mean: float, std: float, low: float, high: float) -> None:
    """Against scipy, whose differences lose digits of higher moments far out."""
    law = scipy.stats.truncnorm((low - mean) / std, (high - mean) / std, mean, std)
    want, *ratios = map(float, law.stats("mvsk"))
    m1, m2, m3, m4 = Part("normal", 1, mean, std, low, high).moments()
    assert m1 == pytest.approx(want, rel=1e-8, abs=1e-8 * std)
    got = (m2, m3 / m2**1.5, m4 / m2**2 - 3)
    assert got == pytest.approx(tuple(ratios), rel=1e-6, abs=1e-6)
    x = torch.linspace(max(low, m1 - 12 * std), min(high, m1 + 12 * std), 1001, dtype=F64)
    density = Part("normal", 1, mean, std, low, high).density(x)
    assert density.numpy() == pytest.approx(law.pdf(x.numpy()), rel=1e-8, abs=1e-300)


def test_truncated_normal_in_narrow_bounds() -> None:
    """Nearly uniform; the closed form has no digits left there."""
    m1, m2, m3, m4 = Part("normal", 1, 0.0, 1.0, 0.5, 0.5001).moments()
    assert m1 == pytest.approx(0.50005, abs=1e-9)
    assert m2 == pytest.approx(1e-8 / 12, rel=1e-6)
    assert m3 / m2**1.5 == pytest.approx(0, abs=1e-3)
    assert m4 / m2**2 == pytest.approx(9 / 5, rel=1e-6)


def test_uniform_and_constant() -> None:
    assert Part("uniform", 9, -1.0, 3.0).moments() == pytest.approx((1, 16 / 12, 0, 256 / 80))
    assert Part("constant", 9, 0.25).moments() == (0.25, 0, 0, 0)
    assert Part("normal", 9, 0.25, 0.0).moments() == (0.25, 0, 0, 0)
    assert float(Part("uniform", 9, -1.0, 3.0).density(torch.tensor(0.0))) == 0.25
    assert Part("uniform", 1, 2.0, 2.0).is_point()


FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[int, ...]]] = {
    "sparse_": (lambda t: nn.init.sparse_(t, 0.83, 0.5), (150, 110)),
    "orthogonal_ tall": (lambda t: nn.init.orthogonal_(t, 1.5), (170, 90)),
    "orthogonal_ wide": (lambda t: nn.init.orthogonal_(t), (90, 5, 34)),
    "eye_": (lambda t: nn.init.eye_(t), (100, 130)),
    "dirac_": (lambda t: nn.init.dirac_(t, 2), (60, 40, 3, 3)),
    "trunc_normal_": (lambda t: nn.init.trunc_normal_(t, 0.1, 1.0, -0.5, 2.0), (100, 100)),
    "xavier_uniform_": (lambda t: nn.init.xavier_uniform_(t, 2.0), (100, 130)),
    "kaiming_normal_": (lambda t: nn.init.kaiming_normal_(t, mode="fan_out"), (64, 32, 3, 3)),
    "normal_": (lambda t: nn.init.normal_(t, 1.0, 1.0), (100, 100)),
    "constant_": (lambda t: nn.init.constant_(t, 0.1), (100, 100)),
}


@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_torch(
    name: str, seed: int | None, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is expected of each is what numpy finds in what it wrote."""
    monkeypatch.setattr("fastinit.core.geometry.MIN_NATIVE", 1 << 20 if small else 8192)
    fill, shape = FUNCTIONS[name]
    torch.manual_seed(5)
    with fused(seed=seed, watch=True) as report:
        model = nn.Module()
        model.w = nn.Parameter(torch.empty(shape))
        fill(model.w)
    (row,) = report.rows()
    parts = parts_of(row.laws, row.shape, row.dtype)
    assert parts is not None
    assert sum(p.items for p in parts) == model.w.numel()
    want = Expected.of(parts)
    values = model.w.detach().double().numpy()
    n, exact = values.size, name in ("eye_", "dirac_", "constant_")
    tolerance = 1e-8 if exact else 5 * values.std() / math.sqrt(n)
    assert values.mean() == pytest.approx(want.mean, abs=tolerance)
    spread = math.sqrt(((values - want.mean) ** 2).mean())
    assert spread == pytest.approx(want.std, rel=1e-6 if "orth" in name else 0.05, abs=1e-7)
    found = measure(model.w)
    assert found is not None
    assert want.z(found, F32) < 5


def written(op: str, a: float, b: float, first: int, last: int, **more: Any) -> Written:
    """A dense fill of float32 elements."""
    return Written(op, a, b, last - first, F32, (4 * first, 4 * last), None, **more)


def test_partial_fills() -> None:
    """Of elements that do not overlap, over a fill of all; else nothing is said."""
    whole = written("normal", 0.0, 2.0, 0, 100)
    row = written("constant", 5.0, 0.0, 10, 20)
    other = written("uniform", 0.0, 1.0, 20, 30)
    parts = parts_of([whole, row, other], (10, 10), F32)
    assert parts == (
        Part("normal", 80, 0.0, 2.0),
        Part("constant", 10, 5.0),
        Part("uniform", 10, 0.0, 1.0),
    )
    rng = np.random.default_rng(1)
    draws = np.concatenate(
        [rng.normal(0, 2, 800_000), np.full(100_000, 5.0), rng.uniform(0, 1, 100_000)]
    )
    want = Expected.of(parts)
    assert want.mean == pytest.approx(draws.mean(), abs=0.01)
    assert want.std == pytest.approx(draws.std(), abs=0.01)
    assert parts_of([whole, row, written("constant", 1.0, 0.0, 15, 25)], (100,), F32) is None
    assert parts_of([row], (100,), F32) is None
    assert parts_of([row, other], (100,), F32) is None
    assert parts_of([], (100,), F32) is None
    assert parts_of([row, whole], (100,), F32) == (Part("normal", 100, 0.0, 2.0),)
    assert parts_of([whole], (100,), F64) is None
    assert parts_of([whole._replace(op="exponential")], (100,), F32) is None
    assert parts_of([whole._replace(a=math.nan)], (100,), F32) is None


def test_views_of_one_storage() -> None:
    fills = [written("uniform", 0.0, 1.0, 0, 100), written("normal", 0.0, 3.0, 100, 300)]
    assert parts_of(fills, (100,), F32, 0) == (Part("uniform", 100, 0.0, 1.0),)
    assert parts_of(fills, (10, 20), F32, 400) == (Part("normal", 200, 0.0, 3.0),)
    assert parts_of(fills, (50,), F32, 800) == (Part("normal", 50, 0.0, 3.0),)
    assert parts_of(fills, (100,), F32, 200) is None  # half of each


def test_errors_of_mean_and_variance() -> None:
    """Of as many elements: known for one law, simulated for several."""
    for part, freedom in ((Part("normal", 50, 3.0, 2.0), 50), (Part("uniform", 50, 0.0, 2.0), 125)):
        want = Expected.of([part])
        assert want.error == pytest.approx(want.std / math.sqrt(50))
        assert want.freedom == pytest.approx(freedom)
    parts = [
        *(Part("normal", 60, 1.0, 2.0, 0.0, 9.0), Part("uniform", 30, -4.0, 0.0)),
        Part("constant", 10, 5.0),
    ]
    want = Expected.of(parts)
    rng = np.random.default_rng(3)
    normal = rng.normal(1.0, 2.0, 4_000_000)
    normal = normal[(normal > 0) & (normal < 9)][: 60 * 30_000].reshape(-1, 60)
    uniform = rng.uniform(-4.0, 0.0, (30_000, 30))
    values = np.hstack([normal, uniform, np.full((30_000, 10), 5.0)])
    assert values.mean(axis=1).std() == pytest.approx(want.error, rel=0.02)
    squares = ((values - want.mean) ** 2).mean(axis=1)
    assert squares.mean() == pytest.approx(want.std**2, rel=0.005)
    assert squares.var() == pytest.approx(2 * want.std**4 / want.freedom, rel=0.04)


LAWS = {
    "uniform": (Part("uniform", 0, -1.0, 1.0), lambda g, s: g.uniform(-1, 1, s)),
    "normal": (Part("normal", 0, 0.5, 2.0), lambda g, s: g.normal(0.5, 2, s)),
}


@pytest.mark.parametrize("items", [2, 5, 16, 1000])
@pytest.mark.parametrize("law", LAWS)
def test_a_right_tensor_is_not_off(law: str, items: int) -> None:
    """Of 4,000 none; and what is measured in standard errors has the size of one."""
    part, draw = LAWS[law]
    want = Expected.of([part._replace(items=items)])
    rng = np.random.default_rng(items)
    zs = []
    for values in draw(rng, (4000, items)):
        found = measure(torch.from_numpy(values))
        assert found is not None
        zs.append(want.z(found, F64))
    assert max(zs) < inspect_model.MOST
    beyond = np.mean(np.array(zs) > 2)  # of two nearly normal numbers, one: 9 %
    assert beyond < 0.15
    assert beyond > 0.02 or items < 16


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize(
    ("law", "a", "b"),
    [("uniform", -0.02, 0.02), ("normal", 0.0, 0.02), ("normal", 1.0, 0.02), ("uniform", 0.0, 1.0)],
)
def test_rounding_is_not_off_but_ten_percent_are(
    dtype: torch.dtype, law: str, a: float, b: float
) -> None:
    t = getattr(torch.empty(1 << 20, dtype=dtype), f"{law}_")(a, b)
    want = Expected.of([Part(law, t.numel(), a, b)])
    for factor, off in ((1.0, False), (1.1, True)):
        found = measure((t.double() * factor).to(dtype))
        assert found is not None
        assert (want.z(found, dtype) > inspect_model.MOST) is off, factor


def test_constants_are_exact() -> None:
    want = Expected.of([Part("constant", 1000, 0.1)])
    for dtype in (BF16, F16, F32, F64):
        t = torch.full((1000,), 0.1, dtype=dtype)
        assert want.z(measure(t), dtype) == 0.0  # type: ignore[arg-type]
        t[3] = 0.2
        assert want.z(measure(t), dtype) == INF  # type: ignore[arg-type]


# ---- what is there -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1000, 700),
        lambda: torch.randn(700, 1000).t(),
        lambda: torch.randn(8, 64, 30, 30).to(memory_format=torch.channels_last),
        lambda: torch.randn(3, 1, 400_000)[:, :, ::2],
        lambda: torch.randn(1, 1, 700_000) + 1e6,
        lambda: torch.randn(300_001, dtype=BF16),
        lambda: torch.randn(1, 5).expand(200_000, 5),
        lambda: torch.arange(700_000),
        lambda: torch.randint(0, 2, (600_000,)).bool(),
        lambda: torch.tensor(3.5),
    ],
)
def test_measure(make: Callable[[], torch.Tensor]) -> None:
    """In chunks the same as numpy at once, whatever the layout."""
    t = make()
    found = measure(t)
    assert found is not None
    values = t.double().numpy()
    assert found == pytest.approx(
        (values.mean(), values.std(), values.min(), values.max()), rel=1e-9, abs=1e-9
    )
    assert all(len(x) <= expected.CHUNK for x in expected.chunks(t))


def test_measure_what_is_not_numbers() -> None:
    assert measure(torch.empty(0, 3)) is None
    assert measure(torch.empty(3, device="meta")) is None
    assert measure(torch.randn(3, dtype=torch.complex64)) is None
    for bad in (math.nan, math.inf):
        t = torch.zeros(600_000)
        t[400_000] = bad
        found = measure(t)
        assert found is not None
        assert Expected.of([Part("constant", 600_000, 0.0)]).z(found, F32) == INF


@pytest.mark.slow
def test_memory(python: Callable) -> None:
    """128 MiB are measured in little more, also where they are not contiguous."""
    done = python("""
        import resource, torch
        from fastinit.cli.expected import measure
        t = torch.zeros(64, 1 << 20, dtype=torch.bfloat16).fill_(1)
        measure(t[:, :1000])
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = peak()
        assert measure(t).mean == 1 == measure(t.t()).mean
        print(peak() - before)
    """)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40
