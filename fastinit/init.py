# SPDX-License-Identifier: BSD-3-Clause
"""The functions of torch.nn.init: same signatures, same bits (orthogonal_: up to rounding), same
errors.

Each builds a fill of what torch's function would write. If that kind of fill is proved equal
(probe.py) it runs natively, now or when the plan that records it does; whatever is unusual (other
devices, dtypes, layouts, subclasses, modes, arguments out of range) is passed on to torch as it is.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Generator, Tensor
from torch.nn import Parameter
from torch.nn import init as _torch_init

from fastinit import execute, probe
from fastinit.core import build, geometry, kernels, laws, recording, source
from fastinit.core import fill as fill_
from fastinit.core.fill import Fill
from fastinit.core.key import Key
from fastinit.cpu import qr as cpu_qr

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

# torch's own functions, whatever torch.nn.init is patched with later.
_torch = SimpleNamespace(**{name: getattr(_torch_init, name) for name in __all__})
_torch_trunc_normal = _torch_init._no_grad_trunc_normal_

_Block = tuple[Sequence[int] | None, Sequence[int] | None]  # global_shape, offset
_PLAIN = frozenset((Tensor, Parameter))
_CONSTANT = 512  # times as many elements until torch's own fill_ costs more than a look at it


def _is_large(t: Any, whole: object = None, at_least: int = 1) -> bool:
    """Worth a look: a plain tensor, of some size unless it is one of many, and nobody watches.

    `whole`: what it is a part of; parts are never filled with torch's numbers.
    `at_least`: in units of what a simple fill has to have; 0: any element at all.
    """
    if whole is not None or type(t) not in _PLAIN or torch._C._len_torch_function_stack() != 0:
        return False  # before t.numel() would be seen
    n = t.numel()
    recorder = recording.this_thread.recorder
    if recorder is not None and recorder.seed is not None:
        return False
    if recorder is not None and at_least != 0:
        large = recorder.takes(t)
    else:
        large = n >= at_least * geometry.least(geometry.device_of(t))
    return large and n != 0 and not torch.compiler.is_compiling() and recording.modes_allow()


def _run(*fills: Fill | None) -> bool:
    """Run or record the fills, if all of them can be done natively with torch's bits."""
    proved = []
    for fill in fills:
        fill = probe.proved(fill)
        if fill is None:
            return False
        proved.append(fill)
    recorder = recording.this_thread.recorder
    if recorder is not None:
        recorder.add(proved)
        return True
    execute.run(proved)
    return True


def _pass_on(
    function: Callable[..., Tensor], tensor: Tensor, *args: Any, block: _Block = (None, None)
) -> Tensor:
    """Call torch's function, or record the call; or fill with the numbers of a Key."""
    recorder = recording.this_thread.recorder
    generator = args[-1] if args else None  # it comes last
    seeded = recorder is not None and recorder.seed is not None
    if block != (None, None) or isinstance(generator, Key):
        return _fill_keyed(function.__name__, tensor, args, *block)
    if seeded and (not isinstance(generator, Generator) or source.is_default(generator)):
        return _fill_keyed(function.__name__, tensor, args)
    if recorder is None:
        with source.default_lock if generator is None else source.lock_of(generator):
            return function(tensor, *args)
    call = functools.partial(function, tensor, *args)
    overwrites = function in (_orthogonal, _torch.orthogonal_)
    recorder.call(call, tensor, overwrites)
    return tensor


