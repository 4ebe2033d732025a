# SPDX-License-Identifier: BSD-3-Clause
"""The functions of torch.nn.init: same signatures, same bits (orthogonal_: up to rounding), same
errors.

Each is one line, its law is in core/laws.py, and dispatch.py decides who writes it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import CellType, FunctionType
from typing import Any, NoReturn, cast

import torch
from torch import Generator, Tensor

from fastinit.core import build, geometry, kernels, laws, recording, source, switch, torch_api
from fastinit.core.fill import gaussian_dtype
from fastinit.core.key import Key
from fastinit.cpu import qr as cpu_qr
from fastinit.dispatch import (
    ORIGINALS,
    Source,
    has_no_elements,
    is_keyed,
    leave_to_torch,
    may_run_natively,
    write,
    written,
)

# fmt: off
__all__ = [  # torch's order; older torch.nn.init has no such list
    "calculate_gain",
    "uniform_", "normal_", "trunc_normal_", "constant_", "ones_", "zeros_", "eye_", "dirac_",
    "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_",
    "sparse_",
    "uniform", "normal", "constant", "eye", "dirac", "xavier_uniform", "xavier_normal",
    "kaiming_uniform", "kaiming_normal", "orthogonal", "sparse",
]
# fmt: on

_CONSTANT = 512  # times as many elements until torch's own fill_ costs more than a look at it


def calculate_gain(nonlinearity: Any, param: int | float | None = None) -> float:
    """Return the recommended gain for a nonlinearity; `torch.nn.init.calculate_gain`.

    Args:
        nonlinearity: linear, conv{1,2,3}d, conv_transpose{1,2,3}d, sigmoid (1), tanh (5/3),
            relu (sqrt 2), leaky_relu (sqrt(2 / (1 + slope^2))) or selu (3/4)
        param: the slope of leaky_relu (default 0.01)

    Raises:
        ValueError: unknown nonlinearity, or `param` is not a number.
    """
    return cast(float, ORIGINALS["calculate_gain"](nonlinearity, param))


def uniform_(
    tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Source = None, **moved: NoReturn
) -> Tensor:
    """Fill `tensor` in place with U[a, b) and return it; `torch.nn.init.uniform_`.

    Args:
        tensor: any shape; float32, float64, bfloat16 and float16 are filled natively
        a: lower bound
        b: upper bound
        generator: where the words come from (default: torch's default generator), or a `Key`

    Raises:
        RuntimeError: a > b, a bound outside the dtype's range, or an integer dtype.
    """
    return write("uniform_", tensor, (a, b), generator, moved)


def normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Source = None, **moved: NoReturn
) -> Tensor:
    """Fill `tensor` in place with N(mean, std^2) and return it; `torch.nn.init.normal_`.

    Args:
        tensor: any shape; float32, float64, bfloat16 and float16 are filled natively
        mean: of the distribution
        std: of the distribution, not negative
        generator: where the words come from (default: torch's default generator), or a `Key`

    Raises:
        RuntimeError: std < 0, or an integer dtype.
    """
    return write("normal_", tensor, (mean, std), generator, moved)


def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Source = None,
    **moved: NoReturn,
) -> Tensor:
    """Fill with N(mean, std^2) truncated to [a, b]; `torch.nn.init.trunc_normal_`.

    Native where torch (2.12 and later) rejects draws of normal_, that is if more than 30 % of them
    lie inside; otherwise torch's own operators run.

    Args:
        tensor: any shape; float32, float64, bfloat16 and float16 are filled natively
        mean: of the normal distribution
        std: of the normal distribution, positive
        a: lower cutoff, in the units of the values (not of std)
        b: upper cutoff
        generator: where the words come from (default: torch's default generator), or a `Key`

    Returns:
        `tensor`, filled in place.

    Raises:
        RuntimeError: std < 0, or an integer dtype.

    Warns:
        UserWarning: the mean is more than two std outside [a, b].
    """
    return write("trunc_normal_", tensor, (mean, std, a, b), generator, moved)


def constant_(tensor: Tensor, val: float, **moved: NoReturn) -> Tensor:
    """Fill `tensor` (any shape, any dtype) with `val` and return it; `torch.nn.init.constant_`.

    Raises:
        RuntimeError: the dtype cannot hold `val`.
    """
    return write("constant_", tensor, (val,), None, moved, _CONSTANT)


def ones_(tensor: Tensor, **moved: NoReturn) -> Tensor:
    """Fill `tensor` (any shape, any dtype) with 1 and return it; `torch.nn.init.ones_`.

    Raises:
        RuntimeError: torch cannot write to such a tensor in place.
    """
    return write("ones_", tensor, (), None, moved, _CONSTANT)


def zeros_(tensor: Tensor, **moved: NoReturn) -> Tensor:
    """Fill `tensor` (any shape, any dtype) with 0 and return it; `torch.nn.init.zeros_`.

    Raises:
        RuntimeError: torch cannot write to such a tensor in place.
    """
    return write("zeros_", tensor, (), None, moved, _CONSTANT)


def eye_(tensor: Tensor, **moved: NoReturn) -> Tensor:
    """Make a matrix the identity and return it; `torch.nn.init.eye_`.

    Args:
        tensor: shape (rows, columns), any dtype

    Raises:
        ValueError: not two dimensions.
    """
    return write("eye_", tensor, (), None, moved)


def dirac_(tensor: Tensor, groups: int = 1, **moved: NoReturn) -> Tensor:
    """Make a convolution pass its input through; `torch.nn.init.dirac_`.

    Args:
        tensor: shape (out channels, in channels / groups, *kernel) with 1 to 3 kernel dimensions,
            any dtype
        groups: of the convolution; each keeps as many of its channels as fit

    Raises:
        ValueError: other numbers of dimensions, or out channels not divisible by `groups`.
    """
    return write("dirac_", tensor, (groups,), None, moved)


def xavier_uniform_(
    tensor: Tensor, gain: float = 1.0, generator: Source = None, **moved: NoReturn
) -> Tensor:
    """Fill with U(-a, a), a = gain sqrt(6 / (fan_in + fan_out)); `torch.nn.init.xavier_uniform_`.

    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks"
    (2010).

    Args:
        tensor: shape (fan_out, fan_in, *kernel), any floating dtype
        gain: scaling factor, see `calculate_gain`
        generator: where the words come from (default: torch's default generator), or a `Key`

    Raises:
        ValueError: fewer than two dimensions.
    """
    return write("xavier_uniform_", tensor, (gain,), generator, moved)


def xavier_normal_(
    tensor: Tensor, gain: float = 1.0, generator: Source = None, **moved: NoReturn
) -> Tensor:
    """Fill with N(0, std^2), std = gain sqrt(2 / (fan_in + fan_out)).

    `torch.nn.init.xavier_normal_`; Glorot and Bengio (2010), as `xavier_uniform_`.

    Args:
        tensor: shape (fan_out, fan_in, *kernel), any floating dtype
        gain: scaling factor, see `calculate_gain`
        generator: where the words come from (default: torch's default generator), or a `Key`

    Raises:
        ValueError: fewer than two dimensions.
    """
    return write("xavier_normal_", tensor, (gain,), generator, moved)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: Any = "fan_in",
    nonlinearity: Any = "leaky_relu",
    generator: Source = None,
    **moved: NoReturn,
) -> Tensor:
    """Fill with U(-bound, bound), bound = gain sqrt(3 / fan); `torch.nn.init.kaiming_uniform_`.

    He et al., "Delving deep into rectifiers" (2015).

    Args:
        tensor: shape (fan_out, fan_in, *kernel), any floating dtype
        a: negative slope of the rectifier, used with leaky_relu only
        mode: "fan_in" keeps the variance in the forward pass, "fan_out" in the backward pass
        nonlinearity: see `calculate_gain`
        generator: where the words come from (default: torch's default generator), or a `Key`

    Raises:
        ValueError: fewer than two dimensions, unknown mode or nonlinearity.

    Warns:
        UserWarning: the tensor has no elements; nothing is done.
    """
    if has_no_elements(tensor, generator):  # torch warns at the line of its caller: here, of ours
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=2)
        return tensor
    return write("kaiming_uniform_", tensor, (a, mode, nonlinearity), generator, moved)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: Any = "fan_in",
    nonlinearity: Any = "leaky_relu",
    generator: Source = None,
    **moved: NoReturn,
) -> Tensor:
    """Fill with N(0, std^2), std = gain / sqrt(fan); `torch.nn.init.kaiming_normal_`.

    He et al. (2015), as `kaiming_uniform_`.

    Args:
        tensor: shape (fan_out, fan_in, *kernel), any floating dtype
        a: negative slope of the rectifier, used with leaky_relu only
        mode: "fan_in" keeps the variance in the forward pass, "fan_out" in the backward pass
        nonlinearity: see `calculate_gain`
        generator: where the words come from (default: torch's default generator), or a `Key`

    Raises:
        ValueError: fewer than two dimensions, unknown mode or nonlinearity.

    Warns:
        UserWarning: the tensor has no elements; nothing is done.
    """
    if has_no_elements(tensor, generator):  # torch warns at the line of its caller: here, of ours
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=2)
        return tensor
    return write("kaiming_normal_", tensor, (a, mode, nonlinearity), generator, moved)


def orthogonal_(
    tensor: Tensor, gain: float = 1, generator: Source = None, **moved: NoReturn
) -> Tensor:
    """Fill with a (semi-)orthogonal matrix times gain; `torch.nn.init.orthogonal_`.

    Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks" (2013); uniform by the Haar measure after Mezzadri, arXiv math-ph/0609050.

    Args:
        tensor: shape (rows, *columns), float32, float64, bfloat16 or float16 (which are computed in
            float32 and rounded once; torch raises for them); trailing dimensions are flattened
        gain: scaling factor
        generator: where the words come from (default: torch's default generator), or a `Key`

    The same matrix as torch's, up to rounding: docs/reproducibility.md says how far.
    `set_orthogonal("torch")` leaves it to torch.

    Raises:
        ValueError: fewer than two dimensions.
        RuntimeError: other dtypes.
    """
    if written("orthogonal_", tensor, (gain,), generator, moved, 0):
        return tensor
    function: Callable[..., Tensor] = ORIGINALS["orthogonal_"]
    is_native = may_run_natively("orthogonal_", tensor, 0)
    is_native = is_native and not switch.leaves_orthogonal_to_torch()
    if is_native and tensor.dim() >= 2 and _is_in_cpu_memory(tensor):
        rows, columns = tensor.shape[0], tensor.numel() // tensor.shape[0]
        if not build.is_narrow(rows, columns, tensor.dtype):
            function = functools.partial(_orthogonal, (rows, columns))
    return leave_to_torch(function, "orthogonal_", tensor, (gain,), generator)


def orthogonal_batched_(
    tensor: Tensor, gain: float = 1, generator: Source = None, **moved: NoReturn
) -> Tensor:
    """Fill every matrix of a batch with an orthogonal matrix of its own; torch cannot.

    For weights of experts or layers that are stacked, which `orthogonal_` would flatten into one
    matrix. The normals are those of `torch.randn(tensor.shape)`, so that, on the CPU, for rows *
    cols a multiple of 16 the matrices are those of `orthogonal_` on one after the other. After
    `set_orthogonal("torch")` they are that for all sizes, by torch's own function.

    Args:
        tensor: shape (..., rows, cols), any dtype that `orthogonal_` takes
        gain: scaling factor
        generator: where the words come from (default: torch's default generator), or a `Key`

    Raises:
        ValueError: fewer than two dimensions.
        RuntimeError: other dtypes.
    """
    if not is_keyed(generator, recording.this_thread.recorder):
        if tensor.dim() < 2:
            raise ValueError("Only tensors with 2 or more dimensions are supported")
        if tensor.numel() == 0 or tensor.is_meta:
            return tensor
        if tensor.dtype not in geometry.DTYPES:  # torch says what is wrong
            return write("orthogonal_", tensor, (gain,), generator, moved)
    if written("orthogonal_batched_", tensor, (gain,), generator, moved, 0):
        return tensor
    function: Callable[..., Tensor] = functools.partial(_orthogonal, tuple(tensor.shape))
    if switch.leaves_orthogonal_to_torch():
        function = _orthogonal_each
    return leave_to_torch(function, "orthogonal_batched_", tensor, (gain,), generator)


def _orthogonal_each(tensor: Tensor, gain: float, generator: Generator | None) -> Tensor:
    """Call torch's orthogonal_ for one matrix after the other."""
    with torch.no_grad():
        for place in itertools.product(*map(range, tensor.shape[:-2])):
            ORIGINALS["orthogonal_"](tensor[place], gain, generator)
    return tensor


def _is_in_cpu_memory(t: Tensor) -> bool:
    return geometry.accepts(t, inference=True) and geometry.device_of(t) < 0


def _orthogonal(
    shape: tuple[int, ...], tensor: Tensor, gain: float, generator: Generator | None
) -> Tensor:
    """Fill a tensor that kernels cannot write in place: compute elsewhere, then copy.

    Args:
        shape: (..., rows, cols), as which the tensor is seen
    """
    with torch.no_grad():
        q, rest = _factor(shape, tensor, gain, generator)
        tensor.view_as(q).copy_(q)
        return tensor.mul_(rest)  # torch counts two versions


def _factor(
    shape: tuple[int, ...], like: Tensor, gain: float, generator: Generator | None
) -> tuple[Tensor, float]:
    """Return orthogonal matrices of a shape, and the factor they have yet to be multiplied by."""
    plain = type(like) in geometry.PLAIN and like.is_cpu and not torch.compiler.is_compiling()
    plain = plain and recording.modes_allow() and geometry.accepts(like, inference=True)
    with kernels.undisturbed() if plain else nullcontext():  # so that nothing waits
        drawn = like.new_empty(shape, dtype=gaussian_dtype(like.dtype))
        normal_(drawn, 0.0, 1.0, generator)
        if plain:
            number = laws.gain_of(gain)
            cpu_qr.factor_(drawn, 1.0 if number is None else number)
            return drawn, gain if number is None else 1.0
    wide = drawn.shape[-2] < drawn.shape[-1]
    q, r = torch.linalg.qr(drawn.mT if wide else drawn)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q.mT if wide else q, gain


def sparse_(
    tensor: Tensor, sparsity: float, std: float = 0.01, generator: Source = None, **moved: NoReturn
) -> Tensor:
    """Fill a matrix with N(0, std^2) and zero part of each column; `torch.nn.init.sparse_`.

    Martens, "Deep learning via Hessian-free optimization" (2010). As in torch, `generator` serves
    the normals; which rows become zero always comes from the default generator.

    Args:
        tensor: shape (rows, columns), any floating dtype
        sparsity: fraction of each column's elements that become zero
        std: standard deviation of the other elements
        generator: where the words of the normals come from (default: torch's default generator), or
            a `Key`, which then decides which rows become zero, too

    Raises:
        ValueError: not two dimensions.
    """
    if written("sparse_", tensor, (sparsity, std), generator, moved):
        return tensor
    with source.turn(torch.default_generator, *_given(generator)):
        args = (sparsity, std)
        return leave_to_torch(ORIGINALS["sparse_"], "sparse_", tensor, args, generator)


def _no_grad_trunc_normal_(
    tensor: Tensor,
    mean: float,
    std: float,
    a: float,
    b: float,
    generator: Generator | None = None,
) -> Tensor:
    """Stand in for its namesake in torch.nn.init, which torch looks up at each call."""
    if written("trunc_normal_", tensor, (mean, std, a, b), generator, {}):
        return tensor
    return _their_trunc_normal_(tensor, mean, std, a, b, generator)


class _Upward:
    """The warnings module for torch's function called in our frame, which is not to count."""

    @staticmethod
    def warn(message: str, category: type[Warning] | None = None, stacklevel: int = 1) -> None:
        warnings.warn(message, category, stacklevel + 2)


def _in_our_frame(function: Any) -> Callable[..., Tensor]:
    """Return a copy of a function of torch whose warnings name the line they would without us."""
    names = {**function.__globals__, "warnings": _Upward}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__)


_their_trunc_normal_ = _in_our_frame(ORIGINALS["_no_grad_trunc_normal_"])


def _given(generator: Source) -> tuple[Generator, ...]:
    """Return the generator in a tuple, or none if it is the default generator."""
    is_own = isinstance(generator, Generator) and generator is not torch.default_generator
    return (cast(Generator, generator),) if is_own else ()


def _deprecated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return torch's function of the old name, with ours in it: so warnings name torch's line."""
    old: Any = ORIGINALS[function.__name__[:-1]]
    parts = dict(zip(old.__code__.co_freevars, old.__closure__)) | {"meth": CellType(function)}
    closure = tuple(parts[name] for name in old.__code__.co_freevars)
    alias = FunctionType(old.__code__, old.__globals__, old.__name__, None, closure)
    alias.__qualname__, alias.__module__ = old.__name__, __name__
    alias.__doc__ = f"Deprecated: the old name of `{function.__name__}`."
    return alias


uniform = _deprecated(uniform_)
normal = _deprecated(normal_)
constant = _deprecated(constant_)
eye = _deprecated(eye_)
dirac = _deprecated(dirac_)
xavier_uniform = _deprecated(xavier_uniform_)
xavier_normal = _deprecated(xavier_normal_)
kaiming_uniform = _deprecated(kaiming_uniform_)
kaiming_normal = _deprecated(kaiming_normal_)
orthogonal = _deprecated(orthogonal_)
sparse = _deprecated(sparse_)


def _for_dynamo(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what torch.compile is to trace in place of a function: torch's, but for a Key, with
    which the function is called outside of the graph.
    """

    def traced(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Key) for x in (*args, *kwargs.values())):
            torch_api.break_graph("the numbers of a fastinit.Key are not written by operators")
        return original(*args, **kwargs)

    return traced


# Signatures are torch's: `moved` is there for its error message only. Compilers get torch's code.
for _name in (*__all__, "_no_grad_trunc_normal_", "orthogonal_batched_"):
    _function = globals()[_name]
    if _name.endswith("_"):
        _sign = inspect.signature(_function)
        _kept = [p for p in _sign.parameters.values() if p.name != "moved"]
        _function.__signature__ = _sign.replace(parameters=_kept)
    torch_api.hide_from_dynamo(_function.__code__)  # when it is called from outside of a graph
    if _name in ORIGINALS:
        torch_api.compile_instead(
            _function, _for_dynamo(_function, ORIGINALS[_name]), ORIGINALS[_name]
        )
