# SPDX-License-Identifier: BSD-3-Clause
"""Plans: fills that are recorded once and run together, again and again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastinit import execute, init
from fastinit.capture import names
from fastinit.capture.capture import Capture
from fastinit.capture.hooks import hooked
from fastinit.capture.initialisation import Initialisation
from fastinit.capture.missing import tensors_of
from fastinit.capture.names import named_tensors
from fastinit.capture.rules import Fn
from fastinit.capture.walk import Walk
from fastinit.core import geometry, keyed_numbers, laws, recording, shard, source, torch_api
from fastinit.core.fill import Fill, Room
from fastinit.core.key import Key, derived
from fastinit.core.laws import Law
from fastinit.core.recording import Call, Recorder
from fastinit.core.work import Work
from fastinit.cpu import fills as cpu_fills
from fastinit.model import checked

_MOVED = (
    "a tensor of the plan has other memory or another shape than when it was recorded; record the "
    "plan anew"
)


class _Fills(NamedTuple):
    """The step of a call that runs natively: its fills and their law."""

    law: Law
    fills: list[Fill]
    extents: list[tuple[int, int]]  # of the fills' memory when they were recorded

    def has_moved(self) -> bool:
        return self.extents != [fill.extent for fill in self.fills]


class _FillKeyed(NamedTuple):
    """The step of a call with a Key."""

    law: Law
    tensor: Tensor
    key: Key

    def __call__(self) -> None:
        execute.fill_keyed(self.law, self.tensor, self.key)


_Step = _Fills | _FillKeyed | Call | Callable[[], object]


class Plan(Recorder):
    """Fills that are recorded first and run together, in the order they were recorded.

    Has a method for every function of torch.nn.init that fills a tensor, with its signature:

        >>> import torch, fastinit
        >>> plan = fastinit.Plan()
        >>> w, b = torch.empty(256, 128), torch.empty(256)
        >>> _ = plan.kaiming_normal_(w, nonlinearity="relu")
        >>> _ = plan.zeros_(b)
        >>> len(plan)
        2
        >>> plan.run()

    `run` gives what the same calls one by one would have given, generators included, and may be
    called again: it then draws on from where the generators are. Errors are raised when the call is
    recorded if they show then, otherwise by `run`, where that call has its place. The tensors must
    keep their memory and shape while the plan is used; `run` raises RuntimeError otherwise (where
    all of them are on one GPU it looks at their memory only). Such a plan is one kernel launch.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []  # one for each call
        self._places: list[tuple[Tensor, tuple[object, ...]]] = []  # of what must not move
        self._prepared: execute.Prepared | None = None  # on one GPU
        self._packed: cpu_fills.Batch | None = None  # on the CPU
        self._on_gpu = False
        self._names: list[tuple[str, Tensor]] = []  # for keys

    def add(self, fills: list[Fill], law: Law) -> None:
        for fill in fills:
            self._on_gpu |= fill.device >= 0
            if law.is_of_shape:
                self.keep([fill.tensor])
        self._append(_Fills(law, fills, [fill.extent for fill in fills]))

    def call(self, call: Call) -> Tensor:
        self._append(call)
        return call.tensor

    def fill_keyed(self, law: Law, tensor: Tensor, key: Key | None) -> None:
        assert key is not None  # as a plan has no seed while it is recorded
        self._append(_FillKeyed(law, tensor, key))

    def _append(self, step: _Step) -> None:
        self._steps.append(step)
        self._prepared = self._packed = None

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Let `run` raise if one of these tensors moves, though only views of it are recorded."""
        self._places += [(t, geometry.place(t)) for t in tensors if type(t) in geometry.PLAIN]

    def __len__(self) -> int:
        return len(self._steps)

    def run(
        self,
        progress: bool | None = None,
        *,
        seed: int | None = None,
        prefix: str = "",
        strip: str = "",
    ) -> None:
        """Write everything that was recorded.

        Args:
            seed: take the numbers of the keyed stream instead of those of torch's default
                generators; see `Key`. Names are those of the model for `record`, otherwise the
                number of the call
            prefix: put before the names
            strip: left out at their beginning
            progress: show a bar (with tqdm, if installed) while matrices become orthogonal; by
                default on a terminal, if that takes more than two seconds

        Raises:
            RuntimeError: a tensor has moved, or a mode is active that has to see torch's operators.
        """
        before = recording.set_recorder(None)
        try:
            if isinstance(before, Capture):
                before.settle("Plan.run")
                before.wrote_by("Plan.run", self._tensors(), seed is None)
            elif not recording.modes_allow():
                raise RuntimeError("a Plan cannot run under a mode, transform or tracer of torch")
            if self._on_gpu:
                execute.refuse_in_graph()
            if seed is not None:
                self._run_keyed(Key(seed).seed, prefix, strip)
            elif self._prepared is not None:
                if not self._prepared.run():
                    raise RuntimeError(_MOVED)
            else:
                self._run_steps(before, progress)
        finally:
            recording.set_recorder(before)

    def _tensors(self) -> Iterator[Tensor]:
        for step in self._steps:
            if isinstance(step, _Fills):
                yield from (fill.tensor for fill in step.fills)
            elif isinstance(step, Call | _FillKeyed):
                yield step.tensor

    def _run_steps(self, block: object, progress: bool | None) -> None:
        if any(geometry.place(t) != place for t, place in self._places):
            raise RuntimeError(_MOVED)
        fills: list[Fill] = []
        calls = 0
        for step in self._steps:
            if not isinstance(step, _Fills):
                calls += 1
                execute.run(fills, progress)
                fills = []
                step()
                if isinstance(block, Capture):
                    block.settle("Plan.run")
            elif step.has_moved():
                raise RuntimeError(_MOVED)
            else:
                fills += step.fills
        if calls == 0 and self._packed is None:
            self._prepared = execute.prepare(fills, [t for t, _ in self._places])
            self._packed = execute.pack(fills)
        if self._prepared is not None:
            self._prepared.run()
        elif self._packed is not None:
            self._packed.run(progress)
        else:
            execute.run(fills, progress)

    def _run_keyed(self, seed: int, prefix: str, strip: str) -> None:
        if any(geometry.place(t) != place for t, place in self._places):
            raise RuntimeError(_MOVED)
        short = names.stripped([name for name, _ in self._names], strip)
        named = ((prefix + name, t) for name, (_, t) in zip(short, self._names))
        run = _Keyed(seed, prefix, names.Names(named))
        for number, step in enumerate(self._steps):
            if isinstance(step, _Fills):
                if step.has_moved():
                    raise RuntimeError(_MOVED)
                run.add(step, number)
            elif not (isinstance(step, Call) and run.call(step, number)):
                run.flush()
                step()
        run.flush()

    if TYPE_CHECKING:  # methods are set below, one for each function

        def __getattr__(self, name: str) -> Callable[..., Tensor]: ...


def _recording(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the method of Plan that records a call of a function."""

    @functools.wraps(function)
    def method(self: Plan, *args: Any, **kwargs: Any) -> Tensor:
        before = recording.set_recorder(self)
        self.modes, self.orthogonal = 0, None
        if before is not None:  # a scope around it
            self.modes, self.orthogonal = before.modes, before.orthogonal
        try:
            return function(*args, **kwargs)
        finally:
            recording.set_recorder(before)

    sign = inspect.signature(function)
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    shown = sign.replace(parameters=[me, *sign.parameters.values()])
    setattr(method, "__signature__", shown)  # noqa: B010  (mypy knows no such attribute)
    return method