def _fill_keyed(
    function: str,
    tensor: Tensor,
    args: Sequence[Any],
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """`args`: with the generator last, if the function has one."""
    key = args[-1] if args and isinstance(args[-1], Key) else None
    rest = args[:-1] if laws.draws(function) else args
    recorder = recording.this_thread.recorder
    if recorder is None:
        return execute.fill_keyed(function, tensor, rest, key, global_shape, offset)
    recorder.fill_keyed(function, tensor, rest, key, (global_shape, offset))
    return tensor


def calculate_gain(nonlinearity: Any, param: int | float | None = None) -> float:
    """Return the recommended gain for a nonlinearity; `torch.nn.init.calculate_gain`.

    Args:
        nonlinearity: linear, conv{1,2,3}d, conv_transpose{1,2,3}d, sigmoid (1), tanh (5/3),
            relu (sqrt 2), leaky_relu (sqrt(2 / (1 + slope^2))) or selu (3/4)
        param: the slope of leaky_relu (default 0.01)

    Raises:
        ValueError: unknown nonlinearity, or `param` is not a number.
    """
    return cast(float, _torch.calculate_gain(nonlinearity, param))


def uniform_(
    tensor: Tensor,
    a: float = 0.0,
    b: float = 1.0,
    generator: Generator | Key | None = None,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill `tensor` in place with U[a, b) and return it; `torch.nn.init.uniform_`.

    Args:
        tensor: any shape; float32, float64, bfloat16 and float16 are filled natively
        a: lower bound
        b: upper bound
        generator: where the words come from (default: torch's default generator), or a `Key`
        global_shape, offset: with a `Key`, of which whole the tensor is a part, and where in it

    Raises:
        RuntimeError: a > b, a bound outside the dtype's range, or an integer dtype.
    """
    if _is_large(tensor, global_shape) and _run(build.uniform(tensor, a, b, generator)):
        return tensor
    return _pass_on(_torch.uniform_, tensor, a, b, generator, block=(global_shape, offset))


def normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    generator: Generator | Key | None = None,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill `tensor` in place with N(mean, std^2) and return it; `torch.nn.init.normal_`.

    Args:
        tensor: any shape; float32, float64, bfloat16 and float16 are filled natively
        mean: of the distribution
        std: of the distribution, not negative
        generator: where the words come from (default: torch's default generator), or a `Key`
        global_shape, offset: with a `Key`, of which whole the tensor is a part, and where in it

    Raises:
        RuntimeError: std < 0, or an integer dtype.
    """
    if _is_large(tensor, global_shape) and _run(build.normal(tensor, mean, std, generator)):
        return tensor
    return _pass_on(_torch.normal_, tensor, mean, std, generator, block=(global_shape, offset))


def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Generator | Key | None = None,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
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
        global_shape, offset: with a `Key`, of which whole the tensor is a part, and where in it

    Returns:
        `tensor`, filled in place.

    Raises:
        RuntimeError: std < 0, or an integer dtype.

    Warns:
        UserWarning: the mean is more than two std outside [a, b].
    """
    if _is_large(tensor, global_shape) and _run_truncated(tensor, mean, std, a, b, generator):
        return tensor
    return _pass_on(
        _torch.trunc_normal_, tensor, mean, std, a, b, generator, block=(global_shape, offset)
    )


def _run_truncated(tensor: Tensor, *args: Any) -> bool:
    """By rejection, or on a GPU before torch 2.12 by the inverse of the distribution."""
    if _run(build.trunc_normal(tensor, *args)):
        return True
    return geometry.device_of(tensor) >= 0 and _run(build.trunc_erfinv(tensor, *args))


def constant_(
    tensor: Tensor,
    val: float,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill `tensor` (any shape, any dtype) with `val` and return it; `torch.nn.init.constant_`.

    A part of a constant is constant: `global_shape` and `offset` are only checked.

    Raises:
        RuntimeError: the dtype cannot hold `val`.
    """
    if _is_large(tensor, global_shape, _CONSTANT) and _run(build.constant(tensor, val)):
        return tensor
    return _pass_on(_torch.constant_, tensor, val, block=(global_shape, offset))


def ones_(
    tensor: Tensor,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill `tensor` (any shape, any dtype) with 1 and return it; `torch.nn.init.ones_`.

    A part of a constant is constant: `global_shape` and `offset` are only checked.

    Raises:
        RuntimeError: torch cannot write to such a tensor in place.
    """
    if _is_large(tensor, global_shape, _CONSTANT) and _run(build.constant(tensor, 1.0)):
        return tensor
    return _pass_on(_torch.ones_, tensor, block=(global_shape, offset))


def zeros_(
    tensor: Tensor,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill `tensor` (any shape, any dtype) with 0 and return it; `torch.nn.init.zeros_`.

    A part of a constant is constant: `global_shape` and `offset` are only checked.

    Raises:
        RuntimeError: torch cannot write to such a tensor in place.
    """
    if _is_large(tensor, global_shape, _CONSTANT) and _run(build.constant(tensor, 0.0)):
        return tensor
    return _pass_on(_torch.zeros_, tensor, block=(global_shape, offset))


def eye_(
    tensor: Tensor,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Make a matrix the identity and return it; `torch.nn.init.eye_`.

    Args:
        tensor: shape (rows, columns), any dtype
        global_shape, offset: of which whole the tensor is a part, and where in it

    Raises:
        ValueError: not two dimensions.
    """
    if _is_large(tensor, global_shape) and tensor.dim() == 2 and _run(build.diagonal(tensor, 0)):
        return tensor
    return _pass_on(_torch.eye_, tensor, block=(global_shape, offset))


def dirac_(
    tensor: Tensor,
    groups: int = 1,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Make a convolution pass its input through; `torch.nn.init.dirac_`.

    Args:
        tensor: shape (out channels, in channels / groups, *kernel) with 1 to 3 kernel dimensions,
            any dtype
        groups: of the convolution; each keeps as many of its channels as fit
        global_shape, offset: of which whole the tensor is a part, and where in it

    Raises:
        ValueError: other numbers of dimensions, or out channels not divisible by `groups`.
    """
    if (
        _is_large(tensor, global_shape)
        and tensor.dim() in (3, 4, 5)
        and type(groups) is int
        and groups > 0
        and tensor.shape[0] % groups == 0
        and _run(build.diagonal(tensor, groups))
    ):
        return tensor
    return _pass_on(_torch.dirac_, tensor, groups, block=(global_shape, offset))


def xavier_uniform_(
    tensor: Tensor,
    gain: float = 1.0,
    generator: Generator | Key | None = None,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill with U(-a, a), a = gain sqrt(6 / (fan_in + fan_out)); `torch.nn.init.xavier_uniform_`.

    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks"
    (2010).

    Args:
        tensor: shape (fan_out, fan_in, *kernel), any floating dtype
        gain: scaling factor, see `calculate_gain`
        generator: where the words come from (default: torch's default generator), or a `Key`
        global_shape, offset: with a `Key`, of which whole the tensor is a part, and where in it

    Raises:
        ValueError: fewer than two dimensions.
    """
    if _is_large(tensor, global_shape) and tensor.dim() >= 2:
        a = math.sqrt(3.0) * laws.xavier_std(tensor, gain)
        if _run(build.uniform(tensor, -a, a, generator)):
            return tensor
    return _pass_on(_torch.xavier_uniform_, tensor, gain, generator, block=(global_shape, offset))


def xavier_normal_(
    tensor: Tensor,
    gain: float = 1.0,
    generator: Generator | Key | None = None,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill with N(0, std^2), std = gain sqrt(2 / (fan_in + fan_out)).

    `torch.nn.init.xavier_normal_`; Glorot and Bengio (2010), as `xavier_uniform_`.

    Args:
        tensor: shape (fan_out, fan_in, *kernel), any floating dtype
        gain: scaling factor, see `calculate_gain`
        generator: where the words come from (default: torch's default generator), or a `Key`
        global_shape, offset: with a `Key`, of which whole the tensor is a part, and where in it

    Raises:
        ValueError: fewer than two dimensions.
    """
    if _is_large(tensor, global_shape) and tensor.dim() >= 2:
        std = laws.xavier_std(tensor, gain)
        if _run(build.normal(tensor, 0.0, std, generator)):
            return tensor
    return _pass_on(_torch.xavier_normal_, tensor, gain, generator, block=(global_shape, offset))


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: Any = "fan_in",
    nonlinearity: Any = "leaky_relu",
    generator: Generator | Key | None = None,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill with U(-bound, bound), bound = gain sqrt(3 / fan); `torch.nn.init.kaiming_uniform_`.

    He et al., "Delving deep into rectifiers" (2015).

    Args:
        tensor: shape (fan_out, fan_in, *kernel), any floating dtype
        a: negative slope of the rectifier, used with leaky_relu only
        mode: "fan_in" keeps the variance in the forward pass, "fan_out" in the backward pass
        nonlinearity: see `calculate_gain`
        generator: where the words come from (default: torch's default generator), or a `Key`
        global_shape, offset: with a `Key`, of which whole the tensor is a part, and where in it

    Raises:
        ValueError: fewer than two dimensions, unknown mode or nonlinearity.

    Warns:
        UserWarning: the tensor has no elements; nothing is done.
    """
    if _is_large(tensor, global_shape):
        bound = math.sqrt(3.0) * laws.kaiming_std(tensor, a, mode, nonlinearity)
        if _run(build.uniform(tensor, -bound, bound, generator)):
            return tensor
    elif _has_no_elements(tensor, global_shape):
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=2)
        return tensor
    return _pass_on(
        _torch.kaiming_uniform_,
        tensor,
        a,
        mode,
        nonlinearity,
        generator,
        block=(global_shape, offset),
    )


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: Any = "fan_in",
    nonlinearity: Any = "leaky_relu",
    generator: Generator | Key | None = None,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill with N(0, std^2), std = gain / sqrt(fan); `torch.nn.init.kaiming_normal_`.

    He et al. (2015), as `kaiming_uniform_`.

    Args:
        tensor: shape (fan_out, fan_in, *kernel), any floating dtype
        a: negative slope of the rectifier, used with leaky_relu only
        mode: "fan_in" keeps the variance in the forward pass, "fan_out" in the backward pass
        nonlinearity: see `calculate_gain`
        generator: where the words come from (default: torch's default generator), or a `Key`
        global_shape, offset: with a `Key`, of which whole the tensor is a part, and where in it

    Raises:
        ValueError: fewer than two dimensions, unknown mode or nonlinearity.

    Warns:
        UserWarning: the tensor has no elements; nothing is done.
    """
    if _is_large(tensor, global_shape):
        std = laws.kaiming_std(tensor, a, mode, nonlinearity)
        if _run(build.normal(tensor, 0.0, std, generator)):
            return tensor
    elif _has_no_elements(tensor, global_shape):
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=2)
        return tensor
    return _pass_on(
        _torch.kaiming_normal_,
        tensor,
        a,
        mode,
        nonlinearity,
        generator,
        block=(global_shape, offset),
    )


def _has_no_elements(t: Any, whole: object) -> bool:
    """torch warns about these at the line of its caller, which has to be ours."""
    return (
        whole is None
        and type(t) in _PLAIN
        and torch._C._len_torch_function_stack() == 0
        and bool(t.numel() == 0)
    )


def orthogonal_(
    tensor: Tensor,
    gain: float = 1,
    generator: Generator | Key | None = None,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill with a (semi-)orthogonal matrix times gain; `torch.nn.init.orthogonal_`.

    Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks" (2013); uniform by the Haar measure after Mezzadri, arXiv math-ph/0609050.

    Args:
        tensor: shape (rows, *columns), float32, float64, bfloat16 or float16 (which are computed in
            float32 and rounded once; torch raises for them); trailing dimensions are flattened
        gain: scaling factor
        generator: where the words come from (default: torch's default generator), or a `Key`
        global_shape, offset: with a `Key`, of which whole the tensor is a part, and where in it

    The same matrix as torch's, up to rounding: docs/reproducibility.md says how far.

    Raises:
        ValueError: fewer than two dimensions.
        RuntimeError: other dtypes.
    """
    if not (_is_large(tensor, global_shape, 0) and tensor.dim() >= 2):
        return _pass_on(_torch.orthogonal_, tensor, gain, generator, block=(global_shape, offset))
    if isinstance(generator, Key):
        return _fill_keyed("orthogonal_", tensor, (gain, generator))
    if _run(build.orthogonal(tensor, gain, generator, tensor.shape[0])):
        return tensor
    native = geometry.accepts(tensor, inference=True) and geometry.device_of(tensor) < 0
    rows = tensor.shape[0]
    native = native and not build.is_narrow(rows, tensor.numel() // rows, tensor.dtype)
    if native:
        flat = (rows, tensor.numel() // rows)
        return _pass_on(_orthogonal, tensor, flat, gain, generator)
    return _pass_on(_torch.orthogonal_, tensor, gain, generator, block=(global_shape, offset))


def orthogonal_batched_(
    tensor: Tensor,
    gain: float = 1,
    generator: Generator | Key | None = None,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill every matrix of a batch with an orthogonal matrix of its own; torch has no such.

    For weights of experts or layers that are stacked, which `orthogonal_` would flatten into one
    matrix. The normals are those of `torch.randn(tensor.shape)`, so that, on the CPU, for rows *
    cols a multiple of 16 the matrices are those of `orthogonal_` on one after the other.

    Args:
        tensor: shape (..., rows, cols), any dtype that `orthogonal_` takes
        gain: scaling factor
        generator: where the words come from (default: torch's default generator), or a `Key`
        global_shape, offset: with a `Key`, of which whole the tensor is a part, and where in it

    Raises:
        ValueError: fewer than two dimensions.
        RuntimeError: other dtypes.
    """
    recorder = recording.this_thread.recorder
    seeded = recorder is not None and recorder.seed is not None and generator is None
    if seeded or isinstance(generator, Key) or global_shape is not None:
        args = (gain, generator)
        return _fill_keyed("orthogonal_batched_", tensor, args, global_shape, offset)
    if tensor.dim() < 2:
        raise ValueError("Only tensors with 2 or more dimensions are supported")
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor
    if tensor.dtype not in geometry.DTYPES:
        return _pass_on(_torch.orthogonal_, tensor, gain, generator)  # says what is wrong
    if _is_large(tensor, None, 0):
        rows, cols = tensor.shape[-2:]
        count = tensor.numel() // (rows * cols)
        if _run(build.orthogonal(tensor, gain, generator, rows, count)):
            return tensor
    return _pass_on(_orthogonal, tensor, tensor.shape, gain, generator)


def _orthogonal(
    tensor: Tensor, shape: Sequence[int], gain: float, generator: Generator | None
) -> Tensor:
    """For what is no plain memory to write to: in memory of its own, and copied.

    `shape`: (..., rows, cols), as which the tensor is seen.
    """
    with torch.no_grad():
        q, rest = _factor(shape, tensor, gain, generator)
        tensor.view_as(q).copy_(q)
        return tensor.mul_(rest)  # torch counts two versions


def _factor(
    shape: Sequence[int], like: Tensor, gain: float, generator: Generator | None
) -> tuple[Tensor, float]:
    """Matrices of such a shape, and what they have still to be multiplied by."""
    plain = type(like) in _PLAIN and like.is_cpu and not torch.compiler.is_compiling()
    plain = plain and recording.modes_allow() and geometry.accepts(like, inference=True)
    with kernels.undisturbed() if plain else nullcontext():  # so that nothing waits
        drawn = like.new_empty(shape, dtype=fill_.gaussian_dtype(like.dtype))
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
    tensor: Tensor,
    sparsity: float,
    std: float = 0.01,
    generator: Generator | Key | None = None,
    *,
    global_shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> Tensor:
    """Fill a matrix with N(0, std^2) and zero part of each column; `torch.nn.init.sparse_`.

    Martens, "Deep learning via Hessian-free optimization" (2010). As in torch, `generator` serves
    the normals; which rows become zero always comes from the default generator.

    Args:
        tensor: shape (rows, columns), any floating dtype
        sparsity: fraction of each column's elements that become zero
        std: of the others
        generator: where the words of the normals come from (default: torch's default generator), or
            a `Key`, which then decides which rows become zero, too
        global_shape, offset: with a `Key`, of which whole the tensor is a part, and where in it

    Raises:
        ValueError: not two dimensions.
    """
    if (
        _is_large(tensor, global_shape)
        and tensor.dim() == 2
        and type(sparsity) in (int, float)
        and 0 <= sparsity <= 1
        and _run_sparse(tensor, math.ceil(sparsity * tensor.shape[0]), std, generator)
    ):
        return tensor
    with source.turn(torch.default_generator, *_given(generator)):
        return _pass_on(
            _torch.sparse_, tensor, sparsity, std, generator, block=(global_shape, offset)
        )


def _run_sparse(tensor: Tensor, zeros: int, std: float, generator: object) -> bool:
    if geometry.device_of(tensor) >= 0:
        return _run(build.sparse(tensor, std, zeros, generator))
    return _run(build.normal(tensor, 0.0, std, generator), build.sparse_mask(tensor, zeros))


def _no_grad_trunc_normal_(
    tensor: Tensor,
    mean: float,
    std: float,
    a: float,
    b: float,
    generator: Generator | None = None,
) -> Tensor:
    """Stands for its namesake in torch.nn.init, which is looked up at each call, while hooked."""
    recorder = recording.this_thread.recorder
    if recorder is not None and recorder.seed is not None and generator is None:
        return _fill_keyed("trunc_normal_", tensor, (mean, std, a, b, None))
    if _is_large(tensor) and _run_truncated(tensor, mean, std, a, b, generator):
        return tensor
    return _torch_trunc_normal(tensor, mean, std, a, b, generator)


def _given(generator: object) -> tuple[Generator, ...]:
    own = isinstance(generator, Generator) and generator is not torch.default_generator
    return (cast(Generator, generator),) if own else ()


def _deprecated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    new, old = function.__name__, function.__name__[:-1]

    def alias(*args: Any, **kwargs: Any) -> Tensor:
        warnings.warn(
            f"`nn.init.{old}` is now deprecated in favor of `nn.init.{new}`.",
            FutureWarning,
            stacklevel=2,
        )
        return function(*args, **kwargs)

    alias.__name__ = alias.__qualname__ = old
    alias.__doc__ = f"Deprecated: the old name of `{new}`."
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
