# SPDX-License-Identifier: BSD-3-Clause
"""What all of fastinit's dispatch modes have in common."""

from __future__ import annotations

from fastinit.core import torch_api


class Mode(torch_api.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode whose first operator does not load a compiler.

    torch wraps __torch_dispatch__ so that torch.compile leaves it alone, which takes an import of
    more than a second at the first operator; this gets the same done beforehand.
    """

    supports_higher_order_operators = True
    _hidden = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        cls._hidden = torch_api.hide_from_dynamo(cls.__torch_dispatch__.__code__)
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return not cls._hidden