for _name in (*init.__all__, "orthogonal_batched_"):
    if _name.endswith("_"):
        setattr(Plan, _name, _recording(getattr(init, _name)))


def record(model: nn.Module, fn: Fn | None = None) -> Plan:
    """Return a Plan that does what `init_model_(model, fn)` does, again and again.

    Args:
        model: any module; its tensors must keep their memory while the plan is used
        fn: as for `init_model_`

    Returns:
        A Plan. Nothing is written and nothing drawn before its `run()`, which draws on from where
        the generators are then.

    Raises:
        RuntimeError: `fn` reads what it initialises, so that what it does cannot be known before.
    """
    rule = checked("record", model, fn)
    if recording.this_thread.recorder is not None or not recording.modes_allow():
        raise RuntimeError("record cannot be used inside another Plan, fused block or mode")
    made = Plan()
    run = Initialisation(model)
    tensors = list({id(t): t for t in tensors_of(model)}.values())
    counted = tuple(t for t in tensors if not t.is_inference())
    versions = tuple(t._version for t in counted)
    generator = source.current(torch.default_generator)
    walk = Walk(made, made._append, tensors)
    try:
        try:
            recording.set_recorder(walk)
            with hooked(), walk:
                run(rule)
        finally:
            recording.set_recorder(None)
    finally:
        recording.set_recorder(None)  # again: Ctrl-C may have come just before
        # In-place operators have counted up, though nothing was written.
        torch_api.set_versions(counted, versions)
    if source.current(torch.default_generator) != generator:
        raise RuntimeError("record: the function draws or sets a seed, which cannot be recorded")
    run.warn(3)
    made.keep(tensors)
    made._names = [(name, t) for name, _, _, t in named_tensors(model)]
    return made


