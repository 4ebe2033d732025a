# SPDX-License-Identifier: BSD-3-Clause
"""What all of fastinit's dispatch modes have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def _hide_from_dynamo(function: Any) -> bool:
    """Keep torch.compile from tracing a mode's code, without loading torch._dynamo."""
    try:
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):  # another torch
        return False
    return True


class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode whose first operator does not load a compiler.

    torch wraps __torch_dispatch__ so that torch.compile leaves it alone, which takes an import of
    more than a second at the first operator; this gets the same done beforehand.
    """

    supports_higher_order_operators = True
    _hidden = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        cls._hidden = _hide_from_dynamo(cls.__torch_dispatch__)
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return not cls._hidden
