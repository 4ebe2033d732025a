# SPDX-License-Identifier: BSD-3-Clause
"""The initialisation of a model by its own methods, or of what is missing in it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastinit.capture import rules
from fastinit.capture.missing import Device, Watch, stand_ins, tensors_of
from fastinit.capture.names import named_tensors
from fastinit.capture.rules import Rule

Ids = Container[int] | None  # of tensors; None: of all


class Initialisation:
    """Calls the functions that initialise a model, and notes which it has chosen.

    Args:
        model: any module
        missing: ids of the tensors that are to be written; what else there is stays as it is. None:
            all may be written
        watch: sees what is written of these
        device: for functions that ask for one
        anew: nothing is to depend on what was in these tensors before
    """

    def __init__(
        self,
        model: nn.Module,
        missing: Ids = None,
        watch: Watch | None = None,
        device: Device = None,
        anew: bool = False,
    ) -> None:
        self._model, self._missing, self._watch = model, missing, watch
        self._anew = anew
        self._device = None if device is None else torch.device(device)
        self._methods: dict[type, tuple[str, str, bool]] = {}
        self._done: set[int] = set()  # modules whose own method was called
        self._others = False  # something was reset beside what brings its own
        self.chosen: list[str] = []  # calls
        self._unused: dict[str, None] = {}  # methods that only the model can call

    def __call__(self, rule: Rule | None) -> None:
        if rule is not None:
            self.chosen.append(rule.text)
            with self._sparing(self._model, self._missing), self._watching():
                rule.run(self._model, self._where())
            return
        with nullcontext() if self._watch is None else self._watching():
            self._walk(self._model, self._missing)
        if self._others:
            self.chosen.append("reset_parameters of each module")

    def _walk(self, m: nn.Module, missing: Ids) -> None:
        """Initialise what is in a module, or what of it is missing."""
        if missing is not None and not any(id(t) in missing for t in tensors_of(m)):
            return
        kind = type(m)
        methods = self._methods.get(kind)
        if methods is None:
            methods = (*rules.own_method(kind), hasattr(kind, "reset_lora_parameters"))
            self._methods[kind] = methods
        own, unused, has_adapters = methods
        if own:
            if id(m) not in self._done:  # it may be in several places
                self._done.add(id(m))
                self._run_own(m, own, missing)
            return
        if unused:
            self._unused[unused] = None
        for child in m.children():
            self._walk(child, missing)
        self._reset(m, missing)
        if has_adapters:
            with self._sparing(m, missing):
                rules.reset_adapters(self._model, m)

    def _reset(self, m: nn.Module, missing: Ids) -> None:
        method = rules.resetting(m)
        if method is not None:
            self._others = True
            with self._sparing(m, missing):
                method()

    def _run_own(self, m: nn.Module, name: str, missing: Ids) -> None:
        """Call a module's own method, then reset what that left alone.

        What it reads, or changes without overwriting it, is reset before, as in a constructor; what
        it overwrites in part is reset but for that.
        """
        if self._watch is None:
            self._watch = Watch(tensors_of(self._model))
        watch = self._watch
        rule = rules.own(m, name)
        path = next(path for path, x in self._model.named_modules() if x is m)
        resets = self._resets(m, missing) if self._anew else []
        with self._sparing(m, missing), self._watching(), watch.expecting(resets):
            rules.forget_flags(m)
            rule.run(m, self._where())
            for x in m.modules():
                rules.reset_adapters(self._model, x)
        self.chosen.append(f"{path}: {rule.text}" if path else rule.text)
        named = [s for s in named_tensors(m) if missing is None or id(s[3]) in missing]
        left = {id(t): n for n, _, _, t in named if not watch.is_written(t)}
        if not left:
            return
        others = self._others
        with self._watching():
            for t, complete in self._resets(m, left) if self._anew else ():
                if watch.is_changed(t):
                    complete()
            untouched = {id(t) for _, _, _, t in named if not watch.is_changed(t)}
            for child in m.children() if untouched else ():
                self._walk(child, untouched)
            if untouched:
                self._reset(m, untouched)
        self._others = others
        done = [n for n, _, _, t in named if id(t) in left and watch.is_written(t)]
        if done:
            more = f" and {len(done) - 3} more" if len(done) > 3 else ""
            shown = ", ".join(f"{path}.{n}" if path else n for n in done[:3])
            self.chosen.append(f"reset_parameters for what that left: {shown}{more}")

    def _resets(self, m: nn.Module, missing: Ids) -> list[tuple[Tensor, Callable[[], None]]]:
        """Return what is missing in a module, and functions that reset what nobody has written."""
        watch = self._watch
        assert watch is not None
        return [
            (t, functools.partial(watch.complete, t, functools.partial(self._reset, x, {id(t)})))
            for _, x, _, t in named_tensors(m)
            if (missing is None or id(t) in missing) and not watch.is_written(t)
        ]

    def _sparing(self, m: nn.Module, missing: Ids) -> AbstractContextManager[None]:
        if missing is None or all(id(t) in missing for t in tensors_of(m)):
            return nullcontext()
        assert self._watch is not None
        return stand_ins(m, missing, self._watch)

    def _watching(self) -> AbstractContextManager[None]:
        return nullcontext() if self._watch is None else self._watch.on()

    def _where(self) -> torch.device:
        """Return the device for functions that ask for one: the caller's, or the model's."""
        devices = (t.device for t in tensors_of(self._model) if not t.is_meta)
        return self._device or next(devices, torch.device("cpu"))

    def warn(self, level: int) -> None:
        """Say which methods look like an initialisation of the model and were not called."""
        for call in self._unused:
            warnings.warn(
                f"{call} is not called, since it takes what only the model knows; modules were "
                "reset by their reset_parameters. Pass a `fn`, or "
                "fn=fastinit.reset_parameters if this is right.",
                stacklevel=level,
            )
