# SPDX-License-Identifier: BSD-3-Clause
"""Plans: fills that are recorded once and run together, again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from fastinit import execute, init, probe
from fastinit import model as model_
from fastinit.capture import names
from fastinit.capture.capture import Capture
from fastinit.capture.hooks import hooked
from fastinit.capture.names import named_tensors
from fastinit.capture.operators import (
    EMPTY,
    FACTORIES,
    FILLS,
    OVERWRITING,
    PLAIN,
    is_inplace,
    is_view,
    leaves,
)
from fastinit.core import build, geometry, keyed_numbers, laws, recording, shard, source
from fastinit.core import fill as fill_
from fastinit.core.fill import Fill, Room
from fastinit.core.key import Key, derived
from fastinit.core.laws import Law
from fastinit.core.mode import Mode
from fastinit.core.recording import Call, Recorder
from fastinit.core.work import Work
from fastinit.cpu import fills as cpu_fills
from fastinit.model import Fn

_MOVED = (
    "a tensor of the plan has other memory or another shape than when it was recorded; record the "
    "plan anew"
)


class _Fills(NamedTuple):
    """A call that is done natively, all of its fills in one run."""

    law: Law
    fills: list[Fill]

    def has_moved(self) -> bool:
        return any(fill_.extent(fill) != fill.extent for fill in self.fills)


class _FillKeyed(NamedTuple):
    """A call with a Key."""

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
            fill.extent = fill_.extent(fill)
            self._on_gpu |= fill.device >= 0
            if law.is_of_shape:
                self.keep([fill.tensor])
        self._append(_Fills(law, fills))

    def call(self, call: Call) -> None:
        self._append(call)

    def fill_keyed(self, law: Law, tensor: Tensor, key: Key | None) -> None:
        assert key is not None  # as a plan has no seed while it is recorded
        self._append(_FillKeyed(law, tensor, key))

    def _append(self, step: _Step) -> None:
        self._steps.append(step)
        self._prepared = self._packed = None

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Raise in `run` if one of these has moved, though only views of them were recorded."""
        self._places += [(t, geometry.place(t)) for t in tensors if type(t) in PLAIN]

    def __len__(self) -> int:
        return len(self._steps)

    def run(
        self, progress: bool | None = None, *, seed: int | None = None, prefix: str = ""
    ) -> None:
        """Write everything that was recorded.

        Args:
            seed: take the numbers of the keyed stream instead of those of torch's default
                generators; see `Key`. Names are those of the model for `record`, otherwise the
                number of the call
            prefix: put before the names
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
                self._run_keyed(Key(seed).seed, prefix)
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

    def _run_keyed(self, seed: int, prefix: str) -> None:
        if any(geometry.place(t) != place for t, place in self._places):
            raise RuntimeError(_MOVED)
        run = _Keyed(seed, prefix, names.Names((prefix + name, t) for name, t in self._names))
        for number, step in enumerate(self._steps):
            if isinstance(step, _Fills):
                if step.has_moved():
                    raise RuntimeError(_MOVED)
                run.add(step, number)
            elif not (isinstance(step, Call) and run.call(step, number)):
                run.flush()
                step()
        run.flush()

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        filling = name in init.__all__ and name.endswith("_")
        if not filling and name != "orthogonal_batched_":
            raise AttributeError(f"'Plan' object has no attribute {name!r}")
        function = getattr(init, name)

        def record(*args: Any, **kwargs: Any) -> Tensor:
            before = recording.set_recorder(self)
            self.modes = 0 if before is None else before.modes  # of a block around it
            try:
                return function(*args, **kwargs)  # type: ignore[no-any-return]
            finally:
                recording.set_recorder(before)

        return record


def record(model: nn.Module, fn: Fn | None = None) -> Plan:
    """What `init_model_(model, fn)` would do, as a Plan that does it again and again.

    Args:
        model: any module; its tensors must keep their memory while the plan is used
        fn: as for `init_model_`

    Returns:
        A Plan. Nothing is written and nothing drawn before its `run()`, which draws on from where
        the generators are then.

    Raises:
        RuntimeError: `fn` reads what it initialises, so that what it does cannot be known before.
    """
    if recording.this_thread.recorder is not None or not recording.modes_allow():
        raise RuntimeError("record cannot be used inside another Plan, fused block or mode")
    made = Plan()
    tensors = list({id(t): t for t in model_.tensors_of(model)}.values())
    counted = tuple(t for t in tensors if not t.is_inference())
    versions = tuple(t._version for t in counted)
    generator = source.current(torch.default_generator)
    recording.set_recorder(walk := _Walk(made, tensors))
    try:
        with hooked(), walk:
            model_.apply(model, fn)
    finally:
        recording.set_recorder(None)
        # In-place operators have counted up, though nothing was written.
        torch._C._autograd._unsafe_set_version_counter(counted, versions)
    if source.current(torch.default_generator) != generator:
        raise RuntimeError("record: the function draws or sets a seed, which cannot be recorded")
    made.keep(tensors)
    made._names = [(name, t) for name, _, _, t in named_tensors(model)]
    return made


class _Keyed:
    """The steps of a Plan with the numbers of a seed: as many as touch different memory at once."""

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
        if not laws.draws(call.name):
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
        work = Work(law, derived(self._seed, label), t, slabs)
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


# ---- record --------------------------------------------------------------------------------------


class _Walk(Mode, Recorder):
    """Puts what is done to some tensors into a Plan instead of doing it.

    Tensors are written by the plan (the model's, and temporaries filled from a generator) or its
    constants, which must not change any more once a step of the plan reads them.
    """

    modes = 1

    def __init__(self, into: Plan, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._plan = into
        self._written = {geometry.storage_id(t) for t in tensors if _is_simple(t)}
        self._constants: set[int] = set()

    def add(self, fills: list[Fill], law: Law) -> None:
        self._written.update(geometry.storage_id(f.tensor) for f in fills)
        self._plan.add(fills, law)

    def call(self, call: Call) -> None:
        if any(isinstance(x, Tensor) for x in call.args):
            self._refuse(call.name)
        self._written.add(geometry.storage_id(call.tensor))
        self._plan.call(call)

    def fill_keyed(self, law: Law, tensor: Tensor, key: Key | None) -> None:
        self._written.add(geometry.storage_id(tensor))
        self._plan.fill_keyed(law, tensor, key)

    def read(self, t: Tensor, how: str) -> None:
        if _is_simple(t) and geometry.storage_id(t) in self._written | self._constants:
            self._refuse(how)

    expose = read

    def settle(self, reader: object = None) -> None:
        self._refuse(reader)

    @staticmethod
    def _refuse(what: object) -> NoReturn:
        raise RuntimeError(
            f"record: {what} reads what the function initialises, or draws or writes what cannot "
            "be repeated; what it does to the model cannot be known before it is done"
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        random = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        shape_only = func in EMPTY or (func in FACTORIES and not random)
        if is_view(func) or shape_only:
            return func(*args, **kwargs)
        for t in tensors:
            if not _is_simple(t):
                self._refuse(f"{func} of a {type(t).__name__}")
        keys = [geometry.storage_id(t) for t in tensors if t.layout is torch.strided]
        written = [key in self._written for key in keys]
        inplace = is_inplace(func) and len(keys) > 0
        if inplace and func._schema.name in OVERWRITING and keys[0] not in self._constants:
            t = tensors[0]
            whole = t.numel() * t.element_size() == geometry.storage_of(t).nbytes()
            if whole and (random or any(written)):  # a temporary that the plan makes each time
                written[0] = True
                self._written.add(keys[0])
        if func in FILLS and written[0] and not any(written[1:]):
            law = FILLS[func](args, kwargs)
            fill = law and probe.proved(build.one(law, args[0], kwargs.get("generator")))
            if law is not None and fill is not None:
                self.add([fill], law)
                return args[0]
        if not any(written):
            if random or (func._schema.is_mutable and keys[0] in self._constants):
                self._refuse(func)
            return func(*args, **kwargs)
        if not inplace or not written[0]:
            self._refuse(func)

        def again() -> None:
            with torch.no_grad():
                func(*args, **kwargs)

        self._constants.update(key for key, known in zip(keys, written) if not known)
        self._plan._append(again)
        return args[0] if func._schema.returns else None


def _is_simple(t: Tensor) -> bool:
    """Its values are what is in its storage."""
    if t.layout is not torch.strided:
        return False
    return type(t) in PLAIN or type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
