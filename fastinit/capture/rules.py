# SPDX-License-Identifier: BSD-3-Clause
"""Which function initialises a module, and how it is called."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

import torch
from torch import nn

Fn = Callable[..., object]

# By these a model initialises all that is in it. transformers' init_weights calls the first and
# ties; the last is for one module, and `self.apply(self._init_weights)` is what its model does.
_OWN = ("initialize_weights", "init_weights", "_init_weights")
_RESET = ("reset_parameters", "_reset_parameters")
_GETATTR = nn.Module.__getattr__
_DEVICE = "buffer_device"  # torchtitan's init_weights and its relatives ask for it
_MODULES = frozenset(("m", "mod", "module", "layer", "l", "net", "model", "submodule", "child"))
_NO_MODULE = re.compile(r"\b(float|int|str|bool|device|dtype|Generator|Tensor)\b")


class Rule(NamedTuple):
    """A function, and whether it is called with each module, as by `apply`, or once."""

    fn: Fn
    is_once: bool
    text: str
    takes_device: bool = False

    def run(self, model: nn.Module, device: torch.device | None) -> None:
        if self.is_once:
            self.fn(**({_DEVICE: device} if self.takes_device else {}))
        else:
            model.apply(self.fn)  # type: ignore[arg-type]


def rule_of(fn: Fn, model: nn.Module) -> Rule:
    """Return how to call what the caller gave as `fn`. Raises TypeError, saying what to give."""
    if (  # most are a function of a module, and `inspect` takes as long as a few small layers
        type(fn) is FunctionType
        and fn.__code__.co_argcount == 1
        and not fn.__code__.co_kwonlyargcount
        and fn.__code__.co_varnames[0] in _MODULES
        and not hasattr(fn, "__wrapped__")
        and fn.__name__ not in vars(type(model))
    ):
        return Rule(fn, False, fn.__name__)
    name = getattr(fn, "__name__", None) or repr(fn)
    if isinstance(fn, nn.Module | type) or not callable(fn):
        given: object = fn
        hint = f"; for a seed write seed={given}" if isinstance(given, int) else ""
        if isinstance(given, str) and hasattr(type(model), given):
            hint = f"; write fn=model.{given}"
        raise TypeError(f"fn is a function or a method that initialises modules, not {name}{hint}")
    if getattr(fn, "__module__", "") in ("torch.nn.init", "fastinit.init"):
        raise TypeError(
            f"fn is called with each module, but {name} takes a tensor: give a function of a "
            f"module that calls {name} for its parameters"
        )
    if inspect.getattr_static(type(model), getattr(fn, "__name__", ""), None) is fn:
        fn = getattr(model, fn.__name__)  # Net.init_weights, of this model
    found = _rule(fn, _is_of_module(fn))
    if found is None:
        takes = ", ".join(inspect.signature(fn).parameters)
        raise TypeError(
            "fn is called with each module or, if it takes nothing, once; "
            f"{name} takes ({takes}): give the rest by functools.partial or a lambda"
        )
    return found


def _is_of_module(fn: Fn) -> bool:
    """Return whether it is a method of a module, also with some arguments given by `partial`."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return isinstance(getattr(fn, "__self__", None), nn.Module)


def _rule(fn: Fn, is_method: bool) -> Rule | None:
    """Return how to call a function; None if it takes more than a module."""
    text = (getattr(fn, "__qualname__", None) or repr(fn)).rpartition("<locals>.")[2]
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # of C
        return Rule(fn, False, text)
    takes_device = is_method and any(p.name == _DEVICE for p in parameters)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p for p in named if p.default is p.empty and not (takes_device and p.name == _DEVICE)]
    takes_one = any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in named)
    takes_one |= any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if not needed and (not takes_one or (is_method and named)):
        return Rule(fn, True, text, takes_device)
    if len(needed) > 1 or not takes_one or any(p.kind is p.KEYWORD_ONLY for p in needed):
        return None
    return Rule(fn, False, text)


def own_method(kind: type) -> tuple[str, str]:
    """Return the name of the method by which modules of a class initialise all that is in them.

    Then the call of one that looks like it, but takes what only the model knows. Both may be "".
    Attributes of instances do not count: wrappers hand on those of what they wrap.
    """
    unused = ""
    for name in _OWN:
        if not hasattr(kind, name):  # usually; the next takes longer than a small layer
            continue
        method = inspect.getattr_static(kind, name)
        is_static = isinstance(method, staticmethod | classmethod)
        function = method.__func__ if is_static else method
        if not isinstance(function, FunctionType):
            continue
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[0 if type(method) is staticmethod else 1 :]
        needed = [
            p
            for p in parameters
            if p.default is p.empty
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            and p.name != _DEVICE
        ]
        is_helper = is_static and len(parameters) > 1  # called with more than a module
        if not is_helper and (not needed or (len(needed) == 1 and _is_a_module(needed[0]))):
            return name, ""
        unused = unused or f"{kind.__name__}.{name}({', '.join(p.name for p in parameters)})"
    return "", unused


def _is_a_module(p: inspect.Parameter) -> bool:
    """Return whether an argument is a module, by its annotation or its name."""
    if p.annotation is p.empty:
        return p.name in _MODULES
    said = p.annotation if isinstance(p.annotation, str) else repr(p.annotation)
    return not _NO_MODULE.search(said)


def own(module: nn.Module, name: str) -> Rule:
    """Return how to call a module's own method of a name from `own_method`."""
    rule = _rule(getattr(module, name), True)
    assert rule is not None
    call = f"{type(module).__name__}.{name}({'' if rule.is_once else 'module'})"
    return rule._replace(text=call)


def forget_flags(model: nn.Module) -> None:
    """Remove the marks by which transformers skips what has been initialised before."""
    for m in model.modules():
        for x in (m, *m._parameters.values(), *m._buffers.values()):
            if x is not None:
                x.__dict__.pop("_is_hf_initialized", None)


def reset_parameters(module: nn.Module) -> None:
    """Ask a module to reset its own parameters, if it can.

    As `fn` it makes `init_model_`, `materialize_` and `record` call each module's
    `reset_parameters` (or, as some of torch's own, `_reset_parameters`) and nothing else, though
    the model may bring an `init_weights`.
    """
    method = resetting(module)
    if method is not None:
        method()


def resetting(module: nn.Module) -> Callable[[], object] | None:
    """Return the method by which a module resets its own parameters, if it has one."""
    kind = type(module)
    for name in _RESET:
        if kind.__getattr__ is _GETATTR and not hasattr(kind, name) and name not in vars(module):
            continue  # asking the module would take longer
        method = getattr(module, name, None)
        if callable(method):
            return method  # type: ignore[no-any-return]
    return None


def reset_adapters(model: nn.Module, module: nn.Module) -> None:
    """Ask a layer of peft to reset its LoRA: what they add is zero, whatever its linear layers do.

    `model` holds, somewhere, the configuration that says how.
    """
    method = getattr(module, "reset_lora_parameters", None)
    if method is None:
        return
    found = (m.__dict__.get("peft_config") for m in model.modules())
    configs: dict[str, object] = next(filter(None, found), {})
    both = (getattr(module, name, None) or () for name in ("lora_A", "lora_embedding_A"))
    for adapter in dict.fromkeys(key for names in both for key in names):
        how = getattr(configs.get(adapter), "init_lora_weights", True)
        how = how if how in (True, False, "gaussian", "orthogonal") else True  # others read weights
        method(*(adapter, how)[: len(inspect.signature(method).parameters)])
