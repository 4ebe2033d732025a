# SPDX-License-Identifier: BSD-3-Clause
"""The model of torch's CUDA generator, against things that are not the model; needs no GPU."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.support import cuda_model
from tests.support.cuda_model import (
    A100,
    DTYPES,
    H200,
    RTX4090,
    SMALL,
    T4,
    Gpu,
    State,
    erfinv,
    fma32,
    fma64,
    increment,
    normal,
    philox,
    round_to,
    threads_of,
    trunc_normal,
    trunc_normal_erfinv,
    uniform,
    words,
)

# Significant bits, and the exponent of the smallest number above zero.
PRECISION = {
    "float32": (24, -149),
    "float64": (53, -1074),
    "bfloat16": (8, -133),
    "float16": (11, -24),
}


def nearest(x: Fraction, dtype: str) -> Fraction:
    """x rounded to the dtype, ties to even, by way of float where torch goes that way."""
    if dtype in ("bfloat16", "float16"):
        x = nearest(x, "float32")
    if not x:
        return x
    digits, smallest = PRECISION[dtype]
    exponent = x.numerator.bit_length() - x.denominator.bit_length()  # or one more than needed
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - digits + 1, smallest)
    return round(x / unit) * unit


def exact(x: np.ndarray) -> list[Fraction]:
    return [Fraction(float(v)) for v in x]


# ---- Philox and the kernel's loop


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's known answers for philox4x32-10
        ("00000000" * 4, "00000000" * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff" * 4, "ffffffff" * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a8885a308d313198a2e03707344",
            "a4093822299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox(counter: str, key: str, answer: str) -> None:
    c = [int(counter[i : i + 8], 16) for i in range(0, 32, 8)]
    k = [int(key[i : i + 8], 16) for i in range(0, 16, 8)]
    found = philox(k[0] | k[1] << 32, c[0] | c[1] << 32, c[2] | c[3] << 32)
    assert [f"{word:08x}" for word in found[0]] == answer.split()


def scalar_philox(seed: int, q: int, sub: int) -> tuple[int, int, int, int]:
    m = 2**32 - 1
    c, k = (q & m, q >> 32, sub & m, sub >> 32), (seed & m, seed >> 32)
    for _ in range(10):
        p, r = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = ((r >> 32) ^ c[1] ^ k[0], r & m, (p >> 32) ^ c[3] ^ k[1], p & m)
        k = ((k[0] + 0x9E3779B9) & m, (k[1] + 0xBB67AE85) & m)
    return c


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 255, 1000, 1025, 4096, 4097, 9001])
def test_words_are_the_kernels(n: int, dtype: str) -> None:
    """The grid-stride loop, thread by thread as the header has it."""
    seed, offset = 2**63 + 12345, (2**32 - 1) * 4  # the counter's low word overflows at trip 1
    state = State(seed, offset)
    blocks, output = words(n, dtype, state, SMALL)
    unroll = {"float32": 4, "float64": 2}[dtype]
    grid = min((n + 255) // 256, 2 * (512 // 256))
    stride = 256 * grid
    expected: dict[int, tuple] = {}
    trips = (n - 1) // (stride * unroll) + 1
    for thread, trip in itertools.product(range(stride), range(trips)):
        four = scalar_philox(seed, offset // 4 + trip, thread)
        for ii in range(unroll):
            element = thread + trip * stride * unroll + stride * ii
            if element < n:
                assert element not in expected
                expected[element] = (four, ii)
    assert [(tuple(b), o) for b, o in zip(blocks.tolist(), output)] == [
        expected[i] for i in range(n)
    ]
    assert state.offset == offset + 4 * trips


def test_words_at_some_indices() -> None:
    at = np.array([5000, 0, 17, 8999])
    some, all_of = State(3, 8), State(3, 8)
    for a, b in zip(words(9001, "float32", some, SMALL, at), words(9001, "float32", all_of, SMALL)):
        np.testing.assert_array_equal(a, b[at])
    assert some == all_of
    with pytest.raises(ValueError, match="multiples of 4"):
        words(1, "float32", State(0, 2), SMALL)


@pytest.mark.parametrize("gpu", [H200, A100, RTX4090, T4, SMALL])
def test_increments(gpu: Gpu) -> None:
    t = {H200: 270_336, A100: 221_184, RTX4090: 196_608, T4: 40_960, SMALL: 1_024}[gpu]
    assert [threads_of(n, gpu) for n in (0, 1, 256, 257, t - 1, t, t + 1, 9 * t)] == [
        *(0, 256, 256, 512),
        *[t] * 4,
    ]
    sizes = (0, 1, t, t + 1, 2 * t, 2 * t + 1, 4 * t, 4 * t + 1, 8 * t)
    four, two = [0, 4, 4, 4, 4, 4, 4, 8, 8], [0, 4, 4, 4, 4, 8, 8, 12, 16]
    for dtype in DTYPES:
        assert [increment(n, dtype, gpu) for n in sizes] == (two if dtype == "float64" else four)


# ---- what people have printed: pytorch's issues, by number


def printed(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in values]


def test_published_uniform() -> None:
    state = State(0)
    first = uniform(6, "float32", 0, 1, state, H200)
    assert printed(first) == [0.3990, 0.5167, 0.0249, 0.9401, 0.9459, 0.7967]  # 47347
    assert state.offset == 4
    assert printed(uniform(4, "float32", 0, 1, state, H200)) == [0.9722, 0.7910, 0.4690, 0.3300]


ROWS = [0, 1, 2, -3, -2, -1]  # what a summarised tensor shows of a row


@pytest.mark.parametrize(
    ("issue", "seed", "shape", "gpu", "mean", "std", "answer"),
    [
        (80202, 0, (6,), H200, 0, 1, [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797]),
        (79496, 10, (3,), H200, 0, 1, [-0.1029, 1.6810, -0.2708]),
        (  # RTX A6000: three channels' first elements
            *(62467, 43, (3, 128 * 128), Gpu(84, 1536), 0, 1),
            {(0, 0): 1.9983, (1, 0): 0.8704, (2, 0): 2.1127},
        ),
        (  # Quadro M4000: the third is another
            *(62467, 43, (3, 128 * 128), Gpu(13, 2048), 0, 1),
            {(0, 0): 1.9983, (1, 0): 0.8704},
        ),
        (  # 28 multiprocessors: all four words
            *(158398, 42, (64, 2048), Gpu(28, 1536), 0, 1),
            {
                0: [0.1940, 2.1614, -0.1721, 1.4540, -2.7733, -0.8932],
                1: [-0.4574, 0.8063, 0.1580, 0.1124, 0.2769, -1.2535],
                2: [1.1346, -0.6329, -0.9147, -1.0001, -1.1552, -0.6955],
                -3: [-0.4861, 0.3358, 1.0578, -0.7282, 0.5087, 0.1318],
                -2: [0.7881, 0.8339, -1.1424, -0.6297, -1.1112, -0.4091],
                -1: [-1.2356, -0.4083, -0.4695, -0.4841, 1.2850, -0.0282],
            },
        ),
        (  # RTX A4000, with a mean and a deviation
            *(97097, 14, (1000, 100), Gpu(48, 1536), 5, 5**0.5),
            {
                0: [2.8731, 5.2727, 2.9889, 1.6853, 9.6331, 6.6319],
                1: [3.9968, 3.8097, 5.7328, 4.4029, 3.9804, 7.4698],
                2: [6.5552, 4.0857, 4.2315, 2.7704, 3.5479, 3.3063],
                -3: [8.6297, 2.3137, 6.2596, 7.9358, 4.4697, 2.7475],
                -2: [7.0551, 7.8583, 3.9990, 4.1139, 8.9315, 4.2042],
                -1: [2.7337, 2.2106, 7.7815, 8.2207, 6.5395, 4.2604],
            },
        ),
        (  # an H100, which has the H200's grid: nine trips
            *(143086, 1, (1, 49 * 12 * 112 * 144), H200, 0, 1),
            {0: [-0.2963, 2.6764, -0.1408, -0.6970, -0.7780, 0.3267]},
        ),
        (
            *(143086, 1, (1, 49 * 12 * 112 * 144), A100, 0, 1),
            {0: [-0.2963, 2.6764, -0.1408, 0.1549, -0.6797, -0.1656]},
        ),
    ],
)
def test_published_normal(
    issue: int, seed: int, shape: tuple, gpu: Gpu, mean: float, std: float, answer: list | dict
) -> None:
    if isinstance(answer, list):
        answer = {(i,): v for i, v in enumerate(answer)}
    places: list[tuple] = []
    expected: list[float] = []
    for place, value in answer.items():
        many = isinstance(place, int)
        places += [(place, column) for column in ROWS] if many else [place]
        expected += value if many else [value]
    n = math.prod(shape)
    wrapped = [tuple(i % size for i, size in zip(place, shape)) for place in places]
    at = [int(np.ravel_multi_index(place, shape)) for place in wrapped]
    for rounded in (True, False):
        found = normal(n, "float32", mean, std, State(seed), gpu, rounded, at)
        assert printed(found) == expected, issue


# ---- arithmetic


def test_fma32() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(size=3000) * 2.0 ** rng.integers(-30, 30, 3000) for _ in range(3))
    # Half a unit of c, and a trace less or more: float64 alone rounds to a tie and then to even.
    k = rng.integers(1, 200, 1000) * 2.0**-23
    c2 = rng.integers(2**23, 2**24, 1000).astype(np.float64)
    sign = rng.choice([-1.0, 1.0], 1000)
    a, b, c = (
        np.concatenate(pair).astype(np.float32)
        for pair in zip((a, b, c), ((1 + k) / 2 * sign, 1 - k, c2))
    )
    expected = [nearest(x * y + z, "float32") for x, y, z in zip(exact(a), exact(b), exact(c))]
    assert exact(fma32(a, b, c)) == expected
    naive = (a.astype(np.float64) * b + c).astype(np.float32)
    assert exact(naive) != expected  # or the inputs would not be hard enough
    subnormal = fma32(np.float32(2**-75), np.float32(1.5 * 2**-75), np.float32(2**-149))
    assert float(subnormal) == 2.0**-148  # 1.375 units... of the smallest, and one: rounds to two
    assert fma32(1.0, 1.0, -1.0) == 0


def test_fma64() -> None:
    rng = np.random.default_rng(1)
    a, b, c = (rng.normal(size=3000) * 2.0 ** rng.integers(-60, 60, 3000) for _ in range(3))
    k = rng.integers(1, 2**20, 1000) * 2.0**-52
    c2 = rng.integers(2**52, 2**53, 1000).astype(np.float64)
    sign = rng.choice([-1.0, 1.0], 1000)
    a, b, c = (
        np.concatenate(group)
        for group in zip((a, b, c), ((1 + k) / 2 * sign, 1 - k, c2), (a, b, -a * b))
    )
    fractions = zip(exact(a), exact(b), exact(c))
    assert fma64(a, b, c).tolist() == [float(x * y + z) for x, y, z in fractions]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_torchs(dtype: str) -> None:
    rng = np.random.default_rng(2)
    singles = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    singles[:50_000] &= np.uint32(0xFFFF8000)  # ties of bfloat16
    singles[50_000:100_000] &= np.uint32(0xFFFFF000)  # ties of float16
    single = singles.view(np.float32)
    single = single[~np.isnan(single)]
    near = np.concatenate([single.astype(np.float64), rng.normal(size=100_000)])
    near[::3] *= 1 + 2.0**-40  # a tie only once it is a float
    for x in (single, near):
        wide = torch.float64 if dtype == "float64" else torch.float32
        expected = torch.from_numpy(x).to(getattr(torch, dtype)).to(wide).numpy()
        found = round_to(x, dtype)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))
    assert np.isnan(round_to(np.nan, dtype))


def test_erfinv() -> None:
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.uniform(-1, 1, 20_000), 10.0 ** rng.uniform(-300, 0, 2000)])
    x = np.concatenate([x, [0.0, 0.5, -0.5]])
    y = erfinv(x)
    back = np.array([math.erf(v) for v in y])
    # What an error of 1e-15 in y makes of x; near 1, x itself is that coarse.
    slope = 2 / math.sqrt(math.pi) * np.exp(-y * y)
    assert np.all(np.abs(back - x) <= 1e-15 * np.abs(y) * slope + 2.0**-53 * np.abs(x) * 2)
    tail = 2.0 ** -np.arange(2.0, 54)
    back = np.array([math.erfc(v) for v in erfinv(1 - tail)])
    np.testing.assert_allclose(back, tail, rtol=1e-13)  # two orders: erfc falls that fast there
    theirs = torch.erfinv(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, theirs, rtol=1e-14)
    assert erfinv([1.0, -1.0, 0.0]).tolist() == [math.inf, -math.inf, 0.0]
    assert np.isnan(erfinv([1.5, np.nan])).all()


# ---- uniform_


BOUNDS = [(0.0, 1.0), (-1.0, 1.0), (-0.1, 0.3), (1000.0, 1000.7), (-3e-5, 17.3), (2.5, 2.5)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_uniform_is_exact(dtype: str, bounds: tuple[float, float]) -> None:
    """The kernel's text in rational numbers, each operation rounded where it says so."""
    n = 2500
    values = uniform(n, dtype, *bounds, State(5), SMALL)
    blocks, output = words(n, dtype, State(5), SMALL)
    low, high = (nearest(Fraction(bound), dtype) for bound in bounds)
    span = nearest(high - low, dtype)
    real = "float64" if dtype == "float64" else "float32"
    for value, block, ii in zip(exact(values), blocks.tolist(), output.tolist()):
        if dtype == "float64":
            word = Fraction(block[2 * ii] ^ block[2 * ii + 1] << 21)
            unit = nearest(word / 2**53 + Fraction(1, 2**54), real)
        else:
            word = nearest(Fraction(block[ii]), real)
            unit = nearest(word / 2**32 + Fraction(1, 2**33), real)
        result = nearest(nearest(unit * span + low, real), dtype)
        assert value == (low if result == high else result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_moments(dtype: str) -> None:
    n = 1_000_000
    state = State(11)
    values = uniform(n, dtype, -2, 4, state, H200).astype(np.float64)
    assert values.min() >= -2
    assert values.max() < 4
    # bfloat16's last half unit below 4 goes to the lower bound
    assert abs(values.mean() - 1) < (0.02 if dtype == "bfloat16" else 0.01)
    assert abs(values.var() - 3) < 0.02
    assert state.offset == increment(n, dtype, H200)


def extreme_words(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    def constant(n: int, *_: object) -> tuple[np.ndarray, np.ndarray]:
        return np.full((n, 4), word, np.uint32), np.arange(n) % 2

    monkeypatch.setattr(cuda_model, "words", constant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """One, which uniform_ turns into the lower bound, and the smallest there is."""
    extreme_words(monkeypatch, 2**32 - 1)
    top = 2.0**-33 if dtype != "float64" else 2.0**-54
    # Both words full do not make the largest double: they overlap in 11 bits.
    full = 0.0 if dtype != "float64" else ((2**32 - 1) ^ ((2**32 - 1) << 21)) / 2**53 + top
    assert set(uniform(4, dtype, 0, 1, State(0), H200).tolist()) == {full}
    if dtype != "float64":
        assert not normal(4, dtype, 0, 1, State(0), H200).any()
    extreme_words(monkeypatch, 0)
    smallest = float(round_to(top, dtype))
    assert set(uniform(4, dtype, 0, 1, State(0), H200).tolist()) == {smallest}
    sine, cosine = normal(2, dtype, 0, 1, State(0), H200).astype(np.float64)
    radius = math.sqrt(-2 * math.log(top))
    assert cosine == pytest.approx(radius, rel=2.0**-8)
    assert 0 < sine < 1e-8 or dtype == "float16"


# ---- normal_


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_formula(dtype: str) -> None:
    """Python's own functions on the words; and how far the roundings take a value."""
    n = 5000
    mean, std = 0.25, 1.5
    rounded = normal(n, dtype, mean, std, State(9), SMALL).astype(np.float64)
    plain = normal(n, dtype, mean, std, State(9), SMALL, rounded=False)
    assert plain.dtype == np.float64
    blocks, output = words(n, dtype, State(9), SMALL)
    for i, (block, ii) in enumerate(zip(blocks.tolist(), output.tolist())):
        if dtype == "float64":
            unit = (block[0] ^ block[1] << 21) * 2.0**-53 + 2.0**-54
            turn = (block[2] ^ block[3] << 21) * 2.0**-53 + 2.0**-54
        else:
            pair = block[:2] if ii < 2 else block[2:]
            unit, turn = (word * 2.0**-32 + 2.0**-33 for word in pair)
        wave = math.cos if ii % 2 else math.sin
        # What rounding the words to float does to the angle, and to the logarithm.
        radius = math.sqrt(-2 * math.log(unit))
        z = radius * wave(2 * math.pi * turn)
        slack = 5e-15 if dtype == "float64" else 6.5e-7 * radius + 2.0**-24 / radius
        assert plain[i] == pytest.approx(z * std + mean, rel=0, abs=slack * std)
    digits = PRECISION[dtype][0]
    np.testing.assert_allclose(rounded, plain, rtol=2.0**-digits * 1.01, atol=1.5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_normal_rounds_where_the_kernel_does(dtype: str) -> None:
    mean, std = 0.1, 1.7
    values = normal(2000, dtype, mean, std, State(10), SMALL)
    blocks, output = words(2000, dtype, State(10), SMALL)
    scale = nearest(nearest(Fraction("6.2831855"), "float32") / 2**32, "float32")
    wide, shift = (nearest(Fraction(v), "float32") for v in (std, mean))
    for value, block, ii in zip(exact(values), blocks.tolist(), output.tolist()):
        a, b = (nearest(Fraction(w), "float32") for w in (block[:2] if ii < 2 else block[2:]))
        unit = float(nearest(a / 2**32 + Fraction(1, 2**33), "float32"))
        angle = float(nearest(b * scale + scale / 2, "float32"))
        log = nearest(Fraction(math.log(unit)), "float32")
        radius = nearest(Fraction(math.sqrt(-2 * log)), "float32")
        wave = nearest(Fraction((math.cos if ii % 2 else math.sin)(angle)), "float32")
        z = nearest(wave * radius, "float32")
        assert value == nearest(nearest(z * wide + shift, "float32"), dtype)


def test_double_normal_ends_in_an_fma() -> None:
    plain = normal(3000, "float64", 0, 1, State(10), SMALL)
    values = normal(3000, "float64", 0.1, 1.7, State(10), SMALL)
    assert values.tolist() == [float(z * Fraction(1.7) + Fraction(0.1)) for z in exact(plain)]


def test_sine_and_cosine_of_pi() -> None:
    """As good as CUDA's: against the series in integers of 200 bits, also near the zeros."""
    one = 2**200
    pi = 3 * one + int(Fraction("0.14159265358979323846264338327950288419716939937510582097") * one)
    rng = np.random.default_rng(4)
    v = np.concatenate([rng.uniform(0, 2, 300), [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]])
    zeros = rng.integers(1, 5, 100) / 2
    v = np.concatenate([v, zeros - 2.0 ** -rng.uniform(3, 50, 100)])
    for x, sine, cosine in zip(v, *cuda_model._sin_cos_pi(v)):
        angle = pi * (Fraction(float(x)) - 1)  # within pi of zero; the sign is turned back below
        sums, term = [0, 0], one
        for k in range(80):
            sums[k % 2] += -term if k // 2 % 2 == 0 else term
            term = int(term * angle / one) // (k + 1)
        for value, scaled in ((sine, sums[1]), (cosine, sums[0])):
            true = scaled / one
            assert abs(value - true) <= 1.5 * math.ulp(true) + 1e-50


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_moments(dtype: str) -> None:
    n = 1_000_000
    state = State(12, 400)
    values = normal(n, dtype, 0, 1, state, T4).astype(np.float64)
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert state.offset == 400 + increment(n, dtype, T4)


# ---- trunc_normal_


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "params", [(0.0, 1.0, -2.0, 2.0), (0.3, 0.5, 0.1, 0.9), (0.0, 0.02, -2.0, 2.0)]
)
def test_trunc_normal_takes_the_first_accepted(dtype: str, params: tuple) -> None:
    n = 6000
    mean, std, a, b = params
    state = State(21, 64)
    values, draws = trunc_normal(n, dtype, mean, std, a, b, state, SMALL)
    again = State(21, 64)
    low, high = float(round_to(a, dtype)), float(round_to(b, dtype))
    tensors = np.array([normal(n, dtype, mean, std, again, SMALL) for _ in range(draws)])
    accepted = (tensors >= low) & (tensors <= high)
    first = accepted.argmax(0)
    assert accepted.any(0).all()
    assert first.max() == draws - 1
    np.testing.assert_array_equal(values, np.take_along_axis(tensors, first[None], 0)[0])
    assert state == again
    assert state.offset == 64 + draws * increment(n, dtype, SMALL)
    assert (draws == 1) == (std == 0.02)


def test_trunc_normal_refuses_the_other_branch() -> None:
    with pytest.raises(ValueError, match="proposes"):
        trunc_normal(10, "float32", 0, 1, 2, 3, State(0), SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_truncated_moments(dtype: str) -> None:
    n = 400_000
    state = State(31)
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    variance = 1 - 4 * density / math.erf(math.sqrt(2))
    inverse = trunc_normal_erfinv(n, dtype, 0, 1, -2, 2, state, H200).astype(np.float64)
    assert state.offset == increment(n, dtype, H200)
    rejected = trunc_normal(n, dtype, 0, 1, -2, 2, state, H200)[0].astype(np.float64)
    for values in (inverse, rejected):
        assert np.abs(values).max() <= 2
        # The uniform's steps near its bounds are coarse in 16 bits, as torch's issues say.
        coarse = values is inverse and dtype in ("bfloat16", "float16")
        assert abs(values.mean()) < (0.05 if coarse else 0.01)
        assert abs(values.var() - variance) < (0.05 if coarse else 0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trunc_normal_erfinv_is_torchs_steps(dtype: str) -> None:
    """The same uniforms through torch's own kernels on the CPU."""
    n, mean, std, a, b = 5000, 0.3, 0.7, -0.9, 1.234
    values = trunc_normal_erfinv(n, dtype, mean, std, a, b, State(8), SMALL)
    low, high = (math.erf((bound - mean) / std / math.sqrt(2)) for bound in (a, b))
    x = torch.from_numpy(uniform(n, dtype, low, high, State(8), SMALL)).to(getattr(torch, dtype))
    x.erfinv_().mul_(std * math.sqrt(2))
    # The CPU's add_ rounds its scalar to the dtype first, the GPU's only to float.
    x = x.to(torch.promote_types(x.dtype, torch.float32)).add_(mean).to(x.dtype)
    x.clamp_(min=a, max=b)
    close = {"float64": 1e-14, "float32": 2e-6, "bfloat16": 0.01, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(values, x.to(torch.float64).numpy(), rtol=close, atol=close)
    if dtype in ("bfloat16", "float16"):
        assert np.mean(values == x.float().numpy()) > 0.98  # an ulp of erfinv seldom shows
