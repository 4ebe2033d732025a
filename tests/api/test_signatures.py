# SPDX-License-Identifier: BSD-3-Clause
"""The public face: names, signatures, documentation, warnings and kinds of arguments of torch."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.init as torch_init

import fastinit
from tests.support.compare import BF16, F32, F64, Position, assert_same
from tests.support.layouts import apart

pytestmark = pytest.mark.usefixtures("native")

NAMES = list(torch_init.__all__)
FILLS = [n for n in NAMES if n.endswith("_")]
ALIASES = [n for n in NAMES if not n.endswith("_") and n != "calculate_gain"]

# Arguments that suit each function, on a matrix except for dirac_.
USUAL: dict[str, tuple[Any, ...]] = {"constant_": (0.5,), "sparse_": (0.25,)}
SHAPES = {"dirac_": (6, 4, 3)}


def matrix(name: str) -> torch.Tensor:
    return torch.full(SHAPES.get(name, (40, 30)), 13.0)


def test_every_name_of_torch_is_here() -> None:
    assert (len(NAMES), len(FILLS), len(ALIASES)) == (26, 14, 11)
    assert set(NAMES) <= set(fastinit.__all__)
    for name in fastinit.__all__:
        assert hasattr(fastinit, name)
    for name in NAMES:
        assert callable(getattr(fastinit, name))
        assert getattr(fastinit, name).__name__ == name


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(m, name)) for m in (fastinit, torch_init))

    def shape(signature: inspect.Signature) -> list[tuple[Any, ...]]:
        return [(p.name, p.kind, p.default, type(p.default)) for p in signature.parameters.values()]

    assert shape(ours) == shape(theirs)


@pytest.mark.parametrize("name", FILLS)
def test_documentation(name: str) -> None:
    """help() tells what goes in, of which kind, and what goes wrong."""
    text = inspect.getdoc(getattr(fastinit, name)) or ""
    for wanted in ("shape|dimension", "dtype|float", "raise|error"):
        assert re.search(wanted, text, re.IGNORECASE), f"{name}: nothing about {wanted}"
    for parameter in inspect.signature(getattr(fastinit, name)).parameters:
        assert re.search(rf"\b{parameter}\b", text), f"{name}: nothing about {parameter}"


def test_documentation_of_the_rest() -> None:
    for thing in (fastinit, fastinit.Plan, fastinit.init_model_, fastinit.calculate_gain):
        assert len(inspect.getdoc(thing) or "") > 80
    for name in ALIASES:
        assert name + "_" in (getattr(fastinit, name).__doc__ or "")


@pytest.mark.parametrize("name", FILLS)
def test_functions_pickle_and_copy(name: str) -> None:
    function = getattr(fastinit, name)
    assert pickle.loads(pickle.dumps(function)) is function
    assert copy.deepcopy(function) is function


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.usefixtures("own_factors")
def test_usual_call_is_native_and_equal(name: str) -> None:
    assert_same(name, lambda: matrix(name), *USUAL.get(name, ()), native=True)


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.usefixtures("own_factors")
def test_every_argument_by_keyword(name: str) -> None:
    values = {
        "a": -0.5, "b": 0.75, "mean": 0.25, "std": 2.0, "val": 3.5, "groups": 2, "gain": 1.5,
        "mode": "fan_out", "nonlinearity": "relu", "sparsity": 0.3,
    }  # fmt: skip
    parameters = list(inspect.signature(getattr(torch_init, name)).parameters)
    names = [p for p in parameters if p not in ("tensor", "generator")]
    assert_same(name, lambda: matrix(name), **{p: values[p] for p in names})
    assert_same(name, lambda: matrix(name), *[values[p] for p in names])
    results = []
    for module in (torch_init, fastinit):
        tensor, generator = matrix(name), torch.Generator().manual_seed(1)
        torch.manual_seed(2)
        given = {"tensor": tensor, **{p: values[p] for p in names}}
        if "generator" in parameters:
            given["generator"] = generator
        assert getattr(module, name)(**given) is tensor
        results.append((tensor, generator.get_state(), torch.get_rng_state()))
    assert all(torch.equal(e, f) for e, f in zip(*results, strict=True))


GAINS = [
    (n, p)
    for n in ("linear", "conv1d", "conv_transpose3d", "sigmoid", "tanh", "relu", "selu", "swish")
    for p in (None, 0.3)
]
GAINS += [("leaky_relu", p) for p in (None, 0, 0.2, 5, -1.5, True, "x", math.nan, [1])]
GAINS += [("", None), (None, None), (3, None)]


@pytest.mark.parametrize(("nonlinearity", "parameter"), GAINS, ids=str)
def test_calculate_gain(nonlinearity: Any, parameter: Any) -> None:
    found = []
    for module in (torch_init, fastinit):
        try:
            gain = module.calculate_gain(nonlinearity, parameter)
            found.append((type(gain), repr(gain)))
        except Exception as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.usefixtures("own_factors")
def test_deprecated_alias(name: str) -> None:
    def make() -> torch.Tensor:
        return matrix(name + "_")

    args = USUAL.get(name + "_", ())
    for explicit in (False, True) if name not in ("constant", "eye", "dirac") else (False,):
        results = []
        for module in (torch_init, fastinit):
            tensor, generator = make(), torch.Generator().manual_seed(3)
            torch.manual_seed(4)
            options = {"generator": generator} if explicit else {}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert getattr(module, name)(tensor, *args, **options) is tensor
            assert [w.category for w in caught] == [FutureWarning]
            # The reader of the warning needs the line of the call, not one inside the library.
            assert caught[0].filename == __file__
            text = str(caught[0].message)
            results.append((text, tensor, generator.get_state(), torch.get_rng_state()))
        assert results[0][0] == results[1][0]
        assert all(torch.equal(e, f) for e, f in zip(results[0][1:], results[1][1:], strict=True))
    options = {"constant": {"val": 1.0}, "sparse": {"sparsity": 0.5}}.get(name, {})
    with pytest.warns(FutureWarning):
        getattr(fastinit, name)(tensor=make(), **options)


@pytest.mark.parametrize("name", ["kaiming_uniform", "kaiming_normal"])
@pytest.mark.parametrize("suffix", ["", "_"])
def test_warning_of_no_elements(name: str, suffix: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensor = torch.empty(3, 0)
        state = torch.get_rng_state()
        assert getattr(fastinit, name + suffix)(tensor) is tensor
    assert torch.equal(torch.get_rng_state(), state)
    assert caught[-1].category is UserWarning
    assert str(caught[-1].message) == "Initializing zero-element tensors is a no-op"
    assert len(caught) == (1 if suffix else 2)
    if suffix:
        assert caught[0].filename == __file__


@pytest.mark.parametrize("mean", [4.5, -4.5, 10.0])
def test_warning_of_trunc_normal(mean: float) -> None:
    """The warning comes before the draw, once per call; what is drawn is torch's."""
    with pytest.warns(UserWarning, match="mean is more than 2 std from"):
        fastinit.trunc_normal_(torch.empty(100), mean=mean)
    assert_same("trunc_normal_", lambda: apart(100, F32), mean=mean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = torch.full((100,), 13.0)
        state = torch.get_rng_state()
        with pytest.raises(UserWarning):
            fastinit.trunc_normal_(tensor, mean=mean)
    assert (tensor == 13.0).all()
    assert torch.equal(torch.get_rng_state(), state)


# Numbers of every kind that torch's argument parser takes for a float.
NUMBERS = [
    (0, 1),
    (False, True),
    (np.float64(-0.1), np.float64(0.3)),
    (np.float32(-0.1), np.float32(0.3)),
    (np.float16(-0.1), np.float16(0.3)),
    (np.int64(-1), np.int32(2)),
    (np.array(0.0), np.array(0.5)),
    (torch.tensor(0.1), torch.tensor(0.7, dtype=F64)),
    (torch.tensor(0), torch.tensor(True)),
    (torch.tensor(0.1, dtype=BF16), torch.tensor(0.7, requires_grad=True)),
    (np.bool_(False), np.bool_(True)),
]


@pytest.mark.parametrize("numbers", NUMBERS, ids=lambda n: type(n[0]).__name__)
@pytest.mark.usefixtures("own_factors")
def test_kinds_of_numbers(numbers: tuple[Any, Any]) -> None:
    """Accepted or refused, as torch does: a 0-dim tensor is a float to some calls only."""
    for name in ("uniform_", "normal_", "trunc_normal_"):
        results = []
        for module in (torch_init, fastinit):
            torch.manual_seed(9)
            tensor = torch.full((100,), 13.0)
            try:
                getattr(module, name)(tensor, *numbers)
                outcome = ""
            except Exception as error:
                outcome = f"{type(error)}: {error}"
            results.append((outcome, tensor, torch.get_rng_state()))
        assert results[0][0] == results[1][0], name
        assert torch.equal(results[0][1], results[1][1]), name
        assert torch.equal(results[0][2], results[1][2]), name
    for name in ("constant_", "xavier_uniform_", "xavier_normal_", "orthogonal_"):
        results = []
        for module in (torch_init, fastinit):
            torch.manual_seed(9)
            tensor = torch.full((10, 10), 13.0)
            try:
                getattr(module, name)(tensor, numbers[1])
                outcome = ""
            except Exception as error:
                outcome = f"{type(error)}: {error}"
            results.append((outcome, tensor, torch.get_rng_state()))
        assert results[0][0] == results[1][0], name
        assert torch.equal(results[0][1], results[1][1]), name
        assert torch.equal(results[0][2], results[1][2]), name


class Threshold(float):
    """A user's own float."""


@pytest.mark.parametrize("kind", [Threshold, np.float64, math.ceil])
@pytest.mark.usefixtures("own_factors")
def test_numbers_in_every_position(kind: Any) -> None:
    half, two = kind(0.5), kind(2.0)
    for name, args in [
        ("uniform_", (-0.5, half)),
        ("normal_", (half, two)),
        ("trunc_normal_", (half, two, -half, two)),
        ("kaiming_uniform_", (half,)),
        ("kaiming_normal_", (two,)),
        ("xavier_uniform_", (half,)),
        ("sparse_", (half, two)),
        ("orthogonal_", (two,)),
        ("constant_", (half,)),
    ]:
        at = Position(words=11)
        assert_same(name, lambda n=name: matrix(n), *args, at=at, poisons=None)
