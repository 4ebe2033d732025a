# SPDX-License-Identifier: BSD-3-Clause
"""Key itself: seeds, names, running numbers, parts, copies, and calls that it refuses."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any, cast

import numpy as np
import pytest
import torch

import fastinit
from fastinit import Key
from tests.support import keyed_model as model
from tests.support.compare import F32
from tests.support.keyed_fills import (
    LAWS,
    NAME,
    OF_FANS,
    assert_bits,
    fill,
    key,
    known,
    upto,
)
from tests.support.seeded import SEED, api, equal, keyed


def test_key() -> None:
    assert repr(Key(3)) == "Key(3)"
    assert repr(Key(-1, "a.b")) == "Key(18446744073709551615, 'a.b')"
    assert Key(3).named("x").name == "x"
    assert Key(3).named("x").philox == Key(3, "x").philox != Key(4, "x").philox
    assert Key(cast(Any, np.int64(3))).seed == 3
    mine = type("Mine", (Key,), {})(SEED, "w")
    assert equal(fastinit.normal_(torch.empty(4), generator=mine), keyed("normal_", (4,)))
    with pytest.raises(ValueError, match="without a name"):
        _ = Key(3).philox
    with pytest.raises(TypeError, match="a name is a str"):
        Key(3, 4)  # type: ignore[arg-type]


def test_running_numbers_of_threads() -> None:
    """Each is given once."""
    key = Key(3)
    found: list[str] = []

    def take() -> None:
        found.extend(key.take()[1] for _ in range(2000))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(x[1:]) for x in found) == list(range(16_000))


def test_copies_of_a_key() -> None:
    """They go on from where it is; deep ones on their own."""
    key = Key(3)
    key.take()
    for twin in (copy.deepcopy(key), pickle.loads(pickle.dumps(key))):
        assert (twin.seed, twin.name) == (3, None)
        assert [twin.take()[1], twin.take()[1]] == ["#1", "#2"]
    assert key.take()[1] == "#1"
    assert copy.copy(key).take()[1] != key.take()[1]
    assert b"itertools" not in pickle.dumps(key)  # no part of what versions of Python agree upon
    named = pickle.loads(pickle.dumps(Key(3, "x")))
    assert named.philox == Key(3, "x").philox


def test_keys() -> None:
    for row in known("philox4x32_10.json")["keys"]:
        if row["name"] is not None:
            for found in (
                api.Key(row["seed"], row["name"]),
                api.Key(row["seed"], name=row["name"]),
                api.Key(row["seed"]).named(row["name"]),
            ):
                assert found.philox == int(row["philox"], 16), row
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises((ValueError, OverflowError)):
            api.Key(seed, "w")


def test_running_numbers() -> None:
    """Fills without a name count, those of nothing too (a rank may have none of a parameter)."""
    running = api.Key(7)
    for number in range(12):
        expected = model.uniform(model.philox_key(7, number=number), upto(9), F32)
        assert_bits(fill("uniform_", (9,), generator=running), expected, number)
        if number == 3:
            fill("uniform_", (9,), generator=running.named("w"))
            fill("uniform_", (9,), generator=api.Key(7))
    fill("uniform_", (0,), generator=running)
    fill("normal_", (3, 0), generator=running)
    fill("trunc_normal_", (0,), generator=running.part((5,), (5,)))
    fill("sparse_", (4, 4), 0.5, generator=running)
    fill("kaiming_normal_", (4, 4), generator=running)
    expected = model.uniform(model.philox_key(7, number=17), upto(9), F32)
    assert_bits(fill("uniform_", (9,), generator=running), expected)


def test_parts_of_a_key() -> None:
    """A part keeps seed, name and the running numbers of its key, and says what it is."""
    running = api.Key(5)
    part = running.part([4, 90], torch.Size([1, 0]))
    assert (part.global_shape, part.offset) == ((4, 90), (1, 0))
    assert repr(part) == "Key(5).part((4, 90), (1, 0))"
    assert [running.take()[1], part.take()[1], running.take()[1]] == ["#0", "#1", "#2"]
    twin = pickle.loads(pickle.dumps(part.named("w")))
    assert (twin.name, twin.offset, twin.philox) == ("w", (1, 0), running.named("w").philox)
    for wrong in ((4.0, 90), "ab", None):
        with pytest.raises(TypeError):
            running.part(wrong, (0, 0))


PLACES = [
    ((16,), (0,)),
    ((16, 16), (0,)),
    ((16, 16, 1), (0, 0, 0)),
    ((16, 16), (9, 0)),
    ((16, 16), (0, 17)),
    ((16, 7), (0, 0)),
    ((16, 16), (-1, 0)),
]


@pytest.mark.parametrize(("whole", "offset"), PLACES, ids=str)
@pytest.mark.parametrize(("name", "args"), [LAWS[0], OF_FANS[3]], ids=str)
def test_places_that_are_none(
    name: str, args: tuple[float, ...], whole: tuple[int, ...], offset: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        fill(name, (8, 8), *args, generator=key().part(whole, offset))


@pytest.mark.parametrize("name", ["uniform_", "kaiming_normal_", "orthogonal_", "eye_", "zeros_"])
def test_what_to_write_instead_of_the_old_keywords(name: str) -> None:
    """Up to 0.5 the functions took global_shape= and offset=."""
    function: Any = getattr(fastinit, name)
    with pytest.raises(TypeError, match=r"since 0\.6: (write|fill|a part)"):
        function(torch.empty(4, 4), global_shape=(8, 8), offset=(0, 0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'shape'"):
        function(torch.empty(4, 4), shape=(8, 8))


# ---- calls ----


@pytest.mark.parametrize(("name", "args"), [*LAWS, *OF_FANS, ("sparse_", (0.3,))], ids=str)
def test_parameters(name: str, args: tuple[float, ...]) -> None:
    """Written under no_grad, counted by autograd, and no generator of torch's takes part."""
    parameter = torch.nn.Parameter(torch.empty(12, 7))
    torch.empty(5).normal_()
    before, version = torch.get_rng_state(), parameter._version
    fill(name, parameter, *args, generator=key())
    assert parameter._version > version
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter.grad_fn is None
    assert torch.equal(torch.get_rng_state(), before)
    assert_bits(parameter.detach(), fill(name, (12, 7), *args, generator=key()))
    assert_bits(parameter.detach(), fill(name, (12, 7), *args, generator=api.Key(SEED).named(NAME)))


ANY = (RuntimeError, ValueError, TypeError, NotImplementedError)


BAD = (RuntimeError, ValueError)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("normal_", (0.0, -1.0)),
        ("trunc_normal_", (0.0, -1.0)),
        ("sparse_", (0.5, -1.0)),
        ("uniform_", (1.0, 0.0)),
        ("uniform_", (-3e38, 3e38)),
        ("trunc_normal_", (0.0, 1.0, 2.0, -2.0)),
    ],
    ids=str,
)
def test_bad_arguments(name: str, args: tuple[float, ...]) -> None:
    with pytest.raises(BAD):
        fill(name, (8, 8), *args, generator=key())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize(("name", "args"), [*LAWS, *OF_FANS, ("sparse_", (0.3,))], ids=str)
def test_random_laws_are_for_floats(dtype: torch.dtype, name: str, args: tuple[float, ...]) -> None:
    with pytest.raises(ANY):
        fill(name, (8, 8), *args, dtype=dtype, generator=key())