class _Keyed:
    """Runs a Plan's steps with the numbers of a seed, as many at once as touch other memory."""

    def __init__(self, seed: int, prefix: str, named: names.Names) -> None:
        self._seed, self._prefix, self._names = seed, prefix, named
        self._works: list[Work | None] = []
        self._room = Room()
        self._others: list[Fill] = []  # of generators of the caller's own

    def add(self, step: _Fills, number: int) -> None:
        generator = step.fills[0].generator
        if generator is not None and not source.is_default(generator):
            self.flush_works()
            self._others += step.fills
        else:
            self._put(step.fills[0].tensor, step.law, number)

    def call(self, call: Call, number: int) -> bool:
        """Write the law of a call that was left to torch; return False if it has to be torch's."""
        if call.name in laws.DRAW_NOTHING:
            return False
        if call.generator is not None and not source.is_default(call.generator):
            return False
        self._put(call.tensor, call.law(), number)
        return True

    def _put(self, t: Tensor, law: Law, number: int) -> None:
        law = keyed_numbers.checked(law, t.dtype)
        here = shard.local(t)
        if here.numel() == 0 or here.is_meta:
            return
        self.flush_others()
        found = self._names.find(geometry.storage_id(here), names.box_of(here), law)
        label = f"#{self._prefix}step.{number}" if found is None else "/" + found[0]
        slabs = None if found is None else found[1]
        slabs, t = shard.slabs(t) if slabs is None else slabs, here
        work = Work.of(law, derived(self._seed, label), t, slabs)
        begin = geometry.address_of(t)
        extent = begin, begin + geometry.span(t) * t.element_size()
        fill = Fill(t, law.op, rank=0 if t.is_contiguous() else 1)
        dropped = self._room.take(fill, extent, len(self._works), True)
        if dropped is None:
            self.flush_works()
            dropped = self._room.take(fill, extent, 0, True)
        for position in dropped or ():
            self._works[position] = None
        self._works.append(work)

    def flush_others(self) -> None:
        others, self._others = self._others, []
        execute.run(others)

    def flush(self) -> None:
        self.flush_works()
        self.flush_others()

    def flush_works(self) -> None:
        works = [work for work in self._works if work is not None]
        execute.run_keyed(works)
        counted = [work.tensor for work in works if not work.tensor.is_inference()]
        torch.autograd.graph.increment_version(counted)
        self._works, self._room = [], Room()
