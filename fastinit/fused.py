# SPDX-License-Identifier: BSD-3-Clause
"""fused(): the scope in which fills wait."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from contextlib import ContextDecorator
from types import TracebackType

import torch
from torch import Tensor, nn

from fastinit.capture import emptied, hooks
from fastinit.capture.capture import Capture
from fastinit.capture.keyed import KeyedCapture, SeededCapture
from fastinit.capture.report import Report
from fastinit.core import switch, torch_api
from fastinit.core.key import Key
from fastinit.core.recording import set_recorder, this_thread, told


class fused(ContextDecorator):
    """Write whatever is initialised in this scope once, at its end, with the same bits.

    Args:
        progress: show a bar (with tqdm, if installed) while writing what waited until the end
        seed: take the numbers of the keyed stream instead of torch's; see `Key`
        prefix: put before the names of parameters that keys are made of
        strip: left out at the beginning of these names, for a model that is within another one:
            `strip="model."` gives what a LightningModule has as `self.model` its own names
        watch: see every operator from the beginning, not from the first large fill; small models
            take longer then, but the report has all of them, and `check` misses none
        orthogonal: "torch" or "native": who writes orthogonal_ in this scope, whatever
            `set_orthogonal` says; has no meaning with a seed

    Until a fill is worth it (on the CPU 32,768 elements drawn by torch.nn.init, `uniform_` or
    `normal_`; on a GPU any), nothing changes. From then on every in-place fill of a tensor that
    reaches torch, by whatever name, is recorded instead of run, and so are pointwise operators
    with numbers, conversions and copies of what waits; generators move on at once. All of it is
    written at the end of the scope in one threaded pass (on a GPU in one kernel launch), or as soon
    as something could see it: an operator, `.numpy()`, a new thread. It is never written if another
    fill overwrites it first or its memory is freed. Small fills (on the CPU fewer than 8,192
    elements), tensors from before whose memory somebody else knows, too, and those on devices other
    than CPU and CUDA are filled when asked for. Afterwards everything is as if the code had run
    without it: values, version counters, generators, warnings, exceptions. If the code raises, what
    was asked for so far is written.

    Entering gives a `Report`. A scope inside another joins it. It is a decorator, too.

    Two readers are not seen: threads that ran before the scope, and native code that got a tensor
    by other ways than an operator, `data_ptr()` and the like, or its address before the scope.

    Raises:
        RuntimeError: a seed, or a choice for orthogonal_, where nothing can be recorded (another
            dispatch mode, a tracer or transform is active), or another than the scope around has.
        ValueError: a seed that is none, or a choice that is neither.

        >>> import torch, fastinit
        >>> with fastinit.fused() as report:
        ...     model = torch.nn.Linear(1000, 1000)
        ...     _ = torch.nn.init.xavier_normal_(model.weight)
        >>> report.written_elements, report.dropped_elements
        (1000000, 1000000)
    """

    def __init__(
        self,
        *wrong: object,
        progress: bool = False,
        seed: int | None = None,
        prefix: str = "",
        strip: str = "",
        watch: bool = False,
        orthogonal: str | None = None,
    ) -> None:
        if wrong:
            what = getattr(wrong[0], "__name__", repr(wrong[0]))
            hint = "fused(seed=...)" if not isinstance(wrong[0], int) else f"fused(seed={what})"
            hint = f"@fused() before {what}" if callable(wrong[0]) else hint
            raise TypeError(f"fused takes what it is given by name, not {what}: write {hint}")
        self._progress = progress
        self._seed = None if seed is None else Key(seed).seed
        self._prefix, self._strip = prefix, strip
        self._watch = watch or seed is not None
        self._orthogonal = None if orthogonal is None else switch.checked(orthogonal)
        self._adopted: Iterable[Tensor] = ()
        self._model: nn.Module | None = None
        # What each entry began or joined; of one that was joined what it had for orthogonal_.
        self._entered: list[tuple[Capture | Report, str | None]] = []

    def _recreate_cm(self) -> fused:  # of a decorated function, which may recurse or have threads
        how = {"progress": self._progress, "seed": self._seed, "prefix": self._prefix}
        return fused(**how, strip=self._strip, watch=self._watch, orthogonal=self._orthogonal)  # type: ignore[arg-type]

    def __enter__(self) -> Report:
        outer = this_thread.recorder
        if isinstance(outer, Capture):
            return self._join(outer)
        report = Report(progress=self._progress, reason=_why_not(), prefix=self._prefix)
        report.strip = self._strip
        if self._model is not None:
            report.roots.append((weakref.ref(self._model), self._prefix, self._strip))
            report.is_about_models = True
        if report.reason and self._seed is not None:
            raise RuntimeError(f"a block with a seed has to see every operator: {report.reason}")
        if report.reason and self._orthogonal is not None:
            raise RuntimeError(f"a block with a choice for orthogonal_: {report.reason}")
        if report.reason:
            self._entered.append((report, None))
        else:
            self._begin(report)
        return report

    def _join(self, outer: Capture) -> Report:
        """Make this scope a part of the one around."""
        if self._seed is not None and self._seed != outer.seed:
            raise RuntimeError("a block with a seed inside a block with another or none")
        if self._model is not None:
            outer.report.roots.append((weakref.ref(self._model), self._prefix, self._strip))
        elif self._prefix not in ("", outer.report.prefix):
            raise RuntimeError("a block with a prefix inside a block with another or none")
        elif self._strip not in ("", outer.report.strip):
            raise RuntimeError("a block with a strip inside a block with another or none")
        if self._watch:
            outer.begin()
        self._entered.append((outer.report, outer.orthogonal))
        try:
            if self._orthogonal is not None:
                outer.orthogonal = self._orthogonal
            outer.pending.adopt_all(self._adopted)
        except BaseException:
            self._leave()
            raise
        return outer.report

    def _begin(self, report: Report) -> None:
        """Make this scope the outermost of the thread: stand-ins, recorder and mode."""
        capture = (
            KeyedCapture(report, None, self._watch)
            if self._seed is None
            else SeededCapture(report, self._seed)
        )
        capture.orthogonal = self._orthogonal
        capture.pending.adopt_all(self._adopted)
        self._entered.append((capture, None))
        try:
            hooks.begin_scope(capture)
            told.append(capture)
            set_recorder(capture)
            if self._watch or emptied.left():
                capture.begin()
        except BaseException:
            self._leave()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        """Leave what a KeyboardInterrupt kept from being left, as soon as nobody handles it."""
        while getattr(self, "_entered", None) and not sys.is_finalizing():
            self._leave()

    def _leave(self) -> None:
        """Undo the last entry, or what has been done of it; an interrupted call may be repeated."""
        entered, orthogonal = self._entered[-1]
        outer = this_thread.recorder
        if isinstance(entered, Capture):
            try:
                if outer is entered and not entered.is_closed:
                    entered.close()
            except KeyboardInterrupt:
                if not entered.is_closed:  # it came before `close` could deal with it, or after
                    entered.close()
                raise
            finally:  # even if writing fails, the rest is undone
                _undo(entered)
        elif isinstance(outer, Capture) and outer.report is entered:
            outer.orthogonal = orthogonal
            if self._adopted:
                outer.pending.adopt_no_more()
        del self._entered[-1]


def _undo(capture: Capture) -> None:
    """Leave nothing of a scope in torch; may be called again."""
    capture.leave()
    hooks.end_scope(capture)
    if capture in told:
        told.remove(capture)
    if this_thread.recorder is capture:
        set_recorder(None)


def _why_not() -> str:
    """Return why nothing can be captured here, or "" if it can."""
    if this_thread.recorder is not None:
        return "a Plan is being recorded"
    if torch.compiler.is_compiling() or torch_api.tracing_state() is not None:
        return "the code is being traced"
    if torch_api.dispatch_modes() != 0:
        return "a dispatch mode is active that has to see every operator"
    if torch_api.transform() is not None:
        return "a functorch transform is active"
    return ""


def adopting(
    tensors: Iterable[Tensor],
    model: nn.Module | None = None,
    seed: int | None = None,
    prefix: str = "",
    strip: str = "",
    orthogonal: str | None = None,
) -> fused:
    """Return a scope in which fills of these tensors may wait as well, though they are older.

    The caller holds them while it lasts. Its report is about the model.
    """
    scope = fused(seed=seed, prefix=prefix, strip=strip, watch=True, orthogonal=orthogonal)
    scope._adopted, scope._model = tensors, model
    return scope
